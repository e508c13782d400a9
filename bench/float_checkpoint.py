#!/usr/bin/env python3
"""A float checkpoint from a quantized GGUF file (llama, gemma3): the same function, in weights that show no old grid.

    python3 bench/float_checkpoint.py model.gguf model.mansard float/     # the artifact has the tokenizer

Dequantized weights lie on the grid they were quantized to, and a quantizer that finds it again would look better than it is.
So the bases in which a model computes are changed, exactly but for rounding to f16:

  llama    norm gains go into the matrices behind them; the residual stream is rotated by a random orthogonal matrix,
           the vocabulary's two matrices part
  gemma3   has gains on what is added to the residual stream, with which only permutations commute: it is permuted
  both     values of each key-value head are rotated, and the output projection back; neurons of each MLP are permuted
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

READ = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf:
    """Settings, and tensors in f32."""

    def __init__(self, path):
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.at = 8
        tensors, pairs = self.take("QQ")
        self.settings = {}
        for _ in range(pairs):
            key = self.text()
            self.settings[key] = self.value(self.take("I")[0])
        self.tensors = {}
        for _ in range(tensors):
            name, dims = self.text(), self.take("I")[0]
            self.tensors[name] = (self.take(f"{dims}Q")[::-1], *self.take("IQ"))
        align = self.settings.get("general.alignment", 32)
        self.start = -(-self.at // align) * align

    def take(self, what):
        size = struct.calcsize("<" + what)
        self.at += size
        return struct.unpack("<" + what, self.data[self.at - size : self.at].tobytes())

    def text(self):
        length = self.take("Q")[0]
        self.at += length
        return self.data[self.at - length : self.at].tobytes().decode("utf-8", "replace")

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            kind, count = self.take("IQ")
            return [self.value(kind) for _ in range(count)]
        return self.take(READ[kind])[0]

    def tensor(self, name):
        shape, kind, offset = self.tensors[name]
        block, size, unpack = UNPACK[kind]
        count = int(np.prod(shape))
        bytes_ = self.data[self.start + offset :][: count // block * size]
        return unpack(np.asarray(bytes_).reshape(-1, size)).astype(np.float64).reshape(shape)


def half(b, at):
    return np.ascontiguousarray(b[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(b):
    return np.concatenate([b & 15, b >> 4], axis=1).astype(np.float32)


def q5_0(b):
    high = np.unpackbits(np.ascontiguousarray(b[:, 2:6]), axis=1, bitorder="little").astype(np.float32)
    return half(b, 0) * (nibbles(b[:, 6:]) + 16 * high - 16)


def q4_k(b):
    q = b[:, 4:16].astype(np.int32)
    scale = np.concatenate([q[:, :4] & 63, q[:, 8:] & 15 | q[:, :4] >> 6 << 4], axis=1)
    low = np.concatenate([q[:, 4:8] & 63, q[:, 8:] >> 4 | q[:, 4:8] >> 6 << 4], axis=1)
    pairs = b[:, 16:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32).astype(np.float32)
    return (half(b, 0) * scale)[:, :, None] * codes - (half(b, 2) * low)[:, :, None]


def q6_k(b):
    low, high = b[:, :128].reshape(-1, 2, 1, 64), b[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    codes = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scale = b[:, 192:208].astype(np.int8).astype(np.float32)
    return (half(b, 208) * scale)[:, :, None] * codes


UNPACK = {
    0: (1, 4, lambda b: np.ascontiguousarray(b).view(np.float32)),
    1: (1, 2, lambda b: np.ascontiguousarray(b).view(np.float16)),
    2: (32, 18, lambda b: half(b, 0) * (nibbles(b[:, 2:]) - 8)),
    3: (32, 20, lambda b: half(b, 0) * nibbles(b[:, 4:]) + half(b, 2)),
    6: (32, 22, q5_0),
    8: (32, 34, lambda b: half(b, 0) * np.ascontiguousarray(b[:, 2:]).view(np.int8)),
    12: (256, 144, q4_k),
    14: (256, 210, q6_k),
}


def orthogonal(random, n):
    q, r = np.linalg.qr(random.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def heads_in_halves(w, heads):
    """Converters to GGUF put what rope pairs side by side; published checkpoints have it half a head apart."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def layer(gguf, index, name):
    return gguf.tensor(f"blk.{index}.{name}.weight")


def convert(gguf, random):
    """Tensors of the checkpoint, one after the other, under their published names."""
    arch = gguf.settings["general.architecture"]
    setting = lambda name: gguf.settings[f"{arch}.{name}"]
    hidden, heads, shared = setting("embedding_length"), setting("attention.head_count"), setting("attention.head_count_kv")
    width = setting("attention.key_length") if arch == "gemma3" else hidden // heads
    if arch == "llama":
        turn = orthogonal(random, hidden)
        gain = lambda g: np.ones(hidden)
        behind = lambda w, g: (w * g) @ turn
        before = lambda w: turn.T @ w
    else:
        order = random.permutation(hidden)
        # Gains are stored less one.
        gain = lambda g: g[order] - 1
        behind = lambda w, g: w[:, order]
        before = lambda w: w[order]
    final, table = gguf.tensor("output_norm.weight"), gguf.tensor("token_embd.weight")
    yield "model.norm.weight", gain(final)
    yield "model.embed_tokens.weight", behind(table, 1.0)
    if arch == "llama":
        output = gguf.tensor("output.weight") if "output.weight" in gguf.tensors else table
        yield "lm_head.weight", behind(output, final)
    del table
    for i in range(setting("block_count")):
        to = f"model.layers.{i}."
        g = layer(gguf, i, "attn_norm")
        yield to + "input_layernorm.weight", gain(g)
        for name in "qk":
            w = layer(gguf, i, f"attn_{name}")
            if arch == "llama":
                w = heads_in_halves(w, heads if name == "q" else shared)
            else:
                yield to + f"self_attn.{name}_norm.weight", layer(gguf, i, f"attn_{name}_norm") - 1
            yield to + f"self_attn.{name}_proj.weight", behind(w, g)
        turns = [orthogonal(random, width) for _ in range(shared)]
        v = layer(gguf, i, "attn_v").reshape(shared, width, hidden)
        v = np.concatenate([turn.T @ v for turn, v in zip(turns, v)])
        o = layer(gguf, i, "attn_output").reshape(hidden, heads, width)
        o = np.concatenate([o[:, h] @ turns[h * shared // heads] for h in range(heads)], axis=1)
        yield to + "self_attn.v_proj.weight", behind(v, g)
        yield to + "self_attn.o_proj.weight", before(o)
        neurons = random.permutation(setting("feed_forward_length"))
        g, after = layer(gguf, i, "ffn_norm"), "post_attention_layernorm"
        if arch == "gemma3":
            yield to + "post_attention_layernorm.weight", gain(layer(gguf, i, "post_attention_norm"))
            yield to + "post_feedforward_layernorm.weight", gain(layer(gguf, i, "post_ffw_norm"))
            after = "pre_feedforward_layernorm"
        yield to + after + ".weight", gain(g)
        for name in ("gate", "up"):
            yield to + f"mlp.{name}_proj.weight", behind(layer(gguf, i, f"ffn_{name}")[neurons], g)
        yield to + "mlp.down_proj.weight", before(layer(gguf, i, "ffn_down")[:, neurons])


def config(gguf):
    arch = gguf.settings["general.architecture"]
    setting = lambda name: gguf.settings[f"{arch}.{name}"]
    out = {
        "model_type": "llama" if arch == "llama" else "gemma3_text",
        "hidden_size": setting("embedding_length"),
        "intermediate_size": setting("feed_forward_length"),
        "num_hidden_layers": setting("block_count"),
        "num_attention_heads": setting("attention.head_count"),
        "num_key_value_heads": setting("attention.head_count_kv"),
        "max_position_embeddings": setting("context_length"),
        "rms_norm_eps": setting("attention.layer_norm_rms_epsilon"),
        "rope_theta": setting("rope.freq_base"),
        "vocab_size": len(gguf.settings["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": arch != "llama",
        "eos_token_id": gguf.settings["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float16",
    }
    if arch == "gemma3":
        out |= {"head_dim": setting("attention.key_length"), "sliding_window": setting("attention.sliding_window")}
        out |= {"query_pre_attn_scalar": setting("attention.key_length"), "hidden_activation": "gelu_pytorch_tanh"}
        out |= {"rope_local_base_freq": 1e4}
    return out


def section(artifact, name):
    data = Path(artifact).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    first, last = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return data[8 + length + first : 8 + length + last]


def main(model, artifact, folder):
    gguf, folder = Gguf(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(section(artifact, "tokenizer.json").rstrip())
    begin = gguf.settings.get("tokenizer.ggml.add_bos_token", False)
    name = gguf.settings["tokenizer.ggml.tokens"][gguf.settings["tokenizer.ggml.bos_token_id"]]
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": begin, "bos_token": name}))
    (folder / "config.json").write_text(json.dumps(config(gguf), indent=1))
    header, offset = {}, 0
    with open(folder / "tensors", "wb") as tensors:
        for name, values in convert(gguf, np.random.default_rng(1)):
            values = np.ascontiguousarray(values, dtype=np.float16)
            span = [offset, offset + values.nbytes]
            header[name] = {"dtype": "F16", "shape": list(values.shape), "data_offsets": span}
            tensors.write(values.tobytes())
            offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as out, open(folder / "tensors", "rb") as tensors:
        out.write(struct.pack("<Q", len(text)) + text)
        while chunk := tensors.read(1 << 24):
            out.write(chunk)
    (folder / "tensors").unlink()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
