"""Reopen a written checkpoint in a fresh process and compare logits and token ids with what compress had in memory.

Run as a script by `verify` below. On a plain checkpoint the child never imports grail: what it proves is that
transformers alone can load the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLE = "GRAIL repairs what pruning breaks: 1 + 1 = 2, naïve café, def f(x):\n\treturn x**2\n"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of logits over the largest logit; the child multiplies narrower matrices in another order."""


def verify(folder: Path, probe_1L, logits_1LV, dtype: str, token_ids: list[int] | None, *, layerwise: bool) -> dict:
    """Reopen `folder` in a fresh process; returns {"logit_difference", "token_ids_equal", "how"}.

    layerwise: stream the check through grail one layer at a time, for checkpoints larger than memory.
    Raises RuntimeError with the child's last lines when anything differs: a bug in GRAIL, not in the input.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="grail-reopen-") as work:
        probe = Path(work) / "probe.safetensors"
        save_file({"ids": probe_1L, "logits": logits_1LV.float().contiguous()}, probe)
        (Path(work) / "tokens.json").write_text(json.dumps(token_ids))
        script = "import runpy, sys; sys.argv[0] = 'reopen'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        command = [sys.executable, "-c", script, __file__, str(folder), work, dtype]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        if layerwise:
            command.append("--layerwise")
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    if done.returncode:
        raise RuntimeError(f"{folder} does not reopen: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("work")
    parser.add_argument("dtype")
    parser.add_argument("--layerwise", action="store_true")
    asked = parser.parse_args()
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    probe = load_file(Path(asked.work) / "probe.safetensors")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked.folder))
    _compare_tensors(Path(asked.folder), skeleton)
    dtype = getattr(torch, asked.dtype)
    if asked.layerwise:
        from grail.evaluation.perplexity import logits
        from grail.families import open_family

        found = logits(open_family(Path(asked.folder), dtype=dtype), probe["ids"])
    else:
        model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=dtype).eval()
        with torch.no_grad():
            found = model(probe["ids"], use_cache=False).logits.float()
    difference = ((found - probe["logits"]).abs().max() / probe["logits"].abs().max().clamp_min(1e-30)).item()
    if not difference <= TOLERANCE[asked.dtype]:
        sys.exit(f"logits differ from the compressed model's by {difference:.2e} of the largest")
    how = "layer by layer" if asked.layerwise else "at once"
    result = {"logit_difference": difference, "token_ids_equal": _tokens_equal(asked), "how": how}
    sys.stdout.write(json.dumps(result) + "\n")


def _compare_tensors(folder: Path, skeleton) -> None:
    """Every key, shape and dtype kind of the class is in the files, and nothing the class does not know."""
    from safetensors import safe_open

    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            held |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    if set(index) != set(held):
        sys.exit(f"the index and the shards disagree about {sorted(set(index) ^ set(held))[:3]}")
    tied = set(getattr(skeleton, "_tied_weights_keys", None) or ()) if skeleton.config.tie_word_embeddings else set()
    for name, tensor in skeleton.state_dict().items():
        if name not in held and name not in tied:
            sys.exit(f"{name} is missing")
        if name in held and held[name] != tuple(tensor.shape):
            sys.exit(f"{name} has shape {held[name]}, the class wants {tuple(tensor.shape)}")


def _tokens_equal(asked) -> bool | None:
    expected = json.loads((Path(asked.work) / "tokens.json").read_text())
    if expected is None:
        return None
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(asked.folder)(SAMPLE).input_ids != expected:
        sys.exit("the tokenizer gives other token ids than the source's")
    return True


if __name__ == "__main__":
    main()
