"""The commands that show, compare and pass on: models, recipes, formats, and help itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from processes import QUICK, run_process


def test_export_and_verify(call, quantized, place):
    pytest.importorskip("compressed_tensors")
    code, out, err = call("export", "w4", "--to", "compressed-tensors", "--out", "ct", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["exact"]
    assert len(document["layers"]) == 14
    code, out, err = call("export", "w4", "--to", "gguf", "--out", "w4.gguf")
    assert code == 0
    assert "14 layers: Q4_0" in out
    assert "every layer decodes to the same weight" in out
    code, out, err = call("verify", "ct")
    assert (code, err) == (0, "")
    assert "ok    its predictions are those of the codes" in out
    shutil.copytree(place / "w4", place / "broken")
    recipe = (place / "broken" / "recipe.yaml").read_text()
    (place / "broken" / "recipe.yaml").write_text(recipe.replace("int4", "int3"))
    code, out, err = call("verify", "broken")
    assert code == 2
    assert "layers are what the recipe says" in err
    assert "bits 4, where the recipe says 3" in err


def test_inspect_says_what_the_files_hold(call, quantized, place):
    code, out, err = call("inspect", "w4", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    totals = document["totals"]
    assert totals["bytes_quantized"] == sum(layer["bytes"] for layer in document["layers"])
    index = json.loads((place / "w4" / "model.safetensors.index.json").read_text())
    assert totals["bytes_quantized"] + totals["bytes_kept"] == index["metadata"]["total_size"]
    files = sum(file.stat().st_size for file in (place / "w4").glob("*.safetensors"))
    assert totals["bytes_on_disk"] == files == json.loads(quantized.stdout)["bytes"]
    assert totals["bits"] == pytest.approx(json.loads(quantized.stdout)["bits"])

    code, out, _ = call("inspect", "w4")
    assert code == 0
    assert len([line for line in out.splitlines() if line.startswith("model.layers.") and "int4/64" in line]) == 14
    code, out, _ = call("inspect", "w4", "--set", "sort=error", "--set", "limit=2")
    assert "and 12 more layers" in out
    code, out, _ = call("inspect", "w4", "--fold")
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj +2 +int4/64", out)


def test_a_pipe_that_nobody_reads_is_no_error(quantized, place):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "quantlab.cli", "inspect", "w4"]
    done = subprocess.run(command, cwd=place, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_compare_says_one_document_and_its_progress_elsewhere(place):
    grid = "formats=int4,int3 quantizers=rtn,gptq groups=32,channel,48"
    arguments = ["--calibration", "text.txt", *QUICK, "--blocks", "1", "--plot", "plot.html", "--json"]
    done = run_process("compare", "model", "--grid", grid, *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [entry["variant"] for entry in document["variants"]][:3] == [
        "int4/32 rtn",
        "int4/channel rtn",
        "int4/32 gptq",
    ]
    assert len(document["variants"]) == 8
    assert {entry["scheme"]["granularity"] for entry in document["skipped"]} == {48}
    assert all(len(entry["layers"]) == 7 for entry in document["variants"])
    assert "7 layers in 2 blocks, each quantized in 8 ways" in done.stderr
    assert "Traceback" not in done.stderr
    page = (place / "plot.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert [entry["name"] for entry in data["variants"]] == [entry["variant"] for entry in document["variants"]]
    assert {measure["name"] for measure in data["measures"]} >= {"bits", "output_error", "weight_error"}
    assert len(data["failed"]) == 4
    assert not re.search("<(script|link)[^>]*http", page), "it needs no network"


def test_compare_for_a_person(call):
    code, out, _ = call("compare", "model", "--grid", "formats=int4,int3 search=absmax,mse", "--layers", "*.o_proj")
    assert code == 0
    lines = out.splitlines()
    rows = [re.split(r" {2,}", line.removeprefix("*").strip()) for line in lines if " rtn " in line]
    assert [row[0] for row in rows] == [
        "int3/64 rtn mse",
        "int3/64 rtn absmax",
        "int4/64 rtn mse",
        "int4/64 rtn absmax",
    ]
    assert [line.startswith("*") for line in lines if " rtn " in line] == [True, False, True, False]
    assert "2 layers that match *.o_proj" in out
    assert "--outputs" in out, "no method needed inputs"
    assert "output error" not in out


def test_recipes(call):
    code, out, _ = call("recipes")
    assert code == 0
    assert "w4-gptq" in out
    listed = json.loads(call("recipes", "--json")[1])["recipes"]
    files = {file.stem for file in (Path(__file__).parents[2] / "recipes").glob("*.yaml")}
    assert {entry["name"] for entry in listed} == files
    assert all(entry["description"] for entry in listed)
    text = call("recipes", "w4-gptq")[1]
    assert text.startswith("# ")
    assert yaml.safe_load(text)["quantizer"] == "gptq"
    changed = call("recipes", "w4-gptq", "--set", "format=int3", "--set", "calibration.samples=8")[1]
    assert yaml.safe_load(changed)["format"] == "int3"
    assert yaml.safe_load(changed)["calibration"]["samples"] == 8


def test_formats(call, tmp_path):
    code, out, _ = call("formats", "--plot", str(tmp_path / "new" / "formats.svg"))
    assert code == 0
    assert "e3m2" in out
    listed = json.loads(call("formats", "--json")[1])["formats"]
    by_name = {entry["name"]: entry for entry in listed}
    assert by_name["e3m2"]["highest"] == 28
    assert by_name["e2m1"]["bits_per_weight"]["16, e4m3"] == pytest.approx(4.5, abs=0.01)
    picture = ElementTree.fromstring((tmp_path / "new" / "formats.svg").read_text(encoding="utf-8"))
    texts = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert set(by_name) <= texts
    ticks = [path.get("d").count("M") for path in picture.iter("{http://www.w3.org/2000/svg}path")]
    assert ticks == [len(entry["values"]) for entry in listed]


def test_the_picture_of_the_docs_is_what_the_command_draws(call, tmp_path):
    call("formats", "--plot", str(tmp_path / "formats.svg"))
    committed = Path(__file__).parents[2] / "docs" / "formats.svg"
    drawn = (tmp_path / "formats.svg").read_text(encoding="utf-8")
    # Where numbers are fitted the last digits may differ from one machine to the next.
    assert re.sub(r"\d+\.\d+", "", drawn) == re.sub(r"\d+\.\d+", "", committed.read_text(encoding="utf-8"))


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0
    assert re.match(r"quantlab \d+\.\d+\.\d+ \(torch ", out)


def test_help_shows_examples_that_work(call, quantized, place):
    """The demo model stands for any: here the tiny one takes its place."""
    shown = []
    for command in ([], ["quantize"], ["eval"], ["eval-generation"], ["inspect"], ["compare"], ["recipes"]):
        code, out, _ = call(*command, "--help")
        assert code == 0
        lines = out.partition("Example")[2].splitlines()
        shown += [line.strip() for line in lines if line.strip().startswith("quantlab ")]
    assert len(shown) == 15
    (place / "demo-w4").symlink_to(place / "w4")
    for number, line in enumerate(shown):
        words = shlex.split(line.partition(">")[0])[1:]
        if words[:1] == ["quantize"]:
            words[words.index("--out") + 1] = f"example-{number}"
        words = ["model" if word == "demo" else word for word in words]
        code, _, err = call(*words)
        assert code == 0, (line, err)


def test_help_and_recipes_do_not_import_torch(place):
    """Importing torch and transformers takes seconds; asking how a command is called must not."""
    watched = "import sys; from quantlab.cli.app import app; app(['{}'], standalone_mode=False)"
    for command in ("--help", "recipes"):
        done = subprocess.run(
            [sys.executable, "-c", watched.format(command) + "; print('torch' in sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "False", command
