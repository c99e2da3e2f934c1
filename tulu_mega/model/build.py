"""This rank's part of the model, built under a layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from tulu_mega.bridge.rules import padded_vocab
from tulu_mega.config import EngineSettings, ModelSettings, ParallelSettings
from tulu_mega.distributed.topology import Topology
from tulu_mega.errors import UserError
from tulu_mega.model.attention_choice import Attention, choose_attention, situation
from tulu_mega.model.config import computed_again, transformer_config
from tulu_mega.model.gpt import PolicyModel
from tulu_mega.model.reward import RewardModel
from tulu_mega.model.rope import ropes
from tulu_mega.model.spec import block_spec, use_transformer_engine
from tulu_mega.platforms import Platform


def build_model(
    hf: PretrainedConfig,
    settings: EngineSettings,
    topology: Topology,
    platform: Platform,
    reward: bool = False,
    shares: bool = False,
    apart: bool = False,
    without_weights: bool = False,
) -> list[PolicyModel] | list[RewardModel]:
    """The layers, embedding and head this rank holds, a model for each of its virtual pipeline stages (VPP; else one).

    Parameters are allocated, not initialised: load a checkpoint next.

    Args:
        reward: whether the head gives a score for each token instead of log-probabilities.
        shares: whether sequences are to share prefixes within a pack.
        apart: whether norms are to be modules of their own in Transformer Engine's layers, too.
        without_weights: whether linear layers take no memory for weights, in whose place others come.

    Raises:
        UserError: when the model cannot be built under this layout.
    """
    transformer_engine = use_transformer_engine(settings.model.spec, platform)
    config = transformer_config(hf, settings, transformer_engine)
    attention = attention_of(hf, settings, topology, platform, shares)
    again = computed_again(settings, transformer_engine).modules
    stages = [None] if topology.virtual == 1 else range(topology.virtual)
    return [
        _chunk(
            hf,
            config,
            transformer_engine,
            attention,
            topology,
            platform,
            reward,
            settings.model,
            again,
            apart,
            stage,
            without_weights,
        )
        for stage in stages
    ]


def attention_of(
    hf: PretrainedConfig, settings: EngineSettings, topology: Topology, platform: Platform, shares: bool = False
) -> Attention:
    """The attention that a model's layers have under a layout.

    Args:
        shares: whether sequences are to share prefixes within a pack.

    Raises:
        UserError: when the one asked for cannot be had.
    """
    transformer_engine = use_transformer_engine(settings.model.spec, platform)
    config = transformer_config(hf, settings, transformer_engine)
    here = situation(
        platform.device,
        config.params_dtype,
        config.kv_channels,
        config.window_size is not None,
        topology.context,
        transformer_engine,
        shares,
    )
    return choose_attention(here, settings.model.attention)


def _chunk(
    hf: PretrainedConfig,
    config: TransformerConfig,
    transformer_engine: bool,
    attention: Attention,
    topology: Topology,
    platform: Platform,
    reward: bool,
    model: ModelSettings,
    again: Collection[str],
    apart: bool,
    vp_stage: int | None,
    without_weights: bool,
) -> PolicyModel | RewardModel:
    arguments = dict(
        config=config,
        transformer_layer_spec=block_spec(config, hf, transformer_engine, attention, again, vp_stage, apart, without_weights),
        vocab_size=padded_vocab(hf.vocab_size, topology.tensor),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=topology.first_stage and not vp_stage,
        post_process=topology.last_stage and vp_stage in (None, topology.virtual - 1),
        position_embedding_type="rope",
        frequencies=ropes(hf).frequencies.to(platform.device),
        vp_stage=vp_stage,
    )
    if reward:
        built = RewardModel(**arguments)
    else:
        built = PolicyModel(
            **arguments,
            real_vocab_size=hf.vocab_size,
            kernels=model.kernels,
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
        )
    return built.to(platform.device)


def wrap_for_training(
    chunks: Sequence[PolicyModel] | Sequence[RewardModel],
    parallel: ParallelSettings,
    sharded_optimizer: bool,
    table: Mapping[str, Any],
) -> list[DistributedDataParallel]:
    """megatron-core's DDP, one a chunk: gradients accumulate in buffers and are summed over DP x CP.

    Args:
        table: further fields of its configuration, the settings' `[ddp]`.

    Raises:
        UserError: when megatron-core refuses these.
    """
    fields = dict(
        grad_reduce_in_fp32=parallel.grad_dtype == "fp32",
        use_distributed_optimizer=sharded_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather and sharded_optimizer,
        bucket_size=parallel.bucket_size,
        fp8_param_gather=chunks[0].config.fp8_param,
        check_for_nan_in_grad=False,  # the engine looks at loss and norm and skips such steps
    )
    try:
        ddp = DistributedDataParallelConfig(**(fields | table))
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"[ddp]: megatron-core refuses this: {error}") from None
    # only the first chunk's communication is not hidden behind the others' work: only there smaller buckets are worth it
    return [DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=at > 0) for at, chunk in enumerate(chunks)]
