"""Meta-World's ML1 (Yu et al. 2019): a robot arm reaches for a goal that it does not see, or pushes a puck there.

In a virtual environment of its own, in the folder tests, after `pip install -r ../requirements.txt metaworld==3.1.1`:

    python ../mrl_rl2.py --env-id meta_world:ML1-v0 --eval-tasks 50 --eval-every 1000000   # 50 training goals
    python meta_world.py runs/<run>/checkpoint.pt                                          # success on 50 held-out goals
    python meta_world.py runs/<run>/checkpoint.pt --steps 500                              # in episodes of Meta-World's length
"""

import functools
import sys
from pathlib import Path

import gymnasium as gym
import metaworld
import numpy as np
import torch
import tyro


@functools.cache
def benchmark(name):
    return metaworld.ML1(name, seed=0)


class ML1(gym.Wrapper):
    """Episodes of `steps` steps, at most Meta-World's 500; success in any of them counts, as in its protocol (`successes`)."""

    def __init__(self, name="reach-v3", split="train", steps=100):
        super().__init__(benchmark(name).train_classes[name]())
        self.goals = benchmark(name).train_tasks if split == "train" else benchmark(name).test_tasks
        self.task, self.max_episode_steps, self.successes = self.goals[0], steps, []

    def sample_tasks(self, num_tasks, rng):  # each goal once before any comes again
        order = np.concatenate([rng.permutation(len(self.goals)) for _ in range(num_tasks // len(self.goals) + 1)])
        return [self.goals[i] for i in order[:num_tasks]]

    def reset(self, **kwargs):
        self.env.set_task(self.task)
        self.t = 0
        self.successes.append(0.0)
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, infos = self.env.step(action)
        self.t += 1
        self.successes[-1] = max(self.successes[-1], infos["success"])
        return obs, reward, terminated, truncated or self.t == self.max_episode_steps, infos


gym.register("ML1-v0", entry_point=ML1)


def success_rates(path: tyro.conf.Positional[Path], steps: int = 100):
    """Prints the share of the 50 held-out goals that an RL² agent reaches in each episode of a trial."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import mrl_rl2

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args = mrl_rl2.Args(**checkpoint["args"])
    args.env_kwargs |= {"split": "test", "steps": steps}
    envs = mrl_rl2.make_envs(args, 50)
    agent = mrl_rl2.Agent(envs.single_observation_space.shape[0], envs.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    tasks = mrl_rl2.sample_tasks(envs, 50, mrl_rl2.seed_all(0))
    mrl_rl2.rollout(agent, envs, tasks, 2, seed=0)
    print(np.mean([env.get_wrapper_attr("successes")[:2] for env in envs.unwrapped.envs], axis=0))


if __name__ == "__main__":
    tyro.cli(success_rates)
