"""The 25 constraints of Tulu 3's instruction-following prompts, each a function of the reply and its arguments.

They go back to IFEval (arXiv 2311.07911); names, arguments and meaning are those of open-instruct, whose verifier of
November 2024 had four errors that were mended later (the last in May 2026, commit a09e149). What is here follows the mended
one, as it still was on open-instruct's main branch in August 2026 (commit e6c3044);
:data:`NOVEMBER_2024` has the functions that differed as they were. A constraint's arguments are the function's, with their
types; see :func:`read_constraint`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from tulu_mega.errors import nearest
from tulu_mega.outside.json_input import read_whole_json
from tulu_mega.rewards.arguments import READERS, Index, Language, Letter, Options, Quantifier, languages

Function = Callable[..., bool]
CONSTRAINTS: dict[str, Function] = {}
"""Name -> function of (text, arguments by name)."""


def _constraint(function: Function) -> Function:
    CONSTRAINTS[function.__name__] = function
    return function


# Keywords


@_constraint
def verify_keywords(text: str, keyword_list: list[str]) -> bool:
    """Every keyword occurs, as part of a word too; case does not count."""
    lower = text.lower()
    return all(keyword.lower() in lower for keyword in keyword_list)


@_constraint
def verify_keyword_frequency(text: str, word: str, N: int) -> bool:
    """The word occurs exactly N times as a whole word; case does not count. (A keyword of two words is never found.)"""
    return re.findall(r"\b\w+\b", text.lower()).count(word.lower()) == N


@_constraint
def validate_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """None of the words occurs, not even inside another; case does not count."""
    lower = text.lower()
    return not any(word.lower() in lower for word in forbidden_words)


@_constraint
def verify_letter_frequency(text: str, letter: Letter, N: int) -> bool:
    """The letter occurs exactly N times; case counts."""
    return text.count(letter) == N


# Language


@_constraint
def validate_response_language(text: str, language: Language) -> bool:
    """langdetect's most probable language of the reply is the given one, an ISO 639-1 code ("zh-cn", "zh-tw" for Chinese).

    The detector's dice are seeded, so that a reply has one language; a reply without letters has none and fails.
    """
    return language_of(text) == language


def language_of(text: str) -> str | None:
    """langdetect's most probable language of a text; None where it finds nothing to go by."""
    from langdetect import LangDetectException

    detector = languages().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


# Length


@_constraint
def verify_paragraph_count(text: str, N: int) -> bool:
    """Exactly N paragraphs, none empty, between dividers ``* * *``."""
    paragraphs = text.split("* * *")
    return len(paragraphs) == N and all(paragraph.strip() for paragraph in paragraphs)


@_constraint
def validate_word_constraint(text: str, N: int, quantifier: Quantifier) -> bool:
    """So many words, split at white space; "around" allows a tenth of N (rounded, at least 1)."""
    return _compare(len(text.split()), N, quantifier, tolerance=_tenth(N))


@_constraint
def verify_sentence_constraint(text: str, N: int, quantifier: Quantifier) -> bool:
    """So many sentences; "around" allows 1. A sentence ends at ``.``, ``?`` or ``!`` before white space."""
    return _compare(_sentences(text, ".?!"), N, quantifier, tolerance=1)


@_constraint
def validate_paragraphs(text: str, N: int, first_word: str, i: Index) -> bool:
    """Exactly N paragraphs between empty lines, the i-th (from 1) starting with the word; case counts.

    An i beyond N is never met (the published code raises).
    """
    paragraphs = text.split("\n\n")
    return len(paragraphs) == N and i <= N and paragraphs[i - 1].strip().startswith(first_word)


# Content


@_constraint
def verify_postscript(text: str, postscript_marker: str) -> bool:
    """The marker occurs and something follows it."""
    _, marker, rest = text.partition(postscript_marker)
    return bool(marker and rest.strip())


@_constraint
def validate_placeholders(text: str, N: int) -> bool:
    """At least N placeholders in square brackets on one line each, such as ``[address]``."""
    return sum(map(_bracketed, text.split("\n"))) >= N


# Form


@_constraint
def verify_bullet_points(text: str, N: int) -> bool:
    """Exactly N lines that start with ``*`` or ``-``."""
    return sum(line.strip().startswith(("*", "-")) for line in text.split("\n")) == N


@_constraint
def validate_title(text: str) -> bool:
    """A title in double angular brackets, ``<<poem of joy>>``."""
    return any(">>" in line.partition("<<")[2] for line in text.split("\n"))


@_constraint
def validate_choice(text: str, options: Options) -> bool:
    """One of the options occurs in the reply, as part of a word too; case counts.

    Options that are given as one text are read as a Python or JSON list, else split at commas, slashes and semicolons (the
    published code compares their single characters).
    """
    return any(option in text for option in options)


@_constraint
def validate_highlighted_sections(text: str, N: int) -> bool:
    """At least N pieces between asterisks on one line, ``*highlighted section*``."""
    return sum(line.count("*") // 2 for line in text.split("\n")) >= N


@_constraint
def validate_sections(text: str, N: int, section_splitter: str) -> bool:
    """Exactly N pieces when the reply is split at the splitter; case counts.

    An empty piece before the first splitter does not count, an introduction does. (IFEval itself counts the splitter with a
    number behind it, at least N times. A change of open-instruct to that, its pull request 1767, was closed unmerged.)
    """
    pieces = text.split(section_splitter)
    return len(pieces[1:] if pieces[0] == "" else pieces) == N


@_constraint
def validate_json_format(text: str) -> bool:
    """The whole reply is JSON. (A fence of backticks is not.)"""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# Combination


@_constraint
def validate_repeat_prompt(text: str, original_prompt: str) -> bool:
    """The reply starts with the prompt, character by character."""
    return text.startswith(original_prompt)


@_constraint
def validate_two_responses(text: str) -> bool:
    """Exactly one divider ``******`` with different texts on its two sides."""
    parts = text.split("******")
    return len(parts) == 2 and parts[0].strip() != parts[1].strip()


# Case, ends, punctuation


@_constraint
def validate_uppercase(text: str) -> bool:
    """No letter that has a capital is small."""
    return text == text.upper()


@_constraint
def validate_lowercase(text: str) -> bool:
    """No letter is a capital."""
    return text == text.lower()


@_constraint
def validate_frequency_capital_words(text: str, N: int, quantifier: Quantifier) -> bool:
    """So many words of capitals A to Z alone ("I" is one); "around" allows a tenth of N (rounded, at least 1)."""
    return _compare(_capital_words(text), N, quantifier, tolerance=_tenth(N))


@_constraint
def validate_end(text: str, end_phrase: str) -> bool:
    """The reply ends with the phrase, character by character."""
    return text.endswith(end_phrase)


@_constraint
def validate_quotation(text: str) -> bool:
    """The reply starts and ends with a straight double quotation mark (one alone does both)."""
    return text.startswith('"') and text.endswith('"')


@_constraint
def validate_no_commas(text: str) -> bool:
    """No comma."""
    return "," not in text


# As they were in November 2024


def _any_placeholders(text: str, N: int) -> bool:
    """Always met: the published function returned a pair, and a pair is true."""
    return True


def _reply_within_option(text: str, options: Options) -> bool:
    """The reply occurs in an option: the published function had them the wrong way round."""
    return any(text in option for option in options)


def _exactly_around_capital_words(text: str, N: int, quantifier: Quantifier) -> bool:
    """Without tolerance: "around" means exactly."""
    return _compare(_capital_words(text), N, quantifier, tolerance=0)


def _sentences_without_exclamations(text: str, N: int, quantifier: Quantifier) -> bool:
    """A sentence ends at ``.`` or ``?`` only."""
    return _compare(_sentences(text, ".?"), N, quantifier, tolerance=1)


NOVEMBER_2024: Mapping[str, Function] = {
    **CONSTRAINTS,
    "validate_placeholders": _any_placeholders,
    "validate_choice": _reply_within_option,
    "validate_frequency_capital_words": _exactly_around_capital_words,
    "verify_sentence_constraint": _sentences_without_exclamations,
}
"""The functions that Tulu 3 was trained with."""


@dataclass(frozen=True)
class Constraint:
    """A constraint with its arguments, ready to be asked."""

    name: str
    arguments: dict[str, Any]

    def met_by(self, text: str, functions: Mapping[str, Function] = CONSTRAINTS) -> bool:
        return functions[self.name](text, **self.arguments)


def read_constraint(ground_truth: Any) -> Constraint:
    """Reads the ``ground_truth`` of a Tulu row: JSON (or an object) with ``func_name`` and the function's arguments.

    Arguments that are null or belong to other functions are dropped; Tulu's rows carry every argument of every function.

    >>> read_constraint('{"func_name": "validate_word_constraint", "N": 50, "quantifier": "at most", "word": null}')
    Constraint(name='validate_word_constraint', arguments={'N': 50, 'quantifier': 'at most'})

    Raises:
        ValueError: not JSON, no known function, or an argument missing or of another type.
    """
    if isinstance(ground_truth, str):
        try:
            ground_truth = read_whole_json(ground_truth)
        except ValueError as error:
            raise ValueError(f"expected JSON such as {_EXAMPLE}, got {ground_truth[:80]!r} ({error})") from None
    if not isinstance(ground_truth, Mapping) or "func_name" not in ground_truth:
        hint = " (an 'instruction_id' belongs to the newer IFEval-G form)" if "instruction_id" in str(ground_truth) else ""
        raise ValueError(f"expected a JSON object with 'func_name', such as {_EXAMPLE}, got {str(ground_truth)[:80]!r}{hint}")
    name = ground_truth["func_name"]
    if not isinstance(name, str) or name not in CONSTRAINTS:
        raise ValueError(f"unknown func_name {name!r}{nearest(str(name), CONSTRAINTS)}; known: {', '.join(sorted(CONSTRAINTS))}")
    arguments = {}
    for argument, reader in _readers(name).items():
        value = ground_truth.get(argument)
        if value is None:
            raise ValueError(f"{name} needs {argument!r}, which is not given")
        try:
            arguments[argument] = reader(value)
        except ValueError as error:
            raise ValueError(f"{name}: {argument!r}: expected {error}, got {value!r}") from None
    return Constraint(name, arguments)


_EXAMPLE = '{"func_name": "validate_word_constraint", "N": 50, "quantifier": "at most"}'


def _compare(count: int, N: int, quantifier: Quantifier, tolerance: int) -> bool:
    match quantifier:
        case "at least":
            return count >= N
        case "at most":
            return count <= N
        case "around":
            return abs(count - N) <= tolerance


def _tenth(N: int) -> int:
    return max(round(N * 0.1), 1)


def _sentences(text: str, ends: str) -> int:
    """Pieces between sentence ends; dots of abbreviations ("e.g. ", "Dr. ") end none."""
    return len(re.split(rf"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=[{ends}])\s", text))


def _bracketed(line: str) -> int:
    """Pieces ``[...]``, each up to the first closing bracket. An expression would look for that from every opening one."""
    found, at = 0, 0
    while (opening := line.find("[", at)) >= 0 and (closing := line.find("]", opening)) >= 0:
        found, at = found + 1, closing + 1
    return found


def _capital_words(text: str) -> int:
    return len(re.findall(r"\b[A-Z]+\b", text))


@functools.cache
def _readers(name: str) -> dict[str, Callable[[Any], Any]]:
    function = CONSTRAINTS[name]
    kinds = get_type_hints(function)
    return {argument: READERS[kinds[argument]] for argument in list(inspect.signature(function).parameters)[1:]}
