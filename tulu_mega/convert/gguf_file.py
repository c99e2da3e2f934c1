"""GGUF files as directories of Hugging Face's format, read by transformers. The only file that looks for `gguf`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tulu_mega.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""What GGUF files call the families of `bridge.families` that transformers reads out of them; Mistral's are called llama."""
_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")
_FIELDS = {
    "context_length", "vocab_size", "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base",
}  # fmt: skip
"""What a file may say of its architecture: what transformers reads, and what is compared with what it made of that."""
_TENSOR = re.compile(
    r"(token_embd|output|output_norm|blk\.\d+\.(attn_(norm|q|k|v|output|q_norm|k_norm)|ffn_(norm|gate|up|down)))\.(weight|bias)"
)
_SPLITS = ("llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "tekken", "smollm", "gpt-2")
"""Ways of splitting text into words, before BPE, that transformers 5.19 follows; for others it takes GPT-2's without a word."""


def is_gguf(source: str) -> bool:
    """Whether a source is named as a GGUF file is."""
    return Path(source).suffix.lower() == ".gguf"


@contextmanager
def unpacked(source: str, output: str, config: str | None = None) -> Iterator[Path]:
    """A GGUF file's model as a directory of Hugging Face's format beside the output, there as long as it is needed.

    transformers takes the quantized weights apart into float32, the whole model in memory, and makes the tokenizer out of the
    file's. Files of the directory are as old as the GGUF file, so that a conversion that is run again is known.

    Args:
        config: a directory whose config.json and tokenizer count instead; then what the file says beyond transformers' reading
            is taken to be there.

    Raises:
        UserError: the file is none of GGUF's or of another family, `gguf` is not there, or the disk refuses.
    """
    file = Path(source).expanduser()
    check(file, config)
    final = Path(output).absolute()
    if not final.parent.is_dir():
        raise UserError(f"output = {output}: {final.parent} is no directory; make it first")
    directory = final.with_name(f".{final.name}.unpacked")
    try:
        shutil.rmtree(directory, ignore_errors=True)
        _unpack(file, directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check(file: Path, config: str | None = None) -> str:
    """The architecture that a GGUF file names.

    Args:
        config: as of :func:`unpacked`.

    Raises:
        UserError: it cannot be read, is none that can be converted, or holds something that transformers would pass over.
    """
    try:
        with open(file, "rb") as content:
            begins = content.read(4)
    except OSError as error:
        raise UserError(f"source = {file}: cannot be read: {error.strerror or error}; give a GGUF file") from None
    if begins != _MAGIC:
        raise UserError(f"source = {file}: is no GGUF file, it begins with {begins!r}; expected {_MAGIC!r}")
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        what = f"transformers reads GGUF files with {' and '.join(_PACKAGES)}; {' and '.join(missing)} not there"
        raise UserError(f"source = {file}: {what}; pip install {' '.join(missing)}")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        named = reader.get_field("general.architecture")
        architecture = str(named.contents()) if named else "none"
        said = {name: field.contents() for name, field in reader.fields.items() if name.startswith(f"{architecture}.")}
        splits = reader.get_field("tokenizer.ggml.pre")
        split = splits.contents() if splits else "gpt-2"
        tensors = [tensor.name for tensor in reader.tensors]
    except Exception as error:  # whatever a damaged file does to the library that reads it
        what = f"cannot be read as GGUF ({type(error).__name__}: {error})"
        raise UserError(f"source = {file}: {what}; get the file again") from None
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"source = {file}: is of the architecture {architecture!r}; of GGUF files {known} are converted")
    _refuse_unread(file, architecture, said, tensors, config)
    if not config and split not in _SPLITS:
        told = f"{file} splits text as {split!r} does, where transformers takes GPT-2's way"
        print(f"warning: {told}; give --config DIR with the model's own tokenizer, or compare token ids", file=sys.stderr)
    return architecture


def _refuse_unread(file: Path, architecture: str, said: dict[str, Any], tensors: list[str], config: str | None) -> None:
    """
    Raises:
        UserError: a model is more than transformers would make of the file: experts, scaled rotary frequencies, windows.
    """
    fields = {name.removeprefix(f"{architecture}."): value for name, value in said.items()}
    unread = {name: value for name, value in fields.items() if name not in _FIELDS and value not in (0, "", "none")}
    more = [f"{name} = {value!r:.40}" for name, value in unread.items()]
    experts = bool(fields.get("expert_count")) or any("_exps." in name for name in tensors)
    unknown = sorted({name for name in tensors if not _TENSOR.fullmatch(name)})
    if experts or (unknown and unknown != ["rope_freqs.weight"]):
        what = "is a mixture of experts" if experts else f"holds tensors of another family: {', '.join(unknown[:5])}"
        raise UserError(f"source = {file}: {what}; of {architecture} dense models are converted")
    more += [f"the tensor {name}" for name in unknown]
    if more and not config:
        what = f"says {', '.join(more)}, which transformers passes over in GGUF files"
        raise UserError(f"source = {file}: {what}; give --config DIR, the Hugging Face model that it was made from")


def _unpack(file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, found = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers', gguf's and numpy's own
        line = next(iter(str(error).splitlines()), "")
        raise UserError(f"source = {file}: transformers cannot read it ({type(error).__name__}: {line})") from None
    if missing := sorted(found["missing_keys"]):  # these would be weights drawn at random
        raise UserError(f"source = {file}: has no weights for {', '.join(missing[:5])}; get the file again")
    # what is saved is quantized no longer, and transformers refuses to save what says so
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        seen = file.stat()
        for each in directory.iterdir():
            os.utime(each, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror or error}; choose an output with more room") from None
