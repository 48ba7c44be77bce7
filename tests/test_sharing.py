"""What workers of one study agree on, and what they do while the storage fails."""

import itertools
import multiprocessing
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from optuna.storages import InMemoryStorage

import lightning_nas as nas
from lightning_nas.strategies import LINAS, NSGA2

SPACE = nas.SearchSpace([nas.Choice(name, tuple(range(6))) for name in "abcd"])
SMALL = nas.SearchSpace([nas.Choice("a", (0, 1, 2, 3))])
QUICK = nas.Sharing(beat=0.05, grace=0.3, patience=1.0)


class Evaluation:
    def __init__(self, pause=0.0):
        self.seen, self.pause = Counter(), pause

    def __call__(self, architecture):
        self.seen[architecture.key] += 1
        time.sleep(self.pause)
        return {"score": float(sum(architecture.values())), "size": float(architecture["a"])}


def run(evaluate, storage, space=SPACE, **settings):
    objectives = [nas.Maximize("score"), nas.Minimize("size")]
    settings = {
        "budget": 12,
        "strategy": "nsga2",
        "remeasure": 0,
        "progress": False,
        "sharing": QUICK,
        **settings,
    }
    return nas.search(space, evaluate, objectives, storage=storage, **settings)


def history(result):
    return [(c.architecture.key, c.values) for c in result.candidates]


def claims(storage, name="search"):
    attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
    return {key: value for key, value in attributes.items() if key.startswith("worker:")}


# --- sharing


@pytest.mark.parametrize("strategy", ["random", NSGA2(population=8), LINAS(population=8, predictor="ridge")])
def test_workers_with_equal_seeds_share_the_budget_and_repeat_nothing(strategy):
    storage, evaluate = InMemoryStorage(), Evaluation(pause=0.005)
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(run, evaluate, storage, budget=48, strategy=strategy) for _ in range(4)]
        results = [worker.result() for worker in work]
    assert list(evaluate.seen.values()) == [1] * 48
    assert {key for key, _ in history(results[0])} == set(evaluate.seen)
    assert all(history(result) == history(results[0]) for result in results)
    assert sum(result.duplicates for result in results) < 48 * 4
    assert set(claims(storage).values()) == {None}


def test_a_space_that_others_finish_is_waited_for():
    storage, evaluate = InMemoryStorage(), Evaluation(pause=0.1)
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(run, evaluate, storage, SMALL, budget=9) for _ in range(3)]
    assert [len(worker.result().candidates) for worker in work] == [4, 4, 4]
    assert set(evaluate.seen.values()) == {1}


def test_a_worker_whose_evaluation_raises_leaves_its_candidate_to_the_others():
    storage, begun, evaluate = InMemoryStorage(), threading.Event(), Evaluation()

    def fail(architecture):
        begun.set()
        time.sleep(0.2)
        raise RuntimeError("out of memory")

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(run, fail, storage, SMALL, budget=4)
        assert begun.wait(10)
        assert len(run(evaluate, storage, SMALL, budget=4).candidates) == 4
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.result()
    assert set(evaluate.seen.values()) == {1}
    assert set(claims(storage).values()) == {None}


def test_the_candidate_of_a_machine_that_fell_silent_is_free_after_its_grace():
    storage = InMemoryStorage()

    def stop(architecture):
        left.extend(claims(storage).values())
        raise KeyboardInterrupt

    left = []
    with pytest.raises(KeyboardInterrupt):
        run(stop, storage, SMALL)
    # As when its machine lost power: the attribute stays, and its process cannot be seen from here.
    study = optuna.load_study(study_name="search", storage=storage)
    study.set_user_attr("worker:lost", {**left[0], "process": None})
    evaluate, began = Evaluation(), time.monotonic()
    run(evaluate, storage, SMALL, budget=4)
    assert time.monotonic() - began > QUICK.grace
    assert list(evaluate.seen.values()) == [1, 1, 1, 1]
    assert list(evaluate.seen)[-1] == left[0]["key"]  # nobody waited while there was something else
    assert set(claims(storage).values()) == {None}


def test_a_worker_that_beats_is_waited_for_beyond_its_grace():
    storage, begun = InMemoryStorage(), threading.Event()
    slow, quick = Evaluation(pause=3 * QUICK.grace), Evaluation()

    def signalled(architecture):
        begun.set()
        return slow(architecture)

    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(run, signalled, storage, SMALL, budget=4)
        assert begun.wait(10)
        result = run(quick, storage, SMALL, budget=4)
    assert history(worker.result()) == history(result)
    assert sorted((slow.seen + quick.seen).values()) == [1, 1, 1, 1]
    assert len(slow.seen) == 1


def test_a_clock_that_ran_on_while_the_machine_slept_makes_nobody_dead(monkeypatch):
    storage, begun, hours = InMemoryStorage(), threading.Event(), itertools.count(0, 3600)
    slow, sharing = Evaluation(pause=0.5), nas.Sharing(beat=0.05, grace=5)

    def signalled(architecture):
        begun.set()
        return slow(architecture)

    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(run, signalled, storage, SMALL, budget=1, sharing=sharing)
        assert begun.wait(10)
        monkeypatch.setattr(time, "monotonic", lambda: float(next(hours)))
        result = run(pytest.fail, storage, SMALL, budget=1, sharing=sharing)
        assert history(worker.result()) == history(result)


def test_a_search_in_memory_starts_no_thread():
    def evaluate(architecture):
        names.update(thread.name for thread in threading.enumerate())
        return Evaluation()(architecture)

    names = set()
    run(evaluate, "memory")
    assert "lightning_nas beat" not in names
    run(evaluate, InMemoryStorage())
    assert "lightning_nas beat" in names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beat": 0}, "beat is in seconds and must be above 0, got 0"),
        ({"beat": 5, "grace": 10}, "grace must be at least three beats, 15 s, got 10"),
        ({"patience": -1}, "patience is in seconds, from 0 up, got -1"),
    ],
)
def test_times_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        nas.Sharing(**settings)


def test_a_budget_below_what_is_spent_names_both_and_what_to_do():
    storage = InMemoryStorage()
    first = run(Evaluation(), storage)
    with pytest.raises(ValueError, match="budget is 5, .* InMemoryStorage has spent 12.*at least 12"):
        run(pytest.fail, storage, budget=5)
    assert history(run(pytest.fail, storage)) == history(first)


# --- a storage that fails


def test_a_journal_whose_writer_was_killed_holds_nobody_up(tmp_path):
    def die_while_writing():
        def never(file):
            (tmp_path / "writes").touch()
            time.sleep(60)

        os.fsync = never
        run(Evaluation(), tmp_path / "s.log")

    run(Evaluation(), tmp_path / "s.log", budget=3)
    writer = multiprocessing.get_context("fork").Process(target=die_while_writing)
    writer.start()
    while not (tmp_path / "writes").exists():
        assert writer.is_alive()
        time.sleep(0.01)
    writer.kill()
    writer.join()
    assert (tmp_path / "s.log.lock").exists()  # as Optuna's own lock, which others then wait 30 s for
    began = time.monotonic()
    result = run(Evaluation(), tmp_path / "s.log")
    assert time.monotonic() - began < 10
    assert history(result) == history(run(Evaluation(), "memory"))


class Failing(InMemoryStorage):
    """Raises in some calls of one method, before or after it did its work."""

    def __init__(self, method, calls, after=False):
        super().__init__()
        self.method, self.calls, self.after, self.count = method, calls, after, 0

    def _maybe(self, method, *arguments, **keywords):
        self.count += method == self.method
        fails = method == self.method and self.count in self.calls
        if fails and not self.after:
            raise ConnectionError("the line is dead")
        value = getattr(super(), method)(*arguments, **keywords)
        if fails:
            raise ConnectionError("the line is dead")
        return value

    def create_new_trial(self, *arguments, **keywords):
        return self._maybe("create_new_trial", *arguments, **keywords)

    def get_all_trials(self, *arguments, **keywords):
        return self._maybe("get_all_trials", *arguments, **keywords)

    def set_study_user_attr(self, *arguments, **keywords):
        return self._maybe("set_study_user_attr", *arguments, **keywords)

    def get_study_user_attrs(self, *arguments, **keywords):
        return self._maybe("get_study_user_attrs", *arguments, **keywords)

    def create_new_study(self, *arguments, **keywords):
        return self._maybe("create_new_study", *arguments, **keywords)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "method",
    ["create_new_trial", "get_all_trials", "set_study_user_attr", "get_study_user_attrs", "create_new_study"],
)
def test_a_storage_that_fails_for_a_moment_changes_nothing(method, after):
    undisturbed = run(Evaluation(), InMemoryStorage())
    storage, evaluate = Failing(method, {1, 2, 7}, after), Evaluation()
    assert history(run(evaluate, storage)) == history(undisturbed)
    assert set(evaluate.seen.values()) == {1}
    assert len(optuna.load_study(study_name="search", storage=storage).trials) == 12
    assert storage.count > 2 or method == "create_new_study"


@pytest.mark.parametrize("method", ["create_new_trial", "get_all_trials", "set_study_user_attr"])
def test_a_storage_that_stays_away_ends_with_what_was_found_and_the_rest_follows_later(method):
    storage, evaluate = Failing(method, ()), Evaluation()

    def cut_off_at_the_fifth(architecture):
        if len(evaluate.seen) == 4:
            storage.calls = range(10**9)
        return evaluate(architecture)

    with pytest.raises(nas.StorageError, match=r"InMemory|Failing has failed .* the line is dead") as caught:
        run(cut_off_at_the_fifth, storage, sharing=nas.Sharing(patience=0.3))
    assert [c.architecture.key for c in caught.value.result.candidates] == list(evaluate.seen)
    assert len(evaluate.seen) == 5
    storage.calls = ()
    result = run(evaluate, storage)
    assert history(result) == history(run(Evaluation(), InMemoryStorage()))
    assert sorted(evaluate.seen.values()) == [1] * 11 + [1 + (method != "set_study_user_attr")]


def test_an_outage_longer_than_the_grace_makes_nobody_dead():
    storage, slow, begun = Failing("get_study_user_attrs", ()), Evaluation(pause=2.5), threading.Event()

    def signalled(architecture):
        begun.set()
        return slow(architecture)

    patient = nas.Sharing(beat=0.05, grace=0.3, patience=20)
    with ThreadPoolExecutor(2) as pool:
        worker = pool.submit(run, signalled, storage, SMALL, budget=1, sharing=patient)
        assert begun.wait(10)
        other = pool.submit(run, pytest.fail, storage, SMALL, budget=1, sharing=patient)
        time.sleep(0.3)
        storage.calls = range(10**9)
        time.sleep(2 * patient.grace)
        storage.calls = ()
        assert history(other.result()) == history(worker.result())
    assert sum(slow.seen.values()) == 1
