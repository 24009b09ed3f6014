"""The greedy soup (Wortsman et al., ICML 2022, recipe 1): best first, another is added where the score does not fall.

The best single checkpoint is the first soup, so on the data that decided no soup is worse than it. For the same reason
the score flatters the soup a little: an independent figure needs other data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import Circumstance, GrailError
from ..machine import usable_device
from ..modules.architecture import Architecture, open_network
from ..modules.evaluate import accuracies, classifier, held_out
from ..modules.names import NAMED
from ..progress import Progress
from .inputs import Ingredient


class Judge(Protocol):
    """Scores a checkpoint on held-out data: more is better. told: what was measured, {data, samples}."""

    metric: str
    told: dict[str, Any]

    def __call__(self, path: Path) -> float: ...


class Accuracy:
    """Top-1 accuracy of a network by name with the weights of a file, on the test part of labelled images; of a CLIP
    zero-shot, with the names that the data gives its classes."""

    metric = "top1"

    def __init__(self, model: str, options: dict[str, Any], data: str, samples: int | None, device: str):
        if Architecture.parse(model) is None:
            raise GrailError(f"--model {model}: name the network of the inputs, {NAMED}")
        self.model, self.options, self.device = model, options, usable_device(device)
        self.images = held_out(None, data, "--data")
        self.samples = None if samples is None else min(samples, self.images.count)
        self.told: dict[str, Any] = {}

    def __call__(self, path: Path) -> float:
        """Share of 1. Raises GrailError where the weights are not the network's or its outputs are not finite."""
        module, architecture, _ = open_network(self.model, str(path), self.options)
        ready = architecture.preprocessing(module)
        judged = classifier(module.to(self.device), self.images, architecture.tokenizer())
        found = accuracies({"soup": judged}, self.images, ready, self.device, self.samples)
        self.told = {"data": found["data"], "samples": found["images"]}
        return found["accuracy"]["soup"]["top1"]


class _Scoring(Progress):
    """Another progress that calls the network by no name: a soup being tried has none."""

    def __init__(self, progress: Progress):
        self.say, self.warn = progress.say, progress.warn
        self.layers = lambda label: progress.layers("scoring")


class NegativePerplexity:
    """That of a language model in a folder, as `grail eval` measures it."""

    metric = "negative perplexity"

    def __init__(self, data: str, samples: int | None, device: str, progress: Progress):
        self.asked = {"data": data, "samples": samples, "device": device, "progress": _Scoring(progress)}
        self.told: dict[str, Any] = {}

    def __call__(self, path: Path) -> float:
        """Raises GrailError for a model type without a family, or a loss that is not finite."""
        from ..evaluate import evaluate

        found = evaluate(str(path), **self.asked)
        self.told = {"data": found["data"], "samples": found["windows"]}
        return -found["models"][str(path)]["perplexity"]


@dataclass
class Trial:
    """What became of one ingredient. score: its own, None where nothing was measured; score_with: that of the soup with
    it, None for the first and where that soup gives no finite outputs."""

    ingredient: Ingredient
    score: float | None
    taken: bool
    score_with: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For --json and soup.json."""
        scores = {"score": self.score, "score_with": self.score_with}
        return {"path": str(self.ingredient.path)} | scores | {"taken": self.taken}


def choose(
    ingredients: list[Ingredient], judge: Judge, score_of: Callable[[list[Ingredient]], float], progress: Progress
) -> tuple[list[Trial], float]:
    """(all ingredients, best first, and which were taken; the soup's score). score_of scores the average of several."""
    trials = []
    for one in ingredients:
        trials.append(Trial(one, judge(one.path), taken=False))
        progress.say(f"{one.path}: {told(judge.metric, trials[-1].score)}")
    trials.sort(key=lambda trial: -trial.score)
    best = trials[0]
    best.taken, score = True, best.score
    for trial in trials[1:]:
        chosen = [other.ingredient for other in trials if other.taken]
        try:
            trial.score_with = score_of([*chosen, trial.ingredient])
        except Circumstance:
            raise
        except GrailError as error:  # each alone passed, so it is what they are together: outputs that are not finite
            progress.warn(f"{trial.ingredient.path} is left out: the average with it gives no finite outputs ({error})")
            continue
        trial.taken = trial.score_with >= score
        score = trial.score_with if trial.taken else score
        verdict = "taken" if trial.taken else "left out"
        progress.say(f"with {trial.ingredient.path}: {told(judge.metric, trial.score_with)}, {verdict}")
    return trials, score


def told(metric: str, score: float) -> str:
    """A score as people say it."""
    return f"{score:.2%}" if metric == Accuracy.metric else f"perplexity {-score:.3f}"
