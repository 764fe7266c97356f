"""Training and inference on a device, beside torch: time, memory, accuracy, bytes.

MiniLM, LoRA r = 8 on query and value plus head, 64 tokens, 1 thread (task.py). The device is a
process of its own in an environment without torch (worker.py); torch is another
(torch_worker.py). They take turns; times are CPU seconds, ratios medians over the turns.

    step.ratio_torch            joint step / torch's; the largest of batches 1, 4, 8, 16
    step.ratio_torch_ort_…      the same for onnxruntime-training
    dp.step_ratio               clipped per-record step / plain step, both joint
    memory.*                    peak of the whole process, 16 records per step; MiB
    int8.*, int4.*              inference: bytes, CPU time, accuracy, against fp32 onnxruntime
    train.*                     accuracy after training over a quantized base, against fp32
    install.*, import.*         the device's environment against torch alone
    adapter.*, delta.*          bytes of a second adapter, and of a delta on the wire
    gateway.*                   gateway_load.py
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

import numpy as np
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export.bundle import Request, make_bundle
from anabranch.edge.runtime.bundle_manifest import ADAPTER, Manifest
from anabranch.edge.runtime.trust import load_private, new_key
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.codecs.codec import CodecName
from benchmarks.edge import gateway_load, install, task
from benchmarks.edge.processes import Process, device_python
from benchmarks.harness import Figure, header, options, ratio, report

THREADS = 1
BATCHES = (1, 4, 8, 16)
MICRO = 4
VALUES = 1_000_000  # of a delta, for the gateway
PRECISIONS = ("fp32", "int8", "int4")
TORCH = f"torch {torch.__version__}, eager"
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much is done."""

    turns: int
    steps: int  # of a turn
    train_steps: int
    test: int | None
    latency: int
    devices: tuple[int, int]


FULL = Work(turns=9, steps=2, train_steps=160, test=None, latency=60, devices=(50, 200))
QUICK = Work(turns=3, steps=1, train_steps=10, test=200, latency=10, devices=(10, 30))


def bundle(folder: Path, work: Work) -> tuple[Manifest, str, Adapter]:
    """Make a signed bundle of the untrained adapter; return manifest, public key, adapter."""
    torch.set_num_threads(1)
    classifier = load_classifier(task.config())
    adapter = read_adapter(classifier)
    texts, labels = task.records("test", 64)
    key = new_key(folder / "key.pem").hex()
    manifest = make_bundle(
        classifier,
        adapter,
        task.config(),
        folder / "bundle",
        request=Request(name="sentiment", version=1),
        inputs=texts,
        labels=labels,
        signing_key=load_private(folder / "key.pem"),
    )
    return manifest, key, adapter


def step_figures(folder: str, key: str, work: Work) -> list[Figure]:
    """Return the ratios of one step to torch's, and of a private one to a plain one."""
    device = device_python()
    with (
        Process("torch_worker.py") as peer,
        Process("worker.py", device) as joint,
        Process("worker.py", device) as private,  # an engine holds one session at a time
        Process("worker.py") as compat,
    ):
        for one in (joint, private, compat):
            one.ask("open", folder=folder, key=key)
        times: dict[tuple[str, int], list[float]] = {}
        for records in BATCHES:
            shape = {"records": records, "tokens": task.TOKENS}
            plain = {**shape, "precision": "fp32", "clip": None}
            asks: dict[str, Callable[..., Any]] = {
                "torch": partial(peer.ask, "step", **shape),
                "joint": partial(joint.ask, "step", engine="joint", **plain),
                "dp": partial(private.ask, "step", engine="joint", **(plain | {"clip": 1.0})),
                "ort": partial(compat.ask, "step", engine="ort-training", **plain),
            }
            for ask in asks.values():
                ask(count=2)
            for _ in range(work.turns):
                for name, ask in asks.items():
                    found = statistics.median(ask(count=work.steps)["seconds"])
                    times.setdefault((name, records), []).append(found)
    figures = []
    for title, name, over, target, who in (
        ("step.ratio_torch", "joint", "torch", "<= 1.0", TORCH),
        ("step.ratio_torch_ort_training", "ort", "torch", None, TORCH),
        ("dp.step_ratio", "dp", "joint", "<= 1.1", "the plain joint step"),
    ):
        rows = [ratio(times[name, b], times[over, b]) for b in BATCHES]
        worst = max(range(len(BATCHES)), key=lambda i: rows[i][0])
        note = "; ".join(
            f"batch {b}: {value:.2f} ({1e3 * statistics.median(times[name, b]):.0f} / "
            f"{1e3 * statistics.median(times[over, b]):.0f} CPU ms)"
            for b, (value, _) in zip(BATCHES, rows, strict=True)
        )
        figures.append(
            Figure(figure=title, value=rows[worst][0], unit="ratio", target=target,
                   spread=rows[worst][1], peer=who, note=note)
        )  # fmt: skip
    return figures


def _step(process: Process, engine: str, records: int, count: int, clip: float | None) -> Any:
    return process.ask(
        "step", engine=engine, precision="fp32", records=records, tokens=task.TOKENS,
        count=count, clip=clip,
    )  # fmt: skip


def memory_figures(folder: str, key: str) -> list[Figure]:
    """Return peaks of training processes: 16 records a step, in micro-batches of MICRO."""
    peaks = {}
    for precision in PRECISIONS:
        with Process("worker.py", device_python()) as one:
            one.ask("open", folder=folder, key=key)
            answer = one.ask(
                "memory", engine="joint", precision=precision, records=16,
                tokens=task.TOKENS, micro=MICRO,
            )  # fmt: skip
            peaks[precision] = answer["peak"] / MIB
    with Process("torch_worker.py") as peer:
        answer = peer.ask("step", records=16, tokens=task.TOKENS, count=6, optimize=True)
        peaks["torch"] = answer["peak"] / MIB
    note = f"micro-batches of {MICRO}, AdamW, whole process"
    return [
        *(
            Figure(figure=f"memory.{precision}_mb", value=peaks[precision], unit="MiB",
                   target=target, note=note)
            for precision, target in (("fp32", "<= 200"), ("int8", "<= 160"), ("int4", None))
        ),
        Figure(
            figure="memory.ratio_torch", value=peaks["fp32"] / peaks["torch"], unit="ratio",
            target="<= 0.35", peer=TORCH,
            note=f"fp32 base; torch's process at batch 16: {peaks['torch']:.0f} MiB",
        ),
        Figure(figure="memory.ratio_int8_to_fp32", value=peaks["int8"] / peaks["fp32"],
               unit="ratio", peer="the fp32 base"),
    ]  # fmt: skip


def quality_figures(
    folder: Path, manifest: Manifest, key: str, adapter: Adapter, work: Work
) -> list[Figure]:
    """Return what quantization costs: bytes, time and accuracy, in inference and in training."""
    data = {part: folder / f"{part}.jsonl" for part in ("train", "test")}
    task.write_records(data["train"], *task.records("train", None))
    task.write_records(data["test"], *task.records("test", work.test))
    adapters = {precision: str(folder / f"{precision}.adapter") for precision in PRECISIONS}
    with Process("worker.py", device_python()) as device:
        device.ask("open", folder=str(folder / "bundle"), key=key)
        for precision in PRECISIONS:
            device.ask(
                "train", precision=precision, data=str(data["train"]), steps=work.train_steps,
                out=adapters[precision],
            )  # fmt: skip
        infer, trained = {}, {}
        for precision in PRECISIONS:
            ask = {"precision": precision, "data": str(data["test"])}
            infer[precision] = device.ask("accuracy", adapter=adapters["fp32"], **ask)["accuracy"]
            trained[precision] = device.ask("accuracy", adapter=adapters[precision], **ask)[
                "accuracy"
            ]
        times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(work.turns):
            for precision in PRECISIONS:
                answer = device.ask(
                    "latency", precision=precision, count=work.latency, tokens=task.TOKENS
                )
                times[precision].append(statistics.median(answer["seconds"]))
        switch = device.ask(
            "adapters", data=str(data["test"]),
            adapters=[adapters["fp32"], adapters["int8"], adapters["fp32"]],
        )  # fmt: skip
    if not (switch["same"] and switch["different"]):
        raise SystemExit("switching adapters there and back gave other bits")
    tests = len(task.records("test", work.test)[1])
    size = {p: manifest.measured[p].bytes for p in PRECISIONS}  # type: ignore[index]
    figures = []
    for precision, size_target, time_target, loss_target in (
        ("int8", "<= 0.27", "<= 0.5", "<= 1"),
        ("int4", "<= 0.15", None, "<= 1.5"),
    ):
        value, spread = ratio(times[precision], times["fp32"])
        ms = {p: 1e3 * statistics.median(times[p]) for p in (precision, "fp32")}
        figures += [
            Figure(figure=f"{precision}.size_ratio", value=size[precision] / size["fp32"],
                   unit="ratio", target=size_target, peer="fp32 onnxruntime",
                   note=f"{size[precision] / 1e6:.1f} / {size['fp32'] / 1e6:.1f} MB"),
            Figure(figure=f"{precision}.latency_ratio", value=value, unit="ratio",
                   target=time_target, spread=spread, peer="fp32 onnxruntime",
                   note=f"{ms[precision]:.1f} / {ms['fp32']:.1f} CPU ms, one record"),
            Figure(figure=f"{precision}.accuracy_loss_points",
                   value=100 * (infer["fp32"] - infer[precision]), unit="points",
                   target=loss_target, peer="fp32 onnxruntime",
                   note=f"fp32 {100 * infer['fp32']:.1f} % of {tests} sentences"),
            Figure(figure=f"train.{precision}_loss_points",
                   value=100 * (trained["fp32"] - trained[precision]), unit="points",
                   target="<= 1.5", peer="training over the fp32 base",
                   note=f"{work.train_steps} steps of {task.BATCH}; "
                        f"{100 * trained[precision]:.1f} % against {100 * trained['fp32']:.1f} %"),
        ]  # fmt: skip
    return figures + _bytes_figures(folder, manifest, adapter, Path(adapters["fp32"]))


def _bytes_figures(
    folder: Path, manifest: Manifest, adapter: Adapter, trained: Path
) -> list[Figure]:
    int8 = manifest.measured["int8"].bytes
    one = (folder / "bundle" / ADAPTER).stat().st_size
    after = wire.decode_adapter(trained.read_bytes(), adapter.spec)
    delta = after.minus(adapter, num_examples=1)
    codecs: tuple[CodecName, ...] = ("fp32", "int8")
    rng = np.random.default_rng(0)
    frames = {codec: len(wire.encode(delta, codec=codec, rng=rng)) for codec in codecs}
    return [
        Figure(figure="adapter.bytes_ratio", value=one / int8, unit="ratio", target="<= 0.02",
               peer="the int8 model", note=f"{one:,} / {int8:,} bytes"),
        Figure(figure="delta.fp32_kb", value=frames["fp32"] / 1e3, unit="kB", target="<= 301",
               note=f"{adapter.spec.num_values:,} values"),
        Figure(figure="delta.int8_kb", value=frames["int8"] / 1e3, unit="kB", target="<= 76"),
    ]  # fmt: skip


def executorch_figures(folder: str, key: str, work: Work) -> list[Figure]:
    """Return the ratio of ExecuTorch's step to the joint one, at batch 4.

    Only with ANABRANCH_EXECUTORCH_PYTHON: an interpreter that has executorch 1.5.1 and
    anabranch[client] (executorch asks for other versions of what the command line needs).
    """
    python = os.environ.get("ANABRANCH_EXECUTORCH_PYTHON")
    if python is None:
        print("step.speedup_executorch is left out: set ANABRANCH_EXECUTORCH_PYTHON")
        return []
    with (
        Process("executorch_worker.py", Path(python)) as peer,
        Process("worker.py", device_python()) as device,
    ):
        device.ask("open", folder=folder, key=key)
        _step(device, "joint", 4, 2, None)
        slow, fast = [], []
        for _ in range(min(work.turns, 3)):
            found = peer.ask("step", records=4, tokens=task.TOKENS, count=3)["seconds"]
            slow.append(statistics.median(found))
            found = _step(device, "joint", 4, work.steps, None)["seconds"]
            fast.append(statistics.median(found))
    value, spread = ratio(slow, fast)
    return [
        Figure(figure="step.speedup_executorch", value=value, unit="ratio", target=">= 20",
               spread=spread, peer="executorch 1.5.1, portable kernels",
               note=f"batch 4: {1e3 * statistics.median(slow):.0f} / "
                    f"{1e3 * statistics.median(fast):.0f} CPU ms"),
    ]  # fmt: skip


def gateway_figures(work: Work) -> list[Figure]:
    """Return devices served per second, the server's peak, and how the cost grows with devices."""
    few, many = work.devices
    found = {count: gateway_load.load(count, VALUES) for count in (few, many)}
    one = found[many]
    growth = one["seconds"] / many / (found[few]["seconds"] / few)
    note = f"{many} devices, {VALUES:,} values each; devices and server on the same cores"
    return [
        Figure(figure="gateway.devices_per_second", value=one["devices_per_second"],
               unit="1/s", note=note),
        Figure(figure="gateway.peak_mb", value=one["peak_rss_mb"], unit="MiB",
               note=f"of the server; with {few} devices {found[few]['peak_rss_mb']:.0f}"),
        Figure(figure="gateway.growth", value=growth, unit="ratio",
               note=f"seconds a device with {many} devices / with {few}; 1 is linear"),
    ]  # fmt: skip


def install_figures(work: Work) -> list[Figure]:
    """Return installed bytes and import time of a device's environment beside torch."""
    python = device_python()
    device, stripped = install.device_bytes(python), install.stripped_bytes(python)
    peer = install.sizes(Path(sys.executable))["torch"]
    imports = {
        "runtime": install.import_seconds(python, "anabranch.edge.runtime.predict", work.turns),
        "torch": install.import_seconds(Path(sys.executable), "torch", work.turns),
    }
    value, spread = ratio(imports["runtime"], imports["torch"])
    return [
        Figure(figure="install.ratio_torch", value=device / peer, unit="ratio", target="<= 0.25",
               peer=f"torch {torch.__version__} alone",
               note=f"{device / 1e6:.0f} / {peer / 1e6:.0f} MB"),
        Figure(figure="install.stripped_mb", value=stripped / 1e6, unit="MB",
               note="after deleting what docs/edge.md lists"),
        Figure(figure="import.ratio_torch", value=value, unit="ratio", spread=spread,
               peer=f"import torch {torch.__version__}",
               note=f"{1e3 * statistics.median(imports['runtime']):.0f} CPU ms"),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    chosen = options(__doc__, argv)
    work = QUICK if chosen.quick else FULL
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, key, adapter = bundle(folder, work)
        seconds = time.perf_counter() - began
        figures = [
            *step_figures(str(folder / "bundle"), key, work),
            *memory_figures(str(folder / "bundle"), key),
            *quality_figures(folder, manifest, key, adapter, work),
            *executorch_figures(str(folder / "bundle"), key, work),
            *install_figures(work),
            *gateway_figures(work),
            Figure(figure="export.seconds", value=seconds, unit="s",
                   note="three precisions, artifacts, measured and signed"),
        ]  # fmt: skip
    packages = ["torch", "transformers", "onnx", "onnxruntime-training-cpu", "numpy"]
    head = header("edge", packages=packages, threads=THREADS, seed=task.SEED, quick=chosen.quick)
    report(head, figures, chosen.json)


if __name__ == "__main__":
    main()
