"""``python -m tulu_mega.agent``: torchrun with signals handed on; `launch/agent.py` has it."""

import sys

from tulu_mega.launch.agent import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
