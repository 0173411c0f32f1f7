// SPDX-License-Identifier: GPL-2.0

//! The attachments of each open of the importer.

use crate::sys::dma_buf::Attachment;
use kernel::{prelude::*, sync::Arc};

/// An open file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner(u32);

/// All attachments.
pub(crate) struct Table {
    items: KVec<Item>,
    owners: u32,
    ids: u32,
}

struct Item {
    owner: Owner,
    id: u32,
    attachment: Arc<Attachment>,
}

kernel::sync::global_lock! {
    /// All attachments of all open files.
    // SAFETY: Initialized when the module is, before anything else.
    pub(crate) unsafe(uninit) static ATTACHMENTS: Mutex<Table> =
        Table { items: KVec::new(), owners: 0, ids: 0 };
}

/// A file was opened.
pub(crate) fn new_owner() -> Owner {
    let mut table = ATTACHMENTS.lock();
    table.owners += 1;
    Owner(table.owners)
}

/// Remembers an attachment: its number. The device must be locked, so that it is not unbound
/// meanwhile.
pub(crate) fn add(owner: Owner, attachment: Arc<Attachment>) -> Result<u32> {
    let mut table = ATTACHMENTS.lock();
    table.ids += 1;
    let id = table.ids;
    let item = Item {
        owner,
        id,
        attachment,
    };
    table.items.push(item, GFP_KERNEL)?;
    Ok(id)
}

/// The attachment of that number. `ENOENT` when the file has none.
pub(crate) fn get(owner: Owner, id: u32) -> Result<Arc<Attachment>> {
    let table = ATTACHMENTS.lock();
    let mut items = table.items.iter();
    let item = items.find(|item| item.owner == owner && item.id == id);
    Ok(item.ok_or(ENOENT)?.attachment.clone())
}

/// Detaches the attachment of that number. `ENOENT` when the file has none.
pub(crate) fn detach(owner: Owner, id: u32) -> Result {
    let attachment = take(|item| item.owner == owner && item.id == id).ok_or(ENOENT)?;
    attachment.detach();
    Ok(())
}

/// Detaches what a file attached.
pub(crate) fn detach_of(owner: Owner) {
    while let Some(attachment) = take(|item| item.owner == owner) {
        attachment.detach();
    }
}

/// Detaches everything.
pub(crate) fn detach_all() {
    while let Some(attachment) = take(|_| true) {
        attachment.detach();
    }
}

/// Takes one out, which is detached without the lock.
fn take(mut which: impl FnMut(&Item) -> bool) -> Option<Arc<Attachment>> {
    let mut table = ATTACHMENTS.lock();
    let index = table.items.iter().position(&mut which)?;
    let item = table.items.remove(index).ok()?;
    if table.items.is_empty() {
        // Nobody drops a static: it must own nothing when the module goes.
        table.items = KVec::new();
    }
    Some(item.attachment)
}
