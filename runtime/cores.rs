//! The machine's cores -> how many workers there are by default, and the processor each keeps to where that is wanted.
//!
//! ```text
//!  processors 0 1 2 3 of cores a a b b   ->   workers 0 1 2 3 on processors 0 2 1 3: each core first gets one
//! ```

use crate::memory::Cpus;
use mansard_ir::{Result, bail};
use std::collections::BTreeSet;

/// Cores this process may use, counting the hardware threads of one core once.
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    let Ok(allowed) = Cpus::mine() else { return logical };
    let cores: BTreeSet<_> = allowed.list().into_iter().map(core_of).collect();
    logical.min(cores.len().max(1))
}

/// A processor for each of `threads` workers.
///
/// # Errors
/// Where there are fewer processors, or the system does not say.
pub fn placement(threads: usize) -> Result<Vec<Cpus>> {
    let allowed = Cpus::mine()?.list();
    if threads > allowed.len() {
        let found = allowed.len();
        bail!(
            Usage,
            "expected at most {found} threads, as many as there are processors to pin them to, found {threads}"
        );
    }
    let order = spread(&allowed.iter().map(|cpu| (*cpu, core_of(*cpu))).collect::<Vec<_>>());
    order.into_iter().take(threads).map(Cpus::one).collect()
}

/// Processors in the order in which workers get them: one of each core, then a second of each core, and so on.
fn spread<C: Ord>(cpus: &[(usize, C)]) -> Vec<usize> {
    let mut order: Vec<(usize, usize)> = vec![];
    for (i, (cpu, core)) in cpus.iter().enumerate() {
        let siblings_before = cpus[..i].iter().filter(|(_, c)| c == core).count();
        order.push((siblings_before, *cpu));
    }
    order.sort_unstable();
    order.into_iter().map(|(_, cpu)| cpu).collect()
}

/// A level of caches of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CacheLevel {
    /// 1, 2, 3...
    pub level: usize,
    /// Bytes of one of them.
    pub bytes: usize,
    /// Processors that share it.
    pub sharers: usize,
}

/// The caches of a processor this process may use, the nearest first; none where the system does not say.
pub fn caches() -> Vec<CacheLevel> {
    let cpu = Cpus::mine().ok().and_then(|cpus| cpus.list().first().copied()).unwrap_or(0);
    let index = |i: usize| {
        let read = |name| {
            let text =
                std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/cache/index{i}/{name}")).ok()?;
            Some(text.trim().to_string())
        };
        if read("type")? == "Instruction" {
            return None;
        }
        let (size, level) = (read("size")?, read("level")?.parse().ok()?);
        let kib: usize = size.strip_suffix('K')?.parse().ok()?;
        Some(CacheLevel { level, bytes: kib.checked_mul(1024)?, sharers: processors(&read("shared_cpu_list")?)? })
    };
    let mut caches: Vec<CacheLevel> = (0..8).filter_map(index).collect();
    caches.sort_unstable();
    caches
}

/// How many there are in a list such as `0-3,8`.
fn processors(list: &str) -> Option<usize> {
    let part = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
    };
    list.split(',').map(part).sum()
}

/// Names the core of a processor; itself where the system does not say.
fn core_of(cpu: usize) -> (String, String) {
    let read = |name| std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/{name}"));
    match (read("physical_package_id"), read("core_id")) {
        (Ok(package), Ok(core)) => (package, core),
        _ => (String::new(), cpu.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_core_first_gets_one_worker() {
        assert_eq!(spread(&[(0, 'a'), (1, 'a'), (2, 'b'), (3, 'b'), (7, 'c')]), [0, 2, 7, 1, 3]);
        assert_eq!(spread(&[(4, 'a'), (5, 'b')]), [4, 5]);
    }

    #[test]
    fn lists_of_processors_are_counted() {
        assert_eq!(
            [processors("0"), processors("0-3,8"), processors("3-1"), processors("")],
            [Some(1), Some(5), None, None]
        );
        assert!(caches().is_sorted());
    }

    #[test]
    fn there_is_a_core() {
        let cores = physical_cores();
        assert!(cores >= 1);
        assert_eq!(placement(cores).unwrap().len(), cores);
        assert_eq!(placement(usize::MAX).unwrap_err().exit_code(), 2);
    }
}
