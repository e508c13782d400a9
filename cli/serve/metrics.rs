//! Figures -> Prometheus' text format.

use super::app::{App, Work};
use mansard_runtime::{Histogram, Stats};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Figures of HTTP requests.
#[derive(Default)]
pub struct Http {
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// Connections now.
    pub connections: AtomicU64,
}

impl Http {
    /// Counts a response.
    pub fn count(&self, route: &'static str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        *responses.entry((route, status)).or_default() += 1;
    }
}

/// The page.
pub fn page(app: &App) -> String {
    let mut out = Page(String::new());
    out.head("mansard_http_responses_total", "counter", "responses by route and status");
    for ((route, status), count) in app.http.responses.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        out.line(&format!("mansard_http_responses_total{{route=\"{route}\",status=\"{status}\"}}"), *count as f64);
    }
    let connections = app.http.connections.load(Ordering::Relaxed);
    out.one("mansard_http_connections", "gauge", "connections now", connections as f64);
    if let Work::Generate(service) = &app.work {
        let service = service.lock().unwrap_or_else(PoisonError::into_inner);
        out.one("mansard_queue_requests", "gauge", "requests that wait", service.waiting() as f64);
        out.stats(&service.stats());
    }
    out.0
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.put(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn line(&mut self, name: &str, value: f64) {
        self.put(&format!("{name} {value}\n"));
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        self.line(name, value);
    }

    fn put(&mut self, text: &str) {
        // A string takes all that is written to it.
        let _ = self.0.write_str(text);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let mut below = 0;
        let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".into()]);
        for (bound, count) in bounds.zip(&histogram.counts) {
            below += count;
            self.line(&format!("{name}_bucket{{le=\"{bound}\"}}"), below as f64);
        }
        self.line(&format!("{name}_sum"), histogram.sum);
        self.line(&format!("{name}_count"), below as f64);
    }

    fn stats(&mut self, s: &Stats) {
        let gauges = [
            ("mansard_running_answers", "answers on their way", s.running as f64),
            (
                "mansard_waiting_answers",
                "requests and preempted answers that wait for a place in steps",
                s.waiting as f64,
            ),
            ("mansard_cache_blocks_taken", "cache blocks of 64 positions in use", s.blocks_taken as f64),
            ("mansard_cache_blocks", "cache blocks of 64 positions", s.blocks_total as f64),
            ("mansard_draft_cache_blocks_taken", "cache blocks of the draft model in use", s.draft_blocks_taken as f64),
            ("mansard_draft_cache_blocks", "cache blocks of the draft model", s.draft_blocks_total as f64),
            ("mansard_prefixes", "pieces of prompts kept for later prompts", s.prefixes as f64),
        ];
        let counters = [
            ("mansard_steps_total", "steps", s.steps),
            ("mansard_draft_steps_total", "steps of the draft model", s.draft_steps),
            ("mansard_requests_total", "requests taken in", s.requests),
            ("mansard_requests_cancelled_total", "requests whose clients left", s.cancelled),
            ("mansard_requests_failed_total", "requests that failed", s.failed),
            ("mansard_prompt_tokens_total", "tokens of prompts", s.prompt_tokens),
            ("mansard_prefix_hit_tokens_total", "tokens of prompts that others had computed", s.cached_tokens),
            ("mansard_generated_tokens_total", "tokens generated", s.generated_tokens),
            ("mansard_preemptions_total", "answers that lost their cache blocks", s.preempted),
            ("mansard_evictions_total", "pieces of prompts let go", s.evicted),
            ("mansard_drafted_tokens_total", "tokens guessed", s.drafted),
            ("mansard_accepted_tokens_total", "guessed tokens that the model said too", s.accepted),
        ];
        let histograms = [
            ("mansard_step_sequences", "sequences of a step", &s.step_sequences),
            ("mansard_step_tokens", "tokens of a step", &s.step_tokens),
            ("mansard_step_seconds", "time of a step", &s.step_seconds),
            ("mansard_time_to_first_token_seconds", "from arrival to the first token", &s.first_token_seconds),
            ("mansard_time_per_output_token_seconds", "from one token to the next", &s.next_token_seconds),
            ("mansard_request_seconds", "from arrival to the end", &s.request_seconds),
        ];
        gauges.iter().for_each(|(name, help, value)| self.one(name, "gauge", help, *value));
        counters.iter().for_each(|(name, help, value)| self.one(name, "counter", help, *value as f64));
        histograms.iter().for_each(|(name, help, value)| self.histogram(name, help, value));
    }
}
