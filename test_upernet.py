"""The tests: `python test_upernet.py`, or pytest. Each compares with something independent: a plain loop, torchvision,
numpy's integration, the answers of the authors' network."""

import contextlib
import copy
import inspect
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import zlib
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import balance_split
import datasets
import evaluate
import train
import upernet
from datasets import Index, Reader, UserError
from resnet import ResNet, load_imagenet
from upernet import UPerNet

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(os.path.dirname(HERE), "shared")  # real samples; what needs them is skipped where they are not
LONG = os.environ.get("UPERNET_LONG") == "1"  # more kills
CLASSES = {"scene": 5, "object": 7, "part": {1: 3, 4: 2}, "material": 6, "texture": 4}

folder = None  # one for all tests, with the toy under data/


def setUpModule():
    global folder
    folder = tempfile.mkdtemp(prefix="upernet-test-")
    datasets.make_toy(os.path.join(folder, "data", "toy"))


def tearDownModule():
    shutil.rmtree(folder)


def new_folder(*names: str) -> str:
    """An empty folder of its own below the tests' one."""
    return tempfile.mkdtemp(dir=folder, prefix="-".join(names) + "-")


def command(main, *argv) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a script's main, called in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in argv])
            status = 0
        except SystemExit as e:
            status = e.code or 0
    return status, out.getvalue(), err.getvalue()


class Killed(BaseException):
    """Ends a run in the middle of a step, as a kill does."""


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def toy_arguments(root: str, **given) -> object:
    """The namespace that the scripts make of `--data toy`."""
    args = train.all_options().parse_args(["--root", root, "--out", new_folder("out")])
    train.complete(args)
    for key, value in given.items():
        setattr(args, key, value)
    return args


def save_jpeg(path: str, height: int, width: int, seed: int = 0) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)


def grey(path: str, shape: tuple, value: int = 0) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def write(path: str, text: str, encoding: str = "utf-8") -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding=encoding) as file:
        file.write(text)


def read_json(path: str):
    with open(path) as file:
        return json.load(file)


def read_log(path: str) -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


class Ade:
    """ADE20K 2021 as a folder that a test fills image by image."""

    def __init__(self):
        self.root = new_folder("ade")
        self.folder = os.path.join(self.root, "ade20k", "ADE20K_2021_17_01")
        self.count = 0

    def add(
        self,
        objects: np.ndarray,
        names: dict[int, str],
        scene: list[str],
        parts: np.ndarray | None = None,
        encoding="utf-8",
    ):
        """One image with its class numbers; `names` are those of the JSON."""
        stem = os.path.join(self.folder, "images", "ADE", "training", "a", "b", f"ADE_train_{self.count:08d}")
        self.count += 1
        save_jpeg(f"{stem}.jpg", *objects.shape)
        for ending, numbers in (("seg", objects), ("parts_1", parts)):
            if numbers is not None:
                coded = np.stack([numbers // 256 * 10, numbers % 256, numbers * 0], axis=-1).astype(np.uint8)
                Image.fromarray(coded).save(f"{stem}_{ending}.png")
        things = [{"name": name, "name_ndx": number, "parts": {"part_level": 0}} for number, name in names.items()]
        write(
            f"{stem}.json", json.dumps({"annotation": {"scene": scene, "object": things}}, ensure_ascii=False), encoding
        )
        return stem

    def index(self) -> Index:
        return datasets.scan(self.root, "ade20k", os.path.join(self.root, ".cache"))


def least(images=1, pixels=1, parts=1, scenes=1) -> dict[str, int]:
    return {"min_images": images, "min_pixels": pixels, "min_part_images": parts, "min_scene_images": scenes}


# ---------------------------------------------------------------- the network


class TestResNet(unittest.TestCase):
    def torchvision_pair(self, depth, **dilation):
        theirs = getattr(torchvision.models, f"resnet{depth}")(**dilation).eval()
        for module in theirs.modules():  # statistics of their own, or batch norm would hide mistakes
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        stride = 32 // 2 ** sum(dilation.get("replace_stride_with_dilation", ()))
        ours = ResNet(depth, output_stride=stride).eval()
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
        return ours, create_feature_extractor(theirs, [f"layer{i}" for i in range(1, 5)])

    def assert_same_features(self, ours, theirs, x):
        with torch.inference_mode():
            for mine, other in zip(ours(x), theirs(x).values(), strict=True):
                self.assertEqual(mine.shape, other.shape)
                self.assertLessEqual((mine - other).abs().max().item(), 1e-6 * other.abs().max().item())

    def test_stages_are_torchvisions(self):
        for depth in (18, 34, 50, 101):
            with self.subTest(depth=depth):
                ours, theirs = self.torchvision_pair(depth)
                self.assert_same_features(ours, theirs, torch.randn(1, 3, 70, 101))
                self.assertEqual([f.shape[1] for f in ours(torch.randn(1, 3, 64, 64))], ours.channels)

    def test_dilated_stages_are_torchvisions(self):
        for dilated in ([False, False, True], [False, True, True]):
            with self.subTest(dilated=dilated):
                ours, theirs = self.torchvision_pair(50, replace_stride_with_dilation=dilated)
                self.assert_same_features(ours, theirs, torch.randn(1, 3, 65, 97))

    def test_basic_blocks_keep_their_weights_and_spacing_at_stride_8(self):
        plain, dilated = ResNet(18).eval(), ResNet(18, output_stride=8).eval()
        dilated.load_state_dict(plain.state_dict())
        x = torch.randn(1, 3, 128, 128)
        with torch.inference_mode():
            coarse, fine = plain(x), dilated(x)
        self.assertEqual([f.shape[-1] for f in fine], [32, 16, 16, 16])
        torch.testing.assert_close(
            fine[2][:, :, ::2, ::2][:, :, 2:-2, 2:-2], coarse[2][:, :, 2:-2, 2:-2], rtol=1e-4, atol=1e-4
        )

    def test_an_impulse_spreads_in_the_steps_of_the_dilations(self):
        for depth, stride, stage, dilations in (
            (18, 16, "layer4", [1, 2, 2, 2]),
            (18, 8, "layer3", [1, 2, 2, 2]),
            (18, 8, "layer4", [2, 4, 4, 4]),
            (50, 16, "layer4", [1, 2, 2]),
            (50, 8, "layer3", [1, 2, 2, 2, 2, 2]),
            (50, 8, "layer4", [2, 4, 4]),
        ):
            layer = getattr(ResNet(depth, output_stride=stride), stage).eval()
            for p in layer.parameters():
                nn.init.constant_(p, 1 / 64)  # nothing cancels
            for name, p in layer.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(p)
            channels = next(layer.parameters()).shape[1]
            impulse = torch.zeros(1, channels, 1, 41)
            impulse[..., 20] = 1
            with torch.inference_mode():
                reached = set((layer(impulse)[0, 0, 0].nonzero().flatten() - 20).tolist())
            expected = {0}
            for d in dilations:
                expected = {offset + step for offset in expected for step in (-d, 0, d)}
            with self.subTest(depth=depth, stride=stride, stage=stage):
                self.assertEqual(reached, expected)

    def test_stops_at_the_stage_that_is_asked_for(self):
        net = ResNet(18)
        net.layer3.register_forward_hook(lambda *_: self.fail("layer3 was computed"))
        self.assertEqual(len(net(torch.randn(1, 3, 64, 64), last=3)), 2)

    def test_refuses_what_it_is_not(self):
        for wrong in ({"depth": 20}, {"stem": "3x3"}, {"output_stride": 4}):
            with self.assertRaises(ValueError):
                ResNet(**wrong)

    def test_imagenet_weights_are_torchvisions(self):
        theirs = torchvision.models.resnet18().state_dict()
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=theirs) as download, mock.patch(
            "torchvision.models._api.load_state_dict_from_url", download
        ):
            net = ResNet(18)
            load_imagenet(net)
        self.assertIn("resnet18", str(download.call_args))
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
        with self.assertRaises(ValueError):
            load_imagenet(ResNet(18, stem="deep"))


class TestNetwork(unittest.TestCase):
    def test_shapes_of_every_level(self):
        net = UPerNet(CLASSES, "resnet18", channels=16).eval()
        for size in ((32, 32), (64, 96), (65, 97), (33, 130)):
            with torch.inference_mode():
                logits = net(torch.rand(2, 3, *size))
            quarter = tuple(-(-n // 4) for n in size)
            expected = {"scene": (5,), "object": (7, *quarter), "part": (5, *quarter), "material": (6, *quarter)}
            expected |= {"texture": (4,), "texture_map": (4, *quarter)}
            self.assertEqual({k: tuple(v.shape) for k, v in logits.items()}, {k: (2, *v) for k, v in expected.items()})
        self.assertEqual(net.part_slices, {1: slice(0, 3), 4: slice(3, 5)})

    def test_computes_only_what_the_levels_need(self):
        net = UPerNet(CLASSES, "resnet18", channels=16).eval()
        ran = set()
        for name, module in net.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_, name=name: ran.add(name))

        def parts_of_net(levels):
            ran.clear()
            net(torch.rand(1, 3, 64, 64), levels=levels)
            return {prefix for prefix in prefixes if any(name.startswith(prefix) for name in ran)}

        body = [f"backbone.layer{i}" for i in range(1, 5)]
        prefixes = [*body, "ppm", "fpn.laterals", "fpn.convs.0", "fpn.convs.1", "fusion"] + [
            f"heads.{n}" for n in CLASSES
        ]
        down = {*body, "ppm", "fpn.laterals", "fpn.convs.0"}
        self.assertEqual(parts_of_net(["scene"]), {*body, "ppm", "heads.scene"})
        self.assertEqual(parts_of_net(["material"]), {*down, "heads.material"})
        self.assertEqual(parts_of_net(["object"]), {*down, "fpn.convs.1", "fusion", "heads.object"})
        self.assertEqual(parts_of_net(["part"]), {*down, "fpn.convs.1", "fusion", "heads.part"})
        self.assertEqual(parts_of_net(["texture"]), {"backbone.layer1", "heads.texture"})
        self.assertEqual(parts_of_net(None), set(prefixes))

    def test_a_levels_logits_do_not_depend_on_the_others(self):
        net = UPerNet(CLASSES, "resnet18", channels=16).eval()
        x = torch.rand(1, 3, 64, 96)
        with torch.inference_mode():
            together = net(x)
            for level in CLASSES:
                torch.testing.assert_close(net(x, levels=[level])[level], together[level])

    def test_parameter_names(self):
        net = UPerNet(CLASSES, "resnet18", channels=16)
        for name in net.state_dict():
            inside = [level for level in CLASSES if level in name]
            if name.startswith("heads."):
                self.assertEqual(inside, [name.split(".")[1]])
            else:
                self.assertEqual(inside, [])
                self.assertTrue(
                    name in ("mean", "std") or name.startswith(("backbone.", "ppm.", "fpn.", "fusion.")), name
                )

    def test_rows_of_table_2(self):
        quarter = (1, 9, 16, 24)
        for arguments, head_stride, c5_stride in (
            ({"ppm": False, "fpn": 4, "fusion": False}, 16, 32),
            ({"ppm": False, "fpn": 3, "fusion": False}, 8, 32),
            ({"ppm": False, "fpn": 2, "fusion": False}, 4, 32),
            ({"fpn": 2, "fusion": False}, 4, 32),
            ({"fpn": 2}, 4, 32),
            ({"fpn": 3}, 8, 32),
            ({"fpn": 4}, 16, 32),
            ({"ppm": False, "fpn": 0, "output_stride": 8}, 8, 8),  # DilatedNet
            ({"fpn": 0, "output_stride": 8, "pool": "adaptive"}, 8, 8),  # PSPNet
        ):
            with self.subTest(**arguments):
                net = UPerNet({"object": 9, "material": 3, "part": {2: 4}}, "resnet18", channels=16, **arguments)
                seen = {}  # what comes into a module
                for name, module in net.named_modules():
                    module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
                images = torch.rand(2, 3, 64, 96)
                logits = net(images)
                self.assertEqual(tuple(logits["object"].shape[1:]), quarter[1:])
                self.assertEqual(tuple(logits["material"].shape[2:]), quarter[2:])
                sum(v.sum() for v in logits.values()).backward()
                idle = [n for n, p in net.named_parameters() if p.grad is None]
                self.assertEqual(idle, [])
                self.assertEqual(seen["backbone"][1][-1].shape[2], 64 // c5_stride)
                self.assertEqual(seen["heads.object"][0].shape[2], 64 // head_stride)
                self.assertIs(seen["heads.part"][0], seen["heads.object"][0])
                self.assertEqual("ppm.branches.3.0" in seen, arguments.get("ppm", True))
                self.assertEqual("fusion.conv.1" in seen, arguments.get("fusion", True) and arguments["fpn"] > 0)
                on_objects_map = seen["heads.material"][0] is seen["heads.object"][0]
                self.assertEqual(on_objects_map, arguments != {"fpn": 2})  # only the whole network has another for it

    def test_works_on_another_backbone(self):
        class Foreign(nn.Module):
            channels = [8, 12, 16, 20]

            def __init__(self):
                super().__init__()
                self.stages = nn.ModuleList(nn.Conv2d(3, c, 1, 2 ** (i + 2)) for i, c in enumerate(self.channels))

            def forward(self, x):
                return [stage(x) for stage in self.stages]

        net = UPerNet(CLASSES, Foreign(), channels=16).eval()
        logits = net(torch.rand(1, 3, 64, 64))
        self.assertEqual(tuple(logits["object"].shape), (1, 7, 16, 16))
        self.assertEqual(set(net(torch.rand(1, 3, 64, 64), levels=["texture"])), {"texture", "texture_map"})

    def test_the_two_files_work_alone(self):
        place = new_folder("copied")
        shutil.copy(os.path.join(HERE, "upernet.py"), place)
        code = "import sys; sys.modules['torchvision'] = None; import torch, upernet; "
        code += "b = torch.nn.Identity(); b.channels = [3, 3, 3, 3]; b.forward = lambda x: [x[:, :, ::s, ::s] for s in (4, 8, 16, 32)]; "
        code += "print(tuple(upernet.UPerNet({'object': 5}, b, channels=8).eval()(torch.rand(1, 3, 64, 64))['object'].shape))"
        run = lambda code: subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
        self.assertEqual(run(code).stdout.strip(), "(1, 5, 16, 16)")
        shutil.copy(os.path.join(HERE, "resnet.py"), place)
        code = "import sys; sys.modules['torchvision'] = None; import torch, upernet; "
        code += "print(tuple(upernet.UPerNet({'scene': 4}, 'resnet18', channels=8).eval()(torch.rand(1, 3, 64, 64))['scene'].shape))"
        self.assertEqual(run(code).stdout.strip(), "(1, 4)")

    def test_single_image_of_64_pixels_trains(self):
        net = UPerNet(CLASSES, "resnet18", channels=16).train()
        self.assertEqual(tuple(net(torch.rand(1, 3, 64, 64))["scene"].shape), (1, 5))

    def test_texture_sends_no_gradient_into_the_backbone(self):
        net = UPerNet(CLASSES, "resnet18", channels=16).train()
        net(torch.rand(2, 3, 64, 64), levels=["texture"])["texture_map"].square().sum().backward()
        moved = {
            name.split(".")[0] + "." + name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None
        }
        self.assertEqual(moved, {"heads.texture"})

    def test_refuses_what_it_is_not(self):
        for wrong in (
            {"classes": {}},
            {"classes": {"colour": 3}},
            {"pool": "max"},
            {"fpn": 5},
            {"backbone": "vgg16"},
            {"backbone": "resnet9"},
        ):
            with self.subTest(**wrong), self.assertRaises(ValueError):
                UPerNet(**{"classes": {"object": 3}, "backbone": "resnet18", "channels": 8, **wrong})
        with self.assertRaisesRegex(ValueError, "no head for material"):
            UPerNet({"object": 3}, "resnet18", channels=8)(torch.rand(1, 3, 64, 64), levels=["material"])

    def test_initialisation(self):
        torch.manual_seed(0)
        net = UPerNet({"object": 50, "scene": 40, "texture": 30}, "resnet18", channels=64)
        for name, module in net.named_modules():
            if name.startswith("backbone."):
                continue
            if isinstance(module, nn.Conv2d):
                wanted = math.sqrt(2 / module.weight[0].numel())  # Kaiming, fan in
                self.assertAlmostEqual(module.weight.std().item() / wanted, 1, delta=0.08, msg=name)
            if isinstance(module, nn.BatchNorm2d):
                self.assertTrue((module.weight == 1).all() and torch.allclose(module.bias, torch.tensor(1e-4)), name)

    def test_texture_of_an_image_is_the_mean_over_its_map(self):
        logits = UPerNet(CLASSES, "resnet18", channels=8).eval()(torch.rand(2, 3, 40, 70), levels=["texture"])
        expected = [[np.mean(kind.detach().numpy()) for kind in image] for image in logits["texture_map"]]
        torch.testing.assert_close(logits["texture"], torch.tensor(np.array(expected)))


class TestElsewhere(unittest.TestCase):
    """The network in somebody else's hands."""

    def setUp(self):
        torch.manual_seed(0)
        self.net = UPerNet(CLASSES, "resnet18", channels=16).eval()
        self.images = torch.rand(1, 3, 64, 96)

    def assert_same(self, ours: dict, others: dict, tolerance=1e-5):
        self.assertEqual(ours.keys(), others.keys())
        for level, value in ours.items():
            self.assertLessEqual(
                (value - others[level]).abs().max().item(), tolerance * value.abs().max().item(), level
            )

    def test_examples_of_the_readme_run(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            examples = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
        self.assertGreaterEqual(len(examples), 2)
        for example in examples:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(example, {})
            promised = re.findall(r"print\(.*# (.*)", example)
            self.assertTrue(promised)
            for line, shapes in zip(said.getvalue().splitlines(), promised, strict=True):
                self.assertEqual(re.findall(r"\d+", line), re.findall(r"\d+", shapes))

    def test_export_at_a_fixed_size(self):
        with torch.inference_mode():
            exported = torch.export.export(self.net, (self.images,)).module()
            self.assert_same(self.net(self.images), exported(self.images))

    def test_compile(self):
        compiled = torch.compile(self.net, backend="aot_eager")  # what inductor is given, without a C++ compiler
        found = compiled(self.images)
        self.assert_same(self.net(self.images), found)
        sum(v.sum() for v in found.values()).backward()
        gradients = {name: p.grad.clone() for name, p in self.net.named_parameters()}
        self.net.zero_grad()
        sum(v.sum() for v in self.net(self.images).values()).backward()
        for name, p in self.net.named_parameters():
            error = (gradients[name] - p.grad).abs().max() / p.grad.abs().max()
            self.assertLessEqual(error.item(), 1e-3, name)

    def test_in_bfloat16(self):
        with torch.inference_mode():
            exact = self.net(self.images)
            rounded = self.net.bfloat16()(self.images.bfloat16())
        self.assertEqual({value.dtype for value in rounded.values()}, {torch.bfloat16})
        self.assert_same(exact, rounded, tolerance=0.1)

    def test_within_another_module_and_copied(self):
        whole = nn.Sequential(nn.Identity(), self.net)
        twin = copy.deepcopy(whole)
        twin.load_state_dict({key: value.contiguous() for key, value in whole.state_dict().items()})
        with torch.inference_mode():
            self.assert_same(self.net(self.images), whole(self.images))
            self.assert_same(self.net(self.images), twin(self.images))
            self.assert_same(self.net(self.images), whole.to(memory_format=torch.contiguous_format)(self.images))

    def test_docstrings_are_there(self):
        for thing in (
            UPerNet,
            UPerNet.forward,
            upernet.load,
            upernet.load_release,
            upernet.losses,
            ResNet,
            load_imagenet,
        ):
            self.assertGreater(len(inspect.getdoc(thing)), 100, thing)


class TestPooling(unittest.TestCase):
    def test_precise_roi_pooling_is_the_integral(self):
        x = torch.randn(1, 2, 5, 7, dtype=torch.float64)
        fine = 600  # midpoints for every sample; bins of a sixth end between them

        def means(n, bins):  # (bins, n): the mean of each sample's triangle over each bin
            t = (np.arange(n * fine) + 0.5) / fine
            triangles = np.maximum(0, 1 - np.abs(t[:, None] - np.arange(n)))
            return torch.from_numpy(triangles.reshape(bins, -1, n).mean(axis=1))

        for bins in (1, 2, 3, 6):
            expected = torch.einsum("bh,nchw,dw->ncbd", means(5, bins), x, means(7, bins))
            torch.testing.assert_close(upernet.prroi_pool(x, bins), expected, rtol=0, atol=1e-5)

    def test_last_bin_loses_what_lies_outside(self):
        pooled = upernet.prroi_pool(torch.ones(1, 1, 6, 6, dtype=torch.float64), 6)[0, 0, 0]
        torch.testing.assert_close(pooled, torch.tensor([1, 1, 1, 1, 1, 0.5], dtype=torch.float64))

    def test_adaptive_pooling_is_pytorchs(self):
        ppm = upernet.PPM(6, 4, "adaptive").eval()
        c5 = torch.rand(1, 6, 5, 7)
        pools = [nn.AdaptiveAvgPool2d(bins)(c5) for bins in (1, 2, 3, 6)]
        enlarged = [branch(F.interpolate(p, (5, 7), mode="bilinear")) for branch, p in zip(ppm.branches, pools)]
        torch.testing.assert_close(ppm(c5), ppm.last(torch.cat([c5, *enlarged], dim=1)))


class TestFusion(unittest.TestCase):
    """The rewritten fusion against the line that defines it."""

    def maps(self, dtype, batch, size, channels=12):
        torch.manual_seed(0)
        sizes = [size]
        for _ in range(3):
            sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
        return [torch.randn(batch, channels, *s, dtype=dtype) for s in sizes]

    def plain(self, fusion, maps):
        enlarged = [F.interpolate(p, maps[0].shape[2:], mode="bilinear", align_corners=False) for p in maps[1:]]
        return fusion.conv(torch.cat([maps[0], *enlarged], dim=1))

    def check(self, dtype, tolerance):
        for training in (True, False):
            for batch, size in ((1, (8, 8)), (2, (24, 32)), (3, (13, 19)), (2, (1, 9)), (1, (37, 5))):
                with self.subTest(training=training, batch=batch, size=size):
                    maps = self.maps(dtype, batch, size)
                    fusion = upernet.Fusion(4, 12).to(dtype).train(training)
                    results = []
                    for way in (fusion, lambda maps: self.plain(fusion, maps)):
                        inputs = [m.clone().requires_grad_() for m in maps]
                        y = way(inputs)
                        torch.manual_seed(1)
                        wanted = [*inputs, *fusion.parameters()]
                        results.append([y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), wanted)])
                    for ours, plain in zip(*results, strict=True):
                        error = (ours - plain).abs().max() / plain.abs().max()
                        self.assertLessEqual(error.item(), tolerance)

    def test_values_and_gradients_in_float64(self):
        self.check(torch.float64, 1e-10)

    def test_values_and_gradients_in_float32(self):
        self.check(torch.float32, 1e-5)

    def test_bf16_is_as_near_to_float32_as_the_plain_line(self):
        for size in ((24, 32), (31, 45)):
            maps = self.maps(torch.float32, 2, size, channels=64)
            fusion = upernet.Fusion(4, 64).eval()
            with torch.inference_mode():
                exact = self.plain(fusion, maps)
                with torch.autocast("cpu", torch.bfloat16):
                    ours, plain = (
                        (way(maps) - exact).abs().mean().item() for way in (fusion, lambda m: self.plain(fusion, m))
                    )
            self.assertGreater(plain, 0)
            self.assertLessEqual(ours, 1.5 * plain)

    def test_keeps_no_enlarged_map_for_the_backward_pass(self):
        kept = []
        maps = [m.requires_grad_() for m in self.maps(torch.float32, 1, (32, 32))]
        fusion = upernet.Fusion(4, 12)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            fusion(maps)
        self.assertIn((1, 12, 32, 32), kept)
        self.assertFalse([shape for shape in kept if len(shape) == 4 and shape[1] > 12 and shape[2:] == (32, 32)])


# ---------------------------------------------------------------- losses and metrics


def plain_cross_entropy(logits, label) -> float:
    logits = np.asarray(logits, np.float64)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])


class TestLosses(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)
        self.slices = {1: slice(0, 3), 4: slice(3, 5), 6: slice(5, 9)}

    def test_part_loss_is_the_plain_loop(self):
        logits = torch.randn(3, 9, 6, 7)
        objects = torch.randint(-1, 8, (3, 6, 7))
        objects[2][objects[2] == 4] = 0
        parts = torch.zeros_like(objects)
        for index, channels in self.slices.items():
            inside = objects == index
            parts[inside] = torch.randint(0, channels.stop - channels.start, (int(inside.sum()),))
        parts[1][objects[1] == 1] = 0  # object 1 has no part in image 1: not valid there
        parts[objects == 6] = 0  # and object 6 in none
        total = 0.0
        for index, channels in self.slices.items():
            pixels = []
            for n in range(3):
                here = [(y, x) for y in range(6) for x in range(7) if objects[n, y, x] == index]
                if any(parts[n, y, x] > 0 for y, x in here):
                    pixels += [plain_cross_entropy(logits[n, channels, y, x], int(parts[n, y, x])) for y, x in here]
            total += sum(pixels) / len(pixels) if pixels else 0
        self.assertGreater(total, 0)
        self.assertAlmostEqual(upernet.part_loss(logits, objects, parts, self.slices).item(), total, places=4)

    def test_part_loss_loops_over_present_objects_only(self):
        many = {index: slice(2 * index, 2 * index + 2) for index in range(300)}
        objects = torch.full((1, 4, 4), 7)
        objects[0, 0] = 5
        parts = (objects == 7).long()
        with mock.patch("upernet.mean_cross_entropy", wraps=upernet.mean_cross_entropy) as called:
            upernet.part_loss(torch.randn(1, 600, 4, 4), objects, parts, many)
        self.assertEqual(called.call_count, 1)

    def test_maps_ignore_unlabelled_pixels(self):
        logits, labels = torch.randn(2, 5, 4, 6), torch.randint(-1, 5, (2, 4, 6), dtype=torch.int16)
        expected = np.mean(
            [
                plain_cross_entropy(logits[n, :, y, x], int(labels[n, y, x]))
                for n in range(2) for y in range(4) for x in range(6) if labels[n, y, x] >= 0
            ]
        )  # fmt: skip
        found = upernet.losses({"material": logits}, {"material": labels}, {})["material"]
        self.assertAlmostEqual(found.item(), expected, places=5)

    def test_texture_is_judged_at_every_pixel(self):
        texture_map = torch.randn(2, 4, 3, 3)
        expected = np.mean(
            [
                plain_cross_entropy(texture_map[n, :, y, x], (2, 0)[n])
                for n in range(2)
                for y in range(3)
                for x in range(3)
            ]
        )
        labels = {"texture": torch.tensor([2, 0], dtype=torch.int16)}
        self.assertAlmostEqual(
            upernet.losses({"texture_map": texture_map}, labels, {})["texture"].item(), expected, places=5
        )

    def test_levels_without_a_label_cost_nothing_and_stay_in_the_graph(self):
        net = UPerNet({"scene": 3, "object": 4, "part": {1: 3}}, "resnet18", channels=8).train()
        logits = net(torch.rand(2, 3, 64, 64))
        labels = {
            "scene": torch.tensor([-1, -1]),
            "object": torch.full((2, 16, 16), -1),
            "part": torch.zeros(2, 16, 16),
        }
        loss = upernet.losses(logits, labels, net.part_slices)
        self.assertEqual({k: v.item() for k, v in loss.items()}, {"scene": 0, "object": 0, "part": 0})
        sum(loss.values()).backward()
        self.assertTrue(all(p.grad is not None and not p.grad.any() for p in net.parameters()))


class TestMetrics(unittest.TestCase):
    VOCABULARY = {
        "scene": ["beach", "street"],
        "object": ["wall", "car", "sky", "person"],
        "part": {"car": ["background", "wheel", "door"], "person": ["background", "head"]},
        "material": ["wood", "brick"],
        "texture": ["dotted", "banded", "grid"],
    }

    def test_maps_against_a_loop_over_pixels(self):
        rng = np.random.default_rng(0)
        metrics = evaluate.Metrics(self.VOCABULARY)
        pairs = []
        for n in range(3):
            truth = (
                rng.integers(-1, 3, (9, 11)) if n < 2 else np.full((4, 5), -1)
            )  # no person anywhere, the last one empty
            predicted = rng.integers(0, 4, truth.shape)
            metrics.add_map("object", torch.from_numpy(predicted), torch.from_numpy(truth))
            pairs += [(int(t), int(p)) for t, p in zip(truth.ravel(), predicted.ravel()) if t >= 0]
        results = metrics.results()["object"]
        self.assertAlmostEqual(results["pixel_accuracy"], sum(t == p for t, p in pairs) / len(pairs))
        iou = {}
        for k, name in enumerate(self.VOCABULARY["object"]):
            both = sum(t == k and p == k for t, p in pairs)
            either = sum(t == k or p == k for t, p in pairs)
            iou[name] = both / either if any(t == k for t, _ in pairs) else None
        self.assertIsNone(iou["person"])
        self.assertEqual(results["iou"], iou)
        self.assertAlmostEqual(results["mean_iou"], np.mean([v for v in iou.values() if v is not None]))

    def test_parts_against_a_loop_over_pixels(self):
        rng = np.random.default_rng(1)
        metrics = evaluate.Metrics(self.VOCABULARY)
        slices, widths = {1: slice(0, 3), 3: slice(3, 5)}, {1: 3, 3: 2}
        counted = {1: [], 3: []}
        for n in range(4):
            logits = torch.from_numpy(rng.standard_normal((5, 4, 5)))
            objects = torch.from_numpy(rng.integers(-1, 4, (16, 20)))
            parts = torch.zeros_like(objects)
            for index, width in widths.items():
                if not (n == 1 and index == 3):  # person without any annotated part in image 1: not judged there
                    inside = objects == index
                    parts[inside] = torch.from_numpy(rng.integers(0, width, int(inside.sum())))
            metrics.add_parts(logits, objects, parts, slices, (16, 20))
            full = F.interpolate(logits[None], (16, 20), mode="bilinear")[0].numpy()
            for index, channels in slices.items():
                if (parts[objects == index] > 0).any():
                    for y, x in np.argwhere((objects == index).numpy()):
                        counted[index].append((int(parts[y, x]), int(full[channels, y, x].argmax())))
        results = metrics.results()["part"]
        everything = counted[1] + counted[3]
        self.assertAlmostEqual(results["pixel_accuracy"], sum(t == p for t, p in everything) / len(everything))
        means = []
        for index, name in ((1, "car"), (3, "person")):
            iou = []
            for k in range(widths[index]):
                both = sum(t == k and p == k for t, p in counted[index])
                either = sum(t == k or p == k for t, p in counted[index])
                iou.append(both / either)
            self.assertEqual(list(results["iou"][name].values()), iou)
            means.append(np.mean(iou))
        self.assertAlmostEqual(results["mean_iou_bg"], np.mean(means))

    def test_tags(self):
        metrics = evaluate.Metrics(self.VOCABULARY)
        for predicted, truth in ((0, 0), (1, 0), (1, -1), (1, 1)):
            metrics.add_tag("scene", predicted, truth)
        self.assertEqual(metrics.results(), {"scene": {"top1": 2 / 3, "n": 3}})

    def test_nothing_labelled_is_null_in_json(self):
        metrics = evaluate.Metrics(self.VOCABULARY)
        metrics.add_map("material", torch.zeros(3, 3, dtype=torch.long), torch.full((3, 3), -1))
        metrics.add_tag("texture", 0, -1)
        metrics.add_parts(
            torch.zeros(5, 2, 2), torch.ones(4, 4).long(), torch.zeros(4, 4).long(), {1: slice(0, 3)}, (4, 4)
        )
        results = json.loads(json.dumps(metrics.results(), allow_nan=False))
        self.assertEqual(
            results["material"], {"pixel_accuracy": None, "mean_iou": None, "iou": {"wood": None, "brick": None}}
        )
        self.assertEqual(results["texture"], {"top1": None, "n": 0})
        self.assertIsNone(results["part"]["mean_iou_bg"])
        self.assertIn("-", evaluate.table(metrics.results()))

    def test_class_map_is_the_argmax_of_the_enlarged_logits(self):
        torch.manual_seed(0)
        for filled, padded, size in (
            ((64, 96), (64, 96), (100, 150)),
            ((50, 70), (64, 96), (333, 421)),
            ((45, 90), (64, 96), (20, 31)),
        ):
            logits = torch.randn(7, padded[0] // 4, padded[1] // 4, dtype=torch.float64)
            scale = (4 * size[0] / filled[0], 4 * size[1] / filled[1])
            bordered = F.pad(logits[None], (0, 1, 0, 1), mode="replicate")
            plain = F.interpolate(bordered, scale_factor=scale, mode="bilinear", recompute_scale_factor=False)
            plain = plain[0, :, : size[0], : size[1]].argmax(dim=0)
            self.assertTrue(torch.equal(evaluate.class_map(logits, filled, size), plain))

    def test_class_map_of_equals_and_of_what_is_not_finite(self):
        """The first of equal classes, however many are possible; rounded as PyTorch rounds all of them together."""
        torch.manual_seed(0)
        x = torch.randn(1, 30, 40)
        many, size = torch.cat([x - 9, x.repeat(7, 1, 1), x - 5]), (450, 600)
        for logits, size in (
            (x.repeat(7, 1, 1), size),
            (x.repeat(11, 1, 1), size),
            (x.repeat(3, 1, 1), size),
            (many, size),
            (many.permute(1, 2, 0).contiguous().permute(2, 0, 1), size),
            (torch.full((17, 16, 16), 0.1), (64, 64)),
            (1e4 + 1e-3 * torch.randn(60, 30, 40), size),
            ((3 * torch.randn(150, 30, 40)).mul(4).round() / 4, size),
            (torch.randn(150, 1, 1) * 1e38, (44, 62)),
        ):
            with self.subTest(shape=logits.shape, size=size):
                filled = tuple(4 * n for n in logits.shape[1:])
                plain = F.interpolate(logits.contiguous()[None], size, mode="bilinear")[0].argmax(dim=0)
                self.assertTrue(torch.equal(evaluate.class_map(logits, filled, size), plain))
        many[3, 5, 5] = math.nan
        self.assertEqual(tuple(evaluate.class_map(many, (120, 160), (450, 600)).shape), (450, 600))

    def test_class_map_is_exactly_pytorchs_where_nothing_is_padded(self):
        torch.manual_seed(0)
        rough, (coarse,) = torch.randn(40, 24, 32), 4 * torch.randn(1, 40, 4, 5)
        smooth = F.interpolate(coarse[None], (24, 32), mode="bicubic")[0]  # most classes are nowhere the best
        equal = smooth.clone()
        equal[1::2] = equal[::2]  # every class twice: the first one counts
        for logits in (rough, smooth, equal, rough[:, :1], rough[:, :, :1], rough[:1], smooth - 1e4):
            height, width = logits.shape[1:]
            for size in ((97, 131), (4 * height, 4 * width), (7, 300)):
                plain = F.interpolate(logits[None], size, mode="bilinear")[0].argmax(dim=0)
                ours = evaluate.class_map(logits, (4 * height, 4 * width), size)
                self.assertTrue(torch.equal(ours, plain))


# ---------------------------------------------------------------- data


class TestVocabulary(unittest.TestCase):
    def test_objects_need_images_and_pixels_after_merging(self):
        ade = Ade()
        names = {7: "car, auto", 8: "cars", 300: "wall", 9: "sky", 10: "dot"}
        for k in range(4):
            objects = np.full((40, 40), 300)
            objects[:10] = 9 if k < 2 else 0
            objects[10:20] = 7 if k % 2 else 8  # two images each of car and cars: four of the merged class
            objects[39, 39] = 10
            ade.add(objects, names, ["a", "street"])
        vocabulary = datasets.build_vocabulary({"ade20k": ade.index()}, least(images=3, pixels=100))
        self.assertEqual(vocabulary["object"], ["wall", "car"])  # sky is in two images, dot has four pixels

    def test_first_synonym_plural_and_sides(self):
        names = {
            1: "Building, edifice",
            2: "buildings",
            3: "bus",
            4: "box",
            5: "boxes",
            6: "berry",
            7: "berries",
            8: "glasses",
        }
        merged = datasets.merged_names(names, "ade20k")
        self.assertEqual(
            list(merged.values()), ["building", "building", "bus", "box", "box", "berry", "berry", "glasses"]
        )
        parts = datasets.merged_names({1: "left arm", 2: "right arm", 3: "arms", 4: "upright leg"}, "ade20k", part=True)
        self.assertEqual(list(parts.values()), ["arm", "arm", "arm", "upright leg"])

    def test_parts_are_kept_per_object_on_the_first_level(self):
        ade = Ade()
        names = {5: "car", 6: "house", 20: "left wheel", 21: "right wheel", 22: "door", 23: "knob"}
        for k in range(3):
            objects = np.full((40, 40), 5)
            objects[20:] = 6
            parts = np.zeros((40, 40), int)
            parts[0, :5], parts[1, :5], parts[25, :5] = 20, 21, 22
            if k == 0:
                parts[5, :5] = 22  # a car's door in a single image
            stem = ade.add(objects, names, ["street"], parts)
            deeper = np.full((40, 40, 3), 0, np.uint8)
            deeper[25, :2, 1] = 23
            Image.fromarray(deeper).save(f"{stem}_parts_2.png")
        index = ade.index()
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least(parts=2))
        self.assertEqual(vocabulary["part"], {"car": ["background", "wheel"], "house": ["background", "door"]})
        labels = Reader(index, vocabulary).labels(0)
        self.assertEqual(labels["part"][0, 0], 1)
        self.assertEqual(labels["part"][1, 4], 1)
        self.assertEqual(labels["part"][5, 0], 0)  # the car's list lacks the door: background
        self.assertEqual(labels["part"][25, 0], 1)
        everything = datasets.build_vocabulary({"ade20k": index}, least())
        self.assertEqual(everything["part"]["car"], ["background", "wheel", "door"])

    def test_scenes_are_the_most_specific_name(self):
        ade = Ade()
        for scene in (["outdoor", "urban", "Street"], ["outdoor", "street"], ["indoor", "misc"], [], ["attic"]):
            ade.add(np.full((40, 40), 5), {5: "wall"}, scene)
        index = ade.index()
        self.assertEqual(index.tags, ["street", "street", "", "", "attic"])
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least(scenes=2))
        self.assertEqual(vocabulary["scene"], ["street"])
        reader = Reader(index, vocabulary)
        self.assertEqual([reader.labels(i)["scene"] for i in range(5)], [0, 0, -1, -1, -1])

    def test_latin_1_names(self):
        ade = Ade()
        ade.add(np.full((40, 40), 5), {5: "café"}, ["street"], encoding="latin-1")
        ade.add(np.full((40, 40), 6), {6: "façade"}, ["street"])
        self.assertEqual(set(datasets.build_vocabulary({"ade20k": ade.index()}, least())["object"]), {"café", "façade"})

    def test_opensurfaces_merges(self):
        root = new_folder("surfaces")
        raw = [
            "Concrete",
            "Stone",
            "Plastic - clear",
            "Plastic - opaque",
            "Granite/Marble",
            "Carpet/Rug",
            "Fabric/Cloth",
            "Paper/Tissue",
        ]
        raw += ["Rubber/Latex", "Wood", "Sky", "Wood-painted", "Brick"]
        os.makedirs(os.path.join(root, "os", "photos-labels"))
        table = "substance_id,substance_name,red_color\n" + "".join(
            f"{100 + k},{n},{k}\n" for k, n in enumerate(raw, start=1)
        )
        write(os.path.join(root, "os", "label-substance-colors.csv"), table)
        for n in range(2):
            save_jpeg(os.path.join(root, "os", "photos", f"{n}.jpg"), 48, 64)
            labels = np.zeros((60, 65, 3), np.uint8)  # not the photo's size
            labels[:, :, 0] = np.arange(65) // 5 + 1
            if n == 1:
                labels[labels == 13] = 0  # brick is in one image alone
            Image.fromarray(labels).save(os.path.join(root, "os", "photos-labels", f"{n}.png"))
        index = datasets.scan(root, "os", os.path.join(root, ".cache"))
        self.assertEqual(index.broken, [])
        materials = datasets.build_vocabulary({"os": index}, least(images=2))["material"]
        self.assertEqual(
            materials, ["carpet", "fabric", "paper", "plastic", "polished stone", "rubber/latex", "stone", "wood"]
        )
        labels = Reader(index, {"material": materials}).labels(0)["material"]
        self.assertEqual(labels.shape, (60, 65))
        expected = [
            "stone",
            "stone",
            "plastic",
            "plastic",
            "polished stone",
            "carpet",
            "fabric",
            "paper",
            "rubber/latex",
            "wood",
            None,
            None,
            None,
        ]
        found = [materials[v] if (v := labels[3, 5 * k + 2]) >= 0 else None for k in range(13)]
        self.assertEqual(found, expected)

    def sceneparsing(self, with_scenes: bool) -> Index:
        root = new_folder("sceneparsing")
        top = os.path.join(root, "ade20k", "ADEChallengeData2016")
        write(
            os.path.join(top, "objectInfo150.txt"),
            "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t9\t1\twall\n2\t0.1\t9\t1\tbuilding, edifice   \n3\t0\t0\t0\tsky\n",
        )
        if with_scenes:
            write(os.path.join(top, "sceneCategories.txt"), "a street\nb misc\nc street\n")
        for name, part in (("a", "training"), ("b", "training"), ("c", "validation")):
            save_jpeg(os.path.join(top, "images", part, f"{name}.jpg"), 40, 60)
            os.makedirs(os.path.join(top, "annotations", part), exist_ok=True)
            labels = np.full((40, 60), 2, np.uint8)
            labels[:5] = 0
            Image.fromarray(labels).save(os.path.join(top, "annotations", part, f"{name}.png"))
        return datasets.scan(root, "ade20k", os.path.join(root, ".cache"))

    def test_ones_own_data_needs_no_scenes(self):
        index = self.sceneparsing(with_scenes=False)
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least())
        self.assertEqual(vocabulary, {"object": ["wall", "building", "sky"]})
        self.assertEqual(set(Reader(index, vocabulary).labels(0)), {"object"})

    def test_sceneparsing_classes_with_one_name_stay_apart(self):
        names = {1: "screen, door screen", 2: "wall", 3: "screen, silver screen", 4: "thing", 5: "thing"}
        self.assertEqual(datasets.table_names(names), ["screen, door screen", "wall", "screen, silver screen", "thing (4)", "thing (5)"])  # fmt: skip

    def test_a_part_named_background_is_the_background(self):
        ade = Ade()
        parts = np.zeros((20, 20), int)
        parts[:5], parts[5:8] = 8, 9
        ade.add(np.full((20, 20), 5), {5: "painting", 8: "background", 9: "frame"}, ["attic"], parts)
        vocabulary = datasets.build_vocabulary({"ade20k": ade.index()}, least())
        self.assertEqual(vocabulary["part"], {"painting": ["background", "frame"]})
        self.assertEqual(
            Reader(ade.index(), vocabulary).labels(0)["part"].max(axis=1)[:9].tolist(), [0] * 5 + [1] * 3 + [0]
        )

    def test_sceneparsing_has_its_own_table(self):
        index = self.sceneparsing(with_scenes=True)
        self.assertEqual(
            (index.layout, index.tags, index.official),
            ("sceneparsing", ["street", "", "street"], ["training", "training", "validation"]),
        )
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least(images=50, pixels=10**6, scenes=2))
        self.assertEqual(vocabulary, {"scene": ["street"], "object": ["wall", "building", "sky"]})
        labels = Reader(index, vocabulary).labels(0)["object"]
        self.assertEqual((labels[0, 0], labels[20, 20]), (-1, 1))


class TestScan(unittest.TestCase):
    def broken(self, main_argv, reasons: dict[str, str]) -> None:
        """Every one of the files named is set aside for its own reason, and a run on the rest goes on."""
        self.assertEqual(len(set(reasons.values())), len(reasons))
        status, _, err = command(datasets.main, *main_argv)
        self.assertEqual(status, 2)
        self.assertRegex(err.splitlines()[-1], "of its images are broken .* --allow-broken")
        status, said, err = command(datasets.main, *main_argv, "--allow-broken")
        self.assertEqual(status, 0, err)
        self.assertIn(f"{len(reasons)} of ", err)
        found = [line for line in said.splitlines() if re.search("jpg|png|json", line)]
        for file, reason in reasons.items():
            self.assertEqual(len([line for line in found if re.search(f"{file}.*: {reason}", line)]), 1, (file, found))
        self.assertEqual(len(found), len(reasons))

    def test_broken_files_of_ade20k_are_set_aside_with_their_reason(self):
        ade = Ade()
        stems = [ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"], np.zeros((40, 40), int)) for _ in range(17)]
        with open(f"{stems[0]}.jpg", "rb") as file:
            content = file.read()

        def write_bytes(path: str, value: bytes) -> None:
            with open(path, "wb") as file:
                file.write(value)

        def numbered(path: str, number: int) -> None:
            thing = {"name": "wall", "name_ndx": number}
            write(path, json.dumps({"annotation": {"scene": [], "object": [thing]}}))

        reasons = {}
        for k, (ending, change, reason) in enumerate(
            (
                (".jpg", lambda path: write_bytes(path, content[: len(content) // 2]), "OSError: .*runcated"),
                (".jpg", lambda path: write_bytes(path, b""), "UnidentifiedImageError"),
                (".jpg", os.remove, None),  # no image any more
                ("_seg.png", os.remove, "missing"),
                ("_seg.png", lambda path: write_bytes(path, b""), "UnidentifiedImageError.*_seg"),
                ("_seg.png", lambda path: grey(path, (40, 41, 3)), r"ValueError: \(40, 41\) pixels, its photo"),
                ("_seg.png", lambda path: grey(path, (40, 40, 3), 77), "class number 1869, which the tables do not"),
                ("_parts_1.png", lambda path: grey(path, (20, 40, 3)), r"ValueError: \(20, 40\) pixels"),
                ("_parts_1.png", lambda path: grey(path, (40, 40, 3), 30), "class number 798, which"),
                (".json", os.remove, None),
                (".json", lambda path: write(path, "{"), "JSONDecodeError"),
                (".json", lambda path: write(path, "[]"), "TypeError"),
                (".json", lambda path: write(path, "{}"), "KeyError"),
                (".json", lambda path: write(path, '{"annotation": {"scene": 3, "object": []}}'), "TypeError.*int"),
                (".jpg", lambda path: (os.remove(path), os.symlink(path, path)), None),
                (".json", lambda path: numbered(path, 10**13), r"ValueError: class number 10{13}$"),
            )
        ):
            change(f"{stems[k]}{ending}")
            if reason:
                reasons[f"{k:08d}{ending}"] = reason
        reasons["00000009.json"] = "missing$"
        self.broken(("--data", "ade20k", "--root", ade.root), reasons)
        index = datasets.scan(ade.root, "ade20k", os.path.join(ade.root, ".cache"), allow_broken=True)
        self.assertEqual(index.images, ["images/ADE/training/a/b/ADE_train_00000016.jpg"])

    def test_broken_files_of_the_other_layouts(self):
        root = new_folder("others")
        for layout, table in (
            ("os", ("label-substance-colors.csv", "substance_id,substance_name,red_color\n1,wood,5\n")),
            ("ade20k", ("objectInfo150.txt", "Idx\tName\n1\twall\n2\tsky\n")),
        ):
            write(os.path.join(root, layout, table[0]), table[1])
        for k in range(4):
            save_jpeg(os.path.join(root, "os", "photos", f"{k}.jpg"), 40, 40)
            save_jpeg(os.path.join(root, "ade20k", "images", "training", f"{k}.jpg"), 40, 40)
        grey(os.path.join(root, "os", "photos-labels", "0.png"), (64, 64, 3), 5)
        grey(os.path.join(root, "os", "photos-labels", "1.png"), (64, 64, 3), 6)
        write(os.path.join(root, "os", "photos-labels", "2.png"), "no picture")
        self.broken(
            ("--data", "os", "--root", root),
            {"1.png": "class number 6, which", "2.png": "UnidentifiedImageError", "3.png": "missing"},
        )
        annotations = os.path.join(root, "ade20k", "annotations", "training")
        grey(os.path.join(annotations, "0.png"), (40, 40), 2)
        grey(os.path.join(annotations, "1.png"), (40, 40), 3)
        grey(os.path.join(annotations, "2.png"), (40, 40, 3), 1)
        grey(os.path.join(annotations, "3.png"), (40, 20), 1)
        self.broken(
            ("--data", "ade20k", "--root", root),
            {
                "1.png": "class number 3, which",
                "2.png": "ValueError: mode RGB",
                "3.png": r"ValueError: \(40, 20\) pixels",
            },
        )

    def test_odd_but_whole_names_and_links(self):
        """Spaces, letters of any script, a folder that links to itself: read, and each file once."""
        root = new_folder("odd names")
        place = os.path.join(root, "dtd", "images", "gepünktelt 点")
        save_jpeg(os.path.join(place, "ein bild.jpg"), 40, 40)
        write(os.path.join(root, "dtd", "labels", "train1.txt"), "gepünktelt 点/ein bild.jpg\n")
        for name in ("val1", "test1"):
            write(os.path.join(root, "dtd", "labels", f"{name}.txt"), "")
        os.symlink(os.path.join(root, "dtd", "images"), os.path.join(place, "again"))
        index = datasets.scan(root, "dtd", os.path.join(root, ".cache"))
        self.assertEqual((index.images, index.tags), (["images/gepünktelt 点/ein bild.jpg"], ["gepünktelt 点"]))

    def test_one_broken_file_in_twenty_is_suffered(self):
        for broken, goes_on in ((1, True), (2, False)):
            ade = Ade()
            stems = [ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"]) for _ in range(20)]
            for stem in stems[:broken]:
                os.remove(f"{stem}_seg.png")
            argv = ("--data", "ade20k", "--root", ade.root, "--min-images", 1, "--min-pixels", 1)
            status, said, err = command(datasets.main, *argv)
            self.assertEqual((status == 0, "--allow-broken" in err), (goes_on, not goes_on), err)

    def test_parts_count_where_their_object_is_labelled(self):
        ade = Ade()
        objects, parts = np.zeros((40, 40), int), np.zeros((40, 40), int)
        objects[:20], parts[10:30] = 5, 6
        ade.add(objects, {5: "car", 6: "wheel"}, ["street"], parts)
        self.assertEqual(ade.index().parts.tolist(), [[0, 5, 6, 10 * 40]])

    def test_a_damaged_index_is_made_anew(self):
        ade = Ade()
        ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"])
        ade.index()
        path = os.path.join(ade.root, ".cache", "ade20k.index.pt")
        good = torch.load(path, weights_only=True)
        for damaged in ({**good, "objects": None}, {**good, "broken": None}, {}, [good]):
            torch.save(damaged, path)
            self.assertEqual(ade.index().objects.tolist(), [[0, 5, 1600]])

    def test_a_file_of_the_same_size_that_changed_is_noticed(self):
        ade = Ade()
        stem = ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"])
        self.assertEqual(ade.index().names, {5: "wall"})
        with open(f"{stem}.json", "r+") as file:
            content = file.read()
            file.seek(0)
            file.write(content.replace("wall", "door"))
        self.assertEqual(ade.index().names, {5: "door"})

    def test_a_changed_data_set_is_noticed_and_an_unchanged_one_not_read_again(self):
        ade = Ade()
        ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"])
        self.assertEqual(len(ade.index().images), 1)
        with mock.patch("datasets.scan_image", side_effect=AssertionError("read again")):
            self.assertEqual(len(ade.index().images), 1)
        ade.add(np.full((40, 40), 6), {6: "sky"}, ["street"])
        index = ade.index()
        self.assertEqual(len(index.images), 2)
        self.assertEqual(sorted(index.names.values()), ["sky", "wall"])


class TestToy(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        args = toy_arguments(os.path.join(folder, "data"))
        cls.indexes, minima = datasets.open_sources(args)
        cls.vocabulary = datasets.build_vocabulary(cls.indexes, minima)
        path = os.path.join(folder, "data", "toy", "split.json")
        cls.held = balance_split.balanced_validation(cls.indexes, cls.vocabulary, path)

    def test_has_what_it_promises(self):
        self.assertGreaterEqual(len(self.vocabulary["scene"]), 4)
        self.assertGreaterEqual(len(self.vocabulary["object"]), 10)
        self.assertGreaterEqual(len(self.vocabulary["part"]), 4)
        self.assertGreaterEqual(len(self.vocabulary["material"]), 6)
        self.assertGreaterEqual(len(self.vocabulary["texture"]), 8)
        self.assertEqual([index.broken for index in self.indexes.values()], [[], [], []])

    def test_colour_alone_does_not_solve_it(self):
        """Nearest mean colour, fitted on the training images: of pixels for objects and materials, of images for the rest."""
        for source, level, bound in (
            ("ade20k", "object", 0.3),
            ("os", "material", 0.3),
            ("ade20k", "scene", 0.5),
            ("dtd", "texture", 0.4),
        ):
            reader = Reader(self.indexes[source], self.vocabulary)
            n = len(self.vocabulary[level])
            total, pixels, confusion = np.zeros((n, 3)), np.zeros(n), np.zeros((n, n))
            for training in (True, False):
                means = total / np.maximum(pixels, 1)[:, None]
                for i, image in enumerate(reader.index.images):
                    if training == (image in self.held[source]):
                        continue
                    colours, labels = np.asarray(reader.photo(i), np.float64), reader.labels(i)[level]
                    if level in ("scene", "texture"):
                        colours, labels = colours.mean(axis=(0, 1))[None], np.array([labels])
                    else:
                        height, width = colours.shape[:2]
                        labels = labels[
                            np.arange(height)[:, None] * labels.shape[0] // height,
                            np.arange(width) * labels.shape[1] // width,
                        ]
                        colours, labels = colours[labels >= 0], labels[labels >= 0].astype(int)
                    if training:
                        pixels += np.bincount(labels, minlength=n)
                        total += np.stack([np.bincount(labels, c, minlength=n) for c in colours.T], axis=1)
                    else:
                        nearest = ((colours[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
                        confusion += np.bincount(labels * n + nearest, minlength=n * n).reshape(n, n)
            self.assertTrue(confusion.sum() and pixels.all())
            if level in ("scene", "texture"):
                score = confusion.trace() / confusion.sum()
            else:
                seen = confusion.sum(axis=1) > 0
                score = (confusion.diagonal() / (confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()))[
                    seen
                ].mean()
            with self.subTest(level=level):
                self.assertLess(score, bound)
                self.assertGreater(score, 0)

    def test_is_always_the_same(self):
        first, second = (datasets.toy_canvas(0, 7)[0] for _ in range(2))
        self.assertTrue((first.picture == second.picture).all() and (first.objects == second.objects).all())


class TestBatches(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        args = toy_arguments(os.path.join(folder, "data"))
        cls.indexes, minima = datasets.open_sources(args)
        cls.vocabulary = datasets.build_vocabulary(cls.indexes, minima)
        cls.readers = {source: Reader(index, cls.vocabulary) for source, index in cls.indexes.items()}
        for reader in cls.readers.values():
            reader.prepare(new_folder("prepared"), 96, 200)

    def test_sources_are_drawn_by_their_number_of_images(self):
        sizes = {"ade20k": {i: (3, 4) for i in range(300)}, "os": {i: (4, 3) if i % 3 else (3, 4) for i in range(100)}}
        plan = datasets.plan_batches(sizes, 4000, 2, seed=0)
        self.assertAlmostEqual(sum(source == "ade20k" for source, _ in plan) / 4000, 0.75, delta=0.03)
        self.assertTrue(all(len({sizes[s][i][0] > sizes[s][i][1] for i in images}) == 1 for s, images in plan))
        drawn = [i for s, images in plan for i in images if s == "ade20k"]
        self.assertEqual(sorted(drawn[:300]), list(range(300)))  # once each before any twice
        self.assertEqual(plan, datasets.plan_batches(sizes, 4000, 2, seed=0))
        self.assertNotEqual(plan, datasets.plan_batches(sizes, 4000, 2, seed=1))

    def batches(self, **arguments) -> datasets.Batches:
        plan = [("ade20k", [0, 3, 5, 6]), ("os", [0, 1, 2, 3]), ("dtd", [4, 5, 6, 7])]
        return datasets.Batches(self.readers, plan, [64, 80], 200, seed=3, **arguments)

    def test_workers_change_nothing(self):
        for one, other in zip(
            *(torch.utils.data.DataLoader(self.batches(), batch_size=None, num_workers=n) for n in (0, 2)), strict=True
        ):
            self.assertEqual(one.keys(), other.keys())
            for key, value in one.items():
                self.assertTrue(
                    torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
                )

    def test_ranks_and_accumulation_share_out_the_same_images(self):
        whole = self.batches()[0]["files"]
        shares = [self.batches(rank=rank, ranks=2)[0]["files"] for rank in range(2)]
        self.assertEqual(shares[0] + shares[1], whole)
        pieces = [self.batches(accumulate=2)[k]["files"] for k in range(2)]
        self.assertEqual(pieces[0] + pieces[1], whole)

    def test_ranks_and_accumulation_see_the_same_flips(self):
        whole = self.batches()[0]
        for shares in (
            [self.batches(rank=rank, ranks=2)[0] for rank in range(2)],
            [self.batches(accumulate=2)[k] for k in range(2)],
        ):
            for key, start in itertools.product(("images", "object", "scene"), (0, 2)):
                mine, all_of = shares[start // 2][key], whole[key][start : start + 2]
                for axis in range(1, mine.ndim):  # they are padded to the largest of their own
                    n = min(mine.shape[axis], all_of.shape[axis])
                    mine, all_of = mine.narrow(axis, 0, n), all_of.narrow(axis, 0, n)
                self.assertTrue(torch.equal(mine, all_of), key)

    def test_flips_differ_from_iteration_to_iteration(self):
        plan = [("ade20k", [0, 3, 5, 6])] * 6
        batches = datasets.Batches(self.readers, plan, [64], 200, seed=3)
        self.assertGreater(len({batches[k]["images"].numpy().tobytes() for k in range(6)}), 3)

    def test_damaged_labels_are_made_anew_or_named(self):
        cache, reader = new_folder("damaged"), self.readers["os"]
        reader = Reader(reader.index, self.vocabulary)
        path = os.path.join(cache, "os.labels.pt")
        reader.prepare(cache, 64, 100)
        good, first = torch.load(path, weights_only=True), reader.codes(0)
        for damaged in ({"key": good["key"]}, {**good, "packed": good["packed"][:100]}, [1]):
            torch.save(damaged, path)
            again = Reader(reader.index, self.vocabulary)
            again.prepare(cache, 64, 100)
            self.assertTrue(np.array_equal(again.codes(0), first))
        good["packed"][good["ends"][0] // 2] ^= 255
        torch.save(good, path)
        again = Reader(reader.index, self.vocabulary)
        again.prepare(cache, 64, 100)
        with self.assertRaisesRegex(UserError, "os.labels.pt: damaged .*; delete it"):
            again.codes(0)

    def test_shapes_types_and_padding(self):
        scenes, photos, textures = (self.batches()[k] for k in range(3))
        for batch in (scenes, photos):
            self.assertEqual(batch["images"].dtype, torch.uint8)
            self.assertTrue(all(n % 32 == 0 for n in batch["images"].shape[2:]))
        quarter = tuple(n // 4 for n in scenes["images"].shape[2:])
        self.assertEqual({k: (tuple(v.shape), v.dtype) for k, v in scenes.items() if k in ("scene", "object", "part")},
                         {"scene": ((4,), torch.int16), "object": ((4, *quarter), torch.int16), "part": ((4, *quarter), torch.uint8)})  # fmt: skip
        self.assertEqual(tuple(textures["images"].shape), (4, 3, 64, 64))
        self.assertEqual(set(photos), {"source", "files", "images", "material"})
        for batch, k, level in (
            (scenes, 0, "object"),
            (photos, 1, "material"),
        ):  # short side 64 or 80, long side 1.5 of it
            padding = (batch["images"] == torch.tensor(datasets.MEAN_COLOUR).view(3, 1, 1)).all(dim=1)[:, 2::4, 2::4]
            padding = padding.flip(1, 2).cummin(1).values.cummin(2).values.flip(1, 2)  # that colour, and all beyond too
            self.assertTrue(padding.any() and (batch[level][padding] == -1).all())
            self.assertTrue((batch[level][~padding] >= 0).any())
        empty = datasets.padded_image(Image.new("RGB", (10, 10)), (40, 50), 64, 64)
        self.assertTrue(
            (empty[:, 40:] == np.array(datasets.MEAN_COLOUR)[:, None, None]).all() and not empty[:, :40, :50].any()
        )

    def test_labels_lie_on_what_they_label(self):
        """A picture whose colour is its label, through resizing, flipping, padding and the quarter map."""
        rng = np.random.default_rng(0)
        for height, width, short in ((97, 141, 60), (300, 200, 64), (64, 64, 64)):
            blocks = rng.integers(1, 5, (5, 7))
            labels = blocks[np.arange(height)[:, None] * 5 // height, np.arange(width) * 7 // width]
            picture = Image.fromarray((labels * 50).astype(np.uint8)).convert("RGB")
            size = datasets.resized((height, width), short, 200)
            big = datasets.padded(size[0]), datasets.padded(size[1])
            image = datasets.padded_image(picture, size, *big)
            quarter = datasets.quarter_codes(labels.astype(np.int16), size, *big)
            seen = image[0, 2::4, 2::4] / 50
            inside = quarter > 0
            self.assertEqual(inside.sum(), len(range(2, size[0], 4)) * len(range(2, size[1], 4)))
            agree = np.abs(seen - quarter)[inside] < 0.3
            self.assertGreater(agree.mean(), 0.8)  # all but cells on an edge between two blocks
            if short == min(height, width):
                self.assertTrue((quarter[: size[0] // 4, : size[1] // 4] == labels[2::4, 2::4]).all())

    def test_sizes(self):
        for size, short, longest, expected in (
            ((300, 400), 150, 1000, (150, 200)),
            ((400, 300), 150, 1000, (200, 150)),
            ((100, 900), 150, 600, (67, 600)),  # the long side is at its limit
            ((900, 100), 150, 600, (600, 67)),
            ((1, 5000), 450, 1200, (1, 1200)),
        ):
            self.assertEqual(datasets.resized(size, short, longest), expected)

    def test_textures_are_cut_in_the_middle_for_evaluation(self):
        place, wide = new_folder("square"), np.zeros((70, 210, 3), np.uint8)
        wide[:, 70:140] = 200
        Image.fromarray(wide).save(os.path.join(place, "wide.png"))
        index = mock.Mock(folder=place, images=["wide.png"], sizes=torch.tensor([[70, 210]]))
        reader = mock.Mock(index=index, photo=lambda i, box: Image.open(os.path.join(place, "wide.png")))
        square = np.asarray(datasets.texture_square(reader, 0, 0.5))
        self.assertEqual((square.shape, square[:, 3:-3].min()), ((64, 64, 3), 200))
        self.assertEqual(np.asarray(datasets.texture_square(reader, 0, 0.0))[:, :-3].max(), 0)

    def test_flips_go_with_the_labels(self):
        batches = self.batches()
        reader = self.readers["ade20k"]
        flips = 0
        for seed in range(6):
            picture, _, codes = batches.sample(reader, "ade20k", 2, 64, np.random.default_rng(seed))
            labels = reader.decoded(codes)
            straight, plain = reader.photo(2, (picture.width, picture.height)), reader.labels(2)
            flipped = np.array_equal(np.asarray(picture), np.asarray(straight)[:, ::-1])
            flips += flipped
            self.assertTrue(np.array_equal(labels["object"], plain["object"][:, ::-1] if flipped else plain["object"]))
            self.assertTrue(np.array_equal(labels["part"], plain["part"][:, ::-1] if flipped else plain["part"]))
        self.assertTrue(0 < flips < 6)

    def test_prepared_labels_are_those_of_the_files(self):
        for source, i in (("ade20k", 2), ("ade20k", 11), ("os", 4)):
            index = self.indexes[source]
            reader = Reader(index, self.vocabulary)
            reader.prepare(new_folder("smaller"), 70, 90)  # the longest side of 90 makes the short one 60
            labels = reader.labels(i)
            prepared = reader.decoded(reader.codes(i))
            self.assertEqual(labels.keys() - {"scene"}, prepared.keys())
            upright = index.sizes[i][0] > index.sizes[i][1]
            height, width = (90, 60) if upright else (60, 90)
            for level, small in prepared.items():
                full = labels[level]
                self.assertEqual((small.shape, small.dtype), ((height, width), full.dtype))
                for y in range(0, height, 7):
                    for x in range(0, width, 7):
                        at = int((y + 0.5) * full.shape[0] / height), int((x + 0.5) * full.shape[1] / width)
                        self.assertEqual(small[y, x], full[at])

    def test_labels_are_prepared_again_when_something_changed_and_only_then(self):
        cache, ade = new_folder("labels"), Ade()
        for k in range(3):
            ade.add(np.full((40, 50), 5 + k), {5: "wall", 6: "car", 7: "tree"}, ["street"])

        def prepare(vocabulary, *size) -> Reader:
            reader = Reader(datasets.scan(ade.root, "ade20k", ade.root), vocabulary)
            reader.prepare(cache, *size)
            return reader

        prepare({"object": ["wall", "car"]}, 40, 100)
        with mock.patch("datasets.PackedLabels", side_effect=AssertionError):
            self.assertTrue((prepare({"object": ["wall", "car"]}, 40, 100).codes(1) == 2).all())
            for changed in (({"object": ["car", "wall"]}, 40, 100), ({"object": ["wall", "car"]}, 20, 100)):
                self.assertRaises(AssertionError, prepare, *changed)
        self.assertTrue((prepare({"object": ["car", "wall"]}, 40, 100).codes(1) == 1).all())
        write(os.path.join(cache, "ade20k.labels.pt"), "damaged")
        self.assertTrue((prepare({"object": ["car", "wall"]}, 40, 100).codes(1) == 1).all())
        ade.add(np.full((40, 50), 7), {7: "tree"}, ["street"])
        self.assertEqual(prepare({"object": ["car", "tree"]}, 40, 100).codes(3).max(), 2)


class TestSplit(unittest.TestCase):
    def table(self, images=300, classes=12, seed=0) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        dense = rng.random((images, classes)) ** 8 * 1000 * (rng.random((images, classes)) < 0.15)
        return torch.from_numpy(dense).to_sparse().coalesce()

    def plain_deviation(self, counts, validation, fraction) -> float:
        dense = counts.to_dense().numpy()
        shares = [
            dense[validation.numpy(), k].sum() / dense[:, k].sum() for k in range(dense.shape[1]) if dense[:, k].sum()
        ]
        return float(np.mean([abs(s - fraction) for s in shares]))

    def test_brings_every_class_near_its_share(self):
        counts = self.table()
        at_random, swapped, annealed = (
            balance_split.balance(counts, swaps=swaps, seed=1, chance=chance)
            for swaps, chance in ((0, 0), (20000, 0), (20000, 0.5))
        )
        before, paper, ours = (self.plain_deviation(counts, v, 0.1) for v in (at_random, swapped, annealed))
        self.assertLess(paper, before / 4)
        self.assertLess(ours, before / 4)
        self.assertAlmostEqual(
            balance_split.deviation(balance_split.class_shares(counts), swapped.numpy(), 0.1), paper, places=5
        )

    def test_exact_size_same_seed_same_answer(self):
        for images, fraction in ((300, 0.1), (7, 0.5), (33, 0.01), (100, 0.25)):
            validation = balance_split.balance(self.table(images), fraction, swaps=500, seed=3)
            self.assertEqual(int(validation.sum()), round(fraction * images))
            self.assertTrue(
                torch.equal(validation, balance_split.balance(self.table(images), fraction, swaps=500, seed=3))
            )
        self.assertFalse(torch.equal(*(balance_split.balance(self.table(), seed=s, swaps=500) for s in (1, 2))))

    def test_the_papers_procedure_never_makes_it_worse(self):
        counts = self.table()
        values = [
            self.plain_deviation(counts, balance_split.balance(counts, swaps=n, seed=0, chance=0), 0.1)
            for n in (0, 500, 5000)
        ]
        self.assertEqual(values, sorted(values, reverse=True))

    def test_odd_tables(self):
        empty = torch.zeros(20, 3).to_sparse().coalesce()
        self.assertEqual(int(balance_split.balance(empty, swaps=100).sum()), 2)
        self.assertEqual(int(balance_split.balance(torch.ones(20, 1).to_sparse().coalesce(), swaps=100).sum()), 2)
        for wrong in (0, 1, -0.5, 2):
            with self.assertRaises(ValueError):
                balance_split.balance(empty, wrong)
        dense = np.zeros((9, 3))
        dense[4, 0], dense[:, 1] = 7, 1  # a class in one image, one in all, one without a pixel
        for images in (1, 2, 5, 9):
            counts = torch.from_numpy(dense[:images]).to_sparse().coalesce()
            for fraction in (0.01, 0.1, 0.5):
                validation = balance_split.balance(counts, fraction, swaps=50)
                self.assertEqual((len(validation), int(validation.sum())), (images, round(fraction * images)))

    def test_split_json_keeps_other_sources_and_notices_change(self):
        root = new_folder("split")
        shutil.copytree(
            os.path.join(folder, "data", "toy"),
            os.path.join(root, "toy"),
            ignore=shutil.ignore_patterns("split.json", ".cache"),
        )
        root = os.path.join(root, "toy")
        options = ("--root", root, "--min-images", 5, "--min-pixels", 50)
        plot = os.path.join(root, "plot.png")
        self.assertEqual(command(balance_split.main, "--data", "dtd", *options, "--plot", plot)[0], 0)
        with Image.open(plot) as picture:
            self.assertEqual(picture.format, "PNG")
        first = read_json(os.path.join(root, "split.json"))
        self.assertEqual(command(balance_split.main, "--data", "os", *options)[0], 0)
        split = read_json(os.path.join(root, "split.json"))
        self.assertEqual(split["sources"]["dtd"], first["sources"]["dtd"])
        entry = split["sources"]["os"]
        self.assertEqual(set(entry), {"images", "fingerprint", "validation", "deviation_before", "deviation_after"})
        self.assertEqual(len(entry["validation"]), round(0.1 * entry["images"]))
        self.assertTrue(all(os.path.isfile(os.path.join(root, "os", path)) for path in entry["validation"]))
        self.assertLess(entry["deviation_after"], entry["deviation_before"])
        os.remove(os.path.join(root, "os", "photos", "1.jpg"))
        status, _, err = command(
            train.main, "--data", "os", *options, "--out", os.path.join(root, "out"), "--weights", "none"
        )
        self.assertEqual(status, 2)
        self.assertIn("split.json: its split of os", err)


# ---------------------------------------------------------------- training and evaluation


def small_toy() -> str:
    """A root whose toy has few images, for runs of a few iterations."""
    root = new_folder("small")
    datasets.make_toy(os.path.join(root, "toy"), scenes=40, photos=30, textures=3)
    return root


SMALL = ("--channels", 8, "--sizes", 32, "--batch-size", 2, "--workers", 0, "--min-images", 3, "--min-pixels", 500, "--min-part-images", 3, "--min-scene-images", 3)  # fmt: skip


class TestTraining(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = small_toy()
        cls.options = ("--root", cls.root, *SMALL)

    def train(self, *argv):
        status, out, err = command(train.main, *self.options, *argv)
        self.assertEqual((status, err), (0, ""))
        return out

    def test_a_run_writes_what_it_promises(self):
        out = new_folder("run")
        said = self.train(
            "--iters", 6, "--texture-iters", 2, "--accumulate", 2, "--save-every", 4, "--out", out, "--eval-every", 5
        )
        self.assertIn("untrained", said)
        self.assertEqual(set(os.listdir(out)), {"ckpt.pt", "log.jsonl", "curves.png", "metrics.json", "pictures"})
        log = read_log(os.path.join(out, "log.jsonl"))
        self.assertEqual(
            [(line["stage"], line["iteration"]) for line in log],
            [("main", k) for k in range(6)] + [("texture", k) for k in range(2)],
        )
        levels = {"ade20k": {"scene", "object", "part"}, "os": {"material"}, "dtd": {"texture"}}
        for line in log:
            self.assertEqual(set(line), {"stage", "iteration", "source", "lr", "loss", "seconds"})
            self.assertEqual(set(line["loss"]), levels[line["source"]])
        self.assertAlmostEqual(log[3]["lr"], train.TOY["lr"] * (1 - 3 / 6) ** 0.9)
        self.assertAlmostEqual(log[7]["lr"], train.TOY["lr"] * (1 - 1 / 2) ** 0.9)  # a policy of its own
        metrics = read_json(os.path.join(out, "metrics.json"))
        self.assertEqual(set(metrics), set(upernet.LEVELS))
        checkpoint = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
        keys = {
            "model",
            "network",
            "vocabulary",
            "optimizer",
            "scaler",
            "stage",
            "iteration",
            "random",
            "split",
            "arguments",
        }
        self.assertEqual((set(checkpoint), checkpoint["stage"]), (keys, "done"))
        net, vocabulary = upernet.load(os.path.join(out, "ckpt.pt"))
        self.assertFalse(net.training)
        self.assertEqual(vocabulary, checkpoint["vocabulary"])
        self.assertEqual(len(net(torch.rand(1, 3, 64, 64))["object"][0]), len(vocabulary["object"]))

        again = os.path.join(out, "again.json")
        status, table, _ = command(evaluate.main, os.path.join(out, "ckpt.pt"), "--json", again)
        self.assertEqual((status, read_json(again)), (0, metrics))
        self.assertIn("mIoU-bg", table)
        status, table, _ = command(evaluate.main, os.path.join(out, "ckpt.pt"), "--levels", "material", "--json", again)
        self.assertEqual(read_json(again), {"material": metrics["material"]})
        status, table, _ = command(
            evaluate.main, os.path.join(out, "ckpt.pt"), "--split", "official", "--levels", "scene"
        )
        self.assertIn("were not validation images of the checkpoint", table)
        said = self.train("--resume", "--out", out)
        self.assertIn("finished", said)

    def test_a_run_that_was_stopped_goes_on_bit_for_bit(self):
        whole, stopped = new_folder("whole"), new_folder("stopped")
        arguments = ("--iters", 7, "--texture-iters", 3, "--save-every", 2)
        self.train(*arguments, "--out", whole)
        step = train.losses
        for stop_at in (
            5,
            9,
        ):  # in the main stage, then in the texture stage: after the checkpoint, the log ahead of it
            calls = [0 if stop_at == 5 else 4]

            def until(*values):
                calls[0] += 1
                if calls[0] > stop_at:
                    raise Killed
                return step(*values)

            with mock.patch("train.losses", until), self.assertRaises(Killed):
                command(train.main, *self.options, *(arguments if stop_at == 5 else ("--resume",)), "--out", stopped)
        self.train("--resume", "--out", stopped)
        self.assert_same_run(whole, stopped)

    def test_ones_own_data_as_in_the_readme(self):
        """A folder of pictures and class numbers with a table of its own, learnt well beyond chance."""
        root, out = new_folder("own"), new_folder("own-run")
        top = os.path.join(root, "ade20k", "mine")
        write(os.path.join(top, "objectInfo150.txt"), "number\tname\n1\tleaf\n2\tsoil\n3\tstone\n")
        rng, colours = np.random.default_rng(0), np.array([[0, 0, 0], [40, 180, 60], [130, 90, 50], [150, 150, 160]])
        for part, names in (("training", range(16)), ("validation", range(16, 20))):
            for name in names:
                numbers = np.repeat(np.repeat(rng.integers(1, 4, (2, 3)), 24, axis=0), 24, axis=1)
                grey(os.path.join(top, "annotations", part, f"{name}.png"), (1, 1))
                Image.fromarray(numbers.astype(np.uint8)).save(os.path.join(top, "annotations", part, f"{name}.png"))
                picture = (colours[numbers] + rng.integers(-20, 20, (48, 72, 3))).clip(0, 255).astype(np.uint8)
                os.makedirs(os.path.join(top, "images", part), exist_ok=True)
                Image.fromarray(picture).save(os.path.join(top, "images", part, f"{name}.jpg"))
        argv = ("--data", "ade20k", "--root", root, "--split", "official", "--backbone", "resnet18", "--channels", 16)
        argv += ("--weights", "none", "--sizes", 64, "--batch-size", 4, "--iters", 60, "--workers", 0, "--out", out)
        status, said, err = command(train.main, *argv)
        self.assertEqual((status, err), (0, ""))
        metrics = read_json(os.path.join(out, "metrics.json"))
        self.assertEqual(list(metrics["object"]["iou"]), ["leaf", "soil", "stone"])
        self.assertGreater(metrics["object"]["mean_iou"], 0.5)

    def assert_same_run(self, one: str, other: str):
        """Two runs that ended with the same weights, optimizer, vocabulary and log, bit for bit."""
        checkpoints, logs = [], []
        for out in (one, other):
            checkpoints.append(torch.load(os.path.join(out, "ckpt.pt"), weights_only=True))
            with open(os.path.join(out, "log.jsonl")) as log:
                logs.append([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log])
        self.assertEqual(*logs)
        self.assertEqual(*(c["model"].keys() for c in checkpoints))
        for key, value in checkpoints[0]["model"].items():
            self.assertTrue(torch.equal(value, checkpoints[1]["model"][key]), key)
        for key in ("vocabulary", "stage", "iteration", "split", "network", "optimizer"):
            self.assertEqual(*(c[key] for c in checkpoints))

    def test_sigterm_and_ctrl_c_end_the_iteration_save_and_say_how_to_go_on(self):
        whole, stopped = new_folder("whole"), new_folder("stopped")
        arguments = ("--iters", 5, "--texture-iters", 3, "--save-every", 100)
        self.train(*arguments, "--out", whole)
        real_losses, calls = train.losses, []

        def losses(*values):
            calls.append(0)
            if len(calls) in (2, 5, 7):  # in the middle, in the last iteration of a stage, in the texture stage
                os.kill(os.getpid(), signal.SIGINT if len(calls) == 5 else signal.SIGTERM)
            return real_losses(*values)

        with mock.patch("train.losses", losses):
            for status, iteration, stage in ((143, 2, "main"), (130, 5, "main"), (143, 2, "texture")):
                ended, said, _ = command(train.main, *self.options, *arguments, "--out", stopped)
                self.assertEqual(ended, status)
                self.assertIn(f"train.py --resume --out {stopped}", said)
                checkpoint = torch.load(os.path.join(stopped, "ckpt.pt"), weights_only=True)
                self.assertEqual((checkpoint["iteration"], checkpoint["stage"]), (iteration, stage))
                arguments = ("--resume",)
        self.train("--resume", "--out", stopped)
        self.assert_same_run(whole, stopped)

    def test_killed_at_any_moment_and_resumed_ends_the_same(self):
        kills, cases = (10, ((0, 1), (2, 1), (0, 3))) if LONG else (3, ((1, 2),))
        for workers, save_every in cases:
            with self.subTest(workers=workers, save_every=save_every):
                whole, killed = new_folder("whole"), new_folder("killed")
                options = [*map(str, self.options), "--iters", "20", "--texture-iters", "12", "--workers", str(workers)]
                options += ["--save-every", str(save_every)]
                with mock.patch("train.evaluate", return_value={}):
                    self.train(*options, "--out", whole)
                rng = np.random.default_rng(save_every)
                environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
                for k in range(kills + 1):
                    begun = os.path.exists(os.path.join(killed, "ckpt.pt"))
                    argv = [sys.executable, os.path.join(HERE, "train.py"), "--out", killed]
                    run = subprocess.Popen(
                        argv + (["--resume"] if begun else options), stdout=subprocess.DEVNULL, env=environment
                    )
                    before = self.lines(killed)
                    while k < kills and run.poll() is None and self.lines(killed) <= before:  # until it is under way
                        time.sleep(0.02)
                    if k < kills:
                        time.sleep(rng.uniform(0, 0.3))
                        if k % 3 == 2 and workers:
                            for child in children(run.pid):
                                os.kill(child, signal.SIGKILL)
                            time.sleep(1)
                        run.kill()
                    run.wait()
                self.assertEqual(run.returncode, 0)
                self.assert_same_run(whole, killed)

    def lines(self, out: str) -> int:
        path = os.path.join(out, "log.jsonl")
        if not os.path.exists(path):
            return 0
        with open(path) as log:
            return len(log.readlines())

    def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(self):
        out = new_folder("full")
        self.train("--iters", 2, "--texture-iters", 0, "--out", out)
        path = os.path.join(out, "ckpt.pt")
        with open(path, "rb") as file:
            good = file.read()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            checkpoint = torch.load(path, weights_only=True)
            with self.assertRaisesRegex(UserError, "ckpt.pt: cannot be written .*the last one is kept"):
                datasets.write_whole(path, lambda name: torch.save(checkpoint, name), "the last one is kept")
        finally:
            signal.signal(signal.SIGXFSZ, usual)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with open(path, "rb") as file:
            self.assertEqual(file.read(), good)
        self.assertEqual([name for name in os.listdir(out) if name.startswith(".")], [])

    def test_a_file_that_cannot_be_written_leaves_the_one_before(self):
        path = os.path.join(new_folder("full"), "metrics.json")
        evaluate.write_json({"good": 1}, path)
        with mock.patch("json.dump", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(UserError, "metrics.json: cannot be written .No space left"):
                evaluate.write_json({"other": 2}, path)
        self.assertEqual((read_json(path), os.listdir(os.path.dirname(path))), ({"good": 1}, ["metrics.json"]))

    def test_a_log_that_is_none_or_lacks_lines(self):
        out = new_folder("log")
        with mock.patch("train.losses", side_effect=Killed), self.assertRaises(Killed):
            command(train.main, *self.options, "--iters", 4, "--texture-iters", 0, "--out", out)
        path = os.path.join(out, "log.jsonl")
        checkpoint = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
        for content, says in (
            (b"\xff\xfe", "codec"),
            (b"[1]", "a line without stage"),
            (b"{}", "stage"),
            (b"x", "Expect"),
        ):
            with open(path, "wb") as file:
                file.write(content + b"\n")
            with self.assertRaisesRegex(UserError, f"log.jsonl: not a log of train.py any more .*{says}"):
                train.cut_log(path, 3)
            with open(path, "rb") as file:
                self.assertEqual(file.read(), content + b"\n")
        self.assertEqual(checkpoint["iteration"], 0)

    def test_failures_from_outside_are_told_in_one_line(self):
        for error, says in (
            (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "of memory; .* a lower --batch-size"),
            (MemoryError(), "of memory; .* a lower --batch-size"),
            (
                RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
                "ended .*--resume, with fewer --w",
            ),
        ):
            out = new_folder("failing")
            with mock.patch("train.losses", side_effect=error):
                options = (*self.options, "--batch-size", 4, "--iters", 2, "--texture-iters", 0, "--out", out)
                status, _, err = command(train.main, *options)
            self.assertEqual((status, err.count("\n")), (2, 1))
            self.assertRegex(err, says)
        self.train("--resume", "--batch-size", 2, "--accumulate", 2, "--out", out)  # as the messages advise
        self.assertEqual(self.lines(out), 2)
        with mock.patch("train.losses", side_effect=RuntimeError("a mistake of ours")):
            self.assertRaises(
                RuntimeError, command, train.main, *self.options, "--iters", 2, "--out", new_folder("ours")
            )

    def test_only_the_path_of_the_drawn_source_moves(self):
        for amp, stop_at in (("off", None), ("bf16", None), ("fp16", None), ("off", 3), ("off", 7)):
            with self.subTest(amp=amp, stop_at=stop_at):
                self.check_paths(amp, stop_at)

    def check_paths(self, amp, stop_at):
        """Compares the whole state from step to step; `stop_at`: the run is ended before that step and resumed."""
        paths = {
            "ade20k": ("backbone.", "ppm.", "fpn.", "fusion.", "heads.scene.", "heads.object.", "heads.part."),
            "os": ("backbone.", "ppm.", "fpn.laterals.", "fpn.convs.0.", "heads.material."),
            "dtd": ("heads.texture.",),
        }
        states, made = [], []  # after every step; the networks that were built
        real_build, real_step, real_losses = train.build_network, torch.amp.GradScaler.step, train.losses

        def build(*arguments):
            made.append(real_build(*arguments))
            return made[-1]

        def step(scaler, optimizer):  # with fp16 it leaves out a step whose gradients overflow
            result = real_step(scaler, optimizer)
            net = made[-1]
            names = {id(p): name for name, p in net.named_parameters()}
            values = {name: value.clone() for name, value in net.state_dict().items()}
            for p, s in optimizer.state.items():
                if s.get("momentum_buffer") is not None:
                    values[names[id(p)] + " momentum"] = s["momentum_buffer"].clone()
            states.append(values)
            return result

        def until(*arguments):
            if len(states) == stop_at:
                raise Killed
            return real_losses(*arguments)

        out = new_folder("paths")
        options = ("--iters", 6, "--texture-iters", 2, "--save-every", 1, "--amp", amp, "--out", out)
        with (
            mock.patch("train.build_network", build),
            mock.patch("torch.amp.GradScaler.step", step),
            mock.patch("train.evaluate", return_value={}),
        ):
            if stop_at is None:
                self.train(*options)
            else:
                with mock.patch("train.losses", until), self.assertRaises(Killed):
                    command(train.main, *self.options, *options)
                self.train("--resume", "--out", out)
        with open(os.path.join(out, "log.jsonl")) as log:
            sources = [json.loads(line)["source"] for line in log]
        self.assertEqual((set(sources), len(states)), ({"ade20k", "os", "dtd"}, 8))
        self.assertTrue(
            [name for name in states[5] if name.startswith("heads.material.") and name.endswith("momentum")]
        )
        for k in range(1, 8):
            moved = {n for n, v in states[k].items() if n not in states[k - 1] or not torch.equal(v, states[k - 1][n])}
            lost = (
                states[k - 1].keys() - states[k].keys() if k != 6 else set()
            )  # the texture stage has its own optimizer
            self.assertEqual(lost, set(), f"step {k}")
            off = {name for name in moved if not name.startswith(paths[sources[k]])}
            self.assertEqual(off, set(), f"step {k}, {sources[k]}")
            for prefix in paths[sources[k]]:
                self.assertTrue(any(n.startswith(prefix) for n in moved), f"{prefix} stood still in step {k}")

    def one_step(self, batches) -> tuple[dict, dict]:
        """(losses, parameter -> the way it goes) of one step at a rate of 1, without decay."""
        torch.manual_seed(0)
        net = UPerNet(CLASSES, "resnet18", channels=8).eval()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = torch.optim.SGD(net.parameters(), lr=1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss = train.update(net, net.part_slices, batches, optimizer, scaler, torch.device("cpu"), None)
        return loss, {name: before[name] - p.detach() for name, p in net.named_parameters()}

    def a_batch(self, seed=0) -> dict:
        rng = torch.Generator().manual_seed(seed)
        random = lambda high, *size: torch.randint(0, high, size, generator=rng)
        batch = {"source": "ade20k", "files": [], "images": random(255, 2, 3, 64, 64).to(torch.uint8)}
        return batch | {"scene": random(5, 2), "object": random(7, 2, 16, 16), "part": random(2, 2, 16, 16)}

    def test_losses_are_weighted_as_released(self):
        loss, steps = self.one_step([self.a_batch()])
        torch.manual_seed(0)
        net, batch = UPerNet(CLASSES, "resnet18", channels=8).eval(), self.a_batch()
        logits = net(batch["images"] / 255, levels=["scene", "object", "part"])
        each = upernet.losses(logits, batch, net.part_slices)
        self.assertEqual({level: value.item() for level, value in each.items()}, loss)
        (0.25 * each["scene"] + 1.0 * each["object"] + 0.5 * each["part"]).backward()
        for name, p in net.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(steps[name], expected, rtol=1e-3, atol=1e-6, msg=name)

    def test_accumulated_batches_are_averaged(self):
        one, other = self.a_batch(1), self.a_batch(2)
        (loss_1, step_1), (loss_2, step_2), (loss, step) = map(self.one_step, ([one], [other], [one, other]))
        for level, value in loss.items():
            self.assertAlmostEqual(value, (loss_1[level] + loss_2[level]) / 2, places=5)
        for name, way in step.items():
            torch.testing.assert_close(way, (step_1[name] + step_2[name]) / 2, rtol=1e-3, atol=1e-6, msg=name)

    def test_a_batch_without_labels_moves_its_path_alone(self):
        torch.manual_seed(0)
        net = UPerNet(CLASSES, "resnet18", channels=8).train()
        optimizer = torch.optim.SGD(train.parameter_groups(net), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        quarter = torch.full((2, 16, 16), -1)
        batch = {"source": "ade20k", "files": [], "images": torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)}
        batch |= {"scene": torch.tensor([-1, -1]), "object": quarter, "part": torch.zeros_like(quarter)}
        before = {name: value.clone() for name, value in net.state_dict().items()}
        loss = train.update(net, net.part_slices, [batch], optimizer, scaler, torch.device("cpu"), None)
        self.assertEqual(loss, {"scene": 0, "object": 0, "part": 0})
        moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
        self.assertTrue(any(name.startswith("heads.scene.") for name in moved))  # by weight decay: it is on the path
        self.assertFalse([name for name in moved if name.startswith(("heads.material.", "heads.texture."))])

    def test_a_loss_that_is_not_finite_stops_before_the_step(self):
        out = new_folder("infinite")
        poisoned = lambda *a: {"object": torch.tensor(float("nan"), requires_grad=True)}
        with mock.patch("train.losses", poisoned):
            status, _, err = command(train.main, *self.options, "--iters", 3, "--out", out)
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertRegex(err, "not finite at iteration 0 of the main stage .*jpg.*--lr")
        self.assertEqual(torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)["iteration"], 0)

    def test_a_changed_data_set_is_refused_by_resume(self):
        root, out = new_folder("changed"), new_folder("changed-out")
        shutil.copytree(os.path.join(self.root, "toy", "os"), os.path.join(root, "os"))
        options = ("--data", "os", "--root", root, *SMALL, "--backbone", "resnet18", "--weights", "none", "--out", out)
        with mock.patch("train.losses", side_effect=Killed), self.assertRaises(Killed):
            command(train.main, *options, "--iters", 3)
        os.remove(os.path.join(root, "os", "photos", "1.jpg"))
        status, _, err = command(train.main, "--resume", "--data", "os", "--root", root, "--out", out)
        self.assertEqual(status, 2)
        self.assertIn("os: its images are not those", err)

    def torchrun(self, script, *argv, processes=2, restarts=0, status=0) -> subprocess.CompletedProcess:
        """What some processes of a script print."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [f"--max-restarts={restarts}", os.path.join(HERE, script), *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        self.assertEqual(ended.returncode, status, ended.stderr)
        return ended

    def test_a_killed_process_ends_the_job_and_the_run_goes_on(self):
        """By itself where torchrun starts the group again; with --resume by one process or (if LONG) by as many."""
        script = os.path.join(new_folder("killer"), "killer.py")
        write(
            script,
            "import os, signal, sys; import train\n"
            "losses, calls = train.losses, []\n"
            "def until(*values):\n"
            "    calls.append(0)\n"
            "    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and '--resume' not in sys.argv\n"
            "    if len(calls) == 6 and first and os.environ['RANK'] == '1':\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return losses(*values)\n"
            "train.losses = until\n"
            "train.main(sys.argv[1:])\n",
        )
        whole, restarted, ended, alone = (new_folder(name) for name in ("whole", "restarted", "ended", "alone"))
        options = (*self.options, "--iters", 8, "--texture-iters", 2, "--save-every", 2)
        self.torchrun("train.py", *options, "--out", whole)
        said = self.torchrun(script, *options, "--out", restarted, restarts=1).stdout
        self.assertIn("goes on in the main stage at iteration 4", said)
        self.assert_same_run(whole, restarted)

        with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1", TORCHELASTIC_RUN_ID="another group"):
            status, _, err = command(train.main, *options, "--out", restarted)
        self.assertEqual((status, "holds a run already" in err), (2, True))
        said = self.torchrun(script, *options, "--out", ended, status=1).stderr
        self.assertRegex(said, "exitcode +: -9 ")  # torchrun's own report of the process that was killed
        self.assertIn("process 0 lost touch with the others; go on with --resume", said)
        shutil.copytree(ended, alone, dirs_exist_ok=True)
        self.train("--resume", "--out", alone)
        self.assertEqual(self.lines(alone), 10)
        self.assertEqual(torch.load(os.path.join(alone, "ckpt.pt"), weights_only=True)["stage"], "done")
        if LONG:
            self.torchrun(script, "--resume", *self.options[:2], "--out", ended)
            self.assert_same_run(whole, ended)

    def test_two_processes(self):
        """They hold the same weights at every checkpoint, one of them speaks, and they share the evaluation."""
        out = new_folder("ranks")
        script = os.path.join(out, "check.py")
        write(
            script,
            "import sys, torch; import torch.distributed as dist; import train\n"
            "save = train.Run.save\n"
            "def compared(run, *rest):\n"
            "    mine = torch.cat([p.detach().flatten() for p in run.net.parameters()])\n"
            "    everyone = [torch.empty_like(mine) for _ in range(2)]\n"
            "    dist.all_gather(everyone, mine)\n"
            "    if run.rank == 0: print('alike' if torch.equal(*everyone) else 'apart')\n"
            "    save(run, *rest)\n"
            "train.Run.save = compared\n"
            "train.main(sys.argv[1:])\n",
        )
        arguments = ("--iters", 20, "--texture-iters", 2, "--save-every", 5, "--out", out)
        said = self.torchrun(script, *self.options, *arguments).stdout
        self.assertEqual((said.count("alike"), said.count("apart")), (6, 0))
        self.assertEqual(said.count("next: python evaluate.py"), 1)
        self.assertEqual(self.lines(out), 22)
        net, _ = upernet.load(os.path.join(out, "ckpt.pt"))
        self.assertTrue(all(torch.isfinite(p).all() for p in net.parameters()))

        # No image is counted twice: they find what a single process finds.
        checkpoint, shared, alone = (os.path.join(out, name) for name in ("ckpt.pt", "shared.json", "alone.json"))
        said = self.torchrun("evaluate.py", checkpoint, "--json", shared).stdout
        self.assertEqual(said.count("mIoU-bg"), 1)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.assertEqual(command(evaluate.main, checkpoint, "--json", alone)[0], 0)
        finally:
            torch.set_num_threads(threads)
        for path in (alone, os.path.join(out, "metrics.json")):
            self.assertEqual(read_json(shared), read_json(path))

    def test_two_processes_of_two_have_the_gradient_of_one_of_four(self):
        """With batch norm in eval mode and every pixel labelled."""
        place = new_folder("gradients")
        script = os.path.join(place, "check.py")
        write(
            script,
            "import sys, torch; import torch.distributed as dist; import upernet\n"
            "from torch.nn.parallel import DistributedDataParallel\n"
            "dist.init_process_group('gloo'); torch.manual_seed(0)\n"
            "net = upernet.UPerNet({'scene': 5, 'object': 7, 'material': 3}, 'resnet18', channels=8).eval()\n"
            "images = torch.rand(4, 3, 64, 64)\n"
            "labels = {'scene': torch.tensor([0, 1, 2, 3]), 'object': torch.randint(7, (4, 16, 16))}\n"
            "def gradient(model, part):\n"
            "    net.zero_grad(set_to_none=True)\n"
            "    found = upernet.losses(model(images[part], ['scene', 'object']), {k: v[part] for k, v in labels.items()}, {})\n"
            "    sum(found.values()).backward()\n"
            "    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}\n"
            "whole = gradient(net, slice(4))\n"
            "rank = dist.get_rank(); model = DistributedDataParallel(net, find_unused_parameters=True)\n"
            "shared = gradient(model, slice(2 * rank, 2 * rank + 2))\n"
            "for name, value in whole.items():\n"
            "    assert (value is None) == (shared[name] is None) == name.startswith('heads.material'), name\n"
            "    assert value is None or (value - shared[name]).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-3), name\n"
            "print('agreed', rank)\n",
        )
        self.assertEqual(self.torchrun(script).stdout.count("agreed"), 2)

    def test_weights_from_a_file(self):
        torch.manual_seed(5)
        theirs = torchvision.models.resnet18().state_dict()
        path = os.path.join(new_folder("weights"), "r18.pth")
        torch.save(theirs, path)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            net = train.build_network({"classes": {"object": 4}, "backbone": "resnet18", "channels": 8}, 1, path)
        self.assertTrue(torch.equal(net.backbone.layer3[0].conv1.weight, theirs["layer3.0.conv1.weight"]))
        self.assertNotIn("anew", said.getvalue())
        torch.save({"model": net.state_dict()}, path)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            other = train.build_network({"classes": {"object": 5}, "backbone": "resnet18", "channels": 8}, 1, path)
        self.assertTrue(torch.equal(other.ppm.last[0].weight, net.ppm.last[0].weight))
        self.assertIn("2 start anew: heads.object.classifier.weight, heads.object.classifier.bias", said.getvalue())

    def test_no_decay_on_biases_and_norms(self):
        net = UPerNet(CLASSES, "resnet18", channels=8)
        decayed, spared = (set(map(id, g["params"])) for g in train.parameter_groups(net))
        norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        biases = {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
        self.assertEqual(spared, norms | biases)
        self.assertEqual(decayed, {id(p) for p in net.parameters()} - spared)
        self.assertEqual([g["weight_decay"] for g in train.parameter_groups(net)], [1e-4, 0])


class TestPhotos(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        root, cls.out = small_toy(), new_folder("photos")
        command(train.main, "--root", root, *SMALL, "--iters", 1, "--texture-iters", 1, "--out", cls.out)
        cls.checkpoint = os.path.join(cls.out, "ckpt.pt")

    def test_any_mode(self):
        place = new_folder("modes")
        colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
        rotated = Image.Exif()
        rotated[0x0112] = 6
        photos = {
            "grey.png": (colours.convert("L"), {}),
            "cmyk.jpg": (colours.convert("CMYK"), {}),
            "alpha.png": (colours.convert("RGBA"), {}),
            "palette.gif": (colours.convert("P"), {}),
            "deep.png": (Image.fromarray((np.arange(4000).reshape(50, 80) * 16).astype(np.uint16)), {}),
            "bilevel.png": (colours.convert("1"), {}),
            "turned.jpg": (colours, {"exif": rotated}),
            "webp.webp": (colours, {}),
            "moving.gif": (colours, {"save_all": True, "append_images": [colours.rotate(90)]}),
            "point.png": (colours.resize((1, 1)), {}),
            "low.png": (colours.resize((5000, 1)), {}),
            "high.png": (colours.resize((1, 5000)), {}),
            "float.tiff": (Image.fromarray(np.linspace(0, 1, 4000, dtype=np.float32).reshape(50, 80)), {}),
            "ein bild 点.jpg": (colours, {}),
            "really-a-png.jpg": (colours, {"format": "PNG"}),
        }
        for name, (picture, options) in photos.items():
            picture.save(os.path.join(place, name), **options)
        with open(os.path.join(place, "webp.webp"), "rb") as file:
            self.assertEqual(file.read(4), b"RIFF")
        colours.save(os.path.join(place, "marred.jpg"))  # with EXIF that is no EXIF
        with open(os.path.join(place, "marred.jpg"), "r+b") as file:
            content = file.read()
            exif = b"Exif\0\0" + b"\xff" * 20
            file.seek(0)
            file.write(content[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + content[2:])
        photos["marred.jpg"] = (colours, {})
        status, said, err = command(
            evaluate.main, self.checkpoint, "--photo", *(os.path.join(place, n) for n in photos), "--pictures", place
        )
        self.assertEqual((status, err), (0, ""))
        for name, (picture, _) in photos.items():
            stem = os.path.join(place, name.split(".")[0] + "_upernet")
            with np.load(f"{stem}.npz") as maps:
                size = picture.size if name == "turned.jpg" else picture.size[::-1]
                for level in ("object", "part", "material", "texture_map"):
                    self.assertEqual(maps[level].shape, size, name)
                self.assertEqual(maps["scene"].shape, maps["scene_names"].shape)
                self.assertAlmostEqual(float(maps["scene"].sum()), 1, places=4)
                self.assertLess(maps["part"].max(), len(maps["part_names"]))
            with Image.open(f"{stem}.png") as sheet:
                self.assertEqual(sheet.mode, "RGB")
                self.assertLess(max(sheet.size), 3000)

    def test_sixteen_bits_and_transparency(self):
        deep = datasets.rgb(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)))
        self.assertEqual(np.asarray(deep)[0, :, 0].tolist(), [0, 100, 255])
        clear = datasets.rgb(Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)))
        self.assertEqual(np.asarray(clear)[0].tolist(), [[255, 255, 255], [10, 20, 30]])

    def test_maps_are_those_of_the_network(self):
        """At a size that needs padding, which is the network's to see and nobody else's."""
        net, _ = upernet.load(self.checkpoint)
        for height, width, short in ((64, 96, 64), (71, 130, 50), (97, 45, 45)):
            photo = Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8))
            seen = evaluate.parse(net, photo, short, 1000)
            scale = short / min(height, width)
            h, w = round(height * scale), round(width * scale)
            padded = np.full((-(-h // 32) * 32, -(-w // 32) * 32, 3), datasets.MEAN_COLOUR, np.uint8)
            padded[:h, :w] = np.asarray(photo.resize((w, h), Image.Resampling.BILINEAR))
            with torch.inference_mode():
                logits = net(torch.from_numpy(padded.transpose(2, 0, 1).copy())[None] / 255)
            for level in ("object", "material", "texture_map"):
                cells = logits[level][0].double().numpy()
                agree = 0
                for y in range(0, height, 5):
                    for x in range(0, width, 5):
                        rows, columns = (
                            (at + 0.5) * n / full / 4 - 0.5 for at, n, full in ((y, h, height), (x, w, width))
                        )
                        value = 0
                        for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the four cells around
                            weight = abs(1 - r - rows % 1) * abs(1 - c - columns % 1)
                            at = [
                                min(max(int(np.floor(v)) + d, 0), n - 1)
                                for v, d, n in zip((rows, columns), (r, c), cells.shape[1:])
                            ]
                            value = value + weight * cells[:, at[0], at[1]]
                        agree += value.argmax() == seen[level][y, x]
                self.assertGreaterEqual(agree / (len(range(0, height, 5)) * len(range(0, width, 5))), 0.995, level)

    def test_relations_of_photos_and_of_validation_images(self):
        place = new_folder("relations")
        rng = np.random.default_rng(0)
        photos = [os.path.join(place, f"{k}.png") for k in range(3)]
        for path in photos:
            Image.fromarray(rng.integers(0, 255, (50, 80, 3), dtype=np.uint8)).save(path)
        path = os.path.join(place, "r.json")
        status, said, err = command(
            evaluate.main, self.checkpoint, "--relations", path, "--pictures", place, "--photo", *photos
        )
        self.assertEqual((status, err), (0, ""))
        with open(path) as file:
            found = json.load(file)
        self.assertIn("is made of", said)
        seen = [np.load(photo.replace(".png", "_upernet.npz")) for photo in photos]
        names = seen[0]["material_names"].tolist()
        for k, name in enumerate(seen[0]["object_names"].tolist()):
            pixels = np.concatenate([maps["material"][maps["object"] == k] for maps in seen])
            share = {names[m]: np.mean(pixels == m) for m in np.unique(pixels)} if len(pixels) else {}
            best = sorted((m for m in share if share[m] >= 0.1), key=share.get)[-3:]
            self.assertEqual(set(found["object-material"].get(name, ())), set(best))
            for m in best:
                self.assertAlmostEqual(found["object-material"][name][m], share[m] / sum(share[b] for b in best))

        real_parse, parsed = evaluate.parse, []
        with mock.patch("evaluate.parse", lambda *a: parsed.append(a[1].size) or real_parse(*a)):
            status, said, err = command(evaluate.main, self.checkpoint, "--relations", path)
        self.assertEqual((status, err), (0, ""))
        split = torch.load(self.checkpoint, weights_only=True)["split"]
        self.assertEqual(len(parsed), len(split["ade20k"]) + len(split["os"]))  # DTD's squares of texture are no photos


class TestMistakes(unittest.TestCase):
    """A mistake of the user's, or a hostile file, is one line on stderr that says what is wrong, and status 2; a broken
    file among many is set aside with its reason. Each case has a message of its own."""

    @classmethod
    def setUpClass(cls):
        cls.place, cls.root = new_folder("mistakes"), small_toy()
        cls.out = cls.at("run")
        command(train.main, "--root", cls.root, *SMALL, "--iters", 1, "--texture-iters", 1, "--out", cls.out)
        cls.checkpoint = os.path.join(cls.out, "ckpt.pt")

    @classmethod
    def at(cls, *names: str) -> str:
        return os.path.join(cls.place, *names)

    def assert_refused(self, main, *argv, says):
        status, _, err = command(main, *argv)
        self.assertEqual(status, 2, err)
        self.assertEqual(err.count("\n"), 1, err)
        self.assertRegex(err, says)

    def arguments(self) -> list[tuple]:
        """(main, arguments, message) of options that will not do."""
        new = ("--root", self.root, "--out", self.at("new"))
        missing, ckpt = self.at("nowhere"), self.checkpoint
        return [
            (train.main, ("--data", "ade"), "--data ade: 'ade' is not one of toy"),
            (train.main, (*new, "--backbone", "vgg16"), "backbone 'vgg16': choose"),
            (train.main, (*new, "--backbone", "50"), "backbone '50'"),
            (train.main, (*new, "--weights", "nothing.pth"), "--weights nothing.pth: no such file; it takes"),
            (train.main, (*new, "--resume"), "new.ckpt.pt: no checkpoint to go on from; start without --resume"),
            (train.main, (*new, "--lr", "-1"), "--lr: '-1' is not a number above 0"),
            (train.main, (*new, "--lr", "nan"), "--lr: 'nan'"),
            (train.main, (*new, "--sizes", "64,x"), "--sizes: 'x' is not a whole number"),
            (train.main, (*new, "--sizes", "8"), "--sizes: .* at least 32"),
            (train.main, (*new, "--max-size", "1"), "--max-size: at least the smallest of --sizes"),
            (train.main, (*new, "--batch-size", "0"), "--batch-size: '0'"),
            (train.main, (*new, "--iters", "900000000"), "--iters, .*: [0-9,]+ images in all"),
            (train.main, (*new, "--batch-size", "1", "--sizes", "32"), "--sizes: .*33 pixels"),
            (train.main, (*new, "--seed", "9" * 30), "--seed: '9{30}'"),
            (train.main, (*new, "--iters", "-3"), "--iters: '-3'"),
            (train.main, (*new, "--fpn", "1"), "--fpn: .*choose from"),
            (train.main, (*new, "--device", "abacus"), "--device abacus: not to be had"),
            (train.main, (*new, "--device", "meta"), "--device meta"),
            (train.main, (*new, "--colour", "red"), "unrecognized arguments: --colour"),
            (train.main, (*new, "--min-images", "100000"), "lower the --min- options"),
            (train.main, ("--root", self.root, "--out", self.out), "holds a run already; .*--resume, .*--out"),
            (
                train.main,
                ("--root", self.root, "--out", self.out, "--resume", "--lr", 5),
                "--lr: .* was begun with 0.04, .* leave --lr out",
            ),
            (evaluate.main, (), "name a checkpoint before the options .*ckpt.pt"),
            (evaluate.main, (ckpt, "--release", "a", "b"), "or a network of the authors with --release"),
            (evaluate.main, ("--release", "a", "b"), "--release: --labels must name"),
            (evaluate.main, (missing,), "nowhere: no such file"),
            (evaluate.main, (self.place,), "mistakes-[^/]*: a folder, not a file"),
            (evaluate.main, (ckpt, "--levels", "colour"), "--levels: 'colour' is not one of"),
            (evaluate.main, (ckpt, "--size", "1e3"), "--size: '1e3'"),
            (evaluate.main, (ckpt, "--data", "dtd", "--root", missing), "nowhere: no such folder; --root names"),
            (evaluate.main, (ckpt, "--json", self.place), "mistakes-[^/]*: cannot be written .Is a directory"),
            (evaluate.main, (ckpt, "--photo", "a/x.jpg", "b/x.png"), "--photo: several files named x would be"),
            (evaluate.main, (ckpt, "--photo", "x.jpg", "--json", "m.json"), "--json: photos have no labels"),
            (balance_split.main, ("--root", self.root, "--fraction", "2"), "--fraction: '2' is not a number between"),
            (upernet.main, ("--size", "20"), "--size and --train-size: at least 32"),
        ]

    def folders(self) -> list[tuple]:
        """The same, of data that are not there or not in their layout."""
        surfaces, old, table, zero, shares, empty = map(self.at, ("only", "old", "table", "zero", "shares", "empty"))
        bare, columns, occupied, infinite = map(self.at, ("bare", "columns", "occupied", "infinite"))
        shutil.copytree(os.path.join(self.root, "toy", "os"), os.path.join(surfaces, "os"))
        shutil.copytree(surfaces, shares)
        write(os.path.join(shares, "split.json"), "[]")
        shutil.copytree(surfaces, bare)
        os.remove(os.path.join(bare, "os", "label-substance-colors.csv"))
        shutil.copytree(surfaces, columns)
        write(os.path.join(columns, "os", "label-substance-colors.csv"), "a,b\n1,2\n")
        shutil.copytree(surfaces, infinite)
        table_of = lambda root: os.path.join(root, "os", "label-substance-colors.csv")
        write(table_of(infinite), "substance_id,red_color,substance_name\n1,inf,wood\n")
        nameless, moved, part = map(self.at, ("nameless", "moved", "part"))
        shutil.copytree(surfaces, nameless)
        write(table_of(nameless), "substance_id,red_color,substance_name\n1,1\n")
        shutil.copytree(surfaces, moved)
        command(balance_split.main, "--data", "os", "--root", moved, "--min-images", 5)
        os.rename(os.path.join(moved, "os", "photos", "1.jpg"), os.path.join(moved, "os", "photos", "new.jpg"))
        os.rename(
            os.path.join(moved, "os", "photos-labels", "1.png"), os.path.join(moved, "os", "photos-labels", "new.png")
        )
        shutil.copytree(surfaces, part)
        write(os.path.join(part, "split.json"), '{"sources": {"os": {"fingerprint": "x", "validation": []}}}')
        write(os.path.join(old, "ade20k", "index_ade20k.mat"), "")
        write(os.path.join(table, "ade20k", "objectInfo150.txt"), "Idx Name\n1 wall\n")
        save_jpeg(os.path.join(table, "ade20k", "images", "training", "a.jpg"), 40, 40)
        shutil.copytree(table, zero)
        write(os.path.join(zero, "ade20k", "objectInfo150.txt"), "Idx\tName\n0\tbackground\n1\twall\n")
        os.makedirs(os.path.join(empty, "ade20k", "images", "ADE"))
        write(occupied, "a file")
        new = ("--out", self.at("new"), "--min-images", "5")
        return [
            (datasets.main, ("--data", "ade20k", "--root", surfaces), r"ade20k: not found .* \(folders there: os\)"),
            (datasets.main, ("--data", "os,dtd", "--root", surfaces), "dtd: not found below"),
            (datasets.main, ("--data", "os", "--root", occupied), "occupied: no such folder"),
            (datasets.main, ("--data", "ade20k", "--root", old), "2016_07_26.* get ADE20K_2021_17_01"),
            (datasets.main, ("--data", "ade20k", "--root", empty), "no images in images/ADE/training or"),
            (datasets.main, ("--data", "os", "--root", bare), "label-substance-colors.csv: No such file"),
            (datasets.main, ("--data", "os", "--root", columns), "label-substance-colors.csv: needs the columns"),
            (datasets.main, ("--data", "os", "--root", infinite), "label-substance-colors.csv: .*infinity"),
            (datasets.main, ("--data", "os", "--root", nameless), "label-substance-colors.csv: .*or no name"),
            (train.main, ("--data", "os", "--root", moved, *new), "split.json: its split of os .*no longer fits"),
            (train.main, ("--data", "os", "--root", part, *new), "split.json: .*'images'"),
            (datasets.main, ("--data", "ade20k", "--root", table), "objectInfo150.txt: a header"),
            (datasets.main, ("--data", "ade20k", "--root", zero), "objectInfo150.txt: .*0 is unlabelled"),
            (
                datasets.main,
                ("--data", "os", "--root", surfaces, "--cache", occupied),
                "occupied.*: cannot be written .*--cache",
            ),
            (train.main, ("--data", "os", "--root", shares, *new), "split.json: not a split"),
        ]

    def checkpoints(self) -> list[tuple]:
        """The same, of checkpoints that are none of ours; those of stage "main" are to go on from."""
        with open(self.checkpoint, "rb") as file:
            content = file.read()
        good = torch.load(self.checkpoint, weights_only=True)
        weight, model, ran = "ppm.last.0.weight", good["model"], self.at("ran")

        class RunsCode:
            def __reduce__(self):
                return os.mkdir, (ran,)

        def without(key: str) -> dict:
            return {k: v for k, v in good.items() if k != key}

        network = lambda **change: {**good, "network": {**good["network"], **change}}
        weights = lambda value: {**good, "model": {**model, weight: value}}
        words = {**good["vocabulary"], "scene": [1] * len(good["vocabulary"]["scene"])}
        short = {**good["vocabulary"], "scene": good["vocabulary"]["scene"][:-1]}
        half_way = lambda **change: {**good, "stage": "main", "iteration": 1, **change}
        files = [
            ("half.pt", content[: len(content) // 2], "half.pt: not a file of PyTorch weights, or a damaged one"),
            ("random.pt", np.random.default_rng(0).bytes(5000), "random.pt: not a file of PyTorch weights"),
            ("nothing.pt", b"", "nothing.pt: not a file of PyTorch weights"),
            ("code.pt", {**good, "model": RunsCode()}, "code.pt: not a file of PyTorch weights"),
            ("list.pt", [1, 2], "list.pt: holds no dictionary"),
            ("lacking.pt", without("model"), "lacking.pt: not a checkpoint of train.py .no model"),
            ("keys.pt", {**good, "model": {}}, "keys.pt: mean is missing|keys.pt: .* is missing"),
            ("more.pt", {**good, "model": {**model, "more": torch.zeros(1)}}, "more is not a part of this network"),
            ("shape.pt", weights(torch.zeros(3)), rf"{weight} is \(3,\), not \(8, "),
            ("text.pt", weights("text"), f"{weight} is str, not"),
            ("sparse.pt", weights(model[weight].to_sparse()), f"{weight} is Tensor, not"),
            ("nan.pt", weights(model[weight] * math.nan), f"{weight} has values that are not finite"),
            ("short.pt", {**good, "vocabulary": short}, "does not have the network's numbers of classes"),
            ("words.pt", {**good, "vocabulary": words}, "its vocabulary has names that are no text"),
            ("orphan.pt", {**good, "vocabulary": {"part": {"car": []}}}, "orphan.pt: its network or vocabulary"),
            ("option.pt", network(colour=3), "network or vocabulary .*unexpected keyword argument 'colour'"),
            ("huge.pt", network(channels=10**9), "huge.pt: its network or vocabulary"),
            ("wide.pt", network(channels=20000), r"wide.pt: ppm.* is \(8, .*, not \(20000, "),
            ("module.pt", network(backbone="os"), "backbone 'os': choose"),
            ("negative.pt", network(classes={"object": -1}), "classes: numbers above 0"),
            ("data.pt", {**good, "arguments": {"data": 5}}, "data.pt: its argument data is 5"),
            ("sizes.pt", {**good, "arguments": {"sizes": [1]}}, r"sizes.pt: its sizes are \[1\]"),
            ("no-sizes.pt", {**good, "arguments": {"sizes": []}}, r"no-sizes.pt: its sizes are \[\]"),
            ("split.pt", {**good, "split": {"dtd": 5}}, "split.pt: its split holds no lists"),
            ("table.pt", {**good, "split": []}, "table.pt: its arguments or its split are no dictionary"),
            ("stage.pt", half_way(stage="first"), "its stage is not what"),
            ("iteration.pt", half_way(iteration=-5), "its iteration is not what"),
            ("momenta.pt", half_way(optimizer={}), "its optimizer is not what"),
            ("groups.pt", half_way(optimizer={"state": {}, "param_groups": []}), "its optimizer is not that of this"),
            ("random-state.pt", half_way(iteration=0, random=torch.zeros(3)), "its random is not what"),
            ("scaler.pt", half_way(iteration=0, scaler=1), "its scaler is not what"),
            (
                "given.pt",
                half_way(iteration=0, arguments={**good["arguments"], "lr": "x"}),
                "its argument lr is missing, or not",
            ),
            ("sources.pt", half_way(iteration=0, split={"dtd": []}), "has a split of dtd, not of its own data"),
        ]
        cases = []
        for name, value, says in files:
            path = self.at(name)
            if name == "stage.pt" or (isinstance(value, dict) and value.get("stage") == "main"):
                os.makedirs(self.at(name[:-3]))
                path = self.at(name[:-3], "ckpt.pt")
                cases.append((train.main, ("--root", self.root, "--resume", "--out", self.at(name[:-3])), says))
            else:
                cases.append((evaluate.main, (path, "--levels", "scene"), says))
            if isinstance(value, bytes):
                with open(path, "wb") as file:
                    file.write(value)
            else:
                torch.save(value, path)
        strangers = self.at("strangers.pth")
        torch.save({"a": torch.zeros(3)}, strangers)
        start = ("--root", self.root, "--out", self.at("new"), "--weights", strangers)
        return [*cases, (train.main, start, "strangers.pth: nothing in it fits this network; its first key is a")]

    def photos(self) -> list[tuple]:
        """The same, of photos that cannot be read."""
        noise = np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(self.at("good.jpg"))
        with open(self.at("good.jpg"), "rb") as file:
            content = file.read()
        chunk = lambda kind, body: (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
        files = {"cut.jpg": content[: len(content) // 2], "zero.png": b"", "words.jpg": b"no picture", "bomb.png": bomb}
        for name, value in files.items():
            with open(self.at(name), "wb") as file:
                file.write(value)
        os.makedirs(self.at("folder.jpg"))
        os.symlink("circle.jpg", self.at("circle.jpg"))
        os.mkfifo(self.at("pipe.jpg"))
        says = {
            "cut.jpg": "cut.jpg: cannot be read as a picture .*truncated",
            "zero.png": "zero.png: cannot be read as a picture .*cannot identify",
            "words.jpg": "words.jpg: cannot be read as a picture",
            "bomb.png": "bomb.png: cannot be read as a picture .*3600000000 pixels",
            "folder.jpg": "folder.jpg: cannot be read as a picture .*Is a directory",
            "circle.jpg": "circle.jpg: cannot be read as a picture .*symbolic links",
            "gone.jpg": "gone.jpg: no such file",
            "pipe.jpg": "pipe.jpg: a pipe or a device",
        }
        pictures = self.at("pictures")
        parse = lambda name, place: (evaluate.main, (self.checkpoint, "--photo", self.at(name), "--pictures", place))
        cases = [(*parse(name, pictures), message) for name, message in says.items()]
        return [*cases, (*parse("good.jpg", self.at("words.jpg")), "words.jpg.good_upernet.png: cannot be written")]

    def test_one_line_and_status_2(self):
        cases = [*self.arguments(), *self.folders(), *self.checkpoints(), *self.photos()]
        messages = [says for _, _, says in cases]
        self.assertEqual(sorted(messages), sorted(set(messages)))
        self.assertGreaterEqual(len(cases), 60)
        for main, argv, says in cases:
            with self.subTest(says=says):
                self.assert_refused(main, *argv, says=says)
        self.assertFalse(os.path.exists(self.at("ran")))  # what a pickle asked for
        scripts = {m: f"{m.__module__}.py" for m, _, _ in cases}
        firsts = [next(case for case in cases if case[0] is main) for main in scripts]
        started = []  # again as commands of their own, one of each script
        for main, argv, _ in firsts:
            run = [sys.executable, os.path.join(HERE, scripts[main]), *map(str, argv)]
            started.append(subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        for (main, _, says), run in zip(firsts, started):
            _, said = run.communicate()
            with self.subTest(script=scripts[main]):
                self.assertEqual((run.returncode, said.count("\n")), (2, 1), said)
                self.assertRegex(said, f"^{scripts[main]}: .*{says}")
        self.assertEqual(len(firsts), 5)

    def test_a_broken_photo_does_not_keep_the_others_from_being_parsed(self):
        place = new_folder("one-broken")
        Image.new("RGB", (60, 40)).save(os.path.join(place, "good.png"))
        write(os.path.join(place, "bad.jpg"), "no picture")
        photos = (os.path.join(place, name) for name in ("bad.jpg", "good.png"))
        self.assert_refused(evaluate.main, self.checkpoint, "--photo", *photos, "--pictures", place, says="bad.jpg: ")
        self.assertTrue(os.path.exists(os.path.join(place, "good_upernet.png")))

    def test_imagenet_weights_without_a_network(self):
        with mock.patch("train.load_imagenet", side_effect=OSError("no route to host")):
            argv = ("--root", self.root, *SMALL, "--out", new_folder("offline"), "--weights", "imagenet")
            self.assert_refused(train.main, *argv, says="--weights imagenet: the download failed .* --weights none")

    def test_help_is_short(self):
        for main in (train.main, evaluate.main, balance_split.main, datasets.main, upernet.main):
            with mock.patch.dict(os.environ, COLUMNS="110"):
                status, said, _ = command(main, "--help")
            self.assertEqual(status, 0)
            self.assertLessEqual(len(said.splitlines()), 40)


# ---------------------------------------------------------------- the authors' weights


def stand_in(key: str, shape: tuple, seed: int) -> torch.Tensor:
    """A value for one key of the authors' files that anybody can make again: numpy's old generator, seeded by the key."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    if len(shape) == 0:
        return torch.zeros(())
    if len(shape) > 1:
        value = generator.standard_normal(shape) / math.prod(shape[1:]) ** 0.5
    elif key.endswith(("running_var", "weight")):
        value = generator.uniform(0.5, 1.5, shape)
    else:
        value = generator.standard_normal(shape) * 0.1
    return torch.from_numpy(value.astype(np.float32))


def released_files(place: str, seed: int, paper: bool, depth: int = 50) -> list[str]:
    """The authors' encoder and decoder with stand-in values: their keys, in their names and shapes."""

    def with_norm(conv: str, norm: str, out: int, inside: int, kernel: int) -> dict:
        shapes = {f"{conv}.weight": (out, inside, kernel, kernel)}
        shapes |= {f"{norm}.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")}
        shapes |= {
            f"{norm}.num_batches_tracked": (),
            f"{norm}._tmp_running_mean": (out,),
            f"{norm}._tmp_running_var": (out,),
        }
        return shapes | {f"{norm}._running_iter": (1,)}

    encoder = (
        with_norm("conv1", "bn1", 64, 3, 3)
        | with_norm("conv2", "bn2", 64, 64, 3)
        | with_norm("conv3", "bn3", 128, 64, 3)
    )
    inside = 128
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6 if depth == 50 else 23, 3)), start=1):
        for b in range(blocks):
            name = f"layer{stage}.{b}"
            encoder |= with_norm(f"{name}.conv1", f"{name}.bn1", width, inside, 1)
            encoder |= with_norm(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            encoder |= with_norm(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1)
            if b == 0:
                encoder |= with_norm(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, inside, 1)
            inside = 4 * width
    decoder = with_norm("ppm_last_conv.0", "ppm_last_conv.1", 512, 4096, 3)
    for k in range(4):
        decoder |= with_norm(f"ppm_conv.{k}.0", f"ppm_conv.{k}.1", 512, 2048, 1)
    for k in range(3):
        decoder |= with_norm(f"fpn_in.{k}.0", f"fpn_in.{k}.1", 512, 256 * 2**k, 1)
        decoder |= with_norm(f"fpn_out.{k}.0.0", f"fpn_out.{k}.0.1", 512, 512, 3)
    if paper:
        decoder |= with_norm("conv_fusion.0", "conv_fusion.1", 512, 2048, 3)
        for level, classes in (("scene", 365), ("object", 336), ("part", 427), ("material", 26)):
            decoder |= with_norm(f"{level}_head.0.0", f"{level}_head.0.1", 512, 512, 3)
            last = f"{level}_head.{2 if level == 'scene' else 1}"
            decoder |= {f"{last}.weight": (classes, 512, 1, 1), f"{last}.bias": (classes,)}
    else:
        decoder |= with_norm("conv_last.0.0", "conv_last.0.1", 512, 2048, 3)
        decoder |= {"conv_last.1.weight": (150, 512, 1, 1), "conv_last.1.bias": (150,)}
    paths = []
    for name, shapes in (("encoder", encoder), ("decoder", decoder)):
        paths.append(os.path.join(place, f"{name}.pth"))
        torch.save({key: stand_in(key, shape, seed) for key, shape in shapes.items()}, paths[-1])
    return paths


def class_tables(place: str) -> str:
    """Tables in the format of the authors' joint_dataset, with their numbers of classes and names of our own."""
    for level, n in (("object", 336), ("material", 26), ("scene", 365)):
        first = 0 if level == "scene" else 1
        names = ["-"] * first + [f"{level} {k}" for k in range(first, n)]
        write(
            os.path.join(place, f"{level}.csv"),
            "label,name\n" + "".join(f"{k},{name}\n" for k, name in enumerate(names)),
        )
    sizes = [4] * 7 + [6] * 43 + [5] * 27 + [6] * 1  # 427 channels, backgrounds counted
    sizes[-1] = 427 - sum(sizes[:-1])
    rows = ["object_label,object_name,part_labels,part_names"]
    for k, n in enumerate(sizes, start=1):
        rows.append(
            f"{k},object {k},{';'.join(map(str, range(n)))},{';'.join(['-'] + [f'part {p}' for p in range(1, n)])}"
        )
    write(os.path.join(place, "object_part_hierarchy.csv"), "\n".join(rows) + "\n")
    rows = ["dataset,category,raw_label,raw_name,broden_label,broden_name"]
    rows += ["ade20k,object,7,car;auto,3,object 3", "ade20k,object,300,wall,1,object 1", "ade20k,object,9,dust,0,-"]
    rows += ["ade20k,part,20,wheel,1,part 1", "ade20k,part,21,dent,0,-", "ade20k,scene,0,,-1,nothing"]
    rows += ["ade20k,scene,1,bus_stop-s,17,scene 17", "os,material,2,brick,25,material 25", "os,material,3,mud,0,-"]
    write(os.path.join(place, "label_assignment.csv"), "\n".join(rows) + "\n")
    return place


def as_the_authors(encoder: dict, decoder: dict, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Their released networks written out over their own keys, convolution by convolution; x as their code feeds it."""

    def conv(weights, name, norm, y, stride=1, relu=True):
        weight = weights[f"{name}.weight"]
        y = F.conv2d(y, weight, stride=stride, padding=weight.shape[2] // 2)
        mean, variance, scale, shift = (
            weights[f"{norm}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        y = (y - mean) / (variance + 1e-5).sqrt() * scale + shift
        return y.clamp(min=0) if relu else y

    def enlarge(y, like):
        return F.interpolate(y, like.shape[2:], mode="bilinear", align_corners=False)

    stages = []
    for k in (1, 2, 3):
        x = conv(encoder, f"conv{k}", f"bn{k}", x, stride=2 if k == 1 else 1)
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for name in dict.fromkeys(
            key.rsplit(".", 2)[0] for key in encoder if re.match(rf"layer{stage}.\d+.conv1", key)
        ):
            stride = 2 if stage > 1 and name.endswith(".0") else 1
            y = conv(encoder, f"{name}.conv1", f"{name}.bn1", x)
            y = conv(encoder, f"{name}.conv2", f"{name}.bn2", y, stride)
            y = conv(encoder, f"{name}.conv3", f"{name}.bn3", y, relu=False)
            if f"{name}.downsample.0.weight" in encoder:
                x = conv(encoder, f"{name}.downsample.0", f"{name}.downsample.1", x, stride, relu=False)
            x = (x + y).clamp(min=0)
        stages.append(x)

    def mean_of_triangles(n, bins):  # Precise RoI pooling by midpoints: (bins, n)
        t = (np.arange(n * 600) + 0.5) / 600
        triangles = np.maximum(0, 1 - np.abs(t[:, None] - np.arange(n)))
        return torch.from_numpy(triangles.reshape(bins, -1, n).mean(axis=1)).float()

    paper, pyramid = "conv_fusion.0.weight" in decoder, [x]
    for k, bins in enumerate((1, 2, 3, 6)):
        if paper:
            pooled = mean_of_triangles(x.shape[2], bins) @ x @ mean_of_triangles(x.shape[3], bins).T
        else:
            pooled = F.adaptive_avg_pool2d(x, bins)
        pyramid.append(conv(decoder, f"ppm_conv.{k}.0", f"ppm_conv.{k}.1", enlarge(pooled, x)))
    p5 = y = conv(decoder, "ppm_last_conv.0", "ppm_last_conv.1", torch.cat(pyramid, dim=1))
    maps = [p5]
    for k in (2, 1, 0):
        lateral = conv(decoder, f"fpn_in.{k}.0", f"fpn_in.{k}.1", stages[k])
        y = lateral + enlarge(y, lateral)
        maps.insert(0, conv(decoder, f"fpn_out.{k}.0.0", f"fpn_out.{k}.0.1", y))
    fusion = "conv_fusion" if paper else "conv_last.0"
    fused = conv(decoder, f"{fusion}.0", f"{fusion}.1", torch.cat([enlarge(p, maps[0]) for p in maps], dim=1))
    if not paper:
        return {"object": F.conv2d(fused, decoder["conv_last.1.weight"], decoder["conv_last.1.bias"])}
    answers = {}
    for level, y in (("scene", p5), ("object", fused), ("part", fused), ("material", maps[0])):
        y = conv(decoder, f"{level}_head.0.0", f"{level}_head.0.1", y)
        last = f"{level}_head.1"
        if level == "scene":
            y, last = y.mean(dim=(2, 3), keepdim=True), "scene_head.2"
        answers[level] = F.conv2d(y, decoder[f"{last}.weight"], decoder[f"{last}.bias"])
    return answers | {"scene": answers["scene"].flatten(1)}


class TestRelease(unittest.TestCase):
    # What the authors' networks answer for the stand-in weights: the largest absolute logit, and logits by position in
    # the flattened (classes, 24, 32).
    PAPER = {
        "scene": (111.824707, {26: 30.939142, 45: -12.718679, 78: -21.677933, 90: 19.938030, 106: -18.336777, 239: 39.410271, 259: -8.453082, 311: 21.192345, 346: -40.361965}),
        "object": (259.550293, {7083: 3.665398, 86448: 38.188072, 124606: 117.981506, 142654: -37.625706, 150803: -58.221333, 154187: 65.421547, 167902: 27.453876, 206855: -45.236084, 246243: 29.480112}),
        "part": (292.842102, {1576: 14.221946, 137135: -144.377502, 217882: 21.345314, 218834: 57.146763, 227395: 19.612314, 236683: -113.826965, 244721: 41.647491, 289944: 127.635223, 290522: -30.465378}),
        "material": (372.585297, {45: -162.589355, 1236: 15.986570, 1573: 89.987411, 2735: -62.989471, 5037: -41.877739, 10661: 25.245480, 13971: -151.119659, 18329: -222.919479, 18680: 100.236534}),
    }  # fmt: skip
    ADE20K = {
        "object": (6.769946, {1040: -1.023901, 5519: 0.554108, 22518: 0.544367, 28719: -2.428297, 29844: -1.378402, 57039: 3.349379, 81519: 2.326095, 102641: -0.731926, 107530: -0.148589}),
    }  # fmt: skip

    @classmethod
    def setUpClass(cls):
        cls.place = new_folder("release")
        cls.tables = class_tables(os.path.join(cls.place, "joint_dataset"))
        cls.table = os.path.join(cls.place, "object150_info.csv")
        rows = "".join(
            f"{k},0,0,0,0,{'screen' if k in (59, 131) else 'thing'}{'' if k in (59, 131) else f' {k}'};other {k}\n"
            for k in range(1, 151)
        )
        write(cls.table, "Idx,Ratio,Train,Val,Stuff,Name\n" + rows)
        cls.paper = released_files(new_folder("paper"), 7, paper=True)
        cls.ade20k = released_files(new_folder("mit"), 13, paper=False)

    def assert_answers(self, net, answers, seed):
        """Their input is BGR in [0, 255]; ours RGB in [0, 1]."""
        theirs = np.random.RandomState(seed).uniform(0, 255, (1, 3, 96, 128)).astype(np.float32)
        with torch.inference_mode():
            logits = net(torch.from_numpy(theirs[:, ::-1] / 255))
        self.assertEqual(set(logits), set(answers))
        for level, (largest, values) in answers.items():
            flat = logits[level].flatten()
            self.assertAlmostEqual(flat.abs().max().item() / largest, 1, delta=1e-4)
            for position, value in values.items():
                self.assertLessEqual(abs(flat[position].item() - value) / largest, 1e-4, f"{level} at {position}")

    def test_the_papers_network_answers_as_the_authors(self):
        net, vocabulary = upernet.load_release(*self.paper, self.tables)
        self.assertFalse(net.training)
        self.assert_answers(net, self.PAPER, 7)
        counts = {level: len(names) for level, names in vocabulary.items()}
        self.assertEqual(counts, {"scene": 365, "object": 336, "material": 26, "part": 78})
        self.assertEqual(vocabulary["object"][:2], ["background", "object 1"])

    def test_their_ade20k_network_answers_as_the_authors(self):
        net, vocabulary = upernet.load_release(*self.ade20k, self.table)
        self.assert_answers(net, self.ADE20K, 13)
        self.assertEqual((len(set(vocabulary["object"])), vocabulary["object"][0]), (150, "thing 1"))
        self.assertEqual(vocabulary["object"][58], "screen other 59")  # two classes of theirs begin with "screen"

    def test_its_classes_are_sceneparsings_numbers(self):
        _, vocabulary = upernet.load_release(*self.ade20k, self.table)
        numbers = torch.stack([torch.zeros(150), torch.arange(1, 151), torch.ones(150)], dim=1).long()
        index = Index(
            "ade20k", "sceneparsing", "", ["a.jpg"], torch.tensor([[4, 4]]), [""], [""], numbers, torch.zeros(0, 4),
            torch.zeros(0, 3), {n: f"class {n}" for n in range(1, 151)}, [],
        )  # fmt: skip
        reader = Reader(index, vocabulary, evaluate.released_names(self.table, index, vocabulary))
        self.assertEqual(reader.of_number.tolist(), list(range(-1, 150)))
        self.assertEqual(reader.levels, ["object"])

    def test_other_sizes_and_resnet_101_against_their_network_written_out(self):
        for paper, files, depth, sizes in (
            (True, self.paper, 50, ((96, 128), (75, 107), (33, 161))),
            (True, released_files(new_folder("deep"), 3, paper=True, depth=101), 101, ((64, 96), (90, 71))),
            (False, self.ade20k, 50, ((77, 121),)),
            (False, released_files(new_folder("deep-mit"), 4, paper=False, depth=101), 101, ((90, 71),)),
        ):
            net, _ = upernet.load_release(*files, self.tables if paper else self.table)
            self.assertEqual(net.backbone.depth, depth)
            encoder, decoder = (torch.load(path, weights_only=True) for path in files)
            for size in sizes:
                with self.subTest(paper=paper, depth=depth, size=size), torch.inference_mode():
                    rgb = torch.from_numpy(np.random.RandomState(5).uniform(0, 1, (2, 3, *size)).astype(np.float32))
                    if paper:
                        x = 255 * rgb.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717]).view(3, 1, 1)
                    else:
                        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
                        x = (rgb - mean) / std
                    ours = net(rgb)
                    for level, theirs in as_the_authors(encoder, decoder, x).items():
                        error = (ours[level] - theirs).abs().max() / theirs.abs().max()
                        self.assertEqual(ours[level].shape, theirs.shape)
                        self.assertLessEqual(error.item(), 1e-4, level)

    def test_wrong_and_swapped_files(self):
        encoder, decoder = self.paper
        other = os.path.join(new_folder("damaged"), "decoder.pth")
        state = torch.load(decoder, weights_only=True)
        del state["fpn_in.1.0.weight"]
        torch.save(state, other)
        for files, says in (
            ((decoder, encoder, self.tables), "decoder.pth: conv1.weight is missing"),
            ((encoder, encoder, self.tables), "encoder.pth: ppm_last_conv.0.weight is missing"),
            ((encoder, other, self.tables), "decoder.pth: fpn_in.1.0.weight is missing"),
            ((encoder, self.ade20k[1], self.tables), "joint_dataset.*object150_info.csv"),
            ((encoder, decoder, self.table), "object150_info.csv.*joint_dataset"),
            ((encoder, decoder, self.place), "scene.csv"),
            (("nothing.pth", decoder, self.tables), "nothing.pth: no such file"),
            ((encoder, decoder, self.broken_tables("object.csv", "label,name\n")), "tables of classes are cut short"),
            (
                (encoder, decoder, self.broken_tables("object_part_hierarchy.csv", "object_name,part_names\nx,-;y\n")),
                "'x', which object.csv lacks",
            ),
            (
                (encoder, decoder, self.broken_tables("object_part_hierarchy.csv", "object_name,part_names\nx\n")),
                "cut short",
            ),
            (
                (*self.ade20k, self.broken_tables("short.csv", "Idx,Name\n1,wall\n", True)),
                "short.csv: has 1 classes, not the 150",
            ),
        ):
            with self.subTest(says=says), self.assertRaisesRegex(ValueError, says):
                upernet.load_release(*files)

    def broken_tables(self, name: str, text: str, alone=False) -> str:
        tables = new_folder("tables")
        shutil.copytree(self.tables, tables, dirs_exist_ok=True)
        write(os.path.join(tables, name), text)
        return os.path.join(tables, name) if alone else tables

    def test_photos_and_metrics_by_the_command(self):
        ade = Ade()
        objects = np.full((48, 64), 300)
        objects[:24, :32], objects[40:] = 7, 9
        parts = np.zeros((48, 64), int)
        parts[:4, :4], parts[6:8, :4] = 20, 21
        ade.add(objects, {7: "car", 300: "wall", 9: "dust", 20: "wheel", 21: "dent"}, ["outdoor", "bus stop"], parts)
        shutil.move(
            os.path.join(ade.folder, "images", "ADE", "training"),
            os.path.join(ade.folder, "images", "ADE", "validation"),
        )
        options = ("--release", *self.paper, "--labels", self.tables, "--size", 32)
        net, vocabulary = upernet.load_release(*self.paper, self.tables)
        index = ade.index()
        labels = Reader(index, vocabulary, evaluate.released_names(self.tables, index, vocabulary)).labels(0)
        self.assertEqual(labels["scene"], 17)
        expected = np.where(objects == 7, 3, np.where(objects == 300, 1, -1))
        self.assertTrue((labels["object"] == expected).all())
        self.assertTrue((labels["part"] == (parts == 20)).all())

        out = new_folder("released-out")
        path = os.path.join(out, "m.json")
        status, said, err = command(evaluate.main, *options, "--data", "ade20k", "--root", ade.root, "--json", path)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("evaluating its validation folder", said)
        metrics = read_json(path)
        self.assertEqual(set(metrics), {"scene", "object", "part"})
        known = {name for name, value in metrics["object"]["iou"].items() if value is not None}
        self.assertEqual((metrics["scene"]["n"], known), (1, {"object 1", "object 3"}))
        self.assertFalse(os.path.exists(os.path.join(ade.root, "split.json")))

        photo = os.path.join(index.folder, index.images[0])
        status, said, err = command(evaluate.main, *options, "--photo", photo, "--pictures", out)
        self.assertEqual((status, err), (0, ""))
        with np.load(os.path.join(out, "ADE_train_00000000_upernet.npz")) as maps:
            self.assertEqual(maps["object"].shape, (48, 64))
            with torch.inference_mode():  # as released: short side 32, each side stretched up to a multiple of 8
                with Image.open(photo) as picture:
                    resized = picture.convert("RGB").resize((48, 32), Image.Resampling.BILINEAR)
                logits = net(torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy())[None] / 255)
            full = F.interpolate(logits["object"], (48, 64), mode="bilinear")[0].argmax(dim=0).numpy()
            self.assertGreater((full == maps["object"]).mean(), 0.99)

    def test_sizes_are_the_authors(self):
        """Short side 450, long side at most 1000, stretched up to a multiple of 8, or 32 in their ADE20K code."""
        for files, tables, multiple in ((self.paper, self.tables, 8), (self.ade20k, self.table, 32)):
            args = mock.Mock(release=files, labels=tables)
            *_, trained, split = evaluate.load_network(args, torch.device("cpu"))
            self.assertEqual((trained["sizes"], trained["max_size"], trained["multiple"]), ([450], 1000, multiple))
            self.assertIsNone(split)
        images, size = datasets.whole_image(Image.new("RGB", (640, 480)), (451, 602), multiple=8)
        self.assertEqual((tuple(images.shape), size), ((1, 3, 456, 608), (456, 608)))

    def test_tables_that_do_not_fit_the_data_are_refused(self):
        _, vocabulary = upernet.load_release(*self.paper, self.tables)
        _, objects = upernet.load_release(*self.ade20k, self.table)
        none = torch.zeros(0, 3)
        for source, layout, names, labels, known in (
            ("os", "os", {2: "Mud", 3: "Brick"}, self.tables, vocabulary),
            ("ade20k", "ade2021", {7: "wall", 300: "car"}, self.tables, vocabulary),
            ("ade20k", "sceneparsing", {1: "cat", 2: "dog"}, self.table, objects),
        ):
            index = Index(
                source, layout, "/there", [], torch.zeros(0, 2), [], [], none, torch.zeros(0, 4), none, names, []
            )
            with self.subTest(source=source, layout=layout):
                with self.assertRaisesRegex(UserError, "/there: its class numbers do not mean"):
                    evaluate.released_names(labels, index, known)

    def test_scenes_by_name(self):
        _, vocabulary = upernet.load_release(*self.paper, self.tables)
        none = torch.zeros(0, 3)
        index = Index(
            "ade20k", "ade2021", "", list("abcd"), torch.zeros(4, 2), [""] * 4, ["bus stop", "bus_stop", "", "attic"], none,
            torch.zeros(0, 4), none, {7: "car"}, [],
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()) as said:
            names = evaluate.released_names(self.tables, index, vocabulary)
        self.assertEqual(Reader(index, vocabulary, names).tags, [17, 17, -1, -1])
        self.assertIn("1 images of scenes that the network does not know: attic", said.getvalue())

    def test_opensurfaces_by_its_red_value(self):
        index = Index(
            "os", "os", "", ["a.jpg"], torch.tensor([[4, 4]]), [""], [""], torch.zeros(0, 3), torch.zeros(0, 4),
            torch.tensor([[0, 2, 8]]), {2: "Brick", 3: "Mud"}, [],
        )  # fmt: skip
        _, vocabulary = upernet.load_release(*self.paper, self.tables)
        reader = Reader(index, vocabulary, evaluate.released_names(self.tables, index, vocabulary))
        self.assertEqual(reader.of_number.tolist(), [-1, -1, 25, -1])


class TestRelations(unittest.TestCase):
    VOCABULARY = {
        "scene": ["kitchen", "street"],
        "object": ["wall", "car", "pot"],
        "part": {"car": ["background", "wheel", "door"]},
        "material": ["wood", "brick", "metal", "glass", "stone"],
        "texture": ["dotted", "banded"],
    }

    def test_against_a_plain_count(self):
        rng = np.random.default_rng(0)
        relations = evaluate.Relations(self.VOCABULARY)
        photos = []
        for k in range(7):
            seen = {
                "scene": rng.random(2),
                "object": rng.integers(0, 2 + (k == 0), (6, 8)),
                "part": rng.choice([-1, 1, 2], (6, 8)),
            }
            seen |= {"material": rng.integers(0, 5, (6, 8)), "texture_map": rng.integers(0, 2, (6, 8))}
            if k == 2:
                seen["scene"], seen["object"][:] = np.array([0.0, 1.0]), 0
            photos.append(seen)
            relations.add(seen)
        rare = {"scene": np.array([0.9, 0.1]), "object": np.zeros((6, 8), int), "part": np.full((6, 8), -1)}
        rare |= {"material": np.zeros((6, 8), int), "texture_map": np.zeros((6, 8), int)}
        for k in range(8):  # a pot in less than three of ten kitchens is not counted
            photos.append({**rare, "object": np.full((6, 8), 2 if k < 2 else 0)})
            relations.add(photos[-1])
        kitchens = [seen for seen in photos if seen["scene"][0] > seen["scene"][1]]
        pots = sum((seen["object"] == 2).any() for seen in kitchens) / len(kitchens)
        self.assertTrue(0.1 < pots < 0.3)
        found = relations.results()

        streets = [seen for seen in photos if seen["scene"][1] > seen["scene"][0]]
        share = {
            name: sum((seen["object"] == k).any() for seen in streets) / len(streets)
            for k, name in enumerate(self.VOCABULARY["object"])
        }
        self.assertNotIn("pot", found["scene-object"]["kitchen"])
        self.assertEqual(
            found["scene-object"]["street"], {name: value for name, value in share.items() if value >= 0.3}
        )
        for kind, first, second, index, name in (
            ("object-material", "object", "material", 1, "car"),
            ("part-material", "part", "material", 2, "car: door"),
            ("material-texture", "material", "texture_map", 4, "stone"),
        ):
            pairs = [
                seen[second][y, x] for seen in photos for y in range(6) for x in range(8) if seen[first][y, x] == index
            ]
            names = self.VOCABULARY[second.removesuffix("_map")]
            share = {names[k]: pairs.count(k) / len(pairs) for k in range(len(names))}
            best = sorted((name for name in share if share[name] >= 0.1), key=lambda n: -share[n])[:3]
            total = sum(share[n] for n in best)
            self.assertEqual(set(found[kind][name]), set(best))
            for n in best:
                self.assertAlmostEqual(found[kind][name][n], share[n] / total)

    def test_sentences_read_as_in_table_4(self):
        said = evaluate.sentences(
            {"object-material": {"toilet": {"ceramic": 0.65, "plastic": 0.35}}, "scene-object": {"attic": {"box": 1.0}}}
        )
        self.assertEqual(said, ["toilet is made of ceramic (65%) and plastic (35%)", "attic has box (100%)"])


# ---------------------------------------------------------------- real images, where they are at hand


@unittest.skipUnless(os.path.isdir(os.path.join(SHARED, "data")), "the real samples are not here")
class TestRealSamples(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = new_folder("real")
        ade = os.path.join("ADE20K_2021_17_01", "images", "ADE")
        for part in ("training", "validation"):
            shutil.copytree(
                os.path.join(SHARED, "data", "ade20k_2021_sample", ade, "training"),
                os.path.join(cls.root, "ade20k", ade, part),
            )
        shutil.copytree(os.path.join(SHARED, "data", "dtd_sample"), os.path.join(cls.root, "dtd"))
        cls.options = (
            "--root",
            cls.root,
            "--min-images",
            1,
            "--min-pixels",
            1,
            "--min-part-images",
            1,
            "--min-scene-images",
            1,
        )

    def test_scan_finds_what_the_files_hold(self):
        status, said, err = command(datasets.main, "--data", "ade20k,dtd", *self.options)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("ade20k: 6 images", said)
        self.assertIn("10 classes", said)
        index = datasets.scan(self.root, "ade20k", os.path.join(self.root, ".cache"))
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least())
        self.assertEqual(vocabulary["scene"], ["street"])
        self.assertIn("car", vocabulary["object"])
        self.assertTrue({"wheel", "headlight", "windshield"} <= set(vocabulary["part"]["car"]))

    def test_trains_evaluates_and_draws(self):
        out = new_folder("real-run")
        argv = (
            "--data",
            "ade20k,dtd",
            *self.options,
            "--split",
            "official",
            "--backbone",
            "resnet18",
            "--channels",
            16,
            "--weights",
            "none",
        )
        argv += ("--sizes", "96,128", "--iters", 12, "--texture-iters", 3, "--workers", 0, "--out", out)
        status, said, err = command(train.main, *argv)
        self.assertEqual((status, err), (0, ""))
        losses = [line["loss"].get("object") for line in read_log(os.path.join(out, "log.jsonl"))][:12]
        self.assertLess(np.mean(losses[-4:]), np.mean(losses[:4]))
        metrics = read_json(os.path.join(out, "metrics.json"))
        self.assertEqual(metrics["texture"]["n"], 20)
        self.assertEqual(set(metrics), {"scene", "object", "part", "texture"})
        self.assertEqual(sum(name.startswith("ade20k") for name in os.listdir(os.path.join(out, "pictures"))), 3)


def main() -> int:
    """Runs the tests and closes with a line that counts them."""
    result = unittest.main(exit=False, argv=[sys.argv[0], "--buffer", *sys.argv[1:]]).result
    failed, skipped = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses), len(result.skipped)
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
