"""The writer: files that safetensors itself reads, a locked working folder, and nothing left behind by an error."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grail.checkpoint.pieces import Piece
from grail.checkpoint.reader import DTYPES, INDEX, SafetensorsFolder
from grail.checkpoint.writer import OutputFolder
from grail.errors import Circumstance, GrailError

SHARD = "model-00001-of-00001.safetensors"


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    return torch.randint(top, (count,), dtype=torch.uint8).view(dtype).view(shape)


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with OutputFolder(folder) as out:
        out.write_shard(SHARD, [Piece.of(name, tensor) for name, tensor in tensors.items()])
        out.write_index()
        return out.finish()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_safetensors_reads_what_was_written(tmp_path, dtype):
    shapes = {"matrix": (3, 5), "scalar": (), "empty": (0,), "no_columns": (4, 0), "odd": (7,), "cube": (2, 3, 4)}
    tensors = {name: bits(dtype, *shape) for name, shape in shapes.items()}
    found = load_file(written(tmp_path / "out", tensors) / SHARD)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def test_views_and_parameters_are_written_by_value(tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "transposed": base.T,
        "columns": base[:, ::2],
        "expanded": base[:1].expand(5, 8),
        "parameter": torch.nn.Parameter(base),
    }
    found = load_file(written(tmp_path / "out", tensors) / SHARD)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_pieces_streamed_from_a_reader_are_copied_byte_for_byte(tmp_path):
    tensors = {name: bits(torch.bfloat16, *shape) for name, shape in {"a": (9, 7), "b": (), "c": (0, 3)}.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    with OutputFolder(tmp_path / "out") as out:
        infos = {name: source.info(name) for name in source.names()}
        pieces = [Piece(name, info.dtype, info.shape, source.chunks(name, 5)) for name, info in infos.items()]
        out.write_shard(SHARD, pieces)
        found = load_file(out.partial / SHARD)
    assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(t) for name, t in tensors.items()}


def test_the_header_is_aligned_and_marked_for_torch(tmp_path):
    for name in ("x", "xx", "a.longer.name", "größe"):
        file = written(tmp_path / name, {name: torch.ones(3)}) / SHARD
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}
        assert torch.equal(load_file(file)[name], torch.ones(3))


def test_shards_and_index_agree(tmp_path):
    with OutputFolder(tmp_path / "out") as out:
        out.write_shard("model-00001-of-00002.safetensors", [Piece.of("b", torch.ones(2, 3).half())])
        out.write_shard(
            "model-00002-of-00002.safetensors", [Piece.of("a", torch.zeros(5)), Piece.of("s", torch.tensor(1))]
        )
        out.write_index()
        steps = (out.partial / "journal.jsonl").read_text().splitlines()
        assert [json.loads(line)["file"] for line in steps] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        path = out.finish()
    index = json.loads((path / INDEX).read_text())
    assert list(index["weight_map"]) == ["a", "b", "s"]
    assert index["metadata"] == {"total_size": 12 + 20 + 8, "total_parameters": 6 + 5 + 1}
    for name, file in index["weight_map"].items():
        assert name in load_file(path / file)
    assert sorted(SafetensorsFolder(path).names()) == ["a", "b", "s"]


def test_finish_renames_and_drops_the_working_files(tmp_path):
    with OutputFolder(tmp_path / "deep" / "er" / "out") as out:
        assert out.partial.name == "out.partial" and out.partial.is_dir() and not out.path.exists()
        out.write_shard(SHARD, [Piece.of("x", torch.ones(1))])
        out.write_json("config.json", {"größe": 1})
        out.write_index()
        path = out.finish()
    assert path == tmp_path / "deep" / "er" / "out"
    assert sorted(file.name for file in path.iterdir()) == sorted([SHARD, "config.json", INDEX])
    assert not out.partial.exists()
    assert json.loads((path / "config.json").read_text(encoding="utf-8")) == {"größe": 1}


def test_an_empty_folder_may_be_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    assert (written(tmp_path / "out", {"x": torch.ones(1)}) / SHARD).exists()


def test_relative_paths_hold_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with OutputFolder("out") as out:
        monkeypatch.chdir(tmp_path / "elsewhere")
        out.write_shard(SHARD, [Piece.of("x", torch.ones(1))])
        out.finish()
    assert (tmp_path / "out" / SHARD).exists()


@pytest.mark.parametrize(
    "error", [GrailError("bad"), RuntimeError("bug"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), OutputFolder(tmp_path / "out") as out:
        out.write_shard(SHARD, [Piece.of("x", torch.ones(1))])
        (out.partial / "folder").mkdir()
        raise error
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_the_output_that_was_to_be_replaced(tmp_path):
    old = written(tmp_path / "out", {"x": torch.ones(1)})
    with pytest.raises(RuntimeError), OutputFolder(old, overwrite=True) as out:
        out.write_shard(SHARD, [Piece.of("x", torch.zeros(1))])
        raise RuntimeError
    assert load_file(old / SHARD)["x"].item() == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_was_replaced_and_cannot_be_taken_away_is_told(tmp_path, monkeypatch):
    """The new output is whole then; nobody is left to guess whose the old files in it are."""
    from grail.checkpoint import writer

    old = written(tmp_path / "out", {"x": torch.ones(1)})
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    told = r"is finished, but .*replaced cannot be taken away"
    with pytest.raises(Circumstance, match=told), OutputFolder(old, overwrite=True) as out:
        out.write_shard(SHARD, [Piece.of("x", torch.zeros(1))])
        out.finish()
    assert load_file(old / SHARD)["x"].item() == 0
    assert load_file(old / writer.REPLACED / SHARD)["x"].item() == 1


@pytest.mark.parametrize("keep", [True, False])
def test_an_output_that_cannot_be_given_its_place_again_is_kept_and_told(tmp_path, monkeypatch, keep):
    """The disk allows no rename any more between the two of finish()."""
    from grail.checkpoint import writer

    rename = os.replace

    def refused(source, target):
        if Path(target) == tmp_path / "out":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))
        rename(source, target)

    old = written(tmp_path / "out", {"x": torch.ones(1)})
    monkeypatch.setattr(writer.os, "replace", refused)
    told = r"what was in .*out lies in .*out\.partial/replaced until"
    with pytest.raises(Circumstance, match=told), OutputFolder(old, overwrite=True, keep=keep) as out:
        out.write_shard(SHARD, [Piece.of("x", torch.zeros(1))])
        out.finish()
    assert load_file(tmp_path / "out.partial" / writer.REPLACED / SHARD)["x"].item() == 1
    monkeypatch.setattr(writer.os, "replace", rename)
    with OutputFolder(old, overwrite=True, resume=True):
        assert load_file(old / SHARD)["x"].item() == 1


def test_a_shard_whose_data_cannot_be_had_is_not_committed(tmp_path):
    def chunks():
        yield torch.zeros(4, dtype=torch.uint8)
        raise GrailError("the source ended early")

    with OutputFolder(tmp_path / "out") as out:
        with pytest.raises(GrailError, match="ended early"):
            out.write_shard(SHARD, [Piece("x", torch.float32, (2,), chunks())])
        assert not (out.partial / SHARD).exists()
        assert not out.weight_map and not (out.partial / "journal.jsonl").exists()


def test_json_that_no_strict_reader_takes_is_not_written(tmp_path):
    with OutputFolder(tmp_path / "out") as out:
        with pytest.raises(ValueError):
            out.write_json("grail.json", {"error": float("nan")})
        assert not (out.partial / "grail.json").exists()


def test_overwrite_replaces_everything(tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "old.txt").write_text("old")
    (tmp_path / "out" / "config.json").write_text("{}")
    with OutputFolder(tmp_path / "out", overwrite=True) as out:
        assert (tmp_path / "out" / "sub" / "old.txt").exists(), "the old one stays until the new one is whole"
        out.write_shard(SHARD, [Piece.of("x", torch.ones(1))])
        out.finish()
    assert [file.name for file in (tmp_path / "out").iterdir()] == [SHARD]


def test_overwrite_never_deletes_a_folder_without_a_model(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(GrailError, match="holds no model"):
        OutputFolder(tmp_path / "home", overwrite=True).check()
    assert (tmp_path / "home" / "letter.txt").exists()


def test_a_folder_in_the_way_of_the_working_folder_is_left_alone(tmp_path):
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "precious.txt").write_text("mine")
    with pytest.raises(GrailError, match="in the way"):
        OutputFolder(tmp_path / "data").check()
    assert (tmp_path / "data.partial" / "precious.txt").exists()


def test_a_non_empty_output_is_refused_and_untouched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for enter in (OutputFolder(tmp_path / "out").check, OutputFolder(tmp_path / "out").__enter__):
        with pytest.raises(GrailError, match="--overwrite"):
            enter()
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_file_is_refused(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(GrailError, match="is a file"):
        OutputFolder(tmp_path / "out", overwrite=overwrite).check()
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("place", ["under-a-file", "partial-is-a-file"])
def test_an_output_that_cannot_be_made_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "out.partial").write_text("")
    path = tmp_path / "file" / "out" if place == "under-a-file" else tmp_path / "out"
    with pytest.raises(GrailError) as refusal, OutputFolder(path):
        pass
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["to-an-empty-folder", "to-a-full-folder", "dangling"])
def test_an_output_that_is_a_link_is_refused_before_work_or_works(tmp_path, kind):
    target = tmp_path / "disk"
    if kind != "dangling":
        target.mkdir()
    if kind == "to-a-full-folder":
        (target / "old.txt").write_text("old")
    (tmp_path / "out").symlink_to(target, target_is_directory=True)
    out = OutputFolder(tmp_path / "out", overwrite=kind == "to-a-full-folder")
    try:
        out.check()
    except GrailError as refusal:
        assert "out" in str(refusal)  # said at once: fine
        return
    with out:
        out.write_shard(SHARD, [Piece.of("x", torch.ones(1))])
        out.finish()
    assert load_file(tmp_path / "out" / SHARD)["x"].item() == 1


def test_one_run_at_a_time(tmp_path):
    with OutputFolder(tmp_path / "out") as first:
        first.write_shard(SHARD, [Piece.of("x", torch.ones(1))])
        with pytest.raises(GrailError, match="another run"), OutputFolder(tmp_path / "out"):
            pytest.fail("two runs in one folder")
        assert load_file(first.partial / SHARD)["x"].item() == 1, "the second run touched the first one's files"
        with OutputFolder(tmp_path / "other"):
            pass
        first.finish()
    with OutputFolder(tmp_path / "out", overwrite=True):
        pass


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "out"):
        raise RuntimeError
    with OutputFolder(tmp_path / "out") as out:
        assert out.partial.is_dir()


def test_what_a_killed_run_left_is_cleared(tmp_path):
    left = tmp_path / "out.partial"
    (left / "pruned").mkdir(parents=True)
    (left / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (left / "journal.jsonl").write_text('{"step": "shard"}\n')
    path = written(tmp_path / "out", {"x": torch.ones(1)})
    assert sorted(file.name for file in path.iterdir()) == sorted([SHARD, INDEX])


def test_tokenizer_and_licence_are_carried_over_and_code_and_weights_are_not(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    carried = [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE",
        "qwen.tiktoken",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "model.safetensors", "modeling_llama.py", "optimizer.pt", "config.json", "tokenizer.py",
        "tokenizer_own.PY", "vocab.py", "vocab.pkl", "chat_template.py", "LICENSE.py", "NOTICE.so", "tokenizer",
    ]  # fmt: skip
    for name in [*carried, *left, "additional_chat_templates/tools.jinja", "additional_chat_templates/tools.py"]:
        (source / name).write_text(name)
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "blob").write_text("linked")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("../blob")
    with OutputFolder(tmp_path / "out") as out:
        out.carry_over(source)
        path = out.finish()
    assert sorted(file.name for file in path.iterdir()) == sorted([*carried, "additional_chat_templates"])
    assert (path / "tokenizer.json").read_text() == "linked" and not (path / "tokenizer.json").is_symlink()
    assert [file.name for file in (path / "additional_chat_templates").iterdir()] == ["tools.jinja"]
    assert (path / "tokenizer_config.json").read_text() == '{"eos_token": "</s>"}'


def test_a_name_that_is_no_utf_8(tmp_path):
    out = OutputFolder(os.fsdecode(os.fsencode(tmp_path) + b"/out\xff"))
    with pytest.raises(GrailError, match="UTF-8"):
        out.check()
