from __future__ import annotations

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MOE_NAMES, NAMES, logits, save_tiny, tiny_model
from transformers import AutoModel, LlamaConfig, LlamaModel, MixtralForCausalLM, PreTrainedTokenizerFast

from quantlab.checkpoint.source import ModuleSource, open_source, parameter_bytes, unload
from quantlab.errors import CheckpointError
from quantlab.experts import UnfusedExperts, unfuse_experts


def reference(name, folder, **options):
    """What transformers itself loads, with the experts taken apart."""
    options = {"dtype": "auto", "experts_implementation": "eager", **options}
    model = type(tiny_model(name)).from_pretrained(folder, **options)
    unfuse_experts(model)
    return model


def assert_same(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
    ours, theirs = dict(model.named_buffers()), dict(expected.named_buffers())
    assert list(ours) == list(theirs)
    for key, buffer in theirs.items():
        assert ours[key].dtype == buffer.dtype, key
        assert torch.equal(ours[key], buffer), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_loads_what_from_pretrained_loads(name, dtype, tmp_path):
    save_tiny(name, tmp_path, dtype)
    source = open_source(tmp_path)
    model = source.skeleton()
    source.load(model)
    assert source.dtype == dtype
    assert not model.training
    assert_same(model, reference(name, tmp_path))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_loads_sharded_and_bin_files(name, tmp_path):
    plain = save_tiny(name, tmp_path / "plain")
    sharded = save_tiny(name, tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    bins = tmp_path / "bin"
    shutil.copytree(plain, bins, ignore=shutil.ignore_patterns("*.safetensors"))
    source = open_source(plain)
    state = {key: source._files.read(key) for key in source._files.stored}
    torch.save(state, bins / "pytorch_model.bin")
    for folder in (sharded, bins):
        source = open_source(folder)
        model = source.skeleton()
        source.load(model)
        assert_same(model, reference(name, plain))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_come_and_go_one_by_one(name, tmp_path):
    save_tiny(name, tmp_path)
    source = open_source(tmp_path)
    model = source.skeleton()
    expected = reference(name, tmp_path).state_dict()
    block = next(prefix for prefix, module in model.named_modules() if prefix.endswith(".1"))
    for _ in range(2):
        source.load(model, block)
        loaded = {key for key, tensor in model.state_dict().items() if not tensor.is_meta}
        assert loaded == {key for key in expected if key.startswith(f"{block}.")}
        assert all(torch.equal(model.state_dict()[key], expected[key]) for key in loaded)
        for parameter in model.get_submodule(block).parameters():
            parameter.zero_()  # what is changed in place does not come back
        source.unload(model, block)
        assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_skeleton_is_empty_tied_and_without_gradients(tmp_path):
    source = open_source(save_tiny("llama-tied", tmp_path))
    model = source.skeleton()
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize("name", ["llama-tied", "bert", "gpt2"])
def test_tied_weights_stay_tied(name, tmp_path):
    source = open_source(save_tiny(name, tmp_path))
    model = source.skeleton()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    source.load(model, lambda key: key.startswith(("lm_head", "cls.")))
    assert not embedding.weight.is_meta
    assert embedding.weight is head.weight
    unload(model, lambda key: "emb" in key or "wte" in key)
    assert head.weight is embedding.weight
    assert head.weight.is_meta
    source.load(model)
    assert embedding.weight is head.weight
    assert torch.equal(logits(model), logits(reference(name, tmp_path)))


def test_ties_that_the_files_contradict_are_not_made(tmp_path):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    source = open_source(tmp_path)
    model = source.skeleton()
    source.load(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_same(model, reference("llama", tmp_path))


@pytest.mark.parametrize("name", MOE_NAMES)
def test_experts_are_taken_apart(name, tmp_path):
    source = open_source(save_tiny(name, tmp_path))
    model = source.skeleton()
    experts = [prefix for prefix, module in model.named_modules() if isinstance(module, UnfusedExperts)]
    assert len(experts) == 2
    source.load(model, f"{experts[0]}.2")
    loaded = [key for key, tensor in model.state_dict().items() if not tensor.is_meta]
    assert loaded
    assert all(key.startswith(f"{experts[0]}.2.") for key in loaded)
    source.load(model)
    torch.testing.assert_close(logits(model), logits(tiny_model(name)))


def test_bare_models_load_from_a_checkpoint_with_a_head(tmp_path):
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    source = open_source(tmp_path)
    model = source.skeleton()
    source.load(model)
    assert isinstance(model, LlamaModel)
    assert_same(model, AutoModel.from_pretrained(tmp_path, dtype="auto"))


def test_without_architectures_a_causal_model_is_meant(tmp_path):
    save_tiny("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"], config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    assert isinstance(source.skeleton(), MixtralForCausalLM)
    assert source.dtype == torch.float32


def test_counts_bytes_without_reading(tmp_path):
    source = open_source(save_tiny("llama-tied", tmp_path, torch.bfloat16))
    model = source.skeleton()
    whole = sum(p.numel() for p in model.parameters()) * 2
    assert parameter_bytes(model) == whole
    assert parameter_bytes(model, "model.layers.0") == 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    source.load(model)
    assert parameter_bytes(model) == whole


def test_fingerprint_follows_the_files(tmp_path):
    save_tiny("llama", tmp_path)
    first = open_source(tmp_path).fingerprint()
    assert open_source(tmp_path).fingerprint() == first
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert open_source(tmp_path).fingerprint() != first
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_tiny("llama", tmp_path, torch.bfloat16)
    assert open_source(tmp_path).fingerprint() != first


class TestRefuses:
    def test_no_folder_of_a_model(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            open_source(tmp_path)

    def test_no_weights(self, tmp_path):
        LlamaConfig().save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="has no weights"):
            open_source(tmp_path)

    def test_unknown_models(self, tmp_path):
        save_tiny("llama", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
        with pytest.raises(CheckpointError, match="nonesuch"):
            open_source(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NonesuchForCausalLM"]}))
        with pytest.raises(CheckpointError, match="NonesuchForCausalLM"):
            open_source(tmp_path)

    def test_quantized_models(self, tmp_path):
        save_tiny("llama", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"quantized already \(quant_method gptq\)"):
            open_source(tmp_path)

    def test_missing_shards(self, tmp_path):
        save_tiny("llama", tmp_path, max_shard_size="50KB")
        (tmp_path / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
        next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
        with pytest.raises(CheckpointError, match="files that are not there: model-00001"):
            open_source(tmp_path)

    def test_files_cut_short(self, tmp_path):
        file = save_tiny("llama", tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="download it again"):
            open_source(tmp_path)
        file.write_bytes(b"<html>")
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            open_source(tmp_path)

    def test_pickles_with_code(self, tmp_path):
        save_tiny("llama", tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save({"model.norm.weight": tmp_path}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="plain tensors"):
            open_source(tmp_path)

    def test_pickles_that_run_something(self, tmp_path):
        save_tiny("llama", tmp_path)
        (tmp_path / "model.safetensors").unlink()
        ran = tmp_path / "ran"

        class Runs:
            def __reduce__(self):
                return (open, (str(ran), "w"))

        for content in ({"model.norm.weight": Runs()}, Runs()):
            torch.save(content, tmp_path / "pytorch_model.bin")
            with pytest.raises(CheckpointError, match="plain tensors"):
                open_source(tmp_path)
            (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
            with pytest.raises(CheckpointError, match="plain tensors"):
                open_source(tmp_path)
        torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="holds a list"):
            open_source(tmp_path)
        assert not ran.exists()

    @pytest.mark.parametrize("elsewhere", ["../other/model.safetensors", "/etc/passwd", "a/../../b.safetensors"])
    def test_an_index_that_leaves_the_folder(self, elsewhere, tmp_path):
        folder = save_tiny("llama", tmp_path / "model", max_shard_size="50KB")
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"]["model.norm.weight"] = elsewhere
        index.write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match="lies outside of its folder"):
            open_source(folder)

    def test_an_index_that_is_wrong(self, tmp_path):
        folder = save_tiny("llama", tmp_path, max_shard_size="50KB")
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        places = data["weight_map"]
        other = next(file for file in places.values() if file != places["model.norm.weight"])
        for wrong in ({**places, "model.norm.weight": other}, {**places, "nothing": other}):
            index.write_text(json.dumps({**data, "weight_map": wrong}))
            with pytest.raises(CheckpointError, match="which it has not"):
                open_source(folder)
        for broken in ("", "[]", '{"weight_map": 3}', '{"weight_map": {"a": null}}'):
            index.write_text(broken)
            with pytest.raises(CheckpointError, match=r"not a readable index|not there"):
                open_source(folder)

    def test_headers_that_lie(self, tmp_path):
        file = save_tiny("llama", tmp_path) / "model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        for change in ({"dtype": "F16"}, {"shape": [63]}, {"shape": [-64]}, {"data_offsets": [-8, 248]}):
            header = json.loads(content[8 : 8 + length])
            header["model.norm.weight"] |= change
            text = json.dumps(header).encode().ljust(length)
            file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
            with pytest.raises(CheckpointError, match=r"model\.norm\.weight is said to be|its header speaks of"):
                open_source(tmp_path)
        file.write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
        with pytest.raises(CheckpointError, match="header is longer than the file"):
            open_source(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn])
    def test_weights_of_a_dtype_that_cannot_be(self, dtype, tmp_path):
        file = save_tiny("llama", tmp_path) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"up_proj\.weight: is stored as {dtype}.*float32"):
            open_source(tmp_path).skeleton()

    def test_code_in_the_folder_is_not_run(self, tmp_path):
        save_tiny("llama", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(CheckpointError):
            open_source(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_missing_weights(self, tmp_path):
        save_tiny("llama", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        with pytest.raises(CheckpointError, match=r"lack 9 of the weights.*model\.layers\.2\."):
            open_source(tmp_path).skeleton()

    @pytest.mark.parametrize(("name", "change"), [("llama", {"vocab_size": 81}), ("mixtral", {"num_local_experts": 5})])
    def test_weights_of_another_shape(self, name, change, tmp_path):
        save_tiny(name, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        source = open_source(tmp_path)
        with pytest.raises(CheckpointError, match="shape"):
            source.load(source.skeleton())

    def test_names_that_it_does_not_have(self, tmp_path):
        source = open_source(save_tiny("llama", tmp_path))
        model = source.skeleton()
        model.model.extra = torch.nn.Linear(2, 2, device="meta")
        with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
            source.load(model)

    def test_folders_without_a_tokenizer(self, tmp_path):
        with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
            open_source(save_tiny("llama", tmp_path)).tokenizer()


def test_loads_the_tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    save_tiny("llama", tmp_path)
    vocabulary = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(tmp_path)
    assert open_source(tmp_path).tokenizer()("b")["input_ids"] == [1]


@pytest.mark.parametrize("name", NAMES)
class TestModuleSource:
    def test_gives_the_model_again(self, name):
        original = tiny_model(name)
        before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
        source = ModuleSource(original)
        model = source.skeleton()
        assert all(p.is_meta for p in model.parameters())
        source.load(model)
        torch.testing.assert_close(logits(model), logits(original))
        unfused = tiny_model(name)
        unfuse_experts(unfused)
        assert_same(model, unfused)
        for parameter in model.parameters():
            parameter.zero_()
        assert list(original.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[key]) for key, tensor in original.state_dict().items())

    def test_ties_and_fingerprints(self, name):
        source = ModuleSource(tiny_model(name))
        model = source.skeleton()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = tiny_model(name).config.tie_word_embeddings
        assert (head.weight is embedding.weight) == tied
        assert source.fingerprint() == ModuleSource(tiny_model(name)).fingerprint()
        other = tiny_model(name)
        next(other.parameters()).data[0] += 1
        assert ModuleSource(other).fingerprint() != source.fingerprint()


def test_a_model_on_the_meta_device_is_no_source(tmp_path):
    model = open_source(save_tiny("llama", tmp_path)).skeleton()
    with pytest.raises(CheckpointError, match="not in memory"):
        ModuleSource(model)


def test_a_model_in_memory_has_no_tokenizer():
    with pytest.raises(CheckpointError, match="no tokenizer"):
        ModuleSource(tiny_model("llama")).tokenizer()
