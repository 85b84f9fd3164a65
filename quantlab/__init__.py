"""Post-training quantization of Hugging Face models: small, fast, and measured.

Importing quantlab registers its checkpoint format with transformers: afterwards a plain
``AutoModelForCausalLM.from_pretrained(folder)`` loads a quantized model.
"""

from quantlab.checkpoint import plugin as _plugin
from quantlab.checkpoint.load import load
from quantlab.engine.quantize import Result, quantize
from quantlab.errors import QuantlabError
from quantlab.recipe import Recipe, Scheme, load_recipe, ready_recipes

_plugin.register()

__all__ = ["QuantlabError", "Recipe", "Result", "Scheme", "load", "load_recipe", "quantize", "ready_recipes"]
