from __future__ import annotations

import csv
import json
import shutil

import pytest
import yaml

from quantlab.cli.app import main


@pytest.fixture
def call(capsys):
    """Run a command: its exit code, standard output, standard error."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def done(swept, tmp_path):
    """A copy of a finished sweep."""
    shutil.copytree(swept.folder, tmp_path / "done")
    return tmp_path / "done"


def test_sweep_says_a_line_a_variant_and_goes_on(call, place, space, tmp_path):
    small = {**space, "grids": [{"bits": [3, 4], "groups": [32]}], "baselines": []}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(small))
    arguments = ["sweep", place / "model", "--space", tmp_path / "space.yaml", "--out", tmp_path / "out"]
    arguments += ["--text", place / "text.txt", "--windows", 4, "--length", 64, "--set", "calibration.samples=2"]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "1 of 3 original: bits 32.00, ppl" in err
    assert "3 of 3 int4/32 rtn: bits 4.6" in err
    assert "3 variants measured" in out
    assert (tmp_path / "out" / "report.html").stat().st_size < 6e6
    records = (tmp_path / "out" / "records.jsonl").read_text()
    assert '"samples": 2' in records
    code, out, err = call(*arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert "3 of them measured before" in err
    assert [record["variant"] for record in document["records"]] == ["original", "int3/32 rtn", "int4/32 rtn"]
    assert (tmp_path / "out" / "records.jsonl").read_text() == records
    code, _, err = call(*arguments, "--set", "calibration.samples=3", "-q")
    assert code == 2
    assert "another space" in err


def test_speed_is_measured_in_turns_with_the_original(call, place, space, tmp_path):
    small = {"baselines": ["bitsandbytes:nf4"]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(small))
    code, out, err = call(
        *("sweep", place / "model", "--space", tmp_path / "space.yaml", "--out", tmp_path / "out", "--speed", "--json"),
        *("--text", place / "text.txt", "--windows", 2, "--length", 64, "-q", "--prompt", 16, "--new", 8),
    )
    assert code == 0, err
    original, measures = (record["measures"] for record in json.loads(out)["records"])
    assert original["times_faster"] is None
    assert measures["times_faster"] > 0
    for found in (original, measures):
        assert found["decode"] > 0
        assert found["first_token"] > 0
        assert found["memory"] > 0
    code, _, err = call("sweep", place / "model", "--out", tmp_path / "other", "--speed", "--ray")
    assert code == 2
    assert "--speed" in err
    code, _, err = call("sweep", place / "model", "--out", tmp_path / "other", "--speed", "--prompt", 1000)
    assert code == 2
    assert "max_position_embeddings, 128" in err
    code, _, err = call("sweep", place / "model", "--out", tmp_path / "other", "--devices", "h1000")
    assert code == 2
    code, _, err = call("sweep", place / "model", "--out", tmp_path / "other", "--device", "cuda:99")
    assert code == 2
    assert "device 'cuda:99' cannot be used here" in err
    code, _, err = call("sweep", place / "model", "--out", tmp_path / "other", "--device", "cuda:1", "--ray")
    assert code == 2
    assert "every variant gets a GPU of its own" in err
    assert not (tmp_path / "other").exists()


def test_pareto_answers(call, done, tmp_path):
    code, out, err = call(
        *("pareto", done, "--measures", "bits,kl", "--under", "bits=4", "--within", "ppl=50%"),
        *("--csv", tmp_path / "front.csv"),
    )
    assert code == 0, err
    assert "hypervolume" in out
    code, out, _ = call("pareto", done, "--under", "bits=4", "--within", "ppl=50%", "--json")
    document = json.loads(out)
    rows = {row["variant"]: row for row in document["variants"]}
    under = [row for row in rows.values() if row["bits"] <= 4]
    assert document["answers"][0]["variant"] == min(under, key=lambda row: row["kl"])["variant"]
    for row in document["front"]:
        better = [r for r in rows.values() if r["kl"] < row["kl"] and round(r["bits"], 2) <= round(row["bits"], 2)]
        assert not better, row
    written = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [row["variant"] for row in written if row["front"] == "1"]
    assert {row["variant"] for row in written if row["front"] == "1"} == {row["variant"] for row in document["front"]}
    assert float(written[1]["ppl"]) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--measures", "bits,speed"], "measure 'speed'"),
        (["--measures", "bits"], "two or three"),
        (["--measures", "bits,decode"], "no variant has all of bits, decode"),
        (["--under", "bits"], "expected MEASURE=NUMBER"),
        (["--within", "kl=1%"], "the original has no KL divergence"),
        (["--reference", "ppl=3"], "is none of the measures"),
    ],
)
def test_what_cannot_be_asked(call, done, arguments, words):
    code, _, err = call("pareto", done, *arguments)
    assert code == 2
    assert words in err


def test_the_report_and_its_pictures(call, done, tmp_path):
    code, out, err = call("report", done, "--out", tmp_path / "page.html", "--plots", tmp_path / "plots", "--json")
    assert code == 0, err
    assert json.loads(out)["report"] == str(tmp_path / "page.html")
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"front.svg", "size.svg"}
    assert call("report", tmp_path)[0] == 2
