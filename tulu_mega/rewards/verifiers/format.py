"""Replies of a demanded form."""

from __future__ import annotations

import re
from typing import Any

from tulu_mega.rewards.verdict import Messages, Verdict, shortened
from tulu_mega.rewards.visible import is_visible

_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|&(?:nbsp|ensp|emsp|thinsp|zwnj|zwj|shy|#\w+);")


class Format:
    """The reply has the demanded form, whatever it says.

    The ground truth is a regular expression (Python's, searched, ``.`` matches newlines; anchor it with ``\\A`` and ``\\Z``), or
    an object with ``pattern``, ``sections`` or both: the sections' headings must occur in this order, each followed by some
    text that can be seen: tags, HTML comments and entities of spaces are none. Follows nothing published.

    >>> Format()("<think>2+2</think><answer>4</answer>", {"sections": ["<think>", "<answer>"]}).score
    1.0
    """

    def check(self, ground_truth: Any) -> None:
        self._read(ground_truth)

    def __call__(self, response: str, ground_truth: Any, *, messages: Messages | None = None) -> Verdict:
        pattern, sections = self._read(ground_truth)
        if pattern and not pattern.search(response):
            return Verdict.of(False, f"does not match {shortened(pattern.pattern)}")
        at = 0
        for index, heading in enumerate(sections):
            start = response.find(heading, at)
            if start < 0:
                return Verdict.of(False, f"section {heading!r} is missing or out of order")
            at = start + len(heading)
            end = response.find(sections[index + 1], at) if index + 1 < len(sections) else len(response)
            if end >= 0 and not is_visible(_MARKUP.sub("", _without_comments(response[at:end]))):
                return Verdict.of(False, f"section {heading!r} is empty")
        return Verdict.of(True, "the demanded form")

    @staticmethod
    def _read(ground_truth: Any) -> tuple[re.Pattern[str] | None, list[str]]:
        value = {"pattern": ground_truth} if isinstance(ground_truth, str) else ground_truth
        if not isinstance(value, dict) or not value or value.keys() - {"pattern", "sections"}:
            raise ValueError(
                "expected a regular expression or an object with 'pattern' (a regular expression) and/or 'sections' "
                f"(headings in order), got {shortened(ground_truth)}"
            )
        sections = value.get("sections", [])
        if not isinstance(sections, list) or not all(isinstance(heading, str) and heading.strip() for heading in sections):
            raise ValueError(f"'sections': expected a list of headings, got {shortened(sections)}")
        pattern = value.get("pattern")
        if pattern is None:
            if not sections:
                raise ValueError("demands nothing; give a 'pattern' or 'sections'")
            return None, sections
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"'pattern': expected a regular expression, got {shortened(pattern)}")
        try:
            return re.compile(pattern, re.DOTALL), sections
        except re.error as error:
            raise ValueError(f"{shortened(pattern)} is not a regular expression: {error}") from None


def _without_comments(text: str) -> str:
    """The text without ``<!-- ... -->``. An expression would look for an end from every beginning."""
    parts, at = [], 0
    while (begin := text.find("<!--", at)) >= 0 and (end := text.find("-->", begin + 4)) >= 0:
        parts.append(text[at:begin])
        at = end + 3
    return "".join([*parts, text[at:]])


VERIFIER = Format
