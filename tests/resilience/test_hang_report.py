"""What the ranks' accounts say together."""

from __future__ import annotations

import json
import threading

from tulu_mega.resilience import hang_report
from tulu_mega.resilience.hang_report import Account, Collective

ALL = Collective("gloo:all_reduce", "0", (0, 1, 2, 3), 9)


def waiting(what: Collective, begun: int) -> Account:
    return Account("step 5: update", 3, "in torch.distributed's all_reduce", what, {what.group: begun})


def test_an_account_survives_the_store():
    for account in (waiting(ALL, 9), Account("start", 1)):
        assert Account.loads(account.dumps()) == account


def test_a_rank_that_does_not_answer_is_named_first_and_who_waits_for_it():
    accounts = {0: waiting(ALL, 9), 1: Account("step 5: data", 7), 2: waiting(ALL, 9), 3: waiting(ALL, 9)}
    assert hang_report.together(accounts, [1]) == [
        "rank 1 does not answer: stopped, swapped out or dead; last heard of in 'step 5: data'",
        "rank 1 has not come to gloo:all_reduce number 9 of ranks 0-3, where ranks 0, 2-3 wait",
        "ranks 0, 2-3: in 'step 5: update', waiting in gloo:all_reduce number 9 of ranks 0-3, in torch.distributed's all_reduce",
    ]
    assert hang_report.together({}, [4]) == ["rank 4 does not answer: stopped, swapped out or dead"]


def test_a_rank_that_is_elsewhere_is_told_from_those_that_have_come():
    elsewhere = Account("step 5: data", 7, "in no collective but in sleep (x.py:3)", None, {"0": 8})
    late = Account("step 5: forward", 7, begun={"0": 8})
    lines = hang_report.together({0: waiting(ALL, 9), 1: elsewhere, 2: waiting(ALL, 9), 3: late}, [])
    assert lines[:2] == [
        "rank 1 has not come to gloo:all_reduce number 9 of ranks 0-3, where ranks 0, 2 wait",
        "rank 3 has not come to gloo:all_reduce number 9 of ranks 0-3, where ranks 0, 2 wait",
    ]
    assert "rank 1: in 'step 5: data', in no collective but in sleep (x.py:3)" in lines
    assert "rank 3: not stuck, in 'step 5: forward'" in lines


def test_ranks_in_short():
    assert [hang_report.spelt(ranks) for ranks in ([], [3], [2, 0, 1], [0, 1, 4, 6, 7])] == ["", "3", "0-2", "0-1, 4, 6-7"]


def entry(number: int, retired: bool, group: str = "7", p2p: bool = False) -> dict:
    return {
        "collective_seq_id": number, "is_p2p": p2p, "process_group": [group, "tp"], "retired": retired,
        "profiling_name": f"gloo:{'recv' if p2p else 'all_reduce'}",
    }  # fmt: skip


def test_the_flight_recorder_is_read():
    found = {"entries": [entry(1, True), entry(2, True), entry(5, True, "8"), entry(3, False), entry(4, False)]}
    groups = {"7": (0, 2), "8": (0, 1)}
    waits, begun = hang_report.collectives(json.dumps(found), groups)
    assert waits == Collective("gloo:all_reduce", "7", (0, 2), 3)  # the first that has not ended
    assert begun == {"7": 4, "8": 5}
    waits, begun = hang_report.collectives(json.dumps({"entries": [entry(0, False, p2p=True)]}).encode(), groups)
    assert str(waits) == "gloo:recv of ranks 0, 2" and begun == {}
    assert hang_report.collectives("{}", groups) == (None, {})
    foreign = json.dumps({"entries": [entry(7, False, "weights")]})  # no group of the ranks'
    assert hang_report.collectives(foreign, groups)[0] is None


def test_a_batch_of_messages_has_ended_with_the_entry_behind_it():
    """As NCCL records a pipeline's: what is in a batch is never marked."""

    def batch(retired: bool) -> list[dict]:
        parts = [{**entry(0, False, p2p=True), "profiling_name": name} for name in ("nccl:send 0->1", "nccl:recv 0<-1")]
        return [*parts, {**entry(0, retired, p2p=True), "profiling_name": "nccl:coalesced"}]

    def waits(entries: list[dict]) -> str:
        return str(hang_report.collectives(json.dumps({"entries": entries}), {"7": (0, 1), "8": (0, 2)})[0])

    reduction = entry(3, False, "8")
    assert waits([*batch(True), *batch(True), reduction]) == "gloo:all_reduce number 3 of ranks 0, 2"
    assert waits([*batch(True), *batch(False)]) == "nccl:send 0->1 of ranks 0-1"
    assert waits([*batch(True), reduction, *batch(False)]) == "gloo:all_reduce number 3 of ranks 0, 2"
    # messages that are no batch are marked, each by itself: one that ended says nothing of another
    alone = [{**entry(0, done, p2p=True), "profiling_name": name} for name, done in (("nccl:recv 0<-1", False), ("x", True))]
    assert waits([*batch(True), *alone]) == "nccl:recv 0<-1 of ranks 0-1"


def test_the_main_threads_stack():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(hang_report.main_stack()))
    thread.start()
    thread.join()
    assert seen[0].startswith("in no collective but in ") and "threading.py" in seen[0]
