"""Tiny random checkpoints and calibration data, shared by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
HIDDEN = 48


def tiny_config(model_type: str = "llama", **overrides):
    """Two layers, 6 query heads of 8 over 2 key/value heads, MLP width 40."""
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **(settings | overrides))


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides):
    """A random model whose weights are large enough that every site matters; biases too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.25)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def tiny_checkpoint(folder: Path, model_type: str = "llama", *, dtype=torch.float32, shard="1GB", **overrides) -> Path:
    """Write a tiny model as safetensors; no tokenizer."""
    tiny_model(model_type, **overrides).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return Path(folder)


def tiny_calibration(file: Path, windows: int = 8, length: int = 32, vocab: int = VOCABULARY) -> Path:
    """Random windows [windows, length] as a .safetensors file."""
    generator = torch.Generator().manual_seed(1)
    save_file({"input_ids": torch.randint(vocab, (windows, length), generator=generator)}, file)
    return Path(file)


def tiny_tokenizer(folder: Path, words: int = VOCABULARY) -> Path:
    """Write a word-level tokenizer of `words` entries, w3 w4 ..., beside a model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return Path(folder)


def verify_in_this_process(new_folder: Callable[[str], Path]) -> Callable:
    """What `checkpoint.reopen.verify` does, without a process of its own and its seconds of imports."""
    from grail.checkpoint import reopen

    def verify(folder, probe_1L, logits_1LV, dtype, token_ids, written, *, layerwise, loads="plain"):
        work = new_folder("reopen")
        save_file({"ids": probe_1L, "logits": logits_1LV.float().contiguous()}, work / "probe.safetensors")
        (work / "expected.json").write_text(json.dumps({"token_ids": token_ids, "tensors": written}))
        return reopen.check(folder, work, dtype, layerwise=layerwise, loads=loads)

    return verify
