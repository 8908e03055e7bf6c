"""The mathematics of mrl_actor_critic.py: posterior, evidence, actor, features, advantages, units, and its task family."""

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
        self.terminated = []  # of each step

    def sample_tasks(self, num_tasks, rng):
        return rng.normal(size=num_tasks)

    def step(self, actions):
        self.state = self.state + self.np_random.normal(size=self.state.shape)
        self.steps += 1
        rewards = self.tasks + self.state[:, 0] + np.reshape(actions, (self.num_envs, -1)).sum(-1)
        self.terminated.append(self.np_random.random(self.num_envs) < 0.2)
        return self.observe(), rewards, self.terminated[-1], self.steps >= 6, {}


def make_agent(space, obs_dim=2, **settings):
    """An agent in general position: every parameter, also those that start at zero, has some value."""
    obs, rewards = 1 + 2 * torch.randn(20, obs_dim), 1.7 * torch.randn(20)
    agent = Agent(obs, rewards, space, Args(**{"hidden_size": 8, "num_features": 2} | settings))
    for parameter in agent.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    agent.return_mean.fill_(0.3), agent.return_std.fill_(1.5)
    return agent


def play(space, num_episodes=2, **settings):
    agent, envs = make_agent(space, **settings), EarlyEnd(4, space)
    batch = rollout(agent, envs, list(envs.sample_tasks(4, np.random.default_rng(0))), num_episodes, 1)
    batch["terminated"] = torch.as_tensor(np.stack(envs.terminated))
    batch["advantages"], batch["returns"] = torch.randn_like(batch["rewards"]), torch.randn_like(batch["rewards"])
    assert 0 < batch["masks"].mean() < 1  # some trials end before others
    return agent, batch


def rows(agent, batch):
    """d (L, M, K F), by the definition, and rewards in the critic's units."""
    f, next_f = (agent.critic_features(agent.encode(batch[name]))[..., None, :] for name in ("obs", "after"))
    d = agent.action_features(batch["actions"])[..., None] * f - batch["next_x"][..., None] * next_f
    return d.flatten(2), (batch["rewards"] / agent.reward_scale).clip(-3, 3)


def test_posterior_is_batch_regression():
    agent, steps = make_agent(SPACES[0]), 70
    with torch.no_grad():
        mean, variance, noise = agent.prior()
        posterior, d, r = Posterior(agent, 2), torch.randn(steps, 2, *mean.shape), torch.randn(steps, 2)
        for t in range(steps):
            posterior.update(d[t], r[t])
        f = torch.randn(2, mean.shape[1])
        q, covariance = posterior.predict(f)
        for m in range(2):
            D, prior = d[:, m].flatten(1), (1 / variance.flatten()).diag()
            C = torch.linalg.inv(prior + D.T @ D / noise)
            w = C @ (prior @ mean.flatten() + D.T @ r[:, m] / noise)
            X = torch.kron(torch.eye(len(mean)), f[m][None])  # q = X w
            torch.testing.assert_close(posterior.mean[m].flatten(), w)
            torch.testing.assert_close(posterior.variance[m].flatten(), C.diagonal())
            torch.testing.assert_close(q[m], X @ w)
            torch.testing.assert_close(covariance[m], X @ C @ X.T)


@pytest.mark.parametrize("space", SPACES)
def test_critic_loss_is_the_evidence(space):
    agent, batch = play(space)
    with torch.no_grad():
        (d, r), (mean, variance, noise), evidence = rows(agent, batch), agent.prior(), 0.0
        for m in range(4):
            real = batch["masks"][:, m] > 0
            D, rewards = d[real, m], r[real, m]
            covariance = (D * variance.flatten()) @ D.T
            covariance += (noise + 1e-5 * covariance.diagonal()).diag()  # so that float32 can factor it
            normal = torch.distributions.MultivariateNormal(D @ mean.flatten(), covariance)
            evidence += normal.log_prob(rewards) + 0.5 * np.log(2 * np.pi) * len(D)
        loss = critic_loss(agent, batch, torch.arange(4))
    torch.testing.assert_close(loss, -evidence / batch["masks"].sum())


def test_learner_outlasts_rounding():
    """Many steps along few directions: what is left of the variance is less than what float32 can tell from zero."""
    torch.set_default_dtype(torch.float32)
    agent, steps = make_agent(SPACES[0]), 300
    agent.log_noise_std.data.fill_(-5), agent.log_variance.data.fill_(5)
    with torch.no_grad():
        posterior, directions = Posterior(agent, 50), 9 * torch.randn(50, 3, *agent.prior_mean.shape)
        for t in range(steps):
            posterior.update(directions[:, t % 3], torch.ones(50))
        assert posterior.mean.isfinite().all()
        torch.testing.assert_close((directions * posterior.mean[:, None]).sum((-2, -1)), torch.ones(50, 3), atol=0.1, rtol=0)


@pytest.mark.parametrize("space", SPACES)
def test_rollout_is_its_replay(space):
    """All that was stored, once more from obs, actions and rewards, trial by trial, by a Kalman filter of whole matrices."""
    agent, batch = play(space, num_episodes=3)
    episodes, terminated = batch["episodes"], batch["terminated"]
    with torch.no_grad():
        (d, r), (mean, variance, noise), at_centres = rows(agent, batch), agent.prior(), agent.critic_features(agent.centres)
        for m in range(4):
            w, C, step = mean.flatten(), variance.flatten().diag(), 0
            for t in range(len(r)):
                stored = {name: x[t, m] for name, x in batch.items()}
                s, next_s = ((stored[name] - agent.obs_mean) / agent.obs_std for name in ("obs", "after"))
                f, W, V = agent.critic_features(s), w.view_as(mean), C.diagonal().view_as(mean)
                X, left = torch.kron(torch.eye(len(mean)), f[None]), max(3 - int(episodes[t, m]), 1)
                new = {"q": X @ w, "covariance": X @ C @ X.T, "clock": torch.tensor([left / 3, 1 / left, 1 - step / 6])}
                inputs = [s, f, w - mean.flatten(), (1 - V / variance).flatten(), new["q"] - agent.discrete * new["q"].mean()]
                inputs += [new["covariance"].diagonal().sqrt(), new["clock"]]
                for centre_q in (at_centres @ W.T, at_centres @ W.T + (at_centres**2 @ V.T).sqrt()):
                    weights = ((centre_q.max(1).values if agent.discrete else centre_q[:, 0]) / 0.1).exp()
                    inputs.append(weights @ agent.centres / weights.sum() - s)
                new["inputs"], following = torch.cat(inputs), W @ agent.critic_features(next_s) / 0.5
                new["values"] = agent.return_mean + agent.return_std * agent.network(new["inputs"])[-1]
                softmax = following.exp() / following.exp().sum()
                following = softmax if agent.discrete else torch.cat([torch.ones(1), following[1:].clamp(-1, 1)])
                new["next_x"] = agent.critic_gamma * following * ~terminated[t, m]
                new["masks"] = (episodes[t, m] < 3).double()
                for name, x in new.items():
                    torch.testing.assert_close(stored[name], x, msg=f"{name} of step {t} of trial {m}")
                if new["masks"]:
                    gain = C @ d[t, m] / (noise + d[t, m] @ C @ d[t, m])
                    w, C = w + gain * (r[t, m] - d[t, m] @ w), C - torch.outer(gain, d[t, m] @ C)
                step = 0 if terminated[t, m] or step == 5 else step + 1
                if t + 1 < len(r):
                    assert episodes[t + 1, m] == episodes[t, m] + (step == 0)
                    assert torch.equal(batch["obs"][t + 1, m], stored["after"] * (step > 0))
    assert (batch["next_x"][..., 1:].abs() == agent.critic_gamma).any() != agent.discrete  # the clamp was met


def ppo_losses(agent, batch, **kwargs):
    """Of all real steps, in the order of a random permutation."""
    flat = {name: x[batch["masks"] > 0] for name, x in batch.items()}
    return meta_loss(agent, flat, torch.randperm(len(flat["q"]), generator=torch.Generator().manual_seed(0)), **kwargs)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("part", ["critic", "meta"])
def test_gradients_are_finite_differences(space, part):
    agent, batch = play(space)

    def loss():
        if part == "critic":
            return critic_loss(agent, batch, torch.arange(4))
        losses = ppo_losses(agent, batch, clip_coef=100.0)
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
    for name in ("obs", "after", "next_x", "inputs", "q", "clock", "rewards", "advantages", "returns", "logprobs"):
        masks = batch["masks"].view(*batch["masks"].shape, *[1] * (batch[name].dim() - 2))
        changed[name] = batch[name] + 5 * (1 - masks)
    torch.testing.assert_close(critic_loss(agent, changed, torch.arange(4)), critic_loss(agent, batch, torch.arange(4)))
    before, after = (ppo_losses(agent, x) for x in (batch, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("space", SPACES)
def test_actor_in_closed_form(space):
    agent, batch = play(space)
    i, q, C, clock = (batch[name][3, 0] for name in ("inputs", "q", "covariance", "clock"))
    with torch.no_grad():
        policy, outputs, temperature = agent(i, q, C, clock)[0], agent.network(i)[:-1], agent.log_temperature.exp()
        a, b, c = agent.optimism
        beta = a + b * (1 / clock[1]).log() + c * clock[2]
    if agent.discrete:
        weights = outputs.softmax(-1) * ((q + beta * C.diagonal().sqrt()) / temperature).exp()
        torch.testing.assert_close(policy.probs, weights / weights.sum())
        return
    start, std = outputs[:2], (outputs[2:] - 0.5).exp()
    action = start.clone().requires_grad_()
    x = torch.cat([torch.ones(1), action])
    (gradient,) = torch.autograd.grad(x @ q + beta * (x @ C @ x).sqrt(), action)
    torch.testing.assert_close(policy.mean, start + std**2 / temperature * gradient)
    actions = batch["actions"][3, 0]
    density = -0.5 * ((actions - policy.mean) / std) ** 2 - std.log() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(policy.log_prob(actions), density.sum())
    agent.network[-1].bias.data[2:4] = torch.tensor([-1e9, 1e9])
    torch.testing.assert_close(agent(i, q, C, clock)[0].stddev.log(), torch.tensor([-5.0, 2.0]))


def test_critic_learns_from_actions_as_they_are_executed():
    agent = Agent(torch.randn(9, 2), torch.zeros(9), SPACES[1], Args(num_features=3))
    found = agent.action_features(torch.tensor([[3.0, -2.0], [0.5, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, -1.0], [1.0, 0.5, 0.0]]))


@pytest.mark.parametrize("space", SPACES)
def test_meta_loss_is_clipped_ppo(space):
    agent, batch = play(space)
    losses = ppo_losses(agent, batch, clip_coef=1e-5)
    assert losses["clipfrac"] == 0 and losses["approx_kl"].abs() < 1e-10  # the ratio is one before any step
    real, shift = batch["masks"] > 0, 0.3 * torch.randn_like(batch["masks"])
    losses = ppo_losses(agent, batch | {"logprobs": batch["logprobs"] - shift})
    ratio, advantages = shift[real].exp(), batch["advantages"][real]
    ratio = torch.where(advantages > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8))
    torch.testing.assert_close(losses["policy_loss"], -(ratio * advantages).mean())
    errors = (batch["values"] - batch["returns"])[real] / agent.return_std
    torch.testing.assert_close(losses["value_loss"], errors.square().mean())


@pytest.mark.parametrize("space", SPACES)
def test_without_exploration_actions_are_the_most_probable(space):
    agent = make_agent(space)
    batch = rollout(agent, EarlyEnd(4, space), [0.0] * 4, 2, 1, explore=False)
    policy, _ = agent(*(batch[name] for name in ("inputs", "q", "covariance", "clock")))
    torch.testing.assert_close(batch["actions"], policy.mode)


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


def test_centres_and_features_of_few_observations():
    """A centre for each distinct one, where its own feature is the largest."""
    distinct = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    obs = distinct[[3, 3, 0, 1, 4, 2, 0, 1, 2, 2]]
    agent = Agent(obs, torch.zeros(10), SPACES[0], Args(num_features=5))
    assert agent.tabular and agent.centres.shape == (5, 2)
    features = agent.critic_features(agent.encode(distinct))
    torch.testing.assert_close(agent.centres[features.argmax(-1)], (distinct - obs.mean(0)) / obs.std(0, correction=0))
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    assert not Agent(obs, torch.zeros(10), SPACES[0], Args(num_features=4)).tabular


def test_centres_and_features_of_many_observations():
    obs = torch.randn(60, 2) * torch.tensor([3.0, 0.01]) + 5
    agent = Agent(obs, torch.zeros(60), SPACES[0], Args(num_features=6))
    encoded, centres = (obs - obs.mean(0)) / torch.stack([obs[:, 0].std(correction=0), torch.tensor(0.1)]), agent.centres
    assert not agent.tabular and centres.shape == (6, 2)
    for k in range(1, 6):  # each is the observation farthest from the centres before
        distances = torch.cdist(encoded, centres[:k]).amin(1)
        torch.testing.assert_close(centres[k], encoded[distances.argmax()])
    torch.testing.assert_close(agent.log_width.exp(), 0.4 * distances.max())
    s = agent.encode(torch.cat([obs, torch.tensor([[1e6, -1e6]])]))
    torch.testing.assert_close(s, torch.cat([encoded, torch.tensor([[10.0, -10.0]])]))
    agent.log_width.data -= 5  # so narrow that all would be zero, were they not of length 1
    near = -((torch.cdist(s, agent.centres) / agent.log_width.exp()) ** 2)
    near = (near - near.amax(-1, keepdim=True)).exp()
    features = torch.cat([torch.ones(61, 1), s / 3, (near / near.sum(-1, keepdim=True)).sqrt()], dim=-1)
    torch.testing.assert_close(agent.critic_features(s), features)


@pytest.mark.parametrize("space", SPACES)
def test_ways_lead_to_the_most_valuable_centres(space):
    agent = Agent(torch.eye(4), torch.zeros(4), space, Args())
    posterior, s, k = Posterior(agent, 1), agent.centres[:1], 2 * agent.discrete  # any action counts; for a Box, a = 0 alone
    posterior.mean, posterior.variance = torch.zeros(1, 3, 4), torch.full((1, 3, 4), 1e-4)
    posterior.mean[0, k, 1], posterior.variance[0, k, 2] = 5, 100  # the best as far as is known, and the best that may be
    posterior.mean[0, 1, 3] = 50 * (not agent.discrete)  # the slope at another centre
    f = agent.critic_features(s)
    ways = agent.make_input(s, f, posterior, *posterior.predict(f), torch.ones(1, 3))[0, -8:].view(2, 4)
    torch.testing.assert_close(ways, agent.centres[1:3] - s)


@pytest.mark.parametrize("flag", ["meta_policy", "meta_value", "meta_action_selection"])
def test_what_is_switched_off_stays(flag):
    parts = {"meta_policy": ("log_temperature",), "meta_action_selection": ("optimism",)}
    parts["meta_value"] = ("centres", "log_width", "prior_mean", "log_variance", "log_noise_std")
    agent, batch = play(SPACES[1], **{flag: False})
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.01)
    for _ in range(3):
        losses = ppo_losses(agent, batch)
        loss = losses["policy_loss"] + losses["value_loss"] + critic_loss(agent, batch, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in agent.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(parts[flag]), name
    inputs, *others = (batch[name] for name in ("inputs", "q", "covariance", "clock"))
    (policy, _), (other, _) = agent(inputs, *others), agent(inputs + 1, *others)
    assert torch.equal(policy.mean, other.mean) == (flag == "meta_policy")  # the network's other output learns all the same
    other, _ = agent(inputs, others[0], torch.eye(3), others[2])
    assert torch.equal(policy.mean, other.mean) == (flag == "meta_action_selection")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("num_features", [2, 32])
def test_units_of_rewards(space, num_features):
    args = Args(num_features=num_features)
    agent = Agent(torch.randn(4, 2), torch.tensor([0.0, 3.0, -1.0, 2.0]), space, args)
    scale = np.sqrt(14 / 3)  # root mean square of the rewards that are not zero
    assert agent.reward_scale.item() == agent.return_std.item() == pytest.approx(scale)
    level = torch.zeros_like(agent.prior_mean)  # on the constant, or on each place if there is none; a = 0 for a Box
    level[: None if agent.discrete else 1, : None if num_features == 32 else 1] = 1.0 / scale / 0.6
    torch.testing.assert_close(agent.prior_mean.detach(), level)


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


def test_evaluation_longer_than_training():
    agent, envs = make_agent(gym.spaces.Discrete(5), obs_dim=10), TabularMDP(4, n=20)
    tasks = list(envs.sample_tasks(4, np.random.default_rng(0)))
    results = script.evaluate(agent, envs, tasks, Args())
    assert [*results] == [*range(1, 11), "trial"] and all(len(x) == 4 for x in results.values())
    torch.testing.assert_close(sum(results[k] for k in range(1, 11)), results["trial"])


@pytest.mark.parametrize("space", SPACES)
def test_update_computes_on_the_device_of_its_input(space):
    """Without a GPU: torch's meta device refuses to mix with tensors that some line makes on the CPU."""
    agent, batch = play(space)
    agent, batch = agent.to("meta"), {name: x.to("meta") for name, x in batch.items()}
    flat, inds = {name: x.flatten(0, 1) for name, x in batch.items()}, torch.arange(4, device="meta")
    (sum(meta_loss(agent, flat, inds).values()) + critic_loss(agent, batch, inds)).backward()
    assert all(p.grad.device.type == "meta" for p in agent.parameters() if p.numel())


@pytest.mark.parametrize("few", [True, False])
def test_saved_agent_meets_other_observations(few):
    """Those of a family with other arguments: the number of centres is that of the checkpoint, and so is what it computes."""
    obs, rewards, settings = torch.randn(3 if few else 30, 2), torch.randn(30), Args(num_features=6, hidden_size=8)
    old = Agent(obs, rewards, SPACES[0], settings)
    new = Agent(torch.randn(50, 2), rewards, SPACES[0], settings, old.state_dict())
    new.load_state_dict(old.state_dict())
    assert old.tabular == new.tabular == few
    torch.testing.assert_close(new.critic_features(new.encode(obs)), old.critic_features(old.encode(obs)))
