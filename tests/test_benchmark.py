"""What the experiments of benchmark.py measure with."""

import numpy as np
import torch
from benchmark import MovedGoal, NoisyMDP, linear_probe


def test_goal_moves_after_two_episodes():
    envs = MovedGoal(num_envs=3, senses="ppvv")
    envs.task = tasks = envs.sample_tasks(3, np.random.default_rng(0))
    for episode in range(4):
        envs.reset(seed=0, options=None if episode == 0 else {"reset_mask": np.ones(3, dtype=bool)})
        goals = tasks[:, :2] if episode < 2 else tasks[[2, 0, 1], :2]
        np.testing.assert_array_equal(envs.tasks[:, :2], goals)
        np.testing.assert_array_equal(envs.tasks[:, 2:], tasks[:, 2:])  # the senses stay


def test_linear_probe_reads_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    goals = torch.arange(2000) % 5
    states = torch.randn(5, 8)[goals] + 0.1 * torch.randn(2000, 8)
    for hidden, least, most in ((states, 0.99, 1), (torch.randn(2000, 8), 0.1, 0.3)):
        logits = linear_probe(hidden[:1000], goals[:1000])
        accuracy = (logits(hidden[1000:]).argmax(-1) == goals[1000:]).double().mean()
        assert least <= accuracy <= most


def test_noise_and_slips_of_random_mdps():
    for noise, slips in ((0.0, 0.0), (3.0, 0.0), (0.0, 1.0)):
        envs = NoisyMDP(20_000, noise, slips)
        envs.task = envs.sample_tasks(1, np.random.default_rng(0)).repeat(20_000, axis=0)  # one task, in all of them
        envs.reset(seed=0)
        means = envs.tasks[0, 0, :, 10]  # of the five actions in state 0
        obs, rewards, *_ = envs.step(np.full(20_000, 2))
        taken = np.abs(rewards[:, None] - means).argmin(axis=1) if noise == 0 else np.full(20_000, 2)
        np.testing.assert_allclose(
            np.bincount(taken, minlength=5) / 20_000, np.full(5, 0.2) if slips else np.eye(5)[2], atol=0.02
        )
        np.testing.assert_allclose((rewards - means[taken]).std(), noise, atol=0.05)
        np.testing.assert_allclose(obs.mean(0), envs.tasks[0, 0, taken, :10].mean(0), atol=0.02)
