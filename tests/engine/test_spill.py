"""Batches that wait on the disk: the same bytes as in memory, and no more memory than was given."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_resume import assert_same

from quantlab.engine import estimate, loop, spill
from quantlab.engine.spill import DiskMatrix, Spill
from quantlab.errors import CheckpointError, PreflightError

CASES = [
    ("llama", {}),
    ("llama", {"options": {"asym": 1.0}}),
    ("llama", {"transforms": "awq"}),
    ("llama", {"layers": {"lm_head": {"format": "int8", "granularity": "channel"}}}),
    ("gpt2", {}),
    ("mixtral", {"options": {"asym": 1.0}}),
    ("bart", {"quantizer": "rtn", "scale_search": "second-moment"}),
]


@pytest.fixture
def no_room(monkeypatch):
    """A budget of 100 GB leaves nothing for states: all go to the disk. How many bytes went there."""
    moved, pwrite = [], os.pwrite
    monkeypatch.setattr(estimate.Memory, "without_states", 100 * 10**9)
    monkeypatch.setattr(spill.os, "pwrite", lambda fd, data, at: moved.append(pwrite(fd, data, at)) or moved[-1])
    return moved


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_the_same_bytes(name, changes, original, run, no_room):
    in_memory = run(original(name), changes, "in-memory")
    assert not no_room
    on_disk = run(original(name), changes, "on-disk", memory="100GB")
    assert sum(no_room) > 100_000
    assert_same(on_disk.folder, in_memory.folder)


@pytest.mark.parametrize("changes", [{}, {"options": {"asym": 1.0}}, {"compensation": "lorc"}], ids=str)
def test_the_same_bytes_with_statistics_on_disk(changes, original, run, no_room, monkeypatch):
    made = []
    monkeypatch.setattr(loop, "DiskMatrix", lambda *arguments: made.append(DiskMatrix(*arguments)) or made[-1])
    in_memory = run(original("llama"), changes, "in-memory", memory="100GB")
    assert not made
    monkeypatch.setattr(estimate.Memory, "without_states", 100 * 10**9 + 1)
    on_disk = run(original("llama"), changes, "on-disk", memory="100GB")
    assert {matrix.shape for matrix in made} >= {(64, 64), (96, 96)}
    assert_same(on_disk.folder, in_memory.folder)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_a_matrix_on_disk_holds_what_one_in_memory_does(rows, columns, seed, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    matrix, expected = DiskMatrix(folder, (rows, columns)), torch.zeros(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        start, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows + 3))))
        expected[start:stop] += 1
        matrix[start:stop] = expected[start:stop].clone()
        values = torch.randn(expected[start:stop].T.shape, generator=generator).T  # not contiguous
        matrix[start:stop] = expected[start:stop] = values
        assert torch.equal(matrix[:], expected)
    with pytest.raises(ValueError, match="numbers"):
        matrix[:] = torch.zeros(rows, columns + 1)


def test_what_fits_stays(original, run, no_room, monkeypatch):
    monkeypatch.undo()
    moved = []
    monkeypatch.setattr(spill.os, "pwrite", lambda *_: moved.append(1))
    run(original("llama"), memory="100GB")
    assert not moved


def test_too_little_memory_says_what_is_needed(original, run, tmp_path):
    with pytest.raises(PreflightError, match=r"memory 0\.00 GB: this run needs about .* GB"):
        run(original("llama"), memory="1MB")
    with pytest.raises(PreflightError, match="'lots': use a size like 2GB"):
        run(original("llama"), memory="lots")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_so(original, run, no_room, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill.os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run(original("llama"), memory="100GB")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("700mb", 7 * 10**8), (12345, 12345), ("1000", 1000)],
)
def test_sizes(text, expected):
    assert estimate.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 apples", "1e9"])
def test_no_sizes(text):
    with pytest.raises(PreflightError):
        estimate.parse_bytes(text)


def test_nothing_is_left_in_the_folder(tmp_path):
    disk = Spill(tmp_path, 0)
    storage = torch.arange(1000.0).untyped_storage()
    disk._move(os.pwrite, storage, 64)
    storage.fill_(0)
    disk._move(os.preadv, storage, 64)
    assert torch.equal(torch.empty(0).set_(storage), torch.arange(1000.0))
    assert not list(tmp_path.iterdir())
    disk.close()
