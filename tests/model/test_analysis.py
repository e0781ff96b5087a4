"""`vit.attention_statistics` and `vit.rollout` on our models, compared with whole attention matrices in fp64."""

import copy
import dataclasses
import math
import threading

import dense
import pytest
import torch
from distributed import shard
from peers import randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import vit
from vit import analysis, kernels
from vit.kernels import runtime

SMALL = vit.ViTConfig(img_size=(16, 24), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
CONFIGS = {
    "class token": {},
    "no prefix": {"class_token": False, "global_pool": "avg", "patch_size": (4, 8)},
    "five prefix tokens": {"reg_tokens": 4, "img_size": (24, 8), "init_values": 0.5},
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "dynamic": {"dynamic_img_size": True, "global_pool": "avg"},
    "patch of one pixel": {"patch_size": 1, "img_size": (3, 5)},
    "registers only": {"class_token": False, "reg_tokens": 2, "global_pool": ""},
    "attention pooling": {"global_pool": "map"},
}
DROPS = {"attn_drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}


def make(dtype=torch.float32, **options):
    model = vit.VisionTransformer(dataclasses.replace(SMALL, **options), seed=0)
    randomise(model)
    return model.to(dtype).eval()


def images(model, batch=2, size=None, seed=1):
    size = size or ((24, 40) if model.config.dynamic_img_size else model.config.img_size)
    like = next(model.parameters())
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def oracle(model, image):
    """The matrices, and the arguments of `dense.statistics`."""
    p, logits = dense.maps_of(model, image)
    prefix, patch = model.config.num_prefix_tokens, model.config.patch_size
    return p, logits, (prefix, tuple(n // side for n, side in zip(image.shape[2:], patch, strict=True)), patch)


def listeners(model):
    """What could stay behind."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [*hooks, *filter(None, [runtime.attention_listener()])]


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_statistics(name, dtype, limit):
    model = make(dtype, **CONFIGS[name])
    image = images(model)
    p, logits, shape = oracle(model, image)
    each = dense.statistics(p, *shape)
    mean = dense.means(each, shape[0])
    for convention, key in (("published", "distance"), ("renormalised", "renormalised")):
        with vit.attention_statistics(model, convention=convention, received=True) as stats:
            model(image)
        assert dense.error(stats.distance, mean[key]) <= limit, convention
    for key in ("entropy", "prefix_mass"):
        assert dense.error(getattr(stats, key), mean[key]) <= limit, key
    assert dense.error(stats.received, each["received"]) <= limit
    assert dense.error(stats.max_logit, logits.amax((-1, -2))) <= limit
    assert tuple(stats.tokens) == shape
    with vit.attention_statistics(model, per_query=True) as stats:
        model(image)
    for key in ("distance", "entropy", "prefix_mass"):
        assert dense.error(getattr(stats, key), each[key]) <= limit, key
    assert dense.error(stats.max_logit, logits.amax(-1)) <= limit


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_rollout(name, dtype, limit):
    model = make(dtype, **CONFIGS[name])
    image = images(model)
    p, _, (prefix, (_, columns), _) = oracle(model, image)
    want = dense.rollout(p)
    assert dense.error(vit.rollout(model, image, query=None), want) <= limit
    for query, index in [(-1, -1), (0, 0), ((1, 0), prefix + columns), ([1, 0], prefix + columns)]:
        assert dense.error(vit.rollout(model, image, query=query), want[:, index]) <= limit, query
    if model.config.class_token:
        assert dense.error(vit.rollout(model, image), want[:, 0]) <= limit
    for fusion in ("max", "min"):
        got = vit.rollout(model, image=image, query=None, head_fusion=fusion)
        assert dense.error(got, dense.rollout(p, fusion)) <= limit, fusion


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_kernels(device, pool):
    """The kernels hand over what they save."""
    model = make(impl="triton", depth=2, global_pool=pool, reg_tokens=1)
    image = images(model, batch=1)
    p, logits, shape = oracle(model, image)
    model, image = model.to(device), image.to(device)
    with torch.no_grad():
        want = model(image)
        with vit.attention_statistics(model, received=True) as stats:
            assert torch.equal(model(image), want)
        rolled = vit.rollout(model, image, query=None)
    each = dense.statistics(p, *shape)
    assert dense.error(stats.distance.cpu(), dense.means(each, shape[0])["distance"]) <= 1e-5
    assert dense.error(stats.received.cpu(), each["received"]) <= 1e-5
    assert dense.error(stats.max_logit.cpu(), logits.amax((-1, -2))) <= 1e-5
    assert dense.error(stats.rows(1, ["cls"]).cpu(), p[1][:, :, :1]) <= 1e-5
    assert dense.error(rolled.cpu(), dense.rollout(p)) <= 2e-6


def test_rollout_of_many_images():
    """More images than it takes at a time, and a number that does not divide by it."""
    model = make(torch.float64)
    image = images(model, batch=19)
    assert dense.error(vit.rollout(model, image), dense.rollout(oracle(model, image)[0])[:, 0]) <= 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_rows(name):
    model = make(torch.float64, **CONFIGS[name])
    image = images(model)
    p, _, (prefix, (_, columns), _) = oracle(model, image)
    with vit.attention_statistics(model) as stats:
        model(image)
        inside = stats.rows(1, [0, 3])
    assert dense.error(inside, p[1][:, :, [0, 3]]) <= 1e-12
    assert dense.error(stats.rows(-1, [(1, 0), -2, 1]), p[-1][:, :, [prefix + columns, -2, 1]]) <= 1e-12
    assert dense.error(stats.rows(0, torch.tensor([2, 0])), p[0][:, :, [2, 0]]) <= 1e-12
    assert dense.error(stats.rows(2, range(4)), p[2][:, :, :4]) <= 1e-12
    if model.config.class_token:
        assert torch.equal(stats.rows(0, ["cls"]), stats.rows(0, [0]))


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (7, 7)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_uniform_distance(grid, prefix):
    """It is what the statistics of equal logits are."""
    tokens = prefix + math.prod(grid)
    q = torch.zeros(1, tokens, 1, 16, dtype=torch.float64)
    options = {"grid_size": grid, "num_prefix_tokens": prefix, "patch_size": (4, 8)}
    want = kernels.attention_statistics(q, q, **options).distance[..., prefix:].mean().item()
    assert analysis.uniform_distance(grid, (4, 8), prefix) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("convention", analysis.CONVENTIONS)
def test_uniform_distance_of_a_model(convention):
    """A model whose queries are zero looks everywhere equally."""
    model = make(torch.float64)
    for block in model.blocks:
        block.attn.qkv.weight.data[:32] = 0
        block.attn.qkv.bias.data[:32] = 0
    with vit.attention_statistics(model, convention=convention) as stats:
        model(images(model))
    assert torch.allclose(stats.distance, torch.tensor(stats.uniform_distance, dtype=torch.float64), rtol=1e-12)


def test_masked_image_model():
    model = vit.MaskedImageModel(SMALL, seed=0).double().eval()
    randomise(model)
    image, encoder = images(model.encoder), model.encoder
    with vit.attention_statistics(model) as stats:
        model(image, torch.zeros(2, 6, dtype=torch.bool))
    p, _, shape = oracle(encoder, image)
    assert dense.error(stats.distance, dense.means(dense.statistics(p, *shape), 1)["distance"]) <= 1e-12
    assert dense.error(vit.rollout(model, image), dense.rollout(p)[:, 0]) <= 1e-12


# ---- the model does not notice ---------------------------------------------------------------------------------------


def training_step(model, image, autocast):
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(image)
        logits = logits + model(image)  # the second forward may read what autocast cached in the first
    grads = torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))
    return [logits.detach(), *grads, torch.get_rng_state()]


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("options", [DROPS, {}, {"qk_norm": True, "reg_tokens": 1}], ids=str)
def test_a_training_step_keeps_its_bits(options, autocast, recompute):
    model = make(**options).train()
    model.set_grad_checkpointing(recompute)
    image = images(model)
    want = training_step(model, image, autocast)
    with vit.attention_statistics(model, received=True) as stats:
        found = training_step(model, image, autocast)
    assert all(map(torch.equal, found, want))
    assert stats.distance.shape == (3, 2, 2) and not stats.distance.requires_grad


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_autocast(pool):
    """Under autocast the statistics are those of the rounded queries and keys, themselves in fp32."""
    model = make(global_pool=pool)
    image = images(model)
    p, _, shape = oracle(model, image)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(image)
        with vit.attention_statistics(model) as stats:
            assert torch.equal(model(image), logits)
        rolled = vit.rollout(model, image, query=None)
    mean = dense.means(dense.statistics(p, *shape), shape[0])
    assert dense.error(stats.distance, mean["distance"]) <= 0.02
    with torch.no_grad():  # with gradients, attention in 16 bits rounds differently
        seen = torch.stack([stats.rows(layer, range(shape[0] + 6)) for layer in range(3)])  # under autocast again
    assert dense.error(seen, p) <= 0.02
    exact = dense.statistics(seen.double(), *shape)
    assert dense.error(stats.distance, dense.means(exact, shape[0])["distance"]) <= 1e-6
    assert stats.distance.dtype is rolled.dtype is torch.float32
    assert dense.error(rolled, dense.rollout(seen.double())) <= 1e-6


def test_inference_mode():
    model = make()
    want = seen(model).rows(2, [0])
    with torch.inference_mode():
        stats = seen(model, images(model))
        rolled = vit.rollout(model, images(model))
    assert torch.equal(stats.rows(2, [0]), want) and torch.equal(rolled, vit.rollout(model, images(model)))


def test_rollout_draws_no_random_numbers():
    model = make(**DROPS).train()
    state = torch.get_rng_state()
    rolled = vit.rollout(model, images(model))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(rolled, vit.rollout(model, images(model)))


def test_rows_in_training_are_those_of_the_forward():
    model = make(**DROPS).train()
    image = images(model)
    with vit.attention_statistics(model, received=True) as stats:
        model(image)
    state, mean = torch.get_rng_state(), stats.received
    for layer in range(3):
        assert torch.allclose(stats.rows(layer, range(7)).mean(2), mean[layer], atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(stats.received, mean)


# ---- whose forward it is ---------------------------------------------------------------------------------------------


def distance(model, image):
    with vit.attention_statistics(model) as stats:
        model(image)
    return stats.distance


def test_the_last_forward_counts():
    model = make(dynamic_img_size=True)
    first, second = images(model), images(model, batch=1, size=(16, 16))
    with vit.attention_statistics(model) as stats:
        for image in (first, second):
            model(image)
            assert torch.equal(stats.distance, distance(model, image))
            assert stats.tokens.grid_size == (image.shape[2] // 8, image.shape[3] // 8)
    model(first)
    assert torch.equal(stats.distance, distance(model, second))
    assert stats.rows(0, [0]).shape == (1, 2, 1, 5)


@pytest.mark.parametrize("same", [False, True], ids=["two models", "the same model"])
def test_nested_blocks(same):
    a = make()
    b = a if same else make(depth=2)
    image = images(a)
    with vit.attention_statistics(a) as outer, vit.attention_statistics(b) as inner:
        a(image)
        b(image)
        b(image)
    assert torch.equal(outer.distance, distance(a, image))
    assert torch.equal(inner.distance, distance(b, image))
    assert not listeners(a)


class Around(nn.Module):
    """A larger model, in which a ViT is called by keyword."""

    def __init__(self, vit, other=None):
        super().__init__()
        self.vit = vit
        self.others = [other]  # not registered: another model

    def forward(self, batch):
        y = self.vit(image=batch["image"])
        return y if self.others[0] is None else self.others[0](batch["image"])


def test_a_model_inside_another():
    model = make()
    whole, image = Around(model, other=make(depth=1, num_heads=4)), images(model)
    with vit.attention_statistics(whole.vit) as inside:
        whole({"image": image})
    assert torch.equal(inside.distance, distance(model, image))
    whole = Around(model)
    with vit.attention_statistics(whole) as outside, vit.attention_statistics(model) as inside:
        whole({"image": image})
    assert torch.equal(outside.distance, inside.distance) and torch.equal(inside.distance, distance(model, image))
    assert torch.equal(vit.rollout(whole, {"image": image}), vit.rollout(model, image))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_distributed(one_process, wrap, train):
    model = make()
    image, want = images(model), distance(model, images(model))
    rows, rolled = seen(model, image).rows(1, ["cls"]), vit.rollout(model, image)
    if wrap == "DDP":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        shard(model, init_device_mesh("cpu", (1,)))
    model.train(train)
    for _ in range(2):
        with vit.attention_statistics(model) as stats:
            logits = model(image)
        assert torch.equal(stats.rows(1, ["cls"]), rows)
        assert torch.equal(vit.rollout(model, image), rolled)
        logits.sum().backward()
        assert torch.equal(stats.distance, want)


def test_rows_do_not_count():
    """Neither for the block around them, nor for others of the same model."""
    model = make()
    image, other = images(model), images(model, batch=1, seed=2)
    with vit.attention_statistics(model) as outer:
        with vit.attention_statistics(model) as stats:
            model(image)
        model(other)
        assert stats.rows(0, [0]).shape[0] == 2
        assert torch.equal(outer.distance, distance(model, other))


def test_threads():
    a, b = make(), make(depth=2, reg_tokens=1)
    both, found = threading.Barrier(2), {}

    def run(name, model, image):
        with vit.attention_statistics(model) as stats:
            for _ in range(5):
                both.wait(10)
                model(image)
        found[name] = torch.equal(stats.distance, distance(model, image)) and not listeners(model)

    threads = [threading.Thread(target=run, args=(i, m, images(m))) for i, m in enumerate((a, b))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {0: True, 1: True}


def test_a_forward_of_another_thread_or_copy_does_not_count():
    model = make()
    with vit.attention_statistics(model) as stats:
        model(images(model))
        want = stats.distance
        thread = threading.Thread(target=model, args=(images(model, batch=1),))
        thread.start()
        thread.join()
        copy.deepcopy(model)(images(model, batch=1))
        assert torch.equal(stats.distance, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_does_not_count(reentrant):
    model = make().train()
    image = images(model).requires_grad_()
    with vit.attention_statistics(model) as stats:
        y = checkpoint(model, image, use_reentrant=reentrant)
        want = stats.distance
        y.sum().backward()
        assert torch.equal(stats.distance, want)


# ---- what stays behind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "block", "hook", "pre_hook"])
def test_nothing_stays_behind(where, error):
    model = make()
    image = images(model)

    def fail(*_):
        raise error

    with vit.attention_statistics(model) as before:
        model(image)
    places = {"model": model.blocks[1].mlp.register_forward_hook, "hook": model.register_forward_hook}
    places |= {"pre_hook": model.register_forward_pre_hook}
    hook = places[where](fail) if where in places else None
    with pytest.raises(error), vit.attention_statistics(model) as outer, vit.attention_statistics(model) as stats:
        if where == "block":
            model(image)
            fail()
        model(image)
    if hook is not None:
        hook.remove()
    assert not listeners(model)
    if where == "block" or (where == "hook" and error is ZeroDivisionError):  # the forward itself ended
        assert torch.equal(stats.distance, before.distance) and torch.equal(outer.distance, before.distance)
    else:
        with pytest.raises(RuntimeError, match="no attention op"):
            _ = stats.distance
    assert torch.equal(before.rows(0, [0]), before.rows(0, [0]))


def test_a_failed_forward_does_not_replace_the_one_before():
    model = make()
    with vit.attention_statistics(model) as stats:
        model(images(model))
        want = stats.distance
        with pytest.raises(ValueError, match="image has 1 channels"):
            model(torch.zeros(2, 1, 16, 24))
        hook = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images(model))
        hook.remove()
        assert torch.equal(stats.distance, want)
        model(images(model, batch=1))
        assert stats.distance.shape == (3, 1, 2)


class Layers(nn.Module):
    """The attention ops of a model, without the rest."""

    def __init__(self, q, k, depth):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 16, 16, device="meta")
        self.cls_token = nn.Parameter(torch.empty(1, 1, 8, device="meta"))
        self.ops = [(q, k, q.shape[-1] ** -0.5, None)] * depth

    def forward(self, image):
        for op in self.ops:
            runtime.attention_listener()(*op)
        return image


@pytest.mark.parametrize("received", [True, None], ids=["statistics", "rollout"])
def test_memory(received):
    """At the sizes of ViT-L/16 at 384 pixels, batch 32; without data."""
    from benchmarks.memory import MIB, Live

    B, N, HEADS, E = 32, 577, 16, 64
    q, k = (torch.empty(B, N, HEADS, E, device="meta") for _ in range(2))
    model, image, live = Layers(q, k, depth=1), torch.empty(B, 3, 384, 384, device="meta"), Live()
    live.ignore(q, k, image)
    if received is None:
        with live:
            vit.rollout(model, image)
        assert live.peak <= 3 * B * N * N * 4
    else:
        with live, vit.attention_statistics(model, per_query=True, received=True) as stats:
            model(image)
        assert live.peak <= 64 * MIB
        assert live.live <= 5 * B * HEADS * N * 4  # five numbers of each query
        assert stats.distance.shape == (1, B, HEADS, N)


# ---- errors ----------------------------------------------------------------------------------------------------------


def seen(model, image=None):
    with vit.attention_statistics(model) as stats:
        model(images(model) if image is None else image)
    return stats


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, s: s.rows(3, [0]), IndexError, "layer 3 is not one of the 3 layers"),
        (lambda m, s: s.rows(-4, [0]), IndexError, "layer -4 is not one"),
        (lambda m, s: s.rows(1.0, [0]), TypeError, "layer must be an integer, got 1.0"),
        (lambda m, s: s.rows(True, [0]), TypeError, "layer must be an integer, got True"),
        (lambda m, s: s.rows(0, [7]), IndexError, "query 7 is not one of the 7 tokens"),
        (lambda m, s: s.rows(0, [-8]), IndexError, "query -8 is not one"),
        (lambda m, s: s.rows(0, 0), TypeError, "queries must be a list of queries, got 0"),
        (lambda m, s: s.rows(0, "cls"), TypeError, "queries must be a list"),
        (lambda m, s: s.rows(0, None), TypeError, "queries must be a list"),
        (lambda m, s: s.rows(0, torch.ones(2)), TypeError, "query must be .*, got 1.0"),
        (lambda m, s: s.rows(0, torch.ones(2).bool()), TypeError, "query must be .*, got True"),
        (lambda m, s: s.received, RuntimeError, r"received was not asked for; use .*received=True"),
        (lambda m, s: vit.rollout(m, images(m), query=7), IndexError, "query 7 is not one of the 7 tokens"),
        (lambda m, s: vit.rollout(m, images(m), query=(2, 0)), IndexError, r"\(2, 0\) is not in the grid of 2 x 3"),
        (lambda m, s: vit.rollout(m, images(m), query=(0, -1)), IndexError, r"\(0, -1\) is not in the grid"),
        (lambda m, s: vit.rollout(m, images(m), query=True), TypeError, 'query must be "cls", .*, got True'),
        (lambda m, s: vit.rollout(m, images(m), query=0.0), TypeError, "query must be"),
        (lambda m, s: vit.rollout(m, images(m), query=(0, 1, 2)), TypeError, "query must be"),
        (lambda m, s: vit.rollout(m, images(m), query=(0, 1.5)), TypeError, "query must be"),
        (lambda m, s: vit.rollout(m, images(m), query="class"), ValueError, "query must be"),
        (lambda m, s: vit.rollout(m, images(m), head_fusion="sum"), ValueError, "head_fusion must be one of 'mean'"),
        (lambda m, s: vit.rollout(m.forward, images(m)), TypeError, "model must be a torch.nn.Module, got method"),
        (lambda m, s: vit.rollout(m.norm, torch.ones(1, 32)), RuntimeError, "no attention op"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    model = make()
    stats = seen(model)
    with pytest.raises(error, match=message) as caught:
        call(model, stats)
    assert "\n" not in str(caught.value) and not listeners(model)
    assert stats.rows(0, [0]).shape == (2, 2, 1, 7)


def test_no_class_token():
    model = make(class_token=False, reg_tokens=2, global_pool="avg")
    for call in (lambda: vit.rollout(model, images(model)), lambda: seen(model).rows(0, ["cls"])):
        with pytest.raises(ValueError, match="the model has no class token"):
            call()


def test_wrong_convention():
    with (
        pytest.raises(ValueError, match="convention must be one of 'published', 'renormalised', got 'x'"),
        vit.attention_statistics(make(), convention="x"),
    ):
        pass
    with pytest.raises(TypeError, match="got str"), vit.attention_statistics("vit_base_patch16_224"):
        pass


def read(stats):
    return [getattr(stats, name) for name in ("distance", "entropy", "max_logit", "prefix_mass", "tokens")]


@pytest.mark.parametrize("call", ["nothing", "forward_features", "blocks", "compiled"])
def test_nothing_was_seen(call):
    model = make(depth=1)
    image = images(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    calls = {"nothing": lambda x: None, "blocks": lambda x: model.blocks(torch.zeros(1, 7, 32)), "compiled": compiled}
    with vit.attention_statistics(model, received=True) as stats:
        calls.get(call, model.forward_features)(image)
    for name in ("distance", "entropy", "max_logit", "prefix_mass", "received", "tokens", "uniform_distance"):
        with pytest.raises(RuntimeError, match=r"no attention op .* inside the with .* vit.accelerate\(model\)"):
            getattr(stats, name)
    with pytest.raises(RuntimeError, match="no attention op"):
        stats.rows(0, [0])
    torch._dynamo.reset()


def test_a_block_that_is_not_seen():
    model = make()
    model.blocks[1] = nn.Sequential(torch.compile(model.blocks[1], backend="eager"))
    stats = seen(model)
    with pytest.raises(RuntimeError, match="in only 2 of the 3 blocks of VisionTransformer"):
        _ = stats.distance
    with pytest.raises(RuntimeError, match="in only 2 of the 3 blocks"):
        vit.rollout(model, images(model))
    torch._dynamo.reset()


def test_patch_drop():
    model = make(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"the 4 tokens .* are not 1 prefix tokens and 2 x 3 patches.*patch_drop_rate"):
        seen(model)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        vit.rollout(model, images(model))
    assert not listeners(model)
    assert seen(model.eval()).distance.shape == (3, 2, 2)


def test_a_convolution_before_the_vit():
    model = make(in_chans=4)
    whole = nn.Sequential(nn.Conv2d(3, 4, 1), model)
    with vit.attention_statistics(whole) as stats, vit.attention_statistics(model) as inside:
        whole(images(model))
    assert torch.equal(stats.distance, inside.distance) and stats.tokens == inside.tokens


class Two(nn.Module):
    def __init__(self, *vits):
        super().__init__()
        self.vits = nn.ModuleList(vits)

    def forward(self, image):
        return sum(vit(image) for vit in self.vits)


def test_two_vits():
    a, b = make(), make(reg_tokens=1)
    with pytest.raises(ValueError, match=r"a layer of Two has \[B, N, H\] = \[2, 8, 2\], the first one \[2, 7, 2\]"):
        seen(Two(a, b), images(a))
    assert torch.equal(seen(Two(a, a), images(a)).distance[3:], distance(a, images(a)))
    with vit.attention_statistics(a) as of_a, vit.attention_statistics(b) as of_b:
        Two(a, b)(images(a))
    assert torch.equal(of_a.distance, distance(a, images(a))) and torch.equal(of_b.distance, distance(b, images(b)))


def test_a_changed_model():
    model = make()
    image = images(model)
    changes = {
        "weights": lambda: model.norm.weight.detach().mul_(1.0),
        "a part": lambda: setattr(model, "head", nn.Linear(32, 5)),
        "mode": model.train,
        "input": lambda: image.zero_(),
    }
    for name, change in changes.items():
        stats = seen(model.eval(), image)
        stats.rows(0, [0])
        change()
        with pytest.raises(RuntimeError, match="has changed since the forward"):
            stats.rows(0, [0])
        assert stats.distance.shape == (3, 2, 2), name


def test_no_images():
    model = make()
    with vit.attention_statistics(model, received=True) as stats:
        model(images(model, batch=0))
    assert stats.distance.shape == stats.max_logit.shape == (3, 0, 2) and stats.received.shape == (3, 0, 2, 7)
    assert stats.rows(0, [0, 1]).shape == (0, 2, 2, 7)
    assert vit.rollout(model, images(model, batch=0)).shape == (0, 7)


def test_no_image_among_the_arguments():
    model = nn.Sequential(*make().blocks)
    with pytest.raises(ValueError, match="Sequential has no patch projection"):
        seen(model, torch.zeros(1, 7, 32))
