"""The log-prob seam against torch autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.lib import world

pytestmark = pytest.mark.ranks

TOKENS, HIDDEN, VOCAB = 37, 24, 50


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def words(ignored: str) -> int:
    """Of the vocabulary; so few that two of four ranks hold nothing but padding, with "padded ranks"."""
    return 9 if ignored == "padded ranks" else VOCAB


def case(ranks: int, ignored: str):
    from tulu_mega.bridge.rules import padded_vocab
    from tulu_mega.records import IGNORE

    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS + (-TOKENS) % ranks, HIDDEN, dtype=torch.float64, generator=generator)
    vocabulary = words(ignored)
    padded = padded_vocab(vocabulary, ranks)
    weight = torch.randn(padded, HIDDEN, dtype=torch.float64, generator=generator)
    weight[vocabulary:] = 9.0  # padding that would win the softmax if it took part
    labels = torch.randint(0, vocabulary, (len(hidden),), generator=generator)
    labels[{"some": slice(None, None, 3), "all": slice(None)}.get(ignored, slice(0, 0))] = IGNORE
    upstream = torch.randn(2, len(hidden), dtype=torch.float64, generator=generator)  # for log-probabilities and entropies
    return hidden, weight, labels, upstream


def ours(sequence_parallel: bool, workspace: int, ignored: str, temperature: float = 1.0, entropy: str = "no", kernels="torch"):
    """`entropy`: no | value | gradient, of it alone with "alone". `kernels`: "triton" means its interpreter."""
    import os

    from tulu_mega import platforms
    from tulu_mega.config import ParallelSettings
    from tulu_mega.distributed import topology
    from tulu_mega.model.logprobs import token_logprobs

    size = int(os.environ["WORLD_SIZE"])
    place = topology.start(ParallelSettings(tensor=size), platforms.install(), seed=0)
    hidden, weight, labels, upstream = (x.float() if x.is_floating_point() else x for x in case(size, ignored))
    rank = place.tensor_rank
    mine = hidden.chunk(size)[rank] if sequence_parallel else hidden
    mine = mine.unsqueeze(1).clone().requires_grad_()
    shard = weight.chunk(size)[rank].clone().requires_grad_()
    with Largest() as seen:
        logp, entropies = token_logprobs(
            mine, shard, labels, vocab_size=words(ignored), tensor_group=place.tensor_group, sequence_parallel=sequence_parallel,
            temperature=temperature, entropy=entropy != "no", workspace=workspace, kernels=kernels,
        )  # fmt: skip
        loss = upstream[0] @ logp if entropy != "alone" else 0
        if entropy in ("gradient", "alone"):
            loss = loss + upstream[1] @ entropies
        loss.backward()
    given = None if entropies is None else entropies.detach().numpy()
    return logp.detach().numpy(), mine.grad.squeeze(1).numpy(), shard.grad.numpy(), given, seen.numel


def truth(ranks: int, ignored: str, temperature: float = 1.0, entropy: str = "no", kernels="torch"):
    from tulu_mega.records import IGNORE

    hidden, weight, labels, upstream = case(ranks, ignored)
    hidden.requires_grad_(), weight.requires_grad_()
    full = (hidden @ weight[: words(ignored)].t() / temperature).log_softmax(-1)
    logp = full.gather(1, labels.clamp(min=0)[:, None]).squeeze(1) * (labels != IGNORE)
    entropies = -(full.exp() * full).sum(-1) * (labels != IGNORE)
    weights = {"no": (1, 0), "value": (1, 0), "gradient": (1, 1), "alone": (0, 1)}[entropy]
    (weights[0] * upstream[0] @ logp + weights[1] * upstream[1] @ entropies).backward()
    return logp.detach(), hidden.grad, weight.grad, entropies.detach()


def compare(ranks, sequence_parallel, rows_a_chunk, ignored, *asked):
    from tulu_mega.bridge.rules import padded_vocab

    local = padded_vocab(words(ignored), ranks) // ranks
    answers = world.run(ranks, ours, sequence_parallel, 4 * local * rows_a_chunk, ignored, *asked)
    answers = [[None if array is None else torch.from_numpy(array) for array in answer[:4]] for answer in answers]
    logp, d_hidden, d_weight, entropies = truth(ranks, ignored, *asked)
    for answer in answers:
        torch.testing.assert_close(answer[0].double(), logp, rtol=0, atol=2e-5)
        if answer[3] is not None:
            torch.testing.assert_close(answer[3].double(), entropies, rtol=0, atol=2e-5)
    got = torch.cat([a[1] for a in answers]) if sequence_parallel else answers[0][1]
    torch.testing.assert_close(got.double(), d_hidden, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat([a[2] for a in answers]).double(), d_weight, rtol=1e-4, atol=2e-5)
    assert (torch.cat([a[2] for a in answers])[words(ignored) :] == 0).all()
    return answers


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel", "rows_a_chunk", "ignored"),
    [
        (1, False, 1000, "some"),
        (1, False, 5, "none"),
        (2, True, 5, "some"),
        (2, False, 1000, "none"),
        (4, True, 3, "some"),
        (2, True, 5, "all"),
        (4, True, 5, "padded ranks"),
    ],
)
def test_values_and_gradients(ranks, sequence_parallel, rows_a_chunk, ignored):
    compare(ranks, sequence_parallel, rows_a_chunk, ignored)


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel", "rows_a_chunk", "ignored", "temperature", "entropy"),
    [
        (1, False, 1000, "some", 1.7, "gradient"),
        (1, False, 5, "none", 0.6, "no"),
        (1, False, 5, "some", 1.0, "value"),
        (2, True, 5, "some", 0.6, "gradient"),
        (2, False, 1000, "none", 1.0, "alone"),
        (4, True, 3, "some", 1.7, "gradient"),
        (4, False, 1000, "some", 0.6, "value"),
        (2, True, 5, "all", 0.6, "gradient"),
    ],
)
def test_entropy_and_temperature(ranks, sequence_parallel, rows_a_chunk, ignored, temperature, entropy):
    answers = compare(ranks, sequence_parallel, rows_a_chunk, ignored, temperature, entropy)
    assert all((answer[3] is None) == (entropy == "no") for answer in answers)


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel", "rows_a_chunk", "ignored", "entropy"),
    [
        (2, True, 5, "some", "gradient"),
        (2, True, 5, "all", "gradient"),
        (4, True, 3, "some", "no"),
        (4, False, 1000, "padded ranks", "gradient"),
    ],
)
def test_triton_in_its_interpreter(ranks, sequence_parallel, rows_a_chunk, ignored, entropy):
    compare(ranks, sequence_parallel, rows_a_chunk, ignored, 0.6, entropy, "triton")


@pytest.mark.parametrize(("ranks", "rows_a_chunk"), [(1, 5), (1, 1000), (4, 5)])
def test_log_probabilities_are_the_same_bits_with_entropies(ranks, rows_a_chunk):
    """What was scored without entropies is what training computes with them."""
    workspace = 4 * VOCAB * rows_a_chunk // ranks
    without, beside = (world.run(ranks, ours, False, workspace, "some", 0.6, entropy) for entropy in ("no", "value"))
    for rank, other in zip(without, beside, strict=True):
        assert all((a == b).all() for a, b in zip(rank[:3], other[:3], strict=True))


@pytest.mark.parametrize("entropy", ["no", "gradient"])
def test_full_logits_are_never_made(entropy):
    chunk = 4 * VOCAB * 2  # two rows of logits
    *_, largest = world.run(1, ours, False, chunk, "none", 0.6, entropy)[0]
    assert largest <= max(TOKENS * HIDDEN, (VOCAB + 8) * HIDDEN) < TOKENS * VOCAB
