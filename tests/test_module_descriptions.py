"""Networks described by hand: what is refused before work, and what works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from tests.test_modules import METHODS, MLP, ConvNet, Flattened, Gated, conv_sites, mlp_sites, rows
from tests.test_vision_families import built, compress, images, output, randomised, relative, same_bits


class Skipping(MLP):
    """A skip connection reads the hidden vector, too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(hidden))) + hidden[:, :6]


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 24), layer, nn.Linear(24, 6))


class TestRefused:
    SITE = staticmethod(lambda: [grail.channels("1", "3", width=24, name="here")])

    def refuse(self, module: nn.Module, match: str, x: Tensor | None = None, **flags) -> str:
        flags = {"method": "wanda", "ratio": 0.5} | flags
        with pytest.raises(GrailError, match=match) as caught:
            compress(module, rows() if x is None else x, **flags)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_wrong_width(self):
        self.refuse(MLP(), "fc1.*24", sites=[grail.channels("fc1", "fc2", width=23)])
        self.refuse(MLP(), "fc1.*fc3.*20", sites=[grail.channels("fc1", "fc3", width=24)])
        self.refuse(
            ConvNet(),
            "fold.*bn2.*8",
            images(2, 8),
            sites=[grail.channels("conv1", "conv2", width=16, norms=["bn2"], name="fold")],
        )

    @pytest.mark.parametrize("names", [("fc9", "fc2"), ("fc1", "fc9")])
    def test_a_missing_module(self, names):
        self.refuse(MLP(), "here.*fc9", sites=[grail.channels(*names, width=24, name="here")])

    def test_two_sites_of_one_name(self):
        self.refuse(MLP(), "same.*two", sites=[grail.channels("fc1", "fc2", width=24, name="same")] * 2)

    def test_no_sites(self):
        self.refuse(MLP(), "no sites", sites=[])

    def test_another_kind_of_layer(self):
        module = nn.Sequential(nn.ConvTranspose2d(3, 8, 1), nn.Conv2d(8, 4, 1))
        self.refuse(
            module, "here.*ConvTranspose2d", images(2, 8), sites=[grail.channels("0", "1", width=8, name="here")]
        )
        self.refuse(between(nn.ReLU()), "here.*Flatten", sites=[grail.channels("0", "3", width=24, name="here")])

    def test_grouped_convolutions(self):
        module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
        self.refuse(module, "here.*groups", images(2, 8), sites=[grail.channels("0", "1", width=8, name="here")])
        self.refuse(module, "here.*groups", images(2, 8), sites=[grail.channels("1", "2", width=8, name="here")])

    def test_one_layer_as_producer_of_two_sites(self):
        module = randomised(MLP())
        sites = [grail.channels("fc1", "fc2", width=24, name=name) for name in ("one", "two")]
        self.refuse(module, "depend on each other", sites=sites)

    @pytest.mark.parametrize("layer", [1, 3])
    def test_a_layer_that_makes_its_weight_anew(self, layer):
        """What is cut from its weight is not cut from what it multiplies with."""
        module = randomised(between(nn.ReLU()))
        nn.utils.parametrizations.spectral_norm(module[layer])
        self.refuse(module.eval(), "here", sites=self.SITE())

    def test_a_skip_connection_that_reads_the_hidden_vector(self):
        module = randomised(Skipping())
        message = self.refuse(module, "fc1.*order", sites=mlp_sites(module))
        assert not message.startswith("fc2")

    def test_a_forgotten_norm(self):
        self.refuse(
            randomised(ConvNet()), "conv1.*order", images(4, 8), sites=[grail.channels("conv1", "conv2", width=16)]
        )

    def test_one_of_two_producers_is_missing(self):
        self.refuse(randomised(Gated()), "up.*order", sites=[grail.channels("up", "down", width=24)])

    @pytest.mark.parametrize("norms", [["bn"], ["bn", "bn", "bn"]], ids=len)
    def test_norms_that_do_not_match_the_producers(self, norms):
        class Normed(Gated):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm1d(24)

            def forward(self, x):
                x = x.flatten(1)
                return self.down(F.silu(self.bn(self.gate(x))) * self.up(x))

        site = grail.channels(["gate", "up"], "down", width=24, norms=norms, name="here")
        self.refuse(randomised(Normed()), "here", sites=[site])

    @pytest.mark.parametrize(
        "layer", [nn.LayerNorm(24), nn.GroupNorm(1, 24), nn.GroupNorm(4, 24), nn.Softmax(1)], ids=lambda m: str(m)[:14]
    )
    @pytest.mark.parametrize("asked", [{}, {"one_shot": True}], ids=str)
    def test_channels_that_are_mixed_in_between(self, layer, asked):
        """Fresh norms do not change when channels change places: the order alone tells nothing of them."""
        self.refuse(between(layer), "here", sites=self.SITE(), **asked)

    def test_a_group_norm_given_as_norm(self):
        site = grail.channels("1", "3", width=24, norms=["2"], name="here")
        self.refuse(between(nn.GroupNorm(4, 24)), "here.*GroupNorm", sites=[site])
        self.refuse(between(nn.BatchNorm1d(24, track_running_stats=False)), "here.*BatchNorm1d", sites=[site])

    def test_a_method_for_language_models(self):
        self.refuse(MLP(), "wanda-pp-sp.*language models", sites=mlp_sites(MLP()), method="wanda-pp-sp")
        self.refuse(
            MLP(),
            "wanda-pp-sp.*language models",
            sites=mlp_sites(MLP()),
            method="wanda-pp-sp",
            set={"regional": "none"},
        )

    @pytest.mark.parametrize("method", ["wanda", "fold", "mag-l2"])
    def test_nan_in_the_calibration(self, method):
        x = rows()
        x[5, 0, 0, 3] = float("nan")
        self.refuse(MLP(), "NaN", x, sites=mlp_sites(MLP()), method=method)

    @pytest.mark.parametrize("method", ["wanda", "fold", "mag-l2"])
    def test_nan_in_the_weights(self, method):
        """The sentence says so, and speaks of no order of channels."""
        module = randomised(MLP())
        module.fc1.weight.data[3, 3] = float("nan")
        self.refuse(module, "NaN", sites=mlp_sites(module), method=method)

    def test_calibration_that_does_not_fit_the_network(self):
        self.refuse(MLP(), "7|fc1|calibration|images", rows(width=7), sites=mlp_sites(MLP()))

    def test_pixels_without_preprocessing(self):
        self.refuse(built("cifar"), "[Pp]reprocessing", images(4).mul(20).clamp(0, 255).to(torch.uint8))

    def test_unknown_options_and_values(self):
        self.refuse(MLP(), "target", sites=mlp_sites(MLP()), target="other")
        self.refuse(MLP(), "batch", sites=mlp_sites(MLP()), batch=0)
        self.refuse(MLP(), "colour", sites=mlp_sites(MLP()), colour="red")
        self.refuse(MLP(), "gqa", sites=mlp_sites(MLP()), gqa="group")

    def test_folding_channels_that_are_read_several_times(self):
        """A convolution in front of a flattened map: refused in a sentence that names it, or folded without loss."""
        self.refuse(
            Flattened(), "conv", images(4, 8), sites=[grail.channels("conv", "fc", width=10, size=16)], method="fold"
        )


class TestWithoutCalibration:
    @pytest.mark.parametrize("method", ["mag-l1", "mag-l2", "mag-sp", "random"])
    def test_methods_that_need_none(self, method):
        module, x = built("cifar"), images(4)
        flags = {"method": method, "ratio": 0.5, "compensate": False}
        report = grail.compress(module, calibration=None, **flags)
        assert same_bits(report.model, compress(module, x, **flags).model)
        assert report.to_json()["calibration"] is None

    def test_folding_channels_needs_none_either(self):
        """The BatchNorms then compute the identity and a shift, without statistics."""
        module, x = built("cifar"), images(4)
        report = grail.compress(module, calibration=None, method="fold", ratio=0.5, compensate=False)
        expected = compress(module, x, method="fold", ratio=0.5, compensate=False)
        assert relative(output(report.model, x), output(expected.model, x)) < 1e-5

    @pytest.mark.parametrize(
        "flags",
        [{"method": "mag-l2"}, {"method": "wanda", "compensate": False}]
        + [{"method": "mag-l2", "compensate": False, option: True} for option in ("repair", "bias")],
        ids=str,
    )
    def test_what_needs_some_says_so(self, flags):
        with pytest.raises(GrailError, match="calibration"):
            grail.compress(built("cifar"), calibration=None, ratio=0.5, **flags)


class TestByHand:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        "make, sites, x",
        [
            (MLP, mlp_sites, rows),
            (Gated, lambda _: [grail.channels(["gate", "up"], "down", width=24)], rows),
            (ConvNet, conv_sites, lambda: images(6, 8)),
        ],
        ids=["mlp", "gated", "conv"],
    )
    def test_a_description_is_all_it_takes(self, make, sites, x, method):
        module, x = randomised(make()), x()
        narrow = [
            compress(module, x, method=method, ratio=0.5, sites=sites(module), compensate=c) for c in (False, True)
        ]
        errors = [relative(output(report.model, x), output(module, x)) for report in narrow]
        assert errors[1] < errors[0]
        assert narrow[1].parameters[1] < 0.65 * narrow[1].parameters[0]

    def test_gated_producers_lose_the_same_channels(self):
        module, x = randomised(Gated()), rows()
        report = compress(
            module, x, method="wanda", ratio=0.5, sites=[grail.channels(["gate", "up"], "down", width=24)]
        )
        kept = report.results[0].reduction.channels
        for name in ("gate", "up"):
            old, new = module.get_submodule(name), report.model.get_submodule(name)
            assert torch.equal(new.weight, old.weight[kept]) and torch.equal(new.bias, old.bias[kept])

    @pytest.mark.parametrize("method", [m for m in METHODS if m != "fold"])
    def test_a_convolution_in_front_of_a_flattened_map(self, method):
        """Whole channels go: their positions together."""
        module, x = randomised(Flattened()), images(24, 8)
        sites = [grail.channels("conv", "fc", width=10, size=16)]
        plain, report = (
            compress(module, x, method=method, ratio=0.5, sites=sites, compensate=c) for c in (False, True)
        )
        kept = report.results[0].reduction.kept
        assert torch.equal(report.model.conv.weight, module.conv.weight[kept]) and report.model.fc.in_features == 80
        columns = (kept[:, None] * 16 + torch.arange(16)).flatten()
        assert torch.equal(plain.model.fc.weight, module.fc.weight[:, columns])
        errors = [relative(output(m, x), output(module, x)) for m in (plain.model, report.model)]
        assert errors[1] < errors[0]

    def test_heads(self):
        module, x = built("vit"), images(6)
        sites = [
            grail.heads(
                "blocks.0.attn.qkv", "blocks.0.attn.proj", count=3, size=16, sections=3,
                counts=[("blocks.0.attn", "num_heads")], widths=[("blocks.0.attn", "attn_dim")],
            )
        ]  # fmt: skip
        asked = {"method": "wanda", "ratio": 0.34, "target": "dense"}  # sites by hand name no stream
        report = compress(module, x, **asked, sites=sites)
        automatic = compress(module, x, **asked).model.blocks[0].attn
        assert same_bits(report.model.blocks[0].attn, automatic)
        assert same_bits(report.model.blocks[1], module.blocks[1])

    @pytest.mark.parametrize(
        "answer", [lambda t: {"logits": t}, lambda t: (t, None), lambda t: [t]], ids=["dict", "tuple", "list"]
    )
    def test_networks_that_answer_with_more_than_a_tensor(self, answer: Callable):
        class Answers(MLP):
            def forward(self, x: Tensor):
                return answer(super().forward(x))

        module = randomised(Answers())
        report = compress(module, rows(), method="wanda", ratio=0.5, sites=mlp_sites(module))
        assert report.model.fc1.out_features == 12

    def test_a_network_that_changes_its_input_in_place(self):
        """Calibration images are read again and again: they must be the same each time."""

        class InPlace(MLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.sub_(0.5).mul_(2))

        class Plain(MLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward((x - 0.5) * 2)

        first, second = (
            compress(m, rows(), method="wanda", ratio=0.5, sites=mlp_sites(m))
            for m in map(randomised, (InPlace(), Plain()))
        )
        assert same_bits(first.model, second.model)

    @pytest.mark.parametrize("method", ["slimgpt", "flap"])
    def test_methods_made_for_language_models_work_too(self, method):
        module, x = built("cifar"), images(6)
        report = compress(module, x, method=method, ratio=0.5)
        assert relative(output(report.model, x), output(module, x)) < 1
