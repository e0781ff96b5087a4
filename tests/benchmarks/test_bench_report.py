"""`make report` and `--compare` on samples: invented records in `tests/benchmarks/samples/`. Their device says so.

The expected texts are worked out by hand from the times in the samples.
"""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import compare, records, report

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests/benchmarks/samples"
NONE = Path("none.json")
README = "# Title\n\n<!-- speed -->\nold\n<!-- /speed -->\n\nThe end.\n"


@pytest.fixture
def folder(tmp_path):
    """README.md, and results/sample/ with the files of the first run."""
    shutil.copytree(SAMPLES / "before", tmp_path / "results/sample")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def made(folder, **kw) -> str:
    """The README after a report without plots."""
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
    # 256 / 20 ms. The later run has no memory and no share of the floor. L/16 forward is from both runs.
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
    """A record of a failed gate has no mode. Latency is a separate line, the fastest first."""

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
    """The one line that a command prints when it ends with 2."""
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
    """A killed run leaves a record without a point."""
    lost = {"ok": False, "error": "Traceback\n  line\nstopped after 60 s; what it had found is here"}
    edit(folder / "results/sample/bench_vit.json", lambda found: found["records"].append(lost))
    assert "; vit failed: stopped after 60 s.\n<!--" in made(folder)
    assert "not timed: vit failed: stopped after 60 s (stopped after 60 s; what it had found is here)" in (
        capsys.readouterr().out
    )


# ---- compare ---------------------------------------------------------------------------------------------------------

# Slower: 16 → 20 ms. Faster: 51.2 → 40.96 ms. Noise: timm 25.6 → 26.4 ms, because the intervals touch, and attention
# forward 1.0 → 1.01 ms, because that is 1 %. Backward attention fails in B. A has 19 times, B 10, both 9.
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
    """Nothing is slower. A point that was timed in A fails in B, or is skipped there."""

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
    assert all(len(png) > 15_000 and b"tEXt" not in png and b"tIME" not in png for png in before)  # without a date
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


# ---- more of the table, the records and the comparison ---------------------------------------------------------------


def recorded(*found, **about):
    """Checked records of whole models from these fields."""
    common = {"ok": True, "bench": "vit", "op": "vit", "shape": "vit_base_patch16_224/b256", "dtype": "bfloat16"}
    about = {"gpu": "SAMPLE"} | about
    return records.parse({"about": about, "records": [common | {"img_s": 1.0} | r for r in found]}, NONE)


def cells(of):
    """The cells of the one row of the table."""
    *_, row = report.table(of).splitlines()
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("provider", ["triton", "graph", "accelerated", "accelerated-hf"])
def test_our_kernels_in_another_form_are_no_peer(provider):
    """Such a provider is neither the fastest peer nor the one with the least memory."""
    of = recorded(
        *(
            {"mode": m, "provider": "ours", "ms_p50": 2.0, "img_s": 500.0, "peak_mem_mb": 2048.0}
            for m in ("fwd", "full")
        ),
        *(
            {"mode": m, "provider": provider, "ms_p50": 1.0, "img_s": 900.0, "peak_mem_mb": 1.0}
            for m in ("fwd", "full")
        ),
        *(
            {"mode": m, "provider": "timm", "ms_p50": 5.0, "img_s": 200.0, "peak_mem_mb": 4096.0}
            for m in ("fwd", "full")
        ),
        *(
            {"mode": m, "provider": "hf", "ms_p50": 10.0, "img_s": 100.0, "peak_mem_mb": 8192.0}
            for m in ("fwd", "full")
        ),
    )
    name, *speed, memory = cells(of)
    assert name == "B/16, batch 256, bf16" and speed == ["500", "–", "timm 200: 2.50×"] * 2
    assert memory == "2.00; timm 4.00: 0.500×"


def test_memory_is_that_of_the_step_alone():
    """The memory of a forward does not count. Without ours the cell has the peer and no ratio."""
    of = recorded(
        {"mode": "fwd", "provider": "ours", "ms_p50": 1.0, "peak_mem_mb": 1024.0},
        {"mode": "full", "provider": "timm", "ms_p50": 1.0, "peak_mem_mb": 3072.0},
        {"mode": "fwd", "provider": "timm", "ms_p50": 1.0, "peak_mem_mb": 512.0},
    )
    assert cells(of)[-1] == "–; timm 3.00" and cells(of)[4:7] == ["–", "–", "timm 1.00"]
    assert cells(of[:1])[-1] == "–"


def test_share_and_ratio_need_a_time_of_ours():
    of = recorded(
        {"mode": "fwd", "provider": "ours", "skipped": "memory: 9 GiB more. Of 80"},
        {"mode": "fwd", "provider": "timm", "ms_p50": 1.0, "img_s": 1000.0, "sol_fraction": 0.5},
        {"mode": "full", "provider": "ours", "ms_p50": 1.0, "img_s": 1234.0, "sol_fraction": 0.666},
    )
    assert cells(of)[1:7] == ["skipped: memory", "–", "timm 1,000", "1,230", "67 %", "–"]


def test_models_come_in_the_order_of_the_table_and_dtypes_bf16_first():
    shapes = ["vit_small_patch16_224/b256", "vit_base_patch16_224@64/b64", "vit_tiny_patch16_224/b9"]
    shapes += ["vit_base_patch16_224/b1", "vit_base_patch16_384/b64", "vit_base_patch16_224/b256"]
    of = recorded(*({"shape": s, "mode": "fwd", "provider": "ours", "ms_p50": 1.0} for s in shapes))
    rows = [line.split(",")[:2] for line in report.table(of).splitlines()[2:]]
    assert rows == [
        ["| B/16", " batch 256"], ["| B/16@384", " batch 64"], ["| S/16", " batch 256"], ["| B/16", " batch 1"],
        ["| vit_tiny_patch16_224", " batch 9"],
    ]  # fmt: skip
    of += recorded(*({"dtype": d, "provider": "ours", "ms_p50": 1.0} for d in ("float32", "float16")))
    assert records.dtypes_of(of) == ["bfloat16", "float16", "float32"]
    of = recorded({"bench": "ceiling", "op": "copy", "gbps": 1.0, "dtype": "int32"})
    assert records.dtypes_of(of) == [] and records.label("vit_base_patch16_224@64/b64") == "B/16@64, batch 64"
    assert records.label("vit_large_patch16_224/b8") == "L/16, batch 8"


def test_the_cards_rates_are_the_last_ones_of_the_dtype():
    about = {"bench": "ceiling", "provider": "card"}
    of = recorded(
        about | {"op": "matmul", "dtype": "bfloat16", "tflops": 700.0, "shape": "1"},
        about | {"op": "matmul", "dtype": "bfloat16", "tflops": 800.0},
        about | {"op": "matmul", "dtype": "float32", "tflops": 50.0},
        about | {"op": "copy", "dtype": "int32", "gbps": 3000.0},
        about | {"op": "copy", "dtype": "int32", "gbps": 2.0, "shape": "1", "ok": False},
    )
    assert records.ceilings(of, "bfloat16") == (800.0, 3000.0) and records.ceilings(of, "float32") == (50.0, 3000.0)
    assert records.ceilings(of, "float16") == (None, 3000.0) and records.ceilings(of[:3], "float32") == (50.0, None)


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        ({"ok": False, "error": "Parity: result 0 has rms error 1"}, "failed parity"),
        ({"ok": False, "error": "Traceback\n  line 3\nKeyError: 'x' is missing\n"}, "failed: KeyError"),
        ({"ok": False}, "failed parity"),
        ({"ok": False, "error": "no", "skipped": "yes"}, "failed: no"),
        ({"skipped": "out of memory (9 GiB)"}, "skipped: out of memory"),
        ({"skipped": "not installed. At all"}, "skipped: not installed"),
        ({"skipped": "x" * 90}, "skipped: " + "x" * 60),
        ({"skipped": ""}, None),
        ({"ms_p50": 1.0}, None),
    ],
)
def test_why_a_time_is_missing(found, missing):
    if found == {"skipped": ""}:  # no reason at all
        with pytest.raises(records.ResultError, match="nor a reason"):
            recorded(found | {"provider": "ours"})
        return
    (record,) = recorded(found | {"provider": "ours"})
    assert record.missing == missing and record.timed is (missing is None)


@pytest.mark.parametrize("key", ["ms_p50", "img_s", "tflops", "gbps", "sol_fraction", "peak_mem_mb", "largest_batch"])
@pytest.mark.parametrize("value", [0, -1.0, True, float("inf"), "1", [1]])
def test_every_figure_is_a_positive_number(key, value):
    with pytest.raises(records.ResultError, match=f"record 2: {key} is .* not a positive number"):
        recorded({"ms_p50": 1.0}, {"ms_p50": 1.0, key: value})
    assert recorded({"ms_p50": 1.0, "error_rms": value})  # not a figure of the report


def test_times_are_in_order_each_beside_each():
    for times in ({"ms_p20": 2.0}, {"ms_p80": 0.5}, {"ms_p20": 0.9, "ms_p80": 0.95}):
        with pytest.raises(records.ResultError, match="not in order"):
            recorded({"ms_p50": 1.0} | times)
    assert recorded({"ms_p50": 1.0, "ms_p20": 1.0, "ms_p80": 1.0})[0].ms_p80 == 1.0


def test_a_record_overrules_its_file_and_a_prediction_is_no_card():
    first, second = recorded({"ms_p50": 1.0, "torch": "other"}, {"ms_p50": 1.0}, torch="2", commit="c")
    assert (first.about["torch"], second.about["torch"], first.about["commit"]) == ("other", "2", "c")
    assert first.about.keys() == {"gpu", "driver", "torch", "triton", "commit", "command", "utc"}
    assert first.about["driver"] is None and first.path == NONE
    for kind in ("rehearsal", "predicted"):
        assert recorded({"ms_p50": 1.0, kind: True})[0].about["gpu"] == kind
        assert recorded({"ms_p50": 1.0, kind: False})[0].about["gpu"] == "SAMPLE"


@pytest.mark.parametrize("gpu", ["rehearsal", "predicted", "CPU"])
def test_what_was_not_measured_on_a_gpu_is_no_report(gpu, folder):
    for path in (folder / "results/sample").iterdir():
        edit(path, lambda found: found["about"].update(gpu=gpu))
    with pytest.raises(records.ResultError, match=r"was not measured on a GPU"):
        made(folder)


def test_the_newer_of_two_times_is_by_date_and_then_by_place(tmp_path):
    """Names of files do not count. A file without a date is the oldest."""
    point = {"bench": "linear", "op": "qkv", "provider": "ours"}
    for name, utc, times in (("a", "2026-01-02", (1.0, 2.0)), ("b", "2026-01-01", (3.0,)), ("c", None, (4.0,))):
        found = {"about": {"gpu": "SAMPLE", "utc": utc}, "records": [point | {"ms_p50": t} for t in times]}
        (tmp_path / f"bench_{name}.json").write_text(json.dumps(found))
    (tmp_path / "tune_x.json").write_text("no result")
    assert [r.ms_p50 for r in records.load(tmp_path)] == [2.0]
    (tmp_path / "bench_a.json").unlink()
    assert [r.ms_p50 for r in records.load(tmp_path)] == [3.0]
    assert [r.ms_p50 for r in records.load(tmp_path / "bench_c.json")] == [4.0]


def test_not_timed_groups_by_provider_and_reason():
    of = recorded(
        {"provider": "timm", "mode": "fwd", "skipped": "memory: a"},
        {"provider": "timm", "mode": "full", "skipped": "memory: b"},
        {"provider": "timm", "mode": "fwd", "op": "latency", "skipped": "memory: a"},
        {"provider": "hf", "mode": "fwd", "skipped": "budget"},
        {"provider": "hf", "mode": "full", "ms_p50": 1.0},
    )
    place = "vit_base_patch16_224/b256 bfloat16"
    assert records.not_timed(of) == [
        f"timm skipped: memory: vit {place} fwd/full, latency {place} fwd", f"hf skipped: budget: vit {place} fwd",
    ]  # fmt: skip
    assert records.not_timed(of, full=True)[:2] == [
        f"timm skipped: memory (memory: a): vit {place} fwd, latency {place} fwd",
        f"timm skipped: memory (memory: b): vit {place} full",
    ]


def test_number_of_nothing_and_of_less():
    assert [records.number(x) for x in (0, -1234.0, -0.01234)] == ["0", "-1,230", "-0.0123"]


def test_latencies_are_sorted_by_time_and_of_their_dtype():
    one = {"op": "latency", "shape": "vit_base_patch16_224/b1", "mode": "fwd"}
    of = recorded(
        *(one | {"provider": p, "ms_p50": ms} for p, ms in (("a", 10.0), ("b", 9.0), ("c", 0.5))),
        one | {"provider": "d", "ms_p50": 0.1, "dtype": "float16"},
        one | {"provider": "e", "skipped": "budget"},
    )
    assert report._latency(of, "bfloat16") == "Forward of B/16, batch 1, bf16: c 0.500 ms, b 9.00 ms, a 10.0 ms."
    assert report._latency(of, "float32") == ""


def test_compare_lists_the_slowest_first_and_failures_before_what_was_left_out(tmp_path):
    """Slower points come first. A smaller largest batch counts as slower."""
    common = {"bench": "linear", "op": "qkv", "dtype": "bfloat16"}
    old = [common | {"provider": p, "ms_p50": 10.0} for p in "abcdefg"] + [
        common | {"provider": "n", "largest_batch": 100}
    ]
    new = [common | {"provider": p, "ms_p50": ms} for p, ms in (("a", 11.0), ("b", 30.0), ("c", 5.0), ("d", 10.1))]
    new += [common | {"provider": "e", "ok": True, "skipped": "budget"}, common | {"provider": "f", "ok": False}]
    new += [common | {"provider": "h", "ms_p50": 1.0}, common | {"provider": "n", "largest_batch": 50}]
    for name, found in (("a", old), ("b", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"about": {"gpu": "SAMPLE"}, "records": found}))
    text, code = compare.compare(tmp_path / "a.json", tmp_path / "b.json")
    assert code == 1 and text.splitlines()[2:] == [
        "slower 3.000×  qkv bfloat16 b  10.00 → 30.00 ms",
        "smaller 2.000×  qkv bfloat16 n  100.0 → 50.00 images",
        "slower 1.100×  qkv bfloat16 a  10.00 → 11.00 ms",
        "faster 0.500×  qkv bfloat16 c  10.00 → 5.000 ms",
        "failed parity in B  qkv bfloat16 f",
        "skipped: budget in B  qkv bfloat16 e",
        "5 points compared, 4 changed (3 slower), 3 only in A, 1 only in B",
    ]
    text, code = compare.compare(tmp_path / "b.json", tmp_path / "a.json")
    assert code == 1 and "slower 2.000×  qkv bfloat16 c  5.000 → 10.00 ms" in text and "larger 0.500×" in text


def test_a_missing_folder_is_refused_and_check_writes_nothing(folder, capsys):
    assert "does not exist" in refused(capsys, report.main, "--results", folder / "nowhere", "--check")
    assert "does not exist" in refused(capsys, report.main, "--readme", folder / "NO.md", "--check")
    assert report.report(folder / "results", folder / "README.md", check=True, plots=True, samples=True) == 1
    assert not list((folder / "results/sample").glob("*.png"))
