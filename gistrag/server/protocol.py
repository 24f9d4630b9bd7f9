"""The wire format of OpenAI's API: what a request may say, and how answers and errors are written.

Only the shape is theirs. What gistrag adds stands under the one name ``gistrag``: in a request how to read the
passages, in an answer its sources and what it took. Settings that make no sense here, such as ``top_p``, are ignored;
those that promise a form of answer it cannot keep, such as ``response_format``, are refused.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gistrag.answering.answer import Answer, Options
from gistrag.server.registry import Record, source_record
from gistrag.settings import Mode

MAX_TOKENS = 4096
TOP_K_MAX = 64
SHORT_CHARACTERS, PATH_CHARACTERS, STOPS_MAX = 200, 4096, 16


class Refusal(Exception):
    """A request that is not served: what the client is told, and nothing that is not meant for it."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> Record:
        """Return the error as OpenAI's clients read it."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character: a surrogate without its other half") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Short = Annotated[str, Field(max_length=SHORT_CHARACTERS), AfterValidator(_whole)]
Path = Annotated[str, Field(max_length=PATH_CHARACTERS), AfterValidator(_whole)]
Length = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class Part(BaseModel):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None

    @property
    def text(self) -> str:
        """Its words."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class Search(BaseModel):
    """Where to look; as in `gistrag.answering.answer.Options`."""

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(default=Options.top_k, ge=1, le=TOP_K_MAX)
    scope: Path | None = None
    filters: Annotated[dict[Short, Short], Field(max_length=3)] | None = None


class Reading(Search):
    """What a chat request may say under ``gistrag``: where to look, how to read it, and whether to name the sources."""

    mode: Mode = Options.mode
    footnotes: bool | None = None


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool | None = False


class ResponseFormat(BaseModel):
    """The form of an answer: text, and no other."""

    type: Literal["text"]


class ChatRequest(BaseModel):
    """``POST /v1/chat/completions``."""

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
    gistrag: Reading = Field(default_factory=Reading)

    @property
    def asked(self) -> list[str]:
        """What the user said, message by message."""
        return [message.text.strip() for message in self.messages if message.role == "user" and message.text.strip()]

    @property
    def stops(self) -> list[str]:
        """Texts an answer ends before."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    @property
    def options(self) -> Options:
        """How to answer."""
        reading = self.gistrag
        return Options(
            top_k=reading.top_k,
            mode=reading.mode,
            scope=reading.scope,
            filters=reading.filters,
            max_new_tokens=self.max_completion_tokens or self.max_tokens or Options.max_new_tokens,
            temperature=self.temperature or 0.0,
            seed=self.seed or 0,
        )


class RetrieveRequest(Search):
    """``POST /v1/retrieve``."""

    model: Short
    query: Text


class Completion:
    """One answer on its way to a client, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, answer: Answer, finish_reason: str) -> Record:
        """Return the answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        told = {"usage": usage(answer), "gistrag": told_of(answer)}
        return {**self._head, "object": "chat.completion", "choices": [choice], **told}

    def first(self, answer: Answer) -> str:
        """Return the event that an answer begins with; its sources are known by then."""
        sources = [source_record(source) for source in answer.sources]
        return self._chunk({"role": "assistant", "content": ""}, gistrag={"sources": sources})

    def next(self, piece: str) -> str:
        """Return a piece of the answer, as an event."""
        return self._chunk({"content": piece})

    def last(self, answer: Answer, finish_reason: str, *, with_usage: bool) -> Iterator[str]:
        """Yield the events that a stream ends with."""
        yield self._chunk({}, finish_reason, gistrag=told_of(answer))
        if with_usage:
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: Record, finish_reason: str | None = None, **extra: Record) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **extra})


def event(value: Record) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(answer: Answer) -> Record:
    """Return tokens as OpenAI counts them; the gists are the cached part of the prompt."""
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


def told_of(answer: Answer) -> Record:
    """Return what gistrag says of an answer: sources, seconds, and what it took."""
    return {
        "sources": [source_record(source) for source in answer.sources],
        "timings": {**vars(answer.timings), "decode_s": answer.timings.decode_s},
        "usage": vars(answer.usage),
    }


def footnotes(answer: Answer) -> str:
    """Return the sources as lines to stand below an answer."""
    lines = [f"[{number}] {source.place}" for number, source in enumerate(answer.sources, 1)]
    return "\n\n" + "\n".join(lines) if lines else ""


def cut(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield *pieces* without the blanks they begin with, and up to the first of the texts *stops*.

    What may be the beginning of a stop is held back until it is known not to be.

    >>> list(cut(iter([" one", " two#", "# three"]), ["##"]))
    ['one', ' two']
    """
    held, has_begun = "", False
    for piece in pieces:
        held = held + piece if has_begun else (held + piece).lstrip()
        has_begun = has_begun or bool(held)
        if ends := [at for stop in stops if (at := held.find(stop)) >= 0]:
            held = held[: min(ends)]
            break
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if held[:safe]:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of *text* may begin *stop*."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
