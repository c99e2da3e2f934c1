"""Whether the ranks that were built make up the model, and agree with one another. Pure: problems as sentences with names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from tulu_mega.bridge.adapters import adapter_family
from tulu_mega.bridge.box import Box
from tulu_mega.bridge.fp8 import is_quantized, scales_name
from tulu_mega.bridge.rules import Config, Family
from tulu_mega.config import ParallelSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed.grid import ShardGrid
from tulu_mega.errors import UserError
from tulu_mega.layout.stages import stage_layers
from tulu_mega.plan.dry_run.cover import uncovered
from tulu_mega.plan.dry_run.record import RankReport, Shard
from tulu_mega.plan.model.adapters import adapters_by_layer, stage_adapters
from tulu_mega.plan.model.parameters import stage_shards

_TOLD = 8
"""problems of a kind that are told; of a fault in a rule every layer has one"""


def problems(
    layout: ShardGrid,
    first: Sequence[RankReport],
    last: Sequence[RankReport],
    family: Family,
    config: Config,
    hf_shapes: Mapping[str, tuple[int, ...]],
    parallel: ParallelSettings,
    lora: LoraSettings | None = None,
) -> list[str]:
    """Everything that does not fit.

    Args:
        first: the ranks of the first copy, by stage and tensor rank.
        last: ranks of the last copy, of some or all stages.
        family: the model's table.
        config: its config.json.
        hf_shapes: its tensors and their shapes as transformers has them.
        parallel: the layout's settings, for the planner.
        lora: adapters that train beside.
    """
    kinds = (
        _table(family, config, hf_shapes),
        _tensors(layout, [report.shards for report in first], [report.stage for report in first], family, config, hf_shapes),
        _adapters(layout, first, family, config, lora) if lora else (),
        _copies(layout, first, last),
        _shared_optimizer(layout, first, last),
        _checkpoint(first),
        _streams(first, hf_shapes),
        _planned(layout, first, config, parallel, lora),
    )
    found = []
    for kind in kinds:
        told = list(kind)
        found += told[:_TOLD] + ([f"... and {len(told) - _TOLD} more of this kind"] if len(told) > _TOLD else [])
    return found


def _table(family: Family, config: Config, hf_shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The table against transformers."""
    try:
        ours = family.hf_shapes(config)
    except UserError as error:
        yield from error.problems
        return
    for name in sorted(ours.keys() | hf_shapes.keys()):
        here, there = ours.get(name), hf_shapes.get(name)
        if here is None:
            yield f"{name}: transformers' model has it ({list(there)}), the table of {family.architecture} does not"
        elif there is None:
            yield f"{name}: the table of {family.architecture} has it ({list(here)}), transformers' model does not"
        elif tuple(here) != tuple(there):
            yield f"{name}: {list(here)} by the table of {family.architecture}, {list(there)} in transformers' model"


def _adapters(
    layout: ShardGrid, first: Sequence[RankReport], family: Family, config: Config, lora: LoraSettings
) -> Iterator[str]:
    """The union of all that trains against the table of adapters."""
    thin = adapter_family(family, lora, config)
    trained, stages = [report.adapters for report in first], [report.stage for report in first]
    yield from _tensors(layout, trained, stages, thin, config, thin.hf_shapes(config))


def _tensors(
    layout: ShardGrid,
    held: Sequence[Sequence[Shard]],
    stages: Sequence[int],
    family: Family,
    config: Config,
    hf_shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[str]:
    """The union of all shards against the whole model: each place of each tensor held once, tied and replicated ones aside.

    Args:
        held, stages: of each rank, its shards and its stage.
    """
    boxes: dict[str, list[Box]] = defaultdict(list)
    tied: dict[str, list[Box]] = defaultdict(list)
    for stage in range(layout.pipeline):
        group = [shards for shards, own in zip(held, stages, strict=True) if own == stage]
        for shards in zip(*group, strict=True):
            yield from _parameter(shards, layout, family, config, boxes, tied)
    for name, shape in hf_shapes.items():
        if wrong := uncovered(tuple(shape), boxes.pop(name, [])):
            yield f"{name}: {wrong}"
        if name in tied and (wrong := uncovered(tuple(shape), tied[name])):
            yield f"{name}, the copy that is the head: {wrong}"
    for name in boxes:
        yield f"{name}: held by ranks, but transformers' model has no such tensor"


def _parameter(
    shards: Sequence[Shard],
    layout: ShardGrid,
    family: Family,
    config: Config,
    boxes: dict[str, list[Box]],
    tied: dict[str, list[Box]],
) -> Iterator[str]:
    """One parameter on all tensor ranks."""
    name = shards[0].name
    try:
        shape = tuple(family.local_shape(name, config, layout))
        pieces = [family.pieces(name, config, each) for each in layout.tensor_peers()]
    except UserError as error:
        yield from error.problems
        return
    for rank, shard in enumerate(shards):
        if (shard.name, shard.cut) != (name, shards[0].cut):
            yield f"tensor rank {rank} has {shard.name} (cut: {shard.cut}) where tensor rank 0 has {name} (cut: {shards[0].cut})"
        if tuple(shard.shape) != shape:
            yield f"{name}: megatron-core's shard on tensor rank {rank} is {list(shard.shape)}, the table asks for {list(shape)}"
    if not shards[0].cut:
        if any(each != pieces[0] for each in pieces):
            yield f"{name}: the table cuts it over tensor ranks, megatron-core takes it for the same on all of them"
        pieces = pieces[:1]
    for piece in (piece for each in pieces for piece in each):
        (tied if piece.duplicate else boxes)[piece.hf_name].append(piece.hf_box)


def _copies(layout: ShardGrid, first: Sequence[RankReport], last: Sequence[RankReport]) -> Iterator[str]:
    """The last copy holds what the first does."""
    of = {(report.stage, report.tensor_rank): report for report in first}
    expected = [(stage, tensor_rank) for stage in range(layout.pipeline) for tensor_rank in range(layout.tensor)]
    if list(of) != expected:
        yield f"ranks of (stage, tensor rank) {list(of)} were built, expected {expected}"
    for report in last:
        same = of.get((report.stage, report.tensor_rank))
        if same and (report.shards, report.adapters, report.layers) != (same.shards, same.adapters, same.layers):
            yield f"rank {report.rank} holds other parameters than rank {same.rank}, of which it is a copy"


def _shared_optimizer(layout: ShardGrid, first: Sequence[RankReport], last: Sequence[RankReport]) -> Iterator[str]:
    """Each parameter's state is held by one of the ranks that share it, and the ranks built hold what the buffers say."""
    for report in (*first, *last):
        training = report.training
        if training is None:
            continue
        who = f"rank {report.rank}"
        if training.main != training.held_D[report.copy]:
            yield f"{who}: its optimizer has {training.main:,} elements, the buffers give it {training.held_D[report.copy]:,}"
        whole, copies = sum(training.held_D), 1 if training.sharded else layout.copies
        if whole != report.trained * copies:
            yield f"{who}: the optimizers of its {layout.copies} copies have {whole:,} elements, of {report.trained:,}"


def _checkpoint(first: Sequence[RankReport]) -> Iterator[str]:
    """The weights that the ranks write make up the tensors of the checkpoint."""
    shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    boxes: dict[str, list[Box]] = defaultdict(list)
    for report in first:
        for stored in report.stored:
            shapes[stored.key].add(tuple(stored.whole))
            boxes[stored.key].append(stored.box)
    for key, told in shapes.items():
        if len(told) > 1:
            yield f"checkpoint: {key} has the shapes {sorted(map(list, told))} on different ranks"
        elif wrong := uncovered(next(iter(told)), boxes[key]):
            yield f"checkpoint: {key}: {wrong}"


def _streams(first: Sequence[RankReport], hf_shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The rollout engines get every tensor once; in FP8, the scales of every matrix too."""
    sending = [report.sending for report in first if report.sending]
    if not sending:
        return
    times = Counter(name for each in sending for name in each.tensors)
    scales = {scales_name(name) for name in hf_shapes if is_quantized(name)}
    expected = hf_shapes.keys() | (scales if times.keys() & scales else set())
    for name in sorted(times.keys() | expected):
        if name not in expected:
            yield f"{name}: sent to the rollout engines, but transformers' model has no such tensor"
        elif times[name] != 1:
            yield f"{name}: sent to the rollout engines {times[name]} times, expected once"


def _planned(
    layout: ShardGrid, first: Sequence[RankReport], config: Config, parallel: ParallelSettings, lora: LoraSettings | None
) -> Iterator[str]:
    """The planner's arithmetic against what megatron-core built, parameter by parameter."""
    plans: dict[int, dict[str, tuple[int, ...]]] = {}
    adapters, split = adapters_by_layer(config, lora, layout.tensor) if lora else [], stage_layers(config, parallel)
    for report in first:
        if report.stage not in plans:
            stages = layout.at(pipeline_rank=report.stage).stages
            plans[report.stage] = {
                shard.name: tuple(shard.shape) for stage in stages for shard in stage_shards(config, parallel, stage)
            }
            plans[report.stage] |= {
                each.name: tuple(each.shape) for stage in stages for each in stage_adapters(adapters, split, stage)
            }
        plan, built = plans[report.stage], {shard.name: shard.shape for shard in (*report.shards, *report.adapters)}
        who = f"rank {report.rank} (stage {report.stage}, tensor rank {report.tensor_rank})"
        for name in sorted(plan.keys() | built.keys()):
            if plan.get(name) != built.get(name):
                yield f"{who}: {name} is {_shape(built.get(name))} as built, {_shape(plan.get(name))} as planned"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
