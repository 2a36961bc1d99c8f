"""`fope spectrum`: the spectra of a run's checkpoint, as rows and as curves for figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fope_jax.config import Experiment, check_vocabulary
from fope_jax.data.bos import find_bos
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.held_out import HeldOut, read_held_out, text_name
from fope_jax.evaluate.metrics import METRICS, replace_rows, row_ids
from fope_jax.evaluate.restore import (
    NonFiniteError,
    check_weights,
    load_run,
    read_experiment,
    warn_where_bos_is_unknown,
)
from fope_jax.evaluate.run_data import find_run_data, load_run_tokenizer
from fope_jax.evaluate.windows import context_lengths, place_windows
from fope_jax.model.finite import count_non_finite, describe_non_finite
from fope_jax.model.transformer import Transformer
from fope_jax.spectrum.capture import WindowCapture, observer
from fope_jax.spectrum.measure import measure_layers
from fope_jax.spectrum.series import Series, layer_methods, series_of, trained_pairs
from fope_jax.storage.files import read_json
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import CHECKPOINTS, IMPORTED, LINEAGE, RUN

MULTIPLES = (1, 2, 4, 8)
WINDOWS = 8

# Curves of LayerSpectrum, left out of the rows: name in the file -> field.
CURVES = {"own": "frequencies"} | {
    name: name for name in ("profile", "logits_power", "hidden_power", "q_power", "k_power")
}


def measure_run(
    workdir: str | Path,
    step: int | None = None,
    *,
    untrained: bool = False,
    multiples: Sequence[int] = MULTIPLES,
    windows: int = WINDOWS,
    text: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures one checkpoint and replaces its rows of kind "spectrum".

    At every context length, windows end in the same tokens of the first of ``evaluate.splits``.
    They begin with the run's BOS token if ``evaluate.add_bos_token`` is set.

    Args:
      workdir: directory of the run.
      step: of the checkpoint; None takes the newest valid one, 0 means ``untrained``.
      untrained: measures the initial parameters, drawn again from the run's seed.
      multiples: context lengths, in training lengths.
      windows: number of windows of each length.
      text: what is read in place of the split, one of ``evaluate.texts``, such as
        "mine=book.txt"; it needs no token cache.
      say: called with one line for each length.

    Returns:
      JSON values: the ids of the run; ``rows``; ``curves``, a dict for each row with the keys of
        ``CURVES``; ``pairs``, the ``TrainedPair`` of the first layer.

    Raises:
      FileNotFoundError: no config.json or no checkpoint.
      NonFiniteError: weights or activations are not finite; names the document.
      LockError: another process writes into the run.
      CorpusError: a ``text`` that cannot be read.
      ValueError: lengths that the method, the documents, the memory or the resolution do not allow;
        an untrained model of a run that continues another.
    """
    workdir = as_path(workdir)
    experiment = read_experiment(workdir)
    if not multiples or min(multiples) < 1:
        raise ValueError(f"lengths {list(multiples)}: accepted are training lengths, 1 or more")
    contexts = context_lengths(experiment, multiples, "lengths")
    if text is not None:
        text_name(text)  # checks it
    with lock_run(workdir, "spectrum"):  # a training would write on into the file of before
        return _measure(
            workdir,
            experiment,
            step,
            contexts,
            untrained=untrained,
            windows=windows,
            text=text,
            say=say,
        )


def _measure(
    workdir: Path,
    experiment: Experiment,
    step: int | None,
    contexts: Sequence[int],
    *,
    untrained: bool,
    windows: int,
    text: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """As `measure_run`, of a run that is locked."""
    length, settings = experiment.train.length, experiment.evaluate
    if untrained or (step == 0 and not (workdir / CHECKPOINTS / "0").is_dir()):
        info = workdir / RUN
        is_imported = info.is_file() and IMPORTED in read_json(info)
        if is_imported or (workdir / LINEAGE).is_file():
            other = "has imported weights" if is_imported else "goes on from another run"
            raise ValueError(
                f"{workdir} {other} and did not begin untrained: measure "
                f"{'its checkpoint' if is_imported else 'its parent'}, without --untrained"
            )
        rngs = nnx.Rngs(experiment.seed)
        model, step = Transformer(experiment.model, experiment.position, rngs=rngs), 0
    else:
        _, model, step, _ = load_run(workdir, step)
    check_weights(model, f"{workdir}, step {step}")
    cache: TokenCache | HeldOut
    if text is None:
        split = next(iter(settings.splits), "validation")
        cache = find_run_data(workdir, experiment.data).open(split)
    else:
        tokenizer = load_run_tokenizer(workdir, experiment.data)
        cache = read_held_out(text, tokenizer, experiment.data, settings.text_field)
    check_vocabulary(cache.tokenizer.vocab_size, experiment.model)
    warn_where_bos_is_unknown(workdir)
    bos = find_bos(cache.tokenizer, settings.bos_token) if settings.add_bos_token else None
    last = max(1, length // 2)
    placed = place_windows(cache.documents, longest=contexts[-1], scored=last, total=windows)
    observe = observer(model)

    def observe_windows(context: int) -> Iterator[WindowCapture]:
        for stop, document in zip(placed.stop, placed.document, strict=True):
            tokens = np.array(cache.tokens(stop - context, stop))
            if bos is not None:
                tokens[0] = bos.id
            capture = observe(tokens)
            if counts := count_non_finite(capture._asdict()):
                raise NonFiniteError(
                    f"{workdir}, step {step}: activations are not finite at {context} tokens of "
                    f"document {str(cache.documents['name'][document])!r}, though all weights are: "
                    f"{describe_non_finite(counts)}. No row was written"
                )
            yield capture

    ids = row_ids(experiment, step)
    rows, curves = [], []
    for context in contexts:
        layers = _layer_series(model, context)
        measured = measure_layers(
            context, observe_windows(context), layers, training_length=length, last=last
        )
        fields = {
            "split": cache.split,
            "context": context,
            "windows": len(placed.stop),
            "last": last,
        }
        fields |= {"bos_token": bos.token} if bos else {}
        for index, spectrum in enumerate(measured):
            values = {name: _to_json(value) for name, value in vars(spectrum).items()}
            curves.append({name: values.pop(field) for name, field in CURVES.items()})
            rows.append({"kind": "spectrum", **ids, **fields, "layer": index, **values})
        say(f"{experiment.name}, step {step}: {len(placed.stop)} windows of {context} tokens")
    replace_rows(
        workdir / METRICS,
        lambda row: row.get("kind") == "spectrum" and row.get("step") == step,
        rows,
    )
    first = _layer_series(model, length)[0]
    pairs = [pair._asdict() for pair in trained_pairs(first, length)] if first else []
    return {**ids, "rows": rows, "curves": curves, "pairs": pairs}


def _layer_series(model: Transformer, context: int) -> list[Series | None]:
    shape = model.config.shape
    return [series_of(m, variables, shape, context) for m, variables in layer_methods(model)]


def _to_json(value: Any) -> Any:
    """JSON values of six digits; NaN, which JSON lacks, becomes None."""
    if value is None:
        return None
    if np.ndim(value):
        return [_to_json(item) for item in value]
    return float(f"{float(value):.6g}") if np.isfinite(value) else None
