"""What lm-evaluation-harness makes of given responses: its filters and its comparison, with no model and no download.

    python harness_verdicts.py GIVEN.json VERDICTS.jsonl

GIVEN.json holds by task the harness' own settings of judging (`filter_list`, `metric_list`) and rows of `target` and `response`.
A line of VERDICTS.jsonl is a row's: task, its place, filter, what was found in the response, and whether it is right.

IFEval's rows hold `prompt`, `instruction_id_list` and `kwargs` (JSON) in place of a target. The harness' own function judges
them and stands in place of filters: a line is strict or loose, and what was found is whether each instruction is followed. That
function wants NLTK's `punkt_tab`, which NLTK downloads where neither its own places nor NLTK_DATA have it.
"""

import json
import sys
import tempfile
from pathlib import Path

from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate


class Replay(LM):
    """Answers with what a row brings."""

    def generate_until(self, requests, **_):
        return [request.doc["response"] for request in requests]

    def loglikelihood(self, requests, **_):
        raise NotImplementedError("responses are given, nothing is ranked")

    loglikelihood_rolling = loglikelihood


def main(given: str, verdicts: str) -> None:
    tasks = json.loads(Path(given).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch, open(verdicts, "w", encoding="utf-8") as out:
        for name, task in tasks.items():
            file = Path(scratch, f"{name}.jsonl")
            file.write_text(
                "".join(json.dumps({"place": place, **row}) + "\n" for place, row in enumerate(task["rows"])), encoding="utf-8"
            )
            config = {
                "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test",
                "output_type": "generate_until", "doc_to_text": "{{place}}", "doc_to_target": "{{target}}",
                "generation_kwargs": {"until": [], "do_sample": False}, **task["judging"],
            }  # fmt: skip
            if name == "ifeval":
                config |= {"doc_to_target": "0", "process_results": followed}
            result = simple_evaluate(Replay(), tasks=[ConfigurableTask(config=config)], log_samples=True, bootstrap_iters=0)
            for sample in result["samples"][name]:
                for row in read(sample, name == "ifeval"):
                    out.write(json.dumps({"task": name, "place": sample["doc"]["place"], **row}) + "\n")


def followed(doc, results):
    """The harness' verdicts of a response to a prompt of IFEval: those of the prompt go back to the harness."""
    from lm_eval.tasks.ifeval import utils  # it looks for NLTK's data

    verdicts = utils.process_results({"key": doc["place"], **doc, "kwargs": json.loads(doc["kwargs"])}, results)
    FOLLOWED[doc["place"]] = verdicts
    return {name: value for name, value in verdicts.items() if name.startswith("prompt")}


FOLLOWED = {}
"""place of a row of IFEval -> all of its verdicts; the harness would take the mean of each"""


def read(sample, instructions):
    """Rows of verdicts: one, or IFEval's strict one and its loose one."""
    if not instructions:
        return [{"filter": sample["filter"], "found": sample["filtered_resps"][0], "right": bool(sample["exact_match"])}]
    return [
        {
            "filter": kind,
            "found": FOLLOWED[sample["doc"]["place"]][f"inst_level_{kind}_acc"],
            "right": bool(sample[f"prompt_level_{kind}_acc"]),
        }
        for kind in ("strict", "loose")
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
