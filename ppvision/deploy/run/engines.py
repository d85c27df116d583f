"""Engines that run an exported graph, with one `run` for all: Paddle Inference (OpenVINO, oneDNN or
Paddle's own kernels) and ONNX Runtime."""

import ctypes
import json
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import paddle
from paddle import inference

from ppvision.arguments import check_choice
from ppvision.deploy.run.manifest import FILES, ModelFiles
from ppvision.errors import EngineError, InputError, MissingPackageError, PpvisionError

# Engines of Paddle Inference, from the fastest on a CPU: OpenVINO's plugin for the whole graph,
# oneDNN's kernels for its operators, Paddle's own kernels (the only ones on a GPU).
Engine = Literal["openvino", "onednn", "native"]

# Passes of the oneDNN pipeline that are wrong in Paddle 3 or cost time; the other passes stay.
ONEDNN_PASSES_OFF = (
    # Fails on the reshapes of attention ("type of outputs must be equal").
    "operator_reshape_onednn_fuse_pass",
    # Turns Linear into an operator without a oneDNN kernel. This takes 1.5 times as long, unless
    # MKL uses AVX-512 (`benchmark/pointwise_layers.py`).
    "matmul_add_act_fuse_pass",
    # Fold transpositions into products before `self_attention_fuse_pass` looks for both; in the
    # current form they find nothing (`benchmark/deploy_steps.py`).
    "reshape_transpose_matmul_fuse_pass",
    "matmul_transpose_reshape_fuse_pass",
)

# The largest side of an image of which a backbone of stride 32 leaves one pixel. If a graph
# enlarges such a map, oneDNN's kernels in Paddle 3.2 write beyond their memory.
ONE_PIXEL = 32

Batch = np.ndarray | Mapping[str, np.ndarray]

# Paddle gives every tensor that a run no longer needs to another thread, one by one. This takes a
# tenth of the time of a graph with many small operators. Below this many GB, tensors are collected
# first.
_GARBAGE_FLAG, _GARBAGE_GB = "FLAGS_eager_delete_tensor_gb", 0.008

# Memory that the GPU pool reserves at the start, in MB; it grows when needed.
_GPU_POOL_MB = 256


# -- processes -------------------------------------------------------------------------------------

# The first run of a predictor changes a flag of Paddle that all predictors share.
_first_run = threading.Lock()

# The open runtimes, and in a forked child those that were open in the parent.
_open_runtimes: weakref.WeakSet["PaddleRuntime | OnnxRuntime"] = weakref.WeakSet()


def _leave_engines_to_parent() -> None:
    """In a forked child, the parent's engines have lost their threads. Running or freeing them
    would crash or wait for these threads forever, so they are kept until the process ends."""
    global _first_run
    _first_run = threading.Lock()  # another thread of the parent may have held the lock
    for runtime in list(_open_runtimes):
        runtime.is_open_here = False
        for engine in runtime.engine_objects():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


os.register_at_fork(after_in_child=_leave_engines_to_parent)


def _check_here(runtime: "PaddleRuntime | OnnxRuntime") -> None:
    if not runtime.is_open_here:
        raise EngineError(
            f"This engine was opened before process {os.getpid()} was forked, which has none of "
            "its threads. Make the Predictor in the process that uses it, after the fork "
            "(gunicorn: without --preload, or in post_fork)."
        )


class PaddleRuntime:
    """Paddle Inference on an export's files.

    Args:
        program: the graph: `model.json`, for OpenVINO `model.pdmodel`.
        weights: its parameters, `model.pdiparams`.
        threads: CPU threads of the kernels. None: Paddle's default.
        device: "cpu" or "gpu" (the first one).
        engine: "openvino" and "onednn" are for a CPU. Paddle 3.2 keeps the memory of OpenVINO until
            the process ends, even after the runtime is deleted. oneDNN keeps the last 1024 compiled
            kernels; the environment variable ONEDNN_PRIMITIVE_CACHE_CAPACITY changes this number.
            With images of always new sizes, memory rises until this number is reached.
        bfloat16: whether OpenVINO computes in bfloat16.

    Several threads may use one runtime; their runs follow each other. (A run sets the inputs, runs
    and reads the outputs of one engine. Paddle's `clone` does not make a second engine in
    OpenVINO.)
    """

    def __init__(
        self,
        program: Path,
        weights: Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        engine: Engine = "native",
        bfloat16: bool = False,
    ) -> None:
        has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
        _check_device(device, has_gpu, "paddlepaddle")
        with ExitStack() as stack:
            cache = None
            if engine == "openvino":
                cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppvision-")))
                program, weights = _named_alike(program, weights, cache)
            config = inference.Config(str(program), str(weights))
            config.disable_glog_info()
            if device == "gpu":
                config.enable_use_gpu(_GPU_POOL_MB, 0)
            else:
                config.disable_gpu()
            if threads is not None:
                config.set_cpu_math_library_num_threads(threads)
            if engine == "onednn":
                config.enable_onednn()
                for name in ONEDNN_PASSES_OFF:
                    config.delete_pass(name)
            else:
                config.disable_onednn()
            if engine == "openvino":
                # OpenVINO writes compiled kernels and weights to the working directory, or to this
                # folder.
                config.set_optim_cache_dir(str(cache))
                kinds = inference.PrecisionType
                config.enable_openvino_engine(kinds.Bfloat16 if bfloat16 else kinds.Float32)
            self._predictor = inference.create_predictor(config)
        self._lock = threading.Lock()
        self._has_run = False
        self.is_open_here = True
        _open_runtimes.add(self)
        self._inputs = {
            name: self._predictor.get_input_handle(name)
            for name in self._predictor.get_input_names()
        }
        self._outputs = [
            self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()
        ]

    def engine_objects(self) -> list[object]:
        """Return the objects that own the engine's threads and memory."""
        return [self._predictor, *self._inputs.values(), *self._outputs]

    def run(self, batch: Batch) -> list[np.ndarray]:
        """Run a float32 batch `[B, C, H, W]`, or a detector's inputs by name (unused inputs are
        ignored). Return the outputs in the graph's order.

        Raises:
            EngineError: the process was forked since the runtime was opened.
        """
        _check_here(self)  # before the lock, because a thread of the parent may have held it
        with self._lock:
            for name, handle in self._inputs.items():
                array = batch if isinstance(batch, np.ndarray) else batch[name]
                handle.reshape(array.shape)
                handle.copy_from_cpu(np.ascontiguousarray(array))
            if self._has_run:
                self._predictor.run()
            else:
                with _first_run, _fewer_deletions():
                    self._predictor.run()
                _give_memory_back()
                self._has_run = True
            return [output.copy_to_cpu() for output in self._outputs]


class OnnxRuntime:
    """ONNX Runtime on a `model.onnx`.

    Args:
        model: the file.
        threads, device: see `PaddleRuntime`.
        integers: whether products of a graph in integers run in integers (default). Otherwise the
            same codes are computed in float.

    Several threads may use one runtime, at the same time.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        integers: bool = True,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingPackageError(
                "An ONNX export runs in ONNX Runtime, which is not installed: "
                "pip install onnxruntime"
            ) from error
        has_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        _check_device(device, has_gpu, "onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: paddle2onnx leaves unused constants
        if threads is not None:
            options.intra_op_num_threads = threads
        if not integers:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = ["CUDAExecutionProvider"] if device == "gpu" else ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(model), options, providers=providers)
        nodes = self._session.get_inputs()
        self._inputs = [node.name for node in nodes]
        # By name; None for a free size, for which ONNX Runtime has a name.
        self.input_shapes = {
            node.name: [n if isinstance(n, int) else None for n in node.shape] for node in nodes
        }
        self.is_open_here = True
        _open_runtimes.add(self)

    def engine_objects(self) -> list[object]:
        """See `PaddleRuntime.engine_objects`."""
        return [self._session]

    def run(self, batch: Batch) -> list[np.ndarray]:
        """See `PaddleRuntime.run`."""
        _check_here(self)
        single = isinstance(batch, np.ndarray)
        return self._session.run(None, {n: batch if single else batch[n] for n in self._inputs})


def _named_alike(program: Path, weights: Path, work: Path) -> tuple[Path, Path]:
    """Return the two files for OpenVINO, which finds the weights by the name of the graph. If the
    names differ, they are links in `work`."""
    if program.stem == weights.stem:
        return program, weights
    links = work / f"model{program.suffix}", work / f"model{weights.suffix}"
    for link, path in zip(links, (program, weights), strict=True):
        link.symlink_to(path.resolve())
    return links


def open_runtime(
    folder: Path,
    format: str,
    *,
    files: ModelFiles | None = None,
    threads: int | None = None,
    device: str = "cpu",
    engine: Engine = "native",
    bfloat16: bool = False,
    integers: bool = True,
) -> PaddleRuntime | OnnxRuntime:
    """Open the runtime for an export's model files. `engine` and `bfloat16` apply to format
    "paddle", `integers` to "onnx". By default, `files` are those that an export of the format
    writes."""
    if files is None:
        files = FILES[format]
        files = replace(files, own_for_openvino=(folder / files.raw_program).is_file())
    if format == "onnx":
        return OnnxRuntime(
            folder / files.program, threads=threads, device=device, integers=integers
        )
    program = files.openvino_program if engine == "openvino" else files.program
    return PaddleRuntime(
        folder / program,
        folder / files.weights_beside,
        threads=threads,
        device=device,
        engine=engine,
        bfloat16=bfloat16,
    )


def has_openvino() -> bool:
    """Whether the installed Paddle contains OpenVINO's plugin for CPUs."""
    libraries = Path(paddle.__file__).parent / "libs"
    return any(libraries.glob("*openvino_intel_cpu_plugin*"))


def enlarges(program: Path) -> bool:
    """Whether an exported graph for Paddle Inference resizes feature maps."""
    return "_interp" in program.read_text(encoding="utf-8")


def read_declared_inputs(program: Path) -> dict[str, list[int | None]]:
    """Return names and shapes of the inputs of a graph for Paddle Inference; None for a free size.

    Raises:
        InputError: the file is not such a graph.
    """
    found = {}
    try:
        blocks = json.loads(program.read_bytes())["program"]["regions"][0]["blocks"]
        for op in blocks[0]["ops"]:
            if op["#"].endswith(".data"):
                attributes = {entry["N"]: entry["AT"]["D"] for entry in op["A"]}
                sizes = [None if n < 0 else n for n in attributes["shape"]]
                found[attributes["name"]] = sizes
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{program}: expected a graph that paddle.jit.save wrote.") from error
    return found


def name_engine(format: str, engine: Engine) -> str:
    """Return the name of a format's engine for messages."""
    if format == "onnx":
        return "ONNX Runtime"
    return {
        "openvino": "Paddle Inference with OpenVINO",
        "onednn": "Paddle Inference with oneDNN",
        "native": "Paddle Inference without oneDNN",
    }[engine]


@contextmanager
def _fewer_deletions() -> Iterator[None]:
    """Set the flag for a predictor's first run, which reads it for all predictors. A value that the
    user has set stays."""
    before = paddle.get_flags([_GARBAGE_FLAG])[_GARBAGE_FLAG]
    if before != 0.0 or _GARBAGE_FLAG in os.environ:
        yield
        return
    paddle.set_flags({_GARBAGE_FLAG: _GARBAGE_GB})
    try:
        yield
    finally:
        paddle.set_flags({_GARBAGE_FLAG: before})


def _give_memory_back() -> None:
    """Give memory that loading has freed back to the system: mostly copies of the weights, which
    glibc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def fail_as(what: str) -> Iterator[None]:
    """Raise errors of a runtime, of any type, as an EngineError that begins with `what`. Our own
    errors are not changed."""
    try:
        yield
    except PpvisionError:
        raise
    except Exception as error:
        raise EngineError(f"{what} ({join_error_lines(error)}).") from error


def join_error_lines(error: Exception) -> str:
    """Return the message of a runtime's error, which can fill a page, shortened for use in another
    message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_device(device: str, has_gpu: bool, package: str) -> None:
    check_choice(device, "device", ("cpu", "gpu"))
    if device == "gpu" and not has_gpu:
        raise InputError(
            f"device: got 'gpu', but the installed {package} finds none. Install the build "
            f"of {package} for your GPU, or pass device='cpu'."
        )
