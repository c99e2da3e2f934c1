"""Layouts that fit a cluster, by predicted time."""

from __future__ import annotations

from collections.abc import Iterator

from tulu_mega.bridge.families import family_for
from tulu_mega.config import ParallelSettings
from tulu_mega.config.megatron_fields import ACTIVATION
from tulu_mega.config.workload import Workload
from tulu_mega.errors import UserError
from tulu_mega.layout.flops import matmul_parameters
from tulu_mega.plan.model.parameters import ITEMSIZE
from tulu_mega.plan.outlook import Outlook, outlook
from tulu_mega.plan.question import Question, with_layout

_CHUNKS = (1, 2, 3, 4, 5, 8)
_MOST = 16
_PARTS = 8
"""Numbers of whole layers that are tried."""
_SMALLEST_SHARE = 1024
"""Tokens of a micro-batch below which a context-parallel rank's share is not worth looking at."""


def search(question: Question) -> list[Outlook]:
    """Every layout that fits, fastest first: tensor parallelism within a node, pipelines that divide the GPUs, interleaved or
    not, context parallelism where sequences are long; of each the least that has to be recomputed, whatever the file says of it.

    Micro-batches (`data.pack_length`), batch and everything else stay the file's. One sampled step decides.

    Raises:
        UserError: no layout fits.
    """
    best = [found for parallel in layouts(question) if (found := _leanest(question, parallel))]
    if not best:
        work = question.workload
        told = f" with work for all in an update's {_sequences(work)} sequences" if _world(question) > _sequences(work) else ""
        raise UserError(
            f"no layout of {question.gpus} {question.gpu.name} GPUs fits{told}, even with model.recompute = 'full'; "
            f"give {'fewer' if told else 'more'} --gpus, or lower data.pack_length"
        )
    return sorted(best, key=lambda each: each.seconds)


def _leanest(question: Question, parallel: ParallelSettings) -> Outlook | None:
    """The fastest of the least that has to be recomputed under a layout for some memory to be left; where nothing less is
    enough for that, all of it, which may fit just so; None where that does not fit either.
    """
    most = _tried(question, parallel, ("full", None))
    if not most:
        return None
    for alike in _recomputing(question, parallel):
        found = [each for what in alike if (each := _tried(question, parallel, what))]
        if roomy := [each for each in found if each.roomy]:
            return min(roomy, key=lambda each: each.seconds)
    return most


def _tried(question: Question, parallel: ParallelSettings, what: tuple[str | list[str], int | None]) -> Outlook | None:
    """A layout with something recomputed; None where that does not fit, does not divide, or micro-batches do not come out."""
    try:
        found = outlook(with_layout(question, parallel, *what), sampled=1)
    except UserError:
        return None
    return found if found.fits else None


def _recomputing(question: Question, parallel: ParallelSettings) -> Iterator[list[tuple[str | list[str], int | None]]]:
    """What may be recomputed, and whole layers of each chunk: what costs little before what costs much, of which there are
    several. What frees nothing here, or is refused, is left out."""
    settings = question.settings
    own = not ACTIVATION & settings.megatron.keys() and settings.precision.recipe != "delayed"
    yield [("none", None)]
    if own:
        yield [(["activation"], None)]
        if family_for(question.config).needs(question.config).norms != "after":
            yield [(["layernorm", "activation"], None)]
    longest = -(-question.config["num_hidden_layers"] // (parallel.pipeline * parallel.virtual_pipeline))
    some = range(1, longest, -(-longest // _PARTS))
    yield [(["mlp"], None), *(("full", layers) for layers in some)]


def layouts(question: Question) -> Iterator[ParallelSettings]:
    """What is tried, every replica having a sequence to train; weights, gradients and optimizer alone are looked at first."""
    config, given = question.config, question.settings.parallel
    world, most = _world(question), _sequences(question.workload)
    layers, groups = config["num_hidden_layers"], config.get("num_key_value_heads") or config["num_attention_heads"]
    matrices = matmul_parameters(config)
    for tensor in (size for size in (1, 2, 4, 8) if size <= question.gpu.domain and not groups % size and not world % size):
        for context in (size for size in (1, 2, 4, 8) if not world % (tensor * size)):
            if context > 1 and question.workload.capacity / context < _SMALLEST_SHARE:
                continue
            for pipeline in range(1, min(layers, world // (tensor * context)) + 1):
                if world % (tensor * context * pipeline) or world // (tensor * context * pipeline) > most:
                    continue
                own = layers // pipeline if not layers % pipeline and layers // pipeline <= _MOST else 1  # chunks of a layer each
                for chunks in sorted({*_CHUNKS, own}) if pipeline > 1 else (1,):
                    if pipeline * chunks > layers:
                        continue
                    shares = world // (tensor * pipeline)
                    state = 6 + 12 / shares if question.settings.model.dtype == "bf16" else 8 + 8 / shares
                    if question.lora:
                        state = question.lora.bits / 8 if question.lora.quantized else ITEMSIZE[question.settings.model.dtype]
                    if matrices / (tensor * pipeline) * state > question.gpu.memory:  # of a mean rank
                        continue
                    yield given.model_copy(
                        update=dict(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=chunks,
                            context=context,
                            data=None,
                            first_stage_layers=None,
                            last_stage_layers=None,
                        )
                    )


def _world(question: Question) -> int:
    """Ranks that train."""
    given, aside = question.settings.parallel, question.servers.gpus if question.servers else 0
    return (question.gpus or given.model_parallel * (given.data or 1) + aside) - aside


def _sequences(work: Workload) -> int:
    """What an update shares out among replicas: rows, or responses."""
    return work.rows * max(1, work.samples) // work.mini_batches
