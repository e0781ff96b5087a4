"""The prediction is what the code counts; and `make report` on the kind of records that `make bench` writes."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import prediction, report  # noqa: E402
from benchmarks.records import load  # noqa: E402
from benchmarks.shapes import SMALL  # noqa: E402

RUN = ROOT / "tests/samples/not_everybody_ran"
PREDICTION = ROOT / "benchmarks/prediction/prediction.json"
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Name\n\n<!-- speed -->\nold\n<!-- /speed -->\nrest\n")
    return path


def made(results, readme, **options):
    return report.report(results, readme, Path("none"), samples=True, **({"plots": False} | options))


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table(readme):
    """Every figure by hand: 256 images in 16.0 ms are 16,000 a second, in 50 ms 5,120; 10,240 MiB are 10 GiB."""
    assert made(RUN, readme) == 0
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


def test_what_is_no_measurement_is_refused(tmp_path, readme, capsys):
    arguments = ["--readme", str(readme), "--no-plots"]
    assert report.main(["--results", str(RUN), *arguments]) == 2
    assert "is a sample (SAMPLE, not a measurement): samples never go into a report" in capsys.readouterr().err
    folder = tmp_path / "results/some-gpu"
    folder.mkdir(parents=True)
    for change, said in (
        ({"gpu": "rehearsal"}, "was not measured on a GPU (rehearsal)"),
        ({"gpu": "Some GPU", "predicted": True}, "was not measured on a GPU (predicted)"),
    ):
        found = json.loads((RUN / "bench_vit.json").read_text())
        found["about"]["gpu"] = change["gpu"]
        found["records"] = [r | change for r in found["records"]]
        (folder / "bench_vit.json").write_text(json.dumps(found))
        assert report.main(["--results", str(tmp_path / "results"), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert "old" in readme.read_text()


def test_records_may_say_themselves_where_they_are_from(tmp_path, readme):
    found = json.loads((RUN / "bench_vit.json").read_text())
    flat = [r | found["about"] for r in found["records"]]
    (tmp_path / "bench_vit.json").write_text(json.dumps(flat))
    assert made(tmp_path, readme) == 0
    text = readme.read_text()
    made(RUN, readme)
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
    alone = dataclasses.replace(bench, providers={"ours": bench.providers["ours"]})
    assert {r["provider"] for r in prediction.of_op(alone, SMALL, rates)} == {"ours (predicted)"}


def test_the_same_prediction_keeps_its_file(tmp_path, monkeypatch, capsys):
    """Its commit and date, too: README names them."""
    monkeypatch.setattr(sys, "argv", ["prediction"])
    monkeypatch.setattr(prediction, "FILE", tmp_path / "prediction.json")
    texts = []
    for ms, date in ((1.0, "2001-01-01"), (1.0, "2001-01-02"), (2.0, "2001-01-03")):
        monkeypatch.setattr(prediction, "records", lambda *_, ms=ms: [{"ms_p50": ms}])
        monkeypatch.setattr(prediction, "utc", lambda date=date: date)
        assert prediction.main() == 0
        texts.append(prediction.FILE.read_text())
    assert texts[0] == texts[1] != texts[2] and "2001-01-01" in texts[1] and "2001-01-03" in texts[2]
    assert ["unchanged" in line for line in capsys.readouterr().out.splitlines()] == [False, True, False]


def test_a_readme_that_is_a_folder(tmp_path, capsys):
    assert report.main(["--readme", str(tmp_path), "--check"]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: Is a directory\n"


def test_readme_has_what_the_files_give():
    assert report.main(["--check"]) == 0


# ---- plots -----------------------------------------------------------------------------------------------------------


@needs_matplotlib
def test_bars_are_as_high_as_the_records(monkeypatch):
    from benchmarks import plots

    figure = plots.models(load(RUN), "bfloat16")
    forward, huge = figure.axes[:2]
    assert sorted(round(bar.get_height()) for bar in forward.patches) == [12_800, 14_222, 16_000]
    assert forward.get_lines()[0].get_ydata()[0] == pytest.approx(16_000 / 0.7)  # the floor
    assert [text.get_text() for text in huge.texts if text.get_text() in "×–"] == ["×"]  # ours failed there
    assert sum(text.get_text() == "–" for text in forward.texts) == 2  # timm, hf: skipped
