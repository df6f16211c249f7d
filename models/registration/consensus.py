"""From the votes of windows to a displacement field: the simplest model that they support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from uknowpan.models.registration.field import MODELS, Array, Registration, spline_weights

Bools = npt.NDArray[np.bool_]

LEAST_SHARE = 0.35
"""Share of the windows with a peak that must agree."""
LEAST_WINDOWS = 5
NEEDED = {"affine": 10, "local": 16}
"""Windows with a peak that a richer model needs; few overlapping ones agree by chance."""
TOLERANCE = 0.35
"""PAN pixels by which votes differ beyond their own uncertainty, through relief and texture."""
CUT = 3.0
"""Normalised residual beyond which a vote is an outlier."""
LEAST_GAIN = 0.15
"""Share of the left-out votes' cost that a richer model must take away."""
STIFFNESSES = (3.0, 0.3)
"""Weights of the local field's bending energy that are tried."""
TRIPLES = 400
"""Affine maps through three votes that are tried."""
MOST_AGREE = 0.5
"""Share of windows that agree on a shift or an affine map, beyond which votes far from it are no ground."""


class Votes:
    """Displacements that windows show; several may belong to one window.

    Args:
        window: (n,) numbers of the windows, rising.
        place: (n, 2) row and column on the PAN.
        shift: (n, 2) displacements.
        information: (n, 2, 2) inverses of their covariances.
        weight: (n,) from 0 to 1.
    """

    def __init__(self, window: Array, place: Array, shift: Array, information: Array, weight: Array):
        self.window, self.shift, self.weight = window, shift, weight
        self.row, self.col = place.T
        # Beyond its own uncertainty a vote differs from the field by relief and texture.
        self.information = np.linalg.inv(np.linalg.inv(information) + TOLERANCE**2 * np.eye(2))
        (self.down, _), (self.mixed, self.across) = np.linalg.cholesky(self.information).transpose(1, 2, 0)
        self.pull = np.einsum("nij,nj->ni", self.information, shift)
        self.fold = np.zeros(len(window))
        self.first = np.flatnonzero(np.diff(window, prepend=-1))

    def __len__(self) -> int:
        return len(self.window)

    def cost(self, field_at: Array, scale: float = 1.0) -> Array:
        """(..., n) squared normalised residuals about displacements (..., n, 2)."""
        off = self.shift - field_at
        squares: Array = (self.down * off[..., 0] + self.mixed * off[..., 1]) ** 2 + (self.across * off[..., 1]) ** 2
        return squares / scale**2

    def best(self, cost: Array) -> Bools:
        """The vote of each window that costs least, by costs (..., n)."""
        if len(self.first) == len(self):
            return np.ones(cost.shape, bool)
        order = np.lexsort((cost, np.broadcast_to(self.window, cost.shape)))
        chosen = np.zeros(cost.shape, bool)
        np.put_along_axis(chosen, order[..., self.first], True, -1)
        return chosen


def _design(none: Registration, rows: Array, cols: Array, model: str, nodes: tuple[int, int]) -> Array:
    """(n, K) values of the model's functions at places on the PAN."""
    u, v = (rows - none.centre[0]) / none.unit, (cols - none.centre[1]) / none.unit
    columns = [np.ones_like(u)]
    if model != "shift":
        columns += [u, v]
    if model == "local":
        columns += list(spline_weights(none, rows, cols, nodes).T)
    return np.stack(columns, 1)


@lru_cache(maxsize=8)
def _stiffness(nodes: tuple[int, int]) -> Array:
    """(K, K) bending energy of the nodes of a local model, and a little of their size."""
    n, m = nodes
    second = [np.diff(np.eye(k), 2, axis=0) for k in nodes]
    first = [np.diff(np.eye(k), 1, axis=0) for k in nodes]
    parts = [np.kron(second[0], np.eye(m)), np.kron(np.eye(n), second[1]), math.sqrt(2) * np.kron(*first)]
    energy = sum(p.T @ p for p in parts) + 1e-3 * np.eye(n * m)
    return np.pad(energy, (3, 0))


class _Model:
    """One of `MODELS` at the places of n votes, K functions: S robust fits at once, each from its own start.

    A fit's cost is that on parts of the scene that it did not see.
    """

    def __init__(self, none: Registration, votes: Votes, name: str, nodes: tuple[int, int], starts: Array):
        self.none, self.votes, self.name, self.nodes = none, votes, name, nodes
        self.design = _design(none, votes.row, votes.col, name, nodes)
        count = self.design.shape[1]
        prior = np.zeros((1, count, count))
        if name == "local":
            prior = np.multiply.outer(STIFFNESSES, _stiffness(nodes))
        elif name == "affine":  # a scene is not turned or stretched without votes to show it
            prior[:, 1:, 1:] = 0.5 * np.eye(2)
        prior = np.repeat(prior + 1e-9 * np.eye(count), len(starts), 0)
        self.starts = np.tile(starts, (len(prior) // len(starts), 1, 1))
        """(S, n, 2) displacements"""
        self.prior = np.kron(np.eye(2), prior)

    def equations(self, weights: Array) -> tuple[Array, Array]:
        """Normal equations of weighted least squares (S, n) with each vote's own information."""
        some = np.flatnonzero(weights.any(0))
        d, information, weights = self.design[some], self.votes.information[some], weights[:, some]
        normal = np.empty((len(weights), 2, d.shape[1], 2, d.shape[1]))
        for i, j in ((0, 0), (0, 1), (1, 1)):
            normal[:, i, :, j] = (d.T * (weights * information[:, i, j])[:, None]) @ d
        normal[:, 1, :, 0] = normal[:, 0, :, 1]
        right = d.T @ (weights[..., None] * self.votes.pull[some])
        return normal.reshape(self.prior.shape), right.swapaxes(1, 2).reshape(*self.prior.shape[:2], 1)

    def solved(self, normal: Array, right: Array) -> Array:
        """(..., S, K, 2) parameters."""
        parameters: Array = np.linalg.solve(normal + self.prior, right).astype(float, copy=False)
        return parameters.reshape(*right.shape[:-2], 2, -1).swapaxes(-2, -1)

    def weights(self, at: Array, scale: float = 1.0) -> Array:
        """Tukey's weights (S, n) of the votes about displacements (S, n, 2)."""
        cost = self.votes.cost(at, scale)
        return self.votes.weight * np.clip(1 - cost / CUT**2, 0, None) ** 2 * self.votes.best(cost)

    def fit(self, scales: Sequence[float]) -> Array:
        """(S, K, 2) parameters, the scale shrinking from fit to fit."""
        at = self.starts
        for scale in scales:
            parameters = self.solved(*self.equations(self.weights(at, scale)))
            at = self.design @ parameters
        return parameters

    def left_out(self, parameters: Array) -> Array:
        """(S,) mean capped costs (0 to 1) of votes about fits that did not see their part of the scene."""
        votes, at = self.votes, self.design @ parameters
        weights, best = self.weights(at), votes.weight * votes.best(votes.cost(at))
        parts = [votes.fold == fold for fold in range(4)]
        seen = (np.stack(sides) for sides in zip(*(self.equations(weights * part) for part in parts), strict=True))
        unseen = self.solved(*(own.sum(0) - own for own in seen))
        for part, fitted in zip(parts, unseen, strict=True):
            at[:, part] = self.design[part] @ fitted
        costs: Array = (best * np.minimum(votes.cost(at), CUT**2)).sum(1) / best.sum(1) / CUT**2
        return costs

    def registration(self, parameters: Array) -> Registration:
        coefficients = np.zeros((2, 3))
        affine = parameters[: 1 if self.name == "shift" else 3]
        coefficients[:, : len(affine)] = affine.T
        nodes = parameters[3:].T.reshape(2, *self.nodes) if self.name == "local" else None
        return replace(self.none, model=self.name, coefficients=coefficients, nodes=nodes)


def _scores(votes: Votes, fields: Array) -> Array:
    """(k,) of fields (k, n, 2): the sum over windows of weight x what is left of one vote below the cut."""
    gain = votes.weight * np.clip(1 - votes.cost(fields) / CUT**2, 0, None)
    scores: Array = np.maximum.reduceat(gain, votes.first, 1).sum(1)
    return scores


def _starts(none: Registration, votes: Votes) -> list[Array]:
    """The best shift among the votes, and the best affine map through three of them."""
    rng = np.random.default_rng(0)
    shifts = votes.shift[np.argsort(-votes.weight)[:150], None]
    starts = [np.broadcast_to(shifts[_scores(votes, shifts).argmax()], votes.shift.shape)]
    top = votes.best(-votes.weight)
    if top.sum() < LEAST_WINDOWS:
        return starts
    design = _design(none, votes.row, votes.col, "affine", (4, 4))
    # Three votes at random, by their chances: the least of exponential numbers.
    chances = votes.weight * np.where(top, 1, 0.3)
    numbers = rng.exponential(size=(TRIPLES, len(votes))) / np.maximum(chances, 1e-12)
    threes = np.argpartition(numbers, 2, 1)[:, :3]
    threes = threes[np.abs(np.linalg.det(design[threes])) >= 0.25]
    maps = np.linalg.solve(design[threes], votes.shift[threes])
    maps = maps[np.abs(maps[:, 1:]).max((1, 2)) <= 6] if len(maps) else maps
    if len(maps):
        fields = design @ maps
        starts.append(fields[_scores(votes, fields).argmax()])
    return starts


def _folds(none: Registration, votes: Votes) -> Array:
    """Four parts of the scene, in square blocks: sixteen of them cover it, so that a strip has several along itself."""
    block = math.sqrt(none.span[0] * none.span[1]) / 4
    folds: Array = 2 * (np.floor(votes.row / block) % 2) + np.floor(votes.col / block) % 2
    return folds


def consensus(none: Registration, votes: Votes, richest: str) -> Registration:
    """From the first look's peaks to a field; `none` where too few windows agree."""
    if len(votes.first) < LEAST_WINDOWS:
        return none
    return _chosen(none, votes, _starts(none, votes), richest, 1)


def refit(best: Registration, votes: Votes, richest: str, parts: int) -> Registration:
    """A fit anew to what `parts` of each window show about the last field."""
    none = replace(best, model="none", coefficients=np.zeros((2, 3)), nodes=None)
    if len(votes) < LEAST_WINDOWS * parts / 2:
        return none
    at = replace(best, bands=np.zeros_like(best.bands)).at(votes.row, votes.col).T
    return _chosen(none, votes, [at], richest, parts)


def _chosen(none: Registration, votes: Votes, starts: Sequence[Array], richest: str, parts: int) -> Registration:
    """The simplest model that the votes support."""
    votes.fold = _folds(none, votes)
    intervals = max(2, min(6, round(math.sqrt(len(votes.first) / parts) * 0.6)))
    nodes = (intervals + 3, intervals + 3)
    # Where most of the scene agrees on little, what lies elsewhere is no ground.
    wide = parts == 1 and max(_share(votes, at) for at in starts) < MOST_AGREE
    windows = len(votes.first) if parts == 1 else none.voters
    chosen: tuple[float, _Model, Array] | None = None
    for name in MODELS[1 : MODELS.index(richest) + 1]:
        if windows < NEEDED.get(name, 0):
            continue
        model = _Model(none, votes, name, nodes, np.stack(starts))
        fits = model.fit((4.0, 2.5, 1.6, 1.0, 1.0) if wide and name == "local" else (1.6, 1.3, 1.0, 1.0))
        costs = model.left_out(fits)
        cost, parameters = costs.min(), fits[costs.argmin()]
        if chosen is None or cost < (1 - LEAST_GAIN) * chosen[0] - 0.01:
            chosen = (cost, model, parameters)
    assert chosen is not None
    return _judged(chosen[1], chosen[2], parts)


def _share(votes: Votes, at: Array) -> float:
    """Weighted share of the windows that agree with displacements (n, 2)."""
    cost = votes.cost(at)
    best = votes.best(cost)
    return float(votes.weight[best & (cost < CUT**2)].sum() / votes.weight[best].sum())


def _judged(model: _Model, parameters: Array, parts: int) -> Registration:
    """A registration with its consensus; `none` where too few windows agree."""
    votes, at, none = model.votes, model.design @ parameters, model.none
    cost = votes.cost(at)
    best = votes.best(cost)
    agree = best & (cost < CUT**2)
    # Windows that had a peak at first and none about the field speak against it.
    voters = max(none.voters, math.ceil(best.sum() / parts))
    share = float(votes.weight[agree].sum() / (votes.weight[best].sum() * voters * parts / best.sum()))
    measured = replace(none, voters=voters, share=share, windows=math.ceil(agree.sum() / parts))
    if measured.windows < LEAST_WINDOWS or share < LEAST_SHARE:
        return measured
    off = (votes.shift - at)[agree]
    field = model.registration(parameters)
    return replace(
        measured,
        model=field.model,
        coefficients=field.coefficients,
        nodes=field.nodes,
        residual=float(np.sqrt((off**2).sum(1).mean())),
        votes=np.column_stack([votes.row, votes.col, votes.shift, np.where(agree, votes.weight, 0)])[best],
    )
