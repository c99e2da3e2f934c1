"""The quickstart's pieces: a reproducible model, a tokenizer that fits the task, scores and what is reused."""

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest

from tulu_mega.config import DpoSettings, GrpoSettings, RmSettings, SftSettings, load
from tulu_mega.data.chat import encode, prompt_ids
from tulu_mega.errors import UserError
from tulu_mega.inference.offline import Completion
from tulu_mega.quickstart import demo, running, task, tiny_model
from tulu_mega.quickstart.settings import QuickstartSettings
from tulu_mega.quickstart.stages import stage_settings

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.make_tokenizer()


KINDS = {"sft": SftSettings, "rm": RmSettings, "dpo": DpoSettings, "grpo": GrpoSettings}


@pytest.mark.parametrize(
    ("command", "file"), [("sft", "sft_tiny"), ("rm", "rm_tiny"), ("dpo", "dpo_norm_tiny"), ("grpo", "grpo_tiny")]
)
def test_the_examples_are_what_the_quickstart_trains_with(command, file):
    example = EXAMPLES / f"{file}.toml"
    assert example.read_text(encoding="utf-8") == stage_settings(command, **QuickstartSettings().model_dump())
    settings = load(KINDS[command], str(example))
    assert settings.parallel.tensor * (settings.parallel.data or 1) == 2
    rows = {"sft": demo.DEMONSTRATIONS, "grpo": demo.PROMPTS}.get(command, demo.PAIRS)
    batch = settings.train.prompts if command == "grpo" else settings.train.global_batch
    assert settings.train.steps * batch <= rows  # none is seen twice


def test_the_same_seed_gives_the_same_files_and_another_seed_other_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_model.make(tmp_path / name, seed)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    same = {name: (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files}
    assert all(same.values()), same
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "c/tokenizer.json").read_bytes()
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_the_model_can_be_cut_in_two(tmp_path):
    tiny_model.make(tmp_path / "model", 0)
    config = json.loads((tmp_path / "model/config.json").read_text())
    widths = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size", "vocab_size")
    assert all(config[name] % 2 == 0 for name in widths)
    assert config["vocab_size"] % 8 == 0 and 0 <= config["vocab_size"] - len(tiny_model.make_tokenizer()) < 8
    assert config["num_key_value_heads"] < config["num_attention_heads"] and not config["tie_word_embeddings"]


def test_digits_are_tokens_and_any_text_survives(tokenizer):
    assert [tokenizer.decode(token) for token in tokenizer.encode("12x305")] == ["1", "2", "x", "3", "0", "5"]
    for text in ("Ada has 12 pens.", "Übermaß 漢字 🙂\n\t", "<|user|>\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == "<|end_of_text|>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_prompts_in_training_and_in_generation_are_the_same_tokens(tokenizer):
    for row in islice(task.demonstrations(5), 200):
        ids, labels = encode(row["messages"], tokenizer, "tulu", None)
        prompt = prompt_ids(row["messages"][:1], tokenizer, "tulu")
        assert ids[: len(prompt)] == prompt
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]
        assert len(ids) < 80, "words of the task should be single tokens"


def test_the_tokenizers_own_template_is_tulus(tokenizer):
    messages = [{"role": "user", "content": "Ada has 1 pen."}, {"role": "assistant", "content": "1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>\nAda has 1 pen.\n<|assistant|>\n1<|end_of_text|>"


@pytest.fixture
def story(tmp_path, monkeypatch, tokenizer):
    """A quickstart whose training copies the model and whose vLLM answers by rule; returns (settings, what was done)."""
    done = []

    def train(command):
        name = command[-2]
        done.append(name)
        directory = Path(load(KINDS[name], command[-1]).run_dir)
        tiny_model.make(directory / "hf", 1)
        (directory / "metrics.jsonl").write_text('{"step": 1, "heldout_accuracy": 0.875}\n{"step": 2}\n')
        return 0

    class Answers:
        def __init__(self, model, *_, **__):
            done.append(Path(model).name)
            self.right = done[-1] == "hf"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def each(self, prompts, sampling, numbers):
            heldout = Path(settings.run_dir) / "data/heldout.jsonl"
            answers = [json.loads(line)["ground_truth"] for line in heldout.read_text().splitlines()]
            said = [answers[number] if self.right else "\x1b[31mno" for number in numbers]
            yield from enumerate([Completion(tokenizer.encode(text), "stop")] for text in said)

    settings = QuickstartSettings(run_dir=str(tmp_path / "quick"))
    monkeypatch.setattr("tulu_mega.inference.offline.check_vllm", lambda *_: None)
    monkeypatch.setattr("tulu_mega.inference.offline.Generator", Answers)
    monkeypatch.setattr(running, "ran", train)
    return settings, done


def test_the_story_is_told_once_and_what_is_complete_is_reused(story, capsys):
    settings, done = story
    demo.run(settings)
    assert done == ["model", "sft", "hf", "rm", "dpo", "hf", "grpo", "hf"]
    shown = capsys.readouterr().out
    assert "0 of 500" in shown and "500 of 500" in shown and "100.0%" in shown
    assert shown.count("87.5%") == 2  # the reward model's and the preference-tuned policy's
    assert "\x1b[31mno" not in shown, "an answer must not command the terminal"
    demo.run(settings)
    assert done == ["model", "sft", "hf", "rm", "dpo", "hf", "grpo", "hf"]
    with pytest.raises(UserError, match="holds a quickstart with"):
        demo.run(settings.model_copy(update={"seed": 1}))


def test_a_training_that_fails_is_told_and_taken_up_again(story, monkeypatch):
    settings, done = story
    whole = running.ran
    monkeypatch.setattr(running, "ran", lambda command: 3)
    with pytest.raises(UserError, match="ended with status 3"):
        demo.run(settings)
    monkeypatch.setattr(running, "ran", whole)
    demo.run(settings)
    assert done == ["model", "sft", "hf", "rm", "dpo", "hf", "grpo", "hf"]


def test_a_stage_ends_with_the_quickstart(tmp_path):
    """It has ranks and servers of its own: nobody else would end them."""
    stage = f"import pathlib, os, time; pathlib.Path('{tmp_path}/stage').write_text(str(os.getpid())); time.sleep(600)"
    program = f"import sys; from tulu_mega.quickstart import running; running.ran([sys.executable, '-c', {stage!r}])"
    quickstart = subprocess.Popen([sys.executable, "-c", program])
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "stage").exists() or not (tmp_path / "stage").read_text():
            assert quickstart.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        quickstart.terminate()
        assert quickstart.wait(60) == 143
        assert not psutil.pid_exists(int((tmp_path / "stage").read_text()))
    finally:
        quickstart.kill()
