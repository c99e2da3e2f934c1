"""The 25 instructions of IFEval as functions of a response, by the names that the data set uses.

They follow IFEval's published checker (arXiv 2311.07911 and its code of 2023), not the constraints that Tulu 3 trains on
(``rewards/constraints.py``), which have other names, arguments and limits. Departures:

- Sentences end at ``.``, ``?`` or ``!`` before white space, where the published checker asks NLTK's Punkt model, so that
  abbreviations count here.
- Keywords, forbidden words and section marks are taken literally, where it takes them for regular expressions.
- The language detector's dice are seeded, so that a response has one language.
- A letter to be counted may be any character. Where the prompts ask for ``#`` or ``!``, it counts a letter drawn at random.
- Reasoning in ``<think>`` is not judged, and a response is judged with the white space around it, as the published code does;
  the package ``if-verifiable`` takes that away first, which changes what its loose versions leave out.

Words of capitals are counted in the words that NLTK 3.10's ``word_tokenize`` makes, without NLTK: see :func:`capital_words`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from tulu_mega.rewards.arguments import READERS, Index, Language, Letter, Relation


@dataclass(frozen=True)
class Check:
    """One kind of instruction."""

    holds: Callable[..., bool]
    """response and the instruction's arguments by name to whether it is followed"""
    needs: tuple[str, ...] = ()
    """arguments that must be given"""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, checked by the types that the function names; those that are null or not needed are dropped.

        Raises:
            ValueError: one is missing or of another form.
        """
        if missing := [name for name in self.needs if given.get(name) is None]:
            raise ValueError(f"lacks {', '.join(missing)} in kwargs")
        kinds, arguments = get_type_hints(self.holds), {}
        for name in self.needs:
            try:
                arguments[name] = READERS[kinds[name]](given[name])
            except ValueError as error:
                raise ValueError(f"has {name} = {given[name]!r} in kwargs; expected {error}") from None
        return arguments


CHECKS: dict[str, Check] = {}


def _instruction(name: str, *needs: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = Check(function, needs)
        return function

    return register


def _related(count: int, relation: Relation, limit: int) -> bool:
    """``less than`` or ``at least``, the only two relations there are."""
    return count < limit if relation == "less than" else count >= limit


@_instruction("keywords:existence", "keywords")
def _existence(text: str, *, keywords: list[str], **_: Any) -> bool:
    lower = text.lower()
    return all(keyword.lower() in lower for keyword in keywords)


@_instruction("keywords:frequency", "keyword", "frequency", "relation")
def _frequency(text: str, *, keyword: str, frequency: int, relation: Relation, **_: Any) -> bool:
    return _related(text.lower().count(keyword.lower().strip()), relation, frequency)


@_instruction("keywords:forbidden_words", "forbidden_words")
def _forbidden(text: str, *, forbidden_words: list[str], **_: Any) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


@_instruction("keywords:letter_frequency", "letter", "let_frequency", "let_relation")
def _letters(text: str, *, letter: Letter, let_frequency: int, let_relation: Relation, **_: Any) -> bool:
    return _related(text.lower().count(letter.lower()), let_relation, let_frequency)


@_instruction("language:response_language", "language")
def _language(text: str, *, language: Language, **_: Any) -> bool:
    from tulu_mega.rewards.constraints import language_of

    return language_of(text) in (None, language)  # of a text without a language the published checker says that it is followed


@_instruction("length_constraints:number_sentences", "num_sentences", "relation")
def _sentences(text: str, *, num_sentences: int, relation: Relation, **_: Any) -> bool:
    return _related(len([part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]), relation, num_sentences)


@_instruction("length_constraints:number_paragraphs", "num_paragraphs")
def _paragraphs(text: str, *, num_paragraphs: int, **_: Any) -> bool:
    first, *middle, last = parts if len(parts := re.split(r"\s?\*\*\*\s?", text)) > 1 else (parts[0], "")
    if not all(part.strip() for part in middle):
        return False
    return len(middle) + bool(first.strip()) + bool(last.strip()) == num_paragraphs


@_instruction("length_constraints:number_words", "num_words", "relation")
def _words(text: str, *, num_words: int, relation: Relation, **_: Any) -> bool:
    return _related(len(re.findall(r"\w+", text)), relation, num_words)


@_instruction("length_constraints:nth_paragraph_first_word", "num_paragraphs", "nth_paragraph", "first_word")
def _nth_paragraph(text: str, *, num_paragraphs: int, nth_paragraph: Index, first_word: str, **_: Any) -> bool:
    paragraphs = re.split(r"\n\n", text)
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > filled or not (words := paragraphs[nth_paragraph - 1].split()):
        return False
    word = re.match(r"[^.,?!'\"]*", words[0].lstrip("'").lstrip('"'))[0]
    return filled == num_paragraphs and word.lower() == first_word.lower()


@_instruction("detectable_content:number_placeholders", "num_placeholders")
def _placeholders(text: str, *, num_placeholders: int, **_: Any) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_instruction("detectable_content:postscript", "postscript_marker")
def _postscript(text: str, *, postscript_marker: str, **_: Any) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = known.get(postscript_marker.strip(), re.escape(postscript_marker.lower()))
    return re.search(pattern, text.lower()) is not None


@_instruction("detectable_format:number_bullet_lists", "num_bullets")
def _bullets(text: str, *, num_bullets: int, **_: Any) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@_instruction("detectable_format:constrained_response")
def _constrained(text: str, **_: Any) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@_instruction("detectable_format:number_highlighted_sections", "num_highlights")
def _highlights(text: str, *, num_highlights: int, **_: Any) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


@_instruction("detectable_format:multiple_sections", "section_spliter", "num_sections")
def _sections(text: str, *, section_spliter: str, num_sections: int, **_: Any) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) >= num_sections


@_instruction("detectable_format:json_format")
def _json(text: str, **_: Any) -> bool:
    body = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


@_instruction("detectable_format:title")
def _title(text: str, **_: Any) -> bool:
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text))


@_instruction("combination:two_responses")
def _two_responses(text: str, **_: Any) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    filled = [part.strip() for part in parts if part.strip()]
    return len(filled) == 2 and filled[0] != filled[1]


@_instruction("combination:repeat_prompt", "prompt_to_repeat")
def _repeat(text: str, *, prompt_to_repeat: str, **_: Any) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_instruction("startend:end_checker", "end_phrase")
def _end(text: str, *, end_phrase: str, **_: Any) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_instruction("startend:quotation")
def _quotation(text: str, **_: Any) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_instruction("change_case:capital_word_frequency", "capital_frequency", "capital_relation")
def _capital_words(text: str, *, capital_frequency: int, capital_relation: Relation, **_: Any) -> bool:
    return _related(capital_words(text), capital_relation, capital_frequency)


# Where NLTK parts words, as far as that decides how many are of capitals; a full stop of its own, say, is none. Each pattern in
# turn: what it finds gives way to its groups, with spaces around. Hyphens, slashes and single dots part nothing.
_PARTED = tuple(
    re.compile(pattern)
    for pattern in (
        r"[][\s;@#$%&?!*\"`(){}<>«»“”„‘’\u2012-\u2015]|\.{2,}|''|--|[:,](?!\d)",
        r"(?<=[^\w\s])(')(?=\w)(?!(?i:[sdmtn]|ll|re|ve)\b)",  # an opening quotation mark, x='A'
        r"(?<=[^'\s])('(?!\S))",  # a closing quotation mark, else taken for part of the ending before it
        r"(?<=[^'\s])('[SsMmDd])(?=\.?(?!\S))",
        r"(?<=[^'\s])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?=\.?(?!\S))",
        r"(?i)\b(can(?=not\b)|d(?='ye\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|more(?='n\b)|wan(?=na(?!\S)))(\w+|'\w+)",
    )
)


def capital_words(text: str) -> int:
    """The number of words with capitals and no small letters, parted as NLTK does.

    >>> capital_words("NASA/ESA, U.S.A. and WELL-KNOWN"), capital_words("I'M"), capital_words("NASA's"), capital_words("CANNOT")
    (3, 2, 1, 2)
    """
    for pattern in _PARTED:
        text = pattern.sub(lambda found: f" {' '.join(found.groups())} ", text)
    return sum(word.isupper() for word in text.split())


@_instruction("change_case:english_capital")
def _upper(text: str, **_: Any) -> bool:
    return text.isupper() and _language(text, language="en")


@_instruction("change_case:english_lowercase")
def _lower(text: str, **_: Any) -> bool:
    return text.islower() and _language(text, language="en")


@_instruction("punctuation:no_comma")
def _no_comma(text: str, **_: Any) -> bool:
    return "," not in text
