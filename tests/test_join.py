"""A further machine of a search: it is told where the study is, and reads the rest there."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage

import lightning_nas as nas
from lightning_nas.cli import main
from lightning_nas.strategies import NSGA2, Random, strategies

SPACE = nas.SearchSpace(
    [nas.Choice("depth", (1, 2, 3)), *(nas.Choice(f"width{i}", (1, 2, 3, 4)) for i in range(3))]
)


class Size:
    name, unit = "size", "M"

    def __call__(self, architecture):
        return float(architecture["depth"] * architecture["width0"])


SIZE = Size()
SCORE = nas.Maximize("score")


def measure(architecture, share=1.0):
    return {"score": float(sum(architecture.values())), "latency": float(architecture["width1"])}


def begun(storage, done=3, objectives=(SCORE,), **settings):
    """A search that was stopped after some candidates."""

    def stop_after(candidate, result):
        if len(result.candidates) == done:
            raise KeyboardInterrupt

    settings = {"strategy": "nsga2", "budget": 12, "remeasure": 0, "progress": False, **settings}
    with pytest.raises(KeyboardInterrupt):
        nas.search(SPACE, measure, objectives, storage=storage, on_candidate=stop_after, **settings)


def joined(storage, evaluate=measure, **settings):
    return nas.join(evaluate, storage=storage, **{"progress": False, "wait": 0, **settings})


@dataclass(frozen=True)
class Own:
    """A strategy of a user, without a name."""

    def sampler(self, problem, budget, seed, proposal):
        return Random().sampler(problem, budget, seed, proposal)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "random", "seed": 5},
        {"strategy": NSGA2(population=4, mutation=0.3), "seed": 1, "constraints": {"latency": ("<=", 3)}},
        {"objectives": (SCORE, nas.Minimize(SIZE)), "constraints": {"size": ("<=", 6)}},
        {"constraints": {SIZE: ("<", 9)}},
        {"objectives": (nas.Maximize(nas.MnasNetReward("score", SIZE, target=4)),)},
        {"objectives": (nas.Minimize("latency", unit="ms"), nas.Maximize("score"))},
    ],
)
def test_a_joined_search_is_the_one_that_was_begun(settings):
    stopped, whole = InMemoryStorage(), InMemoryStorage()
    begun(stopped, **settings)
    begun(whole, done=12, **settings)
    objectives = settings.get("objectives", ())
    rewards = [o.quantity for o in objectives if isinstance(o.quantity, nas.MnasNetReward)]
    costs = rewards or [SIZE] if "SIZE" in repr(settings) or "Size" in repr(settings) else []
    result = joined(stopped, costs=costs)
    expected = optuna.load_study(study_name="search", storage=whole)
    assert [c.architecture for c in result.candidates] == [
        SPACE.canonical(trial.params) for trial in expected.trials
    ]
    assert [c.values for c in result.candidates] == [t.user_attrs["measured"] for t in expected.trials]
    assert [(o.direction, o.label) for o in result.objectives] == [
        (o.direction, o.label) for o in objectives or (SCORE,)
    ]


@pytest.mark.parametrize("strategy", list(strategies))
def test_every_registered_strategy_can_be_joined(strategy):
    storage = InMemoryStorage()
    settings = {"strategy": strategy, "budget": 4, "remeasure": 0, "progress": False}
    whole = nas.search(SPACE, measure, [SCORE], storage="memory", **settings)
    begun(storage, done=1, **settings)
    assert joined(storage).candidates == whole.candidates


def test_a_study_that_does_not_exist_yet_is_waited_for(capsys):
    storage = InMemoryStorage()
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(joined, storage, wait=30, progress=True)
        time.sleep(0.4)
        begun(storage)
        assert len(worker.result().candidates) == 12
    assert "join: waits up to 30 s for the study 'search'" in capsys.readouterr().err


def test_the_bar_of_a_worker_counts_what_others_do(capsys):
    storage, finished = InMemoryStorage(), threading.Event()

    def first(architecture):
        finished.wait(20)
        return measure(architecture)

    with ThreadPoolExecutor(1) as pool:
        quiet = {"budget": 6, "strategy": "random", "progress": False}
        other = pool.submit(nas.search, SPACE, first, [SCORE], storage=storage, **quiet)
        last = joined(
            storage, wait=20, progress=True,
            on_candidate=lambda c, result: len(result.candidates) == 5 and finished.set(),
        )  # fmt: skip
    assert len(last.candidates) == len(other.result().candidates) == 6
    assert "6/6" in capsys.readouterr().err


def test_costs_that_are_missing_or_unknown_are_named():
    storage = InMemoryStorage()
    begun(storage, objectives=(SCORE, nas.Minimize(SIZE)))
    with pytest.raises(nas.NoMatchError, match=r"cannot store: 'size'; costs has none.*Give costs="):
        joined(storage, pytest.fail)
    begun(storage, name="plain")
    with pytest.raises(nas.NoMatchError, match=r"cannot store: none; costs has 'size'"):
        joined(storage, pytest.fail, name="plain", costs=[SIZE])


def test_a_strategy_without_a_name_must_be_given():
    storage = InMemoryStorage()
    begun(storage, strategy=Own())
    with pytest.raises(nas.StudyMismatchError, match=r"searched by Own\(\), .*Give strategy="):
        joined(storage, pytest.fail)
    assert len(joined(storage, strategy=Own()).candidates) == 12


def test_a_study_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    storage = InMemoryStorage()
    begun(storage, name="vit")
    with pytest.raises(nas.NoMatchError, match="no study 'vitt'. Did you mean 'vit'"):
        joined(storage, pytest.fail, name="vitt")
    with pytest.raises(nas.NoMatchError, match=r"no file .*none\.log"):
        joined(tmp_path / "none.log", pytest.fail)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="memory cannot be joined"):
        joined("memory", pytest.fail)


def test_a_study_of_the_first_format_opens_and_can_be_joined_after_that():
    """It says its space and objectives alone."""
    storage = InMemoryStorage()
    begun(storage, name="now")
    now = optuna.load_study(study_name="now", storage=storage)
    old = optuna.create_study(study_name="old", storage=storage, directions=["maximize"])
    old.set_user_attr("lightning_nas", now.user_attrs["lightning_nas"])
    old.add_trials(now.trials)
    with pytest.raises(
        nas.StudyMismatchError, match="does not say how it is searched.*Call search once more"
    ):
        joined(storage, pytest.fail, name="old")
    begun(storage, name="old", done=5)
    found = [c.architecture for c in joined(storage, name="old").candidates]
    assert found == [c.architecture for c in joined(storage, name="now").candidates]


# --- the command

MODULE = """
import time
from pathlib import Path
from tests.test_join import SIZE, measure

def make():
    return measure, [SIZE]

def slow():
    def evaluate(architecture):
        Path("begun").touch()
        time.sleep(60)
    return evaluate
"""


def command(*arguments):
    Path("measuring.py").write_text(MODULE)
    code = f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})"
    code += "; from lightning_nas.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "join", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's "&"
    )


@pytest.mark.slow
def test_the_command_finishes_a_search_and_shows_its_bar():
    begun("search.log", objectives=(SCORE, nas.Minimize(SIZE)), name="vit")
    process = command("measuring:make", "--storage", "search.log", "--name", "vit")
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "12/12" in printed
    assert len(joined("search.log", pytest.fail, name="vit", costs=[SIZE]).candidates) == 12


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_stopped_leaves_no_claim(number, code):
    begun("search.log")
    process = command("measuring:slow", "--storage=search.log", "--progress=false")
    deadline = time.monotonic() + 60
    while not Path("begun").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("search.log"))
    study = optuna.load_study(study_name="search", storage=storage)
    assert len(study.trials) == 3
    assert {v for name, v in study.user_attrs.items() if name.startswith("worker:")} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measuring:make", "--name=other", "--storage=search.log"], "has no study 'other'. .*'search'"),
        (["measuring:mke"], "module measuring has no function 'mke'. Did you mean 'make'"),
        (["measuring"], "PACKAGE.MODULE:FUNCTION, got 'measuring'"),
    ],
)
def test_a_command_that_cannot_work_ends_with_one_line(arguments, message, monkeypatch):
    begun("search.log")
    Path("measuring.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "measuring", raising=False)
    with pytest.raises(SystemExit, match=f"^lightning-nas join: .*{message}"):
        main(["join", *arguments, "--wait=0"])
