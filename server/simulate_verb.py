"""`migserve simulate` on the command line. It imports nothing heavy before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.options import DEFAULT_GPU, CatalogueGpu, LatencyTable, SkipSuspects, flag

Gpus = Annotated[int | None, typer.Option(min=1, max=64, help="How many; by default 2, or as planned.")]
Layout = Annotated[
    str | None,
    typer.Option(help="Of each GPU, such as 3g.40gb+2g.20gb+1g.10gb+1g.10gb; by default a varied one, or as planned."),
]
Model = Annotated[str | None, typer.Option(help="By its name in the latency table; by default resnet50.")]
Workload = Annotated[
    str,
    typer.Option(
        help="`w-paper`: 1 to 32 items a query, log-normal. `w-length`: texts of 16 to 512 tokens, for bert-base. "
        "`w-slo`: the models, rates and SLOs of a --scenario. Or a CSV file with the columns "
        "seconds,model,items,length (the last two may be missing).",
    ),
]
Scenario = Annotated[str | None, typer.Option(help="Of w-slo: S1 to S6.")]
Arrivals = Annotated[str, typer.Option(help="`poisson`, `bursty`, or `diurnal`.")]
Policy = Annotated[
    list[str] | None,
    typer.Option(help="Who decides; several times, or `all`, to compare. By default ours; in a report elsa beside it."),
]
Rate = Annotated[
    float | None,
    typer.Option(min=0.001, help="Queries a second; by default 80 % of the fluid bound, or as stated or recorded."),
]
FindMax = Annotated[
    str | None,
    typer.Option(
        help="`p95` or `p99`: look for the highest rate at which it is within the SLO, and every query ends within "
        "ten SLOs.",
    ),
]
SloFactor = Annotated[
    float | None, typer.Option(min=0.1, help="The SLO, in times of 32 items on a whole GPU. Default: 2.")
]
Strict = Annotated[bool, flag("--strict", "Refuse what would be late, instead of serving it late.")]
Noise = Annotated[float, typer.Option(min=0, max=1, help="Of service times, as a share; 0: exact, no tail.")]
Queries = Annotated[int, typer.Option(min=100, help="About so many a run.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same figures.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="So many from --seed on; by default 3 with --find-max, else 1.")]
Json = Annotated[bool, flag("--json", "Print JSON.")]
Out = Annotated[Path | None, typer.Option(help="Write a report with plots to this .html file.")]


def simulate(
    gpu: CatalogueGpu = DEFAULT_GPU,
    gpus: Gpus = None,
    layout: Layout = None,
    model: Model = None,
    workload: Workload = "w-paper",
    scenario: Scenario = None,
    arrivals: Arrivals = "poisson",
    policy: Policy = None,
    rate: Rate = None,
    find_max: FindMax = None,
    slo_factor: SloFactor = None,
    strict: Strict = False,
    noise: Noise = 0.03,
    queries: Queries = 10_000,
    seed: Seed = 0,
    seeds: Seeds = None,
    latency_table: LatencyTable = None,
    skip_suspects: SkipSuspects = False,
    json: Json = False,
    out: Out = None,
) -> None:
    """Simulate the scheduler on slices of MIG GPUs, with measured latencies. Nothing is served, no GPU is needed.

    **migserve simulate** shows two A100s, each 3g+2g+1g+1g, at 80 % of what they can do at best

    **migserve simulate --find-max p95 --model bert --layout 4g.40gb+3g.40gb** finds the highest rate within the SLO

    **migserve simulate --policy pool --policy elsa --out report.html** plots latency against load, slices, batches

    **migserve simulate --workload w-slo --scenario S3** plans for eleven models, and tries the plan

    **migserve simulate --workload trace.csv --gpus 4 --json** replays what was recorded
    """
    from server import simulate_command as do
    from server.simulate_setup import Asked

    asked = Asked(
        gpu=gpu,
        gpus=gpus,
        layout=layout,
        model=model,
        workload=workload,
        scenario=scenario,
        arrivals=arrivals,
        slo_factor=slo_factor,
        latency_table=latency_table,
        skip_suspects=skip_suspects,
        queries=queries,
        noise=noise,
        strict=strict,
    )
    raise typer.Exit(do.run(do.Request(asked, policy or [], rate, find_max, seed, seeds, json, out)))
