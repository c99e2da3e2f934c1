"""A server of another model, type or version is told by name, when a trainer attaches and before it sends anything."""

from __future__ import annotations

import time

import pytest
import torch

from tests.lib import world
from tests.lib.answering import CONFIG, MODEL, about, answering, ready
from tulu_mega.config import RolloutSettings
from tulu_mega.errors import UserError
from tulu_mega.weight_transfer import counterpart, transports
from tulu_mega.weight_transfer.attach import attach
from tulu_mega.weight_transfer.counterpart import Model, differences, shape
from tulu_mega.weight_transfer.sender import Sender
from tulu_mega.weight_transfer.server import ServerAddress

URL = "http://n1:8000"


def test_the_same_on_both_sides():
    assert differences(URL, about(), MODEL) == []
    assert differences(URL, about(), MODEL, transports.named("shm")) == []
    silent = Model("DIR", "float32", shape({**CONFIG, "head_dim": None, "tie_word_embeddings": False}))
    assert differences(URL, about(), silent) == []  # only what both say counts: transformers' versions write defaults or not


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": 425}, "vocab_size = 424 there, 425 here"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures = LlamaForCausalLM there, Qwen2ForCausalLM here"),
        ({"num_hidden_layers": 3, "hidden_size": 1}, "hidden_size = 64 there, 1 here, num_hidden_layers = 2 there, 3 here"),
    ],
)
def test_another_model_is_told_with_what_differs(change, told):
    (problem,) = differences(URL, about(), Model("MINE", "float32", shape({**CONFIG, **change})))
    assert problem == f"{URL}: serves another model, DIR, than MINE: {told}; start it with the trainer's model.path"


def test_positions_are_compared_however_they_are_written():
    old, new = {"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    llama3 = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    assert shape(llama3) == {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    assert differences(URL, about(Model("A", "float32", shape(old))), Model("B", "float32", shape(new))) == []
    (problem,) = differences(URL, about(Model("A", "float32", shape(llama3))), Model("B", "float32", shape(new)))
    assert "rope_theta = 500000.0 there, 10000.0 here" in problem


def test_types_versions_and_programs():
    (problem,) = differences(URL, about(Model("DIR", "bfloat16", MODEL.config)), MODEL)
    assert problem.startswith(f"{URL}: computes in bfloat16, this trainer asks for float32")
    (problem,) = differences(URL, about(program="0123"), MODEL)
    assert "(code 0123), the trainer's is " in problem and "install one at both ends" in problem
    (problem,) = differences(URL, about(versions={"tulu_mega": "0.0.9"}), MODEL)
    assert "its tulu_mega is 0.0.9 (code " in problem
    (problem,) = differences(URL, {"incarnation": 1}, MODEL)
    assert "says nothing of its model and versions" in problem
    assert Model.asked("DIR", "fp32", "model", CONFIG) == MODEL
    assert Model.asked("DIR", "fp32", "bf16", CONFIG).dtype == Model.asked("DIR", "bf16", "model", CONFIG).dtype == "bfloat16"


def test_gpus_that_share_need_one_torch_and_one_nccl(monkeypatch):
    monkeypatch.setattr(counterpart, "_versions", lambda: {"tulu_mega": "1", "torch": "2.13.0", "nccl": "2.29.7"})
    theirs = about(versions={"tulu_mega": "1", "torch": "2.13.0", "nccl": "2.27.5"})
    assert differences(URL, theirs, MODEL) == differences(URL, theirs, MODEL, transports.named("gloo")) == []
    (problem,) = differences(URL, theirs, MODEL, transports.named("nccl"))
    assert problem.startswith(f"{URL}: has nccl 2.27.5, this trainer 2.29.7; rollout.transport = nccl needs one version at both")
    theirs["versions"]["torch"] = "2.11.0+cu128"
    assert len(differences(URL, theirs, MODEL, transports.named("ipc"))) == 2


def test_servers_of_several_versions_are_told():
    same, other = about(versions={"vllm": "0.32.0", "torch": "2.13.0"}), about(versions={"vllm": "0.31.1", "torch": "2.13.0"})
    assert counterpart.between({"http://a": same, "http://b": same, "http://old": {}}) == []
    (problem,) = counterpart.between({"http://a": same, "http://b": other})
    assert problem.startswith("http://b: vllm 0.31.1 there, 0.32.0 at http://a; give all servers the same")


def attached_to(url: str) -> tuple[list[str], float]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    sender = Sender(MODEL, None, True, 0, torch.device("cpu"), lambda _: None, lambda: None)
    began = time.monotonic()
    try:
        attach(sender, [ServerAddress(url, "k", 1)], RolloutSettings(urls=[url]))
    except UserError as error:
        return error.problems, time.monotonic() - began
    return [], 0.0


@pytest.mark.ranks
def test_attaching_compares():
    answers = ready(model=Model("OTHER", "float32", shape({**CONFIG, "hidden_size": 32}))) | {
        "/get_world_size": (200, {"world_size": 1}),
        "/collective_rpc": (200, {"results": [{"fp8": False, "problems": [], "unattached": []}]}),
    }
    with answering(answers) as url:
        ((problems, seconds),) = world.run(1, attached_to, url)
    assert len(problems) == 1 and problems[0].startswith(f"{url}: serves another model, OTHER, than DIR: hidden_size = 32 there")
    assert seconds < 120
