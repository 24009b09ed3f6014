"""One format into another: the same logits, the widths one expects, and a sentence where it cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import grail
from grail.checkpoint import reopen
from grail.convert import convert
from grail.errors import GrailError
from grail.evaluation.perplexity import logits
from grail.families import open_family
from tests.test_formats import IDS, assert_close, assert_generates, opened, plan, write
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer


@pytest.fixture(autouse=True)
def verify_here(monkeypatch, tmp_path_factory):
    """The reopening check in this process (test_formats starts one for each format)."""

    def verify(folder, probe_1L, logits_1LV, dtype, token_ids, written, *, layerwise, loads):
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        assert loads == ("grail" if model_type.startswith("grail_") else "plain")
        work = tmp_path_factory.mktemp("reopen")
        save_file({"ids": probe_1L, "logits": logits_1LV.float().contiguous()}, work / "probe.safetensors")
        (work / "expected.json").write_text(json.dumps({"token_ids": token_ids, "tensors": written}))
        return reopen.check(folder, work, dtype, layerwise=layerwise, loads=loads)

    monkeypatch.setattr(reopen, "verify", verify)


def written(tmp_path, asked, *, gqa="query", bias=False, **source):
    """A compressed folder in the format, with the grail.json that a run leaves."""
    model = open_family(tiny_checkpoint(tmp_path / "source", **source))
    sites, _, reductions = chosen = plan(model, gqa, differ=asked != "uniform")
    form, _ = write(model, tmp_path / asked, asked, bias=bias, chosen=chosen)
    entries = [
        {
            "name": site.name,
            "before": site.units.width,
            "after": reductions[site.name].kept_width if site.name in reductions else site.units.width,
        }
        for site in sites
    ]
    record = {
        "recipe": {"gqa": gqa}, "sites": entries, "format": form.name, "loads_with": form.loads_with,
        "parameters": {"before": 10, "after": 5},
    }  # fmt: skip
    (tmp_path / asked / "grail.json").write_text(json.dumps(record))
    return tmp_path / asked


def same_network(before, after):
    assert_close(logits(open_family(after), IDS), logits(open_family(before), IDS))
    assert_generates(opened(after))


PAIRS = [(a, b) for a in ("uniform", "grail", "padded") for b in ("uniform", "grail", "padded") if a != b]


@pytest.mark.parametrize(("current", "to"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_every_pair(tmp_path, current, to, bias):
    source = written(tmp_path, current, bias=bias)
    found = convert(source, tmp_path / "out", to=to)
    same_network(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "grail.json").read_text())
    assert record["format"] == found["format"] == to and record["loads_with"] == found["loads_with"]
    assert record["parameters"] == {"before": 10, "after": found["parameters"]}
    widths = [(w.heads, w.kv_heads, w.channels) for w in open_family(tmp_path / "out").widths]
    narrow = [(4, 2, 28), (4, 2, 28)] if current == "uniform" else [(4, 2, 28), (6, 2, 17)]
    wide = (4, 2, 28) if current == "uniform" else (6, 2, 28)
    assert widths == {"grail": narrow, "uniform": [wide] * 2, "padded": [(6, 2, 40)] * 2}[to]


@pytest.mark.parametrize("options", [{"num_key_value_heads": 6}, {"model_type": "qwen2"}], ids=["mha", "qwen2"])
def test_round_trip_gives_the_tensors_back(tmp_path, options):
    """grail -> padded -> grail: nothing is lost, nothing moves."""
    source = written(tmp_path, "grail", **options)
    convert(source, tmp_path / "wide", to="padded")
    convert(tmp_path / "wide", tmp_path / "back", to="grail")
    before, after = open_family(source).source, open_family(tmp_path / "back").source
    assert set(before.names()) == set(after.names())
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.names())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "worked out"])
def test_whole_groups_come_back(tmp_path, recorded):
    source = written(tmp_path, "uniform", gqa="group", num_attention_heads=8, num_key_value_heads=4)
    if recorded:
        record = json.loads((source / "grail.json").read_text()) | {"sites": None, "recipe": None}
        widths = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 40}
        (source / "grail.json").write_text(json.dumps(record | {"original_widths": widths}))
    convert(source, tmp_path / "out", to="padded")
    same_network(source, tmp_path / "out")
    widths = open_family(tmp_path / "out").widths[0]
    assert (widths.heads, widths.kv_heads, widths.channels) == (8, 4, 40)


def test_unequal_groups_keep_some_that_do_nothing(tmp_path):
    """One query head of the first group does nothing: grouped attention must keep it for the other group's sake."""
    source = tiny_checkpoint(tmp_path / "source")
    model = open_family(source)
    tensors = {name: model.source.get(name) for name in model.source.names()}
    tensors["model.layers.0.self_attn.o_proj.weight"][:, 8:16] = 0
    tensors["model.layers.1.self_attn.o_proj.weight"][:, 24:] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", to="grail")
    same_network(source, tmp_path / "out")
    widths = [(w.heads, w.kv_heads, w.channels) for w in open_family(tmp_path / "out").widths]
    assert widths == [(6, 2, 40), (3, 1, 1)]


def test_tokenizer_and_licence_come_along_and_bf16_stays(tmp_path):
    source = tiny_tokenizer(written(tmp_path, "grail", dtype=torch.bfloat16))
    (source / "LICENSE").write_text("free")
    convert(source, tmp_path / "out", to="padded")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "LICENSE", "grail.json"} <= names and "modeling_grail.py" not in names
    held = open_family(tmp_path / "out").source
    assert {held.info(name).dtype for name in held.names()} == {torch.bfloat16}


def test_nothing_is_left_when_the_check_fails(tmp_path, monkeypatch):
    source = written(tmp_path, "grail")
    monkeypatch.setattr(reopen, "verify", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("differs")))
    with pytest.raises(RuntimeError, match="differs"):
        convert(source, tmp_path / "out", to="padded")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_impossible_conversions_say_why(tmp_path):
    source = written(tmp_path, "grail")
    with pytest.raises(GrailError, match="is in the format grail already"):
        convert(source, tmp_path / "out", to="grail")
    with pytest.raises(GrailError, match="--to square: choose one of"):
        convert(source, tmp_path / "out", to="square")
    with pytest.raises(GrailError, match=r"no grail\.json that says how wide"):
        convert(tmp_path / "source", tmp_path / "out", to="padded")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(GrailError, match="--overwrite"):
        convert(source, tmp_path / "out", to="padded")
    convert(source, tmp_path / "out", to="padded", overwrite=True)
    other = written(tmp_path / "other", "grail", bias=True, model_type="qwen3")
    stays = "leave the folder in the format grail, or compress again with --no-bias"
    with pytest.raises(GrailError, match=rf"^--to uniform: qwen3 has no bias in down_proj; {stays}$"):
        convert(other, tmp_path / "no", to="uniform")


COMPRESS_OPTIONS = ("--format", "--no-bias", "--attn-ratio", "--allocation", "--mlp-ratio")


@pytest.mark.parametrize("to", ["uniform", "grail"])
def test_messages_name_no_option_that_convert_lacks(tmp_path, to):
    """From zeros in a plain folder to 5 heads, which llama refuses, or to the format that was asked for."""
    source = tiny_checkpoint(tmp_path / "source", num_key_value_heads=6)
    model = open_family(source)
    tensors = {name: model.source.get(name) for name in model.source.names()}
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:, 40:] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    changed = convert(source, tmp_path / "out", to=to)["class_changed"]
    expected = {"uniform": "llama refuses 5 heads in a hidden size of 48", "grail": "--to grail was asked for"}
    assert expected[to] in changed and not [option for option in COMPRESS_OPTIONS if option in changed]


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 6}, {"gqa": "group"}], ids=["gqa", "mha", "groups"])
def test_the_record_describes_what_was_written(tmp_path, options):
    """Padded and back: as the run recorded it. Uniform: the widths of config.json, zeros that fill up included."""
    options = dict(options)
    gqa = options.pop("gqa", "query")
    source = tiny_checkpoint(tmp_path / "source", **options)
    calibration = tiny_calibration(tmp_path / "calibration.safetensors")
    grail.compress(
        source, output=tmp_path / "small", calibration=calibration, method="random", allocation="log", gqa=gqa,
        ratio=0.5, format="grail",
    )  # fmt: skip
    convert(tmp_path / "small", tmp_path / "padded", to="padded")
    convert(tmp_path / "padded", tmp_path / "back", to="grail")
    convert(tmp_path / "small", tmp_path / "uniform", to="uniform")
    small, padded, back, uniform = (
        json.loads((tmp_path / name / "grail.json").read_text()) for name in ("small", "padded", "back", "uniform")
    )
    for record in (padded, back):
        assert record["sites"] == small["sites"]
        for kind, shares in small["ratio"].items():
            assert record["ratio"][kind] == {"asked": shares["asked"], "reached": pytest.approx(shares["reached"])}
    assert back["parameters"] == small["parameters"] and padded["parameters"]["after"] > small["parameters"]["after"]
    config = json.loads((tmp_path / "uniform" / "config.json").read_text())
    wide = {"o_proj": config["num_attention_heads"] * 8, "down_proj": config["intermediate_size"]}
    assert [site["after"] for site in uniform["sites"]] == [wide["o_proj"], wide["down_proj"]] * 2
    assert uniform["ratio"]["heads"]["reached"] == 1 - wide["o_proj"] / 48
    assert uniform["ratio"]["channels"]["reached"] == 1 - wide["down_proj"] / 40
    assert uniform["ratio"]["overall"]["reached"] < small["ratio"]["overall"]["reached"]
    if gqa == "group" or options:  # all seven linear layers belong to the sites
        left = linear_weights(tmp_path / "uniform") / linear_weights(source)
        assert uniform["ratio"]["overall"]["reached"] == pytest.approx(1 - left)
    assert uniform["sites"][0]["error_after"] == small["sites"][0]["error_after"]


def linear_weights(folder) -> int:
    source = open_family(folder).source
    return sum(source.get(name).numel() for name in source.names() if "_proj" in name)


@pytest.mark.parametrize("sites", [None, [{"name": "model.layers.7.mlp.down_proj", "before": 40}], ["x"]])
def test_a_record_of_other_sites_says_nothing_of_them(tmp_path, sites):
    source = written(tmp_path, "grail")
    record = json.loads((source / "grail.json").read_text()) | {"sites": sites, "ratio": {"heads": {"reached": 0.5}}}
    (source / "grail.json").write_text(json.dumps(record))
    convert(source, tmp_path / "out", to="uniform")
    record = json.loads((tmp_path / "out" / "grail.json").read_text())
    assert record["sites"] is record["ratio"] is None


def test_a_record_that_does_not_fit_is_refused(tmp_path):
    source = written(tmp_path, "uniform")
    record = json.loads((source / "grail.json").read_text())
    record["sites"][0]["before"] = 8
    record["sites"][2]["before"] = 8
    (source / "grail.json").write_text(json.dumps(record))
    with pytest.raises(GrailError, match="do not fit the model"):
        convert(source, tmp_path / "out", to="padded")
