"""Servers and their client with real vLLM processes: who may ask, what they answer, and that nothing outlives its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import psutil
import pytest

from tests.lib.hostile_requests import HOSTILE
from tests.lib.other_python import other_python
from tests.lib.server_processes import (
    START_SECONDS,
    gone,
    label,
    left_over,
    mapped,
    members,
    rollout_settings,
    session_of,
    transformers_logp,
    until,
    with_key,
)
from tulu_mega import __version__
from tulu_mega.errors import UserError
from tulu_mega.inference.addresses import ask_restart, attached, read_record
from tulu_mega.inference.client import RolloutClient
from tulu_mega.inference.command_line import ServerOptions
from tulu_mega.inference.pool import ServerPool
from tulu_mega.inference.sampling import Sampling
from tulu_mega.vllm_plugin.auth import ABOUT, KEY
from tulu_mega.vllm_plugin.batch_route import ROUTE
from tulu_mega.weight_transfer.server import ServerAddress, ServerFailure

pytest.importorskip("vllm")
pytestmark = [pytest.mark.servers, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")]

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [300], [17, 18, 19, 20]]
SAMPLING = Sampling(max_tokens=12, temperature=0.7, samples=3, seed=4)
VERSION = 3
LONG = 120.0
"""Seconds that a server may take to answer on a busy machine."""


@pytest.fixture(scope="module")
def options(model, tmp_path_factory) -> ServerOptions:
    return ServerOptions(str(model), max_model_len=512, python=str(other_python(tmp_path_factory.mktemp("other"))))


@pytest.fixture(scope="module")
def segments() -> set[str]:
    """Shared memory that was there before."""
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def pool(options, run_dir, segments):
    with ServerPool(options, run_dir, 2, start_timeout=START_SECONDS, restarts=5, cores=[[[0]], [[0]]]) as started:
        started.wait()
        yield started


@pytest.fixture
def servers(pool) -> list[ServerAddress]:
    """Two servers whose weights are of VERSION."""
    addresses = pool.wait()
    for address in addresses:
        label(address, VERSION)
    return addresses


# -- who may ask ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "Bearer wrong", "wrong", "Basic KEY", "Bearer KEY "])
@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("GET", "/health"),
        ("GET", ABOUT),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/inference/v1/generate"),
        ("POST", ROUTE),
        ("POST", "/collective_rpc"),
        ("POST", "/update_weights"),
        ("POST", "/pause"),
        ("POST", "/abort_requests"),
        ("GET", "/server_info"),
        ("GET", "/metrics"),
        ("GET", "/no/such/route"),
        ("OPTIONS", "/collective_rpc"),
    ],
)
def test_no_route_answers_without_the_key(servers, verb, path, key):
    headers = {} if key is None else {"Authorization": key.replace("KEY", servers[0].key)}
    if key == "Bearer KEY ":
        headers = {"Authorization": f"Bearer {servers[0].key}x"}
    content = {} if verb == "POST" else None
    assert httpx.request(verb, servers[0].url + path, headers=headers, json=content, timeout=LONG).status_code == 401


def test_the_key_opens_and_stands_nowhere(servers, pool, run_dir):
    assert httpx.get(f"{servers[0].url}/health", headers=with_key(servers[0]), timeout=LONG).status_code == 200
    about = httpx.get(servers[0].url + ABOUT, headers=with_key(servers[0]), timeout=LONG).json()
    told = {"incarnation": servers[0].incarnation, "longest": 512, "vocabulary": 424}
    assert {name: about[name] for name in told} == told and about["process"]
    assert about["model"]["dtype"] == "float32" and about["model"]["config"]["vocab_size"] == 424
    assert about["versions"]["tulu_mega"] == __version__
    for file in run_dir.rglob("*"):
        assert not file.is_file() or pool.key not in file.read_text(errors="replace"), file
    for process in session_of(run_dir, 0):
        assert pool.key not in " ".join(process.cmdline())


def test_their_python_is_the_other_environment_s_and_their_keeper_s_is_not(servers, options, run_dir):
    keeper, server, *_ = session_of(run_dir, 0)
    assert keeper.cmdline()[0] == sys.executable != options.python == server.cmdline()[0]
    assert server.environ()["PATH"].split(os.pathsep)[0] == os.path.dirname(options.python)


def test_they_listen_on_loopback_alone(servers, run_dir):
    listening = [each for process in session_of(run_dir, 0) for each in process.net_connections("tcp") if each.status == "LISTEN"]
    assert listening and {each.laddr.ip for each in listening} == {"127.0.0.1"}


# -- what they answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_log_probabilities_are_of_the_distribution_that_was_sampled_from(servers, model, temperature, top_p):
    sampling = Sampling(max_tokens=12, temperature=temperature, top_p=top_p, samples=2, seed=1)
    with RolloutClient(servers, rollout_settings()) as client:
        groups = client.generate(PROMPTS, sampling, VERSION)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for rollout in group:
            expected = transformers_logp(model, prompt, rollout.last_answer, temperature, top_p)
            assert rollout.sampler_logp == pytest.approx(expected, abs=1e-4)


def test_greedy_responses_are_those_of_transformers_and_end_at_a_stop_token(servers, model):
    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model)
    with RolloutClient(servers, rollout_settings()) as client:
        groups = client.generate(PROMPTS, Sampling(max_tokens=8), VERSION)
        for prompt, (rollout,) in zip(PROMPTS, groups, strict=True):
            ids = list(prompt)
            with torch.no_grad():
                for _ in range(8):
                    ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
            assert rollout.last_answer == ids[len(prompt) :] and rollout.finish_reason == "length"
        stop = groups[0][0].last_answer[3]
        ((stopped,),) = client.generate(PROMPTS[:1], Sampling(max_tokens=8, stop_ids=(stop,)), VERSION)
    first = groups[0][0].last_answer.index(stop)
    assert stopped.last_answer == groups[0][0].last_answer[: first + 1] and stopped.finish_reason == "stop"


def test_the_same_seed_gives_the_same_responses_from_one_server_and_from_two(servers):
    prompts, numbers = PROMPTS * 3, list(range(100, 100 + 3 * len(PROMPTS)))
    with RolloutClient(servers[:1], rollout_settings()) as client:
        expected = client.generate(prompts, SAMPLING, VERSION, numbers)
    with RolloutClient(servers, rollout_settings()) as client:
        backwards = client.generate(prompts[::-1], SAMPLING, VERSION, numbers[::-1])[::-1]
        others = client.generate(prompts, SAMPLING, VERSION)
        again = client.generate(prompts[::-1], SAMPLING, VERSION, numbers[::-1])[::-1]
    assert again == backwards, "to the last bit"
    tokens = [[rollout.last_answer for rollout in group] for group in expected]
    assert [[rollout.last_answer for rollout in group] for group in backwards] == tokens
    for group, same in zip(expected, backwards, strict=True):
        for one, other in zip(group, same, strict=True):
            assert one.sampler_logp == pytest.approx(other.sampler_logp, abs=1e-5)
    assert [[rollout.last_answer for rollout in group] for group in others] != tokens, "their numbers matter"
    assert len({tuple(ids) for group in tokens for ids in group}) > len(prompts)


def test_what_is_compiled_to_sample_is_not_compiled_by_each_server(servers, run_dir):
    with RolloutClient(servers[:1], rollout_settings()) as client:
        client.generate(PROMPTS, SAMPLING, VERSION)
    scratch = session_of(run_dir, 0)[1].environ()["TMPDIR"]
    assert not [file for file in Path(scratch).rglob("*") if file.is_file() and file.stat().st_size > 2**20]


def test_many_seeded_samples_of_long_prompts(servers):
    """More prompt tokens than a forward pass takes: computed in parts, seeded requests end vLLM on a CPU."""
    prompts = [[3 + (number * token) % 400 for token in range(1, 301)] for number in range(1, 11)]
    with RolloutClient(servers[:1], rollout_settings()) as client:
        groups = client.generate(prompts, Sampling(max_tokens=2, temperature=1.0, samples=8), VERSION)
    assert [len(group) for group in groups] == [8] * 10


def test_responses_of_other_weights_are_not_returned(servers):
    label(servers[0], VERSION + 1)
    with RolloutClient(servers, rollout_settings()) as client:
        groups = client.generate(PROMPTS, SAMPLING, VERSION)
        assert {version for group in groups for rollout in group for version in rollout.versions} == {VERSION}
    with (
        RolloutClient(servers[:1], rollout_settings()) as client,
        pytest.raises(ServerFailure, match="tokens of weights '4', expected '3'"),
    ):
        client.generate(PROMPTS, SAMPLING, VERSION)


def test_what_is_cancelled_ends_at_the_server_too(servers):
    class GaveUp(Exception):
        pass

    def give_up(*_: object) -> None:
        raise GaveUp

    prompts = [[5] * 508, *([[6, 7]] * 8)]  # the first has room for four tokens
    with RolloutClient(servers[:1], rollout_settings()) as client, pytest.raises(GaveUp):
        client.generate(
            prompts,
            Sampling(max_tokens=400, temperature=1.0, samples=2),
            VERSION,
            done=give_up,
        )

    def idle() -> bool:
        answer = httpx.post(f"{servers[0].url}/abort_requests", json={}, headers=with_key(servers[0]), timeout=LONG)
        return answer.json()["aborted"] == 0

    assert until(idle, LONG)


def honest(servers) -> list[list[list[int]]]:
    with RolloutClient(servers[:1], rollout_settings()) as client:
        groups = client.generate(PROMPTS, SAMPLING, VERSION)
    return [[rollout.last_answer for rollout in group] for group in groups]


def test_whoever_has_the_key_cannot_end_a_server_or_stop_it_from_serving(servers):
    before = honest(servers)
    for path, asked in HOSTILE:
        content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        answer = httpx.post(servers[0].url + path, content=content, headers=with_key(servers[0]), timeout=LONG)
        assert 400 <= answer.status_code <= 503, (path, asked, answer.text)
    assert honest(servers) == before


# -- faults -----------------------------------------------------------------------------------------------------------------


def test_a_server_killed_during_generation_is_replaced_while_the_other_answers(servers, pool, run_dir, monkeypatch, segments):
    monkeypatch.setenv(KEY, pool.key)
    old = session_of(run_dir, 0)
    shared = mapped(old)
    killed = []

    def kill(*_: object) -> None:
        if not killed:
            killed.append(old[1].pid)
            os.kill(old[1].pid, signal.SIGKILL)  # vLLM itself; its engine and worker are orphans now

    with RolloutClient(servers, rollout_settings()) as client:
        groups = client.generate(PROMPTS * 5, SAMPLING, VERSION, done=kill)
    assert killed and len(groups) == 20 and all(len(group) == 3 for group in groups)
    assert gone(old), "the engine and the worker too"
    now = attached(rollout_settings(), run_dir)
    assert now[1] == servers[1]
    assert now[0].incarnation > servers[0].incarnation and now[0].url != servers[0].url
    assert httpx.get(f"{now[0].url}/health", headers=with_key(now[0]), timeout=LONG).status_code == 200
    assert not shared & set(os.listdir("/dev/shm")) and not left_over(segments, old)


@pytest.mark.acceptance
def test_a_stopped_server_is_ended_and_replaced_when_a_rank_asks(servers, pool, run_dir, monkeypatch):
    monkeypatch.setenv(KEY, pool.key)
    old = session_of(run_dir, 1)
    for process in old[1:]:
        process.suspend()
    with (
        RolloutClient(servers[1:], rollout_settings(request_timeout=1.0, retries=1)) as client,
        pytest.raises(ServerFailure, match="no answer"),
    ):
        client.generate(PROMPTS, SAMPLING, VERSION)
    ask_restart(run_dir, servers[1], "no answer")
    now = attached(rollout_settings(), run_dir)
    assert gone(old)
    assert now[0] == servers[0] and now[1].incarnation > servers[1].incarnation


@pytest.mark.acceptance
def test_a_server_that_cannot_start_says_why_with_the_end_of_its_log(model, tmp_path, monkeypatch):
    options = ServerOptions(str(model), max_model_len=512, extra=("--no-such-argument",))
    with ServerPool(options, tmp_path, start_timeout=START_SECONDS, restarts=3, cores=[[[0]]]) as pool:
        monkeypatch.setenv(KEY, pool.key)
        with pytest.raises(UserError, match="ended with status 2 while it started") as failed:
            attached(rollout_settings(servers=1), tmp_path)
        assert "no-such-argument" in str(failed.value) and str(tmp_path / "logs/server_0.log") in str(failed.value)


def test_ranks_without_servers_are_told_how_to_get_some(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(UserError, match="tulu-mega serve"):
        attached(rollout_settings(), tmp_path)


LAUNCHER = """
    import sys, time
    from pathlib import Path
    from tulu_mega.inference.pool import ServerPool
    from tulu_mega.inference.command_line import ServerOptions
    if __name__ == "__main__":
        with ServerPool(ServerOptions(sys.argv[1], max_model_len=512), Path(sys.argv[2]), cores=[[[0]]]) as pool:
            if sys.argv[3] == "ready":
                pool.wait()
            Path(sys.argv[2], "told").touch()
            time.sleep(600)
"""


@pytest.mark.parametrize("when", ["starting", pytest.param("ready", marks=pytest.mark.acceptance)])
def test_no_process_outlives_a_launcher_that_is_killed(model, tmp_path, when, segments):
    script = tmp_path / "launch.py"
    script.write_text(textwrap.dedent(LAUNCHER))
    launcher = subprocess.Popen([sys.executable, str(script), str(model), str(tmp_path), when])
    try:
        assert until(lambda: (tmp_path / "told").exists())
        assert until(lambda: len(session_of(tmp_path, 0)) >= 2)
        processes = session_of(tmp_path, 0)
        shared = mapped(processes)
    finally:
        launcher.kill()
        launcher.wait()
    assert gone(processes)
    assert not members(processes[0].pid)
    assert not shared & set(os.listdir("/dev/shm")) and not left_over(segments, processes)


@pytest.mark.acceptance
@pytest.mark.parametrize("victim", ["keeper", "engine"])  # the engine is the worker where there is but one
def test_whichever_process_of_a_server_is_killed_all_of_it_is_replaced(servers, pool, run_dir, monkeypatch, victim):
    monkeypatch.setenv(KEY, pool.key)
    old = session_of(run_dir, 0)
    names = {"keeper": old[0], "engine": named(old, "EngineCore")}
    names[victim].kill()
    assert until(lambda: read_record(run_dir / "servers", 0).incarnation > servers[0].incarnation)
    now = attached(rollout_settings(), run_dir)
    assert gone(old)
    assert now[0].incarnation > servers[0].incarnation and now[1] == servers[1]


def named(processes: list[psutil.Process], part: str) -> psutil.Process:
    return next(process for process in processes if part in " ".join(process.cmdline()))


@pytest.mark.acceptance
def test_a_server_killed_while_it_starts_is_started_again(options, tmp_path):
    with ServerPool(options, tmp_path, start_timeout=START_SECONDS, restarts=1, cores=[[[0]]]) as pool:
        assert until(lambda: len(session_of(tmp_path, 0)) >= 2)
        session_of(tmp_path, 0)[1].kill()
        (address,) = pool.wait()
        assert httpx.get(f"{address.url}/health", headers=with_key(address), timeout=LONG).status_code == 200
        session_of(tmp_path, 0)[1].kill()
        assert until(lambda: read_record(tmp_path / "servers", 0).state == "failed")
        with pytest.raises(UserError, match=r"ended with status 137 after 1 restart"):
            pool.wait()


@pytest.mark.acceptance
def test_a_server_that_hangs_is_found_without_being_asked(options, tmp_path):
    with ServerPool(options, tmp_path, start_timeout=START_SECONDS, restarts=1, cores=[[[0]]]) as pool:
        (address,) = pool.wait()
        old = session_of(tmp_path, 0)
        old[1].suspend()
        assert until(lambda: read_record(tmp_path / "servers", 0).incarnation > address.incarnation)
        assert gone(old) and pool.wait()[0].incarnation > address.incarnation


# -- servers for other nodes ------------------------------------------------------------------------------------------------
