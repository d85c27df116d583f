"""Arguments of `ppvision dashboard` and `python -m ppvision.dashboard`.

They are separate from the dashboard, whose libraries take seconds to import."""

import argparse
import re
from pathlib import Path

from ppvision.errors import shorten


def add_dashboard_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folders and the address of their pages."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: other machines can connect",
    )
    parser.add_argument("--port", type=_port, help="first port to try (default: any free port)")
    parser.add_argument(
        "--public_path", type=_public_path, default="/app", help="path of the pages, for a proxy"
    )


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"expected 1 to 65535, got {shorten(text)}")
    return int(text)


def _public_path(text: str) -> str:
    path = text.rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected a path such as /vdl, got {shorten(text)}")
    return path
