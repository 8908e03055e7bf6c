"""Each script as its user runs it: train, stop, resume, evaluate, bad input, several processes."""

import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ARMS, ROOT, STEPS, TINY, changed, each, equal, load, messages, results, run, scalars, start, torchrun, train


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


@each
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
    rates = [group["lr"] for group in load(run_dir)["optimizer"]["param_groups"]]
    assert rates == pytest.approx([factor * logged["charts/learning_rate"][-1][1] for factor in factors])
    table = (run_dir.parents[1] / "stdout").read_text()
    for name, mean, stderr, _ in results(run_dir):
        assert f"{name:>12} {float(mean):10.3f} ± {float(stderr):.3f}" in table
    line = r"^The return (.*): last minus first is (.*), (.*) standard errors\.$"
    [(verdict, gain, score)] = re.findall(line, table, flags=re.MULTILINE)
    assert verdict == ("rises" if float(score) > 3 else "falls" if float(score) < -3 else "stays level")
    means = [float(row[1]) for row in results(run_dir) if row[0] != "trial"]
    assert float(gain) == pytest.approx(means[-1] - means[0], abs=2e-3)


@each
def test_evaluate_plays_as_the_trained_agent_did(script, trained, tmp_path):
    """Trap 13: save, load, evaluate equals the last evaluation of the training to the last digit, as often as one likes."""
    path = trained(script) / "checkpoint.pt"
    for _ in range(2):
        code, _, err = run(script, f"--evaluate {path}", tmp_path)
        assert code == 0 and messages(err) == [], err  # above all not a line to resume, which would change the agent's file
    evaluations = list((tmp_path / "runs").iterdir())
    assert len(evaluations) == 2 and all(folder.name.startswith("evaluate__Bandit-v0__") for folder in evaluations)
    assert results(evaluations[0]) == results(evaluations[1]) == results(path.parent)
    for n in (3, 1):  # all of a trial that is shorter than in the training; two episodes are compared, if there are two
        code, out, _ = run(script, f"--evaluate {path} --eval-tasks 7 --env-kwargs n {n}", tmp_path)
        played = re.findall(r"^ +(\w+) .* ± ", out, flags=re.MULTILINE)
        assert code == 0 and "7 held-out tasks" in out
        assert played == (["0", "1"] if script == "mrl_maml" else [*"123"[:n], "trial"])
        assert ("The return" in out) == (n > 1 or script == "mrl_maml")


def test_the_number_of_episodes_follows_the_family_evaluated(tmp_path):
    """MAML's default, 0, is kept as such, so that an agent evaluated on longer trials adapts on longer ones."""
    run_dir = train("mrl_maml", f"{ARMS} --num-episodes 0 --total-timesteps 1", tmp_path)
    assert load(run_dir)["args"]["num_episodes"] == 0 and load(run_dir)["global_step"] == 2 * STEPS["mrl_maml"]


@each
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

    def check():
        assert equal(load(whole), load(run_dir))
        assert (whole / "eval.csv").read_bytes() == (run_dir / "eval.csv").read_bytes()

    check()
    assert scalars(whole) == scalars(run_dir)
    assert run(script, f"--resume {paths[0]}", tmp_path)[0] == 0  # there is nothing left to do
    check()
    copied = shutil.copy(paths[0], run_dir / "kept.pt")  # the run goes on in the file that is named
    assert run(script, f"--resume {copied} --total-timesteps {21 * STEPS[script]}", tmp_path)[0] == 0
    assert torch.load(copied, weights_only=True)["iteration"] == 21 and equal(load(whole), load(run_dir))


@each
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


@each
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


BAD = {  # flags, and what the one line must name
    "--total-timesteps 0": "--total-timesteps 0: give a number from 1",
    "--num-tasks -3": "--num-tasks -3: give a number from 0",
    "--eval-tasks 1": "--eval-tasks 1: give a number from 2",
    "--learning-rate nan": "--learning-rate nan: give a number",
    "--gamma 2": "--gamma 2.0: give a number from 0 to 1",
    "--torch-threads 0": "--torch-threads 0: give a number from 1",
    "--torch-threads 100000": "--torch-threads 100000: give a number from 1",
    "--device cuda": "each process needs a GPU",
    "--env-kwargs arms 5": "arms",
    "--env-id CartPoll-v1 --env-kwargs": "Did you mean: `CartPole`",
    "--env-id CartPole-v1 --env-kwargs": "CartPole-v1: it has no `sample_tasks`",
    "--env-id nothing:Tasks-v0": "nothing",
    "--env-id ./families.py:Side-v0": "give families:Side-v0",
    "--env-id ../there/families:Side-v0": "give families:Side-v0",
    "--resume nowhere.pt": "nowhere.pt",
    "--resume ''": "not a whole checkpoint",
    "--evaluate truncated.pt": "truncated.pt",
    "--evaluate attack.pt": "attack.pt",
}


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@each
def test_bad_input_is_one_line_and_nothing_created(script, trained, tmp_path):
    whole = (trained(script) / "checkpoint.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "attack.pt").write_bytes(pickle.dumps(Attack()))
    for flags, named in BAD.items():
        code, out, err = run(script, f"{TINY[script]} {ARMS} {flags}", tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
        assert code == 2 and out == "" and named in err and len(messages(err)) == 1, (flags, err)
        assert err.startswith(f"{script}.py: ") and len([*tmp_path.iterdir()]) == 4, (flags, err)


@each
def test_checkpoints_of_another_agent(script, trained, tmp_path):
    others = [(other, "") for other in TINY if other != script]
    for other, flags in [(script, "--hidden-size 9"), (script, "--env-kwargs k 3"), *others]:
        code, out, err = run(script, f"--evaluate {trained(other)}/checkpoint.pt {flags}", tmp_path)
        assert code == 2 and out == "" and "no agent for these flags" in err, (other, flags, err)
        assert len(messages(err)) == (1 if other == script else 2) and not (tmp_path / "runs").exists()


@each
def test_changed_copy_reads_the_checkpoints_of_its_original(script, trained, tmp_path):
    """A renamed copy, with one flag more and one less: it plays alike, and says in a line what was ignored or left out."""
    new_flag = "    my_flag: int = 3  # my own\n    learning_rate: float"
    changes = ("    learning_rate: float", new_flag), ("    exp_name: str", "    other: str"), ("{args.exp_name}", "mine")
    copy = changed(script, tmp_path / "my_copy.py", *changes)
    code, _, err = run(copy, f"--evaluate {trained(script)}/checkpoint.pt", tmp_path)
    assert code == 0 and "ignored: ['exp_name']; default: ['my_flag', 'other']" in messages(err)[0], err
    [run_dir] = (tmp_path / "runs").iterdir()
    assert results(run_dir) == results(trained(script))


@each
def test_two_processes_hold_the_same_weights(script, tmp_path):
    save = "torch.save(agent.state_dict(), 'other.pt')\n        os._exit(0)"
    copy = changed(script, tmp_path / "copy.py", ("os._exit(0)", save))
    shutil.copy(ROOT / "tests/odd_families.py", tmp_path / "families.py")
    for env, steps in ((ARMS, STEPS[script]), ("--env-id families:Ranks-v0 --eval-tasks 5", 80)):
        runs = f"runs of {steps}"
        argv = f"{TINY[script]} {env} --total-timesteps {3 * steps} --runs-dir '{runs}'"
        codes, errs = torchrun(copy, argv, tmp_path)
        assert codes == [0, 0] and errs[1] == "", errs
        [run_dir] = (tmp_path / runs).iterdir()
        assert load(run_dir)["iteration"] == 3 and load(run_dir)["global_step"] == 3 * steps
        assert equal(load(run_dir)["agent"], torch.load(tmp_path / "other.pt", weights_only=True))


def test_the_command_of_the_readme(tmp_path):
    """torchrun itself, with the script that starts fastest; a number of tasks that cannot be shared is one line for each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", ROOT / "mrl_rl2.py"]
    argv = f"{TINY['mrl_rl2']} {ARMS} --total-timesteps 1".split()
    done = subprocess.run([*command, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 1, done.stderr
    codes, errs = torchrun("mrl_rl2", f"{TINY['mrl_rl2']} {ARMS} --num-tasks 7", tmp_path)
    assert codes == [2, 2] and errs[0] == errs[1] and "--num-tasks 7: give a multiple of" in errs[0], errs


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


@each
def test_averaged_gradient_is_that_of_both_halves_together(script, tmp_path):
    text = (ROOT / f"{script}.py").read_text().split('if __name__ == "__main__":')[0]
    (tmp_path / "halves.py").write_text(text + AVERAGE)
    codes, errs = torchrun(tmp_path / "halves.py", "", tmp_path)
    assert codes == [0, 0], errs
