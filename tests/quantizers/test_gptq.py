"""GPTQ against its papers, written out again as loops over float64 numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from synthetic import (
    NF4,
    TableScheme,
    array,
    inputs,
    moment_statistics,
    output_error,
    problem,
    quadratic,
    statistics,
    weights,
)

from quantlab.errors import MissingStatisticsError, QuantlabError, RecipeError
from quantlab.numerics import QTensor, choose_scales, grid
from quantlab.problem import InputStatistics, Solution, Statistic
from quantlab.quantizers import make_quantizer
from quantlab.quantizers.gptq import Gptq, column_order, factorize
from quantlab.quantizers.rtn import Rtn
from quantlab.recipe import Scheme

ORDERS = ["activation", "group-aware", "natural"]
SCHEMES = {
    "grouped": Scheme(granularity=8, scale_dtype="float32"),
    "channel": Scheme(granularity="channel"),
    "tensor": Scheme(granularity="tensor", scale_search="mse"),
    "absmax": Scheme(format="int3", granularity=8, scale_search="absmax"),
    "asymmetric": Scheme(format="int3", granularity=8, symmetric=False),
    "table": TableScheme(table=NF4, granularity=8),
    "asymmetric-table": TableScheme(table=NF4, granularity=8, symmetric=False),
}
each_order = pytest.mark.parametrize("order", ORDERS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())

ROWS, COLUMNS = 12, 32
W = weights(ROWS, COLUMNS)
X = inputs(400, COLUMNS)

# (column, the weight to be rounded and its code in ours [out]) -> the code of the reference.
Round = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]


def rounding_of(q: QTensor) -> Round:
    """To nearest under the scales of ``q``: codes and values of a column. Numbers within 0.1 % of a step of a
    tie are rounded as ``q`` has them, for float32 may fall on the other side."""
    columns = q.shape[1]
    size = columns // q.scales.shape[1]
    scales = array(q.scales.expand(q.shape[0], -1))
    zeros = 0 * scales if q.zeros is None else array(q.zeros.expand(q.shape[0], -1))
    table = array(q.grid.values)

    def nearest(column: int, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale, zero = scales[:, column // size], zeros[:, column // size]
        codes = np.empty(len(w), dtype=int)
        for row in range(len(w)):
            distance = np.abs(table - (w[row] / scale[row] + zero[row]))
            codes[row] = distance.argmin()
            ours = int(q.codes[row, column])
            if distance[ours] - distance[codes[row]] < 1e-3 * np.diff(table).min():
                codes[row] = ours
        return codes, (table[codes] - zero) * scale

    return nearest


def naive_gptq(w: np.ndarray, h: np.ndarray, order: np.ndarray, damping: float, nearest: Round) -> np.ndarray:
    """Frantar et al., algorithm 1 without its blocks: e / U_ii propagated, U^T U the inverse."""
    n = len(order)
    w, h = w[:, order].copy(), h[np.ix_(order, order)]
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(n))
    upper = np.linalg.cholesky(inverse).T
    codes = np.empty(w.shape, dtype=int)
    for i in range(n):
        codes[:, i], value = nearest(order[i], w[:, i])
        error = (w[:, i] - value) / upper[i, i]
        for j in range(i, n):
            w[:, j] -= error * upper[i, j]
    out = np.empty_like(codes)
    out[:, order] = codes
    return out


def naive_ldlq(w: np.ndarray, h: np.ndarray, order: np.ndarray, damping: float, nearest: Round) -> np.ndarray:
    """Chee et al.: H = M D M^T, M unit upper triangular, by elimination from the end; then feedback."""
    n = len(order)
    w, h = w[:, order], h[np.ix_(order, order)]
    h = h + damping * np.diag(h).mean() * np.eye(n)
    m, d = np.eye(n), np.zeros(n)
    for k in range(n - 1, -1, -1):
        d[k] = h[k, k] - sum(m[k, j] ** 2 * d[j] for j in range(k + 1, n))
        for i in range(k):
            m[i, k] = (h[i, k] - sum(m[i, j] * d[j] * m[k, j] for j in range(k + 1, n))) / d[k]
    codes, values = np.empty(w.shape, dtype=int), np.empty(w.shape)
    for k in range(n):
        feedback = sum(((w[:, j] - values[:, j]) * m[j, k] for j in range(k)), np.zeros(len(w)))
        codes[:, k], values[:, k] = nearest(order[k], w[:, k] + feedback)
    out = np.empty_like(codes)
    out[:, order] = codes
    return out


def solve(weight=W, x=X, scheme=SCHEMES["grouped"], **options):
    kept = x if isinstance(x, InputStatistics) else statistics(x)
    return Gptq(**options).quantize(problem(weight, kept), scheme)


# --- what the papers say ---


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


# --- hard inputs ---


@each_scheme
@each_order
@pytest.mark.parametrize("tokens", [1, 5, COLUMNS - 1])
def test_fewer_tokens_than_inputs(scheme, order, tokens):
    x = inputs(tokens, COLUMNS)
    solution = solve(x=statistics(x), scheme=scheme, order=order)
    assert solution.qtensor.dequantize().isfinite().all()
    assert solution.loss.isfinite().all()
    assert torch.all(solution.loss >= 0)
    if scheme.granularity != "tensor":
        rtn = Rtn().quantize(problem(W, statistics(x)), scheme)
        assert output_error(W, solution, x) < output_error(W, rtn, x)


def test_damping_rises_until_the_factorization_succeeds_and_says_so():
    """An eigenvalue is at -0.1 of the mean: of 0.015, 0.03, ... 0.12 is the first that is enough."""
    basis = torch.linalg.qr(weights(COLUMNS, COLUMNS, seed=5).double())[0]
    eigenvalues = torch.linspace(0.5, 1.5, COLUMNS, dtype=torch.float64)
    eigenvalues *= (COLUMNS + 0.1) / eigenvalues[1:].sum()
    eigenvalues[0] = -0.1
    moment = (basis * eigenvalues @ basis.T).float()
    solution = solve(x=moment_statistics(moment), damping=0.015)
    assert solution.notes == ("damping raised to 0.12",)
    assert solution.qtensor.dequantize().isfinite().all()
    assert solve(x=moment_statistics(moment), damping=0.2).notes == ()


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_the_factor_is_that_of_the_damped_moment(damping):
    moment = statistics(X).second_moment
    factor, taken = factorize(moment, damping)
    assert taken == damping
    assert torch.equal(factor, factor.triu())
    assert torch.all(factor.diagonal() > 0)
    damped = moment.double() + damping * moment.diagonal().double().mean() * torch.eye(COLUMNS)
    product = factor.double() @ factor.double().T
    torch.testing.assert_close(product, damped, rtol=1e-5, atol=1e-6 * float(damped.max()))


@pytest.mark.timeout(10)
@each_order
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_with_the_layers_name(order, value):
    moment = statistics(X).second_moment
    moment[3, 3] = value
    with pytest.raises(QuantlabError, match=r"model\.layers\.3\.mlp\.down_proj"):
        solve(x=moment_statistics(moment), order=order)


@each_scheme
@each_order
def test_zeros_everywhere(scheme, order):
    nothing = torch.zeros(COLUMNS, COLUMNS)
    solution = solve(torch.zeros_like(W), statistics(X), scheme, order=order)
    assert solution.qtensor.dequantize().abs().max() < 1e-6
    solution = solve(W, moment_statistics(nothing), scheme, order=order)
    assert solution.qtensor.dequantize().isfinite().all()
    assert torch.count_nonzero(solution.loss) == 0


@pytest.mark.parametrize("scheme", [SCHEMES["channel"], Scheme(granularity=8, symmetric=False)], ids=str)
@each_order
def test_inputs_that_are_never_on(scheme, order):
    """Their weights are free: zero. The others are rounded as if those were not there."""
    dead = torch.arange(COLUMNS) % 8 == 5
    weight = W.clone()
    weight[:, dead] = 100.0  # must not stretch anybody's scale
    x = X.clone()
    x[:, dead] = 0
    solution = solve(weight, statistics(x), scheme, order=order, damping=0.02)
    assert torch.count_nonzero(solution.qtensor.dequantize()[:, dead]) == 0
    if scheme.granularity == "channel":
        living = solve(W[:, ~dead], statistics(x[:, ~dead]), scheme, order=order, damping=0.02 * 28 / 32)
        assert torch.equal(solution.qtensor.codes[:, ~dead], living.qtensor.codes)
        torch.testing.assert_close(solution.loss, living.loss, rtol=1e-3, atol=0)
    else:
        same = solve(torch.where(dead, 0, W), statistics(x), scheme, order=order, damping=0.02)
        assert torch.equal(solution.qtensor.codes, same.qtensor.codes)


@each_scheme
@each_order
def test_what_is_on_the_grid_stays_there(scheme, order):
    table = scheme.grid_for(W, None)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, len(table), (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    codes[:, ::8] = 0
    codes[:, 1::8] = len(table) - 1
    groups = 4 if scheme.granularity == 8 else 1
    shape = (1, 1) if scheme.granularity == "tensor" else (ROWS, groups)
    scales = torch.rand(shape, generator=generator).add(0.5).bfloat16()
    weight = QTensor(codes, scales, None if scheme.symmetric else torch.zeros(shape), table).dequantize()
    solution = solve(weight, statistics(X), scheme, order=order)
    torch.testing.assert_close(solution.qtensor.dequantize(), weight, rtol=1e-4, atol=1e-4)
    assert output_error(weight, solution, X) < 1e-8


@each_order
@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_are_nearly_exact(order, symmetric):
    scheme = Scheme(format="int8", granularity="channel", symmetric=symmetric)
    assert output_error(W, solve(scheme=scheme, order=order), X) < 1e-4


@each_order
def test_the_same_problem_gives_the_same_bits(order):
    one, other = (solve(order=order).qtensor for _ in range(2))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_arguments_are_not_written_to():
    kept = statistics(X, original=inputs(400, COLUMNS, seed=1))
    before = [tensor.clone() for tensor in (W, kept.second_moment, kept.shift)]
    solve(x=kept, asym=1.0)
    for tensor, copy in zip((W, kept.second_moment, kept.shift), before, strict=True):
        assert torch.equal(tensor, copy)


@each_order
@pytest.mark.parametrize("asym", [0.0, 1.0])
def test_the_moments_own_memory_will_do(order, asym):
    """With a spare place for it the answer is the same, and so is the moment; also where damping is raised."""
    kept = statistics(X, original=inputs(400, COLUMNS, seed=1))
    singular = kept.second_moment - 0.2 * torch.eye(COLUMNS)  # not positive definite at first
    for moment, notes in ((kept.second_moment, 0), (singular, 1)):
        known = dataclasses.replace(kept, second_moment=moment, held_out_shift=kept.shift, held_out=0.2)
        expected = solve(x=known, order=order, asym=asym)
        assert len(expected.notes) == notes
        before, spare = moment.clone(), torch.full_like(moment, torch.nan)
        found = solve(x=dataclasses.replace(known, spare=spare), order=order, asym=asym)
        assert torch.equal(found.qtensor.codes, expected.qtensor.codes)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(moment, before)
        assert spare.isfinite().all()


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


# --- the target of the original model's output ---

ORIGINAL = X + 0.4 * inputs(400, COLUMNS, seed=2)
FINE = Scheme(format="int8", granularity="channel", scale_dtype="float32")


def shifted_target(asym: float, damping: float) -> np.ndarray:
    """``W + asym (W* - W)`` with ``W* = W (C + lambda I) (H + lambda I)^-1``, C = E[x_o x^T]."""
    w, x, original = array(W), array(X), array(ORIGINAL)
    h, c = x.T @ x / len(x), original.T @ x / len(x)
    eye = damping * np.diag(h).mean() * np.eye(COLUMNS)
    return w + asym * (w @ (c + eye) @ np.linalg.inv(h + eye) - w)


@each_order
@each_scheme
def test_without_a_shift_the_target_is_the_weight(order, scheme):
    plain = solve(scheme=scheme, order=order)
    for original, asym in ((X, 1.0), (ORIGINAL, 0.0)):
        solution = solve(x=statistics(X, original), scheme=scheme, order=order, asym=asym)
        assert torch.equal(solution.qtensor.codes, plain.qtensor.codes)
        assert torch.equal(solution.loss, plain.loss)


@each_order
@pytest.mark.parametrize("asym", [0.3, 1.0])
@pytest.mark.parametrize("damping", [1e-4, 0.05])
def test_the_shifted_target(order, asym, damping):
    """Eight bits stay near it, and the loss is measured against it: both say where it is."""
    kept = statistics(X, ORIGINAL)
    solution = solve(x=kept, scheme=FINE, order=order, asym=asym, damping=damping)
    target = shifted_target(asym, damping)
    assert np.abs(target - array(W)).max() > 5 * float(solution.qtensor.scales.abs().mean())
    error = target - array(solution.qtensor.dequantize())
    expected = quadratic(error, array(kept.second_moment))
    np.testing.assert_allclose(array(solution.loss), expected, rtol=0.02)
    assert np.linalg.norm(error @ X.double().numpy().T) < 0.01 * np.linalg.norm(target @ X.double().numpy().T)


def test_with_little_damping_the_target_is_the_least_squares_solution():
    best = np.linalg.lstsq(array(X), array(ORIGINAL) @ array(W).T, rcond=None)[0].T
    np.testing.assert_allclose(shifted_target(1.0, 1e-9), best, atol=1e-5)
    solution = solve(x=statistics(X, ORIGINAL), scheme=FINE, asym=1.0, damping=1e-5)
    reached = array(X) @ array(solution.qtensor.dequantize()).T - array(ORIGINAL) @ array(W).T
    least = array(X) @ best.T - array(ORIGINAL) @ array(W).T
    assert np.square(reached).sum() < 1.001 * np.square(least).sum()


def test_an_input_that_only_the_original_model_has_on_still_counts():
    """Its own weights can do nothing, but the others can stand in for them."""
    x = X.clone()
    x[:, 5] = 0
    goal = array(ORIGINAL) @ array(W).T
    least = np.linalg.lstsq(array(x), goal, rcond=None)[0]
    q = solve(x=statistics(x, ORIGINAL), scheme=FINE, asym=1.0, damping=1e-4).qtensor
    reached = np.square(array(x) @ array(q.dequantize()).T - goal).sum()
    assert reached < 1.001 * np.square(array(x) @ least - goal).sum()


@each_order
@pytest.mark.parametrize(
    "scheme",
    [SCHEMES["grouped"], SCHEMES["asymmetric"], SCHEMES["table"]],
    ids=["grouped", "asymmetric", "table"],
)
def test_the_shift_brings_the_original_output_closer(order, scheme):
    """The error above what no weight could avoid, on the calibration inputs."""
    goal = array(ORIGINAL) @ array(W).T
    least = np.linalg.lstsq(array(X), goal, rcond=None)[1].sum()

    def miss(asym: float) -> float:
        q = solve(x=statistics(X, ORIGINAL), scheme=scheme, order=order, asym=asym).qtensor
        return np.square(array(X) @ array(q.dequantize()).T - goal).sum() - least

    assert miss(1.0) < 0.5 * miss(0.0)
    assert miss(1.0) < miss(0.5) < miss(0.0)


@each_order
def test_the_step_goes_as_far_as_held_out_sequences_agree(order):
    """Held-out sequences that say ``c`` times the same scale the step by ``c``, from nothing to all of it."""
    kept = statistics(X, ORIGINAL)

    def held_out(times: float) -> Solution:
        more = dataclasses.replace(kept, held_out_shift=times * kept.shift)
        return solve(x=more, scheme=FINE, order=order, asym=1.0)

    for times, asym in ((1.0, 1.0), (0.5, 0.5), (3.0, 1.0), (-1.0, 0.0)):
        expected = solve(x=kept, scheme=FINE, order=order, asym=asym)
        difference = held_out(times).qtensor.dequantize() - expected.qtensor.dequantize()
        # A number at a tie may fall on the other side; a step of another length moves everything.
        assert (difference.abs() > 1e-5).float().mean() < 0.05


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
