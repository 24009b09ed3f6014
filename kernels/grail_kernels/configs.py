"""Launch configurations of the Triton kernels: the only ones that run, each compiled ahead of time in CI (aot.py).

Sources: DESIGN section 5, `python -m grail_kernels.aot`, and for sm_90 timings on an H100 (kernels/README.md). A
configuration is spill-free (or says how far not), keeps its loads 16 bytes wide and its products on the matrix units of
its target.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GramConfig:
    """One tile of the output is block_m x tile, block_k rows at a time; `span` panels run side by side; the tile is
    added to memory in `epilogue` column pieces. `spills`: so many accesses to registers in local memory are known of
    and were measured to be worth it; they are of the second accumulator, which is touched once in `every` steps."""

    tile: int
    block_m: int
    block_k: int
    span: int
    warps: int
    stages: int
    epilogue: int
    spills: int = 0

    def __post_init__(self) -> None:
        if UNROUNDED_PRECISE % self.block_k:
            raise ValueError(f"block_k {self.block_k} does not divide {UNROUNDED_PRECISE}")

    @property
    def step(self) -> int:
        """Row blocks that a band of `span` panels adds (see gram_triton.decode_program)."""
        return self.span * self.tile // self.block_m

    def every(self, precise: bool) -> int:
        """Steps after which the matrix units' accumulator is emptied."""
        return (UNROUNDED_PRECISE if precise else UNROUNDED) // self.block_k


UNROUNDED, UNROUNDED_PRECISE = 512, 128
"""Products of 16-bit numbers that are summed without rounding to nearest: on an H100 the sum is then short by up to
7e-7 of itself, or 2e-7 (`precise`)."""
INTERPRETER = "interpreter"
GRAM = {
    "sm_80": GramConfig(tile=128, block_m=128, block_k=64, span=8, warps=8, stages=3, epilogue=2),
    "sm_89": GramConfig(tile=128, block_m=128, block_k=64, span=8, warps=8, stages=2, epilogue=2),
    "sm_90": GramConfig(tile=128, block_m=128, block_k=64, span=8, warps=8, stages=4, epilogue=1),
    "sm_100": GramConfig(tile=128, block_m=128, block_k=64, span=8, warps=8, stages=3, epilogue=4),
    "gfx942": GramConfig(tile=128, block_m=128, block_k=64, span=8, warps=8, stages=2, epilogue=1),
    INTERPRETER: GramConfig(tile=32, block_m=64, block_k=64, span=4, warps=1, stages=1, epilogue=2),
}
"""For the pointer kernels, Gram and cross moment."""
TMA = {
    "sm_90": GramConfig(tile=128, block_m=128, block_k=64, span=8, warps=8, stages=4, epilogue=1),
    "sm_100": GramConfig(tile=128, block_m=128, block_k=64, span=8, warps=8, stages=4, epilogue=4),
    INTERPRETER: GRAM[INTERPRETER],
}
"""For the tensor-descriptor kernels (gram_tma.py)."""
TMA_WIDE = {
    "sm_90": GramConfig(tile=128, block_m=256, block_k=64, span=8, warps=16, stages=3, epilogue=4, spills=48),
}
"""For Gram matrices from WIDE columns on, where there is one: on an H100 a tenth faster at 11008, slower at 4096."""
WIDE = 8192
MEASURED_TMA = ("sm_90",)
"""Where the tensor-descriptor kernels were measured, and won at 11008 columns (kernels/README.md)."""

PACKED_BLOCK, SCATTER_BLOCK = 64, 32
MATMUL_BLOCK, MATMUL_COLUMNS, MATMUL_ROWS = 64, 32, 32
SMALL_COLUMNS, SMALL_ROWS = 8, 16
MATMUL_PRECISION = {"cuda": "tf32x3", "hip": "ieee"}
"""How float32 is multiplied on the matrix units; three passes of tf32 are good to 1e-6."""


def tma_config(target: str, width: int | None = None) -> GramConfig:
    """That of the tensor-descriptor kernels on a target: for a Gram matrix of so many columns, or a cross moment."""
    wide = TMA_WIDE.get(target) if width is not None and width >= WIDE else None
    return wide or TMA[target]


def target_of(capability: tuple[int, int] | None, hip_arch: str | None = None) -> str:
    """The configuration name for a CUDA compute capability or a HIP architecture.

    Raises RuntimeError for a device that no configuration was checked for.
    """
    if hip_arch is not None:
        name = hip_arch.split(":")[0]
        if name not in GRAM:
            raise RuntimeError(f"no checked configuration for {name}")
        return name
    major, minor = capability
    if major == 10:
        return "sm_100"
    if major == 9:
        return "sm_90"
    if (major, minor) == (8, 0):
        return "sm_80"
    if major in (8, 12):
        return "sm_89"
    raise RuntimeError(f"no checked configuration for compute capability {major}.{minor}")
