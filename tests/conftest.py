"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: tests measure results, not speed, and several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest

SHARED_SERVERS = "tests/weight_transfer/live/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Which tests one worker takes: a file's; of a folder that shares servers, all."""
    from xdist.scheduler import LoadFileScheduling

    class ByServers(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return SHARED_SERVERS if file.startswith(SHARED_SERVERS) else file

    return ByServers(config, log)


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
