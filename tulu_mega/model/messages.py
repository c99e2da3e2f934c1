"""What pipeline stages send one another."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


class PackMessages(P2PCommunicator):
    """Hidden states and their gradients of packs that differ in length, for one run of a schedule.

    megatron-core would send the shape of each message ahead, and the host would wait for it: nothing would be sent while others
    compute. But all ranks of a pipeline have a step's packs, and a neighbour's messages come in the order of its passes, which is
    the same on all ranks: that of ``get_schedule_table``, for gradients with the chunks counted from the other end. What the last
    rank makes of all its chunks but the last goes on to the first rank, and gradients the other way round.

    Args:
        group: the pipeline's ranks.
        config: of the model chunks, with ``variable_seq_lengths``.
        rows_M: tokens of each micro-batch that this rank computes, under context and sequence parallelism its share.
        chunks: model chunks on each rank.
    """

    def __init__(self, group: ProcessGroup, config: TransformerConfig, rows_M: Sequence[int], chunks: int):
        super().__init__(group, config)
        passes = get_schedule_table(len(rows_M), chunks, config.microbatch_group_size_per_vp_stage)
        along = [rows_M[micro_batch] for micro_batch, _chunk in passes]
        around = [rows_M[micro_batch] for micro_batch, chunk in passes if chunk < chunks - 1]
        self._from_before = iter(around if group.rank() == 0 else along)
        self._from_behind = iter(around if group.rank() == group.size() - 1 else along)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Shapes of what comes from the rank before and the rank behind; None where nothing is to come."""
        return (
            (next(self._from_before), 1, self.config.hidden_size) if recv_prev else None,
            (next(self._from_behind), 1, self.config.hidden_size) if recv_next else None,
        )
