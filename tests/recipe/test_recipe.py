"""What recipes say of layers, and what they are not allowed to say."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import yaml
from full_recipe import FULL
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.numerics import choose_scales, grid
from quantlab.recipe import Calibration, Recipe, Scheme, from_dict, load_recipe, matches


def refused(data) -> str:
    with pytest.raises(RecipeError) as caught:
        from_dict(data)
    return str(caught.value)


# --- reading and writing ---


def test_every_key_arrives():
    recipe = from_dict(FULL)
    assert recipe.default == Scheme(
        "int3",
        "channel",
        False,
        "mse",
        "float16",
        "gptq",
        {"damping": 0.05, "order": "natural"},
        activations="int8",
    )
    assert recipe.calibration == Calibration("text.txt", 3, 17, 5, True)
    assert (recipe.name, recipe.description) == ("mine", "All keys.")
    assert list(recipe.layers) == list(FULL["layers"])


@pytest.mark.parametrize("data", [FULL, {}, {"format": "none"}, {"layers": {"x": {"granularity": 8}}}])
def test_a_recipe_survives_yaml(data):
    recipe = from_dict(data)
    again = from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert load_recipe(recipe) == recipe
    assert load_recipe(data) == recipe
    if data is FULL:
        assert recipe.to_dict() == FULL


def test_nothing_means_the_defaults():
    assert from_dict({}) == Recipe()
    assert from_dict({"options": None, "layers": None, "calibration": None}) == Recipe()


def test_to_dict_hands_out_copies():
    recipe = from_dict(FULL)
    recipe.to_dict()["options"]["damping"] = 9
    recipe.to_dict()["layers"]["lm_head"]["format"] = "int2"
    assert recipe == from_dict(FULL)


# --- layers ---


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("*.down_proj", "model.down_proj.x", False),
        ("model.layers.?.*", "model.layers.7.q", True),
        ("model.layers.?.*", "model.layers.17.q", False),
        ("model.layers.[02].*", "model.layers.2.q", True),
        ("LM_HEAD", "lm_head", False),
        (r"re:model\.layers\.(0|1)\..*_proj", "model.layers.1.q_proj", True),
        (r"re:model\.layers\.(0|1)\..*_proj", "model.layers.11.q_proj", False),
        (r"re:layers", "model.layers.0", False),
        (r"re:.*layers.*", "model.layers.0", True),
    ],
)
def test_patterns_match_the_whole_name(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_the_last_pattern_that_matches_wins_key_by_key():
    recipe = from_dict(
        {
            "format": "int4",
            "granularity": 64,
            "layers": {
                "*.mlp.*": {"format": "int3", "granularity": 32},
                "*.down_proj": {"format": "int8"},
                "re:.*up_proj": {"granularity": "channel"},
            },
        }
    )
    expected = {"mlp.down_proj": ("int8", 32), "mlp.up_proj": ("int3", "channel"), "attn.q": ("int4", 64)}
    for name, resolved in expected.items():
        scheme = recipe.scheme(f"model.layers.0.{name}")
        assert (scheme.format, scheme.granularity) == resolved


def test_options_merge_under_one_quantizer_and_go_with_it():
    recipe = from_dict(
        {
            "quantizer": "gptq",
            "options": {"damping": 0.05, "order": "natural"},
            "layers": {
                "a": {"options": {"damping": 0.5}},
                "b": {"quantizer": "rtn"},
                "c": {"quantizer": "rtn", "options": None},
                "d": {"quantizer": "gptq", "options": {"block": 8}},
                "*b*": {"format": "int8"},
                "bb": {"quantizer": "gptq", "options": {"asym": 1}},
                "e": {"options": None},
            },
        }
    )
    natural = {"damping": 0.05, "order": "natural"}
    assert recipe.scheme("other").options == natural
    assert recipe.scheme("a").options == {"damping": 0.5, "order": "natural"}
    assert (recipe.scheme("b").quantizer, recipe.scheme("b").options) == ("rtn", {})
    assert recipe.scheme("b").format == "int8"
    assert recipe.scheme("c").options == {}
    assert recipe.scheme("d").options == natural | {"block": 8}
    assert recipe.scheme("bb").options == natural | {"asym": 1}
    assert recipe.scheme("e").options == natural
    assert recipe.default.options == natural, "nothing is written to"


def test_a_scheme_resolves_to_what_torch_needs():
    assert Scheme(format="int3").known_format.grid is grid("int3")
    assert Scheme(format="none").known_format is None
    assert Scheme(format="none").keeps
    assert not Scheme().keeps


@pytest.mark.parametrize("granularity", [8, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["absmax", "mse", "second-moment"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_scheme_chooses_scales_as_it_says(granularity, symmetric, search, dtype):
    scheme = Scheme("int3", granularity, symmetric, search, dtype)
    weight, importance = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 9, 16)
    for part in (None, "channel"):
        chosen = scheme.choose_scales(weight, grid("int3"), importance, part)
        how = {"symmetric": symmetric, "search": search != "absmax", "importance": importance}
        expected = choose_scales(weight, grid("int3"), part or granularity, stored=dtype, **how)
        assert torch.equal(chosen[0], expected[0])
        assert chosen[0].dtype == getattr(torch, dtype)
        assert (chosen[1] is None) if symmetric else torch.equal(chosen[1], expected[1])


PATTERNS = ["a.q", "a.k", "b.q", "*.q", "a.*", "?.k", "[ab].q", "re:a.*", "re:.*[qk]", "[x]"]
NAMES = ["a.q", "a.k", "b.q", "b.k", "[x]", "x"]
CHANGES = st.fixed_dictionaries(
    {}, optional={"format": st.sampled_from(["int3", "int8"]), "granularity": st.sampled_from([8, 16])}
)


@given(st.lists(st.tuples(st.sampled_from(PATTERNS), CHANGES), unique_by=lambda line: line[0]))
def test_layers_get_what_going_through_all_patterns_gives(lines):
    recipe = from_dict({"layers": dict(lines)})
    for name in NAMES:
        expected = recipe.default
        for pattern, changes in lines:
            if matches(pattern, name):
                expected = dataclasses.replace(expected, **changes)
        assert recipe.scheme(name) == expected


# --- what is refused ---


@pytest.mark.parametrize(
    ("data", "key", "value", "remedy"),
    [
        ({"format": "int9"}, "format", "'int9'", "int4"),
        ({"format": 4}, "format", "4", "int4"),
        ({"format": None}, "format", "None", "none"),
        ({"format": ["int4"]}, "format", "['int4']", "int4"),
        ({"granularity": 0}, "granularity", "0", "'channel'"),
        ({"granularity": -64}, "granularity", "-64", "64"),
        ({"granularity": True}, "granularity", "True", "64"),
        ({"granularity": 64.0}, "granularity", "64.0", "64"),
        ({"granularity": "chanel"}, "granularity", "'chanel'", "'channel'"),
        ({"granularity": {}}, "granularity", "{}", "'tensor'"),
        ({"symmetric": "yes"}, "symmetric", "'yes'", "true or false"),
        ({"symmetric": 1}, "symmetric", "1", "true or false"),
        ({"scale_search": "max"}, "scale_search", "'max'", "absmax, mse, second-moment"),
        ({"scale_search": []}, "scale_search", "[]", "absmax"),
        ({"scale_dtype": "float8"}, "scale_dtype", "'float8'", "bfloat16"),
        ({"scale_dtype": {}}, "scale_dtype", "{}", "bfloat16"),
        ({"quantizer": 5}, "quantizer", "5", "gptq"),
        ({"quantizer": ["gptq"]}, "quantizer", "['gptq']", "gptq"),
        ({"options": [1]}, "options", "[1]", "mapping"),
        ({"options": 0}, "options", "0", "mapping"),
        ({"quantizer": "gptq", "options": "fast"}, "options", "'fast'", "mapping"),
        ({"layers": ["a"]}, "layers", "['a']", "mapping"),
        ({"layers": False}, "layers", "False", "mapping"),
        ({"layers": {"a": "int8"}}, "layers['a']", "'int8'", "{format: int8}"),
        ({"layers": {"a": {"format": "int99"}}}, "layers['a']: format", "'int99'", "int4"),
        ({"layers": {"a": {"options": 3}}}, "layers['a']: options", "3", "mapping"),
        ({"layers": {7: {"format": "int8"}}}, "layers[7]", "7", "quotes"),
        ({"layers": {None: {}}}, "layers[None]", "None", "quotes"),
        ({"layers": {"re:(": {}}}, "pattern", "'re:('", "not a regular expression"),
        ({"layers": {"re:a{99999999999}": {}}}, "pattern", "'re:a{99999999999}'", "not a regular expression"),
        ({"calibration": 5}, "calibration", "5", "mapping"),
        ({"calibration": {"samples": 0}}, "calibration.samples", "0", "at least 1"),
        ({"calibration": {"samples": "64"}}, "calibration.samples", "'64'", "whole number"),
        ({"calibration": {"samples": True}}, "calibration.samples", "True", "whole number"),
        ({"calibration": {"length": 1}}, "calibration.length", "1", "at least 2"),
        ({"calibration": {"seed": -1}}, "calibration.seed", "-1", "at least 0"),
        ({"calibration": {"bos": "yes"}}, "calibration.bos", "'yes'", "auto"),
        ({"calibration": {"bos": 1}}, "calibration.bos", "1", "auto"),
        ({"calibration": {"source": None}}, "calibration.source", "None", "builtin"),
        ({"calibration": {"source": ["a"]}}, "calibration.source", "['a']", "builtin"),
        ({"name": None}, "name", "None", "text"),
        ({"description": 3}, "description", "3", "text"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_remedy(data, key, value, remedy):
    message = refused(data)
    for part in (key, value, remedy):
        assert part in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"fromat": "int4"}, r"the recipe: unknown key 'fromat' \(did you mean format"),
        ({"group_size": 64}, r"the recipe: unknown key 'group_size'"),
        (
            {"zzz": 1},
            "unknown key 'zzz'; allowed are activations, calibration, compensation",
        ),
        ({"layers": {"a": {"bits": 4}}}, r"layers\['a'\]: unknown key 'bits'"),
        ({"layers": {"a": {"layers": {}}}}, r"layers\['a'\]: unknown key 'layers'"),
        ({"layers": {"a": {"granularty": 4}}}, r"layers\['a'\]: .*did you mean granularity"),
        ({"calibration": {"lenght": 4}}, r"calibration: unknown key 'lenght' \(did you mean length"),
        ({1: 2}, "unknown key 1"),
        ({None: 2}, "unknown key None"),
        ({True: 2}, "unknown key True"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(data, message):
    assert re.search(message, refused(data))


@pytest.mark.parametrize("data", [None, [], "w4", 3, [("format", "int4")]])
def test_what_is_not_a_mapping_is_no_recipe(data):
    assert "a recipe is a mapping of keys to values" in refused(data)


def test_a_recipe_built_in_code_is_checked_when_it_is_loaded():
    for recipe in (Recipe(layers={"a": {"bogus": 1}}), Recipe(layers={"a": {"format": "int99"}})):
        with pytest.raises(RecipeError, match=r"layers\['a'\]"):
            load_recipe(recipe)
        with pytest.raises(RecipeError, match=r"layers\['a'\]"):
            recipe.scheme("a")
