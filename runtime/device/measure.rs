//! What a GPU's memory does: a copy of a large buffer, timed.

use super::{DeviceMemory, Driver};
use crate::memory::Memory;
use mansard_ir::{Result, bail};
use std::sync::Arc;

/// Copies that are timed one by one, after one to warm up.
const COPIES: usize = 8;

/// Bytes per second that a copy inside the GPU's memory reads and writes, together, at its fastest; of a buffer of `bytes`
/// bytes to another.
///
/// # Errors
/// Where the driver refuses.
pub fn copy_bandwidth(driver: &Arc<dyn Driver>, bytes: usize) -> Result<f64> {
    let mut memory = DeviceMemory::new(driver, "a measurement", 2 * bytes)?;
    for copy in 0..=COPIES {
        driver.mark(copy)?;
        memory.copy(0..bytes, bytes)?;
    }
    driver.mark(COPIES + 1)?;
    driver.finish(&mut [])?;
    let times = (1..=COPIES).map(|copy| driver.seconds(copy, copy + 1)).collect::<Result<Vec<f64>>>()?;
    let least = times.into_iter().fold(f64::INFINITY, f64::min);
    if least <= 0.0 {
        bail!(Io, "a copy of {bytes} bytes took no time");
    }
    Ok(2.0 * bytes as f64 / least)
}
