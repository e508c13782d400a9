//! What `make lib` makes beside this program, and bundles are made of.

use mansard_ir::file::MappedFile;
use mansard_ir::{Error, Kind, Result};
use std::path::{Path, PathBuf};

/// A folder with the parts.
pub struct Parts(PathBuf);

impl Parts {
    /// The folder that was named; or `lib` beside this program, as a build leaves it, or `../lib/mansard`, as it is installed.
    ///
    /// # Errors
    /// Where there is none.
    pub fn find(named: Option<&Path>) -> Result<Parts> {
        if let Some(folder) = named {
            return Ok(Parts(folder.to_owned()));
        }
        let program = std::env::current_exe().map_err(|e| Error::io("this program", e))?;
        let beside = program.parent().unwrap_or(Path::new("."));
        let folders = [beside.join("lib"), beside.join("../lib/mansard")];
        let found = folders.iter().find(|folder| folder.join("mansard-runner").exists());
        found.map(|folder| Parts(folder.clone())).ok_or_else(|| {
            let [a, b] = folders.map(|folder| folder.display().to_string());
            let message = format!("expected mansard-runner, libmansard.a and mansard.h in {a} or {b}, found none");
            Error::new(Kind::Io, message).help("`make lib` builds them; --parts names another folder")
        })
    }

    /// Maps one of them.
    ///
    /// # Errors
    /// Where it is missing.
    pub fn open(&self, name: &str) -> Result<MappedFile> {
        MappedFile::open(self.0.join(name)).map_err(|e| e.help("`make lib` builds it"))
    }
}
