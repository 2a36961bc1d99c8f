"""The spectra of a model's activations on windows of one length, layer by layer and head by head.

Definitions (``leakage`` has the projection and the null values):

- Profile h(d): the mean logit at distance d over all pairs of tokens and all windows. It is weighed
  by the number of its pairs, and its mean is removed, which the softmax does not see.
- Logits' leakage: the share of the profile's energy that is not at the layer's own frequencies.
- Floor energy: the share of it under 2 pi / L, L the training length.
- Profile energy: its mean square. Profile share: that over the variance of all logits, what
  distance alone decides.
- Noise share: the part of the profile's energy that a mean over so few windows has by chance,
  from the spread between windows.
- Undertrained energy: sum |G_f|^2 over 0 < |w_f| < 2 pi / L, over the sum of all (``nudft``), for
  pairs of a query and a key drawn at random.
- Leakage of q and k, after the rotation: the share of a pair of dimensions' energy over position
  that is not at the frequencies of that pair. Content that changes from token to token lies
  everywhere, so 0 is out of reach; before training and the null value are what to compare with.
- Leakage of the hidden states: likewise, at any frequency of the model, the mean removed.
- Position-locked share of the hidden states: the part of their energy that is the same at a
  position whatever the text, from the products of different windows, which have no bias (a number
  below 0 is chance). Only such a part can carry a tone of the position through a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fope_jax.position import floor_frequency
from fope_jax.spectrum.capture import Seen
from fope_jax.spectrum.leakage import Basis, energies, floor_basis, frequency_basis
from fope_jax.spectrum.nudft import attention_coefficients
from fope_jax.spectrum.series import Series
from fope_jax.spectrum.transform import periodogram

PAIRS = 512  # of a query and a key that the own frequencies' energy is a mean over, a window
SEED = 0  # of drawing them


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer at one context length. ``[N]`` are heads; None where a method has no frequencies.

    Attributes:
      leakage: ``[N]`` of the logits, and ``leakage_null`` what white noise has.
      floor_energy: ``[N]`` of the logits, and ``floor_null``.
      profile_energy, profile_share: ``[N]``.
      noise_share: ``[N]``; NaN of a single window.
      undertrained_energy: ``[N]``, and ``undertrained_null``, the share of the pairs of dimensions.
      q_leakage, k_leakage: means over the head's pairs, and ``pair_null``.
      hidden_leakage: of what the layer reads, and ``hidden_null``.
      hidden_locked: its position-locked share; NaN of a single window.
      entropy: ``[N]`` nats, mean over the last queries.
      distance: ``[N]`` tokens, mean over the last queries.
      q_size, k_size: ``[H]`` mean of |q|, |k| over tokens and heads, before the rotation.
      own: ``[F]`` the layer's frequencies, radians per token.
      profile: ``[T]`` mean over the heads.
      logits_power, hidden_power, q_power, k_power: ``[T // 2 + 1]`` shares of the energy at
        ``transform.bins``, Hann window; of heads, dimensions and windows the mean. q and k after
        the rotation.
    """

    leakage: np.ndarray | None
    leakage_null: float | None
    floor_energy: np.ndarray
    floor_null: float
    profile_energy: np.ndarray
    profile_share: np.ndarray
    noise_share: np.ndarray
    undertrained_energy: np.ndarray | None
    undertrained_null: float | None
    q_leakage: float | None
    k_leakage: float | None
    pair_null: float | None
    hidden_leakage: float | None
    hidden_null: float | None
    hidden_locked: float
    entropy: np.ndarray
    distance: np.ndarray
    q_size: np.ndarray
    k_size: np.ndarray
    own: np.ndarray | None
    profile: np.ndarray
    logits_power: np.ndarray
    hidden_power: np.ndarray
    q_power: np.ndarray
    k_power: np.ndarray


def measure(
    length: int,
    windows: Iterable[Seen],
    layers: list[Series | None],
    *,
    training_length: int,
    last: int,
) -> list[LayerSpectrum]:
    """Looks at windows of one length.

    Args:
      length: tokens of a window T.
      windows: what ``capture.observer`` saw of each.
      layers: the series of each layer, None where it has none.
      training_length: L, tokens.
      last: the queries at the end of each window that entropy and distance are means over.

    Returns:
      One for each layer.

    Raises:
      ValueError: windows too short to resolve the frequencies, or shorter than in training.
    """
    floor = floor_frequency(training_length)
    seen: list[list[dict[str, Any]]] = [[] for _ in layers]
    bases: list[_Bases] = []
    sums = np.zeros(())
    for everything in windows:
        if not bases:
            bases = [_Bases.of(series, layers, floor, length) for series in layers]
        sums = sums + _centred(everything.x)
        for index, (own, found) in enumerate(zip(bases, seen, strict=True)):
            one = Seen(*(x[index] for x in everything))
            found.append(_one_window(one, own, layers[index], floor, last))
    parts = zip(bases, layers, seen, sums, strict=True)
    return [_over_windows(own, series, floor, found, x) for own, series, found, x in parts]


@dataclass(frozen=True)
class _Bases:
    """The bases of one layer at one length."""

    floor: Basis
    own: Basis | None
    hidden: Basis | None
    of_pairs: list[Basis]

    @classmethod
    def of(
        cls, series: Series | None, layers: list[Series | None], floor: float, length: int
    ) -> _Bases:
        counts = np.arange(length, 0, -1)  # pairs at each distance
        under = floor_basis(floor, length, counts)
        known = [layer.own for layer in layers if layer is not None]
        hidden = frequency_basis(np.unique(np.concatenate(known)), length) if known else None
        if series is None:
            return cls(under, None, hidden, [])
        made: dict[bytes, Basis] = {}
        of_pairs = []
        for pair in range(len(series.pairs)):
            own = series.pair_frequencies(pair)
            if own.tobytes() not in made:
                made[own.tobytes()] = frequency_basis(own, length, centred=False)
            of_pairs.append(made[own.tobytes()])
        return cls(under, frequency_basis(series.own, length, counts), hidden, of_pairs)


def _one_window(
    seen: Seen, bases: _Bases, series: Series | None, floor: float, last: int
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "profile": seen.profile.astype(np.float64),
        "square": seen.square,
        "entropy": seen.entropy[:, -last:].mean(axis=-1),
        "distance": seen.distance[:, -last:].mean(axis=-1),
        "q_size": np.abs(seen.q).mean(axis=(0, 1)),
        "k_size": np.abs(seen.k).mean(axis=(0, 1)),
        "hidden_energy": np.sum(_centred(seen.x) ** 2, dtype=np.float64),
        "hidden_power": _power(seen.x.T),
        "q_power": _power(np.moveaxis(seen.turned_q, 0, -1)),
        "k_power": _power(np.moveaxis(seen.turned_k, 0, -1)),
    }
    if bases.hidden is not None:
        found["hidden"] = np.array(energies(seen.x.T, bases.hidden)).sum(axis=-1)
    if series is not None:
        for name, x in (("q", seen.turned_q), ("k", seen.turned_k)):
            found[name] = _pair_energies(x, series, bases.of_pairs)
        found["coefficients"] = _coefficient_energy(seen, series)
    return found


def _power(signals: np.ndarray) -> np.ndarray:
    """Energy of ``[..., T]`` at the bins, their means removed, summed over the signals."""
    centred = signals - signals.mean(axis=-1, keepdims=True)
    return (
        periodogram(centred.astype(np.float64), "hann")
        .reshape(-1, centred.shape[-1] // 2 + 1)
        .sum(0)
    )


def _pair_energies(x: np.ndarray, series: Series, bases: list[Basis]) -> np.ndarray:
    """Energy of ``x [T, N, H]`` at the frequencies of its pairs of dimensions, and in all."""
    total = np.zeros(2)
    for dims, basis in zip(series.pairs, bases, strict=True):
        total += np.array(energies(np.moveaxis(x[..., dims], 0, -1), basis)).sum(axis=(-1, -2))
    return total


def _coefficient_energy(seen: Seen, series: Series) -> np.ndarray:
    """``[N, F]``: the mean of |G_f| ** 2 over random pairs of a query and an earlier key."""
    length, heads = seen.q.shape[:2]
    drawn = np.sort(np.random.default_rng(SEED).integers(0, length, (PAIRS, 2)), axis=1)
    k = np.repeat(seen.k, heads // seen.k.shape[1], axis=1)
    found = attention_coefficients(series, seen.q[drawn[:, 1]], k[drawn[:, 0]], drawn[:, 0])
    if series.growth.any():  # of both sides, at the query: what it is worth in the logits
        found = found * np.exp(np.multiply.outer(drawn[:, 1], series.growth))[:, None]
    return np.mean(np.abs(found) ** 2, axis=0)


def _over_windows(
    bases: _Bases,
    series: Series | None,
    floor: float,
    found: list[dict[str, Any]],
    hidden_sum: np.ndarray,
) -> LayerSpectrum:
    mean = {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}
    under, energy = energies(mean["profile"], bases.floor)
    safe = np.where(energy == 0, np.nan, energy)
    counts = bases.floor.scale**2
    centre = mean["profile"] @ counts / counts.sum()
    variance = mean["square"] - centre**2
    numbers: dict[str, Any] = dict.fromkeys(
        (
            "leakage",
            "leakage_null",
            "undertrained_energy",
            "undertrained_null",
            "q_leakage",
            "k_leakage",
            "pair_null",
            "hidden_leakage",
            "hidden_null",
            "own",
        )
    )
    if bases.hidden is not None:
        numbers["hidden_leakage"] = _elsewhere(mean["hidden"])
        numbers["hidden_null"] = 1 - bases.hidden.null
    if series is not None and bases.own is not None:
        inside, _ = energies(mean["profile"], bases.own)
        slow = (np.abs(series.frequencies) > 0) & (np.abs(series.frequencies) < floor)
        moving = np.abs(series.coefficients).mean(axis=0)
        dominant = slow[np.argmax(moving, axis=-1)]
        numbers |= {
            "own": series.own,
            "leakage": 1 - inside / safe,
            "leakage_null": 1 - bases.own.null,
            "undertrained_energy": mean["coefficients"][:, slow].sum(-1)
            / mean["coefficients"].sum(-1),
            "undertrained_null": float(dominant.mean()),
            "q_leakage": _elsewhere(mean["q"]),
            "k_leakage": _elsewhere(mean["k"]),
            "pair_null": float(1 - np.mean([basis.null for basis in bases.of_pairs])),
        }
    return LayerSpectrum(
        floor_energy=under / safe,
        floor_null=bases.floor.null,
        profile_energy=energy / counts.sum(),
        profile_share=energy / counts.sum() / variance,
        noise_share=_noise(found, bases.floor) / safe,
        logits_power=_share(_power(mean["profile"])),
        **{name: _share(mean[name]) for name in ("hidden_power", "q_power", "k_power")},
        hidden_locked=_locked(hidden_sum, float(mean["hidden_energy"]), len(found)),
        profile=mean["profile"].mean(axis=0),
        **{name: mean[name] for name in ("entropy", "distance", "q_size", "k_size")},
        **numbers,
    )


def _noise(found: list[dict[str, Any]], basis: Basis) -> np.ndarray:
    """Energy that the mean profile has by chance: variance between windows over their number."""
    if len(found) < 2:
        return np.full(len(found[0]["profile"]), np.nan)
    profiles = np.array([one["profile"] for one in found])
    mean = profiles.mean(axis=0)
    apart = energies(profiles - mean, basis)[1].sum(axis=0)
    return apart / (len(found) - 1) / len(found)


def _centred(x: np.ndarray) -> np.ndarray:
    """``x [..., T, D]`` without its mean over positions."""
    return x - x.mean(axis=-2, keepdims=True)


def _locked(summed: np.ndarray, energy: float, count: int) -> float:
    """Mean product of two different windows' hidden states, over the mean energy of one.

    Args:
      summed: ``[T, D]`` sum of the windows' hidden states.
      energy: mean over windows of their squares' sum.
      count: of windows.
    """
    if count < 2 or not energy:
        return float("nan")
    squares = np.sum(summed.astype(np.float64) ** 2)
    return float((squares / count - energy) / (count - 1) / energy)


def _elsewhere(energy: np.ndarray) -> float:
    """The leakage of ``energy``, what is inside and the whole; NaN where there is none."""
    return float(1 - energy[0] / energy[1]) if energy[1] else float("nan")


def _share(power: np.ndarray) -> np.ndarray:
    return power / power.sum() if power.any() else power
