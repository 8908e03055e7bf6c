"""Odd and wrong task families, those of odd_families.py, in each script."""

import importlib
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import ROOT, TINY, changed, each, load, messages, results, run, scalars, torchrun, train


@pytest.fixture(autouse=True)
def families(tmp_path):
    shutil.copy(ROOT / "tests/odd_families.py", tmp_path / "families.py")


ODD = {  # flags, and what the held-out results must be
    "Drift-v0": ("--total-timesteps 200 --eval-every 1", lambda rows: float(rows[0][1]) == 5),  # as in the first evaluation
    "Switch-v0": ("--env-kwargs sparse false", lambda rows: float(rows[0][1]) == 10),
    "Far-v0": ("", lambda rows: 60 < float(rows[0][1]) < 90),  # around the middle of the Box, 15
    "Whole-v0": ("", lambda rows: True),
    "ArrayReward-v0": ("", lambda rows: float(rows[0][1]) < 0),
    "Ragged-v0": ("", lambda rows: True),
    "Numpy-v0": ("", lambda rows: True),
    "Places-v0": ("", lambda rows: True),
    "Functions-v0": ("", lambda rows: True),
    "Tensors-v0": ("", lambda rows: True),
    "Zeros-v0": ("", lambda rows: all(float(row[1]) == 0 for row in rows)),
}


@each
@pytest.mark.parametrize("family", ODD)
def test_odd_families_run(script, family, tmp_path):
    (tmp_path / "families.py").rename(tmp_path / "test.py")  # a module of Python's own: the working folder goes first
    flags, right = ODD[family]
    run_dir = train(script, f"--env-id test:{family} --total-timesteps 1 --eval-tasks 9 --num-train-tasks 1 {flags}", tmp_path)
    assert right(results(run_dir)) and {row[3] for row in results(run_dir)} == {"9"}
    assert {row[3] for row in results(run_dir, "train")} == {"9"}  # the one task is played as often
    assert all(np.isfinite(value) for series in scalars(run_dir).values() for _, value in series)


WRONG = {  # family and arguments, and what the one line must name
    "SetTask-v0": "SetTask-v0: it has no `task`",
    "Odd-v0 --env-kwargs what dict": "sample_tasks(5, rng) returned {'side'",
    "Odd-v0 --env-kwargs what few": "sample_tasks(5, rng) returned [",
    "Odd-v0 --env-kwargs what one": "sample_tasks(5, rng) returned",
    "Odd-v0 --env-kwargs what text": "sample_tasks(5, rng) returned 'aaaaa'",
    "Odd-v0 --env-kwargs what global": "must draw from rng alone",
    "Pool-v0": "must draw from rng alone",
    "Large-v0": "leave out Normalize wrappers",
    "Norm-v0": "leave out Normalize wrappers",
    "Auto-v0": "give AutoresetMode.DISABLED",
    "Picture-v0": "no attribute 'observation_space'",
    "Half-v0": "episodes_per_trial: give 1, 2, ...",
    "Needs-v0": "'size'",
    "Buttons-v0": "give Discrete or Box",
    "Words-v0": "a reward or observation is not finite",
    "Blind-v0": "a reward or observation is not finite",
}


@each
def test_wrong_families_are_one_line(script, tmp_path):
    for flags, named in WRONG.items():
        code, out, err = run(script, f"{TINY[script]} --eval-tasks 5 --env-id families:{flags}", tmp_path)
        assert code == 2 and out == "" and named in err and len(messages(err)) == 1, (flags, err)
        assert err.startswith(f"{script}.py: ") and not (tmp_path / "runs").exists(), (flags, err)


@each
def test_episodes_that_never_end(script, tmp_path):
    copy = changed(script, tmp_path / "impatient.py", ("step >= 20_000", "step >= 200"))
    code, _, err = run(copy, f"{TINY[script]} --env-id families:Endless-v0", tmp_path)
    assert code == 2 and "steps; register it with max_episode_steps" in err and len(messages(err)) == 1, err


@each
@pytest.mark.parametrize("nan", [False, True])
def test_a_family_that_breaks_midway(script, nan, tmp_path):
    """Its own traceback, or a line that names the task that paid NaN; and the command that goes on from the checkpoint."""
    argv = f"--env-id families:Breaks-v0 --env-kwargs limit 900 nan {nan} --eval-every 1000 --total-timesteps 1000000"
    code, _, err = run(script, f"{TINY[script]} {argv}", tmp_path)
    [path] = tmp_path.glob("runs/*/checkpoint.pt")
    assert f"--resume {path.relative_to(tmp_path)}" in err
    assert all(torch.isfinite(value).all() for value in load(path.parent)["agent"].values())
    if nan:
        culprit = (tmp_path / "culprit").read_text()
        assert code == 2 and len(messages(err)) == 2 and f"task {culprit}: a reward" in err, err
    else:
        assert code == 1 and "RuntimeError: the simulator broke" in err


@each
def test_a_family_that_breaks_in_one_of_two_processes(script, tmp_path):
    argv = "--env-id families:Breaks-v0 --env-kwargs limit 900 nan True rank 1 --total-timesteps 1000000"
    codes, errs = torchrun(script, f"{TINY[script]} {argv}", tmp_path)
    lines = [line for err in errs for line in messages(err)]
    assert 0 not in codes and len(lines) == 2 and "--resume" in lines[0] and "not finite" in lines[1], (codes, errs)


@each
def test_units_are_those_of_the_family(script, tmp_path):
    """Rewards 1024 times smaller lead to the same agent, in that unit (nearly so in the meta actor-critic, whose untrained
    learner reads them). Observations 1024 times smaller have a unit of their size, not 0.1 or, in MAML, 1."""
    argv = "--env-id families:Small-v0 --total-timesteps 1000 --eval-tasks 2 --env-kwargs"
    flags = ("", f"reward {2**-10}", f"obs {2**-10}")
    agent, small_rewards, small_obs = (load(train(script, f"{argv} {flag}", tmp_path))["agent"] for flag in flags)
    assert 0.3 < 2**10 * small_obs["obs_std"] / agent["obs_std"] < (10 if script == "mrl_maml" else 3)
    for name, x in agent.items() if script != "mrl_actor_critic" else [("reward_scale", agent["reward_scale"])]:
        unit = 2**10 if name in ("reward_scale", "return_mean", "return_std") else 1
        torch.testing.assert_close(unit * small_rewards[name], x, atol=1e-3, rtol=1e-2, msg=name)


@each
def test_training_and_heldout_tasks_are_disjoint(script, tmp_path):
    """Trap 11: with fixed training tasks, and with fresh ones. A copy of the script prints which are which."""
    spy, place = tmp_path / "spy.py", "        rollout_time, start ="
    changed(script, spy, (place, f"        print('TRAIN', *tasks)\n{place}"))
    spy.write_text(spy.read_text() + "    print('HELDOUT', *heldout_tasks)\n")
    for flag in ("--num-train-tasks 3", ""):
        argv = f"{TINY[script]} --env-id families:Breaks-v0 --eval-tasks 4 --total-timesteps 400 --eval-every 100 {flag}"
        code, out, err = run(spy, argv, tmp_path)
        assert code == 0, err
        *training, heldout = [line.split()[1:] for line in out.splitlines() if line.startswith(("TRAIN ", "HELDOUT "))]
        training = {task for tasks in training for task in tasks}
        assert len(set(heldout)) == 4 and not set(heldout) & training
        assert len(training) == 3 if flag else len(training) > 12


@each
def test_logged_returns_equal_a_sum_by_hand(script, tmp_path):
    """Trap 14: the returns in the event file are those that the environment counted itself."""
    run_dir = train(script, "--env-id families:Breaks-v0 --total-timesteps 1 --eval-tasks 2", tmp_path)
    diary = [float(line) for line in (tmp_path / "diary").read_text().splitlines()]
    diary = diary[32 * (1 if script == "mrl_maml" else 2) :]  # after the untrained agent's 32 trials
    for i, phase in enumerate(("pre", "post")):  # the episodes of all sub-environments end together
        logged = scalars(run_dir)[f"charts/{phase}_adaptation_return"][0][1]
        np.testing.assert_allclose(logged, np.mean(diary[8 * i : 8 * i + 8]), rtol=1e-5)


class Reused(gym.vector.VectorEnv):
    """Returns its own arrays, changes them at a reset, the mask too, and says nonsense of those that go on."""

    single_action_space, num_envs = gym.spaces.Discrete(2), 3
    obs, rewards, terminated = np.zeros((3, 1)), np.zeros(3), np.zeros(3, dtype=bool)

    def step(self, actions):
        self.obs[:], self.rewards[:], self.terminated[:] = 5, (1, 2, 3), (True, False, False)
        return self.obs, self.rewards, self.terminated, np.array([False, False, True]), {}

    def reset(self, *, seed=None, options=None):
        self.obs[:], self.rewards[:], self.terminated[:] = np.where(options["reset_mask"], -1, 77)[:, None], 0, False
        options["reset_mask"][:] = False
        return self.obs, {}


@each
def test_what_a_family_returned_stays(script):
    step_envs = importlib.import_module(script).step_envs
    next_obs, obs, rewards, terminated, dones = step_envs(Reused(), torch.zeros(3, dtype=int), [0] * 3, 0)
    assert next_obs.tolist() == [[-1], [5], [-1]] and obs.tolist() == [[5]] * 3 and rewards.tolist() == [1, 2, 3]
    assert terminated.tolist() == [True, False, False] and dones.tolist() == [True, False, True]
