"""Reads and writes checkpoint files. It never executes code from a file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".tar")  # .pth.tar is a pickle, not an archive
SUFFIXES = (".safetensors", *PICKLES, ".npz")
_IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# The averaged weights first, as in timm and DINO.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "net", "encoder")
_NESTED = 8  # limit of nested wrappers, because a dictionary can contain itself
NOTE = "fused_vit"  # key of the note in files from `save_pretrained`


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit. The model is unchanged. Attributes: ``path`` and ``reason``."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclasses.dataclass
class Checkpoint:
    """The content of a file or a folder."""

    path: Path
    tensors: dict[str, Tensor]
    note: dict[str, Any]  # the note of `save_pretrained`
    config: dict[str, Any] | None = None  # config.json of a folder
    preprocessor: dict[str, Any] = dataclasses.field(default_factory=dict)  # preprocessor_config.json


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a file, an index of shards, a folder with one of these, or a model on the Hugging Face hub.

    Raises:
        CheckpointError: the file is damaged or of another kind.
        FileNotFoundError: the file does not exist.
        ImportError: the file or the hub needs a library that is not installed.
    """
    path = _local(path)
    with blame(path, "cannot be read: it is damaged or of another kind"):
        if not path.is_dir():
            return Checkpoint(path, *_read_file(path))
        file = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(path, f"the folder has none of {', '.join(_IN_FOLDER)}")
        config, preprocessor = (
            json.loads(_regular(path / name).read_text(encoding="utf-8")) if (path / name).exists() else {}
            for name in ("config.json", "preprocessor_config.json")
        )
        if not isinstance(config, dict) or not isinstance(preprocessor, dict):
            raise CheckpointError(path, "config.json or preprocessor_config.json is not an object")
        own = config.pop(NOTE, {})
        tensors, note = _read_file(file)
        return Checkpoint(path, tensors, note or _plain(own), config or None, preprocessor)


@contextlib.contextmanager
def blame(path: Path, what: str) -> Iterator[None]:
    """Turns every error into CheckpointError, because a malformed file can raise any of them."""
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
    """The tensors on the CPU, and the note."""
    note: Any = None
    _regular(path)
    if path.name.endswith(".index.json"):
        content = _read_shards(path)
    elif path.suffix == ".safetensors":
        with safetensors().safe_open(str(path), framework="pt", device="cpu") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = json.loads((file.metadata() or {}).get(NOTE, "null"))
    elif path.suffix in PICKLES:
        _refuse_torchscript(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # options of training scripts, plain data
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:  # PyTorch's message suggests executing the file's code
                reason = "is damaged or holds pickled objects, which are not loaded; save model.state_dict() instead"
                raise CheckpointError(path, reason) from error
        for _ in range(_NESTED):
            if isinstance(content, Mapping):
                content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
        with contextlib.suppress(AttributeError, TypeError, KeyError):
            note = content._metadata[""].get(NOTE)
    elif path.suffix == ".npz":
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            content = {name: _from_numpy(file[name]) for name in file.files}
            note = _of_comment(file.zip.comment)
    else:
        raise CheckpointError(path, f"unknown kind of file; use one of {', '.join(SUFFIXES)} or a folder")
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(path, "holds no tensors" if not content else f"holds a {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            advice = "; save the part with the tensors alone" if isinstance(tensor, Mapping) else ""
            held = f"holds a {type(tensor).__name__} under {name!r} where tensors are expected"
            raise CheckpointError(path, held + advice)
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(path, f"{name} is not a plain tensor")
    return {name: tensor.detach() for name, tensor in content.items()}, _plain(note)


def _refuse_torchscript(path: Path) -> None:
    """Raises CheckpointError for an archive of TorchScript, such as OpenAI's CLIP: its code would be executed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            fix = "if you trust it, save torch.jit.load(path).state_dict() and load that"
            raise CheckpointError(path, f"is a TorchScript archive, which contains code and is not executed; {fix}")


def _regular(path: Path) -> Path:
    if not path.is_file():  # opening a pipe would block
        raise CheckpointError(path, "is not a regular file" if path.exists() else "is missing")
    return path


def _plain(note: Any) -> dict[str, Any]:
    """The note as plain JSON data, because a pickle can contain other objects; empty if there is no note."""
    return json.loads(json.dumps(note)) if isinstance(note, dict) else {}


def _of_comment(comment: bytes) -> Any:
    """The note in the comment of a .npz archive; None if the comment is something else."""
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(comment).get(NOTE)


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
    if array.dtype == "V2":  # numpy has no bfloat16, so JAX's arrays are saved as raw pairs of bytes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype is torch.bfloat16 else tensor.numpy()


def safetensors() -> Any:
    """Imports safetensors with its PyTorch functions.

    Raises:
        ImportError: it is not installed. The message has the command to install it.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(".safetensors files need the library: pip install fused-vit[weights]") from error
    return safetensors


def write(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Writes a file of the kind that its suffix names. No incomplete file remains."""
    # Copies, because parts of one tensor share its storage. safetensors refuses that, and torch.save would save it all.
    tensors = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", NOTE: json.dumps(note)}
            safetensors().torch.save_file(tensors, str(temporary), metadata=metadata)
        elif path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, **{name: _to_numpy(tensor) for name, tensor in tensors.items()})
            with zipfile.ZipFile(temporary, "a") as archive:  # not an entry, which readers would take for a tensor
                archive.comment = _to_comment(note)
        else:
            state = OrderedDict(tensors)
            state._metadata = {"": {NOTE: note}}  # PyTorch keeps module versions here
            torch.save(state, temporary)


def _to_comment(note: dict[str, Any]) -> bytes:
    """The note as a comment of a zip archive, at most 65,535 bytes. Omits the class names if they do not fit."""
    comment = json.dumps({NOTE: note}).encode()
    if len(comment) < 1 << 16:
        return comment
    cfg = {key: value for key, value in note["pretrained_cfg"].items() if key != "label_names"}
    return json.dumps({NOTE: note | {"pretrained_cfg": cfg}}).encode()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder, which replaces ``path`` at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors' file is readable only by its owner
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
