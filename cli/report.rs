//! What commands share: standard output, files that appear whole, tables, figures with units, token ids from the outside.

use crate::device;
use mansard_ir::artifact::Provenance;
use mansard_ir::{Error, Kind, Place, Result, bail};
use mansard_runtime::device::Choice;
use mansard_runtime::{Artifact, Engine, EngineOptions, Model, OpenOptions};
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// Writes to standard output, at once.
///
/// # Errors
/// Where it is closed or full.
pub fn print(bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes.as_ref()).and_then(|()| out.flush()).map_err(|e| Error::io("standard output", e))
}

/// The reader of our output has gone, as `head` does when it has enough: no reason to complain.
pub fn reader_left(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|e| e.downcast_ref::<std::io::Error>());
    source.is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}

/// Writes a file that appears under its name whole or not at all. What is there and no regular file, such as a pipe, is
/// written to as it is.
///
/// # Errors
/// Where `fill` fails or the file cannot be written; nothing is left behind then.
pub fn write_file(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(path, e);
    let special = std::fs::metadata(path).is_ok_and(|m| !m.is_file());
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".partial-{}", std::process::id()));
    let target = if special { path.to_owned() } else { PathBuf::from(partial) };
    let file = if special { File::options().write(true).open(&target) } else { File::create(&target) };
    let mut out = BufWriter::new(file.map_err(failed)?);
    let written = fill(&mut out).and_then(|()| out.flush().map_err(failed));
    if special {
        return written;
    }
    let placed = written
        .and_then(|()| out.get_ref().sync_all().map_err(failed))
        .and_then(|()| std::fs::rename(&target, path).map_err(failed));
    if placed.is_err() {
        // Nothing more can be done about a file that cannot be removed.
        let _ = std::fs::remove_file(&target);
    }
    placed
}

/// To `path`, or to standard output where there is none.
///
/// # Errors
/// As [`write_file`] and [`print`].
pub fn deliver(path: Option<&Path>, bytes: &[u8]) -> Result<()> {
    match path {
        Some(path) => write_file(path, |out| out.write_all(bytes).map_err(|e| Error::io(path, e))),
        None => print(bytes),
    }
}

/// Writes `f32[rows][columns]` as a NumPy file; `fill` writes the values.
///
/// # Errors
/// As [`write_file`].
pub fn write_npy(path: &Path, shape: [usize; 2], fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    write_file(path, |out| {
        let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}", shape[0], shape[1]);
        // The magic, the version, the length, the header and its newline fill a multiple of 64 bytes.
        let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
        header = format!("{header:<width$}\n", width = length - 1);
        let head = [b"\x93NUMPY\x01\x00".as_slice(), &(length as u16).to_le_bytes(), header.as_bytes()].concat();
        out.write_all(&head).map_err(|e| Error::io(path, e))?;
        fill(out)
    })
}

/// Little-endian bytes of a row.
pub fn le_bytes(row: &[f32]) -> Vec<u8> {
    row.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// `97.2 MB`.
pub fn bytes(n: usize) -> String {
    let units = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    match units.iter().find(|(_, size)| n as f64 >= *size) {
        Some((unit, size)) => format!("{:.1} {unit}", n as f64 / size),
        None => format!("{n} bytes"),
    }
}

/// Rows of cells as columns: the first column to the left, the others to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let line: Vec<String> =
            cells.map(|(c, (cell, w))| if c == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") }).collect();
        out += line.join("  ").trim_end();
        out.push('\n');
    }
    out
}

/// What was kept from an earlier compilation: in a file of JSON, or in an artifact's provenance. JSON begins with a bracket, but
/// an artifact with the length of its header, whose low byte is none.
///
/// # Errors
/// Where the file is neither, or what it holds makes no sense.
pub fn json_or_artifact<T>(
    path: &Path,
    bracket: u8,
    from_json: impl Fn(&str) -> Result<T>,
    from_provenance: impl Fn(&Provenance) -> Result<T>,
) -> Result<T> {
    let place = || path.display().to_string();
    let mut first = [0];
    let read = File::open(path).and_then(|mut file| file.read(&mut first)).map_err(|e| Error::io(path, e))?;
    if read == 1 && first == [bracket] {
        let json = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        return from_json(&json).at(place);
    }
    let artifact = Artifact::open(path, &OpenOptions { verify_weights: false })?;
    from_provenance(&artifact.manifest().provenance).at(place)
}

/// Every line two spaces to the right.
pub fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

/// A bar on standard error; invisible where that is no terminal.
pub fn bar(what: &'static str, total: usize) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(total as u64).with_message(what);
    // The template is a constant; one that did not parse would leave the bar as it is.
    match indicatif::ProgressStyle::with_template("{msg:14} {bar:40} {percent:>3}% {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Most memory this process has held.
pub fn peak_memory() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok()?.checked_mul(1024)
}

/// Pretty JSON with a newline.
///
/// # Errors
/// Where a value has no JSON form.
pub fn json(value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value);
    Ok(text.map_err(|e| Error::new(Kind::Internal, format!("report: {e}")))? + "\n")
}

/// How artifacts are opened.
#[derive(clap::Args, Clone, Copy, Default)]
pub struct OpenArguments {
    /// Where it runs: cpu, a GPU as in cuda:0, or auto: the first GPU where there is one and the artifact has code for it, else
    /// the CPU
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Choice,
    /// Copy the weights to huge pages instead of reading the mapped file
    #[arg(long)]
    pub huge_pages: bool,
    /// Keep each worker thread to a core of its own
    #[arg(long)]
    pub pin: bool,
    /// Trust the weights: do not check their hashes when opening
    #[arg(long)]
    pub no_verify: bool,
}

impl OpenArguments {
    /// Opens an artifact.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open(&self, path: &Path) -> Result<Model> {
        Model::open_with(path, &mansard_runtime::OpenOptions { verify_weights: !self.no_verify })
    }

    /// The same with some number of workers.
    pub fn with_threads(self, threads: Option<usize>) -> EngineArguments {
        EngineArguments { threads, opening: self }
    }
}

/// Workers and opening, for commands that run an artifact.
#[derive(clap::Args)]
pub struct EngineArguments {
    /// Worker threads [default: physical cores]
    #[arg(short = 't', long, value_name = "N")]
    pub threads: Option<usize>,
    /// How artifacts are opened.
    #[command(flatten)]
    pub opening: OpenArguments,
}

impl EngineArguments {
    /// Opens an artifact.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open(&self, path: &Path) -> Result<Model> {
        self.opening.open(path)
    }

    /// An engine of an artifact, where `--device` says.
    ///
    /// # Errors
    /// As [`device::engine`].
    pub fn engine(&self, model: &Model, options: &EngineOptions) -> Result<Engine> {
        device::engine(&self.opening, model, options)
    }

    /// The options of its engine.
    pub fn options(&self) -> EngineOptions {
        use mansard_runtime::WeightPages;
        let weights = if self.opening.huge_pages { WeightPages::Huge } else { WeightPages::Mapped };
        EngineOptions { threads: self.threads, weights, pin: self.opening.pin, ..EngineOptions::default() }
    }
}

/// Token ids of a file that holds a JSON list of them.
///
/// # Errors
/// Where it cannot be read or holds anything else.
pub fn ids(path: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let ids = serde_json::from_slice::<Vec<u32>>(&text);
    let ids = ids.map_err(|e| Error::new(Kind::Input, format!("expected a JSON list of token ids: {e}")));
    ids.at(|| path.display().to_string())
}

/// What a model is given: text, or token ids.
#[derive(clap::Args)]
pub struct InputArguments {
    /// Text
    #[arg(short, long, value_name = "TEXT", conflicts_with_all = ["tokens", "tokens_file"])]
    pub prompt: Option<String>,
    /// Token ids: 1,2,3
    #[arg(long, value_name = "IDS", conflicts_with = "tokens_file")]
    pub tokens: Option<String>,
    /// A file with a JSON list of token ids
    #[arg(long, value_name = "FILE")]
    pub tokens_file: Option<PathBuf>,
}

impl InputArguments {
    /// The token ids given as such, where they were.
    ///
    /// # Errors
    /// Where they are no ids.
    pub fn ids(&self) -> Result<Option<Vec<u32>>> {
        if let Some(list) = &self.tokens {
            let id = |word: &str| {
                let parsed = word.trim().parse();
                parsed.map_err(|_| Error::new(Kind::Usage, format!("--tokens: expected token ids, found `{word}`")))
            };
            return list.split(',').map(id).collect::<Result<_>>().map(Some);
        }
        self.tokens_file.as_deref().map(ids).transpose()
    }

    /// Token ids, of the text where no ids were given.
    ///
    /// # Errors
    /// Where nothing was given, or it cannot be read or tokenized.
    pub fn ids_or_text(&self, model: &Model) -> Result<Vec<u32>> {
        match (self.ids()?, &self.prompt) {
            (Some(ids), _) => Ok(ids),
            (None, Some(text)) => model.tokens()?.encode(text, true),
            (None, None) => bail!(Usage, "expected an input: -p TEXT, --tokens IDS or --tokens-file FILE"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_and_tables() {
        assert_eq!([999, 1000, 97_200_000, 5_000_000_000].map(bytes), ["999 bytes", "1.0 kB", "97.2 MB", "5.0 GB"]);
        let rows = [vec!["a".into(), "10".into()], vec!["bcd".into(), "7".into()]];
        assert_eq!(table(&rows), "a    10\nbcd   7\n");
    }

    #[test]
    fn files_appear_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        let failed = write_npy(&path, [2, 3], |_| bail!(Input, "no"));
        assert!(failed.is_err() && std::fs::read_dir(folder.path()).unwrap().next().is_none());
        write_npy(&path, [1, 2], |out| out.write_all(&le_bytes(&[1.0, 2.0])).map_err(|e| Error::io("x", e))).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), bytes[127]), (128 + 8, b'\n'));
        assert_eq!(
            write_file(Path::new("/dev/full"), |out| {
                out.write_all(&[0; 100_000]).map_err(|e| Error::io("/dev/full", e))
            })
            .unwrap_err()
            .exit_code(),
            5
        );
    }
}
