"""What a close look at language models found: each fault by itself, small enough to be made in a moment."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import gguf
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from typer.testing import CliRunner

import grail
from grail.checkpoint.gguf import RECORD, converted
from grail.checkpoint.gguf_contents import Contents
from grail.checkpoint.reader import SINGLE
from grail.cli import app
from grail.distributed import Group
from grail.errors import Circumstance, GrailError, Interrupted
from grail.families.gguf import Entry
from grail.progress import Progress
from grail.recipe import Recipe
from grail.serving import gguf as export_room
from grail.serving.gguf import export_gguf
from grail.session import Session
from tests.test_gguf_export import VOCABULARY, byte_level, with_tokenizer
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def change(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def add_tensors(folder: Path, more: dict[str, torch.Tensor]) -> Path:
    save_file(load_file(folder / SINGLE) | more, folder / SINGLE, metadata={"format": "pt"})
    return folder


def command(*words, **options) -> list[str]:
    return [*map(str, words), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


@pytest.fixture
def flags(tmp_path):
    """Of a small run."""
    calibration = str(tiny_calibration(tmp_path / "calibration.safetensors", windows=4, length=16))
    return {"calibration": calibration, "eval": "none", "store": "disk"}


@torch.no_grad()
def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(90)[None] * 7 % VOCABULARY).logits


class TestGgufIn:
    """A GGUF file is the network that it says, or it is refused."""

    @pytest.fixture
    def exported(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "cache"))

        def make(model_type="llama", *, fields=None, entries=(), **settings):
            settings = {"num_hidden_layers": 1, "vocab_size": VOCABULARY} | settings
            source = with_tokenizer(tiny_checkpoint(tmp_path / "dense", model_type, **settings), byte_level())
            honest = export_room.described

            def described(model):
                held, tensors = honest(model)
                return held | (fields or {}), [*tensors, *entries]

            monkeypatch.setattr(export_room, "described", described)
            export_gguf(source, tmp_path / "m.gguf")
            return source, tmp_path / "m.gguf"

        return make

    @pytest.mark.parametrize(
        ("model_type", "settings"),
        [
            ("llama", {"attention_bias": True, "mlp_bias": True}),
            ("qwen2", {}),
            ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
            ("llama", {"rope_parameters": STRETCHED, "head_dim": 64, "max_position_embeddings": 131072}),
            ("llama", {"rope_parameters": STRETCHED | {"factor": 8.0, "original_max_position_embeddings": 64}}),
        ],
        ids=["biases", "some biases", "linear", "llama3", "llama3 of another length"],
    )
    def test_biases_and_stretched_rotations_are_carried_over(self, exported, capfd, model_type, settings):
        source, file = exported(model_type, **settings)
        assert torch.equal(logits(converted(file)), logits(source))
        assert "MISSING" not in capfd.readouterr().err

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rope.scaling.type", "yarn"),
            ("rope.scaling.attn_factor", 2.0),
            ("rope.dimension_count", 4),
            ("rope.scaling.factor", float("inf")),
        ],
    )
    def test_a_rotary_embedding_that_cannot_be_is_refused_by_its_key(self, exported, key, value):
        _, file = exported("qwen2" if key == "rope.dimension_count" else "llama", fields={key: value})
        if key == "rope.dimension_count":  # of llama the reader makes it the size of a head
            file.write_bytes(file.read_bytes().replace(b"llama", b"qwen2"))
        with pytest.raises(GrailError, match=rf"m\.gguf: \w+\.{key}"):
            converted(file)

    def test_keys_that_stretch_nothing_are_taken(self, exported):
        nothing = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 9}
        ones = Entry("rope_freqs.weight", (4,), lambda: torch.ones(4))
        source, file = exported(fields=nothing, entries=[ones])
        assert torch.equal(logits(converted(file)), logits(source))

    @pytest.mark.parametrize(
        ("name", "size"), [("rope_freqs.weight", 4), ("rope_freqs.weight", 3), ("blk.0.attn_q_norm.weight", 8)]
    )
    def test_a_tensor_without_a_place_is_refused_by_its_name(self, exported, name, size):
        entry = Entry(name, (size,), lambda: torch.linspace(1, 3, size) + 0.5)
        _, file = exported(entries=[entry])
        with pytest.raises(GrailError, match=rf"m\.gguf: .*{name}"):
            converted(file)
        assert not list((file.parent / "cache").iterdir())

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("attention.causal", False),
            ("attention.scale", 0.5),
            ("attention.clamp_kqv", 8.0),
            ("logit_scale", 0.5),
            ("use_parallel_residual", True),
            ("attention.sliding_window", 5),
            ("attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", 30.0),
            ("residual_scale", 0.25),
            ("embedding_scale", 12.0),
            ("attention.max_alibi_bias", 8.0),
            ("expert_count", 4),
        ],
    )
    def test_another_kind_of_attention_is_refused_by_its_key(self, exported, key, value):
        _, file = exported(fields={key: value})
        with pytest.raises(GrailError, match=rf"m\.gguf: llama\.{key} = {value} makes another network"):
            converted(file)

    def test_values_that_change_nothing_are_taken(self, exported):
        neutral = {"attention.causal": True, "logit_scale": 1.0, "attention.sliding_window": 10**6}
        neutral |= {"residual_scale": 1.0, "final_logit_softcapping": 0.0, "expert_count": 0, "pooling_type": 3}
        neutral |= {"tensor_data_layout": "Meta AI original pth"}
        source, file = exported(fields=neutral)
        assert torch.equal(logits(converted(file)), logits(source))

    @pytest.mark.parametrize("key", ["attention.temperature_scale", "full_attention_interval", "of_a_later_day"])
    def test_a_key_that_nobody_knows_is_refused_by_its_name(self, exported, key):
        _, file = exported(fields={key: 1.0})
        with pytest.raises(GrailError, match=rf"m\.gguf: llama\.{key} .*; give the checkpoint"):
            converted(file)
        assert not list((file.parent / "cache").iterdir())

    @pytest.mark.parametrize(
        ("fields", "tensor"),
        [
            ({"attention.key_length": 4, "rope.dimension_count": 4}, "attn_k"),
            ({"attention.head_count": 3}, "attn_q"),
            ({"attention.head_count": 12}, "attn_q"),
            ({"attention.head_count_kv": 3}, "attn_k"),
            ({"attention.value_length": 4}, "attn_v"),
        ],
        ids=str,
    )
    def test_heads_that_the_tensors_have_no_rows_for(self, exported, fields, tensor):
        _, file = exported(fields=fields)
        with pytest.raises(GrailError, match=rf"m\.gguf: blk\.0\.{tensor}\.weight has \d+ rows, but .*heads of"):
            converted(file)

    def test_heads_of_another_size_where_the_class_names_none(self, exported):
        _, file = exported("qwen2", head_dim=16)
        file.write_bytes(file.read_bytes().replace(b"llama", b"qwen2"))
        assert json.loads((converted(file) / "config.json").read_text())["head_dim"] == 16
        assert AutoModelForCausalLM.from_pretrained(converted(file)).model.layers[0].self_attn.head_dim == 16

    def test_heads_of_another_size_than_by_default(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
        writer.add_key_length(16)
        writer.add_rope_dimension_count(16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        config = Qwen3Config(hidden_size=32, num_attention_heads=4)
        Contents(tmp_path / "m.gguf", config)
        assert config.head_dim == 16

    def test_what_the_version_before_has_converted_is_not_taken(self, exported, monkeypatch):
        _, file = exported("qwen2")
        monkeypatch.setattr("grail.checkpoint.gguf.CONVERSION", b"")
        old = converted(file)
        monkeypatch.undo()
        monkeypatch.setenv("GRAIL_CACHE", str(file.parent / "cache"))
        assert converted(file) != old

    @pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1])])
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", RECORD])
    def test_a_damaged_folder_is_made_anew(self, exported, name, damage, caplog):
        caplog.set_level(logging.WARNING, logger="grail")  # a command that was told to be quiet may have run before
        _, file = exported("llama")
        folder = converted(file)
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        marks = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert {path: path.stat().st_mtime_ns for path in converted(file).iterdir()} == marks
        damage(folder / name)
        assert converted(file) == folder and "is damaged" in caplog.text
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
        assert list(folder.parent.iterdir()) == [folder]

    def test_what_a_killed_process_left_is_taken_away(self, exported):
        _, file = exported("llama")
        cache = file.parent / "cache"
        killed = "g._write_card = lambda *_: os._exit(9)"
        line = f"import os, grail.checkpoint.gguf as g; {killed}; g.converted(g.Path({str(file)!r}))"
        assert subprocess.run([sys.executable, "-c", line]).returncode == 9
        (left,) = cache.glob("*.*/model.safetensors")
        with open(left.parent / "lock") as other:
            fcntl.flock(other, fcntl.LOCK_EX)  # one that still runs
            folder = converted(file)
            assert left.exists()
        shutil.rmtree(folder)
        assert converted(file) == folder and list(cache.iterdir()) == [folder]

    @pytest.mark.parametrize("kind", ["rust", "python"])
    def test_where_the_disk_is_full_it_says_where(self, exported, kind, monkeypatch):
        _, file = exported("llama")
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
        rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        refused = Mock(side_effect=rust if kind == "rust" else full)
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", refused)
        with pytest.raises(Circumstance, match=r"GRAIL_CACHE.*No space left") as caught:
            converted(file)
        assert str(file.parent / "cache") in str(caught.value) and not list((file.parent / "cache").iterdir())


class TestGoingOn:
    """What --resume goes on with is the same network and what was asked for."""

    @pytest.fixture
    def begun(self, tmp_path, flags):
        def interrupt(**more):
            def stop(entry: dict) -> None:
                if ".1." in entry["name"]:
                    raise KeyboardInterrupt

            with pytest.raises(Interrupted):
                grail.compress(tmp_path / "model", output=tmp_path / "out", on_site=stop, **flags, **more)

        tiny_checkpoint(tmp_path / "model", "mistral", sliding_window=None)
        return interrupt

    @pytest.mark.parametrize("field", [{"sliding_window": 8}, {"rms_norm_eps": 1e-4}])
    def test_another_configuration_is_another_network(self, tmp_path, flags, begun, field):
        begun()
        before = (tmp_path / "model" / "config.json").read_bytes()
        change(tmp_path / "model", **field)
        with pytest.raises(GrailError, match=r"begun with model's config\.json sha256 \w+, this command has"):
            grail.compress(tmp_path / "model", output=tmp_path / "out", resume=True, **flags)
        (tmp_path / "model" / "config.json").write_bytes(before)
        assert grail.compress(tmp_path / "model", output=tmp_path / "out", resume=True, **flags).output

    def test_processes_with_other_configurations_are_not_of_the_same_run(self, tmp_path, flags, begun):
        def identity():
            recipe = Recipe(model=str(tmp_path / "model"), output=str(tmp_path / "out"), **flags)
            return Session(recipe, Progress(), Group()).identity("the same files")

        main = identity()
        assert identity() == main
        change(tmp_path / "model", rms_norm_eps=1e-4)
        assert identity() != main

    def test_an_output_that_was_being_replaced_is_not_finished(self, tmp_path, flags, begun):
        grail.compress(tmp_path / "model", output=tmp_path / "out", **flags)
        old = (tmp_path / "out" / "grail.json").read_bytes()
        save_file({"input_ids": torch.arange(64).view(4, 16)}, flags["calibration"])
        begun(overwrite=True)
        again = command(
            "compress", "--resume", "--overwrite", model=tmp_path / "model", output=tmp_path / "out", **flags
        )
        done = CliRunner().invoke(app, again)
        assert done.exit_code == 0 and (tmp_path / "out" / "grail.json").read_bytes() != old, done.output
        assert not (tmp_path / "out.partial").exists()
        assert "is finished and stays as it is" in CliRunner().invoke(app, again).stderr


class TestTensorsThatNobodyAsksFor:
    """What the class does not load is not part of the network."""

    @pytest.fixture
    def strays(self, tmp_path):
        """A model with one bias too many, and the same without."""
        settings = {"vocab_size": VOCABULARY, "num_key_value_heads": 6, "num_hidden_layers": 1}
        sound = with_tokenizer(tiny_checkpoint(tmp_path / "sound", **settings), byte_level())
        shutil.copytree(sound, tmp_path / "stray")
        return add_tensors(tmp_path / "stray", {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}), sound

    @pytest.mark.parametrize("more", [{}, {"bias": True, "target": "hidden"}], ids=["plain", "with biases of its own"])
    def test_a_bias_beside_attention_bias_false(self, tmp_path, flags, strays, more):
        for source in strays:
            grail.compress(source, output=tmp_path / f"{source.name}-small", **flags, **more)
        stray, sound = (load_file(next((tmp_path / f"{s.name}-small").glob("*.safetensors"))) for s in strays)
        assert stray.keys() == sound.keys() and all(torch.equal(stray[name], sound[name]) for name in sound)

    def test_the_run_says_what_it_leaves_out(self, tmp_path, flags, strays):
        options = {"model": strays[0], "output": tmp_path / "out", **flags}
        done = CliRunner().invoke(app, command("compress", **options))
        assert "self_attn.q_proj.bias (1 such tensors) is left out" in done.stderr

    def test_none_is_exported(self, tmp_path, strays):
        export_gguf(strays[0], tmp_path / "m.gguf")
        assert not [t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "bias" in t.name]

    def test_frequencies_that_old_checkpoints_store_are_not_exported(self, tmp_path, strays):
        old = add_tensors(strays[1], {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)})
        export_gguf(old, tmp_path / "m.gguf")
        assert not [t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "rot" in t.name]
