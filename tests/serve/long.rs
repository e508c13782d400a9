//! Answers that go on and on, are guessed ahead, or begin with their prompts.

use crate::client::*;
use serde_json::json;
use std::io::Read;

#[test]
fn several_prompts_and_their_log_probabilities() {
    let server = Server::start(&[]);
    let ask = |fields| server.ask("/v1/completions", with(greedy("Hello", 8), fields));
    let text = |prompt: &str| ask(json!({"prompt": prompt})).text();
    let several = ask(json!({"prompt": ["Hello", "Goodbye"], "n": 2})).json();
    let texts: Vec<&str> = several["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    let (hello, goodbye) = (text("Hello"), text("Goodbye"));
    assert_eq!(texts, [&hello, &hello, &goodbye, &goodbye]);
    assert_eq!((&several["usage"]["prompt_tokens"], &several["usage"]["completion_tokens"]), (&json!(12), &json!(32)));
    assert_eq!(several["choices"][3]["index"], 3);
    let streamed = ask(json!({"prompt": [[39, 68], [39, 69]], "stream": true, "echo": true})).events();
    for (index, prompt) in [(0, json!([39, 68])), (1, json!([39, 69]))] {
        let of = streamed.iter().filter(|e| e["choices"][0]["index"] == index);
        let all: String = of.filter_map(|e| e["choices"][0]["text"].as_str()).collect();
        assert_eq!(all, ask(json!({"prompt": prompt, "echo": true})).text());
    }
    assert_eq!(ask(json!({"echo": true})).text(), format!("Hello{hello}"));

    // What a text was worth when it was written, it is worth when it is read.
    let letters = json!({"type": "regex", "regex": "[a-z]{8}"});
    let written = ask(json!({"logprobs": 2, "response_format": letters})).json()["choices"][0].clone();
    let whole = format!("Hello{}", written["text"].as_str().unwrap());
    let read = ask(json!({"prompt": &whole, "echo": true, "logprobs": 2, "max_tokens": 0})).json();
    assert_eq!(read["usage"]["completion_tokens"], 0);
    let read = &read["choices"][0];
    assert_eq!((&read["text"], &read["finish_reason"]), (&json!(whole), &json!("length")));
    let told = |choice: &serde_json::Value| choice["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    let (written, told) = (told(&written), told(read));
    assert!(told.len() == 13 && told[0].is_null(), "{told:?}");
    for (one, other) in written.iter().zip(&told[5..]) {
        assert!((one.as_f64().unwrap() - other.as_f64().unwrap()).abs() < 1e-3, "{written:?}, {told:?}");
    }
    assert_eq!(read["logprobs"]["text_offset"], json!((0..13).collect::<Vec<_>>()));
    assert!(read["logprobs"]["top_logprobs"][1].as_object().unwrap().len() == 2);
    // Without any log probability, too; and prompts of several steps.
    assert_eq!(ask(json!({"prompt": "x".repeat(200), "echo": true, "max_tokens": 0})).text(), "x".repeat(200));
    let long = ask(json!({"prompt": "xy".repeat(100), "echo": true, "logprobs": 0, "max_tokens": 3})).json();
    assert_eq!(long["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 203);
}

#[test]
fn a_draft_model_changes_nothing() {
    let plain = Server::start(&[]);
    let server = Server::start(&["--draft", &plain.artifact]);
    for (prompt, temperature) in [("Hello", 0), ("Once upon a time", 1)] {
        let ask = with(greedy(prompt, 100), json!({"temperature": temperature, "seed": 4, "n": 2}));
        let of = |server: &Server| server.ask("/v1/completions", ask.clone()).json()["choices"].clone();
        assert_eq!(of(&plain), of(&server));
    }
    assert!(server.figure("mansard_draft_cache_blocks") > 0.0);
    let encoder = Server::start_of("bert", &[]);
    crate::refuses_to_start(&[&plain.artifact, "--draft", &encoder.artifact], 2, "found an encoder");
    crate::refuses_to_start(&[&plain.artifact, "--draft", "/nonexistent"], 5, "/nonexistent");
}

/// A context of 256 that moves on, seen in part; what waits hears that it is not forgotten, what is not read harms nobody.
#[test]
fn answers_without_an_end() {
    let arguments = ["--context-shift", "--window", "64", "--max-tokens", "1000000", "--max-running", "1"];
    let server = Server::start(&[&arguments[..], &["--keep-alive-seconds", "1"]].concat());
    let answer = server.ask("/v1/completions", greedy("Hello", 700)).json();
    assert_eq!(answer["usage"]["completion_tokens"], 700);
    let of = |tokens: usize| with(greedy("Hello", tokens), json!({"stream": true})).to_string();
    let endless = server.send(&post("/v1/completions", of(1_000_000).as_bytes(), JSON));
    eventually("it runs", || server.figure("mansard_running_answers") == 1.0);
    let mut waits = server.send(&post("/v1/completions", of(5).as_bytes(), JSON));
    let mut heard = vec![];
    while !String::from_utf8_lossy(&heard).contains(": on its way") {
        let mut bytes = [0; 64];
        let count = waits.read(&mut bytes).unwrap();
        assert!(count > 0);
        heard.extend(&bytes[..count]);
    }
    assert_eq!(server.get("/health").status, 200);
    drop(endless);
    let mut rest = String::new();
    waits.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    let artifact = &server.artifact;
    crate::refuses_to_start(&[artifact, "--window", "63"], 2, "window of at least 64 positions");
}
