//! Batches and services over the model that counts: text, stop strings, order, bounds, cancellation.
#![cfg(target_arch = "x86_64")]

mod support;

use mansard_ir::Result;
use mansard_runtime::{
    BatchOptions, Batcher, Constraint, EngineOptions, Event, Finish, GenerateOptions, Logprobs, Model, Refused,
    Request, RequestId, SamplerOptions, Service, ServiceOptions, Sink,
};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use support::counting_parts;

fn batcher(options: &BatchOptions) -> Batcher {
    let model = Model::open(counting_parts().write().path()).unwrap();
    let engine = EngineOptions { threads: Some(1), positions: Some(320), ..EngineOptions::default() };
    Batcher::new(model.engine(&engine).unwrap(), Some(model.tokens().unwrap().clone()), options).unwrap()
}

fn counting(prompt: &[u32], max_tokens: usize) -> Request {
    let stop_tokens = Some(vec![]);
    let sampler = SamplerOptions::greedy();
    Request::new(prompt.to_vec(), GenerateOptions { max_tokens, sampler, stop_tokens, shift: None })
}

fn channel_sink() -> (Sink, Receiver<Event>) {
    let (sender, receiver) = channel();
    (Box::new(move |event| sender.send(event).is_ok()), receiver)
}

fn submit(batcher: &mut Batcher, request: Request) -> (RequestId, Receiver<Event>) {
    let (sink, events) = channel_sink();
    (batcher.submit(request, sink).unwrap(), events)
}

/// Text, tokens and ends of a request that is done.
fn outcome(events: &Receiver<Event>) -> (String, Vec<u32>, Vec<Finish>) {
    let (mut all, mut tokens, mut ends) = (String::new(), vec![], vec![]);
    for event in events.try_iter() {
        match event {
            Event::Token { token, text, .. } => {
                all += &text;
                tokens.push(token);
            }
            Event::Done { finish, text, .. } => {
                all += &text;
                ends.push(finish);
            }
            Event::Failed(error) => panic!("{error}"),
            Event::Prompt(_) => {}
        }
    }
    (all, tokens, ends)
}

fn run(batcher: &mut Batcher, request: Request) -> (String, Vec<u32>, Vec<Finish>) {
    let (_, events) = submit(batcher, request);
    while batcher.step() {}
    outcome(&events)
}

#[test]
fn answers_end_for_their_reasons() {
    let mut batcher = batcher(&BatchOptions::default());
    let (text, tokens, ends) = run(&mut batcher, counting(&[1, 2, 3], 3));
    assert_eq!((text.trim(), &tokens[..], &ends[..]), ("four five six", &[4, 5, 6][..], &[Finish::MaxTokens][..]));
    let mut request = counting(&[3], 20);
    request.options.stop_tokens = None;
    assert_eq!(run(&mut batcher, request).2, [Finish::StopToken(0)]);
    let stop = |stop: &[&str]| Request { stop: stop.iter().map(|s| s.to_string()).collect(), ..counting(&[3], 20) };
    let (text, tokens, ends) = run(&mut batcher, stop(&["six sev", "nine"]));
    assert_eq!((text.trim(), &tokens[..], &ends[..]), ("four five", &[4, 5, 6, 7][..], &[Finish::StopText][..]));
    // Beyond what the caches hold.
    let (_, tokens, ends) = run(&mut batcher, counting(&[1; 250], 500));
    assert_eq!((tokens.len(), &ends[..]), (7, &[Finish::Context][..]));
    batcher.forget();
    assert_eq!(batcher.stats().blocks_taken, 0);
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let mut batcher = batcher(&BatchOptions::default());
    let hot = SamplerOptions { temperature: -1.0, ..SamplerOptions::plain() };
    let refusals = [
        ("at least one token, found none", counting(&[], 1)),
        ("at most 256 tokens, found 257", counting(&[1; 257], 1)),
        ("tokens below 8, found 8", counting(&[8], 1)),
        ("at least one token to generate", counting(&[1], 0)),
        ("1 to 4 choices, found 5", Request { choices: 5, ..counting(&[1], 1) }),
        ("found an empty one", Request { stop: vec![String::new()], ..counting(&[1], 1) }),
        ("temperature", Request::new(vec![1], GenerateOptions { sampler: hot, ..GenerateOptions::default() })),
    ];
    for (expected, request) in refusals {
        let error = batcher.submit(request, Box::new(|_| true)).unwrap_err();
        assert!(error.message().contains(expected) && error.exit_code() == 2, "expected {expected:?} in {error}");
    }
    assert!(!batcher.step());
    let none = BatchOptions { running: Some(0), ..BatchOptions::default() };
    let model = Model::open(counting_parts().write().path()).unwrap();
    assert!(Batcher::new(model.engine(&EngineOptions::default()).unwrap(), None, &none).is_err());
}

#[test]
fn choices_share_their_prompt() {
    let mut batcher = batcher(&BatchOptions::default());
    let request = Request { choices: 3, ..counting(&[1; 66], 40) };
    let (_, events) = submit(&mut batcher, request);
    // The prompt's pieces of 16 tokens, then one token of each.
    for _ in 0..8 {
        batcher.step();
    }
    assert_eq!(batcher.stats().blocks_taken, 1 + 3, "the whole cache block is shared, the other is each's own");
    while batcher.step() {}
    let (_, tokens, ends) = outcome(&events);
    assert_eq!((tokens.len(), ends), (120, vec![Finish::MaxTokens; 3]));
}

/// Only every second token.
struct Even([u32; 1]);

impl Constraint for Even {
    fn allowed(&mut self) -> Result<&[u32]> {
        Ok(&self.0)
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        assert_eq!(token % 2, 0);
        Ok(())
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Even(self.0))
    }
}

#[test]
fn constraints_and_log_probabilities() {
    let mut batcher = batcher(&BatchOptions::default());
    let even: Box<dyn Constraint> = Box::new(Even([0b0101_0101]));
    let request = Request { constraint: Some(even), choices: 2, logprobs: Some(2), ..counting(&[1], 3) };
    let (_, events) = submit(&mut batcher, request);
    while batcher.step() {}
    let heard: Vec<Logprobs> = events
        .try_iter()
        .filter_map(|event| if let Event::Token { logprobs, .. } = event { logprobs } else { None })
        .collect();
    assert_eq!(heard.len(), 6);
    // After 1 comes 2; after 2 comes 3, which is odd, so the first of all others that are even: 0; and so on.
    assert!(heard.iter().all(|l| l.token % 2 == 0 && l.top.len() == 2 && l.top[0].1 > -1e-6), "{heard:?}");
    assert!(heard.iter().any(|l| l.token != l.top[0].0 && l.logprob < -60.0), "{heard:?}");
}

#[test]
fn clients_take_turns() {
    let mut batcher = batcher(&BatchOptions { running: Some(2), ..BatchOptions::default() });
    let mut of = |client| submit(&mut batcher, Request { client, ..counting(&[1], 10) }).1;
    let (greedy, modest): (Vec<_>, Vec<_>) = ([1; 6].map(&mut of).into(), [2; 2].map(&mut of).into());
    let first = |batcher: &mut Batcher, events: &Receiver<Event>| {
        (0..200).find(|_| {
            batcher.step();
            events.try_recv().is_ok()
        })
    };
    first(&mut batcher, &modest[0]).unwrap();
    assert!(greedy[1].try_recv().is_err(), "the second of one client comes after the first of another");
    while batcher.step() {}
    assert!(greedy.iter().chain(&modest[1..]).all(|events| outcome(events).2.len() == 1));
}

#[test]
fn nobody_listening_ends_a_request() {
    let mut batcher = batcher(&BatchOptions::default());
    let (id, events) = submit(&mut batcher, counting(&[1], 200));
    let (_, gone) = submit(&mut batcher, counting(&[1], 200));
    batcher.step();
    drop(gone);
    batcher.cancel(id);
    while batcher.step() {}
    assert!(outcome(&events).1.len() < 3);
    let stats = batcher.stats();
    assert_eq!((stats.cancelled, stats.blocks_taken, batcher.pending()), (2, 0, 0));
}

fn service(queue: usize) -> Service {
    let options = ServiceOptions { queue, batch: BatchOptions { running: Some(1), ..BatchOptions::default() } };
    Service::start(batcher(&options.batch), &options).unwrap()
}

#[test]
fn a_service_serves_many_threads() {
    let service = service(1000);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let service = &service;
            scope.spawn(move || {
                for i in 0..20 {
                    let (sink, events) = channel_sink();
                    let _handle = service.submit(counting(&[thread], 2 + i % 3), sink).unwrap();
                    let count = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
                    assert_eq!(count as u32, 2 + i as u32 % 3);
                }
            });
        }
    });
    // Figures follow the last answer.
    let counted = || (service.stats().requests, service.stats().generated_tokens);
    let begin = Instant::now();
    while counted().1 < 8 * (7 * 2 + 7 * 3 + 6 * 4) && begin.elapsed() < Duration::from_secs(10) {
        std::thread::yield_now();
    }
    assert_eq!(counted(), (160, 8 * (7 * 2 + 7 * 3 + 6 * 4)));
    assert_eq!(service.waiting(), 0);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let mut service = service(2);
    let long = || Request { choices: 1, ..counting(&[1], 100_000) };
    let mut open = vec![];
    let refused = (0..1000).find_map(|_| {
        let (sink, events) = channel_sink();
        service.submit(long(), sink).map(|handle| open.push((handle, events))).err()
    });
    let Some(Refused::Busy(wait)) = refused else { panic!("{refused:?}") };
    assert!((1..=60).contains(&wait.as_secs()));
    drop(open);
    // The handles' requests have ended.
    let (sink, events) = channel_sink();
    while service.waiting() > 1 {
        std::thread::yield_now();
    }
    let _handle = service.submit(counting(&[1], 2), sink).unwrap();
    assert_eq!(events.iter().count(), 3);
    service.drain(Duration::from_secs(10));
    assert!(!service.is_alive());
    assert!(matches!(service.submit(long(), Box::new(|_| true)), Err(Refused::Closed)));
}

#[test]
fn draining_waits_for_what_is_on_its_way() {
    let mut service = service(10);
    let (sink, events) = channel_sink();
    let _handle = service.submit(counting(&[1], 50), sink).unwrap();
    let (sink, nonsense) = channel_sink();
    let _other = service.submit(counting(&[], 50), sink).unwrap();
    service.drain(Duration::from_secs(10));
    assert_eq!(outcome(&events).2, [Finish::MaxTokens]);
    assert!(matches!(nonsense.recv().unwrap(), Event::Failed(_)));
}
