"""An answer on its way to a client, piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from gistrag.answering.answer import Answer
from gistrag.server.scheduler import Job


class Reply(AsyncIterator[str]):
    """The pieces of an answer as they are generated.

    Attributes:
        answer: returns the answer so far; it is complete after the last piece.
        is_cut: returns whether the time limit ended the answer.
        is_wanted: the client is still connected.
    """

    def __init__(self, pieces: Job[str], *, answer: Callable[[], Answer], is_cut: Callable[[], bool]) -> None:
        self._pieces = pieces
        self._first = ""
        self.answer = answer
        self.is_cut = is_cut
        self.is_wanted = True

    def cancel(self) -> None:
        """Stop generating, and end the pieces."""
        self.is_wanted = False
        self._pieces.cancel()

    async def begin(self) -> None:
        """Wait for the first piece, so that a bad request raises before the response starts."""
        self._first = await anext(self, "")

    async def __anext__(self) -> str:
        text, self._first = self._first, ""
        while not text:  # a step that shows nothing
            text = await anext(self._pieces)
        return text
