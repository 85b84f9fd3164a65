"""What verification says of sound folders, and that each kind of damage is seen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

import quantlab
from quantlab.checkpoint.quantized import DIGEST, QuantizedFolder
from quantlab.errors import CheckpointError
from quantlab.export import export
from quantlab.verification import fresh, loader
from quantlab.verification import verify as verify_
from quantlab.verification.digest import Digest
from quantlab.verification.streamed import decoded_logits

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=64),
    "bert": BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "bare": Qwen3Config(**SIZES, head_dim=16),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
RTN = {"quantizer": "rtn", "scale_search": "absmax", "granularity": 32, "format": "int4"}
PROMPTS = torch.arange(48).view(2, 24).tolist()


def folder_of(tmp_path, name="llama", **changes):
    torch.manual_seed(0)
    kind = {"bert": AutoModelForMaskedLM, "bare": AutoModel}.get(name, AutoModelForCausalLM)
    quantlab.quantize(kind.from_config(CONFIGS[name]).to(torch.bfloat16), {**RTN, **changes}, tmp_path / "quantized")
    return tmp_path / "quantized"


def wrong(done):
    return {check.name: check.detail for check in done.checks if check.passed is False}


def change(folder, name, edit):
    """Edit one tensor in the shard that has it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index[name]
    tensors = load_file(shard)
    edit(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_decoding_one_module_at_a_time_is_the_model(name, tmp_path):
    folder = folder_of(tmp_path, name)
    ours = quantlab.load(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = ours(torch.tensor(PROMPTS)).logits
    opened = QuantizedFolder(folder)
    torch.testing.assert_close(decoded_logits(opened, PROMPTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("mixtral", {}),
        ("bert", {}),
        ("bare", {}),
        ("llama", {"format": "nf4", "symmetric": False}),
        ("llama", {"format": "e2m1", "granularity": 16, "scale_dtype": "e4m3"}),
        ("llama", {"format": "power4", "granularity": "channel"}),
        ("llama", {"compensation": "lorc", "compensation_options": {"rank": 2}}),
        ("llama", {"layers": {"lm_head": {"format": "int8"}, "model.embed_tokens": {"format": "int8"}}}),
        ("llama", {"layers": {"*.layers.1.*": {"format": "none"}}}),
        ("llama", {"format": "int8", "granularity": "channel", "activations": "int8"}),
        ("llama", {"format": "e4m3", "granularity": "channel", "activations": "fp8"}),
    ],
)
def test_sound_folders_pass_and_keep_a_digest(name, changes, tmp_path, in_process):
    folder = folder_of(tmp_path, name, **changes)
    done = verify_(folder)
    assert done.passed, done.failure
    assert Digest.stored(folder) is not None
    assert not any(check.passed is None for check in done.checks)
    again = verify_(folder)
    assert again.passed
    assert "predictions are those of the stored digest" in {check.name for check in again.checks}


def test_a_process_of_its_own_answers(tmp_path):
    done = verify_(folder_of(tmp_path))
    assert done.passed, done.failure
    checked = next(check for check in done.checks if check.name == "its predictions are those of the codes")
    far, allowed = map(float, re.findall(r"at most (\S+) apart, (\S+) allowed", checked.detail)[0])
    assert far <= allowed < 2e-3


def test_the_program_says_what_a_folder_has_wrong(tmp_path):
    folder = folder_of(tmp_path)
    digest = Digest.of(PROMPTS, decoded_logits(QuantizedFolder(folder), PROMPTS))
    (folder / "model.safetensors.index.json").write_text("{}")
    answer = loader.answer(folder, "float32", digest)
    assert "error" in answer


class TestDamage:
    def test_scales_that_are_no_numbers(self, tmp_path, in_process):
        folder = folder_of(tmp_path)
        change(folder, "model.layers.1.mlp.up_proj.scales", lambda tensor: tensor[3].fill_(float("nan")))
        found = wrong(verify_(folder))
        assert "model.layers.1.mlp.up_proj" in found["tensors are sound"]
        assert "predictions are numbers" in found

    def test_one_layer_that_changed_after_the_digest(self, tmp_path, in_process):
        folder = folder_of(tmp_path)
        assert verify_(folder).passed
        change(folder, "model.layers.0.self_attn.v_proj.codes", lambda tensor: tensor.bitwise_xor_(1))
        assert "predictions are those of the stored digest" in wrong(verify_(folder))

    def test_layers_that_are_not_what_the_recipe_says(self, tmp_path, in_process):
        folder = folder_of(tmp_path)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["layers"] = {
            "*.k_proj": {"format": "int8"},
            "lm_head": {"format": "int8"},
            "*.o_proj": {"format": "none"},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        detail = wrong(verify_(folder))["layers are what the recipe says"]
        assert "lm_head: the recipe quantizes it, the folder does not" in detail
        assert "and 2 more" in detail

    def test_a_loader_that_decodes_otherwise(self, tmp_path, in_process, monkeypatch):
        folder = folder_of(tmp_path)
        sound = loader.answer

        def off(folder, dtype, digest):
            answer = sound(folder, dtype, digest)
            answer["logprobs"][0][0][3] -= 2e-3
            return answer

        monkeypatch.setattr(loader, "answer", off)
        assert "its predictions are those of the codes" in wrong(verify_(folder))

    def test_a_shard_cut_short(self, tmp_path):
        folder = folder_of(tmp_path)
        shard = sorted(folder.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match="download it again"):
            verify_(folder)

    def test_memory_that_does_not_suffice_is_said(self, tmp_path, monkeypatch):
        folder = folder_of(tmp_path)
        monkeypatch.setattr(loader, "bytes_needed", lambda *_: 10**15)
        done = verify_(folder)
        assert done.passed
        assert "not tried" in done.checks[-1].detail


def test_fused_layers_that_differ_are_told_but_not_wrong(tmp_path, in_process):
    done = verify_(folder_of(tmp_path, layers={"*.k_proj": {"format": "int8"}}))
    assert done.passed
    check = next(check for check in done.checks if check.name == "layers that servers fuse are alike")
    assert check.passed is None
    assert "model.layers.0.self_attn.k_proj/q_proj/v_proj" in check.detail


def test_the_distance_from_the_original_is_told(tmp_path, in_process):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    far = {}
    for bits in (3, 8):
        quantlab.quantize(tmp_path / "original", {**RTN, "format": f"int{bits}"}, tmp_path / f"w{bits}")
        done = verify_(tmp_path / f"w{bits}", tmp_path / "original")
        check = next(check for check in done.checks if check.name == "distance from the original")
        far[bits] = float(check.detail.split()[0])
    assert 0 <= far[8] < far[3] / 20


class TestExported:
    def test_against_its_folder_or_the_digest_beside_it(self, tmp_path, in_process):
        pytest.importorskip("compressed_tensors")
        folder = folder_of(tmp_path)
        export(folder, "compressed-tensors", tmp_path / "ct")
        with pytest.raises(CheckpointError, match="--against DIR"):
            verify_(tmp_path / "ct")
        assert verify_(tmp_path / "ct", folder).passed
        verify_(folder)
        shutil.rmtree(tmp_path / "ct")
        export(folder, "compressed-tensors", tmp_path / "ct")
        assert (tmp_path / "ct" / DIGEST).is_file()
        assert verify_(tmp_path / "ct").passed

    def test_another_models_weights_are_seen(self, tmp_path, in_process):
        pytest.importorskip("compressed_tensors")
        folder = folder_of(tmp_path)
        export(folder, "compressed-tensors", tmp_path / "ct")
        shard = tmp_path / "ct" / "model.safetensors"
        tensors = load_file(shard)
        tensors["model.layers.0.mlp.down_proj.weight_scale"] *= -1
        save_file(tensors, shard, metadata={"format": "pt"})
        assert "its predictions are those of the codes" in wrong(verify_(tmp_path / "ct", folder))

    def test_a_loader_that_is_not_installed_is_said(self, tmp_path):
        folder = folder_of(tmp_path)
        export(folder, "gptq", tmp_path / "gptq")
        done = verify_(tmp_path / "gptq", folder)
        assert done.passed
        assert len(done.checks) in (1, 3)


def test_divergence_is_kl():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 8, generator=g), torch.randn(2, 3, 8, generator=g)
    digest = Digest.of([[1, 2, 3], [4, 5, 6]], p)
    given = q.log_softmax(-1).gather(-1, torch.tensor(digest.tokens)).tolist()
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
    assert abs(digest.divergence(given) - float(expected.sum(-1).mean())) < 1e-4
    assert abs(digest.divergence(digest.logprobs)) < 1e-6
    assert verify_ is quantlab.verify


def test_the_program_imports_nothing_of_quantlab_unasked():
    program = str(Path(fresh.__file__))
    code = (
        "import sys, runpy; sys.argv = ['fresh.py', '/nowhere', 'auto', '0'];"
        f"runpy.run_path({program!r}, run_name='__main__');"
        "print([name for name in sys.modules if name.startswith('quantlab')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps({"prompts": [], "tokens": []}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
