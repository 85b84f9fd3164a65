"""A recipe with every key."""

from __future__ import annotations

FULL = {
    "name": "mine",
    "description": "All keys.",
    "format": "int3",
    "granularity": "channel",
    "symmetric": False,
    "scale_search": "mse",
    "scale_dtype": "float16",
    "quantizer": "gptq",
    "options": {"damping": 0.05, "order": "natural"},
    "compensation": "none",
    "compensation_options": {},
    "activations": "int8",
    "transforms": {},
    "layers": {
        "*.down_proj": {"format": "int8", "granularity": 32, "options": {"damping": 0.1}},
        r"re:model\.layers\.[01]\..*": {"quantizer": "rtn"},
        "lm_head": {"format": "none"},
    },
    "calibration": {"source": "text.txt", "samples": 3, "length": 17, "seed": 5, "bos": True},
}
