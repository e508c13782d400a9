#!/usr/bin/env python3
"""Builds here (x86-64, LLVM) what `on_gpu.py` runs there, and packs it.

    pack.py FOLDER [--smollm2 models/smollm2.gguf]

FOLDER gets the checker, artifacts of the tiny goldens, of SmolLM2 (where the file is there) and of Llama shapes whose weights
are made up where they run, what is expected of them, plan.json; and the same once more as part-0, part-1, ... of one archive,
each below 64 MiB. Then, on the machine with the GPU, in one call: python3 on_gpu.py FOLDER > result.json
"""
import argparse, json, os, shutil, subprocess, sys, tarfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
PART = 60 << 20
CHIPS = "sm_80,sm_90a"
GOLDENS = ["llama", "qwen3", "gemma3", "mixtral", "gpt2", "bert"]
FORMATS = ["bf16", "fp8", "int8", "int4-g32"]
PROMPT = list(range(1, 65))


def shape(config):
    """What torch_loop.py needs to know."""
    with open(config) as file:
        c = json.load(file)
    return {"hidden": c["hidden_size"], "intermediate": c["intermediate_size"], "layers": c["num_hidden_layers"],
            "heads": c["num_attention_heads"], "kv_heads": c["num_key_value_heads"],
            "head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], "vocab": c["vocab_size"]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--smollm2", default=os.path.join(ROOT, "models/smollm2.gguf"))
    parser.add_argument("--shapes", default="llama-1b,llama-8b")
    arguments = parser.parse_args()
    folder = os.path.abspath(arguments.folder)
    os.makedirs(folder, exist_ok=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    build = ["cargo", "build", "--release", "-p", "mansard", "-p", "mansard-gpu-check"]
    subprocess.run(build, cwd=ROOT, check=True)
    mansard = os.path.join(target, "release/mansard")
    at = lambda name: os.path.join(folder, name)

    def compile(model, name, *options):
        command = [mansard, "compile", model, "-o", at(name), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    plan = {"goldens": [], "answers": [], "speeds": [], "copied": 0, "kernels": True}
    # The harness writes kernels, new inputs, and what the interpreter makes of them.
    saving = ["cargo", "test", "--workspace", "--lib", "harness::saved"]
    subprocess.run(saving, cwd=ROOT, check=True, env={**os.environ, "MANSARD_GPU_CHECK": folder})
    for name in GOLDENS:
        source = os.path.join(ROOT, "tests/goldens", name)
        compile(source, f"{name}.mansard", "--target", f"x86-64-v3,{CHIPS}", "--context", "512")
        shutil.copy(os.path.join(source, "logits.npy"), at(f"{name}.npy"))
        with open(os.path.join(source, "tokens.json")) as file:
            tokens = json.load(file)
        output = "hidden" if name == "bert" else "logits"
        plan["goldens"].append({"name": name, "artifact": f"{name}.mansard", "tokens": tokens, "output": output,
                                "expected": f"{name}.npy", "tolerance": 2e-3})
    if os.path.exists(arguments.smollm2):
        compile(arguments.smollm2, "smollm2.mansard", "--target", f"x86-64-v3,{CHIPS}", "--context", "2048")
        ids = ",".join(map(str, PROMPT))
        run = [mansard, "run", at("smollm2.mansard"), "--tokens", ids, "-n", "32", "--temp", "0", "--ignore-end", "--json"]
        answer = json.loads(subprocess.run(run, check=True, capture_output=True).stdout)["tokens"]
        subprocess.run([mansard, "logits", at("smollm2.mansard"), "--tokens", ids, "-o", at("smollm2.npy")], check=True)
        # Activations are int8: sums in another order move a few codes.
        plan["answers"].append({"name": "smollm2", "artifact": "smollm2.mansard", "prompt": PROMPT, "answer": answer,
                                "expected": "smollm2.npy", "tolerance": 0.1})
    for name in filter(None, arguments.shapes.split(",")):
        config = os.path.join(ROOT, "bench/configs", f"{name}.json")
        for quant in FORMATS:
            artifact = f"{name}-{quant}.mansard"
            compile(config, artifact, "--target", "sm_90a", "--synthetic-weights", "--weights-at-open", "--quant", quant,
                    "--context", "2048")
            plan["speeds"].append({"name": f"{name} {quant}", "artifact": artifact, "context": 1024, "batches": [1, 8, 64],
                                   "decode": 32, "prefill": [1024], "shape": shape(config)})
    with open(at("plan.json"), "w") as file:
        json.dump(plan, file)
    shutil.copy(os.path.join(target, "release/mansard-gpu-check"), at("mansard-gpu-check"))
    pack(folder)


def pack(folder):
    names = sorted(n for n in os.listdir(folder) if not n.startswith("part-"))
    archive = os.path.join(folder, "all.tar")
    with tarfile.open(archive, "w") as tar:
        for name in names:
            tar.add(os.path.join(folder, name), name)
    index = 0
    with open(archive, "rb") as file:
        while piece := file.read(PART):
            with open(os.path.join(folder, f"part-{index}"), "wb") as out:
                out.write(piece)
            index += 1
    os.remove(archive)
    print(f"{index} parts in {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
