# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "numpy==2.4.6",
#                 "tqdm==4.70.1"]
# ///
"""The meta actor-critic: a meta-policy, a meta-value function and a meta action selection guide an actor-critic in each task.

A trial is E episodes of one task. The learner of a task, in the inner loop, takes no gradient steps: it is the posterior
N(w, C) of the weights of a critic Q(s, a) = x(a)' w f(s), and an actor that follows from it in closed form.

    model      r_t = d_t'w + noise,   d_t = x(a_t) f(s_t) - gamma E_pi x(a') f(s_{t+1}),   w ~ N(w_0, C_0), noise ~ N(0, n)
    critic     w += C d_t (r_t - d_t'w) / (n + d_t'C d_t),   C -= C d_t d_t'C / (n + d_t'C d_t)         after each step
    actor      pi(a|s) ~ pi_theta(a|s, w, C) exp((Q(s, a) + beta sigma(s, a)) / temperature),   sigma^2 = variance of Q

The critic is temporal-difference learning by a Kalman filter (Engel et al. 2005, Geist & Pietquin 2010); the actor is a step
of natural policy gradient from pi_theta. The outer loop learns what guides them, over many tasks:

    meta-policy              pi_theta and the temperature     by PPO, for the return of the whole trial
    meta action selection    the optimism beta                by PPO, for the return of the whole trial
    meta-value function      f, w_0, C_0 and n                by the evidence log p(r_1, ..., r_L) of its model

So PPO's policy remembers by w and C, as that of RL² does by its hidden state. A trial can be longer than those of training.
The algorithm is in # AGENT, # ALGORITHM and # TRAINING.

    python mrl_actor_critic.py                                         # random MDPs, 10 episodes a trial
    python mrl_actor_critic.py --evaluate runs/<run>/checkpoint.pt --eval-episodes 100
    python mrl_actor_critic.py --env-id mrl_rl2:GridNavi-v0            # any family of the other scripts, or your own
    tensorboard --logdir runs

Shapes: M trials in a meta-batch, E episodes a trial, L steps a trial, t steps so far, D observation size, A action size,
K size of x(a), F size of f(s), S real steps of all trials.
"""

import copy
import importlib
import json
import os
import pickle
import shlex
import signal
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT = tyro.conf.create_mutex_group(required=False)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's folder"""
    seed: int = 1
    """seed of every random draw"""
    device: Literal["cpu", "cuda"] = "cpu"
    """networks this small run faster on the cpu"""
    torch_threads: int = 1
    """threads that torch may use; more help only on cores that nothing else uses"""
    env_id: str = "TabularMDP-v0"
    """task family: one of this file, `mrl_maml:PointNav-v0` of another file, or `my_tasks:MyTasks-v0` of your own"""
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """arguments of the task family, for example `k 5 n 100`"""
    total_timesteps: int = 1_500_000
    """environment steps of the whole training"""
    num_train_tasks: int = 0
    """train on this many fixed tasks (0: fresh tasks in each iteration)"""
    eval_every: int = 25
    """iterations between two evaluations on held-out tasks"""
    eval_tasks: int = 200
    """number of held-out tasks, the same ones in each evaluation"""
    runs_dir: str = "runs"
    """folder in which each run gets a folder of its own"""
    resume: Annotated[str | None, CHECKPOINT] = None
    """go on with the run of this checkpoint, in its folder; flags given beside it override saved ones"""
    evaluate: Annotated[str | None, CHECKPOINT] = None
    """evaluate this checkpoint on held-out tasks and exit; flags given beside it override saved ones"""

    # Algorithm specific arguments
    learning_rate: float = 1e-3
    """learning rate of Adam at the start; it falls linearly to zero over the training"""
    num_tasks: int = 0
    """trials in a meta-batch, M (0: as many as make some 16,000 environment steps)"""
    eval_episodes: int = 0
    """episodes of a trial in evaluations (0: as many as in training)"""
    meta_policy: bool = True
    """learn pi_theta and the temperature, or leave them as they are at the start"""
    meta_value: bool = True
    """learn the critic's features, prior and noise, or leave them as they are at the start"""
    meta_action_selection: bool = True
    """learn the optimism, or do without"""
    hidden_size: int = 128
    """units of each of the two hidden layers, of policy and value network"""
    num_features: int = 24
    """learned features of the critic, beside the observation itself"""
    temperature: float = 0.2
    """temperature of the actor at the start, in units of rewards"""
    critic_gamma: float = 0.4
    """discount factor of the critic in a task"""
    gamma: float = 0.99
    """discount factor, over the whole trial"""
    gae_lambda: float = 0.97
    """lambda of generalized advantage estimation, over the whole trial"""
    num_minibatches: int = 4
    """minibatches of whole trials in each epoch"""
    update_epochs: int = 4
    """passes over the meta-batch in each iteration"""
    ent_coef: float = 0.01
    """weight of the entropy of discrete actions at the start; it falls linearly to zero over the training"""


# TASK FAMILIES
class TaskVectorEnv(gym.vector.VectorEnv):
    """Sub-environments side by side: a family draws `tasks`, and moves `state` (M, ...) and returns rewards (M) in `act`."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, num_envs, max_episode_steps, observation_space, action_space):
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = gym.vector.utils.batch_space(observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(action_space, num_envs)
        self.task = self.sample_tasks(num_envs, np.random.default_rng(0))
        self.steps, self.state = np.zeros(num_envs, dtype=np.int64), np.zeros(self.observation_space.shape)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if mask.all():
            self.tasks = np.array(self.task)
        self.steps[mask] = 0
        self.start(mask)
        return self.observe(), {}

    def step(self, actions):
        rewards, self.steps = self.act(actions), self.steps + 1
        truncated = self.steps >= self.max_episode_steps
        return self.observe(), rewards, np.zeros_like(truncated), truncated, {}

    def start(self, mask):
        self.state[mask] = 0

    def observe(self):
        return self.state.astype(np.float32)


class TabularMDP(TaskVectorEnv):
    """10 states, 5 actions, P(.|s,a) ~ Dirichlet(1), mean rewards ~ N(1, 1), observed with noise N(0, 1); 10 steps an
    episode from state 0, n episodes a trial; the observation is the state, one-hot (Duan et al. 2016, 3.2). A task holds the
    transitions and, last of the 11, the mean rewards."""

    def __init__(self, num_envs=1, max_episode_steps=10, n=10):
        self.episodes_per_trial = n
        super().__init__(num_envs, max_episode_steps, gym.spaces.Box(0, 1, (10,)), gym.spaces.Discrete(5))
        self.state = np.zeros(num_envs, dtype=np.int64)

    def sample_tasks(self, num_tasks, rng):
        transitions, mean_rewards = rng.dirichlet(np.ones(10), (num_tasks, 10, 5)), rng.normal(1, 1, (num_tasks, 10, 5, 1))
        return np.concatenate([transitions, mean_rewards], axis=-1)

    def act(self, actions):
        task = self.tasks[np.arange(self.num_envs), self.state, actions]  # (num_envs, 11)
        draws = self.np_random.random((self.num_envs, 1))
        self.state = (task[:, :10].cumsum(axis=-1) < draws).sum(axis=-1).clip(max=9)
        return task[:, 10] + self.np_random.standard_normal(self.num_envs)

    def observe(self):
        return np.eye(10, dtype=np.float32)[self.state]


for family in (TabularMDP,):
    if f"{family.__name__}-v0" not in gym.registry:  # a copy of this file may have brought it
        gym.register(f"{family.__name__}-v0", vector_entry_point=family)


# AGENT
def make_network(inputs, hidden_size, outputs, last_gain):
    layers = [nn.Linear(inputs, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """The three meta parts, and the value network that is PPO's baseline. What is learned in a task is in `Posterior`."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        self.obs_dim, self.discrete = obs_dim, isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        K, F = self.action_dim + (not self.discrete), 1 + obs_dim + args.num_features
        # Meta-value function: features f(s), prior mean and precision of the weights, noise of rewards.
        self.centers = nn.Parameter(torch.randn(args.num_features, obs_dim))
        self.log_width = nn.Parameter(torch.zeros(()))
        self.prior_mean = nn.Parameter(torch.zeros(K, F))
        self.log_precision = nn.Parameter(torch.zeros(K, F))
        self.log_noise = nn.Parameter(torch.zeros(()))
        self.critic_gamma = args.critic_gamma
        # Meta-policy: where the actor of each task starts, and how far it goes from there.
        inputs = obs_dim + 2 * K * F + 2 * K + 3
        self.policy = make_network(inputs, args.hidden_size, self.action_dim, last_gain=0.01)
        self.log_std = nn.Parameter(torch.full((0 if self.discrete else self.action_dim,), -0.5))
        self.log_temperature = nn.Parameter(torch.tensor(args.temperature).log())
        # Meta action selection: optimism = a + b log(episodes left) + c (share of the episode that is left).
        self.optimism = nn.Parameter(torch.tensor([0.0, 0.15, 0.0]) * args.meta_action_selection)
        self.value = make_network(inputs, args.hidden_size, 1, last_gain=1.0)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("reward_scale", torch.ones(()))
        self.register_buffer("return_mean", torch.zeros(()))
        self.register_buffer("return_std", torch.ones(()))
        meta_value = [self.centers, self.log_width, self.prior_mean, self.log_precision, self.log_noise]
        meta_policy = [*self.policy.parameters(), self.log_std, self.log_temperature]
        learned = args.meta_value, args.meta_policy, args.meta_action_selection
        for is_learned, part in zip(learned, (meta_value, meta_policy, [self.optimism]), strict=True):
            for parameter in part:
                parameter.requires_grad_(is_learned)

    def set_units(self, obs, rewards):
        """Takes the units of observations (S, D) and rewards (S), for good: what the network reads must not drift. The critic
        starts from what is usual, the mean reward for ever, with centers all over what was observed."""
        self.obs_mean, self.obs_std = obs.mean(0), obs.std(0).clamp(min=0.1)
        if rewards.any():
            self.reward_scale = (rewards[rewards != 0] ** 2).mean().sqrt()
        level = rewards.mean() / self.reward_scale / (1 - self.critic_gamma)
        self.prior_mean.data[slice(None) if self.discrete else 0, 0] = level
        obs = self.encode(obs)
        distances = torch.full_like(obs[:, 0], torch.inf)  # to the nearest center
        for center in self.centers.data:
            center[:] = obs[distances.argmax()]
            distances = distances.minimum((obs - center).norm(dim=-1))
        self.log_width.data = distances.max().clamp(min=0.3).log()

    def prior(self):
        """Mean w_0 and variances C_0 (K, F) of the critic's weights before any data of a task, and the noise's variance n."""
        return self.prior_mean, (-self.log_precision).exp(), (2 * self.log_noise).exp()

    def encode(self, obs):
        return ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)

    def critic_features(self, obs):
        """f(s) (..., F): a constant, the observation, and bumps around the centers, which tell where something was seen."""
        squares = (self.encode(obs)[..., None, :] - self.centers).square().sum(-1)
        bumps = (-0.5 * squares * (-2 * self.log_width).exp()).exp()
        return torch.cat([torch.ones_like(obs[..., :1]), obs / self.obs_std.clamp(min=1), bumps], dim=-1)

    def action_features(self, actions):
        """x(a) (..., K): a discrete action one-hot, so that what is seen of one says nothing of others; (1, a) for a Box."""
        if self.discrete:
            return nn.functional.one_hot(actions, self.action_dim).to(self.obs_mean)
        return nn.functional.pad(actions, (1, 0), value=1.0)

    def expected_action_features(self, policy):
        """E x(a) (..., K) under a policy."""
        return policy.probs if self.discrete else nn.functional.pad(policy.mean.clamp(-1, 1), (1, 0), value=1.0)

    def make_input(self, obs, posterior, q, covariance, time):
        """What policy and value network read (M, I): the observation, what is known of w, Q here, and the time that is left.

        Observations (M, D), q and its covariance from `Posterior.predict`, time (M, 3)."""
        known = (posterior.mean - posterior.prior_mean).flatten(1)
        unknown = (posterior.variance / posterior.prior_variance).clamp(min=1e-8).sqrt().flatten(1)
        sigma = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-8).sqrt()
        q = q - q.mean(-1, keepdim=True) if self.discrete else q
        return torch.cat([self.encode(obs), known, unknown, q, sigma, time], dim=-1)

    def actor(self, inputs, q, covariance):
        """The actor of a task in closed form. `inputs` (..., I) from `make_input`, q (..., K) and its covariance (..., K, K).

        With logits l, exp((Q + beta sigma) / temperature) adds (Q + beta sigma) / temperature to them; a Gaussian of variance
        std^2, where Q + beta sigma is taken to be linear in a, is moved by std^2 / temperature times its gradient."""
        start, std, temperature = self.policy(inputs), self.log_std.clamp(-5, 2).exp(), self.log_temperature.exp()
        _, inverse_episodes, episode_left = inputs[..., -3:].unbind(-1)
        time = torch.stack([torch.ones_like(episode_left), -inverse_episodes.log(), episode_left], dim=-1)
        beta = (time @ self.optimism)[..., None]
        if self.discrete:
            sigma = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-8).sqrt()
            return Categorical(logits=start + (q + beta * sigma) / temperature, validate_args=False)
        x = self.action_features(start)
        slope = (covariance @ x[..., None]).squeeze(-1)  # half the gradient of sigma^2 = x' covariance x
        sigma = (x * slope).sum(-1, keepdim=True).clamp(min=1e-8).sqrt()
        gradient = q[..., 1:] + beta * slope[..., 1:] / sigma
        policy = Normal(start + std**2 * gradient / temperature, std.expand_as(start), validate_args=False)
        return Independent(policy, 1, validate_args=False)

    def baseline(self, inputs):
        return self.return_mean + self.return_std * self.value(inputs).squeeze(-1)


class Posterior:
    """The learner of M tasks: what is known of the weights w of each one's critic, mean and covariance
    C_t = C_0 - sum_{i<t} v_i v_i', with one v_i = C_i d_i / sqrt(n + d_i'C_i d_i) a step."""

    def __init__(self, agent, num_tasks):
        self.prior_mean, self.prior_variance, self.noise = agent.prior()
        self.mean = self.prior_mean.expand(num_tasks, -1, -1)  # (M, K, F)
        self.variance = self.prior_variance.expand(num_tasks, -1, -1)  # the diagonal of C
        self.v, self.t = self.mean.new_zeros(num_tasks, 64, *self.prior_mean.shape), 0

    def predict(self, features):
        """Mean (M, K) and covariance (M, K, K) of q = w f(s), hence of Q(s, a) = x(a)'q, for f(s) (M, F)."""
        v = self.v[:, : self.t].flatten(1, 2)  # a row times a matrix is five times as fast as a matrix times a column
        projections = (features[:, None] @ v.mT).view(len(v), self.t, self.mean.shape[1])  # v_i f(s)
        prior = torch.einsum("kf,mf->mk", self.prior_variance, features**2)
        covariance = prior.diag_embed() - projections.mT @ projections
        return torch.einsum("mkf,mf->mk", self.mean, features), covariance

    def update(self, d, rewards):
        """One step of Kalman temporal-difference learning, with d (M, K, F) and rewards (M)."""
        v = self.v[:, : self.t].flatten(2)  # (M, t, K F)
        projections = d.flatten(1)[:, None] @ v.mT  # v_i'd (M, 1, t)
        gain = self.prior_variance * d - (projections @ v).view_as(d)  # C d
        variance = self.noise + torch.einsum("mkf,mkf->m", d, gain)[:, None, None]
        errors = (rewards - torch.einsum("mkf,mkf->m", d, self.mean))[:, None, None]
        self.mean = self.mean + gain * errors / variance
        if self.t == self.v.shape[1]:
            self.v = torch.cat([self.v, torch.zeros_like(self.v)], dim=1)
        self.v[:, self.t] = gain / variance.sqrt()
        self.variance = self.variance - self.v[:, self.t] ** 2
        self.t += 1


# ALGORITHM
@torch.no_grad()
def rollout(agent, envs, tasks, num_episodes, seed, explore=True):
    """Plays a trial of `num_episodes` episodes in each sub-environment; without `explore`, by the most probable actions.

    Whoever has finished its trial early goes on, masked, until all have. Returns a dict of tensors: obs, next_obs (L, M, D),
    actions (L, M, ...), inputs (L, M, I), q (L, M, K) and its covariance (L, M, K, K), next_x (L, M, K), which is
    gamma E x(a') or zero after a terminal step, and (L, M) each: logprobs, values, rewards, masks (1: part of the trial),
    episodes (from 0)."""
    batch, device = defaultdict(list), agent.obs_mean.device
    limit = family_attribute(envs, "max_episode_steps") or family_attribute(envs, "_max_episode_steps", 0)
    set_tasks(envs, tasks)
    next_obs, _ = envs.reset(seed=seed)
    posterior = Posterior(agent, envs.num_envs)
    episodes = torch.zeros(envs.num_envs, dtype=torch.int64, device=device)
    steps = torch.zeros_like(episodes)  # of the present episode

    def look(obs, steps):
        """What the actor acts on: the critic's features, what the networks read, mean and covariance of q."""
        features, left = agent.critic_features(obs), (num_episodes - episodes).clamp(min=1).to(obs)
        time = torch.stack([left / num_episodes, 1 / left, (1 - steps / limit).clamp(min=0) if limit else 0 * left], dim=-1)
        q, covariance = posterior.predict(features)
        return features, (agent.make_input(obs, posterior, q, covariance, time), q, covariance)

    while (episodes < num_episodes).any():
        obs = torch.as_tensor(next_obs, dtype=torch.get_default_dtype(), device=device)  # (M, D)
        features, state = look(obs, steps)
        policy = agent.actor(*state)
        actions = policy.sample() if explore else policy.mode
        next_obs, rewards, terminated, truncated = step_envs(envs, actions, tasks, len(batch["obs"]))
        after, rewards, terminal = (torch.as_tensor(x).to(obs) for x in (next_obs, rewards, terminated))
        dones = terminated | truncated
        if dones.any():
            next_obs, _ = envs.reset(options={"reset_mask": dones})

        masks = (episodes < num_episodes).to(obs)
        next_features, next_state = look(after, steps + 1)
        next_x = agent.expected_action_features(agent.actor(*next_state))
        next_x = agent.critic_gamma * (1 - terminal[:, None]) * next_x
        d = differences(agent.action_features(actions), features, next_x, next_features, masks)
        posterior.update(d, masks * rewards / agent.reward_scale)
        inputs, q, covariance = state
        batch["obs"].append(obs)
        batch["next_obs"].append(after)
        batch["actions"].append(actions)
        batch["inputs"].append(inputs)
        batch["q"].append(q)
        batch["covariance"].append(covariance)
        batch["next_x"].append(next_x)
        batch["logprobs"].append(policy.log_prob(actions))
        batch["values"].append(agent.baseline(inputs))
        batch["rewards"].append(rewards)
        batch["masks"].append(masks)
        batch["episodes"].append(episodes)
        dones = torch.as_tensor(dones, device=device).long()
        episodes, steps = episodes + dones, (steps + 1) * (1 - dones)
    return {name: torch.stack(steps) for name, steps in batch.items()}


def differences(x, features, next_x, next_features, masks):
    """d = x(a) f(s) - gamma E x(a') f(s') (..., K, F), zero where there is no step."""
    taken = torch.einsum("...k,...f->...kf", x, features)
    following = torch.einsum("...k,...f->...kf", next_x, next_features)
    return (taken - following) * masks[..., None, None]


def compute_gae(rewards, values, masks, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), all (L, M), across the ends of episodes. After the
    trial comes nothing: the value there is zero, not bootstrapped."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = advantages[t] = (delta + gamma * gae_lambda * next_advantage) * masks[t]
        next_value = values[t] * masks[t]
    return advantages


def critic_loss(agent, batch, mb_inds):
    """The evidence -log N(r; D w_0, D C_0 D' + n I) of the trials `mb_inds`, whose rows of D are d_1, ..., d_L, per real step.

    By the chain rule it is how badly the critic predicted each reward from the steps before it, all steps at once."""
    length = int(batch["masks"][:, mb_inds].sum(0).max())
    mb = {name: x[:length, mb_inds].transpose(0, 1) for name, x in batch.items()}  # (M, L, ...)
    prior_mean, prior_variance, noise = agent.prior()
    features, next_features = agent.critic_features(mb["obs"]), agent.critic_features(mb["next_obs"])
    d = differences(agent.action_features(mb["actions"]), features, mb["next_x"], next_features, mb["masks"])
    errors = mb["rewards"] / agent.reward_scale - torch.einsum("mlkf,kf->ml", d, prior_mean)
    covariance = (d * prior_variance).flatten(2) @ d.flatten(2).mT + noise * torch.eye(length).to(d)  # (M, L, L)
    factor = torch.linalg.cholesky(covariance)
    errors = torch.linalg.solve_triangular(factor, errors[..., None], upper=False).squeeze(-1)
    losses = errors**2 / 2 + factor.diagonal(dim1=-2, dim2=-1).log()
    return (losses * mb["masks"]).sum() / mb["masks"].sum()


def meta_loss(agent, batch, mb_inds, clip_coef=0.2):
    """Clipped PPO objective (Schulman et al. 2017, eq. 7) of the trials `mb_inds`, from what was known at each of their steps.

    Returns means over the real steps by name; the value loss is in units of the return's deviation."""
    mb = {name: x[:, mb_inds] for name, x in batch.items()}
    real = mb["masks"] > 0
    inputs = mb["inputs"][real]
    policy, newvalues = agent.actor(inputs, mb["q"][real], mb["covariance"][real]), agent.baseline(inputs)
    logratio = policy.log_prob(mb["actions"][real]) - mb["logprobs"][real]  # (S)
    ratio, mb_advantages = logratio.exp(), mb["advantages"][real]
    policy_loss = -torch.min(ratio * mb_advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * mb_advantages)
    losses = {
        "policy_loss": policy_loss,
        "value_loss": ((newvalues - mb["returns"][real]) / agent.return_std) ** 2,
        "entropy": policy.entropy(),
        "approx_kl": (ratio - 1 - logratio).detach(),
        "clipfrac": ((ratio - 1).abs() > clip_coef).float(),
    }
    return {name: loss.mean() for name, loss in losses.items()}


def episode_returns(batch, num_episodes):
    """Sums the rewards of each episode: (E, M). Of a longer trial it sums its tenths: (10, M)."""
    rewards, episodes = batch["rewards"] * batch["masks"], batch["episodes"].clamp(max=num_episodes - 1)
    returns = rewards.new_zeros(num_episodes, rewards.shape[1]).scatter_add_(0, episodes, rewards)
    if num_episodes > 10:
        returns = torch.stack([tenth.sum(0) for tenth in returns.tensor_split(10)])
    return returns


def evaluate(agent, envs, tasks, args):
    """Returns (tasks) of the episodes, from 1, and of the whole `trial`, one of each task, always with the same noise."""
    rng, returns, num_episodes = seed_all(args.seed, 0, EVALUATION), [], args.eval_episodes
    for first in range(0, len(tasks), envs.num_envs):
        chunk = [tasks[i % len(tasks)] for i in range(first, first + envs.num_envs)]
        batch = rollout(agent, envs, chunk, num_episodes, int(rng.integers(2**31)), explore=not agent.discrete)
        returns.append(episode_returns(batch, num_episodes))
    returns = torch.cat(returns, dim=1)[:, : len(tasks)].cpu()
    return dict(enumerate(returns, 1)) | {"trial": returns.sum(0)}


# PLUMBING: the same text in each script
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
HELDOUT_TASKS, TRAIN_TASKS, START, EVALUATION = range(4)  # what is drawn in iteration 0
MACHINE_FLAGS = {"device", "torch_threads", "runs_dir", "resume", "evaluate"}  # not kept in a checkpoint


def fail(message, rank=0):
    """Ends the program for bad input: one line, by process `rank`, and exit code 2."""
    if RANK == rank:
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def seed_all(*key):
    """Seeds torch from (seed, iteration, process) and returns numpy's generator for all else: no state to be saved."""
    rng = np.random.default_rng(key)
    torch.manual_seed(int(rng.integers(2**63)))
    return rng


def average(*tensors):
    """Replaces tensors by their mean over the processes, in one message."""
    if WORLD_SIZE > 1:
        flat = nn.utils.parameters_to_vector(tensors)
        try:
            dist.all_reduce(flat)
        except RuntimeError:  # another process has ended, and said why
            os._exit(2)
        nn.utils.vector_to_parameters(flat / WORLD_SIZE, tensors)


class Border(gym.Wrapper):
    """Of a single environment: no infos, which nobody reads, and rewards that are a number, NaN where they hold none."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        try:
            reward = np.asarray(reward, dtype=np.float64).item()
        except (TypeError, ValueError):
            reward = np.nan
        return obs, reward, terminated, truncated, {}


def family_attribute(envs, name, default=None):
    """An attribute of the task family, wherever among its wrappers it is."""
    env = envs.unwrapped
    if not isinstance(env, gym.vector.SyncVectorEnv):
        return getattr(env, name, default)
    return env.envs[0].get_wrapper_attr(name) if env.envs[0].has_wrapper_attr(name) else default


def make_envs(args, num_envs):
    """The task family, natively vectorised or a single environment in gymnasium's Sync, and what may be wrong with it."""
    family, kwargs = f"--env-id {args.env_id}", dict(args.env_kwargs)
    module, _, name = args.env_id.rpartition(":")
    if "/" in module or module.endswith(".py"):
        fail(f"{family}: go to the folder of that file and give {Path(module).name.removesuffix('.py')}:{name}")
    sys.path.insert(0, os.getcwd())  # where a family of your own may lie
    try:
        module and importlib.import_module(module)
        if gym.spec(name).vector_entry_point is None:
            kwargs |= {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": AutoresetMode.DISABLED}}
            kwargs |= {"wrappers": [Border], "disable_env_checker": True}
        envs = gym.make_vec(name, num_envs, **kwargs)
        space = envs.single_observation_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            envs = gym.wrappers.vector.FlattenObservation(envs)
    except Exception as error:  # whatever the family's own code raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        fail(f"{family} --env-kwargs {args.env_kwargs}: {error} ({where.filename}:{where.lineno}, {sys.modules.get(module)})")
    wrappers, mode = f"{envs} {getattr(envs.unwrapped, 'envs', '')}", envs.metadata.get("autoreset_mode")
    episodes, space = family_attribute(envs, "episodes_per_trial", 2), envs.single_action_space
    for right, message in (
        (family_attribute(envs, "sample_tasks"), "it has no method sample_tasks(num_tasks, rng); give a task family"),
        (family_attribute(envs, "task", fail) is not fail, "it has no attribute `task`, where a task family gets its task"),
        (isinstance(episodes, int | np.integer) and episodes > 0, f"episodes_per_trial is {episodes!r}; give 1 or more"),
        ("<Normalize" not in wrappers, "leave out NormalizeObservation and -Reward: no checkpoint holds their statistics"),
        (mode == AutoresetMode.DISABLED, f"its autoreset mode is {mode}; give AutoresetMode.DISABLED"),
        (isinstance(space, gym.spaces.Discrete | gym.spaces.Box), f"its actions are {space}; give Discrete or Box"),
    ):
        if not right:
            fail(f"{family}: {message}")
    return envs


def sample_tasks(envs, num_tasks, rng):
    """A list of exactly `num_tasks` tasks of the family."""
    tasks = family_attribute(envs, "sample_tasks")(num_tasks, rng) if num_tasks else []
    if not isinstance(tasks, list | tuple | range | np.ndarray) or len(tasks) != num_tasks:
        fail(f"--env-id: sample_tasks({num_tasks}, rng) returned {tasks!r:.60}; give a list of {num_tasks} tasks")
    return list(tasks)


def set_tasks(envs, tasks):
    """Gives each sub-environment a copy of its task, so that a family that changes its task changes nothing else."""
    set_attr = getattr(envs.unwrapped, "set_attr", envs.unwrapped.__setattr__)
    set_attr("task", [copy.deepcopy(task) for task in tasks])


def to_env(actions, space):
    """Actions of the policy (N, ...) as the environment wants them: unit scale spans a Box, from `low` at -1 to `high` at 1. A
    side without a bound, or with one beyond a million, is taken to be two units from the other."""
    if isinstance(space, gym.spaces.Discrete):
        return actions + space.start
    low = np.where(space.low > -1e6, space.low, np.where(space.high < 1e6, space.high - 2.0, -1))
    high = np.where(space.high < 1e6, space.high, low + 2)
    actions = low + (high - low) * (actions.reshape(-1, *space.shape) + 1) / 2
    actions = np.rint(actions) if np.issubdtype(space.dtype, np.integer) else actions
    return actions.clip(space.low, space.high).astype(space.dtype)


def step_envs(envs, actions, tasks, step):
    """Steps all sub-environments with actions (N, ...), restarts none. What is not finite must not reach the weights."""
    next_obs, rewards, terminated, truncated, _ = envs.step(to_env(actions.cpu().numpy(), envs.single_action_space))
    next_obs, rewards = np.asarray(next_obs, dtype=np.float32), np.asarray(rewards, dtype=np.float32).reshape(len(tasks))
    wrong = ~(np.isfinite(rewards) & np.isfinite(next_obs).all(axis=-1))
    if wrong.any() or step > 20_000:
        what = "a reward or observation is not finite" if wrong.any() else "no end; register it with max_episode_steps"
        rank = RANK if dist.is_initialized() else 0  # before, all processes see the same
        fail(f"--env-id: step {step} of task {tasks[wrong.argmax()]!r:.60}: {what}", rank)
    return next_obs, rewards, terminated, truncated


def report(results, rows, global_step, run_dir):
    """Adds results {split: {name: returns}} to the rows of eval.csv, writes it, and returns their means for TensorBoard."""
    scalars = {}
    for split, returns in results.items():
        for name, x in returns.items():
            rows.append([global_step, split, name, x.mean().item(), x.std().item() / len(x) ** 0.5, len(x)])
            scalars[f"eval/{split}_return_after_{name}"] = x.mean()
    header = "global_step,split,adaptation,mean_return,stderr,num_tasks"
    np.savetxt(run_dir / "eval.csv", rows, "%s", ",", header=header, comments="")
    return scalars


if __name__ == "__main__":
    # SETTINGS
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack ± and ²
    args, checkpoint = tyro.cli(Args, description=__doc__), None
    if path := args.resume or args.evaluate:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that a file may hold
            saved, own = checkpoint["args"], asdict(args).keys() - MACHINE_FLAGS
        except Exception:  # whatever a missing, truncated or foreign file makes the reader raise
            fail(f"{path}: missing, or not a whole checkpoint; give the path of a checkpoint.pt")
        if saved.keys() != own:  # of a copy of this file that was changed
            print(f"{path}: ignored: {sorted(saved.keys() - own)}; default: {sorted(own - saved.keys())}", file=sys.stderr)
        defaults = Args(**{name: saved[name] for name in saved.keys() & own - {"env_kwargs"}})
        args = tyro.cli(Args, description=__doc__, default=defaults)  # flags go before what is saved, that before defaults
        args.env_kwargs = saved["env_kwargs"] | args.env_kwargs
    words = {"true": True, "false": False}
    args.env_kwargs = {name: words.get(str(value), value) for name, value in args.env_kwargs.items()}
    for names, least, greatest in (
        ("seed num_train_tasks num_tasks eval_episodes learning_rate ent_coef", 0, 2**53),
        ("total_timesteps eval_every hidden_size num_features num_minibatches update_epochs", 1, 2**53),
        ("eval_tasks", 2, 2**53),
        ("gamma gae_lambda", 0, 1),
        ("critic_gamma", 0, 0.999),
        ("temperature", 1e-6, 1e6),
        ("torch_threads", 1, os.cpu_count()),
    ):
        for name in names.split():
            if not least <= getattr(args, name) <= greatest:
                fail(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number from {least} to {greatest}")

    # SETUP
    torch.set_num_threads(args.torch_threads)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            fail("--device cuda: there is no GPU; give cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    envs = make_envs(args, 32)
    heldout_tasks, again = (sample_tasks(envs, args.eval_tasks, seed_all(args.seed, 0, HELDOUT_TASKS)) for _ in range(2))
    if pickle.dumps(heldout_tasks) != pickle.dumps(again):
        fail(f"--env-id {args.env_id}: sample_tasks drew other tasks from the same rng; draw them from rng alone")
    train_tasks = sample_tasks(envs, args.num_train_tasks, seed_all(args.seed, 0, TRAIN_TASKS))
    rng = seed_all(args.seed, 0, START)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
    num_episodes = int(family_attribute(envs, "episodes_per_trial", 2))
    args.eval_episodes = int(args.eval_episodes or num_episodes)
    batch = rollout(agent, envs, sample_tasks(envs, 32, rng), num_episodes, args.seed)  # by the untrained agent
    real = batch["masks"] > 0
    agent.set_units(batch["obs"][real], batch["rewards"][real])
    if args.num_tasks == 0:
        limit = family_attribute(envs, "max_episode_steps") or family_attribute(envs, "_max_episode_steps", 0)
        trial_steps = num_episodes * limit or real.sum().item() / 32
        args.num_tasks = int(np.clip(16_000 / trial_steps, 16, 1024)) // WORLD_SIZE * WORLD_SIZE
    num_tasks = args.num_tasks // WORLD_SIZE  # of this process
    if args.num_tasks % WORLD_SIZE or num_tasks < args.num_minibatches:
        fail(f"--num-tasks {args.num_tasks}: give a multiple of {WORLD_SIZE} processes, at least one task per minibatch")
    envs = make_envs(args, num_tasks)
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    iteration, global_step, eval_rows = 0, 0, []
    if checkpoint:
        try:
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            fail(f"{path}: not of this agent: {' '.join(str(error).split()):.300}")
        iteration, global_step = checkpoint["iteration"], checkpoint["global_step"]
        eval_rows = checkpoint["eval_rows"] if args.resume else []
    if args.resume and global_step >= args.total_timesteps:
        fail(f"--total-timesteps {args.total_timesteps}: {global_step} are done already; give more")
    run_name = f"{args.env_id.split(':')[-1]}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    run_dir = Path(args.resume).parent if args.resume else Path(args.runs_dir, "evaluate__" * bool(args.evaluate) + run_name)
    path = args.evaluate or str(run_dir / "checkpoint.pt")
    if RANK == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=1))
        writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)

    # TRAINING
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True, disable=RANK > 0)
    ends = bool(args.evaluate)
    try:
        while not ends:
            iteration += 1
            rng = seed_all(args.seed, iteration, RANK)
            remaining = 1 - global_step / args.total_timesteps
            optimizer.param_groups[0]["lr"] = remaining * args.learning_rate
            tasks = sample_tasks(envs, num_tasks, rng)
            if train_tasks:
                tasks = [train_tasks[i] for i in rng.integers(len(train_tasks), size=num_tasks)]

            start = time.time()
            batch = rollout(agent, envs, tasks, num_episodes, int(rng.integers(2**31)))
            real, values = batch["masks"] > 0, batch["values"]
            advantages = compute_gae(batch["rewards"], values, batch["masks"], args.gamma, args.gae_lambda)
            batch["returns"] = returns = advantages + values
            batch["advantages"] = (advantages - advantages[real].mean()) / (advantages[real].std() + 1e-8)
            step = 1.0 if iteration == 1 else 0.1  # the critic answers in units of the returns, which it follows slowly
            agent.return_mean += step * (returns[real].mean() - agent.return_mean)
            agent.return_std += step * (returns[real].std().clamp(min=1e-3) - agent.return_std)
            average(agent.return_mean, agent.return_std)
            rollout_time, start = time.time() - start, time.time()

            losses = defaultdict(list)
            for epoch in range(args.update_epochs):
                for mb_inds in torch.randperm(num_tasks).tensor_split(args.num_minibatches):  # whole trials
                    mb_losses = meta_loss(agent, batch, mb_inds)
                    loss = mb_losses["policy_loss"] + 0.5 * mb_losses["value_loss"]
                    if agent.discrete:
                        loss = loss - remaining * args.ent_coef * mb_losses["entropy"]
                    if epoch == 0 and args.meta_value:
                        mb_losses["critic_loss"] = critic_loss(agent, batch, mb_inds)
                        loss = loss + mb_losses["critic_loss"]
                    optimizer.zero_grad()
                    loss.backward()
                    average(*(p.grad for p in agent.parameters() if p.grad is not None))
                    mb_losses["meta_grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), max_norm=0.5)
                    if not torch.isfinite(loss + mb_losses["meta_grad_norm"]):
                        fail("the meta-gradient is not finite, so the weights were left as they were; lower --learning-rate")
                    optimizer.step()
                    for name, term in mb_losses.items():
                        losses[name].append(term.detach())
            update_time = time.time() - start

            # LOGGING
            steps, by_episode = real.sum().double(), episode_returns(batch, num_episodes).mean(1)
            average(steps, by_episode)
            steps = round(steps.item() * WORLD_SIZE)
            global_step += steps
            ends = global_step >= args.total_timesteps
            progress.update(steps)
            progress.set_postfix(pre=f"{by_episode[0]:.2f}", post=f"{by_episode[-1]:.2f}", refresh=False)
            if RANK > 0:
                continue
            scalars = {f"losses/{name}": torch.stack(terms).mean() for name, terms in losses.items()}
            variance, residual = returns[real].var(), (returns - values)[real].var()
            scalars["losses/explained_variance"] = 1 - residual / variance if variance > 1e-8 else 0.0
            scalars |= {f"charts/episode_{k}_return": x for k, x in enumerate(by_episode, 1)}
            scalars |= {"charts/pre_adaptation_return": by_episode[0], "charts/post_adaptation_return": by_episode[-1]}
            scalars |= {"charts/SPS": steps / (rollout_time + update_time), "time/rollout": rollout_time}
            scalars |= {"charts/learning_rate": remaining * args.learning_rate, "time/update": update_time}
            if ends or iteration % args.eval_every == 0:
                results = {"train": evaluate(agent, envs, (train_tasks or tasks)[: args.eval_tasks], args)}
                results["heldout"] = evaluate(agent, envs, heldout_tasks, args)
                scalars |= report(results, eval_rows, global_step, run_dir)
                last = [*results["heldout"]][-1]
                scalars["eval/generalization_gap"] = results["train"][last].mean() - results["heldout"][last].mean()
            for tag, value in scalars.items():
                writer.add_scalar(tag, float(value), global_step)
            writer.flush()
            saved_args = {name: x for name, x in asdict(args).items() if name not in MACHINE_FLAGS}
            checkpoint = {"args": saved_args, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint |= {"iteration": iteration, "global_step": global_step, "eval_rows": eval_rows}
            torch.save(checkpoint, path + ".tmp")
            os.replace(path + ".tmp", path)  # whole or not at all
        if args.evaluate and RANK == 0:
            results = {"heldout": evaluate(agent, envs, heldout_tasks, args)}
            report(results, eval_rows, global_step, run_dir)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        progress.close()
        if RANK == 0 and not ends and os.path.exists(path):
            print(f"go on: {shlex.join(['python', sys.argv[0], '--resume', path])}", file=sys.stderr)
    if RANK > 0:
        os._exit(0)  # the usual exit would race with gloo's threads, which may still hold tensors, and abort
    writer.close()

    # CLOSING
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads the output may stop reading
    print(f"\nreturn on {args.eval_tasks} held-out tasks")
    for _, _, name, mean, stderr, _ in eval_rows[-len(results["heldout"]) :]:
        print(f"{name:>12} {mean:10.3f} ± {stderr:.3f}")
    numbered = [x for name, x in results["heldout"].items() if name != "trial"]
    gain, stderr = (numbered[-1] - numbered[0]).mean(), (numbered[-1] - numbered[0]).std() / args.eval_tasks**0.5
    verdict = "helps" if gain > 3 * stderr else "harms" if gain < -3 * stderr else "makes no difference"
    print(f"Adaptation {verdict}: the last return less the first is {gain:.3f} ± {stderr:.3f}.")
    print(f"evaluate again: {shlex.join(['python', sys.argv[0], '--evaluate', path])}")
