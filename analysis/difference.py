"""Tests of the accuracy difference between two arms at each level, as pure functions of arrays.

Accuracies are in %, differences in percentage points. Leading axes hold independent simulations (`analysis.power`).
"""

import dataclasses
import math

import numpy as np
from scipy import special, stats

POWER = 0.8
MAX_REPLICATES = 1000


@dataclasses.dataclass(frozen=True)
class Difference:
    """Challenger minus reference at L levels, in percentage points.

    Args:
        mean: Mean difference, shape (..., L).
        variance: Variance of the mean, shape (..., L); NaN with a single replicate.
        df: Degrees of freedom of the variance, shape (..., L).
        squared_correlation: Mean squared correlation between levels, 0 to 1, shape (...).
        average: Difference averaged over the levels, its variance and df, each of shape (..., 1).
        n: Number of replicates of challenger and reference.
        paired: Whether the replicates are paired.
    """

    mean: np.ndarray
    variance: np.ndarray
    df: np.ndarray
    squared_correlation: np.ndarray
    average: tuple[np.ndarray, np.ndarray, np.ndarray]
    n: tuple[int, int]
    paired: bool

    def __repr__(self) -> str:
        kind = "paired" if self.paired else "unpaired"
        return f"Difference({self.mean.shape[-1]} levels, n = {self.n[0]} and {self.n[1]}, {kind})"


def paired(challenger: np.ndarray, reference: np.ndarray) -> Difference:
    """Paired t test.

    Args:
        challenger: Accuracy in %, shape (..., n, L).
        reference: Accuracy in % of the paired replicates, same shape.
    """
    n = challenger.shape[-2]
    differences = challenger - reference
    rounding = _resolution(challenger, reference) ** 2 / 6  # variance of the difference of two rounded numbers
    mean, variance, df = _t(differences, rounding)
    average = _t(differences.mean(-1, keepdims=True), 0.0)
    correlation = _squared_correlation(differences - mean[..., None, :])
    return Difference(mean, variance, df, correlation, average, (n, n), True)


def welch(challenger: np.ndarray, reference: np.ndarray) -> Difference:
    """Welch's t test for independent replicates.

    Args:
        challenger: Accuracy in %, shape (..., n, L).
        reference: Accuracy in %, shape (..., m, L).
    """
    n = challenger.shape[-2], reference.shape[-2]
    rounding = _resolution(challenger, reference) ** 2 / 12
    mean, variance, df = _welch(_t(challenger, rounding), _t(reference, rounding))
    average = _welch(*(_t(values.mean(-1, keepdims=True), 0.0) for values in (challenger, reference)))
    residuals = [
        (values - values.mean(-2, keepdims=True)) / np.sqrt(count * max(count - 1, 1))
        for values, count in zip((challenger, reference), n, strict=True)
    ]
    return Difference(mean, variance, df, _squared_correlation(np.concatenate(residuals, -2)), average, n, False)


def from_summaries(
    means: tuple[np.ndarray, np.ndarray], sds: tuple[np.ndarray, np.ndarray], n: tuple[int, int]
) -> Difference:
    """Welch's t test from summary statistics.

    The correlation between the levels of a replicate is unknown. Perfect correlation is assumed, which gives the mean
    over the levels its largest possible standard deviation.

    Args:
        means: Mean accuracy of challenger and reference in %, shape (L,) each.
        sds: Sample standard deviations in percentage points, shape (L,) each.
        n: Number of replicates of challenger and reference.
    """
    parts = [_summary(*part) for part in zip(means, sds, n, strict=True)]
    average = _welch(
        *(_summary(m.mean(keepdims=True), s.mean(keepdims=True), k) for m, s, k in zip(means, sds, n, strict=True))
    )
    return Difference(*_welch(*parts), np.ones(()), average, n, False)


def _t(values: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the replicates of values of shape (..., n, L), its variance (at least that of rounding) and df."""
    n, mean = values.shape[-2], values.mean(-2)
    variance = np.maximum(values.var(-2, ddof=1), rounding) / n if n > 1 else np.full(mean.shape, np.nan)
    return mean, variance, np.full(mean.shape, n - 1.0)


def _summary(mean: np.ndarray, sd: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return mean, sd**2 / n if n > 1 else np.full(mean.shape, np.nan), np.full(mean.shape, n - 1.0)


def _welch(challenger: tuple, reference: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference of two (mean, variance, df), with the Welch-Satterthwaite df.

    The df are 1 if an arm has two replicates: with two against four or more, Satterthwaite's df give a type I error
    rate of 8 % instead of 5 % (400,000 simulations).
    """
    (m1, v1, df1), (m2, v2, df2) = challenger, reference
    with np.errstate(invalid="ignore", divide="ignore"):
        df = (v1 + v2) ** 2 / (v1**2 / df1 + v2**2 / df2)
    df = np.where(v1 + v2 == 0, df1 + df2, df)
    return m1 - m2, v1 + v2, np.where(np.minimum(df1, df2) < 2, 1.0, df)


def _resolution(*values: np.ndarray) -> float:
    """Smallest step between accuracies, at most 1 (0.28 with 355 test images); a smaller spread is not visible."""
    steps = np.diff(np.unique(np.concatenate([part.ravel() for part in values])))
    steps = steps[steps > 1e-9]
    return min(float(steps.min()), 1.0) if steps.size else 0.0


def _squared_correlation(residuals: np.ndarray) -> np.ndarray:
    """Mean squared correlation between different levels of residuals (..., n, L); conservative for few replicates."""
    covariance = np.einsum("...nl,...nm->...lm", residuals, residuals)
    sd = np.sqrt(np.einsum("...ll->...l", covariance))
    levels = residuals.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = (covariance / (sd[..., :, None] * sd[..., None, :])) ** 2
    total = np.where(np.isfinite(squared), squared, 1.0).sum((-1, -2))
    return np.clip((total - levels) / max(levels * (levels - 1), 1), 0, 1)


def pooled(difference: Difference) -> tuple[np.ndarray, np.ndarray]:
    """Moderated variance and degrees of freedom, which borrow strength across the levels.

    In Smyth (2004, section 6.2) a level's true variance is drawn from a scaled inverse chi-squared distribution with
    d0 degrees of freedom around a trend, here a polynomial in the level fitted to the log variances. The estimate is
    the weighted mean of the trend and the level's own variance, with d0 + df degrees of freedom. Smyth's many genes
    are nearly independent, so that the trend is practically known. Ten levels of the same replicates are few and
    correlated, so this implementation is more conservative in two ways:

    - All scatter around the trend counts as real. Sampling causes less scatter between correlated levels than between
      independent ones; subtracting the latter would overestimate d0.
    - The trend has ν = df / (s + (1 - s) h) degrees of freedom, where s is the mean squared correlation between levels
      and h the leverage of the level in the fit. Its uncertainty is added to that of the weighted mean:
      1 / df' = 1 / (d0 + df) + (1 - (1 - w)²) / ν, with w = d0 / (d0 + df).

    Returns:
        Variance of the mean difference and its degrees of freedom, each of shape (..., L).
    """
    levels = difference.mean.shape[-1]
    variance, df = difference.variance, difference.df
    if levels < 2 or not np.isfinite(variance).all():
        return variance, df
    variance = np.maximum(variance, np.maximum(1e-5 * np.median(variance, -1, keepdims=True), 1e-20))
    trend = np.vander(np.linspace(-1, 1, levels), 1 + min(2, (levels - 2) // 3))
    hat = trend @ np.linalg.pinv(trend)
    logs = np.log(variance) - special.digamma(df / 2) + np.log(df / 2)
    fit = logs @ hat
    scatter = ((logs - fit) ** 2).sum(-1, keepdims=True) / (levels - trend.shape[1])
    d0 = 2 * _trigamma_inverse(np.maximum(scatter, 1e-6))
    prior = np.exp(fit + special.digamma(d0 / 2) - np.log(d0 / 2))
    weight = d0 / (d0 + df)
    correlation = np.asarray(difference.squared_correlation)[..., None]
    trend_df = df / (correlation + (1 - correlation) * np.diag(hat))
    moderated_df = 1 / (1 / (d0 + df) + (1 - (1 - weight) ** 2) / trend_df)
    return weight * prior + (1 - weight) * variance, moderated_df


def probability_of_improvement(
    challenger: np.ndarray, reference: np.ndarray, pairs: bool, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Probability that a replicate of the challenger beats one of the reference, averaged over the levels.

    Agarwal et al. (2021); ties count half. The interval is Wilson's, as if each replicate won at all levels or at none.
    That is its widest case: levels, and partners of unpaired replicates, only add information. A bootstrap over eight
    replicates contains the true probability too rarely (docs/statistics.md).

    Args:
        challenger: Accuracy in %, shape (n, L).
        reference: Accuracy in %, shape (m, L); n = m if paired.
        pairs: Whether replicates are compared within pairs, or each with each.
        confidence: Two-sided confidence of the interval, 0 to 1.

    Returns:
        Probability, and the ends of its interval; the ends are NaN with a single replicate.
    """
    n = min(len(challenger), len(reference))
    wins = 0.5 * (1 + np.sign(challenger[:, None] - reference[None])).mean(-1)
    found = float((np.diagonal(wins) if pairs else wins).mean())
    if n < 2:
        return found, float("nan"), float("nan")
    z = float(stats.norm.ppf((1 + confidence) / 2))
    center = (found + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(found * (1 - found) / n + (z / (2 * n)) ** 2)
    return found, max(0.0, center - half), min(1.0, center + half)


def _trigamma_inverse(y: np.ndarray) -> np.ndarray:
    """Solves trigamma(x) = y by Newton's method on 1 / trigamma, which is nearly linear (Smyth 2004, appendix)."""
    x = 0.5 + 1 / y
    for _ in range(10):
        trigamma = special.polygamma(1, x)
        x = x + trigamma * (1 - trigamma / y) / special.polygamma(2, x)
    return x


def bounds(mean: np.ndarray, variance: np.ndarray, df: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """One-sided lower and upper confidence bounds of the difference; NaN if the variance is unknown."""
    half = stats.t.ppf(confidence, df) * np.sqrt(variance)
    return mean - half, mean + half


def verdict(lower: np.ndarray, upper: np.ndarray, margin: float) -> np.ndarray:
    """Verdict from one-sided bounds at all levels.

    Args:
        lower: Lower bounds of the difference, shape (..., L).
        upper: Upper bounds, same shape.
        margin: Non-inferiority margin in percentage points, at least 0.

    Returns:
        dominates, weakly dominates, dominated or undecided, shape (...).
    """
    with np.errstate(invalid="ignore"):
        cases = [(lower > 0).all(-1), (lower > -margin).all(-1), (upper < 0).all(-1)]
    return np.select(cases, ["dominates", "weakly dominates", "dominated"], "undecided")


def replicates_needed(difference: Difference, gap: np.ndarray, confidence: float) -> int | None:
    """Number of replicates per arm that gives a power of 80 %, if the observed gaps and spreads are the true ones.

    The failure probabilities of the levels are added (union bound), which is valid for any correlation.

    Args:
        difference: Observed difference; its variance sets the spread.
        gap: Distance of the mean difference from the tested bound, shape (L,); negative on the wrong side.
        confidence: Confidence of each one-sided test.

    Returns:
        2 to 1,000. None if more are needed, a gap is not positive, or the spread is unknown.
    """
    if not (gap > 0).all() or not np.isfinite(difference.variance).all():
        return None
    # standard deviation of one replicate; arms with different n count as their harmonic mean
    sd = np.sqrt(difference.variance * 2 / (1 / difference.n[0] + 1 / difference.n[1]))

    def enough(n: int) -> bool:
        df = (n - 1) * (1 if difference.paired else 2)
        with np.errstate(divide="ignore"):
            power = stats.nct.sf(stats.t.ppf(confidence, df), df, np.minimum(gap * np.sqrt(n) / sd, 30))
        return float((1 - power).sum()) <= 1 - POWER

    if not enough(MAX_REPLICATES):
        return None
    low, high = 1, MAX_REPLICATES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
