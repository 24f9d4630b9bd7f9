"""Indexes over HTTP: the API that OpenAI's clients speak, and a page for people.

::

    GET  /                       the page                 POST /v1/chat/completions   an answer, streamed or whole
    GET  /v1/models              a model an index         POST /v1/retrieve           passages, nothing generated
    GET  /v1/documents           what an index holds      GET  /v1/passages/{id}      one chunk
    GET  /healthz, /metrics      for those who watch

The one door to FastAPI. Who may ask is decided before anything here runs (`gistrag.server.auth`); whatever touches a
model or an index runs in one thread (`gistrag.server.scheduler`), which interleaves the answers made at the same time,
a token each in turn. No document can be added, no file named and no model loaded over HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Full
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from gistrag import __version__
from gistrag.answering.answer import Answer
from gistrag.errors import ContextOverflowError, GistRAGError, ResourceError, UsageError
from gistrag.model.generation import require_room
from gistrag.rag import GistRAG
from gistrag.server.auth import Access, Guard
from gistrag.server.chat_history import question_of
from gistrag.server.deadline import Timed
from gistrag.server.protocol import ChatRequest, Completion, Refusal, RetrieveRequest, cut, event, footnotes
from gistrag.server.registry import Record, chunk_record, document_records, hit_record, status_record
from gistrag.server.scheduler import Turn, Turns

logger = logging.getLogger("gistrag")

T = TypeVar("T")
ChunkId = Annotated[int, Field(ge=1, lt=2**63)]

QUEUE_MAX = 16
GENERATION_S = 120.0
RETRY_AFTER_S = 2
PAGE = Path(__file__).with_name("page.html")
UNBUFFERED = {"x-accel-buffering": "no"}
"""Asks a proxy to pass on each event as it comes."""
CODES = {404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a server answers.

    Attributes:
        together: answers made at the same time; more wait in line.
        footnotes: an answer ends with its sources, unless a request says otherwise.
        log_questions: questions go to the log.
        metrics: ``/metrics`` is there.
    """

    together: int = 8
    footnotes: bool = False
    log_questions: bool = False
    metrics: bool = False


def application(shelf: Mapping[str, GistRAG], *, access: Access, terms: Terms | None = None) -> FastAPI:
    """Return the ASGI application that serves the indexes of *shelf*, all of one engine, by their names."""
    service = Service(shelf, terms or Terms())
    app = FastAPI(openapi_url=None, lifespan=service.lifespan)  # its pages about an API load scripts from elsewhere
    app.add_middleware(Guard, access=access)
    for path, method, endpoint in service.routes():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (Refusal, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)
    return app


class Service:
    """What the application does: a method for each route."""

    def __init__(self, shelf: Mapping[str, GistRAG], terms: Terms) -> None:
        self._shelf, self._terms = shelf, terms
        self._started = int(time.time())
        self._page = PAGE.read_text("utf-8")
        self._watches: set[asyncio.Task[None]] = set()
        self._turns: Turns

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Keep the working thread while the application runs."""
        self._turns = Turns(together=self._terms.together, waiting=QUEUE_MAX)
        yield
        await asyncio.to_thread(self._turns.close)

    def routes(self) -> Iterator[tuple[str, str, Callable[..., Any]]]:
        """Yield path, method and endpoint of all that is served."""
        yield "/", "GET", self.page
        yield "/healthz", "GET", self.health
        yield "/v1/models", "GET", self.models
        yield "/v1/models/{name}", "GET", self.model
        yield "/v1/documents", "GET", self.documents
        yield "/v1/passages/{chunk_id}", "GET", self.passage
        yield "/v1/retrieve", "POST", self.retrieve
        yield "/v1/chat/completions", "POST", self.chat
        if self._terms.metrics:
            from gistrag.server.prometheus import Metrics

            self._metrics = Metrics()
            yield "/metrics", "GET", self.measured

    async def page(self) -> Response:
        """Return the page, which may load nothing and talk to nobody but this server."""
        return HTMLResponse(self._page, headers={"content-security-policy": content_policy(self._page)})

    async def health(self) -> Record:
        """Return that the server lives, and how many wait in line."""
        return {"status": "ok", "version": __version__, "waiting": self._turns.waiting}

    async def measured(self, request: Request) -> Response:
        """Return the counters, which name all indexes: whoever may not see them all finds nothing here."""
        if not request.state.indexes.issuperset(self._shelf):
            raise HTTPException(404)
        return Response(self._metrics.page(waiting=self._turns.waiting), media_type=self._metrics.MEDIA_TYPE)

    async def models(self, request: Request) -> Record:
        """Return the indexes this client may ask."""
        names = [name for name in self._shelf if name in request.state.indexes]
        return {"object": "list", "data": [self._model_record(name) for name in names]}

    async def model(self, name: str, request: Request) -> Record:
        """Return one of them."""
        return self._model_record(self._named(name, request)[0])

    async def documents(self, request: Request, model: str | None = None) -> Record:
        """Return the documents of an index, and its totals."""
        name, rag = self._named(model, request)
        listed, status = await self._once(rag, name, lambda: (document_records(rag), status_record(rag)))
        return {"object": "list", "model": name, "data": listed, "status": status}

    async def passage(self, request: Request, chunk_id: ChunkId, model: str | None = None) -> Record:
        """Return one chunk with its whole text, and which come before and after it."""
        name, rag = self._named(model, request)
        found = await self._once(rag, name, lambda: passage_record(rag, chunk_id))
        if found is None:
            raise Refusal(404, "passage_not_found", f"no passage {chunk_id} in {name}; its document may have changed")
        return {"object": "passage", "model": name, **found}

    async def retrieve(self, body: RetrieveRequest, request: Request) -> Record:
        """Return the passages that fit a question best."""
        name, rag = self._named(body.model, request)

        def search() -> list[Record]:
            require_question(rag, body.query, answer_tokens=1)
            hits = rag.retrieve(body.query, top_k=body.top_k, scope=body.scope, filters=body.filters)
            return [hit_record(hit) for hit in hits]

        return {"object": "list", "model": name, "data": await self._once(rag, name, search)}

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Return an answer, whole or as it comes."""
        name, rag = self._named(body.model, request)
        if not body.asked:
            raise Refusal(400, "invalid_value", "expected a message of the user with some text", param="messages")
        with explained(rag, name):
            reply = self._reply(name, rag, body)
            self._watch(request, reply)
            await reply.begin()
        if body.stream:
            return StreamingResponse(
                self._events(reply, name, body), headers=UNBUFFERED, media_type="text/event-stream"
            )
        with explained(rag, name):
            text = "".join([piece async for piece in reply])
        answer, reason = self._answer(reply, name, body)
        return JSONResponse(Completion(name).whole(text + self._notes(answer, body), answer, reason))

    async def _events(self, reply: Reply, name: str, body: ChatRequest) -> AsyncIterator[str]:
        """Yield an answer as server-sent events; what goes wrong on the way is the last of them."""
        completion = Completion(name)
        try:
            yield completion.first(reply.answer())
            async for piece in reply:
                yield completion.next(piece)
        except Exception as error:
            yield event(refusal_of(error, self._shelf[name], name).body())
            return
        answer, reason = self._answer(reply, name, body)
        if notes := self._notes(answer, body):
            yield completion.next(notes)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        for line in completion.last(answer, reason, with_usage=with_usage):
            yield line

    def _reply(self, name: str, rag: GistRAG, body: ChatRequest) -> Reply:
        """Return the answer to a question, put in line."""
        question, options = question_of(body.asked), body.options
        if self._terms.log_questions:
            logger.info("%s is asked %r", name, question)
        stream = rag.stream(question, **vars(options))
        timed = Timed(stream, GENERATION_S)

        def work() -> Generator[str]:
            require_question(rag, question, answer_tokens=options.max_new_tokens)
            try:
                yield from cut(iter(timed), body.stops)
            finally:
                stream.close()

        return Reply(self._submit(work()), answer=lambda: stream.answer, is_cut=lambda: timed.is_cut)

    async def _once(self, rag: GistRAG, name: str, call: Callable[[], T]) -> T:
        """Return what *call* returns in the working thread."""

        def work() -> Generator[T]:
            yield call()

        with explained(rag, name):
            return await anext(self._submit(work()))

    def _submit(self, work: Generator[T]) -> Turn[T]:
        try:
            return self._turns.submit(work)
        except Full:
            raise Refusal(429, "queue_full", f"{QUEUE_MAX} requests are waiting already; try again soon") from None

    def _watch(self, request: Request, reply: Reply) -> None:
        """End a reply as soon as its client is gone."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            reply.cancel()

        task = asyncio.create_task(watch())
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    def _answer(self, reply: Reply, name: str, body: ChatRequest) -> tuple[Answer, str]:
        """Return an answer that is complete and why it ended, and count it."""
        answer = reply.answer()
        is_cut = reply.is_cut() or answer.usage.answer_tokens >= body.options.max_new_tokens
        reason = "length" if is_cut else "stop" if reply.is_wanted else "gone"
        used, timings = answer.usage, answer.timings
        seconds = (timings.ttft_s, timings.total_s)
        logger.info("%s: %d tokens, first after %.2f s, last after %.2f s", name, used.answer_tokens, *seconds)
        if self._terms.metrics and used.answer_tokens:
            self._metrics.count(name, answer, reason)
        return answer, reason

    def _notes(self, answer: Answer, body: ChatRequest) -> str:
        wanted = self._terms.footnotes if body.gistrag.footnotes is None else body.gistrag.footnotes
        return footnotes(answer) if wanted else ""

    def _named(self, name: str | None, request: Request) -> tuple[str, GistRAG]:
        """Return the index a client names, or the one it has.

        Raises:
            Refusal: not there, or not for this client; it does not learn which.
        """
        names = [one for one in self._shelf if one in request.state.indexes]
        if name is None and len(names) == 1:
            name = names[0]
        if name is None:
            raise Refusal(400, "missing_parameter", f"expected model, one of {', '.join(names)}", param="model")
        if name not in names:
            raise Refusal(404, "model_not_found", f"no model {name!r}; there are {', '.join(names)}", param="model")
        return name, self._shelf[name]

    def _model_record(self, name: str) -> Record:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "gistrag"}


class Reply(AsyncIterator[str]):
    """The pieces of an answer on their way.

    Attributes:
        answer: returns what is known of it, everything when all pieces have come.
        is_cut: returns whether its time was over before it was.
        is_wanted: its client is still there.
    """

    def __init__(self, pieces: Turn[str], *, answer: Callable[[], Answer], is_cut: Callable[[], bool]) -> None:
        self._pieces = pieces
        self._first = ""
        self.answer = answer
        self.is_cut = is_cut
        self.is_wanted = True

    def cancel(self) -> None:
        """End the work, and the pieces."""
        self.is_wanted = False
        self._pieces.cancel()

    async def begin(self) -> None:
        """Wait for the first piece, so that what is wrong with a question is known before an answer begins."""
        self._first = await anext(self._pieces, "")

    async def __anext__(self) -> str:
        first, self._first = self._first, ""
        return first or await anext(self._pieces)


def require_question(rag: GistRAG, question: str, *, answer_tokens: int) -> None:
    """Return if a question fits the window, before anything is searched for a long one.

    Raises:
        ContextOverflowError: it does not.
    """
    tokens = len(rag.model.encode_question(question)) if question.strip() else 0
    require_room(rag.model, rag.model.prefix.gists + tokens + answer_tokens)


def passage_record(rag: GistRAG, chunk_id: int) -> Record | None:
    """Return a chunk as plain values with the numbers of its neighbours, None where there is none."""
    with rag.store.snapshot():
        found = rag.store.chunks([chunk_id])
        ids = [one.id for one in rag.store.chunks_of(found[0].path)] if found else []
    if not found:
        return None
    at = ids.index(chunk_id)
    previous, following = ids[at - 1] if at else None, ids[at + 1] if at + 1 < len(ids) else None
    return {**chunk_record(found[0]), "previous": previous, "next": following}


def content_policy(page: str) -> str:
    """Return what a browser may do for *page*: run the one script in it, and talk to where it came from."""
    script, style = (_inline_hash(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _inline_hash(page: str, tag: str) -> str:
    text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@contextmanager
def explained(rag: GistRAG, name: str) -> Iterator[None]:
    """Turn what goes wrong in an index into what a client may know of it."""
    try:
        yield
    except GistRAGError as error:
        raise refusal_of(error, rag, name) from error


def refusal_of(error: Exception, rag: GistRAG, name: str) -> Refusal:
    """Return what a client is told of an error: never where a folder lies, or how the program looks inside."""
    match error:
        case Refusal():
            return error
        case ContextOverflowError():
            return Refusal(400, "context_length_exceeded", str(error))
        case UsageError():
            return Refusal(400, "invalid_value", str(error).replace(str(rag.folder), name))
        case ResourceError():
            logger.error("%s: %s", name, error)
            return Refusal(503, "out_of_resources", "not enough memory to answer; ask for fewer or shorter passages")
        case GistRAGError():
            logger.error("%s: %s", name, error)
            return Refusal(503, "index_unavailable", f"{name} cannot be read at the moment; its owner's log says why")
    logger.error("%s: unforeseen", name, exc_info=error)
    return Refusal(500, "internal_error", "an error nobody foresaw; the server's log has it")


async def refused(_: Request, error: Exception) -> JSONResponse:
    """Return an error in the form of OpenAI's API."""
    headers = {}
    match error:
        case Refusal():
            refusal = error
            headers = {"retry-after": str(RETRY_AFTER_S)} if error.status == 429 else {}
        case RequestValidationError():
            refusal = misshapen(error)
        case HTTPException(status_code=status):
            refusal = Refusal(status, CODES.get(status, "invalid_request"), str(error.detail))
        case _:
            refusal = Refusal(500, "internal_error", "an error nobody foresaw; the server's log has it")
            headers = {"connection": "close"}  # uvicorn hangs up after such an answer: a client must not use it again
    return JSONResponse(refusal.body(), refusal.status, headers)


def misshapen(error: RequestValidationError) -> Refusal:
    """Return what is wrong with the shape of a request, and where.

    Of a value that may have several forms all are complained about; what goes deepest is about the one that was meant.
    """
    fault = max(error.errors(), key=lambda fault: len(_names(fault["loc"])))
    if fault["type"] == "json_invalid":
        return Refusal(400, "invalid_value", f"body: expected JSON, {fault['ctx']['error']}")
    where = ".".join(_names(fault["loc"]))
    return Refusal(400, "invalid_value", f"{where or 'body'}: {fault['msg']}", param=where or None)


def _names(place: Sequence[str | int]) -> list[str]:
    """Return the names and numbers on the way to a value, without those that only the program gave to its forms."""
    return [str(part) for part in place[1:] if re.fullmatch(r"\w+", str(part))]
