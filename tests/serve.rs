//! The server as its clients meet it: answers, streams, every refusal, keys, limits, signals. (Built as a test of the
//! `mansard` package; the client here is a socket and a few lines, so that malformed requests can be sent too.)

use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A tiny model with a vocabulary of bytes and a chat template.
fn model(folder: &Path, family: &str) -> String {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family);
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens.join(name), folder.join(name)).unwrap();
    }
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    fs::write(folder.join("config.json"), config.replace("\"eos_token_id\": 2", "\"eos_token_id\": 255")).unwrap();
    // GPT-2's letters for bytes; the last is the end of a text.
    let printed = |b: &u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let hidden = (0..256).filter(|b| !printed(b)).zip(256..).map(|(b, c)| (b, char::from_u32(c).unwrap()));
    let letters = (0..255u32).map(|b| hidden.clone().find(|h| h.0 == b).map_or(char::from_u32(b).unwrap(), |h| h.1));
    let vocab: serde_json::Map<String, Value> = letters.zip(0..).map(|(c, b)| (c.to_string(), json!(b))).collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let end = json!({"id": 255, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                     "normalized": false, "special": true});
    let tokenizer = json!({"version": "1.0", "added_tokens": [end], "pre_tokenizer": level, "decoder": level,
                           "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    let template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:";
    let config = json!({"chat_template": template, "eos_token": "<end>"});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    let artifact = folder.join("tiny.mansard").display().to_string();
    run(&["compile", folder.to_str().unwrap(), "-o", &artifact]);
    artifact
}

fn run(arguments: &[&str]) {
    let out = Command::new(env!("CARGO_BIN_EXE_mansard")).args(arguments).output().unwrap();
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A server that is killed with its test.
struct Server {
    child: Child,
    port: u16,
    artifact: String,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(arguments: &[&str]) -> Server {
        Server::start_of("llama", arguments)
    }

    fn start_of(family: &str, arguments: &[&str]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let artifact = model(folder.path(), family);
        let (child, port) = spawn(&artifact, arguments);
        Server { child, port, artifact, _folder: folder }
    }

    fn send(&self, request: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(request).unwrap();
        stream
    }

    fn get(&self, path: &str) -> Reply {
        Reply::read(
            self.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes()),
        )
    }

    fn post(&self, path: &str, body: &[u8], headers: &str) -> Reply {
        Reply::read(self.send(&post(path, body, headers)))
    }

    fn ask(&self, path: &str, body: Value) -> Reply {
        self.post(path, body.to_string().as_bytes(), JSON)
    }

    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// A figure of `/metrics`.
    fn figure(&self, name: &str) -> f64 {
        let page = self.get("/metrics").body;
        let line = page.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in {page}")).split(' ').nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(artifact: &str, arguments: &[&str]) -> (Child, u16) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
    command.args(["serve", artifact, "--port", "0", "-t", "2", "--log", "warn"]).args(arguments);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = String::new();
    let port = loop {
        let line = lines.next().unwrap_or_else(|| panic!("the server ended: {said}")).unwrap();
        said += &line;
        if let Some((_, port)) = line.split_once("on http://127.0.0.1:") {
            break port.trim().parse().unwrap();
        }
    };
    std::thread::spawn(move || lines.for_each(drop));
    (child, port)
}

const JSON: &str = "Content-Type: application/json\r\n";

fn post(path: &str, body: &[u8], headers: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn read(mut stream: TcpStream) -> Reply {
        let mut bytes = vec![];
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
        Reply { status, head: head.to_lowercase(), body: if chunked { unchunk(body) } else { body.into() } }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The text of the first choice.
    fn text(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.body);
        let choice = &self.json()["choices"][0];
        choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned()
    }

    /// Refused with this status, in OpenAI's form, with these words.
    fn refused(&self, status: u16, words: &[&str]) {
        assert_eq!(self.status, status, "{}", self.body);
        let error = &self.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(error["type"].is_string(), "{error}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}: {words:?}");
    }

    /// Events of a stream.
    fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

fn unchunk(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        out += &rest[..size];
        body = rest[size..].strip_prefix("\r\n").unwrap_or_default();
        if size == 0 {
            break;
        }
    }
    out
}

fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

fn chat(text: &str) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "seed": 1})
}

fn with(mut body: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

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
    assert!(server.figure("mansard_requests_total") >= 9.0 && server.figure("mansard_running_answers") == 0.0);
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
    completion(json!({"prompt": ["a", "b"]})).refused(400, &["one prompt"]);
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
    let body = with(greedy("Hello", 200), json!({"stream": true}));
    let mut stream = server.send(&post("/v1/completions", body.to_string().as_bytes(), JSON));
    let mut seen = vec![];
    while !String::from_utf8_lossy(&seen).contains("data: ") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    stream
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
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
    eventually("what nobody reads ends", || server.figure("mansard_running_answers") == 0.0);
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
    // Killed under load: a connection that ends, and an artifact as it was.
    let before = fs::read(&server.artifact).unwrap();
    let (child, port) = spawn(&server.artifact, &[]);
    (server.child, server.port) = (child, port);
    let mut stream = long(&server);
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let mut rest = String::new();
    assert!(stream.read_to_string(&mut rest).is_err() || !rest.contains("[DONE]"));
    assert!(fs::read(&server.artifact).unwrap() == before);
    let (child, port) = spawn(&server.artifact, &[]);
    (server.child, server.port) = (child, port);
    let text = server.ask("/v1/completions", greedy("Hi", 4)).text();
    // Another artifact in its place: the one that was opened is served on.
    let other = format!("{}.new", server.artifact);
    fs::write(&other, b"something else").unwrap();
    fs::rename(&other, &server.artifact).unwrap();
    assert_eq!(server.ask("/v1/completions", greedy("Hi", 4)).text(), text);
    assert_eq!(server.get("/health").json()["artifact_replaced"], true);
}

/// The published Python client, where `.ci/fetch-clients` has put it; in CI it may not be missing.
#[test]
fn the_openai_client_is_content() {
    let models = std::env::var_os("MANSARD_MODELS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../models"), std::path::PathBuf::from);
    let python = models.join("python/bin/python");
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing: run .ci/fetch-clients", python.display());
        let _ = std::io::stderr().write_all(b"skipped: OpenAI's Python client is not there (.ci/fetch-clients)\n");
        return;
    }
    let (generator, encoder) = (Server::start(&[]), Server::start_of("bert", &[]));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/openai_client.py");
    let urls = [&generator, &encoder].map(|server| format!("http://127.0.0.1:{}", server.port));
    let out = Command::new(python).arg(script).args([&urls[0], "tiny", &urls[1], "tiny"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }
}

/// 200 clients at once: whole answers, streams, some that leave in the middle, some that send nonsense. Every answer is that
/// of an idle server, nothing is left behind. `MANSARD_SOAK_SECONDS` makes it longer.
#[test]
fn a_crowd_gets_what_one_client_gets() {
    let seconds = std::env::var("MANSARD_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let server = Server::start(&["--positions", "2048", "--max-queue", "1000", "--max-running", "24"]);
    let asks: Vec<Value> = (0..12)
        .map(|i| {
            let prompt =
                "A common beginning of some length, as a system's words are. ".repeat(i % 4) + &"x".repeat(i + 1);
            json!({"model": "tiny", "prompt": prompt, "max_tokens": 2 + 7 * i % 40, "seed": i, "temperature": i % 3,
                   "ignore_eos": true, "n": 1 + i / 10, "top_p": 0.95})
        })
        .collect();
    let alone: Vec<Value> =
        asks.iter().map(|ask| server.ask("/v1/completions", ask.clone()).json()["choices"].clone()).collect();
    assert!(alone.iter().all(|choices| choices[0]["finish_reason"] == "length"));
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    };
    let until = Instant::now() + Duration::from_secs(seconds);
    let half = std::sync::Mutex::new(0);
    let answered = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(seconds) / 2);
            *half.lock().unwrap() = memory();
        });
        for client in 0..200 {
            let (server, asks, alone, answered) = (&server, &asks, &alone, &answered);
            scope.spawn(move || {
                let mut random = Random(client);
                while Instant::now() < until {
                    let which = random.below(asks.len());
                    let body = asks[which].to_string();
                    match random.below(8) {
                        0 => server
                            .post("/v1/completions", &body.as_bytes()[..random.below(body.len())], JSON)
                            .refused(400, &[]),
                        1 => {
                            let body = with(asks[which].clone(), json!({"stream": true})).to_string();
                            let mut stream = server.send(&post("/v1/completions", body.as_bytes(), JSON));
                            let _ = stream.read(&mut vec![0; 1 + random.below(2000)]);
                        }
                        2 => {
                            let events = server
                                .ask("/v1/completions", with(asks[which].clone(), json!({"stream": true})))
                                .events();
                            for (index, choice) in alone[which].as_array().unwrap().iter().enumerate() {
                                let of = |e: &&Value| e["choices"][0]["index"] == index;
                                let text: String =
                                    events.iter().filter(of).filter_map(|e| e["choices"][0]["text"].as_str()).collect();
                                assert_eq!(text, choice["text"].as_str().unwrap(), "{body}");
                            }
                            answered.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                        _ => {
                            let reply = server.post("/v1/completions", body.as_bytes(), JSON);
                            assert_eq!(reply.json()["choices"], alone[which], "{body}");
                            answered.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    eventually("everything ends", || server.figure("mansard_running_answers") == 0.0);
    eventually("nobody waits", || server.figure("mansard_waiting_answers") == 0.0);
    // What is left are the beginnings that are kept: of 64 or of 128 tokens.
    let (taken, kept) = (server.figure("mansard_cache_blocks_taken"), server.figure("mansard_prefixes"));
    assert!(taken >= kept && taken <= 2.0 * kept, "{taken} cache blocks for {kept} pieces");
    let (half, whole) = (half.into_inner().unwrap(), memory());
    let slow = server.figure("mansard_time_per_output_token_seconds_sum")
        / server.figure("mansard_time_per_output_token_seconds_count");
    println!("{} answers, {half} kB then {whole} kB, {slow:.4} s a token", answered.into_inner());
    assert!(whole < half + half / 4 + 16_384, "{half} kB at half-time, {whole} kB at the end");
}
