"""Greedy decoding, compiled and not, against transformers' own."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_evals import attention
from quantlab_evals.decoder import GreedyDecoder
from quantlab_evals.errors import EvalError
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM


def prompts(batch, tokens, seed=0):
    return torch.randint(64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generated(model, prompt, new):
    asked = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)


def gpt2():
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.4)
    return GPT2LMHeadModel(config).eval()


def sliding():
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=64,
        num_key_value_heads=2,
        sliding_window=6,
        initializer_range=0.4,
        max_position_embeddings=32,
        **sizes,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_generate(make_model, batch):
    model, prompt = make_model(), prompts(batch, 5)
    decoder = GreedyDecoder(model, 17, batch=batch, compiled=False)
    expected = generated(model, prompt, 12)
    assert torch.equal(decoder.generate(prompt, 12), expected)
    assert len(expected.unique()) > 4, "a model that says the same word for ever shows nothing"
    assert decoder.step(expected[:, -1:]).shape == (batch, 1), "no step more than asked for was taken: there is room"
    # A second prompt does not see the first.
    other = prompts(batch, 9, seed=1)
    assert torch.equal(decoder.generate(other, 4), generated(model, other, 4))


@pytest.mark.parametrize("make", [gpt2, sliding])
def test_other_models(make):
    model, prompt = make(), prompts(2, 4)
    assert torch.equal(
        GreedyDecoder(model, 24, batch=2, compiled=False).generate(prompt, 16), generated(model, prompt, 16)
    )


def test_compiled_decoders_of_two_models_say_what_their_own_model_says(make_model):
    """They are compiled without guards: neither may run the other's code."""
    models = [make_model(seed=0), make_model(seed=1)]
    decoders = [GreedyDecoder(model, 20, cpp_wrapper=False) for model in models]
    prompt = prompts(1, 5)
    expected = [generated(model, prompt, 12) for model in models]
    assert not torch.equal(*expected)
    for _ in range(2):
        for decoder, tokens in zip(decoders, expected, strict=True):
            assert torch.equal(decoder.generate(prompt, 12), tokens)
    assert decoders[0].build_seconds > 0
    assert models[0].config._attn_implementation == "sdpa", "the model is left as it was"


def through_dynamo(decoder, prompt) -> bool:
    """Whether a later step is looked up by torch's compiler, which takes as long as many layers of a small model."""
    token = decoder.generate(prompt, 3)[:, -1:]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        decoder.step(token)
    return any("Torch-Compiled Region" in event.key for event in profile.key_averages())


def test_later_steps_are_called_without_the_compiler_in_between(make_model):
    decoder = GreedyDecoder(make_model(), 20, cpp_wrapper=False)
    assert not through_dynamo(decoder, prompts(1, 5))
    assert through_dynamo(GreedyDecoder(sliding(), 24, cpp_wrapper=False), prompts(1, 4)), "its windows need guards"


def test_compiled_on_a_sliding_window():
    """Its length is counted in Python, so guards have to see it."""
    model, prompt = sliding(), prompts(1, 4)
    decoder = GreedyDecoder(model, 24, cpp_wrapper=False)
    assert torch.equal(decoder.generate(prompt, 12), generated(model, prompt, 12))


def test_what_cannot_be_decoded_is_refused(make_model):
    model = make_model()
    for wrong in ({"max_length": 1}, {"max_length": 8, "batch": 0}, {"max_length": 33}, {"max_length": 2.5}):
        with pytest.raises(EvalError, match=next(reversed(wrong))):
            GreedyDecoder(model, **wrong)
    decoder = GreedyDecoder(model, 8, compiled=False)
    with pytest.raises(EvalError, match="prefill first"):
        decoder.step(torch.zeros(1, 1, dtype=torch.long))
    for bad in (prompts(2, 4), prompts(1, 8), prompts(1, 4)[0]):
        with pytest.raises(EvalError, match="prompt of shape"):
            decoder.prefill(bad)
    with pytest.raises(EvalError, match="room for 1 to 5"):
        decoder.generate(prompts(1, 4), 6)
    assert decoder.generate(prompts(1, 4), 5).shape == (1, 9)
    with pytest.raises(EvalError, match="is full"):
        decoder.step(torch.zeros(1, 1, dtype=torch.long))


def test_a_model_whose_cache_grows_is_refused():
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval()
    model._can_compile_fullgraph = False
    with pytest.raises(EvalError, match="fixed length"):
        GreedyDecoder(model, 8)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 9),
    length=st.integers(1, 12),
    masked=st.sampled_from(["none", "boolean", "added"]),
    scaling=st.sampled_from([None, 0.3]),
    loops=st.sampled_from([0, 1024]),
    seed=st.integers(0, 9),
)
def test_one_query_is_softmax_attention(batch, shared, groups, width, length, masked, scaling, loops, seed):
    """Against attention written out in float64, a head at a time."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    query, key = draw(batch, shared * groups, 1, width), draw(batch, shared, length, width)
    value = draw(batch, shared, length, width + 1)
    seen = torch.rand(batch, length, generator=generator) < 0.6
    seen[:, 0] = True
    mask = None
    if masked != "none":
        mask = seen if masked == "boolean" else torch.zeros(batch, length).masked_fill(~seen, -1e30)
        mask = mask.view(batch, 1, 1, length)
    with patch.object(attention, "_LONG", loops):
        found, _ = attention.one_query_attention(torch.nn.Module(), query, key, value, mask, scaling=scaling)
    assert found.shape == (batch, 1, shared * groups, width + 1)
    for b in range(batch):
        for head in range(shared * groups):
            scores = key[b, head // groups].double() @ query[b, head, 0].double() * (scaling or width**-0.5)
            if mask is not None:
                scores[~seen[b]] = float("-inf")
            torch.testing.assert_close(
                found[b, 0, head].double(), scores.softmax(0) @ value[b, head // groups].double(), atol=1e-5, rtol=1e-5
            )
