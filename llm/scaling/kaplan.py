"""Power laws of Kaplan et al. 2020: L(N, D) jointly, and L(N), L(D), L(C) singly. Third floor."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from llm.scaling.bootstrap import Estimate, Optimum, estimate, optimum_of, resample
from llm.scaling.design import check_surface_design
from llm.scaling.joint_law import JointLaw, LogJoint
from llm.scaling.parametric import StartReport, prediction_interval
from llm.scaling.robust import HUBER_DELTA, minimise
from llm.scaling.runs import NotIdentifiableError, Runs
from llm.scaling.single_laws import UNLIMITED, SingleLaw, fit_frontier, fit_single

_EXPONENTS = (0.005, 1.0)
_LEAST_SHARE = 1e-4


@dataclasses.dataclass(frozen=True)
class KaplanFit:
    """The joint law with its draws, and the single laws."""

    law: JointLaw
    draws: JointLaw
    single: tuple[SingleLaw, ...]
    level: float
    objective: float
    starts: StartReport
    log_residuals: Float[np.ndarray, " R"]
    notes: tuple[str, ...]

    def estimates(self) -> dict[str, Estimate]:
        """Return the joint law's constants and the exponents of its optimum."""
        pairs = {
            "N_c": (np.exp(self.law.log_params_scale), np.exp(self.draws.log_params_scale)),
            "D_c": (np.exp(self.law.log_tokens_scale), np.exp(self.draws.log_tokens_scale)),
            "alpha_N": (self.law.alpha_params, self.draws.alpha_params),
            "alpha_D": (self.law.alpha_tokens, self.draws.alpha_tokens),
            "params_exponent": (self.law.params_exponent, self.draws.params_exponent),
            "tokens_exponent": (1 - self.law.params_exponent, 1 - self.draws.params_exponent),
        }
        return {name: estimate(*pair, self.level) for name, pair in pairs.items()}

    def optimum(self, flops: float) -> Optimum:
        """Return the compute-optimal model for a budget by the joint law, with intervals."""
        point, draws = self.law.optimum(flops), self.draws.optimum(flops)
        loss = self.law.loss(*(np.atleast_1d(x) for x in point))[0]
        by_params, by_tokens = (
            self.draws.alpha_params
            / self.draws.alpha_tokens
            * (self.draws.log_params_scale - np.log(draws[0])),
            self.draws.log_tokens_scale - np.log(draws[1]),
        )
        at_draws = np.exp(self.draws.alpha_tokens * np.logaddexp(by_params, by_tokens))
        return optimum_of(flops, point, draws, self.level, estimate(loss, at_draws, self.level))

    def predict(
        self, runs: Runs, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
        """Return the loss predicted for each run and the ends of its prediction interval."""
        value = self.law.loss(runs.num_params, runs.num_tokens)
        draws = self.draws.loss(runs.num_params, runs.num_tokens)
        return value, *prediction_interval(draws, self.log_residuals, 4, self.level, rng)


def fit_kaplan(
    runs: Runs,
    *,
    num_draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
    delta: float = HUBER_DELTA,
) -> KaplanFit:
    """Fit L(N, D) = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D to all rows, and the single laws to some.

    There is no irreducible loss in these laws: over several decades they bend where E is not small
    beside L, and their exponents then depend on the range of the table.

    L(N) = (N_c/N)^α_N is fitted to rows that are not limited by data, which of all rows the joint
    law tells: L(N, D)/L(N, ∞) − 1 ≤ 0.02, Kaplan's own threshold (eq. 4.2); L(D) to those that are
    not limited by size, likewise. L(C) = (C_c/C)^α_C is fitted to the rows that no other row with
    as few FLOPs undercuts; C are the FLOPs of the table, not C_min at the critical batch size
    (eq. 1.3), which a table of (N, D, L) does not hold. Each is refused, and the reason told, where
    fewer than 3 sizes are left.

    Raises:
      NotIdentifiableError: as for `parametric.fit_parametric`, of the joint law.

    Source: Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1–1.3, 1.5, 4.2. The Huber loss on log loss
    and the intervals are ours; Kaplan et al. fit D by early stopping on repeated data, where D is
    the size of the data set. Here it is the tokens trained on.
    """
    check_surface_design(runs, num_constants=4)
    law, log_loss = LogJoint(runs), np.log(runs.loss)
    starts = law.starts(log_loss)
    minimum = minimise(law, log_loss, starts, delta=delta)
    best = minimum.theta[[minimum.best]]
    joint = law.law(best)
    if not minimum.converged[minimum.best] or _gone(joint, runs)[0]:
        raise NotIdentifiableError(
            "the joint law L(N, D) has no optimum in which both terms count (α_N = "
            f"{joint.alpha_params[0]:.3g}, α_D = {joint.alpha_tokens[0]:.3g}): add runs that are "
            "limited by size and runs that are limited by data"
        )
    rng, notes = np.random.default_rng(seed), []
    weights = resample(runs.run, num_draws, rng)
    drawn = minimise(law, log_loss, np.repeat(best, num_draws, 0), weights, delta=delta)
    draws = law.law(drawn.theta)
    lost = ~drawn.converged | _gone(draws, runs)
    if num_draws and lost.mean() > (1 - level) / 2:
        raise NotIdentifiableError(
            f"the joint law has no interval: in {lost.mean():.0%} of the resamples a term vanishes "
            "or an exponent runs away; add runs that are limited by size and runs limited by data"
        )
    if lost.any():
        notes.append(f"{lost.sum()} of {num_draws} resamples had no fit and were left out")
    single = (
        fit_single("L(N)", runs, _unlimited(joint, runs, 1), weights, level),
        fit_single("L(D)", runs, _unlimited(joint, runs, 0), weights, level),
        fit_frontier(runs, weights, level),
    )
    report = StartReport(
        len(starts),
        int(minimum.arrived().sum()),
        int(minimum.converged.sum()),
        float(minimum.objective.max()),
    )
    return KaplanFit(
        joint[0],
        draws[~lost],
        single,
        level,
        float(minimum.objective[minimum.best]),
        report,
        law.predict(best)[0] - log_loss,
        tuple(notes),
    )


def _gone(law: JointLaw, runs: Runs) -> Bool[np.ndarray, " S"]:
    by_params, by_tokens = law.terms(runs.num_params, runs.num_tokens)
    with np.errstate(invalid="ignore"):
        lead = by_params - by_tokens
    limit = np.log(_LEAST_SHARE)
    gone = ~((lead.max(-1) > limit) & (lead.min(-1) < -limit))
    for exponent in (law.alpha_params, law.alpha_tokens):
        gone |= ~((exponent > _EXPONENTS[0]) & (exponent < _EXPONENTS[1]))
    return gone


def _unlimited(law: JointLaw, runs: Runs, term: int) -> Bool[np.ndarray, " R"]:
    """Return the rows that lose at most 2% by the term (0: size, 1: data)."""
    terms = [x[0] for x in law.terms(runs.num_params, runs.num_tokens)]
    excess = law.alpha_tokens[0] * (np.logaddexp(*terms) - terms[1 - term])
    return np.expm1(excess) <= UNLIMITED
