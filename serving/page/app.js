"use strict";

const element = (id) => document.getElementById(id);
const history = []; // {id, text}, oldest first

async function call(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(typeof content.detail === "string" ? content.detail : JSON.stringify(content.detail));
  return content;
}

// Texts come from a catalogue: they are shown as text, never as HTML.
function show(list, items, note, act) {
  list.replaceChildren(...items.map((item) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = item.text;
    const text = document.createElement("span");
    text.textContent = item.text || item.id;
    const small = document.createElement("small");
    small.textContent = note(item);
    button.append(text, small);
    button.addEventListener("click", () => act(item));
    const row = document.createElement("li");
    row.append(button);
    return row;
  }));
}

// Of several answers to one input, only the newest is shown.
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
  () => call("v1/recommend", { history: history.map((item) => item.id), k: 12, explain: true }),
  (found) => {
    element("state").textContent = history.length ? "" : "The most popular items, because the history is empty.";
    const texts = new Map(history.map((item) => [item.id, item.text]));
    const because = (item) => (texts.has(item.because) ? `nearest in the history: ${texts.get(item.because).slice(0, 60)}` : "");
    show(element("recommendations"), found.items, because, add);
  },
);

const similar = newest(
  (text) => (text.trim() ? call("v1/similar", { item: text, k: 10 }) : { items: [] }),
  (found) => show(element("similar"), found.items, (item) => `cosine ${item.score.toFixed(2)}`, add),
);

function add(item) {
  history.push({ id: item.id, text: item.text });
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

function later(act, milliseconds = 250) {
  let timer;
  return (...words) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...words), milliseconds);
  };
}

const searchLater = later(search), similarLater = later(similar);
element("query").addEventListener("input", (event) => searchLater(event.target.value));
element("text").addEventListener("input", (event) => similarLater(event.target.value));
element("clear").addEventListener("click", () => {
  history.length = 0;
  changed();
});
call("v1/model").then((model) => {
  element("about").textContent = `${model.items.toLocaleString("en")} items, text encoder ${model.encoder}`;
}).catch((error) => { element("about").textContent = error.message; });
search("");
function decoded(word) {
  try {
    return decodeURIComponent(word);
  } catch {
    return word; // not written by this page
  }
}

const bookmarked = location.hash.slice(1).split(",").filter(Boolean).map(decoded);
Promise.all(bookmarked.map((id) => call(`v1/items?limit=1000&query=${encodeURIComponent(id)}`))).then((answers) => {
  const found = answers.map((answer, number) => answer.items.find((item) => item.id === bookmarked[number]));
  history.push(...found.filter(Boolean));
}).finally(changed);
