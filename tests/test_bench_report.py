"""`make report` and `--compare`, on samples: made-up records in `tests/samples/`, whose device says so.

What is expected is written out here, worked out by hand from the times in the samples.
"""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import compare, records, report

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests/samples"
NONE = Path("none.json")
README = "# Title\n\n<!-- speed -->\nold\n<!-- /speed -->\n\nThe end.\n"


@pytest.fixture
def folder(tmp_path):
    """README.md, and results/sample/ with the first run's files."""
    shutil.copytree(SAMPLES / "before", tmp_path / "results/sample")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def made(folder, **kw) -> str:
    """README after a report without plots."""
    kw = {"plots": False, "samples": True} | kw
    assert report.report(folder / "results", folder / "README.md", **kw) == 0
    return (folder / "README.md").read_text()


def edit(path: Path, change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


# ---- the table -------------------------------------------------------------------------------------------------------

# B/16: 256 images in 16.0 ms are 16,000 a second, 256 in 20.0 ms 12,800: 1.25 times; 256 / 51.2 ms = 5,000 and
# 256 / 64 ms = 4,000: 1.25 times. 10,240 MiB are 10 GiB, 16,384 are 16: 0.625 times. L/16: 128 / 32 ms, 128 / 40 ms.
TABLE = """\
# Title

<!-- speed -->
| model | forward, img/s | share of floor | best peer, img/s | forward + backward, img/s | share of floor | best peer, \
img/s | training memory, GiB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| B/16, batch 256, bf16 | 16,000 | 70 % | compile 12,800: 1.25× | 5,000 | 66 % | compile 4,000: 1.25× | 10.0; compile \
16.0: 0.625× |
| L/16, batch 128, bf16 | 4,000 | 62 % | timm 3,200: 1.25× | failed parity | – | – | – |
| H/14, batch 64, bf16 | skipped: budget | – | – | skipped: budget | – | – | – |

SAMPLE, not a measurement, driver 600.00, torch 2.13.0, triton 3.7.1, commit aaaaaaa, `python -m benchmarks`, \
2026-01-02, [bench_vit.json](results/sample/bench_vit.json). Floor: at 800 TFLOP/s and 3,000 GB/s, as this card was \
measured to do.

Not timed: ours failed parity: vit vit_large_patch16_224/b128 bfloat16 full; timm skipped: out of memory: vit \
vit_large_patch16_224/b128 bfloat16 full; ours skipped: budget: vit vit_huge_patch14_224/b64 bfloat16 fwd/full; hf \
skipped: not installed: vit vit_base_patch16_224/b256 bfloat16 fwd/full.
<!-- /speed -->

The end.
"""


def test_table(folder, capsys):
    assert made(folder) == TABLE
    told = capsys.readouterr().out
    assert "not timed: sdpa-cudnn failed parity (parity: rms 0.2): attention" in told
    assert "not timed: timm skipped: out of memory (out of memory: 9 GiB more)" in told
    assert made(folder) == TABLE and "README.md: unchanged" in capsys.readouterr().out


def test_check(folder, capsys):
    args = (folder / "results", folder / "README.md")
    assert report.report(*args, check=True, samples=True) == 1
    assert (folder / "README.md").read_text() == README and "stale" in capsys.readouterr().out
    made(folder)
    assert report.report(*args, check=True, samples=True) == 0
    edit(folder / "results/sample/bench_vit.json", lambda found: found["records"][0].update(img_s=17000.0))
    assert report.report(*args, check=True, samples=True) == 1


def test_the_newest_of_a_point_and_both_sources_named(folder):
    shutil.copy(SAMPLES / "after/bench_vit.json", folder / "results/sample/bench_again.json")
    text = made(folder)
    # 256 / 20 ms; the later run has no memory and no share of floor; L/16 forward is of both runs (ours of the first)
    assert "| B/16, batch 256, bf16 | 12,800 | – | compile 12,800: 1.00× | 6,250 |" in text
    assert "| L/16, batch 128, bf16 | 4,000 | 62 % | timm 3,200: 1.25× |" in text
    assert 0 < text.index("commit aaaaaaa") < text.index("[bench_vit.json]") < text.index("commit bbbbbbb")


def test_a_table_for_each_device_and_dtype(folder):
    shutil.copytree(SAMPLES / "after", folder / "results/second")
    for path in (folder / "results/second").iterdir():
        edit(path, lambda found: found["about"].update(gpu="second SAMPLE"))
        edit(path, lambda found: [r.update(dtype="float16") for r in found["records"]])
    text = made(folder)
    assert text.index("**SAMPLE, not a measurement**") < text.index("| B/16, batch 256, bf16 | 16,000")
    assert text.index("**second SAMPLE**") < text.index("| B/16, batch 256, fp16 | 12,800")


@pytest.mark.parametrize(
    "value, digits, text",
    [(13_649, 3, "13,600"), (999.6, 3, "1,000"), (1.0, 3, "1.00"), (0.34561, 2, "0.35"), (22_717, 2, "23,000"),
     (9.996, 3, "10.0"), (62.4, 2, "62"), (1.25, 2, "1.2")],
)  # fmt: skip
def test_number(value, digits, text):
    assert records.number(value, digits) == text


@pytest.mark.parametrize("text", ["none", "<!-- speed -->", README + README, "<!-- /speed --> <!-- speed -->"])
def test_markers_missing_or_doubled(folder, text):
    (folder / "README.md").write_text(text)
    with pytest.raises(records.ResultError, match="must have one <!-- speed --> and after it one <!-- /speed -->"):
        made(folder)
    assert (folder / "README.md").read_text() == text


def test_latency_and_a_model_that_was_never_admitted(folder):
    """A record of what fails the gate has no mode; latency is a line of its own, the fastest first."""

    def change(found):
        about = {"ok": True, "bench": "vit", "dtype": "bfloat16"}
        one = about | {"op": "latency", "shape": "vit_base_patch16_224/b1", "mode": "fwd", "img_s": 1.0}
        found["records"] += [one | {"provider": p, "ms_p50": ms} for p, ms in (("ours", 2.5), ("graph", 0.4))]
        wrong = {"ok": False, "shape": "vit_small_patch16_224/b256", "provider": "ours", "error": "parity: rms 0.3"}
        found["records"].append(about | {"op": "vit"} | wrong)

    edit(folder / "results/sample/bench_vit.json", change)
    text = made(folder)
    assert "Forward of B/16, batch 1, bf16: graph 0.400 ms, ours 2.50 ms." in text
    assert "| S/16, batch 256, bf16 | failed parity | – | – | failed parity | – | – | – |" in text


def test_records_may_say_themselves_where_they_are_from(folder):
    path = folder / "results/sample/bench_vit.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps([r | found["about"] for r in found["records"]]))
    assert made(folder) == TABLE


def test_nothing_at_all(folder, capsys):
    shutil.rmtree(folder / "results")
    assert made(folder) == README.replace("old", report._NONE) and report._NONE.startswith("Not measured yet: no GPU")
    assert "Nothing is measured: no GPU has written results into" in capsys.readouterr().out


def test_readme_has_what_the_files_give():
    assert report.main(["--check"]) == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, command, *args) -> str:
    """What a command says that ends with 2: one line."""
    assert command([str(arg) for arg in args]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    return told


def test_the_command_refuses_samples(folder, capsys):
    args = ["--results", folder / "results", "--readme", folder / "README.md"]
    assert "samples never go into a report" in refused(capsys, report.main, *args)
    assert (folder / "README.md").read_text() == README


def test_a_readme_that_is_a_folder(tmp_path, capsys):
    assert refused(capsys, report.main, "--readme", tmp_path, "--check") == f"{tmp_path}: Is a directory\n"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda f: [r.update(predicted=True) for r in f["records"]], "different devices: .* predicted"),
        (lambda f: f["records"][0].update(rehearsal=True), "different devices: .* rehearsal"),
        (lambda f: f["about"].update(gpu="second SAMPLE"), "devices: SAMPLE, not a measurement, second SAMPLE"),
        (lambda f: f["about"].update(gpu=None), "about.gpu, the device, is missing"),
        (lambda f: f["about"].update(torch=2), "about.torch is not text"),
        (lambda f: f.pop("about"), 'no "about"'),
        (lambda f: f.update(records={}), 'no list "records"'),
        (lambda f: f["records"].insert(1, 7), "record 2: is not an object"),
        (lambda f: f["records"][0].update(ms_p50="16"), "record 1: ms_p50 is '16', not a positive number"),
        (lambda f: f["records"][0].update(ms_p50=float("nan")), "record 1: ms_p50 is nan"),
        (lambda f: f["records"][0].update(ms_p20=17.0), "ms_p20, ms_p50, ms_p80 are not in order"),
        (lambda f: f["records"][0].pop("ms_p50"), "has neither ms_p50 nor largest_batch, nor a reason"),
        (lambda f: f["records"][0].pop("img_s"), "img_s is missing"),
        (lambda f: f["records"][0].pop("op"), "op is missing"),
        (lambda f: f["records"][0].update(provider=3), "provider is not text"),
    ],
)
def test_wrong_content(folder, change, told, capsys):
    edit(folder / "results/sample/bench_vit.json", change)
    with pytest.raises(records.ResultError, match=told) as error:
        made(folder)
    assert len(str(error.value).splitlines()) == 1
    assert (folder / "README.md").read_text() == README


def test_damaged_files(folder, capsys):
    path = folder / "results/sample/bench_vit.json"
    path.write_text(path.read_text()[:700])
    args = ["--results", folder / "results", "--readme", folder / "README.md"]
    assert "bench_vit.json is not whole JSON" in refused(capsys, report.main, *args)
    assert "bench_vit.json is not whole JSON" in refused(capsys, compare.main, path.parent, SAMPLES / "after")


def test_what_ended_a_run_is_told(folder, capsys):
    """A record that a killed run leaves has no point of its own."""
    lost = {"ok": False, "error": "Traceback\n  line\nstopped after 60 s; what it had found is here"}
    edit(folder / "results/sample/bench_vit.json", lambda found: found["records"].append(lost))
    assert "; vit failed: stopped after 60 s.\n<!--" in made(folder)
    assert "not timed: vit failed: stopped after 60 s (stopped after 60 s; what it had found is here)" in (
        capsys.readouterr().out
    )


# ---- compare ---------------------------------------------------------------------------------------------------------

# Slower: 16 → 20 ms. Faster: 51.2 → 40.96 ms. Noise: timm 25.6 → 26.4 ms, whose intervals touch; attention forward
# 1.0 → 1.01 ms, apart but 1 %. Backward attention fails in B. Timed in A 19, in B 10, in both 9.
COMPARED = """\
A: SAMPLE, not a measurement, driver 600.00, torch 2.13.0, triton 3.7.1, commit aaaaaaa, command python -m benchmarks, \
2026-01-02T12:00:00+00:00
B: SAMPLE, not a measurement, driver 600.00, torch 2.13.0, triton 3.7.1, commit bbbbbbb, command python -m benchmarks, \
2026-01-03T12:00:00+00:00
slower 1.250×  vit vit_base_patch16_224/b256 bfloat16 fwd ours  16.00 → 20.00 ms
faster 0.800×  vit vit_base_patch16_224/b256 bfloat16 full ours  51.20 → 40.96 ms
failed parity in B  attention vit_base_patch16_224/b256 bfloat16 bwd ours
9 points compared, 2 changed (1 slower), 10 only in A, 1 only in B"""


def test_compare():
    assert compare.compare(SAMPLES / "before", SAMPLES / "after") == (COMPARED, 1)


def test_compare_with_itself(capsys):
    assert compare.main([str(SAMPLES / "before")] * 2) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "19 points compared, 0 changed (0 slower), 0 only in A, 0 only in B"
    assert told[2:-1] == ["ceiling: 800.0 → 800.0 TFLOP/s bfloat16", "ceiling: 3,000 → 3,000 GB/s"]


@pytest.mark.parametrize(
    "old, new, ratio",
    [
        ((9.9, 10, 10.1), (10.3, 10.4, 10.5), 1.04),
        ((9.9, 10, 10.1), (10.1, 10.4, 10.5), None),  # they touch
        ((9.99, 10, 10.01), (10.1, 10.15, 10.2), None),  # apart, 1.5 %
        ((10.3, 10.4, 10.5), (9.9, 10, 10.1), 10 / 10.4),
        ((None, 10, None), (None, 10.3, None), 1.03),
    ],
)
def test_rule_of_noise(folder, old, new, ratio):
    def one(times):
        point = {"bench": "linear", "op": "qkv", "provider": "ours"} | dict(
            zip(("ms_p20", "ms_p50", "ms_p80"), times, strict=True)
        )
        return records.parse({"about": {"gpu": "SAMPLE"}, "records": [point]}, NONE)[0]

    assert compare.change(one(old), one(new)) == (None if ratio is None else pytest.approx(ratio))


@pytest.mark.parametrize(("lost", "code"), [({"error": "parity: rms 0.2"}, 1), ({"skipped": "budget"}, 0)])
def test_compare_fails_for_a_point_that_fails_alone(lost, code, folder, capsys):
    """Nothing is slower; what was timed in A fails in B, or was left out there."""

    def lose(found):
        timed = next(r for r in found["records"] if r.get("ms_p50"))
        for key in ("ms_p20", "ms_p50", "ms_p80", "img_s", "sol_fraction", "tflops", "gbps", "peak_mem_mb"):
            timed.pop(key, None)
        timed.update(lost, ok=not lost.get("error"))

    edit(folder / "results/sample/bench_vit.json", lose)
    assert compare.main([str(SAMPLES / "before"), str(folder / "results/sample")]) == code
    assert "18 points compared, 0 changed (0 slower), 1 only in A" in capsys.readouterr().out


def test_compare_counts_a_smaller_largest_batch(folder):
    def halve(found):
        (record,) = [r for r in found["records"] if r.get("largest_batch") == 8000]
        record["largest_batch"] = 5000

    edit(folder / "results/sample/bench_vit.json", halve)
    text, code = compare.compare(SAMPLES / "before", folder / "results/sample")
    assert code == 1 and "smaller 1.600×  largest_batch vit_base_patch16_224@64/b2048" in text
    assert "8,000 → 5,000 images" in text
    text, code = compare.compare(folder / "results/sample", SAMPLES / "before")
    assert code == 0 and "larger 0.625×" in text


def test_compare_other_devices_and_dtypes(folder, capsys):
    for path in (folder / "results/sample").iterdir():
        edit(path, lambda found: found["about"].update(gpu="second SAMPLE"))
        edit(path, lambda found: [r.update(dtype="float16") for r in found["records"]])
    args = [str(SAMPLES / "before"), str(folder / "results/sample")]
    told = refused(capsys, compare.main, *args)
    assert "different devices" in told and "--across-devices" in told
    assert compare.main([*args, "--across-devices"]) == 0
    told = capsys.readouterr().out
    assert "The devices differ" in told and "The dtypes differ (A has bfloat16, B float16)" in told
    assert "0 points compared, 0 changed (0 slower), 19 only in A, 19 only in B" in told


def test_compare_wrong_arguments(tmp_path, capsys):
    assert "has no bench_*.json" in refused(capsys, compare.main, tmp_path, SAMPLES / "after")
    assert "none.json: No such file" in refused(capsys, compare.main, tmp_path / "none.json", SAMPLES / "after")


# ---- plots -----------------------------------------------------------------------------------------------------------


def test_plots(folder, capsys):
    pytest.importorskip("matplotlib")
    made(folder, plots=True)
    paths = sorted((folder / "results/sample").glob("*.png"))
    assert [path.name for path in paths] == ["models.png", "ops.png", "roofline.png", "sides.png"]
    before = [path.read_bytes() for path in paths]
    assert all(len(png) > 15_000 and b"tEXt" not in png and b"tIME" not in png for png in before)  # no date in them
    for path in paths:
        path.unlink()
    made(folder, plots=True)
    assert [path.read_bytes() for path in paths] == before
    assert capsys.readouterr().out.count("left out") == 0


def test_bars_are_as_high_as_the_records():
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    figure = plots.models(records.load(SAMPLES / "before"), "bfloat16")
    base = figure.axes[0]
    assert sorted(round(bar.get_height()) for bar in base.patches) == [10_000, 12_800, 16_000]
    assert base.get_lines()[0].get_ydata()[0] == pytest.approx(16_000 / 0.7)  # the floor
    assert sum(text.get_text() == "–" for text in base.texts) == 1  # hf: skipped
    assert [text.get_text() for text in figure.axes[4].texts if text.get_text() in "×–"] == ["×", "–"]  # L/16, full


def test_without_matplotlib(folder, monkeypatch, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert made(folder, plots=True) == TABLE
    assert "Plots left out: no matplotlib here; pip install" in capsys.readouterr().out
    assert not list((folder / "results/sample").glob("*.png"))
