"""Remakes every table and picture of the README. Everything it writes goes to tests/results/.

python tests/benchmark.py players              reference players: classical algorithms and exact optima, in numpy
python tests/benchmark.py evaluate             every trained agent of tests/results on held-out tasks, beside the players
python tests/benchmark.py tables               the README's tables again, out of what evaluate wrote
python tests/benchmark.py curves               learning curves of their trainings, a picture for each script
python tests/benchmark.py cheetah              the curves of HalfCheetah, MAML beside RL²
python tests/benchmark.py adaptation           return against the episode of the trial (after evaluate)
python tests/benchmark.py trajectories         PointNav before and after each adaptation step
python tests/benchmark.py sweep                SparsePointNav: where the meta actor-critic searches, and where it goes then
python tests/benchmark.py baselines            PointNav from a random start and from one trained on all tasks
python tests/benchmark.py ablation             the meta actor-critic without each of its three meta parts
python tests/benchmark.py cartpole             the README's CartPole tasks: each script, and the best fixed linear policy
python tests/benchmark.py speed                env steps a second of each script, what MAML's cost grows with, two processes
"""

import csv
import functools
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"


def write_csv(name, columns, rows):
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def print_table(columns, rows):
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row) + " |")


def controlled_mean(returns, control, control_mean):
    """Mean and standard error of `returns` (N,) after regression on a control variate (N,) of known mean."""
    slope = np.cov(returns, control)[0, 1] / max(control.var(ddof=1), 1e-12)
    controlled = returns - slope * (control - control_mean)
    return controlled.mean(), controlled.std(ddof=1) / math.sqrt(len(returns))


# Bernoulli bandits: k arms with p ~ U[0,1], n pulls. A player maps counts of successes and failures (N, k) to arms (N,).


def thompson_arm(successes, failures, left, rng):
    return rng.beta(successes + 1, failures + 1).argmax(1)


def ucb_arm(successes, failures, left, rng, width):
    """UCB1 with statistics that start at one success and one failure; `width` 0 is the greedy player."""
    pulls = successes + failures + 2
    step = successes[0].sum() + failures[0].sum() + 1
    return ((successes + 1) / pulls + width * np.sqrt(2 * np.log(step) / pulls)).argmax(1)


def gittins_arm(successes, failures, left, rng, table):
    return table[left - 1][successes.astype(int), failures.astype(int)].argmax(1)


def gittins_table(n, num_levels=50):
    """Finite-horizon Gittins index of an arm with p ~ U[0,1]: `table[h - 1][s, f]` with h pulls left.

    The index is the certain reward a pull at which it is worth nothing to pull once more and stop at the best moment.
    One backward sweep over h gives that worth at one reward level; the index lies where it crosses zero, which is found by
    linear interpolation between the levels. 50 levels lose less than .01 at n=100 against 400.
    """
    s, f = np.indices((n + 1, n + 1), np.float32)
    mean = (s + 1) / (s + f + 2)
    table = [np.zeros((m, m), np.float32) for m in range(n, 0, -1)]
    last_worth = [mean[:m, :m] for m in range(n, 0, -1)]
    for level in range(1, num_levels + 1):
        later = np.zeros((n + 1, n + 1), np.float32)
        for h, m in enumerate(range(n, 0, -1)):
            failed = later[:m, 1 : m + 1]
            worth = mean[:m, :m] * (1 + later[1 : m + 1, :m] - failed) + failed - np.float32(level / num_levels)
            table[h] += np.clip(last_worth[h] / np.maximum(last_worth[h] - worth, 1e-9), 0, 1) / num_levels
            last_worth[h], later = worth, np.maximum(worth, 0)
    return table


def bandit_optimum(k, n):
    """Exact Bayes-optimal return: arms are exchangeable, so a state is the multiset of (successes, failures)."""

    @functools.cache
    def value(arms, left):
        if left == 0:
            return 0.0
        best = 0.0
        for i, (s, f) in enumerate(arms):
            if i > 0 and arms[i] == arms[i - 1]:
                continue
            rest, p = arms[:i] + arms[i + 1 :], (s + 1) / (s + f + 2)
            won, lost = tuple(sorted((*rest, (s + 1, f)))), tuple(sorted((*rest, (s, f + 1))))
            best = max(best, p * (1 + value(won, left - 1)) + (1 - p) * value(lost, left - 1))
        return best

    return value(((0, 0),) * k, n)


def play_bandits(player, k, n, num_trials, rng):
    """Trial return in terms of the expected reward of the pulled arms; max p is the control variate."""
    p, rows = rng.random((num_trials, k)), np.arange(num_trials)
    successes, failures = np.zeros((2, num_trials, k))
    total = np.zeros(num_trials)
    for t in range(n):
        arm = player(successes, failures, n - t, rng)
        won = rng.random(num_trials) < p[rows, arm]
        total += p[rows, arm]
        successes[rows, arm] += won
        failures[rows, arm] += ~won
    return (*controlled_mean(total, n * p.max(1), n * k / (k + 1)), num_trials)


def bandit_players():
    rng = np.random.default_rng(1)
    for n in (10, 100, 500):
        gittins = functools.partial(gittins_arm, table=gittins_table(n))
        players = {
            "greedy": functools.partial(ucb_arm, width=0.0),
            "Thompson sampling": thompson_arm,
            "UCB1": functools.partial(ucb_arm, width=1.0),
            "UCB1, width tuned to 0.2": functools.partial(ucb_arm, width=0.2),
            "finite-horizon Gittins index": gittins,
        }
        for k in (5, 10, 50):
            task = f"Bandit k={k} n={n}"
            yield task, "random", n / 2, 0.0, "exact"
            for name, player in players.items():
                yield task, name, *play_bandits(player, k, n, int(np.clip(2e7 / (k * n), 2000, 100_000)), rng)
            if n == 10:
                yield task, "optimum", bandit_optimum(k, n), 0.0, "exact"
        if n == 100:
            yield "Bandit k=2 n=100", "finite-horizon Gittins index", *play_bandits(gittins, 2, n, 50_000, rng)


# Tabular MDPs: 10 states, 5 actions, P ~ Dirichlet(1), mean reward ~ N(1,1), reward noise N(0,1), 10 steps an episode.

S, A, T = 10, 5, 10


def sample_mdps(num_tasks, rng):
    transition = rng.standard_exponential((num_tasks, S, A, S))
    return transition / transition.sum(-1, keepdims=True), rng.normal(1, 1, (num_tasks, S, A))


def plan(transition, reward, bonus=0.0):
    """Backward induction over T steps: policy[t] (M, S), greedy on Q plus bonus (M, S, A), and the values (M, S)."""
    value, policy = np.zeros((len(reward), S)), []
    for _ in range(T):
        q = reward + (transition.reshape(-1, S * A, S) @ value[:, :, None]).reshape(-1, S, A)
        policy.insert(0, (q + bonus).argmax(-1))
        value = q.max(-1)
    return policy, value


def psrl_policy(counts, reward_sum, rng):
    """Posterior sampling: the optimal policy of one MDP drawn from the posterior."""
    visits = counts.sum(-1)
    transition = rng.standard_gamma(counts + 1)
    reward = rng.normal((1 + reward_sum) / (1 + visits), 1 / np.sqrt(1 + visits))
    return plan(transition / transition.sum(-1, keepdims=True), reward)[0]


def count_bonus_policy(counts, reward_sum, rng, bonus):
    """Posterior-mean MDP, greedy on Q plus a bonus that shrinks with the number of visits."""
    visits = counts.sum(-1)
    transition = (counts + 1) / (visits + S)[..., None]
    return plan(transition, (1 + reward_sum) / (1 + visits), bonus / np.sqrt(visits + 1))[0]


def play_mdps(player, num_episodes, num_tasks, known_value, rng, every_step=False):
    """Trial return in terms of mean rewards; the known-MDP optimum is the control variate."""
    transition, reward = sample_mdps(num_tasks, rng)
    cumulative, rows = transition.cumsum(-1), np.arange(num_tasks)
    counts, reward_sum = np.zeros_like(transition), np.zeros_like(reward)
    total = np.zeros(num_tasks)
    for _ in range(num_episodes):
        state = np.zeros(num_tasks, int)
        policy = player(counts, reward_sum, rng)
        for t in range(T):
            if every_step and t > 0:
                policy = player(counts, reward_sum, rng)
            action = policy[t][rows, state]
            mean = reward[rows, state, action]
            next_state = (rng.random((num_tasks, 1)) > cumulative[rows, state, action, :-1]).sum(-1)
            total += mean
            reward_sum[rows, state, action] += mean + rng.normal(size=num_tasks)
            counts[rows, state, action, next_state] += 1
            state = next_state
    known = plan(transition, reward)[1][:, 0] * num_episodes
    return (*controlled_mean(total, known, known_value * num_episodes), num_tasks)


def mdp_players():
    rng = np.random.default_rng(2)
    known = np.concatenate([plan(*sample_mdps(10_000, rng))[1][:, 0] for _ in range(20)])
    for n, num_tasks in ((10, 4000), (100, 600)):
        task = f"TabularMDP n={n}"
        yield task, "random", T * n, 0.0, "exact"
        yield task, "PSRL", *play_mdps(psrl_policy, n, num_tasks, known.mean(), rng)
        for b in (0.0, 0.3, 0.6, 1.0):
            player = functools.partial(count_bonus_policy, bonus=b)
            yield task, f"count bonus {b:g}", *play_mdps(player, n, num_tasks, known.mean(), rng)
        if n == 10:
            stepwise = play_mdps(functools.partial(count_bonus_policy, bonus=0.6), n, 2000, known.mean(), rng, every_step=True)
            yield task, "count bonus 0.6, refitted after each step", *stepwise
        yield task, "known MDP", n * known.mean(), n * known.std() / math.sqrt(len(known)), len(known)


# Navigation: what is exact there.


def grid_navi_bayes_optimum(size=5, steps=15):
    """Exact returns of the first and of each later episode of a Bayes-optimal trial.

    No first episode can do better than to look at a new candidate cell in each step from the second on, and no later one
    better than with a known goal. Both bounds hold together if such a first walk leaves only cells that one shortest walk
    passes.
    """
    goals = {(x, y) for x in range(size) for y in range(size)} - {(0, 0), (0, 1), (1, 0), (1, 1)}

    def found_at(t):
        return (steps - t + 1) - 0.1 * (t - 1)

    first = sum(found_at(t) for t in range(2, steps + 1)) - 0.1 * steps * (len(goals) - steps + 1)
    later = sum(found_at(x + y) for x, y in goals)

    def attainable(x, y, unseen, left):
        if left == 0:
            cells = sorted(unseen, key=sum)
            return all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(cells))
        moves = [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
        return any(attainable(*cell, unseen - {cell}, left - 1) for cell in moves if cell in unseen)

    if not any(attainable(*cell, frozenset(goals), steps - 1) for cell in ((0, 1), (1, 0))):
        raise RuntimeError("the two bounds of GridNavi do not hold together")
    return first / len(goals), later / len(goals)


def grid_navi_random(size=5, steps=15):
    """Exact return of an episode of uniformly drawn actions, averaged over the goals."""
    cells = [(x, y) for x in range(size) for y in range(size)]
    move = np.zeros((size**2, size**2))
    for i, (x, y) in enumerate(cells):
        for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            move[i, cells.index((min(max(x + dx, 0), size - 1), min(max(y + dy, 0), size - 1)))] += 0.2
    position, visits = np.eye(size**2)[0], np.zeros(size**2)
    for _ in range(steps):
        position = position @ move
        visits += position
    goals = [i for i, (x, y) in enumerate(cells) if x > 1 or y > 1]
    return (1.1 * visits[goals] - 0.1 * steps).mean()


def navigation_players():
    first, later = grid_navi_bayes_optimum()
    yield "GridNavi", "random", 4 * grid_navi_random(), 0.0, "exact"
    yield "GridNavi", "Bayes-optimal", first + 3 * later, 0.0, "exact"
    yield "GridNavi, episode 1", "Bayes-optimal", first, 0.0, "exact"
    yield "GridNavi, later episodes", "known goal", later, 0.0, "exact"

    # With the goal known, each axis goes to it on its own at full speed.
    rng = np.random.default_rng(3)
    goal = rng.uniform(-0.5, 0.5, (100_000, 1, 2))
    angle = rng.uniform(0, np.pi, (100_000, 1))
    half_circle = np.stack([np.cos(angle), np.sin(angle)], -1)

    def distances(goal, steps, speed):
        return np.linalg.norm(np.maximum(np.abs(goal) - speed * np.arange(1, steps + 1)[:, None], 0), axis=-1)

    point_still, point_known = -distances(goal, 100, 0.0).sum(1), -distances(goal, 100, 0.1).sum(1)
    sparse = distances(half_circle, 60, 0.1)
    sparse_known = np.where(sparse < 0.2, 1 - sparse, 0).sum(1)
    for task, player, returns in (
        ("PointNav", "standing still", point_still),
        ("PointNav", "known goal", point_known),
        ("SparsePointNav", "known goal", sparse_known),
    ):
        yield task, player, returns.mean(), returns.std() / math.sqrt(len(returns)), len(returns)


def players():
    """Reference players of each task family -> players.csv"""
    columns, rows = ("task", "player", "mean_return", "stderr", "num_tasks"), []
    for family in (navigation_players, mdp_players, bandit_players):
        for task, player, mean, error, count in family():
            rows.append((task, player, f"{mean:.4f}", f"{error:.4f}", count))
            print(*rows[-1], sep=", ", flush=True)
    write_csv("players.csv", columns, rows)
    print_table(columns, rows)


# Trained agents.


def run_script(runs_dir, script, *flags, processes=1, threads=1):
    """Runs one script with `runs_dir` for its output; returns what it printed and its run folder."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, f"{script}.py", *flags, "--torch-threads", str(threads), "--runs-dir", runs_dir]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    [run] = Path(runs_dir).iterdir()
    return done.stdout, run


# (row name, which begins with the checkpoint's in tests/results; task of players.csv; flags of the evaluation)
EVALUATIONS = (
    ("rl2_bandit_k5_n10", "Bandit k=5 n=10", "--eval-tasks 100000"),
    ("rl2_bandit_k5_n100", "Bandit k=5 n=100", "--eval-tasks 20000"),
    ("rl2_tabular_mdp_n10", "TabularMDP n=10", "--eval-tasks 4000"),
    ("rl2_tabular_mdp_n10 at n=100", "TabularMDP n=100", "--eval-tasks 600 --env-kwargs n 100"),
    ("rl2_grid_navi", "GridNavi", "--eval-tasks 4000"),
    ("maml_point_nav", "PointNav", "--eval-tasks 400"),
    ("maml_point_nav_long", "PointNav", "--eval-tasks 2000"),
    ("maml_point_nav_one_step", "PointNav", "--eval-tasks 400"),
    ("maml_point_nav_4_episodes", "PointNav", "--eval-tasks 400"),
    ("maml_sparse_point_nav_2_episodes", "SparsePointNav", "--eval-tasks 1000"),
    ("maml_sparse_point_nav", "SparsePointNav", "--eval-tasks 400"),
    ("maml_tabular_mdp", "TabularMDP", "--eval-tasks 1000"),
    ("maml_half_cheetah_dir", "HalfCheetahDir", "--eval-tasks 40 --eval-adapt-steps 3"),
    ("maml_half_cheetah_vel", "HalfCheetahVel", "--eval-tasks 40 --eval-adapt-steps 3"),
    ("rl2_half_cheetah_dir", "HalfCheetahDir in 2 episodes", "--eval-tasks 400"),
    ("actor_critic_tabular_mdp", "TabularMDP n=10", "--eval-tasks 4000"),
    ("actor_critic_tabular_mdp at n=100", "TabularMDP n=100", "--eval-tasks 600 --eval-episodes 100"),
    ("actor_critic_point_nav", "PointNav", "--eval-tasks 400 --eval-episodes 4"),
    ("actor_critic_sparse_point_nav", "SparsePointNav", "--eval-tasks 1000"),
)

# What others report: Duan et al. 2016, tables 1 and 2; Mishra et al. 2018, tables 1 and 4.
PUBLISHED = {
    "Bandit k=5 n=10": (("RL², Duan et al. 2016", 6.7), ("SNAIL, Mishra et al. 2018", 6.6)),
    "Bandit k=5 n=100": (("RL², Duan et al. 2016", 78.7), ("SNAIL, Mishra et al. 2018", 79.1)),
    "TabularMDP n=10": (
        ("RL², Duan et al. 2016", 156.2),
        ("SNAIL, Mishra et al. 2018", 159.1),
        ("BEB, Duan et al. 2016", 150.2),
        ("OPSRL, Duan et al. 2016", 144.1),
    ),
    "TabularMDP n=100": (
        ("RL² trained at n=100, Duan et al. 2016", 1913.7),
        ("SNAIL trained at n=100, Mishra et al. 2018", 1953.1),
        ("OPSRL, Duan et al. 2016", 1973.9),
    ),
}


def evaluate(agents: tyro.conf.Positional[tuple[str, ...]] = ()):
    """Trained agents, all or those given, on held-out tasks -> evaluations.csv, and its tables"""
    columns, rows = ("agent", "task", "global_step", "adaptation", "mean_return", "stderr", "num_tasks"), []
    for name, task, flags in EVALUATIONS:
        path = RESULTS / f"{name.split()[0]}.pt"
        if agents and path.stem not in agents:
            rows += [tuple(row.values()) for row in read_csv(RESULTS / "evaluations.csv") if row["agent"] == name]
            continue
        if not path.exists():
            print(f"{name}: no {path.name}, left out")
            continue
        with tempfile.TemporaryDirectory() as runs_dir:
            script = "mrl_" + re.match("rl2|maml|actor_critic", name)[0]
            printed, run = run_script(runs_dir, script, "--evaluate", str(path), *flags.split())
            own = [(name, task, *(row[column] for column in columns[2:])) for row in read_csv(run / "eval.csv")]
        if total := re.search(r"whole trial +(\S+) ± (\S+)", printed):
            own.append((*own[0][:3], "trial", *total.groups(), own[0][6]))
        rows += own
        print(f"\n{name}: {printed.strip()}", flush=True)
    write_csv("evaluations.csv", columns, rows)
    tables()


def tables():
    """The README's tables out of evaluations.csv, players.csv and maml_baselines.csv: whole trials, then episode by episode"""
    trials, episodes = defaultdict(list), defaultdict(list)
    for row in read_csv(RESULTS / "evaluations.csv"):
        if row["adaptation"] == "trial":
            trials[row["task"]].append((f"**{row['agent']}**", row["mean_return"], row["stderr"], row["num_tasks"]))
        else:
            episodes[row["task"], row["agent"]].append(row)
    for task, entries in trials.items():
        known = [row for row in read_csv(RESULTS / "players.csv") if row["task"] == task and not task.endswith("PointNav")]
        entries += [(row["player"], row["mean_return"], row["stderr"], row["num_tasks"]) for row in known]
        entries += [(name, value, "", "") for name, value in PUBLISHED.get(task, ())]
        lines = [(name, f"{float(mean):.2f}", error and f"{float(error):.3f}", count) for name, mean, error, count in entries]
        print_table((task, "return of a trial", "standard error", "tasks"), sorted(lines, key=lambda line: float(line[1])))
    for (task, agent), rows in episodes.items():
        if len(rows) < 20:
            lines = [(f"**{agent}**", *(f"{float(row['mean_return']):.2f} ± {float(row['stderr']):.2f}" for row in rows))]
            if agent == "maml_point_nav":
                lines += [("MAML, Finn et al. 2017, from their result files", -40.4, -11.7, -3.33, -3.23), *best_baselines()]
            print_table((task, *(row["adaptation"] for row in rows)), lines)


def best_baselines():
    """Of each start in maml_baselines.csv the inner rates that are best after the first and after the last step."""
    returns = defaultdict(list)
    for row in read_csv(RESULTS / "maml_baselines.csv"):
        returns[row["start"], row["inner_lr"]].append((float(row["mean_return"]), float(row["stderr"])))
    for start in dict.fromkeys(start for start, _ in returns):
        for step in (1, -1):
            rate = max((rate for first, rate in returns if first == start), key=lambda rate: returns[start, rate][step])
            yield f"{start}, inner rate {rate}", *(f"{mean:.2f} ± {error:.2f}" for mean, error in returns[start, rate])


# Pictures: Okabe and Ito's colours, which colour-blind readers can tell apart.

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(num_panels, width=4.6, height=3.4, **options):
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
    figure, axes = plt.subplots(
        1, num_panels, figsize=(width * num_panels, height), squeeze=False, layout="constrained", **options
    )
    return figure, axes[0]


def save_figure(figure, name):
    figure.savefig(RESULTS / name, dpi=160)
    plt.close(figure)
    print(f"wrote {RESULTS / name}")


def reference_line(axis, value, label):
    """A dashed line across the panel, named to the right of it, where no curve runs."""
    axis.axhline(value, color="0.35", linestyle="--", linewidth=1)
    axis.text(1.01, value, label, transform=axis.get_yaxis_transform(), va="center", fontsize=8, color="0.35")


def task_name(settings):
    """The task as players.csv names it, from the settings in a checkpoint."""
    family = settings["env_id"].split(":")[-1].removesuffix("-v0")
    kwargs = {"Bandit": {"k": 5, "n": 10}, "TabularMDP": {"n": 10}}.get(family, {}) | settings["env_kwargs"]
    return " ".join([family, *(f"{key}={value}" for key, value in kwargs.items())])


# Players drawn as lines into the learning curves of a task, by the name that stands there.
LINES = {
    "Bandit k=5 n=10": {"Thompson sampling": "Thompson\nsampling", "optimum": "optimum"},
    "Bandit k=5 n=100": {"Thompson sampling": "Thompson\nsampling", "finite-horizon Gittins index": "Gittins\nindex"},
    "TabularMDP n=10": {"random": "random", "PSRL": "PSRL", "count bonus 0.6": "count\nbonus"},
    "GridNavi": {"random": "random", "Bayes-optimal": "Bayes-\noptimal"},
    "PointNav": {"standing still": "standing\nstill", "known goal": "known\ngoal"},
    "SparsePointNav": {"known goal": "known\ngoal"},
}


def curves(checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()):
    """Held-out return against env steps, from tests/results/*.pt or other checkpoints -> curves_<script>.png, .csv"""
    panels = defaultdict(lambda: defaultdict(dict))  # script -> task -> seed -> rows of eval.csv
    for path in checkpoints or sorted(RESULTS.glob("*.pt")):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        rows = [row for row in saved["eval_rows"] if row[1] == "heldout"]
        panels[saved["script"]][task_name(saved["args"])].setdefault(saved["args"]["seed"], rows)
    players = {(row["task"], row["player"]): float(row["mean_return"]) for row in read_csv(RESULTS / "players.csv")}
    for script, tasks in panels.items():
        maml = script == "mrl_maml"
        figure, axes = new_figure(len(tasks))
        for axis, (task, seeds) in zip(axes, tasks.items(), strict=True):
            for i, (seed, rows) in enumerate(seeds.items()):
                curve = defaultdict(lambda: defaultdict(float))  # adaptation step, or the whole trial -> env steps -> return
                episodes = max(row[2] for row in rows) - (script == "mrl_actor_critic")  # whose last row is after the trial
                for step, _, k, mean, *_ in rows:
                    if maml or k <= episodes:
                        curve[f"after {k} step" + "s" * (k != 1) if maml else f"seed {seed}"][step / 1e6] += mean
                for j, (label, points) in enumerate(curve.items()):
                    colour = COLOURS[j if maml else i]
                    axis.plot(points.keys(), points.values(), ".-", color=colour, label=None if maml and i else label)
            for player, label in LINES.get(task, {}).items():
                if not maml or task == "PointNav":
                    scale = episodes if not maml and task.endswith("PointNav") else 1  # those players are of one episode
                    reference_line(axis, players[task, player] * scale, label)
            axis.set(title=task.split()[0] if maml else task, xlabel="environment steps (millions)", xlim=(0, None))
            if len(axis.get_legend_handles_labels()[0]) > 1:
                axis.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("return of an episode, held-out" if maml else "return of a trial, held-out")
        save_figure(figure, f"curves_{script}.png")
        columns = ("task", "seed", "global_step", "split", "adaptation", "mean_return", "stderr", "num_tasks")
        write_csv(f"curves_{script}.csv", columns, [(t, s, *r) for t in tasks for s in tasks[t] for r in tasks[t][s]])


def cheetah():
    """HalfCheetah on held-out tasks against env steps, MAML beside RL² -> curves_half_cheetah.png, .csv"""
    columns, table = ("agent", "global_step", "split", "adaptation", "mean_return", "stderr", "num_tasks"), []
    figure, axes = new_figure(2)
    for axis, family in zip(axes, ("Dir", "Vel"), strict=True):
        for path in sorted(RESULTS.glob(f"*_half_cheetah_{family.lower()}.pt")):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            rows = [row for row in saved["eval_rows"] if row[1] == "heldout"]
            table += [(path.stem, *row) for row in rows]
            for k in sorted({row[2] for row in rows}):
                label = f"MAML after {k} step{'s' * (k != 1)}" if "maml" in path.stem else f"RL², episode {k}"
                step, mean, error = np.array([(row[0] / 1e6, row[3], row[4]) for row in rows if row[2] == k]).T
                axis.errorbar(step, mean, error, label=label, color=COLOURS[len(axis.containers)], elinewidth=0.7)
        axis.set(title=f"HalfCheetah{family}", xlabel="environment steps (millions)", xlim=(0, None))
    axes[0].set_ylabel("return of an episode, held-out")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, "curves_half_cheetah.png")
    write_csv("curves_half_cheetah.csv", columns, table)


def adaptation():
    """Return of each episode of a trial by the trained agents -> adaptation.png"""
    agents, names = defaultdict(list), {"rl2": "RL²", "actor_critic": "meta actor-critic"}
    for row in read_csv(RESULTS / "evaluations.csv"):
        if row["adaptation"] != "trial":
            agents[row["agent"]].append((int(row["adaptation"]), float(row["mean_return"]), float(row["stderr"])))
    players = {(row["task"], row["player"]): float(row["mean_return"]) for row in read_csv(RESULTS / "players.csv")}
    first, later = players["GridNavi, episode 1", "Bayes-optimal"], players["GridNavi, later episodes", "known goal"]
    known = players["TabularMDP n=10", "known MDP"] / 10
    panels = {"GridNavi": ("rl2_grid_navi",), "TabularMDP": ("rl2_tabular_mdp_n10", "actor_critic_tabular_mdp")}
    panels["TabularMDP, ten times the trained length"] = tuple(f"{name} at n=100" for name in panels["TabularMDP"])
    panels = {title: shown for title, wanted in panels.items() if (shown := [name for name in wanted if name in agents])}
    figure, axes = new_figure(len(panels))
    for axis, (title, shown) in zip(axes, panels.items(), strict=True):
        for name in shown:
            colour, label = next((COLOURS[i], names[key]) for i, key in enumerate(names) if name.startswith(key))
            episode, mean, error = np.array([row for row in agents[name] if row[0] <= (100 if "n=100" in name else 10)]).T
            axis.plot(episode, mean, "o-" if len(episode) < 20 else "-", color=colour, label=label, markersize=4)
            axis.fill_between(episode, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, linewidth=0)
        if title == "GridNavi":
            axis.plot([1, 2, 3, 4], [first, later, later, later], "--", color="black", label="Bayes-optimal", zorder=3)
            axis.set_xticks([1, 2, 3, 4])
        else:
            reference_line(axis, known, "known\nMDP")
            reference_line(axis, 10, "random")
            axis.set_ylim(9, 23)
        axis.set(title=title, xlabel="episode of the trial")
        axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    axes[0].set_ylabel("return of the episode, held-out")
    save_figure(figure, "adaptation.png")


def trajectories(num_tasks: int = 6, num_episodes: int = 1):
    """Where maml_point_nav.pt goes in held-out tasks before and after each adaptation step -> trajectories.png"""
    sys.path.insert(0, str(ROOT))
    import mrl_maml as maml

    checkpoint = maml.load_checkpoint("--evaluate", RESULTS / "maml_point_nav.pt")
    args = maml.Args(**checkpoint["args"])
    envs = maml.make_envs(args, num_tasks * (args.eval_episodes or args.num_episodes))
    agent = maml.Agent(2, envs.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    tasks = maml.task_family(envs).sample_tasks(args.eval_tasks, maml.stream(args.seed, 0, maml.HELDOUT_TASKS))[:num_tasks]
    num_steps = args.eval_adapt_steps
    seeds = np.arange((num_steps + 1) * envs.num_envs).reshape(num_steps + 1, -1).tolist()
    generator = maml.torch_stream(torch.device("cpu"), args.seed, 0, maml.ACTIONS)
    batches = maml.collect(agent, args, envs, tasks, num_steps, seeds, generator)
    figure, axes = new_figure(num_steps + 1, width=3.1, height=4.3, sharey=True)
    for k, (axis, batch, returns) in enumerate(zip(axes, batches, maml.episode_returns(batches), strict=True)):
        for colour, goal, episodes in zip(COLOURS, tasks, batch["obs"], strict=False):
            for path in episodes[:num_episodes]:  # (T, 2)
                axis.plot(*path.T, color=colour, linewidth=1, alpha=0.8)
            axis.plot(*goal, "*", color=colour, markersize=13, markeredgecolor="black", zorder=3)
        axis.plot(0, 0, "o", color="black", markersize=6, zorder=3, label="start")
        axis.plot([], [], "*", color="white", markersize=11, markeredgecolor="black", label="hidden goal")
        title = "before adaptation" if k == 0 else f"after {k} step" + "s" * (k > 1)
        axis.set(
            title=f"{title}\nmean return {returns.mean():.1f}",
            xlim=(-0.6, 0.6),
            ylim=(-0.6, 0.6),
            xlabel="x",
            xticks=(-0.5, 0, 0.5),
        )
        axis.set_aspect("equal")
    axes[0].set_ylabel("y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, "trajectories.png")


def sweep(num_tasks: int = 6):
    """Where actor_critic_sparse_point_nav.pt goes in the episodes of held-out trials -> sweep.png"""
    sys.path.insert(0, str(ROOT))
    import mrl_actor_critic as script

    checkpoint = script.load_checkpoint("--evaluate", RESULTS / "actor_critic_sparse_point_nav.pt")
    args = script.Args(**checkpoint["args"])
    envs = script.make_envs(args, num_tasks)
    agent = script.Agent(2, envs.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    tasks = script.sample_tasks(envs, args.eval_tasks, script.stream(args.seed, 0, script.HELDOUT_TASKS))[:num_tasks]
    seeds, noise_key = np.zeros((3, num_tasks), dtype=int).tolist(), (args.seed, 0, script.ACTIONS)
    with torch.no_grad():
        batch = script.rollout(agent, envs, tasks, 2, 1, seeds, noise_key, exploit=True)
    figure, axes = new_figure(3, width=4.2, height=3.3, sharey=True)
    for k, (axis, title) in enumerate(zip(axes, ("first episode", "second episode", "the episode after"), strict=True)):
        for colour, goal, path in zip(COLOURS, tasks, batch["next_obs"][:, k], strict=False):
            axis.plot(*np.concatenate([np.zeros((1, 2)), path]).T, color=colour, linewidth=1, alpha=0.8)
            axis.plot(*goal, "*", color=colour, markersize=13, markeredgecolor="black", zorder=3)
        axis.set(title=f"{title}\nmean return {batch['rewards'][:, k].sum(-1).mean():.1f}", xlabel="x")
        axis.set(xlim=(-1.35, 1.2), ylim=(-0.35, 1.1), aspect="equal")
    axes[0].set_ylabel("y")
    save_figure(figure, "sweep.png")


def baselines(timesteps: int = 4_000_000):
    """PointNav from starts that are not meta-learned, with inner steps at several rates -> maml_baselines.csv"""
    columns, rows = ("start", "inner_lr", "adaptation", "mean_return", "stderr", "num_tasks"), []
    still = "--learning-rate 1e-9 --log-std-learning-rate 0 --total-timesteps 1"
    for start, flags in (("random", still), ("trained on all tasks", f"--total-timesteps {timesteps}")):
        with tempfile.TemporaryDirectory() as folder:
            _, run = run_script(f"{folder}/train", "mrl_maml", "--inner-lr", "0", "--no-learn-inner-lr", *flags.split())
            checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
            for rate in (0.01, 0.03, 0.1, 0.3):
                for name, value in checkpoint["agent"].items():
                    if name.startswith("inner_lr"):
                        value.fill_(rate)
                torch.save(checkpoint, f"{folder}/start.pt")
                flags = ("--evaluate", f"{folder}/start.pt", "--inner-lr-decay", "0.5")
                _, evaluation = run_script(f"{folder}/{rate}", "mrl_maml", *flags)
                own = [(start, rate, *(row[c] for c in columns[2:])) for row in read_csv(evaluation / "eval.csv")]
                rows += own
                print(start, rate, *(f"{float(row[3]):.2f} ± {float(row[4]):.2f}" for row in own), sep=", ", flush=True)
    write_csv("maml_baselines.csv", columns, rows)
    print_table(columns, rows)


POINT = "--rounds 2 --hidden-size 64 --num-features 16 --temperature 2.5 --num-minibatches 4 --update-epochs 3 --vf-coef 1"
SPARSE = "--gamma 0.97 --learning-rate 1e-3 --numbers-learning-rate 3e-3 --ent-coef 0.01"
ABLATIONS = {  # family: flags of the training
    "TabularMDP": "--total-timesteps 640000 --eval-tasks 4000",
    "PointNav": f"--env-id PointNav-v0 {POINT} --num-tasks 20 --trial-gamma 0.5 --total-timesteps 1600000",
    "SparsePointNav": f"--env-id SparsePointNav-v0 {POINT} {SPARSE} --total-timesteps 4000000",
}


def last_heldout_rows(run):
    """Of eval.csv: (adaptation, mean_return, stderr, num_tasks) of the last evaluation on held-out tasks."""
    rows = [row for row in read_csv(run / "eval.csv") if row["split"] == "heldout"]
    columns = ("adaptation", "mean_return", "stderr", "num_tasks")
    return [tuple(row[c] for c in columns) for row in rows if row["global_step"] == rows[-1]["global_step"]]


def ablation(families: tyro.conf.Positional[tuple[str, ...]] = tuple(ABLATIONS), seeds: tuple[int, ...] = (1,)):
    """The meta actor-critic without its meta-policy, meta-value function, meta action selection -> ablation.csv"""
    columns, rows = ("task", "flag", "seed", "adaptation", "mean_return", "stderr", "num_tasks"), []
    for family, flag, seed in itertools.product(families, ("", "policy", "value", "action-selection"), seeds):
        flag = flag and f"--no-meta-{flag}"
        with tempfile.TemporaryDirectory() as runs_dir:
            flags = f"{ABLATIONS[family]} --seed {seed} {flag} --eval-every 1000000"
            printed, run = run_script(runs_dir, "mrl_actor_critic", *flags.split())
            own = last_heldout_rows(run)
        trial = re.search(r"whole trial +(\S+) ± (\S+)", printed).groups()
        rows += [(family, flag, seed, *row) for row in (*own, ("trial", *trial, own[0][3]))]
        print(family, flag, seed, printed, flush=True)
    kept = [tuple(row.values()) for row in read_csv(RESULTS / "ablation.csv")] if (RESULTS / "ablation.csv").exists() else []
    write_csv("ablation.csv", columns, [row for row in kept if row[0] not in families] + rows)


CARTPOLE = {  # script: flags of the training
    "mrl_rl2": "--num-tasks 64 --total-timesteps 3000000 --eval-tasks 200",
    "mrl_maml": "--adapt-steps 1 --num-episodes 10 --eval-episodes 10 --total-timesteps 2000000 --eval-tasks 200",
    "mrl_actor_critic": "--max-critic-gamma 0.97 --rounds 3 --num-tasks 16 --hidden-size 64 --num-features 16 --gamma 0.98 "
    "--temperature 1 --learning-rate 1e-3 --num-minibatches 4 --update-epochs 3 --vf-coef 1 --total-timesteps 2000000 "
    "--eval-tasks 200",
}


def cartpole():
    """The README's CartPole tasks by each script, and by the best fixed linear policy -> cartpole.csv"""
    columns, rows = ("script", "adaptation", "mean_return", "stderr", "num_tasks"), []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my_tasks.py").write_text((ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0])
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder
        best, error = best_fixed_linear_policy("my_tasks:CartPoleTasks-v0")
        rows.append(("best fixed linear policy", "", best, error, 1000))
        for script, flags in CARTPOLE.items():
            flags = f"--env-id my_tasks:CartPoleTasks-v0 {flags} --eval-every 1000000"
            printed, run = run_script(f"{folder}/{script}", script, *flags.split())
            rows += [(script, *row) for row in last_heldout_rows(run)]
            print(script, printed, flush=True)
    write_csv("cartpole.csv", columns, rows)
    print_table(columns, rows)


def best_fixed_linear_policy(env_id, num_tasks=200, iterations=15, candidates=24):
    """Mean return and standard error on fresh tasks of the best sign(w'obs) that the cross-entropy method finds."""
    rng = np.random.default_rng(4)
    envs = gym.make_vec(env_id, num_tasks, vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.DISABLED})

    def returns(weights):
        envs.set_attr("task", list(envs.envs[0].unwrapped.sample_tasks(num_tasks, rng)))
        obs, _ = envs.reset(seed=int(rng.integers(2**31)))
        running, total = np.ones(num_tasks, dtype=bool), np.zeros(num_tasks)
        while running.any():
            obs, rewards, terminated, truncated, _ = envs.step((obs @ weights > 0).astype(int))
            total += rewards * running
            running &= ~(terminated | truncated)
            if (ended := terminated | truncated).any() and running.any():
                obs, _ = envs.reset(options={"reset_mask": ended})
        return total

    mean, std = np.zeros(4), np.ones(4)
    for _ in range(iterations):
        tried = rng.normal(mean, std, (candidates, 4))
        elite = tried[np.argsort([-returns(weights).mean() for weights in tried])[: candidates // 4]]
        mean, std = elite.mean(0), elite.std(0) + 0.02
    total = np.concatenate([returns(mean) for _ in range(5)])
    return total.mean(), total.std() / math.sqrt(len(total))


# Speed.


def measure(script, flags, steps_per_iteration, processes, threads, iterations, warm_up=3):
    """Medians over `iterations` after `warm_up`: env steps a second, seconds of rollout and of update."""
    total = ["--total-timesteps", str(steps_per_iteration * (warm_up + iterations)), "--eval-every", "1000000"]
    with tempfile.TemporaryDirectory() as runs_dir:
        every = [*flags.split(), *total, "--eval-tasks", "2", "--checkpoint-every", "1000000"]
        _, run = run_script(runs_dir, script, *every, processes=processes, threads=threads)
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = ("charts/SPS", "time/rollout", "time/update")
    return [statistics.median(event.value for event in events.Scalars(tag)[warm_up:]) for tag in tags]


BANDIT, MAML = "--env-id Bandit-v0 --env-kwargs k 5 n 100 ", "--num-tasks {} --num-episodes {} --adapt-steps {}"
MAML_SIZES = ((20, 20, 1), (10, 20, 1), (40, 20, 1), (20, 10, 1), (20, 40, 1), (20, 20, 2), (20, 20, 3))  # M, E, K
SPEEDS = (  # script, setting, flags, env steps of an iteration
    ("mrl_rl2", "Bandit k=5 n=100, GRU 64, 3 epochs", BANDIT + "--hidden-size 64 --update-epochs 3 --num-tasks 1024", 102_400),
    ("mrl_rl2", "Bandit, GRU 256, 8 epochs", BANDIT + "--hidden-size 256 --update-epochs 8 --num-tasks 256", 25_600),
    ("mrl_actor_critic", "TabularMDP n=10, 128 trials", "--num-tasks 32 --num-explorations 4", 12_800),
    *(
        ("mrl_maml", f"PointNav, {M} tasks, {E} episodes, K={K}", MAML.format(M, E, K), M * E * (K + 1) * 100)
        for M, E, K in MAML_SIZES
    ),
)


def speed(threads: int = 2, iterations: int = 20):
    """Training speed of each script, what MAML's cost grows with, one and two processes -> speed.csv

    A load average above the threads in use says that the machine was shared, and the figures are too low."""
    columns = ["script", "setting", "processes", "threads", "env_steps_per_second", "rollout_s", "update_s", "load_average"]
    settings = [(*setting, 1, threads) for setting in SPEEDS]
    settings += [(*setting, processes, 1) for setting in (SPEEDS[0], SPEEDS[3]) for processes in (1, 2)]
    rows = []
    for script, setting, flags, steps, processes, own_threads in settings:
        sps, rollout, update = measure(script, flags, steps, processes, own_threads, iterations)
        measured = f"{sps:.0f}", f"{rollout:.3f}", f"{update:.3f}", f"{os.getloadavg()[0]:.1f}"
        rows.append((script, setting, processes, own_threads, *measured))
        print(*rows[-1], sep=", ", flush=True)
    write_csv("speed.csv", columns, rows)
    print_table(columns, rows)


COMMANDS = players, evaluate, tables, curves, cheetah, adaptation, trajectories, sweep, baselines, ablation, cartpole, speed

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in COMMANDS})
