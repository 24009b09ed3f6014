"""CLIP: both towers, heads and MLP channels, captions, zero-shot accuracy, folders, export."""

from __future__ import annotations

import copy
import json

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import grail
from benchmarks.clip_digits import CAPTIONS, CLASSES, LENGTH, digits, tiny_clip, tokenizer, trained, zero_shot
from grail.calibration.captions import captions
from grail.cli import app
from grail.evaluation.zero_shot import ZeroShot, read_templates
from grail.families import describe
from grail.families.attention import Attention
from grail.modules.export import Encoder, export
from grail.soup import soup
from tests.test_vision_families import fewer_heads

NOTHING = frozenset()


def images(count: int = 64) -> Tensor:
    return digits(count, seed=2)[0]


def compress(module: nn.Module, **flags):
    asked = {"calibration": images(), "calibration_text": tokenizer(CAPTIONS), "samples": 64, "method": "wanda"}
    return grail.compress(module, **asked | flags)


@torch.no_grad()
def similarity(module: nn.Module) -> Tensor:
    found = module.encode_image(images(16), normalize=True), module.encode_text(tokenizer(CAPTIONS), normalize=True)
    return found[0] @ found[1].T


def relative(found: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    return trained(tiny_clip(), epochs=14, rate=3e-3, seed=0)


class TestTowers:
    def test_sites_of_both(self):
        image, text = describe(copy.deepcopy(tiny_clip()), NOTHING)
        assert [site.name for site in image.sites[:2]] == [
            f"visual.transformer.resblocks.0.{p}" for p in ("attn", "mlp")
        ]
        assert (len(image.sites), len(text.sites)) == (6, 4)
        assert (image.reads, image.call, image.counted) == ("images", "encode_image", None)
        assert (text.reads, text.call) == ("text", "encode_text")

    def test_both_lose_heads_and_channels_and_keep_their_names(self):
        module = tiny_clip()
        report = compress(module, ratio=0.5)
        assert report.model.state_dict().keys() == module.state_dict().keys()
        for block in (*report.model.visual.transformer.resblocks, *report.model.transformer.resblocks):
            assert isinstance(block.attn, Attention) and block.attn.num_heads == 2
            assert block.attn.out_proj.in_features == 2 * block.attn.head_dim
            assert block.mlp.c_proj.in_features == 2 * block.mlp.c_fc.in_features
        assert all(isinstance(block.attn, nn.MultiheadAttention) for block in module.transformer.resblocks)
        assert all(site["error_after"] < site["error_before"] for site in report.sites)
        told = report.to_json()
        assert (told["calibration"]["images"], told["calibration_text"]["captions"]) == (56, 27), "an eighth decides"

    @pytest.mark.parametrize(
        ("asked", "changed", "stays"),
        [
            ({"calibration_text": None}, "encode_image", "encode_text"),
            ({"calibration": "none"}, "encode_text", "encode_image"),
        ],
    )
    @torch.no_grad()
    def test_one_without_calibration_stays_as_it_is(self, asked, changed, stays):
        module = tiny_clip()
        found = compress(module, ratio=0.5, **asked).model
        inputs = {"encode_image": images(4), "encode_text": tokenizer(CAPTIONS[:4])}
        before, after = ({call: getattr(m, call)(x) for call, x in inputs.items()} for m in (module, found))
        assert relative(after[stays], before[stays]) < 1e-5
        assert relative(after[changed], before[changed]) > 1e-3

    @pytest.mark.parametrize("method", ["wanda", "mag-l1", "mag-l2", "gram", "fold", "random"])
    def test_repair_helps_with_every_method(self, learned, method):
        dense = similarity(learned)
        pruned, repaired = (compress(learned, ratio=0.5, method=method, compensate=on).model for on in (False, True))
        assert relative(similarity(repaired), dense) < relative(similarity(pruned), dense)

    @pytest.mark.parametrize("options", [{"one_shot": True}, {"target": "own"}, {"bias": True}, {"attn_ratio": 0}])
    def test_options(self, learned, options):
        report = compress(learned, ratio=0.5, **options)
        assert all(site["error_after"] <= site["error_before"] for site in report.sites)
        if "attn_ratio" in options:
            assert isinstance(report.model.transformer.resblocks[0].attn, nn.MultiheadAttention)

    @pytest.mark.parametrize("compensate", [False, True])
    @torch.no_grad()
    def test_duplicated_channels_fold_without_loss_in_both(self, learned, compensate):
        module = copy.deepcopy(learned)
        for block in (*module.visual.transformer.resblocks, *module.transformer.resblocks):
            half = block.mlp.c_fc.out_features // 2
            order = torch.cat([torch.arange(half), torch.randperm(half)])
            for tensor in (block.mlp.c_fc.weight, block.mlp.c_fc.bias):
                tensor.copy_(tensor[order])
        found = compress(module, method="fold", ratio=0.5, attn_ratio=0, compensate=compensate).model
        assert relative(similarity(found), similarity(module)) < 1e-5
        other = compress(learned, method="fold", ratio=0.5, attn_ratio=0, compensate=False).model
        assert relative(similarity(other), similarity(learned)) > 1e-2

    @pytest.mark.parametrize(
        "vision",
        [
            CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, head_width=16, image_size=64),
            pytest.param(
                CLIPVisionCfg(timm_model_name="vit_tiny_patch16_224", timm_pool="", timm_proj="linear", image_size=224),
                marks=fewer_heads,
            ),
        ],
        ids=["ResNet", "timm"],
    )
    @torch.no_grad()
    def test_image_towers_of_other_families(self, vision):
        torch.manual_seed(0)
        text = CLIPTextCfg(context_length=LENGTH, vocab_size=49408, width=32, heads=4, layers=1)
        module = CLIP(32, vision, text).eval()
        size = vision.image_size
        x = torch.randn(8, 3, size, size)
        report = compress(module, ratio=0.5, calibration=x)
        assert {site["name"].partition(".")[0] for site in report.sites} == {"visual", "transformer"}
        assert report.model.encode_image(x).shape == (8, 32)
        assert report.parameters[1] < report.parameters[0]


class TestCaptions:
    def test_what_fills_a_caption_up_does_not_count(self):
        report = compress(tiny_clip(), ratio=0.5, target="dense")
        assert report.calibration_text["tokens"] == int((tokenizer(CAPTIONS) != 0).sum())

    @torch.no_grad()
    def test_the_repair_of_a_text_block_is_the_ridge_solution_over_the_tokens_that_count(self, learned):
        """One-shot and pruned, so that everything can be written out from the dense network."""
        ids = tokenizer(CAPTIONS)
        report = compress(learned, ratio=0.5, one_shot=True, attn_ratio=0)
        name = "transformer.resblocks.1.mlp"
        kept = next(result for result in report.results if result.site.name == name).reduction.channels
        seen: list[Tensor] = []
        layer = learned.transformer.resblocks[1].mlp.c_proj
        handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        learned.encode_text(ids)
        handle.remove()
        weight = layer.weight.double()

        def solution(h_TH: Tensor) -> Tensor:
            gram = h_TH.T @ h_TH
            a_KK = gram[kept][:, kept]
            residual = weight @ gram[:, kept] - weight[:, kept] @ a_KK
            lam = 1e-3 * a_KK.diagonal().mean()
            return weight[:, kept] + residual @ torch.linalg.inv(a_KK + lam * torch.eye(len(kept)).double())

        found = report.model.transformer.resblocks[1].mlp.c_proj.weight.double()
        assert relative(found, solution(seen[0][ids != 0].double())) < 2e-3  # the Gram matrix is a sum in float32
        assert relative(found, solution(seen[0].flatten(0, 1).double())) > 2e-2

    def test_sources(self, tmp_path):
        (tmp_path / "a.txt").write_text("\n".join(CAPTIONS) + "\n\n")
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"caption": text}) for text in CAPTIONS))
        sources = (CAPTIONS, str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl"), tokenizer(CAPTIONS))
        found = [captions(source, tokenizer, samples=20, seed=1, batch=8) for source in sources]
        for batches, told in found:
            assert all(torch.equal(*pair) for pair in zip(batches, found[0][0], strict=True))
            assert (told["captions"], told["length"], told["sha256"]) == (20, LENGTH, found[0][1]["sha256"])

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("nowhere.txt", "nowhere.txt: No such file"),
            ("words.pdf", r"words.pdf: a .txt"),
            ([], "no captions"),
            ([" "], "no captions"),
            (torch.zeros(3, 4), r"\[3, 4\] of torch.float32"),
            (torch.zeros(4, dtype=torch.long), r"\[4\]"),
            (7, "not a int"),
        ],
    )
    def test_refused(self, text, why):
        with pytest.raises(grail.GrailError, match=f"--calibration-text.*{why}"):
            compress(tiny_clip(), calibration_text=text)

    def test_a_line_that_is_no_caption_is_named(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"title": "b"}')
        with pytest.raises(grail.GrailError, match=r"a\.jsonl, line 2: no field"):
            compress(tiny_clip(), calibration_text=str(tmp_path / "a.jsonl"))

    def test_texts_need_a_tokenizer(self):
        with pytest.raises(grail.GrailError, match="tokenizer"):
            compress(tiny_clip(), calibration_text=CAPTIONS)
        report = grail.compress(
            tiny_clip(), tokenizer=tokenizer, calibration="none", calibration_text=CAPTIONS, eval="none"
        )
        assert report.calibration_text["source"] == "given in Python"

    def test_a_network_that_reads_none(self):
        with pytest.raises(grail.GrailError, match="no text tower"):
            plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
            sites = [grail.channels("0", "1", width=6)]
            grail.compress(plain, sites=sites, calibration=torch.randn(9, 4), calibration_text=tokenizer(CAPTIONS))


class TestZeroShot:
    def test_at_a_half_compensation_wins_back_at_least_half_of_the_loss(self, learned):
        dense = zero_shot(learned)
        pruned, repaired = (
            zero_shot(compress(learned, ratio=0.5, calibration=images(256), samples=256, compensate=on).model)
            for on in (False, True)
        )
        assert dense > 0.9
        assert pruned < dense - 0.1
        assert repaired - pruned >= 0.5 * (dense - pruned)

    def test_reported_where_a_tokenizer_is_given(self, learned):
        ready = grail.Preprocessing((28, 28), 1, (0.15,), (0.35,))
        report = grail.compress(
            learned, preprocessing=ready, tokenizer=tokenizer, calibration="builtin", samples=64, eval="builtin"
        )
        assert report.evaluation["images"] == 1000
        assert report.evaluation["accuracy"].keys() == {"dense", "compressed"}

    @torch.no_grad()
    def test_logits_are_cosines_times_the_scale(self, learned):
        classifier = ZeroShot(learned, tokenizer, CLASSES, ["{}"])
        image = learned.encode_image(images(4), normalize=True)
        text = learned.encode_text(tokenizer(CLASSES), normalize=True)
        torch.testing.assert_close(classifier(images(4)), learned.logit_scale.exp() * image @ text.T)


class TestSoup:
    def test_of_three_from_one_start_is_at_least_their_mean_before_and_after_compression(self, learned, tmp_path):
        files, nets = [], []
        for seed in (1, 2, 3):
            nets.append(trained(learned, epochs=2, rate=1e-3, seed=seed))
            files.append(tmp_path / f"{seed}.safetensors")
            save_file(nets[-1].state_dict(), files[-1])
        soup([str(file) for file in files], str(tmp_path / "soup.safetensors"))
        mixed = tiny_clip()
        from safetensors.torch import load_file

        mixed.load_state_dict(load_file(tmp_path / "soup.safetensors"))
        assert zero_shot(mixed) >= sum(map(zero_shot, nets)) / 3
        small = [compress(net, ratio=0.5, calibration=images(256), samples=256).model for net in (mixed, *nets)]
        first, *others = map(zero_shot, small)
        assert first >= sum(others) / 3


class TestFolder:
    def test_of_a_class_of_ones_own_the_similarities_are_the_same_to_the_last_bit(self, learned, tmp_path):
        report = compress(learned, ratio=0.5, output=str(tmp_path / "out"))
        again = grail.load(tmp_path / "out", module=tiny_clip(seed=5))
        assert torch.equal(similarity(again), similarity(report.model))

    def test_by_name_from_the_command_line(self, tmp_path):
        """The smallest CLIP that open_clip knows, 43 million parameters, random."""
        torch.manual_seed(0)
        save_file(open_clip.create_model("ViT-S-32-alt").state_dict(), tmp_path / "weights.safetensors")
        (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
        asked = {
            "weights": str(tmp_path / "weights.safetensors"), "calibration_text": str(tmp_path / "captions.txt"),
            "samples": 8, "method": "mag-l2", "ratio": 0.5, "eval": "none",
        }  # fmt: skip
        flags = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
        told = run("compress", "--model", "open_clip/ViT-S-32-alt", *flags, "--output", tmp_path / "out", "--json")
        assert told["calibration_text"]["captions"] == 8 and told["ratio"] == {"heads": 0.5, "channels": 0.5}
        report = grail.compress("open_clip/ViT-S-32-alt", output=str(tmp_path / "again"), **asked)
        loaded = [grail.load(tmp_path / name) for name in ("out", "again")]
        x, ids = torch.randn(2, 3, 224, 224), open_clip.tokenize(CAPTIONS[:4])
        found = [
            m.encode_image(x, normalize=True) @ m.encode_text(ids, normalize=True).T for m in (*loaded, report.model)
        ]
        assert all(torch.equal(each, found[-1]) for each in found)
        found = run("eval", tmp_path / "out", "--samples", 50, "--json", "--data", "builtin")
        assert 0 <= found["models"][str(tmp_path / "out")]["top1"] <= 1
        for tower in ("images", "text"):
            file = tmp_path / f"{tower}.pt2"
            told = run("export", tmp_path / "out", "--to", "torch-export", "--tower", tower, "-o", file, "--json")
            assert told["difference"] < 1e-4 and file.exists()

    def test_what_is_missing_is_said(self, tmp_path):
        compress(tiny_clip(), ratio=0.5, output=str(tmp_path / "out"))
        for words, why in (
            (("eval", tmp_path / "out", "--classes", "nowhere.txt"), "module="),
            (("export", tmp_path / "out", "-o", tmp_path / "x.onnx"), "module="),
        ):
            result = CliRunner().invoke(app, list(map(str, words)))
            assert result.exit_code == 2 and why in result.stderr


def run(*words: object) -> dict:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


class TestExport:
    @pytest.mark.parametrize("to", ["onnx", "torch-export"])
    @pytest.mark.parametrize("reads", ["images", "text"])
    def test_of_each_tower_with_fewer_heads(self, learned, to, reads, tmp_path):
        small = compress(learned, ratio=0.5).model
        example = images(1) if reads == "images" else tokenizer(CAPTIONS[:1])
        found = export(Encoder(small, reads), example, to, tmp_path / "out")
        assert found["difference"] < 1e-4


def text_tower(pool: str = "argmax", **options: object) -> nn.Module:
    """A CLIP of the class that keeps its text tower apart, or the other one."""
    torch.manual_seed(0)
    custom = options.pop("custom", False)
    vision = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=16, image_size=32)
    text = CLIPTextCfg(context_length=10, vocab_size=50, width=32, heads=4, layers=2, pool_type=pool, **options)
    return (CustomTextCLIP if custom else CLIP)(16, vision, text).eval()


def sentences(filling: int, end: int) -> Tensor:
    """Texts of 3 to 8 tokens of ten, the last one the end."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(2, end, (24, 10), generator=random)
    for row, length in enumerate(torch.randint(3, 9, (24,), generator=random).tolist()):
        ids[row, length - 1] = end
        ids[row, length:] = filling
    return ids


pools_at_an_id = pytest.mark.skipif(
    not hasattr(CLIPTextCfg, "eos_id"), reason="open_clip pools at an end-of-text id from 3.1 on"
)


class TestTokensThatCount:
    @pytest.mark.parametrize("custom", [False, True])
    @pytest.mark.parametrize(
        ("pool", "filling", "options"),
        [
            ("argmax", 0, {}),
            pytest.param("eos", 1, {"pad_id": 1, "eos_id": 49}, marks=pools_at_an_id),
        ],
    )
    def test_those_up_to_the_one_that_is_pooled(self, custom, pool, filling, options):
        ids = sentences(filling, end=49)
        asked = {"calibration": "none", "calibration_text": ids, "ratio": 0.5, "method": "wanda", "target": "dense"}
        report = grail.compress(text_tower(pool, custom=custom, **options), **asked)
        assert report.calibration_text["tokens"] == int((ids != filling).sum())

    def test_all_where_the_tower_reads_all_places(self):
        ids = sentences(0, end=49)
        module = text_tower("last", custom=True, no_causal_mask=True)
        asked = {"calibration": "none", "calibration_text": ids, "ratio": 0.5, "method": "wanda", "target": "dense"}
        report = grail.compress(module, **asked)
        assert report.calibration_text["tokens"] == ids.numel()

    @torch.no_grad()
    def test_a_token_that_the_tower_appends_counts_and_its_heads_stay(self):
        """CoCa's text tower: its mask is made for each head."""
        ids = sentences(0, end=49)
        module = text_tower(custom=True, embed_cls=True)
        asked = {"calibration": "none", "calibration_text": ids, "ratio": 0.5, "method": "wanda", "target": "dense"}
        report = grail.compress(module, **asked)
        assert {site["name"].rpartition(".")[2] for site in report.sites} == {"mlp"}
        assert report.calibration_text["tokens"] == int((ids != 0).sum()) + len(ids)
        assert report.model.encode_text(ids).isfinite().all()


class TestFoundByReview:
    def test_texts_are_encoded_in_evaluation_mode_and_the_mode_is_given_back(self, learned):
        module = copy.deepcopy(learned).train()
        for block in module.transformer.resblocks:
            block.attn.dropout = 0.5
        found = ZeroShot(module, tokenizer, CLASSES).text_CE
        torch.testing.assert_close(found, ZeroShot(learned, tokenizer, CLASSES).text_CE)
        assert all(inner.training for inner in module.modules())

    def test_files_from_other_systems(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\na dog\r\n")
        (tmp_path / "a.jsonl").write_bytes("\ufeff".encode() + '{"text": "a\u2028cat"}\n{"text": "a dog"}'.encode())
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa {}\r\n")
        seen: list[list[str]] = []

        def note(texts: list[str]) -> Tensor:
            seen.append(texts)
            return tokenizer(texts)

        for name in ("a.txt", "a.jsonl"):
            captions(str(tmp_path / name), note, samples=2, seed=0, batch=2)
        assert seen == [["a cat", "a dog"], ["a\u2028cat", "a dog"]]
        assert read_templates(tmp_path / "b.txt") == ("a {}",)

    def test_tokenizers_that_give_no_tensor(self):
        with pytest.raises(grail.GrailError, match="the tokenizer gives a list"):
            compress(tiny_clip(), calibration_text=CAPTIONS, tokenizer=lambda texts: [[1]] * len(texts))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes_are_evaluated(self, learned, dtype):
        ready = grail.Preprocessing((28, 28), 1, (0.15,), (0.35,))
        module = copy.deepcopy(learned).to(dtype)
        report = grail.compress(
            module, preprocessing=ready, tokenizer=tokenizer, calibration="builtin", samples=16, eval="builtin"
        )
        assert report.evaluation["accuracy"].keys() == {"dense", "compressed"}

    def test_statistics_are_not_estimated_without_images(self):
        with pytest.raises(grail.GrailError, match="--repair estimates statistics from images"):
            compress(tiny_clip(), calibration="none", repair=True)

    def test_captions_of_nothing(self):
        """The pooled token of an empty text is still one: only a tower that appends its own can see nothing at all."""
        report = compress(tiny_clip(), calibration_text=torch.zeros(8, LENGTH).long())
        assert report.calibration_text["tokens"] == 8

    def test_the_last_stream_of_a_resnet_with_an_attention_pool_stays(self):
        torch.manual_seed(0)
        vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, head_width=16, image_size=64)
        text = CLIPTextCfg(context_length=LENGTH, vocab_size=49408, width=32, heads=4, layers=1)
        module, x = CLIP(32, vision, text).eval(), torch.randn(8, 3, 64, 64)
        report = compress(module, calibration=x, calibration_text=None, ratio=0.25, residual_ratio=0.5)
        assert report.ratio["residual"] == pytest.approx(0.5)
        assert report.model.visual.attnpool.c_proj.in_features == module.visual.attnpool.c_proj.in_features
