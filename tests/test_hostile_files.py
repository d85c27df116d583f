"""Files of strangers: nothing executes, nothing explodes, every error is ours.

Half of the mutations change bytes anywhere, half one value inside a valid document. All of them
with the `all` mark; a tenth by default.
"""

import bz2
import dataclasses
import datetime
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import pickle
import re
import struct
import tarfile
import zlib
from collections import Counter, OrderedDict
from random import Random

import numpy as np
import paddle
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save

from ppvision.data.convert import cifar10
from ppvision.errors import ConfigError, DataError, shorten
from ppvision.quant import LayeredModelError, load_layered, save_layered
from ppvision.quant.store import files as layered_files
from ppvision.quant.store.state import extract_state
from ppvision.safe_yaml import Located, format_yaml, load_yaml
from ppvision.tasks.config import apply_options, import_modules, read_yaml
from ppvision.zoo.weights import WeightsError, read_pdparams
from tests.helpers.configs import classification_config
from tests.helpers.fuzz import mutate_bytes, mutate_document, mutate_pickle, with_header
from tests.helpers.hostile_readers import convert_tar
from tests.helpers.limits import check_reader, find_outcomes
from tests.helpers.messages import raises_naming
from tests.helpers.small_detectors import small_detector, write_detector
from tests.helpers.small_layered import BITS, CONFIG, tiny_once_qat

COUNTS = [100, pytest.param(1000, marks=pytest.mark.all)]
PDPARAMS = "ppvision.zoo.weights:read_pdparams"
WEIGHTS = "ppvision.zoo.weights:read_weights"
READERS = "tests.helpers.hostile_readers"


def valid_pdparams(folder) -> list[bytes]:
    """Small ones of each protocol, as Paddle writes them and with what else arrays can be."""
    layer = paddle.nn.Sequential(paddle.nn.Conv2D(2, 3, 3), paddle.nn.BatchNorm2D(3))
    found = []
    for protocol in (2, 3, 4):
        paddle.save(layer.state_dict(), str(folder / "model.pdparams"), protocol=protocol)
        found.append((folder / "model.pdparams").read_bytes())
    arrays = OrderedDict(
        a=np.asfortranarray(np.arange(6.0).reshape(2, 3)), b=np.array(True), c=("c", np.ones(3))
    )
    return found + [pickle.dumps(arrays, protocol=protocol) for protocol in (2, 4, 5)]


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_pdparams(tmp_path, count):
    random, valid = Random(count), valid_pdparams(tmp_path)
    changes = (mutate_bytes, mutate_pickle)
    inputs = [changes[i % 2](random.choice(valid), random) for i in range(count)]
    found = check_reader(PDPARAMS, valid + inputs, tmp_path / "inputs", "model.pdparams")
    assert found["WeightsError"] > count / 2
    assert found["read"] >= len(valid)
    assert set(found) == {"WeightsError", "read"}


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
ARRAY = RECONSTRUCT + b"K\x00\x85C\x01b\x87R"
STATE = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
FLOAT32 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R" + STATE
BYTE = FLOAT32.replace(b"f4", b"u1")
FROM_BUFFER = b"cnumpy._core.numeric\n_frombuffer\n"
HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 62)


def array_of(shape: bytes, kind: bytes, content: bytes) -> bytes:
    """A file `{"a": array}` whose parts are pickled already."""
    return pickled(
        b"}X\x01\x00\x00\x00a", ARRAY, b"(K\x01", shape, kind, b"\x89", content, b"tb", b"s"
    )


def test_the_hand_written_array_is_read(tmp_path):
    path = tmp_path / "a.pdparams"
    path.write_bytes(array_of(b"K\x02\x85", FLOAT32, b"C\x08" + np.float32([1, 2]).tobytes()))
    np.testing.assert_array_equal(read_pdparams(path)["a"], [1, 2])
    assert pickle.loads(path.read_bytes())["a"].shape == (2,)  # and is what pickle knows


# Each would crash, hang or fill memory in `pickle`, or in a reader that trusts sizes.
ATTACKS = {
    "a memo index of 4 GiB": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a memo index that is not there": pickled(b"h\x07"),
    "a shape of 2^62 numbers": array_of(b"J\xff\xff\xff\x7f" * 2 + b"\x86", FLOAT32, b"C\x00"),
    "a negative side": array_of(b"J\xff\xff\xff\xff\x85", FLOAT32, b"C\x00"),
    "no numbers, but huge sides": array_of(b"K\x00" + HUGE + HUGE + b"\x87", FLOAT32, b"C\x00"),
    "200 axes": array_of(b"(" + b"K\x01" * 200 + b"t", FLOAT32, b"C\x04aaaa"),
    "objects": array_of(b"K\x01\x85", FLOAT32.replace(b"f4", b"O8"), b"C\x08aaaaaaaa"),
    "a type with fields": array_of(
        b"K\x01\x85", FLOAT32.replace(b"NNNJ", b"NX\x01\x00\x00\x00a\x85}J"), b"C\x04aaaa"
    ),
    "a type with a size of its own": array_of(
        b"K\x01\x85", FLOAT32.replace(b"NNNJ\xff\xff\xff\xff", b"NNNJ\xff\xff\xff\x7f"), b"C\x01a"
    ),
    "a type with a state of arrays": array_of(
        b"K\x01\x85", FLOAT32.removesuffix(STATE) + b"(" + ARRAY * 8 + b"tb", b"C\x04aaaa"
    ),
    "an array as its own state": pickled(ARRAY, b"\x940h\x00b"),
    "one array's bytes for a thousand": pickled(
        b"C\xff" + b"a" * 255 + b"\x94](",
        (FROM_BUFFER + b"(h\x00" + BYTE + b"K\xff\x85X\x01\x00\x00\x00CtR") * 1000 + b"e",
    ),
    "text that becomes bytes a thousand times": pickled(
        b"X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"\x94](",
        b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 1000 + b"e",
    ),
    "a dict that is made ten thousand times": pickled(
        b"](" + b"".join(b"X\x02\x00\x00\x00%02dN\x86" % i for i in range(99)) + b"e\x94](",
        b"ccollections\nOrderedDict\nh\x00\x85R" * 10_000 + b"e",
    ),
    "a million empty dicts": pickled(b"}" * 1_000_000),
    "a million marks": pickled(b"(" * 1_000_000),
    "tuples in tuples": pickled(b")" + b"\x85" * 200_000),
    "tuples in tuples as a key": pickled(b"})" + b"\x85" * 200_000 + b"Ns"),
    "tuples in tuples as a shape": array_of(b")" + b"\x85" * 200_000, FLOAT32, b"C\x00"),
    "a list in itself": pickled(b"]\x94h\x00a"),
    "a huge integer": pickled(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)),
    "integers, which can collide, as keys": pickled(b"}K\x01Ns"),
    "bytes beyond the file": pickled(b"\x8e" + struct.pack("<Q", 1 << 62)),
    "text beyond the file": pickled(b"\x8d" + struct.pack("<Q", (1 << 64) - 1)),
    "a name without an end": pickled(b"c" + b"a" * 1_000_000),
    "a persistent id": pickled(b"N\x51"),
    "an object": pickled(b"cos\nsystem\n)\x81"),
    "eval, as Paddle's own": pickled(b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R"),
    "a call of the array type": pickled(b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R"),
    "an array by the file's word": pickled(RECONSTRUCT, b"J\xff\xff\xff\x7f\x85C\x01b\x87R"),
    "nothing": b"",
    "an end without a value": b"\x80\x04.",
}
# What is refused for its cost is refused for that reason.
REASONS = {
    "a shape of 2^62 numbers": "bytes",
    "no numbers, but huge sides": "shape",
    "objects": "numbers 'O8'",
    "a type with fields": "state number's type",
    "one array's bytes for a thousand": "share",
    "text that becomes bytes a thousand times": "share",
    "a dict that is made ten thousand times": "operations",
    "a million empty dicts": "operations",
    "integers, which can collide, as keys": "text keys",
    "eval, as Paddle's own": "'builtins.eval' code",
}


@pytest.mark.parametrize("name", REASONS)
def test_an_attack_is_refused_for_its_reason(tmp_path, name):
    (tmp_path / "model.pdparams").write_bytes(ATTACKS[name])
    with raises_naming(WeightsError, *REASONS[name].split()):
        read_pdparams(tmp_path / "model.pdparams")


def test_attacks_on_pdparams(tmp_path):
    found = check_reader(PDPARAMS, list(ATTACKS.values()), tmp_path / "inputs", "model.pdparams")
    assert found == {"WeightsError": len(ATTACKS)}


def test_the_attacks_work_on_pickle(tmp_path):
    """They are what they say: the child process dies, or runs out of memory."""
    for name in ("a memo index of 4 GiB", "tuples in tuples as a key"):
        with pytest.raises(AssertionError, match="00001"):
            check_reader(
                f"{READERS}:read_by_pickle",
                [b"", ATTACKS[name]],
                tmp_path / name,
                "model.pdparams",
            )


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_safetensors(tmp_path, count):
    random = Random(count)
    valid = save({"a": np.ones((2, 3), np.float32), "b": np.zeros(0, np.int8), "c": np.ones(())})
    size = 8 + int.from_bytes(valid[:8], "little")
    header, rest = json.loads(valid[8:size]), valid[size:]
    inputs = [
        with_header(mutate_document(header, random), rest) if i % 2 else mutate_bytes(valid, random)
        for i in range(count)
    ]
    found = check_reader(WEIGHTS, [valid, *inputs], tmp_path / "inputs", "model.safetensors")
    assert found["WeightsError"] > count / 2
    assert set(found) == {"WeightsError", "read"}


def test_attacks_on_safetensors(tmp_path):
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    attacks = [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 200 << 20) + b"{" + b" " * 1000,
        struct.pack("<Q", 17 << 20) + b"{" + b" " * ((17 << 20) - 2) + b"}",
        with_header({"a": one | {"shape": [1 << 62, 1 << 62]}}, b"aaaa"),
        with_header({"a": one | {"data_offsets": [0, 1 << 60]}}, b"aaaa"),
        with_header({"a": one | {"data_offsets": [4, 0]}}, b"aaaa"),
        with_header({"a": one | {"dtype": "x" * 100_000}}, b"aaaa"),
        with_header({"a": one, "b": one}, b"aaaa"),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        b"\x07" + bytes(7) + b"{" + b" " * 100,
    ]
    found = check_reader(WEIGHTS, attacks, tmp_path / "inputs", "model.safetensors")
    assert found == {"WeightsError": len(attacks)}


JOB = """\
task: segmentation
batch_size: 4
iters: 100
train_dataset: &data
  type: Dataset
  dataset_root: data/scenes
  train_path: data/scenes/train.txt
  num_classes: 11
  mode: train
  transforms:
    - {type: Resize, target_size: [112, 112]}
    - type: Normalize
val_dataset:
  <<: *data
  mode: val
optimizer: {type: SGD, momentum: 0.9, weight_decay: 4.0e-5}
lr_scheduler: {type: PolynomialDecay, learning_rate: 1e-2, end_lr: 0, power: 0.9}
loss: {types: [{type: CrossEntropyLoss}], coef: [1]}
model:
  type: SegFormer
  num_classes: 11
  backbone: {type: pale_nano}
"""


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_configs(tmp_path, count, scenes, crops):
    """One child reads those of the three tasks: to import the tasks takes longer than to read."""
    jobs = {
        "segmentation": yaml.safe_load(JOB),
        "classification": classification_config(crops),
        "detection": small_detector(scenes, "FCOS"),
    }

    def written(content: dict) -> bytes:
        try:
            return write_detector(tmp_path / "job.yml", content).read_bytes()
        except (AttributeError, TypeError, ValueError):  # a tag's mapping is none any more
            return yaml.safe_dump(content, sort_keys=False).encode()

    inputs = []
    for task, document in jobs.items():
        random = Random(count)
        valid = written(document) if task != "segmentation" else JOB.encode()
        inputs += [valid] + [
            written(mutate_document(document, random)) if i % 2 else mutate_bytes(valid, random)
            for i in range(count)
        ]
    outcomes = find_outcomes(f"{READERS}:check_config", inputs, tmp_path / "in", "job.yml")
    for place, task in enumerate(jobs):
        found = Counter(outcomes[place * (count + 1) :][: count + 1])
        assert found["ConfigError"] > count / 4, task
        # `imports` of a module that is not there, a schedule's lengths in our own words
        assert set(found) <= {"ConfigError", "InputError", "read"}, task


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
MERGES = "a: &a {k0: 1, k1: 2}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}], {b}1: 1}}\n"
    for a, b in itertools.pairwise("abcdefghi")
)
YAML_ATTACKS = {
    "aliases that multiply": (LAUGHS, "aliases"),
    "merged mappings that multiply": (MERGES, "aliases"),
    "an alias of itself": ("a: &a [*a]", "alias"),
    "a merge of itself": ("a: &a {<<: *a}", "alias"),
    "sequences in sequences": ("a: " + "[" * 100_000, "levels"),
    "mappings in mappings": ("a: " + "{a: " * 10_000, "levels"),
    "blocks in blocks": ("- " * 50_000 + "a", "levels"),
    "an integer of a million digits": ("a: " + "9" * 1_000_000, "number 64 characters 1000000"),
    "a hexadecimal integer of 900,000 digits": (
        "a: 0x" + "f" * 900_000,
        "number 64 characters 900002",
    ),
    "an integer on base 60": ("a: 1" + ":59" * 20, "64 bits"),
    "an integer beyond 64 bits": ("a: 9223372036854775808", "64 bits"),
    "a number beyond 64 bits": ("a: 1e999", "64 bits"),
    "a long number beyond 64 bits": ("a: -1.5e+999", "64 bits"),
    "a date that is none": ("a: 2026-13-45", "timestamp"),
    "a tag that does not fit": ("a: !!int many", "'many'"),
    "a tag that does not fit, of truth": ("a: !!bool many", "'many'"),
    "a tag that does not fit, of time": ("a: !!timestamp many", "'many'"),
    "a tag without a value": ("a: !!int ''", "int"),
    "a tag of a million letters": ("a: !" + "x" * 1_000_000 + " {}", ""),
    "a Python tag of a million letters": ("a: !!python/" + "x" * 1_000_000 + " {}", ""),
    "a key of a million letters": ("x" * 1_000_000 + ": 1", ""),
    "a key of a thousand letters": ("'" + "x" * 1000 + "': 1", "key 200 characters"),
    "two megabytes": ("a: " + "x" * (2 << 20), "bytes"),
    "a hundred thousand values": ("a: [" + "0, " * 100_000 + "0]", "60000"),
    "a key that is a list": ("? [a, b]\n: 1", "unhashable"),
    "a list at the top": ("- " + "x" * 900_000, "keys values"),
    "letters that YAML has not": ("a: \x01", "special"),
    "zero bytes": ("a: \x00", "zero"),
    "two documents": ("a: 1\n---\nb: 2", "single"),
    "a huge anchor": ("a: &" + "x" * 900_000 + " 1\nb: *y", ""),
    "a huge error": ("a: '" + "x" * 900_000, ""),
}


def test_attacks_on_yaml(tmp_path):
    found = check_reader(
        "ppvision.tasks.config:read_yaml",
        [text.encode() for text, _ in YAML_ATTACKS.values()],
        tmp_path,
        "job.yml",
    )
    assert found == {"ConfigError": len(YAML_ATTACKS)}


@pytest.mark.parametrize("name", [name for name, (_, token) in YAML_ATTACKS.items() if token])
def test_an_attack_on_yaml_is_refused_for_its_reason(tmp_path, name):
    text, tokens = YAML_ATTACKS[name]
    (tmp_path / "job.yml").write_text(text, encoding="utf-8")
    with raises_naming(ConfigError, *tokens.split()):
        read_yaml(tmp_path / "job.yml")


def test_what_yaml_has_is_still_read(tmp_path):
    text = "a: &a [1, 0x1f, -9223372036854775808, 1e-3, .inf, 1.5e+300, 2026-11-26, yes, ~]\nb: *a"
    (tmp_path / "job.yml").write_text(text)
    content = read_yaml(tmp_path / "job.yml")
    date = datetime.date(2026, 11, 26)
    expected = [1, 31, -(2**63), 0.001, math.inf, 1.5e300, date, True, None]
    assert content["a"] == content["b"] == expected


@pytest.mark.parametrize(
    "text", ["1e3", "1.5e3", "-.5E+2", "1.e5", "1_0", "0x1", "yes", "~", ".inf"]
)
def test_texts_that_look_like_numbers_are_written_as_texts(text):
    content = load_yaml(format_yaml({"name": text, text: 1}), "x")
    assert content == {"name": text, text: 1}


def test_bases_that_multiply(tmp_path):
    for k in range(8):
        (tmp_path / f"{k}.yml").write_text(f"_base_: {[f'{k + 1}.yml'] * 10}\n")
    (tmp_path / "8.yml").write_text("a: 1\n")
    with raises_naming(ConfigError, "100", "files"):
        read_yaml(tmp_path / "0.yml")


@pytest.mark.parametrize(
    "option", ["a=" + "9" * 5000, "a=" + "[" * 5000, "a²=1", "b.²=1", "a=1e999"]
)
def test_hostile_options(option):
    config = Located({"a": 1, "b": [1]}, {})
    if option == "a²=1":
        apply_options(config, [option])
        assert config["a²"] == 1
        return
    with pytest.raises(ConfigError) as caught:
        apply_options(config, [option])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 5000, "tests." + "[" * 5000])
def test_a_module_that_does_not_import_is_named_in_a_short_message(name):
    """Python's own error repeats the name."""
    with raises_naming(ConfigError, "imports:", "ModuleNotFoundError") as caught:
        import_modules([name])
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        "x" * 10**6,
        b"x" * 10**6,
        [0] * 10**6,
        {str(k): k for k in range(10**5)},
        Located({"a": "x" * 10**6}, {}),
        np.zeros(10**6),
        functools.reduce(lambda inner, _: [inner], range(10**5), []),
        type("Broken", (), {"__repr__": lambda self: 1 / 0})(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_value_is_shown_in_a_line(value):
    assert 0 < len(shorten(value)) <= 80


def test_small_values_are_shown_as_they_are():
    for value in (1, -1.5, "a\n", b"a", [1, "b"], (1,), (), {"a": [None, True]}, None, {1, 2}):
        assert shorten(value) == repr(value)
    assert "5001 digits" in shorten(10**5000)
    assert shorten("x" * 200).endswith("...")


# -- tar files -------------------------------------------------------------------------------------


def tar_header(name: bytes, size: int, kind: bytes = b"0", sparse: bytes = b"") -> bytes:
    """512 bytes that announce a member."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    header[136:148] = b"00000000000\0"
    header[156:157] = kind
    header[257:265] = b"ustar  \0" if kind in b"LS" else b"ustar\x0000"
    header[386 : 386 + len(sparse)] = sparse
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


PICTURE = b"train/cat/a.png"
TAR_ATTACKS = {
    "a name of 8 GiB, packed": (
        "gz",
        tar_header(b"././@LongLink", 8 << 30, b"L") + bytes(64 << 20),
        "header",
    ),
    "pax headers of 2 GiB, packed": (
        "bz2",
        tar_header(b"pax", 2 << 30, b"x") + bytes(32 << 20),
        "header",
    ),
    "a picture of 8 GiB, packed": ("xz", tar_header(PICTURE, 8 << 30), "most"),
    "a picture of 2^80 bytes": ("", tar_header(PICTURE, 1 << 80), "most|damaged"),
    "a member of 8 GiB that is no picture": ("", tar_header(b"a", 8 << 30), "damaged"),
    "a file with holes": (
        "",
        tar_header(PICTURE, 512, b"S", b"0\0".zfill(12) * 2 + bytes(73) + b"77777777777\0")
        + bytes(2048),
        "refused|damaged",
    ),
    "a hundred thousand pax headers": (
        "gz",
        b"".join([tar_header(b"pax", 8, b"x") + b"8 a=bcd\n".ljust(512, b"\0")] * 100_000),
        "damaged",
    ),
    "a device": ("", tar_header(PICTURE, 0, b"3") + bytes(1024), "refused"),
    "a link": ("", tar_header(PICTURE, 0, b"1") + bytes(1024), "refused"),
    "a size that is none": (
        "",
        tar_header(PICTURE, 0).replace(b"00000000000\0" * 2, b"zzzzzzzzzzz\0" * 2),
        "damaged",
    ),
    "half a gzip": ("half", tar_header(PICTURE, 512) + bytes(512), "damaged"),
    "a picture that ends early": ("", tar_header(PICTURE, 5000) + b"x" * 10, "damaged"),
    "a hundred and one thousand members": (
        "gz", tar_header(b"a", 0) * 100_001, "100000"
    ),
    "a dictionary of 1.5 GiB": ("xz big", tar_header(b"a", 0), "[Mm]emory"),
    "nothing": ("", b"", "damaged"),
}  # fmt: skip


def packed_tar(how: str, content: bytes) -> bytes:
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    if how == "xz big":
        content = lzma.compress(content, preset=0)
        # The block's header: the code of the dictionary's size, and the checksum behind it.
        header = bytearray(content[12 : 12 + 4 * (content[12] + 1)])
        header[header.index(b"\x21\x01") + 2] = 37
        header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
        return content[:12] + header + content[12 + len(header) :]
    if how == "half":
        return gzip.compress(content)[:30]
    return pack.get(how, bytes)(content)


@pytest.fixture(scope="module")
def tar_attacks() -> list[bytes]:
    return [packed_tar(how, content) for how, content, _ in TAR_ATTACKS.values()]


def test_attacks_on_tar_files(tmp_path, tar_attacks):
    found = check_reader(f"{READERS}:convert_tar", tar_attacks, tmp_path, "pictures.tar")
    assert found == {"DataError": len(TAR_ATTACKS)}
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", TAR_ATTACKS)
def test_an_attack_on_tar_files_is_refused_for_its_reason(tmp_path, name, tar_attacks):
    path = tmp_path / "pictures.tar"
    path.write_bytes(tar_attacks[list(TAR_ATTACKS).index(name)])
    with pytest.raises(DataError, match=TAR_ATTACKS[name][2]):
        convert_tar(path)


def test_pictures_that_unpack_to_more_than_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_MAX_BYTES", 1 << 20)
    path = tmp_path / "pictures.tar"
    path.write_bytes(gzip.compress(tar_header(b"a", 2 << 20) + bytes(2 << 20)))
    with pytest.raises(DataError, match="content"):
        convert_tar(path)


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_tar_files(tmp_path, count):
    random = Random(count)
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "png")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("train/cat/a.png", "test/dog/b.png", f"train/ship/{'x' * 150}.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture.getvalue())
            archive.addfile(member, io.BytesIO(picture.getvalue()))
    valid = content.getvalue()[:8192]
    inputs = [mutate_bytes(valid, random) for _ in range(count)]
    found = check_reader(f"{READERS}:convert_tar", [valid, *inputs], tmp_path, "pictures.tar")
    assert set(found) == {"DataError"}  # classes are missing in the valid one


# -- layered models --------------------------------------------------------------------------------


def vouching_manifests(changes: list[dict]) -> list[bytes]:
    """Manifests that differ, but have the sha256 of what they say."""
    found = []
    for content in changes:
        content = dict(content)
        content.pop("sha256", None)
        try:
            text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError):
            text = ""
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        found.append(json.dumps(content).encode())
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_layered_models(tmp_path, count, monkeypatch):
    whole = save_layered(tiny_once_qat(), tmp_path / "whole", bits=BITS, config=CONFIG)
    monkeypatch.setenv("PPVISION_TEST_LAYERED", str(whole))
    random = Random(count)
    valid = (whole / "manifest.json").read_bytes()
    changed = [mutate_document(json.loads(valid), random) for _ in range(count // 2)]
    inputs = vouching_manifests(changed)
    inputs += [mutate_bytes(valid, random) for _ in range(count // 2)]
    reader = f"{READERS}:read_layered"
    found = check_reader(reader, [valid, *inputs], tmp_path / "in", "manifest.json", by_folder=True)
    ours = {"LayeredModelError", "InputError", "MissingFileError", "read"}
    assert set(found) <= ours
    assert found["LayeredModelError"] > count / 2
    assert found["read"] >= 1


MANIFEST_ATTACKS = {
    "arrays in arrays": b"[" * 1_000_000,
    "a million arrays": b"[" + b"[]," * 1_000_000 + b"[]]",
    "a million objects": b"[" + b"{}," * 1_000_000 + b"{}]",
    "an integer of a million digits": b'{"format_version": ' + b"9" * 1_000_000 + b"}",
    "a number beyond 64 bits": b'{"format_version": 1e999}',
    "not a number": b'{"format_version": NaN}',
    "half a letter": b'{"format_version": 1, "architecture": "\\ud800"}',
    "a key twice": b'{"format_version": 1, "format_version": 1}',
    "text of a million letters": b'"' + b"x" * 1_000_000 + b'"',
    "a key of a million letters": b'{"format_version": 1, "' + b"x" * 1_000_000 + b'": 1}',
    "nine megabytes": b" " * (9 << 20),
    "nothing": b"",
}


def test_attacks_on_manifests(tmp_path):
    found = check_reader(
        "ppvision.quant:describe_layered",
        list(MANIFEST_ATTACKS.values()),
        tmp_path,
        "manifest.json",
        by_folder=True,
    )
    assert found == {"LayeredModelError": len(MANIFEST_ATTACKS)}


@pytest.mark.parametrize("kind", ["floats", "statistics"])
def test_nan_in_a_layered_model_is_refused_by_name(tmp_path, kind, monkeypatch):
    once = tiny_once_qat()
    state = extract_state(once.model, BITS)
    part = state.floats if kind == "floats" else state.statistics[BITS[0]]
    name = next(name for name, array in part.items() if array.dtype.kind == "f" and array.size)
    whole = save_layered(state, tmp_path / "whole", bits=BITS, config=CONFIG)
    assert np.isfinite(load_layered(whole).state_dict[name]).all()
    part[name] = np.full_like(part[name], np.nan)
    with pytest.raises(LayeredModelError, match=re.escape(name)):
        save_layered(state, tmp_path / "spoilt", bits=BITS, config=CONFIG)
    assert not (tmp_path / "spoilt").exists()
    monkeypatch.setattr(layered_files, "_spoilt", lambda *parts: [])
    save_layered(state, tmp_path / "spoilt", bits=BITS, config=CONFIG)
    monkeypatch.undo()
    with pytest.raises(LayeredModelError, match=re.escape(name)):
        load_layered(tmp_path / "spoilt")


def test_infinity_in_a_buffer_is_kept(tmp_path):
    """A mask of attention may hold it."""
    state = extract_state(tiny_once_qat().model, BITS)
    floats = {**state.floats, "mask": np.array([0, -np.inf], np.float32)}
    state = dataclasses.replace(state, floats=floats)
    whole = save_layered(state, tmp_path / "whole", bits=BITS, config=CONFIG)
    np.testing.assert_array_equal(load_layered(whole).state.floats["mask"], floats["mask"])
