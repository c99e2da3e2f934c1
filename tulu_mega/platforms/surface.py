"""What this project uses of other libraries beyond what they promise: private names, and attributes that we override or replace.

A release of such a library may take any of it away without a word. So each name stands here with the reason, and
tests/platforms/test_surface.py asserts that it is still there. tests/house/test_private_names.py finds the names in our sources
and asks for a line here. `CHECKED` has the releases that the lines were last read against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHECKED = {"torch": "2.13.0", "megatron-core": "0.16.1", "vllm": "0.32.0", "transformers": "5.19.0", "datasets": "5.2.0"}
"""Release of each library in which every name was seen. Of transformers we use public names alone."""

Use = Literal["read", "set", "overridden", "replaced"]


@dataclass(frozen=True)
class Name:
    """One name of another library, and one file of ours that uses it."""

    file: str
    """ours, in tulu_mega/"""
    name: str
    """Dotted. After a colon: an attribute of instances, or one that is made while the library runs, which is looked for in the
    source of the module before the colon."""
    use: Use
    """`read`: read or called; `set`: given a value on an object that the library made for us; `overridden`: by a subclass of
    ours; `replaced`: for the whole process, only by platforms/."""
    why: str
    issue: str = ""
    """``owner/repository#number`` of an issue or a change that concerns it, where one is known"""

    @property
    def package(self) -> str:
        """The distribution, as `CHECKED` names it; ``python`` for the standard library."""
        root = self.name.partition(".")[0]
        return {"megatron": "megatron-core", "torch": "torch", "vllm": "vllm", "datasets": "datasets"}.get(root, "python")


_CUDA = "platforms/cpu.py"
_DIST = "torch.distributed.distributed_c10d"
_C10D = "torch._C._distributed_c10d"
_OPTIMIZER = "megatron.core.optimizer"
_HOST = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer.HybridDeviceOptimizer"
_LAYERS = "megatron.core.tensor_parallel.layers"
_RANDOM = "megatron.core.tensor_parallel.random"

_TORCH = (
    Name("distributed/collectives.py", "torch.distributed.ProcessGroup._get_backend", "read",
         "the only way to the options that the world's NCCL group was made with"),
    Name("distributed/collectives.py", f"{_C10D}.Backend.Options._timeout", "read",
         "the gloo group beside NCCL's has to wait as long; torch tells it nowhere else", "pytorch/pytorch#56531"),
    Name("distributed/topology.py", f"{_DIST}._world", "read", "the ranks of every group: torch lists groups nowhere else"),
    Name("distributed/topology.py", f"{_DIST}._get_default_store", "read",
         "the store through which the ranks met; torch hands it out nowhere else"),
    Name("distributed/topology.py", f"{_C10D}._dump_fr_trace_json", "read", "the flight recorder's entries, to explain a hang"),
    Name("distributed/topology.py", f"{_C10D}:_dump_nccl_trace_json", "read",
         "NCCL's own flight recorder; builds without CUDA lack it, and it is asked for with a default"),
    Name("bridge/files/megatron_files.py", "torch.distributed.checkpoint.filesystem._StorageInfo", "read",
         "where in its file a chunk lies: the index of a checkpoint is made of these"),
    Name("bridge/files/megatron_index.py", "torch.distributed.checkpoint.filesystem._StorageInfo", "read",
         "the only class beside those of `metadata` that an index may be made of"),
    Name("bridge/files/megatron_files.py", "torch.distributed.checkpoint.utils._create_file_view", "read",
         "a chunk within its file, as torch's own reader sees it"),
    Name("bridge/files/megatron_files.py", "torch.UntypedStorage._checkpoint_offset", "read",
         "where the values begin: they go straight from the file into their place"),
    Name("plan/dry_run/rank.py", "torch.testing._internal.distributed.fake_pg.FakeStore", "read",
         "the store of the back end `fake`, which has no public one"),
    Name("model/quantized.py", "torch.Tensor._make_wrapper_subclass", "read",
         "a tensor that holds others in place of its numbers; there is no public constructor"),
    Name("model/quantized.py", "torch._C._disabled_torch_function_impl", "read",
         "results of operations are to be plain tensors, which subclasses have to ask for by it"),
    Name("platforms/fp8.py", "torch.cpu._is_amx_tile_supported", "read", "whether vLLM's FP8 products run on this CPU"),
    Name("platforms/cpu_speed/matmul.py", "torch.ops.mkldnn._linear_pointwise", "read",
         "oneDNN's float32 product; torch's public ones are MKL's"),
    Name("weight_transfer/transports/gloo.py", "torch.distributed.ProcessGroupGloo._Options", "read",
         "a gloo group without a process-wide world, bound to an address: no public constructor takes one"),
    Name("weight_transfer/transports/gloo.py", "torch.distributed.ProcessGroupGloo._Options._devices", "set",
         "the address"),
    Name("weight_transfer/transports/gloo.py", f"{_C10D}.Backend.Options._timeout", "set", "such a group's time-out",
         "pytorch/pytorch#56531"),
    Name("weight_transfer/transports/nccl.py", f"{_C10D}.Backend.Options._timeout", "set", "such a group's time-out",
         "pytorch/pytorch#56531"),
    Name("weight_transfer/transports/ipc.py", "torch._C._accelerator_getAllocatorSettings", "read",
         "what the user has set, to write it again"),
    Name("weight_transfer/transports/ipc.py", "torch._C._accelerator_setAllocatorSettings", "read",
         "memory that other processes map must lie outside of expandable segments", "pytorch/pytorch#165685"),
    Name("weight_transfer/transports/ipc.py", "torch.UntypedStorage._share_cuda_", "read", "makes a CUDA IPC handle"),
    Name("weight_transfer/transports/ipc.py", "torch.UntypedStorage._new_shared_cuda", "read", "opens a CUDA IPC handle"),
    Name("train/checkpoint_files.py", "torch.distributed.checkpoint.filesystem.FileSystem.create_stream", "overridden",
         "takes the digest of a checkpoint's file from the bytes on their way to it"),
    Name("train/sharded_save.py", "torch.distributed.checkpoint.FileSystemWriter.write_data", "overridden",
         "tells the disk's error instead of the one that torch's serialiser stumbles over afterwards"),
    Name("train/save_copies.py", "torch.distributed.checkpoint.DefaultSavePlanner.resolve_data", "overridden",
         "weights that an asynchronous save has not copied are rounded from their main parameters when they are written"),
    Name("platforms/adam.py", "torch.optim.Optimizer.step", "overridden", "an optimizer, as torch wants one"),
)  # fmt: skip

_NO_CUDA = (
    Name(_CUDA, "torch.cuda.current_device", "replaced", "parameters, buffers and pipeline receives are allocated there",
         "NVIDIA/Megatron-LM#6270"),
    Name(_CUDA, "torch.cuda.synchronize", "replaced", "pipeline sends, timers and checkpoint writing wait for the device"),
    Name(_CUDA, "torch.cuda.stream", "replaced", "DDP and checkpoint staging name streams even where nothing overlaps"),
    Name(_CUDA, "torch.cuda.current_stream", "replaced", "as torch.cuda.stream"),
    Name(_CUDA, "torch.cuda.default_stream", "replaced", "as torch.cuda.stream"),
    Name(_CUDA, "torch.cuda.get_rng_state", "replaced", "megatron-core's RNG tracker reads the device's random state"),
    Name(_CUDA, "torch.cuda.set_rng_state", "replaced", "and writes it"),
    Name(_CUDA, "torch.cuda.random.get_rng_state", "replaced", "the same function by its other name"),
    Name(_CUDA, "torch.cuda.random.set_rng_state", "replaced", "the same function by its other name"),
    Name(_CUDA, "torch.cuda.manual_seed", "replaced", "megatron-core seeds the device"),
    Name(_CUDA, "torch.cuda.manual_seed_all", "replaced", "megatron-core seeds all devices"),
    Name(_CUDA, "torch.cuda.default_generators", "replaced", "megatron-core's RNG tracker asks for the device's generator"),
    Name(_CUDA, "torch.Tensor.cuda", "replaced", "checkpoints, optimizer state and tied embeddings are moved with it"),
    Name(_CUDA, "torch.nn.Module.cuda", "replaced", "as torch.Tensor.cuda"),
    Name(_CUDA, "torch.Tensor.type", "replaced", "the optimizers sort parameters by strings such as torch.cuda.FloatTensor"),
    Name(_CUDA, "megatron.core.tensor_parallel.random._lazy_call", "replaced",
         "the hook, bound by name, through which the RNG tracker sets the device's state"),
    Name(_CUDA, "megatron.core.pipeline_parallel.schedules.torch", "replaced", 'it writes device="cuda" for the token count'),
    Name(_CUDA, f"{_OPTIMIZER}.optimizer.torch", "replaced", 'it writes device="cuda" for loss scale and overflow buffers'),
    Name(_CUDA, f"{_OPTIMIZER}.clip_grads.torch", "replaced", 'it writes device="cuda" for norms'),
    Name("platforms/meta.py", "torch.cuda.current_device", "replaced", "the dry run allocates on the device `meta`"),
    Name("platforms/meta.py", "torch.Tensor.type", "replaced", "the optimizers do not know torch.cuda.meta.FloatTensor"),
    Name("platforms/cpu_speed/imports.py", "torch.compile", "replaced",
         "while megatron-core is imported: two seconds for functions that no layer here calls"),
    Name("platforms/cpu_speed/groups_of_one.py", "megatron.core.distributed.param_and_grad_buffer.dist_reduce_scatter_func",
         "replaced", "gloo copies where a single rank reduces in place"),
    Name("platforms/cpu_speed/groups_of_one.py", "megatron.core.distributed.param_and_grad_buffer.dist_all_gather_func",
         "replaced", "gloo copies where a single rank gathers in place"),
)  # fmt: skip

_MEGATRON = (
    Name("platforms/adam.py", f"{_OPTIMIZER}.Adam", "replaced",
         "without Transformer Engine and apex it is torch's, whose `step` reshardable checkpoints do not find"),
    Name("platforms/adam.py", f"{_OPTIMIZER}.USING_PYTORCH_OPTIMIZER", "replaced", "which of the two Adams is there"),
    Name("platforms/adam.py", f"{_OPTIMIZER}.distrib_optimizer.Adam", "replaced",
         "the distributed optimizer refuses classes that it does not know"),
    Name("platforms/adam.py", f"{_OPTIMIZER}.distrib_optimizer.HAVE_APEX_OR_TE", "replaced", "it looks for `step` in the group"),
    Name("platforms/adam.py", f"{_OPTIMIZER}.distrib_optimizer.USING_APEX_OPTIMIZER", "replaced",
         "it looks for `step` in the group"),
    Name("platforms/grad_norm.py", f"{_OPTIMIZER}.clip_grads.l2_norm_impl", "replaced",
         "the stand-in for apex's waits for a GPU as often as there are parameters"),
    Name("platforms/grad_norm.py", "megatron.core.utils.local_multi_tensor_l2_norm", "read", "to know that stand-in"),
    Name("platforms/weight_gradient.py", f"{_LAYERS}:fused_weight_gradient_mlp_cuda", "replaced",
         "apex's extension, for gradient_accumulation_fusion without apex"),
    Name("platforms/weight_gradient.py", f"{_LAYERS}._grad_accum_fusion_available", "replaced",
         "whether that extension was found at import"),
    Name("platforms/offload.py", f"{_OPTIMIZER}.HybridDeviceOptimizer", "replaced", "by our subclass of it"),
    Name("platforms/offload.py", f"{_OPTIMIZER}.distrib_optimizer.HybridDeviceOptimizer", "replaced", "makes another one"),
    Name("platforms/offload.py", f"{_HOST}.dummy_step", "overridden",
         "its state comes from a step with random gradients, which moves the weights"),
    Name("platforms/offload.py", f"{_HOST}.state_dict", "overridden",
         "classes by name, which torch does not read again, are left out of checkpoints"),
    Name("platforms/offload.py", f"{_HOST}.load_state_dict", "overridden",
         "the device's part would begin each step with the loaded count of steps; checkpoints without offload are read too"),
    Name("platforms/offload.py", f"{_HOST}._sync_sub_optimizers_state_to_hdo", "read", "after the state is made"),
    Name("platforms/offload.py", f"{_HOST}._init_sub_optimizers", "overridden", "where there is no CUDA there are no streams"),
    Name("platforms/offload.py", f"{_HOST}._get_sub_optimizer_param_groups", "overridden",
         "it offloads what is on a CUDA device; where that is a CPU, what would be is told by the share alone"),
    Name("platforms/offload.py", f"{_HOST}._move_new_state_to_right_device", "overridden", 'it writes "cuda"'),
    Name("platforms/no_fp8.py", f"{_RANDOM}.HAVE_TE", "read", "whether the three below were imported"),
    Name("platforms/no_fp8.py", f"{_RANDOM}:FP8GlobalStateManager", "replaced",
         "asked for whenever a norm is computed again, and there with Transformer Engine alone"),
    Name("platforms/no_fp8.py", f"{_RANDOM}:activation_recompute_forward", "replaced", "as FP8GlobalStateManager"),
    Name("platforms/no_fp8.py", f"{_RANDOM}:fp8_autocast", "replaced", "as FP8GlobalStateManager"),
    Name("platforms/cpu_speed/linear.py", f"{_LAYERS}.ColumnParallelLinear._forward_impl", "overridden",
         "the place where the layer multiplies; on a CPU oneDNN does"),
    Name("platforms/cpu_speed/linear.py", f"{_LAYERS}.RowParallelLinear._forward_impl", "overridden",
         "the place where the layer multiplies; on a CPU oneDNN does"),
    Name("platforms/cpu_speed/linear.py", f"{_LAYERS}:grad_added_to_main_grad", "set",
         "tells DDP that the gradient is in its buffer already"),
    Name("model/logprobs.py", f"{_LAYERS}:grad_added_to_main_grad", "set", "as in platforms/cpu_speed/linear.py"),
    Name("model/logprobs.py", "megatron.core.distributed.distributed_data_parallel:zero_out_wgrad", "read",
         "whether an embedding shares the weight"),
    Name("model/messages.py", "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator.send_forward_recv_forward",
         "overridden", "keeps what is sent until the message is waited for: the interleaved schedule frees it before",
         "NVIDIA/Megatron-LM#4047"),
    Name("model/messages.py", "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator._communicate_shapes",
         "overridden", "all ranks know the shapes of a step's packs; sent ahead, the host would wait for each"),
    Name("model/gpt.py", f"{_LAYERS}.ColumnParallelLinear.forward", "overridden", "hands hidden states on"),
    Name("model/lean_mlp.py", "megatron.core.transformer.mlp.MLP.forward", "overridden",
         "a dense feed-forward's activation is computed again, which megatron-core does in mixtures of experts only"),
    Name("model/gpt.py", "megatron.core.models.gpt.gpt_model:rotary_pos_emb", "set",
         "GPTModel builds a rotary embedding of its own class; ours takes its place as the model is built"),
    Name("model/gpt.py", "megatron.core.models.gpt.gpt_model:output_layer", "set",
         "GPTModel builds an output layer of its own class; ours takes its weight and its place as the model is built"),
    Name("model/gpt.py",
         "megatron.core.models.common.language_module.language_module.LanguageModule.compute_language_model_loss", "overridden",
         "where GPTModel turns logits into a loss, we give log-probabilities"),
    Name("model/quantized.py", "torch.utils._pytree.tree_map_only", "read",
         "an operation's arguments with weights of blocks made whole, wherever they lie in lists"),
    Name("model/reward.py",
         "megatron.core.models.common.language_module.language_module.LanguageModule.compute_language_model_loss", "overridden",
         "where GPTModel turns logits into a loss, we give scores"),
    Name("model/reward.py", "megatron.core.models.gpt.gpt_model:output_layer", "set", "the head of one row takes its place"),
    Name("model/reward.py", "megatron.core.models.gpt.gpt_model.GPTModel.sharded_state_dict", "overridden",
         "a reward model's head is not padded"),
    Name("model/rope.py", "megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.get_rotary_seq_len",
         "overridden", "the only call before a pass that sees the pack"),
    Name("model/rope.py", "megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.forward", "overridden",
         "angles of every token's own position"),
    Name("model/rope.py", "megatron.core.models.common.embeddings.rotary_pos_embedding:inv_freq", "set",
         "it knows Llama 3's scaling with its published constants only"),
    Name("model/rope.py", "megatron.core.transformer.attention.Attention.forward", "overridden",
         "each layer takes its own angles out of those of all kinds"),
    Name("platforms/group_sets.py", "megatron.core.parallel_state._GLOBAL_MEMORY_BUFFER", "replaced",
         "a model under a second layout has groups of its own: while it works all names in capitals change, but not these"),
    Name("platforms/group_sets.py", "megatron.core.parallel_state._GLOBAL_SYMMETRIC_MEMORY_BUFFER", "replaced",
         "as the one before"),
    Name("train/sharded_save.py",
         "megatron.core.dist_checkpointing.strategies.torch._replace_state_dict_keys_with_sharded_keys", "read",
         "the state as torch's planner wants it; megatron-core's own `save` writes from processes that outlive a killed rank"),
    Name("train/optimizer.py", f"{_OPTIMIZER}.distrib_optimizer:data_parallel_group_gloo", "set",
         "get_megatron_optimizer takes this group from parallel_state alone, which has none where gloo carries everything"),
    Name("train/optimizer.py", f"{_OPTIMIZER}.optimizer:optimizer", "set",
         "the AdamW that keeps bf16 moments; megatron-core makes one of the class that it knows"),
    Name("train/rounded_adam.py", "torch.optim.Optimizer.step", "overridden", "an optimizer, as torch wants one"),
    Name("train/rounded_adam.py", "torch.optim.Optimizer.load_state_dict", "overridden",
         "it would make moments of the parameters' type"),
    Name("train/optimizer.py", f"{_OPTIMIZER}.optimizer:init_state_fn", "set",
         "get_megatron_optimizer gives SGD without momentum None, yet loading a checkpoint calls it"),
    Name("train/optimizer.py", "megatron.core.optimizer_param_scheduler:num_steps", "set",
         "the rate of a step by its number; the constructor has it at 0"),
)  # fmt: skip

_OTHERS = (
    Name("vllm_plugin/plugin.py", "vllm.distributed.weight_transfer.factory:_registry", "read",
         "whether our engine is registered: to register it again raises"),
    Name("data/sources.py", "datasets.arrow_dataset:_fingerprint", "read", "which version of a data set the store was made of"),
    Name("process.py", "threading._shutdown", "read", "waits for threads, as `multiprocessing` does in the processes it starts"),
    Name("rewards/sandboxed/stubs.py", "sys._getframe", "read", "who asks for a hash: asyncio's loops do so of each coroutine"),
    Name("process.py", "atexit._run_exitfuncs", "read", "the end of a process whose modules are not taken apart"),
)  # fmt: skip

SURFACE: tuple[Name, ...] = (*_TORCH, *_NO_CUDA, *_MEGATRON, *_OTHERS)
"""By library. A name stands once for each file that uses it."""
