"""How much faster steps are whose servers answer while a step trains, of servers, verifiers and a trainer that sleep.

    python tools/bench_lag.py
    python tools/bench_lag.py --generation 0.4 --training 0.2 --informative 0.6 --lags 0 1 2

The rollouts' own scheduler asks servers that sleep for `--generation` seconds a batch of a step's size (three quarters of them
shrink with the batch) and verifiers that sleep; a step's training sleeps, too. Prints a JSON line for each lag:

    seconds     for all steps
    speedup     the seconds of lag 0 over these
    ideal       (G + T) / max(G, T) where every prompt teaches something; with no time for anything else
    share       the first over the second
    policy_lag  mean of the trained tokens
    asked       batches
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tulu_mega.config import GrpoSettings
from tulu_mega.data.prompts import Prompt, PromptSet
from tulu_mega.objectives.advantages import ESTIMATORS
from tulu_mega.records import Response
from tulu_mega.rewards.verdict import Verdict
from tulu_mega.rl.judging import JudgedResponse
from tulu_mega.rl.scheduler import Scheduler

SAMPLES = 4
STARTING = 0.25
"""Part of a batch's time that a batch of one prompt takes, too: its longest answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", type=float, default=0.3, help="seconds for a step's prompts")
    parser.add_argument("--training", type=float, default=0.3, help="seconds of a step")
    parser.add_argument("--verifying", type=float, default=0.0, help="seconds of a verdict")
    parser.add_argument("--informative", type=float, default=1.0, help="share of the prompts that teach something")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    ideal = (options.generation + options.training) / max(options.generation, options.training)
    first = None
    for lag in options.lags:
        seconds, age, asked = measure(options, lag)
        first = first or seconds
        speedup = first / seconds
        best = ideal if lag else 1.0
        told = {"lag": lag, "seconds": seconds, "speedup": speedup, "ideal": best, "share": speedup / best, "policy_lag": age}
        print(json.dumps({name: round(value, 3) for name, value in told.items()} | {"asked": asked}), flush=True)


def measure(options: argparse.Namespace, lag: int) -> tuple[float, float, int]:
    """Seconds of all steps, mean age of their tokens, and batches that servers were asked."""
    servers = Servers(options)
    given = {"model": "m", "run_dir": "r", "data": "d", "sampling": {"samples": SAMPLES, "max_tokens": 8}}
    train = {"prompts": options.prompts, "max_policy_lag": lag}
    settings = GrpoSettings.model_validate({**given, "train": train, "policy": {"overlong": "keep"}})
    prompts = PromptSet([Prompt([number], [], "", "v", "") for number in range(1000)])
    verifiers = Verifiers(options)
    scheduler = Scheduler(prompts, servers, verifiers, ESTIMATORS["standardised"], settings, (0,), options.steps)
    began, ages = time.perf_counter(), []
    for step in range(options.steps):
        ages.append(scheduler.next(step).figures()["policy_lag"])
        time.sleep(options.training)
        scheduler.quiet()
    return time.perf_counter() - began, sum(ages) / len(ages), servers.asked


class Servers:
    """Sleep, and answer anything."""

    def __init__(self, options: argparse.Namespace):
        self._options, self.asked = options, 0

    def generate(self, prompts, sampling, version, numbers=None, done=None):
        options = self._options
        self.asked += 1
        time.sleep(options.generation * (STARTING + (1 - STARTING) * len(prompts) / options.prompts))
        answers = []
        for place, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
            worth = random.Random(number).random() < options.informative
            group = [
                Response.of_one_turn(list(prompt), [sample if worth else 0], [-1.0], [version], "stop")
                for sample in range(sampling.samples)
            ]
            answers.append(group)
            done(place, group)
        return answers

    attempt = generate


class Verifiers:
    """Give a verdict after some time."""

    def __init__(self, options: argparse.Namespace):
        self._options = options

    def begin(self, prompt, responses):
        futures: list[Future] = [Future() for _ in responses]

        def give() -> None:
            for future, one in zip(futures, responses, strict=True):
                future.set_result(Verdict(float(one.last_answer[0] % 2)))

        if self._options.verifying:
            threading.Timer(self._options.verifying, give).start()
        else:
            give()
        return futures

    def finish(self, groups, verdicts, greedy=False):
        told = [[future.result() for future in futures] for futures in verdicts]
        return [
            [JudgedResponse(one, "", verdict, verdict.score) for one, verdict in zip(group, each, strict=True)]
            for group, each in zip(groups, told, strict=True)
        ]


if __name__ == "__main__":
    main()
