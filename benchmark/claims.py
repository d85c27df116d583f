"""What the three papers claim, and whether it was seen here: one line per claim.

`results_page.py` writes the list at the end of docs/results.md. A verdict cites the table or the
test that it rests on; a new measurement that changes a verdict changes this file too.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["confirmed here", "not confirmed here", "not testable here"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        text: the claim, in one sentence.
        verdict: whether it was seen.
        why: what was seen, or what it would take.
        evidence: a table in `benchmark/results/` or a test file; empty where nothing was run.
    """

    text: str
    verdict: Verdict
    why: str
    evidence: str = ""


NO_IMAGENET = "Needs ImageNet and GPUs for weeks."

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "Pale Transformer (AAAI 2022)": (
        Claim(
            "Pale-T, S and B have 22, 48 and 85 million parameters and 4.2, 9.0 and 15.6 GFLOPs.",
            "confirmed here",
            "Counted. Equal after the rounding of the paper, except 15.53 for B.",
            "tests/test_pale_transformer.py",
        ),
        Claim(
            "UPerNet and Mask R-CNN over them take 996 to 1311 and 306 to 595 GFLOPs.",
            "confirmed here",
            "Counted. Equal within 1%.",
            "tests/test_pale_transformer.py",
        ),
        Claim(
            "PS-Attention costs less than global attention on large images.",
            "confirmed here",
            "When the side of the image doubles, its time grows 7 times; the time of global "
            "attention grows 40 times.",
            "attention_scaling.csv",
        ),
        Claim(
            "PS-Attention scores higher than stripes and shifted windows.",
            "not confirmed here",
            "It scores lower than both on CIFAR-10, at 32 pixels. Larger images were not tried.",
            "attention_cifar10.csv",
        ),
        Claim("ImageNet top-1 of 83.4, 84.3 and 84.9.", "not testable here", NO_IMAGENET),
        Claim(
            "ADE20K mIoU of 50.4 to 52.2, COCO box AP of 47.4 to 49.3.",
            "not testable here",
            "Needs weights from ImageNet.",
        ),
    ),
    "Semantic Diffusion Network (NeurIPS 2022)": (
        Claim(
            "SDN sharpens boundaries compared with the same network without it.",
            "confirmed here",
            "Over `pale_nano`: 1.6 points of Boundary IoU on nuclei, 2.9 on CamVid. Over ResNet-18 "
            "on CamVid only.",
            "sdn_runs.csv",
        ),
        Claim(
            "The semantic guidance gives a larger gain than pixel differences only.",
            "not confirmed here",
            "Central differences without guidance have the same score within the spread of "
            "the seeds, for guidance by the next level and by class scores (also in sdn_runs.csv).",
            "sdn_forms.csv",
        ),
        Claim(
            "It fits any segmentation network with one or several scales.",
            "confirmed here",
            "Eight networks of PaddleSeg take it, over their own backbones and over Pale.",
            "tests/test_sdn_in_paddleseg.py",
        ),
        Claim(
            "It costs little.",
            "not confirmed here",
            "1.3 to 1.4 times the time over `pale_nano`, 1.4 to 1.6 over ResNet-18. On the finest "
            "level only: 1.1 to 1.2.",
            "sdn_costs.csv",
        ),
        Claim(
            "It improves the scores on ADE20K and Cityscapes.",
            "not testable here",
            "Needs these data sets and weights from ImageNet.",
        ),
    ),
    "Vertical layering (TPAMI 2023)": (
        Claim(
            "One stored model gives every width exactly, if bits are omitted.",
            "confirmed here",
            "Cut codes equal stored codes at each width, bit for bit.",
            "tests/test_codes.py",
        ),
        Claim(
            "An ordinary quantised model loses much accuracy if its bits are omitted.",
            "confirmed here",
            "ResNet-20 at 2 bits: top-1 is 16 points lower than after a separate training.",
            "layered_cifar10.csv",
        ),
        Claim(
            "One training for all widths scores the same as a separate training for each width.",
            "confirmed here",
            "ResNet-20, three seeds: within 0.3 points at 8, 6 and 4 bits, 0.6 at 2.",
            "layered_cifar10.csv",
        ),
        Claim(
            "ResNet-18 on ImageNet: 69.2, 68.8 and 66.6 at 4, 3 and 2 bits.",
            "not testable here",
            NO_IMAGENET,
        ),
    ),
}


def claims_section() -> str:
    """The list as a section of Markdown, a table per paper."""
    parts = [
        "## Claims of the papers\n",
        "One line per claim: whether it was seen here, and the table or test that says so.\n",
    ]
    for paper, claims in CLAIMS.items():
        lines = [
            f"### {paper}\n",
            "| claim | here | what was seen | evidence |",
            "|---|---|---|---|",
        ]
        for claim in claims:
            evidence = f"`{claim.evidence}`" if claim.evidence else "-"
            lines.append(f"| {claim.text} | {claim.verdict} | {claim.why} | {evidence} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
