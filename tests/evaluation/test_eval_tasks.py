"""How the tasks read their public formats, ask and judge; scores and intervals."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tulu_mega.errors import UserError
from tulu_mega.evaluation import rows
from tulu_mega.evaluation.instructions import CHECKS, capital_words
from tulu_mega.evaluation.judging import check, judge
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.statistics import Estimate, estimate, pass_at_k, wilson
from tulu_mega.evaluation.tasks import TASKS, bbh, gsm8k, ifeval, mmlu
from tulu_mega.evaluation.tasks import math as math_task

GSM8K_ROW = {"question": "Ada has 1,000 pens and buys 200. How many?", "answer": "1000+200=<<1000+200=1200>>1200\n#### 1,200"}
MATH_ROW = {"problem": "Half of $x$?", "solution": r"So \boxed{\frac{x}{2}}.", "type": "Algebra", "level": "Level 1"}
MMLU_ROW = {"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 2, "subject": "abstract_algebra"}
BBH_ROW = {"input": "not True is", "target": "False"}
IFEVAL_ROW = {
    "key": 1,
    "prompt": "Write two words without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "less than"}],
}
RLVR_ROW = {"messages": [{"role": "user", "content": "1+1?"}], "ground_truth": "2", "dataset": "gsm8k"}
ROWS = {"gsm8k": GSM8K_ROW, "math": MATH_ROW, "mmlu": MMLU_ROW, "bbh": BBH_ROW, "ifeval": IFEVAL_ROW, "rlvr": RLVR_ROW}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def all_earned(task: str, cases: list[tuple[dict, str]]) -> list[dict]:
    """What responses to rows earn, judged together: a pool of verifiers takes a second to start."""
    judged = judge(TASKS[task], [TASKS[task].read(row) for row, _ in cases], [[response] for _, response in cases], {})
    assert [one.error for many in judged for one in many if one.error] == []
    return [one.values for (one,) in judged]


def earned(task: str, row: dict, response: str) -> dict:
    (values,) = all_earned(task, [(row, response)])
    return values


def test_rows_in_public_formats_are_read():
    assert gsm8k.read(GSM8K_ROW).answer == "1200"
    assert gsm8k.read(GSM8K_ROW).messages == [{"role": "user", "content": f"Question: {GSM8K_ROW['question']}\nAnswer:"}]
    assert (math_task.read(MATH_ROW).answer, math_task.read(MATH_ROW).group) == (r"\frac{x}{2}", "Algebra")
    assert math_task.read({"problem": "1?", "answer": "1", "subject": "Geometry", "unique_id": "a"}).group == "Geometry"
    assert (mmlu.read(MMLU_ROW).answer, mmlu.read(MMLU_ROW).group) == ("C", "abstract_algebra")
    assert mmlu.read({**MMLU_ROW, "answer": "D"}).answer == "D"
    assert "\nA. one\nB. two\nC. three\nD. four\nAnswer:" in mmlu.read(MMLU_ROW).messages[0]["content"]
    assert "abstract algebra" in mmlu.read(MMLU_ROW).messages[0]["content"]
    assert ifeval.read(IFEVAL_ROW).answer[1] == ["length_constraints:number_words", {"num_words": 3, "relation": "less than"}]


def test_worked_examples_of_rows_end_in_a_sentence_without_calculator_notes():
    assert gsm8k.shot(GSM8K_ROW).answer == "1000+200=1200\nSo the answer is 1200."
    assert math_task.shot(MATH_ROW).answer.endswith(r"Final Answer: The final answer is $\frac{x}{2}$. I hope it is correct.")
    assert mmlu.shot(MMLU_ROW).answer == "C" and mmlu.shot(MMLU_ROW).group == "abstract_algebra"
    assert bbh.shot({**BBH_ROW, "cot": "It is so. So the answer is False."}).answer == "It is so. So the answer is False."


@pytest.mark.parametrize("name", ["gsm8k", "math", "bbh"])
def test_the_demonstrations_of_our_own_are_right_by_their_tasks_judge(name):
    task = TASKS[name]
    assert len(task.own_shots) >= task.shots > 0
    cases = []
    for shot in task.own_shots:
        said = shot.answer.rsplit("answer is ", 1)[1].rstrip(".").removesuffix(". I hope it is correct").strip("$")
        row = {"gsm8k": {"question": "?", "answer": f"#### {said}"}, "math": {"problem": "?", "answer": said}}
        cases.append((row.get(name, {"input": "?", "target": said}), shot.answer))
    assert [values[task.metrics[0]] for values in all_earned(name, cases)] == [(1.0, 1)] * len(cases)


def test_the_arithmetic_of_gsm8ks_demonstrations_holds():
    import re

    equations = [pair for shot in TASKS["gsm8k"].own_shots for pair in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", shot.answer)]
    assert len(equations) >= 16
    for left, right in equations:
        a, operator, b = left.split()
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[operator]
        assert value == int(right), (left, right)


@pytest.mark.parametrize(
    ("task", "scores"),
    [
        ("gsm8k", {"1000 + 200 is 1,200. So the answer is 1,200.": 1, "1200 pens, or 100 dozens": 0, "": 0}),
        (
            "math",
            {
                r"Therefore \boxed{\frac{x}{2}}": 1,
                "Final Answer: The final answer is $x/2$. I hope it is correct.": 1,
                "no idea": 0,
            },
        ),
        ("mmlu", {"C": 1, "A": 0}),
        (
            "bbh",
            {
                "True is... So the answer is False.": 1,
                "The answer is True. No: the answer is **false**": 1,
                "False": 0,
            },
        ),
        ("rlvr", {"2": 1, "3": 0}),
    ],
)
def test_known_responses_earn_known_scores(task, scores):
    values = all_earned(task, [(ROWS[task], response) for response in scores])
    assert [value[TASKS[task].metrics[0]] for value in values] == [(float(score), 1) for score in scores.values()]


@pytest.mark.parametrize("said", ["(B)", "B", "(b) the second one", "b)", "**(B)**."])
def test_an_option_may_be_written_in_several_ways(said):
    row = {"input": "Which?\nOptions:\n(A) a\n(B) b", "target": "(B)"}
    assert earned("bbh", row, f"So the answer is {said}")["exact_match"] == (1.0, 1)
    assert earned("bbh", row, "So the answer is (A)")["exact_match"] == (0.0, 1)


def test_ifeval_prompts_and_instructions_strict_and_loose():
    assert earned("ifeval", IFEVAL_ROW, "two words") == {
        "prompt_loose": (1.0, 1),
        "prompt_strict": (1.0, 1),
        "instruction_loose": (2.0, 2),
        "instruction_strict": (2.0, 2),
    }
    # The last two lines are too much, and a comma is in the first: without its first and last line it passes loosely.
    values = earned("ifeval", IFEVAL_ROW, "Sure, here:\ntwo words\nHope it helps you!")
    assert values["prompt_loose"] == (1.0, 1) and values["prompt_strict"] == (0.0, 1)
    assert values["instruction_loose"] == (2.0, 2) and values["instruction_strict"] == (0.0, 2)
    assert earned("ifeval", IFEVAL_ROW, "  ")["instruction_loose"] == (0.0, 2), "an empty response follows nothing"


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        ("keywords:existence", {"keywords": ["Cat", "dog"]}, "a cat and DOGS", "a cat"),
        ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "at least"}, "So so", "so"),
        ("keywords:forbidden_words", {"forbidden_words": ["art"]}, "party", "fine Art."),
        ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "ape", "Even"),
        ("language:response_language", {"language": "de"}, "Das ist ein ganz gewöhnlicher Satz.", "This is a plain sentence."),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One 2.5 two"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n***\n***\nb"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "now three words"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "hello"},
            'a\n\n"Hello," she said',
            "hello\n\nworld",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Yes.\np. p.s. no", "P.S. no"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
        ("detectable_format:constrained_response", {}, "My answer is maybe.", "My answer is perhaps."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Section", "num_sections": 2},
            "Section 1 a Section 2",
            "Section",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:title", {}, "<<On cats>>\ntext", "<< >>"),
        ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi", "Hi. Say hi."),
        ("startend:end_checker", {"end_phrase": "That is all."}, 'Yes. "That is ALL."', "That is all. Bye"),
        ("startend:quotation", {}, '"quoted"', '"'),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "NASA and IBM", "Nasa"),
        ("change_case:english_capital", {}, "THIS IS WHAT WE WANTED TO SAY", "This is what we wanted"),
        ("change_case:english_lowercase", {}, "this is what we wanted to say", "This is what we wanted"),
        ("punctuation:no_comma", {}, "none", "one, two"),
    ],
)
def test_ifevals_instructions(name, arguments, good, bad):
    assert CHECKS[name].holds(good, **arguments) and not CHECKS[name].holds(bad, **arguments)
    assert set(CHECKS[name].needs) == set(arguments)


@pytest.mark.parametrize(
    ("text", "count"),  # as NLTK 3.10.4's NLTKWordTokenizer parts the text
    [
        ("U.S.A.", 1),
        ("NASA/ESA", 1),
        ("WELL-KNOWN", 1),
        ("NASA's", 1),
        ("I'M", 2),
        ("I'm", 1),
        ("I\u2019M", 2),
        ("THEY'LL SAY 'WE DON'T.'", 6),
        ("IT'S WHAT THEY'RE.", 5),
        ("CANNOT cannot GONNA", 4),
        ("WANNA", 2),
        ("YES,NO;YES--NO...YES:3", 5),
        ("A,1 B", 2),
        ("**BOLD** (IN) [A] `BOX`!", 4),
        ("B2B 2 !? 4TH", 2),
        ("\u00c9T\u00c9 \u6771\u4eac", 1),
        ("'TWAS", 1),
        ("KEY='VALUE'", 2),
        ("", 0),
    ],
)
def test_words_of_capitals_are_nltks(text, count):
    assert capital_words(text) == count


@given(st.text())
def test_words_of_capitals_are_counted_in_any_text_and_not_more_than_its_capitals(text):
    assert capital_words(text) <= sum(char.isupper() for char in text)
    assert capital_words(f"{text}\nNASA") == capital_words(text) + 1


def test_keywords_are_text_and_no_regular_expressions():
    assert not CHECKS["keywords:existence"].holds("C and more", keywords=["C++"])
    assert not CHECKS["detectable_format:multiple_sections"].holds("Part 1 Part 2", section_spliter="P.rt", num_sections=2)


def test_there_are_25_instructions():
    assert len(CHECKS) == 25


def test_the_quickstarts_own_judge_agrees_with_the_task():
    from itertools import islice

    from tulu_mega.quickstart import task as words

    rows = list(islice(words.demonstrations(3), 50))
    cases = [({**row, "messages": row["messages"][:1]}, row["messages"][-1]["content"]) for row in rows]
    expected = [words.is_correct(response, row["ground_truth"]) for row, response in cases]
    assert [values["score"] for values in all_earned("rlvr", cases)] == [(float(right), 1) for right in expected]
    assert 0 < sum(expected) < 50


def test_bad_rows_are_told_by_line_with_the_fields_expected(tmp_path):
    file = write(tmp_path / "a.jsonl", GSM8K_ROW, {"question": "?", "answer": "five"}, "{broken", {"prompt": "?"})
    with pytest.raises(UserError) as caught:
        rows.problems(TASKS["gsm8k"], TaskSettings(data=file))
    first, second, third = caught.value.problems
    assert "a.jsonl line 2: answer has no '#### number'" in first and "GSM8K expects question, answer" in first
    assert "line 3: not valid JSON" in second and "line 4: answer is missing" in third
    for name, row in ROWS.items():  # every task told from every other's format
        others = [TASKS[other] for other in ROWS if other != name]
        refused = 0
        for task in others:
            with pytest.raises(UserError, match=f"{task.title} expects"):
                rows.problems(task, TaskSettings(data=write(tmp_path / "b.jsonl", row)))
            refused += 1
        assert refused == 5


def test_unknown_verifiers_and_ground_truths_of_another_form_are_found_before_asking():
    bad = [{**RLVR_ROW, "dataset": "gsm9k"}, {**RLVR_ROW, "ground_truth": "two"}]
    with pytest.raises(UserError) as caught:
        check(TASKS["rlvr"], [TASKS["rlvr"].read(row) for row in bad], {})
    assert "problem 1: unknown verifier 'gsm9k'" in caught.value.problems[0]
    assert "name one of your own in rewards.custom (of eval: verifiers)" in caught.value.problems[0]
    assert "problem 2" in caught.value.problems[1]


def test_a_verifier_that_fails_is_an_error_and_no_score(tmp_path, monkeypatch):
    (tmp_path / "mine_that_fails.py").write_text("def verify(response, ground_truth, **_):\n    raise OSError('disk gone')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = TASKS["rlvr"].read({**RLVR_ROW, "dataset": "mine"})
    ((judgement,),) = judge(TASKS["rlvr"], [problem], [["2"]], {"mine": "mine_that_fails:verify"})
    assert judgement.values is None and "disk gone" in judgement.error


def test_limits_parquet_and_worked_examples_by_group(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [{**MMLU_ROW, "question": f"{subject} {number}", "subject": subject} for subject in "ab" for number in range(3)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "mmlu.parquet")
    settings = TaskSettings(data=str(tmp_path / "mmlu.parquet"), limit=4, shots_from=str(tmp_path / "mmlu.parquet"))
    assert [problem.group for problem in rows.problems(TASKS["mmlu"], settings)] == list("aabb")
    available = rows.shots(TASKS["mmlu"], settings)
    assert [shot.group for shot in rows.chosen(available, 2, "b")] == ["b", "b"]
    with pytest.raises(ValueError, match="4 worked examples of 'b' wanted, 3 there"):
        rows.chosen(available, 4, "b")
    assert rows.shots(TASKS["mmlu"], TaskSettings(data="x")) == list(TASKS["mmlu"].own_shots)
    with pytest.raises(UserError, match="takes no worked examples"):
        rows.shots(TASKS["ifeval"], settings)


def test_a_limit_asks_the_same_problems_wherever_the_rows_lie(tmp_path):
    lines = "".join(json.dumps({"question": f"{number}?", "answer": f"#### {number}"}) + "\n" for number in range(50))
    asked = []
    for name in ("a.jsonl", "elsewhere/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines)
        asked.append([found.row for found in rows.problems(TASKS["gsm8k"], TaskSettings(data=str(tmp_path / name), limit=5))])
    assert asked[0] == asked[1] and asked[0] != [0, 1, 2, 3, 4]


def test_bbhs_own_files_and_prompts(tmp_path):
    for name in ("navigate", "boolean_expressions"):
        content = {"canary": "x", "examples": [{"input": f"{name} {number}", "target": "yes"} for number in range(2)]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = rows.problems(TASKS["bbh"], TaskSettings(data=str(tmp_path)))
    assert [problem.group for problem in found] == ["boolean_expressions"] * 2 + ["navigate"] * 2
    prompts = tmp_path / "cot-prompts"
    prompts.mkdir()
    first = "Q: one?\nA: Let's think step by step.\nYes. So the answer is yes."
    text = f"canary\n-----\nDecide.\n\n{first}\n\nQ: two?\nA: So the answer is no.\n"
    (prompts / "navigate.txt").write_text(text)
    first, second = rows.shots(TASKS["bbh"], TaskSettings(data="x", shots_from=str(prompts)))
    assert first.question == "Decide.\n\nQ: one?\nA: Let's think step by step." and first.answer == "Yes. So the answer is yes."
    assert second.answer == "So the answer is no." and second.group == "navigate"
    (prompts / "navigate.txt").write_text("canary\n-----\n")
    with pytest.raises(UserError, match="cot-prompts"):
        rows.shots(TASKS["bbh"], TaskSettings(data="x", shots_from=str(prompts)))


def test_wilsons_interval_is_the_tables():
    assert wilson(45, 100) == pytest.approx((0.356, 0.548), abs=1e-3)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4) and wilson(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one():
    from itertools import combinations

    for samples in range(1, 7):
        for correct in range(samples + 1):
            for k in range(1, samples + 1):
                draws = list(combinations(range(samples), k))
                share = sum(any(index < correct for index in draw) for draw in draws) / len(draws)
                assert math.isclose(pass_at_k(samples, correct, k), share, abs_tol=1e-12)
    with pytest.raises(ValueError, match="at least 3"):
        pass_at_k(2, 1, 3)


def test_estimates():
    assert estimate([1, 0, 1, 1], [1] * 4) == Estimate(0.75, *wilson(3, 4), "wilson")
    ratio = estimate([2, 0, 1], [3, 1, 1])  # instructions: 3 of 5
    assert ratio.value == pytest.approx(0.6) and ratio.interval == "bootstrap" and ratio.low < 0.6 < ratio.high
    macro = estimate([1] * 15 + [0] * 5, [1] * 20, ["a"] * 15 + ["b"] * 5)
    assert macro.value == pytest.approx(0.5) and (macro.low, macro.high) == (0.5, 0.5), "within a group all are alike"
    assert estimate([0.5] * 9, [1] * 9).low == 0.5
    with pytest.raises(ValueError, match="nothing"):
        estimate([], [])


def test_groups_of_few_problems_are_drawn_together():
    """A draw within a group of one is always the same, which would make an interval without width."""
    lone = estimate([1, 0, 1, 0, 1], [1] * 5, list("abcde"))
    assert lone.value == pytest.approx(0.6) and lone.low < 0.4 and lone.high > 0.8
    uneven = estimate([1, 1, 1, 1, 1, 1, 0], [1] * 7, list("aaaaaab"))
    assert uneven.value == pytest.approx(0.5), "each group counts alike"
    assert uneven.low < 0.4


def test_bootstrap_and_wilson_agree_on_many_problems():
    sums = [float(number % 10 < 3) for number in range(2000)]
    grouped = estimate(sums, [1] * 2000, ["one"] * 2000)
    assert grouped.value == pytest.approx(0.3)
    assert (grouped.low, grouped.high) == pytest.approx(wilson(600, 2000), abs=4e-3)
