//! The command line as a user meets it: every command on a tiny checkpoint, and damaged, hostile or absurd input: one
//! clear error, the documented exit code, nothing lost, no panic. (Built as a test of the `mansard` package.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn goldens(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family)
}

fn mansard(arguments: &[&str]) -> Output {
    // What was measured on this machine stays out of the tests.
    mansard_of("/nonexistent", arguments)
}

/// `mansard` of a user whose configuration is in that folder.
fn mansard_of(configuration: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
    command.args(arguments).env("XDG_CONFIG_HOME", configuration).stdin(Stdio::null());
    command.output().expect("the command runs")
}

/// Runs and expects success; gives standard output.
fn done(arguments: &[&str]) -> String {
    let out = mansard(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// Runs and expects one error with `code` whose text holds every one of `words`.
fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let out = mansard(arguments);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    assert_eq!(said.matches("error:").count(), 1, "{arguments:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{arguments:?}: expected {word:?} in {said}");
    }
}

/// A compiled tiny model in a folder of its own.
fn tiny(family: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.mansard").display().to_string();
    done(&["compile", goldens(family).to_str().unwrap(), "-o", &path]);
    (folder, path)
}

fn write(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> String {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

#[test]
fn every_command_on_a_tiny_model() {
    let (folder, m) = tiny("llama");
    let text = done(&["run", &m, "--tokens", "1,14,51", "-n", "4", "--temp", "0"]);
    assert!(!text.trim().is_empty());
    let npy = folder.path().join("out.npy").display().to_string();
    done(&["logits", &m, "--tokens", "1,14,51", "-o", &npy]);
    let bytes = fs::read(&npy).unwrap();
    assert_eq!(&bytes[..6], b"\x93NUMPY");
    assert!(String::from_utf8_lossy(&bytes[..128]).contains("(3, 256)"));
    let ids = write(&folder, "ids.json", b"[1, 14, 51]");
    let same = folder.path().join("same.npy").display().to_string();
    done(&["logits", &m, "--tokens-file", &ids, "-o", &same]);
    assert_eq!(fs::read(&same).unwrap(), bytes);
    let model = goldens("llama").display().to_string();
    let eval = ["eval", &m, "--tokens-file", &ids, "--against", &model, "--json"];
    let found: serde_json::Value = serde_json::from_str(&done(&eval)).unwrap();
    assert!(found["perplexity"].as_f64().unwrap() > 1.0 && found["positions"] == 2);
    assert!(found["kl_divergence_mean"].as_f64().unwrap().abs() < 1e-6 && found["top1_agreement"] == 1.0);
    let one = write(&folder, "one.json", b"[1]");
    refused(&["eval", &m, "--tokens-file", &one], 3, &["at least 2 tokens, found 1"]);
    let latin = write(&folder, "latin.txt", b"caf\xe9");
    refused(&["eval", &m, "--text", &latin], 3, &["another byte at 3"]);
    assert!(done(&["inspect", &m]).contains("layer"));
    serde_json::from_str::<serde_json::Value>(&done(&["inspect", &m, "--json"])).unwrap();
    assert!(done(&["doctor"]).contains("LLVM"));
}

#[test]
fn an_artifact_is_checked_against_its_model() {
    let (folder, m) = tiny("llama");
    let (model, ids) = (goldens("llama").display().to_string(), "--tokens=1,14,51,7,90");
    let found = json(&format!("verify {m} --against {model} {ids} --json"));
    assert!(found["holds"] == true && found["tokens"] == 5, "{found}");
    assert!(found["layers"].as_array().unwrap().iter().all(|l| l["off"].as_f64().unwrap() < 1e-3), "{found}");
    assert!(found["worst_kernel"]["kernel"].is_string() && found["worst_layer"]["layer"].is_string());
    assert!(done(&["verify", &m, "--against", &model, ids]).contains("worst kernel: kernel `"));
    assert!(done(&["bisect", &m, "--against", &model, ids]).contains("nothing leaves tolerance"));
    refused(
        &["verify", &m, "--against", &model, ids, "--tolerance", "1e-9"],
        1,
        &["layer", "expected at most 1.00e-9"],
    );
    refused(&["verify", &m, "--against", &model, ids, "--tolerance=-1"], 2, &["--tolerance", "above 0"]);
    refused(&["verify", &m, "--against", &model, "--tokens=1"], 2, &["expected 2 to", "found 1"]);
    // Another model of the same shape: its weights are not those of the artifact.
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens("llama").join(name), other.join(name)).unwrap();
    }
    let mut bytes = fs::read(other.join("model.safetensors")).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].iter_mut().skip(3).step_by(4).for_each(|sign| *sign ^= 0x80);
    fs::write(other.join("model.safetensors"), bytes).unwrap();
    let (other, case) = (other.display().to_string(), folder.path().join("case.mir").display().to_string());
    refused(&["verify", &m, "--against", &other, ids], 1, &["off by"]);
    refused(&["bisect", &m, "--against", &other, ids, "-o", &case], 1, &["the model was read otherwise", "case.mir"]);
    done(&["opt", &case]);
}

#[test]
fn a_quality_card_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens("llama").join(name), folder.path().join(name)).unwrap();
    }
    let words = ["zero", "one", "two", "three", "four", "five", "six", "seven"];
    let vocab: serde_json::Map<String, serde_json::Value> =
        words.iter().zip(0..).map(|(w, i)| (w.to_string(), i.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "zero"},
    });
    write(&folder, "tokenizer.json", tokenizer.to_string().as_bytes());
    let text = write(&folder, "text.txt", "one two three five seven six four two one ".repeat(5).as_bytes());
    let (model, evaluate) = (folder.path().display().to_string(), format!("--evaluate={text}"));
    let [a, b, plain] = ["a", "b", "plain"].map(|name| folder.path().join(name).display().to_string());
    let table = done(&["compile", &model, "--quant", "int8", "-o", &a, &evaluate]);
    assert!(table.contains("perplexity: ") && table.contains("top-1 agreement: "), "{table}");
    done(&["compile", &model, "--quant", "int8", "-o", &b, &evaluate]);
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    done(&["compile", &model, "--quant", "int8", "-o", &plain]);
    assert!(
        done(&["inspect", &a]).contains("quality: KL divergence, mean 0.")
            && !done(&["inspect", &plain]).contains("quality")
    );
    // What is stored is what `eval` says.
    let said = json(&format!("eval {a} --text {text} --against {model} --window 256 --json"));
    let found = json(&format!("diff {plain} {a} --json"));
    let lines = found["properties"].as_array().unwrap();
    assert!(
        !lines.is_empty() && lines.iter().all(|l| l["section"] == "quality" || l["section"] == "layer error"),
        "{found}"
    );
    let card = json(&format!("inspect {a} --json"));
    let card = &card["manifest"]["provenance"]["quality"];
    assert_eq!(card["perplexity"], said["perplexity"], "{card} {said}");
    assert!(
        card["text"].as_str().unwrap().len() == 64 && card["window"] == 256 && card["positions"] == said["positions"]
    );
    assert!(card["kl_divergence_mean"].as_f64().unwrap() > 0.0);
    // Each layer is as far from the interpreter as `verify` finds it.
    let layers = card["layers"].as_array().unwrap();
    let verified = json(&format!("verify {a} --against {model} --tokens 1,2,3,5,7,6,4,2,1,1,2,3 --json"));
    let verified = verified["layers"].as_array().unwrap();
    assert_eq!(layers.len(), verified.len());
    for (stored, found) in layers.iter().zip(verified) {
        let [stored_off, off] = [stored, found].map(|l| l["off"].as_f64().unwrap());
        assert!(stored["layer"] == found["layer"] && (stored_off - off).abs() <= 1e-3 * off, "{stored} {found}");
    }
    assert!(
        layers.iter().any(|l| l["off"].as_f64().unwrap() > 0.0) && card["layer_error_predicted"].as_f64() > Some(0.0)
    );
    assert!(done(&["inspect", &a]).contains("quality: layer error, worst "));
    refused(&["compile", &model, "--evaluate", "--emit", "graph"], 2, &["--evaluate"]);
}

#[test]
fn two_artifacts_are_compared() {
    let (folder, m) = tiny("llama");
    assert_eq!(done(&["diff", &m, &m]), "no difference\n");
    let (other, model) =
        (folder.path().join("q8.mansard").display().to_string(), goldens("llama").display().to_string());
    done(&["compile", &model, "--quant", "int8", "--kv", "int8", "-o", &other]);
    let found = json(&format!("diff {m} {other} --json"));
    assert_eq!(found["equal"], false);
    let lines = found["properties"].as_array().unwrap();
    let line = |section: &str, name: &str| {
        lines
            .iter()
            .find(|l| l["section"] == section && l["name"] == name)
            .unwrap_or_else(|| panic!("{section} {name}"))
    };
    assert!(
        line("option", "quant")["b"] == "q8_0"
            && line("bytes", "weights")["a"].as_u64() > line("bytes", "weights")["b"].as_u64()
    );
    assert!(lines.iter().all(|l| l["equal"] == false) && lines.iter().any(|l| l["section"] == "approximation"));
    assert!(done(&["diff", &m, &other]).contains("q8_0["));
}

/// What `mansard` with these arguments prints, as JSON.
fn json(arguments: &str) -> serde_json::Value {
    serde_json::from_str(&done(&arguments.split(' ').collect::<Vec<_>>())).unwrap()
}

#[test]
fn bench_fills_its_matrix() {
    let (folder, m) = tiny("llama");
    let rows = json(&format!("bench {m} -p 16,40 -n 4 -b 1,3 -d 0,8 -t 1,2 -r 2 -o json"));
    let names = ["pp16", "pp40", "tg4", "pp16 b3", "pp40 b3", "tg4 b3", "pp16 @ d8", "pp40 @ d8", "tg4 @ d8"];
    let names = [&names[..], &["pp16 b3 @ d8", "pp40 b3 @ d8", "tg4 b3 @ d8"]].concat();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["test"].as_str().unwrap()).collect::<Vec<_>>(), [&names[..], &names].concat());
    for row in rows {
        let figure = |field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} of {row}"));
        let steps = if row["test"].as_str().unwrap().starts_with("tg") { figure("tokens") } else { 1.0 };
        let tokens = figure("tokens") * figure("batch") / steps;
        assert!((figure("tokens_per_second") * figure("milliseconds") / 1e3 / tokens - 1.0).abs() < 1e-9);
        assert!(figure("roofline_share") > 0.0 && figure("stddev") >= 0.0 && figure("open_milliseconds") > 0.0);
        assert!(figure("bandwidth") > 1e6 && row["peaks"] == "stated" && row["kl_divergence"].is_null());
    }
    assert!(rows[0]["threads"] == 1 && rows[12]["threads"] == 2 && rows[11]["depth"] == 8);
    let csv = done(&["bench", &m, "-p", "16", "-n", "0", "-r", "1", "-o", "csv"]);
    let lines: Vec<&str> = csv.lines().collect();
    assert!(lines[0].starts_with("test,tokens,batch,depth,threads,tokens_per_second,"), "{csv}");
    assert!(lines.len() == 2 && lines[1].starts_with("pp16,16,1,0,") && lines[1].ends_with(','), "{csv}");
    let ids = write(&folder, "ids.json", b"[1, 14, 51, 3]");
    let model = goldens("llama").display().to_string();
    let rows = json(&format!("bench {m} -p 0 -n 4 -r 1 --against {model} --tokens-file {ids} -o json"));
    assert!(rows[0]["kl_divergence"].as_f64().unwrap().abs() < 1e-6);
    refused(
        &["bench", &m, "-p", "16", "-d", "0,4000"],
        2,
        &["pp16 @ d4000: 16 tokens after 4000 exceed the context of"],
    );
    refused(&["bench", &m, "-p", "0", "-n", "4", "-b", "65"], 2, &["tg4 b65: expected at most 64 sequences"]);
    refused(&["bench", &m, "-b", "0"], 2, &["-b: expected at least 1 sequence"]);
    refused(&["bench", &m, "-p", "4", "-n", "4", "-t", "0"], 2, &["threads, found 0"]);
}

#[test]
fn bench_reads_whole_texts_with_encoders() {
    let (_folder, m) = tiny("bert");
    let rows = json(&format!("bench {m} -p 16 -b 1,40 -r 1 -o json"));
    let names: Vec<&str> = rows.as_array().unwrap().iter().map(|r| r["test"].as_str().unwrap()).collect();
    assert_eq!(names, ["pp16", "pp16 b40"]);
    refused(&["bench", &m, "-n", "4"], 2, &["is an encoder: it has no decoding"]);
}

#[test]
fn bench_says_where_the_time_goes() {
    let (_folder, m) = tiny("llama");
    let tables = json(&format!("bench {m} --kernels -p 16 -n 8 -b 1,3 -t 2 -r 2 -o json"));
    assert_eq!(tables.as_array().unwrap().len(), 4);
    for (table, test) in tables.as_array().unwrap().iter().zip(["pp16", "tg8", "pp16 b3", "tg8 b3"]) {
        assert_eq!((&table["test"], &table["threads"]), (&test.into(), &2.into()));
        let kernels = table["kernels"].as_array().unwrap();
        let shares: f64 = kernels.iter().map(|k| k["share"].as_f64().unwrap()).sum();
        let start = table["start_seconds"].as_f64().unwrap() / table["seconds"].as_f64().unwrap();
        assert!((shares + start - 1.0).abs() < 1e-3, "{shares} of the step, and {start} before it");
        assert!(kernels.iter().any(|k| k["weight_bytes"].as_f64().unwrap() > 0.0));
        let multiplies = |k: &serde_json::Value| k["kernel"].as_str().unwrap().contains("matmul");
        assert!(kernels.iter().all(|k| multiplies(k) == k["tile"].as_str().unwrap().contains('x')));
        assert!(kernels.iter().all(|k| k["launches"].as_u64().unwrap() > 0 && k["roof_share"].is_number()));
    }
}

#[test]
fn a_machine_is_measured_and_priced_on() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().display().to_string();
    let own = |arguments: &[&str]| {
        let out = mansard_of(&home, arguments);
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    assert!(own(&["doctor"]).contains("probe: none"));
    let table = own(&["probe", "--quick", "-t", "3"]);
    assert!(table.contains("read memory") && table.contains("i8 products") && table.contains("barrier"), "{table}");
    let file = folder.path().join("mansard/machine.toml").display().to_string();
    let machine: serde_json::Value = serde_json::from_str(&own(&["doctor", "--json"])).unwrap();
    let machine = &machine["probe"]["machine"];
    let counts: Vec<u64> = machine["workers"].as_array().unwrap().iter().filter_map(|w| w["count"].as_u64()).collect();
    assert_eq!(counts, [1, 2, 3]);
    let measured = format!("measured {}", machine["measured"].as_str().unwrap());
    // Bytes depend on the machine only where that is asked for.
    let model = goldens("llama").display().to_string();
    let compile = |name: &str, more: &[&str]| {
        let path = folder.path().join(name).display().to_string();
        own(&[&["compile", &model, "-o", &path], more].concat());
        path
    };
    let (plain, local, named) =
        (compile("plain", &[]), compile("local", &["--machine", "local"]), compile("named", &["--machine", &file]));
    done(&["compile", &model, "-o", &folder.path().join("other").display().to_string()]);
    assert!(fs::read(&plain).unwrap() == fs::read(folder.path().join("other")).unwrap());
    assert!(fs::read(&local).unwrap() == fs::read(&named).unwrap());
    assert!(own(&["inspect", &local]).contains("machine = ") && !own(&["inspect", &plain]).contains("machine = "));
    let again = ["bisect", &local, "--against", &model, "--tokens=1,14,51"];
    refused(&again, 4, &["compiled with machine = ", "not what was measured"]);
    let rows = own(&["bench", &plain, "-p", "16", "-n", "0", "-r", "1", "-o", "json"]);
    assert!(rows.contains(&measured), "{rows}");
    // Another processor's figures are not this one's.
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen("processor = \"", "processor = \"other-", 1)).unwrap();
    let rows = own(&["bench", &plain, "-p", "16", "-n", "0", "-r", "1"]);
    assert!(rows.contains("peaks: stated, run `mansard probe`"), "{rows}");
    // Damage.
    fs::write(&file, text.replacen("count = 1", "count = \"one\"", 1)).unwrap();
    let words = ["machine.toml", "`workers[0].count`", "string \"one\", expected usize"];
    let out = folder.path().join("none").display().to_string();
    refused(&["compile", &model, "-o", &out, "--machine", &file], 3, &words);
    assert!(own(&["doctor"]).contains("probe: not usable"));
    assert_eq!(mansard_of(&home, &["bench", &plain, "-p", "16", "-n", "0"]).status.code(), Some(3));
    let cut = write(&folder, "cut.toml", &text.as_bytes()[..text.len() / 2]);
    refused(&["compile", &model, "-o", &out, "--machine", &cut], 3, &["cut.toml"]);
    refused(&["compile", &model, "-o", &out, "--machine", "local"], 2, &["not measured yet"]);
    refused(&["compile", &model, "-o", &out, "--machine", "no-such.toml"], 5, &["no-such.toml"]);
    let gpu = write(&folder, "gpu.toml", text.replacen(std::env::consts::ARCH, "sm_90a", 1).as_bytes());
    refused(&["compile", &model, "-o", &out, "--machine", &gpu], 2, &["sm_90a", std::env::consts::ARCH]);
    refused(&["probe", "-t", "0"], 2, &["at least 1 thread"]);
    assert!(!Path::new(&out).exists());
}

#[test]
fn weights_are_quantized_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.mansard").display().to_string();
    let model = goldens("llama").display().to_string();
    let ids = write(&folder, "ids.json", b"[1, 14, 51, 88, 7, 9, 200, 31]");
    for (quant, said, most) in
        [("int8", "16 matrices quantized to q8_0", 1e-3), ("int4-g32", "14 matrices quantized to q4_0", 0.1)]
    {
        let table = done(&["compile", &model, "-o", &out, "--quant", quant]);
        assert!(table.contains(said), "{table}");
        let eval = ["eval", &out, "--tokens-file", &ids, "--against", &model, "--json"];
        let found: serde_json::Value = serde_json::from_str(&done(&eval)).unwrap();
        let divergence = found["kl_divergence_mean"].as_f64().unwrap();
        assert!(divergence < most, "{quant}: {divergence}");
    }
    let other = folder.path().join("other.mansard").display().to_string();
    // The MLP is 160 wide.
    let words = ["model.layers.0.mlp.down_proj.weight", "64", "160", "q4_0"];
    refused(&["compile", &model, "-o", &other, "--quant", "int4-g64"], 2, &words);
    refused(&["compile", &model, "-o", &other, "--quant", "int3"], 2, &["int4-g64"]);
    assert!(!Path::new(&other).exists());
    // Experts: routers stay as they are, and it says so.
    let table = done(&["compile", goldens("mixtral").to_str().unwrap(), "-o", &other, "--quant", "int8"]);
    assert!(table.contains("not quantized: `model.layers.*.mlp.gate.weight` f32 (2)"), "{table}");
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let (_a, a) = tiny("qwen3");
    let (_b, b) = tiny("qwen3");
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap());
}

#[test]
fn choices_by_measurement_are_kept_and_taken_again() {
    let folder = tempfile::tempdir().unwrap();
    let model = goldens("llama").display().to_string();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let compile = |name: &str, more: &[&str]| {
        let out = path(name);
        let arguments = ["compile", &model, "--step-tokens", "16", "--context", "64", "--json", "-o", &out];
        let report: serde_json::Value = serde_json::from_str(&done(&[&arguments, more].concat())).unwrap();
        (report, fs::read(&out).unwrap())
    };
    let (report, tuned) = compile("tuned", &["--tune"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left of the trials");
    let json = write(&folder, "tuning.json", done(&["inspect", &path("tuned"), "--tuning"]).as_bytes());
    let (again, from_artifact) = compile("again", &["--tuning", &path("tuned")]);
    assert!(again["tuning"] == report["tuning"] && from_artifact == tuned);
    assert!(compile("json", &["--tuning", &json]).1 == tuned);
    // What is for other kernels is named and changes nothing.
    let choice = r#"{"tokens": 4, "strips": 2, "cache_bytes": 65536, "ahead": 0}"#;
    let other = format!(
        r#"{{"mansard_tuning": 1, "kernels": [{{"kernel": "other", "target": "native", "key": "00", "choice": {choice}, "measured": []}}]}}"#
    );
    let (report, same) = compile("other", &["--tuning", &write(&folder, "other.json", other.as_bytes())]);
    assert!(report["tuning_unused"][0] == "other" && same == compile("plain", &[]).1);
    let refuse = |more: &[&str], code, words: &[&str]| {
        refused(&[&["compile", &model, "-o", &path("none")], more].concat(), code, words);
    };
    let half = write(&folder, "half.json", &other.as_bytes()[..80]);
    refuse(&["--tuning", &half], 3, &["half.json", "expected the JSON of"]);
    refuse(&["--tuning", &path("missing")], 5, &["missing"]);
    refuse(&["--tuning", &json, "--tune"], 2, &["--tune"]);
    let foreign = if cfg!(target_arch = "x86_64") { "aarch64+dotprod" } else { "x86-64-v3" };
    refuse(&["--tune", "--target", foreign], 4, &["cannot be timed here", foreign]);
}

#[test]
fn several_targets_make_one_artifact_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let model = goldens("llama");
    let compile = |name: &str, targets: &str| {
        let path = folder.path().join(name).display().to_string();
        done(&["compile", model.to_str().unwrap(), "--target", targets, "-o", &path]);
        path
    };
    let best = compile("best", "x86-64-v4,x86-64-v3+avxvnni,x86-64-v3,aarch64+i8mm,aarch64+dotprod");
    let worst = compile("worst", "aarch64+dotprod,x86-64-v3,aarch64+i8mm,x86-64-v3+avxvnni,x86-64-v4");
    assert!(fs::read(&best).unwrap() == fs::read(&worst).unwrap());
    let manifest: serde_json::Value = serde_json::from_str(&done(&["inspect", &best, "--json"])).unwrap();
    let images: Vec<&str> =
        manifest["manifest"]["code"].as_array().unwrap().iter().filter_map(|c| c["target"].as_str()).collect();
    assert_eq!(images, ["x86-64-v4", "x86-64-v3+avxvnni", "x86-64-v3", "aarch64+i8mm", "aarch64+dotprod"]);
    let says = |m: &str| done(&["run", m, "--tokens", "1,14,51", "-n", "8", "--temp", "0"]);
    let one = if cfg!(target_arch = "x86_64") { "x86-64-v3" } else { "aarch64+dotprod" };
    assert_eq!(says(&best), says(&compile("one", one)));
    let other = if cfg!(target_arch = "x86_64") { "aarch64+dotprod" } else { "x86-64-v3" };
    refused(&["run", &compile("other", other), "--tokens", "1", "-n", "1"], 4, &["this machine is", other]);
    let out = folder.path().join("none").display().to_string();
    let refuse = |targets: &str, code: i32, words: &[&str]| {
        refused(&["compile", model.to_str().unwrap(), "--target", targets, "-o", &out], code, words);
    };
    refuse("x86-64-v3,x86-64-v3", 2, &["`x86-64-v3` twice"]);
    refuse("aarch64+sve9", 4, &["aarch64+sve9", "aarch64+i8mm"]);
}

#[test]
fn every_layer_can_be_seen_and_text_comes_back_in() {
    let folder = tempfile::tempdir().unwrap();
    let model = goldens("llama");
    let model = model.to_str().unwrap();
    for layer in ["graph", "canonical", "optimized", "plan", "mlir", "llvm", "asm"] {
        assert!(!done(&["compile", model, "--emit", layer]).is_empty(), "{layer}");
    }
    let object = folder.path().join("code.o").display().to_string();
    done(&["compile", model, "--emit", "object", "-o", &object]);
    assert_eq!(&fs::read(object).unwrap()[..4], b"\x7fELF");
    let graph = write(&folder, "graph.mir", done(&["compile", model, "--emit", "graph"]).as_bytes());
    let canonical = done(&["opt", &graph, "--passes", "canonicalize"]);
    assert!(canonical.contains("stage canonical"));
    let canonical = write(&folder, "canonical.mir", canonical.as_bytes());
    assert!(done(&["opt", &canonical, "--passes", "precision,saturate"]).contains("stage optimized"));
    for layer in ["graph", "canonical", "optimized", "plan"] {
        let text = done(&["compile", model, "--emit", layer]);
        let file = write(&folder, "again.mir", text.as_bytes());
        done(&["opt", &file]);
    }
}

#[test]
fn damaged_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.mansard").display().to_string();
    let compile = |path: &str, words: &[&str]| {
        refused(&["compile", path, "-o", &out], 3, words);
        assert!(!Path::new(&out).exists(), "no artifact is left");
    };
    compile(&write(&folder, "empty.gguf", b""), &["empty.gguf"]);
    compile(&write(&folder, "short.gguf", b"GGUF\x03\0\0\0"), &["short.gguf"]);
    let mut huge = b"GGUF\x03\0\0\0".to_vec();
    huge.extend((1u64 << 60).to_le_bytes());
    huge.extend((1u64 << 60).to_le_bytes());
    compile(&write(&folder, "huge.gguf", &huge), &["huge.gguf"]);
    // A truncated checkpoint, a missing tensor, a wrong shape.
    let config = fs::read_to_string(goldens("llama").join("config.json")).unwrap();
    let weights = fs::read(goldens("llama").join("model.safetensors")).unwrap();
    for (name, config, weights) in [
        ("truncated", config.clone(), &weights[..weights.len() / 2]),
        ("layers", config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"), &weights[..]),
        ("width", config.replace("\"intermediate_size\": 160", "\"intermediate_size\": 192"), &weights[..]),
    ] {
        let dir = folder.path().join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("config.json"), config).unwrap();
        fs::write(dir.join("model.safetensors"), weights).unwrap();
        compile(dir.to_str().unwrap(), &[name]);
    }
    let dir = folder.path().join("unknown");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("config.json"), config.replace("\"llama\"", "\"zebra\"")).unwrap();
    fs::write(dir.join("model.safetensors"), &weights).unwrap();
    refused(&["compile", dir.to_str().unwrap(), "-o", &out], 4, &["zebra", "llama"]);
    refused(&["compile", "no-such-file.gguf", "-o", &out], 5, &["no-such-file.gguf"]);
}

#[test]
fn damaged_artifacts_are_refused() {
    let (folder, m) = tiny("llama");
    let whole = fs::read(&m).unwrap();
    for at in [0, 7, 9, 200, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        let path = write(&folder, "flipped.mansard", &bytes);
        refused(&["run", &path, "--tokens", "1", "-n", "1"], 3, &["flipped.mansard"]);
        let path = write(&folder, "cut.mansard", &whole[..at]);
        refused(&["run", &path, "--tokens", "1", "-n", "1"], 3, &["cut.mansard"]);
    }
}

#[test]
fn absurd_requests_are_refused() {
    let (folder, m) = tiny("llama");
    refused(&["run", &m, "--tokens", "1", "-n", "0"], 2, &["-n"]);
    refused(&["run", &m, "-p", "hello"], 3, &["tokenizer"]);
    refused(&["run", &m, "--tokens", "1,999999", "-n", "1"], 2, &["999999"]);
    let long = format!("[{}1]", "1,".repeat(5000));
    let ids = write(&folder, "long.json", long.as_bytes());
    let npy = folder.path().join("x.npy").display().to_string();
    refused(&["logits", &m, "--tokens-file", &ids, "-o", &npy], 2, &["5001", "256"]);
    assert!(!Path::new(&npy).exists());
    let case = write(
        &folder,
        "bad.mir",
        b"graph @g(%x: f32[t, 8]) stage imported {\n  %y = nonsense %x\n  return y = %y\n}\n",
    );
    refused(&["opt", &case, "--passes", "canonicalize"], 3, &["bad.mir:2", "nonsense"]);
    refused(&["opt", &case, "--passes", "frobnicate"], 2, &["frobnicate"]);
}

#[test]
fn a_full_disk_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.mansard");
    fs::write(&path, "what was there").unwrap();
    // A limit of 100 blocks stands for the full disk: a write beyond it fails, once the signal is ignored.
    let limited = format!("trap '' XFSZ; ulimit -f 100; exec {} \"$@\"", env!("CARGO_BIN_EXE_mansard"));
    let model = goldens("llama");
    let arguments = ["compile", model.to_str().unwrap(), "-o", path.to_str().unwrap()];
    let out = Command::new("sh").args(["-c", &limited, "sh"]).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(5), "{said}");
    assert!(said.contains("model.mansard") && !said.contains("panicked"), "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "what was there");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing partial is left");
    refused(&["compile", model.to_str().unwrap(), "-o", "/dev/full"], 2, &["/dev/full"]);
}

#[test]
fn a_killed_compilation_leaves_no_artifact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("killed.mansard");
    for delay_ms in [5, 50, 150, 300] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mansard"))
            .args(["compile", goldens("gemma3").to_str().unwrap(), "-o", path.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        if path.exists() {
            // It had finished before the signal: then the file is whole.
            done(&["run", path.to_str().unwrap(), "--tokens", "1", "-n", "1"]);
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn many_texts_are_embedded_in_few_steps() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens("bert").join(name), folder.path().join(name)).unwrap();
    }
    let tokenizer = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}}"#;
    write(&folder, "tokenizer.json", tokenizer.as_bytes());
    let artifact = folder.path().join("tiny.mansard").display().to_string();
    done(&["compile", folder.path().to_str().unwrap(), "-o", &artifact]);
    // Each of them fills one cache block and begins another.
    let texts: Vec<String> = (0..40).map(|i| ["a b", "b c"][i % 2].to_string() + &" c a".repeat(34)).collect();
    let prompts = texts.iter().flat_map(|text| ["-p", text]);
    let all = done(&["embed", &artifact].into_iter().chain(prompts).collect::<Vec<_>>());
    let lines: Vec<&str> = all.lines().collect();
    assert_eq!(lines.len(), 40);
    for (i, line) in lines.iter().enumerate() {
        let numbers = |line: &str| -> Vec<f64> { serde_json::from_str(line).unwrap() };
        let other = numbers(lines[i % 2]);
        assert!(numbers(line).iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-5), "text {i}");
    }
}

/// What is asked of GPUs: layers as text, and clear errors.
#[test]
fn code_for_gpus_is_shown() {
    let model = goldens("llama");
    let model = model.to_str().unwrap();
    let emitted = |layer| done(&["compile", model, "--target", "sm_90a", "--emit", layer]);
    assert!(emitted("mlir").contains("nvvm.kernel") && emitted("llvm").contains("llvm.nvvm.barrier"));
    assert!(emitted("ptx").contains(".target sm_90a"));
    let compile = |code: i32, words: &str, arguments: &[&str]| {
        refused(&[&["compile", model], arguments].concat(), code, &[words]);
    };
    compile(2, "run code of this CPU: name one too", &["--target", "sm_90a", "--tune", "-o", "/tmp/m"]);
    compile(4, "is NVIDIA's assembler's to make", &["--target", "sm_80", "--emit", "object"]);
    compile(2, "--emit ptx and sass are for GPUs", &["--emit", "ptx"]);
    compile(2, "--cubin is for GPUs: expected --target with sm_80 or sm_90a", &["--cubin", "-o", "/tmp/m"]);
    compile(2, "found `sm_80` twice", &["--target", "sm_80,sm_80", "--emit", "ptx"]);
    compile(4, "unknown target `sm_70`", &["--target", "sm_70", "--emit", "ptx"]);
}
