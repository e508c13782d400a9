#!/usr/bin/env python3
"""llama.cpp on one GGUF, as llama-bench measures: one JSON object of tokens per second, medians.

usage: llama_cpp_speed.py MODEL.gguf [--threads 2] [--reps 3] [--pp 512] [--tg 128] [--depth 0 2048] [--batch 8 32] [--steps 64]
       llama_cpp_speed.py MODEL.gguf --requantize OUT.gguf Q4_0|Q8_0|F16|BF16|F32      every matrix in that one type
"""
import argparse, ctypes, json, statistics, sys, time

import llama_cpp as L

ap = argparse.ArgumentParser()
ap.add_argument("model")
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--reps", type=int, default=3)
ap.add_argument("--pp", type=int, default=512)
ap.add_argument("--tg", type=int, default=128)
ap.add_argument("--depth", type=int, nargs="*", default=[0])
ap.add_argument("--batch", type=int, nargs="*", default=[])
ap.add_argument("--steps", type=int, default=64, help="tokens of each of a batch")
ap.add_argument("--requantize", nargs=2, metavar=("OUT", "TYPE"))
a = ap.parse_args()

silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
L.llama_log_set(silent, None)
L.llama_backend_init()

if a.requantize:
    out, kind = a.requantize
    params = L.llama_model_quantize_default_params()
    params.ftype = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}[kind]
    params.allow_requantize, params.pure = True, True
    sys.exit(L.llama_model_quantize(a.model.encode(), out.encode(), ctypes.byref(params)))

model = L.llama_model_load_from_file(a.model.encode(), L.llama_model_default_params())
vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))


def token(i):
    return (i * 7919 + 13) % (vocab - 1000) + 500


class Context:
    def __init__(self, positions, sequences=1):
        p = L.llama_context_default_params()
        p.n_ctx, p.n_seq_max, p.n_batch, p.n_ubatch = positions, sequences, 2048, 512
        p.n_threads = p.n_threads_batch = a.threads
        self.context = L.llama_init_from_model(model, p)

    def clear(self):
        L.llama_memory_clear(L.llama_get_memory(self.context), True)

    def step(self, entries, all_rows=False):
        """entries: (token, position, sequence); the last one's row leaves the step, or every one's."""
        b = L.llama_batch_init(len(entries), 0, 1)
        b.n_tokens = len(entries)
        for i, (tok, position, sequence) in enumerate(entries):
            b.token[i], b.pos[i], b.n_seq_id[i] = tok, position, 1
            b.seq_id[i][0] = sequence
            b.logits[i] = all_rows or i == len(entries) - 1
        status = L.llama_decode(self.context, b)
        L.llama_batch_free(b)
        assert status == 0, status

    def fill(self, count):
        self.clear()
        for first in range(0, count, 512):
            self.step([(token(i), i, 0) for i in range(first, min(count, first + 512))])


def median(measure):
    measure()
    return round(statistics.median(measure() for _ in range(a.reps)), 1)


def timed(count, work):
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def prefill():
    context.clear()
    return timed(a.pp, lambda: context.step([(token(i), i, 0) for i in range(a.pp)]))


def decode(depth):
    context.fill(depth)
    return timed(a.tg, lambda: [context.step([(token(i), depth + i, 0)]) for i in range(a.tg)])


def batched(width):
    context.clear()
    tokens = a.steps
    step = lambda i: context.step([(token(i + s), i, s) for s in range(width)], True)
    return timed(width * tokens, lambda: [step(i) for i in range(tokens)])


out = {"engine": "llama.cpp", "version": L.__version__, "threads": a.threads}
context = Context(max(a.pp, a.tg) + 8)
if a.pp:
    out[f"pp{a.pp}"] = median(prefill)
for depth in a.depth if a.tg else []:
    context = Context(depth + a.tg + 8)
    out[f"tg{a.tg}" + (f" @ d{depth}" if depth else "")] = median(lambda: decode(depth))
for width in a.batch:
    context = Context(width * max(128, a.steps + 8), width)
    out[f"tg{a.steps} b{width}"] = median(lambda: batched(width))
print(json.dumps(out))
