"""Code in a source folder is never run, and never reaches a result: nobody who compresses a model agreed to it.

The format `grail` asks for trust_remote_code; what is trusted must be GRAIL's own class file and nothing else.
"""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

import grail
from grail.checkpoint import reopen
from grail.convert import convert
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_tokenizer

FORMATS = ("uniform", "grail", "padded")
MODEL_TYPES = ("llama", "qwen2")  # qwen2's tokenizer configuration is written anew when the model type changes


def plant(folder, mark):
    """A tokenizer with code of its own, which leaves a mark when it is run."""
    (folder / "tokenizer_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n\nclass Evil:\n    pass\n")
    for name, classes in {
        "tokenizer_config.json": {"AutoTokenizer": [None, "tokenizer_evil.Evil"]},
        "config.json": {"AutoModel": "tokenizer_evil.Evil", "AutoTokenizer": [None, "tokenizer_evil.Evil"]},
    }.items():
        pipelines = {"text-generation": {"impl": "someone/repository--pipeline.Evil"}}
        held = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(held | {"auto_map": classes, "custom_pipelines": pipelines}))


@pytest.fixture
def bench(tmp_path):
    """Make a source with planted code; returns (source, mark, compress options)."""

    def make(model_type="llama"):
        source = tiny_tokenizer(tiny_checkpoint(tmp_path / "source", model_type))
        plant(source, tmp_path / "mark")
        calibration = tiny_calibration(tmp_path / "calibration.safetensors")
        return source, tmp_path / "mark", {"calibration": str(calibration), "method": "mag-sp", "eval": "none"}

    return make


def assert_no_code(folder, mark):
    own = ["modeling_grail.py"] if (folder / "modeling_grail.py").exists() else []
    assert [file.name for file in folder.rglob("*.py")] == own
    config, tokenizer = (json.loads((folder / n).read_text()) for n in ("config.json", "tokenizer_config.json"))
    assert set(config.get("auto_map", {})) == ({"AutoConfig", "AutoModelForCausalLM"} if own else set())
    assert "auto_map" not in tokenizer and "custom_pipelines" not in config | tokenizer
    assert not mark.exists(), "code of the source was run"


def test_compress_in_the_format_that_asks_for_trust(bench, tmp_path):
    """With the reopening check in a process of its own, and as a user opens the result."""
    source, mark, options = bench()
    report = grail.compress(source, output=tmp_path / "out", format="grail", **options)
    assert report.reopened["token_ids_equal"] is True
    assert_no_code(tmp_path / "out", mark)
    before = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    after = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert after(reopen.SAMPLE).input_ids == before(reopen.SAMPLE).input_ids and not mark.exists()


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_format(bench, tmp_path, reopen_here, model_type, asked):
    source, mark, options = bench(model_type)
    grail.compress(source, output=tmp_path / "out", format=asked, **options)
    assert_no_code(tmp_path / "out", mark)


@pytest.mark.parametrize("to", FORMATS)
def test_convert(bench, tmp_path, reopen_here, to):
    """A folder that came from someone else in a format of GRAIL's, with code planted in it."""
    source, mark, options = bench("qwen2")
    first = "padded" if to == "grail" else "grail"
    grail.compress(source, output=tmp_path / "small", format=first, **options)
    held = json.loads((tmp_path / "small" / "config.json").read_text())
    plant(tmp_path / "small", mark)
    if first == "grail":
        (tmp_path / "small" / "modeling_grail.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
        assert held["auto_map"]
    convert(tmp_path / "small", tmp_path / "out", to=to)
    assert_no_code(tmp_path / "out", mark)


def change_class_file(folder, mark):
    with open(folder / "modeling_grail.py", "a") as file:
        file.write(f"open({str(mark)!r}, 'w').close()\n")


def change_auto_map(folder, mark):
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass GrailLlamaConfig: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "evil.GrailLlamaConfig"
    (folder / "config.json").write_text(json.dumps(config))


def add_generation_code(folder, mark):
    """transformers runs this file of a trusted folder by itself."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef generate(): pass\n")


def add_tokenizer_map(folder, mark):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "someone/repository--tokenizer.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


DAMAGE = {
    r"modeling_grail\.py is not GRAIL's": change_class_file,
    r"names code.*evil\.GrailLlamaConfig": change_auto_map,
    r"holds code.*custom_generate/generate\.py": add_generation_code,
    r"names code.*someone/repository": add_tokenizer_map,
}


@pytest.mark.parametrize("complaint", DAMAGE, ids=[change.__name__ for change in DAMAGE.values()])
def test_the_check_trusts_nothing_but_the_class_file(bench, tmp_path, reopen_here, monkeypatch, complaint):
    source, mark, options = bench()
    calls = []
    monkeypatch.setattr(reopen, "verify", lambda *args, **kwargs: calls.append((args, kwargs)))
    grail.compress(source, output=tmp_path / "out", format="grail", **options)
    DAMAGE[complaint](tmp_path / "out", mark)
    (_, _, _, dtype, _, _), named = calls[0]
    with pytest.raises(RuntimeError, match=complaint):
        reopen.check(tmp_path / "out", tmp_path, dtype, **named)
    assert not mark.exists()
