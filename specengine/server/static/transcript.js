// One generation: what the stream told of it, token by token, and how that is shown.

export const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

/** What is known of a generation. Times are milliseconds since its request was sent.
 *
 *  tokens:   {token_id, text, source, round, rejected, drafter}, in order; source as in a report: "draft" accepted, "recovered"
 *            the target's where a draft was rejected, "bonus" the target's after all drafts were accepted, "target" the
 *            target's without drafts; a draft's drafter is its place among the server's
 *  rounds:   {drafted, accepted}
 *  arrivals: {at, count}: so many tokens were there at that time
 *  frames:   {at, tokens}: these could be shown from then on
 */
export class Generation {
  tokens = [];
  rounds = [];
  arrivals = [];
  frames = [];
  finish = null;
  usage = null;
  metrics = null;
  // Tokens whose text is complete.
  #numComplete = 0;

  constructor(name, isPlain) {
    this.name = name;
    this.isPlain = isPlain;
  }

  /** Takes in what a stream said at a time; returns the tokens that can be shown from now on. */
  take(event, at) {
    this.usage = event.usage ?? this.usage;
    this.metrics = event.metrics ?? this.metrics;
    const [choice] = event.choices;
    if (!choice) return [];
    this.finish = choice.finish_reason ?? this.finish;
    this.tokens.push(...this.#read(choice));
    if (choice.token_ids.length) this.arrivals.push({ at, count: this.tokens.length });
    const first = this.#numComplete;
    for (const { text, source } of choice.token_source) {
      // Tokens that end inside a character have no text: the piece is that of the first one after them.
      let place = this.#numComplete;
      const isDraft = source === "draft";
      while (place < this.tokens.length - 1 && (this.tokens[place].source === "draft") !== isDraft) place += 1;
      this.tokens[Math.min(place, this.tokens.length - 1)].text += text;
      this.#numComplete = Math.min(place + 1, this.tokens.length);
    }
    if (this.finish) this.#numComplete = this.tokens.length;
    const shown = this.tokens.slice(first, this.#numComplete);
    this.frames.push({ at, tokens: shown });
    return shown;
  }

  #read({ token_ids: ids, rounds }) {
    const found = [];
    const add = (source, round, rejected = [], drafter = null) =>
      found.push({ token_id: ids[found.length], text: "", source, round, rejected, drafter });
    const numInRounds = rounds.reduce((sum, round) => sum + round.num_tokens, 0);
    while (found.length < ids.length - numInRounds) add("target", null);
    for (const each of rounds) {
      const { num_draft_tokens: drafted, num_accepted_tokens: accepted } = each;
      const place = this.rounds.push({ drafted, accepted }) - 1;
      const own = drafted === 0 ? "target" : accepted < drafted ? "recovered" : "bonus";
      const rejected = each.draft_texts.map((text, i) => ({ token_id: each.draft_token_ids[i], text })).slice(accepted);
      for (let i = 0; i < each.num_tokens; i += 1) {
        if (i < accepted) add("draft", place, [], each.drafters[i]);
        else add(own, place, rejected);
      }
    }
    return found;
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  get numTokens() {
    return this.tokens.length;
  }

  get firstToken() {
    return this.arrivals.length ? this.arrivals[0].at : null;
  }

  /** Tokens after the first event's, by the time from it to the last. */
  get tokensPerSecond() {
    return rate(this.arrivals[0], this.arrivals.at(-1));
  }

  get numDrafted() {
    return this.rounds.reduce((sum, round) => sum + round.drafted, 0);
  }

  get numAccepted() {
    return this.rounds.reduce((sum, round) => sum + round.accepted, 0);
  }

  /** [{drafted, accepted}] by position in a round. */
  get byPosition() {
    const found = [];
    for (const { drafted, accepted } of this.rounds) {
      for (let i = 0; i < drafted; i += 1) {
        found[i] ??= { drafted: 0, accepted: 0 };
        found[i].drafted += 1;
        found[i].accepted += i < accepted;
      }
    }
    return found;
  }

  get clock() {
    if (this.firstToken === null) return "";
    const speed = this.tokensPerSecond;
    const parts = [`first token ${Math.round(this.firstToken)} ms`];
    if (speed !== null) parts.push(`${speed.toFixed(1)} tokens/s`);
    return parts.join(" · ");
  }

  get outcome() {
    const parts = [`${this.numTokens} tokens`];
    if (this.numDrafted) {
      const share = Math.round((100 * this.numAccepted) / this.numDrafted);
      parts.push(`${this.numAccepted} of ${this.numDrafted} drafts accepted (${share} %)`);
      parts.push(`${(this.numTokens / (this.rounds.length + 1)).toFixed(2)} tokens a forward of the target`);
    } else {
      parts.push("nothing was drafted");
    }
    if (this.metrics?.seed !== undefined && this.metrics.seed !== null) parts.push(`seed ${this.metrics.seed}`);
    if (this.metrics?.lossless === false) parts.push("LOSSY: not what the target alone would say");
    if (this.finish === "abort" || this.finish === null) parts.push("stopped");
    return parts.join(" · ");
  }
}

/** Tokens a second from one arrival to another, or null where that says nothing. */
export const rate = (first, last) =>
  first && last && last.at > first.at ? (1000 * (last.count - first.count)) / (last.at - first.at) : null;

/** Whether two generations are the same, token by token, and where they part. */
export const compare = (one, other) => {
  const length = Math.max(one.numTokens, other.numTokens);
  for (let i = 0; i < length; i += 1) {
    if (one.tokens[i]?.token_id !== other.tokens[i]?.token_id) return { isIdentical: false, place: i };
  }
  return { isIdentical: true, place: length };
};

/** How a token is marked: drafts by their drafter, too, from the third on alike. */
export const classOf = (source, drafter) => (drafter === null ? `t ${source}` : `t ${source} by-${Math.min(drafter, 2)}`);

/** The place on the page where a generation is shown. */
export class View {
  #given;
  #clock;
  #text;
  #outcome;

  constructor(title, given) {
    this.#given = given;
    this.#clock = element("span", { className: "clock" });
    this.#text = element("p", { className: "text" });
    this.#outcome = element("p", { className: "outcome" });
    this.root = element("div", { className: "answer" }, element("h3", {}, title, this.#clock), this.#text, this.#outcome);
    this.#empty();
  }

  begin() {
    this.#empty();
    this.root.classList.add("is-running");
  }

  #empty() {
    this.#text.replaceChildren();
    if (this.#given) this.#text.append(element("span", { className: "given", textContent: this.#given }));
  }

  /** `tokens` are new. */
  show(tokens) {
    const shown = document.createDocumentFragment();
    for (const { text, source, rejected, drafter } of tokens) {
      if (rejected.length) {
        const fallen = rejected.map((each) => each.text).join("");
        shown.append(element("span", { className: "fallen" }, element("del", { textContent: visible(fallen) })));
      }
      shown.append(element("span", { className: classOf(source, drafter), textContent: text }));
    }
    this.#text.append(shown);
  }

  /** Where the text ends, in the window's coordinates. */
  get end() {
    return (this.#text.lastElementChild ?? this.root).getBoundingClientRect();
  }

  tick(words) {
    this.#clock.textContent = words;
  }

  finish(generation) {
    this.root.classList.remove("is-running");
    this.#clock.textContent = generation.clock;
    this.#outcome.textContent = generation.outcome;
  }
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
