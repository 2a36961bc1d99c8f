"""README.md of an exported checkpoint: what it is, how it was trained, measured, and is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.config import Experiment
from fope_jax.position import FoPE, fingerprint, to_spec
from fope_jax.report.rows import ReportError, read_run
from fope_jax.report.tables import text_tables
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import IMPORTED

UNKNOWN_LICENSE = "unknown"


class CardFacts(NamedTuple):
    """What a model card is written from.

    Attributes:
      name: of the checkpoint's directory.
      run: path of the run.
      parameters: how many numbers the model has.
      model_type: Hugging Face's name of the family.
      info, lineage: run.json and lineage.json; empty if there is none.
      tokenizer: a sentence.
      license: an id of the Hub, such as "apache-2.0".
    """

    name: str
    run: str
    step: int
    experiment: Experiment
    parameters: int
    model_type: str
    info: Mapping[str, Any]
    lineage: Mapping[str, Any]
    tokenizer: str
    license: str = UNKNOWN_LICENSE


def model_card(facts: CardFacts) -> str:
    """The text of README.md, in Markdown with the metadata that the Hub reads."""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"license: {facts.license}",
            "tags:",
            "- fope_jax",
            "- position-embedding",
            f"- {facts.model_type}",
            "---",
            "",
            f"# {facts.name}",
            "",
            _what_it_is(facts),
            "",
            *_section("Position embedding", _position(facts)),
            *_section("Training", _training(facts)),
            *_section("Tokenizer", facts.tokenizer),
            *_section("Measured", _measured(facts)),
            *_section("Load it", _loading(facts)),
        ]
    )


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", "", text, ""]


def _what_it_is(facts: CardFacts) -> str:
    shape = facts.experiment.model.shape
    return (
        f"A language model of {facts.parameters:,} parameters ({shape.num_layers} layers of width "
        f"{shape.d_model}, {shape.num_heads} heads of {shape.head_dim}), the run "
        f"`{facts.experiment.name}` (seed {facts.experiment.seed}) at step {facts.step:,}, "
        f"exported by fope_jax in the layout of `{facts.model_type}`. License: {facts.license}."
    )


def _position(facts: CardFacts) -> str:
    spec = json.dumps(to_spec(facts.experiment.position), indent=1)
    summary = fingerprint(facts.experiment.position, facts.experiment.model.shape).summary
    windows = facts.experiment.model.windows
    text = f"{summary}\n\n```json\n{spec}\n```"
    if not windows:
        return text
    each = ", ".join("none" if window is None else f"{window:,}" for window in windows)
    return f"{text}\n\nSliding windows in tokens, repeated over the layers: {each}."


def _training(facts: CardFacts) -> str:
    experiment, info = facts.experiment, facts.info
    train, data = experiment.train, experiment.data
    lines = [f"- training length: {train.length:,} tokens"]
    if train.position_range is not None:
        lines.append(
            f"- positions: drawn in order from {train.position_range:,} ({train.position_draw})"
        )
    if origin := info.get(IMPORTED):
        lines.append(f"- weights: imported from {_origin(origin)}, not trained further")
        return "\n".join(lines)
    if parent := facts.lineage.get("parent"):
        lines.append(
            f"- continues: `{Path(str(parent.get('run'))).name}`, step {parent.get('step')}"
        )
    parts = data.components
    corpora = ", ".join(name + f" ({share:g})" * (len(parts) > 1) for name, share in parts)
    tokens = info.get("data", {}).get("tokens")
    lines += [
        f"- data: {corpora}" + (f", {tokens:,} tokens" if tokens else ""),
        *(f"- task: {name}, {share:g} of the rows" for name, share in data.task_shares),
        f"- steps: {facts.step:,} of {train.steps:,}, each {train.batch_size:,} rows of "
        f"{train.length:,} tokens",
        f"- learning rate: {train.learning_rate:g}; seed {experiment.seed}",
    ]
    return "\n".join(lines)


def _origin(origin: Mapping[str, Any]) -> str:
    if repository := origin.get("repository"):
        return f"{repository}, commit {origin['commit']}"
    return f"`{Path(origin['directory']).name}`"


def _measured(facts: CardFacts) -> str:
    try:
        tables = text_tables([read_run(as_path(facts.run), facts.step)])
    except ReportError:  # nothing has been measured, or by hand
        tables = ""
    if not tables or tables.startswith("not evaluated"):
        return "Nothing was measured at this step; `fope evaluate RUN/STEP` does it."
    return f"```text\n{tables}\n```"


def _loading(facts: CardFacts) -> str:
    ours = (
        "In fope_jax, with the same logits bit for bit where the tensors are float32:\n\n```bash\n"
        f"fope import {facts.name} --workdir runs/{facts.name}\n```\n\n"
    )
    if isinstance(facts.experiment.position, FoPE):
        return ours + (
            "transformers has no FoPE: it would run this checkpoint as RoPE, and give other "
            "numbers. vLLM, SGLang and LMDeploy read the coefficients, "
            "`model.rotary_emb.cos_coef` and `sin_coef`."
        )
    return ours + (
        "In transformers 5 or newer:\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{facts.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")\n```'
    )
