"""Calibration and evaluation text: where it comes from, how it is cut into windows, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from grail.calibration import evaluation_windows, load_calibration
from grail.calibration.sources import documents
from grail.errors import GrailError
from tests.tiny import tiny_calibration

EOS, BOS = 9999, 9998


class Numbers:
    """A tokenizer whose tokens are the numbers in the text; adds a BOS unless told not to, as Llama's does."""

    eos_token_id = EOS

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[BOS] * add_special_tokens + [int(word) for word in text.split()])


class Characters:
    """One token per character, so that windows can be read back as text."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(c) for c in text])


def calibrate(source, tokenizer=None, samples=4, seq_len=8, seed=0, vocabulary=10_000):
    made = tokenizer or Numbers()
    return load_calibration(source, lambda: made, vocabulary, samples=samples, seq_len=seq_len, seed=seed)


def evaluate(source, tokenizer=None, seq_len=8, samples=None, vocabulary=10_000):
    made = tokenizer or Numbers()
    return evaluation_windows(str(source), lambda: made, vocabulary, seq_len=seq_len, samples=samples)


def no_tokenizer():
    pytest.fail("token ids need no tokenizer")


def numbered_text(file: Path, count: int = 1000) -> Path:
    file.write_text("".join(f"{i}\n" for i in range(count)), encoding="utf-8")
    return file


def records(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def refusal_of(source, **options) -> str:
    with pytest.raises(GrailError) as refusal:
        calibrate(source, **options)
    message = str(refusal.value)
    assert "\n" not in message
    return message


BUILTIN = pytest.mark.parametrize("source", ["builtin", "docstrings"])


class TestBuiltin:
    def test_docstrings_are_long_distinct_and_of_the_standard_library(self):
        texts = [*documents("docstrings", "evaluation"), *documents("docstrings", "calibration")]
        assert all(len(text) >= 400 for text in documents("docstrings", "evaluation"))
        assert len(set(texts)) == len(texts) > 100
        assert any("ArgumentParser" in text for text in texts)

    def test_a_python_without_sources_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(GrailError, match=r"^docstrings: this Python comes without"):
            documents("docstrings", "calibration")

    def test_topics_are_sorted_and_every_fifth_is_held_out(self):
        from pydoc_data.topics import topics

        texts = [text for _, text in sorted(topics.items())]
        assert list(documents("builtin", "evaluation")) == texts[::5]
        rest = iter(text for i, text in enumerate(texts) if i % 5)
        calibration = list(documents("builtin", "calibration"))
        assert len(calibration) >= 0.7 * len(texts)
        for text in calibration:
            first = text.split("\n\n")[0]
            assert any(first in candidate for candidate in rest), "topics keep their order"

    @BUILTIN
    def test_no_held_out_paragraph_stands_in_calibration_text(self, source):
        held = {p for text in documents(source, "evaluation") for p in text.split("\n\n") if p.strip()}
        assert not [p for text in documents(source, "calibration") for p in text.split("\n\n") if p in held]

    @BUILTIN
    def test_no_held_out_topic_is_also_a_calibration_topic(self, source):
        calibration, held = set(documents(source, "calibration")), set(documents(source, "evaluation"))
        assert [text[:40] for text in calibration & held] == []

    def test_windows_default_to_512_tokens(self):
        windows = calibrate("builtin", Characters(), samples=3, seq_len=None, vocabulary=2**21)
        assert windows.ids.shape == (3, 512) and windows.ids.dtype == torch.int64
        assert windows.tokens == 3 * 512 and windows.source == "builtin"

    def test_windows_are_stretches_of_the_calibration_text(self):
        whole = "\n\n".join(documents("builtin", "calibration"))
        windows = calibrate("builtin", Characters(), samples=20, seq_len=100, vocabulary=2**21)
        assert all("".join(map(chr, row)) in whole for row in windows.ids.tolist())

    def test_evaluation_windows_are_the_held_out_text_in_order(self):
        whole = "\n\n".join(documents("builtin", "evaluation"))
        windows = evaluate("builtin", Characters(), seq_len=1000, vocabulary=2**21)
        assert len(windows.ids) == len(whole) // 1000
        assert "".join(map(chr, windows.ids.flatten().tolist())) == whole[: len(whole) // 1000 * 1000]


class TestWindows:
    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    def test_the_seed_decides(self, tmp_path, suffix):
        file = tmp_path / f"text{suffix}"
        numbered_text(file) if suffix == ".txt" else records(file, [str(i) for i in range(1000)])
        first, again, other = (calibrate(str(file), samples=16, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
        assert not torch.equal(first.ids, other.ids) and first.sha256 != other.sha256

    def test_more_samples_begin_with_the_same_windows(self, tmp_path):
        file = str(numbered_text(tmp_path / "text.txt"))
        assert torch.equal(calibrate(file, samples=32).ids[:16], calibrate(file, samples=16).ids)

    def test_offsets_are_spread_and_not_multiples_of_the_length(self, tmp_path):
        windows = calibrate(str(numbered_text(tmp_path / "text.txt")), samples=64)
        starts = windows.ids[:, 0]
        assert len(starts.unique()) > 48 and starts.min() < 200 and starts.max() > 700
        assert (starts % 8 != 0).any()
        assert torch.equal(windows.ids, starts[:, None] + torch.arange(8))

    def test_no_bos_is_added(self, tmp_path):
        file = numbered_text(tmp_path / "text.txt")
        assert (calibrate(str(file), samples=64).ids != BOS).all()
        assert (evaluate(file).ids != BOS).all()

    def test_one_window_is_enough_text(self, tmp_path):
        file = records(tmp_path / "text.jsonl", ["10 11 12 13", "20 21 22"])
        assert calibrate(str(file), samples=3, seq_len=8).ids.tolist() == [[10, 11, 12, 13, EOS, 20, 21, 22]] * 3

    def test_records_are_joined_with_eos_into_full_windows(self, tmp_path):
        texts = [f"{i} {i}" for i in range(50)]
        windows = calibrate(str(records(tmp_path / "text.jsonl", texts)), samples=64, seq_len=9)
        assert windows.ids.shape == (64, 9)
        stream = "".join(f" {i} {i} {EOS}" for i in range(50)) + " "
        for row in windows.ids.tolist():
            assert f" {' '.join(map(str, row))} " in stream

    def test_a_tokenizer_without_eos_joins_plainly(self, tmp_path):
        tokenizer = Numbers()
        tokenizer.eos_token_id = None
        file = records(tmp_path / "text.jsonl", ["10 11", "20 21"])
        assert calibrate(str(file), tokenizer, samples=1, seq_len=4).ids.tolist() == [[10, 11, 20, 21]]

    def test_blank_lines_and_unicode_line_separators_do_not_end_records(self, tmp_path):
        """JSON Lines ends records at \\n alone; U+2028 and U+0085 may stand raw inside strings."""
        file = tmp_path / "text.jsonl"
        lines = [json.dumps({"text": "1\u20282 3\x854"}, ensure_ascii=False), "", json.dumps({"text": "5 6"})]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert calibrate(str(file), samples=1, seq_len=7).ids.tolist() == [[1, 2, 3, 4, EOS, 5, 6]]

    def test_windows_line_ends_are_taken(self, tmp_path):
        file = tmp_path / "text.jsonl"
        file.write_bytes(b'{"text": "1 2"}\r\n{"text": "3 4"}\r\n')
        assert calibrate(str(file), samples=1, seq_len=5).ids.tolist() == [[1, 2, EOS, 3, 4]]


class TestHeldOut:
    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    def test_the_held_out_part_never_appears_in_calibration(self, tmp_path, suffix):
        file = tmp_path / f"text{suffix}"
        numbered_text(file) if suffix == ".txt" else records(file, [f"{i}" for i in range(1000)])
        seen = set(calibrate(str(file), samples=2000).ids.flatten().tolist()) - {EOS}
        held = set(evaluate(file, seq_len=8).ids.flatten().tolist()) - {EOS}
        assert held and not held & seen
        assert len(seen) >= 850 and min(held) > max(seen)

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    def test_the_two_parts_are_the_whole(self, tmp_path, suffix):
        file = tmp_path / f"text{suffix}"
        numbered_text(file, 333) if suffix == ".txt" else records(file, [f"{i}\n" for i in range(333)])
        parts = ["".join(documents(str(file), split)) for split in ("calibration", "evaluation")]
        assert "".join(parts).split() == [str(i) for i in range(333)]
        assert len(parts[1].split()) == pytest.approx(33, abs=4)

    @pytest.mark.parametrize("text", ["", "1", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"], ids=len)
    def test_text_too_short_to_hold_out_is_all_calibration(self, tmp_path, text):
        file = tmp_path / "text.txt"
        file.write_text(text)
        assert "".join(documents(str(file), "calibration")) == text
        assert evaluate(file, seq_len=2) is None

    def test_evaluation_windows_do_not_overlap_and_the_last_partial_one_is_dropped(self, tmp_path):
        file = numbered_text(tmp_path / "text.txt")
        held = [int(word) for text in documents(str(file), "evaluation") for word in text.split()]
        for length in (7, 8, len(held)):
            windows = evaluate(file, seq_len=length)
            count = len(held) // length
            assert windows.ids.shape == (count, length)
            assert windows.ids.flatten().tolist() == held[: count * length]
            assert all(after == before + 1 for before, after in pairwise(windows.ids.flatten().tolist()))

    def test_evaluation_takes_at_most_the_asked_windows_from_the_start(self, tmp_path):
        file = numbered_text(tmp_path / "text.txt")
        assert torch.equal(evaluate(file, samples=3).ids, evaluate(file).ids[:3])
        assert len(evaluate(file, samples=10**6).ids) == len(evaluate(file).ids)

    def test_less_than_one_window_is_none(self, tmp_path):
        assert evaluate(numbered_text(tmp_path / "text.txt"), seq_len=1000) is None


class TestTokenIds:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
    def test_a_file_is_taken_as_it_is(self, tmp_path, dtype):
        ids = torch.arange(40, dtype=dtype).view(5, 8)
        save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
        windows = load_calibration(
            str(tmp_path / "ids.safetensors"), no_tokenizer, 64, samples=128, seq_len=None, seed=0
        )
        assert torch.equal(windows.ids, ids.long()) and windows.ids.dtype == torch.int64

    def test_a_file_is_cut_to_samples_and_length(self, tmp_path):
        file = str(tiny_calibration(tmp_path / "ids.safetensors", windows=8, length=32))
        whole = load_calibration(file, no_tokenizer, 64, samples=8, seq_len=32, seed=0)
        part = load_calibration(file, no_tokenizer, 64, samples=3, seq_len=10, seed=0)
        assert torch.equal(part.ids, whole.ids[:3, :10]) and part.sha256 != whole.sha256
        assert torch.equal(evaluation_windows(file, no_tokenizer, 64, seq_len=32, samples=2).ids, whole.ids[:2])

    @pytest.mark.parametrize(
        "source",
        [
            torch.arange(24).view(3, 8),
            [torch.arange(8), torch.arange(8, 16), torch.arange(16, 24)],
            [torch.arange(16).view(2, 8), torch.arange(16, 24).view(1, 8)],
            [{"input_ids": torch.arange(24).view(3, 8), "attention_mask": torch.ones(3, 8)}],
            [list(range(8)), list(range(8, 16)), list(range(16, 24))],
        ],
        ids=["tensor", "list", "batches", "dictionaries", "lists-of-numbers"],
    )
    def test_python_sources(self, source):
        windows = load_calibration(source, no_tokenizer, 64, samples=8, seq_len=None, seed=0)
        assert torch.equal(windows.ids, torch.arange(24).view(3, 8))
        assert len(load_calibration(source, no_tokenizer, 64, samples=2, seq_len=4, seed=0).ids) == 2

    def test_an_endless_iterable_is_read_only_as_far_as_needed(self):
        def endless():
            while True:
                yield torch.zeros(2, 8, dtype=torch.int64)

        assert load_calibration(endless(), no_tokenizer, 64, samples=5, seq_len=None, seed=0).ids.shape == (5, 8)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"tokens": torch.zeros(2, 8, dtype=torch.int64)},
            {"input_ids": torch.zeros(2, 8)},
            {"input_ids": torch.zeros(2, 8).bool()},
            {"input_ids": torch.zeros(8, dtype=torch.int64)},
            {"input_ids": torch.zeros(2, 2, 8, dtype=torch.int64)},
            {"input_ids": torch.zeros(0, 8, dtype=torch.int64)},
            {"input_ids": torch.zeros(8, 0, dtype=torch.int64)},
            {"input_ids": torch.zeros(8, 1, dtype=torch.int64)},
        ],
        ids=["other-name", "float", "bool", "1d", "3d", "no-windows", "no-tokens", "one-token"],
    )
    def test_a_file_of_another_shape_is_refused(self, tmp_path, tensors):
        save_file(tensors, tmp_path / "ids.safetensors")
        message = refusal_of(str(tmp_path / "ids.safetensors"))
        assert str(tmp_path / "ids.safetensors") in message and "input_ids" in message

    @pytest.mark.parametrize("bad", [-1, 64, 2**40])
    @pytest.mark.parametrize("how", ["file", "python"])
    def test_ids_beyond_the_vocabulary_are_refused_with_its_size(self, tmp_path, bad, how):
        ids = torch.zeros(4, 8, dtype=torch.int64)
        ids[2, 3] = bad
        save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
        source = str(tmp_path / "ids.safetensors") if how == "file" else ids
        assert "64" in refusal_of(source, vocabulary=64)

    def test_a_file_that_is_not_safetensors_is_named(self, tmp_path):
        file = tmp_path / "ids.safetensors"
        torch.save({"input_ids": torch.zeros(2, 8)}, file)
        assert str(file) in refusal_of(str(file))

    @pytest.mark.parametrize(
        "source",
        [
            [],
            iter(()),
            [torch.zeros(8, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)],
            torch.zeros(2, 8),
            torch.zeros(2, 3, 8, dtype=torch.int64),
            torch.tensor(3),
            ["some text"],
            [{"text": "some text"}],
            [None],
            None,
            7,
        ],
        ids=["empty", "exhausted", "ragged", "float", "3d", "0d", "text", "no-input_ids", "nones", "none", "number"],
    )
    def test_python_sources_that_are_not_windows_are_refused(self, source):
        assert "calibration" in refusal_of(source)


class TestRefusals:
    @pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing.safetensors", "wikitext-2", "missing"])
    def test_a_source_that_is_not_there(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        message = refusal_of(name)
        assert name in message
        assert name.endswith(".safetensors") or "builtin" in message

    @pytest.mark.parametrize("name", ["text.md", "text.parquet", "text"])
    def test_another_kind_of_file(self, tmp_path, name):
        (tmp_path / name).write_text("1 2 3")
        message = refusal_of(str(tmp_path / name))
        assert str(tmp_path / name) in message and ".jsonl" in message

    def test_a_folder(self, tmp_path):
        assert "folder" in refusal_of(str(tmp_path))

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    @pytest.mark.parametrize("content", ["", "\n\n \n"], ids=["empty", "blank"])
    def test_an_empty_file(self, tmp_path, suffix, content):
        file = tmp_path / f"text{suffix}"
        file.write_text(content)
        assert str(file) in refusal_of(str(file))

    def test_less_text_than_one_window_names_both_numbers(self, tmp_path):
        file = numbered_text(tmp_path / "text.txt", 5)
        message = refusal_of(str(file), seq_len=8)
        assert str(file) in message and " 5 " in message and " 8;" in message and "--seq-len" in message

    @pytest.mark.parametrize(
        "line",
        [
            "not json",
            '{"text": "cut',
            '{"content": "1 2"}',
            '{"text": 12}',
            '{"text": null}',
            '"1 2"',
            "[1]",
            "7",
            "null",
        ],
    )
    def test_a_bad_line_is_named_by_its_number(self, tmp_path, line):
        file = tmp_path / "text.jsonl"
        file.write_text(f'{{"text": "1 2"}}\n\n{{"text": "3"}}\n{line}\n{{"text": "4"}}\n')
        message = refusal_of(str(file))
        assert str(file) in message and "line 4" in message and "text" in message

    def test_a_line_nested_too_deeply_is_named_by_its_number(self, tmp_path):
        file = tmp_path / "text.jsonl"
        file.write_text('{"text": "1 2"}\n' + "[" * 200_000 + "\n")
        assert "line 2" in refusal_of(str(file))

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    @pytest.mark.parametrize("content", [b"caf\xe9 au lait", "text".encode("utf-16")], ids=["latin-1", "utf-16"])
    def test_text_that_is_not_utf8(self, tmp_path, suffix, content):
        file = tmp_path / f"text{suffix}"
        file.write_bytes(content)
        message = refusal_of(str(file))
        assert str(file) in message and "UTF-8" in message


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """`datasets.load_dataset` answers with numbered rows and records what was asked."""
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            return datasets.Dataset.from_list([{"text": str(i)} for i in range(2000)])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    def test_wikitext2_is_the_raw_configuration_joined_by_blank_lines(self, hub):
        assert calibrate("wikitext2").ids.shape == (4, 8)
        assert evaluate("wikitext2").ids[0].tolist() == list(range(8))
        assert [args for args, _ in hub] == [("Salesforce/wikitext", "wikitext-2-raw-v1")] * 2
        assert [kwargs["split"] for _, kwargs in hub] == ["train", "test"]

    def test_c4_reads_one_file_of_each_split_joined_with_eos(self, hub):
        assert calibrate("c4").ids.shape == (4, 8)
        assert evaluate("c4").ids[0].tolist() == [0, EOS, 1, EOS, 2, EOS, 3, EOS]
        assert all(args[0] == "allenai/c4" for args, _ in hub)
        assert [list(kwargs["data_files"].values()) for _, kwargs in hub] == [
            ["en/c4-train.00000-of-01024.json.gz"],
            ["en/c4-validation.00000-of-00008.json.gz"],
        ]

    def test_nothing_may_run_a_loading_script(self, hub):
        calibrate("wikitext2")
        calibrate("c4")
        assert not any(kwargs.get("trust_remote_code") for _, kwargs in hub)

    @pytest.mark.parametrize("source", ["wikitext2", "c4"])
    def test_without_a_network_one_sentence_names_the_alternative(self, monkeypatch, source):
        datasets = pytest.importorskip("datasets")

        def load_dataset(*args, **kwargs):
            raise ConnectionError("Couldn't reach the Hub\nTraceback of another library")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = refusal_of(source)
        assert source in message and "hub" in message and ".txt" in message

    def test_ptb_is_refused_in_one_sentence(self):
        message = refusal_of("ptb")
        assert "ptb" in message and "script" in message and ".txt" in message
