"""The three sources of Broden+ that UPerNet learns from (section 2.1): ADE20K, OpenSurfaces and DTD, and a toy of them.

    python datasets.py --data ade20k,os,dtd --root data   # scans, says what is there and what is broken

What happens to a source, in order: `find_folder` tells its layout on disk, `scan` opens every file once and keeps an
`Index` of it in the cache, `build_vocabulary` makes the class names of each level out of the indexes by the paper's
rules, a `Reader` turns an image's files into label maps of that vocabulary (for training once, into the cache), and
`Batches` and `Whole` feed training and evaluation.
"""

import argparse
import colorsys
import contextlib
import csv
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

SOURCE_LEVELS = {"ade20k": ("scene", "object", "part"), "os": ("material",), "dtd": ("texture",)}
MEAN_COLOUR = (124, 116, 104)  # ImageNet's, of which padding is made: zero after the network's normalisation
TEXTURE_SIZE = 64  # section 3.1: "resized to 64x64, roughly"; ours: short side 64, then a square of it
SEED = 304  # of the toy's files and of every split; --seed is about training


class UserError(ValueError):
    """Something that the user can mend: scripts print it as one line and exit with status 2."""


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """argparse with short messages: a mistake is one line on stderr, and --help has a line per option."""

    def __init__(self, description: str, usage: str = "%(prog)s [options]"):
        wide = lambda prog: argparse.HelpFormatter(prog, max_help_position=31)
        super().__init__(description=description, formatter_class=wide, usage=usage, allow_abbrev=False, add_help=False)

    def format_help(self) -> str:
        return re.sub("\n\n+", "\n", super().format_help())

    def error(self, message: str):
        # One that was raised in a worker of a DataLoader comes with its traceback.
        message = message.rsplit("UserError: ", 1)[-1]
        shown = f"{self.prog}: {' '.join(message.split())}\n"
        self.exit(2, shown if is_first() else None)


def write_whole(path: str, write, advice: str = "") -> None:
    """Has `write(name)` make a file of a temporary name and renames it: `path` is there as a whole, or as it was.

    Raises UserError with the path and the advice if it cannot be written.
    """
    temporary = os.path.join(os.path.dirname(path), f".{os.getpid()}.{os.path.basename(path)}")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # PyTorch's own file writer raises RuntimeError on a full disk
        if "DataLoader worker" in str(e):  # of a process that died meanwhile: PyTorch raises it wherever the program is
            raise
        what_next = f"; {advice}" if advice else ""
        raise UserError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}){what_next}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(content: dict, path: str, advice: str = "") -> None:
    def write(name: str) -> None:
        with open(name, "w") as file:
            json.dump(content, file, indent=1, allow_nan=False)

    write_whole(path, write, advice)


# ---------------------------------------------------------------- what lies on disk


@dataclass
class Index:
    """What one scan of a source found. Class numbers are the source's own; pixel counts are rows of (image, number,
    pixels)."""

    source: str  # ade20k, os, dtd
    layout: str  # ade2021, sceneparsing, os, dtd
    folder: str
    images: list[str]  # paths relative to the folder
    sizes: torch.Tensor  # (images, 2), height and width
    official: list[str]  # "training", "validation" or "" for each image
    tags: list[str]  # the scene or texture of each image, "" for none
    objects: torch.Tensor  # (rows, 3)
    parts: torch.Tensor  # (rows, 4): image, object number, part number, pixels
    materials: torch.Tensor  # (rows, 3)
    names: dict[int, str]  # of the numbers: ADE20K's objects and parts, OpenSurfaces' substances
    broken: list[list[str]]  # [path, reason] of what was set aside
    stamp: str = ""  # changes with the names, sizes and times of the source's files


def find_folder(root: str, source: str) -> tuple[str, str]:
    """(layout, folder) of a source below `root`, directly or one folder down. Raises UserError if there is none."""
    tops = [os.path.join(root, name) for name in (("os", "opensurfaces") if source == "os" else (source,))]
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; --root names the one that holds {source}/")
    places = []
    for top in filter(os.path.isdir, tops):
        places += [top] + sorted(entry.path for entry in os.scandir(top) if os.path.isdir(entry.path))
    marks = {
        "ade20k": {"ade2021": "images/ADE", "sceneparsing": "objectInfo150.txt"},
        "os": {"os": "photos-labels"},
        "dtd": {"dtd": "labels/train1.txt"},
    }[source]
    for folder in places:
        for layout, mark in marks.items():
            if os.path.exists(os.path.join(folder, mark)):
                return layout, folder
    if source == "ade20k" and any(os.path.exists(os.path.join(p, "index_ade20k.mat")) for p in places):
        raise UserError(
            f"{tops[0]}: this is ADE20K 2016_07_26, whose class names are in a MATLAB file; get ADE20K_2021_17_01 "
            "(groups.csail.mit.edu/vision/datasets/ADE20K), the same images with names in JSON"
        )
    there = [s for s in (*SOURCE_LEVELS, "opensurfaces") if os.path.isdir(os.path.join(root, s))]
    raise UserError(
        f"{source}: not found below {root} (folders there: {', '.join(there) or 'none of a source'}); "
        f"expected {' or '.join(tops)} with {' or '.join(marks.values())} in it, directly or one folder down"
    )


def label_files(layout: str, image: str) -> dict[str, str]:
    """Where the labels of an image are: `labels`, `parts`, `json`, as the layout has them, relative to its folder."""
    stem = os.path.splitext(image)[0]
    if layout == "ade2021":
        return {"labels": f"{stem}_seg.png", "parts": f"{stem}_parts_1.png", "json": f"{stem}.json"}
    if layout == "sceneparsing":
        return {"labels": re.sub("^images/", "annotations/", stem) + ".png"}
    if layout == "os":
        return {"labels": f"photos-labels/{os.path.basename(stem)}.png"}
    return {}


def list_files(layout: str, folder: str) -> tuple[list[dict[str, str]], str]:
    """The images of a source, and a fingerprint of its files: their names, sizes and times of change.

    Of each image `image`, its path in the folder, `official` ("training", "validation" or ""), `tag` where the layout
    has a scene or texture outside of the image's own files, and `label_files`, parts only where there are any.
    """
    stats = {}
    visited = set()
    for base, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in visited:  # a loop of symbolic links, or a second way to the same files
            folders.clear()
            continue
        visited.add(real)
        masks = {name[:-4] for name in names if name.endswith(".jpg")}  # ADE20K's folders of instances
        folders[:] = set(folders) - masks
        within = "" if base == folder else os.path.relpath(base, folder).replace(os.sep, "/") + "/"
        for entry in os.scandir(base) if names else ():
            if os.path.isfile(entry.path):  # False, too, for a link to itself
                stat = entry.stat()
                stats[within + entry.name] = (stat.st_size, stat.st_mtime_ns)
    stamp = hashlib.sha256(repr(sorted(stats.items())).encode()).hexdigest()

    pattern = {
        "ade2021": r"images/ADE/(training|validation)/.+\.jpg",
        "sceneparsing": r"images/(training|validation)/.+\.(jpg|jpeg|png)",
        "os": r"photos/()[^/]+\.(jpg|jpeg|png)",
        "dtd": r"images/()[^/]+/[^/]+\.(jpg|jpeg|png)",
    }[layout]
    files = []
    for path in sorted(stats):
        if match := re.fullmatch(pattern, path, re.IGNORECASE):
            entry = {"image": path, "official": match[1], **label_files(layout, path)}
            if entry.get("parts") not in stats:
                entry.pop("parts", None)
            files.append(entry)
    if not files:
        place = {
            "ade2021": "images/ADE/training or images/ADE/validation",
            "sceneparsing": "images/training or images/validation (with labels of the same names under annotations/)",
            "os": "photos",
            "dtd": "images/<texture>",
        }[layout]
        raise UserError(f"{folder}: no images in {place}")
    if layout == "sceneparsing":
        table = "sceneCategories.txt"  # one's own data may have no scenes
        lines = read_lines(folder, table) if os.path.exists(os.path.join(folder, table)) else []
        scenes = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
        for entry in files:
            entry["tag"] = usable_scene(scenes.get(os.path.splitext(os.path.basename(entry["image"]))[0], ""))
    if layout == "dtd":  # train1 + val1 against test1; an image in no list belongs to neither
        lists = {"train1": "training", "val1": "training", "test1": "validation"}
        official = {
            line.strip(): side for name, side in lists.items() for line in read_lines(folder, f"labels/{name}.txt")
        }
        for entry in files:
            _, entry["tag"], name = entry["image"].split("/")
            entry["official"] = official.get(f"{entry['tag']}/{name}", "")
    return files, stamp


def read_lines(folder: str, name: str) -> list[str]:
    """The lines of a text file, which may be Latin-1. Raises UserError with its name if it cannot be read."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            content = file.read()
    except OSError as e:
        raise UserError(f"{os.path.join(folder, name)}: {e.strerror}") from None
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return content.decode("latin-1").splitlines()


def usable_scene(name: str) -> str:
    """Lower case; "misc" and the like say nothing, and such an image has no scene."""
    name = name.strip().lower()
    return "" if name in ("misc", "unknown", "none", "~not labeled") else name


def numbers_of(path: str, layout: str) -> np.ndarray:
    """Class numbers (H, W) of a label picture as the layout codes them; 0 is unlabelled."""
    with Image.open(path) as picture:
        if layout == "sceneparsing":
            if picture.mode not in ("L", "P", "I", "I;16"):
                raise ValueError(f"mode {picture.mode} where a map of class numbers was expected")
            return np.asarray(picture).astype(np.int32)
        channels = np.asarray(picture.convert("RGB"))
    if layout == "ade2021":
        return channels[..., 0].astype(np.int32) // 10 * 256 + channels[..., 1]
    return channels[..., 0].astype(np.int32)  # OpenSurfaces: red is the substance


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB: what is transparent becomes white, 16 bits are scaled to 8."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).astype(np.float32) / 257).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture))
        scale = 255 if values.max(initial=0) <= 1 else 1
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


# ---------------------------------------------------------------- the scan


def scan_image(task: tuple[str, str, dict]) -> dict:
    """Opens every file of one image once: its size, tag, and pixels per class number; or the reason under `broken`, if
    one cannot be read."""
    layout, folder, files = task
    current = files["image"]
    try:
        with Image.open(os.path.join(folder, current)) as picture:
            width, height = picture.size
            picture.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth, and a truncated one still noticed
            picture.load()
        found = {
            "size": (height, width),
            "tag": files.get("tag", ""),
            "objects": [],
            "parts": [],
            "materials": [],
            "names": {},
        }
        if "json" in files:
            current = files["json"]
            os.stat(os.path.join(folder, current))  # a file that is missing is reported as such
            annotation = json.loads("\n".join(read_lines(folder, current)))["annotation"]
            scenes = [s for s in annotation["scene"] if s]
            found["tag"] = usable_scene(scenes[-1] if scenes else "")
            found["names"] = {int(o["name_ndx"]): str(o["name"]) for o in annotation["object"]}
            if found["names"] and not 0 <= max(found["names"]) < 2**16:
                raise ValueError(f"class number {max(found['names'])}")
        if "labels" in files:
            current = files["labels"]
            numbers = numbers_of(os.path.join(folder, current), layout)
            if layout != "os" and numbers.shape != (height, width):
                raise ValueError(f"{numbers.shape} pixels, its photo {(height, width)}")
            counts = np.bincount(numbers.ravel())
            counts[0] = 0
            rows = [(int(n), int(counts[n])) for n in np.flatnonzero(counts)]
            found["materials" if layout == "os" else "objects"] = rows
        if "parts" in files:
            current = files["parts"]
            parts = numbers_of(os.path.join(folder, current), layout)
            if parts.shape != (height, width):
                raise ValueError(f"{parts.shape} pixels, its photo {(height, width)}")
            both = (parts > 0) & (numbers > 0)
            pairs, counts = np.unique(numbers[both].astype(np.int64) << 16 | parts[both], return_counts=True)
            found["parts"] = [(int(p >> 16), int(p & 0xFFFF), int(c)) for p, c in zip(pairs, counts)]
        return found
    except UserError as e:
        return {"broken": str(e)}
    except Exception as e:  # whatever a decoder makes of a damaged file
        reason = "missing" if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: {e}"
        return {"broken": f"{current}: {reason}".replace("\n", " ")}


def scan(root: str, source: str, cache: str, allow_broken: bool = False) -> Index:
    """The index of a source: from the cache if no file was added, removed or changed since, else by opening every file.

    Raises UserError if the source is not there, or if more than one file in twenty is broken without `allow_broken`.
    """
    layout, folder = find_folder(root, source)
    files, stamp = list_files(layout, folder)
    stored = os.path.join(cache, f"{source}.index.pt")
    index = load_index(stored, stamp, folder)
    if index is None:
        index = scan_all(source, layout, folder, files)
        index.stamp = stamp
        content = {"version": 1, **vars(index)}
        write_whole(stored, lambda name: torch.save(content, name), "choose another folder with --cache")
    if index.broken and is_first():
        found = f"{len(index.broken)} of {len(files)} images set aside, the first: {index.broken[0][1]}"
        print(f"{source}: {found}", file=sys.stderr)
    refuse_broken(index, allow_broken)
    if not index.images:
        raise UserError(f"{folder}: not a single usable image")
    return index


def refuse_broken(index: Index, allow_broken: bool) -> None:
    """Raises UserError if more than one image in twenty is broken."""
    share = len(index.broken) / (len(index.broken) + len(index.images))
    if share > 0.05 and not allow_broken:
        found = f"{index.source}: {share:.0%} of its images are broken"
        raise UserError(f"{found} (see above); go on all the same with --allow-broken")


def load_index(stored: str, stamp: str, folder: str) -> Index | None:
    """The index in the file `stored` if it is of the same files; None where it must be made anew."""
    with contextlib.suppress(Exception):  # there is none yet, or it is damaged: it can always be made again
        content = torch.load(stored, weights_only=True)
        tables = (content[key] for key in ("sizes", "objects", "parts", "materials"))
        whole = all(isinstance(table, torch.Tensor) for table in tables) and isinstance(content["broken"], list)
        if content.pop("version") == 1 and content["stamp"] == stamp and whole:
            return Index(**{**content, "folder": folder})
    return None


def scan_all(source: str, layout: str, folder: str, files: list[dict]) -> Index:
    tasks = [(layout, folder, entry) for entry in files]
    bar = dict(total=len(tasks), desc=f"scanning {source}", unit=" images", disable=None, leave=False)
    if len(tasks) < 200:  # starting processes would take longer
        found = [scan_image(task) for task in tqdm(tasks, **bar)]
    else:
        with multiprocessing.Pool() as pool:
            found = list(tqdm(pool.imap(scan_image, tasks, chunksize=16), **bar))

    names: dict[int, str] = {}
    for record in found:
        names.update(record.get("names", {}))
    if layout == "sceneparsing":
        header, *rows = [line.split("\t") for line in read_lines(folder, "objectInfo150.txt") if line.strip()] or [[""]]
        try:
            if header[0].strip().isdecimal():
                raise ValueError("the first line is no header")
            names = {int(row[0]): row[-1].strip() for row in rows}
            if min(names, default=1) < 1:
                raise ValueError("0 is unlabelled, classes are numbered from 1 on")
        except ValueError as e:
            table = os.path.join(folder, "objectInfo150.txt")
            raise UserError(
                f"{table}: a header, then lines of columns with tabs between, number first, names last ({e})"
            ) from None
    if layout == "os":
        names = substance_names(folder)
    for entry, record in zip(files, found):
        for key, file in (("objects", "labels"), ("materials", "labels"), ("parts", "parts")):
            numbers = {n for row in record.get(key, ()) for n in row[:-1]}
            if "broken" not in record and (unknown := sorted(numbers - names.keys())):
                record["broken"] = f"{entry[file]}: class number {unknown[0]}, which the tables do not know"

    good = [(entry, record) for entry, record in zip(files, found) if "broken" not in record]

    def rows(key: str, width: int) -> torch.Tensor:
        return torch.tensor([(i, *row) for i, (_, r) in enumerate(good) for row in r[key]], dtype=torch.int64).reshape(
            -1, width
        )

    return Index(
        source=source,
        layout=layout,
        folder=folder,
        images=[entry["image"] for entry, _ in good],
        sizes=torch.tensor([record["size"] for _, record in good], dtype=torch.int64).reshape(-1, 2),
        official=[entry["official"] for entry, _ in good],
        tags=[record["tag"] for _, record in good],
        objects=rows("objects", 3),
        parts=rows("parts", 4),
        materials=rows("materials", 3),
        names=names,
        broken=[[e["image"], r["broken"]] for e, r in zip(files, found) if "broken" in r],
    )


def substance_names(folder: str) -> dict[int, str]:
    """OpenSurfaces: the red value of a substance in the label pictures -> its name."""
    table = "label-substance-colors.csv"
    try:
        rows = [(int(float(r["red_color"])), r["substance_name"]) for r in csv.DictReader(read_lines(folder, table))]
        if not rows or not all(0 <= red < 256 and name for red, name in rows):
            raise ValueError("a red value beyond 255, or no name")
        return dict(rows)
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as e:
        raise UserError(
            f"{os.path.join(folder, table)}: needs the columns substance_name and red_color ({e})"
        ) from None


# ---------------------------------------------------------------- the vocabulary

# What a class needs to be kept (section 2.1; that of scenes is our choice), and what it needs in the toy.
MINIMA = {"min_images": 50, "min_pixels": 50000, "min_part_images": 20, "min_scene_images": 10}
TOY_MINIMA = {"min_images": 20, "min_pixels": 5000, "min_part_images": 20, "min_scene_images": 10}

# OpenSurfaces' substances that are kept, and as what (released code); all others are unlabelled.
MATERIALS = {
    "concrete": "stone",
    "stone": "stone",
    "plastic clear": "plastic",
    "plastic opaque": "plastic",
    "granite marble": "polished stone",
    "carpet rug": "carpet",
    "fabric cloth": "fabric",
    "paper tissue": "paper",
    "rubber latex": "rubber/latex",
}
MATERIALS |= {
    name: name
    for name in (
        "brick cardboard ceramic foliage food fur glass hair laminate leather metal mirror painted skin tile wallpaper "
        "wicker wood"
    ).split()
}


def merged_names(names: dict[int, str], source: str, part: bool = False) -> dict[int, str]:
    """Number -> class name, where several numbers may get the same name: the merging of similar names, by rule.

    Objects and parts: the first synonym, in lower case; a plural becomes the singular when both forms occur; parts
    lose "left" and "right". Materials: by the table above, those that it lacks are left out. (The released code merges
    by hand-made tables; the rules are our choice.)
    """
    if source == "os":
        plain = {number: re.sub("[^a-z]+", " ", name.lower()).strip() for number, name in names.items()}
        return {number: MATERIALS[name] for number, name in plain.items() if name in MATERIALS}
    first = {number: name.split(",")[0].strip().lower() for number, name in names.items()}
    if part:
        first = {number: re.sub(r"\b(left|right) +", "", name) for number, name in first.items()}
    forms = set(first.values())

    def singular(name: str) -> str:
        candidates = [name[:-1]] if name.endswith("s") else []
        candidates += [name[:-2]] if re.search("(s|x|z|ch|sh|o)es$", name) else []
        candidates += [name[:-3] + "y"] if name.endswith("ies") else []
        return next((c for c in candidates if c in forms), name)

    return {number: singular(name) for number, name in first.items()}


def table_names(names: dict[int, str]) -> list[str]:
    """SceneParsing's own table in its order: first synonyms, whole entries where two classes share the first one, and
    with the number where they share all."""
    first = {n: name.split(",")[0].split(";")[0].strip() for n, name in names.items()}
    numbered = {n: f"{name} ({n})" for n, name in names.items()}
    once = lambda table, n: list(table.values()).count(table[n]) == 1
    return [next((t[n] for t in (first, names) if once(t, n)), numbered[n]) for n in sorted(names)]


def class_names(index: Index) -> dict[str, dict]:
    """Level -> {what the source's files call a class: its class name}, after merging, for every level of the source.

    The files have numbers for object, part and material, and names for scene and texture.
    """
    tags = {tag: tag for tag in index.tags if tag}
    if index.source == "dtd":
        return {"texture": tags}
    if index.source == "os":
        return {"material": merged_names(index.names, "os")}
    if index.layout == "sceneparsing":
        return {"scene": tags, "object": dict(zip(sorted(index.names), table_names(index.names))), "part": {}}
    objects, parts = (
        {n: index.names[n] for n in rows.unique().tolist()} for rows in (index.objects[:, 1], index.parts[:, 2])
    )
    return {"scene": tags, "object": merged_names(objects, "ade20k"), "part": merged_names(parts, "ade20k", part=True)}


def class_pixels(index: Index) -> dict[str, dict]:
    """Level -> class -> {image: pixels}, after merging and before any threshold. A class of part is (object, part).

    Scenes and textures, which an image has as a whole, count one for each image.
    """
    names = class_names(index)
    table: dict[str, dict] = {level: {} for level in names}

    def add(level: str, name, image: int, pixels: int) -> None:
        images = table[level].setdefault(name, {})
        images[image] = images.get(image, 0) + pixels

    for image, number, pixels in index.objects.tolist():
        add("object", names["object"][number], image, pixels)
    for image, number, part, pixels in index.parts.tolist():
        add("part", (names["object"][number], names["part"][part]), image, pixels)
    for image, number, pixels in index.materials.tolist():
        if number in names["material"]:
            add("material", names["material"][number], image, pixels)
    for image, tag in enumerate(index.tags):
        if tag:
            add("texture" if index.source == "dtd" else "scene", tag, image, 1)
    return table


def build_vocabulary(indexes: dict[str, Index], minima: dict[str, int]) -> dict:
    """Level -> class names (part: object -> part names, "background" first), by the rules of section 2.1.

    Objects in at least `min_images` images with at least `min_pixels` pixels, largest first; parts of an object in at
    least `min_part_images` images; scenes in at least `min_scene_images`; materials in at least `min_images`; all
    textures. SceneParsing's objects are its own table, without thresholds. A level without a class is left out.
    """
    vocabulary: dict = {}
    for index in indexes.values():
        table = class_pixels(index)
        pixels = {level: {name: sum(images.values()) for name, images in t.items()} for level, t in table.items()}
        if index.source == "ade20k":
            least = minima["min_scene_images"]
            vocabulary["scene"] = sorted(n for n, images in table["scene"].items() if len(images) >= least)
            if index.layout == "sceneparsing":
                vocabulary["object"] = table_names(index.names)
            else:
                kept = [
                    n
                    for n, images in table["object"].items()
                    if len(images) >= minima["min_images"] and pixels["object"][n] >= minima["min_pixels"]
                ]
                vocabulary["object"] = sorted(kept, key=lambda n: (-pixels["object"][n], n))
            parts = {name: ["background"] for name in vocabulary["object"]}
            for (name, part), images in sorted(table["part"].items(), key=lambda kv: (-pixels["part"][kv[0]], kv[0])):
                if name in parts and part != "background" and len(images) >= minima["min_part_images"]:
                    parts[name].append(part)
            vocabulary["part"] = {name: names for name, names in parts.items() if len(names) > 1}
        elif index.source == "os":
            vocabulary["material"] = sorted(
                n for n, images in table["material"].items() if len(images) >= minima["min_images"]
            )
        else:
            vocabulary["texture"] = sorted(table["texture"])
    return {level: names for level, names in vocabulary.items() if names}


# ---------------------------------------------------------------- one image and its labels


class Reader:
    """Reads the images of one source with their labels as class indices of a vocabulary.

    `names`: as `class_names` gives them, and those by default. For training `prepare` makes the label maps ready once:
    each pixel one code, 0 for unlabelled, 1 + its class, and beyond the classes one for each part of each object.
    """

    def __init__(self, index: Index, vocabulary: dict, names: dict[str, dict] | None = None):
        names = names or class_names(index)
        self.index = index
        self.levels = [level for level in SOURCE_LEVELS[index.source] if level in vocabulary and names.get(level)]
        self.tag_level = {"ade20k": "scene", "dtd": "texture", "os": None}[index.source]
        self.map_level = {"ade20k": "object", "dtd": None, "os": "material"}[index.source]
        self.with_parts = set(index.parts[:, 0].tolist())

        place = {
            level: {name: i for i, name in enumerate(vocabulary[level])} for level in self.levels if level != "part"
        }
        tags, classes = place.get(self.tag_level, {}), place.get(self.map_level, {})  # name -> index in the vocabulary
        of_tag = names.get(self.tag_level, {})
        self.tags = [tags.get(of_tag.get(tag), -1) for tag in index.tags]

        # What the files' numbers mean: number of an object or a material -> class index, -1 for none; and
        # (class index of an object, number of a part) -> index in the object's list of parts, 0 for none.
        size = max(index.names, default=0) + 1
        self.of_number = np.full(size, -1, np.int16)
        for number, name in names.get(self.map_level, {}).items():
            if number < size:
                self.of_number[number] = classes.get(name, -1)
        owned = {}  # class index of an object -> its parts
        if "part" in self.levels:
            owned = {classes[owner]: parts for owner, parts in vocabulary["part"].items()}
            self.of_part = np.zeros((len(classes) + 1, size), np.uint8)  # the last row, class -1, stays 0
            for (number, name), (owner, parts) in itertools.product(names["part"].items(), owned.items()):
                if name in parts and number < size:
                    self.of_part[owner, number] = parts.index(name)

        # The codes of prepared maps, and back: code <-> (class index, index in its list of parts).
        pairs = [(-1, 0)] + [(c, 0) for c in range(len(classes))]
        pairs += [(owner, part) for owner, parts in owned.items() for part in range(1, len(parts))]
        self.class_of_code, self.part_of_code = (np.array(v, t) for v, t in zip(zip(*pairs), (np.int16, np.uint8)))
        self.code_of = np.zeros((len(classes) + 1, self.part_of_code.max() + 1), np.uint16)  # class -1 is the last row
        self.code_of[self.class_of_code, self.part_of_code] = np.arange(len(pairs))
        self.stored = ""  # the file of prepared maps
        self.maps: dict = {}  # its content, read by the process that needs it
        self.key = hashlib.sha256(repr((index.stamp, [(v, vocabulary[v]) for v in self.levels])).encode()).hexdigest()

    def photo(self, i: int, box: tuple[int, int] | None = None) -> Image.Image:
        """Image i in RGB; with `box` (width, height) perhaps smaller than it is, but not smaller than the box."""
        path = os.path.join(self.index.folder, self.index.images[i])
        try:
            with Image.open(path) as picture:
                if box:
                    picture.draft("RGB", box)  # libjpeg decodes at 1/2, 1/4 or 1/8 for less work
                return rgb(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise UserError(f"{path}: cannot be read as an image any more ({e})") from None

    def labels(self, i: int) -> dict[str, np.ndarray | int]:
        """Image i's labels at their own size: object, material int16 (H, W), -1 for unlabelled; part uint8 (H, W), the
        index in the list of parts of the pixel's object, 0 for background and elsewhere; scene, texture an index or -1.
        """
        folder, layout = self.index.folder, self.index.layout
        files = label_files(layout, self.index.images[i])
        labels: dict[str, np.ndarray | int] = {self.tag_level: self.tags[i]}
        if self.map_level in self.levels:
            try:
                current = os.path.join(folder, files["labels"])
                labels[self.map_level] = classes = self.of_number[numbers_of(current, layout)]
                if "part" in self.levels:
                    labels["part"] = np.zeros(classes.shape, np.uint8)
                    if i in self.with_parts:
                        current = os.path.join(folder, files["parts"])
                        labels["part"] = self.of_part[classes, numbers_of(current, layout)] * (classes >= 0)
            except (OSError, ValueError, SyntaxError, IndexError) as e:
                raise UserError(f"{current}: cannot be read as labels any more ({e})") from None
        return {level: labels[level] for level in self.levels}

    def prepare(self, cache: str, short: int, longest: int) -> None:
        """Makes the label maps that training reads, each at most as large as its photo is at a short side of `short`.

        They are kept in `<cache>/<source>.labels.pt`, and made anew for other files, another vocabulary or other sizes.
        Raises UserError if that cannot be written, or a label not be read.
        """
        if self.map_level not in self.levels:
            return
        self.stored = os.path.join(cache, f"{self.index.source}.labels.pt")
        key = f"{self.key} {short} {longest}"
        with contextlib.suppress(Exception):  # there are none yet, or they are damaged: they can always be made again
            maps = torch.load(self.stored, weights_only=True, mmap=True)
            if maps["key"] == key and len(maps["packed"]) == maps["ends"][-1]:
                return
        n = len(self.index.images)
        loader = torch.utils.data.DataLoader(
            PackedLabels(self, short, longest), batch_size=None, num_workers=(os.cpu_count() or 1) if n >= 200 else 0
        )
        sizes, ends, packed = [], [], bytearray()
        for size, content in tqdm(
            loader, desc=f"preparing {self.index.source}", unit=" labels", disable=None, leave=False
        ):
            packed += content
            sizes.append(size)
            ends.append(len(packed))
        content = {
            "key": key,
            "sizes": torch.tensor(sizes),
            "ends": torch.tensor(ends),
            "packed": torch.frombuffer(packed, dtype=torch.uint8),
        }
        write_whole(self.stored, lambda name: torch.save(content, name), "choose another folder with --cache")

    def codes(self, i: int) -> np.ndarray:
        """Image i's prepared label map: uint16 (h, w)."""
        if not self.maps:
            self.maps = torch.load(self.stored, weights_only=True, mmap=True)
        start, end = self.maps["ends"][i - 1].item() if i else 0, self.maps["ends"][i].item()
        try:
            unpacked = zlib.decompress(self.maps["packed"][start:end].numpy())
        except zlib.error as e:
            raise UserError(f"{self.stored}: damaged ({e}); delete it, and it is made anew") from None
        return np.frombuffer(unpacked, np.uint16).reshape(self.maps["sizes"][i].tolist())

    def decoded(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        """Codes of any shape -> object or material int16 and part uint8, as `labels` has them."""
        maps = {self.map_level: self.class_of_code[codes], "part": self.part_of_code[codes]}
        return {level: maps[level] for level in self.levels if level in maps}


class PackedLabels(torch.utils.data.Dataset):
    """Element i is image i's label map as it is prepared: (height, width), zlib-compressed uint16 codes."""

    def __init__(self, reader: Reader, short: int, longest: int):
        self.reader, self.short, self.longest = reader, short, longest

    def __len__(self) -> int:
        return len(self.reader.index.images)

    def __getitem__(self, i: int) -> tuple[tuple[int, int], bytes]:
        labels = self.reader.labels(i)
        classes = labels[self.reader.map_level]
        largest = resized(tuple(self.reader.index.sizes[i].tolist()), self.short, self.longest)
        height, width = np.minimum(largest, classes.shape).tolist()
        rows, columns = ((np.arange(n) * 2 + 1) * full // (2 * n) for n, full in zip((height, width), classes.shape))
        parts = labels.get("part", np.zeros_like(classes))
        codes = self.reader.code_of[tuple(v[rows[:, None], columns] for v in (classes, parts))]
        return (height, width), zlib.compress(codes.tobytes(), 1)


def resized(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """(height, width) with the short side at `short`, or smaller so that the long side is at most `longest`."""
    scale = min(short / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def padded(size: int) -> int:
    """Rounded up to the coarsest stride of the network."""
    return math.ceil(size / 32) * 32


def padded_image(picture: Image.Image, size: tuple[int, int], height: int, width: int) -> np.ndarray:
    """The picture resized to `size`, padded right and below with the mean colour: (3, height, width) uint8."""
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = MEAN_COLOUR
    canvas[: size[0], : size[1]] = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1))


def quarter_codes(codes: np.ndarray, size: tuple[int, int], height: int, width: int) -> np.ndarray:
    """A label map of any size as the network sees it: at a quarter of (height, width), of which the image fills `size`.

    A cell of the quarter map has the label at its centre (our choice), and 0, unlabelled, where that is in the padding.
    """
    quarter = np.zeros((height // 4, width // 4), codes.dtype)
    rows, columns = ((np.arange(math.ceil((n - 2) / 4)) * 4 + 2) * full // n for n, full in zip(size, codes.shape))
    quarter[: len(rows), : len(columns)] = codes[rows[:, None], columns]
    return quarter


# ---------------------------------------------------------------- batches


def plan_batches(
    sources: dict[str, dict[int, tuple[int, int]]], iterations: int, images: int, seed: int
) -> list[tuple[str, list[int]]]:
    """[(source, image numbers)] for every iteration of a run: which source is drawn, and which images of it.

    sources: of each source, image number -> (height, width). Section 3.1: a source is drawn with probability by its
    number of images. Its images are then of one orientation, landscape or portrait, so that little is padded; each is
    seen once before any is seen again.
    """
    rng = np.random.default_rng(seed)

    def shuffled(numbers: list[int]):
        while True:
            yield from rng.permutation(numbers).tolist()

    buckets = []
    for source, sizes in sources.items():
        for portrait in (False, True):
            if numbers := [i for i, (h, w) in sizes.items() if (h > w) == portrait]:
                buckets.append((source, len(numbers), shuffled(numbers)))
    share = np.array([n for _, n, _ in buckets]) / sum(n for _, n, _ in buckets)
    return [
        (buckets[b][0], list(itertools.islice(buckets[b][2], images)))
        for b in rng.choice(len(buckets), iterations, p=share)
    ]


class Batches(torch.utils.data.Dataset):
    """Element k is the k-th batch of a run, ready made, a function of the plan and the seed alone: neither the number
    of workers nor a pause in between changes anything.

    A batch is a dict: `source`, `files`, `images` (N, 3, H, W) uint8 with H and W multiples of 32, and the labels as in
    `upernet.losses`, in small integer types. DTD's images are squares of TEXTURE_SIZE.
    rank, ranks: this process takes the rank-th of `ranks` equal shares of the plan's images; `accumulate` cuts the
    share into that many batches: iteration j has the elements from j * accumulate to (j + 1) * accumulate - 1.
    """

    def __init__(
        self,
        readers: dict[str, Reader],
        plan: list,
        sizes: list[int],
        longest: int,
        seed: int,
        accumulate=1,
        rank=0,
        ranks=1,
    ):
        self.readers, self.plan, self.sizes, self.longest, self.seed = readers, plan, sizes, longest, seed
        self.accumulate, self.rank, self.ranks = accumulate, rank, ranks

    def __len__(self) -> int:
        return len(self.plan) * self.accumulate

    def __getitem__(self, k: int) -> dict:
        iteration, piece = divmod(k, self.accumulate)
        source, numbers = self.plan[iteration]
        reader = self.readers[source]
        n = len(numbers) // (self.accumulate * self.ranks)
        start = (piece * self.ranks + self.rank) * n
        # One short side for all images of an iteration (our choice), so that little is padded.
        short = int(np.random.default_rng((self.seed, iteration)).choice(self.sizes))
        chosen = numbers[start : start + n]
        samples = [
            self.sample(reader, source, i, short, np.random.default_rng((self.seed, iteration, position)))
            for position, i in enumerate(chosen, start + 1)  # numpy takes a 0 at the end for nothing
        ]
        height = padded(max(size[0] for _, size, _ in samples))
        width = padded(max(size[1] for _, size, _ in samples))
        batch = {"source": source, "files": [reader.index.images[i] for i in chosen]}
        batch["images"] = torch.from_numpy(np.stack([padded_image(p, size, height, width) for p, size, _ in samples]))
        if reader.tag_level in reader.levels:
            batch[reader.tag_level] = torch.tensor([reader.tags[i] for i in chosen], dtype=torch.int16)
        if reader.map_level in reader.levels:
            codes = np.stack([quarter_codes(codes, size, height, width) for _, size, codes in samples])
            batch |= {level: torch.from_numpy(labels) for level, labels in reader.decoded(codes).items()}
        return batch

    def sample(self, reader: Reader, source: str, i: int, short: int, rng: np.random.Generator):
        """(picture, (height, width) that it will have, label codes) of image i, flipped by chance."""
        size = tuple(reader.index.sizes[i].tolist())
        if source == "dtd":
            picture = texture_square(reader, i, rng.random())
            size = (TEXTURE_SIZE, TEXTURE_SIZE)
        else:
            size = resized(size, short, self.longest)
            picture = reader.photo(i, (size[1], size[0]))
        codes = reader.codes(i) if reader.map_level in reader.levels else None
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            codes = codes if codes is None else codes[:, ::-1]
        return picture, size, codes


def texture_square(reader: Reader, i: int, place: float) -> Image.Image:
    """Image i of DTD at a short side of TEXTURE_SIZE, cut to a square at `place` (0 to 1) along the long side."""
    height, width = resized(tuple(reader.index.sizes[i].tolist()), TEXTURE_SIZE, 10**6)
    picture = reader.photo(i, (width, height)).resize((width, height), Image.Resampling.BILINEAR)
    left, top = round(place * (width - TEXTURE_SIZE)), round(place * (height - TEXTURE_SIZE))
    return picture.crop((left, top, left + TEXTURE_SIZE, top + TEXTURE_SIZE))


def whole_image(
    picture: Image.Image, size: tuple[int, int], multiple: int | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """(images (1, 3, H, W) uint8, the (height, width) of it that the picture fills): the picture at `size`, padded as
    in training; or, with `multiple`, stretched up to a multiple of that instead, as the authors do."""
    if multiple:
        size = tuple(math.ceil(n / multiple) * multiple for n in size)
        return torch.from_numpy(padded_image(picture, size, *size))[None], size
    return torch.from_numpy(padded_image(picture, size, padded(size[0]), padded(size[1])))[None], size


class Whole(torch.utils.data.Dataset):
    """Images for evaluation, one at a time, with labels at their own size.

    Element k is a dict: `file`, `images` and `size` as from `whole_image`, and the labels as from `Reader.labels`, as
    tensors. DTD's images are squares of TEXTURE_SIZE.
    """

    def __init__(
        self,
        readers: dict[str, Reader],
        chosen: list[tuple[str, int]],
        short: int,
        longest: int,
        multiple: int | None = None,
    ):
        self.readers, self.chosen = readers, chosen
        self.short, self.longest, self.multiple = short, longest, multiple

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, k: int) -> dict:
        source, i = self.chosen[k]
        reader = self.readers[source]
        if source == "dtd":
            images, size = whole_image(texture_square(reader, i, 0.5), (TEXTURE_SIZE, TEXTURE_SIZE))
        else:
            size = resized(tuple(reader.index.sizes[i].tolist()), self.short, self.longest)
            images, size = whole_image(reader.photo(i, (size[1], size[0])), size, self.multiple)
        labels = {level: torch.as_tensor(value) for level, value in reader.labels(i).items()}
        return {"file": reader.index.images[i], "images": images, "size": size, **labels}


# ---------------------------------------------------------------- the toy: drawn scenes and textures, in those layouts


TOY_COLOURS = {  # ranges of hue, saturation and value
    "any": ((0, 1), (0.15, 0.65), (0.35, 0.95)), "dull": ((0, 1), (0.05, 0.5), (0.4, 0.95)),
    "grey": ((0, 1), (0, 0.2), (0.3, 0.75)), "pale": ((0, 1), (0.05, 0.4), (0.6, 1)),
    "brown": ((0.95, 1.15), (0.15, 0.6), (0.3, 0.8)), "green": ((0.1, 0.4), (0.3, 0.7), (0.35, 0.85)),
    "blue": ((0.46, 0.64), (0.2, 0.65), (0.5, 0.95)), "dusk": ((0.92, 1.12), (0.15, 0.5), (0.6, 1)),
    "sand": ((0.07, 0.15), (0.2, 0.5), (0.65, 1)), "skin": ((0.04, 0.09), (0.3, 0.55), (0.45, 1)),
    "dark": ((0, 1), (0, 0.1), (0.2, 0.35)), "warm": ((0.03, 0.18), (0.2, 0.6), (0.6, 1)),
}  # fmt: skip

# Of each thing its strokes: part, substances to pick from, colour (a number after it: one of several), shape, and
# points from the feet, in heights of the thing, x to the right and y upwards: corners of a box for rectangle and
# ellipse.
TOY_THINGS = {
    "mountain": [(None, "Stone", "dull", "polygon", (-1.5, 0, -0.2, 0.9, 0, 1, 0.3, 0.8, 1.5, 0))],
    "building": [
        (None, "Brick|Stone|Wood|Painted|Glass|Metal", "dull", "rectangle", (-0.34, 0, 0.34, 0.8)),
        ("roof", "Tile|Metal", "any", "polygon", (-0.42, 0.78, -0.22, 1, 0.22, 1, 0.42, 0.78)),
        *(("window", "Glass", "blue", "rectangle", (x - 0.08, y, x + 0.08, y + 0.16))
          for x in (-0.2, 0.04, 0.24) for y in (0.34, 0.57)),
        ("door", "Wood", "any2", "rectangle", (-0.1, 0, 0.08, 0.26)),
    ],
    "tree": [
        ("trunk", "Wood", "brown", "rectangle", (-0.07, 0, 0.07, 0.5)),
        *(("crown", "Foliage", "green", "ellipse", (x - 0.3, y - 0.28, x + 0.3, y + 0.28))
          for x, y in ((0, 0.72), (-0.13, 0.6), (0.14, 0.62))),
    ],
    "car": [
        (None, "Metal", "any", "polygon",
         (-1, 0.16, -1, 0.6, -0.65, 0.62, -0.42, 1, 0.4, 1, 0.7, 0.62, 1.02, 0.55, 1.02, 0.16)),
        ("window", "Glass", "blue", "polygon", (-0.52, 0.62, -0.34, 0.92, 0.32, 0.92, 0.54, 0.62)),
        *(("wheel", "Wax", "dark", "ellipse", (x - 0.25, -0.02, x + 0.25, 0.46)) for x in (-0.58, 0.58)),
    ],
    "person": [
        ("left leg", "Fabric/Cloth", "any", "rectangle", (-0.14, 0, -0.01, 0.45)),
        ("right leg", "Fabric/Cloth", "any", "rectangle", (0.01, 0, 0.14, 0.45)),
        ("torso", "Fabric/Cloth", "any2", "polygon", (-0.21, 0.76, 0.21, 0.76, 0.15, 0.4, -0.15, 0.4)),
        ("head", "Wax", "skin", "ellipse", (-0.12, 0.74, 0.12, 1)),
    ],
    "boat": [
        ("hull", "Wood|Painted", "any", "polygon", (-0.38, 0, -0.58, 0.3, 0.58, 0.3, 0.4, 0)),
        ("sail", "Fabric/Cloth", "any2", "polygon", (-0.03, 0.34, -0.03, 1, -0.42, 0.34)),
        ("sail", "Fabric/Cloth", "any3", "polygon", (0.03, 0.34, 0.03, 1, 0.42, 0.34)),
    ],
    "sunshade": [
        ("pole", "Wood", "any", "rectangle", (-0.05, 0, 0.05, 0.75)),
        ("canopy", "Fabric/Cloth", "any2", "polygon", (-0.52, 0.58, -0.32, 0.88, 0, 1, 0.32, 0.88, 0.52, 0.58)),
    ],
    "painting": [
        ("frame", "Wood", "any", "rectangle", (-0.6, 0, 0.6, 1)),
        ("canvas", "Painted", "any2", "rectangle", (-0.42, 0.18, 0.42, 0.82)),
    ],
    "lamp": [
        ("base", "Wood", "any", "polygon",
         (-0.2, 0, -0.2, 0.08, -0.06, 0.12, -0.06, 0.7, 0.06, 0.7, 0.06, 0.12, 0.2, 0.08, 0.2, 0)),
        ("shade", "Fabric/Cloth|Glass", "warm", "polygon", (-0.34, 0.55, -0.2, 1, 0.2, 1, 0.34, 0.55)),
    ],
    "bed": [
        ("headboard", "Wood", "any", "rectangle", (-0.85, 0, -0.64, 1)),
        (None, "Fabric/Cloth", "any2", "rectangle", (-0.64, 0.08, 0.85, 0.52)),
        ("pillow", "Fabric/Cloth", "any3", "ellipse", (-0.64, 0.44, -0.16, 0.76)),
    ],
    "table": [
        *(("leg", "Wood|Metal", "any", "rectangle", (x - 0.12, 0, x + 0.12, 0.8)) for x in (-0.76, 0.76)),
        ("top", "Wood|Glass|Stone", "any2", "polygon", (-1.05, 0.66, -0.85, 1, 0.85, 1, 1.05, 0.66)),
    ],
    "sofa": [
        ("back", "Fabric/Cloth", "any", "rectangle", (-0.9, 0.4, 0.9, 1)),
        *(("arm", "Fabric/Cloth", "any2", "rectangle", (x - 0.14, 0.08, x + 0.14, 0.7)) for x in (-0.9, 0.9)),
        ("seat", "Fabric/Cloth", "any", "rectangle", (-0.76, 0.12, 0.76, 0.48)),
    ],
}  # fmt: skip

# Of each kind of scene: ADE20K's path to it, what is behind, and what is on the ground from a share of its depth
# onwards (name, substances, colours); then things: at least, at most, where their feet are (share of the ground, 1 is
# nearest; negative: on the wall), how tall they are (share of the picture's short side).
TOY_SCENES = {
    "street": (
        "outdoor urban street", ("sky", "Sky", "blue|dusk|grey"),
        {0: ("road", "Stone|Concrete|Brick", "grey|brown|dull")},
        [("building", 1, 3, (0, 0.06), (0.5, 0.7)), ("tree", 0, 1, (0.03, 0.15), (0.5, 0.65)),
         ("car", 1, 2, (0.4, 0.9), (0.28, 0.4)), ("person", 0, 1, (0.6, 0.95), (0.6, 0.8))],
    ),
    "park": (
        "outdoor natural park", ("sky", "Sky", "blue|dusk|grey"), {0: ("grass", "Foliage", "green|green|sand")},
        [("mountain", 1, 2, (0, 0), (0.4, 0.55)), ("tree", 1, 3, (0.02, 0.6), (0.55, 0.75)),
         ("person", 0, 2, (0.6, 0.95), (0.6, 0.8))],
    ),
    "beach": (
        "outdoor natural beach", ("sky", "Sky", "blue|dusk|grey"),
        {0: ("sea", "Water", "blue"), 0.45: ("sand", "Dirt", "sand")},
        [("mountain", 0, 1, (0, 0), (0.4, 0.55)), ("boat", 1, 2, (0.15, 0.35), (0.5, 0.65)),
         ("sunshade", 0, 2, (0.6, 0.85), (0.6, 0.8)), ("person", 0, 1, (0.8, 0.95), (0.6, 0.8))],
    ),
    "bedroom": (
        "indoor home bedroom", ("wall", "Painted|Brick|Tile", "pale|dull"),
        {0: ("floor", "Wood|Tile|Stone", "brown|dull")},
        [("painting", 1, 2, (-0.8, -0.6), (0.3, 0.4)), ("lamp", 1, 2, (0.05, 0.3), (0.6, 0.75)),
         ("bed", 1, 1, (0.5, 0.9), (0.5, 0.65))],
    ),
    "living_room": (
        "indoor home living_room", ("wall", "Painted|Brick|Tile", "pale|dull"),
        {0: ("floor", "Wood|Tile|Stone", "brown|dull")},
        [("painting", 1, 2, (-0.8, -0.6), (0.3, 0.4)), ("lamp", 0, 1, (0.02, 0.1), (0.6, 0.75)),
         ("sofa", 1, 1, (0.2, 0.4), (0.45, 0.6)), ("table", 0, 1, (0.8, 0.95), (0.42, 0.52))],
    ),
}  # fmt: skip
TOY_SUBSTANCES = "Brick,Wood,Tile,Stone,Fabric/Cloth,Metal,Foliage,Glass,Painted,Concrete,Sky,Water,Dirt,Wax".split(",")
TOY_SYNONYMS = {
    "car": "car, auto",
    "building": "building, edifice",
    "person": "person, individual",
    "painting": "painting, picture",
}
TOY_NAMES = dict.fromkeys(
    [layer[0] for _, behind, ground, _ in TOY_SCENES.values() for layer in (behind, *ground.values())]
    + list(TOY_THINGS)
    + [part for strokes in TOY_THINGS.values() for part, *_ in strokes if part]
)
TOY_NUMBERS = {name: 61 * k for k, name in enumerate(TOY_NAMES, start=1)}  # beyond 255: they take both colour channels


def noise(rng: np.random.Generator, height: int, width: int, rows: float, columns: float) -> np.ndarray:
    """Smooth noise in [0, 1], (height, width), with a new value about every `rows` and `columns` pixels."""
    grid = rng.random((max(2, round(height / rows) + 1), max(2, round(width / columns) + 1))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def surface(substance: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """The relief of a material, in [0, 1], (height, width): what tells it from others whatever its colour."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + rng.random(2).astype(np.float32)[:, None, None] * 20
    smooth = lambda rows, columns: noise(rng, height, width, rows, columns)
    if substance == "Brick":
        tall = rng.uniform(7, 10)
        along = (x + np.floor(y / tall) % 2 * tall) % (2 * tall)
        return np.where((y % tall < 1.7) | (along < 1.7), 1, 0.25 * smooth(2, 2) + 0.15 * smooth(tall, 2 * tall))
    if substance == "Tile":
        side = rng.uniform(10, 15)
        return np.where((x % side < 1.8) | (y % side < 1.8), 0, 0.75 + 0.15 * smooth(side, side))
    if substance == "Wood":
        grain = np.sin((y + 5 * smooth(20, 40)) * rng.uniform(0.65, 0.95))
        return 0.5 + 0.3 * grain + 0.3 * (smooth(1.5, 25) - 0.5)
    if substance in ("Stone", "Concrete"):
        return 0.4 * smooth(7, 7) + 0.6 * smooth(2.5, 2.5)
    if substance == "Fabric/Cloth":
        period = rng.uniform(6, 9) / (2 * np.pi)
        return 0.5 + 0.25 * np.sin(x / period) + 0.25 * np.sin(y / period)
    if substance == "Metal":
        return 0.5 + 0.4 * np.sin(x / rng.uniform(1.3, 1.8)) + 0.2 * (smooth(30, 30) - 0.5)
    if substance == "Foliage":
        return np.clip((smooth(5, 5) - 0.5) * 2.5 + 0.5, 0, 1)
    if substance == "Glass":
        return 0.25 + 0.6 * (np.sin((x + y) / rng.uniform(3.5, 5)) > 0.55) + 0.1 * smooth(2, 2)
    if substance == "Water":
        return 0.5 + 0.35 * np.sin(y * 0.7 + 3 * smooth(6, 12)) * smooth(3, 10)
    if substance == "Sky":
        return np.clip(1.6 * smooth(20, 45) - 0.5, 0, 1) * 0.9
    if substance == "Dirt":
        return 0.4 + 0.35 * (smooth(2, 2) - 0.5)
    return 0.5 + 0.06 * (smooth(15, 15) - 0.5)  # paint and wax: plain


class Canvas:
    """A toy scene, painted far things first: its picture and, for every pixel, its object, part and substance."""

    def __init__(self, kind: str, width: int, height: int, rng: np.random.Generator):
        self.width, self.height, self.rng = width, height, rng
        self.picture = np.zeros((height, width, 3), np.float32)
        self.objects, self.parts, self.substances = (np.zeros((height, width), np.int32) for _ in range(3))
        self.things: list[tuple[str, set[str]]] = []  # each thing that was painted, with its parts
        _, behind, ground, things = TOY_SCENES[kind]
        horizon = height * (rng.uniform(0.42, 0.6) if behind[0] == "sky" else rng.uniform(0.58, 0.72))
        for depth, layer in ((None, behind), *ground.items()):
            top = -2 if depth is None else horizon + depth * (height - horizon)
            box = [(-2, top), (width + 2, height + 2)]
            self.things.append((layer[0], set()))
            self.stroke(layer[0], None, layer[1], self.colour(layer[2]), "rectangle", box)
        for thing, least, most, depths, sizes in things:
            for depth in sorted(rng.uniform(*depths, rng.integers(least, most + 1))):
                feet = horizon + depth * (height - horizon)
                self.thing(thing, rng.uniform(0.1, 0.9) * width, feet, rng.uniform(*sizes) * min(width, height))

    def colour(self, choices: str) -> np.ndarray:
        """A colour of one of TOY_COLOURS' ranges, (3,) in [0, 255]."""
        ranges = TOY_COLOURS[self.rng.choice(choices.split("|")).rstrip("0123456789")]
        hue, saturation, value = (self.rng.uniform(*bounds) for bounds in ranges)
        return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))

    def thing(self, thing: str, x: float, y: float, size: float) -> None:
        """One of TOY_THINGS with its feet at (x, y), `size` pixels tall, a little wider or narrower than the next, at
        times the other way round."""
        across = size * self.rng.uniform(0.85, 1.15) * self.rng.choice([-1, 1])
        colours: dict[str, np.ndarray] = {}
        self.things.append((thing, set()))
        for part, substances, colour, shape, points in TOY_THINGS[thing]:
            colours.setdefault(colour, self.colour(colour))
            placed = [(x + across * px, y - size * py) for px, py in zip(points[::2], points[1::2])]
            self.stroke(thing, part, substances, colours[colour], shape, placed)

    def stroke(
        self, thing: str, part: str | None, substances: str, colour: np.ndarray, shape: str, points: list
    ) -> None:
        """Fills a shape ("rectangle" or "ellipse" by two corners, "polygon"; pixels) with a substance."""
        substance = str(self.rng.choice(substances.split("|")))
        xs, ys = zip(*points)
        left, top = max(0, math.floor(min(xs)) - 1), max(0, math.floor(min(ys)) - 1)
        right, bottom = min(self.width, math.ceil(max(xs)) + 2), min(self.height, math.ceil(max(ys)) + 2)
        if right <= left or bottom <= top:
            return
        fine = Image.new("L", (4 * (right - left), 4 * (bottom - top)))  # drawn at four times the size for smooth edges
        if shape != "polygon":
            points = [(min(xs), min(ys)), (max(xs), max(ys))]
        getattr(ImageDraw.Draw(fine), shape)([(4 * float(x - left), 4 * float(y - top)) for x, y in points], fill=255)
        cover = np.asarray(fine.resize((right - left, bottom - top), Image.Resampling.BOX))[..., None] / np.float32(255)
        relief = surface(substance, bottom - top, right - left, self.rng)[..., None].astype(np.float32)
        box = slice(top, bottom), slice(left, right)
        self.picture[box] = self.picture[box] * (1 - cover) + cover * (
            colour * (0.6 + 0.55 * relief) + 30 * (relief > 0.97)
        )
        inside = cover[..., 0] > 0.5
        self.objects[box][inside] = TOY_NUMBERS[thing]
        self.parts[box][inside] = TOY_NUMBERS[part] if part else 0
        self.substances[box][inside] = TOY_SUBSTANCES.index(substance) + 1
        if part:
            self.things[-1][1].add(part)

    def lit(self) -> Image.Image:
        """The picture under an uneven light."""
        light = 0.85 + 0.3 * noise(self.rng, self.height, self.width, self.height, self.width)
        return Image.fromarray((self.picture * light[..., None]).clip(0, 255).astype(np.uint8))


def texture_relief(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A procedural texture in [0, 1], (size, size), at any angle and of varying scale; the names are DTD's."""
    y, x = np.mgrid[:size, :size].astype(np.float32) - size / 2
    angle, step = rng.uniform(0, np.pi), rng.uniform(12, 17)
    u = (x * np.cos(angle) + y * np.sin(angle)) / step + rng.random()
    v = (y * np.cos(angle) - x * np.sin(angle)) / step + rng.random()
    if kind == "banded":
        return (u % 1 < rng.uniform(0.4, 0.6)).astype(np.float32)
    if kind == "chequered":
        return ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    if kind == "polka-dotted":
        return ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1).astype(np.float32)
    if kind == "grid":
        return ((u % 1 < 0.16) | (v % 1 < 0.16)).astype(np.float32)
    if kind == "zigzagged":
        return ((u + np.abs(v % 1 - 0.5) * 1.4) % 1 < 0.5).astype(np.float32)
    if kind == "spiralled":
        return ((np.hypot(x, y) / step + np.arctan2(y, x) / (2 * np.pi)) % 1 < 0.5).astype(np.float32)
    centres = rng.uniform(-size / 2, size / 2, (round((size / step) ** 2 * 1.2), 2, 1, 1))
    nearest, second = np.partition(np.hypot(x - centres[:, 0], y - centres[:, 1]), (0, 1), axis=0)[:2]
    if kind == "cracked":
        return (second - nearest > 1.6).astype(np.float32)
    return np.clip(1.1 - (nearest / step / 0.7) ** 2, 0, 1)  # bubbly


TOY_TEXTURES = "banded bubbly chequered cracked grid polka-dotted spiralled zigzagged".split()


def make_toy(folder: str, scenes: int = 400, photos: int = 320, textures: int = 100) -> None:
    """Writes the toy under `folder`: ade20k/, os/ and dtd/ with `scenes` and `photos` pictures and `textures` of each
    kind.

    The layouts are those of ADE20K 2021_17_01, of OpenSurfaces and of DTD. Always the same files. Nothing is done when
    the folder is there; it appears whole or not at all. Raises UserError if it cannot be written.
    """
    if os.path.isdir(folder):
        return
    temporary = f"{folder}.{os.getpid()}.tmp"
    writers = (
        (write_toy_scene, os.path.join(temporary, "ade20k", "ADE20K_2021_17_01"), scenes),
        (write_toy_photo, os.path.join(temporary, "os"), photos),
        (write_toy_texture, os.path.join(temporary, "dtd"), textures * len(TOY_TEXTURES)),
    )
    try:
        with tqdm(
            total=sum(n for *_, n in writers), desc="drawing the toy", unit=" images", disable=None, leave=False
        ) as bar:
            for writer, place, n in writers:
                for k in range(n):
                    writer(place, k)
                    bar.update()
        write_text(
            os.path.join(temporary, "os", "photos.csv"), "photo_id\n" + "".join(f"{k + 1}\n" for k in range(photos))
        )
        table = "".join(f"{100 + k},{name},{k}\n" for k, name in enumerate(TOY_SUBSTANCES, start=1))
        write_text(
            os.path.join(temporary, "os", "label-substance-colors.csv"),
            f"substance_id,substance_name,red_color\n{table}",
        )
        for name, numbers in (
            ("train1", range(0, textures, 2)),
            ("val1", range(1, textures, 4)),
            ("test1", range(3, textures, 4)),
        ):
            listed = "".join(f"{kind}/{kind}_{n:04d}.jpg\n" for kind in TOY_TEXTURES for n in numbers)
            write_text(os.path.join(temporary, "dtd", "labels", f"{name}.txt"), listed)
        os.rename(temporary, folder)
    except OSError as e:
        raise UserError(
            f"{folder}: the toy cannot be written there ({e.strerror}); choose another folder with --root"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


def toy_canvas(stream: int, k: int) -> tuple[Canvas, str]:
    """The k-th scene of a stream of them, a quarter of them upright, and its kind."""
    rng = np.random.default_rng((SEED, stream, k))
    size = (96, 144) if rng.random() < 0.25 else (144, 96)
    kind = list(TOY_SCENES)[k % len(TOY_SCENES)]
    return Canvas(kind, *size, rng), kind


def write_toy_scene(folder: str, k: int) -> None:
    canvas, kind = toy_canvas(0, k)
    path = TOY_SCENES[kind][0].split()
    official, short = ("validation", "val") if k % 10 == 9 else ("training", "train")
    stem = os.path.join(folder, "images", "ADE", official, *path[1:], f"ADE_{short}_{k:08d}")
    entries: list[dict] = []
    for thing, parts in canvas.things:
        owner = len(entries)
        entries.append({"name": thing, "parts": {"hasparts": [], "ispartof": [], "part_level": 0}})
        for part in sorted(parts):
            entries.append({"name": part, "parts": {"hasparts": [], "ispartof": owner, "part_level": 1}})
    for number, entry in enumerate(entries):
        entry |= {
            "id": number,
            "name_ndx": TOY_NUMBERS[entry["name"]],
            "name": TOY_SYNONYMS.get(entry["name"], entry["name"]),
        }
    write_text(f"{stem}.json", json.dumps({"annotation": {"scene": path, "object": entries}}))
    canvas.lit().save(f"{stem}.jpg", quality=92)
    for ending, numbers in (("seg", canvas.objects), ("parts_1", canvas.parts)):
        if numbers.any():
            coded = np.stack([numbers // 256 * 10, numbers % 256, np.zeros_like(numbers)], axis=-1)
            Image.fromarray(coded.astype(np.uint8)).save(f"{stem}_{ending}.png")


def write_toy_photo(folder: str, k: int) -> None:
    canvas, _ = toy_canvas(1, k)
    for name in ("photos", "photos-labels"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    canvas.lit().save(os.path.join(folder, "photos", f"{k + 1}.jpg"), quality=92)
    labels = np.zeros((canvas.height, canvas.width, 3), np.uint8)
    labels[..., 0] = canvas.substances
    larger = (canvas.width * 3 // 2, canvas.height * 3 // 2)  # as in the release, not the photo's size
    Image.fromarray(labels).resize(larger, Image.Resampling.NEAREST).save(
        os.path.join(folder, "photos-labels", f"{k + 1}.png")
    )


def write_toy_texture(folder: str, k: int) -> None:
    rng = np.random.default_rng((SEED, 2, k))
    n, kind = k // len(TOY_TEXTURES), TOY_TEXTURES[k % len(TOY_TEXTURES)]
    relief = texture_relief(kind, 112, rng)[..., None]
    values = rng.permutation([rng.uniform(0.1, 0.4), rng.uniform(0.7, 1)])
    first, second = (
        255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.8), value)) for value in values
    )
    light = 0.85 + 0.3 * noise(rng, 112, 112, 112, 112)[..., None]
    picture = Image.fromarray(((first * (1 - relief) + second * relief) * light).clip(0, 255).astype(np.uint8))
    height, width = rng.integers(84, 113, 2)
    os.makedirs(os.path.join(folder, "images", kind), exist_ok=True)
    picture = picture.filter(ImageFilter.GaussianBlur(0.6)).crop((0, 0, width, height))
    picture.save(os.path.join(folder, "images", kind, f"{kind}_{n:04d}.jpg"), quality=90)


# ---------------------------------------------------------------- from a command line to indexes


def add_data_options(parser: argparse.ArgumentParser, data: str | None = "toy") -> None:
    """The options of every script that scans, and --help."""
    group = parser.add_argument_group("data")
    sources = ",".join(SOURCE_LEVELS)
    group.add_argument("--data", default=data, metavar="LIST", help=f"toy, or a comma list of {sources}")
    root, usual_root, usual_cache = ("data", "data", "<root>/.cache") if data else (None, *2 * ["the checkpoint's"])
    group.add_argument("--root", default=root, metavar="DIR", help=f"folder of ade20k/, os/, dtd/ ({usual_root})")
    group.add_argument("--cache", metavar="DIR", help=f"where indexes and prepared labels go ({usual_cache})")
    for option, what in (
        ("--min-images", "keep objects and materials in at least so many images"),
        ("--min-pixels", "keep objects of at least so many pixels"),
        ("--min-part-images", "keep parts in at least so many images"),
        ("--min-scene-images", "keep scenes of at least so many images"),
    ):
        usual, toy = (minima[option[2:].replace("-", "_")] for minima in (MINIMA, TOY_MINIMA))
        shown = f"{what} ({usual if usual == toy else f'{usual}; toy {toy}'})"
        group.add_argument(option, type=positive, metavar="N", help=shown if data else "no effect on a trained network")
    group.add_argument("--allow-broken", action="store_true", help="go on though over one file in twenty is broken")
    group.add_argument("-h", "--help", action="help", help="this page")


def positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999999999")
    return int(text)


def chosen_sources(data: str) -> list[str]:
    """The sources that `--data` names. Raises UserError for a name that is none."""
    sources = list(SOURCE_LEVELS) if data == "toy" else [name.strip() for name in data.split(",")]
    for name in sources:
        if name not in SOURCE_LEVELS:
            raise UserError(f"--data {data}: '{name}' is not one of toy, {', '.join(SOURCE_LEVELS)}")
    return list(dict.fromkeys(sources))


def data_root(args: argparse.Namespace) -> str:
    return os.path.join(args.root, "toy") if args.data == "toy" else args.root


def cache_folder(args: argparse.Namespace) -> str:
    return args.cache or os.path.join(data_root(args), ".cache")


def open_sources(args: argparse.Namespace) -> tuple[dict[str, Index], dict[str, int]]:
    """The index of every source that the options name, and the vocabulary's thresholds. Makes the toy if it is asked
    for."""
    sources, root = chosen_sources(args.data), data_root(args)
    if args.data == "toy":
        if not os.path.isdir(root) and is_first():
            print(f"drawing the toy data into {root}", flush=True)
        make_toy(root)
    usual = TOY_MINIMA if args.data == "toy" else MINIMA
    minima = {name: getattr(args, name) or usual[name] for name in usual}
    return {source: scan(root, source, cache_folder(args), args.allow_broken) for source in sources}, minima


def pixel_table(index: Index, vocabulary: dict) -> torch.Tensor:
    """What a split is balanced in: a sparse (images, classes) tensor of pixels, all levels of the source side by side.

    Our choice: scenes and textures, which have no pixels, count one for each image.
    """
    rows, columns, values, column = [], [], [], 0
    for level, table in class_pixels(index).items():
        for name, images in table.items():
            if level == "part":
                kept = name[1] in vocabulary.get("part", {}).get(name[0], ())
            else:
                kept = name in vocabulary.get(level, ())
            if kept:
                rows += images.keys()
                values += images.values()
                columns += [column] * len(images)
                column += 1
    where = torch.tensor([rows, columns], dtype=torch.int64).reshape(2, -1)
    pixels = torch.tensor(values, dtype=torch.float64)
    return torch.sparse_coo_tensor(where, pixels, (len(index.images), column), check_invariants=True).coalesce()


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Scans data sets: what is there, in which classes, and what is broken.")
    add_data_options(parser)
    args = parser.parse_args(argv)
    allow_broken, args.allow_broken = args.allow_broken, True  # all that is broken is listed before the refusal
    try:
        indexes, minima = open_sources(args)
        vocabulary = build_vocabulary(indexes, minima)
    except UserError as e:
        parser.error(str(e))
    for source, index in indexes.items():
        heights, widths = index.sizes.double().median(dim=0).values.int().tolist()
        where = f"{index.folder} ({index.layout})"
        print(f"{source}: {len(index.images)} images in {where}, {heights} x {widths} in the middle")
        table = class_pixels(index)
        for level in SOURCE_LEVELS[source]:
            if level not in vocabulary:
                why = "no class is large enough: see the --min- options" if table.get(level) else "no labels"
                print(f"  {level:9s} {why}")
                continue
            names = vocabulary[level]
            n = sum(len(parts) - 1 for parts in names.values()) if level == "part" else len(names)
            pixels = sum(sum(images.values()) for images in table[level].values())
            unit = "images" if level in ("scene", "texture") else "pixels"
            shown = ", ".join(list(names)[:8]) + (", .." if len(names) > 8 else "")
            whole = f" of {len(names)} objects" if level == "part" else ""
            print(f"  {level:9s} {n} classes{whole}, {pixels:,} {unit} labelled: {shown}")
        for _, reason in index.broken:
            print(f"  set aside  {reason}")
    for index in indexes.values():
        try:
            refuse_broken(index, allow_broken)
        except UserError as e:
            parser.error(str(e))


if __name__ == "__main__":
    main()
