"""`tulu-mega convert` without an installation: python tools/convert.py --source DIR --output DIR --to megatron"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tulu_mega.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
