"""Another environment's Python: of its own prefix, with the packages of this one."""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def other_python(directory: Path) -> Path:
    """Makes a virtual environment and returns its Python."""
    venv.EnvBuilder(symlinks=True).create(directory)
    standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    places = [place for place in sys.path if Path(place).is_dir() and Path(place).is_absolute() and place not in standard]
    packages = [str(ROOT), str(ROOT / "kernels"), *(place for place in places if not place.endswith("lib-dynload"))]
    site = directory / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "as_there.pth").write_text("".join(f"{place}\n" for place in dict.fromkeys(packages)))
    openmp = Path(sys.prefix, "lib/libiomp5.so")  # which servers of an environment preload where it is there
    if openmp.exists():
        (directory / "lib/libiomp5.so").symlink_to(openmp)
    return directory / "bin/python"
