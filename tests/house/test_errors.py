"""What reaches a terminal is shown there, and not obeyed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tulu_mega.errors import UserError, printable

OBEYED = ["\x1b[2J", "\x1b]0;title\x07", "\r", "\x08", "\x7f", "\x9b31m", "\u202e", "\u2066", "\x00"]


@pytest.mark.parametrize("text", OBEYED)
def test_what_a_terminal_would_obey_is_escaped(text):
    (problem,) = UserError(f"row 3: {text}end").problems
    assert text[0] not in problem and problem.endswith("end") and problem.isascii()


def test_what_it_shows_stays():
    text = "two lines\n\tof a table: caf\u00e9 \u4f60\u597d \U0001f600 \u05d0"
    assert printable(text) == text


@given(st.text())
def test_nothing_but_line_feeds_and_tabs_is_left(text):
    told = printable(text)
    assert not any(ord(each) < 32 and each not in "\n\t" for each in told) and printable(told) == told
