"""The HTTP application: OpenAI's API for programs, and a web page for people.

::

    GET  /, /static/...       the web page                    POST /v1/chat/completions   an answer, streamed or whole
    GET  /v1/models           the indexes, one model each     POST /v1/retrieve           passages, nothing is generated
    GET  /v1/documents        the documents of an index       GET  /v1/passages/{id}      one chunk
    GET  /healthz, /readyz    for monitoring              POST /v1/embeddings         vectors of texts
    GET  /metrics             for Prometheus
    GET, POST /v1/folders     folders to add, where that is allowed

This is the only module that imports FastAPI. `gistrag.server.auth` checks a request before it arrives here. All work on
a model or an index runs in the one thread of `gistrag.server.scheduler`, which interleaves answers: clients have equal
shares of its time, and answers of one client too. No request can add a document, name a file or load a model, but for
`gistrag.server.folders`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from queue import Full
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from gistrag.answering.answer import Answer
from gistrag.errors import UsageError
from gistrag.index.encoders import Vectors
from gistrag.model.generation import require_room
from gistrag.rag import GistRAG
from gistrag.server.auth import Access, Guard, Opened
from gistrag.server.deadline import Timed
from gistrag.server.folders import BusyError, Folders
from gistrag.server.monitoring import Monitor
from gistrag.server.page import POLICY, PageFile, page_files
from gistrag.server.protocol import (
    APIError,
    ChatRequest,
    Completion,
    EmbeddingRequest,
    FolderRequest,
    RetrieveRequest,
    cut,
    event,
    footnotes,
)
from gistrag.server.refusals import api_error, api_errors, internal_error, route_error, validation_error
from gistrag.server.registry import (
    Record,
    document_records,
    example_records,
    hit_record,
    passage_record,
    status_record,
)
from gistrag.server.reply import Reply
from gistrag.server.scheduler import Job, Scheduler

logger = logging.getLogger("gistrag")

T = TypeVar("T")
ChunkId = Annotated[int, Field(gt=-(2**63), lt=2**63)]
"""Negative for the summary of a document."""

EMBEDDED_TOGETHER = 8
"""Texts that are embedded before another request has its turn."""
GENERATION_S = 120.0
RETRY_AFTER_S = 2
UNBUFFERED = {"x-accel-buffering": "no"}
"""Asks a proxy to pass on each event at once."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server.

    Attributes:
        together: number of interleaved answers; further requests wait.
        queue: number of requests that may wait; one more is refused.
        footnotes: answers end with their sources, unless a request says otherwise.
        second_reading: passages are read again where an answer is unsure, unless a request says otherwise.
        log_questions: write questions to the log.
        metrics: serve ``/metrics``.
    """

    together: int = 8
    queue: int = 200
    footnotes: bool = False
    second_reading: bool = True
    log_questions: bool = False
    metrics: bool = False


def application(
    registry: Mapping[str, GistRAG],
    *,
    access: Access,
    config: ServerConfig | None = None,
    folders: Folders | None = None,
) -> FastAPI:
    """Return the ASGI application that serves the indexes of *registry* by name; all share one engine.

    Args:
        folders: adds further ones to *registry*, for clients that may; None: nobody may.
    """
    service = Service(registry, access, config or ServerConfig(), folders)
    app = FastAPI(openapi_url=None, lifespan=service.lifespan)  # FastAPI's API pages load scripts from other hosts
    app.add_middleware(Guard, access=access, refused=service.monitor.turned_away)
    for path, method, endpoint in service.routes():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (APIError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, service.error_response)
    return app


class Service:
    """The endpoints: a method for each route."""

    def __init__(
        self, registry: Mapping[str, GistRAG], access: Access, config: ServerConfig, folders: Folders | None
    ) -> None:
        self._registry, self._access, self._config, self._folders = registry, access, config, folders
        self.monitor = Monitor(registry, with_metrics=config.metrics)
        self._started = int(time.time())
        self._watches: set[asyncio.Task[None]] = set()
        self._scheduler: Scheduler

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the scheduler while the application runs."""
        self._scheduler = Scheduler(
            active_max=self._config.together,
            queue_max=self._config.queue,
            clients=lambda: max(1, len(self._access.keys)),
            waited=self.monitor.waited,
        )
        self.monitor.scheduler = self._scheduler
        yield
        if self._folders:
            await self._folders.close()
        await asyncio.to_thread(self._scheduler.close)

    def routes(self) -> Iterator[tuple[str, str, Callable[..., Any]]]:
        """Yield the path, method and endpoint of each route."""
        yield from ((file.path, "GET", endpoint_of(file)) for file in page_files())
        yield "/healthz", "GET", self.health
        yield "/readyz", "GET", self.ready
        yield "/v1/models", "GET", self.models
        yield "/v1/models/{name}", "GET", self.model
        yield "/v1/documents", "GET", self.documents
        yield "/v1/passages/{chunk_id}", "GET", self.passage
        yield "/v1/retrieve", "POST", self.retrieve
        yield "/v1/embeddings", "POST", self.embeddings
        yield "/v1/chat/completions", "POST", self.chat
        if self._folders:
            yield "/v1/folders", "GET", self.folders
            yield "/v1/folders", "POST", self.add_folder
        if self._config.metrics:
            yield "/metrics", "GET", self.metrics

    async def health(self) -> JSONResponse:
        """Return whether the server runs."""
        return JSONResponse(*self.monitor.health())

    async def ready(self) -> JSONResponse:
        """Return whether the server can answer."""
        return JSONResponse(*self.monitor.ready())

    async def metrics(self, request: Request) -> Response:
        """Return the metrics, which name all indexes, or 404 for a client that may not see all of them."""
        found = self.monitor.page()
        if found is None or not self._registry.keys() <= opened(request).indexes:
            raise HTTPException(404)
        page, media_type = found
        return Response(page, media_type=media_type)

    async def error_response(self, _: Request, error: Exception) -> JSONResponse:
        """Return an error in the form of OpenAI's API, and count it."""
        headers = {}
        match error:
            case APIError():
                shown = error
                headers = {"retry-after": str(RETRY_AFTER_S)} if error.status == 429 else {}
            case RequestValidationError():
                shown = validation_error(error.errors())
            case HTTPException(status_code=status, detail=detail):
                shown = route_error(status, detail)
            case _:
                shown = internal_error()
                headers = {"connection": "close"}  # uvicorn closes the connection after such an answer
        self.monitor.refused(shown)
        return JSONResponse(shown.body(), shown.status, headers)

    async def models(self, request: Request) -> Record:
        """Return the indexes that this client may ask."""
        names = [name for name in self._registry if name in opened(request).indexes]
        may_build = self._folders is not None and opened(request).may_build
        return {"object": "list", "data": [self._model_record(name) for name in names], "may_add_folders": may_build}

    async def model(self, name: str, request: Request) -> Record:
        """Return one of these indexes."""
        return self._model_record(self._named(name, request)[0])

    async def documents(self, request: Request, model: str | None = None) -> Record:
        """Return the documents and the totals of an index, and what a newcomer may ask about."""
        name, rag = self._named(model, request)

        def look() -> Record:
            return {"data": document_records(rag), "status": status_record(rag), "examples": example_records(rag)}

        return {"object": "list", "model": name, **await self._run(request, rag, name, look)}

    async def folders(self, request: Request) -> Record:
        """Return how far the folder is that is being added, and which may be added."""
        return self._allowed(request).record()

    async def add_folder(self, body: FolderRequest, request: Request) -> Record:
        """Begin to build an index of a folder."""
        try:
            return self._allowed(request).add(body.path)
        except BusyError as error:
            raise APIError(409, "build_under_way", str(error)) from None
        except UsageError as error:
            raise APIError(400, "invalid_value", str(error), param="path") from None

    def _allowed(self, request: Request) -> Folders:
        """Return what adds folders.

        Raises:
            APIError: this client may add none.
        """
        is_near = request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
        if self._folders is None or not opened(request).may_build or not is_near:
            raise APIError(403, "may_not_build", "expected a key that may add folders, from this machine")
        return self._folders

    async def passage(self, request: Request, chunk_id: ChunkId, model: str | None = None) -> Record:
        """Return one chunk with its whole text and the ids of its neighbors."""
        name, rag = self._named(model, request)
        found = await self._run(request, rag, name, lambda: passage_record(rag, chunk_id))
        if found is None:
            raise APIError(404, "passage_not_found", f"no passage {chunk_id} in {name}; its document may have changed")
        return {"object": "passage", "model": name, **found}

    async def retrieve(self, body: RetrieveRequest, request: Request) -> Record:
        """Return the passages that fit a question best."""
        name, rag = self._named(body.model, request)

        def search() -> list[Record]:
            require_fitting(rag, body.query, answer_tokens=1)
            hits = rag.retrieve(body.query, top_k=body.top_k, scope=body.scope, filters=body.filters)
            return [hit_record(hit) for hit in hits]

        return {"object": "list", "model": name, "data": await self._run(request, rag, name, search)}

    async def embeddings(self, body: EmbeddingRequest, request: Request) -> Record:
        """Return the vectors of texts, by the embedder of an index."""
        name, rag = self._named(body.model, request)
        if not all(text.strip() for text in body.texts):
            raise APIError(400, "invalid_value", "expected texts with some words", param="input")
        embedder = rag.engine.embedder

        def work() -> Generator[tuple[Vectors, int]]:
            for start in range(0, len(body.texts), EMBEDDED_TOGETHER):
                texts = body.texts[start : start + EMBEDDED_TOGETHER]
                yield embedder.embed(texts, body.input_type), sum(map(embedder.count_tokens, texts))

        with api_errors(rag, name):
            job = self._submit(request, work())
            self._watch(request, job.cancel)
            made = [one async for one in job]
        return body.record(
            [vector for vectors, _ in made for vector in vectors], tokens=sum(count for _, count in made)
        )

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Return an answer, whole or as a stream."""
        name, rag = self._named(body.model, request)
        if not body.questions:
            raise APIError(400, "invalid_value", "expected a user message with some text", param="messages")
        with api_errors(rag, name):
            reply = self._reply(request, name, rag, body)
            self._watch(request, reply.cancel)
            await reply.begin()
        if body.stream:
            return StreamingResponse(
                self._events(reply, name, body), headers=UNBUFFERED, media_type="text/event-stream"
            )
        with api_errors(rag, name):
            text = "".join([piece async for piece in reply])
        answer, reason = self._answer(reply, name, body)
        return JSONResponse(
            Completion(name, ignored=body.ignored).whole(text + self._notes(answer, body), answer, reason)
        )

    async def _events(self, reply: Reply, name: str, body: ChatRequest) -> AsyncIterator[str]:
        """Yield an answer as server-sent events; an error on the way is the last of them."""
        completion = Completion(name, ignored=body.ignored)
        try:
            yield completion.first(reply.answer())
            async for piece in reply:
                yield completion.next(piece)
        except Exception as error:
            yield event(api_error(error, self._registry[name], name).body())
            return
        answer, reason = self._answer(reply, name, body)
        if notes := self._notes(answer, body):
            yield completion.next(notes)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        for line in completion.last(answer, reason, with_usage=with_usage):
            yield line

    def _reply(self, request: Request, name: str, rag: GistRAG, body: ChatRequest) -> Reply:
        """Queue the question of a request and return its reply."""
        question, options = body.questions[-1], body.options(second_reading=self._config.second_reading)
        if self._config.log_questions:
            logger.info("%s: question %r", name, question)
        stream = rag.stream(question, **vars(options))
        timed = Timed(stream.steps(), GENERATION_S)

        def work() -> Generator[str]:
            require_fitting(rag, question, answer_tokens=options.max_new_tokens)
            try:
                yield from cut(iter(timed), body.stops)
            finally:
                stream.close()

        return Reply(self._submit(request, work()), answer=lambda: stream.answer, is_cut=lambda: timed.is_cut)

    async def _run(self, request: Request, rag: GistRAG, name: str, call: Callable[[], T]) -> T:
        """Return the result of *call*, made in the thread of the scheduler."""

        def work() -> Generator[T]:
            yield call()

        with api_errors(rag, name):
            return await anext(self._submit(request, work()))

    def _submit(self, request: Request, work: Generator[T]) -> Job[T]:
        try:
            return self._scheduler.submit(work, client=opened(request).client)
        except Full:
            message = f"{self._scheduler.waiting} requests are waiting already; try again soon"
            raise APIError(429, "queue_full", message) from None

    def _watch(self, request: Request, cancel: Callable[[], None]) -> None:
        """Cancel what a client waits for as soon as it disconnects."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            cancel()

        task = asyncio.create_task(watch())
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    def _answer(self, reply: Reply, name: str, body: ChatRequest) -> tuple[Answer, str]:
        """Return a finished answer with its finish reason; log and count it."""
        answer = reply.answer()
        is_cut = reply.is_cut() or answer.usage.answer_tokens >= body.options().max_new_tokens
        reason = "length" if is_cut else "stop" if reply.is_wanted else "gone"
        self.monitor.answered(name, answer, reason)
        return answer, reason

    def _notes(self, answer: Answer, body: ChatRequest) -> str:
        wanted = self._config.footnotes if body.gistrag.footnotes is None else body.gistrag.footnotes
        return footnotes(answer) if wanted else ""

    def _named(self, name: str | None, request: Request) -> tuple[str, GistRAG]:
        """Return the index that a request names, or the only one the client may ask.

        Raises:
            APIError: the index does not exist, or is not for this client, who does not learn which.
        """
        names = [one for one in self._registry if one in opened(request).indexes]
        if name is None and len(names) == 1:
            name = names[0]
        if name is None:
            raise APIError(400, "missing_parameter", f"expected model, one of {', '.join(names)}", param="model")
        if name not in names:
            raise APIError(404, "model_not_found", f"no model {name!r}; there are {', '.join(names)}", param="model")
        return name, self._registry[name]

    def _model_record(self, name: str) -> Record:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "gistrag"}


def require_fitting(rag: GistRAG, question: str, *, answer_tokens: int) -> None:
    """Check that a question and its answer fit the context window, before a search with a long question.

    Raises:
        ContextOverflowError: they do not fit.
    """
    tokens = len(rag.runtime.encode_question(question)) if question.strip() else 0
    require_room(rag.runtime, rag.runtime.prefix_slots + tokens + answer_tokens)


def opened(request: Request) -> Opened:
    """Return what the client of a request may do, as the guard has recorded it."""
    found: Opened = request.state.opened
    return found


def endpoint_of(file: PageFile) -> Callable[[], Awaitable[Response]]:
    """Return the endpoint of a file of the page, with a content policy that allows connections to this server only."""

    async def serve() -> Response:
        return Response(file.body, headers={"content-security-policy": POLICY}, media_type=file.media_type)

    return serve
