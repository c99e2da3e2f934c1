"""What can be known to be wrong before anything is launched or written."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import check_language_model
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hf_files import HfCheckpoint
from tulu_mega.bridge.files.hub import is_megatron, model_directory
from tulu_mega.bridge.megatron_keys import stored_parameters
from tulu_mega.config import (
    DataSettings,
    EngineSettings,
    GrpoSettings,
    ParallelSettings,
    RmSettings,
    RunSettings,
    ScoreSettings,
    Section,
    ServeSettings,
    StageSettings,
)
from tulu_mega.data import score_input
from tulu_mega.data.other_tokenizer import other_tokenizer
from tulu_mega.data.store import TokenStore, prepare
from tulu_mega.errors import UserError
from tulu_mega.inference.addresses import longest_wait
from tulu_mega.inference.for_run import device_obstacles, fp8_obstacles, server_options
from tulu_mega.inference.offline import check_vllm
from tulu_mega.launch.run_dir import CONFIG, DATA, HELDOUT, check_free
from tulu_mega.layout.fp8 import fp8_problems, rollout_fp8_problems
from tulu_mega.layout.schedule import Pipeline
from tulu_mega.layout.stages import stage_layers
from tulu_mega.rl.prompts import Prompts, read

_MATHEMATICS = (
    "model.path", "model.dtype", "precision", "megatron", "seed", "data", "optim", "preference",
    "train.global_batch", "train.reduction", "train.steps", "train.epochs", "sampling", "policy", "rewards", "rollout.dtype",
    "rollout.quantization", "train.prompts", "train.mini_batches", "train.passes", "train.filter_equal", "train.refills",
)  # fmt: skip
_LENGTH = ("train.steps", "train.epochs")
_FOR_REWARD_MODELS = (RmSettings, ScoreSettings)
"""Commands that a reward model's directory can be given to."""
_INDIFFERENT = (
    "data.workers", "data.pack_length", "data.cache", "rewards.workers", "rewards.timeout", "rewards.memory_mib",
)  # fmt: skip


def check(settings: Section) -> list[str]:
    """Everything that is wrong with a command's settings, model and data; nothing is left on disk but in `data.cache`."""
    with tempfile.TemporaryDirectory() as scratch:
        return _problems(settings, Path(scratch) / DATA)


def ready(settings: EngineSettings) -> None:
    """Checks as `check` does and leaves the tokenised data in RUN_DIR/data for the ranks.

    Raises:
        UserError: with every problem; nothing is written then.
    """
    run_dir = getattr(settings, "run_dir", None)
    if run_dir is None:
        problems = check(settings)
    else:
        problems = _problems(settings, Path(run_dir) / DATA)
    if problems:
        raise UserError(problems)


def layout_problems(config: Mapping[str, Any], parallel: ParallelSettings) -> list[str]:
    """What of a model does not divide by the layout, or is not enough for it.

    Args:
        config: the model's config.json.
    """
    heads = config["num_attention_heads"]
    sizes = [
        ("parallel.tensor", parallel.tensor, "num_attention_heads", heads),
        ("parallel.tensor", parallel.tensor, "num_key_value_heads", config.get("num_key_value_heads") or heads),
        ("parallel.tensor", parallel.tensor, "intermediate_size", config["intermediate_size"]),
    ]
    problems = [
        f"{setting} = {by} does not divide the model's {name} = {size}; choose a divisor"
        for setting, by, name, size in sizes
        if size % by
    ]
    try:
        stage_layers(config, parallel)
    except UserError as error:
        problems += error.problems
    return problems


def _problems(settings: Section, data_directory: Path) -> list[str]:
    problems: list[str] = []

    def collect(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except UserError as error:
            problems.extend(error.problems)
            return None

    if not isinstance(settings, EngineSettings):
        collect(lambda: _generating(settings.model.path) if hasattr(settings, "model") else None)
        if isinstance(settings, ServeSettings) and not problems:
            collect(lambda: server_options(settings.model, settings.rollout, None, ()))
            problems += device_obstacles(settings.rollout, 0)
        return problems
    collect(lambda: _fp8(settings))
    config = collect(lambda: _model(settings))
    if config and not isinstance(settings, _FOR_REWARD_MODELS):
        collect(lambda: check_language_model(settings.model.path, config["architectures"]))
    if isinstance(settings, RunSettings):
        collect(lambda: check_free(Path(settings.run_dir)))
        collect(lambda: _same_run(settings))
        if config and settings.data.tokenizer and settings.checkpoint.export:
            collect(lambda: _goes_with_the_model(settings, config))
    if isinstance(settings, GrpoSettings):
        collect(lambda: _servable(settings, config))
        prompts = collect(lambda: read(settings))
        if prompts and config:
            collect(lambda: _answerable(prompts, config))
        if settings.rewards.model:
            collect(lambda: _scoring(settings, config))
    if isinstance(settings, StageSettings):
        collect(lambda: _schedulable(settings))
        made: list[Path] = []
        with tempfile.TemporaryDirectory() as scratch:
            for name, data, directory in _data(settings, data_directory):
                # data is not written for a run that cannot start; its own problems are told all the same
                target = Path(scratch) / name if problems else directory
                made += [] if target.exists() else [target]
                ready = functools.partial(prepare, data, settings.model, target, progress=not problems, setting=name)
                store = collect(ready)
                if store and config:
                    collect(lambda name=name, store=store: _fits_vocabulary(name, store, config))
            if problems:
                for directory in made:
                    _discard(directory)
    if isinstance(settings, ScoreSettings):
        collect(lambda: _scorable(settings, config))
    return list(dict.fromkeys(problems))


def _data(settings: StageSettings, directory: Path) -> list[tuple[str, DataSettings, Path]]:
    """What is to be tokenised, by the setting that names it, and where."""
    wanted = [("data.train", settings.data, directory)]
    if settings.heldout:
        own = {"train": settings.heldout.data, "split": settings.heldout.split}
        wanted.insert(0, ("heldout.data", settings.data.model_copy(update=own), directory.with_name(HELDOUT)))
    return wanted


def _discard(directory: Path) -> None:
    """Tokenised data that no run wants."""
    if directory.is_symlink():  # into data.cache, where it may serve another model
        directory.unlink()
    else:
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # other things of a run are there
        directory.parent.rmdir()


def _generating(path: str) -> None:
    """A model for vLLM: what its config.json says; the rest is seen by the command itself before vLLM starts."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((model_directory(path) / CONFIG).read_text())
        check_language_model(path, config.get("architectures"))


def _fp8(settings: EngineSettings) -> None:
    """This machine can train in FP8, if that is asked for."""
    if settings.precision.recipe is None:
        return
    from tulu_mega.platforms.fp8 import obstacles, this_machine

    if problems := obstacles(settings.precision.recipe, this_machine()):
        raise UserError(problems)


def _model(settings: EngineSettings) -> dict[str, Any]:
    """The model's config.json, its weights found whole and of the shapes that it asks for, dividing by the layout."""
    directory = model_directory(settings.model.path)
    if is_megatron(directory):
        config, problems = _converted(directory)
    else:
        checkpoint = HfCheckpoint.open(directory)
        config = checkpoint.config
        family = family_for(config)
        problems = checkpoint.check(family.hf_shapes(config), family.ignorable(config))
    undivided = layout_problems(config, settings.parallel)
    problems += undivided or fp8_problems(config, settings)
    if problems:
        raise UserError(problems)
    return config


def _converted(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """config.json of a Megatron distributed checkpoint, and what of its tensors does not go with it."""
    from tulu_mega.bridge.files.megatron_files import MegatronCheckpoint

    checkpoint = MegatronCheckpoint.open(directory)
    config = read_config(directory, "train from a directory that tulu-mega convert made, which has it")
    return config, checkpoint.check(stored_parameters(family_for(config), config))


def _servable(settings: GrpoSettings, config: Mapping[str, Any] | None) -> None:
    """What vLLM would find out when it starts, and rollouts when they are asked for."""
    own = not settings.rollout.urls  # else they have a vLLM and GPUs of their own
    if own:
        check_vllm()
    fp8 = fp8_obstacles if own else rollout_fp8_problems
    problems = fp8(config, settings.rollout) if config else []
    if own:
        parallel = settings.parallel
        problems += device_obstacles(settings.rollout, parallel.model_parallel * (parallel.data or 1))
    wait, limit = longest_wait(settings.rollout), settings.watchdog.timeout
    if limit and wait >= limit:
        problems.append(
            f"rollout.start_timeout = {settings.rollout.start_timeout:g}: the ranks may wait {wait:g} s for the servers, but "
            f"watchdog.timeout = {limit:g} would end them before; raise watchdog.timeout above {wait:g}"
        )
    limit = (config or {}).get("max_position_embeddings")
    if limit and settings.longest > limit:
        problems.append(
            f"data.max_prompt = {settings.data.max_prompt} and sampling.max_tokens = {settings.sampling.max_tokens} make "
            f"{settings.longest} tokens, but the model was made for {limit}; lower either"
        )
    given = settings.rollout.max_model_len
    if given and given < settings.longest:
        problems.append(
            f"rollout.max_model_len = {given}: prompt and response may have {settings.longest} tokens (data.max_prompt + "
            "sampling.max_tokens); raise it or leave it out"
        )
    if problems:
        raise UserError(problems)


def _answerable(prompts: Prompts, config: Mapping[str, Any]) -> None:
    """Prompts, and the token that ends a response, are of the model's vocabulary."""
    largest = {"data.tokenizer, as the end of a response,": prompts.tokenizer.eos_token_id}
    for name, chosen in (("data.train", prompts.train), ("heldout.data", prompts.heldout)):
        largest[name] = max((max(one.ids) for one in chosen.prompts), default=0) if chosen else 0
    for name, token in largest.items():
        _within_vocabulary(name, token, config)


def _scoring(settings: GrpoSettings, policy: Mapping[str, Any] | None) -> None:
    """The reward model has the policy's tokens."""
    model = settings.model.model_copy(update={"path": settings.rewards.model})
    parts = dict(parallel=settings.parallel, precision=settings.precision, megatron=settings.megatron)
    config = _model(EngineSettings(model=model, **parts))
    if not family_for(config).reward:
        raise UserError(f"rewards.model = {settings.rewards.model}: a language model; expected what tulu-mega rm makes")
    if policy and config["vocab_size"] != policy["vocab_size"]:
        raise UserError(
            f"rewards.model = {settings.rewards.model} has a vocabulary of {config['vocab_size']}, the policy one of "
            f"{policy['vocab_size']}; expected a reward model of the same tokenizer"
        )


def _same_run(settings: RunSettings) -> None:
    """A run directory goes on with the settings it began with, as far as they decide what is computed."""
    file = Path(settings.run_dir) / CONFIG
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{file}: cannot be read; choose another run_dir, or remove this one") from None
    before, now = _flat(before), _flat(json.loads(settings.model_dump_json()))
    # compared as text: of data.train's amounts, 1 is a row and 1.0 all of them
    changed = [name for name in now | before if _decides(name) and repr(before.get(name)) != repr(now.get(name))]
    fixed = _length_fixed_by(settings, before)
    if not fixed:
        changed = [name for name in changed if name not in _LENGTH]
    if changed:
        raise UserError(
            f"run_dir = {settings.run_dir} holds a run with other settings: "
            + "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            + (f" ({fixed})" if set(changed) & set(_LENGTH) else "")
            + ". Choose another run_dir, or the settings of before to go on"
        )


def _length_fixed_by(settings: RunSettings, before: Mapping[str, Any]) -> str:
    """Why a run cannot be made longer or shorter: the steps done would have been others. Empty where they would not.

    Args:
        before: the run's settings by full name.
    """
    optim = settings.optim
    if optim.schedule != "constant" or optim.warmup:
        return (
            f"with optim.schedule = {optim.schedule!r} and optim.warmup = {optim.warmup:g} the length decides every step's rate; "
            f"to train on, begin a run with {settings.run_dir}/hf as model.path"
        )
    if isinstance(settings, StageSettings) and not (settings.train.steps and before.get("train.steps")):
        return "the last batch of train.epochs may be short; only train.steps can be changed for another number of steps"
    return ""


def _goes_with_the_model(settings: RunSettings, config: Mapping[str, Any]) -> None:
    """What exporting `data.tokenizer` with the model would find out in rank 0."""
    model, reward = settings.model, isinstance(settings, RmSettings)
    other_tokenizer(settings.data.tokenizer, model_directory(model.path), config, reward, model.trust_remote_code)


def _schedulable(settings: StageSettings) -> None:
    """What packing would find out in every rank."""
    parallel, count = settings.parallel, settings.train.micro_batches
    multiple = Pipeline(parallel.pipeline, parallel.virtual_pipeline).multiple
    if count and count % multiple:
        raise UserError(
            f"train.micro_batches = {count}: parallel.virtual_pipeline = {parallel.virtual_pipeline} asks for a multiple of "
            f"parallel.pipeline = {parallel.pipeline}; set it to {-(-count // multiple) * multiple} or leave it out"
        )


def _decides(name: str) -> bool:
    return name not in _INDIFFERENT and any(name == each or name.startswith(each + ".") for each in _MATHEMATICS)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _fits_vocabulary(name: str, store: TokenStore, config: Mapping[str, Any]) -> None:
    """Data of another model is not left in the run directory, also where it was there before."""
    try:
        _within_vocabulary(name, store.max_token, config)
    except UserError:
        _discard(store.directory)
        raise


def _within_vocabulary(name: str, token: int, config: Mapping[str, Any]) -> None:
    if token >= config["vocab_size"]:
        raise UserError(
            f"{name} holds token {token}, but the model's vocabulary has {config['vocab_size']} entries; "
            "data and tokenizer belong to another model"
        )


def _scorable(settings: ScoreSettings, config: Mapping[str, Any] | None) -> None:
    output = Path(settings.output)
    if not output.absolute().parent.is_dir():
        raise UserError(f"output = {settings.output}: {output.absolute().parent} is no directory; make it first")
    rows = score_input.read(settings.input)
    encode = score_input.encoder(settings, [row for _where, row in rows], config["vocab_size"] if config else None)
    problems = []
    for where, row in rows:
        try:
            encode(row)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError(problems[:20] + ([f"... {len(problems)} rows cannot be scored"] if len(problems) > 20 else []))
