"""Small stand-ins for the models, weights, images and texts that the documentation names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import grail
from tests.test_gguf_export import VOCABULARY, byte_level, with_tokenizer
from tests.tiny import tiny_calibration, tiny_checkpoint

LENGTH = 1024
SIDE = 32
CLIP = "tiny-for-docs"
TEXT = "The quick brown fox jumps over the lazy dog, and the capital of France is Paris.\n" * 200


def language_model(folder: Path, **widths: int) -> Path:
    """A tiny random model with a byte-level tokenizer, which reads any text. A prompt becomes ids and a mask alone, as
    with SmolLM2's own."""
    tiny_checkpoint(folder, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **widths)
    return with_tokenizer(folder, byte_level(), model_input_names=["input_ids", "attention_mask"])


def _images(folder: Path, names: list[str]) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name)


def images(path: Path) -> None:
    """A folder of pictures without labels."""
    _images(path, [f"{number}.png" for number in range(8)])


def labelled(path: Path) -> None:
    """A folder with a sub-folder of pictures for each class."""
    _images(path, [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(4)])


def resnet(path: Path) -> None:
    """Weights of timm/resnet10t, random, other ones for another name."""
    import timm

    torch.manual_seed(sum(path.name.encode()))
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), path)


def clip(path: Path) -> None:
    """Weights of a CLIP of two layers each, which open_clip then knows by name."""
    import open_clip

    tower = {"layers": 2, "width": 32}
    described = {
        "embed_dim": 16,
        "vision_cfg": tower | {"image_size": SIDE, "patch_size": 16, "head_width": 16},
        "text_cfg": tower | {"context_length": 32, "vocab_size": 49408, "heads": 2},
    }
    file = path.with_name(f"{CLIP}.json")
    file.write_text(json.dumps(described))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    save_file(open_clip.create_model(CLIP).state_dict(), path)


def lines(*sentences: str) -> Callable[[Path], None]:
    """A text file with these lines."""
    return lambda path: path.write_text("".join(f"{sentence}\n" for sentence in sentences)) and None


def records(path: Path) -> None:
    """A .jsonl file of texts."""
    path.write_text("".join(json.dumps({"text": TEXT[:600]}) + "\n" for _ in range(40)))


def tokens(path: Path) -> None:
    """A pre-tokenised file."""
    tiny_calibration(path, vocab=VOCABULARY)


def question_folder(path: Path) -> None:
    """A task of lm-eval with two questions, from a local file."""
    path.mkdir()
    questions = [{"q": "a", "c": ["b", "d"], "a": 0}, {"q": "e", "c": ["f", "g"], "a": 1}]
    (path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (path / "task.yaml").write_text(
        f"task: stand_in\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path / 'data.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


def compressed(source: Path) -> Callable[[Path], None]:
    """An output of grail from a language model."""

    def make(path: Path) -> None:
        file = path.with_name("for-compressed.safetensors")
        tokens(file)
        grail.compress(str(source), calibration=str(file), eval="none", output=str(path))
        file.unlink()

    return make


def copied(made: Path) -> Callable[[Path], None]:
    """What was made once for all pages."""
    return lambda path: (shutil.copytree if made.is_dir() else shutil.copy)(made, path) and None
