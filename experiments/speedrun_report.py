"""The speedrun's report.md, report.html and summary.json, from the results of its stages."""

from typing import Any

from etils import epath

from configs.schema import SpeedrunConfig
from llm.evaluation.alignment_report import alignment_section
from llm.evaluation.facts import hardware_facts, version_facts
from llm.evaluation.figures import (
    bits_per_byte_figures,
    learning_rate_figure,
    loss_figure,
    validation_figure,
)
from llm.evaluation.report import Report, Sample, Section, Table, write_report
from llm.evaluation.tables import (
    bits_per_byte_table,
    facts_table,
    format_duration,
    format_power,
    goodput_table,
    model_table,
    wall_time_table,
    write_summary,
)
from llm.scaling.accounting import num_active_params, num_params, training_flops_per_token
from llm.training.goodput import find_goodput
from llm.training.metrics import read_metrics

# Policies in summary.json, by the names of their stages.
_SUMMARY_NAMES = {"pretrain": "base", "sft": "sft", "dpo": "dpo", "ppo": "ppo"}
# What the model is held against, for the headline and the validation curve.
_HEADLINE = {"xz": "xz alone", "xz_given_training": "xz given training text", "ngram": "5-gram"}


def write_speedrun_report(
    workdir: epath.Path,
    config: SpeedrunConfig,
    *,
    tokenizer: dict[str, Any],
    data: dict[str, dict[str, Any]],
    bits_per_byte: dict[str, dict[str, float]],
    samples: list[dict[str, str]],
    alignment: dict[str, Any],
    wall_seconds: dict[str, float],
) -> None:
    """Write the three files; every figure of the report is in the summary too."""
    recipe = config.pretrain
    num_tokens = recipe.num_steps * recipe.tokens_per_step
    flops_per_token = training_flops_per_token(recipe.model, recipe.data.length_tokens)
    model = {
        "parameters": num_params(recipe.model),
        "active_parameters": num_active_params(recipe.model),
        "training_tokens": num_tokens,
        "training_flops_per_token": flops_per_token,
        "training_flops": flops_per_token * num_tokens,
    }
    rows = read_metrics(workdir / "pretrain")
    facts, versions, runs = hardware_facts(), version_facts(), find_goodput(workdir)
    write_summary(
        workdir / "summary.json",
        bits=bits_per_byte,
        wall_seconds=wall_seconds,
        model=model,
        tokenizer=tokenizer,
        data=data,
        samples=samples,
        instruction_following={
            _SUMMARY_NAMES[name]: found["instruction_following"]
            for name, found in alignment["policies"].items()
        }
        | {"judge_on_real": alignment["judge_on_real"]},
        distinct_2={
            _SUMMARY_NAMES[name]: found["distinct_2"]
            for name, found in alignment["policies"].items()
        },
        rl_kl=alignment["curve"][-1]["kl"],
        alignment=alignment,
        goodput={name: report.goodput for name, report in runs.items()},
        hardware=facts,
        versions=versions,
    )
    sections = (
        _text_section(bits_per_byte),
        _training_section(recipe, rows, bits_per_byte),
        Section("Samples", samples=tuple(Sample(s["prompt"], s["text"]) for s in samples)),
        alignment_section(alignment["policies"], alignment["judge_on_real"], alignment["curve"]),
        Section(
            "Model",
            tables=(
                model_table(
                    recipe.model,
                    num_params=model["parameters"],
                    num_active_params=model["active_parameters"],
                    flops_per_token=flops_per_token,
                    length_tokens=recipe.data.length_tokens,
                    num_tokens=num_tokens,
                ),
            ),
        ),
        _data_section(tokenizer, data),
        Section("Wall time", tables=(wall_time_table(wall_seconds), goodput_table(runs))),
        Section("Made with", tables=(facts_table(facts), facts_table(versions))),
    )
    headline = {
        "bits per byte": f"{bits_per_byte['model']['all']:.3f}",
        **{label: f"{bits_per_byte[name]['all']:.3f}" for name, label in _HEADLINE.items()},
        "parameters": f"{model['parameters']:,}",
        "training FLOPs": format_power(model["training_flops"]),
        "wall time": format_duration(wall_seconds["total"]),
    }
    write_report(Report("Speedrun: a language model's whole life", headline, sections), workdir)


def _text_section(bits: dict[str, dict[str, float]]) -> Section:
    model = bits["model"]["all"]
    gaps = ", ".join(
        f"{abs(bits[name]['all'] - model):.3f} {'under' if model < bits[name]['all'] else 'over'} "
        f"{label}"
        for name, label in _HEADLINE.items()
    )
    text = (
        f"Held-out works, films and packages, none of which were trained on. The model needs "
        f"{model:.3f} bits a byte: {gaps}.\n\nCompressors see the held-out bytes alone, or after "
        "all the training text (the size of both together less that of the training text). The "
        "n-gram model is interpolated modified Kneser–Ney on the model's own tokens. The model and "
        "the n-gram also pay for the end of each document."
    )
    return Section(
        "Bits per byte of held-out text",
        text,
        tables=(bits_per_byte_table(bits),),
        figures=bits_per_byte_figures(bits),
    )


def _training_section(recipe, rows, bits) -> Section:
    tokens = recipe.tokens_per_step
    levels = {label: bits[name]["all"] for name, label in _HEADLINE.items()}
    return Section(
        "Training",
        "Validation during training reads packed rows of a part of the held-out text, without a "
        "sliding window, and so lies a little above the final figures.",
        figures=(
            loss_figure(rows, tokens_per_step=tokens),
            validation_figure(rows, baselines=levels, tokens_per_step=tokens),
            learning_rate_figure(rows, tokens_per_step=tokens),
        ),
    )


def _data_section(tokenizer: dict[str, Any], data: dict[str, dict[str, Any]]) -> Section:
    columns = ("Source", "Documents", "Tokens", "Bytes", "Bytes a token", "Rows", "Fill (%)")
    columns += ("Held-out documents", "Held-out bytes")
    rows = tuple(
        (
            name,
            facts["documents"],
            facts["tokens"],
            facts["bytes"],
            facts["bytes_per_token"],
            facts["rows"],
            100 * facts["fill_rate"],
            facts["held_out_documents"],
            facts["held_out_bytes"],
        )
        for name, facts in data.items()
    )
    caption = f"A byte-level BPE of {tokenizer['vocab_size']:,} entries, trained on the same text."
    return Section("Corpora and tokenizer", tables=(Table(columns, rows, caption, 2),))
