from __future__ import annotations

import sys

import pytest
import torch

from quantlab.checkpoint.baseline import KINDS, baseline_bits, baseline_bytes, load_baseline, split_baseline
from quantlab.errors import CheckpointError
from quantlab.evaluation import evaluate

pytest.importorskip("bitsandbytes")


def test_names():
    assert split_baseline("bitsandbytes:nf4:some/model") == ("bitsandbytes:nf4", "some/model")
    assert split_baseline("torchao:int8:demo") == ("torchao:int8", "demo")
    assert split_baseline("some/model") is None
    for name in ("bitsandbytes:nf5:some/model", "bitsandbytes:nf4", "bitsandbytes:nf4:"):
        with pytest.raises(CheckpointError, match="a kind out of nf4, nf4-dq, fp4"):
            split_baseline(name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_loads_and_runs(folders, kind):
    model = load_baseline(f"bitsandbytes:{kind}", folders / "original")
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits
    assert logits.isfinite().all()
    layers = [module for module in model.modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(layers) == 14
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64)
    of_blocks = baseline_bytes(model) - sum(
        p.numel() * p.element_size() for p in model.parameters() if p.dtype.is_floating_point
    )
    bits = 8 * of_blocks / weights
    low, high = {"int8": (8, 9)}.get(kind, (4, 4.8))
    assert low < bits < high, "scales are counted"
    assert baseline_bits(model) == pytest.approx(bits)


def test_torchao_takes_part_where_it_is_installed(folders):
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = load_baseline("torchao:int8", folders / "original")
    with torch.no_grad():
        assert model(torch.arange(1, 9)[None]).logits.isfinite().all()
    assert 8 < baseline_bits(model) < 9
    assert baseline_bytes(model) < baseline_bytes(load_baseline("bitsandbytes:int8", folders / "original")) * 1.2


def test_a_tool_that_is_missing_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(CheckpointError, match="torchao:int8: torchao cannot be used here"):
        load_baseline("torchao:int8", folders / "original")


def test_it_is_measured_like_any_other(folders):
    original = str(folders / "original")
    found = {
        kind: evaluate(
            f"bitsandbytes:{kind}:{original}", str(folders / "text.txt"), against=original, length=64, windows=8
        )
        for kind in ("nf4", "int8")
    }
    assert 0 < found["int8"].divergence.kl < found["nf4"].divergence.kl
    assert found["nf4"].bytes < found["int8"].bytes < found["int8"].original_bytes
