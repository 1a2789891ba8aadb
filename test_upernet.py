"""The tests: `python test_upernet.py`, or pytest; those of a GPU: `python test_upernet.py -k cuda`.

Each compares with something independent: a plain loop, torchvision, numerical integration, the
answers of the authors' own networks.
"""

import atexit
import contextlib
import copy
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import zlib
from os.path import join
from pathlib import Path
from unittest import mock

if "cuda" not in sys.argv:  # all other tests run on the CPU, in their processes too
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small are slower with more

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor

import balance_split
import datasets
import evaluate
import resnet
import train
import upernet
from resnet import ResNet, load_imagenet
from upernet import UPerNet

HERE = os.path.dirname(os.path.abspath(upernet.__file__))
SHARED = join(os.path.dirname(HERE), "shared")  # real samples; some tests need them
CLASSES = {"scene": 5, "object": 7, "part": {1: 3, 4: 2}, "material": 6, "texture": 4}
SMALL = (
    *("--channels", 8, "--sizes", 32, "--batch-size", 2, "--workers", 0),
    *("--min-images", 3, "--min-pixels", 500, "--min-part-images", 3, "--min-scene-images", 3),
)

resnet.BLOCKS[18] = (1, 1, 1, 1)  # a small network; TestResNet has the real one
folder = tempfile.mkdtemp(prefix="upernet-test-")  # of all tests
atexit.register(shutil.rmtree, folder)


# ---------------------------------------------------------------- files and commands
def new_folder(*names: str) -> str:
    """A new empty folder below the tests' one."""
    return tempfile.mkdtemp(dir=folder, prefix="-".join(names) + "-")


def toy_root() -> str:
    """A root whose toy has few images; made once."""
    root = join(folder, "small")
    with contextlib.redirect_stdout(io.StringIO()):
        datasets.make_toy(join(root, "toy"), scenes=40, photos=30, textures=3)
    return root


def command(main, *argv) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a script's main, called in this process."""
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in argv])
        except SystemExit as e:
            status = e.code or 0
    return status, out.getvalue(), err.getvalue()


def save(picture, *path: str) -> str:
    """Writes a picture, or an array of numbers as one, with the folders above it."""
    path = join(*path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture).astype(np.uint8))
    picture.save(path)
    return path


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def write(path: str, text: str, encoding: str = "utf-8") -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_text(text, encoding=encoding)
    return path


def read_json(*path: str) -> dict:
    return json.loads(Path(*path).read_text())


def read_log(out: str) -> list[dict]:
    """The whole lines of a training run's log."""
    path = Path(out, "log.jsonl")
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def log_lines(out: str) -> int:
    return len(read_log(out))


def checkpoint_of(out: str) -> dict:
    return torch.load(join(out, "ckpt.pt"), weights_only=True)


# ---------------------------------------------------------------- data sets that a test makes
class Ade:
    """ADE20K 2021 as a folder that a test fills image by image."""

    def __init__(self):
        self.root = new_folder("ade")
        self.folder = join(self.root, "ade20k", "ADE20K_2021_17_01")
        self.count = 0

    def add(self, objects: np.ndarray, names: dict, scene: list[str], parts=None) -> str:
        """One image with its class numbers; `names` are those of the JSON. Returns the path
        without its ending."""
        images = join(self.folder, "images", "ADE", "training", "a", "b")
        stem = join(images, f"ADE_train_{self.count:08d}")
        self.count += 1
        save(noise(*objects.shape), f"{stem}.jpg")
        self.save_numbers(objects, f"{stem}_seg.png")
        if parts is not None:
            self.save_numbers(parts, f"{stem}_parts_1.png")
        things = [{"name": name, "name_ndx": number} for number, name in names.items()]
        annotation = {"annotation": {"scene": scene, "object": things}}
        write(f"{stem}.json", json.dumps(annotation, ensure_ascii=False))
        return stem

    def save_numbers(self, numbers: np.ndarray, path: str) -> None:
        red = numbers // 256 * 10
        green = numbers % 256
        save(np.stack([red, green, 0 * numbers], axis=-1), path)

    def index(self) -> datasets.Index:
        return datasets.scan(self.root, "ade20k", join(self.root, ".cache"))


def least(images=1, pixels=1, parts=1, scenes=1) -> dict[str, int]:
    return {
        "min_images": images,
        "min_pixels": pixels,
        "min_part_images": parts,
        "min_scene_images": scenes,
    }


def own_data(root: str, masks: list, **files: str) -> str:
    """A folder of one's own data: images/training/<k>.jpg with these masks, and text files such as
    classes="a\\nb"."""
    for k, mask in enumerate(masks):
        save(noise(*np.shape(mask)[:2]), root, "images", "training", f"{k}.jpg")
        save(mask, root, "annotations", "training", f"{k}.png")
    for name, text in files.items():
        write(join(root, f"{name}.txt"), text)
    return root


# ---------------------------------------------------------------- plain computations
def plain_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def plain_cross_entropy(logits, k: int) -> float:
    logits = np.asarray(logits, np.float64)
    return np.logaddexp.reduce(logits) - logits[k]


def prroi_means(bins: int, n: int) -> Tensor:
    """(bins, n): the mean of each sample's triangle over each bin, by the midpoint rule."""
    t = (np.arange(600 * n) + 0.5) / 600
    triangles = np.maximum(0, 1 - np.abs(t[:, None] - np.arange(n)))
    return torch.from_numpy(triangles.reshape(bins, -1, n).mean(axis=1)).float()


def plain_pool(pool: str, x: Tensor, bins: int) -> Tensor:
    if pool == "prroi":
        return prroi_means(bins, x.shape[2]) @ x @ prroi_means(bins, x.shape[3]).T
    return nn.AdaptiveAvgPool2d(bins)(x)


def plain_block(weights: dict, name: str, x: Tensor) -> Tensor:
    """Convolution, batch norm and ReLU with the weights of this name."""
    kernel = weights[f"{name}.0.weight"]
    x = F.conv2d(x, kernel, padding=kernel.shape[2] // 2)
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.relu(F.batch_norm(x, *(weights[f"{name}.1.{key}"] for key in keys)))


def plain_logits(stages: list, weights: dict, pool="prroi", fpn=2, fusion=True) -> dict:
    """Figure 4 after the backbone, convolution by convolution, with table 2's options."""
    quarter, _, _, size = [stage.shape[2:] for stage in stages]
    p5 = stages[3]
    if "ppm.last.0.weight" in weights:
        maps = [p5]
        for k, bins in enumerate((1, 2, 3, 6)):
            y = plain_pool(pool, p5, bins)
            if pool == "pspnet":
                y = plain_resize(plain_block(weights, f"ppm.branches.{k}", y), size)
            else:
                y = plain_block(weights, f"ppm.branches.{k}", plain_resize(y, size))
            maps.append(y)
        p5 = plain_block(weights, "ppm.last", torch.cat(maps, dim=1))
    else:
        p5 = plain_block(weights, "ppm", p5)

    top_down = p5
    maps = [p5]
    for k in (4, 3, 2):  # C4, C3, C2
        if 0 < fpn <= k:
            lateral = plain_block(weights, f"fpn.laterals.{k - fpn}", stages[k - 2])
            top_down = lateral + plain_resize(top_down, lateral.shape[2:])
            if fusion or k == fpn:
                maps.insert(0, plain_block(weights, f"fpn.convs.{k - fpn}", top_down))
    finest = maps[0]
    fused = finest
    if fusion and fpn:
        resized = [plain_resize(y, finest.shape[2:]) for y in maps]
        fused = plain_block(weights, "fusion.conv", torch.cat(resized, dim=1))

    features = {"scene": p5, "object": fused, "part": fused, "texture": stages[0]}
    features["material"] = finest if fpn == 2 else fused
    logits = {}
    for level, y in features.items():
        head = f"heads.{level}"
        if f"{head}.classifier.weight" in weights:
            for k in range(4):
                if f"{head}.conv.{k}.0.weight" in weights:
                    y = plain_block(weights, f"{head}.conv.{k}", y)
            if level == "scene":
                y = y.mean(dim=(2, 3), keepdim=True)
            y = F.conv2d(
                y, weights[f"{head}.classifier.weight"], weights[f"{head}.classifier.bias"]
            )
            logits[level] = y.flatten(1) if level == "scene" else plain_resize(y, quarter)
    if "texture" in logits:
        logits["texture_map"] = logits["texture"]
        logits["texture"] = logits["texture_map"].mean(dim=(2, 3))
    return logits


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)}, not {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def train_norms(module: nn.Module) -> None:
    """Gives batch norms statistics and weights of their own, without which they hide mistakes."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.1, 0.1)


def small_net(classes: dict = CLASSES, **options) -> UPerNet:
    """A small network with the same weights each time."""
    torch.manual_seed(0)
    net = UPerNet(classes, "resnet18", channels=8, **options)
    train_norms(net)
    return net.eval()


# ---------------------------------------------------------------- the backbone
class TestResNet(unittest.TestCase):
    def setUp(self):
        resnet.BLOCKS[18] = (2, 2, 2, 2)
        self.addCleanup(resnet.BLOCKS.update, {18: (1, 1, 1, 1)})

    def test_stages_are_torchvisions(self):
        for depth in (18, 34, 50, 101):
            self.compare_stages(depth, 32, None)
        self.compare_stages(50, 16, [False, False, True])
        self.compare_stages(50, 8, [False, True, True])

    def compare_stages(self, depth: int, output_stride: int, dilated: list | None):
        build = getattr(torchvision.models, f"resnet{depth}")
        theirs = build(replace_stride_with_dilation=dilated).eval()
        train_norms(theirs)
        ours = ResNet(depth, output_stride=output_stride).eval()
        state = theirs.state_dict()
        del state["fc.weight"], state["fc.bias"]
        ours.load_state_dict(state)
        layers = create_feature_extractor(theirs, ["layer1", "layer2", "layer3", "layer4"])
        x = torch.randn(1, 3, 70, 101)
        with torch.inference_mode():
            stages = ours(x)
            expected = list(layers(x).values())
        self.assertEqual(ours.channels, [stage.shape[1] for stage in expected])
        for k in range(4):
            with self.subTest(depth=depth, output_stride=output_stride, layer=k + 1):
                self.assertLessEqual(relative_error(stages[k], expected[k]), 1e-6)

    def test_stems(self):
        for stem, widths in {"7x7": [64], "deep": [64, 64, 128], "v1c": [32, 32, 64]}.items():
            net = ResNet(18, stem)
            convs = [net.get_parameter(f"conv{k + 1}.weight") for k in range(len(widths))]
            self.assertEqual([len(weight) for weight in convs], widths)
            shapes = [stage.shape for stage in net(torch.rand(2, 3, 61, 90))]
            self.assertEqual(shapes[0], (2, 64, 16, 23))
            self.assertEqual(shapes[3], (2, 512, 2, 3))

    def test_basic_blocks_are_dilated_as_bottlenecks_are(self):
        """Which torchvision has not."""
        net = ResNet(18, output_stride=8)
        for stage, expected in ((net.layer3, [1, 2, 2, 2]), (net.layer4, [2, 4, 4, 4])):
            convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
            dilations = [conv.dilation[0] for conv in convs if conv.kernel_size == (3, 3)]
            self.assertEqual(dilations, expected)
        self.assertEqual([x.shape[2] for x in net(torch.rand(2, 3, 64, 64))], [16, 8, 8, 8])

    def test_imagenet_weights_are_torchvisions(self):
        theirs = torchvision.models.resnet18().state_dict()
        net = ResNet(18)
        download = "torchvision.models._api.load_state_dict_from_url"
        with mock.patch(download, return_value=theirs) as asked:
            load_imagenet(net)
        self.assertIn("resnet18", str(asked.call_args))
        for key, value in net.state_dict().items():
            self.assertTrue(torch.equal(value, theirs[key]), key)
        for stem in ("deep", "v1c"):
            self.assertRaises(ValueError, load_imagenet, ResNet(18, stem))

    def test_arguments_that_it_refuses(self):
        for wrong in ({"depth": 20}, {"stem": "3x3"}, {"output_stride": 4}):
            with self.subTest(**wrong), self.assertRaises(ValueError):
                ResNet(**wrong)


# ---------------------------------------------------------------- the network
class Strided(nn.Module):
    """A backbone of somebody else's: maps of 8 channels at the given strides."""

    channels = [8, 8, 8, 8]

    def __init__(self, *strides: int):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3, 8, 3, stride, 1) for stride in strides)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [stage(x) for stage in self.stages]


class TestNetwork(unittest.TestCase):
    def test_shapes_of_every_level(self):
        net = small_net()
        logits = net(torch.rand(2, 3, 65, 97))
        expected = {"scene": (2, 5), "texture": (2, 4), "texture_map": (2, 4, 17, 25)}
        expected.update(object=(2, 7, 17, 25), part=(2, 5, 17, 25), material=(2, 6, 17, 25))
        self.assertEqual({level: value.shape for level, value in logits.items()}, expected)
        self.assertEqual(net.part_slices, {1: slice(0, 3), 4: slice(3, 5)})

    def test_names_of_parameters(self):
        for name in small_net().state_dict():
            self.assertRegex(name, r"^(mean|std)$|^(backbone|ppm|fpn|fusion|heads)\.")
            levels = [level for level in CLASSES if level in name]
            expected = [name.split(".")[1]] if name.startswith("heads.") else []
            self.assertEqual(levels, expected)

    def test_computes_only_what_the_levels_need_and_that_alike(self):
        net = small_net()
        images = torch.rand(1, 3, 64, 96)
        together = net(images)
        ran = set()
        for name, module in net.named_modules():
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
        material = {"ppm", "fpn", "fpn.convs.0"}
        fused = {*material, "fpn.convs.1", "fpn.convs.2", "fusion"}
        needed = {"texture": set(), "scene": {"ppm"}, "material": material}
        needed.update(object=fused, part=fused)
        heads = {f"heads.{level}" for level in needed}
        for levels in (["texture"], ["scene"], ["object"], ["part"], ["scene", "material"]):
            ran.clear()
            logits = net(images, levels=levels)
            self.assertEqual(logits.keys() - {"texture_map"}, set(levels))
            for level, value in logits.items():
                torch.testing.assert_close(value, together[level])
            expected = set()
            for level in levels:
                expected.update(needed[level], [f"heads.{level}"])
            self.assertEqual(ran & (fused | heads), expected)

    def test_rows_of_table_2_against_the_network_written_out(self):
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        images = torch.rand(2, 3, 75, 107)
        for ppm, fpn, fusion, stride in (
            (False, 4, False, 32),
            (False, 3, False, 32),
            (False, 2, False, 32),
            (True, 2, False, 32),
            (True, 4, True, 32),
            (True, 3, True, 32),
            (True, 2, True, 32),
            (False, 0, True, 8),  # DilatedNet
            (True, 0, True, 8),  # PSPNet
        ):
            with self.subTest(ppm=ppm, fpn=fpn, fusion=fusion):
                net = small_net(ppm=ppm, fpn=fpn, fusion=fusion, output_stride=stride)
                stages = net.backbone((images - mean) / std)
                expected = plain_logits(stages, net.state_dict(), fpn=fpn, fusion=fusion)
                logits = net(images)
                self.assertEqual(logits.keys(), expected.keys())
                for level, value in logits.items():
                    self.assertLessEqual(relative_error(value, expected[level]), 1e-5, level)
                self.assertEqual(isinstance(net.ppm, upernet.PPM), ppm)
                self.assertEqual(stages[3].shape[2], math.ceil(75 / stride))
                sum(value.sum() for value in logits.values()).backward()
                for name, p in net.named_parameters():
                    self.assertIsNotNone(p.grad, name)

    def test_another_backbone_has_four_maps_from_stride_4(self):
        images = torch.rand(1, 3, 64, 64)
        net = UPerNet(CLASSES, Strided(4, 8, 16, 32), channels=8).eval()
        self.assertEqual(net(images)["object"].shape, (1, 7, 16, 16))
        for p in net.backbone.parameters():  # its memory layout is left alone
            self.assertTrue(p.is_contiguous())
        for strides in ([4, 8, 16, 32, 64], [4, 8, 16], [2, 4, 8, 16]):
            net = UPerNet(CLASSES, Strided(*strides), channels=8).eval()
            with self.subTest(strides=strides), self.assertRaisesRegex(ValueError, "backbone"):
                net(images)

    def test_the_two_files_work_alone(self):
        """Without torchvision and the other files; a module as the backbone needs no resnet.py."""
        place = new_folder("copied")
        for name in ("upernet.py", "resnet.py"):
            shutil.copy(join(HERE, name), place)
        code = """
import sys
sys.modules["torchvision"] = sys.modules["resnet"] = None
import torch, upernet

class Backbone(torch.nn.Module):
    channels = [3, 3, 3, 3]
    def forward(self, x):
        return [x[:, :, ::s, ::s] for s in (4, 8, 16, 32)]

for backbone in (Backbone(), "resnet18"):
    net = upernet.UPerNet({"object": 5}, backbone, channels=8).eval()
    print(tuple(net(torch.rand(1, 3, 64, 64))["object"].shape))
    del sys.modules["resnet"]
"""
        python = [sys.executable, "-c", code]
        run = subprocess.run(python, cwd=place, capture_output=True, text=True)
        self.assertEqual(run.stdout.split("\n"), 2 * ["(1, 5, 16, 16)"] + [""], run.stderr)

    def test_images_that_it_takes_and_refuses(self):
        net = small_net()
        image = torch.rand(1, 3, 64, 64)
        for wrong in (image[0], 255 * image, -image, image[:, :1], image[:, :, :31]):
            with self.subTest(shape=wrong.shape), self.assertRaises(ValueError):
                net(wrong)
        self.assertRaises(ValueError, net, (255 * image).byte())
        self.assertRaisesRegex(ValueError, "scenery", net, image, ["scenery"])
        smallest = image[:, :, :32, :32]
        self.assertTrue(net(smallest)["object"].isfinite().all())
        net.train()(image[:, :, :33, :32])
        self.assertRaises(ValueError, net, smallest)  # batch norm: one value a channel
        pspnet = small_net(pool="pspnet").train()
        self.assertRaises(ValueError, pspnet, image)
        pspnet(torch.cat([smallest, smallest]))

    def test_texture_sends_no_gradient_into_the_backbone(self):
        net = small_net().train()
        logits = net(torch.rand(2, 3, 40, 70), levels=["texture"])
        logits["texture_map"].square().sum().backward()
        for name, p in net.named_parameters():
            self.assertEqual(p.grad is not None, name.startswith("heads.texture."), name)

    def test_convolutions_before_the_classifiers(self):
        for head_conv, others in ((True, 1), (False, 0)):
            for level, head in small_net(head_conv=head_conv).heads.items():
                convs = 4 if level == "texture" else others
                kernels = [m.kernel_size for m in head.modules() if isinstance(m, nn.Conv2d)]
                self.assertEqual(kernels, convs * [(3, 3)] + [(1, 1)])

    def test_arguments_that_it_refuses(self):
        for wrong in (
            {"classes": {}},
            {"classes": {"colour": 3}},
            {"classes": {"object": 0}},
            {"classes": {"part": {0: 2}}},
            {"classes": {"object": 3, "part": {3: 2}}},
            {"classes": {"object": 3, "part": 4}},
            {"backbone": "vgg16"},
            {"channels": 0},
            {"pool": "max"},
            {"fpn": 1},
            {"test_size": (600, 450, None)},
        ):
            arguments = {"classes": {"object": 3}, "backbone": "resnet18", "channels": 8, **wrong}
            with self.subTest(**wrong), self.assertRaises(ValueError):
                UPerNet(**arguments)

    def test_is_rebuilt_from_its_arguments_and_state_dict(self):
        options = {"head_conv": False, "pool": "adaptive", "fpn": 3, "stem": "v1c"}
        images = torch.rand(1, 3, 64, 96)
        for wanted in (options, {"ppm": False, "output_stride": 16}, {"fusion": False}):
            net = small_net(**wanted)
            net.test_size = (300, 700, 8)
            twin = UPerNet(**net.network).eval()
            twin.load_state_dict(net.state_dict())
            for level, value in net(images).items():
                self.assertTrue(torch.equal(twin(images)[level], value), level)
            self.assertEqual(twin.test_size, (300, 700, 8))
            self.assertEqual(twin.network, net.network)
        self.assertEqual(small_net().test_size, (450, 1200, None))

    def test_initialisation(self):
        torch.manual_seed(0)
        net = UPerNet({"object": 50, "scene": 40, "texture": 30}, "resnet18", channels=64)
        for name, module in net.named_modules():
            own = not name.startswith("backbone.")
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                fan = weight[0].numel() if own else weight[:, 0].numel()  # in; out
                expected = math.sqrt(2 / fan)  # Kaiming's
                self.assertAlmostEqual(weight.std().item() / expected, 1, delta=0.08, msg=name)
            if isinstance(module, nn.BatchNorm2d) and own:
                self.assertTrue((module.weight == 1).all(), name)
                self.assertTrue(torch.allclose(module.bias, torch.tensor(1e-4)), name)


# ---------------------------------------------------------------- in somebody else's hands
class Adapter(nn.Module):
    """What a user puts around a layer."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1


class TestElsewhere(unittest.TestCase):
    def setUp(self):
        self.net = small_net()
        self.images = torch.rand(2, 3, 64, 96)

    def assert_same(self, found: dict, expected: dict, tolerance: float = 1e-5):
        self.assertEqual(found.keys(), expected.keys())
        for key, value in expected.items():
            error = relative_error(found[key].cpu().float(), value)
            self.assertLessEqual(error, tolerance, key)

    def test_examples_of_the_readme_run(self):
        readme = Path(HERE, "README.md").read_text(encoding="utf-8")
        examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        self.assertGreaterEqual(len(examples), 2)
        for example in examples:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(example, {})
            promised = re.findall(r"print\(.*# (.*)", example)
            self.assertTrue(promised)
            for line, shapes in zip(said.getvalue().splitlines(), promised, strict=True):
                self.assertEqual(re.findall(r"\d+", line), re.findall(r"\d+", shapes))

    def test_every_module_runs_by_being_called(self):
        called = set()
        for name, module in self.net.named_modules():
            module.register_forward_hook(lambda *_, name=name: called.add(name))
        self.net(self.images)
        for name, module in self.net.named_modules():
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                self.assertIn(name, called)

    def test_batch_norm_can_be_folded_into_the_convolutions(self):
        for pool in ("prroi", "adaptive", "pspnet"):
            net = small_net(pool=pool)
            folded = copy.deepcopy(net)
            for module in folded.modules():
                if isinstance(module, nn.Sequential) and len(module) > 1:
                    if isinstance(module[1], nn.BatchNorm2d):
                        module[0] = fuse_conv_bn_eval(module[0], module[1])
                        module[1] = nn.Identity()
            self.assertIsNotNone(folded.fusion.conv[0].bias)
            self.assertIsNotNone(folded.ppm.branches[3][0].bias)
            with torch.inference_mode():
                self.assert_same(folded(self.images), net(self.images))

    def test_pruned_weights_stay_pruned_in_training(self):
        net = self.net.to(memory_format=torch.contiguous_format).train()
        convs = (net.fusion.conv[0], net.ppm.branches[3][0])
        before = []
        for conv in convs:
            prune.l1_unstructured(conv, "weight", amount=0.5)
            before.append(conv.weight.detach().clone())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            net(self.images)["object"].square().mean().backward()
            optimizer.step()
        net(self.images)
        for conv, weight in zip(convs, before):
            pruned = weight == 0
            self.assertAlmostEqual(pruned.float().mean().item(), 0.5, places=2)
            self.assertTrue((conv.weight[pruned] == 0).all())
            self.assertTrue((conv.weight != weight)[~pruned].any())

    def test_an_adapter_around_the_convolution_of_the_fusion(self):
        fusion = self.net.fusion
        maps = [torch.rand(2, 8, n, n) for n in (16, 8, 4, 2)]
        conv, norm, relu = fusion.conv
        expected = relu(norm(conv(maps) + 1))
        fusion.conv[0] = Adapter(conv)
        torch.testing.assert_close(fusion(maps), expected)

    def test_export_with_free_batch_height_and_width(self):
        free = getattr(torch.export.Dim, "AUTO", None)
        options = {}
        sizes = [(2, 64, 96)]  # alone, before PyTorch 2.6, which has no AUTO
        if free is not None:
            options["dynamic_shapes"] = {"images": {0: free, 2: free, 3: free}}
            sizes = [(2, 64, 96), (3, 75, 107), (1, 33, 161)]
        loose = {}
        if "2.11" <= torch.__version__ < "2.14":
            # A guard of its max pooling takes sizes of one parity alone.
            loose["check_guards"] = False
        for pool, classes in (("prroi", {"object": 7, "scene": 3}), ("pspnet", {"scene": 3})):
            net = small_net(classes, pool=pool)
            exported = torch.export.export(net, (self.images,), **options).module(**loose)
            for n, height, width in sizes:
                images = torch.rand(n, 3, height, width)
                self.assert_same(exported(images), net(images))

    def test_compiled_values_and_gradients_at_several_sizes(self):
        torch.compiler.reset()
        net = small_net({"object": 7}, fpn=4)  # quicker to trace
        compiled = torch.compile(net, backend="eager")  # as traced, without a C++ compiler
        for size in ((64, 96), (75, 107)):
            images = torch.rand(2, 3, *size)
            logits = []
            gradients = []
            for network in (net, compiled):
                net.zero_grad()
                logits.append(network(images))
                logits[-1]["object"].sum().backward()
                gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
            self.assert_same(logits[1], logits[0], 1e-5)
            self.assert_same(gradients[1], gradients[0], 1e-3)

    def test_copied_in_another_memory_layout_and_in_bfloat16(self):
        twin = copy.deepcopy(self.net)
        twin.to(memory_format=torch.contiguous_format)
        state = self.net.state_dict()
        twin.load_state_dict({key: value.contiguous() for key, value in state.items()})
        with torch.inference_mode():
            exact = self.net(self.images)
            self.assert_same(twin(self.images), exact)
            rounded = self.net.bfloat16()(self.images.bfloat16())
        self.assertEqual({value.dtype for value in rounded.values()}, {torch.bfloat16})
        self.assert_same(rounded, exact, 0.1)

    @unittest.skipUnless(torch.cuda.is_available(), "no CUDA device")
    def test_on_cuda_as_on_the_cpu(self):
        exact = self.net(self.images)
        net = copy.deepcopy(self.net).cuda()
        images = self.images.cuda()
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.assert_same(net(images), exact, 1e-3)
            for amp in (torch.bfloat16, torch.float16):
                with torch.autocast("cuda", amp):
                    self.assert_same(net(images), exact, 0.1)


# ---------------------------------------------------------------- pooling and fusion
class TestPooling(unittest.TestCase):
    def test_weights(self):
        for bins in (1, 2, 3, 6):
            for h, w in ((1, 2), (4, 7), (5, 38), (19, 7)):
                x = torch.rand(2, 3, h, w)
                for pool, weights in (
                    ("prroi", upernet.prroi_weights),
                    ("adaptive", upernet.average_weights),
                ):
                    pooled = weights(bins, h, x.device) @ x @ weights(bins, w, x.device).T
                    expected = plain_pool(pool, x, bins)
                    with self.subTest(pool=pool, bins=bins, size=(h, w)):
                        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)

    def test_branches_train_as_the_plain_line(self):
        """In training mode batch norm and the resize do not commute."""
        c5 = torch.rand(2, 6, 5, 7)
        for pool in ("prroi", "adaptive", "pspnet"):
            ppm = upernet.PPM(6, 4, pool)
            maps = [c5]
            for bins, (conv, norm, relu) in zip((1, 2, 3, 6), ppm.branches):
                pooled = plain_pool(pool, c5, bins)
                if pool == "pspnet":
                    maps.append(plain_resize(relu(norm(conv(pooled))), (5, 7)))
                else:
                    maps.append(relu(norm(conv(plain_resize(pooled, (5, 7))))))
            expected = ppm.last(torch.cat(maps, dim=1))
            with self.subTest(pool=pool):
                torch.testing.assert_close(ppm(c5), expected, rtol=1e-4, atol=1e-4)


class TestFusion(unittest.TestCase):
    def case(self, n: int, height: int, width: int, dtype=torch.float32, channels: int = 12):
        """A fusion, and P2..P5 for it."""
        torch.manual_seed(0)
        fusion = upernet.Fusion(4, channels).to(dtype)
        train_norms(fusion)
        maps = []
        for k in range(4):
            size = (math.ceil(height / 2**k), math.ceil(width / 2**k))
            maps.append(torch.randn(n, channels, *size, dtype=dtype))
        return fusion, maps

    def gradients(self, way, fusion: nn.Module, maps: list[Tensor]) -> list[Tensor]:
        """The fused map, and the gradients of the maps and of the parameters."""
        maps = [x.clone().requires_grad_() for x in maps]
        y = way(maps)
        torch.manual_seed(1)
        loss = (y * torch.randn_like(y)).sum()
        return [y, *torch.autograd.grad(loss, [*maps, *fusion.parameters()])]

    def test_both_ways_are_the_papers_line_in_values_and_gradients(self):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            for n, height, width in ((1, 8, 8), (2, 24, 32), (3, 13, 19), (2, 1, 9), (1, 37, 5)):
                for training in (True, False):
                    fusion, maps = self.case(n, height, width, dtype)
                    conv, norm, relu = fusion.train(training).conv

                    def papers_line(maps):
                        upsampled = [plain_resize(x, (height, width)) for x in maps]
                        y = F.conv2d(torch.cat(upsampled, dim=1), conv.weight, padding=1)
                        return relu(norm(y))

                    expected = self.gradients(papers_line, fusion, maps)
                    for way in (fusion, fusion.plain):
                        found = self.gradients(way, fusion, maps)
                        with self.subTest(dtype=dtype, size=(height, width), training=training):
                            for ours, plain in zip(found, expected, strict=True):
                                self.assertLessEqual(relative_error(ours, plain), tolerance)

    def test_bf16_is_as_near_to_float32_as_the_plain_way(self):
        for height, width in ((24, 32), (31, 45)):
            fusion, maps = self.case(2, height, width, channels=64)
            fusion.eval()
            with torch.inference_mode():
                exact = fusion.plain(maps)
                with torch.autocast("cpu", torch.bfloat16):
                    fast = (fusion(maps) - exact).abs().mean()
                    plain = (fusion.plain(maps) - exact).abs().mean()
            self.assertGreater(plain, 0)
            self.assertLessEqual(fast, 1.5 * plain)


# ---------------------------------------------------------------- losses
class TestLosses(unittest.TestCase):
    def test_part_loss_is_the_plain_loop(self):
        torch.manual_seed(1)
        slices = {1: slice(0, 3), 4: slice(3, 5), 6: slice(5, 9)}
        logits = torch.randn(3, 9, 6, 7, dtype=torch.float16)  # computed in float32
        objects = torch.randint(-1, 8, (3, 6, 7))
        parts = torch.randint(0, 2, (3, 6, 7))
        parts[objects == 1] = torch.randint(0, 3, (int((objects == 1).sum()),))
        parts[objects == 6] = 0  # object 6 has no part in any image
        parts[1][objects[1] == 1] = 0  # and object 1 none in image 1: not valid there

        total = 0.0
        for index, channels in slices.items():
            values = []
            for n in range(3):
                inside = objects[n] == index
                if (parts[n][inside] > 0).any():
                    for y, x in inside.nonzero().tolist():
                        part = int(parts[n, y, x])
                        values.append(plain_cross_entropy(logits[n, channels, y, x], part))
            if values:
                total += np.mean(values)
        self.assertGreater(total, 0)
        found = upernet.part_loss(logits, objects, parts, slices)
        self.assertAlmostEqual(found.item(), total, places=4)

    def plain_mean(self, logits: Tensor, labels: Tensor) -> float:
        """The mean cross entropy over the labelled pixels; (N, K, pixels) and (N, pixels)."""
        values = []
        for n, k in (labels >= 0).nonzero().tolist():
            values.append(plain_cross_entropy(logits[n, :, k], int(labels[n, k])))
        return np.mean(values)

    def test_others_are_the_mean_over_what_is_labelled(self):
        """Texture is predicted at every pixel."""
        y = torch.randn(2, 5, 4, 6)
        labels = torch.randint(-1, 5, (2, 4, 6), dtype=torch.int16)
        tags = torch.tensor([2, -1], dtype=torch.int16)
        everywhere = tags[:, None, None].expand(2, 4, 6)
        half = y.half()  # computed in float32
        for level, key, logits, given, of_pixels in (
            ("object", "object", y, labels, labels),
            ("material", "material", half, labels, labels),
            ("texture", "texture_map", y, tags, everywhere),
            ("scene", "scene", y[:, :, 0, 0], tags, everywhere[:, :1, :1]),
        ):
            found = upernet.losses({key: logits}, {level: given}, {})[level]
            expected = self.plain_mean(logits.float().view(2, 5, -1), of_pixels.reshape(2, -1))
            self.assertAlmostEqual(found.item(), expected, places=5)

    def test_labels_that_are_missing_or_of_another_size_are_errors(self):
        logits = {"object": torch.randn(2, 4, 6, 7), "part": torch.randn(2, 3, 6, 7)}
        right = torch.zeros(2, 6, 7)
        large = torch.zeros(2, 24, 28)
        slices = {1: slice(0, 3)}
        for labels in (
            {"object": right},
            {"part": right},
            {"object": large, "part": right},
            {"object": right, "part": large},
        ):
            self.assertRaises(ValueError, upernet.losses, logits, labels, slices)
        logits = {"part": logits["part"]}
        self.assertRaisesRegex(
            ValueError, "no labels of object", upernet.losses, logits, {"part": right}, slices
        )

    def test_levels_without_a_label_cost_nothing_and_stay_in_the_graph(self):
        net = small_net({"scene": 3, "object": 4, "part": {1: 3}}).train()
        labels = {
            "scene": -torch.ones(2),
            "object": -torch.ones(2, 16, 16),
            "part": torch.zeros(2, 16, 16),
        }
        logits = net(torch.rand(2, 3, 64, 64))
        found = upernet.losses(logits, labels, net.part_slices)
        sum(found.values()).backward()
        values = {level: value.item() for level, value in found.items()}
        self.assertEqual(values, {"scene": 0, "object": 0, "part": 0})
        for name, p in net.named_parameters():
            self.assertIsNotNone(p.grad, name)
            self.assertFalse(p.grad.any(), name)


# ---------------------------------------------------------------- our checkpoints
class Own:
    """An object that a file may hold; reading it would run code."""


class TestCheckpoint(unittest.TestCase):
    def setUp(self):
        self.path = join(new_folder("checkpoint"), "some.pt")
        self.net = small_net(test_size=(300, 700, 8))
        self.vocabulary = {
            "scene": ["kitchen", "street", "attic", "beach", "office"],
            "object": ["wall", "car", "pot", "sky", "person", "tree", "road"],
            "part": {
                "car": ["background", "wheel", "door"],
                "person": ["background", "head"],
            },
            "material": ["wood", "brick", "metal", "glass", "stone", "fabric"],
            "texture": ["dotted", "banded", "grid", "woven"],
        }
        self.content = {
            "model": self.net.state_dict(),
            "network": self.net.network,
            "vocabulary": self.vocabulary,
        }

    def test_holds_a_network_and_its_vocabulary(self):
        torch.save(self.content, self.path)
        net, vocabulary = upernet.load(self.path)
        self.assertEqual(vocabulary, self.vocabulary)
        self.assertEqual(net.test_size, (300, 700, 8))
        self.assertFalse(net.training)
        images = torch.rand(1, 3, 64, 96)
        expected = self.net(images)
        for level, value in net(images).items():
            torch.testing.assert_close(value, expected[level])

    def test_of_an_earlier_edition(self):
        del self.content["network"]["test_size"]
        self.content["network"]["classes"] = dict(reversed(CLASSES.items()))
        self.content["arguments"] = {"sizes": [300, 375, 450, 525, 600], "max_size": 1000}
        torch.save(self.content, self.path)
        net, content = upernet.read_checkpoint(self.path)
        self.assertEqual(net.test_size, (450, 1000, None))
        self.assertEqual(content["arguments"]["max_size"], 1000)

    def refused(self, content: dict) -> str:
        torch.save(content, self.path)
        with self.assertRaisesRegex(ValueError, re.escape(self.path)) as caught:
            upernet.load(self.path)
        return str(caught.exception)

    def test_an_object_in_the_file_is_named(self):
        for thing, name in ((np.float64(1), r"numpy\S*\.scalar"), (Own(), r"\.Own\b")):
            torch.save({"meta": {"best": thing}, "state_dict": {}}, self.path)
            with self.subTest(name), self.assertRaisesRegex(ValueError, name) as caught:
                upernet.read_file(self.path)
            self.assertIn(self.path, str(caught.exception))

    def test_what_does_not_fit_is_named(self):
        key = "heads.object.classifier.weight"
        model = self.content["model"]
        weight = model.pop(key)
        for wrong in ({}, {key: weight[:-1]}, {key: 3}, {key: weight * math.nan}):
            self.assertIn(key, self.refused({**self.content, "model": {**model, **wrong}}))
        other = {key: weight, "heads.colour.weight": weight}
        self.content["model"] = {**model, **other}
        self.assertIn("heads.colour.weight", self.refused(self.content))


# ---------------------------------------------------------------- released weights
# Our keys -> theirs, for the authors' two networks and mmsegmentation's.
AUTHORS = {
    "backbone.": "",
    "ppm.branches": "ppm_conv",
    "ppm.last": "ppm_last_conv",
    "fpn.laterals": "fpn_in",
    r"fpn.convs.(\d)": r"fpn_out.\1.0",
}
KEYS = {
    "paper": {
        **AUTHORS,
        "fusion.conv": "conv_fusion",
        r"heads.(\w+).conv.0": r"\1_head.0",
        "heads.scene.classifier": "scene_head.2",
        r"heads.(\w+).classifier": r"\1_head.1",
    },
    "ade20k": {
        **AUTHORS,
        "fusion.conv": "conv_last.0",
        "heads.object.classifier": "conv_last.1",
    },
    "mmseg": {
        r"((?!backbone).*)\.0\.weight$": r"\1.conv.weight",
        r"((?!backbone).*)\.1\.(\w+)$": r"\1.bn.\2",
        "backbone.conv1": "backbone.stem.0",
        "backbone.bn1": "backbone.stem.1",
        "backbone.conv2": "backbone.stem.3",
        "backbone.bn2": "backbone.stem.4",
        "backbone.conv3": "backbone.stem.6",
        "backbone.bn3": "backbone.stem.7",
        r"ppm.branches.(\d)": r"decode_head.psp_modules.\1.1",
        "ppm.last": "decode_head.bottleneck",
        "fpn.laterals": "decode_head.lateral_convs",
        "fpn.convs": "decode_head.fpn_convs",
        "fusion.conv": "decode_head.fpn_bottleneck",
        "heads.object.classifier": "decode_head.conv_seg",
    },
}
COUNTS = {"scene": 365, "object": 336, "part": {1: 427}, "material": 26}
NETWORKS = {
    "paper": {"classes": COUNTS, "stem": "deep"},
    "ade20k": {"classes": {"object": 150}, "head_conv": False, "pool": "adaptive", "stem": "deep"},
    "mmseg": {"classes": {"object": 150}, "head_conv": False, "pool": "pspnet", "stem": "v1c"},
}
SEEDS = {"paper": 7, "ade20k": 13, "mmseg": 17}


def stand_in(key: str, shape: tuple, seed: int) -> Tensor:
    """A value for one key of a released file that anybody can rebuild: numpy's old generator,
    seeded by the key."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    if len(shape) > 1:
        value = generator.standard_normal(shape) / math.prod(shape[1:]) ** 0.5
    elif len(shape) == 0:
        value = np.zeros(())
    elif key.endswith(("running_var", "weight")):
        value = generator.uniform(0.5, 1.5, shape)
    else:
        value = generator.standard_normal(shape) * 0.1
    return torch.from_numpy(value.astype(np.float32))


def their_key(release: str, key: str) -> str:
    for pattern, replacement in KEYS[release].items():
        key = re.sub(f"^{pattern}", replacement, key)
    return key


def released_files(
    release: str, seed: int, meta: dict = {}, **network
) -> tuple[list[str], dict[str, Tensor]]:
    """The files of a released network, with stand-in values under its keys, and the same values
    under ours."""
    with torch.device("meta"):
        shapes = UPerNet(**{**NETWORKS[release], **network}).state_dict()
    del shapes["mean"], shapes["std"]
    ours = {}
    encoder = {}
    decoder = {}
    for key, value in shapes.items():
        name = their_key(release, key)
        ours[key] = stand_in(name, tuple(value.shape), seed)
        of_file = encoder if key.startswith("backbone.") else decoder
        of_file[name] = ours[key]
        if name.endswith(".running_mean") and release != "mmseg":
            prefix = name.removesuffix("running_mean")
            for own in ("_tmp_running_mean", "_tmp_running_var", "_running_iter"):
                of_file[prefix + own] = ours[key]  # their synchronised batch norm's own sums
    files = {"encoder.pth": encoder, "decoder.pth": decoder}
    if release == "mmseg":
        auxiliary = {
            "auxiliary_head.conv_seg.bias": torch.ones(150),
            "auxiliary_head.convs.0.bn.weight": torch.ones(9),
        }
        state = {**encoder, **decoder, **auxiliary}
        files = {"upernet.pth": {"meta": meta, "state_dict": state}}
    place = new_folder(release)
    paths = []
    for name, content in files.items():
        paths.append(join(place, name))
        torch.save(content, paths[-1])
    return paths, ours


def class_tables(place: str) -> str:
    """Tables in the format of the authors' joint_dataset, with their numbers of classes and names
    of our own."""
    for level in ("scene", "object", "material"):
        rows = ["label,name"]
        for k in range(COUNTS[level]):
            background = k == 0 and level != "scene"
            rows.append(f"{k},-" if background else f"{k},{level} {k}")
        write(join(place, f"{level}.csv"), "\n".join(rows))
    rows = ["object_label,object_name,part_labels,part_names"]
    counts = 7 * [4] + 43 * [6] + 27 * [5] + [6]  # 427 channels, backgrounds counted
    for k, count in enumerate(counts, start=1):
        names = ["-", *(f"part {p}" for p in range(1, count))]
        rows.append(f"{k},object {k},,{';'.join(names)}")
    write(join(place, "object_part_hierarchy.csv"), "\n".join(rows))
    rows = [
        "dataset,category,raw_label,raw_name,broden_label,broden_name",
        "ade20k,object,7,car;auto,3,object 3",
        "ade20k,object,300,wall,1,object 1",
        "ade20k,object,9,dust,0,-",
        "ade20k,part,20,wheel,1,part 1",
        "ade20k,part,21,dent,0,-",
        "ade20k,scene,0,,-1,nothing",
        "ade20k,scene,1,bus_stop-s,17,scene 17",
        "os,material,2,brick,25,material 25",
        "os,material,3,mud,0,-",
    ]
    write(join(place, "label_assignment.csv"), "\n".join(rows))
    return place


# What others' networks answer for the stand-in values: positions in the flattened (classes, 24,
# 32), with that of the largest absolute logit last; then the logits there.
ANSWERS = {
    "paper": {
        "scene": (
            "26 45 78 90 106 239 259 311 346 185",
            "30.939 -12.719 -21.678 19.938 -18.337 39.410 -8.453 21.192 -40.362 111.825",
        ),
        "object": (
            "7083 86448 124606 142654 150803 154187 167902 206855 246243 18894",
            "3.665 38.188 117.982 -37.626 -58.221 65.422 27.454 -45.236 29.480 -259.550",
        ),
        "part": (
            "1576 137135 217882 218834 227395 236683 244721 289944 290522 22709",
            "14.222 -144.378 21.345 57.147 19.612 -113.827 41.647 127.635 -30.465 -292.842",
        ),
        "material": (
            "45 1236 1573 2735 5037 10661 13971 18329 18680 18126",
            "-162.589 15.987 89.987 -62.989 -41.878 25.245 -151.120 -222.919 100.237 -372.585",
        ),
    },
    "ade20k": {
        "object": (
            "1040 5519 22518 28719 29844 57039 81519 102641 107530 88628",
            "-1.02390 0.55411 0.54437 -2.42830 -1.37840 "
            "3.34938 2.32610 -0.73193 -0.14859 6.76995",
        ),
    },
    "mmseg": {
        "object": (
            "17848 21992 44479 44570 51763 52345 68274 72929 98819 24910",
            "-1.88349 1.53542 -0.72293 -1.06470 0.37761 "
            "0.25192 -1.44015 0.42061 1.45834 -5.57749",
        ),
    },
}


class TestRelease(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        names = [f"thing {k}" for k in range(1, 151)]
        names[58] = "screen"
        names[130] = "screen"
        rows = ["Idx,Name"]
        rows.extend(f"{k},{name};other {k}" for k, name in enumerate(names, start=1))
        cls.table = write(join(new_folder("table"), "object150.csv"), "\n".join(rows))
        cls.tables = class_tables(new_folder("joint_dataset"))
        cls.files = {}
        cls.weights = {}
        for release, seed in SEEDS.items():
            cls.files[release], cls.weights[release] = released_files(release, seed)
        cls.networks = {
            "paper": upernet.load_release(*cls.files["paper"], cls.tables),
            "ade20k": upernet.load_release(*cls.files["ade20k"], cls.table),
            "mmseg": upernet.load_mmseg(*cls.files["mmseg"], names),
        }

    def test_recorded_answers(self):
        for release, seed in SEEDS.items():
            bgr = np.random.RandomState(seed).uniform(0, 255, (1, 3, 96, 128))
            rgb = torch.from_numpy(bgr.astype(np.float32)[:, ::-1] / 255)
            net, _ = self.networks[release]
            with torch.inference_mode():
                logits = net(rgb)
            self.assertEqual(logits.keys(), ANSWERS[release].keys())
            for level, (positions, answers) in ANSWERS[release].items():
                found = logits[level].flatten().numpy()
                expected = np.array(answers.split(), np.float64)
                largest = abs(expected[-1])
                errors = found[np.array(positions.split(), int)] - expected
                with self.subTest(release, level=level):
                    self.assertLessEqual(abs(errors).max() / largest, 1e-4)
                    self.assertLessEqual(abs(abs(found).max() - largest) / largest, 1e-4)

    @unittest.skipUnless(os.path.isdir(join(SHARED, "data")), "no recorded keys here")
    def test_stand_ins_have_the_keys_of_the_released_files(self):
        folders = {"paper": "upp_release", "ade20k": "mit_release", "mmseg": "mmseg_release"}
        for release, name in folders.items():
            keys = read_json(SHARED, name, "keys_resnet50.json")["keys"]
            if release != "mmseg":
                keys = {**keys["encoder"], **keys["decoder"]}
            found = set()
            for path in self.files[release]:
                content = torch.load(path, weights_only=True)
                found.update(content.get("state_dict", content))
            different = found.symmetric_difference(keys)
            self.assertEqual({key for key in different if "auxiliary_head" not in key}, set())

    def test_other_depths_and_widths(self):
        for release, depth in (("paper", 101), ("mmseg", 18)):
            network = {"backbone": f"resnet{depth}", "channels": 32}
            files, weights = released_files(release, 3, **network)
            load = {"paper": upernet.load_release, "mmseg": upernet.load_mmseg}[release]
            net, _ = load(*files, *([self.tables] if release == "paper" else []))
            state = net.state_dict()
            for key, value in weights.items():
                if release == "paper" and key == "backbone.conv1.weight":
                    value = value.flip(1)  # BGR
                self.assertTrue(torch.equal(state[key], value), key)

    def test_sizes_and_classes(self):
        sizes = {release: net.test_size for release, (net, _) in self.networks.items()}
        expected = {"paper": (450, 1000, 8), "ade20k": (450, 1000, 32), "mmseg": (512, 2048, 1)}
        self.assertEqual(sizes, expected)  # short side, longest side, multiple
        net, vocabulary = self.networks["paper"]
        self.assertEqual(net.part_slices[2], slice(4, 8))
        self.assertEqual(len(vocabulary["part"]), 78)
        for level, first in (("scene", "scene 0"), ("object", "background")):
            self.assertEqual(vocabulary[level][:2], [first, f"{level} 1"])
            self.assertEqual(len(vocabulary[level]), COUNTS[level])
        parts = ["background", "part 1", "part 2", "part 3"]
        self.assertEqual(vocabulary["part"]["object 1"], parts)
        objects = self.networks["ade20k"][1]["object"]
        self.assertEqual(objects[0], "thing 1")
        self.assertEqual(len(set(objects)), 150)  # although two begin with "screen"

    def assert_refused(self, named: str, encoder: str, decoder: str, labels: str):
        with self.subTest(named), self.assertRaisesRegex(ValueError, re.escape(named)):
            upernet.load_release(encoder, decoder, labels)

    def test_wrong_and_swapped_files_and_tables(self):
        encoder, decoder = self.files["paper"]
        state = torch.load(decoder, weights_only=True)
        del state["fpn_in.1.0.weight"]
        damaged = join(new_folder("wrong"), "damaged.pth")
        torch.save(state, damaged)
        self.assert_refused(decoder, decoder, encoder, self.tables)
        ours = join(new_folder("wrong"), "ours.pt")
        torch.save({"model": state, "arguments": {}}, ours)
        self.assert_refused("conv1.weight is missing", ours, decoder, self.tables)
        self.assert_refused("nothing.pth", "nothing.pth", decoder, self.tables)
        self.assert_refused("fpn.laterals.1.0.weight", encoder, damaged, self.tables)
        self.assert_refused("nowhere", encoder, decoder, "nowhere")
        self.assert_refused(self.table, encoder, decoder, self.table)
        short = write(join(new_folder("wrong"), "short.csv"), "Idx,Name\n1,wall\n")
        self.assert_refused(short, *self.files["ade20k"], short)
        copied = join(new_folder("wrong"), "tables")
        shutil.copytree(self.tables, copied)
        rows = "label,object_name,part_labels,part_names\n1,object 3"
        write(join(copied, "object_part_hierarchy.csv"), rows)
        self.assert_refused(copied, encoder, decoder, copied)


class TestMmseg(unittest.TestCase):
    """Files of mmsegmentation's; what its network answers is in TestRelease."""

    def file(self, meta: dict = {}, classes: int = 3) -> str:
        network = {"backbone": "resnet18", "channels": 8, "classes": {"object": classes}}
        paths, _ = released_files("mmseg", 1, meta, **network)
        return paths[0]

    def test_names_of_the_classes(self):
        names = ["wall", "sky, blue", "tree"]  # whole: a comma is part of the name
        numbered = ["class 1", "class 2", "class 3"]
        for meta, given, expected in (
            ({"CLASSES": tuple(names)}, None, names),
            ({"dataset_meta": {"classes": names}}, None, names),
            ({"CLASSES": names}, ["a", "b", "c"], ["a", "b", "c"]),
            ({"CLASSES": ["wall", "sky", "wall"]}, None, ["wall (1)", "sky", "wall (3)"]),
            ({"config": "align_corners=False"}, None, numbered),
        ):
            net, vocabulary = upernet.load_mmseg(self.file(meta), given)
            self.assertEqual(vocabulary, {"object": expected})
            self.assertEqual(net.classes, {"object": 3})

    def test_refused_files(self):
        aligned = "decode_head=dict(type='UPerHead', align_corners = True)"  # its 769x769 networks
        for path in (self.file({"config": aligned}), self.file({"cfg": aligned})):
            self.assertRaisesRegex(ValueError, re.escape(path), upernet.load_mmseg, path)
        self.assertRaisesRegex(ValueError, "upernet.pth", upernet.load_mmseg, self.file(), ["a"])
        path = self.file()
        content = torch.load(path, weights_only=True)
        state = content["state_dict"]
        for wrong in (
            {"state_dict": torch.zeros(3)},
            {"state_dict": {**state, 5: torch.zeros(3)}},
            {"state_dict": {**state, "decode_head.conv_seg.bias": torch.zeros(3).to_sparse()}},
            {"state_dict": {**state, "decode_head.fpn_bottleneck.conv.weight": torch.zeros(0)}},
            {"meta": {"CLASSES": 5}},
            {"meta": "ab"},
        ):
            torch.save({**content, **wrong}, path)
            with self.subTest(wrong.keys()):
                self.assertRaisesRegex(ValueError, re.escape(path), upernet.load_mmseg, path)


# ---------------------------------------------------------------- data
def scanned(root: str, source: str = "ade20k", **options) -> tuple[datasets.Index, str]:
    """(index, stderr) of a scan with its cache below `root`."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        index = datasets.scan(root, source, join(root, ".cache"), **options)
    return index, err.getvalue()


def vocabulary_of(index: datasets.Index, **minima) -> dict:
    return datasets.build_vocabulary({index.source: index}, least(**minima))


def source_of(root: str, source: str = "ade20k", **sizes) -> datasets.Source:
    """A source with all of its classes."""
    index, _ = scanned(root, source)
    cache = join(root, ".cache")
    return datasets.Source(index, vocabulary_of(index), None, cache, **sizes)


def succeeded(test: unittest.TestCase, main, *argv) -> str:
    """What a command printed that had nothing to complain about."""
    status, said, err = command(main, *argv)
    test.assertEqual((status, err), (0, ""))
    return said


def refusal(test: unittest.TestCase, main, *argv) -> str:
    """The only line on stderr of a command that ends with status 2."""
    status, _, err = command(main, *argv)
    test.assertEqual(status, 2, err)
    test.assertEqual(err.count("\n"), 1, err)
    return err


def columns(*values: int) -> np.ndarray:
    """A mask of 40 rows with ten columns of each number."""
    return np.repeat([values], 40, axis=0).repeat(10, axis=1)


def textures(root: str, **listed: list[str]) -> str:
    """DTD with the images that train1, val1 and test1 list: 70 x 210, lighter to the right."""
    picture = np.zeros((70, 210, 3))
    picture[:, 70:140] = 100
    picture[:, 140:] = 200
    for name in ("train1", "val1", "test1"):
        images = listed.get(name, [])
        write(join(root, "dtd", "labels", f"{name}.txt"), "\n".join(images))
        for image in images:
            save(picture, root, "dtd", "images", image)
    return root


def surfaces(root: str, names: list[str], reds: list[np.ndarray]) -> str:
    """OpenSurfaces with photos of 48 x 64 pixels, and for each a map of numbers, 1 for the first
    name."""
    table = "substance_id,substance_name,red_color"
    for k, name in enumerate(names, start=1):
        table += f"\n{100 + k},{name},{k}"
    write(join(root, "os", "label-substance-colors.csv"), table)
    for k, red in enumerate(reds):
        save(noise(48, 64), root, "os", "photos", f"{k}.jpg")
        picture = np.stack([red, 7 + 0 * red, 9 + 0 * red], axis=-1)
        save(picture, root, "os", "photos-labels", f"{k}.png")
    return root


class TestVocabulary(unittest.TestCase):
    def test_objects_and_scenes_after_merging(self):
        """Objects need images and pixels, scenes images; names in UTF-8 or Latin-1."""
        names = {7: "voiture à cheval, auto", 8: "voiture à chevals"}
        names.update({9: "sky", 10: "dot", 300: "wall"})
        scenes = [["outdoor", "urban", "Street"], ["street"], ["indoor", "misc"], [], ["attic"]]
        ade = Ade()
        for k, scene in enumerate(scenes):
            objects = np.full((40, 40), 300)
            objects[:10] = 9 if k < 2 else 0  # sky in two images
            objects[10:20] = 7 if k % 2 else 8  # together 2000 pixels in five
            objects[39, 39] = 10  # five pixels of dot
            stem = ade.add(objects, names, scene)
        text = Path(f"{stem}.json").read_text(encoding="utf-8")
        write(f"{stem}.json", text, "latin-1")
        index = ade.index()
        self.assertEqual(index.tags, ["street", "street", "", "", "attic"])
        vocabulary = vocabulary_of(index, images=5, pixels=2000, scenes=2)
        expected = {"scene": ["street"], "object": ["wall", "voiture à cheval"]}
        self.assertEqual(vocabulary, expected)
        source = datasets.Source(index, vocabulary)
        scenes = [source.labels(i)["scene"] for i in range(5)]
        self.assertEqual(scenes, [0, 0, -1, -1, -1])

    def test_first_synonym_plural_and_sides(self):
        names = "Building, edifice;buildings;bus;box;boxes;berry;berries;glasses".split(";")
        expected = "building;building;bus;box;box;berry;berry;glasses".split(";")
        self.assertEqual(list(datasets.merged_names(dict(enumerate(names))).values()), expected)
        names = {1: "left arm", 2: "right arm", 3: "arms", 4: "upright leg"}
        expected = {1: "arm", 2: "arm", 3: "arm", 4: "upright leg"}
        self.assertEqual(datasets.merged_names(names, parts=True), expected)

    def test_parts_are_kept_per_object_on_the_first_level(self):
        names = {5: "car", 6: "house", 20: "left wheel", 21: "right wheel", 22: "door"}
        names.update({23: "knob", 24: "background"})
        parts = columns(20, 0, 22, 24)
        parts[20:, :10] = 21
        ade = Ade()
        for k in range(3):
            parts[0, 15] = 22 if k == 0 else 0  # a car's door in a single image
            stem = ade.add(columns(5, 5, 6, 6), names, ["street"], parts)
            ade.save_numbers(23 * (parts == 22), f"{stem}_parts_2.png")  # parts of parts
        index = ade.index()
        vocabulary = vocabulary_of(index, parts=2)
        expected = {"car": ["background", "wheel"], "house": ["background", "door"]}
        self.assertEqual(vocabulary["part"], expected)
        part = datasets.Source(index, vocabulary).labels(0)["part"]  # no car's door
        assert_array_equal(part, columns(1, 0, 1, 0))
        self.assertEqual(vocabulary_of(index)["part"]["car"], ["background", "wheel", "door"])

    def test_opensurfaces_merges(self):
        merged = {
            "Concrete": "stone",
            "Stone": "stone",
            "Plastic - clear": "plastic",
            "Plastic - opaque": "plastic",
            "Granite/Marble": "polished stone",
            "Carpet/Rug": "carpet",
            "Fabric/Cloth": "fabric",
            "Paper/Tissue": "paper",
            "Rubber/Latex": "rubber/latex",
            "Sky": None,
            "Wood-painted": None,
            "Brick": None,  # in one image alone
        }
        red = np.ones((60, 1), int) * (np.arange(65) // 5)  # not of the photo's size
        root = surfaces(new_folder("surfaces"), list(merged), [red, red * (red < 12)])
        index, err = scanned(root, "os")
        self.assertEqual(err, "")
        vocabulary = vocabulary_of(index, images=2)
        materials = sorted(set(merged.values()) - {None})
        self.assertEqual(vocabulary, {"material": materials})
        labels = datasets.Source(index, vocabulary).labels(0)["material"]
        expected = [-1]  # red 0
        for name in merged.values():
            expected.append(materials.index(name) if name else -1)
        assert_array_equal(labels, np.array(expected)[red])


def cityscapes_entries(folder, paths):
    entries = []
    for path in paths:
        if path.endswith("_leftImg8bit.png"):
            labels = path.replace("leftImg8bit", "gtFine", 1)
            labels = labels.replace("_leftImg8bit", "_gtFine_labelIds")
            side = datasets.side_of(path.split("/")[1])
            entries.append(datasets.Entry(path, side, labels=labels))
    return entries


def cityscapes_numbers(picture):
    return np.asarray(picture).astype(np.int32)


def cityscapes_table(folder, numbers):
    return {7: "road", 11: "building", 26: "car"}


def cityscapes_names(index):
    return {"object": index.names}


# Another data set, as a reader might add it. Nothing else has to change.
CITYSCAPES = datasets.DataSet(
    name="cityscapes",
    source="cityscapes",
    folders=("cityscapes",),
    mark="leftImg8bit",
    contents=("leftImg8bit", "gtFine"),
    levels=("object",),
    map_level="object",
    entries=cityscapes_entries,
    numbers=cityscapes_numbers,
    table=cityscapes_table,
    names_by_level=cityscapes_names,
    void=(0, 4),
)


class TestAnotherDataSet(unittest.TestCase):
    def setUp(self):
        patch = mock.patch("datasets.DATA_SETS", [*datasets.DATA_SETS, CITYSCAPES])
        patch.start()
        self.addCleanup(patch.stop)
        self.root = new_folder("cityscapes")
        for k, side in enumerate(("train", "train", "val")):
            photo = f"cityscapes/leftImg8bit/{side}/aachen/{k}_leftImg8bit.png"
            save(np.full((40, 60, 3), 50 * k), self.root, photo)
            labels = f"cityscapes/gtFine/{side}/aachen/{k}_gtFine_labelIds.png"
            save(columns(0, 4, 7, 11, 26, 26), self.root, labels)

    def test_is_one_class(self):
        index, err = scanned(self.root, "cityscapes")
        self.assertEqual(err, "")
        source = source_of(self.root, "cityscapes")
        labels = source.labels(2)["object"]
        self.assertTrue((labels == columns(-1, -1, 2, 1, 0, 0)).all())
        self.assertTrue((np.asarray(source.photo(2)) == 100).all())

    def test_trains_with_its_official_split(self):
        out = new_folder("out")
        options = ("--data", "cityscapes", "--root", self.root, "--out", out, "--weights", "none")
        options += ("--split", "official", "--iters", 1, "--backbone", "resnet18")
        status, _, err = command(train.main, *options, *SMALL)
        self.assertEqual(status, 0, err)
        checkpoint = checkpoint_of(out)
        self.assertEqual(checkpoint["vocabulary"], {"object": ["car", "building", "road"]})
        validation = ["leftImg8bit/val/aachen/2_leftImg8bit.png"]
        self.assertEqual(checkpoint["split"], {"cityscapes": validation})

    def test_two_sources_of_one_level_are_refused(self):
        own_data(self.root, [columns(1, 2)])
        line = refusal(self, datasets.main, "--data", "ade20k,cityscapes", "--root", self.root)
        self.assertRegex(line, "ade20k.*cityscapes")


# Not sooner: a signal while PyTorch starts a thread leaves that thread with a traceback of its own.
KILLED_READER = """
import multiprocessing, os, signal, sys
import datasets

plain = datasets.progress

def kill_a_reader(items, title):
    for k, item in enumerate(plain(items, title)):
        if k == 20:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        yield item

datasets.progress = kill_a_reader
datasets.main(["--data", "ade20k", "--root", sys.argv[1], "--workers", "2"])
"""


class TestScan(unittest.TestCase):
    WALL = np.full((40, 40), 5)

    def check_set_aside(self, root: str, source: str, paths: list[str], kept: list[str]):
        """Asserts that the images of these broken files are set aside, and others are kept."""
        options = ("--data", source, "--root", root)
        self.assertIn("--allow-broken", refusal(self, datasets.main, *options))
        index, _ = scanned(root, source, allow_broken=True)
        self.assertEqual(index.images, kept)
        self.assertEqual(len(index.broken), len(paths))
        _, out, _ = command(datasets.main, *options, "--allow-broken")
        for path in paths:
            self.assertIn(f" {path}: ", out)

    def test_broken_files_of_ade20k(self):
        cases = [
            (".jpg", b"\xff\xd8 no picture"),
            ("_seg.png", None),  # missing
            ("_parts_1.png", b"no picture"),
            (".json", None),
            (".json", b"{"),
            (".json", b'{"annotation": {"scene": 3, "object": []}}'),
            (".json", b'{"annotation": {"scene": [], "object": [{"name": "wall"}]}}'),
            ("_seg.png", "other size"),
            ("_parts_1.png", "other size"),
        ]
        ade = Ade()
        broken = []
        for ending, content in [*cases, ("", None)]:
            path = ade.add(self.WALL, {5: "wall"}, ["street"], 0 * self.WALL) + ending
            broken.append(os.path.relpath(path, ade.folder))
            if content == "other size":
                ade.save_numbers(self.WALL[:20], path)
            elif content is not None:
                Path(path).write_bytes(content)
            elif ending:
                os.remove(path)
        stem = broken.pop()
        self.check_set_aside(ade.root, "ade20k", broken, [f"{stem}.jpg"])

    def test_broken_files_of_other_layouts(self):
        root = surfaces(new_folder("others"), ["wood"], [np.ones((64, 64), int)] * 2)
        os.remove(join(root, "os", "photos-labels", "1.png"))
        self.check_set_aside(root, "os", ["photos-labels/1.png"], ["photos/0.jpg"])
        own_data(root, [columns(1, 2)] * 4)
        masks = join(root, "annotations", "training")
        save(np.ones((40, 20, 3)) * [1, 200, 0], masks, "1.png")  # in colours
        save(np.ones((30, 20)), masks, "2.png")
        os.remove(join(masks, "3.png"))
        save(Image.fromarray(np.full((40, 20), 1.5, np.float32)), masks, "3.tif")
        paths = [f"annotations/training/{name}" for name in ("1.png", "2.png", "3.tif")]
        self.check_set_aside(root, "ade20k", paths, ["images/training/0.jpg"])

    def test_one_broken_file_in_twenty_is_tolerated(self):
        ade = Ade()
        stems = [ade.add(self.WALL, {5: "wall"}, ["street"]) for _ in range(20)]
        for stem, expected in zip(stems, (0, 2)):
            os.remove(f"{stem}_seg.png")
            status, _, err = command(datasets.main, "--data", "ade20k", "--root", ade.root)
            self.assertEqual(status, expected, err)
            self.assertIn("ADE_train_00000000_seg.png", err)

    def test_parts_count_in_labelled_objects_and_unknown_numbers_are_reported(self):
        names = {5: "car", 6: "wheel"}
        for number, part in ((5, 6), (99, 6), (5, 798)):
            ade = Ade()
            ade.add(columns(0, number, number), names, ["street"], columns(part, part, 0))
            index, err = scanned(ade.root)
            expected = [[0, 0, 0, 400], [0, number, 0, 800], [0, number, part, 400]]
            self.assertEqual(index.pixels.tolist(), expected)
            unknown = [str(n) for n in (number, part) if n not in names]
            self.assertEqual(re.findall(r"\b(?:99|798)\b", err), unknown)

    def test_opens_nothing_again_until_something_changes(self):
        ade = Ade()
        stem = ade.add(self.WALL, {5: "wall"}, ["street"])
        self.assertEqual(ade.index().names, {5: "wall"})
        photo = Path(f"{stem}.jpg")
        content = photo.read_bytes()
        times = (0, photo.stat().st_mtime_ns)
        photo.write_bytes(bytes(len(content)))  # no photo, of the same size and time
        os.utime(photo, ns=times)
        self.assertEqual(ade.index().broken, [])
        photo.write_bytes(content)
        write(f"{stem}.json", Path(f"{stem}.json").read_text().replace("wall", "door"))
        self.assertEqual(ade.index().names, {5: "door"})
        ade.add(self.WALL + 1, {6: "sky"}, ["street"])
        self.assertEqual(ade.index().names, {5: "door", 6: "sky"})
        photo.unlink()
        self.assertEqual(ade.index().names, {6: "sky"})

    def test_ade20k_may_be_the_root_itself(self):
        ade = Ade()
        ade.add(self.WALL, {5: "wall"}, ["street"])
        self.assertEqual(scanned(ade.folder)[0].images, ade.index().images)

    def test_a_damaged_index_is_rebuilt(self):
        ade = Ade()
        ade.add(self.WALL, {5: "wall"}, ["street"])
        ade.index()
        (path,) = Path(ade.root, ".cache").glob("ade20k*")
        for damaged in (b"", path.read_bytes()[:999], b"no index"):
            path.write_bytes(damaged)
            self.assertEqual(ade.index().pixels.tolist(), [[0, 5, 0, 1600]])

    def test_processes_change_nothing_and_a_killed_one_ends_it(self):
        root = new_folder("many")
        pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3))  # takes long to read
        photo = save(pixels, root, "photo.png")
        os.mkdir(join(root, "images"))
        for k in range(210):
            os.symlink(photo, join(root, "images", f"{k}.png"))
            save(np.full((300, 300), k % 3), root, "annotations", f"{k}.png")
        argv = [sys.executable, "-c", KILLED_READER, root]
        environment = {**os.environ, "PYTHONPATH": HERE}
        killed = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)
        self.assertEqual((killed.returncode, killed.stderr.count("\n")), (2, 1), killed.stderr)
        self.assertIn("--workers", killed.stderr)
        index, _ = scanned(root, workers=2)
        self.assertEqual(len(index.images), 210)
        for image, number, _, _ in index.pixels.tolist():
            self.assertEqual(number, int(Path(index.images[image]).stem) % 3)

    def test_other_layouts_are_told_what_to_rename(self):
        layouts = ["images masks", "leftImg8bit gtFine", "JPEGImages SegmentationClass"]
        for layout in (*layouts, "train trainannot"):
            for place in ("", "ade20k"):
                root = new_folder("layout")
                for name in layout.split():
                    save(np.ones((8, 8)), root, place, name, "0.png")
                line = refusal(self, datasets.main, "--data", "ade20k", "--root", root)
                self.assertRegex(line, f"{layout.replace(' ', '|')}.*annotations/")


class TestPhotos(unittest.TestCase):
    def test_endings(self):
        root = new_folder("endings")
        names = ["a.jpg", "b.JPEG", "c.png", "d.webp", "e.tif", "f.TIFF", "g.bmp"]
        for name in names:
            save(np.full((40, 20, 3), 90), root, "images", name)
            save(columns(1, 2), root, "annotations", f"{name[0]}.PNG")
        source = source_of(root)
        self.assertEqual(source.index.images, [f"images/{name}" for name in names])
        for i in range(len(names)):
            self.assertTrue((abs(np.asarray(source.photo(i), int) - 90) < 3).all())
            self.assertTrue((source.labels(i)["object"] == columns(0, 1)).all())

    def test_deep_ones_are_shown_right_or_refused(self):
        values = np.linspace(0, 65535, 800).reshape(40, 20)
        root = new_folder("deep")
        for name, picture in (
            ("0.png", values.astype(np.uint16)),
            ("1.png", (values / 16).astype(np.uint16)),  # 12 of 16 bits
            ("2.tif", (values / 65535).astype(np.float32)),
        ):
            save(Image.fromarray(picture), root, "images", name)
            save(columns(1, 2), root, "annotations", f"{name[0]}.png")
        index, _ = scanned(root, allow_broken=True)
        broken = [path for path, _ in index.broken]
        self.assertEqual(broken, ["images/1.png", "images/2.tif"])
        shown = np.asarray(datasets.open_photo(join(root, "images", "0.png")), np.float64)
        self.assertLess(np.abs(shown - values[..., None] / 257).max(), 1.01)

    def test_are_turned_as_their_exif_data_say(self):
        root = own_data(new_folder("exif"), [columns(1, 2, 2)])
        picture = np.zeros((30, 40, 3), np.uint8)
        picture[:, :20] = 255  # light on the left: once it is turned, on top
        photo = Image.fromarray(picture)
        photo.getexif()[0x0112] = 6  # a quarter to the right
        folder = join(root, "images", "training")
        for ending in ("jpg", "png", "webp", "tif"):
            shutil.rmtree(folder)
            os.mkdir(folder)
            photo.save(join(folder, f"0.{ending}"), exif=photo.getexif())
            source = source_of(root)
            self.assertEqual(source.index.sizes.tolist(), [[40, 30]])
            shown = np.asarray(source.photo(0, (15, 20)))
            self.assertEqual(shown.shape, (40, 30, 3))
            self.assertGreater(shown[:18].min(), 200)
            self.assertLess(shown[22:].max(), 50)

    def test_damaged_exif_data_turn_nothing(self):
        for ending in ("jpg", "png", "webp"):
            root = own_data(new_folder("exif"), [columns(1, 2, 2)])
            folder = join(root, "images", "training")
            os.remove(join(folder, "0.jpg"))
            noise(40, 30).save(join(folder, f"0.{ending}"), exif=b"Exif\0\0" + b"\xff" * 9)
            self.assertEqual(scanned(root)[0].sizes.tolist(), [[40, 30]])


class TestOwnData(unittest.TestCase):
    MASK = columns(1, 1, 2, 0)

    def assert_labels(self, root: str, expected: np.ndarray, i: int = 0):
        assert_array_equal(source_of(root).labels(i)["object"], expected)

    def test_lies_in_the_root_in_ade20k_or_one_folder_down(self):
        for place in ("", "ade20k", "ade20k/mine"):
            root = new_folder("own")
            top = own_data(join(root, place), [self.MASK])
            self.assertTrue(os.path.samefile(scanned(root)[0].folder, top))
            self.assert_labels(root, self.MASK - 1)
        other = own_data(join(root, "ade20k", "yours"), [self.MASK])
        line = refusal(self, datasets.main, "--data", "ade20k", "--root", root)
        self.assertRegex(line, f"{top}.*{other}")

    def test_sides_and_scenes(self):
        root = own_data(new_folder("own"), [self.MASK] * 2, sceneCategories="0 misc\n1 Street\n")
        for name in ("images", "annotations"):
            shutil.copytree(join(root, name, "training"), join(root, name, "val"))
        index, _ = scanned(root)
        self.assertEqual(index.tags, ["", "street", "", "street"])
        self.assertEqual(index.official, ["train", "train", "val", "val"])
        vocabulary = vocabulary_of(index, images=50, pixels=10**6, scenes=2)
        self.assertEqual(vocabulary, {"scene": ["street"], "object": ["class 1", "class 2"]})

    def test_names_of_the_tables(self):
        """All classes of a table whatever they have, those of one name apart; synonyms are cut in
        objectInfo150.txt alone."""
        classes = "crop, healthy\ncrop, ill\n 2 wheels \n"
        info = "Idx\tRatio\tName\n1\t.5\twall   \n2\t.5\tbuilding, edifice  \n"
        info += "3\t.5\tscreen, door screen\n4\t.5\tscreen, silver screen\n"
        screens = ["wall", "building", "screen (3)", "screen (4)"]
        cases = [
            ({}, ["class 1", "class 2"]),
            ({"classes": classes}, ["crop, healthy", "crop, ill", "2 wheels"]),
            ({"classes": classes, "objectInfo150": info}, screens),
        ]
        for tables, names in cases:
            root = own_data(new_folder("own"), [self.MASK] * 2, **tables)
            index, err = scanned(root)
            self.assertEqual(names[-1].split()[0] in err, len(names) > 2)  # has no pixel
            vocabulary = vocabulary_of(index, images=50, pixels=10**6)
            self.assertEqual(vocabulary, {"object": names})
            self.assert_labels(root, self.MASK - 1)

    def test_a_class_named_void_and_masks_as_jpeg_are_pointed_out(self):
        root = own_data(new_folder("own"), [columns(0, 1, 2)], classes="0 sky\n1 Void\n2 car\n")
        _, err = scanned(root)
        self.assertRegex(err, r"Void.*classes\.txt")
        mask = join(root, "annotations", "training", "0.png")
        with Image.open(mask) as picture:
            picture.save(mask.replace(".png", ".jpg"))
        os.remove(mask)
        self.assertRegex(refusal(self, datasets.main, "--data", "ade20k", "--root", root), "JPEG")

    def test_exactly_the_numbers_of_a_table_are_classes(self):
        table = "0 sky\n1: building, tall\n255, void thing\n\n12 car\n"
        root = own_data(new_folder("own"), [columns(0, 1, 7, 12, 255)], classes=table)
        index, err = scanned(root)
        names = ["sky", "building, tall", "car", "void thing"]
        self.assertEqual(vocabulary_of(index), {"object": names})
        self.assert_labels(root, columns(0, 1, -1, 2, 3))
        self.assertRegex(err, r"\b7\b")
        for table in ("7; sky\n12;car\n", "7 = sky\n12=car\n", "7. sky\n12. car\n"):
            write(join(root, "classes.txt"), table)
            self.assertEqual(vocabulary_of(scanned(root)[0]), {"object": ["sky", "car"]})
        for wrong in ("0 sky\n0 sea\n", "1 sky\n70000 sea\n", "number name\n1 a\n2 b\n"):
            write(join(root, "classes.txt"), wrong)
            self.assertIn(root, refusal(self, datasets.main, "--data", "ade20k", "--root", root))

    def test_255_and_0_are_unlabelled_unless_the_table_names_them(self):
        names = [f"name {k}" for k in range(1, 256)]
        for count in (2, 3, 255):
            classes = "\n".join(names[:count])
            root = own_data(new_folder("own"), [columns(255, 1, 2, 0)], classes=classes)
            self.assert_labels(root, columns(254 if count == 255 else -1, 0, 1, -1))

    def test_numbers_that_seem_to_start_at_0_are_pointed_out(self):
        """Names of 1.. for masks of 0..; not where the masks have no 0."""
        for count in (3, 41, 171):
            classes = "\n".join(f"name {k}" for k in range(1, count + 1))
            mask = np.arange(count + 1)[None].repeat(40, axis=0)
            mask[:, -1] = 255
            for first in (0, 1):
                mask[:, 0] = first
                _, err = scanned(own_data(new_folder("own"), [mask], classes=classes))
                self.assertIn(f"name {count}", err)
                self.assertEqual("classes.txt" in err, first == 0)

    def test_masks_without_two_classes_are_refused(self):
        training = ("--weights", "none", "--iters", 0, "--out", new_folder("out"), *SMALL)
        names = {"classes": "one\ntwo\n"}
        for values, tables in (
            ([0, 255], {}),
            ([0, 1, 255], {}),
            ([0, 1], names),
            ([51, 52], names),
            ([0, 51], {"classes": "0 background\n2 thing\n"}),
        ):
            root = own_data(new_folder("own"), [columns(*values)] * 2, **tables)
            for main, options in ((datasets.main, ()), (train.main, training)):
                status, _, err = command(main, "--data", "ade20k", "--root", root, *options)
                with self.subTest(values=values, tables=tables, main=main.__module__):
                    self.assertEqual(status, 2, err)
                    self.assertIn(root, err.splitlines()[-1])

    def test_numbers_that_are_no_classes_are_refused_without_a_table(self):
        """Where fewer than half of 1..highest occur."""
        for mask, expected in (
            (columns(0, 85, 170, 255), 2),  # gray levels
            (columns(1001, 1002, 2001), 2),  # class * 1000 + instance
            (columns(3, 5, 255, 0), 2),
            (columns(2, 4, 255, 0), 0),
        ):
            root = own_data(new_folder("own"), [mask])
            picture = Image.fromarray(mask.astype(np.uint16))
            save(picture, root, "annotations", "training", "0.png")
            status, _, err = command(datasets.main, "--data", "ade20k", "--root", root)
            self.assertEqual(status, expected, err)
            self.assertEqual(root in err, status == 2)

    def test_numbers_beyond_the_table_are_reported_and_unlabelled(self):
        beyond = columns(1, 1, 7, 0)
        root = own_data(new_folder("own"), [self.MASK, beyond], classes="sea\nland\nglacier\n")
        for _ in range(2):  # a scan, and its index
            _, err = scanned(root)
            self.assertRegex(err, r"\b7\b")
            self.assertIn("glacier", err)  # no pixel
            self.assertNotIn("land", err)
        self.assert_labels(root, columns(0, 0, -1, -1), 1)
        _, out, _ = command(datasets.main, "--data", "ade20k", "--root", root)
        self.assertRegex(out, r"sea +1,600 pixels[^|]*land +400 pixels[^|]*glacier +0 pixels")
        self.assertRegex(out, r"(?m)^ +scene +no labels$")

    def test_the_unlabelled_share_is_that_of_a_plain_count(self):
        """Classes that a threshold leaves out are unlabelled."""
        masks = [columns(0, 1, 2, 7), columns(255, 2, 1, 1, 1)]
        root = own_data(new_folder("own"), masks, classes="1 sea\n2 land\n")
        ade = Ade()
        names = {5: "car", 6: "wheel", 8: "dot"}
        ade.add(columns(0, 5, 5, 8), names, ["street"], columns(6, 6, 6, 0))
        for index, expected in ((scanned(root)[0], 3 / 9), (ade.index(), 2 / 4)):
            objects = vocabulary_of(index, pixels=500)["object"]
            share = re.search(r"([\d.]+)%", datasets.unlabelled_share(index, objects))
            self.assertAlmostEqual(float(share[1]), 100 * expected, delta=0.051)

    def test_masks_of_any_mode_with_one_number_a_pixel(self):
        grey = Image.fromarray(self.MASK.astype(np.uint8))
        palette = grey.copy()
        palette.putpalette(np.random.default_rng(0).bytes(768))
        wide = 150 * self.MASK  # numbers beyond 255
        classes = "\n".join(f"name {n}" for n in range(1, 301))
        for picture, numbers in (
            (grey.convert("RGB"), self.MASK),
            (grey.convert("RGBA"), self.MASK),
            (palette, self.MASK),
            (Image.fromarray(self.MASK == 1), 1 * (self.MASK == 1)),
            (Image.fromarray(wide.astype(np.uint16)), wide),
        ):
            root = own_data(new_folder("own"), [self.MASK] * 2, classes=classes)
            save(picture, root, "annotations", "training", "0.png")
            with self.subTest(mode=picture.mode):
                self.assert_labels(root, numbers - 1)

    def test_hidden_files_and_files_elsewhere_are_not_data(self):
        root = own_data(new_folder("own"), [self.MASK])
        before, _ = scanned(root)
        for name in ("images/training/._0.jpg", "images/.x/0.jpg", "notes.txt", "more/0.jpg"):
            write(join(root, name), "no picture")
        after, err = scanned(root)
        self.assertEqual((err, after.fingerprint), ("", before.fingerprint))

    def test_text_in_utf16_and_masks_without_a_photo(self):
        root = own_data(new_folder("own"), [self.MASK] * 2)
        write(join(root, "classes.txt"), "sea\nland\n", "utf-16")
        os.remove(join(root, "images", "training", "1.jpg"))
        for _ in range(2):  # a scan, and its index
            index, err = scanned(root)
            self.assertEqual(index.names, {1: "sea", 2: "land"})
            self.assertIn("annotations/training/1.png", err)


class TestToy(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        root = join(new_folder("toy"), "toy")
        with contextlib.redirect_stdout(io.StringIO()):
            datasets.make_toy(root, scenes=120, photos=90, textures=24)
        cls.indexes = {name: scanned(root, name)[0] for name in datasets.TOY_SOURCES}
        minima = least(images=20, pixels=5000, parts=20, scenes=10)
        cls.vocabulary = datasets.build_vocabulary(cls.indexes, minima)

    def colours_and_labels(self, source: datasets.Source, i: int, level: str) -> tuple:
        """Those of an image's labelled pixels, or of its mean."""
        labels = source.labels(i)[level]
        if level in ("scene", "texture"):
            return np.asarray(source.photo(i)).mean(axis=(0, 1))[None], np.array([labels])
        colours = np.asarray(source.photo(i).resize(labels.shape[::-1]), np.float64)
        return colours[labels >= 0], labels[labels >= 0].astype(int)

    def test_colour_alone_does_not_solve_it(self):
        """Nearest mean colour, of pixels for objects and materials, of images for the rest; every
        third image is for testing."""
        cases = [
            ("object", "ade20k", 0.3),
            ("material", "os", 0.3),
            ("scene", "ade20k", 0.5),
            ("texture", "dtd", 0.4),
        ]
        for level, name, bound in cases:
            source = datasets.Source(self.indexes[name], self.vocabulary)
            n = len(self.vocabulary[level])
            pixels = np.zeros(n)
            total = np.zeros((n, 3))
            testing = []
            for i in range(len(source.index.images)):
                colours, labels = self.colours_and_labels(source, i, level)
                if i % 3 == 2:
                    testing.append((colours, labels))
                else:
                    np.add.at(pixels, labels, 1)
                    np.add.at(total, labels, colours)
            confusion = np.zeros((n, n))
            for colours, labels in testing:
                distances = ((colours[:, None] - total / pixels[:, None]) ** 2).sum(axis=2)
                np.add.at(confusion, (labels, distances.argmin(axis=1)), 1)
            right = confusion.diagonal()
            score = right.sum() / confusion.sum()
            if level in ("object", "material"):
                iou = right / (confusion.sum(axis=0) + confusion.sum(axis=1) - right)
                score = iou.mean()
            with self.subTest(level=level):
                self.assertGreater(score, 0)
                self.assertLess(score, bound)

    def test_has_classes_of_every_level(self):
        for level, n in {"scene": 4, "object": 10, "part": 4, "material": 6, "texture": 8}.items():
            self.assertGreaterEqual(len(self.vocabulary[level]), n)
        for index in self.indexes.values():
            self.assertEqual(index.broken, [])
        self.assertEqual(set(self.indexes["ade20k"].official), {"train", "val"})

    def test_is_always_the_same_and_complete_or_not_there_at_all(self):
        place = new_folder("toy")
        with contextlib.redirect_stdout(io.StringIO()):
            for name in ("one", "other"):
                datasets.make_toy(join(place, name), 2, 1, 1)
            with mock.patch("PIL.Image.Image.save", side_effect=OSError("full")):
                with self.assertRaises(OSError):
                    datasets.make_toy(join(place, "cut"), 2, 1, 1)
        self.assertEqual(set(os.listdir(place)), {"one", "other"})
        for path in Path(place, "one").rglob("*.*"):
            other = Path(place, "other", path.relative_to(Path(place, "one")))
            self.assertEqual(path.read_bytes(), other.read_bytes(), path)


class TestBatches(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = join(toy_root(), "toy")
        cls.sources = []
        cls.plan = []  # of each source an upright image and three others
        for k, name in enumerate(datasets.TOY_SOURCES):
            source = source_of(cls.root, name, short=96, longest=200)
            cls.sources.append(source)
            upright = source.index.sizes[:, 0] > source.index.sizes[:, 1]
            cls.plan.append([k, upright.nonzero()[0, 0], *(~upright).nonzero()[:3, 0]])

    def batches(self, plan=None, sources=None, sizes=(64, 80), seed=3, **options):
        plan = np.array(plan or self.plan, np.int32)
        sources = sources or self.sources
        return datasets.TrainingBatches(sources, plan, list(sizes), 200, seed, **options)

    def assert_same(self, one: dict, other: dict):
        self.assertEqual(one.keys(), other.keys())
        for key, value in one.items():
            self.assertTrue(np.array_equal(value, other[key]), key)

    def test_plan(self):
        """Sources and groups by their numbers of images; once each before any twice."""
        groups = [(0, np.arange(300)), (1, np.arange(500, 567)), (1, np.arange(600, 633))]
        plan = datasets.plan_batches(groups, 4000, 2, seed=0)
        self.assertEqual(plan.shape, (4000, 3))
        for position, group in groups:
            rows = plan[(plan[:, 0] == position) & np.isin(plan[:, 1], group), 1:]
            self.assertAlmostEqual(len(rows) / 4000, len(group) / 400, delta=0.03)
            order = rows.ravel().tolist()
            for first in range(0, len(order), len(group)):
                one_pass = order[first : first + len(group)]
                self.assertEqual(len(set(one_pass)), len(one_pass))
            self.assertEqual(set(order), set(group.tolist()))
        self.assertTrue((plan == datasets.plan_batches(groups, 4000, 2, seed=0)).all())
        self.assertFalse((plan == datasets.plan_batches(groups, 4000, 2, seed=1)).all())

    def test_item_k_depends_on_plan_seed_and_k_alone(self):
        others = [self.plan[0], self.plan[0], self.plan[2]]
        for crop in (0, 64):
            batches = self.batches(crop=crop)
            last = batches[2]
            self.assert_same(batches[0], self.batches(crop=crop)[0])
            self.assert_same(last, self.batches(others, crop=crop)[2])
            first = batches[0]["images"]
            for other in (self.batches(others, crop=crop)[1], self.batches(crop=crop, seed=4)[0]):
                self.assertFalse(torch.equal(first, other["images"]))

    def test_a_short_side_is_drawn_for_each_iteration(self):
        heights = []
        for seed in (3, 4):
            batches = self.batches([self.plan[1]] * 12, sizes=(64, 96), seed=seed)
            heights.append([batches[k]["images"].shape[2] for k in range(12)])
        self.assertEqual(set(heights[0]), {96, 160})  # of the upright image: 96 or 144, padded
        self.assertNotEqual(heights[0], heights[1])

    def test_workers_change_nothing(self):
        batches = self.batches()
        for k, batch in enumerate(datasets.loader(batches, workers=2)):
            self.assert_same(batch, batches[k])
        (last,) = datasets.loader(batches, first=2, workers=0)
        self.assert_same(last, batches[2])

    def test_processes_and_accumulation_change_nothing(self):
        """Shares hold the images of the whole batch, but for their padding."""
        for crop in (0, 64):
            whole = self.batches(crop=crop)[0]
            for accumulate, processes in ((1, 2), (2, 1), (2, 2)):
                n = 4 // (accumulate * processes)
                for share in range(accumulate * processes):
                    k, rank = divmod(share, processes)
                    options = {"accumulate": accumulate, "rank": rank, "processes": processes}
                    batch = self.batches(crop=crop, **options)[k]
                    mine = slice(share * n, (share + 1) * n)
                    self.assertEqual(batch["files"], whole["files"][mine])
                    self.assertTrue(torch.equal(batch["scene"], whole["scene"][mine]))
                    for key in ("images", "object", "part"):
                        height, width = batch[key].shape[-2:]
                        expected = whole[key][mine, ..., :height, :width]
                        self.assertTrue(torch.equal(batch[key], expected), key)
        self.assertEqual(len(self.batches(accumulate=2)), 6)

    def test_half_of_the_images_are_mirrored_with_their_labels(self):
        source = self.sources[0]
        i = int(self.plan[0][2])
        height, width = source.index.sizes[i].tolist()
        photo = np.asarray(source.photo(i)).transpose(2, 0, 1)
        labels = source.labels(i)
        self.assertGreater(labels["part"].max(), 0)
        batches = self.batches([[0, i]] * 20, sizes=[min(height, width)])
        flips = 0
        for k in range(20):
            batch = batches[k]
            shown = batch["images"][0, :, :height, :width].numpy()
            step = 1
            if not np.array_equal(shown, photo):
                step = -1
                flips += 1
            assert_array_equal(shown, photo[..., ::step])
            for level in ("object", "part"):
                quarter = batch[level][0, : height // 4, : width // 4]
                assert_array_equal(quarter, labels[level][:, ::step][2::4, 2::4])
        self.assertGreater(flips, 4)
        self.assertLess(flips, 16)

    def test_shapes_types_and_padding(self):
        batches = self.batches(sizes=[72])
        scenes, photos, squares = [batches[k] for k in range(3)]
        self.assertEqual(photos.keys(), {"source", "files", "images", "material"})
        self.assertEqual(squares["images"].shape, (4, 3, 64, 64))
        self.assertEqual(squares["texture"].shape, (4,))
        self.assertEqual(scenes["scene"].shape, (4,))
        mean = torch.tensor(datasets.MEAN_COLOUR).view(3, 1, 1)
        inside = torch.zeros(4, 128, 128, dtype=bool)
        inside[0, :108, :72] = True
        inside[1:, :72, :108] = True
        cells = inside[:, 2::4, 2::4]
        for batch, level in ((scenes, "object"), (photos, "material")):
            images = batch["images"]
            self.assertEqual((images.shape, images.dtype), ((4, 3, 128, 128), torch.uint8))
            is_mean = (images == mean).all(dim=1)
            self.assertTrue(is_mean[~inside].all())
            self.assertLess(is_mean[inside].double().mean(), 0.1)
            labels = batch[level]
            self.assertEqual(labels.dtype, torch.int16)
            self.assertTrue((labels[~cells] == -1).all())
            for n in range(4):
                self.assertTrue((labels[n][cells[n]] >= 0).any())

    def ramps(self) -> datasets.Source:
        """Photos whose red is the pixel's column and green its row; masks of columns, of rows."""
        root = new_folder("ramps")
        rows, across = np.indices((96, 160))
        for k, numbers in enumerate((across, rows)):
            save(np.stack([across, rows, 0 * rows], axis=-1), root, "images", f"{k}.png")
            save(numbers + 1, root, "annotations", f"{k}.png")
        return source_of(root, short=96)

    def test_labels_lie_on_what_they_label(self):
        """Resized, cut to crops smaller and larger than the image, mirrored."""
        source = self.ramps()
        for crop in (0, 64):
            batches = self.batches([[0, 0, 1]] * 30, [source], sizes=[61, 96, 110], crop=crop)
            for k in range(30):
                images = batches[k]["images"].double()
                labels = batches[k]["object"]
                inside = images[:, 2] < 1  # the padding is bluer
                self.assertTrue(torch.equal(labels >= 0, inside[:, 2::4, 2::4]))
                numbers = torch.stack([images[0, 0], images[1, 1]])  # columns; rows
                middle = (numbers[:, 1:, 1:] + numbers[:, :-1, :-1]) / 2
                whole = inside[:, 1::4, 1::4] & inside[:, 2::4, 2::4]
                error = (labels - middle[:, 1::4, 1::4]).abs()
                self.assertLess(error[whole].max(), 3)
                for n in range(2):
                    self.assertLess(error[n][whole[n]].mean(), 1)

    def test_crops_have_short_sides_from_half_their_own_to_twice_that(self):
        """And come from all over the photo."""
        batches = self.batches([[0, 0]] * 30, [self.ramps()], crop=64, flip=False)
        scales = []
        lefts = []
        for k in range(30):
            self.assertEqual(batches[k]["images"].shape, (1, 3, 64, 64))
            red = batches[k]["images"][0, 0, 5].double()
            scales.append((red[25] - red[5]).item() / 20)  # columns of the photo for one
            lefts.append(red[0].item())
        self.assertTrue(0.7 < min(scales) < 0.9)
        self.assertTrue(2.4 < max(scales) < 3.1)
        self.assertTrue(min(lefts) < 5 and max(lefts) > 60)

    def test_textures_are_cut_to_squares_at_random_and_mirrored(self):
        name = "gepünktelt 点/ein bild.png"
        source = source_of(textures(new_folder("odd names"), train1=[name]), "dtd")
        self.assertEqual(source.index.images, [f"images/{name}"])
        self.assertEqual(source.index.tags, ["gepünktelt 点"])
        batches = self.batches([[0, 0]] * 10, [source])
        means = []
        slopes = []
        for k in range(10):
            images = batches[k]["images"].double()
            self.assertEqual(images.shape, (1, 3, 64, 64))
            means.append(images.mean().item())
            slopes.append((images[..., -1] - images[..., 0]).mean().item())
        self.assertGreater(max(means) - min(means), 50)
        self.assertLess(min(slopes), -50)
        self.assertGreater(max(slopes), 50)


class TestPrepared(unittest.TestCase):
    def setUp(self):
        """320 classes, six pixels each; all but the first have a wheel of three."""
        pixels = np.arange(40 * 48).reshape(40, 48)
        self.objects = pixels // 6 + 1
        self.wheels = (pixels % 6 > 2) & (pixels > 5)
        self.ade = Ade()
        names = {n: f"thing {n}" for n in range(1, 321)}
        self.stem = self.ade.add(self.objects, {**names, 400: "wheel"}, [], 400 * self.wheels)
        self.source = source_of(self.ade.root)
        self.first = self.source.prepared(0)
        (self.folder,) = self.folders()

    def folders(self) -> list[Path]:
        return list(Path(self.ade.root, ".cache").glob("ade20k-*"))

    def test_are_pictures_of_class_plus_1_and_of_parts(self):
        names = vocabulary_of(self.source.index)["object"]
        position = {name: k for k, name in enumerate(names)}
        classes = np.vectorize(lambda n: position[f"thing {n}"])(self.objects)
        assert_array_equal(self.first["object"], classes)
        assert_array_equal(self.first["part"], self.wheels)
        with Image.open(self.folder / "0.png") as picture:
            self.assertIn(picture.mode, ("I;16", "I"))  # I: Pillow before version 11
            assert_array_equal(picture, classes + 1)
        with Image.open(self.folder / "0_parts.png") as picture:
            self.assertEqual(picture.mode, "L")
            assert_array_equal(picture, self.wheels)
        self.assertEqual(len(os.listdir(self.folder)), 2)

    def test_are_written_again_when_deleted_and_else_only_read(self):
        for name in ("0.png", "0_parts.png"):
            content = (self.folder / name).read_bytes()
            os.remove(self.folder / name)
            self.source.prepared(0)
            self.assertEqual((self.folder / name).read_bytes(), content)
        os.remove(f"{self.stem}_seg.png")
        np.testing.assert_equal(self.source.prepared(0), self.first)

    def test_a_damaged_one_is_named(self):
        for name in ("0.png", "0_parts.png"):
            path = self.folder / name
            whole = path.read_bytes()
            cut = whole[: len(whole) // 2]
            for damaged in (b"", cut, whole[:-40] + bytes(40), b"no picture"):
                path.write_bytes(damaged)
                with self.assertRaisesRegex(datasets.UserError, str(path)):
                    self.source.prepared(0)
            path.write_bytes(whole)

    def test_each_vocabulary_and_size_has_its_own(self):
        vocabulary = vocabulary_of(self.source.index)
        vocabulary["object"].reverse()
        cache = join(self.ade.root, ".cache")
        turned = datasets.Source(self.source.index, vocabulary, cache=cache).prepared(0)
        self.assertTrue((self.first["object"] + turned["object"] == 319).all())
        for size in ({"short": 20}, {"longest": 24}):
            smaller = source_of(self.ade.root, **size).prepared(0)
            self.assertEqual(smaller["object"].shape, (20, 24))
        self.assertEqual(len(self.folders()), 4)

    def test_a_changed_data_set_removes_those_of_its_earlier_state(self):
        source_of(self.ade.root, short=20).prepared(0)
        other = write(join(self.ade.root, ".cache", "os-01", "0.png"), "of another source")
        self.ade.add(self.objects, {1: "thing 1"}, ["attic"])
        source_of(self.ade.root).prepared(0)
        (folder,) = self.folders()
        self.assertNotEqual(folder, self.folder)
        self.assertTrue(os.path.exists(other))

    def test_smaller_ones_are_sampled_at_the_centres_of_their_cells(self):
        source = source_of(join(toy_root(), "toy"), short=70, longest=90)
        for i in range(6):
            height, width = (60, 90)  # the long side's limit
            if source.index.sizes[i, 0] > source.index.sizes[i, 1]:
                height, width = (90, 60)
            full = source.labels(i)
            for level, labels in source.prepared(i).items():
                rows = (np.arange(height) + 0.5) * full[level].shape[0] / height
                across = (np.arange(width) + 0.5) * full[level].shape[1] / width
                expected = full[level][rows.astype(int)[:, None], across.astype(int)]
                assert_array_equal(labels, expected)


class TestWriting(unittest.TestCase):
    def test_links_stay_links_and_pipes_pipes(self):
        place = new_folder("written")
        target = write(join(place, "there", "a.json"), "old")
        link = join(place, "link.json")
        os.symlink(target, link)
        datasets.write_json({"a": 1}, link)
        self.assertTrue(os.path.islink(link))
        self.assertEqual(read_json(target), {"a": 1})
        pipe = join(place, "pipe.json")
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        datasets.write_json({"a": 2}, pipe)
        self.assertEqual(json.loads(os.read(reader, 999)), {"a": 2})
        self.assertEqual(sorted(os.listdir(place)), ["link.json", "pipe.json", "there"])


class TestSplit(unittest.TestCase):
    def counts(self, images=300, classes=12) -> np.ndarray:
        """Pixels, mostly 0."""
        rng = np.random.default_rng(0)
        pixels = rng.random((images, classes)) ** 8 * 1000
        return pixels * (rng.random((images, classes)) < 0.15)

    def plain_deviation(self, counts: np.ndarray, validation: np.ndarray) -> float:
        distances = []
        for pixels in counts.T:
            if pixels.sum() > 0:
                distances.append(abs(pixels[validation].sum() / pixels.sum() - 0.1))
        return sum(distances) / len(distances)

    def test_brings_every_class_near_its_share(self):
        counts = self.counts()
        counts[:, 3] = 0
        values = []
        for swaps in (0, 100, 500, 5000, 20000):  # the paper's procedure never makes it worse
            side = balance_split.balance(counts, swaps=swaps, seed=1, chance=0)
            values.append(self.plain_deviation(counts, side))
        self.assertEqual(values, sorted(values, reverse=True))
        annealed = balance_split.balance(counts, swaps=20000, seed=1, chance=0.5)
        self.assertFalse((annealed == side).all())
        for value in (values[-1], self.plain_deviation(counts, annealed)):
            self.assertLess(value, values[0] / 4)

    def test_exact_size_and_the_same_answer_for_a_seed(self):
        odd = np.zeros((9, 3))
        odd[4, 0] = 7  # a class in one image, one in all, one without a pixel
        odd[:, 1] = 1
        for counts in (odd[:1], odd[:2], odd, np.zeros((20, 3)), self.counts(33)):
            for fraction in (0.01, 0.1, 0.5):
                side = balance_split.balance(counts, fraction, swaps=500, seed=3)
                self.assertEqual(len(side), len(counts))
                fewest = min(1, len(counts) - 1)
                self.assertEqual(side.sum(), max(fewest, round(fraction * len(counts))))
                tensor = torch.from_numpy(counts)
                again = balance_split.balance(tensor, fraction, swaps=500, seed=3)
                self.assertTrue((side == again).all())
        one, other = [balance_split.balance(self.counts(), seed=s, swaps=500) for s in (1, 2)]
        self.assertFalse((one == other).all())

    def test_is_balanced_in_the_pixels_of_objects_and_parts_and_the_images_of_scenes(self):
        ade = Ade()
        names = {5: "car", 6: "house", 7: "wheel", 8: "dot"}
        ade.add(columns(5, 5, 6), names, ["street"], columns(7, 0, 7))
        ade.add(columns(0, 6, 8), names, ["street"])
        vocabulary = {"scene": ["street"], "object": ["car", "house"]}
        vocabulary["part"] = {"car": ["background", "wheel"]}
        table = balance_split.pixel_table(ade.index(), vocabulary)
        self.assertEqual(sorted(table.T.tolist()), [[1, 1], [400, 0], [400, 400], [800, 0]])

    def test_the_command_writes_split_json_and_keeps_other_sources(self):
        root = join(new_folder("split"), "toy")
        shutil.copytree(join(toy_root(), "toy"), root)
        path = join(root, "split.json")
        Path(path).unlink(missing_ok=True)
        options = ("--root", root, "--min-images", 5, "--min-pixels", 50)
        plot = join(root, "plot.png")
        command(balance_split.main, "--data", "dtd", *options, "--plot", plot)
        Image.open(plot).close()
        first = read_json(path)
        self.assertEqual(first.keys(), {"seed", "fraction", "sources"})
        command(balance_split.main, "--data", "os", *options)
        split = read_json(path)
        self.assertEqual(split["sources"]["dtd"], first["sources"]["dtd"])
        entry = split["sources"]["os"]
        keys = "images fingerprint validation deviation_before deviation_after"
        self.assertEqual(entry.keys(), set(keys.split()))
        self.assertEqual((entry["images"], len(entry["validation"])), (30, 3))
        self.assertTrue(Path(root, "os", entry["validation"][0]).is_file())
        self.assertLess(entry["deviation_after"], entry["deviation_before"])
        wrong = ("--data", "os", *options, "--fraction", 0.9)  # dtd has 0.1
        self.assertIn(path, refusal(self, balance_split.main, *wrong))

    def test_a_split_is_added_and_one_of_other_images_or_damaged_is_refused(self):
        root = textures(new_folder("split"), train1=[f"a/{k}.png" for k in range(4)])
        path = join(root, "split.json")
        argv = ("--data", "dtd", "--root", root, "--weights", "none", "--iters", 0, *SMALL)
        argv = (*argv, "--texture-iters", 0, "--out")
        other = {"validation": [], "fingerprint": ""}
        write(path, json.dumps({"sources": {"os": other}}))
        self.assertEqual(command(train.main, *argv, join(root, "out"))[0], 0)
        sources = read_json(path)["sources"]  # train.py adds what is missing
        self.assertEqual(len(sources["dtd"]["validation"]), 1)
        self.assertEqual(sources["os"], other)
        os.remove(join(root, "dtd", "images", "a", "0.png"))
        self.assertIn(path, refusal(self, train.main, *argv, new_folder("out")))
        number = '{"sources": {"dtd": {"fingerprint": "", "validation": 5}}}'
        wrong = ("{", '{"sources": {"dtd": 3}}', '{"sources": {"dtd": {}}}', number)
        for content in (*wrong, '{"fraction": "x"}', '{"fraction": 5}'):
            write(path, content)
            self.assertIn(path, refusal(self, train.main, *argv, new_folder("out")))

    def test_of_images_that_trained_the_weights_none_validates_if_another_can(self):
        root = textures(new_folder("kept"), train1=[f"a/{k}.png" for k in range(10)])
        index, _ = scanned(root, "dtd")
        for new in (index.images[:1], index.images[:4], []):
            keep = frozenset(index.images) - set(new)
            entry = balance_split.split_source(index, vocabulary_of(index), 0.1, keep=keep)
            self.assertEqual(len(entry["validation"]), 1)
            self.assertEqual(set(entry["validation"]) <= set(new), len(new) > 0)

    def test_official_validation(self):
        listed = {
            "train1": ["a/0.png", "b/1.png"],
            "val1": ["a/2.png"],
            "test1": ["b/4.png", "a/3.png"],
        }
        index, _ = scanned(textures(new_folder("sides"), **listed), "dtd")
        validation = balance_split.validation_images(index, "official", "", "")
        self.assertEqual(validation, ["images/a/3.png", "images/b/4.png"])
        index, _ = scanned(join(toy_root(), "toy"))
        expected = sorted(name for name in index.images if "/validation/" in name)
        self.assertEqual(len(expected), 4)
        validation = balance_split.validation_images(index, "official", "", "")
        self.assertEqual(validation, expected)


# ---------------------------------------------------------------- evaluation: what tests share
CONCEPTS = {
    "scene": ["kitchen", "street"],
    "object": ["wall", "car", "pot", "person"],
    "part": {"car": ["background", "wheel", "door"], "person": ["background", "head"]},
    "material": ["wood", "brick", "metal", "glass", "stone"],
    "texture": ["dotted", "banded", "grid"],
}


def varied_net() -> UPerNet:
    """A network without training in whose maps many classes are the best one somewhere."""
    torch.manual_seed(0)
    classes = upernet.class_counts(CONCEPTS)
    net = UPerNet(classes, "resnet18", channels=8, test_size=(64, 1000, None))
    train_norms(net)
    net.eval()
    image = torch.from_numpy(np.array(noise(64, 96))).permute(2, 0, 1)[None]
    with torch.no_grad():
        net.heads["scene"].classifier.weight *= 0.1
        logits = net(image / 255)
        for level in ("object", "part", "material", "texture_map"):
            classifier = net.heads[level.removesuffix("_map")].classifier
            of_level = logits[level].transpose(0, 1).flatten(1)  # (K, pixels)
            scale = 3 / of_level.std(dim=1)
            classifier.bias.copy_(scale * (classifier.bias - of_level.mean(dim=1)))
            classifier.weight *= scale.view(-1, 1, 1, 1)
    return net


def save_checkpoint(net: UPerNet, vocabulary: dict, split: dict = {}, **arguments: str) -> str:
    """A checkpoint with what evaluate.py reads."""
    path = join(new_folder("checkpoint"), "ckpt.pt")
    content = {
        "model": net.state_dict(),
        "network": net.network,
        "vocabulary": vocabulary,
        "split": split,
        "trained": {},
        "arguments": arguments,
    }
    torch.save(content, path)
    return path


def bilinear_weights(cells: int, filled: int, full: int) -> Tensor:
    """(full, cells): what each pixel of a picture takes of each cell. A cell is four pixels of the
    network's input wide, of which the picture fills `filled`."""
    weights = torch.zeros(full, cells)
    for y in range(full):
        at = (y + 0.5) * filled / full / 4 - 0.5
        at = min(max(at, 0), cells - 1)
        low = int(at)
        weights[y, low] += 1 - (at - low)
        weights[y, min(low + 1, cells - 1)] += at - low
    return weights


def plain_upsample(maps: Tensor, filled: tuple, size: tuple) -> Tensor:
    rows = bilinear_weights(maps.shape[1], filled[0], size[0]).to(maps.dtype)
    columns = bilinear_weights(maps.shape[2], filled[1], size[1]).to(maps.dtype)
    return rows @ maps @ columns.T


def plain_view(
    net: UPerNet, photo: Image.Image, height: int, width: int, multiple: int = 32
) -> dict[str, Tensor]:
    """The logits of a photo resized to (height, width), then padded with the mean colour."""
    rows = math.ceil(height / multiple) * multiple
    columns = math.ceil(width / multiple) * multiple
    padded = np.full((rows, columns, 3), (124, 116, 104), np.uint8)
    padded[:height, :width] = photo.resize((width, height), Image.Resampling.BILINEAR)
    with torch.inference_mode():
        logits = net(torch.from_numpy(padded).permute(2, 0, 1)[None] / 255)
    return {level: value[0] for level, value in logits.items()}


def plain_scores(net: UPerNet, photo: Image.Image, sizes: list, flip: bool) -> dict[str, Tensor]:
    """Mean probabilities over the sizes and mirror images; of maps, on a grid of a quarter of the
    largest view that spans the photo."""
    shapes = []
    for size in sizes:
        scale = size / min(photo.size)
        shapes.append((round(photo.height * scale), round(photo.width * scale)))
    grid = tuple(math.ceil(n / 4) for n in max(shapes))
    views = []
    for shape in shapes:
        for mirrored in [False, True] if flip else [False]:
            picture = ImageOps.mirror(photo) if mirrored else photo
            view = plain_view(net, picture, *shape)
            for level, logits in view.items():
                view[level] = logits.softmax(dim=0)
                if level == "part":
                    for channels in net.part_slices.values():
                        view[level][channels] = logits[channels].softmax(dim=0)
                if level not in ("scene", "texture"):
                    view[level] = plain_upsample(view[level], shape, grid)
                    if mirrored:
                        view[level] = view[level].flip(2)
            views.append(view)
    scores = {}
    for level in views[0]:
        scores[level] = sum(view[level] for view in views) / len(views)
    return scores


def plain_maps(net: UPerNet, scores: dict, filled: tuple, size: tuple) -> dict[str, Tensor]:
    """The best classes in maps of `size`; parts are channels within the best object, or -1."""
    maps = {}
    for level in ("object", "material", "texture_map"):
        maps[level] = plain_upsample(scores[level], filled, size).argmax(dim=0)
    maps["part"] = torch.full(size, -1)
    for index, channels in net.part_slices.items():
        best = plain_upsample(scores["part"][channels], filled, size).argmax(dim=0)
        here = (maps["object"] == index) & (best > 0)
        maps["part"][here] = channels.start + best[here]
    return maps


def plain_parse(
    net: UPerNet, photo: Image.Image, sizes: list, flip: bool, size: tuple = ()
) -> dict[str, Tensor]:
    """What `parse` should see at several sizes, in maps of the photo's size or another."""
    scores = plain_scores(net, photo, sizes, flip)
    grid = scores["object"].shape[1:]
    maps = plain_maps(net, scores, (4 * grid[0], 4 * grid[1]), size or photo.size[::-1])
    return {"scene": scores["scene"], "texture": scores["texture"], **maps}


# ---------------------------------------------------------------- metrics
def plain_iou(pairs: list[tuple[int, int]], k: int) -> float | None:
    """Of class k over (truth, prediction)s; None if it is nowhere the truth."""
    both = sum(truth == k and predicted == k for truth, predicted in pairs)
    either = sum(truth == k or predicted == k for truth, predicted in pairs)
    if all(truth != k for truth, _ in pairs):
        return None
    return both / either


def plain_accuracy(pairs: list[tuple[int, int]]) -> float:
    return sum(truth == predicted for truth, predicted in pairs) / len(pairs)


class TestMetrics(unittest.TestCase):
    def assert_iou(self, found: dict, expected: list):
        for value, plain in zip(found.values(), expected, strict=True):
            self.assertEqual(value is None, plain is None)
            self.assertAlmostEqual(value or 0, plain or 0)

    def test_maps_against_a_loop_over_pixels(self):
        rng = np.random.default_rng(0)
        metrics = evaluate.Metrics(CONCEPTS, list(CONCEPTS))
        pairs = []
        for n in range(3):
            truth = rng.integers(-1, 3, (9, 11))  # nowhere a person
            if n == 2:
                truth[:] = -1
            predicted = rng.integers(0, 4, truth.shape)
            metrics.add("object", torch.from_numpy(predicted), torch.from_numpy(truth))
            pairs += [(t, p) for t, p in zip(truth.ravel(), predicted.ravel()) if t >= 0]
        results = metrics.results()["object"]
        self.assertAlmostEqual(results["pixel_accuracy"], plain_accuracy(pairs))
        iou = [plain_iou(pairs, k) for k in range(4)]
        self.assertEqual(list(results["iou"]), CONCEPTS["object"])
        self.assert_iou(results["iou"], iou)
        self.assertIsNone(iou[3])
        self.assertAlmostEqual(results["mean_iou"], np.mean(iou[:3]))

    def test_parts_against_a_loop_over_pixels(self):
        rng = np.random.default_rng(1)
        metrics = evaluate.Metrics(CONCEPTS, list(CONCEPTS))
        slices = {1: slice(0, 3), 3: slice(3, 5)}
        pairs = {1: [], 3: []}
        for n in range(4):
            logits = torch.from_numpy(rng.standard_normal((5, 4, 5)))
            full = F.interpolate(logits[None], (16, 20), mode="bilinear")[0]
            objects = torch.from_numpy(rng.integers(-1, 4, (16, 20)))
            parts = torch.zeros_like(objects)
            for index, channels in slices.items():
                if n == 1 and index == 3:  # without an annotated part: not counted in this image
                    continue
                for y, x in (objects == index).nonzero():
                    parts[y, x] = int(rng.integers(0, channels.stop - channels.start))
                    predicted = full[channels, y, x].argmax()
                    pairs[index].append((int(parts[y, x]), int(predicted)))
            metrics.add_parts(logits, objects, parts, slices, (16, 20))
        results = metrics.results()["part"]
        self.assertAlmostEqual(results["pixel_accuracy"], plain_accuracy(pairs[1] + pairs[3]))
        car = [plain_iou(pairs[1], k) for k in range(3)]
        person = [plain_iou(pairs[3], k) for k in range(2)]
        self.assert_iou(results["iou"]["car"], car)
        self.assert_iou(results["iou"]["person"], person)
        # Over the parts of an object first, then over objects.
        self.assertAlmostEqual(results["mean_iou_bg"], (np.mean(car) + np.mean(person)) / 2)

    def test_nothing_labelled_is_null_in_json(self):
        metrics = evaluate.Metrics(CONCEPTS, list(CONCEPTS))
        zeros = torch.zeros(4, 4, dtype=torch.long)
        metrics.add("material", zeros, zeros - 1)
        metrics.add("texture", torch.tensor(0), torch.tensor(-1))
        metrics.add_parts(torch.zeros(5, 2, 2), zeros + 1, zeros, {1: slice(0, 3)}, (4, 4))
        metrics.add("scene", torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, -1, 1]))
        results = json.loads(json.dumps(metrics.results(), allow_nan=False))
        iou = dict.fromkeys(CONCEPTS["material"])
        expected = {"pixel_accuracy": None, "mean_iou": None, "iou": iou}
        self.assertEqual(results["material"], expected)
        self.assertIsNone(results["part"]["mean_iou_bg"])
        self.assertEqual(results["texture"], {"top1": None, "n": 0})
        self.assertEqual(results["scene"], {"top1": 2 / 3, "n": 3})

    def test_the_table_has_the_best_and_worst_ten_classes(self):
        iou = {f"class {k:02d}": 1 - k / 100 for k in range(25)}
        shown = evaluate.table({"object": {"pixel_accuracy": 0.5, "mean_iou": 0.25, "iou": iou}})
        self.assertEqual(set(iou) - set(re.findall(r"class \d\d", shown)), set(list(iou)[10:15]))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that a tensor has within the context."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


class TestClassMap(unittest.TestCase):
    def assert_argmax(self, scores: Tensor, size: tuple):
        """Of scores that no padding surrounds."""
        plain = F.interpolate(scores[None], size, mode="bilinear")[0].argmax(dim=0)
        filled = (4 * scores.shape[1], 4 * scores.shape[2])
        with self.subTest(shape=tuple(scores.shape), size=size):
            found = evaluate.class_map(scores, filled, size)
            self.assertEqual(found.dtype, torch.int64)
            self.assertTrue(torch.equal(found, plain))

    def test_is_the_argmax_of_the_upsampled_scores(self):
        torch.manual_seed(0)
        rough = torch.randn(40, 24, 32)
        coarse = 4 * torch.randn(1, 40, 4, 5)
        smooth = F.interpolate(coarse, (24, 32), mode="bicubic")[0]  # most are nowhere the best
        for scores in (rough, rough[:, :1], rough[:, :, :1], rough[:1], smooth, smooth - 1e4):
            for size in ((97, 131), (7, 300), (24, 32)):
                self.assert_argmax(scores, size)
        self.assert_argmax(torch.randn(150, 30, 40), (450, 600))
        corners = torch.zeros(5, 4, 6)  # each of four classes is the best in one corner alone
        corners[0] = 0.3
        for k, (y, x) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)], start=1):
            corners[k, y, x] = 1
        self.assert_argmax(corners, (97, 131))

    def test_ties_go_to_the_lowest_index(self):
        scores = torch.randn(10, 24, 32)
        self.assert_argmax(scores.repeat_interleave(2, dim=0), (96, 128))  # every class twice
        self.assert_argmax((3 * scores).round(), (240, 320))
        constant = torch.full((17, 16, 16), 0.1)
        self.assertTrue((evaluate.class_map(constant, (64, 64), (64, 64)) == 0).all())

    def test_cuts_the_padding_off(self):
        torch.manual_seed(0)
        scores = torch.randn(7, 16, 24, dtype=torch.float64)  # of an input of 64 x 96
        for filled in ((64, 96), (50, 70), (45, 90)):
            for size in ((100, 150), (333, 421), (20, 31), (16, 24)):
                plain = plain_upsample(scores, filled, size).argmax(dim=0)
                self.assertTrue(torch.equal(evaluate.class_map(scores, filled, size), plain))

    def test_takes_the_memory_of_a_few_maps_however_many_classes(self):
        scores = torch.randn(300, 10, 10)
        with LargestTensor() as largest:
            evaluate.class_map(scores, (40, 40), (200, 250))
        self.assertLessEqual(largest.elements, 200 * 250)


class TestRelations(unittest.TestCase):
    def test_scenes_have_the_objects_of_three_in_ten_of_their_photos(self):
        relations = evaluate.Relations(CONCEPTS, ["scene", "object"])
        for k in range(10):  # a car in four kitchens, a pot in two; the street has a person
            objects = np.array([[0, 1 if k < 4 else 0, 2 if k > 7 else 0]])
            relations.add({"scene": np.array([0.9, 0.1]), "object": objects})
        relations.add({"scene": np.array([0.1, 0.9]), "object": np.array([[3]])})
        expected = {"kitchen": {"wall": 1.0, "car": 0.4}, "street": {"person": 1.0}}
        self.assertEqual(relations.results(), {"scene-object": expected})

    def test_materials_are_the_three_largest_shares_above_a_tenth(self):
        """Of the pixels of an object or part over all photos; a material's textures likewise."""
        rng = np.random.default_rng(0)
        photos = []
        for _ in range(7):
            seen = {"scene": np.array([0.9, 0.1]), "object": rng.integers(0, 2, (6, 8))}
            seen["part"] = rng.choice([-1, 1, 2], (6, 8))
            seen["material"] = rng.choice(5, (6, 8), p=[0.02, 0.55, 0.25, 0.05, 0.13])
            seen["texture_map"] = rng.choice(3, (6, 8), p=[0.3, 0.65, 0.05])
            photos.append(seen)
        relations = evaluate.Relations(CONCEPTS, upernet.LEVELS)
        for seen in photos:
            relations.add(seen)
        found = relations.results()
        for first, second, index, name in (
            ("object", "material", 1, "car"),
            ("part", "material", 2, "car: door"),
            ("material", "texture_map", 4, "stone"),
        ):
            values = np.concatenate([seen[second][seen[first] == index] for seen in photos])
            level = second.removesuffix("_map")
            shares = np.bincount(values) / len(values)
            best = [k for k in np.argsort(-shares)[:3] if shares[k] >= 0.1]
            expected = {CONCEPTS[level][k]: shares[k] / shares[best].sum() for k in best}
            shares = found[f"{first}-{level}"][name]
            self.assertEqual(list(shares), list(expected))
            np.testing.assert_allclose(list(shares.values()), list(expected.values()))

    def test_are_told_in_the_words_of_table_4(self):
        material = np.repeat([0, 1, 2], [60, 31, 9])[None]
        seen = {"scene": np.array([1.0, 0.0]), "object": material * 0 + 2, "material": material}
        relations = evaluate.Relations(CONCEPTS, list(seen))
        relations.add(seen)
        path = join(new_folder("relations"), "r.json")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            relations.report(path)
        said = out.getvalue().splitlines()
        self.assertIn("kitchen is composed of pot", said)
        self.assertIn("pot is made of wood (66%) and brick (34%)", said)
        self.assertEqual(read_json(path)["scene-object"], {"kitchen": {"pot": 1.0}})


# ---------------------------------------------------------------- photos and validation images
class TestParse(unittest.TestCase):
    def assert_seen(self, seen: dict, expected: dict):
        self.assertEqual(seen.keys(), expected.keys())
        for level, value in expected.items():
            with self.subTest(level):
                if level in ("scene", "texture"):
                    np.testing.assert_allclose(seen[level], value, rtol=1e-4)
                else:
                    self.assertGreaterEqual((seen[level] == value.numpy()).mean(), 0.999)

    def test_of_one_size_against_the_padded_network(self):
        net = varied_net()
        for full, short, longest, resized in (
            ((64, 96), 64, 1000, (64, 96)),
            ((97, 45), 45, 1000, (97, 45)),
            ((71, 130), 50, 90, (49, 90)),
        ):
            photo = noise(*full)
            net.test_size = (short, longest, None)
            logits = plain_view(net, photo, *resized)
            tags = {level: logits[level].softmax(dim=0) for level in ("scene", "texture")}
            maps = plain_maps(net, logits, resized, full)
            self.assert_seen(evaluate.parse(net, photo), {**tags, **maps})

    def test_of_several_sizes_and_mirror_images_against_the_loop(self):
        net = varied_net()
        for height, width in ((48, 75), (90, 60)):
            photo = noise(height, width)
            for sizes, flip in (([64, 96], True), ([50], True), ([70, 50, 61], False)):
                seen = evaluate.parse(net, photo, sizes=sizes, flip=flip)
                self.assert_seen(seen, plain_parse(net, photo, sizes, flip))

    def test_a_picture_is_turned_as_its_exif_data_say_and_an_array_is_not(self):
        net = varied_net()
        photo = noise(48, 80)
        upright = evaluate.parse(net, photo.rotate(-90, expand=True))["object"]
        photo.getexif()[0x0112] = 6  # to be turned by a quarter, clockwise
        assert_array_equal(evaluate.parse(net, photo)["object"], upright)
        self.assertEqual(evaluate.parse(net, np.asarray(photo))["object"].shape, (48, 80))

    def test_levels_and_arrays_that_it_takes(self):
        net = varied_net()
        photo = np.asarray(noise(48, 64))
        self.assertEqual(set(evaluate.parse(net, photo, ["part", "scene"])), {"part", "scene"})
        self.assertRaises(ValueError, evaluate.parse, net, photo, ["colour"])
        for wrong in (photo / 255, photo[..., 0], photo[:0], [1, 2]):
            self.assertRaises(ValueError, evaluate.parse, net, wrong)

    def test_an_answer_that_is_not_finite_is_an_error(self):
        net = varied_net()
        net.heads["material"].classifier.bias.data[2] = math.nan
        photo = noise(48, 64)
        evaluate.parse(net, photo, ["object"])
        self.assertRaisesRegex(ValueError, "material", evaluate.parse, net, photo)


class TestEvaluation(unittest.TestCase):
    def test_photos_are_seen_in_full(self):
        """JPEGs not as libjpeg reduces them, however small the network's input."""
        root = own_data(new_folder("full"), [np.tile([1, 2], (450, 300))])
        path = join(root, "images", "training", "0.jpg")
        size = (64, 100, 8)
        item = evaluate.EvaluationImages({"ade20k": source_of(root)}, [("ade20k", 0)], [size])[0]
        view = evaluate.network_input(datasets.open_photo(path), size)
        self.assertTrue(torch.equal(item["views"][0].pixels, view.pixels))

    def test_labels_that_the_loop_over_the_views_predicts_are_all_right(self):
        """Of all levels; OpenSurfaces' labels are larger than their photo."""
        net = varied_net()
        place = new_folder("photos")
        photo = Image.open(save(noise(96, 128), place, "a.jpg"))
        seen = plain_parse(net, photo, [36, 80], True)
        names = {10 + k: name for k, name in enumerate(CONCEPTS["object"])}
        names.update({21: "wheel", 22: "door", 24: "head"})
        parts = np.where(seen["part"] >= 0, 20 + seen["part"], 0)
        scene = CONCEPTS["scene"][seen["scene"].argmax()]
        ade = Ade()
        ade.add(10 + seen["object"].numpy(), names, [scene], parts)

        photo = Image.open(save(noise(48, 64), place, "b.jpg"))
        seen = plain_parse(net, photo, [36, 80], True, size=(96, 128))
        surfaces(ade.root, CONCEPTS["material"], [1 + seen["material"].numpy()])

        squares = {}
        for k in range(8):  # from the middle at 64 pixels, whatever --size says
            square = noise(64, 88, k)
            seen = plain_parse(net, square.crop((12, 0, 76, 64)), [64], True)
            squares[f"{CONCEPTS['texture'][seen['texture'].argmax()]}/{k}.png"] = square
        textures(ade.root, train1=list(squares))
        for name, square in squares.items():
            save(square, ade.root, "dtd", "images", name)

        split = {}
        for source in ("ade20k", "os", "dtd"):
            split[source] = scanned(ade.root, source)[0].images
        checkpoint = save_checkpoint(net, CONCEPTS, split, data="ade20k,os,dtd", root=ade.root)
        path = join(ade.root, "m.json")
        argv = ("--size", "36,80", "--flip", "--json", path)
        succeeded(self, evaluate.main, checkpoint, *argv)
        found = read_json(path)
        for level in ("object", "part", "material"):
            self.assertGreaterEqual(found[level]["pixel_accuracy"], 0.999)
        self.assertEqual(found["scene"], {"top1": 1, "n": 1})
        self.assertEqual(found["texture"], {"top1": 1, "n": 8})
        command(evaluate.main, checkpoint, "--size", 80, "--json", path)
        self.assertLess(read_json(path)["object"]["pixel_accuracy"], 0.95)


def labelled(metrics: dict) -> list[str]:
    """The classes that have an IoU."""
    return [name for name, iou in metrics.get("iou", metrics).items() if iou is not None]


class TestReleasedNetworks(unittest.TestCase):
    """Others' networks, of few channels, on data and photos."""

    @classmethod
    def setUpClass(cls):
        cls.small = {"backbone": "resnet18", "channels": 8}
        cls.tables = class_tables(new_folder("joint_dataset"))
        cls.paper, _ = released_files("paper", 1, **cls.small)
        cls.of_paper = ("--release", *cls.paper, "--labels", cls.tables)

    def metrics(self, root: str, *argv) -> dict:
        argv = (*argv, "--root", root, "--json", join(root, "m.json"))
        status, _, err = command(evaluate.main, *argv)
        self.assertEqual(status, 0, err)
        return read_json(root, "m.json")

    def predicted(self, net: UPerNet, photo: str, size: tuple, multiple: int) -> np.ndarray:
        """The objects in a photo that the network sees at `size`, without padding."""
        picture = datasets.open_photo(photo)
        logits = plain_view(net, picture, *size, multiple)["object"]
        return plain_upsample(logits, size, picture.size[::-1]).argmax(dim=0).numpy()

    def test_the_papers_on_ade20k_and_opensurfaces(self):
        """The authors' table says which of their classes a number or scene of the data is."""
        objects = columns(300, 7, 7, 9)
        parts = columns(0, 20, 21, 0)
        names = {7: "car", 300: "wall", 9: "dust", 20: "wheel", 21: "dent"}
        ade = Ade()
        ade.add(objects, names, ["outdoor", "bus stop"], parts)
        ade.add(objects, names, ["outdoor", "attic"], parts)
        folder = Path(ade.folder, "images", "ADE")
        (folder / "training").rename(folder / "validation")
        surfaces(ade.root, ["Mud", "Brick", "Mud"], [columns(1, 2, 3)])

        _, vocabulary = upernet.load_release(*self.paper, self.tables)
        index = ade.index()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            of_release = evaluate.released_names(self.tables, index, vocabulary)
        self.assertIn("attic", said.getvalue())
        source = datasets.Source(index, vocabulary, of_release)
        labels = source.labels(0)
        assert_array_equal(labels["object"], columns(1, 3, 3, -1))
        assert_array_equal(labels["part"], columns(0, 1, 0, 0))
        self.assertEqual(source.tags, [17, -1])

        metrics = self.metrics(ade.root, *self.of_paper, "--data", "ade20k,os", "--size", 32)
        self.assertEqual(metrics["scene"]["n"], 1)
        self.assertEqual(labelled(metrics["object"]), ["object 1", "object 3"])
        self.assertEqual(labelled(metrics["part"]["iou"]["object 3"]), ["background", "part 1"])
        self.assertEqual(labelled(metrics["material"]), ["material 25"])
        self.assertFalse(os.path.exists(join(ade.root, "split.json")))

    def test_masks_of_the_papers_have_the_authors_numbers_from_0(self):
        """At a size cut off to whole pixels, then up to a multiple of 8, as in their code."""
        place = new_folder("photo")
        photo = save(noise(48, 80), place, "x.png")
        succeeded(
            self, evaluate.main, *self.of_paper, "--size", 34, "--photo", photo, "--pictures", place
        )
        net, _ = upernet.load_release(*self.paper, self.tables)
        expected = self.predicted(net, photo, (40, 56), 8)  # of 34 x 56.67, cut off
        with Image.open(join(place, "x_object.png")) as mask:
            self.assertGreaterEqual((np.asarray(mask) == expected).mean(), 0.995)

    def test_mmsegmentations_on_photos_and_sceneparsing(self):
        names = [f"thing {k}" for k in range(1, 151)]
        (path,), _ = released_files("mmseg", 1, {"CLASSES": names}, **self.small)
        root = new_folder("sceneparsing")
        rows = [f"{k}\t0\t0\t0\t{name}, other" for k, name in enumerate(names, start=1)]
        table = "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows])
        write(join(root, "objectInfo150.txt"), table)
        photo = save(noise(48, 64), root, "images", "validation", "a.jpg")
        net, _ = upernet.load_mmseg(path)
        # 171 cells for 683 pixels, stretched over the photo as in their code.
        logits = plain_view(net, datasets.open_photo(photo), 512, 683, 1)["object"]
        predicted = plain_resize(logits[None], (48, 64))[0].argmax(dim=0).numpy() + 1
        truth = np.random.default_rng(0).choice([0, 1, 2, 77, 150], (48, 64))
        truth[:24] = predicted[:24]  # something to get right
        save(truth, root, "annotations", "validation", "a.png")

        succeeded(self, evaluate.main, "--release", path, "--photo", photo, "--pictures", root)
        with Image.open(join(root, "a_object.png")) as mask:
            self.assertGreater((np.asarray(mask) == predicted).mean(), 0.99)
        found = self.metrics(root, "--release", path, "--data", "ade20k")["object"]
        pairs = [(t, p) for t, p in zip(truth.ravel(), predicted.ravel()) if t > 0]
        self.assertAlmostEqual(found["pixel_accuracy"], plain_accuracy(pairs), delta=0.01)
        for k, name in enumerate(names, start=1):
            iou = plain_iou(pairs, k)
            self.assertEqual(found["iou"][name] is None, iou is None)
            self.assertAlmostEqual(found["iou"][name] or 0, iou or 0, delta=0.01)

    def test_larger_sizes_than_trained(self):
        """Our networks take them as asked, the released ones with their own longest side."""
        photo = Image.new("RGB", (300, 200))
        for multiple, expected in ((None, (160, 240)), (1, (133, 200))):
            [size] = evaluate.test_sizes((100, 200, multiple), [160])
            view = evaluate.network_input(photo, size)
            self.assertEqual(view.filled, tuple(4 * math.ceil(n / 4) for n in expected))

    def test_sizes_are_rounded_as_in_each_projects_code(self):
        photo = Image.new("RGB", (1025, 1024))
        for size, expected in (((512, 2048, 1), (512, 513)), ((512, 2048, 8), (512, 512))):
            view = evaluate.network_input(photo, size)
            self.assertEqual(view.pixels.shape[2:], expected)

    def test_data_of_other_classes_are_refused(self):
        own = own_data(new_folder("own"), [columns(1, 2)], classes="a\nb")
        ade = Ade()
        ade.add(columns(1), {1: "wall"}, ["street"])
        (mmseg,), _ = released_files("mmseg", 1, **self.small)
        of_mmseg = ("--release", mmseg)
        for root, release in ((own, self.of_paper), (own, of_mmseg), (ade.root, of_mmseg)):
            argv = (*release, "--data", "ade20k", "--root", root)
            self.assertIn(root, refusal(self, evaluate.main, *argv))


class TestParsedPhotos(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.net = varied_net()
        cls.checkpoint = save_checkpoint(cls.net, CONCEPTS)

    def parsed(self, *argv) -> str:
        """What the command printed."""
        return succeeded(self, evaluate.main, self.checkpoint, "--photo", *argv)

    def test_files_have_what_parse_sees(self):
        place = new_folder("photos")
        photo = noise(48, 70)
        path = save(photo, place, "a.PNG")
        self.parsed(path, "--pictures", place)
        names = ["a.PNG", "a_material.png", "a_object.png", "a_upernet.npz", "a_upernet.png"]
        self.assertEqual(sorted(os.listdir(place)), names)
        seen = evaluate.parse(self.net, photo)
        with np.load(join(place, "a_upernet.npz")) as maps:
            for level, value in seen.items():
                assert_array_equal(maps[level], value.astype(maps[level].dtype))
            self.assertEqual(maps["scene_names"].tolist(), CONCEPTS["scene"])
            parts = ["car: background", "car: wheel", "car: door"]
            self.assertEqual(maps["part_names"].tolist()[:3], parts)
        for level in ("object", "material"):
            with Image.open(join(place, f"a_{level}.png")) as mask:
                assert_array_equal(np.asarray(mask), seen[level] + 1)

    def test_a_mask_of_ones_own_is_not_replaced(self):
        place = new_folder("masks")
        path = save(noise(48, 70), place, "a.png")
        mask = Path(save(np.zeros((48, 70)), place, "a_object.png"))
        before = mask.read_bytes()
        for _ in range(2):
            self.parsed(path, "--pictures", place)
            self.assertEqual(mask.read_bytes(), before)
        self.assertEqual(len(os.listdir(place)), 6)

    def test_any_mode(self):
        place = new_folder("modes")
        photo = noise(48, 80)
        modes = {"grey.png": "L", "cmyk.jpg": "CMYK", "alpha.png": "RGBA", "palette.gif": "P"}
        for name, mode in modes.items():
            photo.convert(mode).save(join(place, name))
        photo.save(join(place, "really-a-png.jpg"), "PNG")
        photo.save(join(place, "marred.jpg"), exif=b"Exif\0\0" + b"\xff" * 9)
        photo.resize((2000, 2)).save(join(place, "flat.png"))
        photo.resize((1, 1)).save(join(place, "dot.png"))
        paths = list(Path(place).iterdir())
        self.parsed(*paths, "--pictures", place)
        for path in paths:
            with Image.open(path) as picture:
                size = picture.size
            with np.load(path.with_name(f"{path.stem}_upernet.npz")) as maps:
                for level in ("object", "part", "material", "texture_map"):
                    self.assertEqual(maps[level].shape, size[::-1], path)

    def test_folders_and_what_is_passed_over_in_them(self):
        place = new_folder("folder")
        for name in ("a.webp", "b.tif", "c.bmp", "d.JPEG", "e_object.png", "below/f.png"):
            save(noise(48, 64), place, name)
        write(join(place, "notes.txt"), "no photo")
        os.mkfifo(join(place, "pipe.jpg"))
        said = self.parsed(place, "--pictures", place)
        self.assertRegex(said, f"{re.escape(place)}.* 3 ")  # notes.txt, the pipe, the folder
        names = sorted(os.listdir(place))
        self.assertEqual([name[0] for name in names if name.endswith(".npz")], list("abcde"))
        # Its own results are passed over, in the folder and as files.
        pictures = [join(place, name) for name in names if name.endswith(".png")]
        self.parsed(place, *pictures, "--pictures", place)
        self.assertEqual(sorted(os.listdir(place)), names)
        for nothing in (new_folder("empty"), join(place, "a_upernet.png")):
            refusal(self, evaluate.main, self.checkpoint, "--photo", nothing)

    def test_photos_of_one_name_are_all_parsed(self):
        place = new_folder("names")
        out = new_folder("out")
        paths = []
        for k, name in enumerate(("same.jpg", "same.png", "b/same.jpg", "c/same.jpg")):
            paths.append(save(noise(40 + k, 64), place, *name.split("/")))
        self.parsed(*paths, "--pictures", out)
        heights = []
        for mask in Path(out).glob("*_object.png"):
            with Image.open(mask) as picture:
                heights.append(picture.height)
        self.assertEqual(sorted(heights), [40, 41, 42, 43])
        self.assertLessEqual({"same_object.png", "same.png_object.png"}, set(os.listdir(out)))

    def test_relations_of_photos(self):
        place = new_folder("relations")
        photo = save(noise(48, 64), place, "a.png")
        path = join(place, "r.json")
        argv = (photo, "--pictures", place, "--relations", path)
        self.assertIn("is made of", self.parsed(*argv))
        found = read_json(path)
        self.parsed(*argv, "--levels", "object,material")
        self.assertEqual(read_json(path), {"object-material": found["object-material"]})


class TestPictures(unittest.TestCase):
    def test_panels_have_the_photos_size_up_to_1600_pixels_a_side(self):
        path = join(new_folder("large"), "x")
        for width, height, panel in (
            (2000, 900, (1600, 720)),
            (700, 2000, (560, 1600)),
            (500, 410, (500, 410)),
        ):
            stripes = np.arange(width) // 100 % 2 * np.ones((height, 1), int)
            seen = {"object": stripes, "part": stripes + 3, "material": 1 - stripes}
            evaluate.write_photo(Image.new("RGB", (width, height)), seen, CONCEPTS, path)
            with Image.open(f"{path}_upernet.png") as sheet:  # photo, objects, parts; materials
                self.assertLess(abs(sheet.width - 3 * panel[0]), 50)
                self.assertLess(2 * panel[1], sheet.height)
                self.assertLess(sheet.height, 3 * panel[1] + 300)
            with Image.open(f"{path}_material.png") as mask:
                np.testing.assert_array_equal(np.asarray(mask), 2 - stripes)
            with np.load(f"{path}_upernet.npz") as maps:
                np.testing.assert_array_equal(maps["part"], stripes + 3)

    def test_classes_lie_in_their_colours_on_the_photo(self):
        classes = np.repeat([[0, 7, -1]], 10, axis=1) * np.ones((20, 1), int)
        below = np.array([50, 60, 70])
        picture = np.asarray(evaluate.overlay(Image.new("RGB", (30, 20), (50, 60, 70)), classes))
        for x, k in ((5, 0), (15, 7)):
            mixed = 0.6 * np.array(evaluate.class_colour(k)) + 0.4 * below
            np.testing.assert_allclose(picture[10, x], mixed, atol=1)
        assert_array_equal(picture[10, 25], below)

    def test_of_ten_neighbouring_classes_no_two_are_alike(self):
        colours = np.array([evaluate.class_colour(k) for k in range(336)])
        for k in range(len(colours)):
            distances = np.linalg.norm(colours[k + 1 : k + 10] - colours[k], axis=1)
            self.assertGreater(distances.min(initial=1000), 60, k)

    def test_curves_show_mean_losses_and_rates_that_were(self):
        lines = []
        for k in range(500):
            level, rate = ("object", 0.04) if k < 321 else ("texture", 0.5)
            lines.append(json.dumps({"loss": {level: k % 7 / 6}, "lr": rate}))
        folder = new_folder("curves")
        log = write(join(folder, "log.jsonl"), "\n".join(lines))
        shown = {}

        def plot(title, unit, right, top, curves):
            self.assertEqual((unit, right), ("iteration", 500))
            [(_, values, _)] = curves
            self.assertEqual(top, values.max())
            shown[title] = values
            return Image.new("RGB", (9, 9))

        with mock.patch("datasets.plot", plot):
            train.draw_curves(log, join(folder, "curves.png"))
        self.assertEqual(list(shown), ["object, loss", "texture, loss", "learning rate"])
        self.assertEqual([len(values) for values in shown.values()], [160, 160, 160])
        # 321 iterations as 160 stretches: the first has three, of losses 0, 1/6, 2/6.
        np.testing.assert_allclose(shown["object, loss"][:2], [1 / 6, 3.5 / 6])
        self.assertEqual(set(shown["learning rate"]), {0.04, 0.5})  # none between two stages


class TestOwnNetwork(unittest.TestCase):
    """From one's own photos and masks to masks of new photos."""

    @classmethod
    def setUpClass(cls):
        names = ("sky", "road", "sign", "tree")
        cls.root = coloured(*names, numbers=(0, 40, 255, 300))
        scenes = "\n".join(f"{k} street" for k in range(20))
        write(join(cls.root, "sceneCategories.txt"), scenes)
        argv = (*OWN, "--root", cls.root, "--channels", 16, "--min-scene-images", 3)
        cls.out, _ = trained(*argv, "--split", "official", "--iters", 40, validates=True)
        cls.checkpoint = join(cls.out, "ckpt.pt")

    def test_classes_with_gaps_are_learned_and_written_with_their_numbers(self):
        metrics = read_json(self.out, "metrics.json")
        self.assertEqual(list(metrics["object"]["iou"]), ["sky", "road", "sign", "tree"])
        self.assertGreater(metrics["object"]["mean_iou"], 0.5)
        photo = join(self.root, "images", "validation", "4.png")
        argv = ("--photo", photo, "--pictures", self.out)
        succeeded(self, evaluate.main, self.checkpoint, *argv)
        with Image.open(join(self.out, "4_object.png")) as mask:
            numbers = np.asarray(mask)
        with np.load(join(self.out, "4_upernet.npz")) as maps:
            assert_array_equal(maps["object_numbers"], [0, 40, 255, 300])
            assert_array_equal(numbers, maps["object_numbers"][maps["object"]])
        with Image.open(photo.replace("images", "annotations")) as mask:
            self.assertGreater((numbers == np.asarray(mask)).mean(), 0.5)

    def test_split_all_evaluates_every_image_and_counts_those_that_trained(self):
        path = join(new_folder("out"), "m.json")
        for split, n, trained in ((), 4, False), (("--split", "all"), 20, True):
            status, said, _ = command(evaluate.main, self.checkpoint, *split, "--json", path)
            self.assertEqual((status, read_json(path)["scene"]["n"]), (0, n))
            self.assertIn(f"ade20k: {n} of 20 images in {self.root} ", said)
            self.assertEqual(bool(re.search("16 of 20 images have trained", said)), trained)
        link = join(new_folder("elsewhere"), "link")
        os.symlink(self.root, link)
        _, said, _ = command(evaluate.main, self.checkpoint, "--split", "all", "--root", link)
        self.assertIn("16 of 20 images have trained", said)

    def test_split_all_of_a_test_set(self):
        """Of other images, with a class that the network lacks, one that it writes otherwise."""
        table = "0 Sky\n3 road\n7 dog\n255 sign"
        root = own_data(new_folder("test-set"), [columns(0, 3, 7, 255)] * 3, classes=table)
        argv = ("--split", "all", "--root", root, "--json", join(root, "m.json"))
        pictures = join(root, "pictures")
        status, said, err = command(evaluate.main, self.checkpoint, *argv, "--pictures", pictures)
        self.assertEqual(status, 0, err)
        self.assertNotIn("trained", said)
        self.assertRegex(err, r"Sky \(.*sky\), dog")
        self.assertNotIn("road", err)
        self.assertEqual(labelled(read_json(root, "m.json")["object"]), ["road", "sign"])
        self.assertEqual(len(os.listdir(pictures)), 3)
        # It makes no split.
        argv = ("--split", "balanced", "--root", root)
        status, _, err = command(evaluate.main, self.checkpoint, *argv)
        self.assertEqual(status, 2)
        self.assertIn("split.json", err)
        self.assertFalse(os.path.exists(join(root, "split.json")))


# ---------------------------------------------------------------- runs of train.py
OWN = (
    *("--data", "ade20k", "--backbone", "resnet18", "--channels", 8),
    *("--weights", "none", "--sizes", 64, "--workers", 0),
)


def trained(*argv, out: str = "", validates: bool = False) -> tuple[str, str]:
    """(the folder of a run, what it printed); without a validation unless `validates`."""
    out = out or new_folder("out")
    context = contextlib.nullcontext()
    if not validates:
        context = mock.patch("train.evaluate.evaluate", return_value={})
    with context:
        status, said, err = command(train.main, *argv, "--out", out)
    if (status, err) != (0, ""):
        raise AssertionError(f"status {status}: {err}")
    return out, said


def killed(steps: int, *argv, out: str = "") -> str:
    """The folder of a run that ends at the step after so many."""
    out = out or new_folder("killed")
    update = train.update
    losses = []

    def until(*arguments):
        if len(losses) == steps:
            sys.exit("killed")
        losses.append(update(*arguments))
        return losses[-1]

    with mock.patch("train.update", until):
        status, _, err = command(train.main, *argv, "--out", out)
    if status != "killed":
        raise AssertionError(f"status {status}: {err}")
    return out


def batches_of(*argv) -> list[dict]:
    """The batches of a run that does not train."""
    batches = []

    def recorded(model, part_slices, of_step, *rest):
        batches.extend(of_step)
        return {"object": 0.0}

    with mock.patch("train.update", recorded):
        trained(*argv)
    return batches


def scaled_losses(factor: float):
    """A patch that multiplies all losses."""
    plain = upernet.losses

    def losses(*arguments):
        return {level: factor * value for level, value in plain(*arguments).items()}

    return mock.patch("upernet.losses", losses)


def coloured(*names: str, numbers: tuple = (), images: int = 20) -> str:
    """A folder of images with these classes, each of its colour; one image in five validates."""
    numbers = np.array(numbers or range(1, 1 + len(names)), np.uint16)
    root = new_folder("coloured")
    rows = [f"{number} {name}" for number, name in zip(numbers, names)]
    write(join(root, "classes.txt"), "\n".join(rows))
    rng = np.random.default_rng(0)
    colours = rng.integers(20, 235, (len(names), 3))
    for k in range(images):
        side = "validation" if k % 5 == 4 else "training"
        classes = rng.integers(0, len(names), (2, 3)).repeat(24, axis=0).repeat(24, axis=1)
        grain = rng.integers(-20, 20, (48, 72, 3))
        save(Image.fromarray(numbers[classes]), root, "annotations", side, f"{k}.png")
        save(colours[classes] + grain, root, "images", side, f"{k}.png")
    return root


class Runs(unittest.TestCase):
    """Runs on few images."""

    @classmethod
    def setUpClass(cls):
        cls.toy = ("--root", toy_root(), *SMALL)

    def assert_same_run(self, one: str, other: str):
        """Two runs that ended with the same weights, optimizer, data and log, bit for bit."""
        logs = []
        for out in (one, other):
            logs.append([{**line, "seconds": 0} for line in read_log(out)])
        self.assertEqual(*logs)
        ours = checkpoint_of(one)
        theirs = checkpoint_of(other)
        for key in ("model", "optimizer"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
        for key in ("vocabulary", "stage", "iteration", "split", "trained", "network"):
            self.assertEqual(ours[key], theirs[key])


# ---------------------------------------------------------------- one step
class TestUpdate(unittest.TestCase):
    """Steps of a network in eval mode, so that images do not depend on each other."""

    def batch(self, seed: int) -> dict:
        torch.manual_seed(seed)
        return {
            "source": "ade20k",
            "files": [f"file {seed}"],
            "images": torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8),
            "scene": torch.randint(0, 5, (2,)),
            "object": torch.randint(0, 7, (2, 16, 16)),
            "part": torch.randint(0, 2, (2, 16, 16)),
        }

    def step(self, *batches: dict, scaler=None) -> tuple[dict, dict]:
        """(losses, parameter -> its step) at a rate of 1, without decay."""
        net = self.net = small_net()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = torch.optim.SGD(net.parameters(), lr=1)
        scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        cpu = torch.device("cpu")
        loss = train.update(net, net.part_slices, list(batches), optimizer, scaler, cpu, None)
        return loss, {name: before[name] - p.detach() for name, p in net.named_parameters()}

    def test_losses_are_weighted_as_released_and_batches_averaged(self):
        one = self.batch(1)
        loss_1, step_1 = self.step(one)
        loss_2, step_2 = self.step(self.batch(2))
        loss, step = self.step(one, self.batch(2))
        net = small_net()
        logits = net(one["images"] / 255, ["scene", "object", "part"])
        each = upernet.losses(logits, one, net.part_slices)
        for level, value in loss.items():
            self.assertEqual(loss_1[level], each[level].item())
            self.assertAlmostEqual(value, (loss_1[level] + loss_2[level]) / 2, places=5)
        (0.25 * each["scene"] + 1.0 * each["object"] + 0.5 * each["part"]).backward()
        for name, p in net.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(step_1[name], expected, rtol=1e-3, atol=1e-6)
            mean = (step_1[name] + step_2[name]) / 2
            torch.testing.assert_close(step[name], mean, rtol=1e-3, atol=1e-6)

    def test_a_scaler_leaves_the_step_alone_and_skips_one_that_overflows(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024)
        _, step = self.step(self.batch(1), scaler=scaler)
        _, expected = self.step(self.batch(1))
        for name, value in step.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)
        with scaled_losses(math.inf):
            _, step = self.step(self.batch(1), scaler=scaler)
        self.assertFalse(any(value.any() for value in step.values()))
        self.assertEqual(scaler.get_scale(), 512)

    def test_no_decay_on_biases_and_norms(self):
        net = small_net()
        spared = set()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                spared.update(module.parameters())
            elif getattr(module, "bias", None) is not None:
                spared.add(module.bias)
        decayed, others = train.parameter_groups(net)
        self.assertEqual((decayed["weight_decay"], others["weight_decay"]), (1e-4, 0))
        self.assertEqual(set(others["params"]), spared)
        self.assertEqual(set(decayed["params"]), set(net.parameters()) - spared)

    def test_defaults_that_depend_on_the_machine(self):
        for cores, processes, workers in ((16, "4", 4), (64, "2", 8), (2, "4", 1)):
            with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=processes):
                with mock.patch("os.cpu_count", return_value=cores):
                    self.assertEqual(datasets.default_workers(), workers)
        for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
            with mock.patch("torch.cuda.get_device_capability", return_value=capability):
                self.assertEqual(datasets.pick_amp("auto", torch.device("cuda")), expected)
        self.assertIsNone(datasets.pick_amp("auto", torch.device("cpu")))


# ---------------------------------------------------------------- a whole run
class TestTraining(Runs):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.out = new_folder("run")
        write(join(cls.out, "log.jsonl"), "a line that an older run left\n")
        argv = (*cls.toy, "--iters", 6, "--texture-iters", 2, "--accumulate", 2)
        _, cls.said = trained(*argv, "--eval-every", 2, out=cls.out, validates=True)
        cls.checkpoint = join(cls.out, "ckpt.pt")

    def test_files_and_the_log(self):
        files = [
            ".lock",
            "best.pt",
            "ckpt.pt",
            "curves.png",
            "log.jsonl",
            "metrics.json",
            "pictures",
        ]
        self.assertEqual(sorted(os.listdir(self.out)), files)
        levels = {"ade20k": {"scene", "object", "part"}, "os": {"material"}, "dtd": {"texture"}}
        steps = [("main", k) for k in range(6)] + [("texture", 0), ("texture", 1)]
        keys = {"stage", "iteration", "source", "lr", "loss", "seconds"}
        log = read_log(self.out)
        for k, line in enumerate(log):
            self.assertEqual((line["stage"], line["iteration"]), steps[k])
            validated = {"metrics"} if k in (1, 3, 5) else set()  # the last is metrics.json
            self.assertEqual(set(line), keys | validated)
            self.assertEqual(set(line["loss"]), levels[line["source"]])
        # The texture stage has a policy of its own.
        np.testing.assert_allclose(log[3]["lr"], 0.04 * (3 / 6) ** 0.9)
        np.testing.assert_allclose(log[7]["lr"], 0.04 * (1 / 2) ** 0.9)

    def test_the_checkpoint(self):
        content = checkpoint_of(self.out)
        keys = "model network vocabulary optimizer scaler stage iteration random split trained"
        self.assertEqual(set(content), {*keys.split(), "arguments"})
        self.assertEqual(content["stage"], "done")
        for source, images in content["split"].items():
            self.assertFalse(set(images) & set(content["trained"][source]))
        self.assertEqual(len(content["trained"]["dtd"]), 22)
        net, vocabulary = upernet.load(self.checkpoint)
        self.assertFalse(net.training)
        self.assertEqual(vocabulary, content["vocabulary"])

    def test_evaluate_finds_the_metrics_of_the_last_and_of_the_best(self):
        metrics = read_json(self.out, "metrics.json")
        again = join(new_folder("json"), "again.json")
        self.assertEqual(command(evaluate.main, self.checkpoint, "--json", again)[0], 0)
        self.assertEqual(read_json(again), metrics)
        self.assertEqual(set(metrics), set(upernet.LEVELS))
        for argv in (("--data", "dtd"), ("--data", "toy", "--levels", "texture")):
            command(evaluate.main, self.checkpoint, *argv, "--json", again)
            self.assertEqual(read_json(again), {"texture": metrics["texture"]})
        validated = [line["metrics"] for line in read_log(self.out) if "metrics" in line]
        best = max(self.mean_of_levels(of_run) for of_run in [*validated, metrics])
        command(evaluate.main, join(self.out, "best.pt"), "--json", again)
        self.assertAlmostEqual(self.mean_of_levels(read_json(again)), best)
        self.assertRegex(self.said, f"best.pt.*{best:.4f}")

    def mean_of_levels(self, metrics: dict) -> float:
        total = metrics["scene"]["top1"] + metrics["object"]["mean_iou"]
        total += metrics["part"]["mean_iou_bg"] + metrics["material"]["mean_iou"]
        return (total + metrics["texture"]["top1"]) / 5

    def test_the_first_lines_say_what_follows(self):
        """Sizes; iterations, images a step, passes and rate of each stage; what is unlabelled."""
        first = self.said.split("it/s")[0]
        self.assertRegex(first, r"(?m)^images: .*\b32\b.*\b160$")
        self.assertRegex(first, r"(?m)^main stage: 6 .*\b4 images.*\b0\.4 passes.*\b0\.04$")
        self.assertRegex(first, r"(?m)^texture stage: 2 .*\b32 images.*\b2\.9 passes.*\b0\.04$")
        self.assertRegex(first, r"(?m)^ade20k.*%.*unlabelled")

    def test_a_finished_run_is_said_to_be_finished(self):
        before = Path(self.checkpoint).read_bytes()
        _, said = trained("--resume", out=self.out)
        self.assertRegex(said, "(?s)finished.*--weights .*--out")
        self.assertEqual(Path(self.checkpoint).read_bytes(), before)

    def test_only_the_path_of_an_iterations_source_moves(self):
        """The whole state is compared from step to step, also where the run ends and resumes."""
        body = ("backbone.", "ppm.", "fpn.", "fusion.", "heads.scene.", "heads.object.")
        paths = {
            "ade20k": (*body, "heads.part."),
            "os": ("backbone.", "ppm.", "fpn.laterals.", "fpn.convs.0.", "heads.material."),
            "dtd": ("heads.texture.",),
        }
        update = train.update
        states = []

        def recorded(net, part_slices, batches, optimizer, *rest):
            result = update(net, part_slices, batches, optimizer, *rest)
            state = {name: value.clone() for name, value in net.state_dict().items()}
            for name, p in net.named_parameters():
                if p in optimizer.state:
                    state[f"{name} momentum"] = optimizer.state[p]["momentum_buffer"].clone()
            states.append(state)
            return result

        argv = (*self.toy, "--sizes", 64, "--iters", 6, "--texture-iters", 2, "--save-every", 1)
        for amp, steps in (("bf16", 8), ("off", 3), ("off", 7)):
            states.clear()
            with self.subTest(amp=amp, steps=steps), mock.patch("train.update", recorded):
                if steps == 8:
                    out, _ = trained(*argv, "--amp", amp)
                else:
                    out = killed(steps, *argv, "--amp", amp)
                    trained("--resume", out=out)
                sources = [line["source"] for line in read_log(out)]
                self.assertEqual(set(sources), set(paths))
                for k in range(1, 8):
                    self.compare_states(states[k - 1], states[k], k, paths[sources[k]])

    def compare_states(self, before: dict, after: dict, k: int, path: tuple):
        if k != 6:  # the texture stage has its own optimizer
            self.assertLessEqual(set(before), set(after))
        moved = []
        for name, value in after.items():
            if name not in before or not torch.equal(value, before[name]):
                moved.append(name)
        self.assertEqual([name for name in moved if not name.startswith(path)], [], k)
        for prefix in path:
            self.assertTrue(any(name.startswith(prefix) for name in moved), f"{k} {prefix}")

    def test_levels_build_and_train_only_these_heads(self):
        for levels, source in (
            (["object"], "ade20k"),
            (["object", "part"], "ade20k"),
            (["material"], "os"),
            (["texture"], "dtd"),
        ):
            argv = (*self.toy, "--levels", ",".join(levels), "--iters", 2, "--texture-iters", 2)
            out, _ = trained(*argv, validates=True)
            log = read_log(out)
            content = checkpoint_of(out)
            heads = [key.split(".")[1] for key in content["model"] if key.startswith("heads.")]
            metrics = read_json(out, "metrics.json")
            for of_run in (heads, log[0]["loss"], content["vocabulary"], metrics):
                self.assertEqual(set(of_run), set(levels))
            self.assertEqual([line["source"] for line in log], [source, source])

    def test_crops_are_squares_of_both_orientations_and_resume_bit_for_bit(self):
        argv = (*self.toy, "--accumulate", 2, "--save-every", 2, "--iters", 4)
        argv = (*argv, "--texture-iters", 0)
        heights = {}
        for source in ("ade20k", "os"):
            index, _ = scanned(join(toy_root(), "toy"), source)
            heights.update(zip(index.images, index.sizes[:, 0].tolist()))
        for crop, orientations in ((0, 1), (64, 2)):
            counts = []
            for batch in batches_of(*argv, "--crop", crop):
                counts.append(len({heights[name] for name in batch["files"]}))
                self.assertTrue(crop == 0 or batch["images"].shape == (2, 3, 64, 64))
            self.assertEqual(max(counts), orientations)
        whole, said = trained(*argv, "--crop", 64)
        self.assertRegex(said, "--sizes.* no effect")
        self.assertEqual(checkpoint_of(whole)["network"]["test_size"], (64, 256, None))
        stopped = killed(3, *argv, "--crop", 64)
        trained("--resume", out=stopped)
        self.assert_same_run(whole, stopped)

    def test_the_log_is_strict_json_where_a_loss_overflows(self):
        with mock.patch("train.update", return_value={"object": math.inf, "scene": math.nan}):
            out, _ = trained(*self.toy, "--iters", 1, "--texture-iters", 0)
        self.assertEqual(read_log(out)[0]["loss"], {"object": None, "scene": None})


# ---------------------------------------------------------------- what ends a run, and --resume
PREAMBLE = """
import os, signal, sys, time
import torch
import torch.distributed as dist
import datasets, evaluate, resnet, train, upernet

resnet.BLOCKS[18] = (1, 1, 1, 1)
update = train.update
"""
HANGS = """
def hanging(*arguments):
    if os.path.exists(os.path.join(sys.argv[-1], "log.jsonl")):
        print("hangs", flush=True)
        time.sleep(60)
    return update(*arguments)

train.update = hanging
train.main()
"""


def started(text: str, *argv, processes: int = 0, restarts: int = 0, **variables):
    """A script that runs beside this one, under torchrun if it has several processes."""
    script = write(join(new_folder("script"), "script.py"), PREAMBLE + text)
    launcher = [sys.executable]
    threads = torch.get_num_threads()
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
        threads = 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": HERE, **variables}
    return subprocess.Popen(
        [*launcher, script, *map(str, argv)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestResume(Runs):
    def test_sigterm_and_ctrl_c_finish_the_iteration_and_save(self):
        """In the middle of a stage, in its last iteration, in the texture stage."""
        argv = (*self.toy, "--iters", 5, "--texture-iters", 3, "--save-every", 100)
        whole, _ = trained(*argv)
        stopped = join(new_folder("a"), "b c")
        plain = upernet.losses
        for number, iteration, stage in (
            (signal.SIGTERM, 2, "main"),
            (signal.SIGINT, 5, "main"),
            (signal.SIGTERM, 2, "texture"),
        ):

            def interrupted(*arguments):
                if log_lines(stopped) == iteration - 1 + 5 * (stage == "texture"):
                    os.kill(os.getpid(), number)
                return plain(*arguments)

            with mock.patch("upernet.losses", interrupted):
                status, said, _ = command(train.main, *argv, "--out", stopped)
            content = checkpoint_of(stopped)
            self.assertEqual(status, 128 + number)
            self.assertEqual((content["iteration"], content["stage"]), (iteration, stage))
            self.assertIn(f"python train.py --resume --out '{stopped}'", said)
            argv = ("--resume",)
        trained("--resume", out=stopped)
        self.assert_same_run(whole, stopped)

    def test_a_second_signal_after_two_seconds_ends_an_iteration_that_hangs(self):
        run = started(HANGS, *self.toy, "--iters", 9, "--out", new_folder("hanging"))
        self.assertTrue(any("hangs" in line for line in run.stdout))
        began = time.monotonic()
        while run.poll() is None:  # to groups of processes they come twice
            run.send_signal(signal.SIGINT)
            time.sleep(0.2)
        self.assertGreater(time.monotonic() - began, 2)
        self.assertLess(time.monotonic() - began, 30)
        self.assertEqual((run.returncode, run.communicate()[1]), (-signal.SIGINT, ""))

    def test_a_kill_and_a_signal_to_the_group_resume_bit_for_bit(self):
        """With processes that read images, which both reach too; the log may be ahead."""
        argv = (*self.toy, "--iters", 12, "--texture-iters", 8, "--workers", 1, "--save-every", 2)
        whole, _ = trained(*argv)
        stopped = new_folder("stopped")
        for number, expected in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
            lines = log_lines(stopped)
            run = started("train.main()", *argv, "--out", stopped)
            while run.poll() is None and log_lines(stopped) <= lines + 2:
                time.sleep(0.01)
            self.assertIn(stopped, refusal(self, train.main, "--resume", "--out", stopped))
            os.killpg(run.pid, number)
            _, err = run.communicate()
            self.assertEqual((err, run.returncode), ("", expected))
            argv = ("--resume",)
        content = checkpoint_of(stopped)
        done = content["iteration"] + 12 * (content["stage"] == "texture")
        self.assertEqual(done, log_lines(stopped))
        self.assertGreater(done, lines)
        trained("--resume", out=stopped)
        self.assert_same_run(whole, stopped)

    def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(self):
        out = killed(2, *self.toy, "--iters", 4, "--texture-iters", 0, "--save-every", 1)
        path = join(out, "ckpt.pt")
        good = Path(path).read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGXFSZ, handler)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
        self.assertIn(path, refusal(self, train.main, "--resume", "--out", out))
        self.assertEqual(Path(path).read_bytes(), good)
        hidden = [name for name in os.listdir(out) if name.startswith(".")]
        self.assertEqual(hidden, [".lock"])  # no part of a checkpoint

    def test_a_log_that_cannot_be_written_is_named(self):
        def full(path, *arguments, **options):
            if path.endswith("log.jsonl"):
                raise OSError(28, "No space left on device")  # of a write: without a name
            return open(path, *arguments, **options)

        out = new_folder("full")
        with mock.patch("train.open", full, create=True):
            line = refusal(self, train.main, *self.toy, "--iters", 1, "--out", out)
        self.assertIn(join(out, "log.jsonl"), line)

    def test_failures_from_outside_are_told_in_one_line(self):
        argv = (*self.toy, "--batch-size", 4, "--iters", 2, "--texture-iters", 0)
        for error, option in (
            (MemoryError(), "--batch-size"),
            (RuntimeError("CUDA out of memory. Tried"), "--batch-size"),
            (RuntimeError("DataLoader worker (pid 7) is killed"), "--workers"),
        ):
            out = new_folder("failing")
            with mock.patch("upernet.losses", side_effect=error):
                err = refusal(self, train.main, *argv, "--out", out)
            self.assertIn(option, err)
        advised = ("--resume", "--batch-size", 2, "--accumulate", 2)
        _, said = trained(*advised, out=out)
        self.assertEqual(log_lines(out), 2)
        self.assertNotIn("images a step", said)
        out = new_folder("ours")
        with mock.patch("upernet.losses", side_effect=RuntimeError("a mistake of ours")):
            self.assertRaises(RuntimeError, command, train.main, *argv, "--out", out)
        content = checkpoint_of(out)
        content["arguments"]["processes"] = 3
        torch.save(content, join(out, "ckpt.pt"))
        _, said = trained("--resume", "--batch-size", 2, out=out)
        self.assertIn("2 images a step, 12 before", said)

    def test_a_network_that_is_not_finite_is_not_written(self):
        def diverge(model, *_):
            model.backbone.bn1.running_var.fill_(math.inf)
            return {"material": 1.0}

        out = new_folder("diverged")
        argv = (*self.toy, "--levels", "material", "--iters", 1, "--out", out)
        with mock.patch("train.update", diverge):
            err = refusal(self, train.main, *argv)
        self.assertIn("running_var", err)
        self.assertIn(join(out, "ckpt.pt"), err)
        upernet.load(join(out, "ckpt.pt"))

    def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(self):
        out = new_folder("infinite")
        argv = (*self.toy, "--levels", "material", "--iters", 1, "--out", out)
        for factor in (math.inf, math.nan):
            shutil.rmtree(out, ignore_errors=True)
            with scaled_losses(factor), mock.patch("torch.optim.SGD.step") as step:
                err = refusal(self, train.main, *argv)
            step.assert_not_called()
            self.assertIn(join(out, "ckpt.pt"), err)
            self.assertRegex(err, r"photos/\d+\.jpg, photos/\d+\.jpg")
            self.assertEqual((checkpoint_of(out)["iteration"], log_lines(out)), (0, 0))

    def test_changed_data_or_a_log_that_is_none_are_refused(self):
        root = coloured("a", "b", images=8)
        out = killed(2, *OWN, "--root", root, "--iters", 3, "--save-every", 1)
        log = Path(out, "log.jsonl")
        log.write_text("{}\nno JSON\n")
        self.assertIn("log.jsonl", refusal(self, train.main, "--resume", "--out", out))
        self.assertEqual(log.read_text(), "{}\nno JSON\n")
        log.unlink()
        table = join(root, "classes.txt")
        write(table, "1 a\n2 c")
        self.assertIn(out, refusal(self, train.main, "--resume", "--out", out))
        write(table, "1 a\n2 b")
        masks = join(root, "annotations", "training")
        shutil.copy(join(masks, "1.png"), join(masks, "2.png"))
        self.assertIn(out, refusal(self, train.main, "--resume", "--out", out))

    def test_a_restarted_group_resumes_the_run_that_it_has_begun_alone(self):
        argv = (*self.toy, "--iters", 4, "--texture-iters", 0, "--save-every", 2)
        whole, _ = trained(*argv)
        stopped = killed(3, *argv)
        self.assertIn(stopped, refusal(self, train.main, *argv, "--out", stopped))
        with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1"):
            with mock.patch("os.getppid", return_value=-1):  # a group that did not begin it
                self.assertIn(stopped, refusal(self, train.main, *argv, "--out", stopped))
            trained(*argv, out=stopped)
            first, _ = trained(*argv, "--resume")  # failed before its first checkpoint
        self.assert_same_run(whole, stopped)
        self.assert_same_run(whole, first)


TOGETHER = """
def compared(model, *rest):
    loss = update(model, *rest)
    sums = [None, None]
    dist.all_gather_object(sums, [p.double().sum().item() for p in model.parameters()])
    print("alike" if sums[0] == sums[1] else "apart")
    return loss

def gradient(net, model, part):
    net.zero_grad(set_to_none=True)
    loss = upernet.losses(
        model(images[part], ["scene", "object"]),
        {"scene": scenes[part], "object": objects[part]},
        {},
    )
    sum(loss.values()).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}

datasets.join_processes()
patience = dist.distributed_c10d._get_default_store().timeout
assert patience.total_seconds() >= 3600, patience  # the others wait while the first scans
rank = dist.get_rank()
torch.manual_seed(0)
net = upernet.UPerNet({"scene": 5, "object": 7, "material": 3}, "resnet18", channels=8).eval()
images = torch.rand(4, 3, 64, 64)
scenes = torch.tensor([0, 1, 2, 3])
objects = torch.randint(7, (4, 16, 16))
whole = gradient(net, net, slice(4))
model = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
for name, value in gradient(net, model, slice(2 * rank, 2 * rank + 2)).items():
    assert (value is None) == (whole[name] is None) == name.startswith("heads.material"), name
    if value is not None:
        least = whole[name].abs().max().clamp(min=1e-3)
        assert (value - whole[name]).abs().max() <= 1e-5 * least, name
print("same gradient", file=sys.stderr)

datasets.join_processes = dist.barrier
train.update = compared
leave = dist.destroy_process_group
dist.destroy_process_group = dist.barrier  # evaluate.py in the same group
train.main()
dist.destroy_process_group = leave
evaluate.main([sys.argv[-1] + "/ckpt.pt", "--json", sys.argv[-1] + "/shared.json"])
"""
KILLED = """
calls = []
restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"

def failing(*arguments):
    calls.append(0)
    if not restarted and len(calls) == 6 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if restarted and len(calls) == 2 and dist.get_rank() == 0:
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which passes it on
    if restarted and len(calls) > 1:
        time.sleep(0.5)
    return update(*arguments)

train.update = failing
train.main()
"""
FINISHES = """
def no_evaluation(*_, **__):
    return {}

train.evaluate.evaluate = no_evaluation
train.main()
"""


class TestProcesses(Runs):
    """torchrun with two processes. The run `whole` is what others are compared with."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.argv = (*cls.toy, "--save-every", 2, "--texture-iters", 2, "--iters", 8, "--out")
        cls.whole = new_folder("whole")
        run = started(TOGETHER, *cls.argv, cls.whole, processes=2)
        cls.said, cls.err = run.communicate()

    def test_they_have_the_same_weights_and_one_prints(self):
        self.assertEqual((self.said.count("alike"), self.said.count("apart")), (10, 0), self.err)
        self.assertEqual(self.said.count("next: "), 1)
        self.assertEqual((log_lines(self.whole), checkpoint_of(self.whole)["stage"]), (10, "done"))

    def test_two_processes_of_two_have_the_gradient_of_one_of_four(self):
        """With batch norm in eval mode and every pixel labelled."""
        self.assertEqual(self.err.count("same gradient"), 2, self.err)

    def test_their_metrics_are_those_of_one(self):
        """No image is counted twice, in train.py and in evaluate.py."""
        alone = join(new_folder("json"), "alone.json")
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        checkpoint = join(self.whole, "ckpt.pt")
        self.assertEqual(command(evaluate.main, checkpoint, "--json", alone)[0], 0)
        for name in ("metrics.json", "shared.json"):
            self.assertEqual(read_json(self.whole, name), read_json(alone))

    def test_a_group_is_restarted_after_a_kill_and_stopped_and_resumed_by_hand(self):
        """By as many processes, with the same result, or by a single one."""
        out = new_folder("stopped")
        run = started(KILLED, *self.argv, out, processes=2, restarts=1)
        said, err = run.communicate()
        self.assertRegex(err, r"exitcode *: -9\b")  # torchrun's report of the one that was killed
        self.assertIn(f"torchrun --nproc_per_node=2 train.py --resume --out {out}", said, err)
        content = checkpoint_of(out)
        done = content["iteration"] + 8 * (content["stage"] == "texture")
        self.assertEqual(done, log_lines(out))
        self.assertIn(done, (6, 7, 8, 9))
        single = shutil.copytree(out, join(new_folder("copy"), "single"))
        trained("--resume", out=single)
        self.assertEqual((log_lines(single), checkpoint_of(single)["stage"]), (10, "done"))
        started(FINISHES, "--resume", "--out", out, processes=2).communicate()
        self.assert_same_run(self.whole, out)


# ---------------------------------------------------------------- data and weights of one's own
class TestOwnRuns(Runs):

    def test_few_images_train_and_from_two_on_one_validates(self):
        for count in (5, 2, 1):
            root = own_data(new_folder("few"), [[[1, 2] * 20] * 40] * count, classes="a\nb")
            out, _ = trained(*OWN, "--root", root, "--iters", 2, validates=True)
            content = checkpoint_of(out)
            validates = 1 if count > 1 else 0
            self.assertEqual(len(content["split"]["ade20k"]), validates)
            self.assertEqual(len(content["trained"]["ade20k"]), count - validates)
            self.assertEqual(os.path.exists(join(out, "metrics.json")), count > 1)
        before = Path(out, "ckpt.pt").read_bytes()
        self.assertIn("finished", trained("--resume", out=out)[1])
        self.assertEqual(Path(out, "ckpt.pt").read_bytes(), before)

    def test_sources_without_the_levels_need_not_be_there(self):
        root = coloured("a", "b", images=8)
        argv = (*OWN, "--data", "ade20k,os,dtd", "--root", root, "--levels", "object")
        out, _ = trained(*argv, "--iters", 0)
        status, said, err = command(evaluate.main, join(out, "ckpt.pt"))
        self.assertEqual(status, 0, err)
        self.assertIn("mean IoU", said)

    def test_a_class_that_only_validation_images_have_is_named(self):
        root = coloured("a", "b", "rare", "nowhere", images=5)
        for k in range(4):
            save([[1, 2] * 36] * 48, root, "annotations", "training", f"{k}.png")
        save([[1, 3] * 36] * 48, root, "annotations", "validation", "4.png")
        argv = (*OWN, "--root", root, "--split", "official", "--iters", 0)
        _, said, _ = command(train.main, *argv, "--out", new_folder("out"))
        self.assertRegex(said, r"(?m)^ade20k: .*validation images: rare$")

    def test_an_official_split_trains_on_no_test_folder(self):
        root = coloured("a", "b", images=5)
        for kind in ("images", "annotations"):
            folder = join(root, kind)
            os.renames(join(folder, "training", "0.png"), join(folder, "test", "0.png"))
        argv = (*OWN, "--root", root, "--iters", 0, "--out", new_folder("out"))
        err = refusal(self, train.main, *argv, "--split", "official")
        self.assertIn("images/test/0.png", err)
        status, _, err = command(train.main, *argv)  # balanced: of all folders
        self.assertEqual(status, 0, err)

    def test_left_and_right(self):
        """Masks whose left half is class 0. Without --no-flip half of the images are mirrored."""
        masks = [[[1] * 32 + [2] * 32] * 64] * 4
        root = own_data(new_folder("sides"), masks, classes="left hand\nRight hand")
        argv = (*OWN, "--root", root, "--iters", 8)
        for options, expected in ((["--no-flip"], {(0, 1)}), ([], {(0, 1), (1, 0)})):
            maps = torch.cat([batch["object"] for batch in batches_of(*argv, *options)])
            sides = {(row[0], row[-1]) for row in maps[:, 8].tolist()}
            self.assertEqual(sides, expected)
            _, said = trained(*argv, *options, "--iters", 0)
            is_told = re.search("left hand.*Right hand.*--no-flip", said) is not None
            self.assertEqual(is_told, not options)

    def test_names_that_the_terminal_cannot_show_end_neither_script(self):
        root = own_data(new_folder("names"), [[[1, 2] * 20] * 40] * 3, classes="猫\nсобака")
        out = new_folder("out")
        photo = save(noise(48, 64), out, "点.png")
        training = [*OWN, "--root", root, "--iters", 1, "--eval-every", 1, "--out", out]
        parsing = [join(out, "ckpt.pt"), "--photo", photo, "--pictures", out]
        for main, argv, name in ((train.main, training, "猫"), (evaluate.main, parsing, "点")):
            said = io.BytesIO()
            err = io.BytesIO()
            out_terminal = io.TextIOWrapper(said, encoding="cp1252")
            err_terminal = io.TextIOWrapper(err, encoding="cp1252")
            with contextlib.redirect_stdout(out_terminal), contextlib.redirect_stderr(err_terminal):
                main([str(argument) for argument in argv])
            out_terminal.flush()
            err_terminal.flush()
            self.assertIn(name.encode("ascii", "backslashreplace"), said.getvalue())
            self.assertEqual(err.getvalue(), b"")
        metrics = read_json(out, "metrics.json")
        self.assertEqual(set(metrics["object"]["iou"]), {"猫", "собака"})
        self.assertIn("点_object.png", os.listdir(out))


class TestStart(Runs):
    """--weights with a file. Runs of no iteration keep what they started with."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = coloured(*[f"thing {k}" for k in range(11)])
        network = ("--stem", "deep", "--no-head-conv", "--seed", 1)
        cls.out, _ = trained(*OWN, "--root", cls.root, *network, "--iters", 1)
        cls.theirs = checkpoint_of(cls.out)
        cls.path = join(cls.out, "ckpt.pt")

    def begun(self, *argv) -> dict:
        """The checkpoint of a run of no iteration."""
        out, self.said = trained(*argv, "--iters", 0)
        return checkpoint_of(out)

    def test_ours_brings_network_sizes_and_classifiers_by_name(self):
        data = ("--data", "ade20k", "--root", coloured("thing 7", "new", "thing 2", "thing 10"))
        fresh = self.begun(*OWN, *data, "--stem", "deep", "--no-head-conv")
        ours = self.begun(*data, "--weights", self.path)
        self.assertEqual(ours["network"], {**self.theirs["network"], "classes": {"object": 4}})
        self.assertEqual(ours["arguments"]["sizes"], [64])
        for name, value in ours["model"].items():
            expected = self.theirs["model"][name]
            if ".classifier." in name:
                rows = (expected[7], fresh["model"][name][1], expected[2], expected[10])
                expected = torch.stack(rows)
            self.assertTrue(torch.equal(value, expected), name)

        wider = self.begun(*data, "--weights", self.path, "--channels", 16)
        self.assertEqual(wider["network"], {**ours["network"], "channels": 16})
        for name, value in wider["model"].items():
            if name.startswith("backbone."):
                self.assertTrue(torch.equal(value, self.theirs["model"][name]), name)

    def test_of_a_loop_of_ones_own(self):
        """A file of network, its arguments and classes; without these it is refused."""
        path = join(new_folder("loop"), "net.pt")
        content = {key: self.theirs[key] for key in ("model", "network", "vocabulary")}
        argv = ("--data", "ade20k", "--root", self.root, "--sizes", 64, "--weights", path)
        torch.save(content, path)
        ours = self.begun(*argv)
        self.assertEqual(ours["network"]["classes"], self.theirs["network"]["classes"])
        for name, value in ours["model"].items():
            self.assertTrue(torch.equal(value, self.theirs["model"][name]), name)
        torch.save(content["model"], path)
        argv = (*argv, "--iters", 0, "--out", new_folder("out"))
        self.assertRegex(refusal(self, train.main, *argv), f"{path}.*vocabulary")

    def test_ours_brings_its_crops(self):
        data = ("--data", "ade20k", "--root", self.root)
        cropped, _ = trained(*OWN, *data, "--crop", 96, "--iters", 0)
        for options, expected in (
            ((), (96, 384, None)),
            (("--sizes", 64), (64, 1200, None)),
            (("--crop", 64), (64, 256, None)),
        ):
            ours = self.begun(*data, "--weights", join(cropped, "ckpt.pt"), *options)
            self.assertEqual(ours["network"]["test_size"], expected)

    def test_ours_keeps_no_classifier_without_a_name_in_common(self):
        data = ("--data", "ade20k", "--root", coloured("a", "b"), "--weights", self.path)
        key = "heads.object.classifier.weight"
        rows = self.begun(*data)["model"][key].flatten(1)[:, None]
        self.assertTrue((rows != self.theirs["model"][key].flatten(1)).all())

    def test_ours_brings_data_and_root_if_none_is_given(self):
        ours = self.begun("--weights", self.path)
        for key in ("data", "root", "sizes"):
            self.assertEqual(ours["arguments"][key], self.theirs["arguments"][key])
        self.assertIn(self.root, self.said)
        self.assertEqual(ours["split"], self.theirs["split"])
        self.assertNotIn("have trained", self.said)
        self.assertEqual(ours["trained"], self.theirs["trained"])

    def test_images_that_trained_it_do_not_validate_in_a_new_split(self):
        trained_by = set(self.theirs["trained"]["ade20k"])
        self.assertEqual(len(trained_by), 18)
        root = new_folder("more")
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        path = join(root, "split.json")
        os.remove(path)
        for copied in list(Path(root).rglob("*/*/*.png")):
            shutil.copy(copied, copied.with_stem(f"{copied.stem}b"))
        argv = ("--data", "ade20k", "--root", root, "--weights", self.path)
        ours = self.begun(*argv)
        validation = set(ours["split"]["ade20k"])
        self.assertEqual(len(validation), 4)
        self.assertFalse(validation & trained_by)
        self.assertEqual(len(ours["trained"]["ade20k"]), 36)
        # The images that its weights were trained on stay known, though they validate now.
        split = read_json(path)
        split["sources"]["ade20k"]["validation"] = sorted(trained_by)[:3]
        write(path, json.dumps(split))
        ours = self.begun(*argv)
        self.assertRegex(self.said, r"ade20k: 3 .*trained")
        self.assertEqual(len(ours["trained"]["ade20k"]), 40)
        stopped = killed(1, *argv, "--iters", 2, "--save-every", 1)
        trained("--resume", out=stopped)
        self.assertEqual(checkpoint_of(stopped)["trained"], ours["trained"])
        # Those of a source that is left out now, too.
        root = textures(new_folder("other"), train1=[f"a/{k}.png" for k in range(4)])
        argv = ("--data", "dtd", "--root", root, "--texture-iters", 0, "--weights")
        other = self.begun(*argv, join(stopped, "ckpt.pt"))
        self.assertEqual(other["trained"]["ade20k"], ours["trained"]["ade20k"])

    def test_mmsegmentations(self):
        network = {"classes": {"object": 3}, "backbone": "resnet18", "channels": 8}
        (path,), state = released_files("mmseg", 5, {"CLASSES": ["a", "b", "c"]}, **network)
        data = ("--data", "ade20k", "--root", coloured("new", "c"), "--weights", path)
        data = (*data, "--sizes", 64, "--workers", 0)
        ours = self.begun(*data)
        theirs, _ = upernet.load_mmseg(path)
        for key, value in theirs.network.items():
            if key not in ("classes", "test_size"):
                self.assertEqual(ours["network"][key], value)
        for key, value in state.items():
            loaded = ours["model"][key]
            if "classifier" in key:
                loaded, value = loaded[1], value[2]
            self.assertTrue(torch.equal(loaded, value), key)
        out, _ = trained(*data, "--iters", 2)
        self.assertEqual((log_lines(out), checkpoint_of(out)["network"]), (2, ours["network"]))

    @mock.patch.dict("resnet.BLOCKS", {18: (2, 2, 2, 2)})
    def test_a_backbone_as_most_are_saved(self):
        theirs = torchvision.models.resnet18().state_dict()
        path = join(new_folder("backbone"), "weights.pth")
        for under, prefix in (("", ""), ("model", "backbone."), ("state_dict", "module.backbone.")):
            state = {f"{prefix}{key}": value for key, value in theirs.items()}
            torch.save({under: state, "epoch": 3} if under else state, path)
            ours = self.begun(*OWN, "--root", self.root, "--weights", path)["model"]
            for key, value in theirs.items():
                if not key.startswith("fc."):
                    self.assertTrue(torch.equal(ours[f"backbone.{key}"], value), key)

    def test_weights_of_which_nothing_fits_are_refused_by_key(self):
        path = join(new_folder("other"), "other.pth")
        torch.save({"encoder.a.weight": torch.zeros(3)}, path)
        err = refusal(self, train.main, *OWN, "--root", self.root, "--weights", path)
        self.assertRegex(err, f"{re.escape(path)}.*encoder.a.weight")


# ---------------------------------------------------------------- mistakes
class RunsCode:
    """A pickled object that makes a folder when it is read."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestMistakes(Runs):
    """Each, or a hostile file, is one line on stderr that names it, and status 2."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.place = new_folder("mistakes")
        cls.begun, _ = trained(*cls.toy, "--iters", 1, "--texture-iters", 1)
        cls.checkpoint = join(cls.begun, "ckpt.pt")
        short = ("--iters", 0, "--texture-iters", 0)
        cls.new = (*cls.toy, *short, "--out", join(cls.place, "new"))

    def at(self, *names: str) -> str:
        return join(self.place, *names)

    def refused(self, main, name: str, *argv):
        with self.subTest(script=main.__module__, argv=argv):
            self.assertIn(name, refusal(self, main, *argv))

    def test_options_of_train(self):
        wrong = """--data ade --backbone vgg16 --weights nothing.pth --lr nan --batch-size 0
            --iters -3 --fpn 1 --seed 1e30 --sizes 64,x --max-size 1 --batch-size 1 --crop 33
            --device abacus --device meta --colour red --levels colour --levels part
            --min-images 100000""".split()
        for option, value in zip(wrong[::2], wrong[1::2]):
            name = "--min-" if option == "--min-images" else option
            self.refused(train.main, name, *self.new, option, value)
        self.refused(train.main, "ckpt.pt", *self.new, "--resume")
        self.refused(train.main, self.begun, *self.toy, "--out", self.begun)
        self.refused(train.main, "not a folder", *self.toy, "--out", self.checkpoint)
        self.refused(train.main, "--lr", "--out", self.begun, "--resume", "--lr", 5)
        self.refused(train.main, "--levels", *self.new, "--data", "os", "--levels", "scene")
        with mock.patch("resnet.load_imagenet", side_effect=OSError("no route to host")):
            self.refused(train.main, "--weights none", *self.new, "--weights", "imagenet")
        self.assertFalse(os.path.exists(self.at("new", "log.jsonl")))

    def test_options_of_the_other_scripts(self):
        ckpt = self.checkpoint
        missing = self.at("nowhere")
        released = ("--release", self.at("a"), self.at("b"))
        for name, *argv in (
            ("--release",),
            ("--release", ckpt, *released),
            ("--labels", *released),
            ("--labels", ckpt, "--labels", self.place),
            ("before the options", "--photo", self.at("x.jpg"), ckpt),
            (missing, missing),
            (self.place, self.place),
            ("--size", ckpt, "--size", "1e3"),
            (missing, ckpt, "--data", "dtd", "--root", missing),
            ("--json", ckpt, "--photo", self.at("x.jpg"), "--json", self.at("m.json")),
            (self.place, ckpt, "--levels", "scene", "--json", self.place),
        ):
            self.refused(evaluate.main, name, *argv)
        _, said, _ = command(evaluate.main, ckpt, "--levels", "scene", "--json", self.place)
        self.assertIn("top-1", said)  # the metrics are not lost
        self.refused(balance_split.main, "--fraction", *self.toy[:2], "--fraction", 2)
        self.refused(upernet.main, "--size", "--size", "large")

    def test_folders_and_tables(self):
        occupied = write(self.at("occupied"), "a file")
        os.makedirs(self.at("none", "ade20k", "images", "ADE"))
        write(self.at("old", "ade20k", "index_ade20k.mat"), "")
        masks = [np.ones((40, 40))] * 2
        own_data(self.at("words"), masks, objectInfo150="Idx Name\n1 wall\n")
        own_data(self.at("empty"), masks, classes="")
        for root, name in (
            ("occupied", "occupied"),
            ("none", "images/ADE"),
            ("old", "2021"),
            ("words", "objectInfo150.txt"),
            ("empty", "classes.txt"),
        ):
            self.refused(datasets.main, name, "--data", "ade20k", "--root", self.at(root))
        self.refused(datasets.main, "--data ade20k", "--root", self.at("words"))  # not the toy
        self.refused(datasets.main, "dtd", "--data", "dtd", "--root", self.at("words"))

        root = surfaces(new_folder("surfaces"), ["wood"], [columns(1)])
        argv = ("--data", "os", "--root", root)
        self.refused(datasets.main, occupied, *argv, "--cache", occupied)
        table = join(root, "os", "label-substance-colors.csv")
        for text in ("a,b\n1,2\n", "substance_id,red_color,substance_name\n1,inf,wood\n"):
            write(table, text)
            self.refused(datasets.main, table, *argv)
        os.remove(table)
        self.refused(datasets.main, table, *argv)

    def test_files_that_are_no_checkpoints_and_no_code_in_them_runs(self):
        """In the three places where a checkpoint is read."""
        good = checkpoint_of(self.begun)
        weight = "ppm.last.0.weight"
        sparse = good["model"][weight].to_sparse()
        scenes = good["vocabulary"]["scene"]
        ran = self.at("ran")
        files = {
            "half": Path(self.checkpoint).read_bytes()[:9999],
            "text": b"some text\n",
            "nothing": b"",
            "list": [1],
            "lacking": {"a": torch.zeros(3)},
            "code": {**good, "model": RunsCode(ran)},
            "sparse": {**good, "model": {**good["model"], weight: sparse}},
            "option": {**good, "network": {**good["network"], "colour": 3}},
            "huge": {**good, "network": {**good["network"], "channels": 10**9}},
            "module": {**good, "network": {**good["network"], "backbone": "os"}},
            "short": {**good, "vocabulary": {**good["vocabulary"], "scene": scenes[:-1]}},
            "numbers": {**good, "vocabulary": {**good["vocabulary"], "scene": [1] * len(scenes)}},
            "arguments": {**good, "arguments": []},
            "indices": {**good, "arguments": {**good["arguments"], "numbers": {"scene": [-1]}}},
            "split": {**good, "split": {"ade20k": 5}},
            "trained": {**good, "trained": {"ade20k": [5]}},
        }
        for name, content in files.items():
            path = self.at(name, "ckpt.pt")
            os.makedirs(self.at(name))
            if isinstance(content, bytes):
                Path(path).write_bytes(content)
            else:
                torch.save(content, path)
            self.refused(evaluate.main, path, path, "--levels", "scene")
            self.refused(train.main, path, "--resume", "--out", self.at(name))
            self.refused(train.main, path, *self.new, "--weights", path)
        self.assertFalse(os.path.exists(ran))

    def test_checkpoints_with_impossible_options(self):
        good = checkpoint_of(self.begun)
        for key, value in (("data", 5), ("root", ["a"]), ("allow_broken", torch.zeros(2))):
            out = new_folder("impossible")
            path = join(out, "ckpt.pt")
            torch.save({**good, "arguments": {**good["arguments"], key: value}}, path)
            self.refused(evaluate.main, path, path, "--levels", "scene")
            self.refused(train.main, path, "--resume", "--out", out)
        torch.save({**good, "arguments": {**good["arguments"], "sizes": [32, "x"]}}, path)
        self.refused(train.main, path, "--weights", path, "--out", self.at("new"))
        torch.save({**good, "arguments": {**good["arguments"], "amp": "x"}}, path)
        self.refused(train.main, path, "--resume", "--out", out)

    def test_photos_that_cannot_be_read_are_named_and_the_others_parsed(self):
        good = save(noise(50, 80), self.at("good.jpg"))
        save(np.zeros((300, 300)), self.at("bomb.png"))
        grey = np.linspace(0, 4095, 4000).reshape(50, 80)
        save(Image.fromarray(grey.astype(np.uint16)), self.at("twelve.png"))
        save(Image.fromarray(grey.astype(np.float32)), self.at("float.tiff"))
        Path(self.at("cut.jpg")).write_bytes(Path(good).read_bytes()[:-900])
        Path(self.at("words.jpg")).write_bytes(b"no picture")
        broken = ["gone.jpg", "bomb.png", "twelve.png", "float.tiff", "cut.jpg", "words.jpg"]
        out = self.at("pictures")
        argv = ("--photo", *map(self.at, broken), good, "--pictures", out)
        with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 20000):
            err = refusal(self, evaluate.main, self.checkpoint, *argv)
        for name in broken:
            self.assertIn(name, err)
        self.assertEqual({name.split("_")[0] for name in os.listdir(out)}, {"good"})

    def test_help_is_short(self):
        for script in (train, evaluate, balance_split, datasets, upernet):
            with mock.patch.dict(os.environ, COLUMNS="110"):
                status, said, _ = command(script.main, "--help")
            self.assertEqual(status, 0)
            self.assertLessEqual(said.count("\n"), 40, script.__name__)


# ---------------------------------------------------------------- real images
@unittest.skipUnless(os.path.isdir(join(SHARED, "data")), "the real samples are not here")
class TestRealSamples(Runs):
    def test_they_are_scanned_trained_on_and_evaluated(self):
        root = new_folder("real")
        ade = join("ADE20K_2021_17_01", "images", "ADE")
        sample = join(SHARED, "data", "ade20k_2021_sample", ade, "training")
        for side in ("training", "validation"):
            shutil.copytree(sample, join(root, "ade20k", ade, side))
        shutil.copytree(join(SHARED, "data", "dtd_sample"), join(root, "dtd"))
        argv = ["--data", "ade20k,dtd", "--root", root, "--min-images", 1, "--min-pixels", 1]
        argv += ["--min-part-images", 1, "--min-scene-images", 1]
        self.assertIn("ade20k: 6 images", succeeded(self, datasets.main, *argv))
        argv += ["--split", "official", "--backbone", "resnet18", "--channels", 16]
        argv += ["--weights", "none", "--workers", 0, "--sizes", "96"]
        out, _ = trained(*argv, "--iters", 8, "--texture-iters", 3, validates=True)
        vocabulary = checkpoint_of(out)["vocabulary"]
        self.assertEqual(vocabulary["scene"], ["street"])
        self.assertLessEqual({"wheel", "headlight", "windshield"}, set(vocabulary["part"]["car"]))
        losses = [line["loss"]["object"] for line in read_log(out)[:8]]
        self.assertLess(np.mean(losses[-4:]), np.mean(losses[:4]))
        metrics = read_json(out, "metrics.json")
        self.assertEqual(set(metrics), {"scene", "object", "part", "texture"})
        self.assertEqual(metrics["texture"]["n"], 20)


def main() -> int:
    """Runs the tests and closes with a line that counts them."""
    result = unittest.main(exit=False, argv=[sys.argv[0], "--buffer", *sys.argv[1:]]).result
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    skipped = len(result.skipped)
    passed = result.testsRun - failed - skipped
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
