"""What the ahead-of-time check compiles: targets, and every way that a launch specialises a kernel.

A kernel's own declaration says how it is specialised: an argument in `do_not_specialize` is taken as it comes, every
other number is a multiple of 16 and every other pointer 16-byte aligned (the launchers see to it; tests/test_aot.py
compares what they ask for with what is compiled here).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from .configs import (
    GRAM,
    MATMUL_BLOCK,
    MATMUL_COLUMNS,
    MATMUL_PRECISION,
    MATMUL_ROWS,
    PACKED_BLOCK,
    SCATTER_BLOCK,
    SMALL_COLUMNS,
    SMALL_ROWS,
    WIDE,
    GramConfig,
    tma_config,
)  # fmt: skip

INPUT_POINTERS = {"x_ptr", "y_ptr"}
POINTERS = {
    "mask_ptr": "u8", "info_ptr": "i32", "rows_ptr": "i64", "cols_ptr": "i64", "index_ptr": "i64",
}  # fmt: skip
DESCRIPTORS = {"rows_desc": "block_m", "cols_desc": "tile"}


@dataclass(frozen=True)
class Target:
    """A GPU: how to compile for it, the bytes of shared memory one block may have, its matrix instruction.
    `configuration` is the name in the tables of configs.py."""

    backend: str
    arch: int | str
    warp: int
    shared_limit: int
    matrix: str
    configuration: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, r"\bHMMA", "sm_80"),
    "sm_89": Target("cuda", 89, 32, 101376, r"\bHMMA", "sm_89"),
    "sm_90": Target("cuda", 90, 32, 232448, r"\bHGMMA", "sm_90"),
    "sm_100": Target("cuda", 100, 32, 232448, r"\bUTC\w*MMA", "sm_100"),
    "gfx942": Target("hip", "gfx942", 64, 65536, r"\bv_mfma_", "gfx942"),
}
MORE_TARGETS = {
    "sm_86": Target("cuda", 86, 32, 101376, r"\bHMMA", "sm_89"),
    "sm_103": Target("cuda", 103, 32, 232448, r"\bUTC\w*MMA", "sm_100"),
    "sm_120": Target("cuda", 120, 32, 101376, r"\bHMMA", "sm_89"),
}
"""Devices that run with another target's configurations: compiled on request (`--all`), not in CI."""


@dataclass(frozen=True)
class Variant:
    """One way a kernel is specialised at launch. `constants` None: those of the Gram configuration, whose operands must
    come in 16-byte copies, or through the copy engine (`descriptors`, only for targets that have one); `matrix`: it
    must use the matrix units; `essential`: compiled in CI, the others on request."""

    name: str
    kernel: str = "gram_kernel"
    dtype: str = "bf16"
    phases: int = 1
    add: bool = True
    precise: bool = False
    wide: bool = False
    module: str = "gram_triton"
    constants: tuple[tuple[str, int], ...] | None = None
    warps: int = 4
    stages: int = 2
    matrix: bool = True
    essential: bool = True

    @property
    def descriptors(self) -> bool:
        return self.module == "gram_tma"

    @property
    def pipelined(self) -> bool:
        return self.constants is None

    def config(self, target: str) -> GramConfig:
        """The shipped configuration."""
        name = (TARGETS | MORE_TARGETS)[target].configuration
        if self.descriptors:
            return tma_config(name, WIDE if self.wide else None)
        return GRAM[name]


def _gram(kernel: str, module: str, dtype: str, add: bool, precise: bool, wide: bool = False) -> Variant:
    """A Gram or cross-moment kernel. Essential are those of bf16 and float32, in place; writing to a workspace instead
    needs no more registers, fp16 no more than bf16, and `precise` the same."""
    words = {"TMA": module == "gram_tma", "wide": wide, "split": not add, "precise": precise}
    name = " ".join([kernel, dtype, *(word for word, said in words.items() if said)])
    function = f"{kernel}_tma_kernel" if words["TMA"] else f"{kernel}_kernel"
    essential = dtype != "fp16" and add and not precise
    read, phases = ("bf16", 3) if dtype == "fp32" else (dtype, 1)
    return Variant(name, function, read, phases, add, precise, wide, module, essential=essential)


def _plain(
    name: str, kernel: str, dtype: str = "fp32", warps: int = 4, matrix: bool = False, stages: int = 2, **constants: int
) -> Variant:
    """A kernel without a configuration of its own."""
    module, function = kernel.split(".")
    held = tuple(constants.items())
    return Variant(
        name, function, dtype, module=module, constants=held, warps=warps, stages=stages, matrix=matrix
    )  # fmt: skip


def _parts(dtype: str, shift: bool, mask: bool) -> Variant:
    """The kernel that prepares an operand."""
    split = shift or dtype == "fp32"
    words = {"parts": split, "copied": not split, "shifted": shift, "masked": mask}
    name = " ".join([dtype, *(word for word, said in words.items() if said)])
    return _plain(
        name, "gram_triton.parts_kernel", dtype, HAS_SHIFT=shift, HAS_MASK=mask, SPLIT=split, BLOCK=1024
    )  # fmt: skip


VARIANTS = (
    *(
        _gram(kernel, module, dtype, add, precise)
        for kernel in ("gram", "cross")
        for module in ("gram_triton", "gram_tma")
        for dtype in ("bf16", "fp16", "fp32")
        for add in (True, False)
        for precise in (False, True)
    ),
    *(
        _gram("gram", "gram_tma", dtype, add, precise, wide=True)
        for dtype in ("bf16", "fp16", "fp32")
        for add in (True, False)
        for precise in (False, True)
    ),
    _plain(
        "packed matmul", "packed_triton.matmul_kernel", matrix=True,
        TILE=128, BLOCK_M=MATMUL_BLOCK, BLOCK_N=MATMUL_COLUMNS, BLOCK_K=MATMUL_ROWS,
    ),
    _plain("packed gather", "packed_triton.gather_kernel", TILE=128, BLOCK=PACKED_BLOCK),
    _plain("packed scatter", "packed_triton.scatter_kernel", TILE=128, BLOCK=SCATTER_BLOCK),
    _plain("split reduction", "gram_triton.reduce_kernel", BLOCK=1024),
    *(
        _parts(dtype, shift, mask)
        for dtype in ("bf16", "fp16", "fp32")
        for shift in (False, True)
        for mask in (False, True)
    ),
    *(
        _plain(f"small factor {k}", "ridge_triton.factor_kernel", stages=1, BLOCK_K=k, BLOCK_P=SMALL_ROWS)
        for k in (16, 32, 64, 128)
    ),
    *(
        _plain(f"small solve {k}", "ridge_triton.solve_kernel", stages=1, BLOCK_K=k, BLOCK_M=SMALL_COLUMNS)
        for k in (16, 32, 64, 128)
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Specialisation:
    """What identifies one compiled kernel: argument types, constants, which arguments are multiples of 16."""

    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]


def kernel_of(variant: Variant):
    """The jitted function."""
    return getattr(importlib.import_module(f".{variant.module}", __package__), variant.kernel)


def specialise(variant: Variant, backend: str, config: GramConfig) -> Specialisation:
    """How a launch specialises a variant for "cuda" or "hip"."""
    kernel = kernel_of(variant)
    constants = _gram_constants(variant, config) if variant.constants is None else dict(variant.constants)
    constants["PRECISION"] = MATMUL_PRECISION[backend]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, []
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in DESCRIPTORS:
            signature[name] = f"tensordesc<{variant.dtype}[{config.block_k}, {getattr(config, DESCRIPTORS[name])}]>"
        elif name.endswith("_ptr"):
            signature[name] = "*" + _pointed(name, variant, constants)
        else:
            signature[name] = parameter.annotation_type or "i32"
        if name not in constants and name not in DESCRIPTORS and not parameter.do_not_specialize:
            aligned.append(name)
    return Specialisation(signature, constants, tuple(aligned))


def _pointed(name: str, variant: Variant, constants: dict[str, object]) -> str:
    """The element type of a pointer argument; what parts_kernel writes is bf16 where it splits, else as it was."""
    if name in ("high_ptr", "low_ptr"):
        return "bf16" if constants["SPLIT"] else variant.dtype
    if name == "shift_ptr" and not constants["HAS_SHIFT"]:
        return variant.dtype
    return variant.dtype if name in INPUT_POINTERS else POINTERS.get(name, "fp32")


def _gram_constants(variant: Variant, config: GramConfig) -> dict[str, object]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "SPAN": config.span, "PHASES": variant.phases,
        "EVERY": config.every(variant.precise), "ADD": variant.add, "EPILOGUE": config.epilogue, "UPCAST": False,
        "TILE": config.tile, "BLOCK_N": config.tile, "STEP": config.step,
    }  # fmt: skip
