from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.numerics import choose_scales, grid
from quantlab.quantizers import make_quantizer
from quantlab.recipe import Calibration, Recipe, Scheme, from_dict, load_recipe, matches, ready_recipes

FULL = {
    "name": "mine",
    "description": "All keys.",
    "format": "int3",
    "granularity": "channel",
    "symmetric": False,
    "scale_search": "mse",
    "scale_dtype": "float16",
    "quantizer": "gptq",
    "options": {"damping": 0.05, "order": "natural"},
    "compensation": "none",
    "compensation_options": {},
    "activations": "int8",
    "transforms": {},
    "layers": {
        "*.down_proj": {"format": "int8", "granularity": 32, "options": {"damping": 0.1}},
        r"re:model\.layers\.[01]\..*": {"quantizer": "rtn"},
        "lm_head": {"format": "none"},
    },
    "calibration": {"source": "text.txt", "samples": 3, "length": 17, "seed": 5, "bos": True},
}


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


@pytest.mark.parametrize("name", ready_recipes())
def test_ready_recipes(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe == ready_recipes()[name]
    assert len(recipe.description) > 40
    schemes = [recipe.default, *(recipe.scheme(pattern) for pattern in recipe.layers)]
    for scheme in schemes:
        make_quantizer(scheme.quantizer, scheme.options).needs(scheme)
    text = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
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


# --- anything that YAML can hold ---

KEYS = [field.name for field in dataclasses.fields(Scheme)]
OWN = ["name", "description", "layers", "calibration"]
PARTS = [field.name for field in dataclasses.fields(Calibration)]
GOOD = ["int4", "none", "channel", "tensor", "mse", "bfloat16", "gptq", "auto", "re:.*", "*", 64, True, None]
scalars = st.one_of(
    st.sampled_from(GOOD),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=3),
)
known = st.sampled_from(KEYS + OWN + PARTS)
names = st.one_of(known, st.text(max_size=4), st.integers(), st.none(), st.booleans())
patterns = st.one_of(names, st.text(max_size=6).map("re:".__add__))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=6,
)
schemes = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)
recipes = st.one_of(
    values,
    st.dictionaries(st.sampled_from(KEYS + OWN), values, max_size=4),
    st.fixed_dictionaries(
        {},
        optional={
            "layers": st.dictionaries(patterns, schemes, max_size=3),
            "calibration": st.dictionaries(st.sampled_from(PARTS), values, max_size=3),
            "options": st.dictionaries(names, values, max_size=2),
            "quantizer": st.sampled_from(["rtn", "gptq"]),
        },
    ),
)


def read(source, overrides=()):
    """Reads it or refuses it with a message; what is read can be used, written and read again."""
    try:
        recipe = load_recipe(source, overrides) if overrides else from_dict(source)
    except RecipeError:
        return
    assert recipe.default.keeps or recipe.default.bits <= 8
    assert isinstance(recipe.scheme("model.layers.0.mlp.down_proj"), Scheme)
    assert repr(from_dict(recipe.to_dict())) == repr(recipe)  # by repr, for NaN is not NaN


@settings(deadline=None, max_examples=400)
@given(recipes)
def test_any_mapping_is_read_or_refused(data):
    read(data)


paths = st.one_of(
    st.sampled_from(KEYS + OWN),
    st.sampled_from(PARTS).map("calibration.".__add__),
    st.lists(st.sampled_from([*KEYS, *OWN, "", "x", " "]), min_size=1, max_size=3).map(".".join),
    st.text(max_size=6),
)
texts = st.one_of(
    values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
    st.text(max_size=10),
    st.text("[]{}:,-#&*!|>'\"%@`?=0123456789e.x_ \n\t", max_size=8),
)


STRANGE = ["2024-99-99", "!!int x", "!!int ''", "!!bool x", "!!float x", "!!timestamp x"]
STRANGE += ["!!python/object:os x", "&a [*a]", "&a {x: *a}", "=", "<<", "{<<: 3}", "0x", "-:-", "1:99"]
STRANGE += ["\0", "\ud800", "1" * 5000, "[" * 999]


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: ascii(text)[:20])
@pytest.mark.parametrize("key", ["format", "name", "options", "options.damping", "layers", "calibration.seed"])
def test_strange_yaml_is_read_or_refused(key, text):
    read({}, [f"{key}={text}"])


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([FULL, {}]), st.lists(st.tuples(paths, texts).map("=".join), max_size=2))
def test_any_override_is_read_or_refused(source, overrides):
    read(source, ["format=int4", *overrides])


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=20))
def test_any_override_text_at_all(text):
    read(Recipe(), [text])
