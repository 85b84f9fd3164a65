from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_evals import EvalError, divergence, fingerprint_folder, fingerprint_model, recorded_reference
from quantlab_evals.recorded import expected_log_ratio, sampled_divergence
from torch.nn.functional import kl_div


def perturbed(model, amount=0.3, seed=1):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def never():
    raise AssertionError("the reference was loaded although there is a record")


@pytest.fixture
def record(tmp_path):
    def make(model, windows, identity="original", load=None, **settings):
        return recorded_reference(tmp_path / "cache", identity, windows, load or (lambda: model), **settings)

    return make


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_record_of_all_tokens_is_exact(make_model, make_windows, record, chunk):
    reference, windows = make_model(), make_windows()
    model = perturbed(reference)
    live = divergence(model, reference, windows, chunk=chunk)
    read = divergence(model, record(reference, windows, top_k=64), windows, chunk=chunk)
    assert read.record_loss is None
    assert live.record_loss is None
    assert read.reference == live.reference
    assert (read.agreement, read.flips, read.lost) == (live.agreement, live.flips, live.lost)
    assert read.kl == pytest.approx(live.kl, rel=1e-6)
    assert read.kl_max == pytest.approx(live.kl_max, rel=1e-5)
    assert read.kl_clusters.means == pytest.approx(live.kl_clusters.means, rel=1e-5)


def test_a_record_of_few_tokens_is_unbiased_and_says_what_it_costs(make_model, make_windows, record):
    reference, windows = make_model(), make_windows(count=60)
    model = perturbed(reference)
    exact = divergence(model, reference, windows)
    read = divergence(model, record(reference, windows, top_k=3, sampled=8), windows)
    loss = read.record_loss
    assert (loss.top_k, loss.sampled, loss.positions) == (3, 8, 60 * 8)
    assert 0.05 < loss.tail_mass < 0.5
    assert abs(read.kl - exact.kl) < 4 * loss.standard_error
    assert loss.standard_error < 0.02 * exact.kl
    assert abs(loss.difference) < 4 * loss.difference_error
    assert loss.exact_kl == pytest.approx(exact.kl, rel=0.1)
    assert read.agreement == exact.agreement
    assert read.reference == exact.reference


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.1, 4))
def test_the_mean_over_all_samples_is_the_divergence(seed, k, scale):
    """With every tail token drawn as often as its probability says, nothing is left to chance."""
    generator = torch.Generator().manual_seed(seed)
    log_p, log_q = (scale * torch.randn(2, 1, 16, generator=generator, dtype=torch.float64)).log_softmax(-1)
    top, indices = log_p.topk(k)
    tail = torch.tensor([i for i in range(16) if i not in indices[0].tolist()])
    log_tail = log_p[:, tail].logsumexp(-1)
    head = expected_log_ratio(indices, top, log_q)
    weight = (log_p[0, tail] - log_tail).exp()
    each = [sampled_divergence(head, log_tail, t[None, None], log_p[:, t[None]], log_q)[0] for t in tail]
    expected = kl_div(log_q, log_p, log_target=True, reduction="sum").item()
    assert float(sum(w * e for w, e in zip(weight, each, strict=True))) == pytest.approx(expected, rel=1e-9)


def test_the_variance_is_that_of_the_estimate():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = torch.randn(2, 1, 50, generator=generator).mul(2).log_softmax(-1)
    tail = log_p[0].argsort()[:40]
    weights = torch.zeros(50).index_copy(0, tail, log_p[0, tail].exp())
    sample = torch.stack([weights.multinomial(20, True, generator=generator) for _ in range(4000)])
    rows = log_q.expand(4000, -1)
    log_tail = weights.sum().log().expand(4000)
    found, variance = sampled_divergence(
        torch.zeros(4000), log_tail, sample, log_p.expand(4000, -1).gather(-1, sample), rows
    )
    assert found.var().item() == pytest.approx(variance.mean().item(), rel=0.1)


def test_a_model_does_not_differ_from_its_record(make_model, make_windows, record):
    model, windows = make_model(), make_windows()
    found = divergence(model, record(model, windows, top_k=4), windows)
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert (found.agreement, found.flips) == (1, 0)
    assert found.difference.nll == 0


def test_it_is_made_once_and_never_used_for_anything_else(make_model, make_windows, record, tmp_path):
    model, windows = make_model(), make_windows()
    first = record(model, windows)
    assert record(model, windows, load=never).folder == first.folder
    others = [
        record(make_model(seed=1), windows, identity="another"),
        record(model, make_windows(seed=1)),
        record(model, replace(windows, context=8)),
        record(model, windows, top_k=5),
        record(model, windows, sampled=5),
    ]
    assert len({first.folder, *(other.folder for other in others)}) == 6
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(
        {entry.folder.name for entry in (first, *others)}
    )
    with pytest.raises(EvalError, match="recorded on other windows"):
        divergence(model, others[1], windows)


def test_a_failed_or_damaged_record_is_none(make_model, make_windows, record, tmp_path):
    model, windows = make_model(), make_windows()

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, windows, load=broken)
    assert list((tmp_path / "cache").iterdir()) == []
    found = record(model, windows)
    file = found.folder / "000003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = record(model, windows)
    assert again.folder == found.folder
    assert divergence(model, again, windows).agreement == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found.folder.name]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    make_model, make_windows, record, tmp_path
):
    model, windows = make_model(), make_windows()
    key = record(model, windows, identity="probe").folder.name
    recorded = tmp_path / "cache" / key
    recorded.rename(recorded.with_name("moved"))
    old, young = (recorded.with_name(f".{key}-{name}") for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (time.time() - 10**6,) * 2)
    record(model, windows, identity="probe")
    assert not old.exists()
    assert young.exists()


def test_a_record_of_broken_logits_is_refused(make_model, make_windows, record, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(EvalError, match="window 0: the logits of the reference are NaN"):
        record(model, make_windows())
    assert list((tmp_path / "cache").iterdir()) == []


def test_vocabularies_must_match(make_model, make_windows, record):
    windows = make_windows()
    with pytest.raises(EvalError, match="64 entries and the reference's 72"):
        divergence(make_model(), record(make_model(vocabulary=72), windows), windows)


def test_fingerprints_follow_content(make_model, tmp_path):
    model = make_model()
    same = make_model()
    assert fingerprint_model(model) == fingerprint_model(same)
    with torch.no_grad():
        same.model.norm.weight[0] += 1
    assert fingerprint_model(model) != fingerprint_model(same)
    assert fingerprint_model(model) != fingerprint_model(copy.deepcopy(model).bfloat16())
    other = make_model()
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert fingerprint_model(model) != fingerprint_model(other)

    model.save_pretrained(tmp_path)
    before = fingerprint_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stat = (tmp_path / "config.json").stat()
    (tmp_path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True).replace("\n", " "))
    os.utime(tmp_path / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint_folder(tmp_path) != before


def test_whole_positions_are_spread_over_the_window(make_model, make_windows, record):
    from safetensors.torch import load_file

    found = record(make_model(), make_windows(length=32))
    at = load_file(found.folder / "000000.safetensors")["whole_at"].numpy()
    assert len(at) == 8
    assert np.diff(at).min() >= 3
    assert at[0] > 0
