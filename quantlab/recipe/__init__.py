"""Recipes: what to do with each layer. YAML on disk, frozen dataclasses in memory.

A recipe names one choice on each axis (format, quantizer, ...) for all layers, and lists exceptions by
pattern. A mixed-precision plan is a recipe with one line a layer; nothing here treats it specially.
"""

from quantlab.recipe.load import load_recipe, parse_yaml, ready_recipes
from quantlab.recipe.recipe import Calibration, Recipe, from_dict, matches
from quantlab.recipe.scheme import Scheme, changed

__all__ = [
    "Calibration",
    "Recipe",
    "Scheme",
    "changed",
    "from_dict",
    "load_recipe",
    "matches",
    "parse_yaml",
    "ready_recipes",
]
