"""Compile every shipped configuration without a GPU and look at the machine code.

    python -m grail_kernels.aot            # a table of what CI compiles; exit code 1 if anything is wrong
    python -m grail_kernels.aot --all      # every variant, and the devices that share another one's configurations
    python -m grail_kernels.aot --json

Wrong is: a spilled register (or more of them than the configuration says), more shared or tensor memory than the target
has, no matrix instruction of the kind the target should use (a kernel that does not fit can "compile" into a trap), an
operand of a Gram kernel that does not come in 16-byte copies: fewer of those than its bytes need, a narrower copy to
shared memory, or a narrower plain load.
The triton wheel ships ptxas, cuobjdump and nvdisasm. Not to be run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .configs import TMA, TMA_WIDE, GramConfig
from .variants import MORE_TARGETS, TARGETS, VARIANTS, Target, Variant, kernel_of, specialise

TENSOR_MEMORY_COLUMNS = 512


@dataclass
class Compiled:
    """What the machine code of one variant on one target looks like, and what is wrong with it."""

    target: str
    variant: str
    registers: int
    spills: int
    shared: int
    tensor_columns: int
    matrix: int
    wide_copies: int
    narrow_copies: int
    problems: list[str] = field(default_factory=list)


def check(target_name: str, variant: Variant, config: GramConfig | None = None) -> Compiled:
    """Compile one variant for one target (with its shipped configuration, or another one) and judge it."""
    target = (TARGETS | MORE_TARGETS)[target_name]
    config = config or variant.config(target_name)
    kernel = _compile(target, variant, config)
    found = _inspect_hip(kernel) if target.backend == "hip" else _inspect_cuda(kernel)
    code = found.pop("code")
    matrix = len(re.findall(target.matrix, code))
    columns = getattr(kernel.metadata, "tmem_size", 0) or 0
    result = Compiled(
        target=target_name,
        variant=variant.name,
        shared=kernel.metadata.shared,
        tensor_columns=columns,
        matrix=matrix,
        **found,
    )
    if result.spills > (config.spills if variant.pipelined else 0):
        result.problems.append(f"{result.spills} spills")
    if result.shared > target.shared_limit:
        result.problems.append(f"{result.shared} bytes of shared memory, limit {target.shared_limit}")
    if result.tensor_columns > TENSOR_MEMORY_COLUMNS:
        result.problems.append(f"{result.tensor_columns} columns of tensor memory, limit {TENSOR_MEMORY_COLUMNS}")
    if variant.matrix and not result.matrix:
        result.problems.append("no matrix instruction (a trap, or plain arithmetic)")
    if variant.pipelined:
        needed = 1 if variant.descriptors else _copies_per_step(target, variant, config)
        if result.narrow_copies or result.wide_copies < needed:
            found = f"{result.narrow_copies} copies or loads narrower than 16 bytes, {result.wide_copies} wide"
            result.problems.append(f"{found}; one step over the rows needs {needed} wide ones")
    return result


def check_all(targets: list[str] | None = None, *, everything: bool = False) -> list[Compiled]:
    """The essential variants on each target that CI checks, or every variant on every target."""
    names = targets or [*TARGETS, *(MORE_TARGETS if everything else ())]
    return [
        check(name, variant)
        for name in names
        for variant in VARIANTS
        if (everything or variant.essential) and compiles(name, variant)
    ]


def compiles(target_name: str, variant: Variant) -> bool:
    """False for a tensor-descriptor variant on a target without a copy engine, or without a wide configuration."""
    table = TMA_WIDE if variant.wide else TMA
    return not variant.descriptors or (TARGETS | MORE_TARGETS)[target_name].configuration in table


def _copies_per_step(target: Target, variant: Variant, config: GramConfig) -> int:
    """16-byte copies that one thread makes to fetch block_k rows of both operands."""
    operand_bytes = (config.block_m + config.tile) * config.block_k * 2
    return operand_bytes // (16 * config.warps * target.warp)


def _compile(target: Target, variant: Variant, config: GramConfig):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, asked = kernel_of(variant), specialise(variant, target.backend, config)
    warps, stages = (config.warps, config.stages) if variant.pipelined else (variant.warps, variant.stages)
    index = kernel.arg_names.index
    source = ASTSource(
        kernel,
        asked.signature,
        constexprs={(index(name),): value for name, value in asked.constants.items()},
        attrs={(index(name),): [["tt.divisibility", 16]] for name in asked.aligned},
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    return triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})


def _inspect_cuda(kernel) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", file.name)
    widths = [
        int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x\w+|\d+)", kernel.asm["ptx"])
    ]
    return {
        "code": code,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide_copies": sum(w == 16 for w in widths) + len(re.findall(r"\bUTMALDG", code)),
        "narrow_copies": sum(w != 16 for w in widths) + _narrow_loads(kernel.asm["ptx"]),
    }


def _narrow_loads(ptx: str) -> int:
    """Plain loads from global memory of less than 16 bytes; bytes alone are the row mask's."""
    loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sum(int(bits) > 8 and int(count or 1) * int(bits) < 128 for count, bits in loads)


def _inspect_hip(kernel) -> dict:
    code = kernel.asm["amdgcn"]
    number = lambda name: sum(map(int, re.findall(rf"\.{name}:\s*(\d+)", code)))  # noqa: E731
    return {
        "code": code,
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide_copies": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", code)),
        "narrow_copies": len(
            re.findall(r"\b(?:global|buffer)_load_(?:ushort|short_d16\w*|dword|dwordx2|dwordx3)\b", code)
        ),
    }


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    parser.add_argument("--all", action="store_true", help="also what CI leaves out")
    parser.add_argument("--targets", nargs="+", choices=[*TARGETS, *MORE_TARGETS], help="only these")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing would be compiled")
    results = check_all(asked.targets, everything=asked.all)
    if asked.json:
        sys.stdout.write(json.dumps([asdict(result) for result in results]) + "\n")
    else:
        sys.stdout.write(_table(results))
    return int(any(result.problems for result in results))


def _table(results: list[Compiled]) -> str:
    head = ["target", "variant", "registers", "spills", "shared", "tmem", "matrix", "16-byte copies", "verdict"]
    rows = [head]
    for r in results:
        copies = f"{r.wide_copies} of {r.wide_copies + r.narrow_copies}"
        verdict = "; ".join(r.problems) or "ok"
        cells = (r.target, r.variant, r.registers, r.spills, r.shared, r.tensor_columns, r.matrix, copies, verdict)
        rows.append([str(cell) for cell in cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
