"""Settings of generation while a policy trains: servers, sampling, and the policy's loss."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from tulu_kernels.policy_choices import Aggregation, Divergence, Importance, Surrogate

from tulu_mega.config.effects import Effect
from tulu_mega.config.sections import ModelSettings, PositiveInt, Section

Seconds = Annotated[float, Field(gt=0)]
# The registry lies above settings and is asked by name; it does without torch.
Transport = Literal[("auto", *import_module("tulu_mega.weight_transfer.transports").names())]


class RolloutSettings(Section):
    servers: Annotated[PositiveInt, Effect.NONE] = 1
    """vLLM servers that the launcher starts on this machine."""
    tensor: Annotated[PositiveInt, Effect.NONE] = 1
    """vLLM's tensor parallel size, of each server."""
    python: Annotated[str | None, Effect.NONE] = None
    """Python that starts the servers, such as `/opt/serve/bin/python`: of an environment with vLLM and this version of tulu_mega.
    The one that runs this command when unset. Servers of `urls` do not use it."""
    urls: Annotated[list[str], Effect.NONE] = []
    """Servers that run already (`tulu-mega serve`, on any node), instead of ones started here; their key is read from
    TULU_MEGA_ROLLOUT_KEY."""
    dtype: Literal["model", "bf16", "fp32"] = "model"
    """Precision of the servers' weights; `model` is `model.dtype`."""
    quantization: Literal["none", "fp8"] = "none"
    """`fp8`: the servers' layers compute in FP8 with scales for blocks of 128 x 128 weights, quantized by the trainer as it sends
    them; the trainer's own precision is its own (`precision.fp8`). Needs servers in bf16."""
    adapters: Annotated[Literal["auto", "merged"], Effect.NONE] = "auto"
    """How servers have the adapters of [lora]. `auto`: apart from their weights where vLLM can hold them so, and an update is the
    adapters alone; else, and with `merged`, as whole weights with the adapters merged."""
    max_model_len: Annotated[PositiveInt | None, Effect.NONE] = None
    """Longest prompt and response together; what [data] and [sampling] may need when unset."""
    random_weights: Annotated[bool, Effect.NONE] = False
    """Start the servers with random weights, in place of reading the model's: the trainer sends its own before the first request,
    and a server answers none until it has them. The model's directory then needs no weights."""
    gpu_memory: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Effect.NONE] = None
    """Share of a GPU's memory that a server takes: 0.9 when unset. Has to be set where servers share a GPU with one another or
    with the trainer."""
    cpu_cache_gib: Annotated[PositiveInt, Effect.NONE] = 1
    """Gibibytes of a server's key-value cache on a CPU."""
    concurrency: Annotated[PositiveInt, Effect.NONE] = 256
    """Responses that a server computes at once; the others wait there."""
    transport: Annotated[Transport, Effect.NONE] = "auto"
    """How weights travel: shared memory (one host), gloo (several), NCCL or CUDA IPC (GPUs). `auto`: by where the servers are."""
    bucket_mib: Annotated[PositiveInt, Effect.NONE] = 256
    """Mebibytes of weights sent at once; a tensor larger than that has a bucket of its own."""
    start_timeout: Annotated[Seconds, Effect.NONE] = 600.0
    """Seconds a server may take to start."""
    request_timeout: Annotated[Seconds, Effect.NONE] = 600.0
    """Seconds that may pass between two answers of a server; then what it has not answered is asked again elsewhere, or of the
    same one, started again, where there is no other."""
    update_timeout: Annotated[Seconds, Effect.NONE] = 300.0
    """Seconds a bucket of weights may take to be loaded."""
    retries: Annotated[int, Field(ge=0), Effect.NONE] = 2
    """Times a request that failed is asked again, on another server where there is one."""
    restarts: Annotated[int, Field(ge=0), Effect.NONE] = 3
    """Times that the launcher starts each server anew after it died or got stuck."""

    @property
    def memory_share(self) -> float:
        """`gpu_memory`, or what it is when unset."""
        return 0.9 if self.gpu_memory is None else self.gpu_memory

    @field_validator("urls")
    @classmethod
    def _http(cls, urls: list[str]) -> list[str]:
        wrong = [url for url in urls if not url.lower().startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: expected URLs such as http://10.0.0.5:8000")
        urls = [url.rstrip("/") for url in urls]
        places: dict[tuple, list[str]] = {}
        for url in urls:
            parts = urlsplit(url)
            try:
                port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            except ValueError as error:
                raise ValueError(f"{url}: {error}; expected URLs such as http://10.0.0.5:8000") from None
            if not parts.hostname or parts.query or parts.fragment or parts.username is not None:
                raise ValueError(f"{url}: expected scheme, host and port, such as http://10.0.0.5:8000")
            places.setdefault((parts.hostname, port, parts.path), []).append(url)
        if twice := [" and ".join(each) for each in places.values() if len(each) > 1]:
            raise ValueError(f"{'; '.join(twice)}: these URLs are one server; name each server once")
        return urls


def check_servers(model: ModelSettings, rollout: RolloutSettings) -> None:
    """What model and servers ask of one another.

    Raises:
        ValueError: FP8 layers in servers of another precision than bf16.
    """
    dtype = model.dtype if rollout.dtype == "model" else rollout.dtype
    if rollout.quantization == "fp8" and dtype != "bf16":
        raise ValueError(
            f"rollout.quantization = 'fp8' needs servers in bf16, got {dtype!r} (rollout.dtype = {rollout.dtype!r}, "
            f"model.dtype = {model.dtype!r}); set rollout.dtype to 'bf16'"
        )


class SamplingSettings(Section):
    samples: Annotated[int, Field(ge=2)] = 16
    """Responses to a prompt: its group."""
    max_tokens: PositiveInt = 2048
    """Longest response."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 what was sampled is not what is trained: a warning says so."""


class PolicyLossSettings(Section):
    loss: Surrogate = "grpo"
    """`grpo`: the clipped surrogate; `dapo`: the same with an upper bound of 0.28 and token aggregation; `cispo`: the ratio
    clipped and held constant, times the log-probability; `gspo`: one ratio a sequence."""
    clip_low: Annotated[float, Field(gt=0)] = 0.2
    """Lower clip range: ratios below 1 less this are clipped. Unset: 0.2 (`gspo` 3e-4; `cispo` 1, no lower bound)."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """Upper clip range: ratios above 1 and this are clipped. Unset: 0.2 (`dapo` and `cispo` 0.28, `gspo` 4e-4)."""
    aggregation: Aggregation = "token"
    """What the loss is a mean of, over the mini-batch: its response tokens; its responses, each the mean of its tokens; or its
    responses, each the sum of its tokens over `sampling.max_tokens`. Unset, `token` (`gspo` `sequence`)."""
    beta: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the KL divergence from the initial model; 0 does without that model."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    importance: Importance = "token"
    """Correction for what sampler and trainer make of the same weights: each token's ratio of their probabilities, or a
    response's, as a weight that is cut at `importance_cap`."""
    importance_cap: Annotated[float, Field(gt=1)] = 2.0
    """Largest weight of this correction."""
    mask_above: Annotated[float, Field(gt=1)] | None = None
    """Leave out tokens (with `importance` `sequence`: responses) whose ratio is above this or below its inverse."""
    overlong: Literal["keep", "mask", "penalise"] = "penalise"
    """Responses that were cut off at `sampling.max_tokens`: as any other; in their group, but not trained on; or with
    `overlong_reward` in the place of their reward (Tulu 3)."""
    overlong_reward: float = -10.0

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, value):
        if isinstance(value, dict):
            usual = {
                "dapo": {"clip_high": 0.28},
                "cispo": {"clip_low": 1.0, "clip_high": 0.28},
                "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
            }.get(value.get("loss"), {})
            return {**usual, **{name: given for name, given in value.items() if given is not None or name == "mask_above"}}
        return value

    @property
    def reads_reference(self) -> bool:
        """Whether the loss compares with the initial model."""
        return self.beta > 0


class PolicySettings(PolicyLossSettings):
    advantages: Literal["centred", "standardised", "leave_one_out"] = "standardised"
    """A reward less its group's mean; that over the group's standard deviation; or less the mean of the others."""
    beta: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the KL divergence from the initial model, in the loss; 0 does without that model."""
    kl: Divergence = "k3"
    """Estimator of the KL divergence."""


class ServeSettings(Section):
    """`tulu-mega serve`: vLLM servers for a trainer on another node."""

    model: ModelSettings
    adapter: str | None = None
    """Directory of low-rank adapters in PEFT's format: requests that name `adapter` are answered with them, others by the model
    alone, and a trainer's adapters of no larger rank are held apart too. Where vLLM cannot hold them apart, all requests are
    answered by the merged weights."""
    lora_rank: Annotated[PositiveInt, Field(le=512)] | None = None
    """Largest rank of a trainer's low-rank adapters that the servers hold apart from their weights; `adapter`'s own when unset,
    and without it none."""
    rollout: RolloutSettings = RolloutSettings()
    """The trainer's [rollout]; only the settings that concern servers are read."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback one needs a key in TULU_MEGA_ROLLOUT_KEY; use an address of a private network."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Of the first server, the next ones take the next ones; 0: any that are free."""
    run_dir: str | None = None
    """Directory for the servers' logs; a temporary one, kept if a server fails, when unset."""

    @model_validator(mode="after")
    def _own_servers(self) -> ServeSettings:
        if self.rollout.urls:
            raise ValueError("rollout.urls is for the trainer: serve starts servers, it does not attach to any; leave it out")
        check_servers(self.model, self.rollout)
        if self.rollout.quantization == "fp8" and (self.adapter or self.lora_rank):
            raise ValueError("adapter and lora_rank do not go with rollout.quantization = 'fp8' yet; leave it out")
        return self
