"""What fine-tuning, DPO and PPO changed: the report's section on it. Third floor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm.evaluation.figures import BLUE, GREY, ORANGE, VERMILION, as_figure, draw, smooth
from llm.evaluation.report import Figure, Sample, Section, Table

Curve = Sequence[Mapping[str, float]]  # rows with kl, proxy and judge, by step of PPO

STAGE_LABELS = {
    "pretrain": "pretrained",
    "sft": "fine-tuned",
    "dpo": "DPO",
    "ppo": "PPO",
}
_COLUMNS = {
    "instruction_following": "Follows",
    "reward": "Proxy reward",
    "reward_judge": "Other reward",
    "distinct_2": "Distinct-2",
    "response_tokens": "Tokens",
    "ended_by_eos": "Ended",
}


def alignment_section(
    policies: Mapping[str, Mapping[str, Any]], judge_on_real: float, curve: Curve
) -> Section:
    """Return the section: a table and bars by stage, reward against divergence, and samples."""
    text = (
        "Each policy answers the same held-out instructions. A judge that no policy and no reward "
        "has seen, TF-IDF and logistic regression on the labels of other films, says whether an "
        f"answer is of the kind that was asked for; on real reviews it is right {judge_on_real:.1%}"
        " of the time. The proxy is the reward model that PPO was trained against; another, of "
        "other labels, tells whether the policy only learnt to please the first."
    )
    rows = tuple(
        (STAGE_LABELS[name], *(found[column] for column in _COLUMNS))
        for name, found in policies.items()
    )
    caption = (
        "Means over all responses: shares that follow the instruction, that are different among "
        "all pairs of tokens, and that end by themselves; rewards in deviations."
    )
    table = Table(("Policy", *_COLUMNS.values()), rows, caption)
    samples = tuple(
        Sample(f"{sample['prompt']}\n", sample["text"], STAGE_LABELS[name])
        for name, found in policies.items()
        for sample in found["samples"]
    )
    figures = (following_figure(policies, judge_on_real), reward_curve_figure(curve))
    return Section("From a base model to an aligned one", text, (table,), figures, samples)


def following_figure(policies: Mapping[str, Mapping[str, Any]], judge_on_real: float) -> Figure:
    """Draw the share of responses that follow the instruction, by stage."""
    shares = {STAGE_LABELS[n]: found["instruction_following"] for n, found in policies.items()}
    drawing, axes = draw(height=0.9 + 0.35 * len(shares))
    bars = axes.barh(range(len(shares)), list(shares.values()), height=0.7, color=BLUE)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=3, fontsize=10)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    for place, style, label in ((0.5, ":", "chance"), (judge_on_real, "--", "judge on real texts")):
        axes.axvline(place, color=GREY, linestyle=style, linewidth=1.2, label=label)
    axes.set_xlabel("share of responses that follow the instruction")
    axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=10)
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return as_figure(
        "instruction-following",
        drawing,
        f"Share of responses that follow the instruction: {listed}; "
        f"the judge is right on {judge_on_real:.1%} of real texts.",
    )


def reward_curve_figure(curve: Curve) -> Figure:
    """Draw proxy reward and judged share against the divergence that they cost.

    Source: the form is of Gao et al. 2022, arXiv:2210.10760, figure 1, whose axis is √KL.
    """
    drawing, axes = draw()
    rows = sorted(curve, key=lambda row: row["step"])
    root = np.sqrt(np.maximum([row["kl"] for row in rows], 0.0))
    window = max(1, len(rows) // 10)
    order = np.argsort(root)
    x = smooth(root[order], window)
    right = axes.twinx()
    right.spines[["top"]].set_visible(False)
    for side, name, colour, label in (
        (axes, "proxy", ORANGE, "reward model (left)"),
        (right, "judge", VERMILION, "judge (right)"),
    ):
        values = np.array([row[name] for row in rows])[order]
        side.plot(root[order], values, ".", color=colour, alpha=0.3, markersize=4)
        side.plot(x, smooth(values, window), color=colour, linewidth=1.8, label=label)
    axes.set_xlabel("√KL from the reference (√nats a response)")
    axes.set_ylabel("reward (deviations)")
    right.set_ylabel("share that follows the instruction")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=10)
    last = rows[-1] if rows else {"kl": 0.0, "proxy": 0.0, "judge": 0.0}
    return as_figure(
        "reward-against-kl",
        drawing,
        f"Reward and judged share in the course of PPO against the divergence from the reference: "
        f"at the end {last['kl']:.2f} nats, reward {last['proxy']:.2f}, share {last['judge']:.1%}.",
        "What PPO's divergence from the reference bought, by its own reward and by the judge.",
    )
