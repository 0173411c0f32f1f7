// SPDX-License-Identifier: GPL-2.0

//! The set of a function's buffers: numbered places, of which each holds a buffer or is vacant.
//!
//! A place stays where it is while its buffer is there, so who visits all of them can let go of the
//! lock and go on by number. Vacant places are a list, last in, first out, so adding and removing are
//! a few loads and stores. Room is allocated outside of the lock.

use crate::buffer::Buffer;
use kernel::{
    prelude::*,
    sync::{
        Arc,
        atomic::{Atomic, Relaxed},
    },
};

/// Where a buffer is in the table, if it is: the number of its place. Written with the table locked.
pub(crate) struct Number(Atomic<u32>);

impl Number {
    const NONE: u32 = u32::MAX;

    /// In none.
    pub(crate) fn new() -> Self {
        Self(Atomic::new(Self::NONE))
    }
}

enum Place {
    /// Nothing; and the next vacant place, or [`Number::NONE`].
    Vacant(u32),
    Taken(Arc<Buffer>),
}

/// All buffers of a function.
///
/// # Invariants
///
/// From `vacant` on all vacant places are linked, each once.
pub(crate) struct Table {
    places: KVVec<Place>,
    vacant: u32,
    taken: usize,
}

/// Memory for places.
pub(crate) struct Room(KVVec<Place>);

/// Places that are kept when no buffer is left.
const FEW: usize = 64;

impl Table {
    /// No places.
    pub(crate) fn new() -> Self {
        Self {
            places: KVVec::new(),
            vacant: Number::NONE,
            taken: 0,
        }
    }

    /// How many places are wanted before a buffer can be added; `None` when there is one.
    pub(crate) fn wants_room(&self) -> Option<usize> {
        let full = self.vacant == Number::NONE && self.places.len() == self.places.capacity();
        full.then(|| (2 * self.places.len()).max(FEW))
    }

    /// So many places.
    pub(crate) fn room(places: usize) -> Result<Room> {
        if places >= Number::NONE as usize {
            return Err(ENOMEM);
        }
        Ok(Room(KVVec::with_capacity(places, GFP_KERNEL_ACCOUNT)?))
    }

    /// Moves everything to `room`, if that is larger than what there is. What is to be dropped without
    /// the lock.
    pub(crate) fn move_to(&mut self, mut room: Room) -> Room {
        if room.0.capacity() > self.places.capacity() {
            for place in self.places.drain_all() {
                // There is room for more.
                let _ = room.0.push_within_capacity(place);
            }
            core::mem::swap(&mut self.places, &mut room.0);
        }
        room
    }

    /// Adds a buffer. There must be room.
    pub(crate) fn add(&mut self, buffer: Arc<Buffer>) {
        let number = self.vacant;
        let at = buffer.number();
        if let Some(place) = self.places.get_mut(number as usize) {
            if let Place::Vacant(next) = *place {
                self.vacant = next;
            }
            at.0.store(number, Relaxed);
            *place = Place::Taken(buffer);
        } else {
            at.0.store(self.places.len() as u32, Relaxed);
            // There is room, says the caller.
            let _ = self.places.push_within_capacity(Place::Taken(buffer));
        }
        self.taken += 1;
    }

    /// Takes out what is at that place.
    pub(crate) fn remove(&mut self, number: &Number) -> Option<(Arc<Buffer>, Option<Room>)> {
        let number = number.0.load(Relaxed);
        let place = self.places.get_mut(number as usize)?;
        if matches!(place, Place::Vacant(_)) {
            return None;
        }
        let Place::Taken(buffer) = core::mem::replace(place, Place::Vacant(self.vacant)) else {
            return None;
        };
        self.vacant = number;
        self.taken -= 1;
        if self.taken > 0 || self.places.len() <= FEW {
            return Some((buffer, None));
        }
        self.vacant = Number::NONE;
        Some((buffer, Some(Room(core::mem::take(&mut self.places)))))
    }

    /// Fills `batch`, from its first place on, with the buffers from place `from` on that are `wanted`;
    /// where to go on, unless there are no more.
    #[inline]
    pub(crate) fn look_up(
        &self,
        from: usize,
        mut wanted: impl FnMut(&Buffer) -> bool,
        batch: &mut [Option<Arc<Buffer>>],
    ) -> Option<usize> {
        let mut free = batch.iter_mut();
        let mut found = free.next()?;
        let places = self.places.get(from..)?;
        for (number, place) in (from..).zip(places) {
            let Place::Taken(buffer) = place else {
                continue;
            };
            if !wanted(buffer) {
                continue;
            }
            *found = Some(buffer.clone());
            match free.next() {
                Some(place) => found = place,
                None => return Some(number + 1),
            }
        }
        None
    }
}
