"""Each script as its user runs it: train, stop, resume, evaluate, bad input, several processes."""

import importlib
import io
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it, which takes seconds: children that are forked then have it
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
TINY = {  # algorithm's settings of a few hundredths of a second an iteration
    "mrl_rl2": "--num-tasks 8 --hidden-size 8 --num-minibatches 2",
    "mrl_maml": "--num-tasks 4 --num-episodes 2 --adapt-steps 1 --hidden-size 8",
    "mrl_actor_critic": "--num-tasks 8 --hidden-size 8 --num-features 4 --num-minibatches 2",
}
ARMS = "--env-id mrl_rl2:Bandit-v0 --env-kwargs k 2 n 4 --eval-every 5 --eval-tasks 5"
STEPS = {"mrl_rl2": 32, "mrl_maml": 16, "mrl_actor_critic": 32}  # of an iteration on ARMS
both = pytest.mark.parametrize("script", TINY)
torch.set_num_threads(1)  # children are forked, so no thread pool may exist before


def child(path, argv, folder, env, encoding, stdout):
    """Runs the script as `python path argv` in `folder` does, inside a forked process, which saves importing torch."""
    os.chdir(folder)
    os.environ.update(env)
    sys.argv, sys.path[0:0] = [str(path), *shlex.split(argv)], [str(Path(path).parent)]
    name = env.get("RANK", "")
    stderr = os.open(f"stderr{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stdout or os.open(f"stdout{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w"), encoding, write_through=True) for fd in (1, 2))
    leave, code = os._exit, 0

    def keep_weights(code):  # the second process leaves by os._exit: the weights that it holds are wanted
        torch.save(sys._getframe(1).f_globals["agent"].state_dict(), f"agent{name}.pt")
        leave(code)

    os._exit = keep_weights
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def start(script, argv, folder, env=None, encoding="utf-8", stdout=None):
    """`script` is the name of one, or the path of a copy."""
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    process = multiprocessing.get_context("fork").Process(target=child, args=(path, argv, folder, env or {}, encoding, stdout))
    process.start()
    return process


def run(script, argv, folder, **kwargs):
    """Exit code, stdout and stderr of a run."""
    folder.mkdir(exist_ok=True)
    process = start(script, argv, folder, **kwargs)
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{script} {argv} hangs")
    return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def train(script, argv, folder, **kwargs):
    """Trains in `folder` and returns the run's folder there."""
    code, _, err = run(script, f"{TINY[script]} {argv}", folder, **kwargs)
    assert code == 0 and "Traceback" not in err, err
    return max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)


def messages(err):
    """The lines of stderr without the progress bar."""
    return [line for line in re.split(r"[\r\n]+", err) if line.strip() and not re.match(r" *\d+%\||.* steps/s", line)]


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def equal(a, b):
    """Whether two nested structures hold the same tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def scalars(run_dir):
    """All scalars that TensorBoard's own reader finds, clocks apart."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/") and tag != "charts/SPS"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def results(run_dir, split="heldout"):
    """[adaptation, mean_return, stderr, num_tasks] of the rows of eval.csv of the last evaluation."""
    header, *rows = (run_dir / "eval.csv").read_text().splitlines()
    assert header == "global_step,split,adaptation,mean_return,stderr,num_tasks"
    rows = [row.split(",") for row in rows]
    return [row[2:] for row in rows if row[0] == rows[-1][0] and row[1] == split]


@pytest.fixture(autouse=True)
def families(tmp_path):
    shutil.copy(ROOT / "tests/odd_families.py", tmp_path / "families.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs of 20 iterations on bandits that several tests look at, each made once: a function of the script's name."""
    made = {}

    def get(script):
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            made[script] = train(script, f"{ARMS} --total-timesteps {20 * STEPS[script]}", folder)
        return made[script]

    return get


@both
def test_what_a_run_leaves_behind(script, trained):
    run_dir = trained(script)
    assert sorted(p.name.split(".")[0] for p in run_dir.iterdir()) == ["args", "checkpoint", "eval", "events"]
    names = [row[0] for row in results(run_dir)]
    logged = scalars(run_dir)
    losses = {"policy_loss", "entropy", "approx_kl", "clipfrac", "explained_variance", "meta_grad_norm"}
    tags = {f"losses/{name}" for name in losses} | {"eval/generalization_gap"}
    tags |= {f"charts/{name}" for name in ("pre_adaptation_return", "post_adaptation_return", "learning_rate")}
    tags |= {f"eval/{split}_return_after_{name}" for split in ("heldout", "train") for name in names}
    assert logged.keys() >= tags, tags - logged.keys()
    assert all(np.isfinite(value) for series in logged.values() for _, value in series)
    assert [step for step, _ in logged["losses/entropy"]] == [STEPS[script] * i for i in range(1, 21)]
    assert len(logged["eval/generalization_gap"]) == 4
    factors = {"mrl_rl2": [1], "mrl_maml": [1, 10], "mrl_actor_critic": [1, 5]}[script]  # parts that learn faster
    rates = [group["lr"] for group in checkpoint(run_dir)["optimizer"]["param_groups"]]
    assert rates == pytest.approx([factor * logged["charts/learning_rate"][-1][1] for factor in factors])
    table = (run_dir.parents[1] / "stdout").read_text()
    for name, mean, stderr, _ in results(run_dir):
        assert f"{name:>12} {float(mean):10.3f} ± {float(stderr):.3f}" in table
    line = r"^The return (.*): the last is (.*) above the first, (.*) standard errors\.$"
    [(verdict, gain, score)] = re.findall(line, table, flags=re.MULTILINE)
    assert verdict == ("rises" if float(score) > 3 else "falls" if float(score) < -3 else "stays level")
    means = [float(row[1]) for row in results(run_dir) if row[0] != "trial"]
    assert float(gain) == pytest.approx(means[-1] - means[0], abs=2e-3)


@both
def test_the_last_line_compares_two_episodes_or_is_absent(script, tmp_path):
    train(script, f"{ARMS} --env-kwargs n 1 --total-timesteps 1", tmp_path)
    text = (tmp_path / "stdout").read_text()
    assert "5 held-out tasks" in text and ("The return" in text) == (script == "mrl_maml")


@both
def test_evaluate_plays_as_the_trained_agent_did(script, trained, tmp_path):
    """Trap 13: save, load, evaluate equals the last evaluation of the training to the last digit, as often as one likes."""
    run_dir = trained(script)
    for _ in range(2):
        code, _, err = run(script, f"--evaluate {run_dir}/checkpoint.pt", tmp_path)
        assert code == 0, err
    evaluations = list((tmp_path / "runs").iterdir())
    assert len(evaluations) == 2 and all(path.name.startswith("evaluate__Bandit-v0__") for path in evaluations)
    assert results(evaluations[0]) == results(evaluations[1]) == results(run_dir)
    code, out, _ = run(script, f"--evaluate {run_dir}/checkpoint.pt --eval-tasks 7 --env-kwargs n 3", tmp_path)
    played = re.findall(r"^ +(\w+) .* ± ", out, flags=re.MULTILINE)  # all of a trial that is shorter than in the training
    assert code == 0 and "7 held-out tasks" in out and played == (["0", "1"] if script == "mrl_maml" else [*"123", "trial"])


def test_the_number_of_episodes_follows_the_family_evaluated(tmp_path):
    """MAML's default, 0, is kept as such, so that an agent evaluated on longer trials adapts on longer ones."""
    run_dir = train("mrl_maml", f"{ARMS} --num-episodes 0 --total-timesteps 1", tmp_path)
    assert checkpoint(run_dir)["args"]["num_episodes"] == 0 and checkpoint(run_dir)["global_step"] == 2 * STEPS["mrl_maml"]


@both
def test_killed_at_random_and_resumed_is_the_run_never_stopped(script, trained, tmp_path):
    """Bit for bit, after SIGKILL at any moment: weights, optimizer, files. No half-written file is ever seen, and events later
    than the checkpoint, as when killed between the two, are made void: here the one that was seen first is put back."""
    whole, rng, paths = trained(script), random.Random(), []
    argv = f"{TINY[script]} {ARMS} --total-timesteps {20 * STEPS[script]}"
    for kill in range(4):
        process, began = start(script, f"--resume {paths[0]}" if paths else argv, tmp_path), time.time()
        before = paths[0].stat().st_mtime_ns if paths else 0
        while process.is_alive() and time.time() < began + 60 and not (paths and paths[0].stat().st_mtime_ns > before):
            time.sleep(0.01)
            paths = list(tmp_path.glob("runs/*/checkpoint.pt"))
        seen = paths[0].read_bytes()
        process.join(0.3 * rng.random())
        if process.is_alive() and kill < 3:
            process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "stderr").read_text()
        torch.load(paths[0], weights_only=True)
        if process.exitcode == 0:
            break
        paths[0].write_bytes(seen)
    [run_dir] = (tmp_path / "runs").iterdir()
    assert equal(checkpoint(whole), checkpoint(run_dir))
    assert (whole / "eval.csv").read_bytes() == (run_dir / "eval.csv").read_bytes()
    assert scalars(whole) == scalars(run_dir)
    code, _, err = run(script, f"--resume {paths[0]}", tmp_path)  # there is nothing left to do
    assert code == 0 and equal(checkpoint(whole), checkpoint(run_dir))
    assert (whole / "eval.csv").read_bytes() == (run_dir / "eval.csv").read_bytes()
    copied = shutil.copy(paths[0], run_dir / "kept.pt")  # the run goes on in the file that is named
    code, _, err = run(script, f"--resume {copied} --total-timesteps {21 * STEPS[script]}", tmp_path)
    assert code == 0 and torch.load(copied, weights_only=True)["iteration"] == 21
    assert equal(checkpoint(whole), checkpoint(run_dir))


@both
def test_ctrl_c_prints_the_command_that_goes_on(script, tmp_path):
    """In a folder with a space; the line can be pasted."""
    argv = f"{TINY[script]} {ARMS} --total-timesteps 10000000 --runs-dir 'my runs'"
    process, deadline = start(script, argv, tmp_path), time.time() + 60
    while not list(tmp_path.glob("my runs/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    err = (tmp_path / "stderr").read_text()
    assert process.exitcode == -signal.SIGINT and "Traceback" not in err
    command = shlex.split(messages(err)[-1].removeprefix("to go on: "))
    [path] = tmp_path.glob("my runs/*/checkpoint.pt")
    assert command[:1] + command[2:] == ["python", "--resume", str(path.relative_to(tmp_path))] and Path(command[1]).exists()


@both
def test_ascii_terminal_closed_pipe_and_two_runs_at_once(script, tmp_path):
    argv = f"{ARMS} --total-timesteps 1"
    reader, writer = os.pipe()
    os.close(reader)
    piped = start(script, f"{TINY[script]} {argv}", tmp_path, stdout=writer)  # as with `| head -1`
    train(script, argv, tmp_path, encoding="ascii")
    piped.join(60)
    os.close(writer)
    assert piped.exitcode == -signal.SIGPIPE
    assert len(list((tmp_path / "runs").glob("*/checkpoint.pt"))) == 2
    assert run(script, "--help", tmp_path, encoding="ascii")[0] == 0


@both
def test_training_and_heldout_tasks_are_disjoint(script, tmp_path):
    """Trap 11: with fixed training tasks, and with fresh ones. A copy of the script prints which are which."""
    text = (ROOT / f"{script}.py").read_text() + "    print('HELDOUT', *heldout_tasks)\n"
    place = "        rollout_time, start ="
    assert place in text
    (tmp_path / "spy.py").write_text(text.replace(place, f"        print('TRAIN', *tasks)\n{place}", 1))
    for flag in ("--num-train-tasks 3", ""):
        argv = f"{TINY[script]} --env-id families:Breaks-v0 --eval-tasks 4 --total-timesteps 400 --eval-every 100 {flag}"
        code, out, err = run(tmp_path / "spy.py", argv, tmp_path)
        assert code == 0, err
        *training, heldout = [line.split()[1:] for line in out.splitlines() if line.startswith(("TRAIN ", "HELDOUT "))]
        training = {task for tasks in training for task in tasks}
        assert len(set(heldout)) == 4 and not set(heldout) & training
        assert len(training) == 3 if flag else len(training) > 12


@both
def test_logged_returns_equal_a_sum_by_hand(script, tmp_path):
    """Trap 14: the returns in the event file are those that the environment counted itself."""
    run_dir = train(script, "--env-id families:Breaks-v0 --total-timesteps 1 --eval-tasks 2", tmp_path)
    diary = [float(line) for line in (tmp_path / "diary").read_text().splitlines()]
    diary = diary[32 * (1 if script == "mrl_maml" else 2) :]  # after the untrained agent's 32 trials
    for i, phase in enumerate(("pre", "post")):  # the episodes of all sub-environments end together
        logged = scalars(run_dir)[f"charts/{phase}_adaptation_return"][0][1]
        np.testing.assert_allclose(logged, np.mean(diary[8 * i : 8 * i + 8]), rtol=1e-5)


GOOD = {  # flags, and what the held-out results must be
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


@both
@pytest.mark.parametrize("family", GOOD)
def test_unusual_families_run(script, family, tmp_path):
    (tmp_path / "families.py").rename(tmp_path / "test.py")  # a module of Python's own: the working folder goes first
    flags, right = GOOD[family]
    run_dir = train(script, f"--env-id test:{family} --total-timesteps 1 --eval-tasks 9 --num-train-tasks 1 {flags}", tmp_path)
    assert right(results(run_dir)) and {row[3] for row in results(run_dir)} == {"9"}
    assert {row[3] for row in results(run_dir, "train")} == {"9"}  # the one task is played as often
    assert all(np.isfinite(value) for series in scalars(run_dir).values() for _, value in series)


@pytest.mark.parametrize("script", ["mrl_rl2", "mrl_maml"])
def test_the_unit_of_the_rewards_does_not_matter(script, tmp_path):
    """Rewards that are 1024 times smaller lead to the same agent, in that unit."""
    argv = "--env-id families:Small-v0 --total-timesteps 1000 --eval-tasks 2 --env-kwargs scale"
    one, other = (checkpoint(train(script, f"{argv} {scale}", tmp_path))["agent"] for scale in (1.0, 2**-10))
    for name, x in one.items():
        unit = 2**10 if name in ("reward_scale", "return_mean", "return_std") else 1
        torch.testing.assert_close(unit * other[name], x, atol=1e-3, rtol=1e-2, msg=name)


BAD = [  # flags, and what the one line must name
    ("--total-timesteps 0", "--total-timesteps 0: give a number from 1"),
    ("--num-tasks -3", "--num-tasks -3: give a number from 0"),
    ("--eval-tasks 1", "--eval-tasks 1: give a number from 2"),
    ("--learning-rate nan", "--learning-rate nan: give a number"),
    ("--gamma 2", "--gamma 2.0: give a number from 0 to 1"),
    ("--torch-threads 0", "--torch-threads 0: give a number from 1"),
    ("--device cuda", "each process needs a GPU"),
    ("--env-kwargs arms 5", "arms"),
    ("--env-id CartPoll-v1 --env-kwargs", "Did you mean: `CartPole`"),
    ("--env-id CartPole-v1 --env-kwargs", "CartPole-v1: it has no `sample_tasks`"),
    ("--env-id nothing:Tasks-v0", "nothing"),
    ("--env-id ./families.py:Side-v0", "give families:Side-v0"),
    ("--env-id ../there/families:Side-v0", "give families:Side-v0"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--resume ''", "not a whole checkpoint"),
    ("--evaluate families.py", "families.py"),
    ("--env-id families:SetTask-v0", "SetTask-v0: it has no `task`"),
    ("--env-id families:Odd-v0 --env-kwargs what dict", "sample_tasks(5, rng) returned {'side'"),
    ("--env-id families:Odd-v0 --env-kwargs what few", "sample_tasks(5, rng) returned ["),
    ("--env-id families:Odd-v0 --env-kwargs what one", "sample_tasks(5, rng) returned"),
    ("--env-id families:Odd-v0 --env-kwargs what text", "sample_tasks(5, rng) returned 'aaaaa'"),
    ("--env-id families:Odd-v0 --env-kwargs what global", "must draw from rng alone"),
    ("--env-id families:Pool-v0", "must draw from rng alone"),
    ("--env-id families:Large-v0", "leave out Normalize wrappers"),
    ("--env-id families:Norm-v0", "leave out Normalize wrappers"),
    ("--env-id families:Auto-v0", "give AutoresetMode.DISABLED"),
    ("--env-id families:Picture-v0", "no attribute 'observation_space'"),
    ("--env-id families:Half-v0", "episodes_per_trial: give 1, 2, ..."),
    ("--env-id families:Needs-v0", "'size'"),
    ("--env-id families:Buttons-v0", "give Discrete or Box"),
    ("--env-id families:Words-v0", "a reward or observation is not finite"),
    ("--env-id families:Blind-v0", "a reward or observation is not finite"),
]


@both
def test_bad_input_is_one_line_and_nothing_created(script, tmp_path):
    for flags, named in BAD:
        argv = f"{TINY[script]} {'--eval-tasks 5' if '--env-id families' in flags else ARMS} {flags}"
        code, out, err = run(script, argv, tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
        assert code == 2 and out == "" and named in err and len(messages(err)) == 1, (flags, err)
        assert err.startswith(f"{script}.py: ") and not (tmp_path / "runs").exists(), (flags, err)


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


@both
def test_what_a_family_returned_stays(script):
    step_envs = importlib.import_module(script).step_envs
    next_obs, obs, rewards, terminated, dones = step_envs(Reused(), torch.zeros(3, dtype=int), [0] * 3, 0)
    assert next_obs.tolist() == [[-1], [5], [-1]] and obs.tolist() == [[5]] * 3 and rewards.tolist() == [1, 2, 3]
    assert terminated.tolist() == [True, False, False] and dones.tolist() == [True, False, True]


@both
def test_episodes_that_never_end(script, tmp_path):
    text = (ROOT / f"{script}.py").read_text()
    assert "step >= 20_000" in text
    (tmp_path / "impatient.py").write_text(text.replace("step >= 20_000", "step >= 200"))
    code, _, err = run(tmp_path / "impatient.py", f"{TINY[script]} --env-id families:Endless-v0", tmp_path)
    assert code == 2 and "steps; register it with max_episode_steps" in err and len(messages(err)) == 1, err


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@both
def test_bad_checkpoints(script, trained, tmp_path):
    whole = (trained(script) / "checkpoint.pt").read_bytes()
    for name, content in (("truncated", whole[: len(whole) // 2]), ("attack", pickle.dumps(Attack()))):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        code, out, err = run(script, f"--evaluate {path}", tmp_path)
        assert code == 2 and out == "" and str(path) in err and len(messages(err)) == 1, (name, err)
        assert not (tmp_path / "runs").exists() and not (tmp_path / "attacked").exists()
    others = [(other, "") for other in TINY if other != script]
    for other, flags in [(script, "--hidden-size 9"), (script, "--env-kwargs k 3"), *others]:
        code, out, err = run(script, f"--evaluate {trained(other)}/checkpoint.pt {flags}", tmp_path)
        assert code == 2 and out == "" and "no agent for these flags" in err, (other, flags, err)
        assert len(messages(err)) == (1 if other == script else 2) and not (tmp_path / "runs").exists()


@both
def test_changed_copy_reads_the_checkpoints_of_its_original(script, trained, tmp_path):
    """A renamed copy, with one flag more and one less: it plays alike, and says in a line what was ignored or left out."""
    text = (ROOT / f"{script}.py").read_text()
    text = text.replace("    learning_rate: float", "    my_flag: int = 3  # my own\n    learning_rate: float", 1)
    text = re.sub(r"    exp_name: str = .*\n", "", text).replace("{args.exp_name}", "mine")
    (tmp_path / "my_copy.py").write_text(text)
    code, _, err = run(tmp_path / "my_copy.py", f"--evaluate {trained(script)}/checkpoint.pt", tmp_path)
    assert code == 0 and "ignored: ['exp_name']; default: ['my_flag']" in messages(err)[0], err
    [run_dir] = (tmp_path / "runs").iterdir()
    assert results(run_dir) == results(trained(script))


@both
@pytest.mark.parametrize("nan", [False, True])
def test_a_family_that_breaks_midway(script, nan, tmp_path):
    """Its own traceback, or a line that names the task that paid NaN; and the command that goes on from the checkpoint."""
    argv = f"--env-id families:Breaks-v0 --env-kwargs limit 900 nan {nan} --eval-every 1000 --total-timesteps 1000000"
    code, _, err = run(script, f"{TINY[script]} {argv}", tmp_path)
    [path] = tmp_path.glob("runs/*/checkpoint.pt")
    assert f"--resume {path.relative_to(tmp_path)}" in err
    assert all(torch.isfinite(value).all() for value in checkpoint(path.parent)["agent"].values())
    if nan:
        culprit = (tmp_path / "culprit").read_text()
        assert code == 2 and len(messages(err)) == 2 and f"task {culprit}: a reward" in err, err
    else:
        assert code == 1 and "RuntimeError: the simulator broke" in err


# Several processes


def torchrun(script, argv, folder):
    """Two processes with the environment that torchrun gives them: their exit codes and the text that each wrote to stderr."""
    with socket.socket() as free:
        free.bind(("", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [start(script, argv, folder, env) for env in ranks]
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "hangs"
    return [process.exitcode for process in processes], [(folder / f"stderr{rank}").read_text() for rank in range(2)]


@both
def test_two_processes_hold_the_same_weights(script, tmp_path):
    for env, steps in ((ARMS, STEPS[script]), ("--env-id families:Ranks-v0 --eval-tasks 5", 80)):
        runs = f"runs of {steps}"
        argv = f"{TINY[script]} {env} --total-timesteps {3 * steps} --runs-dir '{runs}'"
        codes, errs = torchrun(script, argv, tmp_path)
        assert codes == [0, 0] and errs[1] == "", errs
        [run_dir] = (tmp_path / runs).iterdir()
        assert checkpoint(run_dir)["iteration"] == 3 and checkpoint(run_dir)["global_step"] == 3 * steps
        assert equal(checkpoint(run_dir)["agent"], torch.load(tmp_path / "agent1.pt", weights_only=True))


@both
def test_a_fault_in_one_process_is_one_line(script, tmp_path):
    argv = "--env-id families:Breaks-v0 --env-kwargs limit 900 nan True rank 1 --total-timesteps 1000000"
    codes, errs = torchrun(script, f"{TINY[script]} {argv}", tmp_path)
    lines = [line for err in errs for line in messages(err)]
    assert 0 not in codes and len(lines) == 2 and "--resume" in lines[0] and "not finite" in lines[1], (codes, errs)
    codes, errs = torchrun(script, f"{TINY[script]} {ARMS} --num-tasks 7", tmp_path)
    assert "--num-tasks 7: give a multiple of" in errs[0] and errs[0] == errs[1] and len(messages(errs[0])) == 1


def test_the_command_of_the_readme(tmp_path):
    """torchrun itself, with the script that starts fastest."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", ROOT / "mrl_rl2.py"]
    argv = f"{TINY['mrl_rl2']} {ARMS} --total-timesteps 1".split()
    done = subprocess.run([*command, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 1, done.stderr


AVERAGE = """
dist.init_process_group("gloo")
torch.manual_seed(0)
net, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)
(net(x[RANK::2]) - y[RANK::2]).square().mean().backward()
average(*(p.grad for p in net.parameters()))
averaged = [p.grad.clone() for p in net.parameters()]
net.zero_grad()
(net(x) - y).square().mean().backward()
for one, both in zip(averaged, net.parameters()):
    torch.testing.assert_close(one, both.grad)
"""


@both
def test_averaged_gradient_is_that_of_both_halves_together(script, tmp_path):
    text = (ROOT / f"{script}.py").read_text().split('if __name__ == "__main__":')[0]
    (tmp_path / "halves.py").write_text(text + AVERAGE)
    codes, errs = torchrun(tmp_path / "halves.py", "", tmp_path)
    assert codes == [0, 0], errs
