"""Updates that go wrong: each is refused with a name and not served, and a whole one heals the server."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
import torch

from tests.lib import world
from tests.weight_transfer.live import jobs
from tests.weight_transfer.live.senders import Senders, announce, send_half
from tests.weight_transfer.live.servers import is_paused
from tulu_mega.weight_transfer.control import ServerControl
from tulu_mega.weight_transfer.protocol import Expected
from tulu_mega.weight_transfer.server import ServerAddress, ServerFailure

pytestmark = [pytest.mark.alone, pytest.mark.servers]

pytest.importorskip("vllm")

EMBED = "model.embed_tokens.weight"
LAST = "model.layers.3.mlp.down_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
STRANGER = "model.layers.9.stranger.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"
BODY = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2, "temperature": 0.0}}


@pytest.fixture(scope="module")
def broken(models, servers) -> Iterator[tuple[ServerAddress, str]]:
    """A server with two workers, and the model it is to get."""
    first, other = models("Llama")
    yield servers.get(first, 2), other


def refuses(server: ServerAddress, told: str) -> None:
    """The server neither finishes the update nor serves, and says why; nobody can make it."""
    control = ServerControl(server.url, server.key, 60)
    for action in (lambda: control.finish_weight_update("77"), control.resume):
        with pytest.raises(ServerFailure, match="status 409") as failure:
            action()
        assert told in str(failure.value)
        assert server.url in str(failure.value)
    assert is_paused(control)
    assert control.weight_info()["weight_version"] != "77"
    control.close()
    answer = httpx.post(
        f"{server.url}/inference/v1/generate", json=BODY, headers={"Authorization": f"Bearer {server.key}"}, timeout=120
    )
    assert answer.status_code == 503


def heals(server: ServerAddress, model: str, version: int) -> None:
    """A whole update makes it serve again, with the right weights."""
    senders = Senders(server, model)
    senders.begin(version)
    for rank in (3, 0):
        senders.send(version, rank)
    senders.commit(version)
    assert senders.problems() == []
    control = senders.control
    control.finish_weight_update(str(version))
    control.reset_prefix_cache()
    control.resume()
    assert control.weight_info()["weight_version"] == str(version)
    assert control.arrived_checksums() == [jobs.file_checksums(model)] * 2
    assert all(worker["whole"] for worker in control.weights_status())
    senders.close()
    answer = httpx.post(
        f"{server.url}/inference/v1/generate", json=BODY, headers={"Authorization": f"Bearer {server.key}"}, timeout=120
    )
    assert answer.status_code == 200, answer.text


def left_out(senders: Senders) -> None:
    senders.send(1, 0)
    senders.send(1, 3, [name for name, each in senders.manifest.items() if each.sender == 3 and name != LAST])
    senders.commit(1)


def sent_twice(senders: Senders) -> None:
    senders.send(1, 0)
    senders.send(1, 0, [EMBED])
    senders.send(1, 3)
    senders.commit(1)


def flipped(senders: Senders) -> None:
    senders.send(1, 0)
    senders.send(1, 3, flip=LAST)
    senders.commit(1)


def one_sender_silent(senders: Senders) -> None:
    senders.send(1, 0)
    senders.commit(1)


def never_committed(senders: Senders) -> None:
    senders.send(1, 0)
    senders.send(1, 3)


def everything(senders: Senders) -> None:
    never_committed(senders)
    senders.commit(1)


def unknown_to_the_manifest(senders: Senders) -> None:
    senders.tensors[STRANGER] = torch.zeros(3)
    senders.manifest[STRANGER] = Expected((3,), "float32", 0)  # after the begin
    everything(senders)


EXTRA = {"model.layers.0.mlp.stranger_proj.weight": torch.zeros(4, 4)}
BIAS = {"lm_head.bias": torch.zeros(509)}
SHAPE = {LAST: torch.zeros(96, 64)}  # transposed: as many bytes
CASES = {  # what is sent, what is left out of the manifest, what is in it beside, what is told
    "a tensor left out": (left_out, (), {}, f"{LAST} from trainer rank 3 did not come"),
    "a tensor twice": (sent_twice, (), {}, f"{EMBED} from trainer rank 0 came a second time"),
    "a flipped bit": (flipped, (), {}, f"{LAST} from trainer rank 3 arrived with checksum"),
    "a silent sender": (one_sender_silent, (), {}, "from trainer rank 3 did not come"),
    "no commit": (never_committed, (), {}, "has not been committed"),
    "a manifest without a norm": (everything, (NORM,), {}, f"vLLM's parameter {NORM} got nothing"),
    "a manifest without keys": (everything, (KEY,), {}, "vLLM's layer model.layers.1.self_attn.qkv_proj got"),
    "a tensor outside the manifest": (unknown_to_the_manifest, (), {}, f"{STRANGER} from trainer rank 0 is not"),
    "a tensor that vLLM has not": (everything, (), EXTRA, "stranger_proj.weight from trainer rank 3 was refused"),
    "a bias that vLLM ignores": (everything, (), BIAS, "lm_head.bias from trainer rank 3 has no place"),
    "a wrong shape": (everything, (LAST,), SHAPE, f"{LAST} from trainer rank 3 was refused by vLLM"),
}


@pytest.mark.parametrize(("send", "missing", "extra", "told"), CASES.values(), ids=CASES)
def test_a_broken_update_is_refused_by_name_and_not_served(broken, send, missing, extra, told):
    server, model = broken
    senders = Senders(server, model, missing, extra)
    names = {EMBED, LAST} - set(missing)
    for rank, name in ((0, EMBED), (3, LAST)):
        if name in names:
            senders.manifest[name] = Expected(tuple(senders.tensors[name].shape), "float32", rank)
    senders.begin(1)
    send(senders)
    if told != "has not been committed":
        problems = senders.problems()
        assert any(told in problem for problem in problems), problems
        assert {problem.split(":")[0] for problem in problems} == {"worker 0", "worker 1"}
    refuses(server, told)
    senders.close()


def test_a_whole_update_heals(broken):
    server, model = broken
    senders = Senders(server, model)
    senders.begin(1)
    left_out(senders)
    senders.close()
    refuses(server, f"{LAST} from trainer rank 3 did not come")
    heals(server, model, 3)


def test_a_sender_that_dies_half_way_leaves_a_server_that_waits_for_the_next(broken):
    server, model = broken
    ours, theirs = world.CONTEXT.Pipe()
    process = world.process(send_half, server, model, theirs, daemon=True)
    process.start()
    assert ours.poll(120)
    process.kill()
    process.join()
    refuses(server, "update 4 was begun and has not been committed")
    heals(server, model, 5)


def test_workers_that_wait_for_a_sender_that_died_are_freed(broken):
    server, model = broken
    ours, theirs = world.CONTEXT.Pipe()
    process = world.process(announce, server, model, theirs, daemon=True)
    process.start()
    assert ours.poll(120)
    time.sleep(1)
    process.kill()
    process.join()
    heals(server, model, 11)  # its calls wait for the workers; of which each, at most 60 s, for the dead


def test_a_server_that_serves_is_not_updated(broken):
    server, model = broken
    heals(server, model, 6)
    control = ServerControl(server.url, server.key, 60)
    with pytest.raises(ServerFailure, match="not paused"):
        control.start_weight_update()
    assert not is_paused(control)
    control.close()
    heals(server, model, 7)


def test_an_old_endpoint_is_refused_when_attaching(broken):
    """A trainer's memory is gone by the time its workers look for it: told, and no update begins."""
    server, model = broken
    senders = Senders(server, model)
    for box in senders.boxes.values():
        box.close()
    endpoint = {"kind": "shm", "path": "/proc/self/fd/987654", "inode": 1, "capacity": 64}
    senders.control.init_weight_transfer_engine({"endpoints": {"0": endpoint}, "timeout": 5})
    senders.begin(8)
    problems = senders.problems()
    assert len(problems) >= 2
    assert "worker 1: trainer rank 0 cannot be reached" in "\n".join(problems)
    refuses(server, "rollout.transport to gloo")
    senders.control.close()
    heals(server, model, 9)
