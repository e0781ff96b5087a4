"""What timm's own methods and tools do."""

import torch
from cases_hooks import train
from subject import Subject
from table import case
from torch import nn


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
    losses = train(s, model, lambda params, lr: create_optimizer_v2(model, "lamb", lr=lr, layer_decay=0.7))
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
def initial_weights(s: Subject):
    model = s.model()
    torch.manual_seed(5)
    model.init_weights("jax")
    return dict(model.state_dict()), model(s.image())
