"""The difference between two arms at each level, and what its spread lets one say: pure functions of arrays.

Accuracies are in %, differences in percentage points; leading axes are simulations (`analysis.power`).
"""

import dataclasses

import numpy as np
from scipy import special, stats

POWER = 0.8
MOST_REPLICATES = 1000


@dataclasses.dataclass(frozen=True)
class Difference:
    """Challenger minus reference at L levels, in percentage points; leading axes are simulations.

    Args:
        mean: Shape (..., L).
        variance: Of that mean, shape (..., L); NaN if there is one replicate.
        df: Degrees of freedom of the variance, shape (..., L).
        shared: Mean squared correlation between levels, 0 to 1, shape (...): how little each level adds.
        average: Mean over the levels with its variance and df, each of shape (..., 1).
        n: Replicates of challenger and reference.
        paired: Whether replicates are.
    """

    mean: np.ndarray
    variance: np.ndarray
    df: np.ndarray
    shared: np.ndarray
    average: tuple[np.ndarray, np.ndarray, np.ndarray]
    n: tuple[int, int]
    paired: bool


def paired(challenger: np.ndarray, reference: np.ndarray) -> Difference:
    """Of replicates that pair: arrays of shape (..., n, L), accuracy in %."""
    n = challenger.shape[-2]
    differences = challenger - reference
    rounding = _resolution(challenger, reference) ** 2 / 6  # of the difference of two rounded numbers
    mean, variance, df = _t(differences, rounding)
    average = _t(differences.mean(-1, keepdims=True), 0.0)
    return Difference(mean, variance, df, _shared(differences - mean[..., None, :]), average, (n, n), True)


def welch(challenger: np.ndarray, reference: np.ndarray) -> Difference:
    """Of independent replicates: arrays of shape (..., n, L) with an n of each, accuracy in %."""
    n = challenger.shape[-2], reference.shape[-2]
    rounding = _resolution(challenger, reference) ** 2 / 12
    mean, variance, df = _welch(_t(challenger, rounding), _t(reference, rounding))
    average = _welch(*(_t(values.mean(-1, keepdims=True), 0.0) for values in (challenger, reference)))
    residuals = [
        (values - values.mean(-2, keepdims=True)) / np.sqrt(count * max(count - 1, 1))
        for values, count in zip((challenger, reference), n, strict=True)
    ]
    return Difference(mean, variance, df, _shared(np.concatenate(residuals, -2)), average, n, False)


def from_summaries(
    means: tuple[np.ndarray, np.ndarray], sds: tuple[np.ndarray, np.ndarray], n: tuple[int, int]
) -> Difference:
    """Of means and sample standard deviations of shape (L,), challenger's and reference's, over n replicates each.

    A mean over levels spreads most, by the mean of the standard deviations, if a replicate's levels are perfectly
    correlated; that is assumed.
    """
    parts = [_summary(*part) for part in zip(means, sds, n, strict=True)]
    average = _welch(
        *(_summary(m.mean(keepdims=True), s.mean(keepdims=True), k) for m, s, k in zip(means, sds, n, strict=True))
    )
    return Difference(*_welch(*parts), np.ones(()), average, n, False)


def _t(values: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over replicates, its variance (at least that of rounding) and df, of values of shape (..., n, L)."""
    n, mean = values.shape[-2], values.mean(-2)
    variance = np.maximum(values.var(-2, ddof=1), rounding) / n if n > 1 else np.full(mean.shape, np.nan)
    return mean, variance, np.full(mean.shape, n - 1.0)


def _summary(mean: np.ndarray, sd: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return mean, sd**2 / n if n > 1 else np.full(mean.shape, np.nan), np.full(mean.shape, n - 1.0)


def _welch(challenger: tuple, reference: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference of two (mean, variance, df) and the df of Welch and Satterthwaite; 1 if an arm has two replicates.

    With two against four or more, Satterthwaite's df are too many: 8 % instead of 5 % in simulations of 400,000.
    """
    (m1, v1, df1), (m2, v2, df2) = challenger, reference
    with np.errstate(invalid="ignore", divide="ignore"):
        df = (v1 + v2) ** 2 / (v1**2 / df1 + v2**2 / df2)
    df = np.where(v1 + v2 == 0, df1 + df2, df)
    return m1 - m2, v1 + v2, np.where(np.minimum(df1, df2) < 2, 1.0, df)


def _resolution(*values: np.ndarray) -> float:
    """Smallest step between two accuracies, at most 1: on 355 test images 0.28. Spread below it cannot be seen."""
    steps = np.diff(np.unique(np.concatenate([part.ravel() for part in values])))
    steps = steps[steps > 1e-9]
    return min(float(steps.min()), 1.0) if steps.size else 0.0


def _shared(residuals: np.ndarray) -> np.ndarray:
    """Mean squared correlation between different levels of residuals (..., n, L); few replicates raise it: safe."""
    covariance = np.einsum("...nl,...nm->...lm", residuals, residuals)
    sd = np.sqrt(np.einsum("...ll->...l", covariance))
    levels = residuals.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = (covariance / (sd[..., :, None] * sd[..., None, :])) ** 2
    total = np.where(np.isfinite(squared), squared, 1.0).sum((-1, -2))
    return np.clip((total - levels) / max(levels * (levels - 1), 1), 0, 1)


def pooled(difference: Difference) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the mean difference and df at each level, moderated by the other levels; each of shape (..., L).

    Smyth (2004, section 6.2): a level's true variance is drawn from a scaled inverse chi-squared distribution with d0
    degrees of freedom about a trend, here a polynomial in the level of the log variance; its estimate is the weighted
    mean of trend and own variance, with d0 + df degrees of freedom. Smyth's many genes are nearly independent and leave
    the trend as good as known. Ten levels of the same replicates do not, so here

    - all scatter about the trend beyond none counts as real (with correlated levels, chance makes less of it than
      independent levels would show, and to subtract it would make d0 too large);
    - the trend carries ν degrees of freedom, df / (s + (1 - s) h) with s the mean squared correlation between levels
      and h the leverage of the level in the fit, and what it adds to the uncertainty of the weighted mean is added:
      1 / df' = 1 / (d0 + df) + (1 - (1 - w)²) / ν, with w = d0 / (d0 + df).
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
    shared = np.asarray(difference.shared)[..., None]
    trend_df = df / (shared + (1 - shared) * np.diag(hat))
    moderated_df = 1 / (1 / (d0 + df) + (1 - (1 - weight) ** 2) / trend_df)
    return weight * prior + (1 - weight) * variance, moderated_df


def _trigamma_inverse(y: np.ndarray) -> np.ndarray:
    """Newton's method on 1 / trigamma, which is nearly linear (Smyth 2004, appendix)."""
    x = 0.5 + 1 / y
    for _ in range(10):
        trigamma = special.polygamma(1, x)
        x = x + trigamma * (1 - trigamma / y) / special.polygamma(2, x)
    return x


def bounds(mean: np.ndarray, variance: np.ndarray, df: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """One-sided lower and upper bounds of the difference, each at the confidence; NaN without a spread."""
    half = stats.t.ppf(confidence, df) * np.sqrt(variance)
    return mean - half, mean + half


def verdict(lower: np.ndarray, upper: np.ndarray, margin: float) -> np.ndarray:
    """dominates, weakly dominates, dominated or undecided, from bounds of shape (..., L); shape (...)."""
    with np.errstate(invalid="ignore"):
        cases = [(lower > 0).all(-1), (lower > -margin).all(-1), (upper < 0).all(-1)]
    return np.select(cases, ["dominates", "weakly dominates", "dominated"], "undecided")


def replicates_needed(difference: Difference, gap: np.ndarray, confidence: float) -> int | None:
    """Smallest n of each arm that clears every gap with a power of 80 %, if gap and spread are the true ones.

    The chances of failing add up over the levels, which holds however they are correlated.

    Args:
        gap: How far the difference is on the right side of what it is tested against, shape (L,).

    Returns:
        2 to 1,000; None: more, or a gap is on the wrong side, or there is no spread to go by.
    """
    if not (gap > 0).all() or not np.isfinite(difference.variance).all():
        return None
    # of one replicate; where the two arms have different numbers, as though both had the harmonic mean of them
    sd = np.sqrt(difference.variance * 2 / (1 / difference.n[0] + 1 / difference.n[1]))

    def enough(n: int) -> bool:
        df = (n - 1) * (1 if difference.paired else 2)
        with np.errstate(divide="ignore"):
            power = stats.nct.sf(stats.t.ppf(confidence, df), df, np.minimum(gap * np.sqrt(n) / sd, 30))
        return float((1 - power).sum()) <= 1 - POWER

    if not enough(MOST_REPLICATES):
        return None
    few, many = 1, MOST_REPLICATES
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many
