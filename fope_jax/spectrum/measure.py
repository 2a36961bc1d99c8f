"""Spectra of a model's activations on windows of one length, by layer and head.

- Profile h(d): the mean logit at distance d over all pairs of tokens and all windows, weighted by
  the number of pairs. Its mean is removed, which the softmax does not see.
- Leakage of the logits: the share of the profile's energy off the layer's frequencies.
- Floor energy: the share of it under 2 pi / L, L the training length.
- Profile energy: its mean square. Profile share: that over the variance of all logits, which is
  what distance alone explains.
- Noise share: the part of its energy due to the finite number of windows.
- Undertrained energy: sum |G_f|^2 over 0 < |w_f| < 2 pi / L, over the sum of all (``series``), for
  random pairs of a query and a key.
- Leakage of q and k, after the rotation: the share of a pair of dimensions' energy over position
  off the frequencies of that pair. Content is at all frequencies, so compare with the untrained
  model and the null value (``leakage``), not with 0.
- Leakage of the hidden states: the same, for all frequencies of the model, mean removed.
- Position-locked share of the hidden states: the part of their energy that depends on position and
  not on text. It comes from products of different windows, so it has no bias and may be below 0.
  Only this part can carry a tone of the position through a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fope_jax.position import floor_frequency
from fope_jax.spectrum.capture import WindowCapture
from fope_jax.spectrum.leakage import Basis, energies, floor_basis, frequency_basis
from fope_jax.spectrum.series import Series, attention_coefficients
from fope_jax.spectrum.transform import periodogram

PAIRS = 512  # random pairs of a query and a key in each window, for undertrained energy
SEED = 0


@dataclass(frozen=True, kw_only=True)
class LayerSpectrum:
    """One layer at one context length; ``[N]`` are heads. None where a method has no frequencies.

    Attributes:
      leakage, floor_energy, profile_energy, profile_share, undertrained_energy: ``[N]``.
      noise_share: ``[N]``; NaN for a single window, as is ``hidden_locked``.
      leakage_null, floor_null, pair_null, hidden_null: values for white noise.
      undertrained_null: share of undertrained pairs of dimensions.
      q_leakage, k_leakage: means over the pairs of dimensions.
      hidden_leakage, hidden_locked: of the layer's input.
      entropy, distance: ``[N]`` nats and tokens, means over the last queries.
      q_size, k_size: ``[H]`` mean of |q|, |k| over tokens and heads, before the rotation.
      frequencies: ``[F]`` radians per token.
      profile: ``[T]`` mean over the heads.
      logits_power, hidden_power, q_power, k_power: ``[T // 2 + 1]`` shares of the energy at
        ``transform.bin_frequencies``, Hann window; q and k after the rotation.
    """

    leakage: np.ndarray | None = None
    leakage_null: float | None = None
    floor_energy: np.ndarray
    floor_null: float
    profile_energy: np.ndarray
    profile_share: np.ndarray
    noise_share: np.ndarray
    undertrained_energy: np.ndarray | None = None
    undertrained_null: float | None = None
    q_leakage: float | None = None
    k_leakage: float | None = None
    pair_null: float | None = None
    hidden_leakage: float | None = None
    hidden_null: float | None = None
    hidden_locked: float
    entropy: np.ndarray
    distance: np.ndarray
    q_size: np.ndarray
    k_size: np.ndarray
    frequencies: np.ndarray | None = None
    profile: np.ndarray
    logits_power: np.ndarray
    hidden_power: np.ndarray
    q_power: np.ndarray
    k_power: np.ndarray


def measure_layers(
    length: int,
    windows: Iterable[WindowCapture],
    layers: list[Series | None],
    *,
    training_length: int,
    last: int,
) -> list[LayerSpectrum]:
    """Measures windows of ``length`` tokens; returns one ``LayerSpectrum`` for each layer.

    Args:
      windows: captures of ``capture.observer``.
      layers: the series of each layer, None without one.
      training_length: L, tokens.
      last: number of queries at the end of each window for entropy and distance.

    Raises:
      ValueError: windows too short to resolve the frequencies, or shorter than in training.
    """
    floor = floor_frequency(training_length)
    counts = np.arange(length, 0, -1)  # pairs of tokens at each distance
    under_floor = floor_basis(floor, length, counts)
    known = [layer.distinct_frequencies for layer in layers if layer is not None]
    hidden = frequency_basis(np.unique(np.concatenate(known)), length) if known else None
    of_pairs = [_pair_bases(series, length) for series in layers]
    measured: list[list[dict[str, Any]]] = [[] for _ in layers]
    hidden_sums = np.zeros(())
    for window in windows:
        hidden_sums = hidden_sums + _centred(window.x)
        for index, series in enumerate(layers):
            layer = WindowCapture(*(x[index] for x in window))
            measured[index].append(_measure_window(layer, series, of_pairs[index], hidden, last))

    spectra = []
    for index, series in enumerate(layers):
        values: dict[str, Any] = {}
        mean = {
            name: np.mean([one[name] for one in measured[index]], axis=0)
            for name in measured[index][0]
        }
        inside, energy = energies(mean["profile"], under_floor)
        safe = np.where(energy == 0, np.nan, energy)
        if hidden is not None:
            values["hidden_leakage"] = _off_basis_fraction(mean["hidden"])
            values["hidden_null"] = 1 - hidden.null
        if series is not None:
            basis = frequency_basis(series.distinct_frequencies, length, counts)
            slow = (np.abs(series.frequencies) > 0) & (np.abs(series.frequencies) < floor)
            strongest = np.argmax(np.abs(series.coefficients).mean(axis=0), axis=-1)
            values |= {
                "frequencies": series.distinct_frequencies,
                "leakage": 1 - energies(mean["profile"], basis)[0] / safe,
                "leakage_null": 1 - basis.null,
                "undertrained_energy": mean["coefficients"][:, slow].sum(-1)
                / mean["coefficients"].sum(-1),
                "undertrained_null": float(slow[strongest].mean()),
                "q_leakage": _off_basis_fraction(mean["q"]),
                "k_leakage": _off_basis_fraction(mean["k"]),
                "pair_null": float(1 - np.mean([one.null for one in of_pairs[index]])),
            }
        centre = mean["profile"] @ counts / counts.sum()
        noise = _noise_energy([one["profile"] for one in measured[index]], under_floor)
        hidden_energy, windows_seen = float(mean["hidden_energy"]), len(measured[index])
        spectra.append(
            LayerSpectrum(
                floor_energy=inside / safe,
                floor_null=under_floor.null,
                profile_energy=energy / counts.sum(),
                profile_share=energy / counts.sum() / (mean["square"] - centre**2),
                noise_share=noise / safe,
                hidden_locked=_locked_share(hidden_sums[index], hidden_energy, windows_seen),
                profile=mean["profile"].mean(axis=0),
                logits_power=_shares(_power(mean["profile"])),
                **{name: _shares(mean[name]) for name in ("hidden_power", "q_power", "k_power")},
                **{name: mean[name] for name in ("entropy", "distance", "q_size", "k_size")},
                **values,
            )
        )
    return spectra


def _pair_bases(series: Series | None, length: int) -> list[Basis]:
    """The basis of each pair of dimensions; pairs of equal frequencies share one."""
    if series is None:
        return []
    frequencies = [series.pair_frequencies(pair) for pair in range(len(series.pairs))]
    different = {each.tobytes(): each for each in frequencies}
    bases = {key: frequency_basis(each, length, centred=False) for key, each in different.items()}
    return [bases[each.tobytes()] for each in frequencies]


def _measure_window(
    capture: WindowCapture,
    series: Series | None,
    of_pairs: list[Basis],
    hidden: Basis | None,
    last: int,
) -> dict[str, Any]:
    """Numbers of one layer on one window, to be averaged over windows."""
    measured: dict[str, Any] = {
        "profile": capture.profile.astype(np.float64),
        "square": capture.square,
        "entropy": capture.entropy[:, -last:].mean(axis=-1),
        "distance": capture.distance[:, -last:].mean(axis=-1),
        "q_size": np.abs(capture.q).mean(axis=(0, 1)),
        "k_size": np.abs(capture.k).mean(axis=(0, 1)),
        "hidden_energy": np.sum(_centred(capture.x) ** 2, dtype=np.float64),
        "hidden_power": _power(capture.x.T),
        "q_power": _power(np.moveaxis(capture.turned_q, 0, -1)),
        "k_power": _power(np.moveaxis(capture.turned_k, 0, -1)),
    }
    if hidden is not None:
        measured["hidden"] = np.array(energies(capture.x.T, hidden)).sum(axis=-1)
    if series is not None:
        measured["q"] = _pair_energies(capture.turned_q, series, of_pairs)
        measured["k"] = _pair_energies(capture.turned_k, series, of_pairs)
        measured["coefficients"] = _coefficient_energies(capture, series)
    return measured


def _power(signals: np.ndarray) -> np.ndarray:
    """Energy of ``[..., T]`` at the bins, summed over signals, means removed."""
    centred = signals - signals.mean(axis=-1, keepdims=True)
    power = periodogram(centred.astype(np.float64), "hann")
    return power.reshape(-1, power.shape[-1]).sum(0)


def _pair_energies(x: np.ndarray, series: Series, bases: list[Basis]) -> np.ndarray:
    """Energy of ``x [T, N, H]`` at the frequencies of its pairs of dimensions, and in total."""
    total = np.zeros(2)
    for dims, basis in zip(series.pairs, bases, strict=True):
        of_pair = np.moveaxis(x[..., np.unique(dims)], 0, -1)  # one may be its own partner
        total += np.array(energies(of_pair, basis)).sum(axis=(-1, -2))
    return total


def _coefficient_energies(capture: WindowCapture, series: Series) -> np.ndarray:
    """Mean ``[N, F]`` of |G_f| ** 2 over random pairs of a query and an earlier key."""
    length, heads = capture.q.shape[:2]
    drawn = np.sort(np.random.default_rng(SEED).integers(0, length, (PAIRS, 2)), axis=1)
    k = np.repeat(capture.k, heads // capture.k.shape[1], axis=1)
    coefficients = attention_coefficients(
        series, capture.q[drawn[:, 1]], k[drawn[:, 0]], drawn[:, 0]
    )
    if series.growth.any():  # G_f lacks the growth at the query, which the logits have
        growth = np.exp(np.multiply.outer(drawn[:, 1], series.growth))
        coefficients = coefficients * growth[:, None]
    return np.mean(np.abs(coefficients) ** 2, axis=0)


def _noise_energy(profiles: list[np.ndarray], basis: Basis) -> np.ndarray:
    """Variance of the mean profile: the variance between windows over their number."""
    count = len(profiles)
    if count < 2:
        return np.full(len(profiles[0]), np.nan)
    differences = np.array(profiles) - np.array(profiles).mean(axis=0)
    return energies(differences, basis)[1].sum(axis=0) / (count - 1) / count


def _centred(x: np.ndarray) -> np.ndarray:
    """``x [..., T, D]`` without its mean over positions."""
    return x - x.mean(axis=-2, keepdims=True)


def _locked_share(summed: np.ndarray, energy: float, count: int) -> float:
    """Mean product of two windows; ``summed [T, D]`` over windows, ``energy`` the mean of one."""
    if count < 2 or not energy:
        return float("nan")
    squares = np.sum(summed.astype(np.float64) ** 2)
    return float((squares / count - energy) / (count - 1) / energy)


def _off_basis_fraction(energy: np.ndarray) -> float:
    """Leakage of ``energy = (inside, total)``; NaN where the total is 0."""
    return float(1 - energy[0] / energy[1]) if energy[1] else float("nan")


def _shares(power: np.ndarray) -> np.ndarray:
    return power / power.sum() if power.any() else power
