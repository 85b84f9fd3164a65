"""A local task, through lm-eval where it is installed, against likelihoods that are taken here."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from quantlab_evals import EvalError, compare_choices, run_tasks

TASK = """
task: local_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def questions():
    chosen = random.Random(0)
    return [
        {
            "question": " ".join(f"w{chosen.randrange(60)}" for _ in range(4)),
            "choices": [f"w{word} w{chosen.randrange(60)}" for word in chosen.sample(range(60), 3 + i % 2)],
            "answer": chosen.randrange(3),
        }
        for i in range(24)
    ]


@pytest.fixture
def task(tmp_path, questions, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    path = tmp_path / "local_words.yaml"
    path.write_text(TASK.format(data=data))
    return path


def likelihoods(model, tokenizer, question):
    """The log-likelihood of each choice after the question, one token at a time."""
    found = []
    for choice in question["choices"]:
        context = tokenizer(question["question"])["input_ids"]
        tokens = context + tokenizer(choice)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        found.append(sum(log_p[i - 1, tokens[i]].item() for i in range(len(context), len(tokens))))
    return found


def test_a_local_task(task, questions, make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer(eos_token="</s>", pad_token="</s>")
    found = run_tasks(model, tokenizer, [task], seed=1)
    (result,) = found.tasks.values()
    each = [likelihoods(model, tokenizer, question) for question in questions]
    chosen = [max(range(len(row)), key=row.__getitem__) for row in each]
    truth = [question["answer"] for question in questions]
    right = [a == b for a, b in zip(chosen, truth, strict=True)]
    assert (result.task, result.samples, result.available, result.shots) == ("local_words", 24, 24, 0)
    assert result.metrics["acc"] == pytest.approx(sum(right) / 24)
    assert 0 < result.metrics["acc_stderr"] < 0.2
    assert list(result.choices.chosen) == chosen
    assert list(result.choices.truth) == truth
    assert result.choices.calibration.accuracy == pytest.approx(sum(right) / 24)
    confidence = [torch.tensor(row).softmax(0).max().item() for row in each]
    assert result.choices.calibration.confidence == pytest.approx(sum(confidence) / 24, rel=1e-3)
    assert found.settings["tool"].startswith("lm-eval 0.")
    assert "model_class" in found.settings

    other = run_tasks(make_model(seed=1), tokenizer, [task]).tasks["local_words"]
    comparison, flips = compare_choices(result, other)
    assert comparison.difference == pytest.approx(other.metrics["acc"] - result.metrics["acc"])
    assert flips == pytest.approx(sum(a != b for a, b in zip(right, other.choices.right.means, strict=True)) / 24)
    assert compare_choices(result, result)[1] == 0
    few = run_tasks(model, tokenizer, [task], limit=5)
    assert (few.tasks["local_words"].samples, few.tasks["local_words"].available) == (5, 24)
    with pytest.raises(EvalError, match="different questions"):
        compare_choices(result, few.tasks["local_words"])


def test_what_is_not_there_is_named(task, make_model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(eos_token="</s>")
    with pytest.raises(EvalError, match=r"absent.yaml: no such task file"):
        run_tasks(make_model(), tokenizer, [tmp_path / "absent.yaml"])
    with pytest.raises(EvalError, match="no_such_task_of_theirs"):
        run_tasks(make_model(), tokenizer, ["no_such_task_of_theirs"])
    with pytest.raises(EvalError, match="limit is 0"):
        run_tasks(make_model(), tokenizer, [task], limit=0)


def test_without_lm_eval_it_says_what_to_install(monkeypatch, make_model, make_tokenizer):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvalError, match=r"pip install 'quantlab\[eval\]'"):
        run_tasks(make_model(), make_tokenizer(), ["anything"])
