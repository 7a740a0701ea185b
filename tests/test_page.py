"""report.html: what the record says is on the page, nothing on it leads elsewhere, and it stays small."""

import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import statprune
from statprune import Recipe
from statprune.checkpoint import RECORD, save, verify
from statprune.commands.cli import main
from statprune.errors import CheckpointError
from statprune.loading import load_model
from statprune.methods.patterns import NM
from statprune.page import PAGE, render, render_folder, write_page
from statprune.page.document import pictured
from statprune.page.panels import MOST_COLUMNS, MOST_ROWS, panels
from statprune.page.pictures import Around, Scale, overview, percent, zoom
from statprune.training.masks import remeasure

BATCHES = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))]
PERPLEXITY = {"dense": 9.25, "pruned": 10.5, "text": ["/home/somebody/held-out.txt"], "windows": 1200, "seqlen": 512}
LEADS_ELSEWHERE = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Texts, tags, attributes and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.attributes, self.texts = html, [], [], []
        self.cells: list[list[str]] = []
        self._is_cell = False
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "tr":
            self.cells.append([])
        self._is_cell = tag in ("td", "th") or (tag in ("code", "i") and self._is_cell)
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.texts.append(data)
        if self._is_cell:
            self.cells[-1][-1] += data

    def handle_endtag(self, tag):
        if tag in ("table", "tbody", "thead"):
            self._is_cell = False

    def row(self, first: str) -> list[str]:
        return next(row for row in self.cells if row and row[0] == first)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model_folder):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES, Recipe("cvr+energy", "2:4"))
    report.perplexity = PERPLEXITY
    protocol = {"model": "/home/somebody/tiny", "calibration": ["/home/somebody/train.txt"], "seed": 7}
    return save(model, report, tmp_path_factory.mktemp("out") / "sparse", protocol=protocol)


@pytest.fixture
def record(saved):
    return json.loads((saved / RECORD).read_text())


def site(name: str, **values):
    found = {
        "name": name, "shape": [8, 8], "num_zeros": 32, "sparsity": 0.5, "energy_before": 2.0, "energy_after": 1.0,
        "pattern": None, "output_error": 0.1,
    }  # fmt: skip
    return {**found, **values}


def llama_sites(num_blocks: int):
    kinds = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    return [
        site(f"model.layers.{block}.{kind}", output_error=0.01 * (block % 30) + 0.03 * place, energy_after=1 + 0.1 * place,
             sparsity=0.4 + 0.02 * place)
        for block in range(num_blocks)
        for place, kind in enumerate(kinds)
    ]  # fmt: skip


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_record_says(saved, record):
    page = Page((saved / PAGE).read_text())
    for text in (
        "tiny, sparse", "Pruned with cvr+energy at 2:4.", "50.00 %", "10.50", "9.25 dense, +13.5 %",
        "Measured on held-out.txt in 1,200 windows of 512 tokens", "10.5000", "walk", "train.txt", "alpha: 0.5",
        f"{100 * record['energy_ratio']:.1f} %", torch.__version__, "exponent: 0.25",
    ):  # fmt: skip
        assert text in page.text, text
    assert "somebody" not in page.html
    assert page.row("model.embed_tokens")[1:] == ["300 x 16", "1", "embedding"]
    assert page.row("lm_head")[-1] == "feeds the output"
    for one in record["sites"]:
        shape, zeros, error, energy = page.row(one["name"])[1:]
        assert shape == " x ".join(map(str, one["shape"]))
        assert float(zeros) == 50
        assert float(error) == pytest.approx(100 * one["output_error"], abs=0.006)
        assert float(energy) == pytest.approx(100 * one["energy_after"] / one["energy_before"], abs=0.06)
    errors = [row[1] for row in page.cells if row and row[0] == "down_proj"]
    assert errors[0] == percent(record["sites"][-1]["output_error"])


def test_the_steps_have_their_time_and_memory(record):
    record |= {"seconds": {"trace": 1.25, "walk": 4000.0}, "memory": {"trace": 10**9, "walk": 2 * 10**9}}
    page = Page(render(record))
    for text in ("Time and memory", "1.2 s", "1 h 06 min", "1.00 GB", "2.00 GB"):
        assert text in page.text, text
    widths = [style for _, name, style in page.attributes if name == "style" and style.startswith("width")]
    assert widths[-2:] == ["width:50.0%", "width:100.0%"]
    assert "Peak memory" not in Page(render({**record, "memory": {}})).text


def test_it_is_read_again_from_the_folder_the_same(saved):
    record = verify(saved)
    assert PAGE in record["files"]
    assert render_folder(record, saved) == (saved / PAGE).read_text()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schedule": "no statistics"}, "looks at weights alone"),
        ({"finetuning_steps": 5}, "were trained after pruning"),
        ({}, "Output errors: not measured"),
    ],
)
def test_where_there_are_no_errors_it_says_why(record, change, text):
    for one in record["sites"]:
        one["output_error"] = None
    page = Page(render({**record, **change}))
    assert text in page.text
    assert "Output error, %" not in page.text


def test_the_errors_of_some_layers_may_be_unknown(record):
    record["sites"][0]["output_error"] = None
    page = Page(render(record))
    assert "Not known of 1 layer." in page.text
    assert page.row("q_proj")[1] == ""


def test_sparsities_are_a_picture_where_layers_differ(record):
    assert "50.00 % in every layer" in Page(render(record)).text
    record["sites"] = llama_sites(4)
    page = Page(render(record))
    assert "Zeros, %" in page.text
    assert [row for row in page.cells if row[:1] == ["o_proj"]][2] == ["o_proj", "46", "46", "46", "46", "46"]


def test_no_layer_at_all():
    report = statprune.api.PruningPlan().report
    report.recipe = Recipe(pattern="0%").to_dict()
    page = Page(render(report.to_dict()))
    assert "No layer was pruned." in page.text
    assert "in 0 layers" in page.text


OPTIONAL = ("perplexity", "protocol", "seconds", "memory", "versions", "base", "num_tokens", "schedule", "chosen_by",
            "fallback_reason", "finetuning_steps", "left_out", "files", "digest")  # fmt: skip


@pytest.mark.parametrize("missing", [*((name,) for name in OPTIONAL), OPTIONAL])
def test_an_older_record_lacks_something(record, missing):
    for name in missing:
        del record[name]
    for one in record["sites"]:
        del one["output_error"], one["pattern"]
    page = Page(render(record))
    assert "Every layer" in page.text
    assert "None" not in page.text


def test_what_was_written_into_the_protocol_may_be_anything(record):
    record["perplexity"] = {"dense": None, "pruned": 0.0, "text": "a.txt", "windows": "many", "seqlen": None}
    record["protocol"] = {"model": 5, "calibration": None, "odd": {"a": [1, 2]}}
    assert "{'a': [1, 2]}" in Page(render(record)).text


# --- what it must not do ---------------------------------------------------------------------------------------------


def leads_elsewhere(page: Page) -> list[object]:
    bad = [one for one in page.attributes if one[1] in LEADS_ELSEWHERE or one[1].startswith("on")]
    bad += [tag for tag in page.tags if tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form")]
    return bad + re.findall(r"@import|https?:|url\((?!#)[^)]*\)", page.html)


def test_nothing_leads_elsewhere_and_nothing_runs(saved):
    assert leads_elsewhere(Page((saved / PAGE).read_text())) == []
    assert len(leads_elsewhere(Page('<a href="x"><script></script><p onclick="x" style="background:url(https://a)">'))) == 4


def test_names_are_text(record):
    evil = "</style><script>alert(1)</script><b title='\"&amp;"
    record["sites"] = [site(f"a.0.{evil}", output_error=0.5), site(evil, output_error=0.1), site(f"{evil}.1.b")]
    record["left_out"] = [{"name": evil, "shape": [1, 2], "reason": evil}]
    record["protocol"] = {evil: evil, "model": evil, "calibration": [evil]}
    record["perplexity"] = {**PERPLEXITY, "text": [evil]}
    record["seconds"] = record["memory"] = {evil: 1}
    record["versions"], record["schedule"], record["fallback_reason"] = {evil: evil}, evil, evil
    record["recipe"]["criterion"]["name"] = evil
    record["base"] = {"name": evil}
    page = Page(render(record, torch.ones(8, 8, dtype=torch.bool)))
    assert leads_elsewhere(page) == []
    assert page.tags.count("style") == 1
    assert "b" not in [tag for tag, name, _ in page.attributes if name == "title"]
    assert page.text.count("<script>alert(1)</script>") > 12


# --- one mask --------------------------------------------------------------------------------------------------------


def cells(svg: str) -> list[tuple[int, int]]:
    """(row, column) of the kept weights, by the places of their squares."""
    path = re.search(r'class=kept d="([^"]*)"', svg)[1]
    return [(int(y) // 10, int(x)) for x, y in re.findall(r"M(\d+) (\d+)h9", path)]


def test_a_two_of_four_mask_looks_like_one():
    keep = NM(2, 4)(torch.randn(64, 128).abs())
    svg = zoom(keep, 4)
    shown = {(row, (x - 4 * (x // 44)) // 10) for row, x in cells(svg)}
    assert shown == {(row, column) for row, column in keep[:32, :64].nonzero().tolist()}
    for row in range(32):
        groups = [x // 44 for other, x in cells(svg) if other == row]
        assert sorted(groups) == sorted([*range(16), *range(16)])
    assert 'viewBox="0 0 700 320"' in svg
    assert {("rect", "fill", "url(#cells)"), ("pattern", "id", "cells"), ("pattern", "width", "44")} <= set(
        Page(svg).attributes
    )


def test_a_small_mask_is_shown_whole():
    assert len(cells(zoom(torch.ones(3, 5, dtype=torch.bool), 8))) == 15
    assert 'viewBox="0 0 50 30"' in zoom(torch.ones(3, 5, dtype=torch.bool), None)


def test_the_overview_shows_where_weights_are_kept():
    keep = torch.zeros(100, 90, dtype=torch.bool)
    keep[:50, :45] = True
    svg, legend = overview(keep)
    assert svg.count("h1v1h-1z") == 24 * 48
    (full,) = re.findall(r'class=c7 d="([^"]*)"', svg)
    places = [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)", full)]
    assert {x < 24 and y < 12 for x, y in places} == {True}
    assert len(places) == 24 * 12
    assert "100 %" in legend
    assert overview(torch.ones(100, 90, dtype=torch.bool)) == ("", "")


def test_the_mask_is_that_of_the_layer_that_is_furthest_off(saved, record):
    shown = pictured(record)
    assert shown["output_error"] == max(one["output_error"] for one in record["sites"])
    weight = load_model(str(saved)).get_parameter(shown["parameter"])
    html = (saved / PAGE).read_text()
    columns = {(row, (x - 4 * (x // 44)) // 10) for row, x in cells(html)}
    assert columns == {(row, column) for row, column in (weight != 0)[:32, :64].nonzero().tolist()}


def test_a_matrix_that_is_stored_the_other_way_round_is_shown_the_right_way(tmp_path):
    from tiny_models import gpt2

    model = gpt2()
    batches = [torch.randint(3, 48, (2, 16))]
    folder = save(model, statprune.prune(model, batches, Recipe("wanda", "1:4")), tmp_path / "out")
    rows: dict[int, list[int]] = {}
    for row, x in cells((folder / PAGE).read_text()):
        rows.setdefault(row, []).append(x // 44)
    assert all(groups == list(range(len(groups))) for groups in rows.values())  # one of each group of four inputs


# --- large, small and odd models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "limit"), [(4, 60), (32, 120), (126, 250), (400, 300)])
def test_the_page_stays_small(record, num_blocks, limit):
    record["sites"] = llama_sites(num_blocks)
    html = render(record, torch.rand(4096, 11008) < 0.5)
    assert len(html) < limit * 1024
    assert f"in {7 * num_blocks:,} layers" in html


def test_many_blocks_share_columns():
    (panel,) = panels(llama_sites(126))
    assert len(panel.columns) <= MOST_COLUMNS
    assert panel.columns[0] == "0-1"
    assert all(len(cell) == 2 for _, row in panel.rows for cell in row)


def test_experts_share_rows():
    (panel,) = panels([site(f"m.{block}.experts.{one}.{kind}") for block in range(2) for one in range(60) for kind in "ab"])
    assert [(kind, [len(cell) for cell in row]) for kind, row in panel.rows] == [("a", [60, 60]), ("b", [60, 60])]
    (panel,) = panels([site(f"m.0.{'x' * number}") for number in range(1, 40)])
    assert (len(panel.rows), panel.num_more) == (MOST_ROWS, 39 - MOST_ROWS)


def test_stacks_names_without_numbers_and_missing_layers():
    names = ["encoder.0.q", "encoder.1.q", "decoder.0.q", "decoder.0.mlp.q", "head", "3"]
    found = panels([site(name) for name in names])
    assert [(panel.title, panel.columns) for panel in found] == [
        ("encoder", ("0", "1")), ("decoder", ("0",)), ("", ("", "3")),
    ]  # fmt: skip
    assert [kind for kind, _ in found[1].rows] == ["q", "mlp.q"]
    assert panels([]) == []


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0"), (0.0123, "1.2"), (0.0994, "9.9"), (0.0996, "10"), (0.5, "50"), (2.62, "262"), (-0.01, "-1.0")]
)
def test_shares_have_the_digits_that_matter(share, text):
    assert percent(share) == text


def test_colours_go_from_little_to_much_and_one_outlier_does_not_take_them_all():
    scale = Scale([0.1, 0.4, 0.8])
    assert [scale(value) for value in (0, 0.15, 0.25, 0.75, 0.8)] == ["c0", "c1", "c2", "c7", "c7"]
    scale = Scale([0.1] * 99 + [50.0])
    assert scale(0.05) == "c4"
    assert scale(50.0) == "c7"
    assert "\u2265 10 %" in scale.legend()
    around = Around([0.5, 1.0, 2.0])
    assert [around(value) for value in (0.0, 0.5, 1.0, 1.4, 2.0)] == ["d0", "d0", "d3", "d4", "d6"]
    assert Scale([0.0])(0.0) == "c0"
    assert Around([1.0])(1.0) == "d3"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_makes_it_anew_and_prints_the_layers(saved, capsys):
    before = (saved / PAGE).read_bytes()
    (saved / PAGE).unlink()
    assert main(["report", str(saved)]) == 0
    assert (saved / PAGE).read_bytes() == before
    shown = capsys.readouterr().out
    assert "down_proj" in shown
    assert "50.00" in shown
    verify(saved)


def test_the_command_gives_data(saved, tmp_path, record, capsys):
    assert main(["report", str(saved), "--output", str(tmp_path / "page.html"), "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [layer["output_error"] for layer in data["layers"]] == [one["output_error"] for one in record["sites"]]
    assert data["perplexity"] == record["perplexity"]
    assert (tmp_path / "page.html").read_bytes() == (saved / PAGE).read_bytes()


def test_a_page_that_the_record_does_not_know_is_not_put_beside_it(saved, record, tmp_path, monkeypatch):
    monkeypatch.setattr("statprune.page.folder.render_folder", lambda *_: "of a later version")
    before = hashlib.sha256((saved / PAGE).read_bytes()).hexdigest()
    for output in (None, saved / PAGE, saved / "other.html"):
        with pytest.raises(CheckpointError, match=r"could not be verified any more\. Write it elsewhere: --output FILE"):
            write_page(record, saved, output)
    assert hashlib.sha256((saved / PAGE).read_bytes()).hexdigest() == before
    assert write_page(record, saved, tmp_path / "new.html").read_text() == "of a later version"
    with pytest.raises(CheckpointError, match=r"new\.html exists"):
        write_page(record, saved, tmp_path / "new.html")
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        write_page(record, saved, tmp_path / "nowhere" / "new.html")


def test_what_cannot_be_shown_is_named(saved, record):
    broken = copy.deepcopy(record)
    pictured(broken)["tensor"] = "gone"
    with pytest.raises(CheckpointError, match=r"cannot be read from model\.safetensors"):
        render_folder(broken, saved)
    broken = copy.deepcopy(record)
    del broken["sites"][0]["shape"]
    with pytest.raises(CheckpointError, match="cannot be shown: KeyError"):
        render_folder(broken, saved)


def test_a_model_that_was_trained_after_pruning_says_so(tmp_path, tiny_model_folder):
    model = load_model(tiny_model_folder)
    report = statprune.prune(model, BATCHES, Recipe("wanda", "2:4"))
    with torch.no_grad():
        for one in report.sites:
            model.get_parameter(one.parameter).mul_(1.5)
    report = remeasure(report, model)
    report.finetuning_steps = 12
    page = Page((save(model, report, tmp_path / "out") / PAGE).read_text())
    assert "fine-tuned for 12 steps" in page.text
    assert "were trained after pruning" in page.text
