//! The targets with inputs from a seeded generator: those of the corpus, changed at random.
//!
//! `BARLEASE_SEED` sets the seed, `BARLEASE_ROUNDS` the number of inputs of each target. A failure
//! prints the input; `corpus/TARGET/` keeps the ones that once failed, and is run first.

use std::path::Path;

/// `splitmix64`.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// One change of the kinds that parsers trip over.
fn change(input: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(input.len());
    match random.below(8) {
        0 => input.truncate(at),
        1 => {
            let more = random.below(64);
            input.extend((0..more).map(|_| random.next() as u8));
        }
        2 | 3 if !input.is_empty() => input[at] ^= 1 << random.below(8),
        4 if !input.is_empty() => input[at] = random.next() as u8,
        // A word that is small, large, or that of another place.
        kind if input.len() >= 4 => {
            let at = random.below(input.len() - 3) & !3;
            let from = random.below(input.len() - 3) & !3;
            let word = match (kind, random.below(4)) {
                (_, 0) => (random.below(80) as u32).to_le_bytes(),
                (_, 1) => (u32::MAX - random.below(80) as u32).to_le_bytes(),
                (_, 2) => (1u32 << random.below(32)).to_le_bytes(),
                _ => [0, 1, 2, 3].map(|n| input[from + n]),
            };
            input[at..at + 4].copy_from_slice(&word);
        }
        _ => {}
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn run(name: &str, target: fn(&[u8])) {
    let attempt = |input: &[u8]| {
        let answer = std::panic::catch_unwind(|| target(input));
        assert!(answer.is_ok(), "{name}: {input:02x?}");
    };
    let kept = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    for entry in std::fs::read_dir(kept).into_iter().flatten() {
        attempt(&std::fs::read(entry.unwrap().path()).unwrap());
    }
    let corpus = barlease_fuzz::corpus(name);
    corpus.iter().for_each(|input| attempt(input));
    let mut random = Random(number("BARLEASE_SEED", 1));
    for _ in 0..number("BARLEASE_ROUNDS", 20_000) {
        let mut input = corpus[random.below(corpus.len())].clone();
        for _ in 0..=random.below(4) {
            change(&mut input, &mut random);
        }
        attempt(&input);
    }
}

#[test]
fn record() {
    run("record", barlease_fuzz::record);
}

#[test]
fn stream() {
    run("stream", barlease_fuzz::stream);
}

#[test]
fn capabilities() {
    run("capabilities", barlease_fuzz::capabilities);
}

#[test]
fn list() {
    run("list", barlease_fuzz::list);
}

/// The right ones are understood: else the changed ones would test nothing.
#[test]
fn the_corpus_is_right() {
    for input in barlease_fuzz::corpus("record") {
        assert!(barlease::fuzzing::record(&input), "{input:02x?}");
    }
    for input in barlease_fuzz::corpus("capabilities") {
        let first = u32::from_le_bytes([input[0], input[1], input[2], input[3]]);
        assert_eq!(barlease::fuzzing::capabilities(&input[4..], first), Some(5));
    }
    for input in barlease_fuzz::corpus("list") {
        assert_eq!(barlease::fuzzing::list(&input[8..], 0), Some(2));
    }
}
