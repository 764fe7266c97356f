"""anabranch adapter: look at adapters and move them between formats.

An adapter is a frame (`*.adapter`, docs/wire-format.md) or a folder in PEFT's format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import Json, emit, table

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at adapters; read and write PEFT."
)
Source = Annotated[Path, typer.Argument(help="A *.adapter file or a PEFT folder.")]


@app.command()
def show(source: Source, as_json: Json = False) -> int:
    """Show what an adapter is made of: base, rank, tensors, norms."""
    from anabranch.client.tuning.adapter_files import describe, read_any

    facts = describe(read_any(source))
    rows = [
        [t["name"], "×".join(map(str, t["shape"])), f"{t['norm']:.4f}"] for t in facts["tensors"]
    ]
    text = (
        f"base {facts['base'][:16]}…  rank {facts['rank']}  alpha {facts['alpha']:g}  "
        f"{facts['values']} values\n\n" + table(["tensor", "shape", "norm"], rows)
    )
    emit(facts, text, as_json=as_json)
    return 0


@app.command()
def diff(first: Source, second: Source, as_json: Json = False) -> int:
    """Show how far two adapters of the same base and shapes are apart."""
    from anabranch.client.tuning.adapter_files import difference, read_any

    facts = difference(read_any(first), read_any(second))
    rows = [[t["name"], f"{t['norm']:.6f}", f"{t['max']:.6f}"] for t in facts["tensors"]]
    text = table(["tensor", "‖difference‖", "largest"], rows)
    emit(facts, text + f"\n\nlargest difference {facts['max']:.3g}", as_json=as_json)
    return 0


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="*.adapter writes a frame, else a PEFT folder.")],
    as_json: Json = False,
) -> int:
    """Convert between a frame and a PEFT folder; refuses to overwrite."""
    from anabranch.client.tuning import adapter_files

    adapter_files.convert(source, target)
    emit({"written": str(target)}, f"wrote {target}", as_json=as_json)
    return 0


@app.command()
def merge(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    run: Annotated[Path, typer.Option("--run", help="The run.toml that names the base model.")],
    as_json: Json = False,
) -> int:
    """Write the base model with the adapter merged into its weights, as safetensors."""
    from anabranch.client.tuning.adapter_files import merge_into

    merge_into(target, source, run)
    emit({"written": str(target)}, f"wrote {target}", as_json=as_json)
    return 0
