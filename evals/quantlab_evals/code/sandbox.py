"""Running foreign Python code: a process of its own, locked in by the kernel, with an end that is certain.

Meant for code that a model wrote by accident or imitation. It is a box with thick walls, not a virtual machine: a
program that knows an unpatched hole of the kernel gets out. A program that forges its own success by looking
through its process's memory is not caught either; one that merely exits is.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import EvalError
from . import jail

Isolation = Literal["strict", "limits"]

_POLL = 0.05
_WORDS = 4096
_FILES = 256
_READABLE = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/zero",
    "/dev/urandom",
    "/dev/random",
)


@dataclass(frozen=True)
class Limits:
    """What one program may use: seconds of wall and processor time, bytes, files."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 1 << 30
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `passed` if it ran to its end without an exception; `reason` says what happened if not."""

    passed: bool
    reason: str
    seconds: float


def protections() -> dict[str, bool]:
    """What this machine's kernel offers to lock a program in."""
    return {"landlock": jail.landlock_version() >= 1, "seccomp": jail.has_seccomp()}


def check_isolation(isolation: Isolation) -> tuple[str, ...]:
    """The protections that will be used. Raises `EvalError` if `strict` is asked for and the kernel lacks one."""
    if isolation not in ("strict", "limits"):
        raise EvalError(f"isolation {isolation!r}: use 'strict' or 'limits'")
    if not sys.platform.startswith("linux"):
        raise EvalError(f"foreign programs are run on Linux only, and this is {sys.platform}")
    offered = protections()
    missing = [name for name, there in offered.items() if not there]
    if isolation == "strict" and missing:
        raise EvalError(
            f"this kernel offers no {' and no '.join(missing)}, so a program could write files and open connections "
            "as you can; run where it does (Linux 5.13 or later on x86_64 or aarch64), in a virtual machine or a "
            "container that may be broken, or take the risk: isolation 'limits' bounds time and memory only"
        )
    return tuple(name for name, there in offered.items() if there)


def run_program(program: str, *, limits: Limits | None = None, isolation: Isolation = "strict") -> Outcome:
    """Run Python source as `__main__` in a box, and wait for its end.

    The program starts in an empty folder, the only one it can write to (files, no subfolders), which is removed
    afterwards; standard input is empty, and what it prints goes nowhere. No environment variables of yours are
    passed on.

    Args:
        program: Python source.
        limits: what it may use.
        isolation: `strict`, or `limits`: whatever of the protections the kernel offers, down to none.

    Raises:
        EvalError: `strict` is asked for and the kernel cannot, or the box could not be set up.
    """
    limits = limits or Limits()
    chosen = check_isolation(isolation)
    token = secrets.token_hex(16)
    started = time.monotonic()
    with _own_folder() as folder:
        job = {
            "program": program,
            "token": token,
            "parent": os.getpid(),
            "folder": str(folder),
            "readable": [*_READABLE, *_interpreter_folders()],
            "protections": chosen,
            "cpu_seconds": limits.cpu_seconds,
            "memory": limits.memory,
            "file_bytes": limits.file_bytes,
            "open_files": limits.open_files,
        }
        words, stopped, code = _run(json.dumps(job).encode(), folder, limits)
    seconds = time.monotonic() - started
    if words.startswith("cannot lock: "):
        raise EvalError(f"the sandbox could not be set up, nothing was run: {words.removeprefix('cannot lock: ')}")
    if stopped:
        return Outcome(False, stopped, seconds)
    if words == token:
        return Outcome(True, "", seconds)
    if code == -signal.SIGKILL:
        return Outcome(False, f"killed, most likely after its {limits.cpu_seconds} s of processor time", seconds)
    if code < 0:
        return Outcome(False, f"ended by {signal.Signals(-code).name}", seconds)
    return Outcome(False, words.replace(token, "") or f"exited with {code} before its end", seconds)


@contextmanager
def _own_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="quantlab-sandbox-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _interpreter_folders() -> list[str]:
    """Where the interpreter and its packages are read from."""
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
    return sorted(str(Path(folder).resolve()) for folder in folders)


def _run(job: bytes, folder: Path, limits: Limits) -> tuple[str, str, int]:
    """Start the process, feed it, watch it, end it: its words, why it was stopped (or nothing), its exit code."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", jail.__file__, str(writing)],
            cwd=folder,
            env={"HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
            start_new_session=True,
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    try:
        assert process.stdin is not None
        try:
            process.stdin.write(job)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it could not start; its exit code says more
        words, stopped = _watch(process, reading, folder, limits)
    finally:
        _end(process)
        os.close(reading)
    return words.decode("utf-8", "replace"), stopped, process.returncode


def _watch(process: subprocess.Popen[bytes], reading: int, folder: Path, limits: Limits) -> tuple[bytes, str]:
    """Wait for the end, or for a reason to end it."""
    deadline = time.monotonic() + limits.seconds
    words, open_ = b"", True
    while True:
        # Not reaped yet: until its session has been ended, its number must not go to anyone else.
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if open_ and select.select([reading], [], [], 0 if ended else _POLL)[0]:
            piece = os.read(reading, _WORDS)
            open_ = bool(piece) and len(words) < _WORDS
            words += piece
            continue
        if ended:
            return words[:_WORDS], ""
        if not open_:
            time.sleep(_POLL / 5)
        if time.monotonic() > deadline:
            return words, f"timed out after {limits.seconds:g} s"
        if reason := _too_much(folder, limits):
            return words, reason


def _too_much(folder: Path, limits: Limits) -> str:
    used = count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            count += 1
            try:
                used += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            if count > _FILES:
                return f"more than {_FILES} files"
    return f"more than {limits.folder_bytes} bytes of files" if used > limits.folder_bytes else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of it is left: the process, and without a filter also the others of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
