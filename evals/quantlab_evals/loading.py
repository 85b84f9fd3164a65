"""What it takes to load a model and to run it: seconds and memory, in a process that does nothing else.

Memory that holds a file's pages (mapped weights) is counted apart from memory of the process's own: the system can drop
the former and read it again, so it is not lost to others, but weights that are dropped are not fast. Peaks are the
kernel's own high-water mark of both together; the mark of the process's own memory alone is sampled.

The process is ``python -m quantlab_evals.loading REQUEST``; it prints one JSON document.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import EvalError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_INTERVAL = 0.002  # seconds between two looks at the process's own memory


@dataclass(frozen=True)
class Memory:
    """Resident bytes above those of a process that imported the libraries.

    Attributes:
        own: of the process's own (anonymous) memory.
        mapped: pages of files, such as weights that are used where the file lies.
        peak: the highest sum of both.
        peak_own: the highest that was seen of its own memory, every two milliseconds.
    """

    own: int
    mapped: int
    peak: int
    peak_own: int


@dataclass(frozen=True)
class LoadCost:
    """What loading a model took, and what running it took.

    Attributes:
        seconds: of loading, libraries imported already.
        cpu_seconds: of all threads.
        loaded: memory while and after loading.
        running: memory while and after a prompt was read and some tokens were decoded.
        baseline: resident bytes of the process before.
        prompt_tokens: of the prompt; ``new_tokens`` were decoded.
        new_tokens: see there.
        on_device: the most bytes that tensors took on the GPUs; None on a CPU.
    """

    seconds: float
    cpu_seconds: float
    loaded: Memory
    running: Memory
    baseline: int
    prompt_tokens: int
    new_tokens: int
    on_device: int | None = None


def load_cost(
    load: str,
    model: str,
    *,
    options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 8,
) -> LoadCost:
    """Load a model in a fresh process and decode a little.

    The files come from the system's page cache if they were read before; read them before.

    Args:
        load: ``package.module:function``, which takes ``model`` and returns a transformers model.
        model: for that function.
        options: for that function, too: what JSON can say.
        threads: of torch; None: as many as it takes by itself.
        prompt_tokens: of a random prompt.
        new_tokens: to decode after it.

    Raises:
        EvalError: this system does not say what memory a process holds (only Linux does), or the process failed.
    """
    if not (_STATUS.is_file() and _CLEAR.exists()):
        raise EvalError("memory of a process is read from /proc/self/status, which only Linux has; measure it there")
    request = {
        "load": load,
        "model": model,
        "options": dict(options or {}),
        "threads": threads,
        "prompt": prompt_tokens,
        "new": new_tokens,
    }
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise EvalError(f"{model}: cannot be loaded in a process of its own: {said[0]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return LoadCost(**{**found, "loaded": Memory(**found["loaded"]), "running": Memory(**found["running"])})


def measure(load: str, model: str, options: dict[str, Any], threads: int | None, prompt: int, new: int) -> LoadCost:
    """What :func:`load_cost` asks its process for."""
    import torch

    from .decoder import GreedyDecoder
    from .logits import input_device
    from .machine import wait_for

    if threads is not None:
        torch.set_num_threads(threads)
    module, _, function = load.partition(":")
    loader = getattr(import_module(module), function)
    import_module("transformers.modeling_utils")
    baseline = _resident()
    started, cpu = time.perf_counter(), time.process_time()
    with _watched(baseline) as loaded:
        subject = loader(model, **options)
        wait_for(input_device(subject))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    with _watched(baseline) as running:
        vocabulary = subject.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
        GreedyDecoder(subject, prompt + new, compiled=False).generate(tokens, new)
    total = baseline["RssAnon"] + baseline["RssFile"]
    on_device = None
    if input_device(subject).type == "cuda":
        on_device = sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return LoadCost(seconds, cpu_seconds, Memory(**loaded), Memory(**running), total, prompt, new, on_device)


@contextmanager
def _watched(baseline: dict[str, int]) -> Iterator[dict[str, int]]:
    """Fills what it yields with the fields of :class:`Memory` when it is left."""
    found: dict[str, int] = {}
    highest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(_INTERVAL):
            highest[0] = max(highest[0], _resident()["RssAnon"])

    _CLEAR.write_text("5")  # the high-water mark starts again
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
    now = _resident()
    own = now["RssAnon"] - baseline["RssAnon"]
    found |= {
        "own": own,
        "mapped": now["RssFile"] - baseline["RssFile"],
        "peak": now["VmHWM"] - baseline["RssAnon"] - baseline["RssFile"],
        "peak_own": max(highest[0] - baseline["RssAnon"], own),
    }


def _resident() -> dict[str, int]:
    """Bytes of this process by the names that Linux gives them: RssAnon, RssFile, VmHWM."""
    text = _STATUS.read_text()
    return {name: int(size) * 1024 for name, size in re.findall(r"^(RssAnon|RssFile|VmHWM):\s+(\d+) kB$", text, re.M)}


def _answer(request: str) -> Any:
    return asdict(measure(**json.loads(request)))


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1])))
