"""Grids: what they mean, in which order, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import yaml

from quantlab.compensation import register
from quantlab.errors import RecipeError
from quantlab.problem import Statistic
from quantlab.recipe import Scheme
from quantlab.registry import Registry
from quantlab.variants import Variant, expand, method_name

BASE = Scheme()


@pytest.fixture(autouse=True)
def _patch(monkeypatch):
    """A repair with two options, which the registry forgets again."""
    from quantlab.compensation.base import COMPENSATIONS

    monkeypatch.setattr(COMPENSATIONS, "_classes", dict(COMPENSATIONS._classes))

    @register("patch")
    @dataclass(frozen=True)
    class Patch:
        rank: int = 4
        strict: bool = False

        name: ClassVar[str]

        def needs(self, scheme):
            return Statistic.NONE


def names(grid, base=BASE):
    return [variant.name for variant in expand(grid, base)]


def test_the_last_axis_changes_fastest_and_the_rest_is_the_recipe():
    base = replace(BASE, scale_dtype="float16", symmetric=False)
    variants = expand("formats=int4,nf4 groups=32,channel", base)
    assert [variant.name for variant in variants] == [
        "int4/32 rtn",
        "int4/channel rtn",
        "nf4/32 rtn",
        "nf4/channel rtn",
    ]
    assert variants[1] == Variant("int4/channel rtn", replace(base, format="int4", granularity="channel"))
    assert names("groups=32,channel formats=int4,nf4")[:2] == ["int4/32 rtn", "nf4/32 rtn"]


def test_methods_take_options():
    variants = expand("quantizers=rtn,gptq(order=natural, damping=5e-2),gptq:0.1 compensation=none,patch:16", BASE)
    assert [variant.name for variant in variants] == [
        "int4/64 rtn",
        "int4/64 rtn + patch(rank=16)",
        "int4/64 gptq(order=natural,damping=0.05)",
        "int4/64 gptq(order=natural,damping=0.05) + patch(rank=16)",
        "int4/64 gptq(damping=0.1)",
        "int4/64 gptq(damping=0.1) + patch(rank=16)",
    ]
    assert variants[3].scheme.options == {"order": "natural", "damping": 0.05}
    assert variants[3].scheme.compensation_options == {"rank": 16}
    assert expand("compensation=patch(strict=true)", BASE)[0].scheme.compensation_options == {"strict": True}


def test_a_method_keeps_the_options_that_the_recipe_gives_it():
    base = replace(BASE, quantizer="gptq", options={"damping": 0.2})
    variants = expand("quantizers=gptq,gptq(order=natural),rtn", base)
    assert [variant.scheme.options for variant in variants] == [
        {"damping": 0.2},
        {"damping": 0.2, "order": "natural"},
        {},
    ]
    assert [variant.name for variant in variants] == [
        "int4/64 gptq",
        "int4/64 gptq(damping=0.2,order=natural)",
        "int4/64 rtn",
    ]
    assert method_name(variants[0].scheme) == "gptq(damping=0.2)"


def test_what_varies_is_in_the_name_and_nothing_comes_twice():
    assert names("symmetric=true,false search=absmax,mse scales=float16,e8m0")[::3] == [
        "int4/64 rtn float16 scales absmax symmetric",
        "int4/64 rtn e8m0 scales mse symmetric",
        "int4/64 rtn float16 scales mse asymmetric",
    ]
    assert names("formats=int4,int4 groups=64, channel , 64") == ["int4/64 rtn", "int4/channel rtn"]
    assert len(set(names("quantizers=rtn quantizers=gptq,gptq:0.3"))) == 3


def test_a_file_and_a_mapping_say_the_same(tmp_path):
    grid = {"formats": ["int4", "nf4"], "groups": [32, "channel"], "quantizers": ["rtn", {"gptq": {"damping": 0.1}}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    text = "formats=int4,nf4 groups=32,channel quantizers=rtn,gptq(damping=0.1)"
    expected = {variant.name: variant.scheme for variant in expand(text, BASE)}
    for same in (grid, tmp_path / "grid.yaml", str(tmp_path / "grid.yaml")):
        assert {variant.name: variant.scheme for variant in expand(same, BASE)} == expected
    assert names({"formats": "nf4"}) == ["nf4/64 rtn"]


def test_bits_are_a_part_of_the_format():
    def formats(grid):
        return [variant.scheme.format for variant in expand(grid, BASE)]

    assert formats("formats=int,nf bits=3,4") == ["int3", "int4", "nf3", "nf4"]
    assert formats("bits=2,8") == ["int2", "int8"], "of the recipe's family"
    assert formats({"formats": ["power", "codebook"], "bits": [3]}) == ["power3", "codebook3"]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("formats=in4", "format 'in4' is unknown"),
        ("formats=int4,none", "format none leaves a layer as it is"),
        ("quantizers=gtpq", "quantizer 'gtpq' is unknown; use one of gptq, hqq, rtn"),
        ("quantizers=gptq(dampnig=1)", "no option 'dampnig'"),
        ("quantizers=gptq(damping=2)", "damping 2"),
        ("quantizers=gptq(damping)", "'damping' is not option=value"),
        ("quantizers=rtn:3", "rtn has no options"),
        ("quantizers=gptq(damping=0.1", "'(' is not closed"),
        ("compensation=qera", "compensation 'qera' is unknown"),
        ("compensation=qera:16", "compensation 'qera' is unknown"),
        ("groups=0", "granularity 0"),
        ("groups=", "axis 'groups' has no values"),
        ("symmetric=maybe", "symmetric 'maybe'"),
        ("fromats=int4", "unknown axis 'fromats'; axes are formats, bits, groups"),
        ("formats=int,e2m3 bits=4", "e2m3 has one width"),
        ("formats=int", "format 'int' is unknown"),
        ("bits=9", "format 'int9' is unknown"),
        ("formats=int4 nf4", "'nf4' is not axis=value"),
        ("absent.yaml", "neither axis=value,... nor a YAML file"),
        ("", "neither axis=value,... nor a YAML file"),
        ({}, "use a mapping"),
        ({"formats": []}, "has no values"),
        ({"formats": [4]}, "format 4"),
        ({"quantizers": [4]}, "use a method's name"),
    ],
)
def test_what_cannot_be_is_refused(grid, words):
    with pytest.raises(RecipeError) as refused:
        expand(grid, BASE)
    assert words in str(refused.value)


def test_a_registry_knows_the_options_of_its_methods():
    empty: Registry = Registry("axis")
    with pytest.raises(RecipeError, match="axis 'x' is unknown"):
        empty.options("x")
