"""On the real weights, with a vocabulary of 49,152 and outliers in the hidden states, fast equals plain."""

import pytest

from benchmarks.accuracy import CACHED, FAST, PLAIN, rounding_errors
from benchmarks.shapes import SMOLLM2, step_batches


@pytest.mark.slow
@pytest.mark.usefixtures("real_weights")
def test_errors_against_float64_are_at_most_twice_those_of_the_plain_backend() -> None:
    """`python -m benchmarks.accuracy` compares all adapters on more rows."""
    ce, kl = step_batches(1, SMOLLM2)
    errors = rounding_errors(SMOLLM2, "lora_five", ce, kl)
    plain = errors[PLAIN]
    assert 0 < max(plain) < 1e-3
    for fast in (errors[FAST], errors[CACHED]):
        assert all(own <= 2 * other for own, other in zip(fast, plain, strict=True)), errors
