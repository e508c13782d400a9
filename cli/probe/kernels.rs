//! Kernels of made-up models -> what they take, as multiples of what the roofline says.
//!
//! ```text
//! some layers of a common shape in f32, bf16, q8_0...   compiled, and timed in each range of tokens as by `--calibrate-cost`
//! ```

use crate::{costs, report};
use mansard::driver::{CompileOptions, Quiet};
use mansard::machine::MachineFile;
use mansard_backends::machine::MachineTable;
use mansard_ir::costs::Costs;
use mansard_ir::{DType, Error, Result};

/// Formats that stand for others: what is missing among costs is priced as its like.
const FORMATS: [DType; 8] =
    [DType::F32, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q4_K, DType::Q6_K];

/// Weights of the layers: beyond any cache of a core, as in small models.
const BYTES: usize = 64 << 20;

/// A decoder of a common shape. Its kernels' ops stand for those of other decoders: norms before layers and after them, gates,
/// windows, wide heads.
struct Shape {
    config: &'static str,
    /// Matrices of a layer have so many elements.
    layer: usize,
    formats: &'static [DType],
}

const SHAPES: [Shape; 2] = [
    Shape {
        config: r#""model_type": "llama", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 64, "hidden_act": "silu""#,
        layer: 1024 * (2 * 1024 + 2 * 256 + 3 * 3072),
        formats: &FORMATS,
    },
    Shape {
        config: r#""model_type": "gemma3_text", "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0"#,
        layer: 768 * (2 * 1024 + 2 * 256 + 3 * 2048),
        formats: &[DType::BF16, DType::Q8_0, DType::Q5_0, DType::Q4_K],
    },
];

impl Shape {
    /// Of as many layers as the weights of a step want.
    fn json(&self, format: DType) -> String {
        let layers = format.bytes(self.layer).map_or(1, |bytes| BYTES.div_ceil(bytes));
        format!(
            r#"{{{}, "num_hidden_layers": {layers}, "vocab_size": 32000, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": true}}"#,
            self.config
        )
    }
}

/// Measures a machine that has the roofline of `table`, with all its cores.
///
/// # Errors
/// Where there is no room for temporary files, or what compiling and running can meet.
pub fn costs(table: &MachineTable) -> Result<Costs> {
    let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let input = folder.path().join("config.json");
    let file = MachineFile { path: input.clone(), table: table.clone(), hash: String::new() };
    let all_of = |shape: &'static Shape| shape.formats.iter().map(move |format| (shape, *format));
    let bar = report::bar("measuring kernels", SHAPES.iter().flat_map(all_of).count());
    let mut all = Costs::default();
    for (shape, format) in SHAPES.iter().flat_map(all_of) {
        std::fs::write(&input, shape.json(format)).map_err(|e| Error::io(&input, e))?;
        let options = CompileOptions {
            machine: Some(file.clone()),
            weights: Some(format),
            synthetic_seed: Some(1),
            ..CompileOptions::default()
        };
        let found = costs::measure(&input, &folder.path().join("m.mansard"), &options, &mut Quiet)?;
        all.factors.extend(found.factors);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(all)
}
