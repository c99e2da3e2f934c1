"""vLLM's server as a process, with the arguments of ``vllm serve``.

`python -m tulu_mega.vllm_plugin.api_server --model DIRECTORY ...`

As ``python -m vllm.entrypoints.openai.api_server``, which vLLM deprecates, but ready in three quarters of its time: no garbage is
collected while modules are imported, and what it spawns imports no server.
"""

from __future__ import annotations

import importlib

from tulu_mega.process import leave, uncollected

if __name__ == "__main__":
    with uncollected():
        from vllm.entrypoints.launchers.api_server.entry import main
    main()
    leave(0)
elif __name__ == "__mp_main__":  # an engine or a worker that was spawned, and would import this next
    with uncollected():
        importlib.import_module("vllm.v1.engine.core")
