//! Cache blocks for the next step: who may begin, what is shared, what is let go, and who has to wait.

use super::run::{Part, Run};
use super::{Batcher, pieces, start};
use crate::blocks::blocks_for;
use crate::prefix::{Node, ROOT};
use mansard_ir::layout::CACHE_BLOCK;

impl Batcher {
    /// Takes in what waits, while there is room.
    pub(super) fn admit(&mut self) {
        while self.running.len() < self.most_running {
            let Some(next) = self.next_waiting() else { return };
            if !self.running.is_empty() && !self.fits(&self.waiting[next]) {
                return;
            }
            let mut run = self.waiting.swap_remove(next);
            run.sequence = Some(self.engine.new_sequence());
            run.node = start(self.share && !run.tells_prompt());
            run.ticket = None;
            self.running.push(run);
        }
    }

    /// What was preempted first; then whoever has fewest answers on their way; then order of arrival.
    fn next_waiting(&self) -> Option<usize> {
        let busy = |run: &Run| self.running.iter().filter(|other| other.client == run.client).count();
        let key = |run: &Run| match run.preempted {
            true => (false, 0, run.order()),
            false => (true, busy(run), run.order()),
        };
        (0..self.waiting.len()).min_by_key(|index| key(&self.waiting[*index]))
    }

    /// Whether all it has so far finds cache blocks, beside the prompts that have begun.
    fn fits(&self, run: &Run) -> bool {
        let promised = |run: &Run| {
            let done = run.sequence.and_then(|sequence| self.engine.length(sequence).ok()).unwrap_or(0);
            blocks_for(run.generation.context.len() + 1).saturating_sub(blocks_for(done))
        };
        let (shared, idle) = self.shared(run);
        let needed = promised(run) - shared + self.running.iter().map(promised).sum::<usize>();
        let (free, _) = self.engine.caches.free();
        needed <= free || needed <= free + self.prefixes.spare(&self.engine.caches) - idle
    }

    /// Cache blocks that a run finds computed, and how many of them nobody else holds.
    fn shared(&self, run: &Run) -> (usize, usize) {
        let (mut node, mut done, mut idle) = (ROOT, 0, 0);
        while self.share
            && !run.tells_prompt()
            && let Some((child, tokens)) = self.next_shared(run, node, done)
        {
            (node, done) = (child, done + tokens);
            idle += self.prefixes.idle(node, &self.engine.caches);
        }
        (done / CACHE_BLOCK, idle)
    }

    /// The node that goes on with the run's next piece, and its tokens. The last piece is never taken from others where its
    /// last row is wanted.
    fn next_shared(&self, run: &Run, node: Node, done: usize) -> Option<(Node, usize)> {
        let tokens = run.piece(done, self.piece)?;
        let context = &run.generation.context;
        let is_last = done + tokens == context.len();
        if is_last || !pieces::is_whole(tokens) {
            return None;
        }
        Some((self.prefixes.child(node, &context[done..done + tokens])?, tokens))
    }

    /// Goes on, in every prompt, past what others have computed.
    pub(super) fn adopt(&mut self) {
        for index in 0..self.running.len() {
            while let Some((node, tokens)) = self.next_adopted(&self.running[index]) {
                let run = &mut self.running[index];
                let Some(Ok((caches, sequence))) = run.sequence.map(|s| self.engine.caches_of(s)) else { break };
                self.prefixes.take(node).iter().for_each(|held| caches.extend(sequence, held));
                run.node = Some(node);
                if !run.preempted && run.usage.generated == 0 {
                    run.usage.cached += tokens;
                    self.stats.cached_tokens += tokens as u64;
                }
            }
        }
    }

    fn next_adopted(&self, run: &Run) -> Option<(Node, usize)> {
        let done = self.engine.length(run.sequence?).ok()?;
        self.next_shared(run, run.node?, done)
    }

    /// Keeps a piece that a run has just computed.
    pub(super) fn publish(&mut self, part: &Part) {
        let (Some(node), true) = (part.node, part.prompt && pieces::is_whole(part.tokens.len())) else { return };
        let Some(run) = self.running.iter_mut().find(|run| part.is_of(run)) else { return };
        let Ok((caches, sequence)) = self.engine.caches_of(part.sequence) else { return };
        if sequence.dropped > 0 {
            // Not all of the prompt is there any more.
            run.node = None;
            return;
        }
        let end = sequence.length / CACHE_BLOCK;
        let first = end - part.tokens.len() / CACHE_BLOCK;
        let held = (first..end).map(|entry| caches.hold(sequence, entry)).collect();
        run.node = match self.prefixes.insert(node, &part.tokens, held) {
            Ok(node) => Some(node),
            Err(held) => {
                held.into_iter().for_each(|held| caches.let_go(held));
                None
            }
        };
    }

    /// Lets go of prefixes, then of the youngest answers, until the step has the cache blocks it takes. An answer alone that
    /// fills all of them ends there.
    pub(super) fn make_room(&mut self, mut parts: Vec<Part>) -> Vec<Part> {
        loop {
            let work = parts.iter().map(|part| (part.sequence, part.tokens.len()));
            if self.engine.lacking(work).is_ok_and(|lacking| lacking == 0) {
                return parts;
            }
            if self.prefixes.let_go(&mut self.engine.caches) {
                self.stats.evicted += 1;
                continue;
            }
            let youngest = (0..self.running.len()).max_by_key(|index| self.running[*index].order());
            let Some(run) = youngest.map(|index| self.running.swap_remove(index)) else { return vec![] };
            parts.retain(|part| !part.is_of(&run));
            match self.running.is_empty() {
                true => self.end_of_cache(run),
                false => self.preempt(run),
            }
        }
    }

    /// Takes a run's cache blocks; it is computed again when there are some.
    fn preempt(&mut self, mut run: Run) {
        self.release(&mut run);
        run.preempted = true;
        self.stats.preempted += 1;
        self.waiting.push(run);
    }
}
