from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from quantlab_evals import EvalError, paired_difference, perplexity
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def naive_nll(model, tokens):
    """One loss a window, one token at a time."""
    losses = []
    with torch.no_grad():
        for window in tokens:
            logits = model(window[None]).logits[0].double()
            losses.append([cross_entropy(logits[i - 1], window[i]).item() for i in range(1, len(window))])
    return torch.tensor(losses, dtype=torch.float64)


class Logits(nn.Module):
    """A model that is no transformers model: any function from tokens to logits."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.function(input_ids))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_equals_a_loop_over_cross_entropy(make_model, make_windows, batch_size, chunk):
    model, windows = make_model(), make_windows()
    expected = naive_nll(model, windows.tokens)
    found = perplexity(model, windows, batch_size=batch_size, chunk=chunk)
    assert found.nll == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert found.clusters.means == pytest.approx(expected.mean(1).tolist(), rel=1e-5)
    assert (found.tokens, found.windows) == (5 * 15, 5)
    low, high = found.interval
    assert low < found.perplexity < high


def test_equals_the_loop_where_the_model_caps_its_logits(make_windows):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=2.0,
        final_logit_softcapping=3.0,
    )
    model, windows = Gemma2ForCausalLM(config).eval(), make_windows()
    expected = naive_nll(model, windows.tokens).mean().item()
    assert perplexity(model, windows).nll == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(make_windows):
    for vocabulary in (64, 1000):
        model = Logits(lambda ids, size=vocabulary: torch.full((*ids.shape, size), 0.3, dtype=torch.bfloat16))
        found = perplexity(model, make_windows())
        assert found.perplexity == pytest.approx(vocabulary, rel=1e-6)
        assert found.interval == pytest.approx((vocabulary, vocabulary), rel=1e-6)


def test_first_token_is_context_only(make_windows):
    """A model that knows that the next token is the one before plus one, and nothing of the first."""
    tokens = torch.tensor([[7, 8, 9, 10], [3, 4, 5, 6]])
    windows = replace(make_windows(), tokens=tokens)
    model = Logits(lambda ids: 1000.0 * one_hot(ids + 1, 64))
    assert perplexity(model, windows).perplexity == 1.0


def test_an_impossible_token_is_infinitely_surprising(make_windows):
    windows = make_windows(count=2)

    def one_token_ruled_out(ids):
        logits = torch.zeros(*ids.shape, 64)
        logits[..., windows.tokens[1, 5]] = -torch.inf
        return logits

    found = perplexity(Logits(one_token_ruled_out), windows)
    assert found.perplexity == math.inf
    assert found.interval is None


def test_settings_hold_every_choice_and_one_window_has_no_interval(make_model, make_windows):
    found = perplexity(make_model(), make_windows(count=1), seed=3)
    assert found.interval is None
    assert found.settings["window_length"] == 16
    assert found.settings["bos"] is None
    assert found.settings["joiner"] == "\n\n"
    assert found.settings["predicted_tokens"] == found.tokens == 15
    assert found.settings["dtype"] == "float32"
    assert found.settings["seed"] == 3
    assert "do not overlap" in found.settings["definition"]


def test_model_mode_is_put_back_and_progress_told(make_model, make_windows):
    model = make_model().train()
    told = []
    perplexity(model, make_windows(), batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert model.training
    assert told == [(i, 5) for i in range(1, 6)]


def test_bad_input_is_refused(make_model, make_windows):
    model = make_model()
    with pytest.raises(EvalError, match="33 tokens are longer"):
        perplexity(model, make_windows(length=33))
    with pytest.raises(EvalError, match="own tokenizer"):
        perplexity(model, make_windows(vocabulary=200))
    with pytest.raises(EvalError, match="batch_size is 0"):
        perplexity(model, make_windows(), batch_size=0)
    with pytest.raises(EvalError, match="chunk is 0"):
        perplexity(model, make_windows(), chunk=0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "num_layers": 1}
    bert = BertForMaskedLM(BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, **sizes))
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, **sizes))
    for other in (bert, t5):
        with pytest.raises(EvalError, match="not a causal language model"):
            perplexity(other, make_windows())
    with pytest.raises(EvalError, match="returns no logits"):
        perplexity(Logits(lambda ids: None), make_windows())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_logits_are_named(make_windows, value):
    def broken(ids):
        logits = torch.zeros(*ids.shape, 64)
        logits[:, 6:9, 2] = value
        return logits

    with pytest.raises(EvalError, match=r"window 0: .* at 3 of 15 positions, the first at 6"):
        perplexity(Logits(broken), make_windows(), chunk=4)


def test_paired_difference_is_narrower_than_its_parts(make_model, make_windows):
    model, windows = make_model(), make_windows(count=12)
    before = perplexity(model, windows)
    with torch.no_grad():
        model.lm_head.weight *= 1.01
    after = perplexity(model, windows)
    difference = paired_difference(after, before)
    assert difference.nll == pytest.approx(after.nll - before.nll)
    assert difference.perplexity_ratio == pytest.approx(after.perplexity / before.perplexity)
    low, high = difference.perplexity_ratio_interval
    assert low < difference.perplexity_ratio < high
    assert high - low < 0.1 * (before.interval[1] - before.interval[0]) / before.perplexity
    with pytest.raises(EvalError, match="different windows"):
        paired_difference(after, perplexity(model, make_windows(count=12, seed=1)))
