// SPDX-License-Identifier: GPL-2.0

//! The set of a function's buffers: numbered places, of which each holds a buffer or is vacant.
//!
//! A place stays where it is while its buffer is there, so who visits all of them can let go of the
//! lock and go on by number. Vacant places are a list, last in, first out, so adding and removing are
//! a few loads and stores. Room is allocated outside of the lock; a little is there from the beginning,
//! and is what is left when the last buffer has gone.

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
    /// The room from the beginning, while there is more.
    first: Option<Room>,
    vacant: u32,
    taken: usize,
}

/// Memory for places.
pub(crate) struct Room(KVVec<Place>);

/// Places from the beginning.
const FEW: usize = 64;

impl Table {
    /// No buffers.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            places: Self::room(FEW)?.0,
            first: None,
            vacant: Number::NONE,
            taken: 0,
        })
    }

    /// How many places are wanted before a buffer can be added; `None` when there is one.
    pub(crate) fn wants_room(&self) -> Option<usize> {
        let full = self.vacant == Number::NONE && self.places.len() == self.places.capacity();
        full.then(|| 2 * self.places.len())
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
    pub(crate) fn move_to(&mut self, mut room: Room) -> Option<Room> {
        if room.0.capacity() <= self.places.capacity() {
            return Some(room);
        }
        for place in self.places.drain_all() {
            // There is room for more.
            let _ = room.0.push_within_capacity(place);
        }
        core::mem::swap(&mut self.places, &mut room.0);
        if self.first.is_some() {
            return Some(room);
        }
        self.first = Some(room);
        None
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
        if self.taken > 0 {
            return Some((buffer, None));
        }
        let Some(mut first) = self.first.take() else {
            return Some((buffer, None));
        };
        self.vacant = Number::NONE;
        core::mem::swap(&mut self.places, &mut first.0);
        Some((buffer, Some(first)))
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
