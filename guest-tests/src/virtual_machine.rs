//! A virtual machine with one processor, which makes single accesses to slots over mappings: what
//! KVM makes of them.
//!
//! The program is in real mode: a segment begins at the address of the access, so any physical
//! address below 4 GiB is reached without page tables of the machine's own.

use std::path::Path;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::{errno::EFAULT, map::Map, page_size};

/// Where the slots of the tests begin: the program is at 0.
pub const SLOTS: u64 = 0x1000_0000;

/// `mov eax, [bx]; hlt`
const LOAD: (u64, u32) = (0, 0xf407_8b66);
/// `mov [bx], eax; hlt`
const STORE: (u64, u32) = (4, 0xf407_8966);
/// `again: inc dword [bx]; jmp again`
const COUNT: (u64, u64) = (8, 0x00fb_eb07_ff66);

/// How a run of the processor has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It did what it was to do; this is its register.
    Done(u32),
    /// `KVM_RUN` has failed with EFAULT.
    Fault,
    /// The access is the VMM's to answer: nothing is behind the address, or it was a store to a
    /// read-only slot.
    Emulate,
}

/// A virtual machine.
#[derive(Debug)]
pub struct VirtualMachine {
    processor: VcpuFd,
    machine: VmFd,
    /// The program; it goes last.
    _program: Map,
}

impl VirtualMachine {
    /// Whether this kernel and this processor have KVM.
    #[must_use]
    pub fn works() -> bool {
        Path::new("/dev/kvm").exists()
    }

    /// A machine with the program and no other memory.
    ///
    /// # Panics
    ///
    /// When KVM refuses.
    #[must_use]
    pub fn new() -> Self {
        let kvm = Kvm::new().expect("open /dev/kvm");
        let machine = kvm.create_vm().expect("KVM_CREATE_VM");
        let program = Map::anonymous(page_size());
        let write = |at: u64, code: u32| program.write(at, code).expect("write the program");
        write(LOAD.0, LOAD.1);
        write(STORE.0, STORE.1);
        #[expect(clippy::cast_possible_truncation, reason = "halves")]
        for (at, code) in [(0, COUNT.1 as u32), (4, (COUNT.1 >> 32) as u32)] {
            write(COUNT.0 + at, code);
        }
        set(&machine, 0, 0, &program, program.len(), 0);
        let processor = machine.create_vcpu(0).expect("KVM_CREATE_VCPU");
        Self {
            processor,
            machine,
            _program: program,
        }
    }

    /// Backs a slot by a mapping, which must outlive its use.
    pub fn back(&self, slot: u32, address: u64, map: &Map) {
        set(&self.machine, slot, address, map, map.len(), 0);
    }

    /// The same; stores are the VMM's to answer.
    pub fn back_read_only(&self, slot: u32, address: u64, map: &Map) {
        set(
            &self.machine,
            slot,
            address,
            map,
            map.len(),
            KVM_MEM_READONLY,
        );
    }

    /// Takes a slot away.
    pub fn delete(&self, slot: u32, map: &Map) {
        set(&self.machine, slot, 0, map, 0, 0);
    }

    /// Loads a word.
    pub fn load(&mut self, address: u64) -> End {
        self.run(LOAD.0, address, 0)
    }

    /// Stores a word.
    pub fn store(&mut self, address: u64, value: u32) -> End {
        self.run(STORE.0, address, value)
    }

    /// Adds one to a word again and again, until that ends for a reason.
    pub fn count(&mut self, address: u64) -> End {
        self.run(COUNT.0, address, 0)
    }

    fn run(&mut self, program: u64, address: u64, value: u32) -> End {
        let processor = &mut self.processor;
        let mut special = processor.get_sregs().expect("KVM_GET_SREGS");
        special.cs.base = 0;
        special.cs.selector = 0;
        special.ds.base = address;
        processor.set_sregs(&special).expect("KVM_SET_SREGS");
        let mut registers = processor.get_regs().expect("KVM_GET_REGS");
        registers.rip = program;
        registers.rflags = 2;
        registers.rax = value.into();
        registers.rbx = 0;
        processor.set_regs(&registers).expect("KVM_SET_REGS");
        let end = match processor.run() {
            Ok(VcpuExit::Hlt) => None,
            Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => Some(End::Emulate),
            Ok(VcpuExit::MemoryFault { .. }) => Some(End::Fault),
            Err(error) if error.errno() == EFAULT.0 => Some(End::Fault),
            other => panic!("KVM_RUN: {other:?}"),
        };
        end.unwrap_or_else(|| {
            let registers = self.processor.get_regs().expect("KVM_GET_REGS");
            #[expect(clippy::cast_possible_truncation, reason = "EAX is half of it")]
            End::Done(registers.rax as u32)
        })
    }
}

impl Default for VirtualMachine {
    fn default() -> Self {
        Self::new()
    }
}

fn set(machine: &VmFd, slot: u32, address: u64, map: &Map, len: u64, flags: u32) {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: address,
        memory_size: len,
        userspace_addr: map.address() as u64,
    };
    // SAFETY: the machine reaches memory of this process through the addresses of a mapping, whose
    // content nothing here relies on; after the end of the mapping, `KVM_RUN` fails or the slot is
    // gone.
    unsafe { machine.set_user_memory_region(region) }.expect("KVM_SET_USER_MEMORY_REGION");
}
