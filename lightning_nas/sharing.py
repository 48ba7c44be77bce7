"""How the workers of one study keep out of each other's way: each says in the study what it evaluates."""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from random import SystemRandom
from types import TracebackType
from typing import Any

from lightning_nas._processes import Process, has_ended, this_process
from lightning_nas._record import ROUNDING, Proposal, Record
from lightning_nas._storage import Store
from lightning_nas.errors import StorageError

__all__ = ["Claims", "Sharing"]

_PREFIX = "worker:"
_running: set[str] = set()  # names of this process's workers
_random = SystemRandom()  # not the generator that the user may have seeded


@dataclass(frozen=True)
class Sharing:
    """How long a worker of a study waits for the others, and for the storage.

    Args:
        beat: seconds between two signs of life, above 0.
        grace: seconds without one, after which the others take this worker for dead and its candidate for
            free; at least three beats. A worker that ended on the same machine is noticed at once. Raise it
            if ``evaluate`` can keep Python's interpreter lock for so long.
        patience: seconds for which a failing storage is tried again, from 0 up.

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> Sharing(grace=300)
        Sharing(beat=5.0, grace=300, patience=30.0)
    """

    beat: float = 5.0
    grace: float = 60.0
    patience: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.beat < math.inf:
            raise ValueError(f"Sharing: beat is in seconds and must be above 0, got {self.beat}.")
        if not 3 * self.beat <= self.grace < math.inf:
            raise ValueError(
                f"Sharing: grace must be at least three beats, {3 * self.beat:g} s, got {self.grace}."
            )
        if not 0 <= self.patience < math.inf:
            raise ValueError(f"Sharing: patience is in seconds, from 0 up, got {self.patience}.")


class Claims:
    """What this worker evaluates and what the others do, in attributes of the stored study.

    Each worker writes one attribute of its own: what it evaluates, and a count that a thread raises at every
    beat. Others take a worker for dead when they have watched its count stand still for its grace: they use
    their own clocks, and count of a time in which they did not look (the storage was away, the machine slept)
    two beats at most. Its attribute is then emptied, and what it evaluated is free.

    Why no architecture is evaluated twice at once and no budget exceeded: a claim is written first and then
    all is read, claims before trials. Of two workers with one key, or with one more claim than the budget has
    room for, the one that wrote last sees all others: as claims, or as trials, since a claim stands until
    after its trial was written. So at least that one gives its claim back, waits a random moment and proposes
    anew. What remains is a worker that was silent beyond its grace and lives: it finds its attribute emptied
    and writes its result only if nobody else has that architecture and the budget has room. (Were it to wake
    in the same milliseconds in which another takes its place, a study could get one candidate too many.)

    Nothing is shared by a search in memory: there every claim is granted.
    """

    def __init__(self, record: Record, sharing: Sharing) -> None:
        self.record, self.sharing = record, sharing
        self._name = f"{_PREFIX}{uuid.uuid4().hex}"
        self._held: dict[str, Any] | None = None  # what we evaluate
        self._stands = False  # our attribute is not empty
        self._is_lost = False  # others took us for dead
        self._seen: dict[str, dict[str, Any]] = {}  # the others' attributes when we looked last, by name
        self._silent: dict[str, float] = {}  # seconds for which we watched each of them stand still
        self._alive: list[dict[str, Any]] = []
        self._looked = time.monotonic()
        self._lock = threading.Lock()  # the thread reads and writes all this too
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._refused = 0  # times in a row

    def __enter__(self) -> Claims:
        _running.add(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        _running.discard(self._name)
        store = self.record.store
        if self._stands and store is not None:
            with self._lock, suppress(Exception):  # the storage may be what ended the search
                self._held = None
                store.study.set_user_attr(self._name, None)

    def look(self) -> float:
        """Read what others did and do; how many whole evaluations' worth is finished."""
        record = self.record
        if record.store is not None:
            # Claims before trials: what is finished in between is seen as both, never as neither.
            attributes = record.store.attributes()
            with self._lock:
                dead = self._judge(attributes)
            for name in dead:
                record.store.set(name, None)
            record.refresh()
            claims = {claim["key"]: (claim["proposal"], claim["share"]) for claim in self._alive}
            record.others = {k: claim for k, claim in claims.items() if not record.knows(k, claim[1])}
        return record.spent

    def take(self, proposal: Proposal, budget: int) -> bool:
        """Claim a proposal. If another has it or the budget's last place, False, after a random moment."""
        return self.take_key(proposal.architecture.key, proposal.number, proposal.share, budget)

    def take_key(self, key: str, number: int, share: float, budget: int) -> bool:
        """As :meth:`take`, of what has this key and costs this share of an evaluation."""
        record = self.record
        if record.store is None:
            return True
        self._write(
            record.store,
            {
                "key": key,
                "proposal": number,
                "share": share,
                "beat": 0,
                "grace": self.sharing.grace,
                "process": this_process(),
            },
        )
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="lightning_nas beat", daemon=True)
            self._thread.start()
        self.look()
        if not record.is_taken(key, share) and record.has_room(budget, share):
            self._refused = 0
            return True
        self._write(record.store, None)
        self._refused = min(self._refused + 1, 6)
        time.sleep(_random.uniform(0, 0.01 * 2**self._refused))
        return False

    def finish(self, proposal: Proposal, values: dict[str, float], failure: str | None, budget: int) -> bool:
        """Write down the result of a claimed proposal; False if it does not count.

        Raises:
            StorageError: if it cannot be written; the record then holds it all the same.
        """
        record, key = self.record, proposal.architecture.key
        try:
            self.look()
            is_ours = not self._is_lost or key in record.others or self.take(proposal, budget)
            # A process that was killed may have had its last trial on the way: more can be spent.
            has_room = budget - record.spent >= proposal.share - ROUNDING
            is_counted = is_ours and has_room and record.add(proposal, values, failure)
        except StorageError:
            record.keep(proposal, values, failure)
            raise
        with self._lock:
            self._held = None  # the attribute stands: what it names is in the study
        if not is_counted:
            logging.getLogger("lightning_nas").warning(
                "search: the result for %r does not count: this worker gave no sign of life for %g s, and "
                "others took its place. Raise the grace: sharing=Sharing(grace=...).",
                proposal.architecture,
                self.sharing.grace,
            )
        return is_counted

    def wait(self) -> None:
        """Wait until the others have finished or left something."""
        before, pause = (self.record.spent, self.record.others), 0.05
        while (self.look(), self.record.others) == before:
            time.sleep(_random.uniform(pause / 2, pause))
            pause = min(2 * pause, 1.0, self.sharing.beat)

    def _judge(self, attributes: Mapping[str, Any]) -> list[str]:
        """Note who is alive; the names of the dead."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self.sharing.beat), now
        claims = {n: c for n, c in attributes.items() if n.startswith(_PREFIX) and n != self._name and c}
        self._silent = {
            name: self._silent[name] + passed if self._seen.get(name) == claim else 0.0
            for name, claim in claims.items()
        }
        self._seen = claims
        dead = [n for n, c in claims.items() if self._silent[n] > c["grace"] or _has_ended(n, c["process"])]
        self._alive = [claim for name, claim in claims.items() if name not in dead]
        self._is_lost = self._held is not None and attributes.get(self._name) is None
        return dead

    def _write(self, store: Store, claim: dict[str, Any] | None) -> None:
        with self._lock:
            self._held, self._stands = claim, True
            store.set(self._name, claim)
            self._stands = claim is not None

    def _beat(self) -> None:
        """Raise our count, and watch the others' meanwhile."""
        store = self.record.store
        assert store is not None  # no thread without one
        while not self._end.wait(self.sharing.beat):
            with self._lock, suppress(Exception):  # of a storage that is away the search itself will tell
                self._judge(store.study.user_attrs)
                if self._held is not None and not self._is_lost:
                    self._held = {**self._held, "beat": self._held["beat"] + 1}
                    store.study.set_user_attr(self._name, self._held)


def _has_ended(name: str, process: Process | None) -> bool:
    """Whether a worker is known to be gone: its process, or only its search, in this one."""
    is_here = process is not None and process == this_process()
    return has_ended(process) or (is_here and name not in _running)
