"""`benchmark/gpu/detection.py`: the file that travels, views of pictures, a training to its end."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install -r benchmark/requirements-torch.txt")

import torch

from benchmark.gpu import detection
from benchmark.gpu.card import fill_card
from benchmark.gpu.common import save_run
from benchmark.gpu.detection_networks import load_backbone, ppyoloe_pale_nano
from benchmark.gpu.detection_pictures import SPLITS, Looks, Split, Views, pack, read_pack
from benchmark.torch_pale import Pale

SIZE = (96, 128)
BOX = np.array([[40.0, 30.0, 70.0, 75.0]], np.float32)  # of a picture of 160 x 120
COUNT = 4


@pytest.fixture
def split():
    """A white object on black, in a picture of 160 x 120 pixels; several times."""
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[30:75, 40:70] = 255
    return Split(np.stack([picture] * COUNT), [BOX] * COUNT, [np.array([1])] * COUNT)


@pytest.fixture
def packed(split, tmp_path):
    for name in SPLITS:
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        images = [f"{name}/{number}.jpg" for number in range(COUNT)]
        for path, picture in zip(images, split.pictures, strict=True):
            cv2.imwrite(str(tmp_path / "images" / path), picture)
        content = {
            "images": [{"id": 7 + n, "file_name": path} for n, path in enumerate(images)],
            "categories": [{"id": 2, "name": "cell"}, {"id": 1, "name": "plate"}],
            "annotations": [
                {"id": n, "image_id": 7 + n, "category_id": 2, "bbox": [40, 30, 30, 45]}
                for n in range(COUNT)
            ],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path = tmp_path / "annotations" / f"instances_{name}.json"
        path.write_text(json.dumps(content))
    pack(tmp_path, tmp_path / "packed.npz")
    return tmp_path / "packed.npz"


def test_the_file_holds_pictures_and_boxes(packed, split):
    splits, names = read_pack(packed)
    assert names == ["plate", "cell"]
    for name in SPLITS:
        found = splits[name]
        assert np.abs(found.pictures.astype(int) - split.pictures).max() < 40  # JPEG
        for boxes, classes in zip(found.boxes, found.classes, strict=True):
            np.testing.assert_array_equal(boxes, BOX)
            np.testing.assert_array_equal(classes, [1])


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_boxes_follow_their_objects(split, mosaic):
    """The white pixels of every view lie in its boxes, and its boxes hold white pixels alone."""
    plain = Looks(mosaic=mosaic, brightness=0, contrast=0, saturation=0, hue=0, visible=0.001)
    views = Views(split, SIZE, torch.device("cpu"), seed=0)
    images, targets = views.draw(24, plain)
    assert targets.boxes.shape == (24, views.most, 4)  # all steps have the same shapes
    for image, boxes, real in zip(images, targets.boxes, targets.real, strict=True):
        white, inside = image.mean(dim=0) > 0.9, torch.zeros(SIZE, dtype=torch.bool)
        for left, top, right, bottom in boxes[real].tolist():
            inside[round(top) : round(bottom), round(left) : round(right)] = True
        # A row or column at each border may be a mixture.
        different = (white != inside).float().sum()
        assert different <= 0.1 * inside.sum() + 2 * SIZE[1], different
    assert targets.real.sum() > (24 if mosaic else 18)
    assert (targets.classes[targets.real] == 1).all()
    assert len(torch.unique(targets.boxes[targets.real], dim=0)) > 15


def test_whole_view_is_what_the_evaluation_shows(split):
    plain = Looks(whole=1.0, mosaic=0.0, brightness=0, contrast=0, saturation=0, hue=0)
    views = Views(split, SIZE, torch.device("cpu"), seed=0)
    images, targets = views.draw(8, plain)
    shown = torch.from_numpy(detection.resized(split.pictures[:1], SIZE))
    expected = detection.normalised(shown)[0]
    mirrored = [expected, expected.flip(2), expected.flip(1), expected.flip(1, 2)]
    for image, box in zip(images, targets.boxes[:, 0], strict=True):
        differences = [(image - m).abs().max().item() for m in mirrored]
        assert min(differences) < 0.02
        assert (box[2:] - box[:2]).tolist() == pytest.approx([24, 36], abs=1e-3)


def test_starts_from_a_classifier():
    classifier = Pale(32, (1, 2, 2, 1), (2, 2, 4, 8), num_classes=5)
    model = ppyoloe_pale_nano(3)
    assert load_backbone(model, classifier.state_dict()) > 150
    for name, value in model.backbone.state_dict().items():
        if name.startswith(("merges", "stages")) and not name.endswith("tracked"):
            torch.testing.assert_close(value, classifier.state_dict()[name])


def test_waits_for_a_finished_classifier(tmp_path):
    """Not for one of on the way, unless the time is over; what does not fit starts from scratch."""
    state = Pale(32, (1, 2, 2, 1), (2, 2, 4, 8), num_classes=5).state_dict()
    model = ppyoloe_pale_nano(3)
    path = save_run(tmp_path, "nano", state, {"finished": False, "steps": 3, "top1": 0.25})
    assert not detection.is_finished(path)
    source = detection.start_backbone(model, path, 0)
    assert source.startswith("nano.pt (finished False, steps 3, top1 0.25): ")
    save_run(tmp_path, "nano", state, {"finished": True})
    assert detection.is_finished(path)
    assert detection.start_backbone(model, path, 60).startswith("nano.pt (finished True")
    path = save_run(tmp_path, "other", {"merges.0.weight": torch.zeros(1)}, {"finished": True})
    assert detection.start_backbone(model, path, 60).startswith("scratch: other.pt fails")
    absent = detection.start_backbone(model, tmp_path / "absent.pt", 0)
    assert absent.startswith("scratch: absent.pt fails (FileNotFoundError")


def test_trains_to_its_end_and_converts(packed, tmp_path, monkeypatch):
    def run(*words: object) -> None:
        monkeypatch.setattr("sys.argv", ["detection", *map(str, words)])
        detection.main()

    output = tmp_path / "run"
    run(
        *("train", "--data", packed, "--output", output, "--seconds", 3, "--batch", 2),
        *("--device", "cpu", "--mode", "eager", "--size", "64x96", "--further_sizes", "96x96"),
    )
    record = json.loads((output / "ppyoloe_pale_nano.json").read_text())
    assert record["steps"] > 0
    assert (record["initialised_from"], record["finished"]) == ("scratch", True)
    assert set(record["scores"]) == {"64x96", "96x96"}
    assert 0 <= record["scores"]["64x96"]["AP50"] <= 1
    draft = Path(detection.__file__).with_name("cards") / "ppyoloe_pale_nano.blood_cells.json"
    card = fill_card(json.loads(draft.read_text()), record, "AP50 0")
    assert f"{COUNT} training pictures. Initialised from scratch" in card["data"]
    assert card["hours"] > 0
    run(
        *("convert", "--weights", output / "ppyoloe_pale_nano.pt"),
        *("--output", tmp_path / "found.pdparams"),
    )
    paddle = pytest.importorskip("paddle")
    arrays = paddle.load(str(tmp_path / "found.pdparams"))
    trained = torch.load(output / "ppyoloe_pale_nano.pt", weights_only=True)
    name = "neck.fpn_stages.0.0.conv1.bn"
    np.testing.assert_array_equal(
        arrays[f"{name}._variance"].numpy(), trained[f"{name}.running_var"].numpy()
    )
