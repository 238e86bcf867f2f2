"""The loss surface of Muennighoff et al. 2023, where data may be repeated. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Float

from llm.scaling.bootstrap import Draws
from llm.scaling.robust import numerical_curvature
from llm.scaling.runs import FLOPS_PER_PARAM_TOKEN, Runs
from llm.scaling.surface import CONSTANTS, LogSurface, LossSurface

_GRID_POINTS = 600  # in log N, of an optimum


@dataclasses.dataclass(frozen=True)
class RepeatedSurface:
    """L = E + A/N'^α + B/D'^β, where N' and D' are what excess and repetition are worth.

    D' = U + U·R*_D·(1 − exp(−R_D/R*_D)) with R_D = D/U − 1 repetitions of U unique tokens, and
    N' likewise of U_N, the parameters that are optimal for U; N' = N up to U_N, and throughout
    where `excess_scale` is infinite.

    Source: Muennighoff et al. 2023, arXiv:2305.16264, section 3.1.
    """

    base: LossSurface
    repeat_scale: Draws  # R*_D
    excess_scale: Draws  # R*_N

    def __getitem__(self, draw) -> "RepeatedSurface":
        return RepeatedSurface(self.base[draw], self.repeat_scale[draw], self.excess_scale[draw])

    def loss(
        self,
        num_params: Float[np.ndarray, " R"],
        num_tokens: Float[np.ndarray, " R"],
        unique_tokens: Float[np.ndarray, " R"],
    ) -> Float[np.ndarray, "*draws R"]:
        """Return the loss of each run, for each draw."""
        params, tokens = self.effective(num_params, num_tokens, unique_tokens)
        E, A, B, alpha, beta = (getattr(self.base, name)[..., None] for name in CONSTANTS)
        return E + A * np.exp(-alpha * np.log(params)) + B * np.exp(-beta * np.log(tokens))

    def effective(
        self,
        num_params: Float[np.ndarray, " R"],
        num_tokens: Float[np.ndarray, " R"],
        unique_tokens: Float[np.ndarray, " R"],
    ) -> tuple[Float[np.ndarray, "*draws R"], Float[np.ndarray, "*draws R"]]:
        """Return N' and D'."""
        unique = np.minimum(unique_tokens, num_tokens)
        _, A, B, alpha, beta = (getattr(self.base, name)[..., None] for name in CONSTANTS)
        log_g = np.log(alpha * A / (beta * B)) / (alpha + beta)
        needed = np.exp(log_g + beta / alpha * (np.log(unique) + log_g))
        needed = np.minimum(num_params, needed)
        tokens = _worth(unique, num_tokens, self.repeat_scale[..., None])
        params = _worth(needed, num_params, self.excess_scale[..., None])
        return params, tokens

    def optimum(self, flops: float, unique_tokens: float) -> tuple[float, float, float]:
        """Return parameters, tokens and loss of the optimum where so many unique tokens exist.

        For one set of constants, on a grid of sizes and then on a finer one: no closed form is
        known.
        """
        middle, width = np.log(self.base.optimum(flops)[0]), 6.0
        for _ in range(2):
            log_params = np.linspace(middle - width, middle + width, _GRID_POINTS)
            params = np.exp(log_params)
            tokens = flops / FLOPS_PER_PARAM_TOKEN / params
            loss = self.loss(params, tokens, np.minimum(unique_tokens, tokens))
            best = int(np.argmin(loss))
            middle, width = log_params[best], 4 * width / _GRID_POINTS
        return tuple(float(x[best]) for x in (params, tokens, loss))


def _worth(
    unique: Float[np.ndarray, "*any R"],
    total: Float[np.ndarray, " R"],
    scale: Float[np.ndarray, "*draws 1"],
) -> Float[np.ndarray, "*draws R"]:
    """Return U + U·R*·(1 − exp(−R/R*)) for R = total/U − 1; total where R* is infinite."""
    repeats = total / unique - 1
    with np.errstate(invalid="ignore", over="ignore"):
        gained = -scale * np.expm1(-repeats / scale)
    return unique * (1 + np.where(np.isfinite(scale), gained, repeats))


class LogRepeated:
    """log L as a function of (a, b, e, α, β, log R*_D[, log R*_N]). A `robust.Law`."""

    def __init__(self, runs: Runs, *, excess: bool):
        self.inner = LogSurface(runs.num_params, runs.num_tokens)
        self.excess = excess
        self.num_params = runs.num_params
        self.log_unique = np.log(np.minimum(runs.unique_tokens, runs.num_tokens))
        self.repeats = np.maximum(runs.num_tokens / np.exp(self.log_unique) - 1, 0.0)

    def surface(self, theta: Float[np.ndarray, "S K"]) -> RepeatedSurface:
        with np.errstate(over="ignore"):
            scale = np.exp(theta[:, 6]) if self.excess else np.full(len(theta), np.inf)
            return RepeatedSurface(self.inner.surface(theta[:, :5]), np.exp(theta[:, 5]), scale)

    def predict(self, theta: Float[np.ndarray, "S K"]) -> Float[np.ndarray, "S R"]:
        return self.linearise(theta)[0]

    def linearise(
        self, theta: Float[np.ndarray, "S K"]
    ) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R K"]]:
        with np.errstate(all="ignore"):  # a step too far gives NaN, which no step is taken to
            return self._linearise(theta)

    def _linearise(
        self, theta: Float[np.ndarray, "S K"]
    ) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R K"]]:
        first, second = self.inner.middle
        e, alpha, beta = (theta[:, i, None] for i in (2, 3, 4))
        a, b = theta[:, 0, None] + alpha * first, theta[:, 1, None] + beta * second
        log_tokens, by_repeat = _log_worth(self.repeats, np.exp(theta[:, 5, None]))
        log_tokens = log_tokens + self.log_unique
        log_params = np.broadcast_to(np.log(self.num_params), log_tokens.shape)
        by_needed = by_excess = np.zeros_like(log_tokens)
        total = alpha + beta
        log_g = (np.log(alpha) + a - np.log(beta) - b) / total
        log_needed = log_g + beta / alpha * (self.log_unique + log_g)
        if self.excess:
            scale = np.exp(theta[:, 6, None])
            extra = np.maximum(self.num_params / np.exp(log_needed) - 1, 0.0)
            gained, by_excess = _log_worth(extra, scale)
            inside = extra > 0
            log_params = np.where(inside, log_needed + gained, log_params)
            # At N = U_N both forms and their slopes agree, so the law has no kink there.
            slope = 1 - np.exp(-extra / scale) * (1 + extra) / np.exp(gained)
            by_needed, by_excess = np.where(inside, slope, 0.0), np.where(inside, by_excess, 0.0)
        terms = np.stack([a - alpha * log_params, b - beta * log_tokens, e + 0 * log_params])
        highest = terms.max(0)
        sizes = np.exp(terms - highest)
        sums = sizes.sum(0)
        share_a, share_b, share_e = sizes / sums
        # How log N' follows the constants, through U_N.
        through = by_needed * -alpha * share_a
        ratio = 1 + beta / alpha
        turned = self.log_unique + log_g
        to_alpha = ratio * (1 / alpha - log_g) / total - beta / alpha**2 * turned
        to_beta = ratio * (-1 / beta - log_g) / total + turned / alpha
        to_a = through * ratio / total
        columns = [
            share_a + to_a,
            share_b - to_a,
            share_e,
            -share_a * log_params + through * to_alpha + (share_a + to_a) * first,
            -share_b * log_tokens + through * to_beta + (share_b - to_a) * second,
            -share_b * beta * by_repeat,
        ]
        if self.excess:
            columns.append(-share_a * alpha * by_excess)
        return highest + np.log(sums), np.stack(columns, -1)

    def curvature(
        self,
        theta: Float[np.ndarray, "S K"],
        jacobian: Float[np.ndarray, "S R K"],
        pull: Float[np.ndarray, "S R"],
    ) -> Float[np.ndarray, "S K K"]:
        return numerical_curvature(self, theta, pull)


def _log_worth(
    repeats: Float[np.ndarray, "*any R"], scale: Float[np.ndarray, "S 1"]
) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R"]]:
    """Return log(1 + R*·(1 − exp(−R/R*))), and its slope in log R*."""
    gained = -scale * np.expm1(-repeats / scale)
    slope = gained - repeats * np.exp(-repeats / scale)
    return np.log1p(gained), slope / (1 + gained)
