"""The command line: ``tulu-mega COMMAND [config.toml] [--section.key value ...]``.

Nothing heavy is imported before it is needed, so that ``--help`` answers at once: commands name their settings and their
code as ``module:attribute`` strings.

`errors.STATUSES` has the exit statuses.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from tulu_mega import __version__
from tulu_mega.config.stages import DEFAULT, STAGES, Stage
from tulu_mega.errors import Stopped, UserError, nearest
from tulu_mega.launch import launcher, meeting, reporting
from tulu_mega.launch.run_files import FULL, unwritten
from tulu_mega.process import leave


@dataclass(frozen=True)
class Command:
    """One command: what it does, the settings it takes and the function that does it, as ``module:attribute``."""

    summary: str
    settings: str
    run: str
    world: bool = False
    """Needs a world of ranks: ``run(settings, world)`` instead of ``run(settings)``."""
    operands: str = ""
    """The list setting that arguments without a flag go to; without one, the first such argument is the TOML file."""
    example: str = ""
    problems: str = ""
    """Tells what is wrong: ``module:function`` of the settings and a :class:`tulu_mega.preflight.findings.Findings`; nothing is
    looked for when empty."""
    stage: Stage | None = None
    """The training stage that it runs."""


def _training(stage: Stage) -> Command:
    return Command(
        stage.summary, stage.settings, stage.recipe, world=True, example=stage.example, problems=stage.problems, stage=stage
    )


COMMANDS = {
    **{name: _training(stage) for name, stage in STAGES.items()},
    "score": Command(
        "per-token log-probabilities of given texts, or a reward model's scores, under any layout",
        "tulu_mega.config.inference:ScoreSettings",
        "tulu_mega.recipes.score:run",
        world=True,
        example="tulu-mega score --model DIR --input texts.jsonl --output scores.jsonl",
        problems="tulu_mega.preflight.inference:score_problems",
    ),
    "generate": Command(
        "answers by vLLM, from JSONL or at a prompt",
        "tulu_mega.config.inference:GenerateSettings",
        "tulu_mega.inference.generate:generate",
        example="tulu-mega generate --model DIR --input prompts.jsonl --output answers.jsonl",
        problems="tulu_mega.preflight.inference:problems",
    ),
    "serve": Command(
        "vLLM servers for a trainer on another node, which attaches to them by rollout.urls",
        "tulu_mega.config.rollout:ServeSettings",
        "tulu_mega.inference.serve:serve",
        example="TULU_MEGA_ROLLOUT_KEY=... tulu-mega serve --model DIR --host 10.0.0.5 --port 8000 --rollout.servers 2",
        problems="tulu_mega.preflight.inference:serve_problems",
    ),
    "convert": Command(
        "a model between Hugging Face's format and Megatron's distributed checkpoint, streaming",
        "tulu_mega.convert.settings:ConvertSettings",
        "tulu_mega.convert.run:run",
        example="tulu-mega convert --source DIR --output NEW_DIR --to megatron",
    ),
    "eval": Command(
        "a checkpoint on benchmarks through vLLM, with intervals: GSM8K, MATH, IFEval, MMLU, BBH or rows of your own",
        "tulu_mega.evaluation.settings:EvalSettings",
        "tulu_mega.evaluation.run:run",
        example="tulu-mega eval --model DIR --output DIR/eval --tasks.gsm8k test.jsonl --tasks.ifeval input_data.jsonl",
        problems="tulu_mega.preflight.evaluation:problems",
    ),
    "report": Command(
        "draws runs: curves as PNG and one self-contained HTML page",
        "tulu_mega.report.settings:ReportSettings",
        "tulu_mega.report.report:run",
        operands="runs",
        example="tulu-mega report runs/sft runs/sft-higher-lr",
    ),
    "plan": Command(
        "memory, time and cost of a stage on a cluster, before it is started; --search ranks layouts",
        "tulu_mega.plan.settings:PlanSettings",
        "tulu_mega.plan.run:run",
        operands="config",
        example="tulu-mega plan examples/tulu3/8b/sft.toml --gpus 32 --gpu h100",
    ),
    "data inspect": Command(
        "what a run would train on: rows with what is trained of them, lengths, rejects, packing",
        "tulu_mega.config.data:DataInspectSettings",
        "tulu_mega.data.tools.inspect:inspect",
        example="tulu-mega data inspect examples/tulu3/8b/sft.toml --parallel.data 8 --html data.html",
        problems="tulu_mega.preflight.tools:inspect_problems",
    ),
    "data mix": Command(
        "the rows that data.train draws of its sources, as one JSONL file",
        "tulu_mega.config.data:DataMixSettings",
        "tulu_mega.data.tools.mix:mix",
        example='tulu-mega data mix --data.train \'{"a.jsonl" = 0.5, "owner/b" = 2000}\' --output mixed.jsonl',
        problems="tulu_mega.preflight.tools:mix_problems",
    ),
    "data decontaminate": Command(
        "finds training rows that hold evaluation rows, by 8-grams, and writes the data without them",
        "tulu_mega.config.data:DecontaminateSettings",
        "tulu_mega.data.tools.decontaminate:decontaminate",
        example='tulu-mega data decontaminate --train train.jsonl --evaluations \'{"test.jsonl" = "question"}\' --output DIR',
        problems="tulu_mega.preflight.tools:decontaminate_problems",
    ),
    "quickstart": Command(
        "the recipe on a tiny model and task made on the spot: train, generate, compare",
        "tulu_mega.quickstart.settings:QuickstartSettings",
        "tulu_mega.quickstart.demo:run",
        example="tulu-mega quickstart",
    ),
}
CHECK = "check"
CHECK_SUMMARY = "settings, data, model and environment of a command, before anything is launched"
HELP = ("-h", "--help", "help")


def program() -> NoReturn:
    """`main` as a whole process."""
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; ``sys.argv`` when None.

    Returns:
        The exit status (`errors.STATUSES`).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _status_of(lambda: _dispatch(arguments))


def run_script(function: Callable[[Any, Any], int | None], settings: type) -> int:
    """Runs a function of your own script on every rank, as `tulu-mega` runs a training stage.

    The script's arguments are a TOML file and flags, as a command's are. The script starts its ranks itself; under torchrun it
    joins those of torchrun. Errors that the user can mend are printed as ``error: ...``. A script ends with::

        if __name__ == "__main__":
            sys.exit(run_script(run, SftSettings))

    Args:
        function: called on every rank with the settings and the rank's `launch.launcher.World`. It stands at the top level of
            the script. Import what needs megatron-core inside it.
        settings: class of the settings, derived from `config.run.EngineSettings`. For a command's class, such as `SftSettings`,
            settings, model and data are checked and tokenised before the ranks start, as by that command.

    Returns:
        The exit status (`errors.STATUSES`).
    """
    arguments = sys.argv[1:]
    if any(argument in HELP for argument in arguments):
        from tulu_mega.config.texts import help_text

        text = (settings.__doc__ or function.__name__).strip()
        print(help_text(os.path.basename(sys.argv[0]), "[config.toml]", text, settings))
        return 0
    target = f"{settings.__module__}:{settings.__qualname__}"
    known = next((command for command in COMMANDS.values() if command.settings == target), None)
    command = known or Command(function.__name__, target, "", world=True)
    program = [sys.executable, *sys.orig_argv[1:]]
    return _status_of(lambda: _on_ranks(command, f"{function.__module__}:{function.__qualname__}", program, arguments, settings))


def _status_of(run: Callable[[], int]) -> int:
    """The exit status of a command; what ended it is told."""
    try:
        return run()
    except UserError as error:
        reporting.report(error.problems)
        return 2
    except Stopped as stopped:
        reporting.report_stop(stopped)
        return stopped.status
    except meeting.Lost as lost:
        reporting.record_crash(lost)
        print(f"error: {lost}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `tulu-mega ... | head`
        sys.stderr.close()
        return 141
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            reporting.report([f"{error.filename}: too long for the name of a file here (255 bytes a part, mostly); shorten it"])
            return 2
        if error.errno not in FULL:
            reporting.record_crash(error)
            raise
        reporting.report([unwritten(str(error.filename or "a file"), error)])
        return 2
    except Exception as error:
        reporting.record_crash(error)
        if not (lost := reporting.lost_another(error)):
            raise
        print(f"error: {lost}", file=sys.stderr, flush=True)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP:
        print(_overview())
        return 0
    name, rest = _name(arguments)
    if name == "--version":
        print(f"tulu-mega {__version__}")
        return 0
    if name == CHECK:
        return _check(rest)
    if name not in COMMANDS:
        if parts := [command.removeprefix(f"{name} ") for command in COMMANDS if command.startswith(f"{name} ")]:
            raise UserError(
                f"tulu-mega {name}: give one of {', '.join(parts)}; tulu-mega {name} {parts[0]} --help lists its settings"
            )
        raise UserError(f"unknown command {name!r}{nearest(name, [*COMMANDS, CHECK])}; commands: {', '.join([*COMMANDS, CHECK])}")
    if any(flag in HELP for flag in rest):
        print(_command_help(name))
        return 0
    command = COMMANDS[name]
    if command.world:
        program = [sys.executable, "-m", "tulu_mega", name, *rest]
        return _on_ranks(command, command.run, program, rest, launcher.resolve(command.settings))
    settings = _settings(command, rest)
    status = launcher.resolve(command.run)(settings)
    return int(status or 0)


def _on_ranks(command: Command, target: str, program: list[str], arguments: list[str], kind: type) -> int:
    """Runs ``target(settings, world)`` on every rank of a world.

    Args:
        program: the command line of a rank, which comes here again.
    """
    launcher.die_with_launcher()
    with meeting.refusing_together(os.environ):
        settings = _settings(command, arguments, kind)

    def prepare(it: Any) -> None:  # imported only where it is called: ranks do not prepare
        if command.run:
            launcher.resolve("tulu_mega.preflight.check:ready")(it)

    return launcher.run(target, settings, program, prepare=prepare, **_surroundings(command.stage, settings))


def _surroundings(stage: Stage | None, settings: Any) -> dict[str, Any]:
    """What the launcher has for the ranks of a stage: arguments of `launcher.run`. Ranks that do not train have nothing."""
    if stage is None:
        return {}
    return {
        "run_dir": settings.run_dir,
        "grace": settings.checkpoint.grace,
        "restarts": launcher.resolve(stage.restarts)(settings) if stage.restarts else 0,
        "companions": partial(_companions, stage) if stage.companions else None,
    }


def _companions(stage: Stage, settings: Any, trainers: int) -> Any:
    return launcher.resolve(stage.companions)(settings, trainers)  # imported only where it is called: ranks have none


def command_of(settings: Any) -> Command:
    """The command that takes settings of this class."""
    kind = type(settings)
    return next(each for each in COMMANDS.values() if each.settings == f"{kind.__module__}:{kind.__qualname__}")


def _name(arguments: list[str]) -> tuple[str, list[str]]:
    """The command, of one word or two, and what follows it."""
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    return " ".join(arguments[:words]), arguments[words:]


def _settings(command: Command, arguments: list[str], kind: type | None = None) -> Any:
    from tulu_mega.config import load

    kind = kind or launcher.resolve(command.settings)
    first_flag = next((index for index, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    if command.operands and first_flag:
        flags = [f"--{command.operands}", json.dumps(arguments[:first_flag]), *arguments[first_flag:]]
        return load(kind, None, flags)
    file, flags = (arguments[0], arguments[1:]) if first_flag else (None, arguments)
    return load(kind, file, flags)


def _check(arguments: list[str]) -> int:
    """``check [COMMAND] config.toml [flags]``: prints the resolved settings and everything that is wrong."""
    if not arguments or any(flag in HELP for flag in arguments):
        print(
            f"usage: tulu-mega check [--cluster] [--verify] [COMMAND] [config.toml] [--section.key value ...]\n\n"
            f"{CHECK_SUMMARY}.\n"
            "--cluster looks at what differs or fails between machines; started on each of them as the run is\n"
            "(docs/how-to/launch_many_nodes.md).\n"
            "--verify reads all files that the run depends on, and its checkpoints, even where their times are those of before.\n"
            f"COMMAND is {', '.join(COMMANDS)}; when left out, the one that the file is for, and {DEFAULT} for flags alone.\n"
            "Exit status 0: nothing is wrong; 2: something is."
        )
        return 0
    cluster, verify = "--cluster" in arguments, "--verify" in arguments
    arguments = [argument for argument in arguments if argument not in ("--cluster", "--verify")]
    name, rest = _name(arguments)
    if named := name in COMMANDS:
        arguments = rest
    else:
        name = _told(arguments)
    try:
        with meeting.refusing_together(os.environ if cluster else {}):
            settings = _settings(COMMANDS[name], arguments)
    except UserError as error:
        if named or not any("unknown setting" in problem for problem in error.problems):
            raise
        told = f"these were read as settings of {name}, since no command was named; for another: tulu-mega check grpo FILE"
        raise UserError([*error.problems, told]) from None
    first = not cluster or os.environ.get("RANK", "0") == "0"
    if first:
        from tulu_mega.config.texts import as_toml

        if not named:
            print(f"# no command was named: read as settings of {name}")
        print(as_toml(settings.model_dump()), flush=True)

    def look() -> list[str]:
        tell = None if cluster else lambda line: print(f"# {line}", flush=True)
        return launcher.resolve("tulu_mega.preflight.check:check")(settings, verify, tell)

    if cluster:
        nodes = launcher.resolve("tulu_mega.preflight.cluster:check")(settings, look, lambda line: print(f"# {line}", flush=True))
    elif problems := look():
        raise UserError(problems)
    if not first:
        return 0
    where = f" on {nodes} nodes" if cluster else ""
    looked = "nothing wrong found" if COMMANDS[name].problems else "its settings are in order; nothing else was looked at"
    print(f"# {name}: {looked}{where}")
    return 0


def _told(arguments: list[str]) -> str:
    """The command that a settings file is for, where there is one."""
    if not arguments or arguments[0].startswith("-"):
        return DEFAULT
    from tulu_mega.config.told import command_told

    taking_files = {name: command for name, command in COMMANDS.items() if not command.operands and name != "data inspect"}
    kinds = {name: partial(launcher.resolve, command.settings) for name, command in taking_files.items()}

    def by_rows(data: Any) -> Sequence[str]:  # imported only where it is called: few files leave it open
        return launcher.resolve("tulu_mega.data.tools.row_kind:stages_of")(data)

    return command_told(arguments[0], arguments[1:], kinds, by_rows)


def _overview() -> str:
    rows = {name: command.summary for name, command in COMMANDS.items()} | {CHECK: CHECK_SUMMARY}
    width = max(map(len, rows))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in rows.items())
    return (
        f"tulu-mega {__version__}: Tulu 3 post-training on Megatron-core models with vLLM rollouts\n\n"
        f"usage: tulu-mega COMMAND [config.toml] [--section.key value ...]\n\n{commands}\n\n"
        "Settings are the same in the file and as flags, flags win: [optim] lr = 1e-5 is --optim.lr 1e-5.\n"
        "tulu-mega COMMAND --help lists every setting of a command."
    )


def _command_help(name: str) -> str:
    from tulu_mega.config.texts import help_text

    command = COMMANDS[name]
    usage = f"[{command.operands.upper()} ...]" if command.operands else "[config.toml]"
    summary = f"{command.summary}.\nExample: {command.example}"
    return help_text(f"tulu-mega {name}", usage, summary, launcher.resolve(command.settings))
