from __future__ import annotations

import tempfile

import pytest
from quantlab_evals import EvalError
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.errors import DataError
from quantlab.evaluation import evaluate, evaluate_variants
from quantlab.evaluation.subject import Subject

SETTINGS = {"length": 32, "windows": 12}


@pytest.fixture
def named(folders):
    return {name: str(folders / name) for name in ("original", "variant")} | {"text": str(folders / "text.txt")}


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that are loaded, in order."""
    names = []
    loaded = Subject.loaded

    def noted(subject):
        names.append(subject.name.rsplit("/", 1)[-1])
        return loaded(subject)

    monkeypatch.setattr(Subject, "loaded", noted)
    return names


def test_variants_share_the_original_and_agree_with_one_by_one(named, loads, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    models = [named["variant"], named["original"], named["variant"]]
    found = list(evaluate_variants(models, named["text"], against=named["original"], **SETTINGS))
    assert loads == ["original", "variant", "original", "variant"], "the original once, and once as a variant"
    assert list(tmp_path.iterdir()) == []
    alone = evaluate(named["variant"], named["text"], against=named["original"], **SETTINGS)
    assert found[0].perplexity == alone.perplexity
    assert found[0].divergence.reference == alone.divergence.reference
    assert found[0].divergence.kl == pytest.approx(alone.divergence.kl, rel=1e-5), "64 tokens are all of them"
    assert found[1].divergence.kl == pytest.approx(0, abs=1e-6)
    assert found[0].divergence == found[2].divergence


def test_a_cache_is_used_again_and_only_for_the_same(named, loads, tmp_path):
    options = {"against": named["original"], "cache": tmp_path / "cache", **SETTINGS}
    first = evaluate(named["variant"], named["text"], **options)
    assert evaluate(named["variant"], named["text"], **options).divergence == first.divergence
    assert loads == ["original", "variant", "variant"]
    evaluate(named["variant"], named["text"], **{**options, "windows": 6})
    assert loads[3:] == ["original", "variant"], "other windows, another record"
    evaluate(named["original"], named["text"], **{**options, "against": named["variant"]})
    assert loads[5:] == ["variant", "original"], "another original, another record"


def test_models_in_memory(named):
    models = {name: AutoModelForCausalLM.from_pretrained(named[name]) for name in ("original", "variant")}
    tokenizer = AutoTokenizer.from_pretrained(named["original"])
    (found,) = evaluate_variants(
        [models["variant"]], named["text"], against=models["original"], tokenizer=tokenizer, **SETTINGS
    )
    from_folders = evaluate(named["variant"], named["text"], against=named["original"], **SETTINGS)
    assert found.divergence.kl == pytest.approx(from_folders.divergence.kl, rel=1e-5)


def test_one_pass_measures_all_that_is_asked_for(named):
    asked = ["perplexity", "divergence", "calibration", "words"]
    tokenizer = AutoTokenizer.from_pretrained(named["original"], eos_token="<unk>")
    settings = {**SETTINGS, "measures": asked, "tokenizer": tokenizer}
    found = evaluate(named["variant"], named["text"], against=named["original"], **settings)
    assert found.calibration.count == found.perplexity.tokens == found.divergence.tokens == 12 * 31
    assert found.calibration.nll == pytest.approx(found.perplexity.nll, rel=1e-5)
    assert found.words.words == found.words.tokens
    page = found.to_markdown()
    for line in ("mean KL divergence", "flips", "calibration error (ECE, 15 bins)", "perplexity a word"):
        assert line in page
    only = evaluate(named["variant"], named["text"], against=named["original"], measures=["perplexity"], **SETTINGS)
    assert only.divergence is None
    assert only.perplexity == found.perplexity


def test_what_cannot_be_is_refused(named):
    with pytest.raises(DataError, match="measure 'kl': use some of perplexity, divergence, calibration, words"):
        evaluate(named["variant"], named["text"], measures=["kl"])
    with pytest.raises(DataError, match="needs the original"):
        evaluate(named["variant"], named["text"], measures=["divergence"])
    with pytest.raises(EvalError, match="neither a BOS nor an EOS token"):
        evaluate(named["variant"], named["text"], measures=["words"])
    with pytest.raises(DataError, match="'gptq' has its own rule"):
        evaluate(named["variant"], named["text"], definition="gptq", bos=True)
