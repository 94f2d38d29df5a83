"""Training a VAE: what options do, and runs that are cut off and go on as if they had not been."""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from vi_flows.cli import main
from vi_flows.errors import DivergedError
from vi_flows.running import seeded
from vi_flows.vae import checkpoint
from vi_flows.vae.checkpoint import TrainingRun
from vi_flows.vae.data import load
from vi_flows.vae.model import Architecture, build
from vi_flows.vae.training import VAEOptions, begin, kl_weight, learning_rate, parameter_groups, train

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A hundred and sixty images of 4 × 4 bits: one of four stripes is on, with a tenth of the pixels flipped."""
    generator = np.random.default_rng(0)
    stripe = np.repeat(np.eye(4, dtype=np.uint8)[generator.integers(0, 4, 160)], 4, axis=1)
    rows = stripe ^ (generator.random((160, 16)) < 0.1).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(path, train=rows[:100], valid=rows[100:130], test=rows[130:])
    return path


def start(data, posterior="planar", **options):
    images, options = load(data), VAEOptions(**{"epochs": 3, "batch": 30, **options})
    architecture = Architecture(images.shape, latent=2, posterior=posterior, network_options={"hidden": [10, 8]})
    torch.manual_seed(options.seed)
    return begin(build(architecture), options), images, TrainingRun(architecture, options, {})


def ran(data, **options):
    with seeded(0):
        state, images, run = start(data, **options)
        train(state, images, run.options)
    return state


def parameters(state):
    module = getattr(state, "vae", state)
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("objective", ["elbo", "stl", "iwae", "dreg"])
def test_every_objective_learns_the_stripes(data, objective):
    draws = 1 if objective in ("elbo", "stl") else 4
    state = ran(data, epochs=50, objective=objective, draws=draws, lr=1e-2, warm_up=40, flow_start=0)
    first, last = state.history[0], state.history[-1]
    assert last["valid_iwae"] > first["valid_iwae"] + 1
    assert last["elbo"] == pytest.approx(last["reconstruction"] - last["kl"], abs=1e-4)
    assert last["valid_iwae"] >= last["valid_elbo"]


def test_a_seed_is_a_run(data):
    one, same, other = ran(data), ran(data), ran(data, seed=1)
    assert torch.equal(parameters(one), parameters(same))
    assert not torch.equal(parameters(one), parameters(other))


def test_schedules():
    cosine, warm = VAEOptions(epochs=10, schedule="cosine", lr=1.0), VAEOptions(warm_up=4, beta=2.0)
    assert learning_rate(cosine, 0.0) == 1 and learning_rate(cosine, 5.0) == pytest.approx(0.5)
    assert learning_rate(cosine, 10.0) == pytest.approx(0)
    assert [kl_weight(warm, e) for e in (0.0, 0.9, 1.0, 3.0, 9.5)] == [0.5, 0.5, 1.0, 2.0, 2.0]
    assert kl_weight(VAEOptions(), 0.0) == 1


def test_free_bits_leave_kl_alone_below_them(data):
    """Without a price the KL stays near what it is free to be; at full price it falls to nearly nothing here."""
    free, priced = (ran(data, epochs=30, free_bits=bits, lr=1e-2).history[-1]["kl"] for bits in (3.0, 0.0))
    assert free > 1.5 and priced < 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_mixed_precision_needs_a_gpu(data):
    with pytest.raises(ValueError, match='precision: expected "full" on cpu'):
        ran(data, precision="mixed")


@pytest.mark.parametrize(("posterior", "weights"), [("planar", "weight"), ("iaf", "vector")])
def test_heads_and_conditioners_learn_at_the_rate_of_an_ordinary_linear_layer(data, posterior, weights):
    state, _, _ = start(data, posterior)
    rates = {id(p): group["lr"] for group in parameter_groups(state.vae, 0.1) for p in group["params"]}
    assert len(rates) == len(list(state.vae.parameters()))
    fast = [name for name, p in state.vae.named_parameters() if rates[id(p)] == pytest.approx(0.1 * 8**0.5)]
    assert fast and all(rate in (0.1, pytest.approx(0.1 * 8**0.5)) for rate in rates.values())
    assert any(name.endswith(weights) for name in fast) and all(name.startswith("posterior") for name in fast)


@pytest.mark.parametrize("posterior", ["planar", "iaf", "diagonal"])
def test_the_flow_begins_when_warm_up_ends(data, posterior):
    """Until then its layers but the elementwise one are what they were; that one learns from the start."""

    def moved(epochs):
        state, images, run = start(data, posterior, epochs=4, warm_up=2)
        before = [parameters(part) for part in state.vae.posterior.layers]
        train(state, images, run.options, stop=lambda: (state.epoch + 1, state.step) == (epochs, 3))
        return [not torch.equal(parameters(p), was) for p, was in zip(state.vae.posterior.layers, before, strict=True)]

    assert VAEOptions(3, warm_up=2).flow_start == 1 and VAEOptions(9, warm_up=2).flow_start == 2
    assert moved(2) == [False] * (len(moved(2)) - 1) + [True]
    assert all(moved(3))


def test_patience(data):
    """With a learning rate of almost 0 nothing gets better for long."""
    state = ran(data, epochs=50, patience=2, lr=1e-12)
    assert state.epoch < 10 and state.epoch >= 3
    warm = ran(data, epochs=12, patience=2, warm_up=8, lr=1e-12)
    assert warm.epoch >= 10


def test_divergence_is_told(data):
    state, images, run = start(data)
    with torch.no_grad():
        next(state.vae.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(DivergedError, match="gradients were not finite in 4 steps in a row, in epoch 1"):
        train(state, images, dataclasses.replace(run.options, epochs=10))


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
@pytest.mark.parametrize("after", [2, 4, 7])
def test_a_run_that_goes_on_is_the_run(data, tmp_path, optimizer, after):
    """Stopped within an epoch, at its end, and within the next: parameters, history and generators to the last bit."""
    options = {"optimizer": optimizer, "clip": 5.0, "schedule": "cosine"}
    whole = ran(data, **options)
    with seeded(0):
        state, images, run = start(data, **options)
        steps = iter(range(1, 1000))
        save = functools.partial(checkpoint.save, run=run, folder=tmp_path)
        assert not train(state, images, run.options, save=save, stop=lambda: next(steps) == after)
    with seeded(99):
        state, run = checkpoint.resume(tmp_path)
        assert train(state, images, run.options)
    assert torch.equal(parameters(state), parameters(whole))
    drop = [{k: v for k, v in record.items() if k != "seconds"} for record in state.history]
    assert drop == [{k: v for k, v in record.items() if k != "seconds"} for record in whole.history]


def test_the_best_is_kept(data, tmp_path):
    with seeded(0):
        state, images, run = start(data, epochs=4)
        train(state, images, run.options, save=lambda s: checkpoint.save(s, run, tmp_path))
    vae, found, history = checkpoint.load(tmp_path)
    assert len(history) == state.best[0] and found.architecture == run.architecture and not vae.training
    assert {p.name for p in tmp_path.iterdir()} == {"last.safetensors", "previous.safetensors", "best.safetensors"}


def command(data, out, *more):
    return ["vae", "train", "--data", str(data), "--latent", "2", "--epochs", "3", "--batch", "30", "--threads", "1",
            "--posterior", "planar", "--no-progress", "--out", str(out), *more]  # fmt: skip


def header(path):
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["vi_flows_vae"])


def test_bad_runs(data, tmp_path, capsys):
    """One line, exit 2, and nothing is overwritten."""
    out = tmp_path / "run"
    assert main(command(data, out)) == 0
    kept = (out / "last.safetensors").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "last.safetensors").write_bytes(kept[: len(kept) // 2])
    tampered = tmp_path / "tampered"
    tampered.mkdir()
    (tampered / "last.safetensors").write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    capsys.readouterr()
    for arguments, message in [
        (command(data, out), "--out: expected a folder without a run"),
        (command(data, out, "--resume", "--lr", "1"), "--data: expected none beside --resume"),
        (["vae", "train", "--out", str(broken), "--resume"], "checkpoint: expected a whole safetensors file"),
        (["vae", "train", "--out", str(tampered), "--resume"], "checkpoint: expected what was saved"),
        (["vae", "train", "--out", str(tmp_path / "none"), "--resume"], "DIR: expected a folder"),
        (["vae", "sample", str(tmp_path)], "checkpoint: expected a folder that vae train has written"),
        (command(data, tmp_path / "a", "--posterior", "planr"), "posterior: expected one of"),
        (command(data, tmp_path / "a", "--latent", "0"), "latent: expected a positive integer"),
        (command(data, tmp_path / "a", "--lr", "-1"), "lr: expected a positive number"),
        (command(data, tmp_path / "a", "--flow-start", "3"), "flow_start: expected less than the 3 epochs"),
        (command(data, tmp_path / "a", "--objective", "dreg"), "draws: expected an integer of at least 2, got 1"),
        (
            command(data, tmp_path / "a", "--posterior", "diagonal", "--layers", "2"),
            "layers: expected none for posterior",
        ),
        (command(data, tmp_path / "a", "--shape", "1,2,x"), "--shape: expected C,H,W"),
        (command(data, data), "--out: expected a folder that can be written to"),
        (command(tmp_path / "no.npz", tmp_path / "a"), "--data: expected"),
    ]:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("vi-flows: " + message) and said.count("\n") == 1, said
    assert (out / "last.safetensors").read_bytes() == kept and not (tmp_path / "a").exists()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(data, tmp_path, kills):
    """SIGKILL at random moments and --resume: every checkpoint reads, and the end is that of the whole run."""
    assert main(command(data, tmp_path / "whole", "--epochs", "40")) == 0
    out, chance = tmp_path / "killed", random.Random(0)
    arguments = [sys.executable, "-m", "vi_flows", *command(data, out, "--epochs", "40")]
    for _ in range(kills):
        run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        while run.poll() is None and not (out / "last.safetensors").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3) if arguments[-1] != "--resume" else chance.uniform(3, 6))
        run.send_signal(signal.SIGKILL)
        run.wait()
        arguments = [sys.executable, "-m", "vi_flows", "vae", "train", "--out", str(out), "--no-progress", "--resume"]
        assert header(out / "last.safetensors")["epoch"] >= 1
    assert subprocess.run(arguments, env=ONE_THREAD, check=True).returncode == 0
    whole, killed = (header(p / "last.safetensors")["history"] for p in (tmp_path / "whole", out))
    assert [record["elbo"] for record in whole] == [record["elbo"] for record in killed]


def test_a_signal_saves_and_says_how_to_go_on(data, tmp_path):
    arguments = [sys.executable, "-m", "vi_flows", *command(data, tmp_path / "run", "--epochs", "100000")]
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / "run" / "last.safetensors").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 143 and "--resume" in said
    assert checkpoint.resume(tmp_path / "run")[0].epoch >= 1


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_two_processes_are_as_one(data, tmp_path):
    """A run that two processes take over goes on as with one, rounding apart, with batches and test rows shared out."""
    one, two = (tmp_path / name for name in ("one", "two"))
    assert main(command(data, one, "--free-bits", "0.5", "--batch", "29")) == 0
    shutil.copytree(one, two)
    for arguments in (["train", "--resume", "--epochs", "6", "--no-progress", "--out"], ["evaluate", "--draws", "10"]):
        assert main(["vae", *arguments, str(one)]) == 0
        shared = [*TWO, "-m", "vi_flows", "vae", *arguments, str(two)]
        subprocess.run(shared, env=ONE_THREAD, check=True, timeout=120)
    found = []
    for out in (one, two):
        history, judged = header(out / "last.safetensors")["history"], json.loads((out / "evaluation.json").read_text())
        found.append([r[key] for r in history for key in ("elbo", "kl", "valid_iwae")])
        found[-1] += [judged["elbo"]["value"], judged["iwae"]["value"], *judged["khat"]]
    assert len(header(two / "last.safetensors")["history"]) == 6
    assert found[0] == pytest.approx(found[1], abs=1e-3)


LOSES = """
import os, sys, threading, time
from pathlib import Path
from vi_flows.cli import main

def lose():
    while not (Path(sys.argv[1]) / "last.safetensors").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), 9)

if os.environ["RANK"] == "1":
    threading.Thread(target=lose, daemon=True).start()
sys.exit(main(sys.argv[2:]))
"""


def test_a_lost_process_ends_the_job_with_a_line(data, tmp_path):
    script, out = tmp_path / "loses.py", tmp_path / "run"
    script.write_text(LOSES)
    arguments = [*TWO, str(script), str(out), *command(data, out, "--epochs", "5000")]
    ran = subprocess.run(arguments, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    ours = [line for line in ran.stderr.splitlines() if line.startswith("vi-flows")]
    line = "vi-flows: process 0 of 2 lost another one; go on from the last checkpoint by --resume"
    assert ran.returncode and ours == [line]
    assert checkpoint.resume(out)[0].epoch >= 1


def test_evaluated_and_sampled_from_the_command_line(data, tmp_path):
    out = tmp_path / "run"
    assert main(command(data, out)) == 0
    assert main(["vae", "evaluate", str(out), "--draws", "20", "--rows", "20", "--json"]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["rows"] == 20 and found["iwae"]["value"] >= found["elbo"]["value"]
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["vae", "sample", str(out), "-n", "5", "--out", str(tmp_path / "x.npy")]) == 0
    assert np.load(tmp_path / "x.npy").shape == (5, 1, 4, 4)
