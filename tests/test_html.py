"""The report: one well-formed page that needs nothing else, and says what the posterior says."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import vi_flows as vf
from vi_flows.report import html
from vi_flows.report.parts import TEMPLATES

QUICK = {"progress": False, "correct": False, "steps": 40, "particles": 32, "num_draws": 500}
Y = torch.tensor([1.0, 2.0, 6.0])
VOID = {"meta", "img"}
NASTY = '<b>&a$x$"'


def normals(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("schools", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def nasty(y):
    a = pyro.sample(NASTY, dist.Normal(0.0, 1.0))
    with pyro.plate("p", 35):
        b = pyro.sample("b</table>", dist.Normal(0.0, 1.0))
    pyro.sample("y<script>", dist.Normal(a + b.mean(-1), 1.0), obs=y)


def truncated(x):
    """Standard normal within |x₀| < 2: some draws of q have weight 0."""
    return torch.where(x[:, 0].abs() < 2, -0.5 * x.square().sum(-1), -torch.inf)


def cauchy(x):
    return -(1 + x[:, 0] ** 2).log()


def flat(x):
    return -1e-9 * x.abs().sum(-1)


@pytest.fixture(scope="module")
def posteriors(tmp_path_factory):
    """Of every kind: {name: posterior}."""
    guide = AutoNormal(normals)
    guide(Y)
    made = {
        "model": vf.fit(normals, Y, flow="gaussian", **QUICK),
        "many": vf.fit(nasty, torch.tensor(1.0), flow="gaussian", **QUICK),
        "truncated": vf.fit(vf.LogDensity(truncated, dim=2), **{**QUICK, "steps": 0}),
        "cauchy": vf.fit(vf.LogDensity(cauchy, dim=1), flow="gaussian", **QUICK),
        "improper": vf.fit(vf.LogDensity(flat, dim=2), flow="gaussian", **QUICK),
        "guide": vf.diagnose(guide, normals, Y, progress=False, num_draws=500),
    }
    folder = tmp_path_factory.mktemp("saved")
    paths = {name: made[name].save(folder / name) for name in ("model", "truncated")}
    made |= {f"{name}, loaded": vf.load(path) for name, path in paths.items()}
    made["model, loaded with its target"] = vf.load(paths["model"], target=made["model"].target)
    return made


KINDS = ["model", "many", "truncated", "cauchy", "improper", "guide", "model, loaded", "truncated, loaded"]
KINDS += ["model, loaded with its target"]


class Page(HTMLParser):
    """A page read back: elements by tag, tables as lists of rows by caption, the text; raises where tags cross."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.tables, self.captions = {}, []
        self.cell = self.rows = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables[self.captions[-1]] = []
        elif tag == "tr":
            self.rows.append([])
        if tag in ("th", "td", "figcaption", "h1", "code"):
            self.cell = []

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"
        if tag in ("th", "td"):
            self.rows[-1].append("".join(self.cell))
        elif tag == "figcaption":
            self.captions.append("".join(self.cell))
        elif tag in ("h1", "code"):
            setattr(self, tag, "".join(self.cell))

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.cell is not None:
            self.cell.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def table(self, start):
        """The rows of the one table whose caption starts so."""
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return found

    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def pages(posteriors):
    return {name: html.page(posterior) for name, posterior in posteriors.items()}


def test_the_kinds_are_what_they_are_called(posteriors):
    assert set(KINDS) == set(posteriors)
    assert {posteriors[k].verdict.status for k in ("cauchy", "improper")} == {"unreliable"}
    assert (posteriors["truncated"].log_weights == -math.inf).any() and not posteriors["truncated"].trace


@pytest.mark.parametrize("kind", KINDS)
def test_well_formed_whole_and_for_everyone(pages, kind):
    text = pages[kind]
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == len(page.all("title")) == 1
    assert {"charset": "utf-8"} in page.all("meta")
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "a", "b"}
    assert not re.search(r"https?://|@import|url\(|\son\w+=", text)
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert all(box["aria-label"] for box in page.all("div") if box.get("role") == "region")
    assert all(len(row) == len(rows[0]) for rows in page.tables.values() for row in rows)
    assert len(page.all("img")) >= 3
    for image in page.all("img"):
        assert len(image["alt"]) > 10
        kind, data = image["src"].split(",", 1)
        png = base64.b64decode(data, validate=True)
        assert kind == "data:image/png;base64" and png.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
        assert width / height == pytest.approx(int(image["width"]) / int(image["height"]), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_the_posterior_says(posteriors, pages, kind):
    posterior, page = posteriors[kind], Page(pages[kind])
    assert page.h1 == f"Verdict: {posterior.verdict.status}"
    sentences = (*posterior.verdict.reasons[1:], *posterior.notes, posterior.flow_description)
    assert all(" ".join(sentence.split()) in page.text() for sentence in sentences)
    checks = page.table("The steps of the rule")[1:]
    assert [(row[0], row[3], row[4]) for row in checks] == [
        (c.name, "yes" if c.passed else "no", c.sentence) for c in posterior.verdict.checks
    ]
    assert [float(row[1]) for row in checks] == pytest.approx([c.statistic for c in posterior.verdict.checks], rel=1e-3)
    numbers = dict(page.table("The fit in numbers"))
    assert numbers[posterior.evidence_name] == posterior.evidence_text
    frame = posterior.summary()
    head, *rows = page.table("Weighted draws: mean")
    assert head == ["quantity", *frame.columns] and [row[0] for row in rows] == list(frame.index)
    shown = np.array([[math.nan if cell == "–" else float(cell) for cell in row[1:]] for row in rows])
    np.testing.assert_allclose(shown, frame.to_numpy(), rtol=1e-3)
    assert dict(page.table("Settings"))["num_draws"] == "500"
    assert [row[0] for row in page.table("Time by stage")[1:]] == list(posterior.timing)
    assert dict(page.table("Versions"))["torch"] == torch.__version__


def test_modes_in_named_values_where_the_target_allows(posteriors, pages):
    modes = posteriors["model"].modes
    loc = modes.loc
    y = dist.Normal(loc[:, :1], loc[:, 1:].exp()).log_prob(Y.double()).sum(-1)
    log_p = y + dist.Normal(0.0, 2.0).log_prob(loc[:, 0]) + dist.Normal(0.0, 0.5).log_prob(loc[:, 1])
    values = torch.stack([log_p, loc[:, 0], loc[:, 1].exp()], -1).numpy()
    for kind in ("model", "model, loaded with its target"):
        head, *rows = Page(pages[kind]).table("Centres of the Gaussians")
        assert head == ["mode", "log p, unconstrained", "mu", "scale"]
        index = [int(row[0].split(":")[0]) for row in rows]
        assert index == log_p.argsort(descending=True).tolist()
        assert [row[0].split(": ")[1] for row in rows] == [str(modes.origin[i]) for i in index]
        np.testing.assert_allclose(np.array([row[1:] for row in rows], dtype=float), values[index], rtol=1e-3)
    head, *rows = Page(pages["model, loaded"]).table("Centres of the Gaussians")
    assert head == ["mode", "x[0]", "x[1]"]
    np.testing.assert_allclose(np.array([row[1:] for row in rows], dtype=float), loc.numpy(), rtol=1e-3)


def test_modes_of_many_quantities_stand_beside_one_another(posteriors):
    posterior = posteriors["many"]
    many = posterior.modes.pick([0] * 20)
    for i, loc in enumerate(many.loc):
        loc += i
    _, *rows = html._modes(dataclasses.replace(posterior, modes=many))
    rows = [rows[0], *rows[1]]
    best = posterior.target.log_prob(many.loc).argsort(descending=True)[: html.MODES]
    assert [int(head.split(":")[0]) for head in rows[0][1:]] == best.tolist()
    assert rows[2][0] == NASTY and len(rows) == 2 + posterior.dim
    np.testing.assert_allclose(np.array(rows[2][1:], dtype=float), many.loc[best, 0].numpy(), rtol=1e-3, atol=1e-6)


def test_pictures_of_raw_and_weighted_draws(posteriors, pages):
    alts = [image["alt"] for image in Page(pages["truncated"]).all("img")]
    (first,) = [alt for alt in alts if alt.startswith("Density of x[0]")]
    weighted, raw = (float(found) for found in re.findall(r"sd (\d\.\d+)", first))
    ratio = math.exp(-2) * 4 / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    assert weighted == pytest.approx(math.sqrt(1 - ratio), abs=0.02)  # of a normal cut at ±2
    assert raw == pytest.approx(float(posteriors["truncated"].flow_draws[:, 0].std(correction=0)), rel=1e-2)
    assert any("contours" in alt for alt in alts), "a density of two coordinates is drawn over them"
    without = [image["alt"] for image in Page(pages["model, loaded"]).all("img")]
    assert not any("draws of q" in alt or "contours" in alt for alt in without)


def test_pairs_show_weighted_draws_below_the_diagonal_and_raw_ones_above(posteriors):
    posterior = posteriors["truncated"]
    figure = html.Picture()
    html._both(html.panels.quantities(posterior, None))(figure)
    below, above = figure.axes[2].lines[0], figure.axes[1].lines[0]
    assert figure.axes[1].get_visible()
    assert np.abs(below.get_xdata()).max() <= 2 < posterior.flow_draws[:, 0].abs().max()
    assert np.array_equal(above.get_ydata(), posterior.flow_draws[:, 0]) and above.get_color() != below.get_color()
    assert np.array_equal(above.get_xdata(), posterior.flow_draws[:, 1])
    assert figure.axes[1].get_ylim() == figure.axes[2].get_xlim()


def test_data_are_named_with_their_shapes(pages):
    assert Page(pages["model"]).table("Observed")[1] == ["y", "3", "torch.float64", "1", "6"]
    assert Page(pages["many"]).table("Observed")[1][:2] == ["y<script>", "one value"]
    assert "loaded without its target" in pages["model, loaded"] and "observes no values" in pages["cauchy"]


def test_names_are_escaped_and_many_quantities_fit(posteriors, pages):
    page = Page(pages["many"])
    assert NASTY in [row[0] for row in page.table("Weighted draws: mean")]
    assert posteriors["many"].dim == 36 and "24 of 36 quantities" in page.text()
    assert sum(image["alt"].startswith("Density of") for image in page.all("img")) == 24
    assert "<script" not in pages["many"] and "&lt;b&gt;&amp;a$x$&#34;" in pages["many"]


def test_names_of_functions_and_settings_do_not_run(posteriors):
    script, settings = "<script>alert('x')</script>", posteriors["model"].settings
    changed = dataclasses.replace(
        posteriors["model"],
        notes=[script],
        flow_description=script,
        settings=dataclasses.replace(settings, options={**settings.options, script: script}),
        timing={script: 1.0},
    )
    text = html.page(changed)
    page = Page(text)
    assert "<script" not in text and not page.all("script")
    assert page.text().count(script) == 6  # the number, the flow, the note, the stage, the setting and its value


def test_long_tables_are_cut_and_say_so():
    elements = TEMPLATES.get_template("elements.html.j2").module
    for count, said in ((500, False), (501, True)):
        page = Page(elements.table("a table", ("name", "number"), [(f"row {i}", str(i)) for i in range(count)]))
        assert len(page.table("a table")) == 501 and ("The first 500 of 501 rows" in page.text()) == said


@pytest.mark.parametrize("template", TEMPLATES.list_templates())
def test_all_that_templates_are_given_is_escaped(template):
    assert TEMPLATES.get_template(template).environment.autoescape is True
    assert not re.search(r"\|\s*safe|autoescape", TEMPLATES.loader.get_source(TEMPLATES, template)[0])


def test_its_code_makes_the_same_posterior(posteriors, pages):
    code = Page(pages["model"]).code
    assert "fit(normals, y, flow='gaussian', seed=0, steps=40, particles=32, num_draws=500, correct=False)" in code
    names = {"normals": normals, "y": Y}
    exec(code, names)
    assert torch.equal(names["posterior"].flow_draws, posteriors["model"].flow_draws)
    names = {"cauchy": cauchy}
    exec(Page(pages["cauchy"]).code, names)
    assert torch.equal(names["posterior"].log_weights, posteriors["cauchy"].log_weights)
    assert "vf.diagnose(guide, normals, y, seed=0, num_draws=500)" in Page(pages["guide"]).code


def test_code_of_other_calls(posteriors):
    model, settings = posteriors["model"], posteriors["model"].settings
    by_name = dataclasses.replace(model, target=vf.PyroModel(normals, y=Y))
    assert "vf.fit(vf.PyroModel(normals, y=y), " in html.code(by_name)
    options = {**settings.options, "dtype": "torch.float32", "max_seconds": 5.0, "compile": True}
    other = dataclasses.replace(settings, flow=None, recipe=None, options=options)  # as for a flow given without a name
    text = html.code(dataclasses.replace(model, settings=other, target=None))
    assert text.startswith("import torch\n") and "flow=" not in text.splitlines()[-1]
    assert "vf.fit(target, seed=0, " in text and "max_seconds=5.0, " in text and "clock" in text
    assert "dtype=torch.float32" in text and "compile=True" in text
    named = html.code(dataclasses.replace(model, settings=dataclasses.replace(settings, flow="auto")))
    assert "flow='auto'" in named and "up to chance" not in named
    annealed = settings.corrected("anneal", {"particles": 100, "replicates": 2, "seed": 3, "steps": 5})
    last = html.code(dataclasses.replace(model, settings=annealed)).splitlines()[-1]
    assert last == "posterior = posterior.anneal(particles=100, replicates=2, seed=3)"
    compile(text, "code", "exec")


def test_report_writes_the_page_and_changes_nothing_else(posteriors, pages, tmp_path):
    state, style = torch.get_rng_state(), dict(matplotlib.rcParams)
    path = posteriors["model"].report(str(tmp_path / "new" / "fit.HTML"))
    assert path == tmp_path / "new" / "fit.HTML" and path.read_text(encoding="utf-8") == pages["model"]
    assert [found.name for found in path.parent.iterdir()] == ["fit.HTML"]
    assert torch.equal(torch.get_rng_state(), state) and dict(matplotlib.rcParams) == style


def test_a_failure_leaves_the_old_page(posteriors, tmp_path, monkeypatch):
    def fails(posterior):
        raise RuntimeError("in the middle")

    path = tmp_path / "fit.html"
    path.write_text("the old one")
    monkeypatch.setattr(html, "page", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        posteriors["model"].report(path)
    assert path.read_text() == "the old one" and [found.name for found in tmp_path.iterdir()] == ["fit.html"]


def test_bad_paths_are_told_in_one_line(posteriors, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "page", lambda posterior: pytest.fail("a bad path should be told before the work"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    for bad in ("fit.pdf", "fit", ".", "folder.html", "file/fit.html", f"{'n' * 300}.html"):
        with pytest.raises(ValueError, match=r"^path: expected [^\n]*$"):
            posteriors["model"].report(tmp_path / bad)
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["file", "folder.html"]


def test_without_target_and_draws_it_says_what_to_do(posteriors, tmp_path):
    bare = dataclasses.replace(posteriors["model"], target=None, stored=None)
    with pytest.raises(ValueError, match=r"no target; load it with vf\.load"):
        bare.report(tmp_path / "fit.html")
    assert not list(tmp_path.iterdir())
