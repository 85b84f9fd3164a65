"""A dry run: what would be done and what it takes, with nothing written."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_recipes import W4_GPTQ

import quantlab
from quantlab.cli.app import main
from quantlab.engine import estimate, solve
from quantlab.engine.needs import Memory
from quantlab.errors import PreflightError

MIXED = {"layers": {"*.down_proj": {"format": "int8"}, "lm_head": {"format": "none"}}}


@pytest.fixture
def dry(tokens, tmp_path):
    def run(model, changes=None, **kwargs):
        kwargs.setdefault("calibration", tokens)
        return quantlab.dry_run(model, {**W4_GPTQ, **(changes or {})}, tmp_path / "out", **kwargs)

    return run


@pytest.mark.parametrize("changes", [{}, MIXED, {"options": {"asym": 1.0}}, {"quantizer": "rtn"}], ids=str)
def test_it_foretells_the_result(changes, original, dry, run, tmp_path):
    found = dry(original("llama"), changes)
    assert not list(tmp_path.iterdir())
    result = run(original("llama"), changes)
    assert sum(found.layers.values()) == len(result.reports)
    assert len(found.layers) == len({(report.format, report.quantizer) for report in result.reports})
    assert found.bits == pytest.approx(result.bits, rel=0.02)
    assert found.disk == pytest.approx(result.bytes, rel=0.1)
    assert found.seconds > 0
    assert found.timed in {report.layer for report in result.reports}


def test_one_layer_is_solved(original, dry, monkeypatch):
    solved = []

    def counted(layers, *arguments):
        solved.extend(layers)
        return solve.solve(layers, *arguments)

    monkeypatch.setattr(estimate, "solve", counted)
    dry(original("llama"))
    assert len(solved) == 1


def test_more_work_takes_longer(original, dry, monkeypatch):
    """By a clock by which everything that is timed takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    few = dry(original("llama"), calibration=torch.full((4, 8), 5))
    many = dry(original("llama"), calibration=torch.full((400, 64), 5))
    fixed = (800 * few.seconds - many.seconds) / 799  # what does not grow with the tokens: loading and solving
    assert 0 < fixed < few.seconds < many.seconds
    assert many.memory.states == 800 * few.memory.states
    assert dry(original("llama"), {"options": {"asym": 1.0}}).memory.weights > few.memory.weights


def test_a_budget_moves_batches_to_the_disk_and_nothing_else():
    needed = Memory(libraries=500, weights=400, states=1000, statistics=200, solving=100)
    assert needed.within(10_000) == needed
    tight = needed.within(1300)
    assert (tight.total, tight.states) == (1300, 100)
    with pytest.raises(PreflightError, match="needs about"):
        needed.within(1199)
    movable = replace(needed, movable=150)
    assert movable.within(1200).waiting == 0
    tight = movable.within(1100)
    assert (tight.total, tight.states, tight.statistics, tight.waiting) == (1100, 50, 50, 150)
    assert tight.without_states == 1050
    with pytest.raises(PreflightError, match="needs about"):
        movable.within(1049)


def test_the_command(original, save_tokenizer, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 60}" for i in range(4000)))
    model = shutil.copytree(original("llama"), tmp_path / "model")
    save_tokenizer(model, 64)
    out = tmp_path / "out"
    options = ["--dry-run", "--calibration", str(text), "--samples", "8", "--length", "32", "--set", "granularity=16"]
    command = ["quantize", str(model), "--out", str(out), *options]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["memory"]["total"] > document["memory"]["solving"] > 0
    assert document["disk"] > 0
    assert document["calibration"]["samples"] == 8
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "nothing was done yet" in said
    assert "at the peak" in said
    assert not out.exists()
