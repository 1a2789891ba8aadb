"""Three sources of the paper's Broden+ (section 2.1): ADE20K, OpenSurfaces and DTD; one's own data; and a toy.

    python datasets.py --data ade20k,os,dtd --root data   # scans: what is there, and what is broken

`scan` opens every file of a source once and keeps what it found, an `Index`. `build_vocabulary` makes the class names
of each level from the indexes. A `Source` is an index read with a vocabulary: photos and labels, for batches."""

import argparse, collections, colorsys, contextlib, csv, datetime, hashlib, json, math
import multiprocessing, os, re, signal, sys, tempfile, warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

import upernet

SOURCE_LEVELS = {"ade20k": ("scene", "object", "part"), "os": ("material",), "dtd": ("texture",)}
MEAN_COLOUR = (124, 116, 104)  # ImageNet's, the colour of padding: zero after the network's normalisation
TEXTURE_SIZE = 64  # section 3: "roughly 64x64"; ours: short side 64, then a square of it
padded = lambda size: math.ceil(size / 32) * 32  # pixels, up to the coarsest stride of the network
SEED = 304  # of the toy's files and of every split; --seed is about training


# ---------------------------------------------------------------- data set layouts
PICTURE, SIDE = r"\.(?:jpg|jpeg|png)", r"(?P<official>train|val)(?:ing|idation)?"
ADE2021_FILES = {"labels": r"\1_seg.png", "parts": r"\1_parts_1.png", "json": r"\1.json"}  # parts of parts: unused
LAYOUTS = {  # source, what only its folder has, pattern of its images' paths, templates of their label files
    "ade2021": ("ade20k", "images/ADE", rf"(images/ADE/{SIDE}/.+)\.jpg", ADE2021_FILES),
    # ADEChallengeData2016, and anybody's own data:
    "sceneparsing": ("ade20k", "annotations", rf"images/((?:{SIDE}/)?.+){PICTURE}", {"labels": r"annotations/\1.png"}),
    "os": ("os", "photos-labels", rf"photos/([^/]+){PICTURE}", {"labels": r"photos-labels/\1.png"}),
    "dtd": ("dtd", "labels/train1.txt", rf"images/([^/]+/[^/]+){PICTURE}", {}),
}
FOLDERS = ("images", "annotations", "photos", "photos-labels", "labels")  # what else is in a folder is not data
TABLES = {"objectInfo150.txt": "a header; then number from 1, tab, .., name a line", "classes.txt": "one name a line"}
TABLES |= {"label-substance-colors.csv": "columns substance_name, red_color"}  # of classes; the first that is there


class Index(NamedTuple):
    """What one scan of a source found. Class numbers are the source's own."""

    source: str  # ade20k, os, dtd
    layout: str  # a key of LAYOUTS
    folder: str
    fingerprint: str  # of the names, sizes and times of the source's files
    images: list[str]  # paths relative to the folder
    sizes: torch.Tensor  # (images, 2), height and width
    official: list[str]  # "train", "val" or "" for each image
    tags: list[str]  # the scene or texture of each image, "" for none
    pixels: torch.Tensor  # (rows, 4): image, class number, part number or 0 for the whole object, pixels
    names: dict[int, str]  # of ADE20K's objects and parts, OpenSurfaces' substances, or a class table, by number
    broken: list[list[str]]  # [path, reason] of the images that were set aside


def find_folder(root: str, source: str) -> tuple[str, str]:
    """(layout, folder) of a source below `root`, directly or one folder down. Raises UserError for none and for two."""
    tops = [os.path.join(root, name) for name in (("os", "opensurfaces") if source == "os" else (source,))]
    places = [root] if source == "ade20k" else []  # one's own images/ and annotations/ need no folder around them
    for top in filter(os.path.isdir, tops):
        places += [top] + sorted(entry.path for entry in os.scandir(top) if entry.is_dir())
    marks = {layout: mark for layout, (of, mark, _, _) in LAYOUTS.items() if of == source}
    found = [(n, p) for p in places for n, mark in marks.items() if os.path.exists(os.path.join(p, mark))]
    if len(found) == 1:
        return found[0]
    where = " or ".join(dict.fromkeys(places[:1] + tops))
    problem = f"no {' or '.join(marks.values())} in {where}, or one folder down; see --root, --data"
    if found:
        problem = f"two data sets, {found[0][1]} and {found[1][1]}; move one away, or let --root name one"
    elif any(os.path.exists(os.path.join(place, "index_ade20k.mat")) for place in places):
        problem = "2016_07_26 has its names in a MATLAB file; get ADE20K_2021_17_01, the same images with JSON"
    raise UserError(f"{source}: {problem}")


def list_files(layout: str, folder: str) -> tuple[list[dict[str, str]], str]:
    """The images of a source with their label files, and a fingerprint of all files' names, sizes and times.
    Of each image `image`, a path in the folder, `official` (see `Index`), `tag` where the scene or texture is outside
    of its own files, and the layout's label files; parts only where they exist."""
    walks = [walk for top in FOLDERS for walk in os.walk(os.path.join(folder, top), followlinks=True)]
    paths = [path for base, _, names in walks for name in names if os.path.isfile(path := os.path.join(base, name))]
    paths += [path for name in (*TABLES, "sceneCategories.txt") if os.path.exists(path := os.path.join(folder, name))]
    stats = {name: os.stat(p) for p in paths if "/." not in (name := os.path.relpath(p, folder).replace(os.sep, "/"))}
    (_, mark, pattern, templates), files = LAYOUTS[layout], []
    for path in sorted(stats):
        if match := re.fullmatch(pattern, path, re.IGNORECASE):
            entry = {"image": path, "official": (match.groupdict().get("official") or "").lower()}
            entry |= {kind: match.expand(template) for kind, template in templates.items()}
            files.append({kind: name for kind, name in entry.items() if kind != "parts" or name in stats})
    if not files:
        raise UserError(f"{folder}: has {mark}, but no .jpg or .png photos where layout {layout} has them")
    masks = {path for path in stats if mark in FOLDERS and re.fullmatch(f"{mark}/.*png", path)}
    if alone := sorted(masks - {entry.get("labels") for entry in files}):
        warn(f"{folder}: masks without a photo of their name (.jpg, .png): {len(alone)}, first {alone[0]}")
    if layout == "sceneparsing":
        lines = read_lines(folder, "sceneCategories.txt") if "sceneCategories.txt" in stats else []
        scenes = dict(line.lower().split()[:2] for line in lines if len(line.split()) > 1)
        for entry in files:
            entry["tag"] = scenes.get(Path(entry["image"]).stem.lower(), "")
    if layout == "dtd":  # train1 + val1 against test1; an image in no list belongs to neither
        sides = {"train1": "train", "val1": "train", "test1": "val"}
        official = {line.strip(): side for n, side in sides.items() for line in read_lines(folder, f"labels/{n}.txt")}
        for entry in files:
            _, entry["tag"], name = entry["image"].split("/")
            entry["official"] = official.get(f"{entry['tag']}/{name}", "")
    return files, hash_of([LAYOUTS[layout], sorted((p, s.st_size, s.st_mtime_ns) for p, s in stats.items())])


def read_lines(*path: str) -> list[str]:
    """The lines of a text file, UTF-8, UTF-16 with its mark, or Latin-1."""
    content = Path(*path).read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").splitlines()
    return content.decode("latin-1").splitlines()


def label_numbers(path: str, layout: str, photo_size: tuple[int, int] | None = None) -> np.ndarray:
    """Class numbers (H, W) int32 of a label picture as the layout encodes them (OpenSurfaces: red); 0 is unlabelled.
    Raises ValueError if its (width, height) is not `photo_size`, and for colours where there should be numbers."""
    with Image.open(path) as picture:
        if photo_size and picture.size != photo_size:
            sizes = "{} x {} pixels, its photo {} x {}".format(*picture.size, *photo_size)
            raise ValueError(f"{sizes}; turn it as the photo's EXIF says, or resize with the nearest neighbour")
        if layout == "sceneparsing" and picture.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
            return np.asarray(picture).astype(np.int32)
        channels = np.asarray(picture.convert("RGB")).astype(np.int32)
    if layout == "sceneparsing" and (channels != channels[..., :1]).any():
        raise ValueError("a mask in colours; replace each by its number, counted from 1, in a picture of one channel")
    return channels[..., 0] // 10 * 256 + channels[..., 1] if layout == "ade2021" else channels[..., 0]


def open_photo(path: str, box: tuple[int, int] | None = None) -> Image.Image:
    """A photo of any mode in RGB, turned as its EXIF data say; with a `box` of (width, height) perhaps reduced, but to
    no less than the box. Raises UserError with its name if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # beyond Pillow's limit on pixels there is an error
            with Image.open(path) as picture:
                picture.draft("RGB", box or picture.size)  # libjpeg decodes at 1/2, 1/4 or 1/8 for less work
                return rgb(ImageOps.exif_transpose(picture))
    except Exception as e:  # whatever a decoder makes of a damaged file
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or f'cannot be read as a picture ({e})'}") from None


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB: transparent pixels on white, 16 bits scaled to 8."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# ---------------------------------------------------------------- the scan
def scan(root: str, source: str, cache: str, allow_broken: bool = False) -> Index:
    """The index of a source: from the cache unless a file was added, removed or changed, else by opening every file.
    UserError if it is missing or unlabelled, or over one file in twenty is broken without `allow_broken`."""
    layout, folder = find_folder(root, source)
    files, fingerprint = list_files(layout, folder)
    path, index = os.path.join(cache, f"{source}.index.pt"), None
    with contextlib.suppress(Exception):  # missing or damaged: it is rebuilt
        stored = torch.load(path, weights_only=True)
        index = Index(**stored | {"folder": folder}) if stored["fingerprint"] == fingerprint else None
    if index is None:
        index = Index(source, layout, folder, fingerprint, *scan_files(source, layout, folder, files))
        write_file(path, lambda name: torch.save(index._asdict(), name), "choose another folder with --cache")
    if index.broken:
        found = f"{source}: {len(index.broken)} of {len(files)} images set aside, the first: {index.broken[0][1]}"
        if not index.images or len(index.broken) > 0.05 * len(files) and not allow_broken:
            raise UserError(found + ("; --allow-broken goes ahead without them" if index.images else "; none is left"))
        warn(found)
    check_numbers(index)
    return index


UNLABELLED = "0 and 255 are unlabelled: write 1 for the object, 2 for what is not; or add 1 to every class first"
zero_pixels = lambda index: int(index.sizes.prod(dim=1).sum() - index.pixels[index.pixels[:, 2] == 0, 3].sum())


def check_numbers(index: Index) -> None:
    """Says which class numbers have no name or no pixel. UserError if one's own masks have no number with a name."""
    own, names, numbers = index.layout == "sceneparsing", index.names, set(index.pixels[:, 1:3].unique().tolist()) - {0}
    listed = lambda items: ", ".join(map(str, sorted(items)[:9]))
    if own and not numbers & names.keys() and not any(index.tags):
        found = f"no mask has a class ({listed(names) or '1, 2, ..'}), only {listed(numbers) or 0}"
        raise UserError(f"{index.folder}: {found}; {UNLABELLED}")
    if unknown := numbers - names.keys() - ({255} if own else set()):
        images = index.pixels[torch.isin(index.pixels[:, 1:3], torch.tensor([*unknown])).any(dim=1), 0].unique().numel()
        warn(f"{index.source}: numbers without a name, unlabelled in {images} images: {listed(unknown)}")
    if own and len(names) <= 40 and len(numbers & names.keys()) > 1:  # a table as small as one's own
        if unused := ", ".join([name for n, name in names.items() if n not in numbers][:9]):
            warn(f"{index.source}: no pixel of {unused}")
        if zero_pixels(index) and (unused or 255 in numbers - names.keys()):
            warn(f"{index.source}: {zero_pixels(index):,} pixels of 0, unlabelled; a class? add 1 to all but 255")


def scan_files(source: str, layout: str, folder: str, files: list[dict]) -> tuple:
    """The fields of an `Index` from `images` on."""
    tasks = [(layout, folder, entry) for entry in files]
    bar = dict(total=len(tasks), desc=f"scanning {source}", unit=" images", disable=None, leave=False)
    with multiprocessing.Pool() if len(tasks) >= 200 else contextlib.nullcontext() as pool:  # few are faster without
        found = pool.imap(scan_image, tasks, chunksize=16) if pool else map(scan_image, tasks)
        records = [entry | record for entry, record in zip(files, tqdm(found, **bar))]
    column = lambda key: [record[key] for record in records if "broken" not in record]
    rows = [(i, *row) for i, of_image in enumerate(column("pixels")) for row in of_image]
    pixels = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    names = {number: name for of_image in column("names") for number, name in of_image.items()}
    if layout in ("sceneparsing", "os"):
        names = class_table(layout, folder, pixels[:, 1].tolist())
    sizes = torch.tensor(column("size"), dtype=torch.int64).reshape(-1, 2)
    broken = [[record["image"], record["broken"]] for record in records if "broken" in record]
    return column("image"), sizes, column("official"), column("tag"), pixels, names, broken


def scan_image(task: tuple[str, str, dict]) -> dict:
    """Opens every file of one image: `size`, `tag`, `pixels` per class number, `names`; or why it is `broken`."""
    layout, folder, files = task
    current, maps = files["image"], {}
    try:
        with Image.open(os.path.join(folder, current)) as photo:
            width, height = photo.size[::-1] if photo.getexif().get(0x0112) in (5, 6, 7, 8) else photo.size
            photo.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth, which still notices a truncated one
            photo.load()
        found = {"size": (height, width), "tag": files.get("tag", ""), "pixels": [], "names": {}}
        if "json" in files:
            current = files["json"]
            annotation = json.loads("\n".join(read_lines(folder, current)))["annotation"]
            found["tag"] = ([""] + [name for name in annotation["scene"] if name])[-1].strip().lower()
            found["names"] = {int(o["name_ndx"]): str(o["name"]) for o in annotation["object"]}
        for kind in files.keys() & {"labels", "parts"}:
            current = files[kind]
            photo_size = None if layout == "os" else (width, height)
            maps[kind] = label_numbers(os.path.join(folder, current), layout, photo_size).astype(np.int64)
        if "labels" in maps:
            counts = np.bincount(maps["labels"].ravel())
            found["pixels"] = [(int(n), 0, int(counts[n])) for n in np.flatnonzero(counts) if n > 0]
        if "parts" in maps:
            both = (maps["parts"] > 0) & (maps["labels"] > 0)
            pairs, counts = np.unique(maps["labels"][both] << 16 | maps["parts"][both], return_counts=True)
            found["pixels"] += [(int(p >> 16), int(p & 0xFFFF), int(c)) for p, c in zip(pairs, counts)]
        return found | {"tag": "" if found["tag"] in ("misc", "unknown", "none", "~not labeled") else found["tag"]}
    except Exception as e:  # whatever a decoder makes of a damaged file
        reasons = {FileNotFoundError: "missing", ValueError: str(e), KeyError: f"has no {e}"}
        reason = reasons.get(type(e), f"unreadable ({e or type(e).__name__})")
        return {"broken": f"{current}: {' '.join(reason.split())}"}


def class_table(layout: str, folder: str, numbers: list[int]) -> dict[int, str]:
    """Number -> name. Of SceneParsing or one's own data from objectInfo150.txt, else classes.txt, else "class 1", ..;
    of OpenSurfaces from its table of substances, whose numbers are red values."""
    tables = [name for name in TABLES if name.endswith("csv") == (layout == "os")]
    name = next((name for name in tables if os.path.exists(os.path.join(folder, name))), tables[-1])
    path = os.path.join(folder, name)
    if layout == "sceneparsing" and not os.path.exists(path):
        return {n: f"class {n}" for n in range(1, max({*numbers} - {255, 65535}, default=0) + 1)}
    try:
        lines = read_lines(path)
        table = dict(enumerate("\n".join(lines).rstrip().split("\n"), start=1))  # classes.txt
        if layout == "os":
            table = {int(row["red_color"]): row["substance_name"] for row in csv.DictReader(lines)}
        elif name == "objectInfo150.txt":
            rows = [line.split("\t") for line in lines if line.strip()]  # the first may be a header
            table = {int(row[0]): row[1:][-1] for k, row in enumerate(rows) if k or row[0].strip().isdigit()}
        if layout != "os" and (wrong := [n for n in table or [0] if n < 1 or not table[n].strip()]):
            raise ValueError(f"class {wrong[0]} has no name, or is below 1 (unlabelled: add 1 to every class and mask)")
        return {number: name.strip() for number, name in sorted(table.items()) if name.strip()}
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: not a table of classes ({TABLES[name]}): {e}") from None


# ---------------------------------------------------------------- the vocabulary (section 2.1)
# OpenSurfaces' substances that are kept, and as what (released code); all others are unlabelled.
KEPT = "brick cardboard ceramic foliage food fur glass hair laminate leather metal mirror painted skin stone tile wood"
MATERIALS = {name: name for name in [*KEPT.split(), "wallpaper", "wicker"]} | {"concrete": "stone"}
MATERIALS |= {"plastic clear": "plastic", "plastic opaque": "plastic", "granite marble": "polished stone"}
MATERIALS |= {"fabric cloth": "fabric", "paper tissue": "paper", "rubber latex": "rubber/latex", "carpet rug": "carpet"}


def merged_names(names: dict[int, str], part: bool = False) -> dict[int, str]:
    """Number -> class name, where similar names are merged by rule (the released code has hand-made tables).
    The first synonym, in lower case; a plural becomes the singular when both occur; parts lose "left" and "right"."""
    first = {number: name.split(",")[0].strip().lower() for number, name in names.items()}
    if part:
        first = {number: re.sub(r"\b(left|right) +", "", name) for number, name in first.items()}
    forms, plurals = set(first.values()), ((r"s$", ""), (r"(s|x|z|ch|sh|o)es$", r"\1"), (r"ies$", "y"))
    singulars = lambda name: (re.sub(plural, end, name) for plural, end in plurals)
    return {n: next((s for s in singulars(name) if s != name and s in forms), name) for n, name in first.items()}


def class_names(index: Index) -> dict[str, dict]:
    """Level -> {number (or the name of a scene or texture) in the source's files: class name}, after merging."""
    tags = {tag: tag for tag in index.tags if tag}
    if index.source == "dtd":
        return {"texture": tags}
    if index.source == "os":
        plain = {number: re.sub("[^a-z]+", " ", name.lower()).strip() for number, name in index.names.items()}
        return {"material": {number: MATERIALS[name] for number, name in plain.items() if name in MATERIALS}}
    if index.layout == "sceneparsing":
        distinct = upernet.distinct_names(list(index.names.values()))
        return {"scene": tags, "object": dict(zip(index.names, distinct)), "part": {}}
    named = lambda column: {n: index.names[n] for n in index.pixels[:, column].unique().tolist() if n in index.names}
    return {"scene": tags, "object": merged_names(named(1)), "part": merged_names(named(2), part=True)}


def class_pixels(index: Index) -> dict[str, dict]:
    """Level -> class -> {image: pixels}, after merging and before any threshold. A class of part is (object, part).
    Scenes and textures, which have no pixels, count one for each image."""
    names = class_names(index)
    level, tag_level = "material" if index.source == "os" else "object", "texture" if index.source == "dtd" else "scene"
    rows = [(image, tag_level, tag, 1) for image, tag in enumerate(index.tags) if tag]
    for image, number, part, pixels in index.pixels.tolist():
        if (name := names[level].get(number)) is not None and part == 0:
            rows.append((image, level, name, pixels))
        elif name is not None and part in names["part"]:
            rows.append((image, "part", (name, names["part"][part]), pixels))
    table: dict[str, dict] = {level: {} for level in names}
    for image, level, name, pixels in rows:
        table[level].setdefault(name, collections.Counter())[image] += pixels
    return table


def build_vocabulary(indexes: dict[str, Index], minima: dict[str, int], levels: tuple = upernet.LEVELS) -> dict:
    """Level -> class names (part: object -> part names, "background" first), by the rules of section 2.1.
    Objects in at least `min_images` images with at least `min_pixels` pixels, largest first; parts of an object in at
    least `min_part_images` images; scenes in at least `min_scene_images`; materials in at least `min_images`; all
    textures. SceneParsing's objects, or one's own, are their whole table; UserError for one, if `levels` has object."""
    least = {"scene": minima["min_scene_images"], "object": minima["min_images"], "part": minima["min_part_images"]}
    least |= {"material": minima["min_images"], "texture": 1}
    vocabulary: dict = {}
    for index in indexes.values():
        for level, classes in class_pixels(index).items():
            pixels = {name: sum(images.values()) for name, images in classes.items()}
            kept = sorted(name for name, images in classes.items() if len(images) >= least[level])
            own = level == "object" and index.layout == "sceneparsing"
            if own:
                kept = list(class_names(index)["object"].values())
            elif level in ("object", "part"):
                kept.sort(key=lambda name: -pixels[name])
                kept = [name for name in kept if level == "part" or pixels[name] >= minima["min_pixels"]]
            if level == "object" and level in levels and (kept or own) and len(set(kept) & set(pixels)) < 2:
                raise UserError(f"{index.folder}: no two classes of objects have pixels; {UNLABELLED}")
            if level == "part":
                parts_of = lambda name: [part for owner, part in kept if owner == name and part != "background"]
                parts = {name: parts_of(name) for name in vocabulary.get("object", ())}
                kept = {name: ["background", *of_object] for name, of_object in parts.items() if of_object}
            vocabulary[level] = kept
    return {level: names for level, names in vocabulary.items() if names}


# ---------------------------------------------------------------- photos and labels
class Source:
    """An index read with a vocabulary: `photo(i)` and `labels(i)` of its images, labels as class indices.
    names: as `class_names` gives them, and those by default. cache, short, longest: where label maps are kept prepared
    for training, at the largest size that training has. `levels` are those of the source that the vocabulary has."""

    def __init__(self, index: Index, vocabulary: dict, names: dict | None = None, cache="", short=600, longest=1200):
        names = names or class_names(index)
        self.index, self.short, self.longest = index, short, longest
        known = lambda v: names.get(v) and set(names["object" if v == "part" else v].values()) & set(vocabulary[v])
        self.levels = [v for v in SOURCE_LEVELS[index.source] if v in vocabulary and known(v)]
        self.tag_level = {"ade20k": "scene", "dtd": "texture", "os": None}[index.source]
        self.map_level = {"ade20k": "object", "dtd": None, "os": "material"}[index.source]
        position = {v: {n: i for i, n in enumerate(vocabulary.get(v, ()))} for v in (self.tag_level, self.map_level)}
        self.tags = [position[self.tag_level].get(names.get(self.tag_level, {}).get(tag), -1) for tag in index.tags]
        # The files' number -> class index, -1 for none; (class index, part number) -> index in the object's list of
        # parts, 0 for none, with a last row of zeros for class -1.
        numbers, classes = names.get(self.map_level, {}), position[self.map_level]
        size = 1 + max(*numbers, *names.get("part", {}), *index.pixels[:, 1:3].unique().tolist(), 0, 0)
        self.class_of = np.array([classes.get(numbers.get(n), -1) for n in range(size)], np.int16)
        self.part_of = np.zeros((len(classes) + 1, size), np.uint8)
        for owner, parts in vocabulary.get("part", {}).items() if "part" in self.levels else ():
            for number, name in names["part"].items():
                self.part_of[classes[owner], number] = parts.index(name) if name in parts else 0
        self.with_parts = set(index.pixels[index.pixels[:, 2] > 0, 0].tolist())
        content = (index.fingerprint, [(level, vocabulary[level]) for level in self.levels], short, longest)
        self.prepared_folder = os.path.join(cache, f"{index.source}-{hash_of(content)}")

    def photo(self, i: int, box: tuple[int, int] | None = None) -> Image.Image:
        """Image i in RGB, see `open_photo`."""
        return open_photo(os.path.join(self.index.folder, self.index.images[i]), box)

    def labels(self, i: int) -> dict[str, np.ndarray | int]:
        """Image i's labels at their own size: object, material int16 (H, W), -1 for unlabelled; part uint8 (H, W), the
        index in the list of parts of the pixel's object, 0 elsewhere; scene, texture an index or -1."""
        (_, _, pattern, templates), image = LAYOUTS[self.index.layout], self.index.images[i]
        match, labels = re.fullmatch(pattern, image, re.IGNORECASE), {self.tag_level: self.tags[i]}
        path = lambda kind: os.path.join(self.index.folder, match.expand(templates[kind]))
        try:
            if self.map_level in self.levels:
                classes = self.class_of[label_numbers(path("labels"), self.index.layout)]
                labels |= {self.map_level: classes, "part": np.zeros(classes.shape, np.uint8)}
            if "part" in self.levels and i in self.with_parts:
                labels["part"] = self.part_of[classes, label_numbers(path("parts"), self.index.layout)]
        except Exception as e:
            raise UserError(f"{path('labels')}: no longer readable as labels ({e})") from None
        return {level: labels[level] for level in self.levels}

    def prepared(self, i: int) -> np.ndarray:
        """Image i's label map (h, w, 3) uint8, at most as large as training needs it: R and G are 1 + the class (0 for
        unlabelled), B is the index in the object's list of parts. Kept as a PNG in the cache, written when missing."""
        path = os.path.join(self.prepared_folder, f"{i}.png")
        with contextlib.suppress(OSError, SyntaxError), Image.open(path) as picture:  # missing or damaged
            return np.asarray(picture)
        labels = self.labels(i)
        classes = labels[self.map_level]
        size = np.minimum(resized(self.index.sizes[i].tolist(), self.short, self.longest), classes.shape).tolist()
        rows, columns = (centres(n, 1, n, full) for n, full in zip(size, classes.shape))
        code, part = (m[rows[:, None], columns] for m in (classes + 1, labels.get("part", np.zeros_like(classes))))
        code = np.stack([code >> 8, code & 255, part], axis=-1).astype(np.uint8)
        write_file(path, lambda name: Image.fromarray(code).save(name, "PNG", compress_level=1), "name another --cache")
        return code


def resized(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """(height, width) with the short side at `short`, or less so that the long side is at most `longest`."""
    scale = min(short / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def centres(cells: int, stride: int, n: int, full: int) -> np.ndarray:
    """Where the centres of `cells` cells of `stride` out of n pixels lie in a map of `full`: labels there, ours."""
    return (2 * np.arange(cells) + 1) * stride * full // (2 * n)


# ---------------------------------------------------------------- batches
def plan_batches(sizes: dict[str, dict[int, tuple[int, int]]], iterations: int, images: int, seed: int) -> np.ndarray:
    """The source and the images of each iteration: int32 (iterations, 1 + images); each row holds the source's
    position in `sizes`, then the image numbers. sizes: of each source, image number -> (height, width).
    Section 3.1: each iteration draws a source, with probability by its number of images; its images are of one
    orientation, to keep padding small. Ours: no image repeats before every image of its orientation was used."""
    rng, plan = np.random.default_rng(seed), np.empty((iterations, 1 + images), np.int32)
    counts = np.array([len(of_source) for of_source in sizes.values()])
    plan[:, 0] = rng.choice(len(counts), iterations, p=counts / counts.sum())
    for position, of_source in enumerate(sizes.values()):
        numbers, upright = np.array(list(of_source), np.int32), np.array([h > w for h, w in of_source.values()])
        turned = rng.random(iterations) < upright.mean()
        for orientation in (True, False):
            rows, bucket = (plan[:, 0] == position) & (turned == orientation), numbers[upright == orientation]
            n = rows.sum() * images
            passes = [rng.permutation(bucket) for _ in range(math.ceil(n / max(1, len(bucket))))]
            plan[rows, 1:] = np.concatenate([*passes, bucket[:0]])[:n].reshape(-1, images)
    return plan


def training_batch(k, sources: list, plan: np.ndarray, sizes: list, longest: int, seed: int, share=(1, 0, 1)) -> dict:
    """The k-th batch of a stage for one process: a function of plan and seed alone, so that neither the number of
    workers nor a pause changes it. share: (accumulate, rank, processes). Each iteration has `accumulate` batches, and
    processes take equal shares of its images. Returns a dict: `source`, `files`, `images` (N, 3, H, W) uint8 with H and
    W multiples of 32, and the labels as in `upernet.losses`, in small integer types. DTD's images are squares."""
    accumulate, rank, processes = share
    iteration, piece = divmod(k, accumulate)
    position, *numbers = plan[iteration].tolist()
    source, n = sources[position], len(numbers) // (accumulate * processes)
    first = (piece * processes + rank) * n
    numbers, samples = numbers[first : first + n], []
    # Section 3.1 draws the short side; ours: one for all images of an iteration, so that little is padded.
    short = int(np.random.default_rng((seed, iteration)).choice(sizes))
    for place, i in enumerate(numbers, start=first + 1):  # from 1: numpy takes (a, b, 0) for (a, b)
        rng = np.random.default_rng((seed, iteration, place))
        if source.index.source == "dtd":
            picture, size = texture_square(source, i, rng.random()), (TEXTURE_SIZE, TEXTURE_SIZE)
        else:
            size = resized(source.index.sizes[i].tolist(), short, longest)
            picture = source.photo(i, size[::-1])
        code = source.prepared(i) if source.map_level in source.levels else None
        if rng.random() < 0.5:  # in the authors' code, not in the paper
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            code = code if code is None else code[:, ::-1]
        samples.append((picture, size, code))
    height, width = (padded(max(side)) for side in zip(*(size for _, size, _ in samples)))
    images = np.stack([padded_image(picture, size, height, width) for picture, size, _ in samples])
    files = [source.index.images[i] for i in numbers]
    batch = {"source": source.index.source, "files": files, "images": torch.from_numpy(images)}
    if source.tag_level in source.levels:
        batch[source.tag_level] = torch.tensor([source.tags[i] for i in numbers], dtype=torch.int16)
    if source.map_level in source.levels:
        codes = np.zeros((n, height // 4, width // 4, 3), np.uint8)  # 0, unlabelled, in the padding
        for quarter, (_, size, code) in zip(codes, samples):
            rows, columns = (centres(math.ceil((s - 2) / 4), 4, s, full) for s, full in zip(size, code.shape))
            quarter[: len(rows), : len(columns)] = code[rows[:, None], columns]
        codes = torch.from_numpy(codes).to(torch.int16)
        batch[source.map_level] = 256 * codes[..., 0] + codes[..., 1] - 1
        batch |= {"part": codes[..., 2].to(torch.uint8)} if "part" in source.levels else {}
    return batch


def padded_image(picture: Image.Image, size: tuple[int, int], height: int, width: int) -> np.ndarray:
    """The picture resized to `size`, padded right and below with the mean colour: (3, height, width) uint8."""
    canvas = np.full((height, width, 3), MEAN_COLOUR, np.uint8)
    canvas[: size[0], : size[1]] = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1))


def texture_square(source: Source, i: int, place: float) -> Image.Image:
    """Image i of DTD at a short side of TEXTURE_SIZE, cut to a square at `place` (0 to 1) along the long side."""
    height, width = resized(source.index.sizes[i].tolist(), TEXTURE_SIZE, 10**6)
    picture = source.photo(i, (width, height)).resize((width, height), Image.Resampling.BILINEAR)
    left, top = round(place * (width - TEXTURE_SIZE)), round(place * (height - TEXTURE_SIZE))
    return picture.crop((left, top, left + TEXTURE_SIZE, top + TEXTURE_SIZE))


# ---------------------------------------------------------------- the toy: generated pictures in those layouts
TOY_COLOURS = {  # ranges of hue, saturation and value
    "any": ((0, 1), (0.15, 0.65), (0.35, 0.95)), "dull": ((0, 1), (0.05, 0.5), (0.4, 0.95)), "grey": ((0, 1), (0, 0.2), (0.3, 0.75)),
    "brown": ((0.95, 1.15), (0.15, 0.6), (0.3, 0.8)), "green": ((0.1, 0.4), (0.3, 0.7), (0.35, 0.85)), "dark": ((0, 1), (0, 0.1), (0.2, 0.35)),
    "blue": ((0.46, 0.64), (0.2, 0.65), (0.5, 0.95)), "dusk": ((0.92, 1.12), (0.15, 0.5), (0.6, 1)), "sand": ((0.03, 0.18), (0.2, 0.6), (0.6, 1)),
}  # fmt: skip
# The strokes of each thing: part, substances to pick from, colour (a number: one of several), and points from its feet in
# heights of the thing, x to the right and y upwards: two corners of a rectangle, a polygon, or after "o" two of an ellipse.
TOY_THINGS = {
    "building": [(None, "Brick|Stone|Wood|Painted|Glass|Metal", "dull", -0.34, 0, 0.34, 0.8), ("roof", "Tile|Metal", "any", -0.42, 0.78, -0.22, 1, 0.22, 1, 0.42, 0.78),
                 *(("window", "Glass", "blue", x, y, x + 0.16, y + 0.16) for x in (-0.28, -0.04, 0.16) for y in (0.34, 0.57)), ("door", "Wood", "any2", -0.1, 0, 0.08, 0.26)],
    "tree": [("trunk", "Wood", "brown", -0.07, 0, 0.07, 0.5), ("crown", "Foliage", "green", "o", -0.43, 0.32, 0.17, 0.88), ("crown", "Foliage", "green", "o", -0.2, 0.38, 0.44, 1)],
    "car": [(None, "Metal", "any", -1, 0.16, -1, 0.6, -0.65, 0.62, -0.42, 1, 0.4, 1, 0.7, 0.62, 1.02, 0.55, 1.02, 0.16), ("window", "Glass", "blue", -0.52, 0.62, -0.34, 0.92, 0.32, 0.92, 0.54, 0.62),
            ("wheel", "Dirt", "dark", "o", -0.83, -0.02, -0.33, 0.46), ("wheel", "Dirt", "dark", "o", 0.33, -0.02, 0.83, 0.46)],
    "person": [("left leg", "Fabric/Cloth", "any", -0.14, 0, -0.01, 0.45), ("right leg", "Fabric/Cloth", "any", 0.01, 0, 0.14, 0.45),
               ("torso", "Fabric/Cloth", "any2", -0.21, 0.76, 0.21, 0.76, 0.15, 0.4, -0.15, 0.4), ("head", "Dirt", "sand", "o", -0.12, 0.74, 0.12, 1)],
    "boat": [("hull", "Wood|Painted", "any", -0.38, 0, -0.58, 0.3, 0.58, 0.3, 0.4, 0), ("sail", "Fabric/Cloth", "any2", -0.03, 0.34, -0.03, 1, -0.42, 0.34), ("sail", "Fabric/Cloth", "any3", 0.03, 0.34, 0.03, 1, 0.42, 0.34)],
    "lamp": [("base", "Wood", "any", -0.06, 0.04, 0.06, 0.7), ("base", "Wood", "any", -0.2, 0, 0.2, 0.1), ("shade", "Fabric/Cloth|Glass", "sand", -0.34, 0.55, -0.2, 1, 0.2, 1, 0.34, 0.55)],
    "bed": [("headboard", "Wood", "any", -0.85, 0, -0.64, 1), (None, "Fabric/Cloth", "any2", -0.64, 0.08, 0.85, 0.52), ("pillow", "Fabric/Cloth", "any3", "o", -0.64, 0.44, -0.16, 0.76)],
    "sofa": [("back", "Fabric/Cloth", "any", -0.9, 0.4, 0.9, 1), ("arm", "Fabric/Cloth", "any2", -1.04, 0.08, -0.76, 0.7), ("arm", "Fabric/Cloth", "any2", 0.76, 0.08, 1.04, 0.7), ("seat", "Fabric/Cloth", "any", -0.76, 0.12, 0.76, 0.48)],
}  # fmt: skip
# Each kind of scene: ADE20K's path to it; what is behind and, from a share of the ground's depth on, in front (name,
# substances, colours); its things: at least, at most, where their feet are (share of that depth), height (of the short side).
TOY_SCENES = {
    "street": ("outdoor urban street", {None: ("sky", "Sky", "blue|dusk|grey"), 0: ("road", "Stone|Brick", "grey|brown|dull")},
               [("building", 1, 3, (0, 0.06), (0.5, 0.7)), ("tree", 0, 2, (0.03, 0.15), (0.5, 0.65)), ("car", 1, 2, (0.4, 0.9), (0.28, 0.4)), ("person", 0, 1, (0.6, 0.95), (0.6, 0.8))]),
    "beach": ("outdoor natural beach", {None: ("sky", "Sky", "blue|dusk|grey"), 0: ("sea", "Water", "blue"), 0.45: ("sand", "Dirt", "sand")},
              [("boat", 1, 2, (0.15, 0.35), (0.5, 0.65)), ("tree", 0, 1, (0.5, 0.6), (0.55, 0.75)), ("person", 0, 2, (0.7, 0.95), (0.6, 0.8))]),
    "bedroom": ("indoor home bedroom", {None: ("wall", "Painted|Brick|Tile", "dull"), 0.3: ("floor", "Wood|Tile|Stone", "brown|dull")},
                [("lamp", 0, 2, (0.35, 0.5), (0.6, 0.75)), ("bed", 1, 1, (0.6, 0.95), (0.5, 0.65))]),
    "living_room": ("indoor home living_room", {None: ("wall", "Painted|Brick|Tile", "dull"), 0.3: ("floor", "Wood|Tile|Stone", "brown|dull")},
                    [("lamp", 0, 2, (0.32, 0.4), (0.6, 0.75)), ("sofa", 1, 1, (0.5, 0.75), (0.45, 0.6)), ("person", 0, 1, (0.7, 0.95), (0.6, 0.8))]),
}  # fmt: skip
TOY_SYNONYMS = {"car": "car, auto", "building": "building, edifice", "person": "person, individual"}
TOY_NAMES = ["sky", "road", "sea", "sand", "wall", "floor", *TOY_THINGS]
TOY_NAMES += dict.fromkeys(part for strokes in TOY_THINGS.values() for part, *_ in strokes if part)
TOY_NUMBERS = {name: 61 * k for k, name in enumerate(TOY_NAMES, start=1)}  # beyond 255: they take both colour channels
# The relief of each substance (OpenSurfaces' names) and of each texture (DTD's), in [0, 1]: what tells it from others in
# any colour. x and y are pixels, u and v periods at an angle of the picture's own, noise(rows, columns) smooth noise.
TOY_RELIEFS = {
    "Brick": lambda s: np.where((s.y % 9 < 1.7) | ((s.x + s.y // 9 % 2 * 9) % 18 < 1.7), 1, 0.25 * s.noise(2, 2) + 0.15 * s.noise(9, 18)),
    "Tile": lambda s: np.where((s.x % 12 < 1.8) | (s.y % 12 < 1.8), 0, 0.75 + 0.15 * s.noise(12, 12)),
    "Wood": lambda s: 0.5 + 0.3 * np.sin((s.y + 5 * s.noise(20, 40)) * 0.8) + 0.3 * (s.noise(1.5, 25) - 0.5),
    "Stone": lambda s: 0.4 * s.noise(7, 7) + 0.6 * s.noise(2.5, 2.5),
    "Fabric/Cloth": lambda s: 0.5 + 0.25 * np.sin(s.x * 0.85) + 0.25 * np.sin(s.y * 0.85),
    "Metal": lambda s: 0.5 + 0.4 * np.sin(s.x / 1.5) + 0.2 * (s.noise(30, 30) - 0.5),
    "Foliage": lambda s: ((s.noise(5, 5) - 0.5) * 2.5 + 0.5).clip(0, 1), "Painted": lambda s: 0.5 + 0.06 * (s.noise(15, 15) - 0.5),
    "Glass": lambda s: 0.25 + 0.6 * (np.sin((s.x + s.y) / 4.2) > 0.55) + 0.1 * s.noise(2, 2),
    "Sky": lambda s: (1.6 * s.noise(20, 45) - 0.5).clip(0, 1) * 0.9, "Dirt": lambda s: 0.4 + 0.35 * (s.noise(2, 2) - 0.5),
    "Water": lambda s: 0.5 + 0.35 * np.sin(s.y * 0.7 + 3 * s.noise(6, 12)) * s.noise(3, 10),
    "banded": lambda s: s.u % 1 < 0.5, "chequered": lambda s: (np.floor(s.u) + np.floor(s.v)) % 2,
    "bubbly": lambda s: (1.1 - (s.cells()[0] * 1.4) ** 2).clip(0, 1), "cracked": lambda s: s.cells()[1] - s.cells()[0] > 0.11,
    "grid": lambda s: (s.u % 1 < 0.16) | (s.v % 1 < 0.16), "polka-dotted": lambda s: (s.u % 1 - 0.5) ** 2 + (s.v % 1 - 0.5) ** 2 < 0.1,
    "spiralled": lambda s: (np.hypot(s.u, s.v) + np.arctan2(s.v, s.u) / (2 * np.pi)) % 1 < 0.5,
    "zigzagged": lambda s: (s.u + np.abs(s.v % 1 - 0.5) * 1.4) % 1 < 0.5,
}  # fmt: skip
TOY_SUBSTANCES = [name for name in TOY_RELIEFS if name[0].isupper()]
TOY_TEXTURES = [name for name in TOY_RELIEFS if name[0].islower()]


def smooth_noise(rng: np.random.Generator, height: int, width: int, rows: float, columns: float) -> np.ndarray:
    """Noise in [0, 1], (height, width), with a new value about every `rows` and `columns` pixels."""
    grid = rng.random((max(2, round(height / rows) + 1), max(2, round(width / columns) + 1))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def relief(kind: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One of TOY_RELIEFS as float32 (height, width, 1), with random angle, scale and offset."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, step = rng.uniform(0, np.pi), rng.uniform(12, 17)
    u = ((x - width / 2) * np.cos(angle) + (y - height / 2) * np.sin(angle)) / step + rng.uniform(0, 0.5)
    v = ((y - height / 2) * np.cos(angle) - (x - width / 2) * np.sin(angle)) / step + rng.uniform(0, 0.5)
    seeds = rng.uniform(-5, 5, (120, 2, 1, 1)) if kind in ("bubbly", "cracked") else None
    cells = lambda: np.partition(np.hypot(u - seeds[:, 0], v - seeds[:, 1]), (0, 1), axis=0)[:2]  # nearest, second
    noise = lambda rows, columns: smooth_noise(rng, height, width, rows, columns)
    surface = argparse.Namespace(x=x + rng.uniform(0, 20), y=y + rng.uniform(0, 20), u=u, v=v, cells=cells, noise=noise)
    return TOY_RELIEFS[kind](surface).astype(np.float32)[..., None]


def toy_colour(choices: str, rng: np.random.Generator) -> np.ndarray:
    """A colour in one of TOY_COLOURS' ranges, (3,) in [0, 255]."""
    ranges = TOY_COLOURS[rng.choice(choices.split("|")).rstrip("0123456789")]
    hue, saturation, value = (rng.uniform(*bounds) for bounds in ranges)
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def toy_scene(stream: int, k: int) -> tuple[str, Image.Image, np.ndarray]:
    """(kind, picture, each pixel's object, part and substance (3, H, W)) of the k-th scene of a stream."""
    rng, kind = np.random.default_rng((SEED, stream, k)), list(TOY_SCENES)[k % len(TOY_SCENES)]
    height, width = (144, 96) if rng.random() < 0.25 else (96, 144)
    picture, maps = np.zeros((height, width, 3), np.float32), np.zeros((3, height, width), np.int32)

    def stroke(thing: str, part: str | None, substances: str, colour: np.ndarray, shape: str, points: list) -> None:
        substance, (xs, ys) = str(rng.choice(substances.split("|"))), zip(*points)
        left, top = max(0, math.floor(min(xs)) - 1), max(0, math.floor(min(ys)) - 1)
        w, h = min(width, math.ceil(max(xs)) + 2) - left, min(height, math.ceil(max(ys)) + 2) - top
        if min(w, h) <= 0:
            return
        fine = Image.new("L", (4 * w, 4 * h))  # at four times the size, for smooth edges
        corners = points if shape == "polygon" else [(min(xs), min(ys)), (max(xs), max(ys))]
        getattr(ImageDraw.Draw(fine), shape)([(4 * float(x - left), 4 * float(y - top)) for x, y in corners], fill=255)
        cover = np.asarray(fine.resize((w, h), Image.Resampling.BOX))[..., None] / np.float32(255)
        surface, box = relief(substance, h, w, rng), (slice(top, top + h), slice(left, left + w))
        picture[box] += cover * (colour * (0.6 + 0.55 * surface) + 30 * (surface > 0.97) - picture[box])
        numbers = TOY_NUMBERS[thing], TOY_NUMBERS.get(part, 0), TOY_SUBSTANCES.index(substance) + 1
        maps[:, box[0], box[1]][:, cover[..., 0] > 0.5] = np.array(numbers)[:, None]

    _, layers, things = TOY_SCENES[kind]  # painted from far to near
    horizon = height * rng.uniform(0.42, 0.6)
    for depth, (name, substances, colours) in layers.items():
        top = -2 if depth is None else horizon + depth * (height - horizon)
        stroke(name, None, substances, toy_colour(colours, rng), "rectangle", [(-2, top), (width + 2, height + 2)])
    for thing, least, most, depths, heights in things:
        for depth in sorted(rng.uniform(*depths, rng.integers(least, most + 1))):
            x, y = rng.uniform(0.1, 0.9) * width, horizon + depth * (height - horizon)
            tall = rng.uniform(*heights) * min(width, height)
            wide = tall * rng.uniform(0.85, 1.15) * rng.choice([-1, 1])  # with random width, randomly mirrored
            colours = {colour: toy_colour(colour, rng) for _, _, colour, *_ in TOY_THINGS[thing]}
            for part, substances, colour, *points in TOY_THINGS[thing]:
                shape = "ellipse" if points[0] == "o" else "rectangle" if len(points) == 4 else "polygon"
                numbers = points[shape == "ellipse" :]
                corners = [(x + wide * px, y - tall * py) for px, py in zip(numbers[::2], numbers[1::2])]
                stroke(thing, part, substances, colours[colour], shape, corners)
    light = 0.85 + 0.3 * smooth_noise(rng, height, width, height, width)[..., None]
    return kind, Image.fromarray((picture * light).clip(0, 255).astype(np.uint8)), maps


def toy_files(scenes: int, photos: int, textures: int):
    """(path, picture or text) of each of the toy's files."""
    coded = lambda red, green: Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))
    for k in range(scenes):
        kind, picture, (objects, parts, _) = toy_scene(0, k)
        side, short = ("validation", "val") if k % 10 == 9 else ("training", "train")
        scene = TOY_SCENES[kind][0].split()
        stem = "/".join(["ade20k/ADE20K_2021_17_01/images/ADE", side, *scene[1:], f"ADE_{short}_{k:08d}"])
        yield f"{stem}.jpg", picture
        for ending, n in (("seg", objects), ("parts_1", parts)):
            if n.any():
                yield f"{stem}_{ending}.png", coded(n // 256 * 10, n % 256)
        present = {name: n for name, n in TOY_NUMBERS.items() if n in np.unique([objects, parts])}
        named = [{"name_ndx": n, "name": TOY_SYNONYMS.get(name, name)} for name, n in present.items()]
        yield f"{stem}.json", json.dumps({"annotation": {"scene": scene, "object": named}})
    for k in range(1, photos + 1):
        _, picture, (*_, n) = toy_scene(1, k)
        yield f"os/photos/{k}.jpg", picture
        larger = n.shape[1] * 3 // 2, n.shape[0] * 3 // 2  # not the photo's size, as in OpenSurfaces
        yield f"os/photos-labels/{k}.png", coded(n, 0 * n).resize(larger, Image.Resampling.NEAREST)
    rows = [f"{k},{name},{k}" for k, name in enumerate(TOY_SUBSTANCES, start=1)]
    yield "os/label-substance-colors.csv", "\n".join(["substance_id,substance_name,red_color", *rows])
    for k in range(textures * len(TOY_TEXTURES)):
        rng, kind = np.random.default_rng((SEED, 2, k)), TOY_TEXTURES[k % len(TOY_TEXTURES)]
        values = rng.permutation([rng.uniform(0.1, 0.4), rng.uniform(0.7, 1)])
        tints = [255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.8), v)) for v in values]
        share = relief(kind, *rng.integers(84, 113, 2), rng)
        picture = Image.fromarray((tints[0] * (1 - share) + tints[1] * share).astype(np.uint8))
        stem = f"dtd/images/{kind}/{kind}_{k // len(TOY_TEXTURES):04d}"
        yield f"{stem}.jpg", picture.filter(ImageFilter.GaussianBlur(0.6))
    for name, first, step in (("train1", 0, 2), ("val1", 1, 4), ("test1", 3, 4)):
        listed = [f"{kind}/{kind}_{n:04d}.jpg\n" for kind in TOY_TEXTURES for n in range(first, textures, step)]
        yield f"dtd/labels/{name}.txt", "".join(listed)


def make_toy(folder: str, scenes: int = 400, photos: int = 320, textures: int = 100) -> None:
    """Writes the toy's ade20k/, os/ and dtd/ under `folder` if it does not exist, always the same files, or none."""
    if os.path.isdir(folder):
        return
    say(f"generating the toy data in {folder}")
    os.makedirs(parent := os.path.dirname(os.path.abspath(folder)), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".toy-", dir=parent) as temporary:
        for name, content in toy_files(scenes, photos, textures):
            path = Path(temporary, "toy", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content) if isinstance(content, str) else content.save(path, quality=92)
        os.path.isdir(folder) or os.rename(os.path.join(temporary, "toy"), folder)  # another process may be quicker


# ---------------------------------------------------------------- what the scripts share: messages and files
is_main_process = lambda: os.environ.get("RANK", "0") == "0"  # the one of torchrun's, or the only one, that prints
warn = lambda message: say(message, sys.stderr)


class UserError(ValueError):
    """A mistake that the user can mend: scripts print it as one line and exit with status 2."""


def say(message: str, file=None) -> None:
    if is_main_process():
        print(message, file=file, flush=True)


def write_file(path: str, write, advice: str = "") -> None:
    """Atomic write: `write(name)` fills a temporary file, which then replaces `path`. UserError if that fails."""
    temporary = os.path.join(os.path.dirname(path), f".{os.getpid()}.{os.path.basename(path)}")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # PyTorch's own file writer raises RuntimeError on a full disk
        raise UserError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}) {advice}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_json(content: dict, path: str) -> None:
    write_file(path, lambda name: Path(name).write_text(json.dumps(content, indent=1, allow_nan=False)))


# ---------------------------------------------------------------- what the scripts share: options
class Option(NamedTuple):
    name: str  # without the dashes
    kind: object  # a function of the text, a tuple of choices, or bool for a flag
    default: object
    help: str
    toy: object = None  # the default with --data toy, where it is another
    resume: bool = False  # whether --resume may change it
    least: float = 1  # of a number, or of the numbers of a list
    below: float = 1e9


DATA_OPTIONS = [
    Option("data", str, "toy", "toy, or a comma list of ade20k,os,dtd"),
    Option("root", str, "data", "folder of ade20k/, os/, dtd/", resume=True),
    Option("cache", str, None, "where indexes and prepared labels go (<root>/.cache)", resume=True),
    Option("min-images", int, 50, "keep objects and materials in so many images (own data: all)", 20),
    Option("min-pixels", int, 50000, "keep objects of so many pixels (own data: all)", 5000),
    Option("min-part-images", int, 20, "keep parts in so many images"),
    Option("min-scene-images", int, 10, "keep scenes of so many images"),
    Option("allow-broken", bool, False, "go ahead although over one file in twenty is broken", resume=True),
]
DEVICE_OPTIONS = [
    Option("compile", bool, False, "torch.compile the network", resume=True),
    Option("device", str, "auto", "cuda, mps, cpu, or cuda:1, ..", resume=True),
]


class Parser(argparse.ArgumentParser):
    """Options from a table. A mistake is one line on stderr, and --help has a line an option."""

    def __init__(self, description: str, options: list[Option], usage: str = "%(prog)s [options]"):
        wide = lambda prog: argparse.HelpFormatter(prog, max_help_position=31)
        super().__init__(description=description, formatter_class=wide, usage=usage, allow_abbrev=False)
        self.options = {o.name.replace("-", "_"): o for o in options}
        shown = lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for o in options:
            defaults = [shown(o.default)] if o.default not in (None, False) else []
            defaults += [f"toy {shown(o.toy)}"] if o.toy is not None else []
            kinds = {bool: {"action": "store_true", "default": None}, list: {"nargs": "+", "metavar": "FILE"}}
            kind = kinds.get(o.kind, {"type": o.kind, "metavar": "N" if o.kind in (int, float) else o.name.upper()})
            if isinstance(o.kind, tuple):
                kind = {"choices": o.kind, "type": type(o.kind[0])}
            self.add_argument(f"--{o.name}", help=o.help + (f" ({'; '.join(defaults)})" if defaults else ""), **kind)

    def complete(self, given: argparse.Namespace, stored: dict = {}) -> argparse.Namespace:
        """All options: as given, else as `stored`, else the toy's default with --data toy, else the default."""
        known = {key: value for key, value in stored.items() if key in self.options and value is not None}
        known |= {key: value for key, value in vars(given).items() if value is not None}
        for key, value in vars(given).items():
            numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) in (int, float)]
            if numbers and not (o := self.options[key]).least <= min(numbers) <= max(numbers) < o.below:
                raise UserError(f"--{o.name} {value}: from {o.least:g} on, and below {o.below:g}")
        toy = known.get("data", self.options["data"].default) == "toy"
        defaults = {key: o.toy if toy and o.toy is not None else o.default for key, o in self.options.items()}
        return argparse.Namespace(**defaults | known)

    def run(self, command, *arguments) -> None:
        """Calls `command`; what a user can mend becomes one line and status 2."""
        try:
            command(*arguments)
        except (UserError, OSError, RuntimeError, MemoryError) as e:
            if isinstance(e, MemoryError) or re.search("out of memory|allocate memory", str(e)):
                self.error("out of memory; a lower --size, or --resume with a lower --batch-size, higher --accumulate")
            if worker := re.search("DataLoader worker.{0,40}", str(e)):  # raised wherever the program is then
                self.error(f"a process that reads images ended ({worker[0]}); --resume, perhaps with fewer --workers")
            if not isinstance(e, (UserError, OSError)):
                raise
            self.error(f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e))
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted\n")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def format_help(self) -> str:
        return re.sub("\n\n+", "\n", super().format_help())

    def error(self, message: str):
        message = message.rsplit("UserError: ", 1)[-1]  # without the traceback from a worker of a DataLoader
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n" if is_main_process() else None)


hash_of = lambda content: hashlib.sha256(repr(content).encode()).hexdigest()[:16]
data_root = lambda args: os.path.join(args.root, "toy") if args.data == "toy" else args.root
cache_folder = lambda args: args.cache or os.path.join(data_root(args), ".cache")


def named_sources(data: str) -> list[str]:
    """The sources that `--data` names. Raises UserError for any other name."""
    names = list(SOURCE_LEVELS) if data == "toy" else list(dict.fromkeys(name.strip() for name in data.split(",")))
    if unknown := [name for name in names if name not in SOURCE_LEVELS]:
        raise UserError(f"--data {data}: '{unknown[0]}' is not one of toy, {', '.join(SOURCE_LEVELS)}")
    return names


def open_indexes(args: argparse.Namespace) -> tuple[dict[str, Index], dict[str, int]]:
    """The index of every source that the options name, and the vocabulary's minima; makes the toy if asked for."""
    if args.data == "toy":
        if os.path.isdir(os.path.join(args.root, "annotations")):
            raise UserError(f"--root {args.root}: holds data of your own; --data ade20k reads them")
        make_toy(data_root(args))
    indexes = {n: scan(data_root(args), n, cache_folder(args), args.allow_broken) for n in named_sources(args.data)}
    return indexes, {key: value for key, value in vars(args).items() if key.startswith("min_")}


# ---------------------------------------------------------------- what the scripts share: device and processes
autocast = lambda device, amp: torch.autocast(device.type, amp) if amp else contextlib.nullcontext()
PATIENCE = datetime.timedelta(hours=2)  # how long processes wait for the first one, which scans and splits


def join_processes() -> None:
    """Joins the processes that torchrun started, if it did. Only the main process prints from then on."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    # torchrun's store outlives a group that failed, and the new one must not find the old one's addresses in it.
    store, rank, processes = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")


def pick_device(name: str) -> torch.device:
    """The device of `--device`, or under torchrun this process's GPU. Raises UserError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # set first, or every process opens a context on GPU 0
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else device.index or 0)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device {name}: not available ({str(e).splitlines()[0]})") from None


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision for `--amp`; None is off. auto: on CUDA, bf16 where the GPU has it, else fp16."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def from_main_process(function):
    """What `function()` returns, or raises, in the main process, in every process."""
    result: list = [None]
    if is_main_process():
        try:
            result = [function()]
        except Exception as e:
            result = [e]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def ignore_signals(_) -> None:
    """For the processes that read images: a signal to the group is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def in_order(function, numbers: range, workers: int | None = None, pinned: bool = False) -> DataLoader:
    """`function(k)` for each number, computed ahead by `workers` processes: by default one a core, 8 at most, the cores
    shared among this machine's processes."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    how = dict(num_workers=max(1, min(8, cores)) if workers is None else workers, worker_init_fn=ignore_signals)
    return DataLoader(numbers, None, collate_fn=function, pin_memory=pinned, **how)


# ---------------------------------------------------------------- the command
def report(args: argparse.Namespace) -> None:
    indexes, minima = open_indexes(args)
    vocabulary = build_vocabulary(indexes, minima)
    for source, index in indexes.items():
        height, width = index.sizes.double().median(dim=0).values.int().tolist()
        print(f"{source}: {len(index.images)} images in {index.folder} ({index.layout}), median {width} x {height}")
        for level, classes in class_pixels(index).items():
            names, pixels = vocabulary.get(level, ()), {name: sum(images.values()) for name, images in classes.items()}
            noun = "objects" if level == "part" else "class" if len(names) == 1 else "classes"
            unit = "images" if level in ("scene", "texture") else "pixels"
            found = f"{len(names)} {noun}, {sum(pixels.values()):,} {unit} labelled: {', '.join([*names][:8])}"
            none = "no class is large enough: see the --min- options" if classes else "no labels"
            print(f"  {level:9s}{found if names else none}")
            if index.layout == "sceneparsing" and level == "object" and len(names) <= 40:
                print(f"      0 {'(unlabelled; a class? add 1)':30s}{zero_pixels(index):14,} pixels")
                for k, name in zip(index.names, names):
                    images = classes.get(name, {})
                    print(f"    {k:3d} {name:30s}{sum(images.values()):14,} pixels in {len(images)} images")
        for _, reason in index.broken:
            print(f"  set aside  {reason}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Scans data sets: what is there, in which classes, and what is broken.", DATA_OPTIONS)
    given = parser.parse_args(argv)
    parser.run(lambda: report(parser.complete(given)))


if __name__ == "__main__":
    main()
