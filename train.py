"""Training of UPerNet on sources that each label only some of the levels (section 3.1).

    python train.py                                             # the toy, made on the spot: minutes on a CPU
    python train.py --data ade20k,dtd,os                        # the real thing, under ./data
    torchrun --nproc_per_node=8 train.py --data ade20k,dtd,os   # several GPUs

At each iteration one source is drawn, and only what lies on the path to its labels is updated. Textures come last:
their branch alone, on a trunk that stands still.
"""

import argparse
import contextlib
import glob
import itertools
import json
import math
import os
import re
import shlex
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from balance_split import balanced_validation, fingerprint, official_validation, split_path
from datasets import (
    SOURCE_LEVELS,
    Batches,
    Index,
    Parser,
    Reader,
    UserError,
    add_data_options,
    build_vocabulary,
    cache_folder,
    chosen_sources,
    data_root,
    is_first,
    natural,
    open_sources,
    padded,
    plan_batches,
    positive,
    write_json,
    write_whole,
)
from evaluate import (
    add_device_options,
    autocast,
    check_run,
    evaluate,
    first_before_others,
    join_processes,
    pick_amp,
    pick_device,
    prepare,
    save_picture,
    sheet_of,
    table,
)
from resnet import load_imagenet
from upernet import LEVELS, LOSS_WEIGHTS, UPerNet, class_counts, fill, from_checkpoint, losses, read_tensors

DEFAULTS = {  # of sizes, rates and lengths: section 3.1's and the released code's
    "data": "toy", "root": "data", "split": "balanced", "backbone": "resnet50", "channels": 512, "stem": "7x7",
    "output_stride": 32, "no_ppm": False, "fpn": 2, "no_fusion": False, "weights": "imagenet", "iters": None,
    "texture_iters": None, "batch_size": 2, "accumulate": 1, "lr": 0.02, "sizes": [300, 375, 450, 525, 600],
    "max_size": 1200, "seed": 304, "workers": os.cpu_count() or 1, "save_every": 500, "eval_every": 0,
    "amp": "auto", "device": "auto",
}  # fmt: skip
TOY = {  # what two cores learn in minutes
    "backbone": "resnet18", "channels": 48, "weights": "none", "iters": 2400, "texture_iters": 600, "batch_size": 4,
    "lr": 0.04, "sizes": [76, 80, 84], "max_size": 160, "save_every": 400,
}  # fmt: skip
# What a run that goes on may change. Its iterations stay: with a lower --batch-size, a higher --accumulate makes up.
FREE = set(
    "root cache workers batch_size accumulate save_every eval_every amp compile device allow_broken out resume".split()
)
TEXTURE_IMAGES = 8  # for each of --batch-size in the texture stage: they have a fiftieth of the area (our choice)


# ---------------------------------------------------------------- what a run shows


class Curves:
    """What curves.png shows: the loss of each level and the rate over a whole run, averaged over stretches of it.

    `lengths`: the iterations of each stage, in their order.
    """

    # Stretches; the size of a panel, and where its axes stand, in pixels.
    BINS, WIDTH, HEIGHT, LEFT, BOTTOM = 160, 380, 210, 52, 26

    def __init__(self, lengths: dict[str, int]):
        ends = list(itertools.accumulate(lengths.values()))
        self.total, self.first = max(1, ends[-1]), dict(zip(lengths, [0, *ends]))
        self.sums: dict[str, np.ndarray] = {}  # of a level, or "rate": (BINS, 2), the sum and the number of values

    def add(self, line: dict) -> None:
        """A line of log.jsonl."""
        k = min(self.BINS - 1, (self.first[line["stage"]] + line["iteration"]) * self.BINS // self.total)
        for name, value in {**line["loss"], "rate": line["lr"]}.items():
            self.sums.setdefault(name, np.zeros((self.BINS, 2)))[k] += value, 1

    def panel(self, name: str) -> Image.Image:
        picture = Image.new("RGB", (self.WIDTH, self.HEIGHT), "white")
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
        sums, counts = self.sums[name].T
        there = counts.nonzero()[0]
        values = sums[there] / counts[there]
        top = values.max() or 1.0
        right, floor = self.WIDTH - 14, self.HEIGHT - self.BOTTOM
        for tick in (0, 0.5, 1):
            y, x = floor - tick * (floor - 34), self.LEFT + tick * (right - self.LEFT)
            draw.line([self.LEFT, y, right, y], fill="#dddddd")
            draw.text((self.LEFT - 6, y), f"{tick * top:.2g}", fill="black", font=font, anchor="rm")
            shown = f"{round(tick * self.total)}" + (" iterations" if tick == 1 else "")
            draw.text((x, floor + 6), shown, fill="black", font=font, anchor="lmr"[int(2 * tick)] + "a")
        for begin in filter(None, self.first.values()):  # a stage begins, with a rate of its own
            x = self.LEFT + begin / self.total * (right - self.LEFT)
            draw.line([x, 34, x, floor], fill="#999999")
        points = [
            (self.LEFT + (k + 0.5) / self.BINS * (right - self.LEFT), floor - value / top * (floor - 34))
            for k, value in zip(there.tolist(), values.tolist())
        ]
        for x, y in points:
            draw.ellipse([x - 1, y - 1, x + 1, y + 1], fill="#2255cc")
        draw.line(points, fill="#2255cc", width=2)
        draw.text((self.LEFT, 8), "learning rate" if name == "rate" else f"{name}, loss", fill="black", font=font)
        return picture

    def save(self, path: str) -> None:
        panels = [self.panel(name) for name in (*LEVELS, "rate") if name in self.sums]
        if panels:
            save_picture(sheet_of([panels[:3], panels[3:]] if len(panels) > 3 else [panels]), path)


class Progress:
    """What the terminal shows of a stage: a bar, or a plain line now and then where the output is no terminal."""

    def __init__(self, stage: str, start: int, iterations: int, images: int):
        self.stage, self.start, self.iterations, self.images = stage, start, iterations, images
        self.began = time.perf_counter()
        disable = None if is_first() else True
        self.bar = tqdm(total=iterations, initial=start, desc=stage, unit="it", disable=disable, smoothing=0.05)

    def update(self, line: dict) -> None:
        """After an iteration, with its line of log.jsonl."""
        done = line["iteration"] + 1
        pace = (time.perf_counter() - self.began) / (done - self.start)  # seconds an iteration
        losses = ", ".join(f"{level} {value:.2f}" for level, value in line["loss"].items())
        shown = f"{losses}, {self.images / pace:.1f} images/s"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        if self.bar.disable and done % min(100, math.ceil(self.iterations / 10)) == 0:
            left = tqdm.format_interval((self.iterations - done) * pace)
            print(f"{self.stage} {done}/{self.iterations}: {line['source']}, {shown}, {left} left", flush=True)


def append(path: str, line: str) -> None:
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); make room, then go on with --resume") from None


# ---------------------------------------------------------------- pieces of the loop


def learning_rate(lr: float, iteration: int, iterations: int) -> float:
    """The poly policy."""
    return lr * (1 - iteration / iterations) ** 0.9


def parameter_groups(module: nn.Module) -> list[dict]:
    """No weight decay on biases and norms (as released)."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def load_weights(net: UPerNet, weights: str) -> None:
    """The start: `imagenet`, `none`, a file with a backbone's state dict, or one of our checkpoints, as far as they
    fit."""
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            load_imagenet(net.backbone)
        except (OSError, RuntimeError) as e:
            raise UserError(f"--weights imagenet: the download failed ({e}); give --weights none, or a file") from None
        except ValueError as e:
            raise UserError(f"--weights imagenet: {e}; give --weights none, or a file") from None
        return
    try:
        content = read_tensors(weights)
    except ValueError as e:
        raise UserError(str(e)) from None
    ours = isinstance(content.get("model"), dict)
    found = (
        content["model"] if ours else {f"backbone.{k}": v for k, v in content.items() if not str(k).startswith("fc.")}
    )
    wanted = net.state_dict()
    if not ours:
        wanted = {key: value for key, value in wanted.items() if key.startswith("backbone.")}
    fitting = {k: v for k, v in found.items() if k in wanted and isinstance(v, Tensor) and v.shape == wanted[k].shape}
    if not any(key.endswith("weight") for key in fitting):
        raise UserError(
            f"{weights}: nothing in it fits this network; its first key is {next(iter(content), 'missing')}"
        )
    net.load_state_dict(fitting, strict=False)
    rest = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
    if is_first():
        anew = f"; {len(rest)} start anew: {', '.join(rest)}" if rest else ""
        print(f"{weights}: loaded {len(fitting)} tensors{anew}")


def build_network(network: dict, seed: int, weights: str) -> UPerNet:
    """The network as it is before the first step."""
    torch.manual_seed(seed)
    try:
        net = UPerNet(**network)
    except ValueError as e:
        raise UserError(str(e)) from None
    load_weights(net, weights)
    return net


def validation_split(args: argparse.Namespace, indexes: dict[str, Index], vocabulary: dict) -> dict[str, list[str]]:
    """The validation images of each source, sorted paths."""
    path = split_path(data_root(args), args.cache)
    official = [s for s in indexes if args.split == "official" and s != "os"]  # OpenSurfaces has no split of its own
    rest = {source: index for source, index in indexes.items() if source not in official}
    split = {source: official_validation(indexes[source]) for source in official}
    if rest:
        split |= balanced_validation(rest, vocabulary, path)
    return {source: sorted(split[source]) for source in indexes}


def training_sizes(index: Index, validation: list[str]) -> dict[int, tuple[int, int]]:
    """Number -> (height, width) of the images to train on. DTD's images are all cut to squares."""
    held = set(validation)
    sizes = index.sizes.tolist()
    return {
        i: (1, 1) if index.source == "dtd" else tuple(sizes[i])
        for i, image in enumerate(index.images)
        if image not in held
    }


def update(
    model: nn.Module,
    part_slices: dict,
    batches: list[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    amp: torch.dtype | None,
) -> dict[str, float]:
    """One step on batches of one source, whose gradients are averaged: the loss of each of its levels.

    Gradients start as None, and what is off the path of the source's levels keeps None: SGD then leaves it alone, with
    its weight decay and its momentum too (in the released code both go on). Raises FloatingPointError before the step
    if a loss is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    mean_loss: dict[str, float] = {}
    for k, batch in enumerate(batches):
        levels = [level for level in LEVELS if level in batch]
        labels = {level: batch[level].to(device, non_blocking=True) for level in levels}
        waits = hasattr(model, "no_sync") and k < len(batches) - 1  # gradients are exchanged with the last batch's
        with model.no_sync() if waits else contextlib.nullcontext():
            with autocast(device, amp):
                logits = model(prepare(batch["images"], device), levels=levels)
            loss = losses(logits, labels, part_slices)
            total = sum(LOSS_WEIGHTS[level] * value for level, value in loss.items()) / len(batches)
            if not torch.isfinite(total):
                raise FloatingPointError(f"{batch['source']}: {', '.join(batch['files'])}")
            scaler.scale(total).backward()
        for level, value in loss.items():
            mean_loss[level] = mean_loss.get(level, 0.0) + value.item() / len(batches)
    scaler.step(optimizer)
    scaler.update()
    return mean_loss


# ---------------------------------------------------------------- the run


class TrainingFailed(Exception):
    """What ends a run in the middle, perhaps in one of its processes alone."""


def open_data(args: argparse.Namespace, checkpoint: dict | None) -> tuple[dict[str, Reader], dict, dict[str, list]]:
    """(readers with prepared labels, vocabulary, validation images) of the sources; a run that goes on has its own
    vocabulary and split. Raises UserError if its images are no longer those that it was begun with.
    """
    indexes, minima = open_sources(args)
    vocabulary = checkpoint["vocabulary"] if checkpoint else build_vocabulary(indexes, minima)
    for source in indexes:
        if not set(SOURCE_LEVELS[source]) & set(vocabulary):
            raise UserError(f"{source}: no class is large enough to be kept; lower the --min- options")
    fingerprints = {source: fingerprint(index) for source, index in indexes.items()}
    for source in indexes if checkpoint else ():
        if fingerprints[source] != args.fingerprints.get(source):
            raise UserError(
                f"{source}: its images are not those that {args.out} was begun with; begin anew with another --out"
            )
    args.fingerprints = fingerprints
    split = checkpoint["split"] if checkpoint else validation_split(args, indexes, vocabulary)
    if split.keys() != indexes.keys():
        found = ", ".join(split) or "nothing"
        raise UserError(f"{args.out}: its checkpoint has a split of {found}, not of its own data")
    readers = {source: Reader(index, vocabulary) for source, index in indexes.items()}
    for reader in readers.values():
        reader.prepare(cache_folder(args), max(args.sizes), args.max_size)
    return readers, vocabulary, split


@contextlib.contextmanager
def signals_noted():
    """While it lasts, the first SIGTERM or Ctrl-C is only noted, in the list that it gives; a second works as ever."""
    noted: list[int] = []

    def note(number: int, _) -> None:
        noted.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def ignore_interrupts(_) -> None:
    """For the processes that read images: Ctrl-C reaches them too, and is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Run:
    """A run of training: its data, its network, and what its checkpoint holds.

    `checkpoint`: the content of the one to go on from, if it does. Raises UserError if the options or the data will not
    do.
    """

    def __init__(self, args: argparse.Namespace, checkpoint: dict | None):
        self.args = args
        self.device = join_processes(pick_device(args.device))
        self.amp = pick_amp(args.amp, self.device)
        self.ranks, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.path, self.log = (os.path.join(args.out, name) for name in ("ckpt.pt", "log.jsonl"))
        self.readers, self.vocabulary, self.split = first_before_others(lambda: open_data(args, checkpoint))
        self.sizes = {s: training_sizes(reader.index, self.split[s]) for s, reader in self.readers.items()}
        for source, images in self.sizes.items():
            held = f"{len(self.split[source])} to validate on ({args.split} split)"
            print(f"{source}: {len(images)} images to train on, {held}")
            if not images:
                raise UserError(f"{source}: every image is a validation image, none is left to train on")
        counts = {k: sum(len(p) - 1 for p in v.values()) if k == "part" else len(v) for k, v in self.vocabulary.items()}
        print("classes: " + ", ".join(f"{n} {level}" for level, n in counts.items()))

        self.network = {
            "classes": class_counts(self.vocabulary),
            "backbone": args.backbone,
            "channels": args.channels,
            "ppm": not args.no_ppm,
            "fpn": args.fpn,
            "fusion": not args.no_fusion,
            "stem": args.stem,
            "output_stride": args.output_stride,
        }
        self.net = build_network(self.network, args.seed, "none" if checkpoint else args.weights).to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.stage, self.start, self.momenta = "main", 0, {}  # where the checkpoint stands; its optimizer's state
        if checkpoint:
            fill(self.net, checkpoint["model"], self.path)
            if checkpoint["scaler"] and self.scaler.is_enabled():  # empty where it was not needed
                self.scaler.load_state_dict(checkpoint["scaler"])
            torch.set_rng_state(checkpoint["random"])
            self.stage, self.start, self.momenta = (checkpoint[key] for key in ("stage", "iteration", "optimizer"))
            print(f"{args.out}: goes on in the {self.stage} stage at iteration {self.start}")
        if self.device.type == "cuda" and self.ranks > 1:
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def save(self, stage: str, iteration: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        content = {
            "model": self.net.state_dict(),
            "network": self.network,
            "vocabulary": self.vocabulary,
            "optimizer": optimizer.state_dict() if optimizer else {},
            "scaler": self.scaler.state_dict(),
            "stage": stage,
            "iteration": iteration,
            "random": torch.get_rng_state(),
            "split": self.split,
            "arguments": {key: value for key, value in vars(self.args).items() if key != "resume"},
        }
        if is_first():
            advice = "the last one is kept; make room, or choose another folder with --out"
            write_whole(self.path, lambda name: torch.save(content, name), advice)
            with contextlib.suppress(UserError):  # for want of a picture no run shall end
                self.curves.save(os.path.join(self.args.out, "curves.png"))

    def judge(self, net: UPerNet, pictures: str | None = None) -> dict:
        """Metrics on the validation images, at the middle one of the training sizes."""
        held = {source: set(images) for source, images in self.split.items()}
        indexes = {source: reader.index for source, reader in self.readers.items()}
        chosen = [(s, i) for s, index in indexes.items() for i, image in enumerate(index.images) if image in held[s]]
        short = sorted(self.args.sizes)[len(self.args.sizes) // 2]
        return evaluate(
            net, self.vocabulary, self.readers, chosen, short, self.args.max_size, amp=self.amp, pictures=pictures
        )

    def train(self) -> None:
        """Both stages, from where the checkpoint stands. Raises TrainingFailed, and SystemExit after a signal."""
        stages = plan_stages(self.args, self.sizes, self.ranks)
        self.curves = Curves({stage: iterations for stage, (_, iterations, _) in stages.items()})
        if is_first() and self.stage != "done":
            seen = cut_log(self.log, self.start + (stages["main"][1] if self.stage == "texture" else 0))
            for line in seen:
                self.curves.add(line)
            ahead = self.start + (stages["main"][1] if self.stage == "texture" else 0) - len(seen)
            if ahead:
                print(f"{self.log}: has no lines of {ahead} of the iterations until here")
            for unfinished in glob.glob(os.path.join(glob.escape(self.args.out), ".*.ckpt.pt")):
                os.remove(unfinished)  # of a run that was killed while it saved
        if self.stage == "main" and not self.start:
            self.save("main", 0)
        with signals_noted() as noted:
            if self.stage == "main":
                self.train_stage("main", *stages["main"], noted)
                self.stage, self.start = "texture", 0
                self.save("texture", 0)
            if self.stage == "texture":
                self.train_stage("texture", *stages["texture"], noted)
                self.stage = "done"
                self.save("done", 0)

    def open_optimizer(self, trained: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a stage, with the checkpoint's momenta if that stands in it."""
        optimizer = torch.optim.SGD(parameter_groups(trained), lr=self.args.lr, momentum=0.9)
        if self.start:
            try:
                optimizer.load_state_dict(self.momenta)
                if any(state["momentum_buffer"].shape != p.shape for p, state in optimizer.state.items()):
                    raise ValueError("a shape")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self.path}: its optimizer is not that of this network") from None
        return optimizer

    def open_loader(self, sources: dict, iterations: int, batch_size: int):
        """An iterator over the batches of a stage from `self.start` on, `--accumulate` of them for each iteration."""
        args = self.args
        plan = plan_batches(sources, iterations, batch_size * args.accumulate * self.ranks, args.seed)
        batches = Batches(
            self.readers, plan, args.sizes, args.max_size, args.seed, args.accumulate, self.rank, self.ranks
        )
        rest = Subset(batches, range(self.start * args.accumulate, len(batches)))
        pinned = self.device.type == "cuda"
        return iter(
            DataLoader(rest, None, num_workers=args.workers, pin_memory=pinned, worker_init_fn=ignore_interrupts)
        )

    def train_stage(self, stage: str, sources: dict, iterations: int, batch_size: int, noted: list[int]) -> None:
        """The iterations from `self.start` on: section 3's loop."""
        if not iterations:
            return
        args, net, device = self.args, self.net, self.device
        # Textures are learnt after everything else and by their head alone: the trunk stands still, its statistics too.
        trained = net if stage == "main" else net.heads["texture"]
        net.requires_grad_(False)
        trained.requires_grad_(True)
        optimizer = self.open_optimizer(trained)
        model = torch.compile(net) if args.compile else net
        if self.ranks > 1:
            own = [device.index] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=own, find_unused_parameters=True)
        loader = self.open_loader(sources, iterations, batch_size)
        progress = Progress(stage, self.start, iterations, batch_size * args.accumulate * self.ranks)
        left_out = 0
        for iteration in range(self.start, iterations):
            began = time.perf_counter()
            net.eval()  # the texture stage trains its head alone, and validations leave eval mode
            trained.train()
            lr = learning_rate(args.lr, iteration, iterations)  # each stage has its own policy: our choice
            for group in optimizer.param_groups:
                group["lr"] = lr
            drawn = [next(loader) for _ in range(args.accumulate)]
            scale = self.scaler.get_scale()
            try:
                loss = update(model, net.part_slices, drawn, optimizer, self.scaler, device, self.amp)
            except FloatingPointError as e:
                where = f"the loss is not finite at iteration {iteration} of the {stage} stage ({e})"
                raise TrainingFailed(f"{where}; {self.path} is the last good checkpoint; try a lower --lr") from None
            left_out += self.scaler.get_scale() < scale

            line = {"stage": stage, "iteration": iteration, "source": drawn[0]["source"], "lr": lr, "loss": loss}
            line["seconds"] = round(time.perf_counter() - began, 4)
            if is_first():
                append(self.log, json.dumps(line))
                self.curves.add(line)
            progress.update(line)
            number = noted_anywhere(noted, device)
            if number or ((iteration + 1) % args.save_every == 0 and iteration + 1 < iterations):
                self.save(stage, iteration + 1, optimizer)
            if number:
                progress.bar.close()
                print(f"stopped and saved after iteration {iteration} of the {stage} stage; this goes on:")
                start = "python" if self.ranks == 1 else f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
                print(f"{start} train.py --resume --out {shlex.quote(args.out)}", flush=True)
                raise SystemExit(128 + number)
            if args.eval_every and (iteration + 1) % args.eval_every == 0:
                print(table(self.judge(net)))
        progress.bar.close()
        if left_out:
            print(f"{stage}: {left_out} steps left out whose fp16 gradients overflowed")


def noted_anywhere(noted: list[int], device: torch.device) -> int:
    """The number of a signal that any process has noted, 0 for none: all of them stop after the same iteration."""
    if not dist.is_initialized():
        return noted[0] if noted else 0
    number = torch.tensor(noted[0] if noted else 0, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def run(args: argparse.Namespace, checkpoint: dict | None) -> None:
    checkpoint_path, metrics_path = (os.path.join(args.out, name) for name in ("ckpt.pt", "metrics.json"))
    if checkpoint and checkpoint["stage"] == "done" and os.path.exists(metrics_path):
        if is_first():
            print(f"{args.out}: this run is finished; python evaluate.py {checkpoint_path} evaluates it")
        return
    training = Run(args, checkpoint)
    training.train()
    if any(training.split.values()):
        results = training.judge(training.net, os.path.join(args.out, "pictures"))
        untrained = None
        if args.data == "toy":
            untrained = training.judge(build_network(training.network, args.seed, args.weights).to(training.device))
        if is_first():
            write_json(results, metrics_path)
        print(table(results, untrained))
        print(f"wrote {checkpoint_path}, and beside it metrics.json, log.jsonl, curves.png and pictures/")
    else:
        print(f"wrote {checkpoint_path}, with log.jsonl and curves.png beside it")
        print("no metrics, for there are no validation images")
    print(f"next: python evaluate.py {checkpoint_path} --photo YOUR.jpg")


def plan_stages(args: argparse.Namespace, sizes: dict[str, dict], ranks: int) -> dict[str, tuple[dict, int, int]]:
    """Stage -> (its sources, iterations, images per process and batch); fills in --iters and --texture-iters."""
    textures = {source: images for source, images in sizes.items() if source == "dtd"}
    others = {source: images for source, images in sizes.items() if source != "dtd"}
    step = args.batch_size * args.accumulate * ranks
    if args.iters is None:  # 5 per training image at 16 images a step: the paper's 100k for ADE20K's 20k
        args.iters = math.ceil(5 * 16 * sum(map(len, others.values())) / step)
    if args.texture_iters is None:
        args.texture_iters = math.ceil(5 * sum(map(len, textures.values())) / (step * TEXTURE_IMAGES))
    if (drawn := step * max(args.iters, args.texture_iters)) > 10**8:
        raise UserError(f"--iters, --batch-size, --accumulate: {drawn:,} images in all, more than the 10^8 of a plan")
    return {
        "main": (others, args.iters if others else 0, args.batch_size),
        "texture": (textures, args.texture_iters if textures else 0, args.batch_size * TEXTURE_IMAGES),
    }


def read_checkpoint(path: str) -> dict:
    if not os.path.exists(path):
        raise UserError(f"{path}: no checkpoint to go on from; start without --resume")
    try:
        checkpoint = read_tensors(path)
        keys = "model network vocabulary optimizer scaler stage iteration random split arguments".split()
        if missing := [key for key in keys if key not in checkpoint]:
            raise UserError(f"{path}: not a checkpoint of train.py (no {missing[0]} in it)")
        from_checkpoint(checkpoint, path)
    except ValueError as e:
        raise UserError(str(e)) from None
    check_run(checkpoint, path)
    iteration, optimizer, random = (checkpoint[key] for key in ("iteration", "optimizer", "random"))
    usual_state = torch.get_rng_state()
    for key, fits in (
        ("stage", checkpoint["stage"] in ("main", "texture", "done")),
        ("iteration", isinstance(iteration, int) and iteration >= 0),
        ("optimizer", isinstance(optimizer, dict) and (not iteration or {"state", "param_groups"} <= optimizer.keys())),
        ("scaler", isinstance(checkpoint["scaler"], dict)),
        ("random", isinstance(random, Tensor) and random.dtype == torch.uint8 and random.shape == usual_state.shape),
    ):
        if not fits:
            raise UserError(f"{path}: its {key} is not what train.py writes")
    for key, usual in DEFAULTS.items():
        if usual is not None and type(checkpoint["arguments"].get(key)) is not type(usual):
            raise UserError(f"{path}: its argument {key} is missing, or not what train.py writes")
    return checkpoint


def cut_log(path: str, lines: int) -> list[dict]:
    """Keeps, and returns, the first `lines` lines: those of the iterations that the checkpoint has seen."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, "r+") as log:
            kept = list(itertools.takewhile(bool, (log.readline() for _ in range(lines))))
            seen = [json.loads(line) for line in kept]
            if not all(isinstance(line, dict) and {"stage", "iteration", "lr", "loss"} <= line.keys() for line in seen):
                raise ValueError("a line without stage, iteration, lr or loss")
            log.truncate(log.tell())
        return seen
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not a log of train.py any more ({e}); move it away, or begin anew") from None


def known_failure(error: Exception) -> str | None:
    """What to say of an error that comes from outside of this program; None for any other."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", said):
        smaller = "a lower --batch-size (--accumulate makes up for it)"
        return f"out of memory; go on with --resume and {smaller}, or begin anew with lower --sizes or --channels"
    if "DataLoader worker" in said:
        what_next = "go on with --resume, with fewer --workers if memory is short"
        return f"a process that reads images ended ({said[:80]}); {what_next}"
    if dist.is_initialized() and re.search("onnection|peer|NCCL|gloo", said):
        return f"process {dist.get_rank()} lost touch with the others; go on with --resume"
    return None


# ---------------------------------------------------------------- the command


def sizes_of(text: str) -> list[int]:
    sizes = [positive(size.strip()) for size in text.split(",")]
    if min(sizes) < 32:
        raise argparse.ArgumentTypeError(f"{text!r}: short sides of at least 32 pixels are needed")
    return sizes


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def all_options() -> Parser:
    """The command's options; each is None if it is not given."""

    def usual(key: str) -> str:
        text = lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"({text(DEFAULTS[key])}; toy {text(TOY[key])})" if key in TOY else f"({text(DEFAULTS[key])})"

    parser = Parser("Trains UPerNet. Defaults are the paper's; for the toy, the default data, those after 'toy'.")
    add_data_options(parser)
    group = parser.add_argument_group("network")
    depths = f"resnet18, resnet34, resnet50, resnet101 {usual('backbone')}"
    group.add_argument("--backbone", metavar="NAME", help=depths)
    group.add_argument(
        "--channels", type=positive, metavar="N", help=f"width of all after the backbone {usual('channels')}"
    )
    group.add_argument("--stem", choices=("7x7", "deep"), help=f"the backbone's first layers {usual('stem')}")
    stride = f"stride of the backbone's last stage {usual('output_stride')}"
    group.add_argument("--output-stride", type=int, choices=(8, 16, 32), help=stride)
    group.add_argument("--no-ppm", action="store_true", help="without the Pyramid Pooling Module")
    finest = f"finest level of the feature pyramid, 0 for none {usual('fpn')}"
    group.add_argument("--fpn", type=int, choices=(0, 2, 3, 4), help=finest)
    group.add_argument("--no-fusion", action="store_true", help="objects and parts on the finest level alone")
    start = f"imagenet, none, a backbone's state dict, or a checkpoint {usual('weights')}"
    group.add_argument("--weights", metavar="START", help=start)
    group = parser.add_argument_group("training")
    official = f"validation images: <root>/split.json, or the sources' own {usual('split')}"
    group.add_argument("--split", choices=("balanced", "official"), help=official)
    passes = f"(5 an image at 16 a step; toy {TOY['iters']})"
    group.add_argument("--iters", type=natural, metavar="N", help=f"main stage; 0 skips it {passes}")
    passes = f"(5 passes over DTD; toy {TOY['texture_iters']})"
    group.add_argument("--texture-iters", type=natural, metavar="N", help=f"texture stage; 0 skips it {passes}")
    group.add_argument("--batch-size", type=positive, metavar="N", help=f"images per process {usual('batch_size')}")
    batches = f"batches of the drawn source per step {usual('accumulate')}"
    group.add_argument("--accumulate", type=positive, metavar="N", help=batches)
    group.add_argument("--lr", type=rate, metavar="RATE", help=f"learning rate at the start {usual('lr')}")
    group.add_argument("--sizes", type=sizes_of, metavar="LIST", help=f"short sides to draw from {usual('sizes')}")
    group.add_argument("--max-size", type=positive, metavar="N", help=f"longest side {usual('max_size')}")
    group.add_argument(
        "--seed", type=natural, metavar="N", help=f"of weights, batches and augmentation {usual('seed')}"
    )
    group = parser.add_argument_group("run and machine")
    group.add_argument("--out", metavar="DIR", help="folder for checkpoint, log, metrics, pictures (runs/<data>)")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    between = f"iterations between checkpoints {usual('save_every')}"
    group.add_argument("--save-every", type=positive, metavar="N", help=between)
    group.add_argument("--eval-every", type=natural, metavar="N", help="iterations between validations (0: at the end)")
    group.add_argument("--workers", type=natural, metavar="N", help="processes that read images (one per core)")
    add_device_options(group)

    parser.set_defaults(**{action.dest: None for action in parser._actions if action.dest != "help"})
    return parser


def complete(args: argparse.Namespace) -> dict | None:
    """Fills in what is not given: from the checkpoint with --resume, else from TOY or DEFAULTS. Returns the checkpoint.

    Raises UserError for options that will not do.
    """
    given = {key for key, value in vars(args).items() if value is not None}
    data = args.data or DEFAULTS["data"]
    out = args.out or os.path.join(
        "runs", data if data == "toy" else "+".join(s for s in SOURCE_LEVELS if s in chosen_sources(data))
    )
    path, checkpoint, stored = os.path.join(out, "ckpt.pt"), None, {}
    group = [os.environ.get("TORCHELASTIC_RUN_ID")]
    if group == ["none"]:  # torchrun was given no rendezvous, but an address, which stays when it starts the group again
        group += [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]
    # torchrun starts a group again that failed: it goes on with what it has begun itself, if it came that far.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        checkpoint = read_checkpoint(path) if os.path.exists(path) else None
        args.resume = checkpoint is not None and (args.resume or checkpoint["arguments"].get("group") == group)
    if args.resume:
        checkpoint = checkpoint or read_checkpoint(path)
        stored = checkpoint["arguments"]
        for key in sorted(given - FREE):
            if stored.get(key) != getattr(args, key):
                option = "--" + key.replace("_", "-")
                kept = f"{out} was begun with {stored.get(key)}, and a run that goes on keeps it"
                raise UserError(f"{option}: {kept}; leave {option} out")
    elif os.path.exists(path):
        raise UserError(f"{out}: holds a run already; go on with it by --resume, or choose another folder with --out")
    args.group = group
    args.fingerprints = stored.get("fingerprints", {})  # of the images that the run was begun with
    usual = {**DEFAULTS, **(TOY if data == "toy" else {}), **stored, "out": out}
    for key, value in vars(args).items():
        if value is None:
            setattr(args, key, usual.get(key))
    if args.weights not in ("imagenet", "none") and not args.resume and not os.path.exists(args.weights):
        raise UserError(f"--weights {args.weights}: no such file; it takes imagenet, none, or a file")
    if args.max_size < min(args.sizes):
        raise UserError(f"--max-size: at least the smallest of --sizes, {min(args.sizes)}")
    if args.batch_size == 1 and padded(min(args.sizes)) < 64:
        raise UserError("--sizes: batch norm needs at least 33 pixels where --batch-size is 1")
    return checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = all_options()
    args = parser.parse_args(argv)
    try:
        run(args, complete(args))
    except UserError as e:
        parser.error(str(e))
    except TrainingFailed as e:
        parser.exit(2, f"{parser.prog}: {e}\n")
    except (RuntimeError, MemoryError) as e:
        if (reason := known_failure(e)) is None:
            raise
        parser.exit(2, f"{parser.prog}: {reason}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
