"""How much each calibration token counts, and calibration on several texts at once."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from grail.calibration import evaluation_windows, load_calibration
from grail.calibration.lengths import default_length
from grail.calibration.mixture import shares
from grail.cli import app
from grail.errors import GrailError
from tests.test_calibration import Numbers, no_tokenizer, numbered_text
from tests.test_stream_target import compressed, off, tensors_of, windows
from tests.test_torchrun import several
from tests.tiny import tiny_checkpoint, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")
STREAM = {"target": "stream", "ridge": 0.01, "alpha": 0.6}
TARGETS = {"hidden": {"target": "hidden", "ridge": 0.01}, "stream": STREAM, "chosen": {"ridge": "auto"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("source") / "model"))


def weighted(ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "weights": weights}


def differs(one, other) -> float:
    """The largest difference of two folders' tensors."""
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    return max(off(a[name], b[name]) for name in a)


class TestWeights:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("method", ["wanda-sp", "slimgpt", "gram", "fold"])
    def test_of_nothing_leave_a_window_out_and_of_two_count_it_twice(self, source, tmp_path, method, target):
        """With a choice by site the last windows decide, of which one counts nothing and one twice."""
        ids, weights = windows(), torch.ones(13, 29)
        weights[2], weights[5], weights[12], weights[11] = 0, 2, 0, 2
        order = [0, 1, 3, 4, 5, 5, *range(6, 11), 11, 11]
        options = {"method": method, "samples": 11} | TARGETS[target]
        found = compressed(source, tmp_path / "weights", weighted(ids, weights), **options)
        plain = compressed(source, tmp_path / "rows", ids[order], **options)
        assert differs(tmp_path / "weights", tmp_path / "rows") < 2e-4
        assert found["calibration"]["weighted"] and not plain["calibration"]["weighted"]
        errors = [[site[key] for site in run["sites"]] for run in (found, plain) for key in ("error_after", "alpha")]
        assert errors[0] == pytest.approx(errors[2], rel=1e-2, abs=1e-4)
        if target != "hidden":
            assert errors[1] == pytest.approx(errors[3], rel=1e-2, abs=1e-3)

    def test_matter_and_their_scale_does_not(self, source, tmp_path):
        ids, weights = windows(), torch.rand(13, 29, generator=torch.Generator().manual_seed(0))
        for name, some in {"1": weights, "8": 8 * weights, "ones": torch.ones(13, 29)}.items():
            compressed(source, tmp_path / name, weighted(ids, some), **STREAM)
        compressed(source, tmp_path / "none", ids, **STREAM)
        assert differs(tmp_path / "1", tmp_path / "8") < 1e-5 < 1e-3 < differs(tmp_path / "1", tmp_path / "ones")
        assert differs(tmp_path / "ones", tmp_path / "none") < 1e-6

    def test_come_with_a_file_or_with_batches(self, source, tmp_path):
        ids, weights = windows(), torch.rand(13, 29)
        save_file(weighted(ids, weights), tmp_path / "ids.safetensors")
        batches = [weighted(a, b) for a, b in zip(ids.split(4), weights.split(4))]
        for name, given_ids in {"file": str(tmp_path / "ids.safetensors"), "batches": iter(batches)}.items():
            compressed(source, tmp_path / name, given_ids, **STREAM)
        assert differs(tmp_path / "file", tmp_path / "batches") == 0

    def test_of_some_batches_leave_the_others_at_one(self):
        batches = [{"input_ids": torch.ones(2, 5).long()}, weighted(torch.ones(3, 5).long(), torch.full((3, 5), 4.0))]
        found = load_calibration(batches, no_tokenizer, 64, samples=5, seq_len=4, seed=0)
        assert torch.equal(found.weights * 14 / 5, torch.tensor([1.0, 1, 4, 4, 4])[:, None].expand(5, 4))
        assert found.weights.mean() == pytest.approx(1)

    def test_are_shared_by_processes(self, source, tmp_path):
        ids, weights = windows(), torch.rand(13, 29, generator=torch.Generator().manual_seed(2))
        save_file(weighted(ids, weights), tmp_path / "ids.safetensors")
        flags = f"--model {source} --calibration {tmp_path / 'ids.safetensors'} --ratio 0.4 --quiet --eval none"
        stream = ["--target", "stream", "--samples", "11", *flags.split()]
        one, two = tmp_path / "one", tmp_path / "two"
        assert CliRunner().invoke(app, ["compress", *stream, "--output", str(one)]).exit_code == 0
        assert several(2, "grail", "compress", *stream, "--output", str(two)).returncode == 0
        assert differs(one, two) < 1e-3

    @pytest.mark.parametrize(
        "said, options, weights",
        [
            ("weights of tokens are not offered with --bias", {"bias": True}, torch.ones(13, 29)),
            ("not offered with --method flap", {"method": "flap", "bias": False}, torch.ones(13, 29)),
            ("0 or more, and not all 0", {}, torch.zeros(13, 29)),
            ("0 or more, and not all 0", {}, torch.full((13, 29), -1.0)),
            ("must be finite", {}, torch.full((13, 29), float("nan"))),
            (r"weights \[13, 28\] do not fit input_ids \[13, 29\]", {}, torch.ones(13, 28)),
            (r"weights \[12, 29\] do not fit", {}, torch.ones(12, 29)),
        ],
    )
    def test_that_are_none_are_refused(self, source, tmp_path, said, options, weights):
        save_file(weighted(windows(), weights), tmp_path / "ids.safetensors")
        with pytest.raises(GrailError, match=said) as refusal:
            compressed(source, tmp_path / "out", str(tmp_path / "ids.safetensors"), **options)
        assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.fixture
def texts(tmp_path):
    """Two texts of numbers, the second without any of the first."""
    one, two = numbered_text(tmp_path / "one.txt", 400), tmp_path / "two.txt"
    two.write_text("".join(f"{i}\n" for i in range(5000, 5200)), encoding="utf-8")
    return str(one), str(two)


def load(source: str, samples: int, trial: int = 0, seq_len: int | None = 8):
    asked = {"samples": samples, "trial": trial, "seq_len": seq_len, "seed": 3}
    return load_calibration(source, Numbers, 10_000, **asked)


class TestMixtures:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(count=st.integers(0, 50), parts=st.integers(1, 7))
    def test_shares_are_equal_but_for_one(self, count, parts):
        found = shares(count, parts)
        assert sum(found) == count and max(found) - min(found) <= 1 and sorted(found, reverse=True) == found

    @pytest.mark.parametrize("trial, few", [(0, [0, 0]), (1, [1, 1]), (5, [3, 2])])
    def test_take_as_many_windows_of_each(self, texts, trial, few):
        found = load("+".join(texts), 7, trial)
        alone = [load(text, *counts) for text, counts in zip(texts, zip([4, 3], few))]
        assert torch.equal(found.ids, torch.cat([windows.ids for windows in alone]))
        assert (found.trial is None) == (not trial)
        if trial:
            assert torch.equal(found.trial, torch.cat([windows.trial for windows in alone]))

    @pytest.mark.parametrize("samples", [None, 1, 7, 1000])
    def test_are_evaluated_on_as_many_of_each(self, texts, samples):
        asked = {"seq_len": 4, "held_out": True}
        source = "+".join(texts)
        found = evaluation_windows(source, Numbers, 10_000, samples=samples, **asked)
        alone = [evaluation_windows(text, Numbers, 10_000, **asked).ids for text in texts]
        least = min(map(len, alone))
        wanted = {None: [least] * 2, 1: [1, 0], 7: [4, 3], 1000: [least] * 2}[samples]
        parts = [ids[:count] for ids, count in zip(alone, wanted)]
        assert 3 < least < len(alone[0])
        assert torch.equal(found.ids, torch.cat(parts))
        again = evaluation_windows(source, Numbers, 10_000, samples=len(found.ids), **asked)
        assert again.sha256 == found.sha256, "grail eval repeats what grail.json records"

    def test_take_the_shortest_default_length(self, texts):
        assert default_length(f"builtin+{texts[0]}") == default_length(f"{texts[0]}+builtin") == 512
        assert default_length("+".join(texts)) == default_length("c4") == 2048
        with pytest.raises(GrailError, match="less than one window of 512"):
            load(f"{texts[0]}+builtin", 2, seq_len=None)

    def test_are_not_meant_by_a_file_with_a_plus(self, texts, tmp_path):
        (tmp_path / "one+two.txt").write_text("".join(f"{i}\n" for i in range(7000, 7100)), encoding="utf-8")
        assert load(str(tmp_path / "one+two.txt"), 3).ids.min() >= 7000

    @pytest.mark.parametrize(
        "more, samples, said", [("nowhere", 4, "nowhere: no such file"), ("", 1, "--samples 1 is")]
    )
    def test_that_cannot_be_had_are_refused(self, texts, more, samples, said):
        with pytest.raises(GrailError, match=said) as refusal:
            load("+".join([*texts, more] if more else texts), samples)
        assert "\n" not in str(refusal.value)

    def test_with_weights_are_refused(self, texts, tmp_path):
        save_file(weighted(windows(), torch.ones(13, 29)), tmp_path / "ids.safetensors")
        with pytest.raises(GrailError, match="texts that are joined cannot have weights"):
            load(f"{texts[0]}+{tmp_path / 'ids.safetensors'}", 4)

    def test_a_whole_run_and_its_evaluation(self, source, tmp_path, monkeypatch):
        """Named by relative paths, evaluated from elsewhere."""
        monkeypatch.chdir(tmp_path)
        for name in ("one", "two"):
            words = " ".join(f"w{3 + (i * len(name) + i // 7) % 60}" for i in range(900))
            (tmp_path / f"{name}.txt").write_text(words.replace(" w3 ", "\nw3 "), encoding="utf-8")
        flags = f"--model {source} --calibration one.txt+two.txt --seq-len 16 --samples 20 --target stream --quiet"
        ended = CliRunner().invoke(app, ["compress", *flags.split(), "--output", "out"])
        assert ended.exit_code == 0, ended.output
        told = json.loads((tmp_path / "out/grail.json").read_text())
        assert told["calibration"]["windows"] == 20 and told["calibration"]["trial_windows"] == 2
        monkeypatch.chdir("/")
        again = CliRunner().invoke(app, ["eval", str(tmp_path / "out"), "--json", "--quiet"])
        assert again.exit_code == 0, again.output
        model = json.loads(again.stdout)["models"][str(tmp_path / "out")]
        assert model["perplexity"] == pytest.approx(told["evaluation"]["perplexity"]["compressed"])
