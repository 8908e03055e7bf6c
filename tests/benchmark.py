"""Remakes every table and picture of the README. Everything it writes goes to tests/results/.

python tests/benchmark.py players       reference players: classical algorithms and exact optima, in numpy
"""

import csv
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import tyro

RESULTS = Path(__file__).resolve().parent / "results"


def write_csv(name, columns, rows):
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


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
    yield "GridNavi, 4 episodes", "random", 4 * grid_navi_random(), 0.0, "exact"
    yield "GridNavi, 4 episodes", "Bayes-optimal", first + 3 * later, 0.0, "exact"
    yield "GridNavi, first episode", "Bayes-optimal", first, 0.0, "exact"
    yield "GridNavi, later episodes", "Bayes-optimal", later, 0.0, "exact"
    yield "GridNavi, an episode", "known goal", later, 0.0, "exact"

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
        ("PointNav, an episode", "standing still", point_still),
        ("PointNav, an episode", "known goal", point_known),
        ("SparsePointNav, an episode", "known goal", sparse_known),
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


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"players": players})
