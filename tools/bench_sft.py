"""Races SFT against TRL's SFTTrainer and against transformers and torch alone, on this machine's cores.

    python tools/bench_sft.py [--quick] [--hidden 128 512]

Needs `make peers`. The same Llama of random weights, in float32, is trained on the same texts by all: AdamW, gradients clipped,
loss over the supervised tokens of a global batch. Lengths are distributed like Tulu 3's and divided by 4 (median 100, mean 138,
95th percentile 450, cap 1,024); two thirds of each text are trained. All racers stay up and run laps in alternating order, with
the same OpenMP library and allocator; the rest of the machine is to be idle. Prints one JSON line:

    ours, peer, ratio       tokens/s of the widest model, ours and TRL's at its best setting, and the first over the second
    idle, load_average_before, busy_share_before
                            whether nothing else ran
    hidden_N                for each width, for each of ours, trl_best, trl_default, bare: setting, tokens_per_second (median,
                            slowest and fastest lap), laps that count, others_share (most that anybody else used of the cores
                            during one of them), `ratio`, ours over it, and lap_ratios, median, least and greatest of that lap
                            by lap, the same texts in both
    loss_gap                largest relative difference of a step's loss from ours in the first lap: the same mathematics

`--search` tries the settings in question instead, one lap of warming up and `--rounds` laps each, and prints a line for each:
ENTRIES has the best found so far on two cores of an AMD EPYC.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_packing import tulu_lengths
from race.racing import OURS, PEERS, SPARE, Entry, Racer, calm, lap_ratios, loss_gap, race, rates, wait_until_idle

LAYERS = {128: 4, 512: 8}
SHRINK = 4
"""Lengths are Tulu 3's divided by this."""
LONGEST = 4096 // SHRINK


def ours(pack: int, tensor: int = 1, ranks: int = 1) -> Entry:
    return Entry("ours", OURS, "racer_sft.py", {"pack": pack, "tensor": tensor}, ranks)


def trl(name: str = "trl_best", ranks: int = 1, **setting) -> Entry:
    usual = {"micro": 8, "packing": 0, "padding_free": False, "checkpoint": False, "sort": False}
    return Entry(name, PEERS, "peers/trl_sft.py", usual | setting, ranks)


def bare(pack: int, ranks: int = 1) -> Entry:
    return Entry("bare", PEERS, "peers/bare_sft.py", {"pack": pack}, ranks)


DEFAULT = replace(trl("trl_default", micro=8, checkpoint=True), rounds=2)
ENTRIES = {
    128: [ours(4096, ranks=2), trl(micro=2, sort=True), DEFAULT, bare(1024)],
    512: [ours(1024), trl(micro=2, padding_free=True, sort=True), DEFAULT, bare(1024)],
}
SEARCH = [
    *(ours(pack, tensor, ranks) for tensor, ranks in ((1, 1), (1, 2), (2, 2)) for pack in (1024, 4096)),
    *(bare(pack, ranks) for ranks in (1, 2) for pack in (1024, 2048)),
    *(trl(micro=micro, sort=True, ranks=ranks) for ranks, micros in ((1, (1, 2, 4, 8)), (2, (2, 4))) for micro in micros),
    *(trl(micro=micro, padding_free=True, sort=True, ranks=ranks) for ranks in (1, 2) for micro in (2, 4)),
    *(trl(micro=1, packing=LONGEST, ranks=ranks) for ranks in (1, 2)),
    DEFAULT,
    replace(DEFAULT, ranks=2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=32, help="texts in an optimizer step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lap", type=float, default=1.0, help="factor of a lap's length")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to wait for an idle machine")
    parser.add_argument("--quick", action="store_true", help="two rounds of short laps: a look, no measurement")
    parser.add_argument("--search", nargs="?", const="", metavar="NAME", help="try the settings of all, or of one")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.lap, options.idle = 2, 0.25, 0.0
    report: dict = {"bench": "sft", **wait_until_idle(options.idle)}
    with tempfile.TemporaryDirectory(prefix="bench_sft_") as scratch:
        for hidden in options.hidden:
            directory = Path(scratch, str(hidden))
            spec = prepare(directory, hidden, options)
            if options.search is not None:
                search([each for each in SEARCH if options.search in each.name], spec, options.rounds, directory)
            else:
                report[f"hidden_{hidden}"] = measure(spec, ENTRIES[hidden], options.rounds, directory)
    if options.search is None:
        widest = report[f"hidden_{max(options.hidden)}"]
        speeds = [widest[name]["tokens_per_second"][0] for name in ("ours", "trl_best")]
        summary = {"ours": speeds[0], "peer": speeds[1], "ratio": round(speeds[0] / speeds[1], 3)}
        print(json.dumps({"bench": "sft", **summary, "vocab": options.vocab, "batch": options.batch, **report}))


def prepare(directory: Path, hidden: int, options: argparse.Namespace) -> dict:
    """Model, texts and tokenised data; what every racer is told of them."""
    from tulu_mega.config import DataSettings, ModelSettings
    from tulu_mega.data.prepare import prepare as tokenised

    steps = max(1, round({128: 6, 512: 1}[hidden] * options.lap))
    model, texts, store = directory / "model", directory / "texts.jsonl", directory / "store"
    make_model(model, hidden, options.vocab)
    count = (1 + options.rounds + SPARE) * steps * options.batch
    write_texts(texts, count, options.vocab)
    data = DataSettings(train=str(texts), max_length=LONGEST)
    tokenised(data, ModelSettings(path=str(model), dtype="fp32"), store, progress=False)
    return {
        "model": str(model), "texts": str(texts), "store": str(store), "scratch": str(directory / "run"),
        "batch": options.batch, "steps": steps, "longest": LONGEST, "lr": 1e-5,
    }  # fmt: skip


def make_model(directory: Path, hidden: int, vocab: int) -> None:
    """A Llama 3 in proportion, and a tokenizer of as many words, which TRL asks for."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    heads = max(4, hidden // 64)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=LAYERS[hidden], num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=vocab, max_position_embeddings=4096, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{n}": n for n in range(3, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        directory
    )


def write_texts(file: Path, count: int, vocab: int) -> None:
    """Random tokens of Tulu-like lengths; the first third, as of a prompt, is not trained."""
    random = np.random.RandomState(1)
    with file.open("w", encoding="utf-8") as out:
        for length in np.maximum(tulu_lengths(count, seed=0) // SHRINK, 6).tolist():
            ids = random.randint(3, vocab, length).tolist()
            out.write(json.dumps({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]}) + "\n")


def lap_tokens(spec: dict) -> list[int]:
    """Tokens of each lap."""
    with open(spec["texts"], encoding="utf-8") as file:
        lengths = [len(json.loads(line)["input_ids"]) for line in file]
    size = spec["steps"] * spec["batch"]
    return [sum(lengths[at : at + size]) for at in range(0, len(lengths), size)]


def figures(racer: Racer, tokens: list[int]) -> dict:
    """Setting and rates. A racer that packs texts its own way counts tokens itself."""
    amounts = [lap.get("tokens", count) for lap, count in zip(racer.laps, tokens, strict=False)]
    return {"setting": racer.entry.label, "tokens_per_second": rates(racer, amounts), **calm(racer)}


def measure(spec: dict, entries: list[Entry], rounds: int, directory: Path) -> dict:
    """The race at one width."""
    racers = race(entries, spec, rounds, directory / "log.txt")
    tokens = lap_tokens(spec)
    result = {name: figures(racer, tokens) for name, racer in racers.items()}
    mine = result["ours"]["tokens_per_second"][0]
    for name, each in result.items():
        if name != "ours":
            each["ratio"] = round(mine / each["tokens_per_second"][0], 3)
            if not racers[name].entry.setting.get("packing"):  # TRL's packing makes batches of its own
                each["lap_ratios"] = lap_ratios(racers["ours"], racers[name])
                each["loss_gap"] = loss_gap(racers[name], racers["ours"])
    return result


def search(entries: list[Entry], spec: dict, rounds: int, directory: Path) -> None:
    """Every setting by itself."""
    tokens = lap_tokens(spec)
    for entry in entries:
        racer = race([entry], spec, rounds, directory / "log.txt")[entry.name]
        print(json.dumps({"name": entry.name, **figures(racer, tokens)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
