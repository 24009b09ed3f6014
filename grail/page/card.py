"""README.md of an output folder: a model card as the hub reads it (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..numbers import scaled
from .command import call, command, nameable
from .numbers import change, percent, whole
from .run import KINDS, Run, mapping, number, string
from .source_card import CARRIED, HUB_ID, LICENCE, OURS, SourceCard

METHOD = """\
@inproceedings{tang2026grail,
  title     = {{GRAIL}: Post-hoc Compensation by Linear Reconstruction for Compressed Networks},
  author    = {Tang, Wenwu and Wang, Dong and Thiele, Lothar and Saukh, Olga},
  booktitle = {Conference on Parsimony and Learning (CPAL)},
  year      = {2026}
}"""
BUILT_IN = {"builtin": "Python documentation (built in)", "docstrings": "docstrings of Python's standard library"}
IMAGES_BUILT_IN = {"builtin": "scikit-learn's handwritten digits (built in)"}
GIVEN = "given in Python"
"""What a run calls data that has no name."""
TEXT, CLASSES, ZERO_SHOT, FEATURES = (
    "text-generation", "image-classification", "zero-shot-image-classification", "image-feature-extraction",
)  # fmt: skip


def card(run: Run, source: SourceCard, beside: Path | None = None) -> str:
    """The card of a run's output. beside: the folder that it will lie in, to tell whether a licence file lies there."""
    base = base_models(run, source)
    title = run.folder.rsplit("/", 1)[-1]
    data = ModelCardData(
        **_licence(source, base, beside),
        language=source.language or None,
        library_name="grail" if run.vision else "transformers",
        pipeline_tag=_pipeline(run),
        base_model=base or None,
        tags=[OURS, "folding" if run.recipe.get("method") == "fold" else "pruning", "compression"],
        model_name=title,
        eval_results=_results(run),
    )
    if data.eval_results is None:
        data.pop("model_name")
    parts = [
        f"# {_inline(title)}",
        _summary(run, base),
        _measured(run),
        *_loading(run),
        *_made(run),
        "## What to expect",
        _expectation(run),
        *_rights(source, base),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def base_models(run: Run, source: SourceCard) -> list[str]:
    """Hub names of what was compressed, where a run knows its own; else of what the source's card names."""
    entry = mapping(run.grail.get("source"))
    hub = string(entry.get("hub")) or (run.model if string(entry.get("revision")) else "")
    return [hub] if HUB_ID.fullmatch(hub) else source.base_model


def _licence(source: SourceCard, base: list[str], beside: Path | None) -> dict[str, str]:
    """The source's, a link to a file that does not lie here turned into one to where it does."""
    found = {key: source.licence[key] for key in LICENCE if key in source.licence}
    link = found.get("license_link")
    if link and not re.match(r"https?://", link) and Path(link).name not in (os.listdir(beside) if beside else ()):
        found.pop("license_link")
        if base:
            found["license_link"] = f"https://huggingface.co/{base[0]}/blob/main/{link}"
    return found


def _pipeline(run: Run) -> str:
    if not run.vision:
        return TEXT
    if run.grail.get("calibration_text"):
        return ZERO_SHOT
    return CLASSES if run.measure is not None else FEATURES


def _results(run: Run) -> list[EvalResult] | None:
    measure = run.measure
    value = measure.values.get("compressed") if measure else None
    if value is None:
        return None
    evaluation = mapping(run.grail.get("evaluation"))
    counts = {key: n for key in ("windows", "seq_len", "images") if (n := number(evaluation.get(key))) is not None}
    name = _data(measure.data, run.vision)
    return [
        EvalResult(
            task_type=_pipeline(run),
            dataset_type=re.sub(r"[^\w./-]+", "-", Path(measure.data).name).strip("-") or "data",
            dataset_name=name,
            dataset_args={key: int(n) for key, n in counts.items()} or None,
            metric_type=measure.name,
            metric_value=round(value, 4),
        )
    ]


def _data(name: str, vision: bool = False) -> str:
    """A file or folder by its last name: where it lay is nobody's business."""
    built_in = IMAGES_BUILT_IN if vision else BUILT_IN
    if name in built_in:
        return built_in[name]
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else Path(name).name or name


def _summary(run: Run, base: list[str]) -> str:
    before, after = run.sizes("parameters")
    kept = f"{scaled(after)} of {scaled(before)} parameters" if before and after else "fewer parameters"
    names = [f"[{name}](https://huggingface.co/{name})" for name in base]
    of = " and ".join(names) or _code(_data(run.model))
    repaired = (
        "and every block was repaired in closed form, without training"
        if run.repaired and run.recipe.get("method") != "wanda-pp-sp"
        else "and every block was repaired in closed form; the method also trains each block a little"
        if run.repaired
        else "and nothing was repaired"
    )
    method = _code(str(run.recipe.get("method", "unknown")))
    return (
        f"{of} with {kept}: {method} chose what goes ({_removed(run)}), {repaired}. "
        "Made with an independent implementation of GRAIL (Tang, Wang, Thiele, Saukh, CPAL 2026); neither its authors "
        "nor those of the base model have anything to do with this folder."
    )


def _removed(run: Run) -> str:
    told = []
    for kind, found in mapping(run.grail.get("ratio")).items():
        share = number(mapping(found).get("reached")) if isinstance(found, dict) else number(found)
        if share is not None and kind in KINDS:
            told.append(f"{percent(share)} of the {KINDS[kind]}")
    return ", ".join(told) or "shares not recorded"


def _measured(run: Run) -> str:
    rows = []
    for name, key, unit in (("parameters", "parameters", ""), ("size of the weights", "bytes", "B")):
        before, after = run.sizes(key)
        if after is not None:
            rows.append((name, scaled(before, unit), "", f"{scaled(after, unit)} {_share(before, after)}"))
    before, after = run.sizes("macs")
    if after is not None:
        rows.append(("multiply-adds of one input", scaled(before), "", f"{scaled(after)} {_share(before, after)}"))
    if (measure := run.measure) is not None:
        values = {name: measure.shown(value) for name, value in measure.values.items()}
        told = f"{measure.name} on {_inline(_data(measure.data, run.vision))}"
        rows.append((told, *(values.get(name, "") for name in ("dense", "pruned", "compressed"))))
    if not rows:
        return ""
    head = ("", "before", "pruned only", "this network" if run.repaired else "this network (pruned only)")
    shown = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = ["| " + " | ".join(row[i] for i in shown) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(shown) + "|", *lines[1:]])


def _expectation(run: Run) -> str:
    measured = "What was measured is in the table above; on" if run.measure else "What it can do was not measured. On"
    how = "--data IMAGES" if run.vision else "--tasks ..."
    tried = "" if run.from_python and run.vision else f": `grail eval FOLDER {how}`"
    return (
        f"It can do no more than the network it was made from and has that network's biases and limits. {measured} "
        f"data that the calibration had little of, more may have been lost. Evaluate it on your own task{tried}."
    )


def _share(before: float | None, after: float | None) -> str:
    return f"({told})" if (told := change(before, after)) else ""


def _loading(run: Run) -> list[str]:
    if run.vision:
        extra = ", module=the_original_module" if run.from_python else ""
        return ["## Loading", fenced(f"import grail\n\nmodel = grail.load({run.folder!r}{extra})", "python")]
    trust = ", trust_remote_code=True" if run.grail.get("format") == "grail" else ""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({run.folder!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({run.folder!r}{trust})"
    )
    loads = string(run.grail.get("loads_with"))
    return ["## Loading", fenced(code, "python"), f"Opens with {_inline(loads)}." if loads else ""]


def _made(run: Run) -> list[str]:
    parts = ["## How it was made"]
    shown = command(run) if run.recipe else None
    if shown is not None:
        parts.append(fenced(shown, "sh"))
    elif run.recipe:
        parts.append(fenced(call(run), "python"))
    calibration = mapping(run.grail.get("calibration"))
    if source := string(calibration.get("source")):
        sizes = [
            f"{whole(number(calibration[key]))} {key}"
            for key in ("windows", "images", "tokens")
            if number(calibration.get(key)) is not None
        ]
        told = "inputs given in Python" if source == GIVEN else _inline(_data(source, run.vision))
        parts.append(f"Calibrated on {told}: {', '.join(sizes)}, no labels.")
    versions = ", ".join(_inline(f"{name} {value}") for name, value in mapping(run.grail.get("versions")).items())
    parts.append(f"Versions: {versions}." if versions else "")
    parts.append("`report.html` shows every site; `grail.json` has every figure.")
    if run.ran is not None and nameable(run):
        parts.append("`grail run recipe.yaml --set-option output=FOLDER` makes it again.")
    return parts


def _rights(source: SourceCard, base: list[str]) -> list[str]:
    of = f"[{base[0]}](https://huggingface.co/{base[0]})" if base else "the base model"
    name = source.licence.get("license_name") or source.licence.get("license")
    told = (
        f"That of the base model: {_inline(name)}."
        if name
        else f"The licence of {of} applies; its folder did not say which that is."
    )
    found = ["## Licence", told, "## Citation", "The method:", fenced(METHOD, "bibtex")]
    return found + ([f"### {CARRIED}", source.citation] if source.citation else [])


def _inline(text: Any) -> str:
    """Text that is no Markdown of its own, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """A code span, whatever is in it."""
    text = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks}{text}{ticks}" if not longest else f"{ticks} {text} {ticks}"


def fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    ticks = "`" * (longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"
