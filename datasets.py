"""Three sources of Broden+ (section 2.1): ADE20K, OpenSurfaces, DTD; data of your own; a toy.

    python datasets.py --data ade20k,os,dtd --root data   # scans: what is there, and what is broken

One record describes each data set: its files, how numbers are written in them, what they mean.
`scan` opens every file of a source once and keeps what it found, an `Index`. `build_vocabulary`
makes the class names of each level from the indexes. A `Source` is an index read with a vocabulary:
photos and labels. `TrainingBatches` draws from sources.
"""

import argparse
import collections
import colorsys
import contextlib
import dataclasses
import datetime
import functools
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import upernet

PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")  # endings, in any case
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")  # the last two to refuse them
HIGHEST_NUMBER = 65535  # of a class in a label picture
MEAN_COLOUR = (124, 116, 104)  # ImageNet's, the colour of padding: zero after normalisation
TEXTURE_SIZE = 64  # section 3: "roughly 64x64"; ours: short side 64, then a square of it
SEED = 304  # of the toy's files and of every split; --seed is about training
# Photos of 89 to 179 megapixels are fine; beyond, Pillow raises an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UserError(ValueError):
    """A mistake that the user can mend: scripts print it as one line and exit with status 2."""


# ---------------------------------------------------------------- what is known of each data set
class Entry(NamedTuple):
    """One image of a data set and its files: paths in the data set's folder, "" for none."""

    image: str
    official: str = ""  # its side of the official split: "train", "val" or ""
    tag: str = ""  # scene or texture, where that is known without opening a file
    labels: str = ""
    parts: str = ""
    json: str = ""


class DataSet(NamedTuple):
    """What is known of a data set. A new one is a record like those below, listed in DATA_SETS."""

    name: str  # of the layout
    source: str  # what --data calls it
    folders: tuple  # where it may lie below --root; itself or one folder down
    mark: str  # what only its folder has
    contents: tuple  # the files and folders that belong to it
    levels: tuple  # all that it labels
    entries: Callable  # (folder, paths in it) -> the images with their label files
    names_by_level: Callable  # (index) -> level -> {number or tag: class name}, after merging
    numbers: Callable | None = None  # (label picture) -> class numbers, (H, W) int32
    annotation: Callable | None = None  # (folder, entry) -> tag and {number: name} of an own file
    table: Callable | None = None  # (folder, numbers that occur) -> {number: name}
    tag_level: str | None = None  # the level that labels whole images
    map_level: str | None = None  # the level that labels pixels
    void: tuple = (0,)  # numbers without a name that need no warning
    own_table: bool = False  # whether its table of classes is the vocabulary, as it is
    same_size: bool = True  # whether label pictures have their photo's size
    squares: bool = False  # close-ups: cut to squares of TEXTURE_SIZE, trained on last
    has_official: bool = True  # whether it comes with a split


def side_of(folder: str) -> str:
    """ "train" or "val" for the folders that people name training, train, validation or val."""
    sides = {"training": "train", "train": "train", "validation": "val", "val": "val"}
    return sides.get(folder.lower(), "")


def without_ending(path: str) -> str:
    return os.path.splitext(path)[0]


def read_lines(*path: str) -> list[str]:
    """The lines of a text file, UTF-8, UTF-16 with its mark, or Latin-1."""
    content = Path(*path).read_bytes()
    try:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return content.decode("utf-16").splitlines()
        if b"\0" in content:
            raise UserError(f"{'/'.join(path)}: not text in UTF-8")
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return content.decode("latin-1").splitlines()


NO_SCENE = ("misc", "unknown", "none", "~not labeled")  # names of scenes that are none


def classes_advice(numbers: set[int]) -> str:
    """How to say which of the numbers in masks are classes."""
    lowest = min(numbers, default=0)
    highest = max(lowest + 1, max(numbers, default=1))
    example = f"{lowest} background, {highest} object"
    return f"name them in classes.txt, a number and a name a line ({example})"


# ADE20K_2021_17_01 (Zhou et al., CVPR 2017): scenes, objects and their parts.
def ade20k_entries(folder: str, paths: list[str]) -> list[Entry]:
    """images/ADE/training/../NAME.jpg with NAME_seg.png, NAME_parts_1.png if any, NAME.json."""
    present = set(paths)
    entries = []
    for path in paths:
        folders = PurePosixPath(path).parts
        if folders[:2] == ("images", "ADE") and path.lower().endswith(".jpg"):
            stem = path[:-4]
            parts = f"{stem}_parts_1.png"  # parts of parts (_parts_2) are left out
            if parts not in present:
                parts = ""
            official = side_of(folders[2])
            entries.append(Entry(path, official, "", f"{stem}_seg.png", parts, f"{stem}.json"))
    return entries


def ade20k_numbers(picture: Image.Image) -> np.ndarray:
    channels = np.asarray(picture.convert("RGB")).astype(np.int32)
    return channels[..., 0] // 10 * 256 + channels[..., 1]


def ade20k_annotation(folder: str, entry: Entry) -> tuple[str, dict[int, str]]:
    content = json.loads("\n".join(read_lines(folder, entry.json)))["annotation"]
    scenes = [scene for scene in content["scene"] if scene]  # from broad to fine
    tag = scenes[-1].strip().lower() if scenes else ""
    if tag in NO_SCENE:
        tag = ""
    names = {int(thing["name_ndx"]): str(thing["name"]) for thing in content["object"]}
    return tag, names


def ade20k_names(index: "Index") -> dict[str, dict]:
    objects = set(index.pixels[:, 1].tolist()) & index.names.keys()
    parts = set(index.pixels[:, 2].tolist()) & index.names.keys()
    return {
        "scene": {tag: tag for tag in index.tags if tag},
        "object": merged_names({number: index.names[number] for number in sorted(objects)}),
        "part": merged_names({number: index.names[number] for number in sorted(parts)}, parts=True),
    }


ADE20K_2021 = DataSet(
    name="ade2021",
    source="ade20k",
    folders=("", "ade20k"),
    mark="images/ADE",
    contents=("images",),
    levels=("scene", "object", "part"),
    tag_level="scene",
    map_level="object",
    entries=ade20k_entries,
    numbers=ade20k_numbers,
    annotation=ade20k_annotation,
    names_by_level=ade20k_names,
)


# ADEChallengeData2016 (SceneParsing), and your own photos and masks: scenes and objects.
def own_entries(folder: str, paths: list[str]) -> list[Entry]:
    """images/../NAME.jpg with annotations/../NAME.png, below training/, validation/ or not."""
    masks = {}
    for path in paths:
        if path.startswith("annotations/") and path.lower().endswith(MASKS):
            masks[without_ending(path)] = path
    scenes = {}
    if "sceneCategories.txt" in paths:
        for line in read_lines(folder, "sceneCategories.txt"):
            words = line.lower().split()
            if len(words) > 1 and words[1] not in NO_SCENE:
                scenes[words[0]] = words[1]
    entries = []
    for path in paths:
        if path.startswith("images/") and path.lower().endswith(PHOTOS):
            stem = without_ending(path)
            mask = stem.replace("images", "annotations", 1)
            official = side_of(PurePosixPath(path).parts[1])
            tag = scenes.get(PurePosixPath(stem).name.lower(), "")
            entries.append(Entry(path, official, tag, masks.get(mask, f"{mask}.png")))
    used = {entry.labels for entry in entries}
    alone = sorted(set(masks.values()) - used)
    if alone:
        warn(
            f"{folder}: masks without a photo of their name: {len(alone)}, first {alone[0]}; "
            f"photos end in {', '.join(PHOTOS)}"
        )
    if len(used) < len(entries):
        warn(
            f"{folder}: {len(entries) - len(used)} photos share their mask with another of its name"
        )
    return entries


def own_numbers(picture: Image.Image) -> np.ndarray:
    if picture.format == "JPEG":
        raise ValueError("a JPEG, whose compression changes the numbers; export masks as PNG")
    if picture.mode == "F":
        raise ValueError("floating-point numbers; save class numbers as integers")
    if picture.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
        return np.asarray(picture).astype(np.int32)
    channels = np.asarray(picture.convert("RGB")).astype(np.int32)
    if (channels != channels[..., :1]).any():
        raise ValueError("a mask in colours; write each colour's class number, in one channel")
    return channels[..., 0]


OWN_VOID = (0, 255, 65535)


def read_object_info(folder: str) -> dict[int, str]:
    """SceneParsing's table: a header, then number, tab, .., tab, name: its first synonym."""
    path = os.path.join(folder, "objectInfo150.txt")
    table = {}
    for line in read_lines(path):
        number, *columns = line.split("\t")
        if number.strip().isdecimal() and columns:
            table[int(number)] = upernet.first_synonym(columns[-1])
    if not table:
        raise UserError(f"{path}: no line is a number, a tab, .., and a name")
    return table


def read_classes(folder: str) -> dict[int, str]:
    """classes.txt: a number and a name a line, or names alone, whose numbers are 1, 2, .."""
    path = os.path.join(folder, "classes.txt")
    lines = [line.strip() for line in "\n".join(read_lines(path)).rstrip().split("\n")]
    table = {}
    unnumbered = []
    for line in lines:
        match = re.fullmatch(r"(\d+)(?:\s*[:,;=]\s*|\.?\s+)(\S.*)", line)
        if match and int(match[1]) in table:
            raise UserError(f"{path}: names number {match[1]} twice")
        if match:
            table[int(match[1])] = match[2]
        elif line:
            unnumbered.append(line)
    last = [re.search(r"\s(\d+)$", line) for line in unnumbered]
    if len(last) > 1 and all(last) and [int(m[1]) for m in last] != list(range(1, len(last) + 1)):
        raise UserError(f"{path}: '{unnumbered[0]}': write the number first, then the name")
    if len(unnumbered) >= len(table):  # names alone, of which some may begin with a number
        table = dict(enumerate(lines, start=1))
    elif unnumbered:
        raise UserError(f"{path}: '{unnumbered[0]}' has no number, other lines have")
    for number, name in table.items():
        if not name:
            raise UserError(f"{path}: line {number} is empty; names alone need one in every line")
    return dict(sorted(table.items()))


def own_class_table(folder: str, numbers: set[int]) -> dict[int, str]:
    """objectInfo150.txt, else classes.txt, else "class 1" to the highest number that occurs."""
    if os.path.exists(os.path.join(folder, "objectInfo150.txt")):
        return read_object_info(folder)
    if os.path.exists(os.path.join(folder, "classes.txt")):
        return read_classes(folder)
    numbers = numbers - set(OWN_VOID)
    highest = max(numbers, default=0)
    if len(numbers) < highest / 2:
        raise UserError(
            f"{folder}: its masks have {len(numbers)} of the numbers 1..{highest}: gray "
            "levels, JPEG or resampled masks, or instance ids? If these numbers are meant as "
            f"classes, {classes_advice(numbers)}"
        )
    return {number: f"class {number}" for number in range(1, highest + 1)}


def own_names(index: "Index") -> dict[str, dict]:
    distinct = upernet.distinct(index.names.values())
    tags = {tag: tag for tag in index.tags if tag}
    return {"scene": tags, "object": dict(zip(index.names, distinct))}


SCENE_PARSING = DataSet(
    name="sceneparsing",
    source="ade20k",
    folders=("", "ade20k"),  # your own images/ and annotations/ need no folder around them
    mark="annotations",
    contents=(
        "images",
        "annotations",
        "objectInfo150.txt",
        "classes.txt",
        "sceneCategories.txt",
    ),
    levels=("scene", "object"),
    tag_level="scene",
    map_level="object",
    entries=own_entries,
    numbers=own_numbers,
    table=own_class_table,
    names_by_level=own_names,
    void=OWN_VOID,
    own_table=True,
)


# OpenSurfaces release 0 after its own script (Bell et al., SIGGRAPH 2013): materials.
def opensurfaces_entries(folder: str, paths: list[str]) -> list[Entry]:
    """photos/ID.jpg with photos-labels/ID.png."""
    entries = []
    for path in paths:
        if path.startswith("photos/") and path.lower().endswith(PHOTOS):
            labels = path.replace("photos", "photos-labels", 1)
            entries.append(Entry(path, labels=f"{without_ending(labels)}.png"))
    return entries


def opensurfaces_numbers(picture: Image.Image) -> np.ndarray:
    red = np.asarray(picture.convert("RGB"))[..., 0]  # green: objects, blue: scenes
    return red.astype(np.int32)


def opensurfaces_table(folder: str, numbers: set[int]) -> dict[int, str]:
    path = os.path.join(folder, "label-substance-colors.csv")
    try:
        rows = upernet.read_table(path, "substance_name", "red_color")
        return {int(row["red_color"]): row["substance_name"].strip() for row in rows}
    except ValueError as e:
        raise UserError(f"{path}: not a table of substances ({e})") from None


# OpenSurfaces' substances that are kept, and as what (released code); all others are unlabelled.
KEPT = (
    "brick cardboard ceramic foliage food fur glass hair laminate leather metal mirror painted "
    "skin stone tile wallpaper wicker wood"
)
MATERIALS = {
    **{name: name for name in KEPT.split()},
    "concrete": "stone",
    "plastic clear": "plastic",
    "plastic opaque": "plastic",
    "granite marble": "polished stone",
    "carpet rug": "carpet",
    "fabric cloth": "fabric",
    "paper tissue": "paper",
    "rubber latex": "rubber/latex",
}


def opensurfaces_names(index: "Index") -> dict[str, dict]:
    materials = {}
    for number, name in index.names.items():
        plain = re.sub("[^a-z]+", " ", name.lower()).strip()
        if plain in MATERIALS:
            materials[number] = MATERIALS[plain]
    return {"material": materials}


OPEN_SURFACES = DataSet(
    name="os",
    source="os",
    folders=("os", "opensurfaces"),
    mark="photos-labels",
    contents=("photos", "photos-labels", "label-substance-colors.csv"),
    levels=("material",),
    map_level="material",
    entries=opensurfaces_entries,
    numbers=opensurfaces_numbers,
    table=opensurfaces_table,
    names_by_level=opensurfaces_names,
    same_size=False,  # label pictures are rendered 1024 high
    has_official=False,
)


# Describable Textures Dataset, r1.0.1 (Cimpoi et al., CVPR 2014): a texture for each image.
def dtd_entries(folder: str, paths: list[str]) -> list[Entry]:
    """images/TEXTURE/NAME.jpg; train1 and val1 against test1; unlisted ones are in neither."""
    sides = {}
    for name, side in (("train1", "train"), ("val1", "train"), ("test1", "val")):
        for line in read_lines(folder, f"labels/{name}.txt"):
            sides[f"images/{line.strip()}"] = side
    entries = []
    for path in paths:
        folders = PurePosixPath(path).parts
        if folders[0] == "images" and len(folders) == 3 and path.lower().endswith(PHOTOS):
            entries.append(Entry(path, sides.get(path, ""), tag=folders[1]))
    return entries


def dtd_names(index: "Index") -> dict[str, dict]:
    return {"texture": {tag: tag for tag in index.tags if tag}}


DTD = DataSet(
    name="dtd",
    source="dtd",
    folders=("dtd",),
    mark="labels/train1.txt",
    contents=("images", "labels"),
    levels=("texture",),
    tag_level="texture",
    entries=dtd_entries,
    names_by_level=dtd_names,
    squares=True,
)

DATA_SETS = [ADE20K_2021, SCENE_PARSING, OPEN_SURFACES, DTD]


# ---------------------------------------------------------------- similar names (section 2.1)
def merged_names(names: dict[int, str], parts: bool = False) -> dict[int, str]:
    """Number -> class name, similar names merged by rule (the released code has tables by hand).

    The first synonym, in lower case; a plural becomes the singular when both occur; names of parts
    lose "left" and "right". What then has one name is one class.
    """
    first = {}
    for number, name in names.items():
        name = name.split(",")[0].strip().lower()
        if parts:
            name = re.sub(r"\b(left|right) +", "", name)
        first[number] = name
    forms = set(first.values())
    return {number: singular(name, forms) for number, name in first.items()}


def singular(name: str, forms: set[str]) -> str:
    """The singular of a name, if it is among the forms; else the name."""
    for plural, ending in ((r"s$", ""), (r"(s|x|z|ch|sh|o)es$", r"\1"), (r"ies$", "y")):
        form = re.sub(plural, ending, name)
        if form != name and form in forms:
            return form
    return name


# ---------------------------------------------------------------- the scan
class Index(NamedTuple):
    """What one scan of a source found. Class numbers are the source's own."""

    source: str  # what --data calls it
    layout: str  # the name of its data set
    folder: str
    fingerprint: str  # of the names, sizes and times of the source's files
    images: list[str]  # paths relative to the folder, as the label files'
    labels: list[str]
    parts: list[str]  # "" for none
    sizes: torch.Tensor  # (images, 2), height and width
    official: list[str]  # "train", "val" or "" for each image
    tags: list[str]  # the scene or texture of each image, "" for none
    pixels: torch.Tensor  # (rows, 4): image, class number, part number (0: all of it), pixels
    names: dict[int, str]  # of classes and parts, by number
    broken: list[list[str]]  # [path, reason] of the images that were set aside

    @property
    def data_set(self) -> DataSet:
        return next(data_set for data_set in DATA_SETS if data_set.name == self.layout)


def scan(
    root: str,
    source: str,
    cache: str,
    allow_broken: bool = False,
    workers: int | None = None,
) -> Index:
    """The index of a source: from the cache unless a file was added, removed or changed, else by
    opening every file, in `workers` processes.

    Raises UserError if it is missing, or over one file in twenty is broken without `allow_broken`,
    or its masks and its table of classes do not fit.
    """
    data_set, folder = find_folder(root, source)
    stats = list_files(folder, data_set.contents)
    fingerprint = hash_of([data_set.name, sorted(stats.items())])
    entries = data_set.entries(folder, sorted(stats))
    if not entries:
        raise UserError(
            f"{folder}: has {data_set.mark}, but no photos where {data_set.name} has them"
        )
    path = os.path.join(cache, f"{source}.index.pt")
    index = read_index(path, folder, fingerprint)
    if index is None:
        index = scan_files(data_set, folder, fingerprint, entries, workers)
        if read_index(path, folder, fingerprint) is None:  # else another process was faster
            write_file(path, functools.partial(torch.save, index._asdict()))
            # Labels prepared from an earlier state of the data.
            for outdated in Path(cache).glob(f"{source}-" + 16 * "[0-9a-f]"):
                shutil.rmtree(outdated, ignore_errors=True)
    check_broken(index, allow_broken)
    check_numbers(index)
    return index


def find_folder(root: str, source: str) -> tuple[DataSet, str]:
    """(data set, folder) of a source below `root`. Raises UserError for none, and for two."""
    candidates = [data_set for data_set in DATA_SETS if data_set.source == source]
    places = []
    matches = []
    for data_set in candidates:
        for place in places_of(root, data_set):
            places.append(place)
            if os.path.exists(os.path.join(place, data_set.mark)):
                matches.append((data_set, place))
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"{source}: two data sets, {matches[0][1]} and {matches[1][1]}; move one away, or name "
            "one with --root"
        )
    marks = " or ".join(data_set.mark for data_set in candidates)
    folders = []
    for data_set in candidates:
        folders += data_set.folders
    where = " or ".join(os.path.join(root, name) for name in dict.fromkeys(folders))
    advice = hint(places) if SCENE_PARSING in candidates else ""
    raise UserError(
        f"{source}: no {marks} in {where}, or one folder down; see --root, --data{advice}"
    )


def places_of(root: str, data_set: DataSet) -> list[str]:
    """Where a data set may lie: in its folders below `root`, or one folder down."""
    places = []
    for name in data_set.folders:
        folder = os.path.join(root, name).rstrip("/")
        places.append(folder)
        if name and os.path.isdir(folder):
            places += sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    return places


# Folders of other layouts, and how to make ours of them.
OTHER_LAYOUTS = {
    "masks": "rename masks/ to annotations/, beside images/",
    "leftImg8bit": "Cityscapes: move photos to images/, masks to annotations/, by one name",
    "JPEGImages": "VOC: rename JPEGImages/ to images/ and SegmentationClass/ to annotations/",
    "trainannot": "CamVid: move train/ to images/training/, its masks to annotations/training/",
    "labels": "rename labels/ to annotations/, beside images/",
    "index_ade20k.mat": "2016_07_26 has its names in a MATLAB file; get ADE20K_2021_17_01 instead",
}


def hint(places: list[str]) -> str:
    """What to do with the data that are there, if they have a layout that people often have."""
    for place in places:
        for name, advice in OTHER_LAYOUTS.items():
            if os.path.exists(os.path.join(place, name)):
                return f"; {place} has {name}: {advice}"
    return ""


def list_files(folder: str, contents: tuple) -> dict[str, tuple[int, int]]:
    """Path in the folder -> (size, time of change) of all files that belong to a data set, but for
    hidden ones. Links are followed.
    """
    stats = {}
    for name in contents:
        for pattern in (name, f"{name}/**/*"):
            for path in glob.glob(pattern, root_dir=folder, recursive=True):
                whole = os.path.join(folder, path)
                if os.path.isfile(whole):
                    stat = os.stat(whole)
                    stats[path.replace(os.sep, "/")] = (stat.st_size, stat.st_mtime_ns)
    return stats


def read_index(path: str, folder: str, fingerprint: str) -> Index | None:
    """The index in the cache, or None if it is missing, damaged, or of other files."""
    try:
        stored = torch.load(path, weights_only=True)
        index = Index(**{**stored, "folder": folder})
        return index if index.fingerprint == fingerprint else None
    except Exception:  # whatever a damaged file makes of the reader
        return None


def scan_files(
    data_set: DataSet, folder: str, fingerprint: str, entries: list[Entry], workers: int | None
) -> Index:
    """Opens the files of all entries."""
    records = loader(Scan(data_set, folder, entries), workers=workers)
    kept = []
    sizes = []
    pixels = []
    names = {}
    broken = []
    for entry, record in zip(entries, progress(records, f"scanning {data_set.source}")):
        if record["broken"]:
            broken.append([entry.image, record["broken"]])
            continue
        pixels += [(len(kept), *row) for row in record["pixels"]]
        names.update(record["names"])
        sizes.append(record["size"])
        kept.append(entry._replace(tag=record["tag"]))
    pixels = torch.tensor(pixels, dtype=torch.int64).reshape(-1, 4)
    if data_set.table:
        names = data_set.table(folder, set(pixels[:, 1].tolist()))
    if max(names, default=0) > HIGHEST_NUMBER:
        raise UserError(f"{folder}: its table has a number above {HIGHEST_NUMBER}: {max(names)}")
    return Index(
        source=data_set.source,
        layout=data_set.name,
        folder=folder,
        fingerprint=fingerprint,
        images=[entry.image for entry in kept],
        labels=[entry.labels for entry in kept],
        parts=[entry.parts for entry in kept],
        sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        official=[entry.official for entry in kept],
        tags=[entry.tag for entry in kept],
        pixels=pixels,
        names=names,
        broken=broken,
    )


@dataclasses.dataclass(eq=False)
class Scan(Dataset):
    """The images of a data set, opened."""

    data_set: DataSet
    folder: str
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, k: int) -> dict:
        """What the files of entry k have, each opened once: `size`, `tag`, `names`, `pixels` as
        rows (class number, part number, pixels); `broken` says why it cannot be used, "" if it can.
        """
        entry = self.entries[k]
        folder = self.folder
        data_set = self.data_set
        current = entry.image
        try:
            with Image.open(os.path.join(folder, entry.image)) as photo:
                width, height = photo.size
                if is_turned(photo):
                    width, height = height, width
                photo.draft("RGB", (1, 1))  # JPEGs at an eighth, which notices damage too
                photo.load()
                if photo.format == "TIFF":
                    width, height = photo.size  # Pillow has turned it
                check_depth(photo)
            current = entry.json or entry.image
            tag = entry.tag
            names = {}
            if data_set.annotation:
                tag, names = data_set.annotation(folder, entry)
            pixels = []
            labels = None
            if entry.labels:
                current = entry.labels
                photo_size = (width, height) if data_set.same_size else None
                labels = label_numbers(data_set, os.path.join(folder, entry.labels), photo_size)
                counts = np.bincount(labels.ravel())
                for number in np.flatnonzero(counts):
                    pixels.append((int(number), 0, int(counts[number])))
            if entry.parts:
                current = entry.parts
                parts = label_numbers(data_set, os.path.join(folder, entry.parts), (width, height))
                both = (parts > 0) & (labels > 0)
                pairs = labels[both].astype(np.int64) << 16 | parts[both]
                for pair, count in zip(*np.unique(pairs, return_counts=True)):
                    pixels.append((int(pair >> 16), int(pair & 0xFFFF), int(count)))
            return {
                "broken": "",
                "size": (height, width),
                "tag": tag,
                "names": names,
                "pixels": pixels,
            }
        except Exception as e:  # whatever a decoder makes of a damaged file
            return {"broken": f"{current}: {reason_of(e)}"}


def reason_of(error: Exception) -> str:
    """Why a file cannot be used, on one line."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, KeyError):
        return f"has no {error}"
    if isinstance(error, Image.DecompressionBombError):
        return "more than 179 megapixels, which Pillow does not open; make it smaller"
    if type(error) is ValueError:
        return " ".join(str(error).split())
    return f"unreadable ({' '.join(str(error).split()) or type(error).__name__})"


def label_numbers(
    data_set: DataSet, path: str, photo_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Class numbers (H, W) int32 of a label picture.

    Raises ValueError if its (width, height) is not `photo_size`, and for numbers that are none.
    """
    with Image.open(path) as picture:
        if photo_size and picture.size != photo_size:
            width, height = picture.size
            raise ValueError(
                f"{width} x {height} pixels, its photo {photo_size[0]} x {photo_size[1]}; turn it "
                "as the photo's EXIF data say, or resize it with the nearest neighbour"
            )
        numbers = data_set.numbers(picture)
    if numbers.min() < 0 or numbers.max() > HIGHEST_NUMBER:
        raise ValueError(f"class numbers from {numbers.min()} to {numbers.max()}, not 0..65535")
    return numbers


def check_broken(index: Index, allow_broken: bool) -> None:
    """UserError if more than one image in twenty was set aside, a warning if any was."""
    if not index.broken:
        return
    total = len(index.images) + len(index.broken)
    message = f"{index.source}: {len(index.broken)} of {total} images set aside, the first: "
    message += index.broken[0][1]
    if not index.images:
        raise UserError(f"{message}; none is left")
    if len(index.broken) > 0.05 * total and not allow_broken:
        raise UserError(f"{message}; --allow-broken goes ahead without them")
    warn(message)


VOID_NAMES = ("void", "ignore", "ignored", "unlabelled", "unlabeled")


def check_numbers(index: Index) -> None:
    """Warns of numbers without a name; in one's own table of classes without a pixel and of those
    named void. UserError if no mask has a class of such a table."""
    numbers = set(index.pixels[:, 1].tolist())
    parts = set(index.pixels[:, 2].tolist()) - {0}  # 0: rows of whole objects
    unknown = (numbers | parts) - index.names.keys() - set(index.data_set.void)
    if unknown:
        warn(f"{index.source}: numbers without a name, unlabelled: {first_of(sorted(unknown))}")
    if not index.data_set.own_table:
        return
    if not numbers & index.names.keys() and not any(index.tags):
        raise UserError(
            f"{index.folder}: no mask has a class of {first_of(index.names) or '1, 2, ..'}, only "
            f"the numbers {first_of(sorted(numbers))}; {classes_advice(numbers)}"
        )
    void = [name for name in index.names.values() if name.lower() in VOID_NAMES]
    if void:
        warn(
            f"{index.source}: {first_of(void)} will be learned as a class; to leave its pixels "
            "unlabelled take its line out of classes.txt"
        )
    unused = [name for number, name in index.names.items() if number not in numbers]
    if unused:
        message = f"{index.source}: no pixel of {first_of(unused)}"
        if 0 in numbers - index.names.keys():
            message += f"; do your numbers start at 0? Then {classes_advice(numbers)}"
        warn(message)


def first_of(items) -> str:
    """The first nine of several things, as text."""
    items = list(items)
    more = [".."] if len(items) > 9 else []
    return ", ".join([str(item) for item in items[:9]] + more)


def unlabelled_share(index: Index, objects: list[str]) -> str:
    """What share of the pixels has none of the classes `objects`, a sentence; with what that means
    where they are 0."""
    names = index.data_set.names_by_level(index)["object"]
    labelled = [number for number, name in names.items() if name in objects]
    whole = index.pixels[index.pixels[:, 2] == 0]
    without = whole[~torch.isin(whole[:, 1], torch.tensor(labelled))]
    share = int(without[:, 3].sum()) / max(1, int(whole[:, 3].sum()))
    numbers = without[:, 1].unique().tolist()
    text = f"{index.source}: {share:.1%} of the pixels are unlabelled"
    if numbers:
        text += f" (numbers {first_of(numbers)}), neither learned nor evaluated"
    if index.data_set.own_table and 0 in numbers:
        text += f"; if 0 is a class, such as background, {classes_advice(whole[:, 1].tolist())}"
    return text


# ---------------------------------------------------------------- photos
def open_photo(path: str, box: tuple[int, int] | None = None) -> Image.Image:
    """A photo of any mode in RGB, turned as its EXIF data say; with a `box` of (width, height)
    perhaps reduced, but to no less than the box. Raises UserError with its name if it cannot be
    read.
    """
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", box or picture.size)  # libjpeg decodes at 1/2, 1/4 or 1/8
            return rgb(upright(picture))
    except Exception as e:  # whatever a decoder makes of a damaged file
        if isinstance(e, OSError) and e.strerror:
            raise UserError(f"{path}: {e.strerror}") from None
        raise UserError(f"{path}: cannot be read as a photo ({reason_of(e)})") from None


def upright(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF data say, if they can be read."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # whatever damaged EXIF data make of the reader
        return picture


def is_turned(picture: Image.Image) -> bool:
    """Whether its EXIF data, if they can be read, turn a picture by a quarter."""
    try:
        return picture.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception:  # of damaged EXIF data
        return False


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB: transparent pixels on white, 16 bits scaled to 8."""
    check_depth(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def check_depth(picture: Image.Image) -> None:
    """Raises ValueError for deep grey values whose range is not known: below 4096 they may be of 12
    bits, a guess of ours."""
    if picture.mode == "F":
        raise ValueError("floating-point values, whose range is unknown; save it with 8 bits")
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        low = int(values.min())
        high = int(values.max())
        if low < 0 or high > 65535 or 0 < high < 4096:
            raise ValueError(
                f"grey values up to {high} in more than 8 bits (12 of 16?); save it with 8 bits"
            )


# ---------------------------------------------------------------- the vocabulary (section 2.1)
def class_pixels(index: Index) -> dict[str, dict]:
    """Level -> class -> {image: pixels}, after merging and before any threshold. A class of part is
    (object, part). Scenes and textures, which have no pixels, count one for each image."""
    data_set = index.data_set
    names = data_set.names_by_level(index)
    table = {level: collections.defaultdict(collections.Counter) for level in names}
    for image, tag in enumerate(index.tags):
        if tag:
            table[data_set.tag_level][names[data_set.tag_level][tag]][image] += 1
    for image, number, part, pixels in index.pixels.tolist():
        name = names[data_set.map_level].get(number)
        if name is None:
            continue
        if part == 0:
            table[data_set.map_level][name][image] += pixels
        elif part in names["part"]:
            table["part"][name, names["part"][part]][image] += pixels
    return table


def build_vocabulary(
    indexes: dict[str, Index], minima: dict[str, int], levels: tuple = upernet.LEVELS
) -> dict:
    """Level -> class names (part: object -> part names, "background" first).

    Section 2.1: objects in at least `min_images` images with at least `min_pixels` pixels; parts of
    an object in at least `min_part_images` images; materials in at least `min_images`; all
    textures. Ours: scenes in at least `min_scene_images`; objects and parts in the order of their
    size, the others in that of the alphabet. A data set's own table of classes (SceneParsing, your
    own) is taken as it is. Raises UserError for two sources of one level, and, if `levels` has
    object, for an own table of which fewer than two classes have pixels.
    """
    least = {
        "scene": minima["min_scene_images"],
        "object": minima["min_images"],
        "part": minima["min_part_images"],
        "material": minima["min_images"],
        "texture": 1,
    }
    vocabulary = {}
    owner = {}
    for source, index in indexes.items():
        for level, classes in class_pixels(index).items():
            if level in owner:
                raise UserError(
                    f"--data: {owner[level]} and {source} both label {level}s; name one"
                )
            owner[level] = source
            pixels = {name: sum(images.values()) for name, images in classes.items()}
            kept = sorted(name for name, images in classes.items() if len(images) >= least[level])
            if level == "object" and index.data_set.own_table:
                kept = list(index.data_set.names_by_level(index)["object"].values())
                if "object" in levels and len(pixels) < 2:
                    raise UserError(
                        f"{index.folder}: fewer than two classes have pixels; background is one "
                        f"too: {classes_advice(index.pixels[:, 1].tolist())}"
                    )
            elif level == "object":
                kept = [name for name in kept if pixels[name] >= minima["min_pixels"]]
                kept.sort(key=lambda name: -pixels[name])
            elif level == "part":
                kept.sort(key=lambda name: -pixels[name])
                kept = parts_by_object(kept, vocabulary["object"])
            vocabulary[level] = kept
    return {level: names for level, names in vocabulary.items() if names}


def has_class(vocabulary: dict, level: str, name) -> bool:
    """Whether the vocabulary has a class, named as in `class_pixels`."""
    if level == "part":
        owner, part = name
        return part in vocabulary.get("part", {}).get(owner, ())
    return name in vocabulary.get(level, ())


def parts_by_object(pairs: list[tuple[str, str]], objects: list[str]) -> dict[str, list[str]]:
    """Object -> its parts, "background" first, of (object, part) pairs, for objects with any."""
    parts = {name: ["background"] for name in objects}
    for name, part in pairs:
        if name in parts and part != "background":
            parts[name].append(part)
    return {name: names for name, names in parts.items() if len(names) > 1}


# ---------------------------------------------------------------- photos and labels
class Source:
    """An index read with a vocabulary: `photo(i)` and `labels(i)`, as class indices.

    names: level -> {number or tag in the source's files: class name}, by default the data set's
        own.
    cache, short, longest: where label maps are kept prepared for training, at its largest size.
    `levels` are those of the data set of which the vocabulary has classes.
    """

    def __init__(
        self,
        index: Index,
        vocabulary: dict,
        names: dict | None = None,
        cache: str = "",
        short: int = 600,
        longest: int = 1200,
    ):
        self.index = index
        self.data_set = index.data_set
        self.short = short
        self.longest = longest
        if names is None:
            names = self.data_set.names_by_level(index)
        self.tag_level = self.data_set.tag_level
        self.map_level = self.data_set.map_level
        tags = lookup(names, vocabulary, self.tag_level)
        classes = lookup(names, vocabulary, self.map_level)
        self.tags = [tags.get(tag, upernet.UNLABELLED) for tag in index.tags]
        # Number in the files -> class index, -1 for none.
        self.class_of = np.full(HIGHEST_NUMBER + 1, upernet.UNLABELLED, np.int16)
        self.class_of[list(classes)] = list(classes.values())
        self.part_of = part_table(names.get("part", {}), vocabulary)
        has_classes = {"part": bool(self.part_of.any())}
        for level in (self.tag_level, self.map_level):
            has_classes[level] = len(lookup(names, vocabulary, level)) > 0
        self.levels = [level for level in self.data_set.levels if has_classes[level]]
        content = [index.fingerprint, short, longest]
        content += [(level, vocabulary[level]) for level in self.levels]
        self.prepared_folder = os.path.join(cache, f"{index.source}-{hash_of(content)}")

    def photo(self, i: int, box: tuple[int, int] | None = None) -> Image.Image:
        """Image i in RGB, see `open_photo`."""
        return open_photo(os.path.join(self.index.folder, self.index.images[i]), box)

    def labels(self, i: int) -> dict[str, np.ndarray | int]:
        """Image i's labels at their own size: object, material int16 (H, W), -1 for unlabelled;
        part uint8 (H, W), the index in the list of parts of the pixel's object, 0 elsewhere; scene,
        texture an index or -1.
        """
        labels = {}
        if self.tag_level in self.levels:
            labels[self.tag_level] = self.tags[i]
        if self.map_level in self.levels:
            classes = self.class_of[self.numbers(self.index.labels[i])]
            labels[self.map_level] = classes
            if "part" in self.levels:
                labels["part"] = np.zeros(classes.shape, np.uint8)
                if self.index.parts[i]:
                    labels["part"] = self.part_of[classes, self.numbers(self.index.parts[i])]
        return labels

    def numbers(self, name: str) -> np.ndarray:
        """The numbers in a label picture that the scan has found whole."""
        path = os.path.join(self.index.folder, name)
        try:
            return label_numbers(self.data_set, path)
        except Exception as e:  # whatever a decoder makes of a damaged file
            raise UserError(f"{path}: no longer readable as labels ({reason_of(e)})") from None

    def prepared(self, i: int) -> dict[str, np.ndarray]:
        """Image i's label maps as in `labels`, at most as large as training needs them. Kept as
        pictures in the cache, written when missing; UserError names a damaged one.
        """
        path = os.path.join(self.prepared_folder, f"{i}.png")
        parts_path = os.path.join(self.prepared_folder, f"{i}_parts.png")
        with_parts = "part" in self.levels and self.index.parts[i] != ""
        if not os.path.exists(path) or (with_parts and not os.path.exists(parts_path)):
            labels = self.labels(i)
            size = resized(self.index.sizes[i].tolist(), self.short, self.longest)
            if with_parts:
                write_prepared(labels["part"], size, parts_path)
            write_prepared((labels[self.map_level] + 1).astype(np.uint16), size, path)
        classes = read_prepared(path).astype(np.int16) - 1
        maps = {self.map_level: classes}
        if "part" in self.levels:
            maps["part"] = np.zeros(classes.shape, np.uint8)
            if with_parts:
                maps["part"] = read_prepared(parts_path)
        return maps


def lookup(names: dict, vocabulary: dict, level: str | None) -> dict:
    """Number or tag in a source's files -> class index, for the classes of a level."""
    position = {name: k for k, name in enumerate(vocabulary.get(level, ()))}
    of_level = names.get(level, {})
    return {key: position[name] for key, name in of_level.items() if name in position}


def part_table(names: dict[int, str], vocabulary: dict) -> np.ndarray:
    """(class index, number in the files) -> index in the object's list of parts: uint8 (classes +
    1, numbers), whose last row serves class -1. 0, background, for none and for parts that the
    list lacks."""
    objects = vocabulary.get("object", ())
    table = np.zeros((len(objects) + 1, HIGHEST_NUMBER + 1), np.uint8)
    for owner, parts in vocabulary.get("part", {}).items():
        of_parts = lookup({"part": names}, {"part": parts}, "part")
        table[objects.index(owner), list(of_parts)] = list(of_parts.values())
    return table


def write_prepared(labels: np.ndarray, size: tuple[int, int], path: str) -> None:
    """Writes a label map, made smaller if `size` is, as a picture."""
    height = min(size[0], labels.shape[0])
    width = min(size[1], labels.shape[1])
    # Each pixel's label is the one at its centre.
    rows = (2 * np.arange(height) + 1) * labels.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * labels.shape[1] // (2 * width)
    picture = Image.fromarray(labels[rows[:, None], columns])
    write_file(path, lambda name: picture.save(name, "PNG", compress_level=1))


def read_prepared(path: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except (OSError, SyntaxError, ValueError) as e:  # Pillow's errors for broken PNG chunks
        raise UserError(f"{path}: a damaged label map ({e}); delete it") from None


def resized(
    size: tuple[int, int], short: int, longest: int, rounding: Callable = round
) -> tuple[int, int]:
    """(height, width) with the short side at `short`, or less to keep the long one to `longest`.

    rounding: makes whole pixels of a side's length.
    """
    scale = min(short / min(size), longest / max(size))
    return max(1, rounding(size[0] * scale)), max(1, rounding(size[1] * scale))


def centres(cells: int, start: int, n: int, full: int) -> np.ndarray:
    """In a label map of `full` rows, the rows where the centres are of cells of 4 pixels, from
    pixel `start` on, of a photo of n rows."""
    middle = start + 4 * np.arange(cells) + 2
    return middle * full // n


# ---------------------------------------------------------------- batches (section 3.1)
def orientation_groups(index: Index, images: list[int]) -> list[np.ndarray]:
    """The images upright and the others: batches of one orientation need little padding."""
    images = np.array(images, np.int32)
    upright = (index.sizes[:, 0] > index.sizes[:, 1]).numpy()[images]
    return [group for group in (images[upright], images[~upright]) if len(group)]


def plan_batches(
    groups: list[tuple[int, np.ndarray]], iterations: int, per_iteration: int, seed: int
) -> np.ndarray:
    """The source and the images of each iteration: int32 (iterations, 1 + per_iteration).

    groups: (position of a source, indices of its images), of which each iteration draws one, with
        probability by its number of images: section 3.1's draw of a source, and of an orientation.
    Ours: no image repeats before every image of its group was used.
    """
    rng = np.random.default_rng(seed)
    plan = np.empty((iterations, 1 + per_iteration), np.int32)
    sizes = np.array([len(indices) for _, indices in groups])
    group_of = rng.choice(len(groups), iterations, p=sizes / sizes.sum())
    for k, (position, indices) in enumerate(groups):
        rows = np.flatnonzero(group_of == k)
        n = len(rows) * per_iteration
        passes = [rng.permutation(indices) for _ in range(1 + n // len(indices))]
        plan[rows, 0] = position
        plan[rows, 1:] = np.concatenate(passes)[:n].reshape(-1, per_iteration)
    return plan


class Sample(NamedTuple):
    """One image of a batch: where the window of the batch lies in the photo, resized to `size`."""

    photo: Image.Image
    labels: dict[str, np.ndarray]
    size: tuple[int, int]  # (height, width)
    top: int = 0
    left: int = 0


@dataclasses.dataclass(eq=False)
class TrainingBatches(Dataset):
    """The batches of one stage for one process. Batch k depends on the plan and the seed alone, so
    that neither the number of workers nor a pause changes it."""

    sources: list[Source]
    plan: np.ndarray  # see `plan_batches`; positions are those in `sources`
    sizes: list[int]  # short sides, of which each iteration draws one
    longest: int  # no long side is above it, but with `crop`
    seed: int
    crop: int = 0  # side of squares cut from images of a short side of 0.5 to 2 times it, or 0
    flip: bool = True  # whether half of the images are mirrored
    accumulate: int = 1  # batches in each iteration
    rank: int = 0  # each process takes its share of every batch
    processes: int = 1

    def __len__(self) -> int:
        return len(self.plan) * self.accumulate

    def __getitem__(self, k: int) -> dict:
        """`source`, `files`, `images` (N, 3, H, W) uint8 with H and W multiples of 32, and the
        labels of the source's levels as in `upernet.losses`, in small integer types.
        """
        iteration, batch_of_step = divmod(k, self.accumulate)
        position, *everybodys = self.plan[iteration].tolist()  # for all batches and processes
        source = self.sources[position]
        n = len(everybodys) // (self.accumulate * self.processes)
        first = (batch_of_step * self.processes + self.rank) * n
        indices = everybodys[first : first + n]

        # Section 3.1 draws a short side for each image; ours: one for all of an iteration, to pad
        # less.
        short = int(np.random.default_rng((self.seed, iteration, 0)).choice(self.sizes))
        samples = []
        for place, i in enumerate(indices, start=first + 1):
            rng = np.random.default_rng((self.seed, iteration, place))
            samples.append(self.sample(source, i, short, rng))

        if self.crop and not source.data_set.squares:
            height = width = self.crop
        else:
            height = pad_to_32(max(sample.size[0] for sample in samples))
            width = pad_to_32(max(sample.size[1] for sample in samples))
        images = [padded_image(s.photo, s.size, height, width, s.top, s.left) for s in samples]
        batch = {
            "source": source.index.source,
            "files": [source.index.images[i] for i in indices],
            "images": torch.from_numpy(np.stack(images)),
        }
        if source.tag_level in source.levels:
            tags = [source.tags[i] for i in indices]
            batch[source.tag_level] = torch.tensor(tags, dtype=torch.int16)
        for level in samples[0].labels:
            maps = [quarter_labels(sample, level, height, width) for sample in samples]
            batch[level] = torch.from_numpy(np.stack(maps))
        return batch

    def sample(self, source: Source, i: int, short: int, rng: np.random.Generator) -> Sample:
        """Image i at the short side `short` (section 3.1), with `crop` a random square of it at a
        random size (other code bases' augmentation), of textures a square; half of the time
        mirrored (in the authors' code, not in the paper; of textures ours)."""
        labels = {}
        top = left = 0
        if source.data_set.squares:
            size = (TEXTURE_SIZE, TEXTURE_SIZE)
            photo = texture_square(source, i, place=rng.random())
        else:
            longest = self.longest
            if self.crop:
                short = round(self.crop * rng.uniform(0.5, 2))
                longest = 4 * short
            size = resized(source.index.sizes[i].tolist(), short, longest)
            if self.crop:
                top = int(rng.integers(0, max(0, size[0] - self.crop) + 1))
                left = int(rng.integers(0, max(0, size[1] - self.crop) + 1))
            photo = source.photo(i, box=size[::-1])
            if source.map_level in source.levels:
                labels = source.prepared(i)
        if self.flip and rng.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            labels = {level: of_level[:, ::-1] for level, of_level in labels.items()}
        return Sample(photo, labels, size, top, left)


def quarter_labels(sample: Sample, level: str, height: int, width: int) -> np.ndarray:
    """A level's labels for a window of (height, width), at a quarter of it: each cell's label is
    the one at its centre; in the padding unlabelled (part: 0).
    """
    labels = sample.labels[level]
    h, w = sample.size
    top = sample.top
    left = sample.left
    rows = centres(cells_inside(min(h - top, height)), top, h, labels.shape[0])
    columns = centres(cells_inside(min(w - left, width)), left, w, labels.shape[1])
    padding = 0 if level == "part" else upernet.UNLABELLED
    quarter = np.full((height // 4, width // 4), padding, labels.dtype)
    quarter[: len(rows), : len(columns)] = labels[rows[:, None], columns]
    return quarter


def cells_inside(n: int) -> int:
    """How many cells of 4 pixels have their centre, 4 k + 2, within n pixels."""
    return math.ceil((n - 2) / 4)


def pad_to_32(n: int) -> int:
    """Up to a multiple of the network's coarsest stride."""
    return math.ceil(n / 32) * 32


def padded_image(
    photo: Image.Image, size: tuple[int, int], height: int, width: int, top: int = 0, left: int = 0
) -> np.ndarray:
    """A window of (height, width) at (top, left) of the photo resized to `size`, padded right and
    below with the mean colour: (3, height, width) uint8.
    """
    h = min(size[0] - top, height)
    w = min(size[1] - left, width)
    across = photo.width / size[1]  # the photo's own pixels for one of the resized photo
    down = photo.height / size[0]
    box = (left * across, top * down, (left + w) * across, (top + h) * down)
    canvas = Image.new("RGB", (width, height), MEAN_COLOUR)
    canvas.paste(photo.resize((w, h), Image.Resampling.BILINEAR, box=box))
    return np.ascontiguousarray(np.asarray(canvas).transpose(2, 0, 1))


def texture_square(source: Source, i: int, place: float) -> Image.Image:
    """Image i at a short side of TEXTURE_SIZE, cut to a square at `place` (0 to 1)."""
    side = (TEXTURE_SIZE, TEXTURE_SIZE)
    photo = source.photo(i, side)
    return ImageOps.fit(photo, side, Image.Resampling.BILINEAR, centering=(place, place))


# ---------------------------------------------------------------- the toy, in those layouts
TOY_SOURCES = ("ade20k", "os", "dtd")
TOY_HUES = {"brown": (0, 0.15), "green": (0.15, 0.4), "blue": (0.5, 0.7)}
TOY_NAMES = """sky road sea sand wall floor building roof window door tree trunk crown car wheel
    person leg torso head boat hull sail lamp base shade bed headboard pillow sofa back arm seat"""
# Class numbers of objects and parts go beyond 255, so that they take both colour channels.
TOY_NUMBERS = {name: 61 * k for k, name in enumerate(TOY_NAMES.split(), start=1)}
TOY_SYNONYMS = {"car": "car, auto", "building": "building, edifice", "person": "person, individual"}
TOY_SUBSTANCES = """Brick Tile Wood Stone Fabric/Cloth Metal Glass Painted Skin Rubber/Latex
    Foliage Sky Water Dirt""".split()
TOY_TEXTURES = "banded blotchy chequered grid polka-dotted swirly veined zigzagged".split()


def smooth_noise(u, v, rng):
    """Noise in [-1, 1] at the places (u, v), which changes within about one unit."""
    noise = 0
    for a, b, phase in rng.uniform(-5, 5, (5, 3)):
        noise += np.sin(a * u + b * v + phase) / 5
    return noise


def relief(kind, x, y, rng):
    """The pattern of a substance or a texture at the pixels (x, y): [0, 1], of the shape of x.

    It alone tells them apart, as most of them have any colour. Substances are upright and fine,
    textures are coarser, at a random angle.
    """
    angle = 0  # radians
    period = 16  # pixels
    if kind in TOY_TEXTURES:
        angle = rng.uniform(0, np.pi)
        period = rng.uniform(24, 34)
    u = (x * np.cos(angle) - y * np.sin(angle)) / period
    v = (x * np.sin(angle) + y * np.cos(angle)) / period
    match kind:
        case "Metal" | "banded":
            return u % 1 < 0.5
        case "Foliage" | "blotchy":
            return smooth_noise(u, v, rng) > 0
        case "Fabric/Cloth" | "chequered":
            return (u // 0.5 + v // 0.5) % 2
        case "Tile" | "grid":
            return (u % 1 > 0.2) & (v % 1 > 0.2)
        case "polka-dotted":
            return np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3
        case "Wood" | "swirly":
            return (2 * v + smooth_noise(u, v, rng)) % 1 < 0.5
        case "Stone" | "veined":
            return abs(smooth_noise(u, v, rng)) > 0.1
        case "Water" | "zigzagged":
            return (v + abs(u % 1 - 0.5)) % 1 < 0.5
        case "Brick":
            return (v % 1 > 0.2) & ((u + v // 1) % 2 > 0.2)
        case "Glass":
            return (u + v) % 2 < 1
        case "Sky":
            return 0.5 + smooth_noise(u / 5, v / 3, rng) / 2
        case "Dirt":
            return rng.random(x.shape)
        case "Painted" | "Skin":
            return 0.8 + 0 * x
        case "Rubber/Latex":
            return 0 * x


class Canvas:
    """A picture, and the numbers of each pixel's object, part and substance.

    `place` starts an object. Its shapes are then given in units of about 120 pixels from its feet,
    x to the right and y upwards. Each is of one substance and covers what was there.

    part: None for the object itself.
    colour: a key of TOY_HUES, or "any" for the hue that all such shapes of the object share.
    """

    def __init__(self, height, width, rng):
        self.rng = rng
        self.picture = np.zeros((height, width, 3), np.uint8)
        self.numbers = np.zeros((height, width, 3), int)

    def place(self, name, x, y, unit):
        """Starts an object with its feet at (x, y), fractions of the picture. unit: in pixels."""
        self.name = name
        self.hue = self.rng.random()
        height, width, _ = self.picture.shape
        self.x = (np.arange(width) - x * width) / unit
        self.y = (y * height - np.arange(height)[:, None]) / unit

    def paint(self, part, substance, colour, inside):
        """Paints the pixels `inside`, bool (H, W)."""
        least, greatest = TOY_HUES.get(colour, (self.hue, self.hue))
        hsv = self.rng.uniform((least, 0.1, 120), (greatest, 0.6, 250))
        y, x = np.nonzero(inside)
        shade = 0.6 + 0.4 * relief(substance, x, y, self.rng)
        self.picture[y, x] = np.multiply.outer(shade, colorsys.hsv_to_rgb(*hsv))
        self.numbers[y, x] = (
            TOY_NUMBERS[self.name],
            TOY_NUMBERS.get(part, 0),
            TOY_SUBSTANCES.index(substance) + 1,
        )

    def box(self, part, substance, colour, x, y, width, height, taper=0):
        """A rectangle; (x, y) is the middle of its lower edge.

        taper: how far its upper corners are moved inwards.
        """
        up = (self.y - y) / height
        inside = (0 <= up) & (up <= 1) & (abs(self.x - x) < width / 2 - taper * up)
        self.paint(part, substance, colour, inside)

    def disc(self, part, substance, colour, x, y, radius):
        """A disc around (x, y)."""
        self.paint(part, substance, colour, np.hypot(self.x - x, self.y - y) < radius)

    def layer(self, name, substances, colour, top):
        """Fills the picture with one of the substances from a fraction of its height down."""
        self.place(name, 0, top, 1)
        self.box(None, self.rng.choice(substances), colour, 0, -999, 999, 999)

    def scatter(self, name, draw, most, y):
        """Draws 1 to `most` objects, their feet at a fraction of the height or a little below."""
        for _ in range(self.rng.integers(1, most + 1)):
            x, feet, unit = self.rng.uniform((0.1, y, 100), (0.9, y + 0.1, 140))
            self.place(name, x, feet, unit)
            draw(self)


def draw_building(canvas):
    walls = canvas.rng.choice(["Brick", "Stone", "Wood", "Painted"])
    canvas.box(None, walls, "any", 0, 0, 0.72, 0.76)
    canvas.box("roof", "Tile", "brown", 0, 0.74, 0.88, 0.26, taper=0.2)
    for x in (-0.18, 0.18):
        canvas.box("window", "Glass", "blue", x, 0.42, 0.24, 0.26)
    canvas.box("door", "Wood", "brown", 0, 0, 0.24, 0.36)


def draw_tree(canvas):
    canvas.box("trunk", "Wood", "brown", 0, 0, 0.16, 0.5)
    canvas.disc("crown", "Foliage", "green", -0.12, 0.6, 0.27)
    canvas.disc("crown", "Foliage", "green", 0.12, 0.7, 0.28)


def draw_car(canvas):
    canvas.box("window", "Glass", "blue", 0, 0.36, 0.9, 0.28, taper=0.18)
    canvas.box(None, "Metal", "any", 0, 0.12, 1.3, 0.28)
    for x in (-0.38, 0.38):
        canvas.disc("wheel", "Rubber/Latex", "any", x, 0.14, 0.16)


def draw_person(canvas):
    for x in (-0.08, 0.08):
        canvas.box("leg", "Fabric/Cloth", "any", x, 0, 0.14, 0.45)
    canvas.box("torso", "Fabric/Cloth", "any", 0, 0.42, 0.4, 0.36, taper=0.05)
    canvas.disc("head", "Skin", "brown", 0, 0.87, 0.13)


def draw_boat(canvas):
    canvas.box("sail", "Fabric/Cloth", "any", 0, 0.3, 0.85, 0.65, taper=0.4)
    canvas.box("hull", "Wood", "any", 0, 0, 0.7, 0.28, taper=-0.2)


def draw_lamp(canvas):
    canvas.box("base", "Metal", "any", 0, 0, 0.15, 0.7)
    canvas.box("shade", "Fabric/Cloth", "any", 0, 0.6, 0.7, 0.45, taper=0.14)


def draw_bed(canvas):
    canvas.box("headboard", "Wood", "brown", -0.75, 0, 0.2, 0.9)
    canvas.box(None, "Fabric/Cloth", "any", 0.1, 0.05, 1.5, 0.4)
    canvas.disc("pillow", "Fabric/Cloth", "any", -0.42, 0.5, 0.2)


def draw_sofa(canvas):
    canvas.box("arm", "Fabric/Cloth", "any", 0, 0, 1.8, 0.54)  # both, behind the rest
    canvas.box("back", "Fabric/Cloth", "any", 0, 0.3, 1.3, 0.55)
    canvas.box("seat", "Fabric/Cloth", "any", 0, 0.05, 1.3, 0.32)


def draw_street(canvas):
    canvas.layer("sky", ["Sky"], "blue", 0)
    canvas.layer("road", ["Stone", "Brick"], "any", 0.5)
    canvas.scatter("building", draw_building, 3, y=0.5)
    canvas.scatter("tree", draw_tree, 2, y=0.55)
    canvas.scatter("car", draw_car, 2, y=0.75)
    canvas.scatter("person", draw_person, 1, y=0.85)


def draw_beach(canvas):
    canvas.layer("sky", ["Sky"], "blue", 0)
    canvas.layer("sea", ["Water"], "blue", 0.45)
    canvas.scatter("boat", draw_boat, 2, y=0.55)
    canvas.layer("sand", ["Dirt"], "brown", 0.7)
    canvas.scatter("tree", draw_tree, 1, y=0.75)
    canvas.scatter("person", draw_person, 2, y=0.85)


def draw_room(canvas):
    canvas.layer("wall", ["Painted", "Brick", "Tile"], "any", 0)
    canvas.layer("floor", ["Wood", "Tile", "Stone"], "any", 0.65)
    canvas.scatter("lamp", draw_lamp, 2, y=0.68)


def draw_bedroom(canvas):
    draw_room(canvas)
    canvas.scatter("bed", draw_bed, 1, y=0.8)


def draw_living_room(canvas):
    draw_room(canvas)
    canvas.scatter("sofa", draw_sofa, 1, y=0.8)


TOY_SCENES = {  # with ADE20K's path to each
    "outdoor/urban/street": draw_street,
    "outdoor/natural/beach": draw_beach,
    "indoor/home/bedroom": draw_bedroom,
    "indoor/home/living_room": draw_living_room,
}


def toy_scene(stream, k):
    """The k-th picture of a stream: (scene, picture, numbers as in `Canvas` but (3, H, W))."""
    rng = np.random.default_rng((SEED, stream, k))
    sizes = [(192, 288), (192, 288), (288, 192)]  # twice as large, for smooth edges
    canvas = Canvas(*rng.choice(sizes), rng)
    scene, draw = list(TOY_SCENES.items())[k % len(TOY_SCENES)]
    draw(canvas)
    picture = Image.fromarray(canvas.picture).reduce(2)
    return scene.split("/"), picture, canvas.numbers[::2, ::2].transpose(2, 0, 1)


def label_picture(red, green):
    """Two maps (H, W) as the channels of a picture; blue is 0."""
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))


def ade20k_files(scenes):
    """(path, picture or text) of scenes with objects and parts as in ADE20K 2021."""
    for k in range(scenes):
        scene, picture, (objects, parts, _) = toy_scene(0, k)
        side = "validation" if k % 10 == 9 else "training"
        folder = f"ade20k/ADE20K_2021_17_01/images/ADE/{side}/{scene[1]}/{scene[2]}"
        stem = f"{folder}/ADE_{side_of(side)}_{k:08d}"
        yield f"{stem}.jpg", picture
        yield f"{stem}_seg.png", label_picture(objects // 256 * 10, objects % 256)
        yield f"{stem}_parts_1.png", label_picture(parts // 256 * 10, parts % 256)
        names = []
        for name, number in TOY_NUMBERS.items():
            if number in objects or number in parts:
                names.append({"name_ndx": number, "name": TOY_SYNONYMS.get(name, name)})
        yield f"{stem}.json", json.dumps({"annotation": {"scene": scene, "object": names}})


def opensurfaces_files(photos):
    """(path, picture or text) of photos with substances as in OpenSurfaces."""
    for k in range(1, photos + 1):
        _, picture, (_, _, substances) = toy_scene(1, k)
        labels = label_picture(substances, 0 * substances)
        yield f"os/photos/{k}.jpg", picture
        # Larger than the photo, as they are in OpenSurfaces.
        yield f"os/photos-labels/{k}.png", ImageOps.scale(labels, 1.5, Image.Resampling.NEAREST)
    table = "substance_id,substance_name,red_color"
    for k, name in enumerate(TOY_SUBSTANCES, start=1):
        table += f"\n{k},{name},{k}"
    yield "os/label-substance-colors.csv", table


def dtd_files(textures):
    """(path, picture or text) of close-ups as in DTD, so many of each texture."""
    names = []
    for kind in TOY_TEXTURES:
        for k in range(textures):
            rng = np.random.default_rng((SEED, 2, k))
            y, x = np.indices(rng.integers(168, 226, 2))
            pattern = relief(kind, x, y, rng).astype(int)  # 0 and 1
            colours = np.array([rng.integers(0, 110, 3), rng.integers(140, 256, 3)], np.uint8)
            picture = Image.fromarray(rng.permutation(colours)[pattern])
            names.append(f"{kind}/{kind}_{k:04d}.jpg")
            yield f"dtd/images/{names[-1]}", picture.reduce(2)
    for k, side in enumerate(["train1", "val1", "test1"]):
        yield f"dtd/labels/{side}.txt", "\n".join(names[k::3])


def make_toy(folder: str, scenes: int = 400, photos: int = 480, textures: int = 100) -> None:
    """Writes the toy's ade20k/, os/ and dtd/ below `folder`, always the same, unless it exists.

    Atomic: a temporary folder, then a rename.
    """
    if os.path.isdir(folder):
        return
    print(f"generating the toy data in {folder}", flush=True)
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".toy-", dir=parent) as temporary:
        files = [*ade20k_files(scenes), *opensurfaces_files(photos), *dtd_files(textures)]
        for name, content in files:
            path = Path(temporary, "toy", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                content.save(path, quality=92)
        if not os.path.isdir(folder):  # another process may have been faster
            os.rename(f"{temporary}/toy", folder)


# ---------------------------------------------------------------- shared by the scripts: files
def warn(message: str) -> None:
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def hash_of(content) -> str:
    return hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def write_file(path: str, write) -> None:
    """Atomic write: `write(name)` fills a temporary file, which then replaces `path`, or the file
    that `path` links to. Devices and pipes are written to as they are.

    Raises UserError if that fails.
    """
    is_device = os.path.exists(path) and not os.path.isfile(path)
    target = path if is_device else os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    try:
        if is_device:
            write(target)
        else:
            os.makedirs(folder, exist_ok=True)
            write(temporary)
            os.replace(temporary, target)
    except (OSError, RuntimeError) as e:  # PyTorch's own writer raises RuntimeError on a full disk
        reason = getattr(e, "strerror", None) or f"{e}; is the disk full?"
        raise UserError(
            f"{path}: cannot be written ({reason}); name another place (for a cache: --cache)"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_json(content: dict, path: str) -> None:
    text = json.dumps(content, indent=1, allow_nan=False)
    write_file(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- shared by the scripts: pictures
PANEL = 380  # width of a panel of a sheet or plot, pixels


def save_picture(picture: Image.Image, path: str) -> None:
    write_file(path, lambda name: picture.save(name, "PNG", compress_level=3))


def sheet_of(rows: list[list[Image.Image]], margin: int = 10) -> Image.Image:
    """Pictures on white, row by row, in columns of one width."""
    rows = [row for row in rows if row]
    column = margin + max(picture.width for row in rows for picture in row)
    heights = [margin + max(picture.height for picture in row) for row in rows]
    width = margin + column * max(len(row) for row in rows)
    sheet = Image.new("RGB", (width, margin + sum(heights)), "white")
    y = margin
    for row, height in zip(rows, heights):
        for k, picture in enumerate(row):
            sheet.paste(picture, (margin + k * column, y))
        y += height
    return sheet


def plot(title: str, unit: str, right: float, top: float, curves: list) -> Image.Image:
    """A panel with axes from 0 to `right` and 0 to `top`. curves: (xs, ys, colour) of points."""
    left = 52
    upper = 30
    width = PANEL - 66
    height = 160
    picture = Image.new("RGB", (PANEL, upper + height + 30), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    draw.text((left, 8), f"{title}, by {unit}", "black", font)
    for share, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
        x = left + share * width
        y = upper + (1 - share) * height
        draw.line((left, y, left + width, y), "#dddddd")
        draw.text((left - 6, y), f"{share * top:.2g}", "black", font, "rm")
        draw.text((x, upper + height + 6), f"{share * right:.0f}", "black", font, anchor)
    for xs, ys, colour in curves:
        for x, y in zip(xs, ys):
            px = left + x / right * width
            py = upper + (1 - min(1, y / top)) * height
            draw.ellipse((px - 1.5, py - 1.5, px + 1.5, py + 1.5), colour)
    return picture


# ---------------------------------------------------------------- shared by the scripts: options
class Option(NamedTuple):
    """A line of a script's table of options."""

    name: str  # without the dashes
    type: Callable  # makes the value of the text; bool for a flag: --no-x sets `x` to False
    default: object
    help: str
    choices: tuple | None = None
    nargs: str | None = None  # "+" for one or more
    toy: object = None  # the default with --data toy, where it is another
    resume: bool = False  # whether --resume may change it
    least: float = 1  # of a number, or of the numbers of a list
    below: float = 1e9

    @property
    def key(self) -> str:
        return self.name.removeprefix("no-").replace("-", "_")

    def can_be(self, value) -> bool:
        """Whether a value, as a checkpoint keeps it, is one that the command line makes."""
        if self.type is bool:
            return isinstance(value, bool)
        try:
            fits = self.type(as_text(value)) == value
            return bool(fits) and (self.choices is None or value in self.choices)
        except Exception:  # a damaged or hostile file may hold anything
            return False


# The thresholds are section 2.1's, but for that of scenes.
DATA_OPTIONS = [
    Option("data", str, "toy", "toy, or a comma list of ade20k (or your own data),os,dtd"),
    Option("root", str, "data", "folder of ade20k/, os/, dtd/, toy/", resume=True),
    Option("cache", str, None, "for indexes and prepared labels (<root>/.cache)", resume=True),
    Option("min-images", int, 50, "keep objects, materials in so many images (own: all)", toy=20),
    Option("min-pixels", int, 50000, "keep objects of so many pixels (own: all)", toy=5000),
    Option("min-part-images", int, 20, "keep parts in so many images"),
    Option("min-scene-images", int, 10, "keep scenes of so many images"),
    Option("allow-broken", bool, False, "go on if over one file in twenty is broken", resume=True),
]
WORKERS_OPTION = Option(
    "workers", int, None, "processes that read images (one a core, at most 8)", resume=True, least=0
)


def levels_of(text: str) -> list[str]:
    levels = [level.strip() for level in text.split(",")]
    for level in levels:
        if level not in upernet.LEVELS:
            raise argparse.ArgumentTypeError(f"'{level}' is not one of {', '.join(upernet.LEVELS)}")
    return levels


def short_sides(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


LEVELS_OPTION = Option("levels", levels_of, None, f"comma list of {','.join(upernet.LEVELS)} (all)")
DEVICE_OPTIONS = [
    Option("compile", bool, False, "torch.compile the network", resume=True),
    Option("device", str, "auto", "cuda, mps, cpu, or cuda:1, ..", resume=True),
]


class Output:
    """A stream that outlives its reader: Ctrl-C in `train.py | tee log` ends tee too."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Parser(argparse.ArgumentParser):
    """Options from a table. A mistake is one line on stderr, and --help has a line an option."""

    def __init__(self, description: str, options: list[Option], usage: str = "%(prog)s [options]"):
        super().__init__(
            description=description,
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=31),
            usage=usage,
            argument_default=argparse.SUPPRESS,  # what is not given is not in the namespace
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.options = {option.key: option for option in options}
        for option in options:
            text = option.help
            defaults = []
            if option.type is not bool and option.default is not None:
                defaults.append(as_text(option.default))
            if option.toy is not None:
                defaults.append(f"toy {as_text(option.toy)}")
            if defaults:
                text += f" ({'; '.join(defaults)})"
            if option.type is bool:
                action = "store_false" if option.default else "store_true"
                self.add_argument(f"--{option.name}", dest=option.key, action=action, help=text)
            else:
                is_number = option.type in (int, float) and not option.choices
                self.add_argument(
                    f"--{option.name}",
                    type=option.type,
                    choices=option.choices,
                    nargs=option.nargs,
                    metavar="N" if is_number else None,
                    help=text,
                )

    def complete(
        self, given: dict, stored: dict | None = None, path: str | None = None
    ) -> argparse.Namespace:
        """All options: as given, else as `stored` in the checkpoint `path`, else the toy's default
        with --data toy, else the default. `folder` is where the data lie, `cache_folder` where the
        cache is, `minima` the thresholds of `build_vocabulary`. Raises UserError for numbers out of
        range, and for what is stored and no value of its option."""
        values = {key: value for key, value in (stored or {}).items() if value is not None}
        for key, option in self.options.items():
            if key in values and not option.can_be(values[key]):
                raise UserError(f"{path}: damaged, it holds no value of --{option.name}")
        values.update(given)
        is_toy = values.get("data", self.options["data"].default) == "toy"
        args = argparse.Namespace(**given)
        for key, option in self.options.items():
            default = option.default
            if is_toy and option.toy is not None:
                default = option.toy
            value = values.get(key, default)
            setattr(args, key, value)
            for number in value if isinstance(value, list) else [value]:
                if type(number) in (int, float) and not option.least <= number < option.below:
                    raise UserError(
                        f"--{option.name} {number}: from {option.least:g} on, and below "
                        f"{option.below:g}"
                    )
        args.folder = os.path.join(args.root, "toy") if is_toy else args.root
        args.cache_folder = args.cache or os.path.join(args.folder, ".cache")
        args.minima = {
            "min_images": args.min_images,
            "min_pixels": args.min_pixels,
            "min_part_images": args.min_part_images,
            "min_scene_images": args.min_scene_images,
        }
        return args

    def run(self, command, argv: list[str] | None) -> None:
        """Calls `command(self, options that argv names)`; what a user can mend becomes one line and
        status 2."""
        given = vars(self.parse_args(argv))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt from here on
        # Text that a terminal cannot show must not end a program.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        stdout = sys.stdout
        sys.stdout = Output(stdout or open(os.devnull, "w"))  # None: a closed one
        try:
            command(self, given)
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted\n")
        except (UserError, OSError, RuntimeError, MemoryError) as e:
            message = message_of(e)
            if message is None:
                raise
            # Readers ignore SIGTERM and may wait for one that was killed; PyTorch's handler would
            # complain of their end.
            readers = multiprocessing.active_children()
            if readers and hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for reader in readers:
                    reader.kill()
            self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")
        finally:
            sys.stdout = stdout
            if dist.is_initialized():
                time.sleep(0.1)  # PyTorch 2.4 may hang below while its threads still free tensors
                dist.destroy_process_group()

    def format_help(self) -> str:
        return re.sub(r"\n+(options:\n)?", "\n", super().format_help())

    def error(self, message: str):
        if is_main_process():
            self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")
        self.exit(2)


def as_text(value) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def message_of(error: Exception) -> str | None:
    """What to tell the user, or None for a mistake of the program's own."""
    text = str(error)
    if isinstance(error, UserError) or "UserError: " in text:
        # From a process that reads images it comes with the traceback.
        return text.rsplit("UserError: ", 1)[-1]
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        return (
            "out of memory; a lower --size, or --resume with a lower --batch-size and a higher "
            "--accumulate"
        )
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    killed = re.search(r"DataLoader worker.{0,40}", text)
    if killed:
        return f"a process that reads images was killed ({killed[0]}); perhaps take fewer --workers"
    if re.search("closed by peer|NCCL|DistBackendError", text + type(error).__name__):
        return "another process of this group has ended; its message says why"
    if re.search("InvalidCxxCompiler|C compiler|C\\+\\+ compiler", text + type(error).__name__):
        return "--compile: torch.compile needs a C++ compiler; install one, or leave --compile out"
    return None


def named_sources(data: str) -> list[str]:
    """The sources that --data names, in the order of DATA_SETS. UserError for other names."""
    known = list(dict.fromkeys(data_set.source for data_set in DATA_SETS))
    if data == "toy":
        return list(TOY_SOURCES)
    names = [name.strip() for name in data.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--data {data}: '{name}' is not one of toy, {', '.join(known)}")
    return [name for name in known if name in names]


def open_indexes(
    data: str,
    folder: str,
    cache: str,
    allow_broken: bool = False,
    workers: int | None = None,
    levels: list[str] | None = None,
) -> dict[str, Index]:
    """The index of every source that --data names and that labels some of the levels (default: all
    levels); makes the toy if it is missing. UserError if no source is left. The main process scans,
    all get the indexes."""
    return from_main_process(scan_sources, data, folder, cache, allow_broken, workers, levels)


def scan_sources(
    data: str,
    folder: str,
    cache: str,
    allow_broken: bool,
    workers: int | None,
    levels: list[str] | None,
) -> dict[str, Index]:
    """`open_indexes` in one process."""
    if data == "toy":
        root = os.path.dirname(folder)
        if os.path.isdir(os.path.join(root, "annotations")):
            raise UserError(f"--root {root}: holds data of your own; --data ade20k reads them")
        make_toy(folder)
    indexes = {}
    for source in named_sources(data):
        labelled = set()
        for data_set in DATA_SETS:
            if data_set.source == source:
                labelled.update(data_set.levels)
        if levels is None or labelled & set(levels):
            indexes[source] = scan(folder, source, cache, allow_broken, workers)
        else:
            print(f"{source}: labels none of {', '.join(levels)}, left out")
    if not indexes:
        raise UserError(f"--data {data}: labels none of {', '.join(levels)}; see --levels")
    return indexes


# ---------------------------------------------------------------- shared by the scripts: processes
# How long other processes wait for the first one's scan and split.
PATIENCE = datetime.timedelta(hours=2)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process prints and writes: the only one, or torchrun's first."""
    return rank() == 0


def join_processes() -> None:
    """Joins the processes that torchrun started, if any. From then on only the main one prints."""
    if processes() == 1:
        return
    # torchrun's store outlives a group that failed; a new one must not find the old one's
    # addresses.
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=processes(), timeout=PATIENCE
    )
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")


def pick_device(name: str) -> torch.device:
    """The device of --device, or under torchrun this process's GPU. UserError if there is none."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # set first, or every process opens a context on GPU 0
            index = int(os.environ.get("LOCAL_RANK", device.index or 0))
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--device {name}: not available ({reason})") from None
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision for --amp; None is off. auto: on CUDA bf16, on old GPUs fp16."""
    if name == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def autocast(device: torch.device, amp: torch.dtype | None):
    """The context in which a network runs in mixed precision, if any."""
    return torch.autocast(device.type, amp) if amp else contextlib.nullcontext()


def from_main_process(function, *arguments):
    """What `function(*arguments)` returns in the main process, in every process; if it raises
    there, all end."""
    result = [None]
    if is_main_process():
        try:
            result = [function(*arguments)]
        except Exception as e:
            result = [e]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        if not is_main_process():
            raise SystemExit(2)  # the main process says why
        raise result[0]
    return result[0]


def progress(items, title: str) -> tqdm:
    """The items, with a bar on the main process's terminal."""
    disable = None if is_main_process() else True  # None: shown on terminals alone
    return tqdm(items, title, unit=" images", disable=disable, leave=False)


def ignore_signals(*_) -> None:
    """For processes that read images: a signal to the group is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def default_workers() -> int:
    """One process a core, at most 8, the cores shared among this machine's processes."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, cores))


def loader(
    dataset: Dataset, first: int = 0, workers: int | None = None, pinned: bool = False
) -> DataLoader:
    """The items in their order, from `first` on, read ahead by `workers` processes."""
    if workers is None:
        workers = default_workers()
        if len(dataset) - first < 200:
            workers = 0  # to start processes takes longer
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, len(dataset)),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=pinned,
    )


# ---------------------------------------------------------------- the command
def command(parser: Parser, given: dict) -> None:
    args = parser.complete(given)
    indexes = open_indexes(
        args.data, args.folder, args.cache_folder, args.allow_broken, args.workers
    )
    vocabulary = build_vocabulary(indexes, args.minima)
    for source, index in indexes.items():
        height, width = index.sizes.double().median(dim=0).values.int().tolist()
        print(
            f"{source}: {len(index.images)} images in {index.folder} ({index.layout}), median "
            f"{width} x {height}"
        )
        for level, classes in class_pixels(index).items():
            names = vocabulary.get(level, ())
            unit = "images" if level in upernet.TAGS else "pixels"
            total = 0
            for name, images in classes.items():
                if has_class(vocabulary, level, name):
                    total += sum(images.values())
            what = "objects with parts" if level == "part" else "classes"
            text = f"{len(names)} {what}, {total:,} {unit} labelled: {first_of(names)}"
            if not classes:
                text = "no labels"
            elif not names:
                text = "no class is large enough: see the --min- options"
            print(f"  {level:9s}{text}")
            if level == "object" and index.data_set.own_table:
                for number, name in zip(index.names, names):
                    images = classes.get(name, {})
                    pixels = sum(images.values())
                    print(f"    {number:5d} {name:30s}{pixels:14,} pixels in {len(images)} images")
        if index.data_set.map_level == "object":
            print(f"  {unlabelled_share(index, vocabulary.get('object', []))}")
        for _, reason in index.broken:
            print(f"  set aside  {reason}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "Scans data sets: what is there, in which classes, and what is broken.",
        [*DATA_OPTIONS, WORKERS_OPTION],
    )
    parser.run(command, argv)


if __name__ == "__main__":
    main()
