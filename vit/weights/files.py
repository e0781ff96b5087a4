"""Reading and writing the files that hold checkpoints. Nothing that a file contains is executed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".tar")  # .pth.tar is no archive
SUFFIXES = (".safetensors", *PICKLES, ".npz")
_IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the average first, as timm does
_NOTE = "fused_vit"  # where a file of ours keeps its numerics


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit the model, which is unchanged; has ``path`` and ``reason``."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclasses.dataclass
class Checkpoint:
    """What a file or a folder of files holds."""

    path: Path
    tensors: dict[str, Tensor]
    numerics: dict[str, Any]  # what a file of ours says of itself
    config: dict[str, Any] | None = None  # a folder's config.json
    preprocessor: dict[str, Any] = dataclasses.field(default_factory=dict)  # and preprocessor_config.json


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a file, an index of shards, a folder with either, or what a hub has under the name ``path``.

    Raises:
        CheckpointError: it is not what its name says. FileNotFoundError: nothing is there.
        ImportError: the file or the name needs a library that is not installed.
    """
    path = _local(path)
    with blame(path, "cannot be read: it is damaged or of another kind"):
        if not path.is_dir():
            tensors, numerics = _read_file(path)
            return Checkpoint(path, tensors, numerics)
        file = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(path, f"the folder has none of {', '.join(_IN_FOLDER)}")
        config, preprocessor = (
            json.loads((path / name).read_text(encoding="utf-8")) if (path / name).is_file() else {}
            for name in ("config.json", "preprocessor_config.json")
        )
        if not isinstance(config, dict) or not isinstance(preprocessor, dict):
            raise CheckpointError(path, "config.json or preprocessor_config.json is not an object")
        return Checkpoint(path, *_read_file(file), config or None, preprocessor)


@contextlib.contextmanager
def blame(path: Path, what: str) -> Iterator[None]:
    """Turns whatever is raised over a malformed file into one class of error; there is no limit to what that is."""
    try:
        yield
    except (CheckpointError, ImportError):
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        reason = first_line if type(error) is ValueError else f"{what} ({type(error).__name__}: {first_line})"
        raise CheckpointError(path, reason) from error


def _local(path: str | os.PathLike[str]) -> Path:
    local, name = Path(path).expanduser(), os.fspath(path)
    if local.exists():
        return local
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and local.suffix not in (*SUFFIXES, ".json")
    if not hub_id or local.parent.exists():
        raise FileNotFoundError(f"{local}: there is no such file or folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        needs = "a name on the Hugging Face hub needs huggingface_hub: pip install fused-vit[hub]"
        raise ImportError(f"{local}: there is no such file or folder; {needs}") from error
    folder = Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"]))
    if not any((folder / file).is_file() for file in _IN_FOLDER):
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin"]))
    return folder


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, and what the file says of its numerics."""
    note: Any = None
    if path.name.endswith(".index.json"):
        content = _read_shards(path)
    elif path.suffix == ".safetensors":
        with safetensors().safe_open(str(path), framework="pt", device="cpu") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = json.loads((file.metadata() or {}).get(_NOTE, "null"))
    elif path.suffix in PICKLES:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts keep their options, plain data
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:  # its own text advises to execute what the file contains
                reason = "is damaged or holds pickled objects, which are not loaded; save model.state_dict() instead"
                raise CheckpointError(path, reason) from error
        while isinstance(content, Mapping):
            inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
            if inner is None:
                break
            content = inner
        with contextlib.suppress(AttributeError, TypeError):
            note = content._metadata[""].get(_NOTE)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            content = {name: _from_numpy(file[name]) for name in file.files}
    else:
        raise CheckpointError(path, f"unknown kind of file; use one of {', '.join(SUFFIXES)} or a folder")
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(path, "holds no tensors" if not content else f"holds a {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(path, f"holds a {type(tensor).__name__} under {name!r} where tensors are expected")
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(path, f"{name} is not a plain tensor")
    return {name: tensor.detach() for name, tensor in content.items()}, note if isinstance(note, dict) else {}


def _read_shards(index: Path) -> dict[str, Tensor]:
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    content = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or file.endswith(".json"):
            raise CheckpointError(index, f"names {file!r}, which is not a file beside it")
        content |= _read_file(index.with_name(file))[0]
    if missing := names.keys() - content.keys():
        raise CheckpointError(index, f"the shards lack {sorted(missing)[0]}")
    return content


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype == "V2":  # numpy has no bfloat16: JAX's are saved as two bytes without a meaning
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype is torch.bfloat16 else tensor.numpy()


def safetensors() -> Any:
    """The library, with its functions for PyTorch.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(".safetensors files need the library: pip install fused-vit[weights]") from error
    return safetensors


def write(path: Path, tensors: dict[str, Tensor], numerics: dict[str, Any]) -> None:
    """Writes a file of the kind that its suffix names, complete or not at all."""
    # Copies, because parts of one tensor share their storage, which safetensors refuses and torch.save saves whole.
    tensors = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", _NOTE: json.dumps(numerics)}
            safetensors().torch.save_file(tensors, str(temporary), metadata=metadata)
        elif path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, **{name: _to_numpy(tensor) for name, tensor in tensors.items()})
        else:
            state = OrderedDict(tensors)
            state._metadata = {"": {_NOTE: numerics}}  # where PyTorch keeps the versions of a state dict's modules
            torch.save(state, temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes a file that only its owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
