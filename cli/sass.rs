//! Machine code of GPUs as text, by NVIDIA's own tools where they are found: PTX --ptxas--> cubin --nvdisasm--> SASS.

use mansard_ir::{Error, Kind, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where `.ci/fetch-ptxas` puts the tools, in a checkout.
const FETCHED: &str = "tools";

/// SASS of PTX for a chip.
///
/// # Errors
/// Where a tool is not found, or refuses.
pub fn disassembled(ptx: &[u8], chip: &str) -> Result<Vec<u8>> {
    let (ptxas, nvdisasm) = (tool("ptxas")?, tool("nvdisasm")?);
    let folder = tempfile::tempdir().map_err(|e| Error::io("a temporary folder", e))?;
    let (source, cubin) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
    std::fs::write(&source, ptx).map_err(|e| Error::io(&source, e))?;
    run(Command::new(&ptxas).args(["-arch", chip, "-o"]).args([&cubin, &source]), &ptxas)?;
    run(Command::new(&nvdisasm).arg("-c").arg(&cubin), &nvdisasm)
}

/// `$MANSARD_TOOLS`, then a checkout's, then `$PATH`.
fn tool(name: &str) -> Result<PathBuf> {
    let own = std::env::var_os("MANSARD_TOOLS").map(PathBuf::from);
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let folders = own.into_iter().chain([PathBuf::from(FETCHED)]).chain(std::env::split_paths(&paths));
    match folders.map(|folder| folder.join(name)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => Err(Error::new(Kind::Unsupported, format!("`{name}` is not in $MANSARD_TOOLS, {FETCHED} or $PATH"))
            .help(".ci/fetch-ptxas fetches NVIDIA's ptxas and nvdisasm from PyPI")),
    }
}

fn run(command: &mut Command, program: &Path) -> Result<Vec<u8>> {
    let out = command.output().map_err(|e| Error::io(program, e))?;
    if !out.status.success() {
        bail!(Internal, "{}: {}", program.display(), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(out.stdout)
}
