"""What torchvision's and transformers' own methods and arguments do."""

import copy
import inspect
import tempfile

import torch
from peers import randomise
from subject import Subject, logits, parts
from table import case
from torch import nn

# ---- torchvision -----------------------------------------------------------------------------------------------------


@case(only="torchvision")
def encoder_alone(s: Subject):
    model = s.model()
    tokens = model._process_input(s.image())
    return tokens, model.encoder(torch.cat([model.class_token.expand(2, -1, -1), tokens], 1))


@case(only="torchvision")
def attention_maps_from_a_hook(s: Subject):
    """As explainers do: a pre-hook switches ``need_weights`` on."""
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
    cls = type(getattr(model, model.base_model_prefix))
    options = {"use_mask_token": True} if "use_mask_token" in inspect.signature(cls).parameters else {}
    base = s.touch(cls(model.config, **options).to(s.dtype).eval())
    randomise(base)
    return base(s.image(), bool_masked_pos=torch.arange(18).view(2, 9) % 4 == 0).last_hidden_state


@case(only="hf", limit=1e-6)  # transformers' eager ViT computes its softmax in single precision
def attention_switched(s: Subject):
    model, found = s.model(), []
    for attention in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attention)
        found.append(logits(model(s.image())))
    return found, model.config._attn_implementation


@case(only="hf")
def saved_and_loaded(s: Subject):
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
