"""A converted checkpoint under any layout holds what the bridge would have loaded, and a run's own checkpoint converts too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lib import checkpoints, jobs, world

pytestmark = pytest.mark.ranks

LAYOUTS = [  # layout, tied
    ({"tensor": 2}, False),
    ({"pipeline": 2}, True),
    ({"tensor": 2, "pipeline": 2}, True),
    ({"pipeline": 2, "virtual_pipeline": 2}, False),
]


def convert(source: str, output: str, to: str, dtype: str, config: str | None = None) -> None:
    from tulu_mega.convert.run import run
    from tulu_mega.convert.settings import ConvertSettings

    run(ConvertSettings(source=source, output=output, to=to, dtype=dtype, config=config, workers=1, file_gib=0.0002))


def differing(hf: str, megatron: str, layout: dict) -> list[str]:
    """Parameters that are not the same after loading from either directory, on this rank; the export of the second."""
    with jobs.session(hf, layout) as made:
        source = Path(megatron)
        want = [{name: p.detach().clone() for name, p in chunk.named_parameters()} for chunk in made.engine.chunks]
        for chunk in made.engine.chunks:
            for parameter in chunk.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
        object.__setattr__(made, "source", source)
        made.load_weights()
        got = [dict(chunk.named_parameters()) for chunk in made.engine.chunks]
        made.export(source.parent / f"export-{made.topology.size}", torch.float32, {})
        return [
            name for mine, theirs in zip(got, want, strict=True) for name in theirs if not torch.equal(mine[name], theirs[name])
        ]


@pytest.mark.parametrize(("layout", "tied"), LAYOUTS, ids=str)
def test_training_starts_from_a_converted_checkpoint(tmp_path, layout, tied):
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    world.run(1, jobs.make_model, hf, tied)
    world.run(1, convert, hf, megatron, "megatron", "keep")
    size = layout.get("tensor", 1) * layout.get("pipeline", 1)
    assert world.run(size, differing, hf, megatron, layout) == [[]] * size
    same(tmp_path / f"export-{size}", Path(hf))


def same(ours: Path, theirs: Path) -> None:
    want = {name: tensor for file in theirs.glob("*.safetensors") for name, tensor in load_file(file).items()}
    got = {name: tensor for file in ours.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def family_round_trip(root: str, name: str) -> list[str]:
    """Keys and shapes that the model and the table do not agree on; the model's way there and back."""
    from tests.lib.families import make_model
    from tulu_mega.bridge.families import family_for
    from tulu_mega.bridge.megatron_keys import stored_parameters

    hf, megatron = f"{root}/hf", f"{root}/megatron"
    make_model(hf, name)
    convert(hf, megatron, "megatron", "keep")
    convert(megatron, f"{root}/again", "hf", "keep")
    with jobs.session(megatron, {}) as made:
        config = made.engine.hf.to_dict()
        ours = {each.name: (each.key, each.shape) for each in stored_parameters(family_for(config), config)}
        theirs = {}
        for key, held in made.engine.chunks[0].sharded_state_dict(metadata={}).items():
            if not key.endswith("_extra_state"):
                theirs[key] = (held.key, tuple(held.data.shape))
        return sorted(str(pair) for pair in {*ours.values()} ^ {*theirs.values()})


@pytest.mark.parametrize("name", ["Qwen 2", "Qwen 3", "Mistral", "OLMo 2", "OLMo 3"])
def test_every_family_has_the_names_of_its_model(tmp_path, name):
    assert world.run(1, family_round_trip, str(tmp_path), name) == [[]]
    same(tmp_path / "again", tmp_path / "hf")


def bf16_logp(model: str) -> list[float]:
    with jobs.session(model, {}, "bf16") as made:
        return made.engine.score(jobs.share(made, jobs.sequences(made.engine.hf.vocab_size), 1))[0].tolist()


def test_precision_is_the_runs_whatever_the_files(tmp_path):
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    world.run(1, jobs.make_model, hf, False)
    world.run(1, convert, hf, megatron, "megatron", "fp32")
    assert world.run(1, bf16_logp, hf) == world.run(1, bf16_logp, megatron)


def train_and_save(model: str, directory: str, exported: str, layout: dict) -> str:
    from tulu_mega.config import OptimSettings
    from tulu_mega.objectives.sft import SftObjective

    with jobs.session(model, layout) as made:
        made.engine.prepare_training(OptimSettings(lr=1e-2, schedule="constant", warmup=0.0), 2)
        for step in range(2):
            batch = jobs.share(made, jobs.sequences(made.engine.hf.vocab_size, seed=step), None)
            loss = made.engine.forward_backward(batch, SftObjective("sum"))
            made.engine.optimizer_step(step, loss.loss)
        saved = checkpoints.save(made.engine, Path(directory), 2, {}, 1)
        made.export(Path(exported), torch.float32, {})
        return str(saved)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_runs_checkpoint_converts_to_what_the_run_exports(tmp_path, layout):
    hf = str(tmp_path / "hf")
    world.run(1, jobs.make_model, hf, False)
    saved = world.run(2, train_and_save, hf, str(tmp_path / "checkpoints"), str(tmp_path / "export"), layout)[0]
    world.run(1, convert, saved, str(tmp_path / "converted"), "hf", "keep", hf)
    same(tmp_path / "converted", tmp_path / "export")
