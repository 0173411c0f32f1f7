#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| barlease_fuzz::list(input));
