"""Read text files as common tools write them: the one reader of lists, class files, JSON, XML.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one, and the line ends of every
system. Bytes of a file's name that are not UTF-8 are kept (`surrogateescape`), so that the name
still finds the file. In names of classes they are an error, because class names are written into
models, reports and JSON.
"""

import codecs
import io
import json
import re
import reprlib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from xml.parsers import expat

from ppvision.errors import DataError, InputError

# Longer marks first: UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MARK = "\ufeff"
# Marks inside a file come from concatenated files; the other character comes from web pages.
_UNSEEN = f"{_MARK}\u200b"
_DOS_END = "\x1a"  # Ctrl-Z: the end of a text file for DOS
_LINE_END = re.compile(r"\r\n|\r|\n")  # `splitlines` has more, which names of files may contain
_XML_DEPTH = 100  # annotations have five levels

_LONGEST_TEXT = 400  # characters
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 60


def shorten(value: object) -> str:
    """Return `repr` of a value from a file, with at most about 60 characters of each part."""
    return _shortened.repr(value)


def cut_text(text: str) -> str:
    """Shorten a text from a file for a message: enough for a path of any depth, but not a whole
    file."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def read_text(path: str | Path, *, file_names: bool = False) -> str:
    """Read a text file without its byte order mark, and without the Ctrl-Z that ends files of DOS.

    Args:
        path: the file.
        file_names: keep bytes that are not UTF-8, as Python does in names of files. Default False.

    Raises:
        DataError: no such file, one that cannot be opened, not text, or not UTF-8.
    """
    data = _read_bytes(path)
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    errors = "surrogateescape" if file_names and encoding.startswith("utf-8") else "strict"
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: expected UTF-8 text, got the byte {data[error.start]:#04x} in line {line}. "
            "Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise DataError(f"{path}: expected UTF-8 text, got zero bytes. Save it as UTF-8.")
    return _without_dos_end(text)


def _without_dos_end(text: str) -> str:
    """Return a text without a Ctrl-Z at its end, and without line ends that tools added after
    it."""
    kept = text.rstrip(f"{_DOS_END}\r\n")
    ends, _, _ = text[len(kept) :].partition(_DOS_END)
    return kept + ends


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its rights."
        ) from error


def is_plain_utf8(path: str | Path) -> bool:
    """Whether every reader of UTF-8 reads the same text from a file: no byte order mark, no invalid
    bytes, no Ctrl-Z at the end.

    Raises:
        DataError: it cannot be opened.
    """
    data = _read_bytes(path)
    if any(data.startswith(mark) for mark, _ in _MARKS):
        return False
    end = data[len(data.rstrip(_DOS_END.encode() + b"\r\n")) :]
    if _DOS_END.encode() in end:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def open_lines(path: str | Path, mode: str = "r") -> io.StringIO:
    """A replacement of `open` for other packages' readers of lists: it gives the lines of
    `read_lines`.

    Raises:
        DataError: as `read_text`.
    """
    if mode != "r":
        raise InputError(f"open_lines: expected mode 'r', got {shorten(mode)}.")
    lines = read_lines(path, file_names=True)
    return io.StringIO("".join(f"{line}\n" for _, line in lines))


def read_lines(path: str | Path, *, file_names: bool = False) -> list[tuple[int, str]]:
    """Return number (from 1) and text of every line that is not blank, without blanks around it.
    Invisible characters, such as a zero-width space, count as blanks.

    Raises:
        DataError: as `read_text`.
    """
    lines = _LINE_END.split(read_text(path, file_names=file_names))
    stripped = ((number, line.strip(f"{_UNSEEN} \t\v\f")) for number, line in enumerate(lines, 1))
    return [(number, line) for number, line in stripped if line]


def read_list(path: str | Path, separator: str = " ") -> list[tuple[int, list[str]]]:
    """Return the lines of a list file that are not blank: number (from 1) and fields of each.

    If the separator is the blank, tabs separate the fields of a line with a tab, and any number of
    blanks separates the fields of other lines.

    Raises:
        DataError: no such file, or not text.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a list file, found none. Check the path.")
    lines = read_lines(path, file_names=True)
    return [(number, split_fields(line, separator)) for number, line in lines]


def split_fields(line: str, separator: str = " ") -> list[str]:
    """Return the fields of one line; see `read_list`."""
    if separator != " ":
        return [_strip(field) for field in line.split(separator)]
    if "\t" in line:
        return [field for field in map(_strip, line.split("\t")) if field]
    # Names may contain other blanks, such as U+3000 and the one that macOS writes before "PM".
    return [field for field in (part.strip(_UNSEEN) for part in line.split(" ")) if field]


def _strip(field: str) -> str:
    """Return a field without blanks and invisible characters around it."""
    while field != (stripped := field.strip().strip(_UNSEEN)):
        field = stripped
    return field


def read_names(path: str | Path) -> list[str]:
    """Return names of classes, one per line; blank lines do not count.

    Raises:
        DataError: no such file, or not UTF-8 text.
    """
    return [name for _, name in read_lines(path)]


def read_json(path: str | Path) -> object:
    """Return the content of a JSON file.

    Raises:
        DataError: no such file, not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, file_names=True))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def read_xml(path: str | Path) -> ElementTree.Element:
    """Return the root of an XML file; tags have no namespace.

    The file may declare every encoding that Python knows (expat knows five). Bytes that cannot be
    decoded become U+FFFD, so that paths and notes in other encodings do no harm. Entities are not
    expanded: a file that defines entities is refused, because a kilobyte of them can become
    gigabytes. A file that uses entities of a DTD is refused too, because the DTD is not read.

    Raises:
        DataError: no such file, not XML, nested too deeply, or with entities other than XML's five.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    depth, has_dtd = 0, False
    data = _decode_xml(_read_bytes(path)).encode("utf-8")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        # If these are in an attribute, expat omits them silently.
        if has_dtd and attributes and (name := _find_entity(data, parser.CurrentByteIndex)):
            refuse_unknown(name)
        depth += 1
        if depth > _XML_DEPTH:
            raise DataError(f"{path}: expected at most {_XML_DEPTH} levels of XML, got more.")
        builder.start(tag.rpartition(":")[2], attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag.rpartition(":")[2])

    def refuse_entity(name: str, *_: object) -> None:
        raise DataError(
            f"{path}: expected XML without entities, got a definition of {shorten(name)}. Remove "
            "it and write its text."
        )

    def refuse_unknown(name: str, *_: object) -> None:
        raise DataError(
            f"{path}: expected XML without entities of a DTD, which is not read, got "
            f"{shorten(name)}. Write its text instead."
        )

    def note_dtd(*_: object) -> None:
        nonlocal has_dtd
        has_dtd = True

    parser.StartDoctypeDeclHandler = note_dtd
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse_entity
    # With a DTD that is not read, expat silently omits undefined entities.
    parser.SkippedEntityHandler = refuse_unknown
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DataError(f"{path}: cannot be read as XML ({error}). Save it again.") from error
    return builder.close()


_TAG = re.compile(rb"""<(?:[^>"']|"[^"]*"|'[^']*')*>""")
_ENTITY = re.compile(rb"&(?!(?:lt|gt|amp|quot|apos);)([^#;]*);")


def _find_entity(data: bytes, place: int) -> str:
    """Return the name of an entity other than XML's five in the tag at a place; empty if there is
    none."""
    tag = _TAG.match(data, place)
    found = _ENTITY.search(tag[0]) if tag else None
    return found[1].decode("utf-8", "replace") if found else ""


# Python's codecs for text. A few raise, or take very long, on bytes of other encodings.
_NO_ENCODINGS = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape"}
_DECLARED = re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{1,40})["']""", re.ASCII)


def _decode_xml(data: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        declared = _DECLARED.match(data.lstrip())
        encoding = declared[1].decode("ascii") if declared else "utf-8"
        try:
            codec = codecs.lookup(encoding)
        except LookupError:
            encoding = "utf-8"
        else:
            # If the declaration can be read as ASCII, the file is not in UTF-16: a tool wrote the
            # declaration from text in memory. Codecs that are not for text (`zlib`) would expand a
            # bomb.
            wide = codec.name.startswith(("utf-16", "utf-32"))
            if wide or not codec._is_text_encoding or codec.name in _NO_ENCODINGS:
                encoding = "utf-8"
    # Blank lines before the declaration are not allowed, but common.
    text = data.decode(encoding, "replace").lstrip(f"{_MARK} \t\r\n")
    return _without_dos_end(text)
