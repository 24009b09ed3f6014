"""--target stream for networks in memory: the formula held against float64 least squares, choices, refusals, families.

Reference values come from activations of plain float64 copies; nothing of grail's math is used for them.
Shapes: T rows, X inputs of an output, O outputs.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import grail
from benchmarks.clip_digits import tiny_clip
from grail.errors import GrailError
from grail.families import describe
from grail.families.network import ModuleSite, check
from grail.modules import stream_target
from grail.modules.addition import scale_of, unproven
from grail.modules.recipe import ModuleRecipe
from tests import tiny_hf
from tests.test_clip import compress as compress_clip
from tests.test_clip import similarity
from tests.test_vision_families import (
    KINDS,
    built,
    compress,
    fewer_heads,
    images,
    kinds,
    output,
    randomised,
    relative,
    same_bits,
    small_vit,
    timm_resnet_of,
)

FIXED = {"target": "stream", "ridge": 1e-6, "alpha": 1.0}
REPAIRS = [{"method": "wanda"}, {"method": "fold"}, {"method": "fold", "bias": True}]


class Residual(nn.Module):
    """Tokens [N, T, D]: two MLPs, each added to the stream, the second scaled."""

    def __init__(self, dim: int = 8, width: int = 24, scaled: bool = True, bias: bool = True):
        super().__init__()
        self.norm1, self.up1, self.down1 = nn.LayerNorm(dim), nn.Linear(dim, width), nn.Linear(width, dim, bias=bias)
        self.norm2, self.up2, self.down2 = nn.LayerNorm(dim), nn.Linear(dim, width), nn.Linear(width, dim, bias=bias)
        self.scale = LayerScale(dim) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down1(F.gelu(self.up1(self.norm1(x))))
        return x + self.scale(self.down2(F.gelu(self.up2(self.norm2(x)))))

    def sites(self) -> list[ModuleSite]:
        return [
            grail.channels("up1", "down1", width=24, stream=("norm1", "input")),
            grail.channels("up2", "down2", width=24, stream=("norm2", "input"), scales=["scale"]),
        ]


class Maps(nn.Module):
    """A site that damages the stream, then conv -> BatchNorm added to a strided shortcut."""

    def __init__(self, kernel: int = 3, stride: int = 2):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1)
        self.conv1, self.bn1 = nn.Conv2d(6, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 6, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Conv2d(6, 6, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))

    def sites(self) -> list[ModuleSite]:
        added = {"stream": ("shortcut", "output"), "scales": ["bn2"]}
        return [
            grail.channels("first", "second", width=12),
            grail.channels("conv1", "conv2", width=10, norms=["bn1"], **added),
        ]


class Means(nn.Module):
    """One kept channel, low + chequered, and one chequered that is to be removed; conv2 takes means over 3 x 3."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False)
        with torch.no_grad():
            self.conv1.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.1]])[:, :, None, None])
            self.conv2.weight.copy_(torch.tensor([[0.1, 1.0], [0.1, 1.0]])[:, :, None, None].expand(2, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))

    def sites(self) -> list[ModuleSite]:
        return [grail.channels("conv1", "conv2", width=2, stream=("conv1", "input"))]

    @staticmethod
    def images(count: int = 32) -> Tensor:
        random = torch.Generator().manual_seed(0)
        low = F.interpolate(torch.randn(count, 1, 3, 3, generator=random), size=16, mode="bilinear")
        signs = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
        return torch.cat([low, signs * torch.randn(count, 1, 1, 1, generator=random)], 1)


def tokens(count: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(count, 6, 8, generator=torch.Generator().manual_seed(seed))


def seen(module: nn.Module, x: Tensor, *places: tuple[str, str]) -> list[Tensor]:
    """Inputs or outputs of modules in a float64 copy."""
    other, found = copy.deepcopy(module).double(), {}
    for name, side in places:
        layer = other.get_submodule(name)
        if side == "input":
            layer.register_forward_pre_hook(lambda _, a, key=(name, side): found.setdefault(key, a[0].clone()))
        else:
            layer.register_forward_hook(lambda _, __, out, key=(name, side): found.setdefault(key, out.clone()))
    with torch.no_grad():
        other(x.double())
    return [found[place] for place in places]


def fitted(z_TX: Tensor, target_TO: Tensor, affine: bool) -> tuple[Tensor, Tensor]:
    """(W [O, X], b [O]) of least squares."""
    ones = z_TX.new_ones(len(z_TX), 1) if affine else z_TX[:, :0]
    solution = torch.linalg.lstsq(torch.cat([z_TX, ones], 1), target_TO, driver="gelsd").solution
    width = z_TX.shape[1]
    return solution[:width].T, solution[width:].sum(0)


def alphas(report) -> list[float | None]:
    return [site["alpha"] for site in report.sites]


class TestFormula:
    @pytest.mark.parametrize("method", ["wanda", "fold"])
    @pytest.mark.parametrize("affine", [False, True], ids=["weights", "bias"])
    def test_a_linear_consumer_behind_a_scale_against_least_squares(self, method, affine):
        """With α = 1 and next to no ridge: W' z ≈ y_d + (r_d − r_c) / a, over all rows."""
        module, x = randomised(Residual()), tokens()
        flags = {"method": method, "ratio": 0.5, "sites": module.sites(), "bias": affine, **FIXED}
        report = grail.compress(module, calibration=x, **flags)
        made, before = seen(module, x, ("down2", "output"), ("norm2", "input"))
        z, before_c = seen(report.model, x, ("down2", "input"), ("norm2", "input"))
        bias = 0 if affine else module.down2.bias.double()
        target = made + (before - before_c) / module.scale.gamma.double() - bias
        weight, added = fitted(z.flatten(0, 1), target.flatten(0, 1), affine)
        assert relative(report.model.down2.weight.double(), weight) < 1e-3
        assert relative(report.model.down2.bias.double(), added + bias) < 1e-3
        assert relative(report.model.down2.weight.double(), grail_own(module, x, flags).down2.weight.double()) > 1e-2

    @pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 2)])
    def test_a_convolution_behind_a_batchnorm_against_least_squares(self, kernel, stride):
        """With α = 1 and next to no ridge, of what the dense network makes there; with less of both, α of the way."""
        module, x = randomised(Maps(kernel, stride)), images(24, 8)
        flags = {"method": "wanda", "ratio": 0.5, "sites": module.sites(), **FIXED}
        report = grail.compress(module, calibration=x, **flags)
        half = grail.compress(module, calibration=x, **flags | {"alpha": 0.5})
        nothing = grail.compress(module, calibration=x, **flags | {"alpha": 0.0})
        made, before = seen(module, x, ("conv2", "output"), ("shortcut", "output"))
        z, before_c = seen(report.model, x, ("conv2", "input"), ("shortcut", "output"))
        bn = module.bn2
        scale = (bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt())[:, None, None]
        with torch.no_grad():
            own = dense_from_here(module, report.model, x)
        difference = made - own + (before - before_c) / scale
        z_TX = F.unfold(z, kernel, 1, kernel // 2, stride).mT.flatten(0, 1)
        weight, _ = fitted(z_TX, (own + difference).flatten(2).mT.flatten(0, 1), affine=False)
        assert relative(report.model.conv2.weight.double().flatten(1), weight) < 1e-3
        middle = (report.model.conv2.weight + nothing.model.conv2.weight) / 2
        assert relative(half.model.conv2.weight, middle) < 1e-5

    @pytest.mark.parametrize("flags", [{}, FIXED, FIXED | {"bias": True}], ids=["auto", "fixed", "bias"])
    def test_taps_that_go_together_are_no_harm(self, flags):
        """The removed channel is a chequerboard, of which a mean over taps sees next to nothing: to add what of it can
        be said by the kept one, pixel by pixel, makes that mean much worse than to leave it out."""
        module, x = Means().eval(), Means.images()
        given = {"method": "mag-l2", "ratio": 0.5, "sites": module.sites(), "calibration": x, "target": "stream"}
        (site,) = grail.compress(module, **given | flags).sites
        (plain,) = grail.compress(module, **given | {"alpha": 0.0, "ridge": 1e-6}).sites
        assert plain["error_after"] > 2 * plain["error_before"]
        assert site["alpha"] > 0.9 and site["error_after"] < 0.5 * site["error_before"]

    def test_equal_streams_give_the_plain_repair(self):
        """Nothing was removed before the first site."""
        module, x = randomised(Residual()), tokens()
        flags = {"method": "wanda", "ratio": 0.5, "sites": module.sites()[:1], "ridge": 1e-3}
        own, stream = (grail.compress(module, calibration=x, target=t, **flags) for t in ("own", "stream"))
        assert alphas(stream) == [0.0]
        fixed = grail.compress(module, calibration=x, target="stream", alpha=1.0, **flags)
        assert same_bits(fixed.model, own.model)

    @kinds("cifar", "vit", "dinov2")
    @pytest.mark.parametrize("flags", REPAIRS, ids=str)
    def test_alpha_0_is_own(self, kind, flags):
        module, x = built(kind), images(12)
        flags = flags | {"ratio": 0.5, "ridge": 1e-3}
        own, stream = (compress(module, x, **flags, **t) for t in ({"target": "own"}, {"target": "stream", "alpha": 0}))
        assert same_bits(stream.model, own.model)
        assert {alpha for alpha in alphas(stream) if alpha is not None} == {0.0}

    @kinds("timm-bottleneck", "torchvision-bottleneck")
    @pytest.mark.parametrize("flags", REPAIRS, ids=str)
    def test_a_site_without_a_known_stream_is_repaired_towards_the_dense_hidden_vectors(self, kind, flags):
        """The first convolution's in a Bottleneck: up to there, dense and stream are one run."""
        module, x = built(kind), images(12)
        flags = flags | {"ratio": 0.5, "ridge": 1e-3}
        dense, stream = (
            compress(module, x, **flags, **t) for t in ({"target": "dense"}, {"target": "stream", "alpha": 0.5})
        )
        first = stream.results[0].site
        assert first.stream is None and alphas(stream)[0] is None and alphas(stream)[1] is not None
        for name in (*(producer.name for producer in first.producers), first.consumer):
            layers = [report.model.get_submodule(name) for report in (dense, stream)]
            states = [layer.state_dict() for layer in layers]
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
        told = [
            {key: site[key] for key in ("error_before", "error_after")} for site in (dense.sites[0], stream.sites[0])
        ]
        assert told[0] == told[1]

    def test_a_channel_with_next_to_no_scale_takes_no_part(self):
        module, x = randomised(Residual()), tokens()
        with torch.no_grad():
            module.scale.gamma[3] = 1e-6
        flags = {"method": "wanda", "ratio": 0.5, "sites": module.sites()}
        found = grail.compress(module, calibration=x, **flags | FIXED).model.down2.weight
        own = grail.compress(module, calibration=x, **flags | FIXED | {"alpha": 0.0}).model.down2.weight
        assert torch.equal(found[3], own[3]) and not torch.allclose(found[2], own[2], rtol=1e-3)

    def test_pieces_of_a_batch_change_nothing(self, monkeypatch):
        module, x = built("cifar"), images(16)
        flags = {"method": "wanda", "ratio": 0.5, "target": "stream"}
        whole = compress(module, x, **flags)
        monkeypatch.setattr(stream_target, "PIECE", 1)
        assert relative(output(compress(module, x, **flags).model, x), output(whole.model, x)) < 1e-4


def grail_own(module: nn.Module, x: Tensor, flags: dict) -> nn.Module:
    return grail.compress(module, calibration=x, **flags | {"target": "own", "alpha": "auto"}).model


def dense_from_here(module: nn.Module, compressed: nn.Module, x: Tensor) -> Tensor:
    """What the dense conv2 makes of the compressed network's stream, float64."""
    (stream,) = seen(compressed, x, ("conv1", "input"))
    other = copy.deepcopy(module).double()
    return other.conv2(torch.relu(other.bn1(other.conv1(stream))))


class TestChoice:
    def test_trial_inputs_enter_no_moment(self, monkeypatch):
        """With α and the only ridge given, other trial images change no weight; other calibration images do."""
        module, x = built("cifar"), images(32)
        flags = {"method": "wanda", "ratio": 0.5, "target": "stream", "alpha": 0.5}
        chosen = torch.randperm(32, generator=torch.Generator().manual_seed(0))[-4:]
        monkeypatch.setattr(stream_target, "RIDGES", (1e-2,))
        found = []
        for changed in (None, chosen, torch.tensor([next(i for i in range(32) if i not in chosen)])):
            given = x.clone()
            if changed is not None:
                given[changed] = images(len(changed), seed=7)
            found.append(compress(module, given, **flags))
        assert same_bits(found[0].model, found[1].model) and not same_bits(found[0].model, found[2].model)
        errors = [[site["held_out_errors"] for site in report.sites] for report in found]
        assert errors[0] != errors[1]

    @fewer_heads
    @pytest.mark.parametrize(
        ("flags", "count"),
        [
            ({"target": "stream"}, 4),
            ({"target": "stream", "alpha": 0.5}, 4),
            ({"target": "stream", "alpha": 0.5, "ridge": 1e-3}, 0),
            ({"target": "stream", "compensate": False}, 0),
            ({"compensate": False}, 0),
            ({"target": "dense"}, 0),
            ({"one_shot": True}, 0),
            ({}, 4),
        ],
        ids=str,
    )
    def test_what_is_reported(self, flags, count):
        report = compress(built("vit"), images(32), method="wanda", ratio=0.5, **flags)
        told = json.loads(json.dumps(report.to_json()))
        assert (told["calibration"]["images"], told["calibration"]["trial_windows"]) == (32 - count, count)
        streams = flags.get("target", "stream") == "stream" and not {"compensate", "one_shot"} & flags.keys()
        assert all((site["alpha"] is not None) == streams for site in told["sites"])
        assert all((site["held_out_errors"] is not None) == (count > 0) for site in told["sites"])
        for site in told["sites"] if count else ():
            before, after = site["held_out_errors"]
            assert 0 <= site["alpha"] <= 1 and (flags.get("alpha") or after <= before)

    def test_many_images_give_64_at_most(self):
        counts = [ModuleRecipe(model=None, target="stream", samples=n).trial_windows for n in (8, 128, 10_000)]
        assert counts == [2, 16, 64]

    @fewer_heads
    def test_the_same_run_gives_the_same_bits(self):
        module, x = built("vit"), images(24)
        first, second = (compress(module, x, ratio=0.5, method="gram", target="stream") for _ in range(2))
        assert same_bits(first.model, second.model) and first.sites == second.sites


class TestDescriptions:
    @kinds(*KINDS)
    def test_families_name_the_additions_that_happen(self, kind):
        (network,) = describe(built(kind))
        check(network)
        last = {network.block_of(site.consumer): site for site in network.sites}.values()
        named = [site for site in network.sites if site.stream is not None]
        assert named == (network.sites if KINDS[kind].transformer else list(last))
        assert not unproven(network, named, images(3, KINDS[kind].size))
        scaled = kind in ("dinov2", "swiglu", "swiglu-packed") or (not KINDS[kind].transformer and "preact" not in kind)
        assert all(bool(site.scales) == scaled for site in named)

    @pytest.mark.parametrize("kind", ["vit", "dinov2-swiglu", "clip", "clip-text"])
    def test_of_transformers_too(self, kind):
        for network in describe(tiny_hf.KINDS[kind].build()):
            assert all(site.stream for site in network.sites)
            assert not unproven(network, network.sites, tiny_hf.inputs_of(network, 3))

    def test_the_scale_of_a_batchnorm(self):
        (network,) = describe(built("cifar"))
        site, norm = network.sites[0], network.module.layer1[0].bn2
        x = torch.randn(2, 8, 3, 3)
        scale, shift = (part[:, None, None] for part in scale_of(network, site, x))
        assert relative(scale * x + shift, norm(x)) < 1e-5

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                {"stream": ("norm1", "input")},
                "up2: what down2 makes, scaled by scale, is not added to the input of norm1",
            ),
            ({"scales": ()}, "up2: what down2 makes is not added"),
            ({"scales": ("norm2",)}, "up2: .*is not added"),
            ({"stream": ("norm3", "input")}, "no module norm3"),
            ({"stream": ("norm2", "middle")}, "input or output"),
        ],
        ids=str,
    )
    def test_a_wrong_one_is_refused(self, change, said):
        module = randomised(Residual())
        names = {"width": 24, "stream": ("norm2", "input"), "scales": ("scale",)} | change
        with pytest.raises(GrailError, match=said):
            grail.compress(
                module, calibration=tokens(), ratio=0.5, method="wanda", target="stream",
                sites=[grail.channels("up2", "down2", **names)],
            )  # fmt: skip

    def test_it_survives_json(self):
        (network,) = describe(built("cifar"))
        for site in network.sites:
            assert ModuleSite.from_json(json.loads(json.dumps(site.to_json()))) == site
        old = {key: value for key, value in network.sites[0].to_json().items() if key not in ("stream", "scales")}
        assert ModuleSite.from_json(json.loads(json.dumps(old))).stream is None

    @fewer_heads
    def test_post_norm_blocks_and_squeeze_and_excitation_name_none(self):
        post, squeezed = small_vit(block_fn=ResPostBlock), timm_resnet_of(BasicBlock, (1, 1, 1, 1))
        squeezed.layer1[0].se = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())
        assert not any(site.stream for site in describe(post.eval())[0].sites)
        assert [site.stream is None for site in describe(squeezed.eval())[0].sites] == [True, False, False, False]


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ({"one_shot": True}, "--one-shot"),
            ({"residual_ratio": 0.25}, "--residual-ratio"),
            ({"alpha": 2.0}, "--alpha must be"),
            ({"alpha": "much"}, "--alpha must be"),
            ({"ridge": "much"}, "--ridge must be"),
            ({"target": "own", "ridge": "auto"}, "--ridge must be"),
            ({"target": "own", "alpha": 0.5}, "--alpha is for --target stream"),
            ({"target": "hidden"}, "choose one of stream, dense, own"),
        ],
        ids=str,
    )
    def test_options_that_do_not_go_together(self, flags, said):
        with pytest.raises(GrailError, match=said):
            compress(built("cifar"), images(12), method="wanda", ratio=0.5, **{"target": "stream"} | flags)

    def test_too_few_images(self):
        with pytest.raises(GrailError, match="holds 3 inputs, and --target stream needs at least 4"):
            compress(built("cifar"), images(3), method="wanda", ratio=0.5, target="stream")
        compress(built("cifar"), images(3), method="wanda", ratio=0.5, target="stream", alpha=0.5, ridge=1e-3)

    def test_no_stream_at_all(self):
        sites = [grail.channels("conv1", "conv2", width=10, norms=["bn1"])]
        with pytest.raises(GrailError, match=r"conv1, \.\.\."):
            grail.compress(
                randomised(Maps()), calibration=images(8, 8), ratio=0.5, method="wanda", target="stream", sites=sites
            )


class TestNetworks:
    @pytest.mark.parametrize("method", ["wanda", "fold", "gram", "slimgpt"])
    @kinds("vit", "dinov2", "cifar", "torchvision-bottleneck")
    def test_end_to_end(self, kind, method):
        """Nearer to the dense network than pruning or folding alone, on images that were not seen; what has no stream
        says so."""
        module, x, other = built(kind), images(32), images(16, seed=9)
        flags = {"method": method, "ratio": 0.5}
        pruned = compress(module, x, compensate=False, **flags)
        stream = compress(module, x, target="stream", **flags)
        errors = [relative(output(found.model, other), output(module, other)) for found in (stream, pruned)]
        assert errors[0] < errors[1]
        named = [site.stream is not None for site in describe(copy.deepcopy(module))[0].sites]
        assert [alpha is not None for alpha in alphas(stream)] == named
        assert any(alpha for alpha in alphas(stream) if alpha is not None)

    def test_both_towers_of_a_clip(self):
        module = tiny_clip()
        own, stream = (compress_clip(module, ratio=0.5, target=target) for target in ("own", "stream"))
        assert all(alpha is not None for alpha in alphas(stream)) and any(alphas(stream))
        told = stream.to_json()
        assert (told["calibration"]["images"], told["calibration"]["trial_windows"]) == (56, 8)
        assert (told["calibration_text"]["captions"], told["calibration_text"]["trial_windows"]) == (27, 3)
        dense = similarity(module)
        assert relative(similarity(stream.model), dense) < 1.1 * relative(similarity(own.model), dense)

    def test_transformers_clip(self):
        module = tiny_hf.KINDS["clip"].build()
        report = tiny_hf.compress(module, 24, method="wanda", ratio=0.5, target="stream")
        assert all(alpha is not None for alpha in alphas(report))

    @fewer_heads
    def test_in_half_precision(self):
        module = built("vit").to(torch.bfloat16)
        report = compress(module, images(16), method="wanda", ratio=0.5, target="stream")
        assert report.model.blocks[0].mlp.fc2.weight.dtype == torch.bfloat16
        assert output(report.model, images(2).bfloat16()).isfinite().all()
