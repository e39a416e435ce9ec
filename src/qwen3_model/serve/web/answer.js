// An answer as it comes: its runs, its text, its figures. And whether two answers are the same.

/** What one request is answered with. seedText: the digits that were sent; "": the server draws a seed and tells it. */
export class Answer {
  constructor(seedText) {
    this.seedText = seedText;
    this.tokens = []; // ids
    this.content = "";
    this.reasoning = "";
    this.runs = 0;
    this.cycles = 0;
    this.cycleTokens = 0;
    this.reason = ""; // OpenAI's word for how it has ended; "" while it has not
    this._first = this._last = this._behind = 0;
  }

  /** Take a chunk. Returns what it adds to the text. */
  push(chunk) {
    this.seedText ||= String(chunk.seed); // a drawn seed has 32 bits
    const choice = chunk.choices[0];
    const content = choice.text ?? choice.delta?.content ?? "";
    const reasoning = choice.delta?.reasoning_content ?? "";
    this.content += content;
    this.reasoning += reasoning;
    this.reason = choice.finish_reason ?? "";
    if (choice.run) this._count(choice.run);
    return {content, reasoning};
  }

  /** Tokens a second behind the first run, which waits for the prompt; null for too few. */
  get tokensPerSecond() {
    const seconds = (this._last - this._first) / 1000;
    return this._behind && seconds > 0 ? this._behind / seconds : null;
  }

  /** Tokens that a cycle has added to the text, on average; null before the first cycle. */
  get tokensPerCycle() {
    return this.cycles ? this.cycleTokens / this.cycles : null;
  }

  _count(run) {
    this._last = performance.now();
    if (this.runs) this._behind += run.token_ids.length;
    else this._first = this._last;
    this.runs += 1;
    this.tokens.push(...run.token_ids);
    if (run.kind !== "prompt") {
      this.cycles += 1;
      this.cycleTokens += run.token_ids.length;
    }
  }
}

/**
 * Whether two answers to one request are the same: token by token, and character by character. An answer that
 * was stopped is compared as far as it goes. Returns {same, line}.
 */
export function compared(drafted, plain) {
  const stopped = !drafted.reason || !plain.reason;
  const token = parting(drafted.tokens, plain.tokens, stopped);
  const texts = ["reasoning", "content"].map(name => {
    const [one, other] = [[...drafted[name]], [...plain[name]]];
    return {name, one, other, at: parting(one, other, stopped)};
  });
  const places = token < 0 ? [] : [`token ${token + 1}`];
  for (const {name, one, other, at} of texts.filter(text => text.at >= 0)) {
    places.push(`character ${at + 1} of the ${name} (${excerpt(one, at)}, plainly ${excerpt(other, at)})`);
  }
  if (places.length || (!stopped && drafted.reason !== plain.reason)) {
    const where = places.length ? ` They part at ${places.join(", ")}.` : "";
    return {same: false, line: `Not identical.${where} With drafts: ${ended(drafted)}; plainly: ${ended(plain)}.`};
  }
  const tokens = count(Math.min(drafted.tokens.length, plain.tokens.length), "token");
  if (stopped) return {same: true, line: `Identical as far as both go, ${tokens}: one was stopped.`};
  const characters = count(texts[0].one.length + texts[1].one.length, "character");
  return {same: true, line: `Identical: all ${tokens}, all ${characters}.`};
}

/** The first place at which two lists differ, -1: nowhere. open: a list that ends first differs in nothing by that. */
function parting(one, other, open) {
  const most = (open ? Math.min : Math.max)(one.length, other.length);
  for (let at = 0; at < most; at++) if (one[at] !== other[at]) return at;
  return -1;
}

function excerpt(characters, at) {
  return `“${characters.slice(at, at + 12).join("")}”`;
}

function ended(answer) {
  return `${count(answer.tokens.length, "token")}, ${answer.reason ? `ended by “${answer.reason}”` : "stopped"}`;
}

/** A number and what it counts. */
export function count(number, what) {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

/** A number with as many digits as it is worth; a dash for none. */
export function rounded(number, digits = 1) {
  return number === null ? "–" : number.toFixed(number < 100 ? digits : 0);
}
