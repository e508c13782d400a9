"""Serving in figures: bench/serving.py MANSARD ARTIFACT [--threads 2] [--draft SMALL.mansard] [--peer PYTHON MODEL.gguf]

One stream, 8 and 32 streams of 128 tokens each, beside llama.cpp's batched decode of the same width in the same run (`--peer`: the Python of
`bench/peers/install`, and the model in its fastest 4-bit form); the time between tokens of 32 streams; how much of it is not spent in steps;
the time to the first token of a second prompt with the same beginning; decoding a text that repeats itself, and free text, with guesses and
without, in turn. Medians, each beside its own single stream, over HTTP.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

ap = argparse.ArgumentParser()
ap.add_argument("mansard")
ap.add_argument("artifact")
ap.add_argument("--threads", default="2")
ap.add_argument("--reps", type=int, default=3)
ap.add_argument("--draft")
ap.add_argument("--peer", nargs=2, metavar=("PYTHON", "MODEL.gguf"))
ap.add_argument("--json", action="store_true", help="one object of all figures at the end")
a = ap.parse_args()
TEXT = ("The river rises in the hills above the old town, runs past seven mills, and reaches the sea where fishermen mend "
        "their nets. In spring it carries snow from the mountains; in autumn, leaves of every colour. ")
figures = {}


class Server:
    """A server on a port of its own."""

    def __init__(self, *arguments):
        command = [a.mansard, "serve", a.artifact, "--port", "0", "-t", a.threads, "--log", "warn", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"serving `(.*)` on (http://\S+)", line):
                self.model, self.url = found.groups()
                break
        else:
            sys.exit("the server did not start")
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()

    def __enter__(self):
        self.ask("warm up", 16)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def request(self, **body):
        body = dict(model=self.model, ignore_eos=True) | body
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=600)

    def ask(self, prompt, tokens, **options):
        """Seconds, and the answer."""
        start = time.perf_counter()
        with self.request(prompt=prompt, max_tokens=tokens, **({"temperature": 0} | options)) as reply:
            answer = json.load(reply)
        return time.perf_counter() - start, answer

    def gaps(self, prompt, tokens, out):
        """Seconds between the events of a stream."""
        with self.request(prompt=prompt, max_tokens=tokens, temperature=0, stream=True) as reply:
            times = [time.perf_counter() for line in reply if line.startswith(b"data: {")]
        out.extend(after - before for before, after in zip(times, times[1:]))

    def streams(self, count, tokens=128, **options):
        """Tokens a second of so many streams at once."""
        return count * tokens / together(count, lambda i: self.ask(f"Story {i} begins", tokens, **options))

    def figure(self, name):
        with urllib.request.urlopen(self.url + "/metrics") as page:
            return float(re.search(rf"^{name} (\S+)$", page.read().decode(), re.M)[1])


def together(count, work):
    """Seconds of so many at once."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def median(measure):
    return statistics.median(measure(i) for i in range(a.reps))


def tell(name, value, text):
    figures[name] = value
    print(text, flush=True)


with Server() as server:
    one = median(lambda _: server.streams(1))
    tell("1 stream", one, f"1 stream    {one:8.1f} tok/s")
    for count in (8, 32):
        before = server.figure("mansard_step_seconds_sum")
        start = time.perf_counter()
        rate = median(lambda _: server.streams(count))
        beside = 1 - (server.figure("mansard_step_seconds_sum") - before) / (time.perf_counter() - start)
        tell(f"{count} streams", rate,
             f"{count:2} streams  {rate:8.1f} tok/s   {rate / one:.2f} x   {beside:.1%} of the time not in steps")
    rate = median(lambda _: server.streams(32, temperature=1))
    tell("32 streams drawn", rate, f"32 streams, drawn at temperature 1 {rate:8.1f} tok/s")
    if a.peer:
        script = pathlib.Path(__file__).parent / "peers" / "llama_cpp_speed.py"
        command = [a.peer[0], script, a.peer[1], "--threads", a.threads, "--reps", str(a.reps), "--pp", "0", "--tg", "0",
                   "--batch", "32", "--steps", "128"]
        theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["tg128 b32"]
        rate = median(lambda _: server.streams(32))
        tell("llama.cpp 32", theirs, f"llama.cpp 32 {theirs:7.1f} tok/s   ours, after it, {rate:8.1f}: {rate / theirs:.2f} x")
    gaps = []
    together(32, lambda i: server.gaps(f"Story {i} begins", 128, gaps))
    p50, p99 = (statistics.quantiles(gaps, n=100)[i - 1] * 1e3 for i in (50, 99))
    tell("gaps", [p50, p99], f"between tokens of 32 streams: median {p50:.1f} ms, p99 {p99:.1f} ms")
    ratios = []
    for i in range(a.reps):
        beginning = f"Number {i}. " + TEXT * 24
        first, answer = server.ask(beginning + "First question: why?", 1)
        second, again = server.ask(beginning + "Second question: how?", 1)
        usage = again["usage"]
        ratios.append(second / first)
    tell("prefix", statistics.median(ratios),
         f"a common beginning of {usage['prompt_tokens_details']['cached_tokens']} of {usage['prompt_tokens']} tokens: "
         f"{statistics.median(ratios):.1%} of the first one's time to its first token")


def decoding(server, prompt):
    """Tokens a second, and the text."""
    short, (long, answer) = server.ask(prompt, 1)[0], server.ask(prompt, 129)
    return 128 / (long - short), answer["choices"][0]["text"]


prompts = {"copying": TEXT * 3 + TEXT[:60], "free text": "My favourite story is about a lighthouse keeper who"}
ways = {"guesses": ["--guesses", "7"]} | ({"a draft": ["--draft", a.draft]} if a.draft else {})
for way, arguments in ways.items():
    with Server() as plain, Server(*arguments) as guessing:
        for name, prompt in prompts.items():
            pairs = [(decoding(plain, prompt), decoding(guessing, prompt)) for _ in range(2 * a.reps + 1)]
            assert all(without[1] == with_[1] for without, with_ in pairs), f"{name}: {way} changed the answer"
            ratio = statistics.median(with_[0] / without[0] for without, with_ in pairs)
            without, with_ = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
            tell(f"{name}, {way}", ratio, f"{name:9} {without:8.1f} tok/s, with {way} {with_:8.1f}   {ratio:.2f} x")
if a.json:
    print(json.dumps(figures))
