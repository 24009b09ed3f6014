"""The last guard before "done": it passes on what was written and fails on anything else, at once or layer by layer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import grail
from grail.checkpoint import reopen
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A compressed folder and the arguments that its own reopening check was called with."""
    source = tiny_tokenizer(tiny_checkpoint(tmp_path / "source"))
    calls = []
    monkeypatch.setattr(reopen, "verify", lambda *args, **kwargs: calls.append((args, kwargs)))
    calibration = tiny_calibration(tmp_path / "calibration.safetensors")
    grail.compress(source, output=tmp_path / "out", calibration=calibration)
    monkeypatch.undo()
    (_, *arguments), keywords = calls[0]
    return tmp_path / "out", arguments, keywords


@pytest.mark.parametrize("layerwise", [False, True], ids=["at once", "layer by layer"])
def test_what_was_written_reopens_in_a_fresh_process(written, layerwise):
    folder, arguments, _ = written
    found = reopen.verify(folder, *arguments, layerwise=layerwise)
    assert found["logit_difference"] < 1e-5
    assert found["token_ids_equal"] is True
    assert found["how"] == ("layer by layer" if layerwise else "at once")


def change_weight(folder):
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] += 0.05
    save_file(tensors, file)


def change_dtype(folder):
    file = folder / "model-00002-of-00003.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)


def drop_index_entry(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 27}))


def change_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<unk>": 0', '"<unk>": 5').replace('"w5": 5', '"w5": 0'))


DAMAGE = {
    "logits differ": change_weight,
    "reads back as": change_dtype,
    "disagree": drop_index_entry,
    "the class wants": change_config,
    "other token ids": change_tokenizer,
}


@pytest.mark.parametrize("complaint", DAMAGE)
def test_damage_is_found(written, reopen_here, complaint):
    folder, arguments, keywords = written
    DAMAGE[complaint](folder)
    with pytest.raises(RuntimeError, match=complaint):
        reopen.verify(folder, *arguments, **keywords)


def test_a_failing_check_leaves_no_output(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("does not reopen")

    monkeypatch.setattr(reopen, "verify", fail)
    source = tiny_checkpoint(tmp_path / "source")
    windows = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        grail.compress(source, output=tmp_path / "out", calibration=windows)
    assert not (tmp_path / "out").exists()
