//! Arguments of ioctls that have a variable length.

/// Bytes, aligned for any structure of the kernel, with fields in native byte order.
#[derive(Clone, Debug)]
pub(crate) struct Words(Vec<u64>);

impl Words {
    /// `len` bytes of 0, rounded up to a multiple of 8.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self(vec![0; len.div_ceil(8)])
    }

    /// Where they are.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u64 {
        self.0.as_mut_ptr()
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.len() * 8
    }

    /// Stores `value` at a byte offset that is a multiple of 4. Nothing happens past the end.
    pub(crate) fn put_u32(&mut self, offset: usize, value: u32) {
        let Some(word) = self.0.get_mut(offset / 8) else {
            return;
        };
        let mut bytes = word.to_ne_bytes();
        if let Some(field) = bytes.get_mut(offset % 8..offset % 8 + 4) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
        *word = u64::from_ne_bytes(bytes);
    }

    /// Stores `value` at a byte offset that is a multiple of 8. Nothing happens past the end.
    pub(crate) fn put_u64(&mut self, offset: usize, value: u64) {
        if let Some(word) = self.0.get_mut(offset / 8) {
            *word = value;
        }
    }

    /// The `u32` at a byte offset that is a multiple of 4; 0 past the end.
    pub(crate) fn u32(&self, offset: usize) -> u32 {
        let bytes = self.0.get(offset / 8).map(|word| word.to_ne_bytes());
        bytes
            .as_ref()
            .and_then(|bytes| bytes.get(offset % 8..)?.first_chunk())
            .map_or(0, |field| u32::from_ne_bytes(*field))
    }

    /// The `u64` at a byte offset that is a multiple of 8; 0 past the end.
    pub(crate) fn u64(&self, offset: usize) -> u64 {
        self.0.get(offset / 8).copied().unwrap_or(0)
    }

    /// Stores bytes at an offset that is a multiple of 8. Nothing happens past the end.
    pub(crate) fn put_bytes(&mut self, offset: usize, bytes: &[u8]) {
        for (n, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word.iter_mut()
                .zip(chunk)
                .for_each(|(to, from)| *to = *from);
            self.put_u64(offset + n * 8, u64::from_ne_bytes(word));
        }
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> impl Iterator<Item = u8> + '_ {
        self.0.iter().flat_map(|word| word.to_ne_bytes())
    }

    /// The bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.bytes().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_fields_in_native_order() {
        let mut words = Words::zeroed(17);
        assert_eq!(words.len(), 24);
        words.put_u32(0, 1);
        words.put_u32(4, 2);
        words.put_u64(8, 3);
        words.put_u32(4096, 9);
        let bytes = words.to_bytes();
        assert_eq!(bytes[..4], 1u32.to_ne_bytes());
        assert_eq!(bytes[4..8], 2u32.to_ne_bytes());
        assert_eq!(bytes[8..16], 3u64.to_ne_bytes());
    }
}
