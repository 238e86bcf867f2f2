"""The joint law L(N, D) of Kaplan et al. 2020: its value, its optimum, its log. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Float

from llm.scaling.bootstrap import Draws
from llm.scaling.robust import numerical_curvature
from llm.scaling.runs import FLOPS_PER_PARAM_TOKEN, Runs


@dataclasses.dataclass(frozen=True)
class JointLaw:
    """L = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D, for one set of constants or for many."""

    log_params_scale: Draws  # log N_c
    log_tokens_scale: Draws  # log D_c
    alpha_params: Draws
    alpha_tokens: Draws

    def __getitem__(self, draw) -> "JointLaw":
        values = (getattr(self, field.name)[draw] for field in dataclasses.fields(self))
        return JointLaw(*values)

    def loss(
        self, num_params: Float[np.ndarray, " R"], num_tokens: Float[np.ndarray, " R"]
    ) -> Float[np.ndarray, "*draws R"]:
        """Return the loss of each run, for each draw.

        Source: Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5.
        """
        by_params, by_tokens = self.terms(num_params, num_tokens)
        return np.exp(self.alpha_tokens[..., None] * np.logaddexp(by_params, by_tokens))

    def terms(
        self, num_params: Float[np.ndarray, " R"], num_tokens: Float[np.ndarray, " R"]
    ) -> tuple[Float[np.ndarray, "*draws R"], Float[np.ndarray, "*draws R"]]:
        """Return the logs of (N_c/N)^(α_N/α_D) and D_c/D."""
        ratio = (self.alpha_params / self.alpha_tokens)[..., None]
        by_params = ratio * (self.log_params_scale[..., None] - np.log(num_params))
        return by_params, self.log_tokens_scale[..., None] - np.log(num_tokens)

    def optimum(self, flops: float) -> tuple[Draws, Draws]:
        """Return the parameters and tokens of least loss with 6·N·D FLOPs.

        With κ = α_N/α_D the bracket (N_c/N)^κ + 6·D_c·N/C is least at N^(1+κ) = κ·N_c^κ·C/(6·D_c).
        """
        ratio = self.alpha_params / self.alpha_tokens
        power = np.log(ratio) + ratio * self.log_params_scale - self.log_tokens_scale
        log_params = (power + np.log(flops / FLOPS_PER_PARAM_TOKEN)) / (1 + ratio)
        return np.exp(log_params), np.exp(np.log(flops / FLOPS_PER_PARAM_TOKEN) - log_params)

    @property
    def params_exponent(self) -> Draws:
        return self.alpha_tokens / (self.alpha_params + self.alpha_tokens)


class LogJoint:
    """log L as a function of (p, q, κ, g): e^g·LSE(p − κ·log N, q − log D). A `robust.Law`.

    κ = α_N/α_D and α_D = e^g; log N and log D are centred.
    """

    def __init__(self, runs: Runs):
        log_params, log_tokens = np.log(runs.num_params), np.log(runs.num_tokens)
        self.middle = (float(log_params.mean()), float(log_tokens.mean()))
        self.log_params = log_params - self.middle[0]
        self.log_tokens = log_tokens - self.middle[1]

    def law(self, theta: Float[np.ndarray, "S 4"]) -> JointLaw:
        p, q, ratio, log_alpha = theta.T
        alpha = np.exp(log_alpha)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_scale = p / ratio + self.middle[0]
        return JointLaw(log_scale, q + self.middle[1], ratio * alpha, alpha)

    def _terms(
        self, theta: Float[np.ndarray, "S 4"]
    ) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R"], Float[np.ndarray, "S 1"]]:
        by_params = theta[:, 0, None] - theta[:, 2, None] * self.log_params
        by_tokens = theta[:, 1, None] - self.log_tokens
        return by_params, by_tokens, np.exp(theta[:, 3, None])

    def predict(self, theta: Float[np.ndarray, "S 4"]) -> Float[np.ndarray, "S R"]:
        by_params, by_tokens, alpha = self._terms(theta)
        return alpha * np.logaddexp(by_params, by_tokens)

    def linearise(
        self, theta: Float[np.ndarray, "S 4"]
    ) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R 4"]]:
        by_params, by_tokens, alpha = self._terms(theta)
        total = np.logaddexp(by_params, by_tokens)
        first, second = alpha * np.exp(by_params - total), alpha * np.exp(by_tokens - total)
        columns = [first, second, -first * self.log_params, alpha * total]
        return alpha * total, np.stack(columns, -1)

    def curvature(
        self,
        theta: Float[np.ndarray, "S 4"],
        jacobian: Float[np.ndarray, "S R 4"],
        pull: Float[np.ndarray, "S R"],
    ) -> Float[np.ndarray, "S 4 4"]:
        return numerical_curvature(self, theta, pull)

    def starts(self, log_loss: Float[np.ndarray, " R"]) -> Float[np.ndarray, "S 4"]:
        """Return 80 starts of mean log loss: κ and α_D on a grid, the terms in five proportions."""
        rows = []
        for alpha in (0.03, 0.1, 0.2, 0.4):
            for ratio in (0.3, 0.7, 1.0, 2.0):
                for lead in (-4.0, -2.0, 0.0, 2.0, 4.0):
                    total = log_loss.mean() / alpha - np.logaddexp(lead / 2, -lead / 2)
                    rows.append((total + lead / 2, total - lead / 2, ratio, np.log(alpha)))
        return np.array(rows)
