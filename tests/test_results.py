import csv
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nas.objectives import Limit, Maximize, Minimize
from lightning_nas.results import Candidate, Failure, SearchResult, hypervolume, non_dominated
from lightning_nas.space import Architecture, Choice, SearchSpace
from tests import macro_table

SPACE = SearchSpace([Choice("width", tuple(range(40)))])


class Macs:
    name, unit = "macs", "MAC"

    def __call__(self, architecture):
        return 100.0 * architecture["width"]


MACS = Macs()
OBJECTIVES = (Maximize("accuracy"), Minimize(MACS))
POINTS = [(0.5, 300), (0.9, 900), (0.7, 500), (0.6, 500), (0.7, 500), (0.2, 200)]  # accuracy, macs


def found(points=POINTS, objectives=OBJECTIVES, **settings):
    candidates = tuple(
        Candidate(Architecture({"width": i}), {"accuracy": a, "macs": float(m), "loss": 1 - a})
        for i, (a, m) in enumerate(points)
    )
    return SearchResult(SPACE, tuple(objectives), candidates, **settings)


def widths(candidates):
    return [c.architecture["width"] for c in candidates]


# --- front and hypervolume

small_losses = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12)  # few values: ties and duplicates


@settings(deadline=None)
@given(small_losses)
def test_non_dominated_rows_are_those_that_no_other_row_dominates(rows):
    def dominates(a, b):
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    expected = [not any(dominates(other, row) for other in rows) for row in rows]
    assert non_dominated(np.array(rows, dtype=float).reshape(-1, 3)).tolist() == expected


@settings(deadline=None)
@given(small_losses)
def test_hypervolume_is_the_number_of_unit_cubes_below_the_reference_that_a_point_reaches(rows):
    cubes = itertools.product(range(4), repeat=3)
    expected = sum(any(all(p <= c for p, c in zip(row, cube, strict=True)) for row in rows) for cube in cubes)
    assert hypervolume(np.array(rows, dtype=float).reshape(-1, 3), np.full(3, 4.0)) == pytest.approx(expected)


@settings(deadline=None)
@given(small_losses, st.tuples(*[st.integers(0, 4)] * 3))
def test_one_more_point_never_lowers_the_hypervolume(rows, more):
    reference, before = np.full(3, 4.0), np.array(rows, dtype=float).reshape(-1, 3)
    assert hypervolume(np.vstack([before, more]), reference) >= hypervolume(before, reference) - 1e-12


@pytest.mark.parametrize("beside", [(), ((5, 5),), ((2, 3),), ((6, 6),), ((7, 0),)])
def test_hypervolume_of_three_points_is_17_whatever_adds_nothing(beside):
    assert hypervolume(np.array([(1, 5), (2, 3), (4, 1), *beside], dtype=float), np.array([6.0, 6.0])) == 17


def test_front_keeps_equal_candidates_and_is_sorted_by_cost():
    assert widths(found().front) == [5, 0, 2, 4, 1]


def test_front_of_the_whole_macro_table_is_the_published_one():
    table = macro_table.table()
    candidates = tuple(
        Candidate(
            Architecture({f"layer{i}": int(d) for i, d in enumerate(key)}),
            {"accuracy": mean, "error": 100 - mean, "mflops": flops / 1e6},
        )
        for key, (mean, flops) in table.items()
    )
    objectives = (Minimize("error"), Minimize(macro_table.MegaFlops()))
    result = SearchResult(macro_table.SPACE, objectives, candidates)
    assert result.hypervolume((20, 120)) == pytest.approx(1207.5481, abs=5e-5)
    assert len(result.front) == 66
    assert len({tuple(c.values.values()) for c in result.front}) == 35
    assert macro_table.digits(result.front[0].architecture) == "00000000"
    assert macro_table.digits(result.best("error").architecture) in ("22212220", "22212202")
    upward = replace(result, objectives=(Maximize("accuracy"), objectives[1]))
    assert upward.hypervolume({"accuracy": 80, "mflops": 120}) == pytest.approx(1207.5481, abs=5e-5)


def test_hypervolume_takes_the_worst_of_each_objective_as_reference_unless_given():
    # reference (0.2, 900); rectangles between neighbouring accuracies of the front, as wide as 900 - macs
    expected = (0.5 - 0.2) * 600 + (0.7 - 0.5) * 400
    assert found().hypervolume() == pytest.approx(expected)
    assert found().hypervolume({"macs": 900, "accuracy": 0.2}) == pytest.approx(expected)
    assert found([]).hypervolume() == 0


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ((1.0,), "2 objectives"),
        ({"accuracy": 0.1}, "'accuracy', 'macs'"),
        ({"accuracy": 0, "mac": 1}, "'mac'"),
    ],
)
def test_a_reference_must_name_exactly_the_objectives(reference, message):
    with pytest.raises(ValueError, match=message):
        found().hypervolume(reference)


def test_a_candidate_that_breaks_a_constraint_is_never_on_the_front():
    result = found(limits=(Limit("loss", "<=", 0.35),))
    assert widths(result.front) == [2, 4, 1]
    assert widths(found(limits=(Limit("loss", "<", 0.0),)).front) == []


# --- best


@pytest.mark.parametrize(
    ("metric", "where", "expected"),
    [
        ("accuracy", None, 1),
        ("accuracy", {"macs": ("<=", 500)}, 2),
        ("accuracy", {"macs": ("<", 500)}, 0),
        ("accuracy", {MACS: ("<=", 250)}, 5),
        ("macs", {"accuracy": (">=", 0.6)}, 2),
        ("macs", {"accuracy": (">", 0.6), "loss": ("<=", 0.2)}, 1),
        (Minimize("loss"), {"macs": ("<=", 300)}, 0),
        (Maximize("loss"), None, 5),
    ],
)
def test_best_is_the_extreme_of_one_value_within_bounds_on_others(metric, where, expected):
    assert widths([found().best(metric, where)]) == [expected]


def test_among_equally_good_candidates_best_is_the_cheapest():
    assert widths([found([(0.9, 500), (0.9, 300), (0.9, 400)]).best("accuracy")]) == [1]


@pytest.mark.parametrize(
    ("metric", "where", "message"),
    [
        (
            "acuracy",
            None,
            "'acuracy' is not an objective. Did you mean 'accuracy'.*Known: 'accuracy', 'macs'",
        ),
        ("loss", None, r"'loss' is not an objective.*Minimize\(name\)"),
        (Maximize("f1"), None, "no value is named 'f1'.*Known: 'accuracy', 'loss', 'macs'"),
        ("accuracy", {"latency": ("<=", 3)}, "no value is named 'latency'"),
        ("accuracy", {"macs": ("<=", 150)}, r"none of 6 candidates has macs <= 150. Nearest: macs = 200"),
        (
            "accuracy",
            {"macs": ("<=", 300), "accuracy": (">", 0.8)},
            r"macs <= 300 and accuracy > 0\.8\. Nearest: macs = 200, accuracy = 0\.9",
        ),
        ("accuracy", {"macs": 150}, "'macs' needs an operator and a number.*got 150"),
        ("accuracy", {"macs": ("==", 150)}, "must be one of '<=', '<', '>=', '>', got '=='"),
        ("accuracy", {"macs": ("<=", float("nan"))}, "must be a finite number, got nan"),
    ],
)
def test_a_best_that_cannot_be_is_refused_with_what_could(metric, where, message):
    with pytest.raises(ValueError, match=message):
        found().best(metric, where)


def test_best_of_nothing_says_why_there_is_nothing():
    with pytest.raises(ValueError, match=r"the search has no candidate\."):
        found([]).best("accuracy")
    with pytest.raises(ValueError, match=r"of 6 none keeps accuracy >= 0\.95"):
        found(limits=(Limit("accuracy", ">=", 0.95),)).best("accuracy")


# --- tables, plots, files


def test_dataframe_has_a_row_a_candidate_with_choices_values_and_front():
    frame = found().to_dataframe()
    assert list(frame.columns) == ["width", "accuracy", "macs", "loss", "front"]
    assert frame["macs"].tolist() == [float(m) for _, m in POINTS]
    assert frame.index[frame["front"]].tolist() == [0, 1, 2, 4, 5]
    assert list(found([]).to_dataframe().columns) == ["width", "front"]


def drawn(axes):
    return {line.get_label(): np.column_stack(line.get_data()).tolist() for line in axes.get_lines()}


def test_plot_shows_all_candidates_the_front_and_the_reference_with_units():
    result = found()
    result = replace(result, reference=result.candidates[1])
    (axes,) = result.plot().axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("macs [MAC]", "accuracy")
    lines = drawn(axes)
    assert lines["candidates"] == [[m, a] for a, m in POINTS]
    assert lines["front"] == [[200, 0.2], [300, 0.5], [500, 0.7], [500, 0.7], [900, 0.9]]
    assert lines["reference"] == [[900, 0.9]]


def test_plot_of_three_objectives_has_a_panel_for_each_beside_the_cost():
    objectives = (Maximize("accuracy"), Minimize(MACS), Minimize("loss", unit="nats"))
    figure = found(objectives=objectives).plot()
    assert [(a.get_xlabel(), a.get_ylabel()) for a in figure.axes] == [
        ("macs [MAC]", "accuracy"),
        ("macs [MAC]", "loss [nats]"),
    ]


def test_plot_of_one_objective_follows_the_evaluations():
    (axes,) = found(objectives=[Maximize("accuracy")]).plot().axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("evaluation", "accuracy")
    assert drawn(axes)["candidates"] == [[i + 1, a] for i, (a, _) in enumerate(POINTS)]
    assert drawn(axes)["front"] == [[2, 0.9]]


def test_plotted_file_is_a_png_that_changes_with_the_data(tmp_path):
    found().plot(tmp_path / "one.png")
    found(POINTS[:3]).plot(tmp_path / "two.png")
    found().plot(tmp_path / "again.png")
    one, two, again = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "again"))
    assert one[:8] == two[:8] == b"\x89PNG\r\n\x1a\n"
    assert one == again != two


def test_plotting_leaves_the_global_state_of_pyplot_alone():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    found().plot()
    assert pyplot.get_fignums() == before


def test_saved_folder_holds_the_table_the_result_and_the_picture(tmp_path):
    result = found(
        [*POINTS, (float("nan"), 100)],
        objectives=[Minimize(MACS)],
        failed=(Failure(Architecture({"width": 9}), "accuracy is nan"),),
        limits=(Limit("macs", "<=", 600),),
    )
    folder = result.save(tmp_path / "new" / "folder")
    names = ["candidates.csv", "front.png", "result.json", "summary.txt"]
    assert sorted(p.name for p in folder.iterdir()) == names
    with (folder / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["macs"]) for r in rows] == [300, 900, 500, 500, 500, 200, 100]
    saved = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    assert saved["objectives"] == [{"name": "macs", "direction": "minimize", "unit": "MAC"}]
    assert saved["constraints"] == {"macs": ["<=", 600]}
    assert saved["failed"] == [{"architecture": {"width": 9}, "reason": "accuracy is nan"}]
    assert [c["front"] for c in saved["candidates"]] == [False] * 6 + [True]
    assert saved["candidates"][6]["values"]["accuracy"] is None
    assert SearchSpace.from_json(json.dumps(saved["space"])) == SPACE
