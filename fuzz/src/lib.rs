//! The targets: each takes any bytes, and panics if the library does what it must not.
//!
//! `fuzz_targets/` hands them to libFuzzer, `tests/seeded.rs` to a driver that needs a stable
//! compiler only.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use barlease::Error;
use barlease::Receiver;
use rustix::fs::MemfdFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

/// Bytes of a lease that stands in for the one that is passed.
pub const SIZE: u64 = 0x2000;

/// The record that travels with a lease. One that is understood means the same when it is written
/// again.
pub fn record(input: &[u8]) {
    barlease::fuzzing::record(input);
}

/// The capability chain of an answer of the kernel about a region. The first four bytes are where
/// it begins.
pub fn capabilities(input: &[u8]) {
    let Some((first, answer)) = input.split_first_chunk() else {
        return;
    };
    barlease::fuzzing::capabilities(answer, u32::from_le_bytes(*first));
}

/// The answer of the driver that lists leases. The first eight bytes are the id that it was asked
/// to begin behind.
pub fn list(input: &[u8]) {
    let Some((after, answer)) = input.split_first_chunk() else {
        return;
    };
    barlease::fuzzing::list(answer, u64::from_le_bytes(*after));
}

/// A connection. The first byte says where descriptors come along; the rest is sent in pieces whose
/// lengths follow from it. To any bytes the receiver answers a lease or an error, and keeps no
/// descriptor beyond.
pub fn stream(input: &[u8]) {
    let Some((plan, mut rest)) = input.split_first() else {
        return;
    };
    let (here, there) = UnixStream::pair().expect("a socket pair");
    let file = memory();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut receiver = Receiver::new().any_file();
    let mut turn = 0u32;
    let answer = loop {
        let length = (usize::from(*plan) + 1 + turn as usize * 7) % 97 + 1;
        let (piece, tail) = rest.split_at(length.min(rest.len()));
        rest = tail;
        if !piece.is_empty() {
            // The file with the first piece, and sometimes a pipe with one or another.
            let mut fds = Vec::new();
            if turn == 0 && plan & 0x80 == 0 {
                fds.push(file.as_fd());
            }
            if plan & 0x40 != 0 && turn == u32::from(plan & 3) {
                fds.push(writer.as_fd());
            }
            send(&here, piece, &fds);
        }
        turn += 1;
        let open = !rest.is_empty();
        match receiver.poll(&there) {
            Ok(None) if open => {}
            Ok(None) => {
                here.shutdown(std::net::Shutdown::Both).expect("open");
                break receiver.poll(&there);
            }
            answer => break answer,
        }
    };
    match answer {
        Ok(Some(lease)) => {
            if let Some(info) = lease.info() {
                assert_eq!(info.size, lease.size());
                assert!(info.bar <= 5);
            }
            let length = lease.map().expect("a mapping").len();
            assert_eq!(length as u64, lease.size());
        }
        Ok(None) => panic!("neither a lease nor an error at the end"),
        Err(Error::Malformed { .. } | Error::Invalid { .. }) => {}
        Err(error) => panic!("{}", error.report()),
    }
    // No descriptor of the pipe is left anywhere but here.
    drop((receiver, here, there, writer));
    let left = rustix::io::read(&reader, &mut [0; 1]);
    assert_eq!(left, Ok(0));
}

fn memory() -> OwnedFd {
    let fd = rustix::fs::memfd_create("lease", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, SIZE).expect("its size");
    fd
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    // A receiver that has had enough is still there.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags);
}

/// Inputs that are right, from which others are made: of each target a few.
#[must_use]
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    match target {
        "record" => records(),
        "stream" => records()
            .into_iter()
            .flat_map(|record| {
                [0x00, 0x05, 0x41, 0x80, 0xc0].map(|plan| {
                    let mut input = vec![plan];
                    input.extend(&record);
                    input
                })
            })
            .collect(),
        "capabilities" => chains(),
        "list" => lists(),
        _ => Vec::new(),
    }
}

fn records() -> Vec<Vec<u8>> {
    let mut one = b"BRL2".to_vec();
    one.extend(64u32.to_le_bytes());
    one.extend(3u32.to_le_bytes());
    one.extend([0, 0, 0, 0, 0x28, 0, 2, 0, 0, 0, 0, 0]);
    one.extend(SIZE.to_le_bytes());
    one.extend(1u32.to_le_bytes());
    one.extend(40u32.to_le_bytes());
    one.extend(0x1000u64.to_le_bytes());
    one.extend(SIZE.to_le_bytes());
    one.resize(64, 0);
    let mut nothing = b"BRL2".to_vec();
    nothing.extend(64u32.to_le_bytes());
    nothing.resize(64, 0);
    // Two ranges, and a member of a later version before and behind them.
    let mut two = one.clone();
    two.truncate(40);
    two.extend([0xee; 8]);
    for page in [3u64, 9] {
        two.extend((page * 0x1000).to_le_bytes());
        two.extend(0x1000u64.to_le_bytes());
    }
    two.extend([0xdd; 16]);
    let length = two.len() as u32;
    two[4..8].copy_from_slice(&length.to_le_bytes());
    two[32..40].copy_from_slice(&[2, 0, 0, 0, 48, 0, 0, 0]);
    vec![one, nothing, two]
}

fn chains() -> Vec<Vec<u8>> {
    let mut input = 32u32.to_le_bytes().to_vec();
    input.extend([0; 32]);
    // Sparse areas, MSI-X, alias, aliasable, an unknown one.
    let list: [(u16, &[u32]); 5] = [
        (1, &[2, 0, 0, 0, 0x1000, 0, 0x3000, 0, 0x1000, 0]),
        (3, &[]),
        (0xba01, &[2, 1]),
        (0xba02, &[1, 0]),
        (77, &[]),
    ];
    for (n, (id, payload)) in list.iter().enumerate() {
        let end = (input.len() - 4 + 8 + payload.len() * 4) as u32;
        let next = if n + 1 == list.len() { 0 } else { end };
        input.extend(id.to_ne_bytes());
        input.extend(1u16.to_ne_bytes());
        input.extend(next.to_ne_bytes());
        input.extend(payload.iter().flat_map(|word| word.to_ne_bytes()));
    }
    vec![input]
}

/// `struct vfio_device_feature`, `struct dma_buf_list` of the contract, and two records of 96
/// bytes.
fn lists() -> Vec<Vec<u8>> {
    let mut input = vec![0; 8 + 8];
    input.extend(2u64.to_ne_bytes());
    input.extend(2u32.to_ne_bytes());
    input.extend(96u32.to_ne_bytes());
    for id in [1u64, 2] {
        input.extend(id.to_ne_bytes());
        input.extend(SIZE.to_ne_bytes());
        // BAR, ranges, memory type, state, reasons, flags, counts, access.
        for word in [0u32, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0] {
            input.extend(word.to_ne_bytes());
        }
        input.extend(b"lease");
        input.extend([0; 27]);
    }
    vec![input]
}
