"""transformers' own ViT, DeiT, DINOv2 and CLIP in memory: sites, duplicates, heads, repair, captions, exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import grail
from grail.errors import GrailError
from grail.families import describe
from grail.families.texts import up_to_the_end
from grail.modules.export import export
from grail.modules.stream import chained
from grail.modules.verify import verify
from tests.tiny_hf import (
    END,
    HEADS,
    KINDS,
    WIDTH,
    WORDS,
    Kind,
    blocks_of,
    compress,
    each_kind,
    errors,
    images,
    inputs_of,
    texts,
)


class TestSites:
    @each_kind
    def test_names_and_widths_in_execution_order(self, kind):
        module, of = KINDS[kind].build(), KINDS[kind]
        expected = [
            site
            for block in blocks_of(kind, module)
            for site in ((f"{block}.{of.attention}", WIDTH), (f"{block}.mlp", of.hidden))
        ]
        report = compress(module, 4, method="random", ratio=0)
        assert [(entry["name"], entry["before"]) for entry in report.sites] == expected

    @each_kind
    def test_blocks_are_run_one_by_one_and_removal_equals_ignoring(self, kind):
        for network in describe(KINDS[kind].build()):
            example = inputs_of(network, 3)
            verify(network, network.sites, example)
            assert network.blocks and chained(network, [example])

    def test_a_description_without_the_values_is_refused(self):
        (network,) = describe(KINDS["vit"].build())
        site = replace(network.sites[0], producers=network.sites[0].producers[:2])
        with pytest.raises(GrailError, match="order of its units"):
            verify(network, [site], images(2))


class TestDuplicates:
    @each_kind
    @pytest.mark.parametrize("compensate", [False, True], ids=["folded", "compensated"])
    def test_folding_away_duplicates_loses_nothing(self, kind, compensate):
        module, of = KINDS[kind].build(), KINDS[kind]
        order = torch.cat([torch.arange(of.hidden // 2), torch.randperm(of.hidden // 2)])
        with torch.no_grad():
            for block in blocks_of(kind, module):
                for name in of.mlp[:-1]:
                    layer = module.get_submodule(f"{block}.mlp.{name}")
                    rows = torch.cat([order + start for start in range(0, len(layer.weight), of.hidden)])
                    layer.weight.copy_(layer.weight[rows])
                    layer.bias.copy_(layer.bias[rows])
        report = compress(module, method="fold", ratio=0.5, attn_ratio=0, compensate=compensate)
        assert [e["after"] for e in report.sites if e["name"].endswith("mlp")] == [of.hidden // 2] * (
            4 if kind == "clip" else 2
        )
        assert max(errors(module, report.model, seed=2)) < 1e-5

    def test_without_duplicates_it_loses_something(self):
        module = KINDS["clip"].build()
        report = compress(module, method="fold", ratio=0.5, attn_ratio=0, compensate=False)
        assert min(errors(module, report.model)) > 1e-2


class TestHeads:
    @each_kind
    def test_go_whole_with_queries_keys_and_values(self, kind):
        module, of = KINDS[kind].build(), KINDS[kind]
        report = compress(module, method="wanda", attn_ratio=0.5, mlp_ratio=0, compensate=False)
        gone = 0
        for block in blocks_of(kind, module):
            old, new = (m.get_submodule(f"{block}.{of.attention}{of.inner}") for m in (module, report.model))
            count = getattr(new, "num_heads" if of.attention == "self_attn" else "num_attention_heads")
            query = of.projections[0]
            assert (count, getattr(new, of.size), getattr(new, query).out_features) == (2, 8, 16)
            assert getattr(new, "all_head_size", 16) == 16
            parts = {name: getattr(old, name).weight.view(HEADS, 8, WIDTH) for name in of.projections}
            left = getattr(new, query).weight.split(8)
            kept = [h for h in range(HEADS) if any(torch.equal(parts[query][h], part) for part in left)]
            for name, rows in parts.items():
                torch.testing.assert_close(getattr(new, name).weight, rows[kept].flatten(0, 1), rtol=0, atol=0)
            gone += sum(16 * (WIDTH + (getattr(old, query).bias is not None)) for _ in parts) + 16 * WIDTH
        assert report.parameters[0] - report.parameters[1] == gone
        assert sum(p.numel() for p in report.model.parameters()) == report.parameters[1]
        assert sum(p.numel() for p in module.parameters()) == report.parameters[0]


class TestRepair:
    @each_kind
    @pytest.mark.parametrize("method", ["wanda", "gram", "fold"])
    def test_lowers_the_error_on_the_calibration_set(self, kind, method):
        module = KINDS[kind].build()
        pruned, repaired = (
            errors(module, compress(module, method=method, ratio=0.5, compensate=c).model) for c in (False, True)
        )
        assert all(after < before for before, after in zip(pruned, repaired, strict=True))

    def test_one_tower_alone(self):
        module = KINDS["clip"].build()
        report = compress(module, method="wanda", ratio=0.5, calibration=None)
        assert errors(module, report.model)[0] == 0 < errors(module, report.model)[1]


class TestPadding:
    def test_what_fills_a_caption_up_does_not_count(self):
        module, short = KINDS["clip"].build(), texts(24, length=9)
        longer = torch.cat([short, torch.full((24, 3), END)], 1)
        found = [
            grail.compress(module, calibration=None, calibration_text=ids, samples=24, method="gram", ratio=0.5)
            for ids in (short, longer)
        ]
        assert found[0].calibration_text["tokens"] == found[1].calibration_text["tokens"]
        assert [s["after"] for s in found[0].sites] == [s["after"] for s in found[1].sites]
        tensors = [report.model.state_dict() for report in found]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensor, tensors[1][name], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("end", "ids", "counted"),
        [
            (61, [[60, 3, 61, 61], [60, 61, 5, 61]], [3, 2]),
            (61, [[60, 3, 61, 0], [60, 3, 4, 5]], [3, 4]),
            (None, [[9, 2, 7, 40], [9, 40, 40, 0]], [4, 2]),
        ],
        ids=["ends", "none", "legacy"],
    )
    def test_texts_go_to_the_place_that_is_pooled(self, end, ids, counted):
        found = up_to_the_end(torch.tensor(ids), end)
        assert found.sum(1).tolist() == counted and found[:, 0].all()

    @pytest.mark.parametrize("end", [END, 2])
    def test_tokens_that_do_not_count_do_not_reach_the_features(self, end):
        module = Kind("CLIPTextModel", WORDS | {"eos_token_id": end}, "encoder.layers").build()
        (network,), ids = describe(module), texts(8)
        other = torch.where(network.counted(ids), ids, torch.randint(0, 60, ids.shape))
        expected, found = (network.run(x).pooler_output for x in (ids, other))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(other, ids)


class TestExport:
    @pytest.mark.parametrize("to", ["onnx", "torch-export"])
    @pytest.mark.parametrize("kind", ["vit-classifier", "dinov2"])
    def test_exports_compute_the_same(self, kind, to, tmp_path):
        model = compress(KINDS[kind].build(), method="wanda", ratio=0.5).model
        told = export(model, images(1), to, tmp_path / "out")
        assert told["difference"] < 1e-5
