"""Devices that speed can be predicted for: what their makers say of them.

Figures are peaks: dense products (no structured sparsity) of 16-bit floats added up in 32 bits, and the memory's
bandwidth as printed. No program reaches both. Memory is sold in GiB that are called GB; a driver keeps some of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import psutil
from quantlab_evals import describe_machine, matrix_flops, stream_bandwidth

from quantlab.errors import QuantlabError

_GB, _GIB = 10**9, 1 << 30


@dataclass(frozen=True)
class Device:
    """What a prediction needs to know of a device.

    Attributes:
        name: what it is called here.
        flops: operations a second in products of 16-bit floats, a multiplication and an addition counted as two.
        bandwidth: bytes a second between it and its memory.
        memory: bytes that it has.
        link: bytes a second in one direction to the memory of the host; 0 if it is the host.
        source: where the figures are from.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    source: str


_PCIE4, _PCIE5 = 31.5 * _GB, 63.0 * _GB  # 16 lanes, one direction, after line coding (PCI-SIG)

_TABLE = {
    device.name: device
    for device in (
        Device("a100", 312e12, 2039 * _GB, 80 * _GIB, _PCIE4, "NVIDIA A100 80GB SXM data sheet"),
        Device("h100", 989.4e12, 3350 * _GB, 80 * _GIB, _PCIE5, "NVIDIA H100 SXM5 data sheet and Hopper whitepaper"),
        Device("h200", 989.4e12, 4800 * _GB, 141 * _GIB, _PCIE5, "NVIDIA H200 SXM data sheet"),
        Device(
            "l4", 121e12, 300 * _GB, 24 * _GIB, _PCIE4 / 2, "NVIDIA L4 data sheet (half of the sparse figure; 8 lanes)"
        ),
        Device("l40s", 362e12, 864 * _GB, 48 * _GIB, _PCIE4, "NVIDIA L40S data sheet"),
        Device("rtx3090", 71.2e12, 936 * _GB, 24 * _GIB, _PCIE4, "NVIDIA GA102 whitepaper, added up in 32 bits"),
        Device("rtx4090", 165.2e12, 1008 * _GB, 24 * _GIB, _PCIE4, "NVIDIA Ada whitepaper, added up in 32 bits"),
        Device("mi300x", 1307.4e12, 5300 * _GB, 192 * _GIB, _PCIE5, "AMD Instinct MI300X data sheet"),
    )
}


@cache
def this_machine() -> Device:
    """The processor of this machine, measured: a stream of reads, and a product of bfloat16 matrices."""
    machine = describe_machine()
    source = f"measured: {machine.cpu}, {machine.threads} threads, {machine.instructions}"
    return Device("cpu", matrix_flops(), stream_bandwidth(), psutil.virtual_memory().total, 0, source)


_MEASURED: dict[str, Callable[[], Device]] = {"cpu": this_machine}
# What a person may set, and the unit that it is given in.
_FIELDS = {
    "tflops": ("flops", 1e12),
    "bandwidth": ("bandwidth", _GB),
    "memory": ("memory", _GIB),
    "link": ("link", _GB),
}


def device_names() -> tuple[str, ...]:
    """Names that :func:`device_called` knows."""
    return (*_TABLE, *_MEASURED)


def device_called(text: str) -> Device:
    """A device by name, with figures changed in parentheses: ``a100(memory=40,bandwidth=1555)``.

    ``tflops`` is in 10^12 operations a second, ``bandwidth`` and ``link`` in GB/s, ``memory`` in GiB. A device that is
    not in the table needs three of them: ``mine(tflops=50,bandwidth=450,memory=16)``. ``cpu`` is measured here.

    Raises:
        QuantlabError: no such device, or a figure that cannot be.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", text)
    name, settings = match.groups() if match else (text, None)
    changes = _figures(text, settings) if settings is not None else {}
    complete = {"flops", "bandwidth", "memory"} <= set(changes)
    if name in _TABLE or (name in _MEASURED and not complete):
        known = _TABLE[name] if name in _TABLE else _MEASURED[name]()
        return replace(known, **changes, source=known.source + (", changed" if changes else ""))
    if match is None or not complete:
        raise QuantlabError(
            f"device {text!r} is unknown; use one of {', '.join(device_names())}, or say what it can do: "
            "mine(tflops=50,bandwidth=450,memory=16), in 10^12 operations a second, GB/s and GiB"
        )
    given: dict[str, Any] = {"name": name, "link": 0.0, "source": "as given", **changes}
    return Device(**given)


def split_devices(text: str) -> list[str]:
    """A list with commas, where what stands in parentheses belongs to a device."""
    return [item.strip() for item in re.findall(r"(?:[^,()]|\([^()]*\))+", text) if item.strip()]


def _figures(text: str, settings: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for setting in filter(None, map(str.strip, settings.split(","))):
        key, _, value = setting.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if key.strip() not in _FIELDS or not 0 < number < float("inf"):
            raise QuantlabError(f"device {text!r}: {setting!r}: use {', '.join(_FIELDS)}, each with a number above 0")
        field, unit = _FIELDS[key.strip()]
        changes[field] = number * unit
    return changes
