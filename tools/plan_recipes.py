"""What `tulu-mega plan` says of every recipe under examples/: memory, speed, what bounds it and what would change that.

python tools/plan_recipes.py                              the table
python tools/plan_recipes.py --json > before.json         figures, of an older tree too
python tools/plan_recipes.py --before before.json         both, side by side
python tools/plan_recipes.py --before before.json --write docs/reference/planned_recipes.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path.cwd()))  # an older tree's package, where this is run in one

from tulu_mega.errors import UserError  # noqa: E402
from tulu_mega.plan.outlook import Outlook, outlook  # noqa: E402
from tulu_mega.plan.question import Question  # noqa: E402
from tulu_mega.plan.run import ask  # noqa: E402
from tulu_mega.plan.settings import PlanSettings  # noqa: E402

_GPUS = 8
"""Of recipes that leave the data-parallel size open: a machine."""
_GIB = 2**30
_KIND = {"405b": {"grpo": "h200", "ppo": "h200"}}
"""Servers' GPUs that are others than H100."""
_VALUE = {"tulu3": "8b"}
"""Size of the value models that are of another than the policy."""
_NAMES = {
    "products": "products",
    "attention": "attention",
    "elementwise": "between products",
    "tensor": "tensor-parallel messages",
    "context": "context-parallel messages",
    "pipeline": "pipeline transfers",
    "host": "waiting for the host",
    "idle": "waiting in the pipeline",
    "data": "gradients and parameters",
    "optimizer": "optimizer",
    "value": "value model",
    "scoring": "scoring",
    "generation": "generation",
    "sync": "weights to the servers",
}


def recipes() -> Iterator[Path]:
    """Every recipe, small models first."""
    for family in ("tulu3", "olmo2"):
        sizes = sorted((Path("examples") / family).iterdir(), key=lambda each: int(each.name.removesuffix("b")))
        yield from (file for size in sizes for file in sorted(size.glob("*.toml"), key=lambda each: each.name[::-1]))


def question_of(file: Path) -> Question:
    """What is asked about a recipe."""
    family, size = file.parts[-3], file.parts[-2]
    architectures, name = ROOT / "examples/architectures", {"tulu3": "llama3.1", "olmo2": "olmo2"}[family]
    asked = dict(config=[str(file)], model=str(architectures / f"{name}_{size}"), stage=file.stem.split("_")[0])
    if asked["stage"] == "ppo":
        asked["value"] = {"path": str(architectures / f"{name}_{_VALUE.get(family, size)}")}
    if kind := _KIND.get(size, {}).get(file.stem):
        asked["rollout_gpu"] = kind
    question = ask(PlanSettings(**asked))
    if question.settings.parallel.data is None:
        question = replace(question, gpus=_GPUS)
    return question


def figures(found: Outlook) -> dict:
    """Of a plan, as far as an older one has them too."""
    value = getattr(found, "value", None)
    steps = [found.step, *([value.step] if value else [])]
    flops = sum(step.flops for step in steps) / sum(step.seconds for step in steps) / found.job.world
    parts = {
        **found.step.parts,
        "value": value.seconds if value else 0.0,
        "scoring": found.scoring,
        "generation": found.generation,
        "sync": found.sync,
    }
    parallel = found.job.parallel
    sizes = dict(TP=parallel.tensor, PP=parallel.pipeline, VPP=parallel.virtual_pipeline, CP=parallel.context, DP=found.job.data)
    peak = found.job.gpu.fp8 if found.job.fp8 else found.job.gpu.bf16
    model = found.question.settings.model
    return {
        "gpus": found.gpus,
        "layout": " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1),
        "recompute": model.recompute if isinstance(model.recompute, str) else "+".join(model.recompute),
        "memory": found.fullest.total,
        "of": found.job.gpu.memory,
        "seconds": found.seconds,
        "tflops": flops / 1e12,
        "mfu": flops / peak,
        "tokens": found.step.tokens / found.seconds / found.gpus,
        "parts": parts,
        "problems": found.problems,
    }


def changed(question: Question, **sections: dict) -> Question:
    """The same question with some settings changed."""
    settings = question.settings
    content = settings.model_dump()
    for name, values in sections.items():
        content[name] = {**content[name], **values}
    return replace(question, settings=type(settings).model_validate(content))


def switches(found: Outlook) -> dict[str, tuple[str, Callable[[], Question]]]:
    """For what a step's time goes to: the switch that changes it, and the question with it."""
    question, settings = found.question, found.question.settings
    parallel, train = settings.parallel, settings.train
    made = {}
    if found.job.fp8:
        made["products"] = ("precision.fp8 = 'off'", lambda: changed(question, precision={"fp8": "off"}))
    elif found.job.recompute.layers != 0 or "mlp" in found.job.recompute.modules:
        nothing = {"recompute": "none", "recompute_layers": None}
        made["products"] = ("model.recompute = 'none'", lambda: changed(question, model=nothing))
    else:
        made["products"] = ("precision.fp8 = 'tensorwise'", lambda: changed(question, precision={"fp8": "tensorwise"}))
    made["elementwise"] = ("parallel.grad_dtype = 'bf16'", lambda: changed(question, parallel={"grad_dtype": "bf16"}))
    if parallel.tensor > 1:
        half = parallel.tensor // 2
        data = parallel.data and parallel.data * 2
        made["tensor"] = (f"parallel.tensor = {half}", lambda: changed(question, parallel={"tensor": half, "data": data}))
    if question.workload.rollout is None:
        batch = train.global_batch * 2
        doubled = {"global_batch": batch, "micro_batches": train.micro_batches and train.micro_batches * 2}
        for name in ("idle", "data", "optimizer"):
            made[name] = (f"train.global_batch = {batch}, fewer updates", lambda: changed(question, train=doubled))
    else:
        if settings.rollout.quantization == "none":
            made["generation"] = ("rollout.quantization = 'fp8'", lambda: changed(question, rollout={"quantization": "fp8"}))
        twice = train.prompts * 2
        made["idle"] = (f"train.prompts = {twice}", lambda: changed(question, train={"prompts": twice}))
        if question.workload.reference:
            made["scoring"] = ("policy.beta = 0, no reference", lambda: changed(question, policy={"beta": 0.0}))
    return made


def bounds(found: Outlook) -> str:
    """The three largest terms, each with its switch and what the switch does to tokens/s."""
    parts = figures(found)["parts"]
    known, told = switches(found), []
    for name in sorted(parts, key=lambda name: -parts[name])[:3]:
        share = f"{_NAMES[name]} {parts[name] / found.seconds:.0%}"
        if name in known:
            words, asked = known[name]
            share += f" ({words}: {_gain(found, asked)})"
        told.append(share)
    return "; ".join(told)


def _gain(found: Outlook, asked: Callable[[], Question]) -> str:
    try:
        other = outlook(asked())
    except (UserError, ValueError):
        return "does not divide"
    if other.problems:
        return "does not fit"
    gain = figures(other)["tokens"] / figures(found)["tokens"] - 1
    return f"{gain:+.0%}".replace("+0%", "no gain").replace("-0%", "no gain")


def table(before: dict) -> str:
    """All recipes."""
    lines = [
        "| recipe | GPUs | layout | computed again | GiB of 79.1 | step, s | TFLOP/s | of peak | "
        "where the time goes (switch: tokens/s) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for file in recipes():
        found = outlook(question_of(file))
        now, name = figures(found), "/".join(file.parts[1:]).removesuffix(".toml")
        was = before.get(name)

        def pair(key: str, shown: str, scale: float = 1.0, was: dict | None = was, now: dict = now) -> str:
            values = [each[key] * scale for each in (was, now) if each]
            texts = [format(value, shown) if value < float("inf") else "never" for value in values]
            return " → ".join(dict.fromkeys(texts))

        def words(key: str, was: dict | None = was, now: dict = now) -> str:
            return " → ".join(dict.fromkeys(each[key] for each in (was, now) if each))

        gpus = " → ".join(dict.fromkeys(str(each["gpus"]) for each in (was, now) if each))
        lines.append(
            f"| {name} | {gpus} | {words('layout')} | {words('recompute')} | {pair('memory', '.1f', 1 / _GIB)} | "
            f"{pair('seconds', '.2f')} | {pair('tflops', '.0f')} | {pair('mfu', '.0%')} | {bounds(found)} |"
        )
        for problem in found.problems:
            lines.append(f"| | | | | | | | | **{problem}** |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints, or writes between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="figures for programs")
    parser.add_argument("--before", type=Path, help="such figures, to be told beside")
    parser.add_argument("--write", type=Path, help="a page whose table between the marks is made anew")
    given = parser.parse_args()
    if given.json:
        made = {"/".join(file.parts[1:]).removesuffix(".toml"): figures(outlook(question_of(file))) for file in recipes()}
        print(json.dumps(made, indent=1).replace("Infinity", "1e999"))
        return
    made = table(json.loads(given.before.read_text()) if given.before else {})
    if not given.write:
        print(made, end="")
        return
    page = given.write.read_text()
    begin, end = "<!-- plans: tools/plan_recipes.py -->\n", "<!-- end -->"
    head, rest = page.split(begin, 1)
    given.write.write_text(f"{head}{begin}{made}{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    main()
