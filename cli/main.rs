//! The command line: `mansard compile | run | chat | serve | logits | embed | eval | verify | bisect | bench | bundle | explain |
//! inspect | diff | probe | opt | doctor`.
//!
//! Results go to standard output, progress and remarks to standard error. Exit codes are those of
//! [`mansard_ir::Error::exit_code`]; every failure is one `error:` with its place and, where something is known, one `help:`.
#![forbid(unsafe_code)]

mod bench;
mod bisect;
mod bundle;
mod chat;
mod compile;
mod costs;
mod device;
mod diff;
mod doctor;
mod embed;
mod eval;
mod explain;
mod inspect;
mod logits;
mod opt;
mod probe;
mod report;
mod run;
mod serve;
mod stream;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

const EXIT_CODES: &str = "\
Exit codes:
  0   done
  1   verify, bisect: the artifact is further from its model than it may be
  2   a request that makes no sense: contradictory options, an empty or too long prompt
  3   damaged, hostile or inconsistent input
  4   well-formed input that this version does not support; the message lists what is
  5   the operating system refused: a missing file, a full disk, no memory
  70  a bug in mansard";

/// Compiles a transformer's inference graph into one deployable artifact, and runs it.
#[derive(Parser)]
#[command(name = "mansard", version, after_help = EXIT_CODES, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Compile(compile::Arguments),
    Run(run::Arguments),
    Chat(chat::Arguments),
    Serve(serve::Arguments),
    Logits(logits::Arguments),
    Embed(embed::Arguments),
    Eval(eval::Arguments),
    Verify(verify::Arguments),
    Bisect(bisect::Arguments),
    Bench(bench::Arguments),
    Bundle(bundle::Arguments),
    Explain(explain::Arguments),
    Inspect(inspect::Arguments),
    Diff(diff::Arguments),
    Probe(probe::Arguments),
    Opt(opt::Arguments),
    Doctor(doctor::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Compile(arguments) => compile::run(&arguments),
        Command::Run(arguments) => run::run(&arguments),
        Command::Chat(arguments) => chat::run(&arguments),
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Logits(arguments) => logits::run(&arguments),
        Command::Embed(arguments) => embed::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Bisect(arguments) => bisect::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Bundle(arguments) => bundle::run(&arguments),
        Command::Explain(arguments) => explain::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Diff(arguments) => diff::run(&arguments),
        Command::Probe(arguments) => probe::run(&arguments),
        Command::Opt(arguments) => opt::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if report::reader_left(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(help) = error.advice() {
                eprintln!("help: {help}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}
