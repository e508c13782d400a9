//! safetensors: `u64 header length, JSON header, data`; one file, or shards listed by `model.safetensors.index.json`.
//!
//! The header is refused unless its tensors tile the data exactly: no holes, no overlaps, nothing left over, every
//! extent product equal to its byte range. So a truncated file never opens. Element types other than F32, F16 and BF16
//! are noted and only refused when a model needs such a tensor (published files carry integer buffers that nothing
//! reads).

use crate::checkpoint::{Checkpoint, Tensor};
use mansard_ir::file::MappedFile;
use mansard_ir::{DType, Error, Kind, Place, Result, bail};
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The format's own limit on the header.
const LONGEST_HEADER: usize = 100_000_000;

/// The file that lists the shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

#[derive(serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The header: entries in file order of names, each name once.
struct Header(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else if entries.insert(name.clone(), map.next_value()?).is_some() {
                        return Err(de::Error::custom(format!("there are two tensors `{name}`")));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads the tensors of one file.
///
/// # Errors
/// Where the header is damaged or does not describe the data.
pub(crate) fn read(path: &Path) -> Result<Checkpoint> {
    let mut checkpoint = Checkpoint::default();
    read_into(path, &mut checkpoint)?;
    Ok(checkpoint)
}

/// Reads the shards an index lists.
///
/// # Errors
/// Where the index is damaged, a shard is missing, or a tensor is not in the shard that should have it.
pub(crate) fn read_sharded(index: &Path) -> Result<Checkpoint> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let place = || index.display().to_string();
    let text = std::fs::read(index).map_err(|e| Error::io(index, e))?;
    let parsed: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::new(Kind::Input, format!("not an index of shards: {e}")))
        .at(place)?;
    let mut shards: Vec<&String> = parsed.weight_map.values().collect();
    shards.sort();
    shards.dedup();
    let mut checkpoint = Checkpoint::default();
    for shard in shards {
        // A name with separators could point anywhere.
        if shard.contains(['/', '\\']) || shard.starts_with('.') {
            return Err(Error::new(Kind::Input, format!("`{shard}` is no plain file name"))).at(place);
        }
        read_into(&index.with_file_name(shard), &mut checkpoint)?;
    }
    if let Some((name, shard)) = parsed.weight_map.iter().find(|(n, _)| !checkpoint.has(n)) {
        return Err(Error::new(Kind::Input, format!("tensor `{name}` is in no shard; expected it in {shard}")))
            .at(place);
    }
    Ok(checkpoint)
}

fn read_into(path: &Path, checkpoint: &mut Checkpoint) -> Result<()> {
    let file = Arc::new(MappedFile::open(path)?);
    add_all(&file, checkpoint).at(|| path.display().to_string())
}

fn add_all(file: &Arc<MappedFile>, checkpoint: &mut Checkpoint) -> Result<()> {
    let all = file.all();
    let Some((length, rest)) = all.split_first_chunk::<8>() else {
        bail!(Input, "expected a header length of 8 bytes, the file has {}", all.len());
    };
    let claimed = u64::from_le_bytes(*length);
    let length = usize::try_from(claimed).unwrap_or(usize::MAX);
    if length > LONGEST_HEADER || length > rest.len() {
        bail!(Input, "the header claims {claimed} bytes, {} are left in the file", rest.len());
    }
    let (header, data) = rest.split_at(length);
    let Header(entries) = serde_json::from_slice(header)
        .map_err(|e| Error::new(Kind::Input, format!("the header is no valid JSON of tensors: {e}")))?;
    let mut spans = Vec::with_capacity(entries.len());
    for (name, Entry { dtype, shape, data_offsets: (begin, end) }) in entries {
        let place = || format!("tensor `{name}`");
        let count = shape.iter().try_fold(1usize, |a, n| a.checked_mul(*n));
        let expected =
            count.and_then(|n| n.checked_mul(element_bits(&dtype).unwrap_or(0))).map(|bits| bits.div_ceil(8));
        let found = end.checked_sub(begin);
        if found.is_none() || end > data.len() || element_bits(&dtype).is_some() && expected != found {
            let e = format!("{dtype} of shape {shape:?} at bytes {begin}..{end} of {} does not add up", data.len());
            return Err(Error::new(Kind::Input, e)).at(place);
        }
        spans.push((begin, end));
        let tensor = match plain_dtype(&dtype) {
            Some(dtype) if !shape.contains(&0) => Tensor::whole(file, 8 + length + begin, dtype, shape),
            _ => Tensor::foreign(file, 8 + length + begin, dtype, shape),
        };
        checkpoint.add(name, tensor)?;
    }
    spans.sort();
    let mut at = 0;
    for (begin, end) in spans {
        if begin != at {
            bail!(Input, "tensors must follow each other: expected one at byte {at} of the data, found {begin}");
        }
        at = end;
    }
    if at != data.len() {
        bail!(Input, "the tensors take {at} bytes, the file has {} of data", data.len());
    }
    Ok(())
}

fn plain_dtype(name: &str) -> Option<DType> {
    match name {
        "F32" => Some(DType::F32),
        "F16" => Some(DType::F16),
        "BF16" => Some(DType::BF16),
        _ => None,
    }
}

/// Bits of an element, for the types the format names.
fn element_bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}
