"""The sandbox: right programs pass, harmful ones do no harm, endless ones end."""

import os
import time

import pytest

from tulu_mega.errors import UserError
from tulu_mega.rewards import RewardSpec, Verdict, VerifierInput, VerifierPool, sandbox
from tulu_mega.rewards.sandbox import CodeLimits, protections, require_protections, run_program
from tulu_mega.rewards.verifiers.python_code import PythonCode, program_of

LIMITS = CodeLimits(wall_s=10, cpu_s=5, memory_mb=256, file_mb=1, total_s=30)

confined = pytest.mark.skipif(
    protections() != {"files", "calls"}, reason="the kernel lacks Landlock or seccomp; python_code refuses to run there"
)


def outcome(program, limits=LIMITS, statement="pass"):
    return run_program(program, [{"statement": statement}], limits)[0]


@confined
def test_each_test_is_judged_on_its_own():
    tests = [{"statement": f"assert add(1, {n}) == 3"} for n in (2, 3, 2)]
    assert [result.passed for result in run_program("def add(a, b): return a + b", tests, LIMITS)] == [True, False, True]


@confined
def test_standard_input_and_output():
    program = "n = int(input())\nprint(n * 2, 'é')\nprint()"
    tests = [{"input": "4\n", "output": "8 é"}, {"input": "5", "output": "10 é\n"}, {"input": "x", "output": ""}]
    assert [result.passed for result in run_program(program, tests, LIMITS)] == [True, True, False]
    assert not run_program(program, [{"input": "4\n", "output": "9 é"}], LIMITS)[0].passed


HARM = {
    "network": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix socket": "import socket; a, b = socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'x', '/dev/log')",
    "fork": "import os; os.fork()",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "signal": f"import os; os.kill({os.getpid()}, 0)",
    "parent": "import os; os.kill(os.getppid(), 9)",
    "limits of others": f"import resource; resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE)",
    "own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "write": "open('{victim}', 'a')",
    "truncate": "import os; os.truncate('{victim}', 0)",
    "remove": "import os; os.remove('{victim}')",
    "rename": "import os; os.rename('{victim}', 'mine')",
    "mode": "import os; os.chmod('{victim}', 0o777)",
    "times": "import os; os.utime('{victim}')",
    "link": "import os; os.link('{victim}', 'mine')",
    "read": "open('{victim}').read()",
    "environment of others": f"open('/proc/{os.getpid()}/environ').read()",
    "home": "import os; os.listdir('/root' if os.path.isdir('/root') else '/home')",
}


@confined
@pytest.mark.parametrize("kind", HARM)
def test_harm_is_refused(kind, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    before = victim.stat()
    result = outcome(HARM[kind].replace("{victim}", str(victim)))
    assert not result.passed
    assert any(word in result.detail for word in ("not permitted", "denied", "not allowed", "cross-device")), result.detail
    assert victim.read_text() == "precious"
    after = victim.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@confined
@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("x = ' ' * (1 << 30)", "MemoryError"),
        ("open('big', 'w').write('x' * (2 << 20))", "File too large"),
        ("files = [open('/dev/null') for _ in range(100)]", "Too many open files"),
        ("import sys; sys.exit(0)", "AssertionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os; os._exit(0)", "left before"),
        ("def f(:", "SyntaxError"),
        ("\0", "null bytes"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import ctypes; ctypes.string_at(0)", "signal 11"),
    ],
)
def test_limits_and_ways_out(program, says):
    result = outcome(program, statement="assert False")
    assert not result.passed
    assert says in result.detail


@confined
def test_time_runs_out():
    start = time.monotonic()
    assert "ran longer" in outcome("import time; time.sleep(60)", CodeLimits(wall_s=0.5)).detail
    assert "CPU time" in outcome("while True: pass", CodeLimits(wall_s=60, cpu_s=1, total_s=60)).detail
    results = run_program("import time; time.sleep(60)", [{"statement": "pass"}] * 3, CodeLimits(wall_s=0.4, total_s=0.6))
    assert [result.passed for result in results] == [False] * 3
    assert "not run" in results[2].detail
    assert time.monotonic() - start < 55  # of the sixty that each would sleep


@confined
def test_harmless_programs_have_what_they_need():
    program = """
import asyncio, pathlib, threading
pathlib.Path("notes").mkdir()
pathlib.Path("notes/a.txt").write_text("hi")
ran = []
thread = threading.Thread(target=ran.append, args=(1,))
thread.start()
thread.join()
async def main():
    await asyncio.sleep(0)
    return ran
"""
    assert outcome(program, statement="assert asyncio.run(main()) == [1]") == sandbox.Outcome(True, "")


@confined
def test_nothing_is_left_behind_and_our_environment_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    result = outcome("import os; open('a', 'w').write('x')", statement="assert 'WANDB_API_KEY' not in os.environ")
    assert result.passed, result.detail
    assert not list(tmp_path.iterdir())


@confined
def test_trees_that_are_hard_to_remove_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    program = "import os\nos.mkdir('closed', 0)\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')"
    assert outcome(program).passed
    end = time.monotonic() + 60
    while left := list(tmp_path.iterdir()):  # what takes long is removed after the verdict
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_a_machine_without_protections_is_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(sandbox, "protections", lambda: frozenset({"files"}))
    with pytest.raises(UserError, match="seccomp filters"):
        require_protections(CodeLimits())
    require_protections(CodeLimits(allow_unprotected=True))


FENCED = """First:
```python
x = 1
```
Better:
  ```py
x = 2
  ```
Output:
```
2
```
"""


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        (FENCED, "x = 2\n"),
        ("```\nx = 3\n```", "x = 3\n"),
        ("```Python\nx = 4\r\n```", "x = 4\r\n"),
        ("```bash\nls\n```", None),
        ("```python\nx = 5", None),
        ("x = 6", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_python_block(reply, program):
    assert program_of(reply) == program


@confined
def test_the_score_is_the_share_of_tests_passed():
    verifier = PythonCode(LIMITS)
    truth = '["assert f(1) == 1", "assert f(2) == 4", {"input": "", "output": "ready"}, "assert f(3) == 9"]'
    verifier.check(truth)
    verdict = verifier("```python\nprint('ready')\ndef f(x): return x\n```", truth)
    assert verdict.score == 0.5
    assert "2 of 4 tests passed; test 2: AssertionError" in verdict.detail
    assert verifier("I cannot.", truth).score == 0
    assert verifier("```python\nx = 1\n```", "assert x == 1").score == 1


@confined
@pytest.mark.parametrize(
    "truth", [[], "", "[]", None, 5, ["assert ("], [{"input": "a"}], [{"input": "a", "output": 3}], [""], ["a", 5]]
)
def test_a_ground_truth_that_is_no_list_of_tests_is_refused(truth):
    with pytest.raises(ValueError, match=r"expected a list of tests|test \d"):
        PythonCode(LIMITS).check(truth)


@confined
def test_an_endless_program_is_wrong_and_no_error_of_the_verifier():
    spec = RewardSpec(code=CodeLimits(wall_s=1, total_s=1))
    replies = ["```python\nwhile True: pass\n```", "```python\nx = 1\n```"]
    with VerifierPool(spec, ["python_code"], workers=2, timeout_s=20) as pool:
        verdicts = pool.judge([VerifierInput(reply, "code", ["assert x == 1"]) for reply in replies])
    assert [verdict.score for verdict in verdicts] == [0.0, 1.0]


@confined
def test_what_a_verdict_tells_can_be_written_to_a_file():
    reply = "```python\ndef f(x): raise ValueError('\\ud800 \\udfff')\n```"
    verdict = PythonCode()(reply, ["assert f(1) == 1"])
    assert (verdict.score, "ValueError" in verdict.detail) == (0.0, True)
    assert "\\ud800 \\udfff" in verdict.detail.encode("utf-8").decode()
    assert Verdict.failed("\ud800").error == "\\ud800"
