"""Compile every shipped configuration without a GPU and look at the machine code.

    python -m grail_kernels.aot            # a table; exit code 1 if anything is wrong
    python -m grail_kernels.aot --json

Wrong is: a spilled register, more shared or tensor memory than the target has, no matrix instruction of the kind the
target should use (a kernel that does not fit can "compile" into a trap), or a copy to shared memory narrower than 16
bytes. The triton wheel ships ptxas, cuobjdump and nvdisasm. Not to be run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .configs import (
    GRAM,
    GRAM_THREE_DOTS,
    GRAM_TMA,
    INTERPRETER,
    MATMUL_PRECISION,
    MATMUL_ROWS,
    PACKED_BLOCK,
    SCATTER_BLOCK,
    SMALL_COLUMNS,
    SMALL_ROWS,
    GramConfig,
)  # fmt: skip

INPUT_POINTERS = {"x_ptr", "low_ptr", "x_low_ptr", "y_ptr", "y_low_ptr"}
POINTERS = {
    "mask_ptr": "u8", "info_ptr": "i32", "rows_ptr": "i64", "cols_ptr": "i64", "index_ptr": "i64",
    "high_part_ptr": "bf16", "low_part_ptr": "bf16",
}  # fmt: skip
DESCRIPTORS = {"rows_desc": "block_m", "cols_desc": "tile"}
UNIT_STRIDES = {"stride_h", "stride_xh", "stride_yh"}
LONG = {"stride_s", "out_size"}
RIDGE = "ridge_triton.ridge_kernel"
UNALIGNED = {"rows", "R", "C", "N", "size"}


@dataclass(frozen=True)
class Target:
    """A GPU: how to compile for it, the bytes of shared memory one block may have, its matrix instruction."""

    backend: str
    arch: int | str
    warp: int
    shared_limit: int
    matrix: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, r"\bHMMA"),
    "sm_89": Target("cuda", 89, 32, 101376, r"\bHMMA"),
    "sm_90": Target("cuda", 90, 32, 232448, r"\bHGMMA"),
    "sm_100": Target("cuda", 100, 32, 232448, r"\bUTC\w*MMA"),
    "gfx942": Target("hip", "gfx942", 64, 65536, r"\bv_mfma_"),
}
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Variant:
    """One way a kernel is specialised at launch. `constants` None: those of the Gram configuration; `pipelined`: its
    operands must come in 16-byte copies, or through the copy engine; `descriptors`: only for targets that have one;
    `matrix`: it must use the matrix units."""

    name: str
    kernel: str = "gram_kernel"
    dtype: str = "bf16"
    mask: bool = False
    three_dots: bool = False
    add: bool = True
    module: str = "gram_triton"
    constants: tuple[tuple[str, int], ...] | None = None
    warps: int = 4
    stages: int = 2
    matrix: bool = True
    pipelined: bool = True
    descriptors: bool = False

    def config(self, target: str) -> GramConfig:
        """The shipped configuration of a variant that has one."""
        table = GRAM_TMA if self.descriptors else GRAM_THREE_DOTS if self.three_dots else GRAM
        return table[target]


def _plain(name: str, kernel: str, warps: int = 4, matrix: bool = False, stages: int = 2, **constants: int) -> Variant:
    """A float32 kernel without a configuration of its own."""
    module, function = kernel.split(".")
    return Variant(
        name,
        kernel=function,
        dtype="fp32",
        module=module,
        constants=tuple(constants.items()),
        warps=warps,
        stages=stages,
        matrix=matrix,
        pipelined=False,
    )


VARIANTS = (
    Variant("gram bf16"),
    Variant("gram fp16", dtype="fp16"),
    Variant("gram bf16 masked", mask=True),
    Variant("gram bf16 split", add=False),
    Variant("gram fp32", three_dots=True),
    Variant("gram fp32 masked", mask=True, three_dots=True),
    Variant("gram bf16 TMA", kernel="gram_tma_kernel", module="gram_tma", descriptors=True),
    Variant("gram bf16 TMA split", kernel="gram_tma_kernel", module="gram_tma", descriptors=True, add=False),
    Variant("cross bf16", kernel="cross_kernel"),
    Variant("cross fp32 masked", kernel="cross_kernel", mask=True, three_dots=True),
    _plain(
        "packed matmul", "packed_triton.matmul_kernel", 8, True, TILE=128, BLOCK_N=PACKED_BLOCK, BLOCK_K=MATMUL_ROWS
    ),
    _plain("packed gather", "packed_triton.gather_kernel", TILE=128, BLOCK=PACKED_BLOCK),
    _plain("packed scatter", "packed_triton.scatter_kernel", TILE=128, BLOCK=SCATTER_BLOCK),
    _plain("split reduction", "gram_triton.reduce_kernel", BLOCK=1024),
    _plain("float32 parts", "gram_triton.split_kernel", HAS_SHIFT=0, BLOCK=1024),
    _plain("shifted parts", "gram_triton.split_kernel", HAS_SHIFT=1, BLOCK=1024),
    *(
        _plain(f"small ridge {k}", RIDGE, stages=1, BLOCK_K=k, BLOCK_M=SMALL_COLUMNS, BLOCK_P=SMALL_ROWS)
        for k in (16, 32, 64, 128)
    ),
)


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
    target = TARGETS[target_name]
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
    if result.spills:
        result.problems.append(f"{result.spills} spills")
    if result.shared > target.shared_limit:
        result.problems.append(f"{result.shared} bytes of shared memory, limit {target.shared_limit}")
    if result.tensor_columns > TENSOR_MEMORY_COLUMNS:
        result.problems.append(f"{result.tensor_columns} columns of tensor memory, limit {TENSOR_MEMORY_COLUMNS}")
    if variant.matrix and not result.matrix:
        result.problems.append("no matrix instruction (a trap, or plain arithmetic)")
    if variant.pipelined and (result.narrow_copies or not result.wide_copies):
        result.problems.append(f"{result.narrow_copies} copies narrower than 16 bytes, {result.wide_copies} wide")
    return result


def check_all(targets: list[str] | None = None) -> list[Compiled]:
    """Every variant on every target that has a shipped configuration."""
    names = [name for name in GRAM if name != INTERPRETER]
    return [
        check(name, variant)
        for name in targets or names
        for variant in VARIANTS
        if name in GRAM_TMA or not variant.descriptors
    ]


def _compile(target: Target, variant: Variant, config: GramConfig):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f".{variant.module}", __package__), variant.kernel)
    if variant.constants is None:
        constants, options = _gram_constants(kernel, variant, config), (config.warps, config.stages)
    else:
        constants, options = dict(variant.constants), (variant.warps, variant.stages)
    if "PRECISION" in kernel.arg_names:
        constants["PRECISION"] = MATMUL_PRECISION[target.backend]
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in DESCRIPTORS:
            signature[name] = f"tensordesc<{variant.dtype}[{config.block_k}, {getattr(config, DESCRIPTORS[name])}]>"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (variant.dtype if name in INPUT_POINTERS else POINTERS.get(name, "fp32"))
        else:
            signature[name] = "i64" if name in LONG else "i32"
        unaligned = name in UNALIGNED or (name == "columns" and variant.constants is not None)
        if name not in constants and name not in DESCRIPTORS and not unaligned:
            aligned.append(name)
    index = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        constexprs={(index(name),): value for name, value in constants.items()},
        attrs={(index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    return triton.compile(source, target=gpu, options={"num_warps": options[0], "num_stages": options[1]})


def _gram_constants(kernel, variant: Variant, config: GramConfig) -> dict[str, int]:
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "SPAN": config.span, "HAS_MASK": variant.mask,
        "THREE_DOTS": variant.three_dots, "ADD": variant.add, "EPILOGUE": config.epilogue, "UPCAST": False,
        "TILE": config.tile, "BLOCK_N": config.tile, "STEP": config.step,
    }  # fmt: skip
    constants |= dict.fromkeys(UNIT_STRIDES, 1)
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


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
        "narrow_copies": sum(w != 16 for w in widths),
    }


def _inspect_hip(kernel) -> dict:
    code = kernel.asm["amdgcn"]
    number = lambda name: sum(map(int, re.findall(rf"\.{name}:\s*(\d+)", code)))  # noqa: E731
    return {
        "code": code,
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide_copies": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", code)),
        "narrow_copies": len(re.findall(r"\b(?:global|buffer)_load_(?:ushort|short_d16\w*|dwordx2)\b", code)),
    }


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="only these")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing would be compiled")
    results = check_all(asked.targets)
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
