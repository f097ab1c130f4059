"""`migserve profile` on the command line. It imports nothing heavy before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.options import DEFAULT_GPU, flag

Model = Annotated[str, typer.Argument(help="By its name in the repository, or its folder.")]
Repository = Annotated[Path, typer.Option(help="Folder of models, as of **serve**.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="`cpu`, `cuda`, `emulated`, or `shares`: of a GPU without MIG, for its slices. By default the GPU if any."
    ),
]
Gpu = Annotated[str, typer.Option(help="Of an emulated model: which GPU's slices.")]
Slices = Annotated[
    str | None,
    typer.Option(help="MIG profiles, such as 1g.10gb,2g.20gb; on the CPU numbers of threads. By default all; 1."),
]
Batches = Annotated[str | None, typer.Option(help="Such as 1,8,64; by default powers of two.")]
Processes = Annotated[str | None, typer.Option(help="Side by side on a slice, such as 1,2,3; by default 1.")]
Lengths = Annotated[
    str | None, typer.Option(help="Of inputs that vary, such as 32,128,512; by default by `lengths` in serving.yaml.")
]
Budget = Annotated[
    str | None, typer.Option(help="Measure so many points, or such a share as 10%, and predict the rest.")
]
Minutes = Annotated[float | None, typer.Option(min=0, help="Measure for so long, and predict the rest.")]
Sure = Annotated[
    float,
    typer.Option(min=0, max=1, help="With a budget: stop when decisions lose less than this share of throughput."),
]
Within = Annotated[
    float, typer.Option(min=0.001, max=1, help="Run a point until its median is known to this share of it.")
]
Seconds = Annotated[float, typer.Option(min=0.01, help="A point takes at most so long, warm-up apart.")]
MemoryMib = Annotated[
    int | None, typer.Option(min=16, help="On the CPU: what a process may take; more counts as not fitting.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The table, by default MODEL.latency.csv. Points that it has already are kept, not measured again."
    ),
]
Anew = Annotated[bool, flag("--anew", "Drop what the table has of this model on this GPU first; other rows stay.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the table to this .svg or .png file, too.")]


def profile(
    model: Model,
    model_repository: Repository = Path("models"),
    device: Device = None,
    gpu: Gpu = DEFAULT_GPU,
    slices: Slices = None,
    batches: Batches = None,
    processes: Processes = None,
    lengths: Lengths = None,
    budget: Budget = None,
    minutes: Minutes = None,
    sure: Sure = 0.0,
    within: Within = 0.02,
    seconds: Seconds = 3.0,
    memory_mib: MemoryMib = None,
    out: Out = None,
    anew: Anew = False,
    plot: Plot = None,
) -> None:
    """Measure how long a model takes on slices, by batch size, and write a latency table.

    **migserve profile mlp --slices 1,2** measures on one and on two threads of the CPU

    **migserve profile resnet50 --processes 1,2,3 --budget 10% --plot resnet50.svg** measures a tenth, predicts the rest

    A row is written as soon as it is measured: after Ctrl-C or a crash the same command goes on.
    """
    from scheduler.measuring import Effort
    from server import profile_command as do
    from server.plan_command import UsageError, complain

    try:
        request = do.Request(
            model=model,
            repository=model_repository,
            device=device,
            gpu=gpu,
            slices=tuple(part.strip() for part in slices.split(",")) if slices else (),
            batches=do.numbers(batches, "--batches"),
            processes=do.numbers(processes, "--processes"),
            lengths=do.numbers(lengths, "--lengths"),
            budget=budget,
            minutes=minutes,
            sure=sure,
            effort=Effort(within=within, seconds=seconds, warm_up_seconds=min(0.1, seconds)),
            memory_mib=memory_mib,
            out=out,
            plot=plot,
            anew=anew,
        )
    except UsageError as error:
        raise typer.Exit(complain(str(error), do.USAGE)) from error
    raise typer.Exit(do.run(request))
