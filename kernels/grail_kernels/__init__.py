"""grail_kernels: streaming Gram matrices and ridge solves, in pure torch; no transformers, no GPU needed.

Every import inside this package is relative, so that the folder also loads by path (DESIGN section 4).
"""

from .cholesky import MatrixRows
from .cross import CrossAccumulator
from .dispatch import Backend, backend
from .gram import GramAccumulator
from .gram_torch import cross_reference, gram_reference
from .packed import PackedSymmetric
from .ridge import RidgeError, RidgeSolution, ridge_reference, ridge_solve, ridge_solve_

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "CrossAccumulator",
    "GramAccumulator",
    "MatrixRows",
    "PackedSymmetric",
    "RidgeError",
    "RidgeSolution",
    "backend",
    "cross_reference",
    "gram_reference",
    "ridge_reference",
    "ridge_solve",
    "ridge_solve_",
]
