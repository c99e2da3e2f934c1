"""Twenty thousand random requests to one server, on every route; it answers the next honest one."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict

import httpx
import pytest

from tests.lib.hostile_requests import random_requests
from tests.lib.server_processes import START_SECONDS, label, rollout_settings, with_key
from tulu_mega.inference.client import RolloutClient
from tulu_mega.inference.command_line import ServerOptions
from tulu_mega.inference.pool import ServerPool
from tulu_mega.inference.sampling import Sampling
from tulu_mega.vllm_plugin.auth import KEY
from tulu_mega.vllm_plugin.gate import server_arguments

pytest.importorskip("vllm")
pytestmark = [pytest.mark.servers, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")]
VERSION = 3


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_twenty_thousand_random_requests(model, tmp_path, monkeypatch):
    """Each route gets its share, with the key and without; the server answers all of them and, after them, an honest request."""
    options = ServerOptions(str(model), max_model_len=512, extra=tuple(server_arguments()))
    draw, answers = random.Random(0), defaultdict(Counter)
    with ServerPool(options, tmp_path, 1, start_timeout=START_SECONDS, restarts=0) as pool:
        (address,) = pool.wait()
        monkeypatch.setenv(KEY, pool.key)
        label(address, VERSION)
        before, key = honest([address]), with_key(address)
        # each by a connection of its own: the server closes those that ended in an error of its own
        with httpx.Client(base_url=address.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            for number, (method, path, content) in enumerate(random_requests(draw, 20_000)):
                keyed = draw.random() < 0.9
                asked = {"content": content} if method == "POST" else {}
                try:
                    answer = client.request(method, path, headers=key if keyed else None, **asked)
                except httpx.HTTPError as error:
                    pytest.fail(f"request {number}, {method} {path} of {content[:300]!r}: {error!r}")
                assert keyed or answer.status_code == 401
                answers[path][answer.status_code] += 1
        print(*(f"{path}: {dict(sorted(counted.items()))}" for path, counted in answers.items()), sep="\n")
        assert httpx.get(f"{address.url}/health", headers=key, timeout=120).status_code == 200
        assert honest([address]) == before


def honest(servers) -> list[list[list[int]]]:
    """Answers to a sound request."""
    with RolloutClient(servers, rollout_settings()) as client:
        groups = client.generate([[5, 6, 7], [300]], Sampling(max_tokens=12, temperature=0.7, samples=3, seed=4), VERSION)
    return [[one.last_answer for one in group] for group in groups]
