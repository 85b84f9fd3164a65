"""Several processes make what one makes: to the byte where nothing is summed in another order, else as close."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from engine_recipes import W4_GPTQ
from safetensors.torch import load_file
from test_resume import assert_same

import quantlab
from quantlab.engine import loop, quantize
from quantlab.engine.distributed import ALONE, Ranks
from quantlab.engine.journal import LOG
from quantlab.errors import PreflightError

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

# What launchers run: the same as the processes that are forked here.
_PROGRAM = """
import os, sys
assert os.environ["WORLD_SIZE"] == "2"
sys.path[:0] = {path!r}
import test_distributed
test_distributed.work({jobs!r})
"""


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))


def work(jobs) -> None:
    """Quantize one model after the other; what each rank does."""
    torch.set_num_threads(1)
    tokens = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    for model, recipe, out in jobs:
        result = quantlab.quantize(model, recipe, out, calibration=tokens)
        assert len(result.reports) == len({report.layer for report in result.reports}) > 0


def launched(jobs, processes: int, prepare=lambda rank: None) -> list[tuple[int, str]]:
    """Fork processes with the environment that launchers set; their exit statuses and what they said."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.stdout.flush()
    children = []
    for rank in range(processes):
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the child has ended
        child = os.fork()
        if child == 0:
            try:
                os.dup2(said.fileno(), 2)
                os.environ.update({**world, "RANK": str(rank), "QUANTLAB_TIMEOUT": "100"})
                prepare(rank)
                work(jobs)
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(1)
        children.append((child, said))
    ended = []
    for child, said in children:
        status = os.waitpid(child, 0)[1]
        said.seek(0)
        ended.append((os.waitstatus_to_exitcode(status), said.read()))
        said.close()
    return ended


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def together(request, original, tmp_path_factory) -> Path:
    """A folder of all cases, by so many processes."""
    folder = tmp_path_factory.mktemp("together")
    jobs = [(original(model), recipe, folder / name) for name, (model, recipe) in CASES.items()]
    for code, said in launched(jobs, request.param):
        assert code == 0, said
    return folder


def agree(ours: Path, single: Path) -> None:
    """Sums in another order: now and then a weight lies between two codes, and nothing is further off than before.

    One that falls to the other side moves what the layer behind is given, and of an expert with a few dozen tokens that
    moves more: a tensor may differ in some places, the model as a whole hardly.
    """
    same = []
    for file in sorted(single.glob("*.safetensors")):
        expected, actual = load_file(file), load_file(ours / file.name)
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            close = torch.isclose(actual[name].float(), tensor.float(), rtol=1e-2, atol=1e-4).flatten()
            assert close.float().mean() > 0.9, name
            same.append(close)
    assert torch.cat(same).float().mean() > 0.99
    for before, after in zip(errors(single), errors(ours), strict=True):
        assert after == pytest.approx(before, rel=0.05)


def errors(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [record["error"] for record in records if record["kind"] == "layer"]


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(together, name, original, run):
    model, recipe = CASES[name]
    single = run(original(model), recipe).folder
    if name.startswith("rtn"):
        assert_same(together / name, single)
    else:
        agree(together / name, single)


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_as_a_launcher_starts_it(launcher, original, run, tmp_path):
    model, recipe = CASES["rtn-observed"]
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(
        _PROGRAM.format(path=[str(Path(__file__).parent), *sys.path], jobs=[(str(original(model)), recipe, str(out))])
    )
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), str(program)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert_same(out, run(original(model), recipe, "single").folder)


def test_a_lost_rank_ends_the_run_and_the_journal_goes_on(original, run, tmp_path):
    model, recipe = CASES["rtn-observed"]
    jobs, solve, solved = [(original(model), recipe, tmp_path / "out")], loop.solve, []

    def lose_the_second(rank):
        def counting(group, *arguments):
            solved.extend(group)
            if rank == 1 and len(solved) >= 10:  # of the second block
                os.kill(os.getpid(), signal.SIGKILL)
            return solve(group, *arguments)

        loop.solve = counting

    (code, said), (other, _) = launched(jobs, 2, lose_the_second)
    assert (code, other) == (1, -signal.SIGKILL)
    assert "LostRankError: process 0 of 2 lost another one" in said
    assert "it goes on" in said
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "model-00001-of-00003.safetensors").is_file()
    for code, said in launched(jobs, 3):
        assert code == 0, said
    assert_same(tmp_path / "out", run(original(model), recipe, "single").folder)


def test_what_one_rank_refuses_all_refuse(original, tmp_path):
    model, recipe = CASES["rtn"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    for code, said in launched([(original(model), recipe, tmp_path / "out")], 2):
        assert code == 1
        assert "is in the way" in said


def test_more_processes_than_batches_are_refused(original, run, monkeypatch):
    monkeypatch.setattr(quantize, "joined", lambda: nullcontext(Ranks(0, 9)))
    with pytest.raises(PreflightError, match="9 processes and 4 batches"):
        run(original("llama"))


def test_one_process_is_nothing_special():
    x = torch.arange(3.0)
    ALONE.sum(x)
    assert x.tolist() == [0, 1, 2]
    assert list(ALONE.share(3)) == [0, 1, 2]
    assert ALONE.rows(7) == slice(0, 7)
    assert ALONE.any([True, False]) == [True, False]
    assert ALONE.gather("x") == ["x"]
    assert ALONE.broadcast("x") == ALONE.to_writer("x", 0) == ALONE.agreed(lambda: "x") == "x"


@pytest.mark.parametrize(("count", "size"), [(7, 2), (3, 4), (1024, 3)])
def test_every_row_has_one_rank(count, size):
    rows = [row for rank in range(size) for row in range(count)[Ranks(rank, size).rows(count)]]
    assert rows == list(range(count))
