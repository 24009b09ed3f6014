"""Tensors and arrays that are given in Python as data: those that can be read, in this machine's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import GrailError, first_line


def readable(data: Any, what: str) -> Tensor:
    """A tensor of it, without its graph. Raises GrailError, which begins with `what`, for one that holds no plain
    numbers: without data, sparse, of eight-bit floats, or of objects."""
    if isinstance(data, np.ndarray):
        # torch takes neither the other order of bytes nor strides that go backwards
        data = np.ascontiguousarray(data, None if data.dtype.isnative else data.dtype.newbyteorder("="))
    try:
        tensor = torch.as_tensor(data).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise GrailError(f"{what}: no numbers that torch can read ({first_line(error)})") from error
    if tensor.is_meta:
        raise GrailError(f"{what}: a tensor on the meta device holds no data; give one with data")
    if tensor.is_nested:
        raise GrailError(f"{what}: a nested tensor is not read; give tensors of one shape, or a list of them")
    if tensor.layout != torch.strided:
        raise GrailError(f"{what}: a sparse tensor is not read; give tensor.to_dense()")
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        raise GrailError(f"{what}: numbers of {tensor.dtype} are not read; give them as float32")
    return tensor
