"""Budgets of time: the roofline by the definition, measured kernels, and what a plan makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from quantlab.allocation.budget import parse_budget
from quantlab.allocation.choices import InfeasibleError
from quantlab.latency import HERE, latency
from quantlab.planning import prepare_planning

DEVICE = "mine(tflops=1000,bandwidth=0.001,memory=16)"  # a megabyte a second: a byte is a microsecond


@pytest.fixture(scope="module")
def planning(model, tokens, tmp_path_factory):
    def prepare(device):
        return prepare_planning(
            model,
            recipe={"granularity": 32, "quantizer": "gptq"},
            calibration=tokens,
            cache=tmp_path_factory.getbasetemp() / "latency",
            candidates="formats=int2,int4,int8",
            keep=True,
            device=device,
        )

    return prepare


def test_where_memory_is_the_limit_seconds_are_bytes(planning, model):
    task = planning(DEVICE).task
    found = latency(task, DEVICE)
    for name, sizes in task.bytes().items():
        np.testing.assert_allclose(found.by_layer[name], sizes * 1e-6)
    assert found.fixed == pytest.approx(4e-6 * model.lm_head.weight.numel()), "the head is read by every token"


def test_where_products_are_the_limit_all_candidates_are_alike(planning):
    task = planning(DEVICE).task
    found = latency(task, "mine(tflops=1e-9,bandwidth=1000,memory=16)")
    for name, count in task.weights().items():
        np.testing.assert_allclose(found.by_layer[name], 2 * count / 1e3)


def test_a_budget_of_time_is_kept_and_is_that_of_bytes_on_such_a_device(planning):
    here = planning(DEVICE)
    by_bytes = here.solve(parse_budget(4.0))
    seconds = 1e-6 * by_bytes.bytes + here.latency.fixed
    plan = here.solve(parse_budget(f"{seconds * 1000 * (1 + 1e-9)!r}ms"))
    assert plan.cost + plan.fixed_cost <= seconds * (1 + 1e-6)
    assert plan.loss == pytest.approx(by_bytes.loss)
    with pytest.raises(InfeasibleError, match="ms of it for what takes no part") as caught:
        here.solve(parse_budget("1us"))
    assert here.solve(parse_budget(f"{caught.value.least * (1 + 1e-9)!r}s")).code_bits == 2


def test_the_fastest_within_a_loss(planning):
    found = planning(DEVICE).solve(parse_budget("loss=0.02"))
    assert found.cost_unit == "seconds"
    assert found.loss <= 0.02
    smallest = planning(None).solve(parse_budget("loss=0.02"))
    assert smallest.cost_unit == "bytes"
    assert found.bytes == smallest.bytes


def test_kernels_are_measured_here(planning):
    found = planning(HERE).latency
    assert all((seconds > 0).all() for seconds in found.by_layer.values())
    assert all(np.isfinite(seconds).all() for seconds in found.by_layer.values())
    assert found.fixed > 0
    same = [found.by_layer[f"model.layers.{i}.mlp.down_proj"] for i in (0, 3)]
    np.testing.assert_array_equal(*same, err_msg="layers of one shape are timed once")
