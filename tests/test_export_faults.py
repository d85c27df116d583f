"""Exports and layered models under faults: other processes, signals, a full disk, a converter that
ends its process."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from paddle import nn

from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.engines import has_openvino
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.write import openvino
from ppvision.errors import EngineError, FolderInUseError, InputError, StorageError
from ppvision.files import lock_folder, name_storage_errors
from ppvision.quant import describe_layered, load_layered, save_layered
from ppvision.zoo import create_model, load_weights
from ppvision.zoo.weights import save_weights
from tests.helpers.configs import ROOT, classification_config
from tests.helpers.messages import raises_naming
from tests.helpers.small_layered import tiny_once_qat
from tests.helpers.waiting import wait_until
from tests.helpers.wide_net import SHAPE, Net


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- other processes -------------------------------------------------------------------------------

# argv: folder, classes, and where to wait for the other: in the middle of the export.
_EXPORT = """
import os, sys, time, warnings
from pathlib import Path
from ppvision.deploy import export_model
from ppvision.deploy.write import export
from ppvision.errors import FolderInUseError
from tests.helpers.wide_net import SHAPE, Net

warnings.simplefilter("ignore")
folder, classes, meeting = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
write = export.write_graphs
def write_and_wait(*arguments):
    write(*arguments)
    (meeting / str(os.getpid())).touch()
    end = time.time() + 60
    while len(list(meeting.iterdir())) < 2 and time.time() < end:
        time.sleep(0.01)
export.write_graphs = write_and_wait
try:
    export_model(Net(classes), folder, input_shape=SHAPE)
except FolderInUseError as error:
    (meeting / str(os.getpid())).touch()
    sys.exit(3 if str(folder) in str(error) else 4)
"""


def start(code: str, *arguments: object, **how: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, **how
    )


def test_two_processes_export_into_one_folder(tmp_path):
    """One wins, the other is refused by name; what is there is whole, and nothing is left."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    folder = tmp_path / "net"
    both = [start(_EXPORT, folder, classes, meeting) for classes in (4, 5)]
    said = [process.communicate(timeout=180)[0].decode()[-800:] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 3], said
    assert read_manifest(folder).num_classes == (4, 5)[codes.index(0)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meeting", "net"]
    export_model(Net(6), folder, input_shape=SHAPE)
    assert read_manifest(folder).num_classes == 6


def test_two_processes_write_one_layered_model(tmp_path):
    once = tiny_once_qat()
    with (
        lock_folder(tmp_path / ".m.ppvision-partial", "held"),
        pytest.raises(FolderInUseError, match="process"),
    ):
        save_layered(once, tmp_path / "m", bits=once.widths, config={})
    folder = save_layered(once, tmp_path / "m", bits=once.widths, config={})
    assert load_layered(folder).bits == 8
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# -- signals ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory, crops):
    """`(config, float weights, layered model)` of a small classifier."""
    root = tmp_path_factory.mktemp("job")
    content = classification_config(crops)
    content["model"] = {"type": "resnet20", "num_classes": 3}
    content["slim_config"] = {"bits": [8, 2]}
    config = root / "job.yml"
    config.write_text(yaml.safe_dump(content))
    weights = root / "float.pdparams"
    paddle.save(create_model("resnet20", num_classes=3).state_dict(), str(weights))
    said, done = run("pack", "-c", config, "--model_path", weights, "--ptq", "--output", root / "m")
    assert done.returncode == 0, said
    return config, weights, root / "m"


def run(*arguments: object) -> tuple[str, subprocess.Popen]:
    """What a command printed, and how it ended."""
    process = command(*arguments)
    return process.communicate(timeout=300)[0].decode()[-1500:], process


def command(*arguments: object) -> subprocess.Popen:
    code = "import sys; from ppvision.__main__ import main; sys.exit(main())"
    return start(code, *arguments)


def verb(kind: str, job: tuple, target: Path) -> list[object]:
    config, weights, layered = job
    if kind == "pack":
        return ["pack", "-c", config, "--model_path", weights, "--ptq", "--output", target]
    rest = ["--skip_eval", "--bits", "8", "2"] if kind == "export --bits" else []
    model = layered if rest else weights
    shape = ["--input_shape", "1", "3", "24", "24"]
    return ["export", "-c", config, "--model_path", model, "--save_dir", target, *shape, *rest]


def check_whole(kind: str, target: Path) -> None:
    if kind == "pack":
        assert load_layered(target, 8).state.bits == (8, 2)
    elif kind == "export":
        Predictor(target, threads=1)(np.zeros((24, 24, 3), np.uint8))
    else:
        assert {p.name for p in target.iterdir()} == {"w8", "w2", "widths.csv", "vdl"}
        for name in ("w8", "w2"):
            Predictor(target / name, threads=1)(np.zeros((24, 24, 3), np.uint8))


KINDS = ["pack", "export", "export --bits"]


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("export --bits", signal.SIGTERM),
        ("pack", signal.SIGINT),
        *(
            pytest.param(kind, number, marks=pytest.mark.all)
            for kind in KINDS
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        ),
    ],
)
def test_a_signal_leaves_nothing_half_written(job, tmp_path, kind, number):
    target = tmp_path / "made" / "target"
    target.parent.mkdir()
    process = command(*verb(kind, job, target))
    wait_until(lambda: list(target.parent.iterdir()) or process.poll() is not None)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0].decode()
    if process.returncode == 0:  # complete before the signal came
        check_whole(kind, target)
    else:
        assert process.returncode == 128 + number, said[-1000:]
        assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("pack", 1), *(pytest.param(kind, 12, marks=pytest.mark.all) for kind in KINDS)],
)
def test_killed_and_made_again(job, tmp_path, kind, kills):
    """The earlier folder or the new one is there, whole, whenever the process is killed; and the
    next try succeeds."""
    target = tmp_path / "made" / "target"
    target.parent.mkdir()
    random = np.random.default_rng(len(kind))
    said, first = run(*verb(kind, job, target))
    assert first.returncode == 0, said
    for _ in range(kills):
        process = command(*verb(kind, job, target))
        wait_until(lambda: len(list(target.parent.iterdir())) > 1 or process.poll() is not None)  # noqa: B023
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.communicate(timeout=60)
        check_whole(kind, target)
    said, again = run(*verb(kind, job, target))
    assert again.returncode == 0, said
    check_whole(kind, target)
    assert [p.name for p in target.parent.iterdir()] == ["target"]


# -- the disk --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)`: a file system of that size. Skips where it cannot be mounted."""
    made = []

    def mount(kib: int) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting a file system needs root")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


def used(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*"))


def test_what_tools_leave_does_not_keep_an_export_from_being_replaced(tmp_path):
    model = nn.Sequential(nn.Conv2D(3, 2, 1))
    for _ in range(2):
        export_model(model, tmp_path / "net", input_shape=[1, 3, 16, 16])
        assert not (tmp_path / "net" / ".DS_Store").exists()
        (tmp_path / "net" / ".DS_Store").touch()


def test_a_library_that_leaves_an_empty_file_on_a_disk_with_little_room(small_disk, tmp_path):
    """It wrote its file at once: nothing of it is there, and the room is as it was."""
    for folder, expected in ((small_disk(400), StorageError), (tmp_path, json.JSONDecodeError)):
        with pytest.raises(expected), name_storage_errors(folder / "net", folder):
            json.loads("")
        assert list(folder.glob(".*")) == []


@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_a_disk_that_fills_during_export(small_disk, tmp_path, format):
    """At every step: the graph, its weights, the second graph, the description."""
    model = Net()
    whole = export_model(model, tmp_path / "whole", input_shape=SHAPE, format=format)
    size = used(whole) // 1024
    refused = 0
    # Two graphs with their weights are written before the deployed one is left.
    sizes = (8, 24, size // 2, size - 4, size + 16, 2 * size - 8, 4 * size)
    sizes = sizes if format == "paddle" else (size // 2, size + 16)
    for kib in sizes:
        disk, message = small_disk(kib), ""
        try:
            export_model(model, disk / "net", input_shape=SHAPE, format=format)
        except StorageError as error:
            refused, message = refused + 1, str(error)
        if message:
            assert "disk is full" in message
            assert str(disk / "net") in message
            assert list(disk.iterdir()) == []
        else:
            assert content_of(disk / "net").keys() == content_of(whole).keys()
            read_manifest(disk / "net")
    assert refused == (6 if format == "paddle" else 2)


@pytest.mark.openvino
@pytest.mark.skipif(not has_openvino(), reason="Paddle has no OpenVINO")
def test_a_disk_that_fills_while_openvinos_graph_is_written(small_disk, tmp_path, monkeypatch):
    """A full disk is no reason to go on without OpenVINO."""
    disk = small_disk(64 * 1024)
    write = openvino.write_openvino_programs

    def fill_and_write(*arguments, **how):
        with contextlib.suppress(OSError), (disk / "others.bin").open("wb") as file:
            while True:
                file.write(bytes(4096))
        return write(*arguments, **how)

    monkeypatch.setattr("ppvision.deploy.write.export.write_openvino_programs", fill_and_write)
    how = {"input_shape": [1, 3, 32, 32], "task": "classification"}
    with raises_naming(StorageError, "disk", "full"):
        export_model(create_model("pale_nano", num_classes=3), disk / "net", **how)
    assert [p.name for p in disk.iterdir()] == ["others.bin"]


def test_a_disk_that_fills_keeps_the_earlier_export(small_disk, tmp_path):
    small = export_model(nn.Conv2D(3, 2, 1), tmp_path / "small", input_shape=SHAPE)
    disk = small_disk(used(small) // 1024 + 200)
    folder = export_model(nn.Conv2D(3, 2, 1), disk / "net", input_shape=SHAPE)
    before = content_of(folder)
    with raises_naming(StorageError, "disk", "full"):
        export_model(Net(), folder, input_shape=SHAPE)
    assert content_of(folder) == before
    assert [p.name for p in disk.iterdir()] == ["net"]


@pytest.mark.parametrize("limit", [1000, 20_000, 300_000])
def test_a_limit_on_the_size_of_files(tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageError, match="ulimit"):
            export_model(Net(), tmp_path / "net", input_shape=SHAPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/net", "n" * 300, "/proc/net-of-nobody"])
def test_a_place_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").write_text("")
    with raises_naming(StorageError, "save_dir:", "folder", "written", "Name") as caught:
        export_model(Net(), tmp_path / name, input_shape=SHAPE)
    assert re.search(r"^save_dir: .*\(.+\)", str(caught.value))


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_has_the_name_of_the_work_folder_is_not_touched(tmp_path, kind):
    """What killed processes left there is removed; through a link that was anybody's."""
    others = tmp_path / "others"
    if kind != "dangling link":
        others.mkdir()
        (others / "kept").write_text("x")
    work = tmp_path / ".net.ppvision-partial"
    work.write_text("x") if kind == "file" else work.symlink_to(others)
    once = tiny_once_qat(activations=False)
    for write in (
        lambda: export_model(nn.Conv2D(3, 2, 1), tmp_path / "net", input_shape=SHAPE),
        lambda: save_layered(once, tmp_path / "net", bits=once.widths, config={}),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FolderInUseError, match=r"net\.ppvision-partial"):
            write()
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["deploy.yaml", "manifest.json"])
def test_folders_that_are_called_like_our_files_are_not_replaced(tmp_path, name):
    (tmp_path / "net" / name).mkdir(parents=True)
    (tmp_path / "net" / name / "kept").write_text("x")
    once = tiny_once_qat(activations=False)
    with pytest.raises(FolderInUseError):
        export_model(nn.Conv2D(3, 2, 1), tmp_path / "net", input_shape=SHAPE)
    with pytest.raises(FolderInUseError):
        save_layered(once, tmp_path / "net", bits=once.widths, config={})
    assert (tmp_path / "net" / name / "kept").read_text() == "x"


def test_a_disk_is_mounted_on_the_folder(small_disk):
    """As `docker run -v volume:/output` does; it was said after the export, without a remedy."""
    disk = small_disk(1024)
    with pytest.raises(StorageError, match="inside"):
        export_model(nn.Conv2D(3, 2, 1), disk, input_shape=SHAPE)
    assert list(disk.iterdir()) == []
    export_model(nn.Conv2D(3, 2, 1), disk / "net", input_shape=SHAPE)


def test_links_that_lead_to_each_other(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with raises_naming(StorageError, "folder:", "written"):
        export_model(nn.Conv2D(3, 2, 1), tmp_path / "a", input_shape=SHAPE)
    for read in (Predictor, load_layered, lambda path: load_weights(nn.Conv2D(3, 2, 1), path)):
        with raises_naming(StorageError, "Check", "path"):
            read(tmp_path / "a")


def test_names_that_are_not_utf8(tmp_path):
    """Paddle opens no such path."""
    name = os.fsdecode(b"a\xff")
    with pytest.raises(InputError, match="UTF-8"):
        export_model(nn.Conv2D(3, 2, 1), tmp_path / name, input_shape=SHAPE)
    folder = export_model(nn.Conv2D(3, 2, 1), tmp_path / "a\nb", input_shape=SHAPE)
    assert Predictor(folder).run(np.zeros(SHAPE, np.float32))[0].shape == (1, 48, 48)
    folder.rename(tmp_path / name)
    with pytest.raises(InputError, match="UTF-8"):
        Predictor(tmp_path / name)


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened inside: what a missing right does, also to root."""
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for handle in taken:
            os.close(handle)


def test_files_that_cannot_be_opened(tmp_path):
    layer, once = nn.Conv2D(3, 2, 1), tiny_once_qat(activations=False)
    folder = export_model(layer, tmp_path / "net", input_shape=SHAPE)
    layered = save_layered(once, tmp_path / "m", bits=once.widths, config={})
    save_weights({k: v.numpy() for k, v in layer.state_dict().items()}, tmp_path / "w.safetensors")
    paddle.save(layer.state_dict(), str(tmp_path / "w.pdparams"))
    (tmp_path / "w.pth").write_bytes(b"x")
    new = tmp_path / "new"
    calls = {
        "deploy.yaml": lambda: Predictor(folder),
        "manifest.json": lambda: load_layered(layered),
        "m/manifest.json": lambda: describe_layered(layered),
        "w.safetensors": lambda: load_weights(layer, tmp_path / "w.safetensors"),
        "w.pdparams": lambda: load_weights(layer, tmp_path / "w.pdparams"),
        "w.pth": lambda: create_model("pale_nano", pretrained=tmp_path / "w.pth"),
        "new": lambda: save_layered(once, new, bits=once.widths, config={}),
    }
    for name, call in calls.items():
        with no_more_files(), pytest.raises(StorageError) as caught:
            call()
        assert name in str(caught.value)
        assert "Too many open files" in str(caught.value)
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize("variable", ["PPVISION_CACHE", "TMPDIR"])
def test_folders_of_our_own_that_cannot_be_made(tmp_path, monkeypatch, variable):
    from tests.helpers.small_layered import tiny_net

    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "x")
    once = tiny_once_qat(activations=False)
    layered = save_layered(once, tmp_path / "m", bits=once.widths, config={})
    shape = [None, 2, 9, 9]
    folder = export_model(tiny_net(), tmp_path / "net", input_shape=shape, task="classification")
    calls = {
        "PPVISION_CACHE": (
            lambda: Predictor("segformer_pale_nano.digit_scenes"),
            lambda: load_layered("http://127.0.0.1:9/x"),
        ),
        "TMPDIR": (lambda: Predictor(folder, layered=layered),),
    }
    monkeypatch.setenv(variable, place)
    monkeypatch.setattr("tempfile.tempdir", place if variable == "TMPDIR" else None)
    for call in calls[variable]:
        with pytest.raises(StorageError, match=f"^{variable}:"):
            call()


def test_a_full_temporary_folder(small_disk, tmp_path, monkeypatch):
    """A width of a layered model is composed there."""
    from tests.helpers.small_layered import tiny_net

    once = tiny_once_qat(activations=False)
    layered = save_layered(once, tmp_path / "m", bits=once.widths, config={})
    shape = [None, 2, 9, 9]
    folder = export_model(tiny_net(), tmp_path / "net", input_shape=shape, task="classification")
    disk = small_disk(4)
    (disk / "full").write_bytes(bytes(1))
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with pytest.raises(OSError, match=r"space|full"):
        Predictor(folder, layered=layered)
    assert describe_layered(layered).bits == once.widths


# -- a converter that ends its process -------------------------------------------------------------


class PooledToFour(nn.Layer):
    """PP-LiteSeg and PSPNet pool like this; paddle2onnx aborts where the input's size is free."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 3, padding=1)

    def forward(self, x):
        pooled = nn.functional.adaptive_avg_pool2d(self.conv(x), 4)
        return nn.functional.interpolate(pooled, paddle.shape(x)[2:], mode="bilinear")


def test_onnx_of_any_size_names_operator_and_remedy(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    model = PooledToFour()
    with raises_naming(EngineError, "pool2d", "--input_shape"):
        export_model(model, tmp_path / "net", input_shape=[1, 3, None, None], format="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["tmp"]
    assert list(temporary.iterdir()) == []
    folder = export_model(model, tmp_path / "net", input_shape=SHAPE, format="onnx")
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    (classes,) = Predictor(folder).run(x)
    with paddle.no_grad():
        expected = model(paddle.to_tensor(x)).numpy().argmax(axis=1)
    assert (classes == expected).mean() > 0.999


def test_a_converter_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ppvision.deploy.write.onnx._CHILD",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    )
    with pytest.raises(EngineError, match="memory"):
        export_model(Net(), tmp_path / "net", input_shape=SHAPE, format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_converter_that_sends_half(tmp_path, monkeypatch):
    child = "import os, sys; os.write(int(sys.argv[2]), bytes([100] + [0] * 7) + b'half')"
    monkeypatch.setattr("ppvision.deploy.write.onnx._CHILD", child)
    with pytest.raises(EngineError, match="paddle2onnx"):
        export_model(Net(), tmp_path / "net", input_shape=SHAPE, format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_converter(tmp_path, monkeypatch):
    """No orphan goes on, whoever was interrupted."""
    child = "import sys, time; print('x' * 9, flush=True); time.sleep(300)"
    monkeypatch.setattr("ppvision.deploy.write.onnx._CHILD", child)
    started = []
    popen = subprocess.Popen

    def start_and_interrupt(*arguments, **how):
        started.append(popen(*arguments, **how))
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        return started[-1]

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    monkeypatch.setattr("ppvision.deploy.write.onnx.subprocess.Popen", start_and_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            export_model(Net(), tmp_path / "net", input_shape=SHAPE, format="onnx")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [process.poll() for process in started] == [-signal.SIGKILL]
    assert list(tmp_path.iterdir()) == []


def test_without_the_converter(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "paddle2onnx", None)
    with raises_naming(ImportError, "pip", "install", "paddle2onnx"):
        export_model(Net(), tmp_path / "net", input_shape=SHAPE, format="onnx")
    assert list(tmp_path.iterdir()) == []
