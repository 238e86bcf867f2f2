"""What experiments.rlhf puts together, on a small random policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm.data.tokenizer_training import byte_tokenizer
from llm.models.adapters import adapt_params
from llm.models.config import AdapterConfig, ComputeConfig, TransformerConfig
from llm.models.scalar import ScalarModel
from llm.models.transformer import Transformer, init_params
from llm.parallel.config import MeshConfig
from llm.parallel.mesh import make_mesh
from llm.rl.collect import collect
from llm.rl.config import AlgorithmConfig, KLConfig, RolloutConfig
from llm.rl.learning import make_learn_step
from llm.rl.models import Models, own_part
from llm.rl.prompts import Prompt, PromptBatches
from llm.rl.rollout import make_rollout
from llm.rl.state import init_controllers, rl_shardings, with_controllers
from llm.training.config import OptimizerConfig, ScheduleConfig, TrainableConfig
from llm.training.loss import make_causal_lm_loss
from llm.training.optimizers import make_optimizer
from llm.training.schedules import make_schedule
from llm.training.state import init_state, state_shardings
from llm.training.trainable import make_rates, split

TOKENIZER = byte_tokenizer()
MODEL = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=24,
    max_length_tokens=32,
)
ROLLOUT = RolloutConfig(prompts=4, group=2, prompt_tokens=12, response_tokens=6, temperature=0.7)
# An epsilon beside which gradients are small: Adam's update is then linear in them, and does not
# blow the last bits of those near 0 up to its full step.
LINEAR = 10.0
PPO = AlgorithmConfig(name="ppo", missing_eos_penalty=0.1)


def prompt(text):
    messages = ({"role": "user", "content": text},)
    tokens = tuple(TOKENIZER.encode_chat(messages, add_generation_prompt=True))
    return Prompt(messages, tokens, {}, f"test:{text}")


PROMPTS = [prompt(text) for text in ("a", "bcd", "efgh", "ij", "klmno")]


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in response) + len(response) / 7 for response in responses]


class Trainer:
    """`optimizer` holds fields of its config; with `reference_seed` the policy is not where the
    reference is."""

    def __init__(
        self,
        algorithm=PPO,
        kl=None,
        adapter=None,
        mesh=None,
        rate=1e-2,
        epsilon=1e-8,
        optimizer=(),
        trainable=None,
        reference_seed=0,
        ptx=None,
        **learn_options,
    ):
        self.mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
        adapter = adapter or AdapterConfig()
        kl = kl or KLConfig(coefficient=0.1)
        policy = Transformer(MODEL, ComputeConfig(), adapter)
        has_value = algorithm.name == "ppo"
        value = ScalarModel(MODEL, ComputeConfig(), adapter) if has_value else None
        self.models = models = Models(policy, value)
        spec = models.spec()
        rates = make_rates(
            trainable or TrainableConfig(), MODEL, spec.shapes, adapted=models.shared
        )
        fields = dict(learning_rate=rate, epsilon=epsilon, weight_decay=0.0) | dict(optimizer)
        config = OptimizerConfig(**fields)
        optimizer = make_optimizer(config, split(spec.axes, rates)[0])
        self.shardings = rl_shardings(
            state_shardings(spec, optimizer, self.mesh, rates=rates), self.mesh
        )
        self.learn = make_learn_step(
            models,
            algorithm,
            kl,
            ROLLOUT,
            optimizer,
            config,
            make_schedule(ScheduleConfig("constant"), total_steps=9, tokens_per_step=1),
            self.shardings,
            self.mesh,
            rates=rates,
            ptx_loss=None if ptx is None else make_causal_lm_loss(policy, tile_tokens=64),
            **learn_options,
        )
        self.algorithm, self.ptx = algorithm, ptx
        self.sample = make_rollout(policy, ROLLOUT, TOKENIZER, self.mesh)
        self.batches = PromptBatches(PROMPTS, ROLLOUT.prompts, seed=0)
        base, other = (copy(policy_params(seed)) for seed in (0, reference_seed))
        self.frozen = {} if models.shared else {"reference": other}
        params = {"policy": adapt_params(policy, base, jax.random.key(1))}
        if has_value:
            start = adapt_params(value, copy(value_params()), jax.random.key(3))
            params["value"] = own_part(start) if models.shared else start
        with jax.set_mesh(self.mesh):
            train = init_state(spec, optimizer, self.mesh, 0, params=params, rates=rates)
            state = with_controllers(train, init_controllers(kl.coefficient))
            self.state = jax.device_put(state, self.shardings)
        self._start = host(self.state)

    def reset(self):
        """Be as new, without compiling anew."""
        self.batches.seek(0)
        with jax.set_mesh(self.mesh):
            self.state = jax.device_put(self._start, self.shardings)

    def collect(self, reward=vowels):
        with jax.set_mesh(self.mesh):
            return collect(
                self.sample, {"r": (reward, 1.0)}, self.batches, self.state, TOKENIZER, ROLLOUT,
                self.algorithm, self.mesh,
            )  # fmt: skip

    def step(self, reward=vowels):
        return self.learn_from(self.collect(reward))

    def learn_from(self, collected):
        with jax.set_mesh(self.mesh):
            cursor = jnp.uint32(self.batches.cursor)
            self.state, metrics = self.learn(
                self.state, self.frozen, collected.rollout, collected.scores, cursor, self.ptx
            )
        return {name: float(x) for name, x in metrics.items()}


@functools.cache
def policy_params(seed):
    return host(loud(init_params(Transformer(MODEL), jax.random.key(seed))))


@functools.cache
def value_params():
    return host(init_params(ScalarModel(MODEL), jax.random.key(2)))


def loud(params):
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)


def copy(params):
    return jax.tree.map(jnp.array, params)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def same(a, b):
    pairs = zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def at(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree
