"use strict";
const PAGE_SIZE = 20;
// Entries; decisions about captions that are not on this page; and a hash of the decisions that the run has read.
const {entries, others, read} = JSON.parse(document.getElementById("data").textContent);
const original = new Map(entries.map(e => [e.key, JSON.stringify(e.written)]));
const memory = "mask2dit review " + location.pathname;
const byId = id => document.getElementById(id);
let page = 0, current = 0, shown = [], unsaved = false;

// What was decided survives closing the page: until it is saved, and then until a run has read what was saved.
try {
  const last = JSON.parse(localStorage.getItem(memory) || "null");
  if (last && !(last.saved && last.read !== read)) {
    for (const e of entries) if (last.kept[e.key]) Object.assign(e, last.kept[e.key]);
    unsaved = !last.saved;
  }
} catch (error) { console.warn(error); }

const isEdited = e => original.get(e.key) !== JSON.stringify([e.actors, e.captions]);
const filters = {
  all: () => true, groups: e => e.clips.length > 1, singles: e => e.clips.length === 1, flagged: e => e.flagged,
  open: e => !e.decision, keep: e => e.decision === "keep", drop: e => e.decision === "drop", edited: isEdited,
  faulty: e => e.decision !== "drop" && fault(e),
};

function remember(saved = false) {
  const kept = {};
  for (const e of entries) kept[e.key] = {decision: e.decision, actors: e.actors, captions: e.captions};
  try { localStorage.setItem(memory, JSON.stringify({saved, read, kept})); } catch (error) { console.warn(error); }
  unsaved = !saved;
  count();
}

function count() {
  const n = name => entries.filter(filters[name]).length;
  byId("counts").textContent = `${shown.length} shown of ${entries.length}: ${n("keep")} kept, ${n("drop")} dropped, ${n("edited")} edited, ${n("open")} undecided, ${n("flagged")} flagged`;
  const faulty = n("faulty");
  byId("faults").textContent = faulty ? `${faulty} cannot be used as edited` : "";
  byId("save").textContent = unsaved ? "Save decisions.json *" : "Save decisions.json";
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The rules that are broken most easily while editing; the export checks all of them.
function fault(e) {
  for (const [name, appearance] of Object.entries(e.actors)) {
    if (!appearance || /[()]/.test(appearance)) return `${name}: the appearance has to be a phrase without parentheses.`;
  }
  for (const [i, text] of e.captions.entries()) {
    if (!text) return `Scene ${i + 1}: the caption is empty.`;
    if (!/[.!?"'”]$/.test(text)) return `Scene ${i + 1}: the caption has to end with a complete sentence.`;
    const seen = new Set();
    for (const match of text.matchAll(/\bActor\d+\b/g)) {
      const name = match[0], rest = text.slice(match.index + name.length);
      if (!(name in e.actors)) return `Scene ${i + 1}: ${name} is not one of the actors.`;
      if (!seen.has(name) && !rest.startsWith(` (${e.actors[name]})`)) return `Scene ${i + 1}: the first ${name} needs “(${e.actors[name]})” behind it, word for word.`;
      seen.add(name);
    }
  }
  return "";
}

function card(e, position) {
  const article = make("article", {});
  const keep = make("button", {className: "keep", textContent: "Keep", onclick: () => decide("keep")});
  const drop = make("button", {className: "drop", textContent: "Drop", onclick: () => decide("drop")});
  const edited = make("button", {className: "tag edited", textContent: "edited: undo", onclick: undo});
  const message = make("p", {className: "fault"});
  const head = make("div", {className: "head"}, make("h2", {textContent: e.id}));
  e.adjacent.forEach((cosine, i) => head.append(make("span", {className: "tag", textContent: `${i + 1}–${i + 2} alike ${cosine.toFixed(2)}`, title: "cosine of the two clips"})));
  if (e.flagged) head.append(make("span", {className: "tag low", textContent: "caption may not fit"}));
  head.append(edited, make("span", {style: "flex:1"}), keep, drop);

  const areas = [];
  const clips = make("div", {className: e.clips.length > 1 ? "clips" : "clips single"});
  e.clips.forEach((clip, i) => {
    const video = make("video", {src: encodeURI(clip.path).replaceAll("#", "%23").replaceAll("?", "%3F"), poster: clip.poster, preload: "none", muted: true, loop: true, playsInline: true});
    video.dataset.from = clip.range ? clip.range[0] : 0;
    if (clip.range) {
      // The film itself: only the clip's part of it plays.
      const [from, to] = clip.range;
      video.src += `#t=${from},${to}`;
      video.ontimeupdate = () => { if (video.currentTime < from - 0.1 || video.currentTime >= to) video.currentTime = from; };
    }
    video.onmouseenter = () => { if (!video.controls) video.play().catch(() => {}); };
    video.onmouseleave = () => { if (!video.controls) video.pause(); };
    video.onclick = () => { video.controls = true; };
    const area = make("textarea", {value: e.captions[i], spellcheck: true});
    area.setAttribute("aria-label", `Caption of scene ${i + 1}`);
    area.oninput = () => { e.captions = e.captions.with(i, area.value.trim()); refresh(); remember(); };
    areas.push(area);
    const score = clip.cosine === null ? "" : ` · caption ${clip.cosine.toFixed(2)}`;
    clips.append(make("div", {className: "clip"}, video, make("span", {className: "soft", textContent: `Scene ${i + 1} · ${clip.info}${score}`}), area));
  });

  const actors = make("div", {});
  for (const name of Object.keys(e.actors)) {
    const input = make("input", {type: "text", value: e.actors[name]});
    input.setAttribute("aria-label", `Appearance of ${name}`);
    // The same words in every caption: changed here, they change there.
    input.oninput = () => {
      const before = `${name} (${e.actors[name]})`, after = `${name} (${input.value.trim()})`;
      e.actors = {...e.actors, [name]: input.value.trim()};
      e.captions = e.captions.map(text => text.replaceAll(before, after));
      areas.forEach((area, i) => { area.value = e.captions[i]; });
      refresh(); remember();
    };
    actors.append(make("label", {className: "actor"}, make("b", {textContent: name}), input));
  }

  function undo() {
    [e.actors, e.captions] = JSON.parse(original.get(e.key));
    cards[position] = card(e, position);
    article.replaceWith(cards[position].article);
    remember();
  }
  function decide(what) { e.decision = e.decision === what ? null : what; refresh(); remember(); }
  function refresh() {
    article.className = `${e.decision || ""} ${position === current ? "current" : ""}`;
    keep.classList.toggle("on", e.decision === "keep");
    drop.classList.toggle("on", e.decision === "drop");
    edited.hidden = !isEdited(e);
    message.textContent = fault(e);
    message.hidden = !message.textContent;
  }
  article.onclick = () => { if (current !== position) { current = position; cards.forEach(c => c.refresh()); } };
  article.append(head, make("div", {className: "body"}, clips, actors, message));
  refresh();
  return {article, decide, refresh, videos: () => article.querySelectorAll("video")};
}

let cards = [];
function draw() {
  const words = byId("search").value.toLowerCase();
  shown = entries.filter(filters[byId("filter").value]).filter(e => !words || (e.id + " " + e.captions.join(" ")).toLowerCase().includes(words));
  const pages = Math.max(1, Math.ceil(shown.length / PAGE_SIZE));
  page = Math.min(page, pages - 1);
  current = 0;
  cards = shown.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE).map(card);
  byId("entries").replaceChildren(...cards.map(c => c.article));
  if (!cards.length) byId("entries").append(make("p", {className: "soft", textContent: "Nothing to show."}));
  byId("page").textContent = `page ${page + 1} of ${pages}`;
  byId("back").disabled = page === 0;
  byId("next").disabled = page === pages - 1;
  count();
}

function turn(step) { page += step; draw(); scrollTo(0, 0); }
byId("filter").onchange = byId("search").oninput = () => { page = 0; draw(); };
byId("back").onclick = () => turn(-1);
byId("next").onclick = () => turn(1);
byId("save").onclick = () => {
  const decisions = {...others};
  for (const e of entries) if (e.decision || isEdited(e)) decisions[e.key] = {id: e.id, drop: e.decision === "drop", actors: e.actors, captions: e.captions};
  const url = URL.createObjectURL(new Blob([JSON.stringify(decisions, null, 2)], {type: "application/json"}));
  make("a", {href: url, download: "decisions.json"}).click();
  URL.revokeObjectURL(url);
  remember(true);
};
onbeforeunload = event => { if (unsaved) event.preventDefault(); };
onkeydown = event => {
  if (event.target.closest("textarea, input, select") || event.ctrlKey || event.metaKey || event.altKey || !cards.length) return;
  const move = {j: 1, k: -1}[event.key];
  if (move) {
    current = Math.max(0, Math.min(cards.length - 1, current + move));
    cards.forEach(c => c.refresh());
    cards[current].article.scrollIntoView({block: "center"});
  } else if (event.key === "e" || event.key === "d") cards[current].decide(event.key === "e" ? "keep" : "drop");
  else if (event.key === "p") cards[current].videos().forEach(video => { video.currentTime = Number(video.dataset.from); video.play(); });
};
// Where there are no groups, what there is.
if (!entries.some(filters.groups)) byId("filter").value = "all";
draw();
