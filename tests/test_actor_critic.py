"""The mathematics of mrl_actor_critic.py: posterior, evidence, actor, advantages, units, and its task family."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mrl_actor_critic as script  # noqa: E402
from mrl_actor_critic import Agent, Args, Posterior, TabularMDP, TaskVectorEnv, critic_loss, meta_loss, rollout  # noqa: E402

SPACES = [gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))]


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class EarlyEnd(TaskVectorEnv):
    """A random walk that ends at random, so that trials are of different lengths."""

    def __init__(self, num_envs, action_space):
        super().__init__(num_envs, 6, gym.spaces.Box(-9, 9, (2,)), action_space)

    def sample_tasks(self, num_tasks, rng):
        return rng.normal(size=num_tasks)

    def step(self, actions):
        self.state = self.state + self.np_random.normal(size=self.state.shape)
        self.steps += 1
        rewards = self.tasks + self.state[:, 0] + np.reshape(actions, (self.num_envs, -1)).sum(-1)
        return self.observe(), rewards, self.np_random.random(self.num_envs) < 0.25, self.steps >= 6, {}


def make_agent(space, obs_dim=2, **settings):
    """An agent in general position: every parameter, also those that start at zero, has some value."""
    agent = Agent(obs_dim, space, Args(hidden_size=8, num_features=2, **settings))
    for parameter in agent.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    agent.reward_scale.fill_(1.7)
    return agent


def play(space, num_episodes=2, **settings):
    agent, envs = make_agent(space, **settings), EarlyEnd(4, space)
    batch = rollout(agent, envs, list(envs.sample_tasks(4, np.random.default_rng(0))), num_episodes, 1)
    batch["advantages"], batch["returns"] = torch.randn_like(batch["rewards"]), torch.randn_like(batch["rewards"])
    assert 0 < batch["masks"].mean() < 1  # some trials end before others
    return agent, batch


def rows(agent, batch):
    """d (L, M, K F), by the definition, and rewards in the critic's units."""
    x, f = agent.action_features(batch["actions"]), agent.critic_features(batch["obs"])
    following = batch["next_x"][..., None] * agent.critic_features(batch["next_obs"])[..., None, :]
    return (x[..., None] * f[..., None, :] - following).flatten(2), batch["rewards"] / agent.reward_scale


@pytest.mark.parametrize("steps", [5, 70])
def test_posterior_is_kalman_filter_and_batch_regression(steps):
    agent = make_agent(SPACES[0])
    with torch.no_grad():
        mean, variance, noise = agent.prior()
        posterior, d, r = Posterior(agent, 2), torch.randn(steps, 2, *mean.shape), torch.randn(steps, 2)
        for t in range(steps):
            posterior.update(d[t], r[t])
        f = torch.randn(2, mean.shape[1])
        q, covariance = posterior.predict(f)
        for m in range(2):
            w, C = mean.flatten(), variance.flatten().diag()
            for row, reward in zip(d[:, m].flatten(1), r[:, m], strict=True):
                gain = C @ row / (noise + row @ C @ row)
                w, C = w + gain * (reward - row @ w), C - torch.outer(gain, row @ C)
            D, prior = d[:, m].flatten(1), (1 / variance.flatten()).diag()
            batch_C = torch.linalg.inv(prior + D.T @ D / noise)
            batch_w = batch_C @ (prior @ mean.flatten() + D.T @ r[:, m] / noise)
            X = torch.kron(torch.eye(len(mean)), f[m][None])  # q = X w
            for exact_w, exact_C in ((w, C), (batch_w, batch_C)):
                torch.testing.assert_close(posterior.mean[m].flatten(), exact_w)
                torch.testing.assert_close(posterior.variance[m].flatten(), exact_C.diagonal())
                torch.testing.assert_close(q[m], X @ exact_w)
                torch.testing.assert_close(covariance[m], X @ exact_C @ X.T)


@pytest.mark.parametrize("space", SPACES)
def test_critic_loss_is_the_evidence(space):
    agent, batch = play(space)
    with torch.no_grad():
        loss, (d, r), (mean, variance, noise) = critic_loss(agent, batch, torch.arange(4)), rows(agent, batch), agent.prior()
        joint, chain = 0.0, 0.0
        for m in range(4):
            real = batch["masks"][:, m] > 0
            D, rewards = d[real, m], r[real, m]
            covariance = (D * variance.flatten()) @ D.T + noise * torch.eye(len(D))
            joint -= torch.distributions.MultivariateNormal(D @ mean.flatten(), covariance).log_prob(rewards)
            posterior = Posterior(agent, 1)
            for row, reward in zip(D, rewards, strict=True):
                v = posterior.v[0, : posterior.t].flatten(1)
                spread = row**2 @ variance.flatten() - (v @ row).square().sum() + noise
                chain -= torch.distributions.Normal(row @ posterior.mean.flatten(), spread.sqrt()).log_prob(reward)
                posterior.update(row.view(1, *mean.shape), reward[None])
    constant = 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(loss, joint / batch["masks"].sum() - constant)
    torch.testing.assert_close(loss, chain / batch["masks"].sum() - constant)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("part", ["critic", "meta"])
def test_gradients_are_finite_differences(space, part):
    agent, batch = play(space)

    def loss():
        if part == "critic":
            return critic_loss(agent, batch, torch.arange(4))
        losses = meta_loss(agent, batch, torch.arange(4), clip_coef=100.0)
        return losses["policy_loss"] + losses["value_loss"] + losses["entropy"]

    parameters = [p for p in agent.parameters() if p.numel()]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, values = torch.randn_like(parameter), []
        for sign in (1e-5, -2e-5, 1e-5):
            parameter.data += sign * direction
            values.append(loss().item())
        exact = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(exact, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_masked_steps_change_nothing(space):
    agent, batch = play(space)
    changed = dict(batch)
    for name in ("obs", "next_obs", "rewards", "advantages", "returns", "logprobs", "q"):
        masks = batch["masks"].view(*batch["masks"].shape, *[1] * (batch[name].dim() - 2))
        changed[name] = batch[name] + 5 * (1 - masks)
    torch.testing.assert_close(critic_loss(agent, changed, torch.arange(4)), critic_loss(agent, batch, torch.arange(4)))
    before, after = (meta_loss(agent, x, torch.arange(4)) for x in (batch, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    posterior = Posterior(agent, 1)
    posterior.update(torch.randn(1, *agent.prior_mean.shape), torch.ones(1))
    old = posterior.mean, posterior.variance
    f = torch.ones(1, agent.prior_mean.shape[1])
    d = script.differences(torch.ones(1, len(agent.prior_mean)), f, 0 * agent.prior_mean[None, :, 0], f, torch.zeros(1))
    posterior.update(d, torch.zeros(1))
    torch.testing.assert_close((posterior.mean, posterior.variance), old, rtol=0, atol=0)


@pytest.mark.parametrize("space", SPACES)
def test_actor_in_closed_form(space):
    agent, batch = play(space)
    i, q, C = (batch[name][3, 0] for name in ("inputs", "q", "covariance"))
    with torch.no_grad():
        policy, start, temperature = agent.actor(i, q, C), agent.policy(i), agent.log_temperature.exp()
        a, b, c = agent.optimism
        beta = a + b * (1 / i[-2]).log() + c * i[-1]
    if agent.discrete:
        weights = start.softmax(-1) * ((q + beta * C.diagonal().sqrt()) / temperature).exp()
        torch.testing.assert_close(policy.probs, weights / weights.sum())
        return
    action = start.clone().requires_grad_()
    x = torch.cat([torch.ones(1), action])
    (gradient,) = torch.autograd.grad(x @ q + beta * (x @ C @ x).sqrt(), action)
    std = agent.log_std.detach().exp()
    torch.testing.assert_close(policy.mean, start + std**2 / temperature * gradient)
    actions = batch["actions"][3, 0]
    density = -0.5 * ((actions - policy.mean) / std) ** 2 - std.log() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(policy.log_prob(actions), density.sum())


@pytest.mark.parametrize("space", SPACES)
def test_ratio_is_one_before_any_step(space):
    agent, batch = play(space)
    losses = meta_loss(agent, batch, torch.arange(4), clip_coef=1e-5)
    assert losses["clipfrac"] == 0 and losses["approx_kl"].abs() < 1e-10


def test_gae_against_its_definition():
    rewards, values, masks = torch.randn(7, 2), torch.randn(7, 2), torch.ones(7, 2)
    masks[4:, 1] = 0
    advantages = script.compute_gae(rewards, values, masks, 0.9, 0.8)
    for m, length in enumerate((7, 4)):
        v = torch.cat([values[:length, m], torch.zeros(1)])
        deltas = rewards[:length, m] + 0.9 * v[1:] - v[:-1]
        for t in range(7):
            expected = sum((0.72 ** (k - t) * deltas[k] for k in range(t, length)), torch.zeros(()))
            torch.testing.assert_close(advantages[t, m], expected)


@pytest.mark.parametrize("flag", ["meta_policy", "meta_value", "meta_action_selection"])
def test_what_is_switched_off_stays(flag):
    parts = {"meta_policy": ("policy", "log_std", "log_temperature"), "meta_action_selection": ("optimism",)}
    parts["meta_value"] = ("centers", "log_width", "prior_mean", "log_precision", "log_noise")
    agent, batch = play(SPACES[1], **{flag: False})
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.01)
    for _ in range(3):
        losses = meta_loss(agent, batch, torch.arange(4))
        loss = losses["policy_loss"] + losses["value_loss"]
        if flag != "meta_value":  # as in the training loop
            loss = loss + critic_loss(agent, batch, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in agent.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(parts[flag]), name


def test_units_of_rewards():
    agent, rewards = Agent(2, SPACES[0], Args(critic_gamma=0.4)), torch.tensor([0.0, 3.0, -1.0, 2.0])
    agent.set_units(torch.randn(4, 2), rewards)
    scale = np.sqrt(14 / 3)  # root mean square of the rewards that are not zero
    assert agent.reward_scale.item() == pytest.approx(scale)
    torch.testing.assert_close(agent.prior_mean[:, 0], torch.full((3,), 1.0 / scale / 0.6))


def test_tabular_mdp():
    envs, num = TabularMDP(4000), 4000
    tasks = envs.sample_tasks(num, np.random.default_rng(0))
    p, means = tasks[..., :10], tasks[..., 10]
    np.testing.assert_allclose(p.sum(-1), 1)
    assert abs(p.mean() - 0.1) < 1e-6 and abs(p.var() - 0.09 / 11) < 1e-4  # Dirichlet(1)
    assert abs(means.mean() - 1) < 0.01 and abs(means.std() - 1) < 0.01
    envs.task = [tasks[0]] * num
    obs, _ = envs.reset(seed=1)
    assert (obs.argmax(-1) == 0).all() and (obs.sum(-1) == 1).all()
    obs, rewards, _, _, _ = envs.step(np.full(num, 2))
    frequencies = np.bincount(obs.argmax(-1), minlength=10) / num
    assert np.abs(frequencies - tasks[0, 0, 2, :10]).max() < 5 * 0.5 / num**0.5
    assert abs(rewards.mean() - means[0, 0, 2]) < 5 / num**0.5 and abs(rewards.std() - 1) < 0.06
    assert rewards[0] != rewards[1]  # the noise of one task is not that of another
    ends = [envs.step(np.zeros(num, dtype=int))[3] for _ in range(9)]
    assert not np.any(ends[:-1]) and ends[-1].all()


def test_building_an_environment_changes_no_draw():
    np.random.seed(3), torch.manual_seed(3)
    expected = np.random.random(), torch.rand(1).item()
    np.random.seed(3), torch.manual_seed(3)
    TabularMDP(2)
    assert (np.random.random(), torch.rand(1).item()) == expected


def test_posterior_finds_true_mean_rewards():
    """With gamma = 0, and features that tell the states apart, Q is the mean reward; margin 6 standard errors."""
    agent = Agent(3, SPACES[0], Args(num_features=1, critic_gamma=0.0))
    means, states, actions = torch.randn(3, 3), torch.arange(1800) % 3, torch.arange(1800) // 3 % 3
    f = agent.critic_features(torch.eye(3)).detach()
    rewards = means[states, actions] + torch.randn(1800)
    with torch.no_grad():
        posterior = Posterior(agent, 1)
        for s, a, r in zip(states, actions, rewards, strict=True):
            posterior.update((agent.action_features(a)[:, None] * f[s])[None], r[None])
        q = torch.stack([posterior.predict(x[None])[0][0] for x in f])
    assert (q - means).abs().max() < 6 / 200**0.5


def test_evaluation_longer_than_training():
    agent, envs = make_agent(gym.spaces.Discrete(5), obs_dim=10), TabularMDP(3)
    tasks = list(envs.sample_tasks(4, np.random.default_rng(0)))
    results = script.evaluate(agent, envs, tasks, Args(eval_episodes=25))
    assert [*results] == [*range(1, 11), "trial"] and all(len(x) == 4 for x in results.values())
    torch.testing.assert_close(sum(results[k] for k in range(1, 11)), results["trial"])
