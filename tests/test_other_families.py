"""Environments of other people as task families: toymeta's Dark Room and Dark Key-to-Door, gymnasium's pendulum."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
from launch import train
from players import PLAN, dark_room_rows

FAMILIES = ("dark_room:DarkRoom-v0", "dark_room:DarkKeyToDoor-v0", "varied_pendulum:VariedPendulum-v0")
STAY, UP, RIGHT, DOWN, LEFT = range(5)


def make(env_id):
    if env_id.startswith("dark_room:"):
        pytest.importorskip("toymeta")
    return gym.make(env_id)


def rewards(env, actions, **kwargs):
    """Rewards until the actions or the episode end."""
    env.reset(**kwargs)
    paid = []
    for action in actions:
        _, reward, terminated, truncated, _ = env.step(action)
        paid.append(reward)
        if terminated or truncated:
            break
    return paid


def test_dark_room_pays_in_each_step_on_the_goal():
    env = make("dark_room:DarkRoom-v0")
    env.unwrapped.task = (3, 5)
    assert rewards(env, [UP, RIGHT, STAY, LEFT, RIGHT]) == [0, 1, 1, 0, 1]
    env.unwrapped.task = (4, 4)  # the cell of the start, but only from the next reset on
    assert env.step(STAY)[1] == 1
    assert rewards(env, [STAY] * 99) == [1] * 20


def test_dark_key_to_door_pays_for_the_key_and_then_for_the_door():
    env = make("dark_room:DarkKeyToDoor-v0")
    env.unwrapped.task, env.unwrapped.random_start = ((4, 5), (5, 5)), False
    assert rewards(env, [RIGHT, DOWN, STAY, UP, UP]) == [0, 1, 0, 1]
    env.unwrapped.task = ((8, 8), (4, 3))
    assert rewards(env, [LEFT] + [STAY] * 99) == [1] + [0] * 49


def test_reference_values_of_dark_room():
    """The plan, played in toymeta's environment for each goal, has the returns that are calculated for it."""
    env, returns = make("dark_room:DarkRoom-v0"), np.zeros(len(PLAN))
    for x, y in product(range(9), repeat=2):
        env.unwrapped.task, found = (x, y), False
        straight = [DOWN if x > 4 else UP] * abs(x - 4) + [RIGHT if y > 4 else LEFT] * abs(y - 4) + [STAY] * 20
        for k, walk in enumerate(PLAN):
            paid = rewards(env, straight if found else [".URDL".index(move) for move in walk])
            returns[k] += sum(paid) if found or not any(paid) else len(paid) - np.argmax(paid)  # it stays once it is there
            found = found or any(paid)
    table = [row[2] for row in dark_room_rows() if row[1] in ("near-Bayes", "upper bound")]
    assert table[:-1] == pytest.approx([*returns / 81, returns.sum() / 81])
    assert table == pytest.approx([2.593, 7, 11.222, 15.123, 16.543, 52.481, 52.704], abs=5e-4)


def test_varied_pendulum_is_gymnasiums_pendulum_with_that_gravity():
    env, actions = gym.make("varied_pendulum:VariedPendulum-v0"), np.full((300, 1), 0.5)
    old, new = (rewards(gym.make("Pendulum-v1", g=g), actions, seed=0) for g in (env.unwrapped.task, 3.0))
    assert len(old) == 200 and old != new
    assert rewards(env, actions[:100], seed=0) == old[:100]
    env.unwrapped.task = 3.0
    assert [env.step(action)[1] for action in actions[100:200]] == old[100:]
    assert rewards(env, actions, seed=0) == new


@pytest.mark.parametrize("env_id", FAMILIES)
def test_rl2_trains(env_id, tmp_path):
    make(env_id)
    train("mrl_rl2", f"--env-id {env_id} --total-timesteps 1 --eval-tasks 2", tmp_path)
