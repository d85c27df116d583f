"""The card of weights that a GPU training wrote, for `benchmark/zoo_weights.py`.

    python -m benchmark.gpu.card benchmark/gpu/cards/pale_nano.tiny_imagenet_100.json \\
        out/pale_nano_tiny_imagenet_100.json \\
        --score "0.612 in float, 0.611 at 8 bits (ppvision eval)" --output card.json

The draft has places such as `{steps}` for what the training's record says, and `{score}`. Its hours
are those of the whole process.
"""

import argparse
import json
from pathlib import Path

SECONDS = "{given_seconds}"  # what the hours of a draft say


def fill_card(draft: dict, record: dict, score: str) -> dict:
    """A card whose texts say what a record knows.

    Args:
        draft: a card with places.
        record: of a training (`benchmark.gpu.common.save_run`).
        score: what was measured with the converted weights.

    Raises:
        KeyError: a place for something that the record lacks.
    """
    known = {**record, "score": score}
    card = {k: v.format(**known) if isinstance(v, str) else v for k, v in draft.items()}
    if "seed" in draft:
        card["seed"] = record["seed"]  # a number
    if draft.get("hours") == SECONDS:
        card["hours"] = round(record["given_seconds"] / 3600, 3)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("draft", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--score", required=True)
    parser.add_argument("--short_score", default="", help="for tables, such as 'top-1 0.527'")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draft, record = (json.loads(p.read_text(encoding="utf-8")) for p in (args.draft, args.record))
    card = fill_card(draft, record, args.score) | {"short_score": args.short_score}
    args.output.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
