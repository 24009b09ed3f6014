"""What --json of each command holds. A key that ends in ? may be missing, no other may; a list holds any number of such
entries; ANY is whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ANY = object()


@dataclass(frozen=True)
class Each:
    """An object of any names whose values are alike."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """Such a value, or null."""

    value: Any


TEXT, COUNT, SWITCH, NUMBER = str, int, bool, (int, float)
BEFORE_AFTER = {"before": NUMBER, "after": NUMBER}
SWEEP = {"alpha": NUMBER, "lambda": NUMBER, "retries": COUNT, "held_out_error": Maybe(NUMBER)}
SITE = {
    "name": TEXT, "kind": TEXT, "before": COUNT, "after": COUNT, "lambda": Maybe(NUMBER), "retries": COUNT,
    "rcond": Maybe(NUMBER), "error_before": Maybe(NUMBER), "error_after": Maybe(NUMBER),
    "effective_rank": Maybe(NUMBER), "alpha": Maybe(NUMBER), "held_out_errors": Maybe([NUMBER]),
    "sweeps": Maybe([SWEEP]), "trained": SWITCH, "raised": Maybe([NUMBER]),
    "stream_lambda": Maybe(NUMBER),
    "damping": Maybe({"lambda": NUMBER, "retries": COUNT}),
}  # fmt: skip
RUN = {"schema_version": COUNT, "host": TEXT, "platform": TEXT, "argv": [TEXT], "seconds": Each(NUMBER),
       "peak_memory_bytes": COUNT}  # fmt: skip
COMMON = {
    "schema_version": COUNT, "recipe": Each(ANY), "versions": Each(TEXT), "calibration": Maybe(Each(ANY)),
    "sites": [SITE], "allocation": TEXT, "bias": SWITCH, "parameters": BEFORE_AFTER, "format": TEXT, "loads_with": TEXT,
    "output": TEXT, "allocation_raised": Each([NUMBER]),
}  # fmt: skip
CANDIDATE = {"alpha": ANY, "perplexity": NUMBER, "taken": SWITCH}
SOURCE = {"id": TEXT, "revision": Maybe(TEXT), "sha256": TEXT}
PERPLEXITY = {
    "data": TEXT, "sha256": TEXT, "windows": COUNT, "seq_len": COUNT, "held_out": SWITCH, "dtype": TEXT,
    "perplexity": Each(NUMBER),
}  # fmt: skip
TOP = {"top1": NUMBER, "top5?": NUMBER, "count": COUNT}
LANGUAGE = COMMON | {
    "source": SOURCE | {"hub": Maybe(TEXT)}, "ratio": Each({"asked": Maybe(NUMBER), "reached": NUMBER}),
    "bytes": BEFORE_AFTER, "evaluation": Maybe(PERPLEXITY), "alpha_search": Maybe([CANDIDATE]),
    "regional": [Each(ANY)], "tensor_parallel": COUNT, "original_widths": ANY, "class_changed": Maybe(TEXT),
    "run": RUN | {"profile": Each(Each(ANY)), "planned": Each(ANY), "reopened": Each(ANY)},
}  # fmt: skip
VISION = COMMON | {
    "source": SOURCE | {"options?": Each(ANY)}, "calibration_text": Maybe(Each(ANY)), "ratio": Each(NUMBER),
    "bytes": Maybe({"after": COUNT}), "macs": Maybe(BEFORE_AFTER), "repaired_norms": COUNT,
    "evaluation": Maybe({"data": TEXT, "images": COUNT, "accuracy": Each(TOP)}), "run": RUN,
}  # fmt: skip
PLAN = {
    "schema_version": COUNT, "model": TEXT, "layers": COUNT, "method": TEXT, "allocation": TEXT,
    "sites": Each({"sites": COUNT, "changed": COUNT, "before": COUNT, "after": COUNT}), "widths_settled": SWITCH,
    "parameters": BEFORE_AFTER, "bytes": BEFORE_AFTER, "calibration_tokens": COUNT, "trial_tokens": COUNT,
    "target": Maybe(TEXT), "evaluation_tokens": COUNT, "passes": COUNT, "chunk_tokens": COUNT, "processes": COUNT,
    "store": TEXT, "hidden_states": TEXT, "flops": Each(NUMBER), "bytes_read": COUNT, "bytes_written": COUNT,
    "store_traffic_bytes": COUNT, "disk_bytes": COUNT, "memory_bytes": Each(NUMBER), "seconds": Each(NUMBER),
    "format": Maybe(TEXT), "loads_with": Maybe(TEXT),
}  # fmt: skip
SCHEMAS: dict[str, dict] = {
    "compress": LANGUAGE,
    "compress vision": VISION,
    "compress --print-recipe": {"schema_version": COUNT, "recipe": Each(ANY)},
    "plan": PLAN,
    "run": {
        "schema_version": COUNT, "recipe": TEXT,
        "runs": [{
            "output": TEXT, "state": TEXT, "command": TEXT, "measure": Maybe(TEXT), "data": Maybe(TEXT),
            "parameters": {"before": Maybe(COUNT), "after": Maybe(COUNT)}, "values": Each(NUMBER),
        }],
    },
    "eval": {
        "schema_version": COUNT, "data?": TEXT, "windows?": COUNT, "seq_len?": COUNT,
        "models": Each({"perplexity?": Maybe(NUMBER), "parameters": COUNT, "bytes": COUNT, "tasks?": Each(ANY),
                        "sample?": TEXT}),
    },
    "eval vision": {
        "schema_version": COUNT, "data?": TEXT, "images?": COUNT,
        "models": Each({"top1?": NUMBER, "top5?": NUMBER, "count?": COUNT, "parameters": COUNT, "macs?": COUNT,
                        "milliseconds?": Each(NUMBER), "probe?": Each(ANY)}),
    },
    "convert": {
        "schema_version": COUNT, "output": TEXT, "format": TEXT, "tensor_parallel": COUNT, "original_widths": ANY,
        "loads_with": TEXT, "class_changed": Maybe(TEXT), "parameters": COUNT, "bytes": COUNT,
        "logit_difference": NUMBER,
    },
    "export": {"schema_version": COUNT, "file": TEXT, "to": TEXT, "difference": NUMBER, "bytes": COUNT},
    "export gguf": {
        "schema_version": COUNT, "file": TEXT, "to": TEXT, "dtype": TEXT, "bytes": COUNT, "tensors": COUNT,
        "difference": NUMBER,
    },
    "report": {
        "schema_version": COUNT, "output": TEXT,
        "runs": [{
            "folder": TEXT, "model": TEXT, "method": TEXT, "measure": Maybe(TEXT), "data": Maybe(TEXT),
            "parameters": {"before": Maybe(COUNT), "after": Maybe(COUNT)}, "comparable": Maybe(COUNT),
            "values": Each(NUMBER),
        }],
    },
    "push": {
        "schema_version": COUNT, "repo": TEXT, "url": TEXT, "files": [{"name": TEXT, "bytes": COUNT}],
        "dry_run": SWITCH,
    },
    "soup": {
        "schema_version": COUNT, "output": TEXT, "greedy": SWITCH, "metric": Maybe(TEXT), "data": Maybe(TEXT),
        "samples": Maybe(COUNT), "score": Maybe(NUMBER), "best_single": Maybe(NUMBER),
        "ingredients": [{"path": TEXT, "score": Maybe(NUMBER), "score_with": Maybe(NUMBER), "taken": SWITCH}],
        "tensors": COUNT, "parameters": COUNT, "bytes": COUNT, "next": TEXT,
    },
    "methods": {
        "schema_version": COUNT,
        "methods": Each({"summary": TEXT, "source": TEXT, "needs": [TEXT], "allocation": TEXT, "options": Each(ANY)}),
    },
}  # fmt: skip


def differences(value: Any, shape: Any, where: str = "document") -> list[str]:
    """Where a value is not of a shape, in words."""
    if shape is ANY or (isinstance(shape, Maybe) and value is None):
        return []
    if isinstance(shape, Maybe):
        return differences(value, shape.value, where)
    if isinstance(shape, Each):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        return [found for key, entry in value.items() for found in differences(entry, shape.value, f"{where}.{key}")]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [found for i, entry in enumerate(value) for found in differences(entry, shape[0], f"{where}[{i}]")]
    if isinstance(shape, dict):
        return _differences_of_an_object(value, shape, where)
    wanted = shape if isinstance(shape, tuple) else (shape,)
    return [] if type(value) in wanted else [f"{where} is {value!r}, not of {wanted}"]


def _differences_of_an_object(value: Any, shape: dict, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    known = {key.removesuffix("?"): entry for key, entry in shape.items()}
    found = [f"{where}.{key} is not in the schema" for key in value.keys() - known.keys()]
    found += [f"{where}.{key} is missing" for key in shape if not key.endswith("?") and key not in value]
    for key in value.keys() & known.keys():
        found += differences(value[key], known[key], f"{where}.{key}")
    return found
