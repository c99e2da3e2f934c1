"""What training refuses and published graders take: answers left to be calculated, several answers, sections of nothing."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.config import GrpoSettings
from tulu_mega.evaluation import judging
from tulu_mega.evaluation.task import Problem
from tulu_mega.evaluation.tasks import TASKS
from tulu_mega.rewards import Judge, RewardSpec, VerifierInput
from tulu_mega.rewards.mathematics.finding import answers
from tulu_mega.rewards.mathematics.finished import finished
from tulu_mega.rewards.verifiers.format import Format
from tulu_mega.rewards.verifiers.ifeval import IfEval
from tulu_mega.rewards.verifiers.math import MathAnswer
from tulu_mega.rl.judging import reward_spec

PHRASE = "Final Answer: The final answer is "
UNEVALUATED = [
    ("What is $2+2$?", "4"), (r"\boxed{2+2}", "4"), (r"\boxed{\int_0^2 x\,dx}", "2"), (r"\boxed{\sum_{k=1}^4 k}", "10"),
    (r"\boxed{3\cdot 4}", "12"), (r"\boxed{\frac{8}{2}}", "4"),
    (r"\boxed{\sqrt{16}}", "4"), (r"\boxed{\max(3,4)}", "4"), (r"\boxed{\gcd(8,12)}", "4"), (r"\boxed{\lfloor 4.5\rfloor}", "4"),
    (r"\boxed{|-4|}", "4"), (r"\boxed{\binom{5}{2}}", "10"), (r"\boxed{5!}", "120"), (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{-(-4)}", "4"), (r"\boxed{\log_2 8}", "3"), (r"\boxed{4\cos 0}", "4"), (r"\boxed{10-6}", "4"),
    (r"\boxed{\arccos(-1)}", r"\pi"), (PHRASE + r"$\frac{9}{3}+\frac{2}{2}$", "4"), (r"It is $\frac{8}{2}$", "4"),
]  # fmt: skip
SEVERAL = [
    (rf"\boxed{{3}} {PHRASE}$4$", "4"), (rf"\boxed{{3}} {PHRASE}$4$", "3"), (rf"{PHRASE}$4$ \boxed{{3}}", "3"),
    (PHRASE + "$3$ or $4$.", "3"), (PHRASE + "$3$, $4$", "3"), (PHRASE + "$3$ or 4", "3"), (PHRASE + "$3$ (or maybe $4$)", "3"),
    (r"\boxed{3} or \boxed{4}", "4"), (r"$\boxed{3}$, $\boxed{4}$", "4"), (r"\boxed{3}\text{ or }\boxed{4}", "4"),
    (r"\fbox{3} / \boxed{4}", "4"), ("It is $3$ or $4$", "4"), (r"It is \(3\) or maybe \(4\)", "4"),
    (r"\boxed{5=4}", "4"), (r"\boxed{4\approx 5}", "4"), (r"\boxed{4} is wrong, it is 3", "4"),
    (PHRASE + "$4$ is wrong, it is $3$", "4"), (r"\boxed{4} which is not the answer", "4"),
]  # fmt: skip
NEVER = [
    (r"\boxed{400\%}", "4"), (r"\boxed{4\text{ is wrong, it is 3}}", "4"), (r"\boxed{4 or 5}", "4"), (r"\boxed{4,5}", "4"),
    (r"\boxed{\det\begin{pmatrix}1&2\\3&4\end{pmatrix}}", "-2"),
]  # fmt: skip
RIGHT = [
    (r"\boxed{4}", "4"), (r"Then $x=3$, so \boxed{4}.", "4"), (rf"\boxed{{4}} {PHRASE}$4$.", "4"), (r"\boxed{4.0}", "4"),
    (rf"\boxed{{\frac12}} {PHRASE}$0.5$", "0.5"), (r"\boxed{3\cdot 4 = 12}", "12"), (r"\boxed{x = 4}", "4"),
    (r"\boxed{\frac{1}{3}\approx 0.33}", r"\frac13"), (r"\boxed{\frac24}", r"\frac12"), (r"\boxed{1\frac12}", r"\frac32"),
    (r"\boxed{1.2\times10^3}", "1200"), (r"\boxed{1,200}", "1200"), (r"\boxed{1} and \boxed{2}", "1,2"), (r"\boxed{4\%}", "4"),
    (PHRASE + r"$\frac12$, or $0.5$", r"\frac12"), (PHRASE + "$4$, since $2+2=4$", "4"), (PHRASE + r"$5$\,cm", "5"),
    (PHRASE + r"$5$ \text{ cm}", "5"), ("It is $4$", "4"), ("It is $1$ or $2$", "1,2"), (r"\boxed{2^{100}}", str(2**100)),
    (r"\boxed{\sin x}", r"\sin x"), (r"\boxed{\binom{n}{2}}", r"\frac{n(n-1)}{2}"), (r"\boxed{\frac{\ln 3}{\ln 2}}", r"\log_2 3"),
    (r"We try \boxed{3}. That fails, because $3\ne 4$; so \boxed{4}", "4"), (r"\boxed{\sqrt{18}}", r"3\sqrt2"),
    (r"The sides are $a=3$, $b=4$, $c=5$", "5"), (r"\boxed{(x-1)(x+1)}", "x^2-1"), (r"\boxed{2^3\cdot 3}", r"2^3\cdot 3"),
    ("4", "4"), (r"\boxed{12} inches", "12"), (r"\boxed{-\frac{2}{4}}", r"-\frac12"), (r"\boxed{7}, which is not even.", "7"),
    (PHRASE + "$1$ and $2$", "1,2"), (r"\boxed{|x|>1}", r"(-\infty,-1)\cup(1,\infty)"),
]  # fmt: skip


@pytest.fixture(scope="module")
def strict():
    return MathAnswer()


@pytest.fixture(scope="module")
def published():
    return MathAnswer(["unevaluated", "several"])


def test_what_is_left_to_be_calculated_earns_where_it_is_accepted_alone(strict, published):
    assert [pair for pair in UNEVALUATED if strict(*pair).score] == []
    assert [pair for pair in UNEVALUATED if not published(*pair).score] == []
    several = MathAnswer(["several"])
    assert [pair for pair in UNEVALUATED if several(*pair).score] == []


def test_several_answers_earn_where_they_are_accepted_alone(strict, published):
    assert [pair for pair in SEVERAL if strict(*pair).score] == []
    assert [pair for pair in SEVERAL if not published(*pair).score] == []


def test_other_answers_earn_nowhere(strict, published):
    assert [pair for pair in NEVER if strict(*pair).score or published(*pair).score] == []


def test_one_finished_answer_earns(strict):
    assert [(pair, strict(*pair).detail) for pair in RIGHT if not strict(*pair).score] == []


@pytest.mark.parametrize(("left", "right"), [("$", "$"), (r"\(", r"\)"), (r"\[ ", r" \]")])
def test_the_question_s_own_formula_in_a_box_is_no_answer(strict, published, left, right):
    asked = [{"role": "user", "content": f"Factor {left}x^2 - 1{right}."}]
    for form in (r"\boxed{x^2-1}", "It is $x^2 - 1$"):
        assert strict(form, "(x-1)(x+1)", messages=asked).score == 0.0
        assert published(form, "(x-1)(x+1)", messages=asked).score == 1.0
        assert strict(form, "x^2-1", messages=asked).score == 1.0


def test_numerals_of_a_chain_agree():
    assert finished("12", r"3\cdot4=12") and finished(r"\frac13", r"\frac13\approx0.333")
    assert not finished("12", r"13=12") and not finished(r"\frac13", r"\frac13\approx0.34") and not finished("12", r"3\cdot4")


PIECES = [*r"{} $ \( \) 3 , = - x \boxed \approx \frac \text{".split(), " or ", " is wrong", "\n", PHRASE, "{", "}"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_whatever_a_reply_holds_is_read(reply):
    for way in (way for ways in answers(reply) for way in ways):
        assert way and all(candidate.text for candidate in way)
        assert [finished(truth, candidate.text) in (True, False) for candidate in way for truth in ("4", r"\pi", "x^2")]


@pytest.mark.parametrize("piece", ["\\boxed{", "\\boxed{3} or ", "$3$ or ", "$", "\\(3\\) or "])
def test_long_replies_are_read_in_a_moment(piece):
    start = time.process_time()
    answers(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 2


def test_training_is_strict_and_can_repeat_what_was_published():
    base = {"model": "m", "run_dir": "r", "data": "d"}
    sample = VerifierInput("So $2+2$", "math", "4")
    for rewards, score in (({}, 0.0), ({"math_accepts": ["unevaluated", "several"]}, 1.0)):
        spec = reward_spec(GrpoSettings.model_validate({**base, "rewards": rewards}).rewards)
        assert Judge(RewardSpec.of(spec.as_dict()))(sample).score == score


def test_evaluation_grades_as_published():
    problem = Problem([{"role": "user", "content": "Go."}], "4", "", verifier="math")
    [[first, second]] = judging.judge(TASKS["math"], [problem], [[r"\boxed{2+2}", rf"\boxed{{4}} {PHRASE}$5$"]], {})
    assert [next(iter(one.values.values()))[0] for one in (first, second)] == [1.0, 1.0]


UNSEEN = ["", " ", "\u200b", "\u200d\ufeff", "\u2060\n", "\u3164", "\u2800", "\u00ad", "\x00", "\u0301", "\ufe0f", "\U000e0020"]


@pytest.mark.parametrize("nothing", [*UNSEEN, "</think>", "<br>", "<!-- 4 -->", "&nbsp;"])
def test_sections_of_nothing_that_can_be_seen_are_empty(nothing):
    truth = {"sections": ["<think>", "<answer>"]}
    assert Format()(f"<think>{nothing}<answer>4", truth).score == 0.0
    assert Format()(f"<think>4<answer>{nothing}</answer>", truth).score == 0.0
    assert Format()(f"<think>a < b{nothing}</think><answer>4{nothing}</answer>", truth).score == 1.0


@pytest.mark.parametrize("nothing", UNSEEN)
def test_a_reply_of_nothing_meets_no_constraint(nothing):
    assert IfEval()(nothing, '{"func_name": "validate_no_commas"}').score == 0.0
    assert IfEval()(f"{nothing}a", '{"func_name": "validate_no_commas"}').score == 1.0
