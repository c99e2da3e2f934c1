"""What counts as equal in mathematics, over the notations that answers come in."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.rewards.mathematics.equality import equivalent
from tulu_mega.rewards.mathematics.finding import candidates
from tulu_mega.rewards.verifiers.math import MathAnswer

# ground truth, answer
EQUAL = [
    (r"\frac{1}{2}", r"0.5"), (r"\frac12", r"1/2"), (r"\frac{1}{2}", r"\dfrac{2}{4}"), (r"5", r"5.0"), (r"5", r"+5"),
    (r"-5", r"−5"), (r"-5", r"–5"), (r"-5", r"—5"), (r"-5", r"－5"), (r"５", r"5"), (r"1000", r"1,000"), (r"1000", r"1{,}000"),
    (r"1000", r"1\,000"), (r"1000", r"1,\!000"), (r"1000", r"1\ 000"), (r"1000", r"1 000"), (r"1234567", r"1,234,567"),
    (r"\frac{3}{2}", r"1\frac{1}{2}"), (r"-\frac{3}{2}", r"-1\frac12"), (r"\frac{3}{2}", r"1.5"), (r"1\frac{1}{2}", r"1.5"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"), (r"\frac{1}{-2}", r"-\frac12"), (r"\frac13", r"0.333333"), (r"\frac{2}{3}", r"0.666667"),
    (r"\frac{2}{3}", r"0.6666667"), (r"\frac1{12}", r"0.083333"), (r"\pi", r"3.141593"), (r"\sqrt2", r"1.414214"),
    (r"10^{-10}", r"\frac{1}{10^{10}}"), (r"10^{-10}", r"0.0000000001"), (r"e^{-30}", r"\frac{1}{e^{30}}"),
    (r"\frac{\pi}{10^9}", r"\pi\cdot10^{-9}"), (r"10^{-8}x", r"x\cdot 10^{-8}"), (r"2^{100}", r"1267650600228229401496703205376"),
    (r"\sqrt{10^{-16}}", r"10^{-8}"), (r"6.02\times10^{23}", r"6.02\cdot10^{23}"),
    (r"6.02\times 10^{23}", r"602000000000000000000000"), (r"5i", r"5\mathrm{i}"), (r"2e", r"2\mathrm{e}"), (r"2e", r"2\text{e}"),
    (r"3+4i", r"3+4\mathrm{i}"), (r"3x", r"3\mathrm{x}"), (r"6\text{ million}", r"6000000"), (r"6\text{ million}", r"6,000,000"),
    (r"6\text{ million}", r"6 million"), (r"6\text{ million}", r"6\times10^6"), (r"1.5\text{ million dollars}", r"1500000"),
    (r"2\text{ dozen}", r"24"), (r"3\text{ thousand}", r"3000"), (r"3\text{ hundred}", r"300"),
    (r"11:55\text{ p.m.}", r"11:55\text{ pm}"), (r"11:55\text{ p.m.}", r"11:55 PM"), (r"11:55\text{ p.m.}", r"11:55"),
    (r"10\text{ a.m.}", r"10\text{ AM}"), (r"3:45 p.m.", r"3:45 pm"), (r"1101\text{ (base 2)}", r"1101_2"),
    (r"1101_2", r"1101\text{ base two}"), (r"1101_2", r"1101 (base 2)"), (r"1101\text{ (base 2)}", r"1101"),
    (r"30\text{ north}", r"30\text{ north}"), (r"30", r"30\text{ degrees}"), (r"30", r"30^\circ"), (r"30", r"30°"),
    (r"30", r"30^{\circ}\text{C}"), (r"30", r"30\degree"), (r"5", r"5\text{ apples}"), (r"5", r"5 apples"),
    (r"5", r"5\text{ cm}"), (r"5", r"5 cm"), (r"5", r"5cm"), (r"5", r"5\text{ cm}^2"), (r"5", r"5\text{ square units}"),
    (r"5", r"5\;\mathrm{m}/\mathrm{s}"), (r"5", r"5\text{ miles per hour}"), (r"5\text{ cm}", r"5\text{ centimeters}"),
    (r"5\text{ hours}", r"5\text{ hrs}"), (r"5", r"5\textrm{ cm}"), (r"5", r"5\mbox{ inches}"), (r"5", r"5{\rm cm}"),
    (r"5", r"\$5"), (r"5", r"$5$"), (r"5.00", r"\$5.00"), (r"\frac12", r"\frac{1}{2}\text{ hour}"), (r"\pi", r"\pi\text{ cm}"),
    (r"2\pi", r"2\pi\text{ square units}"), (r"3", r"3\text{rd}"), (r"7", r"7 days"), (r"7", r"7\text{ apples left}"),
    (r"2", r"2\text{ ab}"), (r"50", r"50\%"), (r"50\%", r"50"), (r"50\%", r"0.5"), (r"\frac12", r"50\%"), (r"4", r"4\%"),
    (r"1", r"100\%"), (r"50", r"50\text{ percent}"), (r"50", r"50 percent"), (r"12.5\%", r"12.5"), (r"12.5", r"12.5\%"),
    (r"\frac32", r"150\%"), (r"0.25", r"25\%"), (r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", r"\frac16"),
    (r"0.\overline{142857}", r"\frac17"), (r"0.\bar{3}", r"\frac13"), (r"0.\dot{3}", r"\frac13"),
    (r"0.\dot{1}4285\dot{7}", r"\frac17"), (r"0.(3)", r"\frac13"), (r"0.\overline{9}", r"1"), (r"-0.\overline{3}", r"-\frac13"),
    (r"4.\overline{054}", r"\frac{150}{37}"), (r".\overline{3}", r"\frac13"), (r"0.\overline{3}", r"0.\overline{33}"),
    (r"0.\overline 3", r"\frac13"), (r"\emptyset", r"\varnothing"), (r"\emptyset", r"\{\}"), (r"\emptyset", r"∅"),
    (r"\sqrt[3]2", r"\sqrt[3]{2}"), (r"\sqrt2", r"\sqrt{2}"), (r"\sqrt 2", r"\sqrt{2}"), (r"√2", r"\sqrt{2}"),
    (r"3\sqrt2", r"\sqrt{18}"), (r"\sqrt[3]{x}", r"x^{1/3}"), (r"\frac\pi2", r"\frac{\pi}{2}"), (r"\frac{\pi}2", r"0.5\pi"),
    (r"\sqrt\pi", r"\sqrt{\pi}"), (r"\frac1{\sqrt2}", r"\frac{\sqrt2}{2}"), (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"2^{1/2}", r"\sqrt2"), (r"5", r"\approx 5"), (r"5", r"x\approx 5"), (r"5", r"≈5"), (r"5", r"= 5"), (r"5", r"x = 5"),
    (r"5", r"x=5"), (r"x=5", r"5"), (r"5", r"\therefore 5"), (r"15", r"15\textup{ cm}"), (r"A,B", r"\text{A and B}"),
    (r"A,B", r"\text{B and A}"), (r"A,B", r"A\text{ and }B"), (r"1,2", r"1\text{ and }2"), (r"1,2", r"2,1"),
    (r"1,2", r"1\text{ or }2"), (r"1,2,3", r"1, 2,\text{ and }3"), (r"1,2", r"\{1,2\}"), (r"\{1,2\}", r"\{2,1\}"),
    (r"(1,2)", r"\left(1,2\right)"), (r"\pm 2", r"-2,2"), (r"\pm2", r"2,-2"), (r"x=2,y=3", r"y=3,x=2"), (r"x=1,x=2", r"1,2"),
    (r"x=1\text{ or }x=2", r"1,2"), (r"(-\infty,-1)\cup(1,\infty)", r"x<-1\text{ or }x>1"),
    (r"(-\infty,-1)\cup(1,\infty)", r"x>1\text{ or }x<-1"), (r"(-\infty,-1]\cup[1,\infty)", r"x\leq-1\text{ or }x\geq1"),
    (r"x<-1\text{ or }x>1", r"(-\infty,-1)\cup(1,\infty)"), (r"x<-1\text{ or }x>1", r"x>1\text{ or }x<-1"),
    (r"(-1,1)", r"-1<x<1"), (r"(-1,1)", r"x>-1\text{ and }x<1"), (r"(-1,1)", r"x\in(-1,1)"), (r"[-1,1]", r"-1\le x\le 1"),
    (r"[-1,1]", r"-1\leqslant x\leqslant 1"), (r"(5,\infty)", r"x>5"), (r"x>5", r"(5,\infty)"), (r"x>5", r"5<x"),
    (r"(-\infty,\infty)", r"\mathbb{R}"), (r"(-\infty,1)\cup(1,\infty)", r"x\ne1"), (r"x\neq1", r"(-\infty,1)\cup(1,\infty)"),
    (r"(0,\infty)", r"(0,∞)"), (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 or x>1"), (r"(-\infty,-1)\cup(1,\infty)", r"|x|>1"),
    (r"[2,3]", r"x\in[2,3]"), (r"x^2-1", r"(x-1)(x+1)"), (r"2x+2", r"2(x+1)"), (r"x^2+2x+1", r"(x+1)^2"), (r"a+b", r"b+a"),
    (r"ab", r"ba"), (r"\frac{x}{2}", r"0.5x"), (r"\frac{x+1}{2}", r"\frac{1+x}{2}"), (r"x^{-1}", r"\frac1x"),
    (r"\sin^2x+\cos^2x", r"1"), (r"e^{2x}", r"(e^x)^2"), (r"\log_2 8", r"3"), (r"y=2x+1", r"y=1+2x"), (r"y=2x+1", r"y-2x=1"),
    (r"y=2x+1", r"2x+1"), (r"10", r"\binom{5}{2}"), (r"120", r"5!"), (r"2^{10}", r"1024"), (r"1024", r"2^{10}"),
    (r"24", r"2^3\cdot 3"), (r"1+\sqrt2", r"\sqrt2+1"), (r"\frac{1+\sqrt5}{2}", r"1.618034"), (r"3-2i", r"-2i+3"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}0.5\cdot 2\\2\end{pmatrix}"), (r"\text{east}", r"east"),
    (r"\text{Yes}", r"Yes"), (r"B", r"\text{(B)}"), (r"\text{(B)}", r"B"), (r"\infty", r"\infty"), (r"3:2", r"\frac32"),
    (r"3:2", r"6:4"), (r"0.5", r".5"), (r"1", r"1."), (r"07", r"7"), (r"2.50", r"2.5"), (r"1.0000001", r"1"),
]  # fmt: skip
UNEQUAL = [
    (r"1234", r"1,235"), (r"\frac13", r"0.3333"), (r"\frac13", r"0.33"), (r"\pi", r"3.14"), (r"\sqrt{2}", r"1.41"),
    (r"10^{-10}", r"2\cdot10^{-10}"), (r"e^{-30}", r"e^{-31}"), (r"\frac{\pi}{10^9}", r"\frac{2\pi}{10^9}"),
    (r"(10^{-8},1)", r"(2\cdot10^{-8},1)"), (r"\{10^{-8},1\}", r"\{2\cdot 10^{-8},1\}"), (r"10^{-8}x", r"2\cdot10^{-8}x"),
    (r"y=10^{-8}x", r"y=2\cdot10^{-8}x"),
    (r"\begin{pmatrix}10^{-8}\\1\end{pmatrix}", r"\begin{pmatrix}2\cdot10^{-8}\\1\end{pmatrix}"),
    (r"[10^{-8},1]", r"[3\cdot10^{-8},1]"), (r"2^{100}", r"2^{100}+1"), (r"10^{-7}+10^{-9}", r"10^{-7}"),
    (r"10^{20}+1", r"10^{20}"), (r"i\cdot10^{-9}", r"2i\cdot 10^{-9}"), (r"6.02\times10^{23}", r"6.03\times 10^{23}"),
    (r"5", r"5\mathrm{i}"), (r"5i", r"5"), (r"3", r"3\mathrm{x}"), (r"3", r"3\pi"), (r"6", r"6\text{ million}"),
    (r"2\text{ dozen}", r"2"), (r"3\text{ billion}", r"3\text{ million}"), (r"6", r"6 thousand"), (r"3", r"3\text{ or more}"),
    (r"3", r"\text{at least }3"), (r"3", r"3\text{ or fewer}"), (r"3", r"\text{more than }3"),
    (r"4", r"4\text{ is wrong, it is 3}"), (r"4", r"4\text{ is not the answer}"), (r"4", r"4 or 5"), (r"4", r"not 4"),
    (r"4", r"\neq 4"), (r"4", r"<4"), (r"4", r"\text{not }4"), (r"11:55\text{ p.m.}", r"11:55\text{ a.m.}"),
    (r"11:55\text{ p.m.}", r"11:55 AM"), (r"10\text{ a.m.}", r"10\text{ p.m.}"),
    (r"1101\text{ (base 2)}", r"1101\text{ (base 3)}"), (r"1101", r"1101\text{ (base 3)}"),
    (r"1101_{\text{two}}", r"1101 base 3"), (r"30\text{ north}", r"30\text{ south}"), (r"30\text{ north}", r"30"),
    (r"30 east", r"30 west"), (r"5\text{ cm}", r"5\text{ m}"), (r"5\text{ hours}", r"5\text{ minutes}"), (r"7", r"7\text{ left}"),
    (r"2", r"2ab"), (r"2", r"2 ab"), (r"2", r"2 xyz"), (r"0.5", r"0.5\%"), (r"4", r"400\%"), (r"50\%", r"5\%"),
    (r"0.\overline{3}", r"0.3"), (r"0.\overline{3}", r"0.\overline{4}"), (r"\emptyset", r"\{0\}"),
    (r"\emptyset", r"\{\emptyset\}"), (r"\sqrt[3]{2}", r"\sqrt{2}"), (r"1,2", r"1, 2, 3"), (r"(1,2)", r"(2,1)"),
    (r"(1,2)", r"[1,2]"), (r"(1,2]", r"(1,2)"), (r"\pm2", r"2"), (r"2", r"\pm 2"),
    (r"(-\infty,-1)\cup(1,\infty)", r"x\le-1\text{ or }x\ge1"), (r"(-1,1)", r"-1\le x<1"), (r"x>5", r"x\ge5"), (r"x>5", r"x<5"),
    (r"(-\infty,-1)\cup(1,\infty)", r"x<-1\text{ and }x>1"), (r"x^2-1", r"x^2+1"), (r"x^2", r"x^3"), (r"\sin x", r"\cos x"),
    (r"y=2x+1", r"y=2x+2"), (r"4", r"2+2"), (r"\frac56", r"\frac12+\frac13"), (r"4", r"\int_0^2 x^2 dx"),
    (r"-2", r"\det\begin{pmatrix}1&2\\3&4\end{pmatrix}"), (r"-2", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"),
    (r"10", r"\sum_{k=1}^4 k"), (r"24", r"\prod_{k=1}^4 k"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"), (r"east", r"seat"),
    (r"\text{(B)}", r"(C)"), (r"\text{even}", r"\text{odd}"), (r"5", r"9^{9^{9}}"), (r"5", r"10^{100000000}"),
    (r"5", r"100000000!"), (r"5", r"\binom{10^9}{10^8}"), (r"5", r"(x+1)^{100000}"), (r"5", r"e^{e^{e^{e^{9}}}}"),
    (r"x<1", r"\{\tan(\frac{\pi}{2}),1\}"), (r"\emptyset", r"1<2"),
    (r"5", r"\frac{1}{0}"), (r"0", r"\frac{0}{0}"), (r"\infty", r"-\infty"),
    (r"3:2", r"2:3"), (r"1.001", r"1"), (r"1234567.8", r"1234568.9"), (r"100000000.1", r"100000000.2"),
    (r"12345678901234567890", r"12345678901234567891"), (r"9007199254740993", r"9007199254740992"),
]  # fmt: skip


def test_equal_values_are_equal():
    assert [pair for pair in EQUAL if not equivalent(*pair)] == []


def test_other_values_are_not():
    assert [pair for pair in UNEQUAL if equivalent(*pair)] == []


@pytest.mark.parametrize(
    ("said", "truth"),
    [
        ("$5$ dollars", "5"),
        ("$12$, since $3*4=12$", "12"),
        ("$x=5$ which is prime", "5"),
        ("$1,000$ dollars", "1000"),
        ("$a$ and $b$", "a"),
        ("$3$ and $4$", "3,4"),
        (r"\(7\) metres", "7"),
        (r"$$\frac{1}{2}$$, or 50 per cent", "0.5"),
        (r"$\$5$ each", "5"),
        ("$5$", "5"),
        ("5", "5"),
    ],
)
@pytest.mark.parametrize("end", ["", ". I hope it is correct.", "."])
def test_the_first_formula_behind_the_phrase_is_the_answer(said, truth, end):
    reply = f"By $x=9$ we are done.\nFinal Answer: The final answer is {said}{end}"
    assert MathAnswer(["several"])(reply, truth).score == 1.0, [each.text for each in candidates(reply)]
    assert MathAnswer(["several"])(reply, "9").score == 0.0


@pytest.mark.parametrize(
    ("reply", "truth", "right"),
    [
        ("What is $2+2$?", "4", False),
        ("So $2+2=4$", "4", True),
        (r"We need $\sqrt{16}$", "4", False),
        (r"What is $\frac{10}{2}$?", "5", False),
        (r"It is $\frac{10}{4}$", r"\frac{5}{2}", True),
        (r"$\int_0^1 x\,dx$", r"\frac{1}{2}", False),
        (r"\boxed{2+2}", "4", False),
        (r"\boxed{2^2\cdot 3}", "12", False),
        (r"Hence \boxed{4\text{ is wrong, it is 3}}", "4", False),
    ],
)
def test_what_is_left_to_be_calculated_is_no_answer(reply, truth, right):
    assert MathAnswer()(reply, truth).score == float(right)


def test_a_formula_of_the_question_is_no_answer():
    question = [{"role": "user", "content": "Factor $x^2 - 1$."}]
    assert MathAnswer()("We have $x^2-1$", "(x-1)(x+1)", messages=question).score == 0.0
    assert MathAnswer()("We have $(x+1)(x-1)$", "(x-1)(x+1)", messages=question).score == 1.0
    assert MathAnswer()("It is $x^2-1$", "x^2-1", messages=question).score == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9}}", "9^{9^{9^{9}}}", "10^{10^{10}}!", r"\binom{10^{12}}{10^{11}}", "(x+1)^{10^7}", r"\sum_{k=1}^{10^{12}} k",
        r"\frac{0}{0}", "{" * 150 + "5" + "}" * 150, r"\sqrt{" * 50 + "7" + "}" * 50, r"\begin{pmatrix}", "\ud800", "\x00",
    ],
)  # fmt: skip
def test_whatever_a_reply_holds_it_gets_a_score(answer):
    for truth in ("5", r"x^2+\pi"):
        start = time.process_time()
        assert MathAnswer()(f"So \\boxed{{{answer}}}", truth).score == 0.0
        assert time.process_time() - start < 12


@pytest.mark.parametrize(
    "piece", ["\\(", "\\[", "$", "\\boxed{", "{", "}", "\\\\", "final answer: the final answer is ", " ", "\n", "\\$"]
)
def test_long_replies_are_searched_in_a_moment(piece):
    start = time.process_time()
    candidates(piece * (400_000 // len(piece)))
    assert time.process_time() - start < 2


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="\\{}$()[]boxed12 .=", max_size=60))
def test_what_is_found_is_never_empty(reply):
    found = candidates(reply)
    assert len(found) <= 3 and all(candidate.text for candidate in found)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 999), st.integers(-300, 300), st.integers(1, 999))
def test_numbers_of_any_size_are_told_apart(first, power, second):
    assert equivalent(rf"{first}\times10^{{{power}}}", rf"{second}\cdot 10^{{{power}}}") == (first == second)


@settings(deadline=None)
@given(st.integers(0, 99), st.text("0123456789", max_size=3), st.text("0123456789", min_size=1, max_size=4))
def test_repeating_decimals_are_their_fractions(whole, once, again):
    value = (int(f"{whole}{once}{again}") - int(f"{whole}{once}"), 10 ** len(once) * (10 ** len(again) - 1))
    assert equivalent(rf"{whole}.{once}\overline{{{again}}}", rf"\frac{{{value[0]}}}{{{value[1]}}}")
    assert not equivalent(rf"{whole}.{once}\overline{{{again}}}", rf"\frac{{{value[0] + 1}}}{{{value[1]}}}")
