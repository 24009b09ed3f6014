"""Networks in memory whose Gram matrices are hard, with every method: the narrower network answers with numbers, its
errors are not worse than without the repair, or a sentence names the place."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.modules.compress import refuse_decoder_methods
from grail.moments import dot
from grail.selectors import methods
from tests.faults.numeric_cases import SLACK
from tests.faults.tally import count
from tests.faults.test_numerics import FAULTS
from tests.test_vision_families import cifar_resnet, randomised, small_vit
from tests.test_vision_stream import Maps, Residual

FLAGS = {
    "ratio": (0.3, 0.6, 0.97),
    "ridge": (0.0, 1e-12, 1e-3, 10.0),
    "ridge_form": ("anchored", "anchored", "paper"),
    "bias": (None, True, False),
    "target": ("dense", "own", "stream"),
}
STORED = (None, None, torch.bfloat16, torch.float16, torch.float64)
WIDENED = ("up", "fc1", "conv1", "qkv", "first")
"""In the names of layers that make hidden vectors."""


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit": lambda: (randomised(small_vit()), noise(6, 3, 32, 32)),
    "resnet": lambda: (randomised(cifar_resnet()), noise(6, 3, 32, 32)),
    "residual": lambda: (seeded(Residual), noise(40, 5, 8)),
    "maps": lambda: (seeded(Maps), noise(8, 3, 8, 8)),
}


def dead(weight: Tensor, bias: Tensor | None) -> None:
    weight[::3] = 0
    if bias is not None:
        bias[::3] = -5


def constant(weight: Tensor, bias: Tensor | None) -> None:
    weight[1:4] = 0
    if bias is not None:
        bias[1:4] = 2


def duplicates(weight: Tensor, bias: Tensor | None) -> None:
    half = len(weight) // 2
    weight[half : 2 * half] = weight[:half]
    if bias is not None:
        bias[half : 2 * half] = bias[:half]


def all_dead(weight: Tensor, bias: Tensor | None) -> None:
    weight.zero_()
    if bias is not None:
        bias.zero_()


def times(factor: float, rows: slice = slice(None)) -> Callable[[Tensor, Tensor | None], None]:
    def change(weight: Tensor, bias: Tensor | None) -> None:
        weight[rows] *= factor

    return change


EDITS = {
    "dead": dead,
    "all-dead": all_dead,
    "constant": constant,
    "duplicates": duplicates,
    "massive": times(1e4, slice(2, 3)),
    "massive-1e8": times(1e8, slice(2, 3)),
    "huge": times(1e15),
    "tiny": times(1e-15),
}


def edited(kind: str, edit: str) -> tuple[nn.Module, Tensor]:
    module, inputs = NETWORKS[kind]()
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and any(word in name for word in WIDENED):
            EDITS[edit](layer.weight.data, None if layer.bias is None else layer.bias.data)
    return module, inputs


def judged(module: nn.Module, inputs: Tensor, **flags) -> None:
    """Compress, and look at all there is."""
    own = {"sites": module.sites()} if hasattr(module, "sites") else {}
    try:
        report = grail.compress(module, calibration=inputs, **own, **flags)
    except grail.GrailError as error:
        assert "\n" not in str(error)
        count("numerics", "refused")
        return
    json.dumps(report.to_json() | {"recipe": None}, allow_nan=False)
    assert all(torch.isfinite(t).all() for t in report.model.state_dict().values())
    for site in report.sites:
        figures = [site[key] for key in ("lambda", "error_before", "error_after")] + (site["held_out_errors"] or [])
        assert all(math.isfinite(f) and f >= 0 for f in figures if f is not None), site
        if site["error_after"] is not None and flags["ridge_form"] == "anchored" and flags["target"] != "stream":
            assert site["error_after"] <= site["error_before"] * (1 + SLACK) + 1e-12, site
    with torch.no_grad():
        assert torch.isfinite(report.model(inputs)).all()
    count("numerics", "finite")


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("edit", EDITS)
def test_every_method_on_hard_weights(kind, edit):
    for method, turn in itertools.product(methods(), range(FAULTS)):
        chance = random.Random(f"{kind} {edit} {method} {turn}")
        module, inputs = edited(kind, edit)
        flags = {name: chance.choice(values) for name, values in FLAGS.items()}
        dtype = chance.choice(STORED)
        inputs = inputs[: chance.choice([1, 1, None])] if flags["target"] != "stream" else inputs
        if flags["target"] == "stream":
            flags["alpha"] = chance.choice(["auto", 1.0])
        if dtype is not None:
            module, inputs = module.to(dtype), inputs.to(dtype)
        judged(module, inputs, method=method, **flags)


def test_a_repaired_weight_that_overflows_is_refused():
    """Found with dead channels in float16: infinity was written."""
    module, inputs = edited("residual", "dead")
    flags = {"method": "mag-sp", "ratio": 0.3, "ridge": 1e-12, "target": "stream", "alpha": 1.0}
    with pytest.raises(grail.GrailError, match=r"up2: what down2 is repaired to overflows torch\.float16"):
        grail.compress(module.half(), calibration=inputs.half(), sites=module.sites(), **flags)


def test_a_bias_that_overflows_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)
            nn.init.constant_(self.up.bias, 6e4)
            nn.init.constant_(self.down.weight, 2.0)
            self.down.weight.data[:, 4:] *= -1

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    flags = {"method": "random", "ratio": 0.6, "bias": True, "compensate": False, "calibration": noise(20, 6).half()}
    with pytest.raises(grail.GrailError, match=r"down.*overflows torch\.float16"):
        grail.compress(Net().half(), sites=[grail.channels("up", "down", width=8)], **flags)


def test_sums_beyond_float32_are_taken_in_float64():
    rows = torch.full((3, 4), 1e20)
    assert dot(rows, rows) == pytest.approx(12e40)


def test_figures_that_are_no_numbers_are_refused():
    """The weights' product with the Gram matrix is beyond float32: no error of 0 is told."""
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    torch.manual_seed(0)
    for layer, scale in ((module[0], 1e13), (module[2], 1e13)):
        nn.init.normal_(layer.weight, std=scale)
    flags = {"calibration": noise(40, 6), "sites": [grail.channels("0", "2", width=16)], "method": "random"}
    with pytest.raises(grail.GrailError, match=r"^0: .*error cannot be computed"):
        grail.compress(module, target="own", ratio=0.3, **flags)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["weight", "sample"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_one_number_is_none(kind, where, value):
    module, inputs = NETWORKS[kind]()
    if where == "sample":
        inputs.view(-1)[5] = value
    else:
        next(p for p in module.parameters() if p.dim() > 1).data.view(-1)[3] = value
    own = {"sites": module.sites()} if hasattr(module, "sites") else {}
    with pytest.raises(grail.GrailError, match=r"NaN|infinit|finite"):
        grail.compress(module, calibration=inputs, **own)
    count("numerics", "refused")


def test_decoder_methods_are_refused_by_name():
    with pytest.raises(grail.GrailError, match="wanda-pp-sp"):
        refuse_decoder_methods(methods()["wanda-pp-sp"]())


def test_the_ridge_of_the_part_towards_the_stream_is_in_the_record():
    """Of a convolution: its equations are those of all taps, so that the same --ridge is another λ."""
    module, inputs = NETWORKS["maps"]()
    flags = {"calibration": inputs, "sites": module.sites(), "target": "stream", "alpha": 1.0, "ridge": 0.01}
    plain, conv = grail.compress(module, **flags).sites
    assert plain["stream_lambda"] is None, "its stream is not known"
    assert conv["stream_lambda"] > 0 and conv["stream_lambda"] != conv["lambda"]
