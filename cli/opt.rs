//! `mansard opt`: text IR in, passes, text IR out.

use crate::compile::{Choices, text};
use crate::report;
use mansard::driver;
use mansard_ir::text::parse;
use mansard_ir::verify;
use mansard_ir::{Error, Place, Result, bail};
use mansard_passes::{self as passes, Event, Hooks, State};
use std::path::PathBuf;

/// Run passes on text IR, as `compile --emit` or a failing pass leaves it
#[derive(clap::Args)]
pub struct Arguments {
    /// A file of text IR
    case: PathBuf,
    /// Passes in order [default: those the file names in a line `# passes: a,b`; none only verifies]
    #[arg(long, value_name = "PASSES", value_delimiter = ',')]
    passes: Vec<String>,
    /// Where the result goes [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    choices: Choices,
    /// Only so many rewrite rules, the first of docs/passes.md
    #[arg(long, value_name = "N")]
    rules: Option<usize>,
    /// Show what each pass did and how long it took
    #[arg(long)]
    time_passes: bool,
}

/// Runs the command.
///
/// # Errors
/// Where a pass is unknown, the text is no program, or a pass fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    let named: Vec<&str> = arguments.passes.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
    for name in &named {
        passes::pass(name)?;
    }
    let case = std::fs::read(&arguments.case).map_err(|e| Error::io(&arguments.case, e))?;
    let case = String::from_utf8_lossy(&case);
    let names = if named.is_empty() { header(&case) } else { named };
    let options = arguments.choices.options()?;
    let targets = options.planned_for()?;
    let [target] = &targets[..] else {
        bail!(Usage, "--target: expected one target, found {}", targets.len());
    };
    let model = parse(&arguments.case.display().to_string(), &case)?;
    for graph in &model.graphs {
        verify::verify(graph).at(|| arguments.case.display().to_string())?;
    }
    let mut sink = |_: Event<'_>| {};
    let mut pass_options = driver::pass_options(target.clone(), &options);
    pass_options.rules.first = arguments.rules.unwrap_or(usize::MAX);
    let (state, ran) = passes::manager::run(&names, State::new(model), &pass_options, &mut Hooks::new(&mut sink))?;
    if arguments.time_passes {
        eprint!("{}", ran.times());
    }
    report::deliver(arguments.output.as_deref(), text(&state).as_bytes())
}

/// Passes of the line `# passes: a,b` that reproducers begin with.
fn header(case: &str) -> Vec<&str> {
    let line = case.lines().take_while(|l| l.starts_with('#')).find_map(|l| l.strip_prefix("# passes:"));
    line.map_or_else(Vec::new, |names| names.split(',').map(str::trim).collect())
}
