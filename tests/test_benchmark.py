"""`quantlab.bench` on tiny models: what is counted, compared and refused."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from pretend_device import NAME, PretendDevice
from quantlab_evals import (
    EvalError,
    Run,
    Speed,
    SpeedComparison,
    SpeedSettings,
    Timing,
    describe_machine,
    machine,
    measure_speed,
)
from quantlab_evals import layers as timed_layers
from quantlab_kernels import force
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import quantlab
from quantlab.benchmark import Bench, bench, loading
from quantlab.cli.show_bench import benched, duration
from quantlab.errors import CheckpointError, QuantlabError
from quantlab.layer_speed import LayerSpeed, kernels

QUICK = SpeedSettings(prompt_tokens=8, new_tokens=3, batches=(1, 2), rounds=2, compiled=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and the same with its layers rounded to four bits."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    overrides = ["granularity=32", "scale_search=absmax"]
    quantlab.quantize(folder / "model", "w4-rtn", folder / "w4", overrides=overrides)
    return folder


@pytest.fixture(scope="module")
def measured(place):
    told = []
    found = bench(
        [place / "w4"], against=place / "model", settings=QUICK, progress=lambda done, total, what: told.append(what)
    )
    return found, told


def test_both_models_are_measured(measured, place):
    found, told = measured
    assert [model.name for model in found.models] == [str(place / "w4"), str(place / "model")]
    assert found.against == str(place / "model")
    assert any(what.startswith("load ") for what in told)
    for model in found.models:
        assert [(run.batch, run.compiled) for run in model.speed.runs] == [(1, False), (2, False)]
        assert model.speed.dtype == "bfloat16"
    assert found.models[0].bytes < found.models[1].bytes
    assert found.ratio(found.against, 1) == 1


def test_layers_are_told_apart_by_name_format_and_shape(measured):
    found, _ = measured
    quantized, original = found.models
    for model in found.models:
        assert [layer.rows for layer in model.layers] == [1] * 8 + [2] * 8
        down = next(layer for layer in model.layers if layer.layer.endswith("down_proj"))
        assert (down.layer, down.shape, down.count) == ("model.layers.*.mlp.down_proj", (64, 96), 2)
        head = next(layer for layer in model.layers if layer.layer == "lm_head")
        assert (head.format, head.count, head.bytes) == ("bfloat16", 1, 2 * 80 * 64)
    down = next(layer for layer in quantized.layers if layer.layer.endswith("down_proj"))
    assert down.format == "int4/32"
    assert down.bytes == 64 * 96 // 2 + 2 * 64 * 3 + 4 * 16, "codes, scales, and the table"
    assert next(layer for layer in original.layers if layer.layer.endswith("down_proj")).format == "bfloat16"


def test_loading_is_measured_apart(measured):
    found, _ = measured
    for model in found.models:
        assert model.loading is not None
        assert 0 < model.loading.seconds < 60
        assert model.loading.running.peak >= model.loading.running.own


def test_the_record(measured):
    found, _ = measured
    record = json.loads(json.dumps(found.to_dict()))
    assert record["settings"]["prompt_tokens"] == 8
    assert record["machine"]["cpu"]
    quantized, original = record["models"]
    assert original["times_faster"] == {"1": {"prefill": 1, "step": 1}, "2": {"prefill": 1, "step": 1}}
    assert quantized["times_faster"]["2"]["step"] == found.ratio(found.models[0].name, 2)
    assert quantized["runs"][0]["decode_tokens_per_second"] > 0
    assert quantized["layers"][0]["seconds"]["median"] > 0
    assert quantized["loading"]["running"]["peak"] > 0


def test_a_ratio_is_of_one_round():
    """Another process doubles one round's seconds: the ratio is still that of the models."""

    def speed(name, seconds):
        wall = tuple(seconds * weather for weather in (1, 2, 1.5))
        return Speed(name, "M", "float32", "sdpa", (Run(1, False, 8, 4, Timing(wall, wall), Timing(wall, wall), 0.0),))

    comparison = SpeedComparison(QUICK, describe_machine(), (speed("new", 0.5), speed("old", 2.0)))
    found = Bench(comparison, (), "old", 1e9, 0.0)
    assert found.ratio("new", 1) == 4
    assert found.ratio("new", 1, "prefill") == 4
    assert Bench(comparison, (), None, 1e9, 0.0).ratio("new", 1) is None


def test_a_share_is_of_the_stream():
    layer = LayerSpeed("l", "int4/64", (4, 4), 1, 1, 1000, Timing((1e-6,) * 3, (1e-6,) * 3), 4e9)
    assert layer.bandwidth == pytest.approx(1e9)
    assert layer.share == pytest.approx(0.25)


def test_what_cannot_be_measured_is_refused(place, tmp_path):
    with pytest.raises(QuantlabError, match="no model"):
        bench([])
    with pytest.raises(QuantlabError, match="twice"):
        bench([place / "w4"], against=place / "w4")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        bench([tmp_path])
    with pytest.raises(EvalError, match="64 positions"):
        bench([place / "model"], settings=SpeedSettings(prompt_tokens=60, new_tokens=10, compiled=False))


def test_on_a_device(place, monkeypatch):
    """Everything is computed there, and what was measured says so."""
    monkeypatch.setattr(machine, "_STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(timed_layers, "_FLUSH_BYTES_ELSEWHERE", 1 << 20)
    with PretendDevice() as device:
        found = bench([place / "w4"], against=place / "model", settings=QUICK, memory=False, device=NAME)
        assert device.held() == 0
        assert {kernel.kernel for kernel in kernels(place / "w4", [1], NAME)} == {"reference (no kernel for lazy)"}
    assert device.work > 64 * 64
    assert device.work_on_cpu == 0
    assert {model.speed.device for model in found.models} == {found.comparison.machine.device} == {"lazy"}
    assert {model["device"] for model in found.to_dict()["models"]} == {"lazy"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*benched(found))
    assert re.search(r"^device +lazy *$", console.export_text(), re.M)
    for model in found.models:
        assert len(model.layers) == 2 * 8
        assert all(layer.timing.median > 0 for layer in model.layers)


def test_a_model_that_is_spread_is_not_compiled(place):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = quantlab.load(place / "w4", device_map=places)
    found = measure_speed({"w4": model}, SpeedSettings(8, 3, rounds=1)).models[0]
    assert [run.compiled for run in found.runs] == [False]
    assert "spread over cpu, disk" in found.not_compiled


def test_a_process_of_its_own_loads_where_it_is_told_to(place, monkeypatch):
    found = bench([place / "w4"], settings=QUICK, layers=False, device="cpu")
    assert found.models[0].loading.on_device is None
    with pytest.raises(EvalError, match="device 'cuda:99' cannot be used here"):
        loading(str(place / "w4"), "cuda:99", threads=1, prompt_tokens=4)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (8.52e-5, "85.2 us"),
        (0.00832, "8.32 ms"),
        (0.125, "125 ms"),
        (2.1, "2.10 s"),
        (0.9999, "1.00 s"),
        (75, "75.0 s"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_kernels_are_those_that_the_dispatcher_names(place):
    found = kernels(place / "w4", [1, 40])
    assert len(found) == 2 * 7
    assert {kernel.format for kernel in found} == {"int4/32"}
    assert [kernel.rows for kernel in found[:2]] == [1, 40]
    with force("reference"):
        assert {kernel.kernel for kernel in kernels(place / "w4", [1])} == {"reference (forced)"}
    with pytest.raises(QuantlabError, match="none of its linear layers"):
        kernels(place / "model")
    with pytest.raises(QuantlabError, match="rows"):
        kernels(place / "w4", [0])


def run(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "quantlab.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_command(place):
    quick = ["--prompt", "8", "--new", "3", "--rounds", "1", "--no-compile", "--no-memory", "--batch", "2"]
    done = run("bench", "w4", "--against", "model", *quick, "--threads", "1", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "2 prompts at once of 8 tokens" in done.stdout
    assert "int4/32" in done.stdout
    assert "of 2: load w4" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "w4", "--batch", "0"], "batches [0]"),
        (["bench", "w4", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["bench", "w4", "--kernels", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["roofline", "model", "--device", "b9000"], "b9000"),
    ],
)
def test_bad_input_ends_with_two(place, arguments, said):
    done = run(*arguments, cwd=place)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_roofline(place):
    arguments = [
        "roofline",
        "model",
        "--recipe",
        "w4-rtn",
        "--set",
        "granularity=32",
        "--device",
        "h100,a100(memory=40)",
    ]
    done = run(*arguments, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["predicted"] is True
    assert len(record["predictions"]) == 4
    shown = run(*arguments, cwd=place)
    assert "predicted, not measured" in shown.stdout
    assert "40 GiB" in shown.stdout
