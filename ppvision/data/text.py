"""Reading text files as people's tools write them: the one reader of lists, class files, JSON, XML.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one, and the line ends of every
system. Bytes of a file's name that are not UTF-8 are kept (`surrogateescape`), so that the name
still leads to the file. In names of classes they are an error, because class names are written
into models, reports and JSON.
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

# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MARK = "\ufeff"
# Marks inside a file come from files that were put together, the other from web pages.
_UNSEEN = f"{_MARK}\u200b"
_DOS_END = "\x1a"  # Ctrl-Z: the end of a text file for DOS
_LINE_END = re.compile(r"\r\n|\r|\n")  # not those of `splitlines`, which names of files may hold
_XML_DEPTH = 100  # annotations have five levels

_LONGEST_TEXT = 400  # letters
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 60


def shorten(value: object) -> str:
    """`repr` of a value that a file holds, at most some 60 characters of each part of it."""
    return _shortened.repr(value)


def cut_text(text: str) -> str:
    """What a message shows of a text from a file: a path of any depth, but not a whole file."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def read_text(path: str | Path, *, file_names: bool = False) -> str:
    """A text file without its byte order mark, and without the Ctrl-Z that ends files of DOS.

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
    """A text without a Ctrl-Z at its end, and the line ends that tools have added after it."""
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
    """Whether every reader of UTF-8 reads a file as it is: no byte order mark, no other bytes, no
    Ctrl-Z at the end.

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
    """`open` for other packages' readers of lists: the lines of `read_lines`, opened to be read.

    Raises:
        DataError: as `read_text`.
    """
    if mode != "r":
        raise InputError(f"open_lines: expected mode 'r', got {shorten(mode)}.")
    lines = read_lines(path, file_names=True)
    return io.StringIO("".join(f"{line}\n" for _, line in lines))


def read_lines(path: str | Path, *, file_names: bool = False) -> list[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank, without blanks around it;
    what cannot be seen, as a zero-width space, is a blank.

    Raises:
        DataError: as `read_text`.
    """
    lines = _LINE_END.split(read_text(path, file_names=file_names))
    stripped = ((number, line.strip(f"{_UNSEEN} \t\v\f")) for number, line in enumerate(lines, 1))
    return [(number, line) for number, line in stripped if line]


def read_list(path: str | Path, separator: str = " ") -> list[tuple[int, list[str]]]:
    """The lines of a list file that are not blank: number (from 1) and fields of each.

    Where the separator is the blank, fields are what tabs separate in a line with a tab, and what
    any number of blanks separates in other lines.

    Raises:
        DataError: no such file, or not text.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a list file, found none. Check the path.")
    lines = read_lines(path, file_names=True)
    return [(number, split_fields(line, separator)) for number, line in lines]


def split_fields(line: str, separator: str = " ") -> list[str]:
    """The fields of one line; see `read_list`."""
    if separator != " ":
        return [_strip(field) for field in line.split(separator)]
    if "\t" in line:
        return [field for field in map(_strip, line.split("\t")) if field]
    # Names may hold other blanks, such as U+3000 and the one that macOS puts before "PM".
    return [field for field in (part.strip(_UNSEEN) for part in line.split(" ")) if field]


def _strip(field: str) -> str:
    """A field without blanks and what cannot be seen around it, in any order."""
    while field != (stripped := field.strip().strip(_UNSEEN)):
        field = stripped
    return field


def read_names(path: str | Path) -> list[str]:
    """Names of classes, one a line; blank lines do not count.

    Raises:
        DataError: no such file, or not UTF-8 text.
    """
    return [name for _, name in read_lines(path)]


def read_json(path: str | Path) -> object:
    """The content of a JSON file.

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
    """The root of an XML file; tags are without their namespace.

    Every encoding that Python knows may be declared (expat knows five). What it does not decode
    becomes U+FFFD: paths and notes in other encodings do no harm. Entities are not expanded: a
    file that defines some is refused, because a kilobyte of them can become gigabytes. So is one
    whose text uses some of a DTD, which is not read.

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
        # Of these expat says nothing when they are in an attribute, and leaves them out.
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
    # With a DTD that is not read, expat leaves out what is not defined and says nothing.
    parser.SkippedEntityHandler = refuse_unknown
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DataError(f"{path}: cannot be read as XML ({error}). Save it again.") from error
    return builder.close()


_TAG = re.compile(rb"""<(?:[^>"']|"[^"]*"|'[^']*')*>""")
_ENTITY = re.compile(rb"&(?!(?:lt|gt|amp|quot|apos);)([^#;]*);")


def _find_entity(data: bytes, place: int) -> str:
    """The name of an entity other than XML's five in the tag at a place; empty for none."""
    tag = _TAG.match(data, place)
    found = _ENTITY.search(tag[0]) if tag else None
    return found[1].decode("utf-8", "replace") if found else ""


# Python's own codecs for text: a few raise, or take for ever, on what is not theirs.
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
            # A declaration that can be read as ASCII is not in UTF-16: a tool wrote it from text
            # in memory. The codecs that are not for text (`zlib`) would expand a bomb.
            wide = codec.name.startswith(("utf-16", "utf-32"))
            if wide or not codec._is_text_encoding or codec.name in _NO_ENCODINGS:
                encoding = "utf-8"
    # Blank lines before the declaration are against the rules, and common.
    text = data.decode(encoding, "replace").lstrip(f"{_MARK} \t\r\n")
    return _without_dos_end(text)
