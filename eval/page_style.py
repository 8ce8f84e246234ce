"""Hold the style sheet and the script of a page's HTML.

The colours are told apart by colour-blind readers and have a contrast of 4.5 or more. Nothing is
told by colour alone.
"""

from __future__ import annotations

_LIGHT, _DARK = "#fff", "#1b1f24"
# from 0 to 10: a label's own column in blue, the others in orange
_BLUE = "fff eaf2fa d6e6f4 bcd7ec 9cc4e2 79aed5 5596c6 2f72a8 25689f 154f83 0a3763"
_ORANGE = "fff fdf0e3 fbe1c8 f8cea5 f4b980 eea25a dd8637 a95a14 944b10 7a3c09 5c2b04"


def _shades(name: str, colours: str) -> str:
    """Make the style of each shade of a heat map, with text that stands out from it."""
    return "".join(
        f".{name}.shade{k}{{background:#{colour};color:{_DARK if k < 7 else _LIGHT}}}"
        for k, colour in enumerate(colours.split())
    )


STYLE = f"""
:root{{--ink:{_DARK};--soft:#4f5965;--line:#c9d0d8;--wash:#f3f5f8;--link:#0b4f9e;--good:#0a5f38;
 --bad:#9b1c1c;--doubt:#6b4a00}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:76rem;padding:.5rem 1rem 3rem;font:.95rem/1.45 system-ui,sans-serif;
 color:var(--ink);background:{_LIGHT}}}
header{{display:flex;flex-wrap:wrap;gap:0 1rem;align-items:baseline}}
header p{{margin:0;color:var(--soft);font-size:.88rem;max-width:none;overflow-wrap:anywhere}}
h1{{font-size:1.25rem;line-height:1.2;margin:.2rem 0}}
h2{{font-size:1.2rem;margin:1.6rem 0 .5rem;border-top:2px solid var(--line);padding-top:.6rem}}
section:first-child h2{{margin:.3rem 0 0;border:0;padding:0;font-size:.88rem;color:var(--soft);
 font-weight:500}}
h3{{font-size:.95rem;margin:0 0 .4rem;overflow-wrap:anywhere}}p{{max-width:110ch;margin:.5rem 0}}
a{{color:var(--link)}}
:focus-visible{{outline:3px solid var(--link);outline-offset:2px}}
.skip{{position:absolute;left:-99rem}}.skip:focus{{left:1rem;top:0;background:{_LIGHT};
 padding:.5rem;z-index:1}}
nav ol{{display:flex;flex-wrap:wrap;gap:0 1rem;list-style:none;padding:.2rem 0;margin:.2rem 0;
 font-size:.88rem;border-bottom:1px solid var(--line)}}
.lead{{font-size:1.3rem;line-height:1.3;font-weight:650;max-width:none;margin:.1rem 0 .3rem}}
.evidence{{margin:.2rem 0 .4rem;padding-left:1.2rem;font-size:.85rem;color:var(--soft)}}
.scroll{{overflow-x:auto;margin:.8rem 0 .3rem;max-width:100%}}
table{{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;
 font-size:.88rem}}
caption{{text-align:left;font-weight:600;padding:.3rem 0}}
th,td{{padding:.22rem .6rem;border-bottom:1px solid var(--line);text-align:left;
 vertical-align:top}}
thead th{{background:var(--wash);vertical-align:bottom}}
tbody th{{font-weight:500;background:{_LIGHT};position:sticky;left:0;min-width:8rem;
 max-width:14rem;overflow-wrap:break-word}}
td:not(.number){{min-width:6.5rem;overflow-wrap:anywhere}}
.number{{text-align:right;white-space:nowrap}}
thead .number{{white-space:normal;min-width:4.5rem}}
.detail{{font-size:.8rem;color:var(--soft)}}td .detail,th .detail{{display:block}}
.gain{{color:var(--good)}}.loss{{color:var(--bad)}}.muted{{color:var(--soft)}}
.sign{{font-size:.75em}}
.note{{font-size:.85rem;color:var(--soft);margin:.2rem 0;max-width:120ch}}figure{{margin:.6rem 0}}
img{{max-width:100%;height:auto;display:block}}
figcaption{{font-size:.85rem;color:var(--soft);max-width:100ch}}
details{{margin:.4rem 0}}summary{{cursor:pointer;color:var(--link);padding:.15rem 0}}
.heat{{display:inline-block;vertical-align:top}}
.heat table{{font-size:.73rem;line-height:1.35}}
.heat th,.heat td{{padding:.12rem .2rem}}
.heat td:not(.number){{min-width:1.45rem;text-align:center;border-left:1px solid {_LIGHT};
 overflow-wrap:normal}}
.heat tbody th{{min-width:0;max-width:none;white-space:nowrap}}
.heat thead th{{min-width:0;background:{_LIGHT}}}
.heat thead span{{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap;
 font-weight:500;max-height:12rem}}
.own{{outline:1px solid {_DARK};outline-offset:-1px;font-weight:600}}
.none{{background:var(--wash)}}
{_shades("own", _BLUE)}
{_shades("other", _ORANGE)}
.filter:not([hidden]){{display:flex;flex-wrap:wrap;gap:.4rem 1rem;align-items:center;
 background:var(--wash);border:1px solid var(--line);padding:.5rem;margin:.6rem 0}}
.filter label{{margin-right:.4rem}}select,input{{font:inherit;padding:.2rem;max-width:100%}}
.strip{{display:grid;grid-template-columns:repeat(4,1fr);gap:.6rem;list-style:none;padding:0;
 margin:.4rem 0}}
.strip li{{border:1px solid var(--line);border-radius:.4rem;padding:.4rem;min-width:0;
 font-size:.82rem;line-height:1.3}}
.strip p{{margin:0 0 .25rem}}.strip .picture img{{height:8.5rem;width:100%;object-fit:contain}}
.said{{display:grid;gap:.2rem;margin-top:.3rem!important}}
.cases{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));
 gap:.6rem}}
.case{{display:grid;grid-template-columns:7.5rem 1fr;gap:.2rem .8rem;align-content:start;
 border:1px solid var(--line);border-radius:.4rem;padding:.6rem;font-size:.85rem}}
.case[hidden]{{display:none}}.case h3{{grid-column:1/-1;margin:0}}.case>div{{min-width:0}}
.case>div>p:first-child{{margin-top:0}}
.case:has(details[open]){{grid-column:1/-1;grid-template-columns:minmax(9rem,24rem) 1fr}}
.picture img{{width:100%;background:#000}}
.answer{{border-left:.3rem solid var(--line);padding:0 0 0 .6rem;margin:.4rem 0}}
.answer p{{margin:.1rem 0}}.answer details{{margin:0}}.answer summary{{font-size:.8rem;padding:0}}
.answer.right{{border-color:var(--good)}}
.answer.wrong{{border-color:var(--bad)}}.answer.failed{{border-color:var(--doubt);
 border-left-style:dashed}}
.tag{{border:1px solid currentColor;border-radius:.7rem;padding:0 .4rem;font-size:.78rem;
 font-weight:500;white-space:nowrap}}
.right>p .tag,.right>.tag{{color:var(--good)}}
.wrong>p .tag,.wrong>.tag{{color:var(--bad)}}.failed>p .tag,.failed>.tag{{color:var(--doubt)}}
blockquote{{margin:.3rem 0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--wash);padding:.6rem;
 font-size:.82rem;unicode-bidi:isolate}}
dl{{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0;font-size:.85rem;color:var(--soft)}}
dt,dd{{display:inline;margin:0 .35rem 0 0}}dd{{color:var(--ink);overflow-wrap:anywhere}}
@media(max-width:40rem){{body{{padding:.5rem}}
.case,.case:has(details[open]){{grid-template-columns:minmax(0,1fr)}}
.case .picture{{max-width:16rem}}
.strip{{grid-template-columns:1fr 1fr}}.lead{{font-size:1.1rem}}
tbody th{{min-width:6.5rem;max-width:9rem}}th,td{{padding:.3rem .4rem}}}}
@page{{size:A4 landscape;margin:12mm}}
@media print{{body{{max-width:none;font-size:10pt}}nav,.filter,.skip{{display:none!important}}
.case[hidden]{{display:grid!important}}
.case,tr,figure,.strip li{{break-inside:avoid}}h2,caption{{break-after:avoid}}
img{{max-height:160mm;width:auto}}.picture img{{max-height:60mm}}
.scroll{{overflow:visible}}table{{font-size:8pt}}.detail{{font-size:6.5pt}}.note{{font-size:8pt}}
th,td{{padding:.1rem .3rem;print-color-adjust:exact}}tbody th{{position:static}}
details::details-content{{content-visibility:visible;display:block}}}}
"""

SCRIPT = """
for (const form of document.querySelectorAll("form[data-cases]")) {
  const list = document.getElementById(form.dataset.cases);
  const cases = [...list.querySelectorAll(".case")];
  const chosen = name => (form.querySelector(`[data-filter=${name}]`) || {value: ""}).value;
  const answerTo = item => item.querySelector(`.answer[data-model="${chosen("model")}"]`);
  const fits = item => {
    const answer = answerTo(item);
    if (!answer) return false;
    const labels = (item.dataset.true + "|" + answer.dataset.predicted).split("|");
    return (!chosen("outcome") || answer.dataset.outcome === chosen("outcome"))
      && (!chosen("label") || labels.includes(chosen("label")))
      && (!chosen("turn") || item.dataset.turn === chosen("turn"))
      && item.dataset.id.includes(chosen("id").trim().toLowerCase());
  };
  const update = () => {
    for (const item of cases) item.hidden = !fits(item);
    const sign = {up: 1, down: -1}[chosen("order")] || 0;
    const score = item => sign * (answerTo(item) || {dataset: {jaccard: 2}}).dataset.jaccard;
    list.append(...[...cases].sort((one, other) => score(one) - score(other)));
    const shown = cases.filter(item => !item.hidden).length;
    form.querySelector("output").textContent = `${shown} of ${cases.length} cases`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  update();
}
"""
