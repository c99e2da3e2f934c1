"""What goes with an exported model that was trained with another tokenizer than its own: files, template, special tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.lib.tokenizers import EOS, byte_tokenizer
from tulu_mega.bridge.files.companions import write_companions
from tulu_mega.bridge.files.config_json import read_config
from tulu_mega.data.other_tokenizer import other_tokenizer
from tulu_mega.errors import UserError
from tulu_mega.quickstart import tiny_model

TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] + eos_token }}{% endfor %}"
TURNS = [{"role": "user", "content": "Wie groß?\n\n  12,5 m"}, {"role": "assistant", "content": "hi bye"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model with a tokenizer and generation config of its own, and files that only its own tokenizer has."""
    directory = tmp_path_factory.mktemp("model") / "model"
    tiny_model.make(directory, seed=0)
    (directory / "vocab.json").write_text("{}")
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "!"}))
    return directory


@pytest.fixture
def model(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def saved(directory: Path, more: int = 0, **options) -> Path:
    """A tokenizer of 263 tokens and so many more: `<|0|>`, `<|1|>` ..."""
    tokenizer = byte_tokenizer(**SPECIAL)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(more)], special_tokens=True)
    for name, token in options.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def exported(tmp_path: Path, model: Path, name: str | Path, extra: dict | None = None, **options) -> Path:
    """What lies beside the weights."""
    directory = tmp_path / "export"
    directory.mkdir()
    config = read_config(model)
    write_companions(directory, model, config, "bfloat16", extra, other_tokenizer(str(name), model, config, **options))
    return directory


def content(file: Path) -> dict:
    return json.loads(file.read_text())


def changed(model: Path, name: str, **fields) -> None:
    file = model / name
    file.write_text(json.dumps({**content(file), **fields}))


def test_the_tokenizer_that_was_trained_with_goes_with_the_model(model, tmp_path):
    theirs = AutoTokenizer.from_pretrained(saved(tmp_path / "other"))
    out = exported(tmp_path, model, tmp_path / "other")
    ours = AutoTokenizer.from_pretrained(out)
    assert ours.apply_chat_template(TURNS, tokenize=False) == theirs.apply_chat_template(TURNS, tokenize=False)
    assert ours(TURNS[0]["content"])["input_ids"] == theirs(TURNS[0]["content"])["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map and len(ours) == len(theirs)
    for file in (tmp_path / "other").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert not (out / "vocab.json").exists() and not (out / "special_tokens_map.json").exists()


def test_generation_ends_at_its_eos(model, tmp_path):
    """The model's own eos is another token there, so it ends nothing any more."""
    changed(model, "generation_config.json", temperature=0.6)
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path / "other", eos_token="<|im_end|>"))
    own = AutoTokenizer.from_pretrained(model)
    assert own.convert_ids_to_tokens(1) != tokenizer.convert_ids_to_tokens(1)
    changed(model, "config.json", eos_token_id=1)
    changed(model, "generation_config.json", eos_token_id=[1])
    out = exported(tmp_path, model, tmp_path / "other")
    config, generation = content(out / "config.json"), content(out / "generation_config.json")
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert config["dtype"] == "bfloat16" and generation["temperature"] == 0.6


def test_what_ended_generation_before_does_so_still_where_it_is_the_same_token(model, tmp_path):
    """As of a tokenizer that is the model's but for its template or its end of turn."""
    assert AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(0) == EOS
    changed(model, "generation_config.json", eos_token_id=[0, 1, 300])  # 300 is no token of the other's
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path / "other", bos_token=None, pad_token=None))
    assert tokenizer.convert_ids_to_tokens(0) == EOS
    out = exported(tmp_path, model, tmp_path / "other")
    assert content(out / "generation_config.json")["eos_token_id"] == [tokenizer.eos_token_id, 0]
    assert content(out / "config.json")["eos_token_id"] == [tokenizer.eos_token_id, 0]
    assert content(out / "config.json")["pad_token_id"] is None, "token 1 pads nothing there"


def test_a_model_without_tokenizer_or_generation_config_gets_both(model, tmp_path):
    for file in model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path / "other"))
    out = exported(tmp_path, model, tmp_path / "other")
    assert content(out / "generation_config.json") == {"eos_token_id": tokenizer.eos_token_id}
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()


def test_a_template_given_beside_it_takes_the_place_of_its_own(model, tmp_path):
    out = exported(tmp_path, model, saved(tmp_path / "other"), {"chat_template.jinja": "new"})
    assert AutoTokenizer.from_pretrained(out).chat_template == "new"


def test_a_tokenizer_from_the_hub_s_cache(model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    entry = hub / "models--someone--tokens"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs/main").write_text("0" * 40)
    snapshot = saved(entry / "snapshots" / ("0" * 40))
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))  # of a model that it came with
    theirs = AutoTokenizer.from_pretrained(snapshot)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(hub))
    ours = AutoTokenizer.from_pretrained(exported(tmp_path, model, "someone/tokens"))
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == TEMPLATE


@pytest.mark.parametrize(("pad", "kept"), [("<|pad|>", True), ("<|im_end|>", False)])
def test_a_reward_model_s_padding_ends_no_text(model, tmp_path, pad, kept):
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path / "other", pad_token=pad))
    changed(model, "config.json", architectures=["LlamaForSequenceClassification"])
    out = exported(tmp_path, model, tmp_path / "other", reward=True)
    assert content(out / "config.json")["pad_token_id"] == (tokenizer.pad_token_id if kept else None)
    assert not (out / "generation_config.json").exists()


def test_padding_outside_the_model_s_vocabulary_is_not_named(model, tmp_path):
    saved(tmp_path / "other", more=200, pad_token="<|199|>")
    config = content(exported(tmp_path, model, tmp_path / "other") / "config.json")
    assert config["pad_token_id"] is None and max(config["eos_token_id"]) < config["vocab_size"]


def test_an_eos_outside_the_model_s_vocabulary(model, tmp_path):
    saved(tmp_path / "other", more=200, eos_token="<|199|>")
    with pytest.raises(UserError, match=r"its eos token '<\|199\|>' is number 46\d, but the model's vocabulary has 4\d\d entr"):
        other_tokenizer(str(tmp_path / "other"), model, read_config(model))


def test_a_tokenizer_that_would_be_another_beside_the_model_is_refused(model, tmp_path):
    """Transformers makes of some models' tokenizers what it thinks best, whatever their files say."""
    other = saved(tmp_path / "other")
    config = {**read_config(model), "model_type": "qwen2"}
    with pytest.raises(UserError, match=r"beside a qwen2 model's config.json transformers makes another tokenizer .*Qwen2Token"):
        other_tokenizer(str(other), model, config)


def test_ends_of_training_are_among_those_of_generation(model, tmp_path):
    config = read_config(model) | {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}

    def written(*ends: int, given: dict | None = None) -> dict:
        (model / "generation_config.json").unlink(missing_ok=True)
        if given is not None:
            (model / "generation_config.json").write_text(json.dumps(given))
        out = tmp_path / f"out_{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        write_companions(out, model, config, "bfloat16", ends=ends)
        return content(out / "generation_config.json") if (out / "generation_config.json").exists() else {}

    assert written(2) == {} and written(2, given={"eos_token_id": [2, 5], "top_p": 0.5}) == {"eos_token_id": [2, 5], "top_p": 0.5}
    stops = written(7)  # of config.json, by which a model without the file generates
    assert (stops["eos_token_id"], stops["bos_token_id"]) == ([2, 7], 1)
    assert written(7, 2, given={"eos_token_id": 2, "top_p": 0.5}) == {"eos_token_id": [2, 7], "top_p": 0.5}
    assert written(7, given={"top_p": 0.5})["eos_token_id"] == [2, 7]
    assert written(given={"top_p": 0.5}) == {"top_p": 0.5}
