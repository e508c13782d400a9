//! Machine files where the command line finds them: named by a user, or this machine's own, as `mansard probe` stored it.
//!
//! ```text
//! --machine machines/granite-rapids-2.toml     that file
//! --machine local                              $XDG_CONFIG_HOME/mansard/machine.toml, else ~/.config/mansard/machine.toml
//! ```
//!
//! A stored file is never taken unasked where bytes depend on it.

use mansard_backends as backends;
use mansard_backends::machine::MachineTable;
use mansard_ir::{Error, Kind, Place, Result, Target, bail};
use std::path::{Path, PathBuf};

/// The name of this machine's own file.
pub const LOCAL: &str = "local";

/// A machine file that was read.
#[derive(Clone, Debug)]
pub struct MachineFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it says.
    pub table: MachineTable,
    /// BLAKE3 of its bytes, in hexadecimal.
    pub hash: String,
}

impl MachineFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// Where it cannot be read or is no machine file: names the file, the key, what was expected and found.
    pub fn read(path: &Path) -> Result<MachineFile> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let place = || path.display().to_string();
        let text = std::str::from_utf8(&bytes).map_err(|e| {
            Error::new(Kind::Input, format!("expected UTF-8, found another byte at {}", e.valid_up_to())).at(place())
        })?;
        let table = MachineTable::parse(text)
            .map_err(|e| e.help("`mansard probe` measures this machine; machines/README.md explains the keys"))
            .at(place)?;
        Ok(MachineFile { path: path.to_owned(), table, hash: blake3::hash(&bytes).to_hex().to_string() })
    }

    /// That of `--machine`: [`LOCAL`] or a path.
    ///
    /// # Errors
    /// As [`MachineFile::read`]; where nothing was stored.
    pub fn named(name: &str) -> Result<MachineFile> {
        if name != LOCAL {
            return MachineFile::read(Path::new(name));
        }
        stored()?.ok_or_else(|| {
            let message = "--machine local: this machine was not measured yet";
            Error::new(Kind::Usage, message).help("run `mansard probe`, or name a file")
        })
    }

    /// Whether it is a machine that code for one of `targets` runs on.
    ///
    /// # Errors
    /// Where it is none, naming both architectures.
    pub fn suits(&self, targets: &[Target]) -> Result<()> {
        if targets.iter().any(|target| target.arch == self.table.arch) {
            return Ok(());
        }
        let expected: Vec<&str> = targets.iter().map(|target| target.arch.as_str()).collect();
        let (expected, found) = (expected.join(" or "), &self.table.arch);
        bail!(Usage, "--machine: expected a machine of {expected}, found {} of {found}", self.table.name)
    }

    /// For an artifact's provenance.
    pub fn provenance(&self) -> String {
        format!("{}, {}, BLAKE3 {}", self.table.name, origin(&self.table), self.hash)
    }
}

/// `measured 2026-11-21`, or `stated`.
pub fn origin(table: &MachineTable) -> String {
    table.measured.as_ref().map_or_else(|| "stated".into(), |date| format!("measured {date}"))
}

/// Where this machine's own file is kept; `None` where the user has no home.
pub fn stored_path() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")))?;
    Some(config.join("mansard").join("machine.toml"))
}

/// This machine's own file, where there is one.
///
/// # Errors
/// As [`MachineFile::read`].
pub fn stored() -> Result<Option<MachineFile>> {
    match stored_path().filter(|path| path.exists()) {
        Some(path) => MachineFile::read(&path).map(Some),
        None => Ok(None),
    }
}

/// The stored file if it is about this processor: a home may be shared by several machines.
///
/// # Errors
/// As [`stored`].
pub fn of_this_processor() -> Result<Option<MachineFile>> {
    let native = backends::target("native")?;
    Ok(stored()?.filter(|file| (&file.table.arch, &file.table.processor) == (&native.arch, &native.cpu)))
}
