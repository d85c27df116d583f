"""Screenshots of VisualDL over runs: docs/images/dashboard_PAGE.png.

    python -m benchmark.plots.dashboard scalars output/digits_batch_50 output/digits_batch_20
    python -m benchmark.plots.dashboard images output/scenes
    python -m benchmark.plots.dashboard settings output/digits_batch_50 output/digits_batch_20

Needs the apt packages chromium and chromium-driver.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.browser import chromium

FOLDER = Path(__file__).parents[2] / "docs" / "images"
PATHS = {"scalars": "scalar", "images": "sample/image", "settings": "hyper-parameter"}
DRAWN = 8  # seconds until charts and pictures stand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", choices=PATHS)
    parser.add_argument("runs", nargs="+")
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "ppvision.engine.dashboard", *args.runs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in server.stdout:
            if found := re.search(r"VisualDL: (\S+)", line):
                address = found[1]
            if "Running VisualDL" in line:
                break
        with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
            browser.open(f"{address}/app/{PATHS[args.page]}")
            time.sleep(DRAWN)
            browser.screenshot(FOLDER / f"dashboard_{args.page}.png")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
