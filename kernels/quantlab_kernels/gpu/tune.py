"""Which config is fastest on this device: measured when a user asks, kept in a JSON file, read before each choice.

An entry is found by architecture, number of multiprocessors, format, shape of the weight and a bucket of rows, never by
a device's marketing name. Without the file, or without an entry, the static choice stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab_kernels.gpu.configs import Config, Device, GemmConfig, GemvConfig, PanelConfig, candidates, choose, shares
from quantlab_kernels.gpu.formats import Format
from quantlab_kernels.gpu.layout import Layout

if TYPE_CHECKING:
    import torch

    from quantlab_kernels.gpu.weight import GpuWeight

_KINDS: dict[str, type[Config]] = {"gemv": GemvConfig, "gemm": GemmConfig, "panel": PanelConfig}
_SPLITS = (1, 2, 4, 8)

version = 0  # of what is known: goes up when something was tuned


def cache_path() -> Path:
    """The file: ``QUANTLAB_GPU_CONFIGS``, or ``gpu_configs.json`` in quantlab's cache folder."""
    if named := os.environ.get("QUANTLAB_GPU_CONFIGS"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantlab" / "gpu_configs.json"


def bucket(rows: int) -> int:
    """Rows that are tuned together: up to the next power of two, and all from 1024 on."""
    return min(1 << (rows - 1).bit_length(), 1024)


def key(device: Device, format: Format, layout: Layout, out_features: int, rows: int) -> str:
    """Under which name an entry is kept."""
    place = f"{device.architecture}/{device.multiprocessors}"
    return f"{place}/{format.name}/{out_features}x{layout.columns}u{layout.unit}/{bucket(rows)}"


def best(device: Device, format: Format, layout: Layout, out_features: int, rows: int) -> tuple[Config, int]:
    """The config and the number of shares: those that were found fastest, or else the static choice."""
    entry = _read(cache_path()).get(key(device, format, layout, out_features, rows))
    if entry is not None:
        return entry
    return choose(device, format, layout, out_features, rows)


def tune(
    x: torch.Tensor,
    weight: GpuWeight,
    run: Callable[[Config, int], object],
    device: Device,
    time: Callable[[Callable[[], object]], float] | None = None,
) -> tuple[Config, int]:
    """Time every candidate on the device of ``x``, keep the fastest in the file, and return it.

    Args:
        x: activations ``[rows, in]`` such as will come.
        weight: the weight.
        run: computes the product with a config and a number of shares.
        device: where ``x`` is.
        time: milliseconds of a call; by default Triton's benchmark with the cache emptied before each run.
    """
    if time is None:
        from triton.testing import do_bench

        time = do_bench
    format, layout, outputs, rows = weight.kind.format, weight.kind.layout, weight.out_features, len(x)
    timed = {}
    for config in candidates(device, format, outputs, rows):
        several = () if isinstance(config, PanelConfig) else _SPLITS
        for splits in {shares(device, config, layout, outputs, rows), *several}:
            timed[config, splits] = time(partial(run, config, splits))
    fastest = min(timed, key=lambda found: timed[found])
    _write(cache_path(), key(device, format, layout, outputs, rows), fastest)
    return fastest


@cache
def _read(path: Path) -> dict[str, tuple[Config, int]]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: _config(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of tuned configs ({error}); remove it, and tune again") from error


def _config(entry: dict[str, Any]) -> tuple[Config, int]:
    return _KINDS[entry["kernel"]](**entry["config"]), int(entry["splits"])


def _write(path: Path, name: str, found: tuple[Config, int]) -> None:
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config, splits = found
    kernel = next(name for name, kind in _KINDS.items() if isinstance(config, kind))
    entries[name] = {"kernel": kernel, "config": asdict(config), "splits": splits}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(path)
    _read.cache_clear()
    global version
    version += 1
