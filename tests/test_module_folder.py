"""Vision networks from the command line to a folder, back, and out again: real processes, real files."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import grail
from grail.cli import app
from grail.errors import GrailError
from grail.modules.evaluate import evaluate_folders

RESNET = {"num_classes": 10, "in_chans": 1}


def run(*arguments, code=0):
    """In a process of its own where it is to succeed; a refusal is one sentence from wherever it comes."""
    if code:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == code, done.stderr
        return done
    command = [sys.executable, "-m", "grail", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Weights of a small ViT (98 of 224 pixels' worth would be slow) and 40 labelled images in an .npz."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", **RESNET).state_dict(), folder / "weights.safetensors")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (40, 32, 32), dtype=np.uint8)
    np.savez(folder / "images.npz", x_train=pixels, x_test=pixels[:20], y_test=np.arange(20) % 10)
    return folder


@pytest.fixture(scope="module")
def written(home):
    """What one compression wrote, and what it said."""
    asked = ["--model", "timm/resnet10t", "--weights", home / "weights.safetensors", "--method", "fold", "--ratio", 0.5]
    done = run(
        "compress",
        *asked,
        "--calibration",
        home / "images.npz",
        "--samples",
        8,
        "--repair",
        "-o",
        home / "out",
        "--json",
    )
    return home / "out", json.loads(done.stdout)


def test_the_folder_opens_again_with_the_narrow_widths_and_says_what_was_done(written):
    folder, told = written
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "grail.json",
        "model.safetensors",
        "recipe.yaml",
        "report.html",
        "run.json",
    ]
    module = grail.load(folder)
    assert module.layer1[0].conv1.out_channels == 32
    assert module.layer1[0].conv2.weight.shape[1] == 32
    assert not module.training
    stored = load_file(folder / "model.safetensors")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored[name])
    assert told["parameters"]["after"] == sum(p.numel() for p in module.parameters()) < told["parameters"]["before"]
    assert told["macs"]["after"] < told["macs"]["before"]
    assert told["repaired_norms"] == sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert set(told["evaluation"]["accuracy"]) == {"dense", "compressed"}
    assert json.loads((folder / "grail.json").read_text())["recipe"]["method"] == "fold"
    assert "weights.safetensors" in told["recipe"]["weights"]


def test_the_same_from_python_writes_equal_bytes(home, written):
    folder, _ = written
    asked = {"method": "fold", "ratio": 0.5, "samples": 8, "repair": True, "calibration": home / "images.npz"}
    report = grail.compress(
        "timm/resnet10t", weights=str(home / "weights.safetensors"), output=str(home / "again"), **asked
    )
    assert report.output == str(home / "again")
    for name in ("config.json", "grail.json", "model.safetensors"):
        assert (home / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_eval_measures_accuracy_size_and_speed_of_two_networks(home, written):
    folder, told = written
    done = run("eval", folder, "--data", home / "images.npz", "--speed", "--json")
    found = json.loads(done.stdout)["models"][str(folder)]
    assert found["top1"] == told["evaluation"]["accuracy"]["compressed"]["top1"]
    assert found["macs"] == told["macs"]["after"]
    assert 0 < found["milliseconds"]["p20"] <= found["milliseconds"]["p80"]


@pytest.mark.parametrize(("to", "name"), [("onnx", "net.onnx"), ("torch-export", "net.pt2")])
def test_exports_compute_the_same(written, tmp_path, to, name):
    folder, _ = written
    told = json.loads(run("export", folder, "--to", to, "-o", tmp_path / name, "--json").stdout)
    assert told["difference"] < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == [name]
    x = torch.randn(3, 1, *json.loads((folder / "grail.json").read_text())["calibration"]["size"][1:])
    expected = grail.load(folder)(x)
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / name)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        found = torch.export.load(tmp_path / name).module()(x)
    assert torch.linalg.vector_norm(found - expected) < 1e-4 * torch.linalg.vector_norm(expected)
    assert "exists" in run("export", folder, "--to", to, "-o", tmp_path / name, code=2).stderr


class Own(nn.Module):
    """A class that no library makes."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5, bias=False)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize("bias", [False, True])
def test_a_network_of_ones_own_class_opens_with_a_module_of_the_original_widths(tmp_path, bias):
    torch.manual_seed(0)
    own, x = Own(), torch.randn(64, 8)
    site = grail.channels("fc1", "fc2", width=32)
    report = grail.compress(
        own, method="wanda", ratio=0.5, calibration=x, sites=[site], bias=bias, output=tmp_path / "out"
    )
    assert report.output == str(tmp_path / "out")
    loaded = grail.load(tmp_path / "out", module=own)
    assert torch.equal(loaded(x), report.model(x))
    assert (loaded.fc2.bias is not None) is bias
    assert own.fc1.out_features == 32
    with pytest.raises(GrailError, match="module="):
        grail.load(tmp_path / "out")


class Twice(Own):
    """One that answers with more than a tensor."""

    def forward(self, x):
        return {"scores": super().forward(x), "more": (x, None)}


def test_a_network_with_several_outputs_is_opened_again_too(tmp_path):
    torch.manual_seed(0)
    own, x = Twice(), torch.randn(64, 8)
    asked = {"method": "wanda", "ratio": 0.5, "calibration": x, "sites": [grail.channels("fc1", "fc2", width=32)]}
    report = grail.compress(own, output=tmp_path / "out", **asked)
    loaded = grail.load(tmp_path / "out", module=own)
    assert torch.equal(loaded(x)["scores"], report.model(x)["scores"])


def test_a_named_network_takes_tensors_for_calibration(home, tmp_path):
    inputs = torch.randn(8, 1, 64, 64)
    asked = {"method": "wanda", "ratio": 0.5, "calibration": inputs, "weights": home / "weights.safetensors"}
    report = grail.compress("timm/resnet10t", output=tmp_path / "out", **asked)
    assert [report.calibration[name] for name in ("images", "trial_windows", "scarce")] == [8, 0, True]
    assert torch.equal(grail.load(tmp_path / "out")(inputs), report.model(inputs))


def test_a_module_stays_where_it_is():
    with pytest.raises(GrailError, match="leave out device"):
        grail.compress(Own(), device="cpu", calibration=torch.randn(4, 8), sites=[])


def test_eval_takes_some_of_a_folder_of_images_of_different_sizes(written, tmp_path):
    folder, _ = written
    random = np.random.default_rng(0)
    for number in range(12):
        size = (20 + number, 30 - number)
        file = tmp_path / "images" / str(number % 3) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(file)
    found = evaluate_folders(str(folder), data=str(tmp_path / "images"), samples=5, against=None, speed=False)
    assert found["images"] == found["models"][str(folder)]["count"] == 5
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "images" / "none.png")
    with pytest.raises(GrailError, match=r"--data .* has no labels"):
        evaluate_folders(str(folder), data=str(tmp_path / "images"), samples=5, against=None, speed=False)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"library": "timm", "name": "resnet10t", "options": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"library": "timm", "name": "hf-hub:owner/name", "options": {}}, "no such network"),
        ({"library": "os", "name": "system", "options": {}}, "no such network"),
        ({"library": "torchvision", "name": "resnet18", "options": {"weights": "DEFAULT"}}, "weights"),
        ({"name": "resnet18"}, "no architecture"),
        (3, "no architecture"),
    ],
)
def test_a_hostile_config_names_no_code_and_no_file(written, tmp_path, architecture, said):
    folder, _ = written
    (tmp_path / "bad").mkdir()
    for file in folder.iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"architecture": architecture}))
    with pytest.raises(GrailError, match=said):
        grail.load(tmp_path / "bad")


@pytest.mark.parametrize("damage", ["kept", "nothing kept", "more kept", "sites", "weights", "owner", "truncated"])
def test_a_damaged_folder_is_refused_in_a_sentence(written, tmp_path, damage):
    folder, _ = written
    bad = tmp_path / "bad"
    bad.mkdir()
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if damage == "kept":
        config["sites"][0]["kept"] = 7
    elif damage == "nothing kept":
        config["sites"][0]["kept"] = 0
    elif damage == "more kept":
        config["sites"][0]["kept"] = 10**6
    elif damage == "owner":
        tensors["nowhere.bias"] = torch.zeros(1)
    elif damage == "sites":
        del config["sites"][0]["consumer"]
    elif damage == "weights":
        del tensors["conv1.0.weight"]
    (bad / "config.json").write_text(json.dumps(config))
    save_file(tensors, bad / "model.safetensors")
    if damage == "truncated":
        (bad / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(GrailError, match=r"config\.json|model\.safetensors"):
        grail.load(bad)


@pytest.mark.parametrize(
    "versions, said",
    [
        ({"timm": "0.0.1", "torch": "1.0"}, r"(written with timm 0.0.1, here is {timm})"),
        (
            {"timm": "0.0.1", "transformers": "4.0"},
            "transformers 4.0, here is {transformers}; timm 0.0.1,",
        ),
        ({"timm": "{timm}"}, ""),
        ({"timm": "[red]\n" * 99}, ""),
        ([], ""),
    ],
)
def test_a_folder_that_does_not_fit_says_which_versions_wrote_it(written, tmp_path, versions, said):
    here = {name: importlib.metadata.version(name) for name in ("timm", "transformers")}
    bad = tmp_path / "bad"
    shutil.copytree(written[0], bad)
    if isinstance(versions, dict):
        versions = {name: version.format(**here) for name, version in versions.items()}
    (bad / "grail.json").write_text(json.dumps({"versions": versions}))
    save_file(load_file(bad / "model.safetensors") | {"nowhere.bias": torch.zeros(1)}, bad / "model.safetensors")
    with pytest.raises(GrailError, match="does not fit its config") as raised:
        grail.load(bad)
    assert said.format(**here) in str(raised.value) and bool(said) == ("written with" in str(raised.value))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--weights": "{home}/missing.safetensors"}, "no such file"),
        ({"--weights": "{home}/images.npz"}, "only .safetensors"),
        ({"--model": "timm/no-such-network"}, "no such network"),
        ({"--model": "timm/resnet18"}, "not weights of timm/resnet18"),
        ({"--model": "torchvision/resnet18", "--weights": None}, "--weights"),
        ({"--method": "wanda-pp-sp"}, "language models"),
        ({"--target": "elsewhere"}, "--target"),
        ({"--seq-len": "64"}, "--seq-len is for language models"),
        ({"--dtype": "bfloat16"}, "--dtype is for language models"),
        ({"--calibration": "{home}/nowhere"}, "nowhere"),
        ({"--model-option": "checkpoint_path=x"}, "checkpoint_path"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(home, tmp_path, options, said):
    given = {
        "--model": "timm/resnet10t", "--weights": "{home}/weights.safetensors", "--method": "fold", "--ratio": "0.5",
        "--calibration": "{home}/images.npz", "--samples": "8", "-o": str(tmp_path / "out"),
    } | options  # fmt: skip
    words = [word for flag, value in given.items() if value is not None for word in (flag, value.format(home=home))]
    done = run("compress", *words, "-q", code=2)
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_vision_options_are_refused_for_language_models(tmp_path):
    done = run("compress", "--model", "smollm2-135m", "--repair", "-o", tmp_path / "out", code=2)
    assert "--repair is for timm/NAME" in done.stderr
    done = run("plan", "--model", "timm/resnet18", code=2)
    assert "language models" in done.stderr


def test_reopening_runs_no_code_of_the_folder_one_is_in(tmp_path, monkeypatch):
    from grail.children import python

    for name in ("torch", "json", "grail"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder')")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(python("grail.modules.folder", "nowhere", "nothing"), capture_output=True, text=True)
    assert done.returncode == 1 and "code of the folder" not in done.stderr and "nothing" in done.stderr
