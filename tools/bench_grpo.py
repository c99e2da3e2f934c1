"""Races GRPO, Megatron training and a live vLLM server, against TRL's GRPOTrainer with transformers' generation.

    python tools/bench_grpo.py [--quick] [--lengths equal tail]

Needs `make peers`. The same Llama of random weights (hidden 512, 8 layers, float32), the same prompts, reward, group size and
cores; each side generates, judges, trains once and, ours, carries the weights to the server. Two lengths of responses:

    equal   every response has 64 tokens
    tail    the model ends a response at each token with a probability of 1/64: mean 64, cap 512

Racers stay up and run laps in alternating order, as in tools/bench_sft.py. Prints one JSON line:

    ours, peer, ratio   steps/s where lengths have a tail, ours and TRL's at its best setting, and the first over the second
    equal, tail         for each: steps_per_second (median, slowest and fastest lap) and response_length of both, their ratio,
                        lap_ratios (median, least, greatest), laps that count, others_share
    idle, load_average_before, busy_share_before
                        whether nothing else ran

`--search` tries the settings in question instead, and prints a line for each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_sft import make_model
from race.racing import OURS, PEERS, SPARE, Entry, Racer, calm, lap_ratios, race, rates, wait_until_idle

HIDDEN, VOCAB, SAMPLES, MEAN = 512, 8192, 8, 64
CAPS = {"equal": 64, "tail": 512}
PROMPT = 24
"""Words of the longest prompt."""


def ours(pack: int = 4096, servers: int = 1) -> Entry:
    return Entry("ours", OURS, "racer_grpo.py", {"pack": pack, "servers": servers, "importance": "none"})


def trl(micro: int) -> Entry:
    return Entry("trl", PEERS, "peers/trl_grpo.py", {"micro": micro})


BEST = {"equal": (ours(), trl(8)), "tail": (ours(), trl(8))}
SEARCH = [*(ours(pack, servers) for pack in (1024, 4096) for servers in (1, 2)), *(trl(micro) for micro in (4, 8, 16, 32))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=CAPS, default=list(CAPS))
    parser.add_argument("--batch", type=int, default=32, help="responses in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of a lap")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to wait for an idle machine")
    parser.add_argument("--quick", action="store_true", help="two rounds: a look, no measurement")
    parser.add_argument("--search", nargs="?", const="", metavar="NAME", help="try the settings of both, or of one")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.idle = 2, 0.0
    report: dict = {"bench": "grpo", **wait_until_idle(options.idle)}
    with tempfile.TemporaryDirectory(prefix="bench_grpo_") as scratch:
        for lengths in options.lengths:
            directory = Path(scratch, lengths)
            spec = prepare(directory, lengths, options)
            if options.search is not None:
                for entry in (each for each in SEARCH if options.search in each.name):
                    spec["run_dir"] = str(directory / f"run_{entry.label}".replace(" ", "_"))
                    racer = race([entry], spec, options.rounds, directory / "log.txt")[entry.name]
                    print(json.dumps({"lengths": lengths, "name": entry.name, **figures(racer, options.steps)}), flush=True)
                continue
            racers = race(BEST[lengths], spec, options.rounds, directory / "log.txt")
            sides = {name: figures(racer, options.steps) for name, racer in racers.items()}
            mine, peer = (sides[name]["steps_per_second"][0] for name in ("ours", "trl"))
            report[lengths] = {
                "ratio": round(mine / peer, 3),
                "lap_ratios": lap_ratios(racers["ours"], racers["trl"]),
                **sides,
            }
    if options.search is None:
        last = report[options.lengths[-1]]
        speeds = {"ours": last["ours"]["steps_per_second"][0], "peer": last["trl"]["steps_per_second"][0]}
        print(json.dumps({**speeds, "ratio": last["ratio"], "batch": options.batch, "samples": SAMPLES, **report}))


def figures(racer: Racer, steps: int) -> dict:
    laps = [lap for lap in racer.laps[1:] if lap["responses"]]
    length = sum(lap["tokens"] for lap in laps) / max(sum(lap["responses"] for lap in laps), 1)
    return {
        "setting": racer.entry.label,
        "steps_per_second": rates(racer, [steps] * len(racer.laps)),
        "response_length": round(length, 1),
        **calm(racer),
    }


def prepare(directory: Path, lengths: str, options: argparse.Namespace) -> dict:
    """Model and prompts; what every racer is told of them."""
    model, prompts = directory / "model", directory / "prompts.jsonl"
    make_model(model, HIDDEN, VOCAB)
    end_responses(model, 1 / MEAN if lengths == "tail" else 0.0)
    steps = (1 + options.rounds + SPARE) * options.steps
    write_prompts(prompts, steps * options.batch // SAMPLES)
    return {
        "model": str(model), "prompts": str(prompts), "run_dir": str(directory / "run"), "batch": options.batch,
        "samples": SAMPLES, "cap": CAPS[lengths], "max_prompt": 2 * PROMPT, "steps": options.steps, "all_steps": steps,
        "lr": 1e-6,
    }  # fmt: skip


def write_prompts(file: Path, count: int) -> None:
    """Random words."""
    random = np.random.RandomState(1)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            words = " ".join(f"w{token}" for token in random.randint(3, VOCAB, random.randint(PROMPT // 2, PROMPT)))
            row = {"messages": [{"role": "user", "content": words}], "ground_truth": "", "dataset": "odd"}
            out.write(json.dumps(row) + "\n")


def end_responses(directory: Path, probability: float) -> None:
    """Has the model end a response at any token with a probability.

    All embeddings get one vector more, which the hidden states then share, and eos's row of the head points along it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        rows += torch.randn(rows.shape[1], generator=generator) * 4 * rows.std()
        tokens = torch.randint(3, VOCAB, (8, 128), generator=generator)
        hidden = model.model(tokens).last_hidden_state.flatten(0, 1)
        along = hidden.mean(0) / hidden.mean(0).norm()
        others = (hidden @ model.lm_head.weight[3:].T).logsumexp(-1)
        low, high = -100.0, 100.0
        for _ in range(60):  # the mean probability rises with the factor
            factor = (low + high) / 2
            mean = float(torch.sigmoid(factor * (hidden @ along) - others).mean())
            low, high = (factor, high) if mean < probability else (low, factor)
        model.lm_head.weight[1] = factor * along
        for special in (0, 2):  # never drawn: a padding token would be taken for padding
            model.lm_head.weight[special] = -100.0 * along
    model.save_pretrained(directory)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
