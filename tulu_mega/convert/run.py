"""A conversion from its settings: plan, write file by file on several processes, make whole, verify.

Everything is written into a hidden directory beside the output, which takes its name when it is complete. A file counts when its
record, with a hash of each tensor, is beside it; an interrupted conversion goes on with the files whose content still has these.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.files.companions import put_in_place, write_companions
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hub import is_megatron, model_directory
from tulu_mega.convert import manifest
from tulu_mega.convert.gguf_file import is_gguf, unpacked
from tulu_mega.convert.manifest import FileRecord
from tulu_mega.convert.merged import MergedSource
from tulu_mega.convert.settings import ConvertSettings
from tulu_mega.convert.sources import HfSource, MegatronSource, Source
from tulu_mega.convert.targets import HfTarget, MegatronTarget, Target
from tulu_mega.errors import UserError
from tulu_mega.launch.run_dir import taken
from tulu_mega.outside.json_input import read_json_text

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PLAN = ".plan.json"
_LOCK = ".lock"


def run(settings: ConvertSettings) -> None:
    """Converts, or does nothing when the output is there already, of the same source and settings.

    Raises:
        UserError: for whatever the user can mend; what was written so far stays for the next try.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if is_gguf(settings.source):
        if ranks > 1:
            raise UserError(f"source = {settings.source}: a GGUF file is converted by one process; run it without torchrun")
        with unpacked(settings.source, settings.output, settings.config) as directory:
            run(settings.model_copy(update={"source": str(directory)}))
        return
    if ranks > 1:
        _on_ranks(settings, int(os.environ["RANK"]), ranks)
        return
    with _started(settings) as job:
        if job.complete:
            print(f"{job.final} is complete already", flush=True)
        else:
            _in_parallel(settings, "write", job)
            job.finish()
        if settings.verify:
            _in_parallel(settings, "verify", job)
            print(f"{job.final}: every tensor has the hash it was written with", flush=True)


@dataclass
class Job:
    """A conversion, the same in every process."""

    source_directory: Path
    companions: Path
    """where config.json and tokenizer are"""
    source: Source
    target: Target
    final: Path
    plan: dict[str, Any]
    """by which an earlier conversion is known as this one"""
    dtype: torch.dtype
    config: dict[str, Any]

    @property
    def partial(self) -> Path:
        """Where files are written."""
        return self.final.with_name(f".{self.final.name}.partial")

    @property
    def complete(self) -> bool:
        """Whether the output is there, of this plan."""
        found = manifest.load(self.final)
        return found is not None and found[0] == self.plan

    def write(self, number: int) -> int:
        """Writes a file unless it is there, sound; returns the bytes written.

        Raises:
            UserError: the source is damaged or the disk refuses, with file and tensor.
        """
        file = self.target.names[number]
        found = manifest.read_record(self.partial, file)
        if found and not self._differing(number, self.partial, found):
            return 0
        try:
            record = self.target.write(number, self.partial, self.source)
            manifest.write_record(self.partial, record)
        except OSError as error:
            raise UserError(f"{self.partial / file}: cannot be written: {error.strerror or error}; run again to go on") from None
        return record.size

    def verify(self, number: int) -> int:
        """Reads a file of the finished output back; returns its bytes.

        Raises:
            UserError: naming file and tensors that differ.
        """
        file = self.target.names[number]
        known = manifest.load(self.final)
        record = known[1].get(file) if known else None
        if record is None:
            raise UserError(f"{self.final / manifest.NAME}: does not name {file}; convert again")
        path = self.final / file
        if not path.is_file() or path.stat().st_size != record.size:
            size = path.stat().st_size if path.is_file() else "no"
            raise UserError(f"{path}: {size} bytes, written were {record.size}; the file is truncated, convert again")
        if wrong := self._differing(number, self.final, record):
            raise UserError([f"{path}: {each}; the file is damaged, convert again" for each in wrong])
        return record.size

    def finish(self) -> None:
        """Makes the written files a model and gives them their name."""
        records = [manifest.read_record(self.partial, name) for name in self.target.names]
        missing = [name for name, record in zip(self.target.names, records, strict=True) if record is None]
        if missing:
            raise UserError(f"{self.partial}: {', '.join(missing[:5])} not written; run again to go on")
        sound: list[FileRecord] = [record for record in records if record]
        try:
            self.target.finish(self.partial, sound)
            write_companions(self.partial, self.companions, self.config, str(self.dtype).removeprefix("torch."))
            manifest.write_manifest(self.partial, self.plan, sound)
            records_there = (manifest.record_path(self.partial, name) for name in self.target.names)
            for leftover in (*records_there, self.partial / _PLAN, self.partial / _LOCK):
                leftover.unlink(missing_ok=True)
            put_in_place(self.partial, self.final)
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be completed: {error.strerror or error}; run again to go on") from None
        print(f"{self.final}: {sum(record.size for record in sound) / 1e9:.2f} GB in {len(sound)} files", flush=True)

    def _differing(self, number: int, directory: Path, record: FileRecord) -> list[str]:
        """What of a written file is not what was written; empty for a sound one."""
        wrong = []
        left = set(record.tensors)
        try:
            for name, tensor in self.target.read(number, directory, record):
                left.discard(name)
                if not manifest.matches(tensor, record.tensors[name].hash):
                    wrong.append(f"tensor {name} is not what was written (its hash differs)")
        except Exception as error:  # UserError, or whatever a damaged file does to the library that reads it
            wrong.append(f"tensor {min(left, default='?')} cannot be read ({type(error).__name__})")
        return wrong


@lru_cache(maxsize=1)
def plan_job(settings: ConvertSettings) -> Job:
    """The conversion that settings describe; reads headers and indexes only.

    Raises:
        UserError: with everything that is wrong with source, config or output.
    """
    source_directory = _source_directory(settings.source)
    companions = Path(settings.config) if settings.config else source_directory
    hint = "give another --config" if settings.config else "give --config DIR, the Hugging Face model it was trained from"
    config = read_config(companions, hint)
    family = family_for(config)
    kind = MegatronSource if is_megatron(source_directory) else HfSource
    source: Source = kind(source_directory, family, config)
    if settings.adapter:
        source = MergedSource(source, Path(settings.adapter), family, config)
    dtype = source.dtype if settings.dtype == "keep" else _DTYPES[settings.dtype]
    target_kind = HfTarget if settings.to == "hf" else MegatronTarget
    target: Target = target_kind(family, config, dtype, int(settings.file_gib * 2**30))
    final = Path(settings.output).absolute()
    files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in source.files()]
    plan = {
        "source": str(source_directory.absolute()),
        "source_files": files,
        "to": settings.to,
        "dtype": str(dtype).removeprefix("torch."),
        "file_gib": settings.file_gib,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
    }
    return Job(source_directory, companions, source, target, final, plan, dtype, config)


def _source_directory(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir() or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        if not path.is_dir():
            raise UserError(f"source = {source!r}: no such directory; give a model's or checkpoint's, or a hub name")
        return path
    return model_directory(source)


@contextlib.contextmanager
def _started(settings: ConvertSettings) -> Iterator[Job]:
    """Plans, and takes the output's place for this process alone.

    Raises:
        UserError: the output is something else, in use, or does not fit on the disk.
    """
    job = plan_job(settings)
    if job.final == job.source_directory.absolute():
        raise UserError(f"output = {settings.output}: is the source; choose another directory")
    if not job.final.parent.is_dir():
        raise UserError(f"output = {settings.output}: {job.final.parent} is no directory; make it first")
    if job.complete:
        yield job
        return
    if job.final.exists() and (not job.final.is_dir() or any(job.final.iterdir())):
        raise UserError(f"output = {settings.output}: exists and is not this conversion's; remove it or choose another directory")
    job.partial.mkdir(exist_ok=True)
    handle = os.open(job.partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not taken(handle, job.partial):
            raise UserError(f"output = {settings.output}: another conversion is writing it; wait for it")
        _clear_other_plans(job)
        _check_room(job)
        yield job
    finally:
        os.close(handle)


def _clear_other_plans(job: Job) -> None:
    """Files of another source or other settings go; those of this plan stay."""
    path = job.partial / _PLAN
    with contextlib.suppress(OSError, ValueError):
        if read_json_text(path.read_text()) == job.plan:
            return
    for each in job.partial.iterdir():
        if each.name != _LOCK:
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    path.write_text(json.dumps(job.plan))


def _check_room(job: Job) -> None:
    ratio = job.dtype.itemsize / job.source.dtype.itemsize
    needed = int(sum(size for _, size, _ in job.plan["source_files"]) * ratio)
    if is_megatron(job.source_directory):  # which may hold optimizer state too
        return
    there = sum(each.stat().st_size for each in job.partial.iterdir())
    free = shutil.disk_usage(job.partial).free
    if needed - there > free:
        raise UserError(
            f"output: the disk of {job.final.parent} has {free / 1e9:.1f} GB free, {(needed - there) / 1e9:.1f} GB are needed"
        )


def _in_parallel(settings: ConvertSettings, verb: str, job: Job) -> None:
    """Calls `Job.write` or `Job.verify` for every file, on several processes."""
    count = len(job.target.names)
    progress = _Progress(count, "written" if verb == "write" else "verified")
    if min(settings.workers, count) == 1:
        for number in range(count):
            progress.note(getattr(job, verb)(number))
        return
    # forked where that can be done: the command has started no thread and no device, and importing torch again takes seconds
    context = get_context("fork" if sys.platform.startswith("linux") else "spawn")
    with ProcessPoolExecutor(min(settings.workers, count), context, _die_with_parent, (os.getpid(),)) as pool:
        waiting = [pool.submit(_work, settings, verb, number) for number in range(count)]
        try:
            for done in as_completed(waiting):
                progress.note(done.result())
        except BrokenProcessPool:
            raise UserError("a worker was killed (out of memory?); run again to go on, with fewer workers") from None
        finally:
            for each in waiting:
                each.cancel()


def _work(settings: ConvertSettings, verb: str, number: int) -> int:
    """In a worker."""
    torch.set_num_threads(1)
    return getattr(plan_job(settings), verb)(number)


def _die_with_parent(parent: int) -> None:
    """In a worker: ends with the process that started it, however that ends."""
    if sys.platform.startswith("linux"):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _on_ranks(settings: ConvertSettings, rank: int, ranks: int) -> None:
    """The same under torchrun: rank r takes files r, r + ranks, ... on a file system that all share."""
    import torch.distributed as dist

    from tulu_mega.distributed.collectives import together

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        what = f"{settings.output} could not be written"
        with together(what):
            job = stack.enter_context(_started(settings)) if rank == 0 else plan_job(settings)
            complete = job.complete
        verbs: list[Callable[[int], int]] = [] if complete else [job.write]
        verbs += [job.verify] if settings.verify else []
        for verb in verbs:
            with together(what):
                for number in range(rank, len(job.target.names), ranks):
                    verb(number)
            with together(what):
                if rank == 0 and verb == job.write:
                    job.finish()
    dist.destroy_process_group()


class _Progress:
    """A line on the console for every file."""

    def __init__(self, count: int, what: str):
        self._count, self._what = count, what
        self._done = self._bytes = 0
        self._began = time.perf_counter()

    def note(self, nbytes: int) -> None:
        self._done += 1
        self._bytes += nbytes
        rate = self._bytes / max(time.perf_counter() - self._began, 1e-9) / 1e9
        kept = "" if nbytes else " (there already)"
        print(f"{self._done} of {self._count} files {self._what}{kept}, {rate:.2f} GB/s", flush=True)
