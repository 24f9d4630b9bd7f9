"""What a client learns when an index cannot answer: never the path of a folder, never internals."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gistrag.errors import ContextOverflowError, GistRAGError, ResourceError, UsageError
from gistrag.rag import GistRAG
from gistrag.server.protocol import APIError

logger = logging.getLogger("gistrag")


@contextmanager
def api_errors(rag: GistRAG, name: str) -> Iterator[None]:
    """Raise errors of an index as errors that a client may read."""
    try:
        yield
    except GistRAGError as error:
        raise api_error(error, rag, name) from error


def api_error(error: Exception, rag: GistRAG, name: str) -> APIError:
    """Return the error for the client: without the path of a folder, and without internals."""
    match error:
        case APIError():
            return error
        case ContextOverflowError():
            return APIError(400, "context_length_exceeded", str(error))
        case UsageError():
            return APIError(400, "invalid_value", str(error).replace(str(rag.folder), name))
        case ResourceError():
            logger.error("%s: %s", name, error)
            return APIError(503, "out_of_resources", "not enough memory to answer; ask for fewer or shorter passages")
        case GistRAGError():
            logger.error("%s: %s", name, error)
            return APIError(503, "index_unavailable", f"index {name} cannot be read now; see the server log")
    logger.error("%s: internal error", name, exc_info=error)
    return internal_error()


def internal_error() -> APIError:
    """Return the error for everything unexpected."""
    return APIError(500, "internal_error", "internal server error; see the server log")
