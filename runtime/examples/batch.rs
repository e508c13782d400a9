//! Answers several prompts at once, each line as it is done: `batch model.mansard "prompt" "prompt" ...`.

use mansard_runtime::{
    Batcher, EngineOptions, Event, GenerateOptions, Model, Refused, Request, Service, ServiceOptions,
};
use std::process::ExitCode;
use std::sync::mpsc::channel;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run() -> mansard_ir::Result<()> {
    let mut args = std::env::args().skip(1);
    let Some(path) = args.next() else { mansard_ir::bail!(Usage, "expected the path of an artifact and prompts") };
    let model = Model::open(path)?;
    let positions = Some(8 * model.artifact().manifest().program.limits.context);
    let engine = model.engine(&EngineOptions { positions, ..EngineOptions::default() })?;
    let options = ServiceOptions::default();
    let batcher = Batcher::new(engine, Some(model.tokens()?.clone()), &options.batch)?;
    let mut service = Service::start(batcher, &options)?;
    let (sender, events) = channel();
    let mut handles = vec![];
    for (index, text) in args.enumerate() {
        let prompt = model.tokens()?.encode(&text, true)?;
        let request = Request { stop: vec!["\n\n".into()], ..Request::new(prompt, GenerateOptions::default()) };
        let sender = sender.clone();
        match service.submit(request, Box::new(move |event| sender.send((index, event)).is_ok())) {
            Ok(handle) => handles.push((text, handle)),
            Err(Refused::Busy(wait)) => eprintln!("{text}: try again in {} s", wait.as_secs()),
            Err(Refused::Closed) => break,
        }
    }
    drop(sender);
    for (index, event) in events {
        match event {
            Event::Token { text, .. } => handles[index].0 += &text,
            Event::Done { text, finish, .. } => println!("{}{text} [{finish:?}]", handles[index].0),
            Event::Prompt(_) => {}
            Event::Failed(error) => eprintln!("{}: {error}", handles[index].0),
        }
    }
    service.drain(std::time::Duration::from_secs(1));
    Ok(())
}
