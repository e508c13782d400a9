//! Weights -> a GPU's memory: copied from the mapped file in pieces, or made up there.

use super::{Address, DeviceMemory, Driver, Entry, Shape, choose, needed_driver};
use crate::artifact::Artifact;
use mansard_ir::artifact::Synthetic;
use mansard_ir::{Place, Result, bail, synthetic};
use std::sync::Arc;

/// Weights are copied in pieces of so many bytes.
const PIECE: usize = 64 << 20;

/// Copies every weight to its offset.
///
/// # Errors
/// Where the driver refuses.
pub fn copy(
    driver: &Arc<dyn Driver>,
    artifact: &Artifact,
    memory: &DeviceMemory,
    offsets: &[usize],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    let (mut done, total) = (0, artifact.manifest().program.weights.iter().map(|w| w.bytes).sum());
    for (offset, bytes) in offsets.iter().zip(artifact.weights()?) {
        for (index, piece) in bytes.chunks(PIECE).enumerate() {
            driver.copy_in(memory.address(offset + index * PIECE), piece)?;
            done += piece.len();
            progress(done, total);
        }
    }
    driver.finish(&mut [])
}

/// Makes every weight up at its offset, with the artifact's kernel for that.
///
/// # Errors
/// Where the driver refuses.
pub fn make(
    driver: &Arc<dyn Driver>,
    artifact: &Artifact,
    how: &Synthetic,
    memory: &DeviceMemory,
    offsets: &[usize],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    choose(&artifact.manifest().ptx, driver.facts())?;
    let Some(code) = artifact.section(&how.section) else {
        bail!(Input, "expected section `{}`, found none of that name", how.section);
    };
    if driver.facts().driver < needed_driver(&how.version)? {
        bail!(Unsupported, "the driver is too old for PTX {}", how.version);
    }
    let entry = Entry { name: synthetic::KERNEL.into(), threads: how.threads, shared_bytes: 0, arguments: 3 };
    let functions = driver.load(code, &[entry]).at(|| "code that makes weights up".into())?;
    let [function] = functions[..] else { bail!(Internal, "expected one function") };
    let specs = &artifact.manifest().program.weights;
    let (mut done, total) = (0, specs.iter().map(|w| w.bytes).sum());
    for (index, (spec, offset)) in specs.iter().zip(offsets).enumerate() {
        for fill in synthetic::fills(spec, index, how.seed)? {
            let words = [(fill.bytes / 4) as u64, fill.pattern.len() as u64, fill.seed];
            let pattern: Vec<u8> = fill.pattern.as_flattened().iter().flat_map(|word| word.to_le_bytes()).collect();
            let figures: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let arguments = DeviceMemory::new(driver, "how to make a weight up", figures.len() + pattern.len())?;
            let at = [0, figures.len()].map(|offset| arguments.address(offset));
            driver.copy_in(at[0], &figures)?;
            driver.copy_in(at[1], &pattern)?;
            let blocks = (driver.facts().processors * function.resident).max(1) as u32;
            let shape = Shape { blocks, threads: how.threads as u32, shared_bytes: 0, dependent: false };
            let to: Address = memory.address(offset + fill.at);
            driver.launch(function.id, shape, &[to, at[1], at[0]])?;
            driver.finish(&mut [])?;
        }
        done += spec.bytes;
        progress(done, total);
    }
    Ok(())
}
