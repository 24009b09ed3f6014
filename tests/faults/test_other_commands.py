"""What the commands beside compress are given: captions, checkpoints for a soup, results to export and to push."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import grail
from grail.calibration.captions import captions
from grail.documents import read_json
from grail.serving.gguf import export_gguf
from grail.serving.push import push
from grail.soup.run import soup
from tests.faults.mutators import HOSTILE, damaged, mangled, misencoded, rendered
from tests.faults.series import Series
from tests.test_gguf_export import byte_level, with_tokenizer
from tests.tiny import tiny_calibration, tiny_checkpoint

CAPTIONS = [f"a drawing of the number {n} on paper" for n in range(12)]
VOCABULARY = 400


def as_ids(texts: list[str]) -> Tensor:
    """A tokenizer: the lengths of the words of each text, eight at most."""
    found = torch.zeros(len(texts), 8, dtype=torch.int64)
    for row, text in zip(found, texts, strict=True):
        assert isinstance(text, str) and text.strip() == text and text
        text.encode()  # what no tokenizer could take raises here
        lengths = [len(word) for word in text.split()][:8]
        row[: len(lengths)] = torch.tensor(lengths)
    return found


def read_captions(file: Path) -> Tensor:
    batches, told = captions(str(file), as_ids, samples=8, seed=0, batch=3)
    ids = torch.cat(batches)
    assert told["captions"] == len(ids) and ids.shape[1] == told["length"] == 8
    return ids


def test_captions(tmp_path):
    with Series("captions", tmp_path) as series:
        for chance in series.seeds(120):
            case = series.folder()
            if chance.random() < 0.4:
                file = case / "captions.txt"
                how, content = misencoded("\n".join(CAPTIONS), chance)
            else:
                file, at = case / "captions.jsonl", chance.randrange(len(CAPTIONS))
                lines = [{chance.choice(("text", "caption")): text, "id": i} for i, text in enumerate(CAPTIONS)]
                spoil = mangled if chance.random() < 0.6 else lambda line, chance: misencoded(json.dumps(line), chance)
                how, changed = spoil(lines[at], chance)
                content = b"\n".join(rendered(line) if i != at else changed for i, line in enumerate(lines))
            file.write_bytes(content)
            if chance.random() < 0.1:
                how = endless(file, chance)
            series.case(f"{file.name} {how}", partial(read_captions, file), case, names=[file.name])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two checkpoints of one architecture as folders and as files, and a compressed one with words of its own."""
    home = tmp_path_factory.mktemp("beside")
    options = {"num_key_value_heads": 6, "vocab_size": VOCABULARY, "num_hidden_layers": 1}
    for name in ("one", "two"):
        with_tokenizer(tiny_checkpoint(home / name, **options), byte_level())
    tensors = load_file(home / "two" / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()}, home / "two" / "model.safetensors", {"format": "pt"}
    )
    for name in ("one", "two"):
        shutil.copy(home / name / "model.safetensors", home / f"{name}.safetensors")
    data = tiny_calibration(home / "data.safetensors")
    asked = {"attn_ratio": 0.34, "mlp_ratio": 0.3, "calibration": str(data), "eval": "none"}
    grail.compress(str(home / "one"), output=str(home / "small"), **asked)
    return home


def averaged(inputs: list[Path], output: Path) -> None:
    """A soup, held against what the library reads and averages."""
    soup([str(path) for path in inputs], str(output))
    file = output / "model.safetensors" if output.is_dir() else output
    found, given = (
        load_file(file),
        [load_file(path / "model.safetensors" if path.is_dir() else path) for path in inputs],
    )
    assert found.keys() == given[0].keys() == given[1].keys()
    for name, tensor in found.items():
        wanted = (given[0][name].double() + given[1][name].double()) / 2
        assert torch.allclose(tensor.double(), wanted.to(tensor.dtype).double(), equal_nan=True), f"{name} is no mean"


def spoil_json(file: Path, chance: Random, hostile: tuple[Any, ...] = HOSTILE) -> str:
    how, content = mangled(json.loads(file.read_text()), chance, hostile)
    file.write_bytes(content)
    return f"{file.name} {how}"


def spoil_bytes(file: Path, chance: Random) -> str:
    how, content = damaged(file.read_bytes(), chance, chance.choice((8, 2000, None)))
    file.write_bytes(content)
    return f"{file.name} {how}"


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_soups(home, tmp_path, kind):
    with Series(f"soup of {kind}", tmp_path, home) as series:
        for chance in series.seeds(40):
            case = series.folder()
            which = chance.choice(("one", "two"))
            inputs = [case / (f"{name}.safetensors" if kind == "files" else name) for name in ("one", "two")]
            output = case / ("out.safetensors" if kind == "files" else "out")
            if kind == "files":
                how = spoil_bytes(case / f"{which}.safetensors", chance)
            elif chance.random() < 0.2:
                how = endless(case / which / chance.choice(("tokenizer.json", "tokenizer_config.json")), chance)
            elif chance.random() < 0.6:
                how = spoil_json(case / which / chance.choice(("config.json", "tokenizer_config.json")), chance)
            else:
                how = spoil_bytes(case / which / "model.safetensors", chance)
            run = partial(averaged, inputs, output)
            series.case(f"{which}: {how}", run, case, names=[*map(str, inputs)], output=output)


EXPORTED = (
    "config.json",
    "tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "README.md",
)


def exported(case: Path) -> int:
    file = case / "out" / "small.gguf"
    export_gguf(case / "small", file)
    return len(gguf.GGUFReader(file).tensors)


def test_exports(home, tmp_path):
    with Series("export", tmp_path, home) as series:
        for chance in series.seeds(60):
            case = series.folder()
            file = case / "small" / chance.choice(EXPORTED)
            weights = [*(case / "small").glob("*.safetensors")]
            file = chance.choice(weights) if file.suffix == ".safetensors" else file
            if file.suffix == ".json":
                how = spoil_json(file, chance)
            elif file.suffix == ".md":
                how, content = misencoded("---\nlicense: mit\nlanguage: en\nbase_model: a/b\n---\n# x\n", chance)
                file.write_bytes(content)
            else:
                how = spoil_bytes(file, chance)
            names = [str(case / "small"), file.name, "model.layers", "lm_head"]
            series.case(how, partial(exported, case), case, names=names, output=case / "out")


def pushed(case: Path) -> dict:
    """What would be sent."""
    told = push(case / "small", "me/small", dry_run=True)
    assert {"run.json", "journal.jsonl"}.isdisjoint(file["name"] for file in told["files"])
    return told


def test_pushes(home, tmp_path):
    with Series("push", tmp_path, home) as series:
        for chance in series.seeds(60):
            case = series.folder()
            name = chance.choice(("grail.json", "grail.json", "grail.json", "config.json", "README.md", "link", "fifo"))
            file = case / "small" / name
            if file.suffix == ".json":
                how = spoil_json(file, chance)
            elif name == "README.md":
                how, content = misencoded("---\nlicense: mit\nlanguage: en\n---\n# x\n", chance)
                file.write_bytes(content)
            else:
                how = a_pipe(file) if name == "fifo" else a_link(file, chance)
            names = [str(case / "small"), "grail.json", "config.json"]
            ending = series.case(f"{name}: {how}", partial(pushed, case), case, names=names)
            if ending and ending.refused is None:
                sent = {entry["name"] for entry in ending.value["files"]}
                if sent & {"link", "fifo"} and not (file.is_file() and file.resolve().is_relative_to(case / "small")):
                    series.wrong.append(f"{name} {how}: it would be sent")


def a_pipe(file: Path) -> str:
    os.mkfifo(file)
    return "a pipe"


def a_link(file: Path, chance: Random) -> str:
    """To what is no file of the folder, or to one."""
    target = chance.choice(
        ("/etc/passwd", "../one/config.json", "/dev/zero", "nowhere", file.name, "config.json", "..")
    )
    file.symlink_to(target)
    return f"to {target}"


def endless(file: Path, chance: Random) -> str:
    """Something else in a file's place."""
    file.unlink(missing_ok=True)
    how = a_pipe(file) if chance.random() < 0.4 else a_link(file, chance)
    return f"{file.name} {how}"


def test_a_sound_one_of_each_goes_through(home, tmp_path):
    """What is judged above would all be refused otherwise."""
    case = Path(shutil.copytree(home, tmp_path / "case"))
    averaged([case / "one", case / "two"], case / "out")
    averaged([case / "one.safetensors", case / "two.safetensors"], case / "out.safetensors")
    assert exported(case) > 5
    assert {"config.json", "README.md", "grail.json"} <= {file["name"] for file in pushed(case)["files"]}
    assert read_json(case / "small" / "grail.json")["recipe"]["method"] == "wanda-sp"
