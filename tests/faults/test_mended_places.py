"""Places of outputs and inputs: what comes to them, or goes from them, while a run works."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import grail
from grail.checkpoint.reader import SINGLE, SafetensorsFolder
from grail.checkpoint.writer import OutputFolder
from grail.convert import convert
from grail.errors import Circumstance, GrailError, verdict
from grail.soup import soup
from tests.faults.numeric_cases import no_reopening
from tests.killed_runs import small_runs
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("small_runs_on_one_thread")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def place(tmp_path):
    """A folder with a model and its text; checks at the end are left out."""
    tiny_checkpoint(tmp_path / "model", num_hidden_layers=3)
    tiny_calibration(tmp_path / "ids.safetensors")
    with no_reopening(), small_runs():
        yield tmp_path


def compress(place: Path, out: str = "out", **options):
    flags = {"calibration": str(place / "ids.safetensors"), "eval": "none", "store": "disk"} | options
    return grail.compress(flags.pop("model", place / "model"), output=place / out, **flags)


def at_the_second_layer(do):
    return lambda entry: do() if entry["name"] == DOWN else None


class TestOutput:
    @pytest.mark.parametrize("kind", ["folder", "file", "other folder with --overwrite"])
    def test_what_comes_to_its_place_meanwhile_stays(self, place, kind):
        out = place / "out"

        def come() -> None:
            (out if kind == "file" else out / "precious").parent.mkdir(exist_ok=True)
            (out if kind == "file" else out / "precious").write_text("mine")

        overwrite = "overwrite" in kind
        with pytest.raises(Circumstance, match=r"came while the run worked.*--resume") as told:
            compress(place, on_site=at_the_second_layer(come), overwrite=overwrite)
        assert f"--output {out}" in str(told.value)
        assert (out if kind == "file" else out / "precious").read_text() == "mine"
        shutil.move(out, place / "moved")
        assert compress(place, resume=True).output == str(out)

    def test_an_output_that_was_to_be_replaced_is_deleted_by_no_later_command(self, place):
        """It lies in the working folder, and something else has taken its place."""
        old = place / "out.partial" / "replaced"
        old.mkdir(parents=True)
        (place / "out.partial" / "lock").touch()
        (old / "config.json").write_text("old")
        compress(place, "other")
        shutil.move(place / "other", place / "out")
        for resume in (False, True):
            with pytest.raises(GrailError, match=r"out\.partial/replaced was the output"):
                compress(place, overwrite=True, resume=resume)
            assert (old / "config.json").read_text() == "old"

    @pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EROFS], ids=errno.errorcode.get)
    def test_what_comes_between_the_two_renames_is_told(self, place, monkeypatch, code):
        compress(place)
        rename = os.replace

        def refused(source, target):
            if Path(target) == place / "out" and "partial" in Path(source).name:
                (place / "out").mkdir()
                (place / "out" / "precious").write_text("mine")
                raise OSError(code, os.strerror(code), str(source))
            rename(source, target)

        monkeypatch.setattr(os, "replace", refused)
        with pytest.raises(Circumstance, match=r"what was in .* lies in .*out\.partial/replaced"):
            compress(place, overwrite=True)
        assert (place / "out" / "precious").read_text() == "mine"
        assert (place / "out.partial" / "replaced" / "grail.json").exists()

    def test_an_empty_folder_that_comes_is_used(self, place):
        compress(place, on_site=at_the_second_layer((place / "out").mkdir))
        assert (place / "out" / "grail.json").exists()

    def test_a_soup_of_files_too(self, tmp_path, monkeypatch):
        for number in range(2):
            save_file({"a": torch.full((3,), float(number))}, tmp_path / f"{number}.safetensors")
        out, write = tmp_path / "out.safetensors", OutputFolder.write_file

        def written(self, *arguments):
            out.write_text("mine")
            return write(self, *arguments)

        monkeypatch.setattr(OutputFolder, "write_file", written)
        with pytest.raises(Circumstance, match="came while the run worked"):
            soup([str(tmp_path / f"{number}.safetensors") for number in range(2)], out)
        assert out.read_text() == "mine"

    @pytest.mark.parametrize("what", ["model", "text"])
    def test_its_working_folder_holds_no_input(self, place, what):
        partial = place / "out.partial"
        partial.mkdir()
        (partial / "lock").touch()
        name = "model" if what == "model" else "ids.safetensors"
        shutil.move(place / name, partial / name)
        given = {"model": partial / name} if what == "model" else {"calibration": str(partial / name)}
        with pytest.raises(GrailError, match=r"out\.partial holds the input"):
            compress(place, **given, overwrite=True)
        assert (partial / name).exists()

    def test_a_soup_of_files_in_its_working_folder(self, tmp_path):
        partial = tmp_path / "out.safetensors.partial"
        partial.mkdir()
        (partial / "lock").touch()
        files = [str(partial / f"{number}.safetensors") for number in range(2)]
        for file in files:
            save_file({"a": torch.ones(3)}, file)
        with pytest.raises(GrailError, match="partial holds the input"):
            soup(files, tmp_path / "out.safetensors")
        assert all(map(os.path.exists, files))

    def test_a_mount_point_is_refused(self, place, monkeypatch):
        (place / "out").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place / "out")
        with pytest.raises(GrailError, match="is a mount point"):
            compress(place)

    def test_the_root_is_refused(self, place):
        with pytest.raises(GrailError, match="--output /: name a folder"):
            compress(place, out="/")

    @pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV], ids=errno.errorcode.get)
    def test_what_the_system_says_of_busy_places_is_told(self, code):
        assert verdict(OSError(code, os.strerror(code), "x")) == (f"x: {os.strerror(code)}", 2)


class TestInput:
    @pytest.mark.parametrize("how", ["cut", "other", "pipe"])
    def test_a_shard_that_is_changed_meanwhile_is_told_and_the_work_kept(self, place, how):
        compress(place, "whole")
        file, sound = place / "model" / SINGLE, place / "sound"
        shutil.copy2(file, sound)

        def change() -> None:
            time.sleep(0.01)
            if how == "cut":
                os.truncate(file, 50_000)
            elif how == "pipe":
                file.unlink()
                os.mkfifo(file)
            else:
                save_file({name: t + 1 for name, t in load_file(file).items()}, place / "new")
                os.replace(place / "new", file)

        with pytest.raises(Circumstance, match=r"was changed or touched while it was in use.*is kept in"):
            compress(place, on_site=at_the_second_layer(change))
        os.replace(sound, file)
        compress(place, resume=True)
        for name, tensor in load_file(place / "whole" / "model-00002-of-00004.safetensors").items():
            assert torch.equal(tensor, load_file(place / "out" / "model-00002-of-00004.safetensors")[name])

    @pytest.mark.parametrize("how", ["cut", "gone", "folder"])
    def test_a_tokenizer_that_is_changed_meanwhile_too(self, place, how):
        tiny_tokenizer(place / "model")
        file = place / "model" / "tokenizer.json"
        sound = file.read_bytes()

        def change() -> None:
            time.sleep(0.01)
            file.unlink()
            if how == "cut":
                file.write_bytes(sound[:100])
            elif how == "folder":
                file.mkdir()

        with pytest.raises(Circumstance, match=r"tokenizer\.json was changed.*is kept in"):
            compress(place, on_site=at_the_second_layer(change))
        if how == "folder":
            file.rmdir()
        file.write_bytes(sound)
        assert (Path(compress(place, resume=True).output) / "tokenizer.json").read_bytes() == sound

    def test_reading_one_that_is_shorter_than_it_was(self, place, monkeypatch):
        from grail.checkpoint import reader

        source = SafetensorsFolder(place / "model")
        os.truncate(place / "model" / SINGLE, 20_000)
        monkeypatch.setattr(reader, "stamp", lambda file: source._stamps[file])
        with pytest.raises(Circumstance, match="ended early"):
            for name in source.names():
                source.get(name)


@pytest.mark.parametrize("target", ["hidden", "stream"])
def test_a_ridge_beyond_all_numbers_names_its_site(place, target):
    with pytest.raises(GrailError, match=r"^model\.layers\.0.*: --ridge times"):
        compress(place, ridge=1e308, target=target)


@pytest.mark.parametrize("given", [3, "yes", True], ids=repr)
def test_progress_is_one_of_ours(place, given):
    with pytest.raises(GrailError, match=r"progress must be a grail\.Progress"):
        compress(place, progress=given)


class TestConvert:
    @pytest.mark.parametrize(
        ("key", "count"),
        [
            ("intermediate_size", 2**63), ("intermediate_size", 10**9), ("num_attention_heads", 10**6),
            ("num_key_value_heads", 0), ("num_attention_heads", -1), ("num_key_value_heads", 10**6),
        ],
    )  # fmt: skip
    def test_original_widths_that_no_model_has(self, place, key, count):
        compress(place, ratio=0.4, format="uniform")
        file = place / "out" / "grail.json"
        record = json.loads(file.read_text())
        assert key in record["original_widths"]
        record["original_widths"][key] = count
        file.write_text(json.dumps(record))
        with pytest.raises(GrailError, match=r"grail\.json records widths that do not fit"):
            convert(place / "out", place / "padded", to="padded")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {"x": ["\ud800"]}], ids=ascii)
    def test_a_record_that_cannot_be_written_again(self, place, value):
        compress(place, ratio=0.4, format="uniform")
        file = place / "out" / "grail.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"evaluation": value}))
        with pytest.raises(GrailError, match=r"grail\.json: evaluation.* cannot be written as JSON"):
            convert(place / "out", place / "padded", to="padded")
        assert not list(place.glob("padded*"))
