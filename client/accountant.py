"""Opacus' PRV accountant with a domain from our own Rényi bound.

A module of its own because Opacus takes a second to import, and a run without privacy needs none
of it. privacy.py is the only one that asks for it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv import Domain
from opacus.accountants.analysis.rdp import compute_rdp

from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spend import LARGEST_EPSILON, History

EPSILON_ERROR = 0.01  # the accountant's default; part of the upper bound it returns
MESH_POINTS = 1 << 21  # memory bound of one composition, about 200 MB
ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64), 128.0, 256.0, 512.0)


class Accountant(PRVAccountant):  # type: ignore[misc]  # Opacus has no types
    """Opacus' accountant with a domain from our own Rényi bound.

    Opacus computes the same domain with fewer orders and warns when the best one is at the
    edge of its list; the bound holds for any order, so there is nothing to warn about.
    """

    def _get_domain(
        self, prvs: Any, num_self_compositions: list[int], eps_error: float, delta_error: float
    ) -> Any:
        history = tuple(self.history)
        half = _half_width(history, eps_error, delta_error)
        mesh = eps_error * _mesh_unit(history, delta_error)
        return Domain.create_aligned(-half, half, mesh)


def bounds(history: History, delta: float) -> tuple[float, float]:
    """Return the accountant's lower and upper bound on ε of what was spent.

    Infinity beyond LARGEST_EPSILON. Raises PrivacyError if the accountant cannot bound it.
    """
    if _rdp_epsilon(history, delta) > LARGEST_EPSILON:
        return math.inf, math.inf
    accountant = Accountant()
    accountant.history = list(history)
    error, delta_error = _mesh_error(history, delta), delta / 1000  # the accountant's default
    try:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # log(1 − q), q = 1
            composed = accountant._get_dprv(eps_error=error, delta_error=delta_error)
            low, _, high = composed.compute_epsilon(delta, delta_error, error)
    except (RuntimeError, ValueError) as problem:
        raise PrivacyError(
            f"the PRV accountant cannot bound epsilon at delta = {delta:g} for (σ, q, steps) = "
            f"{history}: {problem}"
        ) from problem
    if not math.isfinite(high):
        raise PrivacyError(
            f"the PRV accountant gave {high} at delta = {delta:g} for (σ, q, steps) = {history}"
        )
    return max(float(low), 0.0), max(float(high), 0.0)


def _rdp_epsilon(history: History, delta: float) -> float:
    """Return the Rényi bound on ε (Balle et al. 2020, arXiv:1905.09982, theorem 21)."""
    orders = np.asarray(ORDERS)
    rdp = sum(steps * _rdp_of_step(sigma, q) for sigma, q, steps in history)
    bounds = rdp - np.log(delta * orders) / (orders - 1) + np.log1p(-1 / orders)
    valid = bounds[~np.isnan(bounds)]
    return float(valid.min()) if valid.size else math.inf


@functools.lru_cache(maxsize=1024)
def _rdp_of_step(sigma: float, q: float) -> NDArray[np.float64]:
    """Return the Rényi divergence of one step at ORDERS."""
    with np.errstate(all="ignore"):
        return np.asarray(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=ORDERS))


def _half_width(history: History, eps_error: float, delta_error: float) -> float:
    """Return L: privacy losses are truncated to [−L, L] (Gopi et al., remark 5.6)."""
    total = sum(steps for _, _, steps in history)
    whole = _rdp_epsilon(history, delta_error / 4)
    single = (_rdp_epsilon(((s, q, 1),), delta_error / (8 * total)) for s, q, _ in history)
    return max(whole, *single, eps_error) + 3


def _mesh_unit(history: History, delta_error: float) -> float:
    """Return the mesh size per unit of error in ε, as Opacus and the paper's own code have it."""
    total = sum(steps for _, _, steps in history)
    return 1 / math.sqrt(total * math.log(12 / delta_error) / 2)


def _mesh_error(history: History, delta: float) -> float:
    """Return the error in ε to allow: the default, or more where memory would run out."""
    delta_error = delta / 1000  # the accountant's default
    half = _half_width(history, EPSILON_ERROR, delta_error)
    return max(EPSILON_ERROR, 2 * half / (MESH_POINTS * _mesh_unit(history, delta_error)))
