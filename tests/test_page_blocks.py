"""Every `bash`, `console` and `python` block of README and docs is run here, or by a test that
`ELSEWHERE` names, or has a mark with the reason why not (`tests/helpers/pages.py`).

The blocks of a page run in their order in one folder, with `--all`. It looks like a clone of the
project whose set-up is done. A story makes the reader's own files first, small.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.configs import ROOT
from tests.helpers.forked_python import serve_python
from tests.helpers.pages import PAGES, RUNNABLE, Block, blocks_of, find_blocks, read_page

# Pages without marks, and a sentence that they have in their place.
WHOLE_PAGES = {
    "docs/results.md": "No test runs these commands",
    "docs/reference_python.md": "writes this page from the code",  # signatures; tests/test_site.py
}

# Blocks that other tests run: the page, what such a block has, the test.
ELSEWHERE = [
    ("docs/zoo.md", "", "test_face.py", "test_the_page_about_the_zoo_runs"),
    ("docs/extending.md", "", "test_extending.py", "test_the_page_runs"),
    ("docs/training.md", "import wandb", "test_tensorboard.py", "test_the_callback_of_the_page"),
]


@dataclass(frozen=True)
class Story:
    """What a page's blocks need.

    Attributes:
        before, after: bash, before the first block and after the last.
        files: where the YAML blocks with these words go; with `>>` to the end of that file.
        changes: words of blocks, and what is run in their place: the same with fewer steps, without
            a server of others, or watched. Each has to occur.
        python: code before the Python blocks with these words: names that the page leaves open.
        shows: what the blocks print.
    """

    before: str = ""
    after: str = ""
    files: dict[str, str] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)
    python: dict[str, str] = field(default_factory=dict)
    shows: tuple[str, ...] = ()


# Until the page answers; VisualDL runs until it is stopped.
DASHBOARD = {"bash scripts/dashboard.sh": "open_page bash scripts/dashboard.sh"}
# Trains a small network to output/mine, exports it to inference/mine.
MINE = """
ppvision train -c {config} --do_eval --save_dir output/mine
ppvision export -c {config} --model_path output/mine/best_model/model.pdparams \
    --save_dir inference/mine
"""
README = Story(
    before="make pairs data/mine; make photos photos; make BCCD BCCD_Dataset/BCCD",
    files={"iters: 2000": "configs/segmentation/mine.yml"},
    changes={"iters: 2000": "iters: 2"} | DASHBOARD,
    shows=("3,219,846", "AP50", "[32, 64, 128, 256]", "['RBC', 'WBC', 'Platelets']", "mIoU"),
)
STORIES = {
    "README.md": README,
    "README_cn.md": README,
    "docs/coming_from_paddledetection.md": Story(
        before="make detection mine.yml; make photos photos", shows=("AP50",)
    ),
    "docs/coming_from_paddleseg.md": Story(
        before="""
            make segmentation mine.yml; make photos photos
            mkdir tools
            cat >tools/train.py <<'END'
import sys

from paddleseg.cvlibs import manager

print(sys.argv[1:], "pale_nano" in manager.BACKBONES.components_dict)
END
        """,
        shows=("mIoU", "['--config', 'C.yml', '--do_eval'] True"),
    ),
    "docs/compatibility.md": Story(shows=("Total Flops",)),
    "docs/console.md": Story(
        before="make segmentation mine.yml; cp mine.yml CONFIG" + MINE.format(config="mine.yml"),
        changes={"--model_path MODEL": "--model_path output/mine/best_model/model.pdparams"},
    ),
    "docs/data.md": Story(
        before="""
            for name in stage1_train CamVid BCCD; do make $name $name; done
            make cifar10 cifar10.tar.gz; make pairs data/mine
        """,
        changes={"--count 1200": "--count 12"},
    ),
    "docs/deployment.md": Story(
        before="make segmentation CONFIG; make photos photos" + MINE.format(config="CONFIG"),
        python={"labels = predictor": "import numpy"},
    ),
    "docs/detection.md": Story(
        before="""
            sed -i 's/^epoch: .*/epoch: 1/' configs/detection/*.yml
            make coco data/mine; make photos photos; make BCCD BCCD
            ppvision data bccd --source BCCD --output data/bccd
            ppvision train -c configs/detection/ppyoloe_pale_nano_bccd.yml --do_eval \
                --save_dir output/ppyoloe_pale_nano_bccd
            # With what PaddleDetection's own runtime.yml has.
            cat >mine.yml <<'END'
_BASE_: [configs/detection/mine.yml]
TestDataset: !ImageFolder {}
use_gpu: false
use_npu: false
use_mlu: false
use_xpu: false
worker_num: 0
log_iter: 1
snapshot_epoch: 1
save_dir: output
filename: mine
END
        """,
        files={"COCODataSet\n  dataset_dir: data/mine": ">>configs/detection/mine.yml"},
        changes=DASHBOARD,
        shows=("AP50",),
    ),
    "docs/integers.md": Story(
        before="""
            make segmentation CONFIG.yml; cp -r data/own/images data/train_pictures
        """
        + MINE.format(config="CONFIG.yml"),
        changes={
            "WEIGHTS": "output/mine/best_model/model.pdparams",
            "1 3 512 512": "1 3 112 112",
        },
        python={
            "export_model(": """
import ppvision

model = ppvision.create_model("resnet20")
TRANSFORMS = [{"type": "Resize", "target_size": [224, 224]}, {"type": "Normalize"}]
"""
        },
    ),
    "docs/layered.md": Story(
        before="""
            make segmentation CONFIG; make photos photos
            ppvision train -c CONFIG --do_eval --save_dir output/float
            cp output/float/best_model/model.pdparams float.pdparams
            ppvision export -c CONFIG --model_path float.pdparams --save_dir inference/mine-float
        """,
        changes={"https://example.org/mine.layered": "mine.layered"},
        python={
            "OnceQAT(LayeredQAT": """
from pathlib import Path

from ppvision.tasks import open_job

model = open_job(Path("CONFIG")).load(Path("float.pdparams"), None)
""",
            "class LayeredMine": """
from paddle import nn
from paddleslim.quant import SlimQuantConfig
from ppvision.quant.train.layers import LayeredLayer

Mine = type("Mine", (nn.Linear,), {})
config = SlimQuantConfig(activation=None, weight=None)
""",
            "set_bits(2)": "from ppvision import Predictor",
        },
    ),
    "docs/paddleslim.md": Story(
        before="make photos data/train_pictures",
        python={
            "SlimQAT(config).quantize(net": """
import paddle
from paddle import nn

net = nn.Sequential(
    nn.Conv2D(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(8, 5)
)
example = paddle.rand([1, 3, 224, 224])
train = lambda model: model(example)
TRANSFORMS = [{"type": "Resize", "target_size": [224, 224]}, {"type": "Normalize"}]
"""
        },
    ),
    "docs/prediction.md": Story(
        before="make segmentation configs/mine.yml; make photos photos"
        + MINE.format(config="configs/mine.yml"),
    ),
    "docs/quickstart.md": Story(
        before="""
            config=configs/segmentation/segformer_pale_nano_digit_scenes.yml
            make photos photos
            ppvision data digit-scenes --output data/digit_scenes --count 12 --size 56
            ppvision train -c $config --iters 2 --use_vdl --do_eval --save_dir output/quickstart/run
            ppvision export -c $config --save_dir output/quickstart/inference \
                --model_path output/quickstart/run/best_model/model.pdparams
        """,
        changes=DASHBOARD,
    ),
    "docs/sdn.md": Story(
        python={
            "metric.update(pred, label)": "import numpy\n\npred = label = numpy.eye(8, dtype=int)"
        }
    ),
    "docs/segmentation.md": Story(
        before="make pairs data/mine; make photos photos",
        after="ppvision train -c configs/segmentation/mine_sdn.yml --save_dir output/mine_sdn",
        files={
            "iters: 2000": "configs/segmentation/mine.yml",
            "_base_: mine.yml": "configs/segmentation/mine_sdn.yml",
        },
        changes={"iters: 2000": "iters: 2", "ppvision dashboard": "open_page ppvision dashboard"},
        shows=("mIoU",),
    ),
    "docs/smaller_and_faster.md": Story(
        before="""
            make segmentation base.yml; make photos photos
            echo '_base_: base.yml' >CONFIG.yml
        """,
        files={"target_size: [112, 112]": ">>CONFIG.yml"},
        shows=("mIoU", "int8", "speed-up"),
    ),
    "docs/training.md": Story(
        before="""
            make classification small.yml
            for run in first second; do
                ppvision train -c small.yml --use_vdl --do_eval --save_dir output/$run
            done
        """,
        changes={
            "train.sh configs/classification/pale_nano_digits.yml": (
                "train.sh configs/classification/pale_nano_digits.yml --iters 2 "
                "-o lr_scheduler.warmup_epochs=0"
            )
        }
        | DASHBOARD,
        python={"cpu_training(model)": "from paddle import nn\n\nmodel = nn.Linear(2, 2)"},
        shows=("top1",),
    ),
}

# Before each bash block.
PRELUDE = """
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
make() { python -m tests.helpers.page_data "$@"; }
open_page() { # COMMAND...: until the page that it shows answers
    "$@" >page.txt 2>&1 &
    until grep -q 'VisualDL: .* stops it' page.txt; do kill -0 $! && sleep 0.2; done
    # VisualDL fails for a browser that names no language.
    curl --silent --fail --location --header 'Accept-Language: en' --output page.html \\
        "$(sed -n 's/^VisualDL: \\([^ ]*\\) .*/\\1/p' page.txt)"
    grep -q VisualDL page.html
    kill $!
    wait $! || [ $? = 143 ]
}
"""
LIMIT = 3600  # seconds of a block; the longest took 900 while other programs ran


# -- the rule --------------------------------------------------------------------------------------


def is_elsewhere(block: Block) -> bool:
    return any(block.page == page and words in block.text for page, words, *_ in ELSEWHERE)


def runnable_blocks(page: str) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in RUNNABLE]


def find_undecided(blocks: list[Block], page_is_run: bool) -> list[str]:
    """Blocks that are neither run nor marked, or both."""
    wrong = []
    for block in blocks:
        if block.reason is not None and is_elsewhere(block):
            wrong.append(f"{block}: has a mark, and a test runs it: remove the mark")
        if block.reason is None and not page_is_run and not is_elsewhere(block):
            wrong.append(f"{block}: give its page a story in {Path(__file__).name}, or mark it")
        if block.reason is not None and len(block.reason.split()) < 3:
            wrong.append(f"{block}: expected a reason in the mark, got {block.reason!r}")
    return wrong


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WHOLE_PAGES])
def test_each_block_is_run_or_marked(page):
    text, blocks = read_page(page), blocks_of(page)
    assert find_undecided(runnable_blocks(page), page in STORIES) == []
    # None is overlooked: of another form of fence, or with a mark in another place.
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks)
    marks = re.findall(r"^<!-- not run by tests:", text, re.MULTILINE)
    assert len(marks) == sum(block.reason is not None for block in blocks)
    for block in blocks:
        assert block.language in (*RUNNABLE, "yaml", "text", "bibtex", ""), block
        assert block.reason is None or block.language in RUNNABLE, block


@pytest.mark.parametrize(("page", "sentence"), WHOLE_PAGES.items())
def test_pages_that_are_not_run_say_so(page, sentence):
    assert sentence in read_page(page).partition("\n## ")[0]


@pytest.mark.parametrize(("page", "words", "file", "test"), ELSEWHERE)
def test_other_tests_that_run_blocks_are_there(page, words, file, test):
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert f"def {test}(" in source
    assert Path(page).name in source
    assert any(words in block.text for block in runnable_blocks(page))


def test_a_story_runs_something():
    for page in STORIES:
        assert any(b.reason is None and not is_elsewhere(b) for b in runnable_blocks(page)), page


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("```bash\nls\n```\n", 1),
        ("<!-- not run by tests: needs a\nlarge GPU -->\n```bash\nls\n```\n", 0),
        ("<!-- not run by tests:  -->\n```bash\nls\n```\n", 1),
        ("<!-- not run by tests: needs a GPU -->\n\n```bash\nls\n```\n", 1),
        ("<!-- not run by tests: needs a GPU -->\n```bash\nls\n```\n\n```python\n1\n```\n", 1),
    ],
)
def test_a_new_block_has_to_decide(text, count):
    assert len(find_undecided(find_blocks("new.md", text), page_is_run=False)) == count


def test_a_block_is_not_both():
    block = Block("docs/zoo.md", 1, "python", "1", "needs a GPU")
    assert len(find_undecided([block], page_is_run=False)) == 1


# -- the stories -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with serve_python(tmp_path_factory.mktemp("programs") / "bin") as folder:
        (folder / "activate").write_text(f'export PATH="{folder}:$PATH"\n')
        yield folder


@pytest.fixture
def clone(programs, tmp_path, monkeypatch) -> Path:
    """Scripts, configs and `.venv` of the project, in a folder of this test. It is the current one,
    with `python` and `ppvision` on PATH."""
    folder = tmp_path / "clone"
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    root = '"$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"'
    (folder / "scripts" / "setup.sh").write_text(f"ppvision_root={root}\n")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(programs)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    return folder


def run(command: list[str], text: str, name: str) -> str:
    """Give a program a text; returns what it printed."""
    done = subprocess.run(
        [*command, text],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{text}\n{done.stdout}"
    return done.stdout


def run_bash(text: str, name: str) -> str:
    return run(["bash", "-c"], PRELUDE + text, name)


def run_block(block: Block, text: str, story: Story) -> str:
    """Run a block, or write it; returns what it printed."""
    if block.language == "yaml":
        for words, path in story.files.items():
            if words in block.text:
                with open(path.removeprefix(">>"), "a" if ">>" in path else "w") as file:
                    file.write(text)
        return ""
    if block.language == "python":
        before = "".join(code for words, code in story.python.items() if words in block.text)
        return run(["python", "-c"], f"{before}\n{text}", str(block))
    if block.language == "console":  # commands after a prompt, then what they print
        text = "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))
    return run_bash(text, str(block))


@pytest.mark.all
@pytest.mark.parametrize("page", STORIES)
def test_the_blocks_of_a_page_run(page, clone):
    story = STORIES[page]
    unused = set(story.changes) | set(story.files) | set(story.python)
    printed = run_bash(story.before, f"{page}, before")
    for block in blocks_of(page):
        if block.reason is not None or is_elsewhere(block):
            continue
        if block.language in (*RUNNABLE, "yaml"):
            unused -= {words for words in unused if words in block.text}
            text = block.text
            for words, other in story.changes.items():
                text = text.replace(words, other)
            printed += run_block(block, text, story)
    run_bash(story.after, f"{page}, after")
    assert not unused, f"{page}: no block has {sorted(unused)}"
    assert [shown for shown in story.shows if shown not in printed] == []
