"""What the fourth round of looking for trouble found, where no other file is about it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from grail.evaluate import evaluate
from grail.modules.evaluate import evaluate_folders
from grail.terminal import before_after
from grail_kernels import CrossAccumulator, GramAccumulator, MatrixRows, PackedSymmetric, ridge_solve, ridge_solve_
from tests.test_gguf_export import byte_level, with_tokenizer
from tests.tiny import tiny_checkpoint


class Adapted(nn.Module):
    """A linear layer and something of low rank beside it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class WithNames(Adapted):
    """As peft's, whose attributes are those of what it wraps."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("wrap", [Adapted, WithNames])
@pytest.mark.parametrize("place", ["mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj"])
def test_a_block_one_of_whose_layers_is_wrapped_stays_as_it_is(wrap, place):
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "num_heads": 4, "depth": 2}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).eval()
    owner, leaf = (module.blocks[0].get_submodule(place.split(".")[0]), place.split(".")[1])
    setattr(owner, leaf, wrap(getattr(owner, leaf)))
    report = grail.compress(module, ratio=0.5, method="wanda", calibration=torch.randn(20, 1, 28, 28), target="own")
    assert [site["name"] for site in report.sites] == ["blocks.1.attn", "blocks.1.mlp"]


@pytest.mark.parametrize("loader", [[], iter(()), torch.utils.data.DataLoader([])], ids=["list", "iterator", "loader"])
def test_nothing_to_calibrate_with(loader):
    with pytest.raises(GrailError, match="give at least one"):
        grail.compress(linear(), sites=[grail.channels("0", "2", width=8)], calibration=loader, method="wanda")


def test_a_nested_tensor_is_no_calibration():
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
    with pytest.raises(GrailError, match=r"calibration: a nested tensor is not read"):
        grail.compress(linear(), sites=[grail.channels("0", "2", width=8)], calibration=nested, method="wanda")


def test_a_folder_is_no_file_of_weights(tmp_path):
    with pytest.raises(GrailError, match=r"--weights .* is a folder; name a .safetensors file in it"):
        grail.compress("timm/resnet10t", weights=str(tmp_path), output=str(tmp_path / "out"), calibration="builtin")


@pytest.mark.parametrize("width", [1.5, "3", True, [4]])
def test_widths_of_accumulators_are_whole_numbers(width):
    for make in (GramAccumulator, lambda given: CrossAccumulator(3, given), PackedSymmetric):
        with pytest.raises(TypeError, match="must be a whole number"):
            make(width)


def test_a_packed_matrix_is_made_of_a_tensor():
    with pytest.raises(TypeError, match=r"the matrix is a list; give a torch\.Tensor"):
        PackedSymmetric.from_dense([[1.0]])


def test_a_right_hand_side_with_a_history_has_none_afterwards():
    a, rhs = torch.eye(3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    rows = MatrixRows(3, a.device, lambda start, end: a[start:end])
    solved = ridge_solve_(rows, rhs, 1.0).solution
    assert not solved.requires_grad and torch.allclose(solved, torch.full_like(solved, 0.5))


def test_lambda_is_a_number():
    with pytest.raises(TypeError, match="λ must be a number, or one for each problem, got 'x'"):
        ridge_solve(torch.eye(3), torch.ones(3, 2), "x")


def test_a_model_is_not_compared_with_itself(tmp_path):
    with pytest.raises(GrailError, match="--against one is the model itself; name another, or leave it out"):
        evaluate("one", against="one")
    with pytest.raises(GrailError, match="--against one is the model itself"):
        evaluate_folders("one", data=None, samples=None, against="one", speed=False)


def test_sizes_of_small_networks_can_be_read():
    assert before_after(42_200, 32_400) == "42.2 k -> 32.4 k (-23.2%)"
    assert before_after(538_000_000, 416_000_000, "B") == "538.0 MB -> 416.0 MB (-22.7%)"


FAR_BEYOND = """
import resource, sys
from pathlib import Path
from grail.errors import GrailError
from grail.serving.vocabulary import vocabulary
import transformers.models.auto.tokenization_auto
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    vocabulary(Path(sys.argv[1]), 400)
except GrailError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_an_id_far_beyond_the_embedding_takes_no_memory(tmp_path):
    folder = with_tokenizer(tiny_checkpoint(tmp_path / "dense", num_key_value_heads=6, vocab_size=400), byte_level())
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["vocab"]["P"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(described))
    done = subprocess.run([sys.executable, "-c", FAR_BEYOND, folder], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "tokenizer.json: 'P' has the id 2147483648, the embedding has 400 rows" in done.stderr
