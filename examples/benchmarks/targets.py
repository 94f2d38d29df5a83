"""Time the log density and its gradient of every model of a suite: row by row, all rows at once, and recorded.

    python examples/benchmarks/targets.py --suite DIR [--only NAME]

DIR is laid out as in suite.py. CPU milliseconds of one thread (medians), for 32 and 256 particles: one by one ("loop"),
by vmap, by recorded operations ("rec."), vmap over recorded ("ratio"); and recording with its checks, once ("cost").
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings

import torch
from suite import Case, add_arguments, cases

import vi_flows as vf

PARTICLES = (32, 256)
SECONDS, LEAST, MOST = 1.0, 3, 200  # per timing, and its number of repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    chosen = cases(parser, parser.parse_args())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    titles = (f"{f'{n}: loop':>10} {'vmap':>7} {'rec.':>7} {'ratio':>6} {'cost':>5}" for n in PARTICLES)
    print(f"{'posterior':<26} {'D':>3} {'mode':<6}", *titles)
    for case in chosen:
        print(line(case), flush=True)


def line(case: Case) -> str:
    start = f"{case.short[:26]:<26} {case.dim:>3} "
    try:
        module, data = case.load()
        target = vf.PyroModel(module.model, data)
        columns = [f"{target.mode:<6}"]
        for n in PARTICLES:
            torch.manual_seed(0)
            columns.append(timings(target, 0.5 * torch.randn(n, target.dim, dtype=torch.float64)))
        return start + " ".join(columns)
    except Exception as error:
        return start + f"error: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def timings(target: vf.PyroModel, x: torch.Tensor) -> str:
    """The columns of one number of rows; a model that is not recorded has its reason instead."""
    by_row, by_vmap, recorded = copy.copy(target), copy.copy(target), copy.copy(target)
    by_row.mode, by_vmap.capture, recorded.capture = "loop", False, True
    loop, batch = milliseconds(by_row, x), milliseconds(by_vmap, x)
    began = time.process_time()
    log_density_and_gradient(recorded, x)
    cost = 1e3 * (time.process_time() - began)
    if recorded.capture_refused:
        return f"{loop:>10.1f} {batch:>7.2f} {recorded.capture_refused}"
    program = milliseconds(recorded, x)
    return f"{loop:>10.1f} {batch:>7.2f} {program:>7.2f} {batch / program:>5.1f}x {cost - program:>5.0f}"


def log_density_and_gradient(target: vf.Target, x: torch.Tensor) -> None:
    point = x.clone().requires_grad_()
    torch.autograd.grad(target.log_prob(point).sum(), point)


def milliseconds(target: vf.Target, x: torch.Tensor) -> float:
    """Median time of one log density of x (N, dim) with its gradient."""
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < SECONDS and len(times) < MOST):
        began = time.process_time()
        log_density_and_gradient(target, x)
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times[1:])


if __name__ == "__main__":
    main()
