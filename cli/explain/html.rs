//! The explanation as a page of one file: the template `report.html`, which escapes whatever it is given.

use super::gather::Explanation;
use super::{plot, text};
use crate::report;
use mansard_ir::{Error, Kind, Result};
use minijinja::{Environment, Value, context};

/// The page. Its name ends in `.html`, so that values are escaped.
const TEMPLATE: (&str, &str) = ("report.html", include_str!("report.html"));

/// Ranges of tokens whose memory is drawn: the first and the last.
const DRAWN: usize = 2;

/// Fills in the template.
///
/// # Errors
/// Where the template is wrong: a broken invariant.
pub fn page(found: &Explanation) -> Result<String> {
    let broken = |e: minijinja::Error| Error::new(Kind::Internal, format!("report.html: {e}"));
    let mut environment = Environment::new();
    environment.add_template(TEMPLATE.0, TEMPLATE.1).map_err(broken)?;
    let template = environment.get_template(TEMPLATE.0).map_err(broken)?;
    template.render(values(found)).map_err(broken)
}

fn values(found: &Explanation) -> Value {
    let machine = &found.machine.figures;
    let phases = found.phases.iter().map(|phase| {
        context! {
            name => phase.name, depth => phase.depth,
            plot => plot::roofline(phase, machine),
            rows => phase.kernels.iter().map(text::cells).collect::<Vec<_>>(),
            total => text::cells(&phase.total),
            measured => phase.total.measured.is_some(),
            lines => text::closing(phase, machine.bandwidth),
        }
    });
    let steps = found.memory.steps.iter();
    let ends = steps.clone().enumerate().filter(|(i, _)| *i == 0 || i + 1 == found.memory.steps.len()).take(DRAWN);
    let drawn = ends.map(|(_, step)| {
        context! {
            tokens => step.tokens, launches => step.launches, peak => report::bytes(step.peak),
            plot => plot::lifetimes(step),
        }
    });
    let kernels = found.kernels.iter().map(|story| {
        context! {
            story => story,
            derivations => story.derivations.iter().map(text::weighed).collect::<Vec<_>>(),
        }
    });
    let share = |share: &super::gather::Share| {
        vec![
            share.format.clone(),
            share.count.to_string(),
            text::figure(share.elements as f64),
            report::bytes(share.bytes),
        ]
    };
    let decisions = found.formats.iter().flat_map(|formats| &formats.decided.decisions).map(|decision| {
        let alternatives = decision.alternatives.iter().enumerate().map(|(index, a)| {
            let figures = [text::seconds(a.seconds), report::bytes(a.bytes), format!("{:.1e}", a.error)];
            context! { format => a.format, figures => figures, picked => index == decision.picked }
        });
        let chosen = decision.alternatives.get(decision.picked).map(|a| a.format.clone());
        context! { name => decision.name, chosen => chosen, alternatives => alternatives.collect::<Vec<_>>() }
    });
    context! {
        artifact => found.artifact,
        facts => text::facts(found),
        head => text::HEAD,
        phases => phases.collect::<Vec<_>>(),
        memory => memory(found),
        drawn => drawn.collect::<Vec<_>>(),
        growth => found.memory.growth.iter().map(|(n, b)| (*n, report::bytes(*b))).collect::<Vec<_>>(),
        weights => found.weights.iter().map(share).collect::<Vec<_>>(),
        caches => found.caches.iter().map(share).collect::<Vec<_>>(),
        approximations => found.approximations,
        front => found.formats.as_ref().map(plot::front),
        budget => found.formats.as_ref().map(|f| &f.decided),
        decisions => decisions.collect::<Vec<_>>(),
        not_searched => text::NOT_SEARCHED,
        not_evaluated => text::NOT_EVALUATED,
        quality => found.quality.as_ref().map(|quality| quality.figures()),
        layers => layers(found),
        kernels => kernels.collect::<Vec<_>>(),
        provenance => found.provenance,
    }
}

/// Name of each layer, its own and its accumulated error, and the own one as a percentage of the largest.
fn layers(found: &Explanation) -> Vec<(&str, String, String, f64)> {
    let layers = || found.quality.iter().flat_map(|quality| &quality.layers);
    let most = layers().map(|l| l.off).fold(f64::MIN_POSITIVE, f64::max);
    let cells = |l: &'_ mansard_ir::artifact::LayerError| [format!("{:.2e}", l.off), format!("{:.2e}", l.accumulated)];
    let share = |off: f64| (1000.0 * off / most).round() / 10.0;
    layers().map(|l| (l, cells(l))).map(|(l, [off, all])| (l.layer.as_str(), off, all, share(l.off))).collect()
}

/// Name, bytes as text, and share of all: what memory a run takes.
fn memory(found: &Explanation) -> Vec<(&'static str, String, f64)> {
    let m = &found.memory;
    let parts = [
        ("weights", m.weights),
        ("caches when the workload ends", m.caches),
        ("activations", m.activations),
        ("scratch of all workers", m.scratch.saturating_mul(found.machine.threads)),
    ];
    let all = parts.iter().map(|(_, bytes)| *bytes as f64).sum::<f64>().max(1.0);
    parts
        .into_iter()
        .map(|(name, bytes)| (name, report::bytes(bytes), (1000.0 * bytes as f64 / all).round() / 10.0))
        .collect()
}
