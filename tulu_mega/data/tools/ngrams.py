"""Runs of words that two collections of texts have in common."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_ASCII_WORD = re.compile(r"[^\W_]+(?:_+[^\W_]+)*", re.ASCII)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:_+[^\W_{_UNSPACED}]+)*")
_CONTROL = "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"
"""Control characters that are no blanks."""
_IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Unicode's Default_Ignorable_Code_Point, and annotation marks: soft hyphens, zero-width blanks and joiners, marks of direction,
variation selectors, fillers."""
_UNSEEN = re.compile(f"[{_CONTROL}{_IGNORABLE}]")
_BITS = 24


def words(text: str) -> list[str]:
    """Words, lower-cased: runs of letters, digits and underscores inside them; punctuation and blanks are left out.

    Underscores around a word are Markdown's. Characters that nobody sees part no words and are none: texts that look the same
    to a reader have the same words. Thai, Lao, Burmese, Khmer, Chinese and Japanese, which put no blanks between words, are
    taken character by character. Forms that look alike (ligatures, full-width letters) count as the same (NFKC).
    """
    text = _UNSEEN.sub("", text)
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class NgramIndex:
    """The n-grams of some rows, each of one or more texts.

    Args:
        rows: the words of each text of each row. N-grams do not reach over the end of a text.
        ngram: words in one.
    """

    def __init__(self, rows: Iterable[Sequence[list[str]]], ngram: int):
        self.ngram = ngram
        self._ids: dict[str, int] = {}
        stream, owners, lengths = [], [], []
        for number, texts in enumerate(rows):
            for text in texts:
                stream += [self._ids.setdefault(word, len(self._ids) + 1) for word in text]
                stream.append(0)
                owners += [number] * (len(text) + 1)
            lengths.append(sum(map(len, texts)))
        self.lengths = np.array(lengths, np.int64)
        """int64, words of each row"""
        self._stream, self._owners = np.array(stream, np.uint64), np.array(owners, np.int64)
        at = _whole(self._stream, ngram)
        self.matchable = np.isin(np.arange(len(lengths)), self._owners[at])
        """bool, rows that have an n-gram at all"""
        order = np.empty(0)
        for seed in range(64):
            self._factors = np.random.RandomState(seed).randint(0, 2**64 - 1, ngram, np.uint64) | np.uint64(1)
            hashes = _hashes(self._stream, at, self._factors)
            order = np.argsort(hashes, kind="stable")
            hashes, places = hashes[order], at[order]
            new = np.append(True, hashes[1:] != hashes[:-1]) if len(hashes) else np.empty(0, bool)
            same = np.flatnonzero(~new)
            if self._equal(places[same], self._stream, places[same - 1]).all():
                break
        else:
            raise RuntimeError("n-grams collide under every hash")
        self._places = places
        self._starts = np.append(np.flatnonzero(new), len(places))
        self._hashes = hashes[new]
        self._present = np.zeros(1 << _BITS, bool)
        self._present[self._hashes >> np.uint64(64 - _BITS)] = True

    def _equal(self, places: np.ndarray, stream: np.ndarray, at: np.ndarray) -> np.ndarray:
        span = np.arange(self.ngram)
        return (self._stream[places[:, None] + span] == stream[at[:, None] + span]).all(1)

    def find(self, rows: Sequence[Sequence[list[str]]]) -> list[tuple[int, np.ndarray]]:
        """N-grams that occur in other rows.

        Args:
            rows: the words of each text of each row.

        Returns:
            Rows that have any, and the ascending numbers of the index's n-grams in each, each once.
        """
        known, stream, ends = self._ids.get, [], []
        for texts in rows:
            for text in texts:
                stream += map(known, text, repeat(0))
                stream.append(0)
            ends.append(len(stream))
        ids = np.array(stream, np.uint64)
        at = _whole(ids, self.ngram)
        hashes = _hashes(ids, at, self._factors)
        some = self._present[hashes >> np.uint64(64 - _BITS)]  # nearly all fall out here, at a hundredth of a search
        at, hashes = at[some], hashes[some]
        found = np.searchsorted(self._hashes, hashes)
        same = found < len(self._hashes)
        same[same] = self._hashes[found[same]] == hashes[same]
        at, found = at[same], found[same]
        same = self._equal(self._places[self._starts[found]], ids, at)
        at, found = at[same], found[same]
        hit, first = np.unique(np.searchsorted(ends, at, side="right"), return_index=True)
        return (
            [(row, np.unique(part)) for row, part in zip(hit.tolist(), np.split(found, first[1:]), strict=True)]
            if len(hit)
            else []
        )

    def covered(self, grams: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the index of which more than a share of the words lies in some n-grams.

        Args:
            grams: n-grams, by number.
            share: 0..1.

        Returns:
            The rows, int64 ascending, and the share of each that is covered.
        """
        places = np.concatenate([self._places[self._starts[gram] : self._starts[gram + 1]] for gram in grams])
        owners, at, times = np.unique(self._owners[places], return_inverse=True, return_counts=True)
        possible = times * self.ngram > share * self.lengths[owners]  # common phrases stand in many rows, and cover none
        places = places[possible[at]]
        words = np.unique(places[:, None] + np.arange(self.ngram))
        rows, counts = np.unique(self._owners[words], return_counts=True)
        shares = counts / self.lengths[rows]
        return rows[shares > share], shares[shares > share]


def _whole(stream: np.ndarray, ngram: int) -> np.ndarray:
    """Return where the n-grams without a 0 begin."""
    if len(stream) < ngram:
        return np.empty(0, np.int64)
    zeros = np.concatenate([[0], np.cumsum(stream == 0)])
    return np.flatnonzero(zeros[ngram:] == zeros[:-ngram])


def _hashes(stream: np.ndarray, at: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint64; sums modulo 2^64 of the words' numbers, each place with a factor of its own."""
    windows = max(0, len(stream) - len(factors) + 1)
    result = np.zeros(windows, np.uint64)
    for offset, factor in enumerate(factors):  # over all windows: slices are faster than picking those that count
        result += stream[offset : offset + windows] * factor
    return result[at]
