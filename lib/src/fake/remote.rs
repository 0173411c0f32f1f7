//! A fake that is served to other processes: it outlives those that have its descriptors, as a
//! device of the kernel's does.
//!
//! One message asks and one answers. Files that an argument names by number go beside it.

use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread;

use barlease_abi as abi;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use vfio_bindings::bindings::vfio;

use super::Answer;
use super::Argument;
use super::FakeDevice;
use super::Key;
use super::Thing;
use super::failed;
use super::key;
use super::lock;
use crate::Bdf;
use crate::Result;
use crate::sys::inherited;

/// Device, inode and ioctl; the rest is its argument.
const HEAD: usize = 17;
/// The ioctl that is none: it asks for the address.
const ADDRESS: u8 = 0;
/// An answer begins with its number, or the error as a negative one.
const ANSWER: usize = 4;
/// That the device is another one.
const UNKNOWN: i32 = i32::MIN;
/// Longest message.
const LONGEST: usize = 64 << 10;
/// Most files of a message.
const FILES: usize = 8;

/// The server that answers ioctls on descriptors that are no fake of this process.
static SERVER: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// From now on ioctls on descriptors of the fake that [`FakeDevice::serve`] serves at `path` are
/// answered there, and so is [`Device::from_fd`](crate::Device::from_fd).
///
/// Errors: [`Error::Io`](crate::Error::Io).
pub fn connect(path: impl AsRef<Path>) -> Result<()> {
    let connected = || -> Result<OwnedFd, Errno> {
        let socket = socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path.as_ref())?)?;
        Ok(socket)
    };
    *lock(&SERVER) = Some(connected().map_err(failed)?);
    Ok(())
}

fn socket() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

impl FakeDevice {
    /// Answers other processes, which have connected to `path` and got a descriptor of the device
    /// in some way, for as long as this process lives.
    ///
    /// Errors: [`Error::Io`](crate::Error::Io).
    pub fn serve(&self, path: impl AsRef<Path>) -> Result<()> {
        let listening = || -> Result<OwnedFd, Errno> {
            let socket = socket()?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path.as_ref())?)?;
            rustix::net::listen(&socket, 64)?;
            Ok(socket)
        };
        let socket = listening().map_err(failed)?;
        let key = key(self.memory.as_fd()).ok_or_else(|| failed(Errno::BADF))?;
        let thing = self.thing.clone();
        thread::spawn(move || {
            let mut served: Vec<(Arc<OwnedFd>, thread::JoinHandle<()>)> = Vec::new();
            while let Ok(client) = rustix::net::accept_with(&socket, SocketFlags::CLOEXEC) {
                // The call of a process that was killed is done before the next process is served,
                // as a system call is done before its process has ended.
                let (gone, there): (Vec<_>, _) =
                    served.into_iter().partition(|(one, _)| is_gone(one));
                served = there;
                for (_, server) in gone {
                    let _ = server.join();
                }
                let (client, thing) = (Arc::new(client), thing.clone());
                let other = client.clone();
                let server = thread::spawn(move || serve(&client, key, &thing));
                served.push((other, server));
            }
        });
        Ok(())
    }
}

fn is_gone(client: &OwnedFd) -> bool {
    let mut poll = [PollFd::new(client, PollFlags::empty())];
    let now = Timespec::default();
    rustix::event::poll(&mut poll, Some(&now)) == Ok(1)
}

fn serve(client: &OwnedFd, key: Key, thing: &Arc<Thing>) {
    let Thing::Device(fake) = &**thing else {
        return;
    };
    while let Ok((mut message, files)) = receive(client) {
        let Some((head, argument)) = message.split_at_mut_checked(HEAD) else {
            return;
        };
        let part = |at: usize| head.get(at..).and_then(|rest| rest.first_chunk());
        let asked = part(0)
            .zip(part(8))
            .map(|(device, inode)| (u64::from_ne_bytes(*device), u64::from_ne_bytes(*inode)));
        let number = head.last().copied().unwrap_or(ADDRESS);
        for (place, file) in places(number, argument).into_iter().zip(&files) {
            Argument(argument).put_u32(place, file.as_raw_fd() as u32);
        }
        let answer = match number {
            _ if asked != Some(key) => Ok(Answer::Number(UNKNOWN)),
            ADDRESS => {
                Argument(argument).put(0, fake.bdf.to_string().as_bytes());
                Ok(Answer::Number(0))
            }
            number => fake.ioctl(number, argument),
        };
        let (code, file) = match &answer {
            Ok(Answer::Number(number)) => (*number, None),
            Ok(Answer::File(file)) => (0, Some(file.as_fd())),
            Err(errno) => (-errno.raw_os_error(), None),
        };
        let answer = [&code.to_ne_bytes()[..], argument].concat();
        if send(client, &answer, file.as_slice()).is_err() {
            return;
        }
    }
}

/// As [`super::ioctl`], of another process's fake.
pub(super) fn ioctl(
    fd: BorrowedFd<'_>,
    number: u8,
    argument: &mut [u8],
) -> Option<Result<i32, Errno>> {
    ask(fd, number, argument).map(|answer| answer.map(Answer::into_number))
}

/// As [`super::bdf_of`], of another process's fake.
pub(super) fn bdf_of(fd: BorrowedFd<'_>) -> Option<Bdf> {
    let mut text = [0; 32];
    ask(fd, ADDRESS, &mut text)?.ok()?;
    let text = std::str::from_utf8(&text).ok()?;
    text.trim_end_matches('\0').parse().ok()
}

fn ask(fd: BorrowedFd<'_>, number: u8, argument: &mut [u8]) -> Option<Result<Answer, Errno>> {
    // Held from question to answer: threads take turns.
    let server = lock(&SERVER);
    let server = server.as_ref()?;
    let (device, inode) = key(fd)?;
    let message = [
        &device.to_ne_bytes()[..],
        &inode.to_ne_bytes(),
        &[number],
        argument,
    ]
    .concat();
    let places = places(number, argument);
    let numbers: Vec<_> = places
        .iter()
        .map(|place| Argument(argument).i32(*place))
        .collect();
    let mut asked = || -> Result<Option<Answer>, Errno> {
        let files = numbers
            .iter()
            .map(|number| inherited::duplicate(*number))
            .collect::<Result<Vec<_>, _>>()?;
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send(server, &message, &borrowed)?;
        let (answer, mut files) = receive(server)?;
        let (code, answer) = answer.split_first_chunk::<ANSWER>().ok_or(Errno::IO)?;
        let code = i32::from_ne_bytes(*code);
        argument
            .iter_mut()
            .zip(answer)
            .for_each(|(to, from)| *to = *from);
        // The server's numbers of the files are none here.
        for (place, number) in places.iter().zip(&numbers) {
            Argument(argument).put_u32(*place, *number as u32);
        }
        match (code, files.pop()) {
            (UNKNOWN, _) => Ok(None),
            (0, Some(file)) => Ok(Some(Answer::File(file))),
            (code, _) if code < 0 => Err(Errno::from_raw_os_error(-code)),
            (code, _) => Ok(Some(Answer::Number(code))),
        }
    };
    asked().transpose()
}

/// Where an argument has the number of a file.
fn places(number: u8, argument: &mut [u8]) -> Vec<usize> {
    let argument = Argument(argument);
    let flags = argument.u32(4);
    let all = match number.wrapping_sub(vfio::VFIO_BASE as u8) {
        10 if flags & vfio::VFIO_IRQ_SET_DATA_EVENTFD != 0 => {
            let count = argument.u32(offset_of!(vfio::vfio_irq_set, count)) as usize;
            let data = offset_of!(vfio::vfio_irq_set, data);
            (0..count.min(FILES)).map(|n| data + n * 4).collect()
        }
        17 if flags & vfio::VFIO_DEVICE_FEATURE_PROBE == 0 => {
            match (flags & vfio::VFIO_DEVICE_FEATURE_MASK) as u16 {
                abi::FEATURE_DMA_BUF_STATUS
                | abi::FEATURE_DMA_BUF_REVOKE
                | abi::FEATURE_DMA_BUF_MEMATTR
                | abi::FEATURE_DMA_BUF_TPH
                | abi::FEATURE_EVENTS => vec![8],
                _ => Vec::new(),
            }
        }
        _ => Vec::new(),
    };
    let is_file = |place: &usize| argument.i32(*place) >= 0;
    all.into_iter().filter(is_file).collect()
}

fn send(socket: &OwnedFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Errno::INVAL);
    }
    let parts = [IoSlice::new(bytes)];
    rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL).map(drop)
}

fn receive(socket: &OwnedFd) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let parts = &mut [IoSliceMut::new(&mut bytes)];
    let received = loop {
        match rustix::net::recvmsg(socket, parts, &mut control, flags) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    let length = received.bytes;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds);
        }
    }
    bytes.truncate(length);
    match length {
        0 => Err(Errno::CONNRESET),
        _ => Ok((bytes, files)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::InterruptKind;
    use crate::LeaseId;
    use crate::State;

    /// Of another device, as that of another process is: this one's is not asked.
    #[test]
    fn ioctls_are_answered_from_afar() {
        let fake = FakeDevice::builder().bar(2, 0x4000).build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fake.serve(&path).unwrap();
        connect(&path).unwrap();
        // As long as it is not known here.
        let hidden =
            super::super::lock(&super::super::ALL).remove(&key(fake.memory.as_fd()).unwrap());
        assert!(hidden.is_some());
        let device = Device::from_fd(fake.fd().unwrap()).unwrap();
        assert_eq!(device.bdf(), fake.bdf());
        assert_eq!(device.region(2).unwrap().size, 0x4000);
        let events = device.leases().events().unwrap();
        let request = device.enable_interrupt(InterruptKind::Request).unwrap();
        assert!(fake.raise(InterruptKind::Request, 0));
        assert_eq!(request.wait().unwrap(), 1);
        let lease = device.export(2).range(0x1000..0x3000).export().unwrap();
        assert_eq!(device.status(&lease).unwrap().state, State::Ok);
        let id = LeaseId::of(&lease).unwrap();
        assert_eq!(fake.ranges_of(id)[0].offset, 0x1000);
        let revoked = device.leases().revoke_id_nowait(id).unwrap();
        assert_eq!(revoked, crate::Revoked::Done);
        assert_eq!(events.wait().unwrap(), 1);
        assert_eq!(device.status(&lease).unwrap().state, State::Dead);
        assert_eq!(device.leases().list().count(), 1);
        assert!(device.region(99).is_err());
    }
}
