// The page: what is set, what is asked for, and what becomes of it.

import { cacheChart, positionsChart, roundsChart, show, speedChart } from "./charts.js";
import { Client } from "./client.js";
import { reportOf, save, verdictOf } from "./session.js";
import { classOf, compare, element, Generation, View } from "./transcript.js";

const MILLISECONDS_BETWEEN_DRAWINGS = 150;
const MILLISECONDS_BETWEEN_READINGS = 500;
// Of the choice of a drafter: whichever the server chooses, and none.
const ANY = "*";
const NONE = "";
const THEMES = ["system", "light", "dark"];
const $ = (id) => document.getElementById(id);

const client = new Client();
let card = null;
// {isChat, asked, settings, generations}, in order.
const turns = [];
let cacheReadings = [];
let running = null;

// The server

const connect = async () => {
  try {
    const { data } = await client.json("v1/models");
    card = data[0];
  } catch (error) {
    $("server").textContent = error.message;
    if (error.status === 401) askForKey(error);
    else setTimeout(connect, 2000);
    return;
  }
  forgetError();
  const names = card.draft_models.map(short);
  $("server").textContent = `model ${short(card.id)} · drafter ${names.join(" + ") || "none"}`;
  const several = names.length > 1 ? card.draft_models.map((value, i) => [value, `only ${names[i]}`]) : [];
  const options = [...(names.length ? [[ANY, names.join(" + ")]] : []), ...several, [NONE, "none: plain decoding"]];
  $("drafter").replaceChildren(...options.map(([value, textContent]) => element("option", { value, textContent })));
  if (names.length > 1) nameDrafters(names);
  const [chat, completion] = document.querySelectorAll("[name=mode]");
  chat.disabled = !card.has_chat_template;
  chat.parentElement.title = chat.disabled ? "This model was not made for conversations." : "";
  (chat.disabled ? completion : chat).checked = true;
  changeMode();
  noteSettings();
  document.body.dataset.ready = "";
};

/** Several are told apart. */
const nameDrafters = (names) => {
  for (const each of document.querySelectorAll(".legend .drafted")) each.remove();
  const items = names.map((name, place) =>
    element("li", { className: "drafted" }, element("span", { className: classOf("draft", place), textContent: "draft" }), ` accepted draft of ${name}`),
  );
  document.querySelector(".legend").prepend(...items);
};

/** Of a path its last two parts. */
const short = (name) => name.split("/").slice(-2).join("/");

const askForKey = (error) => {
  tell(error);
  $("settings").open = true;
  $("key-field").hidden = false;
  $("key").focus();
};

$("key-field").addEventListener("submit", (event) => {
  event.preventDefault();
  client.key = $("key").value.trim();
  connect();
});

// Settings

const isChat = () => document.querySelector("[name=mode]:checked").value === "chat";
const isDrafted = () => $("drafter").value !== NONE;
/** The only one that drafts, where one was chosen. */
const readDrafter = () => ([ANY, NONE].includes($("drafter").value) ? {} : { draft_model: $("drafter").value });

const noteSettings = () => {
  const isAuto = $("k-auto").checked;
  $("k").disabled = isAuto || !isDrafted();
  $("k-auto").disabled = !isDrafted();
  $("k-value").textContent = !isDrafted() ? "0" : isAuto ? "auto" : $("k").value;
  $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
  $("tokens-value").textContent = $("tokens").value;
  $("beside").disabled = !isDrafted();
};
$("settings").addEventListener("input", noteSettings);

const changeMode = () => {
  $("prompt").placeholder = isChat() ? "Ask something" : "def fibonacci(n):";
  $("go").textContent = isChat() ? "Send" : "Generate";
};
for (const mode of document.querySelectorAll("[name=mode]")) mode.addEventListener("change", changeMode);

/** What is asked for, whoever drafts. Without a seed one is drawn here, so that everything can be had again. */
const readSettings = () => {
  const given = $("seed").value;
  return {
    temperature: Number($("temperature").value),
    max_tokens: Number($("tokens").value),
    acceptance: $("acceptance").value,
    seed: given === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(given),
  };
};
const readK = () => (!isDrafted() ? 0 : $("k-auto").checked ? "auto" : Number($("k").value));

$("rejected").addEventListener("change", () =>
  $("transcript").classList.toggle("keeps-rejected", $("rejected").checked),
);

const applyTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
};
$("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("theme", theme);
  applyTheme(theme);
});

// Generating

const generate = async (asked) => {
  const settings = readSettings();
  const k = readK();
  const isBeside = $("beside").checked && isDrafted();
  const turn = {
    isChat: isChat(),
    asked,
    settings: `k ${k}, ${isDrafted() ? `drafter ${$("drafter").selectedOptions[0].textContent}, ` : ""}temperature ${settings.temperature}, acceptance ${settings.acceptance}, seed ${settings.seed}`,
    generations: isBeside
      ? [new Generation("plain", true), new Generation("speculative", false)]
      : [new Generation(k === 0 ? "plain" : "speculative", k === 0)],
  };
  const prompt = turn.isChat ? { messages: conversation(asked) } : { prompt: asked };
  const body = { ...prompt, ...settings, model: card.id };
  const views = turn.generations.map((each) => new View(each.name, turn.isChat ? "" : asked));
  const place = element("div", { className: isBeside ? "answers two" : "answers" }, ...views.map((view) => view.root));
  const root = element("article", { className: "turn" }, place);
  if (turn.isChat) root.prepend(element("p", { className: "asked", textContent: asked }));
  $("hint").hidden = true;
  $("transcript").append(root);
  turns.push(turn);
  isFollowing = true;
  running = new AbortController();
  const stopReading = readCache();
  try {
    // One after the other, for they would share the machine; and each finds the prompt in the prefix cache.
    if (isBeside) await warm(body, running.signal);
    for (const [i, generation] of turn.generations.entries()) {
      const own = { ...body, ...(generation.isPlain ? { num_speculative_tokens: 0 } : { ...readDrafter(), num_speculative_tokens: k }) };
      await follow(own, generation, views[i], running.signal);
    }
    if (isBeside) {
      const verdict = judge(turn.generations, views, settings);
      root.append(verdict);
      reveal(verdict.getBoundingClientRect());
    }
    say(`Finished. ${turn.generations.map((each) => `${each.name}: ${each.outcome}`).join(". ")}`);
  } catch (error) {
    if (error.name === "AbortError") {
      say("Stopped.");
    } else {
      $("prompt").value ||= asked;
      if (error.status === 401) askForKey(error);
      else tell(error);
    }
    if (turn.generations.every((each) => each.numTokens === 0)) {
      turns.pop();
      root.remove();
    }
  } finally {
    turn.generations.forEach((generation, i) => views[i].finish(generation));
    stopReading();
    running = null;
    scheduleCharts();
  }
};

const pathOf = (body) => (body.messages ? "v1/chat/completions" : "v1/completions");

const warm = async (body, signal) => {
  const short = { ...body, max_tokens: 1, num_speculative_tokens: 0, stream: true };
  for await (const _ of client.stream(pathOf(body), short, signal));
};

const follow = async (body, generation, view, signal) => {
  const asked = {
    ...body,
    stream: true,
    stream_options: { include_usage: true },
    return_token_ids: true,
    return_token_source: true,
    return_rounds: true,
  };
  view.begin();
  const began = performance.now();
  for await (const event of client.stream(pathOf(body), asked, signal)) {
    view.show(generation.take(event, performance.now() - began));
    view.tick(generation.clock);
    reveal(view.end);
    scheduleCharts();
  }
  view.finish(generation);
};

/** The messages so far, those of turns that came to nothing left out. */
const conversation = (asked) => [
  ...turns
    .filter((turn) => turn.isChat && turn.generations.at(-1).text)
    .flatMap((turn) => [
      { role: "user", content: turn.asked },
      { role: "assistant", content: turn.generations.at(-1).text },
    ]),
  { role: "user", content: asked },
];

const judge = ([plain, speculative], views, settings) => {
  const { isIdentical } = compare(plain, speculative);
  const verdict = element("strong", { textContent: verdictOf(plain, speculative) });
  verdict.className = isIdentical ? "yes" : "no";
  const [one, other] = [plain, speculative].map((each) => each.arrivals.at(-1).at / 1000);
  const parts = [`plain ${one.toFixed(2)} s, speculative ${other.toFixed(2)} s: ${(one / other).toFixed(2)} times as fast`];
  if (!isIdentical && settings.acceptance !== "coupled") {
    parts.push(`${settings.acceptance} acceptance does not promise the same text above temperature 0; coupled does`);
  }
  const again = element("button", { type: "button", className: "quiet", textContent: "Replay as a race" });
  again.addEventListener("click", () => replay([plain, speculative], views, again));
  return element("p", { className: "verdict" }, verdict, element("span", { textContent: parts.join(". ") }), again);
};

/** Both at once, each as fast as it was. */
const replay = (generations, views, button) => {
  button.disabled = true;
  views.forEach((view) => view.begin());
  const left = generations.map((each) => [...each.frames]);
  const began = performance.now();
  const step = () => {
    const now = performance.now() - began;
    left.forEach((frames, i) => {
      while (frames.length && frames[0].at <= now) views[i].show(frames.shift().tokens);
      if (frames.length) views[i].tick(`${(now / 1000).toFixed(1)} s`);
      else views[i].finish(generations[i]);
    });
    if (left.some((frames) => frames.length)) requestAnimationFrame(step);
    else button.disabled = false;
  };
  requestAnimationFrame(step);
};

// The form

$("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  const asked = $("prompt").value;
  if (running || !card || !asked.trim()) return;
  if (!$("seed").checkValidity()) {
    tell(new Error("A seed is a whole number."));
    $("seed").focus();
    return;
  }
  forgetError();
  say("Generating");
  setRunning(true);
  if (isChat()) $("prompt").value = "";
  await generate(asked);
  setRunning(false);
});

const setRunning = (isRunning) => {
  $("go").disabled = isRunning;
  $("stop").disabled = !isRunning;
  $("clear").disabled = isRunning;
  $("save").disabled = isRunning || turns.length === 0;
  for (const mode of document.querySelectorAll("[name=mode]")) {
    mode.disabled = isRunning || (mode.value === "chat" && !card.has_chat_template);
  }
  $("transcript").setAttribute("aria-busy", String(isRunning));
};

const stop = () => running?.abort();
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

$("clear").addEventListener("click", () => {
  turns.length = 0;
  cacheReadings = [];
  $("transcript").replaceChildren($("hint"));
  $("hint").hidden = false;
  $("save").disabled = true;
  forgetError();
  scheduleCharts();
  $("prompt").focus();
});

$("save").addEventListener("click", async () => {
  try {
    const now = new Date();
    const facts = [
      ["model", short(card.id)],
      ["drafter", card.draft_models.map(short).join(" + ") || "none"],
      ["saved", now.toISOString().slice(0, 16).replace("T", " ") + " UTC"],
      ["browser’s clock", "times are as they were here, the network included"],
    ];
    const html = reportOf(turns, facts, await client.text("page/report.html"));
    save(`specengine-session-${now.toISOString().slice(0, 19).replaceAll(":", "")}.html`, html);
  } catch (error) {
    tell(error);
  }
});

// What is told

const tell = (error) => {
  $("error").textContent = error.message;
  $("error").hidden = false;
};
const forgetError = () => {
  $("error").hidden = true;
};
/** To those who hear the page: how it began and how it ended, not every token. */
const say = (words) => {
  $("status").textContent = words;
};

// The transcript follows what is written, until somebody scrolls it while it is.
let isFollowing = true;
for (const name of ["wheel", "touchmove", "keydown"]) {
  $("transcript").addEventListener(name, () => {
    isFollowing = false;
  });
}

/** Scrolls the transcript so far that a place of the window is in it. */
const reveal = ({ top, bottom }) => {
  const margin = 12;
  const box = $("transcript").getBoundingClientRect();
  if (!isFollowing) return;
  if (bottom > box.bottom - margin) $("transcript").scrollTop += bottom - box.bottom + margin;
  else if (top < box.top + margin) $("transcript").scrollTop += top - box.top - margin;
};

// Charts

let isScheduled = false;
const scheduleCharts = () => {
  if (isScheduled) return;
  isScheduled = true;
  setTimeout(() => {
    isScheduled = false;
    drawCharts();
  }, MILLISECONDS_BETWEEN_DRAWINGS);
};

const drawCharts = () => {
  const latest = turns.at(-1)?.generations ?? [];
  const byPosition = [];
  for (const generation of turns.flatMap((turn) => turn.generations)) {
    generation.byPosition.forEach(({ drafted, accepted }, place) => {
      byPosition[place] ??= { drafted: 0, accepted: 0 };
      byPosition[place].drafted += drafted;
      byPosition[place].accepted += accepted;
    });
  }
  show($("chart-positions"), positionsChart(byPosition));
  show($("chart-speed"), speedChart(latest));
  show($("chart-k"), roundsChart(latest.at(-1)?.rounds ?? []));
  show($("chart-cache"), cacheChart(cacheReadings));
};

/** Reads the server's gauge until what it returns is called. */
const readCache = () => {
  const began = performance.now();
  cacheReadings = [];
  let isOver = false;
  const read = async () => {
    while (!isOver) {
      const found = /^specengine:kv_cache_usage_perc\{.*\} (\S+)$/m.exec(await client.text("metrics"));
      if (found) cacheReadings.push([performance.now() - began, Number(found[1])]);
      scheduleCharts();
      await new Promise((resolve) => setTimeout(resolve, MILLISECONDS_BETWEEN_READINGS));
    }
  };
  read().catch(() => {}); // whatever is wrong, the generation's own request tells it
  return () => {
    isOver = true;
  };
};

applyTheme(localStorage.getItem("theme") ?? "system");
noteSettings();
drawCharts();
connect();
