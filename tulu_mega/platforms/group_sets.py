"""Several sets of megatron-core's parallel groups over one world, of which one at a time is in its place.

megatron-core 0.16.1 takes a `ProcessGroupCollection` for some of what it builds, but its schedules ask `parallel_state` for
sizes, its optimizers for the tensor group, and its layers' mappings for whatever group they are not handed. So a second model
under another layout has to find its own groups there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

SHARED = ("_GLOBAL_MEMORY_BUFFER", "_GLOBAL_SYMMETRIC_MEMORY_BUFFER")
"""What all sets have in common: memory to gather into, which models use in turn."""
_STATE = re.compile(r"_[A-Z][A-Z_]*")


def state_of(module: ModuleType) -> dict[str, Any]:
    """The module's state by name: a set's groups, its ranks and sizes."""
    return {name: value for name, value in vars(module).items() if _STATE.fullmatch(name)}


class GroupSet:
    """A set of groups, while another is in its place."""

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
        """Makes a further set, which is not in its place afterwards. A collective.

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
        """Has the set in its place for a while, then the one that was there before."""
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
