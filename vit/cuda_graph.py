"""An inference forward as a CUDA graph. A replay is one launch instead of one launch per kernel."""

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
    """Captures one forward of ``model`` without gradients and replays it on other inputs of the same shape.

        run = vit.graph(model.eval(), images)
        logits = run(other_images)

    Each call copies its inputs to the graph's inputs, replays the graph and returns new tensors. Later calls do not
    overwrite them. A replay reads the current values of the parameters, so `load_state_dict` and optimizer steps take
    effect. Moving or casting the model is an error. Everything that Python decided during the capture is fixed:
    ``options``, autocast and the modules of the model.

    Args:
        model: any module on one NVIDIA GPU, in evaluation.
        example: its positional arguments, one tensor or several; the values do not matter.
        **options: keyword arguments of every forward, without tensors.

    Raises:
        RuntimeError: the model or the example is not on a GPU, or the forward cannot be captured, for example because
            it waits for the GPU.
        ValueError: a module is in training, or model and example are on different devices.
        TypeError: the example contains something other than tensors, or an option is a tensor.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    device = check(model, inputs, options)
    if device.type != "cuda":
        raise RuntimeError(
            f"vit.graph needs a GPU, but the model is on {device.type}; move model and example to 'cuda'"
        )
    return Graph(model, inputs, options, capture)


class Graph:
    """The result of `graph`. All calls share the memory of inputs and outputs: use one thread and one stream."""

    def __init__(
        self, model: nn.Module, example: tuple[Tensor, ...], options: dict[str, Any], capture: Capture
    ) -> None:
        # A moved parameter is the same object with other memory; a moved buffer is another object under its name.
        tables = (table for module in model.modules() for table in (module._parameters, module._buffers))
        self._tensors = [(table, name, t) for table in tables for name, t in table.items() if t is not None]
        self._places = [t.data_ptr() for _, _, t in self._tensors]
        device = example[0].device
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        with torch.inference_mode(False), torch.no_grad():  # later calls cannot write to inference tensors
            self._inputs = tuple(x.detach().clone() for x in example)
            # No autocast cache: it would be freed before the graph.
            with unchanged(model, example), torch.autocast(device.type, dtype, enabled, cache_enabled=False):
                self._replay = capture(lambda: model(*self._inputs, **options), device)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """The outputs of the model, as new tensors.

        Raises:
            TypeError: the number of tensors differs from the example's, or the model returns a container that PyTorch's
                pytree does not know.
            ValueError: shape, dtype or device differ from the example's.
            RuntimeError: the model was moved or cast after the capture.
        """
        if len(inputs) != len(self._inputs) or not all(isinstance(x, Tensor) for x in inputs):
            kinds = ", ".join(type(x).__name__ for x in inputs)
            raise TypeError(f"vit.graph: captured for {len(self._inputs)} tensor(s), got ({kinds})")
        for x, place in zip(inputs, self._inputs, strict=True):
            got, captured = ((*t.shape, t.dtype, t.device) for t in (x, place))
            if got != captured:
                raise ValueError(f"vit.graph: captured for {_say(place)}, got {_say(x)}; capture another graph for it")
        now = (table.get(name) for table, name, _ in self._tensors)
        if any(t is None or t.data_ptr() != place for t, place in zip(now, self._places, strict=True)):
            raise RuntimeError("vit.graph: the model was moved or cast after it was captured; capture it again")
        for x, place in zip(inputs, self._inputs, strict=True):
            place.copy_(x)
        return tree_map(_copy, self._replay())


def _copy(out: Any) -> Any:
    # Other objects may contain tensors that the next replay overwrites.
    if not isinstance(out, Tensor | bool | int | float | str | None):
        raise TypeError(f"vit.graph: cannot copy a {type(out).__name__}; let the model return tensors, tuples or dicts")
    return out.clone() if isinstance(out, Tensor) else out


def _say(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def check(model: nn.Module, example: tuple[Tensor, ...], options: dict[str, Any]) -> torch.device:
    """Checks the arguments of `graph` as far as possible without a GPU. Returns the device of model and example."""
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
    """Captures ``run`` on the GPU ``device``. The result is a function that replays it and returns the same tensors."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # a capture cannot compile kernels or let cuBLAS allocate
                run()
        torch.cuda.current_stream().wait_stream(side)
        gc.collect()  # frees the warm-up's autograd nodes, which would wait for a stream outside the capture
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
