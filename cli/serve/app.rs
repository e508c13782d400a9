//! What all requests share: the model, the thread that generates or the engine that embeds, limits and keys.

use super::Arguments;
use super::access::Keys;
use super::metrics::Http;
use crate::device;
use crate::report::OpenArguments;
use mansard_grammar::Grammars;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::{Result, bail};
use mansard_runtime::{
    BatchOptions, Batcher, Engine, EngineOptions, Model, Service, ServiceOptions, Tokens, embedded_positions,
};
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What answers requests.
pub enum Work {
    /// A model that generates.
    Generate(Mutex<Service>),
    /// An encoder.
    Embed(Arc<Mutex<Engine>>),
}

/// Everything that requests share.
pub struct App {
    /// The model's name in requests.
    pub name: String,
    /// Seconds since 1970 at which the artifact was written.
    pub created: u64,
    /// The model.
    pub model: Model,
    /// What answers.
    pub work: Work,
    /// Tokens that a prompt and its answer can have; without its answer, where the context moves on.
    pub context: usize,
    /// Tokens of a full context's beginning to keep; `None` where answers end there.
    pub shift: Option<usize>,
    /// Who may ask; everybody where there are none.
    pub keys: Option<Keys>,
    /// Made when first asked for.
    pub grammars: OnceLock<Grammars>,
    /// Figures of requests.
    pub http: Http,
    /// Most bytes of a body.
    pub max_body: usize,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Most answers to one prompt.
    pub max_choices: usize,
    /// Most time of a request.
    pub max_time: Duration,
    /// Most time of a request's arrival.
    pub read_time: Duration,
    /// Most silence in a stream.
    pub silence: Duration,
    /// No key is needed and only this machine is listened to.
    pub only_own_host: bool,
    path: PathBuf,
    file: Option<Metadata>,
}

impl App {
    /// Opens the artifact and starts what answers.
    ///
    /// # Errors
    /// Where the artifact or the key file is refused.
    pub fn open(arguments: &Arguments) -> Result<App> {
        let keys = arguments.api_key_file.as_deref().map(Keys::read).transpose()?;
        let path = &arguments.artifact;
        let model = arguments.engine.open(path)?;
        model.tokens()?;
        let file = std::fs::metadata(path).ok();
        let written = file.as_ref().and_then(|file| file.modified().ok()).unwrap_or(SystemTime::UNIX_EPOCH);
        let (work, context) = start(&model, arguments)?;
        Ok(App {
            name: arguments.name.clone().unwrap_or_else(|| stem(path)),
            created: written.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            work,
            context,
            shift: arguments.stream.context_shift,
            only_own_host: keys.is_none() && arguments.host.is_loopback(),
            keys,
            grammars: OnceLock::new(),
            http: Http::default(),
            max_body: arguments.max_body,
            max_tokens: arguments.max_tokens,
            max_choices: arguments.max_choices,
            max_time: Duration::from_secs(arguments.max_seconds),
            silence: Duration::from_secs(arguments.keep_alive_seconds.max(1)),
            read_time: Duration::from_secs(arguments.read_seconds),
            path: path.clone(),
            model,
            file,
        })
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// None: it was loaded before anything was served.
    pub fn tokens(&self) -> Result<&Arc<Tokens>> {
        self.model.tokens()
    }

    /// Another file has taken the artifact's place since it was opened. What is served is the one that was opened.
    pub fn is_replaced(&self) -> bool {
        let stamp = |file: &Metadata| (file.len(), file.modified().ok());
        self.file.as_ref().map(stamp) != std::fs::metadata(&self.path).ok().as_ref().map(stamp)
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

fn start(model: &Model, arguments: &Arguments) -> Result<(Work, usize)> {
    if arguments.max_tokens == 0 || arguments.max_choices == 0 {
        bail!(Usage, "expected --max-tokens and --max-choices of at least 1, found 0");
    }
    let draft = arguments.stream.draft(&arguments.engine)?;
    let opening = &arguments.engine.opening;
    let positions = arguments.positions.unwrap_or_else(|| positions(model, draft.as_ref(), opening));
    let options = EngineOptions { positions: Some(positions), ..arguments.engine.options() };
    let engine = arguments.engine.engine(model, &arguments.stream.engine(options))?;
    let limits = *engine.limits();
    if model.info().encoder {
        return Ok((Work::Embed(Arc::new(Mutex::new(engine))), limits.context.min(limits.tokens)));
    }
    let batch = BatchOptions {
        running: arguments.max_running,
        piece: arguments.piece,
        share: !arguments.no_prefix_sharing,
        guesses: arguments.stream.guesses(),
        ..BatchOptions::default()
    };
    let mut batcher = Batcher::new(engine, Some(model.tokens()?.clone()), &batch)?;
    if let Some(draft) = draft {
        batcher = batcher.with_draft(arguments.engine.engine(&draft, &options)?)?;
    }
    let context = batcher.capacity();
    let service = Service::start(batcher, &ServiceOptions { queue: arguments.max_queue, batch })?;
    Ok((Work::Generate(Mutex::new(service)), context))
}

/// Positions of 32 contexts, or of a quarter of the free memory, a draft model's beside them; of one context at least. An
/// encoder keeps none beyond a step.
fn positions(model: &Model, draft: Option<&Model>, opening: &OpenArguments) -> usize {
    let program = &model.artifact().manifest().program;
    if model.info().encoder {
        return embedded_positions(&program.limits);
    }
    let caches = |model: &Model| model.artifact().manifest().program.caches.clone();
    let caches = caches(model).into_iter().chain(draft.map(caches).unwrap_or_default());
    let bytes: usize = caches.map(|cache| cache.block_bytes).sum();
    let room = device::available_memory(opening, model).map_or(usize::MAX, |bytes| bytes / 4);
    let fits = (room / bytes.max(1)).saturating_mul(CACHE_BLOCK);
    let context = program.limits.context;
    fits.clamp(context, context.saturating_mul(32).max(context))
}
