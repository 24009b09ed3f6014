"""The safetensors reader: bytes as they are, and one clear sentence for a file that is not sound."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grail.checkpoint.reader import DTYPES, INDEX, SINGLE, SafetensorsFolder, read_header, read_json
from grail.errors import GrailError
from tests.tiny import tiny_checkpoint


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits of any dtype: NaN payloads and subnormals are among them."""
    if dtype == torch.bool:
        return torch.randint(2, shape).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def write_raw(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header (bytes are taken as they are) and, if given, a header length that lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one_line(refusal: pytest.ExceptionInfo) -> str:
    message = str(refusal.value)
    assert message and "\n" not in message, message
    return message


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tiny_checkpoint(tmp_path / "sharded", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (4, 0), (2, 3, 4)], ids=["matrix", "scalar", "empty", "4x0", "3d"])
def test_every_dtype_comes_back_byte_for_byte(tmp_path, dtype, shape):
    tensor = random_tensor(dtype, *shape)
    save_file({"first": random_tensor(torch.uint8, 3), "x": tensor}, tmp_path / SINGLE)
    source = SafetensorsFolder(tmp_path)
    info, found = source.info("x"), source.get("x")
    assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, tensor.numel() * dtype.itemsize)
    assert (found.dtype, tuple(found.shape)) == (dtype, shape)
    assert raw(found) == raw(tensor)


def test_names_are_those_of_the_file_and_absent_ones_are_named(tmp_path):
    save_file({"b": torch.ones(2), "a": torch.zeros(3)}, tmp_path / SINGLE, metadata={"format": "pt"})
    source = SafetensorsFolder(tmp_path)
    assert sorted(source.names()) == ["a", "b"]
    assert "a" in source and "c" not in source and "__metadata__" not in source
    for read in (source.info, source.get, lambda name: source.rows(name, torch.tensor([0]))):
        with pytest.raises(GrailError, match=r"model\.layers\.7\.weight"):
            read("model.layers.7.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (7,), (7, 2, 3)], ids=["matrix", "vector", "3d"])
@pytest.mark.parametrize("index", [[0], [6, 0, 3], [2, 2, 2], [], list(range(7))], ids=str)
def test_rows(tmp_path, dtype, shape, index):
    tensor = random_tensor(dtype, *shape)
    save_file({"other": torch.ones(9), "x": tensor}, tmp_path / SINGLE)
    wanted = torch.tensor(index, dtype=torch.int64)
    found = SafetensorsFolder(tmp_path).rows("x", wanted)
    assert (found.dtype, tuple(found.shape)) == (dtype, (len(index), *shape[1:]))
    assert raw(found) == b"".join(raw(tensor[i]) for i in index)


@pytest.mark.parametrize("index", [[7], [0, 10**6], [-1]], ids=str)
def test_a_row_that_is_not_there_is_never_a_neighbours_bytes(tmp_path, index):
    save_file({"a": torch.ones(9, 5), "x": torch.zeros(7, 5), "y": torch.ones(9, 5)}, tmp_path / SINGLE)
    with pytest.raises((IndexError, GrailError)):
        SafetensorsFolder(tmp_path).rows("x", torch.tensor(index))


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_chunks_join_to_the_tensors_bytes(tmp_path, size):
    tensor = random_tensor(torch.bfloat16, 9, 11)
    save_file({"before": torch.ones(4), "x": tensor, "zero": torch.ones(0)}, tmp_path / SINGLE)
    source = SafetensorsFolder(tmp_path)
    chunks = list(source.chunks("x", size))
    assert all(chunk.dtype == torch.uint8 and 0 < len(chunk) <= size for chunk in chunks)
    assert b"".join(map(raw, chunks)) == raw(tensor)
    assert b"".join(map(raw, source.chunks("zero", size))) == b""


def test_single_file_folder_and_shards_hold_the_same(tmp_path, sharded):
    single = tiny_checkpoint(tmp_path / "single")
    expected = load_file(single / SINGLE)
    for path in (single, single / SINGLE, sharded, str(sharded)):
        source = SafetensorsFolder(path)
        assert sorted(source.names()) == sorted(expected)
        assert all(raw(source.get(name)) == raw(tensor) for name, tensor in expected.items())


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path):
    save_file({"x": torch.zeros(2), "y": torch.zeros(2)}, tmp_path / "old.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "new.safetensors")
    weight_map = {"x": "new.safetensors", "y": "old.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    source = SafetensorsFolder(tmp_path)
    assert sorted(source.names()) == ["x", "y"]
    assert source.get("x").tolist() == [1, 1] and source.info("x").file.name == "new.safetensors"


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_links_as_in_the_hub_cache_are_followed(tmp_path, sharded, relative):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0f1e2d"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        target = Path("../../blobs") if relative else blobs
        (snapshot / file.name).symlink_to(target / f"{number:040x}")
    (tmp_path / "link").symlink_to(snapshot, target_is_directory=True)
    plain = SafetensorsFolder(sharded)
    for path in (snapshot, tmp_path / "link"):
        linked = SafetensorsFolder(path)
        assert linked.names() == plain.names()
        assert all(raw(linked.get(name)) == raw(plain.get(name)) for name in plain.names())
        assert linked.sha256() == plain.sha256()


def test_sha256_is_of_the_content_and_not_of_the_place(tmp_path, sharded):
    first = SafetensorsFolder(sharded).sha256()
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    assert SafetensorsFolder(copy).sha256() == first
    file = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert SafetensorsFolder(copy).sha256() != first


TWO = bytes(8)
BAD_FILES = {
    "no-bytes": lambda f: f.write_bytes(b""),
    "five-bytes": lambda f: f.write_bytes(b"12345"),
    "header-length-absurd": lambda f: write_raw(f, {"x": entry()}, TWO, length=2**62),
    "header-length-all-ones": lambda f: write_raw(f, {"x": entry()}, TWO, length=2**64 - 1),
    "header-length-past-the-end": lambda f: write_raw(f, {"x": entry()}, TWO, length=10**4),
    "header-length-zero": lambda f: write_raw(f, {"x": entry()}, TWO, length=0),
    "header-cut": lambda f: write_raw(f, {"x": entry()}, TWO, length=10),
    "header-not-json": lambda f: write_raw(f, b"PK\x03\x04 not a header"),
    "header-not-utf8": lambda f: write_raw(f, b'{"\xff\xfe": 1}'),
    "header-nested-too-deep": lambda f: write_raw(f, b"[" * 200_000),
    "header-a-list": lambda f: write_raw(f, [entry()], TWO),
    "header-a-string": lambda f: write_raw(f, "header", TWO),
    "header-null": lambda f: write_raw(f, None, TWO),
    "a-pickle": lambda f: f.write_bytes(pickle.dumps({"x": [1, 2, 3]}, protocol=2)),
    "an-html-page": lambda f: f.write_text("<!doctype html><html><body>Sign in</body></html>" * 20),
    "a-git-lfs-pointer": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
    "data-truncated": lambda f: write_raw(f, {"x": entry()}, bytes(7)),
    "data-missing": lambda f: write_raw(f, {"x": entry()}),
    "a-folder": lambda f: f.mkdir(),
}


@pytest.mark.parametrize("damage", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_not_sound_is_named(tmp_path, damage):
    damage(tmp_path / SINGLE)
    with pytest.raises(GrailError) as refusal:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path / SINGLE) in one_line(refusal)


BAD_ENTRIES = {
    "offset-negative": entry(offsets=(-8, 0)),
    "offsets-reversed": entry(offsets=(8, 0)),
    "offsets-too-near": entry(offsets=(0, 4)),
    "offsets-too-far": entry(offsets=(0, 16)),
    "offsets-past-the-end": entry(offsets=(64, 72)),
    "offsets-float": entry(offsets=(0, 8.0)),
    "offsets-huge": entry(offsets=(2**70, 2**70 + 8)),
    "offsets-three": entry(offsets=(0, 8, 16)),
    "offsets-none": {"dtype": "F32", "shape": [2]},
    "shape-negative": entry(shape=(-2, -1)),
    "shape-float": entry(shape=(2.0,)),
    "shape-bool": entry(shape=(True, 2)),
    "shape-text": entry() | {"shape": "2"},
    "shape-null": entry() | {"shape": None},
    "shape-overflowing": entry(shape=(2**62, 2**62)),
    "dtype-unknown": entry(dtype="F31"),
    "dtype-number": entry(dtype=32),
    "dtype-list": entry(dtype=["F32"]),
    "dtype-none": {"shape": [2], "data_offsets": [0, 8]},
    "a-list": [0, 8],
    "a-number": 8,
    "null": None,
    "empty": {},
}


@pytest.mark.parametrize("bad", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_header_entry_that_is_not_sound_is_named_with_its_file(tmp_path, bad):
    file = write_raw(tmp_path / SINGLE, {"fine": entry(), "model.norm.weight": bad}, TWO)
    with pytest.raises(GrailError) as refusal:
        read_header(file)
    message = one_line(refusal)
    assert str(file) in message and "model.norm.weight" in message


def test_a_truncated_file_says_so_and_what_to_do(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-100])
    with pytest.raises(GrailError, match=r"truncated.*again"):
        SafetensorsFolder(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / SINGLE)
    source = SafetensorsFolder(tmp_path)
    with open(tmp_path / SINGLE, "r+b") as file:
        file.truncate(200)
    for read in (
        source.get,
        lambda name: list(source.chunks(name)),
        lambda name: source.rows(name, torch.tensor([99])),
    ):
        with pytest.raises(GrailError, match=SINGLE):
            read("x")


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "target",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "",
        ".",
        "..",
        "x\0y",
        7,
        None,
        ["a"],
        {},
    ],
    ids=repr,
)
def test_an_index_entry_that_is_not_a_plain_file_name_is_refused(tmp_path, target):
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub"):
        shutil.copy(tmp_path / "x.safetensors", place / SHARD)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"y": SHARD, "the.tensor": target}}))
    with pytest.raises(GrailError) as refusal:
        SafetensorsFolder(folder)
    message = one_line(refusal)
    assert INDEX in message and "the.tensor" in message and "plain file name" in message


BAD_INDEXES = {
    "not-json": "{",
    "empty-file": "",
    "a-list": "[]",
    "no-weight-map": '{"metadata": {}}',
    "weight-map-empty": '{"weight_map": {}}',
    "weight-map-a-list": '{"weight_map": ["x"]}',
    "weight-map-null": '{"weight_map": null}',
}


@pytest.mark.parametrize("text", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_unusable_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(GrailError) as refusal:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path / INDEX) in one_line(refusal)


@pytest.mark.parametrize("how", ["absent", "dangling-link", "a-folder"])
def test_a_shard_that_the_index_lists_and_the_folder_lacks_is_named(sharded, how):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    if how == "dangling-link":
        shard.symlink_to("nowhere")
    elif how == "a-folder":
        shard.mkdir()
    with pytest.raises(GrailError) as refusal:
        SafetensorsFolder(sharded)
    assert shard.name in one_line(refusal)


def test_a_tensor_that_is_not_in_the_shard_the_index_says_is_named(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / SHARD)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": SHARD, "model.norm.weight": SHARD}}))
    with pytest.raises(GrailError) as refusal:
        SafetensorsFolder(tmp_path)
    message = one_line(refusal)
    assert "model.norm.weight" in message and SHARD in message


class Bomb:
    """Unpickling this writes a file: proof that somebody opened the pickle."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.write_text, (self.mark, "unpickled"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_a_pickled_checkpoint_is_refused_and_never_opened(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(GrailError) as refusal:
        SafetensorsFolder(folder)
    message = one_line(refusal)
    assert name in message and "pickle" in message and "safetensors" in message
    assert not (tmp_path / "mark").exists()


def test_an_index_that_points_at_a_pickle_never_opens_it(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    with pytest.raises(GrailError, match=r"pytorch_model\.bin"):
        SafetensorsFolder(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(GrailError) as refusal:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path) in one_line(refusal) and SINGLE in str(refusal.value)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[1]", b"null", b'"x"', b"\xff\xfe{}", b"[" * 200_000], ids=lambda c: repr(c[:4])
)
def test_read_json_names_the_file(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(GrailError) as refusal:
        read_json(file)
    assert str(file) in one_line(refusal)
