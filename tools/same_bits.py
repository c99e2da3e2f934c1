"""What tools/same_bits.sh asks of Python: compares the runs of two commits to the last bit.

    python tools/same_bits.py compare OLD NEW RUN...    a line for each item of each run; exit status 1 where one differs
    python tools/same_bits.py installed CODE            exit status 1 unless this environment has the tulu_mega of CODE

OLD and NEW are directories that hold the same runs. Compared are the files that `ITEMS` lists: JSON values by their text, so that
1 and 1.0 differ, tensors by dtype, shape and bytes. Left out are `TIMES` of metrics.jsonl and the fields that `LEFT_OUT` lists,
all of them times, memory, or made of paths and times. Not looked at: logs, checkpoints, settings, reports.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TIMES = {
    "tokens_per_second", "supervised_tokens_per_second", "generated_tokens_per_second", "sync_gigabytes_per_second",
    "tflops", "mfu", "memory_gib", "memory_reserved_gib", "trainer_idle", "sampler_idle", "slowest_rank", "slowest_host",
    "slowest_times_median",
    "seconds_data", "seconds_forward_backward", "seconds_optimizer", "seconds_checkpoint", "seconds_evaluation",
    "seconds_scoring", "seconds_sync", "seconds_generation", "seconds_rewards", "seconds_servers",
    "save_seconds", "save_waited_seconds", "save_memory_gib",
}  # fmt: skip
"""Fields of metrics.jsonl that are not compared."""
LEFT_OUT = {
    "metrics.jsonl": TIMES,
    "results.json": {"seconds", "version", "model", "settings"},
    "samples": {"key"},  # it has the times of the model's files in it
}
"""By file or folder, the fields of its lines that are not compared."""

Found = tuple[int, list[str]]
"""How many things were compared, and what differs."""


def lines(old: Path, new: Path) -> Found:
    """JSON, one object a line, or one over the whole file."""
    without = LEFT_OUT.get(old.name) or LEFT_OUT.get(old.parent.name) or set()
    ours, theirs = (_objects(file) for file in (old, new))
    differ = [] if len(ours) == len(theirs) else [f"{len(ours)} and {len(theirs)} lines"]
    for number, pair in enumerate(zip(ours, theirs, strict=False), 1):
        one, other = ({name: value for name, value in each.items() if name not in without} for each in pair)
        differ += [f"line {number}{at}" for at in _apart(one, other)]
    return len(ours), differ


def tensors(old: Path, new: Path) -> Found:
    """The tensors of two safetensors files."""
    ours, theirs = _tensors(old), _tensors(new)
    differ = [f"{name}: in one of them only" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        if one[0] != other[0]:
            differ.append(f"{name}: {one[0]} and {other[0]}")
        elif one[1] != other[1]:
            (_, shape), values = one[0], max(int(np.prod(one[0][1])), 1)
            raw = [np.frombuffer(each, np.uint8).reshape(values, -1) for _, each in (one, other)]
            count = int((raw[0] != raw[1]).any(axis=1).sum())
            differ.append(f"{name}: {count} of the {values} values of {shape}")
    return len(ours), differ


def files(old: Path, new: Path) -> Found:
    """Two files as they are."""
    return 1, [] if old.read_bytes() == new.read_bytes() else ["other bytes"]


ITEMS: tuple[tuple[str, str, Callable[[Path, Path], Found]], ...] = (
    ("rows, or those rejected", "data/*.jsonl", lines),
    ("made model", "model/*.safetensors", tensors),
    ("made model, other files", "model/*.j*", files),
    ("tokens", "data/*.npy", files),
    ("tokens, their key", "*/meta.json", lines),
    ("held-out tokens", "heldout/*.npy", files),
    ("reference log-probabilities", "reference/*/*.safetensors", tensors),
    ("metrics", "metrics.jsonl", lines),
    ("responses", "rollouts/*.jsonl", lines),
    ("weights", "hf/*.safetensors", tensors),
    ("export, other files", "hf/*.j*", files),
    ("evaluation before", "before/results.json", lines),
    ("answers before", "before/samples/*.jsonl", lines),
    ("evaluation", "eval/results.json", lines),
    ("answers", "eval/samples/*.jsonl", lines),
)
"""What is compared: its name, its files in a run directory, how."""


def compare(old: Path, new: Path, runs: list[str]) -> bool:
    """Prints a line for each item of each run; whether all are equal.

    Raises:
        SystemExit: a run has nothing to compare.
    """
    equal = True
    for run in runs:
        seen = 0
        for item, pattern, how in ITEMS:
            names = sorted({str(file.relative_to(side)) for side in (old, new) for file in (side / run).glob(pattern)})
            if not names:
                continue
            seen += 1
            count, differ = 0, []
            for name in names:
                short = name.removeprefix(f"{run}/")
                if not ((old / name).exists() and (new / name).exists()):
                    differ.append(f"{short}: in {'old' if (old / name).exists() else 'new'} only")
                    continue
                found, apart = how(old / name, new / name)
                count += found
                differ += [f"{short}: {each}" for each in apart]
            more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
            told = f"different  {differ[0]}{more}" if differ else f"equal      {count} compared"
            print(f"{run:<18} {item:<28} {told}", flush=True)
            equal &= not differ
        if not seen:
            sys.exit(f"error: {old / run} and {new / run} have nothing to compare")
    return equal


def _objects(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    return [json.loads(text)] if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]


def _apart(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ, and how."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {**one, **other}:
            if name in one and name in other:
                yield from _apart(one[name], other[name], f"{at} {name}")
            else:
                yield f"{at} {name}: in {'old' if name in one else 'new'} only"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _apart(left, right, f"{at}[{number}]")
    elif json.dumps(one) != json.dumps(other):
        yield f"{at}: {_short(one)} and {_short(other)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _tensors(file: Path) -> dict[str, tuple[tuple[str, list[int]], bytes]]:
    """By name: dtype and shape, and the bytes. The format is read here, since NumPy has no bf16."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    return {
        name: ((about["dtype"], about["shape"]), content[begin + about["data_offsets"][0] : begin + about["data_offsets"][1]])
        for name, about in header.items()
    }


def installed(code: Path) -> bool:
    """Whether `import tulu_mega` and vLLM's plug-in are those of a directory; nothing is imported."""
    found = importlib.util.find_spec("tulu_mega")
    [plugin] = [one for one in importlib.metadata.entry_points(group="vllm.general_plugins") if one.name == "tulu_mega"]
    module = code / Path(*plugin.value.split(":")[0].split("."))
    return Path(found.origin).is_relative_to(code) and (module.with_suffix(".py").exists() or module.is_dir())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["compare", old, new, *runs] if runs:
            sys.exit(not compare(Path(old), Path(new), runs))
        case ["installed", code]:
            sys.exit(not installed(Path(code).resolve()))
        case _:
            sys.exit(__doc__)
