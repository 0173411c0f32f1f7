//! The features of the contract that change how memory is reached: memory type, steering tags,
//! aliases.

use std::os::fd::{AsFd, AsRawFd};

use barlease_abi::{
    AliasRegion, DmaBufTph, FEATURE_ALIAS_REGION, FEATURE_DMA_BUF_MEMATTR, FEATURE_DMA_BUF_STOCK,
    FEATURE_DMA_BUF_TPH,
};

use crate::{
    errno::{Answer, answer},
    lease::Request,
    vfio::{Device, GET, SET},
};

const GET_REGION_INFO: u64 = (b';' as u64) << 8 | 108;

/// A steering-tag request with nothing set.
#[must_use]
pub fn no_tags() -> DmaBufTph {
    DmaBufTph {
        dmabuf_fd: -1,
        flags: 0,
        steering_tag_ext: 0,
        steering_tag: 0,
        ph: 0,
    }
}

impl Device {
    /// `BARLEASE_FEATURE_DMA_BUF_MEMATTR`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn memattr(&self, fd: impl AsFd, memattr: u32) -> Answer<()> {
        self.memattr_number(fd.as_fd().as_raw_fd(), memattr)
    }

    /// The same with any number.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn memattr_number(&self, fd: i32, memattr: u32) -> Answer<()> {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&fd.to_ne_bytes());
        payload[4..].copy_from_slice(&memattr.to_ne_bytes());
        let flags = SET | u32::from(FEATURE_DMA_BUF_MEMATTR);
        self.feature(flags, &mut payload).map(drop)
    }

    /// `BARLEASE_FEATURE_DMA_BUF_TPH` for a buffer.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn tph(&self, fd: impl AsFd, tags: DmaBufTph) -> Answer<()> {
        self.tph_raw(DmaBufTph {
            dmabuf_fd: fd.as_fd().as_raw_fd(),
            ..tags
        })
    }

    /// The same with any number.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn tph_raw(&self, tags: DmaBufTph) -> Answer<()> {
        let mut payload = [0; 12];
        payload[..4].copy_from_slice(&tags.dmabuf_fd.to_ne_bytes());
        payload[4..8].copy_from_slice(&tags.flags.to_ne_bytes());
        payload[8..10].copy_from_slice(&tags.steering_tag_ext.to_ne_bytes());
        payload[10] = tags.steering_tag;
        payload[11] = tags.ph;
        let flags = SET | u32::from(FEATURE_DMA_BUF_TPH);
        self.feature(flags, &mut payload).map(drop)
    }

    /// `BARLEASE_FEATURE_ALIAS_REGION`: the index of the alias.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn alias(&self, region: u32, mapping_flags: u32) -> Answer<u32> {
        self.alias_raw(AliasRegion {
            mapping_flags,
            region_index: region,
            alias_index: 0,
            reserved: 0,
            reserved2: 0,
        })
    }

    /// The same with anything in all fields.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn alias_raw(&self, request: AliasRegion) -> Answer<u32> {
        let mut payload = [0; 24];
        let words = [
            request.mapping_flags,
            request.region_index,
            request.alias_index,
            request.reserved,
        ];
        for (place, word) in payload.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        payload[16..].copy_from_slice(&request.reserved2.to_ne_bytes());
        self.feature(GET | u32::from(FEATURE_ALIAS_REGION), &mut payload)?;
        let mut index = [0; 4];
        index.copy_from_slice(&payload[8..12]);
        assert_eq!(payload[..8], {
            let mut same = [0; 8];
            same[..4].copy_from_slice(&request.mapping_flags.to_ne_bytes());
            same[4..].copy_from_slice(&request.region_index.to_ne_bytes());
            same
        });
        Ok(u32::from_ne_bytes(index))
    }

    /// Feature 0xBA05 with this request: a dma-buf of the stock exporter.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn stock_export(&self, request: &Request) -> Answer<std::os::fd::OwnedFd> {
        let flags = GET | u32::from(FEATURE_DMA_BUF_STOCK);
        let fd = self.feature(flags, &mut request.bytes())?;
        // SAFETY: The fd is new and nobody else's.
        Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
    }

    /// `VFIO_DEVICE_GET_REGION_INFO` with this `argsz` and what the kernel made of a buffer that is
    /// larger and was filled with 0xee behind `argsz`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn region_info_sized(&self, index: u32, argsz: u32) -> Answer<[u32; 64]> {
        let mut info = [0xeeee_eeee; 64];
        info[..(argsz as usize / 4).min(64)].fill(0);
        info[0] = argsz;
        info[2] = index;
        assert!(argsz as usize <= size_of_val(&info));
        let fd = self.as_fd().as_raw_fd();
        // SAFETY: The kernel writes at most `argsz` bytes, which `info` has.
        answer(unsafe { libc::ioctl(fd, GET_REGION_INFO, info.as_mut_ptr()) })?;
        Ok(info)
    }
}
