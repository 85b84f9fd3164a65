"""A program for a process of its own: load a folder as its users do, and say what it makes of the prompts.

    python fresh.py FOLDER DTYPE QUANTLAB < digest.json

``QUANTLAB`` is 1 where the folder is quantlab's own and it must be imported first; other formats are loaded by
transformers alone. Prints one line of JSON. It is run by its path, so that nothing of quantlab is imported unasked.
"""

import json
import sys
from importlib import import_module
from typing import Any


def main() -> None:
    """Load, run, print."""
    folder, dtype, ours = sys.argv[1:]
    request = json.load(sys.stdin)
    sys.path = [path for path in sys.path if not path.endswith("verification")]  # where this program lies
    try:
        print(json.dumps(_answer(folder, dtype, ours == "1", request)))
    except ImportError as error:
        print(json.dumps({"missing": " ".join(str(error).split())}))
    except Exception as error:  # whatever a loader raises is the finding
        print(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}))


def _answer(folder: str, dtype: str, ours: bool, request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if ours:
        import_module("quantlab")  # which registers the format
    prompts = torch.tensor(request["prompts"])
    model, info = _loaded(folder, dtype)
    with torch.no_grad():
        try:
            done = model(input_ids=prompts)
            decoded = _decoded(model)
        except RuntimeError:
            # compressed-tensors (0.20) decodes some formats to bfloat16, at the first forward, whatever a model is
            # loaded in. They stay decoded so, and are computed with in float32.
            decoded = _decoded(model)
            if ours or dtype == "auto" or not decoded:
                raise
            torch.nn.Module.float(model)
            done = model(input_ids=prompts)
        logits = done.logits if "logits" in done else done[0]
        logprobs = logits.float().log_softmax(-1).gather(-1, torch.tensor(request["tokens"])).tolist()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = None if head is None else getattr(head, "weight", 0) is getattr(embedding, "weight", 1)
    return {
        "logprobs": logprobs,
        "computed": _name(logits.dtype),
        "decoded": decoded,
        "odd": {key: sorted(map(str, value))[:4] for key, value in info.items() if value},
        "tied": shared,
        "ties": bool(model.config.get_text_config().tie_word_embeddings),
    }


def _loaded(folder: str, dtype: str) -> Any:
    """The model, and what transformers has to say of how it was loaded."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    named = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
    more = {}
    quantized = getattr(config, "quantization_config", None) or {}
    if quantized.get("quant_method") == "gptq":  # its plain kernel: others are compiled first, for minutes
        torch.compiler.set_stance("force_eager")
        more["quantization_config"] = transformers.GPTQConfig(bits=quantized["bits"], backend="gptq_torch")
    loaded: Any = named.from_pretrained(folder, dtype=dtype, output_loading_info=True, **more)
    model, info = loaded
    return model.eval(), info


def _decoded(model: Any) -> dict[str, str]:
    """The weights that were rounded to another dtype than float32 when they were decoded, and to which."""
    import torch

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):  # of GPTQModel, which decodes in the dtype of its scales
            dtypes[f"{name}.weight"] = module.scales.dtype
    return {name: _name(dtype) for name, dtype in dtypes.items() if dtype != torch.float32}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
