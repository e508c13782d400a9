//! Draws against the probabilities they should have, and what every option does to a small distribution.

use super::*;

const ALL: SamplerOptions = SamplerOptions::plain();

fn sample(sampler: &mut Sampler, logits: &[f32], history: &[u32]) -> u32 {
    sampler.sample(logits, Before { history, prompt: 0 }, None).unwrap()
}

fn shares(options: SamplerOptions, logits: &[f32], history: &[u32]) -> Vec<f64> {
    let mut sampler = Sampler::new(options).unwrap();
    let mut counts = vec![0.0; logits.len()];
    for _ in 0..100_000 {
        counts[sample(&mut sampler, logits, history) as usize] += 1e-5;
    }
    counts
}

fn close(found: &[f64], expected: &[f64]) {
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.006), "{found:?} {expected:?}");
}

fn logs(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

#[test]
fn draws_follow_the_softmax() {
    let logits = logs(&[0.1, 0.6, 0.3]);
    close(&shares(ALL, &logits, &[]), &[0.1, 0.6, 0.3]);
    let flat = 0.1f64.sqrt() + 0.6f64.sqrt() + 0.3f64.sqrt();
    let expected = [0.1f64, 0.6, 0.3].map(|p| p.sqrt() / flat);
    close(&shares(SamplerOptions { temperature: 2.0, ..ALL }, &logits, &[]), &expected);
}

#[test]
fn filters_keep_what_they_say() {
    let logits = logs(&[0.1, 0.5, 0.25, 0.15]);
    close(&shares(SamplerOptions { top_k: 2, ..ALL }, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
    close(&shares(SamplerOptions { top_p: 0.7, ..ALL }, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
    close(&shares(SamplerOptions { top_p: 0.01, ..ALL }, &logits, &[]), &[0.0, 1.0, 0.0, 0.0]);
    close(&shares(SamplerOptions { min_p: 0.4, ..ALL }, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
    close(&shares(SamplerOptions { min_p: 1.0, ..ALL }, &logits, &[]), &[0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn the_penalty_reaches_recent_tokens_only() {
    let options = SamplerOptions { repetition_penalty: 2.0, repetition_window: 2, temperature: 0.0, ..ALL };
    let mut sampler = Sampler::new(options).unwrap();
    assert_eq!(sample(&mut sampler, &[4.0, 3.0, -1.0], &[0, 0]), 1);
    assert_eq!(sample(&mut sampler, &[4.0, 3.0, -1.0], &[0, 2, 2]), 0);
    assert_eq!(sample(&mut sampler, &[-4.0, -3.0, -2.0], &[2, 1]), 0);
    assert_eq!(sample(&mut sampler, &[-4.0, -3.0], &[900]), 1);
}

#[test]
fn greedy_takes_the_first_of_equals_and_skips_nan() {
    let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
    assert_eq!(sample(&mut sampler, &[f32::NAN, 1.0, 3.0, 3.0], &[]), 2);
    assert!(sampler.sample(&[f32::NAN; 3], Before::default(), None).is_err());
    assert!(sampler.sample(&[], Before::default(), None).is_err());
}

#[test]
fn options_say_which_logits_they_look_at() {
    assert_eq!(SamplerOptions::greedy().logits(), Logits::Largest(1));
    assert_eq!(SamplerOptions { top_k: 7, ..ALL }.logits(), Logits::Largest(7));
    assert_eq!(ALL.logits(), Logits::All);
    assert_eq!(SamplerOptions { repetition_penalty: 1.1, ..SamplerOptions::greedy() }.logits(), Logits::All);
}

#[test]
fn seeds_repeat() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
    let run = |seed| {
        let mut sampler = Sampler::new(SamplerOptions { seed, ..ALL }).unwrap();
        (0..50).map(|_| sample(&mut sampler, &logits, &[])).collect::<Vec<u32>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn options_out_of_range_are_refused() {
    for options in [
        SamplerOptions { temperature: -1.0, ..ALL },
        SamplerOptions { temperature: f32::NAN, ..ALL },
        SamplerOptions { top_p: 0.0, ..ALL },
        SamplerOptions { min_p: 1.5, ..ALL },
        SamplerOptions { repetition_penalty: 0.0, ..ALL },
    ] {
        assert_eq!(Sampler::new(options).unwrap_err().exit_code(), 2);
    }
}

#[test]
fn typical_keeps_what_is_as_surprising_as_expected() {
    // The entropy is 1.24 nats: 0.25 (1.39) is nearest, then 0.5 (0.69), 0.15 (1.90), 0.1 (2.30).
    let logits = logs(&[0.1, 0.5, 0.25, 0.15]);
    close(&shares(SamplerOptions { typical: 0.2, ..ALL }, &logits, &[]), &[0.0, 0.0, 1.0, 0.0]);
    close(&shares(SamplerOptions { typical: 0.7, ..ALL }, &logits, &[]), &[0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0]);
    let both = SamplerOptions { typical: 0.2, min_p: 0.9, top_p: 0.5, ..ALL };
    close(&shares(both, &logits, &[]), &[0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn biases_and_penalties_change_logits() {
    let logits = logs(&[0.1, 0.5, 0.25, 0.15]);
    let bias = SamplerOptions { logit_bias: vec![(0, 3f32.ln()), (1, -100.0), (9, 5.0)], ..ALL };
    close(&shares(bias, &logits, &[]), &[0.3 / 0.7, 0.0, 0.25 / 0.7, 0.15 / 0.7]);
    let greedy = SamplerOptions { temperature: 0.0, ..ALL };
    let after = |options: SamplerOptions, history: &[u32], prompt| {
        let before = Before { history, prompt };
        Sampler::new(options).unwrap().sample(&[3.0, 2.5, 2.0], before, None).unwrap()
    };
    let presence = SamplerOptions { presence_penalty: 0.75, ..greedy.clone() };
    let frequency = SamplerOptions { frequency_penalty: 0.3, ..greedy };
    assert_eq!([after(presence.clone(), &[0, 0], 2), after(presence.clone(), &[0, 0], 1)], [0, 1]);
    assert_eq!([after(presence.clone(), &[0, 1, 0, 0], 0), after(presence, &[0, 1, 2, 0], 0)], [0, 0]);
    assert_eq!([after(frequency.clone(), &[0], 0), after(frequency, &[0, 0], 0)], [0, 1]);
}

#[test]
fn only_what_is_allowed_is_drawn() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
    let allowed = [0, 1 << 5 | 1 << 9];
    for options in [ALL, SamplerOptions::greedy(), SamplerOptions::default()] {
        let mut sampler = Sampler::new(options).unwrap();
        for _ in 0..50 {
            let token = sampler.sample(&logits, Before::default(), Some(&allowed)).unwrap();
            assert!([37, 41].contains(&token), "{token}");
        }
        assert!(sampler.sample(&logits, Before::default(), Some(&[])).is_err());
    }
}

/// Against sorting everything.
#[test]
fn the_likeliest_of_many_are_found() {
    for (seed, top_k, levels) in [(1u64, 1, 1000.0), (2, 7, 50.0), (3, 40, 1e6), (4, 300, 20.0), (5, 5000, 9.0)] {
        let mut state = seed;
        let scores: Vec<f32> = (0..20_000).map(|_| ((next(&mut state) >> 40) as f32 / 1e6 * levels).round()).collect();
        let mut sorted: Vec<u32> = (0..20_000).collect();
        sorted.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
        let mut sampler = Sampler::new(SamplerOptions { top_k, ..ALL }).unwrap();
        sampler.gather(&scores);
        sampler.candidates.sort_unstable_by(likeliest_first);
        let found: Vec<u32> = sampler.candidates.iter().map(|c| c.token).collect();
        assert_eq!(found, sorted[..top_k]);
    }
}

#[test]
fn a_token_takes_one_random_number() {
    let logits = logs(&[0.1, 0.5, 0.25, 0.15]);
    let mut twins = [ALL, SamplerOptions { temperature: 0.0, ..ALL }].map(|o| Sampler::new(o).unwrap());
    for twin in &mut twins {
        for _ in 0..3 {
            sample(twin, &logits, &[]);
        }
    }
    assert_eq!(twins[0].state, twins[1].state);
    let seeds: Vec<u64> = (0..4).map(|choice| seed_of_choice(7, choice)).collect();
    assert!(seeds[0] == 7 && (1..4).all(|i| !seeds[..i].contains(&seeds[i])));
}

#[test]
fn the_exponential_is_near_the_exact_one() {
    for i in 0..200_000 {
        let x = -(i as f32) * 5e-4;
        let (found, exact) = (f64::from(exp(x)), f64::from(x).exp());
        assert!(if x < -87.0 { found == 0.0 } else { (found / exact - 1.0).abs() < 3e-7 }, "e^{x}: {found}, {exact}");
    }
    assert_eq!([exp(0.0), exp(f32::NEG_INFINITY), exp(-1e30)], [1.0, 0.0, 0.0]);
}

/// Against the shares of the softmax, over a vocabulary of some size.
#[test]
fn mass_is_kept_of_many() {
    let logits: Vec<f32> = (0..3000).map(|i| -(i as f32) / 400.0).collect();
    for top_p in [0.3, 0.9, 0.9999] {
        let mut sampler = Sampler::new(SamplerOptions { top_p, ..ALL }).unwrap();
        sampler.gather(&logits);
        sampler.keep(0.0);
        let weights: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp()).collect();
        let goal = weights.iter().sum::<f64>() * f64::from(top_p);
        let mut mass = 0.0;
        let count = weights.iter().take_while(|weight| {
            mass += **weight;
            mass - **weight < goal
        });
        assert!(sampler.candidates.len().abs_diff(count.count()) <= 1, "{top_p}");
    }
}

#[test]
fn whole_vocabularies_are_drawn_from() {
    let logits: Vec<f32> = (0..1000).map(|i| if i == 77 { f32::NAN } else { (i * 37 % 11) as f32 / 5.0 }).collect();
    let mass = |x: f32| if x.is_nan() { 0.0 } else { f64::from(x).exp() };
    let total: f64 = logits.iter().map(|x| mass(*x)).sum();
    let mut sampler = Sampler::new(SamplerOptions { seed: 3, ..SamplerOptions::plain() }).unwrap();
    let mut found = [0f64; 20];
    for _ in 0..20_000 {
        found[sample(&mut sampler, &logits, &[]) as usize / 50] += 1.0;
    }
    for (found, tokens) in found.iter().zip(logits.chunks(50)) {
        let expected = 20_000.0 * tokens.iter().map(|x| mass(*x)).sum::<f64>() / total;
        assert!((found - expected).abs() < 4.0 * expected.sqrt(), "{found}, not {expected}");
    }
}
