"""The documentation: every command and every Python block of every page runs, every link leads somewhere, and the
reference of the command line is that of the code.

A page runs from top to bottom in a folder of its own. What stands in for something else is listed here, with why.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from typer.testing import CliRunner

from grail.cli import app
from grail.modules.names import is_network
from tests import docs_stand_ins as stand_ins
from tests.docs_pages import LANGUAGES, PAGES, ROOT, anchors, blocks, commands, prose
from tests.test_push import Hub

MODELS = {
    "smollm2-135m": {},  # the real one takes minutes: two layers, six heads in two groups, a byte-level tokenizer
    "llama-2-7b": {"num_key_value_heads": 6},  # gated, and 13 GB: the same without groups
}
NAMES = {
    "timm/resnet18": "timm/resnet10t",  # a quarter of its size
    "open_clip/ViT-B-32": f"open_clip/{stand_ins.CLIP}",  # 151 M parameters
    "c4": "text.txt",  # no hub here
    "wikitext2": "text.txt",  # no hub here
    "piqa,hellaswag": "stand_in",  # no hub here: two questions from a local file
}
NUMBERS = {"--samples": "8", "--seq-len": "64", "--limit": "2"}  # seconds, not minutes
ADDED = {"--samples": "8", "--seq-len": "64"}  # to `grail compress` and `plan` of language models that do not say
VISION_ADDED = {"--samples": "8"}
FILES = {  # made where a page names them and no command of the page writes them
    "images": stand_ins.images,
    "labelled": stand_ins.labelled,
    "local.safetensors": stand_ins.resnet,
    "a.safetensors": stand_ins.resnet,
    "b.safetensors": stand_ins.resnet,
    "c.safetensors": stand_ins.resnet,
    "clip.safetensors": stand_ins.clip,
    "captions.txt": stand_ins.lines("a cat", "a dog", "the cat and the dog", "seven dogs"),
    "templates.txt": stand_ins.lines("a photo of a {}.", "one {}"),
    "text.txt": stand_ins.lines(stand_ins.TEXT),
    "text.jsonl": stand_ins.records,
    "ids.safetensors": stand_ins.tokens,
}
RESULTS = ("smaller", "smallest")  # outputs that docs/cli.md names without making them: a compressed stand-in
TEXT_LENGTH = 12_000  # characters of `builtin` and `docstrings` that are left: tokenising all of it takes seconds
# Also replaced: both reopening checks and the memory of `grail eval --speed` run in this process (a fresh one imports
# for seconds; test_cli.py, test_module_folder.py and test_evaluation.py start it), `grail push` meets a hub that takes
# what it is sent, and `grail.compress` takes 8 samples unless it is told how many.

NOT_RUN = {  # commands of other programs, by their first word, with what is checked instead
    "make": lambda words: all(re.search(rf"^{word}:", MAKEFILE, re.MULTILINE) for word in words),
    "pip": lambda words: words[0] == "install" and all(map(installable, words[1:])),
    "git": lambda words: words[0] == "clone",
    "torchrun": lambda words: parses(words[words.index("grail") + 1 :]),
    "llama-cli": lambda words: words[:2] == ["-m", "small.gguf"],  # llama.cpp is not here
    "vllm": lambda words: words[0] == "serve",  # needs a GPU
    ".venv/bin/python": lambda words: all((ROOT / word).exists() for word in words if "/" in word),
    "nox": lambda words: words[0] == "-s" and f"def {words[1]}(" in (ROOT / "noxfile.py").read_text(),
    "python": lambda words: words[0] == "docs/reference.py" and set(words[1:]) <= {"--check"},
}
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.-])((?:\.?/)?(?:grail|kernels|tests|benchmarks|docs|\.ci)/[\w./-]*\w)")


def installable(word: str) -> bool:
    """Whether an argument of `pip install` is an option, this project with extras that exist, or what the Makefile
    installs."""
    extras = re.fullmatch(r"\.\[([\w,]+)\]", word)
    known = set(PROJECT["optional-dependencies"])
    return word in {"-e", "."} or (set(extras[1].split(",")) <= known if extras else word in MAKEFILE)


def parses(words: list[str]) -> bool:
    """Whether the arguments are those of a command of grail."""
    typer.main.get_command(app).commands[words[0]].make_context(words[0], words[1:])
    return True


class Session:
    """One page in the folder it runs in: replaces what stands for something else, runs, and tells where it fails."""

    def __init__(self, page: str, models: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.page, self.models, self.folder, self.monkeypatch = page, models, folder, monkeypatch
        self.names: dict = {"__name__": "__docs__"}
        self.done = 0
        self._make_files()

    def _make_files(self) -> None:
        runnable = [block for block in blocks(self.page) if block.language in ("sh", "python")]
        text = "\n".join(block.text for block in runnable)
        written = {words[i + 1] for b in runnable if b.language == "sh" for words in commands(b)
                   for i, word in enumerate(words[:-1]) if word in ("--output", "-o")}  # fmt: skip
        wanted = {name: name for name in FILES} | {name: other for name, other in NAMES.items() if other in FILES}
        result = stand_ins.compressed(self.models["smollm2-135m"])
        for name, make in FILES.items() | dict.fromkeys(RESULTS, result).items():
            asked = any(re.search(rf"(?<![\w./-]){re.escape(word)}(?![\w.-])", text)
                        for word, file in ({name: name} | wanted).items() if file == name)  # fmt: skip
            if asked and name not in written:
                make(self.folder / name)

    def run(self) -> None:
        """All blocks, in order."""
        for block in blocks(self.page):
            where = f"{self.page}:{block.line}"
            if block.language == "sh":
                for words in commands(block):
                    self.command(words, where)
            elif block.language == "python":
                self.python(block.text, where, block.line)
            elif block.language == "yaml":
                file = self.folder / block.text.splitlines()[0].removeprefix("# ")
                file.write_text(self.with_stand_ins(block.text, "{}", r"(?<=: ){}$"))
            self.done += block.language != "text"

    def command(self, words: list[str], where: str) -> None:
        """One command of a shell block."""
        with self.monkeypatch.context() as patch:
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                patch.setenv(*words.pop(0).split("=", 1))
            if words[0] != "grail":
                assert words[0] in NOT_RUN, f"{where}: {words[0]} is not on the list of what is not run"
                assert NOT_RUN[words[0]](words[1:]), f"{where}: {' '.join(words)} names what is not there"
                return
            arguments = self.replaced(words[1:])
            found = CliRunner().invoke(app, arguments)
        assert found.exit_code == 0, f"{where}: {' '.join(words)}\nran as {arguments}\n{found.output}"

    def replaced(self, words: list[str]) -> list[str]:
        """The arguments with stand-ins for what they name."""
        known = {name: str(path) for name, path in self.models.items()} | NAMES
        found = ["+".join(known.get(part, part) for part in known.get(word, word).split("+")) for word in words]
        for option, value in NUMBERS.items():
            if option in found:
                found[found.index(option) + 1] = value
        if "stand_in" in found:
            (self.folder / "stand-in").exists() or stand_ins.question_folder(self.folder / "stand-in")
            found += ["--tasks-folder", str(self.folder / "stand-in")]
        if found[0] in ("compress", "plan"):
            vision = "--model" in found and is_network(found[found.index("--model") + 1])
            tokenised = any(word.endswith(".safetensors") for word in found)
            for option, value in (VISION_ADDED if vision or tokenised else ADDED).items():
                found += [] if option in found else [option, value]
        return found

    def with_stand_ins(self, text: str, form: str, pattern: str) -> str:
        """A block with stand-ins for names that stand in it as the pattern says."""
        for name, other in ({name: str(path) for name, path in self.models.items()} | NAMES).items():
            text = re.sub(pattern.format(re.escape(name)), form.format(other), text, flags=re.MULTILINE)
        return text

    def python(self, text: str, where: str, line: int) -> None:
        """One block, in the names that the blocks before it made."""
        text = self.with_stand_ins(text, '"{}"', '"{}"')
        try:
            code = compile("\n" * (line - 1) + text, str(ROOT / self.page), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The stand-ins for language models."""
    return {name: stand_ins.language_model(tmp_path_factory.mktemp(name), **widths) for name, widths in MODELS.items()}


@pytest.fixture
def opened(reopen_here, models, tmp_path, monkeypatch):
    """Makes a page ready to run."""
    import huggingface_hub

    from grail import run
    from grail.calibration import sources
    from grail.evaluation import footprint
    from grail.modules import folder
    from grail.modules import run as modules_run

    def in_this_process(path, expected, examples):
        return folder.reopen_here(path, expected, examples, None)

    def with_few_samples(model, **flags):
        return compress(model, **{"samples": 8} | flags)

    def cut(documents):
        return lambda split: ["\n\n".join(documents(split))[:TEXT_LENGTH]]

    compress, work = run.compress, tmp_path / "work"
    for name, documents in list(sources.BUILTIN.items()):
        monkeypatch.setitem(sources.BUILTIN, name, cut(documents))
    monkeypatch.setattr(run, "compress", with_few_samples)
    monkeypatch.setattr(modules_run, "reopen", in_this_process)
    monkeypatch.setattr(footprint, "footprint", lambda *_, **__: {"memory peak": 1})
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    work.mkdir()
    monkeypatch.chdir(work)
    made = []
    yield lambda page: made.append(Session(page, models, work, monkeypatch)) or made[-1]
    for session in made:
        session.names.clear()
    gc.collect()  # a method that a page defines is known for as long as its class is


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(opened, page):
    session = opened(page)
    session.run()
    assert session.done == sum(block.language != "text" for block in blocks(page))


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("```sh\ngrail compress --modle smollm2-135m --output x\n```", "No such option: --modle"),
        ("```sh\ngrail eval nowhere\n```", "nowhere"),
        ("```sh\ngrail export small --to gguf \\\n    --output x.gguf\n```", "small"),
        ("```sh\nrm -r /\n```", "rm is not on the list"),
        ("```sh\nmake coffee\n```", "names what is not there"),
        ("```sh\npip install -e '.[coffee]'\n```", "names what is not there"),
        ("```sh\ntorchrun -m grail compress --output x\n```", "Missing parameter: model"),
        ("```sh\n.venv/bin/python benchmarks/nothing.py\n```", "names what is not there"),
        ("```python\nimport grail\n\ngrail.compresss\n```", "page.md:2: AttributeError"),
        ("```python\n1 +\n```", "SyntaxError"),
        ("```sh\ngrail methods\n", "not closed"),
    ],
)
def test_what_does_not_work_is_found(opened, tmp_path, block, said):
    page = tmp_path / "page.md"
    page.write_text(block)
    with pytest.raises(Exception, match=re.escape(said)):
        opened(str(page)).run()


def test_pages_that_have_commands_are_among_them():
    with_commands = {page for page in PAGES if any(block.language == "sh" for block in blocks(page))}
    assert {"README.md", "CONTRIBUTING.md", "docs/cli.md", "docs/faq.md", "docs/serving.md"} <= with_commands
    assert len([page for page in PAGES if page.startswith("docs/tutorial-")]) == 3


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: a block of {block.language or 'nothing'}"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "kernels/README.md"])
def test_links_and_files_exist(page):
    home = (ROOT / page).parent
    for target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"https?://", target):
            continue
        assert (home / path).exists(), f"{page}: {target}"
        if anchor:
            there = str((home / path).resolve().relative_to(ROOT)) if path else page
            assert anchor in anchors(there), f"{page}: {target}"
    for name in FILE.findall(prose(page)):
        assert (ROOT / name).exists() or (ROOT / "kernels" / name).exists(), f"{page}: {name}"


def reference():
    """docs/reference.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class TestReference:
    def test_is_that_of_the_code(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        assert reference().main(["--check"]) == 0, "run  python docs/reference.py"

    def test_a_changed_command_line_makes_it_stale(self, monkeypatch, capsys):
        def added(path: Annotated[str, typer.Argument(help="Something.")]) -> None:
            """A new command."""

        monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
        app.command("added")(added)
        assert reference().main(["--check"]) == 1
        assert "docs/reference.py" in capsys.readouterr().err

    def test_writes_what_it_checks(self, monkeypatch, tmp_path):
        module = reference()
        monkeypatch.setattr(module, "PAGE", tmp_path / "cli.md")
        assert module.main(["--check"]) == 1
        assert module.main([]) == 0 and module.main(["--check"]) == 0

    @pytest.mark.parametrize("command", ["compress", "eval", "push", "methods"])
    def test_has_every_option_that_the_command_takes(self, command):
        page = reference().page()
        section = page[page.index(f"## grail {command}\n") :].split("\n## ")[0]
        for parameter in typer.main.get_command(app).commands[command].params:
            assert all(name in section for name in parameter.opts if name.startswith("-")), parameter.name


def test_citation_names_the_paper_and_its_authors():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys() and found["cff-version"] == "1.2.0"
    assert found["type"] == "software" and str(found["version"]) in (ROOT / "CHANGELOG.md").read_text()
    paper = found["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Tang", "Wang", "Thiele", "Saukh"]
    assert paper["type"] == "conference-paper" and paper["year"] == 2026 and paper["title"].startswith("GRAIL: ")
    assert all("name" in author or "family-names" in author for author in found["authors"])


def test_the_figure_is_sound_xml_and_follows_the_theme():
    from xml.etree import ElementTree

    root = ElementTree.parse(ROOT / "docs" / "method.svg").getroot()
    assert root.tag.endswith("svg") and root.get("viewBox")
    assert "prefers-color-scheme: dark" in (ROOT / "docs" / "method.svg").read_text()
