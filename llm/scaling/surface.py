"""The loss surface L = E + A/N^α + B/D^β: its value, its optimum for a budget, its log as a law.

Third floor. Constants may be numbers or whole arrays of bootstrap draws.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from llm.scaling.bootstrap import Draws
from llm.scaling.runs import FLOPS_PER_PARAM_TOKEN

CONSTANTS = ("E", "A", "B", "alpha", "beta")


@dataclasses.dataclass(frozen=True)
class LossSurface:
    """L = E + A/N^α + B/D^β, in nats per token, for one set of constants or for many.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 2.
    """

    E: Draws
    A: Draws
    B: Draws
    alpha: Draws
    beta: Draws

    @classmethod
    def of(cls, E: float, A: float, B: float, alpha: float, beta: float) -> "LossSurface":
        """Return the surface of five numbers."""
        return cls(*(np.asarray(value, float) for value in (E, A, B, alpha, beta)))

    def __getitem__(self, draw) -> "LossSurface":
        return LossSurface(*(getattr(self, name)[draw] for name in CONSTANTS))

    def loss(
        self, num_params: Float[np.ndarray, " R"], num_tokens: Float[np.ndarray, " R"]
    ) -> Float[np.ndarray, "*draws R"]:
        """Return the loss of each run, for each draw."""
        E, A, B, alpha, beta = (getattr(self, name)[..., None] for name in CONSTANTS)
        return E + A * np.exp(-alpha * np.log(num_params)) + B * np.exp(-beta * np.log(num_tokens))

    def loss_each(self, num_params: Draws, num_tokens: Draws) -> Draws:
        """Return the loss of one run for each draw, a run of its own each."""
        by_params = self.A * np.exp(-self.alpha * np.log(num_params))
        return self.E + by_params + self.B * np.exp(-self.beta * np.log(num_tokens))

    def optimum(self, flops: float) -> tuple[Draws, Draws]:
        """Return the parameters and tokens of least loss with 6·N·D FLOPs.

        N = G·(C/6)^(β/(α+β)), D = (C/6)^(α/(α+β))/G, where G = (αA/βB)^(1/(α+β)).

        Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 4.
        """
        total = self.alpha + self.beta
        log_g = np.log(self.alpha * self.A / (self.beta * self.B)) / total
        log_pairs = np.log(flops / FLOPS_PER_PARAM_TOKEN)
        return (
            np.exp(log_g + log_pairs * self.beta / total),
            np.exp(-log_g + log_pairs * self.alpha / total),
        )

    @property
    def params_exponent(self) -> Draws:
        """The a of N_opt ∝ C^a; the b of D_opt ∝ C^b is 1 − a."""
        return self.beta / (self.alpha + self.beta)


class LogSurface:
    """log L of each run as a function of (a, b, e, α, β), where A = e^a, B = e^b, E = e^e.

    The log-sum-exp form: LSE(a − α·log N, b − β·log D, e). Inside, log N and log D are centred on
    the table, which makes the constants of a term nearly independent; `centred` and `natural` turn
    one form into the other. A `robust.Law`.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 3.
    """

    def __init__(self, num_params: Float[np.ndarray, " R"], num_tokens: Float[np.ndarray, " R"]):
        log_params, log_tokens = np.log(num_params), np.log(num_tokens)
        self.middle = (float(log_params.mean()), float(log_tokens.mean()))
        self.log_params = log_params - self.middle[0]
        self.log_tokens = log_tokens - self.middle[1]

    def centred(self, theta: Float[np.ndarray, "S 5"]) -> Float[np.ndarray, "S 5"]:
        """Return constants whose a and b belong to log N and log D themselves as centred ones."""
        moved = theta.copy()
        moved[:, :2] -= theta[:, 3:] * self.middle
        return moved

    def surface(self, theta: Float[np.ndarray, "S 5"]) -> LossSurface:
        """Return the constants in natural units."""
        a, b = (theta[:, i] + theta[:, i + 3] * self.middle[i] for i in (0, 1))
        with np.errstate(over="ignore"):
            return LossSurface(np.exp(theta[:, 2]), np.exp(a), np.exp(b), theta[:, 3], theta[:, 4])

    def terms(self, theta: Float[np.ndarray, "S 5"]) -> Float[np.ndarray, "3 S R"]:
        """Return the logs of A/N^α, B/D^β and E."""
        a, b, e, alpha, beta = (theta[:, i, None] for i in range(5))
        by_params, by_tokens = a - alpha * self.log_params, b - beta * self.log_tokens
        return np.stack([by_params, by_tokens, np.broadcast_to(e, by_params.shape)])

    def predict(self, theta: Float[np.ndarray, "S 5"]) -> Float[np.ndarray, "S R"]:
        return _log_sum(self.terms(theta))[0]

    def linearise(
        self, theta: Float[np.ndarray, "S 5"]
    ) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R 5"]]:
        log_loss, (by_params, by_tokens, rest) = _log_sum(self.terms(theta))
        columns = [by_params, by_tokens, rest]
        columns += [-by_params * self.log_params, -by_tokens * self.log_tokens]
        return log_loss, np.stack(columns, -1)

    def curvature(
        self,
        theta: Float[np.ndarray, "S 5"],
        jacobian: Float[np.ndarray, "S R 5"],
        pull: Float[np.ndarray, "S R"],
    ) -> Float[np.ndarray, "S 5 5"]:
        # The second derivative of a log-sum-exp: its shares' diagonal less their outer product.
        curvature = -np.swapaxes(jacobian * pull[..., None], -1, -2) @ jacobian
        for i, log_size in ((0, self.log_params), (1, self.log_tokens)):
            pulled = pull * jacobian[..., i]
            mixed = -pulled @ log_size
            curvature[:, i, i] += pulled.sum(-1)
            curvature[:, i, i + 3] += mixed
            curvature[:, i + 3, i] += mixed
            curvature[:, i + 3, i + 3] += pulled @ log_size**2
        curvature[:, 2, 2] += (pull * jacobian[..., 2]).sum(-1)
        return curvature


def _log_sum(
    terms: Float[np.ndarray, "3 S R"],
) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "3 S R"]]:
    """Return the log of the sum of the terms' exponentials, and each term's share of it."""
    highest = terms.max(0)
    sizes = np.exp(terms - highest)
    total = sizes.sum(0)
    return highest + np.log(total), sizes / total
