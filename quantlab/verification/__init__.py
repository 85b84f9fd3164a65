"""Does a quantized model load as it will be loaded, and say what was quantized? In a process of its own."""

from quantlab.verification.device import verify
from quantlab.verification.verify import Check, Verification

__all__ = ["Check", "Verification", "verify"]
