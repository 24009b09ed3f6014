"""The style sheet of a page: light and dark, phone and desk, paper.

The six colours are those of Okabe and Ito (colour universal design), darkened or lightened until each stands out three
to one against its background; every series has a shape or a dash of its own as well.
"""

from __future__ import annotations

import re

LIGHT = ("#0072b2", "#c04f00", "#007f5f", "#a3427c", "#5c5c00", "#5b4bb0")
DARK = ("#56b4e9", "#f0a030", "#2fc99a", "#e08bbb", "#e6dc50", "#a99cf0")
PAPER, NIGHT = "#ffffff", "#14171a"


def _variables(background: str, ink: str, faint: str, rule: str, panel: str, colours: tuple[str, ...]) -> str:
    named = {"bg": background, "ink": ink, "faint": faint, "rule": rule, "panel": panel}
    named |= {f"c{number}": colour for number, colour in enumerate(colours, 1)}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


BRIGHT = _variables(PAPER, "#1b1f23", "#57606a", "#d5dae0", "#f4f6f8", LIGHT)

CSS = (
    f":root{{color-scheme:light dark;{BRIGHT}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{"
    f"{_variables(NIGHT, '#e6e9ec', '#a0a9b3', '#3a4149', '#1e2328', DARK)}}}}}\n"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 8px;padding-bottom:4px;border-bottom:1px solid var(--rule)}
p{margin:6px 0 12px;max-width:72ch;overflow-wrap:anywhere}
.faint,figcaption span,.tile span{color:var(--faint)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
code{overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:10px 12px;margin:8px 0 14px;
white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.45}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}
.tile{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:8px 12px;min-width:0}
.tile span{display:block;font-size:.82rem}
.tile b{display:block;font-size:1.25rem;line-height:1.3;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:24px 28px;align-items:start}
figure{margin:0;min-width:0;max-width:560px}
figcaption{line-height:1.35;margin-bottom:6px}
figcaption span{display:block;font-size:.82rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--ink)}
svg text.strong{font-weight:600}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.axis{stroke:var(--faint);stroke-width:1;fill:none}
.mark{fill:var(--c)}
.hollow{fill:var(--bg);stroke:var(--c);stroke-width:1.4}
.stroke{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.dashed{stroke-dasharray:4 3;stroke-width:1.3}
.pale{fill:var(--c);fill-opacity:.28}
.legend{list-style:none;margin:4px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.82rem}
.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
.key{width:22px;height:12px;flex:none}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;margin:8px 0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
.scroll table{min-width:100%}
th,td{padding:4px 10px;text-align:right;white-space:nowrap;border-top:1px solid var(--rule)}
thead th{border-top:0;background:var(--panel);vertical-align:bottom;font-weight:600}
th:first-child,td.text,th.text{text-align:left}
tbody th{font-weight:400;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.95em}
.scroll th:first-child{position:sticky;left:0;background:var(--bg);border-right:1px solid var(--rule)}
.scroll thead th:first-child{background:var(--panel)}
.facts{width:100%;table-layout:fixed}
.facts th,.facts td{text-align:left;white-space:normal;vertical-align:top;overflow-wrap:anywhere;padding:5px 8px 5px 0}
.facts th{color:var(--faint);width:30%;font-family:inherit;font-weight:400}
.facts tr:first-child>*{border-top:0}
@media (min-width:700px){.facts th{width:190px}}
@media print{
body{font-size:10pt}
main{max-width:none;padding:0}
figure,tr,.tile,pre{break-inside:avoid}
h2{break-after:avoid}
.plots{grid-template-columns:1fr 1fr}
.scroll{overflow:visible;border:0}
.scroll table{font-size:7pt;min-width:0}
th,td{padding:2px 4px}
.scroll th:first-child{position:static}
}
"""
    + ".c0{--c:var(--faint)}\n"
    + "".join(f".c{number}{{--c:var(--c{number})}}\n" for number in range(1, len(LIGHT) + 1))
)


WHOLE = {":root", "html", "body", "main"}
"""Selectors of the page itself."""
RULE = re.compile(r"([^{}]+)\{((?:[^{}]|\{[^{}]*\})*)\}")


def within(scope: str, css: str = CSS) -> str:
    """The style sheet for a part of somebody else's page: no rule of it reaches beyond what the selector matches."""
    found = []
    for selector, body in RULE.findall(css):
        if selector.strip().startswith("@media"):
            found.append(f"{selector.strip()}{{{within(scope, body)}}}")
        elif not selector.strip().startswith("@"):
            parts = (part.strip() for part in selector.split(","))
            scoped = dict.fromkeys(scope if part in WHOLE else f"{scope} {part}" for part in parts)
            found.append(f"{','.join(scoped)}{{{body}}}")
    return "\n".join(found)
