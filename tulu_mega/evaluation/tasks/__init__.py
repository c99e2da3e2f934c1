"""The tasks by name. Each is a table in a file of its own."""

from tulu_mega.evaluation.task import Task
from tulu_mega.evaluation.tasks import bbh, gsm8k, ifeval, math, mmlu, rlvr

TASKS: dict[str, Task] = {task.name: task for task in (gsm8k.TASK, math.TASK, ifeval.TASK, mmlu.TASK, bbh.TASK, rlvr.TASK)}
