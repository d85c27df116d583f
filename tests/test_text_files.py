"""Lists, class files, JSON, XML and YAML as people's tools write them: one reader for all."""

import codecs
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from ppvision.data.class_folders import ClassFolders
from ppvision.data.text import (
    is_plain_utf8,
    open_lines,
    read_json,
    read_lines,
    read_list,
    read_names,
    read_text,
    read_xml,
)
from ppvision.errors import DataError
from ppvision.tasks.config import read_yaml
from tests.helpers.messages import raises_naming

FORMS = {
    "plain": "{}".format,
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16-le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16-be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
    "dos": lambda text: f"{text}\x1a".encode(),
    "dos and a line end": lambda text: f"{text}\x1a\r\n".encode(),
    "dos and an editor": lambda text: f"{text}\r\n\x1a\x1a\n\n".encode(),
    "blank lines": lambda text: f"\n{text}\n\n  \n".encode(),
}


@pytest.fixture(params=list(FORMS), name="form")
def _form(request):
    def write(path, text: str):
        written = FORMS[request.param](text)
        path.write_bytes(written.encode() if isinstance(written, str) else written)
        return path

    return write


def test_lists_of_every_form(form, tmp_path):
    path = form(tmp_path / "list.txt", "a.jpg b.png\n\nü.jpg  d.png\n")
    assert [fields for _, fields in read_list(path)] == [["a.jpg", "b.png"], ["ü.jpg", "d.png"]]
    assert open_lines(path).readlines() == ["a.jpg b.png\n", "ü.jpg  d.png\n"]


def test_names_json_xml_and_yaml_of_every_form(form, tmp_path):
    assert read_names(form(tmp_path / "labels.txt", "cat \n dog\n")) == ["cat", "dog"]
    assert read_json(form(tmp_path / "a.json", '{"a": ["ü"]}')) == {"a": ["ü"]}
    text = '<?xml version="1.0"?>\n<a><name>ü</name></a>'
    root = read_xml(form(tmp_path / "a.xml", text))
    assert root.findtext("name") == "ü"
    assert read_yaml(form(tmp_path / "a.yml", "iters: 5\nname: ü\n")) == {"iters": 5, "name": "ü"}


def test_lines_have_the_numbers_that_an_editor_shows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n\r\n\xef\xbb\xbfb\n")
    assert read_lines(tmp_path / "a.txt") == [(1, "a"), (3, "b")]


def test_names_have_no_zero_width_space_around_them(tmp_path):
    (tmp_path / "a.txt").write_text("\u200bcat\u200b \n\u200b\n \ufeffdog\n", encoding="utf-8")
    assert read_names(tmp_path / "a.txt") == ["cat", "dog"]


def test_only_line_ends_end_a_line(tmp_path):
    """Names of files may hold what `str.splitlines` takes for a line's end."""
    (tmp_path / "a.txt").write_text("a\u2028b.jpg\x85c\n", encoding="utf-8")
    assert read_lines(tmp_path / "a.txt") == [(1, "a\u2028b.jpg\x85c")]


@pytest.mark.parametrize(
    ("line", "separator", "fields"),
    [
        ("a.jpg b.png", " ", ["a.jpg", "b.png"]),
        ("  a.jpg \t b.png ", " ", ["a.jpg", "b.png"]),
        ("my cat.jpg\tmy cat.png", " ", ["my cat.jpg", "my cat.png"]),
        ("a.jpg\t\tb.png\t", " ", ["a.jpg", "b.png"]),
        ("a.jpg, b.png", ",", ["a.jpg", "b.png"]),
        ("my cat.jpg\tb.png", "\t", ["my cat.jpg", "b.png"]),
        ("a.jpg", " ", ["a.jpg"]),
        ("3\u202fPM.jpg a\u3000b\u00a0.png", " ", ["3\u202fPM.jpg", "a\u3000b\u00a0.png"]),
        ("a.jpg,,b.png", ",", ["a.jpg", "", "b.png"]),
        ("\u200ba.jpg\u200b \ufeffb.png", " ", ["a.jpg", "b.png"]),
        ("a.jpg \u200b b.png", " ", ["a.jpg", "b.png"]),
        ("my cat.jpg\u200b \t\u200b\t \ufeffb.png", " ", ["my cat.jpg", "b.png"]),
        ("a.jpg\u200b , \u200b b.png\u200b", ",", ["a.jpg", "b.png"]),
        ("a\u200bb.jpg", " ", ["a\u200bb.jpg"]),
    ],
)
def test_fields(line, separator, fields, tmp_path):
    (tmp_path / "a.txt").write_text(f"{line}\n", encoding="utf-8")
    assert read_list(tmp_path / "a.txt", separator) == [(1, fields)]


def test_bytes_in_names_of_files_lead_to_the_file(tmp_path):
    name = "图片.jpg".encode("gbk")
    with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
        pass
    (tmp_path / "list.txt").write_bytes(name + b" x.png\n")
    ((_, (found, _)),) = read_list(tmp_path / "list.txt")
    assert (tmp_path / found).is_file()
    (tmp_path / "a.json").write_bytes(b'{"file_name": "' + name + b'"}')
    assert (tmp_path / read_json(tmp_path / "a.json")["file_name"]).is_file()


def test_bytes_in_names_of_classes_are_an_error(tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"cat\ncaf\xe9\n")
    with raises_naming(DataError, "labels.txt:", "UTF-8", "line", "2"):
        read_names(tmp_path / "labels.txt")


@pytest.mark.parametrize("content", [b"\0\0\0\x1cftypavif", "a\nb".encode("utf-16-le")])
def test_what_is_no_text(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="UTF-8"):
        read_text(tmp_path / "a", file_names=True)


def test_files_that_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with raises_naming(DataError, str(path), "read"):
            read_text(path)


def test_plain_files(tmp_path):
    for content, plain in (
        (b"a", True),
        (b"\xef\xbb\xbfa", False),
        (b"\xe9", False),
        (b"a\x1a", False),
        (b"a\x1a\r\n", False),
        (b"a\x1ab\n", True),
    ):
        (tmp_path / "a").write_bytes(content)
        assert is_plain_utf8(tmp_path / "a") is plain


# -- XML -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "iso-8859-1", "shift_jis", "utf-16"])
def test_xml_in_the_encoding_that_it_declares(encoding, tmp_path):
    name = {"iso-8859-1": "café"}.get(encoding, "猫")
    text = f'<?xml version="1.0" encoding="{encoding}"?><a><name>{name}</name></a>'
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert read_xml(tmp_path / "a.xml").findtext("name") == name


PYTHONS_OWN = ["idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape"]


@pytest.mark.parametrize(
    "declared", ["utf-16", "UTF-32", "no-such-codec", "zlib", "rot13", *PYTHONS_OWN]
)
def test_xml_that_declares_another_encoding_than_it_has(declared, tmp_path):
    """Tools that write text from memory say UTF-16, and write UTF-8."""
    text = f'<?xml version="1.0" encoding="{declared}"?><a><name>猫</name></a>'
    (tmp_path / "a.xml").write_bytes(text.encode())
    assert read_xml(tmp_path / "a.xml").findtext("name") == "猫"


def test_bytes_of_another_encoding_do_no_harm_outside_of_names(tmp_path):
    (tmp_path / "a.xml").write_bytes(b"<a><path>C:\\" + "图".encode("gbk") + b"</path><b>1</b></a>")
    assert read_xml(tmp_path / "a.xml").findtext("b") == "1"


def test_namespaces_do_not_count(tmp_path):
    (tmp_path / "a.xml").write_text('<v:a xmlns="x" xmlns:v="y"><v:b>1</v:b><b>2</b></v:a>')
    assert [b.text for b in read_xml(tmp_path / "a.xml").findall("b")] == ["1", "2"]


def test_entities_that_xml_has(tmp_path):
    """And what only looks like one."""
    text = '<!DOCTYPE a SYSTEM "x"><a b="&lt;&#233;">&amp;<!-- <c d="&x;"> -->'
    text += '<![CDATA[<c d="&x;">]]></a>'
    (tmp_path / "a.xml").write_text(text)
    root = read_xml(tmp_path / "a.xml")
    assert (root.get("b"), root.text) == ("<é", '&<c d="&x;">')


def test_a_text_of_many_ctrl_z_takes_no_time(tmp_path):
    (tmp_path / "a").write_bytes(b"\x1a\n" * 500_000 + b"a\x1a\n")
    start = time.process_time()
    assert read_text(tmp_path / "a") == "\x1a\n" * 500_000 + "a"
    assert time.process_time() - start < 2


def _laughs(levels: int) -> str:
    entities = ['<!ENTITY l0 "lol">']
    entities += [f'<!ENTITY l{k} "{f"&l{k - 1};" * 10}">' for k in range(1, levels)]
    return f"<!DOCTYPE a [{''.join(entities)}]><a><b>&l{levels - 1};</b></a>"


@pytest.mark.parametrize(
    "text",
    [
        _laughs(10),
        f'<!DOCTYPE a [<!ENTITY x "{"x" * 100_000}">]><a>{"&x;" * 100_000}</a>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
        '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://localhost/x">%x;]><a/>',
        "<a>" * 100_000 + "</a>" * 100_000,
        "<a>&undefined;</a>",
        '<!DOCTYPE a SYSTEM "x"><a>&x;</a>',
        '<!DOCTYPE a PUBLIC "x" "y"><a><b>&x;</b></a>',
        '<a b="&undefined;"/>',
        '<!DOCTYPE a SYSTEM "x"><a b="&x;"/>',
        '<!DOCTYPE a SYSTEM "x"><a><b c="1>0" d=\'"&amp;&eacute;\'>1</b></a>',
        "<a><b></a>",
        "",
        "no XML",
        "<a>\x01</a>",
        "<a/><b/>",
    ],
    ids=lambda text: text[:30],
)
def test_xml_that_is_refused(text, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    start = time.process_time()
    with pytest.raises(DataError, match=r"a\.xml"):
        read_xml(tmp_path / "a.xml")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", "", "nul", '"\ud800"'])
def test_json_that_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    if text.startswith('"'):  # bytes of a name, kept
        assert isinstance(read_json(tmp_path / "a.json"), str)
        return
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


# -- lists with a class number ---------------------------------------------------------------------


def _classes(root, text: bytes, **options: object) -> ClassFolders:
    for name in ("a.png", "my cat.png", "sub/b.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / name)
    (root / "list.txt").write_bytes(text)
    return ClassFolders(root, list_path=root / "list.txt", **options)


@pytest.mark.parametrize(
    "text",
    [
        b"a.png 0\nmy cat.png 1\nsub/b.png 2\n",
        b"\xef\xbb\xbfa.png\t0\r\nmy cat.png\t1\r\n\r\nsub\\b.png\t2\r\n",
        b"a.png  0\n\nmy cat.png \t 1 \n\n\nsub/b.png\t002",
        b"a.png 0\n._a.png 0\nmy cat.png 1\n.ipynb_checkpoints/a-checkpoint.png 5\nsub/b.png 2",
    ],
)
def test_class_lists(text, tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeffcat\r\ndog\r\nümlaut\r\n\r\n".encode())
    found = _classes(tmp_path, text)
    names = ["a.png", "my cat.png", "sub/b.png"]
    assert found.samples == [(tmp_path / name, k) for k, name in enumerate(names)]
    assert found.classes == ["cat", "dog", "ümlaut"]


@pytest.mark.parametrize(
    "line", ["a.png", "a.png ²", "a.png -1", "a.png 1.0", "a.png " + "9" * 5000, "a.png 900000000"]
)
def test_class_lists_that_are_refused(line, tmp_path):
    with pytest.raises(DataError, match=r"list\.txt:1:") as caught:
        _classes(tmp_path, line.encode())
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_class_names_that_are_not_utf8(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with raises_naming(DataError, "classes.txt:", "UTF-8"):
        _classes(tmp_path, b"a.png 0\n")


def test_a_json_file_is_written_without_marks(tmp_path):
    """What the reader takes is what `json.dumps` gives back."""
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"n": "\xe9"}')
    content = read_json(tmp_path / "a.json")
    assert json.loads(json.dumps(content)) == content == {"n": "\udce9"}
