//! `mansard bundle`: an artifact becomes part of a program.
//!
//! ```text
//!  mansard-runner + artifact  ->  answer                   an executable that needs nothing else
//!  libmansard.a   + artifact  ->  libanswer.a, answer.h    a library: cc main.c -lanswer -lm -lpthread
//! ```
//!
//! Neither needs a compiler: both parts come with Mansard (`make lib`), and the artifact's bytes become a section that is mapped
//! where it lies. What was written is tried before it appears under its name.

mod executable;
mod library;
mod parts;

use crate::report::{self, bytes};
use mansard_ir::{Error, Kind, Result};
use mansard_runtime::{Artifact, OpenOptions};
use parts::Parts;
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Make a standalone executable or a static library of an artifact
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// An executable that answers: FILE -p "..."
    #[arg(long, value_name = "FILE", required_unless_present = "static_lib")]
    exe: Option<PathBuf>,
    /// A folder for libNAME.a and NAME.h
    #[arg(long, value_name = "FOLDER")]
    static_lib: Option<PathBuf>,
    /// NAME of the library, and of its functions
    #[arg(long, value_name = "NAME", default_value = "answer", requires = "static_lib")]
    name: String,
    /// Where mansard-runner, libmansard.a and mansard.h are [default: `lib` beside this program, or `../lib/mansard`]
    #[arg(long, value_name = "FOLDER")]
    parts: Option<PathBuf>,
    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// A file that was made.
struct Made {
    path: PathBuf,
    bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open or has no code for this processor, a part is missing, or a file cannot be written.
pub fn run(arguments: &Arguments) -> Result<()> {
    let artifact = Artifact::open(&arguments.artifact, &OpenOptions::default())?;
    let here = std::env::consts::ARCH;
    let code = &artifact.manifest().code;
    if !code.iter().any(|code| code.arch == here) {
        let found: Vec<&str> = code.iter().map(|code| code.target.as_str()).collect();
        let message = format!("expected machine code for {here}, found {}", found.join(", "));
        let error = Error::new(Kind::Unsupported, message).at(arguments.artifact.display().to_string());
        return Err(error.help("bundle it on such a machine, or compile it for this one"));
    }
    let parts = Parts::find(arguments.parts.as_deref())?;
    let mut made = vec![];
    if let Some(path) = &arguments.exe {
        made.push(executable::write(&parts, &arguments.artifact, path)?);
    }
    if let Some(folder) = &arguments.static_lib {
        made.extend(library::write(&parts, &arguments.artifact, folder, &arguments.name)?);
    }
    let weights = artifact.file_bytes() as u64;
    if arguments.json {
        let files: Vec<_> = made.iter().map(|made| json!({"path": made.path, "bytes": made.bytes})).collect();
        return report::print(report::json(&json!({"artifact_bytes": weights, "files": files}))?);
    }
    for made in &made {
        let rest = made.bytes.saturating_sub(weights);
        let line = match made.bytes > weights {
            true => format!("{} ({} and the artifact)", bytes(made.bytes as usize), bytes(rest as usize)),
            false => bytes(made.bytes as usize),
        };
        report::print(format!("{}: {line}\n", made.path.display()))?;
    }
    Ok(())
}

/// Writes a file under a temporary name beside it, tries it, and gives it its name.
fn place(
    path: &Path,
    mode: u32,
    fill: impl FnOnce(&mut std::fs::File) -> std::io::Result<()>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<Made> {
    let failed = |e: std::io::Error| Error::io(path, e);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".bundle-").tempfile_in(folder).map_err(failed)?;
    fill(file.as_file_mut()).and_then(|()| file.as_file_mut().flush()).map_err(failed)?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    // Closed: a file that is open for writing cannot be executed.
    let file = file.into_temp_path();
    check(&file)?;
    let bytes = std::fs::metadata(&file).map_err(failed)?.len();
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(Made { path: path.to_owned(), bytes })
}
