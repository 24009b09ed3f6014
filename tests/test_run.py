"""Runs as Python sees them: any calibration source, reports that equal the files, text that is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import grail
from grail.evaluate import evaluate
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("reopen_here")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    return tiny_tokenizer(tiny_checkpoint(tmp_path / "source"))


def windows(count=8):
    return torch.randint(64, (count, 32), generator=torch.Generator().manual_seed(0))


SOURCES = {
    "tensor": windows,
    "list": lambda: list(windows()),
    "generator": lambda: (row for row in windows()),
    "batches": lambda: iter([{"input_ids": windows(4)}, {"input_ids": windows()[4:]}]),
    "loader": lambda: iter(torch.utils.data.DataLoader(windows(), batch_size=3)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_any_calibration_gives_the_same_result(tmp_path, source, kind):
    first = grail.compress(source, output=tmp_path / "first", calibration=windows(), device=torch.device("cpu"))
    second = grail.compress(source, output=tmp_path / "second", calibration=SOURCES[kind]())
    assert first.sites == second.sites


def test_the_report_is_the_file_also_for_a_module(tmp_path):
    report = grail.compress(tiny_model(), output=tmp_path / "out", calibration=windows())
    written = json.loads((tmp_path / "out" / "grail.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert (written["recipe"]["model"], written["source"]["id"]) == ("LlamaForCausalLM", "LlamaForCausalLM")


def test_asked_and_reached_ratio_by_kind(tmp_path, source):
    report = grail.compress(source, output=tmp_path / "out", calibration=windows(), attn_ratio=0, mlp_ratio=0.5)
    assert report.ratio["heads"] == {"asked": 0, "reached": 0.0}
    assert report.ratio["channels"] == {"asked": 0.5, "reached": 0.5}
    attention, mlp = 2 * 6 * 8 * 48, 3 * 40 * 48  # query rows and output columns; three matrices
    assert report.ratio["overall"] == {"asked": None, "reached": pytest.approx(mlp / 2 / (attention + mlp))}


def test_the_reference_kernels_can_be_asked_for(tmp_path, source, monkeypatch):
    monkeypatch.setenv("GRAIL_KERNELS_BACKEND", "reference")
    report = grail.compress(source, output=tmp_path / "out", calibration=windows())
    assert all(site["rcond"] is None for site in report.sites)
    monkeypatch.setenv("GRAIL_KERNELS_BACKEND", "nonsense")
    with pytest.raises(grail.GrailError, match="nonsense"):
        grail.compress(source, output=tmp_path / "other", calibration=windows())


def test_an_unknown_flag_is_named(tmp_path, source):
    with pytest.raises(grail.GrailError, match="ratoi"):
        grail.compress(source, output=tmp_path / "out", ratoi=0.3)


def test_nothing_to_remove_needs_no_tokenizer(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain")
    report = grail.compress(plain, output=tmp_path / "out", ratio=0.0)
    assert report.evaluation is None


def test_a_broken_tokenizer_is_refused_before_work(tmp_path, source):
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(grail.GrailError, match="tokenizer"):
        grail.compress(source, output=tmp_path / "out", calibration=windows())


def test_only_the_held_out_tenth_of_the_calibration_file_is_evaluated_but_all_of_another(tmp_path, source):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("\n".join(f"w{3 + i % 60} " * 20 for i in range(200)))
    other.write_text(text.read_text())
    held = grail.compress(source, output=tmp_path / "a", calibration=text, samples=8, seq_len=16).evaluation
    whole = grail.compress(
        source, output=tmp_path / "b", calibration=text, eval=other, samples=8, seq_len=16
    ).evaluation
    assert held["windows"] == pytest.approx(whole["windows"] / 10, abs=2)
    assert (held["held_out"], whole["held_out"]) == (True, False)
    for folder, entry in (("a", held), ("b", whole)):
        (again,) = evaluate(str(tmp_path / folder))["models"].values()
        assert again["perplexity"] == pytest.approx(entry["perplexity"]["compressed"], rel=1e-6)
    assert evaluate(str(tmp_path / "a"), seq_len=8)["windows"] >= 2 * held["windows"], "all windows of the new length"


def test_eval_of_token_ids_honours_the_length(tmp_path, source):
    file = str(tiny_calibration(tmp_path / "ids.safetensors"))
    assert evaluate(str(source), data=file, seq_len=16)["seq_len"] == 16
    with pytest.raises(grail.GrailError, match="longer"):
        evaluate(str(source), data=file, seq_len=64)


def test_speed_and_sample_of_two_models(tmp_path, source):
    grail.compress(source, output=tmp_path / "out", calibration=windows())
    file = str(tiny_calibration(tmp_path / "ids.safetensors"))
    found = evaluate(str(tmp_path / "out"), data=file, against=str(source), speed=True, prompt="w5 w6")["models"]
    for entry in found.values():
        assert entry["prefill tokens/s"] > 0 and entry["decode tokens/s"] > 0
        assert entry["sample"].startswith("w5 w6")
    small, dense = found.values()
    assert small["parameters"] < dense["parameters"]


def test_a_separate_head_that_differs_is_not_tied(tmp_path):
    """Transformers does not tie when both tensors are stored and differ, whatever the config says."""
    folder = tiny_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * -2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = grail.compress(folder, output=tmp_path / "out", calibration=windows())
    assert report.reopened["logit_difference"] < 1e-5


def test_the_carrier_keeps_what_the_source_class_assumed(tmp_path):
    """Keys that config.json leaves to LlamaConfig's defaults must not fall to MistralConfig's."""
    folder = tiny_checkpoint(tmp_path / "source", num_key_value_heads=6)
    config = json.loads((folder / "config.json").read_text())
    for key in ("max_position_embeddings", "rms_norm_eps"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    grail.compress(folder, output=tmp_path / "out", calibration=windows(), attn_ratio=1 / 6)
    written = grail.load(tmp_path / "out").config
    assert (written.model_type, written.max_position_embeddings, written.rms_norm_eps) == ("mistral", 2048, 1e-6)


def test_markup_in_names_is_shown_as_it_is(tmp_path, capsys):
    from grail.terminal import TerminalProgress

    progress = TerminalProgress()
    progress.say("a[bold]x [/b]")
    progress.warn("q[/b]m")
    list(progress.layers("evaluating [/b]")(range(2)))
    shown = capsys.readouterr().err
    assert "a[bold]x [/b]" in shown and "q[/b]m" in shown


def test_readme_has_no_placeholders():
    assert "@@" not in (ROOT / "README.md").read_text()
