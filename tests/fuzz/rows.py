"""Parsers of what users give: settings, flags, and rows of every kind."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.fuzz.model_files import TALK, after_writing
from tests.fuzz.run_files import lines
from tests.lib.fuzzing import Parser
from tests.lib.tokenizers import byte_tokenizer
from tulu_mega.config.source import load
from tulu_mega.config.stages import STAGES
from tulu_mega.config.told import command_told
from tulu_mega.data.encoding import ConversationEncoding, PairEncoding, Useless
from tulu_mega.data.json_text import json_line, strict_line
from tulu_mega.data.prompts import read_prompts
from tulu_mega.data.score_input import Encoder
from tulu_mega.data.score_input import read as read_scored
from tulu_mega.data.sources import load_rows
from tulu_mega.data.tools.decontaminate import row_words
from tulu_mega.errors import UserError
from tulu_mega.evaluation import rows as evaluated
from tulu_mega.evaluation.settings import TaskSettings
from tulu_mega.evaluation.tasks import TASKS
from tulu_mega.launch.launcher import resolve

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{% endfor %}{{ tools | tojson if tools else '' }}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
CHAT = [
    {"messages": TALK, "system": "Be brief.", "id": 3},
    {"messages": [*TALK[:1], CALL, {"role": "tool", "content": "3"}, TALK[1]], "tools": json.dumps(TOOLS),
     "chat_template_kwargs": {"x": 1}},
    {"messages": [{**TALK[0], "weight": 0}, {**TALK[1], "train": True}]},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
]  # fmt: skip
PAIRS = [
    {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No."}], "margin": 0.5},
    {"prompt": "hi", "chosen": TALK[1:], "rejected": [{"role": "assistant", "content": "No."}], "margin": 1},
    {
        "chosen_input_ids": [5, 6],
        "chosen_labels": [-100, 6],
        "rejected_input_ids": [5, 7],
        "rejected_labels": [-100, 7],
        "margin": 0,
    },
]
EVALUATED = {
    "gsm8k": {"question": "2+2?", "answer": "It is 4.\n#### 4"},
    "math": {"problem": "2+2?", "solution": "\\boxed{4}", "level": "Level 1", "type": "Algebra"},
    "ifeval": {"key": 1, "prompt": "Say x.", "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
               "kwargs": [{}, {"keywords": ["x"]}]},
    "mmlu": {"question": "2+2?", "choices": ["1", "2", "3", "4"], "answer": 3, "subject": "x"},
    "bbh": {"input": "2+2?", "target": "(A)", "task": "x", "cot": "So the answer is (A)."},
    "rlvr": {"messages": TALK[:1], "ground_truth": "4", "dataset": "gsm8k"},
    "humaneval": {"task_id": "x/0", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n",
                  "test": "def check(candidate):\n    assert candidate(1) == 1\n"},
    "mbpp": {"task_id": 1, "text": "Write f.", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"],
             "test_setup_code": "", "challenge_test_list": []},
}  # fmt: skip


def encodes(encoding: Callable) -> Callable[[dict], object]:
    def encode(row: dict) -> object:
        with contextlib.suppress(Useless):
            return encoding(row)
        return None

    return encode


def parsers(place: Path) -> dict[str, Parser]:
    return {**settings(place), **data(place), **evaluations(place)}


def settings(place: Path) -> dict[str, Parser]:
    file = place / "run.toml"
    kinds = {name: resolve(stage.settings) for name, stage in STAGES.items()}

    def of(name: str) -> Parser:
        examples = sorted(Path("examples").glob(f"*/*/{name}.toml"))[:2]
        return Parser(
            after_writing(file, lambda: load(kinds[name], str(file))),
            [each.read_bytes() for each in examples],
            (UserError,),
            TOML,
        )

    def which() -> None:
        command_told(str(file), [], {name: lambda kind=kind: kind for name, kind in kinds.items()}, lambda data: [])

    def flags(text: bytes) -> object:
        return load(kinds["grpo"], None, shlex.split(text.decode(errors="replace")))

    given = b"--model.path m --data.train '[\"x\"]' --optim.lr 1e-5 --run_dir r "
    given += b"--parallel.tensor=2 --data.shuffle --rollout.urls '[]'"
    tables = b"--data.train '{\"a.jsonl\" = 0.5}' --megatron.x 3 --rewards.aliases.x gsm8k --model x --eval.tasks.gsm8k.shots 3"
    return {
        **{f"settings of {name}": of(name) for name in kinds},
        "settings of which command": Parser(
            after_writing(file, which), [sorted(Path("examples").glob("*/*/dpo.toml"))[0].read_bytes()],
            (UserError,), TOML,
        ),
        "flags": Parser(flags, [given, tables], (UserError, ValueError), (b"--", b".", b"=", b" ", b"--a.b.c.d", b"'")),
    }  # fmt: skip


TOML = (
    b"[model]", b"[[", b"]]", b" = ", b"1979-05-27T07:32:00Z", b"inf", b"nan", b"0x" + b"f" * 400, b"'''", b'"""', b"a.b.c = 1\n",
    b"{x = 1}", b"[" * 2000, b"{a=" * 1200, b"\n[megatron]\nx = 1\n", b"true", b"1e400", b"-0", b"1_0",
)  # fmt: skip


def data(place: Path) -> dict[str, Parser]:
    own, plain = byte_tokenizer(chat_template=TEMPLATE), byte_tokenizer()
    file = place / "rows.jsonl"

    def judgeable(row: dict) -> list[str]:
        return []

    def over(name: str, use: Callable[[dict], object]) -> Callable[[bytes], object]:
        def read() -> None:
            rows = load_rows(str(place / name))
            for index in range(len(rows)):
                with contextlib.suppress(ValueError):
                    use(rows.row(index))
                with contextlib.suppress(ValueError):
                    strict_line(rows.raw(index))

        return after_writing(place / name, read)

    def prompts() -> None:
        read_prompts(load_rows(str(file)), own, "tokenizer", 50, "reject", judgeable)

    def scored() -> None:
        for _where, row in read_scored(str(file)):
            with contextlib.suppress(ValueError):
                Encoder(own, "tokenizer", 512)(row)

    def parquet() -> None:
        read = pyarrow.parquet.read_table(place / "rows.parquet")
        for row in read.to_pylist():
            json_line(row, Counter())

    pyarrow.parquet.write_table(
        pyarrow.table({"messages": [TALK, TALK], "x": [1.5, None]}), place / "rows.parquet", compression="none"
    )
    tulu, theirs = ConversationEncoding(plain, "tulu", 40), ConversationEncoding(own, "tokenizer", 40, rewritten="split")
    pairs = PairEncoding(own, "tokenizer", 40, margin_column="margin")
    chat, several = [lines(row) for row in CHAT], lines(*CHAT)
    text = [lines({"text": "hi"}), lines({"messages": TALK}), lines({"input_ids": [5, 6]})]
    return {
        "rows of conversations, Tulu's template": Parser(over("a.jsonl", encodes(tulu)), [*chat, several], (UserError,)),
        "rows of conversations, a model's template": Parser(over("b.jsonl", encodes(theirs)), [*chat, several], (UserError,)),
        "rows of pairs": Parser(over("c.jsonl", encodes(pairs)), [lines(row) for row in PAIRS], (UserError,)),
        "rows of a JSON list": Parser(
            over("d.json", encodes(tulu)), [json.dumps(CHAT).encode(), b"\xef\xbb\xbf" + json.dumps(CHAT).encode()], (UserError,)
        ),
        "rows of Parquet": Parser(
            after_writing(place / "rows.parquet", parquet), [(place / "rows.parquet").read_bytes()],
            (ValueError, OSError, pyarrow.ArrowException),
        ),
        "rows of prompts": Parser(after_writing(file, prompts), [*chat[:2], several], (UserError,)),
        "rows to score": Parser(after_writing(file, scored), text, (UserError,)),
        "rows searched for evaluations": Parser(
            over("e.jsonl", lambda row: row_words(row, ["messages", "prompt"], ["user"])), [*chat, lines(*PAIRS)], (UserError,)
        ),
    }  # fmt: skip


def evaluations(place: Path) -> dict[str, Parser]:
    def of(name: str) -> Parser:
        file = place / f"{name}.jsonl"
        task, given = TASKS[name], TaskSettings(data=str(file))
        return Parser(after_writing(file, lambda: evaluated.problems(task, given)), [lines(EVALUATED[name])], (UserError,))

    examples = place / "examples.json"
    bbh = TaskSettings(data=str(examples))
    told = json.dumps({"canary": "x", "examples": [{"input": "2+2?", "target": "(A)"}]}).encode()
    worked = place / "cot"
    worked.mkdir()
    shots = TaskSettings(shots_from=str(worked))
    cot = b"canary\n-----\nAdd.\n\n"
    cot += b"Q: 2+2?\nA: Let's think step by step.\nIt is 4.\n\nQ: 1+1?\nA: Let's think step by step.\n2."
    return {
        **{f"rows of {name}": of(name) for name in TASKS},
        "BIG-Bench's files": Parser(after_writing(examples, lambda: evaluated.problems(TASKS["bbh"], bbh)), [told], (UserError,)),
        "BIG-Bench's worked examples": Parser(
            after_writing(worked / "x.txt", lambda: evaluated.shots(TASKS["bbh"], shots)), [cot], (UserError,),
            (b"\nQ:", b"\nA:", b"\n-----\n"),
        ),
    }  # fmt: skip
