"""Bad input of every kind is refused before any work: one paragraph, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import transformers
from architectures import VOCABULARY, tiny_model
from quantlab_evals import EvalError
from torch import nn

import quantlab
from quantlab.engine import preflight
from quantlab.errors import QuantlabError


@pytest.fixture
def refuses(run, tmp_path):
    """Quantize, expect to be refused, and return what was said."""

    def check(model, changes=None, **kwargs) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises((QuantlabError, EvalError)) as caught:
            run(model, changes, **kwargs)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert after == before
        message = str(caught.value)
        assert message.strip() == message != ""
        assert "\n" not in message
        return message

    return check


@pytest.fixture
def copied(original, tmp_path):
    """A copy of a tiny model's folder, to be damaged."""

    def copy(name="llama"):
        return shutil.copytree(original(name), tmp_path / "copy")

    return copy


class TestTheRecipe:
    def test_a_group_that_does_not_divide_names_layer_value_and_remedy(self, original, refuses):
        message = refuses(original("llama"), {"granularity": 64})
        assert "model.layers.0.mlp.down_proj: in_features 96 is not divisible by group size 64" in message
        assert "1 more" in message
        remedy = re.search(r"--set granularity=(\w+)", message)[1]
        assert remedy == "96"

    def test_the_remedy_works(self, original, refuses, run):
        message = refuses(original("llama"), {"granularity": 64, "layers": {"*.down_proj": {"granularity": 40}}})
        assert "in_features 96 is not divisible by group size 40" in message
        remedy = int(re.search(r"--set granularity=(\w+)", message)[1])
        assert run(original("llama"), {"granularity": 64, "layers": {"*.down_proj": {"granularity": remedy}}})

    @pytest.mark.parametrize(
        ("pattern", "nearest"),
        [
            ("*.dwon_proj", "model.layers.*.mlp.down_proj"),
            ("model.layers.0.self_attn.qproj", "model.layers.0.self_attn.q_proj"),
            ("re:.*mlp.gate", "model.layers.*.mlp.gate_proj"),
            ("lm_haed", "lm_head"),
            ("layers.*.up_proj", "model.layers.*.mlp.up_proj"),
        ],
    )
    def test_a_pattern_that_matches_nothing_names_the_nearest(self, pattern, nearest, original, refuses):
        message = refuses(original("llama"), {"layers": {pattern: {"format": "int8"}}})
        assert f"layers[{pattern!r}] matches no linear layer" in message
        assert nearest in message

    def test_a_pattern_unlike_everything_lists_what_there_is(self, original, refuses):
        message = refuses(original("llama"), {"layers": {"zzz": {"format": "int8"}}})
        assert "model.layers.*.self_attn.q_proj" in message

    @pytest.mark.parametrize("pattern", ["model.embed_tokens", "*embed*"])
    def test_a_pattern_for_an_embedding_that_stays_says_so(self, pattern, original, refuses):
        assert "names an embedding" in refuses(original("gemma3"), {"layers": {pattern: {"format": "int8"}}})

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"quantizer": "gptx"}, ["gptx", "gptq", "rtn"]),
            ({"options": {"dampening": 0.1}}, ["dampening", "damping"]),
            ({"options": {"order": "random"}}, ["random", "activation"]),
            ({"format": "int44"}, ["int44"]),
            ({"granularity": "row"}, ["row", "channel"]),
            ({"granularity": 0}, ["0", "channel"]),
            ({"scale_dtype": "float8"}, ["float8", "bfloat16"]),
            ({"fromat": "int4"}, ["fromat", "format"]),
            ({"layers": {"lm_head": {"quantizer": "nope"}}}, ["nope"]),
            ({"layers": {"lm_head": {"options": {"nope": 1}}}}, ["nope"]),
            ({"layers": {"re:(": {"format": "int8"}}}, ["re:("]),
            ({"layers": ["lm_head"]}, ["layers"]),
            ({"calibration": {"samples": 0}}, ["samples", "0"]),
            ({"calibration": {"sample": 3}}, ["sample"]),
        ],
    )
    def test_what_does_not_exist(self, changes, words, original, refuses):
        message = refuses(original("llama"), changes)
        assert all(word in message for word in words)

    def test_an_unknown_recipe(self, original, tmp_path):
        with pytest.raises(QuantlabError, match="w4-gptq"):
            quantlab.quantize(original("llama"), "w4-gtpq", tmp_path / "out")

    @pytest.mark.parametrize(
        "changes",
        [{"format": "none"}, {"layers": {"*": {"format": "none"}}}, {"layers": {"*proj": {"format": "none"}}}],
    )
    def test_nothing_to_do(self, changes, original, refuses):
        assert "nothing to quantize" in refuses(original("llama"), changes)

    def test_a_bad_override(self, original, refuses):
        assert "key=value" in refuses(original("llama"), overrides=["format"])


class TestTheCalibrationData:
    @pytest.mark.parametrize(
        ("tokens", "words"),
        [
            (torch.full((2, 8), VOCABULARY), [str(VOCABULARY), "vocabulary"]),
            (torch.full((2, 8), -1), ["-1"]),
            (torch.zeros(2, 8), ["float32", "(2, 8)"]),
            (torch.zeros(8, dtype=torch.int64), ["(8,)"]),
            (torch.zeros(0, 8, dtype=torch.int64), ["(0, 8)"]),
            (torch.zeros(2, 65, dtype=torch.int64), ["65", "64"]),
            (np.zeros((2, 8), dtype=np.int64), ["ndarray"]),
            ([[1, 2], [3, 4]], ["list"]),
            ("some text", ["str"]),
        ],
    )
    def test_token_ids_that_cannot_be(self, tokens, words, copied, save_tokenizer, refuses):
        folder = copied()
        save_tokenizer(folder, VOCABULARY)
        message = refuses(folder, calibration=tokens)
        assert all(word in message for word in words)

    def test_too_little_text(self, copied, save_tokenizer, refuses):
        folder = copied()
        save_tokenizer(folder, VOCABULARY)
        message = refuses(folder, {"calibration": {"length": 32, "samples": 2}}, calibration=["w5 w6 w7"])
        assert "3 tokens" in message

    def test_empty_text(self, copied, save_tokenizer, refuses):
        folder = copied()
        save_tokenizer(folder, VOCABULARY)
        assert refuses(folder, {"calibration": {"length": 32}}, calibration=["", " "])
        assert refuses(folder, {"calibration": {"length": 32}}, calibration=[])

    def test_sequences_longer_than_the_models_positions(self, copied, save_tokenizer, refuses):
        folder = copied()
        save_tokenizer(folder, VOCABULARY)
        message = refuses(folder, {"calibration": {"length": 65}}, calibration=["w5 " * 500])
        assert "65" in message
        assert "64" in message

    def test_a_source_that_is_not_there(self, copied, save_tokenizer, refuses):
        folder = copied()
        save_tokenizer(folder, VOCABULARY)
        changes = {"calibration": {"length": 32, "source": "nowhere/text.txt"}}
        assert "nowhere/text.txt" in refuses(folder, changes, calibration=None)

    def test_a_folder_without_tokenizer(self, original, refuses):
        assert "tokenizer" in refuses(original("llama"), calibration=["w5 " * 500])

    def test_a_model_in_memory_without_tokenizer(self, refuses):
        assert "tokenizer" in refuses(tiny_model("llama"), calibration=["w5 " * 500])

    def test_text_is_enough_where_there_is_a_tokenizer(self, copied, save_tokenizer, run):
        folder = copied()
        save_tokenizer(folder, VOCABULARY)
        changes = {"calibration": {"length": 32, "samples": 4}}
        result = run(folder, changes, calibration=["w5 w6 " * 200])
        assert result.calibration["samples"] == 4
        assert {report.tokens for report in result.reports} == {4 * 32}
        assert (result.folder / "tokenizer.json").is_file()


class TestTheModel:
    def test_quantized_already(self, quantized, refuses):
        message = refuses(quantized("llama").folder)
        assert "quantized already" in message
        assert "quantized already" in refuses(quantlab.load(quantized("llama").folder))

    def test_no_such_folder(self, tmp_path, refuses):
        assert "does not exist" in refuses(tmp_path / "nothing")

    def test_a_folder_that_is_no_model(self, tmp_path, refuses):
        (tmp_path / "empty").mkdir()
        assert "config.json" in refuses(tmp_path / "empty")

    def test_no_weights(self, copied, refuses):
        folder = copied()
        (folder / "model.safetensors").unlink()
        assert "has no weights" in refuses(folder)

    @pytest.mark.parametrize("keep", [0, 5, 1000, -8])
    def test_weights_cut_short(self, keep, copied, refuses):
        folder = copied()
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        assert "model.safetensors" in refuses(folder)

    def test_a_shard_is_missing(self, tmp_path, refuses):
        folder = tmp_path / "sharded"
        tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
        shard = sorted(folder.glob("model-*.safetensors"))[1]
        shard.unlink()
        assert shard.name in refuses(folder)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "nonesuch"}', "{}"])
    def test_an_unreadable_config(self, text, copied, refuses):
        folder = copied()
        (folder / "config.json").write_text(text)
        assert "config.json" in refuses(folder)

    @pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 3}])
    def test_a_config_of_another_model(self, changes, copied, refuses):
        folder = copied()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        assert "config.json" in refuses(folder)

    def test_no_blocks(self, refuses):
        class Flat(transformers.PreTrainedModel):
            config_class = transformers.LlamaConfig

            def __init__(self, config):
                super().__init__(config)
                self.head = nn.Linear(8, 8)
                self.post_init()

        assert "no list of blocks" in refuses(Flat(transformers.LlamaConfig()))

    def test_a_model_that_wants_more_than_tokens(self, refuses, run):
        config = transformers.ViTConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32
        )
        model = transformers.ViTModel(config).eval()
        message = refuses(model)
        assert "ViTModel cannot be run on calibration tokens alone" in message
        assert "scale_search=mse" in message
        assert len(run(model, {"quantizer": "rtn", "scale_search": "mse"}, calibration=None).reports) == 12


class TestTheMachine:
    def test_not_enough_memory(self, original, refuses, monkeypatch):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        message = refuses(original("llama"))
        assert "GiB of memory" in message
        assert "calibration.samples" in message

    def test_not_enough_disk(self, original, refuses, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "free on that disk" in refuses(original("llama"))

    def test_the_size_that_is_foretold_is_about_right(self, original, run, quantized):
        from quantlab.checkpoint.source import open_source
        from quantlab.engine.architecture import describe
        from quantlab.recipe import load_recipe

        for name in ("llama", "llama-fp16-tied", "mixtral", "gpt2"):
            model = open_source(original(name)).skeleton()
            pair = quantized(name)
            plan = preflight.plan(load_recipe(pair.result.recipe), describe(model), model)
            foretold = preflight.result_size(plan, model)
            stored = sum(
                tensor.nbytes for file in pair.folder.glob("*.safetensors") for tensor in _tensors(file).values()
            )
            assert 0.9 < foretold / stored < 1.1, name


class TestTheOutFolder:
    def test_a_file(self, original, refuses, tmp_path):
        (tmp_path / "out").write_text("mine")
        assert "is a file" in refuses(original("llama"))

    def test_below_a_file(self, original, refuses, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert "file" in refuses(original("llama"), out="file/out")

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("name", ["notes.txt", "recipe.yaml", "config.json"])
    def test_a_folder_of_something_else(self, name, overwrite, original, refuses, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("mine")
        message = refuses(original("llama"), overwrite=overwrite)
        assert "quantlab did not write" in message

    @pytest.mark.parametrize("restart", [False, True])
    def test_something_else_where_the_result_would_grow(self, restart, original, refuses, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "mine.txt").write_text("mine")
        assert "in the way" in refuses(original("llama"), restart=restart)

    def test_a_symbolic_link(self, original, refuses, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
        assert "symbolic link" in refuses(original("llama"))

    def test_the_models_own_folder(self, copied, refuses):
        folder = copied()
        assert "choose another --out" in refuses(folder, out="copy", overwrite=True)

    def test_an_empty_folder_is_fine(self, original, run, tmp_path):
        (tmp_path / "out").mkdir()
        assert run(original("llama")).folder == tmp_path / "out"

    def test_a_result_is_only_replaced_if_one_says_so(self, original, refuses, run):
        first = run(original("llama"))
        weights = {file.name: file.read_bytes() for file in first.folder.iterdir()}
        assert "--overwrite" in refuses(original("llama"), {"format": "int3"})
        assert {file.name: file.read_bytes() for file in first.folder.iterdir()} == weights
        second = run(original("llama"), {"format": "int3"}, overwrite=True)
        assert {report.format for report in second.reports} == {"int3"}

    def test_a_run_that_fails_leaves_an_earlier_result_alone(self, original, refuses, run):
        run(original("llama"))
        refuses(original("llama"), calibration=torch.full((1, 4), VOCABULARY), overwrite=True)


def _tensors(file):
    from safetensors.torch import load_file

    return load_file(file)
