"""Which verifier judges a row, what is refused before a run, and a pool that outlives its verifiers."""

import asyncio
import json
import math
import os
import subprocess
import sys
import textwrap
import time

import pytest

from tulu_mega.errors import UserError
from tulu_mega.rewards import CodeLimits, Judge, RewardSpec, Verdict, VerifierInput, VerifierPool, check_rows
from tulu_mega.rewards.registry import BUILT_IN
from tulu_mega.rewards.verifiers.gsm8k import Gsm8k
from tulu_mega.rl.judging import JudgedResponse

NO_COMMAS = json.dumps({"func_name": "validate_no_commas", "N": None})


@pytest.fixture(scope="module", autouse=True)
def own_verifiers(tmp_path_factory):
    """A user's module on the path, of this process and so of the workers'."""
    directory = tmp_path_factory.mktemp("own")
    (directory / "own_verifiers.py").write_text(
        textwrap.dedent("""
        import os, sys, time
        from tulu_mega.rewards import Verdict

        def length(response, ground_truth, *, messages):
            return len(response) / ground_truth

        def asks(response, ground_truth, *, messages):
            return Verdict(1.0, messages[-1]["content"])

        def _check(ground_truth):
            if ground_truth != "x":
                raise ValueError(f"expected 'x', got {ground_truth!r}")

        def checked(response, ground_truth, *, messages):
            return True

        checked.check = _check

        def trouble(response, ground_truth, *, messages):
            print("noise on standard output")
            match response:
                case "crash":
                    os._exit(7)
                case "kill":
                    os.kill(os.getpid(), 9)
                case "exit":
                    sys.exit("enough")
                case "hang":
                    time.sleep(600)
                case "raise":
                    raise KeyError("lost")
                case "memory":
                    return len(bytearray(1 << 34))
                case "nan":
                    return float("nan")
                case "text":
                    return "good"
                case "error":
                    return Verdict.failed("cannot tell")
                case "slow":
                    time.sleep(0.2)
                case "pid":
                    return os.getpid()
            return 1.0

        NUMBER = 5

        def answers(response, ground_truth, *, messages):
            import decimal, fractions, math, numpy  # what the ground truth is worth in Python
            value = eval(ground_truth, {"numpy": numpy, **vars(math), **vars(decimal), **vars(fractions)})
            return Verdict(value) if response == "verdict" else value

        class Whole:
            def __call__(self, response, ground_truth, *, messages):
                return response == ground_truth
        """)
    )
    sys.path.insert(0, str(directory))
    yield
    sys.path.remove(str(directory))


OWN = {name: f"own_verifiers:{name}" for name in ("length", "asks", "checked", "trouble", "answers")}


NUMBERS = {
    "True": 1.0, "3": 3.0, "0.5": 0.5, "Fraction(1, 4)": 0.25, "Decimal('0.5')": 0.5, "numpy.float32(0.5)": 0.5, "-0.0": 0.0,
    "numpy.float64(0.5)": 0.5, "numpy.bool_(True)": 1.0, "numpy.int64(3)": 3.0, "numpy.array(0.5)": 0.5, "numpy.float16(2)": 2.0,
}  # fmt: skip
NONE = ("nan", "inf", "-inf", "numpy.float32('nan')", "numpy.float64('inf')", "Decimal('NaN')", "'1.0'", "1e39", "10 ** 400",
        "1j", "numpy.array([1.0, 2.0])", "[1.0]", "numpy.str_('1.0')", "-1e300")  # fmt: skip


@pytest.mark.parametrize("way", ["number", "verdict"])
def test_scalars_are_numbers_and_what_is_not_finite_is_an_error_of_its_sample(way):
    """In a verdict, too: one NaN would make loss and gradient of a whole batch NaN."""
    judge = Judge(RewardSpec(custom=OWN))
    found = {value: judge(VerifierInput(way, "answers", value)) for value in (*NUMBERS, *NONE)}
    for value, score in NUMBERS.items():
        verdict = found[value]
        assert (verdict.score, verdict.error, verdict.parts) == (score, None, {"answers": score}), value
        assert type(verdict.score) is float and json.dumps(vars(verdict))
    for value in NONE:
        assert found[value].score is None and "expected" in found[value].error and "finite number" in found[value].error, value


def test_torchs_scalars_are_numbers_and_weighted_sums_may_be_none():
    torch = pytest.importorskip("torch")
    assert [Verdict(torch.tensor(value)).score for value in (1.0, True, 3)] == [1.0, 1.0, 3.0]
    assert Verdict(torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True)).score == 0.5
    for wrong in (torch.tensor(math.nan), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="expected a finite number"):
            Verdict(wrong)
    judge = Judge(RewardSpec(custom=OWN, weights={"answers": 1e20}))
    assert "add up to 1e+40" in judge(VerifierInput("", "answers", "1e20")).error


def test_names_of_tulus_data_and_their_aliases():
    judge = Judge()
    for name, verifier in {
        "gsm8k": "gsm8k",
        "GSM8K": "gsm8k",
        "MATH": "math",
        "math": "math",
        "ifeval": "ifeval",
        "RLVR-GSM": "gsm8k",
        "code": "python_code",
    }.items():
        assert judge.resolve(name) == verifier
    assert isinstance(judge.verifier("GSM8K"), Gsm8k)
    assert judge.verifier("gsm8k") is judge.verifier("gsm")


def test_an_alias_of_the_settings_moves_the_names_that_lead_to_it():
    judge = Judge(RewardSpec(aliases={"ifeval": "ifeval_2024", "sums": "GSM"}))
    assert judge.resolve("IFEval") == judge.resolve("rlvr-ifeval") == "ifeval_2024"
    assert judge.resolve("sums") == "gsm8k"


def test_every_built_in_verifier_loads_and_says_whose_behaviour_it_follows():
    judge = Judge(RewardSpec(code=CodeLimits(allow_unprotected=True)))
    for name in BUILT_IN:
        told = type(judge.verifier(name)).__doc__.lower()
        assert any(word in told for word in ("2024", "2025", "2026", "nothing published")), name


def test_several_verifiers_are_summed_with_their_weights():
    judge = Judge(RewardSpec(weights={"MATH": 10, "ifeval": 0.5}))
    verdict = judge(VerifierInput(r"\boxed{5}, yes", ["math", "ifeval", "gsm8k"], ["5", NO_COMMAS, "5"]))
    assert verdict.score == 11.0
    assert verdict.parts == {"math": 1.0, "ifeval": 0.0, "gsm8k": 1.0}
    assert "ifeval: validate_no_commas() is not met" in verdict.detail
    assert judge(VerifierInput("5", ["gsm8k"], "5")).score == 1.0


def test_a_verifier_that_is_named_twice_is_summed_and_solves_only_where_it_is_met_twice():
    judge = Judge(RewardSpec(weights={"ifeval": 0.5}))
    long = json.dumps({"func_name": "validate_word_constraint", "N": 3, "quantifier": "at least"})
    verdicts = [
        judge(VerifierInput(reply, ["ifeval", "IFEval", "exact_match"], [NO_COMMAS, long, reply]))
        for reply in ("one", "one two three")
    ]
    assert [verdict.score for verdict in verdicts] == [1.5, 2.0]
    assert [verdict.parts for verdict in verdicts] == [{"ifeval": 1.0, "ifeval#2": met, "exact_match": 1.0} for met in (0.0, 1.0)]
    assert [JudgedResponse(None, "", verdict, verdict.score).solved for verdict in verdicts] == [False, True]


def test_names_of_ones_own_that_look_like_a_second_verifier_keep_their_scores_apart():
    judge = Judge(RewardSpec(custom={"length#2": "own_verifiers:length", "length": "own_verifiers:length"}))
    verdict = judge(VerifierInput("four", ["length", "length#2", "length"], [4, 2, 1]))
    assert verdict.score == 7.0
    assert verdict.parts == {"length": 1.0, "length#2": 2.0, "length#3": 4.0}


def test_one_verifier_that_fails_makes_the_sample_an_error():
    judge = Judge(RewardSpec(custom=OWN))
    verdict = judge(VerifierInput("raise", ["exact_match", "trouble"], ["raise", None]))
    assert verdict == Verdict.failed("trouble: KeyError: 'lost'")
    assert judge(VerifierInput("error", "trouble", None)).error == "trouble: cannot tell"
    assert "finite number" in judge(VerifierInput("nan", "trouble", None)).error
    assert "finite number" in judge(VerifierInput("text", "trouble", None)).error


def test_a_verdict_has_a_score_or_an_error():
    for wrong in ({"score": None}, {"score": 1.0, "error": "x"}):
        with pytest.raises(ValueError, match="either a score or an error"):
            Verdict(**wrong)


def test_own_verifiers():
    judge = Judge(RewardSpec(custom={**OWN, "gsm8k": "own_verifiers:length", "whole": "own_verifiers:Whole"}))
    assert judge(VerifierInput("four", "length", 8)).score == 0.5
    assert judge(VerifierInput("four", "gsm8k", 4)).score == 1.0
    assert judge(VerifierInput("four", "whole", "four")).score == 1.0
    messages = [{"role": "user", "content": "why?"}]
    assert judge(VerifierInput("four", "asks", None, messages)).detail == "why?"
    assert judge.check({"dataset": "asks"}) == []
    assert judge.check({"dataset": "checked", "ground_truth": "y"}) == ["ground_truth for 'checked': expected 'x', got 'y'"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"custom": {"a": "nowhere"}}, "expected 'module:function', got 'nowhere'"),
        ({"custom": {"a": "no_such_module:f"}}, "cannot be imported"),
        ({"custom": {"a": "own_verifiers:f"}}, "has no 'f'"),
        ({"custom": {"a": "own_verifiers:NUMBER"}}, "is a int, expected a function"),
        ({"aliases": {"a": "gms8k"}}, "did you mean 'gsm8k'"),
        ({"weights": {"maths": 1.0}}, "did you mean 'math'"),
        ({"weights": {"math": float("nan")}}, "expected a finite number"),
        ({"weights": {"math": "1"}}, "expected a finite number"),
    ],
)
def test_a_spec_that_leads_nowhere_is_refused(spec, says):
    with pytest.raises(UserError) as caught:
        Judge(RewardSpec(**spec))
    assert says in str(caught.value)


def test_all_problems_of_a_spec_are_told_together():
    with pytest.raises(UserError) as caught:
        Judge(RewardSpec(custom={"a": "b"}, aliases={"c": "d"}, weights={"e": 1.0}))
    assert len(caught.value.problems) == 3


def test_rows_are_checked_before_the_run_and_named_by_file_and_line():
    rows = [
        {"dataset": "gsm8k", "ground_truth": "5"},
        {"dataset": "gsm9k", "ground_truth": "5"},
        {"dataset": "MATH", "ground_truth": ""},
        {"dataset": "ifeval", "ground_truth": "{}"},
        {"dataset": "gsm8k"},
        {"ground_truth": "5"},
        {"dataset": ["gsm8k", "math"], "ground_truth": "5"},
        {"dataset": ["gsm8k", "math"], "ground_truth": ["5"]},
        {"dataset": 5, "ground_truth": "5"},
        {"dataset": [], "ground_truth": []},
        {"dataset": ["gsm8k", "math"], "ground_truth": ["five", "5"]},
    ]
    with pytest.raises(UserError) as caught:
        check_rows(rows, where=lambda index: f"train.jsonl line {index + 1}")
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == [f"train.jsonl line {line}" for line in range(2, 12)]
    for problem, says in zip(
        problems,
        [
            "unknown verifier 'gsm9k'; did you mean 'gsm8k'",
            "which is empty",
            "func_name",
            "ground_truth for 'gsm8k': not given",
            "no 'dataset'",
            "a list of 2, one for each verifier of 'dataset', got a str",
            "got 1",
            "got 5",
            "got []",
            "got 'five'",
        ],
        strict=True,
    ):
        assert says in problem


def test_the_first_twenty_problems_are_told_and_the_others_counted():
    with pytest.raises(UserError) as caught:
        check_rows([{"dataset": "gsm8k", "ground_truth": "x"}] * 50)
    assert len(caught.value.problems) == 21
    assert "30 more" in caught.value.problems[-1]


def test_good_rows_name_the_verifiers_they_need():
    rows = [
        {"dataset": "GSM8K", "ground_truth": "5"},
        {"dataset": ["MATH", "ifeval"], "ground_truth": ["5", NO_COMMAS]},
    ]
    assert check_rows(rows) == ["gsm8k", "ifeval", "math"]


@pytest.fixture(scope="module")
def pool(own_verifiers):
    with VerifierPool(RewardSpec(custom=OWN), ["gsm8k", "trouble"], workers=2, timeout_s=60.0, memory_mb=2048) as pool:
        yield pool


def test_order_is_kept_and_the_pool_says_what_the_judge_says(pool):
    samples = [
        VerifierInput(reply, "gsm8k", str(n)) for n in range(60) for reply in (f"It is {n}.", "", f"{n} \ud800 é\n{n + 1}")
    ]
    assert pool.judge(samples) == list(map(Judge(), samples)) == pool.judge(samples)


def test_a_verifier_in_trouble_spoils_its_own_sample_alone(pool):
    kinds = ["crash", "kill", "exit", "raise", "memory", "nan"]
    samples = [VerifierInput(reply, "trouble", None) for kind in kinds for reply in (kind, "fine")]
    verdicts = pool.judge(samples)
    assert [verdict.score for verdict in verdicts[1::2]] == [1.0] * len(kinds)
    errors = [verdict.error for verdict in verdicts[::2]]
    assert [verdict.score for verdict in verdicts[::2]] == [None] * len(kinds)
    for error, says in zip(
        errors, ["status 7", "signal 9", "status 1", "KeyError", "MemoryError", "finite"], strict=True
    ):
        assert says in error


def test_a_verifier_that_takes_too_long_spoils_its_own_sample_alone():
    with VerifierPool(RewardSpec(custom=OWN), ["trouble"], workers=1, timeout_s=2.0) as hurried:
        hung, fine = hurried.judge([VerifierInput(reply, "trouble", None) for reply in ("hang", "fine")])
    assert (hung.score, fine.score) == (None, 1.0) and "within 2 s" in hung.error


def test_workers_stay_warm(pool):
    held = bytearray(1200 * 2**20)  # a parent larger than what a worker may hold makes no worker look bloated
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    pool.judge([VerifierInput("crash", "trouble", None)] * 2)  # new workers, children of that parent
    pool.judge([VerifierInput("x", "trouble", None)] * 4)  # both up again
    pids = {verdict.score for _ in range(5) for verdict in pool.judge([VerifierInput("pid", "trouble", None)] * 4)}
    assert len(pids) <= 2
    assert os.getpid() not in pids
    started = [worker._process.pid for worker in pool._workers]
    for _ in range(50):
        pool.judge([VerifierInput("7", "gsm8k", "7")])
    assert [worker._process.pid for worker in pool._workers] == started


def test_futures_can_be_awaited(pool):
    async def rollouts():
        futures = [asyncio.wrap_future(pool.submit(VerifierInput(reply, "trouble", None))) for reply in ("slow", "raise", "fine")]
        return [(await future).score for future in futures]

    assert asyncio.run(rollouts()) == [1.0, None, 1.0]


def test_what_is_no_json_is_that_samples_error(pool):
    verdicts = pool.judge(
        [VerifierInput("7", "gsm8k", {1, 2}), VerifierInput("7", "gsm8k", "7"), VerifierInput("7", "unknown", "7")]
    )
    assert "not plain JSON" in verdicts[0].error
    assert verdicts[1].score == 1.0
    assert "unknown verifier" in verdicts[2].error


def test_the_same_verdicts_with_one_worker(pool):
    samples = [VerifierInput(f"{n}", "gsm8k", str(n % 3)) for n in range(20)]
    with VerifierPool(names=["gsm8k"], workers=1) as single:
        assert single.judge(samples) == pool.judge(samples)


def test_closing_ends_the_workers_and_what_is_queued():
    pool = VerifierPool(RewardSpec(custom=OWN), ["trouble"], workers=1, timeout_s=60)
    processes = [worker._process for worker in pool._workers]
    futures = [pool.submit(VerifierInput("hang", "trouble", None)) for _ in range(3)]
    while not futures[0].running():
        time.sleep(0.01)
    pool.close()  # the first would take ten minutes, and has a minute
    assert all(process.poll() is not None for process in processes)
    assert futures[0].result().error
    assert all(future.cancelled() for future in futures[1:])


def test_a_pool_that_cannot_work_is_refused():
    with pytest.raises(UserError, match="unknown verifier"):
        VerifierPool(names=["gms8k"])
    with pytest.raises(UserError, match="raise the time-out"):
        VerifierPool(RewardSpec(code=CodeLimits(total_s=60)), ["code"])
    with pytest.raises(UserError, match="at least one worker"):
        VerifierPool(workers=-1)


def test_rewards_load_without_torch_vllm_or_datasets():
    script = """
import sys
import tulu_mega.rewards
assert not {"torch", "vllm", "datasets", "sympy", "langdetect", "numpy", "transformers"} & sys.modules.keys()
from tulu_mega.rewards.registry import BUILT_IN, Judge
from tulu_mega.rewards import CodeLimits, RewardSpec
judge = Judge(RewardSpec(code=CodeLimits(allow_unprotected=True)))
for name in BUILT_IN:
    judge.verifier(name)
assert not {"torch", "vllm", "datasets", "transformers"} & sys.modules.keys()
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )
