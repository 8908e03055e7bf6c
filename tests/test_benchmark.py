"""What the experiments of benchmark.py measure with, and the curves of figures.py."""

import json

import benchmark
import figures
import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmark import RESULTS, ROOT, MovedGoal, NoisyMDP, linear_probe


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


def test_curves_are_means_over_seeds_for_each_setting(tmp_path):
    settings = {"a": (1, 0.1, 3.0), "b": (2, 0.1, 5.0), "c": (1, 0.2, 7.0), "evaluate__a": (1, 0.1, 99.0)}
    for name, (seed, learning_rate, final) in settings.items():
        (tmp_path / name).mkdir()
        args = {"exp_name": "x", "env_id": "m:Side-v0", "env_kwargs": {}, "seed": seed, "learning_rate": learning_rate}
        (tmp_path / name / "args.json").write_text(json.dumps(args))
        rows = "10,heldout,1,0,0,9\n10,heldout,trial,1,0,9\n20,train,trial,50,0,9\n20,heldout,trial,"
        text = f"global_step,split,adaptation,mean_return,stderr,num_tasks\n{rows}{final},0,9\n"
        (tmp_path / name / "eval.csv").write_text(text)
    (tmp_path / "empty").mkdir()
    figures.curves(tuple(sorted(tmp_path.iterdir())), out=tmp_path / "curves.png")
    [axis] = plt.gcf().axes
    assert axis.get_title() == "Side-v0" and (tmp_path / "curves.png").stat().st_size > 0
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {"x learning_rate=0.1 (n = 2)": [[10, 1], [20, 4]], "x learning_rate=0.2 (n = 1)": [[10, 1], [20, 7]]}


def test_no_figure_has_drifted():
    """Evaluations are those of the agents that are stored, and the tables in the READMEs those of the CSV files."""
    for name in ("evaluations.csv", "uncertain.csv"):
        steps = {(row["name"], int(row["env_steps"])) for row in benchmark.read(name)}
        assert steps == {(agent, torch.load(RESULTS / f"{agent}.pt", weights_only=True)["global_step"]) for agent, _ in steps}
    texts = [path.read_text() for path in (ROOT / "README.md", RESULTS / "README.md")]
    assert benchmark.readme_table() in texts[0]
    assert all(text in texts[1] for text in (benchmark.family_tables(), benchmark.training_commands()))
