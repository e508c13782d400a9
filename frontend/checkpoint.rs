//! A checkpoint: the tensors of one or several mapped files under logical names, each a list of parts.
//!
//! ```text
//! transformer.h.0.attn.c_attn.weight [64, 192]   --split_rows-->   h.0.attn.q_proj.weight [64, 64], k_proj, v_proj
//! experts.0.w1.weight .. experts.3.w1.weight     --stack------->   mlp.experts.gate_proj.weight [4, 160, 64]
//! ```
//!
//! Readers fill it with the file's own names; a family renames, splits and stacks; builders then ask for a name and the
//! shape they need. No tensor data is touched on the way: a part is an offset into a mapping. Without any file
//! (`synthetic`) every name exists and has seeded values.

use mansard_ir::file::MappedFile;
use mansard_ir::grid::Grid;
use mansard_ir::model::{Part, Source, Weight};
use mansard_ir::{DType, Dim, Error, Kind, Place, Result, Type, bail};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One tensor: its logical shape and the stored pieces that make it up.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Row-major extents, outermost first.
    pub shape: Vec<usize>,
    /// Pieces, concatenated along the rows; none where the element type is not one of ours.
    pub parts: Vec<Part>,
    /// The file's own name of the element type, for messages.
    pub dtype_name: String,
    /// Where it is stored whole.
    pub at: Option<(Arc<MappedFile>, usize)>,
    /// Why the values cannot be kept as they are stored, only read as reals.
    pub reals_only: Option<String>,
}

/// Every tensor of a model file, by name.
#[derive(Debug, Default)]
pub(crate) struct Checkpoint {
    tensors: BTreeMap<String, Tensor>,
    /// Seed and dtype of matrices that are in no file.
    synthetic: Option<(u64, DType)>,
    /// Every weight's type becomes f32, whatever is stored.
    pub float_weights: bool,
}

impl Tensor {
    /// A tensor stored whole at `offset`. The reader has checked that its bytes lie inside the file.
    pub fn whole(file: &Arc<MappedFile>, offset: usize, dtype: DType, shape: Vec<usize>) -> Tensor {
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product();
        let part = Part {
            file: file.clone(),
            offset,
            dtype,
            stored: (rows, columns),
            transposed: false,
            rows: 0..rows,
            grid: None,
        };
        let at = Some((file.clone(), offset));
        Tensor { shape, parts: vec![part], dtype_name: dtype.to_string().to_uppercase(), at, reals_only: None }
    }

    /// A tensor whose element type has no place here; an error only if something needs it.
    pub fn foreign(file: &Arc<MappedFile>, offset: usize, dtype_name: impl Into<String>, shape: Vec<usize>) -> Tensor {
        let at = Some((file.clone(), offset));
        Tensor { shape, parts: vec![], dtype_name: dtype_name.into(), at, reals_only: None }
    }

    /// A matrix `[n, k]` whose codes, scales and zero points are in tensors of their own.
    pub fn grid(grid: Grid, dtype: DType, (n, k): (usize, usize), reals_only: Option<String>) -> Tensor {
        let (file, offset) = (grid.codes.file.clone(), grid.codes.offset);
        let grid = Some(Arc::new(grid));
        let part = Part { file, offset, dtype, stored: (n, k), transposed: false, rows: 0..n, grid };
        Tensor { shape: vec![n, k], parts: vec![part], dtype_name: dtype.to_string(), at: None, reals_only }
    }

    /// The same bytes read as the transposed matrix.
    pub fn transposed(mut self) -> Result<Tensor> {
        let [rows, columns] = self.shape[..] else { bail!(Input, "expected a matrix, found shape {:?}", self.shape) };
        if self.parts.iter().any(|part| part.grid.is_some()) {
            bail!(Unsupported, "a quantized matrix that this family stores transposed");
        }
        self.shape = vec![columns, rows];
        for part in &mut self.parts {
            part.transposed = true;
            part.rows = 0..columns;
        }
        Ok(self)
    }

    /// Rows `index * n .. (index + 1) * n` of `count` equal pieces; a vector is cut likewise.
    pub fn piece(&self, index: usize, count: usize) -> Result<Tensor> {
        let rows = self.shape.first().copied().unwrap_or(0);
        if count == 0 || rows % count != 0 || self.parts.len() > 1 {
            bail!(Input, "cannot cut shape {:?} into {count} equal pieces", self.shape);
        }
        let (n, mut piece) = (rows / count, self.clone());
        piece.shape[0] = n;
        for part in &mut piece.parts {
            if self.shape.len() == 1 {
                // A vector is one stored row; seen as `count` rows, its pieces are rows.
                part.stored = (count, n);
                part.rows = index..index + 1;
            } else {
                part.rows = index * n..(index + 1) * n;
            }
        }
        Ok(piece)
    }
}

impl Checkpoint {
    /// No file: every name exists, with seeded values; matrices are of `dtype`.
    pub fn synthetic(seed: u64, dtype: DType) -> Checkpoint {
        Checkpoint { synthetic: Some((seed, dtype)), ..Checkpoint::default() }
    }

    /// Adds a tensor.
    ///
    /// # Errors
    /// Where there is one of that name.
    pub fn add(&mut self, name: impl Into<String>, tensor: Tensor) -> Result<()> {
        let name = name.into();
        if self.tensors.contains_key(&name) {
            bail!(Input, "there are two tensors `{name}`");
        }
        self.tensors.insert(name, tensor);
        Ok(())
    }

    /// There is a tensor of that name in a file.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The stored tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Shape of a stored tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Takes a tensor out.
    pub fn take(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    /// Names of all stored tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Gives every tensor the name `rename` says.
    ///
    /// # Errors
    /// Where two would have one name.
    pub fn rename(&mut self, rename: impl Fn(&str) -> String) -> Result<()> {
        for (name, tensor) in std::mem::take(&mut self.tensors) {
            self.add(rename(&name), tensor).at(|| format!("tensor `{name}`"))?;
        }
        Ok(())
    }

    /// Brings the names under one root: finds what stands before `probe` in this checkpoint and puts `root` there.
    /// A head outside that root keeps its plain name `lm_head.weight`.
    pub fn reroot(&mut self, root: &str, probe: &str) -> Result<()> {
        let found = self.tensors.keys().filter_map(|n| n.strip_suffix(probe)).min_by_key(|p| p.len());
        let Some(found) = found.map(str::to_owned) else { return Ok(()) };
        self.rename(|name| match name.strip_prefix(&found) {
            _ if name.ends_with("lm_head.weight") => "lm_head.weight".into(),
            Some(rest) => format!("{root}{rest}"),
            None => name.into(),
        })
    }

    /// Replaces `each(0) .. each(count - 1)` by one tensor with a leading axis of `count`.
    ///
    /// # Errors
    /// Where one of them is missing or has another shape than the first.
    pub fn stack(&mut self, name: &str, count: usize, each: impl Fn(usize) -> String) -> Result<()> {
        let mut stacked: Option<Tensor> = None;
        for index in 0..count {
            let name = each(index);
            let Some(tensor) = self.tensors.remove(&name) else { return Err(self.missing(&name)) };
            match &mut stacked {
                None => {
                    let mut shape = vec![count];
                    shape.extend(&tensor.shape);
                    stacked = Some(Tensor { shape, ..tensor });
                }
                Some(all) if all.shape[1..] == tensor.shape => all.parts.extend(tensor.parts),
                Some(all) => {
                    let e =
                        format!("expected shape {:?} as its siblings have, found {:?}", &all.shape[1..], tensor.shape);
                    return Err(Error::new(Kind::Input, e).at(format!("tensor `{name}`")));
                }
            }
        }
        stacked.map_or(Ok(()), |t| self.add(name, t))
    }

    /// The matrix (or stack of matrices) of that name, kept in its stored format.
    ///
    /// # Errors
    /// Where it is missing, or its shape or element type is not what is needed.
    pub fn matrix(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.weight(name, shape, None)
    }

    /// The vector of that name; its type is f32 whatever is stored.
    ///
    /// # Errors
    /// As [`Checkpoint::matrix`].
    pub fn vector(&self, name: &str, n: usize) -> Result<Weight> {
        self.weight(name, &[n], Some(DType::F32))
    }

    fn weight(&self, name: &str, shape: &[usize], dtype: Option<DType>) -> Result<Weight> {
        let dims = |dtype| Type::tensor(dtype, shape.iter().map(|n| Dim::N(*n)).collect::<Vec<_>>());
        let count = shape.iter().try_fold(1usize, |a, n| a.checked_mul(*n)).filter(|n| *n < 1 << 48);
        if count.is_none() {
            bail!(Input, "weight `{name}`: shape {shape:?} is too large");
        }
        let widest = if self.float_weights { Some(DType::F32) } else { dtype };
        if let Some((seed, matrix)) = self.synthetic {
            // A name's own seed, so that layers differ.
            let seed = name
                .bytes()
                .fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
            return Ok(Weight { ty: dims(widest.unwrap_or(matrix)), source: Source::Synthetic { seed } });
        }
        let tensor = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let place = || format!("tensor `{name}`");
        if tensor.shape != shape {
            return Err(mismatch(shape, &tensor.shape)).at(place);
        }
        if tensor.parts.is_empty() {
            let message = format!("elements of type {} cannot be used as a weight", tensor.dtype_name);
            return Err(Error::new(Kind::Unsupported, message).help(supported_dtypes())).at(place);
        }
        if let Some(reason) = tensor.reals_only.as_ref().filter(|_| !self.float_weights) {
            let error = Error::new(Kind::Unsupported, format!("{reason}, which cannot be kept as they are"));
            return Err(
                error.help("--quant none reads them as reals; --quant bf16, int8, .. rounds or quantizes those")
            )
            .at(place);
        }
        let dtype = widest.map_or_else(|| common_dtype(&tensor.parts), Ok).at(place)?;
        Ok(Weight { ty: dims(dtype), source: Source::Parts(tensor.parts.clone()) })
    }

    /// Values of a small vector, read now.
    ///
    /// # Errors
    /// Where it has another shape or the file is too short.
    pub fn values(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        self.vector(name, n)?.read_all().at(|| format!("tensor `{name}`"))
    }

    fn missing(&self, name: &str) -> Error {
        let last = name.rsplit('.').nth(1).unwrap_or(name);
        let near: Vec<&str> = self.names().filter(|n| n.contains(last)).take(3).collect();
        let error = Error::new(Kind::Input, format!("tensor `{name}` is missing"));
        match near[..] {
            [] => error.help(format!("the file has {} tensors, none named like it", self.tensors.len())),
            _ => error.help(format!("the file has `{}`", near.join("`, `"))),
        }
    }
}

/// The dtype all parts share; f32 for a mixture of float formats.
fn common_dtype(parts: &[Part]) -> Result<DType> {
    let Some(first) = parts.first() else { bail!(Internal, "a tensor of no parts") };
    if parts.iter().all(|p| p.dtype == first.dtype) {
        return Ok(first.dtype);
    }
    if parts.iter().all(|p| p.dtype.is_float()) {
        return Ok(DType::F32);
    }
    let message = "experts of one layer are stored in different formats";
    Err(Error::new(Kind::Unsupported, message).help("float weights (--quant none) take any mixture"))
}

fn mismatch(expected: &[usize], found: &[usize]) -> Error {
    Error::new(Kind::Input, format!("expected shape {expected:?}, found {found:?}"))
}

/// The element types weights may be stored in, as a sentence.
pub(crate) fn supported_dtypes() -> String {
    let usable = mansard_ir::formats::FORMATS.iter().filter(|f| f.dtype.is_float() || f.int.is_some());
    let names: Vec<String> = usable.map(|f| f.name.to_uppercase()).collect();
    format!("supported: {}", names.join(", "))
}
