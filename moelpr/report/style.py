"""How report.html looks: on a bright and a dark screen, on a phone, on paper."""

CSS = """
:root {
  --page: #fff; --ink: #1f2933; --muted: #5f6c7b; --rule: #d9dee4; --soft: #f5f7f9; --good: #1a6b4a; --bad: #9a3412;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "Noto Sans", "Noto Sans CJK SC", sans-serif;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --page: #14181d; --ink: #e6e9ed; --muted: #a3adb8; --rule: #39424d; --soft: #1d232a;
    --good: #6fcf9f; --bad: #f0a07a;
    --light-blue: #b5d3ee; --series-0: #5b9bea; --series-1: #e8a055; --series-2: #4cc29f; --series-3: #d98ac0;
    --series-4: #9fd0f5; --series-5: #d9c04f; --series-6: #b3bcc6; --series-7: #f08a7a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body {
  margin: 0 auto; padding: 40px 28px 56px; max-width: 1000px;
  color: var(--ink); background: var(--page); font: 15px/1.55 var(--sans);
}
.kicker { color: var(--muted); font-size: 13.5px; margin: 0 0 4px; }
h1 { font-size: 29px; line-height: 1.2; margin: 0 0 14px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--rule); break-after: avoid; }
h3 { font-size: 15px; margin: 12px 0 6px; break-after: avoid; }
p { margin: 0 0 12px; max-width: 80ch; }
.summary { font-size: 17px; line-height: 1.5; }
.note { color: var(--muted); font-size: 13.5px; font-weight: 400; margin-top: 8px; }

.verdict {
  border-left: 4px solid var(--good); background: var(--soft);
  padding: 10px 16px; margin: 18px 0 22px; break-inside: avoid;
}
.verdict b { color: var(--good); }
.verdict.missed { border-color: var(--bad); }
.verdict.missed b { color: var(--bad); }
.verdict ul { margin: 6px 0 0; padding-left: 20px; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th {
  font-size: 13px; color: var(--muted); font-weight: 600;
  vertical-align: bottom; border-bottom: 1.5px solid var(--muted);
}
tbody th { font-weight: 400; }
tr { break-inside: avoid; }
tr.group th { font-weight: 600; padding-top: 16px; border-bottom: 1px solid var(--muted); break-after: avoid; }
tr.mean td, tr.mean th { font-weight: 600; }
td small, th small { display: block; font-size: 12.5px; line-height: 1.3; font-weight: 400; }
th small { color: var(--muted); }
td.number span { white-space: nowrap; }
td .line { display: grid; grid-template-columns: 112px 1fr; }
td .note { margin: 0; }
.ok { color: var(--good); font-weight: 600; white-space: nowrap; }
.no { color: var(--bad); font-weight: 600; white-space: nowrap; }

figure { margin: 18px 0; break-inside: avoid; }
svg { max-width: 100%; height: auto; display: block; }
svg svg { max-width: none; }
figcaption { color: var(--muted); font-size: 13.5px; margin-top: 6px; max-width: 80ch; }
.pictures { display: flex; flex-wrap: wrap; gap: 18px 34px; align-items: flex-start; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 24px 28px; }
.charts svg { break-inside: avoid; }

pre {
  background: var(--soft); border: 1px solid var(--rule); padding: 10px 12px; margin: 0 0 14px; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
summary { cursor: pointer; margin: 10px 0; }
dl { display: grid; grid-template-columns: 150px 1fr; gap: 3px 14px; margin: 0; }
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
.sample { margin: 0 0 22px; break-inside: avoid; }
.sample .prompt { font-weight: 600; margin: 0 0 4px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 6px 36px; }
.columns section { break-inside: avoid; }

@page { size: A4; margin: 14mm; }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  h1 { font-size: 19pt; }
  h2 { font-size: 13pt; margin-top: 14pt; padding-top: 8pt; }
  .summary { font-size: 11.5pt; }
  .note, figcaption { font-size: 9pt; }
  th, td { padding: 3px 8px; }
  td small { display: inline-block; min-width: 52px; font-size: 8.5pt; }
  .pictures svg { max-height: 100mm; width: auto; }
  tr.group th { padding-top: 8px; }
  figure { margin: 10px 0; }
  .verdict { margin: 10px 0; }
  .charts { grid-template-columns: 1fr 1fr; gap: 14px; }
  .columns { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  .whole { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 8pt; }
  details > :not(summary) { display: none; }
}
@media (max-width: 560px) {
  body { padding: 24px 14px; }
  th, td { padding: 5px 3px; }
  td .line { grid-template-columns: 1fr; }
  table { font-size: 12.5px; }
  thead th { font-size: 11.5px; }
  td small, th small { font-size: 10.5px; }
  dl { grid-template-columns: minmax(0, 110px) 1fr; }
  .sample dl { grid-template-columns: 1fr; }
  .sample dd { margin-bottom: 6px; }
}
"""
