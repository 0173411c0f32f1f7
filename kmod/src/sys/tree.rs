// SPDX-License-Identifier: GPL-2.0

//! Sets that are ordered by a key, whose items carry their own place: adding and removing allocate
//! nothing.
//!
//! `kernel::rbtree` allocates a node for each item; a lease is small, and is to be taken out of its
//! set where nothing may fail.
//!
//! C header: [`include/linux/rbtree.h`](srctree/include/linux/rbtree.h)

use super::{bindings, flag::peek};
use core::{marker::PhantomData, mem::size_of, ptr};
use kernel::{
    prelude::*,
    sync::{
        Arc, ArcBorrow,
        atomic::{Acquire, Atomic, Relaxed, Release},
    },
    types::{ForeignOwnable, Opaque},
};

/// An item of a [`Tree`].
pub(crate) trait Item: Send + Sync + Sized + 'static {
    /// Its place in the tree, a field of the item.
    fn links(&self) -> &Links<Self>;

    /// Its key. Of items with the same key a tree takes one.
    fn key(&self) -> u64;
}

/// The place of an item in the tree that holds it. An item is in one tree at a time.
///
/// # Invariants
///
/// While the item is in a tree, `item` is the reference that the tree owns, from
/// [`Arc::into_foreign`], and `node` is linked into that tree. Otherwise `item` is null, or dangling
/// while a tree is about to take the item, which then alone may change both.
#[repr(C)]
pub(crate) struct Links<T> {
    // First, so that a pointer to it is one to the whole.
    node: Opaque<bindings::rb_node>,
    item: Atomic<*mut c_void>,
    _item: PhantomData<fn() -> T>,
}

// SAFETY: By the type invariant the tree guards `node`; `item` is atomic.
unsafe impl<T> Send for Links<T> {}
// SAFETY: As above.
unsafe impl<T> Sync for Links<T> {}

impl<T> Links<T> {
    /// Of an item in no tree.
    pub(crate) fn new() -> Self {
        Self {
            node: Opaque::zeroed(),
            // INVARIANT: In no tree.
            item: Atomic::new(ptr::null_mut()),
            _item: PhantomData,
        }
    }
}

/// Items in the order of their keys.
///
/// # Invariants
///
/// Each node below `root` is the first field of the [`Links`] of an item that the tree owns a
/// reference to.
pub(crate) struct Tree<T: Item> {
    root: bindings::rb_root,
    _items: PhantomData<Arc<T>>,
}

// SAFETY: A tree is the references to its items, which may be sent and shared.
unsafe impl<T: Item> Send for Tree<T> {}

impl<T: Item> Tree<T> {
    /// Without items.
    pub(crate) fn new() -> Self {
        // INVARIANT: There is no node.
        Self {
            root: bindings::rb_root::default(),
            _items: PhantomData,
        }
    }

    /// The item of a node.
    ///
    /// # Safety
    ///
    /// `node` must be linked into this tree.
    unsafe fn item_of<'a>(&'a self, node: *mut bindings::rb_node) -> ArcBorrow<'a, T> {
        let links = node.cast::<Links<T>>();
        // SAFETY: By the type invariants the node is the first field of the links of an item that
        // the tree keeps alive, and nobody changes them while the tree is borrowed.
        let item = peek(unsafe { &(*links).item });
        // SAFETY: The tree owns this reference for as long as it is borrowed.
        unsafe { Arc::borrow(item) }
    }

    /// Adds an item; gives it back when it is in a tree already, or another has its key.
    pub(crate) fn insert(&mut self, item: Arc<T>) -> core::result::Result<(), Arc<T>> {
        let links = item.links();
        let offset = ptr::from_ref(links)
            .addr()
            .wrapping_sub(ptr::from_ref(&*item).addr());
        let inside = offset <= size_of::<T>().wrapping_sub(size_of::<Links<T>>())
            && size_of::<T>() >= size_of::<Links<T>>();
        // Links that are not of the item could go away before it.
        if !inside {
            return Err(item);
        }
        // No tree has it now: one that had it before is done with `node`.
        let taken = ptr::dangling_mut();
        if links.item.cmpxchg(ptr::null_mut(), taken, Acquire).is_err() {
            return Err(item);
        }
        let key = item.key();
        let mut parent = ptr::null_mut();
        let mut place = &raw mut self.root.rb_node;
        loop {
            // SAFETY: The place is the root's, or a child of a node of this tree.
            let node = unsafe { *place };
            if node.is_null() {
                break;
            }
            // SAFETY: The node is in this tree.
            let other = unsafe { self.item_of(node) }.key();
            parent = node;
            place = if key < other {
                // SAFETY: Computes an address inside of a node of this tree.
                unsafe { &raw mut (*node).rb_left }
            } else if key > other {
                // SAFETY: As above.
                unsafe { &raw mut (*node).rb_right }
            } else {
                links.item.store(ptr::null_mut(), Relaxed);
                return Err(item);
            };
        }
        let node = links.node.get();
        let slot = &raw const links.item;
        let item = item.into_foreign();
        // INVARIANT: The tree owns this reference from here on.
        // SAFETY: The reference keeps the item alive, and so its links.
        unsafe { &*slot }.store(item, Relaxed);
        // SAFETY: `place` is where a child of `parent` belongs; the node is in no tree.
        unsafe { bindings::rb_link_node(node, parent, place) };
        // SAFETY: The node was just linked into this tree.
        unsafe { bindings::rb_insert_color(node, &mut self.root) };
        Ok(())
    }

    /// Takes out the item with this key.
    pub(crate) fn remove(&mut self, key: u64) -> Option<Arc<T>> {
        let node = self.lower_bound(key);
        if node.is_null() {
            return None;
        }
        // SAFETY: `lower_bound` found it in this tree.
        if unsafe { self.item_of(node) }.key() != key {
            return None;
        }
        // SAFETY: As above.
        unsafe { bindings::rb_erase(node, &mut self.root) };
        let links = node.cast::<Links<T>>();
        // SAFETY: The item is alive, and nobody else changes its links.
        let place = unsafe { &(*links).item };
        let item = peek(place);
        // INVARIANT: In no tree from here on: `node` was linked into none before.
        place.store(ptr::null_mut(), Release);
        // SAFETY: By the type invariant the tree owned this reference, and gives it up.
        Some(unsafe { Arc::from_foreign(item) })
    }

    /// The first node whose key is `key` or more; null when there is none.
    fn lower_bound(&self, key: u64) -> *mut bindings::rb_node {
        let mut found = ptr::null_mut();
        let mut node = self.root.rb_node;
        while !node.is_null() {
            // SAFETY: The node is in this tree.
            if unsafe { self.item_of(node) }.key() < key {
                // SAFETY: As above.
                node = unsafe { (*node).rb_right };
            } else {
                found = node;
                // SAFETY: As above.
                node = unsafe { (*node).rb_left };
            }
        }
        found
    }

    /// The item with this key.
    pub(crate) fn get(&self, key: u64) -> Option<ArcBorrow<'_, T>> {
        self.iter_from(key).next().filter(|item| item.key() == key)
    }

    /// The items whose keys are `key` or more, in their order.
    #[inline]
    pub(crate) fn iter_from(&self, key: u64) -> Iter<'_, T> {
        let node = if key == 0 {
            // SAFETY: The root is valid, and nobody changes the tree while it is borrowed.
            unsafe { bindings::rb_first(&self.root) }
        } else {
            self.lower_bound(key)
        };
        // INVARIANT: The node is null or in the tree.
        Iter { tree: self, node }
    }
}

impl<T: Item> Drop for Tree<T> {
    fn drop(&mut self) {
        while let Some(key) = self.iter_from(0).next().map(|item| item.key()) {
            if self.remove(key).is_none() {
                // The key of an item has changed: rather than freed twice, the rest is not freed.
                return;
            }
        }
    }
}

/// Items of a [`Tree`].
///
/// # Invariants
///
/// `node` is null or linked into `tree`.
pub(crate) struct Iter<'a, T: Item> {
    tree: &'a Tree<T>,
    node: *mut bindings::rb_node,
}

impl<'a, T: Item> Iterator for Iter<'a, T> {
    type Item = ArcBorrow<'a, T>;

    #[inline]
    fn next(&mut self) -> Option<ArcBorrow<'a, T>> {
        if self.node.is_null() {
            return None;
        }
        // SAFETY: By the type invariant the node is in the tree.
        let item = unsafe { self.tree.item_of(self.node) };
        // SAFETY: As above; nobody changes the tree while it is borrowed.
        self.node = unsafe { bindings::rb_next(self.node) };
        Some(item)
    }
}
