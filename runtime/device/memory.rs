//! A GPU's memory that is given back when dropped.

use super::{Address, Driver};
use crate::memory::Memory;
use mansard_ir::{Error, Kind, Result};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// One allocation, zeroed at first.
#[derive(Debug)]
pub struct DeviceMemory {
    driver: Arc<dyn Driver>,
    at: Address,
    bytes: usize,
}

impl DeviceMemory {
    /// `bytes` for `what`, which names them in the error.
    ///
    /// # Errors
    /// Where the driver refuses.
    pub fn new(driver: &Arc<dyn Driver>, what: &str, bytes: usize) -> Result<DeviceMemory> {
        // One byte at least, so that empty ones have an address of their own.
        let at = driver.allocate(bytes.max(1)).map_err(|e| e.at(format!("{bytes} bytes of GPU memory for {what}")))?;
        let memory = DeviceMemory { driver: driver.clone(), at, bytes };
        driver.clear(at, bytes.max(1))?;
        Ok(memory)
    }

    /// Address of byte `offset`.
    ///
    /// # Panics
    /// Past the end.
    pub fn address(&self, offset: usize) -> Address {
        assert!(offset <= self.bytes, "byte {offset} of {} bytes of GPU memory", self.bytes);
        self.at + offset as u64
    }
}

impl Memory for DeviceMemory {
    fn at(&self, offset: usize) -> *mut u8 {
        std::ptr::without_provenance_mut(self.address(offset) as usize)
    }

    fn copy(&mut self, from: Range<usize>, to: usize) -> Result<()> {
        self.address(from.end.max(to + from.len()));
        self.driver.copy(self.address(from.start), self.address(to), from.len())
    }

    fn read(&self, offset: usize, len: usize) -> Result<Cow<'_, [f32]>> {
        self.address(offset + 4 * len);
        let mut bytes = Vec::new();
        let refused = |e| Error::new(Kind::Io, format!("expected {} bytes of memory: {e}", 4 * len));
        bytes.try_reserve_exact(4 * len).map_err(refused)?;
        bytes.resize(4 * len, 0);
        self.driver.finish(&mut [(self.address(offset), &mut bytes)])?;
        Ok(Cow::Owned(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.driver.free(self.at);
    }
}
