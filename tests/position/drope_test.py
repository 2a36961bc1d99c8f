"""DroPE: NoPE up to the trained length, the paper's temperature beyond it."""

import math

import numpy as np
import pytest

from fope_jax.position import ByLayer, DroPE, LogitScaling, NoPE, RoPE, fingerprint, make


def test_the_factor_is_the_papers():
    """beta = 1 + c ln s at s = 2, 4 and 8 times the trained length, for its two fitted c."""
    for c in (0.412, 0.103):
        beyond = np.array([[1023, 2047, 4095]])  # the last of 1,024, 2,048 and 4,096 tokens
        expected = [1 + c * math.log(s) for s in (2, 4, 8)]
        np.testing.assert_allclose(DroPE(512, c).scale(beyond)[0], expected, rtol=1e-6)
        whole = DroPE(512, c, length=2048).scale(np.array([[0, 7, 511]]))
        np.testing.assert_allclose(whole, [[1 + c * math.log(4)]], rtol=1e-6)
    assert DroPE(512).coefficient == 0.412


def test_within_the_trained_length_it_is_nope():
    trained = np.arange(512)[None]
    assert np.array_equal(DroPE(512).scale(trained), np.ones((1, 512), np.float32))
    assert np.array_equal(DroPE(512, length=300).scale(trained), np.ones((1, 1), np.float32))
    assert float(DroPE(512).scale(np.array([[512]]))[0, 0]) > 1
    assert np.array_equal(DroPE(512, 0.0).scale(np.array([[10**6]])), np.ones((1, 1), np.float32))


def test_it_is_known_by_its_name():
    method = make("drope", training_length=512, coefficient=0.103)
    assert method == DroPE(512, 0.103)
    assert fingerprint(method).summary.startswith("drope(training_length=512, coefficient=0.103")
    assert fingerprint(method).hash != fingerprint(DroPE(512)).hash != fingerprint(NoPE()).hash


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: DroPE(0), "training_length=0: the trained length in tokens must be 1 or more"),
        (lambda: DroPE(512, -0.1), "coefficient=-0.1: the growth of the logits .* must be 0 or"),
        (lambda: DroPE(512, length=0), "length=0: the tokens of an evaluation must be 1 or more"),
        (lambda: LogitScaling(DroPE(8), training_length=8), "inner holds DroPE, which scales its"),
        (
            lambda: LogitScaling(ByLayer((DroPE(8), RoPE())), training_length=8),
            "inner holds DroPE, which scales its logits by itself",
        ),
    ],
)
def test_mistakes_are_named(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
