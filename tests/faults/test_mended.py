"""What the cases of this folder found in checkpoints, text and records, each by itself."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import grail
from grail.calibration import load_calibration
from grail.calibration.captions import _read
from grail.calibration.sources import documents
from grail.calibration.tokenizer import load_tokenizer
from grail.checkpoint.journal import Journal
from grail.checkpoint.reader import INDEX, SINGLE, SafetensorsFolder, read_header
from grail.documents import LARGEST, read_json
from grail.errors import LONGEST, GrailError
from grail.families import open_family
from tests.faults.test_records import flags, home, interrupted, line_of, quick  # noqa: F401 - fixtures
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer

TWO = {"a": [0, 8], "b": [8, 16]}


def write(file: Path, header: bytes, data: bytes = bytes(16)) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def entries(**offsets: list[int]) -> dict:
    return {name: {"dtype": "F32", "shape": [2], "data_offsets": given} for name, given in offsets.items()}


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)


def change(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class TestSafetensors:
    def test_the_sound_one(self, tmp_path):
        assert set(read_header(write(tmp_path / SINGLE, json.dumps(entries(**TWO)).encode()))) == {"a", "b"}

    @pytest.mark.parametrize(
        ("offsets", "data", "said"),
        [
            ({"a": [0, 8], "b": [4, 12]}, 12, "b does not begin"),
            ({"a": [0, 8], "b": [0, 8]}, 8, "b does not begin"),
            ({"a": [0, 8], "b": [12, 20]}, 20, "b does not begin"),
            ({"a": [4, 12]}, 12, "a does not begin"),
            ({"a": [0, 8]}, 11, "3 bytes behind"),
        ],
        ids=["overlap", "the-same", "gap", "gap-in-front", "tail"],
    )
    def test_a_byte_is_in_one_tensor(self, tmp_path, offsets, data, said):
        file = write(tmp_path / SINGLE, json.dumps(entries(**offsets)).encode(), bytes(data))
        with pytest.raises(GrailError, match=said) as refusal:
            read_header(file)
        assert str(file) in str(refusal.value)

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
    def test_a_header_is_utf_8(self, tmp_path, encoding):
        with pytest.raises(GrailError, match="not JSON"):
            read_header(write(tmp_path / SINGLE, json.dumps(entries(**TWO)).encode(encoding)))

    @pytest.mark.parametrize("metadata", ["x", 1, [], {"x": 1}, {"x": None}], ids=repr)
    def test_metadata_are_texts(self, tmp_path, metadata):
        header = {"__metadata__": metadata} | entries(**TWO)
        with pytest.raises(GrailError, match="__metadata__"):
            read_header(write(tmp_path / SINGLE, json.dumps(header).encode()))

    @pytest.mark.parametrize("shape", [[2**62, 2**62, 0], [10**30, 0]], ids=repr)
    def test_no_side_is_beyond_torch_where_another_is_none(self, tmp_path, shape):
        header = {"none": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        with pytest.raises(GrailError, match="none"):
            SafetensorsFolder(write(tmp_path / SINGLE, json.dumps(header).encode(), b"")).get("none")

    def test_a_shard_with_a_name_that_no_file_can_have(self, tmp_path):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "x" * 5000}}))
        with pytest.raises(GrailError, match="plain file name"):
            SafetensorsFolder(tmp_path)

    @pytest.mark.parametrize("number", [b"Infinity", b"NaN", b"1e999"])
    def test_numbers_that_other_readers_of_json_refuse(self, tmp_path, number):
        header = json.dumps(entries(a=[0, 8], b=[8, 16])).encode()
        with pytest.raises(GrailError, match="its header is not JSON"):
            read_header(write(tmp_path / "x.safetensors", header.replace(b"{", b'{"also": %b, ' % number, 2)))


class TestFilesThatAreNone:
    """A link in a folder can name a pipe that nobody writes to, or a device that never ends."""

    @pytest.mark.parametrize("how", ["pipe", "device"])
    @pytest.mark.parametrize("read", [read_header, read_json], ids=["safetensors", "json"])
    def test_pipes_and_devices(self, tmp_path, read, how):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "device").symlink_to("/dev/zero")
        with pytest.raises(GrailError, match=how):
            read(tmp_path / how)

    def test_json_beyond_all_size(self, tmp_path):
        with open(tmp_path / "config.json", "wb") as file:
            file.truncate(LARGEST + 1)
        with pytest.raises(GrailError, match="larger"):
            read_json(tmp_path / "config.json")


class TestSentences:
    def test_are_one_line_of_reasonable_length(self):
        assert str(GrailError("a\nb\u2028c\t\x1b[2J\ud800")) == "a b c ?[2J?"
        long = str(GrailError("begin" + "x" * 10**6 + "end"))
        assert len(long) < LONGEST + 10 and long.startswith("begin") and long.endswith("end")

    def test_a_dtype_with_a_line_break(self, tmp_path):
        header = {"x": {"dtype": "a\nb", "shape": [2], "data_offsets": [0, 8]}}
        with pytest.raises(GrailError) as refusal:
            read_header(write(tmp_path / SINGLE, json.dumps(header).encode()))
        assert len(str(refusal.value).splitlines()) == 1


class TestConfig:
    @pytest.mark.parametrize("named", [1, {"x": 1}, [1], "LlamaForCausalLM"], ids=repr)
    def test_architectures_are_a_list_of_names(self, model, named):
        change(model, architectures=named)
        with pytest.raises(GrailError, match=r"config\.json.*architectures"):
            open_family(model)

    @pytest.mark.parametrize("count", [10**9, 10**30, 1e300])
    @pytest.mark.parametrize("field", ["num_hidden_layers", "num_labels"])
    def test_counts_beyond_all_memory(self, model, field, count):
        change(model, **{field: count})
        with pytest.raises(GrailError, match=rf"config\.json: {field}"):
            open_family(model)

    @pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
    def test_kernels_of_the_hub_are_not_carried_on(self, model, tmp_path, reopen_here, field):
        change(model, **{field: "owner/name"})
        calibration = tiny_calibration(tmp_path / "calibration.safetensors")
        grail.compress(model, output=tmp_path / "out", method="mag-sp", calibration=str(calibration), eval="none")
        assert "owner/name" not in (tmp_path / "out" / "config.json").read_text()


class TestText:
    def test_weights_whose_sum_is_beyond_float32(self, tmp_path):
        file = tmp_path / "ids.safetensors"
        save_file({"input_ids": torch.ones(8, 16, dtype=torch.int64), "weights": torch.full((8, 16), 3e38)}, file)
        found = load_calibration(str(file), lambda: None, 64, samples=8, seq_len=None, seed=0)
        assert torch.allclose(found.weights, torch.ones(8, 16))

    @pytest.mark.parametrize("read", [lambda file: list(documents(str(file), "all")), lambda file: _read(file)])
    def test_half_a_character_in_a_record(self, tmp_path, read):
        (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b"}')
        with pytest.raises(GrailError, match=r"x\.jsonl, line 1.*half a character"):
            read(tmp_path / "x.jsonl")

    @pytest.mark.parametrize("read", [lambda file: list(documents(str(file), "all")), lambda file: _read(file)])
    def test_a_record_nested_beyond_what_can_be_read(self, tmp_path, read):
        (tmp_path / "x.jsonl").write_text("[" * 100_000 + "]" * 100_000)
        with pytest.raises(GrailError, match=r"x\.jsonl, line 1"):
            read(tmp_path / "x.jsonl")

    def test_captions_are_stripped_in_either_kind_of_file(self, tmp_path):
        (tmp_path / "c.txt").write_text(" a drawing \n")
        (tmp_path / "c.jsonl").write_text('{"text": " a drawing "}\n')
        assert _read(tmp_path / "c.txt") == _read(tmp_path / "c.jsonl") == ["a drawing"]

    @pytest.mark.parametrize("name", ["captions.txt", "captions.jsonl"])
    def test_captions_without_an_end(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        with pytest.raises(GrailError, match=rf"{name} is a device or a pipe"):
            _read(tmp_path / name)

    def test_a_tokenizer_that_opens_and_does_not_work(self, model):
        file = tiny_tokenizer(model) / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "512"}))
        with pytest.raises(GrailError, match="no usable tokenizer"):
            load_tokenizer(model)


class TestJournal:
    """A line whose checksum is right and that says what no run says."""

    def test_nested_beyond_all_depth(self, tmp_path):
        (tmp_path / "journal").write_bytes(line_of(b'{"step":' + b"[" * 10**5 + b"]" * 10**5 + b"}"))
        assert Journal(tmp_path / "journal").steps == []

    @pytest.mark.parametrize("step", [b"{}", b'{"step":1}', b'{"step":"shard","file":["x"]}'], ids=str)
    def test_no_step(self, tmp_path, step):
        text = b'{"x":1,' + step[1:] if step != b"{}" else b'{"x":1}'
        (tmp_path / "journal").write_bytes(b'{"sum": %d, %b\n' % (zlib.crc32(text), text[1:]))
        assert Journal(tmp_path / "journal").steps == []

    @pytest.mark.parametrize(
        ("line", "place", "value"),
        [
            (0, ("identity",), False),
            (0, ("identity", "recipe"), 0.5),
            (0, ("chunk_tokens",), 10**12),
            (0, ("threads",), 10**9),
            (1, ("file",), "../../model/model.safetensors"),
            (1, ("crc32",), None),
            (1, ("tensors", "model.norm.weight"), " "),
            (1, ("sites",), False),
            (1, ("sites", 0, "site"), "x"),
            (1, ("sites", 0, "kept"), ["x"]),
            (1, ("sites", 0, "kept"), [10**30]),
            (1, ("sites", 0, "width"), 10**12),
            (1, ("sites", 0, "figures", "x"), 1),
            (1, ("sites", 0, "figures", "error_after"), "x"),
            (1, ("sites", 0, "figures", "sweeps"), 1e308),
        ],
        ids=str,
    )
    def test_what_no_run_says(self, interrupted, line, place, value):  # noqa: F811
        case = interrupted.with_name("case")
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(interrupted, case)
        journal = case / "small.partial" / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        step = json.loads(lines[line])
        step.pop("sum")
        inner = step
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        lines[line] = line_of(json.dumps(step).encode())
        journal.write_bytes(b"".join(lines))
        if place in (("file",), ("crc32",)):  # the file is not what was written: all is done again
            with quick():
                grail.compress(case / "model", output=case / "small", resume=True, **flags(case))
            assert "../" not in (case / "small" / INDEX).read_text()
        else:
            with quick(), pytest.raises(GrailError, match=r"--resume"):
                grail.compress(case / "model", output=case / "small", resume=True, **flags(case))
