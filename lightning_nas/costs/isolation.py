"""A process of its own that times networks for another one, so that neither disturbs the other's threads."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import traceback
import weakref
from dataclasses import asdict
from typing import Any, BinaryIO

import torch
from torch import nn

from lightning_nas.costs.timing import Conditions, Measurement, on_cores, timed
from lightning_nas.errors import NASError

__all__ = ["Worker", "serve"]

_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lightning_nas.costs.isolation import serve
serve()
"""


class Worker:
    """Starts the process with the first network, and ends it with itself.

    It is a fresh interpreter, not a fork: it inherits no threads, no GPU context, and does not run the user's
    script again. Networks reach it pickled, through a pipe that only this process writes to.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def timed(self, network: nn.Module, inputs: Any, conditions: Conditions) -> Measurement:
        """As :func:`~lightning_nas.costs.timing.timed`, there.

        Raises:
            NASError: if the network cannot be sent, fails there, or the process dies.
        """
        message = io.BytesIO()
        try:
            torch.save((network.cpu(), inputs, asdict(conditions)), message)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise NASError(
                f"Latency: this {type(network).__name__} cannot be sent to another process ({error}). Define "
                "its classes and functions at the top of a module, or give isolated=False."
            ) from error
        answer = self._ask(message.getbuffer(), conditions.threads)
        if "error" in answer:
            raise NASError(
                f"Latency: the network failed in the process that times it: {answer['error']}\nThe inputs "
                "must be as the network is called with them, and its classes importable from a module, not "
                f"from __main__; otherwise give isolated=False.\n{answer['traceback']}"
            )
        return Measurement(**answer)

    def _ask(self, message: memoryview, threads: int) -> dict[str, Any]:
        process = self._started(threads)
        assert process.stdin is not None  # they are pipes
        assert process.stdout is not None
        try:
            process.stdin.write(len(message).to_bytes(8, "little"))
            process.stdin.write(message)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # interrupted: a late answer must not be taken for that of the next network
            self._process = None
            _end(process)
            raise
        if not answer:
            code, self._process = process.wait(), None
            raise NASError(
                f"Latency: the process that times networks ended with exit code {code} (-9: killed, often "
                "for lack of memory). The next measurement starts a new one."
            )
        result: dict[str, Any] = json.loads(answer)
        return result

    def _started(self, threads: int) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the process that waits
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            )
            weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def serve() -> None:
    """Time what comes in on the standard input until it closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a network prints goes to the standard error
    while message := _read(sys.stdin.buffer):
        try:
            # Unpickling runs code, but only what the process that started this one sent.
            network, inputs, settings = torch.load(io.BytesIO(message), weights_only=False)
            conditions = Conditions(**settings)
            with on_cores(conditions.cores):
                answer = asdict(timed(network, inputs, conditions))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _read(stream: BinaryIO) -> bytes:
    return stream.read(int.from_bytes(stream.read(8), "little"))
