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


def limit() -> float:
    """GB of a v5e chip."""
    return rows("v5e", size="180m")[0]["limit_bytes"] / GIGABYTE


def fope_over_rope(name: str, field: str, **wanted: Any) -> float:
    """Percent by which FoPE has more of it than RoPE."""
    one, other = (rows(name, method=method, **wanted)[0][field] for method in ("fope", "rope"))
    return 100 * (one / other - 1)


def traffic(name: str, **wanted: Any) -> float:
    return fope_over_rope(name, "hbm_bytes", **wanted)


def traffic_at_512() -> list[float]:
    values = [traffic("v5e", size="60m", length=512)]
    values += [traffic("v5p_v6e", topology=slice_, length=512) for slice_ in (V5P, V6E)]
    return [min(values), max(values)]


def memory_at_32768() -> list[float]:
    values = [
        fope_over_rope("v5p_v6e", "needed_bytes", topology=slice_, length=32768)
        for slice_ in (V5P, V6E)
    ]
    return [min(values), max(values)]


def of_the_peak(name: str, **wanted: Any) -> list[float]:
    """Least and most percent of the peak that the bounds leave."""
    values = [100 * row["mfu_bound"] for row in rows(name, **wanted)]
    return [min(values), max(values)]


def milliseconds(name: str, what: str, **wanted: Any) -> float:
    """Of a step, at the chip's peak."""
    return 1e3 * rows(name, **wanted)[0]["seconds"][what]


V5P, V6E = "v5p:4x4x4", "v6e:16x16"

CLAIMS = (
    Claim(
        "**60m fits v5e 4x4 as it is** ({} to {} GB of {}), with every method and both lengths. "
        "180m needs `model.remat=dots` there (it is {} GB too much otherwise)",
        lambda: [*needed("v5e", size="60m"), limit(), needed("v5e", size="180m")[0] - limit()],
    ),
    Claim(
        "bytes of memory traffic {} to {}% at 512 tokens, {}% at 4,096, and {}% (v5p) and {}% "
        "(v6e) at 32,768, where its mixed tables take {} to {}% more memory",
        lambda: [
            *traffic_at_512(),
            traffic("v5e", size="60m", length=4096),
            *(traffic("v5p_v6e", topology=slice_, length=32768) for slice_ in (V5P, V6E)),
            *memory_at_32768(),
        ],
    ),
    Claim(
        "(at most {}% of the peak at 512 tokens, {}% at 32,768, where attention computes scores "
        "again), **v5e and v6e by memory traffic**: at most {} to {}% for 60m on v5e, {} to {}% "
        "for 1200m on 256 chips of v6e",
        lambda: [
            of_the_peak("v5p_v6e", topology=V5P, length=512)[1],
            of_the_peak("v5p_v6e", topology=V5P, length=32768)[1],
            *of_the_peak("v5e", size="60m"),
            *of_the_peak("v5p_v6e", topology=V6E),
        ],
    ),
    Claim(
        "all four of figure 4 at 60m and 1,024 tokens take {} to {} GB",
        lambda: needed("extension", size="60m"),
    ),
    Claim(
        "takes {} GB with FoPE and {} GB with YaRN",
        lambda: [
            needed("extension", method=f"SmolLM-1.7B+{name}-4096")[0] for name in ("fope", "yarn")
        ],
    ),
    Claim(
        "the 60m step takes {} to {} GB a chip, and little more than the sums of gradients "
        "crosses the data center's network, {} MB a chip and step. That takes {} ms at a chip's "
        "share of its machine's network cards, beside {} ms of memory traffic with RoPE and {} ms "
        "with FoPE",
        lambda: [
            *needed("two_slices"),
            rows("two_slices")[0]["dcn_bytes"] / 1e6,
            milliseconds("two_slices", "dcn"),
            *(milliseconds("two_slices", "hbm", method=method) for method in ("rope", "fope")),
        ],
    ),
    Claim(
        "One slice, whose chips have twice the rows, takes at least {} ms",
        lambda: [milliseconds("v5e", "hbm", size="60m", length=512, method="rope")],
    ),
)

PAGE = Page(
    path="experiments/tpu_plan/README.md",
    claims=CLAIMS,
    exempt={
        "settings": [
            "rows of 32,768 tokens",
            "At a head_dim of 64",
            "splash pads heads to 128",
            "a matrix unit of 128 x 128",
            "SmolLM-1.7B at 4,096 tokens",
        ],
        "compiled without a row": ["takes 11.5 GB with it"],
    },
    exempt_sections={"": "settings"},
)
