from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from quantlab_evals import EvalError, compare_divergences, divergence, perplexity
from quantlab_evals.reference import kl_divergence
from torch.nn.functional import kl_div


def perturbed(model, amount, seed=1):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_differ_from_itself(make_model, make_windows, dtype):
    model = make_model().to(dtype)
    found = divergence(model, model, make_windows())
    assert (found.kl, found.kl_median, found.kl_p99, found.kl_max) == (0, 0, 0, 0)
    assert found.kl_interval == (0, 0)
    assert found.agreement == 1
    assert found.agreement_interval == (1, 1)
    assert found.difference.nll == 0
    assert found.model == found.reference


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_torch_on_full_logits(make_model, make_windows, chunk, batch_size):
    reference, windows = make_model(), make_windows()
    model = perturbed(reference, 0.3)
    with torch.no_grad():
        q = model(windows.tokens).logits[:, :-1].double().log_softmax(-1)
        p = reference(windows.tokens).logits[:, :-1].double().log_softmax(-1)
    kl = kl_div(q, p, log_target=True, reduction="none").sum(-1)
    told = []
    found = divergence(
        model,
        reference,
        windows,
        chunk=chunk,
        batch_size=batch_size,
        progress=lambda *done: told.append(done),
    )
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-4)
    by_rank = np.sort(kl.numpy().ravel())
    assert found.kl_median == pytest.approx(by_rank[37], rel=1e-3)
    assert found.kl_p99 == pytest.approx(by_rank[74], rel=1e-3)
    assert found.kl_interval[0] < found.kl < found.kl_interval[1]
    assert found.agreement == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert 0 < found.agreement_interval[0] <= found.agreement <= found.agreement_interval[1] < 1
    top_q, top_p, truth = q.argmax(-1), p.argmax(-1), windows.tokens[:, 1:]
    assert found.lost == pytest.approx(((top_p == truth) & (top_q != truth)).double().mean().item())
    assert found.gained == pytest.approx(((top_q == truth) & (top_p != truth)).double().mean().item())
    assert found.flips == found.lost + found.gained > 0
    assert found.kl_clusters.means == pytest.approx(kl.mean(-1).tolist(), rel=1e-4)
    assert found.tokens == 75
    assert told[-1] == (5, 5)


def test_perplexities_are_those_of_perplexity(make_model, make_windows):
    reference, windows = make_model(), make_windows()
    model = perturbed(reference, 0.3)
    found = divergence(model, reference, windows, seed=4)
    assert found.model == perplexity(model, windows, seed=4)
    assert found.reference == perplexity(reference, windows, seed=4)
    assert found.difference.nll == pytest.approx(found.model.nll - found.reference.nll)


def test_grows_with_the_damage_and_has_a_direction(make_model, make_windows):
    reference, windows = make_model(), make_windows()
    small, large = (divergence(perturbed(reference, a), reference, windows) for a in (0.05, 0.5))
    assert 0 < small.kl < large.kl
    assert small.agreement > large.agreement
    back = divergence(reference, perturbed(reference, 0.5), windows)
    assert back.kl != pytest.approx(large.kl, rel=1e-3)
    assert back.agreement == large.agreement


def test_kl_of_zero_probabilities():
    log = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]).log()
    p, q = log[:1], log[1:]
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * np.log(2))
    assert kl_divergence(p, p).item() == 0
    assert kl_divergence(q, p).item() == np.inf


def test_two_variants_are_compared_on_the_same_text(make_model, make_windows):
    reference, windows = make_model(), make_windows(count=40)
    variants = [divergence(perturbed(reference, amount), reference, windows) for amount in (0.1, 0.5)]
    perplexity_, kl, agreement = compare_divergences(*variants)
    assert [entry.better for entry in (kl, agreement)] == ["first", "first"]
    assert kl.difference == pytest.approx(variants[1].kl - variants[0].kl)
    assert perplexity_.difference == pytest.approx(variants[1].model.perplexity - variants[0].model.perplexity)
    assert kl.verdict("small", "large").startswith("small is better than large by ")
    swapped = compare_divergences(*reversed(variants))
    assert swapped[1].better == "second"
    assert swapped[1].interval == pytest.approx((-kl.interval[1], -kl.interval[0]))
    itself = compare_divergences(variants[0], variants[0])
    assert [entry.better for entry in itself] == [None] * 3
    with pytest.raises(EvalError, match="different"):
        compare_divergences(variants[0], divergence(reference, reference, make_windows(count=40, seed=1)))


def test_vocabularies_must_match(make_model, make_windows):
    with pytest.raises(EvalError, match="64 entries and the reference's 72"):
        divergence(make_model(), make_model(vocabulary=72), make_windows())
