"""What results say of themselves: grail.json, run.json, recipe.yaml, the journal, model cards; and what reads it."""

from __future__ import annotations

import json
import shutil
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import yaml

import grail
from grail.checkpoint import reopen
from grail.checkpoint.journal import Journal
from grail.checkpoint.writer import JOURNAL
from grail.convert import convert
from grail.evaluate import evaluate
from grail.page import write_report
from grail.page.card import card
from grail.page.run import read_run
from grail.page.source_card import source_card
from grail.recipes import batch
from grail.recipes.document import read
from grail.recipes.grid import requests_of
from tests.faults.mutators import HOSTILE, damaged, mangled, misencoded, rendered
from tests.faults.series import Series
from tests.killed_runs import small_runs
from tests.tiny import tiny_calibration, tiny_checkpoint

RECORDS = ("grail.json", "grail.json", "grail.json", "run.json")
MARKUP = "<script>alert(1)</script>"
VALUES = (*HOSTILE, MARKUP, "](javascript:alert(1))", "```\n# x", "---\nlicense: x\n---", "| a |", "o_proj", "builtin")


def verified(*args: Any, **kwargs: Any) -> dict:
    return {"logit_difference": 0.0, "token_ids_equal": None, "how": "not at all"}


@contextmanager
def quick():
    """Small runs, and no process that opens what was written again: whether it is right is compared here."""
    with small_runs(), mock.patch.object(reopen, "verify", verified):
        yield


def flags(home: Path) -> dict[str, Any]:
    calibration = str(home / "calibration.safetensors")
    return {"method": "wanda-sp", "ratio": 0.3, "calibration": calibration, "eval": calibration, "store": "disk"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, its calibration data, and a result."""
    home = tmp_path_factory.mktemp("records")
    tiny_checkpoint(home / "model", num_hidden_layers=2)
    tiny_calibration(home / "calibration.safetensors", windows=4, length=16)
    with quick():
        grail.compress(home / "model", output=home / "small", **flags(home))
    return home


def put(file: Path, chance: Random, values: tuple[Any, ...] = VALUES) -> str:
    """Spoil a JSON file; how."""
    if chance.random() < 0.1:
        how, content = damaged(file.read_bytes(), chance)
    else:
        how, content = mangled(json.loads(file.read_text()), chance, values)
    file.write_bytes(content)
    return f"{file.name} {how}"


def names(case: Path) -> list[str]:
    return ["grail.json", "run.json", str(case)]


def test_pages(home, tmp_path):
    with Series("records: report", tmp_path, home / "small") as series:
        for chance in series.seeds(200):
            case = series.folder()
            how = put(case / chance.choice(RECORDS), chance)

            def shown(case: Path = case) -> str:
                write_report([str(case)])
                page = (case / "report.html").read_text(encoding="utf-8")
                text = card(read_run(case), source_card(None))
                front = yaml.safe_load(text.split("---\n")[1])
                assert isinstance(front, dict) and "grail" in front["tags"], front
                return page

            ending = series.case(how, shown, case, names=names(case), may_write=[case])
            if ending and ending.refused is None and MARKUP in ending.value:
                series.wrong.append(f"{how}: markup of the record is in the page")


def test_several_in_one_page(home, tmp_path):
    with Series("records: comparison", tmp_path, home) as series:
        for chance in series.seeds(30):
            case = series.folder()
            shutil.copytree(case / "small", case / "other")
            how = put(case / "other" / chance.choice(RECORDS), chance)
            folders = [str(case / "small"), str(case / "other")]
            run = partial(write_report, folders, str(case / "report.html"))
            series.case(how, run, case, names=names(case), output=case / "report.html", may_write=[case])


def test_eval(home, tmp_path):
    expected = json.loads((home / "small" / "grail.json").read_text())["evaluation"]["perplexity"]["compressed"]
    with Series("records: eval", tmp_path, home) as series:
        for chance in series.seeds(40):
            case = series.folder()
            file = case / "small" / "grail.json"
            record = json.loads(file.read_text())
            how, text = mangled(record["evaluation"], chance, (*VALUES, "float64", "float32", str(case), "c4"))
            file.write_bytes(rendered(record).replace(rendered(record["evaluation"]), text))
            told = [*names(case), "--data", "--dtype", "--samples"]
            ending = series.case(how, partial(evaluate, str(case / "small")), case, names=told, may_write=[])
            if ending and ending.refused is None and ending.value["data"] == str(home / "calibration.safetensors"):
                found = ending.value["models"][str(case / "small")]["perplexity"]
                if ending.value["windows"] == 4 and abs(found / expected - 1) > 1e-3:
                    series.wrong.append(f"{how}: perplexity {found}, not {expected}")


def test_convert(home, tmp_path):
    with Series("records: convert", tmp_path, home) as series, quick():
        for chance in series.seeds(50):
            case = series.folder()
            file = case / "small" / chance.choice(("grail.json", "grail.json", "config.json"))
            how = put(file, chance, (*VALUES, 40, 48, 64, 10**7))
            run = partial(convert, case / "small", case / "out", to=chance.choice(("padded", "grail", "uniform")))
            told = [*names(case), "config.json", "--to"]
            series.case(how, run, case, names=told, output=case / "out")


def test_what_is_finished(home, tmp_path):
    with Series("records: recipe", tmp_path, home) as series:
        for chance in series.seeds(150):
            case = series.folder()
            file = case / "small" / "recipe.yaml"
            text = file.read_text()
            if chance.random() < 0.5:
                how, content = misencoded(text, chance)
            else:
                how, content = mangled(yaml.safe_load(text), chance)
            file.write_bytes(content)
            if chance.random() < 0.3:
                how += " and " + put(case / "small" / "grail.json", chance)

            def listed(file: Path = file) -> list:
                outcomes = batch.states(requests_of(read(file), str(file), [f"output={file.parent}"]))
                return [outcome.to_json() for outcome in outcomes]

            series.case(how, listed, case, names=[*names(case), "recipe.yaml", "--"])


YAMLS = (
    "a: &a [x]\nb: [*a, *a]\n", "<<: *x\n", "model: !!python/object/apply:os.system ['true']\n", "!!python/none x\n",
    "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9 if i else 'x'}]\n" for i in range(9)), "%YAML 9.9\n---\nmodel: x\n",
    "%TAG ! tag:evil,2000:\n---\nmodel: !x y\n", "? ? ? x\n", "- " * 2000, "{" * 3000, "model: |\n" + " x\n" * 10000,
    "model: 2026-01-01\n", "ratio: 0x10\n", "ratio: 1_000\n", "ratio: 1:30\n", "ratio: .inf\n", "seed: " + "9" * 6000,
    "model: \"\\x00\"\noutput: o\n", "model: a/b\noutput: ../../../../etc/x\nratio: 1e999\n", "model: ~\noutput: ~\n",
    "base: {model: a/b}\ngrid: {ratio: [0.1, 0.2]}\noutput: '{ratio.__class__}'\n", "...\n...\n", "--- \n--- \n",
    "base: {model: a/b}\ngrid: {seed: [1, 2]}\noutput: '{seed!r:>99999999}'\n", "\ufeffmodel: a/b\noutput: o\n",
    "model: a/b\noutput: " + "x/" * 3000 + "\n", "model: a/b\noutput: " + "x" * 3000 + "\n", "memory: 1e999GB\n",
    "model: a/b\noutput: o\nset: {x: " + "[" * 3000,
    "model: a/b\noutput: o\nmodel_options: {img_size: 1000000000000}\n",
    "model: timm/x\noutput: o\nbatch: 10000000000\n",
)  # fmt: skip


def test_yaml(tmp_path):
    with Series("records: yaml", tmp_path) as series:
        for number, text in enumerate(YAMLS):
            case = series.folder()
            (case / "recipe.yaml").write_text(text)

            def listed(file: Path = case / "recipe.yaml") -> list:
                return batch.states(requests_of(read(file), str(file)))

            series.case(f"{number} {text[:40]!r}", listed, case, names=["recipe.yaml", "x/x", "xx"])


@pytest.fixture(scope="module")
def interrupted(home, tmp_path_factory) -> Path:
    """The same, the result being that of a run that was stopped after its first layer. A run is gone on with only where
    it was begun, by the names of its files: there every case will lie."""
    place = tmp_path_factory.mktemp("interrupted") / "case"
    shutil.copytree(home, place)
    shutil.rmtree(place / "small")

    def stop(entry: dict) -> None:
        if ".1." in entry["name"]:
            raise KeyboardInterrupt

    with quick(), pytest.raises(grail.errors.Interrupted):
        grail.compress(place / "model", output=place / "small", on_site=stop, **flags(place))
    assert Journal(place / "small.partial" / JOURNAL).committed
    return place.rename(place.with_name("sound"))


def line_of(step: bytes) -> bytes:
    """A line of the journal that is sound as such, whatever it says."""
    return b'{"sum": %d, %b\n' % (zlib.crc32(step), step[1:])


def spoil(partial_folder: Path, chance: Random) -> str:
    """One thing in the working folder of a run that was cut off."""
    journal = partial_folder / JOURNAL
    others = sorted(f for f in partial_folder.rglob("*") if f.is_file() and f.name not in (JOURNAL, "lock"))
    how = chance.choice(("bytes", "line", "line", "line", "file", "gone", "link"))
    if how == "bytes":
        what, content = damaged(journal.read_bytes(), chance)
        journal.write_bytes(content)
        return what
    if how == "line":
        lines = journal.read_bytes().splitlines()
        at = chance.randrange(len(lines))
        step = json.loads(lines[at])
        step.pop("sum")
        what, text = mangled(step, chance)
        whole = [line + b"\n" for line in lines]
        whole[at] = line_of(text) if text.startswith(b"{") else text
        journal.write_bytes(b"".join(whole))
        return f"line {at}: {what}"
    file = chance.choice(others)
    if how == "file":
        what, content = damaged(file.read_bytes(), chance)
        file.write_bytes(content)
        return f"{file.name} {what}"
    file.unlink()
    if how == "link":
        file.symlink_to("/dev/zero")
    return f"{file.name} {how}"


def test_resume(home, interrupted):
    weights = {file.name: file.read_bytes() for file in (home / "small").glob("*.safetensors")}
    with Series("records: resume", interrupted.parent, interrupted) as series, quick():
        for chance in series.seeds(10):
            case = series.folder()
            how = spoil(case / "small.partial", chance)
            run = partial(grail.compress, case / "model", output=case / "small", resume=True, **flags(case))
            told = ["--resume", str(case / "small")]
            ending = series.case(how, run, case, names=told, output=case / "small", keeps=True)
            if ending and ending.refused is None:
                found = {file.name: file.read_bytes() for file in (case / "small").glob("*.safetensors")}
                if found != weights:
                    series.wrong.append(f"{how}: other weights than an undisturbed run writes")


README = (
    "---\nlicense: mit\nlanguage: [en, de]\nbase_model: owner/name\ntags: [x]\n---\n# Title\n\n## Citation\n\n"
    "```bibtex\n@a{b}\n```\n"
)
FRONTS = (
    "license: !!python/object/apply:os.system ['true']\n", "license: &a x\nlanguage: [*a, *a]\n", "license: [mit]\n",
    "license: '\\\"'\n", "license: " + "x" * 10**5 + "\n", "base_model: ../../etc\n", "language: {a: b}\n",
    "language: [" + "en," * 10**4 + "]\n", "- a\n- b\n", "{" * 3000 + "\n", "license: \"a\\nb\"\n", "license: \x00\n",
    "license_link: javascript:alert(1)\n", "license: null\n", "license_name: '---'\n", "tags: [grail]\n",
    "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9 if i else 'x'}]\n" for i in range(9)),
)  # fmt: skip


def test_cards(home, tmp_path):
    with Series("model card", tmp_path) as series:
        run = read_run(home / "small")

        def made(case: Path) -> str:
            text = card(run, source_card(case), case)
            front = yaml.safe_load(text.split("---\n")[1])
            assert isinstance(front, dict) and "grail" in front["tags"], front
            return text

        for front in FRONTS:
            case = series.folder()
            (case / "README.md").write_text(f"---\n{front}---\n# x\n## Citation\n```\n{MARKUP}\n")
            series.case(front[:40], partial(made, case), case, names=["README.md"])
        for chance in series.seeds(100):
            case = series.folder()
            how, content = misencoded(README, chance)
            if chance.random() < 0.5:
                how, content = damaged(README.encode(), chance)
            (case / "README.md").write_bytes(content)
            series.case(how, partial(made, case), case, names=["README.md"])
