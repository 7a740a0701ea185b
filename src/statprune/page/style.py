"""How the page looks: in light, in dark, on a phone and on paper."""

_LIGHT = """
--paper:#fcfcfa;--ink:#1b2226;--muted:#59646b;--line:#dfe2df;--soft:#f1f3f0;--accent:#176b6e;--gone:#e4e8e5;
--c0:#e9f2f0;--c1:#cfe4e0;--c2:#b0d3ce;--c3:#8cbfba;--c4:#65a8a5;--c5:#317c7e;--c6:#1a6467;--c7:#084a50;--over:#fff;
--d0:#2c5a87;--d1:#86abcf;--d2:#cbdcec;--d3:#eeefea;--d4:#f4dfbc;--d5:#dfa75a;--d6:#8f530b;--d0t:#fff;--d1t:var(--ink);
--d5t:var(--ink);--d6t:#fff"""

_DARK = """
--paper:#121617;--ink:#e6eaea;--muted:#9aa6aa;--line:#2b3335;--soft:#1a2021;--accent:#6fc2bb;--gone:#263032;
--c0:#1a282a;--c1:#1c3638;--c2:#1f4648;--c3:#245658;--c4:#2b6a6b;--c5:#4c9a96;--c6:#72bbb4;--c7:#a5ded6;--over:#0b1314;
--d0:#94c0ea;--d1:#3f6b96;--d2:#25394c;--d3:#2a2e2f;--d4:#44361f;--d5:#83601f;--d6:#e3ad55;--d0t:#0b1314;--d1t:#fff;
--d5t:#fff;--d6t:#0b1314"""

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif;font-variant-numeric:tabular-nums;
-webkit-print-color-adjust:exact;
print-color-adjust:exact}
main,header,footer{max-width:58rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
header p{margin:.5rem 0 0;color:var(--muted);max-width:42rem}
section{border-top:1px solid var(--line);margin-top:2.5rem;padding-top:1.5rem}
h2{font-size:1.15rem;font-weight:650;letter-spacing:-.005em;margin:0 0 .35rem}
h3{font-size:.95rem;font-weight:600;margin:1.75rem 0 .35rem}
p{margin:.35rem 0 .9rem;max-width:42rem}
.note,figcaption{color:var(--muted);font-size:.875rem;line-height:1.5}
code,pre{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
p code{overflow-wrap:anywhere}
pre{background:var(--soft);border-radius:.4rem;padding:.9rem 1rem;margin:.5rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:1.5rem 2rem;margin:2rem 0 0}
.figures dt{color:var(--muted);font-size:.875rem}
.figures dd{margin:0;font-size:1.7rem;line-height:1.25;font-weight:600;letter-spacing:-.01em}
.figures small{display:block;font-size:.85rem;line-height:1.4;font-weight:400;letter-spacing:0;color:var(--muted)}
table{border-collapse:collapse;width:100%}
th{font-weight:400;text-align:left}
.heat{table-layout:fixed;border-collapse:separate;border-spacing:2px;margin:.75rem 0;font-size:.8rem;line-height:1.2}
.heat caption{text-align:left;color:var(--muted);padding:.25rem 2px;
font:.8rem ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.heat th,.heat td{padding:0;height:1.75rem;text-align:center;overflow:hidden}
.heat tr>th:first-child{width:6.2rem;text-align:left;padding-right:.5rem;overflow-wrap:anywhere}
.heat thead th{color:var(--muted);height:1.4rem;overflow:visible}
.heat td{border-radius:2px}
.heat .sum{width:3.6rem;text-align:right}
.heat td.sum{font-weight:600}
.heat.few{width:auto;min-width:min(100%,calc(9.8rem + var(--columns)*3.1rem))}
.heat.many{border-spacing:1px}
.heat.many td:not(.sum){font-size:.68rem}.heat.most td:not(.sum){font-size:0}
.c0{--f:var(--c0)}.c1{--f:var(--c1)}.c2{--f:var(--c2)}.c3{--f:var(--c3)}.c4{--f:var(--c4)}.c5{--f:var(--c5)}.c6{--f:var(--c6)}
.c7{--f:var(--c7)}.d0{--f:var(--d0);--t:var(--d0t)}.d1{--f:var(--d1);--t:var(--d1t)}.d2{--f:var(--d2)}.d3{--f:var(--d3)}
.d4{--f:var(--d4)}.d5{--f:var(--d5);--t:var(--d5t)}.d6{--f:var(--d6);--t:var(--d6t)}
.c5,.c6,.c7{--t:var(--over)}
td[class^=c],td[class^=d],.swatches i{background:var(--f);color:var(--t,var(--ink))}
path[class^=c]{fill:var(--f)}
.legend{width:15rem;max-width:100%;font-size:.8rem;color:var(--muted);margin:.6rem 0 .5rem}
.swatches,.ends{display:flex;justify-content:space-between}
.swatches i{flex:1;height:.6rem}
.swatches i:first-child{border-radius:2px 0 0 2px}.swatches i:last-child{border-radius:0 2px 2px 0}
figure{margin:1rem 0}
figcaption{margin-top:.6rem}
svg{display:block;width:100%;height:auto}
.kept{fill:var(--accent)}.gone{fill:var(--gone)}
.masks{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:.5rem 2.5rem}
.masks.one{max-width:44rem}
.bars{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.45rem 1.25rem;margin:.75rem 0;font-size:.9rem}
.bars dt{color:var(--ink)}
.bars dd{margin:0;display:grid;grid-template-columns:1fr minmax(5.5rem,max-content);gap:.9rem;align-items:center}
.track{display:block}
.track b{display:block;height:.7rem;min-width:2px;border-radius:2px;background:var(--accent)}
.value{text-align:right;white-space:nowrap}
.rows{font-size:.875rem;line-height:1.45;margin:.5rem 0}
.rows th,.rows td{padding:.4rem .9rem .4rem 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
.rows thead th{color:var(--muted)}
.rows .n{text-align:right;white-space:nowrap;overflow-wrap:normal}
.rows tr>:last-child{padding-right:0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 2.5rem}
.two h3{margin-top:.75rem}
.figures dt::first-letter,.bars dt::first-letter,.facts:not(.names) dt::first-letter,.rows thead th::first-letter{
text-transform:uppercase}
.facts{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.4rem 1.5rem;margin:.75rem 0;font-size:.9rem}
.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
details summary{cursor:pointer;color:var(--accent);font-size:.9rem;padding:.25rem 0}
footer{border-top:1px solid var(--line);margin-top:2.5rem;padding-top:1.25rem;padding-bottom:3rem}
@media(max-width:40rem){
header{padding-top:1.75rem}h1{font-size:1.5rem}
.figures{grid-template-columns:1fr 1fr;gap:1.25rem 1.25rem}.figures dd{font-size:1.35rem}
.heat tr>th:first-child{width:5rem}.heat .sum{width:2.9rem}.heat.few{width:100%}
.heat.many td:not(.sum){font-size:0}.heat.many thead th:not(.sum){font-size:.68rem}
.bars{grid-template-columns:1fr;gap:.1rem}.bars dd{margin-bottom:.5rem}
.rows .wide{display:none}
}
@media print{
@page{margin:16mm 14mm}
body{font-size:10pt;background:none}
main,header,footer{max-width:none;padding-left:0;padding-right:0}header{padding-top:0}
section{margin-top:1.5rem;padding-top:1rem}
h2,h3{break-after:avoid}figure,.heat,.bars,.figures,pre,tr{break-inside:avoid}
section:has(details:not([open])){display:none}.heat.many:not(.most) td:not(.sum){font-size:5pt}
.two{break-inside:avoid}
.figures{grid-template-columns:repeat(4,1fr)}.masks{grid-template-columns:1fr 1fr;gap:.5rem 1.5rem}.masks.one{max-width:none}
.masks.one{grid-template-columns:1fr}section:has(.masks){break-inside:avoid}.legend{break-before:avoid}
}"""
).replace("\n", "")
