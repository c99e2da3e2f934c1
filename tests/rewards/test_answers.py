"""Verifiers that read an answer out of the reply: last numbers, mathematics, whole texts, forms."""

from itertools import islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tulu_mega.quickstart.task import demonstrations, is_correct, problems, prompt_row
from tulu_mega.rewards.mathematics.equality import equivalent
from tulu_mega.rewards.mathematics.finding import candidates, last_boxed
from tulu_mega.rewards.mathematics.latex import simpler
from tulu_mega.rewards.verifiers.exact_match import ExactMatch
from tulu_mega.rewards.verifiers.format import Format
from tulu_mega.rewards.verifiers.gsm8k import Gsm8k
from tulu_mega.rewards.verifiers.last_number import LastNumber
from tulu_mega.rewards.verifiers.math import MathAnswer

# reply, ground truth, score of gsm8k (as published), score of last_number
NUMBERS = [
    ("The answer is 42.", "42", 1, 1),
    ("6 x 200 = 1,200. So $1,200 in total.", "1200", 1, 1),
    ("It costs $1,234,567.", "1,234,567", 1, 1),
    ("#### 72", "72", 1, 1),
    ("She pays $18.50 dollars", "18.50", 1, 1),
    ("She pays $18.50", "18.5", 0, 1),
    ("12.0", "12", 0, 1),
    ("The change is -7", "-7", 0, 1),  # the published expression reads no sign of integers
    ("The change is -7", "7", 1, 0),
    ("The change is -7.5", "-7.5", 1, 1),
    ("−7", "-7", 0, 1),
    ("The change is $-7$.", "-7", 0, 1),  # a dollar that opens a formula
    ("Hence $$-7.5$$", "-7.5", 1, 1),
    ("$12$-5", "5", 1, 1),  # and one that closes it
    ("She loses -$7", "-7", 0, 1),
    (r"She loses -\$1,007.50", "-1007.5", 0, 1),
    ("5-$7", "7", 1, 1),
    ("\u7b54\u6848\u662f-7\u3002", "-7", 0, 1),  # Chinese has no space before it
    ("\u7b54\u6848\u662f$-7$", "-7", 0, 1),
    ("\u03c0-7", "7", 1, 1),  # Greek letters are variables
    ("12-5=7", "7", 1, 1),
    ("x = 12-5", "5", 1, 1),
    ("(3)-5", "5", 1, 1),
    ("50%", "50", 1, 1),
    ("about 3 km/h", "3", 1, 1),
    ("The answer is 42. I checked it 2 times.", "42", 0, 0),
    ("1/2", "2", 1, 1),
    (".5", ".5", 1, 1),
    (".5", "0.5", 0, 1),
    ("1.5.2", "2", 0, 0),
    ("in 2024, 15 left", "15", 1, 1),
    ("1, 2", "2", 1, 1),
    ("1,2", "12", 1, 1),
    ("1,2,3", "3", 1, 0),
    ("٤٢", "42", 0, 1),
    ("", "5", 0, 0),
    ("forty-two", "42", 0, 0),
    ("   \n\t", "0", 0, 0),
    ("12" * 400, "12" * 400, 1, 1),
    ("1e3", "3", 1, 1),
    ("🎉 So 7️⃣", "7", 1, 1),
    ("72", 72, 1, 1),
]


@pytest.mark.parametrize(("reply", "truth", "published", "signed"), NUMBERS)
def test_the_last_number(reply, truth, published, signed):
    for verifier, expected in ((Gsm8k(), published), (LastNumber(), signed)):
        verifier.check(truth)
        verdict = verifier(reply, truth)
        assert verdict.score == expected, f"{type(verifier).__name__}: {verdict.detail}"
        assert verdict.error is None


@pytest.mark.parametrize(
    ("truth", "says"),
    [
        ("", "got ''"),
        ("seven", "got 'seven'"),
        ("5 + 2 = 7 #### 7", "follows '####'"),
        (None, "NoneType"),
        (["7"], "list"),
        (True, "bool"),
        ("7 apples", "number alone"),
    ],
)
def test_a_ground_truth_that_is_no_number_is_refused(truth, says):
    for verifier in (Gsm8k(), LastNumber()):
        with pytest.raises(ValueError, match="expected the answer as a number") as caught:
            verifier.check(truth)
        assert says in str(caught.value)


@settings(deadline=None)
@given(
    st.integers(0, 10**9),
    st.text(alphabet=st.characters(exclude_categories=["N", "Cs"], exclude_characters=",.-+<"), max_size=30),
)
def test_a_number_is_found_whatever_the_words_around_it_and_the_commas_within(number, words):
    for reply in (f"{words} {number} {words}", f"{words} {number:,} {words}", f"1 {words} {number}."):
        assert Gsm8k()(reply, str(number)).score == 1
        assert LastNumber()(reply, str(number)).score == 1


@settings(deadline=None)
@given(st.text(), st.integers())
def test_any_reply_is_judged(reply, truth):
    for verifier in (Gsm8k(), LastNumber()):
        assert verifier(reply, str(truth)).score in (0.0, 1.0)


def test_the_quickstarts_own_judge_agrees_with_gsm8k():
    verifier, compared = Gsm8k(), 0
    replies = [row["messages"][-1]["content"] for row in islice(demonstrations(5), 300)]
    replies += ["", "Ada has 3 pens", "12-5=7.", "7", "The answer is 1,200.", "The answer is 7.5", "1.5.2", "x7", "7 8"]
    for row in map(prompt_row, islice(problems("heldout", 5), 300)):
        verifier.check(row["ground_truth"])
        assert row["dataset"] == "gsm8k"
        for reply in replies[compared % 7 :: 7]:
            assert bool(verifier(reply, row["ground_truth"]).score) == is_correct(reply, row["ground_truth"]), reply
            compared += 1
    assert compared > 10_000


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["12", "-5", "+", "=", "7.", " ", "The answer is ", "3,000", "x"]), max_size=12), st.integers(0, 99)
)
def test_the_quickstarts_judge_differs_from_gsm8k_only_in_the_sign_of_an_integer(pieces, truth):
    reply = "".join(pieces)
    if bool(Gsm8k()(reply, str(truth)).score) != is_correct(reply, str(truth)):
        assert LastNumber()(reply, str(-truth)).score == 1


# reply, ground truth, right
MATHEMATICS = [
    (r"so \boxed{\frac{1}{2}}.", "1/2", True),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
    (r"\boxed{0.5}", r"\frac12", True),
    (r"\boxed{1} no, \boxed{2}", "2", True),
    (r"\boxed{1} no, \boxed{2}", "1", False),
    (r"\boxed{1} and then \boxed{2", "1", False),
    (r"\boxed{\boxed{7}}", "7", True),
    (r"\boxed{}", "5", False),
    (r"\boxed 5", "5", True),
    (r"$\fbox{8}$", "8", True),
    (r"\boxed{\left\{\frac{1}{2}, \frac{3}{4}\right\}}", r"\{\frac{3}{4}, 0.5\}", True),
    ("Final Answer: The final answer is $\\frac{3}{4}$. I hope it is correct.", "0.75", True),
    ("Final Answer: The final answer is 12", "12", True),
    ("\\boxed{3}\nFinal Answer: The final answer is $4$. I hope it is correct.", "4", True),
    ("\\boxed{3}\nFinal Answer: The final answer is $4$. I hope it is correct.", "3", True),
    ("The final value is $x=12\\text{ cm}$", "12", True),
    ("first $3$, then $4$.", "4", True),
    ("first $3$, then $4$.", "3", False),
    (r"It costs \$5, so $6$", "6", True),
    ("It costs $5 a day, so the answer is $15$.", "15", True),  # dollars are paired from the end
    ("It costs $5 a day, so the answer is $15$.", "5 a day, so the answer is", False),
    ("They pay $5 and $10, that is $$15$$", "15", True),
    (r"so $15$, or \$5", "15", True),
    (r"by $x = 3$ we get \(4\)", "4", True),
    (r"by \(x = 3\) we get $4$", "4", True),
    (r"$$\left(3, \frac{\pi}{2}\right)$$", r"(3,\frac{\pi}{2})", True),
    (r"We get \[ x^2 - 1 \]", "(x-1)(x+1)", True),
    (r"We get \( 2k+2 \).", "2(k+1)", True),
    ("42", "42", True),
    ("The answer is 42", "42", False),  # nothing marks the answer
    ("", "5", False),
    (r"\boxed{(1,2]}", "(1,2]", True),
    (r"\boxed{(1,2]}", "(1,2)", False),
    (r"\boxed{[0, \infty)}", r"[0,\infty)", True),
    (r"\boxed{(-\infty, 3)}", r"(3, -\infty)", False),
    (r"\boxed{x \in [-2,7]}", "[-2,7]", True),
    (r"\boxed{50\%}", "50", True),
    (r"\boxed{50\%}", r"50\%", True),
    (r"\boxed{50}", r"60\%", False),
    (r"\boxed{−7}", "-7", True),
    (r"\boxed{-7}", "7", False),
    (r"\boxed{1{,}200}", "1200", True),
    (r"\boxed{1,200}", "1200", True),
    (r"\boxed{90^\circ}", "90", True),
    (r"\boxed{2.50}", r"\$2.50", True),
    (r"\boxed{2.5}", r"\$2.50", True),
    (r"\boxed{18\text{ cm}^2}", "18", True),
    (r"\boxed{3\sqrt2}", r"\sqrt{18}", True),
    (r"\boxed{\text{Evelyn}}", "Evelyn", True),
    (r"\boxed{seat}", "east", False),
    (r"\boxed{\text{B}}", r"\text{(B)}", True),
    (r"\boxed{C}", r"\text{(B)}", False),
    (r"\boxed{1, 2, 3}", "3,2,1", True),
    (r"\boxed{5 \text{ or } 6}", "5", False),
    (r"\boxed{5, 6}", "5", False),
    (r"\boxed{x \ge 5}", "5", False),
    (r"\boxed{5}", "5", True),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    (r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", False),
    (r"\boxed{1\frac12}", r"\frac{3}{2}", True),
    (r"\boxed{9i+6}", "6+9i", True),
    (r"\boxed{\pi}", "3.14", False),
    (r"\boxed{\frac{", "5", False),
    (r"\boxed{}}}{{{", "5", False),
    (r"\boxed{\{1\}}", r"\{1\}", True),
    (r"\boxed{__import__('os').abort()}", "5", False),
    ("\ud800 \\boxed{5}", "5", True),
    (r"\boxed{" + "9" * 3000 + "}", "9", False),
    (r"\boxed{3}", 3, True),
    (r"\boxed{1011_2}", "1011_2", True),
    (r"\boxed{1011_{2}}", "1011_2", True),
    (r"\boxed{1011_{(2)}}", "1011_2", True),
    (r"\boxed{1011_{\text{two}}}", "1011_2", True),
    (r"\boxed{12_{16}}", "12_16", True),
    (r"\boxed{1{,}011_2}", "1011_2", True),
    (r"\boxed{1011_3}", "1011_2", False),
    (r"\boxed{4343_{\text{seven}}}", r"4343_{\text{six}}", False),
    (r"\boxed{1001_2}", "1011_2", False),
    (r"\boxed{1011}", "1011_2", True),  # the problem has named the base
    (r"\boxed{11}", "1011_2", False),  # the value, in another base
    (r"\boxed{11_2}", "11", False),
    (r"\boxed{11_{10} = 1011_2}", "1011_2", True),
    (r"\boxed{(11_3, 1011_2)}", "(11_3, 1011_2)", True),
    (r"\boxed{(11_2, 1011_3)}", "(11_3, 1011_2)", False),
    (r"\boxed{x_1^2}", "x^2_1", True),  # an index is no base
    (r"\boxed{x_2}", "x_1", False),
]


@pytest.fixture(scope="module")
def math():
    return MathAnswer(["unevaluated", "several"])


@pytest.mark.parametrize(("reply", "truth", "right"), MATHEMATICS)
def test_mathematics(math, reply, truth, right):
    math.check(truth)
    verdict = math(reply, truth)
    assert verdict.score == float(right), verdict.detail


@pytest.mark.parametrize("truth", ["", "  ", "$$", r"\boxed{5}", None, ["5"], True])
def test_a_ground_truth_that_is_no_answer_is_refused(math, truth):
    with pytest.raises(ValueError, match="expected"):
        math.check(truth)


@pytest.mark.parametrize(
    ("latex", "simple"),
    [
        (r"\dfrac12\text{ cm}", r"\frac{1}{2}"),
        ("x = 1,200", "1200"),
        ("3/4", r"\frac{3}{4}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\sqrt3\!", r"\sqrt{3}"),
        (".5", "0.5"),
        (r"\left( 1,\; 2 \right)", "(1,2)"),
        (r"(1,200)", "(1,200)"),  # a pair or a number: left as it is
        (r"12^{\circ}", "12"),
        (r"\text{ 5 }", "5"),
        (r"\$", ""),
    ],
)
def test_simpler(latex, simple):
    assert simpler(latex) == simple


@settings(deadline=None)
@given(
    st.recursive(st.just("x"), lambda inner: st.tuples(inner, inner).map(lambda pair: f"{{{pair[0]}}}{pair[1]}"), max_leaves=12)
)
def test_nested_braces_are_balanced(inside):
    assert last_boxed(rf"a \boxed{{{inside}}} }} {{ b") == inside


@settings(deadline=None)
@given(st.text(alphabet="\\{}$boxed12 .=", max_size=40))
@example("$ $")
def test_looking_for_an_answer_never_fails_and_gives_at_most_two(reply):
    found = [each.text for each in candidates(reply)]
    assert len(found) <= 2
    assert all(found)


@settings(deadline=None, max_examples=15)
@given(st.integers(-999, 999), st.integers(1, 99))
def test_a_fraction_equals_itself_however_it_is_written(a, b):
    assert equivalent(f"{a}/{b}", rf"\dfrac{{{a}}}{{{b}}}")
    assert equivalent(rf"\frac{{{a}}}{{{b}}}", rf"$\left(\tfrac{{{a}}}{{{b}}}\right)$")


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 36), st.integers(2, 36))
def test_numbers_are_equal_in_equal_bases_only(number, base, other):
    assert equivalent(f"{number}_{base}", rf"{number}_{{\text{{{base}}}}}")
    assert equivalent(f"{number}_{{{base}}}", str(number))
    assert not equivalent(str(number), f"{number}_{base}")
    assert equivalent(f"{number}_{base}", f"{number}_{other}") == (base == other)


@settings(deadline=None)
@given(st.text(alphabet="$5 .ab", max_size=20), st.from_regex(r"[a-z0-9+]{1,9}", fullmatch=True))
def test_the_last_formula_is_the_candidate_whatever_dollars_come_before(before, formula):
    assert [each.text for each in candidates(f"{before} so ${formula}$.")] == [formula]


@pytest.mark.parametrize(
    ("reply", "truth", "right"),
    [
        ("Paris", "Paris", True),
        ("  Paris \n", "Paris", True),
        ("New   York\ncity", "New York city", True),
        ("paris", "Paris", False),
        ("Paris.", "Paris", False),
        ("caf\u00e9", "cafe\u0301", True),
        ("B", ["A", "B"], True),
        ("C", ["A", "B"], False),
        ("", "x", False),
    ],
)
def test_exact_match(reply, truth, right):
    ExactMatch().check(truth)
    assert ExactMatch()(reply, truth).score == float(right)


@pytest.mark.parametrize("truth", ["", " ", [], ["a", ""], 5, None, {"a": 1}])
def test_exact_match_refuses_what_is_no_text(truth):
    with pytest.raises(ValueError, match="expected a text"):
        ExactMatch().check(truth)


THINK = {"sections": ["<think>", "<answer>"]}


@pytest.mark.parametrize(
    ("reply", "truth", "right"),
    [
        ("<think>a</think><answer>b</answer>", THINK, True),
        ("<answer>b</answer><think>a</think>", THINK, False),
        ("<think>a</think>", THINK, False),
        ("<think> \n <answer>b", THINK, False),
        ("<think>a<answer>  ", THINK, False),
        ("## Plan\nx\n## Plan\ny", {"sections": ["## Plan", "## Plan"]}, True),
        ("## Plan\nx", {"sections": ["## Plan", "## Plan"]}, False),
        ("a\nb", r"\Aa.b\Z", True),
        ("a\nbc", r"\Aa.b\Z", False),
        ("<think>1", {"pattern": r"\d", "sections": ["<think>"]}, True),
        ("<think>x", {"pattern": r"\d", "sections": ["<think>"]}, False),
        ("", "^$", True),
    ],
)
def test_format(reply, truth, right):
    Format().check(truth)
    verdict = Format()(reply, truth)
    assert verdict.score == float(right), verdict.detail


@pytest.mark.parametrize(
    "truth", ["", "(", {}, {"sections": []}, {"sections": "a"}, {"sections": [""]}, {"regex": "a"}, 5, {"pattern": 3}]
)
def test_format_refuses_what_demands_nothing_or_is_no_expression(truth):
    with pytest.raises(ValueError, match=r"expected|demands nothing|is not a regular expression"):
        Format().check(truth)
