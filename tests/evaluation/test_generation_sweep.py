from __future__ import annotations

import json

import pytest
from quantlab_evals import EvalError, sampling_grid
from transformers import AutoTokenizer

from quantlab.errors import DataError
from quantlab.evaluation import generation, generation_sweep
from quantlab.evaluation.records import Records

GRID = sampling_grid([0, 0.9], [0], [1.0], [6])


@pytest.fixture
def sweep(folders, tmp_path):
    def run(*models, grid=GRID, **settings):
        named = [str(folders / model) if "/" not in model and ":" not in model else model for model in models]
        defaults = {"text": str(folders / "text.txt"), "prompts": 3, "prompt_length": 8}
        return generation_sweep(named, grid, tmp_path / "out", **{**defaults, **settings})

    return run


def test_every_cell_has_its_record(sweep, folders, tmp_path):
    told = []
    cells = sweep("original", "variant", against=str(folders / "original"), progress=lambda *done: told.append(done))
    assert [(cell["model"].rsplit("/", 1)[1], cell["temperature"]) for cell in cells] == [
        ("original", 0),
        ("original", 0.9),
        ("variant", 0),
        ("variant", 0.9),
    ]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for cell in cells:
        assert cell["tokens"] == 18
        assert cell["tokens_per_second"] == pytest.approx(18 / cell["seconds"])
        assert cell["peak_memory"] > 10**7
        assert 0 < cell["distinct_1"] <= cell["distinct_2"] <= 1
    greedy = cells[0]
    assert greedy["original_agreement"] == 1, "the original agrees with its own likeliest tokens"
    assert greedy["original_perplexity"] == pytest.approx(greedy["perplexity"])
    assert cells[2]["original_agreement"] < 1
    assert cells[2]["original_perplexity"] > cells[2]["perplexity"]
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert "answers" not in json.loads(lines[0])


def test_it_goes_on_where_it_was_and_changes_nothing(sweep, folders, tmp_path, monkeypatch):
    first = sweep("original", against=str(folders / "original"))
    file = tmp_path / "out" / "generated.jsonl"
    kept = file.read_text()
    file.write_text(kept[: kept.index("\n") + 20])  # killed while it wrote the second
    again = sweep("original", "variant", against=str(folders / "original"))
    assert again[0] == first[0]
    same = [name for name in first[1] if name not in ("seconds", "tokens_per_second", "peak_memory")]
    assert {name: again[1][name] for name in same} == {name: first[1][name] for name in same}

    def never(*_, **__):
        raise AssertionError("a model was loaded although every cell is there")

    monkeypatch.setattr(generation.Subject, "loaded", never)
    assert sweep("original", "variant", against=str(folders / "original")) == again


def test_a_failed_cell_is_recorded_and_tried_again(sweep, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(generation, "_cell", broken)
        cells = sweep("original")
    assert [cell["error"] for cell in cells] == ["out of memory"] * 2
    assert all("error" not in cell for cell in sweep("original"))


def test_bitsandbytes_takes_part(sweep, folders):
    pytest.importorskip("bitsandbytes")
    original = str(folders / "original")
    cells = sweep(
        original, f"bitsandbytes:nf4:{original}", f"bitsandbytes:int8:{original}", grid=GRID[:1], against=original
    )
    assert all("error" not in cell for cell in cells), cells
    assert cells[1]["weight_bytes"] < cells[2]["weight_bytes"] < cells[0]["weight_bytes"]
    assert cells[2]["original_agreement"] > 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": 0}, "prompts 0"),
        ({"prompts": 10**6}, "1000000 were asked for"),
        ({"prompt_length": 126}, "max_position_embeddings, 128"),
        ({"grid": []}, "a model and a setting"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(sweep, settings, words, tmp_path):
    with pytest.raises((DataError, EvalError), match=words):
        sweep("original", **settings)
    assert not (tmp_path / "out").exists()


def test_records_survive_what_was_half_written(tmp_path):
    records = Records(tmp_path / "r.jsonl")
    records.append("a", {"value": 1})
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('{"key": "b", "val')
    again = Records(tmp_path / "r.jsonl")
    assert again.get("b") is None
    again.append("b", {"error": "no"})
    again.append("c", {"value": 3, "perplexity": float("inf")})
    last = Records(tmp_path / "r.jsonl")
    assert last.get("a") == {"key": "a", "value": 1}
    assert last.get("b") is None
    assert last.get("c") == {"key": "c", "value": 3, "perplexity": None}
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used"):
        Records(tmp_path / "file" / "r.jsonl")


def test_the_prompts_lie_over_the_whole_text(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "original")
    found = generation._prompts(tokenizer, str(folders / "text.txt"), 4, 10)
    stream = tokenizer((folders / "text.txt").read_text())["input_ids"]
    assert found == [stream[start : start + 10] for start in (0, 1000, 2000, 3000)]
