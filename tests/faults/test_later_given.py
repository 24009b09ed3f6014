"""What is given in memory, under a name of the hub's, or with a processor's own ideas of an image."""

from __future__ import annotations

import json
import logging
import types

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlamaForCausalLM

import grail
from grail.calibration.image_files import decode
from grail.calibration.processor import preprocessing_of
from grail.errors import GrailError
from grail.page.axis import linear
from grail.replacing import refuse_part_of
from grail.serving.push import push
from tests.tiny import tiny_model
from tests.tiny_hf import PROCESSOR

IDS = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))


class Adapted(nn.Linear):
    """A linear layer that adds something of low rank, the weight under its usual name."""

    @classmethod
    def of(cls, layer: nn.Linear) -> Adapted:
        made = cls(layer.in_features, layer.out_features, bias=False)
        made.weight = layer.weight
        made.down, made.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        return made

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Doubled(LlamaForCausalLM):
    def forward(self, *given, **named):
        found = super().forward(*given, **named)
        found.logits = 2 * found.logits
        return found


def adapted(model):
    model.model.layers[0].mlp.down_proj = Adapted.of(model.model.layers[0].mlp.down_proj)


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: 3 * out)


def hooked_before(model):
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def patched(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: -type(self).forward(self, x), mlp)


def doubled(model):
    model.__class__ = Doubled


def compressed(model):
    return grail.compress(model, calibration=IDS, ratio=0.5, eval="none")


class TestFunctions:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (adapted, r"model\.layers\.0\.mlp\.down_proj has a class of its own \(Adapted\)"),
            (hooked, r"model\.layers\.0\.mlp has a hook"),
            (hooked_before, r"model\.layers\.1\.mlp\.down_proj has a hook"),
            (patched, r"model\.layers\.1\.mlp has a forward of its own"),
            (doubled, r"Doubled has a class of its own \(Doubled\)"),
        ],
    )
    def test_a_model_that_is_more_than_its_weights_is_refused(self, change, named):
        model = tiny_model()
        change(model)
        with pytest.raises(GrailError, match=rf"^(LlamaForCausalLM|Doubled): {named}, .* \(logits [\d.]+% off\)"):
            compressed(model)

    def test_hooks_that_only_look_are_no_matter_nor_is_training(self):
        model, seen = tiny_model(), []
        model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: seen.append(1))
        model.train()
        model.model.layers[1].eval()
        report = compressed(model)
        assert report.model is not model and seen
        assert model.training and model.model.layers[0].mlp.training and not model.model.layers[1].mlp.training

    def test_a_compiled_model_is_not_compiled_for_it(self):
        model = torch.compile(tiny_model(), backend=lambda graph, inputs: pytest.fail("compiled"))
        assert compressed(model).model is not model

    def test_in_16_bits_rounding_is_no_other_function(self):
        model = tiny_model().to(torch.bfloat16)
        model.model.layers[0].register_forward_hook(lambda module, given, out: None)
        assert compressed(model).model.dtype == torch.bfloat16


@pytest.mark.parametrize("pair", [(20.0, 20.000000000000004), (0.0, 5e-324), (5e-324, 1e-323), (-1e-300, 1e-300)])
def test_values_next_to_each_other_have_an_axis(pair):
    axis = linear(pair)
    assert axis.low < axis.high and all(0 <= axis.at(value) <= 1 for value in pair)
    assert len(set(axis.ticks)) == len(axis.ticks) > 1


@pytest.mark.parametrize("name", ["me/x--y", "me/x.git", "mé/名", "./.", "me/.", "me/-x", f"me/{'x' * 100}", "me/a..b"])
def test_a_name_that_the_hub_refuses_is_none(name, tmp_path):
    with pytest.raises(GrailError, match="is no name for the hub"):
        push(tmp_path, name, dry_run=True)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_config.json"])
def test_nothing_is_written_under_a_name_that_would_be_loaded(name, tmp_path):
    with pytest.raises(GrailError, match="would be taken for a file of the checkpoint"):
        refuse_part_of(tmp_path, tmp_path / name, ".html")
    refuse_part_of(tmp_path / "other", tmp_path / name, ".html")


class TestProcessors:
    def read(self, folder, found):
        (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **found}))
        return preprocessing_of(folder, 3)

    @pytest.mark.parametrize(
        ("kind", "found"),
        [("CLIPImageProcessor", "bicubic"), ("BitImageProcessor", "bicubic"), ("ViTImageProcessor", "bilinear")],
    )
    def test_what_is_not_said_is_the_processors_own(self, kind, found, tmp_path):
        told = {name: value for name, value in PROCESSOR.items() if name != "resample"} | {"image_processor_type": kind}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
        assert preprocessing_of(tmp_path, 3).interpolation == found

    @pytest.mark.parametrize(
        ("found", "said"), [({"do_resize": False}, "does not resize"), ({"do_resize": None}, "does not resize"),
                            ({"resample": 0}, "resample 0"), ({"resample": 1}, "resample 1")],
    )  # fmt: skip
    def test_what_is_done_otherwise_is_said(self, found, said, tmp_path, caplog):
        caplog.set_level(logging.WARNING, logger="grail")
        self.read(tmp_path, found)
        assert said in caplog.text

    def test_an_image_beyond_all_sizes_is_not_called_damaged(self, tmp_path):
        Image.new("1", (20000, 20000)).save(tmp_path / "large.png")
        with pytest.raises(GrailError, match=r"large\.png has more than 67,108,864 pixels; make it smaller"):
            decode(tmp_path / "large.png")
