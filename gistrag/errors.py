"""Every error this library raises on purpose.

::

    GistRAGError
    ├─ DocumentError(ValueError)                a file that cannot be read or split into chunks
    │  └─ UnreadableError                       a file that could not be read this time
    ├─ IndexFolderError                         an index folder that cannot be used as asked
    │  ├─ IncompleteIndexError                  nothing was committed yet
    │  ├─ FingerprintMismatchError(ValueError)  made by another model, adapter, rate or embedder
    │  └─ IndexLockedError                      another builder holds it
    ├─ GistNotFoundError(LookupError)           no gist file where one is recorded
    ├─ CorruptGistError(ValueError)             hash, shape or dtype disagree
    ├─ ModelNotFoundError(LookupError)          prints the exact command that brings the model
    ├─ UnsupportedModelError(ValueError)        an architecture whose RoPE or cache is not verified
    ├─ ContextOverflowError(ValueError)         both numbers: what was asked and what fits
    ├─ DivergedError                            a training whose loss grows at any learning rate
    ├─ ResourceError                            disk or memory does not suffice
    └─ UsageError(ValueError)                   a question or setting that makes no sense

A message says what was expected, what was found, where, and the next step.
Commands catch `GistRAGError`, print its one line and return its ``exit_code``.
"""

from __future__ import annotations


class GistRAGError(Exception):
    """Base of all errors of this library."""

    exit_code = 2


class UsageError(GistRAGError, ValueError):
    """A question or setting that makes no sense."""


class DocumentError(GistRAGError, ValueError):
    """A file that cannot be read or split into chunks."""


class UnreadableError(DocumentError):
    """A file that could not be read this time, whatever is in it."""


class IndexFolderError(GistRAGError):
    """An index folder that cannot be used as asked."""

    exit_code = 4


class IncompleteIndexError(IndexFolderError):
    """A folder in which no build has committed yet."""


class FingerprintMismatchError(IndexFolderError, ValueError):
    """An index made by another model, adapter, rate, embedder or format."""


class IndexLockedError(IndexFolderError):
    """Another builder holds the index."""

    exit_code = 6


class GistNotFoundError(GistRAGError, LookupError):
    """No gist file where the index records one."""

    exit_code = 4


class CorruptGistError(GistRAGError, ValueError):
    """A gist file whose hash, identity, shape or dtype disagrees with the index."""

    exit_code = 4


class ModelNotFoundError(GistRAGError, LookupError):
    """A model that is nowhere on this machine; the message holds the command that brings it."""


class UnsupportedModelError(GistRAGError, ValueError):
    """An architecture whose position encoding or cache this library has not verified."""


class ContextOverflowError(GistRAGError, ValueError):
    """More slots or tokens than the model's window; the message holds both numbers."""


class ResourceError(GistRAGError):
    """Disk or memory does not suffice; the message holds what is needed and what is there."""

    exit_code = 5


class DivergedError(GistRAGError):
    """A training whose loss grows however small its learning rate is made."""
