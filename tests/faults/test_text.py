"""Calibration and evaluation text, token ids, and the tokenizer that reads it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from grail.calibration import evaluation_windows, load_calibration
from grail.calibration.tokenizer import load_tokenizer
from grail.checkpoint.carried import TOKENIZER_CONFIG, without_code
from grail.checkpoint.writer import OutputFolder
from grail.documents import read_json
from grail.families import open_family
from tests.faults.mutators import HOSTILE, damaged, mangled, misencoded, rendered
from tests.faults.series import Series
from tests.tiny import VOCABULARY, tiny_checkpoint, tiny_tokenizer

WORDS = " ".join(f"w{3 + i % 60}" for i in range(400))
SAMPLE = "w3 w4 unheard w5\nw6"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("text") / "model", num_hidden_layers=1))


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def windows(file: Path, tokenizer: Any) -> torch.Tensor:
    """Calibration and evaluation ids, each in the vocabulary."""
    chosen = {"seq_len": 16, "samples": 4}
    found = load_calibration(str(file), lambda: tokenizer, VOCABULARY, seed=0, trial=1, **chosen)
    held_out = evaluation_windows(str(file), lambda: tokenizer, VOCABULARY, **chosen)
    ids = torch.cat([part for part in (found.ids, found.trial, held_out and held_out.ids) if part is not None])
    assert ids.dtype == torch.int64 and int(ids.min()) >= 0 and int(ids.max()) < VOCABULARY
    return ids


def test_text_files(tokenizer, tmp_path):
    with Series("calibration text", tmp_path) as series:
        for chance in series.seeds(120):
            case = series.folder()
            how, content = misencoded(WORDS, chance)
            (case / "text.txt").write_bytes(content)
            run = partial(windows, case / "text.txt", tokenizer)
            ending = series.case(how, run, case, names=["text.txt"])
            if ending and ending.refused is None and ending.value.shape[1] != 16:
                series.wrong.append(f"{how}: windows {list(ending.value.shape)}")


def test_records(tokenizer, tmp_path):
    lines = [{"text": WORDS[i * 100 : i * 100 + 200], "meta": {"n": i}} for i in range(14)]
    with Series("calibration records", tmp_path) as series:
        for chance in series.seeds(150):
            case = series.folder()
            file = case / "text.jsonl"
            at = chance.randrange(len(lines))
            if chance.random() < 0.5:
                how, changed = mangled(lines[at], chance)
            else:
                how, changed = misencoded(json.dumps(lines[at]), chance)
            whole = [rendered(line) if i != at else changed for i, line in enumerate(lines)]
            file.write_bytes(b"\n".join(whole))
            series.case(how, partial(windows, file, tokenizer), case, names=["text.jsonl"])


def ids_of(kind: str) -> dict[str, torch.Tensor]:
    """A pre-tokenised file that is wrong, or nearly."""
    ids = torch.randint(VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(1))
    ones = torch.ones(12, 16)
    return {
        "float": {"input_ids": ids.float()},
        "bool": {"input_ids": ids > 3},
        "vector": {"input_ids": ids[0]},
        "cube": {"input_ids": ids[None]},
        "empty": {"input_ids": ids[:0]},
        "narrow": {"input_ids": ids[:, :1].contiguous()},
        "no-columns": {"input_ids": torch.zeros(12, 0, dtype=torch.int64)},
        "negative": {"input_ids": ids - 40},
        "beyond": {"input_ids": ids + 40},
        "far-beyond": {"input_ids": ids + 2**62},
        "bytes": {"input_ids": ids.to(torch.uint8)},
        "int32": {"input_ids": ids.to(torch.int32)},
        "int8": {"input_ids": ids.to(torch.int8)},
        "other-name": {"ids": ids},
        "weights-nan": {"input_ids": ids, "weights": ones * float("nan")},
        "weights-negative": {"input_ids": ids, "weights": -ones},
        "weights-zero": {"input_ids": ids, "weights": ones * 0},
        "weights-one-token": {"input_ids": ids, "weights": torch.eye(12, 16) * 1e-30},
        "weights-huge": {"input_ids": ids, "weights": ones * 3e38},
        "weights-vector": {"input_ids": ids, "weights": ones[0]},
        "weights-narrow": {"input_ids": ids, "weights": ones[:, :3].contiguous()},
        "weights-whole-numbers": {"input_ids": ids, "weights": ones.to(torch.int64)},
        "weights-bool": {"input_ids": ids, "weights": ones > 0},
        "weights-8-bits": {"input_ids": ids, "weights": ones.to(torch.float8_e4m3fn)},
    }[kind]


KINDS = (
    "float", "bool", "vector", "cube", "empty", "narrow", "no-columns", "negative", "beyond", "far-beyond", "bytes",
    "int32", "int8", "other-name", "weights-nan", "weights-negative", "weights-zero", "weights-one-token",
    "weights-huge", "weights-vector", "weights-narrow", "weights-whole-numbers", "weights-bool", "weights-8-bits",
)  # fmt: skip


def given(file: Path) -> Any:
    return load_calibration(str(file), lambda: None, VOCABULARY, samples=8, seq_len=None, seed=0)


def test_token_ids(tmp_path):
    with Series("calibration ids", tmp_path) as series:
        for kind in KINDS:
            case = series.folder()
            save_file(ids_of(kind), case / "ids.safetensors")
            ending = series.case(kind, partial(given, case / "ids.safetensors"), case, names=["ids.safetensors"])
            if ending and ending.refused is None:
                weights = ending.value.weights
                if weights is not None and not (bool(weights.isfinite().all()) and abs(weights.mean() - 1) < 1e-3):
                    series.wrong.append(f"{kind}: weights of mean {weights.mean()}")
        for chance in series.seeds(80):
            case = series.folder()
            file = case / "ids.safetensors"
            save_file(ids_of("int32"), file)
            how, content = damaged(file.read_bytes(), chance, chance.choice((8, 100, None)))
            file.write_bytes(content)
            ending = series.case(how, partial(given, file), case, names=["ids.safetensors"])
            if (
                ending
                and ending.refused is None
                and not torch.equal(ending.value.ids, load_file(file)["input_ids"][:8])
            ):
                series.wrong.append(f"{how}: other ids than the library reads")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
NAMED = (
    *HOSTILE, "PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "evil.Evil", "BPE", "WordLevel", "Unigram",
    "WordPiece", {"AutoTokenizer": ["evil.Evil", None]}, {"__type": "AddedToken", "content": "x", "special": 1},
    {"type": "Sequence", "pretokenizers": []},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
)  # fmt: skip


def tokenised(folder: Path) -> list[int]:
    """As a run does it: the tokenizer, and what a result carries."""
    found = load_tokenizer(folder)(SAMPLE, add_special_tokens=False).input_ids
    _ = open_family(folder).tokenizer_files
    with OutputFolder(folder.parent / "out") as out:
        out.carry_over(folder)
    return found


def names_code(file: Path) -> bool:
    """Which a run leaves out, so that transformers opens another tokenizer, or none."""
    named = read_json(file) if file.exists() else {}
    return named != without_code(named)


def test_tokenizers(model, tmp_path):
    with Series("tokenizer", tmp_path, model.parent) as series:
        for chance in series.seeds(200):
            case = series.folder()
            file = case / "model" / chance.choice(TOKENIZER_FILES)
            content = json.loads(file.read_text()) if file.exists() else {"unk_token": "<unk>", "bos_token": "<s>"}
            how = chance.choice(("mangled",) * 8 + ("missing", "empty", "bytes"))
            if how == "missing":
                file.unlink(missing_ok=True)
            elif how == "empty":
                file.write_bytes(b"")
            elif how == "bytes":
                file.write_bytes(damaged(json.dumps(content).encode(), chance)[1])
            else:
                what, text = mangled(content, chance, NAMED)
                how = f"{how} {what}"
                file.write_bytes(text)
            ending = series.case(
                f"{file.name} {how}", partial(tokenised, case / "model"), case, names=[str(case / "model"), file.name],
                output=case / "out",
            )  # fmt: skip
            if ending is None or ending.refused is not None or names_code(case / "model" / TOKENIZER_CONFIG):
                continue
            found = AutoTokenizer.from_pretrained(case / "model", trust_remote_code=False)
            if ending.value != found(SAMPLE, add_special_tokens=False).input_ids:
                series.wrong.append(f"{file.name} {how}: other ids than transformers gives")
