"""Cross-compiles kernels for an H100 without one, in a process without Triton's interpreter."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    """bytes a thread spills"""
    loads: set[str]
    """of global memory, such as ``ld.global.v4.b32``"""
    stores: set[str]
    atomics: set[str]


def compiled(kernel, signature: dict[str, str], constants: dict[str, object], warps: int, aligned: bool = True) -> Compiled:
    """
    Args:
        signature: types of the arguments that are no constants, such as ``*bf16`` and ``i32``.
        aligned: pointers are multiples of 16 bytes, as torch's are; numbers are not known to be multiples of anything.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == signature.keys() | constants.keys(), set(names) ^ (signature.keys() | constants.keys())
    pointers = [(names.index(name),) for name, kind in signature.items() if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={pointer: [["tt.divisibility", 16]] for pointer in pointers if aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    found = set(re.findall(r"(?:ld|st)\.global(?:\.[\w:]+)*", made.asm["ptx"]))
    atomics = set(re.findall(r"(?:atom|red)\.(?:[\w:]+\.)*global[\w.:]*", made.asm["ptx"]))
    return Compiled(registers, stack + local, {f for f in found if f[:2] == "ld"}, {f for f in found if f[:2] == "st"}, atomics)
