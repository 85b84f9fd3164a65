from __future__ import annotations

import pytest

from quantlab.errors import QuantlabError
from quantlab.recipe import load_recipe
from quantlab.sweep import load_space, ready_spaces


def names(space, overrides=()):
    return [candidate.name for candidate in load_space(space, overrides).candidates]


def test_grids_are_combined_and_the_original_comes_first():
    space = {"grids": [{"formats": ["int", "nf"], "bits": [3, 4]}, {"formats": ["e2m3"], "quantizers": ["gptq"]}]}
    assert names(space) == ["original", "int3/64 rtn", "int4/64 rtn", "nf3/64 rtn", "nf4/64 rtn", "e2m3/64 gptq"]


def test_what_stands_twice_is_measured_once():
    space = {"grids": [{"bits": [3, 4]}, {"bits": [4]}], "variants": ["w4-rtn"]}
    assert names(space) == ["original", "int3/64 rtn", "int4/64 rtn"]


def test_whole_recipes_combine_with_data_and_schemes():
    space = {"grids": [{"recipes": ["awq-w4", "w3-gptq"], "calibration": ["builtin", "code.txt"], "samples": [8]}]}
    found = load_space(space).candidates[1:]
    assert [c.name for c in found] == [
        "awq-w4 on builtin",
        "awq-w4 on code.txt",
        "w3-gptq on builtin",
        "w3-gptq on code.txt",
    ]
    assert {c.recipe.calibration.samples for c in found} == {8}
    assert found[0].recipe.transforms == {"awq": {}}
    mixed = load_space({"grids": [{"recipes": ["awq-w4"], "bits": [3]}, {"transforms": ["none", "hadamard"]}]})
    assert [list(c.recipe.transforms) for c in mixed.candidates[1:]] == [["awq"], [], ["hadamard"]]
    assert mixed.candidates[1].recipe.default.format == "int3"


def test_exceptions_of_a_recipe_stay(tmp_path):
    (tmp_path / "mine.yaml").write_text("format: int4\nlayers: {'*.down_proj': {format: int8}}\n")
    (found,) = load_space({"recipe": str(tmp_path / "mine.yaml"), "grids": [{"bits": [3]}]}).candidates[1:]
    assert found.recipe.scheme("a.down_proj").format == "int8"
    assert found.recipe.scheme("a.up_proj").format == "int3"


def test_listed_variants_and_overrides():
    space = {
        "calibration": {"samples": 16},
        "variants": ["w4-gptq", {"recipe": "w4-gptq", "set": ["options.damping=0.05"], "name": "stiff"}],
    }
    _, plain, stiff = load_space(space, ["calibration.length=64"]).candidates
    assert plain.recipe.calibration.samples == 16
    assert plain.recipe.calibration.length == 64
    assert plain.recipe.default == load_recipe("w4-gptq").default
    assert stiff.name == "stiff"
    assert stiff.recipe.default.options["damping"] == 0.05


def test_baselines_are_named_as_they_are_loaded(tmp_path):
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"")
    space = {"baselines": ["bitsandbytes:nf4", "torchao:int8", str(tmp_path / "m.Q4_K_M.gguf")]}
    found = load_space(space).candidates[1:]
    assert [c.name for c in found] == ["bitsandbytes nf4", "torchao int8", "m.Q4_K_M.gguf"]
    assert [c.labels()["quantizer"] for c in found] == ["bitsandbytes", "torchao", "gguf"]
    assert {c.kind for c in found} == {"baseline"}


def test_the_ready_space_has_what_a_front_needs():
    assert "front" in ready_spaces()
    candidates = load_space("front").candidates
    assert len(candidates) > 20
    formats = {c.labels()["format"] for c in candidates if c.recipe}
    assert {f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)} | {"nf4", "e2m3", "power4"} <= formats
    assert {c.labels()["quantizer"] for c in candidates} >= {"rtn", "gptq", "bitsandbytes"}
    assert {c.labels()["compensation"] for c in candidates} > {"none"}


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "has no variant"),
        ({"gird": []}, "unknown key 'gird'"),
        ({"grids": {"bits": [3]}}, "grids: expected a list"),
        ({"grids": [{"bit": [3]}]}, "unknown axis 'bit'; axes are recipes, transforms, calibration, samples, formats"),
        ({"grids": [{"bits": [11]}]}, "format 'int11' is unknown"),
        ({"variants": ["w4-gtpq"]}, "neither a file nor a ready recipe"),
        ({"variants": [{"name": "x"}]}, "use a recipe's name, or"),
        ({"baselines": ["bitsandbytes:nf5"]}, "kind out of nf4"),
        ({"baselines": ["other:nf4"]}, "neither a .gguf file nor one of bitsandbytes"),
        ({"baselines": ["absent.gguf"]}, "there is no file absent.gguf"),
        ({"calibration": [1], "variants": ["w4-rtn"]}, "calibration: expected a mapping"),
        ("absent", "neither a file nor a ready space; ready are: front"),
    ],
)
def test_what_cannot_be_is_refused(space, words):
    with pytest.raises(QuantlabError) as refused:
        load_space(space)
    assert words in str(refused.value)
