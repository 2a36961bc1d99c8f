"""Hours and dollars of the paper's 60M runs: `python -m docs.generate.paper_run` writes its page.

From the rows of `fope plan` and the configuration of the run; what neither tells (prices, and what
was never measured on a TPU) is stated in experiments/tpu_plan/cost.json.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any, NamedTuple

from docs.generate.links import ROOT
from fope_jax.config import Experiment, build_experiment, load_config

PAGE = ROOT / "docs/howto/paper_run.md"
COST = ROOT / "experiments/tpu_plan/cost.json"
PLAN = ROOT / "experiments/tpu_plan/results/v5e.jsonl"
CONFIG, SIZE, LENGTH = "configs/paper/c4_books.py", "60m", 512
METHODS = ("fope", "rope", "alibi")  # of the paper's figure for 60M that have a row in the plan

TEXT = """\
# The paper's 60M run, on paper

What it takes to train the paper's smallest model with {tokens:,} tokens of C4 on one
{slice}, from the text to the figure: **{least:.1f} h or more by the plan's bounds, about
{planned:.1f} h at {share:.0%} of their speed: ${on_demand:,.0f}, or ${spot:,.0f} on a spot
slice.** The {number} methods of the figure share the token cache: {all_planned:.1f} h,
${all_on_demand:,.0f} or ${all_spot:,.0f}.

**Nothing here was measured on a TPU.** The bound is that of `fope plan`
([tpu_plan](../../experiments/tpu_plan/README.md)): a step of {batch:,} rows of {length} tokens
takes {step_ms:.0f} ms or more, bound by {bound}, a model-flops utilisation of {mfu:.0%} or
less. Prices and what else no program here can tell are inputs,
[cost.json](../../experiments/tpu_plan/cost.json); with yours, `python -m docs.generate.paper_run`
writes this page again.

| input | value |
|---|---|
{inputs}

## One run, FoPE

| part | what is counted | at the bound, h | planned, h | on demand | spot |
|---|---|--:|--:|--:|--:|
{parts}

The build needs no TPU; at the slice's price it is counted too dear. A spot run pays for {losses}
losses of the slice, {minutes} min each: the start, and half of the {save_every:,} steps between two
checkpoints. Time in the queue costs nothing. A checkpoint has {checkpoint:.1f} GB, the cache
{cache:.0f} GB.

## The figure

| method | step at the bound, ms | training at the bound, h | planned, h | on demand | spot |
|---|--:|--:|--:|--:|--:|
{methods}

The cache is built once. KERPLE, FIRE and NoPE of the paper's larger figures have no row in the plan
for this slice; `fope plan --method kerple,fire,nope` adds them.

## The commands

```bash
pip install '.[tpu-compiler]'
fope plan --config {config} --topology {topology} --size {size} --method {names} --length {length}
```

Then, with the files of C4 and the tokenizer in place (the configuration says which), on a machine
of {processes} cores:

```bash
fope data build --config {config}:data=c4-files \\
  --config.data.cache_dir=gs://my-bucket/caches --workers {processes}
```

And from any machine with `gcloud`; `resume.sh` asks for the slice, installs, launches, and returns
when the command has ended on every host:

```
watch() {{
  tpu_scripts/resume.sh --name {size} --zone us-central1-a --accelerator {slice} --spot -- "$@"
}}
for method in {methods_of_shell}; do
  watch train --workdir gs://my-bucket/$method --config.data.cache_dir=gs://my-bucket/caches \\
    --config {config}:data=c4-files,position=$method &&
    watch evaluate gs://my-bucket/$method || break
done
tpu_scripts/delete.sh  --name {size} --zone us-central1-a
fope report gs://my-bucket/fope gs://my-bucket/rope gs://my-bucket/alibi -o figure
```

`tpu_scripts/status.sh` says how far a run is; [pods.md](pods.md) has the rest."""


class Part(NamedTuple):
    """A part of a run: hours at the bounds and hours planned."""

    name: str
    counted: str
    least: float
    planned: float


def read_plan() -> dict[str, dict[str, Any]]:
    """The plan's row of each method at ``SIZE`` and ``LENGTH``."""
    rows = map(json.loads, PLAN.read_text(encoding="utf-8").splitlines())
    return {r["method"]: r for r in rows if (r["size"], r["length"]) == (SIZE, LENGTH)}


def step_seconds(row: dict[str, Any]) -> float:
    """The longest of a step's bounds, in seconds."""
    return max(row["seconds"].values())


def build_hours(experiment: Experiment, cost: dict[str, Any]) -> float:
    """Hours to tokenise the tokens of the run on one host."""
    tokens = experiment.data.max_tokens or 0
    return tokens / cost["build_processes"] / cost["build_tokens_per_second"] / 3600


def run_parts(experiment: Experiment, row: dict[str, Any], cost: dict[str, Any]) -> list[Part]:
    """What one run takes after its cache is built, with the time to begin and to score."""
    train, scored = experiment.train, experiment.evaluate
    step, share = step_seconds(row), cost["share_of_bound"]
    training = train.steps * step / 3600
    saves = -(-train.steps // train.save_every)
    # A forward pass is a third of a step, which is bound alike from 512 to 4,096 tokens.
    trials = scored.passkey_trials * len(scored.passkey_depths)
    tokens = trials * sum(scored.passkey_lengths) * train.length
    tokens += scored.num_windows * sum(scored.lengths) * train.length
    scoring = tokens / (train.batch_size * train.length) * step / 3 / 3600
    programs = len(scored.lengths) + len(scored.passkey_lengths)
    begin = cost["install_minutes"] / 60
    compiling = cost["compile_minutes"] * (1 + programs) / 60
    saving = saves * cost["seconds_per_save"] / 3600
    return [
        Part("start", f"installing, {cost['install_minutes']} min", begin, begin),
        Part(
            "compilation",
            f"{1 + programs} programs, {cost['compile_minutes']} min each",
            compiling,
            compiling,
        ),
        Part("training", f"{train.steps:,} updates", training, training / share),
        Part("saves", f"{saves}, {cost['seconds_per_save']} s each", saving, saving),
        Part(
            "evaluation",
            f"{tokens / 1e6:.1f} M tokens of text and passkeys",
            scoring,
            scoring / share,
        ),
    ]


def total(parts: list[Part]) -> Part:
    """All parts in one."""
    return Part("all", "", sum(p.least for p in parts), sum(p.planned for p in parts))


def page() -> str:
    """The page as Markdown."""
    cost, plan = json.loads(COST.read_text(encoding="utf-8")), read_plan()
    experiment = build_experiment(load_config(f"{CONFIG}:size={SIZE},length={LENGTH}").to_dict())
    train, data_tokens = experiment.train, experiment.data.max_tokens or 0
    prices = cost["dollars_per_hour"]
    on_demand, spot = prices["dollars an hour, on demand"], prices["dollars an hour, spot"]
    lost = cost["spot_losses"] * cost["minutes_per_spot_loss"] / 60
    hours = build_hours(experiment, cost)
    counted = f"{data_tokens:,} tokens, {cost['build_processes']} processes"
    build = Part("token cache", counted, hours, hours)
    runs = {name: run_parts(experiment, plan[name], cost) for name in METHODS}
    one = [build, *runs["fope"]]
    whole = total(one)

    parts = [
        f"| {part.name} | {part.counted} | {part.least:.2f} | {part.planned:.2f} "
        f"| ${part.planned * on_demand:,.2f} | ${part.planned * spot:,.2f} |"
        for part in one
    ]
    parts.append(
        f"| **all** | | {whole.least:.2f} | {whole.planned:.2f} "
        f"| ${whole.planned * on_demand:,.2f} | ${(whole.planned + lost) * spot:,.2f} |"
    )
    methods = []
    for name in METHODS:
        step, planned = step_seconds(plan[name]), total(runs[name]).planned
        methods.append(
            f"| {name} | {1e3 * step:.0f} | {train.steps * step / 3600:.2f} | {planned:.2f} "
            f"| ${planned * on_demand:,.2f} | ${(planned + lost) * spot:,.2f} |"
        )
    inputs = [
        f"| {key.replace('_', ' ')} | {f'{value:,}' if isinstance(value, int) else value} |"
        for key, value in (prices | cost).items()
        if key != "dollars_per_hour"
    ]
    figure = hours + sum(total(parts_of_run).planned for parts_of_run in runs.values())
    row = plan["fope"]
    text = TEXT.format(
        tokens=data_tokens,
        slice=cost["slice"],
        topology=cost["topology"],
        least=whole.least,
        planned=whole.planned,
        share=cost["share_of_bound"],
        on_demand=whole.planned * on_demand,
        spot=(whole.planned + lost) * spot,
        number={2: "two", 3: "three", 4: "four"}[len(METHODS)],
        all_planned=figure,
        all_on_demand=figure * on_demand,
        all_spot=(figure + len(METHODS) * lost) * spot,
        batch=train.batch_size,
        length=LENGTH,
        step_ms=1e3 * step_seconds(row),
        bound={"hbm": "memory traffic", "compute": "operations", "ici": "network"}[row["bound"]],
        mfu=row["mfu_bound"],
        inputs="\n".join(inputs),
        parts="\n".join(parts),
        losses=cost["spot_losses"],
        minutes=cost["minutes_per_spot_loss"],
        save_every=train.save_every,
        checkpoint=row["memory"]["arguments"] * row["devices"] / 1e9,
        cache=data_tokens * 2 / 1e9,  # two bytes each up to 65,536 tokens
        methods="\n".join(methods),
        config=CONFIG,
        size=SIZE,
        names=",".join(METHODS),
        methods_of_shell=" ".join(METHODS),
        processes=cost["build_processes"],
    )
    return "\n\n".join(map(_fill, text.split("\n\n")))


def _fill(block: str) -> str:
    """Lines of up to 100 columns, where the block is a paragraph."""
    if block.startswith(("#", "|", "```")):
        return block
    return textwrap.fill(block, 100, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page() + "\n", encoding="utf-8")
