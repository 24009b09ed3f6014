"""Windows are no longer than what a model was made for, unless somebody says so, and then it is told."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from grail.cli import app
from grail.evaluate import evaluate
from tests.tiny import tiny_checkpoint, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")
POSITIONS = 96
WARNING = f"made for {POSITIONS} positions"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("dense"), max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(" ".join(f"w{(i * i + j) % 57}" for i in range(400)) for j in range(60)))
    return file


def run(*line: object) -> str:
    done = CliRunner().invoke(app, list(map(str, line)))
    assert done.exit_code == 0, done.output
    return done.output


def compress(dense, text, out, *more: object) -> tuple[dict, str]:
    asked = ["--method", "wanda-sp", "--ratio", 0.5, "--calibration", text, "--samples", 4]
    shown = run("compress", "--model", dense, *asked, "--output", out, *more)
    return json.loads((out / "grail.json").read_text()), " ".join(shown.split())


def test_the_default_is_what_the_model_was_made_for(dense, text, tmp_path):
    told, shown = compress(dense, text, tmp_path / "out")
    assert WARNING not in shown
    assert told["calibration"]["tokens"] == 4 * POSITIONS and told["evaluation"]["seq_len"] == POSITIONS
    for source in (text, f"{text}+builtin"):
        found = evaluate(str(dense), data=str(source), samples=2)
        assert (found["windows"], found["seq_len"]) == (2, POSITIONS)


def test_longer_windows_are_told_of(dense, text, tmp_path):
    told, shown = compress(dense, text, tmp_path / "out", "--seq-len", POSITIONS + 1, "--eval", "none")
    assert told["calibration"]["tokens"] == 4 * (POSITIONS + 1)
    assert f"windows of {POSITIONS + 1} tokens, and the model was {WARNING}" in shown
    shown = run("eval", dense, "--data", text, "--samples", 2, "--seq-len", POSITIONS + 1)
    assert WARNING in " ".join(shown.split())
