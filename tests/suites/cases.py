"""What libraries and their users do with a model. Each case returns what an accelerated model must give as well.

A case gets a `Subject` and returns tensors and plain values, in lists, tuples and dicts. ``only`` names the libraries
that a case is for, by the first word of a model's name; a ``heavy`` case runs on one model of each library.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable

import torch
from peers import randomise
from subject import Subject, blocks, logits, parts
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune


@dataclasses.dataclass(frozen=True)
class Case:
    run: Callable[[Subject], object]
    only: str
    limit: float
    heavy: bool


CASES: dict[str, Case] = {}


def case(only: str = "timm torchvision hf", limit: float = 1e-9, heavy: bool = False):
    """Enters a function into `CASES`; ``limit`` is relative to the largest element (or 1) of each tensor."""

    def enter(run):
        CASES[run.__name__] = Case(run, only, limit, heavy)
        return run

    return enter


# ---- calls -----------------------------------------------------------------------------------------------------------


@case()
def forward(s: Subject):
    return s.model()(s.image())


@case()
def backward(s: Subject):
    return s.gradients(s.model())


@case()
def batch_of_one(s: Subject):
    return s.gradients(s.model(), s.image(batch=1))


@case()
def batch_of_none(s: Subject):
    return logits(s.model()(s.image(batch=0)))


@case()
def batch_by_batch(s: Subject):
    model = s.model()
    return [logits(model(s.image(batch=n))) for n in (1, 3, 2)]


@case()
def image_channels_last(s: Subject):
    return s.gradients(s.model(), s.image().contiguous(memory_format=torch.channels_last))


@case()
def model_channels_last(s: Subject):
    model = s.model().to(memory_format=torch.channels_last)
    return s.gradients(model, s.image().contiguous(memory_format=torch.channels_last))


@case()
def no_grad_and_inference_mode(s: Subject):
    model, found = s.model(), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(logits(model(s.image())).clone())
    return found


@case(limit=1e-4)
def single_precision(s: Subject):
    return s.gradients(s.model().float(), s.image().float())


@case(limit=0.1)  # that the path runs; how near it is, the policy in test_accelerate.py says
def bfloat16(s: Subject):
    return logits(s.model().bfloat16()(s.image().bfloat16()))


@case(limit=0.1)
def autocast(s: Subject):
    model = s.model().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = logits(model(s.image().float()))
    out.sum().backward()
    return out, [p.grad.dtype for p in model.parameters() if p.grad is not None]


@case()
def double_after_single(s: Subject):
    """A model that has run in one dtype runs in the next, without what it kept from the first."""
    model = s.model().float()
    model(s.image().float())
    return logits(model.double()(s.image()))


@case()
def wrong_input(s: Subject):
    model, found = s.model(), []
    for image in (s.image()[:, :1], s.image()[:, :, :9], s.image().float()):
        try:
            found.append(logits(model(image)).shape)
        except Exception as error:
            found.append(isinstance(error, (ValueError, RuntimeError, TypeError, AssertionError)))
    return found


@case()
def keyword_call(s: Subject):
    model = s.model()
    name = next(iter(inspect.signature(model.forward).parameters))
    return logits(model(**{name: s.image()}))


# ---- what a model looks like -----------------------------------------------------------------------------------------


@case()
def signatures(s: Subject):
    return {name: str(inspect.signature(m.forward)) for name, m in s.model().named_modules()}


@case()
def module_walk(s: Subject):
    model, applied = s.model(), []
    model.apply(lambda module: applied.append(type(module).__name__))
    walk = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    params = [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()]
    buffers = [(name, b.shape) for name, b in model.named_buffers()]
    same = all(model.get_submodule(name) is module for name, module in model.named_modules())
    return walk, params, buffers, applied, same, repr(model), [name for name, _ in model.named_children()]


@case()
def every_attribute(s: Subject):
    """Names of what a module holds, but for the ``forward`` that may be there."""
    return {name: sorted(set(vars(m)) - {"forward"}) for name, m in s.model().named_modules()}


@case()
def freed_without_the_cyclic_collector(s: Subject):
    model = s.model()
    model(s.image())
    gc.collect()
    gc.disable()
    try:
        refs = [weakref.ref(p) for p in model.parameters()]
        del model
        return sum(ref() is not None for ref in refs)
    finally:
        gc.enable()


# ---- copies and files ------------------------------------------------------------------------------------------------


@case()
def state_dict(s: Subject):
    model = s.model()
    missing = model.load_state_dict(s.untouched(seed=3).state_dict())
    return dict(model.state_dict()), str(missing), logits(model(s.image()))


@case()
def load_by_assignment(s: Subject):
    model = s.model()
    model.load_state_dict(s.untouched(seed=3).state_dict(), assign=True)
    return s.gradients(model)


@case()
def torch_save(s: Subject):
    file = io.BytesIO()
    torch.save(s.model(), file)
    file.seek(0)
    return s.gradients(torch.load(file, weights_only=False))


@case()
def pickled(s: Subject):
    return s.gradients(pickle.loads(pickle.dumps(s.model())))


@case()
def deepcopy(s: Subject):
    model = s.model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    return s.gradients(twin), s.gradients(model)


@case()
def shallow_copy(s: Subject):
    model = s.model()
    return logits(copy.copy(model)(s.image()))


@case()
def shallow_copies_of_parts(s: Subject):
    """``copy.copy`` of a part that then gets parameters of its own: DataParallel, MAML and pruning do that."""
    model, found = s.model(), {}
    for cls in (nn.LayerNorm, nn.Conv2d, nn.Linear):
        for name, module in parts(model, cls):
            twin = copy.copy(module)
            twin._parameters = {key: p if p is None else nn.Parameter(p * 2) for key, p in twin._parameters.items()}
            width = module.normalized_shape[0] if cls is nn.LayerNorm else getattr(module, "in_features", 0)
            found[name] = twin(s.image() if cls is nn.Conv2d else _ramp(width))
    return found


def _ramp(width: int) -> torch.Tensor:
    return torch.ones(2, 3, width, dtype=torch.float64).cumsum(2).sin()


@case()
def shallow_copies_of_blocks(s: Subject):
    model, found = s.model(), []
    for block in blocks(model):
        twin = _with_other_parameters(block)
        out = twin(_ramp(32))
        found.append(out[0] if isinstance(out, tuple) else out)
    return found


def _with_other_parameters(module: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` does it: new objects, the same attributes, other parameters."""
    memo = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for original, replica in memo.items():
        for name, child in original._modules.items():
            replica._modules[name] = memo.get(child)
        for name, p in original._parameters.items():
            if p is not None:
                setattr(replica, name, p.detach() * 1.1)
        for name, b in original._buffers.items():
            replica._buffers[name] = b
    return memo[module]


@case()
def data_parallel_replica(s: Subject):
    model = s.model()
    return logits(_with_other_parameters(model)(s.image())), logits(model(s.image()))


@case()
def safetensors_file(s: Subject):
    from safetensors.torch import load, save

    model = s.model()
    model.load_state_dict(load(save({k: v.contiguous() for k, v in s.untouched(seed=3).state_dict().items()})))
    return logits(model(s.image())), sorted(load(save({k: v.contiguous() for k, v in model.state_dict().items()})))


@case()
def meta_then_to_empty(s: Subject):
    model = s.model(device="meta")
    shape = logits(model(s.image().to("meta"))).shape
    model.to_empty(device="cpu").load_state_dict(s.untouched().state_dict())
    return shape, s.gradients(model)


@case()
def averaged_model(s: Subject):
    model = s.model()
    average = torch.optim.swa_utils.AveragedModel(model)
    for seed in (1, 2):
        model.load_state_dict(s.untouched(seed=seed).state_dict())
        average.update_parameters(model)
    return logits(average(s.image())), logits(model(s.image()))


@case()
def changed_class(s: Subject):
    """Another class for a module that lives, as ToMe does it."""
    model = s.model()
    for block in blocks(model):

        class Doubled(type(block)):
            def forward(self, x, *args, **kwargs):
                out = super().forward(x, *args, **kwargs)
                return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

        block.__class__ = Doubled
    return s.gradients(model)


# ---- changes ---------------------------------------------------------------------------------------------------------


@case()
def parts_replaced(s: Subject):
    model = s.model()
    for name, module in parts(model, nn.LayerNorm):
        model.set_submodule(name, nn.RMSNorm(module.normalized_shape, dtype=s.dtype))
    for name, _ in parts(model, nn.GELU):
        model.set_submodule(name, nn.SiLU())
    return logits(model(s.image()))


class LowRank(nn.Module):
    """What LoRA puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((1, base.in_features), 0.1, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + (x @ self.down.T)


@case()
def linears_wrapped(s: Subject):
    model = s.model()
    for name, module in parts(model, nn.Linear):
        if not name.endswith("out_proj"):  # torch's MultiheadAttention reads its weight
            model.set_submodule(name, LowRank(module))
    return s.gradients(model)


@case()
def blocks_removed(s: Subject):
    model = s.model()
    del blocks(model)[1]
    return s.gradients(model)


@case()
def frozen(s: Subject):
    model = s.model().requires_grad_(False)
    parts(model, nn.Linear)[-1][1].requires_grad_(True)
    logits(model(s.image())).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@case()
def flattened_parameters(s: Subject):
    model = s.model()
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector.detach() * 1.1, model.parameters())
    return logits(model(s.image()))


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


@case()
def parametrized(s: Subject):
    model = s.model()
    for cls in (nn.Linear, nn.LayerNorm, nn.Conv2d):
        for _, module in parts(model, cls):
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Scaled())
    return s.gradients(model)


@case()
def parametrized_before(s: Subject):
    model = s.untouched()
    for _, module in parts(model, nn.Linear):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Scaled())
    return s.gradients(s.touch(model))


@case()
def parametrized_and_back(s: Subject):
    model = s.model()
    for _, module in parts(model, nn.Linear):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Scaled())
        torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    return s.gradients(model)


@case()
def weight_norm(s: Subject):
    model = s.model()
    for _, module in parts(model, nn.Linear):
        parametrizations.weight_norm(module)
    return s.gradients(model)


@case()
def old_weight_norm(s: Subject):
    model = s.model()
    for _, module in parts(model, nn.Linear):
        torch.nn.utils.weight_norm(module)
    return s.gradients(model)


@case()
def spectral_norm(s: Subject):
    model = s.model().train()
    for _, module in parts(model, nn.Linear):
        parametrizations.spectral_norm(module)
    return s.gradients(model)


@case()
def old_spectral_norm(s: Subject):
    model = s.model().train()
    for _, module in parts(model, nn.Linear):
        torch.nn.utils.spectral_norm(module)
    return s.gradients(model)


@case()
def pruned(s: Subject):
    model = s.model()
    for cls in (nn.Linear, nn.Conv2d):
        for _, module in parts(model, cls):
            prune.l1_unstructured(module, "weight", 0.3)
    return s.gradients(model)


@case()
def pruned_and_removed(s: Subject):
    model = s.model()
    for _, module in parts(model, nn.Linear):
        prune.ln_structured(module, "weight", 0.3, n=2, dim=0)
        prune.remove(module, "weight")
    return s.gradients(model)


@case(limit=0.05)
def quantized_linears(s: Subject):
    model = s.model().float()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return logits(model(s.image().float()))


# ---- hooks -----------------------------------------------------------------------------------------------------------


def _tensor(out) -> torch.Tensor | None:
    while isinstance(out, (tuple, list)) and out:
        out = out[0]
    return out.detach() if isinstance(out, torch.Tensor) else None


@case()
def forward_hooks_see_every_module(s: Subject):
    model, seen = s.model(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, _tensor(out))))
    return logits(model(s.image())), seen


@case()
def pre_hooks_see_every_module(s: Subject):
    model, seen = s.model(), []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: seen.append((name, _tensor(args), sorted(kwargs))), with_kwargs=True
        )
    return logits(model(s.image())), seen


@case()
def one_hook_at_a_time(s: Subject):
    """Each module hooked alone, the rest fused: what the hook sees and what it changes."""
    model, found = s.model(), {}
    for name, module in model.named_modules():
        seen = []

        def hook(m, args, out, seen=seen):
            seen.append(_tensor(out))
            return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else out * 1.5 if torch.is_tensor(out) else None

        handle = module.register_forward_hook(hook)
        found[name] = logits(model(s.image(batch=1))), seen
        handle.remove()
    return found


@case()
def backward_hooks_see_every_module(s: Subject):
    model, seen = s.model(), []
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda m, gin, gout, name=name: seen.append((name, _tensor(gout))))
    return s.gradients(model), seen


@case()
def backward_pre_hooks(s: Subject):
    model, seen = s.model(), []
    for name, module in model.named_modules():
        module.register_full_backward_pre_hook(lambda m, gout, name=name: seen.append((name, _tensor(gout))))
    return s.gradients(model), seen


@case()
def global_hooks(s: Subject):
    model, seen = s.model(), []
    handles = [
        nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append((type(m).__name__, _tensor(out)))),
        nn.modules.module.register_module_forward_pre_hook(lambda m, args: seen.append(type(m).__name__)),
        nn.modules.module.register_module_full_backward_hook(lambda m, gin, gout: seen.append(type(m).__name__)),
    ]
    try:
        return s.gradients(model), seen
    finally:
        for handle in handles:
            handle.remove()


@case()
def tensor_and_gradient_hooks(s: Subject):
    model, seen = s.model(), {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
        p.register_hook(lambda grad: grad * 2)
    logits(model(s.image())).square().sum().backward()
    return dict(sorted(seen.items()))


# ---- training --------------------------------------------------------------------------------------------------------


def _train(s: Subject, model: nn.Module, optimizer=torch.optim.AdamW, steps: int = 3) -> list[torch.Tensor]:
    model.train()
    made, losses = optimizer(model.parameters(), lr=1e-3), []
    for step in range(steps):
        loss = nn.functional.cross_entropy(logits(model(s.image(seed=step))), torch.tensor([1, 3]))
        made.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()
        losses.append(loss)
    return losses


@case(limit=1e-8)
def training(s: Subject):
    return _train(s, s.model())


@case(limit=1e-8)
def training_with_momentum(s: Subject):
    return _train(s, s.model(), lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9))


@case()
def accumulated_gradients(s: Subject):
    model = s.model()
    for seed in (1, 2):
        logits(model(s.image(seed=seed))).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@case()
def checkpointed_as_a_whole(s: Subject):
    model, found = s.model(), []
    for reentrant in (False, True):
        image = s.image().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(lambda x: logits(model(x)), image, use_reentrant=reentrant)
        out.square().sum().backward()
        found.append(image.grad)
    return found, {name: p.grad for name, p in model.named_parameters()}


@case(only="timm")
def checkpointed_blocks(s: Subject):
    model = s.model().train()
    model.set_grad_checkpointing()
    return s.gradients(model)


@case(only="hf")
def gradient_checkpointing(s: Subject):
    found = []
    for reentrant in (False, True):
        model = s.model().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(s.gradients(model) if not reentrant else logits(model(s.image())))
        model.gradient_checkpointing_disable()
        found.append(logits(model(s.image())))
    return found


@case(only="hf")
def input_gradients_for_adapters(s: Subject):
    model = s.model().train().requires_grad_(False)
    model.enable_input_require_grads()
    return logits(model(s.image())).requires_grad


# ---- function transforms ---------------------------------------------------------------------------------------------


def _functional(model: nn.Module):
    params = {name: p.detach() for name, p in model.named_parameters()}
    return params, lambda params, x: logits(torch.func.functional_call(model, params, (x,)))


@case()
def functional_call(s: Subject):
    params, call = _functional(s.model())
    return call({name: 1.1 * p for name, p in params.items()}, s.image())


@case()
def func_grad(s: Subject):
    params, call = _functional(s.model())
    return torch.func.grad(lambda p: call(p, s.image()).square().sum())(params)


@case()
def func_vjp(s: Subject):
    params, call = _functional(s.model())
    out, pull = torch.func.vjp(call, params, s.image())
    return out, pull(torch.ones_like(out))


@case()
def func_vmap(s: Subject):
    params, call = _functional(s.model())
    return torch.func.vmap(lambda x: call(params, x[None])[0])(s.image(batch=3))


@case()
def ensemble(s: Subject):
    models = [s.model(seed=seed) for seed in range(2)]
    params, buffers = torch.func.stack_module_state(models)
    base = models[0]
    run = lambda p, b, x: logits(torch.func.functional_call(base, (p, b), (x,)))  # noqa: E731
    return torch.func.vmap(run, in_dims=(0, 0, None))(params, buffers, s.image())


@case()
def gradients_per_sample(s: Subject):
    params, call = _functional(s.model())
    one = torch.func.grad(lambda p, x: call(p, x[None]).square().sum())
    return torch.func.vmap(one, in_dims=(None, 0))(params, s.image(batch=3))


@case()
def func_jvp(s: Subject):
    params, call = _functional(s.model().train())
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other attentions have no forward mode, and no second derivative
        return torch.func.jvp(lambda x: call(params, x), (s.image(),), (s.image(seed=5),))


@case()
def forward_mode(s: Subject):
    model = s.model().train()
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s.image(), s.image(seed=5))
        return tuple(torch.autograd.forward_ad.unpack_dual(logits(model(dual))))


@case()
def second_derivative(s: Subject):
    model, image = s.model(), s.image().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(logits(model(image)).square().sum(), image, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [image, *model.parameters()], allow_unused=True)


# ---- fx and TorchScript ----------------------------------------------------------------------------------------------


@case()
def fx(s: Subject):
    return s.gradients(torch.fx.symbolic_trace(s.model()))


@case()
def fx_then_script(s: Subject):
    return logits(torch.jit.script(torch.fx.symbolic_trace(s.model()))(s.image()))


@case()
def fx_transformed(s: Subject):
    """What fx is for: a graph in which one function is replaced by another."""
    graph = torch.fx.symbolic_trace(s.model())
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), nn.GELU):
            graph.set_submodule(node.target, nn.SiLU())
    graph.recompile()
    return logits(graph(s.image()))


@case()
def fx_copied(s: Subject):
    return logits(copy.deepcopy(torch.fx.symbolic_trace(s.model()))(s.image()))


@case()
def script(s: Subject):
    model = torch.jit.script(s.model())
    return s.gradients(model)


@case()
def script_saved(s: Subject):
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(torch.jit.script(s.model())), file)
    file.seek(0)
    return logits(torch.jit.load(file)(s.image()))


@case()
def script_leaves_the_process_sound(s: Subject):
    """After an attempt on this model, a model of the same class that was never touched can be scripted."""
    try:
        torch.jit.script(s.model())
    finally:
        other = torch.jit.script(s.untouched())
    return logits(other(s.image()))


@case()
def jit_trace(s: Subject):
    traced = torch.jit.trace(s.model(), s.image(), strict=False)
    out = traced(s.image(seed=4))
    return out["logits"] if isinstance(out, dict) else out


@case()
def jit_trace_saved(s: Subject):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(s.model(), s.image(), strict=False), file)
    file.seek(0)
    out = torch.jit.load(file)(s.image(seed=4))
    return out["logits"] if isinstance(out, dict) else out


def _node_names(model: nn.Module) -> list[str]:
    from torchvision.models.feature_extraction import get_graph_node_names

    return get_graph_node_names(model)[1]


@case(only="timm torchvision")
def feature_extractor(s: Subject):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = s.model()
    names = [name for name, _ in model.named_modules() if name.count(".") <= 3 and name]
    nodes = sorted(set(names) & set(_node_names(s.untouched())))
    assert nodes
    return create_feature_extractor(model, return_nodes=nodes)(s.image())


@case(only="timm torchvision")
def feature_extractor_trains(s: Subject):
    from torchvision.models.feature_extraction import create_feature_extractor

    last = _node_names(s.untouched())[-1]
    model = create_feature_extractor(s.model(), return_nodes={last: "out"})
    model(s.image())["out"].square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@case(only="timm torchvision")
def graph_node_names(s: Subject):
    """The places that people pick features at: those of modules."""
    modules = {name for name, _ in s.untouched().named_modules()}
    return [name for name in _node_names(s.model()) if name in modules]


# ---- compilation -----------------------------------------------------------------------------------------------------


@case(heavy=True)
def compiled(s: Subject):
    return s.gradients(torch.compile(s.model(), backend="aot_eager", fullgraph=True))


@case(heavy=True)
def compiled_block_by_block(s: Subject):
    model = s.model()
    for block in blocks(model):
        block.compile(backend="eager")
    return logits(model(s.image()))


@case(heavy=True)
def exported(s: Subject):
    batch = torch.export.Dim("batch", min=2, max=8)
    name = next(iter(inspect.signature(s.untouched().forward).parameters))
    program = torch.export.export(s.model(), (s.image(),), dynamic_shapes={name: {0: batch}}, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return logits(torch.export.load(file).module()(s.image(batch=3)))


@case(heavy=True)
def exported_for_training(s: Subject):
    program = torch.export.export(s.model().train(), (s.image(),))
    logits(program.module()(s.image())).square().sum().backward()
    return [n.target for n in program.graph.nodes if n.op == "placeholder"]


@case(heavy=True)
def onnx_file(s: Subject):
    import onnx  # not a dependency: skips without it

    file, model = io.BytesIO(), s.model().float()
    torch.onnx.export(model, (s.image().float(),), file, dynamo=False)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    return True


# ---- timm ------------------------------------------------------------------------------------------------------------


@case(only="timm")
def forward_intermediates(s: Subject):
    model, image = s.model(), s.image()
    return (
        model.forward_intermediates(image),
        model.forward_intermediates(image, indices=1, norm=True, return_prefix_tokens=True, output_fmt="NLC"),
        model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True),
        model.forward_intermediates(image, output_dict=True),
    )


@case(only="timm")
def get_intermediate_layers(s: Subject):
    return s.model().get_intermediate_layers(s.image(), n=2, reshape=True, norm=True, return_prefix_tokens=True)


@case(only="timm")
def prune_intermediate_layers(s: Subject):
    model = s.model()
    kept = model.prune_intermediate_layers([0], prune_norm=True)
    features = model.forward_intermediates(s.image(), indices=kept, intermediates_only=True)
    return kept, features, model.forward_features(s.image()), model(s.image())


@case(only="timm")
def feature_getter(s: Subject):
    from timm.models._features import FeatureGetterNet

    getter = FeatureGetterNet(s.model(), out_indices=(0, 1), norm=True)
    return getter(s.image()), getter.feature_info.channels()


@case(only="timm")
def feature_graph(s: Subject):
    from timm.models._features_fx import FeatureGraphNet

    return FeatureGraphNet(s.model(), out_indices=(0, 1), output_fmt="NLC")(s.image())


@case(only="timm")
def feature_hooks(s: Subject):
    from timm.models._features import FeatureHookNet

    return FeatureHookNet(s.model(), out_indices=(0, 1), output_fmt="NLC")(s.image())


@case(only="timm")
def attention_extract_fx(s: Subject):
    from timm.utils.attention_extract import AttentionExtract

    return dict(AttentionExtract(_written_out(s), method="fx")(s.image()))


@case(only="timm")
def attention_extract_hook(s: Subject):
    from timm.utils.attention_extract import AttentionExtract

    return dict(AttentionExtract(_written_out(s), method="hook")(s.image()))


@case(only="timm")
def attention_extract_trained(s: Subject):
    """Gradients with respect to the maps that a hook has caught, as attention rollouts use them."""
    model, maps = _written_out(s), []
    for name, module in model.named_modules():
        if name.endswith("attn_drop"):
            module.register_forward_hook(lambda m, args, out: maps.append(out))
    return maps, torch.autograd.grad(model(s.image()).square().sum(), maps)


def _written_out(s: Subject) -> nn.Module:
    """With timm's attention that shows its maps."""
    model = s.untouched()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return s.touch(model)


@case(only="timm")
def set_input_size(s: Subject):
    model = s.model()
    model.set_input_size((32, 40))
    larger = nn.functional.pad(s.image(), (0, 16, 0, 8))
    found = s.gradients(model, larger)
    model.set_input_size((28, 28), patch_size=(4, 4))
    return found, s.gradients(model, nn.functional.pad(s.image(), (0, 4, 0, 4)))


@case(only="timm")
def reset_classifier(s: Subject):
    model, found = s.model(), []
    for classes, pool in ((0, None), (0, ""), (3, "avg"), (2, "token")):
        model.reset_classifier(classes, pool)
        for name, p in model.named_parameters():
            if name.startswith("head"):
                nn.init.constant_(p, 0.1)
        found.append(model(s.image()))
    return found, model.get_classifier().weight.shape


@case(only="timm")
def features_and_head(s: Subject):
    model = s.model()
    features = model.forward_features(s.image())
    return features, model.forward_head(features, pre_logits=True), model.forward_head(features)


@case(only="timm")
def attention_mask(s: Subject):
    model = s.model()
    tokens = model.forward_features(s.image()).shape[1]
    return model(s.image(), attn_mask=torch.ones(tokens, tokens, dtype=torch.bool).tril())


@case(only="timm")
def parameter_groups(s: Subject):
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    model = s.model()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.7)
    return (
        [(group["lr_scale"], len(group["params"])) for group in groups],
        group_parameters(model, model.group_matcher(coarse=False)),
        sorted(model.no_weight_decay()),
    )


@case(only="timm", limit=1e-8)
def timm_training(s: Subject):
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    model = s.model()
    ema = ModelEmaV3(model, decay=0.9)
    losses = _train(s, model, lambda params, lr: create_optimizer_v2(model, "lamb", lr=lr, layer_decay=0.7))
    ema.update(model)
    return losses, ema.module(s.image())


@case(only="timm")
def freeze_batch_norm_and_layers(s: Subject):
    from timm.utils import freeze, unfreeze

    model = s.model().train()
    freeze(model, ["blocks.0", "patch_embed"])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    found = s.gradients(model)
    unfreeze(model)
    return frozen, found


@case(only="timm")
def scriptable_features(s: Subject):
    from timm.models._features import FeatureGetterNet

    return torch.jit.script(FeatureGetterNet(s.model(), out_indices=(0, 1)))(s.image())


@case(only="timm")
def initial_weights(s: Subject):
    model = s.model()
    torch.manual_seed(5)
    model.init_weights("jax")
    return dict(model.state_dict()), model(s.image())


# ---- torchvision -----------------------------------------------------------------------------------------------------


@case(only="torchvision")
def encoder_alone(s: Subject):
    model = s.model()
    tokens = model._process_input(s.image())
    return tokens, model.encoder(torch.cat([model.class_token.expand(2, -1, -1), tokens], 1))


@case(only="torchvision")
def attention_maps_from_a_hook(s: Subject):
    """As explainers do it: ``need_weights`` switched on in a pre-hook."""
    model, maps = s.model(), []
    for _, module in parts(model, nn.MultiheadAttention):
        module.register_forward_pre_hook(
            lambda m, args, kwargs: (args, kwargs | {"need_weights": True, "average_attn_weights": False}),
            with_kwargs=True,
        )
        module.register_forward_hook(lambda m, args, out: maps.append(out[1]))
    image = s.image().requires_grad_()
    out = model(image)
    return out, maps, torch.autograd.grad(sum(m.square().sum() for m in maps), image)


@case(only="torchvision")
def interpolated_position_embedding(s: Subject):
    from torchvision.models.vision_transformer import interpolate_embeddings

    model = s.model()
    state = interpolate_embeddings(image_size=32, patch_size=8, model_state=dict(model.state_dict()))
    return state["encoder.pos_embedding"].shape


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def _eager(s: Subject) -> bool:
    return s.name.endswith("eager")


@case(only="hf")
def hidden_states(s: Subject):
    return s.model()(s.image(), output_hidden_states=True)


@case(only="hf")
def attentions(s: Subject):
    return s.model()(s.image(), output_attentions=True)


@case(only="hf")
def tuples(s: Subject):
    model = s.model()
    options = {"output_attentions": True, "output_hidden_states": True}
    return model(s.image(), return_dict=False), model(s.image(), return_dict=False, **options)


@case(only="hf")
def gradients_of_attentions(s: Subject):
    out = s.model()(s.image(), output_attentions=True, output_hidden_states=True)
    kept = [out.hidden_states[0], out.hidden_states[1], out.attentions[0], out.attentions[1]]
    for tensor in kept:
        tensor.retain_grad()
    out.logits.square().sum().backward()
    return [tensor.grad for tensor in kept]


@case(only="hf")
def options_in_the_config(s: Subject):
    model = s.model()
    model.config.output_attentions = _eager(s)
    model.config.output_hidden_states = True
    return model(s.image())


@case(only="hf")
def loss_from_labels(s: Subject):
    model, found = s.model(), []
    for kind, labels in (
        (None, torch.tensor([1, 3])),
        ("multi_label_classification", torch.eye(5, dtype=s.dtype)[:2]),
    ):
        model.config.problem_type = kind
        out = model(s.image(), labels=labels)
        out.loss.backward()
        found += [out.loss, out.logits]
    return found, {name: p.grad for name, p in model.named_parameters()}


@case(only="hf")
def larger_image(s: Subject):
    image = nn.functional.pad(s.image(), (0, 16, 0, 8))
    model = s.model()
    options = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return logits(model(image, interpolate_pos_encoding=True) if options else model(image))


@case(only="hf")
def masked_keys(s: Subject):
    model = s.model()
    base = getattr(model, model.base_model_prefix)
    tokens = base(s.image()).last_hidden_state.shape[1]
    return base(s.image(), attention_mask=torch.arange(tokens).expand(2, tokens) < 7)


@case(only="hf")
def masked_patches(s: Subject):
    model = s.model()
    base = s.touch(type(getattr(model, model.base_model_prefix))(model.config, use_mask_token=True).to(s.dtype).eval())
    randomise(base)
    return base(s.image(), bool_masked_pos=torch.arange(18).view(2, 9) % 4 == 0).last_hidden_state


@case(only="hf")
def attention_switched(s: Subject):
    model, found = s.model(), []
    for attention in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attention)
        found.append(logits(model(s.image())))
    return found, model.config._attn_implementation


@case(only="hf")
def saved_and_loaded(s: Subject):
    import tempfile

    model = s.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = s.touch(type(model).from_pretrained(folder, dtype=s.dtype).eval())
    return logits(again(s.image())), again.config.to_json_string()


@case(only="hf")
def made_from_a_config(s: Subject):
    model = s.model()
    twin = s.touch(type(model)._from_config(copy.deepcopy(model.config), dtype=s.dtype).eval())
    twin.load_state_dict(model.state_dict())
    return logits(twin(s.image()))


@case(only="hf")
def embeddings(s: Subject):
    model = s.model()
    layer = model.get_input_embeddings()
    return layer(s.image()), model.num_parameters(), str(layer)


@case(only="hf")
def weights_tied_and_initialised(s: Subject):
    model = s.model()
    model.tie_weights()
    torch.manual_seed(5)
    model.apply(model._init_weights)
    return logits(model(s.image())), dict(model.state_dict())


# ---- layout ----------------------------------------------------------------------------------------------------------


@case()
def layout_of_convolutions(s: Subject):
    """Strides, on which ``view`` and some of PyTorch's backward functions rely."""
    return [
        (convolution(s.image(batch=n)).stride(), convolution(s.image(batch=n)).is_contiguous())
        for _, convolution in parts(s.model(), nn.Conv2d)
        for n in (1, 2)
    ]


@case()
def convolution_then_batch_norm(s: Subject):
    """A convolution whose stride is its kernel, in a branch that is no ViT, before a BatchNorm in training."""
    branch = nn.Sequential(nn.Conv2d(3, 5, 8, 8, dtype=s.dtype), nn.BatchNorm2d(5, dtype=s.dtype), nn.Flatten())
    for p in branch.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    both = s.touch(nn.ModuleDict({"vit": s.untouched(), "branch": branch})).train()
    found = []
    for n in (1, 2):
        out = both["branch"](s.image(batch=n))
        convolved = both["branch"][0](s.image(batch=n)).view(n, -1)
        weights = torch.arange(out.numel(), dtype=s.dtype).reshape(out.shape).sin()
        grads = torch.autograd.grad((out * weights).sum(), list(branch.parameters()))
        found.append((out, convolved, grads))
    return found


@case()
def results_written_in_place(s: Subject):
    model = s.model()
    for module in model.modules():
        if list(module.children()) and module is not model:
            module.register_forward_hook(lambda m, args, out: out.mul_(1.5) if torch.is_tensor(out) else None)
    return s.gradients(model)


@case()
def in_place_after_linears(s: Subject):
    """A module that writes into its input, where the library has a dropout."""
    model = s.model()
    for name, _ in parts(model, nn.Dropout):
        if not name.endswith("attn_drop"):  # its ``p`` is read, too
            model.set_submodule(name, nn.Hardtanh(-0.5, 0.5, inplace=True))
    return s.gradients(model)
