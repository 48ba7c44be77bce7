"""Storages that several processes share, a private PostgreSQL and a gRPC proxy among them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy


def opened(address: str) -> str | BaseStorage:
    """What a search takes: the address itself, or the storage behind a proxy."""
    if not address.startswith("grpc://"):
        return address
    host, port = address.removeprefix("grpc://").split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GrpcStorageProxy(host=host, port=int(port))


@contextmanager
def proxy(behind: str) -> Iterator[str]:
    """The address of a gRPC proxy in front of a database."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    code = (
        "from optuna.storages import get_storage, run_grpc_proxy_server as run;"
        f"run(get_storage({behind!r}), host='localhost', port={port})"
    )
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.DEVNULL)
    try:
        address = f"grpc://localhost:{port}"
        opened(address).wait_server_ready(timeout=60)
        yield address
    finally:
        server.kill()
        server.wait()


@contextmanager
def postgresql() -> Iterator[Callable[[], str]]:
    """A PostgreSQL server without a port, in a folder of its own; each call gives the URL of a new database.

    Debian's ``postgresql``, which does not run as root. Where it is missing the test is skipped, but fails
    with ``LIGHTNING_NAS_POSTGRESQL=required``.
    """
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: -float(p.parent.name))
    initdb = shutil.which("initdb", path=os.pathsep.join([*map(str, places), os.environ["PATH"]]))
    if initdb is None:
        message = "PostgreSQL is missing: apt-get install postgresql"
        if os.environ.get("LIGHTNING_NAS_POSTGRESQL") == "required":
            pytest.fail(message)
        pytest.skip(message)
    import psycopg

    with tempfile.TemporaryDirectory(prefix="lightning-nas-postgresql-") as folder:
        as_server = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if as_server:
            shutil.chown(folder, "postgres", "postgres")

        def run(*command: str) -> None:
            done = subprocess.run(command, cwd="/", capture_output=True, text=True, **as_server)
            assert done.returncode == 0, done.stdout + done.stderr

        data, control = f"{folder}/data", str(Path(initdb).resolve().with_name("pg_ctl"))
        run(initdb, "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "--encoding=UTF8")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        run(control, "start", "-w", "-D", data, "-l", f"{folder}/log", "-o", options)
        numbers = count()

        def database() -> str:
            name = f"test{next(numbers)}"
            with psycopg.connect(f"host={folder} user=tester dbname=postgres", autocommit=True) as server:
                server.execute(f"CREATE DATABASE {name}")
            return f"postgresql+psycopg://tester@/{name}?host={folder}"

        try:
            yield database
        finally:
            run(control, "stop", "-w", "-D", data, "-m", "immediate")
