//! Models: opened artifacts with their tokenizers.
#![allow(unsafe_code)]

use crate::handles::{Handle, Table, get, insert, remove};
use crate::memory::{Place, Room, list, text};
use crate::options::MANSARD_TRUST_WEIGHTS;
use crate::status::{Failure, Result, check_abi, guard, mansard_status};
use mansard_ir::file::MappedFile;
use mansard_runtime::{Artifact, Message, Model, OpenOptions};
use std::ffi::{c_char, c_void};

/// An opened artifact and its tokenizer.
pub struct mansard_model {
    _private: (),
}

impl Handle for mansard_model {
    type Object = Model;
    const NAME: &'static str = "model";
    fn table() -> &'static Table<Model> {
        static MODELS: Table<Model> = Table::new(1);
        &MODELS
    }
}

/// Facts about a model.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct mansard_facts {
    /// Most tokens of a prompt and its answer together; of an encoder, of a text.
    pub context: usize,
    /// Tokens are below that.
    pub vocab: usize,
    /// Floats of a row that mansard_logits writes: the vocabulary, or an encoder's hidden width.
    pub row: usize,
    /// Floats of an embedding; 0 where the model generates text.
    pub embedding: usize,
    /// Not 0: it embeds text and generates none.
    pub encoder: u32,
    /// Not 0: it has a tokenizer.
    pub tokenizer: u32,
    /// Not 0: it has a chat template.
    pub chat_template: u32,
    /// `llama`, `bert`...; ends with a zero byte, and is cut where it is longer.
    pub architecture: [c_char; 64],
}

/// A turn of a conversation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct mansard_message {
    /// `system`, `user` or `assistant`.
    pub role: *const c_char,
    /// What was said.
    pub content: *const c_char,
}

/// Opens and checks the artifact at `path`. `abi` is MANSARD_ABI_VERSION, by which a header that does not fit the library is
/// found out. `flags` is 0 or MANSARD_TRUST_WEIGHTS. Any thread.
///
/// `path` is null or text; `model` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_model_open(
    abi: u32,
    path: *const c_char,
    flags: u32,
    model: *mut *mut mansard_model,
) -> mansard_status {
    guard(|| {
        check_abi(abi)?;
        // SAFETY: the caller's word.
        let (path, place) = unsafe { (text("path", path)?, Place::new("model", model)?) };
        place.put(insert(Model::open_with(path, &opening(flags)?)?)?);
        Ok(())
    })
}

/// Opens and checks an artifact that lies in memory, from a multiple of 4096 on, where it stays unchanged for as long as the
/// program runs: nothing is copied. `name` stands for its path in messages. The rest is as for mansard_model_open. Any thread.
///
/// `name` is null or text; `bytes` is null or so many that never change; `model` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_model_open_memory(
    abi: u32,
    name: *const c_char,
    bytes: *const c_void,
    size: usize,
    flags: u32,
    model: *mut *mut mansard_model,
) -> mansard_status {
    guard(|| {
        check_abi(abi)?;
        // SAFETY: the caller's word, who says that the bytes stay.
        let (name, bytes, place) =
            unsafe { (text("name", name)?, list::<u8>("bytes", bytes.cast(), size)?, Place::new("model", model)?) };
        place.put(insert(Artifact::of(MappedFile::linked(name, bytes), &opening(flags)?)?.into())?);
        Ok(())
    })
}

fn opening(flags: u32) -> Result<OpenOptions> {
    if flags & !MANSARD_TRUST_WEIGHTS != 0 {
        return Err(Failure::usage(format!("flags: expected 0 or MANSARD_TRUST_WEIGHTS, found {flags}")));
    }
    Ok(OpenOptions { verify_weights: flags & MANSARD_TRUST_WEIGHTS == 0 })
}

/// Frees a model; null is none. What was made of it goes on. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_model_free(model: *mut mansard_model) -> mansard_status {
    guard(|| remove(model).map(drop))
}

/// Writes facts about a model. Any thread.
///
/// `facts` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_model_facts(model: *const mansard_model, facts: *mut mansard_facts) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let place = unsafe { Place::new("facts", facts) }?;
        let model = get(model)?;
        let (info, program) = (model.info(), &model.artifact().manifest().program);
        let width = |name: &str| program.outputs.iter().find(|o| o.name == name).map_or(0, |o| o.width);
        let mut architecture = [0; 64];
        for (to, from) in architecture[..63].iter_mut().zip(info.architecture.bytes()) {
            *to = from as c_char;
        }
        let tokenizer = info.tokenizer.as_ref();
        place.put(mansard_facts {
            context: program.limits.context,
            vocab: info.vocab,
            row: width(if info.encoder { "hidden" } else { "logits" }),
            embedding: width("embedding"),
            encoder: info.encoder.into(),
            tokenizer: tokenizer.is_some().into(),
            chat_template: tokenizer.is_some_and(|t| t.chat_template.is_some()).into(),
            architecture,
        });
        Ok(())
    })
}

/// Writes the tokens of a text and their number. `special` is not 0 for plain text, around which the model wants special
/// tokens, and 0 for text that has them, as that of mansard_chat_prompt. With too little room nothing but the number is
/// written, and MANSARD_TOO_SMALL comes back. Any thread.
///
/// `input` is null or text; `tokens` has room for `capacity`; `count` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_encode(
    model: *const mansard_model,
    input: *const c_char,
    special: u32,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (input, room) = unsafe { (text("text", input)?, Room::new("tokens", tokens, capacity, count)?) };
        room.put(&get(model)?.tokens()?.encode(input, special != 0)?)
    })
}

/// Writes the text of tokens, without special ones, a zero byte after it, and its bytes without that. With too little room
/// only the bytes needed, that one included, are written, and MANSARD_TOO_SMALL comes back. Any thread.
///
/// `tokens` are `count`; `output` has room for `capacity` bytes; `bytes` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_decode(
    model: *const mansard_model,
    tokens: *const u32,
    count: usize,
    output: *mut c_char,
    capacity: usize,
    bytes: *mut usize,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (tokens, room) =
            unsafe { (list("tokens", tokens, count)?, Room::new("text", output.cast::<u8>(), capacity, bytes)?) };
        room.put_text(&get(model)?.tokens()?.decode(tokens)?)
    })
}

/// Writes the prompt that the model's chat template makes of a conversation, up to where the answer begins, like
/// mansard_decode. Any thread.
///
/// `messages` are `count`; `output` has room for `capacity` bytes; `bytes` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_chat_prompt(
    model: *const mansard_model,
    messages: *const mansard_message,
    count: usize,
    output: *mut c_char,
    capacity: usize,
    bytes: *mut usize,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (messages, room) =
            unsafe { (list("messages", messages, count)?, Room::new("text", output.cast::<u8>(), capacity, bytes)?) };
        let message = |message: &mansard_message| {
            // SAFETY: the caller's word.
            let (role, content) = unsafe { (text("role", message.role)?, text("content", message.content)?) };
            Ok(Message::new(role, content))
        };
        let messages: Vec<Message> = messages.iter().map(message).collect::<Result<_>>()?;
        room.put_text(&get(model)?.tokens()?.chat_prompt(&messages)?)
    })
}
