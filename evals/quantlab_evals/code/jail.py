"""The program inside the sandbox: locks itself in, then runs what it was given. `sandbox.py` starts it.

It runs by itself in a fresh interpreter, so it imports nothing of this package. Standard input holds the job as
JSON; the descriptor named by the first argument takes the report. Whatever cannot be set up and was not given
up beforehand ends it before any foreign code runs.

* Landlock (Linux 5.13): files can be read below the interpreter and the system's libraries, and written in the
  own folder; nothing else can be opened.
* seccomp: no new processes or programs, no sockets, no signals to others, no change of what a file is, who owns
  it or how it is called, nothing that outlives the process or that a program in a box has no business with.
* Limits of memory, processor time, the size of a file, open files; no capabilities, also for root.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from typing import Any

# --- Landlock (linux/landlock.h); the three system calls have one number on every machine. ---
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 5, 1 << 8, 1 << 14
FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
FS_RIGHTS_NEWEST = (1 << 16) - 1
NET_RIGHTS, SCOPES = 0b11, 0b11

# --- seccomp (linux/seccomp.h, linux/filter.h) ---
SET_NO_NEW_PRIVS, SET_SECCOMP, SECCOMP_FILTER, SET_PDEATHSIG, GET_SECCOMP = 38, 22, 2, 1, 21
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD, O_ACCMODE, O_TRUNC = 0x10000, 0o3, 0o1000
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15
NEWER = 424  # from here on numbers are the same everywhere, and unknown ones do not exist
NEWER_ALLOWED = (436, 439, 441, 444, 445, 446, 449)  # close_range, faccessat2, epoll_pwait2, Landlock, futex_waitv

# System calls that are refused: their numbers on x86_64 and aarch64 (None: there is none).
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # new processes and programs, and what reaches into another process
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "kill": (62, 129),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "setsid": (112, 157), "setpgid": (109, 154),
    # the network
    "socket": (41, 198), "socketpair": (53, 199),
    # what a file is called, who owns it, what it may be (writing and making files is Landlock's)
    "truncate": (76, 45), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "inotify_init": (253, None), "inotify_init1": (294, 26), "io_setup": (206, 0),
    # memory and queues that are not counted, or outlive the process
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "acct": (163, 89),
    "quotactl": (179, 60), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "personality": (135, 92), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "syslog": (103, 116), "vhangup": (153, 58), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "sync": (162, 81), "syncfs": (306, 267),
    # who the process is
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159), "setfsuid": (122, 151),
    "setfsgid": (123, 152), "capset": (126, 91), "prctl": (157, 167), "seccomp": (317, 277),
}  # fmt: skip
CONDITIONAL = {  # allowed for some arguments
    "clone": (56, 220), "open": (2, None), "openat": (257, 56), "tgkill": (234, 131), "prlimit64": (302, 261),
    "fcntl": (72, 25),
}  # fmt: skip
CAPSET = (126, 91)

_libc = ctypes.CDLL(None, use_errno=True)


class UnavailableError(Exception):
    """The kernel does not offer something."""


def call(number: int, *arguments: Any) -> int:
    """A system call; raises `UnavailableError` if it fails."""
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise UnavailableError(f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return int(result)


def prctl(option: int, *arguments: int | bytes) -> int:
    """`prctl`, with all of its arguments."""
    words = [ctypes.c_char_p(word) if isinstance(word, bytes) else ctypes.c_ulong(word) for word in arguments]
    return int(_libc.prctl(ctypes.c_int(option), *words, *[ctypes.c_ulong(0)] * (4 - len(words))))


def landlock_version() -> int:
    """The version of the kernel's Landlock, 0 if there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except UnavailableError:
        return 0


def has_seccomp() -> bool:
    """Whether the kernel filters system calls, on a machine whose system calls are known here."""
    known = sys.platform.startswith("linux") and platform.machine() in ARCHITECTURES and sys.maxsize > 2**32
    return bool(known and prctl(GET_SECCOMP) >= 0)


def restrict_files(writable: str, readable: Iterable[str]) -> None:
    """Landlock: from now on only these folders and files can be opened."""
    version = landlock_version()
    if version < 1:
        raise UnavailableError("this kernel has no Landlock")
    handled = FS_RIGHTS.get(version, FS_RIGHTS_NEWEST)
    fields = [handled] + [NET_RIGHTS] * (version >= 4) + [SCOPES] * (version >= 6)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    in_folder = READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | REMOVE_FILE | TRUNCATE
    rules = [(writable, in_folder), ("/dev/null", READ_FILE | WRITE_FILE)]
    rules += [(path, READ_FILE | READ_DIR | EXECUTE) for path in readable]
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not every system has every one of them
            continue
        if not os.path.isdir(path):
            rights &= ~(READ_DIR | MAKE_REG | REMOVE_FILE)
        rule = struct.pack("=Qi", rights & handled, descriptor)
        call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(descriptor)
    call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def filter_program(machine: str, own_pid: int) -> bytes:
    """The seccomp filter, in classic BPF: refuse what is in `REFUSED`, look at the arguments of a few calls."""
    column = list(ARCHITECTURES).index(machine)
    program: list[tuple[int, int, int, int]] = []

    def put(code: int, k: int, yes: int = 0, no: int = 0) -> None:
        program.append((code, yes, no, k))

    def when(name: str, body: list[tuple[int, int, int, int]]) -> None:
        """If this is the system call, run the body, which decides."""
        number = CONDITIONAL[name][column]
        if number is not None:
            put(JUMP_EQUAL, number, no=len(body))
            program.extend(body)

    def argument(index: int) -> tuple[int, int, int, int]:
        return LOAD, 0, 0, ARGUMENTS + 8 * index  # its lower half: both machines are little-endian

    allow, refuse = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERROR | EPERM)
    put(LOAD, ARCHITECTURE)
    put(JUMP_EQUAL, ARCHITECTURES[machine], yes=1)
    put(RETURN, KILL)
    put(LOAD, NUMBER)
    newer = [(JUMP_EQUAL, 0, 1, number) for number in NEWER_ALLOWED]
    put(JUMP_AT_LEAST, NEWER, no=2 * len(newer) + 1)
    for jump in newer:
        program.extend([jump, allow])
    put(RETURN, ERROR | ENOSYS)  # clone3 among them: the C library then uses clone, whose flags can be seen
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            put(JUMP_EQUAL, number, no=1)
            program.append(refuse)
    when("clone", [argument(0), (AND, 0, 0, CLONE_THREAD), (JUMP_EQUAL, 1, 0, 0), allow, refuse])
    # O_TRUNC with O_RDONLY truncates, and Landlock before version 3 does not see it.
    for name, index in (("open", 1), ("openat", 2)):
        flags = [argument(index), (AND, 0, 0, O_TRUNC | O_ACCMODE), (JUMP_EQUAL, 1, 0, O_TRUNC), allow, refuse]
        when(name, flags)
    when("tgkill", [argument(0), (JUMP_EQUAL, 0, 1, own_pid), allow, refuse])
    when("prlimit64", [argument(0), (JUMP_EQUAL, 0, 1, 0), allow, refuse])
    owners = [(JUMP_EQUAL, 3 - index, 0, command) for index, command in enumerate((F_SETOWN, F_SETSIG, F_SETOWN_EX))]
    when("fcntl", [argument(1), *owners, allow, refuse])
    program.append(allow)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def filter_calls() -> None:
    """seccomp: from now on what is refused fails with `EPERM`."""
    if not has_seccomp():
        raise UnavailableError(f"system calls cannot be filtered on this machine ({platform.machine()})")
    instructions = filter_program(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    header = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(buffer))
    if prctl(SET_SECCOMP, SECCOMP_FILTER, header) != 0:
        raise UnavailableError(f"seccomp: {os.strerror(ctypes.get_errno())}")


def drop_capabilities() -> None:
    """Give up what root may do beyond its user id, for good."""
    if platform.machine() in ARCHITECTURES:
        header = struct.pack("=Ii", 0x20080522, 0)
        number = CAPSET[list(ARCHITECTURES).index(platform.machine())]
        call(number, header, struct.pack("=6I", *[0] * 6))


def limit(job: dict[str, Any]) -> None:
    """The limits that every kernel has."""
    wanted = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: job["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if "seccomp" not in job["protections"]:
        wanted[resource.RLIMIT_NPROC] = 0  # stops a fork bomb of any user but root
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def lock(job: dict[str, Any]) -> None:
    """Everything, in an order in which each step can still be done."""
    if sys.platform.startswith("linux"):
        prctl(SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != job["parent"]:
            os._exit(1)  # it died before this was asked for
        prctl(SET_NO_NEW_PRIVS, 1)
    limit(job)
    if sys.platform.startswith("linux"):
        drop_capabilities()
    if "landlock" in job["protections"]:
        restrict_files(job["folder"], job["readable"])
    if "seccomp" in job["protections"]:
        filter_calls()


def main() -> None:
    """Read the job, lock, run, report."""
    job = json.loads(sys.stdin.buffer.read())
    report = int(sys.argv[1])
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        lock(job)
    except (UnavailableError, OSError, ValueError) as error:
        os.write(report, f"cannot lock: {error}".encode()[:2000])
        os._exit(3)
    try:
        exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
        words = job["token"]
    except BaseException as error:
        words = f"{type(error).__name__}: {error}"
    os.write(report, words.encode("utf-8", "replace")[:2000])
    os._exit(0)


if __name__ == "__main__":
    main()
