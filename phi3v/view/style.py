"""Style of the page about a dataset, after the shared rules and those of the charts."""

VIEW_STYLE = """
:root { --trained: #d3f0db; --trained-ink: #0f5128; --image: #dbe7fb; --image-ink: #1d4690;
  --control: #6b4b8f; --cut: #e8590c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --trained: #17492a; --trained-ink: #b9f0cb; --image: #1d3a6b; --image-ink: #cfe0ff;
    --control: #c9a9ee; --cut: #ff8a3d; } }
h3 { font-size: 15px; margin: 18px 0 2px; overflow-wrap: anywhere; break-after: avoid; }
.number { text-align: right; white-space: nowrap; } .wide { overflow-x: auto; }
.list { margin-top: 12px; } .list tbody th, .list td { padding-top: 5px; padding-bottom: 5px; }
.list td { overflow-wrap: anywhere; }
.list ul { margin: 0; padding: 0; list-style: none; }
code { font: 0.93em ui-monospace, "DejaVu Sans Mono", monospace; }
.wrong { color: var(--wrong); font-weight: 600; }
.sample { border-top: 1px solid var(--rule); padding: 2px 0 18px; }
.sample p { margin: 0 0 8px; }
.sides { display: grid; grid-template-columns: 342px minmax(0, 1fr); gap: 12px 26px; }
.canvas { margin-bottom: 12px; }
.canvas > div { display: flex; align-items: flex-start; gap: 10px; }
.canvas svg { flex: none; overflow: visible; }
.canvas img { width: 110px; aspect-ratio: 1; outline: 1px solid var(--rule); }
.canvas figcaption { font-weight: 400; font-size: 0.87em; color: var(--muted); }
.canvas path { fill: none; vector-effect: non-scaling-stroke; shape-rendering: crispEdges; }
.under { stroke: #fff; stroke-width: 4px; stroke-opacity: 0.6; }
.cut { stroke: var(--cut); stroke-width: 2px; }
.tokens { font: 13px/1.95 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
div.tokens { margin: 0 0 12px; padding: 8px 12px; background: var(--panel); border-radius: 6px;
  max-height: 30em; overflow: auto; }
.tokens i { font-style: normal; border-right: 1px solid #8886; }
.tokens b { font-weight: 400; color: var(--control); border: 1px solid; border-radius: 4px;
  padding: 0 3px; margin: 0 1px; }
.tokens .more { color: var(--muted); border-style: dashed; }
.masked { color: var(--muted); }
.trained { background: var(--trained); color: var(--trained-ink); padding: 2px 0;
  border-bottom: 2px solid var(--s2); }
.trained b { color: inherit; }
.image { background: var(--image); color: var(--image-ink); border-radius: 10px; padding: 2px 9px;
  margin: 0 2px; }
.tokens, .room, .cell, [class^="in-"] { print-color-adjust: exact; }
dl { display: grid; grid-template-columns: 5em minmax(0, 1fr); gap: 2px 10px; margin: 0;
  font-size: 0.93em; }
dt { color: var(--muted); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow: auto; }
.cell { fill: none; stroke: var(--rule); } svg .ink { fill: var(--ink); }
.room { fill: var(--panel); stroke: var(--rule); }
.in-image { fill: var(--s0); } .in-text { fill: var(--muted); } .in-trained { fill: var(--s2); }
.swatch { margin-left: 12px; display: inline-block; width: 12px; height: 12px; }
.swatch.in-image { background: var(--s0); } .swatch.in-text { background: var(--muted); }
.swatch.in-trained { background: var(--s2); }
@media screen and (max-width: 680px) {
  .sides { grid-template-columns: minmax(0, 1fr); } }
@media print { div.tokens, dd { max-height: none; } }
"""
