"""Recipe files: written and read again, grids, what is refused, what is skipped, and those of the repository."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import grail
from grail.cli import app
from grail.errors import GrailError
from grail.modules.recipe import ELSEWHERE, ModuleRecipe
from grail.page.command import recipe_text
from grail.page.run import Run, read_run
from grail.recipe import CHOICES, ERROR, LEFT_OUT, Recipe
from grail.recipes.document import dump, parse, read
from grail.recipes.grid import requests_of
from grail.recipes.options import TYPES
from grail.selectors import methods
from tests.test_bad_input import listing, one_sentence
from tests.test_torchrun import several
from tests.tiny import tiny_calibration, tiny_checkpoint
from tests.tiny_hf import CAPTIONS, KINDS, PROCESSOR, SIZE, tokenizer

runner = CliRunner()
OURS = Path(__file__).parents[1] / "recipes"
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
PUBLISHED = {
    "llama-2-7b-c4": {"wanda-sp", "wanda-pp-sp", "slimgpt", "flap"},
    "llama-2-7b-wikitext2": {"wanda-sp", "slimgpt", "flap"},
}
"""The rows of the publication's table of perplexities, each at RATIOS."""
VISION = {"resnet18": "timm/resnet18", "vit-b": "timm/vit_base_patch16_224", "clip-vit-b-32": "open_clip/ViT-B-32"}


def call(*arguments, code=0):
    done = runner.invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def reopened_here(monkeypatch, reopen_here):
    """The check of what was written, without a fresh process, for either kind of network."""
    from grail.modules import run as of_run

    monkeypatch.setattr(
        of_run, "reopen", lambda folder, expected, examples: of_run.reopen_here(folder, expected, examples, None)
    )


@pytest.fixture
def tiny(tmp_path):
    """Options of a run on a tiny model."""
    return {
        "model": str(tiny_checkpoint(tmp_path / "source")),
        "calibration": str(tiny_calibration(tmp_path / "calibration.safetensors")),
    }


def write(file: Path, content: dict | str | bytes) -> Path:
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else dump(content)).encode()
    file.write_bytes(data)
    return file


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["no", "1e-3", "010", "null", "~", "", "true", "<<", "a: b", "- x", "# x", "'", "2026-11-26", "1:30", "é", "0x1f"]
)
given_words = words.filter(bool)
shares = st.floats(0, 1, exclude_max=True)
plain = {
    "method": words, "ratio": shares, "attn_ratio": st.none() | shares, "mlp_ratio": st.none() | shares,
    "calibration": given_words, "samples": st.integers(1, 10**9), "seed": st.integers(0, 2**31 - 1),
    "compensate": st.booleans(), "ridge": st.none() | st.floats(0, 1e9), "bias": st.none() | st.booleans(),
    "ridge_form": st.sampled_from(CHOICES["ridge_form"]), "allocation": st.sampled_from(CHOICES["allocation"]),
    "round_to": st.none() | st.integers(1, 4096), "device": given_words, "eval": st.none() | given_words,
    "compare_pruned": st.booleans(), "set": st.dictionaries(words, words, max_size=3),
}  # fmt: skip
text_only = {
    "seq_len": st.none() | st.integers(2, 10**6), "head_multiple": st.integers(1, 64),
    "format": st.sampled_from(CHOICES["format"]), "gqa": st.sampled_from(CHOICES["gqa"]),
    "dtype": st.sampled_from(CHOICES["dtype"]), "output_dtype": st.sampled_from(CHOICES["output_dtype"]),
}  # fmt: skip
vision_only = {
    "weights": st.none() | given_words, "repair": st.booleans(), "one_shot": st.booleans(),
    "batch": st.integers(1, 10**4), "residual_ratio": shares, "calibration_text": st.none() | given_words,
    "allocation": st.sampled_from([choice for choice in CHOICES["allocation"] if choice != ERROR]),
}  # fmt: skip
streams = st.fixed_dictionaries(
    {},
    optional={
        "alpha": st.sampled_from(["auto", "search"]) | st.floats(0, 1),
        "ridge": st.just("auto"),
        "sweeps": st.integers(1, 9),
    },
)


class TestTheText:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(given=st.fixed_dictionaries({}, optional=plain | text_only), stream=st.none() | streams)
    def test_parsed_again_it_is_the_recipe(self, given, stream):
        if stream is not None:
            given = given | stream | {"target": "stream"}
        recipe = Recipe(model="owner/it's: a <model>", **given)
        text = recipe_text(Run("out", {"recipe": recipe.to_json()}))
        (again,) = requests_without_check(parse(text, "recipe.yaml") | {"output": "elsewhere"})
        assert again.recipe.to_json() == recipe.to_json()
        assert again.recipe.output == "elsewhere"
        assert json.dumps(again.recipe.to_json()) == json.dumps(recipe.to_json()), "numbers of the same type"

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        given=st.fixed_dictionaries({}, optional=plain | vision_only),
        options=st.dictionaries(words, words | st.integers() | shares | st.booleans() | st.none(), max_size=3),
    )
    def test_of_a_vision_network_too(self, given, options):
        recipe = ModuleRecipe(model="timm/resnet18", **given)
        source = {"id": "timm/resnet18", "sha256": "ab", "options": options}
        text = recipe_text(Run("out", {"recipe": recipe.to_json(), "source": source, "format": "module"}))
        (again,) = requests_without_check(parse(text, "recipe.yaml") | {"output": "elsewhere"})
        assert again.recipe.to_json() == recipe.to_json() and again.model_options == options

    def test_every_option_can_be_said_and_no_other(self):
        assert set(TYPES) == {f.name for f in fields(ModuleRecipe)} - {"called"} | {"model_options"}
        assert {f.name for f in fields(Recipe)} <= set(TYPES) | {"called"}
        tried = set(plain) | set(text_only) | set(vision_only) | {"alpha", "sweeps", "target", "model"}
        assert tried | LEFT_OUT == set(TYPES) - {"model_options"} | {"called"}
        assert set(text_only) <= set(ELSEWHERE)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-3", 1e-3), ("1.5e3", 1500.0), (".5", 0.5), ("-0.25", -0.25), ("0", 0), ("12", 12), ("true", True),
            ("no", "no"), ("off", "off"), ("010", "010"), ("1_000", "1_000"), ("0x10", "0x10"), ("1:30", "1:30"),
            ("2026-11-26", "2026-11-26"), ("~", None), ("", None), ("none", "none"), ("'0.3'", "0.3"), ("=", "="),
        ],
    )  # fmt: skip
    def test_scalars_are_those_of_yaml_1_2(self, text, value):
        found = parse(f"key: {text}", "x")["key"]
        assert found == value and type(found) is type(value)


def requests_without_check(document: dict, file: str = "recipe.yaml"):
    """As requests_of, for methods that there are not."""
    from grail.request import Request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "check", lambda self: None)
        return requests_of(document, file)


class TestWhatAnOutputTells:
    @pytest.mark.usefixtures("reopen_here")
    def test_it_runs_again_and_gives_the_same(self, tiny, tmp_path):
        options = [f"--{name}={value}" for name, value in tiny.items()]
        more = ["--ratio", "0.5", "--method", "flap", "--set", "metric=IFV", "--target", "stream", "--alpha", "0.5"]
        done = call("compress", *options, *more, "--seed", "3", "--output", tmp_path / "first" / "out")
        assert f"recipe         {tmp_path / 'first' / 'out' / 'recipe.yaml'}" in done.stdout
        call("run", tmp_path / "first" / "out" / "recipe.yaml", "--set-option", f"output={tmp_path / 'second' / 'out'}")
        first, second = (listing(tmp_path / name / "out") for name in ("first", "second"))
        assert first.keys() == second.keys()
        for name in first.keys() - {"run.json", "report.html"}:
            assert first[name] == second[name], name
        assert b"grail run recipe.yaml" in first["README.md"]
        assert b"output" not in first["recipe.yaml"].split(b"\n", 1)[1], "equal runs have equal recipes"

    @pytest.mark.usefixtures("reopened_here")
    def test_of_a_vision_network_too(self, tmp_path):
        made = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 4}
        model = timm.create_model("vit_tiny_patch16_224", **made)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        flags = [part for key in ("img_size", "patch_size", "depth", "embed_dim", "num_heads")
                 for part in ("--model-option", f"{key}={made[key]}")]  # fmt: skip
        data = ["--weights", tmp_path / "w.safetensors", "--calibration", pictures(tmp_path / "images.npz", 3)]
        asked = ["--model", "timm/vit_tiny_patch16_224", *data, *flags, "--method", "wanda", "--samples", 8]
        call("compress", *asked, "-o", tmp_path / "out")
        call("run", tmp_path / "out" / "recipe.yaml", "--set-option", f"output={tmp_path / 'again'}")
        for name in ("grail.json", "recipe.yaml", "model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert "img_size: 32" in (tmp_path / "out" / "recipe.yaml").read_text()

    @pytest.mark.usefixtures("reopen_here")
    def test_objects_of_python_have_none(self, tiny, tmp_path):
        ids = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))
        grail.compress(tiny["model"], calibration=ids, output=tmp_path / "ids")
        net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        sites = [grail.channels("0", "2", width=12)]
        grail.compress(net, method="wanda", calibration=torch.randn(32, 6), sites=sites, output=tmp_path / "net")
        for name in ("ids", "net"):
            assert (tmp_path / name / "grail.json").exists() and not (tmp_path / name / "recipe.yaml").exists()

    @pytest.mark.usefixtures("reopen_here")
    def test_a_converted_folder_has_none_as_none_gives_it(self, tiny, tmp_path):
        grail.compress(**tiny, output=tmp_path / "out")
        call("convert", tmp_path / "out", "--to", "padded", "-o", tmp_path / "padded")
        assert not (tmp_path / "padded" / "recipe.yaml").exists()
        assert "recipe.yaml" not in (tmp_path / "padded" / "README.md").read_text()

    def test_it_is_printed_and_nothing_is_done(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        asked = ["compress", "--model", "no/such-model", "--ridge", "1e-7", "--memory", "4GB", "--output", "a{b"]
        text = call(*asked, "--print-recipe").stdout
        assert parse(text, "x") == {
            "model": "no/such-model", "method": "wanda-sp", "ratio": 0.3, "ridge": 1e-7, "output": "a{b",
            "memory": 4 * 10**9,
        }  # fmt: skip
        (again,) = requests_of(parse(text, "x"), "x")
        assert again.recipe == Recipe(model="no/such-model", ridge=1e-7, memory="4GB", output="a{b")
        assert json.loads(call(*asked, "--print-recipe", "--json").stdout)["recipe"] == parse(text, "x")
        one_sentence(call(*asked, "--print-recipe", "--method", "nonsense", code=2).stderr)
        assert not list(tmp_path.iterdir())


GRID = {
    "base": {"model": "owner/name", "seq-len": 64},
    "grid": {"method": ["wanda-sp", "mag-sp"], "ratio": [0.25, 0.5]},
    "runs": [{"compensate": True}, {"compensate": False, "seed": 1}],
    "output": "out/{method}-{ratio}-{compensate}",
}


class TestGrids:
    def test_every_combination_is_a_run(self):
        found = requests_of(GRID, "grid.yaml")
        assert [r.recipe.output for r in found] == [
            f"out/{method}-{ratio}-{switch}"
            for switch in ("true", "false")
            for method in ("wanda-sp", "mag-sp")
            for ratio in (0.25, 0.5)
        ]
        assert {r.recipe.seq_len for r in found} == {64}
        assert [r.recipe.seed for r in found] == [0] * 4 + [1] * 4

    def test_settings_take_the_place_of_what_the_file_says(self):
        found = requests_of(GRID, "grid.yaml", ["model=else/where", "ratio=[0.3, 0.4, 0.6]", "method=random"])
        assert [(r.recipe.model, r.recipe.method, r.recipe.ratio) for r in found[:3]] == [
            ("else/where", "random", ratio) for ratio in (0.3, 0.4, 0.6)
        ]
        assert len(found) == 6
        (one,) = requests_of({"model": "a/b", "output": "x", "seed": 1}, "f", ["seed=2", "set={}", "eval=null"])
        assert (one.recipe.seed, one.recipe.eval) == (2, None)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        grid=st.fixed_dictionaries(
            {},
            optional={
                "method": st.lists(st.sampled_from(sorted(methods())), min_size=1, max_size=4, unique=True),
                "ratio": st.lists(st.sampled_from(RATIOS), min_size=1, max_size=4, unique=True),
                "seed": st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
            },
        )
    )
    def test_as_many_runs_as_combinations_and_as_many_outputs(self, grid):
        template = "out/" + "-".join(["x", *(f"{{{name}}}" for name in grid)])
        found = requests_of({"base": {"model": "a/b"}, "grid": grid, "output": template}, "f")
        assert len(found) == np.prod([len(values) for values in grid.values()], dtype=int)
        assert len({r.recipe.output for r in found}) == len(found)

    def test_names_are_single_folders(self):
        document = {"base": {"model": "a/b"}, "grid": {"calibration": ["x/y.txt", "c4"]}, "output": "o/{calibration}"}
        assert [r.recipe.output for r in requests_of(document, "f")] == ["o/x-y.txt", "o/c4"]


ONE = "model: a/b\noutput: out\n"
REFUSED = {
    "not-a-mapping": ("- a\n", "mapping"),
    "a-word": ("word", "mapping"),
    "empty": ("", "mapping"),
    "unknown-key": (ONE + "ration: 0.3\n", "ration; did you mean ratio"),
    "called": (ONE + "called: x\n", "called"),
    "twice": (ONE + "seed: 1\nseed: 2\n", "line 4: seed is said twice"),
    "twice-otherwise": (ONE + "seq-len: 9\nseq_len: 9\n", "seq_len is said twice"),
    "not-a-number": (ONE + "ratio: much\n", "ratio must be a number; got 'much'"),
    "quoted-number": (ONE + "ratio: '0.3'\n", "ratio must be a number"),
    "a-bool-is-no-number": (ONE + "seed: true\n", "seed must be a whole number"),
    "a-float-is-no-whole-number": (ONE + "samples: 1.5\n", "samples must be a whole number"),
    "not-a-switch": (ONE + "compensate: no\n", "compensate must be true or false; got 'no'"),
    "a-list": (ONE + "method: [fold]\n", "method must be text; got a list"),
    "set": (ONE + "set: {a: [1]}\n", "set.a"),
    "out-of-range": (ONE + "ratio: 1\n", "--ratio must be a number from 0"),
    "nan": (ONE + "ratio: .nan\n", "--ratio"),
    "a-huge-number": (ONE + f"seed: {'9' * 5000}\n", "recipe.yaml"),
    "method": (ONE + "method: nonsense\n", "--method nonsense: unknown method"),
    "method-option": (ONE + "set: {nonsense: 1}\n", "nonsense"),
    "vision-option": (ONE + "repair: true\n", "--repair is for"),
    "decoder-method": ("model: timm/resnet18\noutput: out\nmethod: wanda-pp-sp\n", "for language models"),
    "no-model": ("output: out\n", "model is missing"),
    "no-output": ("model: a/b\n", "output is missing"),
    "tag": (ONE + "method: !!python/object/apply:os.system [echo]\n", "line 3: tags (tag:yaml.org,2002:python"),
    "harmless-tag": (ONE + "seed: !!int 3\n", "tags"),
    "anchor": (ONE + "set: &a {}\n", "anchors and aliases"),
    "alias": (ONE + "set: *a\n", "anchors and aliases"),
    "merge": ("<<: {a: 1}\n" + ONE, "<<"),
    "broken": ("model: [a\n", "line 2"),
    "tab": ("model: x\n\t- y\n", "line 2"),
    "two-documents": (ONE + "---\n" + ONE, "line 3"),
    "a-key-that-is-a-list": ("? [a]\n: b\n", "is no name"),
    "a-key-that-is-a-number": ("1: b\n", "1 is no name"),
    "control": (b"model: \x00\n", "special characters"),
    "escaped-control": ('model: a/b\noutput: "a\\0b"\n', "line 2: a character"),
    "surrogate": ('model: "a\\ud800"\noutput: out\n', "line 1: a character"),
    "not-text": (b"\xff\xfe\xff", "UTF-8"),
    "brackets": ("[" * 20000, "nested too deeply"),
    "large": ("# " + "x" * 10**6, "larger than a recipe"),
    "grid-clash": ("base: {model: a/b}\ngrid: {ratio: [0.1, 0.2]}\noutput: out\n", "two runs have the output out"),
    "grid-same-value": ("base: {model: a/b}\ngrid: {ratio: [0.1, 0.10]}\noutput: o/{ratio}\n", "two runs"),
    "grid-nested": ("base: {model: a/b}\nruns: [{output: o}, {output: o/p}]\n", "o/p lies within output o"),
    "grid-partial": ("base: {model: a/b}\nruns: [{output: o}, {output: o.partial}]\n", "two runs"),
    "grid-stray": ("base: {model: a/b}\nratio: 0.3\noutput: o\n", "ratio stands beside base"),
    "grid-two-outputs": ("base: {model: a/b, output: x}\noutput: o\n", "output is said twice"),
    "grid-no-list": ("base: {model: a/b}\ngrid: {ratio: 0.3}\noutput: o\n", "ratio must be a list"),
    "grid-empty-list": ("base: {model: a/b}\ngrid: {ratio: []}\noutput: o\n", "ratio must be a list of at least one"),
    "grid-unknown": ("base: {model: a/b}\ngrid: {ration: [1]}\noutput: o\n", "ration; did you mean ratio"),
    "grid-type": ("base: {model: a/b}\ngrid: {seed: [a]}\noutput: o\n", "seed must be a whole number"),
    "grid-no-mapping": ("base: {model: a/b}\ngrid: [1]\noutput: o\n", "grid"),
    "base-no-mapping": ("base: [1]\noutput: o\n", "base"),
    "runs-no-list": ("base: {model: a/b}\nruns: {ratio: 1}\noutput: o\n", "runs must be a list"),
    "runs-word": ("base: {model: a/b}\nruns: [x]\noutput: o\n", "runs, entry 1"),
    "runs-and-grid": (
        "base: {model: a/b}\ngrid: {seed: [1]}\nruns: [{seed: 2}]\noutput: o\n", "seed is given by grid and by entry 1",
    ),
    "second-run": ("base: {model: a/b}\nruns: [{output: a}, {output: b, ratio: 2}]\n", "run 2 of 2: --ratio"),
    "field": ("base: {model: a/b}\noutput: 'o/{ration}'\n", "{ration} is no option"),
    "field-with-a-dot": ("base: {model: a/b}\noutput: 'o/{method.__class__}'\n", "is no option"),
    "field-with-a-width": ("base: {model: a/b}\noutput: 'o/{ratio:99999999999}'\n", "is no option"),
    "field-without-name": ("base: {model: a/b}\noutput: 'o/{}'\n", "{} is no option"),
    "open-bracket": ("base: {model: a/b}\noutput: 'o/{ratio'\n", "output o/{ratio"),
    "enormous": (
        "base: {model: a/b}\ngrid:\n" + "".join(f"  {name}: {list(range(1, 60))}\n" for name in
        ("seed", "samples", "seq_len", "round_to", "head_multiple")) + "output: o\n", "10,000 are the most",
    ),
}  # fmt: skip


keys = st.sampled_from([*TYPES, "base", "grid", "runs", "attn-ratio", "called"]) | words
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | words
    | st.sampled_from(["o/{ratio}", "{", "fold", "a/b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


class TestFilesFromAnywhere:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(document=st.dictionaries(keys, junk, max_size=6), sound=st.sampled_from([{}, {"model": "a/b"}, GRID]))
    def test_any_document_is_read_or_refused(self, document, sound):
        try:
            found = requests_of(sound | document, "recipe.yaml")
        except GrailError as error:
            assert "recipe.yaml" in str(error)
        else:
            assert all(isinstance(r.recipe.output, str) for r in found)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(content=st.binary(max_size=40) | st.text("ab:-?[]{}&*!|>'\"%@`#,. \n\t0", max_size=40).map(str.encode))
    def test_any_bytes_too(self, content, tmp_path_factory):
        file = write(tmp_path_factory.getbasetemp() / "any.yaml", content)
        try:
            assert isinstance(read(file), dict)
        except GrailError as error:
            assert "any.yaml" in str(error)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(document=st.dictionaries(words, junk, max_size=4))
    def test_what_is_written_is_what_is_read(self, document):
        assert repr(parse(dump(document), "x") or {}) == repr(document)


class TestRefusals:
    @pytest.mark.parametrize("kind", REFUSED)
    def test_the_file_and_the_key_are_named_in_one_sentence(self, kind, tmp_path, monkeypatch):
        content, said = REFUSED[kind]
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "recipe.yaml", content)
        before = listing(tmp_path)
        done = call("run", "recipe.yaml", code=2)
        message = one_sentence(done.stderr)
        assert "recipe.yaml" in message and said in message and not done.stdout
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("name", ["missing.yaml", "."])
    def test_a_file_that_cannot_be_read(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert f"{name} cannot be read" in one_sentence(call("run", name, code=2).stderr)

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("seed", "--set-option seed: expected key=value"),
            ("ration=1", "did you mean ratio"),
            ("seed=x", "seed must be a whole number"),
            ("seed=[1, 2]", "is a list, and no grid gives that option"),
            ("method=[", "--set-option method=["),
            ("seed=[]", "leaves no run"),
            ("model=", "model must be text"),
        ],
    )
    def test_settings(self, setting, said, tmp_path):
        file = write(tmp_path / "recipe.yaml", ONE)
        assert said in one_sentence(call("run", file, "--set-option", setting, code=2).stderr)

    def test_no_run_begins_when_a_later_one_cannot(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr("grail.request.Request.carry_out", lambda *_: pytest.fail("began"))
        runs = [{"output": str(tmp_path / "a")}]
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        for options, said in (
            ({"calibration": "missing.txt"}, "missing.txt"),
            ({"eval": "builtin+missing.txt"}, "missing.txt"),
            ({"model": "missing"}, "missing: no such folder"),
            ({"output": str(tmp_path / "full")}, "--overwrite"),
            ({"output": tiny["model"] + "/.."}, "holds the input"),
            ({"model": "timm/resnet18", "weights": "missing.safetensors"}, "--weights missing.safetensors"),
        ):
            bad = {"output": str(tmp_path / "b")} | options
            file = write(tmp_path / "recipe.yaml", {"base": tiny, "runs": [*runs, bad]})
            if bad["output"].endswith(".."):
                bad["output"] = str(tmp_path)
                file = write(tmp_path / "recipe.yaml", {"base": tiny, "runs": [bad]})
            message = one_sentence(call("run", file, code=2).stderr)
            assert said in message and bad["output"] in message

    def test_only_names_what_there_is(self, tmp_path):
        file = write(tmp_path / "recipe.yaml", GRID)
        assert "fits no output" in one_sentence(call("run", file, "--only", "nothing*", code=2).stderr)
        done = call("run", file, "--only", "mag-sp-0.5-*", "--only", "out/*-0.25-true", "--dry-run", "--json")
        found = [run["output"] for run in json.loads(done.stdout)["runs"]]
        assert found == [
            "out/wanda-sp-0.25-true",
            "out/mag-sp-0.25-true",
            "out/mag-sp-0.5-true",
            "out/mag-sp-0.5-false",
        ]


@pytest.fixture
def grid(tiny, tmp_path):
    """Two runs of a tiny model."""
    document = {"base": tiny, "grid": {"method": ["mag-sp", "random"]}, "output": str(tmp_path / "o" / "{method}")}
    return write(tmp_path / "grid.yaml", document)


@pytest.mark.usefixtures("reopen_here")
class TestRuns:
    def test_what_is_finished_is_left_as_it_is(self, grid, tmp_path):
        call("run", grid, "--only", "random", "--quiet")
        before = listing(tmp_path / "o" / "random")
        done = call("run", grid)
        assert f"{tmp_path}/o/random is finished" in done.stderr and "run 1 of 1" in done.stderr
        assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
            [f"{tmp_path}/o/mag-sp", "done"],
            [f"{tmp_path}/o/random", "finished"],
        ]
        assert listing(tmp_path / "o" / "random") == before
        told = json.loads(call("run", grid, "--json").stdout)
        assert [run["state"] for run in told["runs"]] == ["finished", "finished"]
        made = json.loads((tmp_path / "o" / "random" / "grail.json").read_text())
        assert told["runs"][1]["parameters"] == made["parameters"]

    def test_another_recipe_in_its_place_is_refused_and_overwritten(self, grid, tmp_path):
        call("run", grid, "--quiet")
        changed = ["run", grid, "--set-option", "seed=1"]
        assert "--overwrite" in one_sentence(call(*changed, "--quiet", code=2).stderr)
        assert [line.split()[1] for line in call(*changed, "--overwrite").stdout.splitlines()[1:]] == ["done", "done"]
        assert json.loads((tmp_path / "o" / "random" / "grail.json").read_text())["recipe"]["seed"] == 1

    def test_the_commands_of_a_dry_run_are_those_runs(self, grid, tmp_path, monkeypatch):
        import shlex

        before = listing(tmp_path)
        done = call("run", grid, "--dry-run")
        assert listing(tmp_path) == before
        lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
        seen = []
        monkeypatch.setattr("grail.run.run", lambda recipe, progress: seen.append(recipe))
        for line in lines:
            call(*shlex.split(line)[1:])
        assert seen == [request.recipe for request in requests_of(read(grid), "x")]

    @pytest.mark.parametrize("keep_going", [False, True])
    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (GrailError("no such thing"), 2, "no such thing"),
            (OSError(28, "No space left on device", "/x"), 2, "/x: No space left on device"),
            (ZeroDivisionError("oh"), 1, "bug in grail"),
        ],
        ids=["refused", "full", "bug"],
    )
    def test_a_failing_run_is_named(self, grid, tmp_path, monkeypatch, error, code, said, keep_going):
        from grail import pipeline

        def fails(*_):
            monkeypatch.undo()
            raise error

        monkeypatch.setattr(pipeline, "_compress_layer", fails)
        with pytest.MonkeyPatch.context() as patch:
            reopen_as_here(patch, tmp_path)
            done = call("run", grid, "--quiet", *["--keep-going"] * keep_going, code=code)
        assert said in done.stderr and f"{tmp_path}/o/mag-sp" in done.stderr and done.stderr.count("\n") == 1
        assert (tmp_path / "o" / "random").exists() == keep_going
        assert not (tmp_path / "o" / "mag-sp").exists() and not list(tmp_path.rglob("*.partial"))
        assert bool(done.stdout) == keep_going

    def test_with_json_a_failure_leaves_stdout_empty(self, grid, monkeypatch):
        monkeypatch.setattr("grail.request.Request.carry_out", lambda *_: (_ for _ in ()).throw(GrailError("no")))
        assert not call("run", grid, "--json", "--keep-going", code=2).stdout

    @pytest.mark.parametrize(("first", "code"), [(True, 130), (False, 75)])
    def test_an_interruption_says_how_to_go_on(self, grid, tmp_path, monkeypatch, first, code):
        from grail.request import Request

        begun, carry_out = [], Request.carry_out

        def interrupted(self, progress):
            begun.append(self)
            if first or len(begun) == 2:
                raise KeyboardInterrupt
            return carry_out(self, progress)

        monkeypatch.setattr(Request, "carry_out", interrupted)
        done = call("run", grid, "--quiet", "--keep-going", code=code)
        one_sentence(done.stderr)
        assert not done.stdout and not list(tmp_path.rglob("*.partial"))
        assert (tmp_path / "o" / "mag-sp").exists() != first

    def test_an_interrupted_run_is_gone_on_with(self, grid, tmp_path, monkeypatch):
        from grail import pipeline

        compress_layer, layers = pipeline._compress_layer, []

        def interrupted(*given):
            layers.append(1)
            if len(layers) == 2:
                raise KeyboardInterrupt
            return compress_layer(*given)

        monkeypatch.setattr(pipeline, "_compress_layer", interrupted)
        asked = ["run", grid, "--quiet", "--set-option", "store=disk"]
        done = call(*asked, code=75)
        assert f"{tmp_path}/o/mag-sp" in done.stderr and "--resume" in done.stderr
        assert "--resume" in call(*asked, code=2).stderr
        call(*asked, "--resume")
        assert len(layers) == 2 + 1 + 2, "one layer of the first was kept"
        assert (tmp_path / "o" / "random" / "grail.json").exists()

    def test_several_processes_do_one_run_after_another(self, grid, tmp_path):
        done = several(2, "grail", "run", str(grid), "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert [run["state"] for run in json.loads(done.stdout)["runs"]] == ["done", "done"]
        assert done.stderr.count("is finished") == 0
        again = json.loads(call("run", grid, "--json").stdout)
        assert [run["state"] for run in again["runs"]] == ["finished", "finished"]

    def test_several_processes_end_together(self, grid, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "--keep-going" in one_sentence(call("run", grid, "--keep-going", code=2).stderr)


def reopen_as_here(patch, folder: Path) -> None:
    from grail.checkpoint import reopen
    from tests.tiny import verify_in_this_process

    numbers = iter(range(100))

    def new_folder(name):
        made = folder.parent / f"{folder.name}-{name}-{next(numbers)}"
        made.mkdir()
        return made

    patch.setattr(reopen, "verify", verify_in_this_process(new_folder))


def pictures(file: Path, channels: int, size: int = 32) -> Path:
    """An .npz of 12 images for calibration and 8 labelled ones."""
    shape = (12, size, size, channels) if channels > 1 else (12, size, size)
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    np.savez(file, x_train=pixels, x_test=pixels[:8], y_test=np.arange(8) % 4)
    return file


class TestOurs:
    @pytest.mark.parametrize("name", sorted(file.stem for file in OURS.glob("*.yaml")))
    def test_it_is_what_was_published(self, name):
        found = requests_of(read(OURS / f"{name}.yaml"), name)
        assert all(Path(r.recipe.output).parts[:2] == ("out", name) for r in found)
        chosen = {(r.recipe.method, r.recipe.ratio) for r in found}
        assert {r.recipe.samples for r in found} == {128}
        if name in PUBLISHED:
            assert chosen == {(method, ratio) for method in PUBLISHED[name] for ratio in RATIOS}
            data = name.rsplit("-", 1)[1]
            assert {(r.recipe.model, r.recipe.calibration, r.recipe.eval) for r in found} == {
                ("llama-2-7b", data, data)
            }
            assert all(r.recipe.compare_pruned and r.recipe.ridge_form == "paper" for r in found)
        else:
            assert {r.recipe.model for r in found} == {VISION[name]}
            assert {method for method, _ in chosen} == {"mag-l1", "mag-l2", "wanda", "fold", "random"}
            assert (0.65 in {ratio for _, ratio in chosen}) and all(r.vision for r in found)

    def test_all_are_there(self):
        assert {file.stem for file in OURS.iterdir()} == PUBLISHED.keys() | VISION.keys()

    @pytest.mark.usefixtures("reopen_here")
    def test_language_models_run(self, tiny, tmp_path):
        settings = [f"model={tiny['model']}", f"calibration={tiny['calibration']}", f"eval={tiny['calibration']}"]
        self.check("llama-2-7b-c4", ["*-0.3"], [*settings, "seq_len=32"], tmp_path, 4)

    @pytest.mark.usefixtures("reopened_here")
    def test_a_resnet_runs(self, tmp_path):
        weights = timm.create_model("resnet10t", num_classes=4, in_chans=1).state_dict()
        settings = ["model=timm/resnet10t", *self.data(weights, tmp_path, 1), "samples=8"]
        self.check("resnet18", ["fold-0.65-*"], settings, tmp_path, 3)

    @pytest.mark.usefixtures("reopened_here")
    def test_a_vit_runs(self, tmp_path):
        made = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 3}
        weights = timm.create_model("vit_tiny_patch16_224", num_classes=4, **made).state_dict()
        settings = ["model=timm/vit_tiny_patch16_224", f"model_options={json.dumps(made)}", "samples=8"]
        self.check("vit-b", ["wanda-0.5"], [*settings, *self.data(weights, tmp_path, 3)], tmp_path, 1)

    @pytest.mark.usefixtures("reopened_here")
    def test_a_clip_runs(self, tmp_path):
        folder = tmp_path / "clip"
        KINDS["clip"].build().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
        images = pictures(tmp_path / "images.npz", 3, SIZE)
        settings = [f"model={folder}", "weights=null", f"calibration={images}", f"eval={images}", "samples=8"]
        settings.append(f"calibration_text={tmp_path / 'captions.txt'}")
        self.check("clip-vit-b-32", ["mag-l2-0.5"], settings, tmp_path, 1)

    def data(self, weights: dict, folder: Path, channels: int) -> list[str]:
        save_file(weights, folder / "w.safetensors")
        images = pictures(folder / "images.npz", channels)
        return [f"weights={folder / 'w.safetensors'}", f"calibration={images}", f"eval={images}"]

    def check(self, name: str, only: list[str], settings: list[str], folder: Path, count: int) -> None:
        where = os.getcwd()
        os.chdir(folder)
        try:
            flags = [part for setting in settings for part in ("--set-option", setting)]
            patterns = [part for pattern in only for part in ("--only", pattern)]
            told = json.loads(call("run", OURS / f"{name}.yaml", *patterns, *flags, "--json").stdout)
        finally:
            os.chdir(where)
        assert [run["state"] for run in told["runs"]] == ["done"] * count
        for run in told["runs"]:
            assert run["parameters"]["after"] < run["parameters"]["before"]
            assert {"dense", "compressed"} <= set(run["values"])
            assert read_run(folder / run["output"]).recipe["ratio"] > 0


def test_a_run_that_starts_from_what_another_one_has_yet_to_write(tiny, tmp_path, monkeypatch):
    """Said, and gone on with by doing what is said."""
    monkeypatch.chdir(tmp_path)
    runs = [{"output": "out/a"}, {"model": "out/a", "output": "out/b"}]
    file = write(tmp_path / "r.yaml", {"base": tiny, "runs": runs})
    told = one_sentence(call("run", file, code=2).stderr)
    assert "out/b: its model is what the run out/a has yet to write" in told and not (tmp_path / "out").exists()
    call("run", file, "--only", "out/a", "--quiet")
    call("run", file, "--quiet")
    assert read_run(tmp_path / "out/b").recipe["model"] == "out/a"


@pytest.mark.parametrize("later", [True, False])
def test_no_run_writes_over_what_another_one_reads(tiny, tmp_path, later):
    other = tiny_checkpoint(tmp_path / "other")
    base = {"calibration": tiny["calibration"], "eval": "none", "overwrite": True}
    reads = {"model": str(other), "output": str(tmp_path / "out")}
    writes = {"model": tiny["model"], "output": str(other)}
    content = {"base": base, "runs": [reads, writes] if later else [writes, reads]}
    before = listing(other)
    told = call("run", write(tmp_path / "r.yaml", content), code=2)
    assert "other, which would be written over" in one_sentence(told.stderr)
    assert listing(other) == before and not (tmp_path / "out").exists()


def test_what_is_no_option_is_told_once(tmp_path):
    content = {"base": {"model": "a/b"}, "grid": {"ratio": [0.2]}, "output": "{model.__class__}"}
    told = call("run", write(tmp_path / "r.yaml", content), code=2)
    assert told.stderr.count("is no option") == 1 and told.stderr.count("run 1 of 1") == 1
