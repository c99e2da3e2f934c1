"""The records that pass between rooms.

Shape suffixes, here and everywhere:

    T   packed tokens on this rank        S   sequences in a pack       S1  S + 1
    V   vocabulary                        V_l this rank's shard of it    H   hidden size
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor
from tulu_kernels.dispatch import Backend
from tulu_kernels.segment_sums import segment_sums

IGNORE = -100
"""Label of a token that is not trained, as in Hugging Face."""


@dataclass(frozen=True)
class TokenizedRow:
    """One tokenised row: ``input_ids`` and ``labels`` of equal length, labels *not* shifted, IGNORE where not trained."""

    row: int
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one origin in a :class:`Response`: what the policy sampled in one answer, or what it was given.

    Not to be confused with a segment of a :class:`PackedBatch`, which is a whole sequence.

    Raises:
        ValueError: there are no tokens, or not as many log-probabilities and versions as the field says.
    """

    token_ids: list[int]
    """as the sampler had them, never made from text again; of an answer, the token that ended it included"""
    trained: bool
    """whether the policy is trained on these tokens: it sampled them"""
    sampler_logp: list[float] = field(default_factory=list)
    """log-probability of each trained token in the distribution that it was drawn from; empty where not trained"""
    versions: list[int] = field(default_factory=list)
    """version of the weights that drew each trained token; empty where not trained"""

    def __post_init__(self) -> None:
        tokens = len(self.token_ids)
        expected = tokens if self.trained else 0
        if not tokens or len(self.sampler_logp) != expected or len(self.versions) != expected:
            raise ValueError(
                f"a segment of {tokens} tokens that are {'' if self.trained else 'not '}trained, with {len(self.sampler_logp)} "
                f"log-probabilities and {len(self.versions)} versions; expected at least one token and {expected} of each"
            )


@dataclass(frozen=True)
class Response:
    """What a policy made of a prompt: the prompt, its answer and whatever else came in between, one behind the other.

    A response of one turn is two segments, the prompt and the answer. One with tools is more: prompt, answer, the tool's
    output, answer.

    Raises:
        ValueError: the first segment is trained, though no token comes before it that could predict its first one.
    """

    segments: tuple[Segment, ...]
    finish_reason: str
    """``stop``: a token ended it; ``length``: room ran out"""

    def __post_init__(self) -> None:
        if not self.segments or self.segments[0].trained:
            raise ValueError("a response begins with a segment that is not trained: its prompt")

    @classmethod
    def of_one_turn(
        cls, prompt_ids: list[int], answer_ids: list[int], sampler_logp: list[float], versions: list[int], finish_reason: str
    ) -> Response:
        """A prompt and the answer to it.

        Args:
            sampler_logp, versions: of each token of the answer.
        """
        return cls((Segment(prompt_ids, False), Segment(answer_ids, True, sampler_logp, versions)), finish_reason)

    @property
    def token_ids(self) -> list[int]:
        """All tokens, prompt included."""
        return list(chain.from_iterable(segment.token_ids for segment in self.segments))

    @property
    def labels(self) -> list[int]:
        """:attr:`token_ids`, IGNORE in the place of those that are not trained; not shifted."""
        masked = (part.token_ids if part.trained else [IGNORE] * len(part.token_ids) for part in self.segments)
        return list(chain.from_iterable(masked))

    @property
    def sampler_logp(self) -> list[float]:
        """The sampler's log-probability of each trained token."""
        return list(chain.from_iterable(segment.sampler_logp for segment in self.segments))

    @property
    def versions(self) -> list[int]:
        """The version of the weights that drew each trained token."""
        return list(chain.from_iterable(segment.versions for segment in self.segments))

    @property
    def last_answer(self) -> list[int]:
        """Tokens of the last trained segment; none where nothing is trained."""
        return next((segment.token_ids for segment in reversed(self.segments) if segment.trained), [])

    @property
    def num_tokens(self) -> int:
        """Tokens, prompt included."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_trained(self) -> int:
        """Trained tokens."""
        return sum(len(segment.token_ids) for segment in self.segments if segment.trained)


@dataclass(frozen=True)
class PackedBatch:
    """One packed micro-batch (megatron's ``thd`` layout) on one rank.

    Two sequences of 3 and 2 tokens, of which the last token of the first and both of the second are trained,
    padded to a total of 8, read::

        tokens_T      a0 a1 a2 b0 b1  0  0  0
        labels_T      -1 a2 -1 b1 -1 -1 -1 -1      (IGNORE written as -1) next token, shifted inside each sequence
        positions_T    0  1  2  0  1  0  1  2
        loss_mask_T    0  1  0  1  0  0  0  0
        segments_T     0  0  0  1  1  2  2  2
        ends_T         0  0  1  0  1  0  0  0      the last trained token of each sequence
        cu_seqlens_S1  0  3  5  8                  the padding is a segment of its own, nobody attends to it
        rows_S         7  4 -1                     the data set's rows, -1 for padding

    ``labels_T[t]`` is the token that position ``t`` predicts. The last position of a sequence predicts nothing.

    Where sequences share a prefix, its tokens come once, as a segment of row -1. The responses r0 and s0 s1 to the prompt
    p0 p1, of which all but the last token is shared, read::

        tokens_T      p0 p1 p1 s0        labels_T      -1 r0 s0 s1       the last token of each, which predicts nothing,
        positions_T    0  1  1  2        cu_seqlens_S1  0  1  2  4       is left out
        rows_S        -1  7  4           key_rows_K     0  0  1  0  2  3     cu_keys_S1  0  1  3  6

    Of pairs, the chosen sequence lies right before the rejected one: segments 2p and 2p + 1 are the pack's pair p.
    """

    tokens_T: Tensor
    """int64"""
    labels_T: Tensor
    """int64, IGNORE where nothing is predicted or trained"""
    positions_T: Tensor
    """int64, restarting at 0 in every sequence; after a shared prefix, at its length"""
    loss_mask_T: Tensor
    """bool, ``labels_T != IGNORE``"""
    labelled_N: Tensor
    """int64, the positions that have a label, ascending: known before the batch is on a GPU, which then nobody has to ask"""
    segments_T: Tensor
    """int64, index into ``rows_S``"""
    ends_T: Tensor
    """bool, where a sequence's score is read: its last trained token itself, not the position that predicts it"""
    cu_seqlens_S1: Tensor
    """int32, boundaries of the segments"""
    rows_S: Tensor
    """int64, the data set's row of each segment, -1 for padding"""
    lengths_S: tuple[int, ...]
    """tokens of each segment; on the host, so that no layer has to ask a GPU where segments begin"""
    trained_S: Tensor
    """int64, trained tokens of each segment"""
    key_rows_K: Tensor | None = None
    """int64, the pack's rows that each segment's tokens may see, end to end: those of its prefix, then its own; None where no
    prefixes are shared"""
    cu_keys_S1: Tensor | None = None
    """int32, boundaries of each segment's in ``key_rows_K``"""
    key_lengths_S: tuple[int, ...] = ()
    """how many each segment has there, on the host"""
    context_rank: int = 0
    """Whose share of a pack this is under context parallelism: tensors of shape [T] have the share's tokens only,
    ``cu_seqlens_S1``, ``lengths_S`` and ``rows_S`` are still the whole pack's."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What a stage adds, by name. The name's suffix says the shape: ``_T``, a value for each token, of which a share has its own
    tokens' only; ``_S``, a value for each segment, which every share has whole. Objectives say which columns they read."""

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            sized = {"_T": self.tokens_T, "_S": self.rows_S}.get(name[-2:])
            if sized is None:
                raise ValueError(f"column {name!r}: expected a name that ends with its shape, _T (by token) or _S (by segment)")
            if name in self.__dataclass_fields__:
                raise ValueError(f"column {name!r}: every batch has a field of that name; give the column another one")
            if len(column) != len(sized):
                raise ValueError(f"column {name!r} has {len(column)} values, but the batch {len(sized)} of that shape")

    def column(self, name: str) -> Tensor:
        """A column that has to be there.

        Raises:
            LookupError: it is not; the error names those that are.
        """
        if name not in self.columns:
            raise LookupError(f"the batch has no column {name!r}; it has {', '.join(map(repr, sorted(self.columns))) or 'none'}")
        return self.columns[name]

    def optional_column(self, name: str) -> Tensor | None:
        """A column, or None where the batch does not have it."""
        return self.columns.get(name)

    def with_columns(self, **columns: Tensor) -> PackedBatch:
        """The same batch with further columns, or others in the place of those of the same name.

        Raises:
            ValueError: a name does not end with a shape, is a field's, or the column is not of that shape.
        """
        return replace(self, columns={**self.columns, **columns})

    @property
    def num_sequences(self) -> Tensor | int:
        """Real sequences, padding not counted, counted where the batch is; 0 on all shares but the first, so that a sum over
        ranks counts each once."""
        return (self.rows_S >= 0).sum() if self.context_rank == 0 else 0

    @property
    def num_trained_sequences(self) -> Tensor | int:
        """Sequences of which anything is trained, counted where the batch is; 0 on all shares but the first, as
        ``num_sequences``."""
        return (self.trained_S > 0).sum() if self.context_rank == 0 else 0

    def to(self, device: torch.device, only: Collection[str] | None = None) -> PackedBatch:
        """The same batch on another device.

        Args:
            only: fields to send, the others stay where they are; all when None.
        """
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        core = {name: sent(value, device) for name, value in tensors.items() if only is None or name in only}
        columns = {name: sent(value, device) if only is None else value for name, value in self.columns.items()}
        return replace(self, **core, columns=columns)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor on another device; the host does not wait for a GPU.

    It would if the memory could be paged out: such a copy begins when the GPU has done all before it, and the host goes on when
    the copy has ended.
    """
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


class ToHost:
    """A tensor's values on their way to the host: they are sent behind what the device has been given to do so far.

    Who reads them before the device is there waits for it; after any other wait for it nobody waits.
    """

    def __init__(self, tensor: Tensor):
        self._there: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            tensor = tensor.to("cpu", non_blocking=True)  # torch makes this copy in pinned memory
            self._there = torch.cuda.Event()
            self._there.record()
        self._values = tensor

    def read(self) -> list:
        """The values, as ``Tensor.tolist`` gives them."""
        if self._there and not self._there.query():
            self._there.synchronize()
        return self._values.tolist()


@dataclass(frozen=True)
class TokenOutput:
    """What a model gives for the labels of a micro-batch, on this rank's share of the tokens."""

    values_T: Tensor
    """float32: log-probabilities of the labels, 0 where there is none; of a reward model each token's score"""
    entropy_T: Tensor | None
    """float32, nats, of the distribution each label is drawn from, 0 where there is no label; None where not asked for"""
    batch: PackedBatch
    """what it is of"""
    over_context: Callable[[Tensor], Tensor] = lambda share: share
    """sums over the context-parallel ranks, forward and backward"""
    kernels: Backend = "auto"
    """what is made of it runs on Triton kernels or torch, see `tulu_kernels.dispatch`"""

    def segment_sums(self, values_T: Tensor) -> Tensor:
        """Sums over whole segments, of this rank's tokens and those that other context-parallel ranks hold.

        What is made of them may differ from rank to rank: the loss is the sum of the ranks' shares, the gradient is of all.

        Args:
            values_T: of this rank's tokens. All context-parallel ranks call it as often and in the same order.

        Returns:
            float64 [S], the same on all context-parallel ranks.
        """
        batch = self.batch
        return self.over_context(segment_sums(values_T, batch.segments_T, len(batch.rows_S), backend=self.kernels))


class Reads(enum.Enum):
    """What an objective is called with, beside the batch, and what it gives back."""

    TOKENS = enum.auto()
    """a `TokenOutput` of this rank's share of the tokens, without entropies; the objective gives the share's loss"""
    TOKENS_WITH_ENTROPY = enum.auto()
    """the same with entropies"""
    SEQUENCE_LOGP = enum.auto()
    """float64 [S], the sum of each segment's log-probabilities, the same on all context-parallel ranks; the objective gives the
    whole loss on each of them"""
    SEQUENCE_SCORE = enum.auto()
    """float64 [S], the score at each segment's end (`PackedBatch.ends_T`), likewise"""


@dataclass(frozen=True)
class LossOutput:
    """What an objective makes of one micro-batch.

    The engine sums ``loss_sum`` and ``count`` over micro-batches, DP and CP and divides once, so that no split of the
    global batch changes the gradient.
    """

    loss_sum: Tensor
    """scalar, differentiable"""
    count: Tensor | int
    """this micro-batch's share of the global denominator: tokens, sequences or pairs; a whole number"""
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    """name -> (sum, count) for each of the objective's ``reported``; the ratio of the sums over the global batch is logged"""
    largest: dict[str, Tensor | float] = field(default_factory=dict)
    """name -> value for each of the objective's ``largest``; the largest of the global batch is logged"""
