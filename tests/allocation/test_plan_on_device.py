"""Sensitivities that are measured on a device: the CPU's, with nothing computed or left in the wrong place."""

from __future__ import annotations

import pytest
from pretend_device import NAME, PretendDevice
from quantlab_evals import layers
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlab.allocation import task
from quantlab.errors import PreflightError
from quantlab.latency import HERE
from quantlab.plan_check import Check
from quantlab.planning import prepare_planning

pytestmark = pytest.mark.usefixtures("in_torch")

ROOFLINE = "mine(tflops=1,bandwidth=1,memory=16)"


@pytest.fixture
def prepare(model, tokens, tmp_path):
    def run(**settings):
        chosen = {"recipe": {"granularity": 32}, "candidates": "formats=int2,int4", "calibration": tokens[:4]}
        return prepare_planning(model, **chosen, cache=tmp_path, **settings)

    return run


@pytest.mark.parametrize(
    ("sensitivity", "options"),
    [
        ("error", {}),
        ("error", {"coefficients": "noise"}),
        ("error", {"coefficients": "none"}),
        ("kl", {"tokens": 64}),
        ("pairwise", {"pairs": "top", "top": 3}),
        ("hessian", {"probes": 2}),
        ("delta-loss", {}),
    ],
    ids=str,
)
def test_the_same_losses(sensitivity, options, prepare):
    settings = {"sensitivity": sensitivity, "options": options, "include": ["lm_head", "model.embed_tokens"]}
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = prepare(**settings).measured()
        with PretendDevice() as device:
            found, cached = prepare(**settings, device=NAME).measured()
            assert device.held() == 0
    assert not cached, "what was measured elsewhere"
    assert device.work > 64 * 64
    assert device.work_on_cpu == 0
    assert found.groups == expected.groups
    for ours, theirs in zip(found.units, expected.units, strict=True):
        assert ours.layers == theirs.layers
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3, abs=1e-7)
    assert found.notes[-1] == "measured on lazy"
    assert not any("measured on" in note for note in expected.notes)


def test_a_plan_that_is_measured_and_one_of_milliseconds(prepare, plan, tokens, folder, monkeypatch):
    """Planned, quantized and evaluated there; kernels are timed there, too."""
    monkeypatch.setattr(layers, "_FLUSH_BYTES_ELSEWHERE", 1 << 20)
    settings = {"recipe": {"granularity": 32}, "candidates": "formats=int2,int4", "calibration": tokens[:4]}
    with PretendDevice() as device:
        found = plan(3.0, model=folder, device=NAME, **settings)
        text = " ".join(f"w{1 + i * i % 60}" for i in range(400))
        check = Check(str(folder), [text], windows=4, length=32, calibration=tokens[:4], device=NAME)
        assert check.measure(found).measured > 0
        timed = prepare(device=NAME)
        assert timed.latency.source == "measured here, on lazy, without compiling"
        assert all((seconds > 0).all() for seconds in timed.latency.by_layer.values())
        del timed
    assert device.work_on_cpu == 0


@pytest.fixture
def folder(model, tmp_path, save_tokenizer):
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", 96)
    return tmp_path / "model"


class TestNames:
    def test_what_seconds_are_of_and_where_it_is_measured(self, prepare):
        """`device` once was what seconds are of: names that are no device of torch still are."""
        for old in ("rtx4090", HERE, "cpu", ROOFLINE, "a100(memory=40)"):
            found = prepare(device=old)
            assert (found.seconds_of, found.task.source.device.type) == (old, "cpu")
        with PretendDevice():
            found = prepare(device=NAME, latency="rtx4090")
            assert (found.seconds_of, found.task.source.device.type) == ("rtx4090", "lazy")
            found = prepare(device=NAME)
            assert (found.seconds_of, found.task.source.device.type) == (None, "lazy")
            del found
        assert prepare(device="cpu", latency=HERE).seconds_of == HERE

    @pytest.mark.parametrize("device", ["cuda:99", "gpu", "b9000"])
    def test_one_that_is_not_there(self, device, prepare):
        with pytest.raises(PreflightError, match=f"device '{device}' cannot be used here"):
            prepare(device=device)

    def test_too_small_a_device(self, prepare, monkeypatch):
        monkeypatch.setattr(task, "free_bytes", lambda _: 10_000)
        with PretendDevice() as device:
            with pytest.raises(PreflightError, match="holds the whole model on lazy:0"):
                prepare(device=NAME).measured()
            assert device.work == 0
