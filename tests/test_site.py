"""The reference pages are what the code says; the site builds without a warning and reads well."""

import importlib.util
import re
import shutil
import sys

import pytest
import yaml

from tests.helpers.browser import chromium
from tests.helpers.configs import ROOT
from tests.helpers.verbs import shell

DOCS = ROOT / "docs"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return load_script("reference_pages")


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse and inspect write otherwise")
@pytest.mark.parametrize("page", ["reference_cli.md", "reference_python.md", "reference_config.md"])
def test_reference_pages_are_what_the_code_says(page, reference, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert (DOCS / page).read_text(encoding="utf-8") == reference.PAGES[page](), (
        "run: python scripts/reference_pages.py"
    )


def navigation(entries: list) -> list[str]:
    pages = []
    for entry in entries:
        for found in entry.values() if isinstance(entry, dict) else [entry]:
            pages += navigation(found) if isinstance(found, list) else [found]
    return pages


def test_every_page_is_in_the_navigation_and_the_index_once():
    content = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = navigation(content["nav"])
    found = [path.relative_to(DOCS).as_posix() for path in DOCS.glob("**/*.md")]
    assert sorted(pages) == sorted(found)
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert set(pages) - {"index.md"} == set(re.findall(r"\]\(([\w/]+\.md)\)", index))


def test_links_to_files_outside_the_docs_are_text_on_the_site():
    to_site = load_script("site_links").on_page_markdown
    text = "See [the README](../README.md#install), [engines](notes/engines.md), [a](../zoo.md#b)."
    found = to_site(text, page=None, config=None, files=None)
    assert found == "See the README, [engines](notes/engines.md), [a](../zoo.md#b)."


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Pages without directories: they open from a disk as well."""
    folder = tmp_path_factory.mktemp("site")
    built = shell("bash", ROOT / "scripts" / "docs.sh", "--site-dir", folder)
    assert built.returncode == 0, built.stderr  # of --strict: a warning is an error
    return folder


@pytest.mark.all
def test_the_site_has_a_page_for_every_file(site):
    pages = {path.stem for path in DOCS.glob("**/*.md")}
    assert {path.stem for path in site.glob("**/*.html")} - {"404"} == pages


@pytest.mark.all
@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs Chromium"
)
def test_a_reader_goes_from_the_first_page_to_another(site, tmp_path):
    with chromium(tmp_path) as browser:
        browser.open((site / "index.html").as_uri())
        assert "three ideas that were published" in browser.text()
        browser.run("document.querySelector('article a[href=\"layered.html\"]').click()")
        browser.wait_for(lambda: "one training, one model, any bit-width" in browser.text())
        # Nothing on a page asks another server.
        addresses = browser.run(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
        assert [a for a in addresses if not a.startswith("file:")] == []
