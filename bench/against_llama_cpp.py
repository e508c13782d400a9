#!/usr/bin/env python3
"""Mansard and llama.cpp on one GGUF, in turn, in one run; prints each round and the ratio of the medians.

usage: against_llama_cpp.py MODEL.gguf [--threads 2] [--rounds 3] [--pp 512] [--tg 128] [--mansard target/release/mansard]
"""
import argparse, ctypes, datetime, json, os, platform, statistics, subprocess, sys, tempfile, time

import llama_cpp as L

ap = argparse.ArgumentParser()
ap.add_argument("model")
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--pp", type=int, default=512)
ap.add_argument("--tg", type=int, default=128)
ap.add_argument("--mansard", default="target/release/mansard")
a = ap.parse_args()

silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
L.llama_log_set(silent, None)
L.llama_backend_init()


class LlamaCpp:
    """Whole-batch prefill and one-token decode from an empty context, as llama-bench does."""

    def __init__(self):
        self.model = L.llama_model_load_from_file(a.model.encode(), L.llama_model_default_params())
        p = L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = a.pp + a.tg + 8, 2048, 512
        p.n_threads = p.n_threads_batch = a.threads
        self.context = L.llama_init_from_model(self.model, p)
        vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self.model))
        self.tokens = [(i * 7919 + 13) % (vocab - 1000) + 500 for i in range(a.pp + a.tg)]

    def decode(self, tokens, first):
        b = L.llama_batch_init(len(tokens), 0, 1)
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i] = token, first + i, 1
            b.seq_id[i][0] = 0
            b.logits[i] = i == len(tokens) - 1
        assert L.llama_decode(self.context, b) == 0
        L.llama_batch_free(b)

    def measure(self):
        memory = L.llama_get_memory(self.context)
        L.llama_memory_clear(memory, True)
        start = time.perf_counter()
        self.decode(self.tokens[: a.pp], 0)
        prefill = a.pp / (time.perf_counter() - start)
        L.llama_memory_clear(memory, True)
        start = time.perf_counter()
        for i in range(a.tg):
            self.decode(self.tokens[i : i + 1], i)
        return prefill, a.tg / (time.perf_counter() - start)


def mansard(artifact):
    command = [a.mansard, "bench", artifact, "-p", a.pp, "-n", a.tg, "-t", a.threads, "-r", 2, "-o", "json"]
    rows = json.loads(subprocess.run([str(c) for c in command], check=True, capture_output=True).stdout)
    rate = {row["test"]: row.get("tokens_per_second") for row in rows}
    return rate[f"pp{a.pp}"], rate[f"tg{a.tg}"]


def processor():
    with open("/proc/cpuinfo") as f:
        facts = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
    fact = {k.strip(): v.strip() for k, v in facts.items()}
    return f"{fact.get('model name', platform.machine())}, family {fact.get('cpu family')}, model {fact.get('model')}"


with tempfile.TemporaryDirectory() as folder:
    artifact = os.path.join(folder, "model.mansard")
    subprocess.run([a.mansard, "compile", a.model, "-o", artifact], check=True, capture_output=True)
    peer = LlamaCpp()
    peer.measure()
    ours, theirs = [], []
    for _ in range(a.rounds):
        ours.append(mansard(artifact))
        theirs.append(peer.measure())

report = {
    "date": datetime.date.today().isoformat(),
    "machine": processor(),
    "cores": os.cpu_count(),
    "model": os.path.basename(a.model),
    "threads": a.threads,
    "llama_cpp_python": L.__version__,
}
for i, test in enumerate((f"pp{a.pp}", f"tg{a.tg}")):
    mine, other = [r[i] for r in ours], [r[i] for r in theirs]
    report[test] = {
        "mansard": [round(x, 1) for x in mine],
        "llama_cpp": [round(x, 1) for x in other],
        "ratio_of_medians": round(statistics.median(mine) / statistics.median(other), 2),
    }
json.dump(report, sys.stdout, indent=1)
print()
