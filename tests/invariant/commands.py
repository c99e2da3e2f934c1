"""The command line as a process of its own: `python -m tulu_mega ...`, its ranks started as torchrun starts them.

Without our launcher a run of one rank costs one import of torch, not two.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Process = subprocess.Popen
ROOT = Path(__file__).parents[2]
LIMIT = 200
"""Seconds for a run."""


def start(directory: Path, log: str, *arguments: object, **variables: str) -> Process:
    """A command that runs in a directory; what it says goes to a file there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}", **variables}
    command = [sys.executable, "-m", "tulu_mega", *map(str, arguments)]
    with (directory / log).open("w") as out:
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=out, stderr=subprocess.STDOUT)


def run(directory: Path, size: int, *arguments: object, **variables: str) -> None:
    """Runs a command on ranks.

    Args:
        directory: where the ranks run; paths in the arguments may be relative to it.
        size: number of ranks.
        variables: environment variables beside torchrun's.

    Raises:
        AssertionError: a rank failed, with the end of what it said.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        start(directory, f"rank_{rank}.txt", *arguments, **world, RANK=str(rank), LOCAL_RANK=str(rank), **variables)
        for rank in range(size)
    ]
    try:
        statuses = [rank.wait(LIMIT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = "\n".join((directory / f"rank_{rank}.txt").read_text()[-3000:] for rank in range(size) if statuses[rank])
    assert not any(statuses), f"{arguments}: exit statuses {statuses}\n{said}"


def settings_file(file: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """Settings as TOML, which writes text, numbers, truths and lists as JSON does."""
    lines = [
        f"[{table}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in it.items()) for table, it in tables.items()
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
