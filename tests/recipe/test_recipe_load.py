"""Recipes by name and from files, and overrides of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from full_recipe import FULL

from quantlab.errors import RecipeError
from quantlab.quantizers import make_quantizer
from quantlab.recipe import from_dict, load_recipe, ready_recipes


@pytest.mark.parametrize("name", ready_recipes())
def test_ready_recipes(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe == ready_recipes()[name]
    assert len(recipe.description) > 40
    schemes = [recipe.default, *(recipe.scheme(pattern) for pattern in recipe.layers)]
    for scheme in schemes:
        make_quantizer(scheme.quantizer, scheme.options).needs(scheme)
    text = (Path(__file__).parents[2] / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# "), "a ready recipe says first when to use it"


def test_the_ready_recipes_are_there():
    named = {"w4-gptq", "w4-rtn", "fp6-rtn", "fp6-gptq", "power4", "nf4", "nf4-gptq", "mxfp4", "mxfp8", "nvfp4"}
    assert named | {"w4-codebook", "glm130b-int4", "hqq-w4", "w8a8", "fp8"} <= set(ready_recipes())


def test_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(FULL), encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == from_dict(FULL)
    path.write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(path)
    path.write_text("format: [int4", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml is not valid YAML"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(RecipeError, match=r"mine\.yaml.*cannot be read"):
        load_recipe(path)


def test_a_file_wins_over_a_ready_recipe_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "w4-rtn").write_text("format: int7", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("w4-rtn").default.format == "int7"


@pytest.mark.parametrize("name", ["w4-gtpq", "no/such.yaml", "", "a" * 5000, "nul\0", "../recipes/w4-rtn"])
def test_recipes_that_are_not_there(name):
    with pytest.raises(RecipeError, match=r"^recipe "):
        load_recipe(name)
    with pytest.raises(RecipeError, match=r"did you mean w4-gptq.*ready are: .*w4-rtn"):
        load_recipe("w4-gtpq")


# --- overrides ---


def test_overrides_are_dotted_and_yaml():
    recipe = load_recipe(
        "w4-gptq",
        [
            "format=int3",
            "granularity=channel",
            "symmetric=false",
            "calibration.samples=7",
            " calibration.source = a=b.txt",
            "options.damping=1e-3",
            "layers={'*.down_proj': {format: int8}}",
        ],
    )
    before = load_recipe("w4-gptq")
    scheme = recipe.default
    assert (scheme.format, scheme.granularity, scheme.symmetric) == ("int3", "channel", False)
    assert scheme.options == {**before.default.options, "damping": 0.001}
    assert recipe.calibration == dataclasses.replace(before.calibration, samples=7, source="a=b.txt")
    assert recipe.scheme("x.down_proj").format == "int8"
    assert load_recipe("w4-gptq") == before, "nothing is written to"


def test_the_last_override_of_a_key_wins():
    assert load_recipe({}, ["format=int3", "format=int5"]).default.format == "int5"


@pytest.mark.parametrize("step", [1, -1], ids=["options-first", "quantizer-first"])
def test_an_override_of_the_quantizer_drops_the_recipes_options(step):
    overrides = ["options.block=8", "quantizer=gptq"][::step]
    assert load_recipe("w4-gptq", ["quantizer=rtn"]).default.options == {}
    assert load_recipe("w4-gptq", ["quantizer=gptq"]).default == load_recipe("w4-gptq").default
    base = {"quantizer": "rtn", "options": {"something": 1}}
    assert load_recipe(base, overrides).default.options == {"block": 8}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", ".1e-2", "0.001", "1.0e-3"])
def test_small_numbers_are_numbers(text):
    assert load_recipe({}, [f"options.damping={text}"]).default.options["damping"] == 0.001


@pytest.mark.parametrize("text", ["e3", "1e", "1e-3x", "int4e2"])
def test_what_only_looks_like_a_number_is_text(text):
    assert load_recipe({}, [f"options.x={text}"]).default.options["x"] == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("format", "expected key=value"),
        ("=int4", "expected key=value"),
        ("  =int4", "expected key=value"),
        ("", "expected key=value"),
        ("formt=int4", r"unknown key 'formt'.*did you mean format"),
        ("calibration.sample=4", r"calibration: unknown key 'sample'.*did you mean samples"),
        ("format.x=1", r"format\.x: format is 'int4', which has no parts; use format=value"),
        ("calibration.samples.x=1", r"samples is 64, which has no parts"),
        ("format=[int4", r"--set format=\[int4 is not valid YAML"),
        ("name=2024-99-99", "is not valid YAML"),
        ("format=int99", r"format 'int99' is unknown; use a name such as int4"),
        ("format=", "format None"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({}, [override])


@pytest.mark.parametrize("override", ["format=int4", "options.x=1"])
def test_overrides_of_what_is_no_recipe(tmp_path, override):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="a recipe is a mapping of keys to values, not list"):
        load_recipe(path, [override])
