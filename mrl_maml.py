# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "numpy==2.4.6",
#                 "tqdm==4.70.1"]
# ///
"""MAML: an actor-critic learner whose starting weights are learned (Finn et al. 2017).

The learner of a task starts from the meta-learned weights, plays E episodes, takes a policy-gradient step on them, plays E
fresh episodes, and so on: K steps. Upstairs, the start, the step sizes, one for each weight and step (Meta-SGD, Li et al.
2017), and the noise that each step takes away are learned by clipped PPO (as in ProMP, Rothfuss et al. 2019) on the episodes
after the steps, with the exact second-order gradient through all of them. Which terms of the meta-gradient the inner loss
keeps is a choice, `--inner-loss` and `--exploration-credit`: see `inner_loss`. Advantages come from a value function fitted
to each task. All tasks run at once: one batched product with their own weights, one `torch.func.vmap` in the updates.

    python mrl_maml.py                                                 # PointNav: go to a hidden goal
    python mrl_maml.py --env-id mrl_rl2:TabularMDP-v0                  # any family of the other scripts, or your own
    python mrl_maml.py --evaluate runs/<run>/checkpoint.pt             # held-out tasks
    tensorboard --logdir runs

Shapes: M tasks of a meta-batch, E episodes a task and step, T steps an episode, N = M * E environments, K adaptation steps,
D observation size, A action size.
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
from torch.func import grad, vmap
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
    env_id: str = "PointNav-v0"
    """task family: one of this file, `mrl_maml:PointNav-v0` of another file, or `my_tasks:MyTasks-v0` of your own"""
    env_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    """arguments of the task family, for example `k 5 n 100`"""
    total_timesteps: int = 8_000_000
    """environment steps of the whole training"""
    num_train_tasks: int = 0
    """train on this many fixed tasks (0: fresh tasks in each iteration)"""
    eval_every: int = 20
    """iterations between two evaluations on held-out tasks"""
    eval_tasks: int = 40
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
    learning_rate: float = 2e-3
    """learning rate of Adam at the start"""
    anneal_lr: bool = True
    """let the learning rates of the meta-update fall linearly to zero over the training"""
    num_tasks: int = 20
    """tasks of a meta-batch, M"""
    num_episodes: int = 10
    """episodes that a task's learner plays before each step, and after the last, E"""
    eval_episodes: int = 20
    """the same in the evaluation (0: as in the training)"""
    adapt_steps: int = 3
    """adaptation steps of the training, K"""
    eval_adapt_steps: int = 3
    """adaptation steps of the held-out evaluation"""
    inner_lr: float = 0.3
    """learning rate of the first inner step at the start"""
    inner_lr_decay: float = 0.1
    """each later inner step starts with this times the rate (and shift of noise) before it; steps after the last one of the
    training take its learned rate times this, each"""
    learn_inner_lr: bool = True
    """learn the inner learning rates, one for each weight and step"""
    inner_lr_learning_rate: float = 1e-3
    """learning rate of Adam for the inner learning rates, at the start"""
    inner_loss: Literal["ratio", "log-prob", "dice"] = "ratio"
    """which terms of the meta-gradient are kept: see `inner_loss`"""
    exploration_credit: bool = False
    """give the first episodes credit for what comes after adaptation (E-MAML): see `meta_loss`"""
    first_order: bool = False
    """leave out the second derivatives, for comparison"""
    step_weights: tuple[float, ...] = ()
    """weight of the policy after each step in the meta-loss: `0 0 1` judges the last one alone (nothing given: all alike)"""
    value_function: Literal["linear", "network"] = "linear"
    """of the inner learner: a least-squares fit in each task, or a meta-learned network adapted by the inner step, which wants
    a shorter horizon, say --gamma 0.95"""
    hidden_size: int = 64
    """units of the two tanh layers"""
    log_std: float = -1.0
    """log standard deviation of continuous actions at the start"""
    log_std_shift: float = -1.0
    """what the first inner step adds to it, at the start; learned with the inner learning rates"""
    log_std_learning_rate: float = 1e-2
    """learning rate of Adam for these two, at the start"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.97
    """lambda of generalized advantage estimation"""
    update_epochs: int = 5
    """meta-updates with the episodes of an iteration"""
    clip_coef: float = 0.2
    """clipping of the probability ratio in the meta-update"""
    vf_coef: float = 0.5
    """weight of the value loss in inner and meta-update, where the value function is a network"""
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


class PointNav(TaskVectorEnv):
    """A point that starts at (0, 0) and a hidden goal ~ U[-0.5, 0.5]^2; the action, clipped to ±0.1 per axis, is added to the
    position; reward -distance to the goal after the move; 100 steps, no early end; the observation is x, y (Finn et al. 2017,
    5.3.1, whose episodes end within 0.01 of the goal)."""

    metadata = TaskVectorEnv.metadata | {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, num_envs=1, render_mode=None):
        self.position, self.goal, self.render_mode = np.zeros((num_envs, 2)), np.zeros((num_envs, 2)), render_mode
        spaces = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-0.1, 0.1, (2,))
        super().__init__(num_envs, *spaces, 100)

    def sample_tasks(self, num_tasks, rng):
        return list(rng.uniform(-0.5, 0.5, (num_tasks, 2)))

    def set_tasks(self, index):
        self.goal[index] = [self.task[i] for i in index]

    def start(self, mask):
        self.position[mask] = 0

    def act(self, actions):
        self.position = self.position + np.clip(actions, -0.1, 0.1)
        return -np.linalg.norm(self.position - self.goal, axis=-1)

    def observe(self):
        return self.position.astype(np.float32)

    def render(self):
        """One picture of [-1, 1]^2 for each sub-environment: the goal in green, the agent in blue."""
        frames = np.full((self.num_envs, 64, 64, 3), 230, dtype=np.uint8)
        for frame, goal, position in zip(frames, self.goal, self.position, strict=True):
            for (x, y), colour in ((goal, (0, 158, 115)), (position, (0, 114, 178))):
                column, row = (np.array([1 + x, 1 - y]) * 32).clip(2, 62).astype(int)
                frame[row - 2 : row + 2, column - 2 : column + 2] = colour
        return tuple(frames)


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


for family in (PointNav, HalfCheetahDir, HalfCheetahVel, AntDir):
    if f"{family.__name__}-v0" not in gym.registry:  # another script may have brought the same one
        gym.register(f"{family.__name__}-v0", vector_entry_point=family)


# AGENT
class Agent(nn.Module):
    """The weights that the learner of every task starts from, and its inner learning rates: one a weight and step."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        action_dim = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        heads = {"actor": (action_dim, 0.01)} | ({"critic": (1, 1.0)} if args.value_function == "network" else {})
        weights = {}
        for head, (size, gain) in heads.items():
            sizes = (obs_dim, args.hidden_size, args.hidden_size, size)
            for i, std in enumerate((2**0.5, 2**0.5, gain)):
                weights[f"{head}_w{i}"] = nn.init.orthogonal_(torch.empty(sizes[i : i + 2]), std)
                weights[f"{head}_b{i}"] = torch.zeros(1, sizes[i + 1])
        if not self.discrete:
            weights["log_std"] = torch.full((1, action_dim), args.log_std)
        self.weights = nn.ParameterDict(weights)
        decays = args.inner_lr_decay ** torch.arange(args.adapt_steps)
        rates = {n: (args.inner_lr * decays).view(-1, 1, 1).repeat(1, *w.shape) for n, w in weights.items()}
        self.inner_lr = nn.ParameterDict(rates).requires_grad_(args.learn_inner_lr)
        if not self.discrete:
            shift = (args.log_std_shift * decays).view(-1, 1, 1).repeat(1, 1, action_dim)
            self.log_std_shift = nn.Parameter(shift, requires_grad=args.learn_inner_lr)

    def parameter_groups(self):
        """For the optimizer: weights, inner learning rates, log-std."""
        weights, rates = dict(self.weights), list(self.inner_lr.parameters())
        noise = [] if self.discrete else [weights.pop("log_std"), self.log_std_shift]
        return [{"params": list(weights.values())}, {"params": rates}, {"params": noise}]

    def inner_lr_of(self, step, decay):
        """Rates of an adaptation step, and its shift of log-std; steps behind the last of the training take the last one's,
        times `decay` each."""
        rates = dict(self.inner_lr) | ({} if self.discrete else {"log_std_shift": self.log_std_shift})
        last = len(rates["actor_w0"]) - 1
        return {name: lr[min(step, last)] * decay ** max(0, step - last) for name, lr in rates.items()}


def mlp(weights, head, x):
    """Two tanh layers and a linear one, for x (..., D) of one task, or (M, B, D) with weights stacked over tasks."""
    product, shape = torch.bmm if weights[f"{head}_w0"].dim() == 3 else torch.mm, x.shape[:-1]
    x = x if product is torch.bmm else x.flatten(0, -2)
    for i in range(2):  # in place, since passes over memory are what takes the time
        x = product(x, weights[f"{head}_w{i}"]).add_(weights[f"{head}_b{i}"]).tanh_()
    return product(x, weights[f"{head}_w2"]).add_(weights[f"{head}_b2"]).view(*shape, -1)


# ALGORITHM
def policy(weights, obs):
    """Logits, or means, (..., A) at obs (..., D), and the log-std of a Gaussian, None where actions are discrete; for one
    task, or for obs (M, E, D) with weights stacked over tasks."""
    params = mlp(weights, "actor", obs)
    if "log_std" not in weights:
        return params, None
    return params, weights["log_std"].clamp(-5, 2)  # a step too long must neither freeze the policy nor blow it up


def log_prob(params, log_std, actions):
    """Log-probability (...) of actions, summed over action dimensions. By hand, as the entropy: torch.distributions takes
    more passes over the data, which cost time here."""
    if log_std is None:
        return params.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    z = (actions - params) * (-log_std).exp()
    return -(0.5 * z**2 + log_std + 0.5 * np.log(2 * np.pi)).sum(-1)


def policy_entropy(params, log_std):
    if log_std is None:
        return -(params.softmax(-1) * params.log_softmax(-1)).sum(-1)
    return (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1)


def draw_actions(params, log_std, generator, shard):
    """Draws actions (M, E, ...) at logits or means (M, E, A).

    The noise is drawn for the whole meta-batch, of which process `shard[0]` of `shard[1]` takes its share: what is drawn
    for a task does not depend on the number of processes."""
    noise = params.new_empty(params.shape[1], params.shape[0] * shard[1], params.shape[2])
    noise = noise.exponential_(generator=generator) if log_std is None else noise.normal_(generator=generator)
    noise = noise[:, shard[0] :: shard[1]].transpose(0, 1)  # (M, E, A)
    if log_std is None:  # the first of exponential alarms with these rates is a categorical draw
        return (params.softmax(-1) / noise).argmax(dim=-1)
    return params + log_std.exp() * noise


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


def rollout(envs, weights, tasks, num_episodes, seeds, generator, shard=(0, 1)):
    """One episode in each of N = E * M sub-environments (episode by episode), each task with its own weights (M, ...).

    Whoever has ended early goes on, masked, until all have. Returns a dict of obs (M, E, T, D), actions (M, E, T, ...),
    (M, E, T) each: logprobs, rewards, masks (1: part of the episode); and what a time limit cut off: last_obs (M, E, D),
    truncated (M, E)."""
    M, E, like = len(tasks), num_episodes, weights["actor_w0"]

    def by_task(x):
        """(N, ...) to (M, E, ...)"""
        return torch.as_tensor(x, device=like.device).to(like.dtype).unflatten(0, (E, M)).transpose(0, 1)

    obs, actions, params, rewards, masks = [], [], [], [], []
    envs.unwrapped.set_attr("task", list(tasks) * E)
    next_obs, _ = envs.reset(seed=seeds)
    running, cut, last_obs = np.ones(M * E, dtype=bool), np.zeros(M * E, dtype=bool), np.array(next_obs)
    with torch.no_grad():
        while running.any():
            obs.append(by_task(next_obs))
            step_params, log_std = policy(weights, obs[-1])
            params.append(step_params)
            actions.append(draw_actions(step_params, log_std, generator, shard))
            flat = actions[-1].transpose(0, 1).flatten(0, 1)  # (N, ...)
            next_obs, reward, terminated, truncated = step_envs(envs, flat, tasks, len(masks))
            rewards.append(reward * running)
            masks.append(running)
            if (done := terminated | truncated).any():
                ended = running & done
                last_obs[ended], cut[ended] = next_obs[ended], truncated[ended] & ~terminated[ended]
                running = running & ~done
                if running.any():
                    next_obs, _ = envs.reset(options={"reset_mask": done})
    obs, actions, params = (torch.stack(x, dim=2) for x in (obs, actions, params))  # (M, E, T, ...)
    rewards, masks = (by_task(np.stack(x, axis=1)) for x in (rewards, masks))  # (M, E, T)
    logprobs = log_prob(params, None if log_std is None else log_std[:, None], actions)
    batch = {"obs": obs, "actions": actions, "logprobs": logprobs, "rewards": rewards, "masks": masks}
    return batch | {"last_obs": by_task(last_obs), "truncated": by_task(cut)}


def compute_gae(rewards, values, last_values, masks, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) in each episode; all (..., T), last_values (...).

    Behind the last real step of an episode comes its last value: zero where it terminated."""
    has_next = nn.functional.pad(masks[..., 1:], (0, 1)) > 0
    next_values = torch.where(has_next, values.roll(-1, dims=-1), last_values[..., None])
    deltas = (rewards + gamma * next_values - values) * masks
    advantages = [torch.zeros_like(last_values)]
    for delta in reversed(deltas.unbind(-1)):
        advantages.append(delta + gamma * gae_lambda * advantages[-1])
    return torch.stack(advantages[:0:-1], dim=-1)


def linear_values(obs, returns, masks, ridge=1e-5):
    """Values (M, E, T) of a least-squares fit, one a task, of the returns on [obs, obs^2, t, t^2, t^3, 1] (Duan et
    al. 2016, Benchmarking deep reinforcement learning).

    The ridge keeps it solvable for observations that never change. A time limit is not bootstrapped: t is a feature."""
    t = torch.arange(masks.shape[-1], device=obs.device).expand_as(masks)[..., None] / 100  # (M, E, T, 1)
    features = torch.cat([obs.clamp(-10, 10), obs.clamp(-10, 10) ** 2, t, t**2, t**3, torch.ones_like(t)], dim=-1)
    x = (features * masks[..., None]).flatten(1, 2).double()  # (M, E * T, F)
    y = (returns * masks).flatten(1, 2)[..., None].double()
    penalty = ridge * masks.sum((1, 2))[:, None, None] * torch.eye(x.shape[-1], device=obs.device)
    coefficients = torch.linalg.solve(x.mT @ x + penalty, x.mT @ y)  # (M, F, 1)
    return (x @ coefficients).view_as(masks).to(masks.dtype)


def critic_values(weights, inner_lr, batch, args):
    """Values (E, T) and last values (E) of one task, by the meta-learned critic after its own inner step on this very batch,
    and the returns (E, T) that it learns; what a time limit cut off is worth what the critic said before the step."""
    zeros = torch.zeros_like(batch["rewards"])

    def values_of(critic):
        obs = torch.cat([batch["obs"].flatten(0, 1), batch["last_obs"]])  # (E * T + E, D)
        values, last_values = mlp(critic, "critic", obs).squeeze(-1).div(1 - args.gamma).split([zeros.numel(), len(zeros)])
        return values.view_as(zeros), last_values * batch["truncated"]

    returns = compute_gae(batch["rewards"], zeros, values_of(weights)[1], batch["masks"], args.gamma, 1.0)
    critic = {name: w for name, w in weights.items() if name.startswith("critic")}
    grads = grad(critic_loss)(critic, batch | {"returns": returns}, args.gamma)
    return *values_of({name: w - inner_lr[name] * args.vf_coef * grads[name] for name, w in critic.items()}), returns


def add_advantages(batch, weights, inner_lr, args):
    """Puts returns and advantages (M, E, T) into a batch, these with mean 0 and deviation 1 in each task, and what its
    values explain of the returns (M)."""
    rewards, masks = batch["rewards"], batch["masks"]
    last_values = torch.zeros_like(batch["truncated"])
    if args.value_function == "linear":
        returns = compute_gae(rewards, torch.zeros_like(rewards), last_values, masks, args.gamma, 1.0)
        values = linear_values(batch["obs"], returns, masks)
    else:
        fit = vmap(critic_values, in_dims=(0, None, 0, None))
        values, last_values, returns = fit(weights, inner_lr, batch, args)
    advantages = compute_gae(rewards, values, last_values, masks, args.gamma, args.gae_lambda)
    mean, std = task_mean_and_std(advantages, masks)
    residual_std, returns_std = task_mean_and_std(returns - values, masks)[1], task_mean_and_std(returns, masks)[1]
    batch["returns"], batch["advantages"] = returns, (advantages - mean) / (std + 1e-8) * masks
    batch["explained_variance"] = (1 - (residual_std / (returns_std + 1e-8)) ** 2).flatten()
    batch["advantage_std"] = std.flatten()


def task_mean_and_std(x, masks):
    """Mean and standard deviation (M, 1, 1) of x (M, E, T) over the real steps of each task."""
    count = masks.sum((1, 2), keepdim=True)
    mean = (x * masks).sum((1, 2), keepdim=True) / count
    return mean, (((x - mean) ** 2 * masks).sum((1, 2), keepdim=True) / count).sqrt()


def critic_loss(weights, batch, gamma):
    """Mean squared error of the critic over one task's batch (E, T), in units of 1 / (1 - gamma), in which it answers; zero
    where there is no critic."""
    if "critic_w0" not in weights:
        return torch.zeros(())
    values = mlp(weights, "critic", batch["obs"]).squeeze(-1)
    return 0.5 * ((values - (1 - gamma) * batch["returns"]) ** 2 * batch["masks"]).sum() / batch["masks"].sum()


def inner_loss(weights, batch, args):
    """What one inner step descends, for one task's batch (E, T, ...). All three have the same gradient where the data were
    drawn, and differ in how that gradient changes with the weights, which is what reaches the meta-gradient:

    log-prob  log pi A (Finn et al. 2017): the gradient of a fixed batch; that other weights draw other actions is left out.
    ratio     pi / pi_old A (LVC, Rothfuss et al. 2019): an action's own probability is in; that it leads to others is not.
    dice      each action's ratio times those of all before it (Foerster et al. 2018, Farquhar et al. 2019): all terms.

    With `--exploration-credit` the sampling is accounted for as a whole, in `meta_loss` (E-MAML, Stadie et al. 2018), so it
    is left out here, where it would count twice."""
    logprobs, masks = log_prob(*policy(weights, batch["obs"]), batch["actions"]), batch["masks"]  # (E, T)
    logratio = (logprobs - (batch["logprobs"] if args.inner_loss == "ratio" else logprobs.detach())) * masks
    if args.inner_loss == "log-prob" or args.exploration_credit:
        surrogate = logratio.exp().detach() * logprobs
    elif args.inner_loss == "ratio":
        surrogate = logratio.exp()
    else:
        product = logratio.cumsum(-1)  # of the ratios up to and with this action
        surrogate = product.exp() - (product - logratio).exp()
    policy_loss = -(surrogate * batch["advantages"] * masks).sum() / masks.sum()
    return policy_loss + args.vf_coef * critic_loss(weights, batch, args.gamma)


def adapt(weights, inner_lr, batch, args):
    """One inner step for one task: its weights, moved against the gradient of the inner loss. What a task has explored, the
    learner need not explore again, so that log-std is moved by a learned constant too."""
    grads = grad(inner_loss)(weights, batch, args)
    if args.first_order:
        grads = {name: g.detach() for name, g in grads.items()}
    adapted = {name: w - inner_lr[name] * grads[name] for name, w in weights.items()}
    if "log_std" in weights:
        adapted["log_std"] = adapted["log_std"] + inner_lr["log_std_shift"]
    return adapted


def clipped_loss(weights, batch, args):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) for one task. Returns what `meta_loss` does."""
    masks, advantages, (params, log_std) = batch["masks"], batch["advantages"], policy(weights, batch["obs"])
    logratio = (log_prob(params, log_std, batch["actions"]) - batch["logprobs"]) * masks  # (E, T)
    ratio = logratio.exp()
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * advantages)
    approx_kl, clipfrac = (ratio - 1 - logratio).detach(), ((ratio - 1).abs() > args.clip_coef).to(masks.dtype)
    means = [(x * masks).sum() / masks.sum() for x in (policy_loss, policy_entropy(params, log_std), approx_kl, clipfrac)]
    return means[0], critic_loss(weights, batch, args.gamma), *means[1:]


def meta_loss(weights, inner_lr, batches, args):
    """Losses of one task as functions of the start: adapt on each batch but the last, judge each adapted policy on the
    batch that it played; the mean, with `--step-weights`.

    `inner_lr`: the rates of each step. With `--exploration-credit` the probability of all that was drawn before a batch is in
    its policy loss, times what came of it, clipped too. Returns policy_loss, value_loss, entropy, approx_kl and clipfrac."""
    step_weights, losses, ratios = args.step_weights or (1.0,) * len(inner_lr), [], []
    for step_lr, batch, next_batch in zip(inner_lr, batches[:-1], batches[1:], strict=True):
        if args.exploration_credit:
            logprobs = log_prob(*policy(weights, batch["obs"]), batch["actions"])
            ratios.append(((logprobs - batch["logprobs"]) * batch["masks"]).exp().flatten())
        weights = adapt(weights, step_lr, batch, args)
        policy_loss, *others = clipped_loss(weights, next_batch, args)
        if args.exploration_credit:
            ratio, credit = torch.cat(ratios), next_batch["credit"]
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            policy_loss = policy_loss - torch.min(ratio * credit, clipped * credit).sum()
        losses.append((policy_loss, *others))
    shares = [w / sum(step_weights) for w in step_weights]
    return tuple(sum(w * x for w, x in zip(shares, terms, strict=True)) for terms in zip(*losses, strict=True))


def collect(agent, args, envs, tasks, num_steps, seeds, generator, shard=(0, 1)):
    """Lets the learner of each task act, then adapt, `num_steps` times, with fresh episodes each time: num_steps + 1 batches.

    `seeds`: one list of N for each of them."""
    weights = {name: w.detach().expand(len(tasks), *w.shape) for name, w in agent.weights.items()}
    num_episodes, batches = envs.num_envs // len(tasks), []
    for step in range(num_steps + 1):
        inner_lr = {name: lr.detach() for name, lr in agent.inner_lr_of(step, args.inner_lr_decay).items()}
        batch = rollout(envs, weights, tasks, num_episodes, seeds[step], generator, shard)
        add_advantages(batch, weights, inner_lr, args)
        batches.append(batch)
        if step < num_steps:
            weights = vmap(adapt, in_dims=(0, None, 0, None))(weights, inner_lr, batch, args)
    return batches


def episode_returns(batches):
    """Return of an episode, mean over a task's episodes, after each number of steps: (S + 1, M)."""
    return torch.stack([(batch["rewards"] * batch["masks"]).sum(-1).mean(-1) for batch in batches])


def exploration_credit(returns, batch, num_tasks):
    """Advantage (M) of each action of a task's earlier batches: its returns (M) after adaptation less those of all other
    tasks, in the units of the policy loss, which is a mean over steps of advantages with deviation 1."""
    baseline = (all_reduce(returns.sum()) - returns) / (num_tasks - 1)
    return (returns - baseline) / (batch["masks"].sum(-1).mean(-1) * batch["advantage_std"] + 1e-8)


def evaluate(agent, args, tasks, video_dir=None):
    """Return of an episode after 0 .. `--eval-adapt-steps` steps in each task: (S + 1, tasks), the noise always the same."""
    envs = make_envs(args, len(tasks) * (args.eval_episodes or args.num_episodes), film=video_dir is not None)
    if video_dir is not None:
        envs = RecordVideo(envs, str(video_dir), episode_trigger=lambda episode: True)
    shape = args.eval_adapt_steps + 1, envs.num_envs
    seeds = stream(args.seed, 0, EVAL).integers(2**31, size=shape).tolist()
    generator = torch_stream(torch.device(args.device), args.seed, 0, ACTIONS)
    batches = collect(agent, args, envs, tasks, args.eval_adapt_steps, seeds, generator)
    envs.close()
    return episode_returns(batches)


def print_table(returns):
    """The closing table, of held-out returns (S + 1, tasks)."""
    print(f"\nreturn of an episode on {returns.shape[1]} held-out tasks")
    for k, step_returns in enumerate(returns):
        print("{:>14} {:10.3f} ± {:.3f}".format(f"after {k} step{'s' * (k != 1)}", *summarize(step_returns)))


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
    require(args, "num_tasks", lambda x: x >= 2 or not args.exploration_credit, "--exploration-credit needs at least 2")
    require(args, "hidden_size num_episodes update_epochs", lambda x: x >= 1, "give a whole number of at least 1")
    require(args, "adapt_steps eval_adapt_steps", lambda x: x >= 1, "give a whole number of at least 1")
    require(args, "step_weights", lambda x: len(x) in (0, args.adapt_steps), "give one for each of the --adapt-steps")
    require(args, "step_weights", lambda x: not x or min(x) >= 0 and 0 < sum(x) < np.inf, "give 0 or more, not all of them 0")
    require(args, "learning_rate clip_coef max_grad_norm", lambda x: 0 < x < np.inf, "give a number above 0")
    require(args, "log_std log_std_shift", np.isfinite, "give a finite number")
    require(args, "gamma gae_lambda", lambda x: 0 <= x <= 1, "give a number from 0 to 1")
    require(args, "gamma", lambda x: x < 1 or args.value_function == "linear", "--value-function network needs less than 1")
    require(args, "eval_episodes", lambda x: x >= 0, "give a whole number of at least 0")
    require(args, "inner_lr inner_lr_decay vf_coef", lambda x: 0 <= x < np.inf, "give 0 or more")
    require(args, "inner_lr_learning_rate log_std_learning_rate", lambda x: 0 <= x < np.inf, "give 0 or more")

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
    envs = make_envs(args, args.num_tasks // WORLD_SIZE * args.num_episodes)
    if args.capture_video:
        make_envs(args, 1, film=True).close()  # so that it fails now if at all
    heldout_tasks = sample_tasks(envs, args.eval_tasks, stream(args.seed, 0, HELDOUT_TASKS))
    train_tasks = sample_tasks(envs, args.num_train_tasks, stream(args.seed, 0, TRAIN_TASKS))
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args).to(device)
    rates = args.learning_rate, args.inner_lr_learning_rate, args.log_std_learning_rate
    optimizer = torch.optim.Adam(agent.parameter_groups(), lr=args.learning_rate, eps=1e-5)
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
            returns = evaluate(agent, args, heldout_tasks)
        except FloatingPointError as error:
            sys.exit(f"{SCRIPT}.py: {error} is not finite")
        write_eval_csv(run_dir / "eval.csv", eval_csv_rows(global_step, "heldout", returns, first=0))
        print_table(returns)
        if args.capture_video:
            evaluate(agent, args, heldout_tasks[:4], run_dir / "videos")
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
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = remaining * rate
            rng = stream(args.seed, iteration, TASKS)
            tasks = sample_tasks(envs, args.num_tasks, rng)
            if train_tasks:
                tasks = [train_tasks[i] for i in rng.integers(len(train_tasks), size=args.num_tasks)]

            start = time.time()
            shape = args.adapt_steps + 1, args.num_tasks * args.num_episodes
            seeds = stream(args.seed, iteration, NOISE).integers(2**31, size=shape)[:, RANK::WORLD_SIZE].tolist()
            generator = torch_stream(device, args.seed, iteration, ACTIONS)
            own_tasks, shard = tasks[RANK::WORLD_SIZE], (RANK, WORLD_SIZE)
            batches = collect(agent, args, envs, own_tasks, args.adapt_steps, seeds, generator, shard)
            returns = episode_returns(batches)  # (K + 1, M)
            if args.exploration_credit:
                for batch, adapted_returns in zip(batches[1:], returns[1:], strict=True):
                    batch["credit"] = exploration_credit(adapted_returns, batch, args.num_tasks)
            rollout_time, start = time.time() - start, time.time()

            for _ in range(args.update_epochs):
                inner_lr = [agent.inner_lr_of(step, args.inner_lr_decay) for step in range(args.adapt_steps)]
                losses = vmap(meta_loss, in_dims=(None, None, 0, None))(dict(agent.weights), inner_lr, batches, args)
                policy_loss, value_loss, entropy, approx_kl, clipfrac = (x.sum() / args.num_tasks for x in losses)
                optimizer.zero_grad()
                (policy_loss + args.vf_coef * value_loss).backward()
                all_reduce_gradients(agent)
                meta_grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                stop_if_not_finite(policy_loss=policy_loss, value_loss=value_loss, meta_grad_norm=meta_grad_norm)
                optimizer.step()
            update_time = time.time() - start

            # LOGGING
            steps = int(all_reduce(sum(batch["masks"].sum() for batch in batches)))
            global_step += steps
            returns = all_reduce(returns.sum(1)) / args.num_tasks  # (K + 1,)
            losses = all_reduce(torch.stack([policy_loss, value_loss, entropy, approx_kl, clipfrac]).detach())
            policy_loss, value_loss, entropy, approx_kl, clipfrac = losses
            explained_variance = all_reduce(batches[-1]["explained_variance"].sum()) / args.num_tasks
            pre, post = returns[0].item(), returns[-1].item()
            progress.set_postfix(pre=f"{pre:.2f}", post=f"{post:.2f}", refresh=False)
            progress.update(steps)
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
                "losses/explained_variance": explained_variance,
                "losses/meta_grad_norm": meta_grad_norm,
            }
            ends = global_step >= args.total_timesteps
            stopped = bool(all_reduce(torch.tensor(len(stop_signals), device=device)))
            if RANK == 0 and (ends or iteration % args.eval_every == 0):
                heldout_returns = evaluate(agent, args, heldout_tasks)
                train_returns = evaluate(agent, args, (train_tasks or tasks)[: args.eval_tasks])
                eval_rows += eval_csv_rows(global_step, "heldout", heldout_returns, first=0)
                eval_rows += eval_csv_rows(global_step, "train", train_returns, first=0)
                write_eval_csv(run_dir / "eval.csv", eval_rows)
                scalars |= {f"eval/heldout_return_after_{k}": r.mean() for k, r in enumerate(heldout_returns)}
                scalars |= {f"eval/train_return_after_{k}": r.mean() for k, r in enumerate(train_returns)}
                scalars["eval/generalization_gap"] = train_returns[-1].mean() - heldout_returns[-1].mean()
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
    print_table(heldout_returns)
    if args.capture_video:
        evaluate(agent, args, heldout_tasks[:4], run_dir / "videos")
    print(f"\nevaluate again: python {sys.argv[0]} --evaluate {run_dir / 'checkpoint.pt'}")
