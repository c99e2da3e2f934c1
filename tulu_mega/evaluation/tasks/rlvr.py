"""Rows with verifiable answers, as RLVR trains on them: judged by the verifier that each row names."""

from __future__ import annotations

from tulu_mega.evaluation.task import Problem, Row, Task


def read(row: Row) -> Problem:
    """
    Raises:
        ValueError: a row of another form.
    """
    from tulu_mega.data.forms.reading import read as read_form  # brings torch along
    from tulu_mega.data.messages import conversation_of

    read_row = read_form(row, "prompt").row
    messages, given = conversation_of(read_row, read_row["messages"], training=False)
    if messages[-1]["role"] == "assistant":
        raise ValueError("its last message is the assistant's, so there is nothing to answer; leave that message out")
    names = row.get("dataset")
    if not (isinstance(names, str) or (isinstance(names, list) and names and all(isinstance(name, str) for name in names))):
        raise ValueError("dataset is missing; expected the name of the verifier, or a list of names")
    if "ground_truth" not in row:
        raise ValueError("ground_truth is missing")
    group = names if isinstance(names, str) else "+".join(names)
    return Problem(messages, row["ground_truth"], group, verifier=names, given=given)


TASK = Task(
    name="rlvr",
    title="verifiable rows",
    fields="messages (and, as for grpo, system, tools, chat_template_kwargs), ground_truth, dataset (the verifier's name)",
    hub=(),
    split="test",
    read=read,
    max_tokens=2048,
    metrics=("score",),
)
