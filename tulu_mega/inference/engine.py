"""vLLM as a process that answers over a connection: `python -m tulu_mega.inference.engine DESCRIPTOR`.

The descriptor is one end of a pair of sockets that `offline.Generator` holds the other end of.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from tulu_mega.inference.command_line import DEFAULTS, lora_arguments
from tulu_mega.inference.offline import Completion
from tulu_mega.inference.sampling import Sampling
from tulu_mega.process import leave, uncollected


def serve(connection: Connection) -> NoReturn:
    """Makes a vLLM of the arguments that come first, and answers until the other end is closed.

    Sends ``(problem or None, result)``, with None behind the last one.
    """
    arguments, adapter = connection.recv()
    # Defaults that suit a laptop; whoever set them knows better.
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process is the engine's: no need for another
    }
    for name, value in {**DEFAULTS, **own}.items():
        os.environ.setdefault(name, value)
    try:
        with uncollected():
            from vllm import LLM
            from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _one_share_of_the_cores_each(arguments["tensor_parallel_size"])
            # a seeded request whose prompt is computed in parts ends vLLM there: "CPU Generator does not use offset"
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
        if adapter:
            own_methods = {"worker_extension_cls": "tulu_mega.vllm_plugin.adapters.AdapterReport"}
            arguments |= lora_arguments(adapter[1]) | own_methods
        llm = LLM(**arguments, disable_log_stats=True)
        asking = _adapter(llm, adapter[0]) if adapter else None
        connection.send((None, None))
        while True:
            if (asked := connection.recv()) is None:  # a response was to be stopped that had ended by then
                continue
            for answer in _answers(llm, connection, asking, *asked):
                connection.send((None, answer))
            connection.send((None, None))
    except (EOFError, ConnectionError):  # the parent is done, or dead
        llm.llm_engine.engine_core.shutdown()  # or else tensor parallel workers are waited for in vain
    except BaseException as error:
        traceback.print_exc()
        reason = next(iter(str(error).strip().splitlines()), "")
        connection.send((f"{type(error).__name__}: {reason}", None))
    leave(0)


def _one_share_of_the_cores_each(tensor: int) -> None:
    """On a CPU vLLM binds each tensor parallel worker to a NUMA node, of which a laptop has one."""
    cores = sorted(os.sched_getaffinity(0))
    if 1 < tensor <= len(cores):
        shares = (cores[rank::tensor] for rank in range(tensor))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, share)) for share in shares))


def _adapter(llm: Any, directory: str) -> Any:
    """vLLM's request for an adapter, which is in its place.

    Raises:
        RuntimeError: vLLM has no place for some of its matrices, and would answer without these and say nothing.
    """
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, directory)
    llm.llm_engine.add_lora(request)
    left_out = sorted({name for worker in llm.collective_rpc("left_out", args=(1,)) for name in worker})
    if left_out:
        raise RuntimeError(f"{len(left_out)} of the adapter's modules match none of vLLM's model: {', '.join(left_out[:5])}")
    return request


def _answers(
    llm: Any,
    connection: Connection,
    adapter: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    numbers: list[int],
    stream: bool,
) -> Iterator[tuple[int, list[Completion]] | Completion]:
    """What `Generator.each` or `Generator.stream` give."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine, kind = llm.llm_engine, RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    for place, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
        parameters = SamplingParams(**sampling.parameters(number), output_kind=kind)
        engine.add_request(str(place), TokensPrompt(prompt_token_ids=prompt), parameters, lora_request=adapter)
    while engine.has_unfinished_requests():
        for output in engine.step():
            completions = [
                Completion(list(sample.token_ids), sample.finish_reason)
                for sample in sorted(output.outputs, key=lambda one: one.index)
            ]
            if stream:
                yield completions[0]
            elif output.finished:
                yield int(output.request_id), completions
        if stream and connection.poll():
            connection.recv()
            engine.abort_request(["0"])


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # what vLLM starts must not hold it open
    serve(Connection(descriptor))
