"""Convert data sets of the user into the formats for training with ppvision.

All converters write `classes.txt`, `dataset.json` and the layout of digit-scenes: `images/`,
`labels/`, `train.txt` and `val.txt` (PaddleSeg), `annotations/instances_*.json` (COCO, file names
start from `images/`), `classes/{train,val}/NAME/` (class folders). Nothing is downloaded and no
source is changed.
"""

from ppvision.data.convert.bccd import convert_bccd
from ppvision.data.convert.camvid import convert_camvid
from ppvision.data.convert.cifar10 import convert_cifar10
from ppvision.data.convert.dsb2018 import convert_dsb2018

CONVERTERS = {
    "dsb2018": convert_dsb2018,
    "camvid": convert_camvid,
    "bccd": convert_bccd,
    "cifar10": convert_cifar10,
}

__all__ = ["CONVERTERS", "convert_bccd", "convert_camvid", "convert_cifar10", "convert_dsb2018"]
