"""Our own cases of what the libraries' tests and users do with a model, on small models of each library."""

import cases_calls  # noqa: F401 (each enters its cases into CASES)
import cases_copies  # noqa: F401
import cases_graphs  # noqa: F401
import cases_hooks  # noqa: F401
import cases_others  # noqa: F401
import cases_timm  # noqa: F401
import pytest
from side_by_side import side_by_side
from subject import HEAVY, MODELS, SINGLE_SOFTMAX, Subject
from table import CASES

pytestmark = pytest.mark.peers

MAPS = "it returns the maps, where transformers returns none under SDPA"
EXCEPTIONS = {  # (case, model): why it cannot pass accelerated; if it passes, that is a failure
    (case, f"hf {model} sdpa"): MAPS for case in ("attentions", "tuples") for model in ("ViT", "Dinov2WithRegisters")
}
PAIRS = [
    (name, model)
    for name, case in CASES.items()
    for model in MODELS
    if model.split()[0] in case.only.split() and (model in HEAVY or not case.heavy)
]
# Cases where views and in-place writes, which the CPU path accepts, may break the kernels.
IN_KERNELS = (
    "backward",
    "forward_hooks_see_every_module",
    "in_place_after_linears",
    "results_written_in_place",
    "shallow_copies_of_parts",
)


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_case(name, model):
    case = CASES[name]
    limit = max(case.limit, 1e-5 if model in SINGLE_SOFTMAX else 0)
    side_by_side(lambda touch: case.run(Subject(model, touch)), limit, EXCEPTIONS.get((name, model)))


@pytest.mark.interpreted
@pytest.mark.parametrize("model", HEAVY)
@pytest.mark.parametrize("name", IN_KERNELS)
def test_case_in_kernels(name, model):
    case = CASES[name]
    side_by_side(lambda touch: case.run(Subject(model, touch)), case.limit, impl="triton")
