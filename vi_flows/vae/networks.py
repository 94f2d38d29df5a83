"""Encoders and decoders: pixels to a context, latents to a likelihood's raw numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from ..arguments import whole

Shape = tuple[int, int, int]  # channels of colour, height, width
Kernel = int | tuple[int, int]
Pair = tuple["Encoder", "Decoder"]
GATED_START = 1.85  # 1/√E[sigmoid(b)²] for b ~ N(0, 1)
RESIDUAL_START = 0.1  # a residual branch starts as this share of an ordinary layer


class Encoder(nn.Module):
    """h = layers((x − centre)/spread): pixels (\\*batch, dim) to a context (\\*batch, context)."""

    centre: Tensor
    spread: Tensor

    def __init__(self, layers: nn.Module, shape: Sequence[int], context: int, centre: float, spread: float):
        super().__init__()
        if not (math.isfinite(centre) and math.isfinite(spread) and spread > 0):
            raise ValueError(f"spread: expected a positive number, got {spread!r} about {centre!r}; check the data")
        self.layers, self.shape, self.context = layers, tuple(shape), context
        self.register_buffer("centre", torch.tensor(float(centre)))
        self.register_buffer("spread", torch.tensor(float(spread)))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[:-1]
        standard = (x - self.centre) / self.spread
        return self.layers(standard.reshape(math.prod(batch), *self.shape)).reshape(*batch, self.context)


class Decoder(nn.Module):
    """raw = layers(z): latents (\\*batch, latent) to a likelihood's raw numbers (\\*batch, channels, dim)."""

    def __init__(self, layers: nn.Module, latent: int, channels: int, dim: int):
        super().__init__()
        self.layers, self.latent, self.channels, self.dim = layers, latent, channels, dim

    def forward(self, z: Tensor) -> Tensor:
        batch = z.shape[:-1]
        raw = self.layers(z.reshape(math.prod(batch), self.latent))
        return raw.reshape(*batch, self.channels, self.dim)


def mlp(
    shape: Shape,
    latent: int,
    channels: int,
    centre: float,
    spread: float,
    *,
    hidden: Sequence[int] = (300, 256),
    decoder_hidden: Sequence[int] = (300, 300),
) -> Pair:
    """Fully connected layers with ReLU, the last one of the decoder linear; the context is the last of ``hidden``."""
    _check_shapes(shape, latent, channels)
    dim = math.prod(shape)
    encoder = Encoder(_relu_layers(dim, _widths("hidden", hidden)), (dim,), hidden[-1], centre, spread)
    body = _relu_layers(latent, _widths("decoder_hidden", decoder_hidden))
    return encoder, Decoder(nn.Sequential(*body, nn.Linear(decoder_hidden[-1], channels * dim)), latent, channels, dim)


def conv(
    shape: Shape,
    latent: int,
    channels: int,
    centre: float,
    spread: float,
    *,
    filters: int = 32,
    hidden: int = 256,
) -> Pair:
    """Gated convolutions a ⊙ sigmoid(b), two of stride 2, then one over the whole image; the decoder mirrors it.

    As in van den Berg et al. (2018): 32 k5, 32 k5 s2, 64 k5, 64 k5 s2, 64 k5, 256 over what is left. The decoder's last
    layer is linear, 1 × 1, or 5 × 5 where a pixel has more than two raw numbers.

    Raises ValueError if height or width is not a multiple of 4.
    """
    _check_shapes(shape, latent, channels)
    few, context = whole("filters", filters), whole("hidden", hidden)
    colours, height, width = shape
    if height % 4 or width % 4:
        remedy = 'take network="residual" or "mlp", or pad the images'
        raise ValueError(f"shape: expected height and width to be multiples of 4, got {height} × {width}; {remedy}")
    left, many = (height // 4, width // 4), 2 * few
    encoder = nn.Sequential(
        *_gated(colours, few),
        *_gated(few, few, stride=2),
        *_gated(few, many),
        *_gated(many, many, stride=2),
        *_gated(many, many),
        *_gated(many, context, left, padding=0),
    )
    size = 1 if channels <= 2 else 5
    decoder = nn.Sequential(
        nn.Unflatten(-1, (latent, 1, 1)),
        *_gated_up(latent, many, left, padding=0),
        *_gated_up(many, many),
        *_gated_up(many, few, stride=2),
        *_gated_up(few, few),
        *_gated_up(few, few, stride=2),
        *_gated_up(few, few),
        nn.Conv2d(few, channels * colours, size, padding=size // 2),
    )
    return Encoder(encoder, shape, context, centre, spread), Decoder(decoder, latent, channels, math.prod(shape))


def residual(
    shape: Shape,
    latent: int,
    channels: int,
    centre: float,
    spread: float,
    *,
    filters: Sequence[int] = (16, 32, 32),
    blocks: int = 2,
    hidden: int = 450,
) -> Pair:
    """Stages of residual blocks with ELU, each halving the image, and a fully connected layer; the decoder mirrors it.

    In the manner of Kingma et al. (2016), without their weight normalisation: branches start small instead.

    Parameters
    ----------
    filters: feature maps of each stage.
    blocks: residual blocks in a stage, the first of which changes the size.
    hidden: width of the fully connected layers and size of the context.

    Raises
    ------
    ValueError if the image is smaller than the stages can halve.
    """
    _check_shapes(shape, latent, channels)
    maps, blocks, context = _widths("filters", filters), whole("blocks", blocks), whole("hidden", hidden)
    colours, *size = shape
    if min(size) < 2 ** len(maps):
        expected = f"height and width of at least {2 ** len(maps)} for {len(maps)} stages"
        raise ValueError(f'shape: expected {expected}, got {size[0]} × {size[1]}; take network="mlp", or fewer filters')
    sizes = [[-(-pixels // 2**stage) for pixels in size] for stage in range(len(maps) + 1)]
    features = maps[-1] * math.prod(sizes[-1])
    down, up = [], []
    for stage, (before, after) in enumerate(itertools.pairwise([colours, *maps])):
        down += [Residual(before, after, stride=2), *(Residual(after, after) for _ in range(blocks - 1))]
        before = maps[0] if stage == 0 else before  # colours are left to the last layer
        up = [Residual(after, before, size=sizes[stage]), *(Residual(before, before) for _ in range(blocks - 1)), *up]
    encoder = nn.Sequential(*down, nn.ELU(), nn.Flatten(), nn.Linear(features, context), nn.ELU())
    decoder = nn.Sequential(
        nn.Linear(latent, context),
        nn.ELU(),
        nn.Linear(context, features),
        nn.Unflatten(-1, (maps[-1], *sizes[-1])),
        *up,
        nn.ELU(),
        nn.Conv2d(maps[0], channels * colours, 3, padding=1),
    )
    return Encoder(encoder, shape, context, centre, spread), Decoder(decoder, latent, channels, math.prod(shape))


class Residual(nn.Module):
    """skip(x) + conv(elu(conv(elu(x)))), with a stride, or enlarged to ``size`` first."""

    def __init__(self, before: int, after: int, stride: int = 1, size: Sequence[int] | None = None):
        super().__init__()
        self.resize = nn.Upsample(size=tuple(size)) if size is not None else nn.Identity()
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, after, 3, stride, padding=1)
        self.first = nn.Conv2d(before, after, 3, stride, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(RESIDUAL_START)
            self.second.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.resize(x)
        return self.skip(x) + self.second(elu(self.first(elu(x))))


NETWORKS: dict[str, Callable[..., Any]] = {"mlp": mlp, "conv": conv, "residual": residual}


def _relu_layers(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    pairs = itertools.pairwise([inputs, *widths])
    return nn.Sequential(*(layer for before, after in pairs for layer in (nn.Linear(before, after), nn.ReLU())))


def _gated(before: int, after: int, kernel: Kernel = 5, stride: int = 1, padding: int = 2) -> list[nn.Module]:
    layer = nn.Conv2d(before, 2 * after, kernel, stride, padding)
    return _gate(layer, layer.weight[0].numel())


def _gated_up(before: int, after: int, kernel: Kernel = 5, stride: int = 1, padding: int = 2) -> list[nn.Module]:
    layer = nn.ConvTranspose2d(before, 2 * after, kernel, stride, padding, output_padding=stride - 1)
    # how many inputs a pixel of the output gets: one of every map where one pixel is spread over the whole image
    return _gate(layer, before * (25 / stride**2 if padding else 1))


def _gate(layer: nn.Conv2d | nn.ConvTranspose2d, fan_in: float) -> list[nn.Module]:
    """a ⊙ sigmoid(b), a and b the halves of the layer's maps.

    Gates of a half and torch's default weights would shrink a signal threefold a layer: at the start h and the raw
    numbers would hardly depend on x and z (to 1e-3 and 1e-6). These weights keep its size.
    """
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=fan_in**-0.5)
        a = layer.weight.chunk(2, dim=int(isinstance(layer, nn.ConvTranspose2d)))[0]
        a.mul_(GATED_START)
        nn.init.zeros_(layer.bias)
    return [layer, nn.GLU(dim=1)]


def _check_shapes(shape: Shape, latent: int, channels: int) -> None:
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"shape: expected (colours, height, width), got {shape!r}; such as (1, 28, 28)")
    whole("latent", latent)
    whole("channels", channels)


def _widths(name: str, widths: Sequence[int]) -> list[int]:
    if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
        raise ValueError(f"{name}: expected a sequence of positive widths, got {widths!r}; such as (300, 300)")
    return [whole(name, width) for width in widths]
