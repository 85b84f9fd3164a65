"""Programs that mean harm: each is stopped, counted as failed, and leaves nothing behind."""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from quantlab_evals import EvalError
from quantlab_evals.code import Limits, check_isolation, jail, protections, run_program
from quantlab_evals.code import sandbox as module

offered = pytest.mark.skipif(
    not all(protections().values()), reason=f"this kernel cannot lock programs in: {protections()}"
)
LONG, SHORT = Limits(seconds=60), Limits(seconds=1)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """No process and no file is there that was not there before."""
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(boxes))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert list(boxes.iterdir()) == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def outcome(program, limits=LONG, **options):
    return run_program(program, limits=limits, **options)


@offered
@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "print('x' * 100000)",
        "open('own', 'w').write('x'); assert open('own').read() == 'x'; import os; os.remove('own')",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import hashlib, math, re, typing, collections, heapq, itertools, random, datetime",
        "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: None); signal.raise_signal(signal.SIGUSR1)",
        "try:\n    open('/etc/passwd')\nexcept PermissionError:\n    pass",
        "import os; assert set(os.environ) <= {'HOME', 'TMPDIR', 'LANG', 'OMP_NUM_THREADS', 'LC_CTYPE'}",
        "import os; assert os.listdir('.') == []",
    ],
)
def test_a_harmless_program_passes(program):
    found = outcome(program)
    assert found.passed, found.reason
    assert found.reason == ""


CALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\ndef call(*a):\n    r = libc.syscall(*a)\n"
CALL += "    if r < 0: raise OSError(ctypes.get_errno(), 'refused')\n"


@offered
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError('wrong')", "ValueError: wrong"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "exited with 0 before its end"),
        ("input()", "EOFError"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "Operation not permitted"),
        # time
        ("while True: pass", "timed out"),
        ("import time; time.sleep(1000)", "timed out"),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", "timed out"),
        ("import signal; signal.raise_signal(signal.SIGSTOP)", "timed out"),
        # processes
        ("import os\nwhile True: os.fork()", "Operation not permitted"),
        ("import subprocess; subprocess.run(['true'])", "Operation not permitted"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "Operation not permitted"),
        ("import os; os.execv('/bin/true', ['true'])", "Operation not permitted"),
        ("import os; os.system('true') and 1 / 0", "ZeroDivisionError"),
        (CALL + "call(435, None, 0)", "refused"),  # clone3
        # memory
        ("x = bytearray(10 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
        ("import mmap; mmap.mmap(-1, 10 << 30)", "Cannot allocate memory"),
        (CALL + "call(319, b'm', 0)", "refused"),  # memfd_create
        # output
        ("while True: print('x' * 1000000)", "timed out"),
        ("import os\nwhile True: os.write(int(__import__('sys').argv[1]), b'x' * 4096)", "timed out"),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 1000000)", "File too large"),
        ("for i in range(9):\n    open(str(i), 'wb').write(b'x' * (15 << 20))\nwhile 1: pass", "bytes of files"),
        ("i = 0\nwhile True:\n    open(str(i), 'w').close()\n    i += 1", "more than 256 files"),
        # the network
        ("import socket; socket.socket()", "Operation not permitted"),
        ("import socket; socket.socketpair()", "Operation not permitted"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1')", "Operation not permitted"),
        # reading what is private, and writing what is not its own
        ("open('/etc/passwd')", "Permission denied"),
        ("open('/proc/self/environ')", "Permission denied"),
        ("import os; os.listdir('/')", "Permission denied"),
        ("import os; os.mkdir('deep')", "Permission denied"),
        ("import os; os.symlink('/etc/passwd', 'link')", "Operation not permitted"),
        ("import os; os.mkfifo('pipe')", "Operation not permitted"),
        # the parent
        ("import os; os.kill(os.getppid(), 9)", "Operation not permitted"),
        ("import os; os.killpg(os.getpgid(os.getppid()), 9)", "Operation not permitted"),
        ("import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", "Operation not permitted"),
        ("import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "Operation not permitted"),
        ("import os; os.sched_setaffinity(os.getppid(), {0})", "Operation not permitted"),
        ("import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "Operation not permitted"),
        (CALL + "call(234, __import__('os').getppid(), __import__('os').getppid(), 9)", "refused"),  # tgkill
        (CALL + "call(434, __import__('os').getppid(), 0)", "refused"),  # pidfd_open
        # the machine
        (CALL + "call(425, 8, None)", "refused"),  # io_uring_setup
        (CALL + "call(29, 0, 4096, 0o1600)", "refused"),  # shmget
        ("import os; os.setuid(65534)", "Operation not permitted"),
        ("import os; os.setsid()", "Operation not permitted"),
        ("import os; os.nice(-5)", "Operation not permitted"),
    ],
)
def test_a_harmful_one_is_stopped(program, reason):
    if "call(" in program and os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    found = outcome(program, SHORT if reason == "timed out" else LONG)
    assert not found.passed
    assert reason in found.reason


@offered
def test_processor_time_is_limited_by_itself():
    found = outcome("while True: pass", Limits(seconds=60, cpu_seconds=1))
    assert not found.passed
    assert "1 s of processor time" in found.reason


@offered
def test_files_of_others_stay_as_they_are(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    before = victim.stat()
    attempts = [
        f"open({str(victim)!r}, 'w')",
        f"import os; os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.link({str(victim)!r}, 'mine')",
        f"import os; os.chmod({str(victim)!r}, 0)",
        f"import os; os.utime({str(victim)!r}, (0, 0))",
        f"import os; os.setxattr({str(victim)!r}, 'user.x', b'x')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('/tmp/quantlab-was-here', 'w')",
        "open('/dev/shm/quantlab-was-here', 'w')",
        "open('../neighbour', 'w')",
        f"open({jail.__file__!r}, 'a')",
    ]
    for attempt in attempts:
        found = outcome(attempt)
        assert not found.passed, attempt
        assert "Permission denied" in found.reason or "not permitted" in found.reason, (attempt, found.reason)
    after = victim.stat()
    assert victim.read_text() == "precious"
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, before.st_nlink)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes", "victim"]
    assert not any(Path(folder, "quantlab-was-here").exists() for folder in ("/tmp", "/dev/shm"))


@offered
def test_interrupted_it_leaves_nothing(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_too_much", interrupt)
    with pytest.raises(KeyboardInterrupt):
        outcome("while True: pass", SHORT)


@offered
def test_several_at_a_time_do_not_meet():
    found = {}

    def run(number):
        found[number] = outcome(f"open('mine', 'w').write('{number}')\nassert open('mine').read() == '{number}'")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(entry.passed for entry in found.values())


@pytest.mark.parametrize("missing", ["landlock", "seccomp"])
def test_strict_refuses_where_the_kernel_cannot(monkeypatch, missing):
    monkeypatch.setattr(module, "protections", lambda: {"landlock": True, "seccomp": True} | {missing: False})
    with pytest.raises(EvalError, match=f"offers no {missing}.*'limits' bounds time and memory only"):
        check_isolation("strict")
    with pytest.raises(EvalError, match="'limits'"):
        outcome("open('/tmp/never', 'w')")
    assert missing not in check_isolation("limits")


def test_limits_alone_bound_time_and_memory(monkeypatch):
    monkeypatch.setattr(module, "protections", lambda: {"landlock": False, "seccomp": False})
    assert outcome("x = 1", isolation="limits").passed
    assert "MemoryError" in outcome("x = bytearray(10 << 30)", isolation="limits").reason
    assert "timed out" in outcome("while True: pass", Limits(seconds=1), isolation="limits").reason
    forked = "import os, time\nif os.fork() == 0: time.sleep(100)"
    if os.getuid() != 0:
        assert "temporarily unavailable" in outcome(forked, isolation="limits").reason
    else:
        outcome(forked, isolation="limits")  # its child is ended with it: see `nothing_left`


def test_a_box_that_cannot_be_locked_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_READABLE", ())
    monkeypatch.setattr(module, "_interpreter_folders", lambda: ["\0"])
    with pytest.raises(EvalError, match="could not be set up, nothing was run"):
        outcome(f"open({str(tmp_path / 'ran')!r}, 'w')", isolation="strict")
    assert not (tmp_path / "ran").exists()


# --- the filter itself, by an interpreter of BPF that is written here ---


def decide(program, machine, number, arguments=(0,) * 6, architecture=None):
    """What the kernel would do with a system call."""
    data = struct.pack("=iIQ6Q", number, architecture or jail.ARCHITECTURES[machine], 0, *arguments)
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator, at = 0, 0
    while True:
        code, yes, no, k = instructions[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x06:
            return k
        else:
            at += yes if {0x15: accumulator == k, 0x35: accumulator >= k}[code] else no


@pytest.mark.parametrize("machine", list(jail.ARCHITECTURES))
def test_the_filter_decides_as_its_tables_say(machine):
    column = list(jail.ARCHITECTURES).index(machine)
    program = jail.filter_program(machine, own_pid=777)
    allow, refuse, unknown = 0x7FFF0000, 0x00050001, 0x00050026
    numbers = {name: pair[column] for name, pair in jail.REFUSED.items()}
    refused = {number for number in numbers.values() if number is not None}
    conditional = {name: pair[column] for name, pair in jail.CONDITIONAL.items()}
    assert not refused & set(conditional.values())
    for number in range(1000):
        if number in refused:
            expected = refuse
        elif number >= 424:
            expected = allow if number in jail.NEWER_ALLOWED else unknown
        else:
            expected = allow
        if number not in conditional.values():
            assert decide(program, machine, number) == expected, number
    assert decide(program, machine, 0x40000000 + 57) == unknown, "the x32 interface"
    assert decide(program, machine, 1, architecture=0x40000003) == 0x80000000, "the 32-bit interface"

    def decided(name, *arguments):
        return decide(program, machine, conditional[name], (*arguments, *[0] * (6 - len(arguments))))

    thread = 0x3D0F00
    assert decided("clone", thread) == allow
    assert decided("clone", 17) == decided("clone", thread & ~0x10000) == refuse
    assert decided("openat", 0, 0, os.O_RDONLY | os.O_TRUNC) == refuse
    assert decided("openat", 0, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) == decided("openat", 0, 0, 0) == allow
    assert decided("tgkill", 777) == allow
    assert decided("tgkill", 1) == decided("tgkill", 0) == refuse
    assert decided("prlimit64", 0) == allow
    assert decided("prlimit64", 1) == refuse
    assert decided("fcntl", 0, 1) == decided("fcntl", 0, 1030) == allow
    assert [decided("fcntl", 0, command) for command in (8, 10, 15)] == [refuse] * 3


def test_the_numbers_are_the_kernels():
    """Against the headers of this system, where they are installed."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    known = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    for name, (number, _) in {**jail.REFUSED, **jail.CONDITIONAL, "capset": jail.CAPSET}.items():
        assert known.get(f"__NR_{name}") == str(number), name
    generic = Path("/usr/include/asm-generic/unistd.h").read_text().replace("__NR3264_", "__NR_")
    words = [line.split() for line in generic.splitlines() if line.startswith("#define __NR_")]
    known = {entry[1]: entry[2] for entry in words if len(entry) > 2 and entry[2].isdigit()}
    for name, (_, number) in {**jail.REFUSED, **jail.CONDITIONAL, "capset": jail.CAPSET}.items():
        assert known.get(f"__NR_{name}") == (None if number is None else str(number)), name
