"""What the verbs of the command line do. Each returns an exit code."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import structlog
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from scheduler.journal import JournalError
from scheduler.journal import replay as replay_journal
from server import picture, settings, state_folder
from server.daemon import Daemon, Progress
from server.gpus import StartError
from server.settings import ConfigError, Settings, unknown_variables

log = structlog.get_logger(__name__)

UNAVAILABLE, USAGE = 1, 2
# When all is stopped, for threads that still write.
LAST_SECONDS = 1.0


def serve(config: Path | None, flags: dict[str, Any]) -> int:
    """Runs the daemon until it is told to stop."""
    try:
        chosen = settings.load(config, flags)
    except ConfigError as error:
        return _complain(str(error), USAGE)
    except OSError as error:
        return _complain(f"--config {config} cannot be read: {error.strerror}", USAGE)
    _configure_logging(chosen)
    for sentence in unknown_variables(os.environ):
        log.warning("unknown variable", reason=sentence)
    show = _Show(chosen) if chosen.log_format == "console" else Progress()

    async def run() -> int:
        state_folder.hold(chosen.state_folder)
        code = await Daemon(chosen, show).run()
        _end_within(LAST_SECONDS, code)
        return code

    try:
        return uvloop.run(run())
    except StartError as error:
        return _complain(f"migserve cannot start: {error}", UNAVAILABLE)


def _end_within(seconds: float, code: int) -> None:
    """A process waits for its threads, and a large job's results take minutes: a kill does what they write no harm."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def replay(journal: Path) -> int:
    """Replays a journal."""
    try:
        count = replay_journal(journal)
    except (JournalError, OSError) as error:
        return _complain(str(error), UNAVAILABLE)
    picture.console().print(f"{count} events, the same commands")
    return 0


class _Show(Progress):
    """Progress in the terminal, then the layout and a line to try."""

    def __init__(self, chosen: Settings) -> None:
        self._console = picture.console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=self._console, transient=True)
        roots = [root for root in chosen.model_repository if root.is_dir()]
        models = {path.name for root in roots for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
        self._task = self._bar.add_task("starting", total=len(models), start=False)

    def workers(self, count: int) -> None:
        self._bar.update(self._task, description=f"starting {count} workers, loading models")
        self._bar.start_task(self._task)
        self._bar.start()

    def model(self, name: str, trouble: str) -> None:
        self._bar.advance(self._task)

    def ready(self, daemon: Daemon) -> None:
        self._bar.stop()
        show_ready(daemon, self._console)

    def draining(self, unfinished: int) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
        self._console.print(f"Draining, {unfinished} requests under way; Ctrl-C again to hurry", style="yellow")


def show_ready(daemon: Daemon, console: Console) -> None:
    """The layout, where it listens, and a curl line that works."""
    console.print(picture.layout(daemon.layouts.gpus, daemon.serves))
    if any(gpu.simulated for gpu in daemon.layouts.gpus):
        console.print("The GPUs are simulated: each slice is a worker process on the CPU.", style="yellow")
    urls = {name: f"{_host(daemon.settings, name)}:{port}" for name, port in sorted(daemon.ports.items())}
    listening = "   ".join(f"{name} {url}" for name, url in urls.items())
    _show_state(daemon, listening, console)
    for root in daemon.settings.model_repository:
        sample = root / "digits" / "three.png"
        if sample.is_file() and "http" in urls:
            url = f"http://{urls['http']}/v2/models/digits/infer"
            console.print("Try it:  ", end="")
            console.print(f"curl --data-binary @{sample} {url}\n", style="bold", markup=False, soft_wrap=True)


def _host(chosen: Settings, name: str) -> str:
    """Where a client on this machine finds it."""
    host = str(getattr(chosen, f"{name}_address"))
    return "localhost" if host in ("0.0.0.0", "127.0.0.1") else f"[{host}]" if ":" in host else host


def _show_state(daemon: Daemon, listening: str, console: Console) -> None:
    """Ready is said only where the daemon would say so too."""
    trouble = daemon.not_ready()
    style, word = ("bold red", "Serving, but NOT READY") if trouble else ("bold green", "Ready")
    console.print(f"\n{word}: {listening}", style=style, markup=False, soft_wrap=True)
    for reason in trouble:
        console.print(f"  {reason}", style="red", markup=False, soft_wrap=True)
    if not daemon.repository.names():
        folders = ", ".join(map(str, daemon.settings.model_repository))
        advice = f"There are no models in {folders}: put one at NAME/1/model.pt2, or run migserve demo-models."
        console.print(advice, style="yellow", markup=False, soft_wrap=True)


def _complain(message: str, code: int) -> int:
    picture.console(stderr=True).print(message, style="red", markup=False, soft_wrap=True)
    return code


def _configure_logging(chosen: Settings) -> None:
    """structlog to stderr: lines for people, or JSON for machines. Libraries' own logs from warnings up."""
    json = chosen.log_format == "json"
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    shared: list[Any] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso")]
    if json:
        shared.append(structlog.processors.format_exc_info)
    # At a terminal the picture tells what the lines would.
    quiet = sys.stderr.isatty() and not json and chosen.log_verbose == 0
    level = logging.WARNING if quiet else logging.DEBUG if chosen.log_verbose > 1 else logging.INFO
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler()
    meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[meta, renderer], foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
