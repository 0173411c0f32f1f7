//! Accesses of device memory that a SIGBUS cannot kill: single instructions with a recovery
//! address.
//!
//! Each access is one instruction of inline assembly, and beside it an entry in the section
//! `barlease_guard1` of the program: where the instruction begins, where it ends, and where to go
//! on if it faults. The SIGBUS handler looks its program counter up there ([`find`]) and moves it.
//! So a fault costs the access that made it and nothing else: there is nothing to put right, no
//! state, no fence, and the next access goes to the device again.
//!
//! The register `lost` holds 1 before the access and 0 behind it; a fault passes over the step from
//! 1 to 0.
//!
//! # The section
//!
//! An entry is three signed 32-bit distances, each from its own place, so that the table needs no
//! relocation when the program is loaded. Its name is a C identifier, for which the linker defines
//! `__start_` and `__stop_`; they are made hidden, so that a shared object that has the crate in it
//! sees its own. The flag `R` keeps the entries from being collected as garbage. The number in the
//! name is that of this format: several versions of the crate in one program share the section.
//!
//! Accessors that a Rust `dylib` passes on to another object by inlining have their entries in that
//! object, where the handler does not look: there a loss is a SIGBUS, as without a guard.
//!
//! # Why these instructions
//!
//! One access is one instruction with one memory operand in a register: it is never torn, merged or
//! repeated, a hypervisor can emulate it, the only thing in it that can fault is the device
//! memory, and Rust's memory model has nothing to say about it. There is no fence in it, so stores
//! to write-combining memory combine.

use std::arch::asm;

/// One entry of the table.
macro_rules! entry {
    () => {
        concat!(
            ".pushsection barlease_guard1, \"aR\", %progbits\n",
            ".balign 4\n",
            ".long 2b - .\n",
            ".long 3b - .\n",
            ".long 4b - .\n",
            ".popsection"
        )
    };
}

/// One access, and whether it was made: the instruction, the step of the flag, and the operands of
/// both but `lost`.
macro_rules! guarded {
    ($instruction:literal, $done:literal, $($operands:tt)+) => {{
        let lost: u32;
        // SAFETY: the caller of the access says that the place can be accessed or faults with
        // SIGBUS. After a fault the handler goes on at label 4, with `lost` as it was and what is
        // loaded undefined but unused.
        unsafe {
            asm!(
                concat!("2: ", $instruction),
                concat!("3: ", $done),
                "4:",
                entry!(),
                $($operands)+,
                lost = inout(reg) 1u32 => lost,
                options(nostack),
            );
        }
        lost == 0
    }};
}

/// Defines the load and the store of a type. The operands of the instructions are `{place}` and
/// `{value}`; `$wide` is the type of a register that holds what is loaded.
macro_rules! accesses {
    ($type:ty, $wide:ty, $class:ident, $load:literal, $store:literal, $done:literal) => {
        impl crate::mapping::raw::sealed::Sealed for $type {
            #[inline(always)]
            unsafe fn load_guarded(place: *const Self) -> Option<Self> {
                let value: $wide;
                let made =
                    guarded!($load, $done, place = in(reg) place, value = lateout(reg) value);
                made.then_some(value as Self)
            }

            #[inline(always)]
            unsafe fn store_guarded(place: *mut Self, value: Self) -> bool {
                guarded!($store, $done, place = in(reg) place, value = in($class) value)
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
mod instructions {
    use super::asm;

    const _: () = assert!(size_of::<usize>() == 8, "the x32 ABI is not supported");

    accesses!(u8, u32, reg_byte, "movzx {value:e}, byte ptr [{place}]",
        "mov byte ptr [{place}], {value}", "xor {lost:e}, {lost:e}");
    accesses!(u16, u32, reg, "movzx {value:e}, word ptr [{place}]",
        "mov word ptr [{place}], {value:x}", "xor {lost:e}, {lost:e}");
    accesses!(u32, u32, reg, "mov {value:e}, dword ptr [{place}]",
        "mov dword ptr [{place}], {value:e}", "xor {lost:e}, {lost:e}");
    accesses!(u64, u64, reg, "mov {value:r}, qword ptr [{place}]",
        "mov qword ptr [{place}], {value:r}", "xor {lost:e}, {lost:e}");
}

#[cfg(target_arch = "aarch64")]
#[rustfmt::skip]
mod instructions {
    use super::asm;

    accesses!(u8, u32, reg, "ldrb {value:w}, [{place}]",
        "strb {value:w}, [{place}]", "mov {lost:w}, wzr");
    accesses!(u16, u32, reg, "ldrh {value:w}, [{place}]",
        "strh {value:w}, [{place}]", "mov {lost:w}, wzr");
    accesses!(u32, u32, reg, "ldr {value:w}, [{place}]",
        "str {value:w}, [{place}]", "mov {lost:w}, wzr");
    accesses!(u64, u64, reg, "ldr {value:x}, [{place}]",
        "str {value:x}, [{place}]", "mov {lost:w}, wzr");
}

/// An entry: distances from the place of each field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Entry {
    begin: i32,
    end: i32,
    resume: i32,
}

/// Makes an entry of no instruction, so that there always is a section, and answers where the
/// section begins and ends.
macro_rules! bounds {
    ($($instruction:literal),+) => {{
        let start: *const Entry;
        let stop: *const Entry;
        // SAFETY: the assembly computes two addresses and touches no memory.
        unsafe {
            asm!(
                "2: 3: 4:",
                entry!(),
                ".hidden __start_barlease_guard1",
                ".hidden __stop_barlease_guard1",
                $($instruction,)+
                start = out(reg) start,
                stop = out(reg) stop,
                options(nostack, preserves_flags),
            );
        }
        (start, stop)
    }};
}

/// The table.
#[inline(never)]
fn table() -> &'static [Entry] {
    #[cfg(target_arch = "x86_64")]
    let (start, stop) = bounds!(
        "lea {start}, [rip + __start_barlease_guard1]",
        "lea {stop}, [rip + __stop_barlease_guard1]"
    );
    #[cfg(target_arch = "aarch64")]
    let (start, stop) = bounds!(
        "adrp {start}, __start_barlease_guard1",
        "add {start}, {start}, :lo12:__start_barlease_guard1",
        "adrp {stop}, __stop_barlease_guard1",
        "add {stop}, {stop}, :lo12:__stop_barlease_guard1"
    );
    let count = (stop.addr() - start.addr()) / size_of::<Entry>();
    // SAFETY: the linker put the entries of all objects, and nothing else, one behind the other
    // between the two symbols; the section is read-only and stays for as long as this code does.
    unsafe { std::slice::from_raw_parts(start, count) }
}

/// Where to go on after a fault of the instruction at `pc`, if it is a guarded access.
///
/// Async-signal-safe: loads of constants only.
pub(super) fn find(pc: usize) -> Option<usize> {
    let at = |field: &i32| {
        std::ptr::from_ref(field)
            .addr()
            .wrapping_add_signed(*field as isize)
    };
    table()
        .iter()
        .find(|entry| (at(&entry.begin)..at(&entry.end)).contains(&pc))
        .map(|entry| at(&entry.resume))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::raw::sealed::Sealed;

    #[test]
    fn accesses_have_their_width_and_touch_nothing_beside() {
        let mut memory = [0x1111_1111_1111_1111u64; 3];
        let middle = (&raw mut memory).cast::<u64>().wrapping_add(1);
        macro_rules! check {
            ($type:ty, $index:expr, $value:expr) => {{
                let place = middle.cast::<$type>().wrapping_add($index);
                // SAFETY: the place is in `memory`, aligned.
                assert!(unsafe { <$type>::store_guarded(place, $value) });
                // SAFETY: as above.
                assert_eq!(unsafe { <$type>::load_guarded(place) }, Some($value));
            }};
        }
        check!(u8, 0, 0xab);
        check!(u16, 1, 0xcdef);
        check!(u32, 1, 0xdead_beef);
        // SAFETY: as above.
        let whole = unsafe { u64::load_guarded(middle) };
        assert_eq!(whole, Some(0xdead_beef_cdef_11ab));
        check!(u64, 0, u64::MAX);
        assert_eq!(
            memory,
            [0x1111_1111_1111_1111, u64::MAX, 0x1111_1111_1111_1111]
        );
    }

    #[test]
    fn entries_are_of_code_and_nothing_else_is_found() {
        assert!(table().len() > 8, "{}", table().len());
        for entry in table() {
            let begin = (&raw const entry.begin)
                .addr()
                .wrapping_add_signed(entry.begin as isize);
            let end = (&raw const entry.end)
                .addr()
                .wrapping_add_signed(entry.end as isize);
            // One instruction.
            assert!(end - begin < 16, "{begin:#x}..{end:#x}");
            if begin < end {
                let resume = find(begin).unwrap();
                assert!(resume > begin && resume - end <= 8);
                assert_eq!(find(begin.wrapping_sub(1)).filter(|r| *r == resume), None);
                assert_eq!(find(end).filter(|r| *r == resume), None);
            }
        }
        assert_eq!(find(0), None);
        assert_eq!(find(usize::MAX), None);
    }
}
