"""The tests: `python test_upernet.py`, or pytest; those of a GPU: `python test_upernet.py -k cuda`.

Each compares with something independent: a plain loop, torchvision, numerical integration, the
answers of the authors' own networks.
"""

import atexit
import contextlib
import copy
import importlib.util
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
os.environ["OMP_NUM_THREADS"] = "1"  # networks this small are slower with more

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize, to_tensor

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
CONCEPTS = {
    "scene": ["kitchen", "street"],
    "object": ["wall", "car", "pot", "person"],
    "part": {"car": ["background", "wheel", "door"], "person": ["background", "head"]},
    "material": ["wood", "brick", "metal", "glass", "stone"],
    "texture": ["dotted", "banded", "grid"],
}
CLASSES = {"scene": 2, "object": 4, "part": {1: 3, 3: 2}, "material": 5, "texture": 3}

resnet.BLOCKS[18] = (1, 1, 1, 1)  # a small network; TestResNet has the real one
folder = tempfile.mkdtemp(prefix="upernet-test-")  # of all tests
atexit.register(shutil.rmtree, folder)


# ---------------------------------------------------------------- files and commands
def new_folder() -> str:
    """A new empty folder below the tests' one."""
    return tempfile.mkdtemp(dir=folder)


def toy_root() -> str:
    """A root whose toy has few images; made once."""
    root = join(folder, "small")
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
        depth = np.uint8 if np.max(picture) < 256 else np.uint16
        picture = Image.fromarray(np.asarray(picture).astype(depth))
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
        self.root = new_folder()
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


def own_data(*masks: np.ndarray, root: str = "", **files: str) -> str:
    """A folder of one's own data: images/training/<k>.jpg with these masks, every fifth in
    images/validation/, each number in a colour of its own; and text files such as
    classes="a\\nb"."""
    root = root or new_folder()
    for k, mask in enumerate(masks):
        side = "validation" if k % 5 == 4 else "training"
        colours = np.array(mask, int)[..., None] * (47, 89, 151) % 199
        save(colours + np.array(noise(*np.shape(mask))) // 6, root, "images", side, f"{k}.jpg")
        save(mask, root, "annotations", side, f"{k}.png")
    for name, text in files.items():
        write(join(root, f"{name}.txt"), text)
    return root


# ---------------------------------------------------------------- plain computations
def plain_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


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


def plain_logits(stages: list, weights: dict, fpn: int, fusion: bool) -> dict:
    """Figure 4 after the backbone, convolution by convolution, with table 2's options."""
    quarter, _, _, size = [stage.shape[2:] for stage in stages]
    p5 = stages[3]
    if "ppm.last.0.weight" in weights:
        maps = [p5]
        for k, bins in enumerate((1, 2, 3, 6)):
            y = plain_resize(plain_pool("prroi", p5, bins), size)
            maps.append(plain_block(weights, f"ppm.branches.{k}", y))
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


def assert_near(found: dict, expected: dict, tolerance: float = 1e-5):
    """Tensors by name, whose largest difference is such a fraction of the largest value."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(found[key].to(value), value, rtol=0, atol=atol)


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


@mock.patch.dict(resnet.BLOCKS, {18: (2, 2, 2, 2)})
class TestResNet(unittest.TestCase):
    def test_stages_are_torchvisions(self):
        for depth, output_stride, dilated in (
            (18, 32, None),
            (34, 32, None),
            (50, 32, None),
            (101, 32, None),
            (50, 16, [False, False, True]),
            (50, 8, [False, True, True]),
        ):
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
                expected = layers(x)
                stages = dict(zip(expected, ours(x), strict=True))
            self.assertEqual(ours.channels, [stage.shape[1] for stage in expected.values()])
            with self.subTest(depth=depth, output_stride=output_stride):
                assert_near(stages, expected, 1e-6)

    def test_basic_blocks_are_dilated_as_bottlenecks_are(self):
        """Which torchvision has not."""
        net = ResNet(18, output_stride=8)
        convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
        dilations = [conv.dilation[0] for conv in convs if conv.kernel_size == (3, 3)]
        self.assertEqual(dilations[-8:], [1, 2, 2, 2, 2, 4, 4, 4])  # of layer3 and layer4

    def test_imagenet_weights_are_torchvisions(self):
        theirs = torchvision.models.resnet18().state_dict()
        net = ResNet(18)
        download = "torchvision.models._api.load_state_dict_from_url"
        with mock.patch(download, return_value=theirs) as asked:
            load_imagenet(net)
        self.assertIn("resnet18", str(asked.call_args))
        for key, value in net.state_dict().items():
            self.assertTrue(torch.equal(value, theirs[key]), key)
        self.assertRaises(ValueError, load_imagenet, ResNet(18, "deep"))


# ---------------------------------------------------------------- the network
class Strided(nn.Module):
    """A backbone of somebody else's: every few pixels of the image."""

    channels = [3, 3, 3, 3]

    def __init__(self, *strides: int):
        super().__init__()
        self.strides = strides

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, ::stride, ::stride] for stride in self.strides]


class TestNetwork(unittest.TestCase):
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
        ran = []
        for name, module in net.named_modules():
            if re.fullmatch(r"ppm|fusion|fpn\.convs\.\d|heads\.\w+", name):
                module.register_forward_hook(lambda *_, name=name: ran.append(name))
        fused = ["ppm", "fpn.convs.2", "fpn.convs.1", "fpn.convs.0", "fusion"]
        for level, needed in (
            ("texture", []),
            ("scene", ["ppm"]),
            ("material", ["ppm", "fpn.convs.0"]),
            ("object", fused),
            ("part", fused),
        ):
            ran.clear()
            logits = net(images, levels=[level])
            self.assertEqual(sorted(ran), sorted([*needed, f"heads.{level}"]))
            self.assertEqual(logits.keys() - {"texture_map"}, {level})
            for key, value in logits.items():
                torch.testing.assert_close(value, together[key])

    def test_rows_of_table_2_against_the_network_written_out(self):
        images = torch.rand(2, 3, 75, 107)
        normalised = normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
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
                stages = net.backbone(normalised)
                expected = plain_logits(stages, net.state_dict(), fpn=fpn, fusion=fusion)
                logits = net(images)
                assert_near(logits, expected)
                self.assertEqual(isinstance(net.ppm, upernet.PPM), ppm)
                self.assertEqual(stages[3].shape[2], math.ceil(75 / stride))
                sum(value.sum() for value in logits.values()).backward()
                for name, p in net.named_parameters():
                    self.assertIsNotNone(p.grad, name)

    def test_another_backbone_has_four_maps_from_stride_4(self):
        images = torch.rand(1, 3, 64, 64)
        net = UPerNet(CLASSES, Strided(4, 8, 16, 32), channels=8).eval()
        self.assertEqual(net(images)["object"].shape, (1, 4, 16, 16))
        for strides in ([4, 8, 16], [2, 4, 8, 16]):
            net = UPerNet(CLASSES, Strided(*strides), channels=8).eval()
            with self.subTest(strides=strides), self.assertRaisesRegex(ValueError, "backbone"):
                net(images)

    def test_images_and_levels_that_it_takes_and_refuses(self):
        net = small_net()
        image = torch.rand(1, 3, 32, 32)
        self.assertTrue(net(image)["object"].isfinite().all())
        large = 255 * image
        for wrong in (image[0], large, large.byte(), -image, image[:, :1], image[:, :, :31]):
            with self.subTest(shape=wrong.shape), self.assertRaises(ValueError):
                net(wrong)
        self.assertRaisesRegex(ValueError, "scenery", net, image, ["scenery"])

    def test_texture_has_four_convolutions_and_sends_no_gradient_into_the_backbone(self):
        net = small_net().train()
        self.assertEqual(len(net.heads["texture"].conv), 4)
        logits = net(torch.rand(2, 3, 40, 70), levels=["texture"])
        logits["texture_map"].square().sum().backward()
        for name, p in net.named_parameters():
            self.assertEqual(p.grad is not None, name.startswith("heads.texture."), name)

    def test_arguments_that_it_refuses(self):
        for wrong in (
            {"classes": {}},
            {"classes": {"colour": 3}},
            {"backbone": "vgg16"},
            {"pool": "max"},
            {"fpn": 1},
            {"stem": "3x3"},
            {"output_stride": 4},
        ):
            arguments = {"classes": {"object": 3}, "backbone": "resnet18", **wrong}
            with self.subTest(**wrong), self.assertRaises(ValueError):
                UPerNet(**arguments)

    def test_initialisation(self):
        """Kaiming normal and biases of 1e-4, as released."""
        torch.manual_seed(0)
        net = UPerNet({"object": 50, "scene": 40, "texture": 30}, "resnet18", channels=64)
        del net.backbone
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                kaiming = math.sqrt(2 / module.weight[0].numel())
                self.assertAlmostEqual(module.weight.std().item() / kaiming, 1, delta=0.08)
            if isinstance(module, nn.BatchNorm2d):
                self.assertTrue((module.weight == 1).all())
                self.assertTrue((module.bias == 1e-4).all())


# ---------------------------------------------------------------- in somebody else's hands
class TestElsewhere(unittest.TestCase):
    def setUp(self):
        self.net = small_net()
        self.images = torch.rand(2, 3, 64, 96)

    def run_readme(self, with_packages: bool) -> None:
        """Runs the README's Python blocks, those that import these packages or the others."""
        readme = Path(HERE, "README.md").read_text(encoding="utf-8")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(new_folder())
        os.makedirs("runs/toy")
        shutil.copy(save_checkpoint(varied_net()), "runs/toy/ckpt.pt")
        Image.new("RGB", (400, 300), "green").save("a.jpg")
        examples = 0
        for example in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
            if with_packages != bool(re.search("^import (timm|onnxruntime)", example)):
                continue
            example = example.replace("512, 512", "64, 64")  # speed.py's images
            said = io.StringIO()
            with self.subTest(example), mock.patch.object(sys, "argv", ["speed.py", "ours"]):
                with contextlib.redirect_stdout(said):
                    exec(example, {})
            promised = re.findall(r"print\(.*# (.*)", example)
            for line, shapes in zip(said.getvalue().splitlines(), promised):
                self.assertEqual(re.findall(r"\d+", line), re.findall(r"\d+", shapes))
            examples += 1
        self.assertGreaterEqual(examples, 2)

    def test_examples_of_the_readme_run(self):
        self.run_readme(with_packages=False)

    def test_examples_of_the_readme_run_with_timm_and_onnx(self):
        for package in ("timm", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                self.skipTest(f"needs {package}")
        self.run_readme(with_packages=True)

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
            with torch.inference_mode():
                assert_near(folded(self.images), net(self.images))

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
                assert_near(exported(images), net(images))

    def test_compiled_values_and_gradients_at_several_sizes(self):
        torch.compiler.reset()
        net = small_net({"object": 7}, fpn=4)  # quicker to trace
        compiled = torch.compile(net, backend="eager")  # as traced, without a C++ compiler
        for size in ((64, 96), (75, 107)):
            images = torch.rand(2, 3, *size)
            logits = []
            gradients = []
            for network in (net, compiled):
                logits.append(network(images))
                loss = logits[-1]["object"].sum()
                gradients.append(dict(enumerate(torch.autograd.grad(loss, [*net.parameters()]))))
            assert_near(logits[1], logits[0])
            assert_near(gradients[1], gradients[0], 1e-3)

    @unittest.skipUnless(torch.cuda.is_available(), "no CUDA device")
    def test_on_cuda_as_on_the_cpu(self):
        exact = self.net(self.images)
        net = copy.deepcopy(self.net).cuda()
        images = self.images.cuda()
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            assert_near(net(images), exact, 1e-3)
            for amp in (torch.bfloat16, torch.float16):
                with torch.autocast("cuda", amp):
                    assert_near(net(images), exact, 0.1)


# ---------------------------------------------------------------- pooling and fusion
class TestPooling(unittest.TestCase):
    def test_branches_train_as_the_plain_line(self):
        """In training mode batch norm and the resize do not commute."""
        for pool in ("prroi", "adaptive", "pspnet"):
            for size in ((5, 7), (1, 4), (19, 2), (6, 38)):
                c5 = torch.randn(9, 6, 1, 1) + torch.rand(9, 6, *size)
                ppm = upernet.PPM(6, 4, pool)
                maps = [c5]
                for bins, (conv, norm, relu) in zip((1, 2, 3, 6), ppm.branches):
                    pooled = plain_pool(pool, c5, bins)
                    if pool == "pspnet":
                        maps.append(plain_resize(relu(norm(conv(pooled))), size))
                    else:
                        maps.append(relu(norm(conv(plain_resize(pooled, size)))))
                expected = ppm.last(torch.cat(maps, dim=1))
                with self.subTest(pool=pool, size=size):
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
            maps.append(torch.randn(n, channels, *size, dtype=dtype, requires_grad=True))
        return fusion, maps

    def test_is_the_plain_line_in_values_and_gradients(self):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            for n, height, width in ((1, 8, 8), (2, 24, 32), (3, 13, 19), (2, 1, 9), (1, 37, 5)):
                for training in (True, False):
                    fusion, maps = self.case(n, height, width, dtype)
                    fusion.train(training)
                    results = []
                    for way in (fusion, fusion.plain):
                        y = way(maps)
                        torch.manual_seed(1)
                        loss = (y * torch.randn_like(y)).sum()
                        variables = [*maps, *fusion.parameters()]
                        gradients = torch.autograd.grad(loss, variables)
                        results.append(dict(enumerate([y, *gradients])))
                    with self.subTest(dtype=dtype, size=(height, width), training=training):
                        assert_near(*results, tolerance)

    def test_bf16_is_as_near_to_float32_as_the_plain_line(self):
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
    def test_of_parts_is_the_plain_loop(self):
        torch.manual_seed(1)
        slices = {1: slice(0, 3), 4: slice(3, 5), 6: slice(5, 9)}
        logits = torch.randn(3, 9, 6, 7, dtype=torch.float16)  # computed in float32
        objects = torch.randint(-1, 8, (3, 6, 7))
        parts = torch.randint(0, 3, (3, 6, 7))
        parts[objects == 4] %= 2
        parts[objects == 6] = 0  # object 6 has no part in any image
        parts[1][objects[1] == 1] = 0  # and object 1 none in image 1: not valid there

        total = 0.0
        for index, channels in slices.items():
            values = []
            for n in range(3):
                inside = objects[n] == index
                labels = parts[n][inside]
                if (labels > 0).any():
                    y = logits[n, channels][:, inside].T.double()
                    values.append(F.cross_entropy(y, labels, reduction="none"))
            if values:
                total += torch.cat(values).mean().item()
        self.assertGreater(total, 0)
        labels = {"object": objects, "part": parts}
        found = upernet.losses({"part": logits}, labels, slices)["part"]
        self.assertAlmostEqual(found.item(), total, places=4)

    def test_others_are_the_mean_over_what_is_labelled(self):
        y = torch.randn(2, 5, 4, 6)
        half = y.half()  # computed in float32
        pixels = torch.randint(-1, 5, (2, 4, 6), dtype=torch.int16)
        tags = torch.tensor([2, -1], dtype=torch.int16)
        logits = {"object": y, "material": half, "texture_map": y, "scene": y[:, :, 0, 0]}
        labels = {"object": pixels, "material": pixels, "texture": tags, "scene": tags}
        everywhere = torch.full((1, 4, 6), 2)
        expected = {
            "object": F.cross_entropy(y, pixels.long(), ignore_index=-1),
            "material": F.cross_entropy(half.float(), pixels.long(), ignore_index=-1),
            "texture": F.cross_entropy(y[:1], everywhere),
            "scene": F.cross_entropy(y[:1, :, 0, 0], everywhere[:, 0, 0]),
        }
        found = upernet.losses(logits, labels, {})
        self.assertEqual(found.keys(), expected.keys())
        for level, value in expected.items():
            torch.testing.assert_close(found[level], value, rtol=0, atol=5e-6)

    def test_levels_without_a_label_cost_nothing_and_stay_in_the_graph(self):
        net = small_net({"scene": 3, "object": 4, "part": {1: 3}}).train()
        nothing = -torch.ones(2, 16, 16)
        labels = {"scene": nothing[:, 0, 0], "object": nothing, "part": 0 * nothing}
        found = upernet.losses(net(torch.rand(2, 3, 64, 64)), labels, net.part_slices)
        self.assertEqual(found, {"scene": 0, "object": 0, "part": 0})
        sum(found.values()).backward()
        for name, p in net.named_parameters():
            self.assertFalse(p.grad.any(), name)


# ---------------------------------------------------------------- photos
# A pixel of three times 16 bits, which Pillow reads and cannot write.
DEEP_PNG = (
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d"
    "0000000b4944415478da6360040300001c00072c7d16a40000000049454e44ae426082"
)


class TestPhoto(unittest.TestCase):
    def test_alpha_is_ignored(self):
        photo = noise(24, 32)
        transparent = photo.convert("RGBA")
        transparent.putalpha(0)
        assert_array_equal(upernet.rgb_photo(transparent), photo)

    def test_more_than_8_bits_a_channel_are_refused(self):
        photo = Image.open(io.BytesIO(bytes.fromhex(DEEP_PNG)))
        self.assertRaises(ValueError, upernet.rgb_photo, photo)


# ---------------------------------------------------------------- our checkpoints
class TestCheckpoint(unittest.TestCase):
    def test_holds_a_network_and_its_vocabulary(self):
        options = {"head_conv": False, "pool": "adaptive", "fpn": 3, "stem": "v1c"}
        for wanted in (options, {"ppm": False, "output_stride": 16}, {"fusion": False}):
            net = small_net(**wanted)
            self.assertEqual(net.test_size, (450, 1200, None))
            net.test_size = (300, 700, 8)
            twin, vocabulary = upernet.load(save_checkpoint(net))
            self.assertEqual(vocabulary, CONCEPTS)
            self.assertEqual(twin.network, net.network)
            self.assertEqual((twin.test_size, twin.training), ((300, 700, 8), False))
            images = torch.rand(1, 3, 64, 96)
            torch.testing.assert_close(twin(images), net(images))

    def test_two_files_alone_load_it_and_parse_a_photo(self):
        """Without torchvision; a module as the backbone needs no resnet.py either."""
        place = new_folder()
        for name in ("upernet.py", "resnet.py"):
            shutil.copy(join(HERE, name), place)
        source = Path(HERE, "upernet.py").read_text(encoding="utf-8")
        self.assertNotRegex(source, r"(?m)^(import|from) (numpy|PIL)")
        code = """
import sys
sys.modules["torchvision"] = sys.modules["resnet"] = None
import PIL.Image, torch, upernet

class Backbone(torch.nn.Module):
    channels = [3, 3, 3, 3]
    def forward(self, x):
        return [x[:, :, ::s, ::s] for s in (4, 8, 16, 32)]

net = upernet.UPerNet({"object": 5}, Backbone(), channels=8).eval()
print(net(torch.rand(1, 3, 64, 64))["object"].shape)
del sys.modules["resnet"]
import resnet
resnet.BLOCKS[18] = (1, 1, 1, 1)
net, vocabulary = upernet.load(sys.argv[1])
parsed = upernet.parse(net, PIL.Image.new("RGB", (60, 50)))
print(parsed["object"].shape, parsed["part"].shape, parsed["scene"].shape)
"""
        python = [sys.executable, "-c", code, save_checkpoint(small_net())]
        environment = {**os.environ, "PYTHONPATH": place}
        run = subprocess.run(python, cwd=place, env=environment, capture_output=True, text=True)
        expected = "torch.Size([1, 5, 16, 16])\n(50, 60) (50, 60) (2,)\n"
        self.assertEqual(run.stdout, expected, run.stderr)

    def test_what_does_not_fit_is_named(self):
        net = small_net()
        model = net.state_dict()
        key = "heads.object.classifier.weight"
        without = {name: value for name, value in model.items() if name != key}
        for wrong, named in (
            ({"best": np.float64(1)}, r"numpy\S*\.scalar"),  # no tensor: could run code
            ({"model": without}, key),
            ({"model": {**model, key: model[key][:-1]}}, key),
            ({"model": {**model, "heads.colour.weight": model[key]}}, "heads.colour.weight"),
            ({"vocabulary": {"object": ["wall"]}}, "object"),
            ({"vocabulary": {"object": ["wall"], "part": {3: ["background"]}}}, "vocabulary"),
        ):
            path = save_checkpoint(net, **wrong)
            with self.subTest(named), self.assertRaisesRegex(ValueError, named) as caught:
                upernet.load(path)
            self.assertIn(path, str(caught.exception))


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
        name = key
        for pattern, replacement in KEYS[release].items():
            name = re.sub(f"^{pattern}", replacement, name)
        ours[key] = stand_in(name, tuple(value.shape), seed)
        content = encoder if key.startswith("backbone.") else decoder
        content[name] = ours[key]
        if name.endswith(".running_mean") and release != "mmseg":
            for own in ("_tmp_running_mean", "_tmp_running_var", "_running_iter"):
                # Their synchronised batch norm's own sums.
                content[name.replace("running_mean", own)] = ours[key]
    files = {"encoder.pth": encoder, "decoder.pth": decoder}
    if release == "mmseg":
        state = {**encoder, **decoder, "auxiliary_head.convs.0.bn.weight": torch.ones(9)}
        files = {"upernet.pth": {"meta": meta, "state_dict": state}}
    place = new_folder()
    for name, content in files.items():
        torch.save(content, join(place, name))
    return [join(place, name) for name in files], ours


def class_tables(place: str) -> str:
    """Tables in the format of the authors' joint_dataset, with their numbers of classes and names
    of our own."""
    for level in ("scene", "object", "material"):
        rows = ["label,name"]
        rows.extend(f"{k},{level} {k}" for k in range(COUNTS[level]))
        write(join(place, f"{level}.csv"), "\n".join(rows))
    rows = ["object_label,object_name,part_labels,part_names"]
    counts = [*(77 * [5]), 42]  # 427 channels, backgrounds counted
    for k, count in enumerate(counts, start=1):
        names = ";".join(f"part {p}" for p in range(count))
        rows.append(f"{k},object {k},,{names}")
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
        cls.table = write(join(new_folder(), "object150.csv"), "\n".join(rows))
        cls.tables = class_tables(new_folder())
        cls.files = {}
        for release, seed in SEEDS.items():
            cls.files[release], _ = released_files(release, seed)
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

    @unittest.skipUnless(os.path.isdir(SHARED), "no recorded keys here")
    def test_stand_ins_have_the_keys_of_the_released_files(self):
        folders = {"paper": "upp_release", "ade20k": "mit_release", "mmseg": "mmseg_release"}
        for release, name in folders.items():
            keys = read_json(SHARED, name, "keys_resnet50.json")["keys"]
            expected = {*keys.get("encoder", keys), *keys.get("decoder", {})}
            found = set()
            for path in self.files[release]:
                content = torch.load(path, weights_only=True)
                found.update(content.get("state_dict", content))
            different = [key for key in found ^ expected if "auxiliary_head" not in key]
            self.assertEqual(different, [])

    def test_sizes_and_classes(self):
        sizes = {release: net.test_size for release, (net, _) in self.networks.items()}
        expected = {"paper": (450, 1000, 8), "ade20k": (450, 1000, 32), "mmseg": (512, 2048, 1)}
        self.assertEqual(sizes, expected)  # short side, longest side, multiple
        net, names = self.networks["paper"]
        self.assertEqual(net.part_slices[2], slice(5, 10))
        counts = {level: len(of_level) for level, of_level in names.items()}
        self.assertEqual(counts, {**COUNTS, "part": 78})
        first = [names[level][0] for level in ("scene", "object", "material")]
        self.assertEqual(first, ["scene 0", "background", "background"])
        self.assertEqual(names["part"]["object 78"][:3], ["background", "part 1", "part 2"])
        objects = self.networks["ade20k"][1]["object"]
        self.assertEqual(objects[0], "thing 1")
        self.assertEqual(len(set(objects)), 150)  # although two begin with "screen"

    def test_wrong_and_swapped_files_and_tables(self):
        encoder, decoder = self.files["paper"]
        place = new_folder()
        state = torch.load(decoder, weights_only=True)
        del state["fpn_in.1.0.weight"]
        torch.save(state, join(place, "damaged.pth"))
        short = write(join(place, "short.csv"), "Idx,Name\n1,wall\n")
        for named, *files in (
            (decoder, decoder, encoder, self.tables),
            ("nothing.pth", "nothing.pth", decoder, self.tables),
            ("fpn.laterals.1.0.weight", encoder, join(place, "damaged.pth"), self.tables),
            (self.table, encoder, decoder, self.table),
            (short, *self.files["ade20k"], short),
        ):
            with self.subTest(named), self.assertRaisesRegex(ValueError, re.escape(named)):
                upernet.load_release(*files)


class TestMmseg(unittest.TestCase):
    """Files of mmsegmentation's; what its network answers is in TestRelease."""

    def file(self, meta: dict = {}, backbone="resnet18") -> str:
        network = {"backbone": backbone, "channels": 8, "classes": {"object": 3}}
        return released_files("mmseg", 1, meta, **network)[0][0]

    def test_names_of_the_classes(self):
        names = ["wall", "sky, blue", "tree"]  # whole: a comma is part of the name
        for meta, given, expected in (
            ({"CLASSES": tuple(names)}, None, names),
            ({"dataset_meta": {"classes": names}}, None, names),
            ({"CLASSES": names}, ["a", "b", "c"], ["a", "b", "c"]),
            ({"CLASSES": ["wall", "sky", "wall"]}, None, ["wall (1)", "sky", "wall (3)"]),
            ({"config": "align_corners=False"}, None, ["class 1", "class 2", "class 3"]),
        ):
            _, vocabulary = upernet.load_mmseg(self.file(meta), given)
            self.assertEqual(vocabulary, {"object": expected})

    def test_refused_files(self):
        aligned = "decode_head=dict(type='UPerHead', align_corners = True)"  # its 769x769 networks
        for path, names in (
            (self.file({"config": aligned}), None),
            (self.file({"cfg": aligned}), None),
            (self.file(), ["a"]),
            (self.file(backbone=Strided(4, 8, 16, 32)), None),
        ):
            with self.subTest(path), self.assertRaisesRegex(ValueError, re.escape(path)):
                upernet.load_mmseg(path, names)
        path = self.file()
        self.assertRaisesRegex(ValueError, re.escape(path), upernet.load, path)


def scanned(root: str, source: str = "ade20k") -> tuple[datasets.Index, str]:
    """(index, stderr) of a scan with its cache below `root`."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        index = datasets.scan(root, source, join(root, ".cache"))
    return index, err.getvalue()


def vocabulary_of(index: datasets.Index, **minima) -> dict:
    """All classes, but for those below the thresholds."""
    thresholds = {**dict.fromkeys(datasets.THRESHOLDS, 1), **minima}
    return datasets.build_vocabulary({index.source: index}, thresholds)


def source_of(root: str, source: str = "ade20k", **options) -> datasets.Source:
    """A source with all of its classes."""
    index, _ = scanned(root, source)
    return datasets.Source(index, vocabulary_of(index), cache=join(root, ".cache"), **options)


def succeeded(main, *argv) -> str:
    """What a command printed that had nothing to complain about."""
    status, said, err = command(main, *argv)
    assert (status, err) == (0, ""), f"status {status}: {err}"
    return said


def refused(named: str, main, *argv):
    """Asserts that a command ends with status 2 and one line on stderr, which has `named` in it."""
    status, _, err = command(main, *argv)
    assert (status, err.count("\n")) == (2, 1), f"{argv}: status {status}: {err}"
    assert re.search(named, err), f"{argv}: no {named} in {err}"


def scan_refused(named: str, root: str, data: str = "ade20k"):
    refused(named, datasets.main, "--data", data, "--root", root)


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


# Substances and what they are merged to; Brick, the last, will be in one image alone.
MATERIALS = """Concrete: stone
Stone: stone
Plastic - clear: plastic
Plastic - opaque: plastic
Granite/Marble: polished stone
Carpet/Rug: carpet
Fabric/Cloth: fabric
Paper/Tissue: paper
Rubber/Latex: rubber/latex
Sky: -
Wood-painted: -
Brick: -"""


class TestVocabulary(unittest.TestCase):
    def test_objects_and_scenes_after_merging(self):
        """Objects need images and pixels, scenes images; names in UTF-8 or Latin-1."""
        names = {7: "voiture à cheval, auto", 8: "voiture à chevals", 9: "sky", 10: "dot"}
        scenes = [["outdoor", "urban", "Street"], ["street"], ["indoor", "misc"], [], ["attic"]]
        ade = Ade()
        for k, scene in enumerate(scenes):
            objects = np.full((40, 40), 300)
            objects[:10] = 9 if k < 2 else 0  # sky in two images
            objects[10:20] = 7 if k % 2 else 8  # together 2000 pixels in five
            objects[39, 39] = 10  # five pixels of dot
            stem = ade.add(objects, {**names, 300: "wall"}, scene)
        text = Path(f"{stem}.json").read_text(encoding="utf-8")
        write(f"{stem}.json", text, "latin-1")
        index = ade.index()
        self.assertEqual(index.tags, ["street", "street", "", "", "attic"])
        vocabulary = vocabulary_of(index, min_images=5, min_pixels=2000, min_scene_images=2)
        expected = {"scene": ["street"], "object": ["wall", "voiture à cheval"]}
        self.assertEqual(vocabulary, expected)
        self.assertEqual(datasets.Source(index, vocabulary).tags, [0, 0, -1, -1, -1])

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
        vocabulary = vocabulary_of(index, min_part_images=2)
        expected = {"car": ["background", "wheel"], "house": ["background", "door"]}
        self.assertEqual(vocabulary["part"], expected)
        part = datasets.Source(index, vocabulary).labels(0)["part"]  # no car's door
        assert_array_equal(part, columns(1, 0, 1, 0))
        self.assertEqual(vocabulary_of(index)["part"]["car"], ["background", "wheel", "door"])

    def test_opensurfaces_merges(self):
        merged = {}
        for row in MATERIALS.splitlines():
            substance, material = row.split(": ")
            merged[substance] = material
        red = np.ones((60, 1), int) * (np.arange(65) // 5)  # not of the photo's size
        root = surfaces(new_folder(), list(merged), [red, red * (red < 12)])
        save(noise(48, 64), root, "os", "photos", "without labels.jpg")
        index, err = scanned(root, "os")
        self.assertEqual(err, "")
        vocabulary = vocabulary_of(index, min_images=2)
        materials = sorted(set(merged.values()) - {"-"})
        self.assertEqual(vocabulary, {"material": materials})
        source = datasets.Source(index, vocabulary)
        self.assertEqual(source.training, [0, 1])
        labels = source.labels(0)["material"]
        names = np.array(["-", *merged.values()])[red]
        assert_array_equal(np.array([*materials, "-"])[labels], names)


# Another data set, as a reader might add it. Nothing else has to change.
CITYSCAPES_NAMES = (
    "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car "
    "truck bus train motorcycle bicycle"
).split()
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)  # of 34


def cityscapes_entries(folder, paths):
    """leftImg8bit/SIDE/CITY/NAME_leftImg8bit.png with gtFine/SIDE/CITY/NAME_gtFine_labelIds.png."""
    entries = []
    for path in paths:
        if path.endswith("_leftImg8bit.png"):
            labels = path.replace("_leftImg8bit", "_gtFine_labelIds")
            labels = labels.replace("leftImg8bit", "gtFine")
            side = datasets.side_of(path.split("/")[1])
            entries.append(datasets.Entry(path, side, labels=labels))
    return entries


def cityscapes_numbers(picture):
    return np.asarray(picture).astype(np.int32)


def cityscapes_table(folder, numbers):
    return dict(zip(CITYSCAPES_IDS, CITYSCAPES_NAMES))


def cityscapes_names(index):
    return {"object": index.names}


CITYSCAPES = datasets.DataSet(
    name="cityscapes",
    source="cityscapes",
    folders=("cityscapes", "cityscapes/*"),
    marker="leftImg8bit",
    contents=("leftImg8bit", "gtFine"),
    levels=("object",),
    map_level="object",
    entries=cityscapes_entries,
    numbers=cityscapes_numbers,
    table=cityscapes_table,
    names_by_level=cityscapes_names,
    void=tuple(set(range(34)) - set(CITYSCAPES_IDS)),
    fixed_table=True,
)


@mock.patch("datasets.DATA_SETS", [*datasets.DATA_SETS, CITYSCAPES])
class TestAnotherDataSet(unittest.TestCase):
    SIDES = ("train", "train", "val", "test")

    def cityscapes(self, *numbers: int, sides: tuple = SIDES) -> str:
        """A root with an image of each of the sides, its mask of these numbers."""
        root = new_folder()
        for k, side in enumerate(sides):
            photo = f"cityscapes/leftImg8bit/{side}/aachen/{k}_leftImg8bit.png"
            save(np.full((40, 10 * len(numbers), 3), 50 * k), root, photo)
            labels = f"cityscapes/gtFine/{side}/aachen/{k}_gtFine_labelIds.png"
            save(columns(*numbers), root, labels)
        return root

    def training(self, root: str, out: str, *options) -> tuple:
        argv = (*OWN, "--data", "cityscapes", "--root", root, "--out", out)
        return command(train.main, *argv, "--split", "official", *options)

    def test_trains_with_its_own_table_and_split(self):
        root = self.cityscapes(0, 4, 7, 11, 26, 33)
        index, err = scanned(root, "cityscapes")
        self.assertEqual(err, "")
        labels = source_of(root, "cityscapes").labels(0)["object"]
        assert_array_equal(labels, columns(-1, -1, 0, 2, 13, 18))
        out = new_folder()
        status, _, err = self.training(root, out, "--iters", 1)
        self.assertEqual(status, 0, err)
        checkpoint = checkpoint_of(out)
        self.assertEqual(checkpoint["vocabulary"], {"object": CITYSCAPES_NAMES})
        _, *training, validation = sorted(index.images)  # the first is of test/
        self.assertEqual(checkpoint["trained"], {"cityscapes": training})
        self.assertEqual(checkpoint["split"], {"cityscapes": [validation]})

    def test_gets_no_advice_that_is_meant_for_ones_own_data(self):
        roots = [
            self.cityscapes(0, 4, 7, 11, 99),
            self.cityscapes(0, 4),  # no class
            self.cityscapes(0, 7),  # a single one
            self.cityscapes(0, 7, 8, sides=("train", "test")),
            new_folder(),
        ]
        for root in roots:
            scan = command(datasets.main, "--data", "cityscapes", "--root", root)
            run = self.training(root, new_folder(), "--iters", 0)
            self.assertEqual(run[0], 0 if root == roots[0] else 2, run)
            advice = r"classes\.txt|images/validation/|start at 0"
            self.assertNotRegex("".join([*scan[1:], *run[1:]]), advice)

    def test_two_sources_of_one_level_are_refused(self):
        root = own_data(columns(1, 2), root=self.cityscapes(7, 8))
        scan_refused("ade20k.*cityscapes", root, "ade20k,cityscapes")


class TestScan(unittest.TestCase):
    WALL = np.full((40, 40), 5)

    def test_broken_files_of_ade20k(self):
        wrong_object = '{"annotation": {"scene": [], "object": [{"name": "wall"}]}}'
        for ending, content in (
            (".jpg", "no picture"),
            ("_seg.png", "missing"),
            ("_seg.png", "other size"),
            ("_parts_1.png", "no picture"),
            ("_parts_1.png", "other size"),
            (".json", "{"),
            (".json", wrong_object),
        ):
            ade = Ade()
            path = ade.add(self.WALL, {5: "wall"}, ["street"], 0 * self.WALL) + ending
            if content == "missing":
                os.remove(path)
            elif content == "other size":
                ade.save_numbers(self.WALL[:20], path)
            else:
                write(path, content)
            with self.subTest(ending=ending, content=content):
                scan_refused(f" {os.path.relpath(path, ade.folder)}: ", ade.root)

    def test_broken_masks(self):
        mask = Image.fromarray(columns(0, 1, 2).astype(np.uint8))
        grey = mask.copy()
        grey.putpalette([0, 0, 0, 100, 100, 100, 200, 200, 200])  # 0, 1, 2 or 0, 100, 200?
        coloured = mask.convert("RGB")
        coloured.putpixel((0, 0), (1, 200, 0))
        pages = {"save_all": True, "append_images": [mask]}
        for name, picture, options in (
            ("0.jpg", mask, {}),
            ("0.png", coloured, {}),
            ("0.png", grey, {}),
            ("0.gif", grey, {}),
            ("0.png", mask.resize((30, 20)), {}),
            ("0.tif", mask.convert("F"), {}),
            ("0.tif", mask, pages),
        ):
            root = own_data(columns(0, 1, 2))
            folder = join(root, "annotations", "training")
            os.remove(join(folder, "0.png"))
            picture.save(join(folder, name), **options)
            with self.subTest(name=name, mode=picture.mode):
                scan_refused(f" annotations/training/{name}: ", root)

    def test_two_masks_of_one_name_are_refused(self):
        root = own_data(columns(1, 2))
        save(columns(1, 2), root, "annotations", "training", "0.tif")
        scan_refused("annotations/training/0.png .*annotations/training/0.tif", root)

    def test_one_broken_image_in_twenty_is_set_aside(self):
        ade = Ade()
        first, second, *_ = [ade.add(self.WALL, {5: "wall"}, ["street"]) for _ in range(20)]
        os.remove(f"{first}_seg.png")
        index, err = scanned(ade.root)
        self.assertEqual(len(index.images), 19)
        _, said, _ = command(datasets.main, "--data", "ade20k", "--root", ade.root)
        os.remove(f"{second}_seg.png")
        scan_refused("ADE_train_00000000_seg.png", ade.root)
        for text in (err, said):
            self.assertIn("ADE_train_00000000_seg.png", text)

    def test_parts_count_in_labelled_objects_and_unknown_numbers_are_reported(self):
        ade = Ade()
        names = {5: "car", 6: "wheel"}
        ade.add(columns(0, 5, 99, 5), names, ["street"], columns(6, 6, 6, 798))
        index, err = scanned(ade.root)
        whole = [[0, 0, 0, 400], [0, 5, 0, 800], [0, 99, 0, 400]]
        parts = [[0, 5, 6, 400], [0, 5, 798, 400], [0, 99, 6, 400]]
        self.assertEqual(index.pixels.tolist(), whole + parts)
        self.assertEqual(re.findall(r"\d+", err.split(":")[-1]), ["99", "798"])

    def test_opens_nothing_again_until_something_changes(self):
        ade = Ade()
        stem = ade.add(self.WALL, {5: "wall"}, ["street"])
        self.assertEqual(ade.index().names, {5: "wall"})
        photo = Path(f"{stem}.jpg")
        stat = photo.stat()
        photo.write_bytes(bytes(stat.st_size))  # no photo, of the same size and time
        os.utime(photo, ns=(0, stat.st_mtime_ns))
        self.assertEqual(ade.index().names, {5: "wall"})
        ade.add(self.WALL + 1, {6: "sky"}, ["street"])
        photo.unlink()
        self.assertEqual(ade.index().names, {6: "sky"})
        (path,) = Path(ade.root, ".cache").glob("ade20k*")
        path.write_bytes(path.read_bytes()[:999])  # damaged
        self.assertEqual(ade.index().names, {6: "sky"})
        self.assertEqual(scanned(ade.folder)[0].names, {6: "sky"})  # it may be the root itself

    def test_other_layouts_are_told_what_to_rename(self):
        for layout in ("masks", "ade20k/labels", "leftImg8bit", "ade20k/JPEGImages"):
            root = new_folder()
            os.makedirs(join(root, layout))
            advice = f"{os.path.basename(layout)}.*annotations/"
            scan_refused(advice, root)


class TestPhotos(unittest.TestCase):
    def test_endings(self):
        root = new_folder()
        names = ["a.jpg", "b.JPEG", "c.png", "d.webp", "e.tif", "f.TIFF", "g.bmp"]
        for name in names:
            save(np.full((40, 20, 3), 90), root, "images", name)
            save(columns(1, 2), root, "annotations", f"{name[0]}.PNG")
        source = source_of(root)
        self.assertEqual(source.index.images, [f"images/{name}" for name in names])
        for i in range(len(names)):
            self.assertLess(abs(np.asarray(source.photo(i), int) - 90).max(), 3)
            assert_array_equal(source.labels(i)["object"], columns(0, 1))

    def test_of_more_than_8_bits_a_channel_are_broken(self):
        for mode, name in (("I;16", "0.png"), ("I", "0.tif"), ("F", "0.tif")):
            root = own_data(columns(1, 2))
            os.remove(join(root, "images", "training", "0.jpg"))
            save(Image.new(mode, (20, 40)), root, "images", "training", name)
            scan_refused(f" images/training/{name}: .*bits", root)

    def test_are_turned_as_their_exif_data_say(self):
        picture = np.zeros((30, 40, 3), np.uint8)
        picture[:, :20] = 255  # light on the left: once it is turned, on top
        photo = Image.fromarray(picture)
        photo.getexif()[0x0112] = 6  # a quarter to the right
        for ending in ("jpg", "png", "webp", "tif"):
            root = own_data(columns(1, 2, 2))
            folder = join(root, "images", "training")
            os.remove(join(folder, "0.jpg"))
            photo.save(join(folder, f"0.{ending}"), exif=photo.getexif())
            source = source_of(root)
            self.assertEqual(source.index.sizes.tolist(), [[40, 30]])
            shown = np.asarray(source.photo(0, (15, 20)))
            self.assertEqual(shown.shape, (40, 30, 3))
            self.assertGreater(shown[:18].min(), 200)
            self.assertLess(shown[22:].max(), 50)


VOC_PALETTE = bytes.fromhex("000000800000008000808000000080800080008080808080")


class TestOwnData(unittest.TestCase):
    MASK = columns(1, 1, 2, 0)

    def assert_labels(self, root: str, expected: np.ndarray, i: int = 0):
        assert_array_equal(source_of(root).labels(i)["object"], expected)

    def test_lies_in_the_root_in_ade20k_or_one_folder_down(self):
        for place in ("", "ade20k", "ade20k/mine"):
            root = new_folder()
            top = own_data(self.MASK, root=join(root, place))
            self.assertTrue(os.path.samefile(scanned(root)[0].folder, top))
            self.assert_labels(root, self.MASK - 1)
        other = own_data(self.MASK, root=join(root, "ade20k", "yours"))
        scan_refused(f"{top}.*{other}", root)

    def test_sides_and_scenes(self):
        root = own_data(self.MASK, self.MASK, sceneCategories="0 misc\n1 Street\n")
        for name in ("images", "annotations"):
            shutil.copytree(join(root, name, "training"), join(root, name, "val2017"))
        index, _ = scanned(root)
        self.assertEqual(index.tags, ["", "street", "", "street"])
        self.assertEqual(index.official, ["train", "train", "val", "val"])
        vocabulary = vocabulary_of(index, min_images=50, min_pixels=10**6, min_scene_images=2)
        self.assertEqual(vocabulary, {"scene": ["street"], "object": ["class 1", "class 2"]})
        sides = [datasets.side_of(name) for name in ("train2017", "valid", "dev", "test", "more")]
        self.assertEqual(sides, ["train", "val", "val", "test", ""])

    def test_images_without_a_label_neither_train_nor_validate(self):
        masks = [self.MASK, 0 * self.MASK, columns(9, 255), self.MASK, 0 * self.MASK]
        tables = {"classes": "sea\nland\n", "sceneCategories": "4 street\n"}
        index, _ = scanned(own_data(*masks, **tables))
        source = datasets.Source(index, vocabulary_of(index), validation=index.images[:2])
        self.assertEqual((source.training, source.validation), ([3, 4], [0]))

    def test_names_of_the_tables(self):
        """All classes of a table whatever they have, those of one name apart; synonyms are cut in
        objectInfo150.txt alone. Masks without 0 bring no advice on numbers that start at 0."""
        info = "Idx\tRatio\tName\n1\t.5\twall   \n2\t.5\tbuilding, edifice  \n"
        info += "3\t.5\tscreen, door screen\n4\t.5\tscreen, silver screen\n"
        root = own_data(columns(1, 2, 255), classes="crop, healthy\ncrop, ill\n weed \n")
        names = ["crop, healthy", "crop, ill", "weed"]
        for unused in ("weed", "screen"):
            index, err = scanned(root)
            self.assertIn(unused, err)
            self.assertNotIn("classes.txt", err)
            vocabulary = vocabulary_of(index, min_images=50, min_pixels=10**6)
            self.assertEqual(vocabulary, {"object": names})
            self.assert_labels(root, columns(0, 1, -1))
            write(join(root, "objectInfo150.txt"), info)
            names = ["wall", "building", "screen (3)", "screen (4)"]

    def test_exactly_the_numbers_of_a_table_are_classes(self):
        table = "0 sky\n1: building, tall\n255, Void\n\n12 car\n"
        root = own_data(columns(0, 1, 7, 12, 255), classes=table)
        index, err = scanned(root)
        names = ["sky", "building, tall", "car", "Void"]
        self.assertEqual(vocabulary_of(index), {"object": names})
        self.assert_labels(root, columns(0, 1, -1, 2, 3))
        self.assertRegex(err, r"\b7\b")
        self.assertRegex(err, r"Void.*classes\.txt")  # is a class all the same

    def test_lines_of_classes_txt(self):
        root = own_data(columns(1, 2, 7, 12))
        for table, expected in (
            ("7; sky\n12;car\n", {7: "sky", 12: "car"}),
            ("7 = sky\n12=car\n", {7: "sky", 12: "car"}),
            ("# my classes\n7) sky\n# and\n12. car\n", {7: "sky", 12: "car"}),
            ("# my classes\nsky\n# and\nt\xf4le\n", {1: "sky", 2: "t\xf4le"}),
        ):
            write(join(root, "classes.txt"), table, "latin-1")
            self.assertEqual(scanned(root)[0].names, expected)
        for table in (
            "7 sky\n7 car\n",
            "7 sky\ncar\n",
            "number name\n1 sky\n2 car\n",
            "sky,2\ncar,7\n",
            "sky;2\ncar;7\n",
            "sky 2\ncar 7\n",
        ):
            write(join(root, "classes.txt"), table)
            with self.subTest(table=table):
                scan_refused(join(root, "classes.txt"), root)

    def test_numbers_that_cannot_be_meant_as_classes_are_refused(self):
        """Fewer than two classes, or without a table fewer than half of 1..highest."""
        for numbers in (
            (0, 255),
            (0, 1, 255),
            (0, 85, 170, 255),  # gray levels
            (1001, 1002, 2001),  # class * 1000 + instance
            (3, 5, 255, 0),
        ):
            root = own_data(columns(*numbers))
            scan_refused(root, root)
        root = own_data(columns(51, 52), classes="one\ntwo\n")
        self.assertRaisesRegex(datasets.UserError, root, scanned, root)  # after a warning
        source_of(own_data(columns(2, 4, 255, 0)))  # these can

    def test_numbers_beyond_the_table_are_reported_and_unlabelled(self):
        beyond = columns(1, 1, 7, 255)
        root = own_data(self.MASK, beyond, classes="sea\nland\nglacier\n")
        for _ in range(2):  # a scan, and its index
            _, out, err = command(datasets.main, "--data", "ade20k", "--root", root)
            self.assertRegex(err, r"\b7\b")
            self.assertRegex(err, "glacier.*classes.txt")  # no pixel: do the numbers start at 0?
            self.assertNotIn("land", err)
        self.assertRegex(out, r"sea +1,600 pixels[^|]*land +400 pixels[^|]*glacier +0 pixels")
        self.assertIn("37.5%", out)  # 1,200 of the 3,200 pixels are unlabelled
        self.assert_labels(root, columns(0, 0, -1, -1), 1)

    def test_masks_of_any_mode_with_one_number_a_pixel(self):
        grey = Image.fromarray(self.MASK.astype(np.uint8))
        sevens = 7 * (self.MASK == 1)
        voc = Image.fromarray(sevens.astype(np.uint8))
        voc.putpalette(VOC_PALETTE)  # 7 is grey in it, 1 to 6 are not
        wide = 150 * self.MASK  # numbers beyond 255
        classes = "\n".join(f"name {n}" for n in range(1, 301))
        for picture, numbers in (
            (grey.convert("RGB"), self.MASK),
            (grey.convert("RGBA"), self.MASK),
            (voc, sevens),
            (Image.fromarray(self.MASK == 1), 1 * (self.MASK == 1)),
            (Image.fromarray(wide.astype(np.uint16)), wide),
        ):
            root = own_data(self.MASK, self.MASK, classes=classes)
            save(picture, root, "annotations", "training", "0.png")
            with self.subTest(mode=picture.mode):
                self.assert_labels(root, numbers - 1)

    def test_hidden_files_and_masks_without_a_photo_are_not_data(self):
        root = own_data(self.MASK, self.MASK)
        os.remove(join(root, "images", "training", "1.jpg"))
        for name in ("images/training/._0.jpg", "images/.x/0.jpg", "more/0.jpg"):
            write(join(root, name), "no picture")
        index, err = scanned(root)
        self.assertEqual(index.images, ["images/training/0.jpg"])
        self.assertIn("annotations/training/1.png", err)


class TestToy(unittest.TestCase):
    def test_is_always_the_same_and_complete_or_not_there_at_all(self):
        place = Path(new_folder())
        for name in ("one", "other"):
            datasets.make_toy(str(place / name), 2, 1, 1)
        with mock.patch("PIL.Image.Image.save", side_effect=OSError("full")):
            with self.assertRaises(OSError):
                datasets.make_toy(str(place / "cut"), 2, 1, 1)
        self.assertEqual(set(os.listdir(place)), {"one", "other"})
        for path in (place / "one").rglob("*.*"):
            other = place / "other" / path.relative_to(place / "one")
            self.assertEqual(path.read_bytes(), other.read_bytes(), path)


class TestBatches(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """Photos whose red is the pixel's column and green its row; masks of columns, of rows, and
        of columns of an upright photo."""
        root = new_folder()
        for k, size in enumerate([(96, 160), (96, 160), (160, 96)]):
            rows, across = np.indices(size)
            save(np.stack([across, rows, 0 * rows], axis=-1), root, "images", f"{k}.png")
            numbers = rows if k == 1 else across
            save(numbers + 1, root, "annotations", f"{k}.png")
        cls.source = source_of(root)

    def batches(self, images, sources=None, sizes=(64, 96), step=(1, 1), seed=3, **options):
        """images: numbers in the last of the sources, a row for each iteration."""
        sources = sources or [self.source]
        images = np.array(images).reshape(len(images), *step, -1)
        plan = datasets.Plan(np.full(len(images), len(sources) - 1), images)
        return datasets.TrainingBatches(sources, plan, sizes, 200, seed, **options)

    def reds(self, images, sources=None, **options) -> np.ndarray:
        """Row 5 of the red of each batch's first image, as floats."""
        batches = self.batches(images, sources, **options)
        rows = [batches[k].images[0, 0, 5] for k in range(len(batches))]
        return np.stack(rows).astype(float)

    def test_plan(self):
        """Sources by their numbers of images, the two groups of one together; once each before any
        twice; the same images however they are shared out."""
        groups = [(0, np.arange(300)), (1, np.arange(67)), (1, np.arange(100, 133))]
        plan = train.draw_batches(groups, 4000, (1, 1, 2), seed=0)
        for position, group in groups:
            is_of_group = (plan.sources == position) & np.isin(plan.images[:, 0, 0, 0], group)
            images = plan.images[is_of_group].ravel()
            self.assertAlmostEqual(len(images) / 8000, len(group) / 400, delta=0.03)
            passes = len(images) // len(group)
            whole = images[: passes * len(group)].reshape(passes, -1)
            assert_array_equal(np.sort(whole), np.tile(group, (passes, 1)))
        again = train.draw_batches(groups, 4000, (2, 1, 1), seed=0)
        assert_array_equal(again.images.ravel(), plan.images.ravel())

    def test_item_k_depends_on_plan_seed_and_k_alone(self):
        """With processes that read ahead, and after a pause."""
        for crop in (0, 64):
            batches = self.batches([[0, 1], [1, 2], [2, 0]], crop=crop)
            first, _, last = datasets.loader(batches, workers=2)
            np.testing.assert_equal(first, batches[0])
            others = self.batches([[0, 1], [0, 1], [2, 0]], crop=crop)
            (again,) = datasets.loader(others, first=2, workers=0)
            np.testing.assert_equal(again, last)
            reseeded = self.batches([[0, 1]], crop=crop, seed=4)
            self.assertFalse(np.array_equal(first.images, others[1].images))
            self.assertFalse(np.array_equal(first.images, reseeded[0].images))

    def test_processes_and_accumulation_change_nothing(self):
        images = [[0, 1, 1, 0]]
        for crop in (0, 64):
            whole = self.batches(images, crop=crop)[0]
            for share in range(4):
                k, rank = divmod(share, 2)
                batch = self.batches(images, step=(2, 2), rank=rank, crop=crop)[k]
                assert_array_equal(batch.images[0], whole.images[share])
                assert_array_equal(batch.labels["object"][0], whole.labels["object"][share])

    def test_a_short_side_is_drawn_for_each_iteration(self):
        batches = self.batches([[0, 1]] * 12, sizes=[64, 96])
        heights = {batches[k].images.shape[2] for k in range(12)}
        self.assertEqual(heights, {64, 96})

    def test_labels_lie_on_what_they_label(self):
        """Resized, cut to crops smaller and larger than the image, mirrored; unlabelled and of the
        mean colour where it ends."""
        for crop in (0, 64):
            batches = self.batches([[0, 1]] * 30, sizes=[61, 96, 110], crop=crop)
            for k in range(30):
                images = batches[k].images.astype(float)
                labels = batches[k].labels["object"]
                inside = images[:, 2] < 1  # the padding is bluer
                padding = images.transpose(0, 2, 3, 1)[~inside]
                self.assertTrue((padding == upernet.MEAN_COLOUR).all())
                assert_array_equal(labels >= 0, inside[:, 2::4, 2::4])
                numbers = np.stack([images[0, 0], images[1, 1]])  # columns; rows
                middle = (numbers[:, 1:, 1:] + numbers[:, :-1, :-1]) / 2
                whole = inside[:, 1::4, 1::4] & inside[:, 2::4, 2::4]
                error = abs(labels - middle[:, 1::4, 1::4]) * whole
                self.assertLess(error.max(), 3)
                means = error.sum(axis=(1, 2)) / whole.sum(axis=(1, 2))
                self.assertLess(means.max(), 1)

    def test_short_sides_of_crops(self):
        """From half of their own to twice that, or one of the sizes; from all over the photo; none
        mirrored."""
        for sizes in ([], [48, 96]):
            red = self.reds([[0]] * 30, sizes=sizes, crop=64, flip=False)
            self.assertEqual(red.shape, (30, 64))
            self.assertTrue(red[:, 0].min() < 5 and red[:, 0].max() > 60)
            scales = (red[:, 25] - red[:, 5]) / 20  # columns of the photo for one
            if sizes:
                self.assertEqual(set(scales.round(1)), {1, 2})
            else:
                self.assertTrue(0.7 < scales.min() < 0.9)
                self.assertTrue(2.4 < scales.max() < 3.1)

    def test_windows_of_several_classes_are_preferred(self):
        """Against a plain loop."""
        labels = np.zeros((60, 100), np.int16)
        labels[:30, :30] = -1  # does not count
        labels[45:, :40] = 1
        sample = datasets.Sample(None, {"object": labels}, (60, 100))
        shares = []
        for seed in range(20):
            window = datasets.varied_window(sample, "object", 32, np.random.default_rng(seed))
            rng = np.random.default_rng(seed)
            tried = []
            while len(tried) < 10 and not (tried and tried[-1][0] < 0.75):
                top = rng.integers(60 - 31)
                left = rng.integers(100 - 31)
                cells = labels[top : top + 32, left : left + 32][2::4, 2::4]
                counts = np.bincount(cells[cells >= 0])
                tried.append((counts.max() / counts.sum(), len(tried), top, left))
            share, _, top, left = min(tried)
            self.assertEqual((window.top, window.left), (top, left))
            shares.append(share)
        self.assertTrue(min(shares) < 0.75 < max(shares))

    def test_the_preferred_windows_are_trained_on(self):
        """Mirrored or not: nearly all of ten have one with much of the left half."""
        mask = np.full((96, 160), 3)
        mask[:, :80] = np.arange(80) // 8 % 2 + 1
        source = source_of(own_data(mask))
        batches = self.batches([[0]] * 30, [source], sizes=[96], crop=64)
        for k in range(30):
            counts = np.bincount(batches[k].labels["object"].ravel())
            self.assertLess(counts.max(), 0.75 * 16 * 16)

    def test_textures_are_cut_to_squares_at_random_and_mirrored(self):
        texture = source_of(textures(new_folder(), train1=["a/ein 点.png"]), "dtd")
        self.assertEqual(texture.labels(0), {"texture": 0})
        red = self.reds([[0]] * 10, [self.source, texture], crop=96)
        self.assertEqual(red.shape, (10, 64))
        self.assertGreater(np.ptp(red.mean(axis=1)), 50)
        slopes = red[:, -1] - red[:, 0]
        self.assertLess(slopes.min(), -50)
        self.assertGreater(slopes.max(), 50)


class TestPrepared(unittest.TestCase):
    def setUp(self):
        """320 classes, six pixels each; all but the first have a wheel of three."""
        pixels = np.arange(40 * 48).reshape(40, 48)
        self.objects = pixels // 6 + 1
        self.wheels = (pixels % 6 > 2) & (pixels > 5)
        self.ade = Ade()
        names = {n: f"thing {n}" for n in range(1, 321)}
        names[400] = "wheel"
        self.stem = self.ade.add(self.objects, names, ["street"], 400 * self.wheels)
        self.source = source_of(self.ade.root)
        self.first = self.source.prepared(0)
        (self.folder,) = self.folders()

    def folders(self) -> list[Path]:
        return list(Path(self.ade.root, ".cache").glob("ade20k-*"))

    def test_are_pictures_of_class_plus_1_and_of_parts(self):
        labels = self.source.labels(0)
        self.assertEqual(len(np.unique(labels["object"])), 320)
        assert_array_equal(self.first["object"], labels["object"])
        assert_array_equal(self.first["part"], self.wheels)
        with Image.open(self.folder / "0.png") as picture:
            self.assertIn(picture.mode, ("I;16", "I"))  # I: Pillow before version 11
            assert_array_equal(picture, labels["object"] + 1)
        with Image.open(self.folder / "0_parts.png") as picture:
            self.assertEqual(picture.mode, "L")
            assert_array_equal(picture, self.wheels)

    def test_batches_have_every_fourth_of_their_labels(self):
        """Arrays of the smallest types, not tensors, which would take shared memory."""
        plan = datasets.Plan([0], np.zeros((1, 1, 1, 1), int))
        batch = datasets.TrainingBatches([self.source], plan, [40], 99, 0, flip=False)[0]
        self.assertEqual(batch.images.dtype, np.uint8)
        assert_array_equal(batch.labels["scene"], [0])
        for level, labels in self.first.items():
            quarters = batch.labels[level]
            self.assertEqual((quarters.shape, quarters.dtype), ((1, 16, 16), labels.dtype))
            assert_array_equal(quarters[0, :10, :12], labels[2::4, 2::4])
        self.assertEqual(quarters[0, 10:].max(), 0)  # parts in the padding

    def test_are_written_again_when_deleted_and_else_only_read(self):
        for name in ("0.png", "0_parts.png"):
            content = (self.folder / name).read_bytes()
            os.remove(self.folder / name)
            self.source.prepared(0)
            self.assertEqual((self.folder / name).read_bytes(), content)
        os.remove(f"{self.stem}_seg.png")
        np.testing.assert_equal(self.source.prepared(0), self.first)

    def test_a_damaged_one_is_named(self):
        path = self.folder / "0.png"
        whole = path.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-40] + bytes(40)):
            path.write_bytes(damaged)
            with self.assertRaisesRegex(datasets.UserError, str(path)):
                self.source.prepared(0)

    def test_each_vocabulary_and_size_has_its_own(self):
        vocabulary = vocabulary_of(self.source.index)
        vocabulary["object"].reverse()
        cache = join(self.ade.root, ".cache")
        turned = datasets.Source(self.source.index, vocabulary, cache=cache).prepared(0)
        self.assertTrue((self.first["object"] + turned["object"] == 319).all())
        smaller = source_of(self.ade.root, largest=(17, 1200)).prepared(0)
        rows = ((np.arange(17) + 0.5) * 40 / 17).astype(int)  # where cells have their centres
        across = ((np.arange(20) + 0.5) * 48 / 20).astype(int)
        for level, labels in smaller.items():
            assert_array_equal(labels, self.first[level][rows[:, None], across])
        os.remove(join(cache, "ade20k.index.pt"))
        source_of(self.ade.root)  # another scan of the same files
        self.assertEqual(len(self.folders()), 3)


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
                fewest = min(1, len(counts) - 1)
                self.assertEqual(side.sum(), max(fewest, round(fraction * len(counts))))
                again = balance_split.balance(torch.tensor(counts), fraction, swaps=500, seed=3)
                assert_array_equal(side, again)
        other = balance_split.balance(counts, fraction, swaps=500, seed=4)
        self.assertFalse((side == other).all())

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
        root = new_folder()
        shutil.copytree(join(toy_root(), "toy", "os"), join(root, "os"))
        path = join(root, "split.json")
        dtd = {"validation": []}
        write(path, json.dumps({"fraction": 0.1, "sources": {"dtd": dtd}}))
        plot = join(root, "plot.png")
        options = ("--data", "os", "--root", root, "--min-images", 5, "--plot", plot)
        succeeded(balance_split.main, *options)
        Image.open(plot).close()
        entries = read_json(path)["sources"]
        self.assertEqual(entries["dtd"], dtd)
        entry = entries["os"]
        keys = "images fingerprint validation deviation_before deviation_after"
        self.assertEqual(entry.keys(), set(keys.split()))
        self.assertEqual((entry["images"], len(entry["validation"])), (30, 3))
        self.assertLess(entry["deviation_after"], entry["deviation_before"])

    def test_a_split_is_added_and_kept_and_refused_for_other_images(self):
        root = textures(new_folder(), train1=[f"a/{k}.png" for k in range(4)])
        path = join(root, "split.json")
        other = {"validation": []}
        write(path, json.dumps({"fraction": 0.5, "sources": {"os": other}}))
        index, _ = scanned(root, "dtd")
        vocabulary = vocabulary_of(index)
        find = balance_split.validation_images
        with self.assertRaisesRegex(datasets.UserError, path):
            find(index, "balanced", path)  # as evaluate.py does
        validation = find(index, "balanced", path, vocabulary)
        self.assertEqual(len(validation), 2)
        content = read_json(path)
        self.assertEqual(content["sources"]["os"], other)
        content["sources"]["dtd"]["validation"] = index.images[:1]
        write(path, json.dumps(content))
        self.assertEqual(find(index, "balanced", path, vocabulary), index.images[:1])
        os.remove(join(root, "dtd", "images", "a", "0.png"))
        fewer, _ = scanned(root, "dtd")
        for text in (json.dumps(content), "{"):
            write(path, text)
            with self.assertRaisesRegex(datasets.UserError, path):
                find(fewer, "balanced", path, vocabulary)

    def test_official_validation(self):
        find = balance_split.validation_images
        lists = {"train1": ["a/0.png"], "val1": ["a/2.png"], "test1": ["b/4.png", "a/3.png"]}
        root = textures(new_folder(), **lists)
        validation = find(scanned(root, "dtd")[0], "official", "")
        self.assertEqual(validation, ["images/a/3.png", "images/b/4.png"])
        index, _ = scanned(join(toy_root(), "toy"))
        expected = sorted(name for name in index.images if "/validation/" in name)
        self.assertEqual(len(expected), 4)
        self.assertEqual(find(index, "official", ""), expected)


# ---------------------------------------------------------------- evaluation: what tests share
def varied_net() -> UPerNet:
    """A network without training in whose maps many classes are the best one somewhere."""
    net = small_net(test_size=(64, 1000, None))
    with torch.no_grad():
        logits = net(to_tensor(noise(64, 96))[None])
        for level in ("object", "part", "material", "texture_map"):
            classifier = net.heads[level.removesuffix("_map")].classifier
            classifier.bias -= logits[level].mean(dim=(0, 2, 3))
    return net


def save_checkpoint(net: UPerNet, **more) -> str:
    """A checkpoint of a network for CONCEPTS."""
    path = join(new_folder(), "ckpt.pt")
    content = {"model": net.state_dict(), "network": net.network, "vocabulary": CONCEPTS}
    torch.save({**content, **more}, path)
    return path


def plain_upsample(maps: Tensor, filled: tuple, size: tuple) -> Tensor:
    """A cell is four pixels of the network's input wide, of which the picture fills `filled`."""
    down = filled[0] / (4 * maps.shape[1])  # the share of the maps that the picture fills
    across = filled[1] / (4 * maps.shape[2])
    theta = torch.tensor([[across, 0, across - 1], [0, down, down - 1]], dtype=maps.dtype)
    grid = F.affine_grid(theta[None], (1, 1, *size), align_corners=False)
    return F.grid_sample(maps[None], grid, padding_mode="border", align_corners=False)[0]


def plain_view(
    net: UPerNet, photo: Image.Image, height: int, width: int, multiple: int = 32
) -> dict[str, Tensor]:
    """The logits of a photo resized to (height, width), then padded with the mean colour."""
    resized = photo.resize((width, height), Image.Resampling.BILINEAR)
    right_and_below = (0, 0, -width % multiple, -height % multiple)
    padded = ImageOps.expand(resized, right_and_below, (124, 116, 104))
    with torch.inference_mode():
        logits = net(to_tensor(padded)[None])
    return {level: value[0] for level, value in logits.items()}


def plain_maps(net: UPerNet, scores: dict, filled: tuple, size: tuple) -> dict[str, Tensor]:
    """Scene and texture as they are; the best classes in maps of `size`; parts are channels within
    the best object, or -1."""
    seen = {level: scores[level] for level in ("scene", "texture")}
    for level in ("object", "material", "texture_map"):
        seen[level] = plain_upsample(scores[level], filled, size).argmax(dim=0)
    seen["part"] = torch.full(size, -1)
    for index, channels in net.part_slices.items():
        best = plain_upsample(scores["part"][channels], filled, size).argmax(dim=0)
        here = (seen["object"] == index) & (best > 0)
        seen["part"][here] = channels.start + best[here]
    return seen


def plain_parse(
    net: UPerNet, photo: Image.Image, sizes: list, flip: bool, size: tuple = ()
) -> dict[str, Tensor]:
    """What `parse` should see at several sizes, in maps of the photo's size or another: mean
    probabilities over the sizes and mirror images; of maps, on a grid of a quarter of the largest
    view that spans the photo."""
    shapes = []
    for short in sizes:
        scale = short / min(photo.size)
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
    scores = {level: sum(view[level] for view in views) / len(views) for level in views[0]}
    return plain_maps(net, scores, (4 * grid[0], 4 * grid[1]), size or photo.size[::-1])


# ---------------------------------------------------------------- metrics
class TestMetrics(unittest.TestCase):
    def test_maps(self):
        metrics = evaluate.Metrics(CONCEPTS, ["object"])
        for predicted, truth in (([[0, 1], [1, 3]], [[0, 0], [1, -1]]), ([0, 3], [2, -1])):
            metrics.add("object", torch.tensor(predicted), torch.tensor(truth))
        expected = {
            "pixel_accuracy": 2 / 4,
            "mean_iou": (1 / 3 + 1 / 2 + 0) / 3,
            "iou": {"wall": 1 / 3, "car": 1 / 2, "pot": 0, "person": None},
        }
        self.assertEqual(metrics.results(), {"object": expected})

    def test_parts(self):
        metrics = evaluate.Metrics(CONCEPTS, ["part"])
        for best, objects, parts in (
            ([1, 4], [1, 1, 1, 1, 3, 3], [1, 1, 0, 2, 1, 0]),
            ([2, 4], [0, 1, 1, 3, 3, 3], [0, 1, 2, 0, 0, 0]),  # its person is not annotated
        ):
            scores = torch.zeros(5, 2, 2)
            scores[best] = 1
            slices = {1: slice(0, 3), 3: slice(3, 5)}
            metrics.add_parts(
                scores, torch.tensor([objects]), torch.tensor([parts]), slices, (8, 8)
            )
        results = metrics.results()["part"]
        car = {"background": 0, "wheel": 2 / 5, "door": 1 / 3}
        self.assertEqual(results["iou"], {"car": car, "person": {"background": 0, "head": 1 / 2}})
        self.assertEqual(results["pixel_accuracy"], 4 / 8)
        # Over the parts of an object first, then over objects.
        self.assertAlmostEqual(results["mean_iou_bg"], (sum(car.values()) / 3 + 1 / 4) / 2)

    def test_nothing_labelled_is_null_in_json(self):
        metrics = evaluate.Metrics(CONCEPTS, ["part", "material", "texture"])
        metrics.add("texture", torch.tensor(0), torch.tensor(-1))
        results = json.loads(json.dumps(metrics.results(), allow_nan=False))
        iou = dict.fromkeys(CONCEPTS["material"])
        expected = {"pixel_accuracy": None, "mean_iou": None, "iou": iou}
        self.assertEqual(results["material"], expected)
        self.assertIsNone(results["part"]["mean_iou_bg"])
        self.assertEqual(results["texture"], {"top1": None, "n": 0})

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
    def test_is_the_argmax_of_the_upsampled_scores(self):
        """Ties go to the lowest index."""
        torch.manual_seed(0)
        rough = torch.randn(40, 24, 32)
        coarse = 4 * torch.randn(1, 40, 4, 5)
        smooth = F.interpolate(coarse, (24, 32), mode="bicubic")[0]  # most are nowhere the best
        ties = (rough.repeat_interleave(2, dim=0), (3 * rough).round())
        for scores in (rough, rough[:, :1], rough[:1], smooth, smooth - 1e4, *ties):
            for size in ((97, 131), (7, 300), scores.shape[1:]):
                plain = F.interpolate(scores[None], size, mode="bilinear")[0].argmax(dim=0)
                filled = (4 * scores.shape[1], 4 * scores.shape[2])
                self.assertTrue(torch.equal(upernet.class_map(scores, filled, size), plain))

    def test_cuts_the_padding_off(self):
        torch.manual_seed(0)
        scores = torch.randn(7, 16, 24, dtype=torch.float64)  # of an input of 64 x 96
        for filled in ((64, 96), (50, 70), (45, 90)):
            for size in ((100, 150), (333, 421), (20, 31), (16, 24)):
                plain = plain_upsample(scores, filled, size).argmax(dim=0)
                self.assertTrue(torch.equal(upernet.class_map(scores, filled, size), plain))

    def test_takes_the_memory_of_a_few_maps_however_many_classes(self):
        scores = torch.randn(300, 10, 10)
        with LargestTensor() as largest:
            upernet.class_map(scores, (40, 40), (200, 250))
        self.assertLessEqual(largest.elements, 200 * 250)


class TestRelations(unittest.TestCase):
    def test_are_shares_in_the_words_of_table_4(self):
        """Objects of three in ten of a scene's photos; the three largest shares of at least a tenth
        of a material's or texture's pixels over all photos."""
        relations = evaluate.Relations(CONCEPTS, list(CONCEPTS))
        kitchen = np.array([0.9, 0.1])
        material = np.repeat([0, 1, 2, 3, 4], [20, 12, 8, 6, 4])
        seen = {"part": np.full(50, -1), "material": material, "texture_map": 0 * material}
        for k in range(10):  # a car in four kitchens, a pot in two; the street has a person
            objects = np.repeat([0, 1 if k < 4 else 0, 2 if k > 7 else 0, 0, 0], 10)
            relations.add({**seen, "scene": kitchen, "object": objects})
        seen["part"] = np.where(material == 1, 4, -1)
        seen["texture_map"] = np.repeat([1, 2], [15, 35])
        relations.add({**seen, "scene": kitchen[::-1], "object": np.full(50, 3)})
        path = join(new_folder(), "r.json")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            relations.report(path)
        found = read_json(path)
        expected = {"kitchen": {"wall": 1.0, "car": 0.4}, "street": {"person": 1.0}}
        self.assertEqual(found["scene-object"], expected)
        self.assertEqual(found["part-material"], {"person: head": {"brick": 1.0}})
        # 15 and 5 of its 220 pixels are banded and grid.
        self.assertEqual(found["material-texture"]["wood"], {"dotted": 1.0})
        said = said.getvalue().splitlines()
        self.assertIn("kitchen is composed of wall and car", said)
        self.assertIn("person is made of wood (50%), brick (30%) and metal (20%)", said)


# ---------------------------------------------------------------- photos and validation images
class TestParse(unittest.TestCase):
    def assert_seen(self, seen: dict, expected: dict):
        self.assertEqual(seen.keys(), expected.keys())
        for level, value in expected.items():
            if level in ("scene", "texture"):
                np.testing.assert_allclose(seen[level], value, rtol=1e-4)
            else:
                self.assertGreaterEqual((seen[level] == value.numpy()).mean(), 0.999, level)

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
            for level in ("scene", "texture"):
                logits[level] = logits[level].softmax(dim=0)
            self.assert_seen(upernet.parse(net, photo), plain_maps(net, logits, resized, full))

    def test_of_several_sizes_and_mirror_images_against_the_loop(self):
        """Sizes that are asked for have no longest side."""
        net = varied_net()
        net.test_size = (64, 70, None)
        for height, width in ((48, 75), (90, 60)):
            photo = noise(height, width)
            for sizes, flip in (([64, 96], True), ([50], True), ([70, 50, 61], False)):
                seen = upernet.parse(net, photo, sizes=sizes, flip=flip)
                self.assert_seen(seen, plain_parse(net, photo, sizes, flip))

    def test_sizes_are_cut_and_rounded_as_in_mmsegmentations_code(self):
        """Whose networks keep their longest side, whatever is asked for; ours are padded."""
        for full, test_size, sizes, expected in (
            ((1025, 1024), (512, 2048, 1), None, (512, 513)),
            ((300, 200), (100, 200, 1), [160], (133, 200)),
            ((300, 200), (100, 200, None), [160], (160, 256)),
        ):
            [view] = upernet.views_of(Image.new("RGB", full), test_size, sizes)
            self.assertEqual(view.pixels.shape[2:], expected)

    def test_pictures_of_any_mode_are_turned_as_their_exif_data_say(self):
        net = varied_net()
        photo = noise(48, 80)
        upright = upernet.parse(net, photo.rotate(-90, expand=True))["object"]
        photo.getexif()[0x0112] = 6  # to be turned by a quarter, clockwise
        assert_array_equal(upernet.parse(net, photo)["object"], upright)
        for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
            seen = upernet.parse(net, noise(48, 80).convert(mode))
            self.assertEqual(seen["part"].shape, (48, 80))

    def test_answers_for_the_levels_that_are_asked_or_raises(self):
        net = varied_net()
        net.heads["material"].classifier.bias.data[2] = math.nan
        photo = np.asarray(noise(48, 64))
        self.assertEqual(set(upernet.parse(net, photo, ["part", "scene"])), {"part", "scene"})
        self.assertRaises(ValueError, upernet.parse, net, photo, ["colour"])
        self.assertRaisesRegex(FloatingPointError, "material", upernet.parse, net, photo)
        for wrong in (photo / 255, photo[..., 0]):
            self.assertRaises(ValueError, upernet.parse, net, wrong, ["object"])


class TestEvaluation(unittest.TestCase):
    def test_labels_that_the_loop_over_the_views_predicts_are_all_right(self):
        """Of all levels; JPEGs not as libjpeg reduces them; OpenSurfaces' labels are larger than
        their photo."""
        net = varied_net()
        net.test_size = (30, 40, None)
        place = new_folder()
        photo = Image.open(save(noise(96, 128), place, "a.jpg"))
        seen = plain_parse(net, photo, [36, 44], True)
        names = {10 + k: name for k, name in enumerate(CONCEPTS["object"])}
        names.update({21: "wheel", 22: "door", 24: "head"})
        parts = np.where(seen["part"] >= 0, 20 + seen["part"], 0)
        scene = CONCEPTS["scene"][seen["scene"].argmax()]
        ade = Ade()
        ade.add(10 + seen["object"].numpy(), names, [scene], parts)

        photo = Image.open(save(noise(48, 64), place, "b.jpg"))
        seen = plain_parse(net, photo, [36, 44], True, size=(96, 128))
        surfaces(ade.root, CONCEPTS["material"], [1 + seen["material"].numpy()])

        squares = {}
        for k in range(8):  # from the middle at 64 pixels, whatever --size says
            square = noise(64, 88, k)
            seen = plain_parse(net, square.crop((12, 0, 76, 64)), [64], True)
            squares[f"{CONCEPTS['texture'][seen['texture'].argmax()]}/{k}.png"] = square
        textures(ade.root, train1=list(squares))
        for name, square in squares.items():
            save(square, ade.root, "dtd", "images", name)

        arguments = {"data": "ade20k,os,dtd", "root": ade.root}
        checkpoint = save_checkpoint(net, arguments=arguments)
        argv = ("--split", "all", "--size", "36,44", "--flip")
        found, _ = evaluated(checkpoint, *argv)
        for level in ("object", "part", "material"):
            self.assertGreaterEqual(found[level]["pixel_accuracy"], 0.999)
        self.assertEqual(found["scene"], {"top1": 1, "n": 1})
        self.assertEqual(found["texture"], {"top1": 1, "n": 8})


def evaluated(*argv) -> tuple[dict, str]:
    """(the metrics that evaluate.py writes, what it prints)."""
    path = join(new_folder(), "m.json")
    said = succeeded(evaluate.main, *argv, "--json", path)
    return read_json(path), said


def labelled(iou: dict) -> list[str]:
    """The classes that have an IoU."""
    return [name for name, value in iou.items() if value is not None]


class TestReleasedNetworks(unittest.TestCase):
    """Others' networks, of another depth and few channels, on data and photos."""

    NAMES = [f"thing {k}" for k in range(1, 151)]

    @classmethod
    def setUpClass(cls):
        cls.tables = class_tables(new_folder())
        cls.paper, _ = released_files("paper", 1, backbone="resnet101", channels=8)
        cls.papers = ("--release", *cls.paper, "--labels", cls.tables)
        network = {"backbone": "resnet18", "channels": 8}
        (cls.mmseg,), _ = released_files("mmseg", 1, {"CLASSES": cls.NAMES}, **network)

    def test_the_papers_on_ade20k_and_opensurfaces(self):
        """The authors' table says which of their classes a number or scene of the data is."""
        names = {7: "car", 300: "wall", 9: "dust", 20: "wheel", 21: "dent"}
        ade = Ade()
        for scene in ("bus stop", "attic"):
            ade.add(columns(300, 7, 7, 9), names, ["outdoor", scene], columns(0, 20, 21, 0))
        photos = Path(ade.folder, "images", "ADE")
        (photos / "training").rename(photos / "validation")
        surfaces(ade.root, ["Mud", "Brick", "Mud"], [columns(1, 2, 3)])
        argv = (*self.papers, "--data", "ade20k,os", "--root", ade.root, "--size", 32)
        metrics, _ = evaluated(*argv)
        self.assertEqual(metrics["scene"]["n"], 1)
        self.assertEqual(labelled(metrics["object"]["iou"]), ["object 1", "object 3"])
        self.assertEqual(labelled(metrics["part"]["iou"]["object 3"]), ["background", "part 1"])
        self.assertEqual(labelled(metrics["material"]["iou"]), ["material 25"])
        self.assertFalse(os.path.exists(join(ade.root, "split.json")))

    def test_masks_of_the_papers_have_the_authors_numbers_from_0(self):
        """At a size cut off to whole pixels, then up to a multiple of 8, as in their code."""
        place = new_folder()
        path = save(noise(48, 80), place, "x.png")
        argv = ("--size", 34, "--photo", path, "--pictures", join(place, "out"))
        succeeded(evaluate.main, *self.papers, *argv)
        net, _ = upernet.load_release(*self.paper, self.tables)
        logits = plain_view(net, noise(48, 80), 40, 56, 8)["object"]  # of 34 x 56.67, cut off
        expected = plain_upsample(logits, (40, 56), (48, 80)).argmax(dim=0).numpy()
        with Image.open(join(place, "out", "x_object.png")) as mask:
            self.assertGreaterEqual((np.asarray(mask) == expected).mean(), 0.995)

    def test_mmsegmentations_on_sceneparsing(self):
        root = new_folder()
        rows = [f"{k}\t0\t0\t0\t{name}, other" for k, name in enumerate(self.NAMES, start=1)]
        write(join(root, "objectInfo150.txt"), "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
        photo = save(noise(48, 64), root, "images", "validation", "a.jpg")
        net, _ = upernet.load_mmseg(self.mmseg)
        # 171 cells for 683 pixels, stretched over the photo as in their code.
        logits = plain_view(net, datasets.open_photo(photo), 512, 683, 1)["object"]
        predicted = plain_resize(logits[None], (48, 64))[0].argmax(dim=0).numpy() + 1
        save(predicted, root, "annotations", "validation", "a.png")
        path = join(root, "m.json")
        argv = ("--release", self.mmseg, "--data", "ade20k", "--root", root, "--json", path)
        status, _, _ = command(evaluate.main, *argv)  # which warns of classes without a pixel
        self.assertEqual(status, 0)
        found = read_json(path)["object"]
        self.assertGreater(found["pixel_accuracy"], 0.99)
        self.assertEqual(list(found["iou"]), self.NAMES)

    def test_data_of_other_classes_are_refused(self):
        own = own_data(columns(1, 2), classes="a\nb")
        ade = Ade()
        ade.add(columns(1), {1: "wall"}, ["street"])
        mmseg = ("--release", self.mmseg)
        for root, release in ((own, self.papers), (own, mmseg), (ade.root, mmseg)):
            argv = (*release, "--data", "ade20k", "--root", root)
            refused(root, evaluate.main, *argv)


class TestParsedPhotos(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.net = varied_net()
        cls.checkpoint = save_checkpoint(cls.net)

    def parsed(self, *argv) -> str:
        """What the command printed."""
        return succeeded(evaluate.main, self.checkpoint, "--photo", *argv)

    def test_files_have_what_parse_sees(self):
        place = new_folder()
        photo = noise(48, 70)
        path = join(place, "r.json")
        argv = ("--pictures", place, "--relations", path)
        self.assertIn("is made of", self.parsed(save(photo, place, "a.PNG"), *argv))
        self.assertIn("part-material", read_json(path))
        names = ["a.PNG", "a_material.png", "a_object.png", "a_upernet.npz", "a_upernet.png"]
        self.assertEqual(sorted(os.listdir(place)), [*names, "r.json"])
        seen = upernet.parse(self.net, photo)
        with np.load(join(place, "a_upernet.npz")) as maps:
            for level, value in seen.items():
                assert_array_equal(maps[level], value.astype(maps[level].dtype))
            self.assertEqual(maps["part_names"].tolist()[:2], ["car: background", "car: wheel"])
        for level in ("object", "material"):
            with Image.open(join(place, f"a_{level}.png")) as mask:
                assert_array_equal(np.asarray(mask), seen[level] + 1)

    def test_folders_with_their_subfolders(self):
        place = new_folder()
        photos = join(place, "photos")
        for name in ("a.webp", "b.tif", "c.bmp", "d.JPEG", "below/a.png"):
            save(noise(48, 64), photos, name)
        for name in ("notes.txt", ".a.png", ".hidden/e.png"):
            write(join(photos, name), "no photo")
        said = self.parsed(photos, "--pictures", place)  # beside the folder
        self.assertRegex(said, r"(?m)^1 .*notes\.txt$")
        expected = [f"{name}_object.png" for name in ("a", "b", "below/a", "c", "d")]
        for name in expected:
            self.assertTrue(os.path.exists(join(place, name)))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(photos)
        for _ in range(2):  # in parsed/, which is passed over
            self.parsed(".")
            found = [str(path.relative_to("parsed")) for path in Path().rglob("*_object.png")]
            self.assertEqual(sorted(found), expected)

    def test_two_photos_of_one_name_are_refused(self):
        place = new_folder()
        paths = [save(noise(40, 64), place, *name.split("/")) for name in ("a.jpg", "b/a.png")]
        out = join(place, "out")
        argv = (self.checkpoint, "--photo", *paths, "--pictures", out)
        refused(".*".join(paths), evaluate.main, *argv)
        self.assertFalse(os.path.exists(out))
        refused("--photo", evaluate.main, self.checkpoint, "--photo", new_folder())

    def test_tell_once_at_which_size_the_network_sees_them(self):
        place = new_folder()
        out = new_folder()
        for k, full in enumerate(((70, 130), (70, 130), (200, 300))):
            save(noise(*full), place, f"{k}.png")
        said = self.parsed(place, "--pictures", out)
        self.assertEqual(len(re.findall(r"\b130x70\b.*\b119x64\b", said)), 1)
        # Eight pixels of 96 were 25 of 300.
        self.assertRegex(said, r"\b300x200\b.*\b96x64\b.*\b25\b.*lost")
        self.assertEqual(said.count("lost"), 1)
        said = self.parsed(place, "--pictures", out, "--size", "100,150")
        self.assertRegex(said, r"\b300x200\b.*\b150x100\b.*\b225x150\b")
        self.assertNotIn("lost", said)


class TestPictures(unittest.TestCase):

    def test_classes_lie_in_their_colours_on_the_photo(self):
        """Not one named background."""
        below = np.array([50, 60, 70])
        photo = Image.new("RGB", (20, 20), tuple(below))
        classes = np.repeat([[0, 1]], 10, axis=1) * np.ones((20, 1), int)  # 1 is outlined
        car = 0.6 * np.array(evaluate.class_colour(1)) + 0.4 * below
        for name, clear in (("Background", 200), ("sky", 0)):
            panel = np.asarray(evaluate.map_panel("objects", photo, classes, [name, "car"]), int)
            self.assertEqual((panel == below).all(axis=2).sum(), clear)
            self.assertEqual((abs(panel - car) <= 1).all(axis=2).sum(), 180)

    def test_curves_show_means_and_an_iterations_last_line(self):
        out = new_folder()
        line = {"stage": "main", "iteration": 0, "lr": 0.04, "loss": {"object": 9}}
        lines = [line]  # trained again by a resumed run
        for k in range(320):
            lines.append({**line, "iteration": k, "loss": {"object": k / 4}})
        lines[-1]["metrics"] = {"object": {"mean_iou": 0.5}}
        write(join(out, "log.jsonl"), "\n".join(map(json.dumps, lines)))
        with mock.patch("datasets.plot", return_value=Image.new("RGB", (9, 9))) as plot:
            train.draw_curves(out)
        self.assertTrue(os.path.exists(join(out, "curves.png")))
        _, _, top, [(losses, _), (scores, _)] = plot.call_args_list[0].args
        self.assertEqual(scores, [(319, 0.5 * top)])
        self.assertEqual(losses, [[2 * k + 0.5, k / 2 + 0.125] for k in range(160)])


class TestOwnNetwork(unittest.TestCase):
    """From one's own photos and masks to masks of new photos."""

    NUMBERS = (0, 40, 255, 300)

    @classmethod
    def setUpClass(cls):
        cls.root = coloured("sky", "road", "sign", "tree", numbers=cls.NUMBERS)
        scenes = "\n".join(f"{k} street" for k in range(20))
        write(join(cls.root, "sceneCategories.txt"), scenes)
        argv = (*OWN, "--root", cls.root, "--channels", 16, "--min-scene-images", 3)
        cls.out, _ = trained(*argv, "--split", "official", "--iters", 40)
        cls.checkpoint = join(cls.out, "ckpt.pt")

    def test_classes_with_gaps_are_learned_and_written_with_their_numbers(self):
        metrics = read_json(self.out, "metrics.json")
        self.assertEqual(list(metrics["object"]["iou"]), ["sky", "road", "sign", "tree"])
        self.assertGreater(metrics["object"]["mean_iou"], 0.5)
        photo = join(self.root, "images", "validation", "4.jpg")
        argv = (self.checkpoint, "--photo", photo, "--pictures", self.out)
        succeeded(evaluate.main, *argv)
        numbers = np.asarray(Image.open(join(self.out, "4_object.png")))
        self.assertTrue(np.isin(numbers, self.NUMBERS).all())
        truth = np.asarray(Image.open(join(self.root, "annotations", "validation", "4.png")))
        self.assertGreater((numbers == truth).mean(), 0.5)

    def test_split_all_evaluates_every_image_and_counts_those_that_trained(self):
        link = join(new_folder(), "link")
        os.symlink(self.root, link)
        for n, argv in (
            (4, ()),
            (20, ("--split", "all")),
            (20, ("--split", "all", "--root", link)),
        ):
            metrics, said = evaluated(self.checkpoint, *argv)
            self.assertEqual(metrics["scene"]["n"], n)
            self.assertIn(f"{n} of 20 images", said)
            self.assertEqual(bool(re.search(r"\b16 .*trained", said)), n == 20)
            self.assertEqual(len(re.findall(r"\b72x48\b.*\b96x64\b", said)), 1)

    def test_a_test_set_without_a_table_has_the_networks_numbers_and_names(self):
        """Also one with files of the same names, which is told."""
        root = f"{self.root}-test"
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("classes.txt", ".cache"))
        metrics, said = evaluated(self.checkpoint, "--split", "all", "--root", root)
        self.assertEqual(metrics, evaluated(self.checkpoint, "--split", "all")[0])
        self.assertRegex(said, r"\b16 .*names of .*trained")

    def test_a_test_set_of_other_classes(self):
        """One that the network lacks, one that it writes otherwise. No split is made of it."""
        table = "0 Sky\n3 road\n7 dog\n255 sign"
        root = own_data(*3 * [columns(0, 3, 7, 255)], classes=table)
        pictures = join(root, "pictures")
        argv = ("--root", root, "--pictures", pictures)
        metrics, said = evaluated(self.checkpoint, *argv, "--split", "all")
        self.assertIn("Sky, dog", said)
        self.assertEqual(labelled(metrics["object"]["iou"]), ["road", "sign"])
        self.assertEqual(len(os.listdir(pictures)), 3)
        argv = (self.checkpoint, *argv, "--split", "balanced")
        refused("split.json", evaluate.main, *argv)
        self.assertFalse(os.path.exists(join(root, "split.json")))

    def test_metrics_are_written_before_pictures(self):
        path = join(new_folder(), "m.json")
        argv = ("--json", path, "--pictures", self.checkpoint)  # a file, no folder
        refused(self.checkpoint, evaluate.main, self.checkpoint, *argv)
        self.assertIn("object", read_json(path))

    def test_evaluation_leaves_each_modules_mode_as_it_was(self):
        net, vocabulary = upernet.load(self.checkpoint)
        validation = ["images/validation/4.jpg"]
        source = datasets.Source(scanned(self.root)[0], vocabulary, validation=validation)
        expected = evaluate.evaluate(net, vocabulary, {"ade20k": source})
        net.train()
        net.ppm.eval()
        modes = [module.training for module in net.modules()]
        self.assertEqual(evaluate.evaluate(net, vocabulary, {"ade20k": source}), expected)
        self.assertEqual([module.training for module in net.modules()], modes)


# ---------------------------------------------------------------- runs of train.py
OWN = (
    *("--data", "ade20k", "--backbone", "resnet18", "--channels", 8),
    *("--weights", "none", "--sizes", 64, "--workers", 0),
)


def trained(*argv, out: str = "") -> tuple[str, str]:
    """(the folder of a run, what it printed)."""
    out = out or new_folder()
    return out, succeeded(train.main, *argv, "--out", out)


def killed(*argv) -> str:
    """The folder of a run that ends at its third step."""
    out = new_folder()
    effects = [mock.DEFAULT, mock.DEFAULT, SystemExit("killed")]
    with mock.patch("train.update", wraps=train.update, side_effect=effects):
        status, _, err = command(train.main, *argv, "--out", out)
    assert status == "killed", f"status {status}: {err}"
    return out


def batches_of(*argv) -> list[datasets.Batch]:
    """The batches of a run that does not train."""
    with mock.patch("train.update", return_value={"object": 0.0}) as update:
        trained(*argv)
    return [call.args[2][0] for call in update.call_args_list]


def steps_of(out: str) -> dict:
    """(stage, iteration) -> its last line in the log, without the time that it took."""
    steps = {}
    for line in read_log(out):
        steps[line["stage"], line["iteration"]] = {**line, "seconds": 0}
    return steps


def coloured(*names: str, numbers: tuple = (), images: int = 20) -> str:
    """A folder of images with these classes, each of its colour; one image in five validates."""
    numbers = numbers or range(1, 1 + len(names))
    rows = [f"{number} {name}" for number, name in zip(numbers, names)]
    masks = np.random.default_rng(0).choice(numbers, (images, 2, 3))
    masks = masks.repeat(24, axis=1).repeat(24, axis=2)
    return own_data(*masks, classes="\n".join(rows))


def toy(iters: int, texture_iters: int = 0) -> tuple:
    """The options of a run on the toy of few images."""
    return (
        *("--root", toy_root(), "--iters", iters, "--texture-iters", texture_iters),
        *("--channels", 8, "--sizes", 32, "--batch-size", 2, "--workers", 0),
        *("--min-images", 3, "--min-pixels", 500, "--min-part-images", 3, "--min-scene-images", 3),
    )


def assert_same_run(one: str, other: str):
    """Two runs that ended with the same weights, data and log, bit for bit."""
    assert steps_of(one) == steps_of(other)
    ours = checkpoint_of(one)
    theirs = checkpoint_of(other)
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    for key in ("vocabulary", "stage", "iteration", "best", "split", "trained", "network"):
        assert ours[key] == theirs[key], key


# ---------------------------------------------------------------- one step
class TestUpdate(unittest.TestCase):
    """Steps of a network in eval mode, so that images do not depend on each other."""

    def batch(self, seed: int) -> datasets.Batch:
        rng = np.random.default_rng(seed)
        labels = {
            "scene": rng.integers(0, 2, 2, np.int16),
            "object": rng.integers(0, 4, (2, 16, 16), np.int16),
            "part": rng.integers(0, 2, (2, 16, 16), np.uint8),
        }
        images = rng.integers(0, 255, (2, 3, 64, 64), np.uint8)
        return datasets.Batch("ade20k", ["a.jpg", "b.jpg"], images, labels)

    def step(self, *batches: datasets.Batch, scaler=None) -> tuple[dict, list[Tensor]]:
        """(losses, the step of each parameter) at a rate of 1, without decay."""
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1)
        scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        cpu = torch.device("cpu")
        loss = train.update(net, net.part_slices, list(batches), optimizer, scaler, cpu, None)
        before = small_net().parameters()
        return loss, [(old - new).detach() for old, new in zip(before, net.parameters())]

    def plain_step(self, batch: datasets.Batch) -> tuple[dict, list[Tensor]]:
        """(losses, the gradient of each parameter) of one batch, weighted as released."""
        net = small_net()
        logits = net(torch.from_numpy(batch.images) / 255, ["scene", "object", "part"])
        labels = {level: torch.from_numpy(y).long() for level, y in batch.labels.items()}
        loss = upernet.losses(logits, labels, net.part_slices)
        total = 0.25 * loss["scene"] + 1.0 * loss["object"] + 0.5 * loss["part"]
        return loss, torch.autograd.grad(total, [*net.parameters()], materialize_grads=True)

    def test_losses_are_weighted_as_released_and_batches_averaged(self):
        loss, step = self.step(self.batch(1), self.batch(2))
        loss_1, step_1 = self.plain_step(self.batch(1))
        loss_2, step_2 = self.plain_step(self.batch(2))
        for level, value in loss.items():
            self.assertAlmostEqual(value, (loss_1[level] + loss_2[level]).item() / 2, places=5)
        for found, one, other in zip(step, step_1, step_2):
            torch.testing.assert_close(found, (one + other) / 2, rtol=1e-3, atol=1e-6)

    def test_a_scaler_leaves_the_step_alone_and_skips_one_that_overflows(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024)
        _, step = self.step(self.batch(1), scaler=scaler)
        _, expected = self.plain_step(self.batch(1))
        torch.testing.assert_close(step, [*expected], rtol=1e-3, atol=1e-6)
        plain = upernet.part_loss
        with mock.patch("upernet.part_loss", lambda *inputs: math.inf * plain(*inputs)):
            _, step = self.step(self.batch(1), scaler=scaler)
        self.assertFalse(any(value.any() for value in step))
        self.assertEqual(scaler.get_scale(), 512)

    def test_no_decay_on_biases_and_norms(self):
        net = small_net()
        decays = {module.weight for module in net.modules() if isinstance(module, nn.Conv2d)}
        decayed, others = train.parameter_groups(net)
        self.assertEqual((decayed["weight_decay"], others["weight_decay"]), (1e-4, 0))
        self.assertEqual(set(decayed["params"]), decays)
        self.assertEqual(set(others["params"]), set(net.parameters()) - decays)

    def test_mixed_precision_depends_on_the_gpu(self):
        for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
            with mock.patch("torch.cuda.get_device_capability", return_value=capability):
                self.assertEqual(datasets.pick_amp("auto", torch.device("cuda")), expected)
        self.assertIsNone(datasets.pick_amp("auto", torch.device("cpu")))


# ---------------------------------------------------------------- a whole run
class TestTraining(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.out = new_folder()
        argv = (*toy(6, 2), "--accumulate", 2)
        _, cls.said = trained(*argv, "--eval-every", 2, out=cls.out)
        cls.checkpoint = join(cls.out, "ckpt.pt")

    def test_files_and_the_log(self):
        files = ["best.pt", "ckpt.pt", "curves.png", "log.jsonl", "metrics.json", "pictures"]
        self.assertEqual(sorted(os.listdir(self.out)), files)
        levels = {"ade20k": {"scene", "object", "part"}, "os": {"material"}, "dtd": {"texture"}}
        keys = {"stage", "iteration", "source", "lr", "loss", "seconds"}
        log = read_log(self.out)
        steps = [("main", k) for k in range(6)] + [("texture", 0), ("texture", 1)]
        self.assertEqual([(line["stage"], line["iteration"]) for line in log], steps)
        for k, line in enumerate(log):
            validated = {"metrics"} if k in (1, 3, 5) else set()  # the last is metrics.json
            self.assertEqual(set(line), keys | validated)
            self.assertEqual(set(line["loss"]), levels[line["source"]])
        # The texture stage has a policy of its own.
        np.testing.assert_allclose(log[3]["lr"], 0.04 * (3 / 6) ** 0.9)
        np.testing.assert_allclose(log[7]["lr"], 0.04 * (1 / 2) ** 0.9)
        objects = checkpoint_of(self.out)["vocabulary"]["object"]
        self.assertEqual(list(log[1]["metrics"]["object"]["iou"]), objects)

    def test_the_checkpoint(self):
        content = checkpoint_of(self.out)
        keys = "model network vocabulary optimizer scaler stage iteration best split trained"
        self.assertEqual(set(content), {*keys.split(), "arguments"})
        self.assertEqual(content["stage"], "done")
        for level, n in {"scene": 4, "object": 10, "part": 4, "material": 6, "texture": 8}.items():
            self.assertGreaterEqual(len(content["vocabulary"][level]), n)
        for source, images in content["split"].items():
            self.assertFalse(set(images) & set(content["trained"][source]))
        self.assertEqual(len(content["trained"]["dtd"]), 22)

    def test_evaluate_finds_the_metrics_of_the_last_and_of_the_best(self):
        metrics = read_json(self.out, "metrics.json")
        self.assertEqual(evaluated(self.checkpoint)[0], metrics)
        self.assertEqual(set(metrics), set(upernet.LEVELS))
        validated = [line["metrics"] for line in read_log(self.out) if "metrics" in line]
        best = max(self.mean_of_levels(scores) for scores in [*validated, metrics])
        parts, _ = evaluated(self.checkpoint, "--levels", "part", "--pictures", new_folder())
        self.assertEqual(parts, {"part": metrics["part"]})
        path = join(self.out, "best.pt")
        self.assertAlmostEqual(self.mean_of_levels(evaluated(path)[0]), best)
        self.assertAlmostEqual(torch.load(path, weights_only=True)["best"], best)
        self.assertRegex(self.said, f"best.pt.*{best:.2%}")

    def mean_of_levels(self, metrics: dict) -> float:
        scores = [metrics[level]["top1"] for level in ("scene", "texture")]
        scores += [metrics[level]["mean_iou"] for level in ("object", "material")]
        return np.mean([*scores, metrics["part"]["mean_iou_bg"]])

    def test_only_the_path_of_an_iterations_source_moves(self):
        """The whole state is compared from step to step."""
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

        argv = (*toy(6, 2), "--sizes", 64)
        for amp in ("bf16", "off"):
            states.clear()
            with self.subTest(amp=amp), mock.patch("train.update", recorded):
                out, _ = trained(*argv, "--amp", amp)
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
        for names, source in (
            ("object", "ade20k"),
            ("object,part", "ade20k"),
            ("material", "os"),
            ("texture", "dtd"),
        ):
            levels = set(names.split(","))
            out, _ = trained(*toy(2, 2), "--levels", names)
            log = read_log(out)
            content = checkpoint_of(out)
            heads = [key.split(".")[1] for key in content["model"] if key.startswith("heads.")]
            metrics = read_json(out, "metrics.json")
            for found in (heads, log[0]["loss"], content["vocabulary"], metrics):
                self.assertEqual(set(found), levels)
            self.assertEqual([line["source"] for line in log], [source, source])

    def test_crops_are_squares(self):
        for batch in batches_of(*toy(4), "--crop", 64):
            self.assertEqual(batch.images.shape, (2, 3, 64, 64))

    def test_the_log_is_strict_json_where_fp16_overflows(self):
        with mock.patch("train.update", return_value={"object": math.inf, "scene": math.nan}):
            out, _ = trained(*toy(1), "--amp", "fp16")
        self.assertEqual(read_log(out)[0]["loss"], {"object": None, "scene": None})

    def test_readers_return_no_tensors(self):
        """These would take shared memory, of which containers have little."""
        items = []
        plain = torch.utils.data.DataLoader.__iter__

        def recorded(loader):
            for item in plain(loader):
                items.append(item)
                yield item

        root = coloured("a", "b", images=5)
        with mock.patch("torch.utils.data.DataLoader.__iter__", recorded):
            trained(*OWN, "--root", root, "--iters", 3, "--workers", 2)
        self.assertEqual(len(items), 5 + 3 + 1)  # of the scan, of training, of the validation
        self.assertNotIn("tensor(", repr(items))


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


def started(text: str, *argv, processes: int = 0, restarts: int = 0):
    """A script that runs beside this one, under torchrun if it has several processes."""
    script = write(join(new_folder(), "script.py"), PREAMBLE + text)
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [*launcher, script, *map(str, argv)],
        env={**os.environ, "PYTHONPATH": HERE},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestResume(unittest.TestCase):
    def test_signals_finish_the_iteration_and_save(self):
        """In the middle of a stage, in its last iteration, in the texture stage; at first without
        a checkpoint to resume."""
        handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
        self.addCleanup(signal.signal, signal.SIGHUP, handler)
        argv = (*toy(5, 3), "--save-every", 100)
        whole, _ = trained(*argv)
        stopped = join(new_folder(), "b c")
        plain = upernet.losses
        for number, iteration, stage in (
            (signal.SIGTERM, 2, "main"),
            (signal.SIGHUP, 3, "main"),
            (signal.SIGINT, 5, "main"),
            (signal.SIGUSR1, 2, "texture"),
        ):

            def interrupted(*arguments):
                if log_lines(stopped) == iteration - 1 + 5 * (stage == "texture"):
                    os.kill(os.getpid(), number)
                return plain(*arguments)

            with mock.patch("upernet.losses", interrupted):
                status, said, _ = command(train.main, *argv, "--resume", "--out", stopped)
            content = checkpoint_of(stopped)
            self.assertEqual(status, 128 + number)
            self.assertEqual((content["iteration"], content["stage"]), (iteration, stage))
            self.assertIn(f"--resume --out '{stopped}'", said)
        trained("--resume", out=stopped)
        assert_same_run(whole, stopped)

    def test_a_closed_terminal_does_not_end_what_nohup_started(self):
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, handler)
        with train.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        self.assertEqual(signals.received, 0)

    def test_a_second_signal_after_two_seconds_ends_an_iteration_that_hangs(self):
        run = started(HANGS, *toy(9), "--out", new_folder())
        self.assertTrue(any("hangs" in line for line in run.stdout))
        began = time.monotonic()
        self.addCleanup(run.kill)
        while run.poll() is None and time.monotonic() - began < 30:  # to groups they come twice
            run.send_signal(signal.SIGINT)
            time.sleep(0.2)
        self.assertGreater(time.monotonic() - began, 2)
        self.assertLess(time.monotonic() - began, 30)
        self.assertEqual((run.returncode, run.communicate()[1]), (-signal.SIGINT, ""))

    def test_a_kill_and_a_signal_to_the_group_resume_bit_for_bit(self):
        """Of crops, with a process that reads images, which the signal reaches too and which ends
        after the kill; without one it is the same."""
        argv = (*toy(12, 8), "--crop", 256, "--save-every", 2)
        whole, _ = trained(*argv)
        stopped = new_folder()
        for number, expected in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
            lines = log_lines(stopped)
            argv = (*argv, "--workers", 1, "--resume", "--out", stopped)
            run = started("train.main()", *argv)
            while run.poll() is None and log_lines(stopped) <= lines + 2:
                time.sleep(0.01)
            if number == signal.SIGKILL:
                run.kill()
            else:
                os.killpg(run.pid, number)
            _, err = run.communicate(timeout=60)  # until no process has its stderr
            self.assertEqual((err, run.returncode), ("", expected))
        content = checkpoint_of(stopped)
        done = content["iteration"] + 12 * (content["stage"] == "texture")
        self.assertEqual(done, len(steps_of(stopped)))
        trained("--resume", out=stopped)
        assert_same_run(whole, stopped)

    def test_the_best_network_stays_where_the_log_was_lost(self):
        argv = (*toy(4), "--eval-every", 1, "--save-every", 1)
        with mock.patch("evaluate.evaluate", return_value={"scene": {"top1": 0.9}}):
            out = killed(*argv)
        best = Path(out, "best.pt").read_bytes()
        os.remove(join(out, "log.jsonl"))
        with mock.patch("evaluate.evaluate", return_value={"scene": {"top1": 0.1}}):
            trained(*argv, "--resume", out=out)
        self.assertEqual(checkpoint_of(out)["best"], 0.9)
        self.assertEqual(Path(out, "best.pt").read_bytes(), best)

    def test_a_full_disk_leaves_the_last_good_checkpoint(self):
        out = killed(*toy(4), "--save-every", 1)
        path = Path(out, "ckpt.pt")
        good = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGXFSZ, handler)
        log = Path(out, "log.jsonl")
        for file, limit in ((log, log.stat().st_size + 9), (path, len(good) // 2)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            refused(str(file), train.main, "--resume", "--out", out)
            self.assertEqual(path.read_bytes(), good)
            self.assertFalse(list(Path(out).glob(".*")))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        trained("--resume", out=out)  # whose log has a line that was cut off
        self.assertEqual(checkpoint_of(out)["stage"], "done")

    def test_out_of_memory_is_one_line_and_a_mistake_of_ours_a_traceback(self):
        argv = (*toy(2), "--batch-size", 4)
        killed = "DataLoader worker (pid 9) is killed by signal: Bus error"
        for text in ("CUDA out of memory. Tried", killed):
            out = new_folder()
            with mock.patch("upernet.losses", side_effect=RuntimeError(text)):
                refused("--batch-size", train.main, *argv, "--out", out)
        trained("--resume", "--batch-size", 2, "--accumulate", 2, out=out)
        self.assertEqual(log_lines(out), 2)
        self.assertEqual(checkpoint_of(out)["arguments"]["batch_size"], 2)
        out = new_folder()
        with mock.patch("upernet.losses", side_effect=RuntimeError("a mistake of ours")):
            self.assertRaises(RuntimeError, command, train.main, *argv, "--out", out)

    def test_errors_end_the_processes_that_read_too(self):
        """Of the program's own with a traceback, of the user's with one line."""
        failing = "def failing(*_):\n    raise datasets.UserError('a mistake')\n\n"
        for text, status in (("train.update = None", 1), (f"{failing}train.update = failing", 2)):
            argv = (*toy(9), "--crop", 256, "--workers", 1, "--out", new_folder())
            run = started(f"{text}\ntrain.main()", *argv)
            _, err = run.communicate(timeout=60)
            self.assertEqual(run.returncode, status)
            self.assertEqual(err == "train.py: a mistake\n", status == 2, err)

    def test_what_is_not_finite_ends_the_run_and_is_not_written(self):
        out = new_folder()
        path = join(out, "ckpt.pt")

        def diverge(model, *_):
            model.backbone.bn1.running_var.fill_(math.inf)
            return {"material": 1.0}

        for failure in (
            mock.Mock(return_value={"material": math.inf}),
            mock.Mock(return_value={"material": math.nan}),
            diverge,
        ):
            shutil.rmtree(out, ignore_errors=True)
            with mock.patch("train.update", failure):
                refused(path, train.main, *toy(1), "--out", out)
            self.assertEqual(checkpoint_of(out)["iteration"], 0)
            upernet.load(path)

    def test_a_run_that_is_there_and_changed_data_or_options_are_refused(self):
        root = coloured("a", "b", images=8)
        argv = (*OWN, "--root", root, "--iters", 3)
        out = killed(*argv, "--save-every", 1)
        refused(out, train.main, *argv, "--out", out)
        for option, value in (("--lr", 5), ("--sizes", 96), ("--split", "official")):
            refused(option, train.main, "--resume", "--out", out, option, value)
        for name in ("images/training/1.jpg", "annotations/training/1.png"):
            shutil.copy(join(root, name), join(root, name.replace("1", "9")))
        refused(out, train.main, "--resume", "--out", out)


TOGETHER = """
def compared(model, *rest):
    loss = update(model, *rest)
    sums = [None, None]
    dist.all_gather_object(sums, [p.double().sum().item() for p in model.parameters()])
    print("weights alike" if sums[0] == sums[1] else "weights differ")
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
if restarted and os.environ["RANK"] == "1":
    time.sleep(2)  # the first must not find its old address

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


class TestProcesses(unittest.TestCase):
    """torchrun with two processes. The run `whole` is what others are compared with."""

    @classmethod
    def setUpClass(cls):
        cls.argv = (*toy(8, 2), "--save-every", 2, "--resume")
        cls.whole = new_folder()
        run = started(TOGETHER, *cls.argv, "--out", cls.whole, processes=2)
        cls.said, cls.err = run.communicate()

    def test_they_have_the_same_weights_and_one_prints(self):
        self.assertEqual(self.said.count("weights alike"), 10, self.err)
        self.assertNotIn("weights differ", self.said)
        self.assertEqual(self.said.count("main stage: "), 1)
        self.assertEqual((log_lines(self.whole), checkpoint_of(self.whole)["stage"]), (10, "done"))

    def test_two_processes_of_two_have_the_gradient_of_one_of_four(self):
        """With batch norm in eval mode and every pixel labelled."""
        self.assertEqual(self.err.count("same gradient"), 2, self.err)

    def test_their_metrics_are_those_of_one(self):
        """No image is counted twice, in train.py and in evaluate.py."""
        alone, _ = evaluated(join(self.whole, "ckpt.pt"))
        for name in ("metrics.json", "shared.json"):
            self.assertEqual(read_json(self.whole, name), alone)

    def test_a_group_is_restarted_after_a_kill_and_stopped_and_resumed_by_hand(self):
        out = new_folder()
        run = started(KILLED, *self.argv, "--out", out, processes=2, restarts=1)
        said, err = run.communicate()
        self.assertRegex(err, r"exitcode *: -9\b")  # torchrun's report of the one that was killed
        self.assertIn(f"--resume --out {out}", said, err)
        content = checkpoint_of(out)
        done = content["iteration"] + 8 * (content["stage"] == "texture")
        self.assertEqual(done, len(steps_of(out)))
        self.assertIn(done, (6, 7, 8, 9))
        started("train.main()", "--resume", "--out", out, processes=2).communicate()
        assert_same_run(self.whole, out)


# ---------------------------------------------------------------- data and weights of one's own
class TestOwnRuns(unittest.TestCase):
    def test_few_images_train_to_the_end_and_from_two_on_one_validates(self):
        for count in (5, 2, 1):
            root = own_data(*count * [columns(1, 2, 1, 2)], classes="猫\nсобака")
            argv = (*OWN, "--root", root, "--iters", 2, "--texture-iters", 3)
            out, _ = trained(*argv)
            content = checkpoint_of(out)
            validates = 1 if count > 1 else 0
            self.assertEqual(len(content["split"]["ade20k"]), validates)
            self.assertEqual(len(content["trained"]["ade20k"]), count - validates)
            self.assertEqual(os.path.exists(join(out, "metrics.json")), count > 1)
            before = Path(out, "ckpt.pt").read_bytes()
            self.assertIn("finished", trained(*argv, "--resume", out=out)[1])
            self.assertEqual(Path(out, "ckpt.pt").read_bytes(), before)

    def test_images_without_a_label_and_long_strips_are_counted(self):
        strip = np.ones((60, 4000))
        strip[:, :9] = 2
        masks = [strip] * 3 + [strip[:, :80]] * 3 + [0 * strip[:, :80]]
        root = own_data(*masks)
        out, said = trained(*OWN, "--root", root, "--iters", 1)
        self.assertRegex(said, "(?m)^ade20k: 1 .*label")
        strips = {f"images/training/{k}.jpg" for k in range(3)}
        count = len(strips & set(checkpoint_of(out)["trained"]["ade20k"]))
        self.assertRegex(said, f"(?m)^{count} of .*--max-size.*--crop")
        root = own_data(strip, strip)
        argv = (*OWN, "--root", root, "--out", new_folder())
        refused("--max-size.*--crop", train.main, *argv)

    def test_an_official_split_trains_on_no_test_folder(self):
        root = coloured("a", "b", images=10)
        for name in ("images/training/0.jpg", "annotations/training/0.png"):
            os.renames(join(root, name), join(root, name.replace("training", "test")))
        argv = (*OWN, "--root", root, "--iters", 0)
        for split, images in (("official", 7), ("balanced", 9)):  # balanced: of all folders
            out, said = trained(*argv, "--split", split)
            self.assertEqual(split == "balanced", "--split official" in said)  # sides are mixed
            names = checkpoint_of(out)["trained"]["ade20k"]
            self.assertEqual(len(names), images)
            self.assertEqual(split == "balanced", "images/test/0.jpg" in names)
        trained(*toy(0), "--split", "official")  # OpenSurfaces has none

    def test_left_and_right(self):
        """Masks whose left half is class 0. Without --no-flip half of the images are mirrored."""
        root = own_data(*4 * [columns(1, 1, 2, 2)], classes="left hand\nRight hand")
        argv = (*OWN, "--root", root, "--iters", 8)
        for options, least, most in ((["--no-flip"], 0, 0), ([], 4, 12)):  # of 16
            maps = [batch.labels["object"] for batch in batches_of(*argv, *options)]
            mirrored = (np.concatenate(maps)[:, 8, 0] == 1).sum()
            self.assertTrue(least <= mirrored <= most)
            _, said = trained(*argv, *options)
            self.assertEqual("--no-flip" in said, not options)


class TestStart(unittest.TestCase):
    """--weights with a file. Runs of no iteration keep what they started with."""

    @classmethod
    def setUpClass(cls):
        cls.root = coloured(*[f"thing {k}" for k in range(11)])
        network = ("--stem", "deep", "--no-head-conv", "--seed", 1)
        argv = (*OWN, "--root", cls.root, *network, "--levels", "object", "--min-images", 7)
        cls.out, _ = trained(*argv, "--iters", 1)
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

    def test_ours_brings_its_data_if_none_are_given(self):
        ours = self.begun("--weights", self.path)
        for key in ("data", "root", "levels", "min_images", "sizes"):
            self.assertEqual(ours["arguments"][key], self.theirs["arguments"][key])
        for key in ("split", "trained"):
            self.assertEqual(ours[key], self.theirs[key])
        self.assertNotIn("have trained", self.said)

    def test_validation_images_that_trained_it_are_counted_and_stay_known(self):
        trained_by = set(self.theirs["trained"]["ade20k"])
        self.assertEqual(len(trained_by), 18)
        root = shutil.copytree(self.root, join(new_folder(), "split"))
        split = read_json(root, "split.json")
        split["sources"]["ade20k"]["validation"] = sorted(trained_by)[:3]
        write(join(root, "split.json"), json.dumps(split))
        data = ("--data", "ade20k", "--root", root)
        ours = self.begun(*data, "--weights", self.path)
        self.assertRegex(self.said, r"(?m)^ade20k: 3 .*trained")
        self.assertEqual(len(ours["trained"]["ade20k"]), 20)

    def test_mmsegmentations(self):
        network = {"classes": {"object": 3}, "backbone": "resnet18", "channels": 8}
        (path,), state = released_files("mmseg", 5, {"CLASSES": ["a", "b", "c"]}, **network)
        data = ("--data", "ade20k", "--root", coloured("new", "c"), "--weights", path)
        ours = self.begun(*data, "--sizes", 64)
        network = upernet.load_mmseg(path)[0].network
        for key in ("backbone", "channels", "stem", "pool", "head_conv"):
            self.assertEqual(ours["network"][key], network[key])
        for key, value in state.items():
            loaded = ours["model"][key]
            if "classifier" in key:
                loaded, value = loaded[1], value[2]
            self.assertTrue(torch.equal(loaded, value), key)

    @mock.patch.dict("resnet.BLOCKS", {18: (2, 2, 2, 2)})
    def test_a_backbone_as_most_are_saved(self):
        theirs = torchvision.models.resnet18().state_dict()
        path = join(new_folder(), "weights.pth")
        for under, prefix in (("", ""), ("model", "backbone."), ("state_dict", "module.backbone.")):
            state = {f"{prefix}{key}": value for key, value in theirs.items()}
            torch.save({under: state, "epoch": 3} if under else state, path)
            ours = self.begun(*OWN, "--root", self.root, "--weights", path)["model"]
            for key, value in theirs.items():
                if not key.startswith("fc."):
                    self.assertTrue(torch.equal(ours[f"backbone.{key}"], value), key)

    def test_damaged_imagenet_weights_are_named(self):
        home = new_folder()
        weights = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"]
        path = join(home, "hub", "checkpoints", os.path.basename(weights.url))
        argv = (*OWN, "--root", self.root, "--out", new_folder(), "--weights", "imagenet")
        for text in ("<html>log in first</html>", ""):
            write(path, text)
            with mock.patch.dict(os.environ, TORCH_HOME=home):
                refused(path, train.main, *argv)


# ---------------------------------------------------------------- mistakes
class RunsCode:
    """A pickled object that makes a folder when it is read."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestMistakes(unittest.TestCase):
    """Each is one line on stderr that names it, and status 2."""

    @classmethod
    def setUpClass(cls):
        cls.place = new_folder()
        cls.begun, _ = trained(*toy(1, 1))
        cls.checkpoint = join(cls.begun, "ckpt.pt")
        cls.new = (*toy(0), "--out", join(cls.place, "new"))

    def at(self, *names: str) -> str:
        return join(self.place, *names)

    def test_options_of_train(self):
        wrong = """--data ade --backbone vgg16 --weights nothing.pth --batch-size 0 --iters -3
            --fpn 1 --seed 1e30 --sizes 64,x --max-size 31 --crop 33 --device abacus
            --colour red --levels colour --levels part --min-images 100000""".split()
        for option, value in zip(wrong[::2], wrong[1::2]):
            name = "--min-" if option == "--min-images" else option
            refused(name, train.main, *self.new, option, value)
        argv = ("--data", "os", "--root", join(toy_root(), "toy"), "--levels", "scene")
        refused("--levels", train.main, *self.new, *argv)
        with mock.patch("resnet.load_imagenet", side_effect=OSError("no route to host")):
            refused("--weights none", train.main, *self.new, "--weights", "imagenet")
        self.assertFalse(os.path.exists(self.at("new", "ckpt.pt")))

    def test_options_of_the_other_scripts(self):
        ckpt = self.checkpoint
        photo = ("--photo", self.at("x.jpg"))
        for name, *argv in (
            ("--release",),
            ("--labels", "--release", self.at("a"), self.at("b")),
            ("before the options", *photo),
            ("nowhere", ckpt, "--data", "dtd", "--root", self.at("nowhere")),
            ("--json", ckpt, *photo, "--json", self.at("m.json")),
        ):
            refused(name, evaluate.main, *argv)
        refused("--fraction", balance_split.main, "--root", toy_root(), "--fraction", 2)

    def test_folders_and_tables(self):
        root = surfaces(self.at("surfaces"), ["wood"], [columns(1)])
        argv = ("--data", "os", "--root", root)
        occupied = write(self.at("occupied"), "a file")
        scan_refused(occupied, occupied, "os")
        refused(occupied, datasets.main, *argv, "--cache", occupied)
        table = join(root, "os", "label-substance-colors.csv")
        os.remove(table)
        scan_refused(table, root, "os")

    def test_files_that_are_no_checkpoints_and_no_code_in_them_runs(self):
        """In the three places where a checkpoint is read."""
        good = checkpoint_of(self.begun)
        ran = self.at("ran")
        files = {
            "half": Path(self.checkpoint).read_bytes()[:9999],
            "lacking": {"a": torch.zeros(3)},
            "code": {**good, "model": RunsCode(ran)},
            "option": {**good, "network": {**good["network"], "colour": 3}},
        }
        for name, content in files.items():
            path = self.at(name, "ckpt.pt")
            os.makedirs(self.at(name))
            if isinstance(content, bytes):
                Path(path).write_bytes(content)
            else:
                torch.save(content, path)
            refused(path, evaluate.main, path, "--levels", "scene")
            refused(path, train.main, "--resume", "--out", self.at(name))
            refused(path, train.main, *self.new, "--weights", path)
        self.assertFalse(os.path.exists(ran))

    def test_photos_that_cannot_be_read_are_named_and_the_others_parsed(self):
        good = save(noise(50, 80), self.at("good.jpg"))
        save(np.zeros((300, 300)), self.at("bomb.png"))
        Path(self.at("cut.jpg")).write_bytes(Path(good).read_bytes()[:-900])
        broken = [self.at("gone.jpg"), self.at("bomb.png"), self.at("cut.jpg")]
        out = self.at("pictures")
        argv = ("--photo", *broken, good, "--pictures", out)
        with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 20000):
            refused(".*".join(broken), evaluate.main, self.checkpoint, *argv)
        self.assertIn("good_upernet.png", os.listdir(out))

    def test_help_is_short(self):
        for script in (train, evaluate, balance_split, datasets):
            with mock.patch.dict(os.environ, COLUMNS="110"):
                status, said, _ = command(script.main, "--help")
            self.assertEqual(status, 0)
            self.assertLessEqual(said.count("\n"), 40, script.__name__)


# ---------------------------------------------------------------- real images
@unittest.skipUnless(os.path.isdir(join(SHARED, "data")), "the real samples are not here")
class TestRealSamples(unittest.TestCase):
    def test_they_are_scanned_trained_on_and_evaluated(self):
        root = new_folder()
        ade = join("ADE20K_2021_17_01", "images", "ADE")
        sample = join(SHARED, "data", "ade20k_2021_sample", ade, "training")
        for side in ("training", "validation"):
            shutil.copytree(sample, join(root, "ade20k", ade, side))
        shutil.copytree(join(SHARED, "data", "dtd_sample"), join(root, "dtd"))
        argv = ["--root", root, "--min-images", 1, "--min-pixels", 1, "--min-part-images", 1]
        argv += ["--data", "ade20k,dtd", "--min-scene-images", 1]
        self.assertIn("ade20k: 6 images", succeeded(datasets.main, *argv))
        argv = [*OWN, "--channels", 16, "--sizes", 96, *argv, "--split", "official"]
        out, _ = trained(*argv, "--iters", 8, "--texture-iters", 3)
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
