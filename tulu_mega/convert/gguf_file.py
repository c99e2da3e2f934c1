"""GGUF files as directories of Hugging Face's format, read by transformers. The only file that looks for `gguf`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tulu_mega.errors import UserError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""What GGUF files call the families of `bridge.families` that transformers reads out of them."""
_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")


def is_gguf(source: str) -> bool:
    """Whether a source is named as a GGUF file is."""
    return Path(source).suffix.lower() == ".gguf"


@contextmanager
def unpacked(source: str, output: str) -> Iterator[Path]:
    """A GGUF file's model as a directory of Hugging Face's format beside the output, there as long as it is needed.

    transformers takes the quantized weights apart into float32, the whole model in memory, and makes the tokenizer out of the
    file's. Files of the directory are as old as the GGUF file, so that a conversion that is run again is known.

    Raises:
        UserError: the file is none of GGUF's or of another family, `gguf` is not there, or the disk refuses.
    """
    file = Path(source).expanduser()
    check(file)
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


def check(file: Path) -> str:
    """The architecture that a GGUF file names.

    Raises:
        UserError: it cannot be read, or is none that can be converted.
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
        field = GGUFReader(file).get_field("general.architecture")
        architecture = str(field.contents()) if field else "none"
    except Exception as error:  # whatever a damaged file does to the library that reads it
        what = f"cannot be read as GGUF ({type(error).__name__}: {error})"
        raise UserError(f"source = {file}: {what}; get the file again") from None
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"source = {file}: is of the architecture {architecture!r}; of GGUF files {known} are converted")
    return architecture


def _unpack(file: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # transformers', gguf's and numpy's own
        line = next(iter(str(error).splitlines()), "")
        raise UserError(f"source = {file}: transformers cannot read it ({type(error).__name__}: {line})") from None
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
