from __future__ import annotations

import json
import re

import pytest
from quantlab_evals import Sampling
from quantlab_evals.code import protections
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse, Replace, Sequence, Strip
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from quantlab.errors import DataError
from quantlab.evaluation import evaluate_code
from quantlab.evaluation.code import _text


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [
        {"task_id": f"t/{i}", "prompt": "w1 = 1\n", "entry_point": "check", "test": "def check(f):\n    pass\n"}
        for i in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_nothing_is_run_unless_it_is_asked_for(folders, problems):
    with pytest.raises(DataError, match="--execute-generated-code"):
        evaluate_code(str(folders / "original"), problems)
    with pytest.raises(DataError, match="--execute-generated-code"):
        evaluate_code(str(folders / "original"), problems, execute="no")
    with pytest.raises(DataError, match=re.escape("pass@3 needs 3 samples")):
        evaluate_code(str(folders / "original"), problems, execute=True, ks=(1, 3), samples=2)


@pytest.mark.skipif(not all(protections().values()), reason="this kernel cannot lock programs in")
def test_a_model_is_asked_and_what_it_wrote_is_run(folders, problems):
    """A random model writes words, indented, which is no program; the record says what became of each."""
    sampling = Sampling(temperature=1.0, max_new_tokens=5)
    options = {"execute": True, "samples": 2, "ks": (1, 2), "sampling": sampling}
    found = evaluate_code(str(folders / "original"), problems, **options)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["pass_at"] == {"1": 0.0, "2": 0.0}
    assert set(document["tasks"]) == {"t/0", "t/1"}
    for tasks in document["tasks"].values():
        assert len(tasks) == 2
        assert all(task["reason"].startswith("IndentationError") for task in tasks), tasks
    assert document["tasks"]["t/0"][0]["completion"] != document["tasks"]["t/1"][0]["completion"]
    again = evaluate_code(str(folders / "original"), problems, **options)
    assert again.completions == found.completions


def test_indentation_survives_a_tokenizer_that_drops_leading_spaces():
    tokenizer = Tokenizer(WordLevel({"▁def": 0, "▁f": 1, "▁▁▁▁return": 2, "▁1": 3}))
    tokenizer.decoder = Sequence([Replace("▁", " "), Fuse(), Strip(" ", 1, 0)])  # as Llama's does
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped.decode([2, 3]).startswith("   return"), "one space is lost"
    assert _text(wrapped, [0, 1], [2, 3]) == "    return 1"
