"""Runs inside the sandbox's process, as a file under ``python -I``: standard library alone, nothing of this package.

The harness takes a job (one JSON object) from standard input, forks once for every test, and writes one JSON list of outcomes. A
child gives up its rights for good before it runs the program; the harness itself runs nothing of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import secrets
import selectors
import signal
import struct
import sys
import tempfile
import time
import traceback

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_OUTPUT_LIMIT = 1 << 20  # bytes of a program's output that are kept

# Architecture -> its audit number and its column in the table below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# System calls a program does without, by number on x86_64 and aarch64 (None: there is none).
_DENIED = {
    # network (a socketpair, which event loops need, reaches nobody: connecting and addressed sends are denied)
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # new processes; threads are clones with a flag, see below
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    # what outlives the process or escapes the memory limit
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # files' owners, modes, times and attributes, which Landlock does not govern
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "reboot": (169, 142),
    "init_module": (175, 105), "finit_module": (313, 273), "swapon": (167, 224), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "sethostname": (170, 161),
}  # fmt: skip
_CLONE, _CLONE3, _SENDTO, _PRLIMIT = (56, 220), (435, 435), (44, 206), (302, 261)
_CLONE_THREAD = 0x10000
_EPERM, _ENOSYS = 1, 38


def deny_system_calls() -> bool:
    """Installs the seccomp filter for this process and its threads; whether it could."""
    machine = _MACHINES.get(platform.machine())
    if machine is None or struct.calcsize("P") != 8:
        return False
    audit, column = machine
    program = _filter(audit, column)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    buffer = ctypes.create_string_buffer(program)
    argument = Program(len(program) // 8, ctypes.addressof(buffer))
    return _LIBC.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(argument), 0, 0) == 0


def _filter(audit: int, column: int) -> bytes:
    """Classic BPF over ``struct seccomp_data``: call number at 0, architecture at 4, arguments of 8 bytes from 16."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050000, 0x80000000

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    refuse = step(give, fail | _EPERM)
    code = [step(load, 4), step(equal, audit, 1), step(give, kill), step(load, 0)]
    code += [step(at_least, 0x40000000, 0, 1), refuse]  # x86's second table of the same calls
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            code += [step(equal, numbers[column], 0, 1), refuse]
    code += [step(equal, _CLONE3[column], 0, 1), step(give, fail | _ENOSYS)]  # its flags lie in memory; libc falls back to clone
    code += [step(equal, _CLONE[column], 0, 4), step(load, 16), step(any_bit, _CLONE_THREAD, 1), refuse, step(give, allow)]
    address = 16 + 8 * 4
    code += [step(equal, _SENDTO[column], 0, 6), step(load, address), step(equal, 0, 0, 2), step(load, address + 4)]
    code += [step(equal, 0, 1), refuse, step(give, allow)]
    code += [step(equal, _PRLIMIT[column], 0, 4), step(load, 16), step(equal, 0, 1), refuse, step(give, allow)]
    return b"".join([*code, step(give, allow)])


def restrict_files(directory: str) -> bool:
    """Landlock: write beneath ``directory`` alone, read there and where Python and system libraries lie; whether it could."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    abi = _LIBC.syscall(create_ruleset, None, 0, 1)
    if abi < 1:
        return False
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    attributes = struct.pack("=Q", rights)
    ruleset = _LIBC.syscall(create_ruleset, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    read = execute | read_file | read_dir
    readable = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64", "/bin"}
    devices = dict.fromkeys(("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"), read_file | write_file)
    for path, allowed in {**dict.fromkeys(readable, read), **devices, directory: rights}.items():
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        _LIBC.syscall(add_rule, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    done = _LIBC.syscall(restrict_self, ruleset, 0) == 0
    os.close(ruleset)
    return done


def restrict(job: dict, directory: str) -> list[str]:
    """Gives up this process's rights; which protections hold: "files" and "calls"."""
    megabyte = 1 << 20
    for kind, limit in (
        (resource.RLIMIT_CPU, job["cpu_s"]),
        (resource.RLIMIT_AS, job["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, job["file_mb"] * megabyte),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return [name for name, done in (("files", restrict_files(directory)), ("calls", deny_system_calls())) if done]


def _run(job: dict, test: dict, directory: str, report: int, secret: bytes) -> None:
    """In the child: rights away, program, test, and the secret as the sign that the end was reached."""
    held = restrict(job, directory)
    if not job["allow_unprotected"] and len(held) < 2:
        os.write(report, b"unprotected")
        return
    os.chdir(directory)
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        try:
            exec(compile(job["program"], "<program>", "exec"), names)
        except SystemExit as end:  # a script may end so; a test that calls its functions still runs
            if end.code not in (None, 0):
                raise
        if "statement" in test:
            exec(compile(test["statement"], "<test>", "exec"), names)
        sys.stdout.flush()
    except BaseException:
        os.write(report, b"!" + traceback.format_exc(limit=-1).strip().splitlines()[-1].encode("utf-8", "replace")[:300])
        return
    os.write(report, secret)


def _attempt(job: dict, test: dict, directory: str, wall_s: float) -> dict:
    """Runs one test in a child: ``{"passed", "detail"}``."""
    secret = secrets.token_bytes(16)
    out_read, out_write = os.pipe()
    report_read, report_write = os.pipe()
    with tempfile.TemporaryFile(dir=directory) as given:
        given.write(test.get("input", "").encode("utf-8", "replace"))
        given.seek(0)
        child = os.fork()
        if child == 0:
            os.dup2(given.fileno(), 0)
            os.dup2(out_write, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            try:
                _run(job, test, directory, report_write, secret)
            finally:
                os._exit(0)
    os.close(out_write)
    os.close(report_write)
    output, report, ended = _collect(out_read, report_read, time.monotonic() + wall_s)
    if not ended:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(out_read)
    os.close(report_read)
    if report == b"unprotected":
        return {"passed": False, "unprotected": True, "detail": "protections are missing"}
    if not ended:
        return {"passed": False, "detail": f"ran longer than {wall_s:.1f} s"}
    if report != secret:
        if report.startswith(b"!"):
            detail = report[1:].decode("utf-8", "replace")
        elif os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            detail = {signal.SIGXCPU: "used too much CPU time", signal.SIGKILL: "used too much CPU time"}.get(
                number, f"ended by signal {number}"
            )
        else:
            detail = "left before the test was through"
        return {"passed": False, "detail": detail}
    if "output" in test and _lines(output.decode("utf-8", "replace")) != _lines(test["output"]):
        return {"passed": False, "detail": f"wrote {output[:80].decode('utf-8', 'replace')!r}"}
    return {"passed": True, "detail": ""}


def _collect(output_end: int, report_end: int, deadline: float) -> tuple[bytes, bytes, bool]:
    """Reads both pipes to their ends; the last value is False when the deadline came first."""
    parts: dict[int, bytearray] = {output_end: bytearray(), report_end: bytearray()}
    with selectors.DefaultSelector() as waiting:
        for end in parts:
            waiting.register(end, selectors.EVENT_READ)
        while waiting.get_map():
            events = waiting.select(max(deadline - time.monotonic(), 0))
            if not events:
                return bytes(parts[output_end]), bytes(parts[report_end]), False
            for key, _ in events:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    waiting.unregister(key.fd)
                elif len(parts[key.fd]) < _OUTPUT_LIMIT:
                    parts[key.fd] += chunk
    return bytes(parts[output_end]), bytes(parts[report_end]), True


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def main() -> None:
    job = json.load(sys.stdin)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if job.get("probe"):
        answer = restrict(job, os.getcwd())
    else:
        answer, end = [], time.monotonic() + job["total_s"]
        for test in job["tests"]:
            left = min(job["wall_s"], end - time.monotonic())
            if left <= 0:
                answer.append({"passed": False, "detail": f"not run: the tests before took {job['total_s']} s"})
                continue
            directory = tempfile.mkdtemp(dir=os.getcwd())  # removed by whoever called: programs leave all sorts of trees
            answer.append(_attempt(job, test, directory, left))
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
