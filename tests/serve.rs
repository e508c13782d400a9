//! The server as its clients meet it: answers, streams, every refusal, keys, limits, signals. (Built as a test of the
//! `mansard` package.)

#[path = "serve/client.rs"]
mod client;
#[path = "serve/crowd.rs"]
mod crowd;
#[path = "serve/long.rs"]
mod long;

use client::*;
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn answers_and_streams() {
    let server = Server::start(&[]);
    assert_eq!(server.get("/health").json(), json!({"status": "ok", "artifact_replaced": false}));
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "tiny");
    assert_eq!(server.get("/v1/models/tiny").json()["context"], 256);
    let page = server.get("/");
    assert!(
        page.body.starts_with("<!doctype html>") && page.head.contains("content-security-policy: default-src 'none'")
    );
    // Nothing comes from elsewhere: the one address in it names the form of its own picture.
    assert_eq!((page.body.matches("://").count(), page.body.matches("http://www.w3.org/2000/svg").count()), (1, 1));

    let whole = server.ask("/v1/completions", greedy("Hello", 20));
    assert_eq!(whole.text(), server.ask("/v1/completions", greedy("Hello", 20)).text());
    let usage = &whole.json()["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(5), &json!(20)));
    assert_eq!(whole.json()["choices"][0]["finish_reason"], "length");
    let ids = with(greedy("", 20), json!({"prompt": [39, 68]}));
    assert_eq!(server.ask("/v1/completions", ids).json()["usage"]["prompt_tokens"], 2);

    // Streams say the same, and count where asked to.
    let streamed = with(greedy("Hello", 20), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let streamed = server.ask("/v1/completions", streamed);
    assert!(streamed.head.contains("text/event-stream") && streamed.body.ends_with("data: [DONE]\n\n"));
    let events = streamed.events();
    let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, whole.text());
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 20);
    let chat_whole = server.ask("/v1/chat/completions", chat("Hello")).text();
    let events = server.ask("/v1/chat/completions", with(chat("Hello"), json!({"stream": true}))).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, chat_whole);

    // Several choices: the first is what one alone is.
    let four = server.ask("/v1/chat/completions", with(chat("Hello"), json!({"n": 4}))).json();
    let texts: Vec<&str> =
        four["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap()).collect();
    assert!(
        texts.len() == 4 && texts[0] == chat_whole && texts[1..].iter().any(|text| *text != chat_whole),
        "{texts:?}"
    );

    // A stop string ends a text before it.
    let all = whole.text();
    let cut: String = all.chars().skip(4).take(2).collect();
    let stopped = server.ask("/v1/completions", with(greedy("Hello", 20), json!({"stop": [cut]})));
    assert_eq!(stopped.text(), all.split(&cut).next().unwrap());
    assert_eq!(stopped.json()["choices"][0]["finish_reason"], "stop");

    let told =
        server.ask("/v1/chat/completions", with(chat("Hi"), json!({"logprobs": true, "top_logprobs": 3}))).json();
    let tokens = told["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(
        tokens.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 3 && t["logprob"].as_f64().unwrap() < 0.0)
    );
    let told = server.ask("/v1/completions", with(greedy("Hi", 5), json!({"logprobs": 2}))).json();
    assert_eq!(told["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 5);
    assert!(server.figure("mansard_requests_total") >= 9.0);
    // Figures follow a step's answers.
    eventually("all have ended", || server.figure("mansard_running_answers") == 0.0);
    assert!(server.figure("mansard_http_responses_total{route=\"/v1/completions\",status=\"200\"}") >= 5.0);
}

#[test]
fn answers_keep_to_a_format() {
    let server = Server::start(&[]);
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}, "word": {"enum": ["yes", "no"]}},
                        "required": ["ok", "word"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}});
    for seed in 0..5 {
        let ask = with(
            chat("Answer"),
            json!({"response_format": format, "max_tokens": 200, "seed": seed, "n": 2,
                                              "logit_bias": {"220": -100, "32": -100, "9": -100, "10": -100, "13": -100}}),
        );
        let reply = server.ask("/v1/chat/completions", ask).json();
        for choice in reply["choices"].as_array().unwrap() {
            let found: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
            assert!(found["ok"].is_boolean() && ["yes", "no"].contains(&found["word"].as_str().unwrap()), "{found}");
        }
    }
    let regex = json!({"response_format": {"type": "regex", "regex": "[0-9]{3}-[a-f]{2}"}});
    let text = server.ask("/v1/chat/completions", with(chat("Answer"), regex)).text();
    assert!(text.len() == 6 && text.as_bytes()[3] == b'-' && text[..3].parse::<u32>().is_ok(), "{text}");
    let bad = |format: Value| server.ask("/v1/chat/completions", with(chat("x"), json!({"response_format": format})));
    let never =
        json!({"type": "json_schema", "json_schema": {"schema": {"type": "integer", "minimum": 3, "maximum": 2}}});
    bad(never).refused(400, &[]);
    bad(json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}})).refused(400, &[]);
    bad(json!({"type": "xml"})).refused(400, &["xml"]);
    bad(json!({"type": "regex", "regex": "("})).refused(400, &[]);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let server = Server::start(&["--max-body", "20000", "--max-tokens", "100"]);
    let completion = |fields: Value| server.ask("/v1/completions", with(greedy("Hi", 4), fields));
    completion(json!({"model": "other"})).refused(404, &["`tiny`", "`other`"]);
    completion(json!({"prompt": ""})).refused(400, &["at least one token"]);
    completion(json!({"prompt": "x".repeat(300)})).refused(400, &["context of 256 tokens, found 300"]);
    completion(json!({"prompt": vec!["a"; 129]})).refused(400, &["1 to 128 prompts, found 129"]);
    completion(json!({"prompt": []})).refused(400, &["at least one token"]);
    completion(json!({"prompt": ["a", ""]})).refused(400, &["at least one token"]);
    completion(json!({"prompt": [1, 999]})).refused(400, &["tokens below 256, found 999"]);
    completion(json!({"max_tokens": 0})).refused(400, &["1 to 100 tokens, found 0"]);
    completion(json!({"max_tokens": 101})).refused(400, &["found 101"]);
    completion(json!({"temperature": -1})).refused(400, &["temperature"]);
    completion(json!({"top_p": 0})).refused(400, &["top-p"]);
    completion(json!({"n": 9})).refused(400, &["1 to 8 choices, found 9"]);
    completion(json!({"stop": [""]})).refused(400, &["stop strings"]);
    completion(json!({"stop": vec!["x"; 17]})).refused(400, &["stop strings"]);
    completion(json!({"logit_bias": {"999": 1}})).refused(400, &["token ids below 256"]);
    completion(json!({"logprobs": 21})).refused(400, &["at most 20"]);
    completion(json!({"surprise": 1})).refused(400, &["unknown field `surprise`"]);
    completion(json!({"suffix": "x"})).refused(400, &["`suffix` is not supported"]);
    completion(json!({"messages": []})).refused(400, &["`messages`"]);
    let chat = |fields: Value| server.ask("/v1/chat/completions", with(chat("Hi"), fields));
    chat(json!({"messages": []})).refused(400, &["at least one message"]);
    chat(json!({"messages": [{"role": "cat", "content": "x"}]})).refused(400, &["`cat`"]);
    chat(json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})).refused(400, &["type `text`"]);
    chat(json!({"tools": [{"type": "function"}]})).refused(400, &["`tools` is not supported"]);
    chat(json!({"echo": true})).refused(400, &["`echo` is of completions"]);
    chat(json!({"top_logprobs": 3})).refused(400, &["logprobs"]);
    chat(json!({"tools": [], "user": "me", "store": false})).text();

    let raw = |body: &[u8]| server.post("/v1/completions", body, JSON);
    raw(b"{").refused(400, &["body"]);
    raw(b"").refused(400, &["body"]);
    raw(b"[1, 2]").refused(400, &["body"]);
    raw(&[b"{\"model\": \"tiny\", \"stop\": \"", &[0xff, 0xfe][..], b"\"}"].concat()).refused(400, &["UTF-8"]);
    raw(&[b"{\"model\": \"tiny\", \"metadata\": ".to_vec(), b"[".repeat(10_000)].concat()).refused(400, &["recursion"]);
    raw(&vec![b' '; 30_000]).refused(413, &["at most 20000 bytes"]);
    let chunked =
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
                    Transfer-Encoding: chunked\r\n\r\n7000\r\n";
    Reply::read(server.send(&[&chunked[..], &[b' '; 0x7000], b"\r\n0\r\n\r\n"].concat())).refused(413, &["20000"]);
    server.post("/v1/completions", b"{}", "Content-Type: text/plain\r\n").refused(415, &["application/json"]);
    server.post("/v1/embeddings", b"{\"model\": \"tiny\", \"input\": \"x\"}", JSON).refused(400, &["encoder"]);
    server.get("/v1/completions").refused(405, &["GET"]);
    server.get("/etc/passwd").refused(404, &["/v1/chat/completions"]);
    server.get("/v1/models/../../etc/passwd").refused(404, &[]);
    let host = b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    Reply::read(server.send(host)).refused(403, &["Host"]);
    assert_eq!(Reply::read(server.send(b"nonsense\r\n\r\n")).status, 400);
    assert_eq!(server.ask("/v1/completions", greedy("Hi", 4)).json()["usage"]["completion_tokens"], 4);
}

#[test]
fn keys_are_asked_for() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    fs::write(&file, "# ours\nsecret-one\n\nsecret-two\n").unwrap();
    let keys = file.to_str().unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let other = tempfile::tempdir().unwrap();
    let artifact = model(other.path(), "llama");
    refuses_to_start(&[&artifact, "--api-key-file", keys], 2, "only its owner");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let server = Server::start(&["--api-key-file", keys]);
    refuses_to_start(&[&artifact, "--port", &server.port.to_string()], 5, "in use");
    refuses_to_start(&[&artifact, "--api-key-file", "/nonexistent"], 5, "/nonexistent");
    let body = greedy("Hi", 4).to_string();
    server.post("/v1/completions", body.as_bytes(), JSON).refused(401, &["API key"]);
    let bearer = |key: &str| format!("{JSON}Authorization: Bearer {key}\r\n");
    server.post("/v1/completions", body.as_bytes(), &bearer("secret-on")).refused(401, &["API key"]);
    server.get("/metrics").refused(401, &[]);
    assert_eq!((server.get("/health").status, server.get("/").status), (200, 200));
    for key in ["secret-one", "secret-two"] {
        server.post("/v1/completions", body.as_bytes(), &bearer(key)).text();
    }
}

fn refuses_to_start(arguments: &[&str], code: i32, word: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
    let out = command.arg("serve").args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{said}");
    assert!(said.contains(word) && said.matches("error:").count() == 1, "{said}");
}

/// A long answer, and when the first of it has come.
fn long(server: &Server) -> TcpStream {
    let body = with(greedy("Hello", 200), json!({"stream": true, "n": 8}));
    let mut stream = server.send(&post("/v1/completions", body.to_string().as_bytes(), JSON));
    let mut seen = vec![];
    while !String::from_utf8_lossy(&seen).contains("data: ") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    stream
}

#[test]
fn limits_of_time_and_number() {
    let server =
        Server::start(&["--max-queue", "1", "--max-running", "1", "--read-seconds", "1", "--max-connections", "40"]);
    // Slow clients are cut off, in the head and in the body, and harm nobody.
    let slow = [
        server.send(b"POST /v1/completions HTTP/1.1\r\nHost: lo"),
        server.send(&[&post("/v1/completions", &[b' '; 99], JSON)[..150]].concat()),
    ];
    server.ask("/v1/completions", greedy("Hi", 4)).text();
    for mut stream in slow {
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.is_empty() || said.contains(" 408 "), "{said}");
    }
    // A full queue says when to come back; whoever leaves makes room.
    let mut open = vec![];
    let refused = (0..30).find_map(|_| {
        let body = with(greedy("Hello", 200), json!({"n": 8, "stream": true}));
        let mut stream = server.send(&post("/v1/completions", body.to_string().as_bytes(), JSON));
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        open.push(stream);
        (&head == b"HTTP/1.1 429").then(|| open.pop().unwrap())
    });
    let mut rest = String::new();
    refused.expect("a full queue").read_to_string(&mut rest).unwrap();
    assert!(rest.to_lowercase().contains("retry-after: ") && rest.contains("queue_full"), "{rest}");
    drop(open);
    let left = || server.figure("mansard_running_answers") + server.figure("mansard_queue_requests");
    eventually("what nobody reads ends", || left() == 0.0);
    server.ask("/v1/completions", greedy("Hi", 4)).text();
}

#[test]
fn signals_end_it_in_order() {
    let mut server = Server::start(&["--drain-seconds", "20"]);
    let mut stream = long(&server);
    server.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    assert!(TcpStream::connect(("127.0.0.1", server.port)).is_err());
    // Killed under load: connections that end, no answer that looks whole, and an artifact as it was.
    let before = fs::read(&server.artifact).unwrap();
    let cut_off = (0..5).any(|_| {
        let (child, port) = spawn(&server.artifact, &[]);
        (server.child, server.port) = (child, port);
        let mut stream = long(&server);
        let body = with(greedy("Hello", 200), json!({"n": 8})).to_string();
        let whole: Vec<TcpStream> =
            (0..8).map(|_| server.send(&post("/v1/completions", body.as_bytes(), JSON))).collect();
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        let mut rest = String::new();
        for mut stream in whole {
            let mut text = String::new();
            let ended = stream.read_to_string(&mut text);
            assert!(ended.is_err() || text.is_empty() || text.ends_with('}'), "{text}");
        }
        // On a busy machine the answer may have been done before.
        stream.read_to_string(&mut rest).is_err() || !rest.contains("[DONE]")
    });
    assert!(cut_off && fs::read(&server.artifact).unwrap() == before);
    // The same port can be had at once.
    (server.child, server.port) = spawn_at(&server.artifact, &server.port.to_string(), &[]);
    let text = server.ask("/v1/completions", greedy("Hi", 4)).text();
    // Another artifact in its place: the one that was opened is served on.
    let other = format!("{}.new", server.artifact);
    fs::write(&other, b"something else").unwrap();
    fs::rename(&other, &server.artifact).unwrap();
    assert_eq!(server.ask("/v1/completions", greedy("Hi", 4)).text(), text);
    assert_eq!(server.get("/health").json()["artifact_replaced"], true);
}

/// Python with the packages of `.ci/fetch-clients`, which in CI may not be missing.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/python/bin/python");
    if python.exists() {
        return Some(python);
    }
    assert!(std::env::var_os("CI").is_none(), "{} is missing: run .ci/fetch-clients", python.display());
    let _ = std::io::stderr().write_all(b"skipped: models/python is not there (.ci/fetch-clients)\n");
    None
}

fn script(python: &Path, name: &str, arguments: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(name);
    let out = Command::new(python).arg(script).args(arguments).output().unwrap();
    assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn the_openai_client_is_content() {
    let Some(python) = python() else { return };
    let (generator, encoder) = (Server::start(&[]), Server::start_of("bert", &[]));
    script(&python, "openai_client.py", &[&generator.url(), "tiny", &encoder.url(), "tiny"]);
}

#[test]
fn the_chat_page_converses() {
    let Some(python) = python() else { return };
    let chromium = ["/usr/bin/chromium", "/usr/bin/chromium-browser"].into_iter().find(|path| Path::new(path).exists());
    assert!(chromium.is_some() || std::env::var_os("CI").is_none(), "chromium is missing: run .ci/setup");
    let Some(chromium) = chromium else { return };
    script(&python, "chat_page.py", &[&Server::start(&[]).url(), "tiny", chromium]);
}
