"""Servers elsewhere that will never do are told at once, those that may come up are waited for by name."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest

from tests.lib.answering import CONFIG, MODEL, about, answering, ready, speaking
from tests.lib.clocks import SteppingClock
from tests.lib.world import free_port
from tulu_mega.config import RolloutSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.errors import UserError
from tulu_mega.inference import addresses
from tulu_mega.inference.addresses import attached
from tulu_mega.preflight import policy
from tulu_mega.vllm_plugin.auth import KEY
from tulu_mega.weight_transfer.counterpart import ABOUT, Model, shape

SECONDS = 120
"""In which what is wrong is told, on a busy machine too; what may come up is waited for much longer."""


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY, "k")


def settings(*urls: str, **changed) -> RolloutSettings:
    return RolloutSettings(urls=list(urls), start_timeout=600.0, **changed)


def refused(tmp_path, *urls: str) -> str:
    """What is said of servers that are not waited for."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        attached(settings(*urls), tmp_path)
    assert time.monotonic() - began < SECONDS
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_what_will_never_do_ends_at_once(tmp_path):
    with answering(ready()) as url:
        assert "refuses the key" in _with_key("another", lambda: refused(tmp_path, url))
        assert f"{url.replace('http', 'https')}: no TLS connection" in refused(tmp_path, url.replace("http", "https"))
        port = url.rpartition(":")[2]
        assert "lead to one server; name it once" in refused(tmp_path, url, f"http://localhost:{port}")
        assert refused(tmp_path, url, "http://no-such-host.invalid:8000").startswith(
            "http://no-such-host.invalid:8000: there is no"
        )
    with answering({"/health": (200, {})}) as url:
        assert f"{url} answers with status 404, as no server of tulu-mega serve does" in refused(tmp_path, url)
    with answering({ABOUT: (200, {"model": "x"}), "/health": (200, {})}) as url:
        assert "as no server of tulu-mega serve does" in refused(tmp_path, url)
    with speaking(b"220 mail.example ready\r\n\r\n") as url:
        assert f"{url}: the program that listens there does not speak HTTP" in refused(tmp_path, url)


def _with_key(key, work):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, key)
        return work()


def test_whoever_may_come_up_is_waited_for_by_name(tmp_path, monkeypatch, capsys):
    """One does not listen yet, another's engine is not ready, a third answers: as one would say."""
    monkeypatch.setattr(addresses, "WORD_SECONDS", 0.1)
    monkeypatch.setattr(addresses, "time", SteppingClock(0.05))
    absent = f"http://127.0.0.1:{free_port()}"
    loading = {ABOUT: (200, about(process="q")), "/health": (503, {})}
    with answering(loading) as slow, answering(ready()) as there:
        with pytest.raises(UserError, match=r"not ready after 0 s"):
            attached(settings(absent, slow, there).model_copy(update={"start_timeout": 0.5}), tmp_path)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) >= 3 and all("waiting for vLLM servers" in line and there not in line for line in lines)
        assert f"{absent} does not answer ([Errno 111] Connection refused); {slow} answers with status 503" in lines[0]
        loading["/health"] = (200, {})
        assert [each.url for each in attached(settings(slow, there), tmp_path)] == [slow, there]


def test_servers_that_do_not_answer_are_asked_at_once(tmp_path, monkeypatch):
    """Each takes its time-out; one after the other they would take many."""
    monkeypatch.setattr(addresses, "REPLY_SECONDS", 30.0)
    addresses._client.cache_clear()
    asked = []

    def leave_all() -> None:
        """Answers nobody, and hangs up when all have asked."""
        with contextlib.suppress(OSError):
            asked.extend(silent.accept()[0] for _ in range(8))
        for each in asked:
            each.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30.0)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        thread = threading.Thread(target=leave_all)
        thread.start()
        _, missing = addresses.look(settings(*(f"{url}/{number}" for number in range(8))))
        thread.join()
    assert len(missing) == 8 and not any("timed out" in why for why in missing.values())
    addresses._client.cache_clear()


@pytest.mark.parametrize(
    ("urls", "told"),
    [
        (["http://h:8000", "http://H:8000/"], "http://h:8000 and http://H:8000: these URLs are one server"),
        (["http://h", "http://h:80"], "http://h and http://h:80: these URLs are one server"),
        (["http://h:80a"], "http://h:80a: Port could not be cast to integer"),
        (["http://h:99999"], "Port out of range"),
        (["http://:8000"], "expected scheme, host and port"),
        (["h:8000"], "expected URLs such as"),
    ],
)
def test_urls_that_cannot_be(urls, told):
    with pytest.raises(ValueError, match=told.replace(".", r"\.")):
        RolloutSettings(urls=urls)


def test_check_asks_servers_elsewhere(tmp_path):
    """Also whether their model is the trainer's; before a start those that may come up are no problem."""

    class Run:
        model = type("model", (), {"path": "DIR", "dtype": "fp32"})
        longest, lora = 512, None

    notes: list[str] = []

    def problems(url: str, starts: bool = False) -> list[str]:
        Run.rollout = settings(url)
        try:
            policy._answering(Run, CONFIG, starts, notes)
        except UserError as error:
            return error.problems
        return []

    absent = f"http://127.0.0.1:{free_port()}"
    (problem,) = problems(absent)
    assert "does not answer ([Errno 111] Connection refused); start tulu-mega serve there" in problem
    assert problems(absent, starts=True) == []
    with answering(ready()) as url:
        assert problems(url) == [] and notes == []
        Run.longest = 600
        assert problems(url) == []
        assert "takes 512 tokens of prompt and response, and 600 may be asked for" in notes.pop()
        Run.longest, Run.lora = 512, LoraSettings(rank=16)
        assert problems(url) == []
        assert "holds no adapters of rank 16 apart, so that each update sends whole weights" in notes.pop()
        (problem,) = _with_key("another", lambda: problems(url, starts=True))
        assert "refuses the key" in problem
    with answering(ready(model=Model("OTHER", "bfloat16", shape({**CONFIG, "hidden_size": 32})))) as url:
        model, dtype = problems(url, starts=True)
    assert "serves another model, OTHER, than DIR: hidden_size = 32 there, 64 here" in model
    assert "computes in bfloat16, this trainer asks for float32" in dtype
    assert json.dumps(MODEL.config)  # what is told goes over the wire
