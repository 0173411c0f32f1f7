//! Leases of a device that another crate has opened: a VMM on rust-vmm's `vfio-ioctls`.
//!
//! The VMM keeps its device. All that the leases need is the number of its descriptor.
//!
//! ```console
//! # barlease device bind 0000:00:02.0
//! # cargo run --example vmm 0000:00:02.0 0
//! ```

use std::error::Error;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use barlease::{Device, State};
use vfio_ioctls::{VfioContainer, VfioDevice};

/// Leases the first page of a BAR, has it written by its holder, and takes it back.
pub fn run(bdf: &str, bar: u32) -> Result<u32, Box<dyn Error>> {
    // The VMM: with KVM it would pass the descriptor of KVM's VFIO device here.
    let container = Arc::new(VfioContainer::new(None)?);
    let path = Path::new("/sys/bus/pci/devices").join(bdf);
    let vmm = VfioDevice::new(&path, container, false)?;

    // The leases. `Leases::new` takes a `BorrowedFd`; the crate has a number only, so this
    // duplicates it.
    let device = Device::from_inherited(vmm.as_raw_fd())?;
    let leases = device.leases();
    let changes = leases.events()?;
    let lease = leases.export(bar).range(..0x1000).export()?;
    lease.set_name("for a holder")?;

    // The holder: another process, to which `lease.send` would pass it.
    let holder = lease.map_guarded()?;
    holder.write(0, 0x600d_u32)?;

    // The VMM sees what was written by its own means.
    let mut seen = [0; 4];
    vmm.region_read(bar, &mut seen, 0);

    // It takes the lease back, as when its guest resets the device or is migrated.
    for record in leases.list() {
        let record = record?;
        println!("{} {:?} {:#x} bytes", record.id, record.name, record.size);
        if !record.internal {
            leases.revoke_id(record.id)?;
        }
    }
    changes.wait()?;
    assert_eq!(leases.status(&lease)?.state, State::Dead);
    assert!(holder.write(0, 0_u32).is_err());
    Ok(u32::from_ne_bytes(seen))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let bdf = arguments.next().ok_or("usage: vmm BDF BAR")?;
    let bar = arguments.next().ok_or("usage: vmm BDF BAR")?.parse()?;
    println!("{:#x}", run(&bdf, bar)?);
    Ok(())
}
