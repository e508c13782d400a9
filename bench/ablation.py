#!/usr/bin/env python3
"""What choosing together is worth: docs/ablation.md, from one command.

    python3 bench/ablation.py --mansard target/release/mansard --models models [--measure] [--max-kld 0.02] [--only smollm2] > rows.md

Four ways to compile the same model for the same workload under the same accuracy budget:

    a  fixed     programs first, then the largest legal kernels (--search fixed); one format for all matrices
    b  search    programs and kernels together; the same one format
    c  after     programs and kernels together; formats for the fewest bytes, whatever the kernels (--precision after)
    d  joint     programs, kernels and formats together, for the least predicted time (--max-kld)

The one format of a and b is the coarsest whose measured divergence is within the budget. A configuration without weights
(the 8B shape) has no accuracy to measure: a and b only, priced but not written, in int4-g128. `--measure` times artifacts
with `mansard bench`: for a quiet machine.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKLOADS = {
    "chat, batch 1": ("prompt=512,generate=128,batch=1", ["-p", "512", "-n", "128"]),
    "batch 16 at 4096": ("prompt=0,generate=128,batch=16,context=4096", ["-p", "0", "-n", "128", "-b", "16", "-d", "4096"]),
}
# From few bytes to many.
UNIFORM = ["int4-g128", "int4-g64", "int4-g32", "q4_1", "q5_0", "q5_1", "int8", "bf16", "none"]
HEAD = "| model | workload | | formats | predicted ms | measured ms | KL divergence | weights MB | compile s |"


def run(command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done


def predicted(notes):
    """Milliseconds and megabytes that the pass `plan` names."""
    found = re.search(r"weights ([\d.]+) MB.*?([\d.]+) ms predicted", notes)
    return float(found[2]), float(found[1])


class Ablation:
    def __init__(self, arguments, folder):
        self.a, self.folder, self.divergences = arguments, folder, {}

    def mansard(self, *words):
        return run([self.a.mansard, *words])

    def compiled(self, model, options):
        """An artifact, and what its compilation reports."""
        artifact = Path(self.folder) / "m.mansard"
        begin = time.monotonic()
        report = json.loads(self.mansard("compile", model, "-o", artifact, "--json", *options).stdout)
        notes = " ".join(note for p in report["passes"] for note in p["notes"])
        return artifact, report, (*predicted(notes), time.monotonic() - begin)

    def divergence(self, artifact, model):
        return json.loads(self.mansard("eval", artifact, "--against", model, "--json").stdout)["kl_divergence_mean"]

    def uniform(self, model):
        """The coarsest format for all matrices that is within the budget."""
        for quant in UNIFORM:
            artifact, _, _ = self.compiled(model, ["--quant", quant])
            if self.divergence(artifact, model) <= self.a.max_kld:
                return quant
        sys.exit(f"{model}: no format for all matrices is within {self.a.max_kld}")

    def measured(self, artifact, bench):
        if not self.a.measure:
            return ""
        rows = json.loads(self.mansard("bench", artifact, "-o", "json", *bench).stdout)
        steps = lambda row: 1 if row["test"].startswith("pp") else row["tokens"]
        return f"{sum(steps(row) * row['milliseconds'] for row in rows):.0f}"

    def row(self, name, workload, letter, options, model):
        text, bench = WORKLOADS[workload]
        artifact, report, (ms, mb, seconds) = self.compiled(model, ["--workload", text, *options])
        formats = options[options.index("--quant") + 1] if "--quant" in options else "mixed"
        kld = report["budget"]["kl_divergence"] if "budget" in report else self.divergence(artifact, model)
        cells = [name, workload, letter, formats, f"{ms:.1f}", self.measured(artifact, bench)]
        print("| " + " | ".join([*cells, f"{kld:.4f}", f"{mb:.1f}", f"{seconds:.1f}"]) + " |", flush=True)

    def priced(self, name, workload, letter, search, config):
        """A row without an artifact: passes only."""
        text, _ = WORKLOADS[workload]
        begin = time.monotonic()
        options = ["--synthetic-weights", "--quant", "int4-g128", "--workload", text, "--search", search]
        done = self.mansard("compile", config, "--stop-after", "plan", "--time-passes", *options)
        ms, mb = predicted(done.stderr)
        seconds = time.monotonic() - begin
        print(f"| {name} | {workload} | {letter} | int4-g128 | {ms:.1f} | | | {mb:.1f} | {seconds:.1f} |", flush=True)

    def all(self):
        print(HEAD + "\n|---|---|---|---|---|---|---|---|---|", flush=True)
        for name, file in [("SmolLM2 135M", "smollm2.gguf"), ("Gemma 3 270M", "gemma3-270m.gguf")]:
            model = Path(self.a.models) / file
            if self.a.only and self.a.only not in file:
                continue
            quant = self.a.quant or self.uniform(model)
            for workload in WORKLOADS:
                self.row(name, workload, "a", ["--quant", quant, "--search", "fixed"], model)
                self.row(name, workload, "b", ["--quant", quant], model)
                if not self.a.no_budget:
                    budget = ["--max-kld", str(self.a.max_kld)]
                    self.row(name, workload, "c", [*budget, "--precision", "after"], model)
                    self.row(name, workload, "d", budget, model)
        if not self.a.only or self.a.only in "llama-8b":
            config = Path(__file__).parent / "configs" / "llama-8b.json"
            for workload in WORKLOADS:
                self.priced("Llama 8B shape", workload, "a", "fixed", config)
                self.priced("Llama 8B shape", workload, "b", "joint", config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mansard", default="target/release/mansard")
    parser.add_argument("--models", default="models")
    parser.add_argument("--max-kld", type=float, default=0.02)
    parser.add_argument("--measure", action="store_true", help="time artifacts; for a quiet machine")
    parser.add_argument("--only", help="one model: smollm2, gemma3, llama-8b")
    parser.add_argument("--quant", help="the one format of a and b, instead of looking for it")
    parser.add_argument("--no-budget", action="store_true", help="a and b only: nothing is calibrated")
    with tempfile.TemporaryDirectory() as folder:
        Ablation(parser.parse_args(), folder).all()


if __name__ == "__main__":
    main()
