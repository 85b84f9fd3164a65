"""What can be rescaled, found by trying it, and folding, which leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from architectures import MODELS, tiny_model
from torch import nn

from quantlab.checkpoint.source import ModuleSource
from quantlab.engine.architecture import describe
from quantlab.engine.forward import Call, Forward, watched
from quantlab.engine.scaling import ScalePair, find_pairs, fold
from quantlab.experts import UnfusedExperts

TOKENS = torch.randint(3, 96, (1, 32), generator=torch.Generator().manual_seed(0))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
# Of the first block: producers, what a norm adds to its weight, consumers, and the share of the producer's channels.
LLAMA = {
    "input_layernorm": (0, QKV, 64),
    "self_attn.v_proj": (0, ("self_attn.o_proj",), 32),
    "post_attention_layernorm": (0, GATED, 64),
    "mlp.up_proj": (0, ("mlp.down_proj",), 96),
}
EXPECTED = {
    "llama": LLAMA,
    "llama-bias": LLAMA,
    "qwen2": LLAMA,
    "gemma2": {
        "input_layernorm": (1, QKV, 64),
        "self_attn.v_proj": (0, ("self_attn.o_proj",), 32),
        "pre_feedforward_layernorm": (1, GATED, 64),
        "mlp.up_proj": (0, ("mlp.down_proj",), 96),
    },
    "olmo2": {  # norms behind the layers: their outputs go to the residual stream
        "self_attn.v_proj": (0, ("self_attn.o_proj",), 32),
        "mlp.up_proj": (0, ("mlp.down_proj",), 96),
    },
    "cohere": {  # attention and MLP side by side
        "input_layernorm": (0, (*QKV, *GATED), 64),
        "self_attn.v_proj": (0, ("self_attn.o_proj",), 32),
        "mlp.up_proj": (0, ("mlp.down_proj",), 96),
    },
    "gpt2": {  # queries, keys and values in one layer; a GELU that nothing passes unchanged
        "ln_1": (0, ("attn.c_attn",), 64),
        "attn.c_attn": (0, ("attn.c_proj",), 64),
        "ln_2": (0, ("mlp.c_fc",), 64),
    },
    "opt": {  # a ReLU, which positive factors pass
        "self_attn_layer_norm": (0, QKV, 64),
        "self_attn.v_proj": (0, ("self_attn.out_proj",), 64),
        "final_layer_norm": (0, ("fc1",), 64),
        "fc1": (0, ("fc2",), 96),
    },
    "bert": {"attention.self.value": (0, ("attention.output.dense",), 64)},
    "mixtral": {
        "input_layernorm": (0, QKV, 64),
        "self_attn.v_proj": (0, ("self_attn.o_proj",), 32),
        "post_attention_layernorm": (0, ("mlp.gate", *(f"mlp.experts.{e}.gate_up_proj" for e in range(4))), 64),
        **{f"mlp.experts.{e}.gate_up_proj": (0, (f"mlp.experts.{e}.down_proj",), 96) for e in range(4)},
    },
}


def in_float32(name):
    """A tiny model with its experts taken apart; pointless gains of exactly one are no help to a wrong fold."""
    source = ModuleSource(tiny_model(name).float())
    model = source.skeleton()
    source.load(model)
    return model


def pairs_of(model):
    """Block by block, as the run finds them: of a block, its name and pairs."""
    blocks, found = describe(model).blocks, {}
    with torch.no_grad(), watched(model, blocks):
        forward = Forward(model, TOKENS, set(blocks))
        forward.advance()
        while not forward.dead:
            if forward.at not in found:
                found[forward.at] = find_pairs(model.get_submodule(forward.at), forward.call)
            forward.advance()
    return found


def output(model, tokens):
    decoder = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **decoder)[0]


def some_scales(pair, seed=0):
    scales = torch.exp2(2 * torch.rand(pair.count, generator=torch.Generator().manual_seed(seed)) - 1)
    return torch.where(torch.bincount(pair.channels, minlength=pair.count) > 0, scales, 1)


@pytest.mark.parametrize("name", MODELS)
def test_folding_leaves_every_architecture_as_it_was(name):
    model = in_float32(name)
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    before = output(model, tokens)
    found = pairs_of(model)
    for block, pairs in found.items():
        consumers = [name for pair in pairs for name in pair.consumers]
        assert len(set(consumers)) == len(consumers), "a layer's input is scaled once"
        for index, pair in enumerate(pairs):
            fold(model.get_submodule(block), pair, some_scales(pair, index))
    after = output(model, tokens)
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert any(found.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_finds_what_can_be_rescaled(name):
    model = in_float32(name)
    pairs = pairs_of(model)[describe(model).blocks[0]]
    found = {pair.producer: (pair.offset, pair.consumers, len(pair.channels.unique())) for pair in pairs}
    assert {key: (o, set(c), n) for key, (o, c, n) in found.items()} == {
        key: (o, set(c), n) for key, (o, c, n) in EXPECTED[name].items()
    }


def test_shared_value_heads_are_known_one_by_one():
    pairs = {pair.producer: pair for pair in pairs_of(in_float32("llama"))["model.layers.0"]}
    heads = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).reshape(-1)  # two heads of queries for each of values
    assert torch.equal(pairs["self_attn.v_proj"].channels, heads)
    fused = {pair.producer: pair for pair in pairs_of(in_float32("gpt-neox"))["gpt_neox.layers.0"]}
    values = torch.arange(192).view(4, 3, 16)[:, 2].reshape(-1)  # queries, keys and values, head by head
    assert torch.equal(fused["attention.query_key_value"].channels, values)


def test_half_a_fold_is_no_fold():
    """The sharpness of the test above: whoever is left out shows."""
    model = in_float32("qwen2-moe")
    before = output(model, TOKENS)
    pair = next(p for p in pairs_of(model)["model.layers.0"] if p.producer == "post_attention_layernorm")
    assert {"mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.up_proj"} < set(pair.consumers)
    less = ScalePair(pair.producer, tuple(c for c in pair.consumers if c != "mlp.gate"), pair.channels, pair.count)
    fold(model.get_submodule("model.layers.0"), less, some_scales(pair))
    assert float((output(model, TOKENS) - before).norm() / before.norm()) > 1e-4


class Block(nn.Module):
    """A norm, read by a layer, and by whatever `aside` makes of it."""

    def __init__(self, aside):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.aside = aside

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y))) + self.aside(y)


@pytest.mark.parametrize(
    ("aside", "found"),
    [
        (lambda y: 0, ["norm", "up"]),
        (lambda y: y, ["up"]),
        (lambda y: 0.01 * y.mean(-1, keepdim=True), ["up"]),
        (lambda y: 0.05 * torch.tanh(y[..., :1]), ["up"]),
    ],
    ids=["nobody", "the residual stream", "a mean", "one channel"],
)
def test_a_reader_that_is_no_layer_is_seen(aside, found):
    with torch.no_grad():
        pairs = find_pairs(Block(aside), Call((torch.randn(1, 32, 16),), {}))
    assert [pair.producer for pair in pairs] == found


def test_trying_it_out_changes_nothing():
    model = in_float32("mixtral")
    block, x = model.model.layers[0], torch.zeros(1, 4, 64)
    rotary = model.model.rotary_emb(x, torch.arange(4)[None])
    call = Call((x,), {"position_embeddings": rotary, "attention_mask": None})
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with torch.no_grad():
        first, second = find_pairs(block, call), find_pairs(block.to("meta"), call)
    assert [pair.producer for pair in first] == [pair.producer for pair in second] != []  # weights are not looked at
    assert float(x.abs().max()) == 0
    assert all(not module._forward_pre_hooks for module in block.modules())
    again = in_float32("mixtral").model.layers[0].state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert any(isinstance(module, UnfusedExperts) for module in block.modules())


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.bfloat16), (1.0, torch.bfloat16), (1.0, torch.float32)])
def test_what_rounding_makes_of_a_norm_is_undone_by_its_consumers(offset, dtype):
    block = nn.Sequential(nn.LayerNorm(64, bias=False), nn.Linear(64, 8)).to(dtype)
    block[0].weight.data.normal_(1 - offset, 0.3)
    block[0].weight.data[3] = -offset  # a gain of zero
    gain, weight = block[0].weight.float() + offset, block[1].weight.clone()
    pair = ScalePair("0", ("1",), torch.arange(64), 64, offset)
    divisors = fold(block, pair, some_scales(pair))
    torch.testing.assert_close((block[0].weight.float() + offset) * divisors, gain, rtol=1e-6, atol=1e-7)
    assert torch.equal(block[1].weight, (weight.float() * divisors).to(dtype))
    assert bool((divisors > 0).all())
