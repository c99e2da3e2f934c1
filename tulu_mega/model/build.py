"""This rank's part of the model, built under a layout."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from transformers import PretrainedConfig

from tulu_mega.bridge.rules import padded_vocab
from tulu_mega.config import EngineSettings
from tulu_mega.model.config import transformer_config
from tulu_mega.model.gpt import PolicyModel
from tulu_mega.model.hf_config import rope_frequencies
from tulu_mega.model.spec import block_spec, use_transformer_engine
from tulu_mega.platforms import Platform
from tulu_mega.topology import Topology


def build_model(hf: PretrainedConfig, settings: EngineSettings, topology: Topology, platform: Platform) -> PolicyModel:
    """The layers, embedding and head this rank holds. Parameters are allocated, not initialised: load a checkpoint next.

    Raises:
        UserError: when the model cannot be built under this layout.
    """
    transformer_engine = use_transformer_engine(settings.model.spec, platform)
    config = transformer_config(hf, settings, transformer_engine)
    model = PolicyModel(
        config,
        block_spec(config, transformer_engine),
        vocab_size=padded_vocab(hf.vocab_size, topology.tensor),
        real_vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=topology.first_stage,
        post_process=topology.last_stage,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
    )
    # megatron-core knows Llama 3's scaling with its published constants only; the config may have others
    model.rotary_pos_emb.inv_freq = rope_frequencies(hf).to(platform.device)
    return model.to(platform.device)


def wrap_for_training(model: PolicyModel, sharded_optimizer: bool) -> DistributedDataParallel:
    """megatron-core's DDP: gradients accumulate in float32 buffers and are summed over DP x CP."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=sharded_optimizer,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,  # the engine looks at loss and norm and skips such steps
    )
    return DistributedDataParallel(model.config, ddp, model)


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters held by this rank."""
    return sum(p.numel() for p in model.parameters())
