"""Layered models over HTTP: only what is needed, once, whatever the server does."""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ppvision import remote, remote_cache
from ppvision.engine.dashboard import find_free_port
from ppvision.quant import LayeredModelError, describe_layered, load_layered, save_layered
from ppvision.quant.store import fetching as module
from ppvision.quant.store.state import LayeredState, extract_state
from tests.helpers.file_server import FileServer, serve_folder, stop
from tests.helpers.messages import raises_naming
from tests.helpers.small_layered import (
    BITS,
    CONFIG,
    assert_same,
    read_manifest,
    tiny_once_qat,
    update_entry,
    write_manifest,
)


@pytest.fixture(scope="module")
def state() -> LayeredState:
    return extract_state(tiny_once_qat().model, BITS)


@pytest.fixture(scope="module")
def original(state, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "tiny"
    return save_layered(state, folder, bits=BITS, config=CONFIG)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "TIMEOUTS", (2.0, 2.0))
    return tmp_path / "cache"


@pytest.fixture
def server(original, tmp_path, cache):
    with serve_folder(shutil.copytree(original, tmp_path / "served")) as server:
        yield server


def copy_of(cache: Path) -> Path:
    """The one folder in the cache."""
    (folder,) = [p for p in (cache / "layered").iterdir() if p.is_dir()]
    return folder


def partials(cache: Path) -> list[Path]:
    return sorted(copy_of(cache).glob("*.partial"))


def files(bits: int, start: int = 2) -> list[str]:
    return [f"w{k}.safetensors" for k in range(start, bits + 1)]


# -- what is loaded --------------------------------------------------------------------------------


def test_only_what_is_needed_and_later_only_the_next_file(server, state, cache):
    found = load_layered(server.url, bits=2)
    assert server.loaded() == files(2)
    assert_same(found.state, state, 2)
    assert found.config == CONFIG
    assert [name for name, _ in found.opened] == ["manifest.json", *files(2)]
    for bits in range(3, 9):
        assert_same(load_layered(server.url, bits=bits).state, state, bits)
        assert server.loaded() == files(bits, start=bits)
    load_layered(server.url, bits=5)
    assert server.loaded() == []
    names = sorted(p.name for p in copy_of(cache).iterdir())
    assert names == ["manifest.json", *files(8)]
    for name in names:
        assert (copy_of(cache) / name).read_bytes() == (server.folder / name).read_bytes()


def test_the_copy_is_a_layered_model(server, state, cache):
    load_layered(server.url, bits=4)
    found = load_layered(copy_of(cache))
    assert found.bits == 4
    assert_same(found.state, state, 4)


def test_the_highest_width_of_the_server(server, cache, caplog):
    caplog.set_level(logging.INFO, "ppvision")
    (server.folder / "w6.safetensors").unlink()
    found = load_layered(server.url)
    assert (found.bits, found.available) == (5, 5)
    assert server.loaded() == files(5)
    assert "w6.safetensors is missing; using 5 bits of 2 to 8" in caplog.text


def test_what_is_available_is_asked_when_wanted(server):
    found = load_layered(server.url, bits=3)
    assert not [r for r in server.requests if r[0] == "HEAD"]
    assert found.available == 8
    assert [r[1] for r in server.requests if r[0] == "HEAD"] == files(8)
    assert server.loaded() == files(3)


def test_a_server_without_head(server):
    server.heads = False
    assert load_layered(server.url).bits == 8


def test_describing_loads_the_manifest_only(server, cache):
    found = describe_layered(server.url)
    assert server.requests == [("GET", "manifest.json")]
    assert found.source == server.url
    assert found.precisions == describe_layered(server.folder).precisions
    assert "missing" not in str(found)
    assert not cache.exists()


def test_the_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("PPVISION_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = "http://host/path/model.layered"
    key = hashlib.sha256(url.encode()).hexdigest()[:32]
    expected = tmp_path / ".cache" / "ppvision" / "layered" / key
    for same in (url, f"{url}/", f"{url}#part"):
        assert module.Remote(same).folder == expected
    for other in (f"{url}?a=1", "http://host/path/model", "https://host/path/model.layered"):
        assert module.Remote(other).folder != expected


def test_a_query_goes_with_every_file_and_is_not_shown(server):
    found = load_layered(f"{server.url}/?token=secret", bits=2)
    assert found.bits == 2
    server.statuses["w3.safetensors"] = 404
    url = server.url.replace("http://", "http://user:secret@")
    with pytest.raises(LayeredModelError, match="404") as info:
        load_layered(f"{url}?token=secret", bits=3)
    assert "secret" not in str(info.value)


# -- broken connections ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("etag", "dated", "condition"),
    [
        ("strong", True, '"'),
        ("weak", True, "date of "),
        (None, True, "date of "),
        (None, False, ""),
    ],
)
def test_a_broken_download_goes_on(server, state, cache, etag, dated, condition):
    server.etag, server.dated = etag, dated
    server.breaks["w2.safetensors"] = [1000, 300]
    assert_same(load_layered(server.url, bits=2).state, state, 2)
    asked = [r[2:] for r in server.requests if r[1] == "w2.safetensors"]
    assert [r[:1] for r in asked] == [(), ("bytes=1000-",), ("bytes=1300-",)]
    for _, *conditions in asked[1:]:
        assert len(conditions) == bool(condition)
        assert all(text.startswith(condition) for text in conditions)
    assert not partials(cache)


def test_what_came_is_kept_for_the_next_call(server, state, cache):
    server.breaks["w2.safetensors"] = [100] * 5
    with raises_naming(LayeredModelError, "w2.safetensors:", "broke"):
        load_layered(server.url, bits=2)
    assert [p.stat().st_size for p in partials(cache)] == [500]
    assert not (copy_of(cache) / "w2.safetensors").exists()
    server.requests.clear()
    assert_same(load_layered(server.url, bits=2).state, state, 2)
    assert server.requests[1][:3] == ("GET", "w2.safetensors", "bytes=500-")


def test_no_progress_is_an_error(server, cache):
    server.breaks["w2.safetensors"] = [0] * 5
    with raises_naming(LayeredModelError, "w2.safetensors:", "broke"):
        load_layered(server.url, bits=2)
    assert server.loaded() == ["w2.safetensors"]


def test_a_server_that_ignores_ranges(server, state):
    server.ranges = False
    server.breaks["w2.safetensors"] = [1000]
    assert_same(load_layered(server.url, bits=2).state, state, 2)
    assert server.loaded() == ["w2.safetensors"] * 2


def test_parts_that_do_not_fit_are_loaded_once_more(server, state, cache):
    server.breaks["w2.safetensors"] = [100] * 5
    with pytest.raises(LayeredModelError):
        load_layered(server.url, bits=2)
    (partial,) = partials(cache)
    partial.write_bytes(bytes(500))
    server.requests.clear()
    assert_same(load_layered(server.url, bits=2).state, state, 2)
    assert server.loaded() == ["w2.safetensors"] * 2
    # Complete, but for its last byte; and longer than the file.
    for name, spoil in (("w3.safetensors", lambda d: d[:-1] + b"?"), ("w4.safetensors", bytes)):
        entry = read_manifest(server.folder)["files"][name]
        data = (server.folder / name).read_bytes()
        partial = copy_of(cache) / f"{name}.{entry['sha256'][:16]}.partial"
        partial.write_bytes(spoil(data) + (b"more" if spoil is bytes else b""))
    assert_same(load_layered(server.url, bits=4).state, state, 4)
    assert server.loaded() == ["w3.safetensors", "w4.safetensors"]


def test_a_range_that_is_another(server, state, cache, monkeypatch):
    """A server that answers another range than the one asked for, or none at all."""
    for bits, status in ((2, 206), (3, 416)):
        name = f"w{bits}.safetensors"
        entry = read_manifest(server.folder)["files"][name]
        (cache / "layered").mkdir(parents=True, exist_ok=True)
        folder = module.Remote(server.url).folder
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.{entry['sha256'][:16]}.partial").write_bytes(b"begun")
        with monkeypatch.context() as patch:
            patch.setattr(
                "tests.helpers.file_server._Handler._start", lambda *a, s=status: wrong(*a, s)
            )
            assert_same(load_layered(server.url, bits=bits).state, state, bits)
        assert server.loaded() == [name] * 2


def wrong(handler, validators, status: int) -> int:
    if not handler.headers["Range"]:
        return 0
    return 1 if status == 206 else 1 << 30


def test_a_file_that_changes_while_it_is_loaded(server, cache):
    server.breaks["w2.safetensors"] = [100] * 5
    with pytest.raises(LayeredModelError):
        load_layered(server.url, bits=2)
    path = server.folder / "w2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with raises_naming(LayeredModelError, "changed", "server"):
        load_layered(server.url, bits=2)
    assert not partials(cache)


# -- servers with another content ------------------------------------------------------------------


def test_a_changed_file_with_the_old_manifest(server, state, cache):
    load_layered(server.url, bits=2)
    path = server.folder / "w3.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with raises_naming(LayeredModelError, "w3.safetensors:", "sha256", "changed"):
        load_layered(server.url, bits=3)
    path.write_bytes(data + b"more")
    with raises_naming(LayeredModelError, "w3.safetensors:", "bytes,", "announces"):
        load_layered(server.url, bits=3)
    assert not (copy_of(cache) / "w3.safetensors").exists()
    assert_same(load_layered(server.url, bits=2).state, state, 2)


def test_a_new_manifest_loads_changed_files_only(server, state, original):
    load_layered(server.url, bits=4)
    server.loaded()
    save_layered(state, server.folder, bits=BITS, config={"type": "renamed"})
    found = load_layered(server.url, bits=4)
    assert found.config == {"type": "renamed"}
    assert server.loaded() == []
    other = extract_state(tiny_once_qat(9).model, BITS)
    save_layered(other, server.folder, bits=BITS, config=CONFIG)
    assert_same(load_layered(server.url, bits=3).state, other, 3)
    assert server.loaded() == files(3)
    assert_same(load_layered(server.url, bits=4).state, other, 4)
    assert server.loaded() == files(4, start=4)


def test_an_update_that_breaks_off_leaves_the_older_model(server, state, cache):
    load_layered(server.url, bits=4)
    other = extract_state(tiny_once_qat(9).model, BITS)
    save_layered(other, server.folder, bits=BITS, config=CONFIG)
    server.statuses["w3.safetensors"] = 503
    with raises_naming(LayeredModelError, "w3.safetensors:", "503"):
        load_layered(server.url, bits=4)
    server.statuses["manifest.json"] = 503
    assert_same(load_layered(server.url, bits=4).state, state, 4)
    assert_same(load_layered(server.url).state, state, 4)
    server.statuses.clear()
    server.loaded()
    assert_same(load_layered(server.url, bits=4).state, other, 4)
    assert server.loaded() == files(4, start=3)  # w2 had come
    assert not (copy_of(cache) / "previous").exists()


def test_older_files_do_not_stay_beside_a_newer_model(server):
    load_layered(server.url, bits=8)
    other = extract_state(tiny_once_qat(9).model, BITS)
    save_layered(other, server.folder, bits=BITS, config=CONFIG)
    load_layered(server.url, bits=2)
    stop(server)
    assert_same(load_layered(server.url).state, other, 2)


def test_a_damaged_copy_is_loaded_again(server, state, cache):
    load_layered(server.url, bits=3)
    server.loaded()
    path = copy_of(cache) / "w2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (copy_of(cache) / "manifest.json").write_text("{")
    assert_same(load_layered(server.url, bits=3).state, state, 3)
    assert server.loaded() == ["w2.safetensors"]


@pytest.mark.parametrize("lengths", [True, False])
def test_more_bytes_than_the_manifest_says(server, cache, lengths):
    load_layered(server.url, bits=2)
    server.lengths, server.extra = lengths, b" "
    with raises_naming(LayeredModelError, "w3.safetensors:", "bytes,") as caught:
        load_layered(server.url, bits=3)
    assert re.search(r"\b(more|server)\b", str(caught.value))
    assert not (copy_of(cache) / "w3.safetensors").exists()


def test_a_body_cut_short_without_a_length(server, state, cache):
    server.lengths = False
    server.breaks["w2.safetensors"] = [1000]
    assert_same(load_layered(server.url, bits=2).state, state, 2)
    server.breaks["w3.safetensors"] = [10, 0]
    with raises_naming(LayeredModelError, "w3.safetensors:", "10"):
        load_layered(server.url, bits=3)


def test_a_compressed_answer(server):
    load_layered(server.url, bits=2)
    server.encoding = "x-unknown"
    with pytest.raises(LayeredModelError, match="x-unknown"):
        load_layered(server.url, bits=3)


@pytest.mark.parametrize("text", [b"<html>Sign in</html>", b" " * (9 << 20), b""])
def test_a_manifest_that_is_none(server, cache, text):
    (server.folder / "manifest.json").write_bytes(text)
    for read in (load_layered, describe_layered):
        with raises_naming(LayeredModelError, "http://", "/manifest.json:"):
            read(server.url)
    assert server.loaded() == []


def test_a_manifest_that_lies(server, state):
    content = read_manifest(server.folder)
    content["files"]["../../x"] = content["files"]["w2.safetensors"]
    write_manifest(server.folder, content)
    with raises_naming(LayeredModelError, "manifest.json", "files:", "more"):
        load_layered(server.url)
    del content["files"]["../../x"]
    content["files"]["w2.safetensors"]["bytes"] = 1 << 49
    write_manifest(server.folder, content)
    with raises_naming(OSError, "cache:", "needed,", "free"):
        load_layered(server.url)
    assert server.loaded() == []


def test_a_file_of_another_model(server, tmp_path):
    other = save_layered(tiny_once_qat(9), tmp_path / "o", bits=BITS, config=CONFIG)
    shutil.copy(other / "w3.safetensors", server.folder)
    update_entry(server.folder, "w3.safetensors")
    with raises_naming(LayeredModelError, "w3.safetensors:", "model"):
        load_layered(server.url, bits=3)


# -- servers that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
def test_statuses(server, status):
    server.statuses["w2.safetensors"] = status
    with raises_naming(LayeredModelError, "w2.safetensors:", str(status)):
        load_layered(server.url, bits=2)
    server.statuses["manifest.json"] = status
    for read in (load_layered, describe_layered):
        with raises_naming(LayeredModelError, "manifest.json:", str(status)):
            read(server.url)


def test_a_missing_model_is_not_taken_from_the_cache(server):
    load_layered(server.url, bits=2)
    server.statuses["manifest.json"] = 404
    with raises_naming(LayeredModelError, "manifest.json:", "404"):
        load_layered(server.url, bits=2)


def unreachable(server: FileServer, how: str, monkeypatch) -> None:
    if how == "stopped":
        stop(server)
    elif how == "hangs":
        monkeypatch.setattr(remote, "TIMEOUTS", (0.3, 0.3))
        server.hangs.add("manifest.json")
    elif how == "breaks":
        server.breaks["manifest.json"] = [10] * 9
    else:
        server.statuses["manifest.json"] = 503


@pytest.mark.parametrize("how", ["stopped", "hangs", "breaks", "503"])
def test_the_cache_serves_while_the_server_does_not(server, state, monkeypatch, caplog, how):
    load_layered(server.url, bits=3)
    unreachable(server, how, monkeypatch)
    for bits, expected in ((3, 3), (2, 2), (None, 3)):
        caplog.clear()
        found = load_layered(server.url, bits=bits)
        assert_same(found.state, state, expected)
        assert found.available == 3
        assert "Using the earlier copy" in caplog.text
    with raises_naming(LayeredModelError, "w3.safetensors,", "4"):
        load_layered(server.url, bits=4)


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        ("stopped", "reached refused"),
        ("hangs", "0.3 none"),
        ("breaks", "connection broke"),
        ("503", "503"),
    ],
)
def test_nothing_in_the_cache(server, monkeypatch, how, tokens):
    unreachable(server, how, monkeypatch)
    for read in (load_layered, describe_layered):
        with raises_naming(LayeredModelError, "manifest.json:", *tokens.split()):
            read(server.url)


def test_a_damaged_cache_without_a_server(server, cache):
    load_layered(server.url, bits=2)
    path = copy_of(cache) / "w2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    stop(server)
    with raises_naming(LayeredModelError, "reached", "incomplete:", "w2.safetensors"):
        load_layered(server.url, bits=2)


def test_a_file_that_hangs(server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUTS", (0.3, 0.3))
    server.hangs.add("w2.safetensors")
    start = time.monotonic()
    with raises_naming(LayeredModelError, "w2.safetensors:", "0.3"):
        load_layered(server.url, bits=2)
    assert time.monotonic() - start < 10


def test_redirects(server, state):
    server.redirects["w2.safetensors"] = f"{server.url}/w2.safetensors?elsewhere"
    with raises_naming(LayeredModelError, "w2.safetensors:", "redirects"):
        load_layered(server.url, bits=2)
    server.redirects["w2.safetensors"] = "ftp://127.0.0.1/w2.safetensors"
    with pytest.raises(LayeredModelError, match=r"w2\.safetensors"):
        load_layered(server.url, bits=2)
    shutil.copy(server.folder / "w2.safetensors", server.folder / "moved")
    server.redirects["w2.safetensors"] = "/models/tiny/moved"
    assert_same(load_layered(server.url, bits=2).state, state, 2)


@pytest.mark.parametrize(
    "url",
    ["ftp://host/m", "file:///etc", "s3://bucket/m", "http://", "https:///m", "http://[::1/m"],
)
def test_addresses_that_are_none(cache, url):
    for read in (load_layered, describe_layered):
        with raises_naming(LayeredModelError, url):
            read(url)
    assert not cache.exists()


def test_a_width_that_the_model_has_not(server):
    with raises_naming(ValueError, "bits:", "2", "8", "http://", "9"):
        load_layered(server.url, bits=9)
    assert server.loaded() == []


# -- the cache -------------------------------------------------------------------------------------


def test_a_full_disk(server, cache, monkeypatch):
    real = Path.open

    def full(path, *arguments, **options):
        if path.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with raises_naming(OSError, "cache:", "w2.safetensors", "space"):
        load_layered(server.url, bits=2)


def test_older_parts_are_removed(server, cache):
    load_layered(server.url, bits=2)
    old = copy_of(cache) / "w3.safetensors.0123456789abcdef.partial"
    old.write_bytes(b"of an older model")
    load_layered(server.url, bits=3)
    assert not old.exists()


def test_threads_that_fetch_the_same(server, state):
    found, threads = [], []
    for bits in (4, 2, 3, 4):
        work = threading.Thread(
            target=lambda k=bits: found.append(load_layered(server.url, bits=k))
        )
        work.start()
        threads.append(work)
    for work in threads:
        work.join()
    assert sorted(m.bits for m in found) == [2, 3, 4, 4]
    for model in found:
        assert_same(model.state, state, model.bits)
    assert sorted(server.loaded()) == files(4)


def test_processes_that_fetch_the_same(server, state, cache):
    """Both break off again and again, and take each other's parts."""
    server.breaks["w2.safetensors"] = [500] * 3
    code = "import sys, ppvision.quant as q; print(q.load_layered(sys.argv[1], bits=3).bits)"
    command = [sys.executable, "-W", "ignore", "-c", code, server.url]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [worker.communicate(timeout=200) for worker in workers]
    for output, errors in ends:
        assert output.split()[-1:] == ["3"], errors
    names = sorted(p.name for p in copy_of(cache).iterdir())
    assert names == ["manifest.json", *files(3)]
    assert sorted(set(server.loaded())) == files(3)
    assert_same(load_layered(server.url, bits=3).state, state, 3)


# -- a real server ---------------------------------------------------------------------------------

NGINX = """
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log {root}/error.log;
events {{ }}
http {{
  access_log {root}/access.log;
  client_body_temp_path {root}/a; proxy_temp_path {root}/b; fastcgi_temp_path {root}/c;
  uwsgi_temp_path {root}/d; scgi_temp_path {root}/e;
  gzip on; gzip_types *; gzip_min_length 1;
  server {{ listen 127.0.0.1:{port}; root {root}/www; }}
}}
"""


@pytest.fixture
def nginx(original, tmp_path, cache):
    """Address and folder of a model behind nginx, and its log."""
    root, port = tmp_path / "nginx", find_free_port()
    folder = Path(shutil.copytree(original, root / "www" / "tiny"))
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port))
    command = [
        "nginx",
        "-p",
        str(root),
        "-c",
        str(root / "nginx.conf"),
        "-e",
        str(root / "error.log"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if process.poll() is None and (root / "nginx.pid").exists():
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/tiny", folder, root / "access.log"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.all
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs apt package nginx")
def test_behind_nginx(nginx, state, cache):
    url, folder, log = nginx
    assert_same(load_layered(url, bits=2).state, state, 2)
    # A download that broke off, with the date or tag that nginx gave.
    name = "w3.safetensors"
    entry = read_manifest(folder)["files"][name]
    with module.Remote(url)._answer("HEAD", name) as answer:
        validator = remote_cache._validator_of(answer)
    assert validator
    partial = copy_of(cache) / f"{name}.{entry['sha256'][:16]}.partial"
    partial.write_bytes((folder / name).read_bytes()[:50])
    remote_cache._validator(partial).write_text(validator)
    assert_same(load_layered(url, bits=3).state, state, 3)
    assert f'"GET /tiny/{name} HTTP/1.1" 206 {entry["bytes"] - 50}' in log.read_text()
    (folder / "w7.safetensors").unlink()
    found = load_layered(url)
    assert (found.bits, found.available) == (6, 6)
    assert log.read_text().count(f'"GET /tiny/{name}') == 1
    # What was begun of a file that changed since.
    other = save_layered(tiny_once_qat(9), folder, bits=BITS, config=CONFIG)
    os.utime(other / "w2.safetensors", (1, 1))
    entry = read_manifest(other)["files"]["w2.safetensors"]
    partial = copy_of(cache) / f"w2.safetensors.{entry['sha256'][:16]}.partial"
    partial.write_bytes(b"begun")
    remote_cache._validator(partial).write_text(validator)
    expected = extract_state(tiny_once_qat(9).model, BITS)
    assert_same(load_layered(url, bits=8).state, expected, 8)
