"""Tiny quantized checkpoints and the logits they stand for: python make.py (needs numpy), in this folder.

A llama of one layer is quantized to nearest and stored as AutoGPTQ, AutoAWQ, compressed-tensors and transformers (fp8) store
it; each packer follows the loops of the project that it names. Logits are computed in float64 from the dequantized weights,
by a forward pass written here. Nothing of Mansard is used.
"""

import json
import os
import struct

import numpy as np

HIDDEN, HEADS, KV, DIM, INNER, VOCAB = 64, 4, 2, 16, 64, 32
EPS, THETA = 1e-5, 10000.0
TOKENS = [1, 17, 5, 30, 2, 9, 9, 24, 11, 0, 13]
MODULES = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj": (KV * DIM, HIDDEN),
    "self_attn.v_proj": (KV * DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NAMES = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}


def save(path, tensors):
    """A safetensors file; a value is an array, or an array and the name of its element type."""
    header, data = {}, b""
    for name, value in sorted(tensors.items()):
        array, dtype = value if isinstance(value, tuple) else (value, NAMES[str(value.dtype)])
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def save_npy(path, array):
    np.save(path, array.astype("<f4"))


def quantize(w, bits, group, symmetric, order=None):
    """Unsigned codes [n, k], f16 scales and zero points [n, groups], and the group of each column."""
    n, k = w.shape
    order = np.arange(k) if order is None else order
    index = np.empty(k, int)
    index[order] = np.arange(k) // group
    top = 2**bits - 1
    scales, zeros = np.zeros((n, k // group), np.float16), np.zeros((n, k // group), int)
    for g in range(k // group):
        part = w[:, index == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[:, g] = (high - low) / top
        zeros[:, g] = 2 ** (bits - 1) if symmetric else np.round(-low / scales[:, g])
    s, z = scales.astype(np.float64)[:, index], zeros[:, index]
    codes = np.clip(np.round(w / s) + z, 0, top).astype(np.int64)
    return codes, scales, zeros, index, s * (codes - z)


def words(values, bits, order=range(8)):
    """[.., m] -> int32 [.., m * bits / 32]: value order[i] of each word at bit i * bits."""
    per = 32 // bits
    out = np.zeros((*values.shape[:-1], values.shape[-1] // per), np.uint32)
    for word in range(out.shape[-1]):
        for i in range(per):
            out[..., word] |= values[..., word * per + order[i]].astype(np.uint32) << np.uint32(i * bits)
    return out.view(np.int32)


def gptq(w, bits, group, symmetric, less, act_order):
    order = np.argsort(-np.abs(w).sum(0), kind="stable") if act_order else None
    codes, scales, zeros, index, real = quantize(w, bits, group, symmetric, order)
    if less:
        zeros = np.maximum(zeros, 1)  # nought less one has no code
        s, z = scales.astype(np.float64)[:, index], zeros[:, index]
        real = s * (codes - z)
    return real, {
        "qweight": words(codes, bits).T,  # [k / 8, n]
        "qzeros": words(zeros.T - less, bits),  # [k / g, n / 8]
        "scales": scales.T,
        "g_idx": index.astype(np.int32),
    }


def awq(w, group):
    codes, scales, zeros, _, real = quantize(w, 4, group, False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return real, {"qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scales.T}


def pack_quantized(w, bits, group, symmetric):
    codes, scales, zeros, _, real = quantize(w, bits, group, symmetric)
    out = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": np.array(w.shape, np.int64)}
    if not symmetric:
        out["weight_zero_point"] = words(zeros.T, bits).T  # [n / 8, k / g]
    return real, out


def int_quantized(w):
    codes, scales, _, _, real = quantize(w, 8, w.shape[1], True)
    return real, {"weight": (codes - 128).astype(np.int8), "weight_scale": scales}


def e4m3(x):
    """Nearest 8-bit floats of reals: codes and values."""
    values = [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
    values = np.array(values)
    at = np.abs(np.abs(x)[..., None] - values).argmin(-1)
    return (at + 128 * (x < 0)).astype(np.uint8), values[at] * np.sign(x)


def float4(w, scales, group):
    """Nearest 4-bit floats under scales [n, k / group]: two a byte, and reals."""
    s = np.repeat(scales, group, 1)
    at = np.abs(np.abs(w / s)[..., None] - np.array(E2M1)).argmin(-1)
    codes = (at + 8 * (w < 0)).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, np.array(E2M1)[at] * np.sign(w) * s


def nvfp4(w):
    largest = np.abs(w).reshape(w.shape[0], -1, 16).max(-1)
    world = np.float32(448 * 6 / np.abs(w).max())
    codes, scales = e4m3(largest / 6 * float(world))
    packed, real = float4(w, scales / float(world), 16)
    return real, {
        "weight_packed": packed,
        "weight_scale": (codes, "F8_E4M3"),
        "weight_global_scale": np.array([world], np.float32),
    }


def mxfp4(w):
    largest = np.abs(w).reshape(w.shape[0], -1, 32).max(-1)
    exponent = np.floor(np.log2(largest)) - 2
    packed, real = float4(w, 2.0**exponent, 32)
    return real, {"weight_packed": packed, "weight_scale": (exponent + 127).astype(np.uint8)}


def fp8(w, block):
    rows, columns = block
    largest = np.abs(w).reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns).max((1, 3))
    scales = (largest / 448).astype(np.float32)
    s = np.repeat(np.repeat(scales.astype(np.float64), rows, 0), columns, 1)
    codes, values = e4m3(w / s)
    return values * s, codes, scales


def norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * gain


def rope(x):
    """[t, heads, dim]: halves are rotated."""
    angle = np.arange(x.shape[0])[:, None] * THETA ** (-np.arange(0, DIM, 2) / DIM)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits(weights, floats):
    f = {name: value.astype(np.float64) for name, value in floats.items()}
    x = f["model.embed_tokens.weight"][TOKENS]
    h, t = norm(x, f["model.layers.0.input_layernorm.weight"]), len(TOKENS)
    of = lambda x, name: x @ weights[name].T
    q = rope(of(h, "self_attn.q_proj").reshape(t, HEADS, DIM))
    k = rope(of(h, "self_attn.k_proj").reshape(t, KV, DIM)).repeat(HEADS // KV, 1)
    v = of(h, "self_attn.v_proj").reshape(t, KV, DIM).repeat(HEADS // KV, 1)
    scores = np.einsum("ahd,bhd->hab", q, k) / np.sqrt(DIM)
    scores[:, np.triu(np.ones((t, t), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    x = x + of(np.einsum("hab,bhd->ahd", p, v).reshape(t, -1), "self_attn.o_proj")
    h = norm(x, f["model.layers.0.post_attention_layernorm.weight"])
    gate = of(h, "mlp.gate_proj")
    x = x + of(gate / (1 + np.exp(-gate)) * of(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, f["model.norm.weight"]) @ f["lm_head.weight"].T


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}


def write(name, seed, settings, store):
    """One checkpoint: store(module, weight) gives the reals, and the tensors under the module's name."""
    random = np.random.default_rng(seed)
    floats = {
        "model.embed_tokens.weight": random.standard_normal((VOCAB, HIDDEN)),
        "model.layers.0.input_layernorm.weight": 1 + 0.1 * random.standard_normal(HIDDEN),
        "model.layers.0.post_attention_layernorm.weight": 1 + 0.1 * random.standard_normal(HIDDEN),
        "model.norm.weight": 1 + 0.1 * random.standard_normal(HIDDEN),
        "lm_head.weight": random.standard_normal((VOCAB, HIDDEN)) / 8,
    }
    floats = {name: value.astype(np.float16) for name, value in floats.items()}
    tensors, weights = dict(floats), {}
    for module, shape in MODULES.items():
        weights[module], stored = store(module, random.standard_normal(shape) / 8)
        tensors |= {f"model.layers.0.{module}.{last}": value for last, value in stored.items()}
    os.makedirs(name, exist_ok=True)
    save(f"{name}/model.safetensors", tensors)
    save_npy(f"{name}/logits.npy", logits(weights, floats))
    with open(f"{name}/config.json", "w") as f:
        json.dump(CONFIG | {"quantization_config": settings}, f, indent=1)
    with open(f"{name}/tokens.json", "w") as f:
        json.dump(TOKENS, f)


def compressed(module, w):
    """Every layout of compressed-tensors that keeps integers or 4-bit floats."""
    return {
        "self_attn.q_proj": lambda: pack_quantized(w, 4, 32, True),
        "self_attn.k_proj": lambda: pack_quantized(w, 4, 64, False),
        "self_attn.v_proj": lambda: pack_quantized(w, 8, 32, True),
        "self_attn.o_proj": lambda: pack_quantized(w, 4, 32, False),
        "mlp.gate_proj": lambda: int_quantized(w),
        "mlp.up_proj": lambda: nvfp4(w),
        "mlp.down_proj": lambda: mxfp4(w),
    }[module]()


def fp8_blocks(module, w, block):
    real, codes, scales = fp8(w, block)
    return real, {"weight": (codes, "F8_E4M3"), "weight_scale_inv": scales}


def fp8_channels(module, w):
    real, codes, scales = fp8(w, (1, w.shape[1]))
    return real, {"weight": (codes, "F8_E4M3"), "weight_scale": scales}


def fp8_whole(module, w):
    real, codes, scales = fp8(w, w.shape)
    return real, {"weight": (codes, "F8_E4M3"), "weight_scale": scales.reshape(())}


def main():
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "true_sequential": True}
    write("gptq", 1, base | {"group_size": 64, "sym": True}, lambda _, w: gptq(w, 4, 64, True, 1, False))
    write("gptq_v2", 2, base | {"checkpoint_format": "gptq_v2"}, lambda _, w: gptq(w, 4, 32, False, 0, False))
    write("gptq_act_order", 3, base | {"desc_act": True}, lambda _, w: gptq(w, 4, 32, False, 1, True))
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    write("awq", 4, settings | {"modules_to_not_convert": ["lm_head"]}, lambda _, w: awq(w, 32))
    settings = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    write("compressed", 5, settings | {"format": "mixed-precision"}, compressed)
    write("compressed_fp8", 6, settings | {"format": "float-quantized"}, fp8_channels)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}
    write("fp8", 7, settings, lambda module, w: fp8_blocks(module, w, (16, 32)))
    settings |= {"weight_block_size": [32, 16]}
    write("fp8_narrow", 8, settings, lambda module, w: fp8_blocks(module, w, (32, 16)))
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    write("fp8_whole", 9, settings, fp8_whole)


main()
