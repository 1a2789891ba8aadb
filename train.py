"""Training of UPerNet on sources that each label only some of the levels (section 3.1).

    python train.py                                             # the toy, made on the spot
    python train.py --data ade20k,dtd,os                        # the real data, under ./data
    torchrun --nproc_per_node=8 train.py --data ade20k,dtd,os   # several GPUs

Each iteration draws one source and updates only the path to its labels; textures come last, on the
frozen network.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import balance_split
import datasets
import evaluate
import resnet
import upernet
from datasets import Index, Option, Source, UserError
from upernet import LEVELS, LOSS_WEIGHTS, UPerNet


# ---------------------------------------------------------------- one step, and the loop
def update(
    model: nn.Module,
    part_slices: dict[int, slice],
    batches: list[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    amp: torch.dtype | None,
) -> dict[str, float]:
    """Takes one step on batches of one source, averaging gradients; returns each level's loss.

    Only the path to the source's levels moves, and nothing else at all: `levels=` keeps the rest
    out of the forward pass, so that its batch-norm statistics stay, and out of the backward pass,
    so that its gradients stay None, and SGD leaves parameters without a gradient alone, their
    weight decay and momentum too (in the released code both act). A level without a label in this
    batch is on the path: its gradients are zero, and decay and momentum act. In fp16 the scaler
    skips a step whose gradients overflow. Without it, a loss that is not finite ends all processes
    before the step, its own with a FloatingPointError.
    """
    optimizer.zero_grad(set_to_none=True)
    values = {}
    for k, batch in enumerate(batches):
        levels = [level for level in LEVELS if level in batch]
        images = batch["images"].to(device, non_blocking=True) / 255
        labels = {level: batch[level].to(device, non_blocking=True) for level in levels}
        with without_exchange(model, is_last=k == len(batches) - 1):
            with datasets.autocast(device, amp):
                logits = model(images, levels=levels)
            loss = upernet.losses(logits, labels, part_slices)
            total = sum(LOSS_WEIGHTS[level] * value for level, value in loss.items())
            scaler.scale(total / len(batches)).backward()
        for level, value in loss.items():
            values[level] = values.get(level, 0) + value.detach() / len(batches)
    values = {level: value.item() for level, value in values.items()}
    is_finite = all(math.isfinite(value) for value in values.values())
    if not scaler.is_enabled() and largest_of_processes(int(not is_finite)):
        if is_finite:
            raise SystemExit(2)  # another process says why
        files = [file for batch in batches for file in batch["files"]]
        raise FloatingPointError(f"{batches[0]['source']}: {', '.join(files)}")
    scaler.step(optimizer)
    scaler.update()
    return values


def without_exchange(model: nn.Module, is_last: bool):
    """The context in which processes do not average gradients before the last batch."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


def train(run: "Run") -> None:
    """Trains the stages that are left, saving on the way."""
    for stage in run.stages_left():
        model, optimizer = run.prepare(stage)
        batches = iter(run.loader(stage))
        with progress_bar(stage, run.iteration) as bar:
            for iteration in range(run.iteration, stage.iterations):
                began = time.perf_counter()
                set_mode(run.net, stage)
                # Section 3.1: poly; a policy for each stage is ours.
                lr = run.lr * (1 - iteration / stage.iterations) ** 0.9
                for group in optimizer.param_groups:
                    group["lr"] = lr
                of_step = [next(batches) for _ in range(stage.batches.accumulate)]
                slices = run.net.part_slices
                scale = run.scaler.get_scale()
                loss = update(model, slices, of_step, optimizer, run.scaler, run.device, run.amp)
                run.iteration = iteration + 1

                if run.scaler.get_scale() < scale:  # lowered, since gradients overflowed
                    if run.scaler.get_scale() < 1:
                        raise FloatingPointError("fp16 gradients overflow at every scale")
                    bar.write(
                        f"iteration {iteration}: fp16 gradients overflow, the step is skipped"
                    )
                bar.set_postfix(loss, refresh=False)
                bar.update()
                line = {
                    "stage": stage.name,
                    "iteration": iteration,
                    "source": of_step[0]["source"],
                    "lr": lr,
                    "loss": finite(loss),
                    "seconds": round(time.perf_counter() - began, 4),
                }
                if run.is_validation_due(stage):
                    line["metrics"] = run.validate_on_the_way(optimizer)
                run.write_log(line)
                run.save_if_due(stage, optimizer)
        run.finish_stage()


def set_mode(net: UPerNet, stage: "Stage") -> None:
    """Training mode; in the texture stage for the texture head alone, so that the frozen network
    keeps its batch-norm statistics (section 3).
    """
    if stage.name == "main":
        net.train()
    else:
        net.eval()
        net.heads["texture"].train()


def progress_bar(stage: "Stage", first: int) -> tqdm:
    seconds = 0.1 if sys.stdout.isatty() else 30  # between updates
    return tqdm(
        desc=stage.name,
        total=stage.iterations,
        initial=first,
        disable=not datasets.is_main_process(),
        file=sys.stdout,
        mininterval=seconds,
    )


def finite(loss: dict[str, float]) -> dict[str, float | None]:
    """The losses as JSON has them: None for one that is not finite, of a step that fp16 skipped."""
    return {level: value if math.isfinite(value) else None for level, value in loss.items()}


def largest_of_processes(number: int) -> int:
    """The largest of the processes' numbers, without waiting for a GPU."""
    largest = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


# ---------------------------------------------------------------- what is trained, and for how long
class Data(NamedTuple):
    """What a run trains on and validates on."""

    sources: dict[str, Source]
    vocabulary: dict
    split: dict[str, list[str]]  # validation images of each source
    training: dict[str, list[int]]  # image indices of each source
    validation: list[tuple[str, int]]  # (source, image index)
    fingerprints: dict[str, str]  # of each source's images and labels, to notice changes


def open_data(
    indexes: dict[str, Index], vocabulary: dict, split: dict, cache: str, short: int, longest: int
) -> Data:
    """The sources, and which of their images train and validate. UserError if none trains.

    short, longest: the largest size of training, for `Source.prepared`.
    """
    sources = {}
    training = {}
    validation = []
    fingerprints = {}
    for name, index in indexes.items():
        content = [index.images, index.sizes.tolist(), index.tags, index.names]
        fingerprints[name] = datasets.hash_of([*content, index.pixels.tolist()])
        sources[name] = Source(index, vocabulary, None, cache, short, longest)
        validates = set(split[name])
        training[name] = []
        for i, image in enumerate(index.images):
            if image in validates:
                validation.append((name, i))
            else:
                training[name].append(i)
        if not training[name]:
            raise UserError(f"{name}: no image to train on; see --split")
    return Data(sources, vocabulary, split, training, validation, fingerprints)


def divide(
    indexes: dict[str, Index],
    minima: dict[str, int],
    levels: list[str] | None,
    split: str,
    folder: str,
    cache: str,
    trained: dict[str, list[str]],
) -> tuple[dict, dict[str, list[str]]]:
    """(vocabulary of the levels, validation images of each source) of a new run.

    split: as --split; a balanced one does not depend on the levels.
    trained: images of each source that trained the weights to start from; a split that is made now
        leaves them on the training side.
    """
    everything = datasets.build_vocabulary(indexes, minima, levels or LEVELS)
    for level in levels or ():
        if level not in everything:
            print(f"--levels: the data have no class of {level}")
    levels = levels or LEVELS
    vocabulary = {level: names for level, names in everything.items() if level in levels}
    validation = {}
    for name, index in indexes.items():
        if not set(index.data_set.levels) & set(vocabulary):
            raise UserError(
                f"{name}: has no class of {', '.join(levels)} that is large enough (see the --min- "
                "options), or no label (see --levels)"
            )
        keep = frozenset(trained.get(name, ())) & frozenset(index.images)
        has_both = {"train", "val"} <= set(index.official)
        if index.data_set.own_table and has_both:
            if split == "balanced":
                print(f"{name}: mixes training/ and validation/; --split official keeps them apart")
            else:
                check_sides(index)
        validation[name] = balance_split.validation_images(
            index, split, folder, cache, everything, keep
        )
    return vocabulary, validation


def check_sides(index: Index) -> None:
    """UserError if an official split would train on other folders too, such as a test set."""
    others = [image for image, side in zip(index.images, index.official) if not side]
    if others:
        raise UserError(
            f"{index.source}: --split official, but {len(others)} images lie neither in training/ "
            f"nor in validation/: {datasets.first_of(others)}; move a test set and its masks to "
            "another folder, for evaluate.py --root"
        )


TEXTURE_IMAGES = 8  # times --batch-size: textures have a fiftieth of the area (ours)


class Stage(NamedTuple):
    name: str  # "main" or "texture"
    batches: datasets.TrainingBatches  # of this process
    images: int  # that it trains on, of all its sources

    @property
    def iterations(self) -> int:
        return len(self.batches.plan)

    @property
    def sources(self) -> list[str]:
        return [source.index.source for source in self.batches.sources]


def plan_stages(
    data: Data,
    iters: int | None,
    texture_iters: int | None,
    batch_size: int,
    accumulate: int,
    seed: int,
    augmentation: dict,
) -> list[Stage]:
    """The stages that have images and iterations: all sources but the textures, then these.

    By default 5 iterations per training image at 16 images a step, the paper's 100k for ADE20K's
    20k images, then 5 passes over the textures (ours; the paper has "a few"). augmentation: further
    arguments of `TrainingBatches`.
    """
    textures = [source for source in data.sources.values() if source.data_set.squares]
    others = [source for source in data.sources.values() if not source.data_set.squares]
    images = sum(len(data.training[source.index.source]) for source in others)
    of_textures = sum(len(data.training[source.index.source]) for source in textures)
    step = batch_size * accumulate * datasets.processes()  # images of an iteration
    texture_step = TEXTURE_IMAGES * step
    if iters is None:
        iters = math.ceil(5 * 16 * images / step)
    if texture_iters is None:
        texture_iters = math.ceil(5 * of_textures / texture_step)
    how = {
        "seed": seed,
        "accumulate": accumulate,
        "rank": datasets.rank(),
        "processes": datasets.processes(),
        **augmentation,
    }
    stages = []
    if images and iters:
        groups = image_groups(data, others, not augmentation["crop"])
        plan = datasets.plan_batches(groups, iters, step, seed)
        stages.append(Stage("main", datasets.TrainingBatches(others, plan, **how), images))
    if of_textures and texture_iters:
        groups = image_groups(data, textures, by_orientation=False)
        plan = datasets.plan_batches(groups, texture_iters, texture_step, seed)
        stages.append(
            Stage("texture", datasets.TrainingBatches(textures, plan, **how), of_textures)
        )
    return stages


def image_groups(data: Data, sources: list[Source], by_orientation: bool) -> list:
    """The groups of images that a batch comes from, for `datasets.plan_batches`."""
    groups = []
    for position, source in enumerate(sources):
        images = data.training[source.index.source]
        of_source = [np.array(images, np.int32)]
        if by_orientation:
            of_source = datasets.orientation_groups(source.index, images)
        groups += [(position, group) for group in of_source]
    return groups


def describe(
    data: Data,
    stages: list[Stage],
    trained: dict[str, list[str]],
    split: str,
    flip: bool,
    lr: float,
) -> None:
    """Prints what the run is about to do, and what may be wrong with it.

    trained: images of each source that trained the weights to start from.
    """
    for name, source in data.sources.items():
        validates = data.split[name]
        kind = split if source.data_set.has_official else "balanced"
        print(
            f"{name}: {len(data.training[name])} images to train on, {len(validates)} to validate "
            f"on ({kind} split)"
        )
        known = len(set(validates) & set(trained.get(name, ())))
        if known:
            print(
                f"{name}: {known} of its validation images have trained the weights to start from"
            )
        if source.map_level == "object" and "object" in source.levels:
            print(datasets.unlabelled_share(source.index, data.vocabulary["object"]))
        unseen = classes_without_training(source, data.training[name], data.vocabulary)
        if unseen:
            print(f"{name}: only in validation images: {datasets.first_of(unseen)}")
        names = source.index.names.values()
        sides = [n for n in names if re.search(r"\b(left|right)\b", n, re.I)]
        if sides and flip and source.data_set.own_table:
            print(
                f"{name}: names with left or right ({datasets.first_of(sides)}): images are "
                "mirrored, --no-flip leaves them as they are"
            )
    counts = []
    for level, names in data.vocabulary.items():
        n = sum(len(p) - 1 for p in names.values()) if level == "part" else len(names)
        counts.append(f"{n} {level}")
    print(f"classes: {', '.join(counts)}")
    for stage in stages:
        if stage.name == "main":
            print(f"images: {sizes_of(stage.batches)}")
        step = stage.batches.plan.shape[1] - 1
        passes = stage.iterations * step / stage.images
        print(
            f"{stage.name} stage: {stage.iterations} iterations of {step} images, "
            f"{passes:.1f} passes over {', '.join(stage.sources)}, learning rate {lr:g}"
        )


def sizes_of(batches: datasets.TrainingBatches) -> str:
    if batches.crop:
        return f"squares of {batches.crop}, of short sides from half to twice that"
    short = ", ".join(map(str, batches.sizes))
    return f"short side of {short}, long side at most {batches.longest}"


def classes_without_training(source: Source, training: list[int], vocabulary: dict) -> list[str]:
    """Classes of the vocabulary that no training image has."""
    images_of = datasets.class_pixels(source.index)
    training = set(training)
    unseen = []
    for level in source.levels:
        if level != "part":
            for name in vocabulary[level]:
                images = images_of[level].get(name, ())
                if images and not set(images) & training:
                    unseen.append(name)
    return unseen


# ---------------------------------------------------------------- a run: its network, its files
@dataclasses.dataclass(eq=False)
class Run:
    """One training: the network, where it is, and its folder with ckpt.pt, best.pt, log.jsonl."""

    net: UPerNet
    data: Data
    stages: list[Stage]
    out: str
    lr: float
    workers: int | None
    save_every: int | None  # iterations, or None for every ten minutes
    eval_every: int
    device: torch.device
    amp: torch.dtype | None
    options: dict  # that a checkpoint keeps
    trained: dict[str, list[str]]  # all images that have trained the network at the run's end
    iteration: int = 0  # of the stage
    optimizer_state: dict | None = None  # of the checkpoint that is resumed
    best: float = -1.0
    best_at: str = ""

    def __post_init__(self):
        self.path = os.path.join(self.out, "ckpt.pt")
        self.best_path = os.path.join(self.out, "best.pt")
        self.log_path = os.path.join(self.out, "log.jsonl")
        self.names = [stage.name for stage in self.stages] + ["done"]
        self.stage = self.names[0]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.signals = Signals()
        self.saved_at = time.monotonic()

    def resume(self, checkpoint: dict) -> None:
        """Goes to where the checkpoint was written. UserError if the data have changed since."""
        if self.data.fingerprints != checkpoint["arguments"].get("fingerprints"):
            raise UserError(
                f"{self.out}: images, masks or names changed; --weights {shlex.quote(self.path)} "
                "with another --out trains its network on them"
            )
        self.net.load_state_dict(checkpoint["model"])
        torch.set_rng_state(checkpoint["random"].cpu())
        if self.scaler.is_enabled() and checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.stage = checkpoint["stage"]
        self.iteration = checkpoint["iteration"]
        self.optimizer_state = checkpoint["optimizer"]
        print(f"{self.out}: resumes the {self.stage} stage after {self.iteration} iterations")
        step = images_of_step(self.options)
        before = images_of_step(checkpoint["arguments"])
        if step != before:
            print(f"--batch-size, --accumulate, processes: {step} images a step, {before} before")

    def stages_left(self) -> list[Stage]:
        return self.stages[self.names.index(self.stage) :]

    def lines_written(self) -> int:
        """Lines of the log up to where the run is."""
        earlier = self.stages[: self.names.index(self.stage)]
        return sum(stage.iterations for stage in earlier) + self.iteration

    def prepare(self, stage: Stage) -> tuple[nn.Module, torch.optim.Optimizer]:
        """(model to call, optimizer) of a stage."""
        # Section 3: textures are learned last, and only their head is trained.
        for key, parameter in self.net.named_parameters():
            in_head = key.startswith("heads.texture.")
            parameter.requires_grad_(in_head if stage.name == "texture" else not in_head)
        optimizer = torch.optim.SGD(parameter_groups(self.net), lr=self.lr, momentum=0.9)
        if self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
        self.optimizer_state = None
        model = self.net
        if datasets.processes() > 1:
            # Some parameters lie off a step's path: other sources' heads, an unused fusion.
            partial = len(stage.sources) > 1 or "object" not in self.data.vocabulary
            unused = partial and stage.name == "main"
            model = DistributedDataParallel(self.net, find_unused_parameters=unused)
        return model, optimizer

    def loader(self, stage: Stage) -> DataLoader:
        """The batches of a stage from where the run is."""
        pinned = self.device.type == "cuda"
        first = self.iteration * stage.batches.accumulate
        return datasets.loader(stage.batches, first, self.workers, pinned)

    def is_validation_due(self, stage: Stage) -> bool:
        is_end = stage is self.stages[-1] and self.iteration == stage.iterations
        return self.eval_every > 0 and self.iteration % self.eval_every == 0 and not is_end

    def save(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Writes ckpt.pt, and curves.png."""
        self.write(self.path, optimizer)
        self.saved_at = time.monotonic()
        if datasets.is_main_process():
            draw_curves(self.log_path, os.path.join(self.out, "curves.png"))

    def write(self, path: str, optimizer: torch.optim.Optimizer | None) -> None:
        """Writes a checkpoint, in the main process. FloatingPointError if the network diverged."""
        if not datasets.is_main_process():
            return
        model = self.net.state_dict()
        for name, value in model.items():
            if not value.isfinite().all():
                raise FloatingPointError(name)
        content = {
            "model": model,
            "network": self.net.network,
            "vocabulary": self.data.vocabulary,
            "split": self.data.split,
            "trained": self.trained,
            "optimizer": optimizer.state_dict() if optimizer else {},
            "scaler": self.scaler.state_dict(),
            "stage": self.stage,
            "iteration": self.iteration,
            "random": torch.get_rng_state(),
            "arguments": self.options,
        }
        datasets.write_file(path, functools.partial(torch.save, content))

    def save_if_due(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        """Writes a checkpoint when it is time, and after a signal, which then ends the program."""
        received = largest_of_processes(self.signals.received)
        due = time.monotonic() - self.saved_at > 600
        if self.save_every:
            due = self.iteration % self.save_every == 0
        if received or (due and self.iteration < stage.iterations):
            self.save(optimizer)
        if received:
            print(
                f"\nstopped and saved after {self.iteration} iterations of the {self.stage} stage"
            )
            command = f"{launcher()} train.py --resume --out {shlex.quote(self.out)}"
            print(f"{command}   # resumes it", flush=True)
            raise SystemExit(128 + received)

    def finish_stage(self) -> None:
        self.stage = self.names[self.names.index(self.stage) + 1]
        self.iteration = 0
        self.save()

    def write_log(self, line: dict) -> None:
        if not datasets.is_main_process():
            return
        try:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as e:  # of a full disk, without the file's name
            raise UserError(f"{self.log_path}: cannot be written ({e.strerror})") from None

    def validate(self, pictures: str | None = None) -> dict:
        """Metrics on the validation images; on the main process's batch-norm statistics, since on
        CPUs each process has its own.
        """
        if dist.is_initialized():
            for value in self.net.state_dict().values():
                dist.broadcast(value, 0)
        data = self.data
        return evaluate.evaluate(
            self.net,
            data.vocabulary,
            data.sources,
            data.validation,
            pictures=pictures,
            workers=self.workers,
        )

    def validate_on_the_way(self, optimizer: torch.optim.Optimizer) -> dict:
        """Metrics for the log; the best network so far is kept in best.pt."""
        metrics = self.validate()
        print(f"after {self.iteration} iterations of the {self.stage} stage:")
        print(evaluate.table(metrics))
        self.keep_best(metrics, optimizer)
        return without_iou(metrics)

    def keep_best(self, metrics: dict, optimizer: torch.optim.Optimizer | None = None) -> None:
        if headline(metrics) > self.best:
            self.best = headline(metrics)
            self.best_at = f"iteration {self.iteration} of the {self.stage} stage"
            if self.stage == "done":
                self.best_at = "the end"
            self.write(self.best_path, optimizer)

    def recall_best(self, lines: list[dict]) -> None:
        """The best of the validations in the log."""
        for line in lines:
            if "metrics" in line and headline(line["metrics"]) > self.best:
                self.best = headline(line["metrics"])
                self.best_at = f"iteration {line['iteration'] + 1} of the {line['stage']} stage"


def launcher() -> str:
    """How this process was started: python, or torchrun on one or several machines."""
    if datasets.processes() == 1:
        return "python"
    command = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if nodes != "1":
        address = os.environ.get("MASTER_ADDR")
        command += f" --nnodes={nodes} --node_rank=RANK --master_addr={address}"
    return command


class Signals:
    """Notes SIGTERM and Ctrl-C, so that the iteration is finished and saved; one that comes two
    seconds after the first takes effect at once (to groups of processes they come twice).
    """

    def __init__(self):
        self.received = 0  # the number of the signal
        self.received_at = 0.0

    def __enter__(self) -> "Signals":
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        if not self.received:
            self.received = number
            self.received_at = time.monotonic()
        elif time.monotonic() - self.received_at > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def parameter_groups(net: nn.Module) -> list[dict]:
    """The trainable parameters; no weight decay on biases and norms (as released)."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    weights = [p for p in trainable if p.ndim > 1]
    biases_and_norms = [p for p in trainable if p.ndim == 1]
    return [
        {"params": weights, "weight_decay": 1e-4},
        {"params": biases_and_norms, "weight_decay": 0.0},
    ]


def headline(metrics: dict) -> float:
    """What makes a network the best: the mean over the levels of mean IoU, or top-1."""
    values = []
    for of_level in metrics.values():
        for name in ("mean_iou", "mean_iou_bg", "top1"):
            if of_level.get(name) is not None:
                values.append(of_level[name])
    return sum(values) / len(values) if values else -1.0


def without_iou(metrics: dict) -> dict:
    """The metrics without those of single classes."""
    short = {}
    for level, of_level in metrics.items():
        short[level] = {name: value for name, value in of_level.items() if name != "iou"}
    return short


def cut_log(path: str, lines: int) -> list[dict]:
    """Keeps and returns the first `lines` lines, of the iterations that the checkpoint has seen."""
    if not os.path.exists(path):
        return []
    kept = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[:lines]
    try:
        content = [json.loads(line) for line in kept]
    except ValueError as e:
        raise UserError(f"{path}: not a log of train.py's ({e}); move it away to resume") from None
    text = "".join(line + "\n" for line in kept)
    datasets.write_file(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
    return content


def draw_curves(log: str, path: str) -> None:
    """Each level's loss and the learning rate as a picture, of 160 stretches of the run."""
    if not os.path.exists(log):
        return
    points = {name: [] for name in (*LEVELS, "learning rate")}
    lines = Path(log).read_text(encoding="utf-8").splitlines()
    for k, text in enumerate(lines):
        line = json.loads(text)
        for name, value in {**line["loss"], "learning rate": line["lr"]}.items():
            if value is not None:
                points[name].append((k, value))
    panels = []
    for name, pairs in points.items():
        if pairs:
            stretches = np.array_split(pairs, min(160, len(pairs)))
            if name in LEVELS:
                title = f"{name}, loss"
                shown = np.array([stretch.mean(axis=0) for stretch in stretches])
            else:  # which jumps between the stages: no means
                title = name
                shown = np.array([stretch[0] for stretch in stretches])
            curves = [(shown[:, 0], shown[:, 1], "#2255cc")]
            top = float(shown[:, 1].max()) or 1.0
            panels.append(datasets.plot(title, "iteration", len(lines), top, curves))
    if panels:
        datasets.save_picture(datasets.sheet_of([panels[:3], panels[3:]]), path)


# ---------------------------------------------------------------- the weights to start from
class Start(NamedTuple):
    """What a run starts from: a file of weights, of which only `state` is known if it is a
    backbone's; a checkpoint to resume, then `trained` alone; or nothing."""

    path: str = ""
    state: dict[str, Tensor] = {}  # under our keys
    network: dict = {}  # UPerNet's arguments
    vocabulary: dict = {}
    options: dict = {}  # of the run that wrote it
    trained: dict[str, list[str]] = {}  # images of each source


def read_start(path: str) -> Start:
    """The file that --weights names: one of our checkpoints, one of mmsegmentation's, or a
    backbone's state dict, as it is or under `state_dict` or `model`, with or without prefixes. A
    backbone gets images as torchvision's do: RGB, normalised.
    """
    try:
        content = upernet.read_file(path)
        if "vocabulary" in content:
            net, content = upernet.read_checkpoint(path)
            return Start(
                path,
                net.state_dict(),
                net.network,
                content["vocabulary"],
                options=content["arguments"],
                trained=content["trained"],
            )
        state = content.get("state_dict", content.get("model", content))
        if not isinstance(state, dict):
            raise ValueError(f"{path}: holds no dictionary of weights")
        if "decode_head.conv_seg.weight" in state:
            net, vocabulary = upernet.load_mmseg(path)
            return Start(path, net.state_dict(), net.network, vocabulary)
    except ValueError as e:
        raise UserError(f"--weights {e}; it takes imagenet, none, or a file") from None
    if any(str(key).startswith("heads.") for key in state):
        raise UserError(
            f"--weights {path}: a UPerNet's state_dict() without its classes; save "
            '{"model": net.state_dict(), "network": net.network, "vocabulary": {"object": names}}'
        )
    backbone = {}
    for key, value in state.items():
        key = str(key).removeprefix("module.").removeprefix("backbone.")
        if isinstance(value, Tensor) and not key.startswith("fc."):
            backbone[f"backbone.{key}"] = value
    return Start(path, backbone)


NETWORK_OPTIONS = "backbone channels stem output_stride ppm fpn fusion head_conv".split()


def options_of(start: Start, given: dict) -> dict:
    """The options that a file of weights brings: its network; of our checkpoints the sizes, and the
    data if none are given."""
    keys = []
    if "sizes" not in given and "crop" not in given:
        keys += ["sizes", "max_size", "crop"]
    if "data" not in given and "root" not in given:
        keys += ["data", "root", "cache"]
    options = {key: start.options[key] for key in keys if key in start.options}
    for key in NETWORK_OPTIONS:
        if key in start.network:
            options[key] = start.network[key]
    return options


def load_start(net: UPerNet, vocabulary: dict, start: Start) -> None:
    """Loads what fits into the network, classifiers by class name; says what starts over."""
    ours = net.state_dict()
    theirs = dict(start.state)
    for level in net.heads:
        if level not in start.vocabulary:
            continue
        weight = f"heads.{level}.classifier.weight"
        bias = f"heads.{level}.classifier.bias"
        if theirs[weight].shape[1:] != ours[weight].shape[1:]:
            print(f"{level}: all classes start over, since --channels differs")
            del theirs[weight], theirs[bias]
            continue
        names = evaluate.channel_names(vocabulary)[level]
        their_names = evaluate.channel_names(start.vocabulary)[level]
        new = [name for name in names if name not in their_names]
        kept = f"{len(names) - len(new)} of {len(names)} classes keep their weights, by name"
        if new:
            kept += f"; new: {datasets.first_of(new)}"
        print(f"{level}: {kept}")
        for key in (weight, bias):
            theirs[key] = rows_by_name(ours[key], theirs[key], names, their_names)
    fits = {}
    for key, value in theirs.items():
        if key in ours and ours[key].shape == value.shape:
            fits[key] = value
    if not any(key.endswith("weight") for key in fits):
        raise UserError(
            f"--weights {start.path}: nothing in it fits this network, which has "
            f"{next(iter(ours))}; the file has {next(iter(theirs), None)}"
        )
    missing = net.load_state_dict(fits, strict=False).missing_keys
    left_out = [key for key in theirs if key not in fits]
    print(f"{start.path}: {len(fits)} of {len(ours)} tensors loaded")
    for keys, what in ((missing, "start over"), (left_out, "left out")):
        modules = dict.fromkeys(".".join(key.split(".")[:2]) for key in keys)
        if modules:
            print(f"{what}: {datasets.first_of(modules)}")


def rows_by_name(ours: Tensor, theirs: Tensor, names: list[str], their_names: list[str]) -> Tensor:
    """A classifier's tensor with their rows for the classes of the same name."""
    rows = ours.cpu().clone()
    for k, name in enumerate(names):
        if name in their_names:
            rows[k] = theirs[their_names.index(name)]
    return rows


# ---------------------------------------------------------------- which run, with which options
def choose_run(
    parser: datasets.Parser, given: dict
) -> tuple[argparse.Namespace, dict | None, Start]:
    """(options, the checkpoint to resume or None, the weights to start from).

    Raises UserError if there is no run to resume, if there is one already, or if options do not
    fit.
    """
    start = Start()
    stored = {}
    if given.get("weights", "none") not in ("imagenet", "none") and "resume" not in given:
        start = read_start(given["weights"])
        stored = options_of(start, given)
    args = parser.complete(given, stored, start.path)
    taken = []
    for key, value in stored.items():
        option = parser.options[key]
        if value != option.default and key not in given:
            text = "" if option.type is bool else f" {datasets.as_text(value)}"
            taken.append(f"--{option.name}{text}")
    if taken:
        print(f"from {start.path}: {', '.join(taken)}")
    if not args.out:
        name = "toy" if args.data == "toy" else "+".join(datasets.named_sources(args.data))
        args.out = os.path.join("runs", name)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"--out {args.out}: not a folder")
    has_run = os.path.exists(os.path.join(args.out, "ckpt.pt"))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if has_run:
        checkpoint = read_run(args.out)
        # After a failure torchrun repeats the command, which then resumes what it has begun.
        repeats = restarted and checkpoint["arguments"].get("agent") == os.getppid()
        if not args.resume and not repeats:
            raise UserError(
                f"{args.out}: holds a run already; --resume resumes it, --out names another folder"
            )
        args = options_to_resume(parser, given, args.out, checkpoint)
        return args, checkpoint, Start(trained=checkpoint["trained"])
    if args.resume and not restarted:
        raise UserError(f"{args.out}/ckpt.pt: no run to resume; see --out")
    if not args.crop and args.max_size < min(args.sizes):
        raise UserError(f"--max-size: at least the smallest of --sizes, {min(args.sizes)}")
    if args.crop % 32:
        raise UserError(f"--crop {args.crop}: a multiple of 32")
    if args.crop and {"sizes", "max_size"} & set(given):
        print("--crop takes the place of --sizes and --max-size, which have no effect")
    if args.levels and "part" in args.levels and "object" not in args.levels:
        raise UserError("--levels: part needs object")
    return args, None, start


def read_run(out: str) -> dict:
    """The checkpoint of the run in a folder. UserError if it is none that can be resumed."""
    path = os.path.join(out, "ckpt.pt")
    try:
        net, checkpoint = upernet.read_checkpoint(path)
    except ValueError as e:
        raise UserError(
            f"{path}: no run to resume ({e}); see --out, or delete it and leave out --resume"
        ) from None
    keys = ("arguments", "random", "optimizer", "scaler", "split", "stage", "iteration")
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: no run to resume ({', '.join(missing)} missing); see --weights")
    checkpoint["model"] = net.state_dict()
    # What earlier editions left out, or named otherwise.
    checkpoint["network"] = net.network
    arguments = checkpoint["arguments"]
    arguments.setdefault("flip", not arguments.get("no_flip", False))
    return checkpoint


def options_to_resume(
    parser: datasets.Parser, given: dict, out: str, checkpoint: dict
) -> argparse.Namespace:
    """The run's options, with those given that may change. UserError for others."""
    stored = checkpoint["arguments"]
    for key, value in given.items():
        option = parser.options[key]
        if not option.resume and stored.get(key) != value:
            kept = "its own"
            if option.type is not bool:
                kept = datasets.as_text(stored.get(key))
            raise UserError(
                f"--{option.name}: a resumed run keeps {kept}, as {out} has; leave --{option.name} "
                "out"
            )
    return parser.complete(given, {**stored, "out": out}, os.path.join(out, "ckpt.pt"))


def is_finished(checkpoint: dict | None, out: str) -> bool:
    """Whether nothing is left to do for the run in the folder `out`, the metrics included; then it
    says so."""
    if checkpoint is None or checkpoint["stage"] != "done":
        return False
    if any(checkpoint["split"].values()) and not os.path.exists(os.path.join(out, "metrics.json")):
        return False
    path = shlex.quote(os.path.join(out, "ckpt.pt"))
    print(f"{out}: this run is finished; python evaluate.py {path} evaluates it,")
    print(f"python train.py --weights {path} --out NEW --lr RATE trains its network further")
    return True


# ---------------------------------------------------------------- the command: options end here
def command(parser: datasets.Parser, given: dict) -> None:
    datasets.join_processes()
    args, checkpoint, start = datasets.from_main_process(choose_run, parser, given)
    if datasets.from_main_process(is_finished, checkpoint, args.out):
        return
    device = datasets.pick_device(args.device)
    indexes = datasets.open_indexes(
        args.data, args.folder, args.cache_folder, args.allow_broken, args.workers, args.levels
    )
    if checkpoint:
        vocabulary = checkpoint["vocabulary"]
        split = checkpoint["split"]
        network = checkpoint["network"]
    else:
        place = (args.folder, args.cache_folder)
        vocabulary, split = datasets.from_main_process(
            divide, indexes, args.minima, args.levels, args.split, *place, start.trained
        )
        network = {
            "classes": upernet.class_counts(vocabulary),
            "pool": start.network.get("pool", "prroi"),
            "test_size": test_size(args.sizes, args.max_size, args.crop),
            "backbone": args.backbone,
            "channels": args.channels,
            "stem": args.stem,
            "output_stride": args.output_stride,
            "ppm": args.ppm,
            "fpn": args.fpn,
            "fusion": args.fusion,
            "head_conv": args.head_conv,
        }
    largest = largest_size(args.sizes, args.max_size, args.crop)
    data = open_data(indexes, vocabulary, split, args.cache_folder, *largest)
    augment = {"sizes": args.sizes, "longest": args.max_size, "crop": args.crop, "flip": args.flip}
    stages = plan_stages(
        data, args.iters, args.texture_iters, args.batch_size, args.accumulate, args.seed, augment
    )
    check_batch_size(args.batch_size, args.crop or min(args.sizes), network["pool"])
    torch.manual_seed(args.seed)
    run = Run(
        net=UPerNet(**network).to(device),
        data=data,
        stages=stages,
        out=args.out,
        lr=args.lr,
        workers=args.workers,
        save_every=args.save_every,
        eval_every=args.eval_every,
        device=device,
        amp=datasets.pick_amp(args.amp, device),
        options=stored_options(vars(args), data, stages),
        trained=trained_images(data, start.trained),
    )
    if checkpoint:
        run.resume(checkpoint)
    else:
        describe(data, stages, start.trained, args.split, args.flip, args.lr)
        datasets.from_main_process(load_weights, run.net, vocabulary, args.weights, start)
    with claimed(run.out, is_new=not checkpoint):
        carry_out(run, is_new=not checkpoint, compiled=args.compile)


def carry_out(run: Run, is_new: bool, compiled: bool) -> None:
    """Trains, with synchronised batch norm on several GPUs, and evaluates. A new run first removes
    what an earlier one has left in its folder."""
    lines = datasets.from_main_process(cut_log, run.log_path, run.lines_written())
    run.recall_best(lines)
    # Section 3.1: batch norm sees the images of all GPUs. Its momentum is PyTorch's 0.1 (ours).
    if run.device.type == "cuda" and datasets.processes() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(run.net)  # in place
    if compiled:
        run.net.compile()
    if is_new:
        datasets.from_main_process(remove_results, run.out)
        run.save()
    with run.signals:
        try:
            train(run)
        except FloatingPointError as e:
            raise UserError(
                f"the loss or the network is not finite at iteration {run.iteration} of the "
                f"{run.stage} stage ({e}); {run.path} is the last good checkpoint; --weights "
                f"{run.path} with another --out and a lower --lr trains it further"
            ) from None
    print(f"wrote {run.path}, and beside it log.jsonl and curves.png")
    if run.data.validation:
        evaluate_run(run)
    is_best = run.best_at in ("", "the end")
    path = shlex.quote(run.path if is_best else run.best_path)
    print(f"next: python evaluate.py {path} --photo YOUR.jpg")


@contextlib.contextmanager
def claimed(out: str, is_new: bool):
    """The context in which the folder of a run is this process's alone. UserError if another run
    writes there."""
    if not datasets.is_main_process():
        yield
        return
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, ".lock"), "w") as lock:
        try:
            import fcntl  # not on Windows

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{out}: another run writes there; --out names another") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        if is_new and os.path.exists(os.path.join(out, "ckpt.pt")):
            raise UserError(f"{out}: another run has begun there; --out names another")
        for unfinished in Path(out).glob(".[0-9]*.*.pt"):  # of a process that was killed
            unfinished.unlink()
        yield


def remove_results(out: str) -> None:
    """Removes what an earlier run has left in the folder of a new one."""
    for name in ("metrics.json", "best.pt"):
        Path(out, name).unlink(missing_ok=True)


def largest_size(sizes: list[int], max_size: int, crop: int) -> tuple[int, int]:
    """The (short side, longest side) of the largest image of `TrainingBatches.sample`."""
    if crop:
        return (2 * crop, 8 * crop)
    return (max(sizes), max_size)


def test_size(sizes: list[int], max_size: int, crop: int) -> tuple[int, int, None]:
    """The network's `test_size` after training at these sizes: the middle short side, 450 of the
    paper's."""
    if crop:
        return (crop, 4 * crop, None)
    middle = sorted(sizes)[len(sizes) // 2]
    return (middle, max(middle, max_size), None)


def check_batch_size(batch_size: int, smallest: int, pool: str) -> None:
    """UserError if batch norm would see a single value: of C5, or of what is pooled from it."""
    if batch_size == 1 and (smallest <= 32 or pool == "pspnet"):
        raise UserError(
            "--batch-size 1: batch norm needs --sizes or --crop above 32, with pspnet's pooling "
            "two images"
        )


def load_weights(net: UPerNet, vocabulary: dict, weights: str, start: Start) -> None:
    """The weights to start from, in the main process: the others get them from it."""
    if start.path:
        load_start(net, vocabulary, start)
    elif weights == "imagenet":
        try:
            resnet.load_imagenet(net.backbone)
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(
                f"--weights imagenet: not available ({e}); give --weights none, or a file"
            ) from None


def trained_images(data: Data, trained: dict[str, list[str]]) -> dict[str, list[str]]:
    """All images that have trained the network at the run's end: `trained`, which trained the
    weights to start from, and the run's own."""
    images = {name: sorted(of_source) for name, of_source in trained.items()}
    for name, numbers in data.training.items():
        own = [data.sources[name].index.images[i] for i in numbers]
        images[name] = sorted({*own, *trained.get(name, ())})
    return images


def stored_options(options: dict, data: Data, stages: list[Stage]) -> dict:
    """What a checkpoint keeps of the options and the data, as plain values."""
    stored = {**options, "root": os.path.abspath(options["root"]), "agent": os.getppid()}
    if options["cache"]:
        stored["cache"] = os.path.abspath(options["cache"])
    for stage in stages:
        stored["iters" if stage.name == "main" else "texture_iters"] = stage.iterations
    stored["processes"] = datasets.processes()
    stored["fingerprints"] = data.fingerprints
    stored["numbers"] = {}
    for source in data.sources.values():
        if source.data_set.own_table:
            stored["numbers"]["object"] = list(source.index.names)
    return stored


def images_of_step(stored: dict) -> int:
    """How many images a step of the main stage has, by what `stored_options` keeps."""
    processes = stored.get("processes", datasets.processes())
    return stored["batch_size"] * stored["accumulate"] * processes


def evaluate_run(run: Run) -> None:
    """Metrics and pictures at the run's end."""
    metrics = run.validate(os.path.join(run.out, "pictures"))
    if run.eval_every:
        run.keep_best(metrics)
    print(evaluate.table(metrics))
    path = os.path.join(run.out, "metrics.json")
    if datasets.is_main_process():
        datasets.write_json(metrics, path)
    print(f"wrote {path}, and pictures/ beside it")
    if run.best_at:
        mean = f"mean of the levels' IoU and top-1 {run.best:.4f}"
        print(f"wrote {run.best_path}: the network of {run.best_at}, {mean}")


BACKBONES = ("resnet50", "resnet18", "resnet34", "resnet101")
SIZES = [300, 375, 450, 525, 600]
AMP = ("auto", "bf16", "fp16", "off")
OPTIONS = [
    *datasets.DATA_OPTIONS,
    Option("backbone", str, "resnet50", "the backbone", BACKBONES, toy="resnet18"),
    Option("channels", int, 512, "width of everything after the backbone", toy=48),
    Option("stem", str, "7x7", "the backbone's first layers", ("7x7", "deep", "v1c")),
    Option("output-stride", int, 32, "stride of the backbone's last stage", (32, 16, 8)),
    Option("no-ppm", bool, True, "without the Pyramid Pooling Module"),
    Option("fpn", int, 2, "finest level of the feature pyramid (0: none)", (2, 3, 4, 0), least=0),
    Option("no-fusion", bool, True, "objects and parts on the finest level alone"),
    Option("no-head-conv", bool, True, "no 3x3 convolution before classifiers (texture: four)"),
    Option("weights", str, "imagenet", "or none, or a file: ours, mmsegmentation's", toy="none"),
    datasets.LEVELS_OPTION,
    Option("split", str, "balanced", "split.json, or the data's own", ("balanced", "official")),
    # Section 3.1: 16 images on 8 GPUs, rate, sizes. For the lengths see `plan_stages`.
    Option("iters", int, None, "of the main stage (5 an image at 16 a step)", toy=1450, least=0),
    Option("texture-iters", int, None, "of the texture stage (5 passes)", toy=380, least=0),
    Option("batch-size", int, 2, "images per process", toy=4, resume=True),
    Option("accumulate", int, 1, "batches of the same source per step", resume=True),
    Option("lr", float, 0.02, "learning rate at the start", toy=0.04, least=1e-12),
    Option("sizes", datasets.short_sides, SIZES, "short sides", toy=[76, 80, 84], least=32),
    Option("max-size", int, 1200, "longest side", toy=160),
    Option("crop", int, 0, "cut squares of N, a multiple of 32, in place of --sizes", least=0),
    Option("no-flip", bool, True, "do not mirror images"),
    Option("seed", int, 304, "of weights, batches and augmentation", least=0),
    Option("out", str, None, "folder for checkpoint, log, pictures (runs/<data>)", resume=True),
    Option("resume", bool, False, "resume the run in --out", resume=True),
    Option(
        "save-every", int, None, "iterations to a checkpoint (10 minutes)", toy=400, resume=True
    ),
    Option("eval-every", int, 0, "iterations to a validation (0: the end)", resume=True, least=0),
    datasets.WORKERS_OPTION,
    Option("amp", str, "auto", "mixed precision on CUDA", AMP, resume=True),
    *datasets.DEVICE_OPTIONS,
]


def main(argv: list[str] | None = None) -> None:
    description = "Trains UPerNet. In brackets the defaults (the paper's, if any), and the toy's."
    parser = datasets.Parser(description, OPTIONS)
    parser.run(command, argv)


if __name__ == "__main__":
    main()
