"""The wire format of OpenAI's API: requests, answers and errors.

The extensions of gistrag are in one field, ``gistrag``: in a request it chooses the passages and their mode, in an
answer it holds sources, evidence, confidence, timings and usage. Settings that do not apply, such as ``top_p``, are
ignored, and named in the answer; settings that promise an answer gistrag cannot give, such as ``response_format``, are
refused.
"""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gistrag.answering.answer import Answer, Options, Source
from gistrag.answering.quoting import harmless, quote
from gistrag.qa.phrases import phrase
from gistrag.server.registry import Record, source_record
from gistrag.settings import Mode

MAX_TOKENS = 4096
TOP_K_MAX = 64
SHORT_CHARACTERS, PATH_CHARACTERS, STOPS_MAX = 200, 4096, 16
IGNORED_MAX = 32
INPUTS_MAX = 256
"""Texts that are embedded in one request."""
FILTERS_MAX = 16
IGNORED_ROLES = ("system", "developer", "tool", "function")
"""Roles of messages that change no answer."""


class APIError(Exception):
    """A refused request: status, code and message for the client, who may read all of them.

    Args:
        status: HTTP status.
        code: stable name of the error.
        message: one sentence for people.
        param: field of the request that is wrong.
    """

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> Record:
        """Return the error in the form that OpenAI's clients expect."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character: a surrogate without its pair") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Short = Annotated[str, Field(max_length=SHORT_CHARACTERS), AfterValidator(_encodable)]
Path = Annotated[str, Field(max_length=PATH_CHARACTERS), AfterValidator(_encodable)]
Length = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class Part(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a chat history."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None

    @property
    def text(self) -> str:
        """The text of all parts, a line each."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class Search(BaseModel):
    """The choice of chunks, as in `gistrag.answering.answer.Options`."""

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(default=Options.top_k, ge=1, le=TOP_K_MAX)
    scope: Path | None = None
    filters: Annotated[dict[Short, Short], Field(max_length=FILTERS_MAX)] | None = None


class Extension(Search):
    """The field ``gistrag`` of a chat request: the choice of chunks, the mode, and what the server decides if None."""

    mode: Mode = Options.mode
    footnotes: bool | None = None
    second_reading: bool | None = None


class FolderRequest(BaseModel):
    """``POST /v1/folders``."""

    model_config = ConfigDict(extra="forbid")

    path: Path


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = False


class ResponseFormat(BaseModel):
    """The form of an answer: text only."""

    type: Literal["text"]


class ChatRequest(BaseModel):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")

    model: Short
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Short | Annotated[list[Short], Field(max_length=STOPS_MAX)] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    gistrag: Extension = Field(default_factory=Extension)

    @property
    def questions(self) -> list[str]:
        """The user's messages that contain text, oldest first."""
        return [message.text.strip() for message in self.messages if message.role == "user" and message.text.strip()]

    @property
    def stops(self) -> list[str]:
        """The stop texts: an answer ends before the first of them."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    @property
    def ignored(self) -> list[str]:
        """The settings that change nothing, such as ``top_p`` and ``messages.system``."""
        extra = self.model_extra or {}
        names = [name[:SHORT_CHARACTERS] for name, value in extra.items() if value not in (None, [], {})]
        roles = {message.role for message in self.messages}
        return [*names[:IGNORED_MAX], *(f"messages.{role}" for role in IGNORED_ROLES if role in roles)]

    def options(self, *, second_reading: bool = Options.second_reading) -> Options:
        """Return the options of the answer.

        Args:
            second_reading: where the request does not say.
        """
        extension = self.gistrag
        return Options(
            top_k=extension.top_k,
            mode=extension.mode,
            scope=extension.scope,
            filters=extension.filters,
            max_new_tokens=self.max_completion_tokens or self.max_tokens or Options.max_new_tokens,
            temperature=self.temperature or 0.0,
            seed=self.seed or 0,
            second_reading=second_reading if extension.second_reading is None else extension.second_reading,
            history=tuple(self.questions[:-1]),
        )


class RetrieveRequest(Search):
    """``POST /v1/retrieve``."""

    model: Short
    query: Text


class EmbeddingRequest(BaseModel):
    """``POST /v1/embeddings``: texts, as queries or, by default, as passages."""

    model_config = ConfigDict(extra="forbid")

    model: Short
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=INPUTS_MAX)]
    encoding_format: Literal["float", "base64"] | None = None
    input_type: Literal["query", "document"] = "document"
    dimensions: None = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """The texts to embed."""
        return [self.input] if isinstance(self.input, str) else self.input

    def record(self, vectors: Sequence[npt.NDArray[np.float32]], *, tokens: int) -> Record:
        """Return the response: a vector for each text, of length 1."""
        data = [
            {"object": "embedding", "index": number, "embedding": self._encoded(vector)}
            for number, vector in enumerate(vectors)
        ]
        return {
            "object": "list",
            "model": self.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _encoded(self, vector: npt.NDArray[np.float32]) -> str | list[float]:
        if self.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers


class Completion:
    """Formats one answer, whole or as the events of a stream.

    Args:
        ignored: settings of the request that change nothing.
    """

    def __init__(self, model: str, *, ignored: Sequence[str] = ()) -> None:
        self._ignored = list(ignored)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, answer: Answer, finish_reason: str) -> Record:
        """Return the answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        extra = {"usage": usage(answer), "gistrag": self._details(answer)}
        return {**self._head, "object": "chat.completion", "choices": [choice], **extra}

    def first(self, answer: Answer) -> str:
        """Return the first event of a stream, which holds what was searched, and the sources."""
        sources = [source_record(source) for source in answer.sources]
        extra = {"searched": answer.searched, "sources": sources}
        return self._chunk({"role": "assistant", "content": ""}, gistrag=extra)

    def next(self, piece: str) -> str:
        """Return the event of a piece of the answer."""
        return self._chunk({"content": piece})

    def last(self, answer: Answer, finish_reason: str, *, with_usage: bool) -> Iterator[str]:
        """Yield the events that end a stream."""
        yield self._chunk({}, finish_reason, gistrag=self._details(answer))
        if with_usage:
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)})
        yield "data: [DONE]\n\n"

    def _details(self, answer: Answer) -> Record:
        return {**details(answer), "ignored": self._ignored}

    def _chunk(self, delta: Record, finish_reason: str | None = None, **extra: Record) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **extra})


def event(value: Record) -> str:
    """Return a server-sent event that holds *value* as JSON."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(answer: Answer) -> Record:
    """Return the token counts in OpenAI's form; gist slots count as cached tokens of the prompt."""
    used = answer.usage
    prompt = used.gist_slots + used.text_tokens + used.question_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": used.answer_tokens,
        "total_tokens": prompt + used.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": used.gist_slots},
        "gist_slots": used.gist_slots,
        "source_tokens": used.source_tokens,
    }


def details(answer: Answer) -> Record:
    """Return the field ``gistrag`` of an answer: what is thought of it, sources, timings in seconds, and usage."""
    return {
        "searched": answer.searched,
        "confidence": answer.confidence,
        "verdict": answer.verdict,
        "unsupported": list(answer.unsupported),
        "withheld": answer.withheld,
        "language": answer.language,
        "quote": quote(answer),
        "sources": [source_record(source) for source in answer.sources],
        "timings": {**vars(answer.timings), "decode_s": answer.timings.decode_s},
        "usage": vars(answer.usage),
    }


def footnotes(answer: Answer) -> str:
    """Return what to append to an answer: the mark of the source that carries it, doubts, and the numbered sources."""
    mark = answer.marked.removeprefix(answer.text)
    doubts = [phrase("compare", answer.language)] if answer.verdict == "unsure" else []
    if answer.unsupported:
        doubts.append(f"{phrase('unsupported', answer.language)} {', '.join(answer.unsupported)}.")
    quoted = "" if answer.verdict == "not found" else quote(answer)
    lines = [_footnote(number, source, quoted) for number, source in enumerate(answer.sources, 1)]
    return mark + "".join("\n\n" + block for block in (" ".join(doubts), "\n".join(lines)) if block)


def _footnote(number: int, source: Source, quoted: str) -> str:
    """Return the line of a source; in a front-end that shows Markdown it can load no image and has no tag or link."""
    line = f"[{number}] {harmless(source.place)}" + (f": “{quoted}”" if source.evidence and quoted else "")
    return re.sub(r"\](?=[(\[])|<(?=\S)", r"\g<0> ", line)


def cut(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield *pieces* without leading white space, up to the first of the texts *stops*.

    Text that may be the beginning of a stop is held back until the next piece decides; an empty piece stands for a step
    that shows nothing.

    >>> list(cut(iter([" one", "", " two#", "# three"]), ["##"]))
    ['one', '', ' two']
    """
    held, has_begun = "", False
    for piece in pieces:
        held = held + piece if has_begun else (held + piece).lstrip()
        has_begun = has_begun or bool(held)
        if ends := [at for stop in stops if (at := held.find(stop)) >= 0]:
            held = held[: min(ends)]
            break
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of *text* may be the beginning of *stop*."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
