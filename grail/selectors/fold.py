"""fold: k-means over the producers' rows, each cluster becomes one channel; REFERENCE section 1.

Shapes: H width, D columns of all producers together, U distinct rows, K clusters.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import GrailError
from ..reduction import Folding, Reduction
from ..statistics import DIAGONAL
from .base import PRODUCERS, Selector, SiteView
from .magnitude import Magnitude
from .wanda import WandaSP

HEAD_SCORES = {cls.name: cls for cls in (WandaSP, Magnitude)}
ITERATIONS = 50


@dataclass
class Fold(Selector):
    """Channels whose producer rows point to the same place are averaged; heads are selected, not folded.

    heads: the score that selects heads. Duplicates share a cluster, so that folding H channels of which at most K are
    distinct loses nothing. The result depends on the seed, not on the channels' order (rounding of the norms apart).
    Cost: the distances between all rows once (H² D multiplications, 4 H² bytes) and H K D multiplications per
    iteration, on one thread: threads add up the centroids in an order that differs from run to run. At H = 11008,
    D = 8192 and half the channels kept that is 2 TFLOP, 1 TFLOP for each of a few iterations, and 2 GB.
    """

    name = "fold"
    summary = "average channels with similar producers (k-means on their weights); heads are selected"
    source = "Model folding (Wang et al., ICLR 2025), as in GRAIL (Tang et al., CPAL 2026)"
    needs = frozenset({PRODUCERS, DIAGONAL})

    heads: str = "wanda-sp"

    def __post_init__(self):
        if self.heads not in HEAD_SCORES:
            raise GrailError(f"--set heads={self.heads}: expected one of {', '.join(HEAD_SCORES)}")

    def needs_of(self, kind: str) -> frozenset[str]:
        return frozenset({PRODUCERS}) if kind == "channels" else HEAD_SCORES[self.heads].needs

    def folds(self, kind: str) -> bool:
        return kind == "channels"

    def select(self, site: SiteView) -> Reduction:
        """Raises GrailError naming the site when a producer's weight is not finite, ValueError for channels that come
        in groups."""
        if site.kind != "channels":
            return HEAD_SCORES[self.heads]().select(site)
        if site.units.groups != 1 or site.units.size != 1:
            raise ValueError(f"{site.name}: folding takes single channels in one group, got {site.units}")
        if site.kept == site.units.width:
            return Folding(torch.arange(site.kept))
        rows_HD = _rows(site)
        first_U, distinct_H = _distinct(site)
        if len(first_U) <= site.kept:
            cluster_H = _split(distinct_H, rows_HD, site.kept)
        else:
            rows_UD = rows_HD[first_U]
            seed = int(torch.randint(2**31 - 1, (1,), generator=site.generator()))
            labels_U = _k_means(rows_UD, np.bincount(distinct_H).astype(rows_UD.dtype), site.kept, seed)
            cluster_H = _split(labels_U, rows_UD, site.kept)[distinct_H]
        return Folding(torch.from_numpy(_by_first_member(cluster_H)))


def _rows(site: SiteView) -> np.ndarray:
    """[H, D]: the producers side by side, each divided by the Frobenius norm of its matrix, so that none outweighs the
    others; float64 if one of them is, else float32."""
    parts = []
    for name, rows in site.producers.items():
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).cpu()
        norm = torch.linalg.vector_norm(rows, dtype=torch.float64).item()
        if not np.isfinite(norm):
            raise GrailError(f"{site.name}: the weight of {name} holds NaN or infinity; check the checkpoint")
        parts.append(rows / norm if norm > 0 else rows)
    return torch.cat(parts, dim=1).numpy()


def _distinct(site: SiteView) -> tuple[np.ndarray, np.ndarray]:
    """(first [U], number [H]): the distinct rows of the producers in an order of their own contents, whatever the order
    of the channels, each by the first channel that has it; and the number 0..U-1 of each channel's row."""
    digests = [hashlib.blake2b(digest_size=16) for _ in range(site.units.width)]
    for rows in site.producers.values():
        for digest, row in zip(digests, rows.cpu(), strict=True):
            digest.update((row.double() + 0.0).numpy())  # -0 + 0 is 0
    keys = np.array([digest.hexdigest() for digest in digests])
    _, first_U, number_H = np.unique(keys, return_index=True, return_inverse=True)
    return first_U, number_H


def _k_means(rows_UD: np.ndarray, weight_U: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Labels [U] of weighted k-means, from greedy k-means++ seeds; some of 0..count-1 may be missing."""
    from sklearn.cluster import KMeans  # takes a second to import, which only this method should pay
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics.pairwise import euclidean_distances
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer clusters than asked: `_split` makes up for it
        seeds_K = _seeds(euclidean_distances(rows_UD, squared=True), weight_U, count, seed)
        means = KMeans(count, init=rows_UD[seeds_K], n_init=1, max_iter=ITERATIONS)
        return means.fit(rows_UD, sample_weight=weight_U).labels_


def _seeds(distance_UU: np.ndarray, weight_U: np.ndarray, count: int, seed: int) -> list[int]:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): each seed is the best of 2 + log K drawn in proportion to the
    squared distance to the nearest seed so far. scikit-learn's own, which computes those distances anew for every
    draw, takes ten times as long where a seed is wanted for every second row."""
    random = np.random.default_rng(seed)
    trials = 2 + int(np.log(count))
    nearest_U = np.full(len(weight_U), np.inf, dtype=distance_UU.dtype)
    chance_U = weight_U
    seeds: list[int] = []
    for _ in range(count):
        total_U = np.cumsum(chance_U, dtype=np.float64)
        drawn = np.searchsorted(total_U, random.random(trials) * total_U[-1], side="right")
        drawn = np.minimum(drawn, len(weight_U) - 1)
        nearest_TU = np.minimum(nearest_U, distance_UU[drawn])
        best = int((nearest_TU @ weight_U).argmin())
        nearest_U = nearest_TU[best]
        chance_U = nearest_U * weight_U
        seeds.append(int(drawn[best]))
    return seeds


def _split(labels: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Exactly `count` clusters 0..count-1 out of at most as many: members leave clusters of several for one of their
    own, the farthest from its mean first, among equals the last."""
    _, labels = np.unique(labels, return_inverse=True)
    sizes = np.bincount(labels)
    missing = count - len(sizes)
    if missing == 0:
        return labels
    means = np.zeros((len(sizes), rows.shape[1]))
    np.add.at(means, labels, rows)
    means /= sizes[:, None]
    distance = np.square(rows - means[labels]).sum(1)
    sizes = sizes.tolist()
    for member in np.lexsort((-np.arange(len(labels)), -distance)):
        if missing and sizes[labels[member]] > 1:
            sizes[labels[member]] -= 1
            labels[member] = count - missing
            sizes.append(1)
            missing -= 1
    return labels


def _by_first_member(cluster_H: np.ndarray) -> np.ndarray:
    """The same clusters, numbered in the order of their first members."""
    _, first_K, cluster_H = np.unique(cluster_H, return_index=True, return_inverse=True)
    return first_K.argsort().argsort()[cluster_H]
