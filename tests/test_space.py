import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nas.space import Architecture, Choice, Depth, SearchSpace

OPTIONS = st.one_of(
    st.lists(st.integers(-5, 9), min_size=1, max_size=3, unique=True).map(sorted),
    st.lists(st.floats(-2, 2, allow_nan=False, width=16), min_size=1, max_size=3, unique=True).map(sorted),
    st.lists(st.sampled_from(["conv3", "skip", "pool", "none"]), min_size=1, max_size=3, unique=True),
    st.just([False, True]),
)


@st.composite
def spaces(draw):
    """Up to five choices; each may depend on up to two of those before it; shuffled."""
    choices = []
    for i in range(draw(st.integers(1, 5))):
        parents = draw(st.lists(st.sampled_from(choices), max_size=2, unique_by=id)) if choices else []
        when = {
            p.name: draw(st.lists(st.sampled_from(p.values), min_size=1, unique=True).map(tuple))
            for p in parents
        }
        choices.append(Choice(f"c{i}", tuple(draw(OPTIONS)), when=when))
    return SearchSpace(draw(st.permutations(choices)))


def product(space):
    for values in itertools.product(*(choice.values for choice in space.choices)):
        yield dict(zip((choice.name for choice in space.choices), values, strict=True))


def network(space, values):
    """What an assignment stands for: its active choices alone, found by recursion."""
    by_name = {choice.name: choice for choice in space.choices}

    def is_active(name):
        return all(is_active(p) and values[p] in allowed for p, allowed in dict(by_name[name].when).items())

    return frozenset((name, values[name]) for name in by_name if is_active(name))


def pick(space, seed):
    return space.sample(np.random.default_rng(seed))


# --- exact sizes and canonical forms


@settings(max_examples=60, deadline=None)
@given(spaces())
def test_size_is_the_number_of_different_networks(space):
    assert space.size == len({network(space, values) for values in product(space)})


@settings(max_examples=60, deadline=None)
@given(spaces())
def test_equal_networks_have_equal_keys_and_different_networks_different_ones(space):
    keys = {}
    for values in product(space):
        keys.setdefault(network(space, values), set()).add(space.canonical(values).key)
    assert all(len(of_one_network) == 1 for of_one_network in keys.values())
    assert len(set.union(*keys.values())) == len(keys)


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32 - 1))
def test_canonical_form_keeps_the_network_and_is_its_own_canonical_form(space, seed):
    rng = np.random.default_rng(seed)
    values = {choice.name: choice.values[rng.integers(len(choice.values))] for choice in space.choices}
    canonical = space.canonical(values)
    assert network(space, canonical) == network(space, values)
    assert space.canonical(canonical) == canonical
    assert {name for name, _ in network(space, values)} == set(space.active(values))


@settings(max_examples=60, deadline=None)
@given(spaces())
def test_enumerate_gives_every_network_once(space):
    found = list(space.enumerate())
    assert len({network(space, a) for a in found}) == len(found)
    assert {network(space, a) for a in found} == {network(space, values) for values in product(space)}
    assert all(space.canonical(a) == a for a in found)


def layers(depths, per_layer, first=0):
    """A transformer-like space: the choices of layer i are active where the depth exceeds i."""
    choices = [Choice("depth", depths)]
    for i in range(max(depths)):
        when = {"depth": [d for d in depths if d > i]} if i >= min(depths) else {}
        choices += [Choice(f"layers.{i}.{name}", values, when=when) for name, values in per_layer.items()]
    return choices


HEADS, WIDTHS, BITS = (6, 8, 10, 12), (1024, 2048, 3072), (4, 8)


@pytest.mark.parametrize(
    ("choices", "published"),
    [
        pytest.param(
            layers((6, 7, 8, 9, 10, 11, 12), {"h": HEADS, "m": WIDTHS}), 9_726_654_763_008, id="BERT"
        ),
        pytest.param(layers((11, 12), {"h": HEADS, "m": WIDTHS}), 9_659_108_818_944, id="ViT"),
        pytest.param(
            layers((9, 10, 11, 12), {"h": HEADS, "m": WIDTHS}), 9_726_185_963_520, id="BEiT-3 ablation"
        ),
        pytest.param(layers((10, 11, 12), {"h": HEADS, "m": WIDTHS}), 9_721_026_183_168, id="toolkit ViT"),
        pytest.param(
            [
                Choice("embedding.bits", BITS),
                Choice("head.bits", BITS),
                *layers(
                    tuple(range(6, 13)), {"h": HEADS, "m": WIDTHS, **{f"bits{i}": BITS for i in range(6)}}
                ),
            ],
            168_639_958_938_840_897_758_089_482_420_092_928,
            id="SimQ-NAS BERT",
        ),
        pytest.param(
            [
                Choice(
                    f"{stage}.{choice.name}", choice.values, when={f"{stage}.{p}": v for p, v in choice.when}
                )
                for stage in range(5)
                for choice in layers((2, 3, 4), {"kernel": (3, 5, 7), "width": (3, 4, 6)})
            ],
            21_758_655_492_572_485_851,
            id="OFA MobileNetV3",
        ),
    ],
)
def test_sizes_are_the_published_ones(choices, published):
    assert SearchSpace(choices).size == published


def test_size_beyond_ten_to_the_thirty_is_an_exact_integer():
    space = SearchSpace([Choice(f"c{i}", tuple(range(7))) for i in range(40)])
    assert space.size == 7**40
    assert type(space.size) is int


# --- round trips


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32 - 1))
def test_architectures_and_spaces_survive_json(space, seed):
    architecture = pick(space, seed)
    read = Architecture.from_json(architecture.to_json())
    assert read == architecture
    assert [type(v) for v in read.values()] == [type(v) for v in architecture.values()]
    assert SearchSpace.from_json(space.to_json()) == space


def test_depth_survives_json_with_the_blocks_it_keeps():
    space = SearchSpace([Depth("depth", (1, 3), keeps=((0,), (0, 1, 3)))])
    assert SearchSpace.from_json(space.to_json())["depth"].kept(3) == (0, 1, 3)


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_key_hash_and_equality_ignore_the_order_of_names(space, seed, random):
    items = list(pick(space, seed).items())
    one = Architecture(dict(items))
    random.shuffle(items)
    other = Architecture(dict(items))
    assert (one, one.key, hash(one)) == (other, other.key, hash(other))
    assert json.loads(one.key) == dict(items)


def test_numpy_scalars_become_plain_values():
    architecture = Architecture({"width": np.int64(3), "ratio": np.float32(0.5)})
    assert architecture == Architecture({"width": 3, "ratio": 0.5})
    assert json.loads(architecture.to_json()) == {"width": 3, "ratio": 0.5}


# --- points


def test_largest_and_smallest_take_the_ends_of_every_active_choice():
    space = SearchSpace(layers((1, 2), {"heads": (2, 4)}))
    assert dict(space.largest) == {"depth": 2, "layers.0.heads": 4, "layers.1.heads": 4}
    assert network(space, space.smallest) == {("depth", 1), ("layers.0.heads", 2)}
    assert space.canonical(space.smallest) == space.smallest


def test_what_is_not_named_takes_its_largest_value():
    space = SearchSpace(layers((1, 2), {"heads": (2, 4)}))
    assert dict(space.architecture({"layers.0.heads": 2})) == {
        "depth": 2,
        "layers.0.heads": 2,
        "layers.1.heads": 4,
    }


def test_every_active_choice_is_sampled_uniformly():
    space = SearchSpace(layers((1, 2), {"heads": (1, 2, 3, 4)}))
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(4000)]
    deep = [a for a in drawn if a["depth"] == 2]
    assert abs(len(deep) - 2000) < 5 * math.sqrt(4000 / 4)  # five standard deviations of a binomial
    counts = np.bincount([a["layers.1.heads"] for a in deep])[1:]
    chi_square = ((counts - len(deep) / 4) ** 2 / (len(deep) / 4)).sum()
    assert chi_square < 21.1  # 3 degrees of freedom, p = 1e-4


def test_equal_generators_give_equal_samples():
    space = SearchSpace(layers((1, 2, 3), {"heads": (1, 2, 3, 4)}))
    assert [pick(space, 7) for _ in range(3)] == [pick(space, 7)] * 3


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 2**32 - 1))
def test_neighbours_are_the_networks_one_active_choice_away(space, seed):
    start = pick(space, seed)
    active = {name for name, _ in network(space, start)}
    expected = {
        network(space, {**start, name: value})
        for name in active
        for value in next(c.values for c in space.choices if c.name == name)
    } - {network(space, start)}
    found = list(space.neighbours(start))
    assert {network(space, a) for a in found} == expected
    assert len({a.key for a in found}) == len(found)


@settings(max_examples=40, deadline=None)
@given(spaces(), st.data())
def test_restriction_holds_exactly_the_architectures_with_the_kept_values(space, data):
    kept = {
        choice.name: data.draw(st.lists(st.sampled_from(choice.values), min_size=1, unique=True))
        for choice in data.draw(st.lists(st.sampled_from(space.choices), unique_by=lambda c: c.name))
    }
    sub = space.restrict(kept)
    expected = {
        network(space, values)
        for values in product(space)
        if all(values[name] in allowed for name, allowed in kept.items())
    }
    assert {network(space, a) for a in sub.enumerate()} == expected
    assert sub.size == len(expected)
    assert all(space.contains(a) for a in sub.enumerate())


def test_restricted_depth_keeps_the_blocks_of_its_values():
    space = SearchSpace([Depth("depth", (2, 3, 4), keeps=((0, 3), (0, 2, 3), (0, 1, 2, 3)))])
    assert space.restrict({"depth": (3, 4)})["depth"].kept(3) == (0, 2, 3)


def test_depth_without_keeps_runs_the_first_blocks():
    assert Depth("depth", (2, 3)).kept(2) == (0, 1)


# --- numbers


@settings(max_examples=60, deadline=None)
@given(spaces(), st.lists(st.integers(0, 2**32 - 1), max_size=4))
def test_encodings_name_each_active_value_and_nothing_else(space, seeds):
    architectures = [pick(space, seed) for seed in seeds]
    one_hot, ordinal = space.encode(architectures), space.encode(architectures, "ordinal")
    assert one_hot.shape == (len(seeds), sum(len(c.values) for c in space.choices))
    assert ordinal.shape == (len(seeds), len(space.choices))
    for architecture, hot, number in zip(architectures, one_hot, ordinal, strict=True):
        active = network(space, architecture)
        expected = {f"{name}={value}" for name, value in active}
        assert {n for n, x in zip(space.feature_names(), hot, strict=True) if x} == expected
        assert hot.sum() == len(active)
        for choice, x in zip(space.choices, number, strict=True):
            is_active = choice.name in dict(active)
            assert x == (choice.values.index(architecture[choice.name]) + 1 if is_active else 0)


def test_categories_of_an_encoding_come_from_the_space_and_not_from_the_data():
    space = SearchSpace([Choice("kernel", (3, 5, 7))])
    np.testing.assert_array_equal(space.encode([space.architecture({"kernel": 5})]), [[0, 1, 0]])


def test_equal_networks_encode_equally():
    space = SearchSpace(layers((1, 2), {"heads": (2, 4)}))
    same = [{"depth": 1, "layers.0.heads": 2, "layers.1.heads": heads} for heads in (2, 4)]
    first, second = space.encode(same)
    np.testing.assert_array_equal(first, second)


# --- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice("", (1,)), "a name is needed"),
        (lambda: Choice("c", ()), "at least one value"),
        (lambda: Choice("c", (1, 1)), "values repeat"),
        (lambda: Choice("c", (3, 1)), r"ascending order.*write \(1, 3\)"),
        (lambda: Choice("c", (1, "a")), "cannot be mixed"),
        (lambda: Depth("d", (1, 2), keeps=((0,),)), "2 values but 1 lists"),
        (lambda: Depth("d", (2,), keeps=((1, 0),)), "ascending block indices"),
        (lambda: SearchSpace([]), "at least one choice"),
        (lambda: SearchSpace([Choice("c", (1,)), Choice("c", (2,))]), "named twice: c"),
        (
            lambda: SearchSpace([Choice("b", (1,), when={"depht": (1,)}), Choice("depth", (1,))]),
            "Did you mean 'depth'",
        ),
        (lambda: SearchSpace([Choice("b", (1,), when={"a": (3,)}), Choice("a", (1, 2))]), "has no value 3"),
        (
            lambda: SearchSpace([Choice("a", (1,), when={"b": (1,)}), Choice("b", (1,), when={"a": (1,)})]),
            "conditions in a circle among a, b",
        ),
        (lambda: Architecture.from_json("[1]"), "expected an object"),
        (lambda: Architecture.from_json('{"a": [1]}'), "plain values"),
        (lambda: SearchSpace.from_json('{"a": 1}'), "not a search space"),
    ],
)
def test_what_cannot_be_a_space_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_value_that_json_cannot_write_is_refused():
    with pytest.raises(TypeError, match=r"got \(1, 2\)"):
        Choice("c", ((1, 2),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.architecture({"dept": 1}), "unknown choice 'dept'. Did you mean 'depth'"),
        (lambda s: s.architecture({"depth": 3}), r"'depth' cannot be 3; allowed are \(1, 2\)"),
        (lambda s: s.canonical({"depth": 1}), "lacks 'heads'"),
        (lambda s: s.canonical({"depth": 1, "heads": 3}), r"'heads' cannot be 3; allowed are \(2, 4\)"),
        (lambda s: s.encode([{"depth": 1, "head": 2}]), "unknown choice 'head'. Did you mean 'heads'"),
        (lambda s: s.encode([{"depth": 1}]), "lacks 'heads'"),
        (lambda s: s.encode([{"depth": 1, "heads": 3}]), "'heads' cannot be 3"),
        (lambda s: s.encode([s.largest], "hashed"), "kind must be 'one-hot' or 'ordinal'"),
        (lambda s: s.restrict({"width": (1,)}), "unknown choice 'width'"),
        (lambda s: s.restrict({"heads": (3,)}), r"must keep some of \(2, 4\)"),
        (lambda s: s.restrict({"heads": ()}), r"must keep some of \(2, 4\)"),
    ],
)
def test_what_is_not_in_the_space_is_refused_with_what_is(call, message):
    with pytest.raises(ValueError, match=message):
        call(SearchSpace([Choice("depth", (1, 2)), Choice("heads", (2, 4))]))


def test_reading_an_unknown_name_lists_the_known_ones():
    space = SearchSpace([Choice("depth", (1, 2))])
    for read in (space, space.largest):
        with pytest.raises(KeyError, match="Known: 'depth'"):
            read["width"]


def test_contains_is_false_for_anything_else():
    space = SearchSpace([Choice("depth", (1, 2)), Choice("heads", (2, 4))])
    assert space.contains({"depth": 1, "heads": 4})
    others = [
        {},
        {"depth": 1},
        {"depth": 1, "heads": 3},
        {"depth": 1, "heads": 2, "x": 1},
        {"depth": 1, "x": 2},
    ]
    assert not any(space.contains(values) for values in others)
