"""`grail soup`: open, refuse, average (or choose greedily), write, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.writer import OutputFolder
from ..errors import GrailError
from ..modules.names import NAMED
from ..progress import Progress
from ..report import SCHEMA_VERSION
from ..surroundings import undisturbed
from .average import check_finite
from .greedy import Accuracy, Judge, NegativePerplexity, Trial, choose
from .inputs import Ingredient, open_inputs
from .output import candidate, open_output, write

RECORD, NO_DATA = "soup.json", "none"


@undisturbed()
def soup(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    greedy: bool = False,
    data: str | None = None,
    samples: int | None = None,
    model: str | None = None,
    model_options: dict[str, Any] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Average checkpoints of one architecture, tensor by tensor, and write the result; it is compressed afterwards.

    inputs: .safetensors files (output: one too), or Hugging Face folders of language models (output: a folder with the
    first one's configuration and tokenizer). Floats are averaged in float64 and written in the first one's dtype; whole
    numbers must be equal, but of BatchNorm's num_batches_tracked the largest is kept. Running means and variances are
    averaged as they are: `grail compress --repair` estimates them anew. The order of the inputs matters by no more than
    rounding (and decides whose dtypes and small files the soup has).

    greedy: order by the score on held-out `data` (top-1 accuracy of the network `model`, built with `model_options`; or
    perplexity of folders), best first, and add one after another where the soup's score does not fall. At most
    `samples` images or windows are looked at. "First" is then the best one.

    Returns {schema_version, output, greedy, metric, data, samples, score, best_single, ingredients: [{path, score,
    score_with, taken}], tensors, parameters, bytes, next}; scores are None without greedy, and more is better.
    Raises GrailError, with nothing written, for inputs that do not fit each other, hold NaN or infinity, or are no
    safetensors; for an output that exists or is an input; and for options that would be ignored.
    """
    progress = progress or Progress()
    options = {"--data": data, "--samples": samples, "--model": model, "--model-option": model_options or None}
    _fitting(greedy, options | {"--device": None if device == "auto" else device})
    ingredients = open_inputs([str(path) for path in inputs], progress)
    folders = ingredients[0].is_folder
    out = open_output(output, folders, overwrite)
    read = [Path(data)] if data and Path(data).exists() else []
    out.check(*(one.path for one in ingredients), *(file for one in ingredients for file in one.files), *read)
    judge = _judge(folders, options, device, progress) if greedy else None
    with out:
        trials, score = _chosen(ingredients, judge, out, progress)
        taken = [trial.ingredient for trial in trials if trial.taken]
        progress.say(f"averaging {len(taken)} checkpoints of {len(taken[0].tensors.names())} tensors")
        write(out, taken)
        found = _report(trials, score, judge)
        if folders:
            out.write_json(RECORD, found)
        written = out.finish()
    command = f"--model {written}" if folders else f"--model {model or 'timm/NAME'} --weights {written}"
    return found | {"output": str(written), "next": f"grail compress {command} --output OUT"}


def _fitting(greedy: bool, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if not greedy and given:
        raise GrailError(f"{given[0]} is for --greedy alone: add it, or leave {given[0]} out")
    if greedy and options["--data"] in (None, NO_DATA):
        raise GrailError("--greedy needs --data: held-out data on which the checkpoints are compared")
    if options["--samples"] is not None and options["--samples"] < 1:
        raise GrailError(f"--samples must be at least 1; got {options['--samples']}")


def _judge(folders: bool, options: dict[str, Any], device: str, progress: Progress) -> Judge:
    data, samples, model, made_with = options.values()
    if not folders and model is None:
        raise GrailError(f"--greedy needs --model for .safetensors files: {NAMED}")
    if not folders:
        return Accuracy(model, made_with or {}, data, samples, device)
    for name in ("--model", "--model-option"):
        if options[name] is not None:
            raise GrailError(f"{name} is for .safetensors files: a folder's config.json says what it is; leave it out")
    return NegativePerplexity(data, samples, device, progress)


def _chosen(
    ingredients: list[Ingredient], judge: Judge | None, out: OutputFolder, progress: Progress
) -> tuple[list[Trial], float | None]:
    if judge is None:
        return [Trial(one, None, taken=True) for one in ingredients], None
    for one in ingredients:
        check_finite(one)

    def score_of(several: list[Ingredient]) -> float:
        with candidate(out) as tried:
            return judge(write(tried, several))

    return choose(ingredients, judge, score_of, progress)


def _report(trials: list[Trial], score: float | None, judge: Judge | None) -> dict[str, Any]:
    first = trials[0].ingredient
    infos = [first.info(name) for name in first.tensors.names()]
    return {
        "schema_version": SCHEMA_VERSION,
        "greedy": judge is not None,
        "metric": judge and judge.metric,
        **(judge.told if judge else {"data": None, "samples": None}),
        "score": score,
        "best_single": trials[0].score,
        "ingredients": [trial.to_json() for trial in trials],
        "tensors": len(infos),
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
    }
