"""The mathematics of mrl_maml.py: the meta-gradient against finite differences of exact objectives, found by enumeration,
and every step of the algorithm against its definition."""

import itertools
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import grad, vmap

import mrl_maml
from mrl_maml import Agent, Args, adapt, add_advantages, collect, compute_gae, linear_values, meta_loss, policy

DOUBLE = torch.float64
SETTINGS = Args(adapt_steps=1, eval_adapt_steps=0, num_episodes=20, inner_lr=0.1, inner_loss="ratio")


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
    """Settings, environments, tasks, and an agent whose policy is far from uniform and whose steps shift the weights."""
    args = replace(SETTINGS, env_id=env_id, hidden_size=8, **flags)
    envs = mrl_maml.make_envs(args, num_tasks * args.num_episodes)
    torch.manual_seed(seed)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args)
    for parameter in agent.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    for name in ("w0", "w1", "w2"):
        torch.nn.init.normal_(agent.weights[name], std=0.5)
    return args, envs, agent, mrl_maml.sample_tasks(envs, num_tasks, np.random.default_rng(seed))


def play(env_id, num_tasks, num_steps, seed=0, **flags):
    args, envs, agent, tasks = make(env_id, num_tasks, seed, **flags)
    return args, agent, collect(agent, envs, tasks, num_steps, np.random.default_rng(seed), args)


def inner_steps(agent, num_steps):
    return [agent.inner_step(k) for k in range(num_steps)]


def all_tasks(agent, batches, args):
    per_task = vmap(partial(meta_loss, args=args), in_dims=(None, None, 0))
    return per_task(dict(agent.weights), inner_steps(agent, len(batches) - 1), batches)


# The meta-gradient, by enumeration. A problem is a finite set of trajectories: a softmax policy, all action sequences.


class Problem:
    """States (T, J), actions (T, J), rewards to come (T, J) of all trajectories J, and the environment's part of their
    probabilities (J)."""

    def __init__(self, name):
        rng = np.random.default_rng(3)
        if name == "bandit":  # 3 arms
            self.states, self.actions = np.zeros((3, 1), dtype=int), np.arange(3)[:, None]
            rewards, env_probs = np.array([[1.0], [0.2], [-0.7]]), np.ones(3)
        else:  # 2 states, 2 actions, 2 steps
            transition, reward = rng.dirichlet(np.ones(2), (2, 2)), rng.normal(size=(2, 2))
            rows = np.array(list(itertools.product([0, 1], repeat=3)))  # action, next state, action
            self.states = np.stack([np.zeros(8, dtype=int), rows[:, 1]], 1)
            self.actions = rows[:, [0, 2]]
            rewards, env_probs = reward[self.states, self.actions], transition[0, rows[:, 0], rows[:, 1]]
        to_go = rewards[:, ::-1].cumsum(1)[:, ::-1].copy()
        self.num_states, self.num_actions = self.states.max() + 1, self.actions.max() + 1
        self.obs = torch.as_tensor(np.eye(self.num_states)[self.states.T])  # (T, J, D)
        self.actions, self.to_go = torch.as_tensor(self.actions.T), torch.as_tensor(to_go.T)
        self.env_probs = torch.as_tensor(env_probs)
        self.baseline = self.to_go.mean(1, keepdim=True)  # any function of the state is allowed; here one of time

    def weights(self, seed=0):
        torch.manual_seed(seed)
        agent = Agent(int(self.num_states), gym.spaces.Discrete(int(self.num_actions)), replace(SETTINGS, hidden_size=2))
        return {name: torch.randn_like(w) * 0.7 for name, w in agent.weights.items()}

    def steps(self, num_steps, step_size, seed=0):
        """Rates that differ by step, and shifts of the weights."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {name: w.shape for name, w in self.weights().items()}
        return [
            {
                "rates": {name: torch.tensor(step_size / (k + 1)) for name in shapes},
                "shifts": {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()},
            }
            for k in range(num_steps)
        ]

    def logprobs(self, weights):
        return policy(weights, self.obs).log_prob(self.actions)  # (T, J)

    def objective(self, weights):
        return (self.logprobs(weights).sum(0).exp() * self.env_probs * self.to_go[0]).sum()

    def batch(self, weights):
        """The data that the weights draw: all trajectories, weighted by their probabilities."""
        logprobs = self.logprobs(weights).detach()
        probs = logprobs.sum(0).exp() * self.env_probs
        advantages = (self.to_go - self.baseline) * logprobs.numel() * probs  # losses are means over steps and episodes
        data = {"obs": self.obs, "actions": self.actions, "logprobs": logprobs, "advantages": advantages}
        return data | {"masks": torch.ones_like(logprobs)}


def meta_gradient(problem, weights, steps, args):
    """The script's, of infinitely many episodes a step: of the mean objective after each step, which is returned too."""
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    batches, current, objectives = [], weights, []
    for step in steps:
        batches.append(problem.batch(current))
        current = adapt(current, step, batches[-1], args)
        objectives.append(problem.objective(current).item())
    batches.append(problem.batch(current))
    # The objective is a sum over the steps of an episode, the loss a mean over them.
    loss = meta_loss(weights, steps, batches, args)["policy_loss"]
    grads = torch.autograd.grad(-loss, list(weights.values()))
    return torch.cat([g.flatten() for g in grads]), np.mean(objectives)


def exact_objective(problem, steps, weights):
    """Mean of J(theta_k) with theta_k+1 = theta_k + shift_k + rate_k grad J(theta_k), without any of the script's losses."""
    objectives = []
    for step in steps:
        grads = grad(problem.objective)(weights)
        weights = {name: w + step["shifts"][name] + step["rates"][name] * grads[name] for name, w in weights.items()}
        objectives.append(problem.objective(weights))
    return torch.stack(objectives).mean()


def finite_differences(objective, weights, h=1e-5):
    """Central ones, in each weight."""
    sizes = [w.numel() for w in weights.values()]

    def shifted(shift):
        parts = zip(weights.items(), shift.split(sizes), strict=True)
        return objective({name: w + part.view_as(w) for (name, w), part in parts})

    shifts = h * torch.eye(sum(sizes))
    return (vmap(shifted)(shifts) - vmap(shifted)(-shifts)) / (2 * h)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["bandit", "mdp"])
def test_meta_gradient_by_enumeration(name, num_steps):
    """Traps 1, 2 and 3. MAML's objective, whose inner step follows the exact policy gradient: `dice` has all of its gradient,
    `ratio` all of it where an episode has one action, and what the others leave out is more than an error of rounding."""
    problem, errors = Problem(name), {}
    weights, steps = problem.weights(), problem.steps(num_steps, 0.8)
    objective = partial(exact_objective, problem, steps)
    exact = finite_differences(objective, weights)
    for inner_loss, first_order in (("dice", False), ("ratio", False), ("log-prob", False), ("ratio", True)):
        args = replace(SETTINGS, inner_loss=inner_loss, first_order=first_order)
        grads, after = meta_gradient(problem, weights, steps, args)
        assert after == pytest.approx(objective(weights).item(), abs=1e-12)
        errors["--first-order" if first_order else inner_loss] = ((grads - exact).norm() / exact.norm()).item()
    print(f"\n{name}, K={num_steps}: share of the meta-gradient left out:", {k: f"{e:.1e}" for k, e in errors.items()})
    assert errors["dice"] < 1e-6
    assert errors["ratio"] < 1e-6 if name == "bandit" else errors["ratio"] > 1e-3
    assert errors["log-prob"] > 0.03 and errors["--first-order"] > 0.03


def test_log_prob_is_first_order_for_centred_advantages():
    """Trap 1 in its purest form: softmax over 3 logits, advantages with mean zero; the second-order term vanishes."""
    problem = Problem("bandit")
    weights, [step] = problem.weights(), problem.steps(1, 0.8)
    problem.baseline = problem.objective(weights).detach()
    step["rates"] = {name: torch.tensor(0.8 * (name == "b2")) for name in weights}
    grads = {}
    for inner_loss, first_order in (("log-prob", False), ("log-prob", True), ("ratio", False)):
        args = replace(SETTINGS, inner_loss=inner_loss, first_order=first_order)
        grads[inner_loss, first_order] = meta_gradient(problem, weights, [step], args)[0][-3:]  # of b2
    torch.testing.assert_close(grads["log-prob", False], grads["log-prob", True], atol=1e-12, rtol=0)
    assert (grads["ratio", False] - grads["log-prob", True]).norm() > 0.05 * grads["ratio", False].norm()


# All tasks at once


@pytest.mark.parametrize("inner_loss", ["ratio", "log-prob", "dice"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("env_id", ["PointNav-v0", "MAMLCountdown-v0"])
def test_tasks_at_once_equal_a_loop_over_tasks(env_id, num_steps, inner_loss):
    """Adapted weights and meta-gradient under vmap are those of a plain loop, for K = 1, 2, 3 (trap 3), with torch.autograd
    alone and the inner loss written out."""
    args, agent, batches = play(env_id, 3, num_steps, adapt_steps=num_steps, inner_loss=inner_loss, num_episodes=2)

    def plain_step(weights, step, batch):
        logprobs = policy(weights, batch["obs"]).log_prob(batch["actions"])
        losses = []
        for e, length in enumerate(batch["masks"].sum(0).int().tolist()):
            earlier = 1.0
            for t in range(length):
                ratio = (logprobs[t, e] - logprobs[t, e].detach()).exp()
                term = {"ratio": ratio, "log-prob": logprobs[t, e], "dice": earlier * (ratio - 1)}[inner_loss]
                earlier = earlier * ratio
                losses.append(-term * batch["advantages"][t, e])
        grads = torch.autograd.grad(sum(losses) / len(losses), list(weights.values()), create_graph=True)
        grads = dict(zip(weights, grads, strict=True))
        for name in grads:
            if name != "log_std" and "log_std" in weights:
                grads[name] = grads[name] * (2 * weights["log_std"]).exp().mean()
        return {name: w + step["shifts"][name] - step["rates"][name] * grads[name] for name, w in weights.items()}

    total = 0.0
    for m in range(3):
        weights, own = dict(agent.weights), [{name: x[m] for name, x in batch.items()} for batch in batches]
        for k, step in enumerate(inner_steps(agent, num_steps)):
            weights, after = plain_step(weights, step, own[k]), own[k + 1]
            logratio = (policy(weights, after["obs"]).log_prob(after["actions"]) - after["logprobs"]) * after["masks"]
            assert logratio.abs().max() < 1e-6  # these are the weights that played
            total = total - (logratio.exp() * after["advantages"]).sum() / after["masks"].sum() / num_steps
    parameters = list(agent.parameters())
    expected = torch.autograd.grad(total, parameters)
    losses = all_tasks(agent, batches, args)
    assert losses["approx_kl"].abs().max() < 1e-10 and losses["clipfrac"].max() == 0  # the ratio is 1 before the first step
    for ours, plain in zip(torch.autograd.grad(losses["policy_loss"].sum(), parameters), expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_rates_and_shifts_of_each_inner_step():
    """Those of a softmax are longer by the number of actions; steps after the last of the training repeat it, unshifted."""
    agent = Agent(2, gym.spaces.Discrete(3), replace(SETTINGS, adapt_steps=2, inner_lr=0.5))
    agent.log_rates["b2"].data[1] += np.log(2)
    agent.shifts["b2"].data[1] = 7.0
    for k, (rate, shift) in enumerate(((1.5, 0.0), (3.0, 7.0), (3.0, 0.0), (3.0, 0.0))):
        step = agent.inner_step(k)
        torch.testing.assert_close(step["rates"]["b2"], torch.full((1, 3), rate))
        torch.testing.assert_close(step["shifts"]["b2"], torch.full((1, 3), shift))
    step = Agent(2, gym.spaces.Box(-1, 1, (3,)), SETTINGS).inner_step(0)
    torch.testing.assert_close(step["rates"]["w0"], torch.full((2, 64), SETTINGS.inner_lr))
    assert (step["shifts"]["log_std"] < 0).all() and (step["shifts"]["w0"] == 0).all()


def test_gaussian_steps_are_in_units_of_the_deviation():
    """Twice the deviation and twice the distance of actions from their mean: the mean moves twice as far, log-std as far."""
    args, agent, batches = play("PointNav-v0", 1, 0)
    batch = {name: x[0] for name, x in batches[0].items()}
    step = {"rates": dict.fromkeys(agent.weights, 1.0), "shifts": dict.fromkeys(agent.weights, 0.0)}
    moves = []
    for scale in (1.0, 2.0):
        weights = {name: torch.zeros_like(w) for name, w in agent.weights.items()} | {
            "log_std": torch.full((1, 2), scale).log()
        }
        scaled = batch | {"actions": batch["actions"] * scale}
        scaled["logprobs"] = policy(weights, scaled["obs"]).log_prob(scaled["actions"])
        adapted = adapt(weights, step, scaled, args)
        moves.append((adapted["b2"], adapted["log_std"] - weights["log_std"]))
    torch.testing.assert_close(moves[1][0], 2 * moves[0][0])
    torch.testing.assert_close(moves[1][1], moves[0][1])


# Episodes that end early


def test_rollout_against_the_environment_by_hand():
    args, agent, [batch] = play("MAMLCountdown-v0", 5, 0, num_episodes=6)
    tasks, lengths = make("MAMLCountdown-v0", 5)[3], set()
    for m, e in itertools.product(range(5), range(6)):
        length = min(int(batch["obs"][m, 0, e, 0]), 4)
        lengths.add(length)
        assert batch["masks"][m, :, e].tolist() == [float(t < length) for t in range(4)]
        assert batch["obs"][m, :length, e, 1].tolist() == list(range(length))
        by_hand = [tasks[m] * float(batch["actions"][m, t, e] == 1) + 0.1 * (t + 1) for t in range(length)]
        np.testing.assert_allclose(batch["rewards"][m, :, e], by_hand + [0.0] * (4 - length), atol=1e-6)
        logprobs = policy(dict(agent.weights), batch["obs"][m]).log_prob(batch["actions"][m])
        torch.testing.assert_close(logprobs, batch["logprobs"][m])
    assert lengths == {2, 3, 4}
    returns = mrl_maml.mean_returns([batch])
    torch.testing.assert_close(returns[0], batch["rewards"].sum(1).mean(1))


@pytest.mark.parametrize("inner_loss", ["ratio", "log-prob", "dice"])
def test_padding_after_an_episode_is_of_no_account(inner_loss):
    args, agent, batches = play("MAMLCountdown-v0", 3, 1, inner_loss=inner_loss, num_episodes=4)

    def gradient(batches):
        batches = [vmap(add_advantages, in_dims=(0, None))(batch, args) for batch in batches]
        loss = all_tasks(agent, batches, args)["policy_loss"].sum()
        return torch.autograd.grad(loss, list(agent.weights.parameters()))

    changed = []
    for batch in batches:
        padding = batch["masks"] == 0
        assert padding.any()
        noise, other = torch.randn(padding.shape), {}
        other["obs"] = torch.where(padding[..., None], noise[..., None], batch["obs"])
        other["actions"] = torch.where(padding, 2 - batch["actions"], batch["actions"])
        other["rewards"] = torch.where(padding, noise, batch["rewards"])
        other["logprobs"] = torch.where(padding, noise, batch["logprobs"])
        changed.append(batch | other)
    for a, b in zip(gradient(batches), gradient(changed), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_equals_its_definition(gae_lambda):
    """Trap 10: after the last step of an episode the value is zero, not that of a next row."""
    rng, gamma = np.random.default_rng(0), 0.9
    lengths = np.array([6, 3, 1, 5])
    rewards, values = rng.normal(size=(2, 6, 4))
    masks = (np.arange(6)[:, None] < lengths).astype(float)
    expected = np.zeros((6, 4))
    for e, n in enumerate(lengths):
        delta = rewards[:n, e] + gamma * np.append(values[1:n, e], 0.0) - values[:n, e]
        for t in range(n):
            expected[t, e] = sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, n))
    tensors = (torch.as_tensor(x) for x in (rewards, values, masks))
    np.testing.assert_allclose(compute_gae(*tensors, gamma, gae_lambda).numpy(), expected, atol=1e-12)


# The learner's value function


def test_linear_values_are_the_least_squares_fit():
    rng = np.random.default_rng(0)
    obs, returns = torch.as_tensor(rng.normal(size=(7, 5, 3))), torch.as_tensor(rng.normal(size=(7, 5)))
    masks = torch.as_tensor((np.arange(7)[:, None] < rng.integers(3, 8, size=5)).astype(float))
    values, real = linear_values(obs, returns, masks, ridge=0.0), masks.bool()
    t = torch.arange(7)[:, None].expand(7, 5)[real][:, None] / 100
    x = torch.cat([obs[real], obs[real] ** 2, t, t**2, t**3, torch.ones_like(t)], dim=1).numpy()
    fit = x @ np.linalg.lstsq(x, returns[real].numpy(), rcond=None)[0]
    np.testing.assert_allclose(values[real].numpy(), fit, atol=1e-5)


def test_linear_values_of_few_steps_do_not_explain_noise():
    """58 features on 60 steps: a fit that interpolates would leave advantages without a signal."""
    torch.manual_seed(0)
    obs, returns, masks = torch.randn(15, 4, 27), torch.randn(15, 4), torch.ones(15, 4)
    assert (returns - linear_values(obs, returns, masks)).var() > 0.1 * returns.var()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_linear_values_of_observations_that_never_change(dtype):
    """Trap 17: constant observations (bandits), all-zero ones, zero-padded ones, and episodes of one step."""
    torch.set_default_dtype(dtype)
    returns = torch.randn(1, 10)
    for obs in (torch.ones(1, 10, 2), torch.zeros(1, 10, 2)):
        values = linear_values(obs, returns, torch.ones(1, 10))
        torch.testing.assert_close(values, returns.mean().expand_as(returns), atol=1e-3, rtol=1e-3)
    padded, masks = torch.zeros(6, 4, 5), torch.zeros(6, 4)
    padded[:2, :, :2], masks[:2] = torch.randn(2, 4, 2), 1.0
    assert torch.isfinite(linear_values(padded, torch.randn(6, 4), masks)).all()


def test_linear_values_explain_returns_on_heldout_tasks():
    """Trap 9, before any training; and the explained variance and the advantages are those of their definitions."""
    args, _, [batch] = play("PointNav-v0", 6, 0, gae_lambda=1.0)
    assert (batch["explained_variance"] > 0.5).all()
    returns = batch["rewards"].clone()
    for t in reversed(range(99)):
        returns[:, t] += args.gamma * returns[:, t + 1]
    residual = returns - vmap(linear_values)(batch["obs"], returns, batch["masks"])
    explained = 1 - residual.var((1, 2), correction=0) / returns.var((1, 2), correction=0)
    torch.testing.assert_close(batch["explained_variance"], explained, atol=1e-6, rtol=1e-6)
    advantages = (residual - residual.mean((1, 2), keepdim=True)) / residual.std((1, 2), correction=0, keepdim=True)
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-6, rtol=1e-6)


# The policy


def test_log_probability_is_summed_over_action_dimensions():
    """Trap 4, of the unclipped action in units of the Box."""
    args, agent, [batch] = play("PointNav-v0", 2, 0, num_episodes=3)
    weights = {name: w.detach() for name, w in agent.weights.items()}
    hidden = torch.tanh(torch.tanh(batch["obs"] @ weights["w0"] + weights["b0"]) @ weights["w1"] + weights["b1"])
    mean = hidden @ weights["w2"] + weights["b2"]
    z = (batch["actions"] - mean) / weights["log_std"].exp()
    by_hand = -0.5 * z**2 - weights["log_std"] - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(batch["logprobs"], by_hand.sum(-1))
    assert batch["actions"].abs().max() > 1  # the sample; the environment moved by what was clipped
    moved = batch["obs"][:, 1:] - batch["obs"][:, :-1]
    torch.testing.assert_close(moved, 0.1 * batch["actions"][:, :-1].clamp(-1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [1e6, -1e6])
def test_a_huge_inner_step_leaves_a_policy_that_acts(rate):
    """Trap 18: log-std thrown far out by an inner step is clamped; the next batch and its gradient are finite."""
    args, envs, agent, tasks = make("PointNav-v0", 3, num_episodes=4)
    agent.shifts["log_std"].data.fill_(rate)
    batches = collect(agent, envs, tasks, 1, np.random.default_rng(0), args)
    assert all(torch.isfinite(x).all() for x in batches[1].values())
    spread = batches[1]["actions"].std()
    assert spread > 5 if rate > 0 else 0 < spread
    grads = torch.autograd.grad(all_tasks(agent, batches, args)["policy_loss"].sum(), list(agent.weights.parameters()))
    assert all(torch.isfinite(g).all() for g in grads)


def test_tasks_see_different_noise():
    """Trap 12: tasks that are alike and start with the same weights play different episodes, and again in each step."""
    args, envs, agent, _ = make("HalfCheetahDir-v0", 2, num_episodes=2)
    first, second = collect(agent, envs, [1.0, 1.0], 1, np.random.default_rng(0), args)
    starts = torch.cat([first["obs"][:, 0].flatten(0, 1), second["obs"][:, 0].flatten(0, 1)])
    assert len({tuple(start.tolist()) for start in starts}) == 8
    assert (first["actions"][0] != first["actions"][1]).all()
    again = collect(agent, envs, [1.0, 1.0], 1, np.random.default_rng(0), args)[0]
    torch.testing.assert_close(again["obs"][:, 0], first["obs"][:, 0], atol=0, rtol=0)


@pytest.mark.parametrize("env_id", ["MAMLCountdown-v0"])
@pytest.mark.parametrize("inner_loss", ["ratio", "log-prob", "dice"])
def test_update_computes_on_the_device_of_its_input(env_id, inner_loss):
    """Without a GPU: torch's meta device refuses to mix with tensors that some line makes on the CPU."""
    args, agent, batches = play(env_id, 2, 2, inner_loss=inner_loss)
    agent = agent.to("meta")
    batches = [{name: x.to("meta") for name, x in batch.items()} for batch in batches]
    sum(losses.mean() for losses in all_tasks(agent, batches, args).values()).backward()
    vmap(partial(add_advantages, args=args))({name: batches[0][name] for name in ("obs", "rewards", "masks")})
    assert all(p.grad.device.type == "meta" for p in agent.weights.values())
