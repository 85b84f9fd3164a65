"""A run that is killed, wherever it is, and started again ends with the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_recipes import W4_GPTQ

import quantlab
from quantlab.checkpoint import writer
from quantlab.engine.journal import LOG, Journal
from quantlab.engine.progress import Silent
from quantlab.errors import CheckpointError, PreflightError

BLOCKS = ["model.layers.0", "model.layers.1", ""]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAt(Silent):
    """Kills its process at an event: `("layer", 3)` is the third layer that is done."""

    def __init__(self, event, count):
        self.event, self.left = event, count

    def _count(self, event):
        if event == self.event:
            self.left -= 1
            if self.left == 0:
                die()

    def start(self, start):
        self._count("start")

    def block(self, name):
        self._count("block")

    def layer(self, report):
        self._count("layer")


def at(event, count):
    return lambda: {"progress": DiesAt(event, count)}


def in_the_middle_of_shard(count):
    def prepare():
        original, calls = writer.save_file, iter(range(1, 100))

        def save_file(tensors, path, metadata):
            original(tensors, path, metadata=metadata)
            if next(calls) == count:
                os.truncate(path, path.stat().st_size // 2)
                die()

        writer.save_file = save_file
        return {}

    return prepare


def around_journal_line(count, written):
    """Dies when `written` (a fraction) of what a block adds to the journal is on disk."""

    def prepare():
        original, calls = Journal._write, iter(range(1, 100))

        def write(self, lines, **kwargs):
            if next(calls) != count:
                return original(self, lines, **kwargs)
            text = "".join(line + "\n" for line in lines)
            with open(self.folder / LOG, "a", encoding="utf-8") as stream:
                stream.write(text[: int(len(text) * written)])
            die()

        Journal._write = write
        return {}

    return prepare


def before_publishing():
    Journal.publish = lambda self: die()
    return {}


def half_published():
    original = os.replace
    os.replace = lambda a, b: die() if Path(a).is_dir() else original(a, b)
    return {}


KILLED = {
    "before the first block": (at("start", 1), []),
    "in the first block": (at("layer", 3), []),
    "while writing the first shard": (in_the_middle_of_shard(1), []),
    "before the first line of a block": (around_journal_line(2, 0.0), []),
    "in the middle of a block's lines": (around_journal_line(2, 0.5), []),
    "one byte before the end of a block's lines": (around_journal_line(2, 0.9999), BLOCKS[:1]),
    "after the first block": (at("block", 3), BLOCKS[:1]),
    "in the last block": (at("layer", 12), BLOCKS[:1]),
    "while writing the second shard": (in_the_middle_of_shard(2), BLOCKS[:1]),
    "in the middle of the second block's lines": (around_journal_line(3, 0.3), BLOCKS[:1]),
    "while writing what is outside the blocks": (in_the_middle_of_shard(3), BLOCKS[:2]),
    "before publishing": (before_publishing, BLOCKS),
    "between removing the old folder and publishing": (half_published, BLOCKS),
}


def killed(model, out, prepare, tokens, changes=None, **kwargs):
    """Run in a process of its own that is killed where `prepare` says."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            quantlab.quantize(model, {**W4_GPTQ, **(changes or {})}, out, calibration=tokens, **prepare(), **kwargs)
        finally:
            os._exit(1)  # it should have died before
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.WIFSIGNALED(status[1]), "the run ended before it could be killed"
    assert time.monotonic() < deadline


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(folder, expected):
    actual = files(folder)
    assert sorted(actual) == sorted(files(expected))
    assert [name for name, data in files(expected).items() if actual[name] != data] == []


@pytest.mark.parametrize("where", KILLED)
def test_killed_and_started_again(where, original, quantized, run, tokens, tmp_path):
    prepare, done = KILLED[where]
    killed(original("llama"), tmp_path / "out", prepare, tokens)
    assert not (tmp_path / "out").exists()
    result = run(original("llama"))
    assert result.resumed_blocks == len(done)
    assert_same(result.folder, quantized("llama").folder)
    assert [report.layer for report in result.reports] == [report.layer for report in quantized("llama").result.reports]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"options": {"asym": 1.0}}),
        ("deepseek-v3", {}),
        ("gpt2-bf16", {"layers": {"lm_head": {"format": "int8"}}}),
        ("bart", {}),
        ("llama-bf16", {"quantizer": "rtn", "scale_search": "absmax"}),
        ("llama-bf16", {"transforms": "awq", "options": {"asym": 1.0}}),
        ("mixtral", {"transforms": "awq", "quantizer": "rtn", "scale_search": "absmax"}),
        ("albert-groups", {"transforms": "awq"}),
    ],
)
def test_killed_twice(name, changes, original, run, tokens, tmp_path):
    expected = run(original(name), changes, "expected")
    killed(original(name), tmp_path / "out", at("block", 3), tokens, changes)
    killed(original(name), tmp_path / "out", in_the_middle_of_shard(1), tokens, changes)
    result = run(original(name), changes)
    assert result.resumed_blocks >= 1
    assert_same(result.folder, expected.folder)


def test_killed_from_outside(original, quantized, run, tmp_path):
    """A process that knows nothing of this, killed as soon as its first shard appears."""
    code = (
        "import sys, torch, quantlab; torch.set_num_threads(1)\n"
        "tokens = torch.load(sys.argv[3])\n"
        f"quantlab.quantize(sys.argv[1], {W4_GPTQ!r}, sys.argv[2], calibration=tokens)"
    )
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randint(3, 96, (8, 32), generator=generator), tmp_path / "tokens.pt")
    command = [sys.executable, "-c", code, original("llama"), tmp_path / "out", tmp_path / "tokens.pt"]
    process = subprocess.Popen([str(part) for part in command])
    shard = tmp_path / "out.partial" / "model-00001-of-00003.safetensors"
    while process.poll() is None and not shard.exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    result = run(original("llama"))
    assert_same(result.folder, quantized("llama").folder)


@pytest.fixture
def interrupted(original, tokens, tmp_path):
    """A run of a tiny Llama that was killed after its first block: the growing folder."""
    killed(original("llama"), tmp_path / "out", at("block", 3), tokens)
    return tmp_path / "out.partial"


@pytest.mark.parametrize(
    ("changes", "kwargs", "differs"),
    [
        ({"format": "int3"}, {}, "recipe"),
        ({}, {"calibration": torch.zeros(2, 8, dtype=torch.int64)}, "calibration"),
    ],
)
def test_another_command_is_refused_and_says_what_differs(
    changes, kwargs, differs, interrupted, original, run, quantized
):
    before = files(interrupted)
    with pytest.raises(PreflightError, match=rf"another command \(it differs in {differs}\).*--restart"):
        run(original("llama"), changes, **kwargs)
    assert files(interrupted) == before
    assert_same(run(original("llama")).folder, quantized("llama").folder)


def test_another_model_is_refused(interrupted, original, run):
    with pytest.raises(PreflightError, match="differs in model"):
        run(original("llama-bias"))


def test_restart_throws_it_away(interrupted, original, quantized, run):
    (interrupted / "model-00001-of-00003.safetensors").write_bytes(b"garbage")
    result = run(original("llama"), restart=True)
    assert result.resumed_blocks == 0
    assert_same(result.folder, quantized("llama").folder)
    other = run(original("llama"), {"format": "int3"}, "other", restart=True)  # nothing to throw away
    assert other.resumed_blocks == 0


@pytest.mark.parametrize("changes", [{"quantizer": "rtn", "scale_search": "mse"}, {}], ids=["rtn", "gptq"])
def test_killed_at_ten_random_moments(changes, original, run, tokens, tmp_path):
    started = time.monotonic()
    expected = run(original("llama"), changes, "undisturbed").folder
    usual, moments = time.monotonic() - started, random.Random(0)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            try:
                quantlab.quantize(original("llama"), {**W4_GPTQ, **changes}, tmp_path / "out", calibration=tokens)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 1.2 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "out").exists():  # this one came to the end: the next begins anew
            assert_same(tmp_path / "out", expected)
            shutil.rmtree(tmp_path / "out")
    assert_same(run(original("llama"), changes).folder, expected)


def test_restart_with_another_recipe(interrupted, original, run):
    result = run(original("llama"), {"format": "int3"}, restart=True)
    assert {report.format for report in result.reports} == {"int3"}
    assert not interrupted.exists()


@pytest.mark.parametrize("damage", ["cut short", "removed", "emptied"])
def test_a_damaged_shard_is_made_again(damage, interrupted, original, quantized, run):
    shard = interrupted / "model-00001-of-00003.safetensors"
    if damage == "removed":
        shard.unlink()
    else:
        os.truncate(shard, 0 if damage == "emptied" else shard.stat().st_size - 3)
    result = run(original("llama"))
    assert result.resumed_blocks == 0
    assert_same(result.folder, quantized("llama").folder)


def test_a_shard_that_is_gone_takes_the_later_blocks_with_it(original, quantized, run, tokens, tmp_path):
    killed(original("llama"), tmp_path / "out", before_publishing, tokens)
    (tmp_path / "out.partial" / "model-00001-of-00003.safetensors").unlink()
    result = run(original("llama"))
    assert result.resumed_blocks == 0
    assert_same(result.folder, quantized("llama").folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[:-1],
        lambda text: text + '{"kind": "lay',
        lambda text: text + "\x00\x00",
        lambda text: text + '{"kind": "layer"',
        lambda text: text + "\n\n",
    ],
    ids=["no newline", "half a line", "zeros", "no brace", "empty lines"],
)
def test_a_broken_end_of_the_journal_is_cut_off(edit, interrupted, original, quantized, run):
    log = interrupted / LOG
    log.write_text(edit(log.read_text()))
    result = run(original("llama"))
    assert result.resumed_blocks == 1
    assert_same(result.folder, quantized("llama").folder)


@pytest.mark.parametrize("text", ["", "\n", '{"kind": "ru', "\xff\x00"])
def test_a_journal_without_its_first_line_is_begun_again(text, interrupted, original, quantized, run):
    (interrupted / LOG).write_text(text, encoding="latin-1")
    result = run(original("llama"))
    assert result.resumed_blocks == 0
    assert_same(result.folder, quantized("llama").folder)


def test_overwriting_keeps_the_old_result_until_the_new_one_is_complete(original, run, tokens, tmp_path):
    first = run(original("llama"), {"format": "int3"})
    before = files(first.folder)
    killed(original("llama"), first.folder, at("layer", 10), tokens, overwrite=True)
    assert files(first.folder) == before
    with pytest.raises(PreflightError, match="--overwrite"):
        run(original("llama"))
    result = run(original("llama"), overwrite=True)
    assert result.resumed_blocks == 1
    assert {report.format for report in result.reports} == {"int4"}


def test_a_full_disk_keeps_what_is_done(original, quantized, run, monkeypatch, tmp_path):
    real, calls = writer.save_file, iter(range(1, 100))

    def save_file(tensors, path, metadata):
        real(tensors, path, metadata=metadata)
        if next(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", save_file)
    with pytest.raises(CheckpointError, match="No space left"):
        run(original("llama"))
    assert not any(file.name.endswith(".partial") for file in (tmp_path / "out.partial").iterdir())
    result = run(original("llama"))
    assert result.resumed_blocks == 1
    assert_same(result.folder, quantized("llama").folder)


def test_interrupted_by_the_keyboard(original, quantized, run, tmp_path):
    class Interrupts(Silent):
        count = 0

        def layer(self, report):
            self.count += 1
            if self.count == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(original("llama"), progress=Interrupts())
    assert_same(run(original("llama")).folder, quantized("llama").folder)
    early = Interrupts()
    early.count = 8
    with pytest.raises(KeyboardInterrupt):
        run(original("llama"), out="early", progress=early)
    assert not (tmp_path / "early.partial").exists()  # there was nothing to keep


def test_the_journal_holds_a_record_a_layer(quantized):
    lines = [json.loads(line) for line in (quantized("llama").folder / LOG).read_text().splitlines()]
    assert lines[0]["kind"] == "run"
    assert [line["block"] for line in lines if line["kind"] == "block"] == BLOCKS
    layers = [line for line in lines if line["kind"] == "layer"]
    assert [line["layer"] for line in layers] == [r.layer for r in quantized("llama").result.reports]
    assert all("seconds" not in line for line in layers)
