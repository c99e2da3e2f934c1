"""What is wrong with a command on data: no model is asked or trained."""

from __future__ import annotations

from pathlib import Path

from tulu_mega.config import DataInspectSettings, DataMixSettings, DecontaminateSettings
from tulu_mega.data.places import check_writable
from tulu_mega.data.sources import Rows as Sources
from tulu_mega.data.tools import decontaminate, mix
from tulu_mega.data.tools.row_kind import of_its_kind
from tulu_mega.errors import UserError
from tulu_mega.launch.run_dir import DATA
from tulu_mega.preflight import model
from tulu_mega.preflight.findings import Findings, Rows


def inspect_problems(settings: DataInspectSettings, findings: Findings) -> None:
    """Find problems of a model and the rows that it would be trained on; these rows have to be tokenised."""
    model.problems(settings, findings)
    settings = findings.collect(lambda: of_its_kind(settings)) or settings
    findings.rows.append(Rows("data.train", settings.data, settings.model, Path(DATA)))


def mix_problems(settings: DataMixSettings, findings: Findings) -> None:
    """Find problems of the rows that will be drawn."""
    findings.collect(lambda: _writable(Path(settings.output).expanduser(), making=False))
    rows = findings.collect(lambda: mix.drawn(of_its_kind(settings)))
    if rows:
        findings.collect(lambda: mix.check(rows))
        findings.notes.append(f"data.train: {_counted(rows)}")


def decontaminate_problems(settings: DecontaminateSettings, findings: Findings) -> None:
    """Find problems of training and evaluation rows, all of which are read."""
    findings.collect(lambda: _writable(Path(settings.output).expanduser() / "report.json", making=True))
    opened = findings.collect(lambda: decontaminate.opened(settings))
    if not opened:
        return
    evaluations, train = opened
    findings.collect(lambda: decontaminate.check(settings, evaluations, train))
    findings.notes.append(f"train: {_counted(train)}")
    findings.notes += [f"evaluations: {_counted(rows)}" for rows in evaluations]


def _writable(file: Path, making: bool) -> None:
    """
    Args:
        making: the command makes the file's directory where there is none.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(0, f"{file} is a directory")
        if not making and not file.absolute().parent.is_dir():
            raise NotADirectoryError(0, f"{file.absolute().parent} is no directory; make it first")
        check_writable(file.parent)
    except OSError as error:
        raise UserError(f"output = {file if not making else file.parent}: cannot be written: {error.strerror}") from None


def _counted(rows: Sources) -> str:
    return ", ".join(f"{source['source']}: {source['drawn']:,} of {source['rows']:,} rows" for source in rows.sources())
