"""``python -m tulu_mega``: the command line. The guard matters: checkpoint writers start processes that import this module."""

import sys

from tulu_mega.cli import main

if __name__ == "__main__":
    sys.exit(main())
