"""Reference players: classical algorithms, exact optima and near-optimal play, which trained agents are compared with.

    python tests/players.py        # prints a table and writes tests/results/players.csv, in some three minutes

Each family is a generator of rows, see COLUMNS; all its tasks are played side by side. Shapes: M tasks, k
arms, n pulls or episodes, S states, A actions, T steps of an episode.
"""

import csv
import functools
import itertools
from pathlib import Path

import gymnasium as gym
import numpy as np

COLUMNS = ("family", "player", "mean_return", "stderr", "num_tasks", "source")


def mean_and_stderr(returns, control, control_mean):
    """Mean and standard error of `returns` (M,), after regression on a control variate (M,) of known mean."""
    slope = np.cov(returns, control)[0, 1] / control.var(ddof=1)
    returns = returns - slope * (control - control_mean)
    return returns.mean(), returns.std(ddof=1) / np.sqrt(len(returns)), len(returns)


# BERNOULLI BANDITS: k arms with p ~ U[0, 1], n pulls
# A player maps the counts of successes and failures (M, k) and the number of pulls left to the arms to pull (M,).
def thompson(successes, failures, left, rng, optimistic=False):
    """One draw of p from the posterior; optimistic: but no less than the posterior mean (May et al. 2012)."""
    mean = (successes + 1) / (successes + failures + 2)
    return np.maximum(rng.beta(successes + 1, failures + 1), mean if optimistic else 0).argmax(1)


def ucb1(successes, failures, left, rng, width=1.0):
    """Auer et al. 2002; the statistics start at one success and one failure. Width 0 is the greedy player."""
    pulls = successes + failures + 2
    step = successes[0].sum() + failures[0].sum() + 1
    return ((successes + 1) / pulls + width * np.sqrt(2 * np.log(step) / pulls)).argmax(1)


def epsilon_greedy(successes, failures, left, rng, epsilon):
    arm = ucb1(successes, failures, left, rng, width=0.0)
    return np.where(rng.random(len(arm)) < epsilon, rng.integers(successes.shape[1], size=len(arm)), arm)


def gittins(successes, failures, left, rng, table):
    return table[left - 1][successes, failures].argmax(1)


def gittins_table(n, num_levels=50):
    """Finite-horizon Gittins index of an arm with p ~ U[0, 1]: table[h - 1][s, f] with h pulls left.

    The index is the sure reward per pull for which pulling this arm, and stopping at the best moment, is worth nothing. A
    backward sweep over h gives that worth for one reward; between 50 of them, its zero is found by interpolation.
    """
    mean = np.fromfunction(lambda s, f: (s + 1) / (s + f + 2), (n + 1, n + 1), dtype=np.float32)
    sizes = range(n, 0, -1)  # with h pulls left, at most n - h are behind us
    table = [np.zeros((size, size), dtype=np.float32) for size in sizes]
    last_worth = [mean[:size, :size] for size in sizes]  # at level 0
    for level in range(1, num_levels + 1):
        later = np.zeros((n + 1, n + 1), dtype=np.float32)
        for h, size in enumerate(sizes):
            p = mean[:size, :size]
            won, lost = later[1 : size + 1, :size], later[:size, 1 : size + 1]
            worth = p * (1 + won) + (1 - p) * lost - np.float32(level / num_levels)
            table[h] += np.clip(last_worth[h] / np.maximum(last_worth[h] - worth, 1e-9), 0, 1) / num_levels
            last_worth[h], later = worth, np.maximum(worth, 0)
    return table


def bandit_optimum(k, n):
    """Exact Bayes-optimal return. Arms are exchangeable, so a state is a sorted tuple of (successes, failures)."""

    @functools.cache
    def value(arms, left):
        if left == 0:
            return 0.0
        best = 0.0
        for s, f in set(arms):
            i, p = arms.index((s, f)), (s + 1) / (s + f + 2)
            rest = arms[:i] + arms[i + 1 :]
            won, lost = tuple(sorted([*rest, (s + 1, f)])), tuple(sorted([*rest, (s, f + 1)]))
            best = max(best, p * (1 + value(won, left - 1)) + (1 - p) * value(lost, left - 1))
        return best

    return value(((0, 0),) * min(k, n), n)  # n pulls reach n arms at most


def play_bandits(player, k, n, num_tasks, rng):
    """The return counts the expected rewards of the pulled arms; the control variate is max p, whose mean is k / (k + 1)."""
    p, rows, total = rng.random((num_tasks, k)), np.arange(num_tasks), np.zeros(num_tasks)
    successes, failures = np.zeros((2, num_tasks, k), dtype=np.int64)
    for left in range(n, 0, -1):
        arm = player(successes, failures, left, rng)
        won = rng.random(num_tasks) < p[rows, arm]
        total += p[rows, arm]
        successes[rows, arm] += won
        failures[rows, arm] += ~won
    return mean_and_stderr(total, n * p.max(1), n * k / (k + 1))


def bandit_rows(draws=2e7):  # tasks x arms x pulls of a row
    rng = np.random.default_rng(1)
    for n in (10, 100, 500):
        players = {
            "greedy": (functools.partial(ucb1, width=0.0), "Duan et al. 2016"),
            "epsilon-greedy, epsilon 0.02": (functools.partial(epsilon_greedy, epsilon=0.02), "Duan et al. 2016"),
            "Thompson sampling": (thompson, "Thompson 1933"),
            "optimistic Thompson sampling": (functools.partial(thompson, optimistic=True), "May et al. 2012"),
            "UCB1, published width": (ucb1, "Auer et al. 2002"),
            "UCB1, width tuned to 0.2": (functools.partial(ucb1, width=0.2), "Duan et al. 2016"),
            "finite-horizon Gittins index": (functools.partial(gittins, table=gittins_table(n)), "Gittins 1979"),
        }
        for k in (5, 10, 50):
            num_tasks = int(np.clip(draws / (k * n), 2000, 100_000))
            yield f"Bandit k={k} n={n}", "random", n / 2, 0.0, "exact", "expectation"
            for name, (player, source) in players.items():
                yield f"Bandit k={k} n={n}", name, *play_bandits(player, k, n, num_tasks, rng), source
            if n == 10:
                yield f"Bandit k={k} n={n}", "optimum", bandit_optimum(k, n), 0.0, "exact", "dynamic programming"


# RANDOM MDPS: P(.|s,a) ~ Dirichlet(1), mean rewards ~ N(1, 1), reward noise N(0, noise), n episodes of T steps
# A player maps transition counts (M, S, A, S), sums of rewards (M, S, A), and the steps left of the episode and of the trial
# to a policy for the rest of the episode: a list of actions in each state (M, S).
S, A, T = 10, 5, 10
KNOWN_MDP = 21.8316  # mean optimal return of an episode in a known MDP, of 3.5 million MDPs, standard error .0012


def sample_mdps(num_tasks, rng):
    transition = rng.standard_exponential((num_tasks, S, A, S))
    transition /= transition.sum(-1, keepdims=True)
    return transition, rng.normal(1, 1, (num_tasks, S, A))


def plan(transition, reward, steps, bonus=0.0):
    """Backward induction: the policy for each of the next `steps`, greedy on Q + bonus (M, S, A), and the values (M, S)."""
    transition = transition.reshape(-1, S * A, S)
    values, policy = np.zeros((len(reward), S, 1)), []
    for _ in range(steps):
        q = reward + (transition @ values).reshape(reward.shape)
        policy.insert(0, (q + bonus).argmax(-1))
        values = q.max(-1)[:, :, None]
    return policy, values[:, :, 0]


def mean_mdp(counts, reward_sum, noise=1.0):
    """Posterior means of transitions (M, S, A, S) and rewards (M, S, A), and the number of visits (M, S, A)."""
    visits = counts.sum(-1)
    return (counts + 1) / (visits + S)[..., None], (1 + reward_sum / noise**2) / (1 + visits / noise**2), visits


def psrl(counts, reward_sum, steps, left, rng):
    """Posterior sampling: the optimal policy of one MDP drawn from the posterior (Strens 2000; Osband et al. 2013)."""
    _, mean, visits = mean_mdp(counts, reward_sum)
    transition = rng.standard_gamma(counts + 1)
    transition /= transition.sum(-1, keepdims=True)
    return plan(transition, rng.normal(mean, 1 / np.sqrt(1 + visits)), steps)[0]


def count_bonus(counts, reward_sum, steps, left, rng, bonus):
    """Greedy in the posterior-mean MDP on Q plus a bonus that shrinks with the number of visits."""
    transition, reward, visits = mean_mdp(counts, reward_sum)
    return plan(transition, reward, steps, bonus / np.sqrt(visits + 1))[0]


def near_bayes(counts, reward_sum, steps, left, rng, table, noise):
    """Plans in the posterior-mean MDP with Gittins indices as rewards. A state-action pair worth visiting can expect
    about .13 of the trial's remaining steps; so many pulls are the horizon of its index."""
    transition, reward, visits = mean_mdp(counts, reward_sum, noise)
    bonus = table[max(1, round(0.13 * left))][np.minimum(visits, table.shape[1] - 1).astype(int)]
    return plan(transition, reward + bonus, steps)[0]


def near_bayes_player(n, noise=1.0):
    noise = max(noise, 1e-3)  # what the player believes it to be
    return functools.partial(near_bayes, table=gaussian_gittins_bonus(round(1.3 * n), noise), noise=noise)


def gaussian_gittins_bonus(horizon, noise=1.0, max_visits=200):
    """Index minus posterior mean of an arm whose mean is ~ N(1, 1): table[pulls left, visits so far].

    After v visits a pull is worth z + E[max(0, worth at v + 1 with one pull less)], z = posterior mean - sure reward, and
    the index is where that is zero. The grid holds z in posterior deviations.
    """
    grid = np.linspace(-5, 5, 201)
    nodes, weights = np.polynomial.hermite_e.hermegauss(51)
    weights = weights / weights.sum()  # of a normal distribution
    std = 1 / np.sqrt(1 + np.arange(max_visits + 2) / noise**2)  # of the posterior after v visits
    pulls = np.arange(horizon)[:, None]
    later = pulls * np.maximum(grid, 0) * std[-1]  # (horizon, grid), as if there were nothing more to learn
    table = np.zeros((horizon + 1, max_visits + 1))
    for v in range(max_visits, -1, -1):
        spread = np.sqrt(std[v] ** 2 - std[v + 1] ** 2)  # of the posterior mean, by one more visit
        next_z = (grid[:, None] * std[v] + spread * nodes) / std[v + 1]
        beyond = np.maximum(next_z - grid[-1], 0) @ weights * std[v + 1]  # above the grid the arm is pulled to the end
        place = np.interp(next_z, grid, np.arange(len(grid)))
        lower = np.minimum(place.astype(int), len(grid) - 2)
        interpolated = later[:, lower] + (place - lower) * (later[:, lower + 1] - later[:, lower])
        worth = grid * std[v] + interpolated @ weights + pulls * beyond  # (horizon, grid)
        table[1:, v] = [-std[v] * np.interp(0, row, grid) for row in worth]
        later[1:] = np.maximum(worth[:-1], 0)
    return table


def play_mdps(player, n, num_tasks, rng, noise=1.0, every_step=False):
    """The return counts mean rewards; the control variate is the optimal return in each MDP if it were known."""
    transition, reward = sample_mdps(num_tasks, rng)
    cumulative, rows, state = transition.cumsum(-1), np.arange(num_tasks), np.zeros(num_tasks, dtype=int)
    counts, reward_sum, total = np.zeros_like(transition), np.zeros_like(reward), np.zeros(num_tasks)
    for left in range(T * n, 0, -1):
        steps = (left - 1) % T + 1  # left of the episode
        state = state * (steps < T)  # each episode starts in state 0
        if steps == T or every_step:
            policy = player(counts, reward_sum, steps, left, rng)
        action = policy.pop(0)[rows, state]
        mean = reward[rows, state, action]
        next_state = (rng.random((num_tasks, 1)) > cumulative[rows, state, action, :-1]).sum(-1)
        total += mean
        reward_sum[rows, state, action] += mean + noise * rng.normal(size=num_tasks)
        counts[rows, state, action, next_state] += 1
        state = next_state
    return mean_and_stderr(total, n * plan(transition, reward, T)[1][:, 0], n * KNOWN_MDP)


def mdp_rows(tuned_bonus=((10, 0.6), (25, 1.0), (50, 1.5), (75, 1.5), (100, 1.5))):
    rng = np.random.default_rng(2)
    known = np.concatenate([plan(*sample_mdps(10_000, rng), T)[1][:, 0] for _ in range(20)])
    for n, b in tuned_bonus:
        bonus, num_tasks = functools.partial(count_bonus, bonus=b), 4000 if n == 10 else 1000
        players = (  # name, player, whether it plans after each step, source
            ("PSRL", psrl, False, "Strens 2000"),
            ("greedy on the posterior mean", functools.partial(count_bonus, bonus=0.0), False, "Duan et al. 2016"),
            (f"count bonus tuned to {b}, plans each episode", bonus, False, "bonus / sqrt(visits + 1)"),
            (f"count bonus tuned to {b}, plans each step", bonus, True, "bonus / sqrt(visits + 1)"),
            ("near-Bayes", near_bayes_player(n), True, "Gittins index, posterior-mean planning"),
        )
        yield f"TabularMDP n={n}", "random", T * n, 0.0, "exact", "expectation"
        for name, player, every_step, source in players:
            yield f"TabularMDP n={n}", name, *play_mdps(player, n, num_tasks, rng, every_step=every_step), source
        error = n * known.std() / np.sqrt(len(known))
        yield f"TabularMDP n={n}", "known MDP", n * known.mean(), error, len(known), "backward induction"
    for noise in (0.0, 0.5, 2.0, 4.0):
        for name, assumed in (("near-Bayes, knows the noise", noise), ("near-Bayes, takes the noise for 1", 1.0)):
            result = play_mdps(near_bayes_player(10, assumed), 10, 4000, rng, noise, every_step=True)
            yield f"TabularMDP n=10, reward noise {noise:g}", name, *result, "Gittins index"


# GRIDNAVI: 5x5 cells, a hidden goal outside the 2x2 corner of the start, +1 on it and -.1 off it, 15 steps, 4 episodes
def grid_navi_rows(steps=15):
    """Exact, from two bounds: no first episode can do better than look at a new cell in each step from the second on, and
    no later one better than with a known goal. A search shows that both hold together: there is such a first walk after
    which one shortest walk passes all cells that it left out, so a second search costs nothing.
    """
    goals = [(x, y) for x in range(5) for y in range(5) if max(x, y) > 1]
    found_at = [1.1 * (steps + 1 - t) - 0.1 * steps for t in range(steps + 1)]  # the return, by the step of arrival

    def attainable(x, y, unseen, left):
        if left == 0:
            cells = sorted(unseen, key=sum)
            return all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(cells))
        neighbours = [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
        return any(attainable(*cell, unseen - {cell}, left - 1) for cell in neighbours if cell in unseen)

    assert attainable(0, 1, frozenset(goals), steps - 1)
    first = (sum(found_at[2:]) - 0.1 * steps * (len(goals) - steps + 1)) / len(goals)  # the rest are walks in vain
    later = sum(found_at[x + y] for x, y in goals) / len(goals)
    fixed = 1.1 * (steps - 1) / len(goals) - 0.1 * steps  # in each step but the first on a cell that may be the goal
    yield "GridNavi, each episode", "best fixed policy", fixed, 0.0, "exact", "expectation"
    yield "GridNavi, each episode", "known goal", later, 0.0, "exact", "expectation"
    for n in (1, 2, 3, 4):
        yield f"GridNavi, sum of {n} episodes", "Bayes-optimal", first + (n - 1) * later, 0.0, "exact", "search"


# POINTNAV AND SPARSEPOINTNAV: a point moves by up to .1 per axis and step; every mean is over an even grid of goals
def distances(offset, steps):
    """Distances to a goal at `offset` (M, 2) after each of the next steps straight to it, each axis at full speed."""
    travelled = 0.1 * np.arange(1, steps + 1)[:, None]
    return np.linalg.norm(np.maximum(np.abs(offset[:, None]) - travelled, 0), axis=-1)  # (M, steps)


def point_nav_triangulate(goal, first, second):
    """Returns (M,) of the first episode: three steps to find the goal (M, 2), then straight to it.

    Rewards are exact distances, so the first puts the goal on a circle. After the moves `first` and `second` it is one of
    two points, mirror images in the line of both positions, unless one lies outside the square. The third move goes to
    one of them, or between them, whichever promises more; a step off the line, however small, tells which it is.
    """
    line, position = second / np.linalg.norm(second), first + second
    mirrored = 2 * (first + ((goal - first) @ line)[:, None] * line) - goal
    mirrored = np.where(np.abs(mirrored).max(1, keepdims=True) > 0.5, goal, mirrored)
    costs = []
    for target in (goal, mirrored, (goal + mirrored) / 2):
        third = position + np.clip(target - position, -0.1, 0.1)
        costs.append(sum(np.linalg.norm(x - third, axis=1) + distances(x - third, 9).sum(1) for x in (goal, mirrored)) / 2)
    return -np.linalg.norm(goal - first, axis=1) - np.linalg.norm(goal - position, axis=1) - np.min(costs, axis=0)


def point_nav_first_episode(goal, first=(0.05, 0.05), num_circles=60):
    """Mean return of triangulation with the best second move for each first reward; other first moves: -1.33 to -1.36."""
    radius = np.linalg.norm(goal - first, axis=1)
    circle = (radius / radius.max() * (num_circles - 1)).astype(int)
    moves = [np.array(move) for move in itertools.product(np.linspace(-0.1, 0.1, 9), repeat=2) if any(move)]
    returns = [np.bincount(circle, point_nav_triangulate(goal, np.array(first), move)) for move in moves]
    return np.max(returns, axis=0).sum() / len(goal)


def sparse_point_nav_sweep(goal, radius, steps=60):
    """Returns (M,) of the first episode: along the half circle from one end, and straight to the goal once it is near;
    the first reward tells its distance, and it is not behind."""
    angle = np.arange(0, np.pi, 0.001)
    arc, position, path = radius * np.stack([np.cos(angle), np.sin(angle)], -1), np.zeros(2), []
    for _ in range(steps):
        in_reach = arc[np.abs(arc - position).max(1) <= 0.1]
        position = in_reach[-1] if len(in_reach) else position + np.clip(arc[0] - position, -0.1, 0.1)
        path.append(position)
    distance = np.linalg.norm(goal[:, None] - path, axis=-1)  # (M, T)
    assert (distance < 0.2).any(1).all()
    found = (distance < 0.2).argmax(1)
    homing = 1 - distances(goal - np.array(path)[found], steps)
    in_time = np.arange(1, steps + 1) < (steps - found)[:, None]
    return 1 - distance[np.arange(len(goal)), found] + (homing * in_time).sum(1)


def point_nav_rows():
    axis = np.linspace(-0.495, 0.495, 100)
    goal = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    still = -100 * np.linalg.norm(goal, axis=1).mean()
    yield "PointNav", "standing still, the best fixed policy", still, 0.0, "grid", "expectation"
    yield "PointNav", "known goal", -distances(goal, 100).sum(1).mean(), 0.0, "grid", "straight walk"
    yield "PointNav, episode 1", "triangulation", point_nav_first_episode(goal), 0.0, "grid", "three rewards"
    angle = np.linspace(0, np.pi, 2001)
    goal = np.stack([np.cos(angle), np.sin(angle)], -1)
    place = np.minimum(0.1 * np.arange(1, 61)[:, None], np.sqrt(0.5))  # the way to the arc's middle of a quadrant
    waiting = np.linalg.norm(goal[:, None] - place, axis=-1)
    for player, distance in (("waiting on the arc", waiting), ("known goal", distances(goal, 60))):
        yield "SparsePointNav", player, np.where(distance < 0.2, 1 - distance, 0).sum(1).mean(), 0.0, "grid", "straight walk"
    for radius in (0.9, 0.86):
        mean_return = sparse_point_nav_sweep(goal, radius).mean()
        yield "SparsePointNav, episode 1", f"sweep at radius {radius} and homing", mean_return, 0.0, "grid", "simulation"


# DARK ROOM of the package toymeta: 9x9 cells, start in the middle, a goal in any of them, +1 in each step that ends on it; 20
# steps, 5 episodes
PLAN = (  # found by simulated annealing: moves up, right, down, left, and staying
    ".LDDRDLLULURULUURDRU",
    "UUULLURRRDRRDLLDRRDD",
    "DRDDDLLLLULUUUUUUURD",
    "RRDDDDRRULURUUUUUULL",
    "DDDDLLLL............",
)
PRICES = 31, 36, 27, 28, 19, 20, 15, 16, 13  # of a cell, by its distance from the start: from the dual of a linear program


def dark_room_rows(steps=20):
    """Returns of each episode: exact for the first, the last and a known goal, and bounds for the sum of all.

    Until the goal is found, nothing is learned but where it is not, so a player chooses no more than one walk for each
    episode. Once it is found, the best is to stay there, and to walk straight to it in later episodes. So if a cell is the
    goal, to step on it for the first time in step t pays `steps + 1 - t`, and its `known` return in each later episode.

    No first episode can do better than step on a new cell each time. PLAN does so in four episodes, after which one cell is
    left, so its fifth episode is that of a known goal. A better sum is possible only by another order of the cells.

    The upper bound: put a price on each cell. No plan can have more than the prices of all cells together and, for each
    episode, the most that one walk gains over the prices of its cells, whatever the prices are. These most profitable walks
    are found by dynamic programming, where a walk may gain from a cell again once that is not one of the last four.
    """
    start, cells = (4, 4), list(itertools.product(range(9), repeat=2))
    distance = {(x, y): abs(x - 4) + abs(y - 4) for x, y in cells}
    known = {cell: steps + 1 - max(1, distance[cell]) for cell in cells}
    moves = {".": (0, 0), "U": (-1, 0), "R": (0, 1), "D": (1, 0), "L": (0, -1)}
    reach = {(x, y): {(x + i, y + j) for i, j in moves.values()} & {*cells} for x, y in cells}

    seen, planned = set(), []
    for walk in PLAN:
        planned.append(sum(known[cell] for cell in seen))
        x, y = start
        for t, move in enumerate(walk, 1):
            x, y = x + moves[move][0], y + moves[move][1]
            planned[-1] += (steps + 1 - t) * ((x, y) not in seen)
            seen.add((x, y))
    assert planned[0] == sum(range(steps + 1)) and planned[-1] == sum(known.values()) and seen == {*cells}

    bound = sum(PRICES[d] for d in distance.values())
    for later in reversed(range(len(PLAN))):
        gains = {(): 0}  # of the best walk so far, by its last four cells
        for t in range(1, steps + 1):
            profit = {c: max(0, steps + 1 - t + later * known[c] - PRICES[distance[c]]) for c in cells}
            before, gains = gains, {}
            for last, gain in before.items():
                for cell in reach[last[-1] if last else start]:
                    now = (*last[-3:], cell)
                    gains[now] = max(gains.get(now, 0), gain + profit[cell] * (cell not in last))
        bound += max(gains.values())

    yield "DarkRoom, each episode", "one that reads no rewards", steps / 81, 0.0, "exact", "expectation"
    yield "DarkRoom, each episode", "known goal", sum(known.values()) / 81, 0.0, "exact", "expectation"
    yield "DarkRoom, episode 1", "Bayes-optimal", planned[0] / 81, 0.0, "exact", "a new cell in each step"
    for k, x in enumerate(planned, 1):
        yield f"DarkRoom, episode {k}", "near-Bayes", x / 81, 0.0, "exact", "simulated annealing"
    yield "DarkRoom, sum of 5 episodes", "near-Bayes", sum(planned) / 81, 0.0, "exact", "simulated annealing"
    yield "DarkRoom, sum of 5 episodes", "upper bound", bound / 81, 0.0, "exact", "linear programming"


# DARK KEY-TO-DOOR of toymeta: +1 for the key, once an episode, and +1 for the door with the key; the start is drawn
def key_to_door_rows(num_tasks=1000):
    """A player that goes to the nearest cell which may hold what it looks for, of equal ones to that with the fewest such
    neighbours, and straight to what it has found. Who knows the task gets both in each episode, in 33 steps at most."""
    env, rng = gym.make("dark_room:DarkKeyToDoor-v0"), np.random.default_rng(0)
    returns = np.zeros((num_tasks, 5))
    for i, task in enumerate(env.unwrapped.sample_tasks(num_tasks, rng)):
        env.unwrapped.task = task
        found, possible = {}, np.ones((2, 9, 9), bool)  # where the key may be, and the door
        for k in range(5):
            state, has_key, done = env.reset(seed=int(rng.integers(2**31)))[0], 0, False
            while not done:
                position = np.array(divmod(state, 9))
                if (goal := found.get(has_key)) is None:
                    cells, padded = np.argwhere(possible[has_key]), np.pad(possible[has_key].astype(int), 1)
                    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
                    distances = np.abs(cells - position).sum(1)
                    goal = cells[np.lexsort((neighbours[tuple(cells.T)], distances))[0]]
                x, y = goal - position
                action = (3 if x > 0 else 1) if x else (2 if y > 0 else 4) if y else 0  # down, up, right, left, stay
                state, reward, terminated, truncated, _ = env.step(action)
                possible[has_key][divmod(state, 9)], done = False, terminated or truncated
                if reward:
                    found[has_key], possible[1][divmod(state, 9)], has_key = np.array(divmod(state, 9)), False, 1
                returns[i, k] += reward
    yield "DarkKeyToDoor, each episode", "known task", 2.0, 0.0, "exact", "straight walk"
    for k, x in enumerate(returns.T, 1):
        yield f"DarkKeyToDoor, episode {k}", "nearest unseen cell", x.mean(), x.std() / num_tasks**0.5, num_tasks, "simulation"


if __name__ == "__main__":
    path, rows = Path(__file__).parent / "results" / "players.csv", [COLUMNS]
    for family_rows in (grid_navi_rows, point_nav_rows, dark_room_rows, key_to_door_rows, mdp_rows, bandit_rows):
        for family, player, mean, stderr, num_tasks, source in family_rows():
            rows.append((family, player, f"{mean:.4f}", f"{stderr:.4f}", num_tasks, source))
            print(f"{family:31} {player:46} {mean:10.3f} ± {stderr:.3f}", flush=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
