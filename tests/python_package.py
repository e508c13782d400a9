"""The Python package as a user meets it: python_package.py GENERATOR ENCODER, two tiny artifacts; exits with 0 where all is well."""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np

import mansard


def raises(kind, call, word=""):
    try:
        call()
    except kind as error:
        assert word in str(error), f"{word!r} in {error}"
        return error
    raise AssertionError(f"expected {kind.__name__}")


generator, encoder = sys.argv[1:]
greedy = dict(temperature=0, max_tokens=12, ignore_end=True)

# Opening.
assert mansard.version().count(".") == 2
missing = raises(mansard.SystemRefused, lambda: mansard.Model("/nonexistent"), "/nonexistent")
assert isinstance(missing, OSError) and isinstance(missing, mansard.MansardError)
damaged = raises(mansard.InputError, lambda: mansard.Model(__file__), "python_package.py")
assert damaged.help
raises(mansard.UsageError, lambda: mansard.Model(generator, threads=-1), "out of range")
model = mansard.Model(generator, threads=2)
assert model.facts.architecture == "llama" and model.facts.vocab == 256 and model.facts.chat_template

# Text and tokens.
text = "Grüße, 世界!"
ids = model.encode(text)
assert model.decode(ids) == text and len(ids) == len(text.encode())
assert model.decode(model.encode("x" * 5000, special=False)) == "x" * 5000
assert model.chat_prompt([{"role": "user", "content": "Hi"}]) == "u:Hi\na:"
raises(mansard.UsageError, lambda: model.encode("a\0b"), "zero")

# All at once, as a stream, from ids, and again with the same seed.
whole = model.generate("Hello", **greedy)
said = whole.text()
assert said and whole.finish is mansard.Finish.MAX_TOKENS and whole.usage == (5, 0, 12)
pieces = list(model.generate("Hello", **greedy))
assert "".join(pieces) == said and len(pieces) > 1
assert model.generate(np.array(model.encode("Hello")), **greedy).text() == said
drawn = [model.generate("Hello", seed=7, max_tokens=12, ignore_end=True).text() for _ in range(2)]
assert drawn[0] == drawn[1]
assert model.chat([{"role": "user", "content": "Hi"}], **greedy).text()

# Choices, log probabilities, biases, stops.
four = model.generate("Hello", choices=4, max_tokens=8, ignore_end=True).texts()
assert len(four) == 4 and len(set(four)) > 1
tokens = [token for token in model.generate("Hello", logprobs=3, **greedy).tokens() if token.id >= 0]
assert len(tokens) == 12 and all(len(token.top) == 3 and token.logprob <= 0 for token in tokens)
assert all(token.top[0] == (token.id, token.logprob) for token in tokens)
biased = model.generate("Hello", logit_bias={65: 1000.0}, **greedy).tokens()
assert [token.id for token in biased if token.id >= 0] == [65] * 12
stop = said[3:5]
stopped = model.generate("Hello", stop=[stop], **greedy)
assert stopped.text() == said.split(stop)[0] and stopped.finish is mansard.Finish.STOP_TEXT

# Answers that look as they have to.
free = dict(max_tokens=200, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0)
place = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
unspaced = {token: -1000.0 for token in model.encode(" \n\r\t", special=False)}
for seed, schema in enumerate((place, json.dumps(place))):
    said_of = json.loads(model.generate("Where?", schema=schema, seed=seed, logit_bias=unspaced, **free).text())
    assert said_of["city"] in ("Rome", "Oslo"), said_of
assert re.fullmatch("[0-9]{3}-[a-f]{2}", model.chat([{"role": "user", "content": "Hi"}], regex="[0-9]{3}-[a-f]{2}", **free).text())
assert model.generate("Where?", grammar='start: "to " ("Rome" | "Oslo")', **free).text() in ("to Rome", "to Oslo")
assert model.generate("Where?", json=True, choices=2, **dict(free, max_tokens=3)).texts()[1].startswith("{")
raises(mansard.UsageError, lambda: model.generate("x", schema={"type": "nothing"}), "the schema")
raises(mansard.UsageError, lambda: model.generate("x", schema={"type": "integer", "minimum": 3, "maximum": 2}), "the schema")
raises(mansard.UsageError, lambda: model.generate("x", schema="{"), "not JSON")
raises(mansard.UsageError, lambda: model.generate("x", schema={"type": model}), "JSON")
raises(mansard.UsageError, lambda: model.generate("x", regex="("), "the regular expression")
raises(mansard.UsageError, lambda: model.generate("x", grammar="start: nothing"), "the grammar")
raises(mansard.UsageError, lambda: model.generate("x", json=True, regex="a"), "at most one")

# Many at once: each is what it is alone.
alone = [model.generate(f"Question {i}", **greedy).text() for i in range(8)]
answers = [model.generate(f"Question {i}", **greedy) for i in range(8)]
assert [answer.text() for answer in answers] == alone
found = [""] * 8
threads = [
    threading.Thread(target=lambda i=i: found.__setitem__(i, model.generate(f"Question {i}", **greedy).text()))
    for i in range(8)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert found == alone

# Cancelling: by leaving, by closing, from another thread, by forgetting.
long = dict(greedy, max_tokens=240)
with model.generate("Hello", **long) as answer:
    first = next(answer)
assert first and list(answer) == [] and answer.finish is None
answer = model.generate("Hello", **long)
next(answer)
threading.Timer(0.01, answer.cancel).start()
answer.text()
answer.close()
answer = model.generate("Hello", **long)
next(answer)
del answer
gc.collect()
assert model.generate("Hello", **greedy).text() == said

# Numbers.
rows = model.logits("Hello")
assert rows.shape == (5, 256) and rows.dtype == np.float32
last = model.logits("Hello", last=True)
assert last.shape == (256,) and np.allclose(last, rows[-1], atol=1e-3)
assert int(last.argmax()) == tokens[0].id

# The interpreter is free meanwhile.
count, done = 0, threading.Event()
thread = threading.Thread(target=lambda: (model.generate("Hello", **long).text(), done.set()))
thread.start()
while not done.is_set():
    count += 1
    time.sleep(0.0001)
assert count > 3

# What makes no sense.
raises(mansard.UsageError, lambda: model.generate("").text(), "at least one token")
raises(mansard.UsageError, lambda: model.generate("x", temperature=-1.0).text(), "temperature")
raises(mansard.UsageError, lambda: model.generate("x", max_tokens=-1), "out of range")
raises(mansard.UsageError, lambda: model.generate([1, 999]).text(), "tokens below 256")
raises(mansard.UsageError, lambda: model.generate([-1]), "token ids")
raises(mansard.UsageError, lambda: model.generate("x", stop="abc"), "list")
raises(mansard.UsageError, lambda: model.generate("x" * 500).text(), "256")
raises(mansard.UsageError, lambda: model.embed("x"), "embedding")
raises(ValueError, lambda: model.logits([]), "at least one token")
busy = mansard.Model(generator, threads=1, running=1, queue=1)
answers = []


def flood():
    for _ in range(64):
        answers.append(busy.generate("Hello", **long))


raises(mansard.BusyError, flood, "try again")
busy.close()
raises(mansard.UsageError, lambda: busy.generate("x"), "closed")
busy.close()
model.close()

# Embeddings.
with mansard.Model(encoder, threads=1) as embedder:
    vectors = embedder.embed(["one", "two", "one"])
    assert vectors.shape == (3, embedder.facts.embedding) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert np.allclose(vectors[0], vectors[2], atol=1e-5) and np.allclose(embedder.embed("one"), vectors[0], atol=1e-5)
    assert embedder.logits("one").shape[1] == embedder.facts.row
    raises(mansard.UsageError, lambda: embedder.generate("one"), "encoder")

example = [sys.executable, os.environ["MANSARD_EXAMPLE"], generator, "8"]
out = subprocess.run(example, input="Hi\nAnd?\n", capture_output=True, text=True, check=True)
assert out.stdout.count("\n") >= 2, out
print("fine")
