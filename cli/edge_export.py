"""anabranch edge keygen, export, verify, pack, unpack, bench: bundles and their keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.edge_trust import Home_, Trust, trusted_keys
from anabranch.cli.output import Json, Progress, emit, table
from anabranch.protocols.errors import BundleError


class Precision(StrEnum):
    """Of the frozen weights."""

    fp32 = "fp32"
    int8 = "int8"
    int4 = "int4"


def keygen(
    key: Annotated[Path, typer.Argument(help="Where the private key goes; KEY.pub beside it.")],
    as_json: Json = False,
) -> int:
    """Make a key that signs bundles (Ed25519)."""
    from anabranch.edge.runtime.trust import new_key
    from anabranch.storage.files import write_atomic

    beside = key.with_name(key.name + ".pub")
    if beside.exists():
        raise BundleError(f"{beside}: exists, and a key is never overwritten; choose another path")
    with _writing(key):
        public = new_key(key).hex()
        write_atomic(beside, f"{public}\n".encode())
    text = f"private key  {key}  (keep it; whoever has it can sign)\npublic key   {beside}"
    emit({"private": str(key), "public": str(beside), "key": public}, text, as_json=as_json)
    return 0


def export(
    run: Annotated[Path, typer.Argument(help="A run folder with a release, or a run.toml.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder; must not exist.")],
    key: Annotated[Path, typer.Option(help="Private key that signs it (edge keygen).")],
    records: Annotated[
        Path, typer.Option(help="Held-out records: accuracy and latency are measured on them.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: the run's.")] = (
        None
    ),
    version: Annotated[
        int, typer.Option("--version", min=1, help="Devices never go back to a lower one.")
    ] = 1,
    precision: Annotated[
        list[Precision] | None, typer.Option(help="Beside fp32; default: int8 and int4.")
    ] = None,
    artifacts: Annotated[
        bool, typer.Option(help="Also the files that onnxruntime-training reads.")
    ] = True,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Accuracy int8 and int4 may lose; default 0.01, 0.015."),
    ] = None,
    memory_mb: Annotated[
        int | None, typer.Option(min=1, help="Limit on a device; default: 4 long records.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Make a signed bundle for devices from a run's release, or from what a run.toml starts with.

    The second is for a gateway's first run: devices need the bundle before there is a release.
    """
    from anabranch.edge.export.bundle import PRECISIONS, Request
    from anabranch.edge.export.from_run import export_run

    chosen = {Precision.fp32, *(Precision(p) for p in PRECISIONS if precision is None)}
    chosen |= set(precision or ())
    request = Request(
        name=name or "",
        version=version,
        precisions=tuple(p for p in PRECISIONS if p in {c.value for c in chosen}),
        artifacts=artifacts,
        memory_bytes=None if memory_mb is None else memory_mb << 20,
        tolerance={} if tolerance is None else {"int8": tolerance, "int4": tolerance},
    )
    with _writing(bundle), Progress() as progress:
        manifest = export_run(
            run, bundle, request=request, records=records, key=key, on_stage=_stage(progress)
        )
    rows = [
        [p, f"{m.bytes / 1e6:.1f}", f"{100 * m.accuracy:.1f}", f"{m.p50_ms:.1f}", f"{m.p95_ms:.1f}"]
        for p, m in manifest.measured.items()
    ]
    size = sum(file.bytes for file in manifest.files.values())
    lines = [
        table(["weights", "MB", "accuracy %", "p50 ms", "p95 ms"], rows),
        f"\n{manifest.name}, version {manifest.version}: {size / 1e6:.1f} MB in {bundle}; "
        f"training needs up to {manifest.limits.memory_bytes / 1e6:.0f} MB of memory",
    ]
    result = {
        "bundle": str(bundle),
        "name": manifest.name,
        "version": manifest.version,
        "bytes": size,
        "memory_bytes": manifest.limits.memory_bytes,
        "measured": {p: {f: getattr(m, f) for f in m.__struct_fields__} for p, m in
                     manifest.measured.items()},
    }  # fmt: skip
    emit(result, "\n".join(lines), as_json=as_json)
    return 0


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written into one line."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error})") from None


def _stage(progress: Progress) -> Callable[[str], None]:
    return lambda name: progress.stage(name, 1)


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    trust: Trust = None,
    home: Home_ = None,
    as_json: Json = False,
) -> int:
    """Check signature, files and graphs of a bundle; nothing of it is run."""
    from anabranch.edge.runtime.bundle import open_bundle

    manifest = open_bundle(bundle, trusted=trusted_keys(trust, home)).manifest
    text = (
        f"{manifest.name}, version {manifest.version}: signed by a trusted key, "
        f"{len(manifest.files)} files are what was signed"
    )
    result = {"name": manifest.name, "version": manifest.version, "files": len(manifest.files)}
    emit(result, text, as_json=as_json)
    return 0


def pack(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    archive: Annotated[Path, typer.Argument(help="The .tar to write.")],
    as_json: Json = False,
) -> int:
    """Put a bundle into one file; the same bundle gives the same bytes."""
    from anabranch.edge.runtime.archive import pack as write

    with _writing(archive):
        write(bundle, archive)
    size = archive.stat().st_size
    emit({"archive": str(archive), "bytes": size}, f"{archive}: {size:,} bytes", as_json=as_json)
    return 0


def unpack(
    archive: Annotated[Path, typer.Argument(help="A .tar that edge pack wrote.")],
    bundle: Annotated[Path, typer.Argument(help="The folder to make.")],
    trust: Trust = None,
    home: Home_ = None,
    as_json: Json = False,
) -> int:
    """Take a bundle out of an archive; nothing is kept unless all of it is verified."""
    from anabranch.edge.runtime.archive import unpack as read

    read(archive, bundle, trusted=trusted_keys(trust, home))
    emit({"bundle": str(bundle)}, f"{bundle}: verified", as_json=as_json)
    return 0


def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    trust: Trust = None,
    home: Home_ = None,
    records: Annotated[int, typer.Option(min=1, help="Records of a training step.")] = 8,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a record.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    runs: Annotated[int, typer.Option(min=2, help="Calls measured of each graph.")] = 30,
    watts: Annotated[float, typer.Option(min=0.01, help="Of a busy core, if not measured.")] = 3.0,
    as_json: Json = False,
) -> int:
    """Measure training steps and inference of a bundle on this device."""
    from anabranch.edge.runtime.bench import bench as measure
    from anabranch.edge.runtime.bundle import open_bundle

    opened = open_bundle(bundle, trusted=trusted_keys(trust, home))
    report = measure(
        opened, records=records, tokens=tokens, threads=threads, runs=runs, watts=watts
    )
    rows = [
        [
            row["graph"],
            row["records"],
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['cpu_ms']:.1f}",
            f"{row['peak_mb']:.0f}",
            f"{row['joules']:.3f}",
        ]
        for row in report["rows"]
    ]
    head = ["graph", "records", "p50 ms", "p95 ms", "CPU ms", "peak MB", "J"]
    on = report["device"]
    lines = [
        table(head, rows),
        f"\n{on['machine']}, {on['cores']} cores, onnxruntime {on['onnxruntime']}, "
        f"{threads} thread(s), {report['tokens']} tokens; energy {report['energy']}",
    ]
    emit(report, "\n".join(lines), as_json=as_json)
    return 0
