"""`benchmark/transfer.py`: what its runs are, which come next, and what it reads of them."""

import pytest

from benchmark import transfer
from benchmark.sdn_forms import COMPARED
from benchmark.transfer import FIELDS, LONGER, SETS, TRANSFER, Case


def rows_of(scores: dict[str, float], seed: int = 0) -> list[dict]:
    """Rows of the forms, the same Boundary IoU on both sets."""
    return [
        {
            **dict.fromkeys(FIELDS, ""),
            "data": data,
            "init": "pretrained",
            "form": form,
            "seed": str(seed),
            "BoundaryIoU": str(score),
        }
        for form, score in scores.items()
        for data in SETS
    ]


@pytest.mark.parametrize("form", COMPARED)
def test_only_what_is_compared_differs_between_configs(form):
    plain = transfer.content_of(Case("nuclei", "scratch", "none", 1), TRANSFER, None)
    found = transfer.content_of(Case("nuclei", "pretrained", form, 1), TRANSFER, None)
    different = {key for key in plain if plain[key] != found[key]}
    assert different <= {"model", "loss"}
    inner = found["model"]["backbone"]
    if form != "none":
        assert inner["type"] == "SemanticDiffusionBackbone"
        inner = inner["backbone"]
    assert inner["pretrained"] == "pale_nano.tiny_imagenet_100"
    assert "pretrained" not in plain["model"]["backbone"]
    # The loss has a part for each output: a guidance by classes has one of its own.
    assert len(found["loss"]["coef"]) == len(found["loss"]["types"])
    assert len(found["loss"]["types"]) == 1 + form.startswith("classes")


def test_every_form_runs_once_and_the_best_three_with_more_seeds():
    first = transfer.form_cases([])
    assert {(c.form, c.seed) for c in first} == {(form, 0) for form in COMPARED}
    scores = {"none": 0.1, "convolution": 0.5, "central": 0.4, "sdn": 0.6}
    rows = rows_of({**scores, "classes": 0.3, "classes_finest": 0.2})
    assert transfer.best_forms(rows) == ["sdn", "convolution", "central"]
    more = {(c.form, c.seed) for c in transfer.form_cases(rows)}
    wanted = ("none", "sdn", "convolution", "central")  # nothing is what they are compared with
    assert more == {(form, seed) for form in wanted for seed in (1, 2)}
    assert len(transfer.form_cases(rows[:-1])) == len(first)  # one set of one form is not done


def test_runs_of_both_tables_see_as_many_crops():
    assert TRANSFER.steps * TRANSFER.batch == LONGER.steps * LONGER.batch
    content = transfer.content_of(Case("facade", "pretrained", "sdn", 0), LONGER, None)
    assert (content["iters"], content["batch_size"]) == (2000, 4)


def test_a_curve_is_read_from_the_metrics_of_a_run(tmp_path):
    path = tmp_path / "metrics.csv"
    lines = ["step,tag,value", "50,Train/loss,0.2"]
    for step, score in ((100, 0.25), (200, 0.5)):
        lines += [f"{step},Evaluate/{name},{score}" for name in ("mIoU", "BoundaryF3", "Acc")]
        lines += [f"{step},Evaluate/BoundaryIoU,{score / 2}"]
    path.write_text("\n".join(lines) + "\n")
    assert transfer.read_curve(path) == [
        {"step": 100, "mIoU": "0.2500", "BoundaryIoU": "0.1250", "BoundaryF3": "0.2500"},
        {"step": 200, "mIoU": "0.5000", "BoundaryIoU": "0.2500", "BoundaryF3": "0.5000"},
    ]
