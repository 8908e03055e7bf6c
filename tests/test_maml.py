"""The mathematics of mrl_maml.py: the meta-gradient against finite differences of exact objectives, found by enumeration,
and every step of the algorithm against its definition."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal
from torch.func import grad, vmap

import mrl_maml
from mrl_maml import Agent, Args, adapt, add_advantages, collect, compute_gae, linear_values, log_prob, meta_loss, rollout

RESULTS = Path(__file__).parent / "results"
DOUBLE = torch.float64
# The tests do not depend on the defaults.
SETTINGS = Args(adapt_steps=1, num_episodes=20, inner_lr=0.1, log_std=-1.7, log_std_shift=-0.4)


class Countdown(gym.Env):
    """Episodes of random length 2 to 5, cut at 4: both ends happen. The task is the reward of action 1."""

    def __init__(self):
        self.observation_space, self.action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(3)
        self.task = 1.0

    def sample_tasks(self, num_tasks, rng):
        return list(rng.normal(size=num_tasks))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.count = self.np_random.integers(2, 6), 0
        return np.array([self.left, 0], dtype=np.float32), {}

    def step(self, action):
        self.count += 1
        reward = self.task * (action == 1) + 0.1 * self.count
        return np.array([self.left, self.count], dtype=np.float32), reward, bool(self.count == self.left), False, {}


gym.register("MAMLCountdown-v0", entry_point=Countdown, max_episode_steps=4)


@pytest.fixture(autouse=True)
def double_precision():
    threads = torch.get_num_threads()
    torch.set_default_dtype(DOUBLE)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def make(env_id, num_tasks, seed=0, **flags):
    """Settings, environments, an agent whose policy is far from uniform, tasks."""
    args = replace(SETTINGS, env_id=env_id, hidden_size=8, **flags)
    envs = mrl_maml.make_envs(args, num_tasks * args.num_episodes)
    torch.manual_seed(seed)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args)
    for name, w in agent.weights.items():
        if name != "log_std":
            torch.nn.init.normal_(w, std=0.5)
    return args, envs, agent, mrl_maml.task_family(envs).sample_tasks(num_tasks, np.random.default_rng(seed))


def play(env_id, num_tasks, num_steps, seed=0, shard=(0, 1), **flags):
    """Batches of the tasks `shard[0] :: shard[1]` of `num_tasks`."""
    args, envs, agent, tasks = make(env_id, num_tasks, seed, **flags)
    envs = mrl_maml.make_envs(args, num_tasks // shard[1] * args.num_episodes)
    seeds = np.random.default_rng(seed).integers(2**31, size=(num_steps + 1, num_tasks * args.num_episodes))
    seeds = seeds[:, shard[0] :: shard[1]].tolist()
    generator = torch.Generator().manual_seed(seed)
    return args, agent, collect(agent, args, envs, tasks[shard[0] :: shard[1]], num_steps, seeds, generator, shard)


def last_alone(num_steps):
    """The meta-loss judges the policy after the last step only."""
    return (0.0,) * (num_steps - 1) + (1.0,)


def rates(agent, args, num_steps):
    return [agent.inner_lr_of(step, args.inner_lr_decay) for step in range(num_steps)]


# The meta-gradient, by enumeration. A problem is a finite set of trajectories: a softmax policy, all action sequences.


class Problem:
    """States (J, T), actions (J, T), rewards to come (J, T) of all trajectories, and the environment's part of their
    probabilities (J)."""

    def __init__(self, name):
        rng = np.random.default_rng(3)
        if name == "bandit":  # 3 arms
            self.states, self.actions = np.zeros((3, 1), dtype=int), np.arange(3)[:, None]
            rewards, self.env_probs = np.array([[1.0], [0.2], [-0.7]]), np.ones(3)
        else:  # 2 states, 2 actions, 2 steps
            transition, reward = rng.dirichlet(np.ones(2), (2, 2)), rng.normal(size=(2, 2))
            rows = np.array(list(itertools.product([0, 1], repeat=3)))  # action, next state, action
            self.states = np.stack([np.zeros(8, dtype=int), rows[:, 1]], 1)
            self.actions = rows[:, [0, 2]]
            rewards, self.env_probs = reward[self.states, self.actions], transition[0, rows[:, 0], rows[:, 1]]
        to_go = rewards[:, ::-1].cumsum(1)[:, ::-1].copy()
        self.num_states, self.num_actions = self.states.max() + 1, self.actions.max() + 1
        self.obs = torch.as_tensor(np.eye(self.num_states)[self.states])  # (J, T, D)
        self.actions, self.to_go = torch.as_tensor(self.actions), torch.as_tensor(to_go)
        self.env_probs = torch.as_tensor(self.env_probs)
        self.baseline = self.to_go.mean(0)  # any function of the state is allowed; here one of time

    def weights(self, seed=0):
        space = gym.spaces.Discrete(int(self.num_actions))
        torch.manual_seed(seed)
        agent = Agent(int(self.num_states), space, replace(SETTINGS, hidden_size=2))
        return {name: torch.randn_like(w) * 0.7 for name, w in agent.weights.items()}

    def logprobs(self, weights):
        return log_prob(*mrl_maml.policy(weights, self.obs), self.actions)  # (J, T)

    def probs(self, weights):
        return self.logprobs(weights).sum(1).exp() * self.env_probs  # (J,)

    def objective(self, weights):
        return (self.probs(weights) * self.to_go[:, 0]).sum()

    def batch(self, weights, trajectories=slice(None), expectation=True):
        """The data that the weights draw: all trajectories with their probabilities, or those picked, once each."""
        logprobs = self.logprobs(weights).detach()[trajectories]
        advantages = (self.to_go - self.baseline)[trajectories] * logprobs.shape[1]  # losses are means over steps
        if expectation:
            advantages = advantages * self.probs(weights).detach()[:, None] * len(logprobs)
        obs, actions = self.obs[trajectories], self.actions[trajectories]
        data = {"obs": obs, "actions": actions, "logprobs": logprobs, "advantages": advantages}
        return data | {"masks": torch.ones_like(logprobs)}


STEP_SIZE = 0.8


def expected_meta_gradient(problem, weights, num_steps, args):
    """Of infinitely many episodes a step: the step follows the exact policy gradient. Also the objective after the steps."""
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    inner_lr = [{name: torch.tensor(STEP_SIZE) for name in weights}] * num_steps
    batches, current = [], weights
    for step_lr in inner_lr:
        batches.append(problem.batch(current))
        current = adapt(current, step_lr, batches[-1], args)
    batches.append(problem.batch(current))
    loss = meta_loss(weights, inner_lr, batches, replace(args, step_weights=last_alone(num_steps)))[0]
    grads = torch.autograd.grad(-loss, list(weights.values()))
    return dict(zip(weights, grads, strict=True)), problem.objective(current).item()


def expected_objective(problem, weights, num_steps):
    """J(theta_K) with theta_(k+1) = theta_k + a grad J(theta_k), without any of the script's losses."""
    for _ in range(num_steps):
        grads = grad(problem.objective)(weights)
        weights = {name: w + STEP_SIZE * grads[name] for name, w in weights.items()}
    return problem.objective(weights)


def sampled_meta_gradient(problem, weights, step_weights, args):
    """Of one episode a step: the mean over all data sets, with their probabilities."""
    num_steps = len(step_weights)
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    inner_lr = [{name: torch.tensor(STEP_SIZE) for name in weights}] * num_steps
    total = 0.0
    for picks in itertools.product(range(len(problem.obs)), repeat=num_steps):
        batches, current, prob = [], weights, 1.0
        for step_lr, pick in zip(inner_lr, picks, strict=True):
            prob = prob * problem.probs(current)[pick].item()
            credit = {"credit": problem.objective(current).detach()}
            batches.append(problem.batch(current, slice(pick, pick + 1), expectation=False) | credit)
            current = adapt(current, step_lr, batches[-1], args)
        batches.append(problem.batch(current) | {"credit": problem.objective(current).detach()})
        total = total - prob * meta_loss(weights, inner_lr, batches, replace(args, step_weights=step_weights))[0]
    grads = torch.autograd.grad(total, list(weights.values()))
    return dict(zip(weights, grads, strict=True))


def sampled_objective(problem, weights, shares):
    """E[sum_k share_k J(theta_k)] over data sets of one episode a step, theta_(k+1) = theta_k + a sum_t grad log pi (G_t -
    b_t)."""
    if not shares:
        return torch.zeros(())

    def surrogate(weights, pick):
        return (pick[:, None] * problem.logprobs(weights) * (problem.to_go - problem.baseline)).sum()

    def after(pick):
        grads = grad(surrogate)(weights, pick)
        adapted = {name: w + STEP_SIZE * grads[name] for name, w in weights.items()}
        return shares[0] * problem.objective(adapted) + sampled_objective(problem, adapted, shares[1:])

    return (problem.probs(weights) * vmap(after)(torch.eye(len(problem.obs)))).sum()


def finite_differences(objective, weights, h=1e-5):
    """Central ones, in each weight."""
    sizes = [w.numel() for w in weights.values()]

    def shifted(shift):
        parts = zip(weights.items(), shift.split(sizes), strict=True)
        return objective({name: w + part.view_as(w) for (name, w), part in parts})

    shifts = h * torch.eye(sum(sizes))
    grads = (vmap(shifted)(shifts) - vmap(shifted)(-shifts)) / (2 * h)
    return {name: part.view_as(w) for (name, w), part in zip(weights.items(), grads.split(sizes), strict=True)}


def flat(grads):
    return torch.cat([g.flatten() for g in grads.values()])


def relative_error(grads, exact):
    return ((flat(grads) - flat(exact)).norm() / flat(exact).norm()).item()


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("name", ["bandit", "mdp"])
def test_meta_gradient_of_the_expected_update(name, num_steps):
    """Traps 1 and 3. MAML's objective, whose inner step follows the exact policy gradient: `dice` has all of its gradient,
    `ratio` all of it where an episode has one action, and what the others leave out is more than an error of rounding."""
    problem, errors = Problem(name), {}
    weights = problem.weights()
    exact = finite_differences(partial(expected_objective, problem, num_steps=num_steps), weights)
    for inner_loss, first_order in (("dice", False), ("ratio", False), ("log-prob", False), ("ratio", True)):
        args = replace(SETTINGS, inner_loss=inner_loss, first_order=first_order)
        grads, after = expected_meta_gradient(problem, weights, num_steps, args)
        assert after == pytest.approx(expected_objective(problem, weights, num_steps).item(), abs=1e-12)
        errors["--first-order" if first_order else inner_loss] = relative_error(grads, exact)
        if inner_loss == "dice":
            torch.testing.assert_close(flat(grads), flat(exact), atol=1e-6, rtol=0)
    print(f"\n{name}, K={num_steps}: share of the meta-gradient left out:", {k: f"{e:.1e}" for k, e in errors.items()})
    assert errors["dice"] < 1e-6
    assert errors["ratio"] < 1e-6 if name == "bandit" else errors["ratio"] > 1e-3
    assert errors["log-prob"] > 0.03 and errors["--first-order"] > 0.03


@pytest.mark.parametrize("step_weights", [(1.0,), (0.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("name", ["bandit", "mdp"])
def test_meta_gradient_of_the_sampled_update(name, step_weights):
    """Trap 2. E-MAML's objective, the mean over the data sets that the start draws: with `--exploration-credit` each inner
    loss has all of its gradient. Without it, `log-prob` leaves out how the start changes the data."""
    problem = Problem(name)
    weights = problem.weights(seed=1)
    shares = tuple(w / sum(step_weights) for w in step_weights)
    exact = finite_differences(partial(sampled_objective, problem, shares=shares), weights)
    for inner_loss in ("dice", "ratio", "log-prob"):
        args = replace(SETTINGS, inner_loss=inner_loss, exploration_credit=True)
        grads = sampled_meta_gradient(problem, weights, step_weights, args)
        torch.testing.assert_close(flat(grads), flat(exact), atol=1e-6, rtol=0)
    errors = {}
    for inner_loss in ("dice", "ratio", "log-prob"):
        without = sampled_meta_gradient(problem, weights, step_weights, replace(SETTINGS, inner_loss=inner_loss))
        errors[inner_loss] = relative_error(without, exact)
    print(f"\n{name}, {step_weights=}, one episode a step, without credit:", {k: f"{e:.1e}" for k, e in errors.items()})
    assert min(errors.values()) > 0.03


def test_exploration_credit_is_clipped():
    """An action that has become more probable by more than the clipping allows gets no further credit, only blame."""
    problem = Problem("bandit")
    weights = {name: w.requires_grad_() for name, w in problem.weights().items()}
    inner_lr = [{name: torch.tensor(STEP_SIZE) for name in weights}]
    args = replace(SETTINGS, exploration_credit=True)
    first = problem.batch(weights)
    first["logprobs"] = first["logprobs"] - 0.5
    second = problem.batch(adapt(weights, inner_lr[0], first, args))

    def gradient(credit):
        loss = meta_loss(weights, inner_lr, [first, second | {"credit": torch.tensor(credit)}], args)[0]
        return flat(dict(enumerate(torch.autograd.grad(loss, list(weights.values())))))

    torch.testing.assert_close(gradient(1.0), gradient(0.0), atol=1e-12, rtol=0)
    assert (gradient(-1.0) - gradient(0.0)).norm() > 0.1


def test_log_prob_is_first_order_for_centred_advantages():
    """Trap 1 in its purest form: softmax over 3 logits, advantages with mean zero; the second-order term vanishes."""
    problem = Problem("bandit")
    weights = problem.weights()
    problem.baseline = problem.objective(weights)[None].detach()
    inner_lr = [{name: torch.tensor(STEP_SIZE * (name == "actor_b2")) for name in weights}]
    grads = {}
    for inner_loss, first_order in (("log-prob", False), ("log-prob", True), ("ratio", False)):
        args = replace(SETTINGS, inner_loss=inner_loss, first_order=first_order)
        logits = weights["actor_b2"].detach().requires_grad_()
        start = weights | {"actor_b2": logits}
        first = problem.batch(start)
        batches = [first, problem.batch(adapt(start, inner_lr[0], first, args))]
        [grads[inner_loss, first_order]] = torch.autograd.grad(meta_loss(start, inner_lr, batches, args)[0], logits)
    torch.testing.assert_close(grads["log-prob", False], grads["log-prob", True], atol=1e-12, rtol=0)
    assert (grads["ratio", False] - grads["log-prob", True]).norm() > 0.05 * grads["ratio", False].norm()


# All tasks at once


@pytest.mark.parametrize("inner_loss", ["ratio", "log-prob", "dice"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("env_id", ["PointNav-v0", "MAMLCountdown-v0"])
def test_tasks_at_once_equal_a_loop_over_tasks(env_id, num_steps, inner_loss):
    """Adapted weights and meta-gradient under vmap are those of a plain loop, for K = 1, 2, 3 (trap 3), with torch.autograd
    alone and the inner loss written out."""
    flags = {"adapt_steps": num_steps, "inner_loss": inner_loss, "inner_lr": 0.3, "num_episodes": 2}
    flags["step_weights"] = last_alone(num_steps)
    args, agent, batches = play(env_id, 3, num_steps, **flags)

    def plain_step(weights, step_lr, batch):
        logprobs = log_prob(*mrl_maml.policy(weights, batch["obs"]), batch["actions"])
        losses = []
        for e, length in enumerate(batch["masks"].sum(-1).int().tolist()):
            earlier = 1.0
            for t in range(length):
                ratio = (logprobs[e, t] - logprobs[e, t].detach()).exp()
                term = {"ratio": ratio, "log-prob": logprobs[e, t], "dice": earlier * (ratio - 1)}[inner_loss]
                earlier = earlier * ratio
                losses.append(-term * batch["advantages"][e, t])
        grads = torch.autograd.grad(sum(losses) / len(losses), list(weights.values()), create_graph=True)
        adapted = {name: w - step_lr[name] * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        return adapted | ({"log_std": adapted["log_std"] + step_lr["log_std_shift"]} if "log_std" in weights else {})

    start, total = dict(agent.weights), 0.0
    for m in range(3):
        weights, own = start, [{name: x[m] for name, x in batch.items()} for batch in batches]
        for step_lr, batch in zip(rates(agent, args, num_steps), own, strict=False):
            weights = plain_step(weights, step_lr, batch)
        last = own[-1]
        logprobs = log_prob(*mrl_maml.policy(weights, last["obs"]), last["actions"])
        assert ((logprobs - last["logprobs"]) * last["masks"]).abs().max() < 1e-6  # the weights that played the last episodes
        total = total - ((logprobs - logprobs.detach()).exp() * last["advantages"] * last["masks"]).sum() / last["masks"].sum()
    parameters = list(agent.parameters())
    expected = torch.autograd.grad(total, parameters)
    losses = vmap(partial(meta_loss, args=args), in_dims=(None, None, 0))(start, rates(agent, args, num_steps), batches)
    assert losses[3].abs().max() < 1e-10 and losses[4].max() == 0  # approx_kl, clipfrac: the ratio is 1 before the first step
    for ours, plain in zip(torch.autograd.grad(losses[0].sum(), parameters), expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_inner_learning_rates_of_each_step():
    """One for each weight and step of the training; those behind its last fall from the last."""
    agent = Agent(2, gym.spaces.Discrete(3), replace(SETTINGS, adapt_steps=2, inner_lr=0.5, inner_lr_decay=0.2))
    for step, expected in enumerate((0.5, 0.1, 0.02, 0.004)):
        for name, lr in agent.inner_lr_of(step, 0.2).items():
            torch.testing.assert_close(lr, torch.full_like(agent.weights[name], expected))
    agent = Agent(2, gym.spaces.Box(-1, 1, (3,)), replace(SETTINGS, adapt_steps=2, log_std_shift=-0.4))
    agent.log_std_shift.data[1] = -0.5
    for step, expected in enumerate((-0.4, -0.5, -0.1)):  # the second one as set here
        torch.testing.assert_close(agent.inner_lr_of(step, 0.2)["log_std_shift"], torch.full((1, 3), expected))
    args = SETTINGS
    for learned in (True, False):
        agent = Agent(2, gym.spaces.Discrete(3), replace(args, learn_inner_lr=learned))
        assert all(lr.requires_grad == learned for lr in agent.inner_lr.values())


@pytest.mark.parametrize("env_id", ["PointNav-v0", "MAMLCountdown-v0"])
def test_batches_do_not_depend_on_the_split_over_processes(env_id):
    whole = play(env_id, 4, 2, num_episodes=3)[2]
    for rank in range(2):
        for batch, share in zip(whole, play(env_id, 4, 2, num_episodes=3, shard=(rank, 2))[2], strict=True):
            for name in ("obs", "actions", "rewards", "masks", "advantages"):
                steps = share[name].shape[2]
                assert not batch["masks"][rank::2, :, steps:].any()
                torch.testing.assert_close(share[name], batch[name][rank::2, :, :steps], atol=1e-10, rtol=1e-10)


def test_step_weights_judge_each_adapted_policy():
    args, agent, batches = play("MAMLCountdown-v0", 3, 2, adapt_steps=2, num_episodes=4)

    def entropy(num_steps, **flags):
        per_task = vmap(partial(meta_loss, args=replace(args, **flags)), in_dims=(None, None, 0))
        return per_task(dict(agent.weights), rates(agent, args, num_steps), batches[: num_steps + 1])[2]

    first, last = entropy(1), entropy(2, step_weights=(0.0, 1.0))
    torch.testing.assert_close(entropy(2), (first + last) / 2)
    torch.testing.assert_close(entropy(2, step_weights=(3.0, 1.0)), (3 * first + last) / 4)
    assert ((first - last).abs() > 1e-6).all()


# Episodes that end early


def test_rollout_against_the_environment_by_hand():
    args, agent, [batch] = play("MAMLCountdown-v0", 5, 0, num_episodes=6)
    tasks = make("MAMLCountdown-v0", 5)[3]
    both_ends = set()
    for m, e in itertools.product(range(5), range(6)):
        start, length = int(batch["obs"][m, e, 0, 0]), int(batch["masks"][m, e].sum())
        assert length == min(start, 4) and batch["masks"][m, e, :length].all()
        assert bool(batch["truncated"][m, e]) == (start > 4)
        both_ends.add(start > 4)
        assert batch["obs"][m, e, :length, 1].tolist() == list(range(length)) and batch["last_obs"][m, e, 1] == length
        by_hand = [tasks[m] * float(batch["actions"][m, e, t] == 1) + 0.1 * (t + 1) for t in range(length)]
        np.testing.assert_allclose(batch["rewards"][m, e], by_hand + [0.0] * (batch["rewards"].shape[2] - length), atol=1e-6)
    assert both_ends == {True, False}


@pytest.mark.parametrize("value_function", ["linear", "network"])
@pytest.mark.parametrize("inner_loss", ["ratio", "log-prob", "dice"])
def test_padding_behind_an_episode_is_of_no_account(inner_loss, value_function):
    flags = {"inner_loss": inner_loss, "value_function": value_function, "num_episodes": 4}
    args, agent, batches = play("MAMLCountdown-v0", 3, 1, **flags)

    def gradient(batches):
        for batch in batches:
            weights = {name: w.detach().expand(3, *w.shape) for name, w in agent.weights.items()}
            add_advantages(batch, weights, {name: lr.detach() for name, lr in rates(agent, args, 1)[0].items()}, args)
        per_task = vmap(partial(meta_loss, args=args), in_dims=(None, None, 0))
        policy_loss, value_loss, *_ = per_task(dict(agent.weights), rates(agent, args, 1), batches)
        return torch.autograd.grad((policy_loss + value_loss).sum(), list(agent.weights.parameters()))

    changed = []
    for batch in batches:
        padding = batch["masks"] == 0
        assert padding.any()
        noise = torch.randn(padding.shape)
        changed.append(
            batch
            | {
                "obs": torch.where(padding[..., None], noise[..., None], batch["obs"]),
                "actions": torch.where(padding, 2 - batch["actions"], batch["actions"]),
                "rewards": torch.where(padding, noise, batch["rewards"]),
                "logprobs": torch.where(padding, noise, batch["logprobs"]),
            }
        )
    for a, b in zip(gradient(batches), gradient(changed), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_equals_its_definition(gae_lambda):
    """Trap 10: behind the last step of an episode comes its last value, zero or bootstrapped, not the value of a next row."""
    rng, gamma = np.random.default_rng(0), 0.9
    lengths, last_values = np.array([[6, 3, 1], [5, 6, 2]]), np.array([[0.0, 2.0, 0.0], [-1.0, 0.0, 3.0]])
    rewards, values = rng.normal(size=(2, 2, 3, 6))
    masks = (np.arange(6) < lengths[..., None]).astype(float)
    expected = np.zeros((2, 3, 6))
    for m, e in np.ndindex(2, 3):
        n = lengths[m, e]
        following = np.append(values[m, e, 1:n], last_values[m, e])
        delta = rewards[m, e, :n] + gamma * following - values[m, e, :n]
        for t in range(n):
            expected[m, e, t] = sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, n))
    tensors = (torch.as_tensor(x) for x in (rewards, values, last_values, masks))
    np.testing.assert_allclose(compute_gae(*tensors, gamma, gae_lambda).numpy(), expected, atol=1e-12)


# The learner's value function


def test_linear_values_are_the_least_squares_fit():
    rng = np.random.default_rng(0)
    obs, returns = torch.as_tensor(rng.normal(size=(2, 5, 7, 3))), torch.as_tensor(rng.normal(size=(2, 5, 7)))
    masks = torch.as_tensor((np.arange(7) < rng.integers(3, 8, size=(2, 5, 1))).astype(float))
    values = linear_values(obs, returns, masks, ridge=0.0)
    for m in range(2):
        real = masks[m].bool()
        t = torch.arange(7).expand(5, 7)[real][:, None] / 100
        x = torch.cat([obs[m][real], obs[m][real] ** 2, t, t**2, t**3, torch.ones_like(t)], dim=1).numpy()
        fit = x @ np.linalg.lstsq(x, returns[m][real].numpy(), rcond=None)[0]
        np.testing.assert_allclose(values[m][real].numpy(), fit, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_linear_values_of_observations_that_never_change(dtype):
    """Trap 17: constant observations (bandits), all-zero ones, zero-padded ones, and episodes of one step."""
    torch.set_default_dtype(dtype)
    returns = torch.randn(3, 10, 1)
    for obs in (torch.ones(3, 10, 1, 2), torch.zeros(3, 10, 1, 2)):
        values = linear_values(obs, returns, torch.ones(3, 10, 1))
        expected = returns.mean(1, keepdim=True).expand_as(returns)
        torch.testing.assert_close(values, expected, atol=1e-3, rtol=1e-3)
    padded, masks = torch.zeros(3, 4, 6, 5), torch.zeros(3, 4, 6)
    padded[:, :, :2, :2], masks[:, :, :2] = torch.randn(3, 4, 2, 2), 1.0
    assert torch.isfinite(linear_values(padded, torch.randn(3, 4, 6), masks)).all()


def test_linear_values_explain_returns_on_heldout_tasks():
    """Trap 9, before any training; and the explained variance and the advantages are those of their definitions."""
    args, _, [batch] = play("PointNav-v0", 6, 0, gae_lambda=1.0)
    assert (batch["explained_variance"] > 0.5).all()
    returns = batch["rewards"].clone()
    for t in reversed(range(99)):
        returns[..., t] += args.gamma * returns[..., t + 1]
    torch.testing.assert_close(batch["returns"], returns, atol=1e-8, rtol=1e-8)  # a time limit leaves nothing to bootstrap
    residual = returns - linear_values(batch["obs"], returns, batch["masks"])
    explained = 1 - residual.var((1, 2), correction=0) / returns.var((1, 2), correction=0)
    torch.testing.assert_close(batch["explained_variance"], explained, atol=1e-6, rtol=1e-6)
    advantages = (residual - residual.mean((1, 2), keepdim=True)) / residual.std((1, 2), correction=0, keepdim=True)
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-6, rtol=1e-6)


def test_network_values_explain_returns_on_heldout_tasks():
    """Trap 9: the critic's start is learned, so that one inner step fits it to a task that it has not seen; and a time limit
    is bootstrapped with its value."""
    flags = {"value_function": "network", "num_episodes": 4, "gamma": 0.95}
    args, agent, batches = play("PointNav-v0", 16, 1, **flags)
    critic = [w for name, w in agent.weights.items() if name.startswith("critic")]
    optimizer = torch.optim.Adam([*critic, *agent.inner_lr.parameters()], lr=0.02)
    for _ in range(60):
        per_task = vmap(partial(meta_loss, args=args), in_dims=(None, None, 0))
        optimizer.zero_grad()
        per_task(dict(agent.weights), rates(agent, args, 1), batches)[1].mean().backward()
        optimizer.step()
    envs, tasks = make("PointNav-v0", 8, seed=5, **flags)[1::2]
    [batch] = collect(agent, args, envs, tasks, 0, [list(range(32))], torch.Generator().manual_seed(5))
    assert (batch["explained_variance"] > 0).all()
    start = {name: w.detach().expand(8, *w.shape) for name, w in agent.weights.items()}
    adapted = vmap(adapt, in_dims=(0, None, 0, None))(start, agent.inner_lr_of(0, 1), batch, args)
    values = mrl_maml.mlp(adapted, "critic", batch["obs"].flatten(1, 2)).view_as(batch["masks"]) / (1 - args.gamma)
    explained = 1 - (batch["returns"] - values).var((1, 2)) / batch["returns"].var((1, 2))  # the critic after `adapt`'s step
    torch.testing.assert_close(batch["explained_variance"], explained, atol=1e-4, rtol=1e-4)
    for lr in agent.inner_lr.values():
        lr.data.zero_()
    [unadapted] = collect(agent, args, envs, tasks, 0, [list(range(32))], torch.Generator().manual_seed(5))
    assert ((unadapted["explained_variance"] - batch["explained_variance"]).abs() > 1e-3).all()
    last_values = mrl_maml.mlp(agent.weights, "critic", batch["last_obs"].flatten(0, 1)).view(8, 4) / (1 - args.gamma)
    torch.testing.assert_close(batch["returns"][..., -1], batch["rewards"][..., -1] + args.gamma * last_values)


# The policy


def test_log_probability_is_summed_over_action_dimensions():
    """Trap 4, of the unclipped sample."""
    args, agent, [batch] = play("PointNav-v0", 2, 0, num_episodes=3, log_std=-0.3)
    weights = {name: w.detach() for name, w in agent.weights.items()}
    hidden = torch.tanh(
        torch.tanh(batch["obs"] @ weights["actor_w0"] + weights["actor_b0"]) @ weights["actor_w1"] + weights["actor_b1"]
    )
    mean = hidden @ weights["actor_w2"] + weights["actor_b2"]
    by_hand = -0.5 * ((batch["actions"] - mean) / np.exp(-0.3)) ** 2 + 0.3 - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(batch["logprobs"], by_hand.sum(-1))
    assert batch["actions"].abs().max() > 0.1  # the sample; the environment moved by what was clipped
    moved = batch["obs"][:, :, 1:] - batch["obs"][:, :, :-1]
    torch.testing.assert_close(moved, batch["actions"][:, :, :-1].clamp(-0.1, 0.1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("log_std", [None, torch.tensor([[-0.5, 0.2, -2.0]], dtype=DOUBLE)])
def test_policy_against_torch_distributions(log_std):
    """Log-probability, entropy, and what is drawn: for all processes together what one process draws."""
    params = torch.randn(6, 1, 3).expand(6, 50000, 3)  # (M, E, A)
    expected = (
        Categorical(logits=params) if log_std is None else Independent(Normal(params, log_std.exp().expand_as(params)), 1)
    )
    actions = mrl_maml.draw_actions(params, log_std, torch.Generator().manual_seed(0), (0, 1))
    torch.testing.assert_close(log_prob(params, log_std, actions), expected.log_prob(actions))
    entropy = mrl_maml.policy_entropy(params, log_std).expand(6, 50000)
    torch.testing.assert_close(entropy, expected.entropy())
    surprise = -expected.log_prob(actions)
    assert ((surprise.mean(1) - entropy[:, 0]).abs() < 5 * surprise.std(1) / 50000**0.5).all()
    if log_std is None:
        frequencies = torch.nn.functional.one_hot(actions, 3).to(DOUBLE).mean(1)
        torch.testing.assert_close(frequencies, expected.probs[:, 0], atol=0.01, rtol=0)
    else:
        z = (actions - params) / log_std.exp()
        torch.testing.assert_close(z.flatten(0, 1).T.cov(), torch.eye(3), atol=0.02, rtol=0)
    for rank in range(2):
        share = mrl_maml.draw_actions(params[rank::2], log_std, torch.Generator().manual_seed(0), (rank, 2))
        torch.testing.assert_close(share, actions[rank::2])


@pytest.mark.parametrize("rate", [1e6, -1e6])
def test_a_huge_inner_step_leaves_a_policy_that_acts(rate):
    """Trap 18: log-std thrown far out by an inner step is clamped; the next batch and its gradient are finite."""
    args, envs, agent, tasks = make("PointNav-v0", 3, num_episodes=4)
    agent.inner_lr["log_std"].data.fill_(rate)
    batches = collect(agent, args, envs, tasks, 1, [list(range(12))] * 2, torch.Generator().manual_seed(0))
    weights = dict(agent.weights)
    adapted = vmap(partial(adapt, args=args), in_dims=(None, None, 0))(weights, rates(agent, args, 1)[0], batches[0])
    assert (adapted["log_std"].abs() > 100).all()
    assert all(torch.isfinite(x).all() for x in batches[1].values() if x.is_floating_point())
    losses = vmap(partial(meta_loss, args=args), in_dims=(None, None, 0))(weights, rates(agent, args, 1), batches)
    grads = torch.autograd.grad(losses[0].sum(), list(agent.weights.parameters()))
    assert all(torch.isfinite(g).all() for g in grads)


# PointNav


def test_point_nav_is_as_defined():
    """Trap 15: the goal reaches the agent through rewards alone, so the observation is the same in each task."""
    envs = gym.make_vec("PointNav-v0", 5000)
    goals = np.array(envs.sample_tasks(5000, np.random.default_rng(0)))
    assert goals.min() >= -0.5 and goals.max() <= 0.5 and abs(goals.mean()) < 4 * np.sqrt(1 / 12 / goals.size)
    assert abs(goals.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / goals.size)
    envs.set_attr("task", list(goals))
    obs, _ = envs.reset(seed=list(range(5000)))
    assert (obs == 0).all() and obs.dtype == np.float32
    rng, position, total = np.random.default_rng(1), np.zeros(2), np.zeros(5000)
    for t in range(100):
        action = rng.normal(scale=0.1, size=2)
        kept, copy = obs, obs.copy()
        obs, rewards, terminated, truncated, _ = envs.step(np.tile(action, (5000, 1)))
        position = position + action.clip(-0.1, 0.1)
        np.testing.assert_allclose(obs, np.tile(position, (5000, 1)), atol=1e-5)
        np.testing.assert_allclose(rewards, -np.hypot(*(position - goals).T), atol=1e-9)
        assert not terminated.any() and truncated.all() == truncated.any() == (t == 99)
        assert (kept == copy).all()
    envs.reset()
    for _ in range(100):
        total += envs.step(np.zeros((5000, 2)))[1]
    standing_still = -100 * (np.sqrt(2) + np.arcsinh(1)) / 6  # mean distance of U[-0.5, 0.5]^2 from its centre
    assert abs(standing_still + 38.26) < 0.01
    assert abs(total.mean() - standing_still) < 4 * total.std() / np.sqrt(5000)


def test_no_policy_without_adaptation_beats_the_best_fixed_one():
    """Trap 15: whatever a policy reads of PointNav's observation, its mean over tasks is at most that of standing still at the
    centre, up to the error of the mean (the goals' distribution is symmetric about it)."""
    args, envs, agent, _ = make("PointNav-v0", 500, num_episodes=1)
    goals = np.array(envs.sample_tasks(125, np.random.default_rng(0)))
    mirrored = np.concatenate([goals, -goals, goals * [1, -1], goals * [-1, 1]])
    still = -100 * np.hypot(*mirrored.T).mean()
    for seed in range(5):
        torch.manual_seed(seed)
        weights = {name: torch.randn_like(w).mul(0.3).expand(500, *w.shape) for name, w in agent.weights.items()}
        weights["log_std"] = torch.full((500, 1, 2), -5.0)
        batch = rollout(envs, weights, list(mirrored), 1, list(range(500)), torch.Generator().manual_seed(seed))
        assert batch["rewards"].sum(-1).mean() < still + 0.5


# The MuJoCo families


def mujoco_episode(env_id, tasks, num_steps, seed=3):
    """Random actions for each task's robot and gymnasium's own: actions, velocities, observations of these, and the step."""
    envs = gym.make_vec(env_id, len(tasks))
    envs.set_attr("task", list(tasks))
    robots = [gym.make("Ant-v5" if "Ant" in env_id else "HalfCheetah-v5").unwrapped for _ in tasks]
    obs, space = envs.reset(seed=[seed + i for i in range(len(tasks))])[0], envs.single_action_space
    own = [robot.reset(seed=seed + i)[0] for i, robot in enumerate(robots)]
    np.testing.assert_allclose(obs, np.stack(own)[:, : obs.shape[1]], rtol=1e-6)
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        actions = rng.uniform(space.low, space.high, (len(tasks), *space.shape)).astype(np.float32)
        before = [robot.data.qpos[0] for robot in robots]
        own = [robot.step(action)[0] for robot, action in zip(robots, actions, strict=True)]
        x_velocity = np.array([robot.data.qpos[0] - x for robot, x in zip(robots, before, strict=True)]) / robots[0].dt
        yield actions, x_velocity, np.stack(own), robots, envs.step(actions)


@pytest.mark.parametrize("env_id, low", [("HalfCheetahDir-v0", -1), ("HalfCheetahVel-v0", 0), ("AntDir-v0", -1)])
def test_mujoco_family_is_gymnasiums_robot_with_the_reward_of_a_task(env_id, low):
    """Same start, same motion as gymnasium's v5 from the same seed; the reward is that of the definition."""
    tasks = gym.make_vec(env_id, 1).sample_tasks(1000, np.random.default_rng(0))
    assert set(tasks) == {-1, 1} if low else 0 <= min(tasks) < 0.01 and 1.99 < max(tasks) <= 2
    assert abs(np.mean(tasks) - (not low)) < 0.13  # four standard errors
    tasks = np.array(tasks[:4])
    for actions, x_velocity, own, robots, step in mujoco_episode(env_id, tasks, 15):
        next_obs, rewards, terminated, truncated, _ = step
        np.testing.assert_allclose(next_obs, own[:, : next_obs.shape[1]], rtol=1e-4, atol=1e-5)
        assert next_obs.dtype == np.float32 and not truncated.any()
        forward = -abs(x_velocity - tasks) if "Vel" in env_id else tasks * x_velocity
        expected = forward - (0.5 if "Ant" in env_id else 0.1) * (actions**2).sum(-1)
        if "Ant" in env_id:
            assert (terminated == [not robot.is_healthy for robot in robots]).all()
            expected += ~terminated
        np.testing.assert_allclose(rewards, expected, atol=1e-5)


def test_ant_terminates_when_unhealthy():
    ends = [terminated for *_, (_, _, terminated, _, _) in mujoco_episode("AntDir-v0", [1.0] * 6, 80)]
    assert not ends[0].any() and np.any(ends)


def test_half_cheetah_takes_its_task_at_the_next_reset_and_ends_after_200_steps():
    envs = gym.make_vec("HalfCheetahDir-v0", 2)
    envs.set_attr("task", [1.0, -1.0])
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 1, 6)).repeat(2, 1)

    def episode():
        envs.reset(seed=[5, 5])
        steps = [envs.step(action)[:4] for action in actions]
        obs, rewards, terminated, truncated = (np.stack(column) for column in zip(*steps, strict=True))
        assert not terminated.any() and not truncated[:-1].any() and truncated[-1].all()
        return obs, rewards + 0.1 * (actions**2).sum(-1)

    obs, velocity = episode()
    assert (obs[:, 0] == obs[:, 1]).all()  # one seed, one motion
    np.testing.assert_allclose(velocity[:, 0], -velocity[:, 1])
    envs.reset(seed=[5, 5])
    envs.step(actions[0])
    envs.set_attr("task", [-1.0, -1.0])
    np.testing.assert_array_equal(envs.step(actions[1])[1] + 0.1 * (actions[1] ** 2).sum(-1), velocity[1])
    again, other = episode()
    assert (again == obs).all() and (other[:, 0] == velocity[:, 1]).all()


def test_mujoco_does_not_depend_on_threads_or_neighbours(monkeypatch):
    def episode(num_envs, num_processes):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_processes))  # so that each takes fewer threads
        envs = gym.make_vec("AntDir-v0", num_envs)
        envs.set_attr("task", [1.0] * num_envs)
        envs.reset(seed=list(range(num_envs)))
        for t in range(20):
            step = envs.step(np.full((num_envs, 8), np.sin(t)))
        return step[0]

    one, two, four = episode(2, os.cpu_count()), episode(2, 1), episode(4, 1)
    assert (one == two).all() and (one == four[:2]).all() and not np.allclose(four[0], four[1])


def test_mujoco_renders_what_it_simulates():
    try:
        envs = gym.make_vec("HalfCheetahDir-v0", 2, render_mode="rgb_array")
        envs.reset(seed=[0, 1])
        first = envs.render()
    except Exception as error:
        pytest.skip(f"no renderer: {error}")
    envs.step(np.ones((2, 6)))
    assert len(first) == 2 and first[0].ndim == 3 and (first[0] != envs.render()[0]).any()


def test_mujoco_is_imported_for_its_families_alone():
    """So that the other families run, and start as fast, without it."""
    code = "import sys, mrl_maml, mrl_rl2, gymnasium; gymnasium.make_vec('PointNav-v0', 2); sys.exit('mujoco' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(mrl_maml.__file__).parent).returncode == 0


# The trained agents


@pytest.mark.parametrize(
    "name, num_tasks, at_least", [("point_nav", 12, (-50, -20, -9, -5)), ("tabular_mdp", 200, (9, 13.5, 14, 14))]
)
def test_trained_agent_adapts_to_heldout_tasks(name, num_tasks, at_least):
    """Returns after 0, 1, 2, 3 steps, with margins of several standard errors; and trap 9 with the learner that is used."""
    torch.set_default_dtype(torch.float32)
    checkpoint = mrl_maml.load_checkpoint("--evaluate", RESULTS / f"maml_{name}.pt")
    args = Args(**checkpoint["args"])
    envs = mrl_maml.make_envs(args, num_tasks * args.eval_episodes)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    tasks = envs.sample_tasks(num_tasks, mrl_maml.stream(args.seed, 0, mrl_maml.HELDOUT_TASKS))
    seeds = np.random.default_rng(0).integers(2**31, size=(4, envs.num_envs)).tolist()
    batches = collect(agent, args, envs, tasks, 3, seeds, torch.Generator().manual_seed(0))
    for batch, returns, limit in zip(batches, mrl_maml.episode_returns(batches), at_least, strict=True):
        assert returns.mean() > limit
        assert batch["explained_variance"].mean() > 0.3
