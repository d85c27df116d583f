"""PaddleX's own predictors on folders and pictures. Run by the Python of an environment that has
PaddleX: `run_paddlex.py RESULTS.npz PICTURES... -- FOLDERS...`."""

import os
import sys

os.environ["PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK"] = "True"  # nothing is downloaded

import numpy as np
import paddlex
import yaml


def main(target: str, *arguments: str) -> None:
    cut = arguments.index("--")
    pictures, folders = arguments[:cut], arguments[cut + 1 :]
    found = {}
    for folder in folders:
        with open(os.path.join(folder, "inference.yml"), encoding="utf-8") as file:
            name = yaml.safe_load(file)["Global"]["model_name"]
        model = paddlex.create_model(model_name=name, model_dir=folder, device="cpu")
        for number, picture in enumerate(pictures):
            key = f"{os.path.basename(folder)}.{number}"
            options = {"threshold": 0.0} if "RCNN" in name or "YOLO" in name else {}
            (result,) = model.predict(picture, **options)
            for part, value in parts(result):
                found[f"{key}.{part}"] = value
    np.savez(target, **found)


def parts(result):
    if "pred" in result:
        yield "classes", np.asarray(result["pred"])[0]
        return
    if "boxes" in result:
        rows = [[b["cls_id"], b["score"], *b["coordinate"]] for b in result["boxes"]]
        yield "rows", np.array(rows, np.float64).reshape(-1, 6)
        for number, mask in enumerate(result.get("masks", [])):
            yield f"mask{number}", np.asarray(mask)
        return
    # Of one picture, with or without an axis for it.
    yield "class_ids", np.ravel(result["class_ids"])
    yield "scores", np.ravel(result["scores"])
    yield "names", np.ravel(result["label_names"])


main(*sys.argv[1:])
