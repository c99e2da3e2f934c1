"""A gallery of programs: right ones earn; cheating, dodging and escaping ones earn nothing, are counted, and leave nothing."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lib.ordinary_user import needs_root, open_to_all, words_before
from tests.rewards import gallery
from tulu_mega.config import GrpoSettings
from tulu_mega.data.prompts import Prompt
from tulu_mega.records import Response
from tulu_mega.rewards import CodeLimits, VerifierInput, VerifierPool
from tulu_mega.rewards.sandbox import protections, run_program, self_test
from tulu_mega.rl.judging import Rewards, count_kinds

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    protections() != {"files", "calls"}, reason="the kernel lacks Landlock or seccomp; python_code refuses to run there"
)
LIMITS = CodeLimits(wall_s=10, total_s=10)


class Texts:
    """Stands for a tokenizer: a response's only token is the number of its text."""

    eos_token_id = -1

    def __init__(self, texts):
        self.texts = texts

    def decode(self, tokens, skip_special_tokens):
        return self.texts[tokens[0]]

    def get_added_vocab(self):
        return {}


def judged_by_grpo(entries, objects=False):
    """The entries' replies judged as a run of grpo judges them."""
    rewards = {"workers": 2, "code_objects": objects}
    settings = GrpoSettings.model_validate({"model": "m", "run_dir": "r", "data": "d", "rewards": rewards}).rewards
    responses = [Response.of_one_turn([0], [number], [0.0], [0], "stop") for number in range(len(entries))]
    with Rewards(settings, ["python_code"], Texts([entry.reply for entry in entries])) as rewards:
        begun = [
            rewards.begin(Prompt([], [{"role": "user", "content": entry.prompt}], [entry.test], "python_code", ""), [response])
            for entry, response in zip(entries, responses, strict=True)
        ]
        return [group[0] for group in rewards.finish([[response] for response in responses], begun)]


@pytest.fixture
def watched(monkeypatch):
    """A temporary directory of the workers, in which nothing and nobody is left. Another pytest would close one of pytest's."""
    before = sorted(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="gallery-") as place:
        victim, scratch = Path(place) / "victim", Path(place) / "scratch"
        victim.write_text("precious")
        scratch.mkdir()
        monkeypatch.setenv("TMPDIR", str(scratch))
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        yield victim
        nothing_is_left(victim, scratch, before)


def nothing_is_left(victim, scratch, before):
    wait_until(lambda: not inhabitants(scratch), "processes are left")
    wait_until(lambda: not list(scratch.iterdir()), "files are left")  # of many the last are removed after the verdict
    assert [name for name in os.listdir("/dev/shm") if name not in before and "program" in name] == []
    assert not Path("/tmp/left_by_a_program").exists()
    assert victim.read_text() == "precious"


def inhabitants(directory):
    """Processes that work beneath a directory."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                place = os.readlink(process / "cwd")
            except OSError:
                continue
            if place.startswith(str(directory)):
                found.append(int(process.name))
    return found


def wait_until(true, what, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_the_gallery_is_large_enough():
    assert len(gallery.read("cheats.txt")) + len(gallery.read("escapes.txt")) >= 250
    assert len(gallery.read("right.txt")) >= 70
    names = [entry.name for file in ("cheats.txt", "escapes.txt", "slow.txt", "right.txt") for entry in gallery.read(file)]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_right_programs_earn():
    entries = gallery.read("right.txt")

    def outcome_of(entry):
        return run_program(entry.program, [entry.job], replace(LIMITS, objects=entry.needs_objects), entry.prompt)[0]

    with ThreadPoolExecutor(2) as threads:
        outcomes = threads.map(outcome_of, entries)
    lost = [f"{entry.name}: {outcome.kind}: {outcome.detail}" for entry, outcome in zip(entries, outcomes, strict=True)]
    assert [line for line, entry in zip(lost, entries, strict=True) if not line.endswith(": : ")] == []


def test_objects_of_the_program_s_classes_are_served_where_they_are_asked_for_alone():
    entries = [entry for entry in gallery.read("right.txt") if entry.needs_objects]
    names = ["a solution in a class", "a stack", "objects given to functions", "class methods and constants"]
    assert [entry.name for entry in entries] == names
    for entry, outcome in [(entry, run_program(entry.program, [entry.job], LIMITS)[0]) for entry in entries]:
        assert (outcome.passed, outcome.kind) == (False, "unserved"), entry.name
        assert "rewards.code_objects serves them" in outcome.detail


def told(kinds: frozenset[str]) -> set[str]:
    """Kinds as a verdict has them, which tells neither a wrong answer nor an error apart from any other zero."""
    return {"" if kind in ("wrong", "error") else kind for kind in kinds}


def test_programs_that_cheat_or_dodge_get_nothing_from_grpo_and_are_counted(watched, capfd):
    entries = [*gallery.read("cheats.txt"), gallery.all_escapes(str(watched))]
    judged = judged_by_grpo(entries)
    with_objects = [entry for entry in entries if entry.needs_objects]
    entries += with_objects
    judged += judged_by_grpo(with_objects, objects=True)
    wrong = [
        f"{entry.name}: {one.reward} {one.verdict}"
        for entry, one in zip(entries, judged, strict=True)
        if one.reward != 0.0 or one.solved or (entry.kinds and one.verdict.kind not in told(entry.kinds))
    ]
    assert wrong == []
    counted = count_kinds("zeros", judged)
    assert {"zeros_unserved", "zeros_tampered", "zeros_left", "zeros_crash", "zeros_disk", "zeros_output"} <= counted.keys()
    assert "sandbox: confined files by Landlock" in capfd.readouterr().out


@pytest.mark.acceptance
def test_programs_that_take_their_time_get_nothing(watched):
    entries = gallery.read("slow.txt")
    for entry in entries:
        outcome = run_program(entry.program, [entry.job] * 2, replace(LIMITS, wall_s=2, cpu_s=2, total_s=5))[0]
        allowed = {"time", *(entry.kinds or {"disk", "memory"})}  # on a busy machine time is over before anything else
        assert not outcome.passed and outcome.kind in allowed, (entry.name, outcome)


@pytest.mark.acceptance
def test_programs_that_try_to_get_out_one_by_one(watched):
    entries = gallery.escapes(str(watched))
    judged = judged_by_grpo(entries)
    assert [f"{entry.name}: {one.verdict}" for entry, one in zip(entries, judged, strict=True) if one.reward != 0.0] == []


def test_a_reply_that_takes_all_its_time_is_wrong_and_counted():
    limits = [{"wall_s": 0.5, "cpu_s": 10}, {"wall_s": 60}, {"wall_s": 60, "cpu_s": 1}]
    programs = ["import time\ndef f(x): time.sleep(60)", "import os, time\nos.close(3)\nos.closerange(0, 99)\ntime.sleep(60)"]
    programs += ["import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef f(x):\n    while True: pass"]
    statement = [{"statement": "assert f(1) == 1"}]
    given = zip(programs, limits, strict=True)
    outcomes = [run_program(program, statement, CodeLimits(total_s=60, **own))[0] for program, own in given]
    assert [outcome.kind for outcome in outcomes] == ["time", "left", "time"]
    assert not any(outcome.passed for outcome in outcomes)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_all_of_it_ends_when_the_judge_does(watched, end):
    scratch = os.environ["TMPDIR"]
    program = "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
    script = (
        "from tulu_mega.rewards.sandbox import *\n"
        f"run_program({program + 'time.sleep(60)'!r}, [{{'statement': 'pass'}}], CodeLimits(wall_s=60, total_s=60))"
    )
    judge = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    wait_until(lambda: len(inhabitants(scratch)) >= 4, "the program did not start")
    judge.send_signal(end)
    judge.wait()
    wait_until(lambda: not inhabitants(scratch) and not os.listdir(scratch), "something outlived the judge")


CHECKS = """
import json, sys
from tests.lib.ordinary_user import needs_root, open_to_all, words_before
from tests.rewards import gallery
from tulu_mega.rewards.sandbox import CodeLimits, protections, require_protections, run_program, self_test
unsafe = sys.argv[1] == "unsafe"  # what tries to get out would
most = None if "all" in sys.argv else 2
cheats = gallery.read("cheats.txt")
entries = [entry for place, entry in enumerate(cheats) if most is None or place < most or "closed folder" in entry.name]
entries += gallery.read("right.txt")[:most]
entries += [gallery.all_escapes(sys.argv[1])] * (not unsafe)
def passes(entry):
    limits = CodeLimits(allow_unprotected=unsafe, objects=entry.needs_objects, wall_s=10)
    return run_program(entry.program, [entry.job], limits, entry.prompt)[0].passed
told = ""
try:
    require_protections(CodeLimits())
except Exception as error:
    told = str(error)
passed = [passes(entry) for entry in entries] if not told or unsafe else []
print(json.dumps({"held": sorted(protections()), "told": told, "passed": passed, "line": self_test()}))
"""


def checked(*arguments, before="", words=()):
    command = [*words, sys.executable, "-c", before + CHECKS, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def as_ordinary_user():
    scratch = Path(os.environ["TMPDIR"])
    open_to_all(scratch, scratch.parents[:1])
    return words_before(ROOT, Path(os.path.dirname(pytest.__file__)), scratch)


@needs_root
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", ["some", pytest.param("all", marks=pytest.mark.acceptance)])
def test_as_an_ordinary_user(watched, share):
    found = checked(str(watched), share, words=as_ordinary_user())
    cheats, right = ([4, 2], [len(gallery.read("cheats.txt")), len(gallery.read("right.txt"))])[share == "all"]
    assert found["passed"] == [False] * cheats + [True] * right + [False]
    assert found["held"] == ["calls", "files"] and "root" not in found["line"]


FILTER = """
import ctypes, struct
def refuse(numbers, error):
    steps = [(0x20, 0, 0, 0)]
    for number in numbers: steps += [(0x15, 0, 1, number), (6, 0, 0, 0x50000 | error)]
    code = b"".join(struct.pack("=HBBI", *step) for step in [*steps, (6, 0, 0, 0x7FFF0000)])
    class Program(ctypes.Structure): _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))
    libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(code, len(code))
    program = Program(len(code) // 8, ctypes.addressof(buffer))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
refuse((444, 445, 446, 272), ERROR)
"""


@pytest.mark.parametrize(
    ("error", "ordinary"), [(1, False), (38, False), pytest.param(1, True, marks=[needs_root, pytest.mark.acceptance])]
)
def test_without_landlock_and_namespaces(watched, error, ordinary):
    words = as_ordinary_user() if ordinary else ()
    refused = checked(str(watched), before=FILTER.replace("ERROR", str(error)), words=words)
    assert refused["held"] == ["calls"]
    assert "Landlock (Linux 5.13" in refused["told"]
    assert refused["passed"] == []
    assert "missing: files" in refused["line"]
    if error == 1:
        unsafe = checked("unsafe", before=FILTER.replace("ERROR", str(error)), words=words)
        assert unsafe["passed"] == [False] * 4 + [True] * 2


def test_what_the_machine_has_is_told_in_a_line():
    line = self_test()
    assert "\n" not in line
    assert line.endswith("missing: nothing")
    print(line)


def test_the_share_of_a_reply_that_fails_one_test_is_kept_and_its_kind_told():
    reply = "```python\nimport os\ndef f(x): return x if x else os._exit(0)\n```"
    with VerifierPool(names=["python_code"], workers=1) as pool:
        [verdict] = pool.judge([VerifierInput(reply, "python_code", ["assert f(1) == 1", "assert f(0) == 0"])])
    assert (verdict.score, verdict.kind) == (0.5, "left")
