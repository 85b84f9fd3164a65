"""Made-up records of a sweep, in the shape in which `quantlab sweep` writes them."""

from __future__ import annotations

import math

BLOCKS = 12
KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
WINDOWS = 20
ABOUT = {"model": "tiny/<model> & co", "space": "front", "measurement": {"text": "text.txt", "speed": None}}


def swept(speed=True):
    """An original, ten formats by two methods, with and without repair, two baselines, and one that failed."""
    records = [_record("original", "original", 16.0, 0.0, {"format": "original", "quantizer": "original"}, speed)]
    for bits, name in [*((b + 0.25, f"int{b}") for b in (2, 3, 4, 5, 6, 8)), (4.25, "nf4"), (6.25, "e2m3")]:
        for method, factor in (("rtn", 1.0), ("gptq", 0.5)):
            kl = factor * 4.0 ** (3.4 - bits) * (0.85 if name == "nf4" else 1.0)
            labels = {"format": name, "group": "64", "quantizer": method, "compensation": "none", "transforms": "none"}
            records.append(_record(f"{name}/64 {method}", "quantized", bits, kl, labels, speed))
    for bits in (3, 4):
        labels = {"format": f"int{bits}", "group": "64", "quantizer": "gptq", "compensation": "qera-exact"}
        kl = 0.3 * 4.0 ** (3.4 - bits - 0.25)
        records.append(_record(f"int{bits}/64 gptq + qera-exact(rank=16)", "quantized", bits + 0.7, kl, labels, speed))
    for kind, bits, kl in (("nf4", 4.5, 0.26), ("int8", 8.05, 0.004)):
        labels = {"format": kind, "quantizer": "bitsandbytes", "compensation": "none", "transforms": "none"}
        records.append(_record(f"bitsandbytes {kind}", "baseline", bits, kl, labels, speed))
    failed = {"variant": "int4/48 rtn", "kind": "quantized", "labels": {}, "error": "576 is not <divisible> by 48"}
    return [*records, failed]


def _record(name, kind, bits, kl, labels, speed):
    ppl = 15.0 * math.exp(0.9 * kl)
    measures = {"bits": bits, "model_bits": 0.8 * bits + 3.2, "bytes": 13.5 * (0.8 * bits + 3.2), "ppl": ppl}
    measures |= {"ece": 0.01 + 0.01 * min(kl, 3), "quantize_seconds": 30.0 * kl + 1}
    evaluation = {
        "settings": {"windows": WINDOWS, "window_length": 512},
        "calibration": {"reliability": [_bin(place, kl) for place in range(15)]},
    }
    if kind != "original":
        measures |= {"kl": kl, "kl_p99": 9 * kl, "agreement": 100 * math.exp(-kl), "flips": 20 * min(kl, 1)}
        means = [kl * (1 + 0.3 * math.sin(7 * window + bits)) for window in range(WINDOWS)]
        clusters = {"kind": "windows", "tokens": [511] * WINDOWS, "means": means}
        evaluation["divergence"] = {"kl_clusters": clusters}
    if speed:
        measures |= {"decode": 90 / (0.3 + bits / 16), "memory": 40 * bits}
    if kind == "quantized":
        measures["predicted:rtx4090"] = 9000 / bits
    record = {"variant": name, "kind": kind, "labels": labels, "measures": measures, "evaluation": evaluation}
    if kind == "quantized":
        record["recipe"] = {"name": name, "format": labels["format"], "quantizer": labels["quantizer"]}
        record["layers"] = [
            {
                "layer": f"model.layers.{block}.{part}",
                "format": labels["format"],
                "bits": bits,
                "error": kl * 0.1 * (1 + block / 6) * (1 + place / 3),
                "metric": "output",
                "weights": 1000,
            }
            for block in range(BLOCKS)
            for place, part in enumerate(KINDS)
        ]
    return record


def _bin(place, kl):
    middle = (place + 0.5) / 15
    return {"count": 1000 // (1 + place), "confidence": middle, "accuracy": middle - 0.05 * min(kl, 2) * middle}
