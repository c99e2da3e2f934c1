"""What can be known to be wrong with a command before anything is launched.

Each command names the function that knows (`cli.Command.problems`); it notes what it finds in a `Findings`. Rows that the command
trains on are tokenised last: what is wrong with them is only seen then.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tulu_mega.cli import command_of
from tulu_mega.config import EngineSettings, Section
from tulu_mega.errors import UserError
from tulu_mega.launch.launcher import resolve
from tulu_mega.preflight.findings import Findings
from tulu_mega.preflight.rows import tokenise


def check(settings: Section) -> list[str]:
    """Everything that is wrong with a command's settings, model and data; nothing is left on disk but in `data.cache`."""
    findings = findings_of(settings)
    with tempfile.TemporaryDirectory() as scratch:
        return tokenise(findings, Path(scratch))


def ready(settings: EngineSettings) -> None:
    """Checks as `check` does and leaves the tokenised data in the run directory for the ranks.

    Raises:
        UserError: with every problem; nothing is written then.
    """
    if problems := tokenise(findings_of(settings)):
        raise UserError(problems)


def findings_of(settings: Section) -> Findings:
    """What is found before any data is tokenised."""
    findings = Findings()
    if command := command_of(settings).problems:
        resolve(command)(settings, findings)
    return findings
