"""What is wrong with a stage that trains a policy on responses of its own servers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.files.hub import model_directory
from tulu_mega.config import EngineSettings, ParallelSettings, PolicyRunSettings
from tulu_mega.config.policy_run import steps_of
from tulu_mega.errors import UserError
from tulu_mega.inference.adapters import described, holds
from tulu_mega.inference.addresses import longest_wait, look
from tulu_mega.inference.for_run import device_obstacles, fp8_obstacles
from tulu_mega.inference.offline import check_vllm
from tulu_mega.layout.division import server_problems
from tulu_mega.layout.fp8 import rollout_fp8_problems
from tulu_mega.outside.versions import installed
from tulu_mega.pins import rows
from tulu_mega.pins.directories import Directory
from tulu_mega.preflight import adapters, pinned, profile, run, vocabularies
from tulu_mega.preflight.findings import Findings
from tulu_mega.preflight.model import model_config, within_vocabulary
from tulu_mega.rl.prompts import Prompts, read
from tulu_mega.weight_transfer.counterpart import Model, between, differences


def problems(settings: PolicyRunSettings, findings: Findings) -> None:
    """Of the run, its servers, its prompts and its reward model."""
    run.problems(settings, findings)
    adapters.problems(settings, findings)
    config = findings.config
    findings.collect(lambda: _servable(settings, config, findings.notes))
    if settings.lora and not settings.rollout.urls:
        merged = settings.rollout.adapters == "merged"
        told = findings.collect(lambda: holds(described(settings.model.path, settings.lora), merged))
        findings.notes += [told[1]] if told else []
    if settings.rollout.urls:
        findings.collect(lambda: _answering(settings, config, findings.starts, findings.notes))
    prompts = findings.collect(lambda: read(settings, findings.pins.pins.day if findings.pins else None))
    if prompts:
        findings.notes += [*left_out(prompts), *prompts.told]
    if prompts:
        findings.collect(lambda: profile.check_steps(settings.train.profile, steps_of(settings, len(prompts.train))))
    if prompts and config:
        findings.collect(lambda: answerable(prompts, config))
    if prompts and findings.pins:
        for setting, sources in prompts.sources.items():
            findings.collect(partial(findings.pins.settle, setting, rows.pin(sources)))
        findings.collect(lambda: pinned.verifiers(findings, settings.rewards.custom, prompts.verifiers))
    if settings.rewards.model:
        run.pin(findings, "rewards.model", Directory(settings.rewards.model, code=settings.model.trust_remote_code))
        findings.collect(lambda: of_the_policys_tokens(settings, "rewards.model", settings.rewards.model, config, ""))


def _servable(settings: PolicyRunSettings, config: Mapping[str, Any] | None, notes: list[str]) -> None:
    """What vLLM would find out when it starts, and rollouts when they are asked for.

    Args:
        notes: get what is no problem of the Python that starts the servers.
    """
    own = not settings.rollout.urls  # else they have a vLLM and GPUs of their own
    problems: list[str] = []
    if own:
        python = check_vllm(settings.rollout.python, "rollout.python")
        notes += python.notes
        problems += _one_nccl(settings, python.installed)
    fp8 = fp8_obstacles if own else rollout_fp8_problems
    problems += fp8(config, settings.rollout) if config else []
    if own:
        problems += server_problems(config, settings.rollout.tensor) if config else []
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


def _one_nccl(settings: PolicyRunSettings, theirs: Mapping[str, str]) -> list[str]:
    """Ranks and servers in one communicator of NCCL have one NCCL, which looks at that itself, when the first weights are sent.

    Args:
        theirs: versions in the Python that starts the servers; nothing where it is this one.
    """
    ours = installed() if theirs and settings.rollout.transport == "nccl" else {}
    if ours.get("nccl") == theirs.get("nccl") or not ours:
        return []
    here, there = (versions.get("nccl", "not at all") for versions in (ours, theirs))
    return [
        f"rollout.transport = 'nccl': torch has NCCL {here} here and {there} in rollout.python = {settings.rollout.python!r}, "
        "and NCCL joins equal releases alone; install one in both, or use another transport"
    ]


def _answering(settings: PolicyRunSettings, config: Mapping[str, Any] | None, starts: bool, notes: list[str]) -> None:
    """What servers elsewhere would find out when weights are sent, which is after the model was loaded.

    Args:
        starts: those that do not answer yet will be waited for.
        notes: get what is no problem as long as prompts are short.
    """
    about, missing = look(settings.rollout)
    notes += [
        f"{url}: takes {told['longest']} tokens of prompt and response, and {settings.longest} may be asked for (data.max_prompt "
        "+ sampling.max_tokens); start it with --rollout.max_model_len of that, or lower these"
        for url, told in about.items()
        if int(told.get("longest", settings.longest)) < settings.longest
    ]
    if settings.lora and settings.rollout.adapters == "auto":
        rank, _ = holds(described(settings.model.path, settings.lora), merged=False)
        notes += [
            f"{url}: holds no adapters of rank {rank} apart, so that each update sends whole weights; start all servers with "
            f"--lora_rank {rank} for updates of the adapters alone"
            for url, told in about.items()
            if int(told.get("lora_rank") or 0) < rank
        ]
    problems = []
    if config:
        ours = Model.asked(settings.model.path, settings.model.dtype, settings.rollout.dtype, config)
        problems = [problem for url, told in about.items() for problem in differences(url, told, ours)] or between(about)
    if missing and not starts:
        problems += [
            f"rollout.urls: {url} {why}; start tulu-mega serve there, or write the address that it prints"
            for url, why in missing.items()
        ]
    if problems:
        raise UserError(problems)


def left_out(prompts: Prompts) -> list[str]:
    """In words, the rows that are not used, with the first of them; nothing where all are."""
    said = []
    for name, chosen in (("data.train", prompts.train), ("heldout.data", prompts.heldout)):
        if chosen and chosen.rejects:
            count, first = len(chosen.rejects), chosen.rejects[0]
            of = f"{count:,} of {count + len(chosen):,} rows"
            said.append(f"{name}: {of} are left out (the first: {first['where']}: {first['reason']})")
    return said


def answerable(prompts: Prompts, config: Mapping[str, Any]) -> None:
    """Prompts, and the token that ends a response, are of the model's vocabulary."""
    largest = {"data.tokenizer, as the end of a response,": max(prompts.ends)}
    for name, chosen in (("data.train", prompts.train), ("heldout.data", prompts.heldout)):
        largest[name] = max((max(one.ids) for one in chosen.prompts), default=0) if chosen else 0
    for name, token in largest.items():
        within_vocabulary(name, token, config)


def of_the_policys_tokens(
    settings: PolicyRunSettings,
    name: str,
    path: str,
    policy: Mapping[str, Any] | None,
    advice: str | None,
    parallel: ParallelSettings | None = None,
) -> None:
    """A reward model beside the policy has its tokens, and goes into its layout.

    Args:
        name: of the setting that names the model.
        path: the model's directory or hub name.
        policy: the policy's config.json, if it could be read.
        advice: what else to do with a language model than to make a reward model of it; None where one will do.
        parallel: the model's layout; the policy's when None.

    Raises:
        UserError: it has other tokens, was made for shorter sequences, or is a language model where that will not do.
    """
    model = settings.model.model_copy(update={"path": path})
    parts = dict(parallel=parallel or settings.parallel, precision=settings.precision, megatron=settings.megatron)
    try:
        config = model_config(EngineSettings(model=model, **parts))
    except UserError as error:  # which knows the model by the name of the setting that it mostly has
        told = [problem.replace("model.path = ", f"{name} = ") for problem in error.problems]
        told = [each.replace("parallel.", "value.parallel.") for each in told] if parallel else told
        raise UserError([each if path in each else f"{name} = {path}: {each}" for each in told]) from None
    if advice is not None and not family_for(config).reward:
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{name} = {path}: a language model; expected what tulu-mega rm makes{advice}")
    if policy and config["vocab_size"] != policy["vocab_size"]:
        raise UserError(
            f"{name} = {path} has a vocabulary of {config['vocab_size']}, the policy one of {policy['vocab_size']}; expected a "
            "reward model of the same tokenizer"
        )
    limit = config.get("max_position_embeddings")
    if limit and settings.longest > limit:
        raise UserError(
            f"{name} = {path} was made for {limit} tokens, but data.max_prompt = {settings.data.max_prompt} and "
            f"sampling.max_tokens = {settings.sampling.max_tokens} make {settings.longest}; lower either, or give another"
        )
    if other := vocabularies.difference(model_directory(settings.data.tokenizer or settings.model.path), model_directory(path)):
        raise UserError(f"{name} = {path} has another tokenizer than the policy: {other}; expected a reward model of the same")
