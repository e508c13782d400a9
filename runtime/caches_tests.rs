//! What tables hold before and after steps, and what steps need.

use super::*;

const WINDOW: usize = 100;

fn program() -> Program {
    let spec = |group| CacheSpec { name: "keys".into(), ty: String::new(), block_bytes: 64, group };
    let groups = [0, WINDOW].map(|window| CacheGroup { window }).to_vec();
    Program { caches: vec![spec(0), spec(1)], groups, ..Program::default() }
}

fn caches(positions: usize) -> Caches {
    caches_with(positions, None)
}

fn made(positions: usize, recent: Option<usize>) -> Result<Caches> {
    let program = program();
    let pools = |blocks| make_pools(&program, blocks).map(|(arena, offsets)| (Box::new(arena) as _, offsets));
    Caches::new(&program, (positions, recent), pools)
}

/// Two groups, the second with a window, of one cache each.
fn caches_with(positions: usize, recent: Option<usize>) -> Caches {
    made(positions, recent).unwrap()
}

fn taken(caches: &Caches) -> [usize; 2] {
    [0, 1].map(|group| caches.usage()[group].taken)
}

/// A step, which must need what was said.
fn step(caches: &mut Caches, sequence: &mut Sequence, tokens: usize) {
    let (needed, before) = (caches.needed(sequence, tokens, tokens, &mut Copied::new()), taken(caches));
    caches.check_free(&needed).unwrap();
    caches.grow(sequence, tokens).unwrap();
    for (group, after) in taken(caches).into_iter().enumerate() {
        assert!(after <= before[group] + needed[group], "{after} of group {group}, {needed:?} after {before:?}");
        let table = &sequence.tables[group];
        assert_eq!(table.entries.len(), blocks_for(sequence.length + tokens));
        // What the step's first token sees.
        let window = caches.groups[group].plan.window;
        if window > 0 {
            assert!(table.released * CACHE_BLOCK <= (sequence.length + 1).saturating_sub(window));
        }
    }
    sequence.length += tokens;
}

#[test]
fn a_window_holds_as_many_cache_blocks_at_any_depth() {
    let mut caches = caches(8192);
    let mut sequence = caches.empty();
    for _ in 0..16 {
        step(&mut caches, &mut sequence, 500);
        assert!(taken(&caches)[1] <= (WINDOW + 64 + 500).div_ceil(CACHE_BLOCK) + 1);
    }
    for _ in 0..192 {
        step(&mut caches, &mut sequence, 1);
    }
    assert_eq!((sequence.length, taken(&caches)), (8192, [128, 3]));
    assert_eq!(CacheGroup { window: WINDOW }.blocks(8192), 3);
    let table = &sequence.tables[1];
    assert!(table.entries.iter().max() < Some(&12), "cache blocks that were put back are taken first");
    caches.cut(&mut sequence, 0);
    assert_eq!(taken(&caches), [0, 0]);
}

#[test]
fn the_last_step_and_64_positions_can_be_taken_back() {
    let mut caches = caches(2048);
    let mut sequence = caches.empty();
    for tokens in [1, 300, 64, 1, 1, 130, 63, 200, 1] {
        let before = sequence.length;
        step(&mut caches, &mut sequence, tokens);
        assert!(caches.shortest(&sequence) <= before.saturating_sub(CACHE_BLOCK).max(1), "after {before}");
    }
    let (shortest, length) = (caches.shortest(&sequence), sequence.length);
    assert!(shortest > 1 && shortest < length);
    caches.cut(&mut sequence, shortest);
    assert_eq!(caches.shortest(&sequence), shortest);
    step(&mut caches, &mut sequence, length - shortest);
    caches.cut(&mut sequence, 0);
    assert_eq!((caches.shortest(&sequence), taken(&caches)), (1, [0, 0]));
}

#[test]
fn forks_keep_what_the_other_lets_go() {
    let mut caches = caches(2048);
    let mut one = caches.empty();
    step(&mut caches, &mut one, 330);
    let mut other = caches.share(&one);
    let held = other.tables[1].entries.clone();
    for _ in 0..8 {
        step(&mut caches, &mut one, 50);
    }
    assert!(one.tables[1].released >= 5 && other.tables[1].released == 0);
    assert_eq!(taken(&caches)[1], 6 + one.tables[1].held().len());
    let copy = caches.copy(&one).unwrap();
    assert!(copy.tables[1].held().iter().all(|block| !one.tables[1].held().contains(block)));
    step(&mut caches, &mut other, 1);
    assert_eq!(other.tables[1].held()[..2], held[other.tables[1].released..][..2]);
    for mut sequence in [one, other, copy] {
        caches.cut(&mut sequence, 0);
    }
    assert_eq!(taken(&caches), [0, 0]);
}

#[test]
fn the_middle_is_dropped() {
    let recent = 2 * WINDOW;
    let mut caches = caches_with(1280, Some(recent));
    let mut sequence = caches.empty();
    for (tokens, times) in [(100, 4), (1, 150), (300, 3), (1, 5)] {
        for _ in 0..times {
            let (tail, first) =
                (sequence.tables[0].entries.last().copied(), sequence.tables[0].entries.first().copied());
            step(&mut caches, &mut sequence, tokens);
            let table = &sequence.tables[0].entries;
            assert!(first.is_none() || first == table.first().copied());
            assert!(tail.is_none_or(|tail| table.contains(&tail)));
            // Of what comes before the step.
            let seen = sequence.length - tokens;
            assert!(sequence.dropped == 0 || (CACHE_BLOCK + recent..CACHE_BLOCK + recent + 128).contains(&(seen + 1)));
            let (length, shortest) =
                (sequence.length + sequence.dropped, caches.shortest(&sequence) + sequence.dropped);
            assert!(caches.middle(length - tokens) == sequence.dropped / CACHE_BLOCK && shortest <= length);
            assert_eq!(caches.middle(length + caches.steady(&sequence) - 1), caches.middle(length));
            assert!(caches.steady(&sequence) <= 64 - sequence.length % 64);
        }
    }
    assert_eq!(sequence.length + sequence.dropped, 1455);
    caches.cut(&mut sequence, 0);
    assert_eq!((sequence.dropped, taken(&caches)), (0, [0, 0]));
    assert!(made(1280, Some(WINDOW - 1)).is_err());
}

#[test]
fn the_last_holder_of_a_tail_needs_no_copy() {
    let mut caches = caches(2048);
    let mut one = caches.empty();
    step(&mut caches, &mut one, 70);
    let mut all = [caches.share(&one), caches.share(&one), one];
    let before = taken(&caches);
    let mut copied = Copied::new();
    let needed = all.each_ref().map(|sequence| caches.needed(sequence, 1, 1, &mut copied));
    assert_eq!(needed, [[1, 1], [1, 1], [0, 0]]);
    all.iter_mut().for_each(|sequence| step(&mut caches, sequence, 1));
    assert_eq!(taken(&caches), before.map(|taken| taken + 2));
}

#[test]
fn a_long_prompt_needs_no_more_than_its_steps_hold() {
    let mut caches = caches(640);
    let mut sequence = caches.empty();
    assert_eq!(caches.needed(&sequence, 640, 640, &mut Copied::new()), [10, 10]);
    let needed = caches.needed(&sequence, 640, 64, &mut Copied::new());
    assert_eq!(needed[0], 10);
    let mut most = 0;
    for _ in 0..10 {
        step(&mut caches, &mut sequence, 64);
        most = most.max(taken(&caches)[1]);
    }
    assert_eq!(needed[1], most);
    let error = caches.check_free(&caches.needed(&sequence, 1, 1, &mut Copied::new())).unwrap_err();
    assert!(error.message().contains("expected 1 free cache blocks of 64 positions, found 0 of 10"), "{error}");
}
