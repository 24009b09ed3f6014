"""Soups of real checkpoints: plain averages against torch, greedy ones on planted examples, what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import grail
from grail.calibration.images import open_images
from grail.cli import app
from grail.evaluation.accuracy import accuracy
from grail.soup import average, soup
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer

NET, OPTION = "timm/test_vit", "img_size=32"


def run(*arguments, code=0):
    done = CliRunner().invoke(app, ["soup", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def told(*arguments) -> dict:
    return json.loads(run(*arguments, "--json").stdout)


def refusal(*arguments) -> str:
    """The sentence, one line, exit code 2."""
    said = run(*arguments, "-q", code=2).stderr.splitlines(keepends=True)[-1]
    assert said.startswith("grail: ")
    return said


def tensors(seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 3, generator=generator).to(dtype),
        "a.empty": torch.empty(0, 4, dtype=dtype),
        "n.running_var": torch.rand(3, generator=generator).to(dtype),
        "n.num_batches_tracked": torch.tensor(10 * seed),
        "position_ids": torch.arange(4),
    }


@pytest.fixture
def saved(tmp_path):
    """Writes tensors as a file; a dict of changes replaces some, None removes them."""

    def save(name: str, changes: dict | None = None, **options):
        found = {k: v for k, v in (tensors(**options) | (changes or {})).items() if v is not None}
        save_file(found, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return save


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three tiny language models, the last two in shards, with a tokenizer and files that must not come along."""
    home = tmp_path_factory.mktemp("soups")
    made = [tiny_checkpoint(home / f"m{seed}", seed=seed, shard="40KB" if seed else "1GB") for seed in range(3)]
    for folder in made:
        tiny_tokenizer(folder)
        for name in ("modeling_own.py", "training_args.bin", "optimizer.pt"):
            (folder / name).write_text("raise SystemExit")
    return made


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A ViT, two slightly and one very noisy copy, and images which the first labels itself."""
    home = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    module = timm.create_model("test_vit", img_size=32, num_classes=10, in_chans=1).eval()
    nn.init.normal_(module.head.weight, std=0.5)
    good = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for name, scale in {"noisy": 1.0, "near": 0.02, "good": 0.0, "close": 0.03}.items():
        noisy = {k: v + scale * v.std().nan_to_num() * torch.randn_like(v) for k, v in good.items()}
        save_file(noisy, home / f"{name}.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 32, 32), dtype=np.uint8)
    np.savez(home / "raw.npz", x_test=pixels)
    ready = grail.Preprocessing.from_timm(module)
    (x,) = open_images(home / "raw.npz", split="test").batches(ready, 60)
    with torch.no_grad():
        labels = module(x).argmax(1)
    np.savez(home / "images.npz", x_train=pixels, x_test=pixels, y_test=labels.numpy())
    return home


class TestAverage:
    def test_is_that_of_torch_and_counters_take_the_largest(self, saved, tmp_path):
        files = [saved(str(seed), seed=seed) for seed in range(3)]
        run(*files, "-o", tmp_path / "new" / "out.safetensors")
        found, given = load_file(tmp_path / "new" / "out.safetensors"), [load_file(file) for file in files]
        for name in ("a.weight", "n.running_var"):
            expected = torch.stack([one[name].double() for one in given]).mean(0).float()
            torch.testing.assert_close(found[name], expected, rtol=1e-7, atol=1e-8)
        assert found["n.num_batches_tracked"] == 20 and found["position_ids"].tolist() == [0, 1, 2, 3]
        assert found["a.empty"].shape == (0, 4) and list(found) == list(given[0])
        assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["out.safetensors"]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_of_equal_files_is_that_file(self, saved, tmp_path, dtype):
        zeros = {"zeros": torch.tensor([0.0, -0.0, 1e-7, 6e4], dtype=dtype)}
        files = [saved(str(i), zeros, dtype=dtype) for i in range(3)]
        run(*files, "-o", tmp_path / "out.safetensors")
        found = load_file(tmp_path / "out.safetensors")
        for name, tensor in load_file(files[0]).items():
            assert tensor.dtype == found[name].dtype
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, found[name])))

    def test_by_chunks_is_the_same(self, saved, tmp_path, monkeypatch):
        files = [saved(str(seed), seed=seed) for seed in range(3)]
        run(*files, "-o", tmp_path / "whole.safetensors")
        monkeypatch.setattr(average, "ELEMENTS", 4)
        run(*files, "-o", tmp_path / "parts.safetensors")
        assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "parts.safetensors").read_bytes()

    @settings(max_examples=15, deadline=None)
    @given(order=st.permutations(range(4)), scale=st.sampled_from([1e-30, 1.0, 1e30]))
    def test_the_order_matters_by_no_more_than_rounding(self, order, scale, tmp_path_factory):
        home = tmp_path_factory.mktemp("order")
        for seed in range(4):
            save_file({"w": tensors(seed)["a.weight"] * scale}, home / f"{seed}.safetensors")
        for name, chosen in (("first", range(4)), ("second", order)):
            soup([home / f"{i}.safetensors" for i in chosen], home / f"{name}.safetensors")
        one, two = (load_file(home / f"{name}.safetensors")["w"] for name in ("first", "second"))
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7 * scale)

    def test_mixed_float_dtypes_warn_and_take_the_first_ones(self, saved, tmp_path):
        files = [saved("half", dtype=torch.bfloat16), saved("full", seed=1)]
        said = run(*files, "-o", tmp_path / "out.safetensors").stderr
        assert "3 tensors differ in dtype among the inputs (a.empty: bfloat16 and float32)" in said
        found = load_file(tmp_path / "out.safetensors")["a.weight"]
        halves = [tensors(dtype=torch.bfloat16)["a.weight"].float(), tensors(1)["a.weight"]]
        assert torch.equal(found, ((halves[0] + halves[1]) / 2).bfloat16())


class TestFolders:
    def test_shards_average_and_only_data_comes_along(self, folders, tmp_path):
        run(*folders[1:], folders[0], "-o", tmp_path / "out", "-q")
        models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (*folders, tmp_path / "out")]
        for name, found in models.pop().items():
            expected = torch.stack([one[name].double() for one in models]).mean(0).float()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
            "config.json",
            "generation_config.json",
            *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
            "model.safetensors.index.json",
            "soup.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert (tmp_path / "out" / "config.json").read_text().strip() == (
            folders[1] / "config.json"
        ).read_text().strip()

    def test_greedy_by_perplexity_then_compress(self, folders, tmp_path, reopen_here):
        data = tiny_calibration(tmp_path / "data.safetensors")
        found = told(*folders, "-o", tmp_path / "out", "--greedy", "--data", data, "--samples", "6")
        assert found["metric"] == "negative perplexity" and found["samples"] == 6
        scores = [one["score"] for one in found["ingredients"]]
        assert scores == sorted(scores, reverse=True) and found["best_single"] == scores[0] <= found["score"]
        evaluated = CliRunner().invoke(
            app, ["eval", str(tmp_path / "out"), "--data", str(data), "--samples", "6", "--json"]
        )
        (measured,) = json.loads(evaluated.stdout)["models"].values()
        assert -measured["perplexity"] == found["score"]
        asked = ["--calibration", str(data), "--eval", "none", "--output", str(tmp_path / "small")]
        assert CliRunner().invoke(app, ["compress", "--model", str(tmp_path / "out"), *asked]).exit_code == 0

    @pytest.mark.parametrize(
        ("field", "value"), [("model_type", "mistral"), ("rope_theta", 5e5), ("num_key_value_heads", 6)]
    )
    def test_another_configuration_is_refused(self, folders, tmp_path, field, value):
        other = tiny_checkpoint(tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        config = config | {field: value, "rope_parameters": None} if field == "rope_theta" else config | {field: value}
        (other / "config.json").write_text(json.dumps(config))
        said = refusal(folders[0], other, "-o", tmp_path / "out")
        assert f"{other}/config.json: {field.replace('rope_theta', 'rope_parameters')} is" in said
        assert "one architecture" in said and not (tmp_path / "out").exists()

    def test_what_another_version_of_transformers_leaves_out_is_no_difference(self, folders, tmp_path):
        other = tiny_checkpoint(tmp_path / "other", seed=3)
        config = json.loads((other / "config.json").read_text())
        del config["attention_bias"], config["transformers_version"]
        (other / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
        run(folders[0], other, "-o", tmp_path / "out")

    def test_a_model_type_that_transformers_does_not_know_is_averaged_where_all_fields_agree(self, folders, tmp_path):
        made = [tiny_checkpoint(tmp_path / f"{seed}", seed=seed) for seed in range(2)]
        for folder in made:
            (folder / "config.json").write_text(json.dumps({"model_type": "own", "depth": 2, "dtype": folder.name}))
        run(*made, "-o", tmp_path / "out")
        (made[1] / "config.json").write_text(json.dumps({"model_type": "own"}))
        assert "depth is null, but 2 in" in refusal(*made, "-o", tmp_path / "again")
        (made[1] / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": "many"}))
        assert "config.json is not accepted by transformers" in refusal(folders[0], made[1], "-o", tmp_path / "again")

    def test_folders_that_are_no_originals_are_refused(self, folders, tmp_path):
        other = tiny_checkpoint(tmp_path / "other", seed=3)
        (other / "grail.json").write_text("{}")
        assert "is compressed already" in refusal(folders[0], other, "-o", tmp_path / "out")
        (other / "grail.json").unlink()
        (other / "model.safetensors").rename(other / "pytorch_model.bin")
        assert "only pickled weights" in refusal(folders[0], other, "-o", tmp_path / "out")
        (other / "config.json").write_text("{}")
        assert "names no model_type" in refusal(folders[0], other, "-o", tmp_path / "out")
        (other / "config.json").unlink()
        assert "has no config.json" in refusal(folders[0], other, "-o", tmp_path / "out")
        assert "holds the input" in refusal(*folders[:2], "-o", folders[0].parent, "--overwrite")
        assert "--model is for .safetensors" in refusal(
            *folders[:2], "-o", tmp_path / "out", "--greedy", "--data", "builtin", "--model", NET
        )


class TestGreedy:
    def test_leaves_the_noisy_one_out(self, vision, tmp_path):
        files = [vision / f"{name}.safetensors" for name in ("noisy", "near", "good")]
        asked = ["--greedy", "--data", vision / "images.npz", "--model", NET, "--model-option", OPTION]
        found = told(*files, "-o", tmp_path / "out.safetensors", *asked)
        assert found["score"] == found["best_single"] == 1.0 and found["samples"] == 60
        first, *_, last = found["ingredients"]
        assert first == {"path": str(files[2]), "score": 1.0, "score_with": None, "taken": True}
        assert last["path"] == str(files[0]) and not last["taken"] and last["score_with"] < 1
        assert os.listdir(tmp_path) == ["out.safetensors"]

    def test_the_table_says_who_was_taken_and_compress_takes_the_file(self, vision, tmp_path):
        files = [vision / f"{name}.safetensors" for name in ("close", "noisy", "near")]
        asked = ["--greedy", "--data", vision / "images.npz", "--model", NET, "--model-option", OPTION]
        shown = run(*files, "-o", tmp_path / "out.safetensors", *asked, "--samples", "1000").stdout
        rows = {line.split()[0]: line for line in shown.splitlines()}
        assert rows[files[1].name].endswith("left out") and "best single" in rows["score"]
        asked = ["--model", NET, "--model-option", OPTION, "--weights", str(tmp_path / "out.safetensors")]
        asked += ["--calibration", str(vision / "images.npz"), "--samples", "8", "--output", str(tmp_path / "small")]
        assert CliRunner().invoke(app, ["compress", *asked]).exit_code == 0

    def test_a_soup_without_finite_outputs_is_left_out(self, tmp_path):
        data = tiny_calibration(tmp_path / "data.safetensors")
        made = [tiny_checkpoint(tmp_path / f"m{seed}", seed=seed) for seed in range(2)]
        for folder, scale in zip(made, (1e25, 1e-25)):  # in each the two factors cancel; in the average they do not
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"] *= scale
            weights["lm_head.weight"] /= scale
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        asked = [*made, "-o", tmp_path / "out", "--greedy", "--data", data]
        assert "is left out: the average with it gives no finite outputs" in run(*asked).stderr
        found = told(*asked, "--overwrite")
        assert [one["taken"] for one in found["ingredients"]] == [True, False]
        assert found["score"] == found["best_single"] and found["ingredients"][1]["score_with"] is None
        best = load_file(f"{found['ingredients'][0]['path']}/model.safetensors")
        assert all(torch.equal(best[n], t) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"a.weight": None}, "1.safetensors holds a.weight, which {home}/2.safetensors lacks"),
            ({"more": torch.ones(1)}, "2.safetensors holds more, which {home}/1.safetensors lacks"),
            ({"a.weight": torch.ones(3, 5)}, "a.weight is [5, 3] in {home}/1.safetensors and [3, 5] in"),
            ({"a.weight": torch.ones(5, 3).int()}, "a.weight is float32 in {home}/1.safetensors and int32 in"),
            ({"position_ids": torch.arange(4).int()}, "position_ids is int64 in"),
            ({"position_ids": torch.arange(4) + 1}, "position_ids holds whole numbers that differ between"),
            ({"n.running_var": torch.tensor([1, torch.nan, 1])}, "2.safetensors: n.running_var holds NaN or infinity"),
            ({"a.weight": torch.full((5, 3), torch.inf)}, "2.safetensors: a.weight holds NaN or infinity"),
            ({"a.weight": torch.ones(5, 3).to(torch.float8_e4m3fn)}, "a.weight is float8_e4m3fn"),
        ],
    )
    def test_inputs_that_do_not_fit(self, saved, tmp_path, changes, sentence):
        said = refusal(saved("1"), saved("2", changes, seed=1), "-o", tmp_path / "out.safetensors")
        assert sentence.format(home=tmp_path) in said
        assert sorted(os.listdir(tmp_path)) == ["1.safetensors", "2.safetensors"]

    def test_an_average_too_large_for_its_dtype(self, saved, tmp_path):
        files = [saved("1", dtype=torch.float16), saved("2", {"a.weight": torch.full((5, 3), 1e6)})]
        said = refusal(*files, "-o", tmp_path / "out.safetensors")
        assert "a.weight: the average is too large for torch.float16" in said

    def test_names_and_options(self, saved, folders, vision, tmp_path):
        one, two, out = saved("1"), saved("2", seed=1), tmp_path / "out.safetensors"
        (tmp_path / "w.bin").write_bytes(b"x")
        (tmp_path / "w.txt").write_bytes(b"x")
        (tmp_path / "link.safetensors").symlink_to(one)
        save_file({}, tmp_path / "none.safetensors")
        greedy = ["--greedy", "--data", vision / "images.npz"]
        cases = {
            (one,): "two checkpoints or more; got 1",
            (one, folders[0]): "1.safetensors is a file and",
            (one, tmp_path / "no.safetensors"): "no such file or folder",
            (one, tmp_path / "w.bin"): "read only from safetensors",
            (one, tmp_path / "w.txt"): "is no .safetensors file",
            (one, tmp_path / "none.safetensors"): "holds no tensors",
            (one, two, one): "are the same weights",
            (one, tmp_path / "link.safetensors"): "are the same weights",
            (one, two, "--data", "builtin"): "--data is for --greedy alone",
            (one, two, "--samples", "3"): "--samples is for --greedy alone",
            (one, two, "--model-option", "a=1"): "--model-option is for --greedy alone",
            (one, two, "--device", "cpu"): "--device is for --greedy alone",
            (one, two, "--greedy"): "--greedy needs --data",
            (one, two, *greedy): "--greedy needs --model",
            (one, two, *greedy, "--model", NET, "--samples", "0"): "--samples must be at least 1",
            (one, two, *greedy, "--model", "llama"): "--model llama: name the network of the inputs",
            (one, two, *greedy, "--model", NET): "these are not weights of timm/test_vit",
        }
        before = sorted(os.listdir(tmp_path))
        for arguments, sentence in cases.items():
            assert sentence in refusal(*arguments, "-o", out)
        outputs = {
            one: "is the input",
            tmp_path: "name a .safetensors file",
            two.with_suffix(".x"): "so the soup is one",
        }
        for output, sentence in outputs.items():
            assert sentence in refusal(one, two, "-o", output, "--overwrite")
        assert "name a folder" in refusal(*folders[:2], "-o", out)
        assert sorted(os.listdir(tmp_path)) == before

    def test_an_output_that_exists_needs_overwrite(self, saved, folders, tmp_path):
        files, out = [saved("1"), saved("2", seed=1)], saved("out", seed=5)
        before = out.read_bytes()
        assert "add --overwrite" in refusal(*files, "-o", out)
        assert out.read_bytes() == before
        run(*files, "-o", out, "--overwrite")
        assert out.read_bytes() != before
        for arguments in ([], ["--overwrite"]):
            run(*folders[:2], "-o", tmp_path / "folder", *arguments)
        assert "add --overwrite" in refusal(*folders[:2], "-o", tmp_path / "folder")

    @pytest.mark.parametrize(("kind", "looked"), [("file", 3), ("folder", 30), ("greedy", 80)])
    def test_nothing_is_left_of_an_interrupted_run(self, saved, folders, tmp_path, monkeypatch, kind, looked):
        """looked: tensors read before the interruption; of a greedy soup all inputs are looked at, then averages."""
        inputs = [saved("1"), saved("2", seed=1)] if kind == "file" else folders
        data = tiny_calibration(tmp_path / "data.safetensors")
        before, left, written = sorted(os.listdir(tmp_path)), iter(range(looked)), []

        def interrupted(_):
            if next(left, None) is None:
                written.extend(tmp_path.glob("new/**/*.tmp"))
                raise KeyboardInterrupt
            return True

        monkeypatch.setattr(average, "all_finite", interrupted)
        out = tmp_path / "new" / ("out.safetensors" if kind == "file" else "out")
        said = run(*inputs, "-o", out, *(["--greedy", "--data", data] if kind == "greedy" else []), code=130).stderr
        assert "interrupted" in said and len(written) == 1
        assert ("candidate" in str(written[0])) == (kind == "greedy")
        assert sorted(os.listdir(tmp_path)) == before


class Small(nn.Module):
    """[B, 1, 28, 28] to 10 classes: conv1 -> bn1 -> ReLU -> conv2 -> ReLU -> head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 5, 2, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.head = nn.Conv2d(16, 32, 3, 2), nn.Linear(32 * 5 * 5, 10)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(x.flatten(1))


def trained(module: nn.Module, x, labels, seed: int, steps: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.train().parameters(), 1e-2)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(module(x[batch]), labels[batch]).backward()
        optimizer.step()
    return module.eval()


def test_a_soup_of_networks_from_one_start_is_as_good_as_their_mean_before_and_after(tmp_path):
    torch.manual_seed(0)
    splits = {split: open_images("builtin", split=split) for split in ("calibration", "test")}
    data = {split: next(images.batches(lambda b: b / 255, images.count)) for split, images in splits.items()}
    x, labels = data["calibration"], splits["calibration"].labels
    start = trained(Small(), x, labels, 0, 200)
    modules = []
    for seed in range(1, 4):
        modules.append(Small())
        modules[-1].load_state_dict(start.state_dict())
        trained(modules[-1], x, labels, seed, 100)
        save_file(modules[-1].state_dict(), tmp_path / f"{seed}.safetensors")
    soup([tmp_path / f"{seed}.safetensors" for seed in range(1, 4)], tmp_path / "soup.safetensors")
    mixed = Small()
    mixed.load_state_dict(load_file(tmp_path / "soup.safetensors"))

    def top1(module: nn.Module) -> float:
        return accuracy(module, data["test"].split(500), splits["test"].labels)["top1"]

    def compressed(module: nn.Module) -> nn.Module:
        sites = [grail.channels("conv1", "conv2", width=16, norms=["bn1"])]
        asked = {"ratio": 0.5, "repair": True, "sites": sites, "samples": 500}
        return grail.compress(module, calibration=x, **asked).model

    for change in (lambda module: module, compressed):
        singles = [top1(change(module)) for module in modules]
        assert top1(change(mixed.eval())) >= sum(singles) / 3 > 0.9
