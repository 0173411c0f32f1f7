//! The leases and mappings of one process, and the process's acts on them.
//!
//! A request is a list of numbers, the first of which says what is asked; so is the reply. This
//! process answers its own requests itself, others get them through their [`Link`].

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::atomic::AtomicU32};

use barlease_oracle::{HUGE, Protection, Shot};

use super::fire;
use crate::{
    errno::Errno,
    map::{How, Map, READ, READ_WRITE, Sigbus},
    process::{self, Link},
};

/// The questions that can be asked. Numbers of buffers and mappings are the oracle's.
pub mod ask {
    /// Ends.
    pub const END: u64 = 0;
    /// Keeps an fd that follows: buffer.
    pub const TAKE: u64 = 1;
    /// Closes it: buffer.
    pub const CLOSE: u64 = 2;
    /// Maps: buffer, mapping, offset, length, protection, whether at a multiple of 2 MiB. Reply:
    /// errno.
    pub const MAP: u64 = 3;
    /// Unmaps: mapping.
    pub const UNMAP: u64 = 4;
    /// Unmaps a part: mapping, offset, length.
    pub const UNMAP_PART: u64 = 5;
    /// Protects: mapping, offset, length, protection. Reply: errno.
    pub const PROTECT: u64 = 6;
    /// Moves: mapping. Reply: errno.
    pub const MOVE: u64 = 7;
    /// Loads: mapping, offset. Reply: whether it worked, and the word.
    pub const READ: u64 = 8;
    /// Stores: mapping, offset, word. Reply: whether it worked.
    pub const WRITE: u64 = 9;
    /// Touches in a fork: mapping, offset, whether it must work; again and again. Reply: whether it
    /// was so.
    pub const FORK: u64 = 10;
    /// Touches until all is over: shots. Reply: how many touches.
    pub const FIRE: u64 = 11;
}

/// The leases and mappings of a process.
#[derive(Debug, Default)]
pub struct Holder {
    /// Buffers.
    pub fds: BTreeMap<u64, OwnedFd>,
    /// Mappings.
    pub maps: BTreeMap<u64, Map>,
}

/// A protection as a number of mmap.
#[must_use]
pub fn protection(protection: Protection) -> i32 {
    match protection {
        Protection::None => libc::PROT_NONE,
        Protection::Read => READ,
        Protection::ReadWrite => READ_WRITE,
    }
}

fn errno(answer: Result<(), Errno>) -> Vec<u64> {
    vec![answer.err().map_or(0, |errno| errno.0 as u64)]
}

impl Holder {
    /// Does what is asked.
    ///
    /// # Panics
    ///
    /// When it is asked for something that is not there.
    pub fn answer(&mut self, request: &[u64], phase: &AtomicU32) -> Vec<u64> {
        match *request {
            [ask::CLOSE, buffer] => {
                self.fds.remove(&buffer).expect("a buffer");
                vec![]
            }
            [ask::MAP, buffer, number, offset, length, prot, large] => {
                let mut how = How::shared().protection(prot as i32);
                if large != 0 {
                    how = how.align(HUGE);
                }
                let map = how.map(&self.fds[&buffer], offset, length);
                errno(map.map(|map| drop(self.maps.insert(number, map))))
            }
            [ask::UNMAP, number] => {
                self.maps.remove(&number).expect("a mapping");
                vec![]
            }
            [ask::UNMAP_PART, number, offset, length] => {
                let map = self.maps.get_mut(&number).expect("a mapping");
                map.unmap(offset, length);
                vec![]
            }
            [ask::PROTECT, number, offset, length, prot] => {
                errno(self.maps[&number].protect(offset, length, prot as i32))
            }
            [ask::MOVE, number] => {
                let map = self.maps.remove(&number).expect("a mapping");
                let (map, answer) = match map.moved() {
                    Ok(map) => (map, Ok(())),
                    Err((map, errno)) => (map, Err(errno)),
                };
                self.maps.insert(number, map);
                errno(answer)
            }
            [ask::READ, number, at] => match self.maps[&number].read(at) {
                Ok(word) => vec![1, word.into()],
                Err(Sigbus) => vec![0, 0],
            },
            [ask::WRITE, number, at, word] => {
                vec![self.maps[&number].write(at, word as u32).is_ok().into()]
            }
            [ask::FORK, ref touches @ ..] => {
                let touches: Vec<_> = touches
                    .chunks(3)
                    .map(|touch| (&self.maps[&touch[0]], touch[1], touch[2] != 0))
                    .collect();
                let fits = || {
                    let mut all = touches.iter();
                    all.all(|(map, at, works)| map.read(*at).is_ok() == *works)
                };
                vec![process::in_fork(fits).into()]
            }
            [ask::FIRE, ref shots @ ..] => {
                let shots: Vec<_> = fire::decode(shots);
                vec![fire::shoot(&self.maps, &shots, phase)]
            }
            _ => panic!("request {request:?}"),
        }
    }

    /// Answers the requests of another process until it has enough.
    pub fn serve(mut self, link: &Link, phase: &AtomicU32) {
        loop {
            let request = receive(link);
            match *request {
                [ask::END] => return,
                [ask::TAKE, buffer] => {
                    self.fds.insert(buffer, link.receive_fd());
                    send(link, &[]);
                }
                _ => send(link, &self.answer(&request, phase)),
            }
        }
    }
}

/// Sends a list of numbers.
pub fn send(link: &Link, words: &[u64]) {
    link.send(words.len() as u64);
    words.iter().for_each(|&word| link.send(word));
}

/// Waits for a list of numbers.
#[must_use]
pub fn receive(link: &Link) -> Vec<u64> {
    let count = link.receive();
    (0..count).map(|_| link.receive()).collect()
}

/// The request to shoot.
#[must_use]
pub fn fire_request(shots: &[Shot]) -> Vec<u64> {
    let mut request = vec![ask::FIRE];
    request.extend(fire::encode(shots));
    request
}
