// The agent's local page: a live list, one request in detail, replay. No framework; everything shown is text nodes.
"use strict";

const MAX_ROWS = 500;
const SECRET = /^(authorization|proxy-authorization|cookie|set-cookie|x-api-key|x-auth-token|x-csrf-token)$/i;
const TABS = ["overview", "request", "response", "raw", "edit"];
const $ = (id) => document.getElementById(id);
const rows = new Map();          // id → {row, tr}
let selected = null;             // id of the open request
let current = null;              // its document
let tab = "overview";
let oldest = null;               // id below which there is more
let refreshTimer = 0;

// ── small helpers ───────────────────────────────────────────────────────────────────────────────────────────────────
function h(tag, attrs, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs || {})) {
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value);
    else if (value === true) el.setAttribute(name, "");
    else if (value !== false && value != null) el.setAttribute(name, value);
  }
  el.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return el;
}
function toast(text) {
  const el = $("toast");
  el.textContent = text;
  el.classList.add("show");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => el.classList.remove("show"), 2600);
}
async function ask(path, options) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  let told = null;
  try { told = await answer.json(); } catch { /* not a problem document */ }
  throw new Error(told ? `${told.detail}. ${told.hint}` : `the agent answered ${answer.status}`);
}
function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  for (const unit of ["kB", "MB", "GB"]) { bytes /= 1000; if (bytes < 1000 || unit === "GB") return `${bytes.toFixed(1)} ${unit}`; }
}
function took(ms) {
  if (ms == null) return "–";
  return ms < 10 ? `${ms.toFixed(2)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : ms < 120000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60000)} min`;
}
const clock = (at) => new Date(at).toLocaleTimeString([], {hour12: false});
const tone = (row) => `code s${row.state === "failed" && !row.status ? 5 : Math.floor(row.status / 100)}`;

// ── the list ────────────────────────────────────────────────────────────────────────────────────────────────────────
function filters() {
  const query = new URLSearchParams();
  for (const name of ["path", "status", "method", "tunnel"]) if ($(name).value) query.set(name, $(name).value);
  return query;
}
function wanted(row) {
  const query = filters();
  const status = query.get("status");
  if (query.has("tunnel") && row.tunnel !== query.get("tunnel")) return false;
  if (query.has("method") && row.method.toUpperCase() !== query.get("method")) return false;
  if (query.has("path") && !row.path.toLowerCase().includes(query.get("path").toLowerCase())) return false;
  if (!status) return true;
  if (status === "running") return row.state === "running";
  if (status === "error") return row.status >= 400 || row.state === "failed";
  return Math.floor(row.status / 100) === Number(status[0]);
}
const number = (id) => Number(id.slice(id.lastIndexOf("-") + 1));
function tags(row) {
  const made = [];
  if (row.replay_of) made.push(h("span", {class: "tag", title: "sent from this page"}, "replay"));
  if (row.kind === "websocket") made.push(h("span", {class: "tag"}, "ws"));
  if (row.kind === "events") made.push(h("span", {class: "tag"}, "sse"));
  if (row.kind === "upgrade") made.push(h("span", {class: "tag"}, "upgrade"));
  if (row.state === "failed") made.push(h("span", {class: "tag bad", title: row.failure}, "failed"));
  if (row.state === "aborted") made.push(h("span", {class: "tag", title: row.failure}, "left"));
  return made;
}
function fill(tr, row) {
  tr.dataset.id = row.id;
  tr.classList.toggle("running", row.state === "running");
  tr.classList.toggle("selected", row.id === selected);
  tr.replaceChildren(
    h("td", {}, h("span", {class: tone(row)}, row.status ? String(row.status) : "…")),
    h("td", {class: "method"}, row.method),
    h("td", {class: "path", title: row.path}, tags(row), h("a", {href: `/requests/${row.id}`, tabindex: "-1"}, row.path)),
    h("td", {class: "n took"}, row.state === "running" ? (row.status ? size(row.response_bytes) : "waiting") : took(row.duration_ms)),
    h("td", {class: "n at"}, clock(row.started_at)),
  );
}
function put(row, fresh) {
  const known = rows.get(row.id);
  if (!wanted(row)) {
    if (known) { known.tr.remove(); rows.delete(row.id); }
    return;
  }
  if (known) { known.row = row; fill(known.tr, row); return; }
  const tr = h("tr", {});
  fill(tr, row);
  if (fresh) tr.classList.add("new");
  const body = $("rows");
  let before = body.firstElementChild;
  while (before && number(before.dataset.id) > number(row.id)) before = before.nextElementSibling;
  body.insertBefore(tr, before);
  rows.set(row.id, {row, tr});
}
function trim() {
  const body = $("rows");
  while (rows.size > MAX_ROWS) {
    const last = body.lastElementChild;
    rows.delete(last.dataset.id);
    last.remove();
    oldest = body.lastElementChild.dataset.id;
  }
  $("empty").hidden = rows.size > 0;
  $("older").hidden = !oldest || rows.size >= MAX_ROWS;
}
async function load(before) {
  const query = filters();
  query.set("limit", "100");
  if (before) query.set("before", before);
  try {
    const told = await (await ask(`/api/requests?${query}`)).json();
    if (!before) { rows.clear(); $("rows").replaceChildren(); }
    for (const row of told.requests) put(row, false);
    oldest = told.next_before;
    trim();
    const filtered = filters().toString() !== "";
    $("empty").firstElementChild.firstElementChild.textContent = filtered ? "No request matches." : "No requests yet.";
    for (const el of [...$("empty").children].slice(1)) el.hidden = filtered;
  } catch (err) { toast(err.message); }
}

// ── what runs ───────────────────────────────────────────────────────────────────────────────────────────────────────
function showStatus(told) {
  const state = $("state");
  state.textContent = told.status;
  state.className = `pill ${told.status}`;
  const session = told.session;
  state.title = [session.account, session.relay && `relay ${session.relay}`, session.region].filter(Boolean).join(" · ");
  $("tunnels").replaceChildren(...told.tunnels.map((tunnel) => h("li", {},
    /^https?:/.test(tunnel.public_url)
      ? h("a", {href: tunnel.public_url, target: "_blank", rel: "noreferrer"}, tunnel.public_url)
      : h("span", {}, tunnel.public_url || tunnel.name),
    " ", h("span", {class: "to"}, `→ ${tunnel.config.addr}${tunnel.state === "online" ? "" : ` (${tunnel.state})`}`))));
  const http = told.metrics.http;
  const figures = {requests: http.count, "per s": http.rate1.toFixed(1), p50: took(http.p50), p90: took(http.p90)};
  if (session.rtt_ms != null) figures.relay = took(session.rtt_ms);
  $("figures").replaceChildren(...Object.entries(figures).map(([name, value]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
  const names = [...new Set(told.tunnels.map((tunnel) => tunnel.name))];
  const choice = $("tunnel");
  if (choice.options.length !== names.length + 1) {
    const kept = choice.value;
    choice.replaceChildren(h("option", {value: ""}, "any tunnel"), ...names.map((name) => h("option", {}, name)));
    choice.value = names.includes(kept) ? kept : "";
  }
  choice.hidden = names.length < 2;
  const first = told.tunnels.find((tunnel) => /^https?:/.test(tunnel.public_url));
  if (first) $("try").textContent = `curl ${first.public_url}/`;
}
function listen() {
  const source = new EventSource("/api/events");
  source.addEventListener("open", () => load());
  source.addEventListener("status", (event) => showStatus(JSON.parse(event.data)));
  source.addEventListener("requests", (event) => {
    const told = JSON.parse(event.data);
    const atTop = $("scroll").scrollTop;
    for (const row of told.rows) {
      put(row, true);
      if (row.id === selected && current && current.state === "running") reopen();
    }
    if (told.skipped && !oldest) oldest = told.rows[0].id;
    trim();
    if (atTop < 40) $("scroll").scrollTop = 0;
  });
  source.addEventListener("cleared", () => load());
  source.addEventListener("error", () => {
    $("state").textContent = "agent gone";
    $("state").className = "pill gone";
  });
}

// ── one request ─────────────────────────────────────────────────────────────────────────────────────────────────────
async function open(id, keepTab) {
  if (id !== selected && !keepTab && tab === "edit") tab = "overview";
  selected = id;
  for (const {row, tr} of rows.values()) tr.classList.toggle("selected", row.id === id);
  history.replaceState(null, "", `#${id}`);
  try {
    const told = await (await ask(`/api/requests/${id}`)).json();
    if (selected !== id) return;
    current = told;
    render();
  } catch (err) {
    if (selected === id) close();
    toast(err.message);
  }
}
function reopen() {
  if (refreshTimer || tab === "edit") return;
  refreshTimer = setTimeout(() => { refreshTimer = 0; if (selected) open(selected, true); }, 400);
}
function close() {
  selected = current = null;
  history.replaceState(null, "", location.pathname);
  document.querySelector("main").classList.remove("open");
  $("detail").hidden = true;
  for (const {tr} of rows.values()) tr.classList.remove("selected");
}
function render() {
  const doc = current;
  const detail = $("detail");
  const fresh = detail.dataset.id !== doc.id || detail.dataset.tab !== tab;
  const scrolled = fresh ? 0 : detail.querySelector("[role=tabpanel]").scrollTop;
  const panel = h("div", {role: "tabpanel", id: "panel", "aria-label": tab, tabindex: "-1"}, views[tab](doc));
  detail.replaceChildren(
    h("div", {class: "head"},
      h("div", {class: "title"}, h("h1", {}, `${doc.method} ${doc.path}`),
        h("button", {class: "x", type: "button", title: "Close (Esc)", "aria-label": "Close", onclick: close}, "×")),
      h("p", {class: "facts"}, h("span", {class: tone(doc)}, doc.status ? String(doc.status) : "…"), tags(doc),
        h("span", {}, doc.state === "running" ? "running" : took(doc.duration_ms)), h("span", {}, clock(doc.started_at)),
        h("span", {}, `${doc.tunnel} → ${doc.target}`)),
      h("div", {class: "actions"},
        h("button", {class: "primary", type: "button", disabled: !doc.replayable, title: doc.replayable ? "Send it to the local target again (r)" : "Its body was not kept whole, or it was upgraded", onclick: () => replay()}, "Replay"),
        h("button", {type: "button", title: "A command that sends it to the local target (c)", onclick: () => copyCurl("local")}, "Copy as curl"),
        h("button", {type: "button", title: "A command that sends it to the public address", onclick: () => copyCurl("public")}, "curl (public)"),
        h("a", {class: "button", href: `/api/requests/${doc.id}/har`, download: `portico-${doc.id}.har`, title: "HTTP archive, credentials masked"}, "HAR")),
      h("div", {role: "tablist"}, TABS.map((name, at) => h("button", {
        role: "tab", type: "button", id: `tab-${name}`, "aria-selected": String(name === tab), "aria-controls": "panel",
        title: name === "edit" ? "Edit, then replay (e)" : `${at + 1}`, onclick: () => show(name),
      }, name[0].toUpperCase() + name.slice(1))))),
    panel);
  detail.dataset.id = doc.id;
  detail.dataset.tab = tab;
  detail.hidden = false;
  document.querySelector("main").classList.add("open");
  panel.scrollTop = scrolled;
}
function show(name) {
  if (!current) return;
  tab = name;
  render();
  if (name === "edit") $("edit-path").focus();
}

const views = {
  overview(doc) {
    const timing = doc.timing;
    const total = timing.total_ms || 1;
    const parts = [];
    if (doc.failure) parts.push(h("p", {class: `notice ${doc.state === "failed" ? "bad" : ""}`}, doc.failure));
    if (doc.original) parts.push(compared(doc));
    else if (doc.replay_of) parts.push(h("p", {class: "notice"}, `Replay of ${doc.replay_of}, which is kept no longer.`));
    const bar = h("div", {class: "bar"});
    if (timing.wait_ms != null) {
      const wait = h("i", {class: "wait"}), receive = h("i", {class: "receive"});
      wait.style.width = `${100 * timing.wait_ms / total}%`;
      receive.style.width = `${100 * timing.receive_ms / total}%`;
      bar.append(wait, receive);
    }
    parts.push(h("h2", {}, "Timing"), bar, pairs({
      "until the answer's head": timing.wait_ms == null ? "no answer" : [h("i", {class: "key wait"}), took(timing.wait_ms)],
      "the answer's body": timing.receive_ms == null ? null : [h("i", {class: "key receive"}), took(timing.receive_ms)],
      together: took(timing.total_ms),
    }));
    parts.push(h("h2", {}, "Facts"), pairs({
      began: new Date(doc.started_at).toLocaleString(), tunnel: doc.tunnel, target: doc.target, "from": doc.remote_addr || null,
      "request id": doc.request_id || null, "sent by the visitor": size(doc.request_bytes), "sent by the target": size(doc.response_bytes),
      type: doc.response ? doc.response.body.type || null : null, id: doc.id,
    }));
    for (const interim of doc.interim) parts.push(h("h2", {}, `Interim answer ${interim.status}`), fields(interim.headers));
    if (doc.response && doc.response.body.kept && doc.kind === "plain") parts.push(...body("Answer", doc.response.body, "response", doc));
    return parts;
  },
  request: (doc) => message("Headers", doc.request, "request", doc),
  response: (doc) => doc.response ? [
    h("h2", {}, `${doc.status} ${doc.response.reason}`), ...message("Headers", doc.response, "response", doc),
  ] : [h("p", {class: "notice"}, doc.state === "running" ? "The target has not answered yet." : "There was no answer.")],
  raw: (doc) => [h("h2", {}, "Request"), h("pre", {}, raw(`${doc.method} ${doc.path} HTTP/1.1`, doc.request)),
    h("h2", {}, "Response"), doc.response ? h("pre", {}, raw(`HTTP/1.1 ${doc.status} ${doc.response.reason}`, doc.response)) : h("p", {}, "none")],
  edit,
};

function pairs(facts) {
  return h("dl", {class: "pairs"}, Object.entries(facts).filter(([, value]) => value != null).map(([name, value]) =>
    [h("dt", {}, name), h("dd", {}, value)]));
}
function secretValue(name, value) {
  if (!SECRET.test(name)) return [value];
  const hidden = h("span", {}, "••••••••");
  const button = h("button", {class: "reveal", type: "button", onclick: () => {
    const open = button.textContent === "show";
    hidden.textContent = open ? value : "••••••••";
    button.textContent = open ? "hide" : "show";
  }}, "show");
  return [hidden, button];
}
function fields(list) {
  if (!list.length) return h("p", {class: "facts"}, "none");
  return h("table", {class: "fields"}, h("tbody", {}, list.map(([name, value]) =>
    h("tr", {}, h("th", {}, name), h("td", {}, secretValue(name, value))))));
}
function message(title, told, side, doc) {
  const parts = [h("h2", {}, title), fields(told.headers), ...body(doc.status === 101 ? "After the upgrade" : "Body", told.body, side, doc)];
  if (told.trailers.length) parts.push(h("h2", {}, "Trailers"), fields(told.trailers));
  return parts;
}
function body(title, told, side, doc) {
  const notes = [size(told.bytes)];
  if (told.type) notes.push(told.type);
  if (told.encoding) notes.push(told.decoded ? `${told.encoding}, unpacked here` : `${told.encoding}, not unpacked`);
  const heading = h("h2", {}, title, h("small", {}, notes.join(" · ")));
  if (!told.kept) return told.bytes ? [heading, h("p", {class: "notice"}, "Its bytes are kept no longer.")] : [heading];
  const link = `/api/requests/${doc.id}/body/${side}`;
  const tools = h("p", {class: "facts"}, h("a", {href: link, download: `${doc.id}-${side}.bin`}, told.truncated ? `Download the first ${size(told.kept)}` : "Download"));
  const cut = told.truncated ? [h("p", {class: "notice"}, `Only the first ${size(told.kept)} of ${size(told.bytes)} were kept.`)] : [];
  const messages = doc[side].messages;
  return [heading, ...cut, messages && messages.length ? conversation(messages) : shown(told, link), tools];
}
function conversation(messages) {
  return h("table", {class: "fields messages"}, h("tbody", {}, messages.map((message) => h("tr", {},
    h("th", {}, message.code ? `${message.type} ${message.code}` : message.type, h("br", {}), size(message.bytes)),
    h("td", {}, "text" in message ? (/^\s*[[{]/.test(message.text) ? pretty(message.text) : message.text) : hex(message.base64),
      message.cut && h("em", {}, " … cut off"))))));
}
function shown(told, link) {
  if (told.kind === "image" && !told.encoding && !told.truncated) return h("img", {class: "body", src: `${link}?as=image`, alt: "the body, an image"});
  if (told.kind === "json") return h("pre", {}, pretty(told.text));
  if (told.kind === "form") return fields([...new URLSearchParams(told.text)]);
  if ("text" in told) return h("pre", {}, told.text);
  return h("pre", {class: "hex"}, hex(told.base64));
}
function raw(line, told) {
  const head = told.headers.map(([name, value]) => `${name}: ${SECRET.test(name) ? "••••••••" : value}`);
  const tail = "text" in told.body ? told.body.text : told.body.kept ? hex(told.body.base64) : "";
  return [line, ...head, "", tail].join("\n");
}
function hex(base64) {
  const data = atob(base64);
  const lines = [];
  for (let at = 0; at < Math.min(data.length, 65536); at += 16) {
    const part = [...data.slice(at, at + 16)];
    const codes = part.map((c) => c.charCodeAt(0).toString(16).padStart(2, "0")).join(" ");
    lines.push(`${at.toString(16).padStart(6, "0")}  ${codes.padEnd(data.length < 16 ? 0 : 47)}  ${part.map((c) => (c >= " " && c <= "~" ? c : ".")).join("")}`);
  }
  return lines.join("\n");
}
// Tokens stay as they were sent: numbers keep their digits, strings their escapes, objects their repeated keys.
function pretty(text) {
  const out = document.createDocumentFragment();
  const token = /\s*("(?:[^"\\]|\\[^])*"|[{}[\],:]|[^\s{}[\],:"]+|")/gy;
  let depth = 0, match, last = "", plain = "";
  const stack = [];
  const flush = () => { if (plain) { out.append(plain); plain = ""; } };
  const newline = () => { plain += "\n" + "  ".repeat(Math.min(depth, 60)); };
  while ((match = token.exec(text))) {
    const word = match[1];
    const closing = word === "}" || word === "]";
    if (closing) { depth = Math.max(0, depth - 1); stack.pop(); }
    if ((last === "{" || last === "[") ? !closing : closing || last === ",") newline();
    if (word === "{" || word === "[") { depth += 1; stack.push(word); }
    if (word.length === 1 && "{}[],:".includes(word)) plain += word === ":" ? ": " : word;
    else {
      const key = word[0] === '"' && stack.at(-1) === "{" && (last === "{" || last === ",");
      flush();
      out.append(h("span", {class: key ? "j-k" : word[0] === '"' ? "j-s" : /^[-\d]/.test(word) ? "j-n" : "j-l"}, word));
    }
    last = word;
  }
  flush();
  return out;
}

// ── replay ──────────────────────────────────────────────────────────────────────────────────────────────────────────
function compared(doc) {
  const was = doc.original;
  const line = h("p", {class: "notice diff"}, "Replay of ", h("a", {href: `#${was.id}`, onclick: (event) => { event.preventDefault(); open(was.id); }}, was.id), ": ");
  const differs = (name, before, after) => before === after ? [`${name} ${after}`] : [`${name} `, h("del", {}, before), " ", h("ins", {}, after)];
  line.append(...differs("status", String(was.status), String(doc.status)), ", ",
    ...differs("size", size(was.response_bytes), size(doc.response_bytes)), `, ${took(was.duration_ms)} then, ${took(doc.duration_ms)} now`);
  return line;
}
async function replay(edit) {
  if (!current) return;
  if (!edit && !current.replayable) { toast("This request cannot be replayed unchanged."); return; }
  const options = {method: "POST"};
  if (edit) Object.assign(options, {body: JSON.stringify(edit), headers: {"Content-Type": "application/json"}});
  try {
    toast("Sending…");
    const made = await (await ask(`/api/requests/${current.id}/replay`, options)).json();
    toast(made.failure || `The target answered ${made.status} in ${took(made.duration_ms)}`);
    tab = "overview";
    open(made.id, true);
  } catch (err) { toast(err.message); }
}
function edit(doc) {
  const told = doc.request.body;
  const headers = doc.request.headers.filter(([name]) => !/^(content-length|transfer-encoding|connection|te)$/i.test(name));
  const method = h("input", {id: "edit-method", value: doc.method, spellcheck: "false", autocomplete: "off"});
  const path = h("input", {id: "edit-path", value: doc.path, spellcheck: "false", autocomplete: "off"});
  const lines = headers.map(([name, value]) => `${name}: ${value}`).join("\n");
  const head = h("textarea", {id: "edit-headers", spellcheck: "false", rows: String(Math.min(14, headers.length + 2))});
  head.value = lines;
  const binary = told.kept > 0 && !("text" in told);
  const text = h("textarea", {id: "edit-body", spellcheck: "false", disabled: binary});
  text.value = binary ? "" : told.text || "";
  const before = text.value;
  const send = () => {
    const made = {};
    if (method.value !== doc.method) made.method = method.value.trim();
    if (path.value !== doc.path) made.path = path.value.trim();
    const changed = text.value !== before || told.truncated;
    if (head.value !== lines || (changed && told.encoding)) {
      made.headers = head.value.split("\n").filter((line) => line.trim()).map((line) => {
        const colon = line.indexOf(":");
        return colon < 0 ? [line.trim(), ""] : [line.slice(0, colon).trim(), line.slice(colon + 1).trim()];
      }).filter(([name]) => !(changed && name.toLowerCase() === "content-encoding"));
    }
    if (changed && !binary) made.body = text.value;
    replay(Object.keys(made).length ? made : undefined);
  };
  return h("form", {class: "edit", onsubmit: (event) => { event.preventDefault(); send(); }},
    told.truncated && h("p", {class: "notice"}, `Only the first ${size(told.kept)} of the body were kept: what stands below is sent, and no more.`),
    h("div", {class: "line"}, h("label", {}, "Method", method), h("label", {}, "Path", path)),
    h("label", {}, "Headers, one a line (the length is set for you)", head),
    h("label", {}, binary ? "The body is binary and is sent as it was" : "Body", text),
    h("div", {class: "actions"}, h("button", {class: "primary"}, "Send to the local target")));
}
async function copyCurl(to) {
  if (!current) return;
  try {
    const text = await (await ask(`/api/requests/${current.id}/curl?to=${to}`)).text();
    await copy(text);
    toast(to === "public" ? "Copied: curl to the public address" : "Copied: curl to the local target");
  } catch (err) { toast(err.message); }
}
async function copy(text) {
  if (navigator.clipboard) { await navigator.clipboard.writeText(text); return; }
  const area = h("textarea", {});
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────
function step(by) {
  const list = [...$("rows").children];
  if (!list.length) return;
  const at = list.findIndex((tr) => tr.dataset.id === selected);
  const next = list[at < 0 ? 0 : Math.max(0, Math.min(list.length - 1, at + by))];
  open(next.dataset.id);
  next.scrollIntoView({block: "nearest"});
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape" && !$("help").open) { if (typing) event.target.blur(); else if (selected) close(); return; }
  if (typing || $("help").open) return;
  const keys = {
    j: () => step(1), k: () => step(-1), ArrowDown: () => step(1), ArrowUp: () => step(-1), r: () => replay(), e: () => show("edit"),
    c: () => copyCurl("local"), "/": () => $("path").focus(), "?": () => $("help").showModal(),
  };
  TABS.forEach((name, at) => { keys[at + 1] = () => show(name); });
  const arrow = event.key.startsWith("Arrow");
  if (keys[event.key] && !(arrow && $("detail").contains(event.target))) { event.preventDefault(); keys[event.key](); }
});
$("rows").addEventListener("click", (event) => {
  const tr = event.target.closest("tr");
  if (!tr || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  open(tr.dataset.id);
});
let typed = 0;
$("filters").addEventListener("input", (event) => {
  clearTimeout(typed);
  typed = setTimeout(() => load(), event.target.id === "path" ? 150 : 0);
  $("har").href = `/api/har?${filters()}`;
});
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("older").addEventListener("click", () => load(oldest));
$("clear").addEventListener("click", async () => {
  try { await ask("/api/requests", {method: "DELETE"}); close(); await load(); } catch (err) { toast(err.message); }
});
window.addEventListener("hashchange", () => { const id = location.hash.slice(1); if (id && id !== selected) open(id); });

if (!document.querySelector("main").classList.contains("plainpage")) {
  if (location.hash.length > 1) open(location.hash.slice(1));
  listen();
}
