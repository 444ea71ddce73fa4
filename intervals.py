"""pass@k and the intervals around numbers: Wilson's, the bootstrap over problems and over blocks of steps, Student's t."""
import math

import numpy as np

RESAMPLES = 10_000  # of the bootstrap
# Student's t, 97.5%, for 1, 2, ... 30 degrees of freedom; with more it is a little less
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
           2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def pass_at_k(n, c, k):
    """1 - C(n-c, k) / C(n, k) for c right of n >= k responses. Whole numbers up to the one division, so exact."""
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def wilson(right, n, z=1.96):
    """[low, high], the 95% interval of a fraction right / n (Wilson, JASA 22, 1927): it stays within 0..1 for 0 of n."""
    centre, spread = (right + z * z / 2) / (n + z * z), z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    return [max(0.0, centre - spread), min(1.0, centre + spread)]


def bootstrap(values, resamples=RESAMPLES):
    """[low, high], the 95% percentile interval of the mean of values, one a problem, over problems drawn anew. Of differences
    between two models on the same problems it is the paired bootstrap. Always the same for the same values."""
    distinct, counts = np.unique(values, return_counts=True)
    rng, n = np.random.default_rng(0), len(values)
    # how often each distinct value is drawn is all that a mean needs: for 0 and 1 a binomial draw. 8 MB at a time
    size = max(1, 2**20 // len(distinct))
    means = [rng.multinomial(n, counts / n, min(size, resamples - done)) @ distinct / n for done in range(0, resamples, size)]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def student(freedom):
    """The 97.5% quantile of Student's t with so many degrees of freedom."""
    return STUDENT[min(freedom, len(STUDENT)) - 1]


def moments(x, y):
    """(sum xx, sum yy, sum xy) about the means, over the last axis."""
    constant = [np.ptp(v, -1, keepdims=True) == 0 for v in (x, y)]  # then exactly 0, whatever its mean rounds to
    x, y = (np.where(same, 0, v - v.mean(-1, keepdims=True)) for same, v in zip(constant, (x, y)))
    return np.stack([(x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)])


def pearson(moments):
    """Pearson's r; nan where one of the two does not vary."""
    xx, yy, xy = moments
    with np.errstate(invalid="ignore", divide="ignore"):
        return xy / np.sqrt(xx * yy)


def resampled_blocks(n, resamples, rng):
    """(resamples, n) positions of a moving-block bootstrap: blocks of ceil(sqrt(n)) consecutive steps, since neighbouring
    steps are alike."""
    block = math.ceil(math.sqrt(n))
    starts = rng.integers(0, n - block + 1, (resamples, math.ceil(n / block)))
    return (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :n]
