from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from quantlab.checkpoint import writer as writer_module
from quantlab.checkpoint.writer import INDEX, CheckpointWriter, shard_name
from quantlab.errors import CheckpointError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer.{seed}.scales": torch.randn(3, 4, generator=generator).bfloat16(),
        f"layer.{seed}.codes": torch.randint(0, 255, (5, 3), generator=generator).to(torch.uint8),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_shard_names_are_those_of_hugging_face():
    assert shard_name(1, 31) == "model-00001-of-00031.safetensors"
    assert shard_name(1, 1) == "model.safetensors"


def test_reads_what_it_wrote(tmp_path):
    writer = CheckpointWriter(tmp_path / "deep" / "out")
    assert not writer.has("a.safetensors")
    writer.write("a.safetensors", tensors())
    assert writer.has("a.safetensors")
    assert same(writer.read("a.safetensors"), tensors())
    with safe_open(writer.folder / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_equal_tensors_give_equal_bytes(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.write("a.safetensors", tensors())
    writer.write("b.safetensors", dict(reversed(tensors().items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_views_and_shared_memory_are_written_out(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    views = {"rows": whole[1:3], "columns": whole[:, 1], "turned": whole.T, "all": whole, "same": whole}
    writer = CheckpointWriter(tmp_path)
    writer.write("a.safetensors", views)
    assert same(writer.read("a.safetensors"), views)
    assert (tmp_path / "a.safetensors").stat().st_size < 4 * (12 + 4 + 3 * 24) + 600


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    writer.write("a.safetensors", tensors())
    before = (tmp_path / "a.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(writer_module, "save_file", full)
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(CheckpointError, match="no space left"):
            writer.write(name, tensors(1))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_starting_removes_what_a_killed_run_left_half_written(tmp_path):
    CheckpointWriter(tmp_path).write("a.safetensors", tensors())
    (tmp_path / "b.safetensors.partial").write_bytes(b"half")
    writer = CheckpointWriter(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert not writer.has("b.safetensors")


def test_refuses_unreadable_shards_and_folders(tmp_path):
    writer = CheckpointWriter(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            writer.read(name)
    with pytest.raises(CheckpointError, match="cannot be made a folder"):
        CheckpointWriter(tmp_path / "a.safetensors")


class TestFinish:
    @pytest.fixture
    def writer(self, tmp_path):
        writer = CheckpointWriter(tmp_path / "out")
        for i in range(3):
            writer.write(shard_name(i + 1, 3), tensors(i))
        return writer

    def test_writes_index_config_and_assets(self, writer, tmp_path):
        source = tmp_path / "source"
        (source / "additional_chat_templates").mkdir(parents=True)
        assets = [
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "vocab.txt",
            "merges.txt",
            "LICENSE",
        ]
        assets += ["generation_config.json", "chat_template.jinja", "preprocessor_config.json"]
        assets += ["additional_chat_templates/tool.jinja"]
        others = [
            "README.md",
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "training.bin",
        ]
        for name in assets + others:
            (source / name).write_text(name)
        writer.finish(LlamaConfig(vocab_size=9), {"quant_method": "quantlab"}, source)
        for name in assets:
            assert (writer.folder / name).read_text() == name
        written = {str(file.relative_to(writer.folder)) for file in writer.folder.rglob("*") if file.is_file()}
        assert written == {*assets, INDEX, "config.json", *(shard_name(i + 1, 3) for i in range(3))}
        index = json.loads((writer.folder / INDEX).read_text())
        assert index["weight_map"]["layer.1.codes"] == shard_name(2, 3)
        assert index["metadata"]["total_size"] == 3 * (24 + 15)
        config = json.loads((writer.folder / "config.json").read_text())
        assert config["vocab_size"] == 9
        assert config["model_type"] == "llama"
        assert config["quantization_config"] == {"quant_method": "quantlab"}

    def test_twice_gives_equal_bytes(self, writer):
        def content():
            writer.finish(LlamaConfig(name_or_path="/tmp/somewhere"), {"b": 1, "a": [2]}, None)
            return {file.name: file.read_bytes() for file in writer.folder.iterdir()}

        assert content() == content()
        assert b"somewhere" not in content()["config.json"]

    def test_one_shard_needs_no_index(self, tmp_path):
        writer = CheckpointWriter(tmp_path)
        writer.write("model.safetensors", tensors())
        writer.finish({"model_type": "llama"}, None, None)
        assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
        assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama"}

    def test_refuses_missing_shards(self, writer):
        (writer.folder / shard_name(2, 3)).unlink()
        with pytest.raises(CheckpointError, match=f"missing: {shard_name(2, 3)}"):
            writer.finish({}, None, None)
        assert not (writer.folder / "config.json").exists()

    def test_refuses_the_shards_of_two_models(self, writer):
        writer.write(shard_name(1, 4), tensors(7))
        with pytest.raises(CheckpointError, match="not the shards of one model"):
            writer.finish({}, None, None)

    def test_refuses_an_empty_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="no shards"):
            CheckpointWriter(tmp_path).finish({}, None, None)

    def test_refuses_a_tensor_in_two_shards(self, writer):
        writer.write(shard_name(2, 3), tensors(0))
        with pytest.raises(CheckpointError, match=r"layer\.0\..*remove the folder"):
            writer.finish({}, None, None)
