'use strict';

// Everything that the daemon says is put in as text, never as markup: names of next hops and
// listeners, and texts of events, may be anything.

// Number of points, one each second. The charts show as many minutes as there are points for, and
// at least two.
const KEPT = 900;
const LEAST = 120;
// Times between two ticks of the time axis, in seconds. The first one that has room is taken.
const TICKS = [30, 60, 120, 180, 300];
// Time between two questions, and the longest wait for an answer, in milliseconds.
const INTERVAL = 1000;
const PATIENCE = 8000;
// Two points that are further apart, in seconds, aren't joined: nobody knows what was between.
const GAP = 3.5;

const EVENTS = {
  'load': { flag: 'R', color: 'blue', name: 'configuration loaded' },
  'load-failed': { flag: 'F', color: 'amber', name: 'load failed' },
  'crash': { flag: 'C', color: 'red', name: 'worker crashed' },
  'hang': { flag: 'H', color: 'red', name: 'worker hung' },
  'no-zygote': { flag: 'Z', color: 'red', name: 'nothing can fork workers' },
  'stop': { flag: 'S', color: 'grey', name: 'daemon stops' },
};
const OTHER_EVENT = { flag: '?', color: 'grey', name: 'other' };

let points = [];
let marks = [];
let status = null;
let previous = null;
let answered = 0;
let hover = null;

// --- Building elements ---------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const color = (name) => `var(--${name})`;

function key(name) {
  const made = element('i', { className: 'key' });
  made.style.background = color(name);
  return made;
}

function flagKey(event) {
  const made = element('span', { className: 'flag-key', textContent: event.flag });
  made.style.background = color(event.color);
  return made;
}

// --- Numbers for people --------------------------------------------------------------------------

const grouped = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });
const known = (value) => value !== null && value !== undefined;

function count(value) {
  return known(value) ? grouped.format(value) : '–';
}

function counted(value, one, many) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

function perSecond(value) {
  if (!known(value)) return '–';
  return value >= 100 ? grouped.format(value) : String(Number(value.toPrecision(3)));
}

function seconds(value) {
  if (!known(value)) return '–';
  if (value === 0) return '0 ms';
  if (value < 0.0995) return `${Number((value * 1000).toPrecision(2))} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return `${Number(value.toPrecision(3))} s`;
}

function bytes(value) {
  if (!known(value)) return '–';
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit > 0 && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

function age(value) {
  const [d, h, m] = [86400, 3600, 60].map((unit) => Math.floor(value / unit));
  if (d > 0) return `${d} d ${h % 24} h`;
  if (h > 0) return `${h} h ${m % 60} min`;
  return m > 0 ? `${m} min ${Math.floor(value % 60)} s` : `${Math.floor(value)} s`;
}

const clock = (at) => new Date(at * 1000).toLocaleTimeString('en-GB');
const minute = (at) => clock(at).slice(0, 5);

function moment(at) {
  const day = new Date(at * 1000);
  const today = day.toDateString() === new Date().toDateString();
  return today ? clock(at) : `${day.toLocaleDateString('en-CA')} ${clock(at)}`;
}

// --- Points of the charts ------------------------------------------------------------------------

function pointOf(status) {
  return {
    now: status.now, started: status.started, ...status.answers,
    in_flight: status.in_flight, waiting: status.waiting,
    p50: status.times.all.p50, p99: status.times.all.p99,
  };
}

const REPLIES = ['accepted', 'temporary', 'permanent', 'unanswered'];

// Adds rates, which are what has changed since the point before.
function addPoint(point) {
  const last = points.at(-1);
  if (last && point.now - last.now < 0.3) return;
  point.rates = null;
  if (last && point.started !== undefined && last.started === point.started) {
    const time = point.now - last.now;
    point.rates = REPLIES.map((reply) => Math.max(0, point[reply] - last[reply]) / time);
  }
  points.push(point);
  if (points.length > KEPT) points.shift();
}

// Remembers events of daemons that have ended, too.
function addMarks(incidents, now) {
  const seen = new Set(marks.map((mark) => `${mark.at} ${mark.kind} ${mark.text}`));
  for (const one of incidents) {
    if (!seen.has(`${one.at} ${one.kind} ${one.text}`)) marks.push(one);
  }
  marks.sort((one, other) => one.at - other.at);
  marks = marks.filter((mark) => mark.at > now - KEPT || incidents.some((one) => one.at === mark.at));
  marks = marks.slice(-200);
}

// --- Charts --------------------------------------------------------------------------------------

const TOP = 20;
const BOTTOM = 18;

class Chart {
  constructor(id, title, format, series, stacked) {
    Object.assign(this, { title, format, series, stacked });
    this.figure = $(id);
    this.svg = shape('svg', { role: 'img', 'aria-label': title });
    this.time = element('time');
    this.values = series.map(() => element('b'));
    const keys = series.map((one, index) =>
      element('span', {}, key(one.color), `${one.name} `, this.values[index]));
    this.figure.append(
      element('figcaption', {}, element('strong', { textContent: title }), ...keys, this.time),
      this.svg,
    );
    this.svg.addEventListener('pointermove', (event) => {
      hover = (event.clientX - this.svg.getBoundingClientRect().left) / this.svg.clientWidth;
      drawCharts();
    });
    this.svg.addEventListener('pointerleave', () => { hover = null; drawCharts(); });
  }

  draw(end, span) {
    const width = this.svg.clientWidth;
    const height = this.svg.clientHeight;
    if (width === 0) return;
    const x = (at) => width * (1 - (end - at) / span);
    const shown = points.filter((point) => point.now >= end - span);
    const rows = shown.map((point) => this.series.map((one) => one.value(point)));
    const total = (row) => this.stacked
      ? row.reduce((sum, value) => sum + (value ?? 0), 0)
      : Math.max(0, ...row.map((value) => value ?? 0));
    const most = Math.max(this.series[0].least, ...rows.map(total));
    const step = niceStep(most / 4);
    const lines = Math.ceil(most / step);
    const y = (value) => TOP + (height - TOP - BOTTOM) * (1 - value / (lines * step));

    const parts = [];
    for (let line = 0; line <= lines; line += 1) {
      const at = Math.round(y(line * step)) + 0.5;
      parts.push(shape('line', { class: 'grid', x1: 0, x2: width, y1: at, y2: at }));
    }
    this.drawTicks(parts, x, end, span, width, height);
    this.drawSeries(parts, shown, rows, x, y);
    for (let line = 1; line <= lines; line += 1) {
      parts.push(shape('text', { x: 2, y: y(line * step) - 3 }, this.format(line * step)));
    }
    drawMarks(parts, x, end - span, height);

    let index = shown.length - 1;
    if (hover !== null && shown.length > 0) {
      const at = end - span * (1 - hover);
      const distance = (one) => Math.abs(shown[one].now - at);
      index = shown.reduce((best, _, one) => (distance(one) < distance(best) ? one : best), 0);
      const line = x(shown[index].now);
      parts.push(shape('line', { class: 'cursor', x1: line, x2: line, y1: TOP, y2: height - BOTTOM }));
    }
    this.svg.replaceChildren(...parts);
    const row = rows[index] ?? this.series.map(() => null);
    row.forEach((value, one) => setText(this.values[one], this.format(value)));
    setText(this.time, hover !== null && shown[index] ? clock(shown[index].now) : '');
    const now = this.series.map((one, of) => `${one.name} ${this.format(rows.at(-1)?.[of])}`);
    this.svg.setAttribute('aria-label', `${this.title}: ${now.join(', ')}. At most ` +
      `${this.format(Math.max(0, ...rows.map(total)))} in the last ${age(span)}.`);
  }

  drawTicks(parts, x, end, span, width, height) {
    const step = TICKS.find((one) => one >= 75 * span / width) ?? TICKS.at(-1);
    for (let at = Math.ceil((end - span) / step) * step; at <= end; at += step) {
      parts.push(shape('line', {
        class: 'grid', x1: x(at), x2: x(at), y1: TOP, y2: height - BOTTOM,
      }));
      const text = step < 60 ? clock(at) : minute(at);
      const half = text.length * 3.2;
      if (x(at) < half || x(at) > width - half) continue;
      parts.push(shape('text', { x: x(at), y: height - 4, 'text-anchor': 'middle' }, text));
    }
  }

  // Draws the last series first, because stacked ones are drawn over what is above them.
  drawSeries(parts, shown, rows, x, y) {
    for (let of = this.series.length - 1; of >= 0; of -= 1) {
      const value = (row) => {
        if (!known(row[of])) return null;
        return this.stacked ? row.slice(0, of + 1).reduce((sum, one) => sum + one, 0) : row[of];
      };
      let line = '';
      let area = '';
      let run = [];
      const close = () => {
        if (run.length > 0) {
          const path = run.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join('L');
          // A point alone is a line of no length, which has round ends.
          line += `M${path}${run.length === 1 ? 'z' : ''}`;
          area += `M${run[0][0].toFixed(1)} ${y(0)}L${path}L${run.at(-1)[0].toFixed(1)} ${y(0)}z`;
        }
        run = [];
      };
      rows.forEach((row, index) => {
        const found = value(row);
        if (found === null || (index > 0 && shown[index].now - shown[index - 1].now > GAP)) close();
        if (found !== null) run.push([x(shown[index].now), y(found)]);
      });
      close();
      const paint = color(this.series[of].color);
      if (this.stacked) {
        // Nothing of what lies below shows through.
        parts.push(shape('path', { d: area, fill: color('card') }));
        parts.push(shape('path', { d: area, fill: paint, 'fill-opacity': 0.45 }));
      } else if (this.series[of].filled) {
        parts.push(shape('path', { d: area, fill: paint, 'fill-opacity': 0.15 }));
      }
      parts.push(shape('path', {
        d: line, fill: 'none', stroke: paint, 'stroke-width': 1.6,
        'stroke-linejoin': 'round', 'stroke-linecap': 'round',
      }));
    }
  }
}

// Returns a round number that is at least this: 1, 2 or 5 with zeros, or a part of it.
function niceStep(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.9999) * power;
}

// Marks that would overlap share a flag, which counts them and has the color of the worst.
function drawMarks(parts, x, begin, height) {
  const groups = [];
  for (const mark of marks.filter((one) => one.at >= begin)) {
    const event = EVENTS[mark.kind] ?? OTHER_EVENT;
    const group = groups.at(-1);
    if (group && x(mark.at) - x(group.at) < 17) {
      group.marks.push(mark);
      group.flags.push(event.flag);
      if (event.color === 'red') group.color = 'red';
    } else {
      groups.push({ at: mark.at, color: event.color, marks: [mark], flags: [event.flag] });
    }
  }
  for (const { at, color: name, marks: those, flags } of groups) {
    const number = (flag) => flags.filter((one) => one === flag).length;
    const label = [...new Set(flags)]
      .map((flag) => (number(flag) > 1 ? `${flag}${number(flag)}` : flag)).join('');
    const paint = color(name);
    const half = 5 + 3.5 * label.length;
    const line = Math.max(half, x(at));
    const group = shape('g', { class: 'flagged' });
    group.append(
      shape('line', { class: 'mark', stroke: paint, x1: line, x2: line, y1: 16, y2: height - BOTTOM }),
      shape('rect', { x: line - half, y: 1, width: 2 * half, height: 15, rx: 3, fill: paint }),
      shape('text', { class: 'flag', x: line, y: 12.5 }, label),
      shape('title', {}, those.map((mark) => `${clock(mark.at)} ${mark.text}`).join('\n')),
    );
    parts.push(group);
  }
}

const rateOf = (index) => (point) => point.rates?.[index] ?? null;
const charts = [
  new Chart('rate', 'Mails per second', perSecond, [
    { name: 'accepted', color: 'green', least: 4, value: rateOf(0) },
    { name: 'not now', color: 'amber', value: rateOf(1) },
    { name: 'refused', color: 'red', value: rateOf(2) },
    { name: 'no answer', color: 'grey', value: rateOf(3) },
  ], true),
  new Chart('latency', 'Time for a mail', seconds, [
    { name: 'half within', color: 'blue', least: 0.004, filled: true, value: (point) => point.p50 },
    { name: '99 % within', color: 'violet', value: (point) => point.p99 },
  ], false),
  new Chart('load', 'Mails in flight', count, [
    { name: 'with workers', color: 'blue', least: 4, filled: true, value: (point) => point.in_flight },
    { name: 'waiting for one', color: 'amber', value: (point) => point.waiting },
  ], false),
];

function drawCharts() {
  const last = points.at(-1);
  if (!last) return;
  const covered = Math.ceil((last.now - points[0].now) / 60) * 60;
  const span = Math.min(KEPT, Math.max(LEAST, covered));
  for (const chart of charts) chart.draw(last.now, span);
}

// --- Tables --------------------------------------------------------------------------------------

// A table whose rows and cells stay, so that a selection and the place scrolled to stay as well.
class Table {
  constructor(id, name, heads, empty) {
    this.body = element('tbody');
    const head = element('tr', {}, ...heads.map((text) =>
      element('th', { scope: 'col', textContent: text })));
    const caption = element('caption', { className: 'hidden', textContent: name });
    this.box = element('div', { className: 'table', tabIndex: 0 },
      element('table', {}, caption, element('thead', {}, head), this.body));
    this.box.setAttribute('role', 'region');
    this.box.setAttribute('aria-label', name);
    this.empty = element('p', { className: 'empty', textContent: empty });
    $(id).append(this.box, this.empty);
  }

  // Each cell is a text, or an object with a text and the filled part of a bar.
  show(rows) {
    this.box.hidden = rows.length === 0;
    this.empty.hidden = rows.length > 0;
    while (this.body.rows.length > rows.length) this.body.lastChild.remove();
    rows.forEach((cells, index) => {
      const row = this.body.rows[index] ?? this.body.insertRow();
      cells.forEach((cell, column) => {
        const box = row.cells[column] ?? row.insertCell();
        fill(box, typeof cell === 'object' ? cell : { text: cell });
      });
    });
  }
}

function fill(box, { text, part, title }) {
  if (part === undefined) {
    setText(box, text);
  } else {
    if (box.children.length === 0) {
      box.append(element('span'), element('span', { className: 'bar' }, element('i')));
    }
    setText(box.firstChild, text);
    box.lastChild.firstChild.style.width = `${Math.round(100 * Math.min(1, Math.max(0, part)))}%`;
  }
  if (title !== undefined && box.title !== title) box.title = title;
}

const tables = {
  phases: new Table('phases', 'Where a mail’s time goes',
    ['phase', 'half within', '99 % within'], 'No mail yet.'),
  hops: new Table('hops', 'Next hops',
    ['next hop', 'in flight', 'per second', 'accepted', 'not now', 'refused', 'no answer',
      'connect failures', 'half within', '99 % within'], 'No mail has gone anywhere yet.'),
  workers: new Table('workers', 'Workers',
    ['worker', 'process', 'generation', 'state', 'in flight', 'mails', 'accepted', 'not now',
      'refused', 'Lua memory', 'resident', 'threads', 'age'], 'There is no worker.'),
  listeners: new Table('listeners', 'Listeners',
    ['address', 'mode', 'connections', 'without a worker', 'in the kernel’s backlog'],
    'There is no listener.'),
  databases: new Table('databases', 'Databases',
    ['database', 'connections', 'busy', 'waiting', 'errors'], ''),
  dictionaries: new Table('dictionaries', 'Shared dictionaries',
    ['dictionary', 'keys', 'memory', 'hits', 'misses', 'evictions'], ''),
};

const ratio = (value, limit) => (limit > 0 ? value / limit : 0);
const mailsOf = ({ accepted, temporary, permanent, unanswered }) =>
  accepted + temporary + permanent + unanswered;
const named = (text) => ({ text, title: text });

// Returns how many mails a second a next hop has got since the status before.
function hopRate(hop) {
  const before = previous?.next_hops.find((one) => one.next_hop === hop.next_hop);
  const time = status.now - (previous?.now ?? status.now);
  if (!before || time <= 0 || previous.started !== status.started) return null;
  return Math.max(0, mailsOf(hop.answers) - mailsOf(before.answers)) / time;
}

function showTables() {
  const { times } = status;
  const phases = [
    ['waiting for a worker', times.queue], ['reading', times.read], ['handler', times.lua],
    ['next hop or program', times.hop], ['all', times.all],
  ];
  tables.phases.show(phases.map(([name, one]) => [
    name,
    { text: seconds(one.p50), part: ratio(one.p50, times.all.p50) },
    { text: seconds(one.p99), part: ratio(one.p99, times.all.p99) },
  ]));
  tables.hops.show(status.next_hops.map((hop) => [
    named(hop.next_hop), count(hop.in_flight), perSecond(hopRate(hop)),
    count(hop.answers.accepted), count(hop.answers.temporary), count(hop.answers.permanent),
    count(hop.answers.unanswered), count(hop.connect_failures),
    seconds(hop.times.p50), seconds(hop.times.p99),
  ]));
  tables.workers.show(status.workers.map((one) => [
    String(one.worker), known(one.pid) ? String(one.pid) : '–', String(one.generation), one.state,
    { text: `${count(one.in_flight)} of ${count(one.credit)}`, part: ratio(one.in_flight, one.credit) },
    count(one.mails), count(one.answers.accepted), count(one.answers.temporary),
    count(one.answers.permanent), bytes(one.lua_bytes), bytes(one.rss_bytes),
    count(one.threads), age(one.age),
  ]));
  tables.listeners.show(status.listeners.map((one) => [
    named(one.address), one.mode ?? '–', count(one.connections), count(one.held),
    known(one.backlog)
      ? { text: `${count(one.backlog)} of ${count(one.backlog_limit)}`,
          part: ratio(one.backlog, one.backlog_limit) }
      : { text: '–', part: 0 },
  ]));
  tables.databases.show(status.databases.map((one) => [
    named(one.database),
    { text: `${count(one.connections)} of ${count(one.limit)}`, part: ratio(one.connections, one.limit) },
    count(one.busy), count(one.waiting), count(one.errors),
  ]));
  tables.dictionaries.show(status.dictionaries.map((one) => [
    named(one.dictionary), count(one.keys),
    { text: `${bytes(one.bytes)} of ${bytes(one.limit_bytes)}`, part: ratio(one.bytes, one.limit_bytes) },
    count(one.hits), count(one.misses), count(one.evictions),
  ]));
  for (const name of ['databases', 'dictionaries']) {
    $(name).parentElement.hidden = status[name].length === 0;
  }
}

// --- The rest of the page ------------------------------------------------------------------------

// Shows a list of terms with one or two descriptions each.
function showTerms(list, terms) {
  while (list.children.length > terms.length) list.lastChild.remove();
  terms.forEach(({ name, value, more, bad }, index) => {
    let box = list.children[index];
    if (!box) {
      box = element('div', {}, element('dt'), element('dd'), element('dd', { className: 'more' }));
      list.append(box);
    }
    const [term, first, second] = box.children;
    setText(term, name);
    setText(first, value);
    first.className = bad ? 'value bad' : 'value';
    setText(second, more ?? '');
    second.hidden = !more;
  });
}

function showFacts() {
  const load = status.last_load;
  const facts = [
    { name: 'version', value: status.program },
    { name: 'up', value: age(status.now - status.started) },
    { name: 'process', value: String(status.pid) },
    { name: 'generation', value: known(status.generation) ? String(status.generation) : 'none' },
    { name: 'sandbox', value: status.sandbox ?? '–' },
    { name: 'configuration', value: status.config },
  ];
  showTerms($('facts'), facts);
  const badge = $('state');
  const failed = load && load.failure !== null;
  setText(badge, failed ? `${status.state}, last load failed` : status.state);
  badge.className = `badge ${status.state === 'serving' && !failed ? 'good' : 'fair'}`;
}

function showTiles() {
  const { rates, times, answers, ends } = status;
  const credit = status.workers.reduce((sum, one) => sum + (one.state === 'ready' ? one.credit : 0), 0);
  const ready = status.workers.filter((one) => one.state === 'ready').length;
  showTerms($('tiles'), [
    { name: 'mails per second', value: perSecond(rates.second),
      more: `${perSecond(rates.minute)} in 1 min, ${perSecond(rates.quarter)} in 15 min` },
    { name: 'half of the mails within', value: seconds(times.all.p50),
      more: `99 % within ${seconds(times.all.p99)}` },
    { name: 'in flight', value: count(status.in_flight), more: `of ${count(credit)} at most` },
    { name: 'waiting for a worker', value: count(status.waiting),
      more: `${counted(status.held, 'connection', 'connections')} held`, bad: status.waiting > credit && credit > 0 },
    { name: 'mails accepted', value: count(answers.accepted),
      more: `${count(answers.temporary)} not now, ${count(answers.permanent)} refused` },
    { name: 'workers ready', value: count(ready), bad: ready === 0,
      more: `${count(ends.crashes)} crashed, ${counted(ends.lost_mails, 'mail', 'mails')} lost` },
  ]);
}

function showEvents() {
  const items = marks.slice(-50).reverse().map((mark) => {
    const event = EVENTS[mark.kind] ?? OTHER_EVENT;
    const when = element('time', { textContent: moment(mark.at) });
    when.dateTime = new Date(mark.at * 1000).toISOString();
    const flag = flagKey(event);
    flag.title = event.name;
    flag.append(element('span', { className: 'hidden', textContent: `: ${event.name}` }));
    return element('li', {}, when, flag, element('span', { textContent: mark.text }));
  });
  const list = $('problems');
  const shown = marks.map((mark) => `${mark.at} ${mark.kind} ${mark.text}`).join('\n');
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  list.replaceChildren(...items);
}

function showLegend() {
  $('legend').replaceChildren(...Object.values(EVENTS).map((event) =>
    element('span', {}, flagKey(event), event.name)));
}

function showTrouble(text) {
  const box = $('trouble');
  box.hidden = text === null;
  document.body.classList.toggle('stale', text !== null);
  if (text === null) {
    setText(box, '');
    return;
  }
  const since = answered > 0 ? ` Last answer ${age((performance.now() - answered) / 1000)} ago.` : '';
  setText(box, text + since);
  setText($('state'), 'not reachable');
  $('state').className = 'badge bad';
  document.title = 'qrelay: not reachable';
}

// --- Asking --------------------------------------------------------------------------------------

async function ask(path) {
  const answer = await fetch(path, { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE) });
  if (answer.ok) return answer.json();
  const text = await answer.text();
  throw new Error(`The daemon can’t be reached: ${text.trim()}.`);
}

// Gets the points that this page has missed.
async function catchUp() {
  const history = await ask('/history.json');
  points = [];
  for (const point of history) addPoint(point);
}

async function look() {
  try {
    const now = points.at(-1)?.now;
    if (now === undefined || Date.now() / 1000 - now > 3 * GAP) await catchUp();
    const found = await ask('/status.json');
    previous = status;
    status = found;
    answered = performance.now();
    addPoint(pointOf(status));
    addMarks(status.incidents, status.now);
    showTrouble(null);
    showFacts();
    showTiles();
    showTables();
    showEvents();
    document.title = `${perSecond(status.rates.second)}/s – qrelay`;
  } catch (error) {
    const own = error.message.startsWith('The daemon');
    showTrouble(own ? error.message : 'qrelay web doesn’t answer.');
    const last = points.at(-1);
    if (last) addPoint({ now: last.now + INTERVAL / 1000 });
  }
  drawCharts();
  setTimeout(look, INTERVAL);
}

showLegend();
new ResizeObserver(drawCharts).observe($('charts'));
look();
