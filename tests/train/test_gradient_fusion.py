"""megatron-core's linear layers with `gradient_accumulation_fusion` through the stand-in for apex, against float64 autograd."""

from __future__ import annotations

import importlib.machinery
import os
import sys

import pytest
import torch

from tests.lib import world

pytestmark = pytest.mark.ranks

ROWS, INPUT, OUTPUT, MICRO_BATCHES = 6, 8, 12, 2


def case(dtype: torch.dtype) -> list[torch.Tensor]:
    """Weight, and of each micro-batch input and upstream gradient, all exact in `dtype`; what the buffer held before."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(OUTPUT, INPUT), (MICRO_BATCHES, ROWS, 1, INPUT), (MICRO_BATCHES, ROWS, 1, OUTPUT), (OUTPUT, INPUT)]
    return [torch.randn(shape, generator=generator).to(dtype).float() for shape in shapes]


def column_parallel(precision: str, buffer: str, sequence_parallel: bool):
    """The gradient that a rank's buffer holds after the micro-batches, and the last input's."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from tulu_mega import platforms
    from tulu_mega.config import ParallelSettings
    from tulu_mega.distributed import topology

    size = int(os.environ["WORLD_SIZE"])
    place = topology.start(ParallelSettings(tensor=size), platforms.install(), seed=0)
    dtype = getattr(torch, precision)
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        gradient_accumulation_fusion=True,
    )
    layer = ColumnParallelLinear(INPUT, OUTPUT, config=config, init_method=lambda weight: None, bias=False)
    weight, inputs, upstreams, before = case(dtype)
    mine = slice(place.tensor_rank * OUTPUT // size, (place.tensor_rank + 1) * OUTPUT // size)
    share = slice(place.tensor_rank * ROWS // size, (place.tensor_rank + 1) * ROWS // size) if sequence_parallel else slice(None)
    layer.weight.data.copy_(weight[mine])
    layer.weight.main_grad = before[mine].to(getattr(torch, buffer))
    layer.weight.grad_added_to_main_grad = False  # as megatron-core's DDP has it
    for x, upstream in zip(inputs, upstreams, strict=True):
        x = x[share].to(dtype).requires_grad_()
        layer(x)[0].backward(upstream[..., mine].to(dtype))
    assert layer.weight.grad_added_to_main_grad and layer.weight.main_grad.dtype == getattr(torch, buffer)
    return layer.weight.main_grad.float().numpy(), x.grad.float().numpy()


@pytest.mark.parametrize(
    ("precision", "buffer", "size", "sequence_parallel"),
    [
        ("float32", "float32", 1, False),
        ("bfloat16", "bfloat16", 1, False),
        ("bfloat16", "float32", 2, False),
        ("float32", "float32", 2, True),
    ],
)
def test_gradient_is_autograds(precision, buffer, size, sequence_parallel):
    ranks = world.run(size, column_parallel, precision, buffer, sequence_parallel)
    weight, inputs, upstreams, before = (x.double() for x in case(getattr(torch, precision)))
    weight.requires_grad_()
    last = inputs[-1].clone().requires_grad_()
    for x, upstream in zip((*inputs[:-1], last), upstreams, strict=True):
        (x @ weight.t()).backward(upstream)
    got = torch.cat([torch.from_numpy(gradient) for gradient, _ in ranks])
    # into float32 nothing is rounded to bf16 on the way, whatever the weights are
    close = dict(rtol=1e-5, atol=1e-5) if buffer == "float32" else dict(rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(got.double(), before + weight.grad, **close)
    shares = [torch.from_numpy(gradient).double() for _, gradient in ranks]
    of_input = torch.cat(shares) if sequence_parallel else shares[0]
    close = dict(rtol=1e-5, atol=1e-5) if precision == "float32" else dict(rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(of_input, last.grad, **close)


def offered(directory: str):
    """What the extension's name leads to: the stand-in, installed twice; then, in the place of it, what is on the path."""
    from megatron.core.tensor_parallel import layers

    from tulu_mega.platforms import weight_gradient

    weight_gradient.install()
    import fused_weight_gradient_mlp_cuda as ours

    weight_gradient.install()
    taken = layers._grad_accum_fusion_available and layers.fused_weight_gradient_mlp_cuda is ours
    del sys.modules[ours.__name__]
    sys.path.insert(0, directory)
    weight_gradient.install()
    import fused_weight_gradient_mlp_cuda as real

    return taken, ours.__doc__[:10], real.mark


def test_the_stand_in_gives_way_to_apex(tmp_path):
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("mark = 'apex'\n")
    if importlib.machinery.PathFinder.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        pytest.skip("apex's extension is installed")
    assert world.run(1, offered, str(tmp_path)) == [(True, "A stand-in", "apex")]


def test_a_coarser_buffer_is_refused():
    from tulu_kernels.weight_gradient import add_product

    with pytest.raises(ValueError, match=r"torch.bfloat16 for factors of torch.float32.*accumulate gradients in float32"):
        add_product(torch.zeros(2, 2, dtype=torch.bfloat16), torch.ones(3, 2), torch.ones(3, 2))
