// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! The Rust types, the C header and the installed `linux/vfio.h` agree.
//!
//! A C program made from the header prints every size, offset and constant; this file holds the
//! same list for Rust. Both lists are checked for completeness against the sources, so a field or
//! a constant that is added on one side only fails here.

use barlease_abi as abi;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::mem::{align_of, offset_of, size_of};
use std::path::{Path, PathBuf};
use std::process::Command;

const HEADER: &str = include_str!("../include/barlease.h");
const RUST: &str = include_str!("../src/lib.rs");

/// A structure of both sides.
struct Layout {
    rust: &'static str,
    c: &'static str,
    size: usize,
    align: usize,
    /// Name, offset and size.
    fields: Vec<(&'static str, usize, usize)>,
}

/// Describes a structure. The pattern names every field, so a field that is missing in the list
/// does not compile.
macro_rules! layout {
    ($rust:ident, $c:literal, $($field:ident),+) => {{
        let value = abi::$rust::default();
        let abi::$rust { $($field),+ } = value;
        Layout {
            rust: stringify!($rust),
            c: $c,
            size: size_of::<abi::$rust>(),
            align: align_of::<abi::$rust>(),
            fields: vec![$((stringify!($field), offset_of!(abi::$rust, $field), size_of_val(&$field))),+],
        }
    }};
}

/// Structures that `barlease.h` defines.
fn own() -> Vec<Layout> {
    vec![
        layout!(DmaRange, "barlease_dma_range", offset, length),
        layout!(
            DmaBufGet,
            "barlease_dma_buf_get",
            region_index,
            open_flags,
            flags,
            nr_ranges
        ),
        layout!(DmaBufRevoke, "barlease_dma_buf_revoke", dmabuf_fd),
        layout!(
            DmaBufMemattr,
            "barlease_dma_buf_memattr",
            dmabuf_fd,
            memattr
        ),
        layout!(
            DmaBufTph,
            "barlease_dma_buf_tph",
            dmabuf_fd,
            flags,
            steering_tag_ext,
            steering_tag,
            ph
        ),
        layout!(
            AliasRegion,
            "barlease_alias_region",
            mapping_flags,
            region_index,
            alias_index,
            reserved,
            reserved2
        ),
        layout!(
            RegionCapAlias,
            "barlease_region_cap_alias",
            region_index,
            mapping_flags
        ),
        layout!(
            RegionCapAliasable,
            "barlease_region_cap_aliasable",
            supported_mapping_flags,
            reserved
        ),
        layout!(
            DmaBufStatus,
            "barlease_dma_buf_status",
            dmabuf_fd,
            reserved,
            state,
            reasons,
            memattr,
            region_index,
            size,
            nr_ranges,
            nr_attachments
        ),
        layout!(
            DmaBufList,
            "barlease_dma_buf_list",
            after,
            nr_records,
            record_size
        ),
        layout!(
            DmaBufRecord,
            "barlease_dma_buf_record",
            id,
            size,
            region_index,
            nr_ranges,
            memattr,
            state,
            reasons,
            flags,
            nr_attachments,
            nr_mappings,
            nr_vmas,
            nr_wc_vmas,
            access,
            reserved,
            name
        ),
        layout!(
            DmaBufRevokeId,
            "barlease_dma_buf_revoke_id",
            id,
            flags,
            reserved
        ),
        layout!(Events, "barlease_events", eventfd, reserved),
    ]
}

/// Structures that `linux/vfio.h` defines since it has `VFIO_DEVICE_FEATURE_DMA_BUF`.
fn stock() -> Vec<Layout> {
    vec![
        layout!(DmaRange, "vfio_region_dma_range", offset, length),
        layout!(
            DmaBufGet,
            "vfio_device_feature_dma_buf",
            region_index,
            open_flags,
            flags,
            nr_ranges
        ),
    ]
}

/// Rust name, C name, value.
fn constants() -> Vec<(&'static str, &'static str, u64)> {
    macro_rules! list {
        ($($rust:ident = $c:literal),+ $(,)?) => {
            vec![$((stringify!($rust), $c, u64::from(abi::$rust))),+]
        };
    }
    list![
        FEATURE_DMA_BUF = "BARLEASE_FEATURE_DMA_BUF",
        FEATURE_DMA_BUF_REVOKE = "BARLEASE_FEATURE_DMA_BUF_REVOKE",
        FEATURE_DMA_BUF_MEMATTR = "BARLEASE_FEATURE_DMA_BUF_MEMATTR",
        FEATURE_DMA_BUF_TPH = "BARLEASE_FEATURE_DMA_BUF_TPH",
        FEATURE_ALIAS_REGION = "BARLEASE_FEATURE_ALIAS_REGION",
        FEATURE_DMA_BUF_STATUS = "BARLEASE_FEATURE_DMA_BUF_STATUS",
        FEATURE_DMA_BUF_STOCK = "BARLEASE_FEATURE_DMA_BUF_STOCK",
        FEATURE_DMA_BUF_LIST = "BARLEASE_FEATURE_DMA_BUF_LIST",
        FEATURE_DMA_BUF_REVOKE_ID = "BARLEASE_FEATURE_DMA_BUF_REVOKE_ID",
        FEATURE_EVENTS = "BARLEASE_FEATURE_EVENTS",
        BUFFER_INTERNAL = "BARLEASE_BUFFER_INTERNAL",
        BUFFER_DRAINING = "BARLEASE_BUFFER_DRAINING",
        BUFFER_NAME_BUSY = "BARLEASE_BUFFER_NAME_BUSY",
        MAX_RECORDS = "BARLEASE_MAX_RECORDS",
        REVOKE_NOWAIT = "BARLEASE_REVOKE_NOWAIT",
        MAX_RANGES = "BARLEASE_MAX_RANGES",
        STATE_OK = "BARLEASE_STATE_OK",
        STATE_REVOKED = "BARLEASE_STATE_REVOKED",
        STATE_DEAD = "BARLEASE_STATE_DEAD",
        REASON_MEMORY_OFF = "BARLEASE_REASON_MEMORY_OFF",
        REASON_RESET = "BARLEASE_REASON_RESET",
        REASON_LOW_POWER = "BARLEASE_REASON_LOW_POWER",
        REASON_ERROR = "BARLEASE_REASON_ERROR",
        REASON_CONFIG_WRITE = "BARLEASE_REASON_CONFIG_WRITE",
        MEMATTR_NC = "BARLEASE_MEMATTR_NC",
        MEMATTR_WC = "BARLEASE_MEMATTR_WC",
        TPH_ST = "BARLEASE_TPH_ST",
        TPH_ST_EXT = "BARLEASE_TPH_ST_EXT",
        ALIAS_WC = "BARLEASE_ALIAS_WC",
        REGION_CAP_ALIAS = "BARLEASE_REGION_CAP_ALIAS",
        REGION_CAP_ALIASABLE = "BARLEASE_REGION_CAP_ALIASABLE",
        REGION_CAP_VERSION = "BARLEASE_REGION_CAP_VERSION",
    ]
}

/// A directory of this test's own below cargo's.
fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).expect("create the scratch directory");
    dir
}

/// Compiles and runs a C program and returns its lines `name value`.
fn run_c(name: &str, source: &str) -> BTreeMap<String, String> {
    let dir = scratch(name);
    let file = dir.join("layout.c");
    let program = dir.join("layout");
    std::fs::write(&file, source).expect("write the C program");

    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let compiler = cc::Build::new()
        .cargo_metadata(false)
        .target(&target)
        .host(&target)
        .opt_level(0)
        .out_dir(&dir)
        .try_get_compiler()
        .expect("this test needs a C compiler (cc, or the one that CC names)");
    let status = compiler
        .to_command()
        .arg("-I")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"))
        .arg(&file)
        .arg("-o")
        .arg(&program)
        .status()
        .expect("this test needs a C compiler (cc, or the one that CC names)");
    assert!(status.success(), "the C program does not compile: {status}");

    let output = Command::new(&program).output().expect("run the C program");
    assert!(output.status.success());
    String::from_utf8(output.stdout)
        .expect("UTF-8")
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// C statements that print a structure.
fn print_struct(source: &mut String, layout: &Layout) {
    let c = layout.c;
    writeln!(source, "P(\"size.{c}\", sizeof(struct {c}));").unwrap();
    writeln!(source, "P(\"align.{c}\", _Alignof(struct {c}));").unwrap();
    for (field, ..) in &layout.fields {
        writeln!(source, "P(\"{c}.{field}\", offsetof(struct {c}, {field}));").unwrap();
        writeln!(
            source,
            "P(\"size.{c}.{field}\", sizeof(((struct {c} *)0)->{field}));"
        )
        .unwrap();
    }
}

/// The output of `print_struct` when both sides agree.
fn expect_struct(expected: &mut BTreeMap<String, String>, layout: &Layout) {
    let c = layout.c;
    let mut put = |name: String, value: usize| expected.insert(name, value.to_string());
    put(format!("size.{c}"), layout.size);
    put(format!("align.{c}"), layout.align);
    for (field, offset, size) in &layout.fields {
        put(format!("{c}.{field}"), *offset);
        put(format!("size.{c}.{field}"), *size);
    }
}

const PROLOGUE: &str = "\
#include <stddef.h>
#include <stdio.h>
#define P(name, value) printf(\"%s %llu\\n\", name, (unsigned long long)(value))
";

#[test]
fn structures_and_constants_equal_the_c_header() {
    let mut source = format!("#include \"barlease.h\"\n{PROLOGUE}int main(void) {{\n");
    let mut expected = BTreeMap::new();
    for layout in own() {
        print_struct(&mut source, &layout);
        expect_struct(&mut expected, &layout);
    }
    for (_, c, value) in constants() {
        writeln!(source, "P(\"{c}\", {c});").unwrap();
        expected.insert(c.to_owned(), value.to_string());
    }
    source.push_str("printf(\"driver %s\\n\", BARLEASE_DRIVER_NAME);\nreturn 0; }\n");
    expected.insert("driver".to_owned(), abi::DRIVER_NAME.to_owned());

    assert_eq!(run_c("header", &source), expected);
}

#[test]
fn dma_buf_structures_equal_linux_vfio_h_where_it_has_them() {
    let mut source = format!(
        "#include <linux/vfio.h>\n{PROLOGUE}int main(void) {{\n#ifdef VFIO_DEVICE_FEATURE_DMA_BUF\n"
    );
    let mut expected = BTreeMap::new();
    for layout in stock() {
        print_struct(&mut source, &layout);
        expect_struct(&mut expected, &layout);
    }
    source.push_str("P(\"feature\", VFIO_DEVICE_FEATURE_DMA_BUF);\n");
    source.push_str("#else\nprintf(\"absent 1\\n\");\n#endif\nreturn 0; }\n");
    expected.insert("feature".to_owned(), abi::FEATURE_DMA_BUF.to_string());

    let found = run_c("vfio", &source);
    if found.contains_key("absent") {
        println!(
            "the installed linux/vfio.h is older than VFIO_DEVICE_FEATURE_DMA_BUF: nothing compared"
        );
        return;
    }
    assert_eq!(found, expected);
}

#[test]
fn every_constant_of_both_sources_is_compared() {
    let listed = constants();
    let names_c: BTreeSet<&str> = HEADER
        .lines()
        .map(str::trim_start)
        .filter_map(|line| {
            let rest = line.strip_prefix("#define ").or_else(|| {
                // Members of enumerations.
                (line.starts_with("BARLEASE_") && line.contains('=')).then_some(line)
            })?;
            let (name, value) = rest.split_once(|c: char| c.is_whitespace())?;
            (!value.trim().is_empty()).then_some(name)
        })
        .filter(|name| *name != "BARLEASE_DRIVER_NAME")
        .collect();
    assert_eq!(names_c, listed.iter().map(|(_, c, _)| *c).collect());

    let names_rust: BTreeSet<&str> = RUST
        .lines()
        .filter_map(|line| line.strip_prefix("pub const ")?.split_once(':'))
        .map(|(name, _)| name)
        // The first is compared as a string, the second has no C twin.
        .filter(|name| !["DRIVER_NAME", "MODULE_NAME"].contains(name))
        .collect();
    assert_eq!(names_rust, listed.iter().map(|(rust, ..)| *rust).collect());
}

#[test]
fn every_field_of_both_sources_is_compared() {
    let mut in_header: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut current = None;
    for line in HEADER.lines() {
        if let Some(name) = line
            .strip_prefix("struct ")
            .and_then(|l| l.strip_suffix(" {"))
        {
            current = Some(name);
            in_header.insert(name, Vec::new());
        } else if line.starts_with("};") {
            current = None;
        } else if let (Some(name), Some((declaration, _))) = (current, line.split_once(';')) {
            let field = declaration.split_whitespace().last().expect("a field");
            let field = field.split_once('[').map_or(field, |(name, _)| name);
            in_header.get_mut(name).expect("a structure").push(field);
        }
    }
    let listed: BTreeMap<&str, Vec<&str>> = own()
        .iter()
        .map(|layout| {
            (
                layout.c,
                layout.fields.iter().map(|(name, ..)| *name).collect(),
            )
        })
        .collect();
    assert_eq!(in_header, listed);

    let in_rust: BTreeSet<&str> = RUST
        .lines()
        .filter_map(|line| line.strip_prefix("pub struct ")?.strip_suffix(" {"))
        .collect();
    assert_eq!(in_rust, own().iter().map(|layout| layout.rust).collect());
}
