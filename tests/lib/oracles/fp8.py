"""What vLLM makes of FP8 blocks, in a process of its own: its quantization of a model's matrices, and its model given a stream.

    python fp8.py MODEL_DIR STREAM.pt OUT.pt

Products in FP8 blocks want a GPU or a CPU with AMX: their kernel is left out, places for weights and loaders are vLLM's own.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn

from tulu_mega.inference.command_line import ServerOptions, command
from tulu_mega.weight_transfer.protocol import (
    Expected,
    begin_message,
    bucket_message,
    checksum,
    commit_message,
    plan_buckets,
    view,
)


def quantized(directory: str) -> dict[str, torch.Tensor]:
    """The layers' matrices as vLLM quantizes them, under the names of block-quantized checkpoints."""
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    cast = getattr(per_block_cast_to_fp8, "_torchdynamo_orig_callable", per_block_cast_to_fp8)  # as written, not compiled
    found = {}
    for name, weight in load_file(f"{directory}/model.safetensors").items():
        if name.endswith("_proj.weight"):
            found[name], found[f"{name}_scale_inv"] = cast(weight)
    return found


def updated(directory: str, stream: dict[str, torch.Tensor]) -> tuple[nn.Module, list[str], list[str]]:
    """vLLM's model as a server's command line has it, after our worker's engine gave it a stream; what was wrong with that
    update, and with one before it that lacked the scales."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    from tulu_mega.vllm_plugin.worker import LiveWeightsEngine

    words = command(ServerOptions(directory, dtype="bfloat16", fp8=True), port=0, on_cpu=True)
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    config = EngineArgs(
        model=directory, dtype="bfloat16", hf_overrides=overrides, load_format="dummy", enforce_eager=True, max_model_len=64,
        skip_tokenizer_init=True,
    ).create_engine_config()  # fmt: skip
    no_kernel = SimpleNamespace(process_weights_after_loading=lambda layer: None)
    with set_current_vllm_config(config), patch.object(fp8, "init_fp8_linear_kernel", lambda **_: no_kernel):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        model = initialize_model(config)
        record_metadata_for_reloading(model)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        engine = LiveWeightsEngine(None, config, torch.device("cpu"), model)
        without = {name: tensor for name, tensor in stream.items() if not name.endswith("_scale_inv")}
        refused = update(engine, 1, without)
        return model, update(engine, 2, stream), refused


def update(engine, version: int, stream: dict[str, torch.Tensor]) -> list[str]:
    """A whole update by the protocol, every bucket in the same memory."""
    manifest = {name: Expected(tuple(each.shape), str(each.dtype).removeprefix("torch."), 0) for name, each in stream.items()}
    buckets = plan_buckets(0, stream, manifest, 2**18)
    memory = torch.empty(max(bucket.nbytes for bucket in buckets), dtype=torch.uint8)
    engine._inboxes = {0: SimpleNamespace(receive=lambda slot, nbytes: memory, close=lambda: None)}
    engine.start_weight_update()
    engine.update_weights(begin_message(version, manifest, load=True))
    for bucket in buckets:
        for place in bucket.places:
            view(memory, place, manifest[place.name]).copy_(stream[place.name])
        engine.update_weights(bucket_message(version, bucket))
        memory.fill_(255)
    engine.update_weights(commit_message(version, {name: checksum(each) for name, each in stream.items()}))
    problems = engine.status()["problems"]
    engine.finish_weight_update()
    return problems


def main(directory: str, stream: str, out: str) -> None:
    mine = {
        name: each.view(torch.float8_e4m3fn) if each.element_size() == 1 else each for name, each in torch.load(stream).items()
    }
    tensors = quantized(directory)
    model, problems, refused = updated(directory, mine)
    tensors |= {f"vllm {name}": parameter.data for name, parameter in model.named_parameters()}
    plain = {name: each.view(torch.uint8) if each.element_size() == 1 else each for name, each in tensors.items()}
    torch.save({"tensors": plain, "problems": problems, "refused": refused}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
