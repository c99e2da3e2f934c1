"""A custom training loop over the engine: rows made in Python, a loop of one's own, an export that transformers loads.

python examples/python/custom_loop.py --model.path DIR --output trained --parallel.tensor 2
"""

from __future__ import annotations

import sys
from pathlib import Path

from tulu_mega import EngineSettings, OptimSettings, TokenizedRow, World, run_script


class LoopSettings(EngineSettings):
    """Trains a model to count upwards in a range of its tokens."""

    output: str
    """Directory to write the trained model to."""
    steps: int = 20
    """Updates."""
    optim: OptimSettings = OptimSettings(lr=1e-3, schedule="constant", warmup=0.0)


def rows(step: int, vocabulary: int) -> list[TokenizedRow]:
    """A global batch, the same on every rank: 16 sequences of 8 to 23 tokens, each token one more than that before it."""
    letters = range(vocabulary // 2, vocabulary // 2 + 32)  # a vocabulary begins with special tokens
    ids = [[letters[(step + row + at) % 32] for at in range(8 + row)] for row in range(16)]
    return [TokenizedRow(row, each, labels=each) for row, each in enumerate(ids)]  # IGNORE as a label: not trained


def run(settings: LoopSettings, world: World) -> None:
    """Train on every rank: the layout of `[parallel]` changes how the work is shared, not what comes out."""
    import torch

    from tulu_mega import SftObjective, opened, packed_share

    with opened(settings, world, seed=1) as session:
        session.load_weights()
        engine, objective = session.engine, SftObjective("token_mean")
        engine.prepare_training(settings.optim, settings.steps)
        for step in range(settings.steps):
            batch = packed_share(engine, rows(step, engine.hf.vocab_size), capacity=128)  # this rank's packs
            loss = engine.forward_backward(batch, objective)
            update = engine.optimizer_step(step, loss)
            if session.lead:
                print(f"step {step + 1}: loss {loss.loss:.4f}, gradient norm {update.grad_norm:.3f}", flush=True)
        session.export(Path(settings.output), torch.float32, {})


if __name__ == "__main__":
    sys.exit(run_script(run, LoopSettings))
