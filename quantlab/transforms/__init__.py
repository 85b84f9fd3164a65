"""Transforms: how a model is rewritten, with the same output, before it is quantized. One file a method."""

from quantlab.transforms import hadamard  # noqa: F401 - entered in the registry by being imported
from quantlab.transforms.base import Transform, make_transform, register, transform_names
from quantlab.transforms.hadamard import Hadamard

__all__ = ["Hadamard", "Transform", "make_transform", "register", "transform_names"]
