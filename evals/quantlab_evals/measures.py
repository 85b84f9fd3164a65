"""What can be an axis: every measure of a variant, which way is better, and how it came about.

Predicted figures have measures of their own (`predicted:DEVICE`), so that no axis holds both kinds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import EvalError

PREDICTED = "predicted:"


@dataclass(frozen=True)
class Measure:
    """One figure of a variant.

    Attributes:
        name: the key under which records hold it.
        label: for people.
        unit: after the figure; empty for a pure number.
        higher_is_better: or lower.
        logarithmic: differences of it are ratios; it is drawn, and looked for a knee, on a logarithmic axis.
        resolution: figures that are closer than that are the same, when points are compared; in its unit.
        how: how it was measured.
        predicted: it was computed and not measured.
    """

    name: str
    label: str
    unit: str
    how: str
    higher_is_better: bool = False
    logarithmic: bool = False
    resolution: float = 0.0
    predicted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        return asdict(self)


_LIST = (
    # A table that is shorter by a value is no merit.
    Measure("bits", "bits a weight", "bits", "of the quantized layers, everything that is stored counted: codes, "
            "scales, zeros, tables, low-rank factors", resolution=0.01),
    Measure("model_bits", "bits a weight, whole model", "bits", "of all weights, embeddings included: 8 x bytes of the "
            "weight files / weights of the original", resolution=0.01),
    Measure("bytes", "size", "MB", "of the weight files; of another tool's model that exists in memory only, of its "
            "tensors and their scales", logarithmic=True, resolution=0.1),
    Measure("ppl", "perplexity", "", "exp of the mean negative log-likelihood over the windows", logarithmic=True),
    Measure("kl", "KL divergence", "nats", "KL(original || variant) of the next-token distributions, mean over tokens",
            logarithmic=True),
    Measure("kl_p99", "KL divergence, 99th percentile", "nats", "over tokens", logarithmic=True),
    Measure("agreement", "top-1 agreement", "%", "share of positions where the variant and the original rank the same "
            "token first", higher_is_better=True),
    Measure("flips", "flips", "%", "share of positions where one of the two ranks the text's token first and the other "
            "does not"),
    Measure("ece", "calibration error (ECE)", "", "confidence against being right, 15 bins of equal width"),
    Measure("ks", "calibration error (KS)", "", "largest difference of the cumulative sums of confidence and being "
            "right"),
    Measure("brier", "Brier score", "", "squared difference of probabilities and truth"),
    Measure("output_error", "error of the outputs", "", "squared, relative to the outputs; mean over layers",
            logarithmic=True),
    Measure("weight_error", "error of the weights", "", "squared, relative to the weights; mean over layers",
            logarithmic=True),
    Measure("decode", "decoding", "tokens/s", "one prompt, greedy, on a static cache", higher_is_better=True,
            logarithmic=True),
    Measure("prefill", "reading a prompt", "tokens/s", "one prompt", higher_is_better=True, logarithmic=True),
    Measure("first_token", "time to the first token", "ms", "one prompt", logarithmic=True),
    Measure("times_faster", "decoding, times the original's speed", "x", "median over rounds of the ratio in a round; "
            "the two in turns", higher_is_better=True, logarithmic=True),
    Measure("memory", "peak memory, running", "MB", "of a process of its own, libraries not counted", logarithmic=True),
    Measure("load_seconds", "loading", "s", "in a process of its own", logarithmic=True),
    Measure("quantize_seconds", "quantizing", "s", "wall clock, where the run was not interrupted", logarithmic=True),
)  # fmt: skip
MEASURES = {measure.name: measure for measure in _LIST}


def measure_called(name: str) -> Measure:
    """A measure by its name; ``predicted:DEVICE`` is the bound of decoding on a device that was not here.

    Raises:
        EvalError: there is none.
    """
    if name.startswith(PREDICTED) and (device := name.removeprefix(PREDICTED)):
        return Measure(
            name,
            f"decoding on {device}, predicted",
            "tokens/s",
            f"the roofline of {device}: a bound that no program reaches, computed from the recipe, not measured",
            higher_is_better=True,
            logarithmic=True,
            predicted=True,
        )
    if name not in MEASURES:
        raise EvalError(f"measure {name!r}: use one of {', '.join(MEASURES)}, or {PREDICTED}DEVICE")
    return MEASURES[name]
