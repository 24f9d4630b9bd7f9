"""Who writes training questions and answers: the local model, or any OpenAI-compatible endpoint.

A teacher gets requests, a task and the passage it is about, and returns a text for each, or None where it could not
be brought to one. An endpoint may be slow, overloaded or down: it is asked again with growing pauses, and what it never
answers is None, so that whoever asks can count it and go on. What the texts mean is none of this module's business.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from typing import IO, TYPE_CHECKING, Any, Protocol

from gistrag.errors import GistRAGError, ResourceError, UsageError
from gistrag.model.prompt import passage_text

if TYPE_CHECKING:
    from gistrag.model.gist_model import GistModel

logger = logging.getLogger("gistrag")

ROWS = 16
TOKENS = 8192
"""The local model writes for as many requests at a time as both allow, padding counted."""

WAIT_S_MAX = 60.0
ANSWER_BYTES_MAX = 4_000_000
HOPELESS = 8
"""After so many requests in a row without an answer, each further one is tried once, until one is answered."""

LOST = 40
"""After so many the endpoint is given up."""

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)

SYSTEM = "You are a careful writer. Use only what the passage says."


@dataclass(frozen=True)
class Request:
    """What a teacher is asked: a task about a passage, or about nothing where it has to know by itself.

    Attributes:
        rules: how to do it, for a teacher that can follow rules; the local model gets the task alone.
        begin: what the text begins with; the local model is made to, its task need not say so.
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
    """Somebody who writes."""

    def fits(self, request: Request, *, max_new_tokens: int) -> bool:
        """Return whether a request, and a text of that length, is not too long to be ever answered."""

    def write(self, requests: Sequence[Request], *, max_new_tokens: int) -> list[str | None]:
        """Return a text for each request, None where there is none to be had."""


class LocalTeacher:
    """The base model itself, reading a passage as it does in a prompt: as text, with no adapter, greedily.

    What it writes is therefore what it would have said to the person who asks, which is what long answers are to keep.

    Raises:
        UsageError: a model with an adapter.
    """

    def __init__(self, model: GistModel) -> None:
        if model.adapter is not None:
            raise UsageError("expected a base model to write with, found one with an adapter; load it without")
        self._model = model

    def fits(self, request: Request, *, max_new_tokens: int) -> bool:
        """Return whether both fit the model's window."""
        return len(self._ids(request)) <= self._room(max_new_tokens)

    def write(self, requests: Sequence[Request], *, max_new_tokens: int) -> list[str | None]:
        """Return a text for each request, None for one that does not fit."""
        from gistrag.kv.cache import concatenate
        from gistrag.model.generation import generate_batch

        memory = concatenate([self._model.prefix], self._model.rope)
        prompts = [self._ids(request) for request in requests]
        room = self._room(max_new_tokens)
        texts: list[str | None] = [None] * len(requests)
        for rows in _groups([len(ids) for ids in prompts], room):
            said = generate_batch(
                self._model, [memory] * len(rows), [prompts[row] for row in rows], max_new_tokens=max_new_tokens
            )
            for row, ids in zip(rows, said, strict=True):
                texts[row] = (requests[row].begin + self._model.decode(ids)).strip()
        return texts

    def _room(self, max_new_tokens: int) -> int:
        return self._model.window - self._model.prefix.gists - max_new_tokens

    def _ids(self, request: Request) -> list[int]:
        passage = self._model.encode_passage(request.passage, request.heading) if request.passage else []
        return [*passage, *self._model.encode_question(request.task), *self._model.encode(request.begin)]


def _groups(lengths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Yield the numbers of rows to be read side by side, the short ones first; those longer than *room* never."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[row] > room:
            break
        if len(group) == ROWS or ((len(group) + 1) * lengths[row] > TOKENS and group):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


class EndpointTeacher:
    """A model behind ``POST {base_url}/chat/completions``.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: its name there.
        key: sent as a bearer token to this very address and nowhere else; never logged.
        timeout_s: for one answer, connection and all.
        retries: further attempts after a first that failed.
        wait_s: pause before the first of them, doubled before each further one unless the endpoint names its own.
        parallel: requests under way at a time.

    Raises:
        UsageError: *base_url* is no http address.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 4,
        wait_s: float = 1.0,
        parallel: int = 4,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"expected an address like http://localhost:8000/v1 for the teacher, got {base_url!r}")
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model, self._key = model, key
        self._timeout_s, self._retries, self._wait_s, self._parallel = timeout_s, retries, wait_s, parallel
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._unanswered_in_a_row = 0
        self._is_over = threading.Event()

    def fits(self, request: Request, *, max_new_tokens: int) -> bool:
        """Return True: what is too long for an endpoint only it knows, and says by not answering."""
        return True

    def write(self, requests: Sequence[Request], *, max_new_tokens: int) -> list[str | None]:
        """Return a text for each request, None where the endpoint gave none however often it was asked.

        Raises:
            UsageError: the endpoint refuses key, address or model; no request could ever be answered.
            ResourceError: it answered none of the last `LOST`.
        """
        texts: list[str | None] = [None] * len(requests)
        refusals: list[GistRAGError] = []
        numbers, turn = iter(range(len(requests))), threading.Lock()

        def work() -> None:
            while not self._is_over.is_set():
                with turn:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    texts[number] = self._ask(requests[number], max_new_tokens)
                except GistRAGError as refusal:
                    refusals.append(refusal)
                    return

        self._run(work, min(self._parallel, len(requests)))
        if refusals:
            raise refusals[0]
        return texts

    def _run(self, work: Any, count: int) -> None:
        """Run *work* in threads that end with the process, so that Ctrl-C never waits for a slow endpoint."""
        self._is_over.clear()
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._is_over.set()

    def _ask(self, request: Request, max_new_tokens: int) -> str | None:
        body = {
            "model": self._model,
            "messages": request.messages(),
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        problem: _NoAnswer | None = None
        for attempt in itertools.count():
            try:
                text = self._post(json.dumps(body).encode())
                self._unanswered_in_a_row = 0
                return text
            except _NoAnswer as error:
                problem = error
            patient = self._unanswered_in_a_row < HOPELESS and not problem.is_final
            if attempt == self._retries or not patient:
                break
            if self._is_over.wait(min(problem.wait_s or self._wait_s * 2**attempt, WAIT_S_MAX)):
                break
        self._unanswered_in_a_row += 1
        if self._unanswered_in_a_row == LOST:
            raise ResourceError(
                f"no answer from {self._url} to {LOST} requests in a row: {problem}; bring it up and run the same "
                "command again, it goes on"
            )
        if self._unanswered_in_a_row <= HOPELESS:
            logger.warning("no answer from %s: %s", self._url, problem)
        return None

    def _post(self, body: bytes) -> str:
        """Return the text of one answer.

        Raises:
            _NoAnswer: there was none.
            UsageError: there will never be one.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, body, headers)
        deadline_s = time.monotonic() + self._timeout_s
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return _content(_read(response, deadline_s))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, HTTPException) as error:  # URLError and timeouts are of the former
            raise _NoAnswer(str(getattr(error, "reason", error)) or type(error).__name__) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in (401, 403):
            return UsageError(
                f"the teacher at {self._url} wants another key (HTTP {error.code}); "
                "set GISTRAG_TEACHER_KEY to one it knows"
            )
        if error.code == 404:
            return UsageError(
                f"nothing answers at {self._url}, or it has no model {self._model!r} (HTTP 404); "
                "check --base-url and --teacher"
            )
        is_passing = error.code in (408, 409, 425, 429) or error.code >= 500
        return _NoAnswer(f"HTTP {error.code}", wait_s=_retry_after_s(error.headers), is_final=not is_passing)


class _NoAnswer(Exception):
    """One attempt that failed: how long the endpoint wants to be left alone, and whether there is no use in another."""

    def __init__(self, reason: str, *, wait_s: float = 0.0, is_final: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.is_final = wait_s, is_final


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key is for the address that was given."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Return nothing, which makes the redirect an error."""


def _read(response: Any, deadline_s: float) -> bytes:
    """Return the body of a response that ends in time and is of a sane size; a slow trickle is neither."""
    pieces: list[bytes] = []
    while piece := response.read1(65536):
        pieces.append(piece)
        if time.monotonic() > deadline_s:
            raise TimeoutError("timed out")
        if sum(map(len, pieces)) > ANSWER_BYTES_MAX:
            raise _NoAnswer(f"more than {ANSWER_BYTES_MAX:,} bytes")
    return b"".join(pieces)


def _content(body: bytes) -> str:
    try:
        text = str(json.loads(body)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        raise _NoAnswer(f"expected a chat completion, got {body[:60]!r}") from None
    if not (said := _THOUGHT.sub("", text).strip()):
        raise _NoAnswer("an empty answer")
    return said.encode("utf-8", "replace").decode()  # JSON can hold half a character


def _retry_after_s(headers: Message) -> float:
    """Return the seconds a ``Retry-After`` header names, 0 where there is none; dates are not heeded."""
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return 0.0
