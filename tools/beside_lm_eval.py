"""Verdicts of GSM8K, BIG-Bench Hard and IFEval beside lm-evaluation-harness' on the same responses, every difference shown.

    python tools/beside_lm_eval.py OUTPUT ...      # of `tulu-mega eval`: its samples/{gsm8k,bbh,ifeval}.jsonl
    python tools/beside_lm_eval.py --answers DIR   # published answers: bbh_codex_outputs.jsonl, gsm8k_model_solutions.jsonl

Needs `make peers`. The harness judges as its tasks gsm8k_cot (both filters), bbh_cot_fewshot and ifeval (strict and loose) do.
It has no model and fetches nothing but NLTK's `punkt_tab` for IFEval, unless NLTK_DATA names a directory that has it. Prints a
JSON line a task and filter, then one for each response that is judged differently.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from race.racing import PEERS

from tulu_mega.evaluation.judging import judge
from tulu_mega.evaluation.task import Problem
from tulu_mega.evaluation.tasks import TASKS

SHOWN = 40
"""Differences of a task and filter that are printed."""
_FIRST = {"function": "take_first"}
JUDGING: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [{"function": "regex", "regex_pattern": r"The answer is (\-?[0-9\.\,]+)."}, _FIRST],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
                    _FIRST,
                ],
            },
        ],
        "metric_list": [
            {
                "metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                "ignore_punctuation": False, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
            }
        ],
    },
    "bbh": {
        "filter_list": [
            {"name": "get-answer", "filter": [{"function": "regex", "regex_pattern": "(?<=the answer is )(.*)(?=.)"}, _FIRST]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "ifeval": {
        "metric_list": [
            {"metric": "prompt_level_strict_acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "prompt_level_loose_acc", "aggregation": "mean", "higher_is_better": True},
        ]
    },
}  # fmt: skip
"""Of lm-evaluation-harness 0.4.13's gsm8k/gsm8k-cot.yaml, bbh/cot_fewshot and ifeval."""

METRICS = {
    "gsm8k": {"strict-match": "exact_match", "flexible-extract": "exact_match"},
    "bbh": {"get-answer": "exact_match"},
    "ifeval": {"strict": "prompt_strict", "loose": "prompt_loose"},
}
"""task -> filter of the harness -> metric of ours"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="*", type=Path)
    parser.add_argument("--answers", type=Path)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {}
    for output in options.outputs:
        for task in JUDGING:
            if (file := output / f"samples/{task}.jsonl").exists():
                rows.setdefault(task, []).extend(of_samples(file))
    if options.answers:
        for task, found in published(options.answers).items():
            rows.setdefault(task, []).extend(found)
    if not rows:
        parser.error("nothing to judge; name an output of eval, or --answers DIR")
    ours = {task: verdicts(task, found) for task, found in rows.items()}
    for theirs in harness(rows):
        task, chosen = theirs[0]["task"], theirs[0]["filter"]
        report(theirs, rows[task], ours[task][METRICS[task][chosen]])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def of_samples(file: Path) -> list[dict[str, Any]]:
    """Responses of an evaluation."""
    return [{**_asked(row, file.stem), "response": one["response"]} for row in lines(file) for one in row["responses"]]


def _asked(row: dict[str, Any], task: str) -> dict[str, Any]:
    if task != "ifeval":
        return {"target": row["answer"]}
    names, given = zip(*row["answer"], strict=True)
    return {"prompt": row["messages"][-1]["content"], "instruction_id_list": names, "kwargs": json.dumps(given), "target": ""}


def published(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Published answers, with the verdict that they were published with where there is one."""
    bbh = [{"target": row["target"], "response": row["prediction"]} for row in lines(directory / "bbh_codex_outputs.jsonl")]
    gsm8k = [
        {
            "target": row["ground_truth"].rpartition("A: ")[2].replace(",", ""),
            "response": one["solution"],
            "label": one["is_correct"],
        }
        for row in lines(directory / "gsm8k_model_solutions.jsonl")
        for one in row.values()
        if isinstance(one, dict)
    ]
    return {"bbh": bbh, "gsm8k": gsm8k}


def verdicts(task: str, rows: list[dict[str, Any]]) -> dict[str, list[bool]]:
    """What `tulu-mega eval` says of each response, by metric."""
    verifier = None if TASKS[task].judge else "last_number"
    answers = [row["target"] if task != "ifeval" else _instructions(row) for row in rows]
    problems = [Problem([], answer, verifier=verifier) for answer in answers]
    judged = judge(TASKS[task], problems, [[row["response"]] for row in rows], {})
    return {
        metric: [one.values is not None and one.values[metric][0] == 1 for (one,) in judged] for metric in METRICS[task].values()
    }


def _instructions(row: dict[str, Any]) -> list[list[Any]]:
    return [list(pair) for pair in zip(row["instruction_id_list"], json.loads(row["kwargs"]), strict=True)]


def harness(rows: dict[str, list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The harness' verdicts, by task and filter."""
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch, "given.json"), Path(scratch, "verdicts.jsonl")
        given.write_text(json.dumps({task: {"judging": JUDGING[task], "rows": several} for task, several in rows.items()}))
        program = Path(__file__).parent / "race/peers/harness_verdicts.py"
        subprocess.run([PEERS, str(program), str(given), str(found)], check=True, stdout=subprocess.DEVNULL)
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in lines(found):
            groups.setdefault((row["task"], row["filter"]), []).append(row)
    return list(groups.values())


def report(theirs: list[dict[str, Any]], rows: list[dict[str, Any]], ours: list[bool]) -> None:
    """A line of both scores, then the responses that are judged differently."""
    differing = [one for one in theirs if one["right"] != ours[one["place"]]]
    right = sum(one["right"] for one in theirs)
    first = {"task": theirs[0]["task"], "filter": theirs[0]["filter"], "responses": len(theirs)}
    counted = Counter("ours right" if ours[one["place"]] else "theirs right" for one in differing)
    print(json.dumps({**first, "ours": sum(ours), "lm_eval": right, "judged differently": dict(counted)}))
    for one in differing[:SHOWN]:
        row = rows[one["place"]]
        shown = {"ours": ours[one["place"]], "lm_eval": one["right"], "lm_eval found": one["found"], "target": row["target"]}
        label = {"label": row["label"]} if "label" in row else {}
        print(json.dumps({**shown, **label, "response ends": row["response"][-160:]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
