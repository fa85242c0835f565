// A session as one page that holds all it shows, in the frame of `specengine report`.

import { positionsChart, roundsChart, speedChart } from "./charts.js";
import { compare, element } from "./transcript.js";

const BODY = "<!-- the session -->";
const WORDS = {
  draft: "accepted draft",
  recovered: "the target’s, where a draft was rejected",
  bonus: "the target’s, after all drafts were accepted",
  target: "the target’s, without drafts",
};

/** turns: [{asked, settings, generations}]; facts: [[name, value]]; frame: the page to put them into. */
export const reportOf = (turns, facts, frame) => {
  const known = element("dl");
  for (const [name, value] of facts) {
    known.append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
  }
  const sections = element("main");
  turns.forEach((turn, place) => sections.append(sectionOf(turn, place + 1)));
  const header = element("header", {}, element("h1", { textContent: "Speculative decoding, a session" }));
  return frame.replace(BODY, () => header.outerHTML + known.outerHTML + sections.outerHTML);
};

export const save = (name, html) => {
  const address = URL.createObjectURL(new Blob([html], { type: "text/html" }));
  element("a", { href: address, download: name }).click();
  URL.revokeObjectURL(address);
};

const sectionOf = ({ asked, settings, generations }, number) => {
  const section = element("section", { className: "wide long" });
  section.append(element("h3", { textContent: `${number}. ${asked.length > 60 ? `${asked.slice(0, 59)}…` : asked}` }));
  section.append(element("p", { textContent: settings }), tableOf(generations));
  if (generations.length === 2) section.append(element("p", {}, element("strong", { textContent: verdictOf(...generations) })));
  const drafted = generations.at(-1);
  const charts = [
    ["Tokens/s", speedChart(generations)],
    ["Drafts by round, and those accepted", roundsChart(drafted.rounds)],
    ["Acceptance by position", positionsChart(drafted.byPosition)],
  ];
  const row = element("div");
  row.style.cssText = "display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr))";
  for (const [title, { svg, value }] of charts) {
    const figure = element("figure", {}, element("figcaption", { textContent: `${title}: ${value}` }), svg);
    figure.style.margin = "0";
    row.append(figure);
  }
  section.append(row);
  const isSame = generations.length === 2 && compare(...generations).isIdentical;
  for (const each of isSame ? [drafted] : generations) section.append(tokenView(each, `${number}-${each.name}`, asked));
  return section;
};

export const verdictOf = (plain, speculative) => {
  const { isIdentical, place } = compare(plain, speculative);
  return isIdentical ? `identical: yes, all ${place} tokens` : `identical: no, from token ${place + 1} on`;
};

const tableOf = (generations) => {
  const head = ["", "tokens", "first token, ms", "tokens/s", "drafts accepted", "forwards of the target", "seed"];
  const rows = generations.map((each) => [
    each.name,
    each.numTokens,
    each.firstToken === null ? "–" : each.firstToken.toFixed(0),
    each.tokensPerSecond === null ? "–" : each.tokensPerSecond.toFixed(1),
    each.numDrafted ? `${each.numAccepted} of ${each.numDrafted}` : "–",
    each.rounds.length + 1,
    each.metrics?.seed ?? "–",
  ]);
  const line = (cells, name) => element("tr", {}, ...cells.map((cell) => element(name, { textContent: cell })));
  const table = element("table", {}, element("thead", {}, line(head, "th")), element("tbody", {}, ...rows.map((row) => line(row, "td"))));
  const scrolls = element("div", { className: "scrolls", tabIndex: 0 }, table);
  scrolls.setAttribute("role", "region");
  scrolls.setAttribute("aria-label", "Figures");
  return scrolls;
};

/** What `token_view.js` brings to life; without a script the text is there, with its marks. */
const tokenView = (generation, name, asked) => {
  const view = element("div", { className: "token-view" });
  const legend = element("ul", { className: "legend" });
  for (const [kind, words] of Object.entries(WORDS)) {
    const count = generation.tokens.filter((token) => token.source === kind).length;
    if (count) legend.append(element("li", {}, element("span", { className: kind, textContent: "abc" }), ` ${words}: ${count}`));
  }
  const list = element("div", { tabIndex: 0 });
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", `${generation.numTokens} generated tokens; arrow keys choose one`);
  generation.tokens.forEach((token, at) => {
    const fallen = token.rejected.map((each) => each.text).join("");
    if (fallen) list.append(element("del", { textContent: visible(fallen) }));
    const span = element("span", { className: `t ${token.source}`, id: `${name}-${at}`, textContent: visible(token.text) || "·" });
    span.setAttribute("role", "option");
    span.dataset.at = at;
    list.append(span);
  });
  const numRejected = generation.tokens.reduce((sum, token) => sum + token.rejected.length, 0);
  const box = element("input", { type: "checkbox" });
  const unknown = { target_prob: null, draft_prob: null };
  const tokens = generation.tokens.map((token) => ({ ...token, ...unknown, rejected: token.rejected.map((each) => ({ ...each, ...unknown })) }));
  view.append(
    element("p", {}, `${generation.name}, after `, element("code", { textContent: asked.length > 200 ? `…${asked.slice(-199)}` : asked })),
    legend,
    element("label", {}, box, ` show the ${numRejected} rejected tokens in the text`),
    list,
    Object.assign(element("div", { className: "detail" }, element("p", { textContent: "Choose a token: click it, or go to the text and press arrow keys." })), { role: "status" }),
  );
  // "<" would end the script where a token is "</script>".
  view.append(element("script", { type: "application/json", textContent: JSON.stringify(tokens).replaceAll("<", "\\u003c") }));
  return view;
};

const visible = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
