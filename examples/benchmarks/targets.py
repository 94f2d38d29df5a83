"""Time the log density and its gradient of every model of a suite: row by row against all rows at once.

    python examples/benchmarks/targets.py --suite DIR [--only NAME]

DIR is laid out as in suite.py. Milliseconds of one thread (medians), for 32 and 256 particles.
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
    print(
        f"{'posterior':<26} {'D':>3} {'mode':<6}", *(f"{f'{n}: loop':>10} {'batch':>8} {'ratio':>6}" for n in PARTICLES)
    )
    for case in chosen:
        print(line(case), flush=True)


def line(case: Case) -> str:
    start = f"{case.short[:26]:<26} {case.dim:>3} "
    try:
        module, data = case.load()
        target = vf.PyroModel(module.model, data)
        by_row = copy.copy(target)
        by_row.mode = "loop"
        torch.manual_seed(0)
        columns = [f"{target.mode:<6}"]
        for n in PARTICLES:
            x = 0.5 * torch.randn(n, target.dim, dtype=torch.float64)
            loop, batch = milliseconds(by_row, x), milliseconds(target, x)
            columns.append(f"{loop:>10.1f} {batch:>8.2f} {loop / batch:>5.0f}x")
        return start + " ".join(columns)
    except Exception as error:
        return start + f"error: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def milliseconds(target: vf.Target, x: torch.Tensor) -> float:
    """Median time of one log density of x (N, dim) with its gradient."""
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < SECONDS and len(times) < MOST):
        began = time.perf_counter()
        point = x.clone().requires_grad_()
        torch.autograd.grad(target.log_prob(point).sum(), point)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


if __name__ == "__main__":
    main()
