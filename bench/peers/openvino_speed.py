#!/usr/bin/env python3
"""OpenVINO GenAI on one GGUF: one JSON object of tokens per second, medians.

usage: openvino_speed.py MODEL.gguf [--threads 2] [--reps 3]

A new prompt each time: the pipeline keeps prefixes it has seen.
"""
import argparse, json, statistics, time

import numpy as np
import openvino as ov
import openvino_genai as genai

ap = argparse.ArgumentParser()
ap.add_argument("model")
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--reps", type=int, default=3)
a = ap.parse_args()

pipe = genai.LLMPipeline(a.model, "CPU", INFERENCE_NUM_THREADS=a.threads, PERFORMANCE_HINT="LATENCY")
prompts = 0


def generate(prompt, new):
    """Seconds of the whole call, and of a token after the first."""
    global prompts
    prompts += 1
    ids = (np.arange(prompt, dtype=np.int64) * 7919 + 131 * prompts)[None] % 48000 + 500
    config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
    start = time.perf_counter()
    result = pipe.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
    seconds = time.perf_counter() - start
    return seconds, result.perf_metrics.get_tpot().mean / 1e3 if new > 1 else None


for warm in (512, 8):
    generate(warm, 4)
print(json.dumps({
    "engine": "OpenVINO GenAI",
    "version": genai.__version__,
    "threads": a.threads,
    "pp512": round(statistics.median(512 / generate(512, 1)[0] for _ in range(a.reps)), 1),
    "tg128": round(statistics.median(1 / generate(1, 129)[1] for _ in range(a.reps)), 1),
}))
