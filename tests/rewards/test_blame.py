"""Who is to blame where no verdict comes: the reply, whose score is 0, or the verifier, whose sample is left out."""

import time

import pytest

from tulu_mega.rewards import CodeLimits, Judge, RewardSpec, Verdict, VerifierInput, VerifierPool, pool, sandbox, supervisor
from tulu_mega.rewards.cpu_limit import TooLong, cpu_limit
from tulu_mega.rewards.sandbox import Outcome, run_program

STARTED = "say({'started': True})\n"
PASSED = "say({'passed': True, 'kind': '', 'detail': ''})\n"
FOREVER = "time.sleep(3600)\n"
TESTS = [{"statement": "pass"}] * 3
AGES = 600.0


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Has a sandbox whose supervisor does nothing but what it is told; gives the file in which it counts its starts."""
    starts = tmp_path / "starts"
    monkeypatch.setattr(sandbox, "protections", lambda: frozenset({"files", "calls"}))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    (tmp_path / "sandboxed").mkdir()

    def does(body: str):
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "sandboxed" / "entry.py").write_text(
            "import json, os, sys, time\n"
            f"def say(message): print(json.dumps(message), flush=True)\n\ndef main():\n"
            f"    with open({str(starts)!r}, 'a') as file: file.write('x')\n"
            f"    starts = os.path.getsize({str(starts)!r})\n{lines}"
        )
        return starts

    return does


def patience(monkeypatch, start=AGES, work=AGES, end=AGES):
    monkeypatch.setattr(sandbox, "_START_S", start)
    monkeypatch.setattr(sandbox, "SLACK_S", work)
    monkeypatch.setattr(supervisor, "_END_S", end)


def test_no_answer_after_the_program_was_started_is_a_zero_for_its_time(stand_in, monkeypatch):
    starts = stand_in(STARTED + PASSED + FOREVER)
    patience(monkeypatch, work=0.3)
    outcomes = run_program("x = 1", TESTS, CodeLimits(total_s=0.2))
    assert outcomes[1:] == [Outcome(False, "ran longer than 0.5 s", "time")] * 2
    assert outcomes[0] in (Outcome(True, ""), outcomes[1])  # on a busy machine its first answer may come too late, too
    assert starts.read_text() == "x"


def test_a_sandbox_that_ends_after_the_program_was_started_is_a_zero_and_a_crash(stand_in, monkeypatch):
    patience(monkeypatch)
    for end, told in {
        "os._exit(7)": "exit status 7",
        "os.kill(os.getpid(), 9)": "signal 9",
        "raise OSError('full')": "OSError: full",
    }.items():
        starts = stand_in(STARTED + PASSED + end)
        outcomes = run_program("x = 1", TESTS, CodeLimits())
        assert outcomes == [Outcome(True, ""), *[Outcome(False, f"the sandbox failed: {told}", "crash")] * 2]
        assert starts.read_text() == "x"
        starts.unlink()


def test_a_sandbox_that_did_not_start_is_tried_once_more(stand_in, monkeypatch):
    patience(monkeypatch)
    starts = stand_in("if starts == 1: os._exit(1)\n" + STARTED + PASSED * 3)
    assert run_program("x = 1", TESTS, CodeLimits()) == [Outcome(True, "")] * 3
    assert starts.read_text() == "xx"


@pytest.mark.parametrize(
    ("does", "told"), [("raise OSError('no room')", "OSError: no room"), (FOREVER, "did not start within 0.2 s")]
)
def test_a_sandbox_that_does_not_start_twice_is_no_verdict(stand_in, monkeypatch, does, told):
    starts = stand_in(does)
    patience(monkeypatch, start=AGES if "raise" in does else 0.2)
    with pytest.raises(RuntimeError, match=told):
        run_program("x = 1", TESTS, CodeLimits())
    assert starts.read_text() == "xx" if "raise" in does else True


def test_a_supervisor_that_has_said_all_is_not_waited_for(stand_in, monkeypatch):
    stand_in(STARTED + PASSED * 3 + FOREVER)
    patience(monkeypatch, end=0.1)
    began = time.monotonic()
    assert run_program("x = 1", TESTS, CodeLimits()) == [Outcome(True, "")] * 3
    assert time.monotonic() - began < AGES


# -- workers ----------------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
def say(message): print(json.dumps(message), flush=True)
def starts(file):
    with open(file, "a") as count: count.write("x")
    return os.path.getsize(file)
sys.stdin.readline()
say({"ready": True})
for line in sys.stdin:
"""
VERDICT = "say({'verdict': {'score': 1.0}, 'leaving': False})"
BEGUN = "say({'begun': True})"


def verdict_of(monkeypatch, *lines, timeout_s=AGES):
    monkeypatch.setattr(pool, "_PROGRAM", ("-c", WORKER + "".join(f"    {line}\n" for line in lines)))
    with VerifierPool(names=["gsm8k"], workers=1, timeout_s=timeout_s) as judges:
        return judges.judge([VerifierInput("4", "gsm8k", "4")])[0]


def test_a_worker_that_is_lost_over_a_reply_twice_is_a_zero_of_its_kind(monkeypatch):
    assert verdict_of(monkeypatch, BEGUN, "os._exit(7)") == Verdict.of(
        False, "the verifier's process ended (exit status 7)", "crash"
    )
    late = verdict_of(monkeypatch, BEGUN, "time.sleep(3600)", timeout_s=0.3)
    assert (late.score, late.kind) == (0.0, "time") or "within 0.3 s" in late.error  # it may have been too late to begin


def test_a_worker_that_is_lost_over_a_reply_once_is_asked_again(monkeypatch, tmp_path):
    once = f"if starts({str(tmp_path / 'starts')!r}) == 1: os.kill(os.getpid(), 9)"
    assert verdict_of(monkeypatch, BEGUN, once, VERDICT) == Verdict(1.0)


def test_a_worker_that_is_lost_before_is_an_error(monkeypatch):
    assert "exit status 7" in verdict_of(monkeypatch, "os._exit(7)").error
    assert "within 0.2 s" in verdict_of(monkeypatch, "time.sleep(3600)", timeout_s=0.2).error


# -- verifiers --------------------------------------------------------------------------------------------------------------

ENDLESS = VerifierInput("a" * 60 + "b", "format", r"\A(a+)+\Z")


def test_a_reply_over_which_a_verifier_of_ours_takes_too_long_is_wrong():
    verdict = Judge(seconds=0.3)(ENDLESS)
    assert (verdict.score, verdict.kind, verdict.parts) == (0.0, "time", {"format": 0.0})


def test_a_reply_over_which_a_verifier_of_ours_takes_too_long_is_wrong_to_a_pool():
    with VerifierPool(names=["format"], workers=1, timeout_s=0.5) as judges:
        (verdict,) = judges.judge([ENDLESS])
    assert (verdict.score, verdict.kind) == (0.0, "time") or "within 0.5 s" in verdict.error  # it may be too late to begin


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_what_a_verifier_of_ours_cannot_hold_is_wrong_and_what_anothers_cannot_is_an_error(error, monkeypatch):
    def fails(*_, **__):
        raise error

    judge = Judge(RewardSpec(aliases={"sums": "gsm8k"}))
    monkeypatch.setattr(type(judge.verifier("gsm8k")), "__call__", fails)
    verdict = judge(VerifierInput("4", "sums", "4"))
    assert (verdict.score, verdict.kind) == (0.0, "memory")
    own = Judge(RewardSpec(custom={"gsm8k": "tests.rewards.test_blame:anothers"}))
    assert error.__name__ in own(VerifierInput(error.__name__, "GSM", "4")).error
    assert not own.built_in("gsm") and judge.built_in("sums") and not judge.built_in(["sums", "own"])


LONG = {
    "opened titles": ("ifeval", "<<" * 60_000, {"func_name": "validate_title"}),
    "opened titles of 2024": ("ifeval_2024", "<" * 60_000, {"func_name": "validate_title"}),
    "opened brackets": ("ifeval", "[" * 60_000, {"func_name": "validate_placeholders", "N": 3}),
    "opened comments": ("format", "<think>" + "<!--" * 60_000 + "</think>", {"sections": ["<think>", "</think>"]}),
    "blanks behind a box": ("math", r"\boxed{4}" + " " * 60_000 + "is wrong", "4"),
}
"""Replies that took from 15 s to minutes; but for the last, whose answer was no longer seen to be taken back."""


@pytest.mark.parametrize("name", LONG)
def test_long_replies_are_read_once(name):
    verifier, reply, truth = LONG[name]
    verdict = Judge(seconds=5)(VerifierInput(reply, verifier, truth))
    assert (verdict.score, verdict.kind) == (0.0, "")


def anothers(response, ground_truth, *, messages):
    raise {"MemoryError": MemoryError, "RecursionError": RecursionError}[response]


def test_a_limit_within_a_limit_takes_of_its_time():
    with pytest.raises(TooLong), cpu_limit(0.3):
        while True:
            with pytest.raises(TooLong), cpu_limit(0.1):
                while True:
                    pass
    with cpu_limit(60), cpu_limit(60):
        pass
