"""The published `openai` client, unmodified, against a server of Mansard's: openai_client.py URL MODEL, and URL of an encoder.

Every call is checked; any difference ends it with an exception.
"""

import asyncio
import json
import sys

import openai

generator, model, encoder, embedder = sys.argv[1:]
client = openai.OpenAI(base_url=generator + "/v1", api_key="none", max_retries=0)
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
options = dict(model=model, messages=messages, max_tokens=16, seed=7)


def refused(kind, code, call):
    try:
        call()
    except kind as error:
        assert code in (error.code, None), error
        return
    raise AssertionError(f"expected {kind}")


assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

chat = client.chat.completions.create(**options)
text = chat.choices[0].message.content
assert chat.object == "chat.completion" and chat.choices[0].finish_reason in ("stop", "length")
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
assert client.chat.completions.create(**options).choices[0].message.content == text

stream = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == text
assert stream[0].choices[0].delta.role == "assistant" and stream[-1].usage == chat.usage.model_copy(
    update={"prompt_tokens_details": stream[-1].usage.prompt_tokens_details}
)
with client.chat.completions.create(**{**options, "max_tokens": 100}, stream=True) as early:
    next(iter(early))  # and leave

several = client.chat.completions.create(**options, n=3)
assert len(several.choices) == 3 and several.choices[0].message.content == text
assert len({c.message.content for c in several.choices}) > 1

told = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0].logprobs.content
assert all(len(t.top_logprobs) == 2 and t.logprob <= t.top_logprobs[0].logprob <= 0 for t in told)

plain = client.completions.create(model=model, prompt="Hello", max_tokens=12, temperature=0)
assert plain.choices[0].text == client.completions.create(
    model=model, prompt="Hello", max_tokens=12, temperature=0
).choices[0].text
cut = plain.choices[0].text[3:5]
stopped = client.completions.create(model=model, prompt="Hello", max_tokens=12, temperature=0, stop=cut)
assert stopped.choices[0].text == plain.choices[0].text.split(cut)[0] and stopped.choices[0].finish_reason == "stop"
pieces = client.completions.create(model=model, prompt="Hello", max_tokens=12, temperature=0, stream=True)
assert "".join(p.choices[0].text for p in pieces) == plain.choices[0].text
assert client.completions.create(model=model, prompt="a", max_tokens=3, logprobs=1).choices[0].logprobs.tokens

both = client.completions.create(model=model, prompt=["Hello", "Goodbye"], max_tokens=12, temperature=0, echo=True)
assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == "Hello" + plain.choices[0].text
read = client.completions.create(model=model, prompt="Hello", max_tokens=0, echo=True, logprobs=2).choices[0]
assert read.text == "Hello" and read.logprobs.token_logprobs[0] is None and len(read.logprobs.token_logprobs) == 5

asked = dict(model=model, prompt=["Hello", "G"], max_tokens=4, temperature=0, echo=True, logprobs=2)
at_once = client.completions.create(**asked).choices
parts = [c.choices[0] for c in client.completions.create(**asked, stream=True)]
for index, one in enumerate(at_once):
    mine = [part for part in parts if part.index == index]
    assert "".join(part.text for part in mine) == one.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for part in mine if part.logprobs for value in getattr(part.logprobs, name)]
        assert streamed == getattr(one.logprobs, name), (name, streamed, one.logprobs)
    assert one.logprobs.token_logprobs[0] is None and len(one.logprobs.tokens) == len(["Hello", "G"][index]) + 4

schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
          "additionalProperties": False}
answer = client.chat.completions.create(
    **{**options, "max_tokens": 120},
    logit_bias={str(i): -100 for i in (9, 10, 13, 32)},
    response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}},
)
assert json.loads(answer.choices[0].message.content)["city"] in ("Rome", "Oslo"), answer

refused(openai.NotFoundError, "model_not_found", lambda: client.chat.completions.create(**{**options, "model": "x"}))
refused(openai.BadRequestError, "context_length_exceeded",
        lambda: client.completions.create(model=model, prompt="x" * 1000))
refused(openai.BadRequestError, "unsupported", lambda: client.chat.completions.create(**options, tools=[
    {"type": "function", "function": {"name": "f"}}]))
refused(openai.BadRequestError, "unsupported", lambda: client.embeddings.create(model=model, input="x"))

other = openai.OpenAI(base_url=encoder + "/v1", api_key="none", max_retries=0)
texts = ["\u0001\u0002", "\u0003", "\u0001\u0002"]
vectors = [d.embedding for d in other.embeddings.create(model=embedder, input=texts).data]
floats = [d.embedding for d in other.embeddings.create(model=embedder, input=texts, encoding_format="float").data]
assert vectors[0] == vectors[2] != vectors[1] and all(
    abs(a - b) < 1e-6 for v, f in zip(vectors, floats) for a, b in zip(v, f))
assert abs(sum(x * x for x in vectors[0]) - 1) < 1e-4


async def together():
    many = openai.AsyncOpenAI(base_url=generator + "/v1", api_key="none", max_retries=0)
    return await asyncio.gather(*(many.chat.completions.create(**options) for _ in range(16)))


assert {c.choices[0].message.content for c in asyncio.run(together())} == {text}
print("openai", openai.__version__, "is content")
