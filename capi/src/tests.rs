//! The functions as C calls them, on a fake device; and the header against this source.

#![allow(unsafe_code, reason = "calls as C makes them")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a block of calls, as in a program"
)]

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt::Write as _;
use std::mem::{align_of, offset_of, size_of};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};

use barlease::fake::FakeDevice;
use barlease::{Device, Lease, Reasons};

use super::error;
use super::functions::*;
use super::mapping::Any;
use super::types::{self, CRange, CRecord, CStatus};

const HEADER: &str = include_str!("../include/barlease-lib.h");
const SOURCE: &str = include_str!("lib.rs");
const VERSIONS: &str = include_str!("../libbarlease.map");
const PAGE: usize = 4096;

// ---- The header --------------------

/// Name, arguments and result of each function, in C, from the Rust source.
fn functions() -> Vec<(String, Vec<String>, String)> {
    let mut found = Vec::new();
    // Those of the macro, for each width.
    let accesses = SOURCE.split("accesses! {").nth(1).unwrap();
    let accesses = accesses.split('}').next().unwrap();
    let text = SOURCE.replace("$read", "READ").replace("$write", "WRITE");
    for head in text.split("pub unsafe extern \"C\" fn ").skip(1) {
        let (name, rest) = head.split_once('(').unwrap();
        let (arguments, result) = match rest.split_once(") -> ") {
            // One without a result has no arrow before its body.
            Some((arguments, result)) if !arguments.contains('{') => {
                (arguments, result.split(" {").next().unwrap())
            }
            _ => (rest.split_once(") {").unwrap().0, "()"),
        };
        let arguments: Vec<_> = arguments
            .split(',')
            .filter_map(|argument| argument.split_once(": "))
            .map(|(_, its)| its.trim().to_owned())
            .collect();
        let widths: Vec<_> = if name == "READ" || name == "WRITE" {
            accesses
                .split(',')
                .map(|one| one.split_whitespace().collect::<Vec<_>>())
                .map(|one| (one[usize::from(name == "WRITE")], one[2]))
                .collect()
        } else {
            vec![(name, "")]
        };
        for (name, value) in widths {
            let arguments = arguments
                .iter()
                .map(|argument| c_type(&argument.replace("$value", value)))
                .collect();
            found.push((name.to_owned(), arguments, c_type(result)));
        }
    }
    found
}

fn c_type(rust: &str) -> String {
    if let Some(pointee) = rust.strip_prefix("*mut ") {
        return format!("{} *", c_type(pointee));
    }
    if let Some(pointee) = rust.strip_prefix("*const ") {
        return format!("const {} *", c_type(pointee));
    }
    match rust {
        "()" | "c_void" => "void",
        "c_int" => "int",
        "c_char" => "char",
        "u8" => "uint8_t",
        "u16" => "uint16_t",
        "u32" => "uint32_t",
        "u64" => "uint64_t",
        "usize" => "size_t",
        "Device" => "struct barlease_device",
        "Lease" => "struct barlease_lease",
        "Any" => "struct barlease_mapping",
        "CRange" => "struct barlease_range",
        "CStatus" => "struct barlease_status",
        "CRecord" => "struct barlease_record",
        "Option<Each>" => "callback",
        "Option<Section>" => "section",
        unknown => panic!("no type of C's for {unknown}"),
    }
    .to_owned()
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("barlease-capi-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Compiles a text against the headers.
fn compile(name: &str, compiler: &[&str], text: &str) {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = folder(name);
    let file = folder.join(if compiler[0] == "c++" {
        "test.cc"
    } else {
        "test.c"
    });
    std::fs::write(&file, text).unwrap();
    let output = Command::new(compiler[0])
        .args(&compiler[1..])
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-c", "-o"])
        .arg(folder.join("test.o"))
        .arg("-I")
        .arg(top.join("include"))
        .arg("-I")
        .arg(top.join("../abi/include"))
        .arg(&file)
        .output()
        .expect("a C compiler");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let _ = std::fs::remove_dir_all(&folder);
    assert!(output.status.success(), "{message}\n{text}");
}

#[test]
fn the_header_declares_every_function_as_it_is() {
    let mut text = String::from(
        "#include <barlease-lib.h>\n\
         typedef int (*callback)(const struct barlease_record *, void *);\n\
         typedef int (*section)(void *, void *);\n",
    );
    let functions = functions();
    assert!(functions.len() >= 35, "{functions:?}");
    for (name, arguments, result) in &functions {
        let arguments = match arguments.is_empty() {
            true => "void".to_owned(),
            false => arguments.join(", "),
        };
        // Another type for the same name does not compile.
        writeln!(text, "{result} {name}({arguments});").unwrap();
    }
    compile("prototypes", &["cc", "-std=c11"], &text);
}

#[test]
fn header_source_and_version_script_have_the_same_functions() {
    let rust: BTreeSet<_> = functions().into_iter().map(|function| function.0).collect();
    let versions: BTreeSet<_> = VERSIONS
        .lines()
        .filter_map(|line| line.trim().strip_suffix(';'))
        .filter(|line| line.starts_with("barlease"))
        .map(str::to_owned)
        .collect();
    assert_eq!(rust, versions);
    // Without comments, a name and a parenthesis is a declaration.
    let mut code = String::new();
    for part in HEADER.split("/*") {
        code.push_str(part.split_once("*/").map_or(part, |(_, code)| code));
    }
    let header: BTreeSet<_> = code
        .match_indices("barlease_")
        .filter_map(|(at, _)| code[at..].split_once('(').map(|(name, _)| name))
        .filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
        .map(str::to_owned)
        .collect();
    assert_eq!(rust, header);
}

#[test]
fn structures_and_constants_are_those_of_the_header() {
    let mut text = String::from("#include <barlease-lib.h>\n#include <errno.h>\n");
    let mut is = |c: String, rust: usize| {
        writeln!(text, "_Static_assert({c} == {rust}, \"{c}\");").unwrap();
    };
    macro_rules! structure {
        ($rust:ident $c:literal: $($field:ident)+) => {
            is(concat!("sizeof(struct ", $c, ")").to_owned(), size_of::<$rust>());
            is(concat!("_Alignof(struct ", $c, ")").to_owned(), align_of::<$rust>());
            // Names every field.
            #[allow(dead_code, reason = "only the pattern counts")]
            fn all(value: &$rust) {
                let $rust { $($field: _),+ } = value;
            }
            $(
                let field = stringify!($field);
                is(format!("offsetof(struct {}, {field})", $c), offset_of!($rust, $field));
            )+
        };
    }
    {
        structure!(CRange "barlease_range": offset length);
    }
    {
        structure!(CStatus "barlease_status":
            state reasons memory_type bar size ranges attachments);
    }
    {
        structure!(CRecord "barlease_record":
            id size bar ranges state reasons memory_type flags attachments dma_mappings
            mappings wc_mappings name);
    }
    let mut defined = BTreeSet::from(["BARLEASE_LIB_H".to_owned()]);
    macro_rules! constants {
        ($($name:ident)+) => {$(
            let name = format!("BARLEASE_{}", stringify!($name));
            is(name.clone(), types::$name as usize);
            defined.insert(name);
        )+};
    }
    constants! {
        LEASE_OK LEASE_REVOKED LEASE_DEAD UNCACHED WRITE_COMBINING RECORD_INTERNAL
        RECORD_DRAINING RECORD_WRITABLE EXPORT_READ_ONLY REVOKE_DO_NOT_WAIT RECEIVE_ANY_FILE
        MAP_GUARDED MAP_READ_ONLY MAP_SCRATCH
    }
    macro_rules! errnos {
        ($($name:ident)+) => {$(
            is(stringify!($name).to_owned(), error::$name as usize);
        )+};
    }
    errnos! {
        EPERM EIO ENXIO EBADF EACCES EFAULT EBUSY EXDEV ENODEV EINVAL EROFS ERANGE EPROTO EOPNOTSUPP
        ETIMEDOUT EINPROGRESS ESTALE EREMOTEIO EMEDIUMTYPE
    }
    compile("layout", &["cc", "-std=c11"], &text);
    let header: BTreeSet<_> = HEADER
        .lines()
        .filter_map(|line| line.strip_prefix("#define "))
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect();
    assert_eq!(defined, header);
}

#[test]
fn the_header_is_c99_and_goes_with_that_of_the_kernel() {
    let text = "#include <barlease-lib.h>\n#include <barlease.h>\n#include <barlease-lib.h>\n\
                int unused;\n";
    compile("c99", &["cc", "-std=c99"], text);
    // Where there is a compiler for it.
    if Command::new("c++").arg("--version").output().is_ok() {
        compile("cxx", &["c++", "-std=c++11"], text);
    }
}

#[test]
fn the_example_of_the_documentation_compiles() {
    let page = include_str!("../../docs/c.md");
    let listing = page.split("```c\n").nth(1).unwrap();
    compile(
        "docs",
        &["cc", "-std=c11"],
        listing.split("```").next().unwrap(),
    );
}

#[test]
fn handles_may_be_used_by_any_thread() {
    fn shared<T: Send + Sync>() {}
    shared::<Device>();
    shared::<Lease>();
    shared::<Any>();
}

// ---- The functions --------------------

fn message() -> String {
    // SAFETY: The function promises a text until the next failure of this thread.
    let text = unsafe { CStr::from_ptr(barlease_last_error()) };
    text.to_str().unwrap().to_owned()
}

#[track_caller]
fn refused(answer: c_int, errno: c_int, part: &str) {
    assert_eq!(answer, -errno, "{}", message());
    assert!(message().contains(part), "{}", message());
}

/// The handles of a test, which close themselves.
struct Owner {
    fake: FakeDevice,
    device: *mut Device,
}

impl Owner {
    fn new() -> Self {
        let fake = FakeDevice::builder().bar(0, 0x4000).build().unwrap();
        let fd: OwnedFd = fake.fd().unwrap();
        let bdf = CString::new(fake.bdf().to_string()).unwrap();
        let mut device = null_mut();
        // SAFETY: A text and a place.
        let answer = unsafe { barlease_device_adopt(fd.as_raw_fd(), bdf.as_ptr(), &mut device) };
        assert_eq!(answer, 0, "{}", message());
        Self { fake, device }
    }

    fn export(&self, flags: u32) -> *mut Lease {
        let range = CRange {
            offset: 0,
            length: 0x2000,
        };
        let mut lease = null_mut();
        // SAFETY: A handle, one range, a place.
        let answer = unsafe { barlease_export(self.device, 0, &range, 1, flags, &mut lease) };
        assert_eq!(answer, 0, "{}", message());
        lease
    }

    fn status(&self, lease: *mut Lease) -> CStatus {
        let mut status = CStatus {
            state: 77,
            reasons: 77,
            memory_type: 77,
            bar: 77,
            size: 77,
            ranges: 77,
            attachments: 77,
        };
        let size = size_of::<CStatus>();
        // SAFETY: Handles, and a place of that size.
        let answer = unsafe { barlease_status(self.device, lease, &mut status, size) };
        assert_eq!(answer, 0, "{}", message());
        status
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // SAFETY: A handle that nobody uses any more.
        unsafe { barlease_device_close(self.device) };
    }
}

unsafe extern "C" fn collect(record: *const CRecord, context: *mut c_void) -> c_int {
    // SAFETY: The context is what the test handed over.
    let records = unsafe { &mut *context.cast::<Vec<CRecord>>() };
    // SAFETY: The record is valid during the call.
    records.push(unsafe { *record });
    if records.len() == 2 { 5 } else { 0 }
}

fn list(owner: &Owner) -> (c_int, Vec<CRecord>) {
    let mut records = Vec::<CRecord>::new();
    let context = (&raw mut records).cast();
    // SAFETY: A handle, and the context that `collect` expects.
    let answer = unsafe { barlease_list(owner.device, Some(collect), context) };
    (answer, records)
}

#[test]
fn an_owner_leases_lists_and_revokes() {
    let owner = Owner::new();
    let first = owner.export(0);
    let second = owner.export(types::EXPORT_READ_ONLY);
    // SAFETY: Handles.
    unsafe {
        assert_eq!(barlease_lease_size(first), 0x2000);
        assert_eq!(barlease_lease_is_writable(first), 1);
        assert_eq!(barlease_lease_is_writable(second), 0);
        assert!(barlease_lease_fd(first) >= 0 && barlease_device_fd(owner.device) >= 0);
    }
    let (mut first_id, mut second_id) = (0, 0);
    // SAFETY: Handles and places.
    unsafe {
        assert_eq!(barlease_lease_id(first, &mut first_id), 0);
        assert_eq!(barlease_lease_id(second, &mut second_id), 0);
    }
    let (answer, records) = list(&owner);
    assert_eq!(answer, 5, "what the function returned");
    let ids: BTreeSet<_> = records.iter().map(|record| record.id).collect();
    assert_eq!(ids, BTreeSet::from([first_id, second_id]));
    for record in &records {
        assert_eq!((record.size, record.state), (0x2000, types::LEASE_OK));
        assert_eq!(record.name[31], 0);
        let writable = record.flags & types::RECORD_WRITABLE != 0;
        assert_eq!(writable, record.id == first_id);
    }

    owner.fake.take_memory(Reasons::RESET);
    let status = owner.status(first);
    assert_eq!(
        (status.state, status.reasons, status.size, status.ranges),
        (types::LEASE_REVOKED, Reasons::RESET.bits(), 0x2000, 1)
    );
    owner.fake.give_memory();

    // SAFETY: Handles.
    unsafe {
        assert_eq!(barlease_revoke(owner.device, first), 0, "{}", message());
        refused(
            barlease_revoke(owner.device, first),
            error::ESTALE,
            "revoked for good",
        );
        assert_eq!(barlease_revoke_id(owner.device, second_id, 0), 0);
        let again = barlease_revoke_id(owner.device, second_id, 0);
        refused(again, error::ESTALE, "revoked for good");
        refused(
            barlease_revoke_id(owner.device, u64::MAX, 0),
            2, // ENOENT
            "revoke",
        );
        let flags = barlease_revoke_id(owner.device, second_id, 6);
        refused(flags, error::EINVAL, "0x6");
        barlease_lease_close(second);
    }
    assert_eq!(owner.status(first).state, types::LEASE_DEAD);
    // SAFETY: A handle that nobody uses any more.
    unsafe { barlease_lease_close(first) };
}

#[test]
fn a_revocation_that_does_not_wait_says_so() {
    let owner = Owner::new();
    let lease = owner.export(0);
    let mut id = 0;
    // SAFETY: A handle and a place.
    unsafe { assert_eq!(barlease_lease_id(lease, &mut id), 0) };
    owner.fake.set_importers(barlease::LeaseId::new(id), 1);
    // SAFETY: A handle.
    let answer = unsafe { barlease_revoke_id(owner.device, id, types::REVOKE_DO_NOT_WAIT) };
    refused(answer, error::EINPROGRESS, "importer");
    let (_, records) = list(&owner);
    assert!(
        records[0].flags & types::RECORD_DRAINING != 0,
        "{records:?}"
    );
    // SAFETY: A handle that nobody uses any more.
    unsafe { barlease_lease_close(lease) };
}

#[test]
fn an_event_comes_with_a_change() {
    let owner = Owner::new();
    // SAFETY: A handle.
    let fd = unsafe { barlease_events(owner.device) };
    assert!(fd >= 0, "{}", message());
    // SAFETY: The function made it for the caller.
    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let event = barlease::EventFd::from_fd(fd).unwrap();
    assert_eq!(event.take().unwrap(), 0);
    let lease = owner.export(0);
    // SAFETY: Handles; the second one is not used any more.
    unsafe {
        assert_eq!(barlease_revoke(owner.device, lease), 0);
        barlease_lease_close(lease);
    }
    assert!(event.take().unwrap() > 0);
}

#[test]
fn a_status_of_another_size_is_cut_or_filled_up() {
    let owner = Owner::new();
    let lease = owner.export(0);
    let mut bytes = [0xaa_u8; 64];
    for (size, untouched) in [(4, 4), (64, 64), (0, 0)] {
        bytes.fill(0xaa);
        let place = bytes.as_mut_ptr().cast();
        // SAFETY: Handles, and no more than 64 bytes, of any alignment.
        let answer = unsafe { barlease_status(owner.device, lease, place, size) };
        assert_eq!(answer, 0);
        assert!(bytes[untouched..].iter().all(|byte| *byte == 0xaa));
        assert!(
            bytes[size.min(size_of::<CStatus>())..size]
                .iter()
                .all(|byte| *byte == 0)
        );
    }
    // SAFETY: A handle that nobody uses any more.
    unsafe { barlease_lease_close(lease) };
}

/// A lease that is a file.
fn file(bytes: u64) -> (std::fs::File, *mut Lease) {
    let folder = folder("file");
    let path = folder.join(format!("{:?}", std::thread::current().id()));
    let mut options = std::fs::File::options();
    let file = options.read(true).write(true).create(true).truncate(true);
    let file = file.open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(bytes).unwrap();
    let mut lease = null_mut();
    // SAFETY: A place.
    let answer = unsafe { barlease_lease_adopt(file.as_raw_fd(), &mut lease) };
    assert_eq!(answer, 0, "{}", message());
    (file, lease)
}

#[test]
fn a_guarded_access_to_what_is_gone_is_an_error_until_it_is_back() {
    let (file, lease) = file(2 * PAGE as u64);
    let mut mapping = null_mut();
    // SAFETY: A handle and a place.
    let answer = unsafe { barlease_map(lease, 0, 0, types::MAP_GUARDED, &mut mapping) };
    assert_eq!(answer, 0, "{}", message());
    file.set_len(0).unwrap();
    let mut value = 0x77_u32;
    let mut block = [1_u8; 64];
    // SAFETY: Handles, places and 64 bytes.
    unsafe {
        refused(barlease_write32(mapping, 4, 1), error::EREMOTEIO, "0x4");
        refused(
            barlease_read32(mapping, 8, &mut value),
            error::EREMOTEIO,
            "revoked",
        );
        assert_eq!(value, 0x77);
        let target = block.as_mut_ptr().cast();
        let read = barlease_read_block(mapping, 16, target, 64);
        refused(read, error::EREMOTEIO, "revoked");
        let source = block.as_ptr().cast();
        let written = barlease_write_block(mapping, 16, source, 64);
        refused(written, error::EREMOTEIO, "revoked");
        assert_eq!(barlease_last_done(), 0);
        // All but the last 16 bytes are there.
        file.set_len(PAGE as u64).unwrap();
        let written = barlease_write_block(mapping, PAGE - 48, source, 64);
        refused(
            written,
            error::EREMOTEIO,
            "0x10 mapped bytes at offset 0x1000",
        );
        assert_eq!(barlease_last_done(), 48);
        refused(
            barlease_read32(mapping, 1, &mut value),
            error::EINVAL,
            "align",
        );
        assert_eq!(barlease_last_done(), 0);
    }
    file.set_len(2 * PAGE as u64).unwrap();
    // SAFETY: Handles and a place; none is used afterwards.
    unsafe {
        assert_eq!(barlease_write32(mapping, 4, 9), 0, "{}", message());
        assert_eq!(barlease_read32(mapping, 4, &mut value), 0);
        assert_eq!(value, 9);
        barlease_lease_close(lease);
        barlease_unmap(mapping);
    }
}

/// Stores a number, whose address is the context, at the beginning and the end of a page.
unsafe extern "C" fn store(address: *mut c_void, context: *mut c_void) -> c_int {
    // SAFETY: As the tests call it.
    let value = unsafe { *context.cast::<u32>() };
    for at in [0, PAGE - 4] {
        let place = address.wrapping_byte_add(at).cast::<u32>();
        // SAFETY: As above.
        unsafe { place.write_volatile(value) };
    }
    7
}

#[test]
fn code_that_has_the_address_survives_a_loss() {
    let (file, lease) = file(2 * PAGE as u64);
    let (mut mapping, mut guarded, mut value) = (null_mut(), null_mut(), 5_u32);
    let context = (&raw mut value).cast::<c_void>();
    let (offset, scratch) = (PAGE as u64, types::MAP_SCRATCH);
    // SAFETY: Handles, places, a page, and a context of 4 bytes.
    unsafe {
        let both = scratch | types::MAP_GUARDED;
        let mapped = barlease_map(lease, 0, 0, both, &mut mapping);
        refused(mapped, error::EINVAL, "not both");
        let mapped = barlease_map(lease, offset, 0, scratch, &mut mapping);
        assert_eq!(mapped, 0, "{}", message());
        assert_eq!(barlease_section(mapping, Some(store), context), 7);
        assert_eq!(barlease_is_lost(mapping), 0);

        // Other functions know what it is.
        refused(
            barlease_section(mapping, None, context),
            error::EFAULT,
            "access",
        );
        refused(
            barlease_read32(mapping, 0, &mut value),
            error::EOPNOTSUPP,
            "barlease_section",
        );
        let mapped = barlease_map(lease, 0, 0, types::MAP_GUARDED, &mut guarded);
        assert_eq!(mapped, 0, "{}", message());
        refused(
            barlease_section(guarded, Some(store), context),
            error::EINVAL,
            "SCRATCH",
        );
        refused(barlease_recover(guarded), error::EINVAL, "SCRATCH");
        assert_eq!(barlease_read32(guarded, PAGE, &mut value), 0);
        assert_eq!(value, 5);

        file.set_len(0).unwrap();
        assert_eq!(barlease_is_lost(mapping), 0);
        let lost = barlease_section(mapping, Some(store), context);
        refused(lost, error::EREMOTEIO, "revoked");
        assert_eq!(barlease_is_lost(mapping), 1);
        file.set_len(2 * PAGE as u64).unwrap();
        refused(
            barlease_section(mapping, Some(store), context),
            error::EREMOTEIO,
            "revoked",
        );
        assert_eq!(barlease_recover(mapping), 0, "{}", message());
        value = 6;
        assert_eq!(barlease_section(mapping, Some(store), context), 7);
        assert_eq!(barlease_read32(guarded, 2 * PAGE - 4, &mut value), 0);
        assert_eq!(value, 6);
        barlease_lease_close(lease);
        barlease_unmap(mapping);
        barlease_unmap(guarded);
    }
}

#[test]
fn accesses_of_each_width_are_made_or_refused() {
    let (_file, lease) = file(2 * PAGE as u64);
    let mut plain = null_mut();
    let mut part = null_mut();
    // SAFETY: A handle and places; the lease is not used any more.
    unsafe {
        assert_eq!(barlease_map(lease, 0, 0, 0, &mut plain), 0);
        let flags = types::MAP_READ_ONLY | types::MAP_GUARDED;
        let page = PAGE as u64;
        assert_eq!(barlease_map(lease, page, page, flags, &mut part), 0);
        let mut none = null_mut();
        for (offset, length) in [
            (1, 0),
            (0, 1),
            (2 * page, 0),
            (page, 2 * page),
            (page, u64::MAX),
        ] {
            let answer = barlease_map(lease, offset, length, 0, &mut none);
            assert_eq!(
                answer,
                -error::EINVAL,
                "{offset:#x} {length:#x}: {}",
                message()
            );
        }
        refused(
            barlease_map(lease, 0, 0, 8, &mut none),
            error::EINVAL,
            "0x8",
        );
        assert!(none.is_null());
        barlease_lease_close(lease);
        assert_eq!(barlease_mapping_length(plain), 2 * PAGE);
        assert_eq!(barlease_mapping_length(part), PAGE);
        assert!(!barlease_mapping_address(plain).is_null());
    }
    let (mut a, mut b, mut c, mut d) = (0_u8, 0_u16, 0_u32, 0_u64);
    // SAFETY: Handles and places.
    unsafe {
        assert_eq!(barlease_write64(plain, PAGE, 0x0807_0605_0403_0201), 0);
        assert_eq!(barlease_read8(part, 1, &mut a), 0);
        assert_eq!(barlease_read16(part, 2, &mut b), 0);
        assert_eq!(barlease_read32(part, 4, &mut c), 0);
        assert_eq!(barlease_read64(part, 0, &mut d), 0);
        assert_eq!(
            (a, b, c, d),
            (2, 0x0403, 0x0807_0605, 0x0807_0605_0403_0201)
        );
        assert_eq!(barlease_write8(plain, PAGE, 0x11), 0);
        assert_eq!(barlease_write16(plain, PAGE + 2, 0x2222), 0);
        assert_eq!(barlease_write32(plain, PAGE + 4, 0x3333_3333), 0);
        assert_eq!(barlease_read64(part, 0, &mut d), 0);
        assert_eq!(d, 0x3333_3333_2222_0211);
        refused(barlease_write8(part, 0, 1), error::EROFS, "read-only");
        refused(barlease_read16(plain, 1, &mut b), error::EINVAL, "aligned");
        for offset in [2 * PAGE, usize::MAX] {
            let answer = barlease_read8(plain, offset, &mut a);
            refused(answer, error::ERANGE, "out of bounds");
        }
    }
    let mut block = [7_u8; 16];
    // SAFETY: Handles, and memory of that length or none.
    unsafe {
        let target = block.as_mut_ptr().cast::<c_void>();
        for (offset, length) in [(2 * PAGE - 8, 16), (usize::MAX, 16), (0, usize::MAX)] {
            let answer = barlease_read_block(plain, offset, target, length);
            refused(answer, error::ERANGE, "out of bounds");
        }
        assert_eq!(block, [7; 16]);
        assert_eq!(barlease_write_block(plain, 3, target, 16), 0);
        assert_eq!(barlease_read64(plain, 8, &mut d), 0);
        assert_eq!(d, 0x0707_0707_0707_0707);
        assert_eq!(barlease_write_block(plain, 0, null(), 0), 0);
        assert_eq!(barlease_read_block(plain, 0, null_mut(), 0), 0);
        let answer = barlease_read_block(plain, 0, null_mut(), 1);
        refused(answer, error::EFAULT, "target is NULL");
        barlease_unmap(plain);
        barlease_unmap(part);
    }
}

#[test]
fn a_lease_is_passed_with_a_deadline() {
    let (_file, lease) = file(PAGE as u64);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (ours, theirs) = (ours.as_raw_fd(), theirs.as_raw_fd());
    let mut got = null_mut();
    let any = types::RECEIVE_ANY_FILE;
    // SAFETY: Handles and places.
    unsafe {
        let late = barlease_lease_receive(theirs, any, 20, &mut got);
        refused(late, error::ETIMEDOUT, "receive");
        assert_eq!(barlease_lease_send(lease, ours, -1), 0, "{}", message());
        // Not a dma-buf.
        let refusal = barlease_lease_receive(theirs, 0, -1, &mut got);
        refused(refusal, error::EPROTO, "receive");
        assert!(got.is_null());
        assert_eq!(barlease_lease_send(lease, ours, 1000), 0, "{}", message());
        assert_eq!(barlease_lease_receive(theirs, any, 1000, &mut got), 0);
        assert_eq!(barlease_lease_size(got), PAGE as u64);
        let time = barlease_lease_send(lease, ours, -2);
        refused(time, error::EINVAL, "timeout_ms");
        let socket = barlease_lease_send(lease, -1, 0);
        refused(socket, error::EBADF, "socket");
        barlease_lease_close(got);
        barlease_lease_close(lease);
    }
}

#[test]
fn null_and_nonsense_are_refused_and_null_can_be_freed() {
    let mut device = null_mut();
    let mut lease = null_mut();
    // SAFETY: Null, or places and texts.
    unsafe {
        let answer = barlease_device_open(null(), &mut device);
        refused(answer, error::EFAULT, "bdf is NULL");
        let answer = barlease_device_open(c"nonsense".as_ptr(), &mut device);
        refused(answer, error::EINVAL, "nonsense");
        let answer = barlease_device_open(c"\xff".as_ptr(), &mut device);
        refused(answer, error::EINVAL, "UTF-8");
        let answer = barlease_device_open(c"ffff:ff:1f.7".as_ptr(), &mut device);
        refused(answer, error::ENODEV, "no such PCI device");
        let answer = barlease_device_open(c"0000:00:00.0".as_ptr(), null_mut());
        refused(answer, error::EFAULT, "device is NULL");
        for fd in [-1, -7, 1_000_000] {
            let answer = barlease_device_adopt(fd, null(), &mut device);
            refused(answer, error::EBADF, "fd");
            refused(barlease_lease_adopt(fd, &mut lease), error::EBADF, "fd");
        }
        assert!(device.is_null() && lease.is_null());
        refused(barlease_device_fd(null()), error::EFAULT, "device is NULL");
        refused(barlease_lease_fd(null()), error::EFAULT, "lease is NULL");
        refused(barlease_events(null()), error::EFAULT, "device is NULL");
        assert_eq!(barlease_lease_size(null()), 0);
        assert_eq!(barlease_mapping_length(null()), 0);
        assert!(barlease_mapping_address(null()).is_null());
        let owner = Owner::new();
        let answer = barlease_export(owner.device, 0, null(), 1, 0, &mut lease);
        refused(answer, error::EFAULT, "ranges is NULL");
        let answer = barlease_list(owner.device, None, null_mut());
        refused(answer, error::EFAULT, "each is NULL");
        let whole = owner.export(0);
        refused(
            barlease_lease_set_name(whole, c"a name that is much too long for it".as_ptr()),
            error::EINVAL,
            "31",
        );
        refused(
            barlease_set_memory_type(owner.device, whole, 2),
            error::EINVAL,
            "no memory type 2",
        );
        barlease_lease_close(whole);
        barlease_device_close(null_mut());
        barlease_lease_close(null_mut());
        barlease_unmap(null_mut());
    }
}

#[test]
fn steering_tags_are_set_or_refused() {
    let owner = Owner::new();
    let lease = owner.export(0);
    // SAFETY: Handles that live.
    let set = |tag, extended, hint| unsafe {
        barlease_set_steering_tags(owner.device, lease, tag, extended, hint)
    };
    for (tag, extended, hint) in [(-1, -1, 0), (0, -1, 0), (255, 65535, 3)] {
        assert_eq!(set(tag, extended, hint), 0, "{}", message());
    }
    refused(set(256, -1, 0), error::EINVAL, "8-bit tag 256");
    refused(set(-2, -1, 0), error::EINVAL, "8-bit tag -2");
    refused(set(-1, 65536, 0), error::EINVAL, "16-bit tag 65536");
    refused(set(-1, -1, 4), error::EINVAL, "hint 4");
    refused(set(-1, -1, 256), error::EINVAL, "hint 256");
    let tags = |tag, extended| super::types::steering_tags(tag, extended, 2).ok();
    let hint = barlease::Tph::new().processing_hint(2);
    assert_eq!(tags(-1, -1), Some(hint));
    assert_eq!(tags(7, -1), Some(hint.steering_tag(7)));
    assert_eq!(tags(-1, 9), Some(hint.steering_tag_ext(9)));
    // SAFETY: It was made here and is not used after.
    unsafe { barlease_lease_close(lease) };
}

#[test]
fn a_bar_gets_an_alias() {
    let owner = Owner::new();
    let alias = |bar, memory_type, region: *mut u32| {
        // SAFETY: A handle that lives, and a place or NULL.
        unsafe { barlease_alias_region(owner.device, bar, memory_type, region) }
    };
    let (mut first, mut again) = (0, 0);
    assert_eq!(alias(0, 1, &mut first), 0, "{}", message());
    assert_eq!(alias(0, 1, &mut again), 0, "{}", message());
    assert!(first > 8 && first == again, "{first} {again}");
    let mut none = 77;
    refused(alias(0, 0, &mut none), error::EINVAL, "alias");
    refused(alias(0, 2, &mut none), error::EINVAL, "no memory type 2");
    refused(alias(1, 1, &mut none), error::ENODEV, "alias");
    refused(alias(0, 1, null_mut()), error::EFAULT, "region is NULL");
    assert_eq!(none, 77);
}

#[test]
fn each_thread_has_its_own_text() {
    // SAFETY: Null.
    unsafe { refused(barlease_device_fd(null()), error::EFAULT, "device") };
    let other = std::thread::spawn(|| {
        assert_eq!(message(), "");
        // SAFETY: Null.
        unsafe { refused(barlease_lease_fd(null()), error::EFAULT, "lease") };
    });
    other.join().unwrap();
    assert!(message().contains("device"));
}
