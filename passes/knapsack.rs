//! One alternative for each decision: least time, under a bound on error and one on bytes.
//!
//! ```text
//! q_proj: bf16 9 us, error 0 | q8_0 5 us, 1e-4 | q4_0 3 us, 8e-3
//! caches: f16  4 us, error 0 | i8   2 us, 1e-3             error <= 2e-3   ->   q8_0, i8: 7 us
//! ```
//!
//! A multiple-choice knapsack with two bounds. Prices on error and bytes (Lagrange multipliers) turn it into decisions that
//! are independent of each other; the best prices give a lower bound, and what each alternative costs above its decision's
//! cheapest says by how much that bound rises when it is taken. So branch and bound visits only what lies within the gap
//! between the bound and the best found. The number of visited nodes is limited, never the time; ties go to the earlier
//! alternative, so the same figures give the same answer.
//!
//! Method: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), chapter 11; Fisher, Management Science 27 (1981).

/// One way to decide.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    /// What is to be least.
    pub cost: f64,
    /// Bounded in sum.
    pub error: f64,
    /// Bounded in sum.
    pub bytes: f64,
}

/// The best that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// For each decision the item taken.
    pub picked: Vec<usize>,
    /// Sums over what was taken.
    pub sum: Item,
    /// No solution costs less.
    pub bound: f64,
    /// Every solution was visited or excluded: this one is the best.
    pub complete: bool,
}

/// Nodes of the search tree that are visited at most.
const NODES: usize = 4_000_000;

/// The cheapest choice of one item each with sums of error and bytes within `most`; `None` where there is none.
pub fn solve(decisions: &[Vec<Item>], most: Item) -> Option<Solution> {
    if decisions.iter().any(Vec::is_empty) {
        return None;
    }
    let (bound, prices) = best_prices(decisions, most);
    let mut search = Search::new(decisions, most, prices, bound);
    search.start();
    search.visit(0, Item { cost: 0.0, error: 0.0, bytes: 0.0 }, 0.0);
    let complete = search.visited < NODES;
    let picked = search.best?;
    let sum = sum(decisions, &picked);
    Some(Solution { picked, sum, bound: if complete { sum.cost } else { bound.min(sum.cost) }, complete })
}

fn sum(decisions: &[Vec<Item>], picked: &[usize]) -> Item {
    decisions.iter().zip(picked).fold(Item { cost: 0.0, error: 0.0, bytes: 0.0 }, |a, (items, i)| add(a, items[*i]))
}

fn add(a: Item, b: Item) -> Item {
    Item { cost: a.cost + b.cost, error: a.error + b.error, bytes: a.bytes + b.bytes }
}

fn within(a: Item, most: Item) -> bool {
    a.error <= most.error && a.bytes <= most.bytes
}

/// Prices of one unit of error and of one byte.
#[derive(Clone, Copy, Debug)]
struct Prices {
    error: f64,
    bytes: f64,
}

impl Prices {
    fn of(self, item: Item) -> f64 {
        item.cost + self.error * item.error + self.bytes * item.bytes
    }

    /// The first of the cheapest.
    fn cheapest(self, items: &[Item]) -> usize {
        (1..items.len()).fold(0, |best, i| if self.of(items[i]) < self.of(items[best]) { i } else { best })
    }

    /// No choice within `most` costs less.
    fn bound(self, decisions: &[Vec<Item>], most: Item) -> f64 {
        let least: f64 = decisions.iter().map(|items| self.of(items[self.cheapest(items)])).sum();
        let paid = |price: f64, most: f64| if price > 0.0 { price * most } else { 0.0 };
        least - paid(self.error, most.error) - paid(self.bytes, most.bytes)
    }
}

/// The highest bound and its prices: a concave function of both, climbed in one within the other.
fn best_prices(decisions: &[Vec<Item>], most: Item) -> (f64, Prices) {
    let bytes = scale(decisions, most.bytes, |i| i.bytes);
    let error = scale(decisions, most.error, |i| i.error);
    let of_error = |price: f64| {
        let at = |bytes: f64| Prices { error: price, bytes };
        let found = highest(bytes, |bytes| at(bytes).bound(decisions, most));
        (found.0, at(found.1))
    };
    let price = highest(error, |error| of_error(error).0).1;
    of_error(price)
}

/// What a unit of a bounded figure may be worth: all cost for all of it, roughly. 0 where it is not bounded.
fn scale(decisions: &[Vec<Item>], most: f64, of: impl Fn(&Item) -> f64) -> f64 {
    let worst =
        |of: &dyn Fn(&Item) -> f64| -> f64 { decisions.iter().map(|i| i.iter().map(of).fold(0.0, f64::max)).sum() };
    let (cost, figure) = (worst(&|i: &Item| i.cost), worst(&of));
    if most.is_infinite() || figure <= 0.0 || figure <= most { 0.0 } else { cost / figure }
}

/// The highest value of a concave function and where it is: at 0, or within 12 orders of magnitude of `scale`.
fn highest(scale: f64, f: impl Fn(f64) -> f64) -> (f64, f64) {
    let zero = f(0.0);
    if scale == 0.0 {
        return (zero, 0.0);
    }
    let at = |log: f64| scale * log.exp2();
    let (mut low, mut high) = (-40.0, 40.0);
    for _ in 0..48 {
        let (a, b) = (low + (high - low) / 3.0, high - (high - low) / 3.0);
        if f(at(a)) < f(at(b)) { low = a } else { high = b }
    }
    let found = at((low + high) / 2.0);
    let value = f(found);
    if value > zero { (value, found) } else { (zero, 0.0) }
}

/// Branch and bound over the decisions, the most telling first.
struct Search<'a> {
    decisions: &'a [Vec<Item>],
    most: Item,
    prices: Prices,
    /// Decisions in the order they are taken; for each its items by what they add to the bound.
    order: Vec<(usize, Vec<(f64, usize)>)>,
    /// By position in the order: least error and bytes that what follows can have.
    least: Vec<Item>,
    bound: f64,
    picked: Vec<usize>,
    best: Option<Vec<usize>>,
    best_cost: f64,
    visited: usize,
}

impl<'a> Search<'a> {
    fn new(decisions: &'a [Vec<Item>], most: Item, prices: Prices, bound: f64) -> Search<'a> {
        let mut order: Vec<(usize, Vec<(f64, usize)>)> = vec![];
        for (d, items) in decisions.iter().enumerate() {
            let cheapest = prices.of(items[prices.cheapest(items)]);
            let rises = |i: usize| ((prices.of(items[i]) - cheapest).max(0.0), i);
            let useful = (0..items.len()).filter(|i| !dominated(items, *i));
            let mut rises: Vec<(f64, usize)> = useful.map(rises).collect();
            rises.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            order.push((d, rises));
        }
        let second = |rises: &[(f64, usize)]| rises.get(1).map_or(f64::INFINITY, |r| r.0);
        order.sort_by(|a, b| second(&b.1).total_cmp(&second(&a.1)).then(a.0.cmp(&b.0)));
        let mut least = vec![Item { cost: 0.0, error: 0.0, bytes: 0.0 }];
        for (d, _) in order.iter().rev() {
            let of = |f: fn(&Item) -> f64| decisions[*d].iter().map(f).fold(f64::INFINITY, f64::min);
            let last = least[least.len() - 1];
            least.push(add(last, Item { cost: of(|i| i.cost), error: of(|i| i.error), bytes: of(|i| i.bytes) }));
        }
        least.reverse();
        let picked = vec![0; decisions.len()];
        let best_cost = f64::INFINITY;
        Search { decisions, most, prices, order, least, bound, picked, best: None, best_cost, visited: 0 }
    }

    /// A good solution to begin with: prices are raised until what is cheapest under them keeps the bounds, then single
    /// decisions are improved as long as that helps.
    fn start(&mut self) {
        for step in 0..400 {
            let dear = 1.05f64.powi(step);
            let prices = Prices { error: self.prices.error * dear, bytes: self.prices.bytes * dear };
            let mut picked: Vec<usize> = self.decisions.iter().map(|items| prices.cheapest(items)).collect();
            if within(sum(self.decisions, &picked), self.most) {
                self.improve(&mut picked);
                self.offer(&picked);
                return;
            }
        }
    }

    fn improve(&self, picked: &mut [usize]) {
        loop {
            let now = sum(self.decisions, picked);
            let mut best: Option<(f64, usize, usize)> = None;
            for (d, items) in self.decisions.iter().enumerate() {
                for (i, item) in items.iter().enumerate() {
                    let old = items[picked[d]];
                    let minus = Item { cost: -old.cost, error: -old.error, bytes: -old.bytes };
                    let next = add(add(now, minus), *item);
                    if item.cost < old.cost && within(next, self.most) && best.is_none_or(|b| next.cost < b.0) {
                        best = Some((next.cost, d, i));
                    }
                }
            }
            let Some((_, d, i)) = best else { return };
            picked[d] = i;
        }
    }

    fn offer(&mut self, picked: &[usize]) {
        let found = sum(self.decisions, picked);
        if within(found, self.most) && found.cost < self.best_cost {
            (self.best, self.best_cost) = (Some(picked.to_vec()), found.cost);
        }
    }

    /// Decides `position` and what follows; `so_far` was taken before, which raised the bound by `rise`.
    fn visit(&mut self, position: usize, so_far: Item, rise: f64) {
        self.visited += 1;
        if self.visited >= NODES || !within(add(so_far, self.least[position]), self.most) {
            return;
        }
        if position == self.order.len() {
            let picked = self.picked.clone();
            self.offer(&picked);
            return;
        }
        if so_far.cost + self.least[position].cost >= self.best_cost {
            return;
        }
        for index in 0..self.order[position].1.len() {
            let (d, (more, item)) = (self.order[position].0, self.order[position].1[index]);
            if self.bound + rise + more >= self.best_cost {
                return;
            }
            self.picked[d] = item;
            self.visit(position + 1, add(so_far, self.decisions[d][item]), rise + more);
        }
    }
}

/// Another item is as good in every respect, and better in one or earlier.
fn dominated(items: &[Item], i: usize) -> bool {
    let item = items[i];
    let beats = |(j, other): (usize, &Item)| {
        let as_good = other.cost <= item.cost && other.error <= item.error && other.bytes <= item.bytes;
        as_good && j != i && (*other != item || j < i)
    };
    items.iter().enumerate().any(beats)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ir::sample::Random;

    fn brute(decisions: &[Vec<Item>], most: Item) -> Option<f64> {
        let mut best = None;
        let mut picked = vec![0; decisions.len()];
        loop {
            let found = sum(decisions, &picked);
            if within(found, most) && best.is_none_or(|b| found.cost < b) {
                best = Some(found.cost);
            }
            let Some(d) = (0..picked.len()).find(|d| picked[*d] + 1 < decisions[*d].len()) else { return best };
            picked[d] += 1;
            picked[..d].fill(0);
        }
    }

    /// Formats as they are: what is faster has more errors, by and large.
    fn instance(random: &mut Random, count: usize) -> Vec<Vec<Item>> {
        let item = |random: &mut Random, size: f64, sensitivity: f64| {
            let bits = 2.0 + 14.0 * random.unit();
            let error = sensitivity * (-bits).exp2() * (0.5 + random.unit());
            Item { cost: size * (bits + random.unit()), error, bytes: size * bits.round() }
        };
        let of = |random: &mut Random| {
            let (size, sensitivity) = (1.0 + 9.0 * random.unit(), random.unit());
            (0..1 + random.below(5)).map(|_| item(random, size, sensitivity)).collect()
        };
        (0..count).map(|_| of(random)).collect()
    }

    #[test]
    fn equal_to_brute_force() {
        let (mut feasible, mut bounded) = (0, 0);
        for seed in 0..400 {
            let mut random = Random::new(seed);
            let count = 1 + random.below(6);
            let decisions = instance(&mut random, count);
            let at = |f: &dyn Fn(&Item) -> f64, share: f64| {
                let of = |pick: fn(f64, f64) -> f64, from: f64| -> f64 {
                    decisions.iter().map(|i| i.iter().map(f).fold(from, pick)).sum()
                };
                let (least, most) = (of(f64::min, f64::INFINITY), of(f64::max, 0.0));
                least + (most - least) * share
            };
            let error = if random.chance(0.2) { f64::INFINITY } else { at(&|i| i.error, random.unit() - 0.05) };
            let bytes = if random.chance(0.3) { f64::INFINITY } else { at(&|i| i.bytes, random.unit() - 0.05) };
            let most = Item { cost: 0.0, error, bytes };
            let (found, expected) = (solve(&decisions, most), brute(&decisions, most));
            assert_eq!(found.is_some(), expected.is_some(), "seed {seed}");
            let (Some(found), Some(expected)) = (found, expected) else { continue };
            assert!(found.complete && (found.sum.cost - expected).abs() <= 1e-9 * expected, "seed {seed}: {found:?}");
            assert!(within(found.sum, most), "seed {seed}");
            feasible += 1;
            bounded += usize::from(expected > at(&|i| i.cost, 0.0) * 1.0001);
        }
        assert!(feasible > 200 && bounded > 100, "{feasible} {bounded}: the bounds are too loose to test anything");
    }

    #[test]
    fn as_many_decisions_as_a_model_has() {
        let mut random = Random::new(5);
        let decisions = instance(&mut random, 40);
        let most: f64 = decisions.iter().map(|i| i.iter().map(|i| i.error).fold(0.0, f64::max)).sum();
        let most = Item { cost: 0.0, error: most / 10.0, bytes: f64::INFINITY };
        let found = solve(&decisions, most).unwrap();
        assert!(found.sum.cost <= found.bound * 1.001, "{found:?}");
        assert_eq!(solve(&decisions, most).unwrap(), found);
    }

    #[test]
    fn ties_go_to_the_first() {
        let item = Item { cost: 1.0, error: 1.0, bytes: 1.0 };
        let most = Item { cost: 0.0, error: 2.0, bytes: 2.0 };
        assert_eq!(solve(&[vec![item, item], vec![item, item]], most).unwrap().picked, [0, 0]);
    }
}
