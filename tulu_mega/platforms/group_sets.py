"""Several sets of megatron-core's parallel groups over one world, of which one at a time is active.

megatron-core 0.16.1 takes a `ProcessGroupCollection` for some of what it builds, but its schedules ask `parallel_state` for
sizes, its optimizers for the tensor group, and its layers' mappings for whatever group they are not handed. So the groups of a
second model under another layout have to be made active while it computes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

SHARED = ("_GLOBAL_MEMORY_BUFFER", "_GLOBAL_SYMMETRIC_MEMORY_BUFFER")
"""State that all sets share: memory for gathers, which models use in turn."""
_STATE = re.compile(r"_[A-Z][A-Z_]*")


def state_of(module: ModuleType) -> dict[str, Any]:
    """The module's state by name: a set's groups, its ranks and sizes."""
    return {name: value for name, value in vars(module).items() if _STATE.fullmatch(name)}


class GroupSet:
    """A set of groups that is not active."""

    def __init__(self, state: Mapping[str, Any]):
        self.state = dict(state)


class GroupSets:
    """The sets of a process.

    Args:
        module: `megatron.core.parallel_state`, its first set made.
    """

    def __init__(self, module: ModuleType):
        self._module = module
        self.first = self._current = GroupSet(state_of(module))

    def another(self, build: Callable[[], None]) -> GroupSet:
        """Make a further set; the active set stays the same. A collective.

        Args:
            build: makes groups in the module, which has none then.
        """
        current = state_of(self._module)
        self._put({name: {} if isinstance(value, dict) else None for name, value in current.items()})
        try:
            build()
            made = state_of(self._module)
        finally:
            self._put(current)
        return GroupSet(made | {name: current[name] for name in SHARED})

    @contextlib.contextmanager
    def in_place(self, wanted: GroupSet) -> Iterator[None]:
        """Activate a set for the duration of the context, then the earlier one again."""
        before = self._current
        if wanted is before:
            yield
            return
        self._change(before, wanted)
        try:
            yield
        finally:
            self._change(wanted, before)

    def _change(self, before: GroupSet, after: GroupSet) -> None:
        before.state = state_of(self._module)
        self._put(after.state)
        self._current = after

    def _put(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._module, name, value)
