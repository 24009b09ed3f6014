"""A sample of every kind through a whole run, in this process and as a command of its own; and nothing is unpickled or
trusted anywhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import grail
from grail import modeling_grail
from grail.checkpoint import reopen
from grail.errors import GrailError
from grail.evaluation.perplexity import logits
from grail.families import open_family
from tests.faults.judge import listing
from tests.faults.mutators import HOSTILE, damaged, mangled, misencoded
from tests.faults.series import Series
from tests.faults.tally import count
from tests.faults.test_records import verified
from tests.killed_runs import small_runs
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = "\n".join(" ".join(f"w{3 + (i * j) % 60}" for i in range(40)) for j in range(40))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    tiny_tokenizer(tiny_checkpoint(home / "model", num_hidden_layers=1))
    (home / "model" / "generation_config.json").write_text('{"max_length": 8}')
    (home / "model" / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (home / "model" / "LICENSE").write_text("MIT")
    (home / "text.txt").write_text(WORDS)
    tiny_calibration(home / "ids.safetensors", windows=4)
    return home


def json_file(name: str) -> Callable[[Path, Random], str]:
    def spoil(case: Path, chance: Random) -> str:
        file = case / "model" / name
        how, content = mangled(json.loads(file.read_text()), chance, HOSTILE)
        file.write_bytes(content)
        return f"{name} {how}"

    return spoil


def weights(case: Path, chance: Random) -> str:
    file = case / "model" / "model.safetensors"
    how, content = damaged(file.read_bytes(), chance)
    file.write_bytes(content)
    return f"weights {how}"


def text(case: Path, chance: Random) -> str:
    how, content = misencoded(WORDS, chance)
    (case / "text.txt").write_bytes(content)
    return f"text {how}"


def token_ids(case: Path, chance: Random) -> str:
    how, content = damaged((case / "ids.safetensors").read_bytes(), chance)
    (case / "ids.safetensors").write_bytes(content)
    return f"ids {how}"


def readme(case: Path, chance: Random) -> str:
    how, content = misencoded("---\nlicense: mit\nlanguage: en\n---\n# x\n", chance)
    (case / "model" / "README.md").write_bytes(content)
    return f"README.md {how}"


def endless(case: Path, chance: Random) -> str:
    name = chance.choice(("README.md", "LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"))
    (case / "model" / name).unlink()
    if chance.random() < 0.5:
        os.mkfifo(case / "model" / name)
    else:
        (case / "model" / name).symlink_to(chance.choice(("/dev/zero", "/dev/null", "nowhere", name, "/etc")))
    return f"{name} is no file"


SPOILT = {
    "config": json_file("config.json"), "tokenizer": json_file("tokenizer.json"), "weights": weights, "text": text,
    "tokenizer config": json_file("tokenizer_config.json"), "generation": json_file("generation_config.json"),
    "ids": token_ids, "readme": readme, "endless": endless,
}  # fmt: skip


def compressed(case: Path, calibration: str) -> dict[str, tuple]:
    """A whole run; every tensor that is written, which has to be what the library reads."""

    def opened(folder: Path, probe: torch.Tensor, wanted: torch.Tensor, *args: Any, **kwargs: Any) -> dict:
        found = logits(open_family(folder), probe)
        assert torch.allclose(found, wanted.float(), rtol=1e-3, atol=1e-3), "the result gives other logits"
        return verified()

    before, reopen.verify = reopen.verify, opened
    options = {"method": "wanda-sp", "ratio": 0.3, "samples": 4, "seq_len": 16, "eval": "none"}
    try:
        with small_runs():
            grail.compress(case / "model", output=case / "out", calibration=str(case / calibration), **options)
    finally:
        reopen.verify = before
    written = {name: t for file in (case / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    source = load_file(case / "model" / "model.safetensors")
    assert written.keys() == source.keys()
    for name, tensor in written.items():
        if tensor.shape == source[name].shape and "proj" not in name:
            assert torch.equal(tensor, source[name]), f"{name} is not what was stored"
    assert not list((case / "out").rglob("*.py")) and not list((case / "out").rglob("*.bin"))
    return written


@pytest.mark.parametrize("kind", SPOILT)
def test_whole_runs(home, tmp_path, kind):
    with Series("whole runs", tmp_path, home) as series:
        for chance in series.seeds(5):
            case = series.folder()
            how = SPOILT[kind](case, chance)
            calibration = "ids.safetensors" if kind in ("ids", "weights", "config") else "text.txt"
            names = [calibration, str(case / "model"), "model.layers", "lm_head"]
            run = partial(compressed, case, calibration)
            series.case(how, run, case, names=names, output=case / "out", memory=2**30)


COMMANDS = {
    "compress": ("compress", "--model", "model", "--calibration", "ids.safetensors", "--output", "out"),
    "plan": ("plan", "--model", "model", "--calibration", "text.txt"),
    "eval": ("eval", "model", "--data", "text.txt"),
    "convert": ("convert", "model", "--to", "grail", "--output", "out"),
    "run": ("run", "recipe.yaml"),
    "report": ("report", "model"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(home, tmp_path, command):
    """Exit code 2 and one line on stderr, or 0; nothing is left or changed by a refusal."""
    case = Path(shutil.copytree(home, tmp_path / "case"))
    if command in ("compress", "plan", "convert"):
        (case / "model" / "config.json").write_bytes(
            b'{"model_type": "llama", "num_hidden_layers": 1' + b"0" * 30 + b"}"
        )
    elif command == "run":
        (case / "recipe.yaml").write_text("model: !!python/object/apply:os.system ['touch mark']\noutput: out\n")
    elif command == "report":
        (case / "model" / "grail.json").write_bytes(b'{"recipe": ' + b"[" * 10**5)
    else:
        (case / "text.txt").write_bytes(WORDS.encode("utf-16"))
    before = listing(case)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "HF_HOME": str(tmp_path / "home"),
    }
    words = [sys.executable, "-m", "grail", *COMMANDS[command]]
    done = subprocess.run(words, cwd=case, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("grail: ") and not done.stdout
    assert any(name in done.stderr for name in ("config.json", "recipe.yaml", "grail.json", "text.txt"))
    assert listing(case) == before
    count("commands", "refused")


class Bomb:
    """Opening the pickle leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.write_text, (self.mark, "unpickled"))


PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin", "model.ckpt")
SMALL = {"method": "wanda-sp", "eval": "none"}


@pytest.mark.parametrize("how", ["compress", "eval", "load", "convert", "vision", "calibration", "weights"])
def test_pickles_are_never_opened(home, tmp_path, how):
    """Wherever a file may stand: alone, beside sound ones, or under the name of a sound one."""
    from grail.convert import convert
    from grail.evaluate import evaluate

    with Series("pickles", tmp_path, home) as series:
        for name in (*PICKLES, "model.safetensors"):
            case = series.folder()
            model, bomb = case / "model", pickle.dumps(Bomb(tmp_path / "mark"))
            (model / "model.safetensors").unlink()
            (model / name).write_bytes(bomb)
            torch.save({"x": torch.ones(1)}, model / ("x" + name) if name == "model.safetensors" else model / "y.bin")
            if how == "vision":
                (model / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
            for data in ("x.npz", "x.txt", "x.jsonl", "x.safetensors"):
                (case / data).write_bytes(bomb)
            data = case / Random(name).choice(("x.npz", "x.txt", "x.jsonl", "x.safetensors"))
            run = {
                "compress": lambda m=model, c=case: grail.compress(m, output=c / "out", **SMALL),
                "vision": lambda m=model, c=case: grail.compress(m, output=c / "out"),
                "eval": lambda m=model: evaluate(str(m)),
                "load": lambda m=model: grail.load(m),
                "convert": lambda m=model, c=case: convert(m, c / "out", to="grail"),
                "calibration": lambda h=home, d=data, c=case: grail.compress(
                    h / "model", output=c / "out", calibration=str(d), **SMALL
                ),
                "weights": lambda m=model, n=name, c=case: grail.compress(
                    "timm/resnet18", weights=str(m / n), output=str(c / "out")
                ),
            }[how]
            ending = series.case(f"{how} {name}", run, case, names=[str(case)], output=case / "out")
            if ending and ending.refused is None:
                series.wrong.append(f"{how} {name}: taken")
    assert not (tmp_path / "mark").exists()


OPENS = re.compile(
    r"\b(?:import|from) (?:pickle|dill|cloudpickle|joblib|shelve|marshal)\b|\btorch\.load\b|\bweights_only=False"
    r"|\ballow_pickle=True"
)


def code_of(file: Path) -> str:
    """Without comments and docstrings, which may speak of what the code does not do."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


OURS = [*(ROOT / "grail").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def test_no_code_of_ours_unpickles():
    found = [f"{file}: {match[0]}" for file in OURS for match in OPENS.finditer(code_of(file))]
    assert found == [] and len(OURS) > 100
    assert OPENS.search("import pickle") and OPENS.search("torch.load(file)")


def test_no_code_of_ours_trusts_a_folder_unasked():
    """trust_remote_code is False wherever it is said, but where the class file was seen to be GRAIL's own; and it is
    said wherever an Auto class opens a folder."""
    said = [
        (file.name, ast.unparse(keyword.value))
        for file in OURS
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for keyword in getattr(node, "keywords", ())
        if keyword.arg == "trust_remote_code"
    ]
    assert said and {value for _, value in said} == {"False"}
    reopened = code_of(ROOT / "grail" / "checkpoint" / "reopen.py")
    assert re.findall(r"'trust_remote_code': (.*?)}", reopened) == ["loads == 'grail'"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_written_class_file_is_ours_alone(home, tmp_path, reopen_here, bias):
    """Whatever the names in the source's config.json."""
    case = Path(shutil.copytree(home, tmp_path / "case"))
    file = case / "model" / "config.json"
    hostile = {
        "auto_map": {"AutoModel": "evil.X"},
        "architectures": ["X\nimport os"],
        "_name_or_path": '"""\nimport os',
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | hostile))
    (case / "model" / "modeling_grail.py").write_text("raise SystemExit\n")
    options = {"method": "wanda-sp", "format": "grail", "bias": bias, "calibration": str(case / "ids.safetensors")}
    grail.compress(case / "model", output=case / "out", eval="none", **options)
    assert [f.name for f in (case / "out").rglob("*.py")] == ["modeling_grail.py"]
    assert (case / "out" / "modeling_grail.py").read_bytes() == Path(modeling_grail.__file__).read_bytes()
    with pytest.raises(GrailError):
        grail.load(tmp_path / "nothing")
