"""``python -m tulu_mega``: the command line. The guard matters: checkpoint writers start processes that import this module."""

from tulu_mega.cli import program

if __name__ == "__main__":
    program()
