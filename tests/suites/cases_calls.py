"""How a model is called, and what it looks like."""

import gc
import inspect
import weakref

import torch
from subject import Subject, logits, parts
from table import case
from torch import nn

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


@case(limit=0.1)  # shows that the path runs; test_accelerate.py judges the error
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
    """A model that has run in one dtype runs in the next, with nothing kept from the first."""
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
    """Attribute names of each module, except ``forward``, which may be there."""
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
    """A convolution whose stride equals its kernel, outside the ViT, before a BatchNorm in training."""
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
