"""The reference players against exact values and against each other."""

import functools

import numpy as np
import players
import pytest


def test_bandit_optimum_is_exact():
    values = [players.bandit_optimum(k, 10) for k in (5, 10, 50)]
    assert values == pytest.approx([6.660, 6.714, 6.714], abs=5e-4)
    assert players.bandit_optimum(2, 2) == pytest.approx(1 / 2 + (1 / 2) * (2 / 3) + (1 / 2) * (1 / 2))


def test_gittins_player_reaches_the_optimum_of_two_arms():
    player = functools.partial(players.gittins, table=players.gittins_table(100))
    mean, stderr, _ = players.play_bandits(player, 2, 100, 20_000, np.random.default_rng(0))
    assert stderr < 0.03
    assert mean == pytest.approx(64.918, abs=3 * stderr)


def test_gaussian_gittins_bonus():
    table = players.gaussian_gittins_bonus(10)
    assert table[10, :4] == pytest.approx([0.734, 0.455, 0.336, 0.268], abs=2e-3)
    assert table[1] == pytest.approx(0, abs=1e-9)  # the last pull has nothing to learn for
    silent = players.gaussian_gittins_bonus(13, noise=1e-3)  # one visit tells all: z + 12 E[max(0, z + N(0, 1))] is zero
    assert silent[13, 0] == pytest.approx(1.0, abs=5e-3)
    # Two pulls: z + E[max(0, z + spread * N(0, 1))] is zero, where one visit moves the mean by a spread of sqrt(1 / 2).
    draws = np.random.default_rng(0).normal(0, np.sqrt(1 / 2), 1_000_000)
    assert -table[2, 0] + np.maximum(0, -table[2, 0] + draws).mean() == pytest.approx(0, abs=5e-3)


def test_near_bayes_player():
    player = players.near_bayes_player(10)
    mean, stderr, _ = players.play_mdps(player, 10, 300, np.random.default_rng(0), every_step=True)
    assert stderr < 1.5
    assert mean == pytest.approx(162.6, abs=3 * stderr)


def test_knowing_less_noise_helps():
    rng = np.random.default_rng(0)
    silent, noisy = (
        players.play_mdps(players.near_bayes_player(10, noise), 10, 300, rng, noise, every_step=True)[0] for noise in (0, 4)
    )
    assert noisy < 150 < 170 < silent < 10 * players.KNOWN_MDP


def test_navigation():
    rows = {row[:2]: row[2] for row in (*players.grid_navi_rows(), *players.point_nav_rows())}
    cumulative = [rows[f"GridNavi, sum of {n} episodes", "Bayes-optimal"] for n in (1, 2, 3, 4)]
    assert cumulative == pytest.approx([4, 15.07, 26.14, 37.21], abs=5e-3)
    assert rows["PointNav", "known goal"] == pytest.approx(-0.506, abs=1e-3)
    assert -1.4 < rows["PointNav, episode 1", "triangulation"] < -1.3
    assert rows["SparsePointNav", "known goal"] == pytest.approx(53.4, abs=0.05)
    assert rows["SparsePointNav, episode 1", "sweep at radius 0.9 and homing"] == pytest.approx(41, abs=0.1)
