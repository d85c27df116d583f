"""Killed runs go on as if nothing had happened; damaged checkpoints are refused."""

import csv
import json
import logging
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppvision.engine import checkpoint
from ppvision.engine.callbacks import Callback, ProgressLog
from ppvision.engine.checkpoint import CheckpointError, list_checkpoints
from ppvision.engine.run_folder import RunFolder, read_metrics
from ppvision.engine.seeding import SeededBatches, SeededDataset
from ppvision.engine.trainer import TrainOptions
from ppvision.errors import FolderInUseError
from tests.helpers.configs import ROOT
from tests.helpers.messages import find_missing, raises_naming
from tests.helpers.run_ends import STEPS, assert_same_end, numbers
from tests.helpers.small_run import NoisyNumbers, build


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "whole"
    build(folder, STEPS).fit()
    return folder


def start(folder) -> subprocess.Popen:
    process = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.helpers.small_run",
            str(folder),
            str(STEPS),
            "slow",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(line == "training\n" for line in process.stdout)
    return process


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(uninterrupted, tmp_path):
    rng = random.Random(4)
    kills = 0
    while True:
        process = start(tmp_path / "run")
        if kills < 4:
            time.sleep(rng.uniform(0.05, 0.9))
            process.send_signal(signal.SIGKILL)
            kills += 1
        rest = process.communicate()[0]
        if "done" in rest:
            break
    assert kills >= 2
    assert_same_end(tmp_path / "run", uninterrupted)


def test_a_run_killed_in_the_middle_of_a_save(uninterrupted, tmp_path):
    """Stop a save after each of its files: the older checkpoint is what counts."""
    for after in (1, 2, 3):
        folder = tmp_path / str(after)
        saved, calls = checkpoint.save_weights, []

        def save_some(arrays, path, *, saved=saved, calls=calls, after=after):
            saved(arrays, path)
            calls.append(path)
            if len(calls) == 3 + after:  # 3 files a checkpoint: in the middle of the second one
                raise SystemExit("killed")

        checkpoint.save_weights = save_some
        try:
            with pytest.raises(SystemExit):
                build(folder, STEPS).fit()
        finally:
            checkpoint.save_weights = saved
        # A killed process cannot clean up: leave the rubbish that it would leave.
        rubbish = folder / "checkpoints" / ".step_6.partial"
        rubbish.mkdir(exist_ok=True)
        (rubbish / "model.safetensors").write_bytes(b"half")
        assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_3"]
        build(folder, STEPS, resume="auto").fit()
        assert_same_end(folder, uninterrupted)


def test_two_runs_with_one_seed_are_one(uninterrupted, tmp_path):
    build(tmp_path / "again", STEPS).fit()
    assert_same_end(tmp_path / "again", uninterrupted)
    build(tmp_path / "other", STEPS, seed=1).fit()
    assert numbers(tmp_path / "other") != numbers(uninterrupted)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_offered(
    uninterrupted, tmp_path, name, damage
):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    path = folder / "checkpoints" / f"step_{STEPS}" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-7])
    elif damage == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    with pytest.raises(CheckpointError) as caught:
        build(folder, STEPS, resume="auto")
    assert name in str(caught.value)
    assert f"step_{STEPS - 3}" in str(caught.value)
    older = folder / "checkpoints" / f"step_{STEPS - 3}"
    build(folder, STEPS, resume=str(older)).fit()
    assert_same_end(folder, uninterrupted)


def test_the_offer_is_an_older_and_intact_one(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for step in (STEPS, STEPS - 3):
        path = folder / "checkpoints" / f"step_{step}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
    with raises_naming(CheckpointError, "--resume", f"step_{STEPS - 6}"):
        build(folder, STEPS, resume="auto")
    with raises_naming(CheckpointError, "--resume", f"step_{STEPS - 6}"):
        build(folder, STEPS, resume=str(folder / "checkpoints" / f"step_{STEPS - 3}"))
    path = folder / "checkpoints" / f"step_{STEPS - 6}" / "state.json"
    path.unlink()
    with raises_naming(CheckpointError, f"step_{STEPS - 6}", "older"):
        build(folder, STEPS, resume=str(path.parent))


def test_every_flipped_bit_of_the_state_is_refused(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted / "checkpoints" / f"step_{STEPS}", folder / "step_1")
    path = folder / "step_1" / "state.json"
    whole = path.read_bytes()
    meaning = json.loads(whole)
    checkpoint._read_state(folder / "step_1")
    rng = random.Random(0)
    for _ in range(400):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        changed = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        path.write_bytes(changed)
        try:
            if json.loads(changed) == meaning:
                continue  # white space
        except ValueError:
            pass
        with pytest.raises(CheckpointError, match="step_1"):
            checkpoint._read_state(folder / "step_1")


def test_an_older_checkpoint_sets_later_ones_aside(uninterrupted, tmp_path):
    """What is written then is what `auto` finds, and it is not dropped as the oldest."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    older = folder / "checkpoints" / f"step_{STEPS - 6}"
    trainer = build(folder, STEPS, resume=str(older), keep_checkpoint_max=2, save_interval=4)
    poison(trainer, STEPS - 1)
    with pytest.raises(FloatingPointError):
        trainer.fit()
    names = [p.name for p in list_checkpoints(folder / "checkpoints")]
    assert names == [f"step_{STEPS - 6}", f"step_{STEPS - 2}"]
    aside = {p.name for p in (folder / "checkpoints" / "abandoned").iterdir()}
    assert aside == {f"step_{STEPS - 3}", f"step_{STEPS}"}
    resumed = build(folder, STEPS, resume="auto")
    assert resumed.progress.step == STEPS - 2
    resumed.fit()
    model = load_file(folder / "checkpoints" / f"step_{STEPS}" / "model.safetensors")
    expected = load_file(uninterrupted / "checkpoints" / f"step_{STEPS}" / "model.safetensors")
    for key in expected:
        np.testing.assert_array_equal(model[key], expected[key])
    steps = [s for s, tag, _ in read_metrics(folder / "metrics.csv") if tag == "Train/loss"]
    assert steps == list(range(2, STEPS + 1, 2))


def test_a_checkpoint_is_never_removed_to_be_written_again(tmp_path, monkeypatch):
    """A loss that is not finite right after a save: that checkpoint is the state before it."""
    trainer = build(tmp_path / "run", STEPS, keep_checkpoint_max=1)
    poison(trainer, 7)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", _refuse_checkpoints(shutil.rmtree))
    with raises_naming(FloatingPointError, "step_6", "repeats"):
        trainer.fit()
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_6"]


def _refuse_checkpoints(whole):
    def rmtree(path, **options):
        newer = [p for p in list_checkpoints(path.parent) if p.name != path.name]
        assert path.name.startswith(".") or newer, f"{path} was the only one"
        whole(path, **options)

    return rmtree


def test_the_state_before_a_stop_costs_no_other_checkpoint(tmp_path):
    trainer = build(tmp_path / "run", STEPS, keep_checkpoint_max=1)
    poison(trainer, 8)
    with raises_naming(FloatingPointError, "step_7", "repeats"):
        trainer.fit()
    names = [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_6", "step_7"]


def test_another_optimizer_is_refused(uninterrupted, tmp_path):
    trainer = build(tmp_path / "other", 3)
    path = uninterrupted / "checkpoints" / f"step_{STEPS}"
    momentum = paddle.optimizer.Momentum(
        trainer.optimizer._learning_rate, parameters=trainer.model.parameters()
    )
    adamw = trainer.optimizer
    checkpoint.load_checkpoint(path, trainer.model, adamw, None)
    saved = checkpoint.save_checkpoint(
        tmp_path / "c", trainer.model, momentum, checkpoint.Progress(step=1), None, 1, {}
    )
    fresh = paddle.optimizer.AdamW(0.1, parameters=trainer.model.parameters())
    with raises_naming(CheckpointError, "AdamW", "Momentum"):
        checkpoint.load_checkpoint(saved, trainer.model, fresh, None)
    trainer.callbacks[0].on_end()


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    folder, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with folder.hold_lock():
        with folder.hold_lock():  # the same object: `run_training` and `Trainer.fit` both ask
            pass
        with pytest.raises(FolderInUseError, match="process"), other.hold_lock():
            pass
    with other.hold_lock():
        pass


def test_a_full_disk_elsewhere_names_the_checkpoint_as_well(tmp_path, monkeypatch):
    trainer = build(tmp_path / "run", STEPS)

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paddle, "save", full)
    with raises_naming(OSError, "best", "model", "space", "step_3"):
        trainer.fit()
    assert not list((tmp_path / "run" / "best_model").iterdir())


def test_time_left_goes_beyond_a_day(caplog):
    logging.getLogger("ppvision").propagate = True
    log = ProgressLog(300_001, 4)
    with caplog.at_level(logging.INFO, "ppvision"):
        log.on_log(
            1,
            {"Train/batch_cost": 2.0, "Train/reader_cost": 0, "Train/loss": 1.0, "Train/lr": 0.1},
        )
    assert "time left: 166:40:00" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    path = folder / "checkpoints" / f"step_{STEPS}" / "state.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(CheckpointError, match=f"step_{STEPS}"):
        build(folder, STEPS, resume="auto")
    with pytest.raises(FileNotFoundError, match="step_27"):
        build(folder, STEPS, resume=str(tmp_path / "nowhere"))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    saved = checkpoint.save_weights

    def full(arrays, path):
        if "step_6" in str(path):
            raise OSError(28, "No space left on device", str(path))
        saved(arrays, path)

    monkeypatch.setattr(checkpoint, "save_weights", full)
    with raises_naming(OSError, "space", "left"):
        build(tmp_path / "run", STEPS).fit()
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_3"]


def test_checkpoints_hold_no_pickle_and_only_as_many_as_wanted(uninterrupted):
    folder = uninterrupted / "checkpoints"
    assert [p.name for p in list_checkpoints(folder)] == ["step_24", "step_27", "step_30"]
    state = json.loads((folder / "step_30" / "state.json").read_text())
    assert state["step"] == 30
    arrays = {f"{n}.safetensors" for n in ("model", "optimizer", "ema")}
    assert set(state["files"]) == {*arrays, "config.yml"}
    assert {p.name for p in (folder / "step_30").iterdir()} == {*state["files"], "state.json"}
    assert (state["epoch"], state["batch"], state["batches_per_epoch"]) == (5, 0, 6)
    assert state["evaluated"] == 30
    assert state["best_score"] == max(
        value for _, tag, value in read_metrics(uninterrupted / "metrics.csv") if "Train" not in tag
    )


def poison(trainer, step: int, value: float = math.nan) -> None:
    """Multiply the pictures of one step, as bad input does. ReLU turns NaN into 0: the loss stays
    finite, the gradient does not."""
    whole = trainer.compute_losses

    def poisoned(network, batch):
        if trainer.progress.step == step:
            batch = {**batch, "x": batch["x"] * value}
        return whole(network, batch)

    trainer.compute_losses = poisoned


def test_a_loss_that_is_not_finite_stops_with_step_rate_files_and_checkpoint(
    uninterrupted, tmp_path
):
    trainer = build(tmp_path / "run", STEPS)
    trainer.dataset.file_list = [(f"picture_{i}.jpg", None) for i in range(26)]
    poison(trainer, 5)
    with raises_naming(FloatingPointError, "5,", "learning", "rate") as caught:
        trainer.fit()
    assert find_missing(str(caught.value), "gradient", "norm:", "finite", "nan") == []
    assert re.search(r" rate 0\.0\d+", str(caught.value))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) <= 4
    stock = paddle.io.DistributedBatchSampler(NoisyNumbers(), 4, shuffle=True, drop_last=True)
    expected = [f"picture_{i}.jpg" for i in list(stock)[4]]
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == expected
    # The state before the step: without the poison the run ends as if nothing had happened.
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_3", "step_4"]
    build(tmp_path / "run", STEPS, resume="auto").fit()
    assert_same_end(tmp_path / "run", uninterrupted)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    trainer = build(tmp_path / "run", STEPS)
    whole = trainer.compute_losses
    trainer.compute_losses = lambda network, batch: [whole(network, batch)[0] / 0]
    with raises_naming(FloatingPointError, "loss:", "inf"):
        trainer.fit()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = build(tmp_path / "run", STEPS)
    trainer.model[0].weight.set_value(trainer.model[0].weight * math.inf)
    with raises_naming(FloatingPointError, "older", "checkpoint"):
        trainer.fit()
    assert not list_checkpoints(tmp_path / "run/checkpoints")


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    trainer = build(tmp_path / "run", STEPS, clip_norm=1.0)
    whole = trainer.compute_losses

    def steep(network, batch):  # the square root's slope at 0 is infinite, its value is not
        (loss,) = whole(network, batch)
        return [loss + paddle.sqrt(network[0].weight.sum() * 0)]

    trainer.compute_losses = steep
    with raises_naming(FloatingPointError, "gradient", "norm"):
        trainer.fit()
    assert all(bool(paddle.isfinite(p).all()) for p in trainer.model.parameters())


def test_a_file_size_limit_stops_with_a_clear_error_and_leaves_the_older_checkpoint(
    uninterrupted, tmp_path
):
    """The system itself refuses the write: `ulimit -f`, without the signal that would kill."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from ppvision.engine import checkpoint\n"
        "from tests.helpers.small_run import build\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "whole = checkpoint.save_checkpoint\n"
        "trainer = build(Path(sys.argv[1]), 30)\n"
        "import ppvision.engine.trainer as t\n"
        "def save(folder, model, optimizer, progress, *rest):\n"
        "    if progress.step == 6:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "    return whole(folder, model, optimizer, progress, *rest)\n"
        "t.save_checkpoint = save\n"
        "trainer.fit()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "could not write" in done.stderr
    assert "step_6 (File too large). Complete is" in done.stderr
    assert "--resume auto" in done.stderr
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_3"]
    build(tmp_path / "run", STEPS, resume="auto").fit()
    assert_same_end(tmp_path / "run", uninterrupted)


@pytest.mark.all
def test_a_full_file_system(tmp_path, uninterrupted):
    """A tmpfs with room for one checkpoint and a half; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs root: mount -t tmpfs")
    try:
        (folder / "run").mkdir()
        with raises_naming(OSError, "space", "left") as caught:
            build(folder / "run", STEPS, keep_checkpoint_max=30).fit()
        assert "step_" in str(caught.value)
        found = list_checkpoints(folder / "run" / "checkpoints")
        assert found
        shutil.copytree(folder / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    build(tmp_path / "run", STEPS, resume="auto").fit()
    assert_same_end(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_around_an_evaluation_neither_doubles_nor_loses_its_points(
    uninterrupted, tmp_path, moment
):
    trainer = build(tmp_path / "run", STEPS)

    class Killed(Callback):
        def on_evaluate(self, step, scores):
            if step == 6:
                raise SystemExit("killed")

    # Before or after the dashboard has written the scores of step 6.
    trainer.callbacks.insert(0 if moment == "before" else 1, Killed())
    with pytest.raises(SystemExit):
        trainer.fit()
    build(tmp_path / "run", STEPS, resume="auto").fit()
    assert_same_end(tmp_path / "run", uninterrupted)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Without what looks across a batch or draws numbers; weights within rounding."""

    def run(name, **options):
        trainer = build(tmp_path / name, 9, **options)
        for layer in trainer.model.sublayers():
            if isinstance(layer, paddle.nn.BatchNorm1D):
                layer._use_global_stats = True
            if isinstance(layer, paddle.nn.Dropout):
                layer.p = 0.0
        trainer.optimizer = paddle.optimizer.Momentum(0.05, parameters=trainer.model.parameters())
        trainer.evaluate = None
        trainer.fit()
        return trainer

    whole, parts = run("whole", batch_size=8), run("parts", batch_size=4, accumulate=2)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)
    losses = [
        [value for _, tag, value in read_metrics(tmp_path / name / "metrics.csv") if "loss" in tag]
        for name in ("whole", "parts")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_accumulation_resumes_to_the_bit(tmp_path):
    build(tmp_path / "whole", 12, accumulate=3).fit()
    trainer = build(tmp_path / "run", 12, accumulate=3)
    poison(trainer, 8)
    with pytest.raises(FloatingPointError):
        trainer.fit()
    build(tmp_path / "run", 12, accumulate=3, resume="auto").fit()
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints/step_12/model.safetensors")
        for name in ("run", "whole")
    )
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    state = json.loads((tmp_path / "run/checkpoints/step_12/state.json").read_text())
    assert (state["epoch"], state["batch"]) == (6, 0)  # 36 batches of 6 an epoch


def test_clipping_bounds_the_step_and_logs_the_norm(tmp_path):
    """Plain SGD moves by rate * gradient: with the norm bounded, by at most rate * bound."""
    for bound in (0.01, 1e6):
        trainer = build(tmp_path / str(bound), 2, log_iters=1, clip_norm=bound)
        trainer.optimizer = paddle.optimizer.SGD(1.0, parameters=trainer.model.parameters())
        before = [p.numpy() for p in trainer.model.parameters() if not p.stop_gradient]
        trainer.options = trainer.options.__class__(
            **{**vars(trainer.options), "iters": 1, "save_interval": 1}
        )
        trainer.batches = trainer._batches(0, 1)
        trainer.fit()
        after = [p.numpy() for p in trainer.model.parameters() if not p.stop_gradient]
        moved = math.sqrt(
            sum(((a - b).astype(np.float64) ** 2).sum() for a, b in zip(before, after, strict=True))
        )
        rows = {tag: value for _, tag, value in read_metrics(tmp_path / str(bound) / "metrics.csv")}
        norm = rows["Train/grad_norm"]
        assert moved == pytest.approx(min(bound, norm), rel=1e-3)
        assert norm > 0.1


def test_clipping_twice_is_refused(tmp_path):
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    with pytest.raises(ValueError, match="clips"):
        build(tmp_path / "run", 3, clip=clip, clip_norm=1.0)


def test_several_forward_passes_share_a_step(tmp_path):
    """Two passes a step, each with its own backward, give the gradient of their mean."""
    grads, model, folder = {}, None, None

    def half(network, batch):
        return [network(batch["x"]).abs().mean()]

    def other(network, batch):
        return [(network(batch["x"]) ** 2).mean(), network(batch["x"]).mean()]

    for name, passes in (
        ("one", lambda n, b: [(sum(half(n, b)) + sum(other(n, b))) / 2]),
        ("two", {"half": half, "other": other}),
    ):
        folder = tmp_path / name
        trainer = build(folder, 1, log_iters=1)
        for layer in trainer.model.sublayers():
            if isinstance(layer, paddle.nn.Dropout):
                layer.p = 0.0
        trainer.compute_losses = passes
        trainer.optimizer = paddle.optimizer.SGD(0.1, parameters=trainer.model.parameters())
        trainer.fit()
        model = trainer.model
        grads[name] = [p.numpy() for p in model.parameters() if not p.stop_gradient]
    for a, b in zip(grads["one"], grads["two"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    rows = {tag: value for _, tag, value in read_metrics(folder / "metrics.csv")}
    assert rows["Train/loss"] == pytest.approx(
        (rows["Train/loss_half"] + rows["Train/loss_other"]) / 2, rel=1e-6
    )


def test_a_resume_with_another_config_says_what_differs(tmp_path, caplog):
    build(tmp_path / "run", 3).fit()
    logging.getLogger("ppvision").propagate = True
    other = {"steps": 4, "model": {"type": "b"}}
    build(tmp_path / "run", 6, resume="auto", config=other, seed=7).callbacks[0].on_end()
    assert "steps: 3 -> 4" in caplog.text
    assert "run.seed: 0 -> 7" in caplog.text
    assert "scheduled for 3 steps and continues from" in caplog.text
    assert "model: None -> {'type': 'b'}" in caplog.text


def test_a_resume_with_other_data_says_so(tmp_path, caplog):
    build(tmp_path / "run", 3).fit()
    logging.getLogger("ppvision").propagate = True
    build(tmp_path / "run", 6, resume="auto", batch_size=5).callbacks[0].on_end()
    assert "an epoch had 6 batches and has 5 now" in caplog.text


def test_a_resume_with_other_samples_says_so(tmp_path, caplog, monkeypatch):
    build(tmp_path / "run", 3).fit()
    logging.getLogger("ppvision").propagate = True
    monkeypatch.setattr(
        NoisyNumbers, "file_list", [(f"{i}.jpg",) for i in range(26)], raising=False
    )
    build(tmp_path / "run", 6, resume="auto").callbacks[0].on_end()
    assert "others than before, or in another order" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"accumulate": 0}, {"clip_norm": -1}, {"ema_decay": 1}, {"seed": -1}, {"precision": "int8"}],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}:"):
        TrainOptions(**{"iters": 1, "batch_size": 1, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_does_not_read_stops_the_run_by_name(tmp_path, num_workers):
    trainer = build(tmp_path / "run", STEPS, num_workers=num_workers)

    class OneGone(NoisyNumbers):
        file_list = tuple((f"picture_{i}.jpg",) for i in range(26))

        def __getitem__(self, index):
            if index == 7:
                raise AttributeError("'NoneType' object has no attribute 'astype'")
            return super().__getitem__(index)

    trainer.dataset = OneGone()
    with raises_naming(RuntimeError, "picture_7.jpg", "NoneType"):
        trainer.fit()


def test_every_step_trains_whatever_came_before_it(tmp_path, monkeypatch):
    """Evaluation, and whatever shows pictures, may leave the model in evaluation mode."""
    trainer = build(tmp_path / "run", 7)
    modes, whole = [], trainer.compute_losses

    def watched(network, batch):
        modes.append(network.training and all(layer.training for layer in network.sublayers()))
        return whole(network, batch)

    class LeavesEvaluationMode(Callback):
        def on_evaluate(self, step, scores):
            trainer.model.eval()

    trainer.compute_losses = watched
    trainer.callbacks.append(LeavesEvaluationMode())
    trainer.fit()
    assert modes == [True] * 7


def test_an_evaluation_that_fails_costs_no_steps(tmp_path):
    trainer = build(tmp_path / "run", STEPS)

    def fails(model):
        raise KeyError("no such option")

    trainer.evaluate = fails
    with pytest.raises(KeyError):
        trainer.fit()
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_3"]


def test_a_cut_record_does_not_block_a_resume(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS}")
    (record,) = (folder / "vdl").iterdir()
    record.write_bytes(record.read_bytes()[:-7])
    build(folder, STEPS, resume="auto").fit()
    assert_same_end(folder, uninterrupted)


def test_batches_are_those_of_paddle_and_go_on_anywhere():
    dataset = NoisyNumbers()
    stock = paddle.io.DistributedBatchSampler(dataset, 4, shuffle=True, drop_last=True)
    expected = [batch for _ in range(3) for batch in stock]
    ours = [[i for _, i in batch] for batch in SeededBatches(dataset, 4, 0, 0, 18)]
    assert ours == expected
    for begin in (1, 6, 7, 13):
        rest = [[i for _, i in batch] for batch in SeededBatches(dataset, 4, 0, begin, 18)]
        assert rest == expected[begin:]
    with pytest.raises(ValueError, match="batch_size=30"):
        SeededBatches(dataset, 30, 0, 0, 1)


def test_a_sample_does_not_depend_on_when_it_is_read():
    dataset = SeededDataset(NoisyNumbers(), seed=2)
    first = dataset[3, 5]["x"]
    random.random()
    np.random.normal(size=7)
    dataset[3, 6]
    np.testing.assert_array_equal(dataset[3, 5]["x"], first)
    assert not np.array_equal(dataset[4, 5]["x"], first)
