"""Post-training quantization of Hugging Face models: small, fast, and measured.

After ``import quantlab`` a plain ``AutoModelForCausalLM.from_pretrained(folder)`` loads a quantized model. Importing
is cheap: the parts below are imported when they are first used, and the checkpoint format is registered with
transformers as soon as transformers' models are imported, before or after.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from quantlab.allocation.plan import Plan
    from quantlab.benchmark import Bench, bench
    from quantlab.checkpoint.adapter import save_adapter
    from quantlab.checkpoint.load import load
    from quantlab.comparison import Comparison, compare
    from quantlab.engine.estimate import Estimate
    from quantlab.engine.quantize import Result, dry_run, quantize
    from quantlab.errors import QuantlabError
    from quantlab.evaluation import Evaluation, evaluate, evaluate_variants
    from quantlab.export import Export, export
    from quantlab.formats import DescribedFormat, formats
    from quantlab.inspection import Inspection, inspect
    from quantlab.planning import plan
    from quantlab.prediction import Roofline, roofline
    from quantlab.recipe import Recipe, Scheme, load_recipe, ready_recipes
    from quantlab.verification import Verification, verify

__all__ = [
    "Bench",
    "Comparison",
    "DescribedFormat",
    "Estimate",
    "Evaluation",
    "Export",
    "Inspection",
    "Plan",
    "QuantlabError",
    "Recipe",
    "Result",
    "Roofline",
    "Scheme",
    "Verification",
    "bench",
    "compare",
    "dry_run",
    "evaluate",
    "evaluate_variants",
    "export",
    "formats",
    "inspect",
    "load",
    "load_recipe",
    "plan",
    "quantize",
    "ready_recipes",
    "roofline",
    "save_adapter",
    "verify",
]

_HOMES = {
    "Bench": "benchmark",
    "Comparison": "comparison",
    "DescribedFormat": "formats",
    "Estimate": "engine.estimate",
    "Evaluation": "evaluation",
    "Export": "export",
    "Inspection": "inspection",
    "Plan": "allocation.plan",
    "QuantlabError": "errors",
    "Recipe": "recipe",
    "Result": "engine.quantize",
    "Roofline": "prediction",
    "Scheme": "recipe",
    "Verification": "verification",
    "bench": "benchmark",
    "compare": "comparison",
    "dry_run": "engine.quantize",
    "evaluate": "evaluation",
    "evaluate_variants": "evaluation",
    "export": "export",
    "formats": "formats",
    "inspect": "inspection",
    "load": "checkpoint.load",
    "load_recipe": "recipe",
    "plan": "planning",
    "quantize": "engine.quantize",
    "ready_recipes": "recipe",
    "roofline": "prediction",
    "save_adapter": "checkpoint.adapter",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantlab' has no attribute {name!r}")
    return getattr(import_module(f"quantlab.{_HOMES[name]}"), name)


class _Api(ModuleType):
    """The package, in which a public name stays what it is where a module has it, too (``export``, ``formats``).

    Importing such a module would put it in the function's place.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Api

# Importing the plug-in registers it; it needs transformers' model classes, and nobody loads a model without them.
register_post_import_hook(lambda _: import_module("quantlab.checkpoint.plugin"), "transformers.modeling_utils")
