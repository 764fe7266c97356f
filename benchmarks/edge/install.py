"""Installed size and import time: a device's environment beside torch.

Sizes are of the files that pip lists for a distribution (no byte code). "Device" is what
`pip install anabranch[edge]` brings beside anabranch itself: onnxruntime, numpy, grpcio,
cryptography and what they require; the command line's typer, rich and msgspec are counted too.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

SIZES = """
import json
from importlib.metadata import distributions
sizes = {}
for one in distributions():
    name = one.metadata["Name"].lower().replace("_", "-")
    files = [one.locate_file(f) for f in one.files or () if f.suffix != ".pyc"]
    sizes[name] = sum(f.stat().st_size for f in files if f.is_file())
print(json.dumps(sizes))
"""
TOOLS = {"pip", "setuptools", "wheel", "anabranch"}
IMPORT = "import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
# What the runtime does not load: the C library that other languages link, and tools for makers.
NOT_LOADED = (
    "onnxruntime/capi/libonnxruntime.so*",
    "onnxruntime/transformers/**/*",
    "onnxruntime/quantization/**/*",
    "onnxruntime/tools/**/*",
    "onnxruntime/datasets/**/*",
    "numpy/**/tests/**/*",
    "numpy/f2py/**/*",
)


def sizes(python: Path) -> dict[str, int]:
    """Return bytes by distribution in an interpreter's environment."""
    run = subprocess.run([python, "-c", SIZES], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(run.stdout)
    return found


def device_bytes(python: Path) -> int:
    """Return the bytes of everything but pip and the product itself."""
    return sum(size for name, size in sizes(python).items() if name not in TOOLS)


def stripped_bytes(python: Path) -> int:
    """Return device_bytes less what docs/edge.md says may be deleted (NOT_LOADED)."""
    gone = not_loaded(python)
    return device_bytes(python) - sum(p.stat().st_size for p in gone if p.suffix != ".pyc")


def not_loaded(python: Path) -> set[Path]:
    """Return the files of an interpreter's environment that fit NOT_LOADED."""
    lines = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = subprocess.run([python, "-c", lines], capture_output=True, text=True, check=True)
    site = Path(run.stdout.strip())
    return {path for pattern in NOT_LOADED for path in site.glob(pattern) if path.is_file()}


def import_seconds(python: Path, module: str, repeats: int) -> list[float]:
    """Return CPU seconds of importing a module in fresh processes."""
    command = [str(python), "-c", IMPORT.format(module=module)]
    seconds = []
    for _ in range(repeats):
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(float(run.stdout))
    return seconds
