//! GGUF: `magic, version, counts, metadata, tensor table, padding, data`, all little-endian.
//!
//! [`Gguf::read`] walks the header of a mapped file once. Every length and count is checked against the bytes that are
//! left before anything is allocated; strings and arrays stay in the mapping and are decoded when asked for. After it
//! returns, every tensor's bytes lie inside the file. Versions 2 and 3 are read (1 had 32-bit lengths and is not found
//! any more).

use crate::checkpoint::{Checkpoint, Tensor, supported_dtypes};
use mansard_ir::file::MappedFile;
use mansard_ir::{DType, Error, Kind, Place, Result, bail};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// First bytes of every GGUF file.
pub(crate) const MAGIC: &[u8] = b"GGUF";

const LONGEST_NAME: u64 = 1 << 12;

/// GGUF's tensor types by number: those Mansard reads, then names of others for messages.
const TENSOR_TYPES: &[(u32, DType)] = &[
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (30, DType::BF16),
];
const OTHER_TYPES: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// A scalar of the metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scalar {
    /// Any integer type.
    Int(i128),
    /// Either float type.
    Float(f64),
    /// Boolean.
    Bool(bool),
}

#[derive(Clone, Debug)]
enum Value {
    Scalar(Scalar),
    Text(Range<usize>),
    Array { element: u32, count: usize, bytes: Range<usize> },
}

/// The header of a GGUF file.
pub(crate) struct Gguf {
    file: Arc<MappedFile>,
    metadata: BTreeMap<String, Value>,
}

impl Gguf {
    /// Reads the header; the tensors go to a checkpoint under their GGUF names.
    ///
    /// # Errors
    /// Where the bytes are damaged or hold a tensor type that is not supported.
    pub fn read(file: Arc<MappedFile>) -> Result<(Gguf, Checkpoint)> {
        let path = file.path().display().to_string();
        read(file).map_err(|e| e.at(path))
    }

    /// Integer metadata that fits an extent.
    ///
    /// # Errors
    /// Where it is there and is no such integer.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Scalar(Scalar::Int(i))) if (0..1 << 32).contains(i) => Ok(Some(*i as usize)),
            Some(other) => bail!(Input, "metadata `{key}`: expected a size, found {other:?}"),
        }
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key) {
            Some(Value::Scalar(scalar)) => Some(scalar.float()),
            _ => None,
        }
    }

    /// A boolean.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key) {
            Some(Value::Scalar(Scalar::Bool(b))) => Some(*b),
            _ => None,
        }
    }

    /// A string.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(range)) => std::str::from_utf8(self.file.all().get(range.clone())?).ok(),
            _ => None,
        }
    }

    /// Every key that starts with `prefix`, without it, and its scalars: one, or an array's.
    pub fn scalars<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, Vec<Scalar>)> {
        let rest = self.metadata.range(prefix.to_owned()..).take_while(move |(k, _)| k.starts_with(prefix));
        rest.filter_map(move |(key, value)| {
            let scalars = match value {
                Value::Scalar(scalar) => vec![*scalar],
                Value::Array { element, count, bytes } if *element != TEXT && *count <= 1 << 16 => {
                    Cursor { bytes: self.file.all(), at: bytes.start }.scalars(*element, *count).ok()?
                }
                _ => return None,
            };
            Some((&key[prefix.len()..], scalars))
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// Where it is there and is no such array.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array { element: TEXT, count, bytes }) => {
                let mut cursor = Cursor { bytes: self.file.all(), at: bytes.start };
                (0..*count)
                    .map(|_| cursor.text(u64::MAX))
                    .collect::<Result<_>>()
                    .map(Some)
                    .at(|| format!("metadata `{key}`"))
            }
            Some(other) => bail!(Input, "metadata `{key}`: expected an array of strings, found {other:?}"),
        }
    }

    /// An array of numbers, as floats.
    ///
    /// # Errors
    /// Where it is there and is no such array.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array { element, count, bytes }) if *element != TEXT => {
                let scalars = Cursor { bytes: self.file.all(), at: bytes.start }.scalars(*element, *count)?;
                Ok(Some(scalars.into_iter().map(Scalar::float).collect()))
            }
            Some(other) => bail!(Input, "metadata `{key}`: expected an array of numbers, found {other:?}"),
        }
    }

    /// An array of bytes, or a string's.
    pub fn raw(&self, key: &str) -> Option<&[u8]> {
        match self.metadata.get(key)? {
            Value::Text(bytes) | Value::Array { element: 0 | 1, bytes, .. } => self.file.all().get(bytes.clone()),
            _ => None,
        }
    }
}

impl Scalar {
    /// As a float, booleans as 0 and 1.
    pub fn float(self) -> f64 {
        match self {
            Scalar::Int(i) => i as f64,
            Scalar::Float(x) => x,
            Scalar::Bool(b) => f64::from(u8::from(b)),
        }
    }
}

fn read(file: Arc<MappedFile>) -> Result<(Gguf, Checkpoint)> {
    let mut cursor = Cursor { bytes: file.all(), at: 0 };
    if cursor.take(4)? != MAGIC {
        bail!(Input, "expected the magic bytes `GGUF`");
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        let swapped = if (2..=3).contains(&version.swap_bytes()) { " (a big-endian file)" } else { "" };
        bail!(Unsupported, "GGUF version {version}{swapped}; supported: 2 and 3, little-endian");
    }
    // The least a tensor entry (name length, dims, one extent, type, offset) and a metadata entry take.
    let tensors = cursor.count(8 + 4 + 4 + 8).at(|| "number of tensors".into())?;
    let entries = cursor.count(8 + 4 + 1).at(|| "number of metadata entries".into())?;
    let mut metadata = BTreeMap::new();
    for index in 0..entries {
        let place = || format!("metadata entry {index}");
        let key = cursor.text(LONGEST_NAME).at(place)?.to_owned();
        let value = cursor.value().map_err(|e| e.at(format!("metadata `{key}`")))?;
        if metadata.insert(key.clone(), value).is_some() {
            bail!(Input, "metadata `{key}` is there twice");
        }
    }
    let mut table = Vec::with_capacity(tensors);
    for index in 0..tensors {
        table.push(entry(&mut cursor).at(|| format!("tensor entry {index}"))?);
    }
    let at = cursor.at;
    let gguf = Gguf { file, metadata };
    let checkpoint = place(&gguf, at, table)?;
    Ok((gguf, checkpoint))
}

/// A row of the tensor table: name, row-major shape, type, offset from the start of the data.
type Entry = (String, Vec<usize>, u32, u64);

fn entry(cursor: &mut Cursor<'_>) -> Result<Entry> {
    let name = cursor.text(LONGEST_NAME)?.to_owned();
    let dims = cursor.u32()?;
    if !(1..=4).contains(&dims) {
        bail!(Input, "tensor `{name}`: expected 1 to 4 dims, found {dims}");
    }
    // GGUF lists the fastest axis first.
    let mut shape = (0..dims).map(|_| cursor.size()).collect::<Result<Vec<usize>>>()?;
    shape.reverse();
    Ok((name, shape, cursor.u32()?, cursor.u64()?))
}

/// Checks every entry of the table against the file and adds it to a checkpoint. `header` is the table's end.
fn place(gguf: &Gguf, header: usize, table: Vec<Entry>) -> Result<Checkpoint> {
    let alignment = gguf.size("general.alignment")?.unwrap_or(32);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        bail!(Input, "metadata `general.alignment`: expected a power of two, found {alignment}");
    }
    let data = header.next_multiple_of(alignment);
    let unknown: Vec<String> = table.iter().filter(|e| dtype(e.2).is_none()).map(|e| other_name(e.2)).collect();
    if !unknown.is_empty() {
        let mut names = unknown;
        names.sort();
        names.dedup();
        let message = format!("the file has tensors of type {}", names.join(", "));
        return Err(Error::new(Kind::Unsupported, message).help(supported_dtypes()));
    }
    let mut checkpoint = Checkpoint::default();
    for (name, shape, kind, offset) in table {
        let Some(dtype) = dtype(kind) else { bail!(Internal, "type {kind} was checked") };
        let place = || format!("tensor `{name}`");
        let columns = shape.last().copied().unwrap_or(0);
        if shape.contains(&0) || !columns.is_multiple_of(dtype.format().block) {
            let e = format!("shape {shape:?} does not fill whole blocks of {} ({dtype})", dtype.format().block);
            return Err(Error::new(Kind::Input, e)).at(place);
        }
        let bytes = shape.iter().try_fold(1usize, |a, n| a.checked_mul(*n)).and_then(|n| dtype.bytes(n));
        let start = usize::try_from(offset).ok().and_then(|o| o.checked_add(data));
        let (Some(bytes), Some(start)) = (bytes, start) else {
            return Err(Error::new(Kind::Input, format!("shape {shape:?} at offset {offset} is too large"))).at(place);
        };
        if !start.is_multiple_of(alignment) {
            return Err(Error::new(Kind::Input, format!("offset {offset} is not aligned to {alignment}"))).at(place);
        }
        gguf.file.bytes(start, bytes).at(place)?;
        checkpoint.add(name, Tensor::whole(&gguf.file, start, dtype, shape))?;
    }
    Ok(checkpoint)
}

fn dtype(kind: u32) -> Option<DType> {
    TENSOR_TYPES.iter().find(|t| t.0 == kind).map(|t| t.1)
}

fn other_name(kind: u32) -> String {
    OTHER_TYPES.iter().find(|t| t.0 == kind).map_or_else(|| format!("number {kind}"), |t| t.1.to_string())
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a scalar value type; strings and arrays have none.
fn scalar_bytes(kind: u32) -> Option<usize> {
    [1, 1, 2, 2, 4, 4, 4, 1].get(kind as usize).copied().or(match kind {
        10..=12 => Some(8),
        _ => None,
    })
}

/// A reader that never leaves its bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let taken = self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end));
        let Some(taken) = taken else {
            bail!(Input, "expected {n} bytes at byte {}, the file has {}", self.at, self.bytes.len());
        };
        self.at += n;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(self.take(4)?.iter().rev().fold(0, |a, b| a << 8 | u32::from(*b)))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(self.take(8)?.iter().rev().fold(0, |a, b| a << 8 | u64::from(*b)))
    }

    fn size(&mut self) -> Result<usize> {
        let n = self.u64()?;
        usize::try_from(n).map_err(|_| Error::new(Kind::Input, format!("extent {n} is too large")))
    }

    /// A count of things that take at least `least` bytes each in what is left.
    fn count(&mut self, least: usize) -> Result<usize> {
        let n = self.u64()?;
        // The counts of the header precede both tables, so what is left bounds either.
        let most = (self.bytes.len() - self.at) / least.max(1);
        match usize::try_from(n) {
            Ok(n) if n <= most => Ok(n),
            _ => bail!(Input, "the count {n} at byte {} exceeds what the file can hold ({most})", self.at - 8),
        }
    }

    fn text(&mut self, longest: u64) -> Result<&'a str> {
        let (at, n) = (self.at, self.u64()?);
        if n > longest {
            bail!(Input, "a name of {n} bytes at byte {at}; at most {longest} are allowed");
        }
        let bytes = self.take(usize::try_from(n).unwrap_or(usize::MAX))?;
        std::str::from_utf8(bytes)
            .map_err(|e| Error::new(Kind::Input, format!("the string at byte {at} is not UTF-8")).caused_by(e))
    }

    fn value(&mut self) -> Result<Value> {
        match self.u32()? {
            TEXT => {
                let n = self.text(u64::MAX)?.len();
                Ok(Value::Text(self.at - n..self.at))
            }
            ARRAY => {
                let element = self.u32()?;
                let least = match scalar_bytes(element) {
                    Some(bytes) => bytes,
                    None if element == TEXT => 8,
                    None => bail!(Unsupported, "an array of elements of type {element}"),
                };
                let count = self.count(least)?;
                let start = self.at;
                match element {
                    TEXT => (0..count).try_for_each(|_| self.text(u64::MAX).map(|_| ()))?,
                    _ => self.take(count * least).map(|_| ())?,
                }
                Ok(Value::Array { element, count, bytes: start..self.at })
            }
            kind => self.scalar(kind).map(Value::Scalar),
        }
    }

    fn scalar(&mut self, kind: u32) -> Result<Scalar> {
        let Some(n) = scalar_bytes(kind) else { bail!(Input, "unknown value type {kind} before byte {}", self.at) };
        let bytes = self.take(n)?;
        let unsigned = bytes.iter().rev().fold(0u64, |a, b| a << 8 | u64::from(*b));
        let shift = 64 - 8 * n as u32;
        let signed = ((unsigned << shift) as i64) >> shift;
        Ok(match kind {
            0 | 2 | 4 | 10 => Scalar::Int(unsigned.into()),
            1 | 3 | 5 | 11 => Scalar::Int(signed.into()),
            6 => Scalar::Float(f32::from_bits(unsigned as u32).into()),
            7 => Scalar::Bool(unsigned != 0),
            _ => Scalar::Float(f64::from_bits(unsigned)),
        })
    }

    fn scalars(&mut self, kind: u32, count: usize) -> Result<Vec<Scalar>> {
        (0..count).map(|_| self.scalar(kind)).collect()
    }
}
