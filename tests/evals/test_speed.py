"""Measuring speed: what is counted, and what a record says."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantlab_evals import speed
from quantlab_evals.errors import EvalError
from quantlab_evals.loading import load_cost
from quantlab_evals.machine import describe_machine, matrix_flops, stream_bandwidth
from quantlab_evals.speed import Run, Speed, SpeedSettings, measure_speed
from quantlab_evals.timing import Timing, timed

QUICK = SpeedSettings(prompt_tokens=6, new_tokens=4, rounds=3, compiled=False)


def steady(seconds):
    return Timing((seconds,) * 3, (seconds,) * 3)


def run(batch=1, compiled=False, prefill=0.5, step=0.25):
    return Run(batch, compiled, 10, 5, steady(prefill), steady(step), 0.0)


def test_rates_count_every_prompt_of_a_batch():
    assert run().prefill_rate == 20
    assert run(batch=4).prefill_rate == 80
    assert run().decode_rate == 4
    assert run(batch=4).decode_rate == 16


def test_the_faster_way_is_named_and_both_are_recorded():
    found = Speed("m", "M", "float32", "sdpa", (run(), run(compiled=True, step=0.2), run(2), run(2, True, step=0.3)))
    assert found.best(1).compiled
    assert not found.best(2).compiled
    record = found.to_dict()
    assert record["faster"] == {"1": "compiled", "2": "eager"}
    assert len(record["runs"]) == 4
    assert record["cache"] == "static"


def test_models_take_turns(make_model, monkeypatch):
    order = []
    models = {"a": make_model(seed=0), "b": make_model(seed=1)}
    found = measure_speed(
        models, replace(QUICK, batches=(1, 2)), progress=lambda done, total, what: order.append((done, total, what))
    )
    assert [done for done, _, _ in order] == list(range(16))
    assert {total for _, total, _ in order} == {16}
    names = [what for _, _, what in order]
    assert names[:4] == ["a, batch 1, eager", "b, batch 1, eager", "a, batch 2, eager", "b, batch 2, eager"]
    assert names[4:8] == [*names[1:4], names[0]], "nobody is always first"
    for model in found.models:
        assert [turn.batch for turn in model.runs] == [1, 2]
        for turn in model.runs:
            assert len(turn.step.wall) == len(turn.prefill.cpu) == 3, "the round that warms up is not counted"
            assert turn.step.median < turn.prefill.median * 3


def test_a_step_that_is_slow_is_seen(make_model, monkeypatch):
    """What is reported is what the steps took: a step that waits 20 ms is not decoded in less."""
    model = make_model()
    usual = speed.GreedyDecoder.step

    def slow(self, token):
        time.sleep(0.02)
        return usual(self, token)

    monkeypatch.setattr(speed.GreedyDecoder, "step", slow)
    (found,) = measure_speed({"m": model}, QUICK).models[0].runs
    assert 0.02 < found.step.median < 0.2
    assert found.step.cpu_median < found.step.median, "waiting takes no processor"
    assert found.prefill.median < 0.02 + found.step.median


def test_a_record_says_how_to_repeat_it(make_model):
    found = measure_speed({"m": make_model()}, QUICK).to_dict()
    record = json.loads(json.dumps(found))
    assert record["settings"] == {
        **{"prompt_tokens": 6, "new_tokens": 4, "batches": [1], "rounds": 3},
        **{"compiled": False, "cpp_wrapper": True, "seed": 0},
    }
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["torch"] == torch.__version__
    assert all(record["machine"][key] for key in ("cpu", "instructions", "cores", "memory", "transformers"))
    (model,) = record["models"]
    assert (model["dtype"], model["attention"], model["model_class"]) == ("float32", "sdpa", "LlamaForCausalLM")
    assert len(model["runs"][0]["step"]["wall"]) == 3


def test_what_cannot_be_compiled_is_said_and_the_eager_run_stands(make_model, monkeypatch):
    def fails(*_arguments, **_options):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_a, **_k: fails)
    (found,) = measure_speed({"m": make_model()}, replace(QUICK, compiled=True)).models
    assert [turn.compiled for turn in found.runs] == [False]
    assert "no compiler here" in found.not_compiled


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 0}, {"new_tokens": 1}, {"prompt_tokens": 0}, {"batches": (0,)}, {"batches": ()}, {"batches": (1, 2.0)}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(EvalError, match=next(iter(wrong))):
        SpeedSettings(**wrong)


def test_no_models_and_too_many_tokens_are_refused(make_model):
    with pytest.raises(EvalError, match="no model"):
        measure_speed({}, QUICK)
    with pytest.raises(EvalError, match="32 positions"):
        measure_speed({"m": make_model()}, replace(QUICK, prompt_tokens=30))


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=9))
def test_a_timing_is_ordered(seconds):
    timing = Timing.of(seconds)
    low, high = timing.quartiles
    assert min(timing.wall) <= low <= timing.median <= high <= max(timing.wall)
    assert sum(value <= timing.cpu_median for value in timing.cpu) * 2 >= len(seconds)


def test_processor_time_is_not_the_clock():
    _, (wall, cpu) = timed(lambda: time.sleep(0.05))
    assert wall >= 0.05
    assert cpu < 0.04


def test_the_machine():
    assert describe_machine().cores >= 1
    assert 1e8 < stream_bandwidth(rounds=1) < 1e13
    assert 1e7 < matrix_flops(rounds=1, size=64) < 1e16


# Weights that the process makes are its own memory; weights that are mapped from a file are not.
_LOADERS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def model():
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()

def mapped(path):
    made = model()
    made.ballast = torch.from_file(path, size=50 << 20, dtype=torch.uint8)
    made.ballast.sum()
    return made

def twice(path):
    made = model()
    made.ballast = torch.ones(50 << 20, dtype=torch.uint8)
    torch.ones(80 << 20, dtype=torch.uint8)
    return made

def broken(path):
    raise ValueError("nothing can be loaded")
"""


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaders")
    (folder / "tiny_loaders.py").write_text(_LOADERS)
    (folder / "weights").write_bytes(bytes(50 << 20))
    return folder


def test_own_memory_and_mapped_files_are_told_apart(loaders, monkeypatch):
    path = os.pathsep.join([str(loaders), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    monkeypatch.setenv("PYTHONPATH", path)
    costs = {
        name: load_cost(f"tiny_loaders:{name}", str(loaders / "weights"), threads=1, prompt_tokens=4, new_tokens=2)
        for name in ("mapped", "twice")
    }
    mega = 1 << 20
    assert 50 * mega <= costs["twice"].loaded.own < 75 * mega, "what was freed is not held"
    assert costs["twice"].loaded.mapped < 20 * mega
    assert costs["mapped"].loaded.own < 25 * mega
    assert 50 * mega <= costs["mapped"].loaded.mapped < 75 * mega
    assert costs["twice"].loaded.peak >= 130 * mega, "what was freed was there"
    assert costs["twice"].loaded.peak_own >= 100 * mega
    assert costs["twice"].running.peak < 110 * mega, "each phase has its own peak"
    with pytest.raises(EvalError, match="nothing can be loaded"):
        load_cost("tiny_loaders:broken", "any", threads=1)
