# /// script
# requires-python = ">=3.11"
# dependencies=["torch==2.13.0","gymnasium[mujoco]==1.4.0","tyro==1.0.17","tensorboard==2.21.0","numpy==2.4.6","tqdm==4.70.1"]
# ///
"""The meta actor-critic: a meta-policy, a meta-value function and a meta action selection guide an actor-critic in each task.

A trial is E episodes of one task. In the inner loop, the learner of the task believes that the weights w of its critic
x(a)'w f(s) are normal with mean m and covariance C, and its actor follows from that in closed form:

    model      r_t = <d_t, w> + noise,   d_t = x(a_t) f(s_t)' - 0.4 E[x(a')] f(s_{t+1})',    noise ~ N(0, n)
    critic     m += C d_t (r_t - <d_t, m>) / (n + <d_t, C d_t>),   C -= C d_t (C d_t)' / (n + <d_t, C d_t>)   after each step
    actor      pi(a|s) proportional to pi_theta(a|s, m, C) exp((Q(s, a) + beta sigma(s, a)) / temperature)

where Q(s, a) = x(a)'m f(s), and sigma is the critic's standard deviation. w, m and d are matrices (K, F) on which C acts as on
vectors, and <,> is their inner product. Rewards are in units of their RMS, zeros apart, clipped to ±3. E[x(a')] is not the
actor's, but that of a softmax of Q / 0.5 before the step, held fixed (for a Box, a' is the clipped gradient of Q / 0.5), and
absent after a terminal step. The critic is temporal-difference learning by a Kalman filter (Engel et al. 2005, Geist &
Pietquin 2010), with discount 0.4, the actor a step of natural policy gradient from pi_theta. The outer loop, which looks to
the end of the trial, learns what guides the learner:

    meta-policy              pi_theta and the temperature       by PPO, for the discounted return of the trial
    meta action selection    the optimism beta                  by PPO, for the discounted return of the trial
    meta-value function      f, n, and m and C at the start     by the evidence log p(r_1, ..., r_L | states, actions)

PPO's baseline is another output of pi_theta's network, not the critic. Like RL²'s hidden state, m and C are the memory of the
policy; what it reads of them is stored, so PPO and the evidence share only the clipping of gradients. Read AGENT, ALGORITHM
and TRAINING.

    python mrl_actor_critic.py                                         # random MDPs, 10 episodes a trial
    python mrl_actor_critic.py --evaluate runs/<run>/checkpoint.pt --env-kwargs n 100
    python mrl_actor_critic.py --env-id mrl_rl2:GridNavi-v0            # any family of the other scripts, or your own

Shapes: M trials in a meta-batch, E episodes a trial, L steps of the longest trial, D observation size, I input size of the
network, H its hidden size, K size of x(a), F size of f(s), S real steps: those up to the end of each trial's last episode.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from gymnasium.spaces import Box, Discrete
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT = tyro.conf.create_mutex_group(required=False)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's folder
    seed: int = 1  # seed of every random draw
    device: Literal["cpu", "cuda"] = "cpu"  # where to compute; cuda pays off with many tasks
    torch_threads: int = 1  # threads of torch; more than one pays off on idle cores only
    env_id: str = "TabularMDP-v0"  # task family, or `module:name` for one of another file, such as mrl_maml:PointNav-v0
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # the family's arguments: name value ...
    total_timesteps: int = 6_000_000  # environment steps of training, without evaluations
    num_train_tasks: int = 0  # train on this many fixed tasks (0: fresh tasks in each iteration)
    eval_every: int = 25  # iterations between two evaluations on held-out tasks
    eval_tasks: int = 200  # number of held-out tasks, the same ones in each evaluation
    runs_dir: str = "runs"  # folder in which each run gets a folder of its own
    resume: Annotated[Path | None, CHECKPOINT] = None  # go on with the run of this checkpoint; flags override saved ones
    evaluate: Annotated[Path | None, CHECKPOINT] = None  # only evaluate this checkpoint; flags override saved ones

    # Algorithm specific arguments
    learning_rate: float = 2e-3  # learning rate of Adam at the start (the critic's: 5 times); it falls linearly to zero
    num_tasks: int = 0  # tasks in a meta-batch, M, one trial each (0: 16,000 environment steps, but 16 to 1024 tasks)
    meta_policy: bool = True  # learn pi_theta and the temperature (else pi_theta is fixed and the temperature 0.1)
    meta_value: bool = True  # learn the critic's features, prior and noise (else they stay as they are at the start)
    meta_action_selection: bool = True  # learn the optimism (else it is 0)
    hidden_size: int = 64  # units of each of the two hidden layers, H
    num_features: int = 32  # greatest number of centres of the critic's features
    gamma: float = 0.99  # discount factor, over the whole trial
    gae_lambda: float = 0.97  # lambda of generalized advantage estimation, over the whole trial
    num_minibatches: int = 4  # minibatches in each epoch: of steps for PPO, of whole trials for the evidence
    update_epochs: int = 4  # passes over the meta-batch in each iteration
    ent_coef: float = 0.02  # weight of the entropy at the start; it falls linearly to zero


# TASK FAMILIES
class TaskVectorEnv(gym.vector.VectorEnv):
    """Sub-environments side by side. A family adds `sample_tasks`, and `act`, which moves `state` (M, ...) and returns rewards
    (M). The `task` that is set, one for each sub-environment, becomes `tasks` when all of them are reset at once."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, num_envs, max_episode_steps, observation_space, action_space):
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.task = self.sample_tasks(num_envs, np.random.default_rng(0))
        self.steps, self.state = np.zeros(num_envs), np.zeros((num_envs, *observation_space.shape))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if mask.all():
            self.tasks = np.array(self.task)
        self.steps[mask], self.state[mask] = 0, 0
        return self.observe(), {}

    def step(self, actions):
        rewards, self.steps = self.act(actions), self.steps + 1
        truncated = self.steps >= self.max_episode_steps
        return self.observe(), rewards, np.zeros_like(truncated), truncated, {}

    def observe(self):
        return self.state.astype(np.float32)


class TabularMDP(TaskVectorEnv):
    """10 states, 5 actions, P(.|s,a) ~ Dirichlet(1), mean rewards ~ N(1, 1), observed with noise N(0, 1); 10 steps an episode
    from state 0, n episodes a trial; observed is the state, one-hot (Duan et al. 2016, 3.2). A task: (10, 5, 10 + 1)."""

    def __init__(self, num_envs=1, max_episode_steps=10, n=10):
        self.episodes_per_trial = n
        super().__init__(num_envs, max_episode_steps, Box(0, 1, (10,)), Discrete(5))
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
    gym.registry.pop(f"{family.__name__}-v0", None)  # a copy of this file may have registered it: the last one counts
    gym.register(f"{family.__name__}-v0", vector_entry_point=family)


# AGENT
class Agent(nn.Module):
    """The three meta parts, and PPO's baseline, another output of the meta-policy's network. A task's learner: `Posterior`."""

    def __init__(self, obs, rewards, action_space, args, saved=None):
        """Observations (S, D) and rewards (S) of an untrained agent fix the units, and start the centres and the prior. With a
        `saved` state, which is loaded later, there are as many centres as it has."""
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        self.action_dim = gym.spaces.flatdim(action_space)
        std = obs.std(0, correction=0)  # a unit is 0.1 or more, unless all observations deviate less
        self.obs_mean, self.obs_std = nn.Buffer(obs.mean(0)), nn.Buffer(std.clamp(std.max().clamp(1e-4, 0.1)))
        self.reward_scale = nn.Buffer((rewards[rewards != 0] ** 2).mean().nan_to_num(1).sqrt())  # 1 if there were none
        self.return_mean, self.return_std = nn.Buffer(torch.tensor(0.0)), nn.Buffer(self.reward_scale.clone())
        # Meta-value function: centres, each the farthest from those before it; the prior of the weights; the noise.
        obs, centres = self.encode(obs), []
        distances = torch.full_like(obs[:, 0], torch.inf)  # to the nearest centre
        while len(centres) < args.num_features and distances.max() > 0.01:
            spacing = distances.max().clamp(max=10)  # 10 in place of the first one's infinity
            centres.append(obs[distances.argmax()])
            distances = distances.minimum((obs - centres[-1]).norm(dim=-1))
        self.tabular = bool(distances.max() <= 0.01)  # every observation so far is a centre
        if {"centres", "prior_mean"} <= (saved or {}).keys():
            centres, self.tabular = [*saved["centres"]], saved["prior_mean"].shape[1] == len(saved["centres"])
        self.centres, self.log_width = nn.Parameter(torch.stack(centres)), nn.Parameter((0.4 * spacing).log())
        self.critic_gamma = 0.4
        K, F = self.action_dim + (not self.discrete), len(centres) + (0 if self.tabular else 1 + obs.shape[1])
        self.prior_mean, self.log_variance = nn.Parameter(torch.zeros(K, F)), nn.Parameter(torch.zeros(K, F))
        rows, columns = slice(None) if self.discrete else 0, slice(None) if self.tabular else 0  # their x(a)' f(s) sum to ~ 1
        self.prior_mean.data[rows, columns] = rewards.mean() / self.reward_scale / (1 - self.critic_gamma)  # as each step pays
        self.log_noise_std = nn.Parameter(torch.tensor(0.5).log())
        # Meta-policy: where the actor of each task starts, and how far it goes from there.
        inputs, H = 3 * obs.shape[1] + F + 2 * K * F + 2 * K + 3, args.hidden_size  # see `make_input`
        outputs = self.action_dim * (1 if self.discrete else 2) + 1  # logits, or means and log deviations; the baseline
        layers = nn.Linear(inputs, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh(), nn.Linear(H, outputs)
        for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, 0.01), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        self.network, self.meta_policy = nn.Sequential(*layers), args.meta_policy
        self.log_temperature = nn.Parameter(torch.tensor(0.1).log())
        # Meta action selection: optimism = a + b log(episodes left) + c (share of the episode that is left).
        self.optimism, self.meta_action_selection = nn.Parameter(torch.tensor([0.0, 0.15, 0.0])), args.meta_action_selection
        self.critic_parameters = [self.centres, self.log_width, self.prior_mean, self.log_variance, self.log_noise_std]
        nn.ParameterList(self.critic_parameters).requires_grad_(args.meta_value)
        self.log_temperature.requires_grad_(args.meta_policy)

    def prior(self):
        """Mean and variances (K, F) of the critic's weights before any data, and the variance of the noise, at least 1e-4."""
        return self.prior_mean, self.log_variance.exp(), (2 * self.log_noise_std).exp() + 1e-4

    def encode(self, obs):
        return ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)

    def critic_features(self, obs):
        """f(s) (..., F), s encoded: roots of a softmax of nearness to the centres; unless tabular, after 1 and s / 3."""
        squares = (obs[..., None, :] - self.centres).square().sum(-1)
        near = (-squares * (-2 * self.log_width).exp()).log_softmax(-1).div(2).exp()  # a root, without 0 / 0 in its gradient
        return near if self.tabular else torch.cat([torch.ones_like(obs[..., :1]), obs / 3, near], dim=-1)

    def action_features(self, actions):
        """x(a) (..., K): a discrete action one-hot, so that actions share nothing; (1, a) for a Box, a clipped to [-1, 1]."""
        if self.discrete:
            return nn.functional.one_hot(actions, self.action_dim).to(self.obs_mean)
        return nn.functional.pad(actions.clamp(-1, 1), (1, 0), value=1.0)

    def expected_x(self, q):
        """E[x(a')] (..., K) of the softmax of Q / 0.5, whatever the actor does; for a Box, of its clipped gradient."""
        if self.discrete:
            return (q / 0.5).softmax(-1)
        return nn.functional.pad((q[..., 1:] / 0.5).clamp(-1, 1), (1, 0), value=1.0)

    def make_input(self, obs, features, belief, q, covariance, clock):
        """What the network reads (M, I): the encoded observation, its features, what was learned of the weights, and how well
        they are known, Q and its deviation, the clock, and the ways to the centres of highest value and highest optimism."""
        learned = (belief.mean - belief.prior_mean).flatten(1)
        known = 1 - (belief.variance / belief.prior_variance).flatten(1)
        sigma = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-8).sqrt()
        mean = belief.mean @ belief.at_centres.mT  # (M, K, centres)
        upper = mean + (belief.variance @ belief.at_centres.mT**2).clamp(min=1e-8).sqrt()
        values = (x.amax(1) if self.discrete else x[:, 0] for x in (mean, upper))  # (M, centres)
        ways = [(x / 0.1).softmax(-1) @ self.centres - obs for x in values]
        q = q - q.mean(-1, keepdim=True) if self.discrete else q
        return torch.cat([obs, features, learned, known, q, sigma, clock, *ways], dim=-1)

    def forward(self, inputs, q, covariance, clock):
        """The actor of a task in closed form and the baseline (...), from `inputs` (..., I), q (..., K), which is Q of each
        action, or Q at a = 0 and its gradient, its covariance (..., K, K), and the clock (..., 3). The exponential adds to
        logits; to first order, it moves a Gaussian by std^2 / temperature times the gradient of Q + beta sigma at its mean."""
        outputs, temperature = self.network(inputs), self.log_temperature.exp()
        values, start = self.return_mean + self.return_std * outputs[..., -1], outputs[..., :-1] * self.meta_policy
        constant, by_episodes, by_steps = self.optimism * self.meta_action_selection
        log_left = -clock[..., 1].log()  # of the number of episodes left
        beta = (constant + by_episodes * log_left + by_steps * clock[..., 2])[..., None]
        if self.discrete:
            sigma = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-8).sqrt()
            return Categorical(logits=start + (q + beta * sigma) / temperature, validate_args=False), values
        start, log_std = start.chunk(2, -1)
        std = (log_std - 0.5).clamp(-5, 2).exp()  # 0.6 at the start; bounded, however large a gradient step
        x = nn.functional.pad(start, (1, 0), value=1.0)
        slope = (covariance @ x[..., None]).squeeze(-1)  # sigma^2 = x' covariance x, so sigma has the gradient slope / sigma
        sigma = (x * slope).sum(-1, keepdim=True).clamp(min=1e-8).sqrt()
        gradient = q[..., 1:] + beta * slope[..., 1:] / sigma
        policy = Normal(start + std**2 * gradient / temperature, std, validate_args=False)
        return Independent(policy, 1, validate_args=False), values


class Posterior:
    """The learners of M trials: mean and covariance of the weights of each one's critic. The covariance is never formed: after
    t steps, C = C_0 - sum_i v_i v_i', where v_i = C d_i / sqrt(n + <d_i, C d_i>) with the C before step i. Where float32
    cannot tell <d, C d> from zero, 1e-5 <d, C_0 d> takes its place, as if there were more noise."""

    def __init__(self, agent, num_tasks):
        self.prior_mean, self.prior_variance, self.noise = agent.prior()
        self.at_centres = agent.critic_features(agent.centres)  # (centres, F)
        self.mean = self.prior_mean.expand(num_tasks, -1, -1)  # (M, K, F)
        self.variance = self.prior_variance.expand(num_tasks, -1, -1)  # the diagonal of C
        self.v, self.t = self.mean.new_zeros(num_tasks, 64, *self.prior_mean.shape), 0  # (M, t or more, K, F)

    def predict(self, features):
        """Mean (M, K) and covariance (M, K, K) of q = w f(s), hence of Q(s, a) = x(a)'q, for f(s) (M, F)."""
        v = self.v[:, : self.t].flatten(1, 2)  # a row times a matrix is faster than a matrix times a column
        projections = (features[:, None] @ v.mT).view(len(v), self.t, self.mean.shape[1])  # v_i f(s)
        prior = torch.einsum("kf,mf->mk", self.prior_variance, features**2)
        covariance = prior.diag_embed() - projections.mT @ projections
        return torch.einsum("mkf,mf->mk", self.mean, features), covariance

    def update(self, d, rewards):
        """One step of Kalman temporal-difference learning, with d (M, K, F) and rewards (M)."""
        v = self.v[:, : self.t].flatten(2)  # (M, t, K F)
        prior = self.prior_variance * d  # C_0 d
        Cd = prior - (d.flatten(1)[:, None] @ v.mT @ v).view_as(d)
        variance = (d * Cd).sum((1, 2)).maximum(1e-5 * (d * prior).sum((1, 2)))
        total = (self.noise + variance)[:, None, None]  # variance of the reward before it is seen
        errors = (rewards - torch.einsum("mkf,mkf->m", d, self.mean))[:, None, None]
        self.mean = self.mean + Cd * errors / total
        self.variance = self.variance - Cd**2 / total
        if self.t == self.v.shape[1]:
            self.v = torch.cat([self.v, torch.zeros_like(self.v)], dim=1)
        self.v[:, self.t] = Cd / total.sqrt()
        self.t += 1


# ALGORITHM
@torch.no_grad()
def rollout(agent, envs, tasks, num_episodes, seed, explore=True):
    """Plays a trial of `num_episodes` episodes in each sub-environment; those that are done go on, masked, until all are.
    Without `explore`, takes the most probable actions. Returns a dict: obs, after (L, M, D), to which the step led, actions
    (L, M, ...), inputs (L, M, I), q (L, M, K), its covariance (L, M, K, K), next_x (L, M, K), which is 0.4 E x(a'), or zero
    after a terminal step, clock (L, M, 3), which is the share of episodes left, 1 / episodes left, the share of the episode
    left, and (L, M) each: logprobs, values, rewards, masks (1: part of the trial), episodes (from 0)."""
    limit = family_attribute(envs, "max_episode_steps") or family_attribute(envs, "_max_episode_steps", 0)
    set_attr = getattr(envs.unwrapped, "set_attr", envs.unwrapped.__setattr__)
    set_attr("task", [copy.deepcopy(task) for task in tasks])  # a family may change its task
    next_obs = as_floats(envs.reset(seed=seed)[0], tasks)
    batch, belief = [], Posterior(agent, envs.num_envs)
    episodes = agent.obs_mean.new_zeros(envs.num_envs, dtype=int)
    steps = torch.zeros_like(episodes)  # of the present episode
    while (episodes < num_episodes).any():
        obs = torch.as_tensor(next_obs).to(agent.obs_mean)  # (M, D)
        features, left = agent.critic_features(agent.encode(obs)), (num_episodes - episodes).clamp(min=1).to(obs)
        clock = torch.stack([left / num_episodes, 1 / left, (1 - steps / limit).clamp(min=0) if limit else 0 * left], dim=-1)
        q, covariance = belief.predict(features)
        inputs = agent.make_input(agent.encode(obs), features, belief, q, covariance, clock)
        policy, values = agent(inputs, q, covariance, clock)
        actions = policy.sample() if explore else policy.mode
        next_obs, *others = step_envs(envs, actions, tasks, len(batch))
        after, rewards, terminated, dones = (torch.as_tensor(x).to(obs) for x in others)
        masks, next_features = (episodes < num_episodes).to(obs), agent.critic_features(agent.encode(after))
        next_q = torch.einsum("mkf,mf->mk", belief.mean, next_features)
        next_x = agent.critic_gamma * (1 - terminated[:, None]) * agent.expected_x(next_q)
        d = differences(agent.action_features(actions), features, next_x, next_features, masks)
        belief.update(d, (rewards / agent.reward_scale).clamp(-3, 3))  # those that were rare at the start may be far greater
        step = {"obs": obs, "after": after, "actions": actions, "inputs": inputs, "q": q, "covariance": covariance}
        step |= {"next_x": next_x, "clock": clock, "logprobs": policy.log_prob(actions), "values": values}
        batch.append(step | {"rewards": rewards * masks, "masks": masks, "episodes": episodes})
        episodes, steps = episodes + dones.long(), (steps + 1) * (1 - dones)
    return {name: torch.stack([step[name] for step in batch]) for name in batch[0]}


def differences(x, features, next_x, next_features, masks):
    """d = x(a) f(s) - next_x f(s') (..., K, F), zero where there is no step."""
    taken = torch.einsum("...k,...f->...kf", x, features)
    then = torch.einsum("...k,...f->...kf", next_x, next_features)
    return (taken - then) * masks[..., None, None]


def compute_gae(rewards, values, masks, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), all (L, M), across episodes; zero after the trial."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = advantages[t] = (delta + gamma * gae_lambda * next_advantage) * masks[t]
        next_value = values[t] * masks[t]
    return advantages


def critic_loss(agent, batch, mb_inds):
    """The loss -log N(r; X m_0, X C_0 X' + n I) of the trials `mb_inds`, per real step, up to a constant, with rows d_t of X.
    By the chain rule it is the error in predicting each reward from those before it. next_x is held fixed."""
    names = ("obs", "after", "actions", "next_x", "rewards", "masks")
    mb = {name: batch[name].index_select(1, mb_inds).transpose(0, 1) for name in names}  # (M, L, ...)
    prior_mean, prior_variance, noise = agent.prior()
    features, next_features = (agent.critic_features(agent.encode(mb[name])) for name in ("obs", "after"))
    d = differences(agent.action_features(mb["actions"]), features, mb["next_x"], next_features, mb["masks"])
    errors = (mb["rewards"] / agent.reward_scale).clamp(-3, 3) - torch.einsum("mlkf,kf->ml", d, prior_mean)
    covariance = (d * prior_variance).flatten(2) @ d.flatten(2).mT  # (M, L, L)
    diagonal = noise + 1e-5 * covariance.diagonal(dim1=-2, dim2=-1)  # as the least in `Posterior`
    factor = torch.linalg.cholesky(covariance + diagonal.diag_embed())
    errors = torch.linalg.solve_triangular(factor, errors[..., None], upper=False).squeeze(-1)
    losses = errors**2 / 2 + factor.diagonal(dim1=-2, dim2=-1).log()
    return (losses * mb["masks"]).sum() / mb["masks"].sum()


def meta_loss(agent, batch, mb_inds, clip_coef=0.2):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) and other losses: means over the steps `mb_inds` of (S, ...)."""
    mb = {name: x.index_select(0, mb_inds) for name, x in batch.items()}  # twice as fast as x[mb_inds]
    policy, newvalues = agent(mb["inputs"], mb["q"], mb["covariance"], mb["clock"])
    logratio = policy.log_prob(mb["actions"]) - mb["logprobs"]
    ratio, advantages = logratio.exp(), mb["advantages"]
    losses = {
        "policy_loss": -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages),
        "value_loss": ((newvalues - mb["returns"]) / agent.return_std) ** 2,
        "entropy": policy.entropy(),
        "approx_kl": ratio - 1 - logratio,
        "clipfrac": ((ratio - 1).abs() > clip_coef).float(),
    }
    return {name: loss.mean() for name, loss in losses.items()}


def episode_returns(batch, num_episodes):
    """Returns of the episodes (E, M), or of the tenths of a trial of more than 10 episodes (10, M)."""
    rewards, episodes = batch["rewards"], batch["episodes"].clamp(max=num_episodes - 1)
    returns = rewards.new_zeros(num_episodes, rewards.shape[1]).scatter_add_(0, episodes, rewards)
    return torch.stack([part.mean(0) for part in returns.tensor_split(min(num_episodes, 10))]) * max(1, num_episodes / 10)


def evaluate(agent, envs, tasks, args):
    """{1: returns (tasks) of episode or tenth 1, ..., "trial": of all}; fixed random numbers, argmax for discrete actions."""
    rng, num_episodes = seed_all(args.seed, 0, EVALUATION), int(family_attribute(envs, "episodes_per_trial", 2))
    tasks = [tasks[i % len(tasks)] for i in range(envs.num_envs)]  # training tasks may be fewer: they repeat
    batch = rollout(agent, envs, tasks, num_episodes, int(rng.integers(2**31)), explore=not agent.discrete)
    return dict(enumerate(episode_returns(batch, num_episodes).cpu(), 1)) | {"trial": batch["rewards"].sum(0).cpu()}


# PLUMBING: the same text in each script
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
HELDOUT_TASKS, TRAIN_TASKS, START, EVALUATION = range(4)  # in iteration 0, the last part of the seed is what is drawn
NOT_SAVED = {"device", "torch_threads", "runs_dir", "resume", "evaluate"}  # flags of this machine or command


def fail(message):
    """Ends the program for bad input, with one line and exit code 2."""
    tqdm.write(" ".join(f"{Path(sys.argv[0]).name}: {message}".split()), file=sys.stderr)
    sys.exit(2)


def seed_all(*key):
    """Seeds torch and returns a numpy generator, both from (seed, iteration, process): no random state has to be saved."""
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


class PlainStep(gym.Wrapper):
    """Drops infos, which nobody reads and gymnasium would stack. Rewards become floats, or NaN if they are not one number."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        reward = np.ravel(reward)
        return obs, reward[0] if reward.size == 1 and reward.dtype.kind in "biuf" else np.nan, terminated, truncated, {}


def family_attribute(envs, name, default=None):
    """An attribute of the task family, on whichever of its wrappers it is."""
    if not isinstance(envs.unwrapped, gym.vector.SyncVectorEnv):
        return getattr(envs.unwrapped, name, default)
    env = envs.unwrapped.envs[0]
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else default


def make_envs(args, num_envs):
    """Makes `num_envs` sub-environments of the task family, and ends the program if they cannot be used."""
    module, _, name = args.env_id.rpartition(":")
    sys.path.insert(0, os.getcwd())  # where a family of your own may lie
    try:
        assert "/" not in module, f"go to its folder and give {Path(module).stem}:{name}"
        importlib.import_module(module or "gymnasium")
        single = {"vector_kwargs": {"autoreset_mode": "Disabled"}, "wrappers": [PlainStep], "disable_env_checker": True}
        envs = gym.make_vec(name, num_envs, **args.env_kwargs, **({} if gym.spec(name).vector_entry_point else single))
        if not isinstance(space := envs.single_observation_space, Box) or len(space.shape) != 1:
            envs = gym.wrappers.vector.FlattenObservation(envs)
        for attribute in ("sample_tasks", "task"):
            assert family_attribute(envs, attribute, fail) is not fail, f"it has no `{attribute}`"
        assert envs.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.DISABLED, "give AutoresetMode.DISABLED"
        assert isinstance(envs.single_action_space, Discrete | Box), "give Discrete or Box actions"
        assert not ("<Normal" in repr(envs) or family_attribute(envs, "update_running_mean")), "leave out Normalize wrappers"
        assert family_attribute(envs, "episodes_per_trial", 2) in range(1, 9999), "episodes_per_trial: give 1, 2, ..."
    except (AssertionError, AttributeError, ImportError, TypeError, ValueError, gym.error.Error) as error:
        fail(f"--env-id {args.env_id}: {error}")
    return envs


def sample_tasks(envs, num_tasks, rng):
    """A list of exactly `num_tasks` tasks of the family."""
    tasks = family_attribute(envs, "sample_tasks")(num_tasks, rng) if num_tasks else []
    if not isinstance(tasks, list | tuple | range | np.ndarray) or len(tasks) != num_tasks:
        fail(f"--env-id: sample_tasks({num_tasks}, rng) returned {tasks!r:.60}; give a list of {num_tasks} tasks")
    return copy.deepcopy(list(tasks))  # a family may fill the same array again


def to_env(actions, space):
    """Actions of the policy (N, ...) as the environment wants them: unit scale spans a Box, from `low` at -1 to `high` at 1. A
    side without a bound, or with one beyond a million, is taken to be two units from the other."""
    if isinstance(space, Discrete):
        return actions + space.start
    low = np.where(space.low > -1e6, space.low, np.where(space.high < 1e6, space.high - 2.0, -1))
    high = np.where(space.high < 1e6, space.high, low + 2)
    actions = low + (high - low) * (actions.reshape(-1, *space.shape) + 1) / 2
    actions = np.rint(actions) if space.dtype.kind in "biu" else actions
    return actions.clip(space.low, space.high).astype(space.dtype)


def as_floats(x, tasks):
    """Observations or rewards (N, ...) that the sub-environments returned, copied. One that is not finite ends the program."""
    x = np.array(x, np.float32)
    if not (finite := np.isfinite(x).all(-1)).all():
        fail(f"--env-id: task {tasks[finite.argmin()]!r:.60}: a reward or observation is not finite")
    return x


def step_envs(envs, actions, tasks, step):
    """Steps all sub-environments with actions (N, ...) and resets those whose episode ends. Returns the observations (N, D) to
    act on next, those that the step led to, and rewards, terminated and dones (N)."""
    after, rewards, terminated, truncated, _ = envs.step(to_env(actions.cpu().numpy(), envs.single_action_space))
    if step >= 20_000:
        fail("--env-id: no end after 20,000 steps; register it with max_episode_steps")
    after, rewards = as_floats(after, tasks), as_floats(np.reshape(rewards, (len(tasks), 1)), tasks)[:, 0]
    terminated, next_obs = np.array(terminated, bool), after.copy()
    dones = np.logical_or(terminated, truncated)
    if dones.any():  # the family may change what it returned before
        next_obs[dones] = as_floats(envs.reset(options={"reset_mask": dones.copy()})[0], tasks)[dones]
    return next_obs, after, rewards, terminated, dones


def report(results, rows, global_step, run_dir):
    """Adds results {split: {name: returns}} to the rows of eval.csv, writes it, and returns their means for TensorBoard."""
    scalars = {}
    for split, returns in results.items():
        for name, x in returns.items():
            rows.append([global_step, split, name, x.mean().item(), x.std().item() / len(x) ** 0.5, len(x)])
            scalars[f"eval/{split}_return_after_{name}"] = x.mean()
    header = "global_step,split,adaptation,mean_return,stderr,num_tasks"
    np.savetxt(run_dir / "eval.csv", rows, fmt="%s", delimiter=",", header=header, comments="")
    return scalars


if __name__ == "__main__":
    # SETTINGS
    for name in {"SIGINT", "SIGPIPE"} & {*dir(signal)}:  # Ctrl-C, and output cut by `head`: no traceback
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack ± and ²
    args, checkpoint = tyro.cli(Args, description=__doc__), None
    if path := args.resume or args.evaluate:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that a file may hold
            saved, own = checkpoint["args"], asdict(args).keys() - NOT_SAVED
        except Exception:  # whatever a missing, truncated or foreign file makes the reader raise
            fail(f"{path}: not a whole checkpoint.pt")
        if saved.keys() != own:  # the file was changed since, or is a copy
            print(f"{path}: ignored: {sorted(saved.keys() - own)}; default: {sorted(own - saved.keys())}", file=sys.stderr)
        defaults = Args(**{name: saved[name] for name in saved.keys() & (own - {"env_kwargs"})})
        args = tyro.cli(Args, description=__doc__, default=defaults)  # flags override what is saved
        args.env_kwargs = saved["env_kwargs"] | args.env_kwargs
    args.env_kwargs = {name: {"true": True, "false": False}.get(x, x) for name, x in args.env_kwargs.items()}
    for names, least, greatest in (
        ("seed num_train_tasks num_tasks learning_rate ent_coef", 0, 2**53),
        ("total_timesteps eval_every hidden_size num_features num_minibatches update_epochs", 1, 2**53),
        ("eval_tasks", 2, 2**53),
        ("gamma gae_lambda", 0, 1),
        ("torch_threads", 1, os.cpu_count()),  # thousands end in a segmentation fault
    ):
        for name in names.split():
            if not least <= getattr(args, name) <= greatest:
                fail(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number from {least} to {greatest}")

    # SETUP
    torch.set_num_threads(args.torch_threads)
    if args.device == "cuda":
        if (gpu := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            fail("--device cuda: each process needs a GPU; give cpu")
        torch.cuda.set_device(gpu)
    envs, key = make_envs(args, 32), (args.seed, 0, HELDOUT_TASKS)
    heldout_tasks, again = (sample_tasks(x, args.eval_tasks, seed_all(*key)) for x in (envs, make_envs(args, 1)))
    with suppress(Exception):  # tasks that cannot be pickled cannot be compared
        if pickle.dumps(heldout_tasks) != pickle.dumps(again) and str(heldout_tasks) != str(again):
            fail(f"--env-id {args.env_id}: sample_tasks must draw from rng alone")
    train_tasks = sample_tasks(envs, args.num_train_tasks, seed_all(args.seed, 0, TRAIN_TASKS))
    rng, saved = seed_all(args.seed, 0, START), checkpoint and checkpoint["agent"]
    num_episodes = int(family_attribute(envs, "episodes_per_trial", 2))
    blank = torch.zeros(1, *envs.single_observation_space.shape)
    agent = Agent(blank, blank[:, 0], envs.single_action_space, args)
    batch = rollout(agent, envs, sample_tasks(envs, 32, rng), num_episodes, args.seed)  # by an untrained agent of one centre
    real = batch["masks"] > 0
    agent = Agent(batch["obs"][real], batch["rewards"][real], envs.single_action_space, args, saved).to(args.device)
    if WORLD_SIZE > 1:  # the processes may have seen other noise: all take the first one's agent
        dist.init_process_group()
        dist.broadcast_object_list(shared := [agent])
        agent = shared[0].to(args.device)
    others = [p for p in agent.parameters() if all(p is not x for x in agent.critic_parameters)]
    optimizer = torch.optim.Adam([{"params": others}, {"params": agent.critic_parameters}], eps=1e-5)
    limit = family_attribute(envs, "max_episode_steps") or family_attribute(envs, "_max_episode_steps", 0)
    trial_steps = num_episodes * limit or real.sum().item() / 32
    args.num_tasks = args.num_tasks or int(np.clip(16_000 / trial_steps, 16, 1024)) // WORLD_SIZE * WORLD_SIZE
    num_tasks = args.num_tasks // WORLD_SIZE  # of this process
    if args.num_tasks % WORLD_SIZE or num_tasks < args.num_minibatches:
        fail(f"--num-tasks {args.num_tasks}: give a multiple of {WORLD_SIZE}, at least {args.num_minibatches} each")
    envs, eval_envs = make_envs(args, num_tasks), make_envs(args, args.eval_tasks)
    iteration, global_step, eval_rows, results = 0, 0, [], {}
    if checkpoint:
        try:
            agent.load_state_dict(checkpoint["agent"])
        except RuntimeError:
            fail(f"{path}: no agent for these flags")
        optimizer.load_state_dict(checkpoint["optimizer"])
        iteration, global_step, eval_rows = (checkpoint[name] for name in ("iteration", "global_step", "eval_rows"))
    run_name = f"{args.env_id.split(':')[-1]}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    run_dir = args.resume.parent if args.resume else Path(args.runs_dir, "evaluate__" * bool(args.evaluate) + run_name)
    path = path or run_dir / "checkpoint.pt"
    if RANK == 0:
        writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # events of a resumed run that are not in its checkpoint
        saved_args = {name: x for name, x in asdict(args).items() if name not in NOT_SAVED}
        (run_dir / "args.json").write_text(json.dumps(saved_args, indent=1))
        args.evaluate or print(f"to go on: {shlex.join(['python', sys.argv[0], '--resume', str(path)])}", file=sys.stderr)

    # TRAINING
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True, disable=RANK > 0)
    while global_step < args.total_timesteps and not args.evaluate:
        iteration, start = iteration + 1, time.time()
        rng = seed_all(args.seed, iteration, RANK)
        left = 1 - global_step / args.total_timesteps  # of the training
        optimizer.param_groups[0]["lr"] = learning_rate = left * args.learning_rate
        optimizer.param_groups[1]["lr"] = 5 * learning_rate  # the critic's, which makes one pass
        tasks = sample_tasks(envs, num_tasks, rng)
        if train_tasks:
            tasks = [train_tasks[i] for i in rng.integers(len(train_tasks), size=num_tasks)]

        batch = rollout(agent, envs, tasks, num_episodes, int(rng.integers(2**31)))
        real, values = batch["masks"] > 0, batch["values"]
        advantages = compute_gae(batch["rewards"], values, batch["masks"], args.gamma, args.gae_lambda)
        batch["returns"] = returns = advantages + values
        batch["advantages"] = (advantages - advantages[real].mean()) / (advantages[real].std() + 1e-8)
        rate = 1.0 if iteration == 1 else 0.1  # slowly, since the values are in these units and jump with them
        agent.return_mean.lerp_(returns[real].mean(), rate)
        agent.return_std.lerp_(returns[real].std().clamp(min=1e-3 * agent.reward_scale), rate)
        average(agent.return_mean, agent.return_std)
        rollout_time, start = time.time() - start, time.time()

        losses, num_steps = [], int(real.sum())
        not_for_ppo = ("obs", "after", "next_x", "rewards", "values", "masks", "episodes")
        flat = {name: x[real] for name, x in batch.items() if name not in not_for_ppo}  # (S, ...)
        for epoch in range(args.update_epochs):
            splits = (torch.randperm(n, device=args.device).tensor_split(args.num_minibatches) for n in (num_steps, num_tasks))
            for mb_inds, mb_trials in zip(*splits, strict=True):
                mb_losses = meta_loss(agent, flat, mb_inds)
                loss = mb_losses["policy_loss"] + 0.5 * mb_losses["value_loss"] - left * args.ent_coef * mb_losses["entropy"]
                if epoch == 0 and args.meta_value:
                    mb_losses["critic_loss"] = critic_loss(agent, batch, mb_trials)
                    loss = loss + mb_losses["critic_loss"]
                optimizer.zero_grad()
                loss.backward()
                average(*(p.grad for p in agent.parameters() if p.grad is not None))
                norm = nn.utils.clip_grad_norm_(agent.parameters(), max_norm=0.5, error_if_nonfinite=True)
                optimizer.step()
                losses.append({name: x.detach() for name, x in mb_losses.items()} | {"meta_grad_norm": norm})
        update_time = time.time() - start

        # LOGGING
        steps, by_episode = real.sum().double(), episode_returns(batch, num_episodes).mean(1)
        average(steps, by_episode)
        steps = round(steps.item() * WORLD_SIZE)
        global_step += steps
        progress.set_postfix(pre=f"{by_episode[0]:.2f}", post=f"{by_episode[-1]:.2f}", refresh=False)
        progress.update(steps)
        if RANK > 0:
            continue
        scalars = {f"losses/{name}": torch.stack([x[name] for x in losses if name in x]).mean() for name in losses[0]}
        scalars["losses/explained_variance"] = 1 - advantages[real].var() / returns[real].var().clamp(min=1e-8)
        scalars |= {f"charts/episode_{k}_return": x for k, x in enumerate(by_episode, 1)}
        scalars |= {"charts/pre_adaptation_return": by_episode[0], "charts/post_adaptation_return": by_episode[-1]}
        scalars |= {"charts/SPS": steps / (rollout_time + update_time), "charts/learning_rate": learning_rate}
        scalars |= {"time/rollout": rollout_time, "time/update": update_time}
        if global_step >= args.total_timesteps or iteration % args.eval_every == 0:
            results = {"train": evaluate(agent, eval_envs, train_tasks or tasks, args)}
            results["heldout"] = evaluate(agent, eval_envs, heldout_tasks, args)
            scalars |= report(results, eval_rows, global_step, run_dir)
            last = [*results["heldout"]][-1]
            scalars["eval/generalization_gap"] = results["train"][last].mean() - results["heldout"][last].mean()
        for tag, value in scalars.items():
            writer.add_scalar(tag, float(value), global_step)
        writer.flush()
        checkpoint = {"args": saved_args, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint |= {"iteration": iteration, "global_step": global_step, "eval_rows": eval_rows}
        torch.save(checkpoint, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # whole or not at all
    progress.close()
    if RANK > 0:
        os._exit(0)  # the usual exit would race with gloo's threads, which may still hold tensors, and abort

    # CLOSING
    if not results:  # nothing was trained
        results = {"heldout": evaluate(agent, eval_envs, heldout_tasks, args)}
        if args.evaluate:
            report(results, [], global_step, run_dir)
    print(f"\nreturn on {args.eval_tasks} held-out tasks")
    for name, x in results["heldout"].items():
        print(f"{name:>12} {x.mean():10.3f} ± {x.std() / len(x) ** 0.5:.3f}")
    numbered = [x for name, x in results["heldout"].items() if name != "trial"]
    if len(numbered) > 1:
        gain = numbered[-1] - numbered[0]
        score = gain.mean() / gain.std().clamp(min=1e-8) * len(gain) ** 0.5
        verdict = "rises" if score > 3 else "falls" if score < -3 else "stays level"
        print(f"The return {verdict}: last minus first is {gain.mean():.3f}, {score:.1f} standard errors.")
