"""Metrics (section 2.2) and pictures of a trained UPerNet; photos; section 4.2's relations.

    python evaluate.py ckpt.pt --json m.json --pictures d   # on the run's own validation images
    python evaluate.py ckpt.pt --photo a.jpg b.png          # class maps and a picture of each photo
    python evaluate.py ckpt.pt --size 300,450,600 --flip    # means over sizes and mirror images
    python evaluate.py ckpt.pt --relations r.json           # section 4.2
    torchrun --nproc_per_node=8 evaluate.py ckpt.pt         # several GPUs share the images
    python evaluate.py --release FILES --photo a.jpg        # others' weights

Predictions are evaluated at the label maps' own size; photos are parsed at theirs.
"""

import argparse
import collections
import colorsys
import dataclasses
import math
import os
import re
import signal
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

import balance_split
import datasets
import upernet
from datasets import Index, Option, Source, UserError
from upernet import LEVELS, TAGS, UPerNet

SHOWN = 12  # images of each source in pictures


# ---------------------------------------------------------------- metrics (section 2.2)
class Metrics:
    """Section 2.2's metrics, from confusion matrices (truth, prediction) counted image by image.

    Object, material: pixel accuracy and mean IoU over labelled pixels. Part: within the true
    object's region, for the objects of an image that have an annotated part, background as a class
    (mIoU-bg), averaged over an object's parts first, then over objects. Scene, texture: top-1. A
    class without a labelled pixel is in no mean.
    """

    def __init__(self, vocabulary: dict, levels: list[str]):
        self.vocabulary = vocabulary
        self.confusion = {}  # level -> (classes, classes)
        self.of_parts = {}  # object -> (parts, parts)
        for level in levels:
            if level == "part":
                for name, parts in vocabulary["part"].items():
                    self.of_parts[name] = torch.zeros(len(parts), len(parts), dtype=torch.int64)
            else:
                classes = len(vocabulary[level])
                self.confusion[level] = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, level: str, predicted: Tensor, truth: Tensor) -> None:
        """Class indices of any shape, an image's or a pixel map's; truth -1 is unlabelled."""
        count(self.confusion[level], predicted, truth)

    def add_parts(
        self, scores: Tensor, objects: Tensor, parts: Tensor, part_slices: dict, filled: tuple
    ) -> None:
        """Parts of one image: scores (sum of part counts, h, w), true objects and parts (H, W);
        `filled` as in `class_map`.
        """
        for index in torch.unique(objects[parts > 0]).tolist():
            inside = objects == index
            predicted = class_map(scores[part_slices[index]], filled, tuple(objects.shape))
            name = self.vocabulary["object"][index]
            count(self.of_parts[name], predicted[inside], parts[inside])

    def merge(self) -> None:
        """Sums what all processes have counted, in each of them."""
        for confusion in (*self.confusion.values(), *self.of_parts.values()):
            dist.all_reduce(confusion)

    def results(self) -> dict:
        """Fractions in [0, 1], None where nothing is labelled: what `evaluate.py --json` writes."""
        results = {}
        for level, confusion in self.confusion.items():
            if level in TAGS:
                results[level] = {"top1": accuracy([confusion]), "n": int(confusion.sum())}
            else:
                iou = class_iou(confusion)
                results[level] = {
                    "pixel_accuracy": accuracy([confusion]),
                    "mean_iou": mean(iou),
                    "iou": dict(zip(self.vocabulary[level], iou)),
                }
        if self.of_parts:
            results["part"] = self.part_results()
        return {level: results[level] for level in LEVELS if level in results}

    def part_results(self) -> dict:
        iou = {}
        of_object = []
        for name, confusion in self.of_parts.items():
            of_its_parts = class_iou(confusion)
            iou[name] = dict(zip(self.vocabulary["part"][name], of_its_parts))
            of_object.append(mean(of_its_parts))
        return {
            "pixel_accuracy": accuracy(self.of_parts.values()),
            "mean_iou_bg": mean(of_object),
            "iou": iou,
        }


def count(confusion: Tensor, predicted: Tensor, truth: Tensor) -> None:
    """Adds (truth, prediction) pairs to a confusion matrix; truth -1 is unlabelled."""
    classes = len(confusion)
    labelled = truth >= 0
    pairs = truth[labelled].long() * classes + predicted[labelled].long()
    confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()


def class_iou(confusion: Tensor) -> list[float | None]:
    """Intersection over union of each class; None for one that has no labelled pixel."""
    intersection = confusion.diag()
    labelled = confusion.sum(dim=1)
    union = labelled + confusion.sum(dim=0) - intersection
    iou = (intersection.double() / union).tolist()
    return [value if n else None for value, n in zip(iou, labelled.tolist())]


def accuracy(confusions) -> float | None:
    """The share of right predictions in all of the matrices."""
    right = sum(int(confusion.trace()) for confusion in confusions)
    total = sum(int(confusion.sum()) for confusion in confusions)
    return right / total if total else None


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ---------------------------------------------------------------- from a photo to scores
class View(NamedTuple):
    """A photo as the network sees it, at one size, perhaps mirrored."""

    pixels: Tensor  # (1, 3, H, W) uint8, padded
    filled: tuple[int, int]  # (height, width) that the photo takes, four pixels a cell of the maps
    mirrored: bool = False


def network_input(photo: Image.Image, test_size: tuple) -> View:
    """A photo in RGB at a size as `UPerNet.test_size`."""
    full = (photo.height, photo.width)
    short, longest, multiple = test_size
    if multiple is None:  # ours: padded, as training does
        size = datasets.resized(full, short, longest)
        height, width = (datasets.pad_to_32(n) for n in size)
        filled = size
    else:  # as released: stretched, and the maps cover the photo, also where 4 does not divide it
        if multiple == 1:  # mmsegmentation's
            size = datasets.resized(full, short, longest, half_up)
        else:  # the authors'
            size = datasets.resized(full, short, longest, math.floor)
        size = tuple(math.ceil(n / multiple) * multiple for n in size)
        height, width = (max(32, n) for n in size)
        filled = tuple(4 * math.ceil(n / 4) for n in size)
    pixels = datasets.padded_image(photo, size, height, width)
    return View(torch.from_numpy(pixels)[None], filled)


def half_up(x: float) -> int:
    """Rounded, halves up."""
    return math.floor(x + 0.5)


def test_sizes(test_size: tuple, short_sides: list[int] | None) -> list[tuple]:
    """`UPerNet.test_size` for each of the short sides (default: its own). A network of ours allows
    a larger view a longest side in proportion; released ones keep theirs."""
    short, longest, multiple = test_size
    sizes = []
    for side in short_sides or [short]:
        if multiple is None:
            needed = math.ceil(longest * side / short)
        else:
            needed = side
        sizes.append((side, max(longest, needed), multiple))
    return sizes


def views_of(photo: Image.Image, sizes: list[tuple], flip: bool) -> list[View]:
    """The photo at each of the sizes, see `test_sizes`; `flip`: mirrored too."""
    views = []
    for size in sizes:
        views.append(network_input(photo, size))
        if flip:
            view = network_input(ImageOps.mirror(photo), size)
            views.append(view._replace(mirrored=True))
    return views


def predict(
    net: UPerNet, views: list[View], levels: list[str], amp: torch.dtype | None = None
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """(level -> scores of one image, `filled` of the maps among them for `class_map`).

    Scene, texture: probabilities (K,), the mean over the views. Maps (K, h, w): of one view the
    network's logits, float32; of several the mean of their probabilities, each one's softmax
    resized to a quarter of the largest view.
    """
    if len(views) == 1:
        scores = logits_of(net, views[0], levels, amp)
        for level in TAGS:
            if level in scores:
                scores[level] = scores[level].softmax(dim=0)
        return scores, views[0].filled
    height = max(math.ceil(view.filled[0] / 4) for view in views)
    width = max(math.ceil(view.filled[1] / 4) for view in views)
    total = collections.defaultdict(float)
    for view in views:
        for level, logits in logits_of(net, view, levels, amp).items():
            value = probabilities(logits, level, net.part_slices) / len(views)
            if level not in TAGS:
                value = upsample(value, view.filled, (height, width))
                if view.mirrored:
                    value = value.flip(2)
            total[level] = total[level] + value
    return dict(total), (4 * height, 4 * width)


def logits_of(
    net: UPerNet, view: View, levels: list[str], amp: torch.dtype | None
) -> dict[str, Tensor]:
    """The network's answer to one view, without the batch's axis, in float32."""
    device = next(net.parameters()).device
    with torch.inference_mode(), datasets.autocast(device, amp):
        logits = net(view.pixels.to(device) / 255, levels)
    for level, value in logits.items():
        if not value.isfinite().all():
            raise UserError(
                f"{level}: the network's answer is not finite; it has diverged, or needs --amp off"
            )
    return {level: value[0].float() for level, value in logits.items()}


def probabilities(logits: Tensor, level: str, part_slices: dict[int, slice]) -> Tensor:
    """The softmax of logits (K, ..) over the classes; of parts over those of each object."""
    if level != "part":
        return logits.softmax(dim=0)
    return torch.cat([logits[channels].softmax(dim=0) for channels in part_slices.values()])


# ---------------------------------------------------------------- from scores to classes
def upsample(maps: Tensor, filled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Maps (K, h, w), a cell for 4x4 pixels of the input -> (K, *size), unpadded, in float32 or
    more, without gradients.

    filled: the (height, width) of the input that the picture takes; `size`: the one asked for.
    Where the maps cover just that, `F.interpolate(maps[None], size, mode="bilinear")[0]`; else a
    cell takes 4 * size / filled pixels, and the cells beyond the picture are cut off.
    """
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    sizes = []
    scales = []
    for cells, pixels, wanted in zip(maps.shape[1:], filled, size):
        scale = None  # the maps cover just the picture: PyTorch's own scale
        if 4 * cells != pixels:
            scale = 4 * wanted / pixels
            if wanted == cells:  # such an axis PyTorch would copy, whatever the scale
                wanted += 1  # cut off below
        sizes.append(wanted)
        scales.append(scale)
    # F.interpolate takes either a size or scales, these both.
    if not maps.is_cpu:
        resized = torch.ops.aten.upsample_bilinear2d(maps[None], sizes, False, *scales)[0]
    else:  # one axis after the other: on two cores a third of the time at 512x683
        linear = torch.ops.aten.upsample_linear1d
        wide = linear(maps, sizes[1:], False, scales[1])  # (K, h, W)
        resized = wide.new_empty(len(maps), *sizes)
        linear.out(wide.mT, sizes[:1], False, scales[0], out=resized.mT)
    return resized[:, : size[0], : size[1]]


def class_map(scores: Tensor, filled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The best class of every pixel, (height, width) int64; ties go to the lowest index.

    `upsample(scores, filled, size).argmax(dim=0)` of finite scores, but for ties within rounding, a
    class at a time: it takes a few maps of the photo's size, and a few times the memory of the
    scores.
    """
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).contiguous()
    best = torch.zeros(size, dtype=torch.int64, device=scores.device)
    top = torch.full(size, -torch.inf, dtype=scores.dtype, device=scores.device)
    for k in possible_winners(scores):
        value = upsample(scores[k : k + 1], filled, size)[0]
        best.masked_fill_(value > top, k)
        torch.maximum(top, value, out=top)
    return best


def possible_winners(scores: Tensor) -> list[int]:
    """Of the classes of maps (K, h, w) those that may be the best somewhere, once upsampled.

    A pixel's value lies between those of the four cells around it. So a class whose highest of the
    four is everywhere below another's lowest is nowhere the best.
    """
    padded = torch.nn.functional.pad(scores[None], (0, 1, 0, 1), mode="replicate")[0]
    lowest = torch.minimum(padded[:, 1:], padded[:, :-1])
    lowest = torch.minimum(lowest[:, :, 1:], lowest[:, :, :-1])  # (K, h, w), of four cells
    highest = torch.maximum(padded[:, 1:], padded[:, :-1])
    highest = torch.maximum(highest[:, :, 1:], highest[:, :, :-1])
    beaten = (highest < lowest.amax(dim=0)).flatten(1).all(dim=1)
    return (~beaten).nonzero().flatten().tolist()


def part_map(scores: Tensor, objects: Tensor, part_slices: dict, filled: tuple) -> Tensor:
    """The best part of every pixel among those of the object that `objects` (H, W) has there, as
    `part_channels`."""
    parts = torch.zeros_like(objects)
    present = torch.unique(objects).tolist()
    for index, channels in part_slices.items():
        if index in present:
            best = class_map(scores[channels], filled, tuple(objects.shape))
            parts = torch.where(objects == index, best, parts)
    return part_channels(objects, parts, part_slices)


def part_channels(objects: Tensor, parts: Tensor, part_slices: dict[int, slice]) -> Tensor:
    """(object, index in its list of parts) of every pixel -> channel of the part logits, -1 for
    background: (H, W)."""
    channels = torch.full_like(objects, -1)
    for index in torch.unique(objects[parts > 0]).tolist():
        here = (objects == index) & (parts > 0)
        channels[here] = part_slices[index].start + parts[here]
    return channels


def channel_names(vocabulary: dict) -> dict[str, list[str]]:
    """Level -> class names; for part a name for every channel of the part logits, "car: wheel"."""
    names = dict(vocabulary)
    if "part" in vocabulary:
        names["part"] = []
        for name, parts in vocabulary["part"].items():
            names["part"] += [f"{name}: {part}" for part in parts]
    return names


# ---------------------------------------------------------------- evaluation
@dataclasses.dataclass(eq=False)
class EvaluationImages(Dataset):
    """Images to evaluate on: item k is a dict of `views`, see `views_of`, and the labels at their
    own size as tensors, see `Source.labels`. Textures are squares cut from the middle."""

    sources: dict[str, Source]
    images: list[tuple[str, int]]  # (source, image index)
    sizes: list[tuple]  # see `test_sizes`
    flip: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> dict:
        name, i = self.images[k]
        source = self.sources[name]
        if source.data_set.squares:
            side = datasets.TEXTURE_SIZE
            photo = datasets.texture_square(source, i, place=0.5)
            views = views_of(photo, [(side, side, None)], self.flip)
        else:
            views = views_of(source.photo(i), self.sizes, self.flip)
        labels = source.labels(i)
        return {
            "views": views,
            **{level: torch.as_tensor(value) for level, value in labels.items()},
        }


def evaluate(
    net: UPerNet,
    vocabulary: dict,
    sources: dict[str, Source],
    images: list[tuple[str, int]],
    levels: list[str] | None = None,
    amp: torch.dtype | None = None,
    pictures: str | None = None,
    sizes: list[int] | None = None,
    flip: bool = False,
    workers: int | None = None,
) -> dict:
    """The metrics of `net` on the (source, image number)s, in the format of `evaluate.py --json`.

    Images are seen as in `views_of`, predictions evaluated at the label maps' own size. In the
    folder `pictures`, if given, up to SHOWN images of each source are shown, truth beside
    prediction. Processes share the images. Sets eval mode.
    """
    net.eval()
    device = next(net.parameters()).device
    levels = [level for level in (levels or LEVELS) if level in vocabulary]
    images = [(name, i) for name, i in images if set(sources[name].levels) & set(levels)]
    labelled = set()
    for name, _ in images:
        labelled.update(sources[name].levels)
    metrics = Metrics(vocabulary, [level for level in levels if level in labelled])
    shown = images_to_show(images) if pictures else set()
    images = images[datasets.rank() :: datasets.processes()]
    dataset = EvaluationImages(sources, images, test_sizes(net.test_size, sizes), flip)
    items = datasets.loader(dataset, workers=workers)
    for (name, i), item in zip(images, datasets.progress(items, "evaluating")):
        source = sources[name]
        asked = [level for level in source.levels if level in levels]
        scores, filled = predict(net, item["views"], asked, amp)
        labels = {level: item[level].to(device) for level in source.levels}
        maps = add_image(metrics, scores, labels, net.part_slices, filled)
        if (name, i) in shown:
            if "part" in scores:
                add_part_maps(maps, labels, scores["part"], net.part_slices, filled)
            tags = {level: scores[level].cpu().numpy() for level in asked if level in TAGS}
            sheet = comparison(source.photo(i), maps, tags, labels, vocabulary)
            stem = datasets.without_ending(source.index.images[i]).replace("/", "_")[-80:]
            datasets.save_picture(sheet, os.path.join(pictures, f"{name}_{stem}.png"))
    if dist.is_initialized():
        metrics.merge()
    return metrics.results()


def add_image(
    metrics: Metrics, scores: dict, labels: dict, part_slices: dict, filled: tuple
) -> dict[str, Tensor]:
    """Counts what `predict` saw in an image; returns the maps of object and material."""
    maps = {}
    for level in scores:
        if level == "part":
            metrics.add_parts(scores["part"], labels["object"], labels["part"], part_slices, filled)
        elif level in TAGS:
            metrics.add(level, scores[level].argmax(), labels[level])
        elif level in labels:
            maps[level] = class_map(scores[level], filled, tuple(labels[level].shape))
            metrics.add(level, maps[level], labels[level])
    return maps


def add_part_maps(
    maps: dict, labels: dict, scores: Tensor, part_slices: dict[int, slice], filled: tuple
) -> None:
    """For pictures: adds the predicted parts to `maps`, and makes the labels of parts channels of
    the part logits as they are."""
    objects = labels["object"].long()
    maps["part"] = part_map(scores, maps.get("object", objects), part_slices, filled)
    labels["part"] = part_channels(objects, labels["part"].long(), part_slices)


def images_to_show(images: list[tuple[str, int]]) -> set[tuple[str, int]]:
    """Up to SHOWN images of each source, evenly spaced."""
    shown = set()
    for source in {name for name, _ in images}:
        of_source = [pair for pair in images if pair[0] == source]
        step = max(1, len(of_source) // SHOWN)
        shown.update(of_source[::step][:SHOWN])
    return shown


def table(results: dict, amp: torch.dtype | None = None) -> str:
    """The metrics as text: levels first, then the best and worst ten classes."""
    titles = {
        "pixel_accuracy": "pixel accuracy",
        "mean_iou": "mean IoU",
        "mean_iou_bg": "mIoU-bg",
        "top1": "top-1",
    }
    precision = str(amp or torch.float32).removeprefix("torch.")
    lines = [f"level     metric                %   ({precision})"]
    for level, metrics in results.items():
        for metric, title in titles.items():
            if metric in metrics:
                lines.append(f"{level:10s}{title:16s} {percent(metrics[metric])}")
    for level, metrics in results.items():
        rows = class_rows(level, metrics.get("iou", {}))
        if rows:
            lines += ["", f"IoU of each {level}, %", *rows]
    return "\n".join(lines)


def class_rows(level: str, iou: dict) -> list[str]:
    """The best and worst ten classes of a level, and how many have none."""
    if level == "part":
        of_parts = {}
        for name, parts in iou.items():
            for part, value in parts.items():
                of_parts[f"{name}: {part}"] = value
        iou = of_parts
    known = [(name, value) for name, value in iou.items() if value is not None]
    known.sort(key=lambda pair: -pair[1])
    rows = [f"  {name[:38]:38s} {percent(value)}" for name, value in known]
    if len(rows) > 20:
        rows = [*rows[:10], f"  .. {len(rows) - 20} more, in --json", *rows[-10:]]
    absent = len(iou) - len(known)
    if absent:
        rows.append(f"  without a labelled pixel in these images, and in no mean: {absent}")
    return rows


def percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:6.2f}"


# ---------------------------------------------------------------- photos
def parse(
    net: UPerNet,
    photo: Image.Image | np.ndarray,
    levels: list[str] | None = None,
    amp: torch.dtype | None = None,
    sizes: list[int] | None = None,
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """All that the network sees in a photo, at the photo's size. Sets eval mode.

    photo: a PIL image, which is turned as its EXIF data say, or a uint8 array (H, W, 3), RGB.
    sizes, flip: short sides and mirror images to average over, by default `net.test_size` alone.
    Returns a dict: object, material, texture_map: (H, W) class indices; part: (H, W) channels of
    the part logits within the predicted object, -1 for none; scene, texture: (K,) probabilities.
    Raises ValueError for another array, and if the network's answer is not finite.
    """
    if not isinstance(photo, Image.Image):
        photo = np.asarray(photo)
        if photo.dtype != np.uint8 or photo.shape[2:] != (3,) or not photo.size:
            raise ValueError(f"a photo of shape {photo.shape}, {photo.dtype}: not (H, W, 3) uint8")
        photo = Image.fromarray(photo)
    photo = datasets.rgb(datasets.upright(photo))
    net.eval()
    if levels is None:
        levels = list(net.classes)
    needed = list(dict.fromkeys(["object", *levels])) if "part" in levels else levels
    full = (photo.height, photo.width)
    views = views_of(photo, test_sizes(net.test_size, sizes), flip)
    scores, filled = predict(net, views, needed, amp)
    parsed = {}
    for level, value in scores.items():
        if level in TAGS:
            parsed[level] = value
        elif level != "part":
            parsed[level] = class_map(value, filled, full)
    if "part" in levels:
        parsed["part"] = part_map(scores["part"], parsed["object"], net.part_slices, filled)
    if "object" not in levels:
        parsed.pop("object", None)
    return {level: value.cpu().numpy() for level, value in parsed.items()}


def write_photo(
    photo: Image.Image, parsed: dict, vocabulary: dict, path: str, numbers: dict | None = None
) -> list[str]:
    """Writes what `parse` saw, and returns the names of the files.

    <path>_upernet.png: all levels, in panels of the photo's size, up to PANEL_SIDE;
    <path>_upernet.npz: the arrays, and <level>_names; <path>_object.png, <path>_material.png: masks
    with each class's number in the data's own table, `numbers[level]`, by default 1..K, which the
    arrays have as <level>_numbers.
    """
    names = channel_names(vocabulary)
    written = [f"{path}_upernet.png", f"{path}_upernet.npz"]
    arrays = {f"{level}_names": np.array(of_level) for level, of_level in names.items()}
    small = photo.copy()
    small.thumbnail((PANEL_SIDE, PANEL_SIDE))
    tags = {level: parsed[level] for level in TAGS if level in parsed}
    panels = [tag_panel("photo", small, tags, vocabulary)]
    for level in ("object", "part", "material", "texture_map"):
        if level in parsed:
            named = level.removesuffix("_map")
            panels.append(map_panel(f"{named}s", small, parsed[level], names[named]))
    for level, value in parsed.items():
        arrays[level] = value.astype(np.int16 if value.ndim == 2 else np.float32)
        if level in ("object", "material"):
            of_level = range(1, len(names[level]) + 1)
            if numbers and level in numbers:
                of_level = numbers[level]
            table = np.array(of_level)
            arrays[f"{level}_numbers"] = table
            mask = table[value].astype(np.uint8 if table.max() < 256 else np.uint16)
            written.append(f"{path}_{level}.png")
            datasets.save_picture(Image.fromarray(mask), written[-1])
    datasets.write_file(written[1], lambda name: np.savez_compressed(name, **arrays))
    datasets.save_picture(datasets.sheet_of([panels[:3], panels[3:]]), written[0])
    return written


# ---------------------------------------------------------------- relations: section 4.2, table 4
class Relation(NamedTuple):
    first: str  # level
    second: str
    words: str  # of table 4
    least: float = 0.1  # share; the paper drops "small" ones, the number is ours
    most: int | None = 3
    scaled: bool = True  # whether the shares are scaled to sum to one, and told

    @property
    def name(self) -> str:
        return f"{self.first}-{self.second}"


RELATIONS = [
    Relation("scene", "object", "{} is composed of {}", least=0.3, most=None, scaled=False),
    Relation("object", "material", "{} is made of {}"),
    Relation("part", "material", "{} is made of {}"),
    Relation("material", "texture", "{} is {}"),
]


class Relations:
    """Counts, over what the network sees in many photos, which concepts go together.

    scene-object: the share of a scene's photos in which an object shows up (one pixel is enough);
    those of at least 30%. The others: of the pixels of the first, the share of the second; the
    three largest of at least 10%, scaled to sum to one.
    """

    def __init__(self, vocabulary: dict, levels: list[str]):
        self.names = channel_names(vocabulary)
        self.photos = np.zeros(len(vocabulary.get("scene", ())), np.int64)  # of each scene
        self.counts = {}  # relation -> (first concepts, second concepts)
        for relation in RELATIONS:
            if {relation.first, relation.second} <= vocabulary.keys() & set(levels):
                shape = (len(self.names[relation.first]), len(self.names[relation.second]))
                self.counts[relation] = np.zeros(shape, np.int64)

    def add(self, parsed: dict[str, np.ndarray]) -> None:
        """What `parse` saw in one photo."""
        for relation, counts in self.counts.items():
            if relation.first == "scene":
                scene = int(parsed["scene"].argmax())
                self.photos[scene] += 1
                counts[scene, np.unique(parsed["object"])] += 1
            else:
                rows = parsed[relation.first].astype(np.int64)
                columns = parsed["texture_map" if relation.second == "texture" else relation.second]
                inside = rows >= 0  # not background
                pairs = rows[inside] * counts.shape[1] + columns[inside]
                counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Relation's name -> first concept -> {second concept: share}, largest first."""
        results = {}
        for relation, counts in self.counts.items():
            results[relation.name] = {}
            totals = self.photos if relation.first == "scene" else counts.sum(axis=1)
            for row in np.flatnonzero(totals):
                shares = counts[row] / totals[row]
                order = np.argsort(-shares, kind="stable")
                order = order[shares[order] >= relation.least][: relation.most]
                if len(order) == 0:
                    continue
                if relation.scaled:
                    shares = shares / shares[order].sum()
                largest = {self.names[relation.second][k]: float(shares[k]) for k in order}
                results[relation.name][self.names[relation.first][row]] = largest
        return results

    def report(self, path: str) -> None:
        """Writes the results as JSON, and prints them in the words of table 4."""
        results = self.results()
        for relation in self.counts:
            for first, shares in results[relation.name].items():
                listed = list(shares)
                if relation.scaled:
                    listed = [f"{name} ({share:.0%})" for name, share in shares.items()]
                text = listed[-1]
                if len(listed) > 1:
                    text = f"{', '.join(listed[:-1])} and {listed[-1]}"
                print(relation.words.format(first, text))
        datasets.write_json(results, path)
        print(f"wrote {path}")


# ---------------------------------------------------------------- pictures
PANEL_SIDE = 1600  # of a photo's panel, pixels at most
OPACITY = 0.6  # of the classes' colours on the photo


def class_colour(k: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture: hues a golden section apart, of another
    strength every five classes, so that a small table has no two alike.
    """
    saturation, value = ((1, 0.95), (0.7, 0.6), (0.45, 1))[k // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(k * 0.618 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(photo: Image.Image, classes: np.ndarray) -> Image.Image:
    """The photo with each class (H, W), -1 for none, in its colour and outlined in white."""
    classes = Image.fromarray(classes.astype(np.int32)).resize(photo.size, Image.Resampling.NEAREST)
    classes = np.asarray(classes)
    picture = np.array(photo)
    colours = np.array([class_colour(k) for k in range(max(0, classes.max()) + 1)])
    inside = classes >= 0
    mixed = (1 - OPACITY) * picture[inside] + OPACITY * colours[classes[inside]]
    picture[inside] = mixed.round()
    picture[:, 1:][classes[:, 1:] != classes[:, :-1]] = 255
    picture[1:][classes[1:] != classes[:-1]] = 255
    return Image.fromarray(picture)


def panel(title: str, picture: Image.Image, lines: list[tuple[str, tuple | None]]) -> Image.Image:
    """A titled picture with a legend below, of (text, colour of its square or None)."""
    width = max(datasets.PANEL, picture.width)
    size = max(14, min(2 * picture.width, 3 * picture.height) // 80)  # of the text
    step = round(1.4 * size)
    height = picture.height + step * (1 + len(lines)) + 10
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(picture, (0, step + 4))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size)
    draw.text((0, 2), title, "black", font)
    y = step + picture.height + 10
    for text, colour in lines:
        x = 0
        if colour is not None:
            # As it looks on a photo of middle grey.
            on_photo = tuple(round(OPACITY * c + (1 - OPACITY) * 128) for c in colour)
            draw.rectangle((0, y + 3, size - 2, y + size + 1), on_photo, "black")
            x = size + 4
        while draw.textlength(text, font) > width - x:
            text = text[:-2].rstrip(" .") + "\u2026"
        draw.text((x, y + 1), text, "black", font)
        y += step
    return sheet


def map_panel(title: str, photo: Image.Image, classes: np.ndarray, names: list[str]) -> Image.Image:
    """A level's overlay with a legend of what is there, largest first, twelve at most."""
    numbers, pixels = np.unique(classes[classes >= 0], return_counts=True)
    order = np.argsort(-pixels, kind="stable")
    lines = []
    for k in order[:12]:
        share = pixels[k] / classes.size
        if share >= 0.001:
            number = int(numbers[k])
            lines.append((f"{names[number]}  {share:.1%}", class_colour(number)))
    if len(order) > len(lines):
        lines.append((f"and {len(order) - len(lines)} smaller", None))
    without = (classes < 0).mean()
    if without >= 0.001:
        lines.append((f"none  {without:.1%}", None))
    return panel(title, overlay(photo, classes), lines)


def tag_panel(
    title: str, picture: Image.Image, tags: dict[str, np.ndarray], vocabulary: dict
) -> Image.Image:
    """A picture with the best five guesses of scene (and texture); tags: probabilities."""
    lines = []
    for level, values in tags.items():
        lines.append((f"{level}:", None))
        for k in np.argsort(-values, kind="stable")[:5]:
            if values[k] >= 0.005:
                lines.append((f"  {vocabulary[level][k]}  {values[k]:.0%}", None))
    return panel(title, picture, lines)


def comparison(
    photo: Image.Image, maps: dict, tags: dict, labels: dict, vocabulary: dict
) -> Image.Image:
    """One validation image: the truth in the upper row, the prediction in the lower (without tags
    all in one row).
    """
    photo = photo.resize(
        (datasets.PANEL, max(1, round(photo.height * datasets.PANEL / photo.width)))
    )
    names = channel_names(vocabulary)
    title = "photo"
    for level in tags:
        if labels[level] >= 0:
            title += f", true {level}: {names[level][int(labels[level])]}"
    truth = [tag_panel(title, photo, {}, vocabulary)]
    prediction = []
    for level in maps:
        true_map = labels[level].cpu().numpy()
        truth.append(map_panel(f"{level}s, truth", photo, true_map, names[level]))
        predicted = maps[level].cpu().numpy()
        prediction.append(map_panel(f"{level}s, prediction", photo, predicted, names[level]))
    if not tags:
        return datasets.sheet_of([truth + prediction])
    blank = Image.new("RGB", (datasets.PANEL, 1), "white")
    return datasets.sheet_of(
        [truth, [tag_panel("prediction", blank, tags, vocabulary), *prediction]]
    )


# ---------------------------------------------------------------- networks and images
class Network(NamedTuple):
    """What is evaluated. A released network has neither options nor split."""

    net: UPerNet
    vocabulary: dict
    options: dict = {}  # of the run that trained it
    split: dict | None = None  # its validation images
    trained: dict = {}  # its training images


def open_network(checkpoint: str | None, release: list | None, labels: str | None) -> Network:
    """The network of a checkpoint, or of --release. Raises UserError for files that are neither."""
    if bool(checkpoint) == bool(release):
        raise UserError(
            "name a checkpoint, before the options (evaluate.py runs/toy/ckpt.pt --photo a.jpg), "
            "or give --release"
        )
    if checkpoint and labels:
        raise UserError("--labels: goes with --release; a checkpoint has its classes' names")
    try:
        if checkpoint:
            net, content = upernet.read_checkpoint(checkpoint)
            vocabulary = content["vocabulary"]
            options = content["arguments"]
            return Network(net, vocabulary, options, content["split"], content["trained"])
        if len(release) == 1 and not labels:
            net, vocabulary = upernet.load_mmseg(release[0])
            return Network(net, vocabulary)
        if len(release) == 2 and labels:
            net, vocabulary = upernet.load_release(*release, labels)
            numbers = {}
            for level, names in vocabulary.items():
                if "background" in names:  # the authors' has number 0
                    numbers[level] = list(range(len(names)))
            return Network(net, vocabulary, {"numbers": numbers})
    except ValueError as e:
        raise UserError(str(e)) from None
    raise UserError(
        "--release: encoder and decoder need --labels, the authors' class tables; or give one file"
    )


def released_names(labels: str | None, index: Index, vocabulary: dict) -> dict[str, dict] | None:
    """The names of a source for a released network, as its data set's `names_by_level`.

    Without a folder `labels`, SceneParsing's numbers are its classes; the authors'
    label_assignment.csv maps the numbers and scenes of ADE20K 2021, and OpenSurfaces'. None for
    textures.
    """
    if index.data_set.squares:
        return None
    has_tables = labels is not None and os.path.isdir(labels)
    if has_tables == index.data_set.own_table:
        wanted = "ADE20K_2021_17_01" if has_tables else "ADEChallengeData2016 (SceneParsing)"
        raise UserError(f"{index.folder}: this network is measured on {wanted}")
    if has_tables:
        return assigned_names(os.path.join(labels, "label_assignment.csv"), index, vocabulary)
    if len(index.names) != len(vocabulary["object"]):
        raise UserError(
            f"{index.folder}: has {len(index.names)} classes; this network is measured on data "
            f"with its own {len(vocabulary['object'])}"
        )
    return {"object": dict(zip(sorted(index.names), vocabulary["object"]))}


def assigned_names(path: str, index: Index, vocabulary: dict) -> dict[str, dict]:
    """Level -> {number or scene in the source's files: class}, of the authors' table of labels."""
    names = {level: {} for level in index.data_set.levels}
    scenes = {}
    columns = ("dataset", "category", "broden_label", "broden_name", "raw_label", "raw_name")
    try:
        for row in upernet.read_table(path, *columns):
            level = row["category"]
            label = int(row["broden_label"])
            if row["dataset"] != index.source or level not in names:
                continue
            if level == "scene" and label >= 0:
                scenes[plain_scene(row["raw_name"].removesuffix("-s"))] = vocabulary[level][label]
            elif level == "part" and label >= 1:
                names[level][int(row["raw_label"])] = row["broden_name"]
            elif label >= 1:
                names[level][int(row["raw_label"])] = vocabulary[level][label]
    except (ValueError, IndexError) as e:
        raise UserError(f"{path}: not the authors' table of labels ({e})") from None
    if "scene" in names:
        names["scene"] = {tag: scenes.get(plain_scene(tag)) for tag in index.tags if tag}
        unknown = sorted(tag for tag, scene in names["scene"].items() if scene is None)
        if unknown:
            print(f"{index.source}: scenes unknown to the network: {datasets.first_of(unknown)}")
    return names


def plain_scene(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def open_sources(
    indexes: dict[str, Index],
    network: Network,
    labels: str | None,
    levels: list[str],
) -> dict[str, Source]:
    """The sources that have labels of the network's levels and classes. UserError if none has."""
    sources = {}
    for name, index in indexes.items():
        names = None
        if network.split is None:
            names = released_names(labels, index, network.vocabulary)
        source = Source(index, network.vocabulary, names)
        if set(source.levels) & set(levels):
            sources[name] = source
            if names is None and "object" in source.levels:
                warn_of_unknown(index, network.vocabulary["object"])
    if not sources:
        raise UserError(
            "--data: has no labels of the levels or classes of this network; data of your own need "
            "the classes.txt of training"
        )
    return sources


def warn_of_unknown(index: Index, classes: list[str]) -> None:
    """Names the classes of one's own table that the network lacks."""
    if not index.data_set.own_table:
        return
    lower = {name.lower(): name for name in classes}
    unknown = []
    for name in index.data_set.names_by_level(index)["object"].values():
        if name not in classes:
            alike = lower.get(name.lower())
            unknown.append(f"{name} (the network has {alike})" if alike else name)
    if unknown:
        datasets.warn(
            f"{index.source}: classes that this network does not know, left out: "
            f"{datasets.first_of(unknown)}"
        )


def images_to_evaluate(
    sources: dict[str, Source], network: Network, split: str | None, folder: str, cache: str
) -> list[tuple[str, int]]:
    """The (source, image number)s: those that --split names, else the checkpoint's validation
    images; of a released network those of split.json, else ADE20K's validation folder and all of
    OpenSurfaces. Never makes a split.
    """
    images = []
    for name, source in sources.items():
        index = source.index
        if split is not None:
            wanted = set(balance_split.validation_images(index, split, folder, cache))
            kind = f"--split {split}"
        elif network.split is None:
            wanted = set(default_images(index, folder, cache))
            kind = "see --split"
        else:
            wanted = set(network.split.get(name, ()))
            kind = "those that validated in training; --split all takes every one"
        numbers = [i for i, image in enumerate(index.images) if image in wanted]
        print(f"{name}: {len(numbers)} of {len(index.images)} images in {index.folder} ({kind})")
        missing = len(wanted) - len(numbers)
        if missing:
            print(
                f"{name}: {missing} of {len(wanted)} images of the split are missing; --split all "
                "evaluates what is there"
            )
        known = set(network.trained.get(name, ())) & wanted
        if network.split and not network.trained:  # a checkpoint of an earlier edition
            known = wanted - set(network.split.get(name, ()))
        if known and is_own_data(network, folder):
            print(f"{name}: {len(known)} of {len(numbers)} images have trained this network")
        images += [(name, i) for i in numbers]
    if not images:
        raise UserError(
            "no images to evaluate: see --split (official, balanced, all), --data, --root"
        )
    return images


def is_own_data(network: Network, folder: str) -> bool:
    """Whether the data in a folder are those that the network was trained on."""
    root = network.options.get("root") or "data"
    return os.path.realpath(folder) in (os.path.realpath(root), os.path.realpath(f"{root}/toy"))


def default_images(index: Index, folder: str, cache: str) -> list[str]:
    """The images of a source for a released network: those of split.json, else, with a word, the
    official ones, all if it has none."""
    path = balance_split.split_path(folder, cache)
    split = "balanced"
    if index.source not in balance_split.read_split(path)["sources"]:
        split = "official" if index.data_set.has_official else "all"
        taken = "its validation folder" if split == "official" else "all images"
        print(f"{index.source}: not in {path}; taking {taken}")
    return balance_split.validation_images(index, split, folder, cache)


# ---------------------------------------------------------------- the command
RESULTS = ("_upernet", "_object", "_material")  # endings of the pictures of a photo


def photos_in(paths: list[str]) -> list[str]:
    """The photos among files and folders, without earlier results of ours."""
    photos = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            inside = []
            for name in names:
                whole = os.path.join(path, name)
                if name.lower().endswith(datasets.PHOTOS) and os.path.isfile(whole):
                    inside.append(whole)
            others = len(names) - len(inside)
            if not inside:
                raise UserError(
                    f"{path}: no photo in this folder ({others} other files or folders)"
                )
            if others:
                first = next(n for n in names if os.path.join(path, n) not in inside)
                print(
                    f"{path}: {others} files or folders are passed over, such as {first}; photos "
                    f"end in {', '.join(datasets.PHOTOS)}"
                )
        photos += [name for name in inside if not is_result(name)]
    if not photos:
        raise UserError("--photo: only pictures that this program wrote")
    return list(dict.fromkeys(photos))


def replaces_others(folder: str, stem: str) -> bool:
    """Whether `write_photo` would replace a picture that it has not written, such as a mask."""
    for ending in RESULTS:
        path = os.path.join(folder, f"{stem}{ending}.png")
        if os.path.exists(path) and not is_result(path):
            return True
    return False


def is_result(path: str) -> bool:
    """Whether a picture is what `write_photo` wrote: beside an array of the same photo."""
    stem = datasets.without_ending(path)
    for ending in RESULTS:
        if stem.endswith(ending) and os.path.exists(stem.removesuffix(ending) + "_upernet.npz"):
            return True
    return False


def parse_photos(
    network: Network, photos: list[str], folder: str, relations: Relations | None, **how
) -> list[str]:
    """Writes a picture and the maps of each photo; returns why others could not be read.

    how: levels, amp, sizes, flip, as `parse` takes them.
    """
    failed = []
    taken = set()
    for path in photos:
        try:
            photo = datasets.open_photo(path)
        except UserError as e:
            failed.append(str(e))
            continue
        name = os.path.basename(path)
        stem = datasets.without_ending(name)
        if stem in taken:  # of another ending
            stem = name
        while stem in taken or replaces_others(folder, stem):  # of another folder, say
            stem += "_"
        taken.add(stem)
        parsed = parse(network.net, photo, **how)
        numbers = network.options.get("numbers")
        target = os.path.join(folder, stem)
        verb = "replaced" if os.path.exists(f"{target}_upernet.npz") else "wrote"
        written = write_photo(photo, parsed, network.vocabulary, target, numbers)
        print(f"{verb} {', '.join(written)}")
        if relations:
            relations.add(parsed)
    return failed


def data_options(trained: dict, given: dict) -> dict:
    """Which data to take, and where they are, by the options of the run that trained the network
    and those given."""
    stored = {"root": "data"}
    for key in ("data", "root", "cache", "allow_broken"):
        if trained.get(key) is not None:
            stored[key] = trained[key]
    if "root" in given:
        stored["cache"] = None
    elif stored.get("data") == "toy" and given.get("data", "toy") != "toy":  # some of its sources
        stored["root"] = os.path.join(stored["root"], "toy")
    return stored


def command(parser: datasets.Parser, given: dict) -> None:
    datasets.join_processes()
    device = datasets.pick_device(given.get("device", "auto"))
    network = open_network(given.get("checkpoint"), given.get("release"), given.get("labels"))
    net = network.net.to(device)
    stored = data_options(network.options, given)
    args = parser.complete(given, stored, given.get("checkpoint"))
    amp = datasets.pick_amp(args.amp, device)
    levels = args.levels or list(network.vocabulary)
    if not set(levels) <= set(network.vocabulary):
        raise UserError(f"--levels: this network has {', '.join(network.vocabulary)}")
    if args.compile:
        net.compile()
    relations = Relations(network.vocabulary, levels) if args.relations else None
    if relations and (dist.is_initialized() or not relations.counts):
        raise UserError(
            "--relations: needs levels such as object and material, and a single process"
        )
    failed = []
    how = {"levels": levels, "amp": amp, "sizes": args.size, "flip": args.flip}
    if args.photo:
        if args.json or dist.is_initialized():
            raise UserError("--photo: not with --json (photos have no labels), nor with torchrun")
        photos = photos_in(args.photo)
        failed = parse_photos(network, photos, args.pictures or ".", relations, **how)
    elif args.data is None:
        raise UserError("--data: name the sources to evaluate on, ade20k,os for one")
    else:
        indexes = datasets.open_indexes(
            args.data, args.folder, args.cache_folder, args.allow_broken, args.workers, levels
        )
        sources = open_sources(indexes, network, args.labels, levels)
        images = images_to_evaluate(sources, network, args.split, args.folder, args.cache_folder)
        results = evaluate(
            net,
            network.vocabulary,
            sources,
            images,
            pictures=args.pictures,
            workers=args.workers,
            **how,
        )
        print(table(results, amp))
        if args.json and datasets.is_main_process():
            datasets.write_json(results, args.json)
        for name in (args.json, args.pictures):
            if name:
                print(f"wrote {name}")
        if relations:
            relate(relations, net, sources, images, **how)
    if relations:
        relations.report(args.relations)
    if failed:
        raise UserError("; ".join(failed))


def relate(
    relations: Relations, net: UPerNet, sources: dict[str, Source], images: list, **how
) -> None:
    """Counts the relations in images of data sets, but for close-ups, without things in them."""
    for name, i in datasets.progress(images, "relations"):
        if not sources[name].data_set.squares:
            relations.add(parse(net, sources[name].photo(i), **how))


SPLITS = ("balanced", "official", "all")
AMP = ("off", "auto", "bf16", "fp16")
OPTIONS = [
    Option("release", str, None, "encoder and decoder, or mmsegmentation's file", nargs="+"),
    Option("labels", str, None, "the authors' class tables: joint_dataset, or object150_info.csv"),
    Option("photo", str, None, "photos, or folders of them, to parse", nargs="+"),
    Option("pictures", str, None, f"folder for pictures, {SHOWN} a source (of photos: default .)"),
    Option("json", str, None, "write the metrics there, as fractions (null: nothing labelled)"),
    Option("relations", str, None, "count section 4.2's relations over the images, into this file"),
    datasets.LEVELS_OPTION,
    Option(
        "size", datasets.short_sides, None, "short sides to average over (as trained)", least=32
    ),
    Option("flip", bool, False, "average over the mirror images too"),
    Option("split", str, None, "images (the checkpoint's validation)", SPLITS),
    Option("amp", str, "off", "float32, or mixed precision", AMP),
    datasets.WORKERS_OPTION,
    *datasets.DEVICE_OPTIONS,
]


def main(argv: list[str] | None = None) -> None:
    options = list(OPTIONS)
    for option in datasets.DATA_OPTIONS:
        text = f"{option.help}; default: as trained"
        if option.key.startswith("min_"):
            text = "no effect on a trained network"
        options.append(option._replace(default=None, toy=None, help=text))
    parser = datasets.Parser(
        "Metrics and pictures of a network; photos.", options, "%(prog)s ckpt.pt [options]"
    )
    parser.add_argument("checkpoint", nargs="?", metavar="ckpt.pt", help="of train.py")
    parser.run(command, argv)


if __name__ == "__main__":
    main()
