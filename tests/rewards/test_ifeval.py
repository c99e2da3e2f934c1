"""The 25 constraints, mended and as they were; their ground truths as Tulu's rows carry them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_mega.rewards.constraints import CONSTRAINTS, NOVEMBER_2024, read_constraint
from tulu_mega.rewards.verifiers.ifeval import IfEval
from tulu_mega.rewards.verifiers.ifeval_2024 import IfEval2024

NULLS = dict.fromkeys(
    "N quantifier end_phrase keyword_list word forbidden_words letter i first_word postscript_marker options section_splitter "
    "original_prompt".split()
)


def row(func_name, **arguments):
    """A ground truth as in allenai/RLVR-IFeval: every argument of every function, null where it is not used."""
    return json.dumps({"func_name": func_name, **NULLS, **arguments})


# function, arguments, reply, met (mended), met (November 2024; the same where left out)
CASES = [
    ("verify_keywords", {"keyword_list": ["red", "Blue"]}, "RED and bluebells", True),
    ("verify_keywords", {"keyword_list": ["red", "blue"]}, "red", False),
    ("verify_keyword_frequency", {"word": "cat", "N": 2}, "Cat, cat! catalogue", True),
    ("verify_keyword_frequency", {"word": "cat", "N": 2}, "cat", False),
    ("verify_keyword_frequency", {"word": "naïve", "N": 1}, "So naïve.", True),
    ("verify_keyword_frequency", {"word": "two words", "N": 1}, "two words", False),
    ("validate_forbidden_words", {"forbidden_words": ["bad", "evil"]}, "all good", True),
    ("validate_forbidden_words", {"forbidden_words": ["bad"]}, "a BADGE", False),
    ("verify_letter_frequency", {"letter": "l", "N": 3}, "hello world", True),
    ("verify_letter_frequency", {"letter": "L", "N": 3}, "hello world", False),
    ("verify_letter_frequency", {"letter": "x", "N": 0}, "hello", True),
    ("validate_response_language", {"language": "en"}, "This is quite clearly an English sentence about rivers.", True),
    ("validate_response_language", {"language": "de"}, "Das ist ganz gewiss ein deutscher Satz über Flüsse.", True),
    ("validate_response_language", {"language": "fr"}, "This is quite clearly an English sentence about rivers.", False),
    ("validate_response_language", {"language": "en"}, "12345 !!!", False),
    ("verify_paragraph_count", {"N": 2}, "one\n* * *\ntwo", True),
    ("verify_paragraph_count", {"N": 2}, "one\n* * *\n", False),
    ("verify_paragraph_count", {"N": 1}, "one\n\ntwo", True),
    ("verify_paragraph_count", {"N": 2}, "one\n***\ntwo", False),
    ("validate_word_constraint", {"N": 3, "quantifier": "at least"}, "one  two\nthree", True),
    ("validate_word_constraint", {"N": 3, "quantifier": "at most"}, "one two three four", False),
    ("validate_word_constraint", {"N": 20, "quantifier": "around"}, "w " * 22, True),
    ("validate_word_constraint", {"N": 20, "quantifier": "around"}, "w " * 23, False),
    ("validate_word_constraint", {"N": 3, "quantifier": "around"}, "one two", True),
    ("verify_sentence_constraint", {"N": 2, "quantifier": "at least"}, "One. Two?", True),
    ("verify_sentence_constraint", {"N": 2, "quantifier": "at least"}, "Wow! Great.", True, False),
    ("verify_sentence_constraint", {"N": 1, "quantifier": "at most"}, "Dr. Who, e.g. me.", True),
    ("verify_sentence_constraint", {"N": 3, "quantifier": "around"}, "One. Two.", True),
    ("verify_sentence_constraint", {"N": 3, "quantifier": "around"}, "One.", False),
    ("validate_paragraphs", {"N": 2, "first_word": "Second", "i": 2}, "First it is.\n\nSecond it is.", True),
    ("validate_paragraphs", {"N": 2, "first_word": "second", "i": 2}, "First it is.\n\nSecond it is.", False),
    ("validate_paragraphs", {"N": 2, "first_word": "Second", "i": 2}, "First\n\n\n\nSecond", False),
    ("validate_paragraphs", {"N": 2, "first_word": "x", "i": 3}, "x\n\nx", False),
    ("verify_postscript", {"postscript_marker": "P.S."}, "Bye. P.S. call me", True),
    ("verify_postscript", {"postscript_marker": "P.P.S"}, "Bye. P.S. call me", False),
    ("verify_postscript", {"postscript_marker": "P.S."}, "Bye. P.S.", False),
    ("validate_placeholders", {"N": 2}, "Dear [name], to [address]", True),
    ("validate_placeholders", {"N": 3}, "Dear [name], to [address]", False, True),
    ("verify_bullet_points", {"N": 2}, "List:\n* a\n  - b\nc", True),
    ("verify_bullet_points", {"N": 2}, "**Bold** counts\n* a\n* b", False),
    ("validate_title", {}, "<<poem of joy>>\nRoses", True),
    ("validate_title", {}, "<poem>", False),
    ("validate_choice", {"options": ["yes", "no"]}, "I say yes.", True, False),
    ("validate_choice", {"options": ["yes", "no"]}, "perhaps", False),
    ("validate_choice", {"options": ["My answer is yes.", "My answer is no."]}, "answer is", False, True),
    ("validate_choice", {"options": "('red', 'blue')"}, "blue", True),
    ("validate_choice", {"options": "red / blue"}, "blue", True),
    ("validate_choice", {"options": "red, blue"}, "e", False, True),
    ("validate_highlighted_sections", {"N": 2}, "*one* and *two*", True),
    ("validate_highlighted_sections", {"N": 2}, "*one", False),
    ("validate_sections", {"N": 2, "section_splitter": "Section"}, "Section 1\na\nSection 2\nb", True),
    ("validate_sections", {"N": 2, "section_splitter": "Section"}, "Welcome!\nSection 1\na\nSection 2\nb", False),
    ("validate_sections", {"N": 2, "section_splitter": "Section"}, "SECTION 1 a SECTION 2 b", False),
    ("validate_sections", {"N": 1, "section_splitter": "(Part)"}, "(Part) 1 begins", True),
    ("validate_json_format", {}, '{"a": [1, null]}', True),
    ("validate_json_format", {}, '```json\n{"a": 1}\n```', False),
    ("validate_json_format", {}, "[" * 100_000, False),
    ("validate_repeat_prompt", {"original_prompt": "Say hi."}, "Say hi. Hi!", True),
    ("validate_repeat_prompt", {"original_prompt": "Say hi."}, "Sure. Say hi.", False),
    ("validate_two_responses", {}, "yes ****** no", True),
    ("validate_two_responses", {}, "yes ****** yes", False),
    ("validate_two_responses", {}, "a ****** b ****** c", False),
    ("validate_two_responses", {}, "a ************ b", False),
    ("validate_uppercase", {}, "ALL CAPS 1, ÄÖ!", True),
    ("validate_uppercase", {}, "Not", False),
    ("validate_uppercase", {}, "STRAßE", False),
    ("validate_lowercase", {}, "all quiet, äö 東京", True),
    ("validate_lowercase", {}, "Not", False),
    ("validate_frequency_capital_words", {"N": 2, "quantifier": "at least"}, "I LOVE Paris", True),
    ("validate_frequency_capital_words", {"N": 1, "quantifier": "at most"}, "I LOVE", False),
    ("validate_frequency_capital_words", {"N": 3, "quantifier": "around"}, "I LOVE", True, False),
    ("validate_end", {"end_phrase": "The end."}, "And so. The end.\n", True),
    ("validate_end", {"end_phrase": "The end."}, "The end. Bye", False),
    ("validate_quotation", {}, '"quoted"', True),
    ("validate_quotation", {}, "“quoted”", False),
    ("validate_no_commas", {}, "none here", True),
    ("validate_no_commas", {}, "one, here", False),
    ("validate_no_commas", {}, "中文,也算", False),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{index}" for index, case in enumerate(CASES)])
def test_a_constraint(case):
    name, arguments, reply, mended, then = (*case, case[3])[:5]
    truth = row(name, **arguments)
    for verifier, expected in ((IfEval(), mended), (IfEval2024(), then)):
        verifier.check(truth)
        verdict = verifier(reply, truth)
        assert verdict.score == float(expected), verdict.detail
        assert name in verdict.detail


def test_all_twenty_five_are_there_and_every_one_is_met_by_one_case_and_missed_by_another():
    assert len(CONSTRAINTS) == len(NOVEMBER_2024) == 25
    for met in (True, False):
        assert {case[0] for case in CASES if case[3] is met} == set(CONSTRAINTS)


def test_only_four_functions_were_mended():
    assert {name for name in CONSTRAINTS if CONSTRAINTS[name] is not NOVEMBER_2024[name]} == {
        "validate_placeholders",
        "validate_choice",
        "validate_frequency_capital_words",
        "verify_sentence_constraint",
    }


def test_silence_meets_nothing_but_did_once():
    for empty in ("", "  \n", "<think>hm</think>", "<answer></answer>"):
        assert IfEval()(empty, row("validate_lowercase")).score == 0
    assert IfEval2024()("", row("validate_lowercase")).score == 1


def test_thoughts_and_tags_are_not_judged_by_the_mended_verifier():
    reply = "<think>HM, yes</think><answer>quiet</answer>"
    assert IfEval()(reply, row("validate_lowercase")).score == 1
    assert IfEval2024()(reply, row("validate_lowercase")).score == 0


def test_a_ground_truth_may_be_an_object_and_the_verifier_leaves_it_as_it_is():
    truth = {"func_name": "verify_bullet_points", "N": 1.0, "word": None}
    assert IfEval()("* a", truth).score == 1
    assert truth == {"func_name": "verify_bullet_points", "N": 1.0, "word": None}


@pytest.mark.parametrize(
    ("truth", "says"),
    [
        ("not json", "expected JSON such as"),
        ("[1]", "object with 'func_name'"),
        ('{"N": 3}', "object with 'func_name'"),
        ('[{"instruction_id": ["a"], "kwargs": [null]}]', "newer IFEval-G form"),
        (row("validate_lowercas"), "did you mean 'validate_lowercase'"),
        (row("verify_bullet_points"), "needs 'N'"),
        (row("verify_bullet_points", N="3"), "expected a count, got '3'"),
        (row("verify_bullet_points", N=-1), "expected a count"),
        (row("verify_bullet_points", N=2.5), "expected a count"),
        (row("verify_bullet_points", N=True), "expected a count"),
        (row("validate_word_constraint", N=3, quantifier="exactly"), "'at least', 'around' or 'at most'"),
        (row("verify_letter_frequency", N=3, letter="ab"), "a single letter"),
        (row("verify_keywords", keyword_list="red"), "a list of words"),
        (row("verify_keywords", keyword_list=[]), "a list of words"),
        (row("validate_paragraphs", N=2, first_word="a", i=0), "a count from 1"),
        (row("validate_response_language", language="english"), "one of the languages"),
        (row("validate_end", end_phrase=""), "a text"),
        (5, "object with 'func_name'"),
    ],
)
def test_a_ground_truth_of_the_wrong_form_is_refused(truth, says):
    with pytest.raises(ValueError) as caught:
        IfEval().check(truth)
    assert says in str(caught.value)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_every_constraint_judges_every_reply_and_the_same_way_again(reply):
    for name, arguments, *_ in CASES:
        if name != "validate_response_language":  # its detector is slow; see the cases above
            constraint = read_constraint({"func_name": name, **arguments})
            for functions in (CONSTRAINTS, NOVEMBER_2024):
                assert constraint.met_by(reply, functions) is constraint.met_by(reply, functions)


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=30), st.integers(0, 40))
def test_around_lies_between_at_least_and_at_most(words, n):
    def met(quantifier, N):
        return read_constraint({"func_name": "validate_word_constraint", "N": N, "quantifier": quantifier}).met_by(
            " ".join(words)
        )

    assert met("at least", n) or met("at most", n)
    tolerance = max(round(n * 0.1), 1)
    assert met("around", n) == (met("at least", max(n - tolerance, 0)) and met("at most", n + tolerance))
