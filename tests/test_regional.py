"""Regional gradients against finite formulas, and training that really acts and keeps removed channels at zero."""

from __future__ import annotations

import torch

from grail.regional import gradient_squares, mean_error, optimise


def forward(tensors, x):
    return torch.relu(x @ tensors["up"].mT) @ tensors["down"].mT + x


def block(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"up": torch.randn(12, 6, generator=generator), "down": torch.randn(6, 12, generator=generator)}
    return tensors, [torch.randn(2, 5, 6, generator=generator) for _ in range(3)]


def test_gradients_are_squared_and_summed_over_windows_by_hand():
    """‖f‖₂ = sqrt(Σ f²), so ∂‖f‖/∂W = Σ_t f_t h_tᵀ / ‖f‖: no division by the number of elements, no 1e-8 floor."""
    tensors, states = block()
    found = gradient_squares(forward, tensors, ["down"], states)["down"]
    squares, count = torch.zeros(6, 12, dtype=torch.float64), 0
    wide = {name: t.double() for name, t in tensors.items()}
    for chunk in states:
        for x in chunk.double():
            h, f = torch.relu(x @ wide["up"].mT), forward(wide, x)
            squares += (f.mT @ h / f.norm()).square()
            count += 1
    assert count == 6
    torch.testing.assert_close(found.double(), squares, rtol=1e-5, atol=1e-6)


def test_chunks_do_not_matter_and_a_zero_block_has_zero_gradient_not_a_floor():
    tensors, states = block()
    one = gradient_squares(forward, tensors, ["down"], states)["down"]
    other = gradient_squares(forward, tensors, ["down"], [torch.cat(states)])["down"]
    torch.testing.assert_close(one, other)
    dead = gradient_squares(forward, tensors | {"up": torch.zeros(12, 6)}, ["down"], states)["down"]
    assert torch.equal(dead, torch.zeros(6, 12))


def test_training_lowers_the_error_and_leaves_fixed_entries_alone():
    tensors, states = block()
    windows = [x for chunk in states for x in chunk.split(1)]
    targets = [forward(tensors, x) for x in windows]
    pruned = tensors | {"down": tensors["down"].clone()}
    pruned["down"][:, 8:] = 0
    fixed = {"down": torch.zeros(6, 12, dtype=torch.bool)}
    fixed["down"][:, 8:] = True
    trained = optimise(forward, pruned, list(pruned), fixed, windows, targets, passes=5, learning_rate=1e-2)
    assert trained.loss_after < 0.9 * trained.loss_before
    assert trained.loss_after == mean_error(forward, trained.parameters, windows, targets)
    assert torch.equal(trained.parameters["down"][:, 8:], torch.zeros(6, 4))
    assert not torch.equal(trained.parameters["up"], tensors["up"])
    only = optimise(forward, pruned, ["down"], fixed, windows, targets, passes=1, learning_rate=1e-2)
    assert list(only.parameters) == ["down"] and only.loss_after < only.loss_before


def test_training_matches_adam_written_out_in_float64():
    """12 channels, one window, three steps: Adam (Kingma and Ba, 2015) by hand."""
    tensors, states = block(3)
    x, target = states[0][:1], forward(block(4)[0], states[0][:1])
    found = optimise(forward, tensors, list(tensors), {}, [x], [target], passes=3, learning_rate=1e-3).parameters
    wide = {name: t.double() for name, t in tensors.items()}
    first = {name: torch.zeros_like(t) for name, t in wide.items()}
    second = {name: torch.zeros_like(t) for name, t in wide.items()}
    for step in range(1, 4):
        xd = x.double()
        h = torch.relu(xd @ wide["up"].mT)
        slope = 2 * (forward(wide, xd) - target.double()) / target.numel()
        back = (slope @ wide["down"]) * (h > 0)
        gradients = {
            "down": torch.einsum("blo,blh->oh", slope, h),
            "up": torch.einsum("blh,bld->hd", back, xd),
        }
        for name, g in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g.square()
            ratio = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            wide[name] = wide[name] - 1e-3 * ratio
    for name in wide:
        torch.testing.assert_close(found[name].double(), wide[name], rtol=1e-4, atol=1e-6)
