"""Does a quantized model load as it will be loaded, and say what was quantized? In a process of its own."""

from quantlab.verification.verify import Check, Verification, verify

__all__ = ["Check", "Verification", "verify"]
