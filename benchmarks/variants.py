"""Variants of the stream target that were tried, each against the same base: what helped went into the package, and
what did not stays here with its figures.

    python benchmarks/variants.py              # all that are not stored
    python benchmarks/variants.py sweep swaps  # some
    python benchmarks/variants.py --render     # the table, from what is stored

The repair is written down once more in plain float32 torch on tensors in memory, so that the base also checks the
package. Multi-head SmolLM2-135M, wanda-sp, 2 of 9 heads and 461 of 1536 channels, 32 windows of 512 tokens of the
built-in text and 4 held-out ones that decide; perplexity on the held-out topics and on held-out docstrings. A line of
benchmarks/results/variants.jsonl for each.

Shapes: T tokens, H a site's width, K kept, O outputs, D hidden size; streams are [B, L, D].
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from table_llm import append, stored
from torch import Tensor
from variants_math import DAMP, damped_inverse, exchanged, falling, first_axes, left_over, ridge_solve
from variants_network import SIZES, Network, Place, Texts, each

from grail.report import versions
from grail.selectors.elimination import Elimination, greedy

RESULTS = Path(__file__).parent / "results"
STORE, TABLE = RESULTS / "variants.jsonl", RESULTS / "variants.md"
RIDGES = (1e-3, 1e-2, 1e-1)
KEPT = {"heads": 7, "channels": 1075}


@dataclass(frozen=True)
class Variant:
    """What differs from the base: the stream target, α and λ of each site by its held-out windows.

    target: "stream" or "hidden" (α = 0)
    select: "wanda", "gram", or "gram-stream" (greedy on the weight that the stream target asks for)
    tokens: weights of rows in G and M: "" (1), "half" (1 / (e + median e)) or "inverse" (1 / e), e the mean square of
        the dense stream
    only: the weights of rows are for S alone
    scale: λ in proportion to the "mean" of the channels' energies, to their "median", or to each "channel"'s own
    shrink: "site" (one α), "output" (one for each), or along the principal axes of S z "axes" (one for each), "rank"
        (one for the first) and "falling" (one for each that does not rise)
    alpha: the same for all sites, if not by the deciding windows
    ridges: candidates of λ
    apart: another λ for S than for P
    residual: S is fitted to t − P z, what the own repair leaves, instead of t − W h
    producers: the readers of the stream are first re-solved towards what they read in the dense network, judged by what
        they read ("input") or make of it ("weight")
    sweeps: how often the consumer is re-solved, each time towards what is left
    joint: o_proj is solved again together with down_proj
    swaps: exchanges of kept and removed channels that lower the exact error
    """

    target: str = "stream"
    select: str = "wanda"
    tokens: str = ""
    only: bool = False
    scale: str = "mean"
    shrink: str = "site"
    alpha: float | None = None
    ridges: tuple[float, ...] = RIDGES
    apart: bool = False
    residual: bool = False
    producers: str = ""
    sweeps: int = 1
    joint: bool = False
    swaps: int = 0


BASE = Variant()
VARIANTS = {
    "stream": BASE,
    "hidden": replace(BASE, target="hidden"),
    "alpha 0.5": replace(BASE, alpha=0.5),
    "alpha 1": replace(BASE, alpha=1.0),
    "alpha 0.5, ridge 0.001": replace(BASE, alpha=0.5, ridges=(1e-3,)),
    "smaller ridges": replace(BASE, ridges=(1e-4, 1e-3, 1e-2)),
    "weighted tokens": replace(BASE, tokens="inverse"),
    "weighted tokens, half": replace(BASE, tokens="half"),
    "weighted tokens, half, for S": replace(BASE, tokens="half", only=True),
    "weighted tokens for S": replace(BASE, tokens="inverse", only=True),
    "ridge by channel": replace(BASE, scale="channel"),
    "ridge by the median": replace(BASE, scale="median"),
    "ridge by the median, hidden": replace(BASE, scale="median", target="hidden"),
    "another ridge for S": replace(BASE, apart=True),
    "alpha by output": replace(BASE, shrink="output"),
    "alpha by axis": replace(BASE, shrink="axes"),
    "alpha by axis, falling": replace(BASE, shrink="falling"),
    "first axes alone": replace(BASE, shrink="rank"),
    "producers": replace(BASE, producers="input"),
    "producers by weight": replace(BASE, producers="weight"),
    "sweep": replace(BASE, sweeps=2),
    "three sweeps": replace(BASE, sweeps=3),
    "S to what P leaves": replace(BASE, residual=True),
    "S to what P leaves, sweep": replace(BASE, residual=True, sweeps=2),
    "joint": replace(BASE, joint=True),
    "swaps": replace(BASE, swaps=20),
    "gram": replace(BASE, select="gram"),
    "gram, swaps": replace(BASE, select="gram", swaps=20),
    "gram on the stream": replace(BASE, select="gram-stream"),
}


@dataclass
class Rows:
    """Of one site: hidden vectors and targets t = r_d − r_c of the calibration tokens, and those of the windows that
    decide with each row's weight [T, 1]."""

    h: Tensor
    t: Tensor
    trial_h: Tensor
    trial_t: Tensor
    weight: Tensor


@dataclass
class Choice:
    """A candidate W' [O, K] and its error on the deciding windows."""

    error: float
    weight: Tensor
    alpha: float


class Run:
    """One compression with everything in memory: the dense stream, the compressed one, and those of the evaluations."""

    def __init__(self, network: Network, texts: Texts, variant: Variant):
        self.net, self.texts, self.variant = network, texts, variant
        self.trials = slice(len(texts.calibration), None)
        ids = torch.cat([texts.calibration, texts.trial])
        self.dense, self.compressed = network.embed(ids), network.embed(ids)
        self.judged = {name: network.embed(ids) for name, ids in texts.evaluation.items()}
        self.alphas: list[float] = []
        self.notes: dict[str, list[float]] = {}
        self.reader: Tensor | None = None

    def perplexities(self) -> dict[str, float]:
        """Compress site by site, and what the network says then."""
        for layer in range(self.net.layers):
            attention = self._site(Place(layer, "heads"))
            self._site(Place(layer, "channels"), attention)
        return {name: math.exp(self.net.loss(x, self.texts.evaluation[name])) for name, x in self.judged.items()}

    def _site(self, place: Place, before: tuple | None = None) -> tuple:
        net, variant = self.net, self.variant
        dense_before, weight = self.dense, net.consumer(place)
        self.dense = net.advance(place, dense_before)
        self.reader = self._producers(place, dense_before) if variant.producers else None
        h = net.hidden(place, self.compressed, self.reader)
        rows = self._rows(h, self.dense - self.compressed)
        gram, cross = self._moments(rows)
        kept = self._selected(place, weight, gram, cross)
        choice = self._solved(weight, kept, gram, cross, rows)
        if variant.joint and before is not None and self._jointly(before, kept, choice.weight):
            rows = self._rows(net.hidden(place, self.compressed), self.dense - self.compressed)
            choice = self._solved(weight, kept, *self._moments(rows), rows)
        self.alphas.append(choice.alpha)
        state = (place, kept, choice.weight, self.compressed, dict(self.judged))
        self._apply(place, kept, choice.weight, self.reader)
        return state

    def _apply(self, place: Place, kept: Tensor, weight: Tensor, reader: Tensor | None = None) -> None:
        self.compressed = self.net.advance(place, self.compressed, kept, weight, reader)
        self.judged = {name: self.net.advance(place, x, kept, weight, reader) for name, x in self.judged.items()}

    def _rows(self, h: Tensor, t: Tensor) -> Rows:
        counted = slice(0, self.trials.start)
        weight = 1 / self.dense[self.trials].square().mean(-1).flatten()[:, None]
        parts = (x[part].flatten(0, 1) for part in (counted, self.trials) for x in (h, t))
        return Rows(*parts, weight)

    def _moments(self, rows: Rows, *, weighted: bool | None = None) -> tuple[Tensor, Tensor]:
        """G [H, H] and M = Σ h tᵀ [H, O], float64 of float32 products; weighted None: unless the weights are for S."""
        h = rows.h
        if self.variant.tokens and (weighted or (weighted is None and not self.variant.only)):
            energy = self.dense[: self.trials.start].square().mean(-1).flatten()[:, None]
            half = energy.median() if self.variant.tokens == "half" else 1e-6
            h = h * (energy.median() / (energy + half))
        return (h.mT @ rows.h).double(), (h.mT @ rows.t).double()

    def _selected(self, place: Place, weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
        """Channels that stay, ascending."""
        size, count = SIZES[place.kind], KEPT[place.kind]
        units = len(gram) // size
        if self.variant.select == "wanda":
            scores = (weight.abs() * gram.diagonal().sqrt().float()).sum(0).view(units, size).sum(1)
            found = scores.argsort(descending=True)[:count].sort().values
        else:
            inverse = damped_inverse(gram, DAMP)
            wide = weight.double()
            if self.variant.select == "gram-stream":
                wide = wide + 0.5 * (cross.mT @ inverse - wide)
            state = Elimination(inverse, wide, size, str(place))
            greedy(state, 1, units - count, batch=4 if size == 1 else 1)
            found = state.alive.nonzero()[:, 0]
        kept = (found[:, None] * size + torch.arange(size)).flatten()
        return self._swapped(kept, weight.double(), gram) if self.variant.swaps and size == 1 else kept

    def _swapped(self, kept: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
        """Channels added that gain most and removed that cost least, as long as the error after the repair falls."""
        first = error = left_over(kept, weight, gram)
        step = 64
        for _ in range(self.variant.swaps):
            if not step:
                break
            other = exchanged(kept, weight, gram, step)
            found = left_over(other, weight, gram)
            if found < error:
                kept, error = other, found
            else:
                step //= 2
        self.notes.setdefault("error after swaps, share of before", []).append(error / first)
        return kept

    def _solved(self, weight: Tensor, kept: Tensor, gram: Tensor, cross: Tensor, rows: Rows) -> Choice:
        """The best of all λ, solved again towards what is left as often as there are sweeps."""
        anchor = weight[:, kept].double()
        matrix, asked = gram[kept][:, kept], weight.double() @ gram[:, kept]
        own, stream = asked - anchor @ matrix, cross[kept].mT - asked
        other = None
        if self.variant.only:
            gram, cross = self._moments(rows, weighted=True)
            other = gram[kept][:, kept], cross[kept].mT - weight.double() @ gram[:, kept]
        best = self._best(anchor, matrix, own, stream, kept, rows, other)
        for _ in range(self.variant.sweeps - 1):
            left = cross[kept].mT - best.weight.double() @ matrix
            again = self._best(best.weight.double(), matrix, torch.zeros_like(left), left, kept, rows)
            self.notes.setdefault("held-out error after the sweep, share of before", []).append(
                again.error / max(best.error, 1e-30)
            )
            best = again if again.error < best.error else best
        return best

    def _best(
        self,
        anchor: Tensor,
        matrix: Tensor,
        own: Tensor,
        stream: Tensor,
        kept: Tensor,
        rows: Rows,
        other: tuple[Tensor, Tensor] | None = None,
    ) -> Choice:
        """The best of all λ; other: matrix and right-hand side of S, where they are not those."""
        solved = {
            ridge: ridge_solve(matrix, torch.cat([own, stream]), ridge, self.variant.scale)
            for ridge in self.variant.ridges
        }
        if self.variant.residual:
            for ridge, both in solved.items():
                remains = own + stream - both[: len(own)] @ matrix
                both[len(own) :] = ridge_solve(matrix, remains, ridge, self.variant.scale)
        if other is not None:
            for ridge, both in solved.items():
                both[len(own) :] = ridge_solve(*other, ridge, self.variant.scale)
        z, scale = rows.trial_h[:, kept], rows.weight.sqrt()
        left, made = {}, {}
        for ridge, both in solved.items():
            p, s = both.split(len(own))
            left[ridge] = ((rows.trial_t - z @ (anchor + p).float().mT) * scale).double()
            made[ridge] = ((z @ s.float().mT) * scale).double()
        pairs = [(a, b) for a in self.variant.ridges for b in self.variant.ridges if a == b or self.variant.apart]
        found = []
        for a, b in pairs:
            p, s = solved[a][: len(own)], solved[b][len(own) :]
            if self.variant.target == "hidden":
                found.append(Choice(left[a].square().sum().item(), (anchor + p).float(), 0.0))
                continue
            change, error, alpha = self._shrunk(left[a], made[b], s, matrix)
            found.append(Choice(error, (anchor + p + change).float(), alpha))
        return min(found, key=lambda choice: choice.error)

    def _shrunk(self, left: Tensor, made: Tensor, s: Tensor, matrix: Tensor) -> tuple[Tensor, float, float]:
        """α S, the error with it, and the mean α."""
        shrink = self.variant.shrink
        axes = torch.eye(len(s), dtype=torch.float64)
        if shrink in ("axes", "rank", "falling"):
            axes = torch.linalg.eigh(s @ matrix @ s.mT).eigenvectors.flip(1)
            left, made = left @ axes, made @ axes
        mixed, energy = (left * made).sum(0), made.square().sum(0)
        if shrink == "site":
            mixed, energy = mixed.sum().expand_as(mixed), energy.sum().expand_as(energy)
        if shrink == "falling":
            alphas = falling(mixed, energy)
        elif shrink == "rank":
            alphas = first_axes(mixed, energy)
        else:
            alphas = (mixed / (energy + 1e-30)).clamp(0, 1)
        if self.variant.alpha is not None:
            alphas = torch.full_like(mixed, self.variant.alpha)
        return (axes * alphas) @ (axes.mT @ s), (left - made * alphas).square().sum().item(), alphas.mean().item()

    def _producers(self, place: Place, dense_before: Tensor) -> Tensor:
        """I + α C [D, D]: what the readers of the stream take on, so that what they read is that of the dense one."""
        norm = self.net.norm(place)
        seen, wanted = each(self.compressed, norm), each(dense_before, norm)
        difference, n = wanted - seen, self.trials.start
        x, d = (part[:n].flatten(0, 1) for part in (seen, difference))
        matrix, right = (x.mT @ x).double(), (d.mT @ x).double()
        x, d = (part[n:].flatten(0, 1) for part in (seen, difference))
        reader = self.net.readers(place) if self.variant.producers == "weight" else torch.eye(x.shape[1])
        best = (math.inf, 0.0, right)
        for ridge in (*RIDGES, 1.0):
            change = ridge_solve(matrix, right, ridge)
            made, left = x @ change.float().mT @ reader.mT, d @ reader.mT
            alpha = ((made * left).sum() / (made.square().sum() + 1e-30)).clamp(0, 1).item()
            best = min(best, ((left - alpha * made).square().sum().item(), alpha, change), key=lambda c: c[0])
        self.notes.setdefault("alpha of the producers", []).append(best[1])
        return torch.eye(len(right)) + best[1] * best[2].float()

    def _jointly(self, before: tuple, kept: Tensor, weight: Tensor) -> bool:
        """Let o_proj take on what the layer's output still lacks, if the deciding windows agree once the MLP has been
        computed anew. Returns whether they did; the stream is then the new one."""
        place, units, consumer, start, judged = before
        mlp, counted = Place(place.layer, "channels"), slice(0, self.trials.start)
        z = self.net.hidden(place, start)[..., units]
        left = self.dense - self.net.advance(mlp, self.compressed, kept, weight)
        rows, d = z[counted].flatten(0, 1), left[counted].flatten(0, 1)
        matrix, right = (rows.mT @ rows).double(), (d.mT @ rows).double()
        scale = self.dense[self.trials].square().mean(-1, keepdim=True).rsqrt()
        best = ((left[self.trials] * scale).square().sum().item(), None)
        first = best[0]
        for ridge in RIDGES:
            change = ridge_solve(matrix, right, ridge).float()
            for alpha in (0.25, 0.5, 1.0):
                tried = consumer + alpha * change
                middle = self.net.advance(place, start[self.trials], units, tried)
                after = self.net.advance(mlp, middle, kept, weight)
                error = ((self.dense[self.trials] - after) * scale).square().sum().item()
                best = min(best, (error, tried), key=lambda c: c[0])
        self.notes.setdefault("held-out error after the joint solve, share of before", []).append(best[0] / first)
        if best[1] is None:
            return False
        self.compressed, self.judged = start, judged
        self._apply(place, units, best[1])
        return True


def render(rows: list[dict]) -> None:
    """variants.md."""
    names = list(VARIANTS)
    rows = sorted((row for row in rows if row["name"] in names), key=lambda row: names.index(row["name"]))
    lines = ["| variant | perplexity (built-in / docstrings) | mean α | noted |", "|---" * 4 + "|"]
    for row in rows:
        both = " / ".join(f"{value:.2f}" for value in row["perplexity"].values())
        noted = "; ".join(f"{what} {value:.3f}" for what, value in row["notes"].items())
        lines.append(f"| {row['name']} | {both} | {row['alpha']:.2f} | {noted} |")
    TABLE.write_text(
        "What was tried beside the stream target (multi-head SmolLM2-135M, wanda-sp 0.3, 32 windows; dense 13.19 /\n"
        "15.39). "
        "Made by `python benchmarks/variants.py`, whose `Variant` says what each line is.\n\n" + "\n".join(lines) + "\n"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(VARIANTS))
    parser.add_argument("--render", action="store_true", help="only the table, from what is stored")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in VARIANTS]:
        parser.error(f"no variant {unknown[0]}; choose of {', '.join(VARIANTS)}")
    done = {row["name"] for row in stored(STORE)}
    todo = [name for name in asked.names or VARIANTS if name not in done]
    if todo and not asked.render:
        network = Network.of_smollm2()
        texts = Texts.of(network)
        for name in todo:
            start, run = time.perf_counter(), Run(network, texts, VARIANTS[name])
            found = {"name": name, "variant": asdict(VARIANTS[name]), "perplexity": run.perplexities()}
            found["alpha"] = sum(run.alphas) / len(run.alphas)
            found["notes"] = {what: sum(values) / len(values) for what, values in run.notes.items()}
            found |= {"seconds": time.perf_counter() - start, "versions": versions()}
            append(found, STORE)
            sys.stderr.write(f"{name}: {found['perplexity']}\n")
    render(stored(STORE))


if __name__ == "__main__":
    main()
