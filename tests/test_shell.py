"""Shell manners of every command: --json, refusals, interruptions, pipes, colours, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from grail import completion
from grail.calibration.sources import _HUB, BUILTIN
from grail.cli import app
from grail.commands import COMMANDS
from grail.convert import FORMATS
from grail.modules.export import KINDS
from grail.recipe import CHOICES
from grail.selectors import methods
from grail.serving.gguf import ENCODINGS
from tests.schemas import SCHEMAS, differences
from tests.test_bad_input import listing, one_sentence
from tests.test_gguf_export import VOCABULARY, byte_level, with_tokenizer
from tests.test_recipes import pictures, reopen_as_here
from tests.tiny import tiny_calibration, tiny_checkpoint

runner = CliRunner()
ROOT = Path(__file__).parents[1]


def call(line: str, *more: str, code: int = 0):
    done = runner.invoke(app, [*shlex.split(line), *more])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A language model and a ResNet, both compressed, and what they were compressed with."""
    home = tmp_path_factory.mktemp("home")
    source = tiny_checkpoint(home / "dense", num_key_value_heads=6, vocab_size=VOCABULARY)
    with_tokenizer(source, byte_level())
    tiny_calibration(home / "text.safetensors")
    state = timm.create_model("resnet10t", num_classes=4, in_chans=1).state_dict()
    save_file(state, home / "w.safetensors")
    pictures(home / "images.npz", 1)
    where = os.getcwd()
    os.chdir(home)
    with pytest.MonkeyPatch.context() as patch:
        reopen_everything_here(patch, home)
        call("compress --model dense --calibration text.safetensors --attn-ratio 0.34 --eval text.safetensors -o small")
        call("compress --model timm/resnet10t --weights w.safetensors --method wanda --calibration images.npz -o net")
    os.chdir(where)
    return home


def reopen_everything_here(patch, folder: Path) -> None:
    from grail.modules import run as of_run

    reopen_as_here(patch, folder)
    patch.setattr(of_run, "reopen", lambda f, expected, examples: of_run.reopen_here(f, expected, examples, None))


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A folder of its own with everything of `home` in it, as links."""
    for name in home.iterdir():
        (tmp_path / name.name).symlink_to(name)
    monkeypatch.chdir(tmp_path)
    reopen_everything_here(monkeypatch, tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: dense\ncalibration: text.safetensors\noutput: new\n")
    return tmp_path


VISION = "compress --model timm/resnet10t --weights w.safetensors --method wanda --calibration images.npz -o new"
LINES = {
    "compress": "compress --model dense --calibration text.safetensors --attn-ratio 0.34 -o new",
    "compress --print-recipe": "compress --model dense --print-recipe -o new",
    "compress vision": VISION,
    "plan": "plan --model dense --calibration text.safetensors",
    "run": "run recipe.yaml",
    "eval": "eval small --against dense --prompt the",
    "eval vision": "eval net --data images.npz --speed",
    "convert": "convert small --to padded -o new",
    "export": "export net --to torch-export -o new.pt2",
    "export gguf": "export small --to gguf -o new.gguf",
    "report": "report small net -o new.html",
    "push": "push small me/small --dry-run",
    "soup": "soup dense dense2 -o new",
    "methods": "methods",
}
REFUSED = {
    "compress": "compress --model dense --ratio 2 -o new",
    "compress --print-recipe": "compress --model dense --method nonsense --print-recipe -o new",
    "compress vision": "compress --model timm/resnet10t --weights missing.safetensors -o new",
    "plan": "plan --model dense --method nonsense",
    "run": "run missing.yaml",
    "eval": "eval missing",
    "eval vision": "eval net --data missing",
    "convert": "convert small --to nonsense -o new",
    "export": "export net --to nonsense -o new",
    "export gguf": "export small --to gguf --dtype nonsense -o new",
    "report": "report missing",
    "push": "push small nonsense --dry-run",
    "soup": "soup missing other -o new",
    "methods": "methods nonsense",
}


def prepared(here: Path, name: str) -> str:
    if name == "soup":
        tiny_checkpoint(here / "dense2", num_key_value_heads=6, vocab_size=VOCABULARY, seed=1)
    return LINES[name]


def test_every_command_is_looked_at():
    named = {name.split()[0] for name in LINES}
    assert named == {"compress", "plan", *COMMANDS}
    assert set(LINES) == set(REFUSED) == set(SCHEMAS)


class TestJson:
    @pytest.mark.parametrize("name", LINES)
    def test_it_is_one_document_of_its_schema(self, here, name):
        done = call(prepared(here, name), "--json")
        document = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert document["schema_version"] == 1
        assert differences(document, SCHEMAS[name]) == []

    def test_a_dry_run_has_the_schema_of_a_run(self, here):
        assert differences(json.loads(call("run recipe.yaml --dry-run --json").stdout), SCHEMAS["run"]) == []

    @pytest.mark.parametrize("name", REFUSED)
    def test_a_refusal_is_a_sentence_on_stderr_alone(self, here, name):
        before = listing(here)
        done = call(REFUSED[name], "--json", code=2)
        assert not done.stdout
        one_sentence(done.stderr)
        assert listing(here) == before

    def test_an_export_does_not_take_the_place_of_a_folder(self, here):
        (here / "mine").mkdir()
        for line in (LINES["export"], LINES["export gguf"]):
            line = line.replace("new.pt2", "mine").replace("new.gguf", "mine")
            assert "is a folder" in one_sentence(call(line, "--overwrite", code=2).stderr)

    @pytest.mark.parametrize("name", sorted({line.split()[0] for line in LINES.values()}))
    def test_an_unknown_option_too(self, name):
        done = call(f"{name} --nonsense --json", code=2)
        assert not done.stdout and "--nonsense" in one_sentence(done.stderr)

    def test_numbers_that_json_has_not_are_null(self, here, monkeypatch):
        found = {"schema_version": 1, "models": {"small": {"perplexity": float("inf"), "a": [float("nan"), 1.5]}}}
        monkeypatch.setattr("grail.evaluate.evaluate", lambda *_, **__: found)
        told = json.loads(call("eval small --json").stdout)
        assert told["models"]["small"] == {"perplexity": None, "a": [None, 1.5]}


WITHIN = {
    "compress": "grail.pipeline._compress_layer",
    "compress vision": "grail.modules.run.write_told",
    "plan": "grail.run.make_plan",
    "run": "grail.pipeline._compress_layer",
    "eval": "grail.evaluate.perplexity",
    "eval vision": "grail.modules.evaluate.accuracies",
    "convert": "grail.convert._reopen",
    "export": "grail.modules.export._program",
    "export gguf": "grail.serving.gguf._compared",
    "report": "os.replace",
    "push": "grail.serving.push._upload",
    "soup": "grail.soup.output.averaged",
}
"""Where the middle of each command is."""


class TestInterruptions:
    @pytest.mark.parametrize("name", WITHIN)
    def test_nothing_is_left_half_written(self, here, name, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        line = prepared(here, name).replace("--dry-run", "")
        before = listing(here)
        monkeypatch.setattr(WITHIN[name], interrupted)
        done = call(line, "--json", code=130)
        assert not done.stdout
        assert done.stderr.splitlines()[-1] == "grail: interrupted; nothing new was kept"
        assert listing(here) == before

    @pytest.mark.parametrize("name", ["export", "export gguf"])
    def test_no_folder_that_an_export_made_is_left(self, here, name, monkeypatch):
        monkeypatch.setattr(WITHIN[name], lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call(LINES[name].replace("-o new", "-o one/two/new"), code=130)
        assert not (here / "one").exists()

    def test_an_interrupted_export_is_not_taken_for_one_that_is_there(self, here, monkeypatch):
        (here / "new.gguf").write_bytes(b"old")
        monkeypatch.setattr(WITHIN["export gguf"], lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call(LINES["export gguf"], "--overwrite", code=130)
        assert (here / "new.gguf").read_bytes() == b"old" and not list(here.glob(".*"))


def process(line: str, **environment: str) -> subprocess.CompletedProcess:
    """A real one, in which importing torch is a failure."""
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        assert name.partition('.')[0] not in ('torch', 'transformers'), name\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from grail.cli import main\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "COLUMNS": "100"} | environment
    command = [sys.executable, "-c", code, *shlex.split(line)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


class TestCompletion:
    @pytest.mark.parametrize(
        ("typed", "offered"),
        [
            ("grail comp", {"compress"}),
            ("grail compress --method wanda-p", {"wanda-pp-sp"}),
            ("grail compress --target ", {"hidden", "stream", "dense", "own"}),
            ("grail plan --allocation ", {"uniform", "global", "log", "error"}),
            ("grail compress --format ", {"auto", "uniform", "grail", "padded"}),
            ("grail compress --store d", {"disk"}),
            ("grail compress --dtype ", {"float32", "bfloat16", "float16"}),
            ("grail eval x --dtype b", {"bfloat16"}),
            ("grail compress --calibration ", {"builtin", "docstrings", "wikitext2", "c4"}),
            ("grail compress --calibration builtin+w", {"builtin+wikitext2"}),
            ("grail compress --calibration ./te", set()),
            ("grail compress --eval n", {"none"}),
            ("grail methods fl", {"flap"}),
            ("grail export x --to o", {"onnx"}),
            ("grail convert x --to ", {"uniform", "grail", "padded"}),
            ("grail run x --keep", {"--keep-going"}),
        ],
    )
    def test_bash_is_offered_values(self, typed, offered):
        done = process("", _GRAIL_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(typed.count(" ")))
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()) == offered

    @pytest.mark.parametrize("shell", ["zsh", "fish"])
    def test_others_are_told_what_a_method_does(self, shell):
        typed = {"_TYPER_COMPLETE_ARGS": "grail compress --method fo", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        done = process("", _GRAIL_COMPLETE=f"complete_{shell}", **typed)
        assert "fold" in done.stdout and "similar producers" in done.stdout, done.stderr

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_the_script_asks_grail(self, shell):
        done = process("", _GRAIL_COMPLETE=f"source_{shell}")
        assert done.returncode == 0 and "_GRAIL_COMPLETE" in done.stdout

    def test_what_is_offered_is_what_there_is(self):
        assert completion.described_methods() == {name: cls.summary for name, cls in methods().items()}
        assert set(completion.TEXTS) == set(BUILTIN) | set(_HUB) - {"ptb"}
        assert completion.FORMATS == FORMATS and set(completion.STORED) == set(ENCODINGS)
        assert set(completion.EXPORTS) == {"gguf", *KINDS}
        assert set(completion.choice("allocation")("")) == set(CHOICES["allocation"]) - {None}


class TestHelp:
    @pytest.mark.parametrize("line", ["--help", "--version", *(f"{name} --help" for name in ("compress", *COMMANDS))])
    def test_it_does_not_wait_for_torch(self, line):
        done = process(line)
        assert done.returncode == 0 and done.stdout and not done.stderr

    def test_it_says_the_exit_codes(self):
        text = " ".join(process("--help").stdout.split())
        for code in ("0 done", "2 bad input", "75 interrupted", "130 interrupted", "1 a bug"):
            assert code in text

    def test_a_refusal_by_the_parser_does_not_wait_either(self):
        done = process("compress --nonsense")
        assert done.returncode == 2 and one_sentence(done.stderr)


@pytest.mark.parametrize("line", ["--nonsense", "nonsense", "--json methods"])
def test_what_is_no_command_is_told_in_one_sentence_too(line):
    done = call(line, code=2)
    assert not done.stdout and "grail --help" in one_sentence(done.stderr)


class TestTerminals:
    @pytest.mark.parametrize("name", LINES)
    def test_without_a_terminal_there_is_plain_text(self, here, name):
        done = call(prepared(here, name))
        assert "\x1b" not in done.output and "\r" not in done.output and done.stdout

    @pytest.mark.parametrize("name", ["eval", "eval vision"])
    def test_names_are_whole_on_a_narrow_one(self, here, name, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        long = here / ("a-name-that-is-longer-than-a-narrow-terminal-is-wide" * 2)
        long.symlink_to(here / LINES[name].split()[1])
        more = ["--data", "images.npz"] if name == "eval vision" else []
        assert str(long) in call(f"eval {long}", *more).stdout

    @pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
    def test_colours_are_for_terminals_whose_user_wants_them(self, environment, coloured):
        ours, theirs = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environment
        command = [sys.executable, "-m", "grail", "--help"]
        subprocess.run(command, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT, check=True)
        os.close(theirs)
        text = b""
        while chunk := read(ours):
            text += chunk
        os.close(ours)
        assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7]", text)) == coloured


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how the end of it is told
        return b""


class TestPipes:
    @pytest.mark.parametrize("more", ["", "--json"])
    def test_a_reader_that_goes_away_is_no_failure(self, more):
        ours, theirs = os.pipe()
        os.close(ours)
        command = [sys.executable, "-m", "grail", "methods", *more.split()]
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        os.close(theirs)
        assert (done.returncode, done.stderr) == (0, "")

    def test_neither_are_the_closing_lines_of_a_table(self, here):
        ours, theirs = os.pipe()
        os.close(ours)
        line = "run recipe.yaml --quiet --set-option output=small --set-option attn_ratio=0.34"
        command = [sys.executable, "-m", "grail", *shlex.split(line), "--set-option", "eval=text.safetensors"]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment)
        os.close(theirs)
        assert (done.returncode, done.stderr) == (0, "")

    def test_another_broken_pipe_is_a_bug(self, here, monkeypatch):
        monkeypatch.setattr("grail.run.make_plan", lambda *_: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
        assert "bug in grail" in call(LINES["plan"], code=1).stderr

    def test_work_goes_on_when_nobody_reads_of_it(self, tmp_path):
        ours, theirs = os.pipe()
        os.close(ours)
        torch.manual_seed(0)
        source = tiny_checkpoint(tmp_path / "dense")
        data = tiny_calibration(tmp_path / "text.safetensors")
        line = ["compress", "--model", source, "--calibration", data, "-o", tmp_path / "new"]
        command = [sys.executable, "-m", "grail", *map(str, line)]
        done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        os.close(theirs)
        assert done.returncode == 0 and "parameters" in done.stdout and (tmp_path / "new" / "grail.json").exists()
