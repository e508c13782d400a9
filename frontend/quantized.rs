//! Checkpoints that were quantized when they were published: GPTQ, AWQ, compressed-tensors and fp8, as
//! `quantization_config` says.
//!
//! ```text
//! q_proj.qweight, q_proj.scales, q_proj.qzeros, q_proj.g_idx   --gptq-->   q_proj.weight: uint4_g128[n, k]
//! ```
//!
//! A module is quantized where the file has codes for it; the others (`lm_head`, `modules_to_not_convert`, `ignore`) have a
//! plain `weight` and stay as they are; a module excluded by name that has codes all the same is refused (patterns, `re:`, are
//! not compared). So are scales of activations and caches that were fixed beforehand: activations get theirs here. Codes, scales and zero points are taken as they are stored ([`mansard_ir::grid`]).
//! What no weight format can hold is read as reals only. Every tensor's shape is checked against the others'.

mod layouts;
mod settings;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::config::Config;
use mansard_ir::file::MappedFile;
use mansard_ir::formats::{DType, FORMATS, Zero};
use mansard_ir::grid::{Groups, Ints, Scales, Stored};
use mansard_ir::{Error, Kind, Place, Result, bail};
use std::sync::Arc;

/// A way to store a module: the name under which `quantization_config` knows it, what its codes are called, and its reader.
struct Method {
    name: &'static str,
    /// Endings of the tensors that hold codes.
    codes: &'static [&'static str],
    /// Element types of these.
    types: &'static [&'static str],
    read: fn(&Settings, &mut Module<'_>) -> Result<Tensor>,
}

const METHODS: [Method; 4] = [
    Method { name: "gptq", codes: &["qweight"], types: &["I32"], read: layouts::gptq },
    Method { name: "awq", codes: &["qweight"], types: &["I32"], read: layouts::awq },
    Method {
        name: "compressed-tensors",
        codes: &["weight_packed", "weight"],
        types: &["I32", "U8", "I8", "F8_E4M3"],
        read: layouts::compressed,
    },
    Method { name: "fp8", codes: &["weight"], types: &["F8_E4M3"], read: layouts::fp8 },
];

/// What `quantization_config` says that tensors do not.
struct Settings {
    /// Bits of a code, where tensors do not tell.
    bits: usize,
    /// Columns that share a scale; `None`: all.
    group: Option<usize>,
    /// Zero points are all in the middle.
    symmetric: bool,
    /// What is to be added to stored zero points.
    zero_offset: u8,
    /// Rows and columns of a block that shares a scale.
    block: Option<(usize, usize)>,
    /// Names of modules that are not quantized.
    excluded: Vec<String>,
}

/// Replaces the tensors of each quantized module by its `weight`.
///
/// # Errors
/// Where the method is not known, a tensor is missing, or its shape or type does not fit the others.
pub(crate) fn apply(config: &Config, checkpoint: &mut Checkpoint) -> Result<()> {
    let place = || "setting `quantization_config`".to_owned();
    let Some(section) = config.section("quantization_config")? else { return Ok(()) };
    let name = section.text("quant_method").at(place)?.unwrap_or("none");
    let Some(method) = METHODS.iter().find(|m| m.name == name) else {
        let known: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
        let error = Error::new(Kind::Unsupported, format!("quantization method `{name}`"));
        return Err(error.help(format!("supported: {}", known.join(", ")))).at(place);
    };
    let settings = settings::read(name, &section).at(place)?;
    refuse_fixed_scales(checkpoint)?;
    let coded = |name: &str| {
        let (module, last) = name.rsplit_once('.')?;
        let tensor = checkpoint.tensor(name)?;
        let is = method.codes.contains(&last) && method.types.contains(&tensor.dtype_name.as_str());
        is.then(|| (module.to_owned(), last.to_owned()))
    };
    let modules: Vec<(String, String)> = checkpoint.names().filter_map(coded).collect();
    for (module, codes) in modules {
        if let Some(excluded) = settings.excluded.iter().find(|excluded| within(&module, excluded)) {
            bail!(Input, "`quantization_config` excludes `{excluded}`, yet `{module}.{codes}` holds codes");
        }
        let mut module = Module { checkpoint, name: module, codes };
        let tensor = (method.read)(&settings, &mut module).at(|| format!("module `{}`", module.name))?;
        let weight = format!("{}.weight", module.name);
        checkpoint.add(weight, tensor)?;
    }
    Ok(())
}

/// Refuses scales that activations or caches were to be quantized with.
fn refuse_fixed_scales(checkpoint: &Checkpoint) -> Result<()> {
    const FIXED: [&str; 9] = [
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
        "output_zero_point",
        "q_scale",
        "k_scale",
        "v_scale",
        "activation_scale",
    ];
    let fixed = |name: &&str| name.rsplit('.').next().is_some_and(|last| FIXED.contains(&last));
    match checkpoint.names().find(fixed) {
        Some(name) => bail!(Unsupported, "`{name}`: activations and caches with scales fixed beforehand"),
        None => Ok(()),
    }
}

/// The module is `excluded`, or in it: the same names between dots, anywhere.
fn within(module: &str, excluded: &str) -> bool {
    format!(".{module}.").contains(&format!(".{excluded}."))
}

/// A quantized module's tensors.
struct Module<'a> {
    checkpoint: &'a mut Checkpoint,
    name: String,
    /// Ending of its codes' name.
    codes: String,
}

/// A stored tensor, taken out of the checkpoint.
struct Raw {
    name: String,
    file: Arc<MappedFile>,
    offset: usize,
    dtype: String,
    shape: Vec<usize>,
}

impl Module<'_> {
    /// Takes the codes.
    fn codes(&mut self) -> Result<Raw> {
        let codes = self.codes.clone();
        self.take(&codes)
    }

    /// Takes a tensor that must be there.
    fn take(&mut self, last: &str) -> Result<Raw> {
        let missing = || Error::new(Kind::Input, format!("tensor `{}.{last}` is missing", self.name));
        let error = missing();
        self.find(last)?.ok_or(error)
    }

    /// Takes a tensor that may be there.
    fn find(&mut self, last: &str) -> Result<Option<Raw>> {
        let name = format!("{}.{last}", self.name);
        let Some(tensor) = self.checkpoint.take(&name) else { return Ok(None) };
        let Some((file, offset)) = tensor.at else { bail!(Internal, "`{name}` is not stored whole") };
        Ok(Some(Raw { name, file, offset, dtype: tensor.dtype_name, shape: tensor.shape }))
    }
}

impl Raw {
    /// Rows and columns of a matrix.
    fn matrix(&self) -> Result<(usize, usize)> {
        match self.shape[..] {
            [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
            _ => Err(self.error("a matrix", &format!("shape {:?}", self.shape))),
        }
    }

    /// Refuses another shape.
    fn expect(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(self.error(&format!("shape {shape:?}"), &format!("{:?}", self.shape)))
    }

    fn error(&self, expected: &str, found: &str) -> Error {
        Error::new(Kind::Input, format!("expected {expected}, found {found}")).at(format!("tensor `{}`", self.name))
    }

    /// Integers of so many bits. Words lie row after row, of `width` each; `transposed`: their rows are the matrix's columns.
    fn ints(&self, bits: usize, (along_rows, transposed): (bool, bool), width: usize) -> Result<Ints> {
        let (word, flip) = match self.dtype.as_str() {
            "I32" => (4, 0),
            "I8" => (1, 128),
            "U8" | "F8_E4M3" => (1, 0),
            other => return Err(self.error("integers", other)),
        };
        let strides = if transposed { (1, width) } else { (width, 1) };
        Ok(Ints {
            file: self.file.clone(),
            offset: self.offset,
            bits: bits as u8,
            word,
            along_rows,
            strides,
            order: mansard_ir::grid::IN_ORDER,
            flip,
        })
    }

    /// Scales with these strides.
    fn scales(&self, strides: (usize, usize), rows: usize) -> Result<Scales> {
        let stored = match self.dtype.as_str() {
            "F16" => Stored::Float(DType::F16),
            "BF16" => Stored::Float(DType::BF16),
            "F32" => Stored::Float(DType::F32),
            "F8_E4M3" => Stored::E4M3,
            "U8" | "F8_E8M0" => Stored::E8M0,
            other => return Err(self.error("scales of F32, F16, BF16, F8_E4M3 or F8_E8M0", other)),
        };
        Ok(Scales { file: self.file.clone(), offset: self.offset, stored, strides, rows, divisor: 1.0 })
    }

    /// All elements of a list of I32.
    fn words(&self, count: usize) -> Result<Vec<u32>> {
        self.expect(&[count])?;
        if self.dtype != "I32" {
            return Err(self.error("I32", &self.dtype));
        }
        let bytes = self.file.bytes(self.offset, 4 * count)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    /// The one value of an f32 tensor.
    fn value(&self) -> Result<f32> {
        if self.dtype != "F32" || self.shape.iter().product::<usize>() != 1 {
            return Err(self.error("one F32", &format!("{} of shape {:?}", self.dtype, self.shape)));
        }
        let bytes = self.file.bytes(self.offset, 4)?;
        Ok(bytes.first_chunk().map_or(f32::NAN, |b| f32::from_le_bytes(*b)))
    }
}

/// The weight format with these codes whose groups are the widest that divide `group`; else why there is none.
fn format(bits: usize, zero: Zero, group: usize) -> std::result::Result<DType, String> {
    let fits = |f: &&mansard_ir::formats::Format| {
        let int = f.int.filter(|int| usize::from(int.bits) == bits && int.zero == zero);
        int.is_some_and(|int| {
            let whole = if zero == Zero::E2M1 { int.group == group } else { int.group == f.block };
            whole && group.is_multiple_of(int.group)
        })
    };
    let found = FORMATS.iter().filter(fits).max_by_key(|f| f.block);
    found.map(|f| f.dtype).ok_or_else(|| {
        let codes = match zero {
            Zero::E4M3 => "8-bit floats".to_owned(),
            Zero::Point => format!("codes of {bits} bits with zero points"),
            _ => format!("codes of {bits} bits"),
        };
        format!("{codes} in groups of {group}")
    })
}

/// The groups of `k` columns, checked: so many to a scale, or listed.
fn groups(k: usize, group: usize, listed: Option<Raw>) -> Result<Groups> {
    if !k.is_multiple_of(group) {
        bail!(Input, "rows of {k} do not fill whole groups of {group}");
    }
    let Some(raw) = listed else { return Ok(Groups::Of(group)) };
    let words = raw.words(k)?;
    let count = k / group;
    if let Some(beyond) = words.iter().find(|word| **word as usize >= count) {
        return Err(raw.error(&format!("groups below {count}"), &beyond.to_string()));
    }
    let plain = words.iter().enumerate().all(|(i, word)| *word as usize == i / group);
    Ok(if plain { Groups::Of(group) } else { Groups::Listed(words.into()) })
}
