"""What ranks do in the tests of reward models, and transformers' answers to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.lib import families, jobs
from tests.lib.checkpoints import save
from tulu_mega.config import OptimSettings
from tulu_mega.errors import UserError
from tulu_mega.objectives.reward import RewardObjective
from tulu_mega.records import IGNORE, PackedBatch, TokenizedRow
from tulu_mega.train import checkpoint
from tulu_mega.train.session import Session

ADAM = OptimSettings(lr=1e-3, eps=1e-3, schedule="constant", warmup=0.0, clip=0.0)
"""an eps so large that rounding of small gradients makes no steps of its own"""


def make_model(directory: str, family: str, head: int = 8, labels: int = 1) -> None:
    """A small reward model as transformers makes and saves it, with the config of a language model, tied or not."""
    from transformers import AutoModelForSequenceClassification

    families.make_language_model(directory, family, head)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=labels, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.save_pretrained(directory)
    (Path(directory) / "generation_config.json").unlink(missing_ok=True)


def pairs(vocab: int, seed: int = 3) -> list[TokenizedRow]:
    """Four pairs; after the tokens that are trained some sequences go on."""
    made = []
    for sequence in jobs.sequences(vocab, seed=seed):
        after = 3 if sequence.row % 3 == 1 else 0
        kept = len(sequence.labels) - after
        made.append(TokenizedRow(sequence.row, sequence.input_ids, sequence.labels[:kept] + [IGNORE] * after))
    return made


def last(sequence: TokenizedRow) -> int:
    """Where the score is read."""
    return max(at for at, label in enumerate(sequence.labels) if label != IGNORE)


def hugging_face(
    directory: str, steps: int, lr: float, trained: str | None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The truth: transformers and torch autograd, one unpacked sequence at a time, plain SGD.

    Returns:
        scores by row, loss and gradient norm of every step; writes the trained model.
    """
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
    result: dict[str, Any] = {"scores": {}, "losses": [], "norms": []}
    for step in range(steps):
        batch = pairs(model.config.vocab_size, seed=3 + step)
        model.zero_grad()
        scores = [model(torch.tensor([each.input_ids[: last(each) + 1]])).logits[0, 0].double() for each in batch]
        if step == 0:
            result["scores"] = {each.row: float(score) for each, score in zip(batch, scores, strict=True)}
        chosen, rejected = torch.stack(scores).view(-1, 2).unbind(1)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        result["losses"].append(float(loss))
        result["norms"].append(float(torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters()))))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    if trained:
        model.save_pretrained(trained)
    return result


def scores(directory: str) -> dict[int, float]:
    """Transformers' scores of the first batch."""
    return hugging_face(directory, 1, 0.0, None)["scores"]


def unloaded(directory: str) -> list[str]:
    """Tensors that transformers misses or has no place for."""
    from transformers import AutoModelForSequenceClassification

    model, told = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert model.num_labels == 1
    return sorted(str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[kind])


def share(made: Session, micro_batches: int | None = None, seed: int = 3) -> list[PackedBatch]:
    """This rank's packed micro-batches of a batch of :func:`pairs`, each pair whole."""
    return jobs.share(made, pairs(made.engine.hf.vocab_size, seed), micro_batches, together=2)


def scored(made: Session, micro: list[PackedBatch]) -> dict[int, float]:
    """By row, on the ranks that have them."""
    found = {}
    for packed, score_T in zip(micro, made.engine.score(micro), strict=False):
        assert score_T.dtype == torch.float32
        at = packed.ends_T.nonzero().squeeze(1)
        rows = packed.rows_S[packed.segments_T[at]]
        found |= dict(zip(rows.tolist(), score_T[at].tolist(), strict=True))
    return found


def engine(
    directory: str,
    layout: dict[str, Any],
    micro_batches: int | None,
    steps: int,
    lr: float,
    trained: str | None,
    recompute: str = "none",
    dtype: str = "fp32",
) -> dict[str, Any]:
    """The same as :func:`hugging_face` by the engine under a layout."""
    with jobs.session(directory, layout, dtype, recompute) as made:
        result: dict[str, Any] = {"scores": scored(made, share(made, micro_batches)), "losses": [], "norms": []}
        optim = OptimSettings(name="sgd", lr=lr, schedule="constant", warmup=0.0, clip=0.0)
        made.engine.prepare_training(optim, steps)
        for step in range(steps):
            loss = made.engine.forward_backward(share(made, micro_batches, seed=3 + step), RewardObjective())
            result["losses"].append(loss.loss)
            result["norms"].append(made.engine.optimizer_step(step, loss.loss).grad_norm)
        if trained:
            made.export(Path(trained), torch.float32, {})
        return result


def drawn(directory: str, layout: dict[str, Any], seed: int, out: str) -> tuple[dict[int, float], list[tuple[str, list[int]]]]:
    """A reward model from a language model, written; its scores and this rank's parameters."""
    with jobs.session(directory, layout, reward=True, seed=seed, load=False) as made:
        for chunk in made.engine.chunks:
            for parameter in chunk.parameters():  # whatever is neither loaded nor drawn shows
                torch.nn.init.constant_(parameter, float("nan"))
        made.load_weights()
        made.export(Path(out), torch.float32, {})
        held = [(name, list(p.shape)) for chunk in made.engine.chunks for name, p in chunk.named_parameters()]
        return scored(made, share(made)), held


def converted(directory: str, layout: dict[str, Any]) -> dict[int, float]:
    """Scores by the weights of a directory of either format."""
    with jobs.session(directory, layout) as made:
        return scored(made, share(made))


def steps(made: Session, begin: int, end: int) -> None:
    """Optimizer steps on batches of their own."""
    for step in range(begin, end):
        loss = made.engine.forward_backward(share(made, seed=3 + step), RewardObjective())
        assert made.engine.optimizer_step(step, loss.loss).applied


def undisturbed(directory: str, layout: dict[str, Any], checkpoints: str, middle: str, out: str) -> None:
    """Two steps of Adam, a checkpoint and an export, two more steps, an export."""
    with jobs.session(directory, layout, reward=True) as made:
        made.engine.prepare_training(ADAM, 4)
        steps(made, 0, 2)
        save(made.engine, Path(checkpoints), 2, {}, keep=1)
        made.export(Path(middle), torch.float32, {})
        steps(made, 2, 4)
        made.export(Path(out), torch.float32, {})


def resumed(directory: str, layout: dict[str, Any], checkpoints: str | None, out: str) -> None:
    """The last two steps from the checkpoint, or with an optimizer that remembers nothing, from the directory's weights."""
    with jobs.session(directory, layout, reward=True, load=not checkpoints) as made:
        made.engine.prepare_training(ADAM, 4)
        if checkpoints:
            (found,) = checkpoint.find(Path(checkpoints))
            checkpoint.restore({"model": made.engine}, found)
        steps(made, 2, 4)
        made.export(Path(out), torch.float32, {})


def foreign(directory: str, checkpoints: str, reward: bool) -> list[str]:
    """What is told of a checkpoint of the other kind of model."""
    with jobs.session(directory, {}, reward=reward, load=False) as made:
        made.engine.prepare_training(ADAM, 4)
        (found,) = checkpoint.find(Path(checkpoints))
        try:
            checkpoint.restore({"model": made.engine}, found)
        except UserError as error:
            return error.problems
    return []


def refused(directory: str, reward: bool | None) -> list[str]:
    """What is told of a directory that cannot be opened so."""
    try:
        with jobs.session(directory, {}, reward=reward):
            pass
    except UserError as error:
        return error.problems
    return []
