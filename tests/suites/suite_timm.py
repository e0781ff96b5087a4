"""timm's own tests of its models, from its source package, on its small ViTs."""

import importlib.util
import inspect
import itertools

import peers
import pytest
from side_by_side import side_by_side, source_of

pytestmark = pytest.mark.peers

SMALL = ("test_vit", "test_vit2", "test_vit3")
MODELS = (*SMALL, "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224")
SLOW = ("test_prune_intermediate_layers_contract",)
EXCEPTIONS: dict[str, str] = {}  # case: why it must fail accelerated
DOWNLOADS = ("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained")


def _their_module():
    """``tests/test_models.py`` of timm's source package; None without it."""
    source = source_of("timm")
    if source is None:
        return None
    peers._make_torchvision_importable()
    spec = importlib.util.spec_from_file_location("timm_test_models", source / "tests" / "test_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(function) -> list[dict[str, object]]:
    """Every combination of its ``parametrize`` marks."""
    rows = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            values = mark.args[1] if len(names) > 1 else [(value,) for value in mark.args[1]]
            rows.append([dict(zip(names, value, strict=True)) for value in values])
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*rows)]


def _cases() -> dict[str, tuple]:
    return {
        f"{name}-{arguments['model_name']}": (function, arguments)
        for name, function in vars(THEIRS).items()
        if name.startswith("test_") and name not in DOWNLOADS
        for arguments in _arguments(function)
        if arguments.get("model_name") in (SMALL if name in SLOW else MODELS)
    }


THEIRS = _their_module()
CASES = {} if THEIRS is None else _cases()


def test_sources():
    if THEIRS is None:
        pytest.skip("no source package of the installed timm in build/suites: `make test-suites` fetches it")
    assert len(CASES) > 30


@pytest.mark.parametrize("case", CASES)
def test_their_case(case, monkeypatch):
    function, arguments = CASES[case]
    if "cfg_device" in inspect.signature(function).parameters:
        arguments = arguments | {"cfg_device": "meta"}
    create = THEIRS.create_model

    def run(touch):
        monkeypatch.setattr(THEIRS, "create_model", lambda *args, **options: touch(create(*args, **options)))
        function(**arguments)

    try:
        side_by_side(run, reason=EXCEPTIONS.get(case))
    finally:
        monkeypatch.undo()
