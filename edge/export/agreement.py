"""Do all ways of training in a bundle compute the same gradient?

The fp32 graphs have been compared with torch (joint_check.py). Here, on one made-up batch and a
moved adapter, through the device's own engines:

    onnxruntime-training   ‖g − g_fp32‖ ≤ TOLERANCE · ‖g_fp32‖
    int8, int4 weights     cos(g, g_fp32) ≥ LEAST_COSINE: rounded weights, not another model
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anabranch.edge.runtime.bundle_manifest import Precision
from anabranch.edge.runtime.engine import Batch, Engine
from anabranch.edge.runtime.joint import open_engine
from anabranch.edge.runtime.measure import made_up, unverified
from anabranch.protocols.errors import ReleaseError

TOLERANCE = 1e-4
LEAST_COSINE = 0.8
RECORDS, TOKENS = 4, 8
MOVED = 0.02  # standard deviation: factors B that are zero would leave A without a gradient


def require_agreement(folder: Path, precisions: Sequence[Precision], *, artifacts: bool) -> None:
    """Raise ReleaseError if an engine or a precision of the bundle computes something else."""
    bundle = unverified(folder)
    rng = np.random.default_rng(0)
    moved = {
        name: a + rng.normal(0, MOVED, a.shape).astype(np.float32)
        for name, a in bundle.adapter.arrays.items()
    }
    labels = np.arange(RECORDS, dtype=np.int64) % len(bundle.manifest.labels)
    tokens = min(TOKENS, bundle.manifest.limits.max_tokens)
    feeds = made_up(bundle.manifest, RECORDS, tokens)
    batch = Batch(feeds, labels, np.full(RECORDS, 1 / RECORDS, np.float32))
    truth = _gradient(open_engine(bundle), moved, batch)
    if artifacts:
        got = _gradient(open_engine(bundle, engine="ort-training"), moved, batch)
        worst = float(np.linalg.norm(got - truth)) / max(float(np.linalg.norm(truth)), 1e-30)
        if not worst <= TOLERANCE:
            raise ReleaseError(
                f"the onnxruntime-training artifacts and the plain graph differ by {worst:.2g} of "
                f"the gradient's norm, at most {TOLERANCE:g} is allowed; leave them out with "
                "--no-artifacts"
            )
    for precision in precisions:
        if precision == "fp32":
            continue
        got = _gradient(open_engine(bundle, precision=precision), moved, batch)
        norms = float(np.linalg.norm(got) * np.linalg.norm(truth))
        cosine = float(got @ truth) / max(norms, 1e-30)
        if not cosine >= LEAST_COSINE:
            raise ReleaseError(
                f"the gradient over {precision} weights points elsewhere than over fp32 (cosine "
                f"{cosine:.3f}, at least {LEAST_COSINE:g} is expected): leave {precision} out, "
                "choose others with --precision"
            )


def _gradient(
    engine: Engine, params: dict[str, NDArray[np.float32]], batch: Batch
) -> NDArray[np.float64]:
    engine.set_params(params)
    arrays = engine.grads(batch).arrays
    engine.close()
    return np.concatenate([arrays[name].ravel().astype(np.float64) for name in sorted(arrays)])
