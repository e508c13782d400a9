//! Figures -> places on a page: axes, roofs, points, bars. The template draws what stands here and computes nothing.

use super::memory::Timeline;
use super::pricing::Phase;
use super::story::{Formats, Point};
use super::text::{bytes, figure, percent, seconds};
use mansard_ir::Machine;
use serde::Serialize;
use std::ops::RangeInclusive;

/// Size of every plot in units of its own, and the margins for its axes.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 44.0;

/// A plot.
#[derive(Debug, Default, Serialize)]
pub struct Plot {
    /// Of the view box.
    pub width: f64,
    /// Of the view box.
    pub height: f64,
    /// Of the frame: left, top, right, bottom.
    pub frame: [f64; 4],
    /// What the axes mean.
    pub axes: [String; 2],
    /// Place and label.
    pub x: Vec<(f64, String)>,
    /// Place and label.
    pub y: Vec<(f64, String)>,
    /// Lines with a name: points, name, where it stands, and the class that colours it.
    pub lines: Vec<Line>,
    /// Kernels, or combinations of formats.
    pub marks: Vec<Mark>,
    /// Buffers.
    pub bars: Vec<Bar>,
}

/// A line.
#[derive(Debug, Serialize)]
pub struct Line {
    /// As SVG takes them.
    pub points: String,
    /// Written at its end.
    pub name: String,
    /// Where.
    pub at: (f64, f64),
    /// Of the style sheet.
    pub class: String,
}

/// A point.
#[derive(Debug, Serialize)]
pub struct Mark {
    /// Where it is predicted.
    pub x: f64,
    /// Where it is predicted.
    pub y: f64,
    /// Where it was measured.
    pub measured: Option<f64>,
    /// What stands beside it.
    pub label: String,
    /// Of the style sheet.
    pub class: String,
    /// All there is to say.
    pub title: String,
}

/// A rectangle.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Bar {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
    /// Of the style sheet.
    pub class: String,
    /// What it is.
    pub title: String,
}

/// One axis: values to places.
struct Axis {
    from: f64,
    to: f64,
    places: (f64, f64),
    log: bool,
}

impl Axis {
    /// Whole powers of ten around the values; what is no positive number is not looked at.
    fn decades(values: impl Iterator<Item = f64>, places: (f64, f64)) -> Axis {
        let (mut from, mut to) = (f64::INFINITY, 0f64);
        for value in values.filter(|v| *v > 0.0 && v.is_finite()) {
            (from, to) = (from.min(value), to.max(value));
        }
        if from > to {
            (from, to) = (1.0, 10.0);
        }
        let (from, to) = (10f64.powf((from * 0.99).log10().floor()), 10f64.powf((to * 1.01).log10().ceil()));
        Axis { from, to, places, log: true }
    }

    fn linear(from: f64, to: f64, places: (f64, f64)) -> Axis {
        Axis { from, to: if to > from { to } else { from + 1.0 }, places, log: false }
    }

    fn at(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value.max(self.from) / self.from).ln() / (self.to / self.from).ln(),
            false => (value - self.from) / (self.to - self.from),
        };
        let place = self.places.0 + share.clamp(0.0, 1.0) * (self.places.1 - self.places.0);
        (place * 10.0).round() / 10.0
    }

    /// Decades, or some five round steps.
    fn ticks(&self, label: impl Fn(f64) -> String) -> Vec<(f64, String)> {
        let values: Vec<f64> = match self.log {
            true => {
                let exponents: RangeInclusive<i32> = self.from.log10().round() as i32..=self.to.log10().round() as i32;
                exponents.map(|e| 10f64.powi(e)).collect()
            }
            false => {
                let step = (self.to - self.from) / 5.0;
                let unit = 10f64.powf(step.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].map(|f| f * unit).into_iter().find(|s| *s >= step).unwrap_or(step);
                let first = (self.from / step).ceil() as i64;
                (first..).map(|i| i as f64 * step).take_while(|v| *v <= self.to).collect()
            }
        };
        values.into_iter().map(|v| (self.at(v), label(v))).collect()
    }
}

fn frame(height: f64) -> Plot {
    let frame = [LEFT, TOP, WIDTH - RIGHT, height - BOTTOM];
    Plot { width: WIDTH, height, frame, ..Plot::default() }
}

fn columns() -> (f64, f64) {
    (LEFT, WIDTH - RIGHT)
}

fn lines(height: f64) -> (f64, f64) {
    (height - BOTTOM, TOP)
}

/// Every kernel of a phase under the roofs of the machine. One without operations stands on the floor.
pub fn roofline(phase: &Phase, machine: &Machine) -> Plot {
    let rate = |operations: f64, seconds: f64| if seconds > 0.0 { operations / seconds } else { 0.0 };
    let rates = phase.kernels.iter().flat_map(|row| {
        [Some(row.predicted), row.measured].into_iter().flatten().map(|seconds| rate(row.operations, seconds))
    });
    let roofs = [("int8", machine.peak_i8), ("bf16", machine.peak_bf16), ("f32", machine.peak_f32)];
    let ridges = roofs.iter().map(|(_, peak)| peak / machine.bandwidth);
    let x = Axis::decades(phase.kernels.iter().map(|row| row.intensity).chain(ridges.map(|r| 2.0 * r)), columns());
    let y = Axis::decades(rates.chain(roofs.map(|(_, peak)| 1.5 * peak)), lines(HEIGHT));
    let mut plot = frame(HEIGHT);
    plot.axes = ["operations a byte of weights, activations and caches".into(), "operations a second".into()];
    (plot.x, plot.y) = (x.ticks(power), y.ticks(figure));
    let sloped = |name: &str, bandwidth: f64, peak: f64, class: &str| {
        let (low, ridge) = (x.from.max(y.from / bandwidth), peak / bandwidth);
        let ends = [(low, low * bandwidth), (ridge, peak)];
        let points: Vec<String> = ends.iter().map(|(a, b)| format!("{},{}", x.at(*a), y.at(*b))).collect();
        let middle = (low * ridge).sqrt();
        let at = (x.at(middle) - 6.0, y.at(middle * bandwidth) - 6.0);
        Line { points: points.join(" "), name: name.into(), at, class: class.into() }
    };
    let most = roofs.iter().map(|(_, peak)| *peak).fold(0.0, f64::max);
    plot.lines.push(sloped(&format!("memory {:.0} GB/s", machine.bandwidth / 1e9), machine.bandwidth, most, "memory"));
    if machine.cache_bandwidth > machine.bandwidth {
        let name = format!("cache {:.0} GB/s", machine.cache_bandwidth / 1e9);
        plot.lines.push(sloped(&name, machine.cache_bandwidth, most, "cache"));
    }
    let mut known: Vec<f64> = vec![];
    for (name, peak) in roofs {
        let name = match known.contains(&peak) {
            true => continue,
            false => format!("{name} {}FLOP/s", figure(peak)),
        };
        known.push(peak);
        let (from, to, height) = (x.at(peak / machine.cache_bandwidth.max(machine.bandwidth)), columns().1, y.at(peak));
        let at = (to - 4.0, height - 5.0);
        plot.lines.push(Line { points: format!("{from},{height} {to},{height}"), name, at, class: "peak".into() });
    }
    for row in &phase.kernels {
        let measured = row.measured.map(|s| y.at(rate(row.operations, s)));
        let time = row.measured.map_or(String::new(), |s| format!(", measured {}", seconds(s)));
        let title = format!(
            "{}: {} x {}, predicted {}{time}, {} of the roof",
            row.kernel,
            row.launches,
            row.kind,
            seconds(row.predicted),
            percent(row.roof_share)
        );
        let (x, y) = (x.at(row.intensity), y.at(rate(row.operations, row.predicted)));
        plot.marks.push(Mark { x, y, measured, label: row.number.to_string(), class: row.computes.clone(), title });
    }
    apart(&mut plot.marks);
    plot
}

/// Labels that would lie on each other become one: `2, 5`.
fn apart(marks: &mut [Mark]) {
    for later in 1..marks.len() {
        let (before, rest) = marks.split_at_mut(later);
        let mark = &mut rest[0];
        let near = |m: &&mut Mark| !m.label.is_empty() && (m.x - mark.x).abs() < 15.0 && (m.y - mark.y).abs() < 11.0;
        if let Some(first) = before.iter_mut().find(near) {
            first.label = format!("{},{}", first.label, mark.label);
            mark.label.clear();
        }
    }
}

fn power(x: f64) -> String {
    if (0.01..1e4).contains(&x) { format!("{x}") } else { format!("{x:.0e}") }
}

/// Accuracy against time: the fastest for some budgets, and what was chosen.
pub fn front(formats: &Formats) -> Plot {
    let points = || formats.front.iter().chain([&formats.chosen]);
    let x = Axis::decades(points().map(|p| p.error), columns());
    let (least, most) = points().fold((f64::INFINITY, 0f64), |(a, b), p| (a.min(p.seconds), b.max(p.seconds)));
    let room = 0.1 * (most - least).max(0.01 * most);
    let y = Axis::linear((least - room).max(0.0), most + room, lines(HEIGHT));
    let mut plot = frame(HEIGHT);
    plot.axes = ["predicted KL divergence, nats".into(), "predicted time of the workload".into()];
    (plot.x, plot.y) = (x.ticks(power), y.ticks(seconds));
    let stairs: Vec<String> = formats.front.iter().map(|p| format!("{},{}", x.at(p.error), y.at(p.seconds))).collect();
    let line =
        |points: String, name: &str, at, class: &str| Line { points, name: name.into(), at, class: class.into() };
    plot.lines.push(line(stairs.join(" "), "", (0.0, 0.0), "front"));
    let budget = x.at(formats.decided.max_kld);
    let ends = format!("{budget},{TOP} {budget},{}", HEIGHT - BOTTOM);
    plot.lines.push(line(ends, "budget", (budget - 5.0, TOP + 14.0), "cache"));
    let mark = |p: &Point, class: &str, label: &str| Mark {
        x: x.at(p.error),
        y: y.at(p.seconds),
        measured: (class == "chosen").then(|| y.at(p.seconds)),
        label: label.into(),
        class: class.into(),
        title: format!("KL divergence {:.2e}, {}, {}", p.error, seconds(p.seconds), bytes(p.bytes)),
    };
    plot.marks = formats.front.iter().map(|p| mark(p, "f32", "")).collect();
    plot.marks.push(mark(&formats.chosen, "chosen", "chosen"));
    plot
}

/// Launches that are shown: layers repeat.
const SHOWN: usize = 64;

/// Buffers over the first launches of a step: time to the right, the arena upwards.
pub fn lifetimes(step: &Timeline) -> Plot {
    let height = 300.0;
    let shown = step.launches.min(SHOWN);
    let end = step.buffers.iter().map(|b| b.offset + b.bytes).filter(|end| *end > 0).max().unwrap_or(1);
    let x = Axis::linear(0.0, shown as f64, columns());
    let y = Axis::linear(0.0, end as f64, lines(height));
    let mut plot = frame(height);
    plot.axes = ["launches of a step".into(), "offset in the arena".into()];
    (plot.x, plot.y) = (x.ticks(|v| format!("{v}")), y.ticks(bytes));
    let mut names: Vec<&str> = vec![];
    for life in step.buffers.iter().filter(|life| life.first < shown) {
        let index = names.iter().position(|n| *n == life.name).unwrap_or_else(|| {
            names.push(&life.name);
            names.len() - 1
        });
        let (left, right) = (x.at(life.first as f64), x.at(life.last as f64 + 1.0));
        let (top, bottom) = (y.at((life.offset + life.bytes) as f64), y.at(life.offset as f64));
        plot.bars.push(Bar {
            x: left,
            y: top,
            width: (right - left - 1.0).max(1.0),
            height: (bottom - top - 0.5).max(0.5),
            class: format!("buffer{}", index % 6),
            title: format!("{}: {} from launch {} to {}", life.name, bytes(life.bytes as f64), life.first, life.last),
        });
    }
    plot
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_their_values() {
        let axis = Axis::decades([3.0, 0.0, f64::NAN, 4000.0].into_iter(), (0.0, 100.0));
        assert_eq!((axis.from, axis.to), (1.0, 10000.0));
        assert_eq!([1.0, 100.0, 1e9, 0.0].map(|v| axis.at(v)), [0.0, 50.0, 100.0, 0.0]);
        assert_eq!(axis.ticks(power).len(), 5);
        let none = Axis::decades(std::iter::empty(), (0.0, 1.0));
        assert!(none.at(f64::INFINITY) <= 1.0);
        let linear = Axis::linear(0.0, 64.0, (0.0, 640.0));
        assert_eq!(
            linear.ticks(|v| format!("{v}")).iter().map(|t| t.1.as_str()).collect::<Vec<_>>(),
            ["0", "20", "40", "60"]
        );
    }
}
