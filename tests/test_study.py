import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.exceptions import StorageInternalError

from lightning_nas.errors import StorageError, StudyMismatchError
from lightning_nas.objectives import Maximize, Minimize
from lightning_nas.results import hypervolume, losses
from lightning_nas.sharing import Sharing
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.strategies import NSGA2
from lightning_nas.study import search

DEPTHS = (2, 3, 4)
SPACE = SearchSpace(
    [
        Choice("depth", DEPTHS),
        *(
            Choice(f"layers.{i}.{what}", (1, 2, 3, 4), when={"depth": [d for d in DEPTHS if d > i]})
            for i in range(4)
            for what in ("heads", "width")
        ),
    ]
)
SMALL = SearchSpace([Choice("a", (0, 1, 2)), Choice("b", (0, 1, 2, 3))])


class Cost:
    def __init__(self, name, count, unit="MAC"):
        self.name, self.unit, self.count = name, unit, count

    def __call__(self, architecture):
        return self.count(architecture)


def sizes(architecture):
    return [
        architecture[f"layers.{i}.heads"] * architecture[f"layers.{i}.width"]
        for i in range(architecture["depth"])
    ]


MACS = Cost("macs", lambda a: sum(sizes(a)))
OBJECTIVES = (Maximize("accuracy"), Minimize(MACS))


class Evaluation:
    """An accuracy with a known formula, and how often each network was measured."""

    def __init__(self, accuracy=lambda a: sum(s**0.5 / (i + 1) for i, s in enumerate(sizes(a)))):
        self.accuracy, self.seen = accuracy, Counter()

    def __call__(self, architecture):
        self.seen[SPACE.canonical(architecture).key if "depth" in architecture else architecture.key] += 1
        return {"accuracy": self.accuracy(architecture)}


def run(evaluate=None, space=SPACE, objectives=OBJECTIVES, **settings):
    settings = {"storage": "memory", "budget": 30, "remeasure": 0, "progress": False, **settings}
    return search(space, evaluate or Evaluation(), objectives, **settings)


def history(result):
    return [(c.architecture.key, c.values) for c in result.candidates]


# --- what a search is


@pytest.mark.parametrize("strategy", ["nsga2", "random"])
def test_budget_many_different_networks_are_measured_once_each(strategy):
    evaluate = Evaluation()
    result = run(evaluate, strategy=strategy, budget=60)
    assert len(evaluate.seen) == 60
    assert set(evaluate.seen.values()) == {1}
    assert [c.architecture.key for c in result.candidates] == list(evaluate.seen)
    assert all(
        c.values == {**evaluate(c.architecture), "macs": MACS(c.architecture)} for c in result.candidates
    )


@pytest.mark.parametrize("strategy", ["nsga2", "random"])
def test_equal_seeds_give_equal_studies_and_others_do_not(strategy):
    assert history(run(strategy=strategy, seed=3)) == history(run(strategy=strategy, seed=3))
    assert history(run(strategy=strategy, seed=3)) != history(run(strategy=strategy, seed=4))


def test_hypervolume_never_decreases_while_a_search_runs():
    reference = {"accuracy": 0.0, "macs": 65.0}
    volumes = []
    run(on_candidate=lambda candidate, result: volumes.append(result.hypervolume(reference)))
    assert len(volumes) == 30
    assert volumes == sorted(volumes)
    assert volumes[-1] > volumes[0]


def test_on_candidate_gets_each_candidate_with_the_result_so_far():
    calls = []
    result = run(
        budget=5, on_candidate=lambda candidate, so_far: calls.append((candidate, so_far.candidates))
    )
    assert calls == [(c, result.candidates[: i + 1]) for i, c in enumerate(result.candidates)]


def test_a_space_smaller_than_the_budget_is_measured_completely():
    evaluate = Evaluation(lambda a: a["a"] + a["b"])
    for strategy in ("nsga2", "random"):
        result = run(evaluate, SMALL, [Maximize("accuracy")], strategy=strategy, budget=100)
        assert {c.architecture for c in result.candidates} == set(SMALL.enumerate())
        assert result.duplicates > 0
    assert set(evaluate.seen.values()) == {2}


def test_initial_architectures_come_first_and_once():
    result = run(budget=6, initial=[SPACE.largest, {**SPACE.smallest}, SPACE.largest])
    assert [c.architecture for c in result.candidates[:2]] == [SPACE.largest, SPACE.smallest]
    assert len({c.architecture.key for c in result.candidates}) == 6
    assert result.reference == result.candidates[0]
    assert run(budget=3, strategy="random").reference is None


def test_initial_architectures_take_part_in_evolution():
    best = [SPACE.architecture({"depth": 4, "layers.3.heads": heads}) for heads in (1, 2, 3, 4)]
    result = run(
        objectives=[Maximize("accuracy")], budget=24, initial=best, strategy=NSGA2(population=4, mutation=0.2)
    )
    like_parents = [
        c.architecture
        for c in result.candidates[4:]
        if sum(value == 4 for value in c.architecture.values())
        >= 6  # of 9; random ones in depth 4: 1 % have 6
    ]
    assert len(like_parents) >= 15  # of 20


def test_an_initial_architecture_that_breaks_a_constraint_is_rejected_and_disturbs_no_resume(tmp_path):
    settings = {"initial": [SPACE.largest, SPACE.smallest], "constraints": {"macs": ("<=", 20)}}
    run(storage=tmp_path / "s.log", budget=5, strategy="random", **settings)
    pieces = run(storage=tmp_path / "s.log", budget=15, strategy="random", **settings)
    assert pieces.candidates[0].architecture == SPACE.smallest
    assert history(pieces) == history(run(budget=15, strategy="random", **settings))


def test_a_single_objective_finds_the_optimum():
    result = run(objectives=[Maximize("accuracy")], budget=300, strategy=NSGA2(population=20))
    best = Evaluation()(SPACE.largest)["accuracy"]
    assert result.best("accuracy").values["accuracy"] > 0.97 * best
    assert len(result.front) >= 1


def test_an_objective_may_be_measured_instead_of_a_cost():
    def evaluate(architecture):
        return {"accuracy": 0.1 * architecture["depth"], "latency": np.float32(architecture["depth"])}

    result = run(evaluate, objectives=[Maximize("accuracy"), Minimize("latency", unit="ms")], budget=10)
    assert result.front[0].values == {"accuracy": 0.2, "latency": 2.0}
    assert {type(v) for c in result.candidates for v in c.values.values()} == {float}


# --- resume


def persistent(kind, folder):
    return {
        "journal file": folder / "studies" / "search.log",
        "sqlite": f"sqlite:///{folder / 'search.db'}",
        "Optuna storage": optuna.storages.InMemoryStorage(),
    }[kind]


@pytest.mark.parametrize("kind", ["journal file", "sqlite", "Optuna storage"])
@pytest.mark.parametrize("strategy", ["nsga2", "random"])
def test_a_search_in_pieces_equals_the_uninterrupted_one(kind, strategy, tmp_path):
    storage, evaluate = persistent(kind, tmp_path), Evaluation()

    class Stop(Exception):
        pass

    def interrupted(architecture):
        if len(evaluate.seen) in (5, 11, 17) and not stopped[len(evaluate.seen)]:
            stopped[len(evaluate.seen)] += 1
            raise Stop
        return evaluate(architecture)

    stopped = Counter()
    for _ in range(3):
        with pytest.raises(Stop):
            run(interrupted, storage=storage, budget=24, strategy=strategy)
    pieces = run(interrupted, storage=storage, budget=24, strategy=strategy)
    assert set(evaluate.seen.values()) == {1}
    assert history(pieces) == history(run(budget=24, strategy=strategy))


def test_a_finished_search_returns_at_once_and_a_larger_budget_extends_it():
    first = run(storage=None, name="vit")
    again = run(pytest.fail, storage=None, name="vit")
    assert Path("nas_studies/vit.log").is_file()
    assert history(again) == history(first)
    evaluate = Evaluation()
    extended = run(evaluate, storage=None, name="vit", budget=35)
    assert len(evaluate.seen) == 5
    assert history(extended)[:30] == history(first)


def test_studies_of_different_names_share_a_storage(tmp_path):
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    first = run(storage=storage, name="one", seed=1, budget=5)
    second = run(storage=storage, name="two", seed=2, budget=5)
    assert (
        history(run(pytest.fail, storage=storage, name="one", budget=5)) == history(first) != history(second)
    )


def test_an_exception_of_evaluate_says_where_and_what_is_kept(tmp_path):
    def evaluate(architecture):
        if len(asked) == 3:
            raise RuntimeError("out of memory")
        asked.append(architecture)
        return {"accuracy": 1.0}

    asked = []
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        run(evaluate, storage=tmp_path / "s.log")
    if sys.version_info >= (3, 11):
        assert "3 finished evaluations are kept" in caught.value.__notes__[0]
    assert [c.architecture for c in run(storage=tmp_path / "s.log").candidates[:3]] == asked


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from tests.test_study import run, Evaluation
from pathlib import Path

evaluate = Evaluation()
def logged(architecture):
    with open("evaluated.txt", "a") as file:
        print(architecture.key, file=file, flush=True)
    time.sleep(0.02)
    return evaluate(architecture)
run(logged, storage={storage!r}, budget=40)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal file", "sqlite"])
def test_a_killed_search_resumes_without_losing_or_repeating_a_finished_candidate(kind, tmp_path):
    storage, log = str(persistent(kind, tmp_path)), tmp_path / "evaluated.txt"
    code = KILLED.format(root=str(Path(__file__).parents[1]), storage=storage)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 180
    while not log.exists() or len(log.read_text().splitlines()) < 20:
        assert process.poll() is None, "the search ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    begun = log.read_text().splitlines()

    evaluate = Evaluation()
    resumed = run(evaluate, storage=storage, budget=40)
    repeated = set(begun) & set(evaluate.seen)
    assert repeated <= {begun[-1]}  # at most the one that was being measured
    assert len(begun) + len(evaluate.seen) - len(repeated) == 40
    assert history(resumed) == history(run(budget=40))


def test_a_journal_whose_last_line_was_cut_by_a_crash_loses_that_candidate_only(tmp_path):
    path = tmp_path / "s.log"
    whole = run(storage=path)
    *before, last, after = path.read_bytes().splitlines(keepends=True)
    assert whole.candidates[-1].architecture.key[1:20].encode() not in after  # the worker's leaving
    path.write_bytes(b"".join(before) + last[:-40])
    evaluate = Evaluation()
    assert history(run(evaluate, storage=path)) == history(whole)
    assert list(evaluate.seen) == [whole.candidates[-1].architecture.key]
    assert history(run(pytest.fail, storage=path)) == history(whole)


def test_trials_that_other_programs_left_running_do_not_disturb(tmp_path):
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    run(storage=storage, name="vit", budget=10)
    optuna.load_study(study_name="vit", storage=storage).ask()
    assert history(run(storage=storage, name="vit", budget=20)) == history(run(budget=20))


# --- a storage that cannot be opened


def test_a_database_that_cannot_be_opened_is_named_with_what_to_check(tmp_path):
    with pytest.raises(
        StorageError, match=r"sqlite:.*has failed [2-9] times.*unable to open.*that its folder exists"
    ):
        run(
            pytest.fail,
            storage=f"sqlite:///{tmp_path / 'missing' / 'search.db'}",
            sharing=Sharing(patience=0.3),
        )


def test_messages_show_no_password(monkeypatch):
    def unreachable(**_):
        raise StorageInternalError("no route to host")

    monkeypatch.setattr(optuna, "create_study", unreachable)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StorageError, match=r"search: postgresql://me:\*\*\*@host/db has failed 1 times"):
        run(pytest.fail, storage="postgresql://me:s3cr@t@host/db", sharing=Sharing(patience=0))


# --- another study under the same name


def test_another_space_under_the_same_name_is_refused_and_nothing_is_lost(tmp_path):
    path = tmp_path / "s.log"
    first = run(storage=path)
    wider = SearchSpace([Choice("depth", (2, 3, 4, 5)), *SPACE.choices[1:-1], Choice("embedding", (64, 128))])
    message = (
        r"'search' in .*s\.log is of another search.*has the choice 'layers\.3\.width'.*"
        r"lacks the choice 'embedding'.*values of 'depth' are \[2, 3, 4\] there, \[2, 3, 4, 5\] here"
    )
    with pytest.raises(StudyMismatchError, match=message):
        run(pytest.fail, wider, storage=path)
    assert history(run(pytest.fail, storage=path)) == history(first)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ([Maximize("accuracy")], "maximize accuracy, minimize macs; here they are maximize accuracy"),
        ([Maximize("f1"), Minimize(MACS)], "here they are maximize f1, minimize macs"),
        ([Minimize("accuracy"), Minimize(MACS)], "here they are minimize accuracy, minimize macs"),
    ],
)
def test_other_objectives_under_the_same_name_are_refused(objectives, message, tmp_path):
    path = tmp_path / "s.log"
    first = run(storage=path)
    with pytest.raises(StudyMismatchError, match=message):
        run(pytest.fail, objectives=objectives, storage=path)
    assert history(run(pytest.fail, storage=path)) == history(first)


def test_a_study_that_no_search_wrote_is_left_alone(tmp_path):
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    optuna.create_study(storage=storage, study_name="search").optimize(lambda trial: 1.0, n_trials=1)
    with pytest.raises(StudyMismatchError, match="was not written by a search"):
        run(storage=storage)
    assert len(optuna.load_study(storage=storage, study_name="search").trials) == 1


def test_the_order_of_choices_does_not_make_another_space(tmp_path):
    first = run(storage=tmp_path / "s.log")
    turned = run(pytest.fail, SearchSpace(SPACE.choices[::-1]), storage=tmp_path / "s.log")
    assert history(turned) == history(first)


# --- values that are not usable


def test_a_value_that_is_not_finite_fails_its_candidate_alone(tmp_path):
    def accuracy(architecture):
        return math.nan if architecture["depth"] == 3 else 1.0

    evaluate = Evaluation(accuracy)
    result = run(evaluate, storage=tmp_path / "s.log")
    assert {f.reason for f in result.failed} == {"accuracy is nan"}
    assert {f.architecture["depth"] for f in result.failed} == {3}
    assert {c.architecture["depth"] for c in result.candidates} == {2, 4}
    assert len(result.candidates) + len(result.failed) == len(evaluate.seen) == 30
    again = run(pytest.fail, storage=tmp_path / "s.log")
    assert (again.failed, history(again)) == (result.failed, history(result))


def test_a_search_in_which_everything_fails_ends_with_an_empty_front():
    result = run(Evaluation(lambda a: math.inf), budget=8)
    assert (result.front, len(result.failed)) == ((), 8)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            {"acc": 1.0, "loss": 2.0},
            ValueError,
            "evaluate returned no 'accuracy'.*'acc'.*Known: 'acc', 'loss'",
        ),
        ({"accuracy": 1.0, "macs": 3.0}, ValueError, "'macs', which is also the name of a cost"),
        ({"accuracy": 1.0, "depth": 3}, ValueError, "'depth', which is also the name of a choice"),
        ({"accuracy": [1.0, 2.0]}, TypeError, "plain numbers"),
        (0.9, TypeError, "must return a mapping.*got 0.9"),
    ],
)
def test_what_evaluate_must_not_return_is_named(returned, error, message):
    with pytest.raises(error, match=message):
        run(lambda architecture: returned)


# --- constraints


def test_a_constraint_on_a_cost_rejects_before_evaluation_and_outside_the_budget():
    evaluate = Evaluation()
    result = run(evaluate, constraints={"macs": ("<=", 12)}, budget=40)
    assert len(evaluate.seen) == len(result.candidates) == 40
    assert max(c.values["macs"] for c in result.candidates) <= 12
    assert result.rejected > 0


def test_a_constraint_may_name_a_cost_that_is_no_objective():
    depth = Cost("blocks", lambda a: a["depth"], "blocks")
    result = run(constraints={depth: ("<", 4)})
    assert {c.values["blocks"] for c in result.candidates} == {2, 3}


def test_a_constraint_on_a_measured_value_keeps_the_candidate_off_the_front():
    def evaluate(architecture):
        return {**Evaluation()(architecture), "latency": float(architecture["depth"])}

    result = run(evaluate, constraints={"latency": ("<=", 3)}, budget=80)
    assert {c.values["latency"] for c in result.candidates} == {2, 3, 4}
    assert max(c.values["latency"] for c in result.front) <= 3
    feasible = [c for c in result.candidates if c.values["latency"] <= 3]
    assert result.best("accuracy") == max(feasible, key=lambda c: c.values["accuracy"])
    late = [c.values["latency"] for c in result.candidates[40:]]
    assert np.mean(np.array(late) <= 3) > 0.75  # two thirds at random: the strategy learned it


def test_a_constrained_search_in_pieces_equals_the_uninterrupted_one(tmp_path):
    settings = {"constraints": {"macs": ("<=", 12), "accuracy": (">=", 3.0)}}
    run(storage=tmp_path / "s.log", budget=23, strategy=NSGA2(population=8), **settings)
    pieces = run(storage=tmp_path / "s.log", budget=40, strategy=NSGA2(population=8), **settings)
    assert history(pieces) == history(run(budget=40, strategy=NSGA2(population=8), **settings))


def test_a_constraint_that_one_in_a_million_satisfies_is_still_met():
    space = SearchSpace([Choice(f"c{i}", tuple(range(8))) for i in range(12)])
    total = Cost("total", lambda a: sum(a.values()))
    result = run(
        lambda a: {"accuracy": float(a["c0"])}, space, constraints={total: ("<=", 10)}, budget=10,
        objectives=[Maximize("accuracy"), Minimize(total)],
    )  # fmt: skip
    assert len({c.architecture for c in result.candidates}) == 10
    assert max(c.values["total"] for c in result.candidates) <= 10


def test_constraints_that_nothing_satisfies_end_with_the_nearest_value():
    with pytest.raises(ValueError, match=r"keeps macs <= 1.*Nearest: macs = 2\. Widen"):
        run(pytest.fail, constraints={"macs": ("<=", 1)})
    with pytest.raises(ValueError, match=r"keeps macs >= 100.*Nearest: macs = 64\."):
        run(pytest.fail, constraints={"macs": (">=", 100)})


def test_a_search_that_has_measured_all_feasible_architectures_ends_with_a_warning():
    total = Cost("total", lambda a: a["a"] + a["b"])
    with pytest.warns(UserWarning, match="search ends early.*keeps total >= 4"):
        result = run(
            Evaluation(lambda a: a["a"]), SMALL, [Maximize("accuracy")], constraints={total: (">=", 4)}
        )
    assert {(c.architecture["a"], c.architecture["b"]) for c in result.candidates} == {(1, 3), (2, 2), (2, 3)}


def test_all_feasible_architectures_of_a_large_space_are_found_from_one_another():
    with pytest.warns(UserWarning, match="search ends early.*keeps macs >= 60"):
        result = run(constraints={"macs": (">=", 60)}, budget=500)
    feasible = {a for a in SPACE.enumerate() if MACS(a) >= 60}
    assert {c.architecture for c in result.candidates} == feasible
    assert len(feasible) > 5


def test_another_constraint_may_continue_a_study_if_its_value_was_measured(tmp_path):
    run(storage=tmp_path / "s.log")
    blocks = Cost("blocks", lambda a: a["depth"], "blocks")
    result = run(storage=tmp_path / "s.log", budget=40, constraints={blocks: ("<=", 3)})
    assert all(c.values["blocks"] == c.architecture["depth"] for c in result.candidates)
    assert max(c.values["blocks"] for c in (*result.front, *result.candidates[30:])) <= 3
    with pytest.raises(StudyMismatchError, match="have no 'latency'"):
        run(pytest.fail, storage=tmp_path / "s.log", constraints={"latency": ("<=", 3)})


# --- the bar


def bar(capsys):
    return [line for line in capsys.readouterr().err.split("\r") if "hypervolume" in line]


def test_the_bar_shows_a_hypervolume_that_never_falls(capsys):
    result = run(progress=True, budget=40)
    shown = [float(line.split("hypervolume=")[1].split(",")[0]) for line in bar(capsys)]
    assert shown == sorted(shown)
    worst = np.array([-min(c.values["accuracy"] for c in result.candidates[:10]), 64.0])
    final = hypervolume(losses(OBJECTIVES, result.candidates), worst)
    assert shown[-1] == pytest.approx(final, rel=1e-4)


def test_the_bar_counts_evaluations_duplicates_and_rejections_and_says_what_was_found(capsys, tmp_path):
    run(progress=False, budget=15, storage=tmp_path / "s.log")
    result = run(progress=True, storage=tmp_path / "s.log", constraints={"macs": ("<=", 60)})
    text = capsys.readouterr().err
    assert "continues from 15 evaluations found in" in text
    assert "30/30" in text
    assert "per min=" in text
    assert f"duplicates={result.duplicates}, rejected={result.rejected}" in text


def test_a_search_without_progress_prints_nothing(capsys, tmp_path):
    run(storage=f"sqlite:///{tmp_path / 'search.db'}", budget=3)
    assert capsys.readouterr() == ("", "")


# --- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget.*at least 1, got 0"),
        ({"budget": 2.5}, ValueError, "budget.*got 2.5"),
        ({"seed": -1}, ValueError, "seed.*got -1"),
        ({"objectives": []}, ValueError, "at least one objective"),
        ({"objectives": ["accuracy"]}, TypeError, r"Maximize\(...\) or Minimize\(...\), got 'accuracy'"),
        ({"objectives": [Maximize("a1"), Minimize("a1")]}, ValueError, "more than once: 'a1'"),
        ({"objectives": [Maximize("depth")]}, ValueError, "'depth' is a choice of the space"),
        ({"strategy": "nsga22"}, ValueError, "Unknown strategy 'nsga22'. Did you mean 'nsga2'.*'random'"),
        ({"strategy": NSGA2}, TypeError, r"an instance.*NSGA2\(population=20\)"),
        ({"constraints": {"macs": 3}}, ValueError, "'macs' needs an operator and a number"),
        ({"constraints": {Cost("macs", len): ("<=", 3)}}, ValueError, "two costs are named 'macs'"),
        ({"initial": [{"depth": 9}]}, ValueError, "'depth' cannot be 9"),
        ({"name": "", "storage": None}, ValueError, "name is what the study is found by"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_starts(settings, error, message):
    with pytest.raises(error, match=message):
        run(pytest.fail, **{"storage": None, **settings})
    assert not list(Path.cwd().iterdir())


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path):
    run(storage=f"sqlite:///{tmp_path / 'search.db'}", budget=2)
    before = (tmp_path / "search.db").read_bytes()
    with pytest.raises(ValueError, match="no journal file; a database is given by its URL, as 'sqlite:///"):
        run(storage=tmp_path / "search.db")
    with pytest.raises(ValueError, match="no journal file"):
        run(storage=tmp_path)
    assert (tmp_path / "search.db").read_bytes() == before
