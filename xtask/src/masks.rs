//! Looks into the code of the built module: whether indexes that a user chose are masked after they
//! were compared, so that a processor which guesses the outcome of the comparison reads nothing
//! beyond an array (`kmod/src/sys/nospec.rs`).

use std::path::Path;

use anyhow::{Context, Result, ensure};
use barlease_lab::prepare::Prepared;

/// The function that masks.
const MASK: &str = "bl_array_index_nospec";

/// Parts of the names of the functions that take such an index, and how many arrays each reads with
/// it. Inlined functions are in these.
const READERS: &[(&str, usize)] = &[
    // The BAR's map and resource; whether it can be mapped.
    ("6DeviceNtNtB9_5bound8BarleaseE3bar", 2),
    ("7regions12is_aliasable", 1),
    ("7regions8alias_at", 1),
];

/// Instructions before a call in which its index is compared.
const NEAR: usize = 12;

/// Disassembles the module, and checks its code. Of code for this machine's architecture only, and
/// for kernels of a distribution: in what KASAN looks at, its own code stands between the steps.
pub(crate) fn check(prepared: &Prepared, module: &Path) -> Result<()> {
    if !prepared.kernel.arch().is_native() || prepared.kernel.watches().is_some() {
        return Ok(());
    }
    let output = prepared
        .sysroot
        .program("usr/bin/x86_64-linux-gnu-objdump")
        .args(["--disassemble", "--reloc", "--no-show-raw-insn"])
        .arg(module)
        .output()
        .context("run objdump")?;
    ensure!(
        output.status.success(),
        "objdump {}: {}",
        module.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    check_listing(&String::from_utf8_lossy(&output.stdout))
        .with_context(|| format!("code of {}", module.display()))
}

/// A function, and its instructions and relocations in the order of their addresses.
struct Function<'a> {
    name: &'a str,
    lines: Vec<&'a str>,
}

fn functions(listing: &str) -> Vec<Function<'_>> {
    let mut functions: Vec<Function<'_>> = Vec::new();
    for line in listing.lines() {
        let head = line
            .strip_suffix(">:")
            .and_then(|line| line.split_once(" <"));
        if let Some((_, name)) = head {
            let lines = Vec::new();
            functions.push(Function { name, lines });
        } else if let (Some((_, code)), Some(function)) = (
            line.split_once(":\t").or(line.split_once(": ")),
            functions.last_mut(),
        ) {
            function.lines.push(code.trim());
        }
    }
    functions
}

fn check_listing(listing: &str) -> Result<()> {
    let functions = functions(listing);
    let mask = functions
        .iter()
        .find(|function| function.name == MASK)
        .with_context(|| format!("there is no {MASK}"))?;
    let mut steps = ["cmp ", "sbb ", "and "].into_iter().peekable();
    for line in &mask.lines {
        let guesses = line.starts_with('j') && !line.starts_with("jmp");
        ensure!(!guesses, "{MASK} jumps on a condition: {line}");
        steps.next_if(|step| line.starts_with(step));
    }
    ensure!(steps.peek().is_none(), "{MASK} makes no mask");

    for (name, wanted) in READERS {
        let mut found = 0;
        for function in &functions {
            if function.name.contains(name) {
                found += masked(function)?;
            }
        }
        ensure!(
            found >= *wanted,
            "{name}: {found} masked indexes, not {wanted}"
        );
    }
    // Wherever else one is masked, it is in the same way.
    functions
        .iter()
        .try_for_each(|function| masked(function).map(drop))
}

/// How many indexes are masked in a function; an error if one is not compared before, or what comes
/// of it not used after.
fn masked(function: &Function<'_>) -> Result<usize> {
    let mut count = 0;
    for (at, line) in function.lines.iter().enumerate() {
        if !line.contains(&format!("{MASK}-0x")) {
            continue;
        }
        let before = &function.lines[at.saturating_sub(NEAR)..at];
        let compared = before.iter().any(|line| line.starts_with("cmp"))
            && before.iter().any(|line| is_bound(line));
        let after = function.lines.get(at + 1).copied().unwrap_or_default();
        let used = after.contains("%rax") || after.contains("%eax");
        // `Device::bar` compares once for both of its arrays.
        ensure!(
            compared || count > 0,
            "{}: an index is masked that was not compared",
            function.name
        );
        ensure!(
            used,
            "{}: the masked index is not used, but: {after}",
            function.name
        );
        count += 1;
    }
    Ok(count)
}

/// Whether it jumps on the outcome of a comparison of two numbers without signs.
fn is_bound(line: &str) -> bool {
    ["ja ", "jae ", "jb ", "jbe "]
        .iter()
        .any(|jump| line.starts_with(jump))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "\
0000000000000010 <bl_array_index_nospec>:
      10:\tcmp    %rsi,%rdi
      13:\tsbb    %rsi,%rsi
      16:\tmov    %rdi,%rax
      19:\tand    %rsi,%rax
      1c:\tjmp    21 <bl_array_index_nospec+0x11>
\t\t\t1d: R_X86_64_PLT32\t__x86_return_thunk-0x4
";

    fn reader(name: &str, index: &str) -> String {
        format!(
            "\
0000000000000100 <{name}>:
     100:\tcmp    $0x6,%edx
     103:\tjae    140 <{name}+0x40>
     105:\tmov    %edx,%edi
     107:\tcall   10c <{name}+0xc>
\t\t\t108: R_X86_64_PLT32\tbl_array_index_nospec-0x4
     10c:\tmov    (%rbx,{index},8),%rcx
"
        )
    }

    fn all(index: &str) -> String {
        let bar = READERS[0].0;
        let names = [bar, bar, "x7regions12is_aliasable", "x7regions8alias_at"];
        names.map(|name| reader(name, index)).concat()
    }

    #[test]
    fn masks_are_found() {
        check_listing(&format!("{HEAD}{}", all("%rax"))).unwrap();
    }

    #[test]
    fn code_without_them_is_found() {
        let without = all("%rax").replace(MASK, "something_else");
        for listing in [
            without.clone(),
            format!("{HEAD}{without}"),
            format!("{HEAD}{}", all("%rdx")),
            format!("{HEAD}{}", all("%rax").replace("cmp ", "mov ")),
            format!("{HEAD}{}", all("%rax")).replace("sbb ", "mov "),
            format!("{HEAD}{}", all("%rax")).replace("13:\tsbb", "13:\tjae"),
        ] {
            assert!(check_listing(&listing).is_err(), "{listing}");
        }
    }
}
