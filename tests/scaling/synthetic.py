"""Tables made from published constants, for the tests of the fits."""

import numpy as np

from llm.scaling.runs import Runs
from llm.scaling.surface import LossSurface

# Hoffmann et al. 2022, section 3.3, and Besiroglu et al. 2024, abstract's refit.
HOFFMANN = LossSurface.of(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
BESIROGLU = LossSurface.of(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
SYMMETRIC = LossSurface.of(E=1.69, A=400.0, B=400.0, alpha=0.31, beta=0.31)
LOPSIDED = LossSurface.of(E=1.8, A=80.0, B=20000.0, alpha=0.22, beta=0.45)


def grid(num_sizes: int, num_lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a rectangle of sizes and tokens, about 1 to 30,000 tokens per parameter."""
    sizes, lengths = np.geomspace(1e7, 5e9, num_sizes), np.geomspace(1e9, 3e11, num_lengths)
    num_params, num_tokens = np.meshgrid(sizes, lengths)
    return num_params.ravel(), num_tokens.ravel()


def isoflop_grid(
    surface: LossSurface, *, width: float, off=lambda flops: 1.0, num_budgets=4, num_sizes=7
) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes from 1/width to width times the best, times `off`, at budgets 1e18 to 1e21."""
    num_params, num_tokens = [], []
    for flops in np.geomspace(1e18, 1e21, num_budgets):
        best = float(surface.optimum(flops)[0])
        sizes = best * off(flops) * np.geomspace(1 / width, width, num_sizes)
        num_params.extend(sizes)
        num_tokens.extend(flops / 6 / sizes)
    return np.array(num_params), np.array(num_tokens)


def noisy(surface, sizes: tuple[np.ndarray, np.ndarray], noise: float, seed: int) -> Runs:
    """Return runs of a surface with normal noise in their log loss."""
    rng = np.random.default_rng(seed)
    loss = surface.loss(*sizes) * np.exp(noise * rng.normal(size=len(sizes[0])))
    return Runs.of(*sizes, loss)
