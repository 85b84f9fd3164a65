"""The fold's algebra, the options of hadamard, and the registry."""

from __future__ import annotations

import pytest
import torch

from quantlab.errors import RecipeError
from quantlab.numerics.orthogonal import rotation
from quantlab.transforms import Hadamard, hadamard, make_transform, transform_names
from quantlab.transforms.hadamard import rotate_weight


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_writer_and_a_reader_cancel_behind_a_norm():
    r1 = rotation(24, 0)
    x, gain, writer, reader = random(5, 16), random(24, seed=1), random(24, 16, seed=2), random(8, 24, seed=3)

    def norm(s):
        return s / s.square().mean(1, keepdim=True).sqrt()

    expected = (norm(x @ writer.T) * gain) @ reader.T
    stream = x @ rotate_weight(writer, outputs=r1).T
    torch.testing.assert_close(stream, r1.apply(x @ writer.T))
    torch.testing.assert_close(norm(stream) @ rotate_weight(reader, gain=gain, inputs=r1).T, expected)
    assert float((norm(stream) @ rotate_weight(reader, inputs=r1).T - expected).abs().max()) > 0.1


def test_heads_are_rotated_one_by_one():
    r2 = rotation(8, 0)
    values, output, mix = random(16, 12), random(10, 32, seed=1), random(6, 6, seed=2)
    x = random(6, 12, seed=3)

    def attention(values, output):
        heads = (x @ values.T).view(6, 2, 8).repeat_interleave(2, 1)  # two heads of values, four of queries
        return torch.einsum("st,thd->shd", mix, heads).flatten(1) @ output.T

    rotated = rotate_weight(values, outputs=r2), rotate_weight(output, inputs=r2)
    torch.testing.assert_close(attention(*rotated), attention(values, output))
    assert float((rotated[0] - values).abs().max()) > 0.1


def test_both_sides_gains_and_experts_in_one_piece():
    r1, r2, gain = rotation(24, 0), rotation(8, 1), random(24)
    weight = random(3, 16, 24, seed=1)
    left = torch.block_diag(r2.matrix, r2.matrix)
    expected = left.T @ (weight * gain) @ r1.matrix
    torch.testing.assert_close(rotate_weight(weight, gain=gain, inputs=r1, outputs=r2), expected)


def test_it_is_computed_in_float64_and_rounded_once():
    r1, weight, gain = rotation(64, 0), random(32, 64).bfloat16(), random(64, seed=1)
    exact = (weight.double() * gain) @ r1.matrix
    rotated = rotate_weight(weight, gain=gain, inputs=r1)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, exact.bfloat16())


def test_rows_at_a_time_are_the_whole(monkeypatch):
    weight, r1 = random(100, 24), rotation(24, 0)
    whole = rotate_weight(weight, inputs=r1)
    monkeypatch.setattr(hadamard, "_ROWS", 7)
    torch.testing.assert_close(rotate_weight(weight, inputs=r1), whole, rtol=0, atol=1e-14)


def test_it_is_registered_with_its_options():
    assert "hadamard" in transform_names()
    assert make_transform("hadamard", {}) == Hadamard(seed=0, residual=True, value_heads=True)
    assert make_transform("hadamard", {"seed": 3, "value_heads": False}) == Hadamard(3, True, False)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("hadamar", {}, "'hadamar' is unknown; use one of .*hadamard"),
        ("hadamard", {"seeds": 1}, "no option 'seeds'; its options are seed, residual, value_heads"),
        ("hadamard", {"seed": -1}, "seed -1"),
        ("hadamard", {"seed": True}, "seed True"),
        ("hadamard", {"residual": "yes"}, "residual 'yes': use true or false"),
        ("hadamard", {"value_heads": 1}, "value_heads 1: use true or false"),
        ("hadamard", {"residual": False, "value_heads": False}, "nothing to rotate"),
    ],
)
def test_what_it_does_not_know_it_refuses(name, options, match):
    with pytest.raises(RecipeError, match=match):
        make_transform(name, options)
