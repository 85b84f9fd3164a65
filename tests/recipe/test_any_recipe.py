"""Anything that YAML can hold is read, or refused with a message."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from full_recipe import FULL
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.recipe import Calibration, Recipe, Scheme, from_dict, load_recipe

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
