# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0", "numpy==2.4.6",
#                 "tqdm==4.70.1"]
# ///
"""The meta actor-critic: a meta-policy, a meta-value function and a meta action selection guide an actor-critic in each task.

1. Start from the meta-policy pi_theta(a|s), the meta-value function Q(s, a) = w'f_phi(s, a) and the meta action selection
   b_psi (`Agent`).
2. In each task: act (`rollout`), learn the value function (`adapt` after each round, `refine` after each step), learn the
   policy (`actor`).
3. All three guide that learning: where the actor starts and how far it steps, what the critic sees and expects before any
   data, how optimistic and how noisy actions are chosen while episodes are left.
4. Update all three from how well the adapted learner does (`compute_advantages`, `meta_loss`).
5. Repeat (the loop at the end).

    Q^pi(s, a) = E[sum_t gamma^t r_t | s_0 = s, a_0 = a, pi]     its fixed point is solved for by `adapt`, in closed form
    V^pi(s)    = E[sum_t gamma^t r_t | s_0 = s, pi]              E_pi Q(s, a), the baseline of `compute_advantages`
    grad J     = E[sum_t gamma^t grad log pi(a_t|s_t) Q^pi(s_t, a_t)]    the natural-gradient step along it is `actor`

The learner in a task takes no gradient steps: critic and actor are closed forms, so that the meta-gradient goes through the
linear solves, and a trial can go on for longer than it did in training.

    python mrl_actor_critic.py                                         # random MDPs, 10 episodes a trial
    python mrl_actor_critic.py --evaluate runs/<run>/checkpoint.pt --eval-episodes 100
    python mrl_actor_critic.py --env-id SparsePointNav-v0 --rounds 2 --hidden-size 64 --num-features 16 --temperature 2.5 \\
        --gamma 0.97 --learning-rate 1e-3 --numbers-learning-rate 3e-3 --num-minibatches 4 --update-epochs 3 --vf-coef 1 \\
        --ent-coef 0.01 --total-timesteps 16000000
    tensorboard --logdir runs

Shapes: M tasks of a meta-batch, C explorations of each, N = M * C trials, R rounds a trial, L steps a round, D observation
size, A action size; the critic has B blocks (A, or 1 for a Box) of W weights, and K rows of features in each (1, or 1 + A).
"""

import importlib
import inspect
import io
import math
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
    env_id: str = "TabularMDP-v0"
    """task family: one of this file, `mrl_maml:PointNav-v0` of another file, or `my_tasks:MyTasks-v0` of your own"""
    env_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    """arguments of the task family, for example `k 5 n 100`"""
    total_timesteps: int = 3_840_000
    """environment steps of the whole training"""
    num_train_tasks: int = 0
    """train on this many fixed tasks (0: fresh tasks in each iteration)"""
    eval_every: int = 50
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
    learning_rate: float = 2e-3
    """learning rate of Adam at the start, for the networks and all that is not below"""
    numbers_learning_rate: float = 1e-2
    """the same for single numbers: level of the prior, log-std, temperature, action selection"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero over the training"""
    num_tasks: int = 32
    """tasks of a meta-batch, M"""
    num_explorations: int = 4
    """trials of each task, C: independent explorations, which are each other's baseline"""
    rounds: int = 0
    """rounds of a trial, R (0: as many as the family's episodes of a trial need, or 2 where it says nothing)"""
    episodes_per_round: int = 1
    """episodes between two solves of the critic"""
    eval_episodes: int = 0
    """episodes of a trial on held-out tasks (0: as many as in training)"""
    meta_policy: bool = True
    """learn the start of each task's actor and the size of its step, or leave them as they are"""
    meta_value: bool = True
    """learn the critic's features, prior and discount factor, or leave them as they are"""
    meta_action_selection: bool = True
    """learn how optimistic and how noisy exploration is, or leave it as it is: no optimism"""
    hidden_size: int = 32
    """units of each of the two hidden layers, of policy and value network"""
    num_features: int = 2
    """learned features of the critic, beside the observation itself"""
    temperature: float = 0.2
    """temperature of the actor's step at the start"""
    gamma: float = 0.8
    """discount factor of the rest of an episode, upstairs; the critic downstairs learns its own"""
    max_critic_gamma: float = 0.85
    """upper bound of that one: from few steps, solves for a longer horizon blow up"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    trial_gamma: float = 1.0
    """discount factor from one episode of a trial to the next"""
    num_minibatches: int = 1
    """minibatches of whole trials in each epoch"""
    update_epochs: int = 1
    """passes over the meta-batch in each iteration"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus at the start; it falls linearly to zero with `--anneal-lr`"""
    vf_coef: float = 0.1
    """weight of the critic's prediction error"""
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


class SparsePointNav(PointNav):
    """The goal on the unit half circle, the same moves; reward 1 - distance within 0.2 of the goal, else 0; 60 steps."""

    def __init__(self, num_envs=1, render_mode=None):
        super().__init__(num_envs, render_mode)
        self.episode_steps = 60

    def sample_tasks(self, num_tasks, rng):
        angles = rng.uniform(0, np.pi, num_tasks)
        return list(np.stack([np.cos(angles), np.sin(angles)], axis=-1))

    def act(self, actions):
        distances = -super().act(actions)
        return np.where(distances <= 0.2, 1 - distances, 0.0)


for family in (TabularMDP, PointNav, SparsePointNav):
    if f"{family.__name__}-v0" not in gym.registry:  # another script may have brought the same one
        gym.register(f"{family.__name__}-v0", vector_entry_point=family)


# AGENT
def layer_init(layer, std=2**0.5, bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


def make_network(inputs, hidden_size, outputs, std):
    sizes = [(inputs, hidden_size, 2**0.5), (hidden_size, hidden_size, 2**0.5), (hidden_size, outputs, std)]
    layers = [layer for i, o, s in sizes for layer in (layer_init(nn.Linear(i, o), s), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """The three meta parts. The learner of a task is no module: it is the posterior (w, C) of its critic's weights."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        # Each discrete action has a block of weights of its own: what is seen of one says nothing about the others.
        self.num_blocks, self.num_rows = (self.action_dim, 1) if self.discrete else (1, 1 + self.action_dim)
        shape = self.num_blocks, (obs_dim if self.discrete else obs_dim + self.num_rows) + args.num_features  # (B, W)
        low, high = (torch.as_tensor(getattr(action_space, name, np.inf)) for name in ("low", "high"))
        bounded = torch.isfinite(low) & torch.isfinite(high)  # a Gaussian of unit scale spans a Box, which is kept here
        self.register_buffer("box_center", torch.where(bounded, (low + high) / 2, 0.0).flatten())
        self.register_buffer("box_scale", torch.where(bounded, (high - low) / 2, 1.0).flatten())
        # Meta-policy: the start of each task's actor, and the temperature of the actor's step.
        self.policy = make_network(obs_dim + 2 * math.prod(shape), args.hidden_size, self.action_dim, 0.01)
        self.log_std = nn.Parameter(torch.full((0 if self.discrete else self.action_dim,), -0.7))
        self.log_temperature = nn.Parameter(torch.tensor(args.temperature).log())
        # Meta-value function: features, prior mean and precision of their weights, discount factor.
        self.value = make_network(obs_dim, args.hidden_size, self.num_rows * args.num_features, 1.0)
        self.prior_mean = nn.Parameter(torch.zeros(shape))
        self.log_precision = nn.Parameter(torch.zeros(shape))
        self.prior_level = nn.Parameter(torch.zeros(2))  # of rewards before any data, and of log-precisions
        num_level = obs_dim if self.discrete else 1  # the level of Q is in a one-hot observation, or in the constant
        self.register_buffer("is_level", (torch.arange(shape[1]) < num_level).to(self.prior_mean.dtype))
        self.logit_gamma, self.max_gamma = nn.Parameter(torch.tensor(0.0)), args.max_critic_gamma
        # Meta action selection: optimism and noise, each a + b log(1 + rounds left). Plain exploration has no optimism.
        self.optimism = nn.Parameter(torch.tensor([0.0, 0.3]) * args.meta_action_selection)
        self.noise = nn.Parameter(torch.zeros(2))
        # What `--no-meta-...` leaves as it was at the start.
        parts = (args.meta_policy, "policy log_std log_temp"), (args.meta_value, "value prior log_prec logit")
        for learned, names in (*parts, (args.meta_action_selection, "optimism noise")):
            for name, parameter in self.named_parameters():
                if name.startswith(tuple(names.split())):
                    parameter.requires_grad_(learned)

    def gamma(self):
        """The critic's discount factor."""
        return self.max_gamma * self.logit_gamma.sigmoid()

    def prior(self, gamma=None):
        """Mean and precision (B, W) of the critic's weights before any data of a task."""
        gamma = self.gamma() if gamma is None else gamma
        level = self.prior_level[0] / (1 - gamma) * self.is_level
        return self.prior_mean + level, (self.log_precision + self.prior_level[1]).exp()

    def selection(self, rounds_left):
        """Optimism beta and log-noise (...) of exploration, with so many rounds of the trial to come after this one."""
        return [x[0] + x[1] * (1 + rounds_left).log() for x in (self.optimism, self.noise)]

    def to_box(self, actions):
        return actions if self.discrete else self.box_center + self.box_scale * actions


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


def critic_features(agent, obs):
    """Rows X (..., B, K, W) for observations (..., D), so that f(s, a) = sum_k x_k(a) X_k(s), with x from `action_rows`.

    The first features are the observation itself; of a Box 1, the observation and the action. The last ones are learned: a
    network of the observation, linear in the action of a Box. Each action of a discrete space is a block of one row."""
    learned = agent.value(obs).unflatten(-1, (agent.num_rows, agent.value[-1].out_features // agent.num_rows))
    if agent.discrete:
        row = torch.cat([obs, learned.squeeze(-2)], dim=-1)
        return row[..., None, None, :].expand(*obs.shape[:-1], agent.num_blocks, -1, -1)
    first = nn.functional.pad(obs, (1, 0), value=1.0).unsqueeze(-2)  # (..., 1, 1 + D)
    known = nn.functional.pad(first, (0, 0, 0, agent.action_dim))
    actions = torch.eye(agent.num_rows, dtype=obs.dtype, device=obs.device)[:, 1:].expand(*obs.shape[:-1], -1, -1)
    return torch.cat([known, actions, learned], dim=-1).unsqueeze(-3)


def action_rows(agent, actions):
    """x(a) (..., B K): an action one-hot, or the probabilities of all for their expectation; (1, a) for a Box."""
    if not agent.discrete:
        return nn.functional.pad(actions, (1, 0), value=1.0)
    return actions if actions.is_floating_point() else torch.eye(agent.num_blocks).to(agent.prior_mean)[actions]


def combine(rows, features):
    """sum_k x_k X_k (..., B W) for x (..., B K) and X (..., B, K, W)."""
    return (rows.view(*features.shape[:-1], 1) * features).sum(-2).flatten(-2)


def adapt(weights, inverse, features, differences, rewards):
    """The critic after L more steps in closed form: regularised LSTD-Q (Lagoudakis & Parr 2003), all tasks in one batch.

    With f (..., L, B W) and d = f - gamma f_next, it solves  A w = P w_0 + sum_t f_t r_t,  A = P + sum_t f_t d_t',  so that
    w'f is the fixed point of Q(s, a) = r + gamma E Q(s', a') with prior mean w_0 and prior precision P. From the solution
    without these steps, by Woodbury's identity: returns the weights (..., B W) and A^-1 (..., B W, B W)."""
    left, right = inverse @ features.mT, differences @ inverse
    errors = rewards[..., None] - differences @ weights[..., None]
    system = torch.eye(rewards.shape[-1], dtype=rewards.dtype, device=rewards.device) + differences @ left
    solved = left @ torch.linalg.solve_ex(system, torch.cat([right, errors], dim=-1))[0]
    return weights + solved[..., -1], inverse - solved[..., :-1]


def knowledge(prior, weights, variances):
    """What pi_theta reads of the critic (..., 2 B W): w - w_0, and how uncertain each weight is, from 1 (as before any data)
    to 0. Prior mean and precision (..., B W), weights and the covariance's diagonal (..., B W)."""
    return torch.cat([weights - prior[0], (variances * prior[1]).clamp(min=1e-8).sqrt()], dim=-1)


def actor(agent, obs, features, weights, known, gains=None, selection=None):
    """The actor of a task in closed form: the natural policy gradient step pi(a|s) ~ pi_theta(a|s) exp(Q(s, a) / temperature).

    Critic features X (..., B, K, W), weights w (..., B W), and what is `known` of them, for pi_theta. Given `gains` X C
    (..., B, K, W) by the critic's covariance C, actions are chosen for learning, with the optimism and noise of
    `Agent.selection`: Q + beta sigma stands for Q, and the noise is scaled. Returns logits or means (..., A), and log-stds.
    For a Gaussian of covariance S and a Q linear in a, the step moves the mean by S grad_a Q / temperature."""
    q = (features * weights.view(*features.shape[:-2], 1, -1)).sum(-1).flatten(-2)  # (..., B K)
    start = agent.policy(torch.cat([obs, known], dim=-1))  # (..., A)
    log_std, temperature = agent.log_std.clamp(-5, 2), agent.log_temperature.exp()
    if gains is not None:
        beta, log_noise = (x[..., None] for x in selection)
        if agent.discrete:
            q = q + beta * (gains * features).sum((-2, -1)).clamp(min=1e-8).sqrt()
            temperature, start = temperature * log_noise.exp(), start * (-log_noise).exp()
        else:  # the gradient of sigma where the step starts
            x = action_rows(agent, start)
            along = (gains.squeeze(-3) @ combine(x, features)[..., None]).squeeze(-1)  # (..., K)
            q = q + beta * along / (x * along).sum(-1, keepdim=True).clamp(min=1e-8).sqrt()
            log_std = log_std + log_noise
    if agent.discrete:
        return start + q / temperature, log_std
    return start + (2 * agent.log_std.clamp(-5, 2)).exp() * q[..., 1:] / temperature, log_std


def expected_rows(agent, *state):
    """E x(a) (..., B K) under the actor itself, without exploration: it is this policy whose Q the critic is solved for."""
    params, _ = actor(agent, *state)
    return action_rows(agent, params.softmax(-1) if agent.discrete else params)


def refine(weights, features, gains, errors):
    """The regression on the round's targets after one more step, Kalman: f (..., B W), C f (..., B W), TD error (...).

    Returns the weights and v (..., B W): the covariance is C - v v' now."""
    scale = 1 + (features * gains).sum(-1, keepdim=True)
    return weights + gains / scale * errors[..., None], gains / scale.sqrt()


def refine_path(weights, covariance, features, errors):
    """`refine` before each of L steps at once: covariance (..., B, W, W), features (..., L, B W), TD errors (..., L) under the
    weights at the start.

    Returns weights (..., L, B W) and V (..., B, L, W), so that the covariance before step t is C - sum_{i<t} v_i v_i'."""
    blocks = features.unflatten(-1, covariance.shape[-3:-1]).transpose(-3, -2)  # (..., B, L, W)
    gains = blocks @ covariance
    noise = torch.eye(features.shape[-2], dtype=features.dtype, device=features.device)
    factor = torch.linalg.cholesky_ex((gains @ blocks.mT).sum(-3) + noise)[0]
    columns = torch.cat([gains.transpose(-3, -2).flatten(-2), errors[..., None]], dim=-1)
    solved = torch.linalg.solve_triangular(factor, columns, upper=False)
    innovations = solved[..., :-1] * solved[..., -1:]
    v = solved[..., :-1].unflatten(-1, covariance.shape[-3:-1]).transpose(-3, -2)
    return weights[..., None, :] + innovations.cumsum(-2) - innovations, v


def rollout(agent, envs, tasks, num_rounds, num_episodes, seeds, noise_key=None, shard=(0, 1), exploit=False):
    """Plays a trial of each task: rounds of `num_episodes` episodes, before each of which the critic is solved on all before.

    Without `noise_key` the most probable actions are taken; so they are in the further round of one episode that `exploit`
    adds, by the action selection of a last round. Who has finished the round early waits, masked. Returns a dict of tensors,
    R rounds of L steps: obs, next_obs (N, R, L, D), actions (N, R, L, ...), next_rows (N, R, L, B K), which are the actor's
    expectation of x(a) there, weights (N, R, L, B W) and known (N, R, L, 2 B W) of the critic, and (N, R, L) each: logprobs,
    rewards, terminated, dones, masks (1: a real step), episodes (from 0)."""
    envs.unwrapped.set_attr("task", list(tasks))
    gamma, rounds = agent.gamma(), []
    like, precision = (x.expand(envs.num_envs, -1, -1) for x in agent.prior())  # (N, B, W)
    prior, covariance = (like.flatten(1), precision.flatten(1)), precision.reciprocal().diag_embed()
    critic = prior[0], prior[1].reciprocal().diag_embed()  # weights (N, B W) and inverse (N, B W, B W)
    for r in range(num_rounds + exploit):
        explore = r < num_rounds
        selection = agent.selection(like.new_full((1,), max(num_rounds - 1 - r, 0)))
        weights = start_weights = critic[0]
        generator = torch_stream(like.device, *noise_key, r) if noise_key and explore else None
        episodes, steps, data, marks = np.zeros(envs.num_envs, dtype=np.int64), [], [], []
        obs = torch.as_tensor(envs.reset(seed=seeds[r])[0]).to(like)
        features = critic_features(agent, obs)
        while (masks := episodes < (num_episodes if explore else 1)).any():
            gains, variances = (covariance @ features.mT).mT, covariance.diagonal(dim1=-2, dim2=-1).flatten(1)
            known = knowledge(prior, weights, variances)
            params = actor(agent, obs, features, weights, known, gains, selection)
            policy = policy_distribution(*params, agent.discrete)
            actions = sample_actions(policy, generator, shard)
            next_obs, rewards, terminated, truncated = step_envs(envs, agent.to_box(actions), tasks, len(steps))
            done = terminated | truncated
            marks.append((terminated, done, masks, r * num_episodes + episodes))
            next_obs, rewards, masks, goes_on = (
                torch.as_tensor(x).to(like) for x in (next_obs, rewards * masks, masks, masks & ~terminated)
            )
            next_features = critic_features(agent, next_obs)
            next_rows = expected_rows(agent, next_obs, next_features, weights, known)
            steps.append((obs, next_obs, actions, next_rows, weights, known, policy.log_prob(actions), rewards))

            rows = action_rows(agent, actions) * masks[:, None]
            f, f_next = combine(rows, features), gamma * combine(next_rows, next_features) * goes_on[:, None]
            errors = rewards + (f_next * start_weights).sum(-1) - (f * weights).sum(-1)
            weights, v = refine(weights, f, combine(rows, gains), errors)
            v = v.view_as(like)
            covariance.addcmul_(v[..., None], v[..., None, :], value=-1)
            data.append((f, f - f_next, rewards))
            episodes, obs, features = episodes + done, next_obs, next_features
            if done.any():
                obs = torch.as_tensor(envs.reset(options={"reset_mask": done})[0]).to(like)
                features = critic_features(agent, obs)
        critic = adapt(*critic, *(torch.stack(x, dim=1) for x in zip(*data, strict=True)))
        marks = (torch.as_tensor(np.stack(x), device=like.device) for x in zip(*marks, strict=True))
        rounds.append([*(torch.stack(x) for x in zip(*steps, strict=True)), *marks])
    names = "obs next_obs actions next_rows weights known logprobs rewards terminated dones masks episodes".split()
    columns = zip(names, zip(*rounds, strict=True), strict=True)
    batch = {name: nn.utils.rnn.pad_sequence(column).transpose(0, 2) for name, column in columns}
    return batch | {"masks": batch["masks"].to(like)}


def compute_gae(rewards, values, next_values, dones, masks, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16); all (N, R, L). It is cut at the end of each episode;
    `next_values` is zero where the episode terminated, and the value of the last observation where time ran out."""
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[..., 0])
    for t in reversed(range(rewards.shape[-1])):
        delta = rewards[..., t] + gamma * next_values[..., t] - values[..., t]
        next_advantage = delta + gamma * gae_lambda * ~dones[..., t] * next_advantage
        next_advantage = advantages[..., t] = next_advantage * masks[..., t]
    return advantages


def mean_and_std(x, masks):
    """Mean and standard deviation of x, of any shape, over all real steps, those of the other processes included."""
    real, weights = x.double(), masks.double()
    count, total, squares = all_reduce(torch.stack([weights.sum(), (real * weights).sum(), (real**2 * weights).sum()]))
    mean = total / count
    return mean.to(x.dtype), (squares / count - mean**2).clamp(min=0).sqrt().to(x.dtype)


def taken_features(agent, batch):
    """f(s, a) of the actions taken and E f(s', a') of the actor then (N, R, L, B W), zero where there is no step."""
    features, next_features = critic_features(agent, batch["obs"]), critic_features(agent, batch["next_obs"])
    taken = combine(action_rows(agent, batch["actions"]), features) * batch["masks"][..., None]
    return features, taken, combine(batch["next_rows"], next_features) * (batch["masks"] * ~batch["terminated"])[..., None]


def compute_advantages(agent, batch, num_explorations, gamma, gae_lambda, trial_gamma):
    """What an action brought: the rest of its episode, and the later episodes of the trial; both (N, R, L).

    The explorations of a task are each other's baseline, which no action of one's own can move: the rest of the episode
    is held against the value function that the others' data give, later episodes against the others' later episodes."""
    with torch.no_grad():
        features, taken, following = taken_features(agent, batch)
        mean, precision = (x.flatten() for x in agent.prior(gamma))
        f, f_next, rewards = taken.flatten(1, 2), following.flatten(1, 2), batch["rewards"].flatten(1, 2)
        sums = f.mT @ (f - gamma * f_next), f.mT @ rewards[..., None]
        matrices, moments = (x.unflatten(0, (num_explorations, -1)) for x in sums)  # (C, M, ...)
        matrices, moments = ((x.sum(0) - x).flatten(0, 1) for x in (matrices, moments))
        weights = torch.linalg.solve_ex(matrices + precision.diag(), moments.squeeze(-1) + precision * mean)[0]
        rows = expected_rows(agent, batch["obs"], features, batch["weights"], batch["known"])
        values = (combine(rows, features) * weights[:, None, None]).sum(-1)
        next_values = (following * weights[:, None, None]).sum(-1)
        rest = compute_gae(batch["rewards"], values, next_values, batch["dones"], batch["masks"], gamma, gae_lambda)

        returns = rest.new_zeros(len(rest), int(batch["episodes"].max()) + 2)  # (N, E + 1)
        returns.scatter_add_(1, batch["episodes"].flatten(1), (batch["rewards"] * batch["masks"]).flatten(1))
        for e in reversed(range(returns.shape[1] - 1)):
            returns[:, e] += trial_gamma * returns[:, e + 1]
        later = returns.roll(-1, dims=1).unflatten(0, (num_explorations, -1))
        later = (later - later.mean(0)) * num_explorations / (num_explorations - 1)
        later = trial_gamma * later.flatten(0, 1).gather(1, batch["episodes"].flatten(1)).view_as(rest) * batch["masks"]
    return rest + later, rest, values


def replay(agent, features, taken, following, rewards):
    """What a trial's learner knew before each step, from its data once more, so that gradients go through all it learned.

    Features X (N, R, L, B, K, W), f(s, a) and E f(s', a') (N, R, L, B W), rewards (N, R, L). Returns TD targets (N, R, L),
    weights (N, R, L, B W), what pi_theta reads (N, R, L, 2 B W) and gains X C (N, R, L, B, K, W)."""
    following, (mean, precision), rounds = agent.gamma() * following, agent.prior(), []
    prior, covariance = (mean.flatten(), precision.flatten()), precision.reciprocal().diag_embed()
    critic = prior[0], prior[1].reciprocal().diag()
    length, num_rows = features.shape[2], agent.num_rows
    earlier = rewards.new_ones(length, length).tril(-1).repeat_interleave(num_rows, 0)  # (L K, L)
    blocks = features.transpose(2, 3).flatten(3, 4)  # (N, R, B, L K, W)
    for x, f, f_next, r in zip(*(x.unbind(1) for x in (blocks, taken, following, rewards)), strict=True):
        targets = r + (f_next @ critic[0][..., None]).squeeze(-1)
        weights, v = refine_path(critic[0], covariance, f, targets - (f @ critic[0][..., None]).squeeze(-1))
        squares = (v**2).transpose(1, 2).flatten(2)  # (N, L, B W)
        variances = covariance.diagonal(dim1=-2, dim2=-1).flatten(-2)[..., None, :] + squares - squares.cumsum(1)
        gains = x @ covariance - (x @ v.mT * earlier) @ v
        rounds.append((targets, weights, knowledge(prior, weights, variances), gains))
        covariance, critic = covariance - v.mT @ v, adapt(*critic, f, f - f_next, r)
    targets, weights, known, gains = (torch.stack(x, dim=1) for x in zip(*rounds, strict=True))
    return targets, weights, known, gains.unflatten(3, (length, num_rows)).transpose(2, 3)


def meta_loss(agent, batch, mb_inds, num_steps, clip_coef):
    """Clipped PPO objective (Schulman et al. 2017, eq. 7) of the trials `mb_inds`, through the critics and actors of all
    rounds at once, and the critic's error in predicting each step from what was seen before it.

    Sums over these trials, divided by the steps of the whole minibatch, so that the shares of the processes add up.
    Returns policy_loss, value_loss (in units of the rewards' variance), entropy, approx_kl and clipfrac."""
    mb = {name: x[mb_inds] for name, x in batch.items()}
    features, taken, following = taken_features(agent, mb)
    targets, weights, known, gains = replay(agent, features, taken, following, mb["rewards"])
    rounds_left = torch.arange(targets.shape[1] - 1, -1, -1).to(targets)
    selection = [x[:, None] for x in agent.selection(rounds_left)]  # (R, 1)
    params, log_std = actor(agent, mb["obs"], features, weights, known, gains, selection)

    policy = policy_distribution(params, log_std, agent.discrete)
    logratio = policy.log_prob(mb["actions"]) - mb["logprobs"]
    ratio, mb_advantages = logratio.exp(), mb["advantages"]
    policy_loss = -torch.min(ratio * mb_advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * mb_advantages)
    value_loss = (targets.detach() - (taken * weights).sum(-1)) ** 2 / mb["scales"] ** 2
    approx_kl, clipfrac = (ratio - 1 - logratio).detach(), ((ratio - 1).abs() > clip_coef).to(ratio)
    losses = policy_loss, value_loss, policy.entropy(), approx_kl, clipfrac
    return [(x * mb["masks"]).sum() / num_steps for x in losses]


def returns_by_episode(batch, num_episodes):
    """Sums the rewards of each episode: (E, N)."""
    returns = batch["rewards"].new_zeros(len(batch["rewards"]), num_episodes + 1)
    episodes = batch["episodes"].clamp(max=num_episodes).flatten(1)
    return returns.scatter_add_(1, episodes, (batch["rewards"] * batch["masks"]).flatten(1))[:, :num_episodes].T


def evaluate(agent, args, tasks, num_rounds, video_dir=None):
    """Plays a trial of each task, always with the same noise, and an episode of the most probable actions: (E + 1, tasks)."""
    envs = make_envs(args, len(tasks), film=video_dir is not None)
    if video_dir is not None:
        envs = RecordVideo(envs, str(video_dir), episode_trigger=lambda episode: True)
    seeds = stream(args.seed, 0, EVAL).integers(2**31, size=(num_rounds + 1, len(tasks))).tolist()
    with torch.no_grad():
        batch = rollout(agent, envs, tasks, num_rounds, args.episodes_per_round, seeds, (args.seed, 0, ACTIONS), exploit=True)
    envs.close()
    return returns_by_episode(batch, num_rounds * args.episodes_per_round + 1)


def print_table(returns):
    """The closing table, of held-out returns (E + 1, tasks); of a long trial every tenth part of its episodes."""
    print(f"\nreturn on {returns.shape[1]} held-out tasks")
    for k in np.unique(np.linspace(1, len(returns) - 1, min(len(returns) - 1, 10)).astype(int)):
        print("{:>16} {:10.3f} ± {:.3f}".format(f"episode {k}", *summarize(returns[k - 1])))
    print("{:>16} {:10.3f} ± {:.3f}".format("whole trial", *summarize(returns[:-1].sum(0))))
    print("{:>16} {:10.3f} ± {:.3f}".format("the episode after", *summarize(returns[-1])))


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
    require(args, "num_explorations", lambda x: x >= 2, "give at least 2, which are each other's baseline")
    require(args, "episodes_per_round num_features hidden_size", lambda x: x >= 1, "give a whole number of at least 1")
    require(args, "num_minibatches update_epochs", lambda x: x >= 1, "give a whole number of at least 1")
    num_trials = args.num_tasks * args.num_explorations
    require(args, "num_minibatches", lambda x: num_trials % x == 0, f"give a divisor of the {num_trials} trials")
    require(args, "eval_episodes", lambda x: x % args.episodes_per_round == 0, "give a multiple of --episodes-per-round")
    require(args, "learning_rate numbers_learning_rate temperature", lambda x: 0 < x < np.inf, "give a number above 0")
    require(args, "clip_coef max_grad_norm", lambda x: 0 < x < np.inf, "give a number above 0")
    require(args, "gae_lambda trial_gamma", lambda x: 0 <= x <= 1, "give a number from 0 to 1")
    require(args, "gamma max_critic_gamma", lambda x: 0 <= x < 1, "give a number of at least 0, below 1")
    learns = args.meta_policy or args.meta_value or args.meta_action_selection
    require(args, "meta_policy", lambda x: learns, "nothing is left to learn; leave out one of the three --no-meta flags")
    require(args, "rounds eval_episodes ent_coef vf_coef", lambda x: 0 <= x < np.inf, "give 0 or more")

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
    envs = make_envs(args, num_trials // WORLD_SIZE)
    num_episodes = getattr(task_family(envs), "episodes_per_trial", 2 * args.episodes_per_round)
    require(args, "env_kwargs", lambda x: isinstance(num_episodes, int) and num_episodes >= 1, "give 1 episode or more")
    num_rounds = args.rounds or -(-num_episodes // args.episodes_per_round)
    eval_rounds = args.eval_episodes // args.episodes_per_round or num_rounds
    if args.capture_video:
        make_envs(args, 1, film=True).close()  # so that it fails now if at all
    heldout_tasks = sample_tasks(envs, args.eval_tasks, stream(args.seed, 0, HELDOUT_TASKS))
    train_tasks = sample_tasks(envs, args.num_train_tasks, stream(args.seed, 0, TRAIN_TASKS))
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, args).to(device)
    numbers = [agent.prior_level, agent.log_std, agent.log_temperature, agent.optimism, agent.noise]
    others = [parameter for parameter in agent.parameters() if not any(parameter is p for p in numbers)]
    learning_rates = args.learning_rate, args.numbers_learning_rate
    groups = [{"params": p, "lr": lr} for p, lr in zip((others, numbers), learning_rates, strict=True)]
    optimizer = torch.optim.Adam(groups, eps=1e-5)
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
            returns = evaluate(agent, args, heldout_tasks, eval_rounds)
        except FloatingPointError as error:
            sys.exit(f"{SCRIPT}.py: {error} is not finite")
        write_eval_csv(run_dir / "eval.csv", eval_csv_rows(global_step, "heldout", returns, first=1))
        print_table(returns)
        if args.capture_video:
            evaluate(agent, args, heldout_tasks[:4], eval_rounds, run_dir / "videos")
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
            for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
                group["lr"] = remaining * learning_rate
            rng = stream(args.seed, iteration, TASKS)
            tasks = sample_tasks(envs, args.num_tasks, rng)
            if train_tasks:
                tasks = [train_tasks[i] for i in rng.integers(len(train_tasks), size=args.num_tasks)]

            start = time.time()
            seeds = stream(args.seed, iteration, NOISE).integers(2**31, size=(num_rounds, num_trials))[:, RANK::WORLD_SIZE]
            trials = (tasks * args.num_explorations)[RANK::WORLD_SIZE]  # (N,), exploration by exploration
            noise_key = args.seed, iteration, ACTIONS
            with torch.inference_mode():
                shard = RANK, WORLD_SIZE
                batch = rollout(agent, envs, trials, num_rounds, args.episodes_per_round, seeds.tolist(), noise_key, shard)
            masks = batch["masks"]
            reward_mean, reward_std = mean_and_std(batch["rewards"], masks)
            batch["scales"] = reward_std.clamp(min=0.1).expand(len(masks), 1, 1)
            discounts = args.gamma, args.gae_lambda, args.trial_gamma
            advantages, rest, values = compute_advantages(agent, batch, args.num_explorations, *discounts)
            mean, std = mean_and_std(advantages, masks)
            batch["advantages"] = (advantages - mean) / (std + 1e-8)
            rollout_time, start = time.time() - start, time.time()

            lengths = torch.zeros(num_trials, device=device)  # steps of each trial of the meta-batch
            lengths[RANK::WORLD_SIZE] = masks.sum((1, 2))
            all_reduce(lengths)
            minibatch_rng = stream(args.seed, iteration, MINIBATCHES)
            for _ in range(args.update_epochs):
                for mb_inds in minibatch_rng.permutation(num_trials).reshape(args.num_minibatches, -1):  # whole trials
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
            has_level = not agent.discrete or bool((batch["obs"].sum(-1)[masks > 0] == 1).all())  # constant or one-hot
            if iteration == 1 and args.meta_value and has_level:
                agent.prior_level.data[0] = reward_mean  # the level of what is usual, from where it is learned
            update_time = time.time() - start

            # LOGGING
            steps = int(lengths.sum())
            global_step += steps
            returns = returns_by_episode(batch, num_rounds * args.episodes_per_round)
            returns = all_reduce(returns.sum(1)) / num_trials  # (E,)
            policy_loss, value_loss, entropy, approx_kl, clipfrac = all_reduce(torch.stack(losses).detach())
            pre, post = returns[0].item(), returns[-1].item()
            progress.set_postfix(pre=f"{pre:.2f}", post=f"{post:.2f}", refresh=False)
            progress.update(steps)
            residual, scale = mean_and_std(rest, masks)[1], mean_and_std(rest + values, masks)[1]
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
                heldout_returns = evaluate(agent, args, heldout_tasks, eval_rounds)
                train_returns = evaluate(agent, args, (train_tasks or tasks)[: args.eval_tasks], eval_rounds)
                eval_rows += eval_csv_rows(global_step, "heldout", heldout_returns, first=1)
                eval_rows += eval_csv_rows(global_step, "train", train_returns, first=1)
                write_eval_csv(run_dir / "eval.csv", eval_rows)
                scalars |= {f"eval/heldout_return_after_{k}": r.mean() for k, r in enumerate(heldout_returns, 1)}
                scalars |= {f"eval/train_return_after_{k}": r.mean() for k, r in enumerate(train_returns, 1)}
                scalars["eval/generalization_gap"] = train_returns[:-1].sum(0).mean() - heldout_returns[:-1].sum(0).mean()
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
        evaluate(agent, args, heldout_tasks[:4], eval_rounds, run_dir / "videos")
    print(f"\nevaluate again: python {sys.argv[0]} --evaluate {run_dir / 'checkpoint.pt'}")
