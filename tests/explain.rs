//! `explain`, measured costs and the quality card's layers as a user meets them, on tiny checkpoints: every kernel is told of,
//! the page stands alone and escapes what model files say, and what cannot be done leaves nothing behind. (Built as a test of
//! the `mansard` package.)

use mansard_backends::artifact::amend;
use mansard_ir::artifact::{Alternative, Decided, Decision};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn mansard(arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
    // What was measured on this machine stays out of the tests.
    command.env("XDG_CONFIG_HOME", "/nonexistent").stdin(Stdio::null());
    command.args(arguments.split(' ').filter(|a| !a.is_empty())).output().expect("the command runs")
}

fn done(arguments: &str) -> String {
    let out = mansard(arguments);
    assert!(out.status.success(), "{arguments}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

fn json(arguments: &str) -> Value {
    serde_json::from_str(&done(arguments)).expect("JSON")
}

fn refused(arguments: &str, code: i32, word: &str) {
    let out = mansard(arguments);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(code) && said.contains(word), "{arguments}: expected {word:?} in {said}");
    assert_eq!(said.matches("error:").count(), 1, "{said}");
}

fn goldens(family: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family).display().to_string()
}

/// A compiled tiny model in a folder of its own.
fn tiny(family: &str, more: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.mansard").display().to_string();
    done(&format!("compile {} -o {path} --step-tokens 128 {more}", goldens(family)));
    (folder, path)
}

/// What a page must not hold: anything from elsewhere, anything that runs.
fn stands_alone(page: &str) {
    let page = page.to_lowercase();
    for word in ["http:", "https:", "<script", "<link", "<img", "@import", "url(", "src=", "onload="] {
        assert!(!page.contains(word), "{word} in the page");
    }
    for tag in ["svg", "table", "details", "dl", "ul", "div", "pre"] {
        let count = |text: &str| page.matches(text).count();
        assert_eq!(count(&format!("<{tag}>")) + count(&format!("<{tag} ")), count(&format!("</{tag}>")), "{tag}");
    }
}

#[test]
fn every_kernel_is_told_of() {
    for family in ["llama", "bert"] {
        let (folder, m) = tiny(family, "--workload prompt=64,generate=16");
        let found = json(&format!("explain {m} --json"));
        let kernels = found["kernels"].as_array().unwrap();
        let text = done(&format!("explain {m}"));
        let page = folder.path().join("page.html");
        assert!(done(&format!("explain {m} --html {}", page.display())).contains("page.html"));
        let page = fs::read_to_string(page).unwrap();
        stands_alone(&page);
        assert!(!kernels.is_empty());
        for kernel in kernels {
            let name = kernel["kernel"].as_str().unwrap();
            assert!(text.contains(name) && page.contains(name), "{name}");
            let derivations = kernel["derivations"].as_array().unwrap();
            assert!(!derivations.is_empty(), "{name} has no derivation");
            for derivation in derivations {
                assert!(derivation["seconds"].as_f64().unwrap() > 0.0, "{derivation}");
                let others = derivation["others"].as_array().unwrap();
                assert!(others.len() as u64 <= derivation["considered"].as_u64().unwrap(), "{derivation}");
                assert!(others.iter().all(|o| o["more"].as_f64().unwrap() >= 0.0 && o["ops"] != ""), "{derivation}");
            }
        }
        let named = |kernel: &Value| kernels.iter().any(|k| k["kernel"] == *kernel);
        for phase in found["phases"].as_array().unwrap() {
            let (rows, total) = (phase["kernels"].as_array().unwrap(), &phase["total"]);
            let sum = |key: &str| rows.iter().map(|r| r[key].as_f64().unwrap()).sum::<f64>();
            assert!(rows.iter().all(|r| named(&r["kernel"]) && r["measured"].is_null()));
            for key in ["operations", "weight_bytes", "cache_bytes", "predicted", "least"] {
                assert!((sum(key) - total[key].as_f64().unwrap()).abs() <= 1e-9 * sum(key), "{key}: {total}");
            }
        }
        let kinds: Vec<&str> = found["phases"].as_array().unwrap().iter().filter_map(|p| p["kind"].as_str()).collect();
        assert_eq!(kinds, if family == "bert" { vec!["prefill"] } else { vec!["prefill", "decode"] });
        assert!(text.contains("formats were not searched") && page.contains("formats were not searched"));
    }
}

#[test]
fn what_rules_brought_is_named() {
    // Gains of norms are folded into float weights.
    let (_folder, m) = tiny("llama", "--quant none");
    let found = json(&format!("explain {m} --json"));
    let rules = found["kernels"].as_array().unwrap().iter().flat_map(|k| k["derivations"].as_array().unwrap());
    let rules: Vec<&Value> = rules.flat_map(|d| d["rules"].as_array().unwrap()).collect();
    assert!(rules.iter().any(|rule| *rule == "fold-gain"), "{rules:?}");
}

#[test]
fn buffers_alive_at_once_share_no_memory() {
    let (_folder, m) = tiny("llama", "");
    let found = json(&format!("explain {m} --json"));
    for step in found["memory"]["steps"].as_array().unwrap() {
        let buffers = step["buffers"].as_array().unwrap();
        let figure = |buffer: &Value, key: &str| buffer[key].as_u64().unwrap();
        for (i, a) in buffers.iter().enumerate() {
            for b in &buffers[i + 1..] {
                let meet = |x: (u64, u64), y: (u64, u64)| x.0 <= y.1 && y.0 <= x.1;
                let life = |x: &Value| (figure(x, "first"), figure(x, "last"));
                let place = |x: &Value| (figure(x, "offset"), figure(x, "offset") + figure(x, "bytes") - 1);
                assert!(!(meet(life(a), life(b)) && meet(place(a), place(b))), "{a} and {b}");
            }
        }
        let peak = step["alive"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap()).max();
        assert_eq!(peak, step["peak"].as_u64());
    }
}

#[test]
fn measured_columns_are_filled_on_request() {
    let (folder, m) = tiny("llama", "--workload prompt=64,generate=16");
    let page = folder.path().join("page.html");
    let found = json(&format!("explain {m} --measure -t 2 -r 2 --json --html {}", page.display()));
    for phase in found["phases"].as_array().unwrap() {
        assert!(phase["kernels"].as_array().unwrap().iter().all(|r| r["measured"].as_f64().unwrap() > 0.0), "{phase}");
        assert!(phase["total"]["measured"].is_number() && phase["misses"]["weighted"].is_number(), "{phase}");
    }
    stands_alone(&fs::read_to_string(page).unwrap());
}

#[test]
fn names_from_outside_stay_text() {
    let (folder, m) = tiny("llama", "");
    let hostile = "\"><script>alert('1')</script><img src=http://example.org/x onload=y>&";
    amend(Path::new(&m), |manifest| {
        manifest.model.architecture = hostile.into();
        manifest.program.kernels[0].name = hostile.into();
        manifest.program.buffers.iter_mut().for_each(|buffer| buffer.name = hostile.into());
        let provenance = &mut manifest.provenance;
        provenance.approximations.push(hostile.into());
        provenance.options.insert(hostile.into(), hostile.into());
        provenance.derivations.iter_mut().for_each(|d| d.rules.push(hostile.into()));
        let alternative = |error| Alternative { format: hostile.into(), seconds: 1.0 / (1.0 + error), bytes: 1, error };
        let alternatives = vec![alternative(0.0), alternative(0.5)];
        let decisions = vec![Decision { name: hostile.into(), picked: 1, alternatives }];
        provenance.decided = Some(Decided { max_kld: 1.0, decisions, ..Decided::default() });
    })
    .unwrap();
    let path = folder.path().join("page.html");
    done(&format!("explain {m} --html {}", path.display()));
    let page = fs::read_to_string(path).unwrap();
    let escaped = page.replace("http:&#x2f;&#x2f;", "").replace("&lt;", "").replace("src=", "").replace("onload=", "");
    stands_alone(&escaped);
    assert!(page.matches("&lt;script&gt;").count() >= 6, "the names are there");
}

#[test]
fn formats_within_a_budget_keep_their_alternatives() {
    let (folder, m) = tiny("llama", "");
    let alternative =
        |format: &str, seconds, bytes, error| Alternative { format: format.into(), seconds, bytes, error };
    let alternatives = vec![
        alternative("file", 3.0, 400, 0.0),
        alternative("q8_0", 2.0, 100, 0.001),
        alternative("q4_0", 1.0, 50, 0.1),
    ];
    let decision = Decision { name: "up".into(), picked: 1, alternatives };
    amend(Path::new(&m), |manifest| {
        let decisions = vec![decision.clone(), Decision { name: "down".into(), ..decision }];
        let decided = Decided {
            max_kld: 0.01,
            fixed_bytes: 7,
            measured: 0.002,
            predicted: 0.002,
            decisions,
            ..Decided::default()
        };
        manifest.provenance.decided = Some(decided);
    })
    .unwrap();
    let found = json(&format!("explain {m} --json"));
    let formats = &found["formats"];
    assert_eq!((&formats["chosen"]["seconds"], &formats["chosen"]["bytes"]), (&4.0.into(), &207.0.into()));
    let front = formats["front"].as_array().unwrap();
    let column = |key: &str| front.iter().map(|p| p[key].as_f64().unwrap()).collect::<Vec<f64>>();
    assert!(column("error").is_sorted() && column("seconds").iter().rev().is_sorted(), "{front:?}");
    assert_eq!((column("seconds")[0], *column("seconds").last().unwrap()), (6.0, 2.0));
    assert!(front.contains(&formats["chosen"]), "{formats}");
    let page = folder.path().join("page.html");
    done(&format!("explain {m} --html {}", page.display()));
    assert!(fs::read_to_string(page).unwrap().contains("Accuracy against time"));
    assert!(done(&format!("explain {m}")).contains("closer: file (3.00 s"));
}

#[test]
fn what_cannot_be_explained_is_refused() {
    let (folder, m) = tiny("llama", "");
    let count = || fs::read_dir(folder.path()).unwrap().count();
    let before = count();
    let nothing = folder.path().join("nothing");
    refused(&format!("explain {m} --html {}/page.html", nothing.display()), 5, "page.html");
    refused(
        &format!("explain {} --html {}/page.html", goldens("llama/config.json"), folder.path().display()),
        3,
        "config.json",
    );
    refused(&format!("explain {m} --machine {}", goldens("llama/config.json")), 3, "config.json");
    refused(&format!("explain {m} -t 0"), 2, "-t: expected at least 1");
    refused(&format!("explain {} --json", nothing.display()), 5, "nothing");
    assert_eq!(count(), before);
    let full = mansard(&format!("explain {m} --html /dev/full"));
    assert_eq!(full.status.code(), Some(5));
}

#[test]
fn costs_are_measured_kept_and_taken_again() {
    let (folder, m) = tiny("llama", "--calibrate-cost --context 128");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let costs = done(&format!("inspect {m} --costs"));
    fs::write(path("costs.json"), &costs).unwrap();
    let factors: Value = serde_json::from_str(&costs).unwrap();
    let kinds: Vec<&str> = factors.as_array().unwrap().iter().filter_map(|f| f["of"]["kind"].as_str()).collect();
    assert!(["contract", "attend", "rows"].iter().all(|kind| kinds.contains(kind)), "{costs}");
    let compile = |from: &str, out: &str| {
        let out = path(out);
        done(&format!("compile {} --step-tokens 128 --context 128 --costs {from} -o {out}", goldens("llama")));
        fs::read(out).unwrap()
    };
    let first = fs::read(&m).unwrap();
    assert!(compile(&m, "again.mansard") == first && compile(&path("costs.json"), "json.mansard") == first);
    let refuse =
        |more: &str, code, word| refused(&format!("compile {} -o {} {more}", goldens("llama"), path("no")), code, word);
    fs::write(path("bad.json"), costs.replacen("\"factor\": ", "\"factor\": -", 1)).unwrap();
    refuse(&format!("--costs {}", path("bad.json")), 3, "expected 0.001 to 1000");
    fs::write(path("half.json"), &costs[..costs.len() / 2]).unwrap();
    refuse(&format!("--costs {}", path("half.json")), 3, "half.json");
    refuse(&format!("--costs {} --calibrate-cost", path("costs.json")), 2, "--costs");
    let foreign = if cfg!(target_arch = "x86_64") { "aarch64+dotprod" } else { "x86-64-v3" };
    refuse(&format!("--calibrate-cost --target {foreign}"), 4, "cannot be timed here");
    assert!(!Path::new(&path("no")).exists());
}
