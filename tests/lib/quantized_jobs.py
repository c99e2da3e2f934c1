"""What bitsandbytes, PEFT and ranks do in the tests of quantized frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.lib import jobs, lora_jobs
from tulu_mega.bridge import nf4
from tulu_mega.config import OptimSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.model.quantized import BlockWeight
from tulu_mega.objectives.sft import SftObjective

LR, STEPS = 0.05, 3


def matrices() -> list[Tensor]:
    """Of several types, rows of unlike sizes, a block of zeros in each."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for kind, shape in ((torch.float32, (300, 1024)), (torch.bfloat16, (96, 64)), (torch.bfloat16, (640, 320))):
        rows = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
        rows[3, :64] = 0
        made.append(rows.to(kind))
    return made


def compare_blocks() -> None:
    """Asserts that our blocks of some matrices are bitsandbytes'."""
    lora_jobs.see_oracles()
    from bitsandbytes import functional

    for weight in matrices():
        rows, columns = weight.shape
        numbers, scales = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(rows, columns // nf4.BLOCK)
        nf4.quantize(weight, numbers, scales)
        theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
        assert torch.equal(numbers.flatten(), theirs.flatten()) and torch.equal(scales.flatten(), state.absmax)
        again = torch.empty_like(weight)
        nf4.dequantize(numbers, scales, again)
        assert torch.equal(again, functional.dequantize_4bit(theirs, state))

        of, largest, offset = nf4.quantize_scales(scales.flatten())
        theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(nf4.scale_levels(torch.device("cpu")), state.state2.code)
        assert torch.equal(largest, state.state2.absmax) and torch.equal(offset, state.offset)
        each = largest.repeat_interleave(nf4.GROUP)[: len(of)]
        their_scales = nf4.dequantize_scales(state.absmax.flatten(), each, offset)
        nf4.dequantize(numbers, their_scales.view(scales.shape), again)
        assert torch.equal(again, functional.dequantize_4bit(theirs, state))
        ours = nf4.dequantize_scales(of, each, offset)
        assert bool(((ours - scales.flatten()).abs() <= (their_scales - scales.flatten()).abs() + 1e-7 * scales.max()).all())
        assert (of != state.absmax.flatten()).float().mean() < 0.01


def make_model(directory: str, biased: bool = False) -> None:
    """A model of which each of two tensor ranks has whole blocks."""
    import transformers

    family = "Qwen2" if biased else "Llama"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, vocab_size=509, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)


def truth(root: str, how: dict[str, Any], biased: bool) -> dict[str, Any]:
    """Trains PEFT's adapters beside bitsandbytes' layers, in ROOT/model, ROOT/adapter and ROOT/trained."""
    make_model(f"{root}/model", biased)
    lora_jobs.see_oracles()
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(f"{root}/model", dtype=torch.float32)
    for name, linear in list(base.model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            made = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.float32, False, "nf4", device="meta"
            )
            weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made)
            made.weight, made.bias = weight, linear.bias
            parent, _, last = name.rpartition(".")
            setattr(base.model.get_submodule(parent), last, made.to("cpu"))
    torch.manual_seed(7)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, init_lora_weights=False, **how))
    model.save_pretrained(f"{root}/adapter")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    steps = torch.optim.SGD(trained.values(), lr=LR)
    seen = lora_jobs.stepped(model, list(trained.values()), steps)
    model.save_pretrained(f"{root}/trained")
    return seen


def trained(directory: str, layout: dict[str, Any], lora: dict[str, Any], out: str, recompute: str = "none") -> dict[str, Any]:
    """The same by the engine under a layout, in OUT/adapter and OUT/hf.

    Returns:
        losses and norms of the steps, bytes of the frozen blocks and weights that they stand for, and bytes that autograd keeps
        of weights made whole.
    """
    with jobs.session(directory, layout, recompute=recompute, lora=LoraSettings.model_validate(lora)) as made:
        engine = made.engine
        optim = OptimSettings(name="sgd", lr=LR, schedule="constant", warmup=0.0, clip=0.0, weight_decay=0.0)
        engine.prepare_training(optim, STEPS)
        blocks = [each for chunk in engine.chunks for each in chunk.parameters() if isinstance(each, BlockWeight)]
        wholes = [like for each in blocks for like in (each.whole(), each.whole().t())]
        seen: dict[str, Any] = {"losses": [], "norms": [], "whole": 0}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, BlockWeight) and any(torch.equal(tensor, like) for like in wholes):
                seen["whole"] += tensor.nbytes
            return tensor

        for step in range(STEPS):
            micro = jobs.share(made, jobs.sequences(engine.hf.vocab_size, seed=3 + step), 2)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = engine.forward_backward(micro, SftObjective("token_mean"))
            seen["losses"].append(loss.loss)
            seen["norms"].append(engine.optimizer_step(step, loss.loss).grad_norm)
        made.export_adapters(Path(out, "adapter"), torch.float32)
        made.export(Path(out, "hf"), torch.float32, {})
        seen["bytes"] = sum(part.nbytes for each in blocks for part in each.held)
        assert seen["bytes"] == sum(each.held_bytes for each in blocks)
        seen["weights"] = sum(each.numel() for each in blocks)
        return seen


def held(directory: str, layout: dict[str, Any], lora: LoraSettings) -> int:
    """Bytes that a rank's parameters take, once loaded."""
    with jobs.session(directory, layout, "bf16", lora=lora) as made:
        parameters = [each for chunk in made.engine.chunks for each in chunk.parameters()]
        blocks = [each for each in parameters if isinstance(each, BlockWeight)]
        plain = sum(each.nbytes for each in parameters if not isinstance(each, BlockWeight))
        return plain + sum(part.nbytes for each in blocks for part in each.held)
