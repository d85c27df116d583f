"""`benchmark/zoo_scores.py` and `benchmark/picture_sizes.py`: their rows, and the cards."""

import csv

import pytest

from benchmark import picture_sizes, zoo_scores
from benchmark.picture_sizes import CASES, Case, content_of
from benchmark.zoo_scores import CONFIGS, RESULTS, bytes_of, stored_bits
from ppvision.tasks import open_job
from ppvision.zoo.cards import ZOO_WEIGHTS

# The score on a card, and its name in the table.
METRICS = {"top-1": "top1", "AP50": "bbox_AP50", "mIoU": "mIoU", "Boundary IoU": "BoundaryIoU"}


def rows() -> list[dict[str, str]]:
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_has_all_weights_of_the_package():
    own = {name for name, card in ZOO_WEIGHTS.items() if not card.package}
    assert set(CONFIGS) == own


@pytest.mark.parametrize("name", CONFIGS)
def test_a_card_says_what_was_measured(name):
    card = ZOO_WEIGHTS[name]
    mine = [row for row in rows() if row["weights"] == name]
    assert {int(row["bits"]) for row in mine} == set(stored_bits(card))
    what, _, said = card.short_score.rpartition(" ")
    highest = {r["metric"]: r["score"] for r in mine if int(r["bits"]) == max(stored_bits(card))}
    assert float(said) == pytest.approx(float(highest[METRICS[what]]), abs=0.0006)
    for row in mine:
        assert int(row["bytes"]) == bytes_of(card, int(row["bits"]))


def test_layers_of_codes_add_up():
    card = ZOO_WEIGHTS["segformer_pale_nano.digit_scenes"]
    assert stored_bits(card) == [8, 6, 4]
    files = {path.name: path.stat().st_size for path in card.folder.glob("w*.safetensors")}
    assert bytes_of(card, 4) == files["w4.safetensors"]
    assert bytes_of(card, 8) == sum(files.values())


def test_rows_of_weights_come_from_an_evaluation(monkeypatch):
    class Scores:
        def by_tag(self):
            return {"Evaluate/mIoU": 0.25, "Evaluate/Acc": 0.5}

    class Job:
        def models(self, name, bits):
            assert name == "segformer_pale_nano.digit_scenes"
            yield bits[0], "the model"

        def evaluate(self, model):
            assert model == "the model"
            return Scores()

    monkeypatch.setattr(zoo_scores, "open_job", lambda path: Job())
    (row,) = zoo_scores.scores_of("segformer_pale_nano.digit_scenes", 6)
    assert (row["bits"], row["metric"], row["score"]) == (6, "mIoU", "0.2500")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_runs_differ_by_their_sizes_alone(case):
    found, first = content_of(case), content_of(CASES[0])
    assert "teacher" not in found
    assert "sizes" not in found
    assert found["model"]["pale_size"] == case.pale_size
    sides = [
        transform[key]
        for split in ("train_dataset", "val_dataset")
        for transform in found[split]["transforms"]
        for key in ("size", "short_size", "target_size")
        if key in transform
    ]
    assert sides == [case.picture, case.picture, [case.picture] * 2]
    changed = {"model", "train_dataset", "val_dataset"}
    assert {k: v for k, v in found.items() if k not in changed} == {
        k: v for k, v in first.items() if k not in changed
    }


def test_a_run_trains_and_scores(monkeypatch, tmp_path):
    """On pictures that the test makes: two steps."""
    import numpy as np
    import yaml

    from ppvision.data.writing import write_picture

    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                picture = np.full((32, 32, 3), 60 * number, np.uint8)
                write_picture(tmp_path / split / name / f"{number}.png", picture)
    (tmp_path / "classes.txt").write_text("a\nb\n", encoding="utf-8")
    content = open_job(picture_sizes.CONFIG).content
    content["model"]["num_classes"] = 2
    del content["teacher"]["classes"]
    for split in ("train", "val"):
        content[f"{split}_dataset"]["root"] = str(tmp_path / split)
        content[f"{split}_dataset"]["class_path"] = str(tmp_path / "classes.txt")
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    monkeypatch.setattr(picture_sizes, "CONFIG", config)
    monkeypatch.setattr(picture_sizes, "STEPS", 2)
    monkeypatch.setattr(picture_sizes, "BATCH", 4)
    row = picture_sizes.run(Case(32, 4), tmp_path)
    assert (row["picture"], row["pale_size"], row["steps"]) == (32, 4, 2)
    assert 0 <= float(row["top1"]) <= 1
    assert float(row["cpu_minutes"]) > 0
