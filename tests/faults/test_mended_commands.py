"""What was found in commands, their streams and their text by hand, each by itself."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import grail
from grail.calibration import evaluation_windows, load_calibration, sources
from grail.calibration.sources import blocks
from grail.calibration.tokenizer import has_tokenizer, load_tokenizer
from grail.cli import app
from grail.distributed import Group
from grail.errors import GrailError, verdict
from grail.recipes.document import read
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer

ROOT = Path(__file__).parents[2]
FULL = "stdout: No space left on device"
NO_UTF8 = "\udcff"
"""How Python holds a byte of a name that is none."""


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """A real process whose streams are those of the line, which begins with `grail`."""
    line = line.replace("grail", f"exec {shlex.quote(sys.executable)} -m grail", 1)
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, env=os.environ | paths | environment
    )


def refused(*arguments: object) -> str:
    """The one sentence of a command in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    lines = done.stderr.splitlines()
    assert (done.exit_code, len(lines)) == (2, 1), (done.exit_code, done.output)
    return lines[0]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> str:
    work = tmp_path_factory.mktemp("job")
    model = tiny_checkpoint(work / "model", num_hidden_layers=1)
    calibration = tiny_calibration(work / "ids.safetensors")
    return f"grail compress --model {model} --calibration {calibration} --method mag-sp --no-compensate"


class TestStreams:
    def test_all_closed(self, job, tmp_path):
        done = shell(f"{job} --output {tmp_path / 'out'} <&- >&- 2>&-")
        assert done.returncode == 0 and (tmp_path / "out" / "grail.json").exists()

    def test_full_ones_with_a_result(self, job, tmp_path):
        """What is told of the work may be lost; of the result it is said."""
        out = tmp_path / "out"
        done = shell(f"{job} --output {out} --json 2>/dev/full")
        assert done.returncode == 0 and json.loads(done.stdout)["output"] == str(out)
        done = shell(f"{job} --output {out} --overwrite -q --json >/dev/full")
        assert (done.returncode, done.stderr) == (2, f"grail: {FULL}; the result is in {out}\n")

    @pytest.mark.parametrize(
        "line", ["grail --version", "grail --help", "grail compress --help", "grail methods --json"]
    )
    def test_stdout_is_full(self, line):
        done = shell(f"{line} >/dev/full")
        assert (done.returncode, done.stderr) == (2, f"grail: {FULL}\n")

    @pytest.mark.parametrize("where", ["2>&-", "2>/dev/full"])
    def test_a_refusal_that_cannot_be_told_is_one(self, where):
        assert shell(f"grail --nonsense {where}").returncode == 2

    def test_an_encoding_without_the_characters_of_a_name(self, job, tmp_path):
        done = shell(f"{job} --output {tmp_path}/öut -q; ", PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and r"\xf6ut" in done.stdout and (tmp_path / "öut").is_dir()
        done = shell(f"grail report {tmp_path}/öut --overwrite --json", PYTHONIOENCODING="ascii")
        assert json.loads(done.stdout)["output"] == f"{tmp_path}/öut/report.html"

    def test_columns_beyond_all_width(self):
        done = shell("grail --help", COLUMNS="100000000")
        assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 500


class TestNamesThatAreNoUtf8:
    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (("compress", "--output", "x", "--model", NO_UTF8), "--model"),
            (("plan", "--model", "x", "--calibration", NO_UTF8), "--calibration"),
            (("compress", "--output", "x", "--model", "x", "--set", f"a={NO_UTF8}"), "--set"),
            (("eval", "x", "--prompt", NO_UTF8), "--prompt"),
            (("soup", "x", NO_UTF8, "--output", "x"), "INPUTS"),
            (("report", "x", "--output", NO_UTF8), "--output"),
            (("run", NO_UTF8), "RECIPE"),
        ],
        ids=lambda value: value if isinstance(value, str) else value[0],
    )
    def test_on_the_command_line(self, words, named):
        assert refused(*words).startswith(f"grail: {named} ") and "UTF-8" in refused(*words)

    @pytest.mark.parametrize("option", ["model", "calibration", "eval"])
    def test_in_python(self, tmp_path, option):
        given = {"model": "x", "output": tmp_path / "out"} | {option: NO_UTF8}
        with pytest.raises(GrailError, match=f"{option} .* is no UTF-8"):
            grail.compress(given.pop("model"), **given)


@pytest.mark.parametrize("rank", ["", "x", "0.5", "-1"])
def test_a_rank_that_is_no_number_is_none(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    assert "no such" in refused("eval", tmp_path / "none", "--quiet").lower()


def test_a_recipe_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(GrailError, match=r"recipe\.yaml is a device or a pipe"):
        read(tmp_path / "recipe.yaml")


class TestMachine:
    def test_the_current_folder_is_gone(self, tmp_path, monkeypatch):
        gone = tmp_path / "x"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        assert "current folder is gone" in refused("compress", "--model", "x", "--output", "rel")
        with pytest.raises(FileNotFoundError) as error:
            os.path.realpath("rel")
        assert "current folder is gone" in verdict(error.value)[0]

    @pytest.mark.parametrize("kind", [ImportError, OSError])
    def test_a_library_that_finds_no_room(self, monkeypatch, kind):
        """Which also says so where it lies on a disk of which nothing may be run."""
        error = kind("libtorch_cpu.so: failed to map segment from shared object")
        assert verdict(error) is None
        monkeypatch.setattr(resource, "getrlimit", lambda _: (2**31, -1))
        assert verdict(error)[0].startswith("out of memory")


class TestJoining:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch):
        """Nobody is waited for."""
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("waits"))

    def test_a_host_that_nobody_knows(self, monkeypatch):
        monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
        with pytest.raises(GrailError, match=r"MASTER_ADDR nowhere\.invalid is no known host"):
            Group.from_environment("cpu")

    @pytest.mark.parametrize("rank", ["2", "5"])
    def test_more_ranks_than_processes(self, monkeypatch, rank):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(GrailError, match=f"RANK is {rank} of WORLD_SIZE 2"):
            Group.from_environment("cpu")


class TestTokenizer:
    def test_a_folder_is_none(self, tmp_path):
        (tmp_path / "tokenizer_old").mkdir()
        assert not has_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
    def test_a_pipe_is_named_and_not_waited_for(self, tmp_path, name):
        tiny_tokenizer(tmp_path)
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(GrailError, match=rf"{name} is a device or a pipe"):
            load_tokenizer(tmp_path)

    def test_a_folder_in_the_place_of_its_configuration(self, tmp_path):
        tiny_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "tokenizer_config.json").mkdir()
        with pytest.raises(GrailError, match=r"tokenizer_config\.json cannot be read"):
            load_tokenizer(tmp_path)


class Numbers:
    """A tokenizer whose tokens are the numbers in the text. read: the characters it was given."""

    eos_token_id = None
    read = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        self.read += len(text)
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


class TestLargeText:
    def test_blocks_are_the_text(self, monkeypatch):
        monkeypatch.setattr(sources, "LARGE", 10)
        monkeypatch.setattr(sources, "BLOCK", 6)
        assert list(blocks("ab\ncd\n\nefg h i\n")) == ["ab\ncd\n", "\n", "efg h ", "i\n"]
        assert list(blocks("abcdefghijklmn")) == ["abcdef", "ghijkl", "mn"]
        assert list(blocks("a\nbcdefghi")) == ["a\nbcdefghi"]
        assert list(blocks("")) == [""]

    @pytest.fixture
    def file(self, tmp_path) -> Path:
        """More than a text that is tokenised at once."""
        file = tmp_path / "text.txt"
        file.write_text("".join(f"{i % 9000}\n" for i in range(sources.LARGE // 4)))
        assert file.stat().st_size > sources.LARGE * 1.12  # a tenth is held out
        return file

    def test_no_more_is_read_than_is_enough(self, file):
        tokenizer = Numbers()
        found = load_calibration(str(file), lambda: tokenizer, 10_000, samples=8, seq_len=32, seed=0, trial=2)
        assert found.ids.shape == (8, 32) and found.trial.shape == (2, 32)
        assert tokenizer.read <= sources.BLOCK
        asked = {"seq_len": 32, "held_out": False}
        tokenizer.read = 0
        some = evaluation_windows(str(file), lambda: tokenizer, 10_000, samples=8, **asked)
        assert tokenizer.read <= sources.BLOCK
        assert torch.equal(some.ids, evaluation_windows(str(file), lambda: tokenizer, 10_000, **asked).ids[:8])

    def test_blocks_give_the_tokens_of_the_text(self, file, monkeypatch):
        asked = {"samples": 500, "seq_len": 512, "seed": 0}
        cut = load_calibration(str(file), Numbers, 10_000, **asked)
        monkeypatch.setattr(sources, "LARGE", 2**30)
        assert load_calibration(str(file), Numbers, 10_000, **asked).sha256 == cut.sha256

    @pytest.mark.parametrize(("samples", "memory"), [(2000, 10**6), (2**30, None)])
    def test_more_windows_than_there_is_memory_for(self, samples, memory):
        with pytest.raises(GrailError, match=f"--samples {samples} .* are .* [TGM]B, more than "):
            load_calibration(
                "builtin", lambda: pytest.fail("tokenised"), 64, samples=samples, seq_len=512, seed=0, memory=memory
            )

    def test_the_budget_is_that_of_the_command(self, job, tmp_path):
        (tmp_path / "text.txt").write_text("1 2 3")
        model = job.split("--model ")[1].split()[0]
        asked = ("plan", "--model", model, "--calibration", tmp_path / "text.txt", "--samples", 10**6, "--quiet")
        assert "more than --memory 800.00 MB" in refused(*asked, "--memory", "800MB")
