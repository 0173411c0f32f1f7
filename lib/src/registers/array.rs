//! Registers of one kind, one after the other.

use std::marker::PhantomData;

use super::RegisterValue;
use super::TypedReadOnlyRegister;
use super::TypedRegister;
use super::WriteOnlyRegister;
use crate::Error;
use crate::Mapping;
use crate::Result;
use crate::Window;

/// Registers of one kind, the same distance from each other, as doorbells or vectors of a table.
#[derive(Clone, Copy, Debug)]
pub struct RegisterArray<'m, T: RegisterValue> {
    window: Window<'m>,
    stride: usize,
    count: usize,
    _value: PhantomData<T>,
}

impl<'m, T: RegisterValue> RegisterArray<'m, T> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn offset(&self, index: usize) -> Result<usize> {
        // Within the window, which was checked when the array was made.
        if index < self.count {
            return Ok(index * self.stride);
        }
        Err(Error::OutOfBounds {
            object: self.window.object(),
            offset: (index as u64).saturating_mul(self.stride as u64),
            length: size_of::<T::Raw>() as u64,
        })
    }

    /// That with this number.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::ReadOnly`].
    pub fn get(&self, index: usize) -> Result<TypedRegister<'m, T>> {
        self.window.typed(self.offset(index)?)
    }

    /// That with this number, for reading only.
    ///
    /// Errors: [`Error::OutOfBounds`].
    pub fn get_read_only(&self, index: usize) -> Result<TypedReadOnlyRegister<'m, T>> {
        self.window.typed_read_only(self.offset(index)?)
    }

    /// That with this number, for writing only.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::ReadOnly`].
    pub fn get_write_only(&self, index: usize) -> Result<WriteOnlyRegister<'m, T>> {
        self.window.write_only(self.offset(index)?)
    }
}

impl<'m> Window<'m> {
    /// `count` registers from `offset` on, each `stride` bytes after the one before.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`] (offset or stride).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(registers: &barlease::Mapping) -> barlease::Result<()> {
    /// // NVMe: the tail doorbells of 8 submission queues, for a stride of 4 bytes.
    /// let tails = registers.array::<u32>(0x1000, 8, 2 * 4)?;
    /// tails.get_write_only(1)?.write(5);
    /// # Ok(())
    /// # }
    /// ```
    pub fn array<T: RegisterValue>(
        &self,
        offset: usize,
        count: usize,
        stride: usize,
    ) -> Result<RegisterArray<'m, T>> {
        let width = size_of::<T::Raw>();
        let length = match count.checked_sub(1) {
            None => Some(0),
            Some(steps) => steps
                .checked_mul(stride)
                .and_then(|last| last.checked_add(width)),
        };
        let end = length.and_then(|length| offset.checked_add(length));
        // An offset that overflows is out of bounds as well.
        let window = self.window(offset..end.unwrap_or(usize::MAX))?;
        if count > 0 {
            // Bounds and alignment of the first one are those of all, if the stride is aligned.
            window.read_only_register::<T::Raw>(0)?;
        }
        if stride % width != 0 {
            return Err(Error::Misaligned {
                object: window.object(),
                offset: stride as u64,
                align: width as u64,
            });
        }
        Ok(RegisterArray {
            window,
            stride,
            count,
            _value: PhantomData,
        })
    }
}

impl Mapping {
    /// See [`Window::array`].
    pub fn array<T: RegisterValue>(
        &self,
        offset: usize,
        count: usize,
        stride: usize,
    ) -> Result<RegisterArray<'_, T>> {
        self.as_window().array(offset, count, stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::tests::mapping;

    #[test]
    fn an_array_has_a_stride_and_an_end() {
        let mapping = mapping();
        let array = mapping.array::<u32>(0x100, 4, 16).unwrap();
        assert_eq!(array.len(), 4);
        array.get_write_only(3).unwrap().write(9);
        assert_eq!(mapping.read::<u32>(0x130).unwrap(), 9);
        assert_eq!(array.get_read_only(3).unwrap().read(), 9);
        assert!(matches!(array.get(4), Err(Error::OutOfBounds { .. })));
        assert!(matches!(
            array.get(usize::MAX),
            Err(Error::OutOfBounds { .. })
        ));
        for (offset, count, stride) in [
            (0x100, 1 << 20, 16),
            (4096, 1, 4),
            (0, usize::MAX, usize::MAX),
            (usize::MAX, 2, 4),
        ] {
            let array = mapping.array::<u32>(offset, count, stride);
            assert!(matches!(array, Err(Error::OutOfBounds { .. })), "{array:?}");
        }
        for (offset, stride) in [(2, 4), (0, 6)] {
            let array = mapping.array::<u32>(offset, 2, stride);
            assert!(matches!(array, Err(Error::Misaligned { .. })), "{array:?}");
        }
        // The last one ends with the mapping.
        assert!(mapping.array::<u64>(0, 512, 8).is_ok());
        assert!(mapping.array::<u64>(0, 0, 8).unwrap().is_empty());
    }
}
