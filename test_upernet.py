"""The tests: `python test_upernet.py`, or pytest. Each compares with something independent: a plain loop, torchvision,
numpy's integration, the answers of the authors' network."""

import argparse, atexit, contextlib, copy, io, itertools, json, math, os, re, resource, shutil, signal, subprocess, sys
import tempfile, time, unittest, zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import balance_split, datasets, evaluate, train, upernet
from datasets import Index, Source, UserError
from resnet import ResNet, load_imagenet
from upernet import UPerNet

HERE = os.path.dirname(os.path.abspath(upernet.__file__))
SHARED = os.path.join(os.path.dirname(HERE), "shared")  # real samples; what needs them is skipped where they are not
LONG = os.environ.get("UPERNET_LONG") == "1"  # more kills
CLASSES = {"scene": 5, "object": 7, "part": {1: 3, 4: 2}, "material": 6, "texture": 4}
SMALL = ("--channels", 8, "--sizes", 32, "--batch-size", 2, "--workers", 0, "--min-images", 3, "--min-pixels", 500)
SMALL += ("--min-part-images", 3, "--min-scene-images", 3)

folder = tempfile.mkdtemp(prefix="upernet-test-")  # one for all tests
atexit.register(shutil.rmtree, folder)


def new_folder(*names: str) -> str:
    """A new empty folder below the tests' one."""
    return tempfile.mkdtemp(dir=folder, prefix="-".join(names) + "-")


def toy_root(whole: bool = False) -> str:
    """A root whose toy has few images, or with `whole` all of them; made once."""
    root = os.path.join(folder, "whole" if whole else "small")
    with contextlib.redirect_stdout(io.StringIO()):
        datasets.make_toy(os.path.join(root, "toy"), **{} if whole else {"scenes": 40, "photos": 30, "textures": 3})
    return root


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


def save_jpeg(path: str, height: int, width: int, seed: int = 0) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    save(Image.fromarray(noise).resize((width, height)), path)


def save(picture, *path: str) -> str:
    """Writes a picture or an array of numbers as one, with the folders above it."""
    path = os.path.join(*path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture).astype(np.uint8))
    picture.save(path)
    return path


def write(path: str, text: str, encoding: str = "utf-8") -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_text(text, encoding=encoding)
    return path


read_json = lambda *path: json.loads(Path(*path).read_text())
checkpoint_of = lambda out: torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
log_lines = lambda out: len(read_log(out))


def read_log(out: str) -> list[dict]:
    path = Path(out, "log.jsonl")
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


class Ade:
    """ADE20K 2021 as a folder that a test fills image by image."""

    def __init__(self):
        self.root, self.count = new_folder("ade"), 0
        self.folder = os.path.join(self.root, "ade20k", "ADE20K_2021_17_01")

    def add(self, objects: np.ndarray, names: dict, scene: list[str], parts=None, encoding="utf-8") -> str:
        """One image with its class numbers; `names` are those of the JSON. Returns the path without its ending."""
        stem = os.path.join(self.folder, "images", "ADE", "training", "a", "b", f"ADE_train_{self.count:08d}")
        self.count += 1
        save_jpeg(f"{stem}.jpg", *objects.shape)
        for ending, numbers in (("seg", objects), ("parts_1", parts)):
            if numbers is not None:
                save(np.stack([numbers // 256 * 10, numbers % 256, numbers * 0], axis=-1), f"{stem}_{ending}.png")
        things = [{"name": name, "name_ndx": number} for number, name in names.items()]
        annotation = {"annotation": {"scene": scene, "object": things}}
        write(f"{stem}.json", json.dumps(annotation, ensure_ascii=False), encoding)
        return stem

    def index(self) -> Index:
        return datasets.scan(self.root, "ade20k", os.path.join(self.root, ".cache"))


def least(images=1, pixels=1, parts=1, scenes=1) -> dict[str, int]:
    return {"min_images": images, "min_pixels": pixels, "min_part_images": parts, "min_scene_images": scenes}


def own_data(root: str, masks: list, **files: str) -> str:
    """A folder of one's own data: images/training/<k>.jpg with these masks, and text files such as classes="a\\nb"."""
    for k, mask in enumerate(masks):
        mask = np.asarray(mask)
        save_jpeg(os.path.join(root, "images", "training", f"{k}.jpg"), *mask.shape[:2])
        save(mask, root, "annotations", "training", f"{k}.png")
    for name, text in files.items():
        write(os.path.join(root, f"{name}.txt"), text)
    return root


# ---------------------------------------------------------------- the network
plain_resize = lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False)
plain_cross_entropy = lambda logits, k: np.logaddexp.reduce(np.asarray(logits, np.float64)) - float(logits[k])


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)}, not {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class TestResNet(unittest.TestCase):
    def test_stages_are_torchvisions(self):
        for depth, *dilated in ((18,), (34,), (50,), (101,), (50, False, False, True), (50, False, True, True)):
            theirs = getattr(torchvision.models, f"resnet{depth}")(replace_stride_with_dilation=dilated or None).eval()
            for module in theirs.modules():  # statistics of their own, or batch norm would hide mistakes
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.running_mean, -0.1, 0.1)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
            ours = ResNet(depth, output_stride=32 // 2 ** sum(dilated)).eval()
            ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
            stages, x = create_feature_extractor(theirs, [f"layer{i}" for i in range(1, 5)]), torch.randn(1, 3, 70, 101)
            with torch.inference_mode():
                for mine, other, channels in zip(ours(x), stages(x).values(), ours.channels, strict=True):
                    self.assertEqual(mine.shape[1], channels)
                    self.assertLessEqual(relative_error(mine, other), 1e-6, f"ResNet-{depth}, dilated {dilated}")

    def test_stems_and_the_stage_that_is_asked_for(self):
        for stem, widths in {"7x7": [64], "deep": [64, 64, 128], "v1c": [32, 32, 64]}.items():
            net = ResNet(18, stem)
            self.assertEqual([len(value) for key, value in net.state_dict().items() if key[:4] == "conv"], widths)
            net.layer3.register_forward_hook(lambda *_: self.fail("layer3 was computed"))
            self.assertEqual([s.shape[1:] for s in net(torch.rand(2, 3, 61, 90), last=3)], [(64, 16, 23), (128, 8, 12)])

    def test_an_impulse_spreads_in_the_steps_of_the_dilations(self):
        for stride, stage, dilations in ((16, 4, (1, 2, 2, 2)), (8, 3, (1, 2, 2, 2)), (8, 4, (2, 4, 4, 4))):
            layer = getattr(ResNet(18, output_stride=stride), f"layer{stage}").eval()  # torchvision dilates none
            for name, p in layer.named_parameters():  # nothing cancels
                nn.init.constant_(p, 0 if name.endswith("bias") else 1 / 64)
            impulse = torch.zeros(1, next(layer.parameters()).shape[1], 1, 41)
            impulse[..., 20] = 1
            with torch.inference_mode():
                reached = set((layer(impulse)[0, 0, 0].nonzero().flatten() - 20).tolist())
            self.assertEqual(reached, {sum(steps) for steps in itertools.product(*((-d, 0, d) for d in dilations))})

    def test_imagenet_weights_are_torchvisions(self):
        theirs, net = torchvision.models.resnet18().state_dict(), ResNet(18)
        with mock.patch("torchvision.models._api.load_state_dict_from_url", return_value=theirs) as download:
            load_imagenet(net)
        self.assertIn("resnet18", str(download.call_args))
        self.assertTrue(all(torch.equal(value, theirs[key]) for key, value in net.state_dict().items()))
        for stem in ("deep", "v1c"):
            self.assertRaises(ValueError, load_imagenet, ResNet(18, stem=stem))


class TestNetwork(unittest.TestCase):
    def test_shapes_of_every_level_and_names_of_parameters(self):
        net, maps = UPerNet(CLASSES, "resnet18", 16).eval(), {"object": 7, "part": 5, "material": 6, "texture_map": 4}
        for h, w in ((32, 32), (64, 96), (65, 97), (33, 130)):
            logits, quarter = net(torch.rand(2, 3, h, w)), (math.ceil(h / 4), math.ceil(w / 4))
            expected = {"scene": (2, 5), "texture": (2, 4)} | {level: (2, n, *quarter) for level, n in maps.items()}
            self.assertEqual({level: tuple(value.shape) for level, value in logits.items()}, expected)
        self.assertEqual(net.part_slices, {1: slice(0, 3), 4: slice(3, 5)})
        for name in net.state_dict():
            of_head = [name.split(".")[1]] if name.startswith("heads.") else []
            self.assertEqual([level for level in CLASSES if level in name], of_head)
            self.assertRegex(name, r"^(mean|std)$|^(backbone|ppm|fpn|fusion|heads)\.")

    def test_computes_only_what_the_levels_need_and_that_alike(self):
        net, images, ran = UPerNet(CLASSES, "resnet18", channels=16).eval(), torch.rand(1, 3, 64, 96), set()
        together = net(images)
        for name, module in net.named_modules():
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
        body = {"backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4", "ppm"}
        down = body | {"fpn.laterals", "fpn.convs.0"}
        fused = down | {"fpn.convs.1", "fusion"}
        needed = {"scene": body, "material": down, "object": fused, "part": fused, "texture": {"backbone.layer1"}}
        for levels in (*([level] for level in needed), ["scene", "material"], None):
            ran.clear()
            for level, logits in net(images, levels=levels).items():
                torch.testing.assert_close(logits, together[level])
            expected = set().union(*(needed[level] | {f"heads.{level}"} for level in levels or needed))
            prefixes = fused | {f"heads.{level}" for level in needed}
            self.assertEqual({p for p in prefixes if any(name.startswith(p) for name in ran)}, expected)

    def test_rows_of_table_2(self):
        rows = [(False, 4, False, 32), (False, 3, False, 32), (False, 2, False, 32), (True, 2, False, 32)]
        rows += [(True, n, True, 32) for n in (2, 3, 4)]
        rows += [(False, 0, True, 8), (True, 0, True, 8)]  # DilatedNet, PSPNet
        for ppm, fpn, fusion, stride in rows:
            classes, seen = {"object": 9, "material": 3, "part": {2: 4}}, {}  # module -> its input, its output
            net = UPerNet(classes, "resnet18", 16, ppm=ppm, fpn=fpn, fusion=fusion, output_stride=stride)
            for name, module in net.named_modules():
                module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
            with self.subTest(ppm=ppm, fpn=fpn, fusion=fusion, stride=stride):
                logits = net(torch.rand(2, 3, 64, 96))
                self.assertEqual({v.shape[2:] for v in logits.values()}, {(16, 24)})
                sum(v.sum() for v in logits.values()).backward()
                self.assertEqual([n for n, p in net.named_parameters() if p.grad is None], [])
                on_objects, c5 = seen["heads.object"][0], seen["backbone"][1][-1]
                self.assertEqual((c5.shape[2], on_objects.shape[2]), (64 // stride, 64 // 2 ** (fpn or 3)))
                self.assertEqual(("ppm.branches.3.0" in seen, "fusion.conv.1" in seen), (ppm, fusion and fpn > 0))
                self.assertIs(seen["heads.part"][0], on_objects)
                self.assertEqual(seen["heads.material"][0] is on_objects, (ppm, fpn, fusion) != (True, 2, True))

    def test_works_on_another_backbone_and_keeps_its_memory_layout(self):
        class Foreign(nn.Module):
            def __init__(self):
                super().__init__()
                self.channels, self.volume = [8, 12, 16, 20], nn.Conv3d(3, 3, 3, padding=1)  # has no channels_last
                self.stages = nn.ModuleList(nn.Conv2d(3, c, 3, 2 ** (i + 2), 1) for i, c in enumerate(self.channels))

            def forward(self, x):
                return [stage(x + self.volume(x[:, :, None])[:, :, 0]) for stage in self.stages]

        net, images = UPerNet(CLASSES, Foreign(), channels=16).eval(), torch.rand(1, 3, 64, 64)
        self.assertEqual(tuple(net(images)["object"].shape), (1, 7, 16, 16))
        self.assertEqual(set(net(images, levels=["texture"])), {"texture", "texture_map"})
        self.assertTrue(all(p.is_contiguous() for p in net.backbone.parameters()))

    def test_the_two_files_work_alone(self):
        place, code = new_folder("copied"), "import sys; sys.modules['torchvision'] = None; import torch, upernet\n"
        code += "b = torch.nn.Identity(); b.channels = [3] * 4\n"
        code += "b.forward = lambda x: [x[:, :, ::s, ::s] for s in (4, 8, 16, 32)]\n"
        code += "net = upernet.UPerNet({'object': 5}, b, channels=8).eval()\n"
        code += "print(tuple(net(torch.rand(1, 3, 64, 64))['object'].shape))"
        for file, code in (("upernet.py", code), ("resnet.py", code.replace(", b,", ", 'resnet18',"))):
            shutil.copy(os.path.join(HERE, file), place)
            run = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
            self.assertEqual(run.stdout.strip(), "(1, 5, 16, 16)", run.stderr)

    def test_images_that_it_takes_and_refuses(self):
        whole, pspnet = (UPerNet(CLASSES, "resnet18", channels=8, pool=pool) for pool in ("prroi", "pspnet"))
        image, two = torch.rand(1, 3, 64, 64), torch.rand(2, 3, 32, 32)
        # no batch dimension, beyond 1, below 0, uint8, grey, a side below 32
        wrong = [image[0], 255 * image, -image, (255 * image).byte(), image[:, :1], image[..., :31]]
        refused = [(whole, False, images) for images in wrong] + [(whole, True, two[:1]), (pspnet, True, image)]
        for net, training, images in refused:
            with self.assertRaisesRegex(ValueError, "more than 1" if training else re.escape(str(tuple(images.shape)))):
                net.train(training)(images)
        taken = [(whole, True, image[..., :33, :32], None), (whole, True, two[:1], ["texture"])]
        for net, training, images, levels in (*taken, (pspnet, True, two, None), (pspnet, False, two[:1], None)):
            self.assertTrue(all(v.isfinite().all() for v in net.train(training)(images, levels).values()))
        only_objects = UPerNet({"object": 3}, "resnet18", channels=8)
        self.assertRaisesRegex(ValueError, "material", only_objects, image, ["material"])

    def test_texture_is_the_mean_of_its_map_and_sends_no_gradient_into_the_backbone(self):
        net = UPerNet(CLASSES, "resnet18", channels=16).train()
        logits = net(torch.rand(2, 3, 40, 70), levels=["texture"])
        expected = [[np.mean(kind.detach().numpy()) for kind in image] for image in logits["texture_map"]]
        torch.testing.assert_close(logits["texture"], torch.tensor(np.array(expected)))
        logits["texture_map"].square().sum().backward()
        for name, p in net.named_parameters():
            self.assertEqual(p.grad is not None, name.startswith("heads.texture."), name)

    def test_arguments_that_it_refuses(self):
        classes = [{}, {"colour": 3}, {"object": {0: 2}}, *({"object": 3, "part": p} for p in ({}, {3: 2}, 4))]
        wrong = [{"classes": of_levels} for of_levels in classes] + [{"pool": "max"}, {"fpn": 5}, {"stem": "3x3"}]
        for wrong in (*wrong, {"output_stride": 4}, {"backbone": "vgg16"}, {"backbone": "resnet20"}):
            with self.subTest(**wrong), self.assertRaises(ValueError):
                UPerNet(**{"classes": {"object": 3}, "backbone": "resnet18", "channels": 8, **wrong})

    def test_initialisation(self):
        torch.manual_seed(0)
        net = UPerNet({"object": 50, "scene": 40, "texture": 30}, "resnet18", channels=64)
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
                wanted = math.sqrt(2 / module.weight[0].numel())  # Kaiming, fan in
                self.assertAlmostEqual(module.weight.std().item() / wanted, 1, delta=0.08, msg=name)
            if isinstance(module, nn.BatchNorm2d) and not name.startswith("backbone."):
                self.assertTrue((module.weight == 1).all() and torch.allclose(module.bias, torch.tensor(1e-4)), name)


class TestElsewhere(unittest.TestCase):  # the network in somebody else's hands
    def setUp(self):
        torch.manual_seed(0)
        with mock.patch.dict("resnet.BLOCKS", {18: (1, 1, 1, 1)}):  # quicker to trace
            pools = {"prroi": CLASSES, "adaptive": {"object": 7}, "pspnet": {"object": 7}}
            self.nets = [UPerNet(classes, "resnet18", 16, pool=pool).eval() for pool, classes in pools.items()]
        self.net, self.images = self.nets[0], torch.rand(1, 3, 64, 96)

    def assert_same(self, ours: dict, others: dict, tolerance=1e-5):
        self.assertEqual(ours.keys(), others.keys())
        for level, value in ours.items():
            self.assertLessEqual(relative_error(others[level].cpu().float(), value), tolerance, level)

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

    def test_export_with_free_height_and_width(self):
        free = getattr(torch.export.Dim, "AUTO", None)  # without it, at one size
        options = {"dynamic_shapes": {"images": {2: free, 3: free}}} if free else {}
        # A guard of max pooling's in PyTorch 2.11 takes sizes of one parity alone.
        loose = {"check_guards": False} if "2.11" <= torch.__version__ < "2.14" else {}
        for net in self.nets:
            exported = torch.export.export(net, (self.images,), **options).module(**loose)
            for size in ((64, 96), (128, 64), (75, 107), (33, 161))[: 4 if free else 1]:
                images = torch.rand(1, 3, *size)
                self.assert_same(net(images), exported(images))

    def test_compile(self):
        results = []
        for network in (torch.compile(self.net, backend="aot_eager"), self.net):  # inductor without a C++ compiler
            self.net.zero_grad()
            logits = network(self.images)
            sum(v.sum() for v in logits.values()).backward()
            results.append((logits, {name: p.grad.clone() for name, p in self.net.named_parameters()}))
        for found, exact, tolerance in zip(*results, (1e-5, 1e-3)):
            self.assert_same(exact, found, tolerance)

    def test_compile_makes_few_graphs_of_many_sizes(self):
        graphs = []
        torch._dynamo.reset()
        compiled = torch.compile(self.net, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        sizes = ((64, 96), (96, 64), (64, 64), (128, 96), (96, 160), (75, 107), (33, 161))
        for size, levels in itertools.product(sizes, (["object"], ["scene"], ["texture"])):
            images = torch.rand(2, 3, *size)
            self.assert_same(self.net(images, levels), compiled(images, levels))
        most = 8 if hasattr(torch.export.Dim, "AUTO") else 12  # older compilers take sizes apart
        self.assertTrue(1 <= len(graphs) <= most, len(graphs))

    def test_within_another_module_copied_and_in_bfloat16(self):
        whole = nn.Sequential(nn.Identity(), self.net)
        twin = copy.deepcopy(whole)
        twin.load_state_dict({key: value.contiguous() for key, value in whole.state_dict().items()})
        with torch.inference_mode():
            exact = self.net(self.images)
            for other in (whole, twin, whole.to(memory_format=torch.contiguous_format)):
                self.assert_same(exact, other(self.images))
            rounded = self.net.bfloat16()(self.images.bfloat16())
        self.assertEqual({value.dtype for value in rounded.values()}, {torch.bfloat16})
        self.assert_same(exact, rounded, 0.1)

    @unittest.skipUnless(torch.cuda.is_available(), "no CUDA device")
    def test_on_cuda_as_on_the_cpu(self):
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact, net, images = self.net(self.images), copy.deepcopy(self.net).cuda(), self.images.cuda()
            self.assert_same(exact, net(images), 1e-3)
            for amp in (torch.bfloat16, torch.float16):
                with torch.autocast("cuda", amp):
                    self.assert_same(exact, net(images), 0.1)


def plain_pool(pool: str, x: torch.Tensor, bins: int) -> torch.Tensor:
    if pool != "prroi":
        return nn.AdaptiveAvgPool2d(bins)(x)
    # (bins, n): the mean of each sample's triangle over each bin, by midpoints
    triangles = lambda n: np.maximum(0, 1 - np.abs((np.arange(n * 600) + 0.5)[:, None] / 600 - np.arange(n)))
    means = lambda n: torch.from_numpy(triangles(n).reshape(bins, -1, n).mean(axis=1)).float()
    return means(x.shape[2]) @ x @ means(x.shape[3]).T


class TestPooling(unittest.TestCase):
    def test_weights(self):
        for bins, h, w in itertools.product((1, 2, 3, 6), (1, 4, 5, 19), (2, 7, 38)):
            x = torch.rand(2, 3, h, w)
            for pool, weights in (("prroi", upernet.prroi_weights), ("adaptive", upernet.average_weights)):
                rows, columns = (weights(bins, n, x.device) for n in (h, w))
                torch.testing.assert_close(rows @ x @ columns.T, plain_pool(pool, x, bins), rtol=0, atol=1e-5)

    def test_branches_against_the_plain_line(self):
        c5 = torch.rand(2, 6, 5, 7)
        for pool, training in itertools.product(("prroi", "adaptive", "pspnet"), (True, False)):
            ppm, maps = upernet.PPM(6, 4, pool).train(training), [c5]
            for bins, (conv, norm, relu) in zip((1, 2, 3, 6), ppm.branches):
                y, resize = plain_pool(pool, c5, bins), lambda y: plain_resize(y, (5, 7))
                maps.append(resize(relu(norm(conv(y)))) if pool == "pspnet" else relu(norm(conv(resize(y)))))
            torch.testing.assert_close(ppm(c5), ppm.last(torch.cat(maps, dim=1)), rtol=1e-4, atol=1e-4)


class TestFusion(unittest.TestCase):  # the rewritten fusion against the line that defines it
    def maps(self, dtype, batch, size, channels=12):
        torch.manual_seed(0)
        sizes = [[math.ceil(n / 2**k) for n in size] for k in range(4)]
        return [torch.randn(batch, channels, *s, dtype=dtype) for s in sizes]

    def plain(self, fusion, maps):
        return fusion.conv(torch.cat([maps[0], *(plain_resize(p, maps[0].shape[2:]) for p in maps[1:])], dim=1))

    def test_values_and_gradients(self):
        sizes = ((1, (8, 8)), (2, (24, 32)), (3, (13, 19)), (2, (1, 9)), (1, (37, 5)))
        types = ((torch.float64, 1e-10), (torch.float32, 1e-5))
        for (dtype, tolerance), training, (batch, size) in itertools.product(types, (True, False), sizes):
            maps = self.maps(dtype, batch, size)
            fusion, results = upernet.Fusion(4, 12).to(dtype).train(training), []
            for way in (fusion, lambda maps: self.plain(fusion, maps)):
                wanted = [m.clone().requires_grad_() for m in maps]
                y = way(wanted)
                torch.manual_seed(1)
                gradients = torch.autograd.grad((y * torch.randn_like(y)).sum(), [*wanted, *fusion.parameters()])
                results.append([y, *gradients])
            for ours, plain in zip(*results, strict=True):
                self.assertLessEqual(relative_error(ours, plain), tolerance, f"{dtype}, {training}, {batch}, {size}")

    def test_bf16_is_as_near_to_float32_as_the_plain_line(self):
        for size in ((24, 32), (31, 45)):
            maps, fusion = self.maps(torch.float32, 2, size, channels=64), upernet.Fusion(4, 64).eval()
            with torch.inference_mode():
                exact = self.plain(fusion, maps)
                with torch.autocast("cpu", torch.bfloat16):
                    ours, plain = (fusion(maps) - exact).abs().mean(), (self.plain(fusion, maps) - exact).abs().mean()
            self.assertTrue(ours <= 1.5 * plain and plain > 0, f"{ours}, plain {plain}")

    def test_keeps_no_upsampled_map_for_the_backward_pass(self):
        kept, maps = [], [m.requires_grad_() for m in self.maps(torch.float32, 1, (32, 32))]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            upernet.Fusion(4, 12)(maps)
        self.assertIn((1, 12, 32, 32), kept)
        self.assertFalse([shape for shape in kept if len(shape) == 4 and shape[1] > 12 and shape[2:] == (32, 32)])


class TestLosses(unittest.TestCase):
    slices = {1: slice(0, 3), 4: slice(3, 5), 6: slice(5, 9)}

    def test_part_loss_is_the_plain_loop(self):
        torch.manual_seed(1)
        logits, objects = torch.randn(3, 9, 6, 7), torch.randint(-1, 8, (3, 6, 7))
        objects[2][objects[2] == 4] = 0
        parts, total = torch.zeros_like(objects), 0.0
        for index, channels in self.slices.items():
            parts[objects == index] = torch.randint(0, channels.stop - channels.start, ((objects == index).sum(),))
        parts[1][objects[1] == 1] = 0  # object 1 has no part in image 1: not valid in it
        parts[objects == 6] = 0  # and object 6 in none
        for index, channels in self.slices.items():
            valid = [n for n in range(3) if any(part > 0 for part in parts[n][objects[n] == index])]
            pixels = [(n, y, x) for n, y, x in (objects == index).nonzero().tolist() if n in valid]
            losses = [plain_cross_entropy(logits[n, channels, y, x], int(parts[n, y, x])) for n, y, x in pixels]
            total += np.mean(losses) if losses else 0
        self.assertGreater(total, 0)
        self.assertAlmostEqual(upernet.part_loss(logits, objects, parts, self.slices).item(), total, places=4)

    def test_part_loss_with_an_infinite_logit_outside_of_any_object_with_parts(self):
        objects = torch.tensor([[[2, 1], [1, -1]]])
        for value, dtype in itertools.product((math.inf, -math.inf, math.nan), (torch.float32, torch.float16)):
            logits = torch.randn(1, 9, 2, 2, dtype=dtype)
            logits[0, 0, 0, 0] = value
            loss = upernet.part_loss(logits.requires_grad_(), objects, torch.zeros_like(objects), self.slices)
            loss.backward()
            self.assertEqual((loss.item(), logits.grad.count_nonzero().item()), (0, 0))
            expected = np.mean([plain_cross_entropy(logits.detach()[0, :3, y, 1 - y], 1) for y in (0, 1)])
            loss = upernet.part_loss(logits, objects, (objects == 1).long(), self.slices)
            self.assertAlmostEqual(loss.item(), expected, places=4)

    def test_maps_ignore_unlabelled_pixels_and_texture_is_at_every_pixel(self):
        logits, maps = torch.randn(2, 5, 4, 6), torch.randint(-1, 5, (2, 4, 6), dtype=torch.int16)
        textures = torch.tensor([2, 0], dtype=torch.int16)
        everywhere = textures[:, None, None].expand(2, 4, 6)
        for level, labels, truth in (("material", maps, maps), ("texture", textures, everywhere)):
            pixels = (truth >= 0).nonzero().tolist()
            expected = np.mean([plain_cross_entropy(logits[n, :, y, x], int(truth[n, y, x])) for n, y, x in pixels])
            found = upernet.losses({level.replace("texture", "texture_map"): logits}, {level: labels}, {})[level]
            self.assertAlmostEqual(found.item(), expected, places=5)

    def test_levels_without_a_label_cost_nothing_and_stay_in_the_graph(self):
        net = UPerNet({"scene": 3, "object": 4, "part": {1: 3}}, "resnet18", channels=8).train()
        labels = {"scene": -torch.ones(2), "object": -torch.ones(2, 16, 16), "part": torch.zeros(2, 16, 16)}
        loss = upernet.losses(net(torch.rand(2, 3, 64, 64)), labels, net.part_slices)
        sum(loss.values()).backward()
        self.assertEqual({k: v.item() for k, v in loss.items()}, {"scene": 0, "object": 0, "part": 0})
        self.assertTrue(all(p.grad is not None and not p.grad.any() for p in net.parameters()))


# ---------------------------------------------------------------- released weights
# Our keys -> theirs, for the authors' two networks and mmsegmentation's.
AUTHORS = {"backbone.": "", "ppm.branches": "ppm_conv", "ppm.last": "ppm_last_conv", "fpn.laterals": "fpn_in"}
AUTHORS |= {r"fpn.convs.(\d)": r"fpn_out.\1.0", r"heads.(\w+).conv.0": r"\1_head.0"}
AUTHORS |= {"heads.scene.classifier": "scene_head.2", r"heads.(\w+).classifier": r"\1_head.1"}
MMSEG = {r"((?!backbone).*)\.0\.weight$": r"\1.conv.weight", r"((?!backbone).*)\.1\.(\w+)$": r"\1.bn.\2"}
MMSEG |= {r"backbone.(conv|bn)(\d)": lambda m: f"backbone.stem.{3 * int(m[2]) - (3 if m[1] == 'conv' else 2)}"}
MMSEG |= {r"ppm.branches.(\d)": r"decode_head.psp_modules.\1.1", "ppm.last": "decode_head.bottleneck"}
MMSEG |= {"fpn.laterals": "decode_head.lateral_convs", "fpn.convs": "decode_head.fpn_convs"}
MMSEG |= {"fusion.conv": "decode_head.fpn_bottleneck", "heads.object.classifier": "decode_head.conv_seg"}
ADE20K = AUTHORS | {"fusion.conv": "conv_last.0", "object_head": "conv_last"}
KEYS = {"paper": AUTHORS | {"fusion.conv": "conv_fusion"}, "ade20k": ADE20K, "mmseg": MMSEG}
COUNTS = {"scene": 365, "object": 336, "part": {1: 427}, "material": 26}
NETWORKS = {
    "paper": {"classes": COUNTS, "stem": "deep"},
    "ade20k": {"classes": {"object": 150}, "head_conv": False, "pool": "adaptive", "stem": "deep"},
    "mmseg": {"classes": {"object": 150}, "head_conv": False, "pool": "pspnet", "stem": "v1c"},
}


def stand_in(key: str, shape: tuple, seed: int) -> torch.Tensor:
    """A value for one key of a released file that anybody can rebuild: numpy's old generator, seeded by the key."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    if len(shape) > 1:
        value = generator.standard_normal(shape) / math.prod(shape[1:]) ** 0.5
    elif key.endswith(("running_var", "weight")):
        value = generator.uniform(0.5, 1.5, shape)
    else:
        value = generator.standard_normal(shape) * 0.1 if shape else np.zeros(())
    return torch.from_numpy(value.astype(np.float32))


def released_files(release: str, seed: int, meta: dict = {}, **network) -> tuple[list[str], dict]:
    """The files of a released network, with stand-in values under its keys, and the same values under ours."""
    with torch.device("meta"):
        state = UPerNet(**NETWORKS[release] | network).state_dict()
    encoder, decoder, ours, place = {}, {}, {}, new_folder(release)
    for key in state.keys() - {"mean", "std"}:
        name = key
        for pattern, replacement in KEYS[release].items():
            name = re.sub(f"^{pattern}", replacement, name)
        of_file = encoder if key.startswith("backbone.") else decoder
        ours[key] = of_file[name] = stand_in(name, tuple(state[key].shape), seed)
        if name.endswith(".running_mean") and release != "mmseg":  # their synchronised batch norm's own sums
            sums = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")
            of_file |= {name.replace("running_mean", own): ours[key] for own in sums}
    files = {"encoder.pth": encoder, "decoder.pth": decoder}
    if release == "mmseg":
        auxiliary = {"auxiliary_head.conv_seg.bias": torch.ones(150), "auxiliary_head.convs.0.bn.weight": torch.ones(9)}
        files = {"upernet.pth": {"meta": meta, "state_dict": encoder | decoder | auxiliary}}
    for name, content in files.items():
        torch.save(content, os.path.join(place, name))
    return [os.path.join(place, name) for name in files], ours


def written_out(release: str, depth: int, weights: dict, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A released network, convolution by convolution, over the weights under our keys; x as its own code feeds it."""
    keys = ("running_mean", "running_var", "weight", "bias")
    norm_relu = lambda norm, y: F.relu(F.batch_norm(y, *(weights[f"{norm}.{key}"] for key in keys)))
    plain = lambda w, y, stride: F.conv2d(y, w, stride=stride, padding=w.shape[2] // 2)
    conv = lambda name, norm, y, stride=1: norm_relu(norm, plain(weights[f"{name}.weight"], y, stride))
    own, resize = lambda name, y: conv(f"{name}.0", f"{name}.1", y), lambda y, like: plain_resize(y, like.shape[2:])
    for k in (1, 2, 3):
        x = conv(f"backbone.conv{k}", f"backbone.bn{k}", x, stride=2 if k == 1 else 1)
    body = getattr(torchvision.models, f"resnet{depth}")()
    body.inplanes = x.shape[1]
    body.layer1 = body._make_layer(type(body.layer1[0]), 64, len(body.layer1))
    layers = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.layer")}
    missing = body.load_state_dict(layers, strict=False).missing_keys
    assert all(key.startswith(("conv1", "bn1", "fc")) for key in missing), missing
    x, stages = F.max_pool2d(x, 3, 2, 1), []
    for layer in (body.eval().layer1, body.layer2, body.layer3, body.layer4):
        x = layer(x)
        stages.append(x)
    pyramid = [x]
    for k, bins in enumerate((1, 2, 3, 6)):
        pooled = plain_pool("prroi" if release == "paper" else "adaptive", x, bins)
        branch = lambda y: own(f"ppm.branches.{k}", y)
        pyramid.append(resize(branch(pooled), x) if release == "mmseg" else branch(resize(pooled, x)))
    y = own("ppm.last", torch.cat(pyramid, dim=1))
    maps = [y]
    for k in (2, 1, 0):
        y = own(f"fpn.laterals.{k}", stages[k]) + resize(y, stages[k])
        maps.insert(0, own(f"fpn.convs.{k}", y))
    fused = own("fusion.conv", torch.cat([resize(p, maps[0]) for p in maps], dim=1))
    answers = {"scene": maps[3], "object": fused, "part": fused, "material": maps[0]}
    for level, y in answers.items() if release == "paper" else [("object", fused)]:
        y = own(f"heads.{level}.conv.0", y) if release == "paper" else y
        y = y.mean(dim=(2, 3), keepdim=True) if level == "scene" else y
        y = F.conv2d(y, weights[f"heads.{level}.classifier.weight"], weights[f"heads.{level}.classifier.bias"])
        answers[level] = y.flatten(1) if level == "scene" else y
    return answers


def class_tables(place: str) -> str:
    """Tables in the format of the authors' joint_dataset, with their numbers of classes and names of our own."""
    levels = [(level, n) for level, n in COUNTS.items() if level != "part"]
    rows = {level: ["label,name", *(f"{k},{level} {k}" for k in range(n))] for level, n in levels}
    rows["object"][1] = rows["material"][1] = "0,-"
    parts = enumerate([4] * 7 + [6] * 43 + [5] * 27 + [6], start=1)  # 427 channels, backgrounds counted
    parts = (f"{k},object {k},,-" + "".join(f";part {p}" for p in range(1, n)) for k, n in parts)
    rows["object_part_hierarchy"] = ["object_label,object_name,part_labels,part_names", *parts]
    rows["label_assignment"] = """dataset,category,raw_label,raw_name,broden_label,broden_name
ade20k,object,7,car;auto,3,object 3\nade20k,object,300,wall,1,object 1\nade20k,object,9,dust,0,-
ade20k,part,20,wheel,1,part 1\nade20k,part,21,dent,0,-\nade20k,scene,0,,-1,nothing
ade20k,scene,1,bus_stop-s,17,scene 17\nos,material,2,brick,25,material 25\nos,material,3,mud,0,-""".split("\n")
    for name, of_table in rows.items():
        write(os.path.join(place, f"{name}.csv"), "\n".join(of_table))
    return place


# What others' networks answer for the stand-in values: positions in the flattened (classes, 24, 32), with that of the
# largest absolute logit last; then the logits there.
ANSWERS = {
    "paper scene": "26 45 78 90 106 239 259 311 346 185 "
    "30.939 -12.719 -21.678 19.938 -18.337 39.410 -8.453 21.192 -40.362 111.825",
    "paper object": "7083 86448 124606 142654 150803 154187 167902 206855 246243 18894 "
    "3.665 38.188 117.982 -37.626 -58.221 65.422 27.454 -45.236 29.480 -259.550",
    "paper part": "1576 137135 217882 218834 227395 236683 244721 289944 290522 22709 "
    "14.222 -144.378 21.345 57.147 19.612 -113.827 41.647 127.635 -30.465 -292.842",
    "paper material": "45 1236 1573 2735 5037 10661 13971 18329 18680 18126 "
    "-162.589 15.987 89.987 -62.989 -41.878 25.245 -151.120 -222.919 100.237 -372.585",
    "ade20k object": "1040 5519 22518 28719 29844 57039 81519 102641 107530 88628 "
    "-1.02390 0.55411 0.54437 -2.42830 -1.37840 3.34938 2.32610 -0.73193 -0.14859 6.76995",
    "mmseg object": "17848 21992 44479 44570 51763 52345 68274 72929 98819 24910 "
    "-1.88349 1.53542 -0.72293 -1.06470 0.37761 0.25192 -1.44015 0.42061 1.45834 -5.57749",
}


class TestRelease(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        names = ["screen" if k in (59, 131) else f"thing {k}" for k in range(1, 151)]
        rows = ["Idx,Name", *(f"{k},{name};other {k}" for k, name in enumerate(names, start=1))]
        cls.table = write(os.path.join(new_folder("table"), "object150.csv"), "\n".join(rows))
        cls.tables = class_tables(new_folder("joint_dataset"))
        cls.files = {name: released_files(name, seed) for name, seed in (("paper", 7), ("ade20k", 13), ("mmseg", 17))}
        cls.paper, cls.ade20k, mmseg = (paths for paths, _ in cls.files.values())
        authors = (upernet.load_release(*cls.paper, cls.tables), upernet.load_release(*cls.ade20k, cls.table))
        cls.networks = dict(zip(cls.files, (*authors, upernet.load_mmseg(*mmseg, names))))

    def test_recorded_answers(self):
        for release, seed in (("paper", 7), ("ade20k", 13), ("mmseg", 17)):
            net, bgr = self.networks[release][0], np.random.RandomState(seed).uniform(0, 255, (1, 3, 96, 128))
            with torch.inference_mode():
                logits = net(torch.from_numpy(bgr.astype(np.float32)[:, ::-1] / 255))
            self.assertEqual({f"{release} {level}" for level in logits}, {k for k in ANSWERS if k.startswith(release)})
            for level, value in logits.items():
                positions, expected = np.array(ANSWERS[f"{release} {level}"].split(), np.float64).reshape(2, -1)
                errors = value.flatten().numpy()[positions.astype(int)] - expected
                errors = np.append(errors, value.abs().max().item() - abs(expected[-1]))
                self.assertLessEqual(abs(errors).max() / abs(expected[-1]), 1e-4, f"{release}, {level}")

    def test_other_sizes_and_depths_against_the_networks_written_out(self):
        deep, of_deep = released_files("paper", 3, backbone="resnet101", channels=32)
        tiny = released_files("mmseg", 4, backbone="resnet18", channels=32, classes={"object": 19})
        large = released_files("mmseg", 5, backbone="resnet101", channels=32)
        for release, files, weights, depth, sizes in (
            ("paper", [*self.paper, self.tables], self.files["paper"][1], 50, ((75, 107), (33, 161))),
            ("paper", [*deep, self.tables], of_deep, 101, ((90, 71),)),
            ("ade20k", [*self.ade20k, self.table], self.files["ade20k"][1], 50, ((77, 121),)),
            ("mmseg", *tiny, 18, ((75, 107), (33, 161))),
            ("mmseg", *large, 101, ((90, 71),)),
        ):
            net, _ = (upernet.load_mmseg if release == "mmseg" else upernet.load_release)(*files)
            for size in sizes:
                rgb = torch.from_numpy(np.random.RandomState(5).uniform(0, 1, (1, 3, *size)).astype(np.float32))
                mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).view(2, 3, 1, 1)
                x = (255 * rgb - mean) / std
                if release == "paper":
                    x = 255 * rgb.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717]).view(3, 1, 1)
                with torch.inference_mode():
                    ours, theirs = net(rgb), written_out(release, depth, weights, x)
                for level in ours:
                    self.assertLessEqual(relative_error(ours[level], theirs[level]), 1e-4, f"{release} {depth} {size}")

    def test_wrong_and_swapped_files(self):
        (encoder, decoder), place, tables = self.paper, new_folder("wrong"), self.tables
        state, damaged = torch.load(decoder, weights_only=True), os.path.join(place, "damaged.pth")
        del state["fpn_in.1.0.weight"]
        torch.save(state, damaged)
        cases = [("decoder.pth", decoder, encoder, tables), ("encoder.pth", encoder, encoder, tables)]
        cases += [(r"damaged.pth.*1\.0\.weight", encoder, damaged, tables), ("nowhere", encoder, decoder, "nowhere")]
        cases += [("joint_dataset", encoder, self.ade20k[1], tables), ("object150.csv", encoder, decoder, self.table)]
        cases += [("nothing.pth", "nothing.pth", decoder, tables)]
        hierarchy, header = "object_part_hierarchy.csv", "label,object_name,part_labels,part_names"
        for k, (table, row) in enumerate((("object.csv", ""), (hierarchy, "1,x,,-;y"), (hierarchy, "1,object 3"))):
            copied = shutil.copytree(tables, os.path.join(place, f"tables{k}"))
            write(os.path.join(copied, table), f"{header}\n{row}")
            cases.append((copied, encoder, decoder, copied))
        cases.append(("short.csv", *self.ade20k, write(os.path.join(place, "short.csv"), "Idx,Name\n1,wall\n")))
        for named, *files in cases:
            with self.subTest(named), self.assertRaisesRegex(ValueError, named):
                upernet.load_release(*files)

    def test_metrics_by_the_command(self):
        ade, objects, parts = Ade(), np.full((48, 64), 300), np.zeros((48, 64), int)
        objects[:24, :32], objects[40:], parts[:4, :4], parts[6:8, :4] = 7, 9, 20, 21
        ade.add(objects, {7: "car", 300: "wall", 9: "dust", 20: "wheel", 21: "dent"}, ["outdoor", "bus stop"], parts)
        Path(ade.folder, "images/ADE/training").rename(Path(ade.folder, "images/ADE/validation"))
        vocabulary, index, path = self.networks["paper"][1], ade.index(), os.path.join(ade.root, "m.json")
        labels = Source(index, vocabulary, evaluate.released_names(self.tables, index, vocabulary)).labels(0)
        self.assertTrue((labels["object"] == np.select([objects == 7, objects == 300], [3, 1], -1)).all())
        self.assertTrue((labels["part"] == (parts == 20)).all() and labels["scene"] == 17)
        options = ("--labels", self.tables, "--size", 32, "--data", "ade20k", "--root", ade.root, "--json", path)
        status, said, err = command(evaluate.main, "--release", *self.paper, *options)
        self.assertEqual((status, err), (0, ""))
        self.assertRegex(said, "ade20k: .*validation")
        metrics = read_json(path)
        known = {name for name, value in metrics["object"]["iou"].items() if value is not None}
        self.assertEqual((set(metrics), known), ({"scene", "object", "part"}, {"object 1", "object 3"}))
        self.assertFalse(os.path.exists(os.path.join(ade.root, "split.json")))
        save_jpeg(photo := os.path.join(ade.root, "x.jpg"), 48, 64)
        options = ("--labels", self.tables, "--size", 32, "--photo", photo, "--pictures", ade.root)
        status, said, err = command(evaluate.main, "--release", *self.paper, *options)
        mask, maps = os.path.join(ade.root, "x_object.png"), os.path.join(ade.root, "x_upernet.npz")
        with Image.open(mask) as mask, np.load(maps) as maps:  # the authors number from 0, background
            self.assertTrue(status == 0 and (np.asarray(mask) == maps["object"]).all(), err)

    def source(self, release: str, source: str, layout: str, names: dict, tags=("",), numbers=()) -> Source:
        """Data with names of class numbers, and `numbers` in its pixels, read for a released network."""
        pixels = torch.tensor([(0, n, 0, 9) for n in numbers], dtype=torch.int64).reshape(-1, 4)
        images, sizes = [f"{k}.jpg" for k in range(len(tags))], torch.full((len(tags), 2), 4)
        index = Index(source, layout, "/data", "", images, sizes, [""] * len(tags), list(tags), pixels, names, [])
        vocabulary, labels = self.networks[release][1], {"paper": self.tables, "ade20k": self.table}.get(release)
        return Source(index, vocabulary, evaluate.released_names(labels, index, vocabulary))

    def test_sizes_classes_numbers_and_scenes(self):
        sizes = {name: net.test_size for name, (net, _) in self.networks.items()}  # short, longest, multiple
        self.assertEqual(sizes, {"paper": (450, 1000, 8), "ade20k": (450, 1000, 32), "mmseg": (512, 2048, 1)})
        paper, objects = self.networks["paper"][1], self.networks["ade20k"][1]["object"]
        self.assertEqual({level: len(names) for level, names in paper.items()}, COUNTS | {"part": 78})
        self.assertEqual(paper["object"][:2], ["background", "object 1"])
        self.assertEqual(paper["part"]["object 1"], ["background", "part 1", "part 2", "part 3"])
        self.assertEqual((len(set(objects)), objects[0]), (150, "thing 1"))  # although two begin with "screen"
        table = {n: f"thing {n}" for n in range(1, 151)}
        source = self.source("ade20k", "ade20k", "sceneparsing", table, numbers=[150])
        self.assertEqual((source.class_of.tolist(), source.levels), (list(range(-1, 150)), ["object"]))
        source = self.source("paper", "os", "os", {2: "Brick", 3: "Mud"}, numbers=[2, 3])
        self.assertEqual(source.class_of.tolist(), [-1, -1, 25, -1])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            source = self.source("paper", "ade20k", "ade2021", {7: "car"}, ["bus stop", "bus_stop", "", "attic"])
        self.assertEqual(source.tags, [17, 17, -1, -1])
        self.assertIn("attic", said.getvalue())

    def test_tables_that_do_not_fit_the_data_are_refused(self):
        cases = ("paper", "sceneparsing"), ("ade20k", "ade2021"), ("ade20k", "sceneparsing")  # one class, not 150
        for data in [(release, "ade20k", layout, {1: "wall"}) for release, layout in cases]:
            with self.subTest(data), self.assertRaisesRegex(UserError, "/data"):
                self.source(*data)


class TestMmseg(unittest.TestCase):  # files of mmsegmentation's; what its network answers is in TestRelease
    def file(self, meta: dict = {}, classes: int = 3) -> str:
        (path,), _ = released_files("mmseg", 1, meta, backbone="resnet18", channels=8, classes={"object": classes})
        return path

    def test_names_of_the_classes(self):
        names, numbered = ["wall", "sky", "tree"], ["class 1", "class 2", "class 3"]
        cases = [({"CLASSES": tuple(names)}, None, names), ({"dataset_meta": {"classes": names}}, None, names)]
        cases += [({"CLASSES": names}, list("abc"), list("abc")), ({"config": "align_corners=False"}, None, numbered)]
        for meta, given, expected in cases:
            net, vocabulary = upernet.load_mmseg(self.file(meta), given)
            self.assertEqual((vocabulary, net.classes), ({"object": expected}, {"object": 3}))
        self.assertRaisesRegex(ValueError, "upernet.pth", upernet.load_mmseg, self.file(), ["a", "b"])

    def test_refused_files(self):
        history = type("HistoryBuffer", (), {"__module__": "mmengine.logging"})  # version 1.x: reading it runs code
        modules = {"mmengine": mock.Mock(), "mmengine.logging": mock.Mock(HistoryBuffer=history)}
        with mock.patch.dict(sys.modules, modules):
            paths = [self.file({"loss": history()}), os.path.join(new_folder("other"), "other.pth")]
        torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, paths[1])
        aligned = "decode_head=dict(type='UPerHead', align_corners = True)"  # its 769x769 networks
        for path in (*paths, self.file({"config": aligned}), self.file({"cfg": aligned})):
            self.assertRaisesRegex(ValueError, re.escape(path), upernet.load_mmseg, path)
            self.assertIn(path, refusal(self, evaluate.main, "--release", path, "--photo", "a.jpg"))

    def test_photos_and_metrics_by_the_command(self):
        names, root, out = [f"thing {k}" for k in range(1, 151)], new_folder("sceneparsing"), new_folder("mmseg-out")
        rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{k}\t0\t0\t0\t{name}, other" for k, name in enumerate(names, 1))]
        write(os.path.join(root, "objectInfo150.txt"), "\n".join(rows))
        path, photo = self.file({"CLASSES": names}, 150), os.path.join(root, "images", "validation", "a.jpg")
        save_jpeg(photo, 48, 60)
        with Image.open(photo) as picture, torch.inference_mode():  # short side 512, no padding
            resized = np.array(picture.resize((640, 512), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            logits = upernet.load_mmseg(path)[0](torch.from_numpy(resized)[None] / 255)["object"]
        predicted = plain_resize(logits, (48, 60))[0].argmax(dim=0).numpy() + 1
        mask = np.random.default_rng(0).choice([0, 1, 2, 77, 150], (48, 60))
        mask[:24] = predicted[:24]  # something to get right
        save(mask, root, "annotations", "validation", "a.png")
        metrics = ("--data", "ade20k", "--root", root, "--json", os.path.join(root, "m.json"))
        for options in (("--photo", photo, "--pictures", out), metrics):
            status, _, err = command(evaluate.main, "--release", path, *options)
            self.assertEqual((status, err), (0, ""))
        self.assertEqual(set(os.listdir(out)), {"a_upernet.png", "a_upernet.npz", "a_object.png"})
        self.assertIn("--labels", refusal(self, evaluate.main, "--release", path, "--labels", root, *metrics))
        with np.load(os.path.join(out, "a_upernet.npz")) as maps:
            self.assertGreater((predicted == maps["object"] + 1).mean(), 0.99)
            self.assertEqual(maps["object_names"].tolist(), names)
            self.assertTrue((np.asarray(Image.open(os.path.join(out, "a_object.png"))) == maps["object"] + 1).all())
        found, labelled = read_json(root, "m.json")["object"], mask > 0
        self.assertAlmostEqual(found["pixel_accuracy"], (predicted == mask)[labelled].mean(), delta=0.01)
        for k, name in enumerate(names, start=1):  # None where nothing is labelled
            union = (mask == k) | (predicted == k) & labelled
            iou = ((mask == k) & (predicted == k)).sum() / union.sum() if (mask == k).any() else None
            self.assertAlmostEqual(found["iou"][name], iou, delta=0.01)


# ---------------------------------------------------------------- metrics
CONCEPTS = {"scene": ["kitchen", "street"], "object": ["wall", "car", "pot", "person"]}
CONCEPTS |= {"part": {"car": ["background", "wheel", "door"], "person": ["background", "head"]}}
CONCEPTS |= {"material": ["wood", "brick", "metal", "glass", "stone"], "texture": ["dotted", "banded", "grid"]}


def plain_iou(pairs: list[tuple[int, int]], k: int) -> float | None:
    """Of class k over (truth, prediction)s; None if it is nowhere the truth."""
    both, either = sum(t == p == k for t, p in pairs), sum(k in pair for pair in pairs)
    return both / either if any(t == k for t, _ in pairs) else None


class TestMetrics(unittest.TestCase):
    def test_maps_against_a_loop_over_pixels(self):
        rng, metrics, pairs = np.random.default_rng(0), evaluate.Metrics(CONCEPTS), []
        for n in range(3):  # no person anywhere, and the last one without a label
            truth = rng.integers(-1, 3, (9, 11)) if n < 2 else np.full((4, 5), -1)
            predicted = rng.integers(0, 4, truth.shape)
            metrics.add("object", torch.from_numpy(predicted), torch.from_numpy(truth))
            pairs += [(int(t), int(p)) for t, p in zip(truth.ravel(), predicted.ravel()) if t >= 0]
        results = metrics.results()["object"]
        self.assertAlmostEqual(results["pixel_accuracy"], sum(t == p for t, p in pairs) / len(pairs))
        iou = {name: plain_iou(pairs, k) for k, name in enumerate(CONCEPTS["object"])}
        self.assertEqual((results["iou"], iou["person"]), (iou, None))
        self.assertAlmostEqual(results["mean_iou"], np.mean([v for v in iou.values() if v is not None]))

    def test_parts_against_a_loop_over_pixels(self):
        rng, metrics = np.random.default_rng(1), evaluate.Metrics(CONCEPTS)
        slices, counted = {1: slice(0, 3), 3: slice(3, 5)}, {1: [], 3: []}
        for n in range(4):
            logits = torch.from_numpy(rng.standard_normal((5, 4, 5)))
            objects = torch.from_numpy(rng.integers(-1, 4, (16, 20)))
            parts = torch.zeros_like(objects)
            full = F.interpolate(logits[None], (16, 20), mode="bilinear")[0].numpy()
            for index, channels in slices.items():
                if n == 1 and index == 3:  # person has no annotated part in image 1: not counted in this image
                    continue
                inside, width = objects == index, channels.stop - channels.start
                parts[inside] = torch.from_numpy(rng.integers(0, width, int(inside.sum())))
                for y, x in np.argwhere(inside.numpy()):
                    counted[index].append((int(parts[y, x]), int(full[channels, y, x].argmax())))
            metrics.add_parts(logits, objects, parts, slices, (16, 20))
        results, everything = metrics.results()["part"], counted[1] + counted[3]
        self.assertAlmostEqual(results["pixel_accuracy"], sum(t == p for t, p in everything) / len(everything))
        objects = (("car", 1, 3), ("person", 3, 2))
        iou = {name: [plain_iou(counted[index], k) for k in range(n)] for name, index, n in objects}
        self.assertEqual({name: list(of_parts.values()) for name, of_parts in results["iou"].items()}, iou)
        self.assertAlmostEqual(results["mean_iou_bg"], np.mean([np.mean(of_parts) for of_parts in iou.values()]))

    def test_nothing_labelled_is_null_in_json(self):
        metrics, none = evaluate.Metrics(CONCEPTS), torch.zeros(4, 4, dtype=torch.long)
        metrics.add("material", none, none - 1)
        metrics.add("texture", torch.tensor(0), torch.tensor(-1))
        metrics.add_parts(torch.zeros(5, 2, 2), none + 1, none, {1: slice(0, 3)}, (4, 4))
        metrics.add("scene", torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, -1, 1]))
        results, iou = json.loads(json.dumps(metrics.results(), allow_nan=False)), dict.fromkeys(CONCEPTS["material"])
        self.assertEqual(results["material"], {"pixel_accuracy": None, "mean_iou": None, "iou": iou})
        self.assertEqual((results["part"]["mean_iou_bg"], results["texture"]), (None, {"top1": None, "n": 0}))
        self.assertEqual(results["scene"], {"top1": 2 / 3, "n": 3})

    def test_class_map_is_the_argmax_of_the_upsampled_logits(self):
        """Without padding exactly, with ties to the lowest index, however many classes are possible."""
        torch.manual_seed(0)
        for filled, size in (((64, 96), (100, 150)), ((50, 70), (333, 421)), ((45, 90), (20, 31))):  # of 64 x 96
            logits = torch.randn(7, 16, 24, dtype=torch.float64)
            scale = (4 * size[0] / filled[0], 4 * size[1] / filled[1])
            bordered = F.pad(logits[None], (0, 1, 0, 1), mode="replicate")
            plain = F.interpolate(bordered, scale_factor=scale, mode="bilinear", recompute_scale_factor=False)
            plain = plain[0, :, : size[0], : size[1]].argmax(dim=0)
            self.assertTrue(torch.equal(evaluate.class_map(logits, filled, size), plain))
        rough, (coarse,), x = torch.randn(40, 24, 32), 4 * torch.randn(1, 40, 4, 5), torch.randn(1, 30, 40)
        smooth = F.interpolate(coarse[None], (24, 32), mode="bicubic")[0]  # most classes are nowhere the best
        equal = smooth[::2].repeat_interleave(2, dim=0)  # every class twice
        cases = [rough, rough[:, :1], rough[:, :, :1], rough[:1], smooth, equal, smooth - 1e4]
        cases = [(y, size) for y in cases for size in ((97, 131), tuple(4 * n for n in y.shape[1:]), (7, 300))]
        many = torch.cat([x - 9, x.repeat(7, 1, 1), x - 5])
        turned = many.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        large = [*(x.repeat(n, 1, 1) for n in (3, 7, 11)), many, turned, 1e4 + 1e-3 * torch.randn(60, 30, 40)]
        large += [(3 * torch.randn(150, 30, 40)).mul(4).round() / 4]
        cases += [(torch.full((17, 16, 16), 0.1), (64, 64)), (torch.randn(150, 1, 1) * 1e38, (44, 62))]
        for logits, size in [*cases, *((y, (450, 600)) for y in large)]:
            with self.subTest(shape=tuple(logits.shape), size=size):
                plain = F.interpolate(logits.contiguous()[None], size, mode="bilinear")[0].argmax(dim=0)
                filled = tuple(4 * n for n in logits.shape[1:])
                self.assertTrue(torch.equal(evaluate.class_map(logits, filled, size), plain))
        many[3, 5, 5] = math.nan
        self.assertEqual(evaluate.class_map(many, (120, 160), (450, 600)).shape, (450, 600))

    def test_relations_against_a_plain_count_and_in_the_words_of_table_4(self):
        relations = evaluate.Relations(CONCEPTS, upernet.LEVELS)
        rng, zeros = np.random.default_rng(0), np.zeros((6, 8), int)
        rare = {"scene": np.array([0.9, 0.1]), "part": zeros - 1, "material": zeros, "texture_map": zeros}
        photos = [{**rare, "object": zeros + 2 * (k < 2)} for k in range(8)]  # two kitchens with a pot
        for k in range(7):
            seen = {"scene": np.array([0.0, 1.0]) if k == 2 else rng.random(2), "part": rng.choice([-1, 1, 2], (6, 8))}
            seen |= {"object": zeros if k == 2 else rng.integers(0, 2 + (k == 0), (6, 8))}
            photos.append(seen | {"material": rng.integers(0, 5, (6, 8)), "texture_map": rng.integers(0, 2, (6, 8))})
        for seen in photos:
            relations.add(seen)
        found = relations.results()
        for k, scene in enumerate(CONCEPTS["scene"]):
            maps = [seen["object"] for seen in photos if seen["scene"].argmax() == k]
            shares = {name: np.mean([(m == i).any() for m in maps]) for i, name in enumerate(CONCEPTS["object"])}
            self.assertTrue(k == 1 or 0.1 < shares["pot"] < 0.3)  # less than three of ten kitchens do not count
            self.assertEqual(found["scene-object"][scene], {name: v for name, v in shares.items() if v >= 0.3})
        kinds = [("object", "material", 1, "car"), ("part", "material", 2, "car: door")]
        for first, second, index, name in [*kinds, ("material", "texture_map", 4, "stone")]:
            pairs = [seen[second][at] for seen in photos for at in np.ndindex(6, 8) if seen[first][at] == index]
            level = second.removesuffix("_map")
            shares = {name: pairs.count(k) / len(pairs) for k, name in enumerate(CONCEPTS[level])}
            best = sorted((n for n in shares if shares[n] >= 0.1), key=lambda n: -shares[n])[:3]
            self.assertEqual(list(found[f"{first}-{level}"][name]), best)
            for n in best:
                self.assertAlmostEqual(found[f"{first}-{level}"][name][n], shares[n] / sum(shares[n] for n in best))
        relations = evaluate.Relations(CONCEPTS, upernet.LEVELS)
        path = os.path.join(new_folder("relations"), "r.json")
        material = np.repeat([0] * 13 + [1] * 7, 5).reshape(10, 10)
        seen = {"scene": np.array([1.0, 0.0]), "object": material * 0 + 2, "part": material * 0 - 1}
        relations.add(seen | {"material": material, "texture_map": material * 0})
        with contextlib.redirect_stdout(io.StringIO()) as out:
            relations.report(path)
        lines = ["kitchen is composed of pot", "pot is made of wood (65%) and brick (35%)", "wood is dotted (100%)"]
        self.assertLessEqual(set(lines), set(out.getvalue().splitlines()))
        self.assertEqual(read_json(path)["object-material"], {"pot": {"wood": 0.65, "brick": 0.35}})


# ---------------------------------------------------------------- data
def scanned(root: str, source: str = "ade20k", **options) -> tuple[Index, str]:
    """(index, stderr) of a scan with its cache below `root`."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        return datasets.scan(root, source, os.path.join(root, ".cache"), **options), err.getvalue()


def refusal(test: unittest.TestCase, main, *argv) -> str:
    """The only line on stderr of a command that ends with status 2."""
    status, _, err = command(main, *argv)
    test.assertEqual((status, err.count("\n")), (2, 1), err)
    return err


def textures(root: str, **listed: str) -> str:
    """DTD with the images that train1, val1 and test1 list, 70 x 210, black with a light third in the middle."""
    picture = np.repeat([0, 200, 0], 70)[None, :, None] * np.ones((70, 1, 3))
    for name in ("train1", "val1", "test1"):
        write(os.path.join(root, "dtd", "labels", f"{name}.txt"), listed.get(name, ""))
        for image in listed.get(name, "").splitlines():
            save(picture, root, "dtd", "images", image)
    return root


def surfaces(root: str, names: list[str], reds: list[np.ndarray]) -> str:
    """OpenSurfaces with photos of 48 x 64 pixels, and of each a map of numbers in the list of names, from 1."""
    rows = [f"{100 + k},{name},{k}\n" for k, name in enumerate(names, start=1)]
    table = "".join(["substance_id,substance_name,red_color\n", *rows])
    write(os.path.join(root, "os", "label-substance-colors.csv"), table)
    for k, red in enumerate(reds):
        save_jpeg(os.path.join(root, "os", "photos", f"{k}.jpg"), 48, 64)
        save(np.stack([red, 0 * red, 0 * red], axis=-1), root, "os", "photos-labels", f"{k}.png")
    return root


class TestVocabulary(unittest.TestCase):
    def test_objects_and_scenes_after_merging(self):
        """Objects need images and pixels, scenes images; names in UTF-8 or Latin-1."""
        ade, names = Ade(), {7: "voiture à cheval, auto", 8: "voiture à chevals", 300: "wall", 9: "sky", 10: "dot"}
        scenes = ["outdoor", "urban", "Street"], ["outdoor", "street"], ["indoor", "misc"], [], ["attic"]
        for k, scene in enumerate(scenes):  # a scene is its most specific name
            objects = np.full((40, 40), 300)
            objects[:10] = 9 if k < 2 else 0
            objects[10:20] = 7 if k % 2 else 8  # two and three images each: five of the merged class
            objects[39, 39] = 10  # five pixels of dot; sky is in two images
            ade.add(objects, names, scene, encoding="latin-1" if k == 1 else "utf-8")
        index = ade.index()
        self.assertEqual(index.tags, ["street", "street", "", "", "attic"])
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least(images=4, pixels=100, scenes=2))
        self.assertEqual(vocabulary, {"scene": ["street"], "object": ["wall", "voiture à cheval"]})
        self.assertEqual([Source(index, vocabulary).labels(i)["scene"] for i in range(5)], [0, 0, -1, -1, -1])
        scenes = datasets.build_vocabulary({"ade20k": index}, least())["scene"]
        self.assertEqual(scenes, ["attic", "street"])

    def test_first_synonym_plural_and_sides(self):
        names = ["Building, edifice", "buildings", "bus", "box", "boxes", "berry", "berries", "glasses"]
        expected = ["building", "building", "bus", "box", "box", "berry", "berry", "glasses"]
        self.assertEqual(list(datasets.merged_names(dict(enumerate(names))).values()), expected)
        parts = datasets.merged_names({1: "left arm", 2: "right arm", 3: "arms", 4: "upright leg"}, part=True)
        self.assertEqual(list(parts.values()), ["arm", "arm", "arm", "upright leg"])

    def test_parts_are_kept_per_object_on_the_first_level(self):
        ade, names = Ade(), {5: "car", 6: "house", 20: "left wheel", 21: "right wheel", 22: "door", 23: "knob"}
        for k in range(3):
            objects, parts = np.repeat([5, 6], 20)[:, None].repeat(40, axis=1), np.zeros((40, 40), int)
            parts[0, :5], parts[1, :5], parts[25, :5], parts[26, :5] = 20, 21, 22, 24
            parts[5, :5] = 22 if k == 0 else 0  # a car's door in a single image
            stem = ade.add(objects, {**names, 24: "background"}, ["street"], parts)
            save(np.stack([0 * parts, 23 * (parts == 22), 0 * parts], axis=-1), f"{stem}_parts_2.png")
        index = ade.index()
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least(parts=2))
        self.assertEqual(vocabulary["part"], {"car": ["background", "wheel"], "house": ["background", "door"]})
        part = Source(index, vocabulary).labels(0)["part"]  # the car's list lacks the door: background
        self.assertEqual((part[[0, 1, 5, 25, 26], 0].tolist(), part[25, 6]), ([1, 1, 0, 1, 0], 0))
        everything = datasets.build_vocabulary({"ade20k": index}, least())
        self.assertEqual(everything["part"]["car"], ["background", "wheel", "door"])

    def test_opensurfaces_merges(self):
        raw = "Concrete,Stone,Plastic - clear,Plastic - opaque,Granite/Marble,Carpet/Rug,Fabric/Cloth,Paper/Tissue"
        expected = "stone,stone,plastic,plastic,polished stone,carpet,fabric,paper,rubber/latex,wood,,,".split(",")
        raw = [*raw.split(","), "Rubber/Latex", "Wood", "Sky", "Wood-painted", "Brick"]
        red = np.arange(65)[None] // 5 + np.ones((60, 1), int)  # not the photo's size
        root = surfaces(new_folder("surfaces"), raw, [red, red * (red < 13)])  # brick is in one image alone
        index, err = scanned(root, "os")
        self.assertEqual((index.broken, err), ([], ""))
        materials = datasets.build_vocabulary({"os": index}, least(images=2))["material"]
        self.assertEqual(materials, sorted(set(expected) - {""}))
        labels = Source(index, {"material": materials}).labels(0)["material"]
        names = [materials[v] if v >= 0 else "" for v in labels[3, 2::5]]
        self.assertEqual((names, labels.shape), (expected, (60, 65)))


class TestScan(unittest.TestCase):
    def set_aside(self, root: str, source: str, paths: list[str], kept: list[str]) -> list[str]:
        """Asserts that the images of these broken files are set aside, and others are kept. Returns the reasons."""
        argv = ("--data", source, "--root", root)
        self.assertIn("--allow-broken", refusal(self, datasets.main, *argv))
        index, _ = scanned(root, source, allow_broken=True)
        reasons = [reason for _, reason in index.broken]
        self.assertEqual((index.images, len(reasons)), (kept, len(paths)), reasons)
        status, out, err = command(datasets.main, *argv, "--allow-broken")
        self.assertEqual(status, 0, err)
        for path in paths:
            self.assertEqual(len([r for r in reasons if r.startswith(f"{path}: ") and r in out]), 1, path)
        return reasons

    def test_broken_files_of_ade20k(self):
        put, other_size = (lambda content: lambda path: Path(path).write_bytes(content)), np.zeros((20, 40, 3))
        half = lambda path: put(Path(path).read_bytes()[: os.path.getsize(path) // 2])(path)
        changes = [(".jpg", half), (".jpg", put(b"")), ("_seg.png", os.remove), ("_seg.png", put(b""))]
        changes += [("_seg.png", lambda path: save(other_size, path)), ("_parts_1.png", put(b"no picture"))]
        changes += [("_parts_1.png", lambda path: save(other_size, path)), (".json", os.remove), (".json", put(b"{"))]
        annotations = {"scene": 3, "object": []}, {"scene": [], "object": [{"name": "wall"}]}
        texts = ["[]", "{}", *(json.dumps({"annotation": annotation}) for annotation in annotations)]
        changes += [(".json", put(text.encode())) for text in texts]
        ade, paths = Ade(), []
        for ending, change in [*changes, (".jpg", os.remove), ("", str)]:
            stem = ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"], np.zeros((40, 40), int))
            change(stem + ending)
            paths.append(os.path.relpath(stem + ending, ade.folder))
        self.set_aside(ade.root, "ade20k", paths[: len(changes)], [f"{paths[-1]}.jpg"])

    def test_broken_files_of_other_layouts(self):
        root = surfaces(new_folder("others"), ["wood"], [np.ones((64, 64), int)] * 3)
        own_data(root, [np.repeat([[1, 2]], 20, axis=0).repeat(10, axis=1)] * 4)
        maps, masks = os.path.join(root, "os", "photos-labels"), os.path.join(root, "annotations", "training")
        write(os.path.join(maps, "1.png"), "no picture")
        os.remove(os.path.join(maps, "2.png"))
        self.set_aside(root, "os", ["photos-labels/1.png", "photos-labels/2.png"], ["photos/0.jpg"])
        save(np.ones((20, 20, 3)) * [1, 200, 0], masks, "1.png")
        save(np.ones((30, 20)), masks, "2.png")
        os.remove(os.path.join(masks, "3.png"))
        paths = [f"annotations/training/{k}.png" for k in (1, 2, 3)]
        reasons = self.set_aside(root, "ade20k", paths, ["images/training/0.jpg"])
        self.assertRegex(" ".join(reasons), "1.png.*colour.*2.png.*20 x 30.*20 x 20.*3.png.*missing")

    def test_one_broken_file_in_twenty_is_tolerated(self):
        ade = Ade()
        stems = [ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"]) for _ in range(20)]
        for stem, expected in zip(stems, ((0, False), (2, True))):
            os.remove(f"{stem}_seg.png")
            status, _, err = command(datasets.main, "--data", "ade20k", "--root", ade.root)
            self.assertEqual((status, "--allow-broken" in err), expected, err)

    def test_parts_count_in_labelled_objects_and_unknown_numbers_are_reported(self):
        for number, part in ((5, 6), (99, 6), (5, 798)):  # of 5 and 6 the names are known
            ade, objects, parts = Ade(), np.zeros((40, 40), int), np.zeros((40, 40), int)
            objects[:20], parts[10:30] = number, part
            ade.add(objects, {5: "car", 6: "wheel"}, ["street"], parts)
            index, err = scanned(ade.root)
            self.assertEqual(index.pixels.tolist(), [[0, number, 0, 20 * 40], [0, number, part, 10 * 40]])
            with self.subTest(number=number, part=part):
                self.assertEqual(re.findall(r"\b(?:99|798)\b", err), [str(n) for n in (number, part) if n > 6])

    def test_a_change_is_noticed_a_damaged_index_rebuilt_and_else_nothing_read_again(self):
        ade = Ade()
        stem = ade.add(np.full((40, 40), 5), {5: "wall"}, ["street"])
        whole, path = ade.index()._asdict(), Path(ade.root, ".cache", "ade20k.index.pt")
        without = {key: value for key, value in whole.items() if key != "pixels"}
        for damaged in (b"", path.read_bytes()[:999], b"no index", {**whole, "objects": 0}, without, {}, [whole]):
            path.write_bytes(damaged) if isinstance(damaged, bytes) else torch.save(damaged, path)
            self.assertEqual(ade.index().pixels.tolist(), [[0, 5, 0, 1600]])
        with mock.patch("datasets.scan_image", side_effect=AssertionError("read again")):
            self.assertEqual(ade.index().names, {5: "wall"})
        write(f"{stem}.json", Path(f"{stem}.json").read_text().replace("wall", "door"))  # of the same size
        self.assertEqual(ade.index().names, {5: "door"})
        ade.add(np.full((40, 40), 6), {6: "sky"}, ["street"])
        self.assertEqual((len(ade.index().images), sorted(ade.index().names.values())), (2, ["door", "sky"]))


class TestOwnData(unittest.TestCase):
    MASK = np.repeat([[1, 1, 2, 0]], 40, axis=0).repeat(10, axis=1)  # 40 x 40: a half of 1, a quarter of 2, one of 0

    def labels(self, root: str, i: int = 0) -> np.ndarray:
        index, _ = scanned(root)
        return Source(index, datasets.build_vocabulary({"ade20k": index}, least())).labels(i)["object"]

    def test_is_found_with_the_names_of_its_table_and_refused_if_two(self):
        """Every class of the table, whatever the thresholds, those of one name apart; scenes and sides of the files."""
        names = ["wall   ", "building, edifice  ", "screen, door screen", "screen, silver screen"]
        info = "".join(["Idx\tRatio\tName\n", *(f"{k}\t0.5\t{name}\n" for k, name in enumerate(names, start=1))])
        sea, scenes = "sea\n land \nice\n", "0 street\n1 misc\n2 street\n"
        tables = {"classes": sea, "objectInfo150": info, "sceneCategories": scenes}
        cases = [({}, ["class 1", "class 2"]), ({"classes": sea}, ["sea", "land", "ice"])]
        cases += [(tables, ["wall", "building", "screen (3)", "screen (4)"])]
        for place, (tables, names) in itertools.product(("", "ade20k", "ade20k/mine"), cases):
            with self.subTest(place=place, names=names):
                root = new_folder("own")
                top = own_data(os.path.join(root, place), [self.MASK] * 3, **tables)
                for name in ("images/{}/2.jpg", "annotations/{}/2.png"):
                    os.renames(*(os.path.join(top, name.format(side)) for side in ("training", "validation")))
                index, err = scanned(root)
                tags = ["street", "", "street"] if "sceneCategories" in tables else [""] * 3
                self.assertEqual((index.tags, index.official), (tags, ["train"] * 2 + ["val"]))
                self.assertEqual(names[-1].split()[0] in err, len(names) > 2, err)  # classes without a pixel
                vocabulary = datasets.build_vocabulary({"ade20k": index}, least(50, 10**6, scenes=2))
                self.assertEqual(vocabulary, {"object": names} | ({"scene": ["street"]} if any(tags) else {}))
                self.assertTrue(os.path.samefile(index.folder, top) and len(set(vocabulary["object"])) == len(names))
                self.assertTrue((self.labels(root, 2) == self.MASK - 1).all())
        tops = [own_data(os.path.join(root, "ade20k", name), [self.MASK]) for name in ("mine", "yours")]
        line = refusal(self, datasets.main, "--data", "ade20k", "--root", root)  # two data sets
        self.assertTrue(all(top in line for top in tops), line)

    def test_255_is_unlabelled_unless_the_table_names_it(self):
        """And so is 0; what looks like classes that are numbered from 0 is said."""
        for values, n in itertools.product(([255, 1, 2, 0], [255, 1, 2], [0, 1, 2], [1, 2]), (0, 2, 3, 255)):
            table = {"classes": "".join(f"name {k}\n" for k in range(n))} if n else {}
            root = own_data(new_folder("own"), [np.repeat([values], 40, axis=0).repeat(10, axis=1)], **table)
            labels, (_, err) = self.labels(root), scanned(root)
            expected = {0: -1, 1: 0, 2: 1, 255: 254 if n == 255 else -1}
            self.assertEqual(labels[5, ::10].tolist(), [expected[number] for number in values])
            told = 0 in values and (n == 3 or 255 in values and n < 255)  # a class without a pixel, or two unlabelled
            self.assertEqual("add 1" in err, told, f"{values}, {n}")

    def test_masks_without_two_classes_are_refused(self):
        table, mains = {"classes": "one\ntwo\n"}, (datasets.main, balance_split.main, train.main)
        cases = [*itertools.product(([0, 255], [0], [0, 1], [0, 1, 255]), ({}, table)), ([51, 52], table)]
        for (values, tables), main in itertools.product(cases, mains):
            with self.subTest(values=values, tables=tables, main=main.__module__):
                root = own_data(new_folder("own"), [np.resize(values, (40, 40))] * 2, **tables)
                more = (*SMALL, "--weights", "none", "--iters", 0, "--out", os.path.join(root, "out"))
                line = refusal(self, main, "--data", "ade20k", "--root", root, *more if main is train.main else ())
                self.assertTrue(root in line and "--allow-broken" not in line, line)

    def test_numbers_beyond_the_table_are_reported_and_unlabelled(self):
        beyond = np.where(self.MASK == 2, 7, self.MASK)
        root = own_data(new_folder("own"), [self.MASK, beyond, beyond], classes="sea\nland\nglacier\n")
        for _ in range(2):  # a scan, and its index
            _, err = scanned(root)
            self.assertEqual((err.count("\n"), "glacier" in err, "land" in err), (3, True, False), err)  # no pixel
            self.assertLessEqual({"2", "7"}, set(re.findall(r"\b\d+\b", err)), err)  # two images have a 7
        for i, mask in enumerate((self.MASK, beyond)):
            self.assertTrue((self.labels(root, i) == np.where(mask == 7, 0, mask) - 1).all())
        status, out, _ = command(datasets.main, "--data", "ade20k", "--root", root)
        pixels = dict(re.findall(r"^ +\d+ (\w+) +([\d,]+) pixels", out, re.MULTILINE))  # of each class of a small table
        self.assertEqual((status, pixels), (0, {"sea": "2,400", "land": "400", "glacier": "0"}))

    def test_photos_are_turned_as_their_exif_data_say(self):
        root, exif = own_data(new_folder("own"), [self.MASK[:, :30]] * 2), Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (40, 30)).save(os.path.join(root, "images", "training", "0.jpg"), exif=exif)
        index, _ = scanned(root)
        self.assertEqual((index.broken, index.sizes.tolist()), ([], [[40, 30]] * 2))
        self.assertEqual(Source(index, {"object": ["class 1", "class 2"]}).photo(0, (15, 20)).size, (30, 40))

    def test_masks_of_any_mode_with_one_number_a_pixel(self):
        grey, wide = Image.fromarray(self.MASK.astype(np.uint8)), self.MASK * 150  # numbers beyond 255
        palette = grey.copy()
        palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
        cases = [(picture, self.MASK) for picture in (grey, grey.convert("RGB"), grey.convert("RGBA"), palette)]
        cases += [(Image.fromarray(self.MASK == 1), self.MASK == 1), (Image.fromarray(wide.astype(np.uint16)), wide)]
        for picture, numbers in cases:
            with self.subTest(mode=picture.mode):
                root = own_data(new_folder("own"), [self.MASK, self.MASK])
                save(picture, root, "annotations", "training", "0.png")
                self.assertEqual(scanned(root)[0].broken, [])
                self.assertTrue((self.labels(root) == np.asarray(numbers, int) - 1).all())

    def test_hidden_files_and_files_elsewhere_are_not_data(self):
        root = own_data(new_folder("own"), [self.MASK])
        before, _ = scanned(root)
        for name in ("images/training/._0.jpg", "annotations/training/._0.png", "images/.x", "notes.txt", "more/0.jpg"):
            write(os.path.join(root, name), "no picture")
        with mock.patch("datasets.scan_image", side_effect=AssertionError("read again")):
            after, err = scanned(root)
        self.assertEqual((after.fingerprint, after.images, err), (before.fingerprint, ["images/training/0.jpg"], ""))
        write(os.path.join(root, "classes.txt"), "sea\nland\n", "utf-16")
        index, _ = scanned(root)
        self.assertEqual((index.names, index.fingerprint != before.fingerprint), ({1: "sea", 2: "land"}, True))
        os.remove(os.path.join(own_data(root, [self.MASK] * 3), "images", "training", "1.jpg"))
        self.assertIn("annotations/training/1.png", scanned(root)[1])  # has no photo


class TestToy(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root, parser = toy_root(whole=True), datasets.Parser("", datasets.DATA_OPTIONS)
        cls.indexes, minima = datasets.open_indexes(parser.complete(parser.parse_args(["--root", cls.root])))
        cls.vocabulary = datasets.build_vocabulary(cls.indexes, minima)

    def test_colour_alone_does_not_solve_it(self):
        """Nearest mean colour, of pixels for objects and materials, of images for the rest; a tenth is for testing."""
        bounds = {"object": ("ade20k", 0.3), "material": ("os", 0.3), "scene": ("ade20k", 0.5), "texture": ("dtd", 0.4)}
        for level, (name, bound) in bounds.items():
            source, n = Source(self.indexes[name], self.vocabulary), len(self.vocabulary[level])
            total, pixels, confusion = np.zeros((n, 3)), np.zeros(n), np.zeros((n, n))
            for i in sorted(range(len(source.index.images)), key=lambda i: i % 10 == 9):
                colours, labels = np.asarray(source.photo(i), np.float64), source.labels(i)[level]
                if level in ("scene", "texture"):
                    colours, labels = colours.mean(axis=(0, 1))[None], np.array([labels])
                else:
                    rows, columns = (np.arange(m) * full // m for m, full in zip(colours.shape, labels.shape))
                    labels = labels[rows[:, None], columns]
                    colours, labels = colours[labels >= 0], labels[labels >= 0].astype(int)
                if i % 10 != 9:
                    pixels += np.bincount(labels, minlength=n)
                    total += np.stack([np.bincount(labels, c, minlength=n) for c in colours.T], axis=1)
                else:
                    nearest = ((colours[:, None] - total / pixels[:, None]) ** 2).sum(axis=2).argmin(axis=1)
                    confusion += np.bincount(labels * n + nearest, minlength=n * n).reshape(n, n)
            score, right = confusion.trace() / confusion.sum(), confusion.diagonal()
            if level in ("object", "material"):
                iou = right / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1) - right, 1)
                score = iou[confusion.sum(axis=1) > 0].mean()
            with self.subTest(level=level):
                self.assertTrue(pixels.all() and 0 < score < bound, score)

    def test_has_what_it_promises_always_the_same_complete_or_not_at_all(self):
        for level, n in {"scene": 4, "object": 10, "part": 4, "material": 6, "texture": 8}.items():
            self.assertGreaterEqual(len(self.vocabulary[level]), n)
        self.assertEqual([index.broken for index in self.indexes.values()], [[], [], []])
        (path,) = Path(self.root, "toy", "ade20k").rglob("ADE_*_00000007_seg.png")
        with Image.open(path) as picture:
            red, green, _ = np.asarray(picture).astype(int).transpose(2, 0, 1)
        self.assertTrue((datasets.toy_scene(0, 7)[2][0] == red // 10 * 256 + green).all())
        place = new_folder("toy")
        with mock.patch("datasets.relief", side_effect=OSError("full")), contextlib.redirect_stdout(io.StringIO()):
            self.assertRaises(OSError, datasets.make_toy, os.path.join(place, "toy"), 0, 0, 1)
        self.assertEqual(os.listdir(place), [])


class TestBatches(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        root, cache = os.path.join(toy_root(), "toy"), new_folder("prepared")
        cls.indexes = {name: scanned(root, name)[0] for name in datasets.SOURCE_LEVELS}
        cls.vocabulary = datasets.build_vocabulary(cls.indexes, least(images=3, pixels=500, parts=3, scenes=3))
        cls.sources = {name: Source(index, cls.vocabulary, None, cache, 96, 200) for name, index in cls.indexes.items()}
        cls.plan = np.zeros((3, 5), np.int32)
        for k, index in enumerate(cls.indexes.values()):  # an upright image and three others, 96 x 144 pixels
            upright = (index.sizes[:, 0] > index.sizes[:, 1]).tolist()
            cls.plan[k] = k, upright.index(True), *[i for i, is_upright in enumerate(upright) if not is_upright][:3]

    def batch(self, k: int = 0, share=(1, 0, 1), **given) -> dict:
        given = {"sources": list(self.sources.values()), "plan": self.plan, "sizes": [64, 80]} | given
        return datasets.training_batch(k, **given, longest=200, seed=3, share=share)

    def test_plan(self):
        sizes = {"ade20k": {i: (3, 4) for i in range(300)}}
        sizes["os"] = {i: (4, 3) if i % 3 else (3, 4) for i in range(500, 600)}
        plan = datasets.plan_batches(sizes, 4000, 2, seed=0)
        self.assertEqual((plan.dtype, plan.shape), (np.int32, (4000, 3)))
        self.assertAlmostEqual((plan[:, 0] == 0).mean(), 0.75, delta=0.03)
        buckets = [(0, range(300)), (1, [i for i in sizes["os"] if i % 3]), (1, [i for i in sizes["os"] if not i % 3])]
        for position, bucket in buckets:
            rows, n = plan[(plan[:, 0] == position) & np.isin(plan[:, 1], bucket), 1:], len(bucket)
            self.assertAlmostEqual(len(rows) / 4000, n / 400, delta=0.03)
            for first in range(0, rows.size, n):  # once each before any twice, and none of another orientation
                one_pass = rows.ravel()[first : first + n].tolist()
                self.assertEqual(len(set(one_pass) & set(bucket)), len(one_pass))
        self.assertTrue((plan == datasets.plan_batches(sizes, 4000, 2, seed=0)).all())
        self.assertFalse((plan == datasets.plan_batches(sizes, 4000, 2, seed=1)).all())

    def test_workers_processes_and_accumulation_change_nothing(self):
        load = lambda n: torch.utils.data.DataLoader(range(3), None, collate_fn=self.batch, num_workers=n)
        for one, other in zip(load(0), load(2), strict=True):
            self.assertEqual(one.keys(), other.keys())
            for key, value in one.items():
                self.assertTrue(np.array_equal(value, other[key]), key)
        whole = self.batch()
        by_process = [self.batch(share=(1, rank, 2)) for rank in range(2)]
        for shares in (by_process, [self.batch(k, share=(2, 0, 1)) for k in range(2)]):
            self.assertEqual(shares[0]["files"] + shares[1]["files"], whole["files"])
            for key, start in itertools.product(("images", "object", "part", "scene"), (0, 2)):
                mine, theirs = shares[start // 2][key], whole[key][start : start + 2]
                for axis in range(1, mine.ndim):  # they are padded to the largest of their own
                    n = min(mine.shape[axis], theirs.shape[axis])
                    mine, theirs = mine.narrow(axis, 0, n), theirs.narrow(axis, 0, n)
                self.assertTrue(torch.equal(mine, theirs), key)

    def test_half_of_the_images_are_flipped_with_their_labels(self):
        source, i, flips = self.sources["ade20k"], self.plan[0, 2], []
        photo, labels = np.asarray(source.photo(i)), source.labels(i)
        self.assertGreater(labels["part"].max(), 0)
        for k in range(20):
            batch = self.batch(k, plan=np.array([[0, i]] * 20), sizes=[96])  # no resampling
            seen = batch["images"][0, :, :96, :144].permute(1, 2, 0).numpy()
            flips.append((seen == photo[:, ::-1]).all())
            self.assertTrue(flips[k] or (seen == photo).all())
            for level in ("object", "part"):
                expected = (labels[level][:, ::-1] if flips[k] else labels[level])[2::4, 2::4]
                self.assertTrue((batch[level][0, :24, :36].numpy() == expected).all())
        self.assertTrue(4 < sum(flips) < 16)

    def test_shapes_types_and_padding(self):
        scenes, photos, squares = (self.batch(k) for k in range(3))
        quarter = (4, *(n // 4 for n in scenes["images"].shape[2:]))
        expected = {"scene": ((4,), torch.int16), "object": (quarter, torch.int16), "part": (quarter, torch.uint8)}
        self.assertEqual({k: (tuple(scenes[k].shape), scenes[k].dtype) for k in expected}, expected)
        self.assertEqual((tuple(squares["images"].shape), squares["texture"].dtype), ((4, 3, 64, 64), torch.int16))
        self.assertEqual(set(photos), {"source", "files", "images", "material"})
        for batch, level in ((scenes, "object"), (photos, "material")):
            self.assertTrue(batch["images"].dtype == torch.uint8 and not any(n % 32 for n in batch["images"].shape[2:]))
            padding = (batch["images"] == torch.tensor(datasets.MEAN_COLOUR).view(3, 1, 1)).all(dim=1)[:, 2::4, 2::4]
            padding = padding.flip(1, 2).cummin(1).values.cummin(2).values.flip(1, 2)  # that colour, and all beyond too
            self.assertTrue(padding.any() and (batch[level][padding] == -1).all())
            self.assertTrue((batch[level][~padding] >= 0).any())

    def test_labels_lie_on_what_they_label(self):
        """A picture whose colour is its label, through resizing, flipping, padding and the quarter map."""
        rng, root = np.random.default_rng(0), new_folder("blocks")
        for k, (height, width) in enumerate(((97, 141), (300, 200), (64, 64), (64, 100))):
            rows, columns = np.arange(height)[:, None] * 5 // height, np.arange(width) * 7 // width
            mask = rng.integers(1, 5, (5, 7))[rows, columns]
            save(np.stack([mask * 50] * 3, axis=-1), root, "images", f"{k}.png")
            save(mask, root, "annotations", f"{k}.png")
        index, _ = scanned(root)
        source = Source(index, datasets.build_vocabulary({"ade20k": index}, least()), None, root)
        for k, (height, width) in enumerate(((64, 93), (96, 64), (64, 64), (64, 100))):
            batch = self.batch(sources=[source], plan=np.array([[0, k]]), sizes=[64])
            image, quarter = batch["images"][0, 0, 2::4, 2::4].numpy() / 50, batch["object"][0].numpy() + 1
            rows, columns = (4 * np.arange(n) + 2 for n in quarter.shape)
            inside = np.outer(rows < height, columns < width)
            self.assertTrue(((quarter > 0) == inside).all())
            agree = np.abs(image - quarter)[inside] < 0.3
            self.assertGreater(agree.mean(), 0.8 if k < 2 else 0.999)  # all but cells on an edge between two blocks

    def test_sizes_and_images_for_evaluation(self):
        """Images are padded as in training, or stretched up to a multiple; labels have their own size."""
        cases = [(300, 400, 150, 1000, 150, 200), (400, 300, 150, 1000, 200, 150), (1, 5000, 450, 1200, 1, 1200)]
        cases += [(100, 900, 150, 600, 67, 600), (900, 100, 150, 600, 600, 67)]  # the long side is at its limit
        for height, width, short, longest, *expected in cases:
            self.assertEqual(list(datasets.resized((height, width), short, longest)), expected)
        source, i = self.sources["ade20k"], int(self.plan[0, 2])
        for size, expected in (((451, 1000, 8), (456, 608)), ((451, 500, 32), (384, 512)), ((450, 501, 1), (376, 501))):
            pixels, filled = evaluate.network_input(Image.new("RGB", (640, 480)), (480, 640), size)
            self.assertEqual((tuple(pixels.shape), filled), ((1, 3, *expected), expected))
        for test_size, size in (((60, 200, None), (60, 90)), ((60, 200, 8), (64, 96))):
            image = evaluate.evaluation_image(0, self.sources, [("ade20k", i)], test_size)
            self.assertEqual((image["size"], tuple(image["images"].shape)), (size, (1, 3, 64, 96)))
            pixels, plain = image["images"][0].permute(1, 2, 0).numpy(), np.full((64, 96, 3), datasets.MEAN_COLOUR)
            plain[: size[0], : size[1]] = source.photo(i).resize(size[::-1], Image.Resampling.BILINEAR)
            self.assertLess(np.abs(pixels - plain).max(), 2)
            self.assertTrue(all((np.asarray(image[v]) == labels).all() for v, labels in source.labels(i).items()))

    def test_textures_are_cut_in_the_middle_for_evaluation(self):
        index, _ = scanned(textures(new_folder("odd names"), train1="gepünktelt 点/ein bild.png\n"), "dtd")
        self.assertEqual((index.images, index.tags), (["images/gepünktelt 点/ein bild.png"], ["gepünktelt 点"]))
        source = Source(index, {"texture": ["banded", "gepünktelt 点"]})
        image = evaluate.evaluation_image(0, {"dtd": source}, [("dtd", 0)], (450, 1200, None))
        self.assertEqual((tuple(image["images"].shape), image["images"][..., 3:-3].min()), ((1, 3, 64, 64), 200))
        self.assertEqual((int(image["texture"]), image["size"]), (1, (64, 64)))
        self.assertEqual(np.asarray(datasets.texture_square(source, 0, 0.0))[:, :-3].max(), 0)

    def test_prepared_labels_are_sampled_at_the_centres_of_their_cells(self):
        for name, i in (("ade20k", 2), ("ade20k", 11), ("os", 4)):
            index = self.indexes[name]
            source = Source(index, self.vocabulary, None, new_folder("smaller"), 70, 90)
            code, labels, upright = source.prepared(i), source.labels(i), np.diff(index.sizes[i])[0] < 0
            height, width = (90, 60) if upright else (60, 90)  # the longest side of 90 makes the short one 60
            self.assertEqual(code.shape, (height, width, 3))
            full = labels.get("object", labels.get("material"))
            for y, x in itertools.product(range(0, height, 7), range(0, width, 7)):
                at = int((y + 0.5) * full.shape[0] / height), int((x + 0.5) * full.shape[1] / width)
                self.assertEqual(code[y, x].tolist(), [0, full[at] + 1, labels["part"][at] if "part" in labels else 0])

    def test_prepared_labels_are_pictures_of_class_and_part(self):
        """Rebuilt when damaged or deleted, else only read; of another vocabulary or size in another folder."""
        ade, pixels, cache = Ade(), np.arange(40 * 48).reshape(40, 48), new_folder("cache")
        objects = pixels // 6 + 1  # 320 classes, all but the first with a wheel
        wheels = (pixels % 6 > 2) & (pixels > 5)
        names = {400: "wheel", **{n: f"thing {n}" for n in range(1, 321)}}
        ade.add(objects, names, ["attic"], 400 * wheels)
        index = ade.index()
        vocabulary = datasets.build_vocabulary({"ade20k": index}, least())
        source = Source(index, vocabulary, cache=cache)
        good = source.prepared(0)
        (path,) = Path(cache).glob("ade20k-*/0.png")
        with Image.open(path) as picture:
            self.assertTrue(picture.mode == "RGB" and (np.asarray(picture) == good).all())
        red, green, blue = good.astype(int).transpose(2, 0, 1)
        classes = np.vectorize(lambda n: vocabulary["object"].index(f"thing {n}"))(objects)
        self.assertTrue((red * 256 + green == classes + 1).all() and (blue == wheels).all())
        with mock.patch.object(Source, "labels", side_effect=AssertionError("read again")):
            self.assertTrue((source.prepared(0) == good).all())
        content = path.read_bytes()
        for damaged in (None, b"", b"no picture", content[: len(content) // 2], content[:-40] + bytes(40)):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            self.assertTrue((source.prepared(0) == good).all() and path.read_bytes() == content)
        reverse = vocabulary | {"object": vocabulary["object"][::-1]}
        turned = Source(index, reverse, cache=cache).prepared(0).astype(int)
        self.assertTrue(((good + turned)[..., :2] @ [256, 1] == 321).all())
        for size in ({"short": 20}, {"longest": 24}):
            self.assertEqual(Source(index, vocabulary, cache=cache, **size).prepared(0).shape, (20, 24, 3))
        self.assertEqual(len(os.listdir(cache)), 4)


class TestSplit(unittest.TestCase):
    def table(self, images=300, classes=12) -> torch.Tensor:
        rng = np.random.default_rng(0)
        dense = rng.random((images, classes)) ** 8 * 1000 * (rng.random((images, classes)) < 0.15)
        return torch.from_numpy(dense).to_sparse().coalesce()

    def plain_deviation(self, counts, validation) -> float:
        dense = counts.to_dense().numpy()
        return float(np.mean([abs(k[validation.numpy()].sum() / k.sum() - 0.1) for k in dense.T if k.sum()]))

    def test_brings_every_class_near_its_share(self):
        counts = self.table()
        cases = ((0, 0), (500, 0), (5000, 0), (20000, 0), (20000, 0.5))  # at random, the paper's procedure, ours
        sides = [balance_split.balance(counts, swaps=swaps, seed=1, chance=chance) for swaps, chance in cases]
        values = [self.plain_deviation(counts, side) for side in sides]
        self.assertEqual(values[:4], sorted(values[:4], reverse=True))  # the paper's never makes it worse
        self.assertLess(max(values[3:]), values[0] / 4)
        shares = balance_split.class_shares(counts)
        self.assertAlmostEqual(balance_split.deviation(shares, sides[3].numpy(), 0.1), values[3], places=5)

    def test_exact_size_same_seed_same_answer(self):
        dense, tables = np.zeros((9, 3)), [(300, 0.1), (7, 0.5), (33, 0.01), (100, 0.25)]
        dense[4, 0], dense[:, 1] = 7, 1  # a class in one image, one in all, one without a pixel
        odd = [torch.from_numpy(dense[:n]).to_sparse().coalesce() for n in (1, 2, 5, 9)]
        odd += [torch.zeros(20, 3).to_sparse().coalesce(), torch.ones(20, 1).to_sparse().coalesce()]
        cases = [(self.table(n), f) for n, f in tables] + [*itertools.product(odd, (0.01, 0.1, 0.5))]
        for counts, fraction in cases:
            first, again = (balance_split.balance(counts, fraction, swaps=500, seed=3) for _ in range(2))
            self.assertEqual((len(first), int(first.sum())), (len(counts), round(fraction * len(counts))))
            self.assertTrue(first.dtype == torch.bool and torch.equal(first, again))
        self.assertFalse(torch.equal(*(balance_split.balance(self.table(), seed=s, swaps=500) for s in (1, 2))))
        for wrong in (0, 1, -0.5, 2):
            self.assertRaises(ValueError, balance_split.balance, self.table(), wrong)

    def test_split_json_keeps_other_sources_and_a_changed_source_is_refused(self):
        root = os.path.join(new_folder("split"), "toy")
        shutil.copytree(os.path.join(toy_root(), "toy"), root, ignore=shutil.ignore_patterns("split.json", ".cache"))
        path = os.path.join(root, "split.json")
        options, plot = ("--root", root, "--min-images", 5, "--min-pixels", 50), os.path.join(root, "plot.png")
        self.assertEqual(command(balance_split.main, "--data", "dtd", *options, "--plot", plot)[0], 0)
        first = read_json(path)
        self.assertEqual(Path(plot).read_bytes()[1:4], b"PNG")
        self.assertEqual(command(balance_split.main, "--data", "os", *options)[0], 0)
        split = read_json(path)
        self.assertEqual((set(split), split["fraction"]), ({"seed", "fraction", "sources"}, 0.1))
        self.assertEqual(split["sources"]["dtd"], first["sources"]["dtd"])
        entry = split["sources"]["os"]
        self.assertEqual(set(entry), {"images", "fingerprint", "validation", "deviation_before", "deviation_after"})
        self.assertEqual((entry["images"], len(entry["validation"])), (30, 3))
        self.assertTrue(all(os.path.isfile(os.path.join(root, "os", name)) for name in entry["validation"]))
        self.assertLess(entry["deviation_after"], entry["deviation_before"])
        os.remove(os.path.join(root, "dtd", "images", "banded", "banded_0000.jpg"))
        out = ("--out", os.path.join(root, "out"), "--weights", "none", "--iters", 0)
        self.assertIn(path, refusal(self, train.main, "--data", "dtd", *options, *out))

    def test_which_images_validate(self):
        root, toy = new_folder("which"), os.path.join(toy_root(), "toy")
        path, args = os.path.join(root, "split.json"), argparse.Namespace(data="os", root=root, cache="elsewhere")
        files = {"train1": "a/0.png\nb/1.png\n", "val1": "a/2.png\n", "test1": "b/4.png\na/3.png\n"}
        indexes = {name: scanned(toy, name)[0] for name in ("ade20k", "os")}
        indexes["dtd"], _ = scanned(textures(new_folder("sides"), **files), "dtd")
        vocabulary, images = datasets.build_vocabulary(indexes, least()), balance_split.validation_images
        of = lambda how: argparse.Namespace(**vars(args), split=how)
        chosen = lambda name, how, make=True: images(indexes[name], vocabulary, of(how), make)
        self.assertEqual(chosen("dtd", "official"), ["images/a/3.png", "images/b/4.png"])
        in_its_folder = sorted(name for name in indexes["ade20k"].images if "/validation/" in name)
        self.assertEqual((len(in_its_folder), chosen("ade20k", "official")), (4, in_its_folder))
        self.assertFalse(os.path.exists(path))
        self.assertRaisesRegex(UserError, f"split.json.*--root {root} --cache else", chosen, "os", "balanced", False)
        surfaces = chosen("os", "official")  # it has no sides of its own
        self.assertEqual(surfaces, sorted(read_json(path)["sources"]["os"]["validation"]))
        scenes = chosen("ade20k", "balanced")
        self.assertEqual((len(surfaces), len(scenes), scenes), (3, 4, sorted(set(scenes))))
        self.assertEqual((chosen("ade20k", "balanced", False), chosen("os", "balanced")), (scenes, surfaces))
        indexes["ade20k"].images[0] = "images/ADE/training/other.jpg"
        self.assertRaisesRegex(UserError, "split.json.*ade20k", chosen, "ade20k", "balanced")
        write(path, '{"sources": {}}')
        self.assertEqual(chosen("os", "balanced"), surfaces)  # a tenth, in a file that names no fraction
        for content in ("{", "[]", '{"sources": {"os": 3}}', '{"sources": {"os": {}}}'):
            write(path, content)
            self.assertRaisesRegex(UserError, "split.json", chosen, "os", "balanced")


COMPARED = """
import os, signal, sys, torch.distributed as dist, train
update, calls, kills = train.update, [], "kills" in os.environ
def compared(model, *rest):
    calls.append(0)
    if kills and len(calls) == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    loss, both = update(model, *rest), [None, None]
    dist.all_gather_object(both, [p.double().sum().item() for p in model.parameters()])
    print("alike" if both[0] == both[1] else "apart")
    return loss
train.update = compared
if "quick" in os.environ: train.evaluate.evaluate = lambda *a, **k: {}
train.main(sys.argv[1:])
"""
GRADIENTS = """
import datetime, os, sys, time, torch, torch.distributed as dist, datasets, upernet
datasets.PATIENCE, rank = datetime.timedelta(seconds=3), int(os.environ["RANK"])
open(f"{sys.argv[1]}/{rank}", "w").close()
while not os.path.exists(f"{sys.argv[1]}/{1 - rank}"):
    time.sleep(0.01)  # until both are ready to join
datasets.join_processes(); torch.manual_seed(0)
net = upernet.UPerNet({"scene": 5, "object": 7, "material": 3}, "resnet18", channels=8).eval()
images, scenes, objects = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]), torch.randint(7, (4, 16, 16))
def gradient(model, part):
    net.zero_grad(set_to_none=True)
    logits = model(images[part], ["scene", "object"])
    sum(upernet.losses(logits, {"scene": scenes[part], "object": objects[part]}, {}).values()).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
whole, model = gradient(net, slice(4)), torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
for name, value in gradient(model, slice(2 * rank, 2 * rank + 2)).items():
    assert (value is None) == (whole[name] is None) == name.startswith("heads.material"), name
    assert value is None or (value - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max().clamp(min=1e-3), name
print("agreed", file=sys.stderr)
start = time.monotonic()
try:
    dist.distributed_c10d._get_default_store().get("a key that nobody sets")
except dist.DistError:
    print("gave up" if time.monotonic() - start < 20 else "waited", file=sys.stderr)
"""


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.place, cls.options = new_folder(cls.__name__), ("--root", toy_root(), *SMALL)

    @classmethod
    def at(cls, *names: str) -> str:
        return os.path.join(cls.place, *names)

    def train(self, *argv, out=None, validates=False) -> str:
        """The folder of a run, without a validation unless `validates`; `said` is what it printed."""
        out, quick = out or new_folder("out"), mock.patch("train.evaluate.evaluate", return_value={})
        with contextlib.nullcontext() if validates else quick:
            status, self.said, err = command(train.main, *argv, "--out", out)
        self.assertEqual((status, err), (0, ""))
        return out

    def killed(self, steps: int, *argv, out=None) -> str:
        """The folder of a run that ends in the middle of the step after so many."""
        out, numbers, update = out or new_folder("killed"), itertools.count(), train.update
        until = lambda *values: update(*values) if next(numbers) < steps else sys.exit("killed")
        with mock.patch("train.update", until):
            self.assertEqual(command(train.main, *argv, "--out", out)[0], "killed")
        return out

    def refused(self, main, *cases):
        """Mistakes give status 2 and one line with a name in it. Cases: (names, arguments of the script)."""
        for names, *argv in cases:
            with self.subTest(script=main.__module__, argv=argv):
                err = refusal(self, main, *argv)
                self.assertEqual([name for name in names.split() if name not in err], [], err)

    def assert_same_run(self, one: str, other: str):
        """Two runs that ended with the same weights, optimizer, vocabulary and log, bit for bit."""
        self.assertEqual(*([line | {"seconds": 0} for line in read_log(out)] for out in (one, other)))
        ours, theirs = map(checkpoint_of, (one, other))
        torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
        for key in ("vocabulary", "stage", "iteration", "split", "network", "optimizer"):
            self.assertEqual(ours[key], theirs[key])


class TestTraining(Case):
    def test_a_run_writes_what_it_promises(self):
        out = new_folder("run")
        write(os.path.join(out, "log.jsonl"), "a line that an older run left\n")
        argv = ("--iters", 6, "--texture-iters", 2, "--accumulate", 2, "--save-every", 4, "--eval-every", 2)
        self.train(*self.options, *argv, out=out, validates=True)
        self.assertEqual(sorted(os.listdir(out)), "best.pt ckpt.pt curves.png log.jsonl metrics.json pictures".split())
        log, metrics, content = read_log(out), read_json(out, "metrics.json"), checkpoint_of(out)
        steps = [("main", k) for k in range(6)] + [("texture", 0), ("texture", 1)]
        self.assertEqual([(line["stage"], line["iteration"]) for line in log], steps)
        levels = {"ade20k": {"scene", "object", "part"}, "os": {"material"}, "dtd": {"texture"}}
        validated = [line.pop("metrics", None) for line in log]
        self.assertEqual([k for k, of_line in enumerate(validated) if of_line], [1, 3, 5])  # the last is metrics.json
        for line in log:
            self.assertEqual(set(line), {"stage", "iteration", "source", "lr", "loss", "seconds"})
            self.assertEqual(set(line["loss"]), levels[line["source"]])
        rates = [0.04 * left**0.9 for left in (3 / 6, 1 / 2)]  # the texture stage has a policy of its own
        np.testing.assert_allclose([log[3]["lr"], log[7]["lr"]], rates)
        keys = "model network vocabulary optimizer scaler stage iteration random split arguments"
        self.assertEqual((set(content), content["stage"]), (set(keys.split()), "done"))
        net, vocabulary = upernet.load(os.path.join(out, "ckpt.pt"))
        self.assertEqual((net.training, vocabulary), (False, content["vocabulary"]))
        self.assertEqual(net(torch.rand(1, 3, 64, 64))["object"].shape[1], len(vocabulary["object"]))
        again = os.path.join(out, "again.json")
        self.assertEqual(command(evaluate.main, os.path.join(out, "ckpt.pt"), "--json", again)[0], 0)
        self.assertEqual((read_json(again), set(metrics)), (metrics, set(upernet.LEVELS)))
        command(evaluate.main, os.path.join(out, "best.pt"), "--levels", "object", "--json", again)
        best = max(of_run["object"]["mean_iou"] for of_run in (*filter(None, validated), metrics))
        self.assertEqual((list(read_json(again)), read_json(again)["object"]["mean_iou"]), (["object"], best))
        self.train("--resume", out=out)
        self.assertRegex(self.said, "--weights .* --out")

    def test_sigterm_and_ctrl_c_end_the_iteration_and_save(self):
        """In the middle of a stage, in its last iteration, in the texture stage; the printed command resumes."""
        argv, stopped = ("--iters", 5, "--texture-iters", 3, "--save-every", 100), os.path.join(new_folder("a"), "b c")
        argv, losses, calls = (*self.options, *argv), train.losses, itertools.count(1)
        whole, signals = self.train(*argv), {2: signal.SIGTERM, 5: signal.SIGINT, 7: signal.SIGTERM}

        def interrupted(*values):
            if number := signals.get(next(calls)):
                os.kill(os.getpid(), number)
            return losses(*values)

        for status, iteration, stage in ((143, 2, "main"), (130, 5, "main"), (143, 2, "texture")):
            with mock.patch("train.losses", interrupted):
                ended, said, _ = command(train.main, *argv, "--out", stopped)
            content, argv = checkpoint_of(stopped), ("--resume",)
            self.assertEqual((ended, content["iteration"], content["stage"]), (status, iteration, stage))
            self.assertIn(f"python train.py --resume --out '{stopped}'", said)
        self.train("--resume", out=stopped)
        self.assert_same_run(whole, stopped)

    def test_a_kill_and_a_signal_to_the_group_resume_bit_for_bit(self):
        """With processes that read the images, which both reach too; the log may be ahead of the checkpoint."""
        kwargs = dict(start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        kwargs["env"] = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        for workers, save_every in ((0, 1), (2, 1), (0, 3)) if LONG else ((1, 2),):
            argv = [*self.options, "--iters", 20, "--texture-iters", 12, "--workers", workers]
            argv, stopped, rng = [*argv, "--save-every", save_every], new_folder("stopped"), np.random.default_rng(0)
            whole, kills = self.train(*argv), [(signal.SIGKILL, -9)] * (8 if LONG else 1)
            for number, status in (*kills, (signal.SIGTERM, 143)):
                run, lines = [os.path.join(HERE, "train.py"), *map(str, argv), "--out", stopped], log_lines(stopped)
                argv, run = ["--resume"], subprocess.Popen([sys.executable, *run], **kwargs)
                while run.poll() is None and log_lines(stopped) <= lines:  # until it is under way
                    time.sleep(0.02)
                time.sleep(rng.uniform(0, 0.3) if number == signal.SIGKILL else 0)
                os.killpg(run.pid, number)
                self.assertEqual((run.communicate()[1], run.returncode), (b"", status))
            content = checkpoint_of(stopped)
            done = content["iteration"] + 20 * (content["stage"] == "texture")
            self.assertEqual((done, done > lines), (log_lines(stopped), True))
            self.train("--resume", out=stopped)
            self.assert_same_run(whole, stopped)

    def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(self):
        out = self.killed(2, *self.options, "--iters", 4, "--texture-iters", 0, "--save-every", 1)
        good, (soft, hard) = Path(out, "ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(signal.signal, signal.SIGXFSZ, signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
        self.refused(train.main, ("ckpt.pt --out", "--resume", "--out", out))
        self.assertEqual(Path(out, "ckpt.pt").read_bytes(), good)
        self.assertEqual([name for name in os.listdir(out) if name.startswith(".")], [])

    def test_failures_from_outside_are_told_in_one_line(self):
        memory, worker = RuntimeError("CUDA out of memory. Tried"), RuntimeError("DataLoader worker (pid 7) is killed")
        for error, option in ((MemoryError(), "--batch-size"), (memory, "--batch-size"), (worker, "--workers")):
            argv, out = (*self.options, "--batch-size", 4, "--iters", 2, "--texture-iters", 0), new_folder("failing")
            with mock.patch("train.losses", side_effect=error):
                self.refused(train.main, (f"--resume {option}", *argv, "--out", out))
        self.train("--resume", "--batch-size", 2, "--accumulate", 2, out=out)  # as the messages advise
        self.assertEqual(log_lines(out), 2)
        with mock.patch("train.losses", side_effect=RuntimeError("a mistake of ours")):
            self.assertRaises(RuntimeError, command, train.main, *self.options, "--out", new_folder("ours"))

    def test_only_the_path_of_an_iterations_source_moves(self):
        """The whole state compared from step to step, also where the run is killed after so many steps and resumed."""
        body = ("backbone.", "ppm.", "fpn.", "fusion.", "heads.scene.", "heads.object.", "heads.part.")
        paths = {"os": ("backbone.", "ppm.", "fpn.laterals.", "fpn.convs.0.", "heads.material.")}
        paths, update = paths | {"ade20k": body, "dtd": ("heads.texture.",)}, train.update

        def recorded(net, slices, batches, optimizer, *rest):
            result = update(net, slices, batches, optimizer, *rest)
            values = {name: value.clone() for name, value in net.state_dict().items()}
            names = {p: name for name, p in net.named_parameters()}
            values |= {f"{names[p]} momentum": of_p["momentum_buffer"].clone() for p, of_p in optimizer.state.items()}
            states.append(values)
            return result

        for amp, steps in (("off", None), ("bf16", None), ("fp16", None), ("off", 3), ("off", 7)):
            argv, out = (*self.options, "--iters", 6, "--texture-iters", 2, "--amp", amp), new_folder("paths")
            states = []
            with self.subTest(amp=amp, killed_after=steps), mock.patch("train.update", recorded):
                if steps is not None:
                    self.killed(steps, *argv, "--save-every", 1, out=out)
                self.train(*(argv if steps is None else ["--resume"]), out=out)
                sources = [line["source"] for line in read_log(out)]
                self.assertEqual((set(sources), len(states)), (set(paths), 8))
                self.assertTrue([n for n in states[5] if n.startswith("heads.material.") and n.endswith("momentum")])
                for k, before, after in zip(range(1, 8), states, states[1:]):
                    moved = {n for n, v in after.items() if n not in before or not torch.equal(v, before[n])}
                    off = {name for name in moved if not name.startswith(paths[sources[k]])}
                    lost = before.keys() - after.keys() if k != 6 else set()  # the texture stage has its own optimizer
                    self.assertEqual((lost, off), (set(), set()), f"step {k}, {sources[k]}")
                    for prefix in paths[sources[k]]:
                        self.assertTrue(any(n.startswith(prefix) for n in moved), f"{prefix} did not move in step {k}")

    def one_step(self, batches) -> tuple[dict, dict]:
        """(losses, parameter -> its step) of one step at a rate of 1, without decay."""
        torch.manual_seed(0)
        net = UPerNet(CLASSES, "resnet18", channels=8).eval()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=1), torch.amp.GradScaler("cpu", enabled=False)
        loss = train.update(net, net.part_slices, batches, optimizer, scaler, torch.device("cpu"), None)
        return loss, {name: before[name] - p.detach() for name, p in net.named_parameters()}

    def a_batch(self, seed: int) -> dict:
        rng = torch.Generator().manual_seed(seed)
        random = lambda high, *size: torch.randint(0, high, size, generator=rng)
        batch = {"source": "ade20k", "files": [], "images": random(255, 2, 3, 64, 64).to(torch.uint8)}
        return batch | {"scene": random(5, 2), "object": random(7, 2, 16, 16), "part": random(2, 2, 16, 16)}

    def test_losses_are_weighted_as_released_and_accumulated_batches_averaged(self):
        one, other = self.a_batch(1), self.a_batch(2)
        (loss_1, step_1), (loss_2, step_2), (loss, step) = map(self.one_step, ([one], [other], [one, other]))
        for level, value in loss.items():
            self.assertAlmostEqual(value, (loss_1[level] + loss_2[level]) / 2, places=5)
        torch.manual_seed(0)
        net = UPerNet(CLASSES, "resnet18", channels=8).eval()
        each = upernet.losses(net(one["images"] / 255, ["scene", "object", "part"]), one, net.part_slices)
        self.assertEqual({level: value.item() for level, value in each.items()}, loss_1)
        (0.25 * each["scene"] + 1.0 * each["object"] + 0.5 * each["part"]).backward()
        for name, p in net.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            for way, expected in ((step_1[name], gradient), (step[name], (step_1[name] + step_2[name]) / 2)):
                torch.testing.assert_close(way, expected, rtol=1e-3, atol=1e-6, msg=name)

    def test_a_loss_that_is_not_finite(self):
        """Ends the run before the step; with fp16 the step is left out, and twenty in a row end it."""
        update, losses, steps = train.update, train.losses, []
        times = lambda factor: lambda *values: {level: factor * value for level, value in losses(*values).items()}

        def recorded(net, *rest):
            before, scale = [p.detach().clone() for p in net.parameters()], rest[3].get_scale()
            with mock.patch("train.losses", times(math.inf if len(steps) in (1, 2) else 1e-3)):
                result = update(net, *rest)
            steps.append((all(map(torch.equal, before, net.parameters())), rest[3].get_scale() / scale))
            return result

        with mock.patch("train.update", recorded):
            out = self.train(*self.options, "--amp", "fp16", "--texture-iters", 0, "--iters", 4)
        self.assertEqual(steps, [(False, 1), (True, 0.5), (True, 0.5), (False, 1)])
        for line in Path(out, "log.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=self.fail)  # strictly: without Infinity
        for amp, lines in (("fp16", 19), ("off", 0)):
            with mock.patch("train.losses", times(math.inf)):
                argv = (*self.options, "--amp", amp, "--iters", 30, "--out", out := new_folder(amp))
                self.refused(train.main, ("ckpt.pt --lr", *argv))
            self.assertEqual((checkpoint_of(out)["iteration"], log_lines(out)), (0, lines))

    def test_changed_data_or_a_log_that_is_none_are_refused_by_resume(self):
        root = new_folder("changed")
        shutil.copytree(os.path.join(toy_root(), "toy", "os"), os.path.join(root, "os"))
        argv = ("--data", "os", "--root", root, *SMALL, "--backbone", "resnet18", "--weights", "none", "--iters", 3)
        out = self.killed(2, *argv, "--save-every", 1)
        for content in (b"\xff\xfe\n\n", b"{}\nno JSON\n"):
            Path(out, "log.jsonl").write_bytes(content)
            self.refused(train.main, ("log.jsonl", "--resume", "--out", out))
            self.assertEqual(Path(out, "log.jsonl").read_bytes(), content)
        shutil.copy(*(os.path.join(root, "os", "photos-labels", f"{k}.png") for k in (2, 1)))
        self.refused(train.main, (out, "--resume", "--data", "os", "--root", root, "--out", out))

    def test_levels_builds_and_trains_only_these_heads(self):
        for levels in (["object"], ["object", "part"], ["material"], ["texture"]):
            with self.subTest(levels=levels):
                argv = (*self.options, "--levels", ",".join(levels), "--iters", 2, "--texture-iters", 1)
                out = self.train(*argv, validates=True)
                log, content, metrics = read_log(out), checkpoint_of(out), read_json(out, "metrics.json")
                heads = {key.split(".")[1] for key in content["model"] if key.startswith("heads.")}
                for of_run in (heads, {v for line in log for v in line["loss"]}, content["vocabulary"], metrics):
                    self.assertEqual(set(of_run), set(levels))
                source = {"material": "os", "texture": "dtd"}.get(levels[0], "ade20k")
                self.assertEqual([line["source"] for line in log], [source] * (1 if source == "dtd" else 2))

    def own(self, *names: str) -> tuple:
        """Options for a folder of images with these classes, each of its colour."""
        root, rng = new_folder("own"), np.random.default_rng(0)
        write(os.path.join(root, "classes.txt"), "\n".join(names))
        colours = rng.integers(20, 235, (1 + len(names), 3))
        for k, side in enumerate(["training"] * 16 + ["validation"] * 4):
            numbers = rng.integers(1, 1 + len(names), (2, 3)).repeat(24, axis=0).repeat(24, axis=1)
            save(numbers, root, "annotations", side, f"{k}.png")
            save(colours[numbers] + rng.integers(-20, 20, (48, 72, 3)), root, "images", side, f"{k}.png")
        return "--data", "ade20k", "--root", root, "--split", "official", "--sizes", 64, "--workers", 0

    def test_ones_own_data_as_in_the_readme(self):
        """Pictures and class numbers with a table of its own, with gaps, learnt well beyond chance; masks come out."""
        names, argv = ["leaf", "soil", "stone"], ("--weights", "none", "--backbone", "resnet18", "--channels", 16)
        own, rows = self.own(*names), ["Idx\tName", *(f"{100 * k}\t{name}" for k, name in enumerate(names, start=1))]
        write(os.path.join(own[3], "objectInfo150.txt"), "\n".join(rows))
        for path in Path(own[3], "annotations").rglob("*.png"):
            save(Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 100), path)
        out = self.killed(30, *own, *argv, "--batch-size", 2, "--iters", 40, "--save-every", 30)
        for more in (["50\tmoss"], []):  # another table ends the run, the old one resumes it
            write(os.path.join(own[3], "objectInfo150.txt"), "\n".join([*rows, *more]))
            status, _, err = command(train.main, "--resume", "--out", out)
            self.assertEqual((status, out in err), (2, True) if more else (0, False), err)
        metrics, ckpt = read_json(out, "metrics.json"), os.path.join(out, "ckpt.pt")
        self.assertEqual(list(metrics["object"]["iou"]), names)
        self.assertGreater(metrics["object"]["mean_iou"], 0.5)
        place = os.path.join(own[3], "images", "validation")
        shutil.copy(os.path.join(place, "16.png"), os.path.join(place, "leaf_object.png"))  # a photo all the same
        for _ in range(2):  # the second time the folder holds the first one's pictures
            self.assertEqual(command(evaluate.main, ckpt, "--photo", place, "--pictures", place)[::2], (0, ""))
        self.assertEqual(len(os.listdir(place)), 5 * 4)
        paths = f"{place}/16_object.png", f"{place}/16.png".replace("images", "annotations")
        mask, truth = (np.asarray(Image.open(path)) for path in paths)
        self.assertGreater((mask == truth).mean(), 0.5)
        self.assertIn("--data", refusal(self, evaluate.main, ckpt, *self.own("other", "names")[:4]))
        self.assertIn("255", refusal(self, evaluate.main, ckpt, "--root", own_data(self.at("void"), [[[255] * 9] * 9])))
        status, _, err = command(evaluate.main, ckpt, *self.own("leaf", "other", "soil")[:6])
        self.assertEqual((status, "other" in err, "soil" in err), (0, True, False), err)  # its labels are left out
        self.assertIn("--data ade20k", refusal(self, datasets.main, *own[2:4]))  # not the toy

    def test_weights_of_our_checkpoint_bring_network_and_classifiers_by_name(self):
        network = ("--backbone", "resnet18", "--channels", 8, "--stem", "deep", "--no-head-conv", "--weights", "none")
        names = [f"thing {k}" for k in range(11)]
        path = os.path.join(self.train(*self.own(*names), *network, "--seed", 1, "--iters", 0), "ckpt.pt")
        begin = lambda own, *argv: checkpoint_of(self.train(*own, *argv, "--iters", 0))
        theirs, own = torch.load(path, weights_only=True), self.own("thing 7", "new", "thing 2", "thing 10")
        fresh, ours = begin(own, *network), begin(own, "--weights", path)
        self.assertEqual(ours["network"], {**theirs["network"], "classes": {"object": 4}})
        for name, value in ours["model"].items():
            expected = theirs["model"][name]
            if ".classifier." in name:
                expected = torch.stack([expected[7], fresh["model"][name][1], expected[2], expected[10]])
            self.assertTrue(torch.equal(value, expected), name)
        wider = begin(own, "--weights", path, "--channels", 16)
        self.assertEqual(wider["network"], {**ours["network"], "channels": 16})
        self.assertEqual(begin(own[:6] + own[8:], "--weights", path)["arguments"]["sizes"], [64])  # its own --sizes
        backbones = [{k: v for k, v in c["model"].items() if k.startswith("backbone.")} for c in (wider, theirs)]
        torch.testing.assert_close(*backbones, rtol=0, atol=0)
        others = begin(self.own("a", "b"), "--weights", path)["model"]  # no name in common: nothing is kept
        ours, theirs = (state["heads.object.classifier.weight"].flatten(1) for state in (others, theirs["model"]))
        self.assertTrue((ours[:, None] != theirs).all())

    def test_weights_of_mmsegmentation_and_of_a_backbone(self):
        network = {"classes": {"object": 3}, "backbone": "resnet18", "channels": 8}
        (path,), state = released_files("mmseg", 5, {"CLASSES": ["a", "b", "c"]}, **network)
        own, theirs = self.own("new", "c"), upernet.load_mmseg(path)[0].network
        ours = checkpoint_of(self.train(*own, "--weights", path, "--iters", 0))
        self.assertEqual(ours["network"], {**theirs, "classes": {"object": 2}})
        for key, value in state.items():
            loaded, expected = (ours["model"][key][1], value[2]) if "classifier" in key else (ours["model"][key], value)
            self.assertTrue(torch.equal(loaded, expected), key)
        out = self.train(*own, "--weights", path, "--iters", 2)
        self.assertEqual((log_lines(out), checkpoint_of(out)["network"]), (2, ours["network"]))

        theirs = torchvision.models.resnet18().state_dict()
        torch.save(theirs, path)
        network = ("--backbone", "resnet18", "--channels", 8)
        ours = checkpoint_of(self.train(*own, "--weights", path, *network, "--iters", 0))["model"]
        for key, value in theirs.items():
            self.assertTrue("fc." in key or torch.equal(ours[f"backbone.{key}"], value), key)

    def test_no_decay_on_biases_and_norms(self):
        net = UPerNet(CLASSES, "resnet18", channels=8)
        groups = {g["weight_decay"]: set(map(id, g["params"])) for g in train.parameter_groups(net)}
        spared = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        spared |= {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
        self.assertEqual(groups, {1e-4: set(map(id, net.parameters())) - spared, 0: spared})

    def test_defaults_that_depend_on_the_machine(self):
        for cores, processes, workers in ((16, "4", 4), (64, "2", 8), (2, "4", 1), (6, "1", 6)):
            with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=processes), mock.patch("os.cpu_count", lambda: cores):
                with mock.patch("datasets.DataLoader") as loader:
                    datasets.in_order(None, range(3))
                self.assertEqual(loader.call_args[1]["num_workers"], workers)
        for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
            with mock.patch("torch.cuda.get_device_capability", return_value=capability):
                self.assertEqual(datasets.pick_amp("auto", torch.device("cuda")), expected)
        self.assertIsNone(datasets.pick_amp("auto", torch.device("cpu")))


class TestProcesses(Case):
    """torchrun with two processes; the first run, `whole`, is what others are compared with."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.options, cls.whole = (*cls.options, "--save-every", 2, "--texture-iters", 2, "--iters"), cls.at("whole")
        cls.script = write(cls.at("compared.py"), COMPARED)
        cls.said = cls.torchrun(cls.script, *cls.options, 8, "--out", cls.whole).communicate()

    @classmethod
    def torchrun(cls, script: str, *argv, restarts=0, **environment) -> subprocess.Popen:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        run += [f"--max-restarts={restarts}", os.path.join(HERE, script), *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE, **environment}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(run, env=environment, start_new_session=True, **pipes)

    def test_they_have_the_same_weights_and_the_metrics_of_one(self):
        """After every step; one of them prints. No image is counted twice, in train.py and in evaluate.py."""
        said, err = self.said
        self.assertEqual((said.count("alike"), said.count("apart"), said.count("next: ")), (10, 0, 1), err)
        self.assertEqual((log_lines(self.whole), checkpoint_of(self.whole)["stage"]), (10, "done"))
        checkpoint, shared, alone = (os.path.join(self.whole, n) for n in ("ckpt.pt", "shared.json", "alone.json"))
        said, err = self.torchrun("evaluate.py", checkpoint, "--json", shared).communicate()
        self.assertEqual(said.count("mIoU-bg"), 1, err)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        self.assertEqual(command(evaluate.main, checkpoint, "--json", alone)[0], 0)
        for path in (shared, os.path.join(self.whole, "metrics.json")):
            self.assertEqual(read_json(path), read_json(alone))

    def test_a_killed_process_ends_the_group_and_torchrun_resumes_it(self):
        argv, restarted = (*self.options, 8, "--out"), new_folder("restarted")
        run = self.torchrun(self.script, *argv, restarted, restarts=1, kills="1", quick="1")
        _, err = run.communicate()
        self.assertEqual(run.returncode, 0, err)
        self.assert_same_run(self.whole, restarted)
        with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1", TORCHELASTIC_RUN_ID="another group"):
            self.refused(train.main, ("--resume --out", *argv, restarted))

    def test_a_group_that_was_killed_or_stopped_is_resumed_by_hand(self):
        """After a kill by as many processes; after a signal to the whole group by a single one."""
        run = self.torchrun(self.script, *self.options, 30, "--out", out := self.at("stopped"), kills="1", quick="1")
        _, err = run.communicate()
        self.assertEqual((run.returncode, checkpoint_of(out)["iteration"]), (1, 4), err)
        self.assertRegex(err, "exitcode +: -9 ")  # torchrun's own report of the process that was killed
        run, lines = self.torchrun(self.script, "--resume", "--out", out, quick="1"), log_lines(out)
        while run.poll() is None and not 4 < log_lines(out) != lines:
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGTERM)
        said, err = run.communicate()
        self.assertIn(f"torchrun --nproc_per_node=2 train.py --resume --out {out}", said, err)
        self.assertEqual((checkpoint_of(out)["stage"], checkpoint_of(out)["iteration"]), ("main", log_lines(out)))
        self.assertGreater(log_lines(out), 4)
        self.train("--resume", out=out)
        self.assertEqual((log_lines(out), checkpoint_of(out)["stage"]), (32, "done"))

    def test_two_processes_of_two_have_the_gradient_of_one_of_four(self):
        """With batch norm in eval mode and every pixel labelled. They wait for each other as long as PATIENCE says."""
        script = write(self.at("gradients.py"), GRADIENTS)
        _, err = self.torchrun(script, new_folder("ready")).communicate()
        self.assertEqual((err.count("agreed"), err.count("gave up")), (2, 2), err)


class TestPhotos(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.checkpoint = os.path.join(cls().train(*cls.options, "--iters", 1, "--texture-iters", 1), "ckpt.pt")
        cls.noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))

    def test_any_mode(self):
        place, noise, rotated = new_folder("modes"), self.noise, Image.Exif()
        rotated[0x0112], ramp = 6, np.linspace(0, 1, 4000, dtype=np.float32).reshape(50, 80)
        modes = {"grey.png": "L", "cmyk.jpg": "CMYK", "alpha.png": "RGBA", "palette.gif": "P", "bilevel.png": "1"}
        photos = {name: (noise.convert(mode), {}) for name, mode in modes.items()}
        photos |= {"deep.png": (Image.fromarray((ramp * 65535).astype(np.uint16)), {}), "ein bild 点.webp": (noise, {})}
        photos |= {"float.tiff": (Image.fromarray(ramp), {}), "really-a-png.jpg": (noise, {"format": "PNG"})}
        photos |= {f"{w}.png": (noise.resize((w, h)), {}) for w, h in ((1, 1), (5000, 2), (2, 5000))}
        photos |= {"moving.gif": (noise, {"save_all": True, "append_images": [noise.rotate(90)]})}
        photos |= {"turned.jpg": (noise, {"exif": rotated}), "marred.jpg": (noise, {"exif": b"Exif\0\0" + b"\xff" * 9})}
        for name, (picture, options) in photos.items():
            picture.save(os.path.join(place, name), **options)
        argv = ("--photo", *(os.path.join(place, name) for name in photos), "--pictures", place)
        self.assertEqual(command(evaluate.main, self.checkpoint, *argv)[::2], (0, ""))
        for name, (picture, _) in photos.items():
            stem = os.path.join(place, os.path.splitext(name)[0])
            with np.load(f"{stem}_upernet.npz") as maps, Image.open(f"{stem}_upernet.png") as sheet:
                size = picture.size if name == "turned.jpg" else picture.size[::-1]
                for level in ("object", "part", "material", "texture_map"):
                    self.assertEqual(maps[level].shape, size, name)
                np.testing.assert_allclose(maps["scene"].sum(), 1, 1e-4)
                self.assertLess(maps["part"].max(), len(maps["part_names"]))
                self.assertEqual((sheet.mode, (np.array(sheet.size[::-1]) > size).all()), ("RGB", True))
        deep = datasets.rgb(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)))
        self.assertEqual(np.asarray(deep)[0, :, 0].tolist(), [0, 100, 255])
        clear = datasets.rgb(Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)))
        self.assertEqual(np.asarray(clear)[0].tolist(), [[255, 255, 255], [10, 20, 30]])

    def test_parse_takes_an_array_and_gives_what_the_command_writes(self):
        """Of a folder every picture is parsed; the maps of object and material are pictures of the numbers 1..K too."""
        place, out, (net, vocabulary) = new_folder("folder"), new_folder("maps"), upernet.load(self.checkpoint)
        photos = {"a.png": self.noise, "b.PNG": self.noise.rotate(90, expand=True)}
        for name, photo in photos.items():
            save(photo, place, name)
        write(os.path.join(place, "notes.txt"), "no photo")
        self.assertEqual(command(evaluate.main, self.checkpoint, "--photo", place, "--pictures", out)[::2], (0, ""))
        endings = ("upernet.npz", "upernet.png", "object.png", "material.png")
        self.assertEqual(set(os.listdir(out)), {f"{name[0]}_{ending}" for name in photos for ending in endings})
        for name, photo in photos.items():
            seen = evaluate.parse(net, np.asarray(photo))
            with np.load(os.path.join(out, f"{name[0]}_upernet.npz")) as maps:
                self.assertEqual({level for level in maps if not level.endswith("_names")}, set(seen))
                for level, value in seen.items():
                    np.testing.assert_array_equal(maps[level], value.astype(maps[level].dtype), level)
            for level in ("object", "material"):
                numbers = np.asarray(Image.open(os.path.join(out, f"{name[0]}_{level}.png")))
                np.testing.assert_array_equal(numbers, seen[level] + 1)
                self.assertTrue(1 <= numbers.min() <= numbers.max() <= len(vocabulary[level]))
        self.assertEqual(set(evaluate.parse(net, self.noise, ["part", "scene"])), {"part", "scene"})
        for photo in (np.zeros((50, 80), np.uint8), np.zeros((50, 80, 4), np.uint8), np.zeros((50, 80, 3)), [1, 2]):
            self.assertRaises(ValueError, evaluate.parse, net, photo)
        self.assertRaises(ValueError, evaluate.parse, net, self.noise, ["colour"])

    def test_a_sheet_of_large_panels_can_be_opened(self):
        (_, vocabulary), path = upernet.load(self.checkpoint), os.path.join(new_folder("large"), "x")
        for width, height in ((3000, 2000), (9000, 700), (1500, 4000)):
            maps, names = np.arange(width * height).reshape(height, width), evaluate.class_names(vocabulary)
            seen = {v: maps % len(names[v.removesuffix("_map")]) for v in ("object", "part", "material", "texture_map")}
            with mock.patch("evaluate.PANEL_PIXELS", evaluate.PANEL_PIXELS / 10):
                evaluate.write_photo(Image.new("RGB", (width, height)), seen, vocabulary, path)
            with Image.open(f"{path}_upernet.png") as sheet, Image.open(f"{path}_object.png") as mask:
                fits = 10 * sheet.width * sheet.height < 2 * Image.MAX_IMAGE_PIXELS  # more is an error
                self.assertEqual((mask.size, fits), ((width, height), True))

    def test_maps_are_those_of_the_network(self):
        """At sizes that need padding, which the network sees and the maps do not have."""
        net, _ = upernet.load(self.checkpoint)
        for height, width, short in ((64, 96, 64), (71, 130, 50), (97, 45, 45)):
            photo = Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8))
            net.test_size = (short, 1000, None)
            seen, (h, w) = evaluate.parse(net, photo), (round(n * short / min(height, width)) for n in (height, width))
            padded = np.full((-(-h // 32) * 32, -(-w // 32) * 32, 3), datasets.MEAN_COLOUR, np.uint8)
            padded[:h, :w] = np.asarray(photo.resize((w, h), Image.Resampling.BILINEAR))
            with torch.inference_mode():
                logits = net(torch.from_numpy(padded.transpose(2, 0, 1).copy())[None] / 255)
            # The pixels' centres in [-1, 1] of the padded input, where bilinear sampling gives each one's logits.
            sides = zip((h, w), (height, width), padded.shape)
            y, x = (2 * (torch.arange(full) + 0.5) * n / full / whole - 1 for n, full, whole in sides)
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
            for level in ("object", "material", "texture_map"):
                best = F.grid_sample(logits[level], grid, padding_mode="border", align_corners=False)[0].argmax(dim=0)
                self.assertGreaterEqual(np.mean(best.numpy() == seen[level]), 0.995, level)

    def test_relations_of_photos_and_of_validation_images(self):
        place = new_folder("relations")
        photos, path = [os.path.join(place, f"{k}.png") for k in range(3)], os.path.join(place, "r.json")
        for k, photo in enumerate(photos):
            self.noise.rotate(90 * k, expand=True).save(photo)
        argv = ("--relations", path, "--pictures", place, "--photo", *photos)
        status, said, err = command(evaluate.main, self.checkpoint, *argv)
        self.assertEqual((status, err, "is made of" in said), (0, "", True))
        found = read_json(path)
        command(evaluate.main, self.checkpoint, *argv, "--levels", "object,material")
        self.assertEqual(read_json(path), {"object-material": found["object-material"]})
        self.assertEqual(command(evaluate.main, self.checkpoint, "--relations", path)[::2], (0, ""))


class TestMistakes(Case):
    """A mistake of the user's, or a hostile file, is one line on stderr that names it, and status 2."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.begun = cls().train(*cls.options, "--iters", 1, "--texture-iters", 1)
        cls.checkpoint, cls.new = os.path.join(cls.begun, "ckpt.pt"), (*cls.options, "--out", cls.at("new"))

    def test_options(self):
        wrong = "--data ade  --backbone vgg16  --weights nothing.pth  --lr -1  --lr nan  --batch-size 0  --iters -3"
        wrong += "  --fpn 1  --seed 1e30  --sizes 64,x  --sizes 8  --max-size 1  --batch-size 1  --device abacus"
        wrong += "  --device meta  --colour red  --levels colour  --levels part  --levels scene,part  --levels object,"
        for option, value in map(str.split, wrong.split("  ")):
            self.refused(train.main, (option.strip("-"), *self.new, option, value))
        cases = [("ckpt.pt", *self.new, "--resume"), ("--min-", *self.new, "--min-images", 100000)]
        cases += [("--resume --out", *self.options, "--out", self.begun)]
        cases += [("--lr", "--out", self.begun, "--resume", "--lr", 5)]
        cases += [("--levels", "--out", self.at("new"), "--data", "ade20k,os", "--levels", "material")]
        self.refused(train.main, *cases)
        with mock.patch("resnet.load_imagenet", side_effect=OSError("no route to host")):
            self.refused(train.main, ("--weights none", *self.new, "--weights", "imagenet"))
        self.assertFalse(os.path.exists(self.at("new")))
        ckpt, missing, released = self.checkpoint, self.at("nowhere"), ("--release", self.at("a"), self.at("b"))
        cases = [("--release",), ("--release", ckpt, *released), ("--labels", *released), (missing, missing)]
        cases += [(self.place, self.place), ("--size", ckpt, "--size", "1e3"), ("--levels", ckpt, "--levels", "colour")]
        cases += [(missing, ckpt, "--data", "dtd", "--root", missing)]
        cases += [("--photo", ckpt, "--photo", self.at("a", "same.jpg"), self.at("b", "same.jpg"))]
        cases += [("--json", ckpt, "--photo", self.at("x.jpg"), "--json", self.at("m.json"))]
        ckpt = (ckpt, "--levels", "scene")
        cases += [(self.place, *ckpt, "--json", self.place), ("--relations", *ckpt, "--relations", self.at("r.json"))]
        self.refused(evaluate.main, *cases)
        self.refused(balance_split.main, ("--fraction", *self.options[:2], "--fraction", 2))
        self.refused(upernet.main, ("--size", "--size", "large"))

    def test_folders(self):
        table, occupied = "label-substance-colors.csv", write(self.at("occupied"), "a file")

        def surfaces(name: str, text: str | None = None) -> tuple:
            shutil.copytree(os.path.join(toy_root(), "toy", "os"), self.at(name, "os"))
            if text is not None:
                write(self.at(name, "os", table), text)
            return "--data", "os", "--root", self.at(name)

        bare, fine, ade = surfaces("bare"), surfaces("fine"), ("--data", "ade20k", "--root")
        os.remove(self.at("bare", "os", table))
        write(self.at("old", "ade20k", "index_ade20k.mat"), "")
        os.makedirs(self.at("empty", "ade20k", "images", "ADE"))
        ones, columns = [np.ones((40, 40))] * 2, "substance_id,red_color,substance_name\n"
        numbered = {"words": "Idx Name\n1 wall\n", "zero": "Idx\tName\n0\tbackground\n1\twall\n", "blank": ""}
        tables = [("objectInfo150", name, text) for name, text in numbered.items()]
        tables += [("classes", "none", ""), ("classes", "gap", "a\n\nb\n")]
        cases = [("ade20k", *ade, bare[3]), ("occupied", *ade, occupied), ("images/ADE", *ade, self.at("empty"))]
        cases += [("dtd", "--data", "os,dtd", *fine[2:]), ("ADE20K_2021_17_01", *ade, self.at("old"))]
        cases += [(f"{n}.txt", *ade, own_data(self.at(place), ones, **{n: text})) for n, place, text in tables]
        rows = {"columns": "a,b\n1,2\n", "nameless": f"{columns}1,1\n", "infinite": f"{columns}1,inf,wood\n"}
        cases += [(table, *bare), *((table, *surfaces(*of_table)) for of_table in rows.items())]
        self.refused(datasets.main, *cases, ("--cache", *fine, "--cache", occupied))

    def test_checkpoints(self):
        """Files that are no checkpoint of ours, in the three places where one is read. No code in them runs."""
        content, weight = Path(self.checkpoint).read_bytes(), "ppm.last.0.weight"
        good = torch.load(self.checkpoint, weights_only=True)
        model, scenes, ran = good["model"], good["vocabulary"]["scene"], self.at("ran")
        runs_code = type("RunsCode", (), {"__reduce__": lambda self: (os.mkdir, (ran,))})()
        weights = {"shape": torch.zeros(3), "text": "text", "sparse": model[weight].to_sparse()}
        weights["nan"] = model[weight] * math.nan
        files = {name: {**good, "model": {**model, weight: value}} for name, value in weights.items()}
        network = {"option": {"colour": 3}, "huge": {"channels": 10**9}, "module": {"backbone": "os"}}
        files |= {name: {**good, "network": {**good["network"], **values}} for name, values in network.items()}
        names = {"short": scenes[:-1], "numbers": [1] * len(scenes)}
        files |= {name: {**good, "vocabulary": {**good["vocabulary"], "scene": v}} for name, v in names.items()}
        models = {"code": runs_code, "keys": {}, "more": {**model, "more": torch.zeros(1)}}
        files |= {name: {**good, "model": value} for name, value in models.items()}
        files |= {"half": content[:9999], "random": np.random.default_rng(0).bytes(5000), "nothing": b"", "list": [1]}
        files |= {"arguments": {**good, "arguments": []}, "lacking": {"a": torch.zeros(3)}}
        for name, value in files.items():
            path = self.at(name, "ckpt.pt")
            os.makedirs(self.at(name))
            Path(path).write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
            self.refused(evaluate.main, (path, path, "--levels", "scene"))
            self.refused(train.main, (path, *self.new, "--weights", path), (path, "--resume", "--out", self.at(name)))
        self.assertFalse(os.path.exists(ran))

    def test_photos(self):
        """Those that cannot be read are named at the end; the others are parsed."""
        save_jpeg(self.at("good.jpg"), 50, 80)
        save(np.zeros((300, 300)), self.at("bomb.png"))
        files = {"cut.jpg": Path(self.at("good.jpg")).read_bytes()[:-900], "zero.png": b"", "words.jpg": b"no picture"}
        for name, value in files.items():
            Path(self.at(name)).write_bytes(value)
        os.makedirs(self.at("folder.jpg"))
        names, out = ["folder.jpg", "gone.jpg", "bomb.png", *files], self.at("pictures")
        argv = ("--photo", *map(self.at, names), self.at("good.jpg"), "--pictures", out)
        with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 20000):
            self.refused(evaluate.main, (" ".join(names), self.checkpoint, *argv))
        self.assertEqual({name.split("_")[0] for name in os.listdir(out)}, {"good"})

    def test_as_commands_of_their_own_and_help_is_short(self):
        run = lambda name: [sys.executable, os.path.join(HERE, name), "--data", "ade"]
        started = {n: subprocess.Popen(run(n), stderr=subprocess.PIPE) for n in ("balance_split.py", "datasets.py")}
        for name, process in started.items():
            self.assertRegex(process.communicate()[1], rf"^{name}: --data ade.*\n$".encode())
            self.assertEqual(process.returncode, 2)
        for main in (train.main, evaluate.main, balance_split.main, datasets.main, upernet.main):
            with mock.patch.dict(os.environ, COLUMNS="110"):
                status, said, _ = command(main, "--help")
            self.assertEqual((status, said.count("\n") <= 40), (0, True), main.__module__)


@unittest.skipUnless(os.path.isdir(os.path.join(SHARED, "data")), "the real samples are not here")
class TestRealSamples(Case):
    def test_they_are_scanned_trained_on_and_evaluated(self):
        root, ade = new_folder("real"), os.path.join("ADE20K_2021_17_01", "images", "ADE")
        for side in ("training", "validation"):
            sample = os.path.join(SHARED, "data", "ade20k_2021_sample", ade, "training")
            shutil.copytree(sample, os.path.join(root, "ade20k", ade, side))
        shutil.copytree(os.path.join(SHARED, "data", "dtd_sample"), os.path.join(root, "dtd"))
        argv = ["--data", "ade20k,dtd", "--root", root, "--min-images", 1, "--min-pixels", 1]
        argv += ["--min-part-images", 1, "--min-scene-images", 1]
        status, said, err = command(datasets.main, *argv)
        self.assertEqual((status, err, "ade20k: 6 images" in said, "10 classes" in said), (0, "", True, True))
        argv += ["--split", "official", "--backbone", "resnet18", "--channels", 16, "--weights", "none", "--workers", 0]
        out = self.train(*argv, "--sizes", "96,128", "--iters", 12, "--texture-iters", 3, validates=True)
        vocabulary, metrics = checkpoint_of(out)["vocabulary"], read_json(out, "metrics.json")
        self.assertEqual((vocabulary["scene"], "car" in vocabulary["object"]), (["street"], True))
        self.assertLessEqual({"wheel", "headlight", "windshield"}, set(vocabulary["part"]["car"]))
        losses = [line["loss"].get("object") for line in read_log(out)][:12]
        self.assertLess(np.mean(losses[-4:]), np.mean(losses[:4]))
        self.assertEqual((metrics["texture"]["n"], set(metrics)), (20, {"scene", "object", "part", "texture"}))
        self.assertEqual(sum(name.startswith("ade20k") for name in os.listdir(os.path.join(out, "pictures"))), 3)


def main() -> int:
    """Runs the tests and closes with a line that counts them."""
    result = unittest.main(exit=False, argv=[sys.argv[0], "--buffer", *sys.argv[1:]]).result
    failed, skipped = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses), len(result.skipped)
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
