"""Uses of a model besides a call: graphs, export, checkpointing, frozen parts, and the meta device."""

import collections
import contextlib
import copy
import dataclasses
import functools
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from peers import assert_same, import_transformers, outputs_and_gradients, randomise
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from triton.tools.tensor_descriptor import TensorDescriptor

import vit
from vit import cuda_graph
from vit.commands import cli, warmup
from vit.cuda_graph import Graph, check
from vit.init import init_weights
from vit.kernels import runtime
from vit.layers import DropPath, LayerNorm, LayerScale, add_norm
from vit.unchanged import unchanged

SMALL = vit.ViTConfig(
    img_size=(8, 16), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, init_values=0.5, mlp_ratio=2.0
)
DROPS = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}


def make(impl="auto", device="cpu", **options):
    """A model with random weights in every part, and images."""
    model = vit.VisionTransformer(dataclasses.replace(SMALL, impl=impl, **options), seed=0).to(device)
    randomise(model)
    return model, torch.randn(3, 3, 8, 16, generator=torch.Generator().manual_seed(1)).to(device)


class Calls(TorchDispatchMode):
    """Counts the calls of our ops, forward and backward."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vit":
            self.count[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def results(model, image):
    torch.manual_seed(0)  # for dropout
    return outputs_and_gradients(model, model, image)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def capture(run, device):
    """Acts as a captured graph without a GPU: every replay writes its results to the same tensors."""
    first = run()

    def replay():
        tree_map(lambda place, t: place.copy_(t) if isinstance(t, torch.Tensor) else None, first, run())
        return first

    return replay


def captured(model, *example, **options):
    """`vit.graph` with `capture` above."""
    check(model, example, options)
    return Graph(model, example, options, capture)


def test_graph_returns_the_models_outputs_and_keeps_them():
    model, image = make()
    run = captured(model.eval(), torch.full_like(image, float("nan")))
    first = run(image)
    kept = first.clone()
    second = run(image.flip(0).requires_grad_())
    with torch.no_grad():
        assert (
            torch.equal(first, kept) and torch.equal(first, model(image)) and torch.equal(second, model(image.flip(0)))
        )
    assert not second.requires_grad
    with torch.no_grad():
        model.head.bias.add_(1.0)  # a replay reads the current values of the parameters
    torch.testing.assert_close(run(image), first + 1.0)
    with torch.inference_mode():
        torch.testing.assert_close(run(image), first + 1.0)


def test_graph_made_in_inference_mode_runs_outside():
    model, image = make()
    with torch.inference_mode():
        run = captured(model.eval(), image)
    assert torch.equal(run(image), run(image.clone()))


def test_graph_keeps_the_autocast_of_its_capture():
    model, image = make()
    with torch.autocast("cpu", torch.bfloat16):
        run, expected = captured(model.eval(), image), model(image)
    assert expected.dtype is torch.bfloat16 and run(image).dtype is torch.bfloat16


class Wrapped(torch.nn.Module):
    """A model as in other libraries: two inputs, an option, and a dictionary as output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image, scale, twice=False):
        logits = self.model(image) * scale
        return {"logits": logits * 2 if twice else logits, "name": "wrapped"}


def test_graph_of_any_module():
    model, image = make()
    wrapped, scale = Wrapped(model).eval(), torch.tensor(3.0)
    out = captured(wrapped, image, scale, twice=True)(image, scale * 2)
    assert out["name"] == "wrapped"
    torch.testing.assert_close(out["logits"], 12 * model(image).detach())


@pytest.mark.peers
def test_graph_of_a_hugging_face_model():
    transformers = import_transformers()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=8)).eval()
    image = torch.randn(2, 3, 16, 16)
    run = captured(model, image, output_hidden_states=True)
    out, other = run(image), run(image * 0.5)
    with torch.no_grad():
        expected = model(image, output_hidden_states=True)
    assert type(out) is type(expected) and len(out.hidden_states) == 2
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(out.hidden_states[0], expected.hidden_states[0])
    assert not torch.equal(other.pooler_output, expected.pooler_output)


@dataclasses.dataclass
class Unknown:
    logits: torch.Tensor


def bad_graphs():
    model, image = make()
    model.eval()
    run = captured(model, image)
    moved = captured(other := make()[0].eval(), image)
    other.double()
    unknown = make()[0].eval()
    unknown.register_forward_hook(lambda module, args, out: Unknown(out))
    half, _ = make()
    half.eval().blocks[1].mlp.train()
    elsewhere = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4, affine=False, device="meta"))
    elsewhere.eval()
    return {
        "shape": (
            lambda: run(image[:2]),
            ValueError,
            r"captured for torch.float32 \[3, 3, 8, 16\] on cpu, got .*\[2, 3",
        ),
        "dtype": (
            lambda: run(image.double()),
            ValueError,
            r"got torch.float64 \[3, 3, 8, 16\] on cpu; capture another",
        ),
        "device": (lambda: run(image.to("meta")), ValueError, "on meta"),
        "no tensor": (lambda: run(None), TypeError, r"captured for 1 tensor\(s\), got \(NoneType\)"),
        "too many": (lambda: run(image, image), TypeError, r"got \(Tensor, Tensor\)"),
        "moved": (lambda: moved(image), RuntimeError, "moved or cast"),
        "container": (lambda: captured(unknown, image)(image), TypeError, "cannot copy a Unknown"),
        "on a CPU": (lambda: vit.graph(model, image), RuntimeError, "needs a GPU, but the model is on cpu"),
        "training": (
            lambda: vit.graph(make()[0], image),
            ValueError,
            r"VisionTransformer is in training; call model.ev",
        ),
        "a part in training": (lambda: vit.graph(half, image), ValueError, r"blocks.1.mlp is in training"),
        "two devices": (lambda: vit.graph(model, image.to("meta")), ValueError, r"got meta and cpu \(cls_token\)"),
        "a buffer elsewhere": (lambda: vit.graph(elsewhere, image), ValueError, r"got cpu and meta \(1.running_mean\)"),
        "no example": (lambda: vit.graph(model, ()), TypeError, "example must be a tensor"),
        "a list": (lambda: vit.graph(model, [[1.0]]), TypeError, "example must be a tensor"),
        "tensor option": (lambda: vit.graph(model, image, mask=image), TypeError, "mask is a tensor"),
    }


@pytest.mark.parametrize("case", bad_graphs())
def test_graph_refuses(case):
    call, error, message = bad_graphs()[case]
    with pytest.raises(error, match=message):
        call()


class Pair(torch.nn.Module):
    """It has two inputs, an option, parameters, buffers, and results in all kinds of containers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(3))
        self.inside = torch.nn.BatchNorm1d(2)
        self.states = []

    def forward(self, a, b, power=1):
        cache = torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu")
        self.states.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cache))
        total = a * self.first + self.table
        return total, [total @ b**power, {"b": b * 2, "both": (a.sum(), 2.5)}], None, True, 3, "name"


def pair():
    return Pair().eval(), torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4)


def test_graph_copies_every_tensor_of_nested_results():
    model, a, b = pair()
    run = captured(model, torch.zeros(2, 3), torch.zeros(3, 4), power=2)

    def want(a, b):
        total = a + 1
        return total, [total @ b**2, {"b": b * 2, "both": (a.sum(), 2.5)}], None, True, 3, "name"

    first = run(a, b)
    second = run(a + 1, b + 2)
    torch.testing.assert_close(first[:2], want(a, b)[:2])
    torch.testing.assert_close(second[:2], want(a + 1, b + 2)[:2])
    assert first[2:] == second[2:] == (None, True, 3, "name")


def test_graph_leaves_its_example_and_its_inputs_alone():
    model, a, b = pair()
    run = captured(model, a, b)
    other = run(a + 1, b + 1)[0].clone()
    assert torch.equal(a, torch.arange(6.0).reshape(2, 3)) and torch.equal(b, torch.arange(12.0).reshape(3, 4))
    a.fill_(torch.nan)  # the graph does not read its example
    inputs = torch.arange(6.0).reshape(2, 3) + 1, torch.arange(12.0).reshape(3, 4) + 1
    copies = [x.clone() for x in inputs]
    assert torch.equal(run(*inputs)[0], other) and all(map(torch.equal, inputs, copies))
    assert torch.equal(run(inputs[0].mT.contiguous().mT, inputs[1])[0], other)  # any strides


def bad_second_arguments():
    model, a, b = pair()
    run = captured(model, a, b)
    return {
        "shape": (lambda: run(a, b[:, :3]), ValueError, r"captured for torch.float32 \[3, 4\] on cpu, got .*\[3, 3\]"),
        "fewer dimensions": (lambda: run(a, b[:, 0]), ValueError, r"got torch.float32 \[3\] on cpu"),
        "more": (lambda: run(a, b[None]), ValueError, r"got torch.float32 \[1, 3, 4\] on cpu"),
        "exchanged": (lambda: run(b, a), ValueError, r"captured for torch.float32 \[2, 3\] on cpu, got .*\[3, 4\]"),
        "turned": (lambda: run(a, b.mT), ValueError, r"\[3, 4\] on cpu, got torch.float32 \[4, 3\]"),
        "dtype": (lambda: run(a, b.double()), ValueError, "got torch.float64"),
        "integers": (lambda: run(a, b.int()), ValueError, "got torch.int32"),
        "device": (lambda: run(a, b.to("meta")), ValueError, "on meta"),
        "no tensor": (lambda: run(a, None), TypeError, r"captured for 2 tensor\(s\), got \(Tensor, NoneType\)"),
        "one": (lambda: run(a), TypeError, r"captured for 2 tensor\(s\), got \(Tensor\)"),
        "none": (lambda: run(), TypeError, r"captured for 2 tensor\(s\), got \(\)"),
        "example": (lambda: vit.graph(model, (a, 1.0)), TypeError, r"got \['Tensor', 'float'\]"),
        "example elsewhere": (lambda: vit.graph(model, (a, b.to("meta"))), ValueError, r"cpu and meta \(input 1\)"),
        "option": (lambda: vit.graph(model, (a, b), power=2, mask=b), TypeError, "mask is a tensor"),
    }


@pytest.mark.parametrize("case", bad_second_arguments())
def test_graph_refuses_a_second_argument(case):
    call, error, message = bad_second_arguments()[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("part", ["first", "last", "table", "inside.weight", "inside.running_var", "everything"])
def test_graph_refuses_when_any_tensor_was_moved(part):
    model, a, b = pair()
    run = captured(model, a, b)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name == part or part == "everything":
            t.data = t.data.clone()
    with pytest.raises(RuntimeError, match="moved or cast after it was captured; capture it again"):
        run(a, b)


@pytest.mark.parametrize("change", [lambda norm: norm.double(), lambda norm: delattr(norm, "running_var")])
def test_graph_refuses_when_a_buffer_is_another_object(change):
    """A cast changes the memory of a parameter, but replaces a buffer by a new tensor."""
    model, image = torch.nn.BatchNorm2d(4, affine=False).eval(), torch.randn(2, 4, 3, 3)
    run = captured(model, image)
    change(model)
    with pytest.raises(RuntimeError, match="moved or cast after it was captured; capture it again"):
        run(image)


@pytest.mark.parametrize(("dtype", "enabled"), [(torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_graph_is_captured_without_gradients_and_in_the_autocast_around_it(dtype, enabled):
    model, a, b = pair()
    with torch.autocast("cpu", dtype, enabled), torch.inference_mode():
        run = captured(model, a.clone(), b.clone())
    assert model.states and set(model.states) == {(False, False, False)}  # a cache would outlive the graph
    out = run(a, b)
    assert out[1][0].dtype is (dtype if enabled else torch.float32) and not out[0].requires_grad
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


def fake_cuda(monkeypatch, fails=False):
    """Records the calls of `torch.cuda` during a capture, without a GPU."""
    events = []

    def said(name):
        @contextlib.contextmanager
        def context(*args):
            events.append(f"enter {name}")
            yield
            events.append(f"leave {name}")

        return context

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class CUDAGraph:
        def replay(self):
            events.append("replay")

    monkeypatch.setattr(torch.cuda, "device", said("device"))
    monkeypatch.setattr(torch.cuda, "stream", said("side"))
    monkeypatch.setattr(torch.cuda, "graph", said("graph"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))

    def run():
        events.append("run")
        if fails and "enter graph" in events:
            raise RuntimeError("a wait")
        return events.count("run")

    return events, run


def test_a_capture_warms_up_on_a_side_stream_and_replays_the_last_run(monkeypatch):
    events, run = fake_cuda(monkeypatch)
    replay = cuda_graph.capture(run, torch.device("cuda:1"))
    before = ["enter device", "side waits for current", "enter side", *["run"] * 3, "leave side"]
    after = ["current waits for side", "synchronize", "enter graph", "run", "leave graph", "leave device"]
    assert events == before + after
    events.clear()
    assert replay() == replay() == 4 and events == ["enter device", "replay", "leave device"] * 2


def test_a_forward_that_cannot_be_captured_says_so(monkeypatch):
    _, run = fake_cuda(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match=r"vit\.graph: this forward cannot be captured: a wait"):
        cuda_graph.capture(run, torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_graph_on_a_gpu(impl):
    model, image = make(impl, "cuda")
    run = vit.graph(model.eval(), image)
    others = [torch.randn_like(image) for _ in range(3)]
    with torch.no_grad():
        for out, x in zip([run(x) for x in others], others, strict=True):
            assert torch.equal(out, model(x))
    with pytest.raises(ValueError, match="capture another graph"):
        run(image[:2])


# ---- vit warmup ------------------------------------------------------------------------------------------------------

WARMUP = """
import sys
from pathlib import Path
import torch
from vit import kernels
from vit.commands import cli
from vit.commands.warmup import warm_up

class Norm(torch.nn.LayerNorm):
    def forward(self, x):
        return kernels.layer_norm(x, self.weight, self.bias)

norm, state = Norm(64), torch.get_rng_state()
found = warm_up(norm, torch.zeros(16, 64), train=True, arch=90)
assert (found.compiled, found.cached) == (4, 0), found  # forward for each mode, backward, its sums
assert norm.training and norm.weight.grad is None and torch.equal(state, torch.get_rng_state())
assert len(list(Path(sys.argv[1]).glob("*/*.cubin"))) == 4 and found.cache == Path(sys.argv[1])
assert (torch.ones(2, 2) @ torch.ones(2, 2) == 2.0).all()  # compile-only has given its place back
def main(words):
    try:
        return cli.main(["warmup", *words])
    except SystemExit as end:  # of the parser
        return end.code

codes = [main(words) for words in (
    ["vit_tiny_patch16_224", "--arch", "sm_80", "--img-size", "32x48", "--dtype", "fp16"],
    ["vit_tiny_patch16_225", "--arch", "sm_90"],
    ["vit_tiny_patch16_224", "--arch", "90"],
    ["vit_tiny_patch16_224", "--arch", "sm_75"],
    ["vit_tiny_patch16_224", "--img-size", "a", "--arch", "sm_90"],
    ["vit_tiny_patch16_224", "--device", "cpu"],
    ["vit_tiny_patch16_224", "--batch-size", "0"],
    ["vit_tiny_patch16_224"],
)]
assert codes == [0] + [2] * 6 + [0 if torch.cuda.is_available() else 2], codes
"""


@pytest.mark.ci
def test_warmup(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WARMUP, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third = done.stdout.splitlines()[:3]
    assert first == "vit_tiny_patch16_224, 1 x 32 x 48 pixels, fp16, inference, for sm_80, from here"
    assert second.split(",")[0] == f"{len(list(tmp_path.glob('*/*.cubin'))) - 4} kernels compiled"
    assert third == f"cache: {tmp_path}"
    for message in ("did you mean 'vit_tiny", "write sm_90", "8.0 (sm_80)", "got 'a'", "cuda:0", "got '0'"):
        assert message in done.stderr
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU was found; --arch sm_90" in done.stderr


ORDER = """
import sys, torch
from vit import kernels
from vit.kernels.dry_run import dry_run

x, qkv = torch.empty(8, 64), torch.empty(1, 8, 3, 2, 32)
calls = {
    "linear": lambda: kernels.linear(x, torch.empty(64, 64), impl="triton"),
    "attention_qkvpacked": lambda: kernels.attention_qkvpacked(qkv, impl="triton"),
}
found = {}
with dry_run(90, lambda kernel, *_: found.update({kernel.__name__: kernel.cache_key})):
    for name in sys.argv[1:]:
        calls[name]()
print(sorted(found.items()))
"""


@pytest.mark.ci
def test_kernels_have_one_cache_key_whatever_runs_first():
    """Otherwise a process that calls the ops in another order compiles again what `vit warmup` compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    keys = set()
    for order in (["linear", "attention_qkvpacked"], ["attention_qkvpacked", "linear"]):
        done = subprocess.run([sys.executable, "-c", ORDER, *order], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        keys.add(done.stdout)
    assert len(keys) == 1


@pytest.mark.interpreted
def test_warmup_says_that_nothing_is_compiled(capsys):
    assert cli.main(["warmup", "vit_tiny_patch16_224", "--arch", "sm_90"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("impl", "strict"), [("auto", False), ("triton", False), ("triton", True)])
def test_export_with_any_batch(impl, strict, device, tmp_path):
    model, image = make(impl, device if impl == "triton" else "cpu", depth=1, reg_tokens=1)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model.eval(), (image,), dynamic_shapes=({0: batch},), strict=strict)
    ops = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("vit.")}
    kinds = ("patch_embed", "layer_norm", "linear", "attention", "mlp")  # attention: unpacked
    assert ops == ({f"vit.{kind}_fwd.default" for kind in kinds} if impl == "triton" else set())
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 2):
        x = torch.randn(size, 3, 8, 16).to(image)
        assert torch.equal(loaded(x), model(x)), size


# ---- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_by_the_user(reentrant):
    model, image = make(**DROPS)
    direct = results(model, image)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    torch.manual_seed(0)
    image = image.clone().requires_grad_()
    out = model(image)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)))  # not grad(): reentrant
    found = {"output": out, "image": image.grad} | {k: p.grad for k, p in model.named_parameters()}
    assert all(torch.equal(direct[k], found[k]) for k in direct)


def test_selective_checkpointing_by_the_names_of_our_ops(device):
    model, image = make("triton", device, depth=1, global_pool="avg")
    direct = results(model, image)
    kept = {torch.ops.vit.attention_qkvpacked_fwd.default, torch.ops.vit.linear_fwd.default}

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    (block,) = model.blocks
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    with Calls() as calls:
        found = results(model, image)
    assert all(torch.equal(direct[k], found[k]) for k in direct)
    # linear: qkv and proj of the block, and the head. The MLP and the norms before and after it run twice.
    assert calls.count["attention_qkvpacked_fwd"] == 1 and calls.count["linear_fwd"] == 3
    assert calls.count["mlp_fwd"] == 2 and calls.count["layer_norm_fwd"] == 1 + 2 * 2


def subclassed(module):
    module.__class__ = type("Own", (type(module),), {})
    return module


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, subclassed])
def test_wrapped_modules(wrap):
    """A wrapped block or final norm applies its own norm. The results are the same up to rounding."""
    model, image = make(depth=3, **DROPS)
    direct, maps = results(model, image), model.eval().attention_maps(image)[1]
    model.blocks[0], model.blocks[2], model.norm = map(wrap, (model.blocks[0], model.blocks[2], model.norm))
    torch.testing.assert_close(model.attention_maps(image)[1], maps)
    found = results(model.train(), image)
    assert_same(dict(zip(direct, found.values(), strict=True)), direct, 1e-5)


@pytest.mark.parametrize("gamma", [False, True], ids=["", "gamma"])
@pytest.mark.parametrize("path", [False, True], ids=["", "path"])
@pytest.mark.parametrize("drop", [False, True], ids=["", "dropout"])
def test_residual_add_without_the_fused_op(gamma, path, drop):
    """With a wrapped norm or none, everything before the norm still runs."""
    norm, seed = LayerNorm(SMALL), torch.tensor([5])
    x, branch = torch.randn(2, 3, 4, 32).unbind()
    scale, drop_path = LayerScale(SMALL) if gamma else None, DropPath(SMALL, 0.5 if path else 0.0, 3)
    if gamma:
        torch.nn.init.normal_(scale.gamma)
    options = scale, drop_path, seed, "auto", {"dropout_p": 0.4, "seed": seed, "offset": 2} if drop else {}
    want = add_norm(norm, x, branch, *options)
    torch.testing.assert_close(tuple(add_norm(subclassed(copy.deepcopy(norm)), x, branch, *options)), tuple(want))
    torch.testing.assert_close(add_norm(None, x, branch, *options)[0], want[0])
    assert torch.equal(want[0], x + branch) == (not (gamma or path or drop))
    for part in (scale, drop_path):
        if part is not None:
            part.register_forward_hook(lambda module, args, out: None)
    torch.testing.assert_close(tuple(add_norm(norm, x, branch, *options)), tuple(want))


# ---- a forward that is no step ---------------------------------------------------------------------------------------


class Restless(torch.nn.Module):
    """Its forward changes buffers, parameters and modes."""

    def __init__(self):
        super().__init__()
        self.norm, self.online, self.drop = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), torch.nn.Dropout()
        self.moving = copy.deepcopy(self.online).requires_grad_(False)  # a momentum encoder
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.steps = self.steps + 1
        self.calls += 1
        self.drop.train()
        if self.training or self.online.training:  # also if only a part trains
            self.moving.weight.data = 0.9 * self.moving.weight.data + 0.1 * self.online.weight.data
            with torch.no_grad():
                self.moving.bias.lerp_(self.online.bias + 1, 0.1)
        return self.moving(self.drop(self.norm(self.online(x))))


def _warm_up(train):
    def warm_up(model, x):
        with patch.object(runtime, "INTERPRETED", False):
            warmup.warm_up(model, x, train=train, arch=90)

    return warm_up


FORWARDS = {
    "explain": (vit.explain, True),
    "explain, eval": (vit.explain, False),
    "explain, keyword": (lambda model, x: vit.explain(model, x=x), True),
    "warm_up": (_warm_up(False), True),
    "warm_up, train": (_warm_up(True), True),
    "warm_up, train, eval": (_warm_up(True), False),
    "graph": (captured, False),
}


class Failing(Restless):
    def forward(self, x):
        super().forward(x)
        raise KeyError("this forward fails at its end")


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize(("call", "training"), FORWARDS.values(), ids=FORWARDS)
def test_nothing_changes(call, training, fails):
    torch.manual_seed(0)
    model = (Failing if fails else Restless)().train(training)
    model.norm.eval()
    if call is not captured:
        model.online.train(not training)  # the modes of the parts differ
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    version, modes, state = model.online.weight._version, [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(KeyError, match="fails at its end") if fails else contextlib.nullcontext():
        call(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    assert runtime._recorder is None and runtime.current_dry_run is None and torch.is_grad_enabled()
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[name] is t for name, t in tensors.items())
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    assert all((p.grad == 1).all() for p in model.parameters()) and model.online.weight._version == version
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize(("train", "mode"), [(False, False), (False, True), (True, False)])
def test_unchanged_restores_objects_values_and_modes(train, mode, fails):
    """Values of parameters are restored only if a part trains. Unchanged tensors are not written."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout()))
    model.register_buffer("table", torch.arange(4.0))
    model.register_buffer("nothing", None)
    model.append(torch.nn.LazyLinear(2)).append(torch.nn.Linear(2, 2, device="meta"))  # without values
    model.eval()
    model[1][1].train(mode)  # only a part
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {k: t.detach().clone() for k, t in tensors.items() if k[0] not in "23"}
    versions = {k: tensors[k]._version for k in values}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    touched = {"0.running_var", "1.0.bias", "table"}
    with pytest.raises(KeyError) if fails else contextlib.nullcontext(), unchanged(model, (), train=train):
        model.train()
        model[1].eval()
        model[0].running_mean = torch.full((3,), 9.0)
        model[0].running_var.mul_(2.0)
        model[1][0].weight = torch.nn.Parameter(torch.zeros(3, 3))
        if train or mode:
            model[1][0].bias.data.add_(1.0)
        model.table.zero_()
        model.nothing = torch.ones(1)
        model[0].num_batches_tracked = None
        torch.rand(5)
        if fails:
            raise KeyError
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert now.keys() == tensors.keys() and all(now[k] is t for k, t in tensors.items()) and model.nothing is None
    assert all(torch.equal(now[k], value) for k, value in values.items())
    assert {k for k, version in versions.items() if now[k]._version != version} <= touched
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_launch_enters_the_device_of_its_tensors(monkeypatch):
    """Otherwise Triton launches on the current device, which cannot read the memory of another GPU."""
    inside, launched = [], []

    @contextlib.contextmanager
    def guard(device):
        inside.append(device)
        yield
        inside.pop()

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda **args: launched.append((grid, list(inside)))

    monkeypatch.setattr(torch.cuda, "device", guard)
    with FakeTensorMode():
        x = torch.empty(4, 16, device="cuda:1")
        for args in ({"bias_ptr": None, "x_ptr": x}, {"M": 3, "x_desc": TensorDescriptor.from_tensor(x, [4, 16])}):
            runtime.launch(Kernel(), 2, num_warps=4, num_stages=1, **args)
    assert launched == [((2,), [torch.device("cuda:1")])] * 2
    runtime.launch(Kernel(), 2, num_warps=4, num_stages=1, x_ptr=torch.empty(4))
    assert launched[2] == ((2,), [])


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_gradients_accumulate(impl, device):
    """Two backwards into the same .grad give the gradient of both batches together."""
    model, image = make(impl, device if impl == "triton" else "cpu", depth=1)
    image, other, cotangent = image[:1], image[1:2], torch.randn(1, 5).to(image)
    whole = torch.autograd.grad(model(torch.cat([image, other])), list(model.parameters()), cotangent.repeat(2, 1))
    for x in (image, other):
        model(x).backward(cotangent)
    names = [name for name, _ in model.named_parameters()]
    assert_same({n: p.grad for n, p in model.named_parameters()}, dict(zip(names, whole, strict=True)), 1e-4)
    before = [p.grad.clone() for p in model.parameters()]
    model(other).backward(torch.zeros_like(cotangent))
    assert all(torch.equal(p.grad, q) for p, q in zip(model.parameters(), before, strict=True))


def freeze_backbone(model):
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def freeze_first_block(model):
    for part in (model.patch_embed, model.blocks[0]):
        part.requires_grad_(False)
    for token in (model.cls_token, model.pos_embed):
        token.requires_grad_(False)


FROZEN = {
    freeze_backbone: {"linear_bwd": 1},
    # The last add of the first block includes norm1 of the second block, so its backward still runs.
    # The last block computes the class token alone, with q apart from k and v.
    freeze_first_block: {"linear_bwd": 4, "attention_bwd": 1, "mlp_bwd": 1, "layer_norm_bwd": 3},
}


@pytest.mark.parametrize("freeze", FROZEN)
def test_frozen_parameters_cost_no_backward(freeze, device):
    model, image = make("triton", device)
    image, cotangent = image[:1], torch.randn(1, 5).to(image)
    everything = dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(model(image), list(model.parameters()), cotangent),
            strict=True,
        )
    )
    freeze(model)
    with Calls() as calls:
        model(image).backward(cotangent)
    assert {op: n for op, n in calls.count.items() if op.endswith("_bwd")} == FROZEN[freeze]
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, everything[name]) if param.requires_grad else param.grad is None, name


def test_inference_mode():
    model, image = make()
    model.eval()
    with torch.inference_mode():
        out = model(image)
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        assert torch.equal(model(image), out)
    assert out.is_inference() and not out.requires_grad and not saved
    model(image).sum().backward()
    assert model.cls_token.grad.any()


def test_second_derivatives_through_kernels_raise(device):
    model, image = make("triton", device, depth=1)
    (grad,) = torch.autograd.grad(model(image.requires_grad_()).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        grad.square().sum().backward()


# ---- memory made later -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_init", ["", "jax"])
def test_made_on_meta_then_initialised(weight_init):
    config = dataclasses.replace(SMALL, weight_init=weight_init, reg_tokens=2)
    model = vit.VisionTransformer(config, device="meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    init_weights(model, seed=5)
    want = vit.VisionTransformer(config, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), want.parameters(), strict=True))
    image = torch.randn(2, 3, 8, 16)
    assert torch.equal(model(image), want(image))
    empty = vit.VisionTransformer(config, device="meta")
    empty.load_state_dict(want.state_dict(), assign=True)
    assert torch.equal(empty(image), want(image))
