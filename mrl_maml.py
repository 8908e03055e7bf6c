# /// script
# requires-python = ">=3.11"
# dependencies=["torch==2.13.0","gymnasium[mujoco]==1.4.0","tyro==1.0.17","tensorboard==2.21.0","numpy==2.4.6","tqdm==4.70.1"]
# ///
"""MAML: an actor-critic learner whose starting weights are learned (Finn et al. 2017).

In the inner loop, the learner of a task starts from the weights theta_0, plays E episodes, takes a policy-gradient step on
them, plays E fresh episodes with the new weights, and so on, K times:

    theta_{k+1} = theta_k + shift_k + rate_k * sigma^2 * grad_theta mean_{e,t} log pi_theta(a_t | s_t) A_t

where sigma^2 is a Gaussian policy's mean variance (1 for log sigma itself, and for discrete actions). The shift is the same
in every task: the policy may explore first and act precisely later. The outer loop learns theta_0, and the rate (Meta-SGD,
Li et al. 2017) and shift of each weight and step. It maximises the mean return of theta_1 to theta_K, not that of theta_0,

    J(theta_0, rate, shift) = mean_task [ 1/K sum_k=1..K return of theta_k ]

by PPO (as ProMP, Rothfuss et al. 2019, without its KL penalty), with advantages normalised in each task, and a gradient
through all steps and their second derivatives (see `inner_loss`) that, as in the paper, gives no credit for episodes from
which later steps learn more. The critic is a new least-squares fit in each task and batch, and has no weights to learn.

    python mrl_maml.py                                                 # PointNav: go to a hidden goal
    python mrl_maml.py --env-id mrl_actor_critic:TabularMDP-v0         # a family of another script, or your own
    python mrl_maml.py --evaluate runs/<run>/checkpoint.pt             # held-out tasks

Shapes: M tasks in a meta-batch, E episodes per task and step, T steps an episode, N = M * E sub-environments, K adaptation
steps, D observation size, A action size, F features of the critic, S real steps of all episodes. A function whose shapes lack
M handles one task: `torch.func.vmap` runs it for all at once. Read AGENT, ALGORITHM and TRAINING.
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
from torch.func import grad, vmap
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT = tyro.conf.create_mutex_group(required=False)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's folder
    seed: int = 1  # seed of every random draw
    device: Literal["cpu", "cuda"] = "cpu"  # where to compute; cuda pays off with many tasks
    torch_threads: int = 1  # threads of torch; more than one pays off on idle cores only
    env_id: str = "PointNav-v0"  # task family, or `module:name` for one of another file, such as mrl_maml:PointNav-v0
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # the family's arguments: name value ...
    total_timesteps: int = 6_000_000  # environment steps of training, without evaluations
    num_train_tasks: int = 0  # train on this many fixed tasks (0: fresh tasks in each iteration)
    eval_every: int = 25  # iterations between two evaluations on held-out tasks
    eval_tasks: int = 40  # number of held-out tasks, the same ones in each evaluation
    runs_dir: str = "runs"  # folder in which each run gets a folder of its own
    resume: Annotated[Path | None, CHECKPOINT] = None  # go on with the run of this checkpoint; flags override saved ones
    evaluate: Annotated[Path | None, CHECKPOINT] = None  # only evaluate this checkpoint; flags override saved ones

    # Algorithm specific arguments
    learning_rate: float = 4e-3  # learning rate of Adam at the start; it falls linearly to zero over the training
    num_tasks: int = 0  # tasks in a meta-batch, M (0: 40,000 environment steps, but 8 to 256 tasks)
    num_episodes: int = 0  # episodes before each adaptation step and after the last, E (0: a trial of the family, or 20)
    adapt_steps: int = 3  # adaptation steps in the training, K
    eval_adapt_steps: int = 0  # steps in evaluations (0: as in training); further ones repeat the last rates, without shift
    inner_lr: float = 1.0  # rate of the inner steps at the start, times sigma^2 (with discrete actions, times A)
    inner_loss: Literal["ratio", "log-prob", "dice"] = "ratio"  # terms of the meta-gradient that are kept, see `inner_loss`
    first_order: bool = False  # leave out the second derivatives, for comparison
    hidden_size: int = 64  # units of the two tanh layers
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.9  # lambda of generalized advantage estimation
    update_epochs: int = 5  # meta-updates with the episodes of an iteration


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


class PointNav(TaskVectorEnv):
    """A point that starts at (0, 0) and a hidden goal ~ U[-0.5, 0.5]^2; the action, clipped to ±0.1 per axis, is added to the
    position; reward -distance to the goal after the move; 100 steps, no early end; the observation is x, y (Finn et al. 2017,
    5.3; there the squared distance, in their code the plain one, and within 0.01 is an end)."""

    def __init__(self, num_envs=1, max_episode_steps=100):
        spaces = Box(-np.inf, np.inf, (2,)), Box(-0.1, 0.1, (2,))
        super().__init__(num_envs, max_episode_steps, *spaces)

    def sample_tasks(self, num_tasks, rng):
        return rng.uniform(-0.5, 0.5, (num_tasks, 2))

    def act(self, actions):
        self.state = self.state + np.clip(actions, -0.1, 0.1)
        return -np.linalg.norm(self.state - self.tasks, axis=-1)


class SparsePointNav(PointNav):
    """The goal on the unit half circle, the same moves; reward 1 - distance within 0.2 of the goal, else 0; 60 steps."""

    def __init__(self, num_envs=1, max_episode_steps=60):
        super().__init__(num_envs, max_episode_steps)

    def sample_tasks(self, num_tasks, rng):
        angles = rng.uniform(0, np.pi, num_tasks)
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1)

    def act(self, actions):
        distances = -super().act(actions)
        return np.where(distances <= 0.2, 1 - distances, 0.0)


class HalfCheetahDir(TaskVectorEnv):
    """gymnasium's HalfCheetah-v5 that is to run forwards or backwards: reward direction * x_velocity - control cost, direction
    ±1; 200 steps (Finn et al. 2017, 5.3). `mujoco.rollout` simulates all sub-environments at once, on all cores."""

    body, control_cost = "HalfCheetah-v5", 0.1

    def __init__(self, num_envs=1, max_episode_steps=200):
        self.simulate = importlib.import_module("mujoco.rollout").rollout  # mujoco is imported for these families alone
        self.robot = gym.make(self.body).unwrapped
        self.model, threads = self.robot.model, max(1, os.cpu_count() // WORLD_SIZE)
        self.data = [copy.copy(self.robot.data) for _ in range(threads)]
        self.unobserved = 1 + self.robot.observation_structure["skipped_qpos"]  # time and place
        size = 1 + self.model.nq + self.model.nv  # of the state: time, positions, velocities
        observation_space = Box(-np.inf, np.inf, (size - self.unobserved,))
        super().__init__(num_envs, max_episode_steps, observation_space, self.robot.action_space)
        self.state = np.zeros((num_envs, size))

    def sample_tasks(self, num_tasks, rng):
        return rng.choice([-1.0, 1.0], num_tasks)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.robot.np_random = self.np_random
        for i in np.flatnonzero(self.steps == 0):
            self.robot.reset_model()
            self.state[i] = 0, *self.robot.data.qpos, *self.robot.data.qvel
        return self.observe(), {}

    def act(self, actions):
        states, _ = self.simulate(self.model, self.data, self.state, actions[:, None], nstep=self.robot.frame_skip)
        x_velocity = (states[:, -1, 1] - self.state[:, 1]) / self.robot.dt
        self.state = states[:, -1]
        return self.reward(x_velocity) - self.control_cost * np.square(actions).sum(axis=-1)

    def reward(self, x_velocity):
        return self.tasks * x_velocity

    def observe(self):
        return self.state[:, self.unobserved :].astype(np.float32)


class HalfCheetahVel(HalfCheetahDir):
    """HalfCheetah with a goal velocity ~ U[0, 2]: reward -|x_velocity - goal| - control cost (Finn et al. 2017, 5.3)."""

    def sample_tasks(self, num_tasks, rng):
        return rng.uniform(0, 2, num_tasks)

    def reward(self, x_velocity):
        return -np.abs(x_velocity - self.tasks)


class AntDir(HalfCheetahDir):
    """gymnasium's Ant-v5, without contact forces, that is to walk forwards or backwards: reward direction * x_velocity -
    control cost + 1 while it is healthy, its height in [0.2, 1]; an episode ends when it is not (Finn et al. 2017, 5.3)."""

    body, control_cost = "Ant-v5", 0.5

    def step(self, actions):
        next_obs, rewards, _, truncated, infos = super().step(actions)
        healthy = (0.2 <= self.state[:, 3]) & (self.state[:, 3] <= 1)
        return next_obs, rewards + healthy, ~healthy, truncated, infos


for family in (PointNav, SparsePointNav, HalfCheetahDir, HalfCheetahVel, AntDir):
    gym.registry.pop(f"{family.__name__}-v0", None)  # a copy of this file may have registered it: the last one counts
    gym.register(f"{family.__name__}-v0", vector_entry_point=family)


# AGENT
class Agent(nn.Module):
    """The weights that the learner of every task starts from, and the rate and shift of each weight in each inner step."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        action_dim = gym.spaces.flatdim(action_space)
        sizes = (obs_dim, args.hidden_size, args.hidden_size, action_dim)
        weights = {}
        for i, gain in enumerate((2**0.5, 2**0.5, 0.01)):
            weights[f"w{i}"] = nn.init.orthogonal_(torch.empty(sizes[i], sizes[i + 1]), gain)
            weights[f"b{i}"] = torch.zeros(1, sizes[i + 1])
        if not self.discrete:
            weights["log_std"] = torch.zeros(1, action_dim)
        # Near uniform, dp / dlogit = p (1 - p) is about 1 / A: all rates are A times as large.
        log_rate = float(np.log(args.inner_lr * (action_dim if self.discrete else 1)))
        log_rates = {name: torch.full((args.adapt_steps, *w.shape), log_rate) for name, w in weights.items()}
        shifts = {name: torch.zeros(args.adapt_steps, *w.shape) for name, w in weights.items()}
        if not self.discrete:  # log_std falls by 1, 0.3, 0.09: wide before the first step
            shifts["log_std"] -= 0.3 ** torch.arange(args.adapt_steps)[:, None, None]
        self.weights, self.log_rates, self.shifts = map(nn.ParameterDict, (weights, log_rates, shifts))
        self.obs_mean, self.obs_std = nn.Buffer(torch.zeros(obs_dim)), nn.Buffer(torch.ones(obs_dim))

    def set_units(self, obs):
        """Fixes the units of observations (S, D): they must not drift. No unit is below one (if all deviate less than 0.1, ten
        times the greatest deviation), since the learner may later go far beyond what it saw at first."""
        self.obs_mean, self.obs_std = obs.mean(0), obs.std(0).clamp(10 * obs.std(0).max().clamp(1e-5, 0.1))

    def inner_step(self, k):
        """Rates and shifts, by weight, of inner step k, from 0. A step beyond those of the training repeats their last rates,
        without shift."""
        last = min(k, len(self.log_rates["b0"]) - 1)
        rates = {name: log_rate[last].exp() for name, log_rate in self.log_rates.items()}
        shifts = {name: shift[last] * (k == last) for name, shift in self.shifts.items()}
        return {"rates": rates, "shifts": shifts}


def policy(weights, obs):
    """The policy at obs (..., D) of one task, or at obs (M, E, D) with weights (M, ...). Log-probabilities are summed over
    action dimensions."""
    x = obs.clamp(-10, 10) if weights["w0"].dim() == 3 else obs.clamp(-10, 10).flatten(0, -2)
    for i in range(2):  # in place: memory traffic takes most of the time
        x = (x @ weights[f"w{i}"]).add_(weights[f"b{i}"]).tanh_()
    params = (x @ weights["w2"]).add_(weights["b2"]).view(*obs.shape[:-1], -1)  # logits or means (..., A)
    if "log_std" not in weights:
        return Categorical(logits=params, validate_args=False)
    std = weights["log_std"].clamp(-5, 2).exp()  # too large a step must neither freeze the policy nor blow it up
    return Independent(Normal(params, std, validate_args=False), 1, validate_args=False)


# ALGORITHM
@torch.no_grad()
def rollout(agent, weights, envs, tasks, num_episodes, seed):
    """Plays an episode in each of N sub-environments, each task with its own weights (M, ...). Those that have ended go on,
    masked, until all have. Returns a dict: obs (M, T, E, D), actions (M, T, E, ...), and (M, T, E) each: logprobs,
    rewards, masks (1: part of the episode)."""
    batch, shape = [], (len(tasks), num_episodes)
    tasks = [task for task in tasks for _ in range(num_episodes)]  # (N)
    set_attr = getattr(envs.unwrapped, "set_attr", envs.unwrapped.__setattr__)
    set_attr("task", [copy.deepcopy(task) for task in tasks])  # a family may change its task
    next_obs = as_floats(envs.reset(seed=seed)[0], tasks)
    running = np.ones(len(tasks), dtype=bool)
    while running.any():
        obs = torch.as_tensor(next_obs).to(agent.obs_mean).unflatten(0, shape)  # (M, E, D)
        obs = (obs - agent.obs_mean) / agent.obs_std
        pi = policy(weights, obs)
        actions = pi.sample()
        next_obs, _, rewards, _, dones = step_envs(envs, actions.flatten(0, 1), tasks, len(batch))
        rewards, masks = (torch.as_tensor(x).to(obs).unflatten(0, shape) for x in (rewards * running, running))
        step = {"obs": obs, "actions": actions, "logprobs": pi.log_prob(actions), "rewards": rewards, "masks": masks}
        batch.append(step)
        running = running & ~dones
    return {name: torch.stack([step[name] for step in batch], dim=1) for name in batch[0]}


def compute_gae(rewards, values, masks, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) in each episode; all (T, E). The value after an episode
    is zero, also at a time limit, since the critic sees the time."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = advantages[t] = (delta + gamma * gae_lambda * next_advantage) * masks[t]
        next_value = values[t] * masks[t]
    return advantages


def linear_values(obs, returns, masks, ridge=1e-5):
    """Values (T, E) in a task: a fit of its returns on [obs, obs^2, t, t^2, t^3, 1] (Duan et al. 2016, Benchmarking deep RL).
    The ridge draws it to their mean, strongly where the steps are so few that it would fit their noise."""
    t = torch.arange(len(masks), device=obs.device)[:, None, None].expand(*masks.shape, 1) / 100
    x = torch.cat([obs, obs**2, t, t**2, t**3, torch.ones_like(t)], dim=-1)  # (T, E, F)
    x, mean = (x * masks[..., None]).flatten(0, 1).double(), masked_mean(returns, masks)
    y = ((returns - mean) * masks).flatten()[:, None].double()
    penalty = torch.where(masks.sum() < 2 * x.shape[-1], 0.1, ridge) * masks.sum() * torch.eye(x.shape[-1], device=obs.device)
    coefficients = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    return mean + (x @ coefficients).view_as(masks).to(masks)


def add_advantages(batch, args):
    """A task's batch with its advantages (T, E), of mean 0 and deviation 1, and the explained variance of its returns."""
    rewards, masks = batch["rewards"], batch["masks"]
    returns = compute_gae(rewards, torch.zeros_like(rewards), masks, args.gamma, 1.0)  # values 0, lambda 1: returns-to-go
    values = linear_values(batch["obs"], returns, masks)
    advantages = compute_gae(rewards, values, masks, args.gamma, args.gae_lambda)
    advantages = advantages - masked_mean(advantages, masks)
    advantages = advantages / (masked_mean(advantages**2, masks).sqrt() + 1e-8)
    residuals, deviations = returns - values, returns - masked_mean(returns, masks)
    explained = 1 - masked_mean(residuals**2, masks) / (masked_mean(deviations**2, masks) + 1e-8)
    return batch | {"advantages": advantages, "explained_variance": explained}


def masked_mean(x, masks):
    return (x * masks).sum() / masks.sum()


def inner_loss(weights, batch, args):
    """The loss of an inner step on one task's batch (T, E, ...). All three have the same gradient at the weights that drew it,
    and differ in how that gradient changes with the weights, which is what reaches the meta-gradient:

    log-prob  log pi A (Finn et al. 2017): treats the batch as fixed, although other weights would draw other actions.
    ratio     pi / pi_old A (LVC, Rothfuss et al. 2019): reweights an action by its own probability, not by those before it.
    dice      pi / pi.detach() A, times those of all actions before (Foerster et al. 2018, Farquhar et al. 2019): unbiased."""
    masks = batch["masks"]
    logprobs = policy(weights, batch["obs"]).log_prob(batch["actions"])  # (T, E)
    if args.inner_loss == "log-prob":
        surrogate = logprobs
    elif args.inner_loss == "ratio":
        surrogate = (logprobs - batch["logprobs"]).exp()
    else:
        logratio = logprobs - logprobs.detach()
        log_product = logratio.cumsum(0)  # of the ratios up to and with this action
        surrogate = log_product.exp() - (log_product - logratio).exp()  # with and without this action's own: 0 in value
    return -masked_mean(surrogate * batch["advantages"], masks)


def adapt(weights, inner_step, batch, args):
    """One inner step for one task: its weights, moved by the shift and against the gradient of the inner loss.

    The gradient of a Gaussian's mean scales as 1 / sigma. Times the mean variance, a step moves it in units of sigma."""
    grads = grad(inner_loss)(weights, batch, args)
    if args.first_order:
        grads = {name: g.detach() for name, g in grads.items()}
    if "log_std" in weights:
        variance = (weights["log_std"].clamp(-5, 2).exp() ** 2).mean()
        grads = {name: g if name == "log_std" else variance * g for name, g in grads.items()}
    return {name: w + inner_step["shifts"][name] - inner_step["rates"][name] * grads[name] for name, w in weights.items()}


def outer_loss(weights, batch, clip_coef=0.4):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) of one task's adapted weights on the batch that they played before
    this iteration's updates, and what is logged; means over the real steps, by name."""
    masks, advantages, pi = batch["masks"], batch["advantages"], policy(weights, batch["obs"])
    logratio = pi.log_prob(batch["actions"]) - batch["logprobs"]  # (T, E)
    ratio = logratio.exp()
    losses = {
        "policy_loss": -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages),
        "entropy": pi.entropy(),
        "approx_kl": ratio - 1 - logratio,
        "clipfrac": ((ratio - 1).abs() > clip_coef).to(masks),
    }
    return {name: masked_mean(loss, masks) for name, loss in losses.items()}


def meta_loss(weights, inner_steps, batches, args):
    """Losses of one task as functions of the start `weights` and of the rates and shifts of the `inner_steps`: adapt on each
    batch but the last, judge the result on the next. Returns the means over the K steps by name."""
    losses = []
    for inner_step, batch, next_batch in zip(inner_steps, batches[:-1], batches[1:], strict=True):
        weights = adapt(weights, inner_step, batch, args)
        losses.append(outer_loss(weights, next_batch))
    return {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}


@torch.no_grad()
def collect(agent, envs, tasks, num_steps, rng, args):
    """Plays and adapts `num_steps` times in each task, then plays once more: num_steps + 1 batches of tensors (M, ...)."""
    weights = {name: w.expand(len(tasks), *w.shape) for name, w in agent.weights.items()}
    num_episodes, batches = envs.num_envs // len(tasks), []
    for k in range(num_steps + 1):
        if k > 0:
            inner_step = agent.inner_step(k - 1)
            weights = vmap(adapt, in_dims=(0, None, 0, None))(weights, inner_step, batches[-1], args)
        batch = rollout(agent, weights, envs, tasks, num_episodes, int(rng.integers(2**31)))
        batches.append(vmap(add_advantages, in_dims=(0, None))(batch, args))
    return batches


def mean_returns(batches):
    """Return of an episode, mean over the episodes of a task, after each number of steps: (K + 1, M)."""
    return torch.stack([batch["rewards"].sum(1).mean(1) for batch in batches])


def evaluate(agent, envs, tasks, args):
    """{number of adaptation steps: mean return of an episode (tasks)}, always with the same random numbers."""
    rng = seed_all(args.seed, 0, EVALUATION)
    tasks = [tasks[i % len(tasks)] for i in range(args.eval_tasks)]  # training tasks may be fewer: they repeat
    batches = collect(agent, envs, tasks, args.eval_adapt_steps or args.adapt_steps, rng, args)
    return dict(enumerate(mean_returns(batches).cpu()))


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
        ("seed num_train_tasks num_tasks num_episodes eval_adapt_steps learning_rate", 0, 2**53),
        ("total_timesteps eval_every hidden_size adapt_steps update_epochs", 1, 2**53),
        ("inner_lr", 1e-9, 2**53),
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
    rng = seed_all(args.seed, 0, START)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args).to(args.device)
    num_episodes = args.num_episodes or int(family_attribute(envs, "episodes_per_trial", 20))
    batch = collect(agent, envs, sample_tasks(envs, 32, rng), 0, rng, args)[0]  # by the untrained agent, one episode a task
    real = batch["masks"] > 0
    agent.set_units(batch["obs"][real])
    if WORLD_SIZE > 1:  # the processes may have seen other noise: all take the first one's agent
        dist.init_process_group()
        dist.broadcast_object_list(shared := [agent])
        agent = shared[0].to(args.device)
    weights = {"params": [*agent.weights.values(), *agent.shifts.values()], "factor": 1}
    log_rates = {"params": [*agent.log_rates.values()], "factor": 10}  # a rate may have to change by orders of magnitude
    optimizer = torch.optim.Adam([weights, log_rates], eps=1e-5)
    limit = family_attribute(envs, "max_episode_steps") or family_attribute(envs, "_max_episode_steps", 0)
    task_steps = (args.adapt_steps + 1) * num_episodes * (limit or real.sum().item() / 32)
    args.num_tasks = args.num_tasks or int(np.clip(40_000 / task_steps, 8, 256)) // WORLD_SIZE * WORLD_SIZE
    num_tasks = args.num_tasks // WORLD_SIZE  # of this process
    if args.num_tasks % WORLD_SIZE or num_tasks == 0:
        fail(f"--num-tasks {args.num_tasks}: give a multiple of {WORLD_SIZE}")
    envs, eval_envs = (make_envs(args, n * num_episodes) for n in (num_tasks, args.eval_tasks))
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
        learning_rate = (1 - global_step / args.total_timesteps) * args.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        tasks = sample_tasks(envs, num_tasks, rng)
        if train_tasks:
            tasks = [train_tasks[i] for i in rng.integers(len(train_tasks), size=num_tasks)]

        batches = collect(agent, envs, tasks, args.adapt_steps, rng, args)
        rollout_time, start = time.time() - start, time.time()

        losses = []
        for _ in range(args.update_epochs):
            inner_steps = [agent.inner_step(k) for k in range(args.adapt_steps)]
            meta_losses = vmap(meta_loss, in_dims=(None, None, 0, None))(dict(agent.weights), inner_steps, batches, args)
            meta_losses = {name: loss.mean() for name, loss in meta_losses.items()}
            optimizer.zero_grad()
            meta_losses["policy_loss"].backward()
            average(*(p.grad for p in agent.parameters()))
            norm = nn.utils.clip_grad_norm_(agent.parameters(), max_norm=0.5, error_if_nonfinite=True)
            optimizer.step()
            losses.append({name: loss.detach() for name, loss in meta_losses.items()} | {"meta_grad_norm": norm})
        update_time = time.time() - start

        # LOGGING
        steps, by_step = sum(batch["masks"].sum().double() for batch in batches), mean_returns(batches).mean(1)
        average(steps, by_step)
        steps = round(steps.item() * WORLD_SIZE)
        global_step += steps
        progress.set_postfix(pre=f"{by_step[0]:.2f}", post=f"{by_step[-1]:.2f}", refresh=False)
        progress.update(steps)
        if RANK > 0:
            continue
        scalars = {f"losses/{name}": torch.stack([x[name] for x in losses]).mean() for name in losses[0]}
        scalars["losses/explained_variance"] = batches[-1]["explained_variance"].mean()
        scalars |= {"charts/pre_adaptation_return": by_step[0], "charts/post_adaptation_return": by_step[-1]}
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
