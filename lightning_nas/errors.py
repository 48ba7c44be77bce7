"""What this package raises beyond ``ValueError`` and ``TypeError``: states of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_nas.results import SearchResult

__all__ = [
    "NASError",
    "NoMatchError",
    "SavedFolderError",
    "StorageError",
    "StudyMismatchError",
    "UnsupportedError",
]


class NASError(Exception):
    """Parent of every exception that is this package's own."""


class UnsupportedError(NASError):
    """A network, layer or Trainer setting that cannot work here; the message names the nearest that can."""


class NoMatchError(NASError):
    """A name or pattern matches nothing; the message lists the nearest names."""


class StudyMismatchError(NASError):
    """A stored study has another space or other objectives than the search that opens it."""


class SavedFolderError(NASError):
    """A folder of a saved network is missing, incomplete, damaged or not ours."""


class StorageError(NASError):
    """The storage of a study cannot be reached, or has failed for longer than the search's patience.

    Attributes:
        result: what the search had found, the candidate that could not be written included; None before it
            began.
    """

    result: SearchResult | None = None
