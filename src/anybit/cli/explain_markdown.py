"""Plans as Markdown: the comparison, memory, and the reasons of each platform. A pure function of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from anybit.cli.explain_tables import (
    CONTEXT,
    Document,
    better_lines,
    bits_per_weight,
    comparison,
    decode_seconds,
    execution_counts,
    joined_lines,
    memory_parts,
    price_word,
    refusal_lines,
    rows_of,
    steps_line,
    took,
)
from anybit.cli.folding import part_names
from anybit.cli.output import duration, shown, size

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>#|~"})


def markdown(title: str, documents: Sequence[Document]) -> str:
    """The plans of one model on one or several platforms."""
    lines = [f"# {_text(title)}", "", *_comparison(documents), "", *_memory(documents)]
    for document in documents:
        lines += ["", *_platform(document)]
    return "\n".join(lines) + "\n"


def _text(text: object) -> str:
    """Foreign text without control characters and without meaning to Markdown."""
    return shown(text, 2000).translate(_SPECIAL)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _comparison(documents: Sequence[Document]) -> Iterator[str]:
    head = ["layers", "declared", *(f"{_text(d['platform']['name'])} ({d['dtype']})" for d in documents)]
    rows = [
        [f"{line.kind} ×{len(line.layers)} {_text(part_names(line.layers))}", _text(line.declared),
         *(f"{cell.execution}: {cell.short}" for cell in line.cells)]
        for line in comparison(documents)
    ]
    return _table(head, rows)


def _memory(documents: Sequence[Document]) -> Iterator[str]:
    parts = list(memory_parts(documents[0]))
    head = ["platform", *parts, "total", "bits a weight", f"decode step, products ({price_word(documents[0])})",
            "layers"]
    rows = []
    for document in documents:
        found = memory_parts(document)
        counts = ", ".join(f"{count} {name}" for name, count in execution_counts(document).items())
        rows.append([_text(document["platform"]["name"]), *(size(count) for count in found.values()),
                     size(sum(found.values())), f"{bits_per_weight(document):.2f}",
                     duration(decode_seconds(document)), counts])
    yield f"Memory is predicted for a context of {CONTEXT:,} tokens."
    yield ""
    yield from _table(head, rows)


def _platform(document: Document) -> Iterator[str]:
    yield f"## {_text(document['platform']['name'])}"
    yield ""
    for remark in (*document["notes"], *joined_lines(document), *dict.fromkeys(c["what"] for c in document["changes"])):
        yield f"- {_text(remark)}"
    for rows in rows_of(document):
        first = rows.first
        yield ""
        yield f"### {first['kind']} ×{len(rows.layers)} {_text(first['scheme'])}"
        yield ""
        yield f"- executed: {_text(first['executed'])}"
        for regime, row in first["kernels"].items():
            rounded = f", rounds {row['rounds']}" if row["rounds"] else ""
            price = took(rows.seconds(regime) or 0.0, row["price"])
            yield f"- {regime}: {row['name']}, {row['execution']}, {price}{_text(rounded)}"
        if steps_line(first):
            yield f"- by M: {steps_line(first)}"
        for row in first["preconditions"]:
            yield f"- if {_text(row['condition'])}; otherwise {row['otherwise']}"
        yield from (f"- faster: {_text(line)}" for line in better_lines(first))
        yield from (f"- refused {_text(kernel)}: {_text(reason)}"
                    for kernel, reason in refusal_lines(first["refused"], len(first["kernels"])))
    for name, refused in document["refused"].items():
        yield ""
        yield f"### refused: {_text(name)}"
        yield ""
        yield from (f"- {_text(kernel)}: {_text(reason)}" for kernel, reason in refusal_lines(refused, 3))
