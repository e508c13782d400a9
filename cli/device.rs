//! `--device`: an engine on the CPU, or on a GPU, or on what there is; whatever was not asked for by name is said.

use crate::report::{self, OpenArguments};
use mansard_ir::{Error, Kind, Result, bail};
use mansard_runtime::device::{Choice, Driver, choose, cuda};
use mansard_runtime::{Engine, EngineOptions, Model};
use std::sync::Arc;

/// An engine where the command line wants it.
///
/// # Errors
/// Where there is no such device, it does not run the artifact, or its memory does not suffice.
pub fn engine(opening: &OpenArguments, model: &Model, options: &EngineOptions) -> Result<Engine> {
    match opening.device {
        Choice::Cpu => model.engine(options),
        Choice::Cuda(_) => on_gpu(model, options, gpu(opening)?),
        Choice::Auto => match cuda::open(0).and_then(|driver| on_gpu(model, options, driver)) {
            Ok(engine) => {
                eprintln!("note: runs on {}", engine.device());
                Ok(engine)
            }
            Err(error) if matches!(error.kind(), Kind::Unsupported | Kind::Io) => {
                eprintln!("note: runs on the CPU: {error}");
                model.engine(options)
            }
            Err(error) => Err(error),
        },
    }
}

/// The GPU asked for by name.
///
/// # Errors
/// Where it is not there, or options are for CPUs.
pub fn gpu(opening: &OpenArguments) -> Result<Arc<dyn Driver>> {
    let Choice::Cuda(index) = opening.device else { bail!(Internal, "no GPU was asked for") };
    if opening.huge_pages || opening.pin {
        bail!(Usage, "--huge-pages and --pin are for CPUs, --device says cuda:{index}");
    }
    cuda::open(index)
}

/// An engine on that GPU; a bar shows how far its weights are.
///
/// # Errors
/// As [`Engine::on_device`].
pub fn on_gpu(model: &Model, options: &EngineOptions, driver: Arc<dyn Driver>) -> Result<Engine> {
    if options.threads.is_some() {
        return Err(Error::new(Kind::Usage, "--threads is for CPUs, a GPU runs as many as it has"));
    }
    let bar = report::bar("weights", 0);
    let engine = Engine::on_device(model.artifact().clone(), options, driver, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    engine
}

/// Memory that caches could have: what is free where steps will run, the weights there already.
pub fn available_memory(opening: &OpenArguments, model: &Model) -> Option<usize> {
    let index = match opening.device {
        Choice::Cpu => None,
        Choice::Auto => Some(0),
        Choice::Cuda(index) => Some(index),
    };
    let manifest = model.artifact().manifest();
    let driver = index.and_then(|index| cuda::open(index).ok());
    let Some(driver) = driver.filter(|driver| choose(&manifest.ptx, driver.facts()).is_ok()) else {
        return mansard_runtime::available_memory();
    };
    let weights: usize = manifest.program.weights.iter().map(|weight| weight.bytes).sum();
    Some(driver.free_memory().ok()?.saturating_sub(weights))
}
