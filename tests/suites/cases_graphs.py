"""Function transforms, fx, TorchScript, compilation and export."""

import copy
import inspect
import io

import torch
from subject import Subject, blocks, logits
from table import case
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    """After an attempt on this model, an untouched model of the same class can be scripted."""
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
    """The nodes where users take features: those of modules."""
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
