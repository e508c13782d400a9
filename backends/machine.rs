//! Machine files -> rooflines: what a machine computes, reads and waits, for one number of workers or several.
//!
//! ```text
//! machines/x86-64-v4.toml   [[workers]] count = 8, memory = 240 GB/s   --roofline(4)-->   bandwidth 120e9
//! ```
//!
//! Figures are stated or measured (`mansard probe`); `machines/README.md` explains every key. Invariant: a table that was
//! parsed has memory and f32 figures for ascending counts of workers, and none of them is absurd.

use mansard_ir::costs::Costs;
use mansard_ir::{Error, Kind, Machine, Place, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// A machine file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineTable {
    /// Of the machine.
    pub name: String,
    /// `x86_64`, `aarch64`; of a GPU `sm_80`, `sm_90a`.
    pub arch: String,
    /// As LLVM names it.
    pub processor: String,
    /// The day, `2026-11-21`; absent from stated figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<String>,
    /// KiB of each level: of one worker's, or of the one that all share.
    pub cache_kib: BTreeMap<Level, u64>,
    /// By ascending count.
    pub workers: Vec<Workers>,
    /// What kernels were measured to take, as multiples of what these figures say.
    #[serde(default, skip_serializing_if = "Costs::is_empty")]
    pub costs: Costs,
}

/// Figures of `count` workers at work together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workers {
    /// Threads; of a GPU its multiprocessors.
    pub count: usize,
    /// Microseconds to start a step.
    pub launch_us: f64,
    /// Microseconds from the end of a launch to the begin of a dependent one.
    pub barrier_us: f64,
    /// MiB, ascending, and 10^9 bytes per second that are read of so many again and again; empty where that was not measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub again: Vec<(f64, f64)>,
    /// 10^9 bytes read per second.
    pub gb_per_s: BTreeMap<Level, f64>,
    /// 10^9 operations per second.
    pub gop_per_s: BTreeMap<Peak, f64>,
}

/// Where bytes are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Level {
    L1,
    L2,
    L3,
    Memory,
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Peak {
    F32,
    Bf16,
    F16,
    I8,
    Fp8,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["l1", "l2", "l3", "memory"][*self as usize])
    }
}

impl fmt::Display for Peak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["f32", "bf16", "f16", "i8", "fp8"][*self as usize])
    }
}

impl MachineTable {
    /// Reads a machine file's text.
    ///
    /// # Errors
    /// Names the key, what it should hold and what it holds.
    pub fn parse(text: &str) -> Result<MachineTable> {
        let line = |e: &toml::de::Error| {
            let at = e.span().map_or(0, |span| span.start.min(text.len()));
            format!("line {}", 1 + text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count())
        };
        let broken = |e: &toml::de::Error| Error::new(Kind::Input, e.message().replace('\n', ", ")).at(line(e));
        let file = toml::Deserializer::parse(text).map_err(|e| broken(&e))?;
        let table: MachineTable = serde_path_to_error::deserialize(file).map_err(|e| match e.path().to_string() {
            path if path == "." => broken(e.inner()),
            path => Error::new(Kind::Input, e.inner().message()).at(format!("`{path}`")),
        })?;
        table.check()?;
        Ok(table)
    }

    /// The same as a file's text.
    ///
    /// # Errors
    /// None that is expected.
    pub fn text(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::new(Kind::Internal, format!("machine file: {e}")))
    }

    fn check(&self) -> Result<()> {
        for (level, kib) in &self.cache_kib {
            if *level == Level::Memory {
                bail!(Input, "`cache_kib.memory`: expected caches l1, l2 and l3, found memory");
            }
            within(*kib as f64, (1.0, 1e9)).at(|| format!("`cache_kib.{level}`"))?;
        }
        if self.workers.is_empty() {
            bail!(Input, "`workers`: expected figures for at least one count of workers, found none");
        }
        for (i, row) in self.workers.iter().enumerate() {
            row.check(self).at(|| format!("`workers[{i}]`"))?;
        }
        if let Some(i) = self.workers.windows(2).position(|pair| pair[0].count >= pair[1].count) {
            let (before, found) = (self.workers[i].count, self.workers[i + 1].count);
            bail!(Input, "`workers[{}]`: `count`: expected more than the {before} before, found {found}", i + 1);
        }
        self.costs.check()
    }

    /// The roofline of all its workers.
    pub fn whole(&self) -> Machine {
        self.roofline(self.workers.last().map_or(1, |w| w.count))
    }

    /// The roofline of so many workers.
    pub fn roofline(&self, threads: usize) -> Machine {
        let giga = |figure: Option<&f64>| 1e9 * figure.copied().unwrap_or(0.0);
        let mut levels = self.cache_kib.iter().rev();
        let last = levels.next().map_or(Level::Memory, |(level, _)| *level);
        // The one before the last is every worker's own.
        let own = levels.next().map(|(level, kib)| (*level, 1024.0 * *kib as f64 * threads as f64));
        let (near, near_bytes) = own.unwrap_or((last, 0.0));
        let readers = threads.min(self.workers.last().map_or(1, |w| w.count));
        let peak = |peak| self.rate(threads, |w| giga(w.gop_per_s.get(&peak).or_else(|| w.gop_per_s.get(&Peak::F32))));
        Machine {
            threads,
            bandwidth: self.rate(readers, |w| giga(w.gb_per_s.get(&Level::Memory))),
            near_bandwidth: self.rate(threads, |w| giga(w.gb_per_s.get(&near))),
            near_bytes,
            cache_bandwidth: self.rate(threads, |w| giga(w.gb_per_s.get(&last))),
            cache_bytes: 1024.0 * self.cache_kib.get(&last).copied().unwrap_or(0) as f64,
            peak_f32: peak(Peak::F32),
            peak_bf16: peak(Peak::Bf16),
            peak_i8: peak(Peak::I8),
            barrier: 1e-6 * self.near(threads, |w| w.barrier_us),
        }
    }

    /// The roofline of so many workers that read so many bytes again and again, some of which the last cache keeps. Where that was
    /// not measured: all up to half of its size, none from twice on.
    pub fn reading(&self, threads: usize, bytes: f64) -> Machine {
        let machine = self.roofline(threads);
        if self.workers.iter().all(|w| !w.again.is_empty()) {
            let readers = threads.min(self.workers.last().map_or(1, |w| w.count));
            return Machine { bandwidth: self.rate(readers, |w| 1e9 * w.again(bytes / 1024.0 / 1024.0)), ..machine };
        }
        let kept = (1.0 - (2.0 * bytes / machine.cache_bytes.max(1.0)).log(4.0)).clamp(0.0, 1.0);
        let gained = (machine.cache_bandwidth - machine.bandwidth).max(0.0);
        Machine { bandwidth: machine.bandwidth + kept * gained, ..machine }
    }

    /// A figure that grows with the workers, also beyond the counts that there are figures for.
    fn rate(&self, threads: usize, figure: impl Fn(&Workers) -> f64) -> f64 {
        let counts = self.workers.iter().map(|w| w.count);
        let nearest = threads.clamp(counts.clone().min().unwrap_or(1), counts.max().unwrap_or(1));
        self.near(threads, figure) * threads as f64 / nearest as f64
    }

    /// On the line between the neighbouring counts; that of the nearest count where there are none on both sides.
    fn near(&self, threads: usize, figure: impl Fn(&Workers) -> f64) -> f64 {
        let after = self.workers.iter().position(|w| w.count >= threads);
        match (after.and_then(|i| self.workers[..i].last()), after.map(|i| &self.workers[i]), self.workers.last()) {
            (Some(a), Some(b), _) => {
                let share = (threads - a.count) as f64 / (b.count - a.count) as f64;
                figure(a) * (1.0 - share) + figure(b) * share
            }
            (None, Some(only), _) | (_, None, Some(only)) => figure(only),
            _ => 0.0,
        }
    }
}

impl Workers {
    /// 10^9 bytes per second that are read of `mib` again and again, on the line between neighbours.
    fn again(&self, mib: f64) -> f64 {
        let after = self.again.iter().position(|(size, _)| *size >= mib);
        let at = |i: usize| self.again[i.min(self.again.len() - 1)];
        match after {
            Some(i) if i > 0 => {
                let ((a, from), (b, to)) = (at(i - 1), at(i));
                from + (to - from) * (mib - a) / (b - a)
            }
            Some(_) => at(0).1,
            None => at(usize::MAX).1,
        }
    }

    fn check(&self, table: &MachineTable) -> Result<()> {
        within(self.count as f64, (1.0, 1e6)).at(|| "`count`".into())?;
        for (key, value) in [("launch_us", self.launch_us), ("barrier_us", self.barrier_us)] {
            within(value, (1e-4, 1e6)).at(|| format!("`{key}`"))?;
        }
        for (level, rate) in &self.gb_per_s {
            within(*rate, (1e-2, 1e7)).at(|| format!("`gb_per_s.{level}`"))?;
        }
        for (peak, rate) in &self.gop_per_s {
            within(*rate, (1e-2, 1e9)).at(|| format!("`gop_per_s.{peak}`"))?;
        }
        for (mib, rate) in &self.again {
            within(*mib, (1e-3, 1e7)).and_then(|()| within(*rate, (1e-2, 1e7))).at(|| "`again`".into())?;
        }
        if let Some(pair) = self.again.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            bail!(Input, "`again`: expected more MiB than the {} before, found {}", pair[0].0, pair[1].0);
        }
        let mut levels = table.cache_kib.keys().chain([&Level::Memory]);
        if let Some(level) = levels.find(|level| !self.gb_per_s.contains_key(level)) {
            bail!(Input, "`gb_per_s.{level}`: expected gigabytes per second, found nothing");
        }
        if !self.gop_per_s.contains_key(&Peak::F32) {
            bail!(Input, "`gop_per_s.f32`: expected 10^9 operations per second, found nothing");
        }
        Ok(())
    }
}

/// Refuses what no machine has.
fn within(found: f64, (least, most): (f64, f64)) -> Result<()> {
    // Also what is no number.
    if (least..=most).contains(&found) {
        return Ok(());
    }
    bail!(Input, "expected {least} to {most}, found {found}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
name = "two"
arch = "x86_64"
processor = "znver4"
measured = "2026-11-21"
[cache_kib]
l1 = 32
l3 = 1024
[[workers]]
count = 1
launch_us = 2.5
barrier_us = 0.1
gb_per_s = { l1 = 200, l3 = 60, memory = 30 }
gop_per_s = { f32 = 100, i8 = 400 }
[[workers]]
count = 3
launch_us = 4.5
barrier_us = 0.3
gb_per_s = { l1 = 600, l3 = 120, memory = 40 }
gop_per_s = { f32 = 300, i8 = 1200 }
[[costs]]
of = { kind = "contract", format = "q4_1", ops = "matmul" }
launch_us = 0.5
factor = 1.5
tokens = { min = 1, max = 8 }
"#;

    #[test]
    fn what_is_written_is_read() {
        let table = MachineTable::parse(TWO).unwrap();
        assert_eq!(MachineTable::parse(&table.text().unwrap()).unwrap(), table);
    }

    #[test]
    fn figures_lie_between_neighbours_and_memory_ends_at_the_last() {
        let table = MachineTable::parse(TWO).unwrap();
        let figures = |threads| {
            let m = table.roofline(threads);
            [m.bandwidth, m.cache_bandwidth, m.peak_f32, m.peak_bf16, m.peak_i8].map(|x| x / 1e9)
        };
        assert_eq!(figures(1), [30.0, 60.0, 100.0, 100.0, 400.0]);
        assert_eq!(figures(2), [35.0, 90.0, 200.0, 200.0, 800.0]);
        assert_eq!(figures(3), [40.0, 120.0, 300.0, 300.0, 1200.0]);
        assert_eq!(figures(6), [40.0, 240.0, 600.0, 600.0, 2400.0]);
        assert_eq!([1, 2, 9].map(|n| table.roofline(n).barrier * 1e7), [1.0, 2.0, 3.0]);
        assert_eq!(table.whole(), table.roofline(3));
        assert_eq!((table.roofline(2).threads, table.roofline(2).cache_bytes), (2, 1048576.0));
    }

    #[test]
    fn what_a_cache_keeps_is_read_from_there() {
        let table = MachineTable::parse(TWO).unwrap();
        let rate = |kib: f64| table.reading(1, kib * 1024.0).bandwidth / 1e9;
        assert_eq!([512.0, 1024.0, 2048.0, 1e6].map(rate), [60.0, 45.0, 30.0, 30.0]);
        let machine = table.roofline(3);
        assert_eq!([1e3, 2e4, 9e4, 2e6].map(|bytes| machine.near(bytes) / 1e9), [600.0, 600.0, 120.0, 40.0]);
    }

    #[test]
    fn what_was_measured_of_a_size_is_taken() {
        let text = TWO.replace("count = 1\n", "count = 1\nagain = [[1, 60], [3, 40]]\n");
        // Of some counts only: as if of none.
        assert_eq!(MachineTable::parse(&text).unwrap().reading(1, 1e9).bandwidth, 30e9);
        let text = text.replace("count = 3\n", "count = 3\nagain = [[1, 120], [3, 50]]\n");
        let table = MachineTable::parse(&text).unwrap();
        let rate = |threads, mib: f64| table.reading(threads, mib * 1024.0 * 1024.0).bandwidth / 1e9;
        assert_eq!([0.5, 1.0, 2.0, 3.0, 9.0].map(|mib| rate(1, mib)), [60.0, 60.0, 50.0, 40.0, 40.0]);
        assert_eq!([rate(3, 2.0), rate(9, 2.0)], [85.0, 85.0]);
        assert_eq!(MachineTable::parse(&table.text().unwrap()).unwrap(), table);
        let error = MachineTable::parse(&text.replace("[3, 50]", "[1, 50]")).unwrap_err().to_string();
        assert!(error.contains("`workers[1]`") && error.contains("more MiB than the 1 before"), "{error}");
    }

    #[test]
    fn damage_is_named() {
        let says = |from: &str, to: &str, words: &[&str]| {
            assert!(TWO.contains(from));
            let error = MachineTable::parse(&TWO.replacen(from, to, 1)).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            for word in words {
                assert!(error.to_string().contains(word), "expected {word:?} in {error}");
            }
        };
        says("launch_us = 2.5", "launch_us = \"2.5\"", &["`workers[0].launch_us`", "string", "expected f64"]);
        says("memory = 30", "memory = -30", &["`workers[0]`", "`gb_per_s.memory`", "expected 0.01 to", "found -30"]);
        says("memory = 40", "memory = nan", &["`workers[1]`", "found NaN"]);
        says("f32 = 300, ", "", &["`workers[1]`", "`gop_per_s.f32`", "found nothing"]);
        says("l3 = 120, ", "", &["`workers[1]`", "`gb_per_s.l3`", "found nothing"]);
        says("i8 = 400", "int8 = 400", &["`workers[0].gop_per_s", "int8", "expected one of"]);
        says("count = 3", "count = 1", &["`workers[1]`", "`count`", "more than the 1 before, found 1"]);
        says("count = 1", "count = 0", &["`workers[0]`", "`count`", "found 0"]);
        says("factor = 1.5", "factor = 1e9", &["costs[0]", "`factor`", "found 1000000000"]);
        says("max = 8", "max = 0", &["costs[0]", "`tokens`", "found 1 to 0"]);
        says("arch =", "arc =", &["unknown field `arc`", "`arch`"]);
        says("[cache_kib]", "[cache_kib", &["line 6"]);
        says("l1 = 32", "memory = 32", &["`cache_kib.memory`"]);
        assert!(MachineTable::parse("").unwrap_err().to_string().contains("missing field"));
    }

    #[test]
    fn damaged_text_does_not_panic() {
        for at in 0..TWO.len() {
            let _ = MachineTable::parse(&TWO[..at]);
            let mut damaged = TWO.as_bytes().to_vec();
            damaged[at] ^= 0x15;
            let _ = MachineTable::parse(&String::from_utf8_lossy(&damaged));
        }
    }
}
