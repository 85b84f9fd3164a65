from __future__ import annotations

import json
import sys

import pytest
from quantlab_evals import EvalError, load_documents, load_text


def passages(documents, length, step):
    for document in documents:
        text = " ".join(document.split())
        for start in range(0, len(text) - length + 1, step):
            yield text[start : start + length]


@pytest.mark.parametrize(("name", "most"), [("builtin", 0.2), ("python-code", 0.39)])
def test_parts_share_no_passage_and_most_is_to_calibrate_with(name, most):
    calibration, evaluation = load_documents(name), load_documents(f"{name}:eval")
    share = sum(map(len, evaluation)) / sum(map(len, calibration + evaluation))
    assert most - 0.11 < share < most
    assert sum(map(len, calibration)) > 200_000
    # Every 20th passage of one part at every position of the other: what they may share is below 220.
    of_evaluation = set(passages(evaluation, 200, 20))
    assert len(of_evaluation) > 5000
    assert of_evaluation.isdisjoint(passages(calibration, 200, 1))


def test_builtin_is_prose_and_code_is_code():
    assert any("statement" in document for document in load_documents("builtin:eval"))
    assert all("\ndef " in d or "\nclass " in d or "import" in d for d in load_documents("python-code", limit=5))


def test_few_documents_of_builtin_are_both_prose_and_reference():
    first = load_documents("builtin", limit=40)
    reference = [document for document in first if "\n***" in document or "\n===" in document or "::" in document]
    speeches = [document for document in first if "Congress" in document or "Nation" in document]
    assert len(reference) >= 5
    assert len(speeches) >= 5
    assert not any("Ahab" in document for document in load_documents("builtin:eval"))
    assert "prose" in load_text("builtin", limit=1).origin


def test_limit_takes_the_first_and_origin_is_told():
    everything = load_documents("builtin")
    assert load_documents("builtin", limit=3) == everything[:3]
    source = load_text("builtin:eval", limit=2)
    assert source.name == "builtin:eval"
    assert len(source.documents) == 2
    assert f"CPython {sys.version_info.major}.{sys.version_info.minor}" in source.origin
    assert "eval part" in source.origin
    with pytest.raises(EvalError, match="limit is 0"):
        load_documents("builtin", limit=0)


def test_a_text_file_is_one_document_as_it_stands_but_for_its_line_ends(tmp_path):
    text = " first\r\n\n\tsecond \u2028 Zürich \n\n"
    for name in ("text.txt", "README.md", "no-suffix"):
        path = tmp_path / name
        path.write_bytes(text.encode())
        assert load_documents(str(path)) == [text.replace("\r\n", "\n")]


def test_a_list_passes_through():
    assert load_documents(["a", "", " b "]) == ["a", "", " b "]
    assert load_documents(["a", "b"], limit=1) == ["a"]
    with pytest.raises(EvalError, match="document 1 of the list is a int"):
        load_documents(["a", 3])


def test_json_lines(tmp_path):
    rows = [{"text": "one\u2028\n", "code": "x"}, {"text": "", "code": "y"}, {"text": "three", "code": "z"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert load_documents(str(path)) == ["one\u2028\n", "", "three"]
    assert load_documents(f"{path}:code", limit=2) == ["x", "y"]
    with pytest.raises(EvalError, match=r"line 1: no field 'body'; the fields are text, code; .*:FIELD"):
        load_documents(f"{path}:body")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not JSON"),
        ('["a"]', "line 2: a list, not an object"),
        ('{"text": 3}', "line 2: field 'text' is a int"),
        ("{}", r"line 2: no field 'text'; the fields are \(none\)"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(EvalError, match=message):
        load_documents(str(path))
    assert load_documents(str(path), limit=1) == ["fine"]


def test_what_is_not_there_is_named_with_what_is_near(tmp_path):
    (tmp_path / "calibration.txt").write_text("text")
    with pytest.raises(EvalError, match=r"calibratoin.txt: not found; did you mean .*calibration\.txt\?"):
        load_documents(str(tmp_path / "calibratoin.txt"))
    with pytest.raises(EvalError, match="there is no folder"):
        load_documents(str(tmp_path / "nowhere" / "text.txt"))
    with pytest.raises(EvalError, match=r"rows\.jsonl: not found"):
        load_documents(str(tmp_path / "rows.jsonl:field"))
    with pytest.raises(EvalError, match="is a folder; name one file"):
        load_documents(str(tmp_path))


def test_what_is_no_source_is_told_what_is():
    for source in ("builtin:train", "wikitext", "a:b", ""):
        with pytest.raises(EvalError, match="builtin, builtin:eval, python-code"):
            load_documents(source)
    with pytest.raises(EvalError, match="give a list of strings"):
        load_documents("Once upon a time\nthere was")


def test_no_text_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n\n")
    for source in (str(path), [], ["", " "]):
        with pytest.raises(EvalError, match="no text in it"):
            load_documents(source)
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(EvalError, match="byte 3 is not UTF-8"):
        load_documents(str(path))


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"text": f"row {i}", "number": i}) for i in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_data_set_from_a_folder(folder):
    assert load_documents(f"{folder}::train:text", limit=2) == ["row 0", "row 1"]
    assert load_documents(f"{folder}:default:train:text") == [f"row {i}" for i in range(4)]
    with pytest.raises(EvalError, match="no column 'body'; the columns are text, number"):
        load_documents(f"{folder}::train:body")
    with pytest.raises(EvalError, match="column 'number' is a int"):
        load_documents(f"{folder}::train:number")
    with pytest.raises(EvalError, match="cannot be read"):
        load_documents(f"{folder}::test:text")
    with pytest.raises(EvalError, match="only the config may be empty"):
        load_documents(f"{folder}:::text")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EvalError, match=r"'some/set' cannot be read .*hub cannot be reached.*local .txt"):
        load_documents("some/set::train:text")
