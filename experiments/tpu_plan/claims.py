"""Where the numbers of README.md come from; `python -m experiments.check tpu_plan`."""

from __future__ import annotations

from typing import Any

from experiments.check.claims import Claim, Page
from experiments.check.rows import read

GIGABYTE = 1e9


def rows(name: str, **wanted: Any) -> list[dict[str, Any]]:
    found = [row for row in read(f"tpu_plan/results/{name}.jsonl") if wanted.items() <= row.items()]
    if not found:
        raise LookupError(f"results/{name}.jsonl has no row with {wanted}")
    return found


def needed(name: str, **wanted: Any) -> list[float]:
    """Least and most GB a device."""
    values = [row["needed_bytes"] / GIGABYTE for row in rows(name, **wanted)]
    return [min(values), max(values)]


def fope_over_rope(name: str, **wanted: Any) -> float:
    """Percent by which FoPE moves more bytes than RoPE."""
    one, other = (rows(name, method=method, **wanted)[0] for method in ("fope", "rope"))
    return 100 * (one["hbm_bytes"] / other["hbm_bytes"] - 1)


def of_the_peak(name: str, **wanted: Any) -> list[float]:
    """Least and most percent of the peak that the bounds leave."""
    values = [100 * row["mfu_bound"] for row in rows(name, **wanted)]
    return [min(values), max(values)]


def milliseconds(name: str, what: str, **wanted: Any) -> float:
    """Of a step, at the chip's peak."""
    return 1e3 * rows(name, **wanted)[0]["seconds"][what]


def moved(name: str, **wanted: Any) -> float:
    """GB of the memory's traffic."""
    return rows(name, **wanted)[0]["hbm_bytes"] / GIGABYTE


def program(scan: bool, tuned: bool) -> list[float]:
    """Memory, traffic and percent of the peak of 60m with RoPE."""
    (row,) = (
        row for row in rows("options", scan_layers=scan) if bool(row["compiler_options"]) == tuned
    )
    return [row["needed_bytes"] / GIGABYTE, row["hbm_bytes"] / GIGABYTE, 100 * row["mfu_bound"]]


V5P, V6E = "v5p:4x4x4", "v6e:8x8"
SHORT = {"size": "60m", "length": 512}
ROPE = SHORT | {"method": "rope"}
ROPE_V6E = {"topology": V6E, "method": "rope"}

CLAIMS = (
    Claim(
        "{} to {} GB of a chip's 16.9 for 60m, {} to {} GB for 180m, with every method and both "
        "lengths. 1200m takes {} to {} GB of a v5p chip (4x4x4) and {} to {} GB of a v6e one",
        lambda: [
            *needed("v5e", size="60m"),
            *needed("v5e", size="180m"),
            *needed("v5p_v6e", topology=V5P),
            *needed("v5p_v6e", topology=V6E),
        ],
    ),
    *(
        Claim(
            f"| {layers} | {options} | {{}} | {{}} | {{}}% |",
            lambda scan=layers == "scan", tuned=options == "tuned": program(scan, tuned),
        )
        for layers in ("scan", "row")
        for options in ("none", "tuned")
    ),
    Claim(
        "takes {}% of the bytes of 60m with RoPE at 512 tokens, and {}% of those of 1200m on "
        "v6e**: {} to {} GB, at most {}% to {}% of the peak; {} to {} GB, {}% to {}%",
        lambda: [
            100 * (1 - moved("v5e", **ROPE) / moved("by_halves", **ROPE)),
            100 * (1 - moved("v5p_v6e", **ROPE_V6E) / moved("by_halves", **ROPE_V6E)),
            *(moved(name, **ROPE) for name in ("by_halves", "v5e")),
            *(of_the_peak(name, **ROPE)[0] for name in ("by_halves", "v5e")),
            *(moved(name, **ROPE_V6E) for name in ("by_halves", "v5p_v6e")),
            *(of_the_peak(name, **ROPE_V6E)[0] for name in ("by_halves", "v5p_v6e")),
        ],
    ),
    Claim("of the {} GB the loss", lambda: [moved("v5e", **ROPE)]),
    Claim(
        "traffic +{}% (60m) and +{}% (180m) at 512 tokens, +{}% and +{}% at 4,096",
        lambda: [
            fope_over_rope("v5e", size=size, length=length)
            for length in (512, 4096)
            for size in ("60m", "180m")
        ],
    ),
    Claim(
        "For 1200m at 4,096 it is +{}% (v5p) and +{}% (v6e)",
        lambda: [fope_over_rope("v5p_v6e", topology=slice_) for slice_ in (V5P, V6E)],
    ),
    Claim(
        "operations are the limit there, {}% of the peak with both methods",
        lambda: {
            round(value, 1)
            for method in ("rope", "fope")
            for value in of_the_peak("v5p_v6e", method=method)
        },
    ),
    Claim(
        "FoPE itself moves {} to {} GB and {} to {} GB since",
        lambda: [
            moved(name, method="fope", topology=slice_)
            for slice_ in (V5P, V6E)
            for name in ("by_halves", "v5p_v6e")
        ],
    ),
    Claim(
        "by {}% for 60m at 512 tokens: it rotates nothing",
        lambda: [100 * (1 - moved("v5e", method="alibi", **SHORT) / moved("v5e", **ROPE))],
    ),
    Claim(
        "(at most {} to {}% of the peak for 180m, {} to {}% for 1200m on v5p, {} to {}% on 64 "
        "chips of v6e), 60m by memory traffic at 512 tokens (at most {} to {}%), by either at "
        "4,096 (at most {} to {}%)",
        lambda: [
            *of_the_peak("v5e", size="180m"),
            *of_the_peak("v5p_v6e", topology=V5P),
            *of_the_peak("v5p_v6e", topology=V6E),
            *of_the_peak("v5e", **SHORT),
            *of_the_peak("v5e", size="60m", length=4096),
        ],
    ),
    Claim(
        "60m at 1,024 tokens, RoPE to FoPE or YaRN, takes {} to {} GB", lambda: needed("extension")
    ),
    Claim(
        "the 60m step takes {} to {} GB a chip, and {} MB a chip and step cross the data "
        "center's network: the sums of gradients, once. That takes {} ms at a chip's share of its "
        "machine's network cards, beside {} ms of memory traffic with RoPE and {} ms with FoPE",
        lambda: [
            *needed("two_slices"),
            rows("two_slices")[0]["dcn_bytes"] / 1e6,
            milliseconds("two_slices", "dcn"),
            *(milliseconds("two_slices", "hbm", method=method) for method in ("rope", "fope")),
        ],
    ),
    Claim(
        "One slice, whose chips have twice the rows, takes at least {} ms",
        lambda: [milliseconds("v5e", "hbm", **ROPE)],
    ),
)

PAGE = Page(
    path="experiments/tpu_plan/README.md",
    claims=CLAIMS,
    exempt={
        "settings": [
            "of a chip's 16.9",
            "60m with RoPE at 512 tokens",
            "heads of 64 left unpadded",
            "to 128 lanes",
            "rows of 128 numbers",
            "splash keeps 128",
            "64 chips of v6e",
            "each of 16 heads",
            "SmolLM-1.7B at 4,096 tokens",
        ],
        "compiled without a row": [
            "the loss over the vocabulary moves 34 GB",
            "(7 in place of 26) change it by 0.6%",
            "by nothing (86.4 GB)",
            "the network, 4 ms of a step",
        ],
    },
    exempt_sections={"": "settings"},
)
