"""Draws every picture.

python tests/figures.py curves runs/*            # any runs: held-out return against steps -> ./curves.png
python tests/figures.py curves runs/* --tag losses/entropy --out entropy.png
python tests/figures.py grid_navi                # the other pictures are of the agents in tests/results, and go there
python tests/figures.py sweep
python tests/figures.py trajectories
python tests/figures.py adaptation
python tests/figures.py cross_modal
python tests/figures.py defaults
"""

import csv
import importlib
import json
import re
import sys
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results"
SCRIPTS = {"rl2": "RL²", "maml": "MAML", "actor_critic": "meta actor-critic"}
NOT_COMPARED = {"seed", "eval_every"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})


def panels(rows, columns, width, height, **options):
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="compressed", **options)
    return figure, axes.flat


def read(name):
    return list(csv.DictReader((RESULTS / name).open(newline="")))


# LEARNING CURVES
def load_curve(run, tag):
    """Steps (N) and values (N) of a tag of TensorBoard, or of the held-out return of the trial or after the last step."""
    if tag:
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars(tag)
        return np.array([[event.step, event.value] for event in events]).T
    rows = [row for row in csv.DictReader((run / "eval.csv").open(newline="")) if row["split"] == "heldout"]
    rows = [row for row in rows if row["adaptation"] == rows[-1]["adaptation"]]
    return np.array([[float(row["global_step"]), float(row["mean_return"])] for row in rows]).T


def curves(runs: tyro.conf.Positional[tuple[Path, ...]], tag: str = "", out: Path = Path("curves.png")):
    """Runs grouped by every argument that differs, a panel per task family: mean and standard error over seeds."""
    groups = defaultdict(lambda: defaultdict(list))  # family -> arguments -> runs
    for run in runs:
        if run.name.startswith("evaluate__") or not (run / "eval.csv").exists():
            print(f"{run}: an evaluation, or no eval.csv: left out")
            continue
        args = json.loads((run / "args.json").read_text())
        family = " ".join([args["env_id"].split(":")[-1], *(f"{k}={v}" for k, v in args["env_kwargs"].items())])
        args = {k: str(v) for k, v in args.items() if k not in NOT_COMPARED | {"env_id", "env_kwargs"}}
        groups[family][tuple(sorted(args.items()))].append(run)
    figure, axes = panels(1, len(groups), 6, 4.2)
    for axis, (family, settings) in zip(axes, groups.items(), strict=True):
        for colour, (args, members) in zip(COLOURS * 9, settings.items(), strict=False):
            args = dict(args)
            siblings = [dict(other) for other in settings if dict(other)["exp_name"] == args["exp_name"]]
            differing = [k for k in args if any(other.get(k) != args[k] for other in siblings)]
            label = " ".join([args["exp_name"], *(f"{k}={args[k]}" for k in differing)])
            points = [load_curve(run, tag) for run in members]
            first, last = max(x[0] for x, _ in points), min(x[-1] for x, _ in points)
            grid = np.unique([step for x, _ in points for step in x if first <= step <= last] + [first])
            values = np.array([np.interp(grid, x, y) for x, y in points])  # (seeds, N)
            mean, error = values.mean(0), values.std(0, ddof=len(values) > 1) / len(values) ** 0.5
            marker = "o-" if len(grid) < 30 else "-"
            axis.plot(grid, mean, marker, color=colour, markersize=3, label=f"{label} (n = {len(values)})")
            axis.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=family, xlabel="environment steps", ylabel=tag or "held-out return")
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(out, dpi=130)


# WHAT AGENTS DO
class Recorder(gym.vector.VectorWrapper):
    """Keeps the observations of each round of episodes, (T + 1, N, D), of families whose episodes all end together."""

    def reset(self, **kwargs):
        obs, infos = self.env.reset(**kwargs)
        self.rounds = [*vars(self).get("rounds", []), [np.array(obs)]]
        return obs, infos

    def step(self, actions):
        obs, *others = self.env.step(actions)
        self.rounds[-1].append(np.array(obs))
        return obs, *others


def play(name, num_tasks=None, tasks=None):
    """Lets a stored agent play `tasks`, or the first of the held-out ones that `--evaluate` plays.

    Returns the tasks, their returns by episode or step, and the paths (rounds, T + 1, tasks, D), one per task and round."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module("mrl_" + next(key for key in SCRIPTS if name.startswith(key)))
    checkpoint = torch.load(RESULTS / f"{name}.pt", weights_only=True)
    known = {field.name for field in fields(script.Args)}
    args = script.Args(**{key: value for key, value in checkpoint["args"].items() if key in known})
    args.eval_tasks = len(tasks) if tasks else args.num_tasks
    per_task = 20 if script.__name__ == "mrl_maml" else 1  # MAML plays several episodes of a task side by side
    envs = Recorder(script.make_envs(args, args.eval_tasks * per_task))
    space, obs_dim = envs.single_action_space, envs.single_observation_space.shape[0]
    if "actor" in name:
        agent = script.Agent(torch.zeros(1, obs_dim), torch.zeros(1), space, args, checkpoint["agent"])
    else:
        agent = script.Agent(obs_dim, space, args)
    agent.load_state_dict(checkpoint["agent"])
    if tasks is None:
        tasks = script.sample_tasks(envs, args.eval_tasks, script.seed_all(args.seed, 0, script.HELDOUT_TASKS))[:num_tasks]
    returns = script.evaluate(agent, envs, tasks, args)
    paths = np.array([obs for obs in envs.rounds if len(obs) > 1])[:, :, ::per_task][:, :, : len(tasks)]
    return tasks, returns, paths


def grid_navi(goals: tuple[tuple[int, int], ...] = ((3, 3), (2, 1)), out: Path = RESULTS / "grid_navi.png"):
    """GridNavi: rl2_grid_navi.pt looks for a hidden goal in the first episode of a trial and walks to it in the next."""
    tasks, _, paths = play("rl2_grid_navi", tasks=[np.array(goal) for goal in goals])
    figure, axes = panels(len(tasks), 4, 2.1, 2.3)
    for axis, (i, k) in zip(axes, np.ndindex(len(tasks), 4), strict=True):
        goal, path = tasks[i], paths[k, :, i]
        arrival = (path == goal).all(1).argmax()
        title = f"episode {k + 1}: " + (f"{arrival} steps" if arrival else "not found")
        path = path[: arrival + 1] if arrival else path
        path = path + np.linspace(-0.12, 0.12, len(path))[:, None]  # so that a way back is seen
        axis.add_patch(plt.Rectangle(goal - 0.5, 1, 1, color="#F0E442", label="hidden goal"))
        axis.plot(*path.T, color=COLOURS[0], linewidth=2)
        axis.plot(*path[0], "o", color="black", markersize=5, label="start")
        axis.plot(*path[-1], "o", color=COLOURS[1], markersize=7, label="last position")
        cells = np.arange(6) - 0.5
        axis.set(xlim=cells[[0, -1]], ylim=cells[[0, -1]], aspect="equal", xticks=cells, yticks=cells)
        axis.set_title(title, fontsize=10)
        axis.grid(color="0.85")
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.spines[:].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=130)


def draw_paths(name, num_tasks, title, width, height, limits, out):
    """The paths of an agent in held-out tasks, a panel per episode or step, with the mean return in them and in all tasks."""
    tasks, returns, paths = play(name, num_tasks)
    figure, axes = panels(1, len(paths), width, height, sharey=True)
    everywhere = {row["adaptation"]: row for row in read("evaluations.csv") if row["name"] == name}
    for k, axis, rounds in zip(returns, axes, paths, strict=False):
        for colour, goal, path in zip(COLOURS, tasks, rounds.swapaxes(0, 1), strict=False):
            axis.plot(*path.T, color=colour, linewidth=1.2, alpha=0.85)
            axis.plot(*goal, "*", color=colour, markersize=13, markeredgecolor="black", zorder=3)
        axis.plot(0, 0, "o", color="black", markersize=6, zorder=3, label="start")
        axis.plot(
            [], [], "*", color="white", markersize=11, markeredgecolor="black", label="hidden goal, coloured as its path"
        )
        text = f"{title} {k}\nmean return {returns[k].mean():.1f}"
        if row := everywhere.get(str(k)):
            text += f"\n({float(row['mean_return']):.1f} over {row['num_tasks']} tasks)"
        axis.set(title=text, aspect="equal", xlabel="x", xlim=limits[0], ylim=limits[1])
    axes[0].set_ylabel("y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(out, dpi=130)


def sweep(name: str = "actor_critic_sparse_point_nav", num_tasks: int = 6, out: Path = RESULTS / "sweep.png"):
    """SparsePointNav: an agent searches in the first episode of a trial, and goes to what it found in the next."""
    draw_paths(name, num_tasks, "episode", 4.6, 4.2, [(-1.35, 1.35), (-0.4, 1.35)], out)


def trajectories(name: str = "maml_point_nav", num_tasks: int = 6, out: Path = RESULTS / "trajectories.png"):
    """PointNav: where a learner goes before and after each adaptation step."""
    draw_paths(name, num_tasks, "adaptation steps before:", 3.2, 4.6, [(-0.65, 0.65), (-0.65, 0.65)], out)


def adaptation(out: Path = RESULTS / "adaptation.png"):
    """Return against the episode of the trial, or MAML's step, of the agents in evaluations.csv, but for bandits."""
    agents, players = defaultdict(lambda: defaultdict(list)), read("players.csv")
    for row in read("evaluations.csv"):
        if row["adaptation"] != "trial" and not re.match("Bandit|TabularMDP n=(25|50|75)", row["family"]):
            agents[row["family"]][row["name"]].append([float(row[c]) for c in ("adaptation", "mean_return", "stderr")])
    figure, axes = panels((len(agents) + 3) // 4, min(len(agents), 4), 4.2, 4)
    for axis, (family, lines) in zip(axes, agents.items(), strict=False):
        for name, points in lines.items():
            key = next(key for key in SCRIPTS if name.startswith(key))
            before, mean, error = np.array(points).T - [[key != "maml"], [0], [0]]
            style = "s--" if key == "maml" else "o-" if len(mean) < 20 else "-"
            colour = COLOURS[4 if name.endswith(("long", "apart")) else list(SCRIPTS).index(key)]
            label = f"{name}, {'steps' if key == 'maml' else 'episodes'}"
            axis.errorbar(before, mean, error, fmt=style, color=colour, markersize=4, label=label)
        episodes = min(10, int(family.partition("n=")[2] or 1))  # or tenths of a trial: players have sums over it
        for row in players:
            known = row["player"] in ("known goal", "known task", "near-Bayes")
            if known and row["family"].removesuffix(", each episode") == family:
                label = row["player"] + " (mean of the trial)" * (episodes > 1)
                axis.axhline(float(row["mean_return"]) / episodes, color="0.4", linestyle=":", label=label)
        before = "tenths of the trial" if family.endswith("n=100") else "episodes or adaptation steps"
        axis.set(title=family, xlabel=f"{before} before", ylabel="return of the next episode")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    for axis in axes[len(agents) :]:
        axis.axis("off")
    figure.savefig(out, dpi=130)


def cross_modal(out: Path = RESULTS / "cross_modal.png"):
    """Return of each episode under patterns of senses, of agents trained with and without a switch (cross_modal.csv): mean
    and standard error over seeds."""
    lines = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in read("cross_modal.csv"):
        if row["adaptation"] != "trial":
            lines[row["name"]][row["senses"]][row["seed"]].append(float(row["mean_return"]))
    titles = {"rl2_cross_modal": "trained with switches", "rl2_cross_modal_apart": "trained without a switch"}
    figure, axes = panels(1, 2, 5, 3.4, sharey=True)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for senses, by_seed in lines[name].items():
            returns = np.array([*by_seed.values()])  # (seeds, 4)
            stderr = returns.std(0, ddof=min(1, len(returns) - 1)) / len(returns) ** 0.5
            pattern, _, moved = senses.partition(" ")
            colour = COLOURS[("pppp", "vvvv", "ppvv", "vvpp").index(pattern)]
            label = f"{pattern}, the goal moves" if moved else pattern
            style = "o--" if moved else "o-"
            axis.errorbar(range(1, 5), returns.mean(0), stderr, fmt=style, color=colour, markersize=4, label=label)
        axis.axhline(11.045, color="0.4", linestyle=":", label="best possible, goal known")  # of the 4000 tasks played
        axis.set(title=title, xlabel="episode of the trial", xticks=range(1, 5), ylabel="return")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(out, dpi=130)


LEVELS = {  # return of an episode (bandits: of a tenth of the trial) of the best policy without and with knowledge of the task
    "Bandit k=5 n=10": (0.5, 5 / 6),
    "Bandit k=5 n=100": (5, 50 / 6),
    "TabularMDP n=10": (10, 21.83),
    "GridNavi": (-0.767, 11.071),
    "CrossModalGridNavi": (-0.767, 11.071),
    "PointNav": (-38.26, -0.51),
    "SparsePointNav": (6.27, 53.38),
    "CartPole": (0, 200),  # all that there is, since the best policy that knows nothing has not been computed
}


def defaults(out: Path = RESULTS / "defaults.png"):
    """Share of what knowing the task is worth that each script gets with default flags in the last episode (defaults.csv)."""
    groups = defaultdict(list)
    for row in read("defaults.csv"):
        if row["adaptation"] != "trial" and row["family"] in LEVELS:
            groups[row["script"].removeprefix("mrl_"), row["family"], int(row["adaptation"])].append(float(row["mean_return"]))
    figure, [axis] = panels(1, 1, 10, 3.4)
    for i, (key, script) in enumerate(SCRIPTS.items()):
        axis.bar(0, 0, color=COLOURS[i], label=script)
        for j, (family, (blind, known)) in enumerate(LEVELS.items()):
            last = max((k for s, f, k in groups if (s, f) == (key, family)), default=None)
            if last is not None:
                shares = (np.array(groups[key, family, last]) - blind) / (known - blind)
                error = shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else None
                axis.bar(j + 0.27 * (i - 1), shares.mean(), 0.25, yerr=error, color=COLOURS[i])
    axis.axhline(1, color="0.4", linestyle=":")
    axis.set_xticks(range(len(LEVELS)), [family.replace(" ", "\n", 1) for family in LEVELS], fontsize=8)
    axis.set(ylabel="share of the gain from\nknowing the task", ylim=(0, 1.05))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(out, dpi=130)


COMMANDS = curves, grid_navi, sweep, trajectories, adaptation, cross_modal, defaults

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({command.__name__: command for command in COMMANDS})
