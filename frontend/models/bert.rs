//! BERT, the encoder: bidirectional attention, norms after each sum, mean-pooled embedding.
//!
//! Tokens are taken as one segment: row 0 of the segment table is a vector added to every embedding.

use super::layers::{Assembly, Attention, Net, Norm, Projections, activation};
use super::{Family, Program};
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::names::Stems;
use mansard_ir::{Attrs, DType, Dim, Result, Type, attrs, bail};

pub(super) const FAMILY: Family = Family {
    model_types: &["bert"],
    gguf: &["bert"],
    stems: STEMS,
    root: ("", "embeddings.word_embeddings.weight"),
    build,
};

const STEMS: Stems = &[
    ("token_embd", "embeddings.word_embeddings"),
    ("position_embd", "embeddings.position_embeddings"),
    ("token_types", "embeddings.token_type_embeddings"),
    ("token_embd_norm", "embeddings.LayerNorm"),
    ("blk.attn_q", "encoder.layer.{}.attention.self.query"),
    ("blk.attn_k", "encoder.layer.{}.attention.self.key"),
    ("blk.attn_v", "encoder.layer.{}.attention.self.value"),
    ("blk.attn_output", "encoder.layer.{}.attention.output.dense"),
    ("blk.attn_output_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    ("blk.ffn_up", "encoder.layer.{}.intermediate.dense"),
    ("blk.ffn_down", "encoder.layer.{}.output.dense"),
    ("blk.layer_output_norm", "encoder.layer.{}.output.LayerNorm"),
];

const SEGMENT: &str = "embeddings.segment";

struct Bert {
    hidden: usize,
    inner: usize,
    heads: usize,
    vocab: usize,
    context: usize,
    norm: Norm,
    activation: &'static str,
}

fn build(_: &str, config: &Config, checkpoint: &mut Checkpoint) -> Result<Program> {
    let model = Bert {
        hidden: config.size("hidden_size")?,
        inner: config.size("intermediate_size")?,
        heads: config.size("num_attention_heads")?,
        vocab: config.size("vocab_size")?,
        context: config.size("max_position_embeddings")?,
        norm: Norm::Layer { eps: config.positive_or("layer_norm_eps", 1e-12)? },
        activation: activation(config.text("hidden_act")?.unwrap_or("gelu"))?,
    };
    let layers = config.layers("num_hidden_layers")?;
    let segments = config.size_or("type_vocab_size", 2)?;
    config.only("position_embedding_type", "absolute")?;
    config.only("is_decoder", false)?;
    config.only("add_cross_attention", false)?;
    config.only("bert.attention.causal", false)?;
    // 1 is the mean; 0 leaves the choice.
    config.only("bert.pooling_type", 1)?;
    config.accept(&["tie_word_embeddings", "classifier_dropout", "num_key_value_heads"]);
    config.finish()?;
    if !model.hidden.is_multiple_of(model.heads) {
        bail!(Input, "{} heads do not divide a width of {}", model.heads, model.hidden);
    }
    // Checkpoints from TensorFlow have their own words for gain and bias.
    checkpoint.rename(|name| match name.rsplit_once('.') {
        Some((stem, "gamma")) => format!("{stem}.weight"),
        Some((stem, "beta")) => format!("{stem}.bias"),
        _ => name.into(),
    })?;
    if let Some(table) = checkpoint.take("embeddings.token_type_embeddings.weight") {
        let rows = table.shape.first().copied().unwrap_or(0).max(segments.min(1));
        let mut row = table.piece(0, rows)?;
        row.shape.remove(0);
        checkpoint.add(SEGMENT, row)?;
    }
    let mut assembly = Assembly::new(checkpoint);
    assembly.call("embed", "", |net| model.embed(net))?;
    for layer in 0..layers {
        assembly.call("layer", &format!("encoder.layer.{layer}."), |net| model.layer(net))?;
    }
    assembly.call("head", "", |net| model.head(net))?;
    let outputs = vec!["hidden".into(), "embedding".into()];
    Ok(Program { outputs, encoder: true, ..Program::decoder(assembly, model.context, model.vocab, model.hidden) })
}

impl Bert {
    fn embed(&self, net: &mut Net<'_>) -> Result<()> {
        let tokens = net.input("tokens", Type::tensor(DType::I32, [Dim::T]));
        let positions = net.input("positions", Type::tensor(DType::I32, [Dim::T]));
        let table = net.matrix("embeddings.word_embeddings.weight", &[self.vocab, self.hidden])?;
        let x = net.op("embed", &[tokens, table], Attrs::none())?; // [t, hidden]
        let table = net.matrix("embeddings.position_embeddings.weight", &[self.context, self.hidden])?;
        let y = net.op("embed", &[positions, table], Attrs::none())?;
        let x = net.op("add", &[x, y], Attrs::none())?;
        let segment = net.vector(SEGMENT, self.hidden)?;
        let x = net.op("add_row", &[x, segment], Attrs::none())?;
        let x = net.norm(x, "embeddings.LayerNorm", self.hidden, self.norm)?;
        net.result("x", x);
        Ok(())
    }

    fn layer(&self, net: &mut Net<'_>) -> Result<()> {
        let head_dim = self.hidden / self.heads;
        let attention = Attention {
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim,
            projections: Projections {
                qkvo: ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
                qkv_bias: true,
                out_bias: true,
            },
            head_norm: None,
            rope: None,
            scale: (head_dim as f64).powf(-0.5),
            causal: false,
            window: 0,
            softcap: 0.0,
        };
        let inputs = net.layer_inputs(&attention);
        let y = net.attention(&inputs, inputs.x, &attention)?; // [t, hidden]
        let x = net.op("add", &[inputs.x, y], Attrs::none())?;
        let x = net.norm(x, "attention.output.LayerNorm", self.hidden, self.norm)?;
        let y = net.mlp(x, (self.hidden, self.inner), ["intermediate.dense", "output.dense"], self.activation)?;
        let x = net.op("add", &[x, y], Attrs::none())?;
        let x = net.norm(x, "output.LayerNorm", self.hidden, self.norm)?;
        net.result("x", x);
        Ok(())
    }

    fn head(&self, net: &mut Net<'_>) -> Result<()> {
        let x = net.input("x", Type::f32([Dim::T, Dim::N(self.hidden)]));
        let rows = net.input("rows", Type::tensor(DType::I32, [Dim::R]));
        let step = net.input("step", Type::Step);
        let hidden = net.op("select_rows", &[x, rows], Attrs::none())?; // [r, hidden]
        let mean = net.op("mean_pool", &[x, step], Attrs::none())?; // [s, hidden]
        let embedding = net.op("l2_normalize", &[mean], attrs! { eps = 1e-12 })?;
        net.result("hidden", hidden);
        net.result("embedding", embedding);
        Ok(())
    }
}
