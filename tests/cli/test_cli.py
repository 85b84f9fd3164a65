"""The commands that quantize and evaluate: exit codes, what they print where, files left behind."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys

import pytest
import yaml
from processes import QUICK, TEXT, run_process

from quantlab.engine.journal import Journal


@pytest.fixture(scope="session")
def evaluated(place, quantized):
    arguments = ["eval", "w4", "--against", "model", "--text", "text.txt", "--set", "length=64", "--json"]
    done = run_process(*arguments, "--windows", "8", cwd=place)
    assert done.returncode == 0, done.stderr
    return done


def test_quantize_says_one_document_and_its_progress_elsewhere(quantized, place):
    document = json.loads(quantized.stdout)
    assert document["folder"] == "w4"
    assert len(document["layers"]) == 14
    assert document["recipe"]["name"] == "w4-gptq"
    assert document["calibration"]["tokens"] == 128
    assert 4 < document["bits"] < 5
    assert document["bytes"] == sum(file.stat().st_size for file in (place / "w4").glob("*.safetensors"))
    assert document["verification"]["passed"]
    assert "block 2 of 2 model.layers.1: 7 layers" in quantized.stderr
    assert "elapsed" in quantized.stderr
    assert "Traceback" not in quantized.stderr
    assert not (place / "w4.partial").exists()


def test_eval_measures_both(evaluated, place):
    document = json.loads(evaluated.stdout)
    divergence = document["divergence"]
    assert document["model"] == "w4"
    assert document["settings"]["window_length"] == 64
    assert document["settings"]["windows"] == 8
    assert 0 < divergence["kl"] < 0.5
    low, high = divergence["kl_interval"]
    assert low <= divergence["kl"] <= high
    assert divergence["kl_median"] <= divergence["kl_p99"] <= divergence["kl_max"]
    assert 0.5 < divergence["agreement"] <= 1
    ratio = document["perplexity"]["perplexity"] / divergence["reference"]["perplexity"]
    assert divergence["difference"]["perplexity_ratio"] == pytest.approx(ratio)
    assert document["bytes"] < document["original_bytes"]
    assert document["original_bytes"] == (place / "model" / "model.safetensors").stat().st_size
    assert "window 8 of 8" in evaluated.stderr


def test_eval_default_length_is_what_model_and_text_have(call, quantized):
    code, out, _ = call("eval", "w4", "--text", "text.txt", "--windows", "1", "-q", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["settings"]["window_length"] == 512
    assert document["notes"] == ["windows of 512 tokens instead of 2048: the model has no more positions"]
    assert document["divergence"] is None
    code, _, err = call("eval", "w4", "--text", "text.txt", "--length", "513")
    assert code == 2
    assert "max_position_embeddings, 512" in err


def test_eval_for_a_person(call, quantized, place):
    (place / "short.txt").write_text(TEXT[:400])
    code, out, err = call("eval", "w4", "--against", "model", "--text", "short.txt")
    assert code == 0
    assert "KL divergence" in out
    assert "the text has no more tokens" in out
    assert "joined by '\\n\\n'" in out
    assert "window 1 of 1" in err


def test_eval_keeps_the_original_and_compares_variants(call, quantized, place):
    arguments = ["eval", "w4", "model", "--against", "model", "--text", "text.txt", "--length", "32", "--cache", "kept"]
    code, out, err = call(*arguments, "--measures", "perplexity,divergence,calibration", "--json")
    assert code == 0
    document = json.loads(out)
    variant, itself = document["evaluations"]
    assert (variant["model"], itself["model"]) == ("w4", "model")
    assert itself["divergence"]["kl"] == pytest.approx(0, abs=1e-6)
    assert variant["divergence"]["kl"] > 0.001
    assert variant["divergence"]["record_loss"]["top_k"] == 256
    assert 0 < variant["calibration"]["ece"]["15"] < 1
    assert [entry["better"] for entry in document["comparisons"]][1:] == ["second", "second"]
    assert document["comparisons"][0]["best"] == "model"
    (kept,) = (place / "kept").iterdir()
    assert err.count("window 83 of 83") == 3, "once to record, once a variant"

    live = json.loads(call("eval", "w4", *arguments[3:9], "--json")[1])
    assert live["divergence"]["kl"] == pytest.approx(variant["divergence"]["kl"], rel=0.02)
    assert live["divergence"]["reference"] == variant["divergence"]["reference"]
    assert list((place / "kept").iterdir()) == [kept]

    code, out, _ = call(*arguments)
    assert code == 0
    assert "model is better than w4 by" in out
    assert "256 tokens a position" in out


def test_eval_by_other_definitions(call, quantized):
    found = {}
    for definition in ("quantlab", "gptq", "llama.cpp"):
        arguments = ["eval", "model", "--text", "text.txt", "--length", "64", "--definition", definition]
        found[definition] = json.loads(call(*arguments, "--measures", "words", "--json")[1])
    assert found["llama.cpp"]["settings"]["context"] == 33
    assert found["llama.cpp"]["words"]["tokens"] == found["quantlab"]["words"]["tokens"]
    assert len({round(entry["perplexity"]["nll"], 6) for entry in found.values()}) >= 2
    code, out, _ = call("eval", "model", "--text", "text.txt", "--length", "64", "--measures", "words,calibration")
    assert code == 0
    assert "perplexity a word" in out
    assert "Brier score" in out


def test_set_and_log_and_quiet(call, place):
    code, out, err = call(
        "quantize", "model", "--recipe", "w4-rtn", "--out", "w3", "--set", "format=int3",
        "--set", "scale_search=mse", "--quiet", "--log", "log.txt", "--no-verify",
    )  # fmt: skip
    assert (code, out, err) == (0, "", "")
    assert yaml.safe_load((place / "w3" / "recipe.yaml").read_text())["format"] == "int3"
    log = (place / "log.txt").read_text().splitlines()
    assert len([line for line in log if "int3/64 rtn" in line]) == 14
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log)


def test_quantize_for_a_person(call, place):
    code, out, err = call("quantize", "model", "--recipe", "w4-rtn", "--set", "scale_search=mse", "--out", "person")
    assert code == 0
    assert "verified: 7 checks passed; `quantlab verify person` shows them" in out
    for words in ("bits a weight", "worst layers", "of the weights", "quantlab eval person --against model"):
        assert words in out
    assert "14 layers in 2 blocks" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "nowhere/at/all", "--out", "new"], "nowhere/at/all: does not exist"),
        (["quantize", "model", "--out", "new", "--recipe", "w4-gtpq"], "did you mean w4-gptq"),
        (["quantize", "model", "--out", "new", "--set", "fromat=int3"], "did you mean format"),
        (["quantize", "model", "--out", "new", "--set", "format"], "expected key=value"),
        (["quantize", "model", "--out", "new", "--set", "granularity=48"], "not divisible by group size 48"),
        (["quantize", "model", "--out", "new", "--samples", "none"], "Invalid value for '--samples'"),
        (["quantize", "model", "--out", "new", "--calibration", "no.txt"], "no.txt: not found"),
        (["quantize", "model", "--out", "model"], "holds something that quantlab did not write"),
        (["quantize", "model", "--out", "new", "--log", "no/folder/log"], "--log no/folder/log"),
        (["quantize", "model"], "Missing option '--out'"),
        (["eval", "model", "--text", "absent.txt"], "absent.txt: not found"),
        (["eval", "model", "--text", "text.txt", "--set", "lenght=3"], "a key out of text, windows, length"),
        (["eval", "model", "--text", "text.txt", "--set", "length=long"], "length 'long'"),
        (["eval", "model", "--text", "text.txt", "--measures", "kl"], "measure 'kl': use some of perplexity"),
        (["eval", "model", "--text", "text.txt", "--measures", "divergence"], "needs the original"),
        (["eval", "model", "--text", "text.txt", "--definition", "gpqt"], "definition 'gpqt' of perplexity"),
        (["eval", "model", "--text", "text.txt", "--cache", "text.txt/x", "--against", "model"], "cannot be written"),
        (["inspect", "model"], "is not quantized"),
        (["inspect", "absent"], "absent: does not exist"),
        (["inspect", "model", "--set", "sort=size"], "use one of order, name, error, bits, bytes"),
        (["eval", "model", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["eval", "model", "w4", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["eval-generation", "model", "--out", "new", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["compare", "model", "--grid", "formats=int4", "--device", "cuda:99"], "'cuda:99' cannot be used here"),
        (["plan", "model", "-b", "4", "-o", "new.yaml", "--device", "cuda:99"], "'cuda:99' cannot be used here"),
        (["compare", "model"], "Missing option '--grid'"),
        (["compare", "model", "--grid", "format=int4"], "unknown axis 'format'; axes are formats, bits, groups"),
        (["compare", "model", "--grid", "formats=int4 groups=48"], "not divisible by group size 48"),
        (["compare", "model", "--grid", "formats=int4", "--layers", "*.down"], "matches no linear layer"),
        (["compare", "model", "--grid", "formats=int4", "--all", "--blocks", "1"], "give one of them"),
        (["compare", "model", "--grid", "formats=int4", "--plot", "new.svg"], "a name that ends in .html"),
        (["export", "model", "--to", "gptq", "--out", "new", "--set", "version=[2"], "is not valid YAML"),
        (["export", "model", "--to", "gptq", "--out", "new", "--set", "version"], "expected KEY=VALUE"),
        (["recipes", "w5"], "ready are: "),
        (["recipe"], "No such command"),
    ],
)
def test_bad_input_is_one_paragraph_and_leaves_nothing(call, place, arguments, words):
    before = sorted(place.iterdir())
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    paragraph = err.splitlines()[-1]
    assert paragraph.startswith("error: ")
    assert words in paragraph
    assert "Traceback" not in err
    assert sorted(place.iterdir()) == before

    code, out, err = call(*arguments, "--json")
    document = json.loads(out)
    assert code == 2
    assert words in document["error"]
    assert document["kind"].endswith("Error")
    assert "error" not in err
    assert sorted(place.iterdir()) == before


def test_an_unexpected_error_keeps_its_traceback(place):
    broken = "from quantlab.cli import show, main; show.recipe_table = None; main(['recipes'])"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_interrupted_it_says_how_to_go_on_and_goes_on(call, place, monkeypatch):
    command = ["quantize", "model", "--out", "resumed", "--calibration", "text.txt", *QUICK, "--no-verify"]
    commit = Journal.commit

    def commit_then_interrupt(journal, block, *arguments):
        commit(journal, block, *arguments)
        if block == "model.layers.0":
            monkeypatch.setattr(Journal, "commit", interrupt)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "commit", commit_then_interrupt)
    code, out, err = call(*command)
    assert code == 130
    assert out == ""
    expected = "interrupted; 1 of 2 blocks are done and kept: run the same command again to go on at block 2"
    assert err.splitlines()[-1] == expected
    assert "interrupted run" in call("inspect", "resumed.partial")[2]

    monkeypatch.setattr(Journal, "commit", commit)
    code, out, err = call(*command, "--json")
    assert code == 0
    assert json.loads(out)["resumed_blocks"] == 1
    assert "going on at block 2" in err
    assert "block 2 of 2" in err
    assert not (place / "resumed.partial").exists()


def test_ctrl_c_ends_a_real_process(place):
    command = [
        sys.executable,
        "-m",
        "quantlab.cli",
        "quantize",
        "model",
        "--out",
        "never",
        "--samples",
        "9000",
    ]
    command += ["--length", "32", "--calibration", "builtin"]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "14 layers in 2 blocks" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "run the same command again" in err
    assert "Traceback" not in err


def test_eval_code_runs_nothing_unless_told_to(call, place):
    row = {"task_id": "t", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    pass\n"}
    (place / "problems.jsonl").write_text(json.dumps(row))
    arguments = ["eval-code", "model", "--problems", "problems.jsonl", "--max-new-tokens", "4"]
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "--execute-generated-code" in err
    code, _, err = call(*arguments, "--execute-generated-code", "--device", "cuda:99")
    assert code == 2
    assert "device 'cuda:99' cannot be used here" in err or "this kernel offers no" in err
    code, out, _ = call(*arguments, "--execute-generated-code", "--json")
    if code == 2:
        assert "this kernel offers no" in json.loads(out)["error"]
        pytest.skip("no sandbox on this kernel")
    document = json.loads(out)
    assert set(document["pass_at"]) == {"1"}
    assert "landlock" in document["isolation"]
    code, out, _ = call(*arguments, "--execute-generated-code")
    assert "pass@1" in out
    (place / "problems.jsonl").unlink()


def test_eval_generation_makes_a_table_and_goes_on(call, quantized, place):
    arguments = ["eval-generation", "model", "w4", "--against", "model", "--out", "written", "--text", "text.txt"]
    arguments += ["--temperature", "0,1", "--max-new-tokens", "4", "--prompts", "2", "--prompt-length", "8"]
    code, out, err = call(*arguments)
    assert code == 0
    assert "cell 4 of 4" in err
    assert len([line for line in out.splitlines() if re.match(r"(model|w4) +[01] ", line)]) == 4
    document = json.loads(call(*arguments, "--json")[1])
    assert [cell["temperature"] for cell in document["cells"]] == [0, 1, 0, 1]
    assert document["cells"][0]["original_agreement"] == 1
    code, _, err = call("eval-generation", "model", "--temperature", "hot", "--out", "other")
    assert code == 2
    assert "use numbers with commas between them" in err


def test_eval_tasks_and_summaries(call, place):
    """Through the libraries where they are installed, and by their names where they are not."""
    rows = [{"question": "The quick fox", "choices": ["jumps", "sleeps"], "answer": i % 2} for i in range(4)]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "foxes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (place / "foxes.yaml").write_text(yaml.safe_dump(task))
    (place / "news.jsonl").write_text(json.dumps({"document": "The quick fox jumps.", "summary": "A fox jumps."}))
    for arguments, library, words in (
        (["eval-tasks", "model", "--task", "foxes.yaml", "--limit", "2"], "lm_eval", ["foxes", "2 of 4", "by lm-eval"]),
        (["eval-summaries", "model", "--file", "news.jsonl", "--max-new-tokens", "4"], "rouge_score", ["rougeL"]),
    ):
        code, out, err = call(*arguments)
        if importlib.util.find_spec(library) is None:
            assert code == 2
            assert "pip install 'quantlab[eval]'" in err
        else:
            assert code == 0, err
            assert all(word in out for word in words)
            code, out, err = call(*arguments, "--device", "cuda:99")
            assert code == 2
            assert "device 'cuda:99' cannot be used here" in err
            assert json.loads(call(*arguments, "--json")[1])["model"] == "model"
    assert call("eval-tasks", "nowhere/at/all", "--task", "cats.yaml")[2].startswith("error: cats.yaml: no such task")
