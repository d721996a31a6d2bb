"""Plans as one self-contained page: how each kind of layer runs on each platform, memory, refusals to unfold.

No scripts and nothing loaded from elsewhere, which the page's own content policy enforces; light and dark follow the
reader's system. Every name comes from a file that a stranger wrote: all text passes through `_text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Final

from anybit.cli.explain_tables import (
    CONTEXT,
    REFUSED,
    Cell,
    Document,
    Line,
    Rows,
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
    slower_lines,
    steps_line,
    took,
)
from anybit.cli.folding import part_names
from anybit.cli.output import duration, shown, size

_LEGEND: Final = {
    "native": "the chip multiplies the declared formats themselves",
    "unquantized": "a layer in a wide float",
    "exact emulation": "decoded to a wider float in which every operand is exact",
    "weight-only": "declared activation quantization left out",
    REFUSED: "no kernel runs it",
}
_CLASSES: Final = {"native": "native", "unquantized": "plain", "exact emulation": "exact", "weight-only": "changed",
                   REFUSED: "refused"}
_NAMES_SHOWN: Final = 400

_STYLE: Final = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1c1d1f;--soft:#5f6368;--rule:#e2e2de;--bar:#eceae5;
--native:#1a7f4b;--native-bg:#e2f4ea;--exact:#1f5fae;--exact-bg:#e4eefb;--changed:#8a5a00;--changed-bg:#fdf0d5;
--refused:#b3261e;--refused-bg:#fbe6e4;--plain:#5f6368;--plain-bg:#eeeeec;
--a:#1f5fae;--b:#7d9cc9;--c:#b98c3c;--d:#5c9a7c}
@media (prefers-color-scheme:dark){:root{--page:#141517;--card:#1d1f22;--ink:#e8e8e6;--soft:#a2a6ab;--rule:#33363a;
--bar:#2a2d31;--native:#7ddba6;--native-bg:#173526;--exact:#9cc4fb;--exact-bg:#182c47;--changed:#f0c674;
--changed-bg:#3d2e10;--refused:#ff9d94;--refused-bg:#451c19;--plain:#b0b4b8;--plain-bg:#2b2e32;
--a:#5f95dd;--b:#3f5f8d;--c:#c99f55;--d:#5da383}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:75rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.5rem;margin:0 0 .25rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2.25rem 0 .6rem}
h3{font-size:1rem;margin:0 0 .5rem}p{margin:.25rem 0}.soft{color:var(--soft)}
code,.mono{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:.9em;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.55rem .75rem;border-bottom:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:0}thead th{font-weight:600;white-space:nowrap}
tbody th{font-weight:400;min-width:13rem}td{min-width:10rem}
.pill{display:inline-block;padding:.05rem .55rem;border-radius:1rem;font-size:.82rem;font-weight:600;white-space:nowrap}
.native{color:var(--native);background:var(--native-bg)}.exact{color:var(--exact);background:var(--exact-bg)}
.changed{color:var(--changed);background:var(--changed-bg)}.refused{color:var(--refused);background:var(--refused-bg)}
.plain{color:var(--plain);background:var(--plain-bg)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:1rem}
.bar{display:flex;height:1rem;border-radius:4px;overflow:hidden;background:var(--bar);margin:.5rem 0}
.bar span{min-width:1px}.key{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.4rem}
.s0{background:var(--a)}.s1{background:var(--b)}.s2{background:var(--c)}.s3{background:var(--d)}
dl{display:grid;grid-template-columns:auto 1fr;gap:.1rem .8rem;margin:.4rem 0}dt{color:var(--soft)}
dd{margin:0;text-align:right}.card dd{white-space:nowrap}ul{margin:.3rem 0;padding-left:1.2rem}
details{border:1px solid var(--rule);border-radius:8px;background:var(--card);margin:.5rem 0;padding:.5rem .9rem}
summary{cursor:pointer;overflow-wrap:anywhere}
details dl{grid-template-columns:minmax(9rem,auto) 1fr}details dd{text-align:left}
"""


def page(title: str, documents: Sequence[Document]) -> str:
    """The page for plans of one model on one or several platforms."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)} · anybit explain</title><style>{_STYLE}</style></head><body><main>"
    )
    body = [*_heading(title, documents), *_table(documents), *_cards(documents)]
    for document in documents:
        body += _platform(document)
    return head + "\n".join(body) + "\n</main></body></html>\n"


def _text(text: object, limit: int = _NAMES_SHOWN) -> str:
    """Foreign text made harmless for a terminal and for HTML."""
    return escape(shown(text, limit), quote=True)


def _pill(execution: str, text: str = "") -> str:
    return f'<span class="pill {_CLASSES[execution]}">{_text(text or execution)}</span>'


def _heading(title: str, documents: Sequence[Document]) -> Iterator[str]:
    first = documents[0]
    layers = sum(unit["count"] for unit in first["units"]) + len(first["refused"])
    facts = [first["dialect"], f"{layers:,} layers"]
    if first["quantization"]:
        facts.append(f"quantized while loading: {first['quantization']}")
    facts += [words for key, words in (("strict", "--strict"), ("batch_invariant", "--batch-invariant"))
              if first["policy"][key]]
    yield f"<h1>{_text(title)}</h1><p class=soft>{' · '.join(_text(fact) for fact in facts)}</p>"


def _table(documents: Sequence[Document]) -> Iterator[str]:
    yield "<h2>Layers and kernels</h2>"
    heads = "".join(f"<th scope=col>{_text(d['platform']['name'])} <span class=soft>{_text(d['dtype'])}</span></th>"
                    for d in documents)
    yield f'<div class=scroll><table><thead><tr><th scope=col>layers</th>{heads}</tr></thead><tbody>'
    for line in comparison(documents):
        yield f"<tr><th scope=row>{_line_head(line)}</th>{''.join(_cell(cell) for cell in line.cells)}</tr>"
    yield "</tbody></table></div>"
    used = dict.fromkeys(cell.execution for line in comparison(documents) for cell in line.cells)
    yield "<p class=soft>" + " &nbsp; ".join(f"{_pill(name)} {_text(_LEGEND[name])}" for name in used) + "</p>"


def _line_head(line: Line) -> str:
    names = f"<div class=soft>{_text(part_names(line.layers))}</div>"
    return f"<div>{_text(line.kind)} ×{len(line.layers):,}</div><code>{_text(line.declared)}</code>{names}"


def _cell(cell: Cell) -> str:
    if not cell.kernels:
        return f"<td>{_pill(REFUSED)}</td>"
    by_names: dict[str, list[str]] = {}
    for regime, names in cell.kernels.items():
        by_names.setdefault(names, []).append(regime)
    kernels = "".join(
        f"<div><code>{_text(names)}</code>"
        + (f" <span class=soft>{_text(', '.join(regimes))}</span>" if len(by_names) > 1 else "") + "</div>"
        for names, regimes in by_names.items()
    )
    time = f"<div class=soft>{f'{duration(cell.seconds)} a token' if cell.seconds else 'looked up'}</div>"
    return f"<td>{_pill(cell.execution)}{kernels}{time}</td>"


def _cards(documents: Sequence[Document]) -> Iterator[str]:
    yield "<h2>Memory and speed</h2><div class=cards>"
    for document in documents:
        yield from _card(document)
    yield (f"</div><p class=soft>Predicted, with a context of {CONTEXT:,} tokens. Times are of the products of one "
           "decode step; attention and the host come on top.</p>")


def _card(document: Document) -> Iterator[str]:
    platform, parts = document["platform"], memory_parts(document)
    total, capacity = sum(parts.values()), platform["memory_bytes"]
    whole = max(total, capacity) or 1
    yield f"<div class=card><h3>{_text(platform['name'])} <span class=soft>{_text(platform['arch'])}</span></h3>"
    label = f"{size(total)} of {size(capacity)}"
    bar = "".join(f'<span class=s{i} style="width:{100 * count / whole:.2f}%"></span>'
                  for i, count in enumerate(parts.values()) if count)
    yield f'<div class=bar role=img aria-label="{_text(label)}">{bar}</div>'
    fits = "" if total <= capacity or not capacity else f" {_pill(REFUSED, 'does not fit')}"
    yield f"<p><strong>{_text(label)}</strong>{fits}</p><dl>"
    for i, (name, count) in enumerate(parts.items()):
        yield f'<dt><span class="key s{i}"></span>{_text(name)}</dt><dd>{size(count)}</dd>'
    yield f"<dt>more while loading</dt><dd>{size(document['memory']['loading_bytes'])}</dd>"
    yield f"<dt>bits a weight</dt><dd>{bits_per_weight(document):.2f}</dd>"
    yield f"<dt>decode step, {_text(price_word(document))}</dt><dd>{duration(decode_seconds(document))}</dd></dl>"
    counts = execution_counts(document)
    yield "<p>" + " ".join(_pill(name, f"{count:,} {name}") for name, count in counts.items()) + "</p></div>"


def _platform(document: Document) -> Iterator[str]:
    yield f"<h2>{_text(document['platform']['name'])}: why</h2>"
    cache = document["kv_cache"]
    remarks = [*document["notes"], *joined_lines(document)]
    if cache is not None:
        remarks.append(f"key-value cache: declared {cache['declared']}, executed {cache['executed']}")
    changes = dict.fromkeys(change["what"] for change in document["changes"])
    if changes:
        yield f"<p>{_pill('weight-only', 'changes declared arithmetic')}</p>{_list(changes)}"
    yield _list(remarks)
    for rows in rows_of(document):
        yield from _details(rows)
    for name, refused in document["refused"].items():
        yield f"<details open><summary>{_pill(REFUSED)} <code>{_text(name)}</code></summary>"
        yield f"{_pairs(refusal_lines(refused, len(document['regimes'])))}</details>"


def _details(rows: Rows) -> Iterator[str]:
    first = rows.first
    yield (f"<details><summary>{_pill(first['execution'])} {_text(first['kind'])} ×{len(rows.layers):,} "
           f"<code>{_text(first['scheme'])}</code> → <code>{_text(first['kernel']['name'])}</code></summary>")
    pairs = [("layers", rows.names), ("shapes", rows.shapes), ("declared", first["declared"]),
             ("executed", first["executed"])]
    for regime, row in first["kernels"].items():
        seconds = rows.seconds(regime) or 0.0
        rounded = f"; rounds {row['rounds']}" if row["rounds"] else ""
        pairs.append((regime, f"{row['name']}, {row['execution']}, {took(seconds, row['price'])}{rounded}"))
    if steps_line(first):
        pairs.append(("by M", steps_line(first)))
    pairs += [("if", f"{row['condition']}; otherwise {row['otherwise']}") for row in first["preconditions"]]
    pairs += [("slower", line) for line in slower_lines(first)]
    pairs += [("faster", line) for line in better_lines(first)]
    yield _pairs(pairs)
    refused = refusal_lines(first["refused"], len(first["kernels"]))
    if refused:
        yield f"<details><summary>{len(refused)} refusals</summary>{_pairs(refused)}</details>"
    yield "</details>"


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{_text(label)}</dt><dd>{_text(value, 4000)}</dd>" for label, value in pairs)
    return f"<dl>{rows}</dl>"


def _list(lines: Any) -> str:
    items = "".join(f"<li>{_text(line, 2000)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
