"""Three sources of Broden+ (section 2.1): ADE20K, OpenSurfaces, DTD (without Pascal: ours); data of
your own; a toy.

    python datasets.py --data ade20k,os,dtd --root data   # scans: what is there, and what is broken

One record describes each data set: its files, how numbers are written in them, what they mean.
`scan` opens every file of a source once and keeps what it found, an `Index`. `build_vocabulary`
makes the class names of each level from the indexes. A `Source` is an index read with a vocabulary:
photos and labels. `TrainingBatches` reads the batches that train.py plans.
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
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import upernet
from upernet import UNLABELLED

PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")  # endings, in any case
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")  # the last two to refuse them
HIGHEST_NUMBER = 65535  # of a class in a label picture
TEXTURE_SIZE = 64  # side of the close-ups' squares, see `freeze` in train.py
SEED = 304  # of the toy's files and of every split; --seed is about training
# Photos of 89 to 179 megapixels are fine; beyond, Pillow raises an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UserError(ValueError):
    """A mistake that the user can mend: scripts print it as one line and exit with status 2."""


# ---------------------------------------------------------------- what is known of each data set
class Entry(NamedTuple):
    """One image of a data set and its files: paths in the data set's folder, "" for none."""

    image: str
    official: str = ""  # its side of the official split: "train", "val", "test" or ""
    tag: str = ""  # scene or texture, where that is known without opening a file
    labels: str = ""
    parts: str = ""
    json: str = ""


class DataSet(NamedTuple):
    """What is known of a data set. A new one is a record like those below, listed in DATA_SETS."""

    name: str  # of the layout
    source: str  # what --data calls it
    folders: tuple  # where it may lie below --root, as glob patterns
    marker: str  # a file or folder that only its folder has
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
    fixed_table: bool = False  # whether `table` is the vocabulary as it is: no thresholds
    own: bool = False  # whether messages may advise on classes.txt and images/validation/
    same_size: bool = True  # whether label pictures have their photo's size
    close_ups: bool = False  # of textures: squares of TEXTURE_SIZE, trained on last
    has_official: bool = True  # whether it comes with a split


SIDES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def side_of(folder):
    """ "train", "val" or "test" for a folder's name such as training, valid or train2017; or ""."""
    return SIDES.get(re.sub(r"\d{4}$", "", folder.lower()), "")


def without_ending(path):
    return os.path.splitext(path)[0]


def read_lines(*path):
    """The lines of a text file, UTF-8 or Latin-1."""
    content = Path(*path).read_bytes()
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return content.decode("latin-1").splitlines()


NO_SCENE = ("misc", "unknown", "none", "~not labeled")  # names of scenes that are none


# ADE20K_2021_17_01 (Zhou et al., CVPR 2017): scenes, objects and their parts.
def ade20k_entries(folder, paths):
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


def ade20k_numbers(picture):
    channels = np.asarray(picture.convert("RGB")).astype(np.int32)
    return channels[..., 0] // 10 * 256 + channels[..., 1]


def ade20k_annotation(folder, entry):
    content = json.loads("\n".join(read_lines(folder, entry.json)))["annotation"]
    scenes = [scene for scene in content["scene"] if scene]  # from broad to fine
    tag = scenes[-1].strip().lower() if scenes else ""
    if tag in NO_SCENE:
        tag = ""
    names = {int(thing["name_ndx"]): str(thing["name"]) for thing in content["object"]}
    return tag, names


def ade20k_names(index):
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
    folders=("", "ade20k", "ade20k/*"),
    marker="images/ADE",
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
def own_entries(folder, paths):
    """images/../NAME.jpg with annotations/../NAME.png, below training/, validation/ or not."""
    masks = {}
    for path in paths:
        if path.startswith("annotations/") and path.lower().endswith(MASKS):
            stem = without_ending(path)
            if stem in masks:
                raise UserError(f"{folder}: two masks of one name, {masks[stem]} and {path}")
            masks[stem] = path
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
    alone = sorted(set(masks.values()) - {entry.labels for entry in entries})
    if alone:
        warn(f"{folder}: masks without a photo of their name: {len(alone)}, first {alone[0]}")
    return entries


def own_numbers(picture):
    if picture.format == "JPEG":
        raise ValueError("a JPEG, whose compression changes the numbers; export masks as PNG")
    if getattr(picture, "n_frames", 1) > 1:
        raise ValueError("several pages; save one mask a file")
    if picture.mode == "F":
        raise ValueError("floating-point numbers; save class numbers as integers")
    if picture.mode == "P":
        check_palette(picture)
    if picture.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
        return np.asarray(picture).astype(np.int32)
    channels = np.asarray(picture.convert("RGB")).astype(np.int32)
    if (channels != channels[..., :1]).any():
        raise ValueError("a mask in colours; write each colour's class number, in one channel")
    return channels[..., 0]


def check_palette(picture):
    """Raises ValueError for a palette of greys other than their indices: either could be meant."""
    used = np.unique(np.asarray(picture))
    palette = np.array(picture.getpalette()).reshape(-1, 3)[: used.max() + 1]
    is_grey = (palette == palette[:, :1]).all()
    grey = palette[used, 0]
    if is_grey and (grey != used).any():
        raise ValueError(
            f"a palette of greys: are its numbers {listed(used)} or {listed(grey)}? Save it as "
            "greyscale, without a palette"
        )


def read_object_info(folder):
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


def read_classes(folder):
    """classes.txt: a number and a name a line, or names alone, whose numbers are 1, 2, ..; lines
    that begin with # are comments."""
    path = os.path.join(folder, "classes.txt")
    lines = [line.strip() for line in read_lines(path)]
    lines = "\n".join(line for line in lines if not line.startswith("#")).strip().split("\n")
    table = {}
    unnumbered = []
    for line in lines:
        match = re.fullmatch(r"(\d+)[\s,:;=.)]+(\S.*)", line)
        if match and (int(match[1]) in table or int(match[1]) > HIGHEST_NUMBER):
            raise UserError(f"{path}: number {match[1]} occurs twice, or is above {HIGHEST_NUMBER}")
        if match:
            table[int(match[1])] = match[2]
        elif line:
            unnumbered.append(line)
    if table and unnumbered:
        raise UserError(f"{path}: '{unnumbered[0]}' has no number, other lines have")
    if table:
        return dict(sorted(table.items()))
    ends = [re.search(r"([\s,;])(\d+)$", line) for line in lines]
    expected = [(" ", str(k)) for k in range(1, len(lines) + 1)]  # "class 1", "class 2", ..
    if all(ends) and [match.groups() for match in ends] != expected:
        raise UserError(f"{path}: '{lines[0]}': write the number first, then the name")
    if "" in lines:
        raise UserError(f"{path}: has no name, or an empty line among names without numbers")
    return dict(enumerate(lines, start=1))


OWN_VOID = (0, 255, 65535)


def own_class_table(folder, numbers):
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


def classes_advice(numbers):
    """How to say which of the numbers in masks are classes."""
    lowest = min(numbers, default=0)
    highest = max(lowest + 1, max(numbers, default=1))
    example = f"{lowest} background, {highest} object"
    return f"name them in classes.txt, a number and a name a line ({example})"


def fixed_names(index):
    """The scenes that occur, and the data set's own table of objects as it is."""
    distinct = upernet.distinct(index.names.values())
    tags = {tag: tag for tag in index.tags if tag}
    return {"scene": tags, "object": dict(zip(index.names, distinct))}


SCENE_PARSING = DataSet(
    name="sceneparsing",
    source="ade20k",
    folders=("", "ade20k", "ade20k/*"),  # your own need no folder around them
    marker="annotations",
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
    names_by_level=fixed_names,
    void=OWN_VOID,
    fixed_table=True,
    own=True,
)


# OpenSurfaces release 0 after its own script (Bell et al., SIGGRAPH 2013): materials.
def opensurfaces_entries(folder, paths):
    """photos/ID.jpg with photos-labels/ID.png, if it has labels."""
    present = set(paths)
    entries = []
    for path in paths:
        if path.startswith("photos/") and path.lower().endswith(PHOTOS):
            labels = without_ending(path.replace("photos", "photos-labels", 1)) + ".png"
            entries.append(Entry(path, labels=labels if labels in present else ""))
    return entries


def opensurfaces_numbers(picture):
    red = np.asarray(picture.convert("RGB"))[..., 0]  # green: objects, blue: scenes
    return red.astype(np.int32)


def opensurfaces_table(folder, numbers):
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


def opensurfaces_names(index):
    materials = {}
    for number, name in index.names.items():
        plain = re.sub("[^a-z]+", " ", name.lower()).strip()
        if plain in MATERIALS:
            materials[number] = MATERIALS[plain]
    return {"material": materials}


OPEN_SURFACES = DataSet(
    name="os",
    source="os",
    folders=("os", "os/*", "opensurfaces", "opensurfaces/*"),
    marker="photos-labels",
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
def dtd_entries(folder, paths):
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


def dtd_names(index):
    return {"texture": {tag: tag for tag in index.tags if tag}}


DTD = DataSet(
    name="dtd",
    source="dtd",
    folders=("dtd", "dtd/*"),
    marker="labels/train1.txt",
    contents=("images", "labels"),
    levels=("texture",),
    tag_level="texture",
    entries=dtd_entries,
    names_by_level=dtd_names,
    close_ups=True,
)

DATA_SETS = [ADE20K_2021, SCENE_PARSING, OPEN_SURFACES, DTD]


# ---------------------------------------------------------------- similar names (section 2.1)
def merged_names(names: dict[int, str], parts: bool = False) -> dict[int, str]:
    """Number -> class name, similar names merged by rule (ours; the released code has tables).

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


def singular(name, forms):
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
    official: list[str]  # "train", "val", "test" or "" for each image
    tags: list[str]  # the scene or texture of each image, "" for none
    pixels: torch.Tensor  # (rows, 4): image, class number, part number (0: all of it), pixels
    names: dict[int, str]  # of classes and parts, by number
    broken: list[list[str]]  # [path, reason] of the images that were set aside

    @property
    def content(self) -> str:
        """A hash of what a resumed run has to find again."""
        return hash_of([self.images, self.names])

    @property
    def data_set(self) -> DataSet:
        return next(data_set for data_set in DATA_SETS if data_set.name == self.layout)


def open_indexes(
    data: str,
    folder: str,
    cache: str,
    workers: int | None = None,
    levels: list[str] | None = None,
    own_names: dict[int, str] | None = None,
) -> dict[str, Index]:
    """The index of every source that --data names and that labels some of the levels (default:
    all); makes the toy if it is missing. UserError if there is none.

    own_names: classes of your own data where they have no classes.txt.
    """
    if data == "toy":
        make_toy(folder)
    wanted = set(levels or upernet.LEVELS)
    indexes = {}
    for source in named_sources(data):
        if any(wanted & set(d.levels) for d in DATA_SETS if d.source == source):
            indexes[source] = scan(folder, source, cache, workers, own_names)
    if not indexes:
        raise UserError(f"--data {data}: labels none of --levels")
    return indexes


def named_sources(data):
    """The sources that --data names, in the order of DATA_SETS. UserError for other names."""
    known = list(dict.fromkeys(data_set.source for data_set in DATA_SETS))
    if data == "toy":
        return list(TOY_SOURCES)
    names = [name.strip() for name in data.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--data {data}: '{name}' is not one of toy, {', '.join(known)}")
    return [name for name in known if name in names]


def scan(
    root: str,
    source: str,
    cache: str,
    workers: int | None = None,
    own_names: dict[int, str] | None = None,
) -> Index:
    """The index of a source: from the cache unless a file was added, removed or changed, else by
    opening every file, in `workers` processes.

    Raises UserError if it is missing, or over one file in twenty is broken, or its masks and its
    table of classes do not fit.
    """
    data_set, folder = find_folder(root, source)
    stats = list_files(folder, data_set.contents)
    fingerprint = hash_of([data_set.name, sorted(stats.items())])
    path = os.path.join(cache, f"{source}.index.pt")
    index = read_index(path, folder, fingerprint)
    if index is None:
        index = open_files(data_set, folder, sorted(stats), workers)
        index = index._replace(fingerprint=fingerprint)
        write_file(path, functools.partial(torch.save, index._asdict()))
        # Labels prepared from an earlier state of the data.
        for prepared in Path(cache).glob(f"{source}-" + 16 * "[0-9a-f]"):
            if not prepared.name.startswith(f"{source}-{fingerprint[:8]}"):
                shutil.rmtree(prepared, ignore_errors=True)
    check_broken(index)
    if own_names and data_set.own and not stats.keys() & {"classes.txt", "objectInfo150.txt"}:
        index = index._replace(names=own_names)
    elif data_set.table:
        numbers = set(index.pixels[:, 1].tolist())
        index = index._replace(names=data_set.table(folder, numbers))
    check_numbers(index)
    return index


def find_folder(root, source):
    """(data set, folder) of a source below `root`. Raises UserError for none, and for two."""
    candidates = [data_set for data_set in DATA_SETS if data_set.source == source]
    tried = []
    matches = []
    for data_set in candidates:
        for pattern in data_set.folders:
            for folder in sorted(glob.glob(os.path.join(glob.escape(root), pattern))):
                folder = folder.rstrip("/")
                tried.append(folder)
                if os.path.exists(os.path.join(folder, data_set.marker)):
                    matches.append((data_set, folder))
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"{source}: two data sets, {matches[0][1]} and {matches[1][1]}; move one away, or name "
            "one with --root"
        )
    markers = " or ".join(data_set.marker for data_set in candidates)
    patterns = []
    for data_set in candidates:
        patterns += data_set.folders
    where = ", ".join(os.path.join(root, pattern) for pattern in dict.fromkeys(patterns))
    advice = hint(tried) if any(data_set.own for data_set in candidates) else ""
    raise UserError(f"{source}: no {markers} in {where}; see --root, --data{advice}")


# Folders of other layouts, and how to make ours of them.
OTHER_LAYOUTS = {
    "masks": "rename masks/ to annotations/, beside images/",
    "leftImg8bit": "Cityscapes: move photos to images/, masks to annotations/, by one name",
    "JPEGImages": "VOC: rename JPEGImages/ to images/ and SegmentationClass/ to annotations/",
    "labels": "rename labels/ to annotations/, beside images/",
    "index_ade20k.mat": "2016_07_26 has its names in a MATLAB file; get ADE20K_2021_17_01 instead",
}


def hint(folders):
    """What to do with the data that are there, if they have a layout that people often have."""
    for folder in folders:
        for name, advice in OTHER_LAYOUTS.items():
            if os.path.exists(os.path.join(folder, name)):
                return f"; {folder} has {name}: {advice}"
    return ""


def list_files(folder, contents):
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


def read_index(path, folder, fingerprint):
    """The index in the cache, or None if it is missing, damaged, or of other files."""
    try:
        stored = torch.load(path, weights_only=True)
        index = Index(**{**stored, "folder": folder})
        return index if index.fingerprint == fingerprint else None
    except Exception:  # whatever a damaged file makes of the reader
        return None


def open_files(data_set, folder, paths, workers):
    """Opens all files of a data set."""
    entries = data_set.entries(folder, paths)
    if not entries:
        raise UserError(
            f"{folder}: has {data_set.marker}, but no photo below {data_set.contents[0]}/"
        )
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
    return Index(
        source=data_set.source,
        layout=data_set.name,
        folder=folder,
        fingerprint="",
        images=[entry.image for entry in kept],
        labels=[entry.labels for entry in kept],
        parts=[entry.parts for entry in kept],
        sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        official=[entry.official for entry in kept],
        tags=[entry.tag for entry in kept],
        pixels=torch.tensor(pixels, dtype=torch.int64).reshape(-1, 4),
        names=names,
        broken=broken,
    )


@dataclasses.dataclass
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
        data_set = self.data_set
        current = entry.image
        try:
            size = photo_size(os.path.join(self.folder, entry.image))
            tag = entry.tag
            names = {}
            if data_set.annotation:
                current = entry.json
                tag, names = data_set.annotation(self.folder, entry)
            pixels = []
            if entry.labels:
                current = entry.labels
                path = os.path.join(self.folder, entry.labels)
                labels = label_numbers(data_set, path, size if data_set.same_size else None)
                counts = np.bincount(labels.ravel())
                for number in np.flatnonzero(counts):
                    pixels.append((int(number), 0, int(counts[number])))
            if entry.parts:
                current = entry.parts
                parts = label_numbers(data_set, os.path.join(self.folder, entry.parts), size)
                both = (parts > 0) & (labels > 0)
                pairs = labels[both].astype(np.int64) << 16 | parts[both]
                for pair, count in zip(*np.unique(pairs, return_counts=True)):
                    pixels.append((int(pair >> 16), int(pair & 0xFFFF), int(count)))
            return {"broken": "", "size": size, "tag": tag, "names": names, "pixels": pixels}
        except Exception as e:  # whatever a decoder makes of a damaged file
            return {"broken": f"{current}: {reason_of(e)}"}


def photo_size(path):
    """(height, width) of a photo, turned as its EXIF data say. Reads all of the file, so that
    damage shows; JPEGs at an eighth of their size."""
    with Image.open(path) as photo:
        if photo.format != "JPEG":
            photo = upernet.rgb_photo(photo)
            return photo.height, photo.width
        width, height = photo.size
        turned = photo.getexif().get(0x0112, 1) > 4  # the tag of the orientation
        photo.draft("RGB", (1, 1))
        photo.load()
        return (width, height) if turned else (height, width)


def reason_of(error):
    """Why a file cannot be used, on one line."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, KeyError):
        return f"has no {error}"
    return " ".join(str(error).split()) or type(error).__name__


def label_numbers(data_set, path, size=None):
    """Class numbers (H, W) int32 of a label picture.

    Raises ValueError if its (height, width) is not `size`, and for numbers that are none.
    """
    with Image.open(path) as picture:
        width, height = picture.size
        if size and (height, width) != size:
            raise ValueError(
                f"{width} x {height} pixels, its photo {size[1]} x {size[0]}; turn it as the "
                "photo's EXIF data say, or resize it with the nearest neighbour"
            )
        numbers = data_set.numbers(picture)
    if numbers.min() < 0 or numbers.max() > HIGHEST_NUMBER:
        raise ValueError(f"class numbers from {numbers.min()} to {numbers.max()}, not 0..65535")
    return numbers


def check_broken(index):
    """UserError if more than one image in twenty was set aside, a warning if any was."""
    if not index.broken:
        return
    total = len(index.images) + len(index.broken)
    message = f"{index.source}: {len(index.broken)} of {total} images set aside, the first: "
    message += index.broken[0][1]
    if len(index.broken) > 0.05 * total:
        raise UserError(f"{message}; over one in twenty: mend them, or move them away")
    warn(message)


VOID_NAMES = ("void", "ignore", "ignored", "unlabelled", "unlabeled")


def check_numbers(index):
    """Warns of numbers without a name; in your own data of classes without a pixel and of those
    named void. UserError if no mask of your own has a class."""
    numbers = set(index.pixels[:, 1].tolist())
    parts = set(index.pixels[:, 2].tolist()) - {0}  # 0: rows of whole objects
    unknown = (numbers | parts) - index.names.keys() - set(index.data_set.void)
    if unknown:
        warn(f"{index.source}: numbers without a name, unlabelled: {listed(sorted(unknown))}")
    if not index.data_set.own:
        return
    if not numbers & index.names.keys() and not any(index.tags):
        raise UserError(
            f"{index.folder}: no mask has a class of {listed(index.names) or '1, 2, ..'}, only "
            f"the numbers {listed(sorted(numbers))}; {classes_advice(numbers)}"
        )
    void = [name for name in index.names.values() if name.lower() in VOID_NAMES]
    if void:
        warn(
            f"{index.source}: {listed(void)} will be learned as a class; to leave its pixels "
            "unlabelled take its line out of classes.txt"
        )
    unused = [name for number, name in index.names.items() if number not in numbers]
    if unused:
        message = f"{index.source}: no pixel of {listed(unused)}"
        if 0 in numbers - index.names.keys():
            message += f"; do your numbers start at 0? Then {classes_advice(numbers)}"
        warn(message)


def listed(items):
    """The first nine of several things, as text."""
    items = list(items)
    more = [".."] if len(items) > 9 else []
    return ", ".join([str(item) for item in items[:9]] + more)


def unlabelled_share(index, objects):
    """What share of the pixels has none of the classes `objects`, a sentence; of your own data with
    what that means where they are 0."""
    names = index.data_set.names_by_level(index)["object"]
    labelled = [number for number, name in names.items() if name in objects]
    whole = index.pixels[index.pixels[:, 2] == 0]
    without = whole[~torch.isin(whole[:, 1], torch.tensor(labelled))]
    share = int(without[:, 3].sum()) / max(1, int(whole[:, 3].sum()))
    numbers = without[:, 1].unique().tolist()
    text = f"{index.source}: {share:.1%} of the pixels are unlabelled"
    if numbers:
        text += f" (numbers {listed(numbers)}), neither learned nor evaluated"
    if index.data_set.own and 0 in numbers:
        text += f"; if 0 is a class, such as background, {classes_advice(whole[:, 1].tolist())}"
    return text


# ---------------------------------------------------------------- the vocabulary (section 2.1)
def class_pixels(index: Index, vocabulary: dict | None = None) -> dict[str, dict]:
    """Level -> class -> {image: pixels}, after merging, of the classes of a vocabulary or of all. A
    class of part is (object, part). Scenes and textures, which have no pixels, count one for each
    image."""
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
    if vocabulary is not None:
        for level, classes in table.items():
            known = set(vocabulary.get(level, ()))
            if level == "part":
                parts = vocabulary.get("part", {})
                known = {(owner, part) for owner in parts for part in parts[owner]}
            table[level] = {name: classes[name] for name in classes if name in known}
    return table


THRESHOLDS = {
    "min_images": 50,  # of an object or a material
    "min_pixels": 50_000,  # of an object
    "min_part_images": 20,
    "min_scene_images": 10,  # ours
}


def build_vocabulary(
    indexes: dict[str, Index],
    thresholds: dict[str, int] = THRESHOLDS,
    levels: tuple = upernet.LEVELS,
) -> dict:
    """Level -> class names (part: object -> part names, "background" first).

    Section 2.1: objects in at least 50 images with at least 50,000 pixels; parts of an object in at
    least 20 images; materials in at least 50 images; all textures. Ours: scenes in at least 10, not
    mapped to Places; no class for the background of objects and materials; objects and parts in the
    order of their size, the others in that of the alphabet. A fixed table
    of classes (SceneParsing, your own) is taken as it is. Raises UserError for two sources of one
    level, and, if `levels` has object, for a fixed table of which fewer than two classes have
    pixels.
    """
    least = {
        "scene": thresholds["min_scene_images"],
        "object": thresholds["min_images"],
        "part": thresholds["min_part_images"],
        "material": thresholds["min_images"],
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
            if level == "object" and index.data_set.fixed_table:
                kept = list(index.data_set.names_by_level(index)["object"].values())
                if "object" in levels and len(pixels) < 2:
                    message = f"{index.folder}: fewer than two classes have pixels"
                    if index.data_set.own:
                        advice = classes_advice(index.pixels[:, 1].tolist())
                        message += f"; background is one too: {advice}"
                    raise UserError(message)
            elif level == "object":
                kept = [name for name in kept if pixels[name] >= thresholds["min_pixels"]]
                kept.sort(key=lambda name: -pixels[name])
            elif level == "part":
                kept.sort(key=lambda name: -pixels[name])
                kept = parts_by_object(kept, vocabulary["object"])
            vocabulary[level] = kept
    return {level: names for level, names in vocabulary.items() if names}


def parts_by_object(pairs, objects):
    """Object -> its parts, "background" first, of (object, part) pairs, for objects with any."""
    parts = {name: ["background"] for name in objects}
    for name, part in pairs:
        if name in parts and part != "background":
            parts[name].append(part)
    return {name: names for name, names in parts.items() if len(names) > 1}


# ---------------------------------------------------------------- photos and labels
def open_photo(path: str, box: tuple[int, int] | None = None) -> Image.Image:
    """A photo of any mode in RGB, see `upernet.rgb_photo`; with a `box` of (width, height) perhaps
    reduced, but to no less than the box. Raises UserError with its name if it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", box or picture.size)  # libjpeg decodes at 1/2, 1/4 or 1/8
            return upernet.rgb_photo(picture)
    except Exception as e:  # whatever a decoder makes of a damaged file
        raise UserError(f"{path}: cannot be read as a photo ({reason_of(e)})") from None


class Source:
    """An index read with a vocabulary: `photo(i)` and `labels(i)`, as class indices.

    names: level -> {number or tag in the source's files: class name}, by default the data set's
        own.
    validation: paths of the images that validate; `only_train`: of the others only those of the
        official training side train.
    cache, largest: where label maps are kept prepared for training, at its largest size, (short,
        longest side).
    `levels` are those of the data set of which the vocabulary has classes, `training` and
    `validation` the numbers of the images that have a label of these.
    """

    def __init__(
        self,
        index: Index,
        vocabulary: dict,
        names: dict | None = None,
        validation: list[str] = [],
        only_train: bool = False,
        cache: str = "",
        largest: tuple[int, int] = (600, 1200),
    ):
        self.index = index
        self.data_set = index.data_set
        self.largest = largest
        if names is None:
            names = self.data_set.names_by_level(index)
        self.tag_level = self.data_set.tag_level
        self.map_level = self.data_set.map_level
        tags = lookup(names, vocabulary, self.tag_level)
        classes = lookup(names, vocabulary, self.map_level)
        self.tags = [tags.get(tag, UNLABELLED) for tag in index.tags]
        # Number in the files -> class index, -1 for none.
        self.class_of = np.full(HIGHEST_NUMBER + 1, UNLABELLED, np.int16)
        self.class_of[list(classes)] = list(classes.values())
        self.part_of = part_table(names.get("part", {}), vocabulary)
        has_classes = {
            self.tag_level: bool(tags),
            self.map_level: bool(classes),
            "part": bool(self.part_of.any()),
        }
        self.levels = [level for level in self.data_set.levels if has_classes[level]]

        labelled = np.array(self.tags) >= 0
        rows = index.pixels.numpy()
        labelled[rows[self.class_of[rows[:, 1]] >= 0, 0]] = True
        self.training = []
        self.validation = []
        validates = set(validation)
        only_train = only_train and self.data_set.has_official
        for i in np.flatnonzero(labelled).tolist():
            if index.images[i] in validates:
                self.validation.append(i)
            elif not only_train or index.official[i] == "train":
                self.training.append(i)
        if not labelled.all():
            print(f"{index.source}: {(~labelled).sum()} images without a label are left out")

        content = [largest] + [(level, vocabulary[level]) for level in self.levels]
        fingerprint = index.fingerprint[:8] + hash_of(content)[:8]
        self.prepared_folder = os.path.join(cache, f"{index.source}-{fingerprint}")

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
            size = upernet.resized(self.index.sizes[i].tolist(), *self.largest)
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


def lookup(names, vocabulary, level):
    """Number or tag in a source's files -> class index, for the classes of a level."""
    position = {name: k for k, name in enumerate(vocabulary.get(level, ()))}
    level_names = names.get(level, {})
    return {key: position[name] for key, name in level_names.items() if name in position}


def part_table(names, vocabulary):
    """(class index, number in the files) -> index in the object's list of parts: uint8 (classes +
    1, numbers), whose last row serves class -1. 0, background, for none and for parts that the
    list lacks."""
    objects = vocabulary.get("object", ())
    table = np.zeros((len(objects) + 1, HIGHEST_NUMBER + 1), np.uint8)
    for owner, parts in vocabulary.get("part", {}).items():
        positions = lookup({"part": names}, {"part": parts}, "part")
        table[objects.index(owner), list(positions)] = list(positions.values())
    return table


def write_prepared(labels, size, path):
    """Writes a label map, made smaller if `size` is, as a picture."""
    height = min(size[0], labels.shape[0])
    width = min(size[1], labels.shape[1])
    # Each pixel's label is the one at its centre.
    rows = (2 * np.arange(height) + 1) * labels.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * labels.shape[1] // (2 * width)
    picture = Image.fromarray(labels[rows[:, None], columns])
    write_file(path, lambda name: picture.save(name, "PNG", compress_level=1))


def read_prepared(path):
    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except (OSError, SyntaxError, ValueError) as e:  # Pillow's errors for broken PNG chunks
        raise UserError(f"{path}: a damaged label map ({e}); delete it") from None


# ---------------------------------------------------------------- names of released networks
def released_names(labels, index, vocabulary):
    """The names of a source for a released network, as its data set's `names_by_level`.

    Without a folder `labels`, SceneParsing's numbers are its classes; the authors'
    label_assignment.csv maps the numbers and scenes of ADE20K 2021, and OpenSurfaces'. None for
    textures.
    """
    if index.data_set.close_ups:
        return None
    has_tables = labels is not None and os.path.isdir(labels)
    if has_tables == index.data_set.fixed_table:
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


def assigned_names(path, index, vocabulary):
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
            print(f"{index.source}: scenes unknown to the network: {listed(unknown)}")
    return names


def plain_scene(name):
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


# ---------------------------------------------------------------- batches (section 3.1)
class Plan(NamedTuple):
    """What every iteration of a stage trains on."""

    sources: np.ndarray  # (iterations,): a position in the list of sources
    images: np.ndarray  # (iterations, batches of a step, processes, images of a batch): numbers


class Batch(NamedTuple):
    """Images of one source and their labels: NumPy arrays, which pass from the processes that read
    them through pipes (tensors take shared memory, which containers have little of)."""

    source: str
    files: list[str]
    images: np.ndarray  # (N, 3, H, W) uint8, H and W multiples of 32
    labels: dict[str, np.ndarray]  # of the source's levels as in `upernet.losses`, small integers


class Sample(NamedTuple):
    """One image of a batch: where the window of the batch lies in the photo, resized to `size`."""

    photo: Image.Image
    labels: dict[str, np.ndarray]
    size: tuple[int, int]  # (height, width)
    top: int = 0
    left: int = 0


@dataclasses.dataclass
class TrainingBatches(Dataset):
    """The batches of one stage for one process. Section 3.1: the images of a batch have one
    orientation (see `image_groups` in train.py) and are padded right and below to one size, a
    multiple of 32, with the mean colour (`upernet.padded_image`) and without labels
    (`quarter_labels`).

    Batch k depends on the plan and the seed alone, so that neither the number of workers nor a
    pause changes it.
    """

    sources: list[Source]  # those that `plan` names by their positions
    plan: Plan
    sizes: list[int]  # short sides, of which each iteration draws one (with `crop` each image)
    longest: int  # no long side is above it, but with `crop`
    seed: int
    # Side of squares cut from the images, 0 for whole images. Without `sizes` these have short
    # sides of half to twice that.
    crop: int = 0
    flip: bool = True  # whether half of the images are mirrored
    rank: int = 0  # each process takes its share of every batch

    @property
    def iterations(self) -> int:
        return self.plan.images.shape[0]

    @property
    def accumulate(self) -> int:
        return self.plan.images.shape[1]

    def __len__(self) -> int:
        return self.iterations * self.accumulate

    def __getitem__(self, k: int) -> Batch:
        _, _, processes, n = self.plan.images.shape
        iteration, batch_of_step = divmod(k, self.accumulate)
        source = self.sources[self.plan.sources[iteration]]
        images = self.plan.images[iteration, batch_of_step, self.rank].tolist()
        first = (batch_of_step * processes + self.rank) * n  # of the images of the whole step

        short = 0
        if self.sizes and not self.crop:
            # Section 3.1 draws a short side for each image; ours: one for all of an iteration, to
            # pad less.
            short = int(np.random.default_rng((self.seed, iteration, 0)).choice(self.sizes))
        samples = []
        for place, i in enumerate(images, start=first + 1):
            rng = np.random.default_rng((self.seed, iteration, place))
            if source.data_set.close_ups:
                samples.append(self.close_up(source, i, rng))
            else:
                samples.append(self.sample(source, i, short, rng))

        if self.crop and not source.data_set.close_ups:
            height = width = self.crop
        else:
            height = upernet.pad_to_32(max(sample.size[0] for sample in samples))
            width = upernet.pad_to_32(max(sample.size[1] for sample in samples))
        pixels = []
        for s in samples:
            pixels.append(upernet.padded_image(s.photo, s.size, height, width, s.top, s.left))
        labels = {}
        if source.tag_level in source.levels:
            labels[source.tag_level] = np.array([source.tags[i] for i in images], np.int16)
        for level in samples[0].labels:
            maps = [quarter_labels(sample, level, height, width) for sample in samples]
            labels[level] = np.stack(maps)
        files = [source.index.images[i] for i in images]
        return Batch(source.index.source, files, np.stack(pixels), labels)

    def sample(self, source: Source, i: int, short: int, rng: np.random.Generator) -> Sample:
        """Image i at the short side `short` (section 3.1), or with `crop` a window of it at a
        random size (other code bases' augmentation); half of the time mirrored (in the authors'
        code, not in the paper)."""
        longest = self.longest
        if self.crop:
            short = round(self.crop * rng.uniform(0.5, 2))
            if self.sizes:
                short = int(rng.choice(self.sizes))
            longest = 4 * short
        size = upernet.resized(source.index.sizes[i].tolist(), short, longest)
        labels = {}
        if source.map_level in source.levels:
            labels = source.prepared(i)
        sample = self.mirrored(Sample(source.photo(i, box=size[::-1]), labels, size), rng)
        if self.crop:
            sample = varied_window(sample, source.map_level, self.crop, rng)
        return sample

    def close_up(self, source: Source, i: int, rng: np.random.Generator) -> Sample:
        """Image i at a short side of TEXTURE_SIZE, cut to a random square; half of the time
        mirrored (both ours)."""
        photo = texture_square(source, i, place=rng.random())
        return self.mirrored(Sample(photo, {}, (TEXTURE_SIZE, TEXTURE_SIZE)), rng)

    def mirrored(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample, or its mirror image."""
        if not self.flip or rng.random() >= 0.5:
            return sample
        photo = sample.photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        labels = {level: values[:, ::-1] for level, values in sample.labels.items()}
        return sample._replace(photo=photo, labels=labels)


def varied_window(sample, level, side, rng):
    """A random window of the sample. Of up to ten the first whose commonest class has less than
    three quarters of the labelled cells, else the one where it has least (mmsegmentation's rule for
    ADE20K); it doubles as sampling of rare classes."""
    best = sample
    least = math.inf
    for _ in range(10):
        top = int(rng.integers(0, max(0, sample.size[0] - side) + 1))
        left = int(rng.integers(0, max(0, sample.size[1] - side) + 1))
        window = sample._replace(top=top, left=left)
        if level not in sample.labels:
            return window
        cells = quarter_labels(window, level, side, side)
        counts = np.bincount(cells[cells >= 0], minlength=1)
        share = counts.max() / max(1, counts.sum())
        if counts.sum() == 0:
            share = 1.0
        if share < least:
            best = window
            least = share
        if least < 0.75:
            break
    return best


def quarter_labels(sample, level, height, width):
    """A level's labels for a window of (height, width), at a quarter of it: each cell's label is
    the one at its centre; in the padding unlabelled (part: 0). The label map may have another size
    than the photo, see `Source.prepared`.
    """
    labels = sample.labels[level]
    h, w = sample.size
    rows = centres(min(h - sample.top, height), sample.top, h, labels.shape[0])
    columns = centres(min(w - sample.left, width), sample.left, w, labels.shape[1])
    padding = 0 if level == "part" else UNLABELLED  # no object there has a part
    quarter = np.full((height // 4, width // 4), padding, labels.dtype)
    quarter[: len(rows), : len(columns)] = labels[rows[:, None], columns]
    return quarter


def centres(n, start, full, label_rows):
    """The rows of a label map at the centres of the cells of 4 rows in a window of a photo.

    The window has the photo's rows `start` to `start + n`; the photo has `full` rows, its label map
    `label_rows`. For n = 12, start = 100 and a label map of the photo's size: 102, 106, 110.
    """
    cells = math.ceil((n - 2) / 4)  # those whose centre lies in the window
    centre = start + 4 * np.arange(cells) + 2
    return centre * label_rows // full


def texture_square(source, i, place):
    """Image i at a short side of TEXTURE_SIZE, cut to a square at `place` (0 to 1)."""
    side = (TEXTURE_SIZE, TEXTURE_SIZE)
    photo = source.photo(i, side)
    return ImageOps.fit(photo, side, Image.Resampling.BILINEAR, centering=(place, place))


# ---------------------------------------------------------------- shared by the scripts: files
def warn(message):
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def hash_of(content):
    return hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def write_file(path: str, write: Callable) -> None:
    """Atomic write: `write(name)` fills a temporary file, which then replaces `path`. Raises
    UserError if that fails."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # PyTorch's own writer raises RuntimeError on a full disk
        reason = getattr(e, "strerror", None) or f"{e}; is the disk full?"
        raise UserError(
            f"{path}: cannot be written ({reason}); name another place (for a cache: --cache)"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(content, path):
    text = json.dumps(content, indent=1, allow_nan=False)
    write_file(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- shared by the scripts: pictures
PANEL = 380  # width of a panel of a sheet or plot, pixels


def save_picture(picture, path):
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


def plot(title: str, right: float, top: float, curves: list) -> Image.Image:
    """A panel with axes from 0 to `right` and 0 to `top`. curves: ((x, y) points, colour)."""
    left = 52
    upper = 30
    width = PANEL - 66
    height = 160
    picture = Image.new("RGB", (PANEL, upper + height + 30), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    draw.text((left, 8), title, "black", font)
    for share, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
        x = left + share * width
        y = upper + (1 - share) * height
        draw.line((left, y, left + width, y), "#dddddd")
        draw.text((left - 6, y), f"{share * top:.2g}", "black", font, "rm")
        draw.text((x, upper + height + 6), f"{share * right:.0f}", "black", font, anchor)
    for points, colour in curves:
        for x, y in points:
            px = left + x / max(1, right) * width
            py = upper + height - y / (top or 1) * height
            draw.ellipse((px - 1.5, py - 1.5, px + 1.5, py + 1.5), colour)
    return picture


# ---------------------------------------------------------------- shared by the scripts: options
def make_parser(prog, description):
    """A parser whose mistakes are one line on stderr, without the usage, and status 2."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage=argparse.SUPPRESS,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=31),
        allow_abbrev=False,
    )


TOY_OPTIONS = {"min_images": 20, "min_pixels": 5000}


def add_data_options(parser):
    add = parser.add_argument
    add("--data", default="toy", help="toy, or a comma list of ade20k (or your own data),os,dtd")
    add(
        "--root",
        default="data",
        help="folder of ade20k/, os/, dtd/, toy/, or of your images/ (%(default)s)",
    )
    add("--cache", help="for indexes and prepared labels (<root>/.cache)")
    helps = {
        "min_images": "keep objects and materials in so many images (50; toy 20; own data: all)",
        "min_pixels": "keep objects of so many pixels (50000; toy 5000; own data: all)",
        "min_part_images": "keep parts in so many images (20)",
        "min_scene_images": "keep scenes of so many images (10)",
    }
    for name, default in THRESHOLDS.items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=positive, default=default, metavar="N", help=helps[name])
    add("--workers", type=not_negative, metavar="N", help="processes that read images (up to 8)")


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def not_negative(text):
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def short_sides(text):
    sizes = [int(size) for size in text.split(",")]
    if min(sizes) < 32:
        raise argparse.ArgumentTypeError(f"{min(sizes)} is below 32 pixels")
    return sizes


def levels_of(text):
    levels = [level.strip() for level in text.split(",")]
    for level in levels:
        if level not in upernet.LEVELS:
            raise argparse.ArgumentTypeError(f"'{level}' is not one of {', '.join(upernet.LEVELS)}")
    return levels


def parse_options(parser, argv, toy, stored):
    """The options: as given, else as stored in a file of weights, else those of the toy with --data
    toy, else the default. `folder` is where the data lie, `cache_folder` where the cache is,
    `thresholds` those of `build_vocabulary`."""
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)
    if args.data == "toy":
        parser.set_defaults(**{**toy, **stored})
        args = parser.parse_args(argv)
    args.folder = os.path.join(args.root, "toy") if args.data == "toy" else args.root
    args.cache_folder = args.cache or os.path.join(args.folder, ".cache")
    args.thresholds = {name: getattr(args, name) for name in THRESHOLDS}
    return args


@contextlib.contextmanager
def one_line_errors(prog):
    """The context of a script: what a user can mend becomes one line and status 2."""
    try:
        yield
    except BaseException as e:
        kill_readers()
        if isinstance(e, KeyboardInterrupt):
            print(f"{prog}: interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        message = message_of(e)
        if message is None:
            raise
        print(f"{prog}: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def message_of(error):
    """What to tell the user, or None for a mistake of the program's own."""
    text = str(error)
    if isinstance(error, UserError):  # from a process that reads images it ends its traceback
        return text.rsplit("UserError: ", 1)[-1].strip()
    if isinstance(error, FloatingPointError):
        return text
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|Bus error", text):
        return "out of memory; fewer --workers, a lower --size or --batch-size take less"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


# ---------------------------------------------------------------- shared by the scripts: processes
TIMEOUT = datetime.timedelta(hours=2)  # that other processes wait for the first one's scan


def rank():
    return int(os.environ.get("RANK", 0))


def processes():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process():
    """Whether this process prints and writes: the only one, or torchrun's first."""
    return rank() == 0


def join_processes():
    """Joins the processes that torchrun started, if any. From then on only the main one prints."""
    if processes() == 1:
        return
    # torchrun's store outlives a group that failed; a new one must not find the old one's
    # addresses.
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=processes(), timeout=TIMEOUT
    )
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")


def largest_of_processes(number):
    """The largest of the processes' numbers, without waiting for a GPU."""
    largest = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@contextlib.contextmanager
def main_process_first():
    """The context in which other processes wait until the main one has left it: they then read what
    it wrote. If it fails, torchrun ends them."""
    if not is_main_process():
        largest_of_processes(0)
    yield
    if is_main_process():
        largest_of_processes(0)


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
        torch.zeros(1, device=device)
    except Exception as e:  # each device's own
        raise UserError(f"--device {name}: not available ({reason_of(e)})") from None
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision for --amp; None is off. auto: on CUDA bf16, on old GPUs fp16."""
    if name == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def progress(items, title):
    """The items, with a bar on the main process's terminal."""
    disable = None if is_main_process() else True  # None: shown on terminals alone
    return tqdm(items, title, unit=" images", disable=disable, leave=False)


# Of Ctrl-C, kill, a closed terminal and a queue's warning; Windows has the first two.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]


def start_reader(*_):
    """For processes that read images: a signal to the group is the main process's business, and if
    that is killed they end, too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Else Python would wait at their end until somebody empties their pipe.
    multiprocessing.util.Finalize(None, os._exit, (0,), exitpriority=0)


def kill_readers():
    """Python would wait for them for ever, as they ignore its signal."""
    readers = multiprocessing.active_children()
    if readers and hasattr(signal, "SIGCHLD"):  # at which PyTorch would raise an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for reader in readers:
        reader.kill()


def unchanged(item):
    """For DataLoader, which would make tensors of arrays."""
    return item


def loader(dataset: Dataset, first: int = 0, workers: int | None = None) -> DataLoader:
    """The items in their order, from `first` on, read ahead by `workers` processes; by default one
    a core of this machine, shared among its processes, at most 8."""
    if workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, min(8, cores))
        if len(dataset) - first < 200:
            workers = 0  # to start processes takes longer
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, len(dataset)),
        num_workers=workers,
        collate_fn=unchanged,
        worker_init_fn=start_reader,
    )


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


# ---------------------------------------------------------------- the command
def report(index, vocabulary):
    """Prints what a source has: its classes, what is unlabelled, what is broken."""
    height, width = index.sizes.double().median(dim=0).values.int().tolist()
    print(
        f"{index.source}: {len(index.images)} images in {index.folder}, median {width} x {height}"
    )
    for level, classes in class_pixels(index, vocabulary).items():
        text = "no class is large enough: see the --min- options"
        if classes:
            total = sum(sum(images.values()) for images in classes.values())
            unit = "images" if level in upernet.TAGS else "pixels"
            what = "objects with parts" if level == "part" else "classes"
            names = vocabulary[level]
            text = f"{len(names)} {what}, {total:,} {unit} labelled: {listed(names)}"
        elif not any(index.tags) and level == index.data_set.tag_level:
            continue
        print(f"  {level:9s}{text}")
        if level == "object" and index.data_set.fixed_table:
            for number, name in zip(index.names, vocabulary["object"]):
                images = classes.get(name, {})
                pixels = sum(images.values())
                print(f"    {number:5d} {name:30s}{pixels:14,} pixels in {len(images)} images")
    if index.data_set.map_level == "object":
        print(f"  {unlabelled_share(index, vocabulary.get('object', []))}")
    for _, reason in index.broken:
        print(f"  set aside  {reason}")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("datasets.py"):
        parser = make_parser("datasets.py", "Scans data sets and says what is there, or broken.")
        add_data_options(parser)
        args = parse_options(parser, argv, TOY_OPTIONS, {})
        indexes = open_indexes(args.data, args.folder, args.cache_folder, args.workers)
        vocabulary = build_vocabulary(indexes, args.thresholds)
        for index in indexes.values():
            report(index, vocabulary)


if __name__ == "__main__":
    main()
