"""Log-densities of one feature, given the numbers that a network has for it, to 30 digits.

Each takes the numbers in the order in which the library documents them, then the value.
"""

from collections.abc import Callable, Sequence

from mpmath import mp, mpf

mp.dps = 30
LogDensity = Callable[[Sequence, float], mpf]


def normal(numbers, x):
    loc, log_scale = numbers
    return -(((x - loc) / mp.exp(log_scale)) ** 2) / 2 - log_scale - mp.log(2 * mp.pi) / 2


def heteroscedastic(numbers, x, *, min_scale):
    loc, log_scale = numbers
    return normal((loc, mp.log(min_scale + mp.exp(log_scale))), x)


def student_t(numbers, x, *, df):
    loc, log_scale = numbers
    df, t = mpf(df), (x - loc) / mp.exp(log_scale)
    constant = mp.loggamma((df + 1) / 2) - mp.loggamma(df / 2) - mp.log(mp.pi * df) / 2
    return constant - (df + 1) / 2 * mp.log(1 + t**2 / df) - log_scale


def laplace(numbers, x):
    loc, log_scale = numbers
    return -abs(x - loc) / mp.exp(log_scale) - mp.log(2) - log_scale


def bernoulli(numbers, x):
    (logit,) = numbers
    return -mp.log(1 + mp.exp(-logit if x == 1 else logit))


def continuous_bernoulli(numbers, x):
    """Loaiza-Ganem & Cunningham (2019): λ^x (1 - λ)^(1 - x), over its integral from 0 to 1."""
    (logit,) = numbers
    integral = mpf(1) if logit == 0 else mp.expm1(logit) / logit
    return logit * x - mp.log(integral)


def categorical(numbers, x):
    return numbers[int(x)] - mp.log(sum(mp.exp(logit) for logit in numbers))


def logistic_mixture(numbers, x, *, levels):
    """Salimans et al. (2017), equations (1) and (2): the mass of a bin, open at the ends, of a mixture on [-1, 1]."""
    k = len(numbers) // 3
    logits, locs, log_scales = (numbers[i * k : (i + 1) * k] for i in range(3))
    index = round(x * (levels - 1))
    centre, half = mpf(2 * index) / (levels - 1) - 1, mpf(1) / (levels - 1)
    mass, least = mpf(0), -7 - max(mp.log(mpf(levels - 1) / 255), 0)
    for logit, loc, log_scale in zip(logits, locs, log_scales, strict=True):
        s = mp.exp(max(least, min(7, log_scale)))
        low = -mp.inf if index == 0 else (centre - half - loc) / s
        high = mp.inf if index == levels - 1 else (centre + half - loc) / s
        mass += mp.exp(logit) * _between(low, high)
    return mp.log(mass) - mp.log(sum(mp.exp(logit) for logit in logits))


def _between(low, high):
    """F(high) - F(low) of a logistic, on the side where nothing cancels."""
    if low > 0:
        low, high = -high, -low
    return 1 / (1 + mp.exp(-high)) - 1 / (1 + mp.exp(-low))


def binomial(numbers, x, *, total_count):
    (logit,) = numbers
    failures = total_count - mpf(x)
    return mp.log(mp.binomial(total_count, x)) - x * mp.log1p(mp.exp(-logit)) - failures * mp.log1p(mp.exp(logit))


def poisson(numbers, x):
    log_rate = min(20, numbers[0])
    return x * log_rate - mp.exp(log_rate) - mp.loggamma(mpf(x) + 1)


def negative_binomial(numbers, x):
    """Γ(x + r) / (x! Γ(r)) (1 - λ)^r λ^x, λ = σ(l), r = e^k."""
    logit, r = min(20, numbers[0]), mp.exp(max(-20, min(20, numbers[1])))
    ways = mp.loggamma(x + r) - mp.loggamma(mpf(x) + 1) - mp.loggamma(r)
    return ways - r * mp.log1p(mp.exp(logit)) - x * mp.log1p(mp.exp(-logit))


def zero_inflated(numbers, x, *, counts):
    """Lambert (1992): π 1(x = 0) + (1 - π) p(x), π = σ(l); enough digits that neither part is lost at 0."""
    logit, *rest = numbers
    with mp.extradps(50):
        log_pi, log_other = -mp.log1p(mp.exp(-logit)), -mp.log1p(mp.exp(logit))
        if x == 0:
            return mp.log(mp.exp(log_pi) + mp.exp(log_other + counts(rest, 0)))
        return counts(rest, x) + log_other


def hurdle(numbers, x, *, counts):
    """Mullahy (1986): π at 0, else (1 - π) p(x) / (1 - p(0)), π = σ(l)."""
    logit, *rest = numbers
    if x == 0:
        return -mp.log1p(mp.exp(-logit))
    return counts(rest, x) - mp.log(-mp.expm1(counts(rest, 0))) - mp.log1p(mp.exp(logit))


# --- What follows from a log-density ---


def gradient(log_density: LogDensity, numbers: Sequence[float], x: float) -> list[float]:
    """Its derivative by each number."""
    along = range(len(numbers))
    values = [mpf(number) for number in numbers]
    return [float(mp.diff(lambda t, i=i: log_density([*values[:i], t, *values[i + 1 :]], x), values[i])) for i in along]


def expectation(density: Callable, support, of: Callable = lambda x: 1) -> float:
    """E[of(x)], by quadrature between the points of a tuple or by summation over those of a list."""
    if isinstance(support, list):
        return float(sum(of(x) * density(x) for x in support))
    with mp.workdps(20):
        return float(mp.quad(lambda x: of(x) * density(x), support))
