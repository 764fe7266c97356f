"""The security suite against a running coordinator: how many attacks were tried, how many got in.

Each case of tests/server/coordinator/test_intruders.py is an attack, or several; it fails if one
of them gets further than it should. What cannot be tried at all counts as one that got in.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness import ROOT

SUITE = "tests/server/coordinator/test_intruders.py"
QUICK = "certificate or key or invitation or tls or superlink"
LIMIT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Cases of the suite."""

    tried: int
    inside: int


def measure(folder: Path, *, quick: bool) -> Counted:
    """Run the suite, or the part of it that is about keys; return what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "intruders.xml"
    part = ["-k", QUICK] if quick else []
    subprocess.run(
        [sys.executable, "-m", "pytest", SUITE, "-q", f"--junitxml={report}", *part],
        cwd=ROOT, stdout=subprocess.DEVNULL, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    return counted(report.read_text())


def counted(xml: str) -> Counted:
    """Return the cases of a JUnit report; ValueError if there is none."""
    cases = list(ElementTree.fromstring(xml).iter("testcase"))
    if not cases:
        raise ValueError(f"{SUITE}: no attack was tried")
    bad = [
        case for case in cases if any(one.tag in ("failure", "error", "skipped") for one in case)
    ]
    return Counted(tried=len(cases), inside=len(bad))
