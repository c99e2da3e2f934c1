"""What can be known to be wrong with a command before anything is launched.

Each command names the function that knows (`cli.Command.problems`); it notes what it finds in a `Findings`. Rows that the command
trains on are tokenised last: what is wrong with them is only seen then.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tulu_mega.cli import command_of
from tulu_mega.config import EngineSettings, Section
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.launch.run_dir import CHECKPOINTS
from tulu_mega.platforms import releases
from tulu_mega.platforms.unseen import unseen_gpus
from tulu_mega.preflight import pinned
from tulu_mega.preflight.findings import Findings
from tulu_mega.preflight.rows import damaged_stores, tokenise


def check(settings: Section, verify: bool = False, tell: Callable[[str], None] | None = None) -> list[str]:
    """Everything that is wrong with a command's settings, model and data; nothing is left on disk but in `data.cache`.

    Args:
        verify: read all that the run has pinned, whatever its files' times are, and its checkpoints.
        tell: called with each line that is no problem, yet should be known: of rows that are not used, of pins.
    """
    findings = findings_of(settings, verify)
    with tempfile.TemporaryDirectory() as scratch:
        problems = tokenise(findings, Path(scratch))
    told = list(findings.notes)
    if findings.pins:
        findings.collect(lambda: pinned.ends(findings, keep=False))
        if verify:
            from tulu_mega.train.checkpoint_files import damaged  # brings torch's checkpoints, which no other check needs

            findings.problems += damaged(Path(findings.pins.run_dir, CHECKPOINTS)) + damaged_stores(findings)
        told += pinned.lines(findings)
    for line in dict.fromkeys(told) if tell else ():
        tell(line)
    return list(dict.fromkeys([*problems, *findings.problems]))


def ready(settings: EngineSettings) -> None:
    """Checks as `check` does, and leaves the tokenised data in the run directory for the ranks.

    What is not wrong, but is to be known, goes to standard error.

    Raises:
        UserError: with every problem, and nothing is written then; or, once rows are tokenised (they stay), that a name in
            `accept_changes` is nobody's.
    """
    findings = findings_of(settings, starts=True)
    if problems := tokenise(findings):
        raise UserError(problems)
    for line in dict.fromkeys(findings.notes):
        print(line, file=sys.stderr, flush=True)
    if findings.pins:
        pinned.ends(findings, keep=True)


def findings_of(settings: Section, verify: bool = False, starts: bool = False) -> Findings:
    """What is found before any data is tokenised; of packages that cannot work nothing else is, since most of it needs them."""
    findings, command = Findings(verify=verify, starts=starts), command_of(settings)
    if command.world:
        findings.collect(lambda: releases.refuse("training"))
        findings.notes += releases.untried_here("training") + unseen_gpus()
    if command.problems and not findings.problems:
        resolve(command.problems)(settings, findings)
    return findings
