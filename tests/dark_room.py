"""Dark Room and Dark Key-to-Door (Laskin et al. 2022) as task families, with the environments of the package toymeta.

    pip install --no-deps toymeta==0.0.1
    cd tests && python ../mrl_rl2.py --env-id dark_room:DarkRoom-v0

toymeta's own id of Dark Key-to-Door names a module that it does not have, so the classes are imported here.
"""

import gymnasium as gym
from toymeta import dark_key_door, dark_room


class DarkRoom(dark_room.DarkRoom):
    """9x9 cells, a hidden goal, +1 in each step that ends on it; each episode starts in the middle and lasts 20 steps."""

    episodes_per_trial = 5  # four times 20 steps are too few to look into all 81 cells
    task = (0, 0)  # row and column of the goal

    def __init__(self):
        super().__init__(goal=self.task, random_start=False)

    def sample_tasks(self, num_tasks, rng):
        return list(rng.integers(self.size, size=(num_tasks, 2)))

    def reset(self, **kwargs):
        self.goal_pos = self.task
        return super().reset(**kwargs)


class DarkKeyToDoor(dark_key_door.DarkKeyToDoor):
    """9x9 cells, +1 for the hidden key, once, and +1 for the hidden door with the key, which ends the episode; each episode
    starts in a random cell and lasts up to 50 steps."""

    episodes_per_trial = 5
    task = ((0, 0), (8, 8))  # rows and columns of the door and of the key
    pairs = dark_key_door.all_goals(9)  # of two different cells

    def __init__(self):
        super().__init__(goal=self.task, random_start=True)

    def sample_tasks(self, num_tasks, rng):
        return list(rng.choice(self.pairs, num_tasks))

    def reset(self, **kwargs):
        self.door_pos, self.key_pos = self.task
        return super().reset(**kwargs)


gym.register("DarkRoom-v0", entry_point=DarkRoom, max_episode_steps=20)
gym.register("DarkKeyToDoor-v0", entry_point=DarkKeyToDoor, max_episode_steps=50)
