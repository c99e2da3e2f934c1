"""`tulu-mega serve`: who may reach it, and how trainers attach to it and have its servers started again."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import pytest

from tests.lib.other_python import other_python
from tests.lib.server_processes import (
    START_SECONDS,
    gone,
    label,
    rollout_settings,
    session_of,
)
from tulu_mega.config import ServeSettings
from tulu_mega.errors import UserError
from tulu_mega.inference.addresses import ask_restart, attached
from tulu_mega.inference.client import RolloutClient
from tulu_mega.inference.sampling import Sampling
from tulu_mega.inference.serve import serve
from tulu_mega.vllm_plugin.auth import KEY

pytest.importorskip("vllm")
pytestmark = [pytest.mark.servers, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")]

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [300], [17, 18, 19, 20]]
SAMPLING = Sampling(max_tokens=12, temperature=0.7, samples=3, seed=4)
VERSION = 3


def test_an_address_that_others_reach_needs_a_key(model, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    for host in ("0.0.0.0", "10.1.2.3", "::", "node7"):
        with pytest.raises(UserError, match=f"set a key in {KEY}"):
            serve(ServeSettings.model_validate({"model": str(model), "host": host}))


def test_a_port_that_is_taken_is_told_before_anything_starts(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: cannot listen there"):
            serve(ServeSettings.model_validate({"model": str(model), "port": port, "run_dir": str(tmp_path)}))
    assert not (tmp_path / "logs").exists()


@pytest.mark.acceptance
def test_serve_is_attached_by_its_urls_and_ends_in_order(model, tmp_path, monkeypatch):
    command = [
        sys.executable,
        "-m",
        "tulu_mega",
        "serve",
        "--model",
        str(model),
        "--model.dtype",
        "fp32",
        "--run_dir",
        str(tmp_path / "s"),
        "--rollout.python",
        str(other_python(tmp_path / "other")),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        urls = json.loads(line.removeprefix("rollout.urls = "))
        key_file = tmp_path / "s/key"
        assert key_file.stat().st_mode & 0o777 == 0o600
        monkeypatch.setenv(KEY, key_file.read_text())
        asked = rollout_settings(urls=urls, start_timeout=START_SECONDS)
        (address,) = attached(asked, tmp_path / "run")
        label(address, VERSION)
        with RolloutClient([address], asked) as client:
            assert len(client.generate(PROMPTS, SAMPLING, VERSION)) == len(PROMPTS)
        processes = session_of(tmp_path / "s", 0)
        ask_restart(tmp_path / "run", address, "gone wrong", remote=True)
        (again,) = attached(rollout_settings(urls=urls, start_timeout=START_SECONDS), tmp_path / "run")
        assert again.url == address.url and again.incarnation > address.incarnation
        assert "asks for this server to be started again: 'gone wrong'" in (tmp_path / "s/logs/server_0.log").read_text()
        processes += session_of(tmp_path / "s", 0)
        monkeypatch.setenv(KEY, "wrong")
        with pytest.raises(UserError, match="refuses the key"):
            attached(asked, tmp_path / "run")
    finally:
        process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert gone(processes)


def test_urls_where_nobody_answers_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "k")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{url} does not answer"):
            attached(rollout_settings(urls=[url], start_timeout=0.2), tmp_path)
