"""The whole model under torch.autocast, with a gradient scaler, and compiled for any batch size."""

import dataclasses

import pytest
import torch
from peers import randomise
from test_vit import SMALL, gradients, three_models

import vit
from vit.kernels import runtime
from vit.testing import check_draws


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.1, "global_pool": "avg", "reg_tokens": 2}, {"qk_norm": True}]
)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_autocast(impl, options, half, device):
    where = device if impl == "triton" else torch.device("cpu")
    config = dataclasses.replace(SMALL, depth=1, impl=impl, **options)
    results = []
    for seed in range(2 if impl == "triton" and runtime.INTERPRETED else 8):
        models = three_models(config, torch.float32, where, seed)
        image, cotangent = torch.randn(2, 3, 32, 48).to(where), torch.randn(2, 10).to(where, half)
        results.append(())
        for model in models:
            with torch.autocast(where.type, half, enabled=model is not models[2]):
                results[-1] += (gradients(model, image, cotangent),)
        assert results[-1][0]["logits"].dtype is half
    check_draws(results)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_gradient_scaler(impl, device):
    where = device if impl == "triton" else torch.device("cpu")
    config = dataclasses.replace(SMALL, depth=1, impl=impl)
    models = three_models(config, torch.float32, where)[:2]
    image, labels = torch.randn(4, 3, 32, 48).to(where), torch.arange(4).to(where)
    losses = []
    for model in models:
        scaler, optimizer = torch.amp.GradScaler(where.type), torch.optim.SGD(model.parameters(), lr=0.02)
        before, found = [p.clone() for p in model.parameters()], []
        for step in range(3):
            with torch.autocast(where.type, torch.float16):
                loss = torch.nn.functional.cross_entropy(model(image).float(), labels)
            found.append(loss.item())
            optimizer.zero_grad()
            # One gradient overflows: that step is skipped and the scale halved.
            scaler.scale(loss * (torch.inf if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert all(changed) == (step != 1) and any(changed) == (step != 1)
            before = [p.clone() for p in model.parameters()]
        assert scaler.get_scale() == 2.0**15 and found[2] < found[0] and found[1] == found[2]
        losses.append(found)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)


TRAINING = {"attn_drop_rate": 0.2, "proj_drop_rate": 0.1, "patch_drop_rate": 0.25}


# With dropout through the kernels only: the reference's many small integer operations take a minute to trace.
@pytest.mark.parametrize(
    ("impl", "rates"),
    [("auto", {}), pytest.param("triton", TRAINING, marks=pytest.mark.ci)],
    ids=["auto", "kernels, dropout"],
)
def test_one_compilation_serves_every_batch(impl, rates, device):
    model = vit.VisionTransformer(dataclasses.replace(SMALL, depth=1, impl=impl, **rates), 0)
    model = model.to(device if impl == "triton" else "cpu")
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5):
            image, cotangent = torch.randn(batch, 3, 32, 48).to(model.pos_embed), torch.randn(batch, 10)
            direct = gradients(model, image, cotangent.to(image))
            found = gradients(compiled, image, cotangent.to(image))
            for name, value in direct.items():
                assert torch.equal(value, found[name if name in found else f"_orig_mod.{name}"]), (batch, name)
