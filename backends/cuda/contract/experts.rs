//! Experts: each token's row times the matrices of the experts it was routed to.
//!
//! A step's *entries* are its pairs (token, j), numbered `token * top + j`. In steps of several tokens every block sorts them by
//! expert for itself, and blocks share the strips of panels: up to 8 entries of one expert, which read its weights together.
//!
//! ```text
//! chosen [2 0] [0 1] [2 1]   -->   starts 0 2 4 6, entries 1 2 | 3 5 | 0 4
//! for expert:  for strip of its matrix, for panel of its entries       one after another to the blocks in turn
//! ```
//!
//! An expert's entries keep the order of their numbers, so results are the same with every grid.

use super::{Component, Contraction, PANEL, Place, THREADS, components, each, internal, strips};
use crate::cpu::contract::Dot;
use crate::cpu::count_of;
use crate::cuda::Device;
use crate::emit::{Cmp, Emitter, I16, I32, I64, Val};
use mansard_ir::layout::{A8, STRIP, StripLayout, row_bytes};
use mansard_ir::{Result, Type, bail};

/// Most bytes of shared memory that sorted entries take; so few can be numbered in 16 bits.
const SORTED_BYTES: usize = 96 << 10;

/// How the tokens of a step are routed.
#[derive(Clone, Copy)]
struct Routed {
    /// Rows of `i32[top]`, of that many bytes.
    chosen: Val,
    stride: usize,
    top: usize,
    experts: usize,
    /// `i64`: entries of the step.
    entries: Val,
}

/// Entries in order of expert, in shared memory.
#[derive(Clone, Copy)]
struct Sorted {
    /// `i16[t * top]`
    entries: Val,
    /// `i32[experts + 1]`: where each expert's entries begin, and where the last one's end.
    starts: Val,
}

/// The entries of a panel.
#[derive(Clone, Copy)]
enum Entries {
    /// One, by its number.
    One(Val),
    /// Sorted ones from this place on, as far as the other.
    Sorted(Sorted, Val, Val),
}

/// Emits an `experts` kernel.
pub(in crate::cuda) fn emit(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let components: Vec<Component> = components(body)?.into_iter().filter(|c| !c.dots.is_empty()).collect();
    let routing = components.first().and_then(|c| c.dots[0].routing).ok_or_else(|| internal(body))?;
    let (&Type::Routing { top, experts }, Some(stride)) = (body.ty(routing), row_bytes(body.ty(routing))) else {
        return Err(internal(body));
    };
    if let Some(odd) = components.iter().find(|c| !c.n.is_multiple_of(STRIP)) {
        bail!(Unsupported, "experts with {} output rows: a multiple of {STRIP} is needed", odd.n);
    }
    let tokens = count_of(e, d.k, body.ty(routing))?;
    let routed = Routed { chosen: d.pointer(routing)?, stride, top, experts, entries: e.scaled(tokens, top, 0) };
    let kernel = Experts { d: &d, components: &components, routed };
    let most = d.kernel.range.max * top;
    if d.kernel.range.max == 1 || 4 * most > SORTED_BYTES { kernel.one_by_one(e) } else { kernel.sorted(e, most) }
}

/// An `experts` kernel's work.
struct Experts<'a> {
    d: &'a Device<'a>,
    components: &'a [Component],
    routed: Routed,
}

impl Experts<'_> {
    /// Every entry for itself.
    fn one_by_one(&self, e: &mut Emitter) -> Result<()> {
        let (k, counts) = (self.d.k, strips(self.components));
        let strips = e.i64(counts.iter().sum::<usize>() as i64);
        let (items, mut result) = (e.mul(self.routed.entries, strips), Ok(()));
        e.for_loop((k.thread, items, k.threads), &[], |e, index, _| {
            let (entry, strip) = (e.div(index, strips), e.rem(index, strips));
            let expert = self.expert(e, entry);
            let expert = e.convert("extui", expert, I64);
            result = each(e, self.components, &counts, strip, |e, component, strip| {
                self.panel(e, component, (Entries::One(entry), 1), (expert, strip))
            });
            vec![]
        });
        result
    }

    /// At most `most` entries, expert by expert.
    fn sorted(&self, e: &mut Emitter, most: usize) -> Result<()> {
        let sorted = self.sort(e, most);
        let (k, counts) = (self.d.k, strips(self.components));
        let strips = e.i64(counts.iter().sum::<usize>() as i64);
        let (zero, one, experts) = (e.i64(0), e.i64(1), e.i64(self.routed.experts as i64));
        let mut result = Ok(());
        // Carried: which of an expert's items is this block's next one.
        e.for_loop((zero, experts, one), &[k.thread], |e, expert, next| {
            let first = load_i32(e, sorted.starts, expert);
            let after = e.add(expert, one);
            let end = load_i32(e, sorted.starts, after);
            let (count, size) = (e.sub(end, first), e.i64(PANEL as i64));
            let padded = e.scaled(count, 1, PANEL - 1);
            let panels_of = e.div(padded, size);
            let items = e.mul(panels_of, strips);
            e.for_loop((next[0], items, k.threads), &[], |e, index, _| {
                // Blocks that run together share the strip, which one of them brings into the second-level cache.
                let (panel, strip) = (e.rem(index, panels_of), e.div(index, panels_of));
                let before = e.mul(panel, size);
                let from = e.add(first, before);
                let left = e.sub(end, from);
                let left = e.min(left, size);
                for tokens in [PANEL, PANEL / 2, PANEL / 4, 1] {
                    let (above, upto) = (e.i64(tokens as i64 / 2), e.i64(tokens as i64));
                    let (more, fits) = (e.cmp(Cmp::Gt, left, above), e.cmp(Cmp::Le, left, upto));
                    let here = e.and(more, fits);
                    e.when(here, |e| {
                        let entries = Entries::Sorted(sorted, from, end);
                        let done = each(e, self.components, &counts, strip, |e, component, strip| {
                            self.panel(e, component, (entries, tokens), (expert, strip))
                        });
                        result = std::mem::replace(&mut result, Ok(())).and(done);
                    });
                }
                vec![]
            });
            // The next expert's items go on where this one's end.
            let (over, last) = (e.sub(items, next[0]), e.sub(k.threads, one));
            let over = e.max(over, zero);
            let padded = e.add(over, last);
            let rounds = e.div(padded, k.threads);
            let taken = e.mul(rounds, k.threads);
            let next = e.add(next[0], taken);
            vec![e.sub(next, items)]
        });
        result
    }

    /// The expert of an entry, as `i32`.
    fn expert(&self, e: &mut Emitter, entry: Val) -> Val {
        let Routed { chosen, stride, top, .. } = self.routed;
        let top = e.i64(top as i64);
        let (token, j) = (e.div(entry, top), e.rem(entry, top));
        let row = e.row(chosen, token, stride);
        let at = e.row(row, j, 4);
        e.load(at, I32, 4)
    }

    /// Sorts the step's entries: a thread counts, and then places, those of an expert.
    fn sort(&self, e: &mut Emitter, most: usize) -> Sorted {
        let Routed { experts, entries: count, .. } = self.routed;
        let (chosen, entries) = (e.shared(2 * most), e.shared(2 * most));
        let (counts, starts) = (e.shared(4 * experts), e.shared(4 * (experts + 1)));
        let (thread, all, zero, one) = (e.thread(), e.i64(experts as i64), e.i64(0), e.i64(1));
        e.repeat(thread, count, THREADS as i64, |e, entry| {
            let expert = self.expert(e, entry);
            let (expert, to) = (e.convert("trunci", expert, I16), e.row(chosen, entry, 2));
            e.store(expert, to, 2);
        });
        e.barrier();
        let is_of = |e: &mut Emitter, entry: Val, expert: Val| {
            let own = load_i16(e, chosen, entry);
            e.cmp(Cmp::Eq, own, expert)
        };
        e.repeat(thread, all, THREADS as i64, |e, expert| {
            let found = e.for_loop((zero, count, one), &[zero], |e, entry, found| {
                let (here, more) = (is_of(e, entry, expert), e.add(found[0], one));
                vec![e.select(here, more, found[0])]
            });
            let (found, to) = (e.convert("trunci", found[0], I32), e.row(counts, expert, 4));
            e.store(found, to, 4);
        });
        e.barrier();
        e.repeat(thread, all, THREADS as i64, |e, expert| {
            let first = e.for_loop((zero, expert, one), &[zero], |e, before, first| {
                let more = load_i32(e, counts, before);
                vec![e.add(first[0], more)]
            });
            let (start, to) = (e.convert("trunci", first[0], I32), e.row(starts, expert, 4));
            e.store(start, to, 4);
            let end = e.for_loop((zero, count, one), &first, |e, entry, place| {
                let (here, to) = (is_of(e, entry, expert), e.row(entries, place[0], 2));
                let (number, more) = (e.convert("trunci", entry, I16), e.add(place[0], one));
                e.when(here, |e| e.store(number, to, 2));
                vec![e.select(here, more, place[0])]
            });
            let last = e.i64(experts as i64 - 1);
            let is_last = e.cmp(Cmp::Eq, expert, last);
            e.when(is_last, |e| {
                let (end, to) = (e.convert("trunci", end[0], I32), e.gep_const(starts, 4 * experts));
                e.store(end, to, 4);
            });
        });
        e.barrier();
        Sorted { entries, starts }
    }

    /// One strip of an expert for `tokens` entries; those past the last are the last once more, and go nowhere.
    fn panel(
        &self,
        e: &mut Emitter,
        component: &Component,
        (entries, tokens): (Entries, usize),
        (expert, strip): (Val, Val),
    ) -> Result<()> {
        let (contraction, body) = (Contraction { d: self.d, component }, &self.d.kernel.body);
        let operands = |e: &mut Emitter, dot: &Dot| -> Result<(Val, Vec<Val>)> {
            let stride = row_bytes(body.ty(dot.x)).ok_or_else(|| internal(body))?;
            let base = self.d.pointer(dot.x)?;
            // Every entry has activations of its own, or a token's share them.
            let own = body.ty(dot.x).as_tensor().is_some_and(|(_, shape)| shape.len() == 3);
            let bytes = dot.activations.format().block_bytes;
            let width = dot.activations.planes().map_or(dot.k * bytes, |planes| dot.k / A8::GROUP * A8::LINE * planes);
            let row = |index: usize| {
                let index = e.i64(index as i64);
                let (token, j) = self.entry(e, entries, index);
                let x = e.row(base, token, stride);
                if own { e.row(x, j, width) } else { x }
            };
            let rows = (0..tokens).map(row).collect();
            let first = e.scaled(expert, component.n.div_ceil(STRIP), 0);
            let index = e.add(first, strip);
            let weight = self.d.pointer(dot.weight)?;
            Ok((e.row(weight, index, StripLayout::new(dot.dtype, dot.k).bytes), rows))
        };
        let first = e.scaled(strip, STRIP, 0);
        contraction.outputs(e, (tokens, None), &operands, |e, index, row, counts| {
            let (token, j) = self.entry(e, entries, index);
            let (column, before) = (e.add(first, row), e.scaled(j, component.n, 0));
            let counts = match entries {
                Entries::One(_) => counts,
                Entries::Sorted(_, first, end) => {
                    let place = e.add(first, index);
                    let there = e.cmp(Cmp::Lt, place, end);
                    e.and(counts, there)
                }
            };
            Place { token, element: e.add(before, column), column, counts }
        })
    }

    /// The token of a panel's entry `index`, and which of its experts that is.
    fn entry(&self, e: &mut Emitter, entries: Entries, index: Val) -> (Val, Val) {
        let entry = match entries {
            Entries::One(entry) => entry,
            Entries::Sorted(sorted, first, end) => {
                let (place, one) = (e.add(first, index), e.i64(1));
                let last = e.sub(end, one);
                let place = e.min(place, last);
                load_i16(e, sorted.entries, place)
            }
        };
        let top = e.i64(self.routed.top as i64);
        (e.div(entry, top), e.rem(entry, top))
    }
}

/// Element `index` of `i32`s, as `i64`.
fn load_i32(e: &mut Emitter, list: Val, index: Val) -> Val {
    let at = e.row(list, index, 4);
    let value = e.load(at, I32, 4);
    e.convert("extui", value, I64)
}

/// Element `index` of `i16`s, as `i64`.
fn load_i16(e: &mut Emitter, list: Val, index: Val) -> Val {
    let at = e.row(list, index, 2);
    let value = e.load(at, I16, 2);
    e.convert("extui", value, I64)
}
