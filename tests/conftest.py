"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: tests measure results, not speed, and several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
from hypothesis import HealthCheck, settings

from tulu_mega.process import uncollected

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # how busy a machine is decides nothing

# vLLM's processes find a plugin of the tests there: their workers sleep between messages.
PATIENT = str(Path(__file__).parent / "lib/patient_vllm")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PATIENT, os.environ.get("PYTHONPATH")]))

SHARED = {
    "tests/weight_transfer/live/": "servers that take weights",
    "tests/end_to_end/test_grpo": "a server for runs of grpo",
    "tests/invariant/test_grpo.py": "a server for runs of grpo",
    "tests/inference/test_generate.py": "one vLLM",
    "tests/evaluation/test_eval_vllm.py": "one vLLM",
}
"""Beginning of a test file's path -> what its tests share, which takes long to start; one worker runs all that share it."""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """All of the tests' modules are imported here, and stay."""
    with uncollected():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that start servers first: the longest ones at the end would leave a core idle."""
    with_servers = {item.path for item in items if item.get_closest_marker("servers")}
    items.sort(key=lambda item: item.path not in with_servers)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Which tests one worker takes: a file's; of files that share servers, all."""
    from xdist.scheduler import LoadFileScheduling

    class ByWhatIsShared(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((shared for start, shared in SHARED.items() if file.startswith(start)), file)

    return ByWhatIsShared(config, log)


@pytest.fixture
def make_tokenizer():
    """Builds a small tokenizer of bytes; see `tests.lib.tokenizers`."""
    from tests.lib.tokenizers import byte_tokenizer

    return byte_tokenizer


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def tokenizer_dir(make_tokenizer, tmp_path) -> Path:
    directory = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Directory of the quickstart's model, of random weights, with its tokenizer."""
    from tulu_mega.quickstart import tiny_model

    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.make(directory, seed=0)
    return directory


@pytest.fixture(scope="session")
def vllm(tiny):
    """A vLLM that answers for `tiny`, started once for all tests of a worker."""
    pytest.importorskip("vllm")
    from tulu_mega.inference.offline import Generator

    with Generator(str(tiny), log=tiny.parent / "vllm.log") as generator:
        yield generator


# What starts worlds of ranks is imported by the fixture that needs it: tests/standins/transformer_engine chooses another
# fork server before that.


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Reference trainings of each kind of Llama, tied or not."""
    from tests.lib import jobs
    from tests.lib.layouts import LR
    from tests.lib.truths import Truths

    return Truths.of_training(tmp_path_factory, jobs.make_model, LR)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """What `sft_runs.arguments` trains, and on what."""
    from tests.lib import sft_runs

    return sft_runs.make_material(tmp_path_factory.mktemp("sft_runs"))


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Model, prompts, verifier, reward model and settings of `tulu-mega grpo`."""
    pytest.importorskip("vllm")
    from tests.lib.grpo_runs import make_place

    return make_place(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="session")
def served(place) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Flags and environment variables of runs that have their responses from one server of `tulu-mega serve`."""
    from tests.invariant.server import served as serving

    with serving(place, "--rollout.max_model_len", "128") as attached:
        yield attached


@pytest.fixture(scope="session")
def undisturbed(place, served) -> Path:
    """The directory of a run of grpo that nothing happened to."""
    from tests.lib.grpo_runs import ended, start

    flags, variables = served
    ended(start(place, "undisturbed", *flags, **variables), place, "undisturbed")
    return place / "undisturbed"
