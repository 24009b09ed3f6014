"""Networks in memory: the math of DESIGN section 1 held against float64, and properties.

Shapes: T rows, H width, K kept, O outputs. Reference values are computed here from activations that plain modules
gave, in float64; nothing of grail's math is used for them.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from grail.reduction import Folding
from tests.test_vision_families import (
    built,
    compress,
    fewer_heads,
    images,
    kinds,
    output,
    randomised,
    relative,
    same_bits,
)

RIDGE = 1e-3
METHODS = ["mag-l1", "mag-l2", "wanda", "gram", "fold", "random"]
SELECTIONS = ["mag-l1", "mag-l2", "wanda", "gram"]


class MLP(nn.Module):
    """[N, 1, 1, D] -> fc1 -> fc2 -> fc3."""

    def __init__(self, inputs: int = 12, width: int = 24, second: int = 20, outputs: int = 6):
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, second)
        self.fc3 = nn.Linear(second, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


class ConvNet(nn.Module):
    """conv1 -> bn1 -> ReLU -> conv2, of any kernel and stride."""

    def __init__(self, kernel: int = 3, stride: int = 1, width: int = 16, bias: bool = False, **norm):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width, **norm)
        self.dropout = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(width, 8, kernel, stride, padding=kernel // 2)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.dropout(torch.relu(self.bn1(self.conv1(x))))))


class Gated(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, width), nn.Linear(12, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Flattened(nn.Module):
    """conv -> ReLU -> flatten -> fc: 4 x 4 inputs of fc for each channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 10, 3, 2, 1), nn.Linear(160, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def mlp_sites(module: MLP) -> list:
    return [
        grail.channels("fc1", "fc2", width=module.fc1.out_features),
        grail.channels("fc2", "fc3", width=module.fc2.out_features),
    ]


def conv_sites(module: nn.Module) -> list:
    return [grail.channels("conv1", "conv2", width=module.conv1.out_channels, norms=["bn1"])]


def rows(count: int = 64, width: int = 12, seed: int = 1) -> Tensor:
    """[N, 1, 1, D]."""
    return torch.randn(count, 1, 1, width, generator=torch.Generator().manual_seed(seed))


def input_of(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """The input of a layer in a float64 copy of the module."""
    other, seen = copy.deepcopy(module).double(), []
    other.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    with torch.no_grad():
        other(x.double())
    return seen[0]


def lift(reduction) -> Tensor:
    """B0 [H, K]: a kept channel back where it was, its centroid to every member of a cluster."""
    if isinstance(reduction, Folding):
        return F.one_hot(reduction.cluster).double()
    return F.one_hot(reduction.channels, reduction.width).double().T


def repaired(weight_OH: Tensor, target_TH: Tensor, z_TK: Tensor, reduction, ridge: float = RIDGE) -> Tensor:
    """W B, B = B0 + Σ (t − B0 z) zᵀ (A + λI)⁻¹."""
    lift_HK, a_KK = lift(reduction), z_TK.T @ z_TK
    lam = ridge * a_KK.diagonal().mean()
    cross_HK = (target_TH - z_TK @ lift_HK.T).T @ z_TK
    map_HK = lift_HK + cross_HK @ torch.linalg.inv(a_KK + lam * torch.eye(len(a_KK), dtype=torch.float64))
    return weight_OH.double() @ map_HK


def gram_form(weight_OH: Tensor, x_TH: Tensor, reduction, ridge: float = RIDGE) -> Tensor:
    """W B0 + (W G Rᵀ − W B0 A)(A + λI)⁻¹."""
    gram_HH, lift_HK = x_TH.T @ x_TH, lift(reduction)
    reduce_KH = lift_HK.T / lift_HK.sum(0)[:, None]
    a_KK = reduce_KH @ gram_HH @ reduce_KH.T
    weight_OH, plain_OK = weight_OH.double(), weight_OH.double() @ lift_HK
    right_OK = weight_OH @ gram_HH @ reduce_KH.T - plain_OK @ a_KK
    lam = ridge * a_KK.diagonal().mean()
    return plain_OK + right_OK @ torch.linalg.inv(a_KK + lam * torch.eye(len(a_KK), dtype=torch.float64))


def positions(conv: nn.Conv2d, hidden: Tensor) -> Tensor:
    """Every position of a map [T, H]; of a 1 x 1 convolution with a stride those it reads."""
    step = conv.stride[0] if conv.kernel_size == (1, 1) else 1
    return hidden[:, :, ::step, ::step].movedim(1, -1).flatten(0, -2)


def taps(conv: nn.Conv2d) -> Tensor:
    """[O · taps, channels]."""
    return conv.weight.detach().movedim(1, -1).flatten(0, -2)


def assert_repair(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    """The repair W' − W B0, which must be there, to four digits."""
    assert relative(found, plain) > 1e-3, "nothing was repaired"
    assert relative(found.double() - plain, expected - plain) < 1e-4


class TestFormulas:
    @pytest.mark.parametrize("mode", ["dense", "own", "one-shot"])
    @pytest.mark.parametrize("method", ["wanda", "random", "fold"])
    def test_a_chain_of_linear_layers(self, method, mode):
        """Two sites one after another, each by the general form from stored activations."""
        module, x = randomised(MLP()), rows()
        asked = {"one_shot": True} if mode == "one-shot" else {"target": mode}
        report = compress(module, x, method=method, ratio=0.5, sites=mlp_sites(module), ridge=RIDGE, **asked)
        layers, model = [module.fc1, module.fc2, module.fc3], report.model
        first, second = (result.reduction for result in report.results)
        x_TD = x.double().flatten(1)

        def hidden(layer: nn.Linear, x_TI: Tensor, weight_OI: Tensor | None = None) -> Tensor:
            weight_OI = layer.weight if weight_OI is None else weight_OI
            return torch.relu(x_TI @ weight_OI.double().T + layer.bias.double()).detach()

        def emitted(layer: nn.Linear, x_TI: Tensor, reduction, weight_OI: Tensor) -> Tensor:
            if not isinstance(reduction, Folding):
                return hidden(layer, x_TI, weight_OI)[:, reduction.channels]
            mean = lift(reduction).T / reduction.sizes[:, None]
            return torch.relu(x_TI @ (mean @ weight_OI.double()).T + mean @ layer.bias.double()).detach()

        dense1_TH = hidden(layers[0], x_TD)
        z1_TK = emitted(layers[0], x_TD, first, layers[0].weight)
        expected2 = repaired(layers[1].weight, dense1_TH, z1_TK, first)
        dense2_TH = hidden(layers[1], dense1_TH)
        read, weight2 = (dense1_TH, layers[1].weight) if mode == "one-shot" else (z1_TK, expected2)
        z2_TK = emitted(layers[1], read, second, weight2)
        target_TH = hidden(layers[1], z1_TK, expected2) if mode == "own" else dense2_TH
        expected3 = repaired(layers[2].weight, target_TH, z2_TK, second)

        mean = lift(second).T / lift(second).sum(0)[:, None]
        plain2 = layers[1].weight.double() @ lift(first)
        assert_repair(model.fc2.weight, mean @ expected2, mean @ plain2)
        assert_repair(model.fc3.weight, expected3, layers[2].weight.double() @ lift(second))

    @pytest.mark.parametrize("asked", [{"one_shot": True}, {"target": "own"}, {"target": "dense"}], ids=str)
    @pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1), (1, 2)])
    def test_convolutions_from_the_gram_matrix(self, kernel, stride, asked):
        """One site: all targets are the same; a 1 x 1 convolution with a stride reads every second position only."""
        module, x = randomised(ConvNet(kernel, stride)), images(6, 16)
        report = compress(module, x, method="wanda", ratio=0.5, sites=conv_sites(module), **asked)
        reduction, hidden = report.results[0].reduction, input_of(module, "conv2", x)
        expected = gram_form(taps(module.conv2), positions(module.conv2, hidden), reduction)
        assert_repair(taps(report.model.conv2), expected, taps(module.conv2).double() @ lift(reduction))
        if (kernel, stride) == (1, 2):
            everywhere = gram_form(taps(module.conv2), hidden.movedim(1, -1).flatten(0, -2), reduction)
            assert relative(expected, everywhere) > 1e-3, "the test could not tell"

    @pytest.mark.parametrize("asked", [{"one_shot": True}, {"target": "own"}, {"target": "dense"}], ids=str)
    @pytest.mark.parametrize("kernel, stride", [(3, 1), (1, 2)])
    def test_folded_convolutions_from_what_is_really_emitted(self, kernel, stride, asked):
        module, x = randomised(ConvNet(kernel, stride)), images(6, 16)
        report = compress(module, x, method="fold", ratio=0.5, sites=conv_sites(module), **asked)
        reduction = report.results[0].reduction
        target, z = (positions(module.conv2, input_of(m, "conv2", x)) for m in (module, report.model))
        expected = repaired(taps(module.conv2), target, z, reduction)
        assert_repair(taps(report.model.conv2), expected, taps(module.conv2).double() @ lift(reduction))
        assert relative(gram_form(taps(module.conv2), target, reduction), expected) > 1e-3, "z is not R h"

    @pytest.mark.parametrize("method", ["wanda", "fold"])
    def test_closed_loop_over_blocks_stands_for_the_dense_network(self, method):
        """t from the dense network, z from the result: both as plain modules give them."""
        module, x = built("torchvision-bottleneck"), images(8)
        report = compress(module, x, method=method, ratio=0.5, ridge=RIDGE, target="dense")
        for result in report.results[1::2]:  # conv3: no producer itself, so that its rows stay
            name = result.site.consumer
            old, new = module.get_submodule(name), report.model.get_submodule(name)
            target, z = (positions(old, input_of(m, name, x)) for m in (module, report.model))
            expected = repaired(taps(old), target, z, result.reduction)
            plain = taps(old).double() @ lift(result.reduction)
            assert relative(taps(new) - plain, expected - plain) < 1e-3, name

    @fewer_heads
    def test_heads_and_mlp_of_a_transformer(self):
        module, x = built("dinov2"), images(8)
        report = compress(module, x, method="wanda", ratio=0.34, target="dense")
        for result in report.results:
            name = result.site.consumer
            old, new = (m.get_submodule(name) for m in (module, report.model))
            target, z = (input_of(m, name, x).flatten(0, 1) for m in (module, report.model))
            assert len(target) == 8 * (1 + 4 + 16), "all tokens count"
            expected = repaired(old.weight, target, z, result.reduction)
            plain = old.weight.detach().double() @ lift(result.reduction)
            assert relative(new.weight.detach() - plain, (expected - plain).detach()) < 1e-3, name

    def test_the_papers_form(self):
        module, x = randomised(MLP()), rows()
        sites = mlp_sites(module)[:1]
        report = compress(module, x, method="wanda", ratio=0.5, sites=sites, ridge=0.1, ridge_form="paper")
        x_TH, reduction = input_of(module, "fc2", x), report.results[0].reduction
        gram_HH, kept = x_TH.T @ x_TH, reduction.channels
        a_KK = gram_HH[kept][:, kept]
        a_KK = a_KK + 0.1 * a_KK.diagonal().mean() * torch.eye(len(a_KK), dtype=torch.float64)
        expected = module.fc2.weight.double() @ gram_HH[:, kept] @ torch.linalg.inv(a_KK)
        assert relative(report.model.fc2.weight, expected) < 1e-5


class TestBias:
    @pytest.mark.parametrize("method", ["wanda", "fold"])
    @pytest.mark.parametrize("compensate", [True, False])
    @pytest.mark.parametrize("asked", [{}, {"target": "own"}, {"one_shot": True}], ids=str)
    def test_the_mean_output_stays_where_zeros_are_padded(self, method, compensate, asked):
        """The mean of each output over images and positions, the border included."""
        module, x = randomised(ConvNet(3, 1)), images(6, 8)
        flags = {"method": method, "ratio": 0.5, "sites": conv_sites(module), "compensate": compensate, **asked}
        expected, found, without = (
            output(model, x).double().mean((0, 2, 3))
            for model in (module, compress(module, x, bias=True, **flags).model, compress(module, x, **flags).model)
        )
        assert relative(found, expected) < 1e-5 < relative(without, expected)

    def test_the_mean_output_of_every_consumer_stays_that_of_the_dense_network(self):
        module, x = built("torchvision-bottleneck"), images(8)
        report = compress(module, x, method="wanda", ratio=0.5, bias=True, target="dense")
        for name in ("layer1.0.conv3", "layer3.0.conv3", "layer4.0.conv3"):
            means = []
            for model in (module, report.model):
                layer, hidden = copy.deepcopy(model.get_submodule(name)).double(), input_of(model, name, x)
                means.append(layer(hidden).detach().mean((0, 2, 3)))
            assert relative(means[1], means[0]) < 1e-5, name

    @pytest.mark.parametrize("method", ["wanda", "fold"])
    def test_one_joint_solve_about_the_means(self, method):
        """W' from centred moments, b' = b + mean(W t) − mean(W' z): the affine ridge solution."""
        module, x = randomised(MLP()), rows() + 3
        report = compress(module, x, method=method, ratio=0.5, sites=mlp_sites(module)[:1], bias=True)
        target, z = input_of(module, "fc2", x), input_of(report.model, "fc2", x)
        old, new, reduction = module.fc2, report.model.fc2, report.results[0].reduction
        expected = repaired(old.weight, target - target.mean(0), z - z.mean(0), reduction)
        assert_repair(new.weight.detach(), expected.detach(), old.weight.detach().double() @ lift(reduction))
        bias = old.bias.double() + old.weight.double() @ target.mean(0) - expected @ z.mean(0)
        assert relative(new.bias.detach(), bias.detach()) < 1e-4

    def test_a_consumer_without_a_bias_gets_one(self):
        module, x = built("cifar"), images(4)
        model = compress(module, x, method="wanda", ratio=0.5, bias=True).model
        assert module.layer1[0].conv2.bias is None and model.layer1[0].conv2.bias.shape == (8,)
        assert compress(module, x, method="wanda", ratio=0.5).model.layer1[0].conv2.bias is None


class TestProperties:
    @pytest.mark.parametrize("kind", ["cifar", "timm-preact-bottleneck", "dinov2", "swiglu-packed"])
    @pytest.mark.parametrize("method", METHODS)
    def test_ratio_0_is_the_identity(self, method, kind):
        module = built(kind)
        report = compress(module, images(4), method=method, ratio=0)
        assert same_bits(report.model, module) and report.model is not module
        assert all(entry["before"] == entry["after"] for entry in report.sites)

    @pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
    @pytest.mark.parametrize("asked", [{}, {"target": "own"}, {"one_shot": True}], ids=str)
    @pytest.mark.parametrize("method", METHODS)
    def test_uncorrelated_channels_of_one_size_give_classic_pruning_and_folding(self, method, asked, ridge):
        """G = c·I, made by hand: each image lights one channel."""
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, 16, bias=False), nn.Linear(16, 6))
        torch.manual_seed(0)
        nn.init.eye_(module[1].weight)
        sites = [grail.channels("1", "2", width=16)]
        report = compress(
            module, 3 * torch.eye(16)[:, None, None], method=method, ratio=0.5, sites=sites, ridge=ridge, **asked
        )
        weight_OH, reduction = module[2].weight.detach(), report.results[0].reduction
        if method == "fold":
            assert relative(report.model[2].weight, weight_OH.double() @ lift(reduction)) < 1e-6
            assert reduction.sizes.max() > 1
        else:
            assert torch.equal(report.model[2].weight, weight_OH[:, reduction.channels])

    @pytest.mark.parametrize("method", SELECTIONS)
    @pytest.mark.parametrize("compensate", [True, False])
    def test_the_order_of_channels_means_nothing(self, method, compensate):
        module, x = randomised(ConvNet()), images(6, 8)
        order, other = torch.randperm(16, generator=torch.Generator().manual_seed(3)), copy.deepcopy(module)
        for layer in (other.conv1, other.bn1):
            for tensor in (layer.weight, layer.bias, *layer.buffers()):
                if tensor is not None and tensor.dim():
                    tensor.data = tensor.data[order]
        other.conv2.weight.data = other.conv2.weight.data[:, order]
        assert relative(output(other, x), output(module, x)) < 1e-5
        flags = {"method": method, "ratio": 0.5, "sites": conv_sites(module), "compensate": compensate}
        first, second = compress(module, x, **flags), compress(other, x, **flags)
        kept = set(order[second.results[0].reduction.channels].tolist())
        assert kept == set(first.results[0].reduction.channels.tolist())
        assert relative(output(second.model, x), output(first.model, x)) < 1e-4

    @pytest.mark.parametrize("method", METHODS)
    def test_widths_are_rounded_not_truncated(self, method):
        module, x = randomised(MLP(width=640, second=10)), rows(32)
        report = compress(module, x, method=method, ratio=0.8, sites=mlp_sites(module)[:1])
        assert report.model.fc1.out_features == report.model.fc2.in_features == 128
        report = compress(module, x, method=method, ratio=0.9, sites=mlp_sites(module)[1:])
        assert report.model.fc2.out_features == report.model.fc3.in_features == 1

    @pytest.mark.parametrize("method", [m for m in METHODS if m != "fold"])
    def test_selections_carry_batchnorm_exactly(self, method):
        module = randomised(ConvNet(bias=True))
        report = compress(module, images(4, 8), method=method, ratio=0.4, sites=conv_sites(module))
        old, new = module.state_dict(), report.model.state_dict()
        kept = [i for i in range(16) if (old["conv1.weight"][i] == new["conv1.weight"]).all((1, 2, 3)).any()]
        assert len(kept) == 10
        for name in (
            "conv1.weight",
            "conv1.bias",
            *(f"bn1.{v}" for v in ("weight", "bias", "running_mean", "running_var")),
        ):
            assert torch.equal(new[name], old[name][kept]), name
        assert report.model.bn1.eps == module.bn1.eps and report.model.bn1.momentum == module.bn1.momentum

    @kinds("cifar", "timm-preact-bottleneck", "dinov2", "swiglu")
    @pytest.mark.parametrize("method", METHODS)
    def test_compensation_never_raises_the_calibration_error(self, method, kind):
        module, x = built(kind), images(6)
        for asked in ({}, {"target": "own"}, {"one_shot": True}, {"bias": True}):
            for entry in compress(module, x, method=method, ratio=0.5, **asked).sites:
                assert 0 <= entry["error_after"] <= entry["error_before"], (asked, entry["name"])

    @pytest.mark.parametrize("method", ["wanda", "fold"])
    @pytest.mark.parametrize("asked", [{}, {"target": "own"}, {"one_shot": True}, {"bias": True}], ids=str)
    def test_reported_errors_are_those_of_the_result(self, method, asked):
        """Σ‖W t − W' z‖² / Σ‖W t‖² with W' = W B0 and as written, in float64; with a bias about the means."""
        module, x = randomised(MLP()), rows() + 2
        report = compress(module, x, method=method, ratio=0.5, sites=mlp_sites(module)[:1], **asked)
        target, z = input_of(module, "fc2", x), input_of(report.model, "fc2", x)
        if "bias" in asked:
            target, z = target - target.mean(0), z - z.mean(0)
        weight_OH, narrow_OK = (m.fc2.weight.detach().double() for m in (module, report.model))
        wanted = target @ weight_OH.T
        plain, best = (
            ((wanted - z @ w.T).square().sum() / wanted.square().sum()).item()
            for w in (weight_OH @ lift(report.results[0].reduction), narrow_OK)
        )
        (entry,) = report.sites
        assert entry["error_before"] == pytest.approx(plain, rel=1e-4)
        assert entry["error_after"] == pytest.approx(best, rel=1e-3)
        assert best < 0.9 * plain

    @pytest.mark.parametrize("method", METHODS)
    def test_equal_runs_give_equal_bits(self, method):
        first, second = (compress(built("cifar"), images(6), method=method, ratio=0.5) for _ in range(2))
        assert same_bits(first.model, second.model) and first.to_json() == second.to_json()

    def test_widths_by_a_global_threshold(self):
        """FLAP's allocation: widths that differ, parameters as asked for."""
        module, x = built("torchvision-bottleneck"), images(6)
        report = compress(module, x, method="wanda", ratio=0.5, allocation="global")
        shares = [entry["after"] / entry["before"] for entry in report.sites]
        assert max(shares) - min(shares) > 0.1 and min(entry["after"] for entry in report.sites) >= 1
        assert output(report.model, x).isfinite().all()

    def test_widths_of_a_multiple(self):
        report = compress(built("cifar"), images(4), method="wanda", ratio=0.4, round_to=4)
        assert all(entry["after"] % 4 == 0 for entry in report.sites)

    @pytest.mark.parametrize("pieces", [1, 3, 8], ids=["single-images", "batches", "one-batch"])
    def test_a_list_of_images_or_batches_is_their_stack(self, pieces):
        module, x = built("cifar"), images(8)
        given = list(x) if pieces == 1 else list(x.split(pieces))
        flags = {"method": "wanda", "ratio": 0.5, "samples": 8}
        stacked, listed = (grail.compress(module, calibration=c, **flags) for c in (x, given))
        assert same_bits(listed.model, stacked.model)
        assert listed.to_json()["calibration"] == stacked.to_json()["calibration"]

    def test_calibration_in_batches_gives_the_same(self):
        module, x = built("cifar"), images(10)
        whole, parts = (compress(module, x, method="fold", ratio=0.5, batch=b).model for b in (64, 3))
        assert relative(output(parts, x), output(whole, x)) < 1e-4


class TestBatchNorm:
    @pytest.mark.parametrize("asked", [{}, {"target": "own"}, {"one_shot": True}], ids=str)
    @pytest.mark.parametrize("options", [{}, {"bias": True}, {"affine": False}, {"eps": 1e-2}], ids=str)
    def test_folding_leaves_an_identity_with_true_statistics(self, options, asked):
        """Rows fused with their BatchNorm are averaged; what is left of it is γ = sqrt(v + eps), β = m + shift."""
        module, x = randomised(ConvNet(**options)), images(6, 8)
        report = compress(module, x, method="fold", ratio=0.5, sites=conv_sites(module), **asked)
        old, new, norm = module.conv1, report.model.conv1, report.model.bn1
        state = {n: t.double() for n, t in module.bn1.state_dict().items()}
        gamma = state.get("weight", torch.ones(16).double()) / (state["running_var"] + module.bn1.eps).sqrt()
        bias = old.bias.detach().double() if old.bias is not None else 0
        shift = (bias - state["running_mean"]) * gamma + state.get("bias", 0)
        mean = lift(report.results[0].reduction).T
        mean = mean / mean.sum(1, keepdim=True)
        rows_HD = (old.weight.detach().double() * gamma[:, None, None, None]).flatten(1)
        assert relative(new.weight.detach().flatten(1), mean @ rows_HD) < 1e-6

        seen = input_of(report.model, "bn1", x).movedim(1, -1).flatten(0, -2)
        assert relative(norm.running_mean, seen.mean(0)) < 1e-5
        assert relative(norm.running_var, seen.var(0)) < 1e-5
        assert relative(norm.weight.detach(), (seen.var(0) + norm.eps).sqrt()) < 1e-5
        into = 0 if new.bias is None else new.bias.detach().double()
        assert relative(norm.bias.detach(), seen.mean(0) + mean @ shift - into) < 1e-5
        emitted = copy.deepcopy(norm).double()(seen.T[None, ..., None])[0, ..., 0].T
        assert relative(emitted.detach(), seen - into + mean @ shift) < 1e-5
        assert norm.num_features == 8 and norm.eps == module.bn1.eps and not norm.training


class TestRepair:
    def compressed(self, **flags):
        module, x = randomised(ConvNet(bias=True)), images(8, 8) + 1
        return compress(module, x, method="wanda", ratio=0.5, sites=conv_sites(module), batch=4, **flags), x

    @torch.no_grad()
    def test_statistics_are_reset_and_averaged_cumulatively(self):
        """Each batch counts alike; what stood there before does not count; Dropout stays in evaluation mode."""
        (plain, x), (repaired_, _) = self.compressed(), self.compressed(repair=True)
        model = copy.deepcopy(plain.model).double()
        first = [model.conv1(part) for part in x.double().split(4)]
        second = []
        for part in first:
            normal = (part - part.mean((0, 2, 3), True)) / (part.var((0, 2, 3), False, True) + model.bn1.eps).sqrt()
            shaped = normal * model.bn1.weight[:, None, None] + model.bn1.bias[:, None, None]
            second.append(model.conv2(torch.relu(shaped)))
        for norm, seen in ((repaired_.model.bn1, first), (repaired_.model.bn2, second)):
            mean = sum(part.mean((0, 2, 3)) for part in seen) / 2
            variance = sum(part.var((0, 2, 3)) for part in seen) / 2
            assert relative(norm.running_mean, mean) < 1e-5 and relative(norm.running_var, variance) < 1e-5
            assert norm.num_batches_tracked == 2
        assert repaired_.repaired_norms == 2 and plain.repaired_norms == 0

    def test_only_statistics_change(self):
        (plain, _), (repaired_, _) = self.compressed(), self.compressed(repair=True)
        changed = {
            n for n, t in repaired_.model.state_dict().items() if not torch.equal(t, plain.model.state_dict()[n])
        }
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        assert changed == {f"{norm}.{name}" for norm in ("bn1", "bn2") for name in statistics}

    def test_evaluation_mode_and_momentum_are_as_before(self):
        module, x = randomised(ConvNet(momentum=0.3)), images(8, 8)
        model = compress(module, x, method="fold", ratio=0.5, sites=conv_sites(module), repair=True).model
        assert not any(layer.training for layer in model.modules())
        assert (model.bn1.momentum, model.bn2.momentum) == (0.3, 0.1)

    def test_a_single_value_per_channel_is_refused_in_a_sentence(self):
        """BatchNorm cannot train on one number; resnets of small images end in one position."""
        with pytest.raises(GrailError):
            compress(built("timm-basic"), images(1), method="wanda", ratio=0.5, repair=True)


class TestModes:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("flags", [{"method": "fold"}, {"method": "wanda", "repair": True, "bias": True}], ids=str)
    def test_the_given_module_is_untouched(self, training, flags):
        module, x = built("cifar"), images(6)
        module.train(training)
        module.layer1.eval()  # a mixture must survive as it is
        before, modes, pixels = copy.deepcopy(module), [m.training for m in module.modules()], x.clone()
        model = compress(module, x, ratio=0.5, **flags).model
        assert same_bits(module, before) and [m.training for m in module.modules()] == modes
        assert all(p.requires_grad for p in module.parameters()) and torch.equal(x, pixels)
        assert not any(layer.training for layer in model.modules())
        assert not any(hooks for m in module.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))

    def test_results_keep_no_hooks_and_share_no_memory(self):
        module = built("cifar")
        model = compress(module, images(6), method="fold", ratio=0.5).model
        assert not any(hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
        theirs = {t.data_ptr() for t in module.state_dict().values() if t.numel()}
        assert not theirs & {t.data_ptr() for t in model.state_dict().values() if t.numel()}

    def test_nothing_is_touched_when_a_run_fails(self):
        class Fails(ConvNet):
            def forward(self, x):
                found = super().forward(x)
                if self.bn1.training:
                    raise ValueError("broken in the middle of REPAIR")
                return found

        module = randomised(Fails()).train()
        before = copy.deepcopy(module)
        with pytest.raises(ValueError, match="broken"):
            compress(module, images(4, 8), method="wanda", ratio=0.5, sites=conv_sites(module), repair=True)
        assert same_bits(module, before) and all(m.training for m in module.modules())

    def test_repair_restores_modes_when_it_fails(self):
        from grail.modules.repair import repair

        module = randomised(ConvNet())
        module.dropout.train()
        with pytest.raises(RuntimeError):
            repair(module, [torch.zeros(2, 5, 8, 8)])
        assert [n for n, m in module.named_modules() if m.training] == ["dropout"]
        assert module.bn1.momentum == module.bn2.momentum == 0.1
