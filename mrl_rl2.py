# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "numpy==2.4.6",
#                 "tqdm==4.70.1"]
# ///
"""RL²: a recurrent actor-critic whose hidden state is the learner (Duan et al. 2016, Wang et al. 2016).

A trial is E episodes of one task. The network reads the observation, the step that led there (observation, action, reward)
and whether an episode has just ended; its hidden state is carried through all episodes of the trial, so what it has seen of
the task is in there and acting on it is the adaptation: no gradient step is taken in a task. Upstairs, PPO (Schulman et al.
2017) maximises the return of the whole trial over many tasks. Advantages and hidden state therefore run across episode ends
and are cut at the end of the trial alone; nothing comes after a trial, so nothing is bootstrapped there.

    python mrl_rl2.py                                                  # GridNavi: search for a hidden goal, then walk to it
    python mrl_rl2.py --env-id Bandit-v0 --env-kwargs k 5 n 100        # explore and exploit 5 arms for 100 pulls
    python mrl_rl2.py --evaluate runs/<run>/checkpoint.pt              # held-out tasks
    tensorboard --logdir runs

Shapes: M tasks of a meta-batch (one trial each), E episodes a trial, L steps a trial, D observation size, A action size,
I = 2 D + A + 2 input size, H hidden size.
"""

import importlib
import inspect
import io
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordVideo
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    seed: int = 1
    """seed of every random draw"""
    device: str = "cpu"
    """cpu or cuda; networks this small run faster on the cpu"""
    dtype: Literal["float32", "float64"] = "float32"
    """number type of weights and data; float64 is for checking numerics"""
    torch_threads: int = 0
    """threads that torch may use (0: torch's own choice)"""
    env_id: str = "GridNavi-v0"
    """task family: one of this file, `mrl_maml:PointNav-v0` of another file, or `my_tasks:MyTasks-v0` of your own"""
    env_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    """arguments of the task family, for example `k 5 n 100`"""
    total_timesteps: int = 3_000_000
    """environment steps of the whole training"""
    num_train_tasks: int = 0
    """train on this many fixed tasks (0: fresh tasks in each iteration)"""
    eval_every: int = 20
    """iterations between two evaluations on held-out tasks"""
    eval_tasks: int = 1000
    """number of held-out tasks, the same ones in each evaluation"""
    checkpoint_every: int = 10
    """iterations between two checkpoints"""
    runs_dir: str = "runs"
    """folder in which each new run gets a folder of its own; a resumed one stays in its folder"""
    resume: str | None = None
    """go on with the stopped run of this checkpoint; flags given beside it win over the saved ones"""
    evaluate: str | None = None
    """evaluate this checkpoint on held-out tasks and exit; flags given beside it win over the saved ones"""
    capture_video: bool = False
    """film a few held-out tasks at the end (needs `pip install moviepy`)"""

    # Algorithm specific arguments
    learning_rate: float = 1e-3
    """learning rate of Adam at the start"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero over the training"""
    num_tasks: int = 256
    """tasks of a meta-batch, M: one trial each"""
    episodes_per_trial: int = 0
    """episodes of a trial, E (0: as the task family says, or 2 where it says nothing)"""
    hidden_size: int = 128
    """size of the GRU's hidden state, H"""
    gamma: float = 0.97
    """discount factor, over the whole trial"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation, over the whole trial"""
    num_minibatches: int = 4
    """minibatches of whole trials in each epoch"""
    update_epochs: int = 3
    """passes over the meta-batch in each iteration"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    ent_coef: float = 0.02
    """weight of the entropy bonus at the start; it falls linearly to zero with `--anneal-lr`"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """the meta-gradient is scaled down to this norm"""


# TASK FAMILIES
class TaskVectorEnv(gym.vector.VectorEnv):
    """What the natively vectorised families share: a task and a noise stream for each sub-environment, explicit resets.

    A family says how tasks are drawn (`sample_tasks`), taken up (`set_tasks`), started (`start`), acted in (`act`) and seen
    (`observe`). Sub-environments that run together need no Python loop; episodes end after `episode_steps` steps.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}

    def __init__(self, num_envs, observation_space, action_space, episode_steps):
        self.num_envs, self.episode_steps = num_envs, episode_steps
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = gym.vector.utils.batch_space(observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(action_space, num_envs)
        self.steps = np.zeros(num_envs, dtype=np.int64)
        self.set_attr("task", self.sample_tasks(num_envs, np.random.default_rng(0)))
        self.rngs = [np.random.default_rng(i) for i in range(num_envs)]

    def set_attr(self, name, values):
        setattr(self, name, values)
        self.has_new_task = np.ones(self.num_envs, dtype=bool)

    def reset(self, *, seed=None, options=None):
        """Restarts the sub-environments of `options["reset_mask"]`, or all; `seed`: one int for each sub-environment."""
        if seed is not None:
            self.rngs = [np.random.default_rng(s) for s in seed]
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if (new := mask & self.has_new_task).any():
            self.set_tasks(np.flatnonzero(new))
            self.has_new_task &= ~new
        self.steps[mask] = 0
        self.start(mask)
        return self.observe(), {}

    def step(self, actions):
        rewards = self.act(actions)
        self.steps += 1
        ended = self.steps >= self.episode_steps
        return self.observe(), rewards, np.zeros_like(ended), ended, {}


class Bandit(TaskVectorEnv):
    """k Bernoulli arms with p ~ U[0, 1]; a trial is n pulls, each pull an episode of one step (Duan et al. 2016, 3.1)."""

    def __init__(self, num_envs=1, k=5, n=10):
        self.k, self.episodes_per_trial, self.p = k, n, np.zeros((num_envs, k))
        super().__init__(num_envs, gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(k), 1)

    def sample_tasks(self, num_tasks, rng):
        return list(rng.random((num_tasks, self.k)))

    def set_tasks(self, index):
        self.p[index] = np.stack([self.task[i] for i in index])

    def start(self, mask):
        pass

    def act(self, actions):
        u = np.array([rng.random() for rng in self.rngs])
        return (u < self.p[np.arange(self.num_envs), actions]).astype(np.float64)

    def observe(self):
        return np.zeros((self.num_envs, 1), dtype=np.float32)


class TabularMDP(TaskVectorEnv):
    """10 states, 5 actions, P(.|s,a) ~ Dirichlet(1), mean rewards ~ N(1, 1), observed with noise N(0, 1); 10 steps an
    episode from state 0, n episodes a trial; the observation is the state, one-hot (Duan et al. 2016, 3.2)."""

    def __init__(self, num_envs=1, n=10):
        self.episodes_per_trial, self.state = n, np.zeros(num_envs, dtype=np.int64)
        self.cdf, self.mean_reward = np.zeros((num_envs, 10, 5, 10)), np.zeros((num_envs, 10, 5))
        super().__init__(num_envs, gym.spaces.Box(0, 1, (10,)), gym.spaces.Discrete(5), 10)

    def sample_tasks(self, num_tasks, rng):
        return list(zip(rng.dirichlet(np.ones(10), (num_tasks, 10, 5)), rng.normal(1, 1, (num_tasks, 10, 5)), strict=True))

    def set_tasks(self, index):
        self.cdf[index] = np.cumsum([self.task[i][0] for i in index], axis=-1)
        self.mean_reward[index] = [self.task[i][1] for i in index]

    def start(self, mask):
        self.state[mask] = 0

    def act(self, actions):
        u, noise = np.array([(rng.random(), rng.standard_normal()) for rng in self.rngs]).T
        at = np.arange(self.num_envs), self.state, actions
        self.state = (self.cdf[at] < u[:, None]).sum(-1).clip(max=9)
        return self.mean_reward[at] + noise

    def observe(self):
        return np.eye(10, dtype=np.float32)[self.state]


class GridNavi(TaskVectorEnv):
    """A 5x5 grid with a hidden goal, anywhere but in the 2x2 corner of the start; +1 on the goal, -0.1 off it; 15 steps an
    episode, 4 episodes a trial; the observation is x, y (Zintgraf et al. 2020, 5.1)."""

    metadata = TaskVectorEnv.metadata | {"render_modes": ["rgb_array"], "render_fps": 4}
    moves = np.array([[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]])
    goals = np.array([(x, y) for x in range(5) for y in range(5) if max(x, y) > 1])

    def __init__(self, num_envs=1, render_mode=None):
        self.episodes_per_trial, self.render_mode = 4, render_mode
        self.position, self.goal = np.zeros((num_envs, 2), dtype=np.int64), np.zeros((num_envs, 2), dtype=np.int64)
        super().__init__(num_envs, gym.spaces.Box(0, 4, (2,)), gym.spaces.Discrete(5), 15)

    def sample_tasks(self, num_tasks, rng):
        return list(self.goals[rng.integers(len(self.goals), size=num_tasks)])

    def set_tasks(self, index):
        self.goal[index] = [self.task[i] for i in index]

    def start(self, mask):
        self.position[mask] = 0

    def act(self, actions):
        self.position = (self.position + self.moves[actions]).clip(0, 4)
        return np.where((self.position == self.goal).all(-1), 1.0, -0.1)

    def observe(self):
        return self.position.astype(np.float32)

    def render(self):
        """One picture for each sub-environment: the goal in green, the agent in blue."""
        frames = np.full((self.num_envs, 5, 5, 3), 230, dtype=np.uint8)
        for frame, goal, position in zip(frames, self.goal, self.position, strict=True):
            frame[4 - goal[1], goal[0]] = (0, 158, 115)
            frame[4 - position[1], position[0]] = (0, 114, 178)
        return tuple(np.kron(frames, np.ones((1, 48, 48, 1), dtype=np.uint8)))


class HalfCheetahDir(TaskVectorEnv):
    """gymnasium's HalfCheetah-v5 that is to run forwards or backwards: reward direction * x_velocity - control cost, direction
    ±1; 200 steps (Finn et al. 2017, 5.3.2). `mujoco.rollout` simulates all sub-environments at once, on all cores;
    mujoco is imported for these families alone."""

    metadata = TaskVectorEnv.metadata | {"render_modes": ["rgb_array"], "render_fps": 20}
    body, control_cost = "HalfCheetah-v5", 0.1

    def __init__(self, num_envs=1, render_mode=None):
        try:
            self.robot = gym.make(self.body, render_mode=render_mode, width=64, height=64).unwrapped
        except AttributeError as error:  # PyOpenGL's, where the library that MUJOCO_GL names is missing
            raise gym.error.DependencyNotInstalled(f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}") from error
        model, self.simulate = self.robot.model, importlib.import_module("mujoco.rollout").rollout
        self.render_mode, model.vis.quality.shadowsize = render_mode, 0  # shadows take ten times as long as all the rest
        threads = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # set by torchrun
        self.data = [type(self.robot.data)(model) for _ in range(threads)]
        self.state = np.zeros((num_envs, 1 + model.nq + model.nv))  # time, positions, velocities
        self.goal, self.hidden = np.zeros(num_envs), 1 + self.robot.observation_structure["skipped_qpos"]
        observation_space = gym.spaces.Box(-np.inf, np.inf, (self.state.shape[1] - self.hidden,))
        super().__init__(num_envs, observation_space, self.robot.action_space, 200)

    def sample_tasks(self, num_tasks, rng):
        return list(rng.choice([-1.0, 1.0], num_tasks))

    def set_tasks(self, index):
        self.goal[index] = [self.task[i] for i in index]

    def start(self, mask):
        for i in np.flatnonzero(mask):
            self.robot.np_random = self.rngs[i]
            self.robot.reset_model()
            self.state[i] = 0, *self.robot.data.qpos, *self.robot.data.qvel

    def act(self, actions):
        states, _ = self.simulate(self.robot.model, self.data, self.state, actions[:, None], nstep=self.robot.frame_skip)
        x_velocity = (states[:, -1, 1] - self.state[:, 1]) / self.robot.dt
        self.state = states[:, -1]
        return self.reward(x_velocity) - self.control_cost * np.square(actions).sum(-1)

    def reward(self, x_velocity):
        return self.goal * x_velocity

    def observe(self):
        return self.state[:, self.hidden :].astype(np.float32)

    def render(self):
        """One picture for each sub-environment."""
        frames = []
        for qpos, qvel in (np.split(state[1:], [self.robot.model.nq]) for state in self.state):
            self.robot.set_state(qpos, qvel)
            frames.append(self.robot.render())
        return tuple(frames)


class HalfCheetahVel(HalfCheetahDir):
    """HalfCheetah with a goal velocity ~ U[0, 2]: reward -|x_velocity - goal| - control cost (Finn et al. 2017, 5.3.2)."""

    def sample_tasks(self, num_tasks, rng):
        return list(rng.uniform(0, 2, num_tasks))

    def reward(self, x_velocity):
        return -np.abs(x_velocity - self.goal)


class AntDir(HalfCheetahDir):
    """gymnasium's Ant-v5, without contact forces, that is to walk forwards or backwards: reward direction * x_velocity -
    control cost + 1 while it is healthy, its height in [0.2, 1]; an episode ends when it is not (Finn et al. 2017, 5.3.2)."""

    body, control_cost = "Ant-v5", 0.5

    def step(self, actions):
        next_obs, rewards, _, truncated, infos = super().step(actions)
        healthy = (0.2 <= self.state[:, 3]) & (self.state[:, 3] <= 1)
        return next_obs, rewards + healthy, ~healthy, truncated, infos


for family in (Bandit, TabularMDP, GridNavi, HalfCheetahDir, HalfCheetahVel, AntDir):
    if f"{family.__name__}-v0" not in gym.registry:  # another script may have brought the same one
        gym.register(f"{family.__name__}-v0", vector_entry_point=family)


# AGENT
def layer_init(layer, std=2**0.5, bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """A GRU reads the trial. Actor and critic read its hidden state together with the observation, through a layer and
    through weights on the observation that the hidden state makes (a recurrent hypernetwork, Beck et al. 2023)."""

    def __init__(self, obs_dim, action_space, hidden_size):
        super().__init__()
        self.obs_dim, self.discrete = obs_dim, isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.gru = nn.GRU(2 * obs_dim + self.action_dim + 2, hidden_size)
        self.trunk = nn.Sequential(layer_init(nn.Linear(hidden_size + obs_dim, hidden_size)), nn.Tanh())
        self.actor = layer_init(nn.Linear(hidden_size, self.action_dim), std=0.01)
        self.critic = layer_init(nn.Linear(hidden_size, 1), std=1.0)
        self.hypernetwork = layer_init(nn.Linear(hidden_size, (self.action_dim + 1) * obs_dim), std=0.01)
        self.log_std = nn.Parameter(torch.zeros(0 if self.discrete else self.action_dim))
        self.register_buffer("return_mean", torch.tensor(0.0))
        self.register_buffer("return_std", torch.tensor(0.0))
        self.open_gates_seldom()

    @torch.no_grad()
    def open_gates_seldom(self, gain=5.0, threshold=8.0):
        """Starts the GRU as a memory: each unit writes the reward for a few pairs of previous observation and action, its own
        ones, and keeps its state at all others. PyTorch's own start forgets half of everything at each step."""
        for parameter in (self.gru.weight_hh_l0, self.gru.bias_hh_l0, self.gru.bias_ih_l0):
            nn.init.zeros_(parameter)
        _, update, new = self.gru.weight_ih_l0.chunk(3)  # (H, I) each; an update gate of 1 keeps the state
        nn.init.zeros_(update)
        nn.init.normal_(update[:, self.obs_dim : -2], std=gain)
        nn.init.constant_(self.gru.bias_ih_l0.chunk(3)[1], threshold)
        new[:, -2] = torch.randn(len(new)).sign() / 2

    def update_return_scale(self, returns, masks):
        """Follows mean and deviation of the returns (L, M), in whose units the critic answers, so that its loss is O(1)."""
        mean, std = mean_and_std(returns, masks)
        step = 0.1 if self.return_std > 0 else 1.0
        self.return_mean += step * (mean - self.return_mean)
        self.return_std += step * (std.clamp(min=1e-3) - self.return_std)

    def forward(self, inputs, hidden=None):
        """Runs whole trials or single steps: inputs (L, M, I), hidden (1, M, H), None at the start of a trial.

        Returns the logits, or means, of the actions (L, M, A), the values (L, M) and the hidden state after the last step."""
        memory, hidden = self.gru(inputs, hidden)  # (L, M, H)
        obs = inputs[..., : self.obs_dim]
        features = self.trunk(torch.cat([memory, obs], dim=-1))
        weights = self.hypernetwork(memory).unflatten(-1, (self.action_dim + 1, self.obs_dim))
        params = torch.cat([self.actor(features), self.critic(features)], dim=-1) + (weights @ obs[..., None]).squeeze(-1)
        return params[..., :-1], self.return_mean + self.return_std * params[..., -1], hidden


# ALGORITHM
def policy_distribution(params, log_std, discrete):
    """The policy at `params`: logits or means (..., A); the Gaussian's log-probability is summed over action dimensions."""
    if discrete:
        return Categorical(logits=params, validate_args=False)
    std = log_std.clamp(-5, 2).exp()  # a step too long must neither freeze the policy nor blow it up
    return Independent(Normal(params, std.expand_as(params), validate_args=False), 1, validate_args=False)


def sample_actions(policy, generator, shard):
    """Draws actions (N, ...), or takes the most probable ones where there is no generator.

    The noise is drawn for the whole meta-batch, of which process `shard[0]` of `shard[1]` takes its share: what is drawn
    for a task does not depend on the number of processes."""
    if generator is None:
        return policy.mode
    like = policy.probs if isinstance(policy, Categorical) else policy.mean  # (N, A)
    noise = like.new_empty(len(like) * shard[1], like.shape[1])
    if isinstance(policy, Categorical):  # the first of exponential alarms with these rates is a categorical draw
        return (like / noise.exponential_(generator=generator)[shard[0] :: shard[1]]).argmax(dim=-1)
    return like + policy.stddev * noise.normal_(generator=generator)[shard[0] :: shard[1]]


def step_envs(envs, actions, tasks, step):
    """Steps all sub-environments with actions (N, ...), clipped to a Box; restarts none. A result that is not finite stops
    the run: it must not reach the weights."""
    actions, space = actions.cpu().numpy(), envs.single_action_space
    if isinstance(space, gym.spaces.Box):
        actions = actions.reshape(envs.action_space.shape).clip(space.low, space.high).astype(space.dtype)
    next_obs, rewards, terminated, truncated, _ = envs.step(actions)
    finite = np.isfinite(rewards) & np.isfinite(next_obs).all(axis=-1)
    if not finite.all():
        task = finite.argmin() % len(tasks)
        raise FloatingPointError(f"reward or observation in step {step} of task {task} ({str(tasks[task]):.60})")
    return next_obs, rewards, terminated, truncated


def rollout(agent, envs, tasks, num_episodes, seeds, generator, shard=(0, 1)):
    """Plays a trial of `num_episodes` episodes in each sub-environment; without a generator, with the most probable actions.

    Whoever has finished its trial early goes on, masked, until all have. Returns a dict of tensors: inputs (L, M, I),
    actions (L, M, ...), and (L, M) each: logprobs, values, rewards, masks (1: part of the trial), episodes (from 0)."""
    device, dtype, space = agent.log_std.device, agent.log_std.dtype, envs.single_action_space
    steps = []
    envs.unwrapped.set_attr("task", list(tasks))
    next_obs, _ = envs.reset(seed=seeds)
    episodes = torch.zeros(envs.num_envs, dtype=torch.int64, device=device)  # (M,)
    previous = torch.zeros(envs.num_envs, agent.gru.input_size - agent.obs_dim, dtype=dtype, device=device)
    hidden = None
    with torch.no_grad():
        while (episodes < num_episodes).any():
            obs = torch.as_tensor(next_obs, dtype=dtype, device=device)  # (M, D)
            inputs = torch.cat([obs, previous], dim=-1)  # (M, I)
            params, values, hidden = agent(inputs[None], hidden)
            policy = policy_distribution(params[0], agent.log_std, agent.discrete)
            actions = sample_actions(policy, generator, shard)
            next_obs, rewards, terminated, truncated = step_envs(envs, actions, tasks, len(steps))
            done = terminated | truncated
            if done.any():
                next_obs, _ = envs.reset(options={"reset_mask": done})

            rewards = torch.as_tensor(rewards, dtype=dtype, device=device)
            done = torch.as_tensor(done, device=device)
            masks = (episodes < num_episodes).to(dtype)
            steps.append((inputs, actions, policy.log_prob(actions), values[0], rewards, masks, episodes))
            # The last reward of an episode and its end are read together with the first observation of the next episode.
            encoded = nn.functional.one_hot(actions, space.n) if agent.discrete else actions
            previous = torch.cat([obs, encoded.to(dtype), rewards[:, None], done[:, None].to(dtype)], dim=-1)
            episodes = episodes + done
    names = "inputs actions logprobs values rewards masks episodes".split()
    return {name: torch.stack(column) for name, column in zip(names, zip(*steps, strict=True), strict=True)}


def compute_gae(rewards, values, masks, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) over whole trials; all (L, M).

    It runs across the ends of episodes. Behind the trial there is nothing: the value there is zero, not bootstrapped."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = advantages[t] = (delta + gamma * gae_lambda * next_advantage) * masks[t]
        next_value = values[t] * masks[t]
    return advantages


def mean_and_std(x, masks):
    """Mean and standard deviation of x, of any shape, over all real steps, those of the other processes included."""
    real, weights = x.double(), masks.double()
    count, total, squares = all_reduce(torch.stack([weights.sum(), (real * weights).sum(), (real**2 * weights).sum()]))
    mean = total / count
    return mean.to(x.dtype), (squares / count - mean**2).clamp(min=0).sqrt().to(x.dtype)


def meta_loss(agent, batch, mb_inds, num_steps, clip_coef):
    """Clipped PPO objective (Schulman et al. 2017, eq. 7) of the trials `mb_inds`, recomputed from their first step on.

    Sums over these trials, divided by the steps of the whole minibatch, so that the shares of the processes add up.
    Returns policy_loss, value_loss (in units of the return's deviation), entropy, approx_kl and clipfrac."""
    masks = batch["masks"][:, mb_inds]
    params, newvalues, _ = agent(batch["inputs"][:, mb_inds])
    policy = policy_distribution(params, agent.log_std, agent.discrete)
    logratio = policy.log_prob(batch["actions"][:, mb_inds]) - batch["logprobs"][:, mb_inds]  # (L, MB)
    ratio, mb_advantages = logratio.exp(), batch["advantages"][:, mb_inds]
    policy_loss = -torch.min(ratio * mb_advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * mb_advantages)
    value_loss = ((newvalues - batch["returns"][:, mb_inds]) / agent.return_std) ** 2  # (L, MB)
    approx_kl, clipfrac = (ratio - 1 - logratio).detach(), ((ratio - 1).abs() > clip_coef).to(masks.dtype)
    return [(x * masks).sum() / num_steps for x in (policy_loss, value_loss, policy.entropy(), approx_kl, clipfrac)]


def trial_returns(rewards, episodes, masks, num_episodes):
    """Sums rewards (L, M) by episode: (E, M). Trials of one-step episodes (bandits) are summed by tenths: (10, M)."""
    returns = rewards.new_zeros(num_episodes + 1, rewards.shape[1])
    returns = returns.scatter_add_(0, episodes.clamp(max=num_episodes), rewards * masks)[:num_episodes]
    if len(rewards) == num_episodes > 10:
        returns = torch.stack([tenth.sum(0) for tenth in returns.tensor_split(10)])
    return returns


def evaluate(agent, args, tasks, num_episodes, video_dir=None):
    """Plays one trial of each task with the most probable actions; returns (E, tasks), the noise always the same."""
    envs = make_envs(args, len(tasks), film=video_dir is not None)
    if video_dir is not None:
        envs = RecordVideo(envs, str(video_dir), episode_trigger=lambda episode: True)
    seeds = stream(args.seed, 0, EVAL).integers(2**31, size=len(tasks)).tolist()
    batch = rollout(agent, envs, tasks, num_episodes, seeds, generator=None)
    envs.close()
    return trial_returns(batch["rewards"], batch["episodes"], batch["masks"], num_episodes)


def print_table(returns, num_episodes):
    """The closing table, of held-out returns (E, tasks), or (10, tasks) where a bandit's trial is longer."""
    name = "episode" if len(returns) == num_episodes else "tenth"
    print(f"\nreturn on {returns.shape[1]} held-out tasks")
    for k, episode_returns in enumerate(returns, 1):
        print("{:>12} {:10.3f} ± {:.3f}".format(f"{name} {k}", *summarize(episode_returns)))
    print("{:>12} {:10.3f} ± {:.3f}".format("whole trial", *summarize(returns.sum(0))))


# PLUMBING: the same text in each script
SCRIPT = Path(__file__).stem
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
TASKS, NOISE, ACTIONS, MINIBATCHES, TRAIN_TASKS, HELDOUT_TASKS, EVAL = range(7)  # purposes of random draws


def stream(*key):
    """The random stream of (seed, iteration, purpose); what is drawn once has iteration 0."""
    return np.random.default_rng(key)


def torch_stream(device, *key):
    return torch.Generator(device).manual_seed(int(stream(*key).integers(2**63)))


def fail(message):
    """Ends the program for bad input: one line, exit code 2."""
    if RANK == 0:
        print(f"{SCRIPT}.py: {message}", file=sys.stderr)
    sys.exit(2)


def require(args, flags, ok, right):
    """Fails unless `ok(value)` for each of `flags`; `right` says what would be."""
    for flag in flags.split():
        if not ok(value := getattr(args, flag)):
            name = flag.replace("_", "-")
            fail(f"--{'' if value else 'no-'}{name}: {right}" if isinstance(value, bool) else f"--{name} {value}: {right}")


def make_envs(args, num_envs, film=False):
    """The task family in `num_envs` sub-environments: natively vectorised, or a single environment in gymnasium's Sync."""
    kwargs = {"render_mode": "rgb_array"} if film else {}
    module, _, name = args.env_id.rpartition(":")
    try:
        sys.path.append(os.getcwd())  # where a family of your own may lie
        if module:
            importlib.import_module(module)
        spec = gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {args.env_id}: {error}")
    entry_point = spec.vector_entry_point or spec.entry_point
    if spec.vector_entry_point is None:
        kwargs["vector_kwargs"] = {"autoreset_mode": AutoresetMode.DISABLED}
    try:
        envs = gym.make_vec(name, num_envs, **kwargs, **args.env_kwargs)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {args.env_id}: {error}")
    except (TypeError, ValueError, AssertionError) as error:
        if film and "render_mode" in str(error):
            fail(f"--capture-video: {args.env_id} draws no pictures")
        if not args.env_kwargs:
            raise
        creator = entry_point if callable(entry_point) else load_env_creator(entry_point)
        names = [name for name in inspect.signature(creator).parameters if name not in ("num_envs", "render_mode")]
        fail(f"--env-kwargs {args.env_kwargs}: {error}; {args.env_id} takes {', '.join(names) or 'none'}")
    if not hasattr(task_family(envs), "sample_tasks"):
        fail(f"--env-id {args.env_id}: it has no sample_tasks(num_tasks, rng); give a task family")
    if not isinstance(envs.single_observation_space, gym.spaces.Box) or len(envs.single_observation_space.shape) != 1:
        fail(f"--env-id {args.env_id}: observations are {envs.single_observation_space}; give a family with vectors (Box)")
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Discrete | gym.spaces.Box) or getattr(space, "start", 0) != 0:
        fail(f"--env-id {args.env_id}: actions are {space}; give a family with Discrete, counted from 0, or Box")
    if film:
        try:
            importlib.import_module("moviepy")
            envs.reset()
            envs.render()
        except Exception as error:  # whatever a missing renderer raises
            fail(f"--capture-video: {error}; install moviepy and, for MuJoCo, set MUJOCO_GL=egl or osmesa")
    return envs


def task_family(envs):
    """The environment that has `sample_tasks`: the native vector environment itself, or the first sub-environment."""
    return getattr(envs, "envs", [envs])[0].unwrapped


def sample_tasks(envs, num_tasks, rng):
    return list(task_family(envs).sample_tasks(num_tasks, rng)) if num_tasks else []


def all_reduce(tensor):
    """Sums a tensor over the processes, in place; one process has nothing to do."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_gradients(module):
    """Sums the meta-gradient over the processes, in one message."""
    if WORLD_SIZE > 1:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        nn.utils.vector_to_parameters(all_reduce(nn.utils.parameters_to_vector(grads)), grads)


def stop_if_not_finite(**terms):
    for name, term in terms.items():
        if not torch.isfinite(term).all():
            raise FloatingPointError(name)


def load_checkpoint(flag, path):
    """Reads a checkpoint of this script; never runs code that a file may hold."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"{flag} {path}: {error.strerror}; give the path of a checkpoint.pt")
    except Exception:  # whatever a truncated or foreign file makes the reader raise
        checkpoint = None
    keys = {"script", "args", "agent", "optimizer", "iteration", "global_step", "eval_rows"}
    if not isinstance(checkpoint, dict) or set(checkpoint) != keys:
        fail(f"{flag} {path}: not a whole checkpoint; give a checkpoint.pt that {SCRIPT}.py wrote")
    if checkpoint["script"] != SCRIPT:
        fail(f"{flag} {path}: a checkpoint of {checkpoint['script']}.py; give one that {SCRIPT}.py wrote")
    defaults, saved = asdict(Args()), checkpoint["args"]
    wrong = set(defaults) ^ set(saved)
    wrong = wrong or {name for name, value in saved.items() if type(value) is not type(defaults[name] or value)}
    if wrong:
        fail(f"{flag} {path}: written by another version of {SCRIPT}.py, which differs in {', '.join(sorted(wrong))}")
    return checkpoint


def load_weights(flag, path, agent, optimizer, checkpoint):
    saved, own = checkpoint["agent"], agent.state_dict()
    for name in own | saved:
        if name not in own or name not in saved or own[name].shape != saved[name].shape:
            shapes = [tuple(state[name].shape) if name in state else "missing" for state in (saved, own)]
            fail(f"{flag} {path}: {name} is {shapes[0]} there, {shapes[1]} for this environment and these flags")
    agent.load_state_dict(saved)
    optimizer.load_state_dict(checkpoint["optimizer"])


def write_file(path, content):
    """Writes bytes whole or not at all: to a temporary file, which is then moved into place."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def summarize(returns):
    """Mean over tasks and its standard error, of returns (tasks)."""
    return returns.mean().item(), (returns.std(correction=min(1, len(returns) - 1)) / len(returns) ** 0.5).item()


def eval_csv_rows(global_step, split, returns, first):
    """Rows of eval.csv for returns (adaptation, tasks), whose first row is adaptation number `first`."""
    return [[global_step, split, k, *summarize(r), len(r)] for k, r in enumerate(returns, first)]


def write_eval_csv(path, rows):
    header = ["global_step", "split", "adaptation", "mean_return", "stderr", "num_tasks"]
    write_file(path, "".join(",".join(map(str, row)) + "\n" for row in [header, *rows]).encode())


if __name__ == "__main__":
    # SETTINGS
    args = tyro.cli(Args, description=__doc__)
    flag, path = ("--resume", args.resume) if args.resume else ("--evaluate", args.evaluate)
    if path:
        checkpoint = load_checkpoint(flag, path)
        saved = Args(**checkpoint["args"])
        args = tyro.cli(Args, description=__doc__, default=replace(saved, env_kwargs={}))
        args.env_kwargs = saved.env_kwargs | args.env_kwargs
    require(args, "resume", lambda x: not (x and args.evaluate), "cannot be given together with --evaluate")
    require(args, "total_timesteps eval_every checkpoint_every", lambda x: x >= 1, "give a whole number of at least 1")
    require(args, "eval_tasks", lambda x: x >= 2, "give at least 2 tasks, so that there is a standard error")
    require(args, "seed num_train_tasks torch_threads", lambda x: 0 <= x < 2**31, "give a whole number from 0 to 2147483647")
    require(args, "device", lambda x: x == "cpu" or x == "cuda" and torch.cuda.is_available(), "give cpu, or cuda with a GPU")
    require(args, "num_tasks", lambda x: x >= 1 and x % WORLD_SIZE == 0, f"give 1 or more for each of {WORLD_SIZE} processes")
    require(args, "hidden_size num_minibatches update_epochs", lambda x: x >= 1, "give a whole number of at least 1")
    require(args, "num_minibatches", lambda x: args.num_tasks % x == 0, f"give a divisor of --num-tasks {args.num_tasks}")
    require(args, "learning_rate clip_coef max_grad_norm", lambda x: 0 < x < np.inf, "give a number above 0")
    require(args, "gamma gae_lambda", lambda x: 0 <= x <= 1, "give a number from 0 to 1")
    require(args, "episodes_per_trial ent_coef vf_coef", lambda x: 0 <= x < np.inf, "give 0 or more")

    # SETUP
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_default_dtype(getattr(torch, args.dtype))
    torch.manual_seed(args.seed)  # for the first weights alone: every other draw has a stream of its own
    device = torch.device(args.device)
    envs = make_envs(args, args.num_tasks // WORLD_SIZE)
    num_episodes = args.episodes_per_trial or getattr(task_family(envs), "episodes_per_trial", 2)
    require(args, "env_kwargs", lambda x: isinstance(num_episodes, int) and num_episodes >= 1, "give 1 episode or more")
    if args.capture_video:
        make_envs(args, 1, film=True).close()  # so that it fails now if at all
    heldout_tasks = sample_tasks(envs, args.eval_tasks, stream(args.seed, 0, HELDOUT_TASKS))
    train_tasks = sample_tasks(envs, args.num_train_tasks, stream(args.seed, 0, TRAIN_TASKS))
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args.hidden_size).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    iteration, global_step, eval_rows = 0, 0, []
    if path:
        load_weights(flag, path, agent, optimizer, checkpoint)
        iteration, global_step, eval_rows = checkpoint["iteration"], checkpoint["global_step"], checkpoint["eval_rows"]
    require(args, "total_timesteps", lambda x: args.evaluate or x > global_step, f"{global_step} are done already; give more")

    run_dir, resumes = Path(args.resume or "").parent, Path(args.resume or "").name == "checkpoint.pt"
    if not resumes:
        run_dir = Path(args.runs_dir) / f"{args.env_id.split(':')[-1]}__{SCRIPT}__{args.seed}__{time.time_ns() // 10**6}"
    try:
        if RANK == 0:
            run_dir.mkdir(parents=True, exist_ok=resumes)
    except OSError as error:
        fail(f"--runs-dir {args.runs_dir}: {error.strerror}; give a folder that can be written")
    resume_command = f"python {sys.argv[0]} --resume {run_dir / 'checkpoint.pt'}"

    if args.evaluate:
        if RANK > 0:
            sys.exit()
        try:
            returns = evaluate(agent, args, heldout_tasks, num_episodes)
        except FloatingPointError as error:
            sys.exit(f"{SCRIPT}.py: {error} is not finite")
        write_eval_csv(run_dir / "eval.csv", eval_csv_rows(global_step, "heldout", returns, first=1))
        print_table(returns, num_episodes)
        if args.capture_video:
            evaluate(agent, args, heldout_tasks[:4], num_episodes, run_dir / "videos")
        sys.exit()
    if RANK == 0:
        writer = SummaryWriter(run_dir, purge_step=global_step + 1 if resumes else None)
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + table, global_step)
    stop_signals, stopped = [], False

    def stop_soon(signum, frame):
        stop_signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second one stops at once

    signal.signal(signal.SIGINT, stop_soon)
    signal.signal(signal.SIGTERM, stop_soon)

    # TRAINING
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True, disable=RANK > 0)
    try:
        while global_step < args.total_timesteps and not stopped:
            iteration += 1
            remaining = 1 - global_step / args.total_timesteps if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = remaining * args.learning_rate
            rng = stream(args.seed, iteration, TASKS)
            tasks = sample_tasks(envs, args.num_tasks, rng)
            if train_tasks:
                tasks = [train_tasks[i] for i in rng.integers(len(train_tasks), size=args.num_tasks)]

            start = time.time()
            seeds = stream(args.seed, iteration, NOISE).integers(2**31, size=args.num_tasks)[RANK::WORLD_SIZE].tolist()
            generator = torch_stream(device, args.seed, iteration, ACTIONS)
            batch = rollout(agent, envs, tasks[RANK::WORLD_SIZE], num_episodes, seeds, generator, (RANK, WORLD_SIZE))
            rewards, values, masks = batch["rewards"], batch["values"], batch["masks"]
            advantages = compute_gae(rewards, values, masks, args.gamma, args.gae_lambda)
            mean, std = mean_and_std(advantages, masks)
            batch["returns"], batch["advantages"] = advantages + values, (advantages - mean) / (std + 1e-8)
            agent.update_return_scale(batch["returns"], masks)
            rollout_time, start = time.time() - start, time.time()

            lengths = torch.zeros(args.num_tasks, device=device)  # steps of each trial of the meta-batch
            lengths[RANK::WORLD_SIZE] = masks.sum(0)
            all_reduce(lengths)
            minibatch_rng = stream(args.seed, iteration, MINIBATCHES)
            for _ in range(args.update_epochs):
                for mb_inds in minibatch_rng.permutation(args.num_tasks).reshape(args.num_minibatches, -1):  # whole trials
                    own_inds = mb_inds[mb_inds % WORLD_SIZE == RANK] // WORLD_SIZE
                    losses = meta_loss(agent, batch, own_inds, lengths[mb_inds].sum(), args.clip_coef)
                    policy_loss, value_loss, entropy, approx_kl, clipfrac = losses
                    loss = policy_loss + args.vf_coef * value_loss - remaining * args.ent_coef * entropy
                    optimizer.zero_grad()
                    loss.backward()
                    all_reduce_gradients(agent)
                    meta_grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    stop_if_not_finite(policy_loss=policy_loss, value_loss=value_loss, meta_grad_norm=meta_grad_norm)
                    optimizer.step()
            update_time = time.time() - start

            # LOGGING
            steps = int(lengths.sum())
            global_step += steps
            returns = trial_returns(rewards, batch["episodes"], masks, num_episodes)
            returns = all_reduce(returns.sum(1)) / args.num_tasks  # (E,)
            policy_loss, value_loss, entropy, approx_kl, clipfrac = all_reduce(torch.stack(losses).detach())
            pre, post = returns[0].item(), returns[-1].item()
            progress.set_postfix(pre=f"{pre:.2f}", post=f"{post:.2f}", refresh=False)
            progress.update(steps)
            residual, scale = mean_and_std(batch["returns"] - values, masks)[1], mean_and_std(batch["returns"], masks)[1]
            scalars = {
                "charts/pre_adaptation_return": pre,
                "charts/post_adaptation_return": post,
                "charts/SPS": steps / (rollout_time + update_time),
                "charts/learning_rate": remaining * args.learning_rate,
                "time/rollout": rollout_time,
                "time/update": update_time,
                "losses/policy_loss": policy_loss,
                "losses/value_loss": value_loss,
                "losses/entropy": entropy,
                "losses/approx_kl": approx_kl,
                "losses/clipfrac": clipfrac,
                "losses/explained_variance": 1 - (residual / scale) ** 2,
                "losses/meta_grad_norm": meta_grad_norm,
            }
            scalars |= {f"charts/episode_{k}_return": r for k, r in enumerate(returns, 1)}
            ends = global_step >= args.total_timesteps
            stopped = bool(all_reduce(torch.tensor(len(stop_signals), device=device)))
            if RANK == 0 and (ends or iteration % args.eval_every == 0):
                heldout_returns = evaluate(agent, args, heldout_tasks, num_episodes)
                train_returns = evaluate(agent, args, (train_tasks or tasks)[: args.eval_tasks], num_episodes)
                eval_rows += eval_csv_rows(global_step, "heldout", heldout_returns, first=1)
                eval_rows += eval_csv_rows(global_step, "train", train_returns, first=1)
                write_eval_csv(run_dir / "eval.csv", eval_rows)
                scalars |= {f"eval/heldout_return_after_{k}": r.mean() for k, r in enumerate(heldout_returns, 1)}
                scalars |= {f"eval/train_return_after_{k}": r.mean() for k, r in enumerate(train_returns, 1)}
                scalars["eval/generalization_gap"] = train_returns.sum(0).mean() - heldout_returns.sum(0).mean()
            if RANK == 0:
                for tag, value in scalars.items():
                    writer.add_scalar(tag, torch.as_tensor(value).item(), global_step)
            if RANK == 0 and (ends or stopped or iteration % args.checkpoint_every == 0):
                writer.flush()
                checkpoint = {
                    "script": SCRIPT,
                    "args": asdict(args) | {"resume": None, "evaluate": None, "runs_dir": Args.runs_dir},
                    "agent": agent.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "iteration": iteration,
                    "global_step": global_step,
                    "eval_rows": eval_rows,
                }
                torch.save(checkpoint, buffer := io.BytesIO())
                write_file(run_dir / "checkpoint.pt", buffer.getvalue())
    except FloatingPointError as error:
        hint = f"go on from the last checkpoint, with a lower --learning-rate for example: {resume_command}"
        hint = hint if (run_dir / "checkpoint.pt").exists() else "there is no checkpoint yet"
        sys.exit(f"{SCRIPT}.py: iteration {iteration}: {error} is not finite, so the weights were left as they were; {hint}")
    except OSError as error:
        fail(f"--runs-dir {args.runs_dir}: {error.strerror}")
    progress.close()
    if RANK > 0:
        os._exit(0)  # the usual end would race with gloo's threads, which may still hold tensors of Python's, and abort
    writer.close()
    if stopped and not ends:
        print(f"stopped after iteration {iteration}; go on with: {resume_command}")
        sys.exit(128 + max(stop_signals, default=signal.SIGTERM))
    print_table(heldout_returns, num_episodes)
    if args.capture_video:
        evaluate(agent, args, heldout_tasks[:4], num_episodes, run_dir / "videos")
    print(f"\nevaluate again: python {sys.argv[0]} --evaluate {run_dir / 'checkpoint.pt'}")
