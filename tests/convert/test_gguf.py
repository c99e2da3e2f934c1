"""GGUF files: read as transformers reads them, whichever format is written; what is none or of another family is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.lib.conversions import convert, same, weights
from tulu_mega.convert import gguf_file
from tulu_mega.convert.run import run
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.errors import UserError


def write(path, architecture="llama", quantized=True):
    """A small Llama as llama.cpp's converter writes it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    width, wide, layers, heads, kv = 64, 128, 2, 4, 2
    tokens = ["<s>", "</s>", *map(chr, range(33, 127)), "Ġ"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width), "output_norm": (width,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (width // 2, width),
                "attn_v": (width // 2, width), "attn_output": (width, width), "ffn_gate": (wide, width), "ffn_up": (wide, width),
                "ffn_down": (width, wide),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        values = draw.normal(size=shape).astype(np.float32)
        if quantized and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_weights_are_those_that_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write(tmp_path / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    made = convert(file, tmp_path / "hf", "hf", verify=True)
    same(weights(made), theirs)
    same(weights(convert(convert(file, tmp_path / "megatron", "megatron"), tmp_path / "again", "hf")), theirs)
    text = "a+b<1"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert AutoTokenizer.from_pretrained(made)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert "quantization_config" not in (made / "config.json").read_text()
    times = [each.stat().st_mtime_ns for each in sorted(made.iterdir())]
    convert(file, made, "hf")
    assert [each.stat().st_mtime_ns for each in sorted(made.iterdir())] == times, "complete already"
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3moe", "mamba"])
def test_other_families_are_refused_by_name(tmp_path, architecture):
    file = write(tmp_path / "other.gguf", architecture, quantized=False)
    with pytest.raises(UserError, match=f"architecture '{architecture}'; of GGUF files llama, mistral, qwen2, qwen3"):
        run(ConvertSettings(source=str(file), output=str(tmp_path / "hf"), to="hf"))
    assert sorted(tmp_path.iterdir()) == [file]


def test_what_is_no_gguf_file_is_refused(tmp_path, monkeypatch):
    def refused(source, told):
        with pytest.raises(UserError, match=told):
            run(ConvertSettings(source=str(source), output=str(tmp_path / "hf"), to="hf"))

    refused(tmp_path / "gone.gguf", "cannot be read: No such file")
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", "is no GGUF file, it begins with b'hell'")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    refused(tmp_path / "cut.gguf", "gguf and accelerate not there; pip install gguf accelerate")
    monkeypatch.undo()
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    refused(tmp_path / "cut.gguf", "cannot be read as GGUF")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(tmp_path / "cut.gguf", "without torchrun")
