//! Machine code of GPUs, by NVIDIA's own tools where they are found: PTX --ptxas--> cubin --nvdisasm--> SASS.

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
    let (ptxas, nvdisasm) = (assembler()?, tool("nvdisasm")?);
    let folder = folder()?;
    let cubin = assemble(&ptxas, ptx, chip, folder.path())?;
    run(Command::new(&nvdisasm).arg("-c").arg(&cubin), &nvdisasm)
}

/// Where NVIDIA's assembler is.
///
/// # Errors
/// Where it is not found.
pub fn assembler() -> Result<PathBuf> {
    tool("ptxas")
}

/// Machine code of PTX for a chip, and the version of the assembler that made it.
///
/// # Errors
/// Where the assembler cannot be run, or refuses.
pub fn assembled(ptxas: &Path, ptx: &str, chip: &str) -> Result<(Vec<u8>, String)> {
    let said = String::from_utf8_lossy(&run(Command::new(ptxas).arg("--version"), ptxas)?).into_owned();
    // `Cuda compilation tools, release 13.0, V13.0.88`
    let version = said.split_whitespace().rev().find_map(|word| word.strip_prefix('V'));
    let Some(version) = version else { bail!(Input, "{} does not say its version: {said}", ptxas.display()) };
    let folder = folder()?;
    let cubin = assemble(ptxas, ptx.as_bytes(), chip, folder.path())?;
    Ok((std::fs::read(&cubin).map_err(|e| Error::io(&cubin, e))?, version.to_owned()))
}

fn folder() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|e| Error::io("a temporary folder", e))
}

fn assemble(ptxas: &Path, ptx: &[u8], chip: &str, folder: &Path) -> Result<PathBuf> {
    let (source, cubin) = (folder.join("kernels.ptx"), folder.join("kernels.cubin"));
    std::fs::write(&source, ptx).map_err(|e| Error::io(&source, e))?;
    run(Command::new(ptxas).args(["-arch", chip, "-o"]).args([&cubin, &source]), ptxas)?;
    Ok(cubin)
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
