"""What a model's files say: contradictions are refused, what is ignored is told, errors are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from partitioner import yaml_text
from server.config_pbtxt import ModelFileError
from server.model_files import read_model, versions_to_serve
from tests import repositories


def with_config(folder: Path, config: str, *files: str) -> Path:
    """A model folder with empty model files, which are not read here."""
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    for name in files:
        (folder / "1" / name).touch()
    return folder


def error_of(folder: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_model(folder, versions_to_serve(folder)[0][0], 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('name: "other"', "config.pbtxt: name is 'other', the folder is 'm'; leave the name out"),
        ('platform: "onnxruntime_onnx"', "config.pbtxt: platform 'onnxruntime_onnx', but "),
        ('backend: "tensorrt"', "holds model.pt2; they may be torch_export or pytorch for a model.pt2, pytorch_l"),
        ('platform: "pytorch_libtorch"', "platform 'pytorch_libtorch', but "),
        ('backend: "emulated" platform: "torch_export"', "platform 'torch_export', backend 'emulated', but "),
        ('platform: "ensemble"', "config.pbtxt: ensembles are not supported"),
        ("ensemble_scheduling {}", "config.pbtxt: ensembles are not supported"),
        ("sequence_batching {}", "config.pbtxt: sequences are not supported"),
    ],
)
def test_a_config_that_says_another_thing_than_the_folder_is_refused(config: str, message: str, tmp_path: Path) -> None:
    assert message in error_of(with_config(tmp_path / "m", config, "model.pt2"))


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ('name: "m"', "model.pt2"),
        ('platform: "pytorch_libtorch"', "model.pt"),
        ('backend: "pytorch"', "model.pt2"),
        ('backend: "pytorch" platform: "pytorch_libtorch"', "model.pt"),
        ('platform: "torch_export" backend: "torch_export"', "model.pt2"),
    ],
)
def test_a_config_that_names_the_right_backend_is_taken(config: str, file: str, tmp_path: Path) -> None:
    source, *_ = read_model(with_config(tmp_path / "m", config, "model.pt2", "model.pt"), 1, 1)
    assert Path(source.path).name == file


def test_fields_that_change_nothing_are_told(tmp_path: Path) -> None:
    config = """
        max_batch_size: 8 instance_group [{ count: 2 }] optimization {} version_policy { all {} }
        dynamic_batching { max_queue_delay_microseconds: 100 preferred_batch_size: [4] }
        input { name: "x" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }
    """
    _, ignored = versions_to_serve(with_config(tmp_path / "m", config, "model.pt2"))
    assert sorted(ignored) == [
        "dynamic_batching.max_queue_delay_microseconds",
        "dynamic_batching.preferred_batch_size",
        "input.reshape",
        "instance_group",
        "optimization",
    ]
    assert versions_to_serve(repositories.emulated(tmp_path / "plain", 1)) == ([1], [])
    assert versions_to_serve(with_config(tmp_path / "batches", "dynamic_batching {}", "model.pt2")) == ([1], [])


def test_an_emulated_model_needs_no_version_folder(tmp_path: Path) -> None:
    folder = repositories.emulated(tmp_path / "m", 1)
    (folder / "1").rmdir()
    assert versions_to_serve(folder) == ([1], [])
    assert read_model(folder, 1, 1)[0].backend == "emulated"


def pictures(steps: str) -> str:
    return f"preprocess: {{input: a, output: b, image: {{{steps}}}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slo: 5", "serving.yaml: unknown key slo; did you mean slo_ms?"),
        ("zzz: 5", "unknown key zzz; there are slo_ms, strict, split, weight, mig_profiles, latency_table, preprocess"),
        ("latency_table: {fil: a}", "unknown key latency_table.fil; did you mean file?"),
        (
            "preprocess: {input: a, output: b, image: {size: [8, 8], mod: L}}",
            "unknown key preprocess.image.mod; did you mean mode?",
        ),
        (
            "preprocess: {input: a, output: b, longest: 5, text: {tokenizer: t.json, max_tokens: 8}}",
            "unknown key preprocess.longest; did you mean lengths.longest?",
        ),
        (
            "preprocess: {input: a, output: b, zzz: 5, image: {size: [8, 8]}}",
            "unknown key preprocess.zzz; there are input, output, length, mask, device, image, audio, text",
        ),
        ("slo_ms: 5\nmig_profiles: [", "serving.yaml, line 2 is not YAML: "),
        ("strict: sometimes", "serving.yaml: strict: expected true or false"),
        ("splitt: false", "unknown key splitt; did you mean split?"),
        ("slo_ms: fast", "serving.yaml: slo_ms: expected a number"),
        ("slo_ms: 5\nstrict: true\nslo_ms: 6", "serving.yaml, line 3 is not YAML: key slo_ms is given twice"),
        (
            "preprocess:\n  input: a\n  output: b\n  audio: {preset: whisper, mels: 80, mels: 128}",
            "serving.yaml, line 4 is not YAML: key mels is given twice",
        ),
        ("preprocess: 5", "serving.yaml: preprocess: expected a section"),
        ("latency_table: t.csv", "serving.yaml: latency_table: expected a section"),
        ("preprocess: {input: a, image: {size: [8, 8]}}", "serving.yaml: preprocess.output is missing"),
        ("preprocess: {}", "serving.yaml: preprocess.input is missing; preprocess.output is missing"),
        ("preprocess: {input: 5, output: b, image: {size: [8, 8]}}", "preprocess.input: expected text"),
        *(
            (f"preprocess: {{input: {name}, output: b, image: {{size: [8, 8]}}}}", "preprocess: input must be a name")
            for name in ("'a\"'", "'a\\'", '"a\\t"', '"\\0"')
        ),
        (pictures("size: [8, 8], exif: maybe"), "preprocess.image.exif: expected true or false"),
        (pictures("size: [8, 8], max_pixels: 1.5"), "preprocess.image.max_pixels: expected a whole number"),
        (pictures("size: [8, 8], max_pixels: 0"), "preprocess.image.max_pixels: expected 1 or more"),
        (pictures("size: [8, 8], mode: grey"), "preprocess.image.mode: expected 'L' or 'RGB'"),
        (
            "preprocess: {input: a, output: b, audio: {seconds: 4000}}",
            "preprocess.audio.seconds: expected 3600 at most",
        ),
        ("slo_ms: 0", "serving.yaml: slo_ms: expected more than 0"),
        ("mig_profiles: 1g.10gb", "serving.yaml: mig_profiles: expected a list"),
        ("mig_profiles: [1]", "serving.yaml: mig_profiles.0: expected text"),
        ("latency_table: {measured: h100}", "serving.yaml: latency_table.measured: expected 'a100'"),
        ("latency_table: {file: 5}", "latency_table.file: expected the name of a file or folder"),
        ("lengths: {longest: 4, buckets: many}", "serving.yaml: lengths.buckets: expected how many lengths, or a list"),
        ("5: 3", "serving.yaml: 5: expected keys that are text"),
        (pictures("size: 32"), "serving.yaml: preprocess.image.size: expected [height, width] in pixels"),
        (pictures("size: [8, 8, 8]"), "preprocess.image.size: expected [height, width] in pixels"),
        (pictures("resize: 8, crop: [8]"), "preprocess.image.crop: expected a number of pixels, or [height, width]"),
        (
            pictures("size: [8, 8], mean: 0.5, std: [1]"),
            "preprocess.image.mean: expected a list of one number for each channel",
        ),
        (pictures("size: [8, 8], mode: L, mean: [0], std: [.nan]"), "preprocess.image.std.0: expected a finite number"),
        (pictures("size: [8, 8], divide_by: .inf"), "preprocess.image.divide_by: expected a finite number"),
        ("preprocess: {input: a, output: b, audio: {high_hz: .nan}}", "audio.high_hz: expected a finite number"),
        (pictures("resize: 4, crop: 8"), "serving.yaml: preprocess.image: crop 8 x 8 is larger"),
        ("- slo_ms: 5", "must hold settings by their names"),
        ("\0", "serving.yaml is not YAML: it is not text in UTF-8"),
        ("strict: true\nslo_ms: 2024-13-45", "line 2 is not YAML: '2024-13-45' cannot be read: month must be in 1..12"),
        ("slo_ms: " + "9" * 5000, "serving.yaml, line 1 is not YAML: '" + "9" * 40 + "' cannot be read: "),
        ("lengths: {mask: !!timestamp x}", "serving.yaml, line 1 is not YAML: 'x' cannot be read: "),
        ("slo_ms: !!float ''", "serving.yaml, line 1 is not YAML: '' cannot be read: "),
        ("strict: !!bool x", "serving.yaml, line 1 is not YAML: 'x' cannot be read: "),
        ("[" * 3000, "serving.yaml is not YAML: it is nested too deeply"),
    ],
)
def test_a_serving_file_that_makes_no_sense(text: str, message: str, tmp_path: Path) -> None:
    folder = repositories.emulated(tmp_path / "m", 1)
    (folder / "serving.yaml").write_text(text)
    assert message in error_of(folder)
    assert error_of(folder).count("expected") <= 1


def test_keys_that_only_look_alike_are_two() -> None:
    assert yaml_text.load("1: x\n'1': y") == {1: "x", "1": "y"}


def test_sections_may_be_merged_one_after_the_other() -> None:
    text = "{x: &x {a: 1}, y: &y {b: 2}, z: {<<: *x, <<: *y, c: 3}}"
    assert yaml_text.load(text)["z"] == {"a": 1, "b": 2, "c": 3}


def test_a_section_may_be_merged_into_another(tmp_path: Path) -> None:
    """What it replaces of it is not given twice."""
    folder = repositories.emulated(tmp_path / "m", 1)
    text = "lengths: {<<: &common {longest: 9, length: n}, longest: 5}\n"
    (folder / "serving.yaml").write_text(text)
    _, serving, _ = read_model(folder, 1, 1)
    assert serving.lengths is not None
    assert (serving.lengths.longest, serving.lengths.length) == (5, "n")
