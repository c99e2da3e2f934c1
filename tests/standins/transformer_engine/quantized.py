"""FP8 in `compiled`: tensors are quantized as Transformer Engine's kernels do it for each of its quantizers, and products take
what Hopper's cuBLAS would."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "compute_amax",
    "dequantize",
    "fp8_block_scaling_compute_partial_amax",
    "fp8_block_scaling_partial_cast",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "quantize",
]

BLOCK = 128


def _compiled():
    from tests.standins.transformer_engine import compiled  # which imports this file

    return compiled


def _storages():
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    return Float8TensorStorage, Float8BlockwiseQTensorStorage


def quantize(tensor, quantizer, output=None, noop=None):
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    if noop is not None and noop.item():
        return output
    values = tensor.detach().contiguous()
    if isinstance(quantizer, Float8BlockQuantizer):
        return _by_blocks(values, quantizer, output)
    kind = _compiled().TORCH[quantizer.dtype]
    largest = torch.finfo(kind).max
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if not quantizer.use_existing_amax:
            compute_amax(values, quantizer.amax)
        if quantizer.with_amax_reduction:
            dist.all_reduce(quantizer.amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        quantizer.scale.copy_(scale_of(quantizer.amax, largest, quantizer.amax_epsilon, quantizer.force_pow_2_scales))
    else:
        assert isinstance(quantizer, Float8Quantizer), type(quantizer)
        quantizer.amax.copy_(torch.maximum(quantizer.amax, values.abs().amax().float()))
    scale = quantizer.scale
    data = (values.float() * scale).clamp(-largest, largest).to(kind).view(torch.uint8)
    transposed = data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None
    inverse = scale.reciprocal().view(1)
    return _tensor_of(quantizer, values, data if quantizer.rowwise_usage else None, transposed, inverse, output)


def _tensor_of(quantizer, values: Tensor, data, transposed, inverse: Tensor, output):
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    assert data is not None or transposed is not None, "a quantizer that keeps nothing"
    if output is None:
        parts = dict(data=data, fp8_scale_inv=inverse, fp8_dtype=quantizer.dtype, data_transpose=transposed, quantizer=quantizer)
        storage, _ = _storages()
        return storage(**parts) if quantizer.internal else Float8Tensor(shape=values.shape, dtype=values.dtype, **parts)
    output._data = _into(output._data, data)
    output._transpose = _into(output._transpose, transposed)
    output._transpose_invalid = transposed is None
    output._scale_inv.copy_(inverse.view_as(output._scale_inv))
    output._fp8_dtype = quantizer.dtype
    return output


def _into(held: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if held is None or new is None else held.copy_(new)


def scale_of(amax: Tensor, largest: float, epsilon: float, power_of_two: bool) -> Tensor:
    """The factor before the cast; 1 where there is nothing to scale."""
    bounded = amax.float().clamp(min=epsilon)
    scale = largest / bounded
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    scale = torch.where((bounded == 0) | ~torch.isfinite(bounded), 1.0, scale)
    return torch.exp2(scale.log2().floor()) if power_of_two else scale


def _by_blocks(values: Tensor, quantizer, output):
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    _, storage = _storages()
    rows = values.reshape(-1, values.shape[-1])
    square = quantizer.block_scaling_dim == 2
    compact = quantizer.all_gather_usage
    made = dict(rowwise_data=None, rowwise_scale_inv=None, columnwise_data=None, columnwise_scale_inv=None)
    if quantizer.rowwise_usage:
        data, inverse = _blocks(rows, quantizer, BLOCK if square else 1)
        made["rowwise_data"] = data.view(values.shape)
        shape = quantizer.get_scale_shape(values.shape, columnwise=False)
        made["rowwise_scale_inv"] = _padded(inverse if square or compact else inverse.t(), shape)
    if quantizer.columnwise_usage:
        data, inverse = _blocks(rows.t().contiguous(), quantizer, BLOCK if square else 1)
        if compact:
            data, inverse = data.t().contiguous().view(values.shape), inverse.t()
        elif not square:
            inverse = inverse.t()
        made["columnwise_data"] = data.view(quantizer.get_columnwise_shape(values.shape))
        made["columnwise_scale_inv"] = _padded(inverse, quantizer.get_scale_shape(values.shape, columnwise=True))
    if output is not None:
        for name, new in made.items():
            setattr(output, f"_{name}", _into(getattr(output, f"_{name}"), new))
        return output
    formats = _compiled().Float8BlockScaleTensorFormat
    kept = dict(
        **made, fp8_dtype=quantizer.dtype, quantizer=quantizer, is_2D_scaled=square,
        data_format=formats.COMPACT if compact else formats.GEMM_READY,
    )  # fmt: skip
    if quantizer.internal:
        return storage(**kept)
    return Float8BlockwiseQTensor(shape=values.shape, dtype=values.dtype, **kept)


def _blocks(rows: Tensor, quantizer, height: int) -> tuple[Tensor, Tensor]:
    """Of [M, K]: bytes [M, K], and what dequantizes each block, [ceil(M / height), ceil(K / 128)]."""
    kind = _compiled().TORCH[quantizer.dtype]
    largest = torch.finfo(kind).max
    M, K = rows.shape
    padded = F.pad(rows.float(), (0, -K % BLOCK, 0, -M % height))
    tiles = padded.view(padded.shape[0] // height, height, -1, BLOCK)
    scale = scale_of(tiles.abs().amax((1, 3)), largest, quantizer.amax_epsilon, quantizer.force_pow_2_scales)
    data = (tiles * scale[:, None, :, None]).clamp(-largest, largest).to(kind).view(torch.uint8)
    return data.view(padded.shape)[:M, :K].contiguous(), scale.reciprocal()


def _padded(scales: Tensor, shape: tuple[int, int]) -> Tensor:
    padded = scales.new_zeros(shape)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    return padded


def factor(operand, rowwise: bool) -> Tensor:
    """A factor of a product, [rows, summed]. FP8 products of Hopper take bytes with the summed dimension last: those quantized
    row by row, or those that were transposed before; cuBLAS asks for rows of whole 16 bytes.

    Args:
        rowwise: whether the operand's own last dimension is the one that is summed.
    """
    per_tensor, by_blocks = _storages()
    if isinstance(operand, per_tensor):
        held = operand._data if rowwise else operand._transpose
        assert held is not None and (rowwise or not operand._transpose_invalid), f"no {'row' if rowwise else 'column'}-wise bytes"
        found = held.view(_compiled().TORCH[operand._fp8_dtype]).float() * operand._scale_inv
        found = found.reshape(-1, held.shape[-1]) if rowwise else found.reshape(held.shape[0], -1)
    elif isinstance(operand, by_blocks):
        side = "rowwise" if rowwise else "columnwise"
        held = getattr(operand, f"_{side}_data")
        assert held is not None, f"no {side} bytes"
        assert operand._data_format == _compiled().Float8BlockScaleTensorFormat.GEMM_READY
        names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
        parts = {name: getattr(operand, f"_{name}") if name.startswith(side) else None for name in names}
        alone = by_blocks(
            **parts, fp8_dtype=operand._fp8_dtype, quantizer=operand._quantizer, is_2D_scaled=operand._is_2D_scaled,
            data_format=operand._data_format,
        )  # fmt: skip
        values = alone.dequantize()
        values = values.reshape(-1, values.shape[-1])
        found = values if rowwise else values.t()
    else:
        values = operand.reshape(-1, operand.shape[-1])
        return values if rowwise else values.t()
    assert found.shape[1] % 16 == 0, f"rows of {found.shape[1]} bytes: a caller has to pad for FP8 products"
    return found


def dequantize(input, otype):
    per_tensor, _ = _storages()
    compiled = _compiled()
    assert isinstance(input, per_tensor)
    held = input._data if input._data is not None else input._transpose.movedim(0, -1)
    return (held.view(compiled.TORCH[input._fp8_dtype]).float() * input._scale_inv).to(compiled.TORCH[otype])


def fp8_transpose(input, dtype, *, out=None):
    transposed = input.movedim(-1, 0).contiguous()
    return transposed if out is None else out.copy_(transposed)


def compute_amax(input, amax):
    amax.copy_(input.abs().amax().float().view_as(amax))


def fused_amax_and_scale_update_after_reduction(amax_reduction_buffer, amax_histories, scales, algorithm, fp8_dtype, margin):
    """As its header documents it: the reduced largest magnitudes are the newest of the history, which moves on by one; scales are
    made of the largest or of the newest."""
    largest, at = torch.finfo(_compiled().TORCH[fp8_dtype]).max, 0
    for history, scale in zip(amax_histories, scales, strict=True):
        count = scale.numel()
        history[0] = amax_reduction_buffer[at : at + count]
        at += count
        amax = history.amax(0) if algorithm == "max" else history[0].clone()
        history.copy_(history.roll(-1, 0))
        history[0] = 0.0
        new = largest / amax / 2**margin
        new = torch.where((amax > 0) & torch.isfinite(amax), new, scale)
        scale.copy_(torch.where(torch.isinf(new), torch.finfo(torch.float32).max, new))


def fp8_block_scaling_compute_partial_amax(tensor, amax, h, w, start_offset, block_len):
    """The largest magnitude in each block [h / block, w / block] of a matrix of which only a part is here.

    Args:
        tensor: values from `start_offset` on, of the matrix end to end.
    """
    whole = torch.zeros(h * w)
    whole[start_offset : start_offset + tensor.numel()] = tensor.float().abs().view(-1)
    padded = F.pad(whole.view(h, w), (0, -w % block_len, 0, -h % block_len))
    tiles = padded.view(padded.shape[0] // block_len, block_len, -1, block_len).amax((1, 3))
    amax[: tiles.shape[0], : tiles.shape[1]].copy_(tiles)


def fp8_block_scaling_partial_cast(inp, out, scale, h, w, start_offset, block_len, out_dtype):
    """Bytes of such a part by the scales of its blocks."""
    kind = _compiled().TORCH[out_dtype]
    largest = torch.finfo(kind).max
    at = torch.arange(start_offset, start_offset + inp.numel())
    of_each = scale[at // w // block_len, at % w // block_len]
    out.view(-1).copy_((inp.float().view(-1) * of_each).clamp(-largest, largest).to(kind).view(torch.uint8))
