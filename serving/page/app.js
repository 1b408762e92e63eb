"use strict";

const element = (id) => document.getElementById(id);
const history = []; // {id, text, columns}, oldest first
let model = { users: 0 };

async function call(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(typeof content.detail === "string" ? content.detail : JSON.stringify(content.detail));
  return content;
}

// -- items: their texts and columns come from a catalogue, so they are shown as text, never as HTML --------------------

const title = (item) => item.columns.title || item.text || item.id;

function create(tag, properties, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

// The address if it begins as one of `allowed`, else null. A javascript: address is none.
function address(value, allowed) {
  try {
    const { href } = new URL(value);
    return allowed.some((start) => href.startsWith(start)) ? href : null;
  } catch {
    return null;
  }
}

const picture = (item) => item.columns.image && address(item.columns.image, ["https://", "data:image/"]);

function row(item, note, act, pictured) {
  const { title: _, image: __, url, ...others } = item.columns;
  const notes = [note, ...Object.entries(others).map(([name, value]) => `${name}: ${value}`)].filter(Boolean);
  const words = create("span", { className: "words" }, create("span", { textContent: title(item) }),
    create("small", { textContent: notes.join(" · ") }));
  const button = create("button", { type: "button", title: item.text }, words);
  const source = picture(item);
  if (pictured) button.prepend(create(source ? "img" : "span", source ? { src: source, alt: "", loading: "lazy" } : { className: "img" }));
  button.addEventListener("click", () => act(item));
  const listed = create("li", {}, button);
  const link = url && address(url, ["https://", "http://"]);
  if (link) {
    const open = create("a", { href: link, rel: "noopener noreferrer", target: "_blank", textContent: "↗" });
    open.setAttribute("aria-label", `open ${title(item)}`);
    listed.append(open);
  }
  return listed;
}

function show(list, items, note, act) {
  const focused = [...list.children].findIndex((each) => each.contains(document.activeElement));
  const pictured = items.some(picture); // then an item without a picture gets an empty place
  list.replaceChildren(...items.map((item) => row(item, note(item), act, pictured)));
  if (focused >= 0 && items.length) list.children[Math.min(focused, items.length - 1)].querySelector("button").focus();
}

// -- answers: of several answers to one input, only the newest is shown ------------------------------------------------

function newest(compute, done) {
  let last = 0;
  return async (...words) => {
    const own = ++last;
    try {
      const result = await compute(...words);
      if (own === last) done(result);
    } catch (error) {
      if (own === last) element("state").textContent = error.message;
    }
  };
}

const search = newest(
  (query) => call(`v1/items?limit=50&query=${encodeURIComponent(query)}`),
  (found) => show(element("catalogue"), found.items, (item) => item.id, add),
);

const recommend = newest(
  () => {
    const request = { history: history.map((item) => item.id), k: 12 }, other = element("other").value;
    const beside = other ? call("v1/recommend", { ...request, model: other }).catch((error) => ({ error })) : null;
    return Promise.all([call("v1/recommend", { ...request, explain: true }), beside]);
  },
  ([found, beside]) => {
    element("state").textContent = history.length ? "" : "The most popular items, because the history is empty.";
    const titles = new Map(history.map((item) => [item.id, title(item)]));
    const because = (item) => (titles.has(item.because) ? `nearest in the history: ${titles.get(item.because).slice(0, 60)}` : "");
    show(element("recommendations"), found.items, because, add);
    element("comparison").hidden = !beside;
    if (beside) compare(found.items, beside);
  },
);

function compare(items, beside) {
  element("other-name").textContent = element("other").value;
  const ranks = new Map(items.map((item, index) => [item.id, index + 1])), others = beside.items || [];
  const both = others.filter((item) => ranks.has(item.id)).length;
  element("other-state").textContent = beside.error ? beside.error.message : `${both} of ${others.length} are recommended by both.`;
  const note = (item) => (ranks.has(item.id) ? `the other has it at rank ${ranks.get(item.id)}` : "");
  show(element("other-recommendations"), others, note, add);
}

const imagine = newest(
  (text) => (text.trim() ? Promise.all([
    call("v1/similar", { item: text, k: 10 }), model.users ? call("v1/audience", { text }) : null,
  ]) : [{ items: [] }, null]),
  ([near, audience]) => {
    show(element("similar"), near.items, (item) => `cosine ${item.score.toFixed(2)}`, add);
    element("audience").hidden = !audience;
    if (!audience) return;
    element("audience-state").textContent = `${audience.total} of ${audience.of} example users have it among their first 10.`;
    const users = audience.users.map(({ user, rank, history: items }) => ({
      columns: { title: `User ${user}` }, text: items.map(title).join("\n"), items,
      note: `rank ${rank}, after ${items.slice(-3).map(title).join(" | ")}`,
    }));
    show(element("users"), users, (user) => user.note, (user) => {
      history.splice(0, history.length, ...user.items);
      changed();
      element("history").scrollIntoView({ block: "nearest" });
    });
  },
);

// -- the history -------------------------------------------------------------------------------------------------------

function add(item) {
  history.push({ id: item.id, text: item.text, columns: item.columns });
  changed();
}

function changed() {
  // so that a history can be bookmarked
  window.history.replaceState(null, "", `#${history.map((item) => encodeURIComponent(item.id)).join(",")}`);
  show(element("history"), history, (item) => item.id, (item) => {
    history.splice(history.indexOf(item), 1);
    changed();
  });
  recommend();
}

function decoded(word) {
  try {
    return decodeURIComponent(word);
  } catch {
    return word; // not written by this page
  }
}

async function bookmarked() {
  const ids = location.hash.slice(1).split(",").filter(Boolean).map(decoded);
  const answers = await Promise.all(ids.map((id) => call(`v1/items?limit=1000&query=${encodeURIComponent(id)}`)));
  const found = answers.map((answer, number) => answer.items.find((item) => item.id === ids[number]));
  history.push(...found.filter(Boolean));
}

// -- inputs ------------------------------------------------------------------------------------------------------------

function later(act, milliseconds = 250) {
  let timer;
  return (...words) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...words), milliseconds);
  };
}

const searchLater = later(search), imagineLater = later(imagine);
element("query").addEventListener("input", (event) => searchLater(event.target.value));
element("text").addEventListener("input", (event) => imagineLater(event.target.value));
element("other").addEventListener("change", recommend);
element("clear").addEventListener("click", () => {
  history.length = 0;
  changed();
});

async function start() {
  // ?compare=NAME and ?text=TEXT, so that what the page shows can be bookmarked
  const wanted = new URLSearchParams(location.search);
  try {
    model = await call("v1/model");
    element("about").textContent = `${model.items.toLocaleString("en")} items, text encoder ${model.encoder}`;
    element("other").append(...model.compare.map((name) => create("option", { value: name, textContent: name })));
    element("comparing").hidden = !model.compare.length;
    if (model.compare.includes(wanted.get("compare"))) element("other").value = wanted.get("compare");
    element("text").value = wanted.get("text") || "";
    imagine(element("text").value);
    await bookmarked();
  } catch (error) {
    element("about").textContent = error.message;
  }
  changed();
}

search("");
start();
