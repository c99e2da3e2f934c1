"""The tasks by name. Each is a table in a file of its own."""

from tulu_mega.evaluation.task import Task
from tulu_mega.evaluation.tasks import bbh, gsm8k, humaneval, ifeval, math, mbpp, mmlu, rlvr

_ALL = (gsm8k, math, ifeval, mmlu, bbh, humaneval, mbpp, rlvr)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _ALL}
