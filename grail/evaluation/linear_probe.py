"""A linear probe: how well a linear classifier on a network's features does (Radford et al., ICML 2021, appendix A.3).

N images, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from ..errors import GrailError
from .zero_shot import features

ITERATIONS = 1000


def linear_probe(
    train: tuple[np.ndarray, Tensor], test: tuple[np.ndarray, Tensor], *, seed: int = 0
) -> dict[str, float | int]:
    """{"top1", "train_images", "count"}: scikit-learn's logistic regression (L2, C = 1 on standardised features) fitted
    on (features [N, D], labels [N]) and judged on others. Raises GrailError for one class alone."""
    if len(train[1].unique()) < 2:
        raise GrailError("--probe: the training images are all of one class")
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler, model = StandardScaler(), LogisticRegression(max_iter=ITERATIONS, random_state=seed)
    model.fit(scaler.fit_transform(train[0]), train[1].numpy())
    found = model.score(scaler.transform(test[0]), test[1].numpy())
    return {"top1": float(found), "train_images": len(train[1]), "count": len(test[1])}


@torch.no_grad()
def features_of(run: Callable[[Tensor], object], batches: Iterable[Tensor], device: torch.device) -> np.ndarray:
    """float64 [N, D]: what a network gives for images, flat. Raises GrailError where that is not finite."""
    found = torch.cat([features(run(batch.to(device))).flatten(1).double().cpu() for batch in batches])
    if not bool(found.isfinite().all()):
        raise GrailError("--probe: the network's features are not finite; try --dtype float32")
    return found.numpy()
