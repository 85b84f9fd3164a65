from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.numerics import Grid, QTensor, Sample, apply_scales, choose_scales, format_called, grid
from quantlab.numerics.fit import fit_codebook, fit_power

DISTRIBUTIONS = {
    "gaussian": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "t5": torch.distributions.StudentT(5.0),
}
# (bits, granularity): exponent, error relative to the uniform grid's. Rows of 4096 values, symmetric, abs-max.
POWER = {
    "gaussian": {(3, "channel"): (0.70, 0.73), (4, "channel"): (0.70, 0.74), (6, "channel"): (0.70, 0.74)},
    "laplace": {(3, "channel"): (0.55, 0.58), (4, "channel"): (0.55, 0.475), (6, "channel"): (0.55, 0.45)},
    "t5": {(3, "channel"): (0.50, 0.48), (4, "channel"): (0.50, 0.35), (6, "channel"): (0.50, 0.34)},
}
POWER["gaussian"] |= {(8, "channel"): (0.70, 0.74), (4, 128): (0.80, 0.85), (4, 64): (0.80, 0.87)}
POWER["laplace"] |= {(8, "channel"): (0.55, 0.45), (4, 128): (0.65, 0.64), (4, 64): (0.70, 0.68)}
POWER["t5"] |= {(8, "channel"): (0.50, 0.34), (4, 128): (0.65, 0.61), (4, 64): (0.65, 0.67)}
CASES = [(name, *key) for name, cases in POWER.items() for key in cases]


def rows_of(distribution: str, rows: int = 128, columns: int = 4096) -> torch.Tensor:
    torch.manual_seed(1)
    return DISTRIBUTIONS[distribution].sample((rows, columns))


def error(weight: torch.Tensor, table: Grid, granularity: int | str) -> torch.Tensor:
    """Relative squared error of each row under abs-max scales, float64."""
    scales = choose_scales(weight, table, granularity, search=False)
    off = QTensor.of(apply_scales(weight, table, scales), scales, table).dequantize() - weight
    return off.double().square().sum(1) / weight.double().square().sum(1)


def rounded_as_a_power(weight: torch.Tensor, bits: int, exponent: float, granularity: int | str) -> torch.Tensor:
    """The paper's own: integers nearest to ``sign(w) |w|^a``; relative squared error of each row."""
    groups = weight.double().unflatten(1, (-1, weight.shape[1] if granularity == "channel" else granularity))
    powers = groups.abs().pow(exponent).copysign(groups)
    scale = powers.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    q = (powers / scale).round()
    off = (q.abs() * scale).pow(1 / exponent).copysign(q) - groups
    return off.flatten(1).square().sum(1) / weight.double().square().sum(1)


@pytest.mark.parametrize(("distribution", "bits", "granularity"), CASES)
def test_powers_gain_what_they_should(distribution, bits, granularity):
    """As much as the paper's rounding, and more: codes are nearest in the weights, not in their powers."""
    exponent, ratio = POWER[distribution][bits, granularity]
    weight = rows_of(distribution)
    papers, uniform = (rounded_as_a_power(weight, bits, a, granularity) for a in (exponent, 1.0))
    # Heavy tails: a row's largest number decides, and rows differ.
    margin = 0.08 if distribution == "t5" and granularity == "channel" else 0.03
    assert float((papers / uniform).mean()) == pytest.approx(ratio, rel=margin)
    ours = error(weight, grid(f"power{bits}:{exponent}"), granularity)
    assert torch.all(ours <= papers * (1 + 1e-4))
    torch.testing.assert_close(error(weight, grid(f"power{bits}:1"), granularity), uniform, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("distribution", "bits", "granularity"), CASES)
def test_the_search_finds_the_exponent(distribution, bits, granularity):
    weight = rows_of(distribution, 16)
    fitted = fit_power(bits, [Sample(weight, granularity)])
    exponent = float(fitted.name.split(":")[1])
    assert exponent == pytest.approx(POWER[distribution][bits, granularity][0], abs=0.1 if bits == 3 else 0.06)
    scan = {a: float(error(weight, grid(f"power{bits}:{a / 100}"), granularity).mean()) for a in range(30, 101, 5)}
    assert float(error(weight, fitted, granularity).mean()) <= 1.005 * min(scan.values())


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(list(DISTRIBUTIONS)), st.sampled_from([2, 3, 4, 6]), st.booleans(), st.integers(0, 1000))
def test_a_fitted_power_is_never_worse_than_uniform(distribution, bits, weighted, seed):
    torch.manual_seed(seed)
    weight = DISTRIBUTIONS[distribution].sample((8, 256))
    importance = torch.rand(256).pow(4) + 1e-3 if weighted else None
    fitted = fit_power(bits, [Sample(weight, 64, importance)])
    counts = torch.ones(256) if importance is None else importance

    def weighed(table: Grid) -> float:
        scales = choose_scales(weight, table, 64, search=False)
        off = QTensor.of(apply_scales(weight, table, scales), scales, table).dequantize() - weight
        return float(off.double().square() @ counts.double() @ torch.ones(8, dtype=torch.float64))

    assert weighed(fitted) <= weighed(grid(f"power{bits}:1")) * (1 + 1e-5)


def test_uniform_weights_keep_the_uniform_grid():
    torch.manual_seed(0)
    fitted = fit_power(4, [Sample(torch.rand(32, 1024) * 2 - 1, "channel")])
    assert float(fitted.name.split(":")[1]) > 0.95


def test_one_exponent_for_several_layers():
    """The network's lies between the layers', and leaves the smallest sum of relative errors of all."""
    layers = [Sample(rows_of(name, 32, 2048) * size, "channel") for name, size in (("gaussian", 100.0), ("t5", 0.01))]
    alone = [float(fit_power(4, [layer]).name.split(":")[1]) for layer in layers]
    together = fit_power(4, layers)
    assert min(alone) < float(together.name.split(":")[1]) < max(alone)

    def total(table: Grid) -> float:
        return sum(float(error(layer.weight, table, "channel").mean()) for layer in layers)

    best = min(total(grid(f"power4:{a / 100}")) for a in range(30, 100, 2))
    assert total(together) <= 1.01 * best


def test_formats_fit_what_they_say():
    weight = rows_of("laplace", 16, 512)
    sample = Sample(weight, 64)
    assert torch.equal(format_called("power4").grid_for(sample).values, fit_power(4, [sample]).values)
    assert torch.equal(format_called("codebook3").grid_for(sample).values, fit_codebook(3, [sample]).values)
    assert format_called("codebook3").grid_for(sample).name == "codebook3"
    assert format_called("nf4").grid_for(sample) is grid("nf4")


# --- codebooks ---


def objective(values: torch.Tensor, sample: Sample) -> float:
    """The squared error of weights to the nearest of ``values`` times their group's largest magnitude, weighted."""
    size = sample.weight.shape[1] if sample.granularity == "channel" else sample.granularity
    groups = sample.weight.double().unflatten(1, (-1, size))
    largest = groups.abs().amax(-1, keepdim=True)
    normalized = groups / largest.clamp(min=1e-30)
    far = (normalized.unsqueeze(-1) - values.double()).abs().amin(-1).square() * largest.square()
    counts = torch.ones(sample.weight.shape[1]) if sample.importance is None else sample.importance
    return float((far.flatten(1) @ counts.double()).sum())


def samples() -> list[Sample]:
    found = []
    for name in DISTRIBUTIONS:
        weight = rows_of(name, 64, 512)
        found += [Sample(weight, 64), Sample(weight, "channel", rows_of("t5", 1, 512)[0].square())]
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("index", range(6))
def test_no_table_beats_a_codebook(bits, index):
    sample = samples()[index]
    fitted = objective(fit_codebook(bits, [sample]).values, sample)
    names = [f"int{bits}-narrow", f"nf{bits}", f"power{bits}:0.5", f"power{bits}:0.7", f"power{bits}:0.9"]
    names += ["e2m1", "fp4"] if bits == 4 else []
    for name in names:
        values = grid(name).values
        for end in (1.0, 0.95, 0.85, 0.7):
            assert fitted <= objective(values / values.abs().max() * end, sample) * (1 + 1e-6), (name, end)


def exhaustive(values: list[float], mass: list[float], count: int) -> float:
    """The least weighted squared error of any partition of ascending values into ``count`` runs."""
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        total = 0.0
        for start, stop in itertools.pairwise([0, *cuts, len(values)]):
            part, weight = values[start:stop], mass[start:stop]
            whole = sum(weight)
            mean = sum(m * v for m, v in zip(weight, part, strict=True)) / whole if whole else 0.0
            total += sum(m * (v - mean) ** 2 for m, v in zip(weight, part, strict=True))
        best = min(best, total)
    return best


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_codebook_is_the_best_partition(bits, weighted, seed):
    torch.manual_seed(seed)
    weight = torch.randn(1, 12)
    importance = torch.rand(12) + 0.05 if weighted else None
    sample = Sample(weight, "channel", importance)
    counts = [1.0] * 12 if importance is None else importance.tolist()
    pairs = sorted(zip(weight[0].tolist(), counts, strict=True))
    best = exhaustive([value for value, _ in pairs], [count for _, count in pairs], 2**bits)
    assert objective(fit_codebook(bits, [sample]).values, sample) == pytest.approx(best, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 64), torch.ones(4, 64), torch.tensor([[1.0, -1.0]]).repeat(4, 32), torch.eye(8, 64)],
    ids=["zeros", "ones", "signs", "few"],
)
def test_a_codebook_of_few_values_has_them(bits, weight):
    table = fit_codebook(bits, [Sample(weight, 64)])
    scales = choose_scales(weight, table, 64)
    q = QTensor.of(apply_scales(weight, table, scales), scales, table)
    torch.testing.assert_close(q.dequantize(), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fit", [lambda s: fit_power(4, s), lambda s: fit_codebook(4, s)], ids=["power", "codebook"])
def test_what_is_fitted_does_not_depend_on_the_size_of_the_weights(fit):
    weight = rows_of("laplace", 16, 512)
    one, other = fit([Sample(weight, 64)]), fit([Sample(weight * 2.0**-12, 64)])
    torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-6)


def test_an_input_that_never_counts_does_not():
    weight = rows_of("gaussian", 16, 128)
    weight[:, 64:] = 0.123
    importance = (torch.arange(128) < 64).float()
    seen = fit_codebook(2, [Sample(weight, 64, importance)])
    alone = fit_codebook(2, [Sample(weight[:, :64].contiguous(), 64)])
    torch.testing.assert_close(seen.values, alone.values, rtol=1e-4, atol=1e-4)
    assert fit_codebook(2, [Sample(weight, 64, torch.zeros(128))]).bits == 2
