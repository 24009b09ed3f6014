"""Reopen a written checkpoint in a fresh process and compare logits and token ids with what compress had in memory.

Run as a script by `verify` below. On a plain checkpoint the child never imports grail: what it proves is that
transformers alone can load the folder. One in the format `grail` is opened twice: by its own class file, before grail
is imported, and by the classes that `import grail` registers; both must agree to the last bit. Only the model is opened
with trust_remote_code, and only after it is certain that the class file is GRAIL's: the rest came with the source.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLE = "GRAIL repairs what pruning breaks: 1 + 1 = 2, naïve café, def f(x):\n\treturn x**2\n"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of logits over the largest logit; the child multiplies narrower matrices in another order."""
CLASS_FILE = Path(__file__).resolve().parents[1] / "modeling_grail.py"


def verify(
    folder: Path,
    probe_1L,
    logits_1LV,
    dtype: str,
    token_ids: list[int] | None,
    written: dict[str, tuple[str, list[int]]],
    *,
    layerwise: bool,
    loads: str = "plain",
) -> dict:
    """Reopen `folder` in a fresh process; returns {"logit_difference", "token_ids_equal", "how"}.

    probe_1L: token ids; logits_1LV: what compress had in memory for them; dtype: the compute dtype's name; token_ids
    of SAMPLE by the source's tokenizer, or None; written: name -> (safetensors dtype, shape); layerwise: stream the
    check through grail one layer at a time, for checkpoints larger than memory; loads: how the folder claims to open,
    "plain" or "grail" (OutputFormat.loads).
    Raises RuntimeError with the child's last lines when anything differs: a bug in GRAIL, not in the input.
    """
    from safetensors.torch import save

    from ..errors import Circumstance, naming

    with tempfile.TemporaryDirectory(prefix="grail-reopen-") as work:
        with naming(work):
            probe = save({"ids": probe_1L, "logits": logits_1LV.float().contiguous()})
            (Path(work) / "probe.safetensors").write_bytes(probe)
            (Path(work) / "expected.json").write_text(json.dumps({"token_ids": token_ids, "tensors": written}))
        script = "import runpy, sys; sys.argv[0] = 'reopen'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        command = [sys.executable, "-c", script, __file__, str(folder), work, dtype]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        environment["HF_MODULES_CACHE"] = str(Path(work) / "modules")  # where transformers copies class files to
        command += ["--loads", loads]
        if layerwise:
            command.append("--layerwise")
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    if done.returncode < 0:
        raise Circumstance(
            f"the process that opens {folder} again was ended by {signal.Signals(-done.returncode).name}, as happens "
            f"where memory runs out"
        )
    if done.returncode:
        raise RuntimeError(f"{folder} does not reopen: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(folder: Path, work: Path, dtype_name: str, *, layerwise: bool, loads: str = "plain") -> dict:
    """What the child does: compare tensors with the class, logits and token ids with what lies in `work`."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_code(folder, loads)
    probe = load_file(work / "probe.safetensors")
    by_file = {"trust_remote_code": loads == "grail"}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **by_file), **by_file)
    expected = json.loads((work / "expected.json").read_text())
    _compare_tensors(folder, skeleton, expected["tensors"])
    dtype = getattr(torch, dtype_name)
    if layerwise:
        from grail.evaluation.perplexity import logits
        from grail.families import open_family

        found = logits(open_family(folder, dtype=dtype), probe["ids"])
    else:
        found = _logits(folder, probe["ids"], dtype, **by_file)
    if loads == "grail":
        from grail.registration import register

        register()
        if not layerwise and not torch.equal(found, _logits(folder, probe["ids"], dtype)):
            raise RuntimeError("the class file and the registered class give different logits")
    equal = _tokens_equal(folder, expected["token_ids"])
    difference = ((found - probe["logits"]).abs().max() / probe["logits"].abs().max().clamp_min(1e-30)).item()
    if not difference <= TOLERANCE[dtype_name]:
        raise RuntimeError(f"logits differ from the compressed model's by {difference:.2e} of the largest")
    return {
        "logit_difference": difference,
        "token_ids_equal": equal,
        "how": "layer by layer" if layerwise else "at once",
    }


def _check_code(folder: Path, loads: str) -> None:
    """All code that the folder holds or names is GRAIL's class file, byte for byte, and only where it is needed."""
    config, tokenizer = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        for name in ("config.json", "tokenizer_config.json")
    )
    named = {"config.json": config.get("auto_map", {}), "tokenizer_config.json": tokenizer.get("auto_map", {})}
    own = {}
    if loads == "grail":
        base = config["architectures"][0].removesuffix("ForCausalLM")
        classes = {"AutoConfig": f"{base}Config", "AutoModelForCausalLM": f"{base}ForCausalLM"}
        own = {kind: f"{CLASS_FILE.stem}.{name}" for kind, name in classes.items()}
        if (folder / CLASS_FILE.name).read_bytes() != CLASS_FILE.read_bytes():
            raise RuntimeError(f"the class file {CLASS_FILE.name} is not GRAIL's")
    if named != {"config.json": own, "tokenizer_config.json": {}}:
        raise RuntimeError(f"the folder names code that is not GRAIL's: {named}")
    foreign = {str(file.relative_to(folder)) for file in folder.rglob("*.py")} - ({CLASS_FILE.name} if own else set())
    if foreign:
        raise RuntimeError(f"the folder holds code that is not GRAIL's: {sorted(foreign)[0]}")


def _logits(folder: Path, ids, dtype, **options):
    """Logits of the folder as transformers opens it with these options, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def _compare_tensors(folder: Path, skeleton, written: dict[str, list]) -> None:
    """Every key, shape and dtype is as written, every key and shape is what the class wants, and the index agrees."""
    from safetensors import safe_open

    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a file handle, not a dict
                tensor = handle.get_slice(name)
                held[name] = [tensor.get_dtype(), list(tensor.get_shape())]
    if held != written:
        different = sorted(name for name in held | written if held.get(name) != written.get(name))
        raise RuntimeError(f"{different[0]} reads back as {held.get(different[0])}, not {written.get(different[0])}")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    if set(index) != set(held):
        raise RuntimeError(f"the index and the shards disagree about {sorted(set(index) ^ set(held))[:3]}")
    tied = set(getattr(skeleton, "_tied_weights_keys", None) or ()) if skeleton.config.tie_word_embeddings else set()
    for name, tensor in skeleton.state_dict().items():
        if name not in held and name not in tied:
            raise RuntimeError(f"{name} is missing")
        if name in held and held[name][1] != list(tensor.shape):
            raise RuntimeError(f"{name} has shape {held[name][1]}, the class wants {list(tensor.shape)}")


def _tokens_equal(folder: Path, expected: list[int] | None) -> bool | None:
    if expected is None:
        return None
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(SAMPLE).input_ids != expected:
        raise RuntimeError("the tokenizer gives other token ids than the source's")
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--layerwise", action="store_true")
    parser.add_argument("--loads", default="plain", choices=("plain", "grail"))
    asked = parser.parse_args()
    found = check(asked.folder, asked.work, asked.dtype, layerwise=asked.layerwise, loads=asked.loads)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
