"""The recipe that tests of the engine change."""

W4_GPTQ = {"format": "int4", "granularity": 16, "quantizer": "gptq", "scale_dtype": "float16"}
