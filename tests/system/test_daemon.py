"""The daemon as a whole: command line, journal, memory, several workers a slice, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from server import settings
from server.__main__ import app
from tests import repositories
from tests.clients import PROTOCOLS, http_binary, in_threads
from tests.harness import MODELS, REPOSITORY, RunningDaemon, running, until
from tests.server.raw_http import infer, request

PRIVATE_MIB_PER_WORKER = 150


# With the tests' models, where the arguments name no others.
OURS = {"COLUMNS": "200", "NO_COLOR": "1", "MIGSERVE_MODEL_REPOSITORY": str(MODELS), "MIGSERVE_ALLOW_ADMIN": "0"}


@pytest.fixture(autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a daemon, too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def migserve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as a shell starts it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MIGSERVE_")}
    command = [sys.executable, "-m", "server", *arguments]
    everything = clean | OURS | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=everything, timeout=60)


def asked(*arguments: str, **environment: str) -> Result:
    """In this process: for what is answered without a daemon."""
    return CliRunner().invoke(app, arguments, env=OURS | environment)


def test_help_teaches() -> None:
    verbs = migserve("--help").stdout
    for verb in ("gpus", "demo-models", "replay"):
        assert verb in verbs
        assert asked(verb, "--help").exit_code == 0
    text = asked("serve", "--help").stdout
    for flag in ("--model-repository", "--http-port", "--grpc-port", "--metrics-port", "--exit-timeout-secs"):
        assert flag in text


def test_help_names_every_setting_and_default_on_a_narrow_terminal() -> None:
    text = asked("serve", "--help", COLUMNS="80").stdout
    for name in settings.Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text, name
    assert "…" not in text
    words = " ".join(text.replace("│", " ").split())
    assert ("Default: 8000." in words, "Default: ." in words) == (True, False)
    assert "MIGSERVE_HTTP_PORT=9000" in text


def test_help_shows_no_value_for_a_flag_that_takes_none() -> None:
    for verb in ("plan", "simulate", "profile", "layout show", "layout apply"):
        lines = asked(*verb.split(), "--help", COLUMNS="120").stdout.splitlines()
        assert [line.split()[1] for line in lines if "<bool>" in line] == ["--help"], verb  # that one is not ours


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve", "--model-repository", "nowhere"], 1, "nowhere is not a folder; `make models` makes demo models"),
        (["serve", "--gpu", "sim:A100"], 1, "no GPU called 'A100' in the catalogue; there are A30-24GB"),
        (["serve", "--gpu", "sim:A100-80GBx0"], 1, "the number after x must be 1 or more"),
        (["serve", "--gpu", "gpu0"], 1, "use nvml, sim:A100-80GB"),
        (["serve", "--gpu", "sim:A100-80GB", "--layout", "4g.40gb+4g.40gb"], 1, "takes 8 compute slices"),
        (["serve", "--http-address", "192.0.2.1"], 1, "--http-address 192.0.2.1 is no address of this machine"),
        (
            ["serve", "--state-dir", "pyproject.toml"],
            1,
            "cannot be pyproject.toml: pyproject.toml is not a folder; --st",
        ),
        (["serve", "--journal", "/nowhere/journal"], 1, "--journal /nowhere/journal cannot be written"),
    ],
)
def test_a_daemon_that_cannot_start_says_what_to_do(
    arguments: list[str], code: int, message: str, demo_models: None
) -> None:
    done = migserve(*arguments)
    assert message in done.stderr
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve", "--http-port", "99999"], 2, "--http-port 99999: expected 65535 at most"),
        (["serve", "--arena-mib", "100"], 2, "--arena-mib 100: must be a power of two"),
        (["serve", "--config", "nowhere.yaml"], 2, "--config nowhere.yaml cannot be read: No such file"),
        (["serve", "--jobs-input-dir", "nowhere"], 2, "--jobs-input-dir nowhere: there is no such folder"),
        (["serve", "--no-allow-http", "--no-allow-grpc"], 2, "nothing would be served"),
        (["gpus", "--gpu", "sim:A100-80GB", "--layout", "5g.50gb"], 1, "did you mean"),
        (["replay", "nowhere"], 1, "No such file"),
    ],
)
def test_wrong_use_is_told_with_what_to_do(arguments: list[str], code: int, message: str) -> None:
    done = asked(*arguments)
    assert message in done.stderr
    assert (done.exit_code, type(done.exception)) == (code, SystemExit)


@pytest.mark.parametrize("protocol", ["http", "grpc", "metrics"])
def test_a_port_that_is_taken_is_named(protocol: str, demo_models: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"http": 0, "grpc": 0, "metrics": 0} | {protocol: port}
        flags = [word for name, number in ports.items() for word in (f"--{name}-port", str(number))]
        done = migserve("serve", *flags)
    assert done.returncode == 1
    assert f"--{protocol}-port {port} on 127.0.0.1 cannot be used" in done.stderr
    assert "choose another one" in done.stderr
    assert done.stderr.count("\n") == 1, "and nothing else is said, by gRPC for instance"


def test_without_a_driver_nvml_is_refused_with_what_to_do() -> None:
    done = asked("gpus", "--gpu", "nvml")
    if done.exit_code == 0:
        assert "GPU 0" in done.stdout  # this machine has one
    else:
        assert "no usable NVIDIA driver here" in done.stderr
        assert "--gpu sim:A100-80GB" in done.stderr


def test_a_layout_is_drawn() -> None:
    drawn = asked("gpus", "--gpu", "sim:H100-80GBx2", "--layout", "3g.40gb+3g.40gb").stdout
    assert drawn.count("GPU 0") == drawn.count("GPU 1") == 1
    assert drawn.count("3g.40gb") == 8  # a bar and a legend for each of four slices
    assert drawn.count("3 GPCs") == 4
    assert "1 GPC," in asked("gpus", "--gpu", "sim:A30-24GB").stdout


def test_settings_come_from_flags_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("http_port: 1\ngrpc_port: 1\nmetrics_port: 1\nmodel_repository: [a, b]\n")
    monkeypatch.setenv("MIGSERVE_HTTP_PORT", "2")
    monkeypatch.setenv("MIGSERVE_GRPC_PORT", "2")
    chosen = settings.load(file, {"http_port": 3, "layout": None})
    assert (chosen.http_port, chosen.grpc_port, chosen.metrics_port) == (3, 2, 1)
    assert chosen.model_repository == [Path("a"), Path("b")]


@pytest.mark.parametrize("given", ["/a:/b/c", "/a", "/a:"])
def test_folders_of_models_in_environment_and_file_are_written_as_in_a_path(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f'model_repository: "{given}"\n')
    wanted = [Path(each) for each in given.split(":") if each]
    assert settings.load(file, {}).model_repository == wanted
    monkeypatch.setenv("MIGSERVE_MODEL_REPOSITORY", given)
    assert settings.load(None, {}).model_repository == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http-port: 1", "settings.yaml: unknown key http-port; did you mean http_port?"),
        ("http_prot: 1\nqqq: 1", "unknown key http_prot; did you mean http_port?\n"),
        ("http_port: x", "settings.yaml: http_port 'x': expected a whole number"),
        ("arena_mib: 100", "settings.yaml: arena_mib 100: must be a power of two"),
        ("model_repository: []", "settings.yaml: model_repository []: "),
        ("allow_http: false\nallow_grpc: false", "nothing would be served: leave out --no-allow-http"),
        ("grpc_port: 1\nhttp_port: [", "settings.yaml, line 2 is not YAML: "),
        ("grpc_port: 1\ngrpc_port: 2", "settings.yaml, line 2 is not YAML: key grpc_port is given twice"),
        ("http_port: 2024-13-45", "settings.yaml, line 1 is not YAML: '2024-13-45' cannot be read: month"),
        ("- http_port: 1", "settings.yaml must hold settings by their names"),
        ("http_port", "settings.yaml must hold settings by their names"),
        ("\0", "settings.yaml is not YAML"),
    ],
)
def test_a_settings_file_that_makes_no_sense(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(settings.ConfigError) as caught:
        settings.load(file, {})
    assert message in str(caught.value)


def test_a_settings_file_can_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("# nothing yet\n")
    assert settings.load(file, {}).http_port == 8000


def test_a_wrong_variable_is_named_as_one() -> None:
    done = asked("serve", MIGSERVE_HTTP_PORT="x")
    assert done.exit_code == 2
    assert done.stderr.startswith("MIGSERVE_HTTP_PORT 'x': ")


def test_variables_that_set_nothing_are_told() -> None:
    environment = {"MIGSERVE_HTTP_PRT": "1", "MIGSERVE_HTTP_PORT": "1", "MIGSERVE_CONFIG": "a", "HTTP_PRT": "1"}
    environment["MIGSERVE_URL"] = "http://localhost:8000"  # of the other commands
    kubernetes = {"MIGSERVE_PORT_8000_TCP_ADDR": "10.0.0.1", "MIGSERVE_SERVICE_PORT_HTTP": "1", "MIGSERVE_PORT": "1"}
    assert settings.unknown_variables(environment | kubernetes) == [
        "MIGSERVE_HTTP_PRT sets nothing; did you mean MIGSERVE_HTTP_PORT?"
    ]


def read_until(word: str, process: subprocess.Popen[str]) -> str:
    """What the process prints, up to the line with that word."""
    assert process.stdout is not None
    shown = ""
    while word not in shown:
        line = process.stdout.readline()
        assert line, shown
        shown += line
    return shown


def test_the_start_draws_the_layout_and_prints_a_line_that_works(demo_models: None, tmp_path: Path) -> None:
    """As `make serve` shows it; the line is run as it is printed."""
    command = [sys.executable, "-m", "server", "serve", "--gpu", "sim:A100-80GB"]
    command += ["--model-repository", str(MODELS.relative_to(REPOSITORY)), "--state-dir", str(tmp_path)]
    for name in ("http", "grpc", "metrics", "admin"):
        command += [f"--{name}-port", "0"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            shown = read_until("curl", process)
            assert "4g.40gb" in shown
            assert "affine, digits, mlp, resnet50 (emulated)" in shown
            assert "simulated" in shown
            (curl,) = re.findall(r"curl .*", shown)
            done = subprocess.run(curl, shell=True, capture_output=True, text=True, cwd=REPOSITORY, check=True)
            assert '"name":"label","datatype":"INT64","shape":[1],"data":[3]' in done.stdout
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()  # or else `with` waits for it


def test_the_start_says_so_where_not_every_model_is_served(tmp_path: Path) -> None:
    names = [f"emulated_model_of_a_long_name_{number}" for number in range(4)]
    for name in names:
        repositories.emulated(tmp_path / name, 1)
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "server", "serve", "--gpu", "sim:A100-80GB", "--drain-delay-secs", "0"]
    command += ["--model-repository", str(tmp_path), "--no-allow-admin"]
    for name in ("http", "grpc", "metrics"):
        command += [f"--{name}-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            shown = read_until("model empty", process)
            assert "Serving, but NOT READY: grpc localhost:" in shown
            assert "Ready:" not in shown
            lines = [line.strip("│\n") for line in shown.splitlines() if line.startswith("│")]
            column = lines[1].index(names[0])
            assert all(line[:column].strip() == "" for line in lines if names[-1] in line), "under its beginning"
            process.send_signal(signal.SIGINT)
            read_until("Ctrl-C again to hurry", process)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_ctrl_c_before_anything_runs_just_ends_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "server", "serve"], cwd=REPOSITORY, stdout=-1, stderr=-1, text=True
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        until(lambda: "pydantic_core" in maps.read_text(), "it is importing")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == -signal.SIGINT


def test_a_journal_of_a_busy_day_replays(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "models" / "affine", 1, max_batch=64)
    path = tmp_path / "journal"
    flags = ("--model-repository", str(tmp_path / "models"), "--drain-delay-secs", "0")
    with running("--journal", str(path), *flags) as daemon:
        name, pid = sorted(daemon.workers().items())[0]
        x = np.ones((3, 16), np.float32)

        def start() -> Any:
            client = http_binary(daemon.http)
            return lambda _: client("affine", x)

        in_threads(8, range(200), start)
        os.kill(pid, signal.SIGKILL)
        daemon.wait_for("worker up", count=2, worker=name)
        in_threads(8, range(200), start)
        infer(daemon.http, "affine", {"inputs": []})
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1] * 16}]}
        infer(daemon.http, "affine", body | {"parameters": {"timeout": 1}})
        infer(daemon.http, "affine", body | {"parameters": {"slo_ms": 0.001}})
        daemon.terminate()
        assert daemon.wait() == 0
    done = migserve("replay", str(path))
    found = re.fullmatch(r"(\d+) events, the same commands\n", done.stdout)
    assert found, done.stderr
    assert int(found[1]) > 402  # the requests' arrivals; how many batches they made is chance


def private_mib(pid: int) -> float:
    """Memory that would come free if the process ended."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def test_a_worker_takes_little_memory_of_its_own(daemon: RunningDaemon) -> None:
    for protocol in ("HTTP binary", "gRPC"):
        port, connect = PROTOCOLS[protocol]
        client = connect(getattr(daemon, port))
        for model, width in (("affine", 16), ("mlp", 256)):
            client(model, np.ones((64, width), np.float32))
    private = {name: private_mib(pid) for name, pid in daemon.workers().items()}
    print(", ".join(f"{name}: {mib:.0f} MiB" for name, mib in private.items()))
    assert max(private.values()) < PRIVATE_MIB_PER_WORKER


def test_a_model_that_takes_too_long_to_load_is_given_up(tmp_path: Path) -> None:
    repositories.endless(tmp_path / "hangs")
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb", "--load-timeout-secs", "1") as daemon:
        (line,) = daemon.events("model not loaded", model="hangs")
        assert "loading hangs took more than 1 s" in line["reason"]


def test_several_workers_on_one_slice(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "affine", 1)
    flags = ("--model-repository", str(tmp_path), "--layout", "1g.10gb", "--drain-delay-secs", "0")
    with running(*flags, "--workers-per-slice", "3") as daemon:
        assert sorted(daemon.workers()) == ["gpu0/1g.10gb@0", "gpu0/1g.10gb@0#1", "gpu0/1g.10gb@0#2"]
        client = http_binary(daemon.http)
        x = np.ones((1, 16), np.float32)
        np.testing.assert_array_equal(client("affine", x).as_numpy("y"), [[16]])
        metrics = request(daemon.metrics, "GET", "/metrics").body.decode()
        assert len(re.findall(r'migserve_slice_state\{[^}]*state="ready"[^}]*\} 1\.0', metrics)) == 3


def test_fourteen_emulated_slices_on_two_simulated_gpus(tmp_path: Path) -> None:
    """They sleep instead of computing, so their rate is that of their table, whatever this machine can do."""
    repositories.emulated(tmp_path / "model", 100, max_batch=1)
    layout = "+".join(["1g.10gb"] * 7)
    with running("--gpu", "sim:A100-80GBx2", "--layout", layout, "--model-repository", str(tmp_path)) as daemon:
        assert len(daemon.workers()) == 14

        def start() -> Any:
            return lambda _: infer(daemon.http, "model", {"inputs": [X16]})

        in_threads(28, range(140), start)
        text = request(daemon.metrics, "GET", "/metrics").body.decode()
        counts = re.findall(r"migserve_compute_seconds_count\{[^}]*\} (\d+)", text)
        assert len(counts) == 14, "every slice has had work"
        assert sum(map(int, counts)) == 140
        assert min(map(int, counts)) >= 7, "and about the same"


X16 = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1] * 16}


def test_nothing_is_left_behind_by_requests(daemon: RunningDaemon) -> None:
    """Arena, queue and connections are as before, after good ones and bad ones."""
    picture = (MODELS / "digits" / "three.png").read_bytes()

    def start() -> Any:
        def send(number: int) -> None:
            bodies: list[tuple[str, Any]] = [
                ("affine", {"inputs": [X16]}),
                ("affine", {"inputs": [X16 | {"data": [1]}]}),
                ("affine", {"inputs": [X16], "parameters": {"slo_ms": 0.001}}),
                ("digits", picture),
                ("digits", picture[:-40]),
                ("nope", {}),
            ]
            infer(daemon.http, *bodies[number % len(bodies)])

        return send

    in_threads(8, range(300), start)
    metrics = request(daemon.metrics, "GET", "/metrics").body.decode()
    assert "migserve_arena_used_bytes 0.0" in metrics
    pending = re.findall(r"nv_inference_pending_request_count\{[^}]*\} ([\d.]+)", metrics)
    assert set(pending) == {"0.0"}
