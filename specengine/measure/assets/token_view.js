"use strict";
// One tab stop a view: arrow keys go from token to token, and what is known of the chosen one stands below.
for (const view of document.querySelectorAll(".token-view")) {
  const tokens = JSON.parse(view.querySelector("script").textContent);
  const list = view.querySelector("[role=listbox]");
  const detail = view.querySelector("[role=status]");
  const words = {
    draft: "an accepted draft",
    recovered: "the target’s own, in place of a rejected draft",
    bonus: "the target’s own, after all drafts were accepted",
    target: "the target’s own, without drafts",
  };
  const percent = (value) => (value === null ? "not known" : (100 * value).toPrecision(3) + " %");
  const shown = (text) => (text === "" ? "(no text)" : JSON.stringify(text));
  let chosen = null;

  const line = (name, value, share) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("span"), { textContent: name }));
    row.append(Object.assign(document.createElement("span"), { textContent: value }));
    if (share !== null && share !== undefined) {
      const bar = document.createElement("meter");
      bar.value = share;
      bar.setAttribute("aria-hidden", "true");
      row.append(bar);
    }
    return row;
  };

  const choose = (element) => {
    if (!element) return;
    if (chosen) chosen.removeAttribute("aria-selected");
    chosen = element;
    chosen.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", chosen.id);
    const token = tokens[Number(chosen.dataset.at)];
    detail.replaceChildren(
      line("token", shown(token.text) + ", id " + token.token_id),
      line("is", words[token.source]),
      line("round", token.round === null ? "none: the prompt’s forward gave it" : String(token.round + 1)),
      line("likely to the target", percent(token.target_prob), token.target_prob),
      line("likely to the draft", percent(token.draft_prob), token.draft_prob),
    );
    token.rejected.forEach((each, place) =>
      detail.append(
        line(
          place === 0 ? "rejected" : "and behind it",
          shown(each.text) +
            (each.target_prob === null ? "" : ": target " + percent(each.target_prob)) +
            (each.draft_prob === null ? "" : ", draft " + percent(each.draft_prob)),
          null,
        ),
      ),
    );
  };

  const options = list.getElementsByClassName("t");
  const step = (by) => {
    const at = chosen ? Number(chosen.dataset.at) + by : 0;
    const next = options[Math.max(0, Math.min(options.length - 1, at))];
    choose(next);
    next.scrollIntoView({ block: "nearest" });
  };
  const keys = {
    ArrowRight: () => step(1),
    ArrowLeft: () => step(-1),
    ArrowDown: () => step(10),
    ArrowUp: () => step(-10),
    PageDown: () => step(100),
    PageUp: () => step(-100),
    Home: () => step(-tokens.length),
    End: () => step(tokens.length),
  };
  list.addEventListener("keydown", (event) => {
    if (keys[event.key]) {
      keys[event.key]();
      event.preventDefault();
    }
  });
  list.addEventListener("click", (event) => choose(event.target.closest(".t")));
  const box = view.querySelector("input");
  box.addEventListener("change", () => list.classList.toggle("with-rejected", box.checked));
  view.classList.add("is-live");
}
