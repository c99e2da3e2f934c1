"""Hugging Face directories: inspection tells all that is wrong, views copy nothing, what is written others read."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tulu_mega.bridge.box import Box
from tulu_mega.bridge.files import hf_files
from tulu_mega.bridge.files.hf_files import HfCheckpoint, TensorInfo
from tulu_mega.bridge.files.hf_writer import ShardWriter, plan_files, tensor_info, write_index
from tulu_mega.errors import UserError

TENSORS = {"a": torch.arange(24.0).reshape(4, 6), "b": torch.arange(5).bfloat16(), "c": torch.ones(2, 3).half()}


@pytest.fixture
def model(tmp_path):
    """Two shards with an index: a and b in the first, c in the second."""
    (tmp_path / "config.json").write_text("{}")
    save_file({name: TENSORS[name] for name in "ab"}, tmp_path / "one.safetensors")
    save_file({"c": TENSORS["c"]}, tmp_path / "two.safetensors")
    write_map(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_map(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def problems_of(directory):
    with pytest.raises(UserError) as caught:
        HfCheckpoint.open(directory)
    return caught.value.problems


def test_opens_index_and_single_file(model, tmp_path):
    checkpoint = HfCheckpoint.open(model)
    assert checkpoint.tensors == {"a": TensorInfo("F32", (4, 6)), "b": TensorInfo("BF16", (5,)), "c": TensorInfo("F16", (2, 3))}
    assert [checkpoint.tensors[name].file for name in "abc"] == ["one.safetensors", "one.safetensors", "two.safetensors"]
    single = tmp_path / "single"
    single.mkdir()
    (single / "config.json").write_text('{"x": 1}')
    save_file(TENSORS, single / "model.safetensors", metadata={"format": "pt"})
    opened = HfCheckpoint.open(single)
    assert opened.tensors == checkpoint.tensors and opened.config == {"x": 1}


def test_inspection_needs_no_torch(model):
    code = (
        "import sys; from tulu_mega.bridge.files.hf_files import HfCheckpoint; c = HfCheckpoint.open(sys.argv[1]); "
        "assert 'torch' not in sys.modules and len(c.tensors) == 3"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, timeout=60)


def test_reads_regions_as_views(model):
    checkpoint = HfCheckpoint.open(model)
    assert torch.equal(checkpoint.read_box("a", Box(((1, 3), (2, 6)))), TENSORS["a"][1:3, 2:6])
    assert torch.equal(checkpoint.read_box("b", Box(((2, 5),))), TENSORS["b"][2:5])
    first, second = (checkpoint.read_box("a", Box(((0, 2), (0, 6)))) for _ in range(2))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()  # one mapping, no copies


def anonymous_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_view_takes_no_anonymous_memory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(64 * 2**10, 256)}, tmp_path / "model.safetensors")  # 64 MiB
    checkpoint = HfCheckpoint.open(tmp_path)
    before = anonymous_kb()
    view = checkpoint.read_box("w", Box(((0, 64 * 2**10), (64, 192))))
    assert view.sum() == view.numel()
    assert anonymous_kb() - before < 8 * 2**10


def test_everything_wrong_with_a_directory_is_told_at_once(model):
    (model / "config.json").unlink()
    data = (model / "one.safetensors").read_bytes()
    (model / "one.safetensors").write_bytes(data[:-3])
    save_file({"c": TENSORS["c"], "stray": TENSORS["a"]}, model / "two.safetensors")
    where = {"a": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors", "e": "three.safetensors"}
    write_map(model, where)
    told = problems_of(model)
    assert len(told) == 5
    for words in (
        "config.json: no such file",
        f"one.safetensors: {len(data) - 3} bytes, its header asks for {len(data)}",
        "two.safetensors: tensor d is not in it",
        "two.safetensors: tensor stray is in it, but not in",
        "three.safetensors: no such file",
    ):
        assert any(words in each for each in told), words


def test_a_directory_that_is_not_there(tmp_path):
    assert "no such directory" in problems_of(tmp_path / "nothing")[0]


def test_pickled_weights_are_to_be_converted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    (told,) = problems_of(tmp_path)
    assert "pytorch_model.bin" in told and "convert it first" in told and "save_pretrained" in told


def test_shards_without_their_index(model):
    (model / "model.safetensors.index.json").unlink()
    (told,) = problems_of(model)
    assert "holds neither model.safetensors.index.json nor model.safetensors" in told


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too short for its header"),
        (b"\xff" * 40, "too short for its header"),
        ((4).to_bytes(8, "little") + b"nope", "not a safetensors header"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors header"),
        ((13).to_bytes(8, "little") + b'{"a":{"x":1}}', "not a safetensors header"),
    ],
)
def test_damaged_headers(tmp_path, content, says):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    (told,) = problems_of(tmp_path)
    assert "model.safetensors" in told and says in told


def test_a_header_whose_offsets_lie(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "a does not fill its place" in problems_of(tmp_path)[0]


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", 7, ["x"]])
def test_an_index_stays_in_its_directory(model, file):
    write_map(model, {"a": file})
    assert "is not the name of a file beside it" in problems_of(model)[0]


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"metadata": {}}'])
def test_a_broken_index(model, text):
    (model / "model.safetensors.index.json").write_text(text)
    (told,) = problems_of(model)
    assert "model.safetensors.index.json" in told


def test_a_tensor_in_two_shards_is_told(model):
    """transformers and vLLM take the last one that they come by, we the one that the index names."""
    save_file({"c": TENSORS["c"], "a": TENSORS["a"] + 1}, model / "two.safetensors")
    (problem,) = problems_of(model)
    assert "two.safetensors: tensor a is in it, too, though model.safetensors.index.json says one.safetensors" in problem


def test_shards_beside_a_single_file_without_an_index_are_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"other": TENSORS["a"]}, tmp_path / "adapter.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    assert HfCheckpoint.open(tmp_path).tensors.keys() == TENSORS.keys(), "files of other things are nobody's business"
    save_file({"b": TENSORS["b"] + 1}, tmp_path / "model-00002-of-00002.safetensors")
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{tmp_path}/model-00002-of-00002.safetensors: holds tensor b, as model.safetensors does")


def test_check_tells_missing_left_over_and_misshapen_together(model):
    save_file({"c": torch.ones(2, 3, dtype=torch.int64)}, model / "two.safetensors")
    checkpoint = HfCheckpoint.open(model)
    told = checkpoint.check({"a": (4, 7), "c": (2, 3), "z": (1,)})
    assert len(told) == 4
    assert "tensor z is missing" in told[0] and "tensor b is left over" in told[1]
    assert "one.safetensors: tensor a is [4, 6], config.json asks for [4, 7]" in told[2]
    assert "tensor c is of type I64" in told[3]
    assert checkpoint.check({"a": (4, 6), "b": (5,)}, ignore=["?"]) == []


def test_check_does_not_flood(model):
    told = HfCheckpoint.open(model).check({f"layer.{i}": (1,) for i in range(500)}, ignore=["*"])
    assert len(told) == 21 and "480 more" in told[-1]


def write(directory, tensors, max_bytes):
    plan = plan_files([{name: tensor_info(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}], max_bytes)
    with ShardWriter(directory, plan[0]) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    write_index(directory, plan)
    (directory / "config.json").write_text("{}")


def test_what_is_written_is_read_by_safetensors(tmp_path):
    tensors = {**TENSORS, "d": TENSORS["a"].T, "scalar": torch.tensor(3.0)}  # a transposed view and no axes, too
    write(tmp_path, tensors, max_bytes=100)
    assert sorted(each.name for each in tmp_path.glob("*.safetensors")) == [
        f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    with safe_open(tmp_path / "model-00001-of-00003.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert HfCheckpoint.open(tmp_path).check({name: tensor.shape for name, tensor in tensors.items()}) == []


def test_a_model_that_fits_one_file_has_no_index(tmp_path):
    write(tmp_path, TENSORS, max_bytes=10**6)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_files_are_numbered_through_all_writers():
    big, small = TensorInfo("F32", (100,)), TensorInfo("F32", (1,))
    plan = plan_files([{"a": big, "b": small, "c": small}, {}, {"d": small}], max_bytes=8)
    assert [{file[6:11]: list(tensors) for file, tensors in part.items()} for part in plan] == [
        {"00001": ["a"], "00002": ["b", "c"]},
        {},
        {"00003": ["d"]},
    ]


def test_the_writer_refuses_what_was_not_announced(tmp_path):
    (files,) = plan_files([{"a": TensorInfo("F32", (2,)), "b": TensorInfo("F32", (2,))}])
    with pytest.raises(ValueError, match="b was written where a was announced"), ShardWriter(tmp_path, files) as writer:
        writer.add("b", torch.zeros(2))
    with pytest.raises(ValueError, match="announced"), ShardWriter(tmp_path, files) as writer:
        writer.add("a", torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 announced tensors were not written, first b"), ShardWriter(tmp_path, files) as writer:
        writer.add("a", torch.zeros(2))


def test_two_models_in_one_directory(model):
    """transformers reads model.safetensors, whatever an index beside it says."""
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, model / "model.safetensors", {"format": "pt"})
    (problem,) = problems_of(model)
    assert "holds model.safetensors and model.safetensors.index.json, which names 2 other files and not it" in problem
    write_map(model, dict.fromkeys("abc", "model.safetensors"))
    assert HfCheckpoint.open(model).tensors["a"].file == "model.safetensors"
    (model / "__0_0.distcp").write_bytes(b"")
    (problem,) = problems_of(model)
    assert "and parts of a Megatron checkpoint (__0_0.distcp)" in problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_tensors_that_differ_are_told(tmp_path, dtype, monkeypatch):
    """transformers leaves them untied then, with a warning; vLLM and we take the embedding for both."""
    monkeypatch.setattr(hf_files, "_COMPARED", 12)  # three rows at a time
    (tmp_path / "config.json").write_text("{}")
    one = torch.arange(28.0).reshape(7, 4).to(dtype)

    def problems(other, names=("one", "other")):
        save_file({"one": one} | ({} if other is None else {"other": other}), tmp_path / "model.safetensors")
        return HfCheckpoint.open(tmp_path).check_tied(names)

    changed = one.clone()
    changed[6, 3] += 1
    assert problems(one.clone()) == problems(None) == problems(changed, None) == []
    for other in (changed, one[:6].clone()):
        (told,) = problems(other)
        assert "tie_word_embeddings = true, but one and other are there and differ" in told and "remove other" in told
