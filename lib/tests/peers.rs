//! The names in `docs/peers.md` are those of the library.

#![cfg(all(feature = "fake", feature = "tokio", feature = "safe-mmio"))]
#![allow(
    dead_code,
    unreachable_code,
    unused_variables,
    clippy::diverging_sub_expression
)]

use std::collections::BTreeSet;

use barlease::config::{Capability, ConfigSpace};
use barlease::doctor::Doctor;
use barlease::fake::{FakeDevice, FakeIommu};
use barlease::pci::Pci;
use barlease::*;

/// The name in a piece of code, without generics and arguments.
fn name(text: &str) -> String {
    let call = text.split('(').next().unwrap_or(text);
    let mut depth = 0;
    let outside = call.chars().filter(|c| {
        depth += i32::from(*c == '<') - i32::from(*c == '>');
        depth == 0 && !matches!(c, '>' | ' ')
    });
    let name: String = outside.collect();
    name.replace("::::", "::").trim_end_matches(':').to_owned()
}

/// Each is compiled, in a function that is never called, and answered as text.
macro_rules! names {
    (types: $($type:ty),+; values: $($value:expr),+; calls: $($call:expr),+ $(,)?) => {{
        fn compiled() {
            $(let _ = size_of::<$type>();)+
            $(let _ = $value;)+
            $(let _ = $call;)+
        }
        let texts = [$(stringify!($type),)+ $(stringify!($value),)+ $(stringify!($call)),+];
        texts.into_iter().map(name).collect::<BTreeSet<String>>()
    }};
}

fn any<T>() -> T {
    unreachable!("nobody calls it")
}

fn names() -> BTreeSet<String> {
    names! {
        types: Region, RegionCapability, DmaBuffer, DmaOptions, FakeDevice, FakeIommu, Iommu, Leases<'_>;
        values:
            Backend::Group, Backend::Cdev, Capability::VITAL_PRODUCT_DATA,
            InterruptKind::Request, InterruptKind::Error,
            Device::open, Device::from_inherited, Device::into_parts,
            Device::set_vf_token, Device::reset, Device::hot_reset, Device::hot_reset_set,
            Device::enter_low_power, Device::feature, Device::has_feature, Device::regions,
            Device::read_region, Device::write_region, Device::alias_region,
            Device::set_memory_type, Device::enable_interrupts, Device::disable_interrupts,
            Device::set_interrupts, Device::interrupt_info, Device::mask_interrupt,
            Device::unmask_interrupt, Device::set_resample, Device::trigger_interrupt,
            Device::irq_number, Device::iommufd_id, Device::attach_page_table,
            Device::detach_page_table, Device::attach_pasid, Device::detach_pasid,
            Device::exportable_ranges,
            Error::remedy,
            OpenOptions::iommu, OpenOptions::noiommu, OpenOptions::vf_token,
            OpenOptions::unattached,
            Pci::bind, Pci::unbind, Pci::group_obstacles, Pci::set_reset_methods,
            Iommu::groups, Iommu::reserve, Iommu::allowed_ranges, Iommu::page_size,
            Iommu::available_mappings, Iommu::ioas,
            DmaOptions::below, ExportBuilder::stock,
            Mapping::register::<u32>, Mapping::typed::<u32>, Mapping::typed_read_only::<u32>,
            Mapping::write_only::<u32>, Mapping::array::<u32>, Mapping::mmio::<u32>,
            Mapping::copy_to, Mapping::copy_from,
            TypedRegister::<u32>::poll_until,
            dma::write_barrier, dma::read_barrier,
            Lease::map_guarded,
            ConfigSpace::read_u8, ConfigSpace::write_u32, ConfigSpace::identity,
            ConfigSpace::status, ConfigSpace::clear_status,
            ConfigSpace::capabilities, ConfigSpace::extended_capabilities, ConfigSpace::express,
            ConfigSpace::msi, ConfigSpace::msix, ConfigSpace::power_management,
            ConfigSpace::vendor_capabilities, ConfigSpace::extended_vendor_capabilities,
            ConfigSpace::capability,
            EventFd::wait, EventFd::wait_timeout, EventFd::into_async,
            Leases::export, Leases::revoke, Leases::revoke_id, Leases::status, Leases::list,
            Leases::events, Leases::set_tph;
        calls:
            Error::report(any::<&Error>()),
            Doctor::examine(any::<&Doctor>(), None),
            Device::from_fd(any::<std::fs::File>()),
            Device::from_bound_cdev(any::<std::fs::File>(), any()),
            Device::from_cdev(any::<std::fs::File>(), any()),
            Device::map_region(any::<&Device>(), 0, ..),
            Device::map_region_guarded(any::<&Device>(), 0, ..),
            Mapping::window(any::<&Mapping>(), ..),
            Mapping::fill(any::<&Mapping>(), .., 0),
            ConfigSpace::update_command(any::<&ConfigSpace<'_>>(), |command| command),
            Iommu::map_file(any::<&Iommu>(), any::<std::fs::File>(), 0..0, 0, DmaAccess::Read),
            Iommu::map_lease(any::<&Iommu>(), any(), 0, DmaAccess::Read),
            Iommu::from_container(any::<std::fs::File>()),
            Iommu::from_iommufd(any::<std::fs::File>(), None),
            Lease::send(any::<&Lease>(), any::<std::fs::File>()),
            Lease::receive(any::<std::fs::File>()),
    }
}

barlease::register_value! {
    struct Named: u32 {
        bit, with_bit: 0;
    }
}

#[test]
fn every_name_of_the_table_exists() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/peers.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut known = names();
    // A macro, and a function that is unsafe to call and takes an `impl Trait`.
    known.extend(["register_value", "Iommu::map_memory"].map(str::to_owned));
    // Names that are not the library's.
    known.extend(
        [
            "AsFd",
            "iommufd-ioctls",
            "capi/",
            "safe-mmio",
            "tokio",
            "fake",
        ]
        .map(str::to_owned),
    );
    let mut rows = 0;
    for line in text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| |"))
    {
        rows += 1;
        let cell = line.split(" | ").nth(1).unwrap();
        assert_ne!(cell.trim(), "-", "{line}");
        for name in cell.split('`').skip(1).step_by(2) {
            assert!(known.contains(name), "{name} is not checked: {line}");
        }
    }
    assert!(rows > 50, "{rows}");
    for name in known {
        assert!(
            text.contains(&format!("`{name}`")),
            "{name} is not in the table"
        );
    }
}
