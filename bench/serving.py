"""Serving in figures: bench/serving.py MANSARD ARTIFACT [THREADS]

One stream, 8 and 32 streams of 128 tokens each; the time to the first token of a second prompt with the same beginning; decoding a
text that repeats itself, and free text, with guesses and without. Medians of 3, each beside its own single stream, over HTTP.
"""

import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

mansard, artifact, *rest = sys.argv[1:]
threads = rest[0] if rest else "2"
TEXT = ("The river rises in the hills above the old town, runs past seven mills, and reaches the sea where fishermen mend "
        "their nets. In spring it carries snow from the mountains; in autumn, leaves of every colour. ")


class Server:
    """A server on a port of its own."""

    def __init__(self, *arguments):
        command = [mansard, "serve", artifact, "--port", "0", "-t", threads, "--log", "warn", *arguments]
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

    def ask(self, prompt, tokens):
        """Seconds, and the answer."""
        body = dict(model=self.model, prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as reply:
            answer = json.load(reply)
        return time.perf_counter() - start, answer

    def streams(self, count, tokens=128):
        """Tokens a second of so many streams at once."""
        asks = [threading.Thread(target=self.ask, args=(f"Story {i} begins", tokens)) for i in range(count)]
        start = time.perf_counter()
        for ask in asks:
            ask.start()
        for ask in asks:
            ask.join()
        return count * tokens / (time.perf_counter() - start)


def median(times, measure):
    return statistics.median(measure(i) for i in range(times))


with Server() as server:
    one = median(3, lambda _: server.streams(1))
    print(f"1 stream    {one:8.1f} tok/s")
    for count in (8, 32):
        rate = median(3, lambda _: server.streams(count))
        print(f"{count:2} streams  {rate:8.1f} tok/s   {rate / one:.2f} x")
    ratios = []
    for i in range(3):
        beginning = f"Number {i}. " + TEXT * 24
        first, answer = server.ask(beginning + "First question: why?", 1)
        second, again = server.ask(beginning + "Second question: how?", 1)
        usage = again["usage"]
        ratios.append(second / first)
    print(f"a common beginning of {usage['prompt_tokens_details']['cached_tokens']} of {usage['prompt_tokens']} tokens: "
          f"{statistics.median(ratios):.1%} of the first one's time to its first token")


def decoding(server, prompt):
    short, long = (median(3, lambda _: server.ask(prompt, tokens)[0]) for tokens in (1, 129))
    return 128 / (long - short)


prompts = {"copying": TEXT * 3 + TEXT[:60], "free text": "My favourite story is about a lighthouse keeper who"}
rates, texts = {}, {}
for guesses in ("0", "7"):
    with Server("--guesses", guesses) as server:
        for name, prompt in prompts.items():
            rates[name, guesses] = decoding(server, prompt)
            texts[name, guesses] = server.ask(prompt, 129)[1]["choices"][0]["text"]
for name in prompts:
    assert texts[name, "0"] == texts[name, "7"], f"{name}: guesses changed the answer"
    with_, without = rates[name, "7"], rates[name, "0"]
    print(f"{name:9} {without:8.1f} tok/s, with guesses {with_:8.1f}   {with_ / without:.2f} x")
