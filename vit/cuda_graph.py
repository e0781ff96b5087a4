"""One inference forward as a CUDA graph: a replay is a single launch instead of one for every kernel."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vit.unchanged import unchanged

Capture = Callable[[Callable[[], Any], torch.device], Callable[[], Any]]


def graph(model: nn.Module, example: Tensor | tuple[Tensor, ...], **options: Any) -> Graph:
    """Captures one forward of ``model`` without gradients, to be replayed on other inputs of the same shape.

        run = vit.graph(model.eval(), images)
        logits = run(other_images)

    Each call copies its inputs to where the graph reads, replays, and returns new tensors, which later calls leave
    alone. A replay reads the parameters where they are: `load_state_dict` and optimizer steps take effect, and moving
    or casting the model is an error. What was decided in Python while it was captured stays: ``options``, autocast,
    modules that were put into the model afterwards do not count.

    Args:
        model: any module on one NVIDIA GPU, in evaluation.
        example: its positional arguments, one tensor or several; the values do not matter.
        **options: further arguments of every forward, without tensors.

    Raises:
        RuntimeError: the model or the example is not on a GPU; or the forward cannot be captured, because it waits for
            the GPU, say.
        ValueError: the model or a part of it is in training; model and example are on different devices.
        TypeError: the example is not made of tensors, or the options are.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    device = check(model, inputs, options)
    if device.type != "cuda":
        raise RuntimeError(
            f"vit.graph needs a GPU, but the model is on {device.type}; move model and example to 'cuda'"
        )
    return Graph(model, inputs, options, capture)


class Graph:
    """What `graph` returns. Inputs and outputs have one place in memory: one thread and one stream at a time."""

    def __init__(
        self, model: nn.Module, example: tuple[Tensor, ...], options: dict[str, Any], capture: Capture
    ) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._places = [t.data_ptr() for t in self._tensors]
        device = example[0].device
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to at a later call
            self._inputs = tuple(x.detach().clone() for x in example)
            # Autocast's cache would die before the graph.
            with unchanged(model, example), torch.autocast(device.type, dtype, enabled, cache_enabled=False):
                self._replay = capture(lambda: model(*self._inputs, **options), device)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """The outputs of the model, as new tensors.

        Raises:
            TypeError: not as many tensors as in the example; the model returns a type of container that PyTorch's
                pytree does not know.
            ValueError: another shape, dtype or device than the example's.
            RuntimeError: the model was moved or cast since.
        """
        if len(inputs) != len(self._inputs) or not all(isinstance(x, Tensor) for x in inputs):
            kinds = ", ".join(type(x).__name__ for x in inputs)
            raise TypeError(f"vit.graph: captured for {len(self._inputs)} tensor(s), got ({kinds})")
        for x, place in zip(inputs, self._inputs, strict=True):
            got, captured = ((*t.shape, t.dtype, t.device) for t in (x, place))
            if got != captured:
                raise ValueError(f"vit.graph: captured for {_say(place)}, got {_say(x)}; capture another graph for it")
        if any(t.data_ptr() != place for t, place in zip(self._tensors, self._places, strict=True)):
            raise RuntimeError("vit.graph: the model was moved or cast after it was captured; capture it again")
        for x, place in zip(inputs, self._inputs, strict=True):
            place.copy_(x)
        return tree_map(_copy, self._replay())


def _copy(out: Any) -> Any:
    # Anything else may hold tensors that the next replay overwrites.
    if not isinstance(out, Tensor | bool | int | float | str | None):
        raise TypeError(f"vit.graph: cannot copy a {type(out).__name__}; let the model return tensors, tuples or dicts")
    return out.clone() if isinstance(out, Tensor) else out


def _say(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def check(model: nn.Module, example: tuple[Tensor, ...], options: dict[str, Any]) -> torch.device:
    """The one device of model and example; raises for what `graph` refuses on any device."""
    if not example or not all(isinstance(t, Tensor) for t in example):
        raise TypeError(
            f"vit.graph: example must be a tensor or a tuple of them, got {[type(t).__name__ for t in example]}"
        )
    for name, value in options.items():
        if isinstance(value, Tensor):
            raise TypeError(
                f"vit.graph: {name} is a tensor, of which the graph would keep a single value; "
                "make it a positional argument and part of the example"
            )
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"vit.graph: {name or type(model).__name__} is in training; call model.eval() first")
    device = example[0].device
    named = (
        {f"input {i}": t for i, t in enumerate(example)} | dict(model.named_parameters()) | dict(model.named_buffers())
    )
    for name, t in named.items():
        if t.device != device:
            raise ValueError(
                f"vit.graph: model and example must be on one device, got {device} and {t.device} ({name})"
            )
    return device


def capture(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function that replays ``run`` on the GPU ``device`` and returns the same tensors every time."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles the kernels and makes cuBLAS allocate, neither of which can be captured
                run()
        torch.cuda.current_stream().wait_stream(side)
        gc.collect()  # no autograd node of the warm-up may live on: it would wait for a stream outside the capture
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                outs = run()
        except RuntimeError as error:
            raise RuntimeError(f"vit.graph: this forward cannot be captured: {error}") from error

    def replay() -> Any:
        with torch.cuda.device(device):
            captured.replay()
        return outs

    return replay
