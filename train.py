"""Training of UPerNet on sources that each label only some of the levels (section 3.1).

    python train.py                                             # the toy, made on the spot: minutes on a CPU
    python train.py --data ade20k,dtd,os                        # the real data, under ./data
    torchrun --nproc_per_node=8 train.py --data ade20k,dtd,os   # several GPUs

Each iteration draws one source and updates only the path to its labels; textures come last, on the frozen network."""

import contextlib, functools, json, math, os, shlex, signal, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import balance_split, datasets, evaluate, resnet, upernet
from datasets import Option, Source, UserError
from upernet import LEVELS, LOSS_WEIGHTS, UPerNet, losses

TEXTURE_IMAGES = 8  # for each of --batch-size in the texture stage: they have a fiftieth of the area (our choice)


def update(model: nn.Module, part_slices: dict, batches: list[dict], optimizer, scaler, device, amp) -> dict:
    """Takes one step on batches of one source, averaging their gradients; returns the loss of each of its levels.
    Only the path to these levels moves, and nothing else at all: `levels=` keeps the rest out of the forward pass, so
    that its batch-norm statistics stay, and out of the backward pass, so that its gradients stay None, and SGD leaves
    parameters without a gradient alone, their weight decay and momentum too (in the released code both act). A level
    without a label in this batch is on the path: its gradients are zero, and decay and momentum act.
    Raises FloatingPointError, before the step, if a process's loss is not finite; with fp16 the step is left out."""
    optimizer.zero_grad(set_to_none=True)
    values, statistics = [], [buffer.clone() for buffer in model.buffers()] if scaler.is_enabled() else []
    for k, batch in enumerate(batches):
        levels = [level for level in LEVELS if level in batch]
        labels = {level: batch[level].to(device, non_blocking=True) for level in levels}
        waits = hasattr(model, "no_sync") and k < len(batches) - 1  # gradients are exchanged with the last batch's
        with model.no_sync() if waits else contextlib.nullcontext():
            with datasets.autocast(device, amp):
                logits = model(batch["images"].to(device, non_blocking=True) / 255, levels=levels)
            loss = losses(logits, labels, part_slices)
            total = sum(LOSS_WEIGHTS[level] * value for level, value in loss.items()) / len(batches)
            scaler.scale(total).backward()
        values.append(torch.stack([value.detach() for value in loss.values()]))
    means = torch.stack(values).mean(dim=0).tolist()  # one transfer for all the losses
    overflow = anywhere(not all(map(math.isfinite, means)))
    if overflow:  # with fp16 the scaler keeps the weights, this the batch-norm statistics
        for buffer, before in zip(model.buffers(), statistics):
            buffer.copy_(before)
    if overflow and not scaler.is_enabled():
        raise FloatingPointError(f"{batches[0]['source']}: {', '.join(f for batch in batches for f in batch['files'])}")
    scaler.step(optimizer)
    scaler.update()
    return dict(zip(loss, means))


def train(parser: datasets.Parser, given) -> None:
    # Read: options, data, and the checkpoint to resume or the weights to start from.
    datasets.join_processes()
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    args, checkpoint, start = datasets.from_main_process(lambda: settle(parser, given))
    files = "ckpt.pt", "log.jsonl", "best.pt", "metrics.json"
    path, log, best_path, metrics_path = (os.path.join(args.out, name) for name in files)
    measured = datasets.from_main_process(lambda: os.path.exists(metrics_path))
    if checkpoint and checkpoint["stage"] == "done" and measured:
        quoted = shlex.quote(path)
        ways = f"python evaluate.py {quoted} evaluates it, --weights {quoted} --out NEW --lr RATE trains on"
        return print(f"{args.out}: this run is finished; {ways}")
    device = datasets.pick_device(args.device)
    amp = datasets.pick_amp(args.amp, device)
    sources, vocabulary, split, of_data = datasets.from_main_process(lambda: open_data(args, checkpoint))
    training, validation = {}, []
    for name, source in sources.items():
        validates = set(split[name])
        sizes = [(1, 1)] * len(source.index.images) if name == "dtd" else source.index.sizes.tolist()  # DTD: squares
        training[name] = {i: size for i, size in enumerate(sizes) if source.index.images[i] not in validates}
        validation += [(name, i) for i, image in enumerate(source.index.images) if image in validates]
        print(f"{name}: {len(training[name])} images to train on, {len(validates)} to validate on ({args.split} split)")
        if not training[name] or args.split == "official" and not validates:
            raise UserError(f"{name}: none to {'validate' if training[name] else 'train'} on; see --split")
    counts = {v: sum(len(p) - 1 for p in n.values()) if v == "part" else len(n) for v, n in vocabulary.items()}
    print("classes: " + ", ".join(f"{n} {level}" for level, n in counts.items()))
    stages = plan_stages(args, training, processes)
    order, lengths = [*stages, "done"], {name: iterations for name, (_, iterations, _) in stages.items()}
    kept = {"iters": lengths.get("main", 0), "texture_iters": lengths.get("texture", 0), "group": torchrun_group()}
    kept |= {key: os.path.abspath(value) for key in ("root", "cache") if (value := getattr(args, key))}
    arguments = vars(args) | of_data | kept

    # Build: the network, in every process as in the main one.
    def build() -> UPerNet:
        torch.manual_seed(args.seed)
        network = {"classes": upernet.class_counts(vocabulary), "pool": (start or [{}])[0].get("pool", "prroi")}
        network |= {key: getattr(args, key) for key in ("backbone", "channels", "fpn", "stem", "output_stride")}
        net = UPerNet(**network, **{key: not getattr(args, f"no_{key}") for key in ("ppm", "fusion", "head_conv")})
        net.test_size = (sorted(args.sizes)[len(args.sizes) // 2], args.max_size, None)
        return net.to(device)

    net = build()
    if args.batch_size == 1 and (datasets.padded(min(args.sizes)) < 64 or net.network["pool"] == "pspnet"):
        raise UserError("--batch-size 1: batch norm needs --sizes above 32, and two images with pspnet's pooling")
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    stage, first = (checkpoint["stage"], checkpoint["iteration"]) if checkpoint else (order[0], 0)
    earlier = sum(lengths[name] for name in order[: order.index(stage)])
    lines = datasets.from_main_process(lambda: cut_log(log, earlier + first))
    best = max([-1.0, *(headline(line["metrics"]) for line in lines if "metrics" in line)])
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
        torch.set_rng_state(checkpoint["random"].cpu())
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # empty if it was not fp16
        print(f"{args.out}: resumes the {stage} stage after {first} iterations")
    else:  # DistributedDataParallel gives the other processes the main one's weights
        datasets.from_main_process(lambda: load_start(net, vocabulary, args.weights, start))
    if device.type == "cuda" and processes > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if args.compile:
        net.compile()

    def save(stage: str, iteration: int, optimizer=None, to: str = path) -> None:
        content = {"model": net.state_dict(), "network": net.network, "vocabulary": vocabulary, "split": split}
        content |= {"optimizer": optimizer.state_dict() if optimizer else {}, "scaler": scaler.state_dict()}
        content |= {"stage": stage, "iteration": iteration, "random": torch.get_rng_state(), "arguments": arguments}
        if rank == 0:
            advice = "(the last one is kept; make room, or choose another folder with --out)"
            datasets.write_file(to, lambda name: torch.save(content, name), advice)
            draw_curves(log, lengths, args.out)

    def validate(network: UPerNet, pictures: str | None = None) -> dict:
        for value in network.state_dict().values() if dist.is_initialized() else ():
            dist.broadcast(value, 0)  # the main process's batch-norm statistics: on CPUs each has its own
        return evaluate.evaluate(network, vocabulary, sources, validation, pictures=pictures)

    if not checkpoint:
        save(stage, first)
    with noted_signals() as noted:
        for name in order[order.index(stage) : -1]:
            of_stage, iterations, batch_size = stages[name]
            # Section 3: textures are learned last, and only their head is trained.
            for key, parameter in net.named_parameters():
                parameter.requires_grad_(key.startswith("heads.texture.") == (name == "texture"))
            optimizer = torch.optim.SGD(parameter_groups(net), lr=args.lr, momentum=0.9)
            if first:
                optimizer.load_state_dict(checkpoint["optimizer"])
            unused = len(of_stage) > 1 or (name == "main" and "object" not in vocabulary)  # off a step's path
            model = DistributedDataParallel(net, find_unused_parameters=unused) if processes > 1 else net
            settings = {"sizes": args.sizes, "longest": args.max_size, "seed": args.seed}
            settings |= {"sources": [sources[n] for n in of_stage], "share": (args.accumulate, rank, processes)}
            plan = datasets.plan_batches(of_stage, iterations, batch_size * args.accumulate * processes, args.seed)
            make_batch = functools.partial(datasets.training_batch, plan=plan, **settings)
            numbers, pinned = range(first * args.accumulate, iterations * args.accumulate), device.type == "cuda"
            batches, saved = iter(datasets.in_order(make_batch, numbers, args.workers, pinned)), time.monotonic()
            overflows = left_out = 0  # fp16 steps: in a row, in all
            every = 0.1 if sys.stdout.isatty() else 30  # seconds between updates of the bar
            bar = tqdm(desc=name, total=iterations, initial=first, disable=rank > 0, file=sys.stdout, mininterval=every)
            for iteration in range(first, iterations):
                began = time.perf_counter()
                if name == "main":
                    net.train()
                else:  # frozen: no gradient passes forward's `detach`, and eval mode keeps the batch-norm statistics
                    net.eval()
                    net.heads["texture"].train()
                lr = args.lr * (1 - iteration / iterations) ** 0.9  # section 3.1: poly; a policy for each stage is ours
                for group in optimizer.param_groups:
                    group["lr"] = lr
                of_step, scale = [next(batches) for _ in range(args.accumulate)], scaler.get_scale()
                try:
                    loss = update(model, net.part_slices, of_step, optimizer, scaler, device, amp)
                    overflows = overflows + 1 if scaler.get_scale() < scale else 0
                    left_out += overflows > 0
                    if overflows == 20:
                        raise FloatingPointError("20 fp16 steps in a row overflowed")
                except FloatingPointError as e:
                    where = f"the loss is not finite at iteration {iteration} of the {name} stage ({e})"
                    raise UserError(f"{where}; {path} is the last good checkpoint; try a lower --lr") from None
                line = {"stage": name, "iteration": iteration, "source": of_step[0]["source"], "lr": lr}
                line["loss"] = {level: value if math.isfinite(value) else None for level, value in loss.items()}
                line["seconds"] = round(time.perf_counter() - began, 4)
                bar.set_postfix_str(", ".join(f"{level} {value:.2f}" for level, value in loss.items()), refresh=False)
                bar.update()
                done = iteration + 1
                if args.eval_every and done % args.eval_every == 0 and (name, done) != (order[-2], iterations):
                    metrics = validate(net)
                    print(f"after {done} iterations of the {name} stage:\n{evaluate.table(metrics)}")
                    line["metrics"] = {v: {k: x for k, x in m.items() if k != "iou"} for v, m in metrics.items()}
                    if headline(metrics) > best:
                        best = headline(metrics)
                        save(name, done, optimizer, best_path)
                if rank == 0:
                    with open(log, "a") as file:
                        file.write(json.dumps(line) + "\n")
                received = anywhere(noted[0] if noted else 0)
                due = done % args.save_every == 0 if args.save_every else time.monotonic() - saved > 600
                if received or (due and done < iterations):
                    save(name, done, optimizer)
                    saved = time.monotonic()
                if received:
                    bar.close()
                    print(f"stopped and saved after {done} iterations of the {name} stage; this resumes it:")
                    print(f"{launcher(processes)} train.py --resume --out {shlex.quote(args.out)}", flush=True)
                    raise SystemExit(128 + received)
            bar.close()
            del batches
            if left_out:
                print(f"{name}: left out {left_out} steps that overflowed in fp16")
            first = 0
            save(order[order.index(name) + 1], first)
    # Evaluate.
    print(f"wrote {path}" + (", and beside it log.jsonl and curves.png" if stages else ""))
    if validation:
        results = validate(net, os.path.join(args.out, "pictures"))
        if args.eval_every and headline(results) > best:
            save("done", 0, to=best_path)
        print(evaluate.table(results, untrained=validate(build()) if args.data == "toy" else None))
        if rank == 0:
            datasets.write_json(results, metrics_path)
        print(f"wrote {metrics_path}, and pictures/ beside it")
    print(f"next: python evaluate.py {shlex.quote(path)} --photo YOUR.jpg")


# ---------------------------------------------------------------- what the loop is made of
def parameter_groups(net: nn.Module) -> list[dict]:
    """The trainable parameters; no weight decay on biases and norms (as released)."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    decayed, spared = ([p for p in parameters if (p.ndim > 1) == decays] for decays in (True, False))
    return [{"params": decayed, "weight_decay": 1e-4}, {"params": spared, "weight_decay": 0.0}]


def plan_stages(args, sizes: dict[str, dict], processes: int) -> dict[str, tuple[dict, int, int]]:
    """Stage -> (training images of its sources, iterations, images per process and batch); by default 5 iterations per
    training image at 16 images a step, the paper's 100k for ADE20K's 20k images, then 5 passes over DTD (ours)."""
    textures = {name: images for name, images in sizes.items() if name == "dtd"}
    others = {name: images for name, images in sizes.items() if name != "dtd"}
    step = args.batch_size * args.accumulate * processes
    iters = math.ceil(5 * 16 * sum(map(len, others.values())) / step) if args.iters is None else args.iters
    passes = math.ceil(5 * sum(map(len, textures.values())) / (step * TEXTURE_IMAGES))
    passes = passes if args.texture_iters is None else args.texture_iters
    main, texture = (others, iters, args.batch_size), (textures, passes, args.batch_size * TEXTURE_IMAGES)
    return {name: stage for name, stage in (("main", main), ("texture", texture)) if stage[0] and stage[1]}


def open_data(args, checkpoint: dict | None) -> tuple[dict[str, Source], dict, dict[str, list[str]], dict[str, dict]]:
    """(sources, vocabulary, validation images, what else a checkpoint keeps of the data: fingerprints of images and
    labels, the numbers of one's own class table). UserError for a resumed run whose data have changed."""
    (indexes, minima), levels = datasets.open_indexes(args), args.levels or LEVELS
    indexes = {name: index for name, index in indexes.items() if set(datasets.SOURCE_LEVELS[name]) & set(levels)}
    content = lambda i: [i.images, i.sizes.tolist(), i.tags, i.names, i.pixels.tolist()]
    of_data = {"fingerprints": {name: datasets.hash_of(content(index)) for name, index in indexes.items()}}
    of_data["numbers"] = {"object": list(i.names) for i in indexes.values() if i.layout == "sceneparsing"}
    if checkpoint:
        vocabulary, split, stored = (checkpoint[key] for key in ("vocabulary", "split", "arguments"))
        if of_data["fingerprints"] != stored.get("fingerprints"):
            raise UserError(f"{args.out}: images, masks or names changed; --weights {args.out}/ckpt.pt trains on them")
    else:
        everything = datasets.build_vocabulary(indexes, minima, levels)  # a split does not depend on --levels
        vocabulary = {level: names for level, names in everything.items() if level in levels}
        if without := [name for name in indexes if not set(datasets.SOURCE_LEVELS[name]) & set(vocabulary)]:
            raise UserError(f"{without[0]}: no class is large enough to be kept; lower the --min- options")
        choose = lambda index: balance_split.validation_images(index, everything, args)
        split = {name: choose(index) for name, index in indexes.items()}
    cache = datasets.cache_folder(args), max(args.sizes), args.max_size
    return {n: Source(index, vocabulary, None, *cache) for n, index in indexes.items()}, vocabulary, split, of_data


# ---------------------------------------------------------------- the weights to start from
def read_start(weights: str) -> tuple[dict, dict, dict] | None:
    """(UPerNet's arguments, vocabulary, state dict) of the file that --weights names: one of our checkpoints, one of
    mmsegmentation's, or a backbone's state dict, which has neither of the first two. None for imagenet and none."""
    if weights in ("imagenet", "none"):
        return None
    try:
        content = upernet.read_file(weights)
        if "model" in content or "decode_head.conv_seg.weight" in content.get("state_dict", content):
            net, vocabulary = (upernet.load if "model" in content else upernet.load_mmseg)(weights)
            sizes = {key: v for key, v in content.get("arguments", {}).items() if key in ("sizes", "max_size")}
            return net.network | sizes, vocabulary, net.state_dict()
    except ValueError as e:
        raise UserError(f"--weights {e}; it takes imagenet, none, or a file") from None
    return {}, {}, {f"backbone.{key}": value for key, value in content.items() if not str(key).startswith("fc.")}


def load_start(net: UPerNet, vocabulary: dict, weights: str, start: tuple | None) -> None:
    """Loads what fits into `net`, classifiers class by class, by name, and says what starts over."""
    if weights == "imagenet":
        try:
            resnet.load_imagenet(net.backbone)
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"--weights imagenet: not available ({e}); give --weights none, or a file") from None
    if start is None:
        return
    _, their_vocabulary, state = start
    ours, state = net.state_dict(), {key: value for key, value in state.items() if isinstance(value, Tensor)}
    loaded = {key: state[key] for key, value in ours.items() if key in state and state[key].shape == value.shape}
    notes = []
    for level in [level for level in net.heads if level in their_vocabulary]:
        names, theirs = (evaluate.class_names(v)[level] for v in (vocabulary, their_vocabulary))
        keys = [f"heads.{level}.classifier.{kind}" for kind in ("weight", "bias")]
        fits = all(state[key].shape[1:] == ours[key].shape[1:] for key in keys)  # of the same width
        common = [name for name in names if name in theirs] if fits else []
        for key in keys:
            loaded.pop(key, None)
            if common:
                loaded[key] = ours[key].cpu().clone()
                loaded[key][[names.index(n) for n in common]] = state[key][[theirs.index(n) for n in common]].cpu()
        new = ", ".join([name for name in names if name not in common][:9])
        notes.append(f"{len(common)} of {len(names)} {level} classes kept by name" + (new and f", not {new}"))
    if not any(key.endswith("weight") for key in loaded):
        raise UserError(f"--weights {weights}: nothing in it fits this network (first key: {next(iter(state), None)})")
    net.load_state_dict(loaded, strict=False)
    module = lambda key: ".".join(key.split(".")[:2]) if key.startswith(("heads", "backbone.")) else key.split(".")[0]
    for keys, others, note in ((ours, loaded, "start over"), (state, ours, "left out")):
        if names := list(dict.fromkeys(module(key) for key in keys if key not in others)):
            notes.append(", ".join(names[:6] + [".."] * (len(names) > 6)) + f" {note}")
    datasets.say(f"{weights}: {len(loaded)} of {len(ours)} tensors loaded, classifiers by class; " + "; ".join(notes))


# ---------------------------------------------------------------- progress, signals, resuming
def anywhere(number: int) -> int:
    """The largest of the processes' numbers, without waiting for a GPU."""
    largest = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def headline(metrics: dict) -> float:
    """What makes a network the best: the mean IoU of objects, else the first metric there is."""
    of_level = metrics.get("object") or next(iter(metrics.values()), {})
    value = of_level.get("mean_iou", next(iter(of_level.values()), None))
    return -1.0 if value is None else value


def cut_log(path: str, lines: int) -> list[dict]:
    """Keeps the first `lines` lines, those of the iterations that the checkpoint has seen, and returns them."""
    kept = Path(path).read_text(errors="replace").splitlines()[:lines] if os.path.exists(path) else []
    try:
        content = [json.loads(line) for line in kept]
    except ValueError as e:
        raise UserError(f"{path}: not a log of train.py's ({e}); move it away to resume without it") from None
    if os.path.exists(path):
        datasets.write_file(path, lambda name: Path(name).write_text("".join(line + "\n" for line in kept)))
    return content


def draw_curves(log: str, lengths: dict[str, int], out: str, bins: int = 160) -> None:
    """curves.png: each level's loss and the learning rate over the run, means of `bins` stretches of the log."""
    total, offset = max(1, sum(lengths.values())), {"main": 0, "texture": lengths.get("main", 0)}
    sums: dict[str, np.ndarray] = {}
    with contextlib.suppress(OSError, ValueError, KeyError):  # a failed plot must not stop training
        with open(log) as file:
            for line in map(json.loads, file):
                k = min(bins - 1, (offset[line["stage"]] + line["iteration"]) * bins // total)
                for name, value in {**line["loss"], "learning rate": line["lr"]}.items():
                    sums.setdefault(name, np.zeros((bins, 2)))[k] += value or 0, value is not None
        panels = []
        for name in (name for name in (*LEVELS, "learning rate") if name in sums and sums[name][:, 1].any()):
            xs = sums[name][:, 1].nonzero()[0]
            ys = sums[name][xs, 0] / sums[name][xs, 1]
            title, points = name if " " in name else f"{name}, loss", {"#2255cc": ((xs + 0.5) * total / bins, ys)}
            panels.append(evaluate.plot(title, points, float(ys.max()) or 1.0, total, "iterations"))
        if panels:
            evaluate.save_picture(evaluate.sheet_of([panels[:3], panels[3:]]), os.path.join(out, "curves.png"))


@contextlib.contextmanager
def noted_signals():
    """Notes SIGTERM and Ctrl-C in a list; one that comes two seconds later takes effect (to groups they come twice)."""
    noted, times = [], []

    def note(number: int, _) -> None:
        noted.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launcher(processes: int) -> str:
    """How this process was started: python, or torchrun on one or several machines."""
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    where = f" --nnodes={nodes} --node_rank=RANK --master_addr={os.environ.get('MASTER_ADDR')}" if nodes != "1" else ""
    return f"torchrun{where} --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if processes > 1 else "python"


def torchrun_group() -> list:
    """What identifies this torchrun, also after it starts a failed group again."""
    group = [os.environ.get("TORCHELASTIC_RUN_ID")]
    return group if group != ["none"] else group + [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]


def settle(parser: datasets.Parser, given) -> tuple:
    """(options, the checkpoint to resume or None, what `read_start` found). UserError if options do not fit."""
    data = given.data or "toy"
    names = [name for name in datasets.SOURCE_LEVELS if name in datasets.named_sources(data)]
    out = given.out or os.path.join("runs", data if data == "toy" else "+".join(names))
    path = os.path.join(out, "ckpt.pt")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and os.path.exists(path)
    if given.resume or restarted:
        try:
            net, checkpoint = upernet.read_checkpoint(path)
            checkpoint["model"], stored = net.state_dict(), checkpoint["arguments"]
            checkpoint["random"].cpu(), checkpoint["optimizer"], checkpoint["scaler"], checkpoint["split"].keys()
            ["main", "texture", "done"].index(checkpoint["stage"])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: no run to resume ({e}); see --out, or delete it and leave out --resume") from None
        if given.resume or stored.get("group") == torchrun_group():  # torchrun started its own run again
            for key, value in vars(given).items():
                if value is not None and not parser.options[key].resume and stored.get(key) != value:
                    option = f"--{parser.options[key].name}"
                    raise UserError(f"{option}: --resume keeps {stored.get(key)}, as {out} has; leave {option} out")
            args = parser.complete(given, stored | {"out": out})
            return args, checkpoint, (checkpoint["network"], {}, {})
    if os.path.exists(path):
        raise UserError(f"{out}: holds a run already; --resume resumes it, --out names another folder")
    start = read_start(parser.complete(given).weights)
    network = start[0] if start else {}
    kept = ("backbone", "channels", "stem", "output_stride", "fpn", "sizes", "max_size")
    stored = {key: network[key] for key in kept if key in network}
    stored |= {f"no_{key}": not network[key] for key in ("ppm", "fusion", "head_conv") if key in network}
    args = parser.complete(given, stored | {"out": out})
    if "part" in (args.levels or ()) and "object" not in args.levels:
        raise UserError("--levels: part needs object")
    without = [name for name in names if args.levels and not set(datasets.SOURCE_LEVELS[name]) & set(args.levels)]
    if without and (args.data != "toy" or len(without) == len(names)):
        raise UserError(f"--levels {','.join(args.levels)}: {without[0]} has none of them; leave it out of --data")
    if args.max_size < min(args.sizes):
        raise UserError(f"--max-size: at least the smallest of --sizes, {min(args.sizes)}")
    return args, None, start


# ---------------------------------------------------------------- the command
def short_sides(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


OPTIONS = datasets.DATA_OPTIONS + [
    Option("backbone", ("resnet50", "resnet18", "resnet34", "resnet101"), "resnet50", "the backbone", "resnet18"),
    Option("channels", int, 512, "width of everything after the backbone", 48),
    Option("stem", ("7x7", "deep", "v1c"), "7x7", "the backbone's first layers"),
    Option("output-stride", (32, 16, 8), 32, "stride of the backbone's last stage"),
    Option("no-ppm", bool, False, "without the Pyramid Pooling Module"),
    Option("fpn", (2, 3, 4, 0), 2, "finest level of the feature pyramid, 0 for none"),
    Option("no-fusion", bool, False, "objects and parts on the finest level alone"),
    Option("no-head-conv", bool, False, "no 3x3 convolution before the classifiers (small data may want it)"),
    Option("weights", str, "imagenet", "imagenet, none, or a file: ours, mmsegmentation's", "none"),
    Option("levels", evaluate.levels_of, None, f"comma list of {','.join(LEVELS)} (all)"),
    # Sizes, rates and lengths: section 3.1's and the released code's.
    Option("split", ("balanced", "official"), "balanced", "validation images: <root>/split.json, or the sources' own"),
    Option("iters", int, None, "main stage; 0 skips it (5 an image at 16 a step)", 1700, least=0),
    Option("texture-iters", int, None, "texture stage; 0 skips it (5 passes over DTD)", 500, least=0),
    Option("batch-size", int, 2, "images per process", 4, resume=True),
    Option("accumulate", int, 1, "batches of the same source per step", resume=True),
    Option("lr", float, 0.02, "learning rate at the start", 0.04, least=1e-12),
    Option("sizes", short_sides, [300, 375, 450, 525, 600], "short sides to choose from", [76, 80, 84], least=32),
    Option("max-size", int, 1200, "longest side", 160),
    Option("seed", int, 304, "of weights, batches and augmentation", least=0),
    Option("out", str, None, "folder for checkpoint, log, metrics, pictures (runs/<data>)", resume=True),
    Option("resume", bool, False, "resume the run in --out", resume=True),
    Option("save-every", int, None, "iterations between checkpoints (ten minutes)", 400, resume=True),
    Option("eval-every", int, 0, "iterations between validations; 0: at the end only", resume=True, least=0),
    Option("workers", int, None, "processes that read images (one a core, at most 8)", resume=True, least=0),
    Option("amp", ("auto", "bf16", "fp16", "off"), "auto", "mixed precision, on CUDA by default", resume=True),
]
OPTIONS += datasets.DEVICE_OPTIONS


def main(argv: list[str] | None = None) -> None:
    description = "Trains UPerNet. In brackets the defaults (the paper's, if it has them), after 'toy' the toy's."
    parser = datasets.Parser(description, OPTIONS)
    parser.run(train, parser, parser.parse_args(argv))


if __name__ == "__main__":
    main()
