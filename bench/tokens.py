#!/usr/bin/env python3
"""Milliseconds of a step by its number of tokens: batched decoding, and one sequence's tokens.

    bench/tokens.py m.mansard --threads 2 --rounds 5 [--json FILE] [--most 64]

Each figure is the least over the rounds, for a neighbour can only add. Named below the table: a token more that makes a step
take more than 1.5 times as long (a cliff), and one that makes it take less than 95% (more tokens for less time). No third
party packages.
"""

import argparse
import json
import subprocess
import sys

CLIFF, DROP = 1.5, 0.95


def measure(arguments, counts, shape):
    """Milliseconds for each count, of steps shaped `batch` (a token of each of so many sequences) or `prompt`."""
    listed = ",".join(map(str, counts))
    tests = ["-p", "0", "-n", "8", "-b", listed] if shape == "batch" else ["-p", listed, "-n", "0"]
    command = [arguments.mansard, "bench", arguments.artifact, *tests, "-t", str(arguments.threads), "-r", "3", "-o", "json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {row["batch"] if shape == "batch" else row["tokens"]: row["milliseconds"] for row in rows}


def remarks(times):
    """Cliffs and drops from one count to the next."""
    counts = sorted(times)
    for fewer, more in zip(counts, counts[1:]):
        ratio = times[more] / times[fewer]
        if more == fewer + 1 and not DROP <= ratio <= CLIFF:
            yield f"{fewer} -> {more} tokens: {times[fewer]:.2f} -> {times[more]:.2f} ms, {ratio:.2f}x"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--mansard", default="target/release/mansard")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    counts = list(range(1, arguments.most + 1))
    best = {"batch": {}, "prompt": {}}
    for _ in range(arguments.rounds):
        for shape, times in best.items():
            for count, milliseconds in measure(arguments, counts, shape).items():
                times[count] = min(milliseconds, times.get(count, milliseconds))
    print("| tokens | a token of each sequence, ms | tok/s | one sequence, ms | tok/s |\n|---:|---:|---:|---:|---:|")
    for count in counts:
        cells = [f"{ms:.2f} | {1e3 * count / ms:.0f}" for ms in (best["batch"][count], best["prompt"][count])]
        print(f"| {count} | {' | '.join(cells)} |")
    for shape, times in best.items():
        for remark in remarks(times):
            print(f"{shape}: {remark}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(best, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
