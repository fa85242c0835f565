// The server: its answers, its streams of events, and its errors in words.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export class Client {
  /** Kept here alone, and so until the page is closed. */
  key = "";

  async json(path) {
    return (await this.#ask(path)).json();
  }

  async text(path) {
    return (await this.#ask(path)).text();
  }

  /** Each event of a stream as the object it holds, until its end. Throws `ServerError`, an error in the middle
   *  included; an `AbortError` where `signal` ended it. */
  async *stream(path, body, signal) {
    const answer = await this.#ask(path, { method: "POST", body: JSON.stringify(body), signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw signal.aborted ? error : new ServerError("The connection broke before the answer was complete.");
      });
      if (done) throw new ServerError("The answer ended before it was complete.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const content = JSON.parse(data);
        if (content.error) throw new ServerError(`The server gave up: ${content.error.message}.`);
        yield content;
      }
    }
  }

  async #ask(path, options = {}) {
    const headers = { "Content-Type": "application/json" };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let answer;
    try {
      answer = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server does not answer. Does it still run?");
    }
    if (!answer.ok) throw new ServerError(await this.#words(answer), answer.status);
    return answer;
  }

  async #words(answer) {
    const told = await answer.json().then((body) => body.error.message).catch(() => answer.statusText);
    if (answer.status === 401) {
      return this.key ? "The server does not know this API key." : "The server wants an API key: enter it under Settings.";
    }
    if (answer.status === 429) {
      return `The server is full. Try again in ${answer.headers.get("Retry-After") ?? "a few"} seconds.`;
    }
    if (answer.status === 503) return `Not now: ${told}.`;
    return `The server refused (${answer.status}): ${told}`;
  }
}
