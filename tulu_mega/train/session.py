"""The beginning of every stage on a Megatron model: a place among the ranks, the model, its weights, a run directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tulu_mega import platforms
from tulu_mega.bridge.adapters import adapter_family
from tulu_mega.bridge.families import family_for
from tulu_mega.bridge.families.reward import check_language_model, reward_fields
from tulu_mega.bridge.files.companions import OtherTokenizer
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.bridge.files.hf_files import HfCheckpoint
from tulu_mega.bridge.files.hub import is_megatron, model_directory
from tulu_mega.bridge.files.peft import adapter_config, open_adapter, resolved
from tulu_mega.bridge.live import export_adapters, export_hf, load_hf
from tulu_mega.bridge.rules import Config
from tulu_mega.bridge.shards import ModelShard, Values
from tulu_mega.bridge.stream import LiveWeights
from tulu_mega.config import EngineSettings, ParallelSettings, RolloutSettings
from tulu_mega.config.lora import LoraSettings
from tulu_mega.distributed import topology
from tulu_mega.distributed.topology import Topology
from tulu_mega.errors import Stopped, UserError
from tulu_mega.launch.launcher import World
from tulu_mega.launch.run_files import write_whole
from tulu_mega.layout.alignment import Alignment
from tulu_mega.layout.packing_rules import pack_alignment, pipeline_of
from tulu_mega.layout.schedule import Pipeline
from tulu_mega.model.hf_config import load_config
from tulu_mega.model.lora import draw
from tulu_mega.model.reward import HEAD
from tulu_mega.platforms import Platform
from tulu_mega.resilience.watchdog import Watchdog
from tulu_mega.train import checkpoint
from tulu_mega.train.engine import Engine
from tulu_mega.weight_transfer.adapters import apart_obstacles
from tulu_mega.weight_transfer.base import identity
from tulu_mega.weight_transfer.counterpart import Model
from tulu_mega.weight_transfer.sender import Apart, Sender, stream_dtype


@dataclass(frozen=True)
class Session:
    """A world of ranks that have met, and an engine in it. `load_weights` fills the engine."""

    settings: EngineSettings
    topology: Topology
    engine: Engine
    source: Path
    """Directory that the model came from."""
    seed: int
    """Seed of the random states, and of weights that are drawn instead of loaded."""
    watch: Watchdog

    @property
    def lead(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.topology.rank == 0

    @property
    def align(self) -> Alignment:
        """The multiples that layout and FP8 recipe require of lengths."""
        return pack_alignment(self.settings)

    @property
    def pipeline(self) -> Pipeline:
        """The layout's description for the simulation of the pipeline schedule."""
        return pipeline_of(self.engine.hf.to_dict(), self.settings)

    def load_weights(self) -> None:
        """Load the weights from the model's directory, of either format; each rank reads its own slices.

        A reward model that is made from a language model gets a random head, the same under every layout.

        Raises:
            UserError: with everything that does not fit.
        """
        self.engine.at("loading weights")
        family = family_for(read_config(self.source))
        drawn = (HEAD,) if self.engine.reward and not family.reward else ()
        if is_megatron(self.source) and self.engine.lora and self.engine.lora.quantized:
            raise UserError(
                f"model.path = {self.settings.model.path!r}: is in Megatron's format, and lora.base_precision = "
                f"{self.engine.lora.base_precision!r} reads Hugging Face's; convert it: tulu-mega convert --to hf"
            )
        if is_megatron(self.source):
            checkpoint.load_weights(self.engine, self.source, leave=drawn)
        else:
            with contextlib.closing(HfCheckpoint.open(self.source)) as files:
                load_hf(self.shard(files.config), files, leave=drawn)
        if drawn:
            for chunk in self.engine.chunks:
                chunk.initialise_head(self.seed)
        if self.engine.lora:
            self._begin_adapters(self.engine.lora)

    def _begin_adapters(self, lora: LoraSettings) -> None:
        config = self.engine.hf.to_dict()
        if lora.adapter is None:
            draw(self.engine.chunks, lora, family_for(config), config, self.topology, self.seed)
            return
        with contextlib.closing(open_adapter(lora.adapter)[1]) as files:
            load_hf(self._thin(config), files)

    def _thin(self, config: Config) -> ModelShard:
        """This rank's part of the adapters."""
        lora, shard = self.engine.lora, self.shard(config)
        return replace(shard, family=adapter_family(shard.family, lora, config))

    def shard(self, config: Config) -> ModelShard:
        """This rank's part of the model.

        Args:
            config: the config.json by which the model is read, written or sent.
        """
        place = self.topology
        shard = ModelShard(self.engine.chunks, config, family_for(config), place, place.tensor_group, place.pipeline_group)
        return replace(shard, merged=self._merged) if self.engine.lora else shard

    def _merged(self, parameter: Tensor) -> Values:
        found = (chunk.adapters.merged(parameter) for chunk in self.engine.chunks)
        return next((each for each in found if each is not parameter), parameter)

    def beside(self, path: str, reward: bool, new_head: bool = False, parallel: ParallelSettings | None = None) -> Session:
        """Build another model and load its weights. Only the weights take memory until it is trained.

        Under the same layout and with equal weights it computes the same bits as this session's model.

        Args:
            path: its directory of either format, or hub name.
            reward: whether it is to be a reward model.
            new_head: whether a language model will do for one, whose head is drawn.
            parallel: its layout; this one's when None.

        Raises:
            UserError: it cannot be had or built, or is of the other kind, or its layout does not fit the world.
        """
        place, patience = self.topology, _patience(self.settings.watchdog.timeout)
        if parallel is not None:
            place = topology.another(parallel, self.engine.platform, patience)
        settings = EngineSettings(
            model=self.settings.model.model_copy(update={"path": path}),
            parallel=parallel or self.settings.parallel,
            precision=self.settings.precision,
            megatron=self.settings.megatron,
        )
        engine = self.engine
        made = _session(settings, place, engine.platform, self.seed, reward, self.watch, engine.temperature, engine.shares)
        if reward and not new_head and not family_for(read_config(made.source)).reward:
            raise UserError(f"{path}: expected a reward model, got a language model; tulu-mega rm makes reward models")
        made.load_weights()
        return made

    def sender(self, rollout: RolloutSettings) -> Sender:
        """This rank's part in giving the model's weights to servers.

        Args:
            rollout: what the servers take.
        """
        place, engine, weights, apart = self.topology, self.engine, None, None
        config, dtype = engine.hf.to_dict(), stream_dtype(self.settings.model.dtype, rollout.dtype)
        stream = partial(LiveWeights, dtype=dtype, kernels=self.settings.model.kernels)
        if place.first_copy:
            weights = stream(self.shard(config), fp8=rollout.quantization == "fp8")
        if engine.lora and rollout.adapters == "auto" and not apart_obstacles(told := self._adapter_config()):
            base = identity(self.source, str(dtype).removeprefix("torch.")) if self.lead else ""
            adapters = frozen = None
            if place.first_copy:
                adapters, frozen = stream(self._thin(config)), stream(replace(self.shard(config), merged=lambda each: each))
            apart = Apart(told, adapters, base, frozen)
        sends = place.gives_whole_tensors
        model = Model.asked(self.settings.model.path, self.settings.model.dtype, rollout.dtype, config)
        return Sender(model, weights, sends, place.pipeline_rank, engine.platform.device, engine.at, self._settle, apart)

    def _adapter_config(self) -> dict[str, Any]:
        """What adapter_config.json says of the adapters."""
        return adapter_config(self.settings.model.path, self.engine.lora, self.engine.reward)

    def export(
        self,
        directory: Path,
        dtype: torch.dtype,
        extra_files: dict[str, str],
        tokenizer: OtherTokenizer | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        """Writes the model in Hugging Face format; every rank calls it. What goes beside the weights is rank 0's.

        Raises:
            UserError: the directory cannot be used.
        """
        self.engine.at("export")
        self._settle()
        config = read_config(self.source)
        if self.engine.reward:
            config |= reward_fields(family_for(config), config)
        export_hf(self.shard(config), directory, dtype, self.source, extra_files, tokenizer, ends)

    def _settle(self) -> None:
        """Wait until the parameters are those of the last update, and what is merged goes with them. A collective."""
        self.engine.settle()
        if self.engine.lora:
            for chunk in self.engine.chunks:
                chunk.adapters.look()

    def export_adapters(self, directory: Path, dtype: torch.dtype) -> None:
        """Writes the adapters as PEFT does; every rank calls it.

        Raises:
            UserError: the directory cannot be used.
        """
        engine, config = self.engine, self.engine.hf.to_dict()
        engine.at("export")
        engine.settle()
        export_adapters(self._thin(config), directory, dtype, self._adapter_config())


@contextlib.contextmanager
def opened(
    settings: EngineSettings,
    world: World,
    seed: int,
    reward: bool | None = None,
    temperature: float = 1.0,
    shares: bool = False,
    lora: LoraSettings | None = None,
) -> Iterator[Session]:
    """Join the world, build this rank's part of the model, and leave the world at the end.

    Args:
        seed: of the random states, and of a reward model's new head.
        reward: whether to build a reward model, for which a language model's directory will do; None follows config.json.
        temperature: the temperature at which a policy's responses are sampled.
        shares: whether sequences may share prefixes within a pack.
        lora: low-rank adapters, which alone are trained then.

    Raises:
        UserError: the model cannot be had or built, or is a reward model where a language model is wanted.
    """
    platform = platforms.install(world.local_rank)
    place = topology.start(settings.parallel, platform, seed, _patience(settings.watchdog.timeout))
    with Watchdog(settings.watchdog.timeout) as watch:
        try:
            yield _session(settings, place, platform, seed, reward, watch, temperature, shares, lora)
        except Stopped:  # on every rank
            topology.stop()
            raise
    topology.stop()  # after an error the others may be waiting in a collective: the process ends instead


def _patience(watchdog: float) -> timedelta:
    """How long a collective, or the ranks' first meeting, may take: longer than the watchdog, which says more about a hang."""
    return timedelta(seconds=max(1800.0, 2 * watchdog + 60)) if watchdog else timedelta(days=30)


def _session(
    settings: EngineSettings,
    place: Topology,
    platform: Platform,
    seed: int,
    reward: bool | None,
    watch: Watchdog,
    temperature: float,
    shares: bool,
    lora: LoraSettings | None = None,
) -> Session:
    source = model_directory(settings.model.path)
    hf = load_config(settings.model.model_copy(update={"path": str(source)}))
    family = family_for(hf.to_dict())
    if reward is False:
        check_language_model(settings.model.path, hf.architectures)
    if reward or family.reward:
        hf.update(reward_fields(family, hf.to_dict()))
    rewards = family.reward if reward is None else reward
    adapters = resolved(lora)
    engine = Engine(hf, settings, place, platform, rewards, temperature, at=watch.at, shares=shares, lora=adapters)
    return Session(settings, place, engine, source, seed, watch)


def write_settings(settings: EngineSettings, file: Path) -> None:
    """The resolved settings as JSON, whole or not at all."""
    write_whole(file, json.dumps(json.loads(settings.model_dump_json()), indent=2) + "\n")
