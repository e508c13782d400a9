//! A server over a tiny model, and a client of a socket and a few lines, so that malformed requests can be sent too.

#[path = "model.rs"]
mod tiny;

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub use tiny::model;

/// A server that is killed with its test.
pub struct Server {
    pub child: Child,
    pub port: u16,
    pub artifact: String,
    _folder: tempfile::TempDir,
}

impl Server {
    pub fn start(arguments: &[&str]) -> Server {
        Server::start_of("llama", arguments)
    }

    pub fn start_of(family: &str, arguments: &[&str]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let artifact = model(folder.path(), family);
        let (child, port) = spawn(&artifact, arguments);
        Server { child, port, artifact, _folder: folder }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn send(&self, request: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(request).unwrap();
        stream
    }

    pub fn get(&self, path: &str) -> Reply {
        Reply::read(
            self.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes()),
        )
    }

    pub fn post(&self, path: &str, body: &[u8], headers: &str) -> Reply {
        Reply::read(self.send(&post(path, body, headers)))
    }

    pub fn ask(&self, path: &str, body: Value) -> Reply {
        self.post(path, body.to_string().as_bytes(), JSON)
    }

    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// A figure of `/metrics`.
    pub fn figure(&self, name: &str) -> f64 {
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

pub fn spawn(artifact: &str, arguments: &[&str]) -> (Child, u16) {
    spawn_at(artifact, "0", arguments)
}

pub fn spawn_at(artifact: &str, port: &str, arguments: &[&str]) -> (Child, u16) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mansard"));
    command.args(["serve", artifact, "--port", port, "-t", "2", "--log", "warn"]).args(arguments);
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

pub const JSON: &str = "Content-Type: application/json\r\n";

pub fn post(path: &str, body: &[u8], headers: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn read(mut stream: TcpStream) -> Reply {
        let mut bytes = vec![];
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
        Reply { status, head: head.to_lowercase(), body: if chunked { unchunk(body) } else { body.into() } }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The text of the first choice.
    pub fn text(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.body);
        let choice = &self.json()["choices"][0];
        choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned()
    }

    /// Refused with this status, in OpenAI's form, with these words.
    pub fn refused(&self, status: u16, words: &[&str]) {
        assert_eq!(self.status, status, "{}", self.body);
        let error = &self.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(error["type"].is_string(), "{error}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}: {words:?}");
    }

    /// Events of a stream.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

pub fn unchunk(mut body: &str) -> String {
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

pub fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

pub fn chat(text: &str) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "seed": 1})
}

pub fn with(mut body: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
