"""What can be run of ``make gpu-check`` without a GPU: its cases, its arithmetic, its file, its refusal."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from quantlab_kernels.gpu import Answer, gpu_check, gpu_speed
from quantlab_kernels.gpu.subjects import Tensors, subjects
from quantlab_kernels.reference import quantized_linear

from quantlab.numerics import grid

CPU = torch.device("cpu")


def test_it_refuses_in_one_line_without_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "available", lambda: Answer("torch sees no GPU"))
    assert gpu_check.main(["--out", str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr()
    assert said.err == "gpu-check: nothing to check here: torch sees no GPU\n"
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_every_format_is_among_the_subjects():
    found = {subject.name: subject for subject in subjects()}
    assert {f"int{bits}{zeros}" for bits in range(2, 9) for zeros in ("", "-zeros")} <= set(found)
    assert found["e3m2"].table.tolist() == grid("e3m2").values.tolist()
    assert found["e2m3"].table.tolist() == grid("e2m3").values.tolist()
    for subject in found.values():
        assert len(subject.table) <= 1 << subject.bits
        if subject.offset is not None:
            assert subject.table.tolist() == [code + subject.offset for code in range(1 << subject.bits)]


@pytest.mark.parametrize("name", ["int4", "int3-zeros", "e3m2", "nf4", "power6"])
def test_the_float64_weight_is_what_is_stored(name):
    subject = next(s for s in subjects() if s.name == name)
    tensors = Tensors.random(subject, 12, 256, 64, CPU)
    x = torch.randn(3, 256, dtype=torch.float32)
    y = quantized_linear(x, tensors.codes, tensors.scales, tensors.zeros, subject.table, subject.bits)
    torch.testing.assert_close(y.double(), x.double() @ tensors.weight.T, rtol=1e-5, atol=1e-5)


def test_errors_are_shares_of_what_is_allowed(monkeypatch):
    """With the reference in the kernels' place the error is small but there; with a wrong product it is over 1."""
    pytest.importorskip("triton")
    subject = next(s for s in subjects() if s.name == "int4")

    def product(x, weight, wrong=0.0):
        tensors = Tensors.random(subject, 264, weight.columns, weight.columns // weight.scales.shape[1], CPU)
        y = x.double() @ tensors.weight.T
        return (y * (1 + wrong)).to(x.dtype)

    monkeypatch.setattr("quantlab_kernels.gpu.product", product)
    right = gpu_check.errors(subject, torch.bfloat16, CPU, rows=(1, 5))
    assert set(right) == {"1024/128/1", "1024/128/5", "576/64/1", "576/64/5", "100/100/1", "100/100/5"}
    assert 0 < max(right.values()) < 1
    monkeypatch.setattr("quantlab_kernels.gpu.product", lambda x, weight: product(x, weight, wrong=0.1))
    assert max(gpu_check.errors(subject, torch.bfloat16, CPU, rows=(1, 5)).values()) > 1


def test_bytes_and_shares_of_a_roofline():
    subject = next(s for s in subjects() if s.name == "int3")
    read = gpu_speed.traffic(subject, 2, 4096, 4096, 128)
    assert read == 4096 * 1536 + 4096 * 32 * 2 + 2 * 2 * 8192
    # 8 GB in 4 ms at 4 TB/s is half of what memory allows.
    assert gpu_speed.share_of_roofline(4.0, 8_000_000_000, 4e12) == pytest.approx(0.5)


def test_a_cache_is_overflown_by_weights_in_turn():
    device = torch.device("cuda")
    cache = 50 << 20
    properties = type("Properties", (), {"L2_cache_size": cache})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for size in (1 << 20, 8 << 20, 1 << 30):
            count = gpu_speed.copies(size, device)
            assert count >= 2
            assert count * size >= 3 * cache


def test_timings_make_a_record_for_each_product(monkeypatch):
    def broken():
        raise RuntimeError("no such layer")

    pytest.importorskip("triton")
    monkeypatch.setattr("quantlab_kernels.gpu.product", lambda x, weight: x)
    monkeypatch.setattr(gpu_speed, "stream_bandwidth", lambda device, time: 1e12)
    monkeypatch.setattr(gpu_speed, "peers", lambda *_: {"cublas-f16": lambda: lambda x: x, "broken": broken})
    calls = []

    def time(turns):
        calls.extend(turn() for turn in turns)
        return 0.5

    records = list(gpu_speed.timings(CPU, ((64, 256),), (1, 16), time=time, launch=lambda call: 0.1))
    assert records[0] == {"stream_bytes_per_second": 1e12}
    assert {record["format"] for record in records[1:]} >= {"int2", "int3", "int4", "int8", "e3m2", "nf4"}
    assert all(record["milliseconds"] == record["cublas-f16"] == 0.5 for record in records[1:])
    assert all(record["broken"] == "RuntimeError('no such layer')" for record in records[1:])
    assert len(calls) == 2 * 2 * (len(records) - 1)  # two weights each, so that none is in the cache


def test_the_file_is_json_with_figures_that_were_measured(tmp_path):
    path = tmp_path / "gpu.json"
    gpu_check.write(path, {"timings": [{"milliseconds": 0.123456789, "shape": [4096, 4096]}], "name": "x"})
    assert json.loads(path.read_text()) == {"timings": [{"milliseconds": 0.1235, "shape": [4096, 4096]}], "name": "x"}


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemlite", None)
    monkeypatch.setattr(gpu_speed.importlib.util, "find_spec", lambda name: None)
    subject = next(s for s in subjects() if s.name == "nf4")
    assert set(gpu_speed.peers(subject, 8, 128, CPU)) == {"cublas-f16"}


def test_bitsandbytes_multiplies_what_it_was_given():
    pytest.importorskip("bitsandbytes")
    dense = torch.randn(64, 256)
    y = gpu_speed._bitsandbytes(dense)(torch.eye(256))
    assert y.shape == (256, 64)
    assert float((y.T - dense).abs().max()) < 0.7
