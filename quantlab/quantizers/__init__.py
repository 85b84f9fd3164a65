"""Rounding methods: which code does each weight get? One file a method."""

from quantlab.quantizers import gptq, hqq, rtn  # noqa: F401 - entered in the registry by being imported
from quantlab.quantizers.base import Quantizer, make_quantizer, quantizer_names, quantizer_options, register

__all__ = ["Quantizer", "make_quantizer", "quantizer_names", "quantizer_options", "register"]
