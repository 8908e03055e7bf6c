"""Gymnasium's pendulum with another gravity in each task.

    cd tests && python ../mrl_rl2.py --env-id varied_pendulum:VariedPendulum-v0

Gravity is the constructor's argument `g`, which becomes an attribute.
"""

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv


class VariedPendulum(PendulumEnv):
    task = 10.0  # gravity

    def sample_tasks(self, num_tasks, rng):
        return list(rng.uniform(2, 15, num_tasks))

    def reset(self, **kwargs):
        self.g = self.task
        return super().reset(**kwargs)


gym.register("VariedPendulum-v0", entry_point=VariedPendulum, max_episode_steps=200)
