"""Which target a run takes where none was asked for: the stream where windows can be spared to choose by."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import grail
from grail.cli import app
from grail.errors import GrailError
from grail.modules.recipe import ModuleRecipe
from grail.recipe import AUTO, RIDGE, Recipe
from grail.recipes.options import differing
from tests.test_stream_target import tensors_of
from tests.tiny import VOCABULARY, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")


def ids(windows: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (windows, 32), generator=torch.Generator().manual_seed(1))


def compressed(source, output, calibration, **options) -> dict:
    asked = {"ratio": 0.4, "eval": "none", "calibration": calibration, "output": str(output)}
    grail.compress(str(source), **asked | options)
    return json.loads((output / "grail.json").read_text())


def test_is_the_stream_for_language_models_and_the_dense_hidden_vectors_for_others():
    text, images = Recipe(model="m"), ModuleRecipe(model=None)
    assert [text.target, text.ridge, text.alpha] == ["stream", AUTO, AUTO] and text.trial_windows == 16
    assert [images.target, images.ridge] == ["dense", RIDGE] and images.trial_windows == 0
    plain = text.site_by_site()
    assert [plain.target, plain.ridge, plain.trial_windows] == ["hidden", RIDGE, 0] and plain.wants_target


@pytest.mark.parametrize("options", [{"target": "stream"}, {"alpha": 0.5}, {"sweeps": 2}, {"ridge": AUTO}])
def test_is_asked_for_by_what_only_the_stream_has(source, tmp_path, options):
    """Then data that cannot spare windows is refused and not taken for something else."""
    assert Recipe(model="m", **options).wants_target
    said = r"less than 5 windows of 32 tokens, and .*--target stream has none"
    with pytest.raises(GrailError, match=said) as refusal:
        compressed(source, tmp_path / "out", ids(4), **options)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"target": "hidden"}, {"ridge": 0.5}, {"alpha": AUTO, "sweeps": 1}])
def test_is_not_asked_for_by_what_both_have(options):
    assert Recipe(model="m", **options).wants_target == (options == {"target": "hidden"})


@pytest.mark.parametrize("kind", ["tensor", "generator", "file"])
def test_is_every_site_on_its_own_where_no_window_can_be_spared(source, tmp_path, caplog, kind):
    """The same bytes as with --target hidden, all windows used, and a line that says so."""
    given = ids(4)
    save_file({"input_ids": given}, tmp_path / "ids.safetensors")
    calibration = {"tensor": given, "generator": iter(given), "file": str(tmp_path / "ids.safetensors")}[kind]
    with caplog.at_level(logging.WARNING):
        found = compressed(source, tmp_path / "out", calibration, bias=True, ridge=0.5)
    asked = compressed(source, tmp_path / "asked", given, bias=True, ridge=0.5, target="hidden")
    said = [record.getMessage() for record in caplog.records if "--target hidden" in record.getMessage()]
    assert len(said) == 1 and "less than 5 windows of 32 tokens" in said[0]
    assert found["recipe"] | {"calibration": None} == asked["recipe"] | {"calibration": None}
    assert [found["calibration"][name] for name in ("windows", "trial_windows")] == [4, 0]
    assert [site["alpha"] for site in found["sites"]] == [None] * 4
    out, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "asked")
    assert out.keys() == wanted.keys() and all(torch.equal(out[name], wanted[name]) for name in out)


def test_is_the_stream_from_five_windows_on(source, tmp_path):
    found = compressed(source, tmp_path / "out", ids(5))
    assert [found["calibration"][name] for name in ("windows", "trial_windows")] == [4, 1]
    assert found["recipe"]["target"] == "stream" and all(site["alpha"] is not None for site in found["sites"])
    assert "target" not in differing(found["recipe"], vision=False) | {"ridge": 0}


@pytest.mark.parametrize("windows, target", [(4, "hidden"), (8, "stream")])
def test_a_finished_run_is_known_again(source, tmp_path, windows, target):
    """Also where its result names another target than the command would have."""
    save_file({"input_ids": ids(windows)}, tmp_path / "ids.safetensors")
    flags = ["--model", source, "--calibration", tmp_path / "ids.safetensors", "--eval", "none", "--ratio", 0.4]
    command = ["compress", *map(str, flags), "--output", str(tmp_path / "out"), "--resume", "--quiet"]
    first, second = (CliRunner().invoke(app, command) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0), second.output
    assert json.loads((tmp_path / "out/grail.json").read_text())["recipe"]["target"] == target
    other = CliRunner().invoke(app, [*command, "--target", "hidden" if target == "stream" else "stream"])
    assert other.exit_code == 2, "another target is another result"
    recipe = CliRunner().invoke(app, ["run", str(tmp_path / "out/recipe.yaml"), "--set-option", f"output={tmp_path}/2"])
    assert recipe.exit_code == 0, recipe.output
    out, again = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "2")
    assert all(torch.equal(out[name], again[name]) for name in out | again)


def test_a_result_of_another_target_is_not_what_was_asked_for(source, tmp_path):
    """Every site on its own though windows could have been spared: the default would give something else."""
    save_file({"input_ids": ids(8)}, tmp_path / "ids.safetensors")
    flags = ["--model", source, "--calibration", tmp_path / "ids.safetensors", "--eval", "none", "--ratio", 0.4]
    command = ["compress", *map(str, flags), "--output", str(tmp_path / "out"), "--quiet"]
    codes = [CliRunner().invoke(app, [*command, *more]).exit_code for more in (["--target", "hidden"], ["--resume"])]
    assert codes == [0, 2]


def test_what_does_not_fit_names_the_target_that_needs_less(source, tmp_path):
    asked = {"calibration": ids(8), "memory": "1MB"}
    with pytest.raises(GrailError, match=r"--target hidden needs less$"):
        compressed(source, tmp_path / "stream", **asked)
    with pytest.raises(GrailError, match=r"before any work\)$"):
        compressed(source, tmp_path / "hidden", **asked, target="hidden")


@pytest.mark.parametrize("target, said", [("stream", "stream error"), ("hidden", "output error")])
def test_a_person_is_told_of_what_the_errors_are(source, tmp_path, target, said):
    save_file({"input_ids": ids(8)}, tmp_path / "ids.safetensors")
    flags = ["--model", source, "--calibration", tmp_path / "ids.safetensors", "--eval", "none", "--ratio", 0.4]
    done = CliRunner().invoke(app, ["compress", *map(str, flags), "--output", f"{tmp_path}/out", "--target", target])
    errors = next(line for line in done.stdout.splitlines() if "mean of 4 sites" in line)
    streams, words = target == "stream", "of the way to the dense stream"
    assert errors.startswith(said) and errors.endswith(words) == streams
    assert (words in (tmp_path / "out/report.html").read_text()) == streams
