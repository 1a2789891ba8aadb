"""Metrics (section 2.2) and pictures of a trained UPerNet; photos; section 4.2's relations.

    python evaluate.py ckpt.pt --json m.json --pictures d   # on the run's own validation images
    python evaluate.py ckpt.pt --photo a.jpg b.png          # class maps and a picture of each photo
    python evaluate.py ckpt.pt --size 300,450,600 --flip    # means over sizes and mirror images
    python evaluate.py ckpt.pt --relations r.json           # section 4.2
    torchrun --nproc_per_node=8 evaluate.py ckpt.pt         # several GPUs share the images
    python evaluate.py --release FILES --photo a.jpg        # others' weights

Predictions are evaluated at the label maps' own size; photos are parsed at theirs (`parse`).
"""

import collections
import colorsys
import dataclasses
import glob
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset

import balance_split
import datasets
import upernet
from datasets import Source, UserError
from upernet import LEVELS, TAGS, UPerNet, parse


# ---------------------------------------------------------------- metrics (section 2.2)
class Metrics:
    """Section 2.2's metrics, from confusion matrices (truth, prediction) counted image by image.

    Object, material: pixel accuracy and mean IoU over labelled pixels. Part: within the true
    object's region, for the objects of an image that have an annotated part, background as a class
    (mIoU-bg; it is index 0 of each object's list), averaged over an object's parts first, then over
    objects. Scene, texture: top-1.
    Ours: a class without a labelled pixel is in no mean (released: IoU 0), and parts are evaluated
    within the true object (released: within the predicted one, without background).
    """

    def __init__(self, vocabulary: dict, levels: list[str]):
        self.vocabulary = vocabulary
        self.confusion = {}  # level -> (classes, classes)
        self.part_confusion = {}  # object -> (parts, parts)
        for level in levels:
            if level == "part":
                for name, parts in vocabulary["part"].items():
                    self.part_confusion[name] = torch.zeros(
                        len(parts), len(parts), dtype=torch.int64
                    )
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
        `filled` as in `upernet.class_map`.
        """
        for index in torch.unique(objects[parts > 0]).tolist():
            inside = objects == index
            predicted = upernet.class_map(scores[part_slices[index]], filled, tuple(objects.shape))
            name = self.vocabulary["object"][index]
            count(self.part_confusion[name], predicted[inside], parts[inside])

    def merge(self) -> None:
        """Sums what all processes have counted, in each of them."""
        for confusion in (*self.confusion.values(), *self.part_confusion.values()):
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
        if self.part_confusion:
            results["part"] = self.part_results()
        return {level: results[level] for level in LEVELS if level in results}

    def part_results(self) -> dict:
        iou = {}
        object_means = []
        for name, confusion in self.part_confusion.items():
            part_iou = class_iou(confusion)
            iou[name] = dict(zip(self.vocabulary["part"][name], part_iou))
            object_means.append(mean(part_iou))
        return {
            "pixel_accuracy": accuracy(self.part_confusion.values()),
            "mean_iou_bg": mean(object_means),
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


def accuracy(confusions):
    """The share of right predictions in all of the matrices."""
    right = sum(int(confusion.trace()) for confusion in confusions)
    total = sum(int(confusion.sum()) for confusion in confusions)
    return right / total if total else None


def mean(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_score(metrics: dict) -> float:
    """The mean over the levels of mean IoU, or top-1: what makes a network the best."""
    scores = []
    for level in metrics.values():
        scores += [level.get("mean_iou"), level.get("mean_iou_bg"), level.get("top1")]
    score = mean(scores)
    return -1.0 if score is None else score


# ---------------------------------------------------------------- evaluation
@dataclasses.dataclass
class EvaluationImages(Dataset):
    """The validation images of sources: item k is (views, see `upernet.views_of`; the labels at
    their own size, see `Source.labels`). Textures are squares cut from the middle."""

    images: list[tuple[Source, int]]
    test_size: tuple
    sizes: list[int] | None
    flip: bool

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> tuple[list[upernet.View], dict]:
        source, i = self.images[k]
        if source.data_set.close_ups:
            side = datasets.TEXTURE_SIZE
            photo = datasets.texture_square(source, i, place=0.5)
            views = upernet.views_of(photo, (side, side, None), flip=self.flip)
        else:
            views = upernet.views_of(source.photo(i), self.test_size, self.sizes, self.flip)
        return views, source.labels(i)


def evaluate(
    net: UPerNet,
    vocabulary: dict,
    sources: dict[str, Source],
    levels: list[str] | None = None,
    amp: torch.dtype | None = None,
    sizes: list[int] | None = None,
    flip: bool = False,
    workers: int | None = None,
) -> dict:
    """The metrics of `net` on the sources' validation images, in the format of `--json`.

    sizes, flip: as `parse` takes them. Processes share the images, and take the first one's
    batch-norm statistics (on CPUs each has its own). The network's mode stays.
    """
    if dist.is_initialized():
        for value in net.state_dict().values():
            dist.broadcast(value, 0)
    levels = [level for level in (levels or LEVELS) if level in vocabulary]
    labelled = set()
    images = []
    for source in sources.values():
        if source.validation:
            labelled.update(source.levels)
            images += [(source, i) for i in source.validation]
    metrics = Metrics(vocabulary, [level for level in levels if level in labelled])
    images = images[datasets.rank() :: datasets.processes()]
    items = datasets.loader(EvaluationImages(images, net.test_size, sizes, flip), workers=workers)
    in_training = [module for module in net.modules() if module.training]
    net.eval()
    for (source, _), (views, labels) in zip(images, datasets.progress(items, "evaluating")):
        asked = [level for level in source.levels if level in levels]
        scores, filled = upernet.predict(net, views, asked, amp)
        labels = {level: torch.as_tensor(labels[level]).to(net.mean.device) for level in labels}
        for level in scores:
            if level == "part":
                metrics.add_parts(
                    scores[level], labels["object"], labels[level], net.part_slices, filled
                )
            elif level in TAGS:
                metrics.add(level, scores[level].argmax(), labels[level])
            elif level in labels:
                size = tuple(labels[level].shape)
                metrics.add(level, upernet.class_map(scores[level], filled, size), labels[level])
    for module in in_training:
        module.training = True
    if dist.is_initialized():
        metrics.merge()
    return metrics.results()


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


def class_rows(level, iou):
    """The best and worst ten classes of a level, and how many have none."""
    if level == "part":
        part_iou = {}
        for name, parts in iou.items():
            for part, value in parts.items():
                part_iou[f"{name}: {part}"] = value
        iou = part_iou
    known = [(name, value) for name, value in iou.items() if value is not None]
    known.sort(key=lambda pair: -pair[1])
    rows = [f"  {name[:38]:38s} {percent(value)}" for name, value in known]
    if len(rows) > 20:
        rows = [*rows[:10], f"  .. {len(rows) - 20} more, in --json", *rows[-10:]]
    absent = len(iou) - len(known)
    if absent:
        rows.append(f"  without a labelled pixel in these images, and in no mean: {absent}")
    return rows


def percent(value):
    return "     -" if value is None else f"{100 * value:6.2f}"


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
    three largest of at least 10%, scaled to sum to one. Object-part is left out (ours).
    """

    def __init__(self, vocabulary: dict, levels: list[str]):
        self.names = upernet.channel_names(vocabulary)
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
                names = list(shares)
                if relation.scaled:
                    names = [f"{name} ({share:.0%})" for name, share in shares.items()]
                text = names[-1]
                if len(names) > 1:
                    text = f"{', '.join(names[:-1])} and {names[-1]}"
                print(relation.words.format(first, text))
        datasets.write_json(results, path)
        print(f"wrote {path}")


# ---------------------------------------------------------------- pictures
SHOWN = 12  # images of each source in pictures of an evaluation
PANEL_SIDE = 1600  # of a photo's panel, pixels at most
OPACITY = 0.6  # of the classes' colours on the photo


def class_colour(k):
    """The colour of a class, the same in every picture: hues a golden section apart, of another
    strength every five classes, so that a small table has no two alike.
    """
    saturation, value = ((1, 0.95), (0.7, 0.6), (0.45, 1))[k // 5 % 3]
    red, green, blue = colorsys.hsv_to_rgb(k * 0.618 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(photo, classes, clear):
    """The photo with each class (H, W), -1 for none, in its colour and outlined in white; the
    classes `clear` without a colour."""
    classes = Image.fromarray(classes.astype(np.int32)).resize(photo.size, Image.Resampling.NEAREST)
    classes = np.asarray(classes)
    picture = np.array(photo)
    colours = np.array([class_colour(k) for k in range(max(0, classes.max()) + 1)])
    inside = (classes >= 0) & ~np.isin(classes, clear)
    mixed = (1 - OPACITY) * picture[inside] + OPACITY * colours[classes[inside]]
    picture[inside] = mixed.round()
    picture[:, 1:][classes[:, 1:] != classes[:, :-1]] = 255
    picture[1:][classes[1:] != classes[:-1]] = 255
    return Image.fromarray(picture)


def panel(title, picture, lines):
    """A titled picture with a legend below, of (text, colour of its square or None)."""
    size = max(14, min(2 * picture.width, 3 * picture.height) // 80)  # of the text
    step = round(1.4 * size)
    width = max(datasets.PANEL, picture.width)
    sheet = Image.new("RGB", (width, picture.height + step * (1 + len(lines)) + 10), "white")
    sheet.paste(picture, (0, step + 4))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size)
    draw.text((0, 2), title, "black", font)
    y = step + picture.height + 10
    for text, colour in lines:
        if colour is not None:
            draw.rectangle((0, y + 3, size - 2, y + size + 1), colour, "black")
        draw.text((size + 4, y + 1), text, "black", font)
        y += step
    return sheet


def map_panel(title, photo, classes, names):
    """A level's overlay with a legend of what is there, largest first, twelve at most. A class
    named background is not tinted."""
    clear = [k for k, name in enumerate(names) if name.lower() == "background"]
    numbers, pixels = np.unique(classes, return_counts=True)
    lines = []
    for k in np.argsort(-pixels, kind="stable")[:12]:
        number = int(numbers[k])
        name = names[number] if number >= 0 else "none"
        colour = class_colour(number)
        if number in clear:
            name += ", not tinted"
        if number in clear or number < 0:
            colour = None
        lines.append((f"{name}  {pixels[k] / classes.size:.1%}", colour))
    if len(numbers) > 12:
        lines.append((f"and {len(numbers) - 12} smaller", None))
    return panel(title, overlay(photo, classes, clear), lines)


def panels(photo: Image.Image, parsed: dict, vocabulary: dict, what: str = "") -> list[Image.Image]:
    """What `parse` saw in a photo: the photo with the best five tags, then a panel for each map.

    what: for the titles, such as ", truth".
    """
    lines = []
    for level in TAGS:
        if level in parsed:
            lines.append((f"{level}:", None))
            for k in np.argsort(-parsed[level], kind="stable")[:5]:
                if parsed[level][k] >= 0.005:
                    lines.append((f"  {vocabulary[level][k]}  {parsed[level][k]:.0%}", None))
    result = [panel(f"photo{what}", photo, lines)]
    for level in ("object", "part", "material", "texture_map"):
        if level in parsed:
            level_names = upernet.channel_names(vocabulary)[level.removesuffix("_map")]
            result.append(map_panel(f"{level}{what}", photo, parsed[level], level_names))
    return result


def labels_as_parsed(labels, vocabulary, part_slices):
    """An image's labels, see `Source.labels`, in the form of what `parse` sees."""
    parsed = dict(labels)
    for level in TAGS:
        if level in labels:
            parsed[level] = (np.arange(len(vocabulary[level])) == labels[level]).astype(float)
    if "part" in labels:
        objects = torch.from_numpy(labels["object"]).long()
        parts = torch.from_numpy(labels["part"]).long()
        parsed["part"] = upernet.part_channels(objects, parts, part_slices).numpy()
    return parsed


def draw_pictures(net, vocabulary, sources, folder, **how):
    """Up to SHOWN validation images of each source, evenly spaced, truth above prediction.

    how: `levels`, `amp`, `sizes`, `flip`, as `parse` takes them.
    """
    asked = how.pop("levels", None) or LEVELS
    for name, source in sources.items():
        levels = [level for level in source.levels if level in asked]
        step = max(1, len(source.validation) // SHOWN)
        for i in source.validation[::step][:SHOWN]:
            photo = source.photo(i)
            if source.data_set.close_ups:
                photo = datasets.texture_square(source, i, place=0.5)
                parsed = parse(net, photo, levels, sizes=[datasets.TEXTURE_SIZE])
            else:
                parsed = parse(net, photo, levels, **how)
            truth = labels_as_parsed(source.labels(i), vocabulary, net.part_slices)
            truth = {level: y for level, y in truth.items() if level in levels}
            height = max(1, round(photo.height * datasets.PANEL / photo.width))
            photo = photo.resize((datasets.PANEL, height))
            rows = [
                panels(photo, truth, vocabulary, ", truth"),
                panels(photo, parsed, vocabulary, ", prediction"),
            ]
            stem = datasets.without_ending(source.index.images[i]).replace("/", "_")[-80:]
            path = os.path.join(folder, f"{name}_{stem}.png")
            datasets.save_picture(datasets.sheet_of(rows), path)


# ---------------------------------------------------------------- photos
def photos_in(paths, results):
    """Photo's path -> its name without the ending below the folder `results`: those among the
    files, and those in folders and their subfolders. UserError for two of one name."""
    photos = {}
    others = []
    for path in paths:
        inside = [path]
        parent = os.path.dirname(path) or "."
        if os.path.isdir(path):
            parent = path
            inside = sorted(glob.glob(f"{glob.escape(path)}/**/*", recursive=True))
            inside = [name for name in inside if os.path.isfile(name)]
        for name in inside:
            target = datasets.without_ending(os.path.relpath(name, parent))
            if name != path and not name.lower().endswith(datasets.PHOTOS):
                others.append(name)
            elif name != path and is_below(name, results) and is_below(results, path):
                others.append(name)  # an earlier result
            elif target in photos.values():
                first = next(other for other in photos if photos[other] == target)
                raise UserError(f"--photo: {first} and {name} have one name; take two calls")
            else:
                photos[name] = target
    if others:
        print(f"{len(others)} files are no photos, such as {others[0]}")
    if not photos:
        raise UserError(f"--photo: no photo; they end in {', '.join(datasets.PHOTOS)}")
    return photos


def is_below(path, folder):
    return Path(folder).resolve() in Path(path).resolve().parents


def size_line(full, test_size, sizes):
    """At which size the network sees an image of (height, width) `full`, and what is lost."""
    views = [upernet.input_size(full, size) for size in upernet.view_sizes(test_size, sizes)]
    seen = " and ".join(f"{width}x{height}" for height, width in views)
    text = f"images of {full[1]}x{full[0]} are seen at {seen}"
    if not sizes:
        text += f" (trained at a short side of {test_size[0]}; evaluate.py --size N takes another)"
    scale = max(full) / max(max(size) for size in views)
    if scale > 2:
        text += f"; things below {math.ceil(8 * scale)} pixels are lost"
    return text


def write_photo(photo, parsed, vocabulary, path, numbers):
    """Writes what `parse` saw, and returns the names of the files.

    <path>_upernet.png: all levels, in panels of the photo's size, up to PANEL_SIDE;
    <path>_upernet.npz: the arrays, and <level>_names; <path>_object.png, <path>_material.png: masks
    with each class's number in the data's own table, `numbers[level]`, by default 1..K, which the
    arrays have as <level>_numbers.
    """
    names = upernet.channel_names(vocabulary)
    small = photo.copy()
    small.thumbnail((PANEL_SIDE, PANEL_SIDE))
    shown = panels(small, parsed, vocabulary)
    written = [f"{path}_upernet.png", f"{path}_upernet.npz"]
    datasets.save_picture(datasets.sheet_of([shown[:3], shown[3:]]), written[0])
    arrays = {f"{level}_names": np.array(names[level]) for level in names}
    for level, value in parsed.items():
        arrays[level] = value.astype(np.int16 if value.ndim == 2 else np.float32)
        if level in ("object", "material"):
            table = np.array(numbers.get(level) or range(1, len(names[level]) + 1))
            arrays[f"{level}_numbers"] = table
            mask = table[value].astype(np.uint8 if table.max() < 256 else np.uint16)
            written.append(f"{path}_{level}.png")
            datasets.save_picture(Image.fromarray(mask), written[-1])
    datasets.write_file(written[1], lambda name: np.savez_compressed(name, **arrays))
    return written


def parse_photos(net, vocabulary, photos, results, numbers, relations, **how):
    """Writes a picture and the maps of each photo; returns why others could not be read.

    photos: see `photos_in`. how: `levels`, `amp`, `sizes`, `flip`, as `parse` takes them.
    """
    failed = []
    told = set()
    for path, name in photos.items():
        try:
            photo = datasets.open_photo(path)
        except UserError as e:
            failed.append(str(e))
            continue
        if photo.size not in told:
            print(size_line((photo.height, photo.width), net.test_size, how["sizes"]))
            told.add(photo.size)
        parsed = parse(net, photo, **how)
        target = os.path.join(results, name)
        written = write_photo(photo, parsed, vocabulary, target, numbers)
        print(f"wrote {written[0]}, and {len(written) - 1} files beside it")
        if relations:
            relations.add(parsed)
    return failed


# ---------------------------------------------------------------- networks, and their images
def open_network(path, release, labels):
    """(network, vocabulary, what else a checkpoint holds) of a checkpoint, or of --release, which
    has no `split`. Raises UserError for files that are neither."""
    if bool(path) == bool(release):
        raise UserError(
            "name a checkpoint, before the options (evaluate.py runs/toy/ckpt.pt --photo a.jpg), "
            "or give --release"
        )
    try:
        if path:
            net, checkpoint = upernet.read_checkpoint(path)
            return net, checkpoint["vocabulary"], checkpoint
        if len(release) == 1 and not labels:
            return *upernet.load_mmseg(release[0]), {"arguments": {}}
        if len(release) == 2 and labels:
            net, vocabulary = upernet.load_release(*release, labels)
            numbers = {}
            for level, names in vocabulary.items():
                if "background" in names:  # the authors' has number 0
                    numbers[level] = list(range(len(names)))
            return net, vocabulary, {"arguments": {"numbers": numbers}}
    except ValueError as e:
        raise UserError(str(e)) from None
    raise UserError(
        "--release: encoder and decoder need --labels, the authors' class tables; or give one file"
    )


def wanted_images(index, checkpoint, split, folder, cache):
    """The images of a source to evaluate on: those that --split names, else the checkpoint's
    validation images; of a released network those of split.json, else the official ones, else all.
    Never makes a split."""
    path = balance_split.split_path(folder, cache)
    source = index.source
    if split is None and "split" in checkpoint:
        wanted = checkpoint["split"].get(source, [])
        kind = "that validated in training; --split all takes every one"
    else:
        if split is None:
            split = "balanced"
            if source not in balance_split.read_split(path)["sources"]:
                split = "official" if index.data_set.has_official else "all"
        wanted = balance_split.validation_images(index, split, path)
        kind = f"--split {split}"
    present = set(wanted) & set(index.images)
    print(f"{source}: {len(present)} of {len(index.images)} images in {index.folder} ({kind})")
    if len(present) < len(wanted):
        print(f"{source}: {len(wanted) - len(present)} images of the split are missing")
    known = present & set(checkpoint.get("trained", {}).get(source, ()))
    if known:
        print(f"{source}: {len(known)} of them have the names of images that trained this network")
    return wanted


def open_sources(indexes, vocabulary, checkpoint, levels, labels, split, folder, cache):
    """The sources that have labels of the network's levels and classes, with the images to evaluate
    on. UserError if there are none."""
    sources = {}
    for name, index in indexes.items():
        names = None
        if "split" not in checkpoint:
            names = datasets.released_names(labels, index, vocabulary)
        elif index.data_set.fixed_table:
            table = index.data_set.names_by_level(index)["object"].values()
            unknown = [n for n in table if n not in vocabulary.get("object", ())]
            if unknown:
                print(f"{name}: classes unknown to this network: {datasets.listed(unknown)}")
        wanted = wanted_images(index, checkpoint, split, folder, cache)
        source = Source(index, vocabulary, names, validation=wanted)
        if set(source.levels) & set(levels):
            sources[name] = source
    if not sources:
        raise UserError(
            "--data: has no labels of the levels or classes of this network; data of your own need "
            "the classes.txt of training"
        )
    if not any(source.validation for source in sources.values()):
        raise UserError(
            "no images to evaluate: see --split (official, balanced, all), --data, --root"
        )
    return sources


def tell_sizes(sources, test_size, sizes):
    """Prints at which size the network sees the images of each source: of the three commonest."""
    for name, source in sources.items():
        if not source.data_set.close_ups:
            counts = collections.Counter(map(tuple, source.index.sizes[source.validation].tolist()))
            for full, n in counts.most_common(3):
                print(f"{name}: {n} {size_line(full, test_size, sizes)}")


def relate(relations, net, sources, **how):
    """Counts the relations in images of data sets, but for close-ups, without things in them."""
    for name, source in sources.items():
        if not source.data_set.close_ups:
            for i in datasets.progress(source.validation, f"relations, {name}"):
                relations.add(parse(net, source.photo(i), **how))


# ---------------------------------------------------------------- the command
def make_parser():
    parser = datasets.make_parser(
        "evaluate.py", "evaluate.py ckpt.pt [options]: metrics and pictures of a network; photos."
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="ckpt.pt", help="of train.py")
    add(
        "--release", nargs="+", metavar="FILE", help="encoder and decoder, or mmsegmentation's file"
    )
    add("--labels", help="the authors' class tables: joint_dataset, or object150_info.csv")
    add("--photo", nargs="+", metavar="FILE", help="photos to parse, or folders of them")
    add("--pictures", help=f"folder for pictures, {SHOWN} a source (of photos: parsed)")
    add("--json", help="write the metrics there, as fractions (null: nothing labelled)")
    add("--relations", help="count section 4.2's relations over the images, into this file")
    add("--levels", type=datasets.levels_of, help=f"comma list of {','.join(LEVELS)} (all)")
    add("--size", type=datasets.short_sides, help="short sides to average over (as trained)")
    add("--flip", action="store_true", help="average over the mirror images too")
    splits = ("balanced", "official", "all")
    add("--split", choices=splits, help="images (the checkpoint's validation)")
    amp = "float32, or mixed precision (off)"
    add("--amp", choices=("off", "auto", "bf16", "fp16"), default="off", help=amp)
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", default="auto", help="cuda, mps, cpu, or cuda:1, .. (auto)")
    datasets.add_data_options(parser)  # whose defaults are the checkpoint's own
    parser.set_defaults(data=None)
    return parser


def command(argv):
    datasets.join_processes()
    parser = make_parser()
    args = parser.parse_args(argv)
    net, vocabulary, checkpoint = open_network(args.checkpoint, args.release, args.labels)
    arguments = checkpoint["arguments"]
    stored = {key: arguments[key] for key in ("data", "root") if key in arguments}
    args = datasets.parse_options(parser, argv, {}, stored)
    device = datasets.pick_device(args.device)
    net.to(device)
    levels = args.levels or list(vocabulary)
    if not set(levels) <= set(vocabulary):
        raise UserError(f"--levels: this network has {', '.join(vocabulary)}")
    if args.compile:
        net.compile()
    relations = Relations(vocabulary, levels) if args.relations else None
    if relations and (dist.is_initialized() or not relations.counts):
        raise UserError(
            "--relations: needs levels such as object and material, and a single process"
        )
    amp = datasets.pick_amp(args.amp, device)
    how = {"levels": levels, "amp": amp, "sizes": args.size, "flip": args.flip}
    numbers = arguments.get("numbers", {})
    failed = []
    if args.photo:
        if args.json or dist.is_initialized():
            raise UserError("--photo: not with --json (photos have no labels), nor with torchrun")
        results = args.pictures or "parsed"
        photos = photos_in(args.photo, results)
        failed = parse_photos(net, vocabulary, photos, results, numbers, relations, **how)
    elif args.data is None:
        raise UserError("--data: name the sources to evaluate on, ade20k,os for one")
    else:
        own_names = dict(zip(numbers.get("object", ()), vocabulary.get("object", ())))
        place = (args.folder, args.cache_folder)
        with datasets.main_process_first():
            indexes = datasets.open_indexes(args.data, *place, args.workers, levels, own_names)
        sources = open_sources(
            indexes, vocabulary, checkpoint, levels, args.labels, args.split, *place
        )
        tell_sizes(sources, net.test_size, args.size)
        results = evaluate(net, vocabulary, sources, workers=args.workers, **how)
        print(table(results, amp))
        if args.json and datasets.is_main_process():
            datasets.write_json(results, args.json)
            print(f"wrote {args.json}")
        if args.pictures and datasets.is_main_process():
            draw_pictures(net, vocabulary, sources, args.pictures, **how)
            print(f"wrote {args.pictures}")
        if relations:
            relate(relations, net, sources, **how)
    if relations:
        relations.report(args.relations)
    if failed:
        raise UserError("; ".join(failed))


def main(argv: list[str] | None = None) -> None:
    with datasets.one_line_errors("evaluate.py"):
        command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
