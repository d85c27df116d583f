"""The command line: it maps verbs to functions, nothing else.

Each verb is a module in this package: `add` adds its options, `run` runs it. `options` has the
options of several verbs; `opening` opens devices and jobs.
"""

import argparse
import io
import os
import signal
import sys
import traceback
import warnings

from ppvision import __version__
from ppvision.cli import (
    bench,
    check,
    configs,
    dashboard,
    data,
    doctor,
    evaluate,
    export,
    list_zoo,
    pack,
    predict,
    train,
)
from ppvision.cli.options import Parser
from ppvision.console import Console, drop_stream, log, tell, tell_last
from ppvision.data.limits import MAX_PIXELS, read_max_pixels
from ppvision.errors import EngineError, LibraryError, PpvisionError, shorten_text

# In the order of the help.
VERBS = (doctor, list_zoo, configs, data, check, train, evaluate, predict, export, pack, bench)
VERBS += (dashboard,)
# Packages that a verb imports when it starts: without one of them the installation is incomplete.
PACKAGES = ("paddle", "cv2", "numpy", "yaml", "tqdm", "safetensors", "paddleseg", "ppdet")


def run(argv: list[str]) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure, 2 for wrong usage."""
    _prepare_streams()
    # Paddle's BatchNorm logs this in every training run; users can do nothing about it.
    warnings.filterwarnings("ignore", message="When training, we now always track global mean")
    args = build_parser().parse_args(argv)
    with Console(args.name_of_verb, verbose=args.verbose) as console:
        return _run_verb(args, console)


def _run_verb(args: argparse.Namespace, console: Console) -> int:
    limit = getattr(args, "max_pixels", None)
    before = os.environ.get(MAX_PIXELS)
    try:
        if limit is not None:
            os.environ[MAX_PIXELS] = str(limit)  # processes that read data find it there as well
        read_max_pixels()  # reports a wrong value of the variable once, not for each image
        return args.verb(args) or 0
    except BrokenPipeError:
        # The reader of our output has ended (`ppvision list | head -1`). Python would report this a
        # second time when it flushes the stream at its end.
        drop_stream(console.out)
        return 128 + signal.SIGPIPE
    except PpvisionError as error:
        # The messages of a library may help, and a run that has begun has a log.
        if isinstance(error, LibraryError | EngineError) or not console.is_temporary:
            console.tell_tail()
        return _show_failure(error, str(error))
    except OSError as error:
        if error.errno is None:
            return _show_fault(error, console)
        return _show_failure(error, str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            return _show_fault(error, console)
        text = f"{package}: expected this package, which is not installed here. `ppvision doctor` "
        return _show_failure(error, f"{text}says what is missing and what to type.")
    except Exception as error:
        return _show_fault(error, console)
    except KeyboardInterrupt:
        log("ppvision: stopped")
        tell_last("ppvision: stopped")
        return 130
    finally:
        if limit is not None:
            os.environ.pop(MAX_PIXELS)
            if before is not None:
                os.environ[MAX_PIXELS] = before


def _prepare_streams() -> None:
    """Make every text printable, and replace streams that are closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Started with the stream closed (`>&-`): libraries write to it all the same, and the
            # next file to be opened would get its descriptor.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal cannot show, such as one that is not UTF-8, must not end the
            # command.
            stream.reconfigure(errors="backslashreplace")


_MAX_MESSAGE = 20_000  # characters; a report of a data set has a few thousand


def _show_failure(error: Exception, text: str) -> int:
    """Show an error that a user can correct as one message; PPVISION_TRACEBACK=1 also shows the
    traceback."""
    if os.environ.get("PPVISION_TRACEBACK"):
        _show_traceback(error)
    message = f"ppvision: {shorten_text(text, _MAX_MESSAGE)}"
    log(message)
    tell_last(message)
    return 1


def _show_fault(error: Exception, console: Console) -> int:
    """Show an error that no user can correct: the end of the log, the traceback and advice."""
    console.tell_tail()
    _show_traceback(error)
    message = (
        f"ppvision: {type(error).__name__}: this is a fault of ppvision, of a library below it, or "
        "of a module that the config imports, not of your input. Please report it with the "
        "traceback above, the command, the config and the output of `ppvision doctor`."
    )
    log(message)
    tell_last(message)
    return 1


def _show_traceback(error: Exception) -> None:
    text = "".join(traceback.format_exception(error)).rstrip()
    log(text)
    tell(text)


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    parser = Parser(
        prog="ppvision",
        description="Pale Transformer, Semantic Diffusion Network and layered quantization for\n"
        "PaddlePaddle. `ppvision VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"ppvision {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return parser
