"""Several processes make what one makes: to the byte where nothing is summed in another order, else as close."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import W4_GPTQ
from safetensors.torch import load_file
from test_resume import assert_same

from quantlab.checkpoint.load import load
from quantlab.engine.distributed import ALONE

RTN = {**W4_GPTQ, "quantizer": "rtn"}
CASES = {
    "rtn": ("llama", {**RTN, "scale_search": "mse"}),
    "rtn-observed": ("llama", {**RTN, "scale_search": "second-moment"}),
    "rtn-experts": ("mixtral", {**RTN, "scale_search": "second-moment"}),
    "gptq": ("llama", {**W4_GPTQ, "layers": {"lm_head": {"format": "int8"}}}),
    "gptq-asym": ("llama", {**W4_GPTQ, "options": {"asym": 1.0}}),
    "gptq-experts": ("mixtral", W4_GPTQ),
    "awq": ("llama", {**W4_GPTQ, "transforms": "awq"}),
}

# Quantizes one model after the other. The rank that is to be lost kills itself when it has solved so many layers.
_PROGRAM = """
import json, os, signal, sys
import torch
from quantlab import quantize
from quantlab.engine import loop
from quantlab.errors import QuantlabError

torch.set_num_threads(1)
jobs, lost, layers = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
solve, count = loop.solve, 0

def counting(group, *arguments):
    global count
    count += len(group)
    if count >= layers and int(os.environ["RANK"]) == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    return solve(group, *arguments)

loop.solve = counting
tokens = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))
for model, recipe, out in jobs:
    try:
        result = quantize(model, recipe, out, calibration=tokens)
    except QuantlabError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(out, flush=True, file=sys.stderr)
    assert len(result.reports) == len({report.layer for report in result.reports}) > 0
"""


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))


def launched(folder: Path, jobs, processes, *, torchrun=False, lost=-1, layers=0) -> list[tuple[int, str]]:
    """Start processes, as a launcher does; their exit codes and what they said."""
    program = folder / "program.py"
    program.write_text(_PROGRAM)
    arguments = [str(program), json.dumps([(str(m), r, str(o)) for m, r, o in jobs]), str(lost), str(layers)]
    if torchrun:
        options = ["--standalone", "--nproc-per-node", str(processes)]
        commands = [([sys.executable, "-m", "torch.distributed.run", *options, *arguments], {})]
    else:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        commands = [([sys.executable, *arguments], {**world, "RANK": str(rank)}) for rank in range(processes)]
    environment = {**os.environ, "QUANTLAB_TIMEOUT": "120", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**environment, **more}, **pipes) for command, more in commands]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def finish(folder, original, processes, **kwargs) -> Path:
    jobs = [(original(model), recipe, folder / name) for name, (model, recipe) in CASES.items()]
    for code, said in launched(folder, jobs, processes, **kwargs):
        assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def two(original, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("two"), original, 2, torchrun=True)


@pytest.fixture(scope="module")
def four(original, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("four"), original, 4)


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).dequantize().state_dict()


def agree(ours: Path, single: Path) -> None:
    """Nearly all codes are the same, and no weight is off by more than a step."""
    for file in sorted(single.glob("*.safetensors")):
        expected, actual = load_file(file), load_file(ours / file.name)
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            if name.endswith(".codes"):
                assert (actual[name] == tensor).float().mean() > 0.98, name
            else:
                torch.testing.assert_close(actual[name], tensor, rtol=2e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("processes", ["two", "four"])
def test_as_one_process(processes, name, original, run, request):
    folder = request.getfixturevalue(processes)
    model, recipe = CASES[name]
    single = run(original(model), recipe).folder
    if name.startswith("rtn"):
        assert_same(folder / name, single)
    else:
        agree(folder / name, single)


def test_a_lost_rank_ends_the_run_and_the_journal_goes_on(original, run, tmp_path):
    model, recipe = CASES["rtn-observed"]
    out = tmp_path / "out"
    ended = launched(tmp_path, [(original(model), recipe, out)], 2, lost=1, layers=10)
    assert ended[1][0] == -9
    code, said = ended[0]
    assert code == 1
    assert "LostRankError: process 0 of 2 lost another one" in said
    assert "it goes on" in said
    assert not out.exists()
    assert (tmp_path / "out.partial" / "model-00001-of-00003.safetensors").is_file()
    for code, said in launched(tmp_path, [(original(model), recipe, out)], 3):
        assert code == 0, said
    assert_same(out, run(original(model), recipe, "single").folder)


def test_more_processes_than_batches_are_refused(original, tmp_path):
    model, recipe = CASES["gptq"]
    for code, said in launched(tmp_path, [(original(model), recipe, tmp_path / "out")], 9):
        assert code == 1
        assert "9 processes and" in said
    assert not (tmp_path / "out.partial").exists()


def test_one_process_is_nothing_special():
    x = torch.arange(3.0)
    ALONE.sum(x)
    assert x.tolist() == [0, 1, 2]
    assert list(ALONE.share(3)) == [0, 1, 2]
    assert ALONE.rows(7) == slice(0, 7)
    assert ALONE.any([True, False]) == [True, False]
    assert ALONE.gather("x") == ["x"]
    assert ALONE.broadcast("x") == ALONE.to_writer("x", 0) == ALONE.agreed(lambda: "x") == "x"
