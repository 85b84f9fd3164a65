"""Blocks on a device: the bytes that the CPU makes, with nothing computed or left in the wrong place."""

from __future__ import annotations

import io
import json
import pickle

import pytest
import torch
from architectures import tiny_model
from engine_recipes import W4_GPTQ
from pretend_device import NAME, PretendDevice
from rich.console import Console
from test_resume import at, files, killed
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

import quantlab
from quantlab.cli import show
from quantlab.engine import device as devices
from quantlab.engine import preflight, spill
from quantlab.engine.device import choose_device, computing
from quantlab.engine.distributed import Ranks
from quantlab.engine.journal import LOG
from quantlab.engine.needs import Memory
from quantlab.engine.solve import plan_layer, solve
from quantlab.errors import PreflightError, QuantlabError
from quantlab.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("in_torch")

ASYM = {"options": {"asym": 1.0}}
AWQ = {"transforms": {"awq": {"steps": 4, "tokens": 128}}}
CASES = [
    ("llama", {"quantizer": "rtn", "scale_search": "absmax"}),  # no token runs
    ("llama", {}),
    ("llama", {**ASYM, "layers": {"lm_head": {"format": "int8"}, "model.embed_tokens": {"format": "int8"}}}),
    ("llama", {**AWQ, **ASYM}),
    ("gpt2", AWQ),
    ("llama", {"transforms": "hadamard"}),
    ("gpt2", {"transforms": "hadamard"}),
    ("llama", {"quantizer": "hqq", "symmetric": False, "options": {"iterations": 4}}),
    ("llama", {"options": {"order": "group-aware"}, "scale_search": "second-moment"}),
    ("llama", {"compensation": "lorc", "compensation_options": {"budget": 0.5}}),
    ("llama", {"compensation": "l2qer", "compensation_options": {"preserve": "auto", "rank": 4, "dtype": "int8"}}),
    ("llama", {"compensation": "qera-exact", "scale_dtype": "dynamic8"}),
    ("llama", {"compensation": "statistics"}),
    ("llama", {"compensation": "bias"}),
    ("llama", {"quantizer": "rtn", "format": "codebook4"}),
    ("llama", {"quantizer": "rtn", "format": "power4"}),
    ("llama", {"format": "e2m1", "granularity": 32, "scale_dtype": "e8m0"}),
    ("llama", {"format": "int8", "granularity": "channel", "activations": "int8"}),
    ("mixtral", {}),
    ("deepseek-v3", {**AWQ, "quantizer": "rtn"}),
    ("bart", {}),
]


@pytest.fixture(autouse=True)
def the_same_attention():
    """On both devices: torch has a kernel of its own for the CPU's, which rounds differently."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def on_device(run):
    """Quantize on the pretended device; the result and the device."""

    def quantize(*arguments, **kwargs):
        with PretendDevice() as device:
            result = run(*arguments, device=NAME, **kwargs)
            assert device.held() == 0
        return result, device

    return quantize


def assert_same_but_for_the_device(folder, expected):
    actual, expected = files(folder), files(expected)
    header, *lines = actual.pop(LOG).splitlines()
    header_expected, *lines_expected = expected.pop(LOG).splitlines()
    assert json.loads(header) == {**json.loads(header_expected), "device": "lazy"}
    assert lines == lines_expected
    assert [name for name, data in expected.items() if actual[name] != data] == []
    assert actual.keys() == expected.keys()


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_the_same_bytes(name, changes, original, run, on_device):
    expected = run(original(name), changes, "cpu")
    result, device = on_device(original(name), changes)
    assert device.work_on_cpu == 0
    assert device.work > 5000 or not expected.calibration
    assert_same_but_for_the_device(result.folder, expected.folder)


def test_a_model_in_memory(original, run, on_device):
    model = quantlab.load(original("llama"))
    expected = run(model, None, "cpu")
    result, _ = on_device(model)
    assert_same_but_for_the_device(result.folder, expected.folder)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_bfloat16_is_summed_in_float32(original, run, on_device):
    """The CPU multiplies bfloat16 as it is where it can: there the numbers are close, and not the same."""
    expected = run(original("llama-bf16"), None, "cpu")
    result, _ = on_device(original("llama-bf16"))
    for ours, theirs in zip(result.reports, expected.reports, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=0.05)


def test_one_block_at_a_time(run):
    """Three times as many blocks take no more of the device."""
    peaks = []
    for blocks in (2, 6):
        config = tiny_model("llama").config
        config.num_hidden_layers = blocks
        with PretendDevice() as device:
            run(LlamaForCausalLM(config).eval(), {"quantizer": "rtn"}, f"{blocks}", device=NAME)
        peaks.append(device.peak)
    assert 50_000 < peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", {**AWQ, **ASYM}), ("mixtral", {"compensation": "bias"})], ids=str
)
def test_killed_and_started_again(name, changes, original, run, on_device, tokens, tmp_path):
    expected = run(original(name), changes, "cpu")
    with PretendDevice():
        killed(original(name), tmp_path / "out", at("block", 3), tokens, changes, device=NAME)
    with pytest.raises(PreflightError, match="differs in device"):
        run(original(name), changes)
    result, _ = on_device(original(name), changes)
    assert result.resumed_blocks == 1
    assert_same_but_for_the_device(result.folder, expected.folder)


class TestStates:
    """What suspended batches hold goes from the device to memory, and from there to the disk."""

    @pytest.fixture
    def written(self, monkeypatch):
        moved, pwrite = [], spill.os.pwrite
        monkeypatch.setattr(spill.os, "pwrite", lambda fd, data, at: moved.append(pwrite(fd, data, at)) or moved[-1])
        return moved

    @pytest.fixture
    def room(self, monkeypatch):
        """Set how many bytes of states the device has room for, of which nobody knows by default."""
        parted = Memory.parted

        def give(size):
            monkeypatch.setattr(Memory, "parted", lambda self, _: parted(self, self.own - self.states + 2 * size))

        return give

    @pytest.mark.parametrize(("name", "changes"), [("llama", ASYM), ("mixtral", {}), ("opt", {})], ids=str)
    def test_the_same_bytes_wherever_they_wait(self, name, changes, original, run, on_device, room, written):
        expected = run(original(name), changes, "cpu")
        in_memory, device = on_device(original(name), changes, "in-memory")
        assert_same_but_for_the_device(in_memory.folder, expected.folder)
        least = device.peak
        room(50_000)
        some, device = on_device(original(name), changes, "some")
        assert_same_but_for_the_device(some.folder, expected.folder)
        room(10**9)
        all_there, device = on_device(original(name), changes, "all")
        assert_same_but_for_the_device(all_there.folder, expected.folder)
        assert device.peak > least + 50_000
        assert not written

    def test_on_disk(self, original, run, on_device, written, monkeypatch):
        expected = run(original("llama"), None, "cpu")
        monkeypatch.setattr(Memory, "without_states", 100 * 10**9)
        result, _ = on_device(original("llama"), memory="100GB")
        assert sum(written) > 100_000
        assert_same_but_for_the_device(result.folder, expected.folder)


class TestEstimate:
    def test_what_lies_where(self, original, tokens, tmp_path):
        arguments = original("llama"), W4_GPTQ, tmp_path / "out"
        here = quantlab.dry_run(*arguments, calibration=tokens)
        with PretendDevice() as device:
            there = quantlab.dry_run(*arguments, calibration=tokens, device=NAME)
            assert device.work_on_cpu == device.held() == 0
        assert (here.on_device, here.device) == (None, "cpu")
        assert there.on_device is not None
        assert there.device == NAME
        assert there.on_device.own == here.memory.own - here.memory.states
        assert (there.memory.states, there.memory.solving) == (here.memory.states, 0)
        assert there.seconds > 0
        assert there.to_dict()["on_device"]["total"] == there.on_device.own
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(*show.estimated(there, "llama", "w4"))
        assert f"on {NAME}" in console.export_text()

    def test_batches_stay_on_the_device_where_they_have_room(self):
        needed = Memory(libraries=500, weights=400, states=1000, statistics=200, solving=100)
        for room, states in ((700, 0), (1000, 150), (5000, 1000)):
            needs = needed.parted(room)
            assert needs.device is not None
            assert needs.device.total == 700 + states
            assert needs.memory.total == 500 + 400 + 1000 - states
            assert needs.states == 1000
        with pytest.raises(PreflightError, match="on the device"):
            needed.parted(699)

    def test_memory_that_torch_keeps_is_free(self, monkeypatch):
        for name, answer in (("mem_get_info", (300, 1000)), ("memory_reserved", 500), ("memory_allocated", 200)):
            monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
        assert devices.free_bytes(torch.device("cuda")) == 540
        assert devices.free_bytes(torch.device("xpu")) is None

    def test_too_small_a_device(self, original, run, monkeypatch, tmp_path):
        monkeypatch.setattr(preflight, "free_bytes", lambda _: 10_000)
        with PretendDevice(), pytest.raises(PreflightError, match="GB are free there"):
            run(original("llama"), device=NAME)
        assert not list(tmp_path.iterdir())


class TestChoice:
    def test_auto(self, monkeypatch):
        assert choose_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(devices.torch, "ones", lambda *_, device, **__: torch.empty(1).fill_(device.type == "cuda"))
        assert choose_device("auto").type == "cuda"

    @pytest.mark.parametrize("name", ["cuda:99", "xpu", "gpu", "meta", "lazy", ""])
    def test_one_that_is_not_there(self, name, original, run, tmp_path):
        with pytest.raises(PreflightError, match=f"device '{name}' cannot be used here"):
            run(original("llama"), device=name)
        assert not list(tmp_path.iterdir())

    def test_each_process_takes_its_own(self, monkeypatch):
        asked = []
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.setattr(devices.torch, "ones", lambda *_, device, **__: asked.append(device) or torch.zeros(()))
        assert choose_device("cuda", 4) == torch.device("cuda:3")
        assert choose_device("cuda:1", 4) == torch.device("cuda:1")
        assert choose_device("cuda") == torch.device("cuda")
        assert choose_device("cpu", 4) == torch.device("cpu")
        with pytest.raises(PreflightError, match="4 processes can share a run on cpu or cuda"):
            choose_device("xpu", 4)


class Posted(Ranks):
    """One of several processes, which hears of itself alone, as it hears of others: by what can be sent."""

    def __init__(self):
        super().__init__(0, 2)

    def rows(self, count):
        return slice(0, count)

    def gather(self, value):
        return [pickle.loads(pickle.dumps(value))]

    def agreed(self, work, owner=0):
        return pickle.loads(pickle.dumps(work()))


@pytest.mark.parametrize("compensation", ["none", "lorc"])
def test_solutions_go_between_processes_over_the_cpu(compensation):
    """Tensors of the double cannot be sent; those of a GPU would arrive on the sender's."""
    recipe = {"format": "int4", "granularity": 16, "quantizer": "rtn", "scale_search": "mse"}
    scheme = load_recipe({**recipe, "compensation": compensation}).default
    layers, weight = [plan_layer("a", "", (32, 64), scheme)], torch.randn(32, 64)
    (expected,) = solve(layers, {"a": weight}, None)
    with PretendDevice():
        (answer,) = solve(layers, {"a": weight.to(NAME)}, None, ranks=Posted())
        with pytest.raises(TypeError):
            pickle.dumps(answer.qtensor)
        assert answer.qtensor.codes.device == torch.device(NAME)
        assert torch.equal(answer.qtensor.to("cpu").dequantize(), expected.qtensor.dequantize())
        assert answer.report.record() == expected.report.record()


def test_products_are_exact_and_then_what_they_were():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with computing():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_full_device_is_said_plainly(original, run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.functional, "linear", full)
    with pytest.raises(QuantlabError, match="no memory left"):
        run(original("llama"))


def test_the_device_is_kept_apart():
    """What the double refuses is what a GPU refuses."""
    with PretendDevice() as device:
        x, y = torch.ones(4, 4, device=NAME), torch.ones(4, 4)
        for refused in (lambda: x + y, lambda: y @ x, lambda: torch.cat([x, y]), lambda: x[[0, 1]].copy_(y).numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                refused()
        with pytest.raises(RuntimeError, match="are on the CPU"):
            x[torch.tensor([0])] = y[:1]
        assert (x + y.to(NAME)).tolist() == (y + y).tolist()
        assert x[[0, 2]][torch.tensor([1])].shape == (1, 4)
        assert float((x * torch.tensor(2.0)).sum()) == 32
        assert device.held() >= x.nbytes
        x @ x
        assert (device.work, device.work_on_cpu) == (16, 0)
        y @ y
        assert device.work_on_cpu == 16
        x.untyped_storage().resize_(0)
        assert device.held() < x.nbytes
