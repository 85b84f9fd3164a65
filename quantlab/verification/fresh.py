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
    config = transformers.AutoConfig.from_pretrained(folder)
    named = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
    loaded: Any = named.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    model.eval()
    with torch.no_grad():
        done = model(input_ids=torch.tensor(request["prompts"]))
        logprobs = (done.logits if "logits" in done else done[0]).float().log_softmax(-1)
        found = logprobs.gather(-1, torch.tensor(request["tokens"])).tolist()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = None if head is None else getattr(head, "weight", 0) is getattr(embedding, "weight", 1)
    odd = {key: sorted(map(str, value))[:4] for key, value in info.items() if value}
    return {
        "logprobs": found,
        "odd": odd,
        "tied": shared,
        "ties": bool(model.config.get_text_config().tie_word_embeddings),
    }


if __name__ == "__main__":
    main()
