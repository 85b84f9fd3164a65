from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from pretend_device import NAME, PretendDevice
from quantlab_evals import LoadCost, SpeedSettings, machine
from quantlab_evals.loading import Memory
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlab.engine.quantize import quantize
from quantlab.errors import DataError, PreflightError
from quantlab.evaluation import evaluate
from quantlab.inspection import inspect
from quantlab.sweep import read_sweep, run, sweep, workbench

ROWS = ["original", "int3/32 rtn", "int3/32 gptq", "int4/32 rtn", "int4/32 gptq", "bitsandbytes nf4"]

FIGURES = ("bits", "ppl", "kl", "agreement", "ece", "bytes", "model_bits", "predicted:rtx4090")


def figures(sweep):
    return {r["variant"]: {name: r["measures"].get(name) for name in FIGURES} for r in sweep.records}


def test_every_row_has_its_record(swept, place):
    assert [record["variant"] for record in swept.records] == ROWS
    assert not swept.failed
    found = {record["variant"]: record["measures"] for record in swept.records}
    assert found["original"]["bits"] == 32
    assert "kl" not in found["original"], "it is not compared with itself"
    assert found["int3/32 rtn"]["bits"] == pytest.approx(3.5, abs=0.1)
    assert found["int4/32 rtn"]["kl"] < found["int3/32 rtn"]["kl"]
    assert found["bitsandbytes nf4"]["bits"] > 4.5, "4 bits, a float32 scale for 64 weights, and the table"
    assert found["bitsandbytes nf4"]["bits"] < 5
    assert "predicted:rtx4090" not in found["bitsandbytes nf4"]
    assert found["int4/32 rtn"]["predicted:rtx4090"] > found["original"]["predicted:rtx4090"]
    assert not list((place / "swept" / "variants").iterdir()), "quantized models are not kept"
    lines = [json.loads(line) for line in (place / "swept" / "records.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == len(ROWS)


def test_a_record_says_what_doing_it_by_hand_says(swept, place, space, tmp_path):
    record = next(record for record in swept.records if record["variant"] == "int3/32 gptq")
    quantize(place / "model", record["recipe"], tmp_path / "by-hand")
    found = evaluate(
        tmp_path / "by-hand",
        str(place / "text.txt"),
        against=place / "model",
        length=64,
        windows=8,
        cache=tmp_path / "cache",
        measures=("perplexity", "divergence", "calibration"),
    )
    measures, looked = record["measures"], inspect(tmp_path / "by-hand")
    assert measures["ppl"] == found.perplexity.perplexity
    assert measures["kl"] == found.divergence.kl
    assert measures["agreement"] == 100 * found.divergence.agreement
    assert measures["ece"] == found.calibration.ece[15]
    assert measures["bits"] == looked.bits
    assert measures["bytes"] == looked.bytes_on_disk / 1e6
    assert [layer["error"] for layer in record["layers"]] == [layer.error for layer in looked.layers]
    assert measures["model_bits"] == pytest.approx(8 * looked.bytes_on_disk / looked.weights)


@pytest.mark.usefixtures("in_torch")
def test_on_a_device(place, space, setup, tmp_path, reference_kernel, monkeypatch):
    """Quantized, evaluated and timed there, with the CPU's figures; and it is another sweep than one on the CPU."""
    monkeypatch.setattr(machine, "_STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(workbench, "loading", lambda *_, **__: load_cost_of(0.5, on_device=7_000_000))
    speed = SpeedSettings(prompt_tokens=4, new_tokens=2, rounds=1, compiled=False)
    there = {**space, "baselines": [], "grids": [{**space["grids"][0], "bits": [3], "quantizers": ["gptq"]}]}
    with sdpa_kernel(SDPBackend.MATH):
        on_cpu = sweep(place / "model", there, tmp_path / "on-cpu", setup=setup)
        with PretendDevice() as device:
            found = sweep(place / "model", there, tmp_path / "out", setup=replace(setup, device=NAME, speed=speed))
            assert device.held() == 0
    assert not found.failed
    assert device.work > 64 * 64
    assert device.work_on_cpu == 0
    assert found.about["measurement"]["device"] == "lazy"
    assert "device" not in on_cpu.about["measurement"]
    for record, expected in zip(found.records, on_cpu.records, strict=True):
        assert {record["device"], record["speed"]["device"], record["evaluation"]["settings"]["device"]} == {"lazy"}
        assert record["measures"]["memory"] == 7
        theirs = {name: value for name, value in expected["measures"].items() if name in FIGURES}
        assert {name: record["measures"].get(name) for name in theirs} == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(PreflightError, match=r"other settings .*device"):
        sweep(place / "model", there, tmp_path / "out", setup=replace(setup, speed=speed))


def load_cost_of(seconds, on_device):
    memory = Memory(own=1, mapped=1, peak=1, peak_own=1)
    return LoadCost(seconds, seconds, memory, memory, 1, 4, 2, on_device)


def test_a_device_that_is_not_there(place, space, setup, tmp_path):
    with pytest.raises(PreflightError, match="device 'cuda:99' cannot be used here"):
        sweep(place / "model", space, tmp_path / "out", setup=replace(setup, device="cuda:99"))
    assert not list(tmp_path.iterdir())


def test_a_second_call_does_nothing(swept, place, space, setup, monkeypatch):
    monkeypatch.setattr(run, "in_turn", None)
    again = sweep(place / "model", space, place / "swept", setup=setup)
    assert again.records == swept.records
    assert read_sweep(place / "swept").records == swept.records


SCRIPT = """
    import json, sys
    from quantlab.sweep import Setup, sweep
    model, space, out, text = sys.argv[1:]
    settings = {"length": 64, "windows": 8, "measures": ("perplexity", "divergence", "calibration")}
    class Watcher:
        def begin(self, names, known): print("known", known, flush=True)
        def working(self, name, doing): print(name, doing, flush=True)
        def ended(self, record): print("ended", record["variant"], flush=True)
    sweep(model, json.loads(space), out, watcher=Watcher(),
          setup=Setup(text=text, settings=settings, devices=("rtx4090",)))
"""


def test_killed_in_the_middle_of_a_variant_it_goes_on(swept, place, space, setup, tmp_path):
    arguments = [str(place / "model"), json.dumps(space), str(tmp_path / "out"), str(place / "text.txt")]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "int3/32 gptq quantize, block 2 of 2":  # block 1 is on disk
                break
        os.kill(process.pid, signal.SIGKILL)
    records = (tmp_path / "out" / "records.jsonl").read_text()
    assert len(records.splitlines()) == 2
    told = []

    class Watcher(run.Unwatched):
        def begin(self, names, known):
            told.append(known)

        def ended(self, record):
            told.append(record["variant"])

    found = sweep(place / "model", space, tmp_path / "out", setup=setup, watcher=Watcher())
    assert told == [2, *ROWS[2:]]
    assert (tmp_path / "out" / "records.jsonl").read_text().startswith(records)
    assert figures(found) == figures(swept)
    resumed = next(record for record in found.records if record["variant"] == "int3/32 gptq")
    assert resumed["measures"]["quantize_seconds"] is None, "of a run that was interrupted nobody knows the time"


def test_a_failed_variant_is_recorded_and_the_rest_goes_on(place, space, setup, tmp_path, monkeypatch):
    grids = [{"formats": ["int4"], "groups": [32, 48], "quantizers": ["rtn", "gptq"]}]
    true = workbench.quantize

    def broken(model, recipe, folder, **rest):
        if recipe.default.quantizer == "gptq":
            raise RuntimeError("out of memory")
        return true(model, recipe, folder, **rest)

    monkeypatch.setattr(workbench, "quantize", broken)
    some = {**space, "grids": grids, "baselines": []}
    found = sweep(place / "model", some, tmp_path / "out", setup=setup)
    errors = {record["variant"]: record["error"] for record in found.failed}
    assert set(errors) == {"int4/48 rtn", "int4/48 gptq", "int4/32 gptq"}
    assert "64 is not divisible by" in errors["int4/48 rtn"]
    assert errors["int4/32 gptq"] == "out of memory"
    assert [record["variant"] for record in found.measured] == ["original", "int4/32 rtn"]
    monkeypatch.setattr(workbench, "quantize", true)
    again = sweep(place / "model", some, tmp_path / "out", setup=setup)
    assert {record["variant"] for record in again.failed} == {"int4/48 rtn", "int4/48 gptq"}


def test_another_sweep_in_the_same_folder_is_refused(swept, place, space, setup, tmp_path):
    other = {**space, "baselines": []}
    with pytest.raises(PreflightError, match=r"another space \(it differs in bitsandbytes nf4\).*--extend"):
        sweep(place / "model", other, place / "swept", setup=setup)
    shorter = replace(setup, settings={**setup.settings, "windows": 4})
    with pytest.raises(PreflightError, match=r"other settings .windows 8, now 4"):
        sweep(place / "model", space, place / "swept", setup=shorter)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(PreflightError, match="no sweep"):
        sweep(place / "model", space, tmp_path, setup=setup)
    with pytest.raises(DataError, match="holds no sweep"):
        read_sweep(tmp_path)


def test_a_space_can_grow(place, space, setup, tmp_path):
    small = {**space, "grids": [{"formats": ["int4"], "groups": [32]}], "baselines": []}
    first = sweep(place / "model", small, tmp_path / "out", setup=setup)
    large = {**small, "grids": [{"formats": ["int4", "nf4"], "groups": [32]}]}
    grown = sweep(place / "model", large, tmp_path / "out", setup=setup, extend=True)
    assert [record["variant"] for record in grown.records] == ["original", "int4/32 rtn", "nf4/32 rtn"]
    assert grown.records[:2] == first.records


def test_two_cannot_run_in_one_folder(swept, place, space, setup):
    pytest.importorskip("fcntl")
    with (
        run._locked(swept.folder),
        pytest.raises(PreflightError, match="another process runs a sweep there"),
    ):
        sweep(place / "model", space, place / "swept", setup=setup)


def test_models_are_kept_if_asked_for(place, space, setup, tmp_path):
    one = {**space, "grids": [{"formats": ["int4"], "groups": [32]}], "baselines": []}
    found = sweep(place / "model", one, tmp_path / "out", setup=replace(setup, keep=True))
    assert inspect(found.records[1]["folder"]).bits == found.records[1]["measures"]["bits"]


def test_the_original_runs_once_and_calibration_is_drawn_once(place, space, setup, tmp_path, monkeypatch):
    drawn, true = [], workbench.prepare

    def counted(choice, *rest):
        drawn.append(choice)
        return true(choice, *rest)

    monkeypatch.setattr(workbench, "prepare", counted)
    sweep(place / "model", {**space, "baselines": []}, tmp_path / "out", setup=setup)
    assert len(drawn) == 1
    assert len([folder for folder in (tmp_path / "out" / "original").iterdir() if folder.is_dir()]) == 1
