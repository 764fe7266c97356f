"""The command `anabranch`: parse, hand over, print. Heavy imports happen inside the verbs.

Exit codes: 0 done, 1 something the user can fix (one line says how), 2 wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import typer

from anabranch.cli import adapter, coordinator, edge, simulate, site
from anabranch.cli.audit import audit
from anabranch.cli.runs import demo
from anabranch.protocols.errors import AnabranchError

app = typer.Typer(
    name="anabranch",
    help="Fine-tune a model where the data lives; only the LoRA delta leaves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo)
app.command("audit")(audit)
app.add_typer(simulate.app, name="simulate")
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(site.app, name="site")
app.add_typer(adapter.app, name="adapter")
app.add_typer(edge.app, name="edge")


INTERRUPTED = 130  # what typer makes of Ctrl-C

# Command -> the extra that brings what it imports.
EXTRAS = {
    "demo": "demo",
    "simulate": "simulation",
    "audit": "client",
    "coordinator": "server",
    "site": "client",
    "adapter": "client",
    "edge": "edge",
}


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = app(args=arguments, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        typer.echo("anabranch: stopped", err=True)
        return 1
    except AnabranchError as error:
        typer.echo(f"anabranch: {error}", err=True)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("anabranch"):
            raise
        extra = EXTRAS[arguments[0]]
        typer.echo(
            f"anabranch: {arguments[0]} needs the module {error.name!r}, which is not installed: "
            f'pip install "anabranch[{extra}]"',
            err=True,
        )
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        typer.echo(f"anabranch: {where}{error.strerror or error}", err=True)
        return 1
    if result == INTERRUPTED:
        typer.echo("anabranch: stopped", err=True)
        return 1
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
