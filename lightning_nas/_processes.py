"""Whether a process that left a note is still there."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TypeAlias

__all__ = ["Process", "boot", "has_ended", "this_process"]

Process: TypeAlias = list[str | int]
"""The running system and process namespace, the process's number there, and when it began."""


@cache
def boot() -> str | None:
    """The name of this run of this machine's system; None where there is none (not Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def this_process() -> Process | None:
    """What this process can be known by; None where the system does not tell."""
    started = _started(os.getpid())
    return None if boot() is None or started is None else [_place(), os.getpid(), started]


def has_ended(process: Process | None) -> bool:
    """Whether a process of this machine is gone; False where that cannot be seen from here."""
    if process is None or boot() is None or process[0] != _place():
        return False
    _, number, started = process
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return _started(int(number)) not in (started, None)


def _place() -> str:
    # In a container the same number is another process.
    return f"{boot()} {os.readlink('/proc/self/ns/pid')}"


def _started(number: int) -> int | None:
    """When a process began, in ticks since the system did; -1 if it has ended and waits for its parent."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
