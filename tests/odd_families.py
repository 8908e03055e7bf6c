"""Task families that a user might write, odd or wrong. Run as `--env-id families:<class>-v0` from a copy of this file."""

import os

import gymnasium as gym
import numpy as np
import torch


class SetTask(gym.Env):
    """Five steps; the action that is the task pays 1. Wrong: the task arrives by a method, not by an attribute `task`."""

    observation_space, action_space, side = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2), 0

    def set_task(self, task):
        self.side = task

    def sample_tasks(self, num_tasks, rng):
        return list(rng.integers(2, size=num_tasks))

    def reward(self, action):
        return float(action == self.task)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action in self.action_space, action
        self.t += 1
        return np.zeros(1, np.float32), self.reward(action), False, self.t == 5, {}


class Side(SetTask):
    task = 0


# Odd, but right


class Drift(Side):  # changes its task in place
    task = {"goal": 0}

    def sample_tasks(self, num_tasks, rng):
        return [{"goal": 0} for _ in range(num_tasks)]

    def reset(self, **kwargs):
        self.task["goal"] += 1
        return super().reset(**kwargs)

    def reward(self, action):
        return float(self.task["goal"])


class Switch(Side):
    def __init__(self, sparse=True):
        self.reward = lambda action: 1.0 if sparse else 2.0


class Far(Side):
    action_space, reward = gym.spaces.Box(10, 20, (1,)), lambda self, action: float(action[0])


class Whole(Side):
    action_space, reward = gym.spaces.Box(-2, 2, (1,), np.int64), lambda self, action: float(action[0])


class ArrayReward(Side):
    action_space, reward = gym.spaces.Box(-1, 1, (1,)), lambda self, action: -np.abs(action - self.task)


class Zeros(Side):
    reward = lambda self, action: 0.0  # noqa: E731


class Small(Side):  # in another unit
    def __init__(self, reward=1.0, obs=1.0):
        self.reward, self.obs = lambda action: reward * (action == self.task), obs

    def step(self, action):
        obs, *rest = super().step(action)
        return obs + self.obs * (self.t + action) / 5, *rest


class Ranks(Side):  # each process sees something else
    def reset(self, **kwargs):
        return super().reset(**kwargs)[0] + float(os.environ.get("RANK", 0)), {}


class Ragged(Side):  # an info of another shape in each task
    def step(self, action):
        obs, reward, *ends, _ = super().step(action)
        return obs, reward, *ends, {"path": np.zeros((self.t, int(self.task) + 1))}


class Numpy(Side):
    episodes_per_trial = np.int64(3)


class Places(Side):  # observations to be flattened, actions from 1
    observation_space = gym.spaces.Dict(a=gym.spaces.Discrete(3), b=Side.observation_space)
    action_space = gym.spaces.Discrete(2, start=1)

    def reset(self, **kwargs):
        return {"a": 2, "b": super().reset(**kwargs)[0]}, {}

    def step(self, action):
        obs, *rest = super().step(action)
        return {"a": 1, "b": obs}, *rest


class Tensors(Side):  # equal ones differ when they are pickled
    def sample_tasks(self, num_tasks, rng):
        return list(torch.as_tensor(rng.integers(2, size=num_tasks)))


class Functions(Side):  # tasks that cannot be pickled
    def sample_tasks(self, num_tasks, rng):
        return [lambda action, side=side: float(action == side) for side in rng.integers(2, size=num_tasks)]

    def reward(self, action):
        return self.task(action)


# Wrong


class Odd(Side):  # sample_tasks returns something else than asked
    def __init__(self, what):
        self.what = what

    def sample_tasks(self, num_tasks, rng):
        tasks, drawn = super().sample_tasks(num_tasks, rng), np.random.random(num_tasks)
        return {"dict": {"side": tasks}, "few": tasks[1:], "one": tasks[0], "text": "a" * num_tasks, "global": drawn}[
            self.what
        ]


class Pool(Side):  # tasks out of a pool that is drawn without a seed
    def __init__(self):
        self.pool = np.random.default_rng().random(99)

    def sample_tasks(self, num_tasks, rng):
        return list(rng.choice(self.pool, num_tasks))


class Words(Side):
    reward = lambda self, action: "much"  # noqa: E731


class Blind(Side):
    def reset(self, **kwargs):
        return np.full(1, np.nan, np.float32), super().reset(**kwargs)[1]


class Half(Side):
    episodes_per_trial = 2.5


class Buttons(Side):
    action_space = gym.spaces.MultiBinary(2)


class Needs(Side):
    def __init__(self, size):
        pass


class Endless(Side):
    def step(self, action):
        return *super().step(action)[:3], False, {}


class Breaks(Side):
    """Raises, or pays NaN, after `limit` steps of the process `rank`; writes down all returns, and the task that paid NaN."""

    steps = 0

    def __init__(self, limit=10**9, nan=False, rank="0"):
        self.limit, self.nan = limit if os.environ.get("RANK", "0") == str(rank) else 10**9, nan

    def sample_tasks(self, num_tasks, rng):
        return list(rng.random(num_tasks))

    def reward(self, action):
        Breaks.steps += 1
        if Breaks.steps == self.limit:
            if not self.nan:
                raise RuntimeError("the simulator broke")
            with open("culprit", "w") as file:
                file.write(repr(self.task))
            return float("nan")
        self.total = (self.t > 1 and self.total) + self.task * action + 1
        if self.t == 5:
            with open("diary", "a") as file:
                file.write(f"{self.total}\n")
        return self.task * action + 1


class Auto(gym.vector.VectorEnv):
    metadata, task = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}, []
    single_observation_space, single_action_space, sample_tasks = Side.observation_space, Side.action_space, Side.sample_tasks

    def __init__(self, num_envs=1):
        self.num_envs = num_envs


class Manual(Auto):
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}


class Picture(Manual):
    single_observation_space = gym.spaces.Box(-1, 1, (2, 2))


gym.register("Auto-v0", vector_entry_point=Auto)
gym.register("Picture-v0", vector_entry_point=Picture)
gym.register("Norm-v0", vector_entry_point=lambda num_envs: gym.wrappers.vector.NormalizeReward(Manual(num_envs)))
gym.register("Large-v0", entry_point=lambda: gym.wrappers.NormalizeObservation(Side()))
for family in (SetTask, *SetTask.__subclasses__(), *Side.__subclasses__()):
    gym.register(f"{family.__name__}-v0", entry_point=family)
