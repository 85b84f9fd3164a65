"""Evaluations on a device: the figures of the CPU, with nothing computed or left in the wrong place."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from pathlib import Path

import pytest
import quantlab_evals.summaries
import torch
from pretend_device import NAME, PretendDevice
from quantlab_evals import sampling_grid
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantlab
from quantlab.engine import device as devices
from quantlab.engine.device import Placement, choose_placement
from quantlab.errors import PreflightError, QuantlabError
from quantlab.evaluation import benchmarks, evaluate, evaluate_code, evaluate_summaries, evaluate_variants, subject
from quantlab.evaluation import generation_sweep as sweep
from quantlab.evaluation.subject import Subject

SETTINGS = {"length": 32, "windows": 6}
ALL = ["perplexity", "divergence", "calibration", "words"]
GRID = sampling_grid([0, 0.9], [0], [1.0], [4])


@pytest.fixture(autouse=True)
def the_same_attention(reference_kernel):
    """On both devices: torch has a kernel of its own for the CPU's, which rounds differently."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def on_device():
    """Call something with the pretended device; all must have been computed there, and nothing be left."""

    def call(work, *arguments, **settings):
        with PretendDevice() as device:
            found = work(*arguments, device=NAME, **settings)
            gc.collect()
            assert device.held() == 0
        assert device.work >= 64 * 64
        assert device.work_on_cpu == 0
        return found

    return call


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory):
    """The names of an original, a variant, and a quantized one; and of a text."""
    out = tmp_path_factory.mktemp("quantized") / "w4"
    recipe = {"format": "int4", "granularity": 16, "quantizer": "rtn", "scale_search": "absmax"}
    quantlab.quantize(folders / "original", recipe, out)
    named = {name: str(folders / name) for name in ("original", "variant")}
    return named | {"w4": str(out), "text": str(folders / "text.txt")}


def assert_same_figures(found, expected):
    """All but times, and what says where it was measured."""
    found, expected = found.to_dict(), expected.to_dict()
    assert found["settings"].pop("device") == "lazy"
    assert expected["settings"].pop("device") == "cpu"
    for record in (found, expected):
        del record["seconds"]
        if record["words"] is not None:
            del record["words"]["settings"]
    assert json.loads(json.dumps(found), parse_float=_rounded) == json.loads(json.dumps(expected), parse_float=_rounded)


def _rounded(text):
    return float(f"{float(text):.5g}")


@pytest.mark.parametrize("model", ["variant", "w4"])
def test_all_measures(model, models, on_device):
    tokenizer = AutoTokenizer.from_pretrained(models["original"], eos_token="<unk>")
    settings = {"against": models["original"], "measures": ALL, "tokenizer": tokenizer, "batch_size": 4, **SETTINGS}
    expected = evaluate(models[model], models["text"], **settings)
    found = on_device(evaluate, models[model], models["text"], **settings)
    assert found.divergence.reference.settings["device"] == "lazy"
    assert found.words.settings["device"] == "lazy"
    assert_same_figures(found, expected)
    assert "* device: lazy" in found.to_markdown()


def test_variants_and_the_record_of_the_original(models, on_device, tmp_path):
    settings = {"against": models["original"], "cache": tmp_path, **SETTINGS}

    def run(names, text, **options):
        return list(evaluate_variants(names, text, **options))

    names = [models["variant"], models["w4"]]
    expected = run(names, models["text"], **settings)
    found = on_device(run, names, models["text"], **settings)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_figures(ours, theirs)
    assert len(list(tmp_path.iterdir())) == 2, "one of each device"


def test_a_model_in_memory_stays_where_it_is(models, on_device):
    expected = evaluate(models["variant"], models["text"], **SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(models["original"])
    model = AutoModelForCausalLM.from_pretrained(models["variant"])
    with PretendDevice():
        with pytest.raises(PreflightError, match="measured where it is, on cpu"):
            evaluate(model, models["text"], tokenizer=tokenizer, device=NAME, **SETTINGS)
        for options in ({}, {"device": NAME}):
            found = evaluate(model.to(NAME), models["text"], tokenizer=tokenizer, **options, **SETTINGS)
            assert found.perplexity.settings["device"] == "lazy"
            assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, rel=1e-5)
        with pytest.raises(PreflightError, match="measured where it is, on lazy"):
            evaluate(model, models["text"], tokenizer=tokenizer, device="cpu", **SETTINGS)


def test_writing(models, on_device, tmp_path):
    names = [models["original"], models["w4"]]
    settings = {"against": models["original"], "text": models["text"], "prompts": 2, "prompt_length": 8}
    expected = sweep(names, GRID, tmp_path, **settings)
    found = on_device(sweep, names, GRID, tmp_path, **settings)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["device"], theirs["device"]) == ("lazy", "cpu")
        for figure in ("tokens", "repetition_4", "distinct_2", "original_agreement"):
            assert ours[figure] == theirs[figure]
        assert ours["original_perplexity"] == pytest.approx(theirs["original_perplexity"], rel=1e-4)
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 2 * len(expected), "none is the other's"


def test_code(models, on_device, tmp_path):
    row = {"task_id": "t", "prompt": "w1 w2 w3", "entry_point": "f", "test": "def check(f):\n    pass\n"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(row))
    settings = {"execute": True, "isolation": "limits", "sampling": GRID[0]}
    expected = evaluate_code(models["w4"], tmp_path / "problems.jsonl", **settings)
    found = on_device(evaluate_code, models["w4"], tmp_path / "problems.jsonl", **settings)
    assert found.completions == expected.completions
    assert found.to_dict()["settings"] == {**expected.settings, "device": "lazy"}


def test_summaries(models, on_device, tmp_path, monkeypatch):
    for module in (quantlab_evals.summaries, benchmarks):  # which may not be installed
        monkeypatch.setattr(module, "rouge_scorer", lambda: lambda *_: dict.fromkeys(quantlab_evals.summaries.KINDS, 1))
    (tmp_path / "news.jsonl").write_text(json.dumps({"document": "w1 w2 w3", "summary": "w1"}))
    settings = {"sampling": GRID[0], "template": "w4 {document} w5"}
    expected = evaluate_summaries(models["w4"], tmp_path / "news.jsonl", **settings)
    found = on_device(evaluate_summaries, models["w4"], tmp_path / "news.jsonl", **settings)
    assert found.texts == expected.texts
    assert found.settings == {**expected.settings, "device": "lazy"}


class TestPlacement:
    def test_one_that_is_not_there(self, models, tmp_path, monkeypatch):
        def never(_):
            raise AssertionError("something was loaded")

        monkeypatch.setattr(Subject, "loaded", never)
        for device in ("cuda:99", "gpu"):
            with pytest.raises(PreflightError, match=f"device '{device}' cannot be used here"):
                evaluate(models["variant"], models["text"], device=device)
            with pytest.raises(PreflightError, match="cannot be used here"):
                next(evaluate_variants([models["variant"]], models["text"], device=device))
            with pytest.raises(PreflightError, match="cannot be used here"):
                sweep([models["variant"]], GRID, tmp_path / "out", text=models["text"], device=device)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("cached", [False, True])
    def test_too_small_a_device(self, cached, models, monkeypatch, tmp_path):
        """Both models have to fit, or the larger one where the original's predictions are on disk."""
        size = (Path(models["variant"]) / "model.safetensors").stat().st_size
        cache = {"cache": tmp_path} if cached else {}
        settings = {"against": models["original"], **cache, **SETTINGS}
        with PretendDevice() as device:
            monkeypatch.setattr(devices, "free_bytes", lambda _: (1 if cached else 2) * size - 1)
            with pytest.raises(PreflightError, match="GB are free on lazy:0; use --device auto"):
                evaluate(models["variant"], models["text"], device=NAME, **settings)
            assert device.peak == device.held() == 0
            monkeypatch.setattr(devices, "free_bytes", lambda _: (1 if cached else 2) * size)
            evaluate(models["variant"], models["text"], device=NAME, **settings)

    def test_full_while_it_runs(self, models, monkeypatch):
        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.nn.functional, "linear", full)
        with pytest.raises(QuantlabError, match=r"no memory left .*--device auto"):
            evaluate(models["variant"], models["text"], device="cpu", **SETTINGS)

    def test_auto(self, monkeypatch):
        if not torch.cuda.is_available():
            assert choose_placement("auto") == Placement(torch.device("cpu"))
        monkeypatch.setattr(devices, "choose_device", lambda _: torch.device(NAME))
        assert choose_placement("auto") == Placement(torch.device(NAME), spread=True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(devices, "free_bytes", lambda device: 10 + device.index)
        rooms = choose_placement("auto").loading["max_memory"]
        assert rooms.pop("cpu") > 10**6
        assert rooms == {0: 10, 1: 11}
        assert choose_placement(NAME).loading == {"device_map": {"": torch.device(NAME)}}

    def test_spread_with_parts_on_disk(self, models, monkeypatch, tmp_path):
        """As accelerate places what a device has no room for: it comes when it is called."""
        expected = evaluate(models["w4"], models["text"], **SETTINGS)
        monkeypatch.setattr(subject, "choose_placement", lambda _: Placement(torch.device("cpu"), spread=True))
        monkeypatch.setattr(devices, "_rooms", lambda: {"cpu": 60_000})
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        found = evaluate(models["w4"], models["text"], device="auto", **SETTINGS)
        assert found.perplexity.settings["device"] == "cpu, disk"
        assert dataclasses.replace(found.perplexity, settings=expected.perplexity.settings) == expected.perplexity
        gc.collect()
        assert not list(tmp_path.iterdir())
