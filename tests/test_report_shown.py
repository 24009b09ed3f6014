"""Reports at a prompt, in a notebook and as a table: short, whole in itself, of plain values."""

from __future__ import annotations

import json
import re

import pytest
import torch

import grail
from grail.page.style import CSS, within
from tests.test_modules import MLP
from tests.test_report_page import Reader
from tests.test_vision_families import built, images
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here")
PLAIN = (str, int, float, bool, type(None))


def windows(count=8):
    return torch.randint(64, (count, 32), generator=torch.Generator().manual_seed(0))


def evaluated(folder):
    ids = str(tiny_calibration(folder / "ids.safetensors"))
    source = tiny_checkpoint(folder / "source")
    return grail.compress(source, output=folder / "out", calibration=ids, eval=ids, compare_pruned=True)


def network(folder, **flags):
    return grail.compress(built("cifar"), calibration=images(8), method="wanda", ratio=0.5, **flags)


REPORTS = {
    "folder": evaluated,
    "module": lambda folder: grail.compress(tiny_model(), calibration=windows(), target="stream"),
    "trained": lambda folder: grail.compress(tiny_model(), calibration=windows(), method="wanda-pp-sp"),
    "network": network,
    "network-written": lambda folder: network(folder, output=folder / "out"),
    "network-pruned": lambda folder: network(folder, compensate=False, bias=True),
    "network-of-one's-own": lambda folder: grail.compress(
        MLP(), method="mag-l1", compensate=False, calibration=None, sites=[grail.channels("fc1", "fc2", width=24)]
    ),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = REPORTS[kind](tmp_path_factory.mktemp("report"))
        return found[kind]

    return of


each_report = pytest.mark.parametrize("kind", REPORTS)


@each_report
def test_a_report_is_a_few_lines_at_a_prompt(reports, kind):
    report = reports(kind)
    shown = repr(report)
    assert shown == f"{type(report).__name__}\n{report.summary()}"
    assert len(shown.splitlines()) <= 9 and max(map(len, shown.splitlines())) < 140
    assert "tensor(" not in shown and "None" not in shown and "Sequential" not in shown
    assert report.recipe.method in shown
    assert (f"written to {report.output}" in shown) == (report.output is not None)


def test_what_it_says(reports):
    report = reports("folder")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in report.summary().splitlines()[:-1])
    values = report.evaluation["perplexity"]
    assert list(lines) == ["model", "method", "parameters", "size on disk", "perplexity", "mean error per site"]
    assert lines["perplexity"].startswith(f"{values['compressed']:.2f} (dense {values['dense']:.2f}, pruned only ")
    assert lines["perplexity"].endswith(f" on {report.evaluation['data']}")
    before, after = (sum(site[f"error_{name}"] for site in report.sites) / 4 for name in ("before", "after"))
    after_told, before_told = re.match(r"(\S+) \((\S+) before repair[,)]", lines["mean error per site"]).groups()
    assert (float(after_told), float(before_told)) == (pytest.approx(after, rel=0.01), pytest.approx(before, rel=0.01))
    assert "mean error" not in reports("network-pruned").summary()


@each_report
def test_a_report_is_a_table_with_plots_in_a_notebook(reports, kind):
    report = reports(kind)
    found = Reader(report._repr_html_())
    assert found.tags[:2] == ["div", "style"] and not {"html", "body", "script", "link", "img", "iframe"} & set(
        found.tags
    )
    assert not [name for name, _ in found.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", report._repr_html_())
    assert "svg" in found.tags and "table" in found.tags
    assert found.tags.count("tr") == 1 + len(report.sites)
    assert len(report._repr_html_()) < 10**5


def test_a_name_with_markup_is_text(reports):
    report = reports("network")
    called, report.source = report.source, {"id": "<script>alert(1)</script>"}
    try:
        assert "script" not in Reader(report._repr_html_()).tags
    finally:
        report.source = called


def selectors(css):
    """Of every rule, also within @media."""
    return [part.strip() for rule in re.findall(r"(?:^|[{}])\s*([^{}@]+)\{", css) for part in rule.split(",")]


def test_its_style_stays_within_it():
    scoped = within(".grail-report")
    assert all(part.split(" ")[0].partition(":")[0] == ".grail-report" for part in selectors(scoped))
    assert scoped.count("{") == scoped.count("}") and len(selectors(scoped)) >= len(selectors(CSS)) - 4
    assert ".grail-report{--bg" in scoped.partition("prefers-color-scheme:dark")[2], "night colours within it alone"


@each_report
def test_sites_and_json_are_plain_values(reports, kind):
    report = reports(kind)
    for entry in report.sites:
        for value in entry.values():
            assert type(value) in PLAIN or (type(value) is list and all(type(v) in PLAIN for v in value))
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["sites"] == report.sites


@each_report
def test_sites_are_a_data_frame(reports, kind):
    pandas = pytest.importorskip("pandas")
    report = reports(kind)
    frame = pandas.DataFrame(report.sites)
    assert len(frame) == len(report.sites) and list(frame.name) == [entry["name"] for entry in report.sites]
    assert frame.before.dtype == frame.after.dtype == "int64"
    if any(entry["error_after"] is not None for entry in report.sites):
        assert frame.error_after.dtype == "float64"
        assert (frame.groupby("kind").after.sum() < frame.groupby("kind").before.sum()).all()
