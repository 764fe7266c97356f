"""Memory by the number of clients: 1,000 and 10,000, 100 a round, small transformer, one process.

Every client has 50 records, drawn from one data set of 20,000, so that the records are the same
whatever the number of clients. Memory is that of the process, at its peak during each round.
"""

from __future__ import annotations

from pathlib import Path

from anabranch.server.charts import Line, line_chart
from anabranch.server.svg import BYTES, STYLE
from benchmarks.harness import ROOT, Figure
from benchmarks.simulation.memory import MIB, Peak
from benchmarks.simulation.peer import Job
from benchmarks.simulation.processes import Engine

POPULATIONS = (1000, 10_000)
SHARED = 20_000
IMAGE = ROOT / "docs" / "images" / "simulation_memory.svg"


def figure(rounds: int, cohort: int, image: Path | None) -> Figure:
    """Return memory.ratio_10000_to_1000; draw both runs into `image`."""
    peaks = {clients: _peaks(clients, rounds, cohort) for clients in POPULATIONS}
    if image is not None:
        image.write_text(drawing(peaks))
    few, many = (max(peaks[clients]) for clients in POPULATIONS)
    return Figure(
        figure="memory.ratio_10000_to_1000",
        value=many / few,
        unit="ratio",
        target="<= 1.2",
        note=f"peak {many / MIB:.0f} / {few / MIB:.0f} MiB, {rounds} rounds of {cohort} clients",
    )


def drawing(peaks: dict[int, list[int]]) -> str:
    """Return an SVG file: peak memory by round, a line for each population."""
    lines = [
        Line(f"{clients:,} clients", tuple((i, float(b)) for i, b in enumerate(found, 1)))
        for clients, found in peaks.items()
    ]
    chart = line_chart(
        lines,
        label="Peak memory of a simulation by round, for 1,000 and 10,000 clients",
        unit=BYTES,
        y_title="peak memory of the process",
        zero=True,
    )
    begin, end = chart.split(">", 1)
    return f'{begin} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{end}\n'


def _peaks(clients: int, rounds: int, cohort: int) -> list[int]:
    job = Job(workload="small", rounds=rounds, clients=clients, cohort=cohort, shared=SHARED)
    found = []
    with Engine("worker_ours.py", [job]) as engine:
        for _ in range(rounds):
            with Peak(engine.pid) as peak:
                engine.round(job.workload)
            found.append(peak.bytes)
    return found
