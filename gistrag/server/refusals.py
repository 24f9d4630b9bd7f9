"""What a client learns when an index cannot answer: never the path of a folder, never internals."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gistrag.errors import ContextOverflowError, GistRAGError, ResourceError, UsageError
from gistrag.rag import GistRAG
from gistrag.server.protocol import APIError

logger = logging.getLogger("gistrag")

CODES = {404: "not_found", 405: "method_not_allowed"}
NO_ROUTE = (
    "no such address; there are POST /v1/chat/completions, /v1/embeddings and /v1/retrieve, "
    "GET /v1/models, /v1/documents, /v1/passages/{id}, /healthz and /readyz"
)


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


def route_error(status: int, detail: str) -> APIError:
    """Return the error for a path that does not exist, or not with this method."""
    return APIError(status, CODES.get(status, "invalid_request"), NO_ROUTE if status == 404 else str(detail))


def validation_error(faults: Sequence[Mapping[str, Any]]) -> APIError:
    """Return the error for a request whose fields are missing or of the wrong type.

    Args:
        faults: as pydantic reports them, one for each form that a value may have; the deepest belongs to the form that
            was meant.
    """
    fault = max(faults, key=lambda fault: len(_names(fault["loc"])))
    if fault["type"] == "json_invalid":
        return APIError(400, "invalid_value", f"body: expected JSON, {fault['ctx']['error']}")
    where = ".".join(_names(fault["loc"]))
    return APIError(400, "invalid_value", f"{where or 'body'}: {fault['msg']}", param=where or None)


def _names(place: Sequence[str | int]) -> list[str]:
    """Return the field names and list positions of a path, without the names that pydantic adds for unions."""
    return [str(part) for part in place[1:] if re.fullmatch(r"\w+", str(part))]
