from __future__ import annotations

import gzip
import itertools
import json
import tempfile

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_evals import EvalError, compare
from quantlab_evals.code import (
    Limits,
    Problem,
    first_answer,
    load_problems,
    pass_at_k,
    protections,
    run_completions,
)

PROBLEMS = [
    Problem("add", "def add(a, b):\n", "add", "def check(f):\n    assert f(1, 2) == 3\n", "    return a + b\n"),
    Problem("twice", "def twice(x):\n", "twice", "def check(f):\n    assert f(4) == 8\n", "    return 2 * x\n"),
]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.data())
def test_equals_the_share_of_all_draws_that_hold_a_correct_one(samples, data):
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    draws = list(itertools.combinations([i < correct for i in range(samples)], k))
    assert pass_at_k(samples, correct, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_is_unbiased_where_the_plug_in_estimate_is_not():
    rng = np.random.default_rng(0)
    found = [pass_at_k(10, c, 5) for c in rng.binomial(10, 0.2, size=20000)]
    assert np.mean(found) == pytest.approx(1 - 0.8**5, abs=0.005)


def test_bad_input_is_refused():
    with pytest.raises(EvalError, match="pass@5 cannot be estimated from 2 completions"):
        pass_at_k(2, 1, 5)
    with pytest.raises(EvalError, match="3 of 2"):
        pass_at_k(2, 3, 1)


@pytest.mark.skipif(not all(protections().values()), reason="this kernel cannot lock programs in")
def test_completions_are_run_and_counted():
    right, wrong = "    return a + b\n", "    return a - b\n"
    told = []
    found = run_completions(
        PROBLEMS,
        {"add": [right, wrong, wrong, right], "twice": ["    return 2 * x\n", "    while True: pass\n", "", "    :\n"]},
        ks=(1, 2),
        limits=Limits(seconds=6),
        workers=2,
        progress=lambda *done: told.append(done),
    )
    assert found.solved == {"add": 0.5, "twice": 0.25}
    assert found.pass_at == pytest.approx({1: 0.375, 2: np.mean([1 - 1 / 6, 0.5])})
    assert [ended.passed for ended in found.outcomes["add"]] == [True, False, False, True]
    assert found.outcomes["add"][1].reason == "AssertionError: "
    assert "timed out" in found.outcomes["twice"][1].reason
    assert "IndentationError" in found.outcomes["twice"][2].reason
    assert told[-1] == (8, 8)
    assert "landlock, seccomp" in found.isolation
    assert compare(found.clusters(1), found.clusters(1), "pass@1").better is None
    with pytest.raises(EvalError, match="pass@1 cannot be estimated from 0"):
        run_completions(PROBLEMS, {"add": [right]})


@pytest.mark.skipif(not all(protections().values()), reason="this kernel cannot lock programs in")
def test_a_completion_cannot_leave_before_it_is_tested():
    leave = "    return 1\nimport os, sys\nos._exit(0)\n"
    found = run_completions(PROBLEMS[:1], {"add": [leave]})
    assert found.pass_at[1] == 0


@pytest.mark.skipif(not all(protections().values()), reason="this kernel cannot lock programs in")
def test_malicious_solutions_are_failures_and_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    victim = tmp_path / "victim"
    solutions = [
        "    import os\n    while True: os.fork()\n",
        "    return bytearray(10 << 30)\n",
        "    while True: pass\n",
        f"    open({str(victim)!r}, 'w').write('x')\n    return a + b\n",
        "    import socket\n    socket.create_connection(('127.0.0.1', 9))\n    return a + b\n",
        "    import os\n    os.kill(os.getppid(), 9)\n    return a + b\n",
        "    return a + b\n",
    ]
    found = run_completions(PROBLEMS[:1], {"add": solutions}, limits=Limits(seconds=6))
    assert [ended.passed for ended in found.outcomes["add"]] == [False] * 6 + [True]
    assert list(tmp_path.iterdir()) == []
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert left == []


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_problems_are_read(tmp_path, name):
    path = tmp_path / name
    text = "\n".join(json.dumps(vars(problem)) for problem in PROBLEMS) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert load_problems(path) == PROBLEMS
    assert load_problems(path, limit=1) == PROBLEMS[:1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no problem in it"),
        ("{", "line 1: not JSON"),
        ("[]", "problem 1: a list, not an object"),
        ('{"task_id": "a", "prompt": "b"}', "no text in the field 'entry_point'"),
        ('{"task_id": "a", "prompt": "b", "entry_point": "c", "test": "d"}\n' * 2, "'a' is there more than once"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, words):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(EvalError, match=words):
        load_problems(path)
    with pytest.raises(EvalError, match="no such file"):
        load_problems(tmp_path / "absent.jsonl")


def test_an_answer_ends_where_something_else_begins():
    body = "    return 1\n    # a comment\n    print(2)"
    for rest in ("\ndef other():", "\nclass A:", "\nprint(1)", "\n# next", "\nif __name__", "\n```\n", ""):
        assert first_answer(body + rest) == body
