"""Hugging Face -> Megatron's distributed checkpoint -> Hugging Face: the same bits, resumable, and damage found by name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from blake3 import blake3
from safetensors.torch import load_file

from tests.lib.conversions import SMALL, command, convert, make_source, same, weights
from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files.megatron_files import MegatronCheckpoint
from tulu_mega.convert import manifest
from tulu_mega.convert.run import plan_job
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.errors import UserError


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_exact(tmp_path, dtype, tied):
    source = make_source(tmp_path / "hf", dtype, tied)
    megatron = convert(source, tmp_path / "megatron", "megatron", verify=True)
    assert len(list(megatron.glob("*.distcp"))) > 3
    again = convert(megatron, tmp_path / "again", "hf", verify=True)
    same(weights(again), weights(source))
    assert ("lm_head.weight" in weights(again)) == (not tied)
    config = json.loads((again / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    assert (again / "tokenizer.json").read_text() == '{"stand": "in"}'
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not [
        path for path in [*megatron.iterdir(), *again.iterdir()] if path.name.startswith(".") and path.name != ".metadata"
    ]


@pytest.mark.parametrize(("first", "second"), [("megatron", "megatron"), ("megatron", "hf"), ("hf", "hf")])
def test_types_change_on_the_way(tmp_path, first, second):
    source = make_source(tmp_path / "source", "fp32")
    between = convert(source, tmp_path / "between", first)
    narrow = convert(between, tmp_path / "narrow", second, dtype="bf16", verify=True)
    assert json.loads((narrow / "config.json").read_text())["dtype"] == "bfloat16"
    back = narrow if second == "hf" else convert(narrow, tmp_path / "back", "hf")
    same(weights(back), {name: tensor.bfloat16() for name, tensor in weights(source).items()})
    wide = convert(back, tmp_path / "wide", "megatron", dtype="fp32")
    same(weights(convert(wide, tmp_path / "end", "hf")), {k: v.bfloat16().float() for k, v in weights(source).items()})


def test_several_processes_write_the_same(tmp_path):
    source = make_source(tmp_path / "hf", "bf16")
    one = convert(source, tmp_path / "one", "megatron")
    two = convert(source, tmp_path / "two", "megatron", workers=2)
    assert manifest.hashes(one) == manifest.hashes(two)
    assert {file.name: file.read_bytes() for file in one.glob("*.distcp")} == {
        f.name: f.read_bytes() for f in two.glob("*.distcp")
    }


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_an_interrupted_conversion_goes_on_with_the_files_it_has(tmp_path, monkeypatch, to):
    source = make_source(tmp_path / "hf", "fp32")
    source = source if to == "megatron" else convert(source, tmp_path / "megatron", "megatron")
    plan_job.cache_clear()
    job = plan_job(ConvertSettings(source=str(source), output=str(tmp_path / "out"), to=to, file_gib=SMALL))
    kind, files = type(job.target), job.target.names
    whole, written = kind.write, []

    def write(self, number, directory, given):
        written.append(number)
        if len(written) == 4:
            (directory / self.names[number]).write_bytes(b"half")
            raise Interrupted
        return whole(self, number, directory, given)

    monkeypatch.setattr(kind, "write", write)
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists() and len(files) > 5
    rotten = tmp_path / ".out.partial" / files[1]  # of a finished file, a bit turns meanwhile
    content = bytearray(rotten.read_bytes())
    content[-1200 if to == "megatron" else -5] ^= 4
    if to == "megatron":
        at = manifest.read_record(rotten.parent, files[1]).tensors
        offset, length = next(iter(at.values())).place
        content = bytearray(rotten.read_bytes())
        content[offset + length // 2] ^= 4
    rotten.write_bytes(content)
    out = convert(source, tmp_path / "out", to, verify=True)
    assert written == [0, 1, 2, 3, 1, *range(3, len(files))]
    end = out if to == "hf" else convert(out, tmp_path / "end", "hf")
    same(weights(end), weights(tmp_path / "hf"))


def test_a_finished_conversion_is_left_alone_and_another_never_overwritten(tmp_path, capsys):
    source = make_source(tmp_path / "hf", "fp32")
    out = convert(source, tmp_path / "out", "megatron")
    before = (out / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    convert(source, tmp_path / "out", "megatron")
    assert "complete already" in capsys.readouterr().out and (out / "manifest.json").stat().st_mtime_ns == before
    for wrong, says in (({"dtype": "bf16"}, "not this conversion's"), ({"to": "hf"}, "not this conversion's")):
        with pytest.raises(UserError, match=says):
            convert(source, tmp_path / "out", **{"to": "megatron", **wrong})
    with pytest.raises(UserError, match="is the source"):
        convert(source, source, "megatron")
    with pytest.raises(UserError, match="make it first"):
        convert(source, tmp_path / "no" / "out", "megatron")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file; give --config DIR"):
        convert(tmp_path / "plain", tmp_path / "x", "hf")
    with pytest.raises(UserError, match="no such directory"):
        convert(tmp_path / "nowhere", tmp_path / "x", "hf")


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))


def test_a_damaged_source_is_found_by_file_and_tensor(tmp_path):
    source = make_source(tmp_path / "hf", "fp32")
    megatron = convert(source, tmp_path / "megatron", "megatron")
    hf = convert(megatron, tmp_path / "hf_again", "hf")

    files = manifest.load(megatron)[1]
    file, name, place = next(
        (record.file, name, entry.place)
        for record in files.values()
        for name, entry in record.tensors.items()
        if "layers.1.mlp.linear_fc2" in name
    )
    flip(megatron / file, place[0] + place[1] // 2)
    for to, output in (("hf", "a"), ("megatron", "b")):
        with pytest.raises(UserError) as caught:
            convert(megatron, tmp_path / output, to, dtype="bf16")
        assert str(megatron / file) in str(caught.value) and name in str(caught.value)
    with pytest.raises(UserError, match="its hash differs"):
        convert(source, megatron, "megatron", verify=True)

    file = next(file for file in sorted(hf.glob("*.safetensors")) if "model.layers.1.mlp.up_proj.weight" in load_file(file))
    flip(file, file.stat().st_size - 3)
    last = max(load_file(file), key=lambda each: list(manifest.load(hf)[1][file.name].tensors).index(each))
    with pytest.raises(UserError) as caught:
        convert(hf, tmp_path / "c", "megatron")
    assert str(file) in str(caught.value) and last in str(caught.value)


def edit_manifest(directory: Path, change) -> None:
    """Puts other entries in the place of a manifest's."""
    content = json.loads((directory / "manifest.json").read_text())
    for record in content["files"]:
        record["tensors"] = {name: change(name, held) for name, held in record["tensors"].items()}
    (directory / "manifest.json").write_text(json.dumps(content))


def test_manifests_of_the_first_version_are_understood_and_unknown_hashes_refused(tmp_path):
    source = make_source(tmp_path / "hf", "fp32")
    out = convert(convert(source, tmp_path / "megatron", "megatron"), tmp_path / "out", "hf")
    assert all(each.startswith("blake3:") for each in manifest.hashes(out).values())
    tensors = weights(out)

    def first_version(name: str, held: dict) -> dict:
        assert held.pop("hash") == f"blake3:{blake3(tensors[name].numpy().tobytes()).hexdigest()}"
        return {"sha256": hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest(), **held}

    edit_manifest(out, first_version)
    convert(tmp_path / "megatron", out, "hf", verify=True)
    convert(out, tmp_path / "good", "megatron")
    file = sorted(out.glob("*.safetensors"))[0]
    flip(file, file.stat().st_size - 3)
    with pytest.raises(UserError, match=f"{file}: tensor .* \\(its hash differs\\)"):
        convert(out, tmp_path / "bad", "megatron")

    edit_manifest(out, lambda name, held: {**held, "hash": "md5:00"})
    with pytest.raises(UserError, match="hash 'md5' is not known, expected one of blake3, sha256"):
        convert(out, tmp_path / "bad", "megatron")


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_full_disk_is_told_and_what_is_written_stays(tmp_path, to):
    """A limit on the size of files stands in for it."""
    source = make_source(tmp_path / "hf", "fp32", hidden=96)
    source = source if to == "megatron" else convert(source, tmp_path / "megatron", "megatron")
    done = subprocess.run(
        ["prlimit", "--fsize=8000", *command(source, tmp_path / "out", to, "--workers", "1")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be written: File too large; run again to go on" in done.stderr
    assert not (tmp_path / "out").exists()
    again = convert(source, tmp_path / "out", to, verify=True)
    end = again if to == "hf" else convert(again, tmp_path / "end", "hf")
    same(weights(end), weights(tmp_path / "hf"))


def test_chunks_that_lie_otherwise_than_they_are_wanted_are_read_all_the_same(tmp_path):
    """A checkpoint of whatever torch wrote: values behind others, transposed, of another type, in part."""
    plain = torch.randn(6, 8)
    stored = {"plain": plain, "behind": torch.randn(9, 8)[3:], "transposed": torch.randn(8, 6).t(), "bf16": plain.bfloat16()}
    torch.distributed.checkpoint.save(dict(stored), checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    opened = MegatronCheckpoint.open(tmp_path)
    for key, tensor in stored.items():
        for region in (((0, 6), (0, 8)), ((2, 5), (0, 8)), ((0, 6), (1, 3))):
            sizes = [stop - start for start, stop in region]
            wanted = tensor[tuple(slice(*extent) for extent in region)]
            into = torch.full((2, *sizes), torch.nan)
            opened.read(key, Box(region), into[1])
            assert torch.equal(into[1], wanted.float()) and into[0].isnan().all()
            apart = torch.full((sizes[1], sizes[0]), torch.nan).t()
            opened.read(key, Box(region), apart)
            assert torch.equal(apart, wanted.float())


def test_a_truncated_source_is_found_by_file_and_tensor(tmp_path):
    source = make_source(tmp_path / "hf", "fp32")
    megatron = convert(source, tmp_path / "megatron", "megatron")
    (megatron / "manifest.json").unlink()  # a checkpoint of a run has none
    last = sorted(megatron.glob("*.distcp"))[-1]
    os.truncate(last, last.stat().st_size - 100)
    with pytest.raises(UserError, match=rf"{last}: \d+ bytes, tensor \S+ ends at \d+; the file is truncated"):
        convert(megatron, tmp_path / "out", "hf")
    last.unlink()
    with pytest.raises(UserError, match=f"{last}: no such file"):
        convert(megatron, tmp_path / "out", "hf")
    file = sorted(source.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(UserError, match=f"{file}: .* truncated"):
        convert(source, tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    source = make_source(tmp_path / "hf", "fp32")
    megatron = convert(source, tmp_path / "megatron", "megatron")
    config = json.loads((megatron / "config.json").read_text())
    (megatron / "config.json").write_text(json.dumps(config | {"intermediate_size": 56, "num_hidden_layers": 4}))
    with pytest.raises(UserError) as caught:
        convert(megatron, tmp_path / "out", "hf")
    assert any("linear_fc1.weight is [3, 96, 24], config.json asks for [4, 112, 24]" in each for each in caught.value.problems)
