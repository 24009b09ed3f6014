"""Which target a run takes where none was asked for: the stream where windows can be spared to choose by."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import grail
from grail.calibration import load_calibration
from grail.cli import app
from grail.errors import GrailError
from grail.modules.recipe import ModuleRecipe
from grail.progress import Progress
from grail.recipe import AUTO, RIDGE, Recipe
from grail.recipes.options import differing
from grail.run import plan
from tests.test_calibration import Numbers
from tests.test_stream_target import tensors_of
from tests.tiny import VOCABULARY, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")


class Heard(Progress):
    """Keeps what is warned of."""

    def __init__(self):
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def ids(windows: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (windows, 32), generator=torch.Generator().manual_seed(1))


def compressed(source, output, calibration, **options) -> dict:
    asked = {"ratio": 0.4, "eval": "none", "calibration": calibration, "output": str(output)}
    grail.compress(str(source), **asked | options)
    return json.loads((output / "grail.json").read_text())


@pytest.mark.parametrize("kind, alone", [(Recipe, "hidden"), (ModuleRecipe, "dense")])
def test_is_the_stream(kind, alone):
    found = kind(model="m")
    assert [found.target, found.ridge, found.alpha] == ["stream", AUTO, AUTO]
    assert found.trial_windows == (8 if kind is Recipe else 16), "of 128"
    plain = found.site_by_site()
    assert [plain.target, plain.ridge, plain.trial_windows] == [alone, RIDGE, 0] and plain.wants_target


@pytest.mark.parametrize("options", [{"one_shot": True}, {"residual_ratio": 0.25}], ids=str)
def test_is_the_dense_hidden_vectors_where_no_stream_is_followed(options):
    found = ModuleRecipe(model=None, **options)
    assert [found.target, found.ridge, found.trial_windows, found.wants_target] == ["dense", RIDGE, 0, False]
    with pytest.raises(GrailError, match="--alpha is for --target stream"):
        ModuleRecipe(model=None, alpha=0.5, **options)
    said = differing(found.to_json(), vision=True)
    assert said.get("target") == "dense" and "ridge" not in said, "so that it is the same with other options"


@pytest.mark.parametrize("options", [{"target": "stream"}, {"alpha": 0.5}, {"sweeps": 2}, {"ridge": AUTO}])
def test_is_asked_for_by_what_only_the_stream_has(source, tmp_path, options):
    """Then data that cannot spare windows is refused and not taken for something else."""
    assert Recipe(model="m", **options).wants_target
    said = r"has no window of 32 tokens to spare .*, and --target stream needs some"
    with pytest.raises(GrailError, match=said) as refusal:
        compressed(source, tmp_path / "out", ids(4), **options)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"target": "hidden"}, {"ridge": 0.5}, {"alpha": AUTO, "sweeps": 1}])
def test_is_not_asked_for_by_what_both_have(options):
    assert Recipe(model="m", **options).wants_target == (options == {"target": "hidden"})


@pytest.mark.parametrize("kind", ["tensor", "generator", "file"])
def test_is_every_site_on_its_own_where_no_window_can_be_spared(source, tmp_path, kind):
    """The same bytes as with --target hidden, all windows used, and a line that says so."""
    given = ids(4)
    save_file({"input_ids": given}, tmp_path / "ids.safetensors")
    calibration = {"tensor": given, "generator": iter(given), "file": str(tmp_path / "ids.safetensors")}[kind]
    heard = Heard()
    found = compressed(source, tmp_path / "out", calibration, bias=True, ridge=0.5, progress=heard)
    asked = compressed(source, tmp_path / "asked", given, bias=True, ridge=0.5, target="hidden")
    said = [text for text in heard.said if "--target hidden" in text]
    assert len(said) == 1 and "has no window of 32 tokens to spare" in said[0]
    assert found["recipe"] | {"calibration": None} == asked["recipe"] | {"calibration": None}
    assert [found["calibration"][name] for name in ("windows", "trial_windows")] == [4, 0]
    assert [site["alpha"] for site in found["sites"]] == [None] * 4
    out, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "asked")
    assert out.keys() == wanted.keys() and all(torch.equal(out[name], wanted[name]) for name in out)


def test_is_the_stream_from_five_windows_on(source, tmp_path):
    found = compressed(source, tmp_path / "out", ids(5))
    assert [found["calibration"][name] for name in ("windows", "trial_windows")] == [4, 1]
    assert found["recipe"]["target"] == "stream" and all(site["alpha"] is not None for site in found["sites"])
    assert "target" not in differing(found["recipe"], vision=False)


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


@pytest.mark.parametrize("samples", [3, 128])
def test_a_result_of_another_target_is_not_what_was_asked_for(source, tmp_path, samples):
    """Every site on its own though windows could have been spared: the default would give something else."""
    save_file({"input_ids": ids(8)}, tmp_path / "ids.safetensors")
    flags = ["--model", source, "--calibration", tmp_path / "ids.safetensors", "--eval", "none", "--samples", samples]
    command = ["compress", *map(str, flags), "--output", str(tmp_path / "out"), "--quiet"]
    codes = [CliRunner().invoke(app, [*command, *more]).exit_code for more in (["--target", "hidden"], ["--resume"])]
    assert codes == [0, 2]


def test_what_does_not_fit_names_the_target_that_would(source, tmp_path):
    """And does not where nothing fits."""
    wide = tiny_checkpoint(tmp_path / "wide", hidden_size=1152, intermediate_size=3000, num_hidden_layers=1)
    asked = {"model": str(wide), "calibration": ids(8), "output": str(tmp_path / "out"), "eval": "none"}
    peaks = [plan(Recipe(**asked, target=target), Progress()).peak for target in ("hidden", "stream")]
    between = sum(peaks) // 2
    assert peaks[1] - peaks[0] > 2e7, "this network does not show a difference"
    with pytest.raises(GrailError, match=r"with --target hidden it would do$"):
        plan(Recipe(**asked, memory=between), Progress())
    plan(Recipe(**asked, memory=between, target="hidden"), Progress())
    with pytest.raises(GrailError, match=r"before any work\)$"):
        plan(Recipe(**asked, memory="1MB"), Progress())


def weighted(windows: int, last: float) -> dict:
    """Windows whose tokens count differently, those of the last one so many times as much."""
    weights = torch.rand(windows, 32, generator=torch.Generator().manual_seed(2))
    weights[-1] *= last
    return {"input_ids": ids(windows), "weights": weights}


@pytest.mark.parametrize("windows, asked", [(4, {"samples": 3}), (8, {})], ids=["few", "the last count nothing"])
def test_weights_are_those_of_the_windows_that_are_used(source, tmp_path, windows, asked):
    """A last window that is left out, or that could not decide, has no say in how much the others count."""
    save_file(weighted(windows, last=100.0 if asked else 0.0), tmp_path / "ids.safetensors")
    file, found = str(tmp_path / "ids.safetensors"), {}
    for name, more in {"out": {}, "hidden": {"target": "hidden"}}.items():
        found[name] = compressed(source, tmp_path / name, file, **asked, **more)
    assert [found[name]["recipe"]["target"] for name in found] == ["hidden"] * 2
    assert found["out"] == found["hidden"]
    out, wanted = (tensors_of(tmp_path / name) for name in found)
    assert all(torch.equal(out[name], wanted[name]) for name in out | wanted)


def test_weights_that_are_all_0_are_refused_whatever_was_left_out(source, tmp_path):
    weights = torch.zeros(4, 32)
    weights[3] = 1
    save_file({"input_ids": ids(4), "weights": weights}, tmp_path / "ids.safetensors")
    with pytest.raises(GrailError, match="not all 0"):
        compressed(source, tmp_path / "out", str(tmp_path / "ids.safetensors"), samples=3)


@pytest.mark.parametrize("order", [["little", "much"], ["much", "little"]], ids="-".join)
def test_every_text_of_a_mixture_must_spare_some(source, tmp_path, order):
    """What one of them decides would be about that one alone; the sentence names the other."""
    for name, windows in {"little": 4, "much": 20}.items():
        save_file({"input_ids": ids(windows)}, tmp_path / f"{name}.safetensors")
    both = "+".join(str(tmp_path / f"{name}.safetensors") for name in order)
    asked = {"samples": 8, "seq_len": 32}
    with pytest.raises(GrailError, match=r"little.safetensors has no window of 32 tokens to spare"):
        compressed(source, tmp_path / "refused", both, **asked, target="stream")
    heard = Heard()
    found = compressed(source, tmp_path / "out", both, **asked, progress=heard)
    assert any("little.safetensors has no window" in text for text in heard.said)
    assert found["recipe"]["target"] == "hidden"
    assert found == compressed(source, tmp_path / "hidden", both, **asked, target="hidden")


def test_a_sentence_about_the_format_names_the_target_that_gives_no_bias(tmp_path):
    """Towards the stream also sites get one from which nothing is removed; with too little text they do not."""
    source = tiny_checkpoint(tmp_path / "source", "qwen3")
    asked = {"bias": True, "mlp_ratio": 0.0, "format": "uniform"}
    with pytest.raises(GrailError, match=r"bias in down_proj.*--target hidden"):
        compressed(source, tmp_path / "stream", ids(8), **asked)
    assert compressed(source, tmp_path / "out", ids(4), **asked)["recipe"]["target"] == "hidden"


@pytest.mark.parametrize(
    "more, target", [(["--target", "stream"], "stream"), (["--ridge", "auto"], "stream"), ([], None)]
)
def test_a_printed_recipe_says_what_was_asked_for(source, more, target):
    command = ["compress", "--model", str(source), "--output", "out", "--print-recipe", "--json", *more]
    assert json.loads(CliRunner().invoke(app, command).stdout)["recipe"].get("target") == target


def test_a_run_without_repair_aims_at_nothing(source, tmp_path):
    save_file({"input_ids": ids(8)}, tmp_path / "ids.safetensors")
    flags = ["--model", source, "--calibration", tmp_path / "ids.safetensors", "--eval", "none", "--no-compensate"]
    flags += ["--method", "slimgpt", "--set", "obs=true"]
    done = CliRunner().invoke(app, ["compress", *map(str, flags), "--output", f"{tmp_path}/out"])
    assert "output error" in done.stdout and "stream" not in done.stdout
    page = (tmp_path / "out/report.html").read_text()
    assert "target stream" not in page and "dense stream" not in page
    assert json.loads(CliRunner().invoke(app, ["plan", *map(str, flags), "--json"]).stdout)["target"] is None


@pytest.mark.parametrize("target, said", [("stream", "stream error"), ("hidden", "output error")])
def test_a_person_is_told_of_what_the_errors_are(source, tmp_path, target, said):
    save_file({"input_ids": ids(8)}, tmp_path / "ids.safetensors")
    flags = ["--model", source, "--calibration", tmp_path / "ids.safetensors", "--eval", "none", "--ratio", 0.4]
    done = CliRunner().invoke(app, ["compress", *map(str, flags), "--output", f"{tmp_path}/out", "--target", target])
    errors = next(line for line in done.stdout.splitlines() if "mean of 4 sites" in line)
    streams, words = target == "stream", "of what is missing to the dense stream"
    assert errors.startswith(said) and errors.endswith(words) == streams
    assert (words in (tmp_path / "out/report.html").read_text()) == streams


def test_who_chooses_nothing_reads_no_more_text_for_it(tmp_path):
    """Windows are drawn from what was read: more would be other windows than before there was a choice."""
    texts = [" ".join(str(i) for i in range(start, start + 10)) for start in range(0, 3000, 10)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = {"samples": 4, "seq_len": 8, "seed": 0}
    plain, spared = (
        load_calibration(str(tmp_path / "text.jsonl"), Numbers, 10_000, trial=trial, chooses=False, **asked)
        for trial in (0, 16)
    )
    assert torch.equal(plain.ids, spared.ids) and plain.trial is spared.trial is plain.scarce is spared.scarce is None
