"""The whole of an evaluation but vLLM: a generator that gives known answers must get the known scores."""

import json
import shutil
from pathlib import Path

import pytest

from tulu_mega.config import load
from tulu_mega.errors import UserError
from tulu_mega.evaluation import run as evaluation
from tulu_mega.evaluation.settings import EvalSettings
from tulu_mega.evaluation.statistics import wilson
from tulu_mega.inference.offline import Completion
from tulu_mega.quickstart import tiny_model

GSM8K = [{"question": f"What is {number} + 1?", "answer": f"Add.\n#### {number + 1}"} for number in range(10)]
MATH = [{"problem": f"${number}x = {number}$?", "answer": "1", "type": "ab"[number % 2]} for number in range(1, 7)]
MMLU = [{"question": str(n), "choices": list("wxyz"), "answer": n % 4, "subject": f"s{n % 2}"} for n in range(8)]
BBH = [{"input": f"{number}?", "target": f"({'AB'[number % 2]})", "task": "navigate"} for number in range(4)]
IFEVAL = [{"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for _ in range(3)]
SHOTLESS = {"shots": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.make(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.make_tokenizer()


@pytest.fixture
def answering(monkeypatch, tokenizer):
    """Puts a rule in place of vLLM: `answering(rule)` with `rule(prompt text, sample) -> response`; returns what was asked."""

    def use(rule):
        asked = []

        class Rule:
            def __init__(self, *_, **__):
                asked.append("start")

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def each(self, prompts, sampling, numbers=None):
                for place, prompt in enumerate(prompts):
                    text = tokenizer.decode(prompt)
                    asked.append(text)
                    given = [rule(text, sample) for sample in range(sampling.samples)]
                    yield place, [_completion(response, tokenizer) for response in given]

        monkeypatch.setattr(evaluation.vllm, "Generator", Rule)
        monkeypatch.setattr(evaluation.vllm, "check_vllm", lambda *_: None)
        return asked

    return use


def _completion(response: str | None, tokenizer) -> Completion:
    if response is None:
        return Completion(tokenizer.encode("and so on"), "length")
    return Completion([*tokenizer.encode(response), tokenizer.eos_token_id], "stop")


def write(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(model: Path, directory: Path, tasks: dict, **values) -> EvalSettings:
    return EvalSettings(model={"path": str(model), "dtype": "fp32"}, output=str(directory / "eval"), tasks=tasks, **values)


def samples(directory: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"eval/samples/{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def question(text: str) -> str:
    return text.rsplit("<|user|>\n", 1)[1].removesuffix("\n<|assistant|>\n")


@pytest.mark.parametrize(
    ("ships", "asked_for", "taken"), [(True, "auto", "tokenizer"), (True, "tulu", "tulu"), (False, "auto", "tulu")]
)
def test_a_model_is_asked_under_its_own_template(answering, model, tmp_path, ships, asked_for, taken):
    shipped = tmp_path / "model"
    shutil.copytree(model, shipped)
    (shipped / "chat_template.jinja").unlink()
    if ships:
        own = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}[assistant]"
        (shipped / "chat_template.jinja").write_text(own)
    asked = answering(lambda text, sample: "No idea")
    tasks = {"gsm8k": {"data": write(tmp_path / "gsm8k.jsonl", GSM8K[:1]), "shots": 0}}
    results = evaluation.evaluate(settings(shipped, tmp_path, tasks, template=asked_for))
    assert asked[1].startswith("[user] " if taken == "tokenizer" else "<|user|>\n")
    assert results["settings"]["template"] == taken


def test_known_answers_get_known_scores_on_every_task_in_one_start(answering, model, tmp_path, capsys):
    def rule(text, sample):
        asked = question(text)
        if "What is" in asked:
            number = int(asked.split("What is ")[1].split()[0])
            return f"It is {number + (1 if number < 7 else 2)}."  # 7 of 10
        if "x =" in asked:
            return r"\boxed{1}" if int(asked.split("$")[1].split("x")[0]) in (1, 2, 3) else r"\boxed{2}"  # b: 2 of 3, a: 1 of 3
        if "letter" in asked:
            return "A"  # right for questions 0 and 4, both of s0
        if "step by step" in asked:
            return "So the answer is (A)." if asked.startswith("Q: 0") else None  # 1 of 4, three cut off
        return "Yes, well.\nNow then"  # loosely right: without its first line

    tasks = {
        "gsm8k": {"data": write(tmp_path / "gsm8k.jsonl", GSM8K), "shots": 1},
        "math": {"data": write(tmp_path / "math.jsonl", MATH), "shots": 1},
        "mmlu": {"data": write(tmp_path / "mmlu.jsonl", MMLU), "shots": 1},
        "bbh": {"data": write(tmp_path / "bbh.jsonl", BBH), **SHOTLESS},
        "ifeval": {"data": write(tmp_path / "ifeval.jsonl", IFEVAL)},
    }
    asked = answering(rule)
    evaluation.run(settings(model, tmp_path, tasks))
    assert asked.count("start") == 1 and len(asked) == 1 + 10 + 6 + 8 + 4 + 1 * 3

    results = json.loads((tmp_path / "eval/results.json").read_text())["tasks"]
    scores = {name: {metric: value["value"] for metric, value in task["metrics"].items()} for name, task in results.items()}
    assert scores == {
        "gsm8k": {"exact_match": 0.7},
        "math": {"exact_match_flex": 0.5},
        "mmlu": {"accuracy": 0.25},
        "bbh": {"exact_match": 0.25},
        "ifeval": {"prompt_loose": 1.0, "prompt_strict": 0.0, "instruction_loose": 1.0, "instruction_strict": 0.0},
    }
    low, high = wilson(7, 10)
    assert results["gsm8k"]["metrics"]["exact_match"] == {"value": 0.7, "low": low, "high": high, "interval": "wilson"}
    assert results["math"]["groups"] == {
        "a": {"value": pytest.approx(1 / 3), "responses": 3},
        "b": {"value": pytest.approx(2 / 3), "responses": 3},
    }
    assert results["mmlu"]["groups"]["s0"]["value"] == 0.5 and results["mmlu"]["groups"]["s1"]["value"] == 0.0
    assert results["bbh"]["cut_off"] == 3 and results["mmlu"]["cut_off"] == 0
    assert (results["gsm8k"]["shots"], results["gsm8k"]["shots_from"]) == (1, "built-in")
    shown = capsys.readouterr().out
    assert "GSM8K" in shown and "70.0%" in shown and f"{low:.1%} to {high:.1%}" in shown

    first = samples(tmp_path, "gsm8k")[0]
    assert [message["role"] for message in first["messages"]] == ["user", "assistant", "user"]
    assert first["answer"] == "1" and first["responses"][0]["scores"] == {"exact_match": 1.0}
    assert first["responses"][0]["detail"] == "last number 1, expected 1"
    assert samples(tmp_path, "bbh")[1]["responses"][0]["finish_reason"] == "length"


def test_an_interrupted_evaluation_goes_on_where_it_stopped(answering, model, tmp_path):
    data = write(tmp_path / "gsm8k.jsonl", GSM8K)
    wanted = settings(model, tmp_path, {"gsm8k": {"data": data, **SHOTLESS}}, save_every=3)

    def dies(text, sample):
        if "What is 7" in text:
            raise KeyboardInterrupt
        return "1"

    asked = answering(dies)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(wanted)
    assert len(asked) == 1 + 8 and not (tmp_path / "eval/results.json").exists()
    assert len(samples(tmp_path, "gsm8k")) == 7, "every answer is kept as it comes"
    with (tmp_path / "eval/samples/gsm8k.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')

    asked = answering(lambda text, sample: "8")
    results = evaluation.evaluate(wanted)
    assert [question(text) for text in asked[1:]] == [f"Question: What is {number} + 1?\nAnswer:" for number in (7, 8, 9)]
    assert results["tasks"]["gsm8k"]["metrics"]["exact_match"]["value"] == 0.2, "problem 0 from before and problem 7 now"
    assert [record["problem"] for record in samples(tmp_path, "gsm8k")] == list(range(10))

    asked = answering(lambda text, sample: "never asked")
    assert evaluation.evaluate(wanted)["tasks"] == results["tasks"] and asked == [], "vLLM is not even started"

    more = wanted.model_copy(update={"tasks": {"gsm8k": wanted.tasks["gsm8k"].model_copy(update={"max_tokens": 9})}})
    asked = answering(lambda text, sample: "1")
    evaluation.evaluate(more)
    assert len(asked) == 11, "other settings, other responses"


def test_a_limit_asks_the_same_problems_of_all_groups_and_a_larger_one_only_more(answering, model, tmp_path):
    rows = [{"input": f"{task} {n}?", "target": "(A)", "task": task} for task in "abcd" for n in range(25)]
    data = write(tmp_path / "bbh.jsonl", rows)

    def asks(limit: int, **values) -> list[str]:
        asked = answering(lambda text, sample: "So the answer is (A).")
        wanted = settings(model, tmp_path, {"bbh": {"data": data, "limit": limit, **SHOTLESS}}, **values)
        assert evaluation.evaluate(wanted)["tasks"]["bbh"]["problems"] == limit
        return [question(text) for text in asked[1:]]

    eight = asks(8)
    assert sorted(text[3] for text in eight) == list("aabbccdd")
    assert [record["problem"] for record in samples(tmp_path, "bbh")] != list(range(8)), "rows are numbered as in the file"
    assert len(asks(12)) == 4, "eight were answered before"
    assert set(asks(8, temperature=0.5, seed=1)) == set(eight)


def test_another_model_is_asked_anew(answering, tmp_path):
    import os

    tiny_model.make(tmp_path / "model", seed=0)
    data = write(tmp_path / "gsm8k.jsonl", GSM8K[:2])
    wanted = settings(tmp_path / "model", tmp_path, {"gsm8k": {"data": data, **SHOTLESS}})
    answering(lambda text, sample: "1")
    evaluation.evaluate(wanted)
    weights = tmp_path / "model/model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    asked = answering(lambda text, sample: "1")
    evaluation.evaluate(wanted)
    assert len(asked) == 3


def test_several_samples_and_pass_at_k(answering, model, tmp_path):
    data = write(tmp_path / "gsm8k.jsonl", GSM8K[:4])
    tasks = {"gsm8k": {"data": data, **SHOTLESS}}
    wanted = settings(model, tmp_path, tasks, samples=4, temperature=0.8, pass_at=[1, 2, 4])

    def rule(text, sample):  # problem n is answered by the first n of its 4 samples
        number = int(question(text).split("What is ")[1].split()[0])
        return str(number + 1) if sample < number else "0 apples"

    answering(rule)
    result = evaluation.evaluate(wanted)["tasks"]["gsm8k"]
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values["exact_match"] == values["pass@1"] == pytest.approx((0 + 1 + 2 + 3) / 16)
    assert values["pass@2"] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4) and values["pass@4"] == pytest.approx(3 / 4)
    kinds = {name: metric["interval"] for name, metric in result["metrics"].items()}
    assert kinds == {"exact_match": "bootstrap", "pass@1": "bootstrap", "pass@2": "bootstrap", "pass@4": "wilson"}
    assert result["responses"] == 16 and [len(record["responses"]) for record in samples(tmp_path, "gsm8k")] == [4] * 4


def test_rows_are_asked_with_all_that_grpo_asks_them_with(answering, model, tmp_path):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    written = "{{ tools | tojson }} {{ brief }} {% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (own / "chat_template.jinja").write_text(written)
    row = {"messages": [{"role": "user", "content": "1+1?"}], "ground_truth": "2", "dataset": "gsm8k", "system": "be good"}
    row |= {"tools": [{"name": "add"}], "chat_template_kwargs": {"brief": "quick"}}
    asked = answering(lambda text, sample: "2")
    data = write(tmp_path / "rows.jsonl", [row])
    evaluation.evaluate(settings(own, tmp_path, {"rlvr": {"data": data}}))
    assert asked[1].startswith('[{"name": "add"}] quick [system] be good[user] 1+1?')
    with pytest.raises(UserError, match="tools are given, which Tulu's template does not write"):
        evaluation.evaluate(settings(own, tmp_path, {"rlvr": {"data": data}}, template="tulu"))


def test_what_cannot_be_judged_is_left_out_and_told(answering, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "halting.py").write_text(
        "def verify(response, ground_truth, **_):\n    if response == '?': raise ValueError('cannot read')\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"messages": [{"role": "user", "content": str(n)}], "ground_truth": "1", "dataset": "mine"} for n in range(4)]
    answering(lambda text, sample: "?" if question(text) == "3" else "1")
    wanted = settings(
        model, tmp_path, {"rlvr": {"data": write(tmp_path / "rows.jsonl", rows)}}, verifiers={"mine": "halting:verify"}
    )
    evaluation.run(wanted)
    result = json.loads((tmp_path / "eval/results.json").read_text())["tasks"]["rlvr"]
    assert result["metrics"]["score"]["value"] == 1.0 and result["not_judged"] == 1
    assert "1 responses could not be judged" in capsys.readouterr().err
    assert samples(tmp_path, "rlvr")[3]["responses"][0]["scores"] is None
    assert "cannot read" in samples(tmp_path, "rlvr")[3]["responses"][0]["error"]


def test_worked_examples_and_system_message_reach_the_prompt(answering, model, tmp_path):
    data = write(tmp_path / "gsm8k.jsonl", GSM8K[:1])
    train = write(tmp_path / "train.jsonl", GSM8K[5:])
    asked = answering(lambda text, sample: "1")
    tasks = {"gsm8k": {"data": data, "shots": 2, "shots_from": train}}
    evaluation.evaluate(settings(model, tmp_path, tasks, system="Be brief."))
    shots = "".join(
        f"<|user|>\nQuestion: What is {n} + 1?\nAnswer:\n<|assistant|>\nAdd.\nSo the answer is {n + 1}.<|end_of_text|>\n"
        for n in (5, 6)
    )
    assert asked[1] == f"<|system|>\nBe brief.\n{shots}<|user|>\nQuestion: What is 0 + 1?\nAnswer:\n<|assistant|>\n"


def test_all_that_is_wrong_is_told_before_vllm_starts(answering, model, tmp_path):
    asked = answering(lambda text, sample: "1")
    tasks = {
        "gsm8k": {"data": write(tmp_path / "math.jsonl", MATH), **SHOTLESS},
        "mmlu": {"data": str(tmp_path / "none.jsonl"), "shots_from": str(tmp_path / "no_shots.jsonl")},
        "math": {"data": write(tmp_path / "long.jsonl", [{"problem": "word " * 600, "answer": "1"}]), **SHOTLESS},
    }
    with pytest.raises(UserError) as caught:
        evaluation.evaluate(settings(model, tmp_path, tasks))
    text = "\n".join(caught.value.problems)
    assert "math.jsonl line 1: answer has no '#### number' at its end; GSM8K expects question, answer" in text
    assert "none.jsonl: no such file; correct tasks.mmlu.data" in text and "data.train" not in text
    assert "no_shots.jsonl: no such file; correct tasks.mmlu.shots_from" in text
    assert "MATH, problem 1: the prompt has" in text and "may have 512" in text
    assert asked == []
    with pytest.raises(UserError, match="fewer make it shorter"):
        evaluation.evaluate(settings(model, tmp_path, {"gsm8k": {"data": write(tmp_path / "g.jsonl", GSM8K)}}))
    with pytest.raises(UserError, match="neither a model directory"):
        evaluation.evaluate(settings(tmp_path / "nowhere", tmp_path, tasks))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks.gsm8kk", "a.jsonl"], "unknown task 'gsm8kk'; did you mean 'gsm8k'?"),
        (["--tasks.bbh.shots", "0"], "bbh: no data given"),
        (["--tasks.gsm8k", "a.jsonl", "--samples", "2"], "at temperature 0 are all the same"),
        (["--tasks.gsm8k", "a.jsonl", "--pass_at", "[4]"], "pass_at asks for 4"),
        (["--tasks.gsm8k.shot", "4"], "tasks.gsm8k.shot: unknown setting; did you mean 'shots'?"),
        (["--tasks", "{}"], "no task; give at least one of"),
    ],
)
def test_settings_that_make_no_sense(flags, message):
    with pytest.raises(UserError) as caught:
        load(EvalSettings, None, ["--model", "m", "--output", "o", *flags])
    assert message in str(caught.value)


def test_a_task_may_be_its_file_alone(tmp_path):
    flags = ["--model", "m", "--output", "o", "--tasks.gsm8k", "a.jsonl", "--tasks.math.limit", "5", "--tasks.math", "b.jsonl"]
    tasks = load(EvalSettings, None, [*flags, "--tasks.gsm8k.shots", "2"]).tasks
    assert (tasks["gsm8k"].data, tasks["gsm8k"].shots) == ("a.jsonl", 2)
    assert (tasks["math"].data, tasks["math"].limit) == ("b.jsonl", 5)
    file = tmp_path / "eval.toml"
    file.write_text('model = "m"\noutput = "o"\n[tasks]\ngsm8k = ["a.jsonl", "b.jsonl"]\n[tasks.mmlu]\nlimit = 3\n')
    settings = load(EvalSettings, str(file), ["--tasks.mmlu.limit", "4", "--model.dtype", "fp32"])
    assert settings.tasks["gsm8k"].data == ["a.jsonl", "b.jsonl"] and settings.tasks["mmlu"].limit == 4
    assert (settings.model.path, settings.model.dtype) == ("m", "fp32")


def test_settings_are_read_and_help_is_given_without_anything_heavy(capsys):
    import subprocess
    import sys

    code = "import sys; from tulu_mega.cli import main; main(['eval', '--help']); print([m for m in {} if m in sys.modules])"
    heavy = ["torch", "numpy", "transformers", "sympy", "datasets", "vllm"]
    done = subprocess.run([sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "--tasks.NAME.shots_from" in done.stdout
