"""The rollout client against small servers of the tests' own: what it sends, what it refuses, whom it asks next."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from aiohttp import web

from tests.lib.fake_server import LONGEST, SAMPLING, VOCABULARY, Fake, answer, free_port, settings
from tulu_mega.errors import UserError
from tulu_mega.inference.client import RolloutClient
from tulu_mega.rl import fleet
from tulu_mega.vllm_plugin.auth import ABOUT
from tulu_mega.weight_transfer.server import ServerAddress, ServerFailure
from tulu_mega.weight_transfer.waiting import in_daemon_thread


def test_responses_come_in_order_with_their_tokens_and_log_probabilities(serve):
    fake = Fake()
    prompts = [[1, 2, 3], [4], [5, 6]]
    done = []
    with RolloutClient([serve(fake)], settings()) as client:
        groups = client.generate(prompts, SAMPLING, 3, numbers=[10, 11, 12], done=lambda at, got: done.append((at, got)))
    assert fake.keys == {"Bearer secret"}
    for index, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        seed = 7 + (10 + index) * 2
        assert [rollout.last_answer for rollout in group] == [[seed % 50 + sample] * 4 for sample in (0, 1)]
        for rollout in group:
            assert rollout.segments[0].token_ids == prompt and rollout.versions == [3] * 4 and rollout.finish_reason == "length"
            assert rollout.sampler_logp == [-0.5, -1.5, -2.5, -3.5]
    assert sorted(done, key=lambda each: each[0]) == list(enumerate(groups))


def test_an_answer_of_the_bare_model_is_not_taken_for_the_adapters(serve):
    asked = RolloutClient([serve(Fake())], settings(retries=0), "policy")
    with asked as client, pytest.raises(ServerFailure, match="answered by adapter None, expected memory://policy/3"):
        client.generate([[1, 2]], SAMPLING, 3)


def test_the_same_seed_gives_the_same_responses_from_any_number_of_servers(serve):
    prompts = [[token] for token in range(1, 20)]
    alone = serve(Fake())
    fakes = [Fake(), Fake(), Fake()]
    with RolloutClient([alone], settings()) as client:
        expected = client.generate(prompts, SAMPLING, 3)
    with RolloutClient([serve(fake) for fake in fakes], settings()) as client:
        assert client.generate(prompts, SAMPLING, 3) == expected
    assert [fake.batches for fake in fakes] == [[7], [6], [6]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([1, VOCABULARY], f"token {VOCABULARY}, outside the vocabulary of {VOCABULARY}"),
        ([-1], "token -1"),
        ([1] * LONGEST, f"has {LONGEST} tokens, and prompt and response together may have {LONGEST}"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_sent(serve, prompt, message):
    fake = Fake()
    with RolloutClient([serve(fake)], settings()) as client, pytest.raises(UserError, match=message) as refused:
        client.generate([[1], prompt], SAMPLING, 3)
    assert "prompt 1" in str(refused.value)
    assert fake.requests == []


def test_room_for_the_response_is_what_the_prompt_leaves(serve):
    fake = Fake()
    with RolloutClient([serve(fake)], settings()) as client:
        ((rollout, _),) = client.generate([[1] * (LONGEST - 3)], SAMPLING, 3)
    assert fake.requests[0]["sampling_params"]["max_tokens"] == 3 == len(rollout.last_answer)


def spoilt(**changes) -> Callable[[dict], dict]:
    """A reply whose second response is wrong somewhere."""

    def reply(request: dict) -> dict:
        whole = answer(request)
        whole["choices"][0] |= changes
        return whole

    return reply


WHOLE_ANSWER = {
    "not JSON": (lambda _: b"<html>\n", "not JSON"),
    "not an object": (lambda _: b"[]\n", "expected an object"),
    "nothing": (lambda _: b"", "1 of 1 prompts unanswered"),
    "half a line": (lambda request: json.dumps({"place": 0, **answer(request)}).encode()[:-20], "it ended within a line"),
    "another prompt": (lambda request: json.dumps({"place": 7, **answer(request)}).encode() + b"\n", "an answer to prompt 7"),
    "no prompt": (lambda request: json.dumps({"place": [], **answer(request)}).encode() + b"\n", "an answer to prompt []"),
    "an error": (lambda _: b'{"error": "EngineDeadError: gone"}\n', "EngineDeadError: gone"),
}
ONE_PROMPT = {
    "no choices": (lambda _: {"choices": None}, "no list of choices"),
    "a response too few": (lambda request: {"choices": answer(request)["choices"][1:]}, "expected each of 0 to 1 once"),
    "a response twice": (lambda request: {"choices": answer(request)["choices"][:1] * 2}, "expected each of 0 to 1 once"),
    "no finish reason": (spoilt(finish_reason=None), "finish_reason is None"),
    "aborted": (spoilt(finish_reason="abort"), "finish_reason is 'abort'"),
    "no tokens": (spoilt(token_ids=[]), "at least one token"),
    "too many tokens": (spoilt(token_ids=[1] * 5), "asked for at most 4"),
    "a token outside the vocabulary": (spoilt(token_ids=[1, 1, 1, VOCABULARY]), f"token 3 is {VOCABULARY}"),
    "a token that is none": (spoilt(token_ids=[1, 1, None, 1]), "token 2 is None"),
    "no log-probabilities": (spoilt(logprobs=None), "None log-probabilities for 4 tokens"),
    "a log-probability too few": (spoilt(logprobs=[-1.0] * 3), "3 log-probabilities for 4 tokens"),
    "NaN": (spoilt(logprobs=[-1.0, -1.0, float("nan"), -1.0]), "log-probability of token 2 is nan"),
    "minus infinity": (spoilt(logprobs=[-1.0, float("-inf"), -1.0, -1.0]), "log-probability of token 1 is -inf"),
    "no log-probability": (spoilt(logprobs=[None, -1.0, -1.0, -1.0]), "log-probability of token 0 is None"),
    "a positive log-probability": (spoilt(logprobs=[-1.0, -1.0, -1.0, 0.1]), "log-probability of token 3 is 0.1"),
    "no versions": (spoilt(weight_versions=None), "nobody knows whose tokens"),
    "other weights": (spoilt(weight_versions=[{"version": "2", "start": 0, "end": 4}]), "tokens of weights '2', expected '3'"),
    "mixed weights": (
        spoilt(weight_versions=[{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 4}]),
        "tokens of weights '2'",
    ),
    "tokens of no version": (spoilt(weight_versions=[{"version": "3", "start": 0, "end": 3}]), "do not cover 4 tokens"),
}
MALFORMED = WHOLE_ANSWER | ONE_PROMPT


@pytest.mark.parametrize("reply", [pytest.param(reply, id=name) for name, reply in MALFORMED.items()])
def test_a_malformed_reply_is_asked_for_again_and_never_returned(serve, reply):
    malformed, message = reply
    bad, good = Fake(malformed), Fake()
    with RolloutClient([serve(bad), serve(good)], settings()) as client:
        groups = client.generate([[1], [2], [3]], SAMPLING, 3)
    assert [[rollout.last_answer[0] for rollout in group] for group in groups] == [[7, 8], [9, 10], [11, 12]]
    assert bad.requests
    bad.requests.clear()
    address = serve(bad)
    with (
        RolloutClient([address], settings(retries=1)) as client,
        pytest.raises(ServerFailure, match=re.escape(message)) as failed,
    ):
        client.generate([[1]], SAMPLING, 3)
    assert failed.value.url == address.url and "POST" in failed.value.reason
    assert len(bad.requests) == 2


def test_a_server_that_nobody_listens_at_is_left_out(serve):
    good = Fake()
    absent = ServerAddress(f"http://127.0.0.1:{free_port()}", "secret", 1)
    with RolloutClient([absent, serve(good)], settings()) as client:
        assert len(client.generate([[1], [2], [3], [4]], SAMPLING, 3)) == 4
    assert good.batches == [2, 2]
    with RolloutClient([absent], settings()) as client, pytest.raises(ServerFailure, match=f"{absent.url}.*GET {ABOUT}"):
        client.generate([[1]], SAMPLING, 3)


def test_an_answer_that_takes_too_long_is_asked_for_elsewhere(serve):
    async def never(_request: dict) -> dict:
        await asyncio.sleep(600)

    stuck, good = Fake(never), Fake()
    stuck_at = serve(stuck)
    with RolloutClient([stuck_at, serve(good)], settings(request_timeout=1.5)) as client:
        assert len(client.generate([[1], [2], [3]], SAMPLING, 3)) == 3
    assert stuck.requests and good.batches == [1, 2]
    assert stuck.batches == [2]


def test_a_server_that_hangs_is_not_asked_twice(serve):
    """Where there is no other it has to be started again, and each asking would take a whole time-out."""

    async def never(_request: dict) -> dict:
        await asyncio.sleep(600)

    stuck = Fake(never)
    client = RolloutClient([serve(stuck)], settings(request_timeout=0.3, retries=5))
    with client, pytest.raises(ServerFailure, match=r"no answer within 0\.3 s"):
        client.generate([[1]], SAMPLING, 3)
    assert stuck.batches == [1]


def test_a_restart_is_progress(serve, monkeypatch):
    """Each part of it may take a time-out of its own; the watchdog hears of each."""
    marks, asked = [], []
    stuck = Fake(lambda _: web.Response(status=503))

    def restart(_run_dir, address, why, remote):
        asked.append((address.url, remote))
        stuck.reply = answer

    monkeypatch.setattr(fleet, "ask_restart", restart)
    address = serve(stuck)
    made = fleet.Fleet(None, settings(retries=0), None)
    client = fleet.FleetClient(made, repair=lambda version: marks.append(f"push {version}"))
    connection = SimpleNamespace(sender=SimpleNamespace(at=marks.append), close=lambda: None)
    made._addresses, made._connection = [address], connection
    made._client = RolloutClient([address], settings(retries=0))
    with made:
        assert len(client.generate([[1]], SAMPLING, 3)) == 1
    assert asked == [(address.url, False)]
    assert marks == ["having servers started again", "push 3", "generation"]


def test_what_fails_beside_training_waits_for_the_next_weights(serve, monkeypatch):
    """In a thread nobody can give a server weights: it is started again, and the caller asks anew after the next push."""
    asked, marks = [], []
    fake = Fake(lambda _: web.Response(status=503))
    monkeypatch.setattr(fleet, "ask_restart", lambda _run_dir, address, why, remote: asked.append(address.url))
    address = serve(fake)
    made = fleet.Fleet(None, settings(retries=0, restarts=1), None)
    client = fleet.FleetClient(made, repair=lambda version: pytest.fail("a collective in a thread"))
    connection = SimpleNamespace(sender=SimpleNamespace(at=marks.append), close=lambda: None)
    made._addresses, made._connection, made._client = [address], connection, RolloutClient([address], settings(retries=0))

    def attempt() -> list:
        return in_daemon_thread(lambda: client.attempt([[1]], SAMPLING, 3)).result(120)

    with made:
        for _ in range(2):  # an answer between two failures is a new beginning
            fake.reply = lambda _: web.Response(status=503)
            with pytest.raises(ServerFailure) as lost:
                attempt()
            client.failed(lost.value)
            fake.reply = answer
            assert len(attempt()) == 1
        client.failed(lost.value)
        with pytest.raises(fleet.CutOff, match=r"status 503.*it failed 2 times"):
            client.failed(lost.value)
    assert asked == [address.url] * 3 and marks == ["having servers started again"] * 3


def test_a_client_that_is_closed_ends_what_another_thread_asks(serve):
    reached = threading.Event()

    async def never(_request: dict) -> dict:
        reached.set()
        await asyncio.sleep(600)
        return {}

    client = RolloutClient([serve(Fake(never))], settings())
    asking = in_daemon_thread(lambda: client.generate([[1]], SAMPLING, 3))
    assert reached.wait(120)
    client.close()
    assert asking.exception(120) is not None


def test_an_error_status_says_what_the_server_said(serve):
    fake = Fake(lambda _: web.Response(status=503, text="the weights of this server are being updated"))
    client = RolloutClient([serve(fake)], settings(retries=2))
    with client, pytest.raises(ServerFailure, match="status 503: the weights of this server are being updated"):
        client.generate([[1]], SAMPLING, 3)
    assert len(fake.requests) == 3


def test_a_connection_that_breaks_is_asked_again(serve):
    broken = []

    def reply(request: dict):
        if not broken:
            broken.append(request)
            raise ConnectionResetError  # the server's handler dies, and the connection with it
        return answer(request)

    fake = Fake(reply)
    with RolloutClient([serve(fake)], settings()) as client:
        assert len(client.generate([[1], [2]], SAMPLING, 3)) == 2
    assert broken and fake.batches == [2, 2]


def test_servers_of_different_models_are_refused(serve):
    addresses = [serve(Fake()), serve(Fake(vocabulary=50))]
    with RolloutClient(addresses, settings()) as client, pytest.raises(UserError, match=r"vocabularies of \[50, 100\]"):
        client.generate([[1]], SAMPLING, 3)


def test_only_the_prompts_that_went_wrong_are_asked_again(serve):
    broken = []

    def reply(request: dict) -> dict:
        if request["token_ids"] == [2] and not broken:
            broken.append(request)
            return spoilt(finish_reason="abort")(request)
        return answer(request)

    fake, done = Fake(reply), []
    with RolloutClient([serve(fake)], settings()) as client:
        client.generate([[1], [2], [3]], SAMPLING, 3, done=lambda at, _: done.append(at))
    assert fake.batches == [3, 1] and fake.requests[3]["token_ids"] == [2] and sorted(done) == [0, 1, 2]


def test_what_is_under_way_is_dropped_when_the_caller_gives_up(serve):
    async def slow_but_the_last(request: dict) -> dict:
        if request["token_ids"] != [3]:
            await asyncio.sleep(600)
        return answer(request)

    fake = Fake(slow_but_the_last)

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    with RolloutClient([serve(fake)], settings()) as client:
        with pytest.raises(KeyboardInterrupt):
            client.generate([[1], [2], [3]], SAMPLING, 3, done=give_up)
        fake.reply = answer
        assert len(client.generate([[4]], SAMPLING, 3)) == 1, "it goes on afterwards"
        until = time.monotonic() + 120
        while not fake.dropped and time.monotonic() < until:  # the server notices in its own time
            time.sleep(0.01)
    assert fake.dropped == 1


def test_a_key_is_not_shown():
    assert "secret" not in repr(ServerAddress("http://127.0.0.1:1", "secret", 1))
