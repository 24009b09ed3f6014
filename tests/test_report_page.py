"""report.html: of real runs, of folders that lack things, of several at once; looked at by a browser where one is."""

from __future__ import annotations

import copy
import functools
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import grail
from grail.cli import app
from grail.page import write_report
from grail.page.axis import linear, logarithmic
from grail.page.command import arguments, call
from grail.page.markup import VOID, Markup, element
from grail.page.run import Run
from grail.page.single import page
from grail.page.style import DARK, LIGHT, NIGHT, PAPER
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")
runner = CliRunner()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """Tags that are closed in order, what they point at, and the text between them."""

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(content: str) -> Reader:
    """A page that is well formed, whole in one file and without a script."""
    found = Reader(content)
    assert content.startswith("<!DOCTYPE html>")
    assert "script" not in found.tags and "link" not in found.tags and "img" not in found.tags
    assert not [name for name, _ in found.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", content)
    assert "None" not in found.text and "nan" not in found.text.split()
    return found


@functools.cache
def example() -> dict:
    """A grail.json as a run with the stream target leaves it, 4 layers."""
    sites = []
    for layer in range(4):
        for name, kind, before, after in (
            ("self_attn.o_proj", "heads", 64, 48),
            ("mlp.down_proj", "channels", 160, 96),
        ):
            sites.append({
                "name": f"model.layers.{layer}.{name}", "kind": kind, "before": before, "after": after,
                "lambda": 0.01 * (layer + 1), "retries": int(layer == 2), "rcond": 1e-5 / (layer + 1),
                "error_before": 0.2 / (layer + 1), "error_after": 0.01 * (layer + 1), "effective_rank": 5.5 + layer,
                "alpha": 0.25 * layer, "held_out_errors": [0.02, 0.015], "trained": False,
            })  # fmt: skip
    recipe = grail.Recipe(model="some/model", target="stream", ratio=0.4).to_json()
    return {
        "schema_version": 1,
        "recipe": recipe,
        "versions": {"torch": "2.14"},
        "source": {"id": "some/model", "revision": None, "sha256": "ab" * 32},
        "calibration": {"source": "builtin", "sha256": "cd" * 32, "windows": 8, "seq_len": 32, "tokens": 256},
        "sites": sites,
        "allocation": "uniform",
        "bias": False,
        "ratio": {"heads": {"asked": 0.4, "reached": 0.25}, "overall": {"asked": 0.4, "reached": 0.37}},
        "parameters": {"before": 1_000_000, "after": 700_000},
        "bytes": {"before": 4_000_000, "after": 2_800_000},
        "evaluation": {
            "data": "builtin", "sha256": "ef" * 32, "windows": 4, "seq_len": 32,
            "perplexity": {"dense": 13.19, "pruned": 153.8, "compressed": 21.2},
        },
        "format": "uniform",
        "loads_with": "transformers LlamaForCausalLM",
        "class_changed": None,
    }  # fmt: skip


def ran() -> dict:
    phase = {"seconds": 3.25, "cpu_seconds": 6.0, "peak_memory_bytes": 5 * 10**8}
    return {
        "seconds": {"compress": 12.5, "evaluating compressed": 75.0},
        "profile": {"forward": phase, "gram": phase | {"seconds": 1.0}},
        "planned": {"processes": 1, "memory_bytes": {"peak": 6 * 10**8}, "seconds": {"total": 80.0}},
        "peak_memory_bytes": 5 * 10**8,
        "reopened": {"logit_difference": 0.0, "how": "at once"},
        "platform": "Linux",
    }


def variant(**changed) -> dict:
    return copy.deepcopy(example()) | changed


def folder_of(path: Path, document: dict, run: dict | None = None) -> str:
    path.mkdir()
    (path / "grail.json").write_text(json.dumps(document))
    if run is not None:
        (path / "run.json").write_text(json.dumps(run))
    return str(path)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


@pytest.fixture
def written(tmp_path):
    """A real run of the command line with everything there is to tell."""
    source = tiny_checkpoint(tmp_path / "source")
    data = tiny_calibration(tmp_path / "it's data.safetensors")
    options = ["--calibration", data, "--eval", data, "--compare-pruned", "--profile", "--quiet", "--ratio", "0.5"]
    done = runner.invoke(
        app, ["compress", "--model", str(source), "--output", str(tmp_path / "out"), *map(str, options)]
    )
    assert done.exit_code == 0, done.output
    return tmp_path / "out"


class TestRealRuns:
    def test_a_language_model_is_told_whole(self, written):
        content = (written / "report.html").read_text()
        text = read(content).text
        told = json.loads((written / "grail.json").read_text())
        for value in told["evaluation"]["perplexity"].values():
            assert f"{value:.2f}" in text
        for site in told["sites"]:
            assert site["name"].removeprefix("model.layers.") in text
            assert format(site["effective_rank"], ".4g") in text
        for title in (
            "Perplexity",
            "Error of heads",
            "Width of channels",
            "Effective rank",
            "Time by phase",
            "Memory by",
        ):
            assert title in text
        assert "AutoModelForCausalLM.from_pretrained('out')" in text

    def test_the_command_writes_the_same_page_again(self, written):
        before = (written / "report.html").read_bytes()
        (written / "report.html").unlink()
        done = runner.invoke(app, ["report", str(written), "--json"])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert (told["schema_version"], told["output"]) == (1, str(written / "report.html"))
        assert (written / "report.html").read_bytes() == before
        assert runner.invoke(app, ["report", str(written)]).exit_code == 0, "its own page needs no --overwrite"

    def test_a_vision_network_given_in_python(self, tmp_path):
        torch.manual_seed(0)
        sites = [grail.channels("conv1", "conv2", width=12)]
        images = torch.randn(16, 3, 8, 8)
        grail.compress(Net(), method="wanda", ratio=0.5, calibration=images, sites=sites, output=tmp_path / "out")
        text = read((tmp_path / "out" / "report.html").read_text()).text
        assert "grail.load('out')" in text and "multiply-adds" in text
        assert "started from Python" in text and "grail.compress(model, method='wanda', ratio=0.5" in text
        (site,) = json.loads((tmp_path / "out" / "grail.json").read_text())["sites"]
        assert 1 <= site["effective_rank"] <= 12 and site["kind"] == "channels"

    def test_effective_rank_without_a_repair_is_none(self, tmp_path):
        data = tiny_calibration(tmp_path / "data.safetensors")
        source = tiny_checkpoint(tmp_path / "source")
        report = grail.compress(source, output=tmp_path / "out", calibration=data, compensate=False)
        assert [site["effective_rank"] for site in report.sites] == [None] * 4
        assert "Nothing was repaired" in read((tmp_path / "out" / "report.html").read_text()).text

    @pytest.mark.parametrize("method", ["wanda-sp", "fold"])
    def test_effective_rank_is_there_with_either_target(self, tmp_path, method):
        data = tiny_calibration(tmp_path / "data.safetensors", windows=16)
        source = tiny_checkpoint(tmp_path / "source")
        own, stream = (
            grail.compress(source, output=tmp_path / t, calibration=data, method=method, target=t, alpha=a, ridge=0.01)
            for t, a in (("hidden", "auto"), ("stream", 0.0))
        )
        for one, other in zip(own.sites, stream.sites, strict=True):
            assert other["effective_rank"] == pytest.approx(one["effective_rank"], rel=1e-4)
            assert 1 <= one["effective_rank"] <= one["before"]


RECIPES = [
    {},
    {"method": "gram", "ratio": 0.25, "alpha": 0.5, "ridge": 0.01},
    {"target": "hidden", "calibration": "my text's.txt", "eval": "none", "seq_len": 64},
    {"ridge": 0.0, "ridge_form": "paper", "bias": False, "compare_pruned": True, "set": {"a": "b c", "d": "1"}},
    {"bias": True, "compensate": False, "attn_ratio": 0.0, "mlp_ratio": 0.125, "gqa": "group", "round_to": 8},
    {"format": "padded", "dtype": "bfloat16", "output_dtype": "float16", "allocation": "error", "head_multiple": 2},
    {"ridge": 1e-7, "device": "cpu", "seed": 3, "samples": 7},
]


class TestTheMethod:
    """What sets a run apart, in a few words."""

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"target": "stream"}, "wanda"),
            ({"target": "dense"}, "wanda, target dense"),
            ({"target": "own", "one_shot": True}, "wanda, one-shot, target own"),
            ({"target": "dense", "one_shot": True}, "wanda, one-shot"),
            ({"target": "dense", "residual_ratio": 0.5}, "wanda"),
            ({"target": "dense", "one_shot": True, "compensate": False}, "wanda, one-shot, not repaired"),
            ({"target": ["dense"], "one_shot": {}}, "wanda"),
        ],
        ids=str,
    )
    def test_of_a_vision_network(self, options, told):
        recipe = {"method": "wanda", "compensate": True} | options
        assert Run("out", variant(recipe=recipe, format="module")).method == told

    @pytest.mark.parametrize("options", [{"set": "x"}, {"set": 3}, {"seed": {"a": 1}}, {"target": {"x": 1}}], ids=str)
    @pytest.mark.parametrize("form", ["uniform", "module"])
    def test_options_that_no_run_has_are_left_out(self, options, form):
        document = variant(recipe=example()["recipe"] | options, format=form)
        assert not {"--set", "--seed"} & {part for option in arguments(Run("out", document)) for part in option}
        read(page(Run("out", document)))


class TestTheCommand:
    @pytest.mark.parametrize("options", RECIPES, ids=range(len(RECIPES)))
    def test_parsed_again_it_is_the_recipe(self, options, monkeypatch):
        recipe = grail.Recipe(model="owner/it's a <model>", **options)
        asked = arguments(Run("out dir", variant(recipe=recipe.to_json())))
        seen = []
        monkeypatch.setattr("grail.run.run", lambda again, progress: seen.append(again))
        done = runner.invoke(app, ["compress", *(part for option in asked for part in option)])
        assert done.exit_code == 0, done.output
        assert seen[0].to_json() == recipe.to_json() and seen[0].output == "out dir"
        assert len(asked) == 2 + len(options) + max(len(options.get("set", {})) - 1, 0), "only what differs"

    @pytest.mark.parametrize(
        "options",
        [
            {"weights": "w.safetensors", "batch": 8, "repair": True, "residual_ratio": 0.5},
            {"target": "own", "one_shot": True, "calibration_text": "c.txt", "calibration": "images"},
        ],
        ids=["weights", "own"],
    )
    def test_of_a_vision_network_too(self, options, monkeypatch):
        from grail.modules.recipe import ModuleRecipe

        recipe = ModuleRecipe(model="timm/resnet10t", method="wanda", **options)
        source = {"id": "timm/resnet10t", "sha256": "ab", "options": {"img_size": 98, "name": "12"}}
        asked = arguments(Run("out", variant(recipe=recipe.to_json(), format="module", source=source)))
        seen = []
        monkeypatch.setattr("grail.modules.run.compress_named", lambda *given: seen.append(given) or 1 / 0)
        runner.invoke(app, ["compress", *(part for option in asked for part in option)])
        assert seen[0][0].to_json() == recipe.to_json()
        assert seen[0][1] == source["options"]

    def test_it_is_quoted_for_a_shell(self):
        recipe = grail.Recipe(model="it's; rm -rf <x>").to_json()
        text = html.unescape(page(Run("o", variant(recipe=recipe))))
        assert """--model 'it'"'"'s; rm -rf <x>' \\""" in text

    def test_objects_of_python_have_no_command(self):
        recipe = example()["recipe"] | {"calibration": "given in Python"}
        assert arguments(Run("out", variant(recipe=recipe))) is None
        assert "calibration=..." in call(Run("out", variant(recipe=recipe)))
        source = example()["source"] | {"given_in_python": True}
        assert arguments(Run("out", variant(source=source))) is None

    def test_several_processes_are_started_as_they_were(self):
        shown = page(Run("out", example(), ran() | {"planned": {"processes": 2}}))
        assert "torchrun --nproc-per-node 2 -m grail compress" in html.unescape(shown)


class TestWhatIsMissing:
    @pytest.mark.parametrize("key", [*example(), "everything"])
    def test_a_field_less_is_a_part_less(self, key):
        document = {"sites": []} if key == "everything" else {k: v for k, v in example().items() if k != key}
        read(page(Run("out", document, {})))
        read(page(Run("out", document)))

    def test_what_is_left_out_is_said(self):
        text = read(page(Run("out", variant(evaluation=None)))).text
        assert "It was not evaluated." in text and "There is no run.json" in text
        old = [{k: v for k, v in s.items() if k not in ("effective_rank", "kind")} for s in example()["sites"]]
        text = read(page(Run("out", variant(sites=old), ran()))).text
        assert "Not recorded: effective rank" in text and "The effective rank was not recorded." in text
        assert "Error of heads" in text and "Error of channels" in text

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_any_value_in_any_place_still_gives_a_page(self, data):
        """Files from anywhere."""
        document = {"grail": copy.deepcopy(example()), "run": ran()}
        infinite = [10**400, float("inf"), float("nan"), 1e-320]
        junk = st.sampled_from([None, True, -1, 0, *infinite, "", "<b>", "\ud800", [], [None], {}, {"a": 1}])
        for _ in range(data.draw(st.integers(1, 3))):
            place, key = document, data.draw(st.sampled_from(["grail", "run"]))
            while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 4)):
                place = place[key]
                key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
            place[key] = data.draw(junk)
        for name in document:
            document[name] = document[name] if isinstance(document[name], dict) else {}
        Reader(page(Run("out", document["grail"], document["run"]))).text.encode()

    def test_values_of_zero_and_single_sites(self):
        site = example()["sites"][0] | {"error_before": 0.0, "error_after": 0.0, "effective_rank": 0.0, "rcond": 0.0}
        read(page(Run("out", variant(sites=[site]), ran())))

    def test_names_are_escaped_everywhere(self):
        evil = "<script>alert(1)</script>\"'&"
        recipe = example()["recipe"] | {"model": evil, "method": evil, "set": {evil: evil}}
        document = variant(
            recipe=recipe, source={"id": evil, "sha256": evil}, loads_with=evil, class_changed=evil,
            versions={evil: evil}, calibration={"source": evil},
            sites=[s | {"name": evil + s["name"]} for s in example()["sites"]],
            evaluation={"data": evil, "perplexity": {"dense": 1.0, "compressed": 2.0}},
        )  # fmt: skip
        found = read(page(Run(evil, document, ran() | {"seconds": {evil: 3.0}, "platform": evil})))
        assert "<script>alert(1)</script>" in found.text

    def test_ten_thousand_sites_are_a_page_of_a_phone(self):
        sites = [
            s | {"name": f"model.layers.{layer}.{s['name'].split('.', 3)[3]}", "error_after": 0.01 + layer % 7 / 100}
            for layer in range(5000)
            for s in example()["sites"][:2]
        ]
        content = page(Run("out", variant(sites=sites), ran()))
        assert len(content) < 1_500_000
        text = read(content).text
        assert "10000 sites, of which the 1000 with the largest errors" in text
        assert "one of every 21 sites is drawn" in text


class TestComparison:
    def test_a_table_and_one_plot_for_equal_data(self, tmp_path):
        other = variant(parameters={"before": 1_000_000, "after": 500_000})
        other["recipe"] = other["recipe"] | {"method": "flap", "target": "hidden"}
        other["evaluation"]["perplexity"] = {"dense": 13.19, "compressed": 35.0}
        folders = [folder_of(tmp_path / "a", example()), folder_of(tmp_path / "b", other)]
        done = runner.invoke(app, ["report", *folders, "-o", str(tmp_path / "both.html"), "--json"])
        assert done.exit_code == 0, done.output
        assert [run["comparable"] for run in json.loads(done.stdout)["runs"]] == [0, 0]
        found = read((tmp_path / "both.html").read_text())
        assert found.tags.count("figure") == 1 and "cannot be compared" not in found.text
        for word in ("flap, target hidden", "wanda-sp", "13.19", "153.80", "35.00", "700.0 k", "500.0 k", *folders):
            assert word in found.text

    def test_different_texts_do_not_share_a_plot(self, tmp_path):
        other = variant(evaluation=example()["evaluation"] | {"sha256": "00" * 32})
        images = {"data": "digits", "images": 50, "accuracy": {"dense": {"top1": 0.9}, "compressed": {"top1": 0.8}}}
        documents = [example(), other, variant(evaluation=images), variant(evaluation=None)]
        folders = [folder_of(tmp_path / str(i), document) for i, document in enumerate(documents)]
        told = write_report(folders, str(tmp_path / "all.html"))
        assert [run["comparable"] for run in told["runs"]] == [0, 1, 2, None]
        found = read((tmp_path / "all.html").read_text())
        assert found.tags.count("figure") == 3
        assert "Perplexity was measured on 2 different texts; such figures cannot be compared" in found.text
        assert "1 of 4 runs were not evaluated" in found.text
        assert "80.0 %" in found.text and all(folder in found.text for folder in folders)

    def test_what_was_not_repaired_is_pruned_only(self, tmp_path):
        bare = variant(recipe=example()["recipe"] | {"compensate": False})
        bare["evaluation"]["perplexity"] = {"dense": 13.19, "compressed": 99.0}
        write_report([folder_of(tmp_path / "a", bare), folder_of(tmp_path / "b", example())], str(tmp_path / "x.html"))
        text = read((tmp_path / "x.html").read_text()).text
        assert "13.19 99.00 –" in text and "13.19 153.80 21.20" in text

    def test_the_default_is_here(self, tmp_path, monkeypatch):
        folders = [folder_of(tmp_path / name, example()) for name in "ab"]
        monkeypatch.chdir(tmp_path)
        done = runner.invoke(app, ["report", *folders])
        assert (done.exit_code, done.stdout) == (0, "report.html\n")
        again = runner.invoke(app, ["report", *folders])
        assert again.exit_code == 2 and "--overwrite" in again.stderr
        assert runner.invoke(app, ["report", *folders, "--overwrite"]).exit_code == 0


def _newer(path: Path) -> None:
    folder_of(path, variant(schema_version=2))


BAD = {
    "missing": lambda path: None,
    "a-file": lambda path: path.write_text("x"),
    "no-grail-json": lambda path: path.mkdir(),
    "broken-json": lambda path: (path.mkdir(), (path / "grail.json").write_text("{")),
    "a-list": lambda path: (path.mkdir(), (path / "grail.json").write_text("[]")),
    "something-else": lambda path: folder_of(path, {"model": "x"}),
    "newer": _newer,
    "broken-run-json": lambda path: (folder_of(path, example()), (path / "run.json").write_text("nothing")),
}


class TestBadInput:
    @pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
    @pytest.mark.parametrize("kind", BAD)
    def test_a_folder_is_named_in_one_sentence(self, tmp_path, kind, several):
        BAD[kind](tmp_path / "bad-one")
        good = [folder_of(tmp_path / "good", example())] if several else []
        done = runner.invoke(app, ["report", *good, str(tmp_path / "bad-one"), "-o", str(tmp_path / "page.html")])
        assert done.exit_code == 2
        assert "bad-one" in done.stderr and done.stderr.count("\n") == 1 and "bug" not in done.stderr
        assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*"))

    def test_an_output_that_is_there_is_kept(self, tmp_path):
        folder = folder_of(tmp_path / "a", example())
        (tmp_path / "mine.html").write_text("mine")
        for output in ("mine.html", "nowhere/page.html", "a"):
            done = runner.invoke(app, ["report", folder, "--output", str(tmp_path / output)])
            assert done.exit_code == 2 and output.split("/")[0] in done.stderr
        assert (tmp_path / "mine.html").read_text() == "mine"
        assert runner.invoke(app, ["report", folder, "-o", str(tmp_path / "mine.html"), "--overwrite"]).exit_code == 0

    def test_what_cannot_be_renamed_leaves_the_old_page_and_no_other(self, tmp_path, monkeypatch):
        folder = folder_of(tmp_path / "a", example())
        (tmp_path / "a" / "report.html").write_text("old")
        monkeypatch.setattr(
            "os.replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied", "report.html"))
        )
        assert runner.invoke(app, ["report", folder]).exit_code == 2
        assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["grail.json", "report.html"]
        assert (tmp_path / "a" / "report.html").read_text() == "old"

    def test_no_folder_at_all(self):
        assert runner.invoke(app, ["report"]).exit_code == 2


class TestParts:
    @pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, 8.0], [1e-9, 1e9], [1e300, -1e300], [0.1 + 0.2, 0.3]])
    def test_linear_ticks_are_round_and_hold_the_values(self, values):
        axis = linear(values)
        assert 2 <= len(axis.ticks) <= 9
        assert axis.low <= min(values) and axis.high >= max(values)
        assert all(0 <= axis.at(value) <= 1 for value in values)

    @pytest.mark.parametrize("values", [[1.0], [13.2, 21.0], [1e-12, 1.0], [1e-320, 1e300], [14.9, 15.1], [0.003, 0.9]])
    def test_logarithmic_ticks(self, values):
        axis = logarithmic(values)
        assert 2 <= len(axis.ticks) <= 9 and list(axis.ticks) == sorted(axis.ticks)
        assert all(0 <= axis.at(value) <= 1 for value in values)

    def test_markup_is_made_by_element_alone(self):
        assert element("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'
        assert element("p", element("b", 1), None) == "<p><b>1</b></p>"
        assert not isinstance(element("b") + "<i>", Markup), "joined as text it is escaped again"

    @pytest.mark.parametrize(("colours", "background"), [(LIGHT, PAPER), (DARK, NIGHT)], ids=["light", "dark"])
    def test_colours_stand_out(self, colours, background):
        """WCAG 2.2, 1.4.11: three to one for graphics."""

        def luminance(colour: str) -> float:
            parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
            linear_rgb = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear_rgb, strict=True))

        for colour in colours:
            dark, light = sorted([luminance(colour), luminance(background)])
            assert (light + 0.05) / (dark + 0.05) >= 3, colour


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(tmp_path, width):
    """In a frame of that width, since a browser's window has a least width of its own. Tables scroll in their box."""
    long = "a_very_long_name_without_a_place_to_break_" * 4
    document = variant(source={"id": f"/models/{long}", "sha256": "ab" * 32})
    document["sites"] = [s | {"name": s["name"].replace("mlp", long)} for s in document["sites"]]
    one = Path(folder_of(tmp_path / "one", document, ran() | {"seconds": {long: 3.0, "compress": 7261.0}}))
    folders = [str(one), folder_of(tmp_path / long[:100], example())]
    pages = {"single": Path(write_report([str(one)])["output"]), "several": tmp_path / "several.html"}
    write_report(folders, str(pages["several"]))
    measure = """
      const told = {};
      const frames = [...document.querySelectorAll('iframe')];
      window.onload = () => { for (const f of frames) { const d = f.contentDocument, w = f.clientWidth, wide = [];
        for (const e of d.querySelectorAll('body *')) {
          if (e.closest('.scroll') && !e.matches('.scroll')) continue;
          const r = e.getBoundingClientRect();
          if (r.width && (r.right > w + 0.5 || r.left < -0.5)) wide.push([e.tagName, e.textContent, r.left, r.right]);
        }
        const least = Math.min(...[...d.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height));
        told[f.id] = {page: d.documentElement.scrollWidth, wide: wide, least: least}; }
      document.getElementById('told').textContent = JSON.stringify(told); };"""
    frames = "".join(f"<iframe id={n} src='file://{p}' width={width} height=900></iframe>" for n, p in pages.items())
    style = "<style>iframe{border:0;display:block}</style>"
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"{style}{frames}<pre id=told></pre><script>{measure}</script>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--window-size=1400,2000",
    ]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{wrapper}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = json.loads(html.unescape(re.search(r"<pre id=.told.>(.*?)</pre>", done.stdout, re.S)[1]))
    for name, found in told.items():
        assert found["page"] <= width and found["wide"] == [], name
        assert found["least"] >= 11, f"{name}: text in plots of {found['least']} pixels"
