"""Tiny models in folders: an original, one that is not far from it, and a tokenizer for both."""

from __future__ import annotations

import pytest
import torch
from llama_of_words import VOCABULARY, llama_of_words, write_words


@pytest.fixture(scope="package")
def folders(tmp_path_factory, save_tokenizer):
    """`original` and `variant`, and a text in `text.txt`."""
    root = tmp_path_factory.mktemp("models")
    model = llama_of_words()
    for name, noise in (("original", 0.0), ("variant", 0.3)):
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * weight.std() * torch.randn_like(weight)
        model.save_pretrained(root / name)
        save_tokenizer(root / name, VOCABULARY)
    write_words(root / "text.txt")
    return root
