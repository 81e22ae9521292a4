"""What every mask of dropout must be."""

from __future__ import annotations

from torch import Tensor


def assert_fair(mask: Tensor, kept: float) -> None:
    """Of ones and zeros: `kept` of each whole, row and column is one, and neighbours know nothing of each
    other.
    """
    deviation = (kept * (1 - kept)) ** 0.5
    rows, columns = mask.shape
    for found, count in ((mask.mean(), mask.numel()), (mask.mean(0), rows), (mask.mean(1), columns)):
        assert float((found - kept).abs().max()) < 4.5 * deviation / count**0.5
    for one, other in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        covariance = ((one - kept) * (other - kept)).mean()
        assert abs(float(covariance)) < 4.5 * deviation**2 / one.numel() ** 0.5
