//! Bundles: an artifact as an executable and as a library, on a root that has nothing else; what starting them costs; what is
//! refused. `.ci/lib` builds the parts, as for a user. (Built as a test of the `mansard` package.)

mod page;
#[path = "serve/model.rs"]
mod tiny;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The runner, the libraries and the header, beside the command line.
fn parts() -> &'static Path {
    static PARTS: OnceLock<PathBuf> = OnceLock::new();
    PARTS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_BIN_EXE_mansard")).with_file_name("lib");
        ok(Command::new(root().join(".ci/lib")).arg(&folder));
        folder
    })
}

fn ok(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn refused(command: &mut Command, code: i32, words: &[&str]) {
    let out: Output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{command:?}: {said}");
    assert!(said.matches("error:").count() == 1 && words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
}

fn mansard(arguments: &[&str]) -> Command {
    parts();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
    command.args(arguments);
    command
}

/// Runs a program with nothing to see but `root`; `None`, after saying so, where this user may not.
fn confined(root: &Path, program: &[&str]) -> Option<String> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--map-root-user", "chroot"]).arg(root).args(program).env("LC_ALL", "C");
    let mut chroot = Command::new("chroot");
    chroot.arg(root).args(program).env("LC_ALL", "C");
    for mut command in [chroot, unshare] {
        let Ok(out) = command.stdin(Stdio::null()).output() else { continue };
        let said = String::from_utf8_lossy(&out.stderr);
        if !said.contains("Operation not permitted") && !said.contains("unshare failed") {
            assert!(out.status.success(), "{command:?}: {said}");
            return Some(String::from_utf8(out.stdout).unwrap());
        }
    }
    let _ = std::io::stderr().write_all(b"skipped: neither chroot nor unshare is permitted here\n");
    None
}

const ASK: [&str; 7] = ["-p", "Hello", "-n", "12", "--temp", "0", "--ignore-end"];

#[test]
fn executables_answer_on_an_empty_root() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = tiny::model(folder.path(), "llama");
    let clean = folder.path().join("root");
    fs::create_dir(&clean).unwrap();
    let exe = clean.join("answer");
    let said = ok(&mut mansard(&["bundle", &artifact, "--exe", exe.to_str().unwrap()]));
    assert!(said.contains("answer: ") && said.contains("and the artifact"), "{said}");
    let expected = ok(mansard(&["run", &artifact]).args(ASK));
    assert!(expected.len() >= 10, "{expected:?}");
    assert_eq!(ok(Command::new(&exe).args(ASK)), expected);
    let raw = ok(mansard(&["run", &artifact, "--raw"]).args(ASK));
    assert_eq!(ok(Command::new(&exe).arg("--raw").args(ASK)), raw);
    assert!(ok(Command::new(&exe).arg("--about")).starts_with("a llama model of "));
    let program: Vec<&str> = [&["/answer"][..], &ASK].concat();
    if let Some(found) = confined(&clean, &program) {
        assert_eq!(found, expected);
        assert_eq!(fs::read_dir(&clean).unwrap().count(), 1, "nothing but the executable");
    }
    // What tools for executables do, they can do with it.
    if Command::new("strip").arg("--version").output().is_ok() {
        ok(Command::new("strip").arg(&exe));
        assert_eq!(ok(Command::new(&exe).args(ASK)), expected);
    }

    refused(Command::new(&exe).args(["-p", ""]).args(["--raw"]), 2, &["at least one token"]);
    refused(Command::new(&exe).args(["--tokens", "1,2,999"]), 2, &["tokens below 256, found 999"]);
    refused(Command::new(&exe).arg("--surprise"), 2, &["surprise"]);
    refused(&mut Command::new(parts().join("mansard-runner")), 2, &["holds no artifact", "mansard bundle"]);

    let embedder = folder.path().join("embedder");
    let other = tempfile::tempdir().unwrap();
    let bert = tiny::model(other.path(), "bert");
    ok(&mut mansard(&["bundle", &bert, "--exe", embedder.to_str().unwrap()]));
    let numbers = |text: &str| serde_json::from_str::<Vec<f32>>(text).unwrap();
    let found = numbers(&ok(Command::new(&embedder).args(["-p", "Hello"])));
    let expected = numbers(&ok(&mut mansard(&["embed", &bert, "-p", "Hello"])));
    assert!(found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6));
}

#[test]
fn damaged_executables_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = tiny::model(folder.path(), "llama");
    let exe = folder.path().join("answer");
    ok(&mut mansard(&["bundle", &artifact, "--exe", exe.to_str().unwrap()]));
    let whole = fs::read(&exe).unwrap();
    let size = fs::metadata(&artifact).unwrap().len() as usize;
    let start = whole.windows(8).rposition(|w| w == &fs::read(&artifact).unwrap()[..8]).unwrap();
    assert!(start.is_multiple_of(4096) && whole[start..start + size] == fs::read(&artifact).unwrap()[..]);
    let table = u64::from_le_bytes(whole[40..48].try_into().unwrap()) as usize;
    let last = whole.len() - 64;
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        // Under another name, as a running program's file may not be written to.
        let damaged = tempfile::NamedTempFile::new_in(folder.path()).unwrap().into_temp_path();
        fs::write(&damaged, &bytes).unwrap();
        ok(Command::new("chmod").arg("755").arg(&damaged));
        damaged
    };
    let put = |bytes: &mut Vec<u8>, at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    type Change<'a> = (&'a str, Box<dyn Fn(&mut Vec<u8>) + 'a>);
    let changes: Vec<Change<'_>> = vec![
        ("sections", Box::new(|b| b.truncate(whole.len() - 1))),
        ("sections", Box::new(|b| b.truncate(start + size / 2))),
        ("sections", Box::new(|b| put(b, 40, u64::MAX))),
        ("sections", Box::new(|b| put(b, 40, table as u64 + 64))),
        ("hash", Box::new(|b| b[start + size - 1] ^= 1)),
        ("header", Box::new(|b| put(b, start, 1 << 60))),
        ("multiple of 4096", Box::new(|b| put(b, last + 24, start as u64 + 64))),
        ("expected a part", Box::new(|b| put(b, last + 24, u64::MAX - 4095))),
        ("expected a part", Box::new(|b| put(b, last + 32, u64::MAX))),
        ("expected a part", Box::new(|b| put(b, last + 32, whole.len() as u64))),
        ("bytes", Box::new(|b| put(b, last + 32, size as u64 - 64))),
        ("bytes", Box::new(|b| put(b, last + 32, 0))),
    ];
    for (word, change) in changes {
        refused(Command::new(&*with(&*change)).args(ASK), 3, &[word]);
    }
}

const MAIN: &str = r#"
#include "answer.h"
#include <stdio.h>
#include <string.h>

static int show(const mansard_event *event, void *user) {
  (void)user;
  return fwrite(event->text, 1, event->text_bytes, stdout) == event->text_bytes;
}

/* Kilobytes that no file holds. */
static long anonymous(void) {
  char line[256];
  long found = -1;
  FILE *file = fopen("/proc/self/smaps_rollup", "r");
  while (file && fgets(line, sizeof line, file)) sscanf(line, "Anonymous: %ld", &found);
  if (file) fclose(file);
  return found;
}

int main(int argc, char **argv) {
  mansard_model *model;
  mansard_service *service;
  mansard_options options;
  uint32_t tokens[] = {72, 101};
  if (answer_open(0, &model) || mansard_service_start(model, NULL, &service) || mansard_options_default(&options)) {
    fprintf(stderr, "error: %s\n", mansard_error());
    return 1;
  }
  options.temperature = 0;
  options.max_tokens = 12;
  options.ignore_end = 1;
  if (mansard_generate(service, tokens, 2, &options, show, NULL)) return 1;
  if (argc > 1 && !strcmp(argv[1], "memory")) printf("%ld\n", anonymous());
  return mansard_service_free(service) || mansard_model_free(model);
}
"#;

/// A program with the library of an artifact in it.
fn linked(folder: &Path, artifact: &str) -> PathBuf {
    let (source, out, exe) = (folder.join("main.c"), folder.join("out"), folder.join("main"));
    fs::write(&source, MAIN).unwrap();
    ok(&mut mansard(&["bundle", artifact, "--static-lib", out.to_str().unwrap()]));
    let mut cc = Command::new("cc");
    cc.args(["-Wall", "-Wextra", "-Werror"]).arg(&source).arg("-I").arg(&out).arg("-L").arg(&out);
    ok(cc.args(["-lanswer", "-lm", "-lpthread", "-o"]).arg(&exe));
    exe
}

#[test]
fn libraries_link_and_answer_with_libc_only() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = tiny::model(folder.path(), "llama");
    let exe = linked(folder.path(), &artifact);
    let expected =
        ok(mansard(&["run", &artifact]).args(["--tokens", "72,101", "-n", "12", "--temp", "0", "--ignore-end"]));
    assert_eq!(ok(&mut Command::new(&exe)), expected.trim_end_matches('\n'));

    // A root with what the program asks of the system: the C library's files, which it names itself.
    let clean = folder.path().join("root");
    let listed = ok(Command::new("ldd").arg(&exe));
    let files: Vec<&str> = listed.split_whitespace().filter(|word| word.starts_with('/')).collect();
    let known = ["libc.so", "libm.so", "libgcc_s.so", "ld-linux"];
    assert!(files.iter().all(|file| known.iter().any(|name| file.contains(name))), "{listed}");
    for file in files.iter().copied().chain([exe.to_str().unwrap()]) {
        let copy = clean.join(if file == exe.to_str().unwrap() { "main" } else { &file[1..] });
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(file, copy).unwrap();
    }
    if let Some(found) = confined(&clean, &["/main"]) {
        assert_eq!(found, expected.trim_end_matches('\n'));
    }
    let bundle = |more: &[&str]| {
        let out = folder.path().join("other");
        let mut command = mansard(&["bundle", &artifact, "--static-lib", out.to_str().unwrap()]);
        command.args(more);
        command
    };
    refused(&mut bundle(&["--name", "3m"]), 2, &["name in C"]);
    refused(&mut bundle(&["--name", "mansard"]), 2, &["name in C"]);
    refused(&mut bundle(&["--parts", "/nonexistent"]), 5, &["/nonexistent", "libmansard.a"]);
    refused(&mut mansard(&["bundle", &artifact]), 2, &["--exe"]);
    refused(&mut mansard(&["bundle", "/etc/hostname", "--exe", "/tmp/never"]), 3, &["/etc/hostname"]);
    let report: serde_json::Value = serde_json::from_str(&ok(&mut bundle(&["--name", "tiny", "--json"]))).unwrap();
    assert!(report["files"][0]["path"].as_str().unwrap().ends_with("libtiny.a"), "{report}");
    assert!(fs::read_to_string(folder.path().join("other/tiny.h")).unwrap().contains("tiny_open(uint32_t flags"));
}

/// A model whose weights are much larger than everything else.
fn large(folder: &Path) -> (String, usize) {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 49152,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "torch_dtype": "float32", "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2}"#;
    let (source, artifact) = (folder.join("config.json"), folder.join("large.mansard"));
    fs::write(&source, config).unwrap();
    let [source, artifact] = [source, artifact].map(|path| path.display().to_string());
    ok(&mut mansard(&["compile", &source, "--synthetic-weights", "--quant", "none", "-o", &artifact]));
    let bytes = fs::metadata(&artifact).unwrap().len() as usize;
    assert!(bytes > 64 << 20, "{bytes} bytes");
    (artifact, bytes)
}

#[test]
fn weights_are_mapped_where_they_lie() {
    let folder = tempfile::tempdir().unwrap();
    let (artifact, bytes) = large(folder.path());
    let exe = linked(folder.path(), &artifact);
    // Ids came out, as there is no tokenizer; the figure is the last line.
    let said = ok(Command::new(&exe).arg("memory"));
    let anonymous: usize = said.lines().last().unwrap().parse().unwrap();
    assert!(anonymous << 10 < bytes / 2, "{anonymous} kB of {bytes} bytes");

    // An executable that waits for its prompt, every hash checked.
    let exe = folder.path().join("answer");
    ok(&mut mansard(&["bundle", &artifact, "--exe", exe.to_str().unwrap()]));
    let mut child = Command::new(&exe).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let figure = |name: &str| {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", child.id())).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).map(String::from);
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok()).unwrap_or(0) << 10
    };
    let start = Instant::now();
    while figure("Rss:") < bytes && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let (resident, anonymous) = (figure("Rss:"), figure("Anonymous:"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(resident >= bytes && anonymous < bytes / 2, "{resident} resident, {anonymous} anonymous of {bytes}");
}

#[test]
fn the_runtime_part_is_small() {
    let bytes = fs::metadata(parts().join("mansard-runner")).unwrap().len();
    assert!(bytes <= 6_000_000, "mansard-runner has {bytes} bytes, at most 6 MB");
}

/// A C program linked with the shared library as the README says.
fn shared(source: &Path, exe: &Path) {
    let library = parts().to_str().unwrap();
    let mut cc = Command::new("cc");
    cc.arg(source).args(["-Wall", "-Wextra", "-Werror", "-I", library, "-L", library, "-lmansard", "-lm", "-lpthread"]);
    ok(cc.arg(format!("-Wl,-rpath,{library}")).arg("-o").arg(exe));
}

#[test]
fn the_page_s_c_program_runs() {
    let [folder, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (source, exe) = (folder.path().join("page.c"), folder.path().join("page"));
    fs::write(&source, page::program("c")).unwrap();
    shared(&source, &exe);
    let (generator, encoder) = (tiny::model(folder.path(), "llama"), tiny::model(other.path(), "bert"));
    let out = Command::new(&exe).args([&generator, &encoder]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("floats, the first is"), "{said}{:?}", out.stderr);
}

#[test]
fn the_c_example_converses() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = tiny::model(folder.path(), "llama");
    let exe = folder.path().join("chat");
    shared(&root().join("examples/chat.c"), &exe);
    let mut child =
        Command::new(&exe).args([&artifact, "8"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all("Hi\nAnd?\n".as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stdout.iter().filter(|b| **b == b'\n').count() >= 2, "{out:?}");
    refused(Command::new(&exe).arg("/nonexistent"), 5, &["/nonexistent"]);
}
