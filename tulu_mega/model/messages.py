"""Messages between pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class Underway:
    """A message under way, and the memory from which it is sent.

    Args:
        handle: torch's.
        sent: another tensor of the same memory, which stays when that of the message's own is exchanged.
    """

    def __init__(self, handle: Work, sent: Tensor):
        self._handle, self._sent = handle, sent

    def wait(self) -> None:
        """Wait as torch's handle does, then release the memory."""
        self._handle.wait()
        self._sent = None


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

    def send_forward_recv_forward(
        self, output_tensor: Tensor | None, recv_prev: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> Any:
        """As P2PCommunicator's, but what is being sent stays in memory until its handle is waited for.

        The interleaved schedule gives an output back (``deallocate_pipeline_outputs``) before it waits for the message, and torch
        keeps a message's memory no longer by itself: what is computed next could be sent in its place.
        """
        if not overlap_p2p_comm:
            return super().send_forward_recv_forward(output_tensor, recv_prev, tensor_shape)
        received, handles = super().send_forward_recv_forward(output_tensor, recv_prev, tensor_shape, overlap_p2p_comm=True)
        if output_tensor is not None:
            handles["send_next"] = Underway(handles["send_next"], output_tensor.detach())
        return received, handles

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Return the shapes of the messages from the previous and the next rank; None where none comes."""
        return (
            (next(self._from_before), 1, self.config.hidden_size) if recv_prev else None,
            (next(self._from_behind), 1, self.config.hidden_size) if recv_next else None,
        )
