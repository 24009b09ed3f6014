"""Vision: folders whose classes are called like parts of a data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from grail.calibration.images import open_images
from grail.errors import GrailError


def filled(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / file)
    return folder


class TestClassesCalledLikeParts:
    @pytest.mark.parametrize("split", ["calibration", "test"])
    @pytest.mark.parametrize("names", [("bus", "train", "truck"), ("Train", "bus"), ("invalid", "valid")])
    def test_one_beside_other_classes_is_a_class(self, tmp_path, names, split):
        folder = filled(tmp_path, *(f"{name}/{number}.png" for name in names for number in range(2)))
        found = open_images(folder, split=split)
        assert found.classes == list(names) and found.labels.tolist() == [n // 2 for n in range(2 * len(names))]
        assert not found.held_out

    def test_it_is_told_what_the_folder_was_taken_for(self, tmp_path, caplog):
        open_images(filled(tmp_path, "bus/0.png", "train/0.png"))
        assert f"{tmp_path}: train is taken for a class, as bus is" in caplog.text

    def test_within_the_parts_of_a_data_set(self, tmp_path):
        names = [f"{part}/{name}/0.png" for part in ("train", "test") for name in ("bus", "train")]
        for split in ("calibration", "test"):
            assert open_images(filled(tmp_path, *names), split=split).classes == ["bus", "train"]

    @pytest.mark.parametrize(
        "files",
        [
            ("train/a/0.png", "masks/0.png"),  # a part with classes
            ("train/0.png", "test/0.png", "masks/0.png"),
            ("train/0.png", "masks/a/0.png"),
            ("train/0.png", "0.png"),
        ],
    )
    def test_what_may_be_a_part_beside_something_is_refused(self, tmp_path, files):
        with pytest.raises(GrailError, match="the name of a part of a data set: take it out or name the sub-folder"):
            open_images(filled(tmp_path, *files))
