"""Memory that is read into again: never while anyone still looks at it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.checkpoint.buffers import Buffers
from quantlab.checkpoint.source import open_source

LARGE = 1 << 20


def test_what_nobody_uses_is_used_again():
    buffers = Buffers()
    address = buffers.take(LARGE).data_ptr()
    assert buffers.take(LARGE).data_ptr() == address


@pytest.mark.parametrize(
    "hold",
    [
        lambda data: data,
        lambda data: data.view(torch.bfloat16).view(2, -1),
        lambda data: torch.nn.Parameter(data.view(torch.float32), requires_grad=False),
        lambda data: data[-1:],
        lambda data: data.untyped_storage(),
        lambda data: data.numpy(),
    ],
    ids=["itself", "view", "parameter", "last", "storage", "numpy"],
)
def test_what_shares_the_memory_keeps_it(hold):
    buffers = Buffers()
    data = buffers.take(LARGE)
    address, held = data.data_ptr(), hold(data)
    del data
    other = buffers.take(LARGE)
    assert other.data_ptr() != address
    del held
    assert buffers.take(LARGE).data_ptr() == address


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_no_two_in_use_overlap_and_unused_sizes_make_room(steps):
    buffers, held = Buffers(), {}
    for slot, size in steps:
        held.pop(slot, None)
        held[slot] = buffers.take(LARGE + size)
        held[slot].fill_(slot)
        assert all(bool((data == owner).all()) for owner, data in held.items())
        assert len(buffers._buffers) <= len(held) + 3  # of each other size at most what was in use at once


def test_a_block_is_read_into_the_last_ones_memory(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    original = LlamaForCausalLM(config)
    original.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    model = source.skeleton()

    def up(block: int) -> torch.Tensor:
        return model.model.layers[block].mlp.up_proj.weight

    with source.memory_reused():
        source.load(model, "model.layers.0")
        addresses = {parameter.data_ptr() for parameter in model.model.layers[0].parameters()}
        source.unload(model, "model.layers.0")
        source.load(model, "model.layers.1")
        assert up(1).data_ptr() in addresses
        source.load(model, "model.layers.0")  # both at once: in memory of its own
        for block in (0, 1):
            assert torch.equal(up(block), original.model.layers[block].mlp.up_proj.weight)
