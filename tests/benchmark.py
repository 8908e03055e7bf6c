"""Trains, evaluates and times the three scripts. Results go to tests/results/, as CSV files.

    python tests/benchmark.py train rl2_grid_navi     # an agent of TRAININGS, several seeds; the median one is kept
    python tests/benchmark.py evaluate                # all agents of tests/results on many held-out tasks
    python tests/benchmark.py defaults                # three scripts by all families, with default flags
    python tests/benchmark.py cross_modal             # what is learned through one sense, used through the other
    python tests/benchmark.py uncertain               # random MDPs with more or less noise than in the training
    python tests/benchmark.py overfitting             # few training tasks, many, or always fresh ones
    python tests/benchmark.py ablation                # what single parts of the algorithms are worth
    python tests/benchmark.py speed                   # steps per second; `speed busy`: wall times on a busy machine
    python tests/benchmark.py cost                    # time and memory against tasks, episodes, steps and adaptation steps
    python tests/benchmark.py levels                  # steps and seconds of training until a level is reached
    python tests/benchmark.py size                    # lines and characters of code
    python tests/benchmark.py report                  # fills the tables of both READMEs from the CSV files alone

Trainings run in runs/benchmark/. Those that are finished there are not run again, so a killed benchmark can be restarted.
"""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import gymnasium as gym
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import mrl_actor_critic  # noqa: E402
import mrl_rl2  # noqa: E402

RESULTS, RUNS = ROOT / "tests/results", ROOT / "runs/benchmark"
SCRIPTS = {"mrl_rl2": "RL²", "mrl_maml": "MAML", "mrl_actor_critic": "meta actor-critic"}
FIVE, THREE = (1, 2, 3, 4, 5), (1, 2, 3)
Names, Seeds = tuple[str, ...], tuple[int, ...]

FAMILIES = {  # name, as in players.csv: script that is its home, flags, number of tasks on which stored agents are evaluated
    "Bandit k=5 n=10": ("mrl_rl2", "Bandit-v0 --env-kwargs k 5 n 10", 100_000),
    "Bandit k=5 n=100": ("mrl_rl2", "Bandit-v0 --env-kwargs k 5 n 100", 20_000),
    "TabularMDP n=10": ("mrl_actor_critic", "TabularMDP-v0", 4000),
    "GridNavi": ("mrl_rl2", "GridNavi-v0", 4000),
    "CrossModalGridNavi": ("mrl_rl2", "CrossModalGridNavi-v0", 4000),
    "SenseByRound": ("benchmark", "SenseByRound-v0", 4000),
    "PointNav": ("mrl_maml", "PointNav-v0", 1000),
    "SparsePointNav": ("mrl_maml", "SparsePointNav-v0", 1000),
    "CartPole": ("my_tasks", "CartPoleTasks-v0 --total-timesteps 1500000", 200),
    "HalfCheetahDir": ("mrl_maml", "HalfCheetahDir-v0 --total-timesteps 10000000", 100),
    "HalfCheetahVel": ("mrl_maml", "HalfCheetahVel-v0 --total-timesteps 10000000", 100),
    "AntDir": ("mrl_maml", "AntDir-v0 --total-timesteps 10000000", 100),
    "DarkRoom": ("dark_room", "DarkRoom-v0", 1000),
    "DarkKeyToDoor": ("dark_room", "DarkKeyToDoor-v0", 1000),
    "VariedPendulum": ("varied_pendulum", "VariedPendulum-v0", 200),
}
MATRIX = tuple(name for name in FAMILIES if name != "SenseByRound")[:9]
for k, n in itertools.product((5, 10, 50), (10, 100, 500)):  # the nine of Duan et al. 2016
    tasks = {10: 10_000, 100: 4000, 500: 1000}[n]  # since 50 arms take much memory
    FAMILIES.setdefault(f"Bandit k={k} n={n}", ("mrl_rl2", f"Bandit-v0 --env-kwargs k {k} n {n}", tasks))
for n in (25, 50, 75, 100):
    FAMILIES[f"TabularMDP n={n}"] = ("mrl_actor_critic", f"TabularMDP-v0 --env-kwargs n {n}", 1000)
ON_A_GPU = "--device cuda --hidden-size 256 --learning-rate 0.001"
LARGE_BATCH = "--num-tasks 2048 --gae-lambda 0.3 --total-timesteps 39526400"
SHORT = "--no-meta-policy --gae-lambda 1 --total-timesteps 500000"
TRAININGS = {  # name: script, family, flags beside those of the family, seeds, note
    "rl2_bandit_k5_n10": ("mrl_rl2", "Bandit k=5 n=10", "", FIVE, ""),
    "rl2_bandit_k5_n100": ("mrl_rl2", "Bandit k=5 n=100", "", FIVE, ""),
    "rl2_bandit_k10_n100": ("mrl_rl2", "Bandit k=10 n=100", "", (1,), ""),
    "rl2_grid_navi": ("mrl_rl2", "GridNavi", "", (*FIVE, 6, 7, 8, 9), "the default command"),
    "rl2_tabular_mdp_n10": ("mrl_rl2", "TabularMDP n=10", f"{ON_A_GPU} {LARGE_BATCH}", (1,), "on an H100"),
    "rl2_cross_modal": ("mrl_rl2", "CrossModalGridNavi", "", FIVE, ""),
    "rl2_cross_modal_apart": ("mrl_rl2", "CrossModalGridNavi", "--env-kwargs senses apart", FIVE, "never sees a switch"),
    "rl2_point_nav": ("mrl_rl2", "PointNav", "", FIVE, ""),
    "rl2_sparse_point_nav": ("mrl_rl2", "SparsePointNav", "", FIVE, ""),
    "rl2_dark_room": ("mrl_rl2", "DarkRoom", f"{ON_A_GPU} --num-tasks 1024 --total-timesteps 25000000", (1,), "on an H100"),
    "rl2_dark_key_to_door": ("mrl_rl2", "DarkKeyToDoor", "", THREE, ""),
    "rl2_varied_pendulum": ("mrl_rl2", "VariedPendulum", "", THREE, ""),
    "rl2_half_cheetah_dir": ("mrl_rl2", "HalfCheetahDir", "", THREE, ""),
    "maml_cross_modal": ("mrl_maml", "SenseByRound", "", THREE, ""),
    "maml_cross_modal_apart": ("mrl_maml", "SenseByRound", "--env-kwargs senses apart", THREE, "never sees a switch"),
    "maml_point_nav": ("mrl_maml", "PointNav", "", FIVE, "the default command"),
    "maml_point_nav_long": ("mrl_maml", "PointNav", "--gae-lambda 0.97 --total-timesteps 30000000", THREE, ""),
    "maml_tabular_mdp": ("mrl_maml", "TabularMDP n=10", "", FIVE, ""),
    "maml_sparse_point_nav": ("mrl_maml", "SparsePointNav", "", FIVE, ""),
    "maml_half_cheetah_dir": ("mrl_maml", "HalfCheetahDir", "", THREE, ""),
    "maml_half_cheetah_vel": ("mrl_maml", "HalfCheetahVel", "", THREE, ""),
    "maml_half_cheetah_vel_one_step": ("mrl_maml", "HalfCheetahVel", "--adapt-steps 1", THREE, ""),
    "maml_ant_dir": ("mrl_maml", "AntDir", "", THREE, ""),
    "actor_critic_bandit_k5_n10": ("mrl_actor_critic", "Bandit k=5 n=10", "", FIVE, ""),
    "actor_critic_bandit_k5_n100": ("mrl_actor_critic", "Bandit k=5 n=100", "", FIVE, ""),
    "actor_critic_bandit_k10_n100": ("mrl_actor_critic", "Bandit k=10 n=100", "", (1,), ""),
    "actor_critic_bandit_k50_n100": ("mrl_actor_critic", "Bandit k=50 n=100", "", (1,), ""),
    "actor_critic_tabular_mdp": ("mrl_actor_critic", "TabularMDP n=10", SHORT, FIVE, ""),
    "actor_critic_grid_navi": ("mrl_actor_critic", "GridNavi", "", FIVE, ""),
    "actor_critic_cross_modal": ("mrl_actor_critic", "CrossModalGridNavi", "", FIVE, ""),
    "actor_critic_point_nav": ("mrl_actor_critic", "PointNav", "", FIVE, ""),
    "actor_critic_sparse_point_nav": ("mrl_actor_critic", "SparsePointNav", "", FIVE, ""),
    "actor_critic_half_cheetah_dir": ("mrl_actor_critic", "HalfCheetahDir", "", THREE, ""),
}
LONGER = {  # agents that are evaluated in longer trials than those of their training, too
    "rl2_tabular_mdp_n10": ("TabularMDP n=25", "TabularMDP n=50", "TabularMDP n=75", "TabularMDP n=100"),
    "actor_critic_tabular_mdp": ("TabularMDP n=25", "TabularMDP n=50", "TabularMDP n=75", "TabularMDP n=100"),
    "rl2_bandit_k5_n100": ("Bandit k=5 n=500",),
    "rl2_bandit_k10_n100": ("Bandit k=10 n=500",),
    "actor_critic_bandit_k5_n100": ("Bandit k=5 n=500",),
    "actor_critic_bandit_k10_n100": ("Bandit k=10 n=500",),
    "actor_critic_bandit_k50_n100": ("Bandit k=50 n=500",),
}

NO_META = ("", "--no-meta-policy", "--no-meta-value", "--no-meta-action-selection")
ABLATIONS = (  # script, families, switches, seeds, flags
    ("mrl_rl2", ("TabularMDP n=10",), ("", "--no-init-as-memory"), THREE, "--total-timesteps 1500000"),
    ("mrl_actor_critic", ("TabularMDP n=10", "PointNav", "SparsePointNav"), NO_META, THREE, ""),
)

TENTHS = {"mrl_rl2": 600_000, "mrl_maml": 600_000, "mrl_actor_critic": 600_000}  # of the environment steps of the defaults
SPEEDS = {  # script: family, flags, tasks of a meta-batch, environment steps per task
    "mrl_rl2": ("Bandit k=5 n=100", "--hidden-size 64", 1024, 100),
    "mrl_maml": ("PointNav", "--num-episodes 20 --adapt-steps 1", 20, 20 * 2 * 100),
    "mrl_actor_critic": ("TabularMDP n=10", "", 128, 100),
}


# FILES
def read(name):
    path = RESULTS / name
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def store(name, rows, key):
    """Writes rows (dicts) into a CSV of tests/results, in place of those that are the same in the columns of `key`."""
    new = {tuple(str(row[column]) for column in key) for row in rows}
    kept = [row for row in read(name) if tuple(row.get(column) for column in key) not in new]
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)
    print(name, *rows[-1].values(), flush=True)


def evaluation(folder):
    """The rows of the one evaluation of a finished agent below `folder`."""
    [path] = Path(folder).glob("evaluate__*/eval.csv")
    columns = ("adaptation", "mean_return", "stderr", "num_tasks")
    rows = csv.DictReader(path.open(newline=""))
    return [{"env_steps": row["global_step"]} | {column: row[column] for column in columns} for row in rows]


# TRAINING
CHILDREN = []


def stop(*_):
    for process in CHILDREN:
        process.terminate()
    os._exit(143)


def call(script, flags, folder, processes=1):
    """Runs a script in `folder`, where its output goes too, with one thread per process. Returns whether it succeeded."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / f"{script}.py"), *flags.split(), "--runs-dir", "."]
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])  # families of other people
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = Popen(command, cwd=folder, env=environment, stdout=DEVNULL, stderr=PIPE, text=True)
    CHILDREN.append(process)
    _, errors = process.communicate()
    if process.returncode:
        print(*command, errors[-2000:], file=sys.stderr, flush=True)
    return process.returncode == 0


def env_flags(family, script):
    home, flags, _ = FAMILIES[family]
    return f"--env-id {flags}" if home == script else f"--env-id {home}:{flags}"


def train_once(run):
    """Trains and evaluates, unless the same command has been finished before. Returns the rows of the evaluation."""
    labels, script, flags, seed = run
    flags = f"{flags} --seed {seed}"
    name = re.sub(r"[^\w.]+", "_", f"{script} {flags}")  # a training that two tables ask for is run once
    folder = RUNS / name
    finished = folder / "finished.json"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if "my_tasks:" in flags:  # the README shows this file
            [code] = re.findall(r"```python\n([^`]*class CartPoleTasks[^`]*)```", (ROOT / "README.md").read_text())
            (folder / "my_tasks.py").write_text(code)
        start = time.time()
        if not call(script, flags, folder):
            return []
        finished.write_text(json.dumps({"seconds": round(time.time() - start)}))
    seconds = json.loads(finished.read_text())["seconds"]
    if not any(folder.glob("evaluate__*/eval.csv")):
        family = labels.get("family") or TRAININGS[labels["name"]][1]
        num_tasks = FAMILIES[family][2]
        if script == "mrl_maml" and num_tasks > 100:
            num_tasks //= 5  # since it plays many episodes per task and step
        [path] = folder.glob("*/checkpoint.pt")
        call(script, f"--evaluate {path} --eval-tasks {num_tasks}", folder)
    return [labels | {"seed": seed, "run": name, "seconds": seconds} | row for row in evaluation(folder)]


def train_all(file, runs, jobs):
    """Trains runs (labels, script, flags, seed), `jobs` at a time. Returns the last row of each, and stores all in a CSV."""
    last_rows = []
    with ThreadPoolExecutor(jobs) as pool:
        for rows in pool.map(train_once, runs):
            if rows:
                store(file, rows, [*runs[0][0], "seed"])
                last_rows.append(rows[-1])
    return last_rows


def train(names: tyro.conf.Positional[Names], seeds: Seeds = (), jobs: int = 2):
    """Trains agents of TRAININGS -> trainings.csv, and <name>.pt of the median seed."""
    for name in names:
        script, family, flags, default_seeds, _ = TRAININGS[name]
        flags = f"{env_flags(family, script)} {flags}"
        runs = [({"name": name}, script, flags, seed) for seed in seeds or default_seeds]
        rows = sorted(train_all("trainings.csv", runs, jobs), key=lambda row: float(row["mean_return"]))
        median = rows[(len(rows) - 1) // 2]
        [path] = RUNS.glob(f"{median['run']}/*/checkpoint.pt")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["optimizer"]["state"] = {}  # Adam's moments: twice the size of the weights, and of use to a training alone
        torch.save(checkpoint, RESULTS / f"{name}.pt")


def defaults(seeds: Seeds = FIVE, scripts: Names = tuple(SCRIPTS), families: Names = MATRIX, jobs: int = 2):
    """Each script on each family with default flags -> defaults.csv"""
    runs = []
    for seed, family, script in itertools.product(seeds, families, scripts):
        runs.append(({"family": family, "script": script}, script, env_flags(family, script), seed))
    train_all("defaults.csv", runs, jobs)


def ablation(scripts: Names = tuple(SCRIPTS), jobs: int = 2):
    """Scripts without one of their parts -> ablation.csv"""
    runs = []
    for script, families, switches, seeds, flags in ABLATIONS:
        for seed, family, switch in itertools.product(seeds, families, switches):
            labels = {"script": script, "family": family, "switch": switch or "whole"}
            runs.append((labels, script, f"{env_flags(family, script)} {flags} {switch}", seed))
    train_all("ablation.csv", [run for run in runs if run[1] in scripts], jobs)


def overfitting(scripts: Names = tuple(SCRIPTS), seeds: Seeds = (1,), jobs: int = 2):
    """Returns on training and on held-out random MDPs against the number of training tasks -> overfitting.csv"""
    runs, key = [], ["script", "num_train_tasks", "split", "seed"]
    for seed, script, number in itertools.product(seeds, scripts, (1, 3, 10, 30, 100, 1000, 0)):
        flags = f"--total-timesteps 1500000 --eval-tasks 1000 --eval-every 1000000 --num-train-tasks {number}"
        labels = {"script": script, "num_train_tasks": number, "split": "heldout"}
        runs.append((labels | {"family": "TabularMDP n=10"}, script, f"{env_flags('TabularMDP n=10', script)} {flags}", seed))
    for row in train_all("overfitting.csv", runs, jobs):
        [path] = RUNS.glob(f"{row['run']}/TabularMDP*/eval.csv")
        *_, last = (training for training in csv.DictReader(path.open(newline="")) if training["split"] == "train")
        store("overfitting.csv", [row | {name: last[name] for name in last if name in row}], key)


def evaluate_agent(name, path, flags):
    """Rows of the evaluation of an agent of TRAININGS, whose checkpoint is at `path`."""
    with tempfile.TemporaryDirectory() as folder:
        call(TRAININGS[name][0], f"--evaluate {path} {flags}", folder)
        return evaluation(folder)


def evaluate(names: tyro.conf.Positional[Names] = tuple(TRAININGS)):
    """Agents of tests/results, all or those named, on held-out tasks -> evaluations.csv"""
    evaluations = [(name, TRAININGS[name][1], FAMILIES[TRAININGS[name][1]][2], "") for name in names]
    for name in names:
        for family in LONGER.get(name, ()):
            evaluations.append((name, family, FAMILIES[family][2], f"--env-kwargs n {family.split('n=')[1]}"))
    for name, family, num_tasks, flags in evaluations:
        if (RESULTS / f"{name}.pt").exists():
            rows = evaluate_agent(name, RESULTS / f"{name}.pt", f"--eval-tasks {num_tasks} {flags}")
            store("evaluations.csv", [{"name": name, "family": family} | row for row in rows], ["name", "family"])


def linear_probe(hidden, goals, steps=300):
    """Multinomial logistic regression from hidden states (N, H) to goals (N), as a function of hidden states."""
    std = hidden.std(0) + 1e-6
    weights = torch.zeros(hidden.shape[1] + 1, int(goals.max()) + 1, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05, weight_decay=1e-4)

    def logits(hidden):
        return torch.nn.functional.pad(hidden / std, (0, 1), value=1.0) @ weights

    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(hidden), goals).backward()
        optimizer.step()
    return logits


class MovedGoal(mrl_rl2.CrossModalGridNavi):
    """From the third episode on, the goal of each task is that of its neighbour."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        if self.episode >= 2:
            self.tasks[:, :2] = np.roll(self.tasks[:, :2], 1, axis=0)
        return result


class SenseByRound(mrl_rl2.CrossModalGridNavi):
    """For MAML, which plays a round of single episodes before each adaptation step: each round has the next sense."""

    rounds = -1

    def reset(self, *, seed=None, options=None):
        self.rounds += options is None
        return super().reset(seed=seed, options=options)

    def observe(self):
        self.episode = self.rounds
        return super().observe()


gym.register("SenseByRound-v0", vector_entry_point=SenseByRound)
SENSES = tuple(name for name in TRAININGS if "cross_modal" in name)


def cross_modal(names: tyro.conf.Positional[Names] = SENSES, seeds: Seeds = FIVE, num_tasks: int = 4000):
    """Agents trained with and without switches between the senses, on patterns of senses, also with a goal that moves in the
    middle of the trial -> cross_modal.csv; the goal, read by a linear probe after two episodes -> probe.csv"""
    key, plain = ["name", "senses", "seed"], ("pppp", "vvvv", "ppvv", "vvpp")
    for name, seed in itertools.product(names, seeds):
        script, family, flags, _, _ = TRAININGS[name]
        *_, trained = train_once(({"name": name}, script, f"{env_flags(family, script)} {flags}", seed))
        [path] = RUNS.glob(f"{trained['run']}/*/checkpoint.pt")
        if script != "mrl_rl2":
            for senses in plain:
                rows = evaluate_agent(name, path, f"--eval-tasks {num_tasks // 4} --env-kwargs senses {senses}")
                store("cross_modal.csv", [{"name": name, "senses": senses, "seed": seed} | row for row in rows], key)
            continue
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        agent = mrl_rl2.Agent(27, gym.spaces.Discrete(5), mrl_rl2.Args(**checkpoint["args"]))
        agent.load_state_dict(checkpoint["agent"])
        states = {}
        patterns = [(senses, mrl_rl2.CrossModalGridNavi) for senses in plain]
        for senses, family in [*patterns, ("pppp", MovedGoal), ("ppvv", MovedGoal), ("vvpp", MovedGoal)]:
            envs = family(num_tasks, senses)
            tasks = envs.sample_tasks(num_tasks, mrl_rl2.seed_all(99))
            batch = mrl_rl2.rollout(agent, envs, tasks, 4, seed=99, explore=False)
            returns = mrl_rl2.episode_returns(batch, 4)  # (4, N)
            moved = " moved" * (family is MovedGoal)
            rows = []
            for k, x in {1: returns[0], 2: returns[1], 3: returns[2], 4: returns[3], "trial": returns.sum(0)}.items():
                row = {"name": name, "senses": senses + moved, "seed": seed, "env_steps": checkpoint["global_step"]}
                row |= {"adaptation": k, "mean_return": x.mean().item(), "stderr": x.std().item() / num_tasks**0.5}
                rows.append(row | {"num_tasks": num_tasks})
            store("cross_modal.csv", rows, key)
            with torch.no_grad():
                states[senses[:2]] = agent(batch["inputs"][:30])[2][0]  # (N, H): two episodes of 15 steps
        goals, half = torch.tensor(tasks[:, 0] * 5 + tasks[:, 1]), num_tasks // 2
        centred = {senses: x - x.mean(0) for senses, x in states.items()}  # less what all goals have in common
        for kind, learned, tested in itertools.product((states, centred), states, states):
            logits = linear_probe(kind[learned][:half], goals[:half])
            correct = (logits(kind[tested][half:]).argmax(-1) == goals[half:]).double()
            row = {"name": name, "states": "centred" if kind is centred else "whole", "trained": learned, "tested": tested}
            row |= {"seed": seed}
            store("probe.csv", [row | {"accuracy": correct.mean().item(), "num_tasks": half}], [*row])


class NoisyMDP(mrl_actor_critic.TabularMDP):
    """Rewards with noise of another deviation than 1, and a share of `slips`, steps in which the action is a random one."""

    def __init__(self, num_envs=1, noise=1.0, slips=0.0):
        super().__init__(num_envs)
        self.noise, self.slips = noise, slips

    def act(self, actions):
        slips, others = self.np_random.random(self.num_envs) < self.slips, self.np_random.integers(5, size=self.num_envs)
        actions = np.where(slips, others, actions)
        mean_rewards = self.tasks[np.arange(self.num_envs), self.state, actions, 10]
        return mean_rewards + self.noise * (super().act(actions) - mean_rewards)


gym.register("NoisyMDP-v0", vector_entry_point=NoisyMDP)


def uncertain():
    """Agents trained on random MDPs, on those with other noise, or with actions that slip -> uncertain.csv"""
    for name, num_tasks in (("rl2_tabular_mdp_n10", 4000), ("actor_critic_tabular_mdp", 4000), ("maml_tabular_mdp", 400)):
        for noise, slips in [*((noise, 0) for noise in (0, 0.5, 1, 2, 4)), *((1, slips) for slips in (0.1, 0.2, 0.3))]:
            family = f"--env-id benchmark:NoisyMDP-v0 --env-kwargs noise {noise} slips {slips}"
            rows = evaluate_agent(name, RESULTS / f"{name}.pt", f"{family} --eval-tasks {num_tasks}")
            rows = [{"name": name, "noise": noise, "slips": slips} | row for row in rows]
            store("uncertain.csv", rows, ["name", "noise", "slips"])


# SPEED AND SIZE
def speed(
    what: tyro.conf.Positional[str] = "", iterations: int = 20, warm_up: int = 3, device: str = "cpu", times: Seeds = (1,)
):
    """Steps per second, medians over iterations -> speed.csv, with `times` as many tasks, on a device; with `busy`, a tenth of
    the default commands, alone and beside one busy process per core -> wall_times.csv"""
    each = itertools.product(() if what == "busy" else SCRIPTS, times, (1, 2) if device == "cpu" else (1,))
    for script, factor, processes in each:
        family, flags, num_tasks, steps = SPEEDS[script]
        flags, steps = f"--num-tasks {factor * num_tasks} {flags}".strip(), factor * num_tasks * steps
        short = f"--device {device} --eval-tasks 2 --eval-every 1000000 --total-timesteps {steps * (warm_up + iterations)}"
        with tempfile.TemporaryDirectory() as folder:
            call(script, f"{env_flags(family, script)} {flags} {short}", folder, processes)
            figures = medians(folder, warm_up, ("charts/SPS", "time/rollout", "time/update"))
        row = {"script": script, "setting": f"{family} {flags}", "device": device, "processes": processes, "threads": 1}
        row |= {tag: f"{value:.4g}" for tag, value in figures.items()}
        row |= {"cores": os.cpu_count(), "load_average": f"{os.getloadavg()[0]:.1f}"}
        store("speed.csv", [row], ["script", "setting", "device", "processes", "threads"])
    for script, busy in itertools.product(SCRIPTS if what == "busy" else (), (0, os.cpu_count())):
        others = [Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        CHILDREN.extend(others)
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            call(script, f"--total-timesteps {TENTHS[script]}", folder)
        row = {"script": script, "env_steps": TENTHS[script], "busy_processes": busy, "cores": os.cpu_count()}
        row["seconds"] = round(time.time() - start)
        for process in others:
            process.kill()
        store("wall_times.csv", [row], ["script", "busy_processes"])


COSTS = {  # script: family, what is doubled as flags, its smallest values, steps of an iteration
    "mrl_rl2": (
        "Bandit-v0",
        {"tasks": "--num-tasks", "pulls of a trial": "--env-kwargs k 5 n"},
        (256, 50),
        lambda m, n: m * n,
    ),
    "mrl_maml": (
        "PointNav-v0",
        {"tasks": "--num-tasks", "episodes": "--num-episodes", "adaptation steps": "--adapt-steps"},
        (10, 10, 1),
        lambda m, e, k: m * e * (k + 1) * 100,
    ),
    "mrl_actor_critic": (
        "TabularMDP-v0",
        {"tasks": "--num-tasks", "episodes of a trial": "--env-kwargs n"},
        (64, 5),
        lambda m, e: m * e * 10,
    ),
}
PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def medians(folder, warm_up, tags):
    """Medians over the iterations after the first few, from the events of the one run in `folder`."""
    [run] = Path(folder).iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: statistics.median(event.value for event in events.Scalars(tag)[warm_up:]) for tag in tags}


def cost(iterations: int = 8, warm_up: int = 3):
    """Seconds of an iteration and peak memory, as one thing after the other is doubled -> cost.csv"""
    for script, (family, flags, smallest, steps_of) in COSTS.items():
        for what, factor in itertools.product(flags, (1, 2, 4)):
            sizes = [x * (factor if name == what else 1) for name, x in zip(flags, smallest, strict=True)]
            steps = steps_of(*sizes)
            settings = " ".join(f"{flag} {x}" for flag, x in zip(flags.values(), sizes, strict=True))
            short = f"--eval-tasks 2 --eval-every 1000000 --total-timesteps {steps * (warm_up + iterations)}"
            with tempfile.TemporaryDirectory() as folder:
                argv = f"--env-id {family} {settings} {short} --runs-dir {folder}".split()
                command = [sys.executable, "-c", PEAK, str(ROOT / f"{script}.py"), *argv]
                process = Popen(command, stdout=PIPE, stderr=DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                CHILDREN.append(process)
                peak = int(process.communicate()[0].split()[-1])
                times = medians(folder, warm_up, ("time/rollout", "time/update"))
            row = {"script": script, "setting": f"{family} {settings}", "doubled": what, "factor": factor, "env_steps": steps}
            row |= {tag: f"{value:.3g}" for tag, value in times.items()} | {"peak_MiB": peak}
            store("cost.csv", [row], ["script", "doubled", "factor"])


LEVELS = (  # script, family, what is judged, its level, in what others took for the family
    ("mrl_rl2", "GridNavi", "trial", 36, "8.6 hours on two cores (VariBAD)"),
    ("mrl_actor_critic", "GridNavi", "trial", 34, "8.6 hours on two cores (VariBAD)"),
    ("mrl_actor_critic", "TabularMDP n=10", "trial", 156.2, ""),
    ("mrl_maml", "PointNav", "3", -5, "2.4 hours for 200 iterations (learn2learn)"),
)


def levels(seeds: Seeds = THREE):
    """Environment steps and seconds of the default commands until they reach a level on held-out tasks -> levels.csv"""
    for seed, (script, family, adaptation, level, published) in itertools.product(seeds, LEVELS):
        row = {"script": script, "family": family, "adaptation": adaptation, "level": level, "seed": seed}
        trained = train_once((row, script, env_flags(family, script), seed))
        [folder] = (path.parent for path in RUNS.glob(f"{trained[0]['run']}/*/checkpoint.pt"))
        found = [x for x in csv.DictReader((folder / "eval.csv").open(newline="")) if x["split"] == "heldout"]
        found = [x for x in found if x["adaptation"] == adaptation and float(x["mean_return"]) >= level]
        if found:
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            clocks = (event for tag in ("time/rollout", "time/update") for event in events.Scalars(tag))
            row["env_steps"] = int(found[0]["global_step"])
            row["seconds"] = round(sum(event.value for event in clocks if event.step <= row["env_steps"]))
        columns = {"env_steps": "never", "seconds": "", "published": published}
        store("levels.csv", [row | {name: row.get(name, x) for name, x in columns.items()}], ["script", "family", "seed"])


def size():
    """Lines of each script, and characters of its code: no indentation, comments and docstrings -> size.csv"""
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        code = re.sub(r'^ *""".*?"""$|(^|  ) *# .*?$', "", text, flags=re.DOTALL | re.MULTILINE)
        characters = sum(len(line.strip()) for line in code.splitlines())
        row = {"script": script, "lines": len(text.splitlines()), "code_characters": characters}
        store("size.csv", [row], ["script"])


# REPORT
def markdown(lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(entries):
    """A Markdown table of texts by (row, column); columns in the order of the words and numbers in their names."""
    rows, columns = dict.fromkeys(row for row, _ in entries), {column for _, column in entries}
    columns = sorted(columns, key=lambda text: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", text)])
    lines = [[row, *(entries.get((row, column), "") for column in columns)] for row in rows]
    return markdown([["", *columns], ["---"] * (1 + len(columns)), *lines])


def show(mean, stderr):
    if stderr == "":
        return mean
    mean, stderr = float(mean), float(stderr)
    digits = 3 if 0 < stderr < 0.02 else 1 if stderr >= 1 or abs(mean) >= 1000 else 2
    return f"{mean:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr else "")


def mean_over_seeds(rows):
    """Mean ± standard error over seeds; over the tasks of the one seed, if there is one."""
    means = [float(row["mean_return"]) for row in rows]
    stderr = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else float(rows[0]["stderr"])
    return show(statistics.mean(means), stderr)


def over_seeds(rows):
    """The mean over seeds, in brackets the standard error over tasks of one seed; minutes of one seed."""
    over_tasks, seconds = (statistics.mean(float(row[column]) for row in rows) for column in ("stderr", "seconds"))
    text = f"{len(rows)} seed{'s' * (len(rows) > 1)}, {seconds / 60:.1f} minutes each"
    return f"{mean_over_seeds(rows)} ({over_tasks:.2g})", text


def seeds_table(name, column):
    """Of a CSV with rows per seed: episodes 1 to 3 of the trial, or steps 0 to 3 of MAML, the trial, and the minutes."""
    groups, entries = defaultdict(list), {}
    for row in read(name):
        groups[row["family"], SCRIPTS.get(row[column], row[column]), row["adaptation"]].append(row)
    for (family, key, adaptation), rows in groups.items():
        if adaptation in ("0", "1", "2", "3", "trial"):
            entries[f"{family}, {adaptation}", key], entries[f"{family}, cost", key] = over_seeds(rows)
    return table(dict(sorted(entries.items())))


def family_tables():
    """Stored agents beside published figures and players: a table per family."""
    tables = defaultdict(dict)
    groups = defaultdict(list)
    for row in read("defaults.csv"):
        title, _, column = row["family"].partition(" ")
        if title in ("Bandit", "TabularMDP") and row["adaptation"] == "trial":
            groups[title, f"{SCRIPTS[row['script']]}, trained for n, default flags", column].append(row)
    for (title, who, column), rows in groups.items():
        tables[title][who, column] = mean_over_seeds(rows)
    for row in read("evaluations.csv") + read("published.csv") + read("players.csv"):
        title, _, column = row["family"].replace(",", "").partition(" ")
        adaptation = row.get("adaptation")
        who = f"**{row['name']}**" if adaptation else f"{row['player']} ({row['source']})"
        if "noise" in column:
            title, _, column = row["family"].rpartition(" ")
        elif adaptation and adaptation != "trial":
            if row["family"] in LONGER.get(row["name"], ()):
                continue
            title, column = f"{row['family']}, episode by episode" if column else title, adaptation
        column = column.removeprefix("episode ").replace("sum of 4 episodes", "trial") or adaptation or "each episode"
        if not column.isdigit() or int(column) <= 10:
            tables[title][who, column] = show(row["mean_return"], row["stderr"])
    return "\n".join(f"### {title}\n\n{table(entries)}\n" for title, entries in sorted(tables.items()))


def training_commands():
    lines, trained = [], read("trainings.csv")
    for name, (script, family, flags, _, note) in TRAININGS.items():
        rows = [row for row in trained if row["name"] == name]
        rows = [row for row in rows if row["adaptation"] == rows[-1]["adaptation"]]
        results = (f"{rows[0]['env_steps']} steps", *over_seeds(rows)) if rows else ()
        lines.append("# " + ", ".join(text for text in (name, note, *results) if text))
        lines.append(f"python {script}.py {env_flags(family, script)} {flags}".strip())
    return "\n".join(["```", *lines, "```"])


README_ROWS = (  # family, measure, agent and adaptations of each script, published, best known
    ("Bandit, 5 arms, 10 pulls", "trial", "rl2_bandit_k5_n10 trial", "", "actor_critic_bandit_k5_n10 trial", "6.7 (RL²)",
     "6.660, exact"),
    ("Bandit, 5 arms, 100 pulls", "trial", "rl2_bandit_k5_n100 trial", "", "actor_critic_bandit_k5_n100 trial", "78.7 (RL²)",
     "78.6, Gittins index"),
    ("GridNavi", "trial of 4", "rl2_grid_navi trial", "", "actor_critic_grid_navi trial", "", "37.21, exact"),
    ("CrossModalGridNavi", "trial of 4", "rl2_cross_modal trial", "", "actor_critic_cross_modal trial", "", "37.21, exact"),
    ("TabularMDP", "trial of 10", "rl2_tabular_mdp_n10 trial", "", "actor_critic_tabular_mdp trial",
     "156.2 (RL²), 159.1 (SNAIL)", "about 162.5, near-Bayes"),
    ("TabularMDP", "an episode, after 0 / 1 / 3 steps", "", "maml_tabular_mdp 0 1 3", "", "", ""),
    ("PointNav", "episodes 1 / 2, or after 0 / 1 / 2 / 3 steps", "rl2_point_nav 1 2", "maml_point_nav 0 1 2 3",
     "actor_critic_point_nav 1 2", "-40.4 / -11.7 / -3.3 / -3.2 (MAML)", "-1.3 (triangulation) / -0.5"),
    ("SparsePointNav", "episodes 1 / 2, or after 0 / 1 / 3 steps", "rl2_sparse_point_nav 1 2", "maml_sparse_point_nav 0 1 3",
     "actor_critic_sparse_point_nav 1 2", "", "41 (a sweep) / 53.4"),
    ("HalfCheetahDir", "episodes 1 / 2, or after 0 / 1 / 2 / 3 steps", "rl2_half_cheetah_dir 1 2",
     "maml_half_cheetah_dir 0 1 2 3", "actor_critic_half_cheetah_dir 1 2",
     "-51 / 293 / 314 / 316 (MAML), 443 (told the task)", ""),
    ("HalfCheetahVel", "after 0 / 1 steps, `--adapt-steps 1`", "", "maml_half_cheetah_vel_one_step 0 1", "", "", ""),
    ("HalfCheetahVel", "after 0 / 1 / 2 / 3 steps", "", "maml_half_cheetah_vel 0 1 2 3", "",
     "-130 / -79 / -67 / -61 (MAML), -54.5 (told the task)", ""),
)  # fmt: skip


def readme_table():
    """The one table of the README: last evaluations of the trainings, with the number of seeds."""
    groups = defaultdict(list)
    for row in read("trainings.csv"):
        groups[row["name"], row["adaptation"]].append(row)
    lines = [["family", "return of", *SCRIPTS.values(), "published", "best known"], ["---"] * 7]
    for family, measure, *agents, published, best in README_ROWS:
        cells = []
        for name, *adaptations in map(str.split, [agent or "-" for agent in agents]):
            seeds = [groups[name, adaptation] for adaptation in adaptations if (name, adaptation) in groups]
            cells.append(" / ".join(map(mean_over_seeds, seeds)) + (f" ({len(seeds[0])})" if seeds else ""))
        lines.append([family, measure, *cells, published, best])
    return markdown(lines)


def report():
    """Fills the tables of README.md and tests/results/README.md, each between two marks, from the CSV files there."""
    head, rest = (ROOT / "README.md").read_text().split("<!-- results -->", 1)
    rest = rest.split("<!-- end -->", 1)[1]
    (ROOT / "README.md").write_text(f"{head}<!-- results -->\n{readme_table()}\n<!-- end -->{rest}")
    tables = {"families": family_tables(), "trainings": training_commands()}
    tables |= {"defaults": seeds_table("defaults.csv", "script"), "ablation": seeds_table("ablation.csv", "switch")}
    groups = defaultdict(list)
    for row in read("cross_modal.csv"):
        groups[f"{row['name']}, {row['senses']}", row["adaptation"]].append(row)
    tables["cross_modal"] = table({key: mean_over_seeds(rows) for key, rows in groups.items()})
    entries = {}
    for row in read("uncertain.csv"):
        setting = f"slips {row['slips']}" if row["slips"] != "0" else f"noise {row['noise']}"
        if row["adaptation"] in ("0", "1", "3", "trial"):
            entries[f"{row['name']}, {row['adaptation']}", setting] = show(row["mean_return"], row["stderr"])
    tables["uncertain"] = table(entries)
    groups = defaultdict(list)
    for row in read("overfitting.csv"):
        if row["adaptation"] == ("3" if row["script"] == "mrl_maml" else "trial"):
            number = {"0": "fresh tasks", "1": "1 task"}.get(row["num_train_tasks"], f"{row['num_train_tasks']} tasks")
            groups[f"{SCRIPTS[row['script']]}, {row['split']}", number].append(row)
    for (name, _), rows in groups.items():
        if name.endswith("train"):  # few tasks, played many times: the error over them is not known
            rows[:] = [row | {"stderr": 0} for row in rows]
    tables["overfitting"] = table({key: mean_over_seeds(rows) for key, rows in sorted(groups.items())})
    groups = defaultdict(list)
    for row in read("probe.csv"):
        groups[f"{row['name']}, {row['states']}", f"{row['trained']} to {row['tested']}"].append(float(row["accuracy"]))
    tables["probe"] = table({key: f"{statistics.mean(x):.3f}" for key, x in groups.items()})
    for name in ("speed", "wall_times", "cost", "levels", "size"):
        rows = read(f"{name}.csv") or [{}]
        tables[name] = markdown([rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)])
    path = RESULTS / "README.md"
    parts = re.split(r"(<!-- table (\w+) -->\n).*?(<!-- end -->\n)", path.read_text(), flags=re.DOTALL)
    for i in range(1, len(parts), 4):  # mark, name, end mark, text up to the next mark
        parts[i + 1] = f"\n{tables[parts[i + 1]]}\n\n"
    path.write_text("".join(parts))


COMMANDS = train, evaluate, defaults, overfitting, ablation, cross_modal, uncertain, speed, cost, levels, size, report

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `size | head`
    tyro.extras.subcommand_cli_from_dict({command.__name__: command for command in COMMANDS})
