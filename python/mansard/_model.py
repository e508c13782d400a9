"""Models and their answers."""

from __future__ import annotations

import enum
import os
import threading
from json import dumps
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypedDict, Union

import numpy as np
import numpy.typing as npt

from ._errors import UsageError, check
from ._native import ffi, lib

Prompt = Union[str, Sequence[int], "npt.NDArray[np.integer[Any]]"]
Floats = npt.NDArray[np.float32]


class Message(TypedDict):
    """A turn of a conversation: `system`, `user` or `assistant`, and what was said."""

    role: str
    content: str


class Facts(NamedTuple):
    """Facts about a model."""

    architecture: str
    context: int  # most tokens of a prompt and its answer together
    vocab: int
    row: int  # floats of a row of `logits`
    embedding: int  # floats of an embedding; 0 where the model generates text
    encoder: bool
    tokenizer: bool
    chat_template: bool


class Finish(enum.Enum):
    """Why an answer ended."""

    STOP_TOKEN = lib.MANSARD_STOP_TOKEN
    MAX_TOKENS = lib.MANSARD_MAX_TOKENS
    CONTEXT = lib.MANSARD_CONTEXT
    STOP_TEXT = lib.MANSARD_STOP_TEXT


class Token(NamedTuple):
    """A token of an answer. Where `logprobs` were asked for, its log probability and those of the likeliest."""

    choice: int
    id: int
    text: str
    logprob: Optional[float]
    top: Tuple[Tuple[int, float], ...]


class Usage(NamedTuple):
    """Tokens of an answer: of the prompt, of those already computed for others, and generated."""

    prompt: int
    cached: int
    generated: int


def version() -> str:
    """The version of Mansard."""
    return _text(lib.mansard_version())


class Answer(Iterator[str]):
    """An answer on its way: an iterator over its pieces of text. Closing it, leaving its `with` block or dropping it ends it."""

    def __init__(self, request: Any, choices: int, logprobs: bool) -> None:
        self._request = request
        self._logprobs = logprobs
        self._event = ffi.new("mansard_event *")
        self._lock = threading.Lock()
        self._finish: List[Optional[Finish]] = [None] * choices
        self._usage: List[Optional[Usage]] = [None] * choices

    def __iter__(self) -> "Answer":
        return self

    def __next__(self) -> str:
        """The next piece of the first choice's text."""
        for token in self.tokens():
            if token.choice == 0 and token.text:
                return token.text
        raise StopIteration

    def tokens(self) -> Iterator[Token]:
        """Every token of every choice, as it comes. Text held back at the end comes as a token with id -1."""
        while True:
            token = self._next()
            if token is None:
                return
            if token.id >= 0 or token.text:
                yield token

    def _next(self) -> Optional[Token]:
        with self._lock:
            if self._request is None:
                return None
            event = self._event
            try:
                # The interpreter is free meanwhile; it comes back now and then to hear of signals.
                check(lib.mansard_next(self._request, 200, event))
            except BaseException:
                self._close()
                raise
            if event.kind == lib.MANSARD_NOTHING:
                return Token(0, -1, "", None, ())
            if event.kind == lib.MANSARD_END:
                self._close()
                return None
            text = ffi.buffer(event.text, event.text_bytes)[:].decode()
            if event.kind == lib.MANSARD_DONE:
                self._finish[event.choice] = Finish(event.finish)
                usage = Usage(event.prompt_tokens, event.cached_tokens, event.generated_tokens)
                self._usage[event.choice] = usage
                return Token(event.choice, -1, text, None, ())
            top = tuple((event.top[i].token, event.top[i].logprob) for i in range(event.top_count))
            return Token(event.choice, event.token, text, event.logprob if self._logprobs else None, top)

    def text(self) -> str:
        """What is left of the first choice, once it is all there."""
        return "".join(self)

    def texts(self) -> List[str]:
        """What is left of every choice, once it is all there."""
        texts = ["" for _ in self._finish]
        for token in self.tokens():
            texts[token.choice] += token.text
        return texts

    @property
    def finish(self) -> Optional[Finish]:
        """Why the first choice ended; None while it has not."""
        return self._finish[0]

    @property
    def usage(self) -> Optional[Usage]:
        """Tokens of the first choice; None while it has not ended."""
        return self._usage[0]

    def cancel(self) -> None:
        """Ends it; may be called while another thread waits for a piece."""
        request = self._request
        if request is not None:
            lib.mansard_cancel(request)

    def close(self) -> None:
        """Ends it and frees what it holds."""
        self.cancel()
        with self._lock:
            self._close()

    def _close(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            lib.mansard_request_free(request)

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_request", None) is not None:
            self._close()


class Model:
    """An opened artifact. What threads ask of it runs together.

    threads: workers, all physical cores where None. positions: of cache over all answers, sixteen contexts where None.
    verify: check the hashes of weights. running, queue, guesses: as docs/embedding.md says.
    """

    def __init__(
        self,
        path: Union[str, "os.PathLike[str]"],
        *,
        threads: Optional[int] = None,
        positions: Optional[int] = None,
        huge_pages: bool = False,
        pin: bool = False,
        verify: bool = True,
        running: Optional[int] = None,
        queue: Optional[int] = None,
        guesses: int = 0,
    ) -> None:
        self._model = self._engine = self._service = None
        self._lock = threading.Lock()
        engine = {"threads": threads or 0, "positions": positions or 0, "huge_pages": huge_pages, "pin": pin}
        try:
            self._engine_options = ffi.new("mansard_engine_options *", engine)
            self._service_options = ffi.new("mansard_service_options *", {"running": running or 0, "queue": queue or 0})
            self._service_options.engine = self._engine_options[0]
            self._service_options.guesses = guesses
        except (OverflowError, TypeError) as error:
            raise UsageError(f"an option that is out of range: {error}") from None
        name = os.fspath(path).encode()
        if b"\0" in name:
            raise UsageError("path: it has a zero byte in it")
        flags = 0 if verify else lib.MANSARD_TRUST_WEIGHTS
        self._model = _made("mansard_model *", lambda place: lib.mansard_model_open(lib.MANSARD_ABI_VERSION, name, flags, place))
        facts = ffi.new("mansard_facts *")
        check(lib.mansard_model_facts(self._model, facts))
        sizes = (facts.context, facts.vocab, facts.row, facts.embedding)
        flags_of = (bool(facts.encoder), bool(facts.tokenizer), bool(facts.chat_template))
        self.facts = Facts(_text(facts.architecture), *sizes, *flags_of)

    def encode(self, text: str, special: bool = True) -> List[int]:
        """Token ids of a text; `special` as for plain text, around which the model wants special tokens."""
        data = _bytes(text)
        tokens: List[int] = _filled(
            "uint32_t[]", lambda *room: lib.mansard_encode(self._open(), data, special, *room), len(data) + 8
        )
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        ids = _ids(tokens)
        text: bytes = _filled("char[]", lambda *room: lib.mansard_decode(self._open(), ids, len(ids), *room), 8 * len(ids) + 64)
        return text.decode()

    def chat_prompt(self, messages: Sequence[Union[Message, Mapping[str, str]]]) -> str:
        """The prompt that the model's chat template makes of a conversation, up to where the answer begins."""
        texts = [(ffi.new("char[]", _bytes(m["role"])), ffi.new("char[]", _bytes(m["content"]))) for m in messages]
        turns = ffi.new("mansard_message[]", [{"role": role, "content": content} for role, content in texts])
        text: bytes = _filled("char[]", lambda *room: lib.mansard_chat_prompt(self._open(), turns, len(turns), *room), 4096)
        return text.decode()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        choices: int = 1,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        min_p: Optional[float] = None,
        typical: Optional[float] = None,
        repetition_penalty: Optional[float] = None,
        frequency_penalty: Optional[float] = None,
        presence_penalty: Optional[float] = None,
        logit_bias: Optional[Mapping[int, float]] = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        logprobs: Optional[int] = None,
        json: bool = False,
        schema: Union[str, bool, Mapping[str, Any], None] = None,
        regex: Optional[str] = None,
        grammar: Optional[str] = None,
        client: int = 0,
    ) -> Answer:
        """Continues a text, or token ids. Comes back at once; what is asked for together runs together.

        At most one of these says what the answer has to look like: json (any object), schema (JSON of a JSON schema), regex (in
        Rust's syntax, for the whole answer), grammar (context-free, in Lark's form)."""
        if isinstance(stop, str):
            raise UsageError("stop: expected a list of texts, found one")
        ids = _ids(self.encode(prompt) if isinstance(prompt, str) else prompt)
        form, described = _format(json, schema, regex, grammar)
        options = ffi.new("mansard_options *")
        check(lib.mansard_options_default(options))
        named = {
            "max_tokens": max_tokens, "choices": choices, "temperature": temperature, "top_k": top_k, "top_p": top_p,
            "min_p": min_p, "typical": typical, "repetition_penalty": repetition_penalty, "seed": seed, "client": client,
            "frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty, "ignore_end": ignore_end,
            "format": form, "logprobs": -1 if logprobs is None else logprobs, "bias_count": len(logit_bias or {}), "stop_count": len(stop),
        }  # fmt: skip
        texts = [ffi.new("char[]", _bytes(text)) for text in stop]
        pattern = ffi.new("char[]", _bytes(described))
        try:
            for name, value in named.items():
                if value is not None:
                    setattr(options, name, value)
            biased = ffi.new("uint32_t[]", list(logit_bias or {}))
            biases = ffi.new("float[]", list((logit_bias or {}).values()))
        except (OverflowError, TypeError) as error:
            raise UsageError(f"an option that is out of range: {error}") from None
        stops = ffi.new("char *[]", texts)
        options.bias_tokens, options.biases, options.stop, options.grammar = biased, biases, stops, pattern
        service = self._running()
        request = _made("mansard_request *", lambda place: lib.mansard_submit(service, ids, len(ids), options, place))
        return Answer(request, choices, logprobs is not None)

    def chat(self, messages: Sequence[Union[Message, Mapping[str, str]]], **options: Any) -> Answer:
        """Answers a conversation; options as those of `generate`."""
        return self.generate(self.encode(self.chat_prompt(messages), special=False), **options)

    def logits(self, prompt: Prompt, *, last: bool = False) -> Floats:
        """What the model says of every token: f32 [tokens, vocab]; with `last` of the last one: f32 [vocab]. An encoder gives its
        last hidden state: f32 [tokens, hidden]."""
        ids = _ids(self.encode(prompt) if isinstance(prompt, str) else prompt)
        count = 1 if last and not self.facts.encoder else len(ids)
        rows = lib.MANSARD_LAST_ROW if last else lib.MANSARD_ALL_ROWS
        out: Floats = np.empty((count, self.facts.row), np.float32)
        engine, written = self._computing(), ffi.new("size_t *")
        check(lib.mansard_logits(engine, ids, len(ids), rows, ffi.from_buffer("float[]", out), out.size, written))
        return out[-1] if last else out

    def embed(self, texts: Union[str, Sequence[Prompt]]) -> Floats:
        """Embeds texts with an encoder, as many at once as fit: f32 [texts, width], normalized; of one text f32 [width]."""
        if isinstance(texts, str):
            vector: Floats = self.embed([texts])[0]
            return vector
        lists = [self.encode(text) if isinstance(text, str) else list(text) for text in texts]
        ids, counts = _ids([id for tokens in lists for id in tokens]), ffi.new("size_t[]", [len(tokens) for tokens in lists])
        out: Floats = np.empty((len(lists), self.facts.embedding), np.float32)
        engine, written = self._computing(), ffi.new("size_t *")
        check(lib.mansard_embed(engine, ids, counts, len(lists), ffi.from_buffer("float[]", out), out.size, written))
        return out

    def close(self) -> None:
        """Ends everything; answers on their way fail."""
        with self._lock:
            model, self._model = self._model, None
            engine, self._engine = self._engine, None
            service, self._service = self._service, None
        for free, handle in (
            (lib.mansard_service_free, service),
            (lib.mansard_engine_free, engine),
            (lib.mansard_model_free, model),
        ):
            if handle is not None:
                free(handle)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _open(self) -> Any:
        if self._model is None:
            raise UsageError("the model was closed")
        return self._model

    def _running(self) -> Any:
        """The service, started when first asked for."""
        with self._lock:
            model = self._open()
            if self._service is None:
                options = self._service_options
                self._service = _made("mansard_service *", lambda place: lib.mansard_service_start(model, options, place))
            return self._service

    def _computing(self) -> Any:
        """The engine for logits and embeddings, made when first asked for."""
        with self._lock:
            model = self._open()
            if self._engine is None:
                options = self._engine_options
                self._engine = _made("mansard_engine *", lambda place: lib.mansard_engine_new(model, options, place))
            return self._engine


def _format(
    json: bool, schema: Union[str, bool, Mapping[str, Any], None], regex: Optional[str], grammar: Optional[str]
) -> Tuple[int, str]:
    """What an answer has to look like, as C takes it."""
    if schema is not None and not isinstance(schema, str):
        try:
            schema = dumps(schema)
        except (TypeError, ValueError) as error:
            raise UsageError(f"schema: expected what JSON can say: {error}") from None
    given = [
        (form, text)
        for form, text in (
            (lib.MANSARD_JSON, "" if json else None),
            (lib.MANSARD_SCHEMA, schema),
            (lib.MANSARD_REGEX, regex),
            (lib.MANSARD_LARK, grammar),
        )
        if text is not None
    ]
    if len(given) > 1:
        raise UsageError(f"expected at most one of json, schema, regex and grammar, found {len(given)}")
    return given[0] if given else (lib.MANSARD_TEXT, "")


def _made(kind: str, make: Callable[[Any], int]) -> Any:
    """The handle that a function writes."""
    place = ffi.new(f"{kind}*")
    check(make(place))
    return place[0]


def _filled(kind: str, fill: Callable[[Any, int, Any], int], guess: int) -> Any:
    """What a function writes, of any length; called again where the guess was too small."""
    count = ffi.new("size_t *")
    room = ffi.new(kind, guess)
    status = fill(room, guess, count)
    if status == lib.MANSARD_TOO_SMALL:
        room = ffi.new(kind, count[0])
        status = fill(room, count[0], count)
    check(status)
    # A copy: a slice would not keep the room alive.
    return ffi.unpack(room, count[0])


def _bytes(text: str) -> bytes:
    data = text.encode()
    if b"\0" in data:
        raise UsageError("expected text without zero bytes")
    return data


def _ids(tokens: Union[Sequence[int], "npt.NDArray[np.integer[Any]]"]) -> Any:
    try:
        return ffi.new("uint32_t[]", [int(token) for token in tokens])
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"expected token ids: {error}") from None


def _text(text: Any) -> str:
    found: bytes = ffi.string(text)
    return found.decode()
