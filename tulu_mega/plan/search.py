"""Layouts that fit a cluster, by predicted time."""

from __future__ import annotations

from collections.abc import Iterator

from tulu_mega.bridge.families import family_for
from tulu_mega.config import ParallelSettings
from tulu_mega.config.megatron_fields import ACTIVATION
from tulu_mega.errors import UserError
from tulu_mega.layout.flops import matmul_parameters
from tulu_mega.plan.outlook import Outlook, Question, outlook, with_layout

_CHUNKS = (1, 2, 3, 4, 5, 8)
_SMALLEST_SHARE = 1024
"""Tokens of a micro-batch below which a context-parallel rank's share is not worth looking at."""


def search(question: Question) -> list[Outlook]:
    """Every layout that fits, fastest first: tensor parallelism within a node, pipelines that divide the GPUs, interleaved or
    not, context parallelism where sequences are long; of each the least that has to be recomputed, whatever the file says of it.

    Micro-batches (`data.pack_length`), batch and everything else stay the file's. One sampled step decides.

    Raises:
        UserError: no layout fits.
    """
    best: list[Outlook] = []
    for parallel in layouts(question):
        for recompute in _recomputing(question):
            try:
                found = outlook(with_layout(question, parallel, recompute), sampled=1)
            except UserError:  # does not divide, or micro-batches do not come out
                break
            if found.fits:
                best.append(found)
                break
    if not best:
        raise UserError(
            f"no layout of {question.gpus} {question.gpu.name} GPUs fits, even with model.recompute = 'full'; "
            "give more --gpus, or lower data.pack_length"
        )
    return sorted(best, key=lambda each: each.seconds)


def _recomputing(question: Question) -> list[str | list[str]]:
    """What may be recomputed, in the order of what it costs; what frees nothing here, or is refused, is left out."""
    settings = question.settings
    own = not ACTIVATION & settings.megatron.keys() and settings.precision.recipe != "delayed"
    norms = own and family_for(question.config).needs(question.config).norms != "after"
    return [
        "none",
        *([["activation"]] if own else []),
        *([["layernorm", "activation"]] if norms else []),
        ["mlp"],
        "full",
    ]


def layouts(question: Question) -> Iterator[ParallelSettings]:
    """What is tried; weights, gradients and optimizer alone are looked at first."""
    config, given = question.config, question.settings.parallel
    aside = question.servers.gpus if question.servers else 0
    world = (question.gpus or given.model_parallel * (given.data or 1) + aside) - aside
    layers, groups = config["num_hidden_layers"], config.get("num_key_value_heads") or config["num_attention_heads"]
    matrices = matmul_parameters(config)
    for tensor in (size for size in (1, 2, 4, 8) if size <= question.gpu.domain and not groups % size and not world % size):
        for context in (size for size in (1, 2, 4, 8) if not world % (tensor * size)):
            if context > 1 and question.workload.capacity / context < _SMALLEST_SHARE:
                continue
            for pipeline in range(1, min(layers, world // (tensor * context)) + 1):
                if world % (tensor * context * pipeline):
                    continue
                for chunks in _CHUNKS if pipeline > 1 else (1,):
                    if pipeline * chunks > layers:
                        continue
                    shares = world // (tensor * pipeline)
                    state = 6 + 12 / shares if question.settings.model.dtype == "bf16" else 8 + 8 / shares
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
