"""The Optuna storage in which a study is kept: how it is opened, and what happens while it fails."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any, BinaryIO, Literal, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial

from lightning_nas._processes import boot
from lightning_nas.errors import NASError, NoMatchError, StorageError
from lightning_nas.registry import nearest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Store", "file_of", "found", "made", "quiet_optuna"]

T = TypeVar("T")
Directions = Sequence[Literal["minimize", "maximize"]]

_FIRST_WAIT = 0.1  # seconds; each further one is twice as long
_random = SystemRandom()  # not the generator that the user may have seeded


class Store:
    """One study of a storage. Every call is tried again while the storage fails, for ``patience`` seconds.

    Raises:
        StorageError: by every method, when the patience is at its end.
    """

    def __init__(self, study: optuna.Study, where: str, patience: float) -> None:
        self.study, self.where, self.patience = study, where, patience

    def attributes(self) -> dict[str, Any]:
        """The study's user attributes."""
        return self.again(lambda: self.study.user_attrs)

    def set(self, name: str, value: Any) -> None:
        """Write a user attribute of the study."""
        self.again(partial(self.study.set_user_attr, name, value))

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order in which they were added."""
        return self.again(partial(self.study.get_trials, deepcopy=False))

    def again(self, call: Callable[[], T]) -> T:
        """The value of a call, which is repeated while it fails."""
        return _again(call, self.where, self.patience)


def made(
    storage: str | Path | BaseStorage | None, name: str, directions: Directions, patience: float
) -> Store:
    """The study of this name, made if need be.

    Raises:
        ValueError: for a file that is no journal.
        StorageError: if it cannot be opened.
    """
    backend, where = _backend(storage, name)
    # Optuna looks for each table of a database and then makes it: of several processes that do so at the same
    # moment, some fail, and are tried again.
    create = partial(optuna.create_study, study_name=name, directions=directions, load_if_exists=True)
    return _opened(create, backend, where, patience)


def found(storage: str | Path | BaseStorage | None, name: str, patience: float) -> Store:
    """The study of this name.

    Raises:
        NoMatchError: if there is none; lists those that there are.
        ValueError: for a file that is no journal.
        StorageError: if the storage cannot be opened.
    """
    backend, where = _backend(storage, name, is_new=False)
    try:
        return _opened(partial(optuna.load_study, study_name=name), backend, where, patience)
    except KeyError as error:
        names = optuna.get_all_study_names(backend)
        known = nearest(name, names) if names else "It holds none."
        raise NoMatchError(f"join: {where} has no study {name!r}. {known}") from error


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without Optuna's line about each study that is made."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _opened(
    open_: Callable[..., optuna.Study], backend: str | BaseStorage, where: str, patience: float
) -> Store:
    def call() -> optuna.Study:
        with quiet_optuna():
            return open_(storage=backend)

    return Store(_again(call, where, patience), where, patience)


def _again(call: Callable[[], T], where: str, patience: float) -> T:
    from sqlalchemy.exc import ArgumentError

    began, wait, attempts = time.monotonic(), _FIRST_WAIT, 0
    while True:
        attempts += 1
        try:
            return call()
        except (NASError, KeyError):  # a call within a call; there is no such study
            raise
        except (ImportError, ArgumentError) as error:
            remedy = (
                " PostgreSQL: pip install lightning-nas[postgresql], and a URL that begins with "
                "'postgresql+psycopg://'."
                if where.startswith("postgres")
                else ""
            )
            raise StorageError(f"search: {where} cannot be used: {_first_line(error)}.{remedy}") from error
        except Exception as error:  # each storage has its own
            spent = time.monotonic() - began
            if spent + wait > patience:
                raise StorageError(
                    f"search: {where} has failed {attempts} times in a row, for {spent:.0f} s: "
                    f"{_first_line(error)}. Check the address, that its folder exists and can be written to, "
                    "and that no program keeps it locked. What was written before is kept; once it answers, "
                    "the same call continues."
                ) from error
            if attempts == 4:
                logging.getLogger("lightning_nas").warning(
                    "search: %s does not answer (%s); trying for %.0f s.", where, _first_line(error), patience
                )
            time.sleep(_random.uniform(wait / 2, wait))
            wait *= 2


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else None
    return (str(cause or error) or type(error).__name__).splitlines()[0].rstrip(".")


def _backend(
    storage: str | Path | BaseStorage | None, name: str, is_new: bool = True
) -> tuple[str | BaseStorage, str]:
    """The Optuna storage, and how to call it in messages."""
    if not name:
        raise ValueError("search: name is what the study is found by again and cannot be empty.")
    if isinstance(storage, BaseStorage):
        return storage, type(storage).__name__
    if isinstance(storage, str) and "://" in storage:
        return storage, _without_password(storage)
    path = file_of(name) if storage is None else Path(storage)
    if not is_new and not path.exists():
        raise NoMatchError(f"join: there is no file {str(path)!r}, so no study {name!r} in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or (path.exists() and path.read_bytes()[:1] not in (b"", b"{")):
        raise ValueError(
            f"search: storage {str(path)!r} is no journal file; a database is given by its URL, as "
            f"'sqlite:///{path}'."
        )
    path.touch()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path))), str(path)


def file_of(name: str) -> Path:
    """The journal file of a study where no storage is given."""
    file_name = re.sub(r"[^\w.-]+", "-", name)
    return Path("nas_studies") / f"{file_name}.log"


def _without_password(url: str) -> str:
    """The URL as messages show it."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", url)


class _Lock(JournalFileOpenLock):
    """Optuna's lock on a journal file, which a process that dies does not keep from others of its machine.

    Optuna's is a file beside the journal, so that it holds on file systems without locks; a killed process
    leaves it, and the others stand still for half a minute. So processes of one machine first exclude each
    other by a lock that ends with its process: whoever has that and finds the file of this machine knows that
    nobody holds it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._beside = path, Path(f"{path}.lock")
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        file = self._path.open("rb+")
        try:
            if fcntl is not None and boot() is not None and _locked(file) and self._holder() == boot():
                self._beside.unlink(missing_ok=True)
            super().acquire()
        except BaseException:
            file.close()
            raise
        self._file = file
        self._beside.write_text(boot() or "")
        _mend(file)
        return True

    def release(self) -> None:
        try:
            super().release()
        finally:
            if self._file is not None:
                self._file.close()

    def _holder(self) -> str | None:
        try:
            return self._beside.read_text()
        except OSError:
            return None


def _locked(file: BinaryIO) -> bool:
    """Wait for the lock that ends with the process; whether the file system has such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _mend(file: BinaryIO) -> None:
    """Cut off a last line that a crash left half written: appended to, it would spoil the whole journal."""
    file.seek(max(file.seek(0, 2) - 1, 0))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
