"""What was found in networks in memory by looking for trouble, each by itself."""

from __future__ import annotations

import copy
import io
import itertools
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import ViTConfig, ViTForImageClassification

import grail
import grail.modules.run
from grail.calibration.captions import captions
from grail.errors import GrailError
from grail.families import describe
from grail.families.network import ModuleSite
from grail.modules.architecture import open_network
from grail.modules.recipe import ModuleRecipe
from grail.recipe import Recipe
from tests import tiny_hf


class Net(nn.Module):
    """Two sites: a convolution behind a BatchNorm, and an MLP on a residual stream."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 2, 1)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm1(self.conv1(x)))).flatten(2).transpose(1, 2)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(x.mean(1))


def sites(**mlp) -> list:
    return [
        grail.channels("conv1", "conv2", width=8, norms=["norm1"]),
        grail.channels("fc1", "fc2", **{"width": 12, "stream": ("fc1", "input")} | mlp),
    ]


def net(make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(1)
    return make().eval()


def images(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def compressed(module: nn.Module, x: object = None, **flags):
    given = {"method": "wanda", "ratio": 0.5, "sites": sites(), "calibration": images() if x is None else x}
    return grail.compress(module, **given | flags)


def refuse(match: str, module: nn.Module | None = None, x: object = None, **flags) -> None:
    """In one sentence that holds `match`."""
    with pytest.raises(GrailError, match=match) as caught:
        compressed(net() if module is None else module, x, **flags)
    assert "\n" not in str(caught.value)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Activating(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class Early(Net):
    """What fc2 reads is activated by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm1(self.conv1(x)))).flatten(2).transpose(1, 2)
        return self.head((x + self.fc2(self.fc1(x))).mean(1))


class Repeated(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm1(self.conv1(x)))).flatten(2).transpose(1, 2)
        for scale in (0.01, 50):
            x = x + self.fc2(torch.relu(self.fc1(scale * x)))
        return self.head(x.mean(1))


def with_consumer(layer: Callable[[int, int], nn.Module], make: Callable[[], nn.Module] = Net) -> nn.Module:
    module = net(make)
    module.fc2 = layer(12, 8)
    return module


def hooked(change: Callable) -> nn.Module:
    module = net()
    module.fc2.register_forward_hook(lambda _, __, output: change(output))
    return module


MAKES = {
    "a hook": lambda: hooked(lambda y: -y),
    "a scale": lambda: with_consumer(Scaled),
    "an activation": lambda: with_consumer(Activated),
}


class TestConsumers:
    """A repair solves for W of W x + b, x being what the layer reads at its first call."""

    @pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
    def test_an_output_that_is_no_product_takes_no_stream(self, make):
        said = r"fc1: the output of fc2 is not its weight times its input.*sites="
        refuse(said, make())
        refuse(said, make(), target="stream")

    @pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
    @pytest.mark.parametrize("target", ["dense", "own"])
    def test_nor_a_bias(self, make, target):
        refuse("fc1: the output of fc2 is not its weight.*bias", make(), target=target, bias=True)
        report = compressed(make(), target=target)
        assert all(site["error_after"] < site["error_before"] for site in report.sites)

    def test_a_hook_on_what_the_consumer_reads_is_seen(self):
        module = net(Early)
        module.fc2.register_forward_pre_hook(lambda _, given: (given[0].relu(),))
        for target in ("stream", "dense"):
            report = compressed(module, target=target, bias=True)
            assert report.sites[1]["error_after"] < report.sites[1]["error_before"]

    @pytest.mark.parametrize("target", ["dense", "own", "stream", None])
    def test_an_input_that_is_changed_on_the_way(self, target):
        refuse("fc1: fc2 changes what it reads", with_consumer(Activating, Early), target=target)
        compressed(with_consumer(Activating, Early), compensate=False)

    @pytest.mark.parametrize("target", ["dense", "own", "stream", None])
    def test_a_layer_that_is_called_twice(self, target):
        refuse("fc1: fc2 is called 2 times", net(Repeated), target=target)
        compressed(net(Repeated), sites=sites()[:1])
        compressed(net(Repeated), mlp_ratio=0.5, sites=sites(), compensate=False)


class Dense(nn.Module):
    """A block as DenseNet has them: it is given a list, and what it makes is no summand of anything."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, given: list[Tensor]) -> Tensor:
        return self.conv2(torch.relu(self.norm(self.conv1(torch.cat(given, 1)))))


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.fc = nn.ModuleList([Dense(3), Dense(7)]), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for block in self.blocks:
            found.append(block(found))
        return self.fc(torch.cat(found, 1).mean((2, 3)))


class Basic(nn.Module):
    """A block as DLA has them: what it adds to is given to it from outside."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + shortcut)


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.blocks, self.fc = nn.Conv2d(3, 3, 1), nn.ModuleList([Basic(), Basic()]), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.project(x))
        return self.fc(x.mean((2, 3)))


class OneWrong(Tree):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x, self.project(x))
        return self.fc(self.blocks[1](x, x).mean((2, 3)))


class TestGuessedStreams:
    @pytest.mark.parametrize("make", [Concatenating, Tree])
    def test_one_that_is_none_gives_way_to_dense(self, make, tmp_path, caplog):
        caplog.set_level(logging.WARNING, logger="grail")  # a command that was told to be quiet may have run before
        module, flags = net(make), {"sites": None, "eval": "none"}
        report = compressed(module, output=str(tmp_path / "out"), **flags)
        assert "taking --target dense" in caplog.text
        told = json.loads((tmp_path / "out" / "grail.json").read_text())
        assert told["recipe"]["target"] == "dense" and told["calibration"]["images"] == 24
        asked = compressed(module, target="dense", **flags).model.state_dict()
        assert all(torch.equal(asked[name], tensor) for name, tensor in report.model.state_dict().items())

    def test_only_the_wrong_one_does(self, caplog):
        caplog.set_level(logging.INFO, logger="grail")
        module = net(OneWrong)
        report = compressed(module, sites=None)
        assert "taking --target dense for 1 of 2 sites" in caplog.text and report.recipe.target == "stream"
        sites = [site for network in describe(module) for site in network.sites]
        guesses = [replace(sites[0], stream=None, scales=()), *sites[1:]]
        by_hand = compressed(module, sites=guesses).model.state_dict()
        assert all(torch.equal(by_hand[name], tensor) for name, tensor in report.model.state_dict().items())
        dense = compressed(module, sites=None, target="dense").model.state_dict()
        assert not torch.equal(dense["blocks.1.conv2.weight"], by_hand["blocks.1.conv2.weight"])

    @pytest.mark.parametrize("make", [Concatenating, Tree])
    def test_but_not_where_it_was_asked_for(self, make):
        for flags in ({"target": "stream"}, {"alpha": 0.5}):
            refuse("blocks.0.conv1.*is not added.*--target", net(make), sites=None, **flags)

    def test_one_that_was_described_is_refused(self):
        refuse("fc1: what fc2 makes is not added", sites=sites(stream=("fc2", "input")))


class TestCalibration:
    @pytest.mark.parametrize("kind", [np.float32, np.float64, np.dtype(">f4"), np.dtype("<f8").newbyteorder(">")])
    def test_arrays(self, kind, tmp_path):
        """Also with an output, and the accuracy that is asked for by default."""
        report = compressed(net(), images().numpy().astype(kind), output=str(tmp_path / "out"))
        assert report.evaluation is None
        wanted = compressed(net()).model.state_dict()
        assert all(torch.allclose(wanted[name], t, atol=1e-5) for name, t in report.model.state_dict().items())

    def test_arrays_that_run_backwards_and_of_pixels(self):
        preprocessing = grail.Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3)
        pixels = (images().numpy()[::-1] > 0).astype(np.uint8)
        compressed(net(), pixels, preprocessing=preprocessing)
        compressed(net(), images().numpy()[::-1])

    def test_arrays_for_several_towers(self):
        module = tiny_hf.KINDS["clip"].build()
        size = module.config.vision_config.image_size
        given = torch.randn(6, 3, size, size)
        ids = tiny_hf.inputs_of(next(n for n in describe(copy.deepcopy(module)) if n.reads == "text"), 6)
        flags = {"method": "wanda", "ratio": 0.5, "calibration_text": ids, "eval": "none"}
        found = [grail.compress(module, calibration=x, **flags).model.state_dict() for x in (given, given.numpy())]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    UNJOINED: ClassVar = {
        "ranks": lambda: [images()[0], images(3)],
        "sizes": lambda: [images()[0], images()[1][:, :4]],
        "sizes of batches": lambda: [images(2), images(2)[:, :, :4]],
        "labels of floats": lambda: (images(), torch.rand(24)),
        "single numbers": lambda: [torch.tensor(1.0), torch.tensor(2.0)],
        "another rank later": lambda: iter([torch.randn(2, 5), torch.randn(2, 5, 5)]),
    }

    @pytest.mark.parametrize("make", UNJOINED.values(), ids=UNJOINED)
    def test_tensors_that_do_not_join(self, make):
        refuse("^calibration: tensors of .* cannot be joined", x=make())

    @pytest.mark.parametrize(
        "empty",
        [torch.zeros(0, 3, 8, 8), torch.zeros(0, 7), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)],
        ids=lambda t: f"{t.dim()}-{t.dtype}",
    )
    def test_a_loader_of_empty_batches_ends(self, empty):
        refuse("calibration: batch 0 .*is empty", x=(empty for _ in itertools.count()))

    def test_a_later_batch_that_is_none(self):
        refuse("calibration: batch 1 is no tensor", x=iter([torch.randn(4, 5), 3]))
        refuse("calibration: batch 1 is empty", x=iter([torch.randn(4, 5), torch.zeros(0, 5)]))

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda x: x.to("meta"), "meta device"),
            (lambda x: [x[:2], x[2:].to("meta")], "meta device"),
            (lambda x: x.to_sparse(), "sparse"),
            (lambda x: x.to(torch.float8_e4m3fn), "float8"),
            (lambda x: (x > 0).to(torch.uint8).to("meta"), "meta device"),
            (lambda x: (x > 0).to(torch.uint8).to_sparse(), "sparse"),
            (lambda x: x.numpy().astype(object), "uint8 or float"),
        ],
    )
    def test_tensors_without_plain_numbers(self, make, said):
        refuse(said, x=make(images()))

    def test_token_ids_without_data(self):
        for ids in (torch.zeros(3, 4, dtype=torch.long, device="meta"), torch.eye(3).long().to_sparse()):
            with pytest.raises(GrailError, match=r"^--calibration-text: a (tensor on the meta|sparse)"):
                captions(ids, None, 3, 0, 2)


class TestFactories:
    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, tmp_path_factory):
        timm = pytest.importorskip("timm")
        sizes = {"num_classes": 3, "img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3}
        file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
        module = timm.create_model("vit_tiny_patch16_224", **sizes)
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)
        return str(file)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("global_pool", "xx"),
            ("num_heads", 5),
            ("num_heads", 0),
            ("img_size", [32]),
            ("img_size", 10**6),
            ("depth", 10**8),
            ("num_classes", 10**12),
            ("mlp_ratio", float("nan")),
            ("mlp_ratio", 10**5000),
        ],
        ids=lambda value: str(value)[:20] if not isinstance(value, int) or value < 10**20 else "huge",
    )
    def test_options_that_make_no_network(self, weights, option, value):
        with pytest.raises(GrailError, match=option) as caught:
            open_network("timm/vit_tiny_patch16_224", weights, {option: value})
        assert "\n" not in str(caught.value)


SWITCHES = ("compensate", "strict", "compare_pruned", "overwrite", "resume", "profile", "bias", "repair", "one_shot")
COUNTS = ("samples", "sweeps", "seq_len", "round_to", "head_multiple", "seed", "batch")


class TestOptions:
    @pytest.mark.parametrize("kind", [Recipe, ModuleRecipe])
    @pytest.mark.parametrize("value", [2**31, 2**63, 10**30, 10**5000], ids=["2**31", "2**63", "10**30", "10**5000"])
    def test_numbers_that_torch_cannot_count_to(self, kind, value):
        for option in set(COUNTS) & {f.name for f in fields(kind)}:
            with pytest.raises(GrailError, match=f"^--{option.replace('_', '-')} must be a whole number"):
                kind(model=None, **{option: value})

    @pytest.mark.parametrize("kind", [Recipe, ModuleRecipe])
    @pytest.mark.parametrize("value", ["x", 1, 0.0, [True]], ids=str)
    def test_what_is_neither_true_nor_false(self, kind, value):
        for option in set(SWITCHES) & {f.name for f in fields(kind)}:
            with pytest.raises(GrailError, match=f"^--{option.replace('_', '-')} must be True or False"):
                kind(model=None, **{option: value})

    @pytest.mark.parametrize("option", ["ratio", "attn_ratio", "mlp_ratio", "residual_ratio", "alpha", "ridge"])
    @pytest.mark.parametrize("value", [10**400, 10**5000], ids=["10**400", "10**5000"])
    def test_numbers_beyond_a_float(self, option, value):
        with pytest.raises(GrailError, match=f"^--{option.replace('_', '-')} must be"):
            ModuleRecipe(model=None, **{option: value})

    @pytest.mark.parametrize("value", [None, "x", [1]], ids=str)
    def test_set_is_a_mapping(self, value):
        refuse("^--set must be a mapping", set=value)

    @pytest.mark.parametrize("value", [None, 10**400, [1]], ids=["None", "huge", "list"])
    def test_of_values_of_its_kind(self, value):
        refuse("^--set damping=.*: expected", method="gram", set={"damping": value})

    @pytest.mark.parametrize("flags", [{}, {"target": "dense"}, {"target": "stream"}], ids=str)
    def test_samples_are_a_number(self, flags):
        refuse("^--samples must be a whole number", samples=None, **flags)

    @pytest.mark.parametrize("value", ["x", 3])
    def test_preprocessing(self, value, tmp_path):
        refuse("preprocessing must be", preprocessing=value)
        refuse("preprocessing must be", preprocessing=lambda x: x, output=str(tmp_path / "out"))
        assert not list(tmp_path.iterdir())
        compressed(net(), preprocessing=lambda x: x)

    def test_alpha_without_a_repair(self):
        refuse("^--alpha .* --no-compensate", compensate=False, alpha=0.3)
        assert Recipe(model=None, compensate=False, alpha=0.3).alpha == 0.3, "a language model takes it as before"

    def test_alpha_beside_a_network_that_is_only_pruned(self, tmp_path):
        source = tmp_path / "images"
        for label in "ab":
            (source / label).mkdir(parents=True)
            for i in range(8):
                pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(source / label / f"{i}.png")
        flags = {"eval": str(source), "preprocessing": grail.Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3)}
        report = compressed(net(), str(source), alpha=0.5, compare_pruned=True, **flags)
        assert set(report.evaluation["accuracy"]) == {"dense", "pruned", "compressed"}

    def test_weights_beside_a_module(self):
        refuse("^--weights", weights="x.safetensors")


def left(module: nn.Module) -> Tensor:
    """What a forward gave, with its graph."""
    return module(images(2))


def in_attribute(name: str, make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], object]:
    return lambda module: setattr(module, name, make(module))


def in_buffer(make: Callable[[nn.Module], Tensor], **options) -> Callable[[nn.Module], object]:
    return lambda module: module.register_buffer("extra", make(module), **options)


def pruned(layer: str, part: str) -> Callable[[nn.Module], object]:
    return lambda module: prune.random_unstructured(module.get_submodule(layer), part, amount=0.3)


class Nothing(Net):
    def forward(self, x: Tensor) -> None:
        super().forward(x)


@dataclass
class Found:
    logits: Tensor


class Classed(Net):
    def forward(self, x: Tensor) -> Found:
        return Found(super().forward(x))


class TestModules:
    COPIED: ClassVar = {
        "a list": in_attribute("kept", lambda m: [left(m)]),
        "a nested dict": in_attribute("kept", lambda m: {"a": ({"b": left(m)}, [left(m)])}),
        "an attribute": in_attribute("kept", left),
        "a buffer": in_buffer(left, persistent=False),
        "old weight norm": lambda m: nn.utils.weight_norm(m.head),
        "pruned": pruned("head", "weight"),
    }

    @pytest.mark.parametrize("change", COPIED.values(), ids=COPIED)
    def test_what_a_forward_has_left(self, change, tmp_path):
        """It is copied without its graph: to compress, to open again, and to load."""
        module = net()
        change(module)
        report = compressed(module, output=str(tmp_path / "out"))
        loaded, x = grail.load(tmp_path / "out", module), images(3, seed=5)
        with torch.no_grad():
            assert torch.allclose(loaded(x), report.model(x), atol=1e-6)

    UNCOPIED: ClassVar = {
        "a lock": (in_attribute("guard", lambda m: threading.Lock()), "attribute guard, a lock"),
        "a file": (in_attribute("log", lambda m: io.TextIOWrapper(io.BytesIO())), "attribute log, a TextIOWrapper"),
        "a generator": (lambda m: setattr(m.fc1, "steps", (i for i in range(3))), r"attribute fc1\.steps, a generator"),
    }

    @pytest.mark.parametrize(("change", "said"), UNCOPIED.values(), ids=UNCOPIED)
    def test_attributes_that_cannot_be_copied(self, change, said):
        module = net()
        change(module)
        refuse(f"{said}.*take it off", module)

    UNSTORED: ClassVar = {
        "complex": (in_buffer(lambda m: torch.ones(3, dtype=torch.complex64)), "extra is torch.complex64"),
        "sparse": (in_buffer(lambda m: torch.eye(3).to_sparse()), "extra is sparse"),
        "sparse rows": (in_buffer(lambda m: torch.eye(3).to_sparse_csr()), "extra is sparse"),
    }

    @pytest.mark.parametrize(("change", "said"), UNSTORED.values(), ids=UNSTORED)
    def test_tensors_that_no_file_holds(self, change, said, tmp_path, monkeypatch):
        """They are told before the work, and do not matter where nothing is written."""
        module = net()
        change(module)
        compressed(module)
        monkeypatch.setattr(grail.modules.run, "towers_of", lambda *_, **__: pytest.fail("there was work"))
        refuse(said, module, output=str(tmp_path / "out"))
        assert not list(tmp_path.iterdir())

    def test_unsigned_integers_are_stored(self, tmp_path):
        module = net()
        in_buffer(lambda m: torch.arange(3).to(torch.uint16))(module)
        compressed(module, output=str(tmp_path / "out"))
        assert grail.load(tmp_path / "out", module=module).extra.tolist() == [0, 1, 2]

    NONE: ClassVar = {
        "without data": (lambda: net().to("meta"), r"conv1\.weight holds no data"),
        "lazy": (lambda: with_consumer(lambda _, outputs: nn.LazyLinear(outputs)), r"fc2\.weight has no shape"),
        "scripted": (lambda: torch.jit.script(net()), "compiled by TorchScript"),
        "traced": (lambda: torch.jit.trace(net(), images(2)), "compiled by TorchScript"),
        "no output": (lambda: net(Nothing), "output holds no tensor.*NoneType"),
        "an output of another class": (lambda: net(Classed), "output holds no tensor.*Found"),
    }

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("make", "said"), NONE.values(), ids=NONE)
    def test_modules_that_cannot_be_compressed(self, make, said):
        refuse(said, make())

    @pytest.mark.parametrize("layer", ["fc1", "fc2"])
    @pytest.mark.parametrize("flags", [{}, {"bias": True}], ids=str)
    def test_a_bias_that_is_made_anew(self, layer, flags):
        module = net()
        pruned(layer, "bias")(module)
        refuse(f"fc1: {layer} makes its bias anew", module, **flags)

    def test_parameters_of_inference_mode(self):
        with torch.inference_mode():
            module = net()
        compressed(module)


CHANNELS = {
    "width": (12.0, None, True, 0, -1, "12", 2**63),
    "size": (None, 1.0, 0, [1]),
    "sections": (None, 1.0, {}, 0),
    "norms": (None, 3, "norm1", [3], {"a": 1}),
    "name": (3, ("a",), "\ud800"),
    "layer": (float("inf"), None, -1, 1.5, 2**63),
    "stream": (3, ("fc1",), "ab", (1, 2)),
    "scales": (None, 3, "fc1", [None]),
}


class TestDescriptions:
    """One sentence that names the site and the argument."""

    @pytest.mark.parametrize(
        ("argument", "value"), [(a, v) for a, values in CHANNELS.items() for v in values], ids=ascii
    )
    def test_channels(self, argument, value):
        with pytest.raises(GrailError, match=f"^(fc1|a site): (each of )?{argument} must be"):
            grail.channels("fc1", "fc2", **{"width": 12} | {argument: value})

    @pytest.mark.parametrize("producer", [None, [], 3, [None], nn.Linear(2, 2)], ids=str)
    def test_producers(self, producer):
        for make in (
            lambda: grail.channels(producer, "fc2", width=12),
            lambda: grail.heads(producer, "fc2", count=3, size=4),
        ):
            with pytest.raises(GrailError, match=r"^(fc2|a site): (each of )?producer "):
                make()

    @pytest.mark.parametrize("consumer", [None, ["fc2"], 3])
    def test_consumers(self, consumer):
        with pytest.raises(GrailError, match=r"^fc1: consumer must be a name"):
            grail.channels("fc1", consumer, width=12)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("count", 3.0),
            ("size", None),
            ("counts", 3),
            ("counts", ["fc1"]),
            ("counts", "ab"),
            ("counts", [("fc1",)]),
            ("widths", [3]),
            ("layer", float("nan")),
        ],
        ids=ascii,
    )
    def test_heads(self, argument, value):
        with pytest.raises(GrailError, match=f"^fc2: (each of )?{argument} must be"):
            grail.heads("fc1", "fc2", **{"count": 3, "size": 4} | {argument: value})

    @pytest.mark.parametrize(
        ("argument", "value"), [("width", None), ("norms", 3), ("reader_norms", [3]), ("name", 3)], ids=ascii
    )
    def test_residual(self, argument, value):
        with pytest.raises(GrailError, match=f"(each of )?{argument} must be"):
            grail.residual(["a"], ["b"], **{"width": 8, "name": "stream"} | {argument: value})

    @pytest.mark.parametrize(
        "given", [sites()[0], "fc1", {"fc1": sites()[0]}, 3, [3], ["fc1"], [None], sites()[0].to_json()], ids=str
    )
    def test_sites_are_a_list_of_them(self, given):
        refuse("^sites must be a list", sites=given)

    def test_any_iterable_of_them_will_do(self):
        compressed(net(), sites=(site for site in sites()))

    def test_scales_of_another_width(self):
        refuse("fc1: fc1 does not scale what fc2 makes", sites=sites(scales=["fc1"]))

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("producers", 0, "rows_per_unit"), {}),
            (("producers", 0, "rows_per_unit"), True),
            (("producers", 0, "sections"), {}),
            (("producers", 0, "name"), 3),
            (("producers",), []),
            (("units", "size"), {}),
            (("units", "per_group"), 12.0),
            (("units", "groups"), None),
            (("stream",), 3),
            (("stream",), "ab"),
            (("counts",), [["fc1"]]),
            (("layer",), float("inf")),
            (("name",), ["fc1"]),
            (("kind",), "other"),
            (("scales",), 3),
        ],
        ids=ascii,
    )
    def test_what_a_file_says(self, place, value):
        found = json.loads(json.dumps(sites()[1].to_json()))
        inner = found
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        with pytest.raises(ValueError, match=r"fc1|a site"):
            ModuleSite.from_json(found)


class TestConfigurations:
    @pytest.fixture(scope="class")
    @classmethod
    def small(cls, tmp_path_factory):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        module = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
        folder = tmp_path_factory.mktemp("result") / "small"
        grail.compress(module, output=str(folder), calibration=torch.rand(4, 3, 16, 16), method="wanda", eval="none")
        return folder

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("hidden_dropout_prob", float("nan")),
            ("hidden_dropout_prob", 2.0),
            ("attention_probs_dropout_prob", -1),
            ("initializer_range", float("inf")),
            ("pooler_act", "\ud800"),
            ("id2label", {"0": ["a", float("inf")]}),
        ],
    )
    def test_numbers_that_show_only_when_the_network_runs(self, small, field, value):
        file = small / "config.json"
        before = file.read_text()
        config = json.loads(before)
        config["architecture"]["options"]["config"][field] = value
        try:
            file.write_text(json.dumps(config))
            with pytest.raises(GrailError, match=r"config\.json: transformers/ViT.*(configuration|written as JSON)"):
                grail.load(small)
        finally:
            file.write_text(before)


class TestNumbersAndMemory:
    def test_no_memory_is_no_fault_of_an_attribute(self, monkeypatch):
        def deepcopy(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr("grail.families.copies.copy.deepcopy", deepcopy)
        with pytest.raises(torch.OutOfMemoryError):
            compressed(net())

    def test_eight_bit_floats_are_looked_at(self):
        from grail.modules.verify import check_numbers

        layer = torch.nn.Linear(4, 4)
        layer.weight = torch.nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
        check_numbers(layer)
        layer.weight.data.view(torch.uint8)[0, 0] = 0x7F
        with pytest.raises(GrailError, match="tensor weight holds NaN"):
            check_numbers(layer)

    def test_whole_numbers_of_numpy_are_whole_numbers(self):
        site = grail.channels("a", "b", width=np.int64(4))
        assert type(site.units.per_group) is int
