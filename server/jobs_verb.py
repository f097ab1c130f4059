"""`migserve jobs` on the command line. It imports nothing heavy before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Batch jobs: many items for a model, by a deadline, on what online traffic leaves.\n\n"
    "**migserve jobs submit digits inputs.jsonl --deadline 8h --wait --out results.jsonl**\n\n"
    "**migserve jobs submit photo pictures/ --deadline 2026-11-21T06:00** files, where a model takes them\n\n"
    "**migserve jobs submit digits digits.npz --output npz** arrays by the model's inputs, the first axis is the items",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_Url = Annotated[str, typer.Option(help="Where the daemon serves HTTP.", envvar="MIGSERVE_URL")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Id = Annotated[str, typer.Argument(help="As **jobs list** shows it; its beginning will do.", metavar="ID")]
_Out = Annotated[Path | None, typer.Option(help="File for the results; by default, as with `-`, they go to stdout.")]
_OutOfWait = Annotated[Path | None, typer.Option(help="File for the results, or - for stdout; waits for them.")]
URL = "http://localhost:8000"


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="By its name; NAME/VERSION for one version.")],
    inputs: Annotated[
        Path | None, typer.Argument(help="JSON lines, .npz, .safetensors, or a folder of files; - is stdin.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="From now, such as 90s (or 90), 15m, 8h; or a time, such as 2026-11-21T06:00.")
    ] = None,
    server_folder: Annotated[
        str | None, typer.Option(help="Instead of inputs: a folder below the daemon's --jobs-input-dir.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="`jsonl`, `npz` or `safetensors`; by default as **--out** is called, or jsonl.")
    ] = None,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="More stop the job; by default a tenth of the items, at least 10.")
    ] = None,
    name: Annotated[str, typer.Option(help="For you to know it by.")] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse it if it cannot end by its deadline.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show its progress until it has ended; **--json** then prints how it ended.")
    ] = False,
    out: _OutOfWait = None,
    url: _Url = URL,
    json: _Json = False,
) -> None:
    """Send inputs, and have them computed by a deadline. The daemon keeps them: it goes on after a restart.

    In a pipe or in $(...) its id is printed, and all that is for you to read goes to stderr.
    """
    from server import jobs_command as do
    from server.jobs_sending import Wish

    wish = Wish(model, inputs, deadline, server_folder, output, max_errors, name, strict)
    raise typer.Exit(do.submit(do.Client(url), wish, wait=wait or out is not None, out=out, as_json=json))


@app.command("list")
def list_jobs(url: _Url = URL, json: _Json = False) -> None:
    """All jobs that the daemon knows."""
    from server import jobs_command as do

    raise typer.Exit(do.show_all(do.Client(url), as_json=json))


@app.command()
def show(job: _Id, url: _Url = URL, json: _Json = False) -> None:
    """One job: progress, forecast, slices, first errors."""
    from server import jobs_command as do

    raise typer.Exit(do.show(do.Client(url), job, as_json=json))


@app.command()
def wait(job: _Id, out: _OutOfWait = None, url: _Url = URL, json: _Json = False) -> None:
    """Show its progress until it has ended. Ctrl-C ends the watching, not the job.

    The exit code is 0 once it is done, also after its deadline or with items that failed; 1 where it ends otherwise.
    """
    from server import jobs_command as do

    raise typer.Exit(do.wait(do.Client(url), job, out, as_json=json))


@app.command()
def cancel(job: _Id, url: _Url = URL) -> None:
    """Stop it. What is finished stays, for **jobs resume**."""
    from server import jobs_command as do

    raise typer.Exit(do.change(do.Client(url), job, "cancel"))


@app.command()
def resume(
    job: _Id,
    max_errors: Annotated[int | None, typer.Option(min=0, help="A new limit; needed where errors stopped it.")] = None,
    url: _Url = URL,
) -> None:
    """Go on with one that was cancelled, or stopped by its errors."""
    from server import jobs_command as do

    raise typer.Exit(do.change(do.Client(url), job, "resume", max_errors))


@app.command()
def results(job: _Id, out: _Out = None, url: _Url = URL) -> None:
    """The results of a job that is done, in the order of its inputs."""
    from server import jobs_command as do

    raise typer.Exit(do.results(do.Client(url), job, out))


@app.command()
def remove(job: _Id, url: _Url = URL) -> None:
    """Forget a job that has ended, with its inputs and results."""
    from server import jobs_command as do

    raise typer.Exit(do.remove(do.Client(url), job))
