"""Metrics (section 2.2), tables and pictures of a trained UPerNet; photos; and section 4.2's relations.

python evaluate.py ckpt.pt --json m.json --pictures d   # on the validation images of the checkpoint's own data
python evaluate.py ckpt.pt --photo a.jpg b.png          # class maps and one picture per photo: every level
python evaluate.py ckpt.pt --relations r.json           # section 4.2: which objects, materials, .. go together
torchrun --nproc_per_node=8 evaluate.py ckpt.pt         # several GPUs share the images
python evaluate.py --release FILES --photo a.jpg        # the authors' weights (with --labels), mmsegmentation's"""

import argparse, colorsys, csv, functools, math, os, re

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

import balance_split, datasets, upernet
from datasets import Index, Option, Source, UserError
from upernet import LEVELS, UPerNet

SHOWN = 12  # images of each source in pictures


# ---------------------------------------------------------------- metrics
class Metrics:
    """Section 2.2's metrics, from confusion matrices (truth, prediction) that are counted image by image.
    Object, material: pixel accuracy and mean IoU over labelled pixels. Part: within the true object's region, for the
    objects of an image that have an annotated part, background as a class (mIoU-bg), averaged over an object's parts
    first, then over objects. Scene, texture: top-1. A class without a labelled pixel is in no mean."""

    def __init__(self, vocabulary: dict):
        self.vocabulary = vocabulary
        sizes = {level: len(names) for level, names in vocabulary.items() if level != "part"}
        sizes |= {("part", name): len(parts) for name, parts in vocabulary.get("part", {}).items()}
        self.confusion = {key: torch.zeros(n, n, dtype=torch.int64) for key, n in sizes.items()}
        self.levels: set[str] = set()  # that were evaluated

    def add(self, level: str, predicted: Tensor, truth: Tensor, key=None) -> None:
        """Class indices of any shape, an image's or a pixel map's; truth -1 is unlabelled."""
        self.levels.add(level)
        confusion, labelled = self.confusion[key or level], truth >= 0
        k = len(confusion)
        pairs = truth[labelled].long() * k + predicted[labelled].long()
        confusion += torch.bincount(pairs, minlength=k * k).view(k, k).cpu()

    def add_parts(self, logits: Tensor, objects: Tensor, parts: Tensor, part_slices: dict, filled: tuple) -> None:
        """Parts of one image: logits (sum of part counts, h, w), true objects and parts (H, W); see `class_map`."""
        self.levels.add("part")
        for index in torch.unique(objects[parts > 0]).tolist():
            inside = objects == index
            predicted = class_map(logits[part_slices[index]], filled, tuple(objects.shape))
            self.add("part", predicted[inside], parts[inside], ("part", self.vocabulary["object"][index]))

    def merge(self) -> None:
        """Sums what all processes have counted, in each of them."""
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.confusion, self.levels))
        self.confusion = {key: sum(confusion[key] for confusion, _ in everyone) for key in self.confusion}
        self.levels = set().union(*(levels for _, levels in everyone))

    def results(self) -> dict:
        """Fractions in [0, 1], None where nothing is labelled: the format of `evaluate.py --json`."""
        results: dict = {}
        for level in sorted(self.levels, key=LEVELS.index):
            names, table = self.vocabulary[level], self.confusion.get(level)
            if level == "part":
                tables = {name: self.confusion["part", name] for name in names}
                iou = {name: dict(zip(names[name], class_iou(table))) for name, table in tables.items()}
                means = mean([mean(list(of_parts.values())) for of_parts in iou.values()])
                results[level] = {"pixel_accuracy": accuracy(tables.values()), "mean_iou_bg": means, "iou": iou}
            elif level in ("scene", "texture"):
                results[level] = {"top1": accuracy([table]), "n": int(table.sum())}
            else:
                iou = dict(zip(names, class_iou(table)))
                results[level] = {"pixel_accuracy": accuracy([table]), "mean_iou": mean(list(iou.values())), "iou": iou}
        return results


def class_iou(confusion: Tensor) -> list[float | None]:
    """Intersection over union of each class; None for one that has no labelled pixel."""
    intersection, labelled = confusion.diag(), confusion.sum(dim=1)
    union = labelled + confusion.sum(dim=0) - intersection
    return [i / u if n else None for i, u, n in zip(intersection.tolist(), union.tolist(), labelled.tolist())]


def accuracy(confusions) -> float | None:
    correct, total = (sum(int(f(c)) for c in confusions) for f in (torch.trace, torch.sum))
    return correct / total if total else None


def mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


# ---------------------------------------------------------------- from logits to classes
def class_map(logits: Tensor, filled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The best class of every pixel, (height, width) int64; ties go to the lowest index.
    logits: (K, h, w) at a quarter of the padded input; `filled` is the (height, width) of the input that the picture
    took before padding, `size` the one asked for. Without padding this is exactly
    `F.interpolate(logits[None], size, mode="bilinear")[0].argmax(dim=0)`, without ever holding all those logits."""
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    scales = [None if 4 * cells == n else 4 * full / n for cells, n, full in zip(logits.shape[1:], filled, size)]
    two_axes, one_axis = torch.ops.aten.upsample_bilinear2d, torch.ops.aten.upsample_linear1d
    if sum(size) <= 128:  # PyTorch has another way of rounding for them
        return two_axes(logits[None], size, False, *scales)[0].argmax(dim=0)
    # An upsampled value lies between the four cells around it. So a class whose highest of the four is everywhere below
    # another class's lowest (by more than rounding) wins nowhere.
    lowest = highest = logits
    for axis, cells in ((1, logits.shape[1]), (2, logits.shape[2])):
        n = max(1, cells - 1)
        lowest = torch.minimum(lowest.narrow(axis, 0, n), lowest.narrow(axis, cells - n, n))
        highest = torch.maximum(highest.narrow(axis, 0, n), highest.narrow(axis, cells - n, n))
    bound = lowest.amax(dim=0) - 1e-5 * logits.abs().amax()
    possible = (highest < bound).flatten(1).all(dim=1).logical_not().nonzero().flatten()
    best, value = torch.zeros(size, dtype=torch.int64, device=logits.device), logits.new_empty(size)
    top = logits.new_full(size, -torch.inf)
    for k in possible.tolist():
        if logits.is_cpu:  # the same sums, quicker: a row's pixels lie side by side on each axis
            wide = one_axis(logits[k, None], size[1:], False, scales[1])  # (1, h, width)
            one_axis.out(wide.mT, size[:1], False, scales[0], out=value.mT[None])
        else:
            value = two_axes(logits[None, k, None], size, False, *scales)[0, 0]
        best.masked_fill_(value > top, k)
        torch.maximum(top, value, out=top)
    return best


def part_map(logits: Tensor, objects: Tensor, part_slices: dict[int, slice], filled: tuple[int, int]) -> Tensor:
    """The best part of every pixel among those of the object that `objects` (H, W) has there, as `part_channels`."""
    parts = torch.zeros_like(objects)
    for index in part_slices.keys() & set(torch.unique(objects).tolist()):
        best = class_map(logits[part_slices[index]], filled, tuple(objects.shape))
        parts = torch.where(objects == index, best, parts)
    return part_channels(objects, parts, part_slices)


def part_channels(objects: Tensor, parts: Tensor, part_slices: dict[int, slice]) -> Tensor:
    """(object, index in its list of parts) of every pixel -> channel of the part logits, -1 for background: (H, W)."""
    channels = torch.full_like(objects, -1)
    for index in torch.unique(objects[parts > 0]).tolist():
        here = (objects == index) & (parts > 0)
        channels[here] = part_slices[index].start + parts[here]
    return channels


def class_names(vocabulary: dict) -> dict[str, list[str]]:
    """Level -> class names; for part a name for every channel of the part logits, "car: wheel"."""
    parts = {"part": [f"{name}: {part}" for name, parts in vocabulary.get("part", {}).items() for part in parts]}
    return vocabulary | parts if "part" in vocabulary else vocabulary


# ---------------------------------------------------------------- evaluation
def network_input(picture: Image.Image, full: tuple[int, int], test_size: tuple) -> tuple[torch.Tensor, tuple]:
    """(image (1, 3, H, W) uint8, the (height, width) of it that the picture fills), at `UPerNet.test_size`.
    full: (height, width) of the picture, which may be smaller here."""
    short, longest, multiple = test_size
    size = tuple(math.ceil(n / (multiple or 1)) * (multiple or 1) for n in datasets.resized(full, short, longest))
    height, width = (max(32, n) if multiple else datasets.padded(n) for n in size)
    return torch.from_numpy(datasets.padded_image(picture, size, height, width))[None], size


def evaluation_image(k: int, sources: dict[str, Source], images: list[tuple[str, int]], test_size: tuple) -> dict:
    """The k-th of the (source, image number)s: `file`, `images` and `size` as from `network_input`, and the labels
    at their own size as from `Source.labels`, as tensors. DTD's images are squares of TEXTURE_SIZE."""
    name, i = images[k]
    source, full, side = sources[name], tuple(sources[name].index.sizes[i].tolist()), datasets.TEXTURE_SIZE
    if name == "dtd":
        full, test_size, picture = (side, side), (side, side, None), datasets.texture_square(source, i, 0.5)
    else:
        picture = source.photo(i, datasets.resized(full, *test_size[:2])[::-1])
    pixels, size = network_input(picture, full, test_size)
    labels = {level: torch.as_tensor(value) for level, value in source.labels(i).items()}
    return {"file": source.index.images[i], "images": pixels, "size": size, **labels}


def evaluate(net: UPerNet, vocabulary: dict, sources: dict, images: list, levels=None, amp=None, pictures=None) -> dict:
    """The metrics of `net` on the (source, image number)s, in the format of `evaluate.py --json`. Sets eval mode.
    Images are resized to `net.test_size`, predictions evaluated at the label maps' own size. In the folder `pictures`,
    if given, up to SHOWN images of each source are shown, truth beside prediction. Processes share the images."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, metrics = next(net.eval().parameters()).device, Metrics(vocabulary)
    levels = [level for level in (levels or LEVELS) if level in vocabulary]
    images = [(name, i) for name, i in images if set(sources[name].levels) & set(levels)]
    shown = set()
    for name in sources if pictures else ():
        of_source = [pair for pair in images if pair[0] == name]
        shown |= set(of_source[:: max(1, len(of_source) // SHOWN)][:SHOWN])
    images = images[rank::processes]
    item = functools.partial(evaluation_image, sources=sources, images=images, test_size=net.test_size)
    loader = datasets.in_order(item, range(len(images)), None if len(images) > 500 else 0)
    bar = dict(desc="evaluating", unit=" images", disable=None if rank == 0 else True, leave=False)
    for pair, image in zip(images, tqdm(loader, total=len(images), **bar)):
        source, filled = sources[pair[0]], image["size"]
        asked = [level for level in source.levels if level in levels]
        with torch.inference_mode(), datasets.autocast(device, amp):
            logits = net(image["images"].to(device) / 255, levels=asked)
        logits = {level: value[0].float() for level, value in logits.items()}
        labels = {level: image[level].to(device) for level in source.levels}
        maps = {}  # object, material: the class of each pixel
        for level in asked:
            if level == "part":
                metrics.add_parts(logits["part"], labels["object"], labels["part"], net.part_slices, filled)
            elif level in ("scene", "texture"):
                metrics.add(level, logits[level].argmax(), labels[level])
            else:
                maps[level] = class_map(logits[level], filled, tuple(labels[level].shape))
                metrics.add(level, maps[level], labels[level])
        if pair in shown:
            if "part" in asked:
                objects = labels["object"].long()
                maps["part"] = part_map(logits["part"], maps.get("object", objects), net.part_slices, filled)
                labels["part"] = part_channels(objects, labels["part"].long(), net.part_slices)
            name = os.path.splitext(image["file"])[0].replace("/", "_")[-80:]
            sheet = comparison(source.photo(pair[1]), maps, logits, labels, vocabulary)
            save_picture(sheet, os.path.join(pictures, f"{pair[0]}_{name}.png"))
    if processes > 1:
        metrics.merge()
    return metrics.results()


def table(results: dict, amp: torch.dtype | None = None, untrained: dict | None = None) -> str:
    """The metrics as text: levels first, then the best and worst ten classes; `untrained` adds that network's."""
    percent = lambda value: "     -" if value is None else f"{100 * value:6.2f}"
    titles = {"pixel_accuracy": "pixel accuracy", "mean_iou": "mean IoU", "mean_iou_bg": "mIoU-bg", "top1": "top-1"}
    precision = str(amp or torch.float32).removeprefix("torch.")
    lines = [f"{'level':10s}{'metric':16s}{'%':>7s}{'  untrained' if untrained else ''}   ({precision})"]
    for level, metrics in results.items():
        for metric in [metric for metric in titles if metric in metrics]:
            beside = f"     {percent(untrained[level][metric])}" if untrained else ""
            lines.append(f"{level:10s}{titles[metric]:16s} {percent(metrics[metric])}{beside}")
    for level, metrics in results.items():
        iou = metrics.get("iou", {})
        if level == "part":
            iou = {f"{name}: {part}": v for name, parts in iou.items() for part, v in parts.items()}
        ranked = sorted(((name, v) for name, v in iou.items() if v is not None), key=lambda pair: -pair[1])
        rows = [f"  {name[:38]:38s} {percent(v)}" for name, v in ranked]
        rows[10:-10] = [f"  .. {len(rows) - 20} more, in --json"] if len(rows) > 20 else rows[10:-10]
        if absent := len(iou) - len(ranked):
            rows.append(f"  without a labelled pixel in these images, and in no mean: {absent}")
        lines += ["", f"IoU of each {level}, %", *rows] if rows else []
    return "\n".join(lines)


# ---------------------------------------------------------------- photos
def parse(net: UPerNet, photo, levels: list[str] | None = None, amp: torch.dtype | None = None) -> dict:
    """All that the network sees in a photo, a PIL image or a uint8 array (H, W, 3), at its size. Sets eval mode.
    object, material, texture_map: (H, W) class indices; part: (H, W) channels of the part logits within the predicted
    object, -1 for none; scene, texture: (K,) probabilities. Resized and padded to `net.test_size`, as in training."""
    if not isinstance(photo, Image.Image):
        photo = np.asarray(photo)
        if photo.dtype != np.uint8 or photo.shape[2:] != (3,):
            raise ValueError(f"a photo of shape {photo.shape}, {photo.dtype}: not (H, W, 3) uint8")
        photo = Image.fromarray(photo)
    device, full, seen = next(net.eval().parameters()).device, (photo.height, photo.width), {}
    pixels, filled = network_input(datasets.rgb(photo), full, net.test_size)
    levels = list(net.classes) if levels is None else levels
    with torch.inference_mode(), datasets.autocast(device, amp):
        logits = net(pixels.to(device) / 255, ["object", *levels] if "part" in levels else levels)
    for level, value in logits.items():
        if level in ("scene", "texture"):
            seen[level] = value[0].float().softmax(dim=0)
        elif level != "part":
            seen[level] = class_map(value[0], filled, full)
    if "part" in logits:
        seen["part"] = part_map(logits["part"][0], seen["object"], net.part_slices, filled)
    return {level: value.cpu().numpy() for level, value in seen.items() if level.removesuffix("_map") in levels}


def write_photo(photo: Image.Image, seen: dict, vocabulary: dict, path: str, numbers: dict | None = None) -> list[str]:
    """Writes what `parse` saw: <path>_upernet.png, a picture of all levels; <path>_upernet.npz, the arrays and
    <level>_names; and of object and material <path>_<level>.png, masks with each class's number in the data's own
    table, `numbers[level]`, by default 1..K. The picture's panels have the photo's size, up to PANEL_PIXELS."""
    names, written = class_names(vocabulary), [f"{path}_upernet.png", f"{path}_upernet.npz"]
    arrays = {level: value.astype(np.int16 if value.ndim == 2 else np.float32) for level, value in seen.items()}
    arrays |= {f"{level}_names": np.array(of_level) for level, of_level in names.items()}
    datasets.write_file(written[1], lambda name: np.savez_compressed(name, **arrays))
    scale = min(1, math.sqrt(PANEL_PIXELS / (photo.width * photo.height)), PANEL_SIDE / max(photo.size))
    photo = photo.resize(tuple(max(1, round(n * scale)) for n in photo.size))
    panels = [tag_panel("photo", photo, {v: seen[v] for v in ("scene", "texture") if v in seen}, vocabulary)]
    for level in ("object", "part", "material", "texture_map"):
        if level in seen:
            named = level.removesuffix("_map")
            panels.append(map_panel(f"{named}s", photo, seen[level], names[named]))
        if level in ("object", "material") and level in seen:
            written.append(f"{path}_{level}.png")
            table = np.array((numbers or {}).get(level) or range(1, len(names[level]) + 1))
            mask = table[seen[level]].astype(np.uint8 if table.max() < 256 else np.uint16)
            save_picture(Image.fromarray(mask), written[-1])
    save_picture(sheet_of([panels[:3], panels[3:]]), written[0])
    return written


# ---------------------------------------------------------------- relations: section 4.2, table 4
class Relations:
    """Counts, over what the network sees in many photos, which concepts go together.
    scene-object: the share of a scene's photos in which an object shows up (one pixel is enough); those of at least
    30%. object-material, part-material, material-texture: of the pixels of the first, the share of the second; the
    three largest of at least 10% (the paper drops "small" ones: the number is ours), scaled to sum to one."""

    KINDS = {"scene-object": "{} is composed of {}", "object-material": "{} is made of {}"}  # in table 4's words
    KINDS |= {"part-material": "{} is made of {}", "material-texture": "{} is {}"}

    def __init__(self, vocabulary: dict, levels):
        self.names = class_names(vocabulary)
        self.photos = np.zeros(len(vocabulary.get("scene", ())), np.int64)  # of each scene
        pairs = [kind.split("-") for kind in self.KINDS if set(kind.split("-")) <= vocabulary.keys() & set(levels)]
        self.counts = {f"{a}-{b}": np.zeros((len(self.names[a]), len(self.names[b])), np.int64) for a, b in pairs}

    def add(self, seen: dict[str, np.ndarray]) -> None:
        """What `parse` saw in one photo."""
        for kind, counts in self.counts.items():
            first, second = kind.split("-")
            if kind == "scene-object":
                scene = int(seen["scene"].argmax())
                self.photos[scene] += 1
                counts[scene, np.unique(seen["object"])] += 1
            else:
                rows, columns = seen[first].astype(np.int64), seen["texture_map" if second == "texture" else second]
                flat = (rows * counts.shape[1] + columns)[rows >= 0]
                counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Kind -> first concept -> {second concept: share}, largest first."""
        results: dict = {kind: {} for kind in self.counts}
        for kind, counts in self.counts.items():
            of_scenes, (first, second) = kind == "scene-object", (self.names[level] for level in kind.split("-"))
            totals = self.photos if of_scenes else counts.sum(axis=1)
            for row in np.flatnonzero(totals):
                shares = counts[row] / totals[row]
                order = [k for k in np.argsort(-shares, kind="stable") if shares[k] >= (0.3 if of_scenes else 0.1)]
                if not of_scenes:
                    order = order[:3]
                    shares = shares / (shares[order].sum() or 1)
                results[kind] |= {first[row]: {second[k]: float(shares[k]) for k in order}} if order else {}
        return results

    def report(self, path: str) -> None:
        """Writes the results as JSON, and prints them in the words of table 4."""
        for kind, concepts in self.results().items():
            for first, shares in concepts.items():
                words = [name if kind == "scene-object" else f"{name} ({share:.0%})" for name, share in shares.items()]
                listed = " and ".join(([", ".join(words[:-1])] if words[1:] else []) + words[-1:])
                print(self.KINDS[kind].format(first, listed))
        datasets.write_json(self.results(), path)
        print(f"wrote {path}")


# ---------------------------------------------------------------- pictures
PANEL = 380  # width of a panel of a comparison, pixels
PANEL_PIXELS, PANEL_SIDE = 15e6, 20000  # of a panel of a photo, at most: sheets of six larger ones Pillow won't open
OPACITY = 0.6  # of the classes' colours on the photo


def class_colour(k: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture: hues a golden section apart, of three strengths."""
    colour = colorsys.hsv_to_rgb(k * 0.618 % 1, (1, 0.6, 0.8)[k % 3], (0.95, 1, 0.7)[k // 2 % 3])
    return tuple(round(255 * c) for c in colour)


def overlay(photo: Image.Image, classes: np.ndarray) -> Image.Image:
    """The photo with each class (H, W), -1 for none, in its colour and outlined in white."""
    classes = np.asarray(Image.fromarray(classes.astype(np.int32)).resize(photo.size, Image.Resampling.NEAREST))
    shown, present = torch.from_numpy(np.array(photo).transpose(2, 0, 1)), np.unique(classes[classes >= 0]).tolist()
    if present:
        masks = torch.from_numpy(np.stack([classes == c for c in present]))
        shown = draw_segmentation_masks(shown, masks, alpha=OPACITY, colors=[class_colour(c) for c in present])
    picture = shown.numpy().transpose(1, 2, 0).copy()
    picture[:, 1:][classes[:, 1:] != classes[:, :-1]] = 255
    picture[1:][classes[1:] != classes[:-1]] = 255
    return Image.fromarray(picture)


def panel(title: str, picture: Image.Image | None, entries: list[tuple]) -> Image.Image:
    """A titled picture with a legend below: (colour or None, text, length of a bar in [0, 1] or None) a line."""
    width = max(PANEL, picture.width if picture else 0)
    size = max(14, min(2 * picture.width, 3 * picture.height) // 80) if picture else 14  # of the text
    line, gap, font = round(1.4 * size), 3 * size // 14, ImageFont.load_default(size)
    y = line + 4 + (picture.height + 6 if picture else 0)
    sheet = Image.new("RGB", (width, y + line * len(entries)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 2), title, fill="black", font=font)
    if picture:
        sheet.paste(picture, (0, line + 4))
    for colour, text, bar in entries:
        if bar is not None:
            left = width * 2 // 3
            draw.rectangle([left, y + gap, left + (width // 3 - 2) * bar, y + line - gap - 1], fill="#6688bb")
        if colour is not None:
            blended = tuple(round(OPACITY * c + (1 - OPACITY) * 128) for c in colour)  # as it looks on the photo
            draw.rectangle([0, y + gap, size - 2, y + line - gap - 1], fill=blended, outline="black")
        while draw.textlength(text, font=font) > (width if bar is None else width * 2 // 3) - size - 14:
            text = text[:-2].rstrip(" .") + "\u2026"
        draw.text((0 if text.endswith(":") else size + gap + 1, y + 1), text, fill="black", font=font)
        y += line
    return sheet


def map_panel(title: str, photo: Image.Image, classes: np.ndarray, names: list[str], most: int = 12) -> Image.Image:
    """A level's overlay with a legend of what is there, largest first."""
    numbers, pixels = np.unique(classes[classes >= 0], return_counts=True)
    order = np.argsort(-pixels, kind="stable")
    shown = [(int(numbers[k]), pixels[k] / classes.size) for k in order[:most] if pixels[k] >= 0.001 * classes.size]
    entries = [(class_colour(k), f"{names[k]}  {share:.1%}", None) for k, share in shown]
    entries += [(None, f"and {len(order) - len(shown)} smaller", None)] if len(order) > len(shown) else []
    entries += [(None, f"none  {none:.1%}", None)] if (none := (classes < 0).mean()) >= 0.001 else []
    return panel(title, overlay(photo, classes), entries or [(None, "nothing", None)])


def tag_panel(title: str, photo: Image.Image | None, scores: dict[str, np.ndarray], vocabulary: dict) -> Image.Image:
    """The photo with the best five guesses of scene (and texture) as bars; scores are probabilities (K,)."""
    entries: list[tuple] = []
    for level, values in scores.items():
        best = [k for k in np.argsort(-values, kind="stable")[:5] if values[k] >= 0.005]
        entries += [(None, f"{level}:", None)]
        entries += [(None, f"{vocabulary[level][k]}  {values[k]:.0%}", float(values[k])) for k in best]
    return panel(title, photo, entries)


def comparison(photo: Image.Image, maps: dict, logits: dict, labels: dict, vocabulary: dict) -> Image.Image:
    """One validation image: the truth in the upper row, the prediction in the lower (in one row without scores)."""
    photo, names = photo.resize((PANEL, max(1, round(photo.height * PANEL / photo.width)))), class_names(vocabulary)
    scores = {level: logits[level].softmax(dim=0).cpu().numpy() for level in ("scene", "texture") if level in logits}
    known = [f"true {level}: {names[level][int(labels[level])]}" for level in scores if labels[level] >= 0]
    above = [tag_panel(", ".join(["photo", *known]), photo, {}, names)]
    below = [tag_panel("prediction", None, scores, names)]
    for level in maps:
        above.append(map_panel(f"{level}s, truth", photo, labels[level].cpu().numpy(), names[level]))
        below.append(map_panel(f"{level}s, prediction", photo, maps[level].cpu().numpy(), names[level]))
    return sheet_of([above, below] if scores else [above + below[1:]])


def sheet_of(rows: list[list[Image.Image]], margin: int = 10) -> Image.Image:
    """Pictures on white, row by row."""
    rows = [row for row in rows if row]
    cell, heights = max(p.width for row in rows for p in row), [max(p.height for p in row) + margin for row in rows]
    sheet = Image.new("RGB", ((cell + margin) * max(map(len, rows)) + margin, sum(heights) + margin), "white")
    for r, row in enumerate(rows):
        for k, p in enumerate(row):
            sheet.paste(p, (margin + k * (cell + margin), margin + sum(heights[:r])))
    return sheet


def save_picture(picture: Image.Image, path: str) -> None:
    datasets.write_file(path, lambda name: picture.save(name, "PNG", compress_level=3))


def plot(title: str, series: dict[str, tuple], top: float, right: int, unit: str, marks: list = []) -> Image.Image:
    """A panel of points, colour -> (xs in [0, right], ys in [0, top]); `marks` are heights with a red line."""
    left, up, width, height = 52, 30, PANEL - 66, 160
    picture = Image.new("RGB", (PANEL, up + height + 30), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    at = lambda x, y: (left + width * x / right, up + height * (1 - min(1, y / top)))
    for tick, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
        draw.line([at(0, tick * top), at(right, tick * top)], fill="#dddddd")
        draw.text((left - 6, at(0, tick * top)[1]), f"{tick * top:.2g}", fill="black", font=font, anchor="rm")
        text = f"{tick * right:.0f}" + (f" {unit}" if tick == 1 else "")
        draw.text((left + width * tick, up + height + 6), text, fill="black", font=font, anchor=anchor)
    for mark in marks:
        draw.line([at(0, mark), at(right, mark)], fill="#cc3333")
    for colour, (xs, ys) in series.items():
        for x, y in zip(xs, ys):
            px, py = at(float(x), float(y))
            draw.ellipse([px - 1.5, py - 1.5, px + 1.5, py + 1.5], fill=colour)
    draw.text((left, 8), title, fill="black", font=font)
    return picture


# ---------------------------------------------------------------- networks and the images to evaluate
def released_names(labels: str | None, index: Index, vocabulary: dict) -> dict[str, dict]:
    """`datasets.class_names` for a released network. Without a folder `labels`, SceneParsing's numbers are its classes;
    the authors' label_assignment.csv maps the numbers and scenes of ADE20K 2021, and OpenSurfaces'."""
    tables = labels and os.path.isdir(labels)
    if bool(tables) == (index.layout == "sceneparsing"):
        wanted = "ADE20K_2021_17_01, not SceneParsing" if tables else "ADEChallengeData2016 (SceneParsing)"
        raise UserError(f"{index.folder}: this network is measured on {wanted}")
    if not tables:
        if (own := len(index.names)) != (n := len(vocabulary["object"])):
            raise UserError(f"{index.folder}: has {own} classes; this network is measured on data with its own {n}")
        return {"object": dict(enumerate(vocabulary["object"], start=1))}
    plain = lambda name: re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")
    names: dict[str, dict] = {level: {} for level in datasets.SOURCE_LEVELS[index.source]}
    path = os.path.join(labels, "label_assignment.csv")
    try:
        for row in csv.DictReader(datasets.read_lines(path)):
            level, label = row["category"], int(row["broden_label"])
            if row["dataset"] == index.source and level in names and label >= (0 if level == "scene" else 1):
                key = plain(row["raw_name"].removesuffix("-s")) if level == "scene" else int(row["raw_label"])
                names[level][key] = row["broden_name"] if level == "part" else vocabulary[level][label]
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not the authors' table of labels ({e})") from None
    if "scene" in names:
        scenes = names["scene"]
        names["scene"] = {tag: scenes.get(plain(tag)) for tag in index.tags if tag}
        if unknown := [tag for tag in index.tags if tag and names["scene"][tag] is None]:
            datasets.say(f"{index.source}: {len(unknown)} images of scenes unknown to it: {str(unknown[:5])[1:-1]}")
    return names


def open_sources(args, vocabulary: dict, released: bool) -> dict[str, Source]:
    """The sources of --data that have labels of the network's levels and classes. UserError if none has."""
    sources = {}
    for name, index in datasets.from_main_process(lambda: datasets.open_indexes(args)[0]).items():
        names = released_names(args.labels, index, vocabulary) if released and name != "dtd" else None
        source = Source(index, vocabulary, names)
        if not set(source.levels) & set(args.levels or LEVELS):
            continue
        sources[name] = source
        if not released and index.layout == "sceneparsing" and "object" in vocabulary:
            own = datasets.class_names(index)["object"].values()
            if unknown := ", ".join([of_class for of_class in own if of_class not in vocabulary["object"]][:9]):
                datasets.warn(f"{name}: classes that this network does not know, left out: {unknown}")
    if not sources:
        raise UserError(f"--data {args.data}: has no labels of the levels or classes of this network")
    return sources


def images_to_evaluate(sources: dict[str, Source], vocabulary: dict, split: dict | None, args) -> list[tuple[str, int]]:
    """The (source, image number)s: those that --split names, else the checkpoint's validation images, `split`; for a
    released network, without one, see `balance_split.validation_images`. Never makes a split."""
    images = []
    for name, source in sources.items():
        own = set(source.index.images) if split is None else set(split.get(name, ()))
        chosen = own
        if split is None or args.split:
            chosen = set(balance_split.validation_images(source.index, vocabulary, args, make=False))
        numbers = [i for i, image in enumerate(source.index.images) if image in chosen]
        if n := len(chosen) - len(numbers):
            datasets.say(f"{name}: {n} of {len(chosen)} validation images are missing")
        if n := sum(source.index.images[i] not in own for i in numbers):
            datasets.say(f"{name}: {n} of {len(numbers)} images did not validate the checkpoint: it may know them")
        images += [(name, i) for i in numbers]
    if not images:
        raise UserError("no validation images to evaluate: see --split (official, balanced), --data, --root")
    return images


# ---------------------------------------------------------------- the command
def levels_of(text: str) -> list[str]:
    levels = [level.strip() for level in text.split(",")]
    if unknown := sorted(set(levels) - set(LEVELS)):
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not one of {', '.join(LEVELS)}")
    return levels


def parse_photos(args, net: UPerNet, vocabulary: dict, numbers: dict | None, amp, relations: Relations | None) -> None:
    """--photo: a picture and the maps of each photo. Raises UserError at the end for those that cannot be read."""
    paths, failed = [], []
    for path in args.photo:
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
        bases = [name.removesuffix("_upernet.npz") for name in inside]
        earlier = {f"{base}_{kind}.png" for base in bases for kind in ("upernet", "object", "material")}
        photos = [f for f in inside if f not in earlier and re.search(r"\.(png|jpe?g)$", f, re.I)]
        paths += [os.path.join(path, f) for f in photos] or [path]
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(
            f"--photo: two files named {twice[0]} have one result, {twice[0]}_upernet.png; parse them apart"
        )
    for path, stem in zip(paths, stems):
        try:
            photo = datasets.open_photo(path)
        except UserError as e:
            failed.append(f"{path}: no .jpg or .png in this folder" if os.path.isdir(path) else str(e))
            continue
        seen = parse(net, photo, args.levels, amp)
        path = os.path.join(args.pictures or ".", stem)
        print("wrote " + ", ".join(write_photo(photo, seen, vocabulary, path, numbers)))
        if relations:
            relations.add(seen)
    if relations:
        relations.report(args.relations)
    if failed:
        raise UserError("; ".join(failed))


def open_network(given) -> tuple[UPerNet, dict, dict, dict | None]:
    """(network, vocabulary, the arguments it was trained with, its validation images) of a checkpoint, or of --release,
    of which there are no validation images."""
    if bool(given.checkpoint) == bool(given.release):
        raise UserError("name a checkpoint (runs/toy/ckpt.pt, say) before the options, or give --release")
    try:
        if given.checkpoint:
            net, checkpoint = upernet.read_checkpoint(given.checkpoint)
            return net, *(checkpoint.get(key, {}) for key in ("vocabulary", "arguments", "split"))
        if len(given.release) == 1 and not given.labels:
            return *upernet.load_mmseg(given.release[0]), {"root": "data"}, None
        if len(given.release) == 2 and given.labels:
            net, vocabulary = upernet.load_release(*given.release, given.labels)
            numbers = {level: range(len(names)) for level, names in vocabulary.items() if "background" in names}
            return net, vocabulary, {"root": "data", "numbers": numbers}, None  # the authors' background is number 0
    except ValueError as e:
        raise UserError(str(e)) from None
    raise UserError("--release: encoder and decoder need --labels, the authors' class tables; or give one file")


def run(parser: datasets.Parser, given) -> None:
    datasets.join_processes()
    device = datasets.pick_device(given.device or "auto")
    net, vocabulary, trained, split = open_network(given)
    stored = {key: trained.get(key) for key in ("data", "root", "cache", "allow_broken")}
    args = parser.complete(given, stored | {"cache": None} if given.root else stored)
    net, amp = net.to(device), datasets.pick_amp(args.amp, device)
    if args.size:
        net.test_size = (args.size, max(args.size, net.test_size[1]), net.test_size[2])
    if unknown := sorted(set(args.levels or ()) - set(vocabulary)):
        raise UserError(f"--levels: no head for {', '.join(unknown)}; this network has {', '.join(vocabulary)}")
    if args.compile:
        net.compile()
    relations = Relations(vocabulary, args.levels or LEVELS) if args.relations else None
    if relations and (dist.is_initialized() or not relations.counts):
        raise UserError("--relations: needs two levels that it relates, and a single process")
    if args.photo and (args.json or dist.is_initialized()):
        raise UserError("--photo: not with --json (photos have no labels), nor with torchrun")
    if args.photo:
        return parse_photos(args, net, vocabulary, trained.get("numbers"), amp, relations)
    if args.data is None:
        raise UserError("--data: name the sources to evaluate on, ade20k,os for one")
    sources = open_sources(args, vocabulary, released=split is None)
    images = images_to_evaluate(sources, vocabulary, split, args)
    results = evaluate(net, vocabulary, sources, images, args.levels, amp, args.pictures)
    print(table(results, amp))
    if args.json and datasets.is_main_process():
        datasets.write_json(results, args.json)
    for written in filter(None, (args.json, args.pictures)):
        print(f"wrote {written}")
    if relations:
        for name, i in tqdm(images, desc="relations", unit=" images", disable=None, leave=False):
            if name != "dtd":  # squares of texture, without things in them
                relations.add(parse(net, sources[name].photo(i), args.levels, amp))
        relations.report(args.relations)


def main(argv: list[str] | None = None) -> None:
    options = [
        Option("release", list, None, "released weights: the authors' encoder and decoder, or mmsegmentation's one"),
        Option("labels", str, None, "the authors' class tables: joint_dataset, or object150_info.csv"),
        Option("photo", list, None, "photos, or folders of them, to parse instead of validation images"),
        Option("pictures", str, None, f"folder for pictures, of {SHOWN} images a source (of photos: default .)"),
        Option("json", str, None, "write the metrics there, as fractions (null: nothing labelled)"),
        Option("relations", str, None, "count section 4.2's relations over the images, into this file"),
        Option("levels", levels_of, None, f"comma list of {','.join(LEVELS)} (all)"),
        Option("size", int, None, "short side, pixels (the middle one of training's --sizes)", least=32),
        Option("split", ("balanced", "official"), None, "validation images (the checkpoint's own)"),
        Option("amp", ("off", "auto", "bf16", "fp16"), "off", "float32 (on Ampere with TF32 convolutions), or less"),
        *datasets.DEVICE_OPTIONS,
    ]
    for o in datasets.DATA_OPTIONS:
        ignored = "no effect on a trained network" if o.name.startswith("min") else f"{o.help}; default: as trained"
        options.append(o._replace(default=None, toy=None, help=ignored))
    parser = datasets.Parser("Metrics and pictures of a network; photos.", options, "%(prog)s ckpt.pt [options]")
    parser.add_argument("checkpoint", nargs="?", metavar="ckpt.pt", help="a checkpoint of train.py")
    parser.run(run, parser, parser.parse_args(argv))


if __name__ == "__main__":
    main()
