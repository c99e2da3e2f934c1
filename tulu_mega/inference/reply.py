"""What a server's answer must be before anything is trained on it."""

from __future__ import annotations

import sys
from typing import Any

from tulu_mega.inference.sampling import Sampling
from tulu_mega.outside.json_input import read_json_text
from tulu_mega.records import Response

FINISHED = ("stop", "length")
_LARGEST = sys.float_info.max
ROUNDING = 1e-4
"""By how much float32 or bfloat16 may put a sure token's log-probability above 0."""


def parsed(line: bytes) -> dict[str, Any]:
    """A line of an answer.

    Raises:
        ValueError: it is not what a server sends, or says that something went wrong there.
    """
    try:
        answer = read_json_text(line)
    except ValueError:
        raise ValueError(f"not JSON: {line[:100]!r}") from None
    if not isinstance(answer, dict):
        raise ValueError(f"expected an object, got {line[:100]!r}")
    if "error" in answer:
        raise ValueError(str(answer["error"]))
    return answer


def check_adapter(answer: dict[str, Any], adapter: str | None) -> None:
    """
    Args:
        adapter: path of the one that was to answer (`weight_transfer.adapters.path`); None for the model itself.

    Raises:
        ValueError: another one did, or none.
    """
    if (given := answer.get("adapter")) != adapter:
        raise ValueError(f"answered by adapter {str(given)[:100]}, expected {adapter}")


def responses(answer: dict[str, Any], prompt: list[int], sampling: Sampling, version: int, vocabulary: int) -> list[Response]:
    """The responses in one prompt's answer (see :mod:`tulu_mega.vllm_plugin.batch_route`), in the order of their numbers.

    Args:
        answer: as `parsed`.
        prompt: token ids that were sent.
        sampling: what was asked for.
        version: of the weights that were to answer.
        vocabulary: tokens that the model has.

    Raises:
        ValueError: what is wrong with the answer, and where.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError(f"no list of choices: {str(choices)[:100]}")
    numbers = [choice.get("index") for choice in choices]
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(sampling.samples)):
        raise ValueError(f"responses numbered {numbers}, expected each of 0 to {sampling.samples - 1} once")
    made = []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        try:
            made.append(_response(choice, prompt, sampling, version, vocabulary))
        except ValueError as problem:
            raise ValueError(f"response {choice['index']}: {problem}") from None
    return made


def _response(choice: dict[str, Any], prompt: list[int], sampling: Sampling, version: int, vocabulary: int) -> Response:
    reason = choice.get("finish_reason")
    if reason not in FINISHED:
        raise ValueError(f"finish_reason is {reason!r}, expected one of {', '.join(FINISHED)}")
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"token_ids is {ids!r}, expected at least one token")
    if len(ids) > sampling.max_tokens:
        raise ValueError(f"{len(ids)} tokens, asked for at most {sampling.max_tokens}")
    for at, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"token {at} is {token!r}, outside the vocabulary of {vocabulary}")
    return Response.of_one_turn(
        prompt_ids=prompt,
        answer_ids=ids,
        sampler_logp=_log_probabilities(choice, ids),
        versions=_versions(choice, len(ids), version),
        finish_reason=reason,
    )


def _log_probabilities(choice: dict[str, Any], ids: list[int]) -> list[float]:
    values = choice.get("logprobs")
    if not isinstance(values, list) or len(values) != len(ids):
        got = len(values) if isinstance(values, list) else None
        raise ValueError(f"{got} log-probabilities for {len(ids)} tokens")
    for at, value in enumerate(values):
        if type(value) not in (int, float) or not -_LARGEST <= value <= ROUNDING:  # NaN is in no range
            raise ValueError(f"the log-probability of token {at} is {value!r}")
    return [min(float(value), 0.0) for value in values]


def _versions(choice: dict[str, Any], length: int, version: int) -> list[int]:
    spans = choice.get("weight_versions")
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        raise ValueError(f"weight_versions is {spans!r}, so nobody knows whose tokens these are")
    end = 0
    for span in spans:
        if span.get("start") != end or type(span.get("end")) is not int:
            raise ValueError(f"weight_versions {spans!r} do not follow each other")
        end = span["end"]
    if end != length:
        raise ValueError(f"weight_versions {spans!r} do not cover {length} tokens")
    if other := [span.get("version") for span in spans if span.get("version") != str(version)]:
        raise ValueError(f"tokens of weights {other[0]!r}, expected {str(version)!r}")
    return [version] * length
