"""GGUF files: the weights that llama.cpp's converter put there come out again, and what would be misread is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.lib.conversions import convert, same, weights
from tulu_mega.convert import gguf_file
from tulu_mega.convert.run import run
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.errors import UserError

WIDTH, WIDE, LAYERS = 64, 128, 2
HEADS = {"llama": (4, 2, 16), "qwen2": (4, 2, 16), "qwen3": (2, 1, 128)}
"""query heads, key heads and their width; 128 is what transformers takes for Qwen 3, whatever a file says"""
TOKENS = ["<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "ab"]


def drawn(architecture: str) -> dict[str, tuple[str, np.ndarray]]:
    """Weights as Hugging Face's model has them: its name, to the GGUF name and values."""
    heads, keys, head = HEADS[architecture]
    draw = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": ("token_embd.weight", (len(TOKENS), WIDTH)),
        "lm_head.weight": ("output.weight", (len(TOKENS), WIDTH)),
        "model.norm.weight": ("output_norm.weight", (WIDTH,)),
    }
    for at in range(LAYERS):
        ours, theirs = f"model.layers.{at}.", f"blk.{at}."
        shapes |= {
            f"{ours}input_layernorm.weight": (f"{theirs}attn_norm.weight", (WIDTH,)),
            f"{ours}post_attention_layernorm.weight": (f"{theirs}ffn_norm.weight", (WIDTH,)),
            f"{ours}self_attn.o_proj.weight": (f"{theirs}attn_output.weight", (WIDTH, heads * head)),
            f"{ours}mlp.gate_proj.weight": (f"{theirs}ffn_gate.weight", (WIDE, WIDTH)),
            f"{ours}mlp.up_proj.weight": (f"{theirs}ffn_up.weight", (WIDE, WIDTH)),
            f"{ours}mlp.down_proj.weight": (f"{theirs}ffn_down.weight", (WIDTH, WIDE)),
        }
        for kind, count in (("q", heads), ("k", keys), ("v", keys)):
            shapes[f"{ours}self_attn.{kind}_proj.weight"] = (f"{theirs}attn_{kind}.weight", (count * head, WIDTH))
            if architecture == "qwen2":
                shapes[f"{ours}self_attn.{kind}_proj.bias"] = (f"{theirs}attn_{kind}.bias", (count * head,))
            if architecture == "qwen3" and kind != "v":
                shapes[f"{ours}self_attn.{kind}_norm.weight"] = (f"{theirs}attn_{kind}_norm.weight", (head,))
    return {name: (there, draw.normal(size=shape).astype(np.float32)) for name, (there, shape) in shapes.items()}


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's queries or keys in llama.cpp's order, whose rotary halves alternate."""
    return values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)


def write(path, architecture="llama", name="tiny", quantized=False, leave_out="", says=None, extra=None):
    """A small model as llama.cpp's converter writes it; returns the file and the model's weights."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    family = architecture if architecture in HEADS else "llama"
    heads, keys, head = HEADS[family]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}")
    for field, value in (says or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{field}", value)
    model = drawn(family)
    for ours, (there, values) in model.items():
        if there == leave_out:
            continue
        if family == "llama" and ".q_proj." in ours:
            values = interleaved(values, heads)
        if family == "llama" and ".k_proj." in ours:
            values = interleaved(values, keys)
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(there, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, values)
    for there, shape in (extra or {}).items():
        writer.add_tensor(there, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {name: torch.from_numpy(values) for name, (_, values) in model.items()}


@pytest.mark.parametrize("architecture", sorted(HEADS))
def test_the_weights_are_those_that_the_file_was_made_from(tmp_path, architecture):
    file, model = write(tmp_path / "tiny.gguf", architecture)
    made = convert(file, tmp_path / "hf", "hf", verify=True)
    same(weights(made), model)
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == architecture and config["max_position_embeddings"] == 128
    assert "quantization_config" not in config


def test_mistrals_files_call_themselves_llama(tmp_path):
    file, model = write(tmp_path / "tiny.gguf", name="Mistral 7B Instruct v0.3")
    same(weights(convert(file, tmp_path / "hf", "hf")), model)


def test_quantized_weights_and_the_tokenizer_are_those_that_transformers_reads(tmp_path):
    file, _ = write(tmp_path / "tiny.GGUF", quantized=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    made = convert(file, tmp_path / "hf", "hf", verify=True)
    same(weights(made), theirs)
    same(weights(convert(convert(file, tmp_path / "megatron", "megatron"), tmp_path / "again", "hf")), theirs)
    text = "cab a+b<1</s>ab"
    tokenizer, read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name), AutoTokenizer.from_pretrained(made)
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"] and TOKENS.index("ab") in read(text)["input_ids"]
    assert read.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "user: a</s>"
    assert read.eos_token == "</s>"
    times = [each.stat().st_mtime_ns for each in sorted(made.iterdir())]
    convert(file, made, "hf")
    assert [each.stat().st_mtime_ns for each in sorted(made.iterdir())] == times, "complete already"
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def refused(source, output, told, **more):
    with pytest.raises(UserError, match=told):
        run(ConvertSettings(source=str(source), output=str(output), to="hf", **more))


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3moe", "mamba", "mistral3"])
def test_other_families_are_refused_by_name(tmp_path, architecture):
    file, _ = write(tmp_path / "other.gguf", architecture)
    refused(file, tmp_path / "hf", f"architecture '{architecture}'; of GGUF files llama, qwen2, qwen3")
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"says": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "rope.scaling.type = 'yarn', rope.scaling.factor"),
        ({"says": {"attention.sliding_window": 64}}, "attention.sliding_window = 64, which transformers passes over.*--config"),
        ({"extra": {"rope_freqs.weight": (8,)}}, "the tensor rope_freqs.weight, which transformers passes over"),
        ({"says": {"expert_count": 8}}, "is a mixture of experts; of llama dense"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": (2, 4, 4)}}, "is a mixture of experts"),
        ({"extra": {"blk.0.ssm_in.weight": (4, 4)}}, "tensors of another family: blk.0.ssm_in.weight"),
        ({"leave_out": "blk.1.ffn_up.weight"}, "no weights for model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_what_transformers_would_pass_over_is_refused(tmp_path, made, told):
    file, _ = write(tmp_path / "more.gguf", **made)
    refused(file, tmp_path / "hf", told)
    assert sorted(tmp_path.iterdir()) == [file]


def test_with_the_models_own_configuration_scaled_rotary_frequencies_are_right(tmp_path, capsys):
    own = convert(write(tmp_path / "plain.gguf")[0], tmp_path / "own", "hf")
    config = json.loads((own / "config.json").read_text())
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_parameters"] |= scaled | {"original_max_position_embeddings": 64}
    (own / "config.json").write_text(json.dumps(config))
    file, model = write(tmp_path / "scaled.gguf", says={"rope.scaling.factor": 8.0}, extra={"rope_freqs.weight": (8,)})
    made = convert(file, tmp_path / "hf", "hf", config=str(own))
    same(weights(made), model)
    assert json.loads((made / "config.json").read_text())["rope_parameters"]["factor"] == 8.0
    assert "warning" not in capsys.readouterr().err


def test_a_way_of_splitting_text_that_transformers_does_not_know_is_told(tmp_path, capsys, monkeypatch):
    file, _ = write(tmp_path / "tiny.gguf")
    gguf_file.check(file)
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(gguf_file, "_SPLITS", ())
    gguf_file.check(file)
    assert "splits text as 'qwen2' does" in capsys.readouterr().err


def test_what_is_no_gguf_file_is_refused(tmp_path, monkeypatch):
    output = tmp_path / "hf"
    refused(tmp_path / "gone.gguf", output, "cannot be read: No such file")
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", output, "is no GGUF file, it begins with b'hell'")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    refused(tmp_path / "cut.gguf", output, "gguf and accelerate not there; pip install gguf accelerate")
    monkeypatch.undo()
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    refused(tmp_path / "cut.gguf", output, "cannot be read as GGUF")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(tmp_path / "cut.gguf", output, "without torchrun")
