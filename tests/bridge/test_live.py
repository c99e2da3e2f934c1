"""Hugging Face -> Megatron shards -> Hugging Face gives the same bits under every layout, and half an export is never seen."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tests.lib.world import run
from tulu_mega.bridge import live
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.files.hf_files import HfCheckpoint
from tulu_mega.bridge.live import export_hf, load_hf
from tulu_mega.bridge.shards import ModelShard, exportable
from tulu_mega.config import EngineSettings, ParallelSettings
from tulu_mega.errors import UserError

VOCAB = 61  # not a multiple of 16: padded under TP 2
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_source(directory: Path, tied: bool, dtype: str) -> Path:
    """A random Llama as transformers saves it, in several files."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # transformers starts every norm at 1: nothing would show two of them exchanged
        torch.nn.init.normal_(parameter)
    model.to(TORCH[dtype]).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    (directory / "tokenizer.json").write_text('{"stand": "in"}')
    (directory / "chat_template.jinja").write_text("old")
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {
        (tied, dtype): make_source(root / f"{tied}-{dtype}", tied, dtype) for tied in (False, True) for dtype in ("fp32", "bf16")
    }


class Rank:
    """What one rank of a test does: a layout, models built under it, the bridge's two directions."""

    def __init__(self, **parallel: int):
        from tulu_mega.distributed import topology
        from tulu_mega.platforms import install

        self.platform = install()
        self.parallel = ParallelSettings(**parallel)
        self.topology = topology.start(self.parallel, self.platform, seed=1)

    def load(self, source: Path, dtype: str):
        from tulu_mega.model.build import build_model

        settings = EngineSettings(model={"path": str(source), "dtype": dtype}, parallel=self.parallel)
        [model] = build_model(AutoConfig.from_pretrained(source), settings, self.topology, self.platform)
        for parameter in model.parameters():  # whatever is not loaded shows
            torch.nn.init.constant_(parameter, float("nan"))
        checkpoint = HfCheckpoint.open(source)
        load_hf(self.shard(model, checkpoint.config), checkpoint)
        return model

    def export(self, model, directory: Path, source: Path, dtype: str, **more) -> None:
        arguments = {"dtype": TORCH[dtype], "source_directory": source, "max_shard_bytes": 20_000} | more
        export_hf(self.shard(model, HfCheckpoint.open(source).config), directory, **arguments)

    def shard(self, model, config: dict) -> ModelShard:
        here = self.topology
        return ModelShard([model], config, family_for(config), here, here.tensor_group, here.pipeline_group)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model = LlamaForCausalLM.from_pretrained(directory, dtype="auto")
    return dict(model.state_dict())


def round_trips(parallel: dict, sources: dict, out: Path) -> list[str]:
    rank = Rank(**parallel)
    names = []
    for (tied, dtype), source in sources.items():
        model = rank.load(source, dtype)
        for name, parameter in exportable(model):
            names.append(name)
            assert parameter.isfinite().all(), name
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                real = max(0, min(len(parameter), VOCAB - rank.topology.tensor_rank * len(parameter)))
                assert parameter[:real].count_nonzero() > 0.9 * parameter[:real].numel()
                assert parameter[real:].count_nonzero() == 0
        rank.export(model, out / f"{tied}-{dtype}", source, dtype)
        rank.export(model, out / f"{tied}-{dtype}-as-bf16", source, "bf16", extra_files={"chat_template.jinja": "new"})
    return names


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"tensor": 2, "pipeline": 2}],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()),
)
def test_round_trip_is_bit_exact(layout, sources, tmp_path):
    world = torch.tensor(list(layout.values())).prod().item()
    names = run(world, round_trips, layout, sources, tmp_path)
    if layout.get("pipeline"):  # the stages' layers have their own numbers in the whole model
        assert any("layers.3." in name for name in names[-1]) and not any("layers.0." in name for name in names[-1])
    for (tied, dtype), source in sources.items():
        original = weights(source)
        exported = tmp_path / f"{tied}-{dtype}"
        again = weights(exported)
        assert original.keys() == again.keys()
        for name, tensor in original.items():
            assert again[name].dtype == TORCH[dtype] and torch.equal(again[name], tensor), name
        checkpoint = HfCheckpoint.open(exported)
        assert ("lm_head.weight" in checkpoint.tensors) == (not tied)
        assert (exported / "tokenizer.json").read_text() == '{"stand": "in"}'
        assert (exported / "chat_template.jinja").read_text() == "old"
        assert (exported / "generation_config.json").exists()
        narrow = tmp_path / f"{tied}-{dtype}-as-bf16"
        assert json.loads((narrow / "config.json").read_text())["dtype"] == "bfloat16"
        assert (narrow / "chat_template.jinja").read_text() == "new"
        for name, tensor in weights(narrow).items():
            assert torch.equal(tensor, original[name].bfloat16()), name
    assert not [each.name for each in tmp_path.iterdir() if each.name.startswith(".")]


def interrupted_export(source: Path, out: Path) -> None:
    rank = Rank()
    model = rank.load(source, "fp32")
    rank.export(model, out, source, "fp32")
    before = (out / "config.json").stat().st_mtime_ns

    def dies_late(*_):  # everything is written, nothing is in place
        raise KeyboardInterrupt

    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(live, "put_in_place", dies_late)
        rank.export(model, out, source, "fp32")
    assert (out / "config.json").stat().st_mtime_ns == before
    assert weights(out)["model.norm.weight"].ne(0).all()
    (out / "stale.txt").write_text("of the older export")
    rank.export(model, out, source, "fp32")
    assert weights(out)["model.norm.weight"].eq(0).all() and not (out / "stale.txt").exists()
    photos = out.parent / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("")
    for wrong, says in ((photos, "no model directory"), (source, "export to another one")):
        with pytest.raises(UserError, match=says):
            rank.export(model, wrong, source, "fp32")
    assert (photos / "cat.jpg").exists()


def test_an_export_replaces_a_model_only_when_it_is_complete(sources, tmp_path):
    run(1, interrupted_export, sources[False, "fp32"], tmp_path / "hf")
    assert not list(tmp_path.glob(".*"))


def refused_load(source: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        Rank(tensor=2).load(source, "fp32")
    return caught.value.problems


def test_a_checkpoint_that_does_not_fit_tells_everything(tmp_path):
    source = make_source(tmp_path / "model", tied=False, dtype="fp32")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
        tensors |= load_file(source / file)
        (source / file).unlink()
    (source / "model.safetensors.index.json").unlink()
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # old checkpoints have it; harmless
    save_file(tensors, source / "model.safetensors")
    for problems in run(2, refused_load, source):
        assert len(problems) == 3
        assert "tensor model.layers.2.mlp.up_proj.weight is missing" in problems[0]
        assert "tensor model.layers.0.self_attn.q_proj.bias is left over" in problems[1]
        assert "tensor model.norm.weight is [7], config.json asks for [24]" in problems[2]
