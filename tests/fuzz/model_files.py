"""Parsers of models' files: directories in Hugging Face's format, tokenizers, Megatron's distributed checkpoints."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from tests.lib.fuzzing import Parser
from tests.lib.tokenizers import byte_tokenizer
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.files.companions import write_companions
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hf_files import INDEX, SINGLE, HfCheckpoint
from tulu_mega.bridge.files.megatron_files import MegatronCheckpoint
from tulu_mega.bridge.files.megatron_index import read_index, screen
from tulu_mega.config import ModelSettings
from tulu_mega.convert import manifest
from tulu_mega.data import limits
from tulu_mega.data.chat import conversation_ids, encode
from tulu_mega.data.stops import stop_ids
from tulu_mega.data.tokenizer import load_tokenizer
from tulu_mega.errors import UserError
from tulu_mega.model.hf_config import layer_needs, load_config
from tulu_mega.pins.directories import files

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 1e4, "hidden_act": "silu", "eos_token_id": 0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip
OLMO = LLAMA | {
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 12, "layer_types": ["full_attention"] * 2,
    "rope_scaling": None,
}  # fmt: skip
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1,
                "sliding_window": 12, "rope_scaling": None}  # fmt: skip
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes, b."}]


def model(place: Path) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(LLAMA))
    return place


def after_writing(file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Writes the input into a file and reads the directory that it lies in."""

    def parse(data: bytes) -> object:
        file.write_bytes(data)
        return read()

    return parse


def parsers(place: Path) -> dict[str, Parser]:
    return {**hugging_face(place), **tokenizers(place), **megatron(place)}


def hugging_face(place: Path) -> dict[str, Parser]:
    with_header, with_index, with_config, with_ends = (model(place / name) for name in ("header", "index", "config", "ends"))
    sound = json.dumps(HEADER).encode()

    def header(data: bytes) -> object:
        (with_header / SINGLE).write_bytes(len(data).to_bytes(8, "little") + data + bytes(26))
        return HfCheckpoint.open(with_header).check({"a.weight": (2, 3)})

    save_file({"a": torch.ones(2), "b": torch.ones(3)}, with_index / "model-1.safetensors")
    index = {"metadata": {"total_size": 20}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}

    def named() -> None:
        files(with_index)
        HfCheckpoint.open(with_index)

    def config() -> None:
        content = read_config(with_config)
        family = family_for(content)
        family.hf_shapes(content)
        family.needs(content)

    def transformers_config() -> None:
        layer_needs(load_config(ModelSettings(path=str(with_config))))

    tokenizer = byte_tokenizer()

    def ends() -> None:
        stop_ids(tokenizer, "tulu", str(with_ends))
        write_companions(place / "ends_out", with_ends, LLAMA, "bfloat16", ends=(0, 5))

    (place / "ends_out").mkdir()
    configs = [json.dumps(each).encode() for each in (LLAMA, OLMO, QWEN)]
    ending = {"eos_token_id": [1, 2], "bos_token_id": 1, "temperature": 0.6, "do_sample": True}
    return {
        "safetensors: header": Parser(header, [sound], (UserError,)),
        "safetensors: length and header": Parser(
            after_writing(with_header / SINGLE, lambda: HfCheckpoint.open(with_header)),
            [len(sound).to_bytes(8, "little") + sound + bytes(26)], (UserError,),
        ),
        "safetensors: index": Parser(after_writing(with_index / INDEX, named), [json.dumps(index).encode()], (UserError,)),
        "config.json": Parser(after_writing(with_config / "config.json", config), configs, (UserError,)),
        "config.json by transformers": Parser(
            after_writing(with_config / "config.json", transformers_config), configs, (UserError,)
        ),
        "generation_config.json": Parser(
            after_writing(with_ends / "generation_config.json", ends), [json.dumps(ending).encode()], (UserError,)
        ),
    }  # fmt: skip


def tokenizers(place: Path) -> dict[str, Parser]:
    given = place / "tokenizer"
    byte_tokenizer(chat_template="{% for m in messages %}{{ m.role + m.content }}{% endfor %}").save_pretrained(given)
    whole = {name: (given / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}

    def of(name: str) -> Callable[[bytes], object]:
        directory = place / f"tokenizer_of_{name}"
        directory.mkdir()

        def read() -> None:
            for other, content in whole.items():
                if other != name:
                    (directory / other).write_bytes(content)
            limits.names("x")  # keeps the process that tries tokenizers, which would start anew for each
            loaded = load_tokenizer(str(directory))
            with contextlib.suppress(ValueError):
                encode(TALK, loaded, "tulu", 100)
            stop_ids(loaded, "tulu", None)

        return after_writing(directory / name, read)

    templated = byte_tokenizer()

    def template(data: bytes) -> object:
        templated.chat_template = data.decode(errors="replace")
        return conversation_ids(TALK, templated, "tokenizer"), encode(TALK, templated, "tokenizer", 100)

    added = {"<|x|>": 259}
    special = {"eos_token": "<|end_of_text|>", "pad_token": {"content": "<|x|>", "lstrip": False, "normalized": True}}
    return {
        "tokenizer.json": Parser(of("tokenizer.json"), [small(whole["tokenizer.json"])], (UserError,)),
        "tokenizer_config.json": Parser(of("tokenizer_config.json"), [whole["tokenizer_config.json"]], (UserError,)),
        "special_tokens_map.json": Parser(of("special_tokens_map.json"), [json.dumps(special).encode()], (UserError,)),
        "added_tokens.json": Parser(of("added_tokens.json"), [json.dumps(added).encode()], (UserError,)),
        "chat template": Parser(template, TEMPLATES, (ValueError, UserError), TEMPLATE_PIECES),
    }


def small(tokenizer: bytes) -> bytes:
    """A tokenizer.json with few entries of its vocabulary, so that the other fields get their share of changes."""
    content = json.loads(tokenizer)
    vocabulary = content["model"]["vocab"]
    kept = [token for token in vocabulary if token in "hibYes,.<|end_of_text|>Ċ" or len(token) > 1]
    content["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    content["model"]["merges"] = [["h", "i"], ["Ċ", "Ċ"]]
    return json.dumps(content).encode()


TEMPLATES = [
    b"{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}{% endfor %}",
    b"{% macro say(m, n=1) %}{% if n > 0 %}{{ m.content | trim }}{{ say(m, n - 1) }}{% endif %}{% endmacro %}"
    b"{% for m in messages %}{{ say(m, 3) }}{% if not loop.last %}, {% endif %}{% endfor %}",
    b"{%- set ns = namespace(x='') -%}{%- for m in messages -%}"
    b"{%- set ns.x = ns.x ~ m.content -%}{%- endfor -%}{{ ns.x | tojson }}",
    b"{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    b"{{ m.content.split('x')[0] }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    b"{{ messages | map(attribute='content') | join('\\n') | replace('h', 'i') | center(20) }}{{ strftime_now('%Y') }}",
]
TEMPLATE_PIECES = (
    b"{{", b"}}", b"{%", b"%}", b"{#", b"#}", b"{% for x in range(99999) %}", b"{% endfor %}", b"{{ 'x' * 999999999 }}",
    b" * 99999 ", b" ** 9999 ", b" ~ ", b"| center(999999999)", b"| list", b"| batch(3)", b"loop", b"messages",
    b"range(99999)", b"lipsum(9999)", b"{% set x = 'ab' %}", b"{% generation %}", b"{% endgeneration %}", b"{% break %}",
    b"'%9999999999d' % 1", b"| indent(99999999)",
)  # fmt: skip


def megatron(place: Path) -> dict[str, Parser]:
    directory, objects = place / "megatron", place / "objects"
    state = {"weight": torch.arange(6.0).view(2, 3), "rng": {"cpu": torch.get_rng_state()[:64], "step": 3}}
    for each in (directory, objects):
        save(state, checkpoint_id=each, no_dist=True)
    mark = directory / "metadata.json"
    mark.write_text('{"sharded_backend": "torch_dist"}')
    metadata = FileSystemReader(directory).read_metadata()
    index = (directory / ".metadata").read_bytes()
    older = pickle.dumps(metadata, protocol=2)

    def opened() -> None:
        found = MegatronCheckpoint.open(directory)
        _ = found.tensors

    def read_objects(data: bytes) -> None:
        changed = read_index(objects)
        (key,) = (key for key in changed.storage_data if "step" in key.fqn)
        at = changed.storage_data[key]
        (objects / at.relative_path).write_bytes(data)
        at.offset, at.length = 0, len(data)
        (objects / ".metadata").write_bytes(pickle.dumps(changed))
        screen(objects)

    held = []
    for key, at in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[key.fqn], BytesStorageMetadata):
            held.append((directory / at.relative_path).read_bytes()[at.offset : at.offset + at.length])
    recorded = place / "converted"
    recorded.mkdir()
    (recorded / "x.safetensors").write_bytes(b"1234")
    entry = {"hash": "blake3:ab", "dtype": "float32", "shape": [1], "place": [0, 4]}
    file = {"file": "x.safetensors", "size": 4, "tensors": {"a": entry, "b": {**entry, "place": None}}}

    def a_record() -> None:
        manifest.read_record(recorded, "x.safetensors")

    return {
        "Megatron: .metadata": Parser(after_writing(directory / ".metadata", opened), [index, older], (UserError,), PICKLES),
        "Megatron: metadata.json": Parser(after_writing(mark, opened), [mark.read_bytes()], (UserError,)),
        "Megatron: objects": Parser(read_objects, held, (UserError,), PICKLES),
        "convert: manifest.json": Parser(
            after_writing(recorded / manifest.NAME, lambda: manifest.hashes(recorded)),
            [json.dumps({"plan": {"x": 1}, "files": [file]}).encode()], (UserError,),
        ),
        "convert: record of a file": Parser(
            after_writing(manifest.record_path(recorded, "x.safetensors"), a_record), [json.dumps(file).encode()], ()
        ),
    }  # fmt: skip


PICKLES = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"(", b"t", b"R", b".", b"\x8c\x02os", b"\x93", b"\x85", b"}", b"]", b"\x94",
    b"h\x00", b"b", b"\x8a\xff" + b"\x7f" * 255, b"\x8b\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"ctorch\nfloat32\n", b"ctorch\nSize\n", b"r\xff\xff\xff\x7f", b"q\xff", b"I99999999999\n", b"ctorch\nload\n", b"Q",
    b"P1\n", b"\x81", b"\x92", b"o", b"i", b"0", b"2",
)  # fmt: skip
