"""What a report is (facts, tables, figures, samples), and its two forms: report.md, report.html.

The pages need nothing but themselves: a phone, a printer and a mail program show them alike.
"""

import base64
import dataclasses
import html
import math
import re
from collections.abc import Mapping

from etils import epath

from llm.training.files import write_atomically

Cell = str | int | float | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text and numbers. A column whose cells are all numbers (or None) aligns right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    decimals: int = 3  # of floats
    bold: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the cells to stand out


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing. `description` says in words what it shows, for those who cannot see it."""

    name: str  # of the file beside report.md: letters, digits and hyphens
    svg: str
    description: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text that a model wrote, after the prompt that it was given."""

    prompt: str
    completion: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in the order of the fields."""

    title: str
    text: str = ""  # plain; an empty line parts paragraphs
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """The whole: a title, the few facts that matter most, and sections."""

    title: str
    facts: Mapping[str, str]
    sections: tuple[Section, ...]
    command: str = ""  # that made it; told under each figure, which may be seen without the rest


def write_report(report: Report, directory: epath.PathLike) -> None:
    """Write report.md with its report_figures/, and report.html, which holds its figures itself."""
    directory = epath.Path(directory)
    figures = [figure for section in report.sections for figure in section.figures]
    names = [figure.name for figure in figures]
    for name in names:
        if not re.fullmatch(r"[a-zA-Z0-9-]+", name) or names.count(name) > 1:
            raise ValueError(
                f"a figure is named {name!r}, {names.count(name)} in the report; "
                "names are letters, digits and hyphens, each used once"
            )
    (directory / "report_figures").mkdir(parents=True, exist_ok=True)
    for figure in figures:
        write_atomically(directory / "report_figures" / f"{figure.name}.svg", figure.svg)
    write_atomically(directory / "report.md", to_markdown(report))
    write_atomically(directory / "report.html", to_html(report))


def format_cell(cell: Cell, decimals: int = 3) -> str:
    """Return a cell as text: 1,234,567 and 0.123, an en dash where there is nothing."""
    if cell is None or isinstance(cell, float) and math.isnan(cell):
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.{decimals}f}"
    return f"{cell:,}" if isinstance(cell, int) else _printable(cell)


def _printable(text: str) -> str:
    """Replace what no page can hold, as lone surrogates and control characters, by U+FFFD."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _is_numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows]
    return any(cell is not None for cell in cells) and not any(isinstance(c, str) for c in cells)


# --- Markdown ---


def to_markdown(report: Report) -> str:
    """Return the report as Markdown (tables as on GitHub); figures lie in report_figures/."""
    made_by = f"  \n{_md_code(report.command)}" if report.command else ""
    blocks = [f"# {_md(report.title)}"]
    blocks.append("\n".join(f"- **{_md(k)}:** {_md(v)}" for k, v in report.facts.items()))
    for section in report.sections:
        blocks.append(f"## {_md(section.title)}")
        blocks.extend(_md(part) for part in _paragraphs(section.text))
        blocks.extend(_markdown_table(table) for table in section.tables)
        for figure in section.figures:
            image = f"![{_md(figure.description)}](report_figures/{figure.name}.svg)"
            caption = f"*{_md(figure.caption)}*" if figure.caption else ""
            blocks.extend([image, (caption + made_by).strip()])
        blocks.extend(_markdown_sample(sample) for sample in section.samples)
    return "\n\n".join(block for block in blocks if block) + "\n"


def _md_code(text: str) -> str:
    """Return text as code; its marks are longer than any run of backticks that it holds."""
    text = re.sub(r"\s+", " ", _printable(text)).strip()
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks} {text} {marks}" if "`" in text else f"`{text}`"


def _markdown_table(table: Table) -> str:
    rows = [[_md(column) for column in table.columns]]
    rows.append(["--:" if _is_numeric(table, i) else ":--" for i in range(len(table.columns))])
    for i, row in enumerate(table.rows):
        cells = [_md(format_cell(cell, table.decimals)) for cell in row]
        rows.append([f"**{c}**" if (i, j) in table.bold else c for j, c in enumerate(cells)])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{lines}\n\n*{_md(table.caption)}*" if table.caption else lines


def _markdown_sample(sample: Sample) -> str:
    text = _printable(sample.completion)
    # A fence must be longer than any run of backticks that it holds.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    note = f" *({_md(sample.note)})*" if sample.note else ""
    return f"**Prompt:** {_md(sample.prompt) or '(none)'}{note}\n\n{fence}text\n{text}\n{fence}"


def _md(text: str) -> str:
    """Escape what Markdown would read as a mark, or as the end of a table's cell."""
    text = re.sub(r"\s+", " ", _printable(text)).strip()
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", text)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


# --- HTML ---

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 58rem;
  background: #fff; color: #1a1a1a;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid #ccc; }
p { max-width: 42rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem;
  margin: 0; }
dl > div { border-left: 3px solid #0072b2; padding: .1rem 0 .1rem .7rem; }
dt { font-size: .85rem; color: #555; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 1rem 0 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
caption { caption-side: bottom; text-align: left; color: #555; font-size: .9rem; padding: .5rem 0; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 1.5rem; margin: 1rem 0; }
figure { margin: 0; max-width: 36rem; break-inside: avoid; }
figure img { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
figcaption code { font-size: .75rem; overflow-wrap: anywhere; }
.sample { margin: 1rem 0; max-width: 42rem; }
.sample pre { margin: 0; padding: .8rem 1rem; background: #f6f6f4; border-radius: .3rem;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: .9rem/1.5 ui-monospace, "Liberation Mono", Menlo, Consolas, monospace; }
.sample b { color: #00527f; }
@media (max-width: 36rem) { table { font-size: .85rem; } th, td { padding-right: .6rem; }
  dl { grid-template-columns: 1fr 1fr; } h1 { font-size: 1.4rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  table, .sample { break-inside: avoid; } .sample pre { border: 1px solid #ccc; } }
"""


def to_html(report: Report) -> str:
    """Return the report as one HTML page that refers to nothing outside itself."""
    title = _esc(report.title)
    facts = "".join(
        f"<div><dt>{_esc(k)}</dt><dd>{_esc(v)}</dd></div>\n" for k, v in report.facts.items()
    )
    sections = "\n".join(_html_section(section, report.command) for section in report.sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<dl>\n{facts}</dl>\n{sections}\n</body>\n</html>\n"
    )


def _html_section(section: Section, command: str) -> str:
    parts = [f"<section>\n<h2>{_esc(section.title)}</h2>"]
    parts.extend(f"<p>{_esc(part)}</p>" for part in _paragraphs(section.text))
    parts.extend(map(_html_table, section.tables))
    if section.figures:
        figures = "\n".join(_html_figure(figure, command) for figure in section.figures)
        parts.append(f'<div class="figures">\n{figures}\n</div>')
    parts.extend(map(_html_sample, section.samples))
    return "\n".join([*parts, "</section>"])


def _html_table(table: Table) -> str:
    numeric = [
        ' class="number"' if _is_numeric(table, i) else "" for i in range(len(table.columns))
    ]
    heads = (f"<th{n}>{_esc(c)}</th>" for n, c in zip(numeric, table.columns, strict=True))
    lines = [f"<thead><tr>{''.join(heads)}</tr></thead>", "<tbody>"]
    for i, row in enumerate(table.rows):
        cells = []
        for j, (attribute, cell) in enumerate(zip(numeric, row, strict=True)):
            text = _esc(format_cell(cell, table.decimals))
            text = f"<strong>{text}</strong>" if (i, j) in table.bold else text
            cells.append(f"<td{attribute}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{_esc(table.caption)}</caption>" if table.caption else ""
    body = "\n".join([*lines, "</tbody>"])
    return f'<div class="table"><table>{caption}\n{body}\n</table></div>'


def _html_figure(figure: Figure, command: str) -> str:
    # As an image and not inline: two drawings may use the same ids inside.
    data = base64.b64encode(figure.svg.encode()).decode()
    image = f'<img alt="{_esc(figure.description)}" src="data:image/svg+xml;base64,{data}">'
    parts = [_esc(figure.caption)] if figure.caption else []
    parts += [f"<code>{_esc(command)}</code>"] if command else []
    caption = f"<figcaption>{'<br>'.join(parts)}</figcaption>" if parts else ""
    return f"<figure>{image}{caption}</figure>"


def _html_sample(sample: Sample) -> str:
    note = f"<figcaption>{_esc(sample.note)}</figcaption>" if sample.note else ""
    # The line break after <pre> is no part of the text: HTML drops it.
    text = f"<b>{_esc(sample.prompt)}</b>{_esc(sample.completion)}"
    return f'<figure class="sample">{note}<pre dir="auto">\n{text}</pre></figure>'


def _esc(text: str) -> str:
    return html.escape(_printable(text))
