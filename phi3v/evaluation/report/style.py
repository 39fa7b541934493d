"""Style of the report, after the shared rules and those of the charts."""

REPORT_STYLE = """
.metrics thead th { width: 33%; } .metrics thead th:first-child { width: 34%; }
.metrics b { display: inline-block; min-width: 4.3em; font-size: 1.13em; white-space: nowrap; }
.interval { display: inline-block; min-width: 9em; }
.n { color: var(--muted); font-size: 0.87em; white-space: nowrap; }
.picture { width: 174px; }
.picture img { display: block; max-width: 160px; max-height: 160px; border-radius: 4px; }
.picture small, .examples small { overflow-wrap: anywhere; }
.examples td:last-child { min-width: 11.5em; }
.prompt { color: var(--muted); font-size: 0.87em; margin-top: 4px; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.right, .wrong { font-weight: 600; white-space: nowrap; }
.list td { padding-top: 5px; padding-bottom: 5px; overflow-wrap: anywhere; }
#data .charts { margin-top: 18px; }
@media screen and (max-width: 680px) {
  .metrics thead, .examples thead, .list thead { display: none; }
  .metrics tr, .examples tr, .list tr { display: block; border-bottom: 1px solid var(--rule);
    padding: 8px 0; }
  .metrics th, .metrics td, .examples td, .list td { display: block; width: auto; border: 0;
    padding: 3px 0; }
  td[data-label]::before { content: attr(data-label); display: block; color: var(--muted);
    font-size: 0.87em; }
  .metrics td[data-label]::before { display: inline-block; width: 4.9em; }
  .list td:empty { display: none; }
  .list td[data-label]::before { display: inline-block; width: 9em; }
  .metrics b { min-width: 4em; }
  .examples td[data-label]::before { display: inline; margin-right: 8px; }
  .examples tr { display: flow-root; }
  .examples img { float: left; margin-right: 12px; }
  .examples td small { display: inline-block; margin-right: 8px; } }
"""
