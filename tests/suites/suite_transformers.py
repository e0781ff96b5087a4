"""transformers' own tests of a model, from its source package, on its four ViTs.

The package has the tests that all models share, but no file of a single model: the sizes are given here.
"""

import contextlib
import functools
import importlib
import importlib.util
import random
import sys
import types
import unittest

import peers
import pytest
import torch
from side_by_side import Touch, side_by_side, source_of

pytestmark = pytest.mark.peers

FAMILIES = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters")
EXCEPTIONS: dict[tuple[str, str], str] = {}  # (test, family): why it must fail accelerated
LEFT_OUT = {  # files that the source package lacks, and the mixin that is imported from each
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def _their_mixin() -> type | None:
    """``ModelTesterMixin``; None without the source package or ``parameterized``, which it imports."""
    source = source_of("transformers")
    if source is None or importlib.util.find_spec("parameterized") is None:
        return None
    peers._make_torchvision_importable()
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(source / "tests")]
    sys.modules[package.__name__] = package
    for name, mixin in LEFT_OUT.items():
        module = types.ModuleType(name)
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[f"transformers_tests.{name.split('.')[0]}"] = types.ModuleType(name)
        sys.modules[f"transformers_tests.{name}"] = module
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


class Tester:
    """What their mixin asks of a model: a small configuration and inputs."""

    batch_size, num_hidden_layers, hidden_size, num_attention_heads = 3, 2, 32, 2
    image_size, patch_size, num_masks, mask_length, is_training = 24, 8, 4, 9, True

    def __init__(self, family: str):
        import transformers

        self.make_config = getattr(transformers, f"{family}Config")
        self.seq_length = 10 + {"DeiT": 1, "Dinov2WithRegisters": 4}.get(family, 0)
        self.encoder_seq_length = self.seq_length

    def get_config(self):
        return self.make_config(
            image_size=24, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
            intermediate_size=37, num_labels=3, encoder_stride=8, hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        numbers = [random.random() for _ in range(3 * 3 * 24 * 24)]
        return self.get_config(), {"pixel_values": torch.tensor(numbers).view(3, 3, 24, 24)}


def _suite(family: str) -> type[unittest.TestCase]:
    import transformers

    classes = [getattr(transformers, family + head, None) for head in ("Model", "ForImageClassification")]

    class Suite(THEIRS, unittest.TestCase):
        all_model_classes = tuple(classes)
        test_resize_embeddings = False

        def setUp(self):
            self.model_tester = Tester(family)

    return Suite


@contextlib.contextmanager
def _touched(classes: tuple[type, ...], touch: Touch):
    """Every new model of these classes is touched."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:

            @functools.wraps(cls.__init__)
            def init(self, *args, __init=cls.__init__, **options):
                __init(self, *args, **options)
                touch(self)

            patch.setattr(cls, "__init__", init)
        yield


THEIRS = _their_mixin()
SUITES = {} if THEIRS is None else {family: _suite(family) for family in FAMILIES}
CASES = [(name, family) for family, suite in SUITES.items() for name in dir(suite) if name.startswith("test_")]
CASES = [(name, family) for name, family in CASES if callable(getattr(SUITES[family], name))]


def test_sources():
    if THEIRS is None:
        pytest.skip("no source package of the installed transformers in build/suites: `make test-suites` fetches it")
    assert len(CASES) > 400


@pytest.mark.parametrize(("name", "family"), CASES)
def test_their_case(name, family):
    suite = SUITES[family]

    def run(touch):
        result, random_state = unittest.TestResult(), random.getstate()
        random.seed(0)
        with _touched(suite.all_model_classes, touch):
            suite(name).run(result)
        random.setstate(random_state)
        if result.skipped:
            raise unittest.SkipTest(result.skipped[0][1])
        for _, trace in result.failures + result.errors:
            raise AssertionError(trace.strip().splitlines()[-1] + "\n" + trace)

    side_by_side(run, reason=EXCEPTIONS.get((name, family)))
