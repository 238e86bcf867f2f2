"""BIG-bench tasks: scores by hand, and of a model by brute force."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments.loading import load_model
from llm.data.packages import PackageError, smollm2_file
from llm.data.tokenizer_training import bpe_tokenizer, byte_tokenizer
from llm.evaluation.batched import BatchedModel
from llm.evaluation.bigbench import combine_results, encode_answers, evaluate_task
from llm.evaluation.bigbench_metrics import BRIER, choice_scores, cut_response, text_scores
from llm.evaluation.bigbench_tasks import TaskError
from llm.generation.config import SamplingConfig
from llm.generation.generator import Generator
from llm.models.config import ComputeConfig, TransformerConfig
from llm.models.transformer import Transformer, init_params
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from tests.evaluation.bigbench_files import COLOURS, SUMS, write_task


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_task, tmp_path)


@pytest.fixture(scope="module")
def parts():
    """A Llama of one layer on bytes."""
    tokenizer = byte_tokenizer()
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=24,
        max_length_tokens=256,
    )
    model = Transformer(config, ComputeConfig())
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    # far from uniform: choices differ by nats
    return model, jax.tree.map(lambda x: 4.0 * x, jax.device_get(params)), tokenizer


def batched(parts, kind=BatchedModel, **kwargs):
    return kind(*parts, make_mesh(MeshConfig(), jax.devices()[:1]), **kwargs)


@pytest.fixture(scope="module")
def ours(parts):
    return batched(parts, batch_size=3)


# --- Metrics --------------------------------------------------------------------------------


def test_scores_of_choices_by_hand():
    """Two right choices of four, one half right."""
    scores = np.asarray([1.0, 0.0, 1.0, 0.5])
    chance = choice_scores(np.zeros(4), np.ones(4), scores)
    assert chance["multiple_choice_grade"] == 2.5 / 4
    assert chance["probability_mass"] == pytest.approx(2.5 / 4)
    assert chance["choice_nats"] == pytest.approx(math.log(2))
    # wanted shares 0.4, 0, 0.4, 0.2 against a quarter each
    assert chance[BRIER] == pytest.approx((0.75**2 + 3 * 0.25**2) / 4)
    shares, num_bytes = np.asarray([0.2, 0.4, 0.1, 0.3]), np.asarray([1.0, 1.0, 9.0, 1.0])
    mine = choice_scores(np.log(shares / 100), num_bytes, scores)
    assert mine["multiple_choice_grade"] == 0.0
    assert mine["multiple_choice_grade_length_normalised"] == 1.0
    assert mine["probability_mass"] == pytest.approx(0.2 + 0.1 + 0.15)
    assert mine["choice_nats"] == pytest.approx(-math.log(0.3))
    wanted = np.asarray([0.4, 0.0, 0.4, 0.2])
    brier = np.mean(wanted * (1 - shares) ** 2 + (1 - wanted) * shares**2)
    assert mine[BRIER] == pytest.approx(brier)


def test_scores_of_texts():
    assert text_scores("Paris", ["Lyon", "Paris"])["exact_str_match"] == 1.0
    assert text_scores(" paris", ["Paris"])["exact_str_match"] == 0.0
    assert text_scores(" paris", ["Paris"])["case_insensitive_str_match"] == 1.0
    numeric = "numeric_match_with_0_1_relative_error"
    found = [text_scores(said, ["-20"])[numeric] for said in ("-21.9", "-17", "20", "twenty")]
    assert found == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "stop, regex, answer",
    [
        ("#", None, "Rg5#"),
        (None, r"\d+", "5"),
        (None, r"g(\d)", "5"),
        ("5", r"[A-Z]g\d$", "Rg5"),
        ("R", None, "Rg5# Kd7#"),  # first: it cuts nothing
        (None, "x", ""),
    ],
)
def test_a_response_is_cut(stop, regex, answer):
    assert cut_response("Rg5# Kd7#", stop, regex) == answer


# --- Tokens ---------------------------------------------------------------------------------


def test_a_prompt_s_last_space_is_the_word_s():
    merges = [("e", "s"), ("Ġ", "Y"), ("ĠY", "es")]
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*characters, *map("".join, merges)])}
    tokenizer = bpe_tokenizer(vocab, merges, control_tokens=("<s>",), settings=BOS_ONLY)
    spelled = {i: token for token, i in vocab.items()}
    context, answers = encode_answers(tokenizer, "A: ", ["Yes", "No", "Yes, no"])
    assert "".join(spelled[i] for i in context if i in spelled) == "A:"
    assert [[spelled[i] for i in answer] for answer in answers] == [
        ["ĠYes"], ["Ġ", "N", "o"], ["ĠYes", ",", "Ġ", "n", "o"],
    ]  # fmt: skip
    # where no answer changes the prompt's tokens, they part at its end
    context, answers = encode_answers(tokenizer, "A: ", ["No", "no"])
    assert [[spelled[i] for i in answer] for answer in answers] == [["N", "o"], ["n", "o"]]


BOS_ONLY = {"bos_token": "<s>", "eos_token": "<s>"}


# --- A model --------------------------------------------------------------------------------


def test_choices_by_brute_force(parts, ours, write):
    """The grade and every likelihood from plain logits of each whole text."""
    model, params, tokenizer = parts
    logits_of = jax.jit(lambda tokens: model.apply({"params": params}, tokens[None])[0])
    result = evaluate_task(ours, write(COLOURS), num_shots=1)
    right = []
    for answer in result.answers:
        for choice, nats in answer.log_likelihoods.items():
            ids = [*tokenizer.text_prefix, *tokenizer.encode(answer.prompt + choice)]
            logits = logits_of(jnp.asarray(ids + [0] * (160 - len(ids))))
            log_probs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
            last = range(len(ids) - len(choice), len(ids))  # a token is a byte
            assert nats == pytest.approx(sum(log_probs[t - 1, ids[t]] for t in last), abs=1e-3)
        best = max(answer.log_likelihoods, key=answer.log_likelihoods.get)
        assert answer.chosen == best
        raw = COLOURS["examples"][answer.example - 1]["target_scores"]
        right.append(raw[best])
        mass = sum(math.exp(answer.log_likelihoods[c]) for c in raw if raw[c] == 1)
        assert answer.scores["answer_nats"] == pytest.approx(-math.log(mass))
    grade = result.scores["multiple_choice_grade"]
    assert (result.metric, result.num_examples) == ("multiple_choice_grade", 4)
    assert grade.value == np.mean(right)
    assert grade.random == pytest.approx((2 / 3 + 1.5 / 3 + 1 / 3 + 1 / 4) / 4)
    assert grade.standard_error == pytest.approx(np.std(right, ddof=1) / 2)
    assert result.normalised == pytest.approx((grade.value - grade.random) / (1 - grade.random))
    assert result.scores["answer_nats"].random is None


def test_answers_depend_on_no_neighbour(parts, ours, write):
    """Batches of 1 and 3: the same likelihoods and texts."""
    both = [{**example, "target": "?"} for example in COLOURS["examples"]]
    short = {"append_choices_to_input": False, "example_input_prefix": ""}
    metrics = ["multiple_choice_grade", "exact_str_match"]
    task = write(COLOURS, metrics=metrics, examples=both, **short)
    alone, beside = (evaluate_task(model, task) for model in (batched(parts, batch_size=1), ours))
    for mine, theirs in zip(alone.answers, beside.answers, strict=True):
        assert (mine.chosen, mine.response) == (theirs.chosen, theirs.response)
        assert mine.log_likelihoods == pytest.approx(theirs.log_likelihoods, abs=1e-4)


def test_written_answers_are_the_model_s_and_end_where_the_task_says(parts, ours, write):
    model, params, tokenizer = parts
    sampling = SamplingConfig(max_new_tokens=16, temperature=0.0)
    (said,) = Generator(model, tokenizer, sampling)(params, ["Add.\n1+1="])
    stop = next(char for char in said[1:] if char not in (said[0], "\ufffd"))
    wanted = said[: said.find(stop) + 1]
    examples = [{"input": "1+1", "target": ["no", wanted]}, {"input": "2+2", "target": "no"}]
    task = write(SUMS, examples=examples, stop_string=stop, output_regex=None)
    result = evaluate_task(ours, task)
    assert [answer.response == wanted for answer in result.answers] == [True, False]
    score = result.scores["exact_str_match"]
    assert (score.value, score.random, score.standard_error) == (0.5, 0.0, pytest.approx(0.5))
    assert result.normalised == 0.5


class Scripted(BatchedModel):
    """Writes one text, whatever it is asked, and remembers what that was."""

    said, asked = " Paris is it.\nQ: ", ()

    def generate_texts(self, prompts, sampling, ended):
        self.asked = [self.tokenizer.decode(ids, skip_control=True) for ids in prompts.values()]
        self.new_tokens = sampling.max_new_tokens
        assert ended(0, self.said) and not ended(0, " Paris is")
        for number in prompts:
            yield number, self.said


def test_a_prompt_s_last_spaces_are_for_the_model_to_write(parts, write):
    examples = [{"input": "Capital?", "target": "Paris is it"}, {"input": "?", "target": "é" * 9}]
    capital = {"name": "capital", "metrics": ["exact_str_match", "bleu"], "examples": examples}
    model = batched(parts, Scripted)
    task = write(capital, preferred_score="bleu")
    result = evaluate_task(model, task)
    assert model.asked == ["\nQ: Capital?\nA:", "\nQ: ?\nA:"]
    assert model.new_tokens == 32  # 18 bytes, 8 more, and up to a power of two
    assert result.answers[0].response == "Paris is it"
    assert (result.metric, result.scores["exact_str_match"].value) == ("exact_str_match", 0.5)
    assert task.unknown_metrics == ("bleu",)


def test_what_cannot_be_scored_says_why(parts, write):
    model = batched(parts, max_length=40)
    with pytest.raises(TaskError, match="colours is measured by bleu, rouge, which is not comp"):
        evaluate_task(model, write(COLOURS, metrics=["bleu", "rouge"], preferred_score="bleu"))
    with pytest.raises(TaskError, match="sums: 40 new tokens leave no room"):
        evaluate_task(model, write(SUMS), max_new_tokens=40)
    long = [{"input": "a", "target_scores": {"b" * 41: 1, "c": 0}}]
    with pytest.raises(TaskError, match="example 1 has an answer of 41 tokens, more than"):
        evaluate_task(model, write(COLOURS, examples=long))
    assert evaluate_task(model, write(COLOURS)).cut_contexts == 4


def test_subtasks_count_the_same(ours, write):
    large, small = (
        evaluate_task(ours, write(COLOURS, examples=COLOURS["examples"][:n])) for n in (4, 2)
    )
    both = combine_results("colours", [large, small])
    grades = [part.scores["multiple_choice_grade"] for part in (large, small)]
    grade = both.scores["multiple_choice_grade"]
    assert grade.value == pytest.approx(sum(g.value for g in grades) / 2)
    assert grade.random == pytest.approx(sum(g.random for g in grades) / 2)
    error = math.sqrt(sum(g.standard_error**2 for g in grades)) / 2
    assert grade.standard_error == pytest.approx(error)
    assert (both.num_examples, both.num_tasks) == (6, 2)


class Decided(BatchedModel):
    """Finds the first choice of every example, of two, the likelier one."""

    def score_tokens(self, requests):
        for i in range(len(requests)):
            yield i, (math.log(0.1 + 0.2 * (i % 2 == 0)), False)


def test_scores_of_all_examples_together_by_hand(parts, write):
    """Macro-F1 of three answers "a" where "a", "a", "b" is right: of 4/5 and 0."""
    scores = [{"a": 1, "b": 0}, {"a": 1, "b": 0}, {"a": 0, "b": 1}]
    examples = [{"input": str(i), "target_scores": score} for i, score in enumerate(scores)]
    task = write(COLOURS, metrics=["macro_f1"], preferred_score="macro_f1", examples=examples)
    result = evaluate_task(batched(parts, Decided), task)
    score = result.scores["macro_f1"]
    assert (score.value, score.random, score.standard_error) == (pytest.approx(0.4), None, None)
    assert result.metric == "macro_f1" and result.normalised is None
    two = [{"input": "0", "target": ["a", "b"]}]  # 0.3 and 0.1
    task = write(SUMS, metrics=["log_likelihood"], preferred_score="log_likelihood", examples=two)
    score = evaluate_task(batched(parts, Decided), task).scores["log_likelihood"]
    assert (score.value, score.random) == (pytest.approx(math.log(0.4)), None)


@pytest.mark.long
def test_smollm2_knows_some_capitals(write):
    try:
        smollm2_file()
    except PackageError as error:
        pytest.skip(f"the package cannot be fetched: {error}")
    towns = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo"}
    examples = [
        {
            "input": f"The capital of {country} is",
            "target_scores": {t: int(t == town) for t in towns.values()},
        }
        for country, town in towns.items()
    ]
    how = {"example_input_prefix": "", "example_output_prefix": " "}
    task = write(COLOURS, examples=examples, append_choices_to_input=False, **how)
    config, *rest, _ = load_model("smollm2")
    model = batched((Transformer(config, ComputeConfig()), *rest), batch_size=9)
    result = evaluate_task(model, task)
    assert result.scores["multiple_choice_grade"].value == 1.0
    assert result.scores["probability_mass"].value > 0.9
    assert result.scores["answer_nats"].value < 2.0
