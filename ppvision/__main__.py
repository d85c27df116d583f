"""`python -m ppvision VERB`."""

import sys

from ppvision.environment import prefer_fast_mkl


def main() -> None:
    prefer_fast_mkl()  # before Paddle is imported
    from ppvision.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
