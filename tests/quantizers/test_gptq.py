"""GPTQ against its papers, written out again as loops over float64 numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gptq_problems import (
    COLUMNS,
    ORDERS,
    ROWS,
    SCHEMES,
    W,
    X,
    each_order,
    each_scheme,
    naive_gptq,
    naive_ldlq,
    rounding_of,
    solve,
)
from synthetic import (
    array,
    inputs,
    moment_statistics,
    output_error,
    problem,
    quadratic,
    statistics,
    weights,
)

from quantlab.errors import MissingStatisticsError, RecipeError
from quantlab.numerics import choose_scales, grid
from quantlab.problem import InputStatistics, Statistic
from quantlab.quantizers import make_quantizer
from quantlab.quantizers.gptq import Gptq, column_order
from quantlab.quantizers.rtn import Rtn
from quantlab.recipe import Scheme


@pytest.mark.parametrize("reference", [naive_gptq, naive_ldlq])
@each_scheme
@each_order
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_codes_are_those_of_the_paper(reference, scheme, order, damping):
    """Given the scales that ours has settled on, the papers' loops give the same codes."""
    kept = statistics(X)
    q = solve(x=kept, scheme=scheme, order=order, damping=damping, block=5).qtensor
    taken = column_order(kept.diagonal, order, scheme.granularity).numpy()
    codes = reference(array(W), array(kept.second_moment), taken, damping, rounding_of(q))
    assert np.array_equal(codes, q.codes.numpy())
    if scheme.granularity != "tensor":
        rtn = Rtn().quantize(problem(W, kept), scheme).qtensor
        assert (rtn.codes != q.codes).float().mean() > 0.05, "the case is too easy to tell them apart"


@pytest.mark.parametrize("order", ["natural", "group-aware"])
@pytest.mark.parametrize("search", ["absmax", "second-moment"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_groups_scale_is_chosen_when_its_turn_comes(order, search, symmetric):
    """From the weights as the paper has updated them by then, and the importances of the group's own inputs."""
    scheme = Scheme(granularity=8, symmetric=symmetric, scale_search=search, scale_dtype="float32")
    kept = statistics(X)
    q = solve(x=kept, scheme=scheme, order=order, damping=0.05, block=3).qtensor
    taken = column_order(kept.diagonal, order, 8).numpy()
    w = array(W)[:, taken]
    h = array(kept.second_moment)[np.ix_(taken, taken)]
    upper = np.linalg.cholesky(np.linalg.inv(h + 0.05 * np.diag(h).mean() * np.eye(COLUMNS))).T
    nearest = rounding_of(q)
    for i, column in enumerate(taken):
        if i % 8 == 0:
            scales, zeros, _ = choose_scales(
                torch.from_numpy(w[:, i : i + 8]).float(),
                scheme.grid_for(W, None),
                "channel",
                symmetric=symmetric,
                search=search != "absmax",
                importance=kept.diagonal[taken[i : i + 8]] if search != "absmax" else None,
            )
            torch.testing.assert_close(q.scales[:, column // 8], scales[:, 0], rtol=1e-3, atol=0)
            assert symmetric or torch.equal(q.zeros[:, column // 8], zeros[:, 0])
        _, value = nearest(column, w[:, i])
        w[:, i:] -= np.outer((w[:, i] - value) / upper[i, i], upper[i, i:])


def test_act_order_takes_scales_from_the_weights_as_they_are():
    kept, scheme = statistics(X), SCHEMES["grouped"]
    static = solve(x=kept, scheme=scheme, order="activation").qtensor
    assert torch.equal(static.scales, Rtn().quantize(problem(W, kept), scheme).qtensor.scales)
    dynamic = solve(x=kept, scheme=scheme, order="natural").qtensor
    assert torch.equal(dynamic.scales[:, 0], static.scales[:, 0]), "nothing has been updated yet"
    assert not torch.equal(dynamic.scales[:, 1:], static.scales[:, 1:])


@each_scheme
@each_order
@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_the_loss_is_the_output_error_without_the_damping(scheme, order, damping):
    kept = statistics(X)
    solution = solve(x=kept, scheme=scheme, order=order, damping=damping)
    error = array(W) - array(solution.qtensor.dequantize())
    assert solution.loss.shape == (ROWS,)
    np.testing.assert_allclose(array(solution.loss), quadratic(error, array(kept.second_moment)), rtol=1e-3)


@each_scheme
@each_order
def test_codes_do_not_depend_on_the_block(scheme, order):
    solutions = [solve(scheme=scheme, order=order, block=block) for block in (1, 7, 32, COLUMNS, 1000)]
    for other in solutions[1:]:
        assert torch.equal(other.qtensor.codes, solutions[0].qtensor.codes)
        torch.testing.assert_close(other.qtensor.scales, solutions[0].qtensor.scales)
        torch.testing.assert_close(other.loss, solutions[0].loss, rtol=1e-3, atol=0)


@each_scheme
@each_order
@pytest.mark.parametrize("moment", [torch.eye(COLUMNS), torch.linspace(3, 0.1, COLUMNS).diag()], ids=["I", "diag"])
def test_uncorrelated_inputs_leave_nothing_to_make_up_for(scheme, order, moment):
    kept = moment_statistics(moment)
    q = solve(x=kept, scheme=scheme, order=order).qtensor
    rtn = Rtn().quantize(problem(W, kept), scheme).qtensor
    same = (q.codes == rtn.codes).float().mean()
    # A group's importances are summed in another order, so that a search may end in another scale, as good.
    assert same == 1 if scheme.scale_search != "second-moment" or order == "natural" else same > 0.95
    assert torch.equal(q.codes, rtn.codes) or order != "natural"


@each_scheme
@each_order
def test_correlated_inputs_gain(scheme, order):
    """On the calibration inputs and on others of their kind, at a size where it shows."""
    weight, x, held_out = weights(48, 64), inputs(2000, 64), inputs(2000, 64, seed=1)
    kept = statistics(x)
    solution = solve(weight, kept, scheme, order=order)
    rtn = Rtn().quantize(problem(weight, kept), scheme)
    for seen in (x, held_out):
        assert output_error(weight, solution, seen) < 0.6 * output_error(weight, rtn, seen)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("order", ["activation", "group-aware"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_does_not_see_how_the_inputs_are_numbered(granularity, order, symmetric):
    scheme = Scheme(granularity=granularity, scale_search="absmax", symmetric=symmetric)
    moment = statistics(X).second_moment
    turned = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))

    def codes(order: str, by: torch.Tensor) -> torch.Tensor:
        kept = moment_statistics(moment[by][:, by])
        return solve(W[:, by], kept, scheme, order=order).qtensor.codes

    straight = torch.arange(COLUMNS)
    assert torch.equal(codes(order, turned), codes(order, straight)[:, turned])
    assert not torch.equal(codes("natural", turned), codes("natural", straight)[:, turned])


# --- the order ---


def test_orders():
    diagonal = torch.tensor([1.0, 5.0, 5.0, 2.0, 9.0, 0.0, 3.0, 5.0])
    assert column_order(diagonal, "natural", 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert column_order(diagonal, "activation", 2).tolist() == [4, 1, 2, 7, 6, 3, 0, 5]
    # Groups (1 5)(5 2)(9 0)(3 5): by their largest, ties as they stand; falling inside.
    assert column_order(diagonal, "group-aware", 2).tolist() == [4, 5, 1, 0, 2, 3, 7, 6]
    assert column_order(diagonal, "group-aware", "channel").tolist() == [4, 1, 2, 7, 6, 3, 0, 5]


@pytest.mark.parametrize("size", [1, 4, 8, 32])
def test_the_group_aware_order_maps_groups_to_groups(size):
    diagonal = statistics(X).diagonal
    order = column_order(diagonal, "group-aware", size)
    assert sorted(order.tolist()) == list(range(COLUMNS))
    runs = order.view(-1, size)
    assert torch.equal(runs // size, (runs[:, :1] // size).expand_as(runs))
    taken = diagonal[runs]
    assert torch.all(taken.diff(dim=1) <= 0)
    assert torch.all(taken[:, 0].diff() <= 0)


def test_orders_differ_where_it_matters():
    by_order = [solve(order=order).qtensor.codes for order in ORDERS]
    assert not torch.equal(by_order[0], by_order[1])
    assert not torch.equal(by_order[1], by_order[2])


# --- statistics that are missing ---


@each_order
@pytest.mark.parametrize("search", ["absmax", "mse", "second-moment"])
def test_no_token_means_round_to_nearest_and_a_note(order, search):
    scheme = Scheme(granularity=8, scale_search=search)
    for kept in (InputStatistics(0), moment_statistics(torch.zeros(COLUMNS, COLUMNS), tokens=0)):
        solution = Gptq(order=order).quantize(problem(W, kept), scheme)
        plain = Scheme(granularity=8, scale_search="absmax" if search == "absmax" else "mse")
        rtn = Rtn().quantize(problem(W, None), plain).qtensor
        assert torch.equal(solution.qtensor.codes, rtn.codes)
        assert torch.equal(solution.qtensor.scales, rtn.scales)
        assert solution.loss is None
        assert len(solution.notes) == 1
        assert "no calibration token" in solution.notes[0]


@pytest.mark.parametrize(
    ("kept", "asym", "missing"),
    [
        (None, 0.0, "second_moment"),
        (InputStatistics(10, diagonal=torch.ones(COLUMNS)), 0.0, "second_moment"),
        (moment_statistics(torch.eye(COLUMNS)), 0.5, "shift"),
    ],
)
def test_missing_statistics_are_named_with_the_layer(kept, asym, missing):
    with pytest.raises(MissingStatisticsError, match=f"model.layers.3.mlp.down_proj: needs {missing}"):
        Gptq(asym=asym).quantize(problem(W, kept), SCHEMES["grouped"])


def test_needs():
    assert Gptq().needs(Scheme()) == Statistic.SECOND_MOMENT
    assert Gptq(asym=0.5).needs(Scheme()) == Statistic.SECOND_MOMENT | Statistic.SHIFT


# --- options ---


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("damping", 0),
        ("damping", -0.1),
        ("damping", 1.5),
        ("damping", float("nan")),
        ("damping", float("inf")),
        ("damping", "much"),
        ("damping", None),
        ("damping", [0.1]),
        ("damping", True),
        ("asym", "half"),
        ("asym", None),
        ("order", "act"),
        ("order", None),
        ("order", ["natural"]),
        ("asym", -0.1),
        ("asym", 1.1),
        ("asym", float("nan")),
        ("block", 0),
        ("block", -4),
        ("block", 1.5),
        ("block", True),
        ("block", "64"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(option, value):
    with pytest.raises(RecipeError) as caught:
        make_quantizer("gptq", {option: value})
    assert f"gptq: {option} {value!r}" in str(caught.value)


def test_formats_of_two_and_eight_bits_and_their_codes():
    for name in ("int2", "int8"):
        q = solve(scheme=Scheme(format=name, granularity=8)).qtensor
        assert q.grid is grid(name)
        assert int(q.codes.max()) < len(q.grid)
        assert q.codes.dtype == torch.uint8
