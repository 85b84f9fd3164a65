from __future__ import annotations

import math
import random

import pytest
import torch
from quantlab_evals import EvalError, Sampling, distinct, generate, repetition, sampling_grid, score
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

PROMPT = [5, 9, 33, 7]


def greedy(model, prompt, count):
    """The likeliest token, again and again, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_temperature_zero_takes_the_likeliest_token(make_model):
    model = make_model()
    expected = greedy(model, PROMPT, 12)
    model.generation_config.eos_token_id = None
    assert generate(model, PROMPT, Sampling(max_new_tokens=12)) == [expected]
    model.generation_config.eos_token_id = expected[3]
    assert generate(model, PROMPT, Sampling(max_new_tokens=12)) == [expected[: expected.index(expected[3])]]


def test_the_models_own_settings_do_not_leak_in_and_are_put_back(make_model):
    model = make_model()
    model.generation_config.eos_token_id = None
    expected = generate(model, PROMPT, Sampling(max_new_tokens=12))
    sampled = generate(model, PROMPT, Sampling(temperature=1.5, max_new_tokens=12), seed=3)
    settings = {"repetition_penalty": 5.0, "top_k": 1, "top_p": 0.1, "do_sample": True, "max_length": 5}
    model.generation_config.update(**settings, temperature=9.0, no_repeat_ngram_size=1)
    own = model.generation_config
    assert generate(model, PROMPT, Sampling(max_new_tokens=12)) == expected
    assert generate(model, PROMPT, Sampling(temperature=1.5, max_new_tokens=12), seed=3) == sampled
    assert model.generation_config is own


def test_seeds_decide_and_torchs_own_randomness_is_left_alone(make_model):
    model, sampling = make_model(), Sampling(temperature=2.0, max_new_tokens=10)
    model.generation_config.eos_token_id = None
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = generate(model, PROMPT, sampling, samples=3, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(model, PROMPT, sampling, samples=3, seed=5) == one
    assert generate(model, PROMPT, sampling, samples=3, seed=6) != one
    assert len({tuple(tokens) for tokens in one}) == 3


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.5), (0, 1.0)])
def test_tokens_come_from_the_distribution_that_was_asked_for(make_model, top_k, top_p):
    model, temperature, count = make_model(), 1.7, 6000
    model.generation_config.eos_token_id = None
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens=1)
    found = torch.tensor(generate(model, PROMPT, sampling, samples=count)).flatten().bincount(minlength=64) / count
    with torch.no_grad():
        p = (model(torch.tensor([PROMPT])).logits[0, -1].double() / temperature).softmax(-1)
    ranked = p.sort(descending=True)
    kept = len(p) if top_k == 0 else top_k
    kept = min(kept, int((ranked.values.cumsum(0) < top_p).sum()) + 1)
    expected = torch.zeros_like(p).scatter(0, ranked.indices[:kept], ranked.values[:kept])
    expected /= expected.sum()
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / count)
    assert (found[expected == 0] == 0).all()


def test_an_encoder_decoder_answers():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, decoder_start_token_id=0, eos_token_id=63
    )
    (answer,) = generate(T5ForConditionalGeneration(config), PROMPT, Sampling(max_new_tokens=5))
    assert len(answer) <= 5


def test_the_grid_has_no_cell_twice():
    cells = sampling_grid([0, 0.7], [0, 50], [1.0, 0.9], [16, 32])
    assert len(cells) == len(set(cells)) == 2 + 8
    assert cells[:2] == [Sampling(max_new_tokens=16), Sampling(max_new_tokens=32)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(EvalError, match=words):
        Sampling(**settings)


def test_what_cannot_be_generated_is_refused(make_model):
    with pytest.raises(EvalError, match="an empty prompt"):
        generate(make_model(), [], Sampling())
    with pytest.raises(EvalError, match="2 samples at temperature 0 are all the same"):
        generate(make_model(), PROMPT, Sampling(), samples=2)


def test_score_is_the_likelihood_of_each_token_after_the_others(make_model):
    model, chosen = make_model(), random.Random(0)
    prompts = [[chosen.randrange(64) for _ in range(4)] for _ in range(5)]
    written = [[chosen.randrange(64) for _ in range(count)] for count in (7, 0, 3, 1, 8)]
    nll, same = [], []
    for prompt, tokens in zip(prompts, written, strict=True):
        for i, token in enumerate(tokens):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens[:i]])).logits[0, -1].double()
            nll.append(cross_entropy(logits, torch.tensor(token)).item())
            same.append(int(logits.argmax()) == token)
    found = score(model, prompts, written)
    assert found.tokens == len(nll) == 19
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / 19), rel=1e-4)
    assert found.agreement == pytest.approx(sum(same) / 19)
    own = [generate(model, prompt, Sampling(max_new_tokens=6))[0] for prompt in prompts]
    assert score(model, prompts, own).agreement == 1
    with pytest.raises(EvalError, match="no token to score"):
        score(model, prompts[:1], [[]])


def test_repetition_and_variety():
    assert distinct([[1, 2, 3], [3, 4]], 1) == pytest.approx(4 / 5)
    assert distinct([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[]], 1) == 0
    assert repetition([[1, 2, 3, 4, 5, 6]]) == 0
    assert repetition([[7] * 12]) == pytest.approx(1 - 1 / 9)
    assert repetition([[7] * 12, list(range(12)), [1]]) == pytest.approx((1 - 1 / 9) / 2)
