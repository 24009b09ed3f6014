"""Files, folders and words of a command line that vision runs and reports were wrong about, each by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import typer
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

import grail
from grail.calibration.image_files import MOST_NAMES
from grail.calibration.images import open_images
from grail.calibration.processor import preprocessing_of
from grail.checkpoint.journal import Journal
from grail.checkpoint.reader import read_json
from grail.checkpoint.writer import OutputFolder
from grail.cli import app
from grail.documents import about
from grail.errors import GrailError
from grail.evaluation.zero_shot import read_lines
from grail.families import open_family
from grail.guard import OneSentence, start
from grail.modules import run as of_run
from grail.modules.architecture import open_network
from grail.recipe import Recipe
from tests import tiny_hf
from tests.tiny import tiny_checkpoint

SIDE = tiny_hf.SIZE


def picture(file: Path, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def labelled(folder: Path, parts: dict[str, str], count: int = 2) -> Path:
    """parts: names of the classes, a letter each, by the name of the part."""
    for part, classes in parts.items():
        for name in classes:
            for number in range(count):
                picture(folder / part / name / f"{number}.png", ord(name) + number)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A ViT as transformers writes it, images of three classes in two parts, and what a run makes of them."""
    home = tmp_path_factory.mktemp("files")
    tiny_hf.KINDS["vit-classifier"].build().save_pretrained(home / "vit")
    (home / "vit" / "preprocessor_config.json").write_text(json.dumps(tiny_hf.PROCESSOR))
    data = str(labelled(home / "data", {"train": "abc", "test": "abc"}))
    with pytest.MonkeyPatch.context() as patch:
        here(patch)
        grail.compress(str(home / "vit"), calibration=data, method="wanda", output=str(home / "small"))
    return home


def here(patch: pytest.MonkeyPatch) -> None:
    """The check of what was written, without a fresh process."""
    again = of_run.reopen_here
    patch.setattr(of_run, "reopen", lambda folder, expected, examples: again(folder, expected, examples, None))


@pytest.fixture
def small(home, tmp_path, monkeypatch) -> Path:
    """A copy in which things may be broken, and the current folder."""
    here(monkeypatch)
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "work"))
    return Path("small")


def told(*arguments: object, code: int = 2) -> str:
    """What a command says at its end, in one line where it is refused."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    lines = done.stderr.splitlines() if code else done.stdout.splitlines()
    assert not code or sum(line.startswith("grail: ") for line in lines[-1:]) == 1
    return lines[-1]


class TestReport:
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "grail.json"])
    def test_no_file_of_a_result_is_replaced_by_its_page(self, small, name):
        before = (small / name).read_bytes()
        for folders in (["small"], ["vit/../small", "small"]):
            assert "file of the checkpoint itself" in told("report", *folders, "--output", small / name, "--overwrite")
        assert (small / name).read_bytes() == before

    def test_another_page_in_the_folder_is(self, small):
        for _ in range(2):
            told("report", "small", "--output", small / "other.html", "--overwrite", code=0)
            assert "<!DOCTYPE html>" in (small / "other.html").read_text()


class TestClasses:
    @pytest.mark.parametrize(
        ("parts", "tested"),
        [
            ({"train": "abc", "test": "ac"}, "abc"),
            ({"train": "bc", "test": "abc"}, "bca"),  # a network trained on the first knows b as 0
            ({"train": "ac", "test": "ab", "val": "abc"}, "acb"),
            ({"train": "ac", "test": "x"}, "x"),  # a folder that ImageFolder asks for where nothing is labelled
            ({"test": "bd"}, "bd"),
        ],
    )
    def test_a_class_has_the_number_that_training_gave_it(self, tmp_path, parts, tested):
        data = labelled(tmp_path / "data", parts, count=1)
        for split, part, classes in (("calibration", "train", parts.get("train")), ("test", "test", tested)):
            if part in parts:
                found = open_images(data, split=split)
                assert found.classes == list(classes)
                assert found.labels.tolist() == [classes.index(name) for name in parts[part]]

    def test_a_part_without_classes_has_no_labels(self, tmp_path):
        labelled(tmp_path, {"train": "ab"})
        picture(tmp_path / "test" / "1.png")
        assert open_images(tmp_path, split="test").labels is None


class TestImageFolders:
    def test_siblings_that_are_linked_to_one_another(self, tmp_path):
        names = [f"c{number}" for number in range(8)]
        for name in names:
            picture(tmp_path / name / "1.png")
            for other in set(names) - {name}:
                (tmp_path / name / other).symlink_to(f"../{other}")
        with pytest.raises(GrailError, match=f"under more than {MOST_NAMES} names"):
            open_images(tmp_path)

    def test_a_part_that_is_a_link_to_another(self, tmp_path):
        labelled(tmp_path, {"train": "ab"})
        (tmp_path / "test").symlink_to("train")
        assert open_images(tmp_path, split="test").count == open_images(tmp_path).count == 4


class TestArrays:
    def stored(self, file: Path, **arrays: np.ndarray) -> Path:
        np.savez(file, **arrays)
        return file

    @pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", ">u2", ">i8", "int8"])
    def test_labels_of_every_kind_of_integer(self, tmp_path, kind):
        images, labels = np.zeros((6, SIDE, SIDE, 3), np.uint8), np.arange(6).astype(kind) % 3
        found = open_images(self.stored(tmp_path / "x.npz", images=images, labels=labels))
        assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]

    def test_a_label_beyond_all_integers_is_named_as_it_is(self, tmp_path):
        images, labels = np.zeros((1, SIDE, SIDE, 3), np.uint8), np.array([2**64 - 1], np.uint64)
        with pytest.raises(GrailError, match=f"the label {2**64 - 1} is no number of a class"):
            open_images(self.stored(tmp_path / "x.npz", images=images, labels=labels))

    @pytest.mark.parametrize("turned", [lambda x: x.astype(">f4"), lambda x: x[::-1].copy()[::-1]])
    def test_arrays_in_another_order(self, turned):
        images = np.random.default_rng(0).random((4, 3, SIDE, SIDE), np.float32)
        for given in (turned(images), (turned(images), [0, 1, 0, 1]), [turned(images)]):
            found = torch.cat(list(open_images(given).batches(None, 4)))
            assert torch.equal(found, torch.from_numpy(images))

    def test_an_array_of_objects(self):
        with pytest.raises(GrailError, match="must be uint8 or float, not object"):
            open_images(np.full((1, 3, 4, 4), None))

    @pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4 cut off"])
    def test_an_archive_that_is_none_holds_no_pickles(self, tmp_path, content):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(GrailError, match=r"x\.npz is damaged or no \.npz archive"):
            open_images(tmp_path / "x.npz")

    def test_an_array_of_objects_in_an_archive(self, tmp_path):
        file = self.stored(tmp_path / "x.npz", images=np.array([None, 1], object))
        with pytest.raises(GrailError, match="pickled objects"):
            open_images(file)


class TestCompressedAlready:
    @pytest.mark.parametrize(
        ("model", "sentence"),
        [("small", "--model small is compressed already"), ("timm", "names no network"), ("timm/", "names no network")],
    )
    def test_what_nothing_can_be_built_from(self, small, model, sentence):
        assert sentence in told("compress", "--model", model, "--calibration", "data", "--output", "again")
        with pytest.raises(GrailError, match=sentence):
            grail.compress(model, calibration="data", output="again")
        assert not [left for left in Path().iterdir() if left.name.startswith("again")]


class TestWithoutData:
    def test_sizes_and_speed_are_measured(self, small):
        found = json.loads(told_json("eval", "small", "--data", "none", "--against", "vit", "--speed"))
        assert not {"data", "images"} & found.keys()
        narrow, wide = found["models"].values()
        assert narrow.keys() == {"parameters", "macs", "milliseconds"}
        assert narrow["parameters"] < wide["parameters"] and narrow["macs"] < wide["macs"]
        measured = json.loads(told_json("eval", "small", "--data", "data"))["models"]["small"]
        assert measured["macs"] == narrow["macs"]
        assert "milliseconds" in "".join(CliRunner().invoke(app, ["eval", "small", "--data", "none", "--speed"]).stdout)

    def test_a_clip(self, small):
        tiny_hf.KINDS["clip"].build().save_pretrained("clip")
        Path("clip/preprocessor_config.json").write_text(json.dumps(tiny_hf.PROCESSOR))
        found = json.loads(told_json("eval", "clip", "--data", "none", "--speed"))["models"]["clip"]
        assert found.keys() == {"parameters", "macs", "milliseconds"}

    def test_what_needs_images(self, small):
        assert "--probe" in told("eval", "small", "--data", "none", "--probe")
        config = read_json(small / "config.json")
        (small / "config.json").write_text(json.dumps(config | {"preprocessing": None}))
        assert "--speed" in told("eval", "small", "--data", "none", "--speed")
        assert json.loads(told_json("eval", "small", "--data", "none"))["models"]["small"].keys() == {"parameters"}

    def test_a_soup_is_not_chosen_by_nothing(self, small):
        asked = ["vit", "vit", "--output", "soup", "--greedy", "--data", "none"]
        assert "--greedy needs --data" in told("soup", *asked)


def told_json(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return done.stdout


NO_JSON = [
    ("initializer_range", float("inf")),
    ("initializer_range", float("nan")),
    ("pooler_act", "\ud800"),
    ("id2label", {"0": "\udfff", "1": "b"}),
    ("label2id", {"\ud800": 0, "b": 1}),
]


class TestConfigurations:
    def spoilt(self, folder: Path, **fields: object) -> Path:
        (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | fields))
        return folder

    @pytest.mark.parametrize(("field", "value"), NO_JSON, ids=str)
    def test_what_could_not_be_written_at_the_end(self, small, field, value):
        self.spoilt(Path("vit"), **{field: value})
        with pytest.raises(GrailError, match=rf"vit/config\.json: .*{field}"):
            open_network("vit", None, {})

    def test_of_a_part(self, tmp_path):
        tiny_hf.KINDS["clip"].build().save_pretrained(tmp_path)
        self.spoilt(tmp_path, logit_scale_init_value=float("-inf"))
        with pytest.raises(GrailError, match=r"config\.json: .*logit_scale_init_value"):
            open_network(str(tmp_path), None, {})

    @pytest.mark.parametrize(
        ("field", "value"), [("initializer_range", float("inf")), ("note", ["x", {"y": "\ud800"}])], ids=str
    )
    def test_of_a_language_model(self, tmp_path, field, value):
        model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)
        self.spoilt(model, **{field: value})
        with pytest.raises(GrailError, match=rf"model/config\.json: {field}.* cannot be written as JSON"):
            open_family(model)

    def test_a_label_with_the_name_of_a_field(self, small):
        self.spoilt(Path("vit"), label2id={"dtype": 1e308, "a": 1})
        with pytest.raises(GrailError, match=r"vit/config\.json"):
            open_network("vit", None, {})


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("found", "size", "field"),
        [
            ({"size": 2**31}, None, "size"),
            ({"size": {"height": 16, "width": 30000}}, None, "size"),
            ({"size": {"shortest_edge": 30000}, "crop_size": 16}, SIDE, "size"),
            ({"size": 16, "crop_size": 30000}, None, "crop_size"),
            ({"size": 1024}, 16, "size"),
            ({"size": 1024}, [16, 16], "size"),
        ],
        ids=str,
    )
    def test_sides_beyond_all_memory(self, tmp_path, found, size, field):
        file = tmp_path / "preprocessor_config.json"
        file.write_text(json.dumps(tiny_hf.PROCESSOR | found))
        with pytest.raises(GrailError, match=rf"preprocessor_config\.json: {field} is "):
            preprocessing_of(tmp_path, 3, size)

    def test_a_network_that_reads_larger_images_than_it_was_made_for(self, tmp_path):
        found = {"size": {"shortest_edge": 256}, "crop_size": {"height": 32, "width": 32}}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(tiny_hf.PROCESSOR | found))
        assert preprocessing_of(tmp_path, 3, 16).size == (32, 32)

    def test_a_run_names_the_file(self, small):
        file = Path("vit/preprocessor_config.json")
        file.write_text(json.dumps(tiny_hf.PROCESSOR | {"size": {"height": 1000, "width": 1000}}))
        said = told("compress", "--model", "vit", "--calibration", "data", "--output", "out")
        assert "vit/preprocessor_config.json: size is " in said


class TestWaiting:
    """A pipe that nobody writes to is waited for."""

    @pytest.mark.parametrize("option", ["--classes", "--templates"])
    def test_lines(self, tmp_path, option):
        os.mkfifo(tmp_path / "x.txt")
        with pytest.raises(GrailError, match=r"x\.txt is a device or a pipe"):
            read_lines(tmp_path / "x.txt", option)

    @pytest.mark.parametrize("name", ["lock", "journal.jsonl"])
    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_working_files(self, small, name, make):
        Path("out.partial").mkdir()
        make(f"out.partial/{name}")
        said = told("compress", "--model", "vit", "--calibration", "data", "--output", "out")
        assert f"out.partial/{name} is in the way" in said and "move" in said
        assert Path("out.partial", name).exists()

    def test_a_link_to_a_folder_in_a_working_folder_is_taken_away_alone(self, tmp_path):
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "file").write_text("x")
        out = OutputFolder(tmp_path / "out")
        out.partial.mkdir()
        (out.partial / "lock").touch()
        (out.partial / "store").symlink_to(tmp_path / "kept")
        with out:
            assert not os.path.lexists(out.partial / "store")
        assert (tmp_path / "kept" / "file").read_text() == "x"

    def test_a_journal_that_is_not_there(self, tmp_path):
        assert not Journal(tmp_path / "journal.jsonl").steps


class TestEvaluation:
    def test_data_that_are_missing_are_told_before_the_work(self, small, monkeypatch):
        monkeypatch.setattr(of_run, "_compressed", lambda *args, **kwargs: pytest.fail("there was work"))
        said = told("compress", "--model", "vit", "--calibration", "data", "--eval", "nope", "--output", "out")
        assert said.startswith("grail: --eval nope: no such file or folder")

    def test_a_calibration_without_a_test_part_is_no_failure(self, small):
        shutil.rmtree("data/test")
        report = grail.compress("vit", calibration="data", method="wanda", output="out")
        assert report.evaluation is None


class TestAbout:
    @pytest.mark.parametrize("folder", ["c", "the", "no"])
    @pytest.mark.parametrize("sentence", ["blocks.0.mlp: the network has no module r", "no such site"])
    def test_a_letter_of_a_sentence_is_no_folder(self, folder, sentence):
        with (
            pytest.raises(GrailError, match=rf"^{folder}/config\.json: {sentence}$"),
            about(Path(folder, "config.json")),
        ):
            raise GrailError(sentence)

    @pytest.mark.parametrize("sentence", ["c/config.json is wrong", "c/model.safetensors is cut off"])
    def test_what_is_named_already(self, sentence):
        with pytest.raises(GrailError, match=f"^{sentence}$"), about(Path("c/config.json")):
            raise GrailError(sentence)

    def test_a_folder_within_another(self):
        with pytest.raises(GrailError, match=r"^a/c is of another kind$"), about(Path("a/c/config.json")):
            raise GrailError("a/c is of another kind")

    def test_a_result_with_a_short_name(self, small):
        shutil.move("small", "e")
        config = read_json(Path("e/config.json"))
        config["sites"][0]["producers"][0]["name"] = "r"
        Path("e/config.json").write_text(json.dumps(config))
        with pytest.raises(GrailError, match=r"^e/config\.json: "):
            grail.load("e")


class TestHub:
    @pytest.fixture
    def away(self, monkeypatch):
        """No network, though nobody said so; gives whether the libraries were told."""
        asked = []

        def no_way(*args, **kwargs):
            raise OSError("no route")

        def fetch(*args, **kwargs):
            asked.append(constants.HF_HUB_OFFLINE)
            raise OSError("not in the cache")

        import datasets

        for place in (constants, datasets.config):
            monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
        for name in ("model_info", "dataset_info"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, no_way)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
        for name in ("get_dataset_split_names", "load_dataset"):
            monkeypatch.setattr(datasets, name, fetch)
        return asked

    def test_a_name_that_the_library_does_not_know_is_not_looked_for(self, away):
        with pytest.raises(GrailError, match="timm has no such network"):
            open_network("timm/nope", None, {})
        assert not away

    @pytest.mark.parametrize("what", ["weights", "images", "text"])
    def test_without_a_network_nothing_is_tried_again(self, away, what):
        from grail.calibration.sources import documents

        calls = {
            "weights": lambda: open_network("timm/test_resnet", None, {}),
            "images": lambda: open_images("hf:a/b"),
            "text": lambda: documents("wikitext2", "calibration"),
        }
        with pytest.raises(GrailError):
            calls[what]()
        assert away == [True] and not constants.HF_HUB_OFFLINE

    def test_a_refusal_is_an_answer(self, away, monkeypatch):
        def refused(*args, **kwargs):
            error = OSError("gated")
            error.response = object()
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
        with pytest.raises(GrailError):
            open_network("timm/test_resnet", None, {})
        assert away == [False]


class TestEmptyWords:
    @pytest.mark.parametrize(
        ("command", "named"),
        [
            (["compress", "--model", "vit", "--output", "out", "--calibration", ""], "--calibration"),
            (["compress", "--model", "vit", "--output", "out", "--eval", ""], "--eval"),
            (["compress", "--model", "vit", "--output", "out", "--target", ""], "--target"),
            (["compress", "--model", "vit", "--output", ""], "--output"),
            (["compress", "--model", "x/y", "--output", "out", "--calibration", ""], "--calibration"),
            (["plan", "--model", "x/y", "--eval", ""], "--eval"),
            (["eval", "small", "--data", ""], "--data"),
            (["eval", "small", "--against", ""], "--against"),
            (["eval", ""], "PATH"),
            (["soup", "a", "", "--output", "out"], "INPUTS"),
            (["report", "small", "--output", ""], "--output"),
        ],
        ids=str,
    )
    def test_on_the_command_line(self, small, command, named):
        assert told(*command).startswith(f"grail: {named} is empty")

    @pytest.mark.parametrize("option", ["calibration", "eval", "target"])
    def test_in_a_recipe_file(self, small, option):
        options = {"model": "vit", "calibration": "data", "output": "out"} | {option: ""}
        Path("recipe.yaml").write_text("\n".join(f'{name}: "{value}"' for name, value in options.items()))
        assert f"recipe.yaml: --{option} is empty" in told("run", "recipe.yaml")

    @pytest.mark.parametrize("flags", [{"calibration": ""}, {"eval": ""}, {"output": "a\0b"}, {"target": ""}], ids=str)
    def test_in_python(self, home, flags):
        (name,) = flags
        with pytest.raises(GrailError, match=f"--{name} (is empty|has a NUL character)"):
            grail.compress(str(home / "vit"), **{"output": "out"} | flags)
        with pytest.raises(GrailError, match=f"--{name} (is empty|has a NUL character)"):
            Recipe(model="m", **flags)


class TestOutput:
    def test_a_name_that_no_file_can_have(self):
        with pytest.raises(GrailError, match="--output has a NUL character"):
            OutputFolder("a\0b")

    def test_a_link_to_itself_is_told_before_the_work(self, small):
        Path("out").symlink_to("out")
        said = told("compress", "--model", "vit", "--calibration", "data", "--output", "out")
        assert "is a link that leads to itself" in said
        assert not Path("out.partial").exists() and Path("out").is_symlink()


class TestSignals:
    @pytest.fixture(autouse=True)
    def as_before(self):
        before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
        yield
        for number, handler in before:
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_request_to_end_is_treated_like_an_interruption(self, number):
        signal.signal(number, signal.SIG_DFL)
        start(True, 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)

    def test_nohup_is_left_as_it_is(self):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        start(True, 0)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def test_an_interruption_before_the_command_begins(self):
        app = typer.Typer(cls=OneSentence)

        @app.command()
        def stops() -> None:
            raise KeyboardInterrupt

        app.command("other")(stops)
        done = CliRunner().invoke(app, ["stops"])
        assert (done.exit_code, done.stderr) == (130, "grail: interrupted; nothing new was kept\n")

    def test_an_interruption_while_it_is_imported(self):
        code = (
            "import sys\n"
            "class Stops:\n"
            "    def find_spec(self, name, *more):\n"
            "        if name == 'grail.cli': raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Stops())\n"
            "from grail.__main__ import main; main()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (130, "grail: interrupted; nothing new was kept\n")
        project = Path(grail.__file__).parents[1] / "pyproject.toml"
        assert tomllib.loads(project.read_text())["project"]["scripts"]["grail"] == "grail.__main__:main"
