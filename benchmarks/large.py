"""Memory and speed of quantizing a model that is larger than what memory should hold.

python benchmarks/large.py make DIR [--layers 4]     a sharded bf16 checkpoint of Llama-7B's shape, with random weights
python benchmarks/large.py run DIR OUT [--recipe w4-rtn] [--set KEY=VALUE ...] [--memory 2GB] [--samples 8]

`run` quantizes in a process of its own and prints that process's peak resident memory, the time, and how long it takes
to read the checkpoint and to write the result with nothing in between.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

_LAYERS_A_SHARD = 8


def make(folder: Path, layers: int, width: int, inner: int, vocabulary: int) -> None:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: list[list[str]] = [[name for name in shapes if ".layers." not in name]]
    for start in range(0, layers, _LAYERS_A_SHARD):
        numbers = range(start, min(start + _LAYERS_A_SHARD, layers))
        shards.append([name for name in shapes if any(f".layers.{number}." in name for number in numbers)])
    # Random numbers are drawn once: what matters here is how many there are.
    pool = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(shapes[name], pool, name) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(shape: torch.Size, pool: torch.Tensor, name: str) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    count, start = shape.numel(), crc32(name.encode()) % 4096
    return pool[start:].repeat(-(-count // (len(pool) - start)))[:count].mul_(shape[-1] ** -0.5).view(shape)


def run(folder: Path, out: Path, arguments: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    answer, ours = context.Pipe(duplex=False)
    process = context.Process(target=_quantize, args=(folder, out, arguments, ours))
    process.start()
    ours.close()  # so that its end is seen if the process fails
    try:
        found = answer.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the process that quantizes ended with code {process.exitcode} and no answer") from None
    process.join()
    found["GB"] = {
        "checkpoint": _gigabytes(folder),
        "result": _gigabytes(out),
    }
    found["seconds"]["read alone"], found["seconds"]["write alone"] = _moved(folder, out)
    print(json.dumps(found, indent=2))
    if not arguments.keep:
        shutil.rmtree(out)


def _quantize(folder: Path, out: Path, arguments: argparse.Namespace, answer: Connection) -> None:
    from quantlab import quantize
    from quantlab.cli.tracker import Tracker  # noqa: F401 - counted as a library

    before = _peak()
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = (arguments.samples, arguments.length)
    tokens = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=torch.Generator().manual_seed(0))
    started, cpu = time.perf_counter(), time.process_time()
    more = {} if arguments.memory is None else {"memory": arguments.memory}
    result = quantize(
        folder, arguments.recipe, out, overrides=arguments.set, calibration=tokens, overwrite=True, **more
    )
    answer.send(
        {
            "recipe": arguments.recipe,
            "settings": arguments.set,
            "bits": round(result.bits, 3),
            "GB of memory": {"libraries": before, "peak": _peak()},
            "seconds": {
                "quantize": round(time.perf_counter() - started, 1),
                "of a processor": round(time.process_time() - cpu, 1),
            },
        }
    )


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def _gigabytes(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9, 3)


def _moved(folder: Path, out: Path) -> tuple[float, float]:
    """Seconds to read the checkpoint from the disk, not from its cache, and to write and sync as much as the result."""
    started, buffer = time.perf_counter(), bytearray(1 << 24)
    for file in folder.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while stream.readinto(buffer):
                pass
    read = time.perf_counter() - started
    started = time.perf_counter()
    for file in out.glob("*.safetensors"):
        with open(out / "written", "wb", buffering=0) as stream:
            for _ in range(-(-file.stat().st_size // len(buffer))):
                stream.write(buffer)
            os.fsync(stream.fileno())
    (out / "written").unlink()
    return round(read, 1), round(time.perf_counter() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=4)
    making.add_argument("--width", type=int, default=4096)
    making.add_argument("--inner", type=int, default=11008)
    making.add_argument("--vocabulary", type=int, default=32000)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("out", type=Path)
    running.add_argument("--recipe", default="w4-rtn")
    running.add_argument("--set", action="append", default=[])
    running.add_argument("--memory")
    running.add_argument("--samples", type=int, default=8)
    running.add_argument("--length", type=int, default=512)
    running.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder, given.layers, given.width, given.inner, given.vocabulary)
    else:
        run(given.folder, given.out, given)


if __name__ == "__main__":
    main()
