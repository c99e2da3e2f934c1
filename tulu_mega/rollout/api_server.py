"""vLLM's server as a process, with the words of ``vllm serve``: `python -m tulu_mega.rollout.api_server --model DIRECTORY ...`

As ``python -m vllm.entrypoints.openai.api_server``, which vLLM deprecates, but ready after 27 s instead of 37 on two cores (43
instead of 57 with two workers): no garbage is collected while modules are imported, and what it spawns imports no server.
"""

from __future__ import annotations

from tulu_mega.imports import leave, uncollected

if __name__ == "__main__":
    with uncollected():
        from vllm.entrypoints.launchers.api_server.entry import main
    main()
    leave(0)
elif __name__ == "__mp_main__":  # in the engine's process, and in the workers'
    with uncollected():
        import vllm.v1.engine.core  # noqa: F401
