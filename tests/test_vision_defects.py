"""The defects of the public reference code's vision half (REFERENCE section 4), one test each, named after it.

Written from outside, against float64 arithmetic on activations that plain modules gave. CLIP's own defect is tested
with its family. Shapes: T rows, H width, K kept, O outputs.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from tests.test_modules import ConvNet, conv_sites, input_of, lift, positions, repaired, taps
from tests.test_vision_families import (
    blocks_of,
    built,
    compress,
    duplicated,
    images,
    output,
    randomised,
    relative,
    same_bits,
)


def kept_of(old: nn.Conv2d, new: nn.Conv2d) -> list[int]:
    """Which rows of a convolution were kept."""
    return [i for i, row in enumerate(old.weight) if any(torch.equal(row, other) for other in new.weight)]


def test_fold_averages_producers_and_sums_consumers():
    """The other way round, exact duplicates lose 53 %."""
    module, x = duplicated("cifar"), images(6)
    model = compress(module, x, method="fold", ratio=0.5, compensate=False).model
    assert relative(output(model, x), output(module, x)) < 1e-5
    old, new = module.layer1[0].conv2.weight, model.layer1[0].conv2.weight
    torch.testing.assert_close(new.sum(1), old.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swiglu", "swiglu-packed"])
def test_fold_of_a_vit_does_not_halve_the_mlp_output(kind):
    module, x = duplicated(kind), images(4)
    model = compress(module, x, method="fold", ratio=0.5, attn_ratio=0, compensate=False).model
    tokens = torch.randn(2, 17, 48)
    for old, new in zip(module.blocks, model.blocks):
        assert relative(new.mlp(tokens).detach(), old.mlp(tokens).detach()) < 1e-5


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("distinct", [1, 3])
def test_an_empty_cluster_cannot_happen(distinct, compensate):
    """Fewer distinct channels than clusters are asked for: each cluster still has a member, nothing is NaN."""
    module, x = randomised(ConvNet()), images(4, 8)
    with torch.no_grad():
        for tensor in (module.conv1.weight, *module.bn1.state_dict().values()):
            if tensor.dim():
                tensor.copy_(tensor[torch.arange(16) % distinct])
    report = compress(module, x, method="fold", ratio=0.5, sites=conv_sites(module), compensate=compensate)
    assert report.results[0].reduction.sizes.min() >= 1 and report.model.conv1.out_channels == 8
    assert relative(output(report.model, x), output(module, x)) < 1e-5


def test_running_variances_are_not_averaged():
    """The variance of an average is not the average of variances: what is left is the average's true one."""
    module, x = randomised(ConvNet()), images(6, 8)
    report = compress(module, x, method="fold", ratio=0.5, sites=conv_sites(module))
    seen = input_of(report.model, "bn1", x).movedim(1, -1).flatten(0, -2)
    norm, reduction = report.model.bn1, report.results[0].reduction
    averaged = (lift(reduction).T / reduction.sizes[:, None]) @ module.bn1.running_var.double()
    assert relative(norm.running_var, seen.var(0)) < 1e-5 < relative(norm.running_var, averaged)


@pytest.mark.parametrize("width, ratio, kept", [(640, 0.8, 128), (10, 0.9, 1), (16, 0.0, 16), (3, 0.99, 1)])
def test_widths_are_rounded_and_never_zero(width, ratio, kept):
    """int(n(1 − r)) gives 127 for 640 at 0.8 and 0 for 10 at 0.9."""
    module = randomised(ConvNet(width=width))
    report = compress(module, images(2, 8), method="mag-l2", ratio=ratio, sites=conv_sites(module))
    assert report.model.conv1.out_channels == report.model.bn1.num_features == report.model.conv2.in_channels == kept


def test_gram_matrices_come_from_the_compressed_network_by_default():
    """Later sites see what earlier ones have left; one shot is another result, and no better one."""
    module, x = built("cifar"), images(16)
    ways = {"target": "dense"}, {"one_shot": True}
    closed, one_shot = (compress(module, x, method="wanda", ratio=0.5, **way) for way in ways)
    name = "layer2.0.conv2"
    old, reduction = module.get_submodule(name), closed.results[1].reduction
    target, z = (positions(old, input_of(m, name, x)) for m in (module, closed.model))
    expected, plain = repaired(taps(old), target, z, reduction), taps(old).double() @ lift(reduction)
    found = [taps(report.model.get_submodule(name)) - plain for report in (closed, one_shot)]
    assert relative(found[0], expected - plain) < 1e-3 < relative(found[1], expected - plain)


def test_a_missing_gram_matrix_is_an_error():
    """No rank-1 average in its place: a consumer that is never called is named."""

    class Unused(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(self.conv1(x))[:, :8]

    module = randomised(Unused())
    with pytest.raises(GrailError, match=r"conv1|conv2"):
        compress(module, images(4, 8), method="wanda", ratio=0.5, sites=conv_sites(module))


def test_all_tokens_count_the_class_token_too():
    """The reference leaves CLIP's out; here a ViT's, whose MLP input differs from the patches'."""
    module, x = built("vit"), images(12)
    report = compress(module, x, method="wanda", ratio=0.5, attn_ratio=0, target="dense")
    result = next(r for r in report.results if r.site.name == "blocks.0.mlp")
    old, new = module.blocks[0].mlp.fc2, report.model.blocks[0].mlp.fc2.weight.detach()
    target, z = (input_of(m, "blocks.0.mlp.fc2", x) for m in (module, report.model))
    expected, without = (
        repaired(old.weight.detach(), t.flatten(0, 1), narrow.flatten(0, 1), result.reduction)
        for t, narrow in ((target, z), (target[:, 1:], z[:, 1:]))
    )
    assert relative(new, expected) < 1e-4 < relative(new, without)


@pytest.mark.parametrize("kind", ["cifar", "cifar-preact"])
def test_resnet_wanda_scores_the_weights_that_read_the_channels(kind):
    """mean |W_:j| · RMS_j: conv2's columns, all taps, and what really goes into conv2."""
    module, x = built(kind), images(6)
    model = compress(module, x, method="wanda", ratio=0.5).model
    block, name = module.layer1[0], "layer1.0.conv2"
    rms = input_of(module, name, x).square().mean((0, 2, 3)).sqrt()
    score = block.conv2.weight.detach().double().abs().mean((0, 2, 3)) * rms
    assert kept_of(block.conv1, model.layer1[0].conv1) == score.topk(4).indices.sort().values.tolist()


@pytest.mark.parametrize("kind", ["torchvision-bottleneck", "cifar", "timm-preact-basic", "vit"])
@pytest.mark.parametrize("method", ["wanda", "fold"])
def test_the_residual_stream_is_left_alone(kind, method):
    """Not cut with one block's keep set, nor at all unless asked: what a block reads and writes keeps its shape."""
    module, x, shapes = built(kind), images(4), []
    blocks = blocks_of(module, "mlp.fc2" if kind == "vit" else "conv2")
    report = compress(module, x, method=method, ratio=0.5)
    for model in (module, report.model):
        seen, other = [], copy.deepcopy(model)
        for name in blocks:
            other.get_submodule(name).register_forward_hook(
                lambda _, a, out, seen=seen: seen.append((a[0].shape, out.shape))
            )
        output(other, x)
        shapes.append(seen)
    assert shapes[0] == shapes[1] and len(shapes[0]) == len(blocks)


def test_repair_resets_the_statistics():
    """What the running statistics were before does not count."""
    module, x = randomised(ConvNet()), images(8, 8)
    found = []
    for offset in (0.0, 100.0):
        module.bn2.running_mean.fill_(offset)  # behind the site: nothing else depends on it
        model = compress(module, x, method="wanda", ratio=0.5, sites=conv_sites(module), repair=True).model
        found.append(model.bn2.running_mean)
    assert torch.equal(*found)


def test_repair_runs_where_the_network_is():
    module, x = randomised(ConvNet()), images(8, 8)
    report = compress(module, x, method="wanda", ratio=0.5, sites=conv_sites(module), repair=True)
    assert report.repaired_norms == 2
    assert {t.device.type for t in report.model.state_dict().values()} == {"cpu"}


def test_repair_does_not_leave_train_mode_on():
    module, x = randomised(ConvNet()).train(), images(8, 8)
    model = compress(module, x, method="wanda", ratio=0.5, sites=conv_sites(module), repair=True).model
    assert not any(layer.training for layer in model.modules())
    before = copy.deepcopy(model)
    model(10 * x)
    assert same_bits(model, before), "statistics go on moving"


def test_nothing_looks_at_labels_and_layer_norms_are_not_tuned():
    module, x, labels = built("vit"), images(8), torch.arange(8)
    found = [
        grail.compress(module, calibration=given, samples=8, method="wanda", ratio=0.5).model
        for given in (x, (x, labels), (x, labels.flip(0)))
    ]
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    for name, layer in module.named_modules():
        if isinstance(layer, nn.LayerNorm):
            assert same_bits(layer, found[0].get_submodule(name)), name


def test_hooks_and_solves_are_not_copied_into_families():
    """A family lists sites: it runs nothing, counts nothing, solves nothing."""
    folder = Path(grail.__file__).parent / "families"
    for file in ("resnet.py", "vit.py"):
        tree = ast.parse((folder / file).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"compensation", "statistics", "selectors", "reduction", "grail_kernels"}
        called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not {name for name in called if "hook" in name or "solve" in name or name == "forward"}, file


def test_overflow_advises_what_there_is():
    """A module has its dtype from whoever gives it; `--dtype` is an option of language models."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.full((16, 4), 3e38)
    with pytest.raises(GrailError, match="give the network in float32") as caught:
        grail.compress(net, method="gram", ratio=0.5, calibration=inputs, sites=[grail.channels("0", "2", width=8)])
    assert "--dtype" not in str(caught.value)
