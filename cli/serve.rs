//! `mansard serve`: an artifact behind HTTP, in the words of OpenAI's API.
//!
//! ```text
//!  listen ---> authorize ---> read body ---> /v1/... ---> Service (a thread of the runtime's) ---> JSON, or events
//! ```
//!
//! Nothing of a request reaches the file system. Every refusal is an HTTP status with OpenAI's error body.

mod access;
mod answer;
mod app;
mod ask;
mod embeddings;
mod errors;
mod events;
mod grammar;
mod listen;
mod metrics;
mod page;
mod routes;

use crate::report::EngineArguments;
use crate::stream::StreamArguments;
use app::App;
use mansard_ir::{Error, Result};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// Serve an artifact over HTTP: OpenAI's API, a chat page, metrics
#[derive(clap::Args)]
pub struct Arguments {
    /// An artifact
    artifact: PathBuf,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 for any
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// A file with one API key a line, which nobody else may read; without one, everybody may ask
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// The model's name in requests [default: the artifact's file name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Answers on their way at once [default: as many as a step of the artifact has room for]
    #[arg(long, value_name = "N")]
    max_running: Option<usize>,
    /// Requests that wait; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_queue: usize,
    /// Bytes of a request's body
    #[arg(long, value_name = "N", default_value_t = 4 << 20)]
    max_body: usize,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_tokens: usize,
    /// Answers to one prompt
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_choices: usize,
    /// Seconds a request may take, its time in the queue included
    #[arg(long, value_name = "N", default_value_t = 600)]
    max_seconds: u64,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_connections: usize,
    /// Seconds a client has to send its request
    #[arg(long, value_name = "N", default_value_t = 20)]
    read_seconds: u64,
    /// Seconds of silence after which a stream gets a comment, for proxies that would close it
    #[arg(long, value_name = "N", default_value_t = 15)]
    keep_alive_seconds: u64,
    /// Seconds that answers on their way have to end after SIGTERM
    #[arg(long, value_name = "N", default_value_t = 30)]
    drain_seconds: u64,
    /// Positions of cache over all answers [default: 32 contexts, in a quarter of the free memory]
    #[arg(long, value_name = "N")]
    positions: Option<usize>,
    /// Tokens of a prompt that run at once beside others' answers: 64, 128, 256...
    #[arg(long, value_name = "N", default_value_t = 128)]
    piece: usize,
    /// Keep nothing of a prompt for others that begin like it
    #[arg(long)]
    no_prefix_sharing: bool,
    #[command(flatten)]
    stream: StreamArguments,
    /// What is logged to standard error: error, warn, info, debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: tracing::Level,
    /// Log in JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Runs the command.
///
/// # Errors
/// Where the artifact does not open, the key file is readable by others, or the port is taken.
pub fn run(arguments: &Arguments) -> Result<()> {
    let log = tracing_subscriber::fmt().with_max_level(arguments.log).with_writer(std::io::stderr).with_target(false);
    if arguments.json {
        log.json().init()
    } else {
        log.init()
    }
    let app = Arc::new(App::open(arguments)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("the server's threads", e))?;
    runtime.block_on(listen::serve(app, arguments))
}
