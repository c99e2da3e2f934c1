"""Faults planted in the sandbox are noticed by the gallery: what it holds is what makes it hold."""

import shutil
from pathlib import Path

import pytest

from tests.rewards import gallery
from tulu_mega.rewards import CodeLimits, sandbox
from tulu_mega.rewards.sandbox import protections, run_program

pytestmark = pytest.mark.skipif(
    protections() != {"files", "calls"}, reason="the kernel lacks Landlock or seccomp; python_code refuses to run there"
)
KIND = "        kind = type(value)\n        if value is None"
PLAIN = "        if value is None or kind is bool or kind is str:\n            return value\n"
CALL = "        answer, kept = self._client.call(self._target, arguments, named)\n"
ENDED = "StopIteration ends the test's loop"
CACHED = (
    "        known = self._client.__dict__.setdefault('known', {})\n"
    "        if repr(arguments) not in known:\n"
    "            known[repr(arguments)] = self._client.call(self._target, arguments, named)\n"
    "        answer, kept = known[repr(arguments)]\n"
)
# file, what stands there, what is planted, the entry that notices
FAULTS = {
    "bool for int": ("values.py", PLAIN, PLAIN.replace("return value", "return 1 if value is True else value"), "bool for int"),
    "int for float": ("values.py", "value if math.isfinite(value) else", "int(value) if value == value else", "float for int"),
    "a subclass": (
        "values.py", KIND, KIND.replace("type(value)", "int if isinstance(value, int) else type(value)"), "a subclass of int",
    ),
    "a subclass of a container": (
        "values.py", KIND, KIND.replace("type(value)", "list if isinstance(value, list) else type(value)"), "a subclass of list",
    ),
    "list for tuple": ("values.py", 'tuple: "t"', 'tuple: "l"', "tuple for list"),
    "tuple for list": ("values.py", 'list: "l"', 'list: "t"', "list for tuple"),
    "the reply's helper": ("evaluate.py", '("setup", "statement")', '("statement",)', "the prompt's helper redefined"),
    "one answer for all calls alike": ("stubs.py", CALL, CACHED, "answers by the number of the call"),
    "an object's truth": ("stubs.py", 'raise self._refuse("the truth")', "return True", "a coroutine that is true"),
    "an exception's object": ("client.py", "Raised(name, (", "type(name, (", "an exception class in a function's place"),
    "a function's text": (
        "stubs.py", '        if not self._name:\n            raise self._refuse("the text")\n', "", "text of a function is long"
    ),
    "a coroutine's hash": (
        "stubs.py", 'raise self._refuse("the hash")\n        return object', "pass\n        return object",
        "coroutines in a set",
    ),
    "a function of the test's process": (
        "client.py", "if home in _POWERFUL or", "if False and", "eval in the test opens the judge's report"
    ),
    "a loop ended by the program": ("client.py", "            kind = RuntimeError", "            pass", ENDED),
}  # fmt: skip


@pytest.fixture(scope="module")
def entries():
    return {entry.name: entry for file in ("cheats.txt", "right.txt") for entry in gallery.read(file)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, entries, tmp_path, monkeypatch):
    file, there, planted, noticed_by = FAULTS[fault]
    entry = entries[noticed_by]
    shutil.copytree(Path(sandbox.__file__).with_name("sandboxed"), tmp_path / "sandboxed")
    source = (tmp_path / "sandboxed" / file).read_text()
    assert source.count(there) == 1, "the place where the fault is planted has changed"
    (tmp_path / "sandboxed" / file).write_text(source.replace(there, planted))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    outcome = run_program(entry.program, [entry.job], CodeLimits(objects=entry.needs_objects), entry.prompt)[0]
    assert outcome.passed or (entry.kinds and outcome.kind not in entry.kinds)
