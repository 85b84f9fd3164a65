"""What is done, so that a killed run goes on.

The result grows in a folder beside its place, ``OUT.partial``: one shard a block, and ``run.jsonl``, which holds one
record a layer and says after each block that its shard is complete. When all is done the folder is renamed to ``OUT``.
A run that finds such a folder from the same command goes on behind the last complete block.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantlab.checkpoint.native import read_layer
from quantlab.checkpoint.writer import CheckpointWriter, read_header, shard_name
from quantlab.engine.report import LayerReport
from quantlab.errors import CheckpointError, PreflightError
from quantlab.numerics import QTensor
from quantlab.storage import Storage

LOG = "run.jsonl"
_NEW_LOG = f"{LOG}.partial"


def partial_folder(out: Path) -> Path:
    """Where the result of a run grows until it is complete."""
    return out.with_name(out.name + ".partial")


class Journal:
    """The growing result of one run.

    Attributes:
        writer: of the growing folder.
        reports: of all layers of finished blocks, in the order in which they were done.
        storages: how each finished layer is stored.
        resumed: blocks that an earlier run finished.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], blocks: Sequence[str]) -> None:
        """Begin, or go on with what an interrupted run of the same identity left.

        Args:
            out: where the complete result will be.
            identity: what the run's result depends on; JSON-able.
            blocks: all blocks that will be committed, in any order of doing.

        Raises:
            PreflightError: the growing folder belongs to another run.
        """
        self.out = out
        self.folder = partial_folder(out)
        self._shards = {block: shard_name(i + 1, len(blocks)) for i, block in enumerate(blocks)}
        self.reports: list[LayerReport] = []
        self.storages: dict[str, Storage] = {}
        self._done: list[str] = []
        lines = self._read(identity)
        self.writer = CheckpointWriter(self.folder)
        if lines is None:
            self._write([json.dumps({"kind": "run", **identity}, sort_keys=True)])
        else:
            self._replay(lines)
        self.resumed = tuple(self._done)

    def done(self, block: str) -> bool:
        """Whether the block is finished."""
        return block in self._done

    def read(self, block: str) -> tuple[dict[str, QTensor], dict[str, torch.Tensor]]:
        """The quantized layers of a finished block, and its other tensors."""
        tensors = self.writer.read(self._shards[block])
        names = [report.layer for report in self.reports if report.block == block]
        quantized = {name: read_layer(tensors, name, self.storages[name]) for name in names}
        taken = {f"{name}.{key}" for name in names for key in self.storages[name].specs()}
        return quantized, {name: tensor for name, tensor in tensors.items() if name not in taken}

    def commit(
        self,
        block: str,
        tensors: Mapping[str, torch.Tensor],
        reports: Sequence[LayerReport],
        storages: Mapping[str, Storage],
    ) -> None:
        """Write a block's shard, then note its layers, then note that it is done."""
        self.writer.write(self._shards[block], tensors)
        records = [
            {"kind": "layer", **report.record(), "storage": storages[report.layer].to_dict()} for report in reports
        ]
        self._write([json.dumps(record) for record in [*records, {"kind": "block", "block": block}]], append=True)
        self._done.append(block)
        self.reports += reports
        self.storages |= storages

    def abandon(self) -> None:
        """Leave nothing behind of a run that failed before its first block was done."""
        if not self._done:
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, complete: Callable[[Journal], None]) -> None:
        """Let the result be completed."""
        complete(self)

    def publish(self) -> None:
        """Put the complete result in its place, whole."""
        if self.out.exists():
            shutil.rmtree(self.out)
        os.replace(self.folder, self.out)

    def _read(self, identity: Mapping[str, Any]) -> list[str] | None:
        """The lines of an interrupted run, or None if there is none."""
        log = self.folder / LOG
        if not log.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or set(os.listdir(self.folder)) - {_NEW_LOG}):
                raise PreflightError(
                    f"{self.folder} is in the way: it is not a run of quantlab; move it, or choose another --out"
                )
            return None
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        header = _parse(lines[0]) if lines else None
        if header is None:
            return None  # killed while it wrote its very first line
        if {key: value for key, value in header.items() if key != "kind"} != json.loads(json.dumps(identity)):
            differs = sorted(key for key in {*header, *identity} - {"kind"} if header.get(key) != identity.get(key))
            raise PreflightError(
                f"{self.folder} holds an interrupted run of another command (it differs in {', '.join(differs)}); run "
                "that command again to go on with it, add --restart to throw it away, or choose another --out"
            )
        return lines

    def _replay(self, lines: list[str]) -> None:
        """Take in every complete block, and cut off what came after the last."""
        kept = pending = 1
        waiting: list[dict[str, Any]] = []
        for line in lines[1:]:
            record = _parse(line)
            pending += 1
            if record is None:
                break
            if record["kind"] == "layer":
                waiting.append(record)
            elif not self._whole(self._shards.get(record["block"], "")):
                break  # somebody removed or damaged the shard: what came after it is done again
            else:
                self._done.append(record["block"])
                self.reports += [LayerReport.from_record(entry) for entry in waiting]
                self.storages |= {entry["layer"]: Storage.from_dict(entry["storage"]) for entry in waiting}
                waiting, kept = [], pending
        self._write(lines[:kept])

    def _whole(self, shard: str) -> bool:
        try:
            return self.writer.has(shard) and bool(read_header(self.folder / shard))
        except CheckpointError:
            return False

    def _write(self, lines: list[str], *, append: bool = False) -> None:
        """Append to the log, or replace it, whole."""
        log = self.folder / LOG
        path = log if append else self.folder / _NEW_LOG
        with open(path, "a" if append else "w", encoding="utf-8") as stream:
            stream.write("".join(line + "\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(path, log)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None
