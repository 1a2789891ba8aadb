"""Metrics, tables and pictures of a trained UPerNet (section 2.2's metrics), and the parsing of one's own photos.

    python evaluate.py ckpt.pt                             # on the validation images of the checkpoint's own data
    python evaluate.py ckpt.pt --photo a.jpg b.png         # one picture per photo: every level, with a legend
    python evaluate.py ckpt.pt --json m.json --pictures d  # metrics as JSON, truth beside prediction as pictures
    torchrun --nproc_per_node=8 evaluate.py ckpt.pt        # several GPUs share the images out
    python evaluate.py ckpt.pt --relations r.json          # section 4.2: which objects, materials, .. go together
    python evaluate.py --release encoder.pth decoder.pth --labels joint_dataset --photo a.jpg   # the authors' weights

A checkpoint says itself which data, images and sizes it is to be judged on.
"""

import argparse
import csv
import datetime
import functools
import math
import os
import re
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

from balance_split import balanced_validation, official_validation, read_split, split_path
from datasets import (
    SOURCE_LEVELS,
    Index,
    Parser,
    Reader,
    UserError,
    Whole,
    add_data_options,
    data_root,
    is_first,
    open_sources,
    positive,
    resized,
    rgb,
    whole_image,
    write_json,
    write_whole,
)
from upernet import LEVELS, UPerNet, from_checkpoint, load_release, read_tensors

SHOWN = 12  # of each source's images, in pictures
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------- device and processes


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are the choices")
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device {name}: not to be had here ({str(e).splitlines()[0]})") from None


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The type of `torch.autocast` for `--amp`; None is off."""
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return AMP_TYPES.get(name)


def join_processes(device: torch.device) -> torch.device:
    """Joins the processes that torchrun has started, if it has; this one's device. Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # torchrun's store outlives a group that failed, and the new one must not find the old one's addresses in it.
    store, rank, processes = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend, patience = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(hours=2)
    # The others wait while the first scans and splits.
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=patience)
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    return device


def first_before_others(read):
    """What `read()` returns, in each process: the first one reads first, and the others then find its files on disk; if
    it fails, they end."""
    if not dist.is_initialized():
        return read()
    done, content = [False], None
    if is_first():
        try:
            content = read()
            done = [True]
        finally:
            dist.broadcast_object_list(done)
        return content
    dist.broadcast_object_list(done)
    if not done[0]:
        raise SystemExit(2)
    return read()


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)


# ---------------------------------------------------------------- from logits to classes


def class_map(logits: Tensor, filled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The best class of every pixel of a picture, (height, width) int64, the first one of equals.

    logits: (K, h, w), float32 or float64, at a quarter of the padded input; `filled` is the (height, width) of the
    input that the picture took before padding, `size` the (height, width) asked for. The logits are enlarged
    bilinearly by size / filled, and the padding is cut off. Where there is none, this equals
    `F.interpolate(logits[None], size, mode="bilinear")[0].argmax(dim=0)`, exactly; it is computed one class at a time,
    so that the full-size logits never exist together.
    """
    logits = logits.detach().contiguous()
    scales = [None if 4 * cells == n else 4 * full / n for cells, n, full in zip(logits.shape[1:], filled, size)]
    if len(logits) <= 4 or sum(size) <= 128:  # little to gain, and PyTorch uses a kernel that rounds differently
        return enlarged(logits, size, scales).argmax(dim=0)

    # A class is the best somewhere between four cells only if its highest there reaches the lowest of all others.
    groups = logits.split(16)  # few at a time stay in the cache
    floor = torch.stack([between_cells(group, torch.minimum).amax(dim=0) for group in groups]).amax(dim=0)
    floor -= 1e-5 * logits.abs().amax()  # more than rounding does
    missed = [(between_cells(group, torch.maximum) < floor).flatten(1).all(dim=1) for group in groups]
    possible = torch.cat(missed).logical_not().nonzero().flatten()

    highest = logits.new_full(size, -math.inf)
    best, higher, values = (logits.new_zeros(size) for _ in range(3))
    for k in possible.tolist():
        values = enlarged_by_rows(logits[k], scales, out=values)
        torch.gt(values, highest, out=higher)  # 1.0 or 0.0, quicker than True or False
        torch.maximum(best, higher.mul_(k), out=best)  # k only grows
        torch.maximum(highest, values, out=highest)
    return best.long()


def enlarged(logits: Tensor, size: tuple[int, int], scales: list[float | None]) -> Tensor:
    """Bilinear `F.interpolate` of (K, h, w) to `size`; its public form takes a size or a scale, but not both."""
    return torch.ops.aten.upsample_bilinear2d(logits[None], size, False, *scales)[0]


def enlarged_by_rows(logits: Tensor, scales: list[float | None], out: Tensor) -> Tensor:
    """`enlarged` of one class, (h, w) -> `out`, (height, width).

    On the CPU first along the width, then along the height with the pixels of a row side by side, as PyTorch's vector
    code wants them: the same products and sums as in one step, several times as fast.
    """
    if logits.device.type != "cpu":
        return enlarged(logits[None], out.shape, scales)[0]
    one_axis = torch.ops.aten.upsample_linear1d
    wide = one_axis(logits[None], out.shape[1:], False, scales[1])  # (1, h, width)
    one_axis.out(wide.mT, out.shape[:1], False, scales[0], out=out.mT[None])
    return out


def between_cells(logits: Tensor, extreme) -> Tensor:
    """The extreme of the four cells around every place between them: (K, h - 1, w - 1), at least one each way."""
    for axis in (1, 2):
        if (n := logits.shape[axis] - 1) > 0:
            logits = extreme(logits.narrow(axis, 0, n), logits.narrow(axis, 1, n))
    return logits


def part_map(logits: Tensor, objects: Tensor, part_slices: dict[int, slice], filled: tuple[int, int]) -> Tensor:
    """The best part of every pixel among those of the object that `objects` (H, W) has there, as `part_channels`."""
    parts = torch.zeros_like(objects)
    for index in torch.unique(objects).tolist():
        if index in part_slices:
            best = class_map(logits[part_slices[index]], filled, tuple(objects.shape))
            parts = torch.where(objects == index, best, parts)
    return part_channels(objects, parts, part_slices)


def part_channels(objects: Tensor, parts: Tensor, part_slices: dict[int, slice]) -> Tensor:
    """(object, index in its list of parts) of every pixel -> its channel in the part logits, -1 for background: (H,
    W)."""
    channels = torch.full_like(objects, -1)
    for index in torch.unique(objects[parts > 0]).tolist():
        here = (objects == index) & (parts > 0)
        channels[here] = part_slices[index].start + parts[here]
    return channels


def prepare(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as batches carry them -> the network's input."""
    return images.to(device, non_blocking=True).float() / 255


# ---------------------------------------------------------------- metrics


class Metrics:
    """Section 2.2's metrics, counted image by image.

    Object, material: pixel accuracy and mean IoU over labelled pixels. Part: within the true object's region, for the
    images' objects that have an annotated part, with background as a class (mIoU-bg), averaged over an object's parts
    first, then over objects. Scene, texture: top-1. A class without a labelled pixel has no IoU and is in no mean.
    """

    def __init__(self, vocabulary: dict):
        self.vocabulary = vocabulary
        self.confusion = {
            level: torch.zeros(len(vocabulary[level]), len(vocabulary[level]), dtype=torch.int64)
            for level in ("object", "material")
            if level in vocabulary
        }  # (truth, prediction)
        self.part_confusion = {
            vocabulary["object"].index(name): torch.zeros(len(parts), len(parts), dtype=torch.int64)
            for name, parts in vocabulary.get("part", {}).items()
        }
        self.right = {"scene": 0, "texture": 0}
        self.judged = {"scene": 0, "texture": 0}
        self.seen: set[str] = set()

    def add_map(self, level: str, predicted: Tensor, truth: Tensor) -> None:
        """Object or material: (H, W) class indices, truth -1 where unlabelled."""
        self.seen.add(level)
        labelled = truth >= 0
        count(self.confusion[level], truth[labelled], predicted[labelled])

    def add_parts(self, logits: Tensor, objects: Tensor, parts: Tensor, part_slices: dict, filled: tuple) -> None:
        """Parts of one image: logits (sum of part counts, h, w), true objects and parts (H, W); see `class_map`."""
        self.seen.add("part")
        for index in torch.unique(objects[parts > 0]).tolist():
            inside = objects == index
            predicted = class_map(logits[part_slices[index]], filled, tuple(objects.shape))
            count(self.part_confusion[index], parts[inside], predicted[inside])

    def add_tag(self, level: str, predicted: int, truth: int) -> None:
        """Scene or texture of one image; truth -1 is none."""
        self.seen.add(level)
        if truth >= 0:
            self.judged[level] += 1
            self.right[level] += predicted == truth

    def merge(self) -> None:
        """Adds up what all processes have counted, in each of them."""
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.confusion, self.part_confusion, self.right, self.judged, self.seen))
        for kind, total in enumerate((self.confusion, self.part_confusion, self.right, self.judged)):
            for key in total:
                total[key] = sum(counted[kind][key] for counted in everyone)
        self.seen = set().union(*(counted[-1] for counted in everyone))

    def results(self) -> dict:
        """Fractions in [0, 1], None where there is nothing to count: the format of `evaluate.py --json`."""
        results: dict = {}
        for level in LEVELS:
            if level not in self.seen:
                continue
            if level in self.confusion:
                iou = class_iou(self.confusion[level])
                results[level] = {
                    "pixel_accuracy": accuracy([self.confusion[level]]),
                    "mean_iou": mean(iou),
                    "iou": dict(zip(self.vocabulary[level], iou)),
                }
            elif level == "part":
                of_objects = {self.vocabulary["object"][i]: class_iou(c) for i, c in self.part_confusion.items()}
                results[level] = {
                    "pixel_accuracy": accuracy(self.part_confusion.values()),
                    "mean_iou_bg": mean([mean(iou) for iou in of_objects.values()]),
                    "iou": {name: dict(zip(self.vocabulary["part"][name], iou)) for name, iou in of_objects.items()},
                }
            else:
                n = self.judged[level]
                results[level] = {"top1": self.right[level] / n if n else None, "n": n}
        return results


def count(confusion: Tensor, truth: Tensor, predicted: Tensor) -> None:
    """Adds pairs of (truth, predicted) indices to a confusion matrix, in place."""
    k = len(confusion)
    confusion += torch.bincount(truth.long() * k + predicted.long(), minlength=k * k).view(k, k).to(confusion.device)


def class_iou(confusion: Tensor) -> list[float | None]:
    """Intersection over union of each class; None for one that has no labelled pixel."""
    intersection, labelled = confusion.diag(), confusion.sum(dim=1)
    union = labelled + confusion.sum(dim=0) - intersection
    return [i / u if n else None for i, u, n in zip(intersection.tolist(), union.tolist(), labelled.tolist())]


def accuracy(confusions) -> float | None:
    right, total = (sum(int(f(c)) for c in confusions) for f in (torch.trace, torch.sum))
    return right / total if total else None


def mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


# ---------------------------------------------------------------- evaluation


def evaluate(
    net: UPerNet,
    vocabulary: dict,
    readers: dict[str, Reader],
    chosen: list[tuple[str, int]],
    short: int,
    longest: int,
    multiple: int | None = None,
    levels: list[str] | None = None,
    amp: torch.dtype | None = None,
    pictures: str | None = None,
) -> dict:
    """The metrics of `net` on the chosen (source, image number)s, in the format of `evaluate.py --json`.

    Images are resized to a short side of `short` and padded as in training (or stretched, see `whole_image`);
    predictions are judged at the label maps' own size. With `pictures`, a folder, up to SHOWN of each source's images
    are drawn there, truth beside prediction. Several processes share the images out; each returns the metrics of all.
    The network is left in eval mode.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    net.eval()
    metrics = Metrics(vocabulary)
    levels = [level for level in (levels or LEVELS) if level in vocabulary]
    chosen = [(source, i) for source, i in chosen if set(readers[source].levels) & set(levels)]
    drawn = set()
    for source in readers if pictures else ():
        of_source = [pair for pair in chosen if pair[0] == source]
        drawn |= set(of_source[:: max(1, len(of_source) // SHOWN)][:SHOWN])
    chosen = chosen[rank::ranks]
    workers = min(8, os.cpu_count() or 1) if len(chosen) > 500 else 0
    hidden = None if rank == 0 else True
    loader = DataLoader(Whole(readers, chosen, short, longest, multiple), batch_size=None, num_workers=workers)
    with torch.inference_mode():
        for pair, image in zip(chosen, tqdm(loader, desc="evaluating", unit=" images", disable=hidden, leave=False)):
            reader, filled = readers[pair[0]], image["size"]
            asked = [level for level in reader.levels if level in levels]
            with autocast(device, amp):
                logits = net(prepare(image["images"], device), levels=asked)
            logits = {level: value[0].float() for level, value in logits.items()}
            labels = {level: image[level].to(device) for level in reader.levels}
            maps = {}  # object, material: the class of each pixel
            for level in asked:
                if level in ("scene", "texture"):
                    metrics.add_tag(level, int(logits[level].argmax()), int(labels[level]))
                elif level == "part":
                    metrics.add_parts(logits["part"], labels["object"], labels["part"], net.part_slices, filled)
                else:
                    maps[level] = class_map(logits[level], filled, tuple(labels[level].shape))
                    metrics.add_map(level, maps[level], labels[level])
            if pair in drawn:
                if "part" in asked:
                    objects, slices = labels["object"].long(), net.part_slices
                    maps["part"] = part_map(logits["part"], maps.get("object", objects), slices, filled)
                    labels["part"] = part_channels(objects, labels["part"].long(), slices)
                name = os.path.splitext(image["file"])[0].replace("/", "_")[-80:]
                sheet = comparison(reader.photo(pair[1]), maps, logits, labels, vocabulary)
                save_picture(sheet, os.path.join(pictures, f"{pair[0]}_{name}.png"))
    if ranks > 1:
        metrics.merge()
    return metrics.results()


def table(results: dict, untrained: dict | None = None, all_classes: bool = False) -> str:
    """The metrics as text: levels first, then the classes, best first; `untrained` adds that network's figures."""
    percent = lambda value: "     -" if value is None else f"{100 * value:6.2f}"
    titles = {"pixel_accuracy": "pixel accuracy", "mean_iou": "mean IoU", "mean_iou_bg": "mIoU-bg", "top1": "top-1"}
    lines = [f"{'level':10s}{'metric':16s}{'%':>7s}{'  untrained' if untrained else ''}"]
    for level, metrics in results.items():
        for metric, title in titles.items():
            if metric in metrics:
                beside = f"     {percent(untrained[level][metric])}" if untrained else ""
                lines.append(f"{level:10s}{title:16s} {percent(metrics[metric])}{beside}")
    for level in ("object", "part", "material"):
        if level not in results:
            continue
        iou = results[level]["iou"]
        flat = {f"{o}: {p}": v for o, parts in iou.items() for p, v in parts.items()} if level == "part" else iou
        ranked = sorted(((n, v) for n, v in flat.items() if v is not None), key=lambda nv: -nv[1])
        if not all_classes and len(ranked) > 20:
            ranked = [*ranked[:10], (f".. {len(ranked) - 20} more, with --classes", None), *ranked[-10:]]
        lines += ["", f"IoU of each {level}, %"]
        lines += [f"  {n}" if v is None else f"  {n[:38]:38s} {percent(v)}" for n, v in ranked]
        if absent := len(flat) - sum(v is not None for v in flat.values()):
            lines.append(f"  {absent} more have no labelled pixel among these images, and count nowhere")
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures

PANEL, LINE, MARGIN = 380, 19, 10  # width of a panel, height of a line of text, space between panels; pixels
OPACITY = 0.6  # of the classes' colours on the photo


@functools.cache
def palette(n: int = 1024) -> np.ndarray:
    """n colours (n, 3), each as far as can be from all before it: the first classes, the most frequent, differ most."""
    steps = np.arange(0, 256, 17)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    spread = colours.max(axis=1) - colours.min(axis=1)
    colours = colours[(spread >= 85) & (colours.max(axis=1) >= 136)]  # no grey, no black, no white: photos have those
    seen = colours * np.array([2.0, 4.0, 3.0]) ** 0.5  # about as different as they look
    chosen = [len(colours) - 1]
    nearest = np.full(len(colours), np.inf)
    for _ in range(n - 1):
        nearest = np.minimum(nearest, ((seen - seen[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(nearest.argmax()))
    return colours[chosen]


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture."""
    colours = palette()
    return tuple(colours[number % len(colours)].tolist())


def shown_size(photo: Image.Image) -> tuple[int, int]:
    """(width, height) of a photo in a panel: as wide as that, or smaller where it would be taller than 1.5 times so."""
    scale = min(PANEL / photo.width, 1.5 * PANEL / photo.height)
    return max(1, round(photo.width * scale)), max(1, round(photo.height * scale))


def overlay(photo: Image.Image, classes: np.ndarray) -> Image.Image:
    """The photo with each class (H, W), -1 for none, in its colour and outlined, as large as in a panel."""
    size = shown_size(photo)
    shown = torch.from_numpy(np.asarray(photo.resize(size, Image.Resampling.LANCZOS)).transpose(2, 0, 1).copy())
    fitted = Image.fromarray(classes.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    classes = np.asarray(fitted)
    present = [int(c) for c in np.unique(classes) if c >= 0]
    if present:
        masks = torch.from_numpy(np.stack([classes == c for c in present]))
        shown = draw_segmentation_masks(shown, masks, alpha=OPACITY, colors=[class_colour(c) for c in present])
    picture = shown.numpy().transpose(1, 2, 0).copy()
    edge = np.zeros(classes.shape, bool)
    edge[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    edge[1:] |= classes[1:] != classes[:-1]
    picture[edge] = 255
    return Image.fromarray(picture)


def panel(
    title: str, picture: Image.Image | None, entries: list[tuple[tuple[int, int, int] | None, str, float | None]]
) -> Image.Image:
    """A titled picture with a legend below: (colour or None, text, length of a bar in [0, 1] or None) a line."""
    font = ImageFont.load_default(14)
    y = LINE + 4 + (picture.height + 6 if picture else 0)
    whole = Image.new("RGB", (PANEL, y + LINE * len(entries)), "white")
    draw = ImageDraw.Draw(whole)
    draw.text((0, 2), title, fill="black", font=font)
    if picture:
        whole.paste(picture, (0, LINE + 4))
    for colour, text, bar in entries:
        if bar is not None:
            draw.rectangle([PANEL - 130, y + 3, PANEL - 130 + round(128 * bar), y + LINE - 4], fill="#6688bb")
        if colour is not None:
            blended = tuple(round(OPACITY * c + (1 - OPACITY) * 128) for c in colour)  # as it looks on the photo
            draw.rectangle([0, y + 3, 12, y + LINE - 4], fill=blended, outline="black")
        room = PANEL - (140 if bar is not None else 0) - 18
        while draw.textlength(text, font=font) > room:
            text = text[:-2].rstrip(" .") + "\u2026"
        draw.text((0 if text.endswith(":") else 18, y + 1), text, fill="black", font=font)
        y += LINE
    return whole


def map_panel(title: str, photo: Image.Image, classes: np.ndarray, names: list[str], most: int = 12) -> Image.Image:
    """A level's overlay with a legend of what is there, largest first."""
    numbers, pixels = np.unique(classes[classes >= 0], return_counts=True)
    order = np.argsort(-pixels, kind="stable")
    named = [k for k in order[:most] if pixels[k] >= 0.001 * classes.size]
    entries = [
        (class_colour(int(numbers[k])), f"{names[int(numbers[k])]}  {pixels[k] / classes.size:.1%}", None)
        for k in named
    ]
    if smaller := len(order) - len(named):
        entries.append((None, f"and {smaller} smaller", None))
    return panel(title, overlay(photo, classes), entries or [(None, "nothing", None)])


def tag_panel(title: str, photo: Image.Image | None, scores: dict[str, np.ndarray], vocabulary: dict) -> Image.Image:
    """The photo with the five best guesses of scene (and texture) as bars; scores are probabilities (K,)."""
    entries = []
    for level, values in scores.items():
        entries.append((None, f"{level}:", None))
        best = np.argsort(-values, kind="stable")[:5]
        entries += [(None, f"{vocabulary[level][k]}  {values[k]:.0%}", float(values[k])) for k in best]
    return panel(title, photo and photo.resize(shown_size(photo), Image.Resampling.LANCZOS), entries)


def sheet_of(rows: list[list[Image.Image]]) -> Image.Image:
    """Panels on white, row by row."""
    width = max(len(row) for row in rows) * (PANEL + MARGIN) + MARGIN
    heights = [max(p.height for p in row) + MARGIN for row in rows]
    sheet, y = Image.new("RGB", (width, sum(heights) + MARGIN), "white"), MARGIN
    for row, height in zip(rows, heights):
        for k, p in enumerate(row):
            sheet.paste(p, (MARGIN + k * (PANEL + MARGIN), y))
        y += height
    return sheet


def part_channel_names(vocabulary: dict) -> list[str]:
    """A name for every channel of the part logits."""
    return [f"{name}: {part}" for name, parts in vocabulary.get("part", {}).items() for part in parts]


def comparison(photo: Image.Image, maps: dict, logits: dict, labels: dict, vocabulary: dict) -> Image.Image:
    """One validation image: the truth in the upper row, the prediction in the lower (in the same one without scores).

    Of each level (H, W) maps of classes in `maps` and `labels` (part: of channels), or logits (K,) and an index.
    """
    scores = {level: logits[level].softmax(dim=0).cpu().numpy() for level in ("scene", "texture") if level in logits}
    known = [f"{level}: {vocabulary[level][int(labels[level])]}" for level in scores if labels[level] >= 0]
    above = [tag_panel(", ".join(["truth", *known]) if known else "photo", photo, {}, vocabulary)]
    below = [tag_panel("prediction", None, scores, vocabulary)]
    for level in maps:
        names = part_channel_names(vocabulary) if level == "part" else vocabulary[level]
        above.append(map_panel(f"{level}s, truth", photo, labels[level].cpu().numpy(), names))
        below.append(map_panel(f"{level}s, prediction", photo, maps[level].cpu().numpy(), names))
    return sheet_of([above, below] if scores else [above + below[1:]])


def save_picture(picture: Image.Image, path: str) -> None:
    write_whole(path, picture.save)


# ---------------------------------------------------------------- one's own photos


def open_photo(path: str) -> Image.Image:
    """A photo of any format and mode as upright 8-bit RGB. Raises UserError with its name if it cannot be read."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path}: a pipe or a device, not a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large is fine up to Pillow's own limit, which is an error
            with Image.open(path) as picture:
                return rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:  # whatever a decoder makes of a damaged file
        raise UserError(f"{path}: cannot be read as a picture ({type(e).__name__}: {e})") from None


def parse(
    net: UPerNet,
    photo: Image.Image,
    short: int,
    longest: int,
    multiple: int | None = None,
    levels: list[str] | None = None,
    amp: torch.dtype | None = None,
) -> dict[str, np.ndarray]:
    """All that the network sees in a photo (RGB), of the levels asked for, as numpy arrays.

    object, material, texture_map (H, W) class indices; part (H, W) channels of the part logits within the predicted
    object, -1 for none; scene, texture (K,) probabilities. Maps have the photo's size.
    """
    device = next(net.parameters()).device
    images, size = whole_image(photo, resized((photo.height, photo.width), short, longest), multiple)
    levels = [level for level in net.classes if levels is None or level in levels]
    computed = [level for level in net.classes if level in levels or (level == "object" and "part" in levels)]
    seen = {}
    with torch.inference_mode():
        with autocast(device, amp):
            logits = net(prepare(images, device), levels=computed)
        for level, value in logits.items():
            value = value[0].float()
            if level in ("scene", "texture"):
                seen[level] = value.softmax(dim=0)
            elif level != "part":
                seen[level] = class_map(value, size, (photo.height, photo.width))
        if "part" in logits and "object" in seen:
            seen["part"] = part_map(logits["part"][0].float(), seen["object"], net.part_slices, size)
    return {level: value.cpu().numpy() for level, value in seen.items() if level.removesuffix("_map") in levels}


def photo_sheet(photo: Image.Image, seen: dict[str, np.ndarray], vocabulary: dict) -> Image.Image:
    """One picture of all that `parse` found."""
    scores = {level: seen[level] for level in ("scene", "texture") if level in seen}
    panels = [tag_panel("photo", photo, scores, vocabulary)]
    for level, title in (
        ("object", "objects"),
        ("part", "parts"),
        ("material", "materials"),
        ("texture_map", "textures"),
    ):
        if level in seen:
            names = part_channel_names(vocabulary) if level == "part" else vocabulary[level.removesuffix("_map")]
            panels.append(map_panel(title, photo, seen[level], names))
    return sheet_of([panels[:3], panels[3:]] if len(panels) > 3 else [panels])


def write_maps(seen: dict[str, np.ndarray], vocabulary: dict, path: str) -> None:
    """What `parse` found as an .npz: its arrays, and <level>_names of the classes (part: of the channels)."""
    names = {level: vocabulary[level] for level in ("scene", "object", "material", "texture") if level in vocabulary}
    names["part"] = part_channel_names(vocabulary)
    arrays = {level: value.astype(np.int16 if value.ndim == 2 else np.float32) for level, value in seen.items()}
    arrays |= {f"{level}_names": np.array(n) for level, n in names.items()}
    write_whole(path, lambda name: np.savez_compressed(name, **arrays))


# ---------------------------------------------------------------- relations: section 4.2, table 4


class Relations:
    """Counts, over what the network sees in many photos, which concepts go together.

    scene-object: the share of a scene's photos in which an object shows up (a pixel of it is enough); those of at least
    30%. object-material, part-material, material-texture: of the pixels of the first, the share of the second.
    """

    KINDS = ("scene-object", "object-material", "part-material", "material-texture")
    LEAST_OBJECT = 0.3
    LEAST = 0.1  # shares below are dropped, and the rest scaled to one (the paper gives no number: our choice)

    def __init__(self, vocabulary: dict):
        self.names = {**vocabulary, "part": part_channel_names(vocabulary)}
        self.photos = np.zeros(len(vocabulary.get("scene", ())), np.int64)  # of each scene
        self.counts = {}
        for kind in self.KINDS:
            first, second = kind.split("-")
            if first in vocabulary and second in vocabulary:
                self.counts[kind] = np.zeros((len(self.names[first]), len(self.names[second])), np.int64)

    def add(self, seen: dict[str, np.ndarray]) -> None:
        """What `parse` found in one photo."""
        for kind, counts in self.counts.items():
            first, second = kind.split("-")
            if kind == "scene-object":
                scene = int(seen["scene"].argmax())
                self.photos[scene] += 1
                counts[scene, np.unique(seen["object"])] += 1
            else:
                rows, columns = seen[first].astype(np.int64), seen["texture_map" if second == "texture" else second]
                there = rows >= 0
                flat = rows[there] * counts.shape[1] + columns[there]
                counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Kind -> first concept -> {second concept: share}, largest first."""
        results: dict = {kind: {} for kind in self.counts}
        for kind, counts in self.counts.items():
            totals = self.photos if kind == "scene-object" else counts.sum(axis=1)
            for row in np.flatnonzero(totals):
                shares = counts[row] / totals[row]
                least = self.LEAST_OBJECT if kind == "scene-object" else self.LEAST
                order = [k for k in np.argsort(-shares, kind="stable") if shares[k] >= least]
                if kind != "scene-object":
                    order = order[:3]
                    shares = shares / shares[order].sum() if order else shares
                first, second = (self.names[level] for level in kind.split("-"))
                if order:
                    results[kind][first[row]] = {second[k]: float(shares[k]) for k in order}
        return results


def sentences(relations: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """The relations in words, as in table 4."""
    verbs = {
        "scene-object": "{} has {}",
        "object-material": "{} is made of {}",
        "part-material": "{} is made of {}",
        "material-texture": "{} looks {}",
    }
    lines = []
    for kind, found in relations.items():
        for first, shares in found.items():
            words = [f"{second} ({share:.0%})" for second, share in shares.items()]
            listed = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
            lines.append(verbs[kind].format(first, listed))
    return lines


# ---------------------------------------------------------------- networks and the images to judge them on


def released_names(labels: str, index: Index, vocabulary: dict) -> dict[str, dict]:
    """`class_names` of a source for a network that the authors released: their label_assignment.csv maps ADE20K's and
    OpenSurfaces' numbers, and ADE20K's scenes by name; SceneParsing's numbers are the classes of their ADE20K network.

    Raises UserError where the tables do not fit each other: where most numbers have other names in the source's own.
    """
    plain = lambda name: re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")
    theirs: dict[int, str] = {}  # number -> their name of it
    if not os.path.isdir(labels):
        if index.layout != "sceneparsing":
            raise UserError(
                f"{index.folder}: the authors' ADE20K network is measured on ADEChallengeData2016 (SceneParsing)"
            )
        names: dict[str, dict] = {"object": dict(enumerate(vocabulary["object"], start=1))}
        theirs = names["object"]
    else:
        if index.layout == "sceneparsing":
            raise UserError(f"{index.folder}: this network knows the classes of ADE20K_2021_17_01, not SceneParsing's")
        path = os.path.join(labels, "label_assignment.csv")
        names = {level: {} for level in SOURCE_LEVELS[index.source]}
        try:
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    level, label = row["category"], int(row["broden_label"])
                    if row["dataset"] != index.source or level not in names:
                        continue
                    if level == "scene" and label >= 0:
                        names[level][plain(row["raw_name"].removesuffix("-s"))] = vocabulary[level][label]
                    elif level != "scene":
                        number = int(row["raw_label"])
                        theirs[number] = row["raw_name"]
                        if label > 0:
                            name = row["broden_name"] if level == "part" else vocabulary[level][label]
                            names[level][number] = name
        except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: not the authors' table of labels ({type(e).__name__}: {e})") from None

    words = lambda name: set(plain(name).split("_"))  # tables differ in punctuation and in how many synonyms they list
    shared = [number for number in index.names if number in theirs]
    if sum(bool(words(theirs[n]) & words(index.names[n])) for n in shared) < 0.5 * max(1, len(shared)):
        raise UserError(f"{index.folder}: its class numbers do not mean what {labels} says: they have other names")
    if "scene" in names:
        known = {tag: names["scene"].get(plain(tag)) for tag in index.tags if tag}
        if lacking := sorted(tag for tag, name in known.items() if name is None):
            n = sum(tag in lacking for tag in index.tags)
            print(f"{index.source}: {n} images of scenes that the network does not know: {', '.join(lacking[:5])}, ..")
        names["scene"] = known
    return names


def load_network(args: argparse.Namespace, device: torch.device) -> tuple[UPerNet, dict, dict, dict | None]:
    """(network, vocabulary, arguments of its training, its validation images or None for a released network)."""
    try:
        if args.release:
            if not args.labels:
                raise UserError(
                    "--release: --labels must name the authors' class tables (joint_dataset, or object150_info.csv)"
                )
            net, vocabulary = load_release(*args.release, args.labels)
            # As released: short side 450, long side at most 1000, then stretched to a multiple; 32 is that of the
            # ADE20K network.
            multiple = 8 if os.path.isdir(args.labels) else 32
            return net.to(device), vocabulary, {"sizes": [450], "max_size": 1000, "multiple": multiple}, None
        checkpoint = read_tensors(args.checkpoint)
        net, vocabulary = from_checkpoint(checkpoint, args.checkpoint, str(device))
    except ValueError as e:
        raise UserError(str(e)) from None
    check_run(checkpoint, args.checkpoint)
    return net, vocabulary, checkpoint.get("arguments", {}), checkpoint.get("split", {})


def check_run(checkpoint: dict, path: str) -> None:
    """Raises UserError if what a checkpoint says of its run, as far as it does, is of another kind than train.py's."""
    arguments, split = checkpoint.get("arguments", {}), checkpoint.get("split", {})
    if not isinstance(arguments, dict) or not isinstance(split, dict):
        raise UserError(f"{path}: its arguments or its split are no dictionary")
    for key, kind in {"data": str, "root": str, "sizes": list, "max_size": int}.items():
        if key in arguments and not isinstance(arguments[key], kind):
            raise UserError(f"{path}: its argument {key} is {arguments[key]!r:.40}")
    sizes = arguments.get("sizes", [450])
    if not sizes or not all(isinstance(size, int) and 32 <= size < 10**5 for size in sizes):
        raise UserError(f"{path}: its sizes are {arguments['sizes']!r:.40}, no numbers of pixels")
    if not all(isinstance(v, list) and all(isinstance(image, str) for image in v) for v in split.values()):
        raise UserError(f"{path}: its split holds no lists of images")


def validation_images(
    indexes: dict[str, Index], split: dict | None, args: argparse.Namespace, vocabulary: dict
) -> list[tuple[str, int]]:
    """The (source, image number)s to evaluate: the checkpoint's own validation images (`split`), or those that --split
    names.

    Of a released network (`split` is None) those of split.json, if there is one, else ADE20K's validation folder and
    all of OpenSurfaces. Says what is not there any more, and how many were no validation images of the checkpoint.
    """
    path = split_path(data_root(args), args.cache)
    stored = read_split(path)["sources"]
    chosen = []
    for source, index in indexes.items():
        own = set((split or {}).get(source, ()))
        if args.split == "official" and source != "os":
            names = official_validation(index)
        elif args.split or (split is None and source in stored):
            if source not in stored:
                raise UserError(f"{path}: has no split of {source}; python balance_split.py --data {source} makes one")
            names = balanced_validation({source: index}, vocabulary, path)[source]
        elif split is None:
            names = set(index.images) if source == "os" else official_validation(index)
            instead = "all images" if source == "os" else "its validation folder"
            print(f"{source}: no split in {path}; evaluating {instead}")
        else:
            names = own
        if not names:
            print(f"{source}: no validation images; --split balanced (or official) takes others")
        there = [i for i, image in enumerate(index.images) if image in names]
        if lacking := len(names) - len(there):
            print(f"{source}: {lacking} of {len(names)} validation images are not there")
        if split is not None and (foreign := sum(index.images[i] not in own for i in there)):
            counted = f"{foreign} of {len(there)} images"
            print(f"{source}: {counted} were not validation images of the checkpoint: it may know them")
        chosen += [(source, i) for i in there]
    if not chosen:
        raise UserError(
            "no image to evaluate: no validation images, or none of them is there (see --split, --root, --data)"
        )
    return chosen


# ---------------------------------------------------------------- the command


def levels_of(text: str) -> list[str]:
    levels = [level.strip() for level in text.split(",")]
    if unknown := set(levels) - set(LEVELS):
        raise argparse.ArgumentTypeError(f"'{sorted(unknown)[0]}' is not one of {', '.join(LEVELS)}")
    return levels


def add_device_options(group) -> None:
    """The options of a script that computes."""
    group.add_argument(
        "--amp", choices=("auto", *AMP_TYPES, "off"), default="auto", help="mixed precision (auto: on CUDA alone)"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto (cuda, mps, cpu) or one by name")


def report(relations: Relations, path: str) -> None:
    found = relations.results()
    print("\n".join(sentences(found)))
    write_json(found, path)
    print(f"wrote {path}")


def parse_photos(args: argparse.Namespace, see, vocabulary: dict, relations: Relations | None) -> None:
    """--photo: a picture and the maps of each photo. `see(photo, levels)` is `parse` with its other arguments.

    Raises UserError at the end for photos that cannot be read.
    """
    stems = [os.path.splitext(os.path.basename(path))[0] for path in args.photo]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(f"--photo: several files named {twice[0]} would be written to the same {twice[0]}_upernet.png")
    failed = []
    for path, stem in zip(args.photo, stems):
        try:
            photo = open_photo(path)
        except UserError as e:
            failed.append(str(e))
            continue
        seen = see(photo, args.levels)
        target = os.path.join(args.pictures or ".", f"{stem}_upernet")
        save_picture(photo_sheet(photo, seen, vocabulary), f"{target}.png")
        write_maps(seen, vocabulary, f"{target}.npz")
        print(f"wrote {target}.png and {target}.npz")
        if relations:
            relations.add(see(photo) if args.levels else seen)
    if relations:
        report(relations, args.relations)
    if failed:
        raise UserError("; ".join(failed))


def run(args: argparse.Namespace) -> None:
    device = join_processes(pick_device(args.device))
    if dist.is_initialized() and (args.photo or args.relations):
        raise UserError("--photo, --relations: for a single process; leave torchrun out")
    amp = pick_amp(args.amp, device)
    net, vocabulary, trained, split = load_network(args, device)
    sizes = trained.get("sizes", [450])
    short = args.size or sorted(sizes)[len(sizes) // 2]
    longest, multiple = trained.get("max_size", 1200), trained.get("multiple")
    if args.levels and (lacking := set(args.levels) - set(vocabulary)):
        raise UserError(f"--levels: no head for {', '.join(sorted(lacking))}; this network has {', '.join(vocabulary)}")
    model = torch.compile(net) if args.compile else net
    relations = Relations(vocabulary) if args.relations else None
    if relations and not relations.counts:
        raise UserError("--relations: this network has no two levels that they relate")

    if args.photo and args.json:
        raise UserError("--json: photos have no labels to measure against; their maps go into .npz files")
    see = lambda photo, levels=None: parse(model, photo, short, longest, multiple, levels, amp)
    if args.photo:
        parse_photos(args, see, vocabulary, relations)
        return

    args.cache = args.cache or (trained.get("cache") if args.root is None else None)
    args.data, args.root = args.data or trained.get("data"), args.root or trained.get("root") or "data"
    args.allow_broken = args.allow_broken or bool(trained.get("allow_broken"))
    if args.data is None:
        why = "not in the checkpoint; " if split is not None else ""
        raise UserError(f"--data: {why}name the sources to evaluate on, ade20k,os for one")
    indexes, _ = first_before_others(lambda: open_sources(args))
    readers = {}
    for source, index in indexes.items():
        names = released_names(args.labels, index, vocabulary) if split is None and source != "dtd" else None
        reader = Reader(index, vocabulary, names)
        if set(reader.levels) & set(args.levels or LEVELS):
            readers[source] = reader
    if not readers:
        raise UserError(f"--data {args.data}: has no labels for the levels of this network")
    chosen = validation_images({source: reader.index for source, reader in readers.items()}, split, args, vocabulary)
    results = evaluate(model, vocabulary, readers, chosen, short, longest, multiple, args.levels, amp, args.pictures)
    if args.json and is_first():
        write_json(results, args.json)
    print(table(results, all_classes=args.classes))
    if args.json:
        print(f"wrote {args.json}")
    if args.pictures:
        print(f"wrote pictures of up to {SHOWN} images of each source to {args.pictures}")
    if relations:
        for source, i in tqdm(chosen, desc="relations", unit=" images", disable=None, leave=False):
            if source != "dtd":  # squares of texture, without things in them
                relations.add(see(readers[source].photo(i)))
        report(relations, args.relations)


def main(argv: list[str] | None = None) -> None:
    usage = "%(prog)s ckpt.pt [options]"
    parser = Parser("Metrics and pictures of a trained network, or of one's own photos.", usage)
    group = parser.add_argument_group("network")
    group.add_argument("checkpoint", nargs="?", metavar="ckpt.pt", help="a checkpoint of train.py")
    released = ("ENCODER", "DECODER")
    group.add_argument("--release", nargs=2, metavar=released, help="a network of the authors instead, two .pth files")
    group.add_argument("--labels", metavar="TABLES", help="its class tables: joint_dataset, or object150_info.csv")
    group = parser.add_argument_group("what to look at, and what to write")
    group.add_argument("--photo", nargs="+", metavar="FILE", help="parse these photos instead of validation images")
    group.add_argument(
        "--pictures", metavar="DIR", help=f"write pictures there, of {SHOWN} images a source (of photos: default .)"
    )
    group.add_argument("--json", metavar="FILE", help="write the metrics there, as fractions (null: nothing labelled)")
    group.add_argument("--relations", metavar="FILE", help="count section 4.2's relations over the images, into FILE")
    group.add_argument("--classes", action="store_true", help="all classes in the table, not the best and worst ten")
    group.add_argument("--levels", type=levels_of, metavar="LIST", help=f"comma list of {','.join(LEVELS)} (all)")
    group.add_argument("--size", type=positive, metavar="N", help="short side (the middle one of training's sizes)")
    group.add_argument("--split", choices=("balanced", "official"), help="validation images (the checkpoint's own)")
    add_data_options(parser, data=None)
    add_device_options(parser.add_argument_group("machine"))
    args = parser.parse_args(argv)
    try:
        if bool(args.checkpoint) == bool(args.release):
            what = "a checkpoint before the options (runs/toy/ckpt.pt, say)"
            raise UserError(f"name {what}, or a network of the authors with --release")
        run(args)
    except UserError as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
