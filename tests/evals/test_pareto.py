from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantlab_evals import EvalError, Limit, best, hypervolume, knee, measure_called, non_dominated, pareto, within

SIDE = 5


def points(dimensions):
    """Points on a small grid of whole numbers: ties and equal points are common."""
    return st.lists(st.tuples(*[st.integers(0, SIDE)] * dimensions), min_size=1, max_size=12)


clouds = st.sampled_from([2, 3]).flatmap(points)


def record(name, kind="quantized", **measures):
    return {"variant": name, "kind": kind, "measures": measures}


@given(clouds)
def test_the_front_is_what_no_other_point_dominates(cloud):
    def dominated(point):
        for other in cloud:
            better = [o < p for o, p in zip(other, point, strict=True)]
            worse = [o > p for o, p in zip(other, point, strict=True)]
            if any(better) and not any(worse):
                return True
        return False

    assert non_dominated(cloud) == [i for i, point in enumerate(cloud) if not dominated(point)]


@given(clouds)
def test_the_hypervolume_counts_the_cells_of_a_grid(cloud):
    dimensions = len(cloud[0])
    cells = itertools.product(range(SIDE), repeat=dimensions)
    covered = sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in cloud) for cell in cells)
    assert hypervolume(cloud, [SIDE] * dimensions) == covered


@given(clouds)
def test_the_hypervolume_is_that_of_the_front(cloud):
    corner = [SIDE + 1] * len(cloud[0])
    front = [cloud[i] for i in non_dominated(cloud)]
    assert hypervolume(front, corner) == pytest.approx(hypervolume(cloud, corner))


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=6))
def test_the_hypervolume_agrees_with_inclusion_and_exclusion(cloud):
    total = 0.0
    for size in range(1, len(cloud) + 1):
        for some in itertools.combinations(cloud, size):
            total += (-1) ** (size + 1) * math.prod(1 - np.max(some, axis=0))
    assert hypervolume(cloud, [1, 1, 1]) == pytest.approx(total, abs=1e-9)


def test_the_knee_is_furthest_from_the_line_between_the_ends():
    front = np.array([(0.0, 10.0), (1.0, 4.0), (2.0, 1.0), (6.0, 0.5), (10.0, 0.0)])
    scaled = (front - front.min(0)) / np.ptp(front, axis=0)
    first, last = scaled[0], scaled[-1]
    along = (last - first) / np.linalg.norm(last - first)
    offsets = scaled - first
    distances = offsets[:, 0] * along[1] - offsets[:, 1] * along[0]
    assert knee(front) == int(np.abs(distances).argmax()) == 2
    assert knee(front[:2]) is None
    assert knee([(0, 2), (1, 1), (2, 0)]) is None, "a straight line does not bend"
    assert knee([(0, 3), (2, 2), (3, 0)]) is None, "nor does one that bends the other way"


@given(st.lists(st.tuples(st.floats(1, 16), st.floats(0.001, 9)), min_size=1, max_size=12), st.floats(1.1, 7))
def test_a_front_does_not_depend_on_units_or_order(cloud, factor):
    records = [record(str(i), bits=round(bits, 2), kl=kl) for i, (bits, kl) in enumerate(cloud)]
    scaled = [record(r["variant"], bits=r["measures"]["bits"], kl=r["measures"]["kl"] * factor) for r in records]

    def names(front):
        return {front.records[place]["variant"] for place in front.members}

    one, other = pareto(records, ["bits", "kl"]), pareto(scaled[::-1], ["bits", "kl"])
    assert names(one) == names(other)
    assert one.hypervolume == pytest.approx(other.hypervolume)
    assert 0 <= one.hypervolume <= 1 + 1e-12


RECORDS = [
    record("original", "original", bits=16, ppl=10.0, decode=10),
    record("int8", bits=8.25, ppl=10.01, kl=0.001, decode=14, bytes=140),
    record("int4", bits=4.25, ppl=10.4, kl=0.03, decode=20, bytes=100),
    record("int4-rtn", bits=4.25, ppl=10.9, kl=0.09, decode=20, bytes=100),
    record("int4-table", bits=4.251, ppl=10.3, kl=0.02, decode=19, bytes=100),
    record("int3", bits=3.25, ppl=12.0, kl=0.2, decode=22, bytes=90),
    record("int2", bits=2.25, ppl=400.0, kl=4.0, decode=24, bytes=80),
    record("failed"),
]


def members(front):
    return [front.records[place]["variant"] for place in front.members]


def test_higher_is_better_where_it_is_and_what_was_not_measured_takes_no_part():
    assert members(pareto(RECORDS, ["bits", "ppl"])) == ["int2", "int3", "int4-table", "int8", "original"]
    assert members(pareto(RECORDS, ["decode", "ppl"])) == ["original", "int8", "int4-table", "int4", "int3", "int2"]
    assert members(pareto(RECORDS, ["bits", "kl"])) == ["int2", "int3", "int4-table", "int8"]
    assert "int4" in members(pareto(RECORDS, ["bits", "kl", "decode"]))
    assert "int4-rtn" not in members(pareto(RECORDS, ["bits", "kl", "decode"]))


def test_bits_that_differ_by_a_table_are_the_same():
    assert "int4" not in members(pareto(RECORDS, ["bits", "ppl"]))
    measure = measure_called("bits")
    assert measure.resolution == 0.01


def test_the_hypervolume_has_the_reference_that_was_given():
    front = pareto(RECORDS, ["bits", "kl"], {"bits": 16.0, "kl": 10.0})
    assert front.reference == (16.0, 10.0)
    assert front.ideal == (2.25, 0.001)
    levels = [(2.25, 4.0), (3.25, 0.2), (4.25, 0.02), (8.25, 0.001)]
    area = sum(
        (right - left) * (math.log10(10) - math.log10(kl))
        for (left, kl), right in zip(levels, [3.25, 4.25, 8.25, 16.0], strict=True)
    )
    assert front.hypervolume == pytest.approx(area / ((16 - 2.25) * 4), rel=1e-3)
    with pytest.raises(EvalError, match="ppl: is none of the measures"):
        pareto(RECORDS, ["bits", "kl"], {"ppl": 3})


def test_the_best_and_the_smallest_within_limits():
    bits, decode = measure_called("bits"), measure_called("decode")
    assert best(RECORDS, "kl", [Limit(bits, high=3.5)])["variant"] == "int3"
    assert best(RECORDS, "kl", [Limit(bits, high=2)]) is None
    assert best(RECORDS, "ppl", [Limit(decode, low=20)])["variant"] == "int4"
    assert best(RECORDS, "decode")["variant"] == "int2"
    original = RECORDS[0]
    assert best(RECORDS, "bits", [within(original, "ppl", 0.01)])["variant"] == "int8"
    assert best(RECORDS, "bits", [within(original, "ppl", 0.04)])["variant"] == "int4"
    assert best(RECORDS, "bits", [within(original, "decode", 0.5)])["variant"] == "int2"
    assert within(original, "decode", 0.5).low == 5
    with pytest.raises(EvalError, match="original has no KL divergence"):
        within(original, "kl", 0.01)


@pytest.mark.parametrize(
    ("measures", "words"),
    [
        (["bits"], "two or three"),
        (["bits", "bits"], "two or three"),
        (["bits", "kl", "ppl", "decode"], "two or three"),
        (["bits", "speed"], "measure 'speed'"),
        (["bits", "ece"], "no variant has all"),
    ],
)
def test_what_cannot_be_is_refused(measures, words):
    with pytest.raises(EvalError, match=words):
        pareto(RECORDS, measures)


def test_predictions_are_measures_of_their_own():
    assert measure_called("predicted:h100").predicted
    assert not measure_called("decode").predicted
