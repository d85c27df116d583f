"""A hook of mkdocs: links to files outside docs/ become plain text.

The site has the pages of docs/ only. On GitHub such a link opens the file.
"""

import re

# [the README](../README.md#install), also from a page in a folder of docs/
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:README|CONTRIBUTING|benchmark/)[^)\s]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page's text for the site."""
    return _OUTSIDE.sub(r"\1", markdown)
