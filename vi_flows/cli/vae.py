"""``vi-flows vae``: train a VAE whose posterior is a flow, evaluate it, and draw from it."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..atomic import replacing
from ..progress import Progress
from ..running import seeded
from ..running import threads as torch_threads
from ..vae import checkpoint
from ..vae.checkpoint import TrainingRun
from ..vae.data import BINARISE, Images, load
from ..vae.distributed import Workers, workers
from ..vae.evaluation import evaluate
from ..vae.likelihoods import LIKELIHOODS
from ..vae.model import POSTERIORS, PRIOR_KINDS, Architecture, build
from ..vae.networks import NETWORKS
from ..vae.objectives import OBJECTIVES
from ..vae.training import OPTIMIZERS, PRECISIONS, SCHEDULES, State, VAEOptions, begin, train
from .options import AsJson, NoProgress, Seed, takes_records
from .output import prepare_folder, to_json

LIKELIHOOD_OF = {2: "bernoulli", 256: "categorical", None: "gaussian"}  # of data with so many levels
STOPPED = 143  # exit status where a signal ended training, and its state was saved
EVALUATION, PAGE, SAMPLES_FILE = "evaluation.json", "report.html", "samples.png"

app = typer.Typer(help="Train a VAE whose posterior is a flow, evaluate it, draw from it.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What vae train wrote.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of torch (all cores).")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda (a GPU if there is one).")]


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: Annotated[str, typer.Option(metavar="PATH|digits", help=".npz, .npy, IDX files, or digits.")] = "digits"
    key: Annotated[str | None, typer.Option(metavar="NAME", help="The array of an .npz with others.")] = None
    shape: Annotated[str | None, typer.Option(metavar="C,H,W", help="Of an image, where rows do not say.")] = None
    binarise: Annotated[str | None, typer.Option(metavar="NAME", help=", ".join(BINARISE) + " (digits: dynamic)")] = (
        None
    )
    dequantise: Annotated[bool, typer.Option("--dequantise", help="Add uniform noise to bytes.")] = False

    def keywords(self, seed: int) -> dict[str, Any]:
        """For `load`, and for JSON."""
        binarise = self.binarise or ("dynamic" if self.data == "digits" else "none")
        shape = _shape(self.shape)
        return {"binarise": binarise, "dequantise": self.dequantise, "seed": seed, "key": self.key, "shape": shape}


@dataclass(frozen=True)
class ModelOptions:
    """What to train."""

    posterior: Annotated[str, typer.Option(metavar="NAME", help=", ".join(POSTERIORS))] = "sylvester"
    latent: Annotated[int, typer.Option(help="Size of z.")] = 64
    network: Annotated[str, typer.Option(metavar="NAME", help=", ".join(NETWORKS))] = "mlp"
    likelihood: Annotated[str | None, typer.Option(metavar="NAME", help=", ".join(LIKELIHOODS) + " (by data)")] = None
    layers: Annotated[int | None, typer.Option(help="Of the flow (4; spline_autoregressive 2).")] = None
    prior: Annotated[str, typer.Option(metavar="NAME", help=", ".join(PRIOR_KINDS))] = "normal"

    def architecture(self, images: Images) -> Architecture:
        return Architecture(
            shape=images.shape,
            latent=self.latent,
            network=self.network,
            likelihood=self.likelihood or LIKELIHOOD_OF[images.levels],
            posterior=self.posterior,
            prior=self.prior,
            centre=images.centre,
            spread=images.spread,
            posterior_options={} if self.layers is None else {"layers": self.layers},
        )


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, by the names of training.VAEOptions; None stands for what the help says."""

    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows (100).")] = None
    batch: Annotated[int, typer.Option(help="Rows in a step.")] = VAEOptions.batch
    seed: Seed = 0
    objective: Annotated[str, typer.Option(metavar="NAME", help=", ".join(OBJECTIVES))] = VAEOptions.objective
    draws: Annotated[int, typer.Option(help="K, of q(z|x) for each row; 2 or more for iwae, dreg.")] = VAEOptions.draws
    optimizer: Annotated[str, typer.Option(metavar="NAME", help=", ".join(OPTIMIZERS))] = VAEOptions.optimizer
    lr: Annotated[float, typer.Option(help="Learning rate.")] = VAEOptions.lr
    schedule: Annotated[str, typer.Option(metavar="NAME", help=", ".join(SCHEDULES))] = VAEOptions.schedule
    warm_up: Annotated[int | None, typer.Option(help="Epochs over which β rises (half of all, at most 100).")] = None
    flow_start: Annotated[int | None, typer.Option(help="Epochs of a diagonal q (those of --warm-up).")] = None
    beta: Annotated[float, typer.Option(help="The weight of the KL.")] = VAEOptions.beta
    free_bits: Annotated[float, typer.Option(help="Nats of KL that cost nothing.")] = VAEOptions.free_bits
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient; 0: none.")] = VAEOptions.clip
    patience: Annotated[int, typer.Option(help="Epochs without a better validation bound; 0: no early stop.")] = (
        VAEOptions.patience
    )
    valid_draws: Annotated[int, typer.Option(help="K of the validation bound IWAE-K.")] = VAEOptions.valid_draws
    precision: Annotated[str, typer.Option(metavar="NAME", help=", ".join(PRECISIONS) + " (bfloat16 on a GPU)")] = (
        VAEOptions.precision
    )
    compile: Annotated[bool, typer.Option("--compile", help="Compile the networks.")] = VAEOptions.compile

    def options(self) -> VAEOptions:
        given = {name: value for name, value in vars(self).items() if value is not None}
        # without a warm-up, units of z are lost at once
        return VAEOptions(**{"warm_up": min((self.epochs or VAEOptions.epochs) // 2, 100), **given})


@app.command("train")
@takes_records
def train_command(
    context: typer.Context,
    data: DataOptions,
    model: ModelOptions,
    training: TrainingOptions,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoints, with settings and history, go here.")] = Path(
        "vae"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from DIR; other options are then DIR's.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a DIR that has a run.")] = False,
    threads: Threads = None,
    device: Device = None,
    no_progress: NoProgress = False,
) -> None:
    """Train; the last two states and the best are kept in DIR, and --resume goes on from there."""
    with workers() as processes:
        if resume:
            _refuse_others(context)
            state, run, images = _resumed(out, training.epochs)
        else:
            state, run, images = _begun(data, model, training.options(), threads, out, overwrite)
        _move(state, device)
        with torch_threads(threads or run.data["threads"]):  # another number would round otherwise
            finished = _trained(state, run, images, out, not no_progress, processes)
        if processes.first:
            _say(state, out, finished)
    if not finished:
        raise typer.Exit(STOPPED)


@app.command("evaluate")
def evaluate_command(
    folder: Folder,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Where the data is now, if it has moved.")] = None,
    draws: Annotated[int, typer.Option(help="K of the bound IWAE-K.")] = 1000,
    rows: Annotated[int | None, typer.Option(help="Test rows, by chance (all).")] = None,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
) -> None:
    """The test likelihood with its error, what the posterior is worth, and a page of pictures."""
    from ..report.vae_page import write_page

    with workers() as processes, torch_threads(threads or torch.get_num_threads()):
        vae, run, history = checkpoint.load(_existing(folder))
        images = load(data or run.data["source"], **run.data["options"])
        if images.shape != run.architecture.shape:
            given = f"expected images {run.architecture.shape}, got {images.shape}"
            raise ValueError(f"--data: {given}; pass those of training")
        vae.to(_device(device))
        levels, x = 256 if images.noise == "dequantise" else None, images.values(images.test)
        show = {"processes": processes, "progress": not no_progress}
        found = evaluate(vae, x, draws, seed, max_rows=rows, dequantised=levels, **show)
        if not processes.first:
            return
        settings = {**run.architecture.as_dict(), **run.options.as_dict(), **run.data["options"]}
        write_page(folder / PAGE, vae, images.shape, x, found, history, settings)
    with replacing(folder / EVALUATION) as temporary:
        temporary.write_text(to_json(found.as_dict()))
    if as_json:
        print(to_json(found.as_dict()))
        return
    for sentence in found.sentences:
        print(sentence)
    print(f"{folder / EVALUATION} and {folder / PAGE} have the rest")


@app.command("sample")
def sample_command(
    folder: Folder,
    n: Annotated[int, typer.Option("-n", help="How many.")] = 64,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help=".png or .npy (DIR/samples.png).")] = None,
    noisy: Annotated[bool, typer.Option("--noisy", help="Draws of the pixels, not their means.")] = False,
    seed: Seed = 0,
) -> None:
    """Draw images from the prior and the decoder."""
    from ..report.vae_page import write_images

    vae, run, _ = checkpoint.load(_existing(folder))
    with seeded(seed):
        x = vae.sample(n, mean=not noisy)
    path = out or folder / SAMPLES_FILE
    write_images(path, x, run.architecture.shape)
    print(path)


def _begun(
    data: DataOptions, model: ModelOptions, options: VAEOptions, threads: int | None, out: Path, overwrite: bool
) -> tuple[State, TrainingRun, Images]:
    """The state of a new run."""
    if not overwrite and any((out / name).exists() for name in checkpoint.NAMES):
        raise ValueError(f"--out: expected a folder without a run, got {out}; add --resume or --overwrite")
    keywords = data.keywords(options.seed)
    images = load(data.data, **keywords)
    architecture = model.architecture(images)
    torch.manual_seed(options.seed)
    vae = build(architecture)
    for x in images.all_values():
        vae.likelihood.check(x, "--data")
    source = {"source": data.data, "options": keywords, "fingerprint": _fingerprint(images)}
    source["threads"] = threads or torch.get_num_threads()
    prepare_folder(out)
    if overwrite:
        checkpoint.clear(out)
    return begin(vae, options), TrainingRun(architecture, options, source), images


def _shape(given: str | None) -> tuple[int, ...] | None:
    try:
        return None if given is None else tuple(int(part) for part in given.split(","))
    except ValueError:
        raise ValueError(f"--shape: expected C,H,W, got {given}; such as 1,28,28") from None


def _resumed(out: Path, epochs: int | None) -> tuple[State, TrainingRun, Images]:
    state, run = checkpoint.resume(_existing(out))
    if epochs is not None:
        run = replace(run, options=replace(run.options, epochs=epochs))
    images = load(run.data["source"], **run.data["options"])
    if _fingerprint(images) != run.data["fingerprint"]:
        raise ValueError(f"--data: expected what {out} was trained on, got other values; put them back, or --overwrite")
    return state, run, images


def _refuse_others(context: typer.Context) -> None:
    """With --resume the folder has the options: others that are given would be ignored in silence."""
    for name in context.params:
        typed = context.get_parameter_source(name).name == "COMMANDLINE"
        if typed and name not in ("out", "resume", "epochs", "threads", "device", "no_progress"):
            flag = "--" + name.rstrip("_").replace("_", "-")
            raise ValueError(f"{flag}: expected none beside --resume, which takes those of --out; leave it out")


def _trained(state: State, run: TrainingRun, images: Images, out: Path, show: bool, processes: Workers) -> bool:
    """Train with a progress bar, saving as it goes; a signal saves and stops."""
    with Progress(show and processes.first, remaining=True) as bar, stopping() as stop:
        bar.stage("training", run.options.epochs)
        rate = Throughput(run.options.batch)

        def report(state: State, steps: int) -> None:
            if state.step % 10 == 0 or state.step == steps:
                done = state.epoch + state.step / steps
                bar.note(done, run.options.epochs, _line(state, rate()), f"epoch {state.epoch + 1}")

        def save(state: State) -> None:
            if processes.first:
                checkpoint.save(state, run, out)

        return train(state, images, run.options, report, save, stop, processes)


def _line(state: State, rate: float) -> str:
    elbo, likelihood, kl, count = state.totals
    return f"ELBO {elbo / count:.1f} = {likelihood / count:.1f} − KL {kl / count:.1f}  {rate:.0f} images/s"


class Throughput:
    """Images in a second since it was made; called after every tenth step."""

    def __init__(self, batch: int):
        self.images, self.began = 10 * batch, time.monotonic()

    def __call__(self) -> float:
        now = time.monotonic()
        rate, self.began = self.images / max(now - self.began, 1e-9), now
        return rate


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one ends the program as usual."""
    seen: list[int] = []
    before = {}

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(state: State, out: Path, finished: bool) -> None:
    if not finished:
        print(f"stopped in epoch {state.epoch + 1}, saved; go on by: vi-flows vae train --out {out} --resume")
        return
    epoch, best = state.best
    print(f"{state.epoch} epochs in {state.seconds:.0f} s; best validation bound {best:.2f} nats, in epoch {epoch}")
    print(f"evaluate it by: vi-flows vae evaluate {out}")


def _fingerprint(images: Images) -> str:
    """A hash of the training rows, by which other data is told."""
    rows = images.train.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"DIR: expected a folder that vae train has written, got {folder}; train first")
    return folder


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: expected cpu{', or cuda' if torch.cuda.is_available() else ''}, got {name}")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _move(state: State, device: str | None) -> None:
    """To the device, the optimizer's tensors with it."""
    place = _device(device)
    state.vae.to(place)
    state.optimizer.load_state_dict(state.optimizer.state_dict())  # casts its tensors to where the parameters are
