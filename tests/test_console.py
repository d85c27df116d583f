"""Where output goes: results to stdout, the log to stderr, what libraries print to a log file."""

import contextlib
import errno
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ppvision import cli, console
from ppvision.cli import list_zoo
from ppvision.console import Console, ProgressLine, show, tell, track
from ppvision.engine.trainer import TrainOptions
from tests.helpers.configs import ROOT
from tests.helpers.small_detectors import small_detector, write_detector

VERBS = ("doctor", "list", "configs", "data", "check", "train", "eval", "predict", "export", "pack")
VERBS += ("bench", "dashboard")


def help_of(verb: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.run([verb, "--help"] if verb else ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def examples() -> dict[str, list[str]]:
    """The words behind `ppvision` in the example of each verb's help."""
    (verbs,) = (a for a in cli.build_parser()._actions if hasattr(a, "choices") and a.choices)
    found = {}
    for name, verb in verbs.choices.items():
        found[name] = shlex.split(verb.epilog.removeprefix("example:\n").replace("\\\n", " "))[1:]
    return found


# -- every verb ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Texts by name of the help's examples in one folder, and of a few commands more.

    `NAME.out` and `NAME.err`; what ran in a terminal has one text.
    """
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "configs").symlink_to(ROOT / "configs")
    small = {
        "data": ["--count", "12", "--val_count", "4", "--size", "56"],
        "train": ["--iters", "4", "--save_interval", "2", "--batch_size", "4", "--seed", "1"],
        "bench": ["--repeats", "2"],
    }
    order = ("data", "check", "train", "eval", "export", "predict", "pack", "bench", "list")
    known = examples()
    commands = [[name, known[name] + small.get(name, []), 0] for name in order]
    commands += [
        ["eval-json", [*known["eval"], "--json"], 0],
        ["bench-json", [*known["bench"], "--repeats", "2", "--json"], 0],
        ["list-json", ["list", "--json"], 0],
        ["eval-verbose", [*known["eval"], "--verbose"], 0],
        ["eval-80", known["eval"], 80],
        ["eval-120", known["eval"], 120],
        ["train-80", [*known["train"], *small["train"], "--resume", "auto", "--iters", "8"], 80],
        ["broken", ["eval", "-c", known["eval"][2], "--model_path", "absent.pdparams"], 0],
    ]
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.verb_runner", str(folder)],
        input=json.dumps(commands),
        text=True,
        cwd=folder,
        env=environment,
        check=True,
        timeout=600,
    )
    # A terminal's carriage returns are kept.
    texts = {path.name: path.read_bytes().decode() for path in folder.glob("*.[oe][ur][tr]")}
    texts["left"] = sorted(path.name for path in temporary.glob("ppvision-*"))
    texts["log"] = (folder / "output" / "mine" / "log.txt").read_text()
    return texts | {"codes": json.loads((folder / "codes.json").read_text())}


# What ppvision itself writes to stderr: its log, messages, progress lines.
OURS = (
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?!\[)",
    r"ppvision: ",
    r"[\w. -]+: [\d.]+[kM]?(/[\d.]+[kM]?)? \w+ \[",
)
NOISE = r"ccache|UserWarning|Use the following config|\[INFO\]|eager_utils|WARNING: Logging"


def test_every_example_runs(outputs):
    codes = outputs["codes"]
    assert codes.pop("broken") == 1
    assert set(codes.values()) == {0}, (codes, outputs)


@pytest.mark.parametrize("verb", ["data", "check", "train", "eval", "export", "predict", "bench"])
def test_results_on_stdout_and_the_log_on_stderr(outputs, verb):
    result = {
        "data": r"data/digit_scenes: 11 classes; train 12 scenes, \d+ digits; val 4 scenes.*\n$",
        "check": r"(?s)train_dataset: 12 images\n.*56x56 \(12\)\nclass.*val_dataset: 4 images",
        "train": r"run folder output/mine; best score [\d.]+ at step \d, model \S+\n$",
        "eval": r"(?s) +Boundary .*class +IoU.*\nmIoU [\d.]+ .*\nBoundaryIoU .*\nTrimapIoU .*\n$",
        "export": r"exported model: \S+/inference/mine\n$",
        "predict": r"images and predictions.json: output/predict\n$",
        "bench": r"model +median ms.*\ninference/mine .*\npeak memory .*\n$",
    }
    assert re.match(result[verb], outputs[f"{verb}.out"])
    lines = outputs[f"{verb}.err"].splitlines()
    strange = [line for line in lines if not any(re.match(known, line) for known in OURS)]
    assert strange == []
    progress = [line for line in lines if re.match(OURS[-1], line)]
    assert progress, lines  # not a terminal: plain lines, the last of them at the end


@pytest.mark.parametrize("verb", ["list", "pack"])
def test_verbs_that_only_print(outputs, verb):
    assert outputs[f"{verb}.out"]
    assert re.search(NOISE, outputs[f"{verb}.out"] + outputs[f"{verb}.err"]) is None


def test_the_log_file_has_the_rest(outputs):
    log = outputs["log"]
    assert "Use the following config" in log
    assert "[TRAIN] iter: 4/4, loss:" in log
    assert "[EVAL] iter: 2/4, mIoU:" in log
    assert "[TRAIN] iter: 8/8" in log  # the second run went on in it
    assert "weights: starting from segformer_pale_nano.digit_scenes" in log
    assert "[TRAIN]" not in outputs["train.err"]


def test_temporary_logs_go_when_all_went_well(outputs):
    assert outputs["left"] == []


def test_verbose_shows_everything(outputs):
    assert "Use the following config" in outputs["eval-verbose.err"]
    assert outputs["eval.out"] == outputs["eval-verbose.out"]  # libraries write to stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_has_one_line_that_updates(outputs, columns):
    text = outputs[f"eval-{columns}.out"]
    assert re.search(NOISE, text) is None
    bar = [line for line in re.split(r"[\r\n]", text) if line.startswith("eval: ")]
    assert len(bar) > 1
    assert all(len(line) <= columns for line in bar)
    assert "4/4" in bar[-1]
    assert outputs["eval.out"].replace("\n", "\r\n") in text  # the result begins a line of its own
    assert "eval: " not in text[text.index("class ") :]


def test_a_training_in_a_terminal_is_one_line(outputs):
    text = outputs["train-80.out"]
    assert re.search(NOISE, text) is None
    written = [line for line in text.split("\r\n") if "train: " in line]
    assert len(written) == 1  # evaluations are shown inside of it
    assert re.search(r"eval \d/4", written[0])
    states = written[0].split("\r")
    assert all(len(state) <= 80 for state in states)
    assert re.search(r"8/8 \[.*(step/s|s/step), loss [\d.]+, mIoU [\d.]+", states[-1])


# -- JSON ------------------------------------------------------------------------------------------


def test_eval_as_json(outputs):
    (result,) = json.loads(outputs["eval-json.out"])["results"]
    assert set(result) == {"bits", "scores", "classes"}
    assert result["bits"] == 8  # the weights of the zoo
    shown = float(re.search(r"\nmIoU (\S+)", outputs["eval.out"])[1])
    assert result["scores"]["mIoU"] == pytest.approx(shown, abs=5e-5)
    assert round(result["scores"]["mIoU"], 4) != result["scores"]["mIoU"]
    assert [c["name"] for c in result["classes"]] == ["background", *map(str, range(10))]
    assert set(result["classes"][0]) > {"name", "IoU", "precision", "BoundaryIoU"}


def test_bench_as_json(outputs):
    found = json.loads(outputs["bench-json.out"])
    assert found["peak_memory_mib"] > 0
    (model,) = found["models"]
    times = {"median", "low", "high", "load_seconds", "speed_up"}
    assert set(model) == {"name", "engine", "precision", "bytes", *times}
    assert model["precision"] == "float32"
    assert model["load_seconds"] > 0
    assert model["speed_up"] == 1


def test_list_as_json(outputs):
    models = {m["name"]: m for m in json.loads(outputs["list-json.out"])["models"]}
    assert models["pale_tiny"]["parameters"] == 21748712
    assert set(models["pale_nano"]) == {"name", "parameters", "gflops", "measured", "weights"}
    assert models["pale_nano"]["weights"][0]["here"] is True
    assert "top-1 0.525" in models["pale_nano"]["weights"][0]["score"]


def test_the_table_of_the_zoo_fits_a_terminal(outputs):
    """Numbers there, whole sentences in `--json`."""
    lines = outputs["list.out"].splitlines()
    assert max(map(len, lines)) <= 80
    assert any("ppyoloe_pale_nano.blood_cells, AP50 0.914" in line for line in lines)


@pytest.mark.parametrize("verb", ["eval", "pack", "bench"])
def test_tables_fit_a_terminal(outputs, verb):
    lines = outputs[f"{verb}.out"].splitlines()
    assert lines
    assert max(map(len, lines)) <= 80


def test_scores_of_a_classifier():
    from ppvision.tasks.classification.job import Scores

    confusion = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    found = Scores(5 / 6, None, None, confusion).as_dict(["a", "b", "c"])
    json.dumps(found, allow_nan=False)
    assert found["scores"] == {"top1": 5 / 6, "top5": None, "loss": None}
    assert found["classes"] == [
        {"name": "a", "pictures": 4, "recall": 0.75, "precision": 1.0},
        {"name": "b", "pictures": 2, "recall": 1.0, "precision": 2 / 3},
        {"name": "c", "pictures": 0, "recall": None, "precision": None},
    ]


def test_scores_of_a_detector():
    from ppvision.tasks.detection.scores import Scores

    found = Scores({"bbox": {"AP": 0.5}}, {"bbox": np.array([0.5, np.nan])}).as_dict([])
    json.dumps(found, allow_nan=False)
    assert found["scores"] == {"bbox_AP": 0.5}
    assert found["classes"] == [{"name": "0", "bbox": 0.5}, {"name": "1", "bbox": None}]


# -- a look at a data set --------------------------------------------------------------------------


def test_check_counts_pictures(classification_file, capsys):
    assert cli.run(["check", "-c", str(classification_file()), "--part", "val_dataset"]) == 0
    shown = capsys.readouterr().out
    assert "val_dataset: 21 images\nwidth x height (images): 28x28 (21)\n" in shown
    assert re.search(r"digit 2 +7 +33\.33%", shown)
    assert "train_dataset" not in shown


def test_check_counts_objects(scenes, tmp_path, capsys):
    config = write_detector(tmp_path / "job.yml", small_detector(scenes, "YOLOv3"))
    assert cli.run(["check", "-c", str(config)]) == 0
    shown = capsys.readouterr().out
    truth = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    counts = Counter(item["category_id"] for item in truth["annotations"])
    assert "train_dataset: 12 images" in shown
    for category in truth["categories"]:
        assert re.search(rf"\n{category['name']} +{counts[category['id']]} ", shown)


def test_check_reports_what_is_wrong(classification_file, crops, tmp_path, capsys):
    folder = tmp_path / "val"
    shutil.copytree(crops / "val", folder)
    (folder / "digit 0" / "0.png").write_bytes(b"no picture")
    config = classification_file(lambda c: c["val_dataset"].update(root=str(folder)))
    assert cli.run(["check", "-c", str(config)]) == 1
    shown = capsys.readouterr()
    assert "0.png" in shown.err
    assert "val_dataset: " not in shown.out


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb, capsys, monkeypatch):
    text = help_of(verb, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80
    assert re.match(r"[A-Z][^.]+\.", text)  # a sentence comes first
    if verb:
        assert "\nexample:\n  ppvision " in text
        assert "--verbose" in text


def test_defaults_are_shown(capsys, monkeypatch):
    text = help_of("train", capsys, monkeypatch)
    for flag, default in (("--num_workers", 0), ("--precision", "fp32"), ("--log_iters", 10)):
        (shown,) = re.findall(rf"\n  {flag} .*?\(default:\s+(\S+)\)", text, re.DOTALL)[:1]
        assert shown == str(default)
    assert "(default: False)" not in text


def test_every_verb_has_a_help():
    assert tuple(sorted(examples())) == tuple(sorted(VERBS))
    for words in examples().values():
        cli.build_parser().parse_args(words)


@pytest.mark.parametrize("words", [["list", "--js"], ["train", "-c", "x", "--iter", "2"]])
def test_no_flag_is_abbreviated(words, capsys):
    with pytest.raises(SystemExit):
        cli.run(words)
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "known"), [("bfloat16", "bf16"), ("float16", "fp16"), ("fp32", "fp32")]
)
def test_both_spellings_of_a_precision(given, known):
    args = cli.build_parser().parse_args(["train", "-c", "x", "--precision", given])
    assert args.precision == known
    assert TrainOptions(iters=1, batch_size=1, precision=given).precision == known


# -- failures --------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Let the verb `list` print 30 lines as a library does, then raise."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(error: BaseException) -> None:
        def raise_it(args):
            for number in range(29):
                print(f"library {number}")
            os.write(2, b"C++ log line\n")
            raise error

        monkeypatch.setattr(list_zoo, "run", raise_it)

    return fail


def test_a_fault_shows_the_end_of_the_log(failing, capsys, tmp_path):
    failing(RuntimeError("x"))
    assert cli.run(["list"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (log,) = tmp_path.glob("ppvision-list-*.log")
    head, *tail = shown.err.split("Traceback")[0].splitlines()
    assert str(log) in head
    assert [line.strip() for line in tail] == [f"library {n}" for n in range(10, 29)] + [
        "C++ log line"
    ]
    assert "library 0\n" in log.read_text()
    assert "this is a fault of ppvision" in shown.err.splitlines()[-1]


def test_a_mistake_shows_one_message(failing, capsys, tmp_path):
    from ppvision.errors import InputError

    failing(InputError("x"))
    assert cli.run(["list"]) == 1
    assert capsys.readouterr().err == "ppvision: x\n"
    assert list(tmp_path.glob("ppvision-*")) == []


def test_verbose_of_a_fault_has_no_log(failing, capsys, tmp_path):
    failing(RuntimeError("x"))
    assert cli.run(["list", "--verbose"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "library 28" in shown.err
    assert "the last lines of" not in shown.err
    assert list(tmp_path.glob("ppvision-*")) == []


@pytest.mark.parametrize("verbose", [False, True])
def test_the_log_of_a_run_ends_with_the_failure(verbose, tmp_path, monkeypatch, capsys):
    from ppvision import console
    from ppvision.cli import list_zoo
    from ppvision.errors import EngineError

    def fail(args):
        console.move_log(tmp_path / "log.txt")
        raise errors.pop()

    monkeypatch.setattr(list_zoo, "run", fail)
    errors = [EngineError("loss is nan"), KeyError("boom")]
    for _ in range(2):
        assert cli.run(["list", *["--verbose"] * verbose]) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log
    assert log.index("KeyError: 'boom'") < log.index("ppvision: KeyError: this is a fault")
    assert log.rstrip().endswith("ppvision: loss is nan")
    assert "Traceback" not in log[log.index("this is a fault") :]


CRASH = """
import ctypes, os, sys
from ppvision.console import Console, show_crashes
with Console("eval"):
    show_crashes()
    os.write(2, b"what C++ says\\n")
    os.abort()
"""


def test_a_crash_shows_where_and_leaves_the_log(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CRASH],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode < 0
    assert "Fatal Python error: Aborted" in done.stderr
    assert "what C++ says" not in done.stderr
    (log,) = tmp_path.glob("ppvision-eval-*.log")
    assert log.read_text() == "what C++ says\n"


def test_a_broken_installation_can_ask_for_help():
    """`doctor` runs where packages are missing: the command line imports none of them by itself."""
    code = "import sys, ppvision.cli; print(sorted({'tqdm', 'numpy', 'paddle'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


# -- the console -----------------------------------------------------------------------------------


def where_descriptors_lead() -> list[tuple[int, int]]:
    return [(os.fstat(n).st_dev, os.fstat(n).st_ino) for n in (1, 2)]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_everything_is_as_before_afterwards(error):
    logger = logging.getLogger("ppvision")
    before = where_descriptors_lead(), sys.stdout, sys.stderr, logger.handlers, logger.level
    how = logger.propagate, warnings.showwarning
    open_files = len(os.listdir("/proc/self/fd"))
    with contextlib.suppress(ValueError, KeyboardInterrupt, SystemExit), Console("list") as used:
        assert where_descriptors_lead() != before[0]
        if error is not None:
            raise error
    assert before == (
        where_descriptors_lead(),
        *(sys.stdout, sys.stderr, logger.handlers, logger.level),
    )
    assert how == (logger.propagate, warnings.showwarning)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert not used.log_path.exists()


def test_a_librarys_handler_outlives_the_console():
    with Console("list"):
        handler = logging.StreamHandler()
    logging.Logger("library").addHandler(handler)
    handler.emit(logging.LogRecord("library", logging.INFO, "", 0, "late", None, None))


def test_what_is_shown_and_told(capsys):
    with Console("list"):
        show("a result")
        tell("a message")
        print("of a library")
        logging.getLogger("ppvision").info("of ours")
        logging.getLogger("ppvision").info("a number", extra=console.FILE_ONLY)
    shown = capsys.readouterr()
    assert shown.out == "a result\n"
    first, second = shown.err.splitlines()
    assert first == "a message"
    assert re.fullmatch(r"\S+ \S+ of ours", second)


def test_our_warnings_are_shown_and_others_are_not(capsys):
    with Console("list"), warnings.catch_warnings():
        warnings.simplefilter("always")
        ours = str(Path(console.__file__))
        warnings.showwarning(UserWarning("runs without oneDNN"), UserWarning, ours, 1)
        warnings.showwarning(UserWarning("no ccache"), UserWarning, "/paddle/x.py", 1)
        warnings.showwarning(DeprecationWarning("old"), DeprecationWarning, ours, 1)
    shown = capsys.readouterr().err
    assert "runs without oneDNN" in shown
    assert "ccache" not in shown
    assert "old" not in shown


def test_no_place_for_a_log_file(monkeypatch, capsys):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with Console("list") as used:
        print("of a library")
        show("a result")
    assert used.log_path is None
    shown = capsys.readouterr()
    assert shown.out == "a result\n"
    assert "no log file: Read-only file system" in shown.err
    assert "of a library" not in shown.err


def test_a_full_disk_does_not_end_a_command(capsys):
    with Console("list") as used:
        print("of a library")
        used.move_log(Path("/dev/full"))
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.close(full)
        print("lost")
        print("lost")
        show("a result")
    shown = capsys.readouterr()
    assert shown.out == "a result\n"
    assert shown.err.count("The command continues without it") == 1
    assert "the log cannot be written there (No space left on device)" in shown.err
    assert used.log_path.exists()
    used.log_path.unlink()


def test_a_run_has_a_log_though_no_temporary_file_can_be_made(monkeypatch, tmp_path, capsys):
    def refuse(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with Console("train"):
        console.move_log(tmp_path / "log.txt")
        logging.getLogger("ppvision").info("of ours")
        print("of a library")
    assert re.fullmatch(r"\S+ \S+ of ours\nof a library\n", (tmp_path / "log.txt").read_text())
    assert "no log file" in capsys.readouterr().err


def test_another_rank_redirects_nothing(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    before = where_descriptors_lead()
    with Console("train") as used:
        assert where_descriptors_lead() == before
    assert used.log_path is None


def test_a_log_goes_on_in_the_runs_folder(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("of an earlier run\n")
    with Console("train") as used:
        print("before")
        temporary = used.log_path
        console.move_log(tmp_path / "log.txt")
        print("after")
    assert not temporary.exists()
    assert (tmp_path / "log.txt").read_text() == "of an earlier run\nbefore\nafter\n"


# -- progress --------------------------------------------------------------------------------------


def test_a_library_shows_no_plain_lines(capsys):
    assert list(track(range(3), "eval")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_plain_lines_come_at_intervals(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Console("eval"), ProgressLine("eval", 40, "img") as line:
        for _ in range(40):
            now += 2.0
            line.update(1, "mIoU 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # after 30 and 60 seconds, and at the end
    assert lines[0] == "eval: 15/40 img [00:30<00:50,  2.00s/img, mIoU 0.5]"
    assert lines[-1].startswith("eval: 40/40 img [01:20<00:00")


def test_an_inner_line_is_not_written(capsys):
    with Console("train"), ProgressLine("train", 2, "step") as line:
        for _ in track(range(3), "eval"):
            pass
        line.update(2)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["train:"]


def test_a_failure_inside_of_a_loop_leaves_no_line_open(capsys):
    with contextlib.suppress(ValueError), Console("eval"):
        for _ in track(range(3), "eval"):
            raise ValueError
    assert console._open == []
