"""Who writes training questions and answers: the local model, or any OpenAI-compatible endpoint.

A teacher gets requests, each a task about a passage, and returns a text for each, or None where it gave none. The
`openai` client asks a slow or overloaded endpoint again, with growing pauses. This module does not interpret the texts.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from gistrag.errors import GistRAGError, ResourceError, UsageError
from gistrag.model.batching import batches_by_length
from gistrag.model.prompt import passage_text

if TYPE_CHECKING:
    import openai

    from gistrag.model.gist_model import GistModel

logger = logging.getLogger("gistrag")

ROWS, TOKENS = 16, 8192
"""Most requests in a batch of the local model, and most tokens of their prompts, padding included."""

ANSWER_BYTES_MAX = 4_000_000
"""Most bytes of an endpoint's answer."""

HOPELESS = 8
"""After this many requests in a row without an answer, the next ones are tried once only, until one is answered."""

LOST = 40
"""After this many requests in a row without an answer, the endpoint is given up."""

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)

SYSTEM = "You are a careful writer. Use only what the passage says."


@dataclass(frozen=True)
class Request:
    """What a teacher is asked.

    Attributes:
        task: what to write.
        passage: what to write about; "" for a question that the teacher answers from its own knowledge.
        heading: headings above the passage.
        rules: how to write it. Only endpoints get the rules; the local model is too small to follow them.
        begin: the first words of the text. The local model continues them.
    """

    task: str
    passage: str = ""
    heading: tuple[str, ...] = ()
    rules: str = ""
    begin: str = ""

    def messages(self) -> list[dict[str, str]]:
        """Return the request as a chat."""
        if not self.passage:
            return [{"role": "user", "content": self.task}]
        passage = passage_text(self.passage, self.heading)
        return [
            {"role": "system", "content": f"{SYSTEM} {self.rules}".strip()},
            {"role": "user", "content": f"Passage:\n\n{passage}{self.task}"},
        ]


class Teacher(Protocol):
    """Writes a text for each request."""

    def fits(self, request: Request, *, max_new_tokens: int) -> bool:
        """Return whether the context window has room for a request and a text of that length."""

    def write(self, requests: Sequence[Request], *, max_new_tokens: int) -> list[str | None]:
        """Return a text for each request, None where the teacher gave none."""


class LocalTeacher:
    """The base model itself: greedy, without adapter, with the passage as text, as in a prompt of `gistrag query`.

    So a long answer it writes is the one that a user of the base model gets, and training keeps it.

    Raises:
        UsageError: a model with an adapter.
    """

    def __init__(self, model: GistModel) -> None:
        if model.adapter is not None:
            raise UsageError("expected a base model to write with, found one with an adapter; load it without")
        self._model = model

    def fits(self, request: Request, *, max_new_tokens: int) -> bool:
        """Return whether both fit the model's context window."""
        return len(self._ids(request)) <= self._room(max_new_tokens)

    def write(self, requests: Sequence[Request], *, max_new_tokens: int) -> list[str | None]:
        """Return a text for each request, None for one that does not fit."""
        from gistrag.kv.cache import concatenate
        from gistrag.model.generation import generate_batch

        memory = concatenate([self._model.prefix], self._model.rope)
        prompts = [self._ids(request) for request in requests]
        room = self._room(max_new_tokens)
        texts: list[str | None] = [None] * len(requests)
        fitting = [row for row, ids in enumerate(prompts) if len(ids) <= room]
        lengths = [len(prompts[row]) for row in fitting]
        for batch in batches_by_length(lengths, budget=TOKENS, rows_max=ROWS):
            rows = [fitting[number] for number in batch]
            answers = generate_batch(
                self._model, [memory] * len(rows), [prompts[row] for row in rows], max_new_tokens=max_new_tokens
            )
            for row, ids in zip(rows, answers, strict=True):
                texts[row] = (requests[row].begin + self._model.decode(ids)).strip()
        return texts

    def _room(self, max_new_tokens: int) -> int:
        return self._model.window - self._model.prefix.gists - max_new_tokens

    def _ids(self, request: Request) -> list[int]:
        passage = self._model.encode_passage(request.passage, request.heading) if request.passage else []
        return [*passage, *self._model.encode_question(request.task), *self._model.encode(request.begin)]


class EndpointTeacher:
    """A model behind ``POST {base_url}/chat/completions``.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: its name there.
        key: sent as a bearer token to this address only; redirects are not followed, and it is never logged.
        timeout_s: most seconds for one answer.
        retries: further attempts after a failed one.
        parallel: most requests at a time.

    Raises:
        UsageError: *base_url* is no http address, *key* cannot be sent, or the openai package is missing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 4,
        parallel: int = 4,
    ) -> None:
        _require_address(base_url)
        key = _checked(key)
        if key and base_url.startswith("http://") and urlsplit(base_url).hostname not in _THIS_MACHINE:
            logger.warning("the key goes to %s without encryption; name an https address", urlsplit(base_url).netloc)
        self._base_url, self._model = base_url.rstrip("/"), model
        self._timeout_s, self._retries, self._parallel = timeout_s, retries, parallel
        self._client = _client(self._base_url, key, timeout_s)
        self._has_key = bool(key)
        self._unanswered_in_a_row = 0
        self._is_over = threading.Event()

    def fits(self, request: Request, *, max_new_tokens: int) -> bool:
        """Return True: only the endpoint knows its context window; it refuses what is too long."""
        return True

    def write(self, requests: Sequence[Request], *, max_new_tokens: int) -> list[str | None]:
        """Return a text for each request, None where the endpoint gave none.

        Raises:
            UsageError: the endpoint refuses key, address or model, so no request could ever be answered.
            ResourceError: it answered none of the last `LOST` requests.
        """
        self._is_over.clear()
        texts: list[str | None] = [None] * len(requests)

        def ask(number: int) -> tuple[int, str | None]:
            return number, self._ask(requests[number], max_new_tokens)

        try:
            with ThreadPool(self._parallel) as pool:  # its threads are daemons, so Ctrl-C waits for no slow endpoint
                for number, text in pool.imap_unordered(ask, range(len(requests))):
                    texts[number] = text
        finally:
            self._is_over.set()
        return texts

    def _ask(self, request: Request, max_new_tokens: int) -> str | None:
        """Return the text of one answer, None where there was none."""
        if self._is_over.is_set():
            return None
        try:
            text = self._answer(request, max_new_tokens, self._retries if self._unanswered_in_a_row < HOPELESS else 0)
        except _NoAnswer as problem:
            self._note_unanswered(problem)
            return None
        except GistRAGError:
            self._is_over.set()
            raise
        self._unanswered_in_a_row = 0
        return text

    def _answer(self, request: Request, max_new_tokens: int, retries: int) -> str:
        """Return the text of one answer; an answer without a text is asked for again.

        Raises:
            _NoAnswer: there was none.
            UsageError: there will never be one.
        """
        problem = ""
        for _ in range(1 + retries):
            body = self._body(request, max_new_tokens, retries)
            try:
                return _content(body)
            except ValueError as error:
                problem = str(error)
        raise _NoAnswer(problem)

    def _body(self, request: Request, max_new_tokens: int, retries: int) -> bytes:
        """Return the body of one response, which is streamed so that neither its time nor its size is unlimited."""
        import openai

        messages: Any = request.messages()
        hidden = ("OpenAI-Organization", "OpenAI-Project", *(() if self._has_key else ("Authorization",)))
        create = self._client.with_options(max_retries=retries).chat.completions.with_streaming_response.create
        try:
            with create(
                model=self._model, messages=messages, max_tokens=max_new_tokens, temperature=0,
                extra_headers={name: openai.Omit() for name in hidden},
            ) as response:  # fmt: skip
                return _read(response.iter_bytes(), self._timeout_s)
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code) from None
        except openai.OpenAIError as error:
            raise _NoAnswer(str(error.__cause__ or error)) from None

    def _refusal(self, status: int) -> Exception:
        if status in (401, 403):
            return UsageError(
                f"the teacher at {self._base_url} refuses the key (HTTP {status}); "
                "set GISTRAG_TEACHER_KEY to a valid one"
            )
        if status == 404:
            return UsageError(
                f"found nothing at {self._base_url}/chat/completions, or no model {self._model!r} there (HTTP 404); "
                "check --base-url and --teacher"
            )
        return _NoAnswer(f"HTTP {status}")

    def _note_unanswered(self, problem: _NoAnswer) -> None:
        """Count a request without an answer, and log the first ones.

        Raises:
            ResourceError: there were `LOST` in a row.
        """
        self._unanswered_in_a_row += 1
        if self._unanswered_in_a_row >= LOST:
            self._is_over.set()
            raise ResourceError(
                f"no answer from {self._base_url} to {LOST} requests in a row: {problem}; start the endpoint and run "
                "the same command again, it resumes"
            )
        if self._unanswered_in_a_row <= HOPELESS:
            logger.warning("no answer from %s: %s", self._base_url, problem)


class _NoAnswer(Exception):
    """A request that got no answer, with the reason."""


def _require_address(base_url: str) -> None:
    """Return if this is an address of the web; the client would find out in the first request only.

    Raises:
        UsageError: it is not.
    """
    try:
        parts = urlsplit(base_url)
        host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:  # brackets or a port that are none
        host = None
    if not re.fullmatch(r"[\w.:%-]+", host or ""):
        raise UsageError(f"expected an address like http://localhost:8000/v1 for the teacher, got {base_url!r}")


def _checked(key: str | None) -> str | None:
    """Return a key without the white space around it, such as the line end of a file.

    Raises:
        UsageError: it holds what no header can; the message does not show it.
    """
    key = (key or "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UsageError("expected a key of ASCII letters, digits and signs; check GISTRAG_TEACHER_KEY")
    return key or None


def _client(base_url: str, key: str | None, timeout_s: float) -> openai.OpenAI:
    """Return the client of an endpoint.

    Raises:
        UsageError: the openai package is missing, or its HTTP library wants another address.
    """
    try:
        import openai
    except ImportError:
        raise UsageError('a teacher behind an endpoint needs: pip install "gistrag[synthesize]"') from None
    http_client = openai.DefaultHttpxClient(follow_redirects=False)  # the key is for the given address only
    try:
        return openai.OpenAI(base_url=base_url, api_key=key or "none", timeout=timeout_s, http_client=http_client)
    except Exception as error:  # the HTTP library has a class of its own for an address that is none
        raise UsageError(f"expected an address like http://localhost:8000/v1, got {base_url!r}: {error}") from error


def _read(pieces: Iterable[bytes], timeout_s: float) -> bytes:
    """Return the body of a response.

    Raises:
        _NoAnswer: it is too large, takes longer than *timeout_s*, or ends early.
    """
    deadline_s = time.monotonic() + timeout_s
    body = bytearray()
    try:
        for piece in pieces:
            body += piece
            if time.monotonic() > deadline_s:
                raise _NoAnswer("timed out")
            if len(body) > ANSWER_BYTES_MAX:
                raise _NoAnswer(f"more than {ANSWER_BYTES_MAX:,} bytes")
    except _NoAnswer:
        raise
    except Exception as error:  # while a body is read, the client passes on the errors of its HTTP library
        raise _NoAnswer(str(error) or type(error).__name__) from None
    return bytes(body)


def _content(body: bytes) -> str:
    """Return the text of a chat completion, without what the model thought aloud before it.

    Raises:
        ValueError: no chat completion, or one without a text.
    """
    try:
        text = str(json.loads(body)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"expected a chat completion, got {body[:60]!r}") from None
    if not (answer := _THOUGHT.sub("", text).strip()):
        raise ValueError("an empty answer")
    return answer.encode("utf-8", "replace").decode()  # JSON can hold half a character
