"""The mathematics of mrl_actor_critic.py: critic, actor, their gradients, and what a round may see."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mrl_actor_critic as script  # noqa: E402
from mrl_actor_critic import Agent, Args, action_rows, actor, adapt, combine, critic_features, refine, refine_path, rollout  # noqa: E402

DISCRETE, BOX = gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (2,))


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(obs_dim, action_space, randomize=True, **settings):
    """An agent in general position: every parameter, also those that start at zero, has some value."""
    agent = Agent(obs_dim, action_space, Args(hidden_size=8, **{"num_features": 3, **settings}))
    if randomize:
        for parameter in agent.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return agent


def prior_critic(agent, gamma=None):
    """Weights (W,) and inverse (W, W) before any data."""
    mean, precision = (x.flatten() for x in agent.prior(gamma))
    return mean, precision.reciprocal().diag()


def play(agent, family, num_envs, num_rounds, **settings):
    """A rollout in `num_envs` tasks of a native family, as the training loop would make it."""
    envs = gym.make_vec(family, num_envs)
    seeds = np.arange((num_rounds + 1) * num_envs).reshape(-1, num_envs).tolist()
    tasks = envs.unwrapped.sample_tasks(num_envs, np.random.default_rng(0))
    with torch.no_grad():
        return rollout(agent, envs, tasks, num_rounds, 1, seeds, (1, 1, script.ACTIONS), **settings)


def known_mdp(gamma):
    """Three states, two actions, a policy, and the exact Q of it, by solving Bellman's equation."""
    rng = torch.Generator().manual_seed(1)
    transitions = torch.rand(3, 2, 3, generator=rng) + 0.1
    transitions /= transitions.sum(-1, keepdim=True)
    rewards, policy = torch.randn(3, 2, generator=rng), torch.rand(3, 2, generator=rng) + 0.1
    policy /= policy.sum(-1, keepdim=True)
    chain = (transitions[..., None] * policy).reshape(6, 6)  # (s, a) to (s', a')
    return transitions, rewards, policy, torch.linalg.solve(torch.eye(6) - gamma * chain, rewards.flatten())


def test_critic_is_exact_q_of_known_mdp():
    """Enough data on each (s, a), in the proportions of the transition probabilities, and the prior vanishes."""
    gamma, weight = 0.9, 1e9
    transitions, rewards, policy, exact = known_mdp(gamma)
    agent = make_agent(3, DISCRETE, randomize=False, num_features=1)
    features = critic_features(agent, torch.eye(3))  # (3, 2, 1, W)
    following = (transitions @ combine(policy, features)).flatten(0, 1)  # expected f(s', a'), (6, 2 W)
    taken = combine(torch.eye(2).repeat(3, 1), features.repeat_interleave(2, 0))
    data = weight**0.5 * taken, weight**0.5 * (taken - gamma * following), weight**0.5 * rewards.flatten()
    with torch.no_grad():
        weights, _ = adapt(*prior_critic(agent, gamma), *data)
    torch.testing.assert_close(taken @ weights, exact, rtol=0, atol=1e-5)


def test_critic_is_exact_q_from_samples():
    """The same from a walk of 200,000 sampled steps, through the functions that a rollout calls; margin 6 standard errors."""
    gamma, steps, rng = 0.5, 200_000, np.random.default_rng(2)
    transitions, rewards, policy, exact = known_mdp(gamma)
    state_action = rng.integers(6, size=steps)
    next_state = (rng.random((steps, 1)) > transitions.reshape(6, 3).numpy().cumsum(-1)[state_action]).sum(-1).clip(max=2)
    agent = make_agent(3, DISCRETE, randomize=False, num_features=1)
    features = critic_features(agent, torch.eye(3))
    every = combine(torch.eye(2).repeat(3, 1), features.repeat_interleave(2, 0))  # (6, 2 W)
    taken, following = every[state_action], combine(policy, features)[next_state]
    noisy_rewards = rewards.flatten()[state_action] + torch.from_numpy(rng.standard_normal(steps))
    data = (x.unflatten(0, (-1, 1000)) for x in (taken, taken - gamma * following, noisy_rewards))
    with torch.no_grad():
        critic = prior_critic(agent, gamma)
        for batch in zip(*data, strict=True):
            critic = adapt(*critic, *batch)
        q = every @ critic[0]
    assert (q - exact).abs().max() < 6 * (2 / (steps / 6)) ** 0.5 / (1 - gamma)


def test_rounds_of_the_critic_are_one_solve():
    """Round by round, the weights solve A w = b with all that was seen before, and nothing else."""
    agent = make_agent(2, BOX)
    size = agent.prior_mean.numel()
    f, d, r = torch.randn(3, 4, 5, size), torch.randn(3, 4, 5, size), torch.randn(3, 4, 5)
    with torch.no_grad():
        mean, precision = (x.flatten() for x in agent.prior())
        critic = prior_critic(agent)
        for k in range(4):
            seen = [x[:, :k].flatten(1, 2) for x in (f, d, r)]
            matrix, moment = (
                precision.diag() + seen[0].mT @ seen[1],
                precision * mean + (seen[0].mT @ seen[2][..., None])[..., 0],
            )
            exact = torch.linalg.solve(matrix, moment)
            torch.testing.assert_close(critic[0].expand_as(exact), exact)
            critic = adapt(*critic, f[:, k], d[:, k], r[:, k])


def test_critic_is_posterior_of_gaussian_bandit():
    """Means ~ N(m, 1/p), unit noise, one-step episodes: posterior mean (p m + sum r) / (p + n), variance 1 / (p + n)."""
    agent = make_agent(1, DISCRETE, num_features=1)
    with torch.no_grad():
        agent.log_precision[:, 1] = 50.0  # nothing can be learned through the network's feature, whose prior mean is zero
        agent.prior_mean[:, 1] = 0.0
        mean, precision = (x[:, 0] for x in agent.prior(0.5))
        actions = torch.tensor([0, 0, 1, 0, 0])
        rewards = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
        features = critic_features(agent, torch.ones(5, 1))
        taken = combine(action_rows(agent, actions), features)
        weights, _ = adapt(*prior_critic(agent, 0.5), taken, taken, rewards)
        _, v = refine_path(weights, agent.prior(0.5)[1].reciprocal().diag_embed(), taken, rewards)
        variances = 1 / precision - (v[..., 0] ** 2).sum(-1)
    counts, totals = torch.tensor([4.0, 1.0]), torch.tensor([6.5, -1.0])
    torch.testing.assert_close(weights[::2], (precision * mean + totals) / (precision + counts), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variances, 1 / (precision + counts), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("space", [DISCRETE, BOX])
def test_refining_step_by_step_is_the_solve(space):
    """Without bootstrapping, the rank-one updates end at the solve with the same data, in both forms."""
    agent = make_agent(2, space)
    blocks = agent.prior_mean.shape
    features = critic_features(agent, torch.randn(2, 10, 2))
    x = torch.eye(2)[torch.randint(2, (2, 10))] if space is DISCRETE else torch.randn(2, 10, 3)
    f, r = combine(x, features).detach(), torch.randn(2, 10)
    covariance = agent.prior()[1].detach().reciprocal().diag_embed().repeat(2, 1, 1, 1)
    with torch.no_grad():
        start, _ = adapt(*prior_critic(agent), f[:, :6], f[:, :6], r[:, :6])
        exact, inverse = adapt(*prior_critic(agent), f, f, r)
        v = refine_path(start, covariance, f[:, :6], r[:, :6])[1]
        covariance = covariance - v.mT @ v
        path, v = refine_path(start, covariance, f[:, 6:], r[:, 6:] - (f[:, 6:] @ start[..., None]).squeeze(-1))
        weights, left = start, covariance
        for t in range(4):
            torch.testing.assert_close(path[:, t], weights)
            torch.testing.assert_close(covariance - v[..., :t, :].mT @ v[..., :t, :], left)
            step = f[:, 6 + t]
            gains = (left @ step.unflatten(-1, blocks)[..., None]).flatten(1)
            weights, u = refine(weights, step, gains, r[:, 6 + t] - (step * weights).sum(-1))
            u = u.unflatten(-1, blocks)
            left = left - u[..., None] * u[..., None, :]
    torch.testing.assert_close(weights, exact)
    for b, block in enumerate(inverse.unflatten(-1, blocks).unflatten(1, blocks).unbind(1)):
        torch.testing.assert_close(block[:, :, b], left[:, b])  # all of A^-1 that is not zero


@pytest.mark.parametrize("family", ["TabularMDP-v0", "PointNav-v0"])
def test_update_sees_what_the_rollout_saw(family):
    """Recomputed for all rounds at once, the probabilities are those of the rollout: ratio 1 before any step."""
    envs = gym.make_vec(family, 1)
    agent = make_agent(envs.single_observation_space.shape[0], envs.single_action_space)
    batch = play(agent, family, 3, 3)
    batch |= {"advantages": torch.randn_like(batch["rewards"]), "scales": torch.ones(3, 1, 1)}
    with torch.no_grad():
        _, _, _, approx_kl, clipfrac = script.meta_loss(agent, batch, np.arange(3), batch["masks"].sum(), 1e-5)
    assert approx_kl < 1e-10 and clipfrac == 0


@pytest.mark.parametrize("family", ["TabularMDP-v0", "PointNav-v0"])
def test_meta_gradient_through_the_solves_is_finite_differences(family):
    envs = gym.make_vec(family, 1)
    agent = make_agent(envs.single_observation_space.shape[0], envs.single_action_space)
    batch = play(agent, family, 2, 2)
    batch["advantages"], batch["scales"] = torch.randn_like(batch["rewards"]), torch.ones(2, 1, 1)
    batch["logprobs"] = batch["logprobs"] + 0.1 * torch.randn_like(batch["logprobs"])

    def loss():
        return script.meta_loss(agent, batch, np.arange(2), batch["masks"].sum(), 100.0)[0]

    parameters = dict(agent.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss(), parameters.values(), allow_unused=True), strict=True))
    used = 0
    for name, parameter in parameters.items():
        if not parameter.numel():
            continue
        direction, h = torch.randn_like(parameter), 1e-5
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter += sign * h * direction
                values.append(loss().item())
        difference = (values[0] - values[1]) / (2 * h)
        gradient = gradients[name]
        gradient = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert abs(gradient - difference) < 1e-6 * max(1, abs(difference)), name
        used += abs(difference) > 1e-8
    assert used > 10


def test_actor_step_follows_the_policy_gradient_theorem():
    """The step's first order in 1 / temperature, times the Fisher information, is grad J = sum_s d(s) sum_a grad pi Q.

    One state with two actions: grad J by enumeration over actions (autograd of sum_a pi(a) Q(a)) is the Fisher matrix of
    the logits times the direction in which the actor moves them."""
    agent = make_agent(1, DISCRETE)
    obs = torch.ones(1, 1)
    features, weights = critic_features(agent, obs).detach(), agent.prior_mean.detach().flatten() + 0.5
    q = combine(torch.eye(2), features.expand(2, -1, -1, -1)) @ weights

    def logits(temperature):
        with torch.no_grad():
            agent.log_temperature.fill_(np.log(temperature))
            return actor(agent, obs, features, weights[None], 0 * weights[None].repeat(1, 2))[0][0]

    start = logits(1e12)
    direction = (logits(1e5) - start) * 1e5
    theta = start.clone().requires_grad_()
    probs = theta.softmax(-1)
    (gradient,) = torch.autograd.grad((probs * q).sum(), theta)  # enumeration of E[grad log pi(a) Q(a)]
    fisher = torch.diag(probs) - probs[:, None] * probs
    torch.testing.assert_close(fisher.detach() @ direction, gradient, rtol=1e-5, atol=1e-8)
    # The closed form: pi(a) proportional to pi_theta(a) exp(Q(a) / temperature).
    expected = start.softmax(-1) * (q / 0.7).exp()
    torch.testing.assert_close(logits(0.7).softmax(-1), expected / expected.sum(), rtol=1e-6, atol=1e-9)


def test_box_actor_is_the_gaussian_times_exponential_of_q():
    """On a grid of actions: mean of pi_theta(a) exp(Q(a) / temperature)."""
    agent = make_agent(1, gym.spaces.Box(-1, 1, (1,)))
    obs, grid = torch.full((1, 1), 0.3), torch.linspace(-60, 60, 200_001)
    features, weights = critic_features(agent, obs).detach(), agent.prior_mean.detach() + 0.1
    with torch.no_grad():
        agent.log_temperature.fill_(50.0)
        start = actor(agent, obs, features, weights, 0 * weights.repeat(1, 2))[0][0, 0]
        agent.log_temperature.fill_(-0.2)
        mean, log_std = actor(agent, obs, features, weights, 0 * weights.repeat(1, 2))
        rows = torch.stack([torch.ones_like(grid), grid], -1)  # x(a)
        q = rows @ features[0, 0] @ weights[0]
        density = (-0.5 * ((grid - start) / log_std.exp()) ** 2 + q / agent.log_temperature.exp()).softmax(-1)
    assert abs((density * grid).sum() - mean[0, 0]) < 1e-6
    assert abs((density * grid**2).sum() - (density * grid).sum() ** 2 - (2 * log_std).exp()) < 1e-6


@pytest.mark.parametrize("discrete", [True, False])
def test_optimism_is_the_critics_deviation(discrete):
    """Exploring, Q + beta sigma stands for Q: for a Box, its gradient at the start's action, against finite differences."""
    agent = make_agent(1, DISCRETE if discrete else gym.spaces.Box(-1, 1, (1,)))
    obs, weights = torch.full((1, 1), 0.3), agent.prior_mean.detach().flatten()[None]
    features = critic_features(agent, obs).detach()
    root = torch.randn(agent.num_blocks, *[features.shape[-1]] * 2)
    gains = features @ root @ root.mT
    spread = (gains @ features.mT)[0]  # (B, K, K)
    left = torch.full((1,), 4.0)
    with torch.no_grad():
        agent.noise.zero_()
        beta, temperature = agent.optimism[0] + agent.optimism[1] * np.log(5), agent.log_temperature.exp()
        plain, log_std = actor(agent, obs, features, weights, 0 * weights.repeat(1, 2))
        bold, _ = actor(agent, obs, features, weights, 0 * weights.repeat(1, 2), gains, agent.selection(left))
        if discrete:
            torch.testing.assert_close((bold - plain)[0], beta * spread.flatten().sqrt() / temperature)
            return
        agent.log_temperature.fill_(50.0)
        start = actor(agent, obs, features, weights, 0 * weights.repeat(1, 2))[0][0, 0]

        def sigma(a):
            x = torch.tensor([1.0, a])
            return (x @ spread[0] @ x).sqrt()

        slope = (sigma(start + 1e-5) - sigma(start - 1e-5)) / 2e-5
        expected = ((2 * log_std).exp() * beta * slope / temperature).flatten()
        torch.testing.assert_close((bold - plain)[0], expected, rtol=1e-6, atol=1e-9)


def test_a_round_never_sees_later_rounds():
    """Other data in round 2 moves no log-probability of rounds 0 and 1, and moves those of round 3; and within a round no
    step sees what comes after it."""
    agent = make_agent(10, gym.spaces.Discrete(5))
    batch = play(agent, "TabularMDP-v0", 2, 4)
    batch["scales"] = torch.ones(2, 1, 1)

    def logprobs(changed):
        """Of each step, as the gradient of the (unclipped) policy loss with regard to its advantage."""
        mb = dict(batch, **changed, advantages=torch.zeros_like(batch["rewards"], requires_grad=True))
        policy_loss = script.meta_loss(agent, mb, np.arange(2), 1, 1e9)[0]
        return torch.autograd.grad(policy_loss, mb["advantages"])[0]

    rewards = batch["rewards"].clone()
    rewards[:, 2, 5] += 10
    moved = (logprobs({"rewards": rewards}) - logprobs({})).abs() > 1e-9  # (N, R, L)
    assert not moved[:, :2].any() and not moved[:, 2, :6].any()
    assert moved[:, 2, 6:].any() and moved[:, 3].any()


def test_advantages_of_the_own_actions_are_held_against_the_others():
    """The baseline of a trial is made of the other explorations of its task alone."""
    agent = make_agent(10, gym.spaces.Discrete(5))
    batch = play(agent, "TabularMDP-v0", 4, 3)  # two tasks, two explorations: trials (0, 2) and (1, 3)
    values = script.compute_advantages(agent, batch, 2, 0.9, 0.95, 1.0)[2]
    changed = dict(batch, rewards=batch["rewards"].clone())
    changed["rewards"][0] += 1
    moved = (script.compute_advantages(agent, changed, 2, 0.9, 0.95, 1.0)[2] - values).abs().amax((1, 2)) > 1e-9
    assert moved.tolist() == [False, False, True, False]


def test_advantages_against_their_definition():
    rng = torch.Generator().manual_seed(0)
    rewards, values, next_values = (torch.randn(2, 3, 7, generator=rng) for _ in range(3))
    dones, masks = torch.zeros(2, 3, 7, dtype=torch.bool), torch.ones(2, 3, 7)
    dones[..., 2], dones[..., 5], masks[..., 6:] = True, True, 0.0  # two episodes a round, and one step of padding
    gae = script.compute_gae(rewards, values, next_values, dones, masks, 0.9, 0.8)
    deltas = rewards + 0.9 * next_values - values
    for t in range(7):
        last = 2 if t <= 2 else 5
        expected = sum((0.9 * 0.8) ** (k - t) * deltas[..., k] for k in range(t, last + 1))
        torch.testing.assert_close(gae[..., t], expected + torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("family", "steps", "low", "high"), [("PointNav-v0", 100, -0.5, 0.5), ("SparsePointNav-v0", 60, -1.0, 1.0)]
)
def test_navigation_families(family, steps, low, high):
    """Lengths, moves clipped to 0.1 an axis, rewards, and an observation that says nothing about the goal."""
    envs = gym.make_vec(family, 3)
    tasks = envs.unwrapped.sample_tasks(1000, np.random.default_rng(0))
    assert low <= np.min(tasks) and np.max(tasks) <= high
    if family == "SparsePointNav-v0":
        np.testing.assert_allclose(np.linalg.norm(tasks, axis=-1), 1)
        assert np.array(tasks)[:, 1].min() >= 0
    goals = np.array([[0.1, 0.1], [1.0, 0.0], [-0.3, 0.2]])
    envs.set_attr("task", list(goals))
    obs, _ = envs.reset(seed=[0, 1, 2])
    np.testing.assert_array_equal(obs, 0)
    actions = np.array([[5.0, -0.05], [0.1, 0.0], [-0.2, 0.07]])
    position = np.zeros((3, 2))
    for t in range(steps):
        next_obs, rewards, terminated, truncated, _ = envs.step(actions)
        position += actions.clip(-0.1, 0.1)
        distance = np.linalg.norm(position - goals, axis=-1)
        expected = -distance if family == "PointNav-v0" else np.where(distance <= 0.2, 1 - distance, 0)
        np.testing.assert_allclose(rewards, expected)
        np.testing.assert_allclose(next_obs, position, atol=1e-5)
        assert not terminated.any() and (truncated == (t == steps - 1)).all() and next_obs is not obs
        obs = next_obs
    assert not (envs.reset(options={"reset_mask": truncated})[0]).any()


@pytest.mark.parametrize("flag", ["meta_policy", "meta_value", "meta_action_selection"])
def test_a_part_switched_off_is_not_learned(flag):
    agent = make_agent(10, gym.spaces.Discrete(5), **{flag: False})
    parts = {
        "meta_policy": ("policy", "log_std", "log_temperature"),
        "meta_value": ("value", "prior", "log_precision", "logit_gamma"),
        "meta_action_selection": ("optimism", "noise"),
    }
    for name, parameter in agent.named_parameters():
        assert parameter.requires_grad != name.startswith(parts[flag]), name


def test_what_the_policy_reads_of_the_critic():
    """Before any data: nothing moved, all uncertain. n observations of one weight leave sqrt(P / (P + n)) of its deviation."""
    mean, precision, n = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.tensor([0.0, 4.0])
    assert script.knowledge((mean, precision), mean, 1 / precision).tolist() == [0.0, 0.0, 1.0, 1.0]
    known = script.knowledge((mean, precision), mean + 1, 1 / (precision + n))
    torch.testing.assert_close(known, torch.cat([torch.ones(2), (precision / (precision + n)).sqrt()]))
