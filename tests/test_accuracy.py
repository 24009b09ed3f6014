"""Accuracy and agreement with known answers, multiply-accumulates counted by hand, latencies that rank right."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from grail.errors import GrailError
from grail.evaluation.accuracy import accuracy, agreement
from grail.evaluation.macs import latency, macs


def scores(labels: list[int], classes: int) -> torch.Tensor:
    """Images [N, classes, 1, 1] which are their own logits: the class `labels` first, then 0, 1, 2, ..."""
    x = -torch.arange(float(classes)).repeat(len(labels), 1)
    x[torch.arange(len(labels)), labels] = 1.0
    return x[:, :, None, None]


class Itself(nn.Flatten):
    """Gives its input as logits."""


class TestAccuracy:
    def test_known_answer(self):
        # predicted 0, then 7: wanted 0 (top-1), 3 (top-5), 3 (top-5: 7 0 1 2 3), 4 (not: 7 0 1 2 3)
        batches = scores([0, 0, 7, 7], 10).split(3)
        assert accuracy(Itself(), iter(batches), torch.tensor([0, 3, 3, 4])) == {"top1": 0.25, "top5": 0.75, "count": 4}

    def test_no_top5_below_ten_classes(self):
        found = accuracy(Itself(), [scores([1, 2], 9)], torch.tensor([1, 1]))
        assert found == {"top1": 0.5, "count": 2}

    def test_outputs_of_transformers(self):
        class Wrapped(nn.Module):
            def forward(self, x):
                return SimpleNamespace(logits=x.flatten(1))

        assert accuracy(Wrapped(), [scores([1], 3)], torch.tensor([1]))["top1"] == 1.0

    def test_modes_are_restored_and_dropout_is_off(self):
        model = nn.Sequential(nn.Dropout(0.99), nn.BatchNorm2d(12), Itself()).train()
        model[1].eval()
        labels = list(range(12))
        assert accuracy(model, [scores(labels, 12)], torch.tensor(labels))["top1"] == 1.0
        assert [module.training for module in model.modules()] == [True, True, False, True]
        with pytest.raises(GrailError):
            accuracy(model, [], torch.tensor([1]))
        assert model.training

    def test_no_gradients(self):
        class Checked(Itself):
            def forward(self, x):
                assert not torch.is_grad_enabled()
                return super().forward(x)

        accuracy(Checked(), [scores([1], 3)], torch.tensor([1]))

    @pytest.mark.parametrize(
        ("batch", "labels", "sentence"),
        [
            (scores([1, 2], 4), [1, 4], "labels run to 4, but the model has 4 outputs"),
            (scores([1, 2], 4), [1], "at least 2 images for 1 labels"),
            (scores([1, 2], 4), [1, 2, 3], "2 images for 3 labels"),
            (scores([1], 4) / 0, [1], "not finite"),
            (torch.zeros(0, 4, 1, 1), [], "0 images for 0 labels"),
        ],
    )
    def test_refusals(self, batch, labels, sentence):
        with pytest.raises(GrailError, match=sentence):
            accuracy(Itself(), [batch], torch.tensor(labels, dtype=torch.int64))

    def test_refuses_what_is_no_classifier(self):
        with pytest.raises(GrailError, match=r"gives \[1, 4, 1, 1\] where \[images, classes\]"):
            accuracy(nn.Identity(), [scores([1], 4)], torch.tensor([1]))


class TestAgreement:
    def test_share_of_equal_predictions(self):
        reverse = nn.Sequential(Itself(), nn.Linear(3, 3, bias=False)).train()
        reverse[1].weight.data = torch.eye(3).flip(0)
        assert agreement(Itself(), reverse, scores([0, 1, 1, 2], 3).split(3)) == 0.5
        assert reverse.training and reverse[1].training

    def test_refusals(self):
        with pytest.raises(GrailError, match="3 and 2 classes"):
            agreement(Itself(), nn.Sequential(Itself(), nn.Linear(3, 2)), [scores([1], 3)])
        with pytest.raises(GrailError, match="no images"):
            agreement(Itself(), Itself(), [])


class TestMacs:
    def test_convolution_and_linear_layer_for_one_image(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 10)
        )
        assert macs(model, torch.zeros(5, 3, 8, 8)) == 3 * 8 * 9 * 16 + 128 * 10

    def test_attention_counts_in_timms_vit(self):
        depth, width, tokens, mlp = 2, 192, 17, 768
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=depth, num_classes=10)
        block = tokens * width * (4 * width + 2 * mlp) + 2 * tokens * tokens * width
        assert macs(model, torch.zeros(1, 3, 64, 64)) == depth * block + 16 * width * 3 * 256 + width * 10

    def test_attention_counts_in_torchs_layers(self):
        width, tokens, mlp = 32, 6, 64
        layer = nn.TransformerEncoderLayer(width, 4, mlp, batch_first=True)
        wanted = tokens * width * (4 * width + 2 * mlp) + 2 * tokens * tokens * width
        assert macs(layer, torch.zeros(3, tokens, width)) == wanted
        assert torch.backends.mha.get_fastpath_enabled() and layer.training


class TestLatency:
    def test_slower_module_takes_longer_and_rounds_are_interleaved(self):
        calls = []

        class Sleeps(nn.Module):
            def __init__(self, label: str, seconds: float):
                super().__init__()
                self.label, self.seconds = label, seconds

            def forward(self, x):
                calls.append(self.label)
                time.sleep(self.seconds)

        found = latency({"fast": Sleeps("fast", 0.001), "slow": Sleeps("slow", 0.02)}, torch.zeros(1), rounds=3)
        assert calls == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
        assert list(found["fast"]) == ["p20", "p50", "p80"]
        assert 0.001 <= found["fast"]["p20"] <= found["fast"]["p50"] <= found["fast"]["p80"]
        assert found["fast"]["p50"] < 0.02 <= found["slow"]["p20"]

    def test_no_rounds(self):
        with pytest.raises(GrailError, match="at least 1 round"):
            latency({}, torch.zeros(1), rounds=0)


class TestLinearProbe:
    def test_features_are_what_the_classifier_reads_and_the_test_part_is_unseen(self):
        from grail.calibration.preprocessing import Preprocessing
        from grail.modules.evaluate import _probed, held_out

        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
        ready = Preprocessing((28, 28), 1, (0.13,), (0.31,))
        found = _probed(module, "builtin", held_out(None, "builtin"), ready, torch.device("cpu"))
        assert (found["train_images"], found["count"]) == (4000, 1000)
        assert found["top1"] > 0.7  # random features of real digits; chance is 0.1

    def test_without_a_test_part_it_is_refused(self, tmp_path):
        from grail.calibration.images import open_images
        from grail.calibration.preprocessing import Preprocessing
        from grail.modules.evaluate import _probed

        images = open_images((torch.rand(20, 1, 28, 28), torch.arange(20) % 2))
        ready = Preprocessing((28, 28), 1, (0.13,), (0.31,))
        with pytest.raises(GrailError, match="--probe: the data needs"):
            _probed(nn.Linear(1, 1), "builtin", images, ready, torch.device("cpu"))

    def test_one_class_alone_is_refused(self):
        from grail.evaluation.linear_probe import linear_probe

        part = torch.rand(8, 3).numpy(), torch.zeros(8, dtype=torch.long)
        with pytest.raises(GrailError, match="one class"):
            linear_probe(part, part)
