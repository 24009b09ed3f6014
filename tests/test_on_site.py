"""`on_site`: every site of the result once, in execution order, as the report has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grail
from grail.errors import GrailError, Interrupted
from grail.progress import Progress, Telling
from tests.test_distributed import free_port
from tests.test_modules import MLP
from tests.test_vision_families import built, images
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model
from tests.tiny_hf import KINDS
from tests.tiny_hf import compress as compress_hf

pytestmark = pytest.mark.usefixtures("reopen_here")
ROOT = Path(__file__).parents[1]


def windows(count=8):
    return torch.randint(64, (count, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path):
    return tiny_checkpoint(tmp_path / "source", num_hidden_layers=3)


LANGUAGE = {
    "wanda-sp": {},
    "heads-alone": {"mlp_ratio": 0.0},
    "trained": {"method": "wanda-pp-sp"},
    "stream": {"target": "stream"},
    "fold": {"method": "fold", "compensate": False},
    "error": {"method": "gram", "allocation": "error"},
}


@pytest.mark.parametrize("kind", LANGUAGE)
def test_the_sites_of_a_language_model(tmp_path, source, kind):
    told = []
    report = grail.compress(
        source, output=tmp_path / "out", calibration=windows(), on_site=told.append, **LANGUAGE[kind]
    )
    assert told == report.sites and len(told) == 6
    assert json.loads((tmp_path / "out" / "grail.json").read_text())["sites"] == json.loads(json.dumps(told))
    assert any(entry["trained"] for entry in told) == (kind == "trained")


def test_the_pass_that_is_only_pruned_is_not_told(tmp_path, source):
    told, ids = [], str(tiny_calibration(tmp_path / "ids.safetensors"))
    report = grail.compress(
        source, output=tmp_path / "out", calibration=ids, eval=ids, compare_pruned=True, on_site=told.append
    )
    assert "pruned" in report.evaluation["perplexity"] and told == report.sites


def test_a_module_of_transformers():
    told = []
    assert grail.compress(tiny_model(), calibration=windows(), on_site=told.append).sites == told


VISION = {
    "blocks": {"method": "wanda"},
    "fold": {"method": "fold", "compensate": False},
    "residual": {"method": "gram", "residual_ratio": 0.5},
    "one-shot": {"method": "wanda", "one_shot": True},
    "global": {"method": "gram", "allocation": "global"},
    "some-stay": {"method": "wanda", "ratio": 0.0, "residual_ratio": 0.5},
}


@pytest.mark.parametrize("kind", VISION)
def test_the_sites_of_a_network(kind):
    told = []
    report = grail.compress(
        built("cifar"), calibration=images(8), on_site=told.append, **({"ratio": 0.5} | VISION[kind])
    )
    assert told == report.sites and len(told) >= 2


def test_both_towers_of_a_clip():
    told = []
    report = compress_hf(KINDS["clip"].build(), method="wanda", ratio=0.5, on_site=told.append)
    assert told == report.sites and {entry["name"].partition("_")[0] for entry in told} == {"vision", "text"}


def test_the_network_that_is_only_pruned_is_not_told(tmp_path, caplog):
    told, pixels = [], torch.randint(256, (16, 8, 8, 3), generator=torch.Generator().manual_seed(0)).numpy()
    labels = np.arange(16) % 3
    np.savez(
        tmp_path / "a.npz",
        x_train=pixels.astype(np.uint8),
        y_train=labels,
        x_test=pixels.astype(np.uint8),
        y_test=labels,
    )
    report = grail.compress(
        built("cifar"),
        calibration=str(tmp_path / "a.npz"),
        preprocessing=grail.Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3),
        method="wanda",
        compare_pruned=True,
        on_site=told.append,
        attn_ratio=0.5,
    )
    assert "pruned" in report.evaluation["accuracy"] and told == report.sites
    assert caplog.text.count("--attn-ratio changes nothing") == 1  # though the run that is only pruned reads it too


# --- errors and interruptions -------------------------------------------------------------------------------------


class After:
    """Keeps what it is told; at entry `number` it raises."""

    def __init__(self, number: int, error: BaseException):
        self.number, self.error, self.told = number, error, []

    def __call__(self, entry):
        self.told.append(entry)
        if len(self.told) == self.number:
            raise self.error


def test_ctrl_c_in_it_keeps_the_work_and_the_sites_come_again_on_resume(tmp_path, source):
    flags = {"calibration": windows(), "store": "disk"}
    whole = grail.compress(source, output=tmp_path / "whole", **flags)
    stop = After(3, KeyboardInterrupt())
    with pytest.raises(Interrupted, match="--resume"):
        grail.compress(source, output=tmp_path / "out", on_site=stop, **flags)
    assert stop.told == whole.sites[:3] and not (tmp_path / "out").exists()
    progress, told = Layers(), []
    report = grail.compress(
        source, output=tmp_path / "out", resume=True, on_site=told.append, progress=progress, **flags
    )
    assert progress.done == [2], "the layer whose site was told last is kept"
    assert told == report.sites == whole.sites
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


class Layers(Progress):
    """Which layers are compressed."""

    def __init__(self):
        self.done = []

    def layers(self, label):
        return lambda layers: (self.done.append(layer) or layer for layer in layers)


def test_an_error_in_it_stops_the_run_and_can_be_gone_on_from(tmp_path, source):
    flags = {"calibration": windows(), "store": "disk"}
    with pytest.raises(ZeroDivisionError):
        grail.compress(source, output=tmp_path / "out", on_site=After(3, ZeroDivisionError()), **flags)
    assert not (tmp_path / "out").exists()
    report = grail.compress(source, output=tmp_path / "out", resume=True, **flags)
    assert len(report.sites) == 6


@pytest.mark.parametrize("number", [1, 3])
def test_an_error_where_nothing_can_be_kept_leaves_nothing(tmp_path, source, number):
    after = After(number, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        grail.compress(source, output=tmp_path / "out", on_site=after, calibration=windows(), store="memory")
    assert [file.name for file in tmp_path.iterdir()] == ["source"] and len(after.told) == number


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_while_a_network_is_narrowed_leaves_nothing(tmp_path, error):
    net, flags = MLP(), {"method": "wanda", "calibration": torch.randn(32, 1, 1, 12)}
    sites = [grail.channels("fc1", "fc2", width=24), grail.channels("fc2", "fc3", width=20)]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(error):
        grail.compress(net, sites=sites, output=tmp_path / "out", on_site=After(2, error()), **flags)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_what_is_no_function_is_refused_before_any_work(tmp_path, source):
    with pytest.raises(GrailError, match=r"on_site must be a function .* got list"):
        grail.compress(source, output=tmp_path / "out", calibration=windows(), on_site=[])


# --- whose code it is ---------------------------------------------------------------------------------------------


def test_it_is_called_in_the_state_of_the_script_and_may_change_its_entry(monkeypatch):
    monkeypatch.setenv("GRAIL_TEST_SITE", "")  # as wandb.init does, for one
    drawn, net = [], MLP()
    sites = [grail.channels("fc1", "fc2", width=24), grail.channels("fc2", "fc3", width=20)]
    calibration = torch.randn(32, 1, 1, 12)

    def callback(entry):
        drawn.append((torch.rand(1).item(), torch.is_grad_enabled(), torch.ones(1).dtype))
        os.environ["GRAIL_TEST_SITE"] += entry.pop("name") + " "
        entry.clear()

    torch.manual_seed(5)
    expected = torch.rand(3, dtype=torch.float64).tolist()
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            report = grail.compress(net, method="wanda", sites=sites, calibration=calibration, on_site=callback)
        drawn.append((torch.rand(1).item(), False, torch.float64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn == [(value, False, torch.float64) for value in expected]
    assert [entry["name"] for entry in report.sites] == ["fc1", "fc2"]
    assert os.environ["GRAIL_TEST_SITE"] == "fc1 fc2 "


def test_a_loader_that_shuffles_goes_by_the_seed_of_the_script():
    """Its data are computed while we work: they are the script's all the same."""
    model, found = tiny_model(), {}
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(windows(64), batch_size=4, shuffle=True)
        report = grail.compress(model, calibration=loader, samples=8)
        drawn = torch.rand(1).item()
        digest = report.calibration["sha256"]
        assert found.setdefault(seed, (digest, drawn)) == (digest, drawn)
    assert found[1] != found[2]


def test_a_progress_is_told_too_and_hears_everything_else():
    class Loud(Progress):
        def __init__(self):
            self.heard = []

        def say(self, line):
            self.heard.append(line)

        def warn(self, line):
            self.heard.append(f"warning: {line}")

        def site(self, entry):
            self.heard.append(entry["name"])

    loud, told = Loud(), []
    telling = Telling(loud, told.append)
    telling.say("a")
    telling.warn("b")
    telling.site({"name": "c"})
    assert loud.heard == ["a", "warning: b", "c"] and told == [{"name": "c"}]
    assert list(telling.layers("d")(range(2))) == [0, 1]


SCRIPT = """
import sys, torch, grail
told = []
report = grail.compress(sys.argv[1], output=sys.argv[2], calibration=sys.argv[3], on_site=told.append, device="cpu")
print(len(told), report is None or told == report.sites)
"""


def test_of_several_processes_the_main_one_is_told(tmp_path, source):
    ids = tiny_calibration(tmp_path / "ids.safetensors")
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "LOCAL_WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, source, tmp_path / "out", ids],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200) for process in running]
    assert [out.strip() for out, _ in said] == ["6 True", "0 True"], said
