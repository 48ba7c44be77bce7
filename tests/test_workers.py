"""Processes that share one study: killed, frozen, started at the same moment, on every kind of storage."""

import math
import multiprocessing
import os
import random
import signal
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import lightning_nas as nas
from tests import storages

SECONDS = float(os.environ.get("LIGHTNING_NAS_KILLING_SECONDS", "6"))
SPACE = nas.SearchSpace([nas.Choice(name, tuple(range(10))) for name in "abcd"])
SHARING = nas.Sharing(beat=0.2, grace=1.5)


@pytest.fixture(scope="session")
def postgresql():
    with storages.postgresql() as database:
        yield database


@pytest.fixture
def address(request, tmp_path):
    """Of a new storage of the kind that the test is parametrized with."""
    if request.param == "postgresql":
        yield request.getfixturevalue("postgresql")()
    elif request.param == "grpc":
        with storages.proxy(f"sqlite:///{tmp_path / 'behind.db'}") as behind:
            yield behind
    else:
        journal, sqlite = tmp_path / "studies" / "search.log", f"sqlite:///{tmp_path / 'search.db'}"
        yield str(journal) if request.param == "journal file" else sqlite


def on(*kinds):
    return pytest.mark.parametrize("address", kinds, indirect=True)


def score(architecture):
    return float(sum(architecture.values()))


class Log:
    """One line for each beginning and end of an evaluation, appended by all workers to one file."""

    def __init__(self, folder):
        self.path = Path(folder) / "log.txt"

    def write(self, event, key):
        line = f"{time.monotonic()!r} {os.getpid()} {event} {key}\n"
        file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(file, line.encode())
        os.close(file)

    def read(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        split = [line.split(maxsplit=3) for line in lines]
        return [(float(when), int(pid), event, key) for when, pid, event, key in split]

    def wait_for(self, pid, event="begin", count=1):
        deadline = time.monotonic() + 60
        while sum(p == pid and e == event for _, p, e, _ in self.read()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def work(address, folder, budget, pause, barrier=None, strategy="nsga2"):
    """A worker process: it logs what it evaluates, and at its end how many candidates the study has."""
    log = Log(folder)

    def evaluate(architecture):
        log.write("begin", architecture.key)
        time.sleep(pause)
        log.write("end", architecture.key)
        return {"score": score(architecture)}

    storage = storages.opened(address)
    if barrier is not None:
        barrier.wait(60)
    result = nas.search(
        SPACE, evaluate, [nas.Maximize("score")], strategy=strategy, budget=budget, storage=storage,
        sharing=SHARING, remeasure=0, progress=False,
    )  # fmt: skip
    log.write("return", len(result.candidates))


def started(*arguments, **keywords):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "lightning_nas", "sqlalchemy.orm", "alembic.command", "psycopg"]
    )
    process = context.Process(target=work, args=arguments, kwargs=keywords)
    process.start()
    return process


def stored(address):
    storage = storages.opened(address)
    if isinstance(storage, str) and "://" not in storage:
        storage = JournalStorage(JournalFileBackend(storage))
    return optuna.load_study(study_name="search", storage=storage)


def check_study(study, budget):
    """Exactly the budget, each architecture once with its true value, nothing running, no claim left."""
    trials = study.trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * budget
    keys = [SPACE.architecture(t.params).key for t in trials]
    assert len(set(keys)) == budget
    assert [t.value for t in trials] == [score(t.params) for t in trials]
    assert {v for name, v in study.user_attrs.items() if name.startswith("worker:")} == {None}
    return set(keys)


def check_log(log, died, recorded):
    """Nothing was evaluated by two at a time, nor again, except what a worker was at when it died."""
    spans, last = defaultdict(list), {}
    for when, pid, event, key in log.read():
        if event == "begin":
            spans[key].append([when, died.get(pid, math.inf), pid])
            last[pid] = key
        elif event == "end":
            spans[key][-1][1] = when
    assert recorded <= set(spans)
    for key, times in spans.items():
        assert key in recorded or {pid for _, _, pid in times} <= set(died), key
        for (_, end, pid), (begin, _, _) in pairwise(times):
            assert end <= begin, key
            assert pid in died, key
            assert last[pid] == key


@pytest.mark.slow
@on("journal file", "sqlite", "postgresql")
def test_workers_that_are_killed_again_and_again_lose_no_result_and_repeat_none(address, tmp_path):
    log, budget, died = Log(tmp_path), 10 * round(SECONDS), {}
    arguments = (address, tmp_path, budget, 3 * SECONDS / budget)
    survivors = [started(*arguments) for _ in range(2)]
    victims = [started(*arguments) for _ in range(2)]
    rng = random.Random(0)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        time.sleep(rng.uniform(0, 0.5))
        i = rng.randrange(2)
        if victims[i].is_alive():
            died[victims[i].pid] = time.monotonic()
            os.kill(victims[i].pid, signal.SIGKILL)
            victims[i].join()
            victims[i] = started(*arguments)
    for worker in (*survivors, *victims):
        worker.join(60 + 10 * SECONDS)
    assert [worker.exitcode for worker in (*survivors, *victims)] == [0] * 4
    assert {int(count) for _, _, event, count in log.read() if event == "return"} == {budget}
    assert len(died) >= SECONDS
    check_log(log, died, check_study(stored(address), budget))


@pytest.mark.slow
@on("journal file", "sqlite", "postgresql", "grpc")
def test_eight_workers_that_make_the_study_at_the_same_moment_share_it(address, tmp_path):
    barrier = multiprocessing.get_context("forkserver").Barrier(8)
    workers = [started(address, tmp_path, 24, 0.02, barrier, "random") for _ in range(8)]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 8
    log = Log(tmp_path)
    assert [int(count) for _, _, event, count in log.read() if event == "return"] == [24] * 8
    check_log(log, {}, check_study(stored(address), 24))


@pytest.mark.slow
@on("journal file")
def test_a_worker_that_was_frozen_beyond_its_grace_counts_for_nothing_twice(address, tmp_path):
    log, budget = Log(tmp_path), 12
    frozen = started(address, tmp_path, budget, 0.3)
    log.wait_for(frozen.pid)
    os.kill(frozen.pid, signal.SIGSTOP)
    other = started(address, tmp_path, budget, 0.01)
    other.join(60)
    before = stored(address).trials
    os.kill(frozen.pid, signal.SIGCONT)
    frozen.join(60)
    assert [other.exitcode, frozen.exitcode] == [0, 0]
    check_study(stored(address), budget)
    assert [t.params for t in stored(address).trials] == [t.params for t in before]
    assert {(pid, key) for _, pid, event, key in log.read() if event == "return"} == {
        (other.pid, "12"),
        (frozen.pid, "12"),
    }


@pytest.mark.slow
@on("sqlite")
def test_a_worker_that_ends_waits_for_what_others_have_begun(address, tmp_path):
    log = Log(tmp_path)
    slow = started(address, tmp_path, 3, 1.0)
    log.wait_for(slow.pid)
    quick = started(address, tmp_path, 3, 0.0)
    for worker in (slow, quick):
        worker.join(60)
    check_log(log, {}, check_study(stored(address), 3))
    assert [int(count) for _, _, event, count in log.read() if event == "return"] == [3, 3]
