"""From what a person calls a model to a Hugging Face folder on this disk, and to its weights."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedModel

from quantlab.checkpoint.demo import DEMO_NAME, demo_model
from quantlab.checkpoint.gguf import cached_gguf
from quantlab.checkpoint.source import ModelSource, ModuleSource, open_source
from quantlab.errors import CheckpointError

Model = str | Path | PreTrainedModel
"""A local folder, a ``.gguf`` file, a Hugging Face id, ``demo``, or a model in memory."""

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*"]


def resolve(model: str | Path) -> Path:
    """The folder of a model given as a local folder, a ``.gguf`` file, ``demo``, or a Hugging Face id.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    if str(model) == DEMO_NAME and not Path(model).exists():
        return demo_model()
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return cached_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: a folder without config.json is not a Hugging Face model")
        return path
    looks_local = path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1
    if path.exists() or looks_local:
        what = "is a file, not a model folder or a .gguf" if path.exists() else "does not exist"
        raise CheckpointError(f"{model}: {what}; give a local model folder, a .gguf file, a Hugging Face id or `demo`")
    return _download(str(model))


def source_of(model: Model) -> ModelSource:
    """The weights of a model that is not quantized.

    Raises:
        CheckpointError: there is no such model, or it is quantized already.
    """
    return ModuleSource(model) if isinstance(model, PreTrainedModel) else open_source(resolve(model))


def name_of(model: Model) -> str:
    """What a person called the model; of one in memory what it remembers, or its class."""
    if isinstance(model, PreTrainedModel):
        return model.config.name_or_path or type(model).__name__
    return str(model)


def _download(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=_FILES))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"{repository}: neither a local folder nor a model on the hub ({_first(error)})"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repository}: there is no such local folder, and the Hugging Face hub cannot be reached "
            f"({_first(error)}); give a local folder, a .gguf file, or `demo`"
        ) from error


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
