// Small charts. Their greys are variables that this page and a report have in common.

const WIDTH = 320;
const HEIGHT = 84;
const [LEFT, RIGHT, TOP, BOTTOM] = [40, 4, 6, 16];
const MOST_BARS = 60;
// Visible on light and on dark.
const ACCENT = "#1a9467";

const draw = (name, attributes, text = "") => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
};
const label = (x, y, text, anchor) =>
  draw("text", { x, y, "text-anchor": anchor, fill: "var(--faint)", "font-size": 11, "font-family": "system-ui, sans-serif" }, text);

/** An empty chart: an axis with 0 and `top`, and texts under both its ends. */
const frame = (words, top, from, to) => {
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words });
  svg.append(
    draw("path", { d: `M${LEFT} ${TOP}H${WIDTH - RIGHT}`, stroke: "var(--line)", fill: "none" }),
    draw("path", { d: `M${LEFT} ${HEIGHT - BOTTOM}H${WIDTH - RIGHT}`, stroke: "var(--faint)", fill: "none" }),
    label(LEFT - 4, TOP + 4, top, "end"),
    label(LEFT - 4, HEIGHT - BOTTOM, "0", "end"),
    label(LEFT, HEIGHT - 4, from, "start"),
    label(WIDTH - RIGHT, HEIGHT - 4, to, "end"),
  );
  return svg;
};
const y = (share) => HEIGHT - BOTTOM - Math.max(0, Math.min(1, share)) * (HEIGHT - BOTTOM - TOP);

/** values: [{whole, part, name}], shares of the height, and what is under the bar */
const bars = (svg, values) => {
  const step = (WIDTH - LEFT - RIGHT) / Math.max(values.length, 4);
  values.forEach(({ whole, part, name = "" }, place) => {
    const x = LEFT + place * step + step * 0.12;
    const bar = (share, fill) =>
      draw("rect", { x, y: y(share), width: step * 0.76, height: HEIGHT - BOTTOM - y(share), fill });
    svg.append(bar(whole, "var(--line)"), bar(part, ACCENT), label(x + step * 0.38, HEIGHT - 4, name, "middle"));
  });
  return svg;
};

const percent = (share) => `${Math.round(100 * share)} %`;
const nice = (value) => {
  const unit = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((each) => each * unit).find((each) => each >= value);
};

/** Each function returns {svg, value}: the chart, and in a few characters what it says. */
export const positionsChart = (byPosition) => {
  const shares = byPosition.map(({ drafted, accepted }) => accepted / drafted);
  const words = shares.map((share, place) => `position ${place + 1}: ${percent(share)}`).join(", ");
  const svg = frame(`Drafts accepted, by position in a round. ${words || "None yet."}`, "100 %", "", "");
  const total = byPosition.reduce((sum, each) => [sum[0] + each.accepted, sum[1] + each.drafted], [0, 0]);
  return {
    svg: bars(svg, shares.map((share, place) => ({ whole: 1, part: share, name: place + 1 }))),
    value: total[1] ? `${percent(total[0] / total[1])} of ${total[1]}` : "–",
  };
};

export const roundsChart = (rounds) => {
  const shown = rounds.slice(-MOST_BARS);
  const top = Math.max(1, ...shown.map((round) => round.drafted));
  const mean = rounds.reduce((sum, round) => sum + round.drafted, 0) / Math.max(1, rounds.length);
  const words = `Drafts of each round, and how many were accepted. ${rounds.length} rounds, ${mean.toFixed(1)} drafts on average.`;
  const svg = frame(words, top, shown.length ? `round ${rounds.length - shown.length + 1}` : "", rounds.length || "");
  return {
    svg: bars(svg, shown.map(({ drafted, accepted }) => ({ whole: drafted / top, part: accepted / top }))),
    value: rounds.length ? `${mean.toFixed(1)} on average` : "–",
  };
};

/** series: [{isPlain, points: [[milliseconds, value]]}] */
const lines = (svg, series, end, top) => {
  for (const { isPlain, points } of series) {
    const path = points.map(([at, value]) => `${(LEFT + (at / end) * (WIDTH - LEFT - RIGHT)).toFixed(1)} ${y(value / top).toFixed(1)}`);
    if (!path.length) continue;
    const style = isPlain ? { stroke: "var(--faint)", "stroke-dasharray": "4 3" } : { stroke: ACCENT };
    svg.append(draw("path", { d: `M${path.join("L")}`, fill: "none", "stroke-width": 2, "stroke-linejoin": "round", ...style }));
  }
  return svg;
};

export const speedChart = (generations) => {
  const series = generations.map(({ isPlain, arrivals }) => ({ isPlain, points: speedPoints(arrivals) }));
  const points = series.flatMap((each) => each.points);
  const end = Math.max(1000, ...points.map(([at]) => at));
  const top = nice(Math.max(1, ...points.map(([, value]) => value)));
  const value = generations
    .filter((each) => each.tokensPerSecond !== null)
    .map((each) => `${each.name} ${each.tokensPerSecond.toFixed(1)}`)
    .join(", ");
  const words = `Tokens a second, of the last second; from the first token on: ${value || "none yet"}.`;
  return { svg: lines(frame(words, top, "0 s", `${(end / 1000).toFixed(1)} s`), series, end, top), value: value || "–" };
};

export const cacheChart = (points) => {
  const end = Math.max(1000, ...points.map(([at]) => at));
  const most = Math.max(0, ...points.map(([, value]) => value));
  const top = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find((each) => each >= most) ?? 1;
  const svg = frame(`Share of the KV cache's blocks in use, at most ${(100 * most).toFixed(1)} %.`, percent(top), "0 s", `${(end / 1000).toFixed(1)} s`);
  return {
    svg: lines(svg, [{ isPlain: false, points }], end, top),
    value: points.length ? `at most ${(100 * most).toFixed(1)} %` : "–",
  };
};

/** Tokens a second of the last second, at each arrival. */
const speedPoints = (arrivals) => {
  const points = [];
  let first = 0;
  for (let last = 1; last < arrivals.length; last += 1) {
    while (first < last - 1 && arrivals[last].at - arrivals[first].at > 1000) first += 1;
    const [from, to] = [arrivals[first], arrivals[last]];
    if (to.at > from.at) points.push([to.at, (1000 * (to.count - from.count)) / (to.at - from.at)]);
  }
  return points;
};

export const show = (figure, { svg, value }) => {
  figure.querySelector("svg")?.remove();
  figure.append(svg);
  figure.querySelector("b").textContent = value;
};
