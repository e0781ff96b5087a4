"""Hooks and training."""

import torch
from subject import Subject, logits
from table import case
from torch import nn

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


def train(s: Subject, model: nn.Module, optimizer=torch.optim.AdamW, steps: int = 3) -> list[torch.Tensor]:
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
    return train(s, s.model())


@case(limit=1e-8)
def training_with_momentum(s: Subject):
    return train(s, s.model(), lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9))


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
