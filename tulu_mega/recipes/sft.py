"""Supervised fine-tuning (Tulu 3, arXiv 2411.15124, section 4): packed conversations, loss on the assistant's turns."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tulu_mega import checkpoint
from tulu_mega.config import SftSettings
from tulu_mega.data.chat import TULU_CHAT_TEMPLATE
from tulu_mega.data.cost import sequence_flops
from tulu_mega.data.loader import PackedLoader, StepData
from tulu_mega.data.store import REJECTS, TokenStore
from tulu_mega.launcher import World
from tulu_mega.metrics import MetricsLog, peak_flops
from tulu_mega.model.config import DTYPES
from tulu_mega.objectives.sft import SftObjective
from tulu_mega.planner.flops import training_flops
from tulu_mega.preflight import CONFIG, DATA
from tulu_mega.recipes.loop import Fit, Skips
from tulu_mega.recipes.session import Session, locked, opened, write_settings


def run(settings: SftSettings, world: World) -> None:
    """Trains until the last step and exports the model; goes on from the newest checkpoint in the run directory.

    The tokenised data is in RUN_DIR/data already (`preflight.ready`).

    Raises:
        UserError: on every rank, for whatever the user can mend.
    """
    run_dir = Path(settings.run_dir)
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(run_dir))
        session = stack.enter_context(opened(settings, world, settings.seed))
        store = TokenStore.open(run_dir / DATA)
        loader = _loader(session, settings, store)
        loader.check()

        start, skips = _weights(session, settings, store, loader.steps, run_dir)
        log = None
        if session.lead:
            write_settings(settings, run_dir / CONFIG)
            print(_banner(session, store, loader, start), flush=True)
            log = stack.enter_context(_metrics(session, settings, loader.steps, start))

        config = session.engine.hf.to_dict()

        def flops(data: StepData) -> float:
            return training_flops(config, store.lengths[data.rows])

        objective = SftObjective(settings.train.reduction)
        Fit(session.engine, loader, objective, settings.checkpoint, run_dir / "checkpoints", skips, flops, log).run(start)
        if settings.checkpoint.export:
            _export(session, settings, run_dir / "hf")


def _loader(session: Session, settings: SftSettings, store: TokenStore) -> PackedLoader:
    hf, place = session.engine.hf, session.topology
    cost = sequence_flops(hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, hf.vocab_size)
    return PackedLoader(
        store,
        settings.train,
        settings.data,
        settings.seed,
        session.align,
        place.data_rank,
        place.data,
        cost=cost,
        pipeline=session.pipeline,
    )


def _weights(session: Session, settings: SftSettings, store: TokenStore, steps: int, run_dir: Path) -> tuple[int, Skips]:
    """Weights and optimizer: those of the newest checkpoint, or the model's own. Returns the steps done."""
    found = checkpoint.find(run_dir / "checkpoints")
    if not found:
        session.load_weights()
    session.engine.prepare_training(settings.optim, steps)
    skips = Skips(settings.train.max_skipped, run_dir / "logs" / "skipped.jsonl", store.where)
    if not found:
        return 0, skips
    newest = found[-1]
    checkpoint.restore(session.engine, newest)
    skips.total, skips.in_a_row = newest.state["skipped"], newest.state["skipped_in_a_row"]
    return newest.step, skips


def _metrics(session: Session, settings: SftSettings, steps: int, start: int) -> MetricsLog:
    device = session.engine.platform.device
    return MetricsLog(
        settings.run_dir,
        settings,
        steps,
        resumed_step=start,
        world_size=session.topology.size,
        device=device,
        peak=peak_flops(device, DTYPES[settings.model.dtype]),
    )


def _banner(session: Session, store: TokenStore, loader: PackedLoader, start: int) -> str:
    kept = f"{len(store):,} sequences of {int(store.lengths.sum()):,} tokens"
    dropped = f" ({store.dropped:,} rows not used: {store.directory / REJECTS})" if store.dropped else ""
    at = f", going on after step {start}" if start else ""
    return f"{session.topology} · {session.settings.model.path} · {kept}{dropped} · {loader.steps:,} steps{at}"


def _export(session: Session, settings: SftSettings, directory: Path) -> None:
    wanted = settings.checkpoint.export_dtype
    dtype = DTYPES[settings.model.dtype if wanted == "model" else wanted]
    template = {"chat_template.jinja": TULU_CHAT_TEMPLATE} if settings.data.template == "tulu" else {}
    session.export(directory, dtype, template)
    if session.lead:
        print(f"model in Hugging Face format: {directory}", flush=True)
