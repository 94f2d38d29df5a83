"""Draws the pictures of the README anew, beside this file: python examples/images/make.py (a minute)."""

import math
import sys
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

import vi_flows as vf

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import eight_schools  # noqa: E402
from energy import energy  # noqa: E402


def two_modes(x: torch.Tensor) -> torch.Tensor:
    """A mixture of two far Gaussians, 70 % and 30 %, of which one Gaussian finds one."""
    modes = [-0.5 * (x - centre).square().sum(-1) + math.log(share) for centre, share in ((4.0, 0.7), (-4.0, 0.3))]
    return torch.logaddexp(*modes)


def write(posterior: vf.Posterior, name: str, kind: str) -> None:
    """A PNG of 100 dots an inch and 128 colours, which is a third of the size."""
    buffer = BytesIO()
    posterior.plot(kind).savefig(buffer, format="png", dpi=100)
    Image.open(buffer).convert("RGB").quantize(128).save(FOLDER / name, optimize=True)
    print(f"{name}: {(FOLDER / name).stat().st_size / 1000:.0f} kB, {posterior!r}")


if __name__ == "__main__":
    schools = vf.fit(eight_schools.model, eight_schools.y, eight_schools.sigma, progress=False)
    write(schools, "eight_schools.png", "overview")
    write(vf.fit(vf.Energy(energy, dim=2), progress=False), "energy.png", "density")
    one = vf.fit(vf.LogDensity(two_modes, dim=2), flow="gaussian", progress=False)
    write(one, "two_modes.png", "overview")
