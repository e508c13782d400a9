#!/usr/bin/env python3
"""The table of docs/performance.md: Mansard and other engines in turn, in one run; prints it and writes the figures as JSON.

usage: performance.py --peers FOLDER --models FOLDER [--mansard target/release/mansard] [--rounds 3] [--only NAME...]
                      [--json OUT.json] [--document docs/performance.md]

Engines are those that `peers/install FOLDER` has set up. The folder of models holds smollm2.gguf, gemma3-270m.gguf and minilm/;
other forms of SmolLM2 and MiniLM's graphs are made there. Every group of rows is one model: each round measures Mansard, then
each engine, and ratios are those of the medians over the rounds.
"""
import argparse, dataclasses, datetime, json, os, platform, statistics, subprocess, sys

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclasses.dataclass
class Peer:
    """An engine on a model: the script's arguments, and which environment runs it."""
    name: str
    script: str
    arguments: list


@dataclasses.dataclass
class Row:
    """A line of the table: what Mansard's bench calls it, what each peer calls it and the ratio that is aimed at."""
    test: str
    against: dict  # peer -> (its key, ratio)
    share: float | None = None  # of the roofline


@dataclasses.dataclass
class Group:
    name: str
    model: str
    compile: list
    bench: list
    rows: list
    peers: list


def llama(model, *arguments):
    return Peer("llama.cpp " + model.split("-")[-1].removesuffix(".gguf").replace("smollm2", "Q4_1").replace("270m", "Q4_K_M"),
                "llama.cpp/llama_cpp_speed.py", [f"{{models}}/{model}", *arguments])


def openvino(model, *arguments):
    return Peer("OpenVINO", "openvino/openvino_speed.py", [f"{{models}}/{model}", *arguments])


def encoders(batch, *arguments):
    reps = ["--reps", "20" if batch == 1 else "5"]
    engines = ["onnxruntime", "openvino", "iree"] if not arguments else ["openvino"]
    graph = f"{{models}}/minilm-{batch}.onnx"
    return [Peer(e, f"{e}/encoder_speed.py", [e, graph, str(batch), "128", *reps, *arguments]) for e in engines]


def encoder(name, quant, batch, factor, *arguments):
    peers = encoders(batch, *arguments)
    test = "pp128" + (f" b{batch}" if batch > 1 else "")
    row = Row(test, {p.name: ("milliseconds", factor) for p in peers})
    bench = ["-p", "128", "-b", str(batch)]
    return Group(f"{name}, batch {batch}", "minilm", quant, bench, [row], peers)


def floats(kind, mine, share):
    peers = [llama(f"smollm2-{kind}.gguf")] + ([openvino(f"smollm2-{kind}.gguf")] if kind in ("F16", "Q8_0") else [])
    names = {p.name: 1.0 for p in peers}
    rows = [Row("pp512", {p: ("pp512", r) for p, r in names.items()}, share), Row("tg128", {p: ("tg128", r) for p, r in names.items()})]
    return Group(f"SmolLM2 {kind}", mine, [], ["-p", "512", "-n", "128"], rows, peers)


Q41, Q40, GEMMA = "smollm2.gguf", "smollm2-Q4_0.gguf", "gemma3-270m.gguf"
ONE = ["--threads", "1"]
GROUPS = [
    Group("SmolLM2 Q4_1", Q41, [], ["-p", "512", "-n", "128"], [
        Row("tg128", {"llama.cpp Q4_1": ("tg128", 2.5), "llama.cpp Q4_0": ("tg128", 1.7), "OpenVINO": ("tg128", 1.0)}, 0.75),
        Row("pp512", {"OpenVINO": ("pp512", 1.3), "llama.cpp Q4_1": ("pp512", 1.0), "llama.cpp Q4_0": ("pp512", 1.0)}, 0.60),
    ], [llama(Q41), llama(Q40), openvino(Q41)]),
    Group("Gemma 3 270M Q4_K_M", GEMMA, [], ["-p", "512", "-n", "128"], [
        Row("tg128", {"llama.cpp Q4_K_M": ("tg128", 2.0)}, 0.85),
        Row("pp512", {"llama.cpp Q4_K_M": ("pp512", 3.0)}),
    ], [llama(GEMMA)]),
    Group("SmolLM2 Q4_1 at depth", Q41, [], ["-p", "0", "-n", "128", "-d", "2048"], [
        Row("tg128 @ d2048", {"llama.cpp Q4_1": ("tg128 @ d2048", 3.5)}),
    ], [llama(Q41, "--depth", "2048", "--pp", "0")]),
    Group("SmolLM2 Q4_1 in batches", Q41, [], ["-p", "0", "-n", "64", "-b", "8,32"], [
        Row("tg64 b8", {"llama.cpp Q4_0": ("tg64 b8", 4.0)}),
        Row("tg64 b32", {"llama.cpp Q4_0": ("tg64 b32", 3.0)}),
    ], [llama(Q40, "--batch", "8", "32", "--pp", "0", "--tg", "0")]),
    Group("SmolLM2 Q4_1, 1 thread", Q41, [], ["-p", "512", "-n", "128", "-t", "1"], [
        Row("tg128", {"llama.cpp Q4_1": ("tg128", 2.5)}, 0.75),
        Row("pp512", {"llama.cpp Q4_1": ("pp512", 8.0)}),
    ], [llama(Q41, *ONE)]),
    Group("Gemma 3 270M Q4_K_M, 1 thread", GEMMA, [], ["-p", "512", "-n", "128", "-t", "1"], [
        Row("tg128", {"llama.cpp Q4_K_M": ("tg128", 2.5)}, 0.75),
        Row("pp512", {"llama.cpp Q4_K_M": ("pp512", 8.0)}),
    ], [llama(GEMMA, *ONE)]),
    floats("F32", "smollm2-F32.gguf", None),
    floats("F16", "smollm2-F16.gguf", None),
    floats("BF16", "smollm2-BF16.gguf", 0.65),
    floats("Q8_0", "smollm2-Q8_0.gguf", None),
    encoder("MiniLM float32", [], 1, 1.12),
    encoder("MiniLM float32", [], 32, 1.12),
    encoder("MiniLM bf16", ["--quant", "bf16"], 1, 1.3, "--bf16"),
    encoder("MiniLM bf16", ["--quant", "bf16"], 32, 1.3, "--bf16"),
    encoder("MiniLM int8", ["--quant", "int8"], 1, 2.0, "--bf16"),
    encoder("MiniLM int8", ["--quant", "int8"], 32, 2.0, "--bf16"),
    Group("Llama shape of 1B, int4-g64", "llama-1b", ["--synthetic-weights", "--quant", "int4-g64"],
          ["-p", "0", "-n", "32"], [Row("tg32", {}, 0.85)], []),
    Group("Llama shape of 8B, int4-g64", "llama-8b", ["--synthetic-weights", "--quant", "int4-g64"],
          ["-p", "0", "-n", "32"], [Row("tg32", {}, 0.90)], []),
]


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nexit {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def last_object(text):
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


class Run:
    def __init__(self, a):
        self.a = a
        self.python = lambda engine: os.path.join(a.peers, engine, "bin", "python")

    def prepare(self):
        """Other forms of the models, made once."""
        made = lambda name: os.path.join(self.a.models, name)
        for kind in ("Q4_0", "Q8_0", "F16", "BF16", "F32"):
            if not os.path.exists(made(f"smollm2-{kind}.gguf")):
                script = os.path.join(HERE, "peers", "llama_cpp_speed.py")
                run([self.python("llama.cpp"), script, made("smollm2.gguf"), "--requantize", made(f"smollm2-{kind}.gguf"), kind])
        for batch in (1, 32):
            if not os.path.exists(made(f"minilm-{batch}.onnx")):
                script = os.path.join(HERE, "peers", "encoder_speed.py")
                run([self.python("onnxruntime"), script, "onnx", made("minilm"), made(f"minilm-{batch}.onnx"), batch, 128])

    def artifact(self, group):
        """The compiled model, and its divergence from the float weights where it has a next token to predict."""
        source = os.path.join(self.a.models, group.model)
        if group.model.startswith("llama-"):
            source = os.path.join(HERE, "configs", group.model + ".json")
        out = os.path.join(self.a.models, f"bench-{group.model}{''.join(group.compile)}.mansard")
        run([self.a.mansard, "compile", source, "-o", out, *group.compile])
        if not source.endswith(".gguf"):
            return out, None
        found = run([self.a.mansard, "eval", out, "--against", source, "--limit", "512", "--json"])
        return out, json.loads(found)["kl_divergence_mean"]

    def ours(self, group, artifact):
        threads = [] if "-t" in group.bench else ["-t", str(self.a.threads)]
        rows = json.loads(run([self.a.mansard, "bench", artifact, *group.bench, *threads, "-r", "3", "-o", "json"]))
        return {row["test"]: row for row in rows}

    def theirs(self, peer):
        engine, script = peer.script.split("/")
        arguments = [argument.format(models=self.a.models) for argument in peer.arguments]
        threads = [] if "--threads" in arguments else ["--threads", str(self.a.threads)]
        return last_object(run([self.python(engine), os.path.join(HERE, "peers", script), *arguments, *threads]))

    def group(self, group):
        artifact, divergence = self.artifact(group)
        ours, theirs = [], {peer.name: [] for peer in group.peers}
        for _ in range(self.a.rounds):
            ours.append(self.ours(group, artifact))
            for peer in group.peers:
                theirs[peer.name].append(self.theirs(peer))
        for row in group.rows:
            yield self.result(group, row, divergence, ours, theirs)
        os.remove(artifact)

    def result(self, group, row, divergence, ours, theirs):
        milliseconds = any(key == "milliseconds" for key, _ in row.against.values())
        unit = "milliseconds" if milliseconds else "tokens_per_second"
        mine = statistics.median(r[row.test][unit] for r in ours)
        shares = [r[row.test]["roofline_share"] for r in ours if r[row.test].get("roofline_share")]
        result = {
            "model": group.name, "test": row.test, "unit": unit, "mansard": [round(r[row.test][unit], 2) for r in ours],
            "roofline_share": round(statistics.median(shares), 3) if shares else None, "roofline_aim": row.share,
            "kl_divergence": divergence, "peers": {},
        }
        for name, (key, aim) in row.against.items():
            values = [r[key] for r in theirs[name]]
            other = statistics.median(values)
            ratio = other / mine if milliseconds else mine / other
            result["peers"][name] = {"values": values, "ratio": round(ratio, 2), "aim": aim, "version": theirs[name][0]["version"]}
        return result


def processor():
    with open("/proc/cpuinfo") as f:
        facts = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
    fact = {k.strip(): v.strip() for k, v in facts.items()}
    return f"{fact.get('model name', platform.machine())}, family {fact.get('cpu family')}, model {fact.get('model')}"


def figure(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}"


def table(results):
    lines = ["| model | test | Mansard | of the roofline | KL divergence | other engines: figure, ratio (aim) |",
             "|---|---|---:|---:|---:|---|"]
    for r in results:
        unit = " ms" if r["unit"] == "milliseconds" else " tok/s"
        share = "" if r["roofline_share"] is None else f"{100 * r['roofline_share']:.0f}%"
        if r["roofline_aim"]:
            share += f" ({100 * r['roofline_aim']:.0f}%)"
        kl = "" if r["kl_divergence"] is None else f"{max(r['kl_divergence'], 0):.4f}"
        peers = "; ".join(f"{name} {figure(statistics.median(p['values']))}, **{p['ratio']:.2f}x** ({p['aim']:g}x)"
                          for name, p in r["peers"].items())
        lines.append(f"| {r['model']} | {r['test']} | {figure(statistics.median(r['mansard']))}{unit} | {share} | {kl} | {peers} |")
    return "\n".join(lines) + "\n"


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument("--peers", required=True)
    ap.add_argument("--models", required=True)
    ap.add_argument("--mansard", default="target/release/mansard")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--only", nargs="*", help="groups whose name holds one of these")
    ap.add_argument("--json")
    ap.add_argument("--document")
    a = ap.parse_args()
    work = Run(a)
    work.prepare()
    report = {"date": datetime.date.today().isoformat(), "machine": processor(), "cores": os.cpu_count(), "threads": a.threads,
              "rounds": a.rounds, "rows": []}
    results = report["rows"]
    for group in GROUPS:
        if a.only and not any(word in group.name for word in a.only):
            continue
        for result in work.group(group):
            results.append(result)
            print(table([result]).splitlines()[-1], flush=True)
        if a.json:  # after every group: a long run that is stopped keeps what it has
            with open(a.json, "w") as f:
                json.dump(report, f, indent=1)
    if a.document:
        with open(a.document) as f:
            before, rest = f.read().split("<!-- table -->")
            after = rest.split("<!-- end of table -->")[1]
        heading = f"{report['machine']}, {report['cores']} cores, {report['date']}, medians of {a.rounds} rounds:\n\n"
        with open(a.document, "w") as f:
            f.write(f"{before}<!-- table -->\n{heading}{table(results)}<!-- end of table -->{after}")


main()
