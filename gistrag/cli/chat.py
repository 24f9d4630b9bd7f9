"""`gistrag chat`: a conversation at a prompt."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from gistrag.answering.quoting import harmless
from gistrag.cli.options import (
    INDEX,
    AdapterPlace,
    AnswerMode,
    Debug,
    Device,
    EmbedderPlace,
    Index,
    Json,
    MaxNewTokens,
    ModelPlace,
    NoGists,
    NoSecondReading,
    Quiet,
    RerankerName,
    RuntimeOption,
    Scope,
    TopK,
)
from gistrag.cli.output import cost_line, loading, logger, print_answer, print_json, say, source_lines
from gistrag.errors import GistRAGError, UsageError
from gistrag.model.hashing import cache_folder
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.answering.answer import Answer, Options
    from gistrag.index.gist_worker import When
    from gistrag.rag import GistRAG

KEPT = 50
"""Questions of a conversation that are kept."""
HELP = """\
/mode gist|text|hybrid   answer from gists, from text, or from both
/top-k N                 number of chunks to answer from
/scope PATH              answer from one document; /scope off ends that
/sources                 show the sources of the last answer
/new                     forget the questions so far
/help                    show this list
/quit                    leave the chat, as Ctrl-D does
Ctrl-C stops an answer."""


EXAMPLES = (
    "gistrag chat",
    "gistrag chat --index notes-index/ --mode hybrid",
    "gistrag chat --continue",
    "gistrag chat < questions.txt",
)


def chat(
    index: Index = INDEX,
    resume: Annotated[
        bool, typer.Option("--continue", "-c", help="Go on with the last conversation about this index.")
    ] = False,
    top_k: TopK = 3,
    mode: AnswerMode = "gist",
    scope: Scope = None,
    max_new_tokens: MaxNewTokens = 256,
    no_second_reading: NoSecondReading = False,
    reranker: RerankerName = None,
    no_gists: NoGists = False,
    model: ModelPlace = None,
    adapter: AdapterPlace = None,
    embedder: EmbedderPlace = None,
    device: Device = None,
    runtime: RuntimeOption = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer questions at a prompt, with the models loaded once.

    Questions come from the terminal, or from standard input, one per line. A question that leans on the ones before,
    such as "And in Zurich?", is searched together with them. Type /help for the commands of the prompt. Gists that are
    missing are made meanwhile. Questions typed at a terminal are kept for --continue, in a file that only you can read.
    """
    with loading():
        from gistrag.answering.answer import Options
        from gistrag.rag import GistRAG

        gists: When = "none" if no_gists else "background"
        rag = GistRAG.open(
            index,
            gists=gists,
            device=device,
            runtime=runtime,
            reranker=reranker,
            model=model,
            adapter=adapter,
            embedder=embedder,
        )
    with rag:
        options = Options(
            top_k=top_k, mode=mode, scope=scope, max_new_tokens=max_new_tokens, second_reading=not no_second_reading
        )
        kept = Asked(rag.index_id)
        session = Session(rag, options, as_json=as_json, asked=kept.read() if resume else [])
        is_typed = sys.stdin.isatty()
        if is_typed:
            say(f"{rag!r}{_gists(rag)}; /help lists the commands, Ctrl-D ends")
        for line in lines():
            if line == "/quit":
                break
            session.take(line)
            if resume or is_typed:
                kept.write(session.asked)


class Session:
    """A conversation with an index: its options, the questions so far and the last answer.

    Attributes:
        options: of the next answer; asked: the questions so far, oldest first.
    """

    def __init__(self, rag: GistRAG, options: Options, *, as_json: bool = False, asked: Sequence[str] = ()) -> None:
        self.options = options
        self.asked = list(asked)
        self._rag = rag
        self._as_json = as_json
        self._last: Answer | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/mode": lambda value: self._set(mode=value),
            "/top-k": lambda value: self._set(top_k=_whole_number(value)),
            "/scope": self._set_scope,
            "/sources": self._show_sources,
            "/new": self._forget,
            "/help": lambda _: say(HELP),
        }

    def take(self, line: str) -> None:
        """Act on one line, a question or a command; an error is printed and does not end the conversation."""
        try:
            if line.startswith("/"):
                self._act(line)
            else:
                self._answer(line)
        except GistRAGError as error:
            logger.error("%s", error)

    def _act(self, line: str) -> None:
        name, _, value = line.partition(" ")
        if name not in self._commands:
            raise UsageError(f"no command {name}; /help lists the commands")
        self._commands[name](value.strip())

    def _answer(self, question: str) -> None:
        stream = self._rag.stream(question, **asdict(replace(self.options, history=tuple(self.asked))))
        self.asked.append(question)
        try:
            if self._as_json:
                for _ in stream:
                    pass
            else:
                print_answer(stream)
        except KeyboardInterrupt:
            stream.close()
            say("", "stopped", *source_lines(stream.answer), cost_line(stream.answer))
        self._last = stream.answer
        if self._as_json:
            print_json({"question": question, "mode": self.options.mode, **asdict(self._last)})
        else:
            if self._last.searched not in ("", question):
                say(f"  searched: {self._last.searched}")
            say("")

    def _set(self, **changes: object) -> None:
        self.options = replace(self.options, **changes)  # type: ignore[arg-type]  # Options checks them
        say(", ".join(f"{name.replace('_', '-')} {value or 'off'}" for name, value in changes.items()))

    def _set_scope(self, value: str) -> None:
        scope = None if value in ("", "off") else value
        self._rag.store.select(scope=scope)
        self._set(scope=scope)

    def _forget(self, _: str) -> None:
        self.asked.clear()
        say("the next question stands alone")

    def _show_sources(self, _: str) -> None:
        if self._last is None:
            raise UsageError("no answer yet; ask a question")
        for number, source in enumerate(self._last.sources, 1):
            read = "text" if source.as_text else "gists"
            say(f"{number}. {harmless(source.place)} (chunk {source.chunk_id}, score {source.score:.3f}, {read})")
            say(f"   {harmless(source.snippet)}")


class Asked:
    """The questions of the last conversation about an index, kept in the user's cache; without one, none are."""

    def __init__(self, index_id: str) -> None:
        self._path = cache_folder() / "chats" / f"{index_id}.json"

    def read(self) -> list[str]:
        """Return the questions, oldest first."""
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(self._path.read_text("utf-8"))
            return [str(question) for question in kept]
        return []

    def write(self, asked: Sequence[str]) -> None:
        """Keep the questions; a disk that refuses loses them and nothing else."""
        with contextlib.suppress(GistRAGError):
            files.make_folder(self._path.parent)
            files.write_atomic(self._path, json.dumps(list(asked)[-KEPT:], ensure_ascii=False).encode(errors="replace"))


def lines() -> Iterator[str]:
    """Yield the lines of standard input, stripped; empty ones are skipped."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with contextlib.suppress(ImportError):  # its import gives the prompt editing and a history
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if is_typed else "").strip()
        except EOFError:
            if is_typed:
                say("")
            return
        except KeyboardInterrupt:
            if not is_typed:
                raise
            say("")
            continue
        if line:
            yield line


def _gists(rag: GistRAG) -> str:
    """Return how far the gists are that are being made, nothing where none is missing."""
    progress = rag.progress
    return f", gists {progress.done:,} of {progress.chunks:,} chunks" if progress.done < progress.chunks else ""


def _whole_number(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"expected an integer, got {value!r}") from None
