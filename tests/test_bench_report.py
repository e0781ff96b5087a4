"""`make report` and `--compare`, on made-up records: what they say, and that a sample never becomes a figure."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compare, prediction, report  # noqa: E402
from benchmarks.records import ResultError, load  # noqa: E402
from benchmarks.shapes import SMALL  # noqa: E402

SAMPLES = ROOT / "tests/samples"
BEFORE, AFTER = SAMPLES / "before", SAMPLES / "after"
PREDICTION = ROOT / "benchmarks/prediction/prediction.json"
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Name\n\n<!-- speed -->\nold\n<!-- /speed -->\nrest\n")
    return path


def made(results, readme, **options):
    return report.report(results, readme, Path("none"), samples=True, **({"plots": False} | options))


def test_samples_say_that_they_are():
    files = sorted(SAMPLES.glob("*/*.json"))
    assert len(files) == 3
    assert all(json.loads(f.read_text())["about"]["gpu"] == "SAMPLE, not a measurement" for f in files)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table(readme):
    """Every figure by hand: 256 images in 16.0 ms are 16,000 a second, in 50 ms 5,120; 10,240 MiB are 10 GiB."""
    assert made(BEFORE, readme) == 0
    before, _, rest = readme.read_text().partition("<!-- speed -->")
    text, _, after = rest.partition("<!-- /speed -->")
    assert before == "# Name\n\n" and after == "\nrest\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][0] == "model" and "predict" not in text.lower()
    assert rows[1] == [
        "B/16, batch 256, bf16",
        "16,000", "70 %", "compile 14,200: 1.12×",  # 256 / 18 ms; 18 / 16
        "5,120", "65 %", "compile 4,270: 1.20×",  # 256 / 60 ms; 60 / 50
        "10.0; compile 16.0: 0.625×",  # the peer that needs least
    ]  # fmt: skip
    # 64 images in 32 ms; ours has no time because it failed, and nobody's backward was measured.
    assert rows[2] == ["H/14, batch 64, bf16", "failed parity", "–", "reference 2,000", "failed parity", "–", "–", "–"]
    for told in ("driver 1.0", "torch 2.0", "triton 3.0", "commit aaaaaaa", "`python -m benchmarks`", "2001-01-01"):
        assert told in text
    assert "at 800 TFLOP/s and 3,000 GB/s, as this card was measured to do" in text
    assert "Forward of B/16, batch 1, bf16: graph 0.400 ms, compile-reduce 0.600 ms, ours 2.50 ms." in text
    assert "timm skipped: not installed" in text and "hf skipped: parity" in text and "ours failed parity" in text


def test_the_report_changes_nothing_twice(readme, capsys):
    assert made(BEFORE, readme, check=True) == 1 and readme.read_text().splitlines()[3] == "old"
    assert made(BEFORE, readme) == 0
    once = readme.read_bytes()
    assert made(BEFORE, readme) == 0 and readme.read_bytes() == once
    assert made(BEFORE, readme, check=True) == 0
    readme.write_bytes(once.replace(b"16,000", b"16,100"))  # a number typed by hand
    assert made(BEFORE, readme, check=True) == 1
    assert "is stale: run `make report`" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- speed -->", "<!-- /speed --><!-- speed -->", "<!-- speed -->" * 2 + "<!-- /speed -->"]
)
def test_markers_must_be_there_once(readme, text):
    readme.write_text(text)
    with pytest.raises(ResultError, match="the README must have one <!-- speed -->"):
        made(BEFORE, readme)
    assert readme.read_text() == text


def test_what_is_no_measurement_is_refused(tmp_path, readme, capsys):
    arguments = ["--readme", str(readme), "--no-plots"]
    assert report.main(["--results", str(BEFORE), *arguments]) == 2
    assert "is a sample (SAMPLE, not a measurement): samples never go into a report" in capsys.readouterr().err
    folder = tmp_path / "results/some-gpu"
    folder.mkdir(parents=True)
    for change, said in (
        ({"gpu": "rehearsal"}, "was not measured on a GPU (rehearsal)"),
        ({"gpu": "Some GPU", "predicted": True}, "was not measured on a GPU (predicted)"),
    ):
        found = json.loads((BEFORE / "bench_vit.json").read_text())
        found["about"]["gpu"] = change["gpu"]
        found["records"] = [r | change for r in found["records"]]
        (folder / "bench_vit.json").write_text(json.dumps(found))
        assert report.main(["--results", str(tmp_path / "results"), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert "old" in readme.read_text()


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"about": {"gpu": "x"}, "records": [', "is not whole JSON"),
        ('{"records": []}', 'no "about"'),
        ('{"about": {"gpu": "x"}}', 'no list "records"'),
        ('{"about": {}, "records": []}', "about.gpu, the device, is missing"),
        ('{"about": {"gpu": "x"}, "records": [{"bench": "mlp", "op": "mlp"}]}', "record 1: has neither ms_p50 nor"),
        ('{"about": {"gpu": "x"}, "records": [{"bench": "mlp", "op": "mlp", "ms_p50": -1}]}', "not a positive number"),
        ('{"about": {"gpu": "x"}, "records": [{"bench": "mlp", "op": "mlp", "ms_p50": NaN}]}', "not a positive number"),
    ],
)
def test_damaged_files_are_named(tmp_path, readme, capsys, content, said):
    (tmp_path / "bench_mlp.json").write_text(content)
    assert report.main(["--results", str(tmp_path), "--readme", str(readme), "--no-plots"]) == 2
    error = capsys.readouterr().err
    assert said in error and "bench_mlp.json" in error and len(error.splitlines()) == 1
    assert compare.main([str(BEFORE), str(tmp_path)]) == 2


def test_records_may_say_themselves_where_they_are_from(tmp_path, readme):
    found = json.loads((BEFORE / "bench_vit.json").read_text())
    flat = [r | found["about"] for r in found["records"]]
    (tmp_path / "bench_vit.json").write_text(json.dumps(flat))
    assert made(tmp_path, readme) == 0
    text = readme.read_text()
    made(BEFORE, readme)
    assert text.split("[bench_vit.json]")[0] == readme.read_text().split("[bench_vit.json]")[0] and "16,000" in text


# ---- the prediction --------------------------------------------------------------------------------------------------


def test_a_prediction_is_called_one_everywhere(readme, tmp_path, capsys):
    assert report.report(tmp_path / "none", readme, PREDICTION, plots=False) == 0
    text = readme.read_text()
    assert (
        "Not measured yet: no GPU has run the kernels. Prediction, what counted bytes and FLOPs allow at most" in text
    )
    heads = next(line for line in text.splitlines() if line.startswith("| PREDICTION, not measured"))
    assert all("(predicted)" in head or head.strip() == "share of floor" for head in heads.split("|")[2:-1])
    assert "what follows is the prediction" in capsys.readouterr().out


def test_without_anything_there_is_no_figure(readme, tmp_path):
    assert made(tmp_path / "none", readme) == 0
    assert "<!-- speed -->\nNot measured yet: no GPU has run the kernels.\n<!-- /speed -->" in readme.read_text()


def test_the_prediction_is_what_the_code_counts():
    """The committed file, for B/16, and again from the code: stale figures are no figures."""
    committed = {r.point: r for r in load(PREDICTION)}
    shapes = [prediction.MODELS["B/16"]]
    for r in prediction.records(shapes, (), ops=True):
        point = (r["bench"], r["op"], r["shape"], r["dtype"], r.get("mode", ""), r["provider"])
        kept = committed[point]
        assert kept.predicted
        for name in ("ms_p50", "img_s", "peak_mem_mb", "sol_fraction", "tflops", "gbps"):
            right = pytest.approx(r[name], rel=1e-5) if name in r else None
            assert getattr(kept, name) == right, (point, name)


def test_a_prediction_by_hand():
    """LayerNorm forward reads x and writes y, 2 bytes an element, with weight and bias."""
    bench = next(b for b in prediction.plan.benches("layer_norm") if b.op == "layer_norm")
    rates = prediction.Ceilings(tflops=800, gbps=3000)
    (ours, *_) = prediction.of_op(bench, SMALL, rates)
    x = 2 * 17 * 192 * 2
    assert ours["ms_p50"] == pytest.approx((2 * x + 2 * 192 * 2) / 3000 / 1e6)
    assert ours["provider"] == "ours (predicted)" and ours["predicted"] and "tflops" not in ours


def test_readme_has_what_the_files_give():
    assert report.main(["--check"]) == 0


# ---- plots -----------------------------------------------------------------------------------------------------------


@needs_matplotlib
def test_plots(tmp_path):
    from PIL import Image

    from benchmarks.plots import draw

    said = draw(load(BEFORE), tmp_path)
    names = {"models.png", "ops.png", "roofline.png", "sides.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names and all(line.endswith("written") for line in said)
    for name in names:
        image = Image.open(tmp_path / name).convert("RGB")
        assert len(image.getcolors(1 << 24)) > 50 and image.width > 400  # something is drawn
    assert all(line.endswith("unchanged") for line in draw(load(BEFORE), tmp_path))  # the same bytes


@needs_matplotlib
def test_bars_are_as_high_as_the_records(monkeypatch):
    from benchmarks import plots

    figure = plots.models(load(BEFORE), "bfloat16")
    forward, huge = figure.axes[:2]
    assert sorted(round(bar.get_height()) for bar in forward.patches) == [12_800, 14_222, 16_000]
    assert forward.get_lines()[0].get_ydata()[0] == pytest.approx(16_000 / 0.7)  # the floor
    assert [text.get_text() for text in huge.texts if text.get_text() in "×–"] == ["×"]  # ours failed there
    assert sum(text.get_text() == "–" for text in forward.texts) == 2  # timm, hf: skipped


def test_without_matplotlib_the_table_is_made(readme, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find_spec(name))
    assert made(BEFORE, readme, plots=True) == 0 and "16,000" in readme.read_text()
    assert "Plots left out: no matplotlib here; pip install -c constraints.txt matplotlib" in capsys.readouterr().out


# ---- compare ---------------------------------------------------------------------------------------------------------


def test_compare():
    """Backward of ours 10 % slower, cuDNN's forward 20 % faster; eager's full is gone. What is noise: ours 1 % slower
    forward, cuDNN's full 1 % slower though far beyond its percentiles, eager's backward 5 % slower but within them."""
    text, code = compare.compare(BEFORE / "bench_attention.json", AFTER)
    lines = text.splitlines()
    assert code == 1 and lines[-1] == "8 points compared, 2 changed (1 slower), 1 only in A, 0 only in B"
    assert lines[-3].split() == [
        "slower", "1.100×", "attention", "vit_base_patch16_224/b256", "bfloat16", "bwd", "ours", "0.4000", "→",
        "0.4400", "ms",
    ]  # fmt: skip
    assert lines[-2].startswith("faster 0.800×") and "sdpa-cudnn" in lines[-2]
    text, code = compare.compare(BEFORE, BEFORE)
    assert code == 0 and ", 0 changed" in text


def test_compare_counts_a_new_failure_and_refuses_another_device(tmp_path, capsys):
    found = json.loads((AFTER / "bench_attention.json").read_text())
    found["records"] = [r for r in found["records"] if r.get("provider") != "ours"]
    failed = {"bench": "attention", "op": "attention", "shape": "vit_base_patch16_224/b256", "dtype": "bfloat16"}
    found["records"].append(failed | {"ok": False, "mode": "fwd", "provider": "ours", "error": "parity: nan"})
    shutil.copytree(AFTER, tmp_path / "c")
    (tmp_path / "c/bench_attention.json").write_text(json.dumps(found))
    text, code = compare.compare(AFTER, tmp_path / "c")
    assert code == 1 and "failed parity in B" in text
    found["about"]["gpu"] = "SAMPLE of another device"
    (tmp_path / "c/bench_attention.json").write_text(json.dumps(found))
    assert compare.main([str(AFTER), str(tmp_path / "c")]) == 2
    assert "different devices" in capsys.readouterr().err
    assert compare.main([str(AFTER), str(tmp_path / "c"), "--across-devices"]) == 1
    assert compare.main([str(AFTER), str(tmp_path / "nowhere")]) == 2
