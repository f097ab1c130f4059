"""The command line: `migserve VERB`. Verbs import what they need when they run, so that --help is quick."""

from __future__ import annotations

import signal

# Until the daemon handles it, Ctrl-C just ends the process: no traceback of half an import.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from server.settings import Settings

app = typer.Typer(
    name="migserve",
    help="An inference server for MIG GPUs.\n\nTo begin with: **migserve demo-models**, then **migserve serve**.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PANELS = {
    "served": "What is served",
    "gpus": "On which GPUs",
    "limits": "Limits",
    "planning": "Layouts and planning",
    "operation": "Operation",
}


# Short, so that there is room for the explanations on a terminal of 80 columns.
_METAVARS = {"int": "N", "float": "N", "bool": " ", "Path": "PATH", "list": "PATH"}


def _metavar(annotation: Any) -> str:
    """For `int | None`, what `int` has."""
    for kind, metavar in _METAVARS.items():
        if kind in str(getattr(annotation, "__name__", annotation)):
            return metavar
    return "TEXT"


def _default(value: Any) -> str:
    return f" Default: {'yes' if value is True else 'no' if value is False else value}."


def _with_settings(command: Any) -> Any:
    """Gives a command that takes **flags one option for each setting; None where it was not given."""
    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        extra = field.json_schema_extra
        option = typer.Option(
            help=f"{field.description}{'' if shown is None else _default(shown)}",
            rich_help_panel=_PANELS[str(extra["group"])] if isinstance(extra, dict) else None,
            show_default=False,  # None, to the command line
            metavar=_metavar(field.annotation),
        )
        annotation: Any = field.annotation
        kind: Any = Annotated[annotation | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = inspect.Signature(parameters)
    return command


@app.command()
@_with_settings
def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of these settings, with _ for -.",
            envvar="MIGSERVE_CONFIG",
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Serve models on the slices of this machine's GPUs, or on simulated ones.

    Requests come in over the Open Inference Protocol.

    **migserve serve** serves ./models; without an NVIDIA driver on a simulated A100, cut 4g+2g+1g

    **migserve serve --gpu sim:H100-80GBx2 --layout 3g.40gb+3g.40gb** simulates two H100s

    **migserve serve --gpu nvml** serves on the MIG instances that there are, on whole GPUs where MIG is off

    The first SIGTERM or Ctrl-C drains, a second one hurries.

    Each option can also be a variable, **MIGSERVE_HTTP_PORT=9000** for --http-port, or a line of the --config file,
    **http_port: 9000**. Flags win over variables, variables over the file.
    """
    from server import commands

    raise typer.Exit(commands.serve(config, flags))


@app.command()
def gpus(
    gpu: Annotated[str, typer.Option(help="As of **serve**.")] = "auto",
    layout: Annotated[str | None, typer.Option(help="As of **serve**.")] = None,
) -> None:
    """Draw the GPUs and how they are cut.

    **migserve gpus** shows this machine's

    **migserve gpus --gpu sim:A30-24GB --layout 2g.12gb+1g.6gb+1g.6gb** shows what such a cut looks like
    """
    from server import commands

    raise typer.Exit(commands.show_gpus(gpu, layout))


@app.command()
def demo_models(
    out: Annotated[Path, typer.Option(help="Folder to make them in; models that are there stay.")] = Path("models"),
) -> None:
    """Make the demo models: digits, mlp, affine, and resnet50, which is emulated.

    Needs torch and scikit-learn: pip install 'migserve[torch,demo]'
    """
    from server import demo

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is half made is removed
    demo.make_models(out)


@app.command()
def replay(journal: Annotated[Path, typer.Argument(help="A file that **serve --journal** wrote.")]) -> None:
    """Hand a journal's events to a fresh scheduler, and check that it decides the same again."""
    from server import commands

    raise typer.Exit(commands.replay(journal))


def main() -> None:
    """Entry point of the `migserve` command."""
    app()


if __name__ == "__main__":
    main()
