"""A tiny random model and what the command made of it."""

from __future__ import annotations

import pytest
import torch
from processes import QUICK, TEXT, run_process
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantlab.cli import main


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny random model `model`, and a text `text.txt`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXT.splitlines(), vocab_size=384, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def quantized(place):
    """What `quantize --json` said; the result is in `w4`."""
    done = run_process("quantize", "model", "--out", "w4", "--calibration", "text.txt", *QUICK, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def call(place, monkeypatch, capfd):
    """Run a command in this process, in `place`: exit code, standard output, standard error."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return (ended.value.code or 0, *capfd.readouterr())

    return run
