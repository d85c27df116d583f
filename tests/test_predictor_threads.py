"""One Predictor in a server: several threads, other widths meanwhile, its end, forked processes."""

import copy
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable

import cv2
import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.engines import has_openvino
from ppvision.errors import EngineError, InputTypeError
from ppvision.models.pale_transformer import PaleTransformer
from ppvision.quant import save_layered
from tests.helpers.small_layered import tiny_net, tiny_once_qat
from tests.helpers.small_pale import SMALL_PALE

NORMALIZE = {"type": "Normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
RESIZE = {"type": "Resize", "target_size": [40, 32]}
ENGINES = [
    "native",
    "onednn",
    "onnx",
    pytest.param(
        "openvino", marks=pytest.mark.skipif(not has_openvino(), reason="Paddle has no OpenVINO")
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By engine; pictures are resized before the network, and classes back after it."""
    root = tmp_path_factory.mktemp("threads")
    paddle.seed(11)
    net = nn.Sequential(nn.Conv2D(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2D(8, 5, 5, padding=2))
    how = {"input_shape": [None, 3, None, None], "transforms": [RESIZE, NORMALIZE]}
    paddle_folder = export_model(net, root / "net", output_op="none", **how)
    found = {"native": paddle_folder, "onednn": paddle_folder}
    found["onnx"] = export_model(net, root / "onnx", output_op="none", format="onnx", **how)
    if has_openvino():
        found["openvino"] = export_model(
            PaleTransformer(SMALL_PALE, num_classes=5),
            root / "pale",
            input_shape=[1, 3, 32, 40],
            output_op="none",
            task="classification",
            transforms=[RESIZE, NORMALIZE],
        )
    return found


def opened(folders, engine: str) -> Predictor:
    use_onednn = {"native": False, "onednn": True}.get(engine)
    predictor = Predictor(folders[engine], threads=1, use_onednn=use_onednn)
    assert predictor.engine == (None if engine == "onnx" else engine)
    return predictor


def pictures(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    coarse = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    sizes = random.integers(30, 60, (count, 2))
    return [cv2.resize(c, (int(w), int(h))) for c, (h, w) in zip(coarse, sizes, strict=True)]


def values(prediction) -> np.ndarray:
    return getattr(prediction, "probabilities", prediction)


def run_threads(count: int, work: Callable[[int], None]) -> list[BaseException]:
    """`work(number)` in `count` threads that begin at once; what they raised."""
    barrier, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("calls", [25, pytest.param(1000, marks=pytest.mark.all)])
def test_every_thread_gets_its_own_answers(folders, engine, calls):
    images = pictures(24)
    with opened(folders, engine) as predictor:
        alone = [values(predictor(image)) for image in images]
        assert len({a.tobytes() for a in alone}) == len(alone)
        wrong = []

        def predict(number: int) -> None:
            for call in range(calls):
                place = (number * 7 + call) % len(images)
                if not np.array_equal(values(predictor(images[place])), alone[place]):
                    wrong.append(place)

        assert run_threads(8, predict) == []
        assert wrong == []


def test_first_runs_of_several_predictors_at_once(folders):
    """They change a flag that all of Paddle shares, and put it back."""
    flag = "FLAGS_eager_delete_tensor_gb"
    before = paddle.get_flags([flag])
    made = [opened(folders, "native") for _ in range(6)]
    assert run_threads(6, lambda number: made[number](pictures(1)[0])) == []
    assert paddle.get_flags([flag]) == before


def test_small_pictures_open_one_engine_more_and_only_one(tmp_path):
    """Below 33 pixels, oneDNN is left out where maps are enlarged."""

    class Enlarging(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2D(3, 4, 3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return nn.functional.interpolate(y, paddle.shape(x)[2:], mode="bilinear")

    folder = export_model(Enlarging(), tmp_path / "net", input_shape=[None, 3, None, None])
    with Predictor(folder, threads=1) as predictor:
        assert predictor.onednn
        open_runtime, count = predictor._open_runtime, []
        predictor._open_runtime = lambda *a: (count.append(a), time.sleep(0.05), open_runtime(*a))[
            2
        ]
        image = np.zeros((16, 20, 3), np.uint8)
        assert run_threads(4, lambda _: predictor(image)) == []
        assert len(count) == 1


@pytest.fixture(scope="module")
def with_widths(tmp_path_factory):
    root = tmp_path_factory.mktemp("widths")
    once = tiny_once_qat(activations=False)
    layered = save_layered(once, root / "layered", bits=once.widths, config={})
    folder = export_model(
        tiny_net(),
        root / "net",
        input_shape=[None, 2, 9, 9],
        task="classification",
        output_op="none",
    )
    return folder, layered


def test_another_width_while_others_predict(with_widths):
    folder, layered = with_widths
    x = np.random.default_rng(0).normal(size=(2, 2, 9, 9)).astype(np.float32)
    answers = {}
    for bits in (8, 2):
        with Predictor(folder, layered=layered, bits=bits, threads=1) as predictor:
            answers[bits] = predictor.run(x)[0]
    assert np.abs(answers[8] - answers[2]).max() > 0.01
    seen, stop = set(), threading.Event()
    with Predictor(folder, layered=layered, bits=8, threads=1) as predictor:

        def work(number: int) -> None:
            if number == 0:
                try:
                    for bits in (2, 8) * 4:
                        predictor.set_bits(bits)
                        assert predictor.bits == bits
                finally:
                    stop.set()
            while not stop.is_set():
                (out,) = predictor.run(x)
                seen.add(next(b for b, a in answers.items() if np.allclose(out, a, atol=1e-5)))

        assert run_threads(4, work) == []
    assert seen == {8, 2}


@pytest.mark.parametrize("engine", ENGINES)
def test_close(folders, engine):
    image = pictures(1)[0]
    predictor = opened(folders, engine)
    with predictor as same:
        assert same is predictor
        predictor(image)
    predictor.close()
    for use in (
        lambda: predictor(image),
        lambda: predictor([image]),
        lambda: predictor.run(np.zeros((1, 3, 32, 40), np.float32)),
        lambda: predictor.bits,
        lambda: predictor.engine,
        predictor.__enter__,
    ):
        with pytest.raises(EngineError, match="closed"):
            use()
    assert predictor.manifest.name


def test_widths_of_a_closed_predictor(with_widths):
    folder, layered = with_widths
    predictor = Predictor(folder, layered=layered)
    predictor.close()
    with pytest.raises(EngineError, match="closed"):
        predictor.set_bits(4)


@pytest.mark.parametrize("engine", ENGINES)
def test_close_while_others_predict(folders, engine):
    """A call that has begun ends with its answer, a later one says that it is closed."""
    images = pictures(6)
    predictor = opened(folders, engine)
    alone = [values(predictor(image)) for image in images]

    def work(number: int) -> None:
        if number == 0:
            time.sleep(0.1)
            predictor.close()
            return
        while True:
            found = predictor(images)
            for a, b in zip(found, alone, strict=True):
                assert np.array_equal(values(a), b)

    errors = run_threads(4, work)
    assert len(errors) == 3
    assert all(isinstance(error, EngineError) and "closed" in str(error) for error in errors)


def test_it_is_not_copied(folders):
    with opened(folders, "native") as predictor:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(InputTypeError, match="folder"):
                attempt(predictor)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a fork that runs `work`; SIGALRM after a while."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_fork(folders, engine):
    """An error in place of a hang, even while another thread holds the engine; the child may open
    its own."""
    image = pictures(1)[0]
    predictor = opened(folders, engine)
    alone = values(predictor(image))

    def use() -> None:
        with pytest.raises(EngineError, match="fork"):
            predictor(image)
        predictor.close()

    def open_another() -> None:
        with opened(folders, engine) as own:
            assert np.array_equal(values(own(image)), alone)

    lock = getattr(predictor._opened.runtime, "_lock", threading.Lock())
    with lock, predictor._changing:
        assert in_child(use) == 0
    assert in_child(open_another) == 0
    assert np.array_equal(values(predictor(image)), alone)
    predictor.close()
