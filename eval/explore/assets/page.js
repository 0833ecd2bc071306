// The page of betarank explore. It shows a view (eval/explore/views.py): the one that an exported file holds, or those
// that its server sends. Texts are only ever set as text, never as markup.
'use strict';

const $ = (id) => document.getElementById(id);

let about = null;
let view = null;
let chosen = null;  // {passage, at} of the token in the inspector
let measure = 'entropy';
let compare = 'each';

// Small helpers

function make(name, attributes = {}, ...inside) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === 'class') node.className = value;
    else if (key === 'color') node.style.setProperty('--c', colour(value));
    else if (key.startsWith('--')) node.style.setProperty(key, value);
    else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...inside.filter((part) => part !== null && part !== ''));
  return node;
}

function shape(name, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === 'style') node.style.cssText = value;
    else node.setAttribute(key, value);
  }
  return node;
}

const colour = (m) => `var(--m${m % 4})`;
const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(values.length, 1);
const clamp = (x) => Math.min(1, Math.max(0, x));
const piece = (token) => view.vocabulary[token] ?? `<${token}>`;
// The text that token i of a passage begins: '' if it only continues a character that an earlier token began.
const textAt = (passage, i) => passage.texts[i] ?? piece(passage.tokens[i]);
const textOf = (passage, from, to) =>
  passage.tokens.slice(Math.max(0, from), to).map((_, n) => textAt(passage, Math.max(0, from) + n)).join('');
const isSpecial = (text) => /^(<end>|<\d+>|(<[0-9A-F]{2}>)+)$/.test(text);
const label = (m) => about.models[m].label.replace(/ = /g, '\u00a0=\u00a0');
const dot = (m) => make('i', {class: 'dot', color: m});

function probability(p) {
  if (p >= 0.9995) return p === 1 ? '100 %' : '>99.9 %';
  if (p >= 0.0995) return `${(100 * p).toFixed(1)} %`;
  if (p >= 0.001) return `${(100 * p).toFixed(2)} %`;
  if (p >= 1e-5) return `${(100 * p).toFixed(4)} %`;
  return p === 0 ? '0' : '<0.001 %';
}

const percent = (p) => (p >= 0.1 ? (100 * p).toFixed(1) : p >= 1e-4 ? (100 * p).toFixed(2) : '<0.01');

function visible(text) {
  if (text === '') return '∅';
  return printable(text.replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/^ | $/g, '␣'));
}

// Control characters have pictures of their own in Unicode.
const printable = (text) => text.replace(/[\x00-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));

// Measures. `of(f, i)` is the value of token i, and `value` its text; `heat` maps it to [0, 1], dark where the model is
// unsure or wrong; `ticks` are the values that the scale shows, with their texts; `lead(f, g, i)` is how much surer the
// model of g is than that of f; `gap` is the text of a lead; `surer` and `more` say in words what a lead means.

const nats = (x) => `${Number(x.toFixed(2))} ${x === 1 ? 'nat' : 'nats'}`;
const factor = (x) => `a factor of ${Math.exp(x).toFixed(2)}`;

const MEASURES = {
  entropy: {
    name: 'entropy', unit: 'nats', of: (f, i) => f.entropy[i], heat: (x) => clamp(x / 4) ** 0.6,
    ticks: [[0, '0'], [0.2, '0.2'], [0.8, '0.8'], [2, '2'], [4, '4 nats']],
    lead: (f, g, i) => f.entropy[i] - g.entropy[i], gap: nats,
    surer: 'is sharper', more: 'sharper', value: (f, i) => f.entropy[i].toFixed(2),
    chart: 'entropy before each token (nats)', height: (f, i) => f.entropy[i],
  },
  probability: {
    name: 'probability', unit: '', of: (f, i) => Math.exp(f.logp[i]), heat: (p) => clamp(-Math.log10(p) / 3) ** 0.7,
    ticks: [[1, '100 %'], [0.5, '50 %'], [0.1, '10 %'], [0.01, '1 %'], [0.001, '0.1 %']],
    lead: (f, g, i) => g.logp[i] - f.logp[i], gap: nats,
    surer: 'gives the text more probability', more: 'surer', value: (f, i) => probability(Math.exp(f.logp[i])),
    chart: 'surprise at each token, −log p (nats)', height: (f, i) => -f.logp[i],
  },
  rank: {
    name: 'rank', unit: '', of: (f, i) => f.rank[i] + 1, heat: (r) => clamp(Math.log(r) / Math.log(200)) ** 0.8,
    ticks: [[1, '1'], [4, '4'], [20, '20'], [60, '60'], [200, '200']],
    lead: (f, g, i) => Math.log((1 + f.rank[i]) / (1 + g.rank[i])), gap: factor,
    surer: 'ranks the text higher', more: 'surer', value: (f, i) => String(f.rank[i] + 1),
    chart: 'rank of each token (log scale)', height: (f, i) => Math.log2(1 + f.rank[i]),
  },
};
const LEAST_UNDERLINED = 0.01, LEAST_SHOWN = 0.05;  // leads
const tint = (lead) => clamp(Math.abs(lead)) ** 0.55 * 0.85;

function paint(node, passage, m, i) {
  const {of, heat, lead} = MEASURES[measure];
  const difference = compare === 'difference';
  let v;
  if (difference) {
    const other = m === 0 ? 1 : m;
    const d = lead(passage.figures[0], passage.figures[other], i);
    v = tint(d);
    node.style.setProperty('--c', colour(d > 0 ? other : 0));
    node.style.setProperty('--v1', v.toFixed(3));
  } else {
    v = heat(of(passage.figures[m], i));
    node.style.setProperty('--v1', clamp(2 * v).toFixed(3));
    node.style.setProperty('--v2', clamp(2 * v - 1).toFixed(3));
    if (passage.figures.length > 1) {
      const ahead = lead(passage.figures[m === 0 ? 1 : 0], passage.figures[m], i);
      node.style.setProperty('--ahead', ahead > LEAST_UNDERLINED ? (0.25 + 0.75 * tint(ahead)).toFixed(3) : 0);
    }
  }
  node.classList.toggle('tint', difference);
  // Where the text has to change its colour to stay readable: on light paper if hot, on dark paper if warm.
  node.classList.toggle('warm', v > (difference ? 0.5 : 0.57));
  node.classList.toggle('hot', !difference && v > 0.86);
}

// Tokens

function tokens(passage, m, withNext) {
  const box = make('div', {class: 'tokens'});
  passage.tokens.forEach((token, i) => {
    const text = textAt(passage, i);
    const node = make('span', {class: text === '' ? 't part' : isSpecial(text) ? 't special' : 't'});
    if (i in passage.texts) node.title = `${piece(token)}, with a part of a character`;
    if (text.includes('\n')) {
      node.append(make('span', {class: 'line-end'}, '↵'), text);
    } else {
      node.append(printable(text));
    }
    wire(node, passage, i);
    paint(node, passage, m, i);
    box.append(node);
  });
  if (withNext) {
    const node = make('span', {class: 't next', title: 'what comes next'}, 'next');
    wire(node, passage, passage.tokens.length);
    box.append(' ', node);
  }
  return box;
}

function wire(node, passage, i) {
  node.dataset.i = i;
  node.passage = passage;
  node.addEventListener('click', () => choose(passage, i));
  node.addEventListener('mouseenter', () => hover(passage, i, true));
  node.addEventListener('mouseleave', () => hover(passage, i, false));
}

function nodesOf(passage, i) {
  return [...document.querySelectorAll(`.t[data-i="${i}"]`)].filter((node) => node.passage === passage);
}

function hover(passage, i, on) {
  for (const node of nodesOf(passage, i)) node.classList.toggle('hover', on);
  if (passage === view.prompt) mark('hover', on ? i : null);
}

// Everything about a view

function show(next) {
  view = next;
  chosen = null;
  $('view').hidden = false;
  draw();
  inspect();
}

function draw() {
  drawVerdict();
  drawScale();
  drawChart();
  drawPanels();
  drawSamples();
  if (chosen) for (const node of nodesOf(chosen.passage, chosen.at)) node.classList.add('chosen');
}

function summary(passages, m) {
  const all = (name) => passages.flatMap((p) => p.figures[m][name].slice(0, p.tokens.length));
  return {
    ce: -mean(all('logp')), entropy: mean(all('entropy')), first: mean(all('rank').map((r) => Number(r === 0))),
    head: mean(all('head')), tail: mean(all('tail')),
  };
}

function drawVerdict() {
  const box = $('verdict');
  const {surer, gap} = MEASURES[measure];
  const N = view.prompt.tokens.length;
  box.replaceChildren();
  if (!N) return;
  const rows = about.models.map((_, m) => summary([view.prompt], m));
  const words = make('div');
  if (view.note) words.append(make('p', {class: 'soft note'}, view.note));
  if (rows.length === 1) {
    words.append(make('p', {}, `Over ${N} tokens: entropy ${rows[0].entropy.toFixed(3)} nats, cross-entropy `
      + `${rows[0].ce.toFixed(3)} nats.`));
  }
  for (let m = 1; m < rows.length; m++) words.append(comparison(rows, m, N));
  if (rows.length > 1) {
    const found = [largest(1), largest(0)].filter(Boolean);
    const none = `No token differs by more than ${gap(LEAST_SHOWN)}. Another text may show more.`;
    words.append(...(found.length ? found : [make('p', {}, none)]));
  }
  words.append(make('p', {class: 'soft'}, compare === 'difference'
    ? `A token has the colour of the model that ${surer}; the deepest is ${gap(1)} or more.`
    : `The stronger the colour, the more ${measure === 'entropy' ? 'unsure' : 'surprised'} is the model.`
      + (rows.length > 1 ? ` Underlined tokens are those where the panel’s model ${surer} than the `
        + `other, by more than ${gap(LEAST_UNDERLINED)}.` : '') + ' Choose a token to see what each model expected there.'));
  if (rows.length > 1 && compare === 'each') {
    words.append(make('button', {type: 'button', id: 'where', onclick: () => $('compare').querySelector(
      'input[value=difference]').click()}, 'Show where'));
  }
  const k = about.top_k;
  const titles = {
    '': '', 'cross-entropy, nats': 'mean of −log p of the tokens', 'entropy, nats': 'mean entropy before each token',
    'rank 1': 'share of tokens that were the most probable',
    [`head at ${k}`]: `probability of wrong tokens in the top ${k}`,
    [`tail at ${k}`]: `probability of wrong tokens outside the top ${k}`,
  };
  const body = rows.map((row, m) => make('tr', {},
    make('td', {}, dot(m), label(m)),
    ...[row.ce.toFixed(4), row.entropy.toFixed(4), probability(row.first), probability(row.head), probability(row.tail)]
      .map((text) => make('td', {}, text))));
  const table = make('table', {},
    make('thead', {}, make('tr', {},
      ...Object.entries(titles).map(([name, title]) => make('th', {scope: 'col', title}, name)))),
    make('tbody', {}, ...body));
  box.append(words, make('div', {class: 'scroll'}, table));
}

function comparison(rows, m, N) {
  const [f, g] = [view.prompt.figures[0], view.prompt.figures[m]];
  let sharper = 0, flatter = 0;
  for (let i = 0; i < N; i++) {
    if (f.entropy[i] - g.entropy[i] > 0.01) sharper++;
    if (g.entropy[i] - f.entropy[i] > 0.01) flatter++;
  }
  const name = (i) => make('strong', {color: i}, label(i));
  const d = rows[m].entropy - rows[0].entropy;
  const gap = rows[m].ce - rows[0].ce;
  const change = (x) => (Math.abs(x) < 5e-4 ? 'equal' : `${Math.abs(x).toFixed(3)} nats ${x < 0 ? 'lower' : 'higher'}`);
  return make('p', {},
    name(m), ` is sharper than `, name(0), ` at ${sharper} of ${N} tokens and flatter at ${flatter}: `
    + `its entropy is ${change(d)} on average, and its cross-entropy ${change(gap)}.`);
}

function drawScale() {
  const ramp = make('div', {class: 'ramp'});
  const difference = compare === 'difference';
  const steps = 40;
  for (let s = 0; s < steps; s++) {
    const x = s / (steps - 1);
    const cell = make('i', {class: difference ? 't tint' : 't'});
    if (difference) {
      const d = 2 * x - 1;
      cell.style.setProperty('--c', colour(d > 0 ? 1 : 0));
      cell.style.setProperty('--v1', tint(d));
    } else {
      cell.style.setProperty('--v1', clamp(2 * x));
      cell.style.setProperty('--v2', clamp(2 * x - 1));
    }
    ramp.append(cell);
  }
  $('scale').replaceChildren(ramp, difference ? differenceTicks() : valueTicks());
}

function valueTicks() {
  const {heat, ticks} = MEASURES[measure];
  return make('div', {class: 'ticks'}, ...ticks.map(([x, text]) => make('span', {'--at': heat(x)}, text)));
}

function differenceTicks() {
  const {more} = MEASURES[measure];
  const other = about.models.length > 2 ? 'the other' : label(1);
  return make('div', {class: 'ends'}, ...[`${label(0)} ${more}`, 'equal', `${other} ${more}`].map(
    (text) => make('span', {}, text)));
}

// The chart: a step line for each model along the text, filled between the first two in the colour of the lower one; or
// bars of the difference between the first two, up where the second is surer.

const H = 100;  // of the chart's own units; its width is one unit per token

function drawChart() {
  const svg = $('chart').querySelector('svg');
  const N = view.prompt.tokens.length;
  $('chart').hidden = N < 2;
  if (N < 2) return;
  svg.setAttribute('viewBox', `0 0 ${N} ${H}`);
  svg.replaceChildren();
  const difference = compare === 'difference';
  const title = difference ? drawBars(svg, N) : drawLines(svg, N);
  const names = difference ? [] : view.prompt.figures.map((_, m) => make('span', {}, dot(m), ' ', label(m)));
  svg.setAttribute('aria-label', title);
  $('chart').querySelector('figcaption').replaceChildren(make('span', {}, title), ...names);
  svg.append(shape('line', {class: 'hover', y1: 0, y2: H, visibility: 'hidden'}));
  svg.append(shape('line', {class: 'here', y1: 0, y2: H, visibility: 'hidden'}));
  if (chosen && chosen.passage === view.prompt) mark('here', chosen.at);
}

function drawBars(svg, N) {
  const [f, g] = view.prompt.figures;
  const leads = view.prompt.tokens.map((_, i) => MEASURES[measure].lead(f, g, i));
  const most = Math.max(0.1, ...leads.map(Math.abs));
  const bars = {0: '', 1: ''};
  leads.forEach((d, i) => {
    bars[d > 0 ? 1 : 0] += `M${i + 0.08} ${H / 2}h0.84v${(-d / most * (H / 2 - 4)).toFixed(2)}h-0.84Z`;
  });
  for (const m of [0, 1]) svg.append(shape('path', {d: bars[m], class: 'solid', style: `fill:${colour(m)}`}));
  svg.append(shape('line', {class: 'zero', x1: 0, x2: N, y1: H / 2, y2: H / 2}));
  return `how much ${MEASURES[measure].more} at each token, up to ${MEASURES[measure].gap(most)}; `
    + `up: ${label(1)}, down: ${label(0)}`;
}

function drawLines(svg, N) {
  const {chart, height} = MEASURES[measure];
  const figures = view.prompt.figures;
  const pad = 6;
  const highest = Math.max(1, ...figures.flatMap((f) => f.logp.map((_, i) => height(f, i))));
  const y = (f, i) => (H - pad - (H - 2 * pad) * height(f, i) / highest).toFixed(2);
  if (figures.length > 1) {
    const filled = {0: '', 1: ''};
    for (let i = 0; i < N; i++) {
      const [a, b] = [y(figures[0], i), y(figures[1], i)];
      filled[Number(b) > Number(a) ? 1 : 0] += `M${i} ${a}H${i + 1}V${b}H${i}Z`;
    }
    for (const m of [0, 1]) svg.append(shape('path', {d: filled[m], class: 'fill', style: `fill:${colour(m)}`}));
  }
  figures.forEach((f, m) => {
    let d = `M0 ${y(f, 0)}`;
    for (let i = 0; i < N; i++) d += `V${y(f, i)}H${i + 1}`;
    svg.append(shape('path', {d, style: `stroke:${colour(m)}`}));
  });
  return `${chart}, up to ${measure === 'rank' ? Math.round(2 ** highest) : highest.toFixed(1)}`;
}

// The tokens at which model m is surer than the other of the first two, by most first.
function largest(m) {
  const {lead, surer, value, name, unit} = MEASURES[measure];
  const [f, g] = m ? view.prompt.figures : view.prompt.figures.slice(0, 2).reverse();
  const found = view.prompt.tokens.map((_, i) => ({i, d: lead(f, g, i)})).filter(({d}) => d > LEAST_SHOWN)
    .sort((a, b) => b.d - a.d).slice(0, 5);
  if (!found.length) return '';
  const other = label(1 - m);
  const row = make('div', {class: 'largest'},
    make('span', {}, make('strong', {color: m}, label(m)), ` ${surer} above all at`));
  for (const {i} of found) {
    const before = textOf(view.prompt, i - 3, i).slice(-10);
    row.append(make('button', {type: 'button', class: 'chip', color: m, onclick: () => choose(view.prompt, i),
      title: `${name} of ${other}: ${value(f, i)}, of ${label(m)}: ${value(g, i)}`},
    make('code', {}, make('span', {}, visible(before)), make('b', {}, visible(piece(view.prompt.tokens[i])))),
    make('small', {class: 'num'}, `${value(f, i)} → ${value(g, i)}`)));
  }
  row.append(make('small', {}, `${name}${unit && ` in ${unit}`}, ${other} → ${label(m)}`));
  return row;
}

function mark(which, i) {
  const line = $('chart').querySelector(`line.${which}`);
  if (!line) return;
  line.setAttribute('visibility', i === null || i >= view.prompt.tokens.length ? 'hidden' : 'visible');
  if (i !== null) for (const end of ['x1', 'x2']) line.setAttribute(end, i + 0.5);
}

function chartPosition(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const N = view.prompt.tokens.length;
  return Math.min(N - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * N)));
}

function drawPanels() {
  const difference = compare === 'difference';
  const panels = [];
  for (let m = difference ? 1 : 0; m < about.models.length; m++) {
    const title = difference
      ? make('h2', {}, make('span', {}, `${label(0)} and ${label(m)}`))
      : make('h2', {}, make('span', {}, label(m)),
        label(m).includes('step') ? '' : make('small', {class: 'num'}, `step ${about.models[m].step}`));
    panels.push(make('section', {class: 'panel', color: m}, title, tokens(view.prompt, m, true)));
  }
  $('panels').replaceChildren(...panels);
}

function drawSamples() {
  const box = $('samples-view');
  box.replaceChildren();
  if (!view.samples.length) return;
  box.append(make('h2', {}, view.problem ? 'Answers' : 'Continuations'));
  if (view.problem) {
    box.append(make('p', {class: 'soft'}, `The right answer is ${view.problem.reference}.`));
  }
  const columns = about.models.map((_, m) => {
    const own = view.samples.filter((s) => s.by === m);
    const right = own.filter((s) => s.verdict === 'right').length;
    const head = make('h2', {}, dot(m), make('span', {}, label(m)),
      view.problem ? make('small', {class: 'num'}, `${right} of ${own.length} right`) : '');
    return make('div', {class: 'column'}, head, ...own.map((s) => sample(s, m)));
  });
  box.append(make('div', {class: 'columns'}, ...columns));
}

function sample(s, m) {
  const facts = make('footer', {});
  if (s.verdict) facts.append(make('span', {class: `badge ${s.verdict}`}, s.answer === null
    ? `${s.verdict}: no answer` : `${s.verdict}: ${s.answer}`));
  const {entropy, ce} = summary([s], m);
  facts.append(make('span', {class: 'num'}, `entropy ${entropy.toFixed(3)}, −log p ${ce.toFixed(3)} nats per token`));
  if (s.finish === 'length') facts.append(make('span', {}, 'cut'));
  return make('article', {class: 'sample', color: m}, tokens(s, m, false), facts);
}

// The inspector

function choose(passage, at) {
  for (const node of document.querySelectorAll('.chosen.t')) node.classList.remove('chosen');
  chosen = {passage, at};
  for (const node of nodesOf(passage, at)) node.classList.add('chosen');
  mark('here', passage === view.prompt ? at : null);
  inspect();
  keepInSight(nodesOf(passage, at));
}

// The inspector is a sheet at the bottom of a narrow screen, where it may hide the token.
function keepInSight(nodes) {
  const sheet = $('inspector').getBoundingClientRect();
  const lowest = sheet.width > 0.9 * innerWidth ? sheet.top - 30 : innerHeight;
  const boxes = nodes.map((node) => node.getBoundingClientRect());
  if (boxes.length && !boxes.some((box) => box.top > 0 && box.bottom < lowest)) {
    scrollBy({top: boxes[0].top - lowest / 2});
  }
}

function close() {
  for (const node of document.querySelectorAll('.chosen.t')) node.classList.remove('chosen');
  chosen = null;
  mark('here', null);
  inspect();
}

function step(by) {
  if (!chosen) {
    choose(view.prompt, 0);
    return;
  }
  const last = chosen.passage.tokens.length - (chosen.passage === view.prompt ? 0 : 1);
  const at = Math.min(last, Math.max(0, chosen.at + by));
  choose(chosen.passage, at);
}

function inspect() {
  const box = $('inspector');
  box.hidden = !chosen;
  document.body.classList.toggle('chosen', Boolean(chosen));
  if (!chosen) return;
  const {passage, at} = chosen;
  const target = at < passage.tokens.length ? passage.tokens[at] : null;
  const before = textOf(passage, at - 12, at).slice(-60).replace(/\n/g, '↵');
  const context = make('div', {class: 'context'}, before,
    make('b', {}, target === null ? '?' : visible(piece(target))));
  const buttons = make('div', {class: 'buttons'},
    make('button', {type: 'button', title: 'previous token (left arrow)', onclick: () => step(-1)}, '←'),
    make('button', {type: 'button', title: 'next token (right arrow)', onclick: () => step(1)}, '→'),
    make('button', {type: 'button', title: 'close (Escape)', onclick: close}, '✕'));
  const focused = [...box.querySelectorAll('.buttons button')].indexOf(document.activeElement);
  const longest = Math.exp(Math.max(...passage.figures.map((f) => f.top_logp[at][0])));  // one scale for all models
  const columns = passage.figures.map((f, m) => expectation(f, m, at, target, longest));
  box.replaceChildren(make('div', {class: 'head'}, context, buttons),
    make('div', {class: 'columns', '--n': Math.min(columns.length, 2)}, ...columns));
  if (focused >= 0) buttons.children[focused].focus({preventScroll: true});
}

function expectation(f, m, at, target, longest) {
  const facts = make('dl', {class: 'facts'});
  const fact = (name, text) => facts.append(make('dt', {}, name), make('dd', {}, text));
  if (target !== null) {
    fact('probability', probability(Math.exp(f.logp[at])));
    fact('rank', String(f.rank[at] + 1));
  }
  fact('entropy', `${f.entropy[at].toFixed(3)} nats`);
  const column = make('section', {color: m}, make('h2', {}, label(m)), facts);
  if (target !== null) column.append(...masses(f, at));
  column.append(make('div', {class: 'caption'}, make('span', {}, 'most probable'), make('span', {}, '%')));
  const list = make('ol', {class: 'top', 'aria-label': 'most probable tokens'});
  f.top[at].forEach((token, n) => list.append(bar(token, Math.exp(f.top_logp[at][n]), longest, token === target)));
  if (target !== null && !f.top[at].includes(target)) {
    const row = bar(target, Math.exp(f.logp[at]), longest, true);
    row.classList.add('far');
    list.append(row);
  }
  column.append(list);
  return column;
}

function masses(f, at) {
  const parts = [['target', 'this token', Math.exp(f.logp[at])],
    ['in-head', `rest of the top ${about.top_k}`, f.head[at]], ['in-tail', 'tail', f.tail[at]]];
  const stack = make('div', {class: 'mass', role: 'img',
    'aria-label': parts.map(([, name, p]) => `${name} ${probability(p)}`).join(', ')});
  const key = make('div', {class: 'key'});
  for (const [kind, name, p] of parts) {
    const part = make('i', {class: kind});
    part.style.flex = `${p} 0 0`;
    stack.append(part);
    key.append(make('span', {}, make('i', {class: kind}), `${name} ${probability(p)}`));
  }
  return [stack, key];
}

function bar(token, p, longest, isTarget) {
  const fill = make('i');
  fill.style.width = `${(100 * p / longest).toFixed(2)}%`;
  const row = make('li', {class: isTarget ? 'true' : '', title: visible(piece(token))},
    make('code', {}, visible(piece(token))), make('div', {class: 'track'}, fill),
    make('span', {class: 'value'}, percent(p)));
  row.dataset.token = token;
  const same = (on) => document.querySelectorAll(`.top li[data-token="${token}"]`)
    .forEach((other) => other.classList.toggle('same', on));
  row.addEventListener('mouseenter', () => same(true));
  row.addEventListener('mouseleave', () => same(false));
  return row;
}

// The server

const COMPUTING = 'computing; the first text of its length takes a few seconds, as programs are compiled …';

let busy = false;

function setBusy(on) {
  busy = on;
  $('ask').classList.toggle('busy', on);
}

// Returns the server's answer; null if there is none, or if another request is still being answered.
async function request(name, body, working) {
  if (busy) return null;
  const status = $('status');
  status.classList.remove('wrong');
  status.textContent = working;
  setBusy(true);
  try {
    const response = await fetch(`api/${name}`, {
      method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body)});
    const type = response.headers.get('Content-Type') ?? '';
    const isJson = type.startsWith('application/json');
    const why = response.status === 413 ? 'the text is longer than 64 KB' : `refused (${response.status})`;
    const answer = isJson ? await response.json() : {error: why};
    if (!response.ok) throw new Error(answer.error);
    status.textContent = '';
    return answer;
  } catch (error) {
    status.classList.add('wrong');
    status.textContent = error instanceof TypeError
      ? 'the server does not answer; was betarank explore ended?' : error.message;
    return null;
  } finally {
    setBusy(false);
  }
}

function sampling() {
  const number = (id) => Number($(id).value);
  return {samples: number('samples'), temperature: number('temperature'), top_p: number('top_p'),
    max_new_tokens: number('max_new_tokens'), seed: number('seed')};
}

async function ask(name, body, working) {
  const typed = $('text').value;
  const answer = await request(name, body, working);
  if (!answer) return;
  if (['document', 'problem'].includes(name) && $('text').value === typed) $('text').value = answer.text;
  show(answer);
}

function drawModels() {
  document.title = `${about.models.map((m) => m.label).join(' and ')} – betarank explore`;
  $('models').replaceChildren(...about.models.map((model, m) => make('li', {}, dot(m),
    make('span', {class: 'name'}, label(m)), ' ',
    make('small', {}, model.label.includes('step') ? model.name : `${model.name}, step ${model.step}`))));
  $('compare').hidden = about.models.length < 2;
  readChoices();  // a browser may have restored what was chosen before the page was loaded again
}

function listen() {
  const slow = 'sampling; the first time takes a while, as programs are compiled …';
  $('ask').addEventListener('submit', (event) => {
    event.preventDefault();
    ask('text', {text: $('text').value}, COMPUTING);
  });
  $('text').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('ask').requestSubmit();
  });
  $('ask').addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.target.tagName !== 'INPUT') return;
    event.preventDefault();  // it would press Look
    const buttons = {document: 'open-document', problem: 'open-problem'};
    $(buttons[event.target.id] ?? 'continue').click();
  });
  $('continue').addEventListener('click', () => ask('continue', {text: $('text').value, ...sampling()}, slow));
  $('open-document').addEventListener('click', () => ask(
    'document', {source: $('source').value, index: Number($('document').value)}, COMPUTING));
  $('open-problem').addEventListener('click', () => ask(
    'problem', {index: Number($('problem').value), ...sampling()}, slow));
}

function readChoices() {
  const checked = (name) => document.querySelector(`input[name=${name}]:checked`).value;
  measure = checked('measure');
  compare = about.models.length > 1 ? checked('compare') : 'each';
}

function listenToView() {
  for (const radio of document.querySelectorAll('input[type=radio]')) {
    radio.addEventListener('change', () => {
      readChoices();
      draw();
    });
  }
  const svg = $('chart').querySelector('svg');
  svg.addEventListener('click', (event) => choose(view.prompt, chartPosition(event)));
  svg.addEventListener('mousemove', (event) => mark('hover', chartPosition(event)));
  svg.addEventListener('mouseleave', () => mark('hover', null));
  document.addEventListener('keydown', (event) => {
    if (!view || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const closes = event.key === 'Escape' && event.target.type === 'radio';
    if (event.target.closest('input, textarea, select') && !closes) return;
    const keys = {ArrowLeft: () => step(-1), ArrowRight: () => step(1), Escape: close};
    if (keys[event.key]) {
      keys[event.key]();
      event.preventDefault();
    }
  });
}

async function start() {
  listenToView();
  const data = $('data');
  if (data) {
    const given = JSON.parse(data.textContent);
    about = given.about;
    drawModels();
    show(given.view);
    return;
  }
  listen();
  about = await request('about', {}, 'loading …');
  if (!about) return;
  drawModels();
  for (const [name, count] of Object.entries(about.sources)) {
    $('source').append(make('option', {value: name}, `${name} (${count})`));
  }
  $('documents').hidden = !Object.keys(about.sources).length;
  $('problems').hidden = !about.task;
  if (about.task) $('problems').title = about.task.uri;
  if (Object.keys(about.sources).length) {
    ask('document', {source: $('source').value, index: 0}, COMPUTING);
  } else {
    $('text').focus();
  }
}

start();
