"""The mathematics of mrl_rl2.py: families against their definitions, advantages and inputs against theirs."""

import functools
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import mrl_rl2
from mrl_rl2 import Agent, compute_gae, meta_loss, rollout, sample_actions, stream, trial_returns

RESULTS = Path(__file__).parent / "results"


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


gym.register("Countdown-v0", entry_point=Countdown, max_episode_steps=4)


def make(env_id, num_envs, seed=0, **kwargs):
    vector_kwargs = {"vector_kwargs": {"autoreset_mode": "Disabled"}} if env_id == "Countdown-v0" else {}
    envs = gym.make_vec(env_id, num_envs, **vector_kwargs, **kwargs)
    torch.manual_seed(seed)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, hidden_size=16)
    torch.nn.init.normal_(agent.actor.weight, std=0.5)
    tasks = mrl_rl2.task_family(envs).sample_tasks(num_envs, stream(seed, 0))
    return envs, agent, tasks


def play(env_id, num_envs, num_episodes, seed=0, **kwargs):
    envs, agent, tasks = make(env_id, num_envs, seed, **kwargs)
    seeds = stream(seed, 1).integers(2**31, size=num_envs).tolist()
    return agent, rollout(agent, envs, tasks, num_episodes, seeds, torch.Generator().manual_seed(seed)), tasks


# The algorithm


@pytest.mark.parametrize("env_id", ["GridNavi-v0", "Countdown-v0"])
def test_first_epoch_recomputes_the_rollout(env_id):
    """Trap 5: hidden states of the update are those of the rollout, so the ratio is 1 before the first step."""
    agent, batch, _ = play(env_id, 8, 3)
    batch["advantages"] = torch.randn_like(batch["rewards"])
    batch["returns"] = torch.zeros_like(batch["rewards"])
    params, values, _ = agent(batch["inputs"])
    logprobs = mrl_rl2.policy_distribution(params, agent.log_std, agent.discrete).log_prob(batch["actions"])
    torch.testing.assert_close((logprobs - batch["logprobs"]).exp(), torch.ones_like(logprobs), atol=1e-5, rtol=0)
    torch.testing.assert_close(values, batch["values"], atol=1e-5, rtol=0)
    agent.return_std.fill_(1.0)
    *_, approx_kl, clipfrac = meta_loss(agent, batch, np.arange(8), batch["masks"].sum(), clip_coef=0.2)
    assert abs(approx_kl) < 1e-5 and clipfrac == 0


def test_sequence_pass_equals_step_by_step_pass():
    agent, batch, _ = play("GridNavi-v0", 4, 2)
    whole, _, last = agent(batch["inputs"])
    hidden, steps = None, []
    for inputs in batch["inputs"]:
        params, _, hidden = agent(inputs[None], hidden)
        steps.append(params[0])
    torch.testing.assert_close(whole, torch.stack(steps), atol=1e-5, rtol=0)
    torch.testing.assert_close(last, hidden, atol=1e-5, rtol=0)


def test_each_unit_starts_as_a_memory_of_a_few_transitions():
    """With one-hot observations the logit of an update gate is the threshold + N(0, 2 gain^2): a unit writes for 12.9% of all
    pairs of observation and action, and keeps its state for the others. The margin is four standard errors over units."""
    torch.manual_seed(0)
    agent = Agent(10, gym.spaces.Discrete(5), hidden_size=2048)
    pairs = torch.cartesian_prod(torch.arange(10), torch.arange(5))
    inputs = torch.zeros(1, 50, 27)
    inputs[0, range(50), 10 + pairs[:, 0]] = inputs[0, range(50), 20 + pairs[:, 1]] = inputs[..., 25] = 1
    kept = agent(inputs, torch.ones(1, 50, 2048))[2] - agent(inputs, torch.zeros(1, 50, 2048))[2]  # the update gates
    writes = (kept[0] < 0.5).double().mean(0)
    assert abs(writes.mean() - 0.1289) < 4 * writes.std() / 2048**0.5


def test_the_hidden_state_makes_weights_on_the_observation():
    """Where nothing comes through the layer, actor and critic are linear in the observation, with the weights made for it."""
    envs, agent, _ = make("GridNavi-v0", 1)
    torch.nn.init.zeros_(agent.actor.weight), torch.nn.init.zeros_(agent.critic.weight)
    torch.nn.init.normal_(agent.hypernetwork.weight)
    agent.return_std.fill_(1.0)
    hidden, inputs = torch.randn(1, 4, 16), torch.rand(1, 4, 11)
    params, values, memory = agent(inputs, hidden)
    weights = agent.hypernetwork(memory[0]).view(4, 6, 2)
    expected = torch.einsum("mad,md->ma", weights, inputs[0, :, :2])
    torch.testing.assert_close(torch.cat([params[0], values[0, :, None]], dim=-1), expected)


def test_gae_equals_its_definition_over_the_whole_trial():
    """Trap 6: sums of TD errors run across episode ends and stop at the end of the trial, whose value is zero."""
    rng, gamma, lam = np.random.default_rng(0), 0.9, 0.7
    lengths = [12, 7]  # steps of the two trials; episode ends inside them are of no account
    rewards, values = rng.normal(size=(2, 12, 2))
    masks = np.array([[float(t < n) for n in lengths] for t in range(12)])
    expected = np.zeros((12, 2))
    for m, n in enumerate(lengths):
        following = np.append(values[1:n, m], 0.0)
        delta = rewards[:n, m] + gamma * following - values[:n, m]
        for t in range(n):
            expected[t, m] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    advantages = compute_gae(*(torch.as_tensor(x) for x in (rewards, values, masks)), gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)


def test_inputs_at_episode_boundaries():
    """Traps 7, 8, 14: what is read is the last step, its raw reward and the episode's end, beside the next observation,
    and no row of the batch is one of gymnasium's autoreset rows."""
    agent, batch, tasks = play("Countdown-v0", 16, 3)
    inputs, masks, episodes = batch["inputs"], batch["masks"].bool(), batch["episodes"]
    obs, previous_obs, action, reward, ended = inputs.split([2, 2, 3, 1, 1], dim=-1)
    assert (inputs[0, :, 2:] == 0).all()
    torch.testing.assert_close(previous_obs[1:], obs[:-1])
    torch.testing.assert_close(action[1:].argmax(-1), batch["actions"][:-1])
    torch.testing.assert_close(reward[1:, :, 0], batch["rewards"][:-1])
    torch.testing.assert_close(ended[1:, :, 0], (episodes[1:] - episodes[:-1]).float())
    both_ends = set()
    for m, task in enumerate(tasks):  # each episode by hand, from its first observation
        real = masks[:, m]
        for k in range(3):
            rows = (real & (episodes[:, m] == k)).nonzero().flatten().tolist()
            length = int(obs[rows[0], m, 0])
            assert len(rows) == min(length, 4)
            both_ends.add(length > 4)
            assert obs[rows, m, 1].tolist() == list(range(len(rows)))
            by_hand = [task * float(batch["actions"][t, m] == 1) + 0.1 * (i + 1) for i, t in enumerate(rows)]
            np.testing.assert_allclose(batch["rewards"][rows, m], by_hand, rtol=1e-5)
            expected_return = trial_returns(batch["rewards"], episodes, batch["masks"], 3)[k, m]
            np.testing.assert_allclose(expected_return, sum(by_hand), rtol=1e-4, atol=1e-5)
    assert both_ends == {True, False}


def test_continuous_log_probability_is_summed_over_dimensions():
    """Trap 4, and trap 18: a log-std that ran away is clamped."""
    mean, x = torch.randn(2, 5, 3, dtype=torch.float64)
    log_std = torch.tensor([-0.5, 0.0, 0.7], dtype=torch.float64)
    policy = mrl_rl2.policy_distribution(mean, log_std, discrete=False)
    by_hand = (-0.5 * ((x - mean) / log_std.exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    torch.testing.assert_close(policy.log_prob(x), by_hand)
    policy = mrl_rl2.policy_distribution(mean, torch.tensor([-1e9, 0, 1e9], dtype=torch.float64), discrete=False)
    assert torch.isfinite(policy.log_prob(x)).all() and torch.isfinite(policy.entropy()).all()


def test_sampled_actions_follow_the_policy_and_do_not_depend_on_the_split():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    num = 40_000
    policy = mrl_rl2.policy_distribution(probs.log().expand(num, 4), torch.zeros(0), discrete=True)
    actions = sample_actions(policy, torch.Generator().manual_seed(0), (0, 1))
    frequencies = actions.bincount(minlength=4) / num
    assert ((frequencies - probs).abs() < 4 * (probs * (1 - probs) / num).sqrt()).all()
    half = mrl_rl2.policy_distribution(probs.log().expand(num // 2, 4), torch.zeros(0), discrete=True)
    for rank in range(2):
        share = sample_actions(half, torch.Generator().manual_seed(0), (rank, 2))
        assert (share == actions[rank::2]).all()


# The task families


def start(env_id, num_envs, seed=0, **kwargs):
    envs = gym.make_vec(env_id, num_envs, **kwargs)
    tasks = envs.sample_tasks(num_envs, stream(seed, 0))
    envs.set_attr("task", tasks)
    envs.reset(seed=stream(seed, 1).integers(2**31, size=num_envs).tolist())
    return envs, tasks


def test_bandit_is_as_defined():
    envs, tasks = start("Bandit-v0", 20_000, k=3, n=7)
    assert envs.episodes_per_trial == 7 and envs.single_action_space.n == 3
    p = np.array(tasks)
    assert abs(p.mean() - 0.5) < 4 * np.sqrt(1 / 12 / p.size) and p.min() < 1e-3 and p.max() > 1 - 1e-3
    for arm in range(3):
        obs, rewards, terminated, truncated, _ = envs.step(np.full(20_000, arm))
        assert (terminated | truncated).all() and set(rewards) == {0.0, 1.0} and (obs == 0).all()
        noise = rewards - p[:, arm]
        assert abs(noise.mean()) < 4 * np.sqrt(1 / 6 / 20_000)  # E[p (1 - p)] = 1/6
        envs.reset(options={"reset_mask": np.ones(20_000, dtype=bool)})


def test_tabular_mdp_is_as_defined():
    envs, tasks = start("TabularMDP-v0", 4000, n=3)
    transitions, mean_rewards = (np.array(x) for x in zip(*tasks, strict=True))
    assert envs.episodes_per_trial == 3 and transitions.shape == (4000, 10, 5, 10) and mean_rewards.shape == (4000, 10, 5)
    np.testing.assert_allclose(transitions.sum(-1), 1)
    # Dirichlet(1, ..., 1) over 10: mean 1/10, variance 9/1100; means of rewards N(1, 1)
    assert abs(transitions[..., 0].var() - 9 / 1100) < 4 * 9 / 1100 * np.sqrt(8 / transitions[..., 0].size)
    assert abs(mean_rewards.mean() - 1) < 4 / np.sqrt(mean_rewards.size) and abs(mean_rewards.std() - 1) < 0.02
    at, rng, states = np.arange(4000), np.random.default_rng(0), np.zeros(4000, dtype=int)
    noises, surprises = [], []
    for t in range(10):
        actions = rng.integers(5, size=4000)
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        new_states = obs.argmax(-1)
        assert (obs.sum(-1) == 1).all() and (terminated | truncated).all() == (terminated | truncated).any() == (t == 9)
        noises.append(rewards - mean_rewards[at, states, actions])
        surprises.append((new_states == 4) - transitions[at, states, actions, 4])
        states = new_states
    noises, surprises = np.array(noises), np.array(surprises)
    assert abs(noises.mean()) < 4 / np.sqrt(noises.size) and abs(noises.var() - 1) < 4 * np.sqrt(2 / noises.size)
    assert abs(surprises.mean()) < 4 * surprises.std() / np.sqrt(surprises.size)
    obs, _ = envs.reset(options={"reset_mask": np.ones(4000, dtype=bool)})
    assert (obs.argmax(-1) == 0).all()


def test_grid_navi_is_as_defined():
    envs, tasks = start("GridNavi-v0", 2000)
    assert len({tuple(goal) for goal in tasks}) == 21 and not any(max(goal) <= 1 for goal in tasks)
    position, rng, goals = np.zeros((2000, 2), dtype=int), np.random.default_rng(0), np.array(tasks)
    for t in range(15):
        actions = rng.integers(5, size=2000)
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        moves = np.array([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])
        position = np.clip(position + moves[actions], 0, 4)
        assert (obs == position).all()
        assert (rewards == np.where((position == goals).all(1), 1.0, -0.1)).all()
        assert (terminated | truncated).all() == (terminated | truncated).any() == (t == 14)
    # known goal: straight there, then stay; the mean over the 21 goals is 11.071
    distance = goals.sum(1)
    returns = [16 - d - 0.1 * (d - 1) for d in (g.sum() for g in mrl_rl2.GridNavi.goals)]
    assert abs(np.mean(returns) - 11.071) < 1e-3 and distance.min() == 2


@pytest.mark.parametrize("env_id", ["Bandit-v0", "TabularMDP-v0", "GridNavi-v0"])
def test_streams_and_arrays_are_not_shared(env_id):
    """Traps 12 and 16: no global random state, different noise in each sub-environment, the same noise under any split,
    and no array handed out is written to again."""
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    kept = []
    envs, tasks = start(env_id, 64)
    envs.set_attr("task", [tasks[0]] * 64)  # one task, so that noise alone tells sub-environments apart
    obs, _ = envs.reset(seed=list(range(64)))
    halves = [gym.make_vec(env_id, 32) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.set_attr("task", [tasks[0]] * 32)
        half.reset(seed=list(range(64))[rank::2])
    rewards = []
    for t in range(3):
        kept.append((obs, obs.copy()))
        actions = np.full(64, (t + 1) % 5)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        shares = [half.step(actions[:32]) for half in halves]
        for rank in range(2):
            np.testing.assert_array_equal(shares[rank][0], obs[rank::2])
            np.testing.assert_array_equal(shares[rank][1], reward[rank::2])
        rewards.append(reward)
        if (terminated | truncated).any():
            for e in (envs, *halves):
                obs_after = e.reset(options={"reset_mask": np.ones(e.num_envs, dtype=bool)})[0]
            obs = obs_after if len(obs_after) == 64 else obs
    if env_id != "GridNavi-v0":  # which has no noise
        assert len({tuple(r) for r in np.array(rewards).T}) >= 4
    assert all((old == copy).all() for old, copy in kept)
    assert not any(np.shares_memory(a, b) for (a, _), (b, _) in pairwise(kept))
    assert (np.random.get_state()[1] == numpy_state).all() and (torch.get_rng_state() == torch_state).all()


@pytest.mark.parametrize("env_id", ["Bandit-v0", "TabularMDP-v0"])
def test_heldout_tasks_are_never_trained_on(env_id):
    """Trap 11: the draws of training, for fixed and for fresh tasks, have no task in common with the held-out ones."""
    envs = gym.make_vec(env_id, 1)

    def flat(task):
        return tuple(np.concatenate([np.ravel(x) for x in task]) if isinstance(task, tuple) else task)

    heldout = {flat(task) for task in envs.sample_tasks(200, stream(1, 0, mrl_rl2.HELDOUT_TASKS))}
    trained = {flat(task) for task in envs.sample_tasks(200, stream(1, 0, mrl_rl2.TRAIN_TASKS))}
    for iteration in range(1, 4):
        trained |= {flat(task) for task in envs.sample_tasks(200, stream(1, iteration, mrl_rl2.TASKS))}
    assert len(heldout) == 200 and len(trained) == 800 and not heldout & trained


# Against the optimum


def bandit_optimum(k, n):
    """Exact Bayes-optimal return of n pulls of k arms, by dynamic programming over multisets of (successes, failures)."""

    @functools.cache
    def value(arms, left):
        if left == 0:
            return 0.0
        best = 0.0
        for i in {arms.index(arm) for arm in arms}:
            wins, losses = arms[i]
            p = (wins + 1) / (wins + losses + 2)
            rest = arms[:i] + arms[i + 1 :]
            after_win = value(tuple(sorted((*rest, (wins + 1, losses)))), left - 1)
            after_loss = value(tuple(sorted((*rest, (wins, losses + 1)))), left - 1)
            best = max(best, p * (1 + after_win) + (1 - p) * after_loss)
        return best

    return value(((0, 0),) * k, n)


def test_bandit_optimum():
    assert abs(bandit_optimum(1, 10) - 5) < 1e-12
    assert abs(bandit_optimum(2, 1) - 0.5) < 1e-12
    assert abs(bandit_optimum(5, 10) - 6.660) < 5e-4 and abs(bandit_optimum(10, 10) - 6.714) < 5e-4


def evaluate_trained(name, num_tasks):
    """Returns (E, num_tasks) of a trained agent of tests/results on tasks that its training never drew."""
    checkpoint = mrl_rl2.load_checkpoint("--evaluate", RESULTS / name)
    args = mrl_rl2.Args(**checkpoint["args"])
    envs = mrl_rl2.make_envs(args, 1)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args.hidden_size)
    agent.load_state_dict(checkpoint["agent"])
    tasks = envs.sample_tasks(num_tasks, stream(args.seed, 0, mrl_rl2.HELDOUT_TASKS))
    return mrl_rl2.evaluate(agent, args, tasks, envs.episodes_per_trial).double()


def test_trained_bandit_agent_is_near_the_optimum_and_never_above():
    """Thompson sampling has 74.7 (Duan et al. 2016), Gittins index 78.67 there; the margin is four standard errors."""
    totals = evaluate_trained("rl2_bandit_k5_n100.pt", 2_000).sum(0)
    margin = 4 * totals.std().item() / 2_000**0.5
    assert 78.67 + margin > totals.mean() > 78.0 - margin


def test_trained_tabular_mdp_agent_is_above_the_classical_algorithm():
    """OPSRL has 144.1 (Duan et al. 2016); the margin is four standard errors."""
    totals = evaluate_trained("rl2_tabular_mdp_n10.pt", 1_000).sum(0)
    assert totals.mean() > 144.1 - 4 * totals.std().item() / 1_000**0.5


def test_trained_grid_navi_agent_searches_then_remembers():
    """Never above the Bayes-optimal return of the first episode, 4.0, and of later ones, 11.071; above 36.3 in all."""
    returns = evaluate_trained("rl2_grid_navi.pt", 2_000)
    margins = 4 * returns.std(dim=1) / 2_000**0.5
    limits = torch.tensor([4.0, 11.0714, 11.0714, 11.0714])
    assert (returns.mean(1) < limits + margins).all()
    assert returns.sum(0).mean() > 36.3 - 4 * returns.sum(0).std() / 2_000**0.5
