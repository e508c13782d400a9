//! Two hundred clients at once.

use crate::client::*;
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }
}

/// The least bound of a histogram that this share of its values is below.
fn quantile(server: &Server, name: &str, share: f64) -> String {
    let page = server.get("/metrics").body;
    let buckets = page.lines().filter_map(|line| line.strip_prefix(&format!("{name}_bucket{{le=\"")));
    let buckets: Vec<(&str, f64)> =
        buckets.filter_map(|line| line.split_once("\"} ")).map(|(le, count)| (le, count.parse().unwrap())).collect();
    let all = buckets.last().unwrap().1;
    buckets.iter().find(|(_, count)| *count >= share * all).unwrap().0.to_owned()
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
    let [median, slowest] = [0.5, 0.99].map(|share| quantile(&server, "mansard_time_per_output_token_seconds", share));
    println!(
        "{} answers, {half} kB then {whole} kB, between tokens up to {median} s, 99 of 100 times up to {slowest} s",
        answered.into_inner()
    );
    assert!(whole < half + half / 4 + 16_384, "{half} kB at half-time, {whole} kB at the end");
}
