//! Serves the device over a socket, from a thread.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion, SparseArea};

use crate::device::{CONFIG_REGION, Device, MEMORY_REGION, REGISTER_REGION};
use crate::{Msix, Options, VECTORS, config, control, registers};

/// A device that is being served. Ends when dropped, or with the connection of its one client.
#[derive(Debug)]
pub struct Server {
    device: Arc<Mutex<Device>>,
    socket: PathBuf,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Listens at `socket`, which must not exist, and serves one client. `log` gets the log as JSON
    /// lines.
    ///
    /// # Errors
    ///
    /// When the socket or the log cannot be made. A socket's path has at most 107 bytes.
    pub fn start(socket: &Path, options: &Options, log: Option<&Path>) -> Result<Self> {
        let device = Device::new(options, log)?;
        let regions = regions(options, &device);
        let device = Arc::new(Mutex::new(device));
        let server = vfio_user::Server::new(socket, true, interrupts(options), regions)
            .with_context(|| format!("listen at {}", socket.display()))?;
        let mut backend = Backend(Arc::clone(&device));
        let thread = thread::Builder::new()
            .name("device".to_owned())
            .spawn(move || {
                // A client that is gone in the middle of a message is gone like any other.
                let _ = server.run(&mut backend);
            })
            .context("start a thread")?;
        Ok(Self {
            device,
            socket: socket.to_owned(),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Carries out a request, a JSON value, and gives the reply, a JSON object.
    ///
    /// | request | reply |
    /// |---|---|
    /// | `{"mark":"text"}` | `{"seq":N}`: the number of the entry |
    /// | `"clear"` | `{"seq":N}`: the number of the last entry that there was |
    /// | `{"query":{…}}` | `{"count":N,"entries":[…]}`, see [`Query`](crate::log::Query) |
    /// | `"state"` | `{"memory":…,"power":…,"reset":…,"dead":…}`, see [`State`](crate::log::State) |
    /// | `{"set":{"dead":true}}` | `{"ok":true}`; also `reset_ms`, `reset_fails`, `completer` |
    ///
    /// A request that is not understood is answered with `{"error":"…"}`.
    #[must_use]
    pub fn ask(&self, request: &str) -> String {
        control::answer(&mut lock(&self.device), request).to_string()
    }

    /// Waits for the end of the connection.
    pub fn wait(&self) {
        if let Some(thread) = self.take_thread() {
            let _ = thread.join();
        }
    }

    fn take_thread(&self) -> Option<JoinHandle<()>> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.take()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(thread) = self.take_thread() else {
            return;
        };
        if !thread.is_finished() {
            // If nobody ever came, this is who it waits for. Else the client is on its way out.
            drop(UnixStream::connect(&self.socket));
        }
        let _ = thread.join();
    }
}

fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn regions(options: &Options, device: &Device) -> Vec<ServerRegion> {
    let region = |index: u32| {
        let size = match index {
            MEMORY_REGION => u64::from(options.memory_mib) << 20,
            REGISTER_REGION => registers::LENGTH,
            CONFIG_REGION => config::SIZE as u64,
            _ => 0,
        };
        let mut flags = 0;
        if size > 0 {
            flags |= VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        }
        let mapped = index == MEMORY_REGION && !options.trapped;
        if mapped {
            flags |= VFIO_REGION_INFO_FLAG_MMAP;
        }
        let end = match options.msix {
            Msix::Memory => size.saturating_sub(0x2000),
            Msix::None | Msix::Registers => size,
        };
        // The client gets the fd only together with areas.
        let area = SparseArea {
            area: vfio_region_sparse_mmap_area {
                offset: 0,
                size: end,
            },
        };
        ServerRegion {
            region_info: vfio_region_info {
                argsz: size_of::<vfio_region_info>() as u32,
                flags,
                index,
                size,
                ..Default::default()
            },
            sparse_areas: if mapped { vec![area] } else { Vec::new() },
            mmap_fd: mapped.then(|| device.memory_fd()),
        }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
}

fn interrupts(options: &Options) -> Vec<IrqInfo> {
    let interrupt = |index| {
        let there = index == VFIO_PCI_MSIX_IRQ_INDEX && options.msix != Msix::None;
        IrqInfo {
            index,
            flags: if there { VFIO_IRQ_INFO_EVENTFD } else { 0 },
            count: if there { u32::from(VECTORS) } else { 0 },
        }
    };
    (0..VFIO_PCI_NUM_IRQS).map(interrupt).collect()
}

struct Backend(Arc<Mutex<Device>>);

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        lock(&self.0).read(region, offset, data)
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        lock(&self.0).write(region, offset, data)
    }

    // The device does no DMA: what it could reach does not matter.
    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        _offset: u64,
        _address: u64,
        _size: u64,
        _fd: Option<File>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, _address: u64, _size: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        lock(&self.0).begin_reset("bus");
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        _flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        if index == VFIO_PCI_MSIX_IRQ_INDEX {
            lock(&self.0).set_vectors(start, count, fds);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_user::Client;

    fn socket(name: &str) -> PathBuf {
        let name = format!("barlease-device-{}-{name}", std::process::id());
        std::env::temp_dir().join(name)
    }

    #[test]
    fn a_client_reaches_the_device_and_the_log_says_so() {
        let path = socket("client");
        let server = Server::start(&path, &Options::default(), None).unwrap();
        let mut client = Client::new(&path).unwrap();
        client.region_write(7, 4, &[2]).unwrap();
        client.region_write(0, 64, &5_u32.to_le_bytes()).unwrap();
        let mut data = [0; 4];
        client.region_read(0, 64, &mut data).unwrap();
        assert_eq!(u32::from_le_bytes(data), 5);
        let reply = server.ask(r#"{"query":{"region":0,"offset":64}}"#);
        assert!(reply.contains(r#""count":2"#), "{reply}");
        drop(client);
        server.wait();
        assert!(!path.exists());
    }

    #[test]
    fn a_server_without_a_client_ends() {
        let path = socket("nobody");
        drop(Server::start(&path, &Options::default(), None).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn only_a_device_that_is_not_trapped_is_mapped() {
        for trapped in [true, false] {
            let options = Options {
                trapped,
                msix: Msix::Memory,
                ..Options::default()
            };
            let device = Device::new(&options, None).unwrap();
            let memory = &regions(&options, &device)[0];
            assert_eq!(memory.mmap_fd.is_some(), !trapped);
            assert_eq!(memory.sparse_areas.len(), usize::from(!trapped));
            if let [area] = &memory.sparse_areas[..] {
                assert_eq!(area.area.size, (16 << 20) - 0x2000);
            }
        }
    }
}
