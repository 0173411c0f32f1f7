//! A holder of a lease: another user's process, which has the lease and nothing else.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use barlease::{Error, GuardedMapping, Lease};
use barlease_proto::{Access, Acquire, Client, Lifetime};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;

use crate::adapter::PITCH;
use crate::picture::{Frame, Picture};
use crate::service;

/// Draws until the lease is gone, or the owner closes the socket; reports each frame.
///
/// Arguments: `holder PICTURE CAPTION`.
pub(crate) fn run() -> Result<()> {
    let owner = owner()?;
    let lease = Lease::receive(&owner).context("receive a lease")?;
    draw(owner, &lease)
}

/// The same with rows that it asks the daemon for, in line if it must.
///
/// Arguments: `tenant PICTURE CAPTION ROWS`.
pub(crate) fn tenant() -> Result<()> {
    let mut owner = owner()?;
    let rows = std::env::args().nth(4).context("how many rows?")?;
    let size = rows.parse::<usize>()? * PITCH;
    let mut acquire = Acquire {
        lifetime: Some(Lifetime::Process),
        ..Acquire::of_pool("rows", size as u64, Access::ReadWrite)
    };
    let mut client = Client::connect(service::socket())?;
    let acquired = match client.acquire(&acquire) {
        Err(barlease_proto::Error::Refused(refusal)) => {
            writeln!(owner, "refused {refusal}")?;
            acquire.wait = Some(60_000);
            client.acquire(&acquire)
        }
        acquired => acquired,
    };
    let (_, fd) = acquired.context("ask for rows")?;
    draw(owner, &Lease::from_fd(fd)?)
}

/// The process that has started this one.
fn owner() -> Result<UnixStream> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    Ok(socket.into())
}

fn draw(mut owner: UnixStream, lease: &Lease) -> Result<()> {
    let mut arguments = std::env::args().skip(2);
    let name = arguments.next().context("which picture?")?;
    let Some(picture) = Picture::named(&name) else {
        bail!("there is no picture `{name}`");
    };
    let caption = arguments.next().unwrap_or_default();
    let mapping = lease.map_guarded().context("map the lease")?;
    let bytes = mapping.len();
    writeln!(owner, "holds {bytes}")?;

    // Drawn beforehand, so that from here on all the time goes into the lease.
    let film: Vec<Frame> = (0..FILM)
        .map(|time| {
            let mut frame = Frame::new(bytes / PITCH);
            picture.draw(&mut frame, time);
            frame.caption(20, 34, &caption, Rgb888::WHITE);
            frame
        })
        .collect();
    writeln!(owner, "ready")?;
    for frame in film.iter().cycle() {
        if let Err(lost) = copy(frame, &mapping) {
            return report_loss(&mut owner, &lost, lease);
        }
        // The owner closes the socket when it has seen enough.
        if writeln!(owner, "frame").is_err() {
            break;
        }
    }
    Ok(())
}

/// Frames until the picture repeats.
const FILM: usize = 8;

/// A row that could not be drawn, and why.
struct Lost {
    row: usize,
    error: Error,
}

fn copy(frame: &Frame, mapping: &GuardedMapping) -> Result<(), Lost> {
    for row in 0..frame.height() {
        mapping
            .copy_from(row * PITCH, frame.row(row))
            .map_err(|error| Lost { row, error })?;
    }
    Ok(())
}

/// Tells the owner that the lease is gone, and that this process is not.
fn report_loss(owner: &mut UnixStream, lost: &Lost, lease: &Lease) -> Result<()> {
    writeln!(owner, "lost at row {}: {}", lost.row, lost.error)?;
    let again = match lease.map() {
        Ok(_) => "succeeds, which it must not".to_owned(),
        Err(error) => format!("is refused: {error}"),
    };
    writeln!(owner, "again {again}")?;
    Ok(())
}
