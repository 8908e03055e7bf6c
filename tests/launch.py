"""Runs the scripts as their users do, for the tests."""

import io
import multiprocessing
import os
import re
import runpy
import shlex
import socket
import sys
from pathlib import Path

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
each = pytest.mark.parametrize("script", TINY)
torch.set_num_threads(1)  # children are forked, so no thread pool may exist before


def child(path, argv, folder, env, encoding, stdout):
    """Runs the script as `python path argv` in `folder` does, inside a forked process, which saves importing torch."""
    os.chdir(folder)
    os.environ.update(env)
    sys.argv, sys.path[0:0] = [str(path), *shlex.split(argv)], [str(Path(path).parent)]
    rank, new = env.get("RANK", ""), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for name, fd in (("stderr", 2), ("stdout", 1)):
        os.dup2(stdout if stdout and fd == 1 else os.open(f"{name}{rank}", new), fd)
        setattr(sys, name, io.TextIOWrapper(io.FileIO(fd, "w"), encoding, write_through=True))
    code = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    os._exit(code)


def start(script, argv, folder, env=None, encoding="utf-8", stdout=None):
    """`script` is the name of one, or the path of a copy."""
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    process = multiprocessing.get_context("fork").Process(target=child, args=(path, argv, folder, env or {}, encoding, stdout))
    process.start()
    return process


def run(script, argv, folder, **kwargs):
    """Exit code, stdout and stderr of a run."""
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


def changed(script, path, *changes):
    """A copy of a script at `path`, with each (old, new) of `changes` replaced once."""
    text = (ROOT / f"{script}.py").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def messages(err):
    """The lines of stderr without the progress bar."""
    return [line for line in re.split(r"[\r\n]+", err) if line.strip() and not re.match(r" *\d+%\||.* steps/s", line)]


def load(run_dir):
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
