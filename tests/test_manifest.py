"""`deploy.yaml`: what is read of it, what is written, and that nothing in it harms its reader."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import paddle
import pytest
import yaml
from paddle import nn

from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.manifest import (
    Calibration,
    FileEntry,
    Manifest,
    Nms,
    PrecisionCheck,
    Tile,
    format_manifest,
    parse_manifest,
    read_manifest,
)
from ppvision.errors import ManifestError, PpvisionError
from ppvision.files import compute_sha256
from ppvision.schema import collect_checks, take_any
from tests.helpers.alone import run_alone
from tests.helpers.configs import ROOT
from tests.helpers.fuzz import BOMBS, VALUES, mutate_yaml
from tests.helpers.measured import measure_transforms
from tests.helpers.messages import raises_naming

ENTRY = {"bytes": 3, "sha256": "0" * 64}
NORMALIZE = {"type": "Normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
SEGMENTATION = {
    "name": "street",
    "task": "segmentation",
    "format": "paddle",
    "program": "model.json",
    "weights": "model.pdiparams",
    "earlier_format": True,
    "openvino": True,
    "onednn": False,
    "input_shape": [1, 3, 32, 40],
    "output_op": "argmax",
    "transforms": [
        {"type": "Resize", "target_size": [40, 32], "keep_ratio": True, "interp": "LINEAR"},
        {"type": "Padding", "target_size": [40, 32], "im_padding_value": 127.5},
        NORMALIZE,
    ],
    "num_classes": 3,
    "classes": ["road", "grass", "yes"],
    "bits": 32,
    "files": {name: dict(ENTRY) for name in ("model.json", "model.pdiparams", "model.pdmodel")},
    "max_error_to_eager": 1e-6,
    "checked_shapes": [[1, 3, 32, 40]],
    "paddle_version": "3.2.2",
    "parameters": {"conv2d_0.w_0": "backbone.conv.weight"},
    "format_version": 2,
}
DETECTION = {
    **SEGMENTATION,
    "task": "detection",
    "output_op": "nms",
    "openvino": None,
    "transforms": [
        {"Decode": {}},
        {"Resize": {"target_size": [32, 40], "keep_ratio": False, "interp": 1}},
        {
            "NormalizeImage": {
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
                "is_scale": True,
                "norm_type": "mean_std",
            }
        },
        {"Permute": None},
        {"PadBatch": {"pad_to_stride": 32}},
    ],
    # What later versions write.
    "activations": 8,
    "max_value": 4095,
    "outputs": ["boxes", "scores"],
    "int8": {"passed": True, "engine": "openvino", "equal_labels": 0.998, "milliseconds": 4.2},
    "bfloat16": {"passed": False, "max_error": 0.5},
    "calibration": {"method": "percentile", "pictures": 64},
    "keep_float": ["head.conv"],
    "architecture": "ppyoloe_pale_nano",
    "paddlex_name": "PP-YOLOE_plus-S",
    "nms": {"score_threshold": 0.1, "iou_threshold": 0.6, "candidates": 1000, "kept": 100},
    "tile": {"size": [512, 512], "overlap": 64},
    "Deploy": {"model": "model.json", "transforms": [{"type": "Normalize"}]},
}
ONNX = {
    **SEGMENTATION,
    "task": "classification",
    "format": "onnx",
    "program": "model.onnx",
    "weights": None,
    "earlier_format": False,
    "openvino": None,
    "onednn": None,
    "parameters": {},
    "files": {"model.onnx": dict(ENTRY)},
}
VERSION_1 = {
    key: value
    for key, value in SEGMENTATION.items()
    if key not in ("program", "weights", "earlier_format")
} | {"format_version": 1}
DOCUMENTS = {"v2": SEGMENTATION, "all": DETECTION, "onnx": ONNX, "v1": VERSION_1}


def parsed(content: Any) -> Manifest:
    return parse_manifest(yaml.safe_dump(content, sort_keys=False), "deploy.yaml")


def test_every_entry_is_read():
    found = parsed(DETECTION)
    assert found.files["model.json"] == FileEntry(bytes=3, sha256="0" * 64)
    assert found.int8 == PrecisionCheck(
        passed=True, engine="openvino", equal_labels=0.998, milliseconds=4.2
    )
    assert found.calibration == Calibration(method="percentile", pictures=64)
    assert found.nms == Nms(score_threshold=0.1, iou_threshold=0.6, candidates=1000, kept=100)
    assert found.tile == Tile(size=[512, 512], overlap=64)
    others = {"files", "int8", "bfloat16", "calibration", "nms", "tile"}
    for key in DETECTION.keys() - others:
        assert getattr(found, key) == DETECTION[key], key
    assert DETECTION.keys() == {entry.name for entry in dataclasses.fields(Manifest)}


@pytest.mark.parametrize("content", DOCUMENTS.values(), ids=DOCUMENTS)
def test_what_is_written_reads_the_same(content):
    found = parsed(content)
    text = format_manifest(found)
    assert parse_manifest(text, "again") == found
    assert "null" not in text.replace("weights: null", "").replace("openvino: null", "").replace(
        "onednn: null", ""
    ).replace("Permute: null", "")
    assert ("nms" in text) == (content is DETECTION)  # what says nothing is left out


def test_version_1_reads_as_version_2():
    expected = {**SEGMENTATION, "openvino": True}
    assert parsed(VERSION_1) == parsed(expected)
    files = dict.fromkeys(("model.json", "model.pdiparams"), ENTRY)
    without = {**VERSION_1, "openvino": None, "files": files}
    found = parsed(without)
    assert (found.earlier_format, found.openvino) == (False, None)
    assert found.program == "model.json"
    with pytest.raises(ManifestError, match="program"):
        parsed({**VERSION_1, "program": "model.json"})


def test_texts_that_look_like_numbers():
    """Version 1 wrote `1e-3` without quotes, which our reader takes for a number."""
    names = {"name": "1e-3", "classes": ["1e3", "1.5", "no"]}
    written = format_manifest(parsed({**SEGMENTATION, "classes": []}))
    found = dataclasses.replace(parse_manifest(written, "x"), **names)
    assert parse_manifest(format_manifest(found), "x") == found
    earlier = parsed({**VERSION_1, **names})
    assert float(earlier.name) == 1e-3
    assert [float(earlier.classes[0]), *earlier.classes[1:]] == [1e3, "1.5", "no"]


def test_every_field_has_a_check():
    for kind in (Manifest, FileEntry, PrecisionCheck, Calibration, Nms, Tile):
        checks = collect_checks(kind)
        for entry in dataclasses.fields(kind):
            assert checks[entry.name] is not take_any, entry.name


def leaves(node: Any, path: tuple = ()) -> list[tuple]:
    if isinstance(node, (dict, list)) and path[:1] != ("Deploy",):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [
            leaf for key, value in items for leaf in [(*path, key), *leaves(value, (*path, key))]
        ]
    return []


def test_another_type_is_refused_at_every_place():
    """A value of another type is an error that names the entry; transforms are checked by those
    who build them, and what PaddleSeg reads is PaddleSeg's."""
    checked = 0
    for path in leaves(DETECTION):
        if path[0] in ("transforms", "Deploy") and len(path) > 1:
            continue
        content = json.loads(json.dumps(DETECTION))
        *owners, key = path
        owner = content
        for step in owners:
            owner = owner[step]
        for value in (float("nan"), object):
            owner[key] = {"another": ["type"]} if value is object else value
            if path == ("Deploy",) and value is object:
                continue
            with pytest.raises(ManifestError) as caught:
                parsed(content)
            assert str(path[0]) in str(caught.value), path
            assert len(str(caught.value)) < 700
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        ({"program": "../model.json"}, "program"),
        ({"program": "/etc/model.json"}, "program"),
        ({"program": "model.onnx"}, "program"),
        ({"weights": None}, "weights"),
        ({"files": {"..": ENTRY}}, "files"),
        ({"files": {"model.json": ENTRY}}, "files model.pdiparams"),
        ({"bits": 9}, "bits"),
        ({"activations": 7}, "activations"),
        ({"openvino": True, "earlier_format": False}, "openvino"),
        ({"output_op": "nms"}, "output_op"),
        ({"checked_shapes": [[1, 3, 32, 41]]}, "checked_shapes"),
        ({"checked_shapes": [[4096, 3, 32, 40]]}, "checked_shapes"),
        ({"input_shape": [1, 3, 10**9, 40]}, "input_shape"),
        ({"input_shape": [1, None, 32, 40]}, "input_shape"),
        ({"max_error_to_eager": -1}, "max_error_to_eager"),
        ({"max_value": 65536}, "max_value"),
        ({"tile": {"size": [8, 8], "overlap": 8}}, "overlap"),
        ({"nms": DETECTION["nms"]}, "nms"),
        ({"int8": {"passed": 1}}, "int8.passed"),
        ({"name": "x" * 5000}, "name"),
        ({"num_classes": 10**30}, "num_classes"),
    ],
)
def test_ranges_and_what_entries_say_of_each_other(change, tokens):
    parsed(SEGMENTATION)
    with raises_naming(ManifestError, *tokens.split()) as caught:
        parsed({**SEGMENTATION, **change})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", BOMBS, ids=[repr(text[:12]) for text in BOMBS])
def test_documents_that_hurt_parsers(text):
    start = time.perf_counter()
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "deploy.yaml")
    assert time.perf_counter() - start < 10
    assert len(str(caught.value)) < 1000


def test_a_large_file_is_not_read(tmp_path):
    with (tmp_path / "deploy.yaml").open("wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    with pytest.raises(ManifestError, match="bytes"):
        read_manifest(tmp_path)


def test_many_classes_are_no_attack():
    """As many as the largest set of classes that is in use."""
    names = [f"n{number:08}, {'word ' * 4}" for number in range(21_841)]
    content = {**SEGMENTATION, "num_classes": len(names), "classes": names}
    assert parsed(content).classes == names


def test_links_stay_inside(tmp_path):
    folder = tmp_path / "net"
    (folder / "..data").mkdir(parents=True)
    content = {**SEGMENTATION, "earlier_format": False, "openvino": None, "files": {}}
    for name in ("model.json", "model.pdiparams"):
        (folder / "..data" / name).write_bytes(b"abc")
        (folder / name).symlink_to(Path("..data") / name)  # as in a volume of Kubernetes
        digest = compute_sha256(folder / name)
        content["files"][name] = {"bytes": 3, "sha256": digest}
    (folder / "deploy.yaml").write_text(yaml.safe_dump(content))
    assert read_manifest(folder).name == "street"
    outside = tmp_path / "outside"
    (folder / "..data").rename(outside)
    (folder / "..data").symlink_to(outside)
    with raises_naming(ManifestError, "model.json", "link"):
        read_manifest(folder)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.all)])
def test_fuzz_of_the_reader(count):
    """No crash, no hang, no memory, only our errors."""
    refused = 0
    parsed(SEGMENTATION)
    tracemalloc.start()
    try:
        for number, text in enumerate(mutate_yaml(list(DOCUMENTS.values()), count, seed=23)):
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
            message = ""
            try:
                parse_manifest(text, "deploy.yaml")
            except ManifestError as error:
                refused, message = refused + 1, str(error)
            assert len(message) < 2000
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= max(10 * len(text.encode("utf-8", "replace")), 64 * 2**20), number
            assert time.perf_counter() - start < 60, number
    finally:
        tracemalloc.stop()
    assert count // 3 < refused < count


@pytest.mark.parametrize("kind", ["Transforms", "DetectionTransforms"])
@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.all)])
def test_fuzz_of_transforms(kind, count):
    """Built from any value and applied to a picture: a result or our error, within the limit of
    pixels. In a process of its own, whose memory no other test took."""
    more = [
        [{"type": "ResizeByLong", "long_size": 9}, {"type": "LimitLong", "max_long": 30}],
        [{"type": "ResizeByShort", "short_size": 9, "max_size": 30}],
        [{"type": "PaddingByAspectRatio", "aspect_ratio": 1.5, "label_padding_value": 255}],
        [{"type": "CenterCrop", "target_size": [5, 6]}],
    ]
    detection = kind == "DetectionTransforms"
    valid = [DETECTION["transforms"]] if detection else [SEGMENTATION["transforms"], *more]
    refused, grown = run_alone(measure_transforms, kind, valid, count)
    assert count // 4 < refused < count
    assert grown < 64 * 2**20


# -- whole folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exports of a small net: any size with a resize, one size with padding."""
    root = tmp_path_factory.mktemp("fuzz")
    paddle.seed(3)
    net = nn.Sequential(nn.Conv2D(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2D(8, 5, 3, padding=1))
    resize = {"type": "Resize", "target_size": [40, 32]}
    padding = {"type": "Padding", "target_size": [40, 32]}
    limit = {"type": "LimitLong", "max_long": 32}
    export_model(
        net, root / "free", input_shape=[None, 3, None, None], transforms=[resize, NORMALIZE]
    )
    export_model(
        net,
        root / "fixed",
        input_shape=[1, 3, 32, 40],
        output_op="softmax",
        transforms=[limit, padding, NORMALIZE],
        classes=list("abcde"),
    )
    return [root / "free", root / "fixed"]


_PREDICT = """
import sys, warnings
from pathlib import Path
import numpy as np
from ppvision.deploy import Predictor
from ppvision.errors import PpvisionError
from tests.helpers.alone import read_peak

warnings.simplefilter("ignore")
picture = np.random.default_rng(0).integers(0, 256, (30, 32, 3), dtype=np.uint8)
folder, documents = Path(sys.argv[1]), sorted(Path(sys.argv[2]).glob("*.yaml"))
for _ in range(3):
    Predictor(folder)(picture)
for document in documents[int(sys.argv[3]):]:
    before = read_peak()
    print("try", document.stem, flush=True)
    (folder / "deploy.yaml").write_bytes(document.read_bytes())
    try:
        with Predictor(folder) as predictor:
            predictor(picture)
            result = "ran"
    except PpvisionError as error:
        result = "refused" if len(str(error)) < 3000 else f"LONG {str(error)[:200]}"
    except Exception as error:
        result = f"OTHER {type(error).__name__} {str(error)[:200]}"
    print(result, (read_peak() - before) >> 20, flush=True)
"""


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.all)])
def test_fuzz_of_opening_and_predicting(folders, tmp_path, count):
    """In a process of its own, which engines might end."""
    results = []
    for valid in folders:
        folder = shutil.copytree(valid, tmp_path / valid.name)
        content = yaml.safe_load((folder / "deploy.yaml").read_text())
        documents = tmp_path / f"{valid.name}-documents"
        documents.mkdir()
        for number, text in enumerate(mutate_yaml([content], count // 2, seed=count)):
            data = text.encode("utf-8", "surrogatepass")
            (documents / f"{number:05}.yaml").write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-c", _PREDICT, str(folder), str(documents), "0"],
            capture_output=True,
            text=True,
            timeout=120 + 5 * count,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        lines = done.stdout.splitlines()
        assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
        results += [
            line for line in lines if line.split()[0] in ("ran", "refused", "OTHER", "LONG")
        ]
    assert len(results) == 2 * (count // 2)
    assert [line for line in results if not line.startswith(("ran", "refused"))] == []
    assert max(int(line.split()[-1]) for line in results) <= 64  # MiB
    assert len([line for line in results if line.startswith("refused")]) > count // 4


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda m: m.update(input_shape=[1, 3, 32, 40], checked_shapes=[[1, 3, 32, 40]]), "input_"),
        (lambda m: m.update(num_classes=4), "num_classes"),
        (lambda m: m.update(task="classification"), "task"),
        (lambda m: m.update(output_op="softmax"), "output_op"),
        (lambda m: m.update(transforms=[{"type": "CenterCrop", "target_size": [4, 4]}]), "CenterC"),
    ],
)
def test_what_does_not_fit_the_graph(folders, tmp_path, change, token):
    folder = shutil.copytree(folders[0], tmp_path / "changed")
    content = yaml.safe_load((folder / "deploy.yaml").read_text())
    change(content)
    (folder / "deploy.yaml").write_text(yaml.safe_dump(content))
    picture = cv2.resize(np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8), (32, 30))
    with pytest.raises(ManifestError, match=token):
        Predictor(folder)(picture)


def test_values_of_the_fuzz_are_refused_as_a_size():
    """The fuzz is no test if its values fit everywhere."""
    refused = 0
    for value in VALUES:
        try:
            parsed({**SEGMENTATION, "input_shape": value})
        except PpvisionError:
            refused += 1
    assert refused == len(VALUES)
