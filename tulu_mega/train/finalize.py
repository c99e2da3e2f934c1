"""The end of a global batch's backward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from tulu_mega.distributed.topology import Topology


def finalize_gradients(
    here: Topology,
    model: Sequence[DistributedDataParallel],
    num_tokens: Tensor,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Sums gradients over ranks as megatron-core does, and divides them by the global count on the device.

    megatron-core would ask the device, for each model chunk, whether the count is 0, and so wait for the whole batch.

    Args:
        here: the ranks' grid. The other arguments are what megatron-core's schedules give.
        num_tokens: this rank's share of the count; right on the last pipeline stage.
    """
    finalize_model_grads(model, None, pg_collection, force_all_reduce)
    stages = here.pipeline_group
    dist.broadcast(num_tokens, group_src=stages.size() - 1, group=stages)
    dist.all_reduce(num_tokens, group=here.data_context_group)
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))
