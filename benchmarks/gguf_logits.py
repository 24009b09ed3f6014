"""What llama.cpp makes of an exported checkpoint: token ids and logits beside those of transformers.

    python benchmarks/gguf_logits.py FOLDER    # needs llama-cpp-python, which compiles llama.cpp

FOLDER is a language model, compressed or not. By dtype: whether the ids of a text are the same, and by position the
largest difference of logits over the largest logit there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grail.serving.gguf import export_gguf

TEXT = "Python is a programming language that lets you work quickly. In 1991 Guido van Rossum released version 0.9.0."


@torch.no_grad()
def main(folder: str) -> None:
    from llama_cpp import Llama

    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor([ids])).logits[0]
    for dtype in ("float32", "float16", "q8_0"):
        with tempfile.TemporaryDirectory() as work:
            file = Path(work) / "model.gguf"
            export_gguf(folder, file, dtype=dtype)
            model = Llama(str(file), logits_all=True, verbose=False, n_ctx=256, n_threads=2)
            same = model.tokenize(TEXT.encode(), add_bos=False) == ids
            model.eval(ids)
            found = torch.tensor(model.scores[: len(ids)])
            model.close()
        apart = ((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).sort().values.tolist()
        sys.stdout.write(
            f"{dtype}: same ids {same}, {len(ids)} positions, differences {apart[0]:.4f} to {apart[-2]:.4f}"
        )
        sys.stdout.write(f", largest {apart[-1]:.4f}\n")


if __name__ == "__main__":
    main(sys.argv[1])
