"""Write docs/results.md from the tables in `results/`.

    python benchmark/results_page.py

Every table of the page names its file, the command that wrote it and the machine that ran it. A
test compares the page with the files, so the page always has the newest figures.
"""

import argparse
import csv
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.claims import claims_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
PAGE = ROOT / "docs" / "results.md"
WIDTH = 100  # letters of a line of prose
Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """One section of the page.

    Attributes:
        file: in `results/`.
        title: of the section.
        says: what one row is, and what is the same in all rows.
        command: that writes the file.
        columns: in order; empty takes all but the machine.
        keep: which rows are shown; the file has all.
    """

    file: str
    title: str
    says: str
    command: str
    columns: Sequence[str] = ()
    keep: Callable[[Row], bool] = lambda row: True


def is_summary(row: Row) -> bool:
    """Mean or standard deviation over seeds."""
    return row["seed"] in ("mean", "std")


GROUPS: dict[str, tuple[Table, ...]] = {
    "Zoo": (
        Table(
            "zoo_scores.csv",
            "Weights of the zoo",
            "Scores on the whole val splits, which were not used for training, at the widths in "
            "the package, as `ppvision eval -c CONFIG --model_path NAME --bits K` gives them. "
            "`bytes` are those of the codes, without the graph.",
            "python benchmark/zoo_scores.py",
            ("weights", "bits", "metric", "score", "bytes"),
        ),
    ),
    "Pale Transformer": (
        Table(
            "attention_cifar10.csv",
            "PS-Attention, stripes and shifted windows on CIFAR-10",
            "All runs have the same network and recipe; only the attention differs. The rows are "
            "mean and standard deviation over three seeds. 10,000 images, 10 epochs.",
            "python benchmark/attention_accuracy.py --data_root data/cifar10",
            ("attention", "seed", "top1", "loss"),
            is_summary,
        ),
        Table(
            "attention_scaling.csv",
            "Time and memory of one attention layer",
            "The layers have 64 channels. `side` is the height and width of the map. `growth` is "
            "the time divided by the time at half the side. `formula_growth` is the same for the "
            "multiply-adds.",
            "python benchmark/attention_scaling.py",
        ),
        Table(
            "picture_sizes.csv",
            "Sizes of pictures and pales on Tiny-ImageNet-100",
            "Short trainings of `pale_nano` from scratch, 200 steps of 64, without a teacher. "
            "`picture` is the side that the network sees, in pixels; the pictures have 64. "
            "`cpu_minutes` is the processor's time, beside other programs.",
            "python benchmark/picture_sizes.py --work_dir ~/ppvision-runs/sizes",
            ("picture", "pale_size", "steps", "top1", "loss", "cpu_minutes"),
        ),
        Table(
            "segformer_head.csv",
            "SegFormer's head",
            "`joined` is the head as PaddleSeg computes it, `folded` is our form. Exports are for "
            "one image of 512 pixels, in OpenVINO; the training step is for 8 crops of 128 pixels.",
            "python benchmark/segformer_head.py --work_dir output/segformer_head",
        ),
        Table(
            "training_step.csv",
            "A training step on a CPU",
            "`plain` is Paddle without changes. The next forms add changes one by one. `engine` is "
            "what `ppvision train` does; `to_static` is the same in a graph. `torch` is PyTorch "
            "with the same network. `over_torch` is the time divided by that of PyTorch.",
            "python benchmark/training_step.py",
            ("model", "batch", "threads", "form", "median_ms", "over_torch", "peak_mib"),
        ),
    ),
    "Semantic diffusion": (
        Table(
            "sdn_runs.csv",
            "SDN, no extra module, a plain convolution and central differences",
            "SegFormer's head, 600 steps of 4 crops of 224 pixels. The rows are mean and standard "
            "deviation over three seeds, on the whole val splits. `baseline` has no extra module.",
            "python benchmark/sdn_boundary.py --data_root data",
            ("data", "backbone", "variant", "seed", "mIoU", "BoundaryIoU", "BoundaryF3"),
            is_summary,
        ),
        Table(
            "sdn_costs.csv",
            "What SDN costs",
            "Three classes, one image of 224 pixels, exported. The ratio is the time divided by "
            "that of the same network without SDN.",
            "python benchmark/sdn_boundary.py --data_root data --costs",
            (
                *("backbone", "variant", "parameters", "multiply_adds", "engine"),
                *("ratio_1_threads", "ratio_2_threads"),
            ),
        ),
        Table(
            "sdn_operator.csv",
            "The semantic difference convolution",
            "Forward and backward on one thread. `times_plain` is the time divided by that of a "
            "plain 3x3 convolution of equal size.",
            "python benchmark/sdn_operator.py",
        ),
    ),
    "Weights to start from": (
        Table(
            "transfer.csv",
            "From scratch and from `pale_nano.tiny_imagenet_100`",
            "SegFormer's head over `pale_nano`. All runs take 1,000 steps of 8 crops of 128 "
            "pixels. Scores are on the whole val splits.",
            "OMP_NUM_THREADS=1 python benchmark/transfer.py --work_dir ~/ppvision-runs/transfer",
            ("data", "init", "seed", "mIoU", "BoundaryIoU", "BoundaryF3"),
        ),
        Table(
            "sdn_forms.csv",
            "Forms of SDN, from these weights",
            "The same recipe with 2,000 steps of 4 crops. Each form was run with one seed, "
            "`none` and the best three forms of the first seed with three.",
            "OMP_NUM_THREADS=1 python benchmark/transfer.py --work_dir ~/ppvision-runs/forms "
            "--forms",
            ("data", "form", "seed", "mIoU", "BoundaryIoU", "BoundaryF3", "parameters"),
        ),
        Table(
            "sdn_form_costs.csv",
            "What these forms cost",
            "Three classes, one image of 224 pixels, exported in float. The ratio is the time "
            "divided by that of `none`.",
            "python benchmark/transfer.py --work_dir ~/ppvision-runs/forms --costs",
        ),
        Table(
            "transfer_gpu.csv",
            "From scratch on a GPU",
            "Another recipe: 2,000 steps of 16 crops of 224 pixels, with class weights. Runs from "
            "a classifier's weights were not made there.",
            "bash benchmark/gpu/segmentation.sh (benchmark/README.md)",
            ("data", "init", "seed", "mIoU", "BoundaryIoU", "BoundaryF3", "seconds"),
        ),
        Table(
            "digit_errors.csv",
            "Where the digit model loses its score",
            "`stroke_iou` takes all digits for one class; `class_share` is the share of the pixels "
            "found on strokes that have the right digit. 240 scenes. The second row are the labels "
            "themselves, averaged over 4 x 4 pixels: the best that this stride leaves.",
            "python benchmark/digit_errors.py --data_root data/digit_scenes",
        ),
        Table(
            "detection_runs.csv",
            "Detectors",
            "`bccd` is PP-YOLOE on blood cells, from scratch. `scenes` is Mask R-CNN on digit "
            "scenes. One seed.",
            "python benchmark/detection.py --data_root data",
            ("case", "bits", "bbox_AP", "bbox_AP50", "mask_AP50", "parameters", "epochs"),
        ),
    ),
    "Widths": (
        Table(
            "layered_cifar10.csv",
            "One training for all widths, and one for each width, CIFAR-10",
            "The rows of ResNet-20 are mean and standard deviation over three seeds; `pale_nano` "
            "was run with one seed. 10,000 images.",
            "python benchmark/layered_cifar10.py --data_root data/cifar10",
            ("network", "method", "bits", "seed", "top1", "cpu_minutes"),
            lambda row: is_summary(row) or row["network"] == "pale_nano",
        ),
        Table(
            "layered_dsb2018.csv",
            "The same on nuclei",
            "`pale_nano` under SegFormer's head, one seed.",
            "python benchmark/layered_segmentation.py --data_root data",
            ("method", "bits", "mIoU", "BoundaryIoU", "steps", "cpu_minutes"),
        ),
        Table(
            "layered_imagenet.csv",
            "EfficientNet-Lite0 at every width without training",
            "`agreement` is the fraction of photographs for which a width gives the class of the "
            "float model. BatchNorm has the float model's statistics, or its own, which are "
            "estimated again.",
            "python benchmark/layered_imagenet.py --packages output/imagenet --photographs "
            "data/camvid/images/val",
        ),
        Table(
            "layered_size.csv",
            "Bytes and milliseconds of layered models",
            "The models have widths from 8 to 2 bits. They are exported and run in Paddle "
            "Inference.",
            "python benchmark/layered_size.py",
            (
                *("network", "bits", "layered_bytes", "export_bytes", "engine"),
                *("latency_over_float", "load_s_over_float"),
            ),
        ),
        Table(
            "integer_latency.csv",
            "8-bit integers in Paddle Inference",
            "Integers and float run in turn in the same engine. `bytes` is the size of the whole "
            "folder. Packed codes at batch 8 are in an earlier form, which takes longer to load.",
            "python benchmark/integer_latency.py --work_dir output/integers --batches 1 "
            "--seconds 10\npython benchmark/integer_latency.py --work_dir output/integers "
            "--batches 8 --seconds 15 --models resnet50 pale_tiny",
        ),
        Table(
            "integer_rivals.csv",
            "8-bit integers of other programs",
            "One network and the same calibration pictures; all take turns on one picture. The "
            "ratios are to our integers and to the same program in float; labels and error are "
            "against our float. Labels and errors of the AMD EPYC are from before the steps of "
            "activations came from all channels (CHANGELOG.md).",
            "python benchmark/integer_rivals.py --work_dir output/rivals --time --rivals_python "
            "output/rivals-venv/bin/python",
            (
                *("model", "program", "arithmetic", "threads", "ms", "over_our_int8"),
                *("over_float", "bytes", "same_labels", "error", "machine"),
            ),
        ),
        Table(
            "integer_scores.csv",
            "What integers cost in score",
            "`int8`: `export --int8`; `ptq`: `pack --ptq --activations 8`, then `export --bits "
            "--int8`; both without training. `once_qat`: codes that were learned. Whole val "
            "splits; `loss_points` is the score lost against float, times 100. Of the photographs "
            "only the agreement with float counts: 64 others calibrated. Float weights of the "
            "zoo are those of its 8-bit codes. Rows of the AMD EPYC with calibration or codes are "
            "from before the steps of activations came from all channels (CHANGELOG.md), and "
            "those of digit scenes are of earlier weights; rows of the Intel Xeon are newer.",
            "PYTHONPATH=output/imagenet python benchmark/integer_scores.py --work_dir "
            "output/integer_scores",
            (
                *("name", "kind", "bits", "arithmetic", "runs_in", "metric", "score"),
                *("loss_points", "agreement", "standard_error", "pictures", "machine"),
            ),
        ),
        Table(
            "once_qat_seeds.csv",
            "Once-QAT in integers over seeds",
            "From the zoo's weights of digit scenes, the same steps in float and with once-QAT at "
            "8, 4 and 2 bits with inputs of layers at 8 bits; every exported folder is scored on "
            "the whole val split. The rows are mean and standard deviation over three seeds, from "
            "the earlier weights (mIoU 0.529).",
            "python benchmark/once_qat_seeds.py --work_dir output/once_qat_seeds",
            ("training", "bits", "arithmetic", "seed", "miou"),
            is_summary,
        ),
    ),
    "Deployment": (
        Table(
            "widths.csv",
            "Every width, in float and in integers",
            "The models that the quickstart trains, for one image of 112 x 112. All run in turn on "
            "one thread. The ratio is the time divided by that of float in Paddle Inference. ONNX "
            "Runtime runs the same network.",
            "python benchmark/widths.py --quickstart output/quickstart --work_dir output/widths",
            ("name", "bits", "mIoU", "bytes", "ms", "ratio"),
        ),
        Table(
            "deploy_latency.csv",
            "Exported Pale in several engines",
            "Medians of the runs. `paddle` is our export in Paddle Inference. `paddle_over_it` is "
            "its time divided by that of the engine.",
            "python benchmark/deploy_latency.py",
            ("model", "task", "batch", "threads", "engine", "median_ms", "paddle_over_it"),
            lambda row: row["batch"] == "1",
        ),
        Table(
            "deploy_steps.csv",
            "Forms of the graph in oneDNN, fixed size",
            "`graph` is the form in exports. `as deployed` has the passes of `Predictor`; `+` adds "
            "a pass, `-` removes one. `over_deployed` is the time divided by that of `graph` as "
            "deployed.",
            "python benchmark/deploy_steps.py",
        ),
        Table(
            "any_size.csv",
            "Forms of the graph in oneDNN, free sizes",
            "The columns are those of the table above.",
            "python benchmark/deploy_steps.py --any_size --models pale_nano pale_tiny "
            "--sides 224 512",
        ),
        Table(
            "deploy_profile_pale_tiny_1.csv",
            "Where an export spends its time in oneDNN",
            "From oneDNN's own log, at 224 pixels. `a_run` is the number of calls per run, `ms` "
            "their time per run.",
            "python benchmark/deploy_profile.py --model pale_tiny --threads 1",
            ("model", "threads", "kind", "a_run", "ms"),
        ),
        Table(
            "pointwise_layers.csv",
            "1x1 convolutions and Linear as pointwise layers",
            "The pass is `matmul_add_act_fuse_pass`.",
            "python benchmark/pointwise_layers.py",
            (
                *("model", "size", "batch", "threads", "pointwise", "setting", "median_ms"),
                *("min_ms", "max_ms", "repeats"),
            ),
        ),
        Table(
            "predictor_threads.csv",
            "One `Predictor`, several threads",
            "Images per second. With `shared`, all callers use one Predictor. With `own`, each "
            "caller has a Predictor.",
            "python benchmark/predictor_threads.py --seconds 2 --rounds 4",
        ),
        Table(
            "predict_pipeline.csv",
            "Time of `predict` outside the model",
            "The data are a folder of 200 photographs. `over_the_graph_alone` is the time per "
            "image divided by that of the graph alone.",
            "python benchmark/predict_pipeline.py --photographs data/camvid/images/val",
        ),
        Table(
            "picture_reading.csv",
            "The image reader and a plain decode",
            "The ratio is the time divided by that of `cv2.imread`.",
            "python benchmark/picture_reading.py --rounds 9",
            ("format", "pixels", "kilobytes", "imread_ms", "read_picture_ms", "ratio"),
        ),
        Table(
            "import_time.csv",
            "`from ppvision.deploy import Predictor`, without Paddle's own import",
            "The current and an earlier revision, in turn.",
            "python benchmark/import_time.py --before 4a335d5",
            ("tree", "predictor_ms", "modules", "share"),
        ),
        Table(
            "openvino_networks.csv",
            "Networks that OpenVINO does not run",
            "All other networks that were tried run and give the numbers of the model. The file "
            "has all of them.",
            "python benchmark/openvino_networks.py",
            ("network", "traced", "runs", "reason"),
            lambda row: row["runs"] != "yes",
        ),
    ),
}

HEAD = """# Results

`python benchmark/results_page.py` writes this page from the tables in `benchmark/results/`; do not
edit it by hand. The files may have more rows and columns than this page. Times are medians on an
otherwise idle machine. Compare times within one table only, because machines differ.

No test runs these commands: they take minutes to hours, and many need data sets or packages that
you download.
"""


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def machine_of(row: Row) -> str:
    """The machine of a row: one column, or the columns of the processor and its cores."""
    if "processor" in row:
        return f"{row['processor']}, {row['cores']} cores"
    return row.get("machine", "")


def section(table: Table, results: Path) -> str:
    """A section of the page; empty where nothing was measured yet.

    Raises:
        ValueError: a column that the file lacks, or no row that is to be shown.
    """
    if not (results / table.file).exists():
        return ""
    rows = read(results / table.file)
    columns = list(table.columns or (name for name in rows[0] if name != "machine"))
    missing = [name for name in columns if name not in rows[0]]
    shown = [row for row in rows if table.keep(row)]
    if missing or not shown:
        raise ValueError(
            f"{table.file}: expected columns {columns} and rows to show; missing: {missing}, "
            f"{len(shown)} rows."
        )
    machines = dict.fromkeys(machine for row in rows if (machine := machine_of(row)))
    lines = [
        f"### {table.title}\n",
        textwrap.fill(table.says, WIDTH, break_on_hyphens=False, break_long_words=False) + "\n",
        f"```bash\n{table.command}\n```\n",
        textwrap.fill(
            f"`benchmark/results/{table.file}`; {' and '.join(machines) or 'machine not noted'}.",
            WIDTH,
            break_on_hyphens=False,
            break_long_words=False,
        )
        + "\n",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row[name] or '-' for name in columns)} |" for row in shown),
    ]
    return "\n".join(lines) + "\n"


def render(results: Path = RESULTS) -> str:
    """The page."""
    parts = [HEAD]
    for title, tables in GROUPS.items():
        found = [text for table in tables if (text := section(table, results))]
        parts += [f"## {title}\n", *found] if found else []
    return "\n".join([*parts, claims_section()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(render(), encoding="utf-8")
        print(PAGE)
    elif PAGE.read_text(encoding="utf-8") != render():
        raise SystemExit(f"{PAGE}: expected what the tables say; run this without --check.")


if __name__ == "__main__":
    main()
