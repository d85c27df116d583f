"""What a detector's config may say, and how it is refused."""

import pytest
import yaml

from ppvision.errors import LibraryError
from ppvision.tasks import open_job
from ppvision.tasks.config import ConfigError
from tests.helpers.configs import ROOT
from tests.helpers.messages import raises_naming
from tests.helpers.small_detectors import small_detector, write_detector

RECIPES = {
    "ppyoloe": ROOT / "configs" / "detection" / "ppyoloe_pale_nano_bccd.yml",
    "mask_rcnn": ROOT / "configs" / "detection" / "mask_rcnn_pale_nano_digit_scenes.yml",
}


def opened(tmp_path, recipe, text):
    path = tmp_path / "job.yml"
    path.write_text(yaml.safe_dump({"_BASE_": [str(RECIPES[recipe])]}) + text)
    return open_job(path)


@pytest.mark.parametrize(
    ("recipe", "text", "tokens"),
    [
        ("ppyoloe", "epochs: 3\n", "'epochs' epoch"),
        ("ppyoloe", "architecture: YOLOv4\n", "architecture YOLOv3"),
        ("ppyoloe", "YOLOv3: {bakbone: pale_nano}\n", "YOLOv3 backbone"),
        ("ppyoloe", "YOLOv3: {backbone: pale_nanu}\n", "pale_nano"),
        ("ppyoloe", "YOLOv3: null\n", "YOLOv3: keys values, None"),
        (
            "ppyoloe",
            "PPYOLOEHead: {nms: {name: MultiClassNMS, keep_topk: 3}}\n",
            "PPYOLOEHead.nms keep_top_k",
        ),
        (
            "ppyoloe",
            "PPYOLOEHead: {nms: {name: MultiClassNM}}\n",
            "PPYOLOEHead.nms.name MultiClassNMS",
        ),
        (
            "mask_rcnn",
            "RPNHead: {test_proposal: {post_nms_topn: 3}}\n",
            "RPNHead.test_proposal post_nms_top_n",
        ),
        (
            "mask_rcnn",
            "BBoxHead: {roi_extractor: {resolutoin: 7}}\n",
            "BBoxHead.roi_extractor resolution",
        ),
        (
            "mask_rcnn",
            "BBoxHead: {roi_extractor: 7}\n",
            "BBoxHead.roi_extractor: keys values 7",
        ),
        (
            "ppyoloe",
            "PPYOLOEHead: {loss_weight: {clas: 1.0}}\n",
            "PPYOLOEHead.loss_weight class",
        ),
        (
            "ppyoloe",
            "TrainDataset: !COCODataSet {data_fields: [image, gt_box]}\n",
            "TrainDataset.data_fields: 'gt_box' gt_bbox",
        ),
        ("ppyoloe", "TrainDataset: {image_dir: x}\n", "TrainDataset: tag"),
        ("ppyoloe", "TrainReader: null\n", "TrainReader: keys values"),
        (
            "ppyoloe",
            "TestReader: {batchsize: 2}\n",
            "TestReader batch_size",
        ),
        (
            "ppyoloe",
            "TestReader: {sample_transforms: [Permute: ]}\n",
            "TestReader.sample_transforms.0.Permute None; {}",
        ),
        (
            "ppyoloe",
            "TestReader: {sample_transforms: [Resize: {target: 3}]}\n",
            "TestReader.sample_transforms.0.Resize target_size",
        ),
        (
            "ppyoloe",
            "TestReader: {sample_transforms: [Resiz: {}]}\n",
            "TestReader.sample_transforms.0: 'Resiz' Resize",
        ),
        (
            "ppyoloe",
            "OptimizerBuilder: {optimizer: {type: AdanW}}\n",
            "OptimizerBuilder.optimizer.type AdamW",
        ),
        (
            "ppyoloe",
            "OptimizerBuilder: {optimizer: {type: AdamW, weightdecay: 0.1}}\n",
            "OptimizerBuilder.optimizer weight_decay",
        ),
        (
            "ppyoloe",
            "OptimizerBuilder: {regularizer: {type: L3, factor: 1}}\n",
            "OptimizerBuilder.regularizer.type: 'L3'",
        ),
        (
            "ppyoloe",
            "OptimizerBuilder: {clip_grad_by_norm: much}\n",
            "OptimizerBuilder.clip_grad_by_norm: number least 0",
        ),
        (
            "ppyoloe",
            "LearningRate: {base_lr: fast}\n",
            "LearningRate.base_lr: number least 0 'fast'",
        ),
        (
            "ppyoloe",
            "LearningRate: {schedulers: [!CosinDecay {max_epochs: 4}]}\n",
            "!CosinDecay CosineDecay",
        ),
        ("ppyoloe", "TrainReader: {shuffle: false}\n", "TrainReader.shuffle"),
        ("ppyoloe", "pretrain_weights: a\n", "pretrain_weights: read here"),
    ],
)
def test_what_is_unknown_is_named_with_its_line(tmp_path, recipe, text, tokens):
    with raises_naming(ConfigError, "job.yml:", *tokens.split()):
        opened(tmp_path, recipe, text)


def test_what_paddledetection_cannot_build_is_named(tmp_path):
    """Arguments that exist, with values that do not go together."""
    job = opened(tmp_path, "mask_rcnn", "FPN: {out_channel: wide}\n")
    with raises_naming(LibraryError, "MaskRCNN:", "TypeError"):
        job.float_model  # noqa: B018


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("ppyoloe", "PPYOLOEHead: {nms: {name: MultiClassNMS, keep_top_k: 3}}\n"),
        ("ppyoloe", "TrainReader: {mixup_epoch: 2, use_shared_memory: false}\n"),
        ("ppyoloe", "OptimizerBuilder: {optimizer: {type: Momentum, momentum: 0.9}}\n"),
        ("mask_rcnn", "BBoxHead: {roi_extractor: {resolution: 7, aligned: false}}\n"),
    ],
)
def test_what_is_known_passes(tmp_path, recipe, text):
    assert opened(tmp_path, recipe, text).float_model.sublayers()


def test_fcos_needs_objects_in_training(tmp_path, scenes):
    content = small_detector(scenes, "FCOS")
    content["TrainDataset"]["!COCODataSet"]["allow_empty"] = True
    with pytest.raises(ConfigError, match="allow_empty"):
        open_job(write_detector(tmp_path / "job.yml", content))


def test_pictures_kept_as_pickles_are_refused(tmp_path):
    text = "TrainReader: {sample_transforms: [{DecodeCache: {cache_root: /tmp/shared}}]}\n"
    with pytest.raises(ConfigError, match="DecodeCache"):
        opened(tmp_path, "ppyoloe", text)


def test_a_text_in_the_place_of_a_number(tmp_path):
    text = "OptimizerBuilder: {optimizer: {type: Momentum, momentum: '0,9'}}\n"
    with pytest.raises(ConfigError, match="momentum"):
        opened(tmp_path, "ppyoloe", text)
