"""Each script as its user runs it: train, stop, resume, evaluate, bad input, several processes."""

import multiprocessing
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it, which takes seconds: children that are forked then have it
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SMALL = {  # settings of a few hundredths of a second an iteration, and their steps an iteration
    "mrl_rl2": ("--env-id Bandit-v0 --env-kwargs k 2 n 4 --num-tasks 8 --hidden-size 8 --num-minibatches 2", 32),
    "mrl_maml": (
        "--env-id mrl_rl2:TabularMDP-v0 --env-kwargs n 2 --num-tasks 4 --num-episodes 2 --adapt-steps 1 --hidden-size 8",
        160,
    ),
    "mrl_actor_critic": ("--env-id TabularMDP-v0 --env-kwargs n 2 --num-tasks 4 --num-explorations 2 --hidden-size 8", 160),
}
COMMON = "--no-anneal-lr --eval-every 2 --eval-tasks 5 --checkpoint-every 1 --runs-dir runs --torch-threads 1"
both = pytest.mark.parametrize("script", list(SMALL))
torch.set_num_threads(1)  # children are forked, so no thread pool may exist before


def child(script, argv, folder, file_size):
    """Runs the script as `python script argv` in `folder` does, inside a forked process, which saves importing torch."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [f"{script}.py", *argv]
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.path.insert(0, str(folder))
    code = 0
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as end:  # as the interpreter treats it: a text is printed, and means 1
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if isinstance(end.code, str) else "", end="", file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(script, argv, folder, file_size=resource.RLIM_INFINITY):
    process = multiprocessing.get_context("fork").Process(target=child, args=(script, argv.split(), folder, file_size))
    process.start()
    return process


def run(script, argv, folder, file_size=resource.RLIM_INFINITY):
    """Exit code, stdout and stderr of a run, which may write files of some size only."""
    process = start(script, argv, folder, file_size)
    process.join()
    return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def train(script, folder, iterations, more=""):
    """Trains for some iterations and returns the run's folder."""
    flags, steps = SMALL[script]
    folder.mkdir(exist_ok=True)
    code, _, err = run(script, f"{flags} {COMMON} --total-timesteps {iterations * steps} {more}", folder)
    assert code == 0, err
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def equal(a, b, close=lambda x, y: torch.equal(x, y)):
    """Whether two nested structures hold the same tensors and values."""
    if isinstance(a, torch.Tensor):
        return close(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k], close) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y, close) for x, y in zip(a, b, strict=True))
    return a == b


def scalars(run_dir):
    """All scalars that TensorBoard's own reader finds, clocks apart."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/") and tag != "charts/SPS"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_same_run(one, two):
    a, b = checkpoint(one), checkpoint(two)
    for key in ("agent", "optimizer", "iteration", "global_step", "eval_rows"):
        assert equal(a[key], b[key]), key
    assert (one / "eval.csv").read_bytes() == (two / "eval.csv").read_bytes()
    assert scalars(one) == scalars(two)


@both
def test_what_a_run_leaves_behind(script, tmp_path):
    run_dir = train(script, tmp_path, 4)
    assert sorted(p.name.split(".")[0] for p in run_dir.iterdir()) == ["checkpoint", "eval", "events"]
    header, *rows = (run_dir / "eval.csv").read_text().splitlines()
    assert header == "global_step,split,adaptation,mean_return,stderr,num_tasks"
    rows = [row.split(",") for row in rows]
    assert {row[1] for row in rows} == {"heldout", "train"} and len(rows) == len({tuple(row[:3]) for row in rows})
    tags = scalars(run_dir).keys() | {"charts/SPS", "time/rollout", "time/update"}
    losses = {"policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance", "meta_grad_norm"}
    assert tags >= {f"losses/{name}" for name in losses}
    assert tags >= {"charts/pre_adaptation_return", "charts/post_adaptation_return", "charts/learning_rate"}
    assert tags >= {f"eval/{split}_return_after_{rows[0][2]}" for split in ("heldout", "train")} | {"eval/generalization_gap"}
    out = (tmp_path / "stdout").read_text()
    for row in rows[-2 * len(rows) // 4 :]:
        if row[1] == "heldout":
            assert f"{float(row[3]):.3f} ± {float(row[4]):.3f}" in out


@both
def test_same_seed_same_numbers(script, tmp_path):
    one, two = train(script, tmp_path / "one", 3), train(script, tmp_path / "two", 3)
    assert_same_run(one, two)
    other = train(script, tmp_path / "other", 3, "--seed 2")
    assert not equal(checkpoint(one)["agent"], checkpoint(other)["agent"])
    threads = train(script, tmp_path / "threads", 3, "--torch-threads 2")
    rounding = lambda x, y: torch.allclose(x, y, rtol=1e-3, atol=1e-4)  # noqa: E731
    assert equal(checkpoint(one)["agent"], checkpoint(threads)["agent"], rounding)


@both
def test_resumed_run_equals_the_run_never_stopped(script, tmp_path):
    steps = SMALL[script][1]
    whole, parts = train(script, tmp_path / "whole", 8), train(script, tmp_path / "parts", 4)
    code, _, err = run(script, f"--resume {parts}/checkpoint.pt --total-timesteps {8 * steps}", tmp_path / "parts")
    assert code == 0, err
    assert_same_run(whole, parts)


@both
def test_killed_at_random_twenty_times(script, tmp_path):
    """SIGKILL at any moment leaves a checkpoint that can be read; the end of it all equals the run never killed."""
    flags, steps = SMALL[script]
    whole = train(script, tmp_path / "whole", 150, "--eval-every 20")
    folder, rng, kills = tmp_path / "killed", random.Random(0), 0
    folder.mkdir()
    argv = f"{flags} {COMMON} --eval-every 20 --total-timesteps {150 * steps}"
    while kills < 20:
        paths = list(folder.glob("runs/*/checkpoint.pt"))
        process = start(script, f"--resume {paths[0]}" if paths else argv, folder)
        process.join(0.3 + 0.7 * rng.random())
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "stderr").read_text()
        for path in folder.glob("runs/*/checkpoint.pt"):
            torch.load(path, weights_only=True)
        for path in folder.glob("runs/*/eval.csv"):
            rows = [tuple(line.split(",")[:3]) for line in path.read_text().splitlines()]
            assert len(rows) == len(set(rows))
        paths = list(folder.glob("runs/*/checkpoint.pt"))
        if process.exitcode == 0:  # it got to its end: check, and begin again
            assert_same_run(whole, paths[0].parent)
        if process.exitcode == 0 or not paths:
            shutil.rmtree(folder / "runs", ignore_errors=True)
    if paths and checkpoint(paths[0].parent)["iteration"] < 150:
        code, _, err = run(script, f"--resume {paths[0]}", folder)
        assert code == 0, err
        assert_same_run(whole, paths[0].parent)


@both
def test_finished_run_wants_more_steps_to_go_on(script, tmp_path):
    run_dir = train(script, tmp_path, 1)
    code, _, err = run(script, f"--resume {run_dir}/checkpoint.pt", tmp_path)
    assert code == 2 and f"--total-timesteps {SMALL[script][1]}" in err and len(err.strip().splitlines()) == 1


@both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_says_how_to_go_on(script, number, tmp_path):
    flags, _ = SMALL[script]
    process = start(script, f"{flags} {COMMON} --checkpoint-every 1000000 --total-timesteps 100000000", tmp_path)
    deadline = time.time() + 60
    while time.time() < deadline and "post=" not in (
        (tmp_path / "stderr").read_text() if (tmp_path / "stderr").exists() else ""
    ):
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    line = (tmp_path / "stdout").read_text().splitlines()[-1]
    assert line.endswith(f"--resume {path.relative_to(tmp_path)}")
    saved = torch.load(path, weights_only=True)
    code, _, err = run(script, f"--resume {path} --total-timesteps {saved['global_step'] + 1}", tmp_path)
    assert code == 0, err
    assert torch.load(path, weights_only=True)["iteration"] == saved["iteration"] + 1


@both
def test_evaluate_plays_as_the_trained_agent_did(script, tmp_path):
    """Trap 13: save, load, evaluate gives the closing table of the training to the last digit; flags beside it win."""
    run_dir = train(script, tmp_path, 2)
    table = (tmp_path / "stdout").read_text().split("\n\n")[0]
    trained_rows = [row for row in (run_dir / "eval.csv").read_text().splitlines() if "heldout" in row]
    code, out, err = run(script, f"--evaluate {run_dir}/checkpoint.pt --runs-dir evaluated", tmp_path)
    assert code == 0, err
    assert out.strip() == table.strip()
    (evaluated,) = (tmp_path / "evaluated").iterdir()
    assert (evaluated / "eval.csv").read_text().splitlines()[1:] == trained_rows[-len(trained_rows) // 1 :]
    code, out, _ = run(script, f"--evaluate {run_dir}/checkpoint.pt --runs-dir more --eval-tasks 7 --seed 5", tmp_path)
    assert code == 0 and "7 held-out tasks" in out


BAD_FLAGS = [
    ("--total-timesteps 0", "--total-timesteps 0"),
    ("--num-tasks -3", "--num-tasks -3"),
    ("--eval-tasks 0", "--eval-tasks 0"),
    ("--learning-rate nan", "--learning-rate nan"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999"),
    ("--device gpu", "--device gpu"),
    ("--env-kwargs arms 5", "arms"),
    ("--env-id CartPoll-v1 --env-kwargs", "Did you mean: `CartPole`"),
    ("--env-id CartPole-v1 --env-kwargs", "sample_tasks"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--evaluate nowhere.pt", "nowhere.pt"),
]


@both
@pytest.mark.parametrize("flags, named", BAD_FLAGS)
def test_bad_input_is_one_line_and_nothing_created(script, flags, named, tmp_path):
    code, out, err = run(script, f"{SMALL[script][0]} {flags} --runs-dir runs", tmp_path)
    assert code == 2 and out == "", err
    assert named in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


DICTIONARY = """
import gymnasium as gym

class Dictionary(gym.Env):
    observation_space, action_space = gym.spaces.Dict(place=gym.spaces.Discrete(3)), gym.spaces.Discrete(2)

    def sample_tasks(self, num_tasks, rng):
        return [None] * num_tasks

gym.register("Dictionary-v0", entry_point=Dictionary)
"""
FROM_ONE = DICTIONARY.replace("gym.spaces.Dict(place=gym.spaces.Discrete(3))", "gym.spaces.Box(0, 1, (1,))")
FROM_ONE = FROM_ONE.replace("gym.spaces.Discrete(2)", "gym.spaces.Discrete(2, start=1)")
BAD_PLACES = [  # a file, flags, what the message names
    ("my_tasks.py", DICTIONARY, "--env-id my_tasks:Dictionary-v0", "observations are Dict"),
    ("my_tasks.py", FROM_ONE, "--env-id my_tasks:Dictionary-v0", "actions are Discrete(2, start=1)"),
    ("my_tasks.py", "import nothing_of_this_name", "--env-id my_tasks:Tasks-v0", "nothing_of_this_name"),
    ("mujoco.py", "raise ImportError", "--env-id mrl_maml:AntDir-v0", 'pip install "gymnasium[mujoco]"'),
    ("moviepy.py", "raise ImportError('no moviepy')", "--env-id mrl_rl2:GridNavi-v0 --capture-video", "install moviepy"),
]


@both
@pytest.mark.parametrize("file, text, flags, named", BAD_PLACES)
def test_bad_environment_is_one_line_and_nothing_created(script, file, text, flags, named, tmp_path):
    (tmp_path / file).write_text(text)
    code, out, err = run(script, f"{flags} --runs-dir runs", tmp_path)
    assert code == 2 and out == "" and named in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["mrl_rl2", "mrl_actor_critic"])
def test_minibatches_that_do_not_divide(script, tmp_path):
    code, _, err = run(script, f"{SMALL[script][0]} --num-minibatches 3 --runs-dir runs", tmp_path)
    assert code == 2 and "--num-minibatches 3" in err and "divisor" in err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", ["--gamma 1", "--no-meta-policy --no-meta-value --no-meta-action-selection"])
def test_actor_critic_that_cannot_learn(flags, tmp_path):
    code, _, err = run("mrl_actor_critic", f"{SMALL['mrl_actor_critic'][0]} {flags} --runs-dir runs", tmp_path)
    assert code == 2 and len(err.strip().splitlines()) == 1 and flags.split()[0][5:] in err, err
    assert not (tmp_path / "runs").exists()


def test_arguments_of_the_family_beside_a_checkpoint_win(tmp_path):
    """Bandits of 4 pulls in training, of 6 in the evaluation, with the number of arms left as it was."""
    run_dir = train("mrl_rl2", tmp_path, 1)
    code, out, err = run("mrl_rl2", f"--evaluate {run_dir}/checkpoint.pt --env-kwargs n 6 --runs-dir evaluated", tmp_path)
    assert code == 0 and "episode 6" in out and "episode 7" not in out, err


@both
def test_a_single_training_task_has_a_standard_error_of_zero(script, tmp_path):
    rows = (train(script, tmp_path, 1, "--num-train-tasks 1") / "eval.csv").read_text()
    assert ",train," in rows and "nan" not in rows


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@both
def test_bad_checkpoints(script, tmp_path):
    run_dir = train(script, tmp_path, 1)
    whole, saved = (run_dir / "checkpoint.pt").read_bytes(), checkpoint(run_dir)
    weight = next(name for name, value in saved["agent"].items() if value.ndim == 2)
    bad = {
        "truncated": whole[: len(whole) // 2],
        "foreign": b"hello",
        "attack": pickle.dumps(Attack()),
        "other_script": saved | {"script": "mrl_other"},
        "older": saved | {"args": {k: v for k, v in saved["args"].items() if k != "seed"}},
        "tampered": saved | {"args": saved["args"] | {"num_tasks": "many"}},
        "incomplete": {k: v for k, v in saved.items() if k != "optimizer"},
        "shape": saved | {"agent": saved["agent"] | {weight: torch.zeros(3, 3)}},
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        for flag in ("--resume", "--evaluate"):
            code, out, err = run(script, f"{flag} {path} --runs-dir none", tmp_path)
            assert code == 2 and len(err.strip().splitlines()) == 1 and str(path) in err, (name, err)
            assert not (tmp_path / "none").exists() and not (tmp_path / "attacked").exists()
        if name == "shape":
            assert str(tuple(saved["agent"][weight].shape)) in err and "(3, 3)" in err


@both
def test_folder_that_cannot_be_written(script, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, _, err = run(script, f"{SMALL[script][0]} {COMMON} --runs-dir file/runs", tmp_path)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "--runs-dir file/runs" in err


@both
def test_full_disk_is_one_line_and_the_checkpoint_before_it_stays(script, tmp_path):
    run_dir = train(script, tmp_path, 2)
    before = (run_dir / "checkpoint.pt").read_bytes()
    argv = f"--resume {run_dir}/checkpoint.pt --total-timesteps 100000000 --checkpoint-every 1"
    code, _, err = run(script, argv, tmp_path, file_size=len(before) - 1)  # no file may grow to a checkpoint's size
    assert code == 2 and "--runs-dir" in err.strip().splitlines()[-1] and "Traceback" not in err, err
    assert (run_dir / "checkpoint.pt").read_bytes() == before and not list(run_dir.glob("*.tmp"))


DIARY = '''
import gymnasium as gym
import numpy as np

class Diary(gym.Env):
    """Writes each reward down; after `limit` steps of all, it returns NaN."""
    steps, task = 0, None

    def __init__(self, limit=10**9, scale=1.0):
        self.observation_space, self.action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(2)
        self.limit, self.scale = limit, scale

    def sample_tasks(self, num_tasks, rng):
        return rng.normal(size=num_tasks)  # an array: any sequence will do

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.rewards = []
        return np.array([0, 1], dtype=np.float32), {}

    def step(self, action):
        Diary.steps += 1
        self.rewards.append(self.scale * (self.task * action + 1))
        if len(self.rewards) == 3:
            with open("diary", "a") as file:
                file.write(f"{sum(self.rewards)}\\n")
        reward = self.rewards[-1] if Diary.steps < self.limit else float("nan")
        if Diary.steps == self.limit:
            with open("culprit", "w") as file:
                file.write(str(self.task))
        return np.array([len(self.rewards), 1], dtype=np.float32), reward, False, False, {}

gym.register("Diary-v0", entry_point=Diary, max_episode_steps=3)
'''


@both
def test_logged_returns_equal_a_sum_by_hand(script, tmp_path):
    """Trap 14: returns are logged under gymnasium 1.x, and they are those that the environment counted itself."""
    (tmp_path / "my_tasks.py").write_text(DIARY)
    flags = SMALL[script][0].split("--env-kwargs")[1].split("--", 1)[1]
    argv = f"--{flags} --env-id my_tasks:Diary-v0 --total-timesteps 1 --runs-dir runs --eval-tasks 2"
    code, _, err = run(script, argv, tmp_path)
    assert code == 0, err
    diary = [float(line) for line in (tmp_path / "diary").read_text().splitlines()]
    (run_dir,) = (tmp_path / "runs").iterdir()
    logged = scalars(run_dir)
    phases = ["charts/pre_adaptation_return", "charts/post_adaptation_return"]
    for i, phase in enumerate(phases):  # the episodes of a batch, which end together; then those of the next batch
        np.testing.assert_allclose(logged[phase][0][1], np.mean(diary[8 * i : 8 * i + 8]), rtol=1e-5)


@both
def test_not_a_number_stops_before_the_update(script, tmp_path):
    (tmp_path / "my_tasks.py").write_text(DIARY)
    flags = SMALL[script][0].split("--env-kwargs")[1].split("--", 1)[1]
    argv = f"--{flags} --env-id my_tasks:Diary-v0 --total-timesteps 1000000 --checkpoint-every 1 --eval-every 1000"
    code, _, err = run(script, f"{argv} --env-kwargs limit 2000 --runs-dir runs", tmp_path)
    last = err.strip().splitlines()[-1]
    assert code == 1 and "not finite" in last and "--resume" in last and "Traceback" not in err, err
    assert f"({(tmp_path / 'culprit').read_text():.60})" in last and " in step " in last
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved["agent"].values())
    assert f"iteration {saved['iteration'] + 1}:" in last
    code, _, err = run(script, f"{argv} --env-kwargs scale 1e39 --runs-dir huge", tmp_path)  # too large for float32
    assert code == 1 and "not finite" in err.strip().splitlines()[-1] and "Traceback" not in err, err
    assert not list(tmp_path.glob("huge/*/checkpoint.pt"))


def torchrun(script, argv, folder, num):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num}", "--standalone", ROOT / f"{script}.py"]
    return subprocess.Popen([*command, *argv.split()], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@both
def test_two_processes_equal_one(script, tmp_path):
    """The tasks of the meta-batch split over two processes give the same weights after 3 iterations, in float64."""
    one = train(script, tmp_path / "one", 3, "--dtype float64")
    (tmp_path / "two").mkdir()
    flags, steps = SMALL[script]
    process = torchrun(script, f"{flags} {COMMON} --dtype float64 --total-timesteps {3 * steps}", tmp_path / "two", 2)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    (two,) = (tmp_path / "two" / "runs").iterdir()
    close = lambda x, y: torch.allclose(x, y, rtol=0, atol=1e-6)  # noqa: E731
    assert equal(checkpoint(one)["agent"], checkpoint(two)["agent"], close)
    assert len(list(two.glob("events*"))) == 1
    first, second = scalars(one), scalars(two)  # what is logged is of all tasks, not of one process's share
    assert first.keys() == second.keys()
    for tag in first:
        np.testing.assert_allclose(first[tag], second[tag], rtol=1e-4, atol=1e-4, err_msg=tag)


@both
def test_tasks_that_do_not_divide_over_the_processes(script, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(script, f"{SMALL[script][0]} --num-tasks 7 --runs-dir runs", tmp_path)
    assert code == 2 and "--num-tasks 7" in err and "2 processes" in err and not (tmp_path / "runs").exists()


@both
def test_killed_worker_ends_the_run_and_leaves_the_checkpoint(script, tmp_path):
    flags, _ = SMALL[script]
    process = torchrun(script, f"{flags} {COMMON} --total-timesteps 100000000", tmp_path, 2)
    deadline = time.time() + 120
    while time.time() < deadline and not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    torch.load(path, weights_only=True)


@both
def test_script_runs_alone_in_an_empty_folder(script, tmp_path):
    """On its own default family."""
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    flags = "--num-tasks" + SMALL[script][0].split("--num-tasks")[1]
    command = [sys.executable, f"{script}.py", *flags.split(), *COMMON.split(), "--total-timesteps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@both
def test_task_family_of_the_readme_runs(script, tmp_path):
    """The very text of the README: a single environment with discrete actions, early ends and a time limit."""
    (tmp_path / "my_tasks.py").write_text((ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0])
    flags = SMALL[script][0].split("--env-kwargs")[1].split("--", 1)[1]
    argv = f"--{flags} --env-id my_tasks:CartPoleTasks-v0 --total-timesteps 500 --eval-tasks 3"
    code, _, err = run(script, argv, tmp_path)
    assert code == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert all(1 <= value <= 200 for _, value in scalars(run_dir)["charts/pre_adaptation_return"])
