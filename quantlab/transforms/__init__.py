"""Transforms: how a model is rewritten, with the same output, before it is quantized. One file a method."""

from quantlab.transforms.awq import Awq, Reader
from quantlab.transforms.base import Transform, make_transform, register, transform_names
from quantlab.transforms.hadamard import Hadamard

__all__ = ["Awq", "Hadamard", "Reader", "Transform", "make_transform", "register", "transform_names"]
