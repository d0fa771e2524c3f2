"""Style block of the report page for light and dark mode, without fonts from elsewhere.

Colors are those of Okabe and Ito, which the color-blind tell apart.
"""

STYLE = """\
<style>
:root { color-scheme: light dark;
  --back: #f6f7f9; --card: #ffffff; --line: #e3e6ea; --text: #1b1f24; --soft: #5b6470;
  --grid: #edeff2; --hover: rgba(20, 40, 80, .07); --accent: #0072b2;
  --bad: #b3261e; --bad-back: #fdeeec; --hint: #8a5a00; --hint-back: #fdf5e3;
  --good: #00674a; --good-back: #e8f6f0;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0558f; --c4: #c98a00; --c5: #3ba0d8;
  --c6: #a3adb8; }
@media (prefers-color-scheme: dark) { :root {
  --back: #0e1116; --card: #171b22; --line: #2a303a; --text: #e6e9ee; --soft: #9aa4b1;
  --grid: #232933; --hover: rgba(200, 220, 255, .08); --accent: #58b4ec;
  --bad: #ff9d92; --bad-back: #3a1d1b; --hint: #f2c46d; --hint-back: #342a14;
  --good: #6fd6ae; --good-back: #13302650;
  --c0: #4fb0ee; --c1: #ff8a3d; --c2: #2fc99a; --c3: #e08fc4; --c4: #f0b93a; --c5: #9ad6f7;
  --c6: #6b7582; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
header h1 { margin: 0; font-size: 25px; letter-spacing: -.01em; }
header p { margin: 2px 0 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; letter-spacing: -.01em; }
h3 { font-size: 14px; margin: 0 0 2px; }
.sub { color: var(--soft); font-size: 13px; margin: 0 0 8px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.cards .card > b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.cards .card > span { color: var(--soft); font-size: 13px; }
.grid2 { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.grid2 + .card { margin-top: 14px; }
ul.advice { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
ul.advice li { border-left: 4px solid; border-radius: 6px; padding: 9px 14px; }
ul.advice b { font-weight: 650; margin-right: 6px; }
ul.advice .bad { border-color: var(--bad); background: var(--bad-back); }
ul.advice .hint { border-color: var(--hint); background: var(--hint-back); }
ul.advice .good { border-color: var(--good); background: var(--good-back); }
.bad > b { color: var(--bad); } .hint > b { color: var(--hint); } .good > b { color: var(--good); }
figure.plot { margin: 0; }
svg.chart { width: 100%; height: auto; display: block; }
svg.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg.chart text.end { text-anchor: end; } svg.chart text.mid { text-anchor: middle; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); }
.stroke { fill: none; stroke-width: 2; stroke-linejoin: round; }
.stroke.dashed { stroke-dasharray: 6 4; }
.dot { stroke: var(--card); stroke-width: 1; } .dot.faint { opacity: .45; stroke: none; }
.area { stroke: var(--card); stroke-width: .6; }
.hit { fill: transparent; } .hit:hover { fill: var(--hover); }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 4px;
  padding: 0; font-size: 13px; color: var(--soft); }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.key.faint, .key.marks { border-radius: 50%; } .key.faint { opacity: .5; }
.bar { display: flex; height: 30px; border-radius: 7px; overflow: hidden; margin: 6px 0 12px; }
.bar i { display: block; min-width: 1px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } tr.sum td { font-weight: 650; }
.scroll { overflow-x: auto; }
.empty { color: var(--soft); font-style: italic; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); }
.sample { margin-bottom: 18px; } .sample .sub { margin: 0 0 4px; }
code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 13px; margin-top: 36px; }
@media (max-width: 820px) { .grid2 { grid-template-columns: 1fr; } main { padding: 18px 12px; }
  .cards { grid-template-columns: 1fr 1fr; } }
@media print { .card, ul.advice li { break-inside: avoid; } }
"""


def style_block() -> str:
    """The style, with a rule for each color of the palette."""
    rules = "".join(
        f".stroke.c{i} {{ stroke: var(--c{i}); }} .dot.c{i}, .area.c{i} {{ fill: var(--c{i}); }} "
        f".key.c{i}, .bar .c{i} {{ background: var(--c{i}); }}\n"
        for i in range(7)
    )
    return STYLE + rules + "</style>"
