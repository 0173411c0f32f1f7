//! A process that has as many descriptors as it may have. One test: the limit is one of the
//! process.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use barlease::Lease;
use rustix::io::Errno;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::process::Resource;
use rustix::process::getrlimit;
use rustix::process::setrlimit;

#[test]
fn a_lease_for_which_there_is_no_descriptor_is_said_to_be_that() {
    let (here, there) = UnixStream::pair().unwrap();
    let file = File::open("/dev/null").unwrap();
    let fds = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(
        &there,
        &[IoSlice::new(&[0])],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    let before = getrlimit(Resource::Nofile);
    let mut none = before;
    none.current = Some(3);
    setrlimit(Resource::Nofile, none).unwrap();
    let error = Lease::receive(&here).unwrap_err();
    setrlimit(Resource::Nofile, before).unwrap();
    assert_eq!(
        error.errno(),
        Some(Errno::MFILE.raw_os_error()),
        "{error:?}"
    );
}
