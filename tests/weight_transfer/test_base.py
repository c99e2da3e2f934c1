"""A word for a model's weights, by which trainer and servers see whether adapters alone will do; what is sent if not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from tulu_mega.bridge.stream import WeightMeta
from tulu_mega.weight_transfer import streams
from tulu_mega.weight_transfer.base import identity
from tulu_mega.weight_transfer.sender import Apart, Sender

WEIGHTS = {"a": torch.arange(30_000.0).view(100, 300), "b": torch.ones(7)}


def test_the_same_weights_have_one_word_whatever_their_files(tmp_path):
    for name, files in {"one": [["a", "b"]], "two": [["b"], ["a"]]}.items():
        (tmp_path / name).mkdir()
        for number, names in enumerate(files):
            save_file({each: WEIGHTS[each] for each in names}, tmp_path / name / f"model-{number}.safetensors")
    word = identity(tmp_path / "one", "float32")
    assert word and word == identity(tmp_path / "two", "float32")
    assert word != identity(tmp_path / "one", "bfloat16")  # the one side has rounded them
    for number, index in enumerate([(0, 0), (99, 299)]):
        other = {name: value.clone() for name, value in WEIGHTS.items()}
        other["a"][index] += 1
        (tmp_path / str(number)).mkdir()
        save_file(other, tmp_path / str(number) / "model.safetensors")
        assert identity(tmp_path / str(number), "float32") not in ("", word)


def test_weights_that_are_narrow_already_are_not_rounded_by_either_side(tmp_path):
    save_file({name: value.bfloat16() for name, value in WEIGHTS.items()}, tmp_path / "model.safetensors")
    assert identity(tmp_path, "float32") == identity(tmp_path, "bfloat16") != ""


def test_what_cannot_be_read_has_no_word(tmp_path):
    assert identity(tmp_path, "float32") == identity(tmp_path / "gone", "float32") == ""
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    assert identity(tmp_path, "float32") == ""


class Weights:
    """A stream of one tensor."""

    def __init__(self, name: str, *shape: int):
        self._meta = WeightMeta(name, torch.float32, shape)
        self.stage_of = {name: 0}

    def metadata(self) -> list[WeightMeta]:
        return [self._meta]

    def held_names(self) -> list[str]:
        return [self._meta.name]


def sender(**told: Any) -> Sender:
    apart = Apart({"r": 4, "rank_pattern": {"q_proj": 9}} | told, Weights("thin", 2), "word", Weights("frozen", 50))
    quiet = SimpleNamespace()
    return Sender(quiet, Weights("merged", 50), True, 0, torch.device("cpu"), print, print, apart)


def test_adapters_go_alone_where_every_server_has_room_for_them(monkeypatch):
    monkeypatch.setattr(streams.dist, "get_rank", lambda: 0)
    about = {"http://a": {"lora_rank": 16}, "http://b": {"lora_rank": 16}}
    chosen = streams.chosen(sender(), about, {0: 0}, 1)
    assert (list(chosen.every.manifest), chosen.every.adapter["r"], chosen.every.nbytes) == (["thin"], 4, 8)
    assert (list(chosen.first.manifest), chosen.first.base) == (["frozen"], "word")
    assert chosen.note.startswith("servers hold the adapters apart")
    for small in ({"lora_rank": 8}, {"lora_rank": 0}, {}):
        merged = streams.chosen(sender(), about | {"http://b": small}, {0: 0}, 1)
        assert (list(merged.every.manifest), merged.every.adapter, merged.first) == (["merged"], None, None)
        assert merged.note.endswith("http://b holds no adapters of rank 9 apart")


def test_servers_with_other_weights_are_found():
    apart = sender().apart
    assert streams.lacking(apart, {"http://a": "word", "http://b": "other", "http://c": ""}) == ["http://b", "http://c"]
    unknown = Apart({"r": 4}, None, "", None)
    assert streams.lacking(unknown, {"http://a": ""}) == ["http://a"]  # of a directory that nobody else can read
