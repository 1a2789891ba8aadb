"""Training of UPerNet on sources that each label only some of the levels (section 3.1).

    python train.py                                             # the toy, made on the spot
    python train.py --data ade20k,dtd,os --batch-size 4 --accumulate 4   # one GPU; ./data
    torchrun --nproc_per_node=8 train.py --data ade20k,dtd,os   # eight: 16 images a step, too

Each iteration draws one source and updates only the path to its labels; textures come last, on the
frozen network. The method stands first: `update`, `train`, `plan_stages`, `draw_batches`, `freeze`.
"""

import collections
import contextlib
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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import balance_split
import datasets
import evaluate
import resnet
import upernet
from datasets import Batch, Source, TrainingBatches, UserError
from upernet import LEVELS, LOSS_WEIGHTS, UPerNet


# ---------------------------------------------------------------- one step, and the loop
def update(
    model: nn.Module,
    part_slices: dict[int, slice],
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    amp: torch.dtype | None,
) -> dict[str, float]:
    """Takes one step on batches of one source, averaging gradients; returns each level's loss in
    this process.

    Only the path to the source's levels moves, and nothing else at all. `levels=` keeps the rest
    out of the forward pass, so that its batch-norm statistics stay, and out of the backward pass,
    so that its gradients stay None (under DistributedDataParallel too). SGD leaves parameters
    without a gradient alone, their weight decay and momentum too (ours; in the released code both
    act). A level without a label in this batch is on the path: its gradients are zero, and decay
    and momentum act. In fp16 the scaler skips a step whose gradients overflow.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = {}
    for k, batch in enumerate(batches):
        images = torch.from_numpy(batch.images).to(device) / 255
        # Of all levels of the source, also those without a label in this batch.
        labels = {level: torch.from_numpy(y).to(device) for level, y in batch.labels.items()}
        with without_exchange(model, is_last=k == len(batches) - 1):
            with upernet.autocast(device, amp):
                logits = model(images, levels=list(labels))
            loss = upernet.losses(logits, labels, part_slices)
            total = sum(LOSS_WEIGHTS[level] * value for level, value in loss.items())
            scaler.scale(total / len(batches)).backward()
        for level, value in loss.items():
            losses[level] = losses.get(level, 0) + value.detach() / len(batches)
    scaler.step(optimizer)
    scaler.update()
    return {level: value.item() for level, value in losses.items()}


def without_exchange(model, is_last):
    """The context in which processes do not average gradients before the last batch."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


NOT_FINITE = 1000  # an event of `train`, as the numbers of signals, which are lower


def train(net, stages, checkpoint, validate, out, lr, device, amp, workers, save_every, eval_every):
    """Trains the stages that are left, saving on the way. Three ways out, besides errors of files:
    all is trained (returns 0), a signal came (returns its number, after saving), the loss or (seen
    by `save`) the network is not finite (FloatingPointError, without saving).

    stages: name -> its batches. checkpoint: what `save` writes but for the network; its stage,
    iteration and best are kept up to date. validate: () -> metrics, which leaves the network's mode
    as it was. save_every, eval_every: counts of iterations.
    """
    saved_at = time.monotonic()
    with Signals() as signals:
        for (name, stage), following in zip(stages.items(), [*stages, "done"][1:]):
            if name != checkpoint["stage"]:  # trained before it was resumed
                continue
            net.train()
            if name == "texture":
                freeze(net)
            model, optimizer, scaler = prepare(net, checkpoint, device, amp)
            first = checkpoint["iteration"]
            reader = iter(datasets.loader(stage, first * stage.accumulate, workers))
            for iteration in progress_bar(name, first, stage.iterations):
                began = time.perf_counter()
                # Section 3.1: poly; a policy for each stage is ours.
                rate = lr * (1 - iteration / stage.iterations) ** 0.9
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batches = [next(reader) for _ in range(stage.accumulate)]
                loss = update(model, net.part_slices, batches, optimizer, scaler, device, amp)
                checkpoint["iteration"] = iteration + 1

                event = NOT_FINITE if has_diverged(loss, scaler) else signals.received
                event = datasets.largest_of_processes(event)  # all of them take the same way out
                if event == NOT_FINITE:
                    raise FloatingPointError(f"iteration {iteration} of the {name} stage")
                line = {
                    "stage": name,
                    "iteration": iteration,
                    "source": batches[0].source,
                    "lr": rate,
                    "loss": finite(loss),
                    "seconds": round(time.perf_counter() - began, 4),
                }
                ends_stage = iteration + 1 == stage.iterations
                ends_run = ends_stage and following == "done"  # then `run` evaluates
                if eval_every and (iteration + 1) % eval_every == 0 and not ends_run:
                    line["metrics"] = validate()
                    keep_best(line["metrics"], out, checkpoint, net, optimizer, scaler)
                write_log(line, out)

                is_due = time.monotonic() - saved_at > 600  # seconds
                if save_every:
                    is_due = (iteration + 1) % save_every == 0
                if event or (is_due and not ends_stage):
                    save(f"{out}/ckpt.pt", checkpoint, net, optimizer, scaler)
                    saved_at = time.monotonic()
                if event:
                    return event
            checkpoint.update(stage=following, iteration=0, optimizer={}, scaler={})
            save(f"{out}/ckpt.pt", checkpoint, net)
    return 0


def has_diverged(loss, scaler):
    if scaler.is_enabled():  # it skips steps whose gradients overflow, and lowers its scale
        return scaler.get_scale() < 1
    return not all(math.isfinite(value) for value in loss.values())


def finite(loss):
    """The losses as JSON has them: None for one that is not finite, of a step that fp16 skipped."""
    return {level: value if math.isfinite(value) else None for level, value in loss.items()}


# ---------------------------------------------------------------- the stages, and what they train
TEXTURE_BATCH = 8  # times --batch-size (ours): squares of 64 are small


def plan_stages(
    sources, iters, texture_iters, batch_size, accumulate, seed, crop=0, **augmentation
) -> dict[str, TrainingBatches]:
    """The stages' batches for this process, by name: "main", of all sources but the textures, then
    "texture", of these (see `freeze`). A stage without images or iterations is left out.

    iters, texture_iters: None for 5 iterations per training image at 16 images a step, the paper's
        100k for ADE20K's 20k images; for 5 passes over the textures (ours; the paper has "a few").
    crop, augmentation: further arguments of `TrainingBatches`.
    """
    textures = [source for source in sources if source.data_set.close_ups]
    others = [source for source in sources if not source.data_set.close_ups]
    shape = (accumulate, datasets.processes(), batch_size)
    texture_shape = (accumulate, datasets.processes(), TEXTURE_BATCH * batch_size)
    if iters is None:
        iters = math.ceil(5 * 16 * training_images(others) / math.prod(shape))
    if texture_iters is None:
        texture_iters = math.ceil(5 * training_images(textures) / math.prod(texture_shape))
    augmentation.update(seed=seed, crop=crop, rank=datasets.rank())
    stages = {}
    if iters and training_images(others):
        groups = image_groups(others, by_orientation=not crop)  # squares need no padding
        plan = draw_batches(groups, iters, shape, seed)
        stages["main"] = TrainingBatches(others, plan, **augmentation)
    if texture_iters and training_images(textures):
        groups = image_groups(textures, by_orientation=False)
        plan = draw_batches(groups, texture_iters, texture_shape, seed)
        stages["texture"] = TrainingBatches(textures, plan, **augmentation)
    return stages


def training_images(sources):
    return sum(len(source.training) for source in sources)


def image_groups(sources: list[Source], by_orientation: bool) -> list[tuple[int, np.ndarray]]:
    """(position of a source, numbers of its images) for each group from which a batch comes.
    Section 3.1: a batch holds images of one orientation, which need little padding."""
    groups = []
    for position, source in enumerate(sources):
        images = np.array(source.training, np.int32)
        if by_orientation:  # sizes are (height, width)
            is_upright = (source.index.sizes[:, 0] > source.index.sizes[:, 1]).numpy()[images]
            groups += [(position, images[is_upright]), (position, images[~is_upright])]
        else:
            groups.append((position, images))
    return groups


def draw_batches(
    groups: list[tuple[int, np.ndarray]], iterations: int, shape: tuple, seed: int
) -> datasets.Plan:
    """Section 3.1: each iteration draws a source, with probability by its number of images.

    groups: see `image_groups`. Each iteration draws a group, by its number of images, so that the
        two orientations of a source together have its share (ours).
    shape: (batches, processes, images) of an iteration.
    Ours: no image repeats before every image of its group was used.
    """
    rng = np.random.default_rng(seed)
    groups = [(position, images) for position, images in groups if len(images)]
    counts = np.array([len(images) for _, images in groups])
    group_of = rng.choice(len(groups), iterations, p=counts / counts.sum())
    sources = np.array([position for position, _ in groups])[group_of]
    numbers = np.empty((iterations, *shape), np.int32)
    for k, (_, images) in enumerate(groups):
        rows = np.flatnonzero(group_of == k)
        n = len(rows) * math.prod(shape)
        passes = [rng.permutation(images) for _ in range(1 + n // len(images))]
        numbers[rows] = np.concatenate(passes)[:n].reshape(-1, *shape)
    return datasets.Plan(sources, numbers)


def prepare(net, checkpoint, device, amp):
    """(model to call, optimizer, gradient scaler) of the checkpoint's stage, as it left them."""
    optimizer = torch.optim.SGD(parameter_groups(net), momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    if checkpoint["optimizer"]:
        optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(checkpoint["scaler"])
    model = net
    if datasets.processes() > 1:
        # In the main stage the heads of other sources lie off a step's path.
        is_main_stage = checkpoint["stage"] == "main"
        model = DistributedDataParallel(net, find_unused_parameters=is_main_stage)
    return model, optimizer, scaler


def freeze(net: UPerNet) -> None:
    """Section 3, the texture stage: after everything else, the texture head alone is trained. All
    else is frozen, its batch-norm statistics too; and no gradient passes from the head to C2
    (`UPerNet.forward`). Images are resized to a short side of 64 and cut to a square (the paper:
    "~64x64"; see `datasets.texture_square`)."""
    net.requires_grad_(False)
    net.heads["texture"].requires_grad_(True)
    net.eval()
    net.heads["texture"].train()


def parameter_groups(net: nn.Module) -> list[dict]:
    """The trainable parameters; no weight decay on biases and norms (as released)."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    weights = [p for p in trainable if p.ndim > 1]
    biases_and_norms = [p for p in trainable if p.ndim == 1]
    return [
        {"params": weights, "weight_decay": 1e-4},
        {"params": biases_and_norms, "weight_decay": 0.0},
    ]


def synchronise_batch_norm(net: UPerNet, device: torch.device) -> None:
    """Section 3.1: batch norm sees the images of all GPUs. Its momentum is PyTorch's 0.1 (ours)."""
    if device.type == "cuda" and datasets.processes() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place


# Section 3.1: short sides, with a long side of at most 1200 (`--max-size`). `TrainingBatches` draws
# one for each iteration (ours; in the paper for each image).
SIZES = [300, 375, 450, 525, 600]


def test_and_largest_size(sizes: list[int], max_size: int, crop: int) -> tuple[tuple, tuple]:
    """(`test_size`, largest size): two sizes that follow from those of training.

    `UPerNet.test_size` has the middle short side: 450 of the paper's `SIZES`, as section 3.1 tests
    (ours, for others). The largest size, (short side, longest side), is for prepared labels.
    """
    shorts = sorted(sizes or [crop // 2, crop, 2 * crop])
    middle = shorts[len(shorts) // 2]
    if crop:  # the longest side is 4 times the short one, see `TrainingBatches.sample`
        return (middle, 4 * middle, None), (shorts[-1], 4 * shorts[-1])
    return (middle, max_size, None), (shorts[-1], max_size)


# ---------------------------------------------------------------- signals, and a bar
class Signals:
    """Notes the signals of Ctrl-C, kill, a closed terminal and a queue's warning, so that the
    iteration is finished and saved; one that comes two seconds after the first takes effect at once
    (to groups of processes they come twice).
    """

    def __init__(self):
        self.received = 0  # the number of the signal
        self.received_at = 0.0
        self.before = {}

    def __enter__(self) -> "Signals":
        for number in datasets.SIGNALS:
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if is_ignored and signal.Signals(number).name == "SIGHUP":  # by nohup
                continue
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


def progress_bar(stage, first, iterations):
    """The iterations of a stage from `first` on, with a bar."""
    return tqdm(
        range(first, iterations),
        stage,
        total=iterations,
        initial=first,
        disable=not datasets.is_main_process(),
        file=sys.stdout,
        mininterval=0.1 if sys.stdout.isatty() else 30,  # seconds
    )


# ---------------------------------------------------------------- the weights to start from
def read_start(path):
    """The file that --weights names, as a checkpoint of ours: one of ours, one of mmsegmentation's,
    or a backbone's state dict, as it is or under `state_dict` or `model`, with or without prefixes,
    of which there is `model` alone. A backbone gets images as torchvision's do: RGB, normalised.
    UserError for other files.
    """
    start = {"network": {}, "vocabulary": {}, "arguments": {}, "trained": {}}
    try:
        content = upernet.read_file(path)
        state = content.get("state_dict", content.get("model", content))
        if "vocabulary" in content:
            net, content = upernet.read_checkpoint(path)
            return {**content, "model": net.state_dict(), "network": net.network}
        if "decode_head.conv_seg.weight" in state:
            net, names = upernet.load_mmseg(path)
            return {
                **start,
                "model": net.state_dict(),
                "network": net.network,
                "vocabulary": names,
            }
    except ValueError as e:
        raise UserError(f"--weights {e}; it takes imagenet, none, or a file") from None
    backbone = {}
    for key, value in state.items():
        key = key.removeprefix("module.").removeprefix("backbone.")
        if isinstance(value, Tensor) and not key.startswith("fc."):
            backbone[f"backbone.{key}"] = value
    return {**start, "model": backbone}


NETWORK_OPTIONS = "backbone channels stem output_stride ppm fpn fusion head_conv".split()


def options_of(start, argv):
    """The options that a file of weights brings: its network; of our checkpoints the sizes, unless
    the command names --sizes or --crop, and the data with their split, levels and thresholds,
    unless it names --data."""
    given = {word.split("=")[0] for word in argv}
    keys = []
    if not given & {"--sizes", "--crop"}:
        keys += ["sizes", "max_size", "crop"]
    if "--data" not in given:
        keys += ["data", "root", "split", "levels", *datasets.THRESHOLDS]
    options = {key: start["arguments"][key] for key in keys if key in start["arguments"]}
    for key in NETWORK_OPTIONS:
        if key in start["network"]:
            options[key] = start["network"][key]
    return options


def load_start(net, vocabulary, start, path):
    """Loads what fits into the network, classifiers by class name; says what starts over."""
    ours = net.state_dict()
    theirs = dict(start["model"])
    for level in net.heads:
        if level in start["vocabulary"]:
            names = upernet.channel_names(vocabulary)[level]
            their_names = upernet.channel_names(start["vocabulary"])[level]
            shared = [name for name in names if name in their_names]
            print(f"{level}: {len(shared)} of {len(names)} classes keep their weights, by name")
            for kind in ("weight", "bias"):
                key = f"heads.{level}.classifier.{kind}"
                if theirs[key].shape[1:] == ours[key].shape[1:]:
                    rows = ours[key].clone()
                    for name in shared:
                        rows[names.index(name)] = theirs[key][their_names.index(name)]
                    theirs[key] = rows
    fits = {}
    for key, value in theirs.items():
        if key in ours and ours[key].shape == value.shape:
            fits[key] = value
    if not any(key.endswith("weight") for key in fits):
        raise UserError(
            f"--weights {path}: nothing in it fits this network, which has {next(iter(ours))}; the "
            f"file has {next(iter(theirs), None)}"
        )
    net.load_state_dict(fits, strict=False)
    print(f"{path}: {len(fits)} of {len(ours)} tensors loaded")
    left = dict.fromkeys(".".join(key.split(".")[:2]) for key in ours if key not in fits)
    if left:
        print(f"start over: {datasets.listed(left)}")


def load_imagenet(backbone: nn.Module) -> None:
    """torchvision's ImageNet weights. UserError if they cannot be downloaded, or are damaged."""
    try:
        resnet.load_imagenet(backbone)
    except Exception as e:  # whatever a damaged file makes of the reader
        advice = "give --weights none, or a file"
        folder = Path(torch.hub.get_dir(), "checkpoints")
        for cached in folder.glob(f"resnet{backbone.depth}-*.pth"):
            advice = f"delete {cached} if it is damaged, or {advice}"
        reason = datasets.reason_of(e)
        raise UserError(f"--weights imagenet: not available ({reason}); {advice}") from None


# ---------------------------------------------------------------- checkpoint, log, curves
def save(path, checkpoint, net, optimizer=None, scaler=None):
    """Writes a checkpoint, in the main process. FloatingPointError if the network has diverged."""
    if not datasets.is_main_process():
        return
    content = {**checkpoint, "model": net.state_dict()}
    for name, value in content["model"].items():
        if not value.isfinite().all():
            raise FloatingPointError(name)
    if optimizer is not None:
        content.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    datasets.write_file(path, functools.partial(torch.save, content))
    draw_curves(os.path.dirname(path))


def keep_best(metrics, out, checkpoint, *state):
    """Keeps the network as best.pt if its mean score is the highest so far."""
    score = evaluate.mean_score(metrics)
    if score > checkpoint["best"]:
        checkpoint["best"] = score
        save(f"{out}/best.pt", checkpoint, *state)


def write_log(line, out):
    if not datasets.is_main_process():
        return
    path = f"{out}/log.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as e:  # of a full disk, without the file's name
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None
    if "metrics" in line:
        draw_curves(out)


def draw_curves(out):
    """curves.png from log.jsonl: each level's loss in blue, its scores in validations in red."""
    if not os.path.exists(f"{out}/log.jsonl"):
        return
    lines = {}  # an iteration's last line counts: a resumed run repeats some
    for text in Path(out, "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a full disk
            continue
        lines[line["stage"], line["iteration"]] = line
    losses = collections.defaultdict(list)
    scores = collections.defaultdict(list)
    for k, line in enumerate(lines.values()):
        for level, value in line["loss"].items():
            if value is not None:
                losses[level].append((k, value))
        for level, metrics in line.get("metrics", {}).items():
            scores[level].append((k, evaluate.mean_score({level: metrics})))
    panels = []
    for level in sorted(losses, key=LEVELS.index):
        stretches = np.array_split(losses[level], min(160, len(losses[level])))
        means = [stretch.mean(axis=0).tolist() for stretch in stretches]
        top = max(y for _, y in means)
        scaled = [(k, top * score) for k, score in scores[level]]
        title = f"loss of {level} by iteration"
        if scaled:
            title = f"loss of {level}; red, 0 to 1: validation"
        curves = [(means, "#2255cc"), (scaled, "#cc3333")]
        panels.append(datasets.plot(title, len(lines), top, curves))
    if panels:
        datasets.save_picture(datasets.sheet_of([panels[:3], panels[3:]]), f"{out}/curves.png")


# ---------------------------------------------------------------- options
TOY = {
    **datasets.TOY_OPTIONS,
    "backbone": "resnet18",
    "channels": 48,
    "weights": "none",
    "iters": 1450,
    "texture_iters": 380,
    "batch_size": 4,
    "lr": 0.04,
    "max_size": 160,
    "save_every": 400,
}
TOY_SIZES = [76, 80, 84]
# Options that --resume may change; all others are the run's own.
MAY_CHANGE = (
    "root cache workers batch_size accumulate save_every eval_every amp compile device resume out"
).split()


def make_parser():
    parser = datasets.make_parser(
        "train.py", "Trains UPerNet. In brackets the defaults (the paper's, if any), and the toy's."
    )
    datasets.add_data_options(parser)
    add = parser.add_argument
    count = {"type": datasets.positive, "metavar": "N"}
    count_or_0 = {"type": datasets.not_negative, "metavar": "N"}
    off = "store_false"
    backbones = ("resnet50", "resnet18", "resnet34", "resnet101")
    depths = "resnet18, 34, 50 or 101 (resnet50; toy resnet18)"
    add("--backbone", choices=backbones, default="resnet50", metavar="NAME", help=depths)
    add("--channels", **count, default=512, help="width after the backbone (512; toy 48)")
    add("--stem", choices=tuple(resnet.STEMS), default="7x7", help="the backbone's start (7x7)")
    add("--output-stride", type=int, choices=(32, 16, 8), default=32, help="the backbone's (32)")
    add("--no-ppm", dest="ppm", action=off, help="without the Pyramid Pooling Module")
    add("--fpn", type=int, choices=(2, 3, 4, 0), default=2, help="finest level (2; 0: no FPN)")
    add("--no-fusion", dest="fusion", action=off, help="objects, parts on the finest level alone")
    add("--no-head-conv", dest="head_conv", action=off, help="no 3x3 convolution in heads")
    add("--weights", default="imagenet", help="imagenet, none, or a file (imagenet; toy none)")
    add("--levels", type=datasets.levels_of, help=f"comma list of {','.join(LEVELS)} (all)")
    add(
        "--split",
        choices=("balanced", "official"),
        default="balanced",
        help="split.json's, or the data's own",
    )
    add("--iters", **count_or_0, help="main stage (5 an image at 16 a step; toy 1450)")
    add("--texture-iters", **count_or_0, help="texture stage (5 passes; toy 380)")
    add("--batch-size", **count, default=2, help="images per process (2; toy 4)")
    add("--accumulate", **count, default=1, help="batches of a source per step (1)")
    add("--lr", type=float, default=0.02, help="learning rate at the start (0.02; toy 0.04)")
    sizes = "short sides (300,375,450,525,600; toy 76,80,84)"
    add("--sizes", type=datasets.short_sides, help=sizes)
    add("--max-size", **count, default=1200, help="longest side, without --crop (1200; toy 160)")
    crop = "train on squares of N of images at --sizes (or at N/2 to 2 N)"
    add("--crop", **count_or_0, default=0, help=crop)
    add("--no-flip", dest="flip", action=off, help="do not mirror images")
    add("--seed", **count_or_0, default=304, help="of weights and batches (304)")
    add("--out", help="folder for checkpoint, log, pictures (runs/<data>)")
    add("--resume", action="store_true", help="resume the run in --out, if there is one")
    add("--save-every", **count, help="iterations to a checkpoint (10 minutes; toy 400)")
    add("--eval-every", **count_or_0, default=0, help="iterations to a validation (at the end)")
    amp = "mixed precision on CUDA (auto)"
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help=amp)
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", default="auto", help="cuda, mps, cpu, or cuda:1, .. (auto)")
    return parser


def read_options(argv):
    """(options, the checkpoint to resume or None, the file of weights to start from or None)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    start = None
    brought = {}
    if args.weights not in ("imagenet", "none"):
        start = read_start(args.weights)
        brought = options_of(start, argv)
    args = datasets.parse_options(parser, argv, TOY, brought)
    if not args.out:
        name = "toy" if args.data == "toy" else "+".join(datasets.named_sources(args.data))
        args.out = os.path.join("runs", name)
    path = f"{args.out}/ckpt.pt"
    if os.path.exists(path):
        if not args.resume:
            raise UserError(
                f"{args.out}: holds a run already; --resume resumes it, --out names another folder"
            )
        return *resumed_options(parser, argv, args.out, path), None
    if args.sizes is None:
        args.sizes = TOY_SIZES if args.data == "toy" else SIZES
        if args.crop:
            args.sizes = []  # from half to twice the crop
    if args.crop % 32:
        raise UserError(f"--crop {args.crop}: a multiple of 32")
    if not args.crop and args.max_size < max(args.sizes):
        raise UserError(f"--max-size: at least the largest of --sizes, {max(args.sizes)}")
    if start and start["network"].get("pool") == "pspnet" and args.batch_size == 1:
        raise UserError("--batch-size 1: batch norm after this file's pooling needs two images")
    if args.levels and "part" in args.levels and "object" not in args.levels:
        raise UserError("--levels: part needs object")
    return args, None, start


def resumed_options(parser, argv, out, path):
    """(the run's options, with those given that may change; its checkpoint, which keeps these)."""
    try:
        _, checkpoint = upernet.read_checkpoint(path)
    except ValueError as e:
        raise UserError(f"{e}; to start over, delete it") from None
    stored = {**checkpoint["arguments"], "out": out}
    args = datasets.parse_options(parser, argv, {}, stored)
    args.root = os.path.abspath(args.root)
    for key in stored.keys() & vars(args).keys():
        if key in MAY_CHANGE:
            checkpoint["arguments"][key] = getattr(args, key)
        elif getattr(args, key) != stored[key]:
            raise UserError(
                f"--{key.replace('_', '-')}: {out} keeps its own, {stored[key]}; leave it out"
            )
    return args, checkpoint


# ---------------------------------------------------------------- the command
def vocabulary_and_split(indexes, thresholds, levels, split, split_path):
    """(vocabulary of the levels, validation images of each source) of a new run; a balanced split
    does not depend on the levels."""
    everything = datasets.build_vocabulary(indexes, thresholds, levels or LEVELS)
    missing = [level for level in levels or () if level not in everything]
    if missing:
        raise UserError(f"--levels: the data have no class of {', '.join(missing)}")
    vocabulary = {level: y for level, y in everything.items() if level in (levels or LEVELS)}
    validation = {}
    for name, index in indexes.items():
        if not set(index.data_set.levels) & set(vocabulary):
            raise UserError(
                f"{name}: has no class that is large enough (see the --min- options), or no label "
                "of --levels (then leave it out of --data)"
            )
        validation[name] = balance_split.validation_images(index, split, split_path, everything)
    return vocabulary, validation


def describe(sources, vocabulary, stages, split):
    """Prints what the run is about to do, and what may be wrong with it. UserError if there is
    nothing to train on."""
    for name, source in sources.items():
        kind = split if source.data_set.has_official else "balanced"
        if kind == "balanced" and len(set(source.index.official) - {""}) > 1:
            kind += ", its own sides mixed; --split official keeps them apart"
        print(
            f"{name}: {len(source.training)} images to train on, {len(source.validation)} to "
            f"validate on ({kind})"
        )
        if not source.training:
            raise UserError(f"{name}: no image to train on; see --split")
        if "object" in source.levels:
            print(datasets.unlabelled_share(source.index, vocabulary["object"]))
    counts = {level: len(names) for level, names in vocabulary.items()}
    if "part" in counts:
        counts["part"] = sum(len(parts) - 1 for parts in vocabulary["part"].values())
    print("classes:", ", ".join(f"{n} {level}" for level, n in counts.items()))
    for name, stage in stages.items():
        if name == "main":
            describe_images(stage, vocabulary)
        step = math.prod(stage.plan.images.shape[1:])
        print(f"{name} stage: {stage.iterations} iterations of {step} images")


def describe_images(batches, vocabulary):
    """Prints at which size images are trained on. UserError if that leaves nothing of them."""
    sizes = ", ".join(map(str, batches.sizes)) or f"{batches.crop // 2} to {2 * batches.crop}"
    then = f"then squares of {batches.crop}" if batches.crop else f"at most {batches.longest} long"
    print(f"images: short side of {sizes}, {then}")
    sides = [n for n in vocabulary.get("object", ()) if re.search(r"\b(left|right)\b", n, re.I)]
    if sides and batches.flip:
        print(f"images are mirrored, and so {datasets.listed(sides)}: --no-flip")
    short = []
    for source in batches.sources:
        for size in source.index.sizes[source.training].tolist():
            short.append(min(upernet.resized(size, *source.largest)))
    thin = sum(side < 32 for side in short)
    if thin:
        text = f"{thin} of {len(short)} images are less than 32 pixels wide or high at these sizes"
        print(f"{text}; see --max-size, --crop")
    if thin == len(short):
        raise UserError("--max-size: nothing is left of the images, see --crop")


def new_network(vocabulary, test_size, weights, start, **options):
    """The network of a new run, with the weights to start from."""
    if start:
        options["pool"] = start["network"].get("pool", "prroi")
    net = UPerNet(upernet.class_counts(vocabulary), test_size=test_size, **options)
    with datasets.main_process_first():
        if start:
            load_start(net, vocabulary, start, weights)
        elif weights == "imagenet":
            load_imagenet(net.backbone)
    return net


def resumed_network(checkpoint, indexes, out):
    """The network of a run that is resumed. UserError if its data have changed."""
    for name, index in indexes.items():
        if index.content != checkpoint["arguments"]["content"][name]:
            raise UserError(f"{out}: {name} has other images or classes than the run began with")
    net = UPerNet(**checkpoint["network"])
    net.load_state_dict(checkpoint.pop("model"))
    print(f"{out}: resumes the {checkpoint['stage']} stage at {checkpoint['iteration']}")
    return net


def new_checkpoint(net, vocabulary, split, sources, stages, trained, options):
    """What `save` writes of a new run, but for the network's weights: tensors and plain values.

    trained: images of each source that trained the weights to start from. options: the command's.
    """
    arguments = {**options, "root": os.path.abspath(options["root"])}
    for name in ("folder", "cache_folder", "thresholds"):  # which follow from the others
        del arguments[name]
    for stage, key in (("main", "iters"), ("texture", "texture_iters")):
        if stage in stages:
            arguments[key] = stages[stage].iterations
    arguments["content"] = {}  # of each source, to notice changes
    arguments["numbers"] = {}  # of classes, in the data's own table
    all_trained = dict(trained)
    for name, source in sources.items():
        arguments["content"][name] = source.index.content
        if source.data_set.fixed_table:
            arguments["numbers"]["object"] = list(source.index.names)
        images = [source.index.images[i] for i in source.training]
        known = set(trained.get(name, ()))
        all_trained[name] = sorted(known.union(images))
        known.intersection_update(split[name])
        if known:
            print(
                f"{name}: {len(known)} of its validation images have the names of images that "
                "trained the weights"
            )
    return {
        "network": net.network,
        "vocabulary": vocabulary,
        "split": split,
        "trained": all_trained,
        "arguments": arguments,
        "stage": [*stages, "done"][0],
        "iteration": 0,
        "best": -1.0,  # the score of best.pt
        "optimizer": {},
        "scaler": {},
    }


def run(net, checkpoint, sources, out, workers, eval_every, **how):
    """Trains, then evaluates: metrics, then pictures. how: further arguments of `train`."""
    path = f"{out}/ckpt.pt"
    vocabulary = checkpoint["vocabulary"]
    validate = functools.partial(evaluate.evaluate, net, vocabulary, sources, workers=workers)
    how.update(out=out, workers=workers, eval_every=eval_every)
    try:
        received = train(net, checkpoint=checkpoint, validate=validate, **how)
    except FloatingPointError as e:
        raise UserError(
            f"the loss or the network is not finite ({e}); {path} is the last good checkpoint; "
            f"--weights {path} with another --out and a lower --lr trains it further"
        ) from None
    if received:
        where = f"{checkpoint['iteration']} iterations of the {checkpoint['stage']} stage"
        print(f"\nstopped and saved after {where}; resume with --resume --out {shlex.quote(out)}")
        raise SystemExit(128 + received)
    print(f"wrote {path}, and beside it log.jsonl and curves.png")
    if any(source.validation for source in sources.values()):
        metrics = validate()
        if datasets.is_main_process():
            datasets.write_json(metrics, f"{out}/metrics.json")
            print(evaluate.table(metrics))
            if eval_every:
                keep_best(metrics, out, checkpoint, net)
            evaluate.draw_pictures(net, vocabulary, sources, f"{out}/pictures")
        print(f"wrote {out}/metrics.json, and pictures/ beside it")
    if os.path.exists(f"{out}/best.pt"):
        path = f"{out}/best.pt"
        print(f"{path} has the best mean over the levels, {checkpoint['best']:.2%}")
    print(f"next: python evaluate.py {shlex.quote(path)} --photo YOUR.jpg")


def is_finished(checkpoint, out):
    """Whether nothing is left to train or to evaluate."""
    validates = any(checkpoint["split"].values())
    evaluated = os.path.exists(f"{out}/metrics.json") or not validates
    return checkpoint["stage"] == "done" and evaluated


def command(argv):
    datasets.join_processes()
    args, checkpoint, start = read_options(argv)
    out = args.out
    is_new = checkpoint is None
    if not is_new and is_finished(checkpoint, out):
        print(f"{out}: this run is finished; --weights {out}/ckpt.pt --out NEW trains it further")
        return
    device = datasets.pick_device(args.device)
    place = (args.folder, args.cache_folder)
    with datasets.main_process_first():
        indexes = datasets.open_indexes(args.data, *place, args.workers, args.levels)
        if is_new:
            split_path = balance_split.split_path(*place)
            vocabulary, split = vocabulary_and_split(
                indexes, args.thresholds, args.levels, args.split, split_path
            )
        else:
            vocabulary = checkpoint["vocabulary"]
            split = checkpoint["split"]
    test_size, largest = test_and_largest_size(args.sizes, args.max_size, args.crop)
    reading = (args.split == "official", args.cache_folder, largest)
    sources = {}
    for name, index in indexes.items():
        sources[name] = Source(index, vocabulary, None, split[name], *reading)
    stages = plan_stages(
        list(sources.values()),
        args.iters,
        args.texture_iters,
        args.batch_size,
        args.accumulate,
        args.seed,
        sizes=args.sizes,
        longest=args.max_size,
        crop=args.crop,
        flip=args.flip,
    )
    if is_new:
        describe(sources, vocabulary, stages, args.split)
        evaluate.tell_sizes(sources, test_size, None)
        torch.manual_seed(args.seed)
        options = {key: getattr(args, key) for key in NETWORK_OPTIONS}
        net = new_network(vocabulary, test_size, args.weights, start, **options)
        trained = start["trained"] if start else {}
        checkpoint = new_checkpoint(net, vocabulary, split, sources, stages, trained, vars(args))
        for name in ("best.pt", "log.jsonl", "metrics.json"):  # of an earlier run
            Path(out, name).unlink(missing_ok=True)
        save(f"{out}/ckpt.pt", checkpoint, net)
    else:
        net = resumed_network(checkpoint, indexes, out)
    net.to(device)
    synchronise_batch_norm(net, device)
    if args.compile:
        net.compile()
    amp = datasets.pick_amp(args.amp, device)
    how = {"lr": args.lr, "device": device, "amp": amp, "save_every": args.save_every}
    run(net, checkpoint, sources, out, args.workers, args.eval_every, stages=stages, **how)


def main(argv: list[str] | None = None) -> None:
    with datasets.one_line_errors("train.py"):
        command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
