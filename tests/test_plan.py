"""`grail plan` says what compress then does; a memory budget is kept or refused before work; disk is looked at."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
from typer.testing import CliRunner

import grail
from grail.cli import app
from grail.progress import Progress
from grail.recipe import Recipe
from grail.run import plan
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")
runner = CliRunner()


@pytest.fixture
def tiny(tmp_path):
    """Options for a tiny model with a text of 8 windows of 32 tokens."""
    return {
        "model": str(tiny_checkpoint(tmp_path / "source", num_hidden_layers=3)),
        "calibration": str(tiny_calibration(tmp_path / "ids.safetensors")),
        "output": str(tmp_path / "out"),
    }


def planned(**options) -> dict:
    return plan(Recipe(**options), Progress()).to_json()


BIASED = {"bias": True}


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"method": "slimgpt"}, {"gqa": "group"}, {"format": "padded"}, BIASED, BIASED | {"format": "padded"}),
        BIASED | {"format": "grail"},
    ],
    ids=str,
)
def test_the_plan_is_what_happens(tiny, options):
    found = planned(**tiny, **options)
    report = grail.compress(**tiny, **options)
    assert found["parameters"] == {"before": report.parameters[0], "after": report.parameters[1]}
    assert found["bytes"] == {"before": report.bytes[0], "after": report.bytes[1]}
    for kind, entry in found["sites"].items():
        sites = [r for r in report.results if r.site.kind == kind]
        assert entry["sites"] == len(sites)
        assert entry["before"] == sum(r.site.units.width for r in sites)
        assert entry["after"] == sum(r.reduction.kept_width if r.reduction else r.site.units.width for r in sites)
        assert entry["changed"] == sum(r.reduction is not None for r in sites)
    assert found["loads_with"] == report.loads_with and found["format"] == report.format.name
    assert found["target"] == "stream" and [found["calibration_tokens"], found["trial_tokens"]] == [7 * 32, 32]


def test_the_plan_counts_what_padding_gives_back(tiny, tmp_path):
    narrow = str(tmp_path / "narrow")
    grail.compress(**tiny | {"output": narrow}, ratio=0.5, bias=True, format="grail")
    options = tiny | {"model": narrow, "ratio": 0.0, "format": "padded"}
    report = grail.compress(**options)
    found = planned(**options | {"output": str(tmp_path / "other")})
    assert report.parameters[1] > report.parameters[0]
    assert found["parameters"] == {"before": report.parameters[0], "after": report.parameters[1]}
    assert found["bytes"] == {"before": report.bytes[0], "after": report.bytes[1]}


def test_a_plan_writes_nothing_and_needs_no_output(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    asked = ["plan", "--model", tiny["model"], "--calibration", tiny["calibration"]]
    for more in ([], ["--json"], ["--method", "flap"]):
        done = runner.invoke(app, [*asked, *more])
        assert done.exit_code == 0, done.output
        if more == ["--json"]:
            assert json.loads(done.stdout)["schema_version"] == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_reads_no_weights(tiny, monkeypatch):
    from grail.checkpoint.reader import SafetensorsFolder

    get = SafetensorsFolder.get
    only_text = lambda folder, name: get(folder, name) if name == "input_ids" else pytest.fail(name)  # noqa: E731
    monkeypatch.setattr(SafetensorsFolder, "get", only_text)
    assert planned(**tiny)["layers"] == 3


def test_a_plan_refuses_what_compress_refuses(tiny):
    options = tiny | {"ratio": 2}
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    for command in ("plan", "compress"):
        done = runner.invoke(app, [command, *words])
        assert done.exit_code == 2 and "--ratio" in done.stderr


def test_more_work_costs_more(tiny):
    one, two = planned(**tiny, target="hidden"), planned(**tiny, target="hidden", method="flap")
    assert two["passes"] == 2 and two["flops"]["forward"] > 1.9 * one["flops"]["forward"]
    beside = planned(**tiny)["flops"]
    assert 1.9 < beside["forward"] / one["flops"]["forward"] < 2.1 and beside["solve"] > one["flops"]["solve"]
    assert planned(**tiny, compensate=False)["flops"]["solve"] == 0
    assert planned(**tiny, method="wanda-pp-sp")["flops"]["training"] > 0
    assert planned(**tiny, ratio=0)["flops"]["gram"] == 0


def test_arithmetic_by_hand(tiny):
    """Three layers of 6 x 8 heads over 2 key/value heads, width 48, 40 channels; 256 tokens in windows of 32."""
    layer = 48 * (48 + 16 + 16 + 48 + 3 * 40) + 2 * 48 + 2 * 32 * 48
    found = planned(**tiny, eval=tiny["calibration"], target="hidden")["flops"]
    assert found["forward"] == 2 * 256 * 3 * layer
    assert found["gram"] == 256 * 3 * (48**2 + 40**2)
    assert found["evaluation"] == 256 * 2 * (2 * 3 * layer + 2 * 64 * 48)


def test_a_budget_is_refused_before_work_with_both_numbers(tiny, tmp_path):
    with pytest.raises(grail.errors.GrailError, match=r"--memory 100.00 MB cannot be kept: .* needs \d+\.\d\d [MG]B"):
        grail.compress(**tiny, memory="100MB")
    assert not (tmp_path / "out.partial").exists()


def test_a_budget_makes_chunks_smaller_down_to_one_window(tmp_path):
    """Widths for which the activations of a chunk are most of the memory."""
    source = tiny_checkpoint(tmp_path / "source", intermediate_size=4096, num_hidden_layers=1)
    options = {"model": str(source), "calibration": str(tiny_calibration(tmp_path / "ids.safetensors", 128, 64))}
    options |= {"output": str(tmp_path / "out"), "method": "mag-sp", "bias": True, "compensate": False, "store": "disk"}
    free = plan(Recipe(**options), Progress())
    assert free.costs.chunk == 4096
    budget = free.memory["process"] + (free.peak - free.memory["process"]) // 3
    tight = plan(Recipe(**options, memory=budget), Progress())
    assert 64 <= tight.costs.chunk < 4096 and tight.peak <= budget + 10**7
    assert tight.costs.chunk % 64 == 0


@pytest.mark.parametrize("text", ["", "4", "x", "4 apples", "-3GB", "0", True, "1e9GB"])
def test_sizes_that_are_none(text):
    if text == "4":
        assert Recipe("m", memory=text).memory == 4
        return
    with pytest.raises(grail.errors.GrailError, match="--memory"):
        Recipe("m", memory=text)


@pytest.mark.parametrize(
    ("text", "size"), {"4GB": 4e9, "1.5 gib": 1.5 * 2**30, "500M": 5e8, 7_000: 7000, "2tb": 2e12}.items()
)
def test_sizes(text, size):
    assert Recipe("m", memory=text).memory == size


def test_a_full_disk_is_noticed_before_work(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1000))
    with pytest.raises(grail.errors.GrailError, match=r"needs about .* of disk, 1.00 kB are free"):
        grail.compress(**tiny)
    assert not (tmp_path / "out.partial").exists()


def test_stores_give_the_same_bytes_and_so_does_computing_twice(tiny, tmp_path, monkeypatch):
    """Where activations lie, and whether hidden vectors are spilled, changes no bit."""
    from grail.session import Session

    for method in ("wanda-sp", "fold", "flap", "wanda-pp-sp"):
        outputs = []
        for name, store, spill in (
            ("a", "disk", True),
            ("b", "memory", True),
            ("c", "disk", False),
            ("d", "memory", False),
            ("e", "auto", True),
        ):
            monkeypatch.setattr(Session, "spill", spill)
            monkeypatch.setattr(Session, "chunk_tokens", 64)
            outputs.append(tmp_path / f"{method}-{name}")
            grail.compress(**tiny | {"output": str(outputs[-1])}, store=store, method=method)
        for file in sorted(path.name for path in outputs[0].iterdir()):
            if file not in ("run.json", "report.html", "README.md"):
                assert len({(output / file).read_bytes() for output in outputs}) == 1, f"{method}: {file}"


def test_what_is_there_already_is_not_asked_for_again(tiny, tmp_path, monkeypatch):
    """After a full disk it is enough to make room for the rest."""
    needed = planned(**tiny)["disk_bytes"]
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "lock").touch()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, needed // 2))
    with pytest.raises(grail.errors.GrailError, match="of disk"):
        grail.compress(**tiny, resume=True)
    left.mkdir(exist_ok=True)
    (left / "lock").touch()
    (left / "chunk").write_bytes(bytes(needed))
    assert grail.compress(**tiny, resume=True).output
