"""Copies, files, and changes of the parts of a model."""

import copy
import io
import pickle

import torch
from subject import Subject, blocks, logits, parts
from table import case
from torch import nn
from torch.nn.utils import parametrizations, prune

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
    """Like `torch.nn.parallel.replicate`: new objects, the same attributes, other parameters."""
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
    """Changes the class of an existing module, as ToMe does."""
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
    """What LoRA puts in place of a linear layer."""

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
