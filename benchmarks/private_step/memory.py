"""Peak memory of a step, each variant in a process of its own.

The child loads the model, takes one step on a single record so that code and libraries are in
memory, drops all gradients and gives freed memory back to the system. From there on the kernel
counts anew: writing 5 to /proc/self/clear_refs sets the high-water mark VmHWM to the resident
memory as it is (Linux, proc(5)). What three steps on the whole batch add to it is the figure.

Allocation is the same for all: one arena, blocks of 64 KiB and more from the system and back
to it as soon as they are freed. Otherwise malloc keeps what a variant has freed, and the figure
depends on the order of sizes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from anabranch.client.tuning.lora import trainable_parameters
from benchmarks.private_step import workloads
from benchmarks.private_step.steps import VARIANTS, plan

MALLOC: Mapping[str, str] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
STEPS = 3


def peaks(script: Path, workload: str, variant: str, repeats: int) -> list[int]:
    """Return the bytes above the loaded model in each of `repeats` children.

    `script` is run with --memory WORKLOAD VARIANT and must print what `measure` returns.
    """
    command = [sys.executable, str(script), "--memory", workload, variant]
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(repeats):
        run = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        found.append(int(json.loads(run.stdout)["bytes"]))
    return found


def measure(workload: str, variant: str) -> dict[str, int]:
    """Return the bytes of one variant in this process."""
    chosen = workloads.WORKLOADS[workload]
    classifier = workloads.classifier(chosen)
    batch = workloads.batch(chosen, classifier)
    with VARIANTS[variant](classifier, workloads.training(chosen), plan()) as step:
        step(batch.take([0]))
        for parameter in trainable_parameters(classifier).values():
            parameter.grad = None
            for name in ("grad_sample", "summed_grad"):
                if hasattr(parameter, name):
                    setattr(parameter, name, None)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water_mark()
        for _ in range(STEPS):
            step(batch)
        return {"bytes": _high_water_mark() - before}


def _high_water_mark() -> int:
    """Return VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux alone")
