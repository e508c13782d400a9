//! Being written.

use mansard_ir::plan::Kernel;
use mansard_ir::{Result, Target, bail};

/// Emits the kernel.
///
/// # Errors
/// Always.
pub fn emit(_: &Kernel, _: &Target) -> Result<String> {
    bail!(Internal, "being written")
}
