"""Regional gradients and regional optimisation of one block; Wanda++ (Yang et al., 2025).

A block is given as a callable of its parameters and an input; nothing here knows a model. Shapes: B windows, L tokens,
D hidden size, O outputs and H inputs of a consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Forward = Callable[[Parameters, Tensor], Tensor]


@dataclass
class Trained:
    """Parameters after training, and the mean squared error to the dense block before and after."""

    parameters: Parameters
    loss_before: float
    loss_after: float


def gradient_squares(
    forward: Forward, parameters: Parameters, names: Sequence[str], states: Iterable[Tensor]
) -> Parameters:
    """Σ over windows of (∂‖f(X)‖₂/∂w)² for each named weight, float32, in the weight's shape.

    states: chunks [B, L, D]; every window is a sample of its own. The norm is over all of a window's output and is not
    divided by its size. Weights that do not reach the output get 0.
    """
    leaves = {name: parameters[name].detach().float().requires_grad_() for name in names}
    used = {name: tensor.detach().float() for name, tensor in parameters.items()} | leaves
    squares = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
    for x_BLD in states:
        for x_1LD in x_BLD.split(1):
            with torch.enable_grad():
                norm = forward(used, x_1LD).float().norm()
                found = torch.autograd.grad(norm, list(leaves.values()), allow_unused=True)
            for total, gradient in zip(squares.values(), found, strict=True):
                if gradient is not None:
                    total += gradient.square()
    return squares


def optimise(
    forward: Forward,
    parameters: Parameters,
    names: Sequence[str],
    fixed: dict[str, Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    passes: int,
    learning_rate: float,
) -> Trained:
    """Adam on the mean squared error of the block's output to the targets, one window a step.

    parameters: all of the block's; names: those that are trained, in float32; fixed: name -> bool mask of entries that
    must stay as they are (removed channels). inputs and targets: windows [1, L, D]. `parameters` of the result: the
    trained ones.
    """
    used = {name: tensor.detach().float() for name, tensor in parameters.items()}
    leaves = {name: used[name].clone().requires_grad_() for name in names}
    adam = torch.optim.Adam(leaves.values(), lr=learning_rate)
    before = mean_error(forward, used, inputs, targets)
    used |= leaves
    for _ in range(passes):
        for x_1LD, y_1LD in zip(inputs, targets, strict=True):
            adam.zero_grad(set_to_none=True)
            with torch.enable_grad():
                torch.nn.functional.mse_loss(forward(used, x_1LD), y_1LD.float()).backward()
            for name, mask in fixed.items():
                if leaves[name].grad is not None:
                    leaves[name].grad.masked_fill_(mask, 0.0)
            adam.step()
    trained = {name: leaf.detach() for name, leaf in leaves.items()}
    return Trained(trained, before, mean_error(forward, used | trained, inputs, targets))


@torch.no_grad()
def mean_error(forward: Forward, parameters: Parameters, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Mean squared error of the block's output over all windows, in float64."""
    errors = [
        (forward(parameters, x_1LD).double() - y_1LD.double()).square().mean().item()
        for x_1LD, y_1LD in zip(inputs, targets, strict=True)
    ]
    return sum(errors) / max(len(errors), 1)
