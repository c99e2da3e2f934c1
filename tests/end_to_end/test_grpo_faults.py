"""`tulu-mega grpo` in trouble: whatever dies or hangs, at whichever moment, the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.lib.grpo_runs import LIMIT, STEPS, after, check_same, ended, lines, processes_of, start
from tests.lib.server_processes import left_over, mapped
from tulu_mega.errors import Stopped
from tulu_mega.train import checkpoint
from tulu_mega.vllm_plugin.auth import KEY

pytestmark = [pytest.mark.servers, pytest.mark.acceptance, pytest.mark.timeout(600)]

HOOK = """
import importlib.abc, importlib.machinery, os, signal, sys, time

FAULT, FLAG = os.environ.get("FAULT", ""), os.environ.get("FAULT_FLAG", "")
MODULE = {
    "rank 0 dies in an update": "tulu_mega.bridge.stream",
    "rank 1 dies in an update": "tulu_mega.bridge.stream",
    "rank 0 dies while servers generate": "tulu_mega.inference.client",
    "asked to end while servers generate": "tulu_mega.inference.client", "asked to end in training": "tulu_mega.train.engine",
    "server hangs in an update": "tulu_mega.vllm_plugin.worker", "server dies in an update": "tulu_mega.vllm_plugin.worker",
    "server hangs while it generates": "tulu_mega.vllm_plugin.worker",
}.get(FAULT)


def strike(action):
    "Once in a run, whoever comes first."
    try:
        os.close(os.open(FLAG, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    action()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def ask():
    os.kill(os.getppid(), signal.SIGTERM)  # the launcher
    time.sleep(1)  # it has come here before this goes on


def arm(module):
    if MODULE == "tulu_mega.bridge.stream":
        fill = module.LiveWeights.fill
        calls = {"n": 0}
        def broken(self, *arguments):
            calls["n"] += 1
            if os.environ.get("RANK") == FAULT.split()[1] and calls["n"] == len(self.held_names()) * 2 + 3:  # the third update
                strike(die)
            return fill(self, *arguments)
        module.LiveWeights.fill = broken
    elif MODULE == "tulu_mega.inference.client":
        batch = module.RolloutClient._batch
        async def broken(self, server, tasks, version, arrived):
            def got(answer):
                arrived(answer)
                if version == 2 and len(tasks) == 4:
                    strike(die if "dies" in FAULT else ask)
            return await batch(self, server, tasks, version, got)
        module.RolloutClient._batch = broken
    elif MODULE == "tulu_mega.train.engine":
        computes = module.Engine.forward_backward
        calls = {"n": 0}
        def broken(self, *arguments):
            calls["n"] += os.environ.get("RANK") == "0"
            if calls["n"] == 3:
                strike(ask)
            return computes(self, *arguments)
        module.Engine.forward_backward = broken
    elif "generates" in FAULT:
        look = module.LiveWeightsEngine._refuse_when_broken  # before each forward pass
        def broken(self, *arguments):
            look(self, *arguments)
            if self._committed and self._ledger.version == 2:
                strike(lambda: time.sleep(3600))
        module.LiveWeightsEngine._refuse_when_broken = broken
    else:
        bucket = module.LiveWeightsEngine._bucket
        def broken(self, version, *arguments):
            bucket(self, version, *arguments)
            if version == 2:
                strike(die if "dies" in FAULT else lambda: time.sleep(3600))
        module.LiveWeightsEngine._bucket = broken


class Armed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), arm(module))
        return spec


if MODULE:
    sys.meta_path.insert(0, Armed())
"""
"""In every process of a run, as `sitecustomize`: has one thing go wrong once."""

UPDATE_TIMEOUT = 20
"""Seconds."""
TIMEOUTS = ("--rollout.update_timeout", str(UPDATE_TIMEOUT), "--rollout.request_timeout", "30")


@pytest.fixture
def armed(place, tmp_path, monkeypatch):
    """Has a run started afterwards meet a fault; gives the file that is there once it has."""

    def arm(fault: str):
        (place / "sitecustomize.py").write_text(HOOK)
        flag = tmp_path / "struck"
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("FAULT_FLAG", str(flag))
        return flag

    yield arm
    (place / "sitecustomize.py").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("rank 0 dies in an update", "the ranks are started again"),
        ("rank 1 dies in an update", "the ranks are started again"),
        ("rank 0 dies while servers generate", "the ranks are started again"),
        ("server dies in an update", "it is started again"),
        ("server hangs in an update", "it is started again"),
        ("server hangs while it generates", "no answer within 30 s; it is started again"),
    ],
)
def test_one_fault_changes_nothing(undisturbed, place, armed, fault, told):
    flag, name = armed(fault), fault.replace(" ", "_")
    began = time.monotonic()
    ended(start(place, name, "--restarts", "1", *TIMEOUTS), place, name)
    print(json.dumps({"fault": fault, "seconds": round(time.monotonic() - began)}))
    assert flag.exists()
    assert told in (place / f"{name}.log").read_text()
    check_same(place / name, undisturbed)
    assert not processes_of(place / name)


def test_a_server_that_dies_gets_the_adapter_again_before_it_serves(place, armed):
    """A server starts with the model's own weights, and holds no adapter."""
    lora, told = ("--lora.rank", "4", "--optim.lr", "1e-2"), "servers hold the adapters apart"
    ended(start(place, "adapters", *lora), place, "adapters")
    flag = armed("server dies in an update")
    ended(start(place, "adapters_again", *lora, *TIMEOUTS), place, "adapters_again")
    log = (place / "adapters_again.log").read_text()
    assert flag.exists() and "it is started again" in log and told in log
    check_same(place / "adapters_again", place / "adapters")


@pytest.mark.parametrize("fault", ["server dies in an update", "server hangs in an update", "server hangs while it generates"])
def test_one_fault_of_a_server_elsewhere_changes_nothing(undisturbed, place, armed, monkeypatch, fault):
    """Nobody but its own `tulu-mega serve` can start it again, and nobody but the trainer sees that it hangs."""
    flag, name = armed(fault), f"elsewhere_{fault.replace(' ', '_')}"
    monkeypatch.setenv(KEY, "the key")
    servers = place / f"{name}_servers"
    command = [sys.executable, "-m", "tulu_mega", "serve", "--model", str(place / "model"), "--model.dtype", "fp32"]
    told = place / f"{name}_serve.log"
    with told.open("w") as errors:
        serving = subprocess.Popen(
            [*command, "--run_dir", str(servers)],
            env={**os.environ, "PYTHONPATH": str(place)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        urls = serving.stdout.readline().removeprefix("rollout.urls = ").strip()
        ended(start(place, name, "--rollout.urls", urls, *TIMEOUTS), place, name)
    finally:
        serving.terminate()
        serving.wait(60)
    assert flag.exists() and "it is started again" in (place / f"{name}.log").read_text()
    assert "; it is started again (1 of 3 times)" in told.read_text()
    assert "dies" in fault or "ended as a trainer asked it to" in told.read_text()  # a dead one does not hear
    check_same(place / name, undisturbed)
    assert not processes_of(place / name) and not processes_of(servers)


def test_a_run_that_loses_its_servers_for_good_saves_what_it_has_and_goes_on(undisturbed, place, monkeypatch):
    """Checkpoints are due at the end alone; the servers' owner ends them in the middle."""
    monkeypatch.setenv(KEY, "the key")
    flags = ("--checkpoint.every", "100", "--rollout.start_timeout", "60", "--rollout.restarts", "1")

    def serving(name: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "tulu_mega", "serve", "--model", str(place / "model"), "--model.dtype", "fp32"]
        made = subprocess.Popen([*command, "--run_dir", str(place / name)], stdout=subprocess.PIPE, text=True)
        return made, made.stdout.readline().removeprefix("rollout.urls = ").strip()

    run = place / "cut_off"
    servers, urls = serving("cut_off_servers")
    try:
        process = start(place, "cut_off", "--rollout.urls", urls, *flags, "--rollout.start_timeout", "5")
        after(process, run, 2)
        servers.terminate()
        status = process.wait(LIMIT)
    finally:
        servers.terminate()
        process.kill()
    told = (place / "cut_off.log").read_text()
    done = len(lines(run / "metrics.jsonl"))
    assert status == 2 and f"step {done} is saved: the same command goes on from there" in told, told[-4000:]
    assert "waiting for vLLM servers" in told or "does not answer" in told
    assert [found.step for found in checkpoint.find(run / "checkpoints")] == [done] and done < STEPS
    servers, urls = serving("cut_off_servers_again")
    try:
        ended(start(place, "cut_off", "--rollout.urls", urls, *flags), place, "cut_off")
    finally:
        servers.terminate()
        servers.wait(60)
    check_same(run, undisturbed)


@pytest.mark.parametrize("moment", ["asked to end while servers generate", "asked to end in training"])
def test_a_run_that_is_asked_to_end_saves_its_step_and_goes_on(undisturbed, place, armed, moment):
    """The launcher gets SIGTERM in the third step."""
    flag, name, segments = armed(moment), moment.replace(" ", "_"), set(os.listdir("/dev/shm"))
    run, process = place / name, start(place, name)
    try:
        after(process, run, 1)
        processes = psutil.Process(process.pid).children(recursive=True)
        shared = mapped(processes)
        status = process.wait(LIMIT)
    finally:
        process.kill()
    told = (place / f"{name}.log").read_text()
    assert status == Stopped.status == 143 and flag.exists(), told[-4000:]
    assert len(lines(run / "metrics.jsonl")) == 3 and str(Stopped(3)) in told
    assert [found.step for found in checkpoint.find(run / "checkpoints")] == [1, 2, 3]
    assert len(list((run / "checkpoints").iterdir())) == 3 and not (run / "hf").exists()
    assert len(processes) >= 5 and not any(each.is_running() for each in processes)  # ranks, keeper, vLLM, its engine, verifier
    assert not processes_of(run)
    assert not shared & set(os.listdir("/dev/shm")) and not left_over(segments, processes)
    ended(start(place, name), place, name)
    check_same(run, undisturbed)


def test_a_server_that_is_stopped_is_replaced(undisturbed, place):
    process = start(place, "stopped", "--rollout.request_timeout", "20", "--rollout.update_timeout", str(UPDATE_TIMEOUT))
    try:
        after(process, place / "stopped", 2)
        keeper = psutil.Process(json.loads((place / "stopped/servers/server_0.json").read_text())["pid"])
        for each in keeper.children(recursive=True):
            each.suspend()
    finally:
        ended(process, place, "stopped")
    assert "started again" in (place / "stopped.log").read_text()
    check_same(place / "stopped", undisturbed)
    assert not processes_of(place / "stopped")


def test_a_run_whose_launcher_is_killed_goes_on(undisturbed, place):
    process = start(place, "killed")
    after(process, place / "killed", 2)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while processes_of(place / "killed"):
        assert time.monotonic() < until, "a process outlived the launcher"
        time.sleep(0.2)
    ended(start(place, "killed"), place, "killed")
    check_same(place / "killed", undisturbed)


def test_a_run_that_has_ended_is_made_longer(undisturbed, place):
    """And keeps the responses of some steps only: every third one, and each last one."""
    for steps in (2, STEPS):
        ended(start(place, "longer", "--train.steps", str(steps), "--train.rollouts_every", "3"), place, "longer")
    kept = sorted(file.name for file in (place / "longer/rollouts").glob("step_*"))
    assert kept == ["step_000002.jsonl", "step_000003.jsonl", "step_000004.jsonl"]
    check_same(place / "longer", undisturbed, responses=(2, 3, 4))


def test_a_verifier_that_loops_spoils_its_own_responses_alone(place):
    """What it never judged is in no group, counted, and nothing waits longer than its time-out."""
    (place / "looping_verifier.py").write_text(
        "from own_verifier import judge as vowels\n"
        "def judge(response, ground_truth, messages=None):\n"
        "    while len(response) % 5 == 0:\n"
        "        pass\n"
        "    return vowels(response, ground_truth)\n"
    )
    ended(
        start(place, "looping", "--rewards.custom", '{"vowels" = "looping_verifier:judge"}', "--rewards.timeout", "0.5"),
        place,
        "looping",
    )
    steps = lines(place / "looping/metrics.jsonl")
    told = [one for step in steps for one in lines(place / f"looping/rollouts/step_{step['step']:06}.jsonl")]
    looped = [one for one in told if len(one["response"]) % 5 == 0]
    assert looped and len(looped) < len(told)
    for one in told:
        if one in looped:
            assert one["reward"] is None and not one["trained"] and "no verdict within 0.5 s" in one["error"]
        else:
            assert one["reward"] is not None
    assert sum(step["verifier_failures"] for step in steps) == len(looped)
    for place_of in {(one["version"], one["place"]) for one in told}:
        advantages = [one["advantage"] for one in told if (one["version"], one["place"]) == place_of and one["trained"]]
        assert sum(advantages) == pytest.approx(0, abs=1e-5)
