# /// script
# requires-python = ">=3.11"
# dependencies=["torch==2.13.0","gymnasium[mujoco]==1.4.0","tyro==1.0.17","tensorboard==2.21.0","numpy==2.4.6","tqdm==4.70.1"]
# ///
"""RL²: a recurrent actor-critic whose hidden state is the learner (Duan et al. 2016, Wang et al. 2016).

A trial is E episodes of one task. In the inner loop, a GRU reads each observation and the last step: its observation,
action and reward, and whether it ended an episode. The hidden state is carried over from episode to episode; acting on it is
the adaptation, without any gradient step. In the outer loop, PPO maximises the return of whole trials over many tasks,

    J(theta) = E_task E_trial [ sum_t gamma^t r_t ],    where t runs through all episodes of the trial

    python mrl_rl2.py                                                  # GridNavi: search for a hidden goal, then walk to it
    python mrl_rl2.py --env-id Bandit-v0 --env-kwargs k 5 n 100        # explore and exploit 5 arms for 100 pulls

Shapes: M tasks in a meta-batch (one trial each), E episodes a trial, L steps of the longest trial, D observation size, A
action size, I = 2 D + A + 2 input size, H hidden size, S real steps: those up to the end of each trial's last episode.
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
    env_id: str = "GridNavi-v0"  # task family, or `module:name` for one of another file, such as mrl_maml:PointNav-v0
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # the family's arguments: name value ...
    total_timesteps: int = 6_000_000  # environment steps of training, without evaluations
    num_train_tasks: int = 0  # train on this many fixed tasks (0: fresh tasks in each iteration)
    eval_every: int = 25  # iterations between two evaluations on held-out tasks
    eval_tasks: int = 200  # number of held-out tasks, the same ones in each evaluation
    runs_dir: str = "runs"  # folder in which each run gets a folder of its own
    resume: Annotated[Path | None, CHECKPOINT] = None  # go on with the run of this checkpoint; flags override saved ones
    evaluate: Annotated[Path | None, CHECKPOINT] = None  # only evaluate this checkpoint; flags override saved ones

    # Algorithm specific arguments
    learning_rate: float = 2e-3  # learning rate of Adam at the start; it falls linearly to zero over the training
    num_tasks: int = 0  # tasks in a meta-batch, M, one trial each (0: 16,000 environment steps, but 16 to 1024 tasks)
    hidden_size: int = 128  # size of the GRU's hidden state, H
    init_as_memory: bool = True  # start the GRU as a memory of rewards, see Agent.init_as_memory
    gamma: float = 0.95  # discount factor, over the whole trial
    gae_lambda: float = 0.8  # lambda of generalized advantage estimation, over the whole trial
    num_minibatches: int = 4  # minibatches of whole trials in each epoch
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


class Bandit(TaskVectorEnv):
    """k Bernoulli arms with p ~ U[0, 1]; a trial is n pulls, each pull an episode of one step (Duan et al. 2016, 3.1)."""

    def __init__(self, num_envs=1, k=5, n=10):
        self.k, self.episodes_per_trial = k, n
        super().__init__(num_envs, 1, Box(0, 1, (1,)), Discrete(k))

    def sample_tasks(self, num_tasks, rng):
        return rng.random((num_tasks, self.k))

    def act(self, actions):
        return (self.np_random.random(self.num_envs) < self.tasks[np.arange(self.num_envs), actions]).astype(float)


class GridNavi(TaskVectorEnv):
    """A 5x5 grid with a hidden goal, anywhere but in the 2x2 corner of the start; +1 on the goal, -0.1 off it; 15 steps an
    episode, 4 episodes a trial; the observation is x, y (Zintgraf et al. 2020, 5.1)."""

    moves = np.array([[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]])
    goals = np.array([(x, y) for x in range(5) for y in range(5) if max(x, y) > 1])
    episodes_per_trial = 4

    def __init__(self, num_envs=1):
        super().__init__(num_envs, 15, Box(0, 4, (2,)), Discrete(5))

    def sample_tasks(self, num_tasks, rng):
        return rng.choice(self.goals, num_tasks)

    def act(self, actions):
        self.state = (self.state + self.moves[actions]).clip(0, 4)
        return np.where((self.state == self.tasks[:, :2]).all(-1), 1.0, -0.1)


class CrossModalGridNavi(GridNavi):
    """GridNavi, each episode seen through one sense, the other being zero: position (x, y in [0, 1]) or picture (5x5 noisy
    pixels). `senses` are `mixed` (drawn for each episode), `apart` (one for the whole trial), or a pattern such as `ppvv`."""

    def __init__(self, num_envs=1, senses="mixed"):
        self.senses = senses
        super().__init__(num_envs)
        self.single_observation_space = Box(-1, 2, (27,))

    def sample_tasks(self, num_tasks, rng):
        drawn, kind = rng.integers(2, size=(num_tasks, 4)), self.senses
        senses = drawn if kind == "mixed" else drawn[:, :1] if kind == "apart" else ["pv".index(x) for x in kind]
        return np.hstack([super().sample_tasks(num_tasks, rng), np.broadcast_to(senses, drawn.shape)])

    def reset(self, *, seed=None, options=None):
        self.episode = self.episode + 1 if options else 0  # all episodes are equally long
        return super().reset(seed=seed, options=options)

    def observe(self):
        picture = self.tasks[:, 2 + self.episode % 4, None]
        pixels = self.np_random.normal(np.eye(25)[self.state.astype(int) @ [5, 1]], 0.1)
        return np.hstack([(1 - picture) * self.state / 4, picture * pixels]).astype(np.float32)


for family in (Bandit, GridNavi, CrossModalGridNavi):
    gym.registry.pop(f"{family.__name__}-v0", None)  # a copy of this file may have registered it: the last one counts
    gym.register(f"{family.__name__}-v0", vector_entry_point=family)


# AGENT
class Agent(nn.Module):
    """A GRU reads the trial and gives the weights of a linear actor and critic (a hypernetwork, Beck et al. 2023)."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        self.obs_dim, self.discrete = obs_dim, isinstance(action_space, Discrete)
        self.action_dim = gym.spaces.flatdim(action_space)
        self.encoder, code_dim = nn.Identity(), obs_dim  # for images, which arrive flat: a CNN and its output size
        self.gru = nn.GRU(2 * code_dim + self.action_dim + 2, args.hidden_size)
        self.out_dim = self.action_dim * (1 if self.discrete else 2) + 1  # logits, or means and log deviations; the value
        self.hypernetwork = nn.Linear(args.hidden_size, self.out_dim * (code_dim + 1))
        nn.init.orthogonal_(self.hypernetwork.weight, 0.01)  # so that at first the bias alone is actor and critic
        self.obs_mean, self.obs_std = nn.Buffer(torch.zeros(obs_dim)), nn.Buffer(torch.ones(obs_dim))
        self.reward_scale, self.return_mean, self.return_std = (nn.Buffer(torch.tensor(x)) for x in (1.0, 0.0, 1.0))
        if args.init_as_memory:
            self.init_as_memory(code_dim)

    @torch.no_grad()
    def init_as_memory(self, code_dim):
        """Starts the GRU as a memory: a unit takes in the reward where a random linear function of the previous observation
        and action is below -8, and keeps its state elsewhere. PyTorch's default halves the state at each step."""
        _, keep, new = self.gru.weight_ih_l0.chunk(3)  # reset, update and new gate (H, I); an update gate of 1 keeps the state
        for p in (self.gru.weight_hh_l0, self.gru.bias_hh_l0, self.gru.bias_ih_l0, keep, new):
            p.zero_()
        keep[:, code_dim:-2].normal_(std=5.0)  # the columns of the previous observation and action
        keep[:, code_dim : 2 * code_dim] /= code_dim**0.5  # as selective in any dimension
        self.gru.bias_ih_l0.chunk(3)[1].fill_(8.0)
        new[:, -2] = torch.randn(len(new)).sign() / 2  # the column of the reward

    def set_units(self, obs, rewards):
        """Fixes the units of observations (S, D), 0.1 or more unless all deviate less, and rewards (S): none may drift."""
        self.obs_mean, self.obs_std = obs.mean(0), obs.std(0).clamp(obs.std(0).max().clamp(1e-4, 0.1))
        self.reward_scale = (rewards[rewards != 0] ** 2).mean().nan_to_num(1).sqrt()  # 1 if there were none
        self.return_std = self.reward_scale.clone()

    def make_input(self, obs, previous=None):
        """The input (M, I), observations still raw: obs (M, D), and the previous step's (obs, actions, rewards (M), dones (M))
        or zeros at the start of a trial. After an episode, obs is the first of the next; its own last one is never read."""
        if previous is None:
            return nn.functional.pad(obs, (0, self.obs_dim + self.action_dim + 2))
        last_obs, actions, rewards, dones = previous
        actions = nn.functional.one_hot(actions, self.action_dim) if self.discrete else actions
        rewards = (rewards / self.reward_scale).clamp(-10, 10)  # those that were rare at the start may be far greater
        return torch.hstack([obs, last_obs, actions, rewards[:, None], dones[:, None]])

    def forward(self, inputs, hidden=None, real=None, segment=16):
        """Policy and values (S) at the `real` steps (L, M), by default all, of inputs (L, M, I), and the last hidden state
        (1, M, H); `hidden` is the first. With `real`, trials must come longest first: segments leave out those that ended."""
        real = torch.ones_like(inputs[..., 0]).bool() if real is None else real
        obs, others = inputs.tensor_split([2 * self.obs_dim], dim=-1)
        obs = (obs.unflatten(-1, (2, -1)) - self.obs_mean) / self.obs_std  # (L, M, 2, D): now, and a step before
        codes = self.encoder(obs.clamp(-10, 10).flatten(0, 2)).unflatten(0, obs.shape[:3])
        inputs, codes = torch.cat([codes.flatten(2), others], dim=-1), codes[:, :, 0][real]
        memory, hidden = [], inputs.new_zeros(1, inputs.shape[1], self.gru.hidden_size) if hidden is None else hidden
        for x, mask in zip(inputs.split(segment), real.split(segment), strict=True):
            n = mask[0].sum()  # of trials that are still running; packing them takes 2 to 7 times as long
            h, hidden = self.gru(x[:, :n], hidden[:, :n])
            memory.append(h[mask[:, :n]])
        weights = self.hypernetwork(torch.cat(memory)).unflatten(-1, (self.out_dim, -1))  # (S, out_dim, code_dim + 1)
        outputs = (weights @ nn.functional.pad(codes, (0, 1), value=1.0)[..., None]).squeeze(-1)  # (S, out_dim)
        params, values = outputs[..., :-1], self.return_mean + self.return_std * outputs[..., -1]
        if self.discrete:
            return Categorical(logits=params, validate_args=False), values, hidden
        mean, log_std = params.chunk(2, -1)
        std = (log_std - 0.5).clamp(-5, 2).exp()  # 0.6 at the start; bounded, however large a gradient step
        return Independent(Normal(mean, std, validate_args=False), 1, validate_args=False), values, hidden


# ALGORITHM
@torch.no_grad()
def rollout(agent, envs, tasks, num_episodes, seed, explore=True):
    """Plays a trial of `num_episodes` episodes in each sub-environment; those that are done go on, masked, until all are.
    Without `explore`, takes the most probable actions. Returns a dict: inputs (L, M, I), actions (L, M, ...), and (L, M) each:
    logprobs, values, rewards, masks (1: part of the trial), episodes (from 0)."""
    set_attr = getattr(envs.unwrapped, "set_attr", envs.unwrapped.__setattr__)
    set_attr("task", [copy.deepcopy(task) for task in tasks])  # a family may change its task
    next_obs = as_floats(envs.reset(seed=seed)[0], tasks)
    batch, previous, hidden = [], None, None
    episodes = agent.obs_mean.new_zeros(envs.num_envs, dtype=int)
    while (episodes < num_episodes).any():
        obs = torch.as_tensor(next_obs).to(agent.obs_mean)  # (M, D)
        inputs = agent.make_input(obs, previous)
        policy, values, hidden = agent(inputs[None], hidden)
        actions = policy.sample() if explore else policy.mode  # (M, ...)
        next_obs, _, rewards, _, dones = step_envs(envs, actions, tasks, len(batch))
        masks = (episodes < num_episodes).to(obs)
        rewards, dones = torch.as_tensor(rewards).to(obs) * masks, torch.as_tensor(dones).to(obs)
        previous = obs, actions, rewards, dones
        step = {"inputs": inputs, "actions": actions, "logprobs": policy.log_prob(actions), "values": values}
        batch.append(step | {"rewards": rewards, "masks": masks, "episodes": episodes})
        episodes = episodes + dones.long()
    return {name: torch.stack([step[name] for step in batch]) for name in batch[0]}


def compute_gae(rewards, values, masks, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), all (L, M), across episodes; zero after the trial."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = advantages[t] = (delta + gamma * gae_lambda * next_advantage) * masks[t]
        next_value = values[t] * masks[t]
    return advantages


def meta_loss(agent, batch, mb_inds, clip_coef=0.2):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) and other losses: means over the steps of the trials `mb_inds`."""
    lengths = batch["masks"].sum(0)
    mb_inds = mb_inds[lengths[mb_inds].argsort(descending=True)]  # longest first
    mb = {name: x[: int(lengths[mb_inds[0]]), mb_inds] for name, x in batch.items()}
    real = mb["masks"] > 0
    policy, newvalues, _ = agent(mb["inputs"], real=real)
    logratio = policy.log_prob(mb["actions"][real]) - mb["logprobs"][real]  # (S)
    ratio, advantages = logratio.exp(), mb["advantages"][real]
    losses = {
        "policy_loss": -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages),
        "value_loss": ((newvalues - mb["returns"][real]) / agent.return_std) ** 2,
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
        ("total_timesteps eval_every hidden_size num_minibatches update_epochs", 1, 2**53),
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
    num_episodes = int(family_attribute(envs, "episodes_per_trial", 2))
    batch = rollout(agent, envs, sample_tasks(envs, 32, rng), num_episodes, args.seed)  # by the untrained agent
    real = batch["masks"] > 0
    agent.set_units(batch["inputs"][real][:, : agent.obs_dim], batch["rewards"][real])
    if WORLD_SIZE > 1:  # the processes may have seen other noise: all take the first one's agent
        dist.init_process_group()
        dist.broadcast_object_list(shared := [agent])
        agent = shared[0].to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
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

        losses = []
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(num_tasks, device=args.device).tensor_split(args.num_minibatches):  # whole trials
                mb_losses = meta_loss(agent, batch, mb_inds)
                loss = mb_losses["policy_loss"] + 0.5 * mb_losses["value_loss"] - left * args.ent_coef * mb_losses["entropy"]
                optimizer.zero_grad()
                loss.backward()
                average(*(p.grad for p in agent.parameters()))
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
        scalars = {f"losses/{name}": torch.stack([x[name] for x in losses]).mean() for name in losses[0]}
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
