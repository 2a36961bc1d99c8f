"""Configurations: an ml_collections file and command-line overrides become one `Experiment`.

A configuration file is Python with a function ``get_config(arg)`` that returns a ``ConfigDict``:

    name, seed                      top-level keys
    model, data, train, evaluate,   the fields of TransformerConfig, DataConfig, TrainConfig,
    mesh                            EvaluateConfig, MeshConfig; a field left out has its default
    position                        ``method``, the knobs of that method, and ``preset`` if wanted

Every value is stated once. A position embedding with a knob ``training_length`` that the file
leaves out (or sets to None) gets ``train.length``; state it only where the two differ, as when a
model trained on 512 tokens continues on 1,024. Methods and scalings inside a method are
specifications of their own: ``{"method": "rope", "scaling": [{"scaling": "ntk", "factor": 4.0}]}``,
``{"method": "by_layer", "methods": [{"method": "rope"}, {"method": "nope"}]}``.

Nothing here touches a device, so a mistake is reported before any work is done.
"""

from __future__ import annotations

import ast
import dataclasses
import runpy
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from fope_jax import position as positions
from fope_jax.data import DataConfig
from fope_jax.data.held_out import name_of
from fope_jax.data.retrieval.names import TASKS
from fope_jax.fields import NOT_LITERAL, ConfigError, checked, field_types, nearest, parse
from fope_jax.files import read_json
from fope_jax.model.sharding import MeshConfig
from fope_jax.model.transformer import TransformerConfig
from fope_jax.position.base import PositionEmbedding
from fope_jax.position.table import parts_of

# ---------------------------------------------------------------------------- the parts


Schedule = Literal["cosine", "constant"]
OnBadStep = Literal["stop", "skip"]
OnSaveError = Literal["stop", "continue"]


class Stage(NamedTuple):
    """Updates ``start`` to ``stop - 1`` of a run, counted from 0, all of one length.

    Attributes:
      start, stop: updates done before the stage and at its end.
      length: tokens a sequence.
      batch_size: sequences an update.
    """

    start: int
    stop: int
    length: int
    batch_size: int


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults are the paper's (section A.3 and its released code).

    Attributes:
      steps: optimizer updates in the whole run.
      batch_size: sequences an update, over all devices.
      length: tokens a sequence; the training length of the experiment.
      first_lengths: entries "length=updates", such as ``("512=4000",)``: shorter sequences in the
        first updates, in the order given, and ``length`` in what is left of ``steps``. There are
        more of them in a batch, so that the tokens of an update stay. A position embedding's
        training length is ``length`` from the first update on.
      learning_rate: the peak rate.
      warmup_steps: updates over which the rate grows linearly from 0 to its peak.
      schedule: after the warmup, "cosine" decays to ``final_learning_rate_fraction`` of the peak
        at the last update; "constant" stays.
      final_learning_rate_fraction: what is left of the peak at the end of "cosine".
      b1, b2, eps: AdamW's moments and divisor.
      weight_decay: decoupled, times the learning rate, on every parameter: norms and embeddings
        too, as in the paper's code. Position constants are not parameters and never decay.
      gradient_clip: largest global norm of the gradient; None does not clip.
      schedule_start: updates of the learning rate's schedule done before the first one of this run,
        which then goes on where another run stood. The schedule has ``schedule_start + steps``.
      data_start: batches of the data's stream that are left out before the first one of this run.
      accumulate: pieces an update's batch is computed in, one after the other. Divides
        ``batch_size``; changes memory, not the update (up to rounding).
      log_every: updates between two rows of metrics.
      save_every: updates between two checkpoints; the last update is always saved.
      evaluate_every: updates between two evaluations inside training, on the parameters as they
        are; the first is before any update, the last after all. None evaluates never. See
        ``evaluate.training_windows``.
      keep: checkpoints kept.
      on_bad_step: what becomes of a step whose loss or gradient is not finite, or that is a spike.
        "stop" ends the run; "skip" leaves parameters and optimizer as they were, bit for bit, and
        uses up the batch but no update of the learning rate's schedule.
      max_skipped: with "skip", so many bad steps in a row end the run all the same.
      spike_factor: a loss or gradient norm above so many times its running mean makes a step bad,
        see ``train.guard``. None looks at what is not finite alone.
      on_save_error: what becomes of a run whose checkpoint cannot be written, as on a full disk:
        "stop", or "continue" and try again at the next one. The last one must be written, and
        several processes always stop.
    """

    steps: int
    batch_size: int
    length: int
    first_lengths: tuple[str, ...] = ()
    learning_rate: float = 6e-4
    warmup_steps: int = 10_000
    schedule: Schedule = "cosine"
    final_learning_rate_fraction: float = 0.1
    schedule_start: int = 0
    data_start: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float | None = 1.0
    accumulate: int = 1
    log_every: int = 10
    save_every: int = 1_000
    keep: int = 2
    evaluate_every: int | None = None
    on_bad_step: OnBadStep = "stop"
    max_skipped: int = 10
    spike_factor: float | None = None
    on_save_error: OnSaveError = "stop"

    def __post_init__(self):
        for name in ("steps", "batch_size", "length", "accumulate", "log_every", "save_every"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer of 1 or more")
        for name in ("keep", "max_skipped"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer of 1 or more")
        every, spike = self.evaluate_every, self.spike_factor
        _require("evaluate_every", every, every is None or every >= 1, "1 or more, or None")
        _require("spike_factor", spike, spike is None or spike > 1, "a number above 1, or None")
        _require(
            "accumulate", self.accumulate, self.batch_size % self.accumulate == 0,
            f"a divisor of batch_size = {self.batch_size}",
        )  # fmt: skip
        for name in ("warmup_steps", "schedule_start", "data_start"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require("learning_rate", self.learning_rate, self.learning_rate > 0, "a positive number")
        _require("eps", self.eps, self.eps > 0, "a positive number")
        _require("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        for name in ("b1", "b2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 <= value < 1")
        fraction = self.final_learning_rate_fraction
        _require("final_learning_rate_fraction", fraction, 0 <= fraction <= 1, "0 <= value <= 1")
        clip = self.gradient_clip
        _require("gradient_clip", clip, clip is None or clip > 0, "a positive number or None")
        for name, kind in (
            ("schedule", Schedule), ("on_bad_step", OnBadStep), ("on_save_error", OnSaveError),
        ):  # fmt: skip
            names = typing.get_args(kind)
            _require(name, getattr(self, name), getattr(self, name) in names, f"one of {names}")
        object.__setattr__(self, "first_lengths", tuple(self.first_lengths))
        for entry in self.first_lengths:
            self._check_first_length(entry)
        used = sum(steps for _, steps in map(_length_and_steps, self.first_lengths))
        _require(
            "first_lengths", self.first_lengths, used < self.steps,
            f"fewer updates than steps = {self.steps}; these are {used}",
        )  # fmt: skip

    def _check_first_length(self, entry: str) -> None:
        length, steps = _length_and_steps(entry)
        _require(
            "first_lengths", entry, 1 <= length < self.length and steps >= 1,
            f"'length=updates', 1 update or more of sequences shorter than length = {self.length}",
        )  # fmt: skip
        tokens, pieces = self.batch_size * self.length, length * self.accumulate
        _require(
            "first_lengths", entry, tokens % pieces == 0,
            f"a length of which whole rows, and a multiple of accumulate = {self.accumulate} of "
            f"them, make up the {self.batch_size} * {self.length} = {tokens} tokens of an update",
        )  # fmt: skip

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run, one after the other; a single one without ``first_lengths``.

        >>> config = TrainConfig(steps=9, batch_size=2, length=16, first_lengths=("8=4",))
        >>> [tuple(stage) for stage in config.stages]
        [(0, 4, 8, 4), (4, 9, 16, 2)]
        """
        stages, tokens = [], self.batch_size * self.length
        for entry in self.first_lengths:
            length, steps = _length_and_steps(entry)
            start = stages[-1].stop if stages else 0
            stages.append(Stage(start, start + steps, length, tokens // length))
        start = stages[-1].stop if stages else 0
        return (*stages, Stage(start, self.steps, self.length, self.batch_size))


def _length_and_steps(entry: str) -> tuple[int, int]:
    """The numbers of an entry of ``first_lengths``; 0, 0 where it is none."""
    length, _, steps = entry.partition("=")
    decimal = length.strip().isdecimal() and steps.strip().isdecimal()
    return (int(length), int(steps)) if decimal else (0, 0)


@dataclass(frozen=True)
class EvaluateConfig:
    """What `fope evaluate` measures. Lengths are multiples of ``train.length``.

    Attributes:
      protocols: what runs, by name, or "all". Of text: "same-tokens", "sliding-window", "chunks",
        "document-resets", "no-resets", "long-window", "from-start"; and "passkey" and
        "retrieval". All of text take about twice as long as the default ones.
      lengths: contexts of the protocols on text.
      scored_tokens: scored at the end of each window; None is half the training length.
      stride: tokens that the sliding window moves by; None is half the training length.
      num_windows: windows of "same-tokens"; the same ones at every length.
      training_windows: the same inside training, where ``train.evaluate_every`` asks for it.
      position_windows: windows, stretches, blocks or documents of the longest length of the others.
      passkey_lengths: contexts for passkey retrieval.
      passkey_depths: where the key stands in the context, 0 the beginning and 1 the end.
      passkey_trials: trials for each length and depth.
      passkey_templates: wordings, "standard" (the literature's) and "compact" (small models).
      retrieval_tasks: further tasks at the lengths, depths and trials of passkeys: "recall" and
        "copy" of token ids, for models too small for language; "multi_key", "multi_value",
        "multi_query", "variable_tracking" and "common_words" after RULER.
      needle_haystack: what those after RULER hide their needles in: "corpus", a stretch of the
        first of ``splits``, or "noise", a few sentences that are repeated.
      batch_tokens: upper bound of the tokens in one forward pass.
      splits: the corpus splits perplexity is measured on.
      texts: other text that it is measured on, cut by the tokenizer of the run: "web" (119 pages
        labelled C4), "news" (3,824 articles), both downloaded once, or ``NAME=GLOB`` of your own
        .txt or .jsonl files.
    """

    protocols: tuple[str, ...] = ("same-tokens", "long-window", "passkey", "retrieval")
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    scored_tokens: int | None = None
    stride: int | None = None
    num_windows: int = 256
    training_windows: int = 16
    position_windows: int = 32
    passkey_lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    passkey_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    passkey_trials: int = 20
    passkey_templates: tuple[str, ...] = ("compact", "standard")
    retrieval_tasks: tuple[str, ...] = ()
    needle_haystack: Literal["corpus", "noise"] = "corpus"
    batch_tokens: int = 16_384
    splits: tuple[str, ...] = ("validation",)
    texts: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("lengths", "passkey_lengths"):
            value = getattr(self, name)
            _require(name, value, all(n >= 1 for n in value), "multiples of 1 or more")
        for name in ("num_windows", "training_windows", "position_windows", "passkey_trials"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require("batch_tokens", self.batch_tokens, self.batch_tokens >= 1, "1 or more")
        for name in ("scored_tokens", "stride"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 1, "1 or more, or None")
        depths = self.passkey_depths
        _require("passkey_depths", depths, all(0 <= d <= 1 for d in depths), "each 0 <= value <= 1")
        tasks = [name for name in TASKS if name != "passkey"]  # which passkey_templates measure
        wrong = [name for name in self.retrieval_tasks if name not in tasks]
        _require("retrieval_tasks", self.retrieval_tasks, not wrong, f"some of {tasks}")
        haystacks = ("corpus", "noise")
        _require(
            "needle_haystack", self.needle_haystack, self.needle_haystack in haystacks,
            f"one of {haystacks}",
        )  # fmt: skip
        names = [name_of(source) for source in self.texts]
        _require("texts", self.texts, len(set(names)) == len(names), "each name once")


@dataclass(frozen=True)
class Experiment:
    """One run: everything that training and evaluation are a function of.

    ``name`` is the variant in every row and report; ``seed`` draws parameters and data order.
    """

    name: str
    seed: int
    model: TransformerConfig
    position: PositionEmbedding
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    mesh: MeshConfig = MeshConfig()


SECTIONS = {
    "model": TransformerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "mesh": MeshConfig,
}
_TOP = {"name": str, "seed": int}


# ---------------------------------------------------------------------------- from a file


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Reads a configuration file and applies overrides; fails on anything it cannot build.

    Args:
      spec: ``"path.py"`` or ``"path.py:arg"``; ``arg`` goes to the file's ``get_config``. Or the
        ``config.json`` of a run.
      overrides: ``"train.steps=100"``, with or without a leading ``--config.``. Values are parsed
        by the type of the field they go to.

    Returns:
      The ConfigDict of the file, field references intact, with the overrides in it.

    Raises:
      ConfigError: a file that is not there or has no get_config, an unknown key, a wrong type.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"configuration file {path!r} does not exist (form: path.py:arg)")
    if path.endswith(".json"):
        config = _read_json(Path(path))
    else:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ConfigError(f"configuration file {path!r} defines no get_config(arg)")
        config = get_config(arg)
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"get_config of {path!r} returns {type(config).__name__}; accepted: ConfigDict"
            )
    return overridden(config, overrides)


def _read_json(path: Path) -> ConfigDict:
    try:
        values = read_json(path)
    except ValueError as error:
        raise ConfigError(f"configuration file {error}") from error
    try:
        return ConfigDict(values)
    except (ValueError, KeyError, AttributeError) as error:  # keys that ConfigDict does not take
        raise ConfigError(f"configuration file {path}: {error}") from error


def overridden(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """``config`` with the overrides of `load_config` in it, checked that it can be built.

    Raises:
      ConfigError: see `load_config`.
    """
    for override in overrides:
        _override(config, override)
    build_experiment(config)
    return config


def split_override(override: str) -> tuple[str, str]:
    """Key and text of an override, ``"--config.train.steps=100"`` or without what comes first.

    >>> split_override("--config.train.steps=100")
    ('train.steps', '100')
    """
    override = override.removeprefix("--").removeprefix("config.")
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no value (form: --config.train.steps=100)")
    return key, text


def position_value(key: str, text: str, kind: Any) -> Any:
    """A knob's value: a literal list or mapping of specifications, or what ``kind`` makes of it."""
    return _literal_spec(key, text) if text.startswith(("[", "{")) else _value(key, text, kind)


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Reads the ``arg`` of a configuration file, ``"position=rope,smoke"``; a bare name is True.

    >>> parse_arg("position=rope,smoke", position="fope", seed=0, smoke=False).to_dict()
    {'position': 'rope', 'seed': 0, 'smoke': True}
    """
    values = dict(defaults)
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise ConfigError(
                f"config argument {key!r} is unknown{nearest(key, defaults)};"
                f" accepted: {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        values[key] = checked(f"argument {key}", parse(text, kind) if equals else True, kind)
    return ConfigDict(values)


def _override(config: ConfigDict, override: str) -> None:
    key, text = split_override(override)
    section, _, field = key.partition(".")
    values: Any = config.get(section) if field else config
    if field and values is not None and not hasattr(values, "get"):
        raise ConfigError(f"config.{section} = {values!r:.80}; accepted: a mapping")
    if section == "position" and field:
        method = values.get("method") if values else None
        kind = str if field == "method" else _position_types(method).get(field, Any)
    elif section in SECTIONS and field:
        kind = field_types(SECTIONS[section]).get(field)
    else:
        kind = _TOP.get(key)
    if kind is None:
        raise _unknown_key(key)
    value = (position_value if section == "position" else _value)(key, text, kind)
    # The type is checked against the field; ConfigDict would check it against the old value.
    with config.ignore_type():
        if values is None:
            config[section] = {field: value}
        else:
            values[field or key] = value


def _value(key: str, text: str, kind: Any) -> Any:
    return checked(key, parse(text, kind), kind)


def _literal_spec(key: str, text: str) -> Any:
    """The list or mapping of specifications that ``text`` writes; checked when it is built."""
    try:
        return ast.literal_eval(text)
    except NOT_LITERAL as error:
        raise ConfigError(
            f"config.{key} = {text!r} is no Python literal; write for example"
            ' \'[{"scaling": "ntk", "factor": 4.0}]\''
        ) from error


# ---------------------------------------------------------------------------- to objects and back


def build_experiment(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Builds and cross-checks the objects that ``config`` describes.

    Raises:
      ConfigError: unknown key (with the nearest one), wrong type (with both), missing value, or
        two values that do not go together.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    for key in values:
        if key not in (*_TOP, *SECTIONS, "position"):
            raise _unknown_key(key)
    for key in (*_TOP, "model", "position", "data", "train"):
        if key not in values:
            raise ConfigError(f"config.{key} is missing")
    for key in (*SECTIONS, "position"):
        if not isinstance(values.get(key, {}), Mapping):
            raise ConfigError(
                f"config.{key} = {values[key]!r:.80}; accepted: a mapping of its keys"
            )
    top = {key: checked(key, values[key], kind) for key, kind in _TOP.items()}
    parts = {name: _build(name, cls, values.get(name, {})) for name, cls in SECTIONS.items()}
    train, evaluate = parts["train"], parts["evaluate"]
    if evaluate.scored_tokens is None:
        scored = max(1, train.length // 2)
        parts["evaluate"] = dataclasses.replace(evaluate, scored_tokens=scored)
    position = _build_position(values["position"], train.length)
    experiment = Experiment(**top, **parts, position=position)
    _cross_check(experiment)
    return experiment


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """The inverse of `build_experiment`: plain values for config.json, nothing left implicit."""
    result = {"name": experiment.name, "seed": experiment.seed}
    for name in SECTIONS:
        result[name] = _fields(getattr(experiment, name))
    return result | {"position": positions.to_spec(experiment.position)}


# Values that change what is reported, kept or stored, never the numbers a run computes; and what
# becomes of a bad step, or a run that one has stopped could not go on.
FREE_SECTIONS = ("evaluate.", "mesh.")
FREE_KEYS = (
    "name", "train.log_every", "train.save_every", "train.keep", "train.evaluate_every",
    "train.on_save_error", "train.on_bad_step", "train.max_skipped", "train.spike_factor",
    "data.cache_dir", "data.max_bad_documents",
)  # fmt: skip


def changed_numbers(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which values that decide a run's numbers differ between two config.json dicts.

    Returns:
      One line a key, ``"train.length: 128, now 256"``; empty where a run may go on.
    """
    before, after = _flat(old), _flat(new)
    free: set[str] = set(FREE_KEYS)
    if before.get("train.schedule") == after.get("train.schedule") == "constant":
        free.add("train.steps")  # a constant rate does not know where the run ends
    return [
        f"{key}: {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in free
        and not key.startswith(FREE_SECTIONS)
    ]


def check_vocabulary(tokenizer_size: int, model: TransformerConfig) -> None:
    """Raises ConfigError where a token could fall outside the embedding."""
    if tokenizer_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_size} tokens but config.model.vocab_size ="
            f" {model.vocab_size}; raise model.vocab_size to {tokenizer_size} or more"
        )


def _cross_check(experiment: Experiment) -> None:
    longest, length = experiment.position.max_length(), experiment.train.length
    if longest is not None and length > longest:
        raise ConfigError(
            f"config.train.length = {length} is beyond the longest sequence of position method"
            f" {positions.name_of(experiment.position)!r}, {longest}"
        )
    try:
        experiment.position.check(experiment.model.shape)
    except ValueError as error:
        raise ConfigError(f"config.position: {error}") from error


def _build(name: str, cls: type, values: Mapping[str, Any]) -> Any:
    kinds = field_types(cls)
    for key in values:
        if key not in kinds:
            raise _unknown_key(f"{name}.{key}")
    values = {key: checked(f"{name}.{key}", value, kinds[key]) for key, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"config.{name}.{missing[0]} is missing ({kinds[missing[0]].__name__})")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"config.{name}: {error}") from error


def _build_position(values: Mapping[str, Any], length: int) -> PositionEmbedding:
    method = values.get("method")
    if method is None:
        raise ConfigError(
            f"config.position.method is missing; one of {', '.join(positions.METHODS)}"
        )
    if not isinstance(method, str):
        raise ConfigError(f"config.position.method = {method!r:.80}; accepted: a name")
    try:
        return _build_spec("position", values, length)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.position: {error}") from error


def _build_spec(key: str, value: Any, length: int) -> Any:
    """Methods and scalings from their specifications, each knob checked against its type.

    What has a training length and is given none takes the training's.
    """
    if isinstance(value, (list, tuple)):
        return tuple(_build_spec(f"{key}[{i}]", item, length) for i, item in enumerate(value))
    if not isinstance(value, (Mapping, ConfigDict)):
        return value
    knobs = {name: _build_spec(f"{key}.{name}", v, length) for name, v in value.items()}
    entry, name, knobs = parts_of(knobs)
    if not isinstance(name, str):
        raise ConfigError(
            f"config.{key} = {dict(value)}: expected a 'method', or a 'scaling' by its name"
        )
    known, make = {
        "method": (positions.METHODS, positions.make),
        "scaling": (positions.SCALINGS, positions.make_scaling),
    }[entry]
    kinds = _knob_types(known.get(name))
    if "training_length" in kinds:
        temperature = knobs.get("form") == "yarn"  # LogitScaling's form without a length
        if knobs.get("training_length") is None and not temperature:
            knobs["training_length"] = length
    knobs = {k: checked(f"{key}.{k}", v, kinds.get(k, Any)) for k, v in knobs.items()}
    return make(name, **knobs)


def _position_types(method: Any) -> dict[str, Any]:
    return _knob_types(positions.METHODS.get(method) if isinstance(method, str) else None)


def _knob_types(cls: type | None) -> dict[str, Any]:
    return {"preset": str | None} | field_types(cls) if cls else {}


def _fields(part: Any) -> dict[str, Any]:
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _require(name: str, value: Any, condition: bool, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}; accepted: {accepted}")


def _unknown_key(key: str) -> ConfigError:
    known = [*_TOP, "position.method"]
    known += [f"{name}.{field}" for name, cls in SECTIONS.items() for field in field_types(cls)]
    return ConfigError(f"config.{key} is unknown{nearest(key, known)}")
