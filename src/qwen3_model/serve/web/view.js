// What the page shows of a turn: what was asked, one or two answers beside each other, and how they compare.
//
// Text of a model or a person enters the document as text alone (textContent): it is never parsed.

import {count, rounded} from "./answer.js";

const NEAR = 120; // px from the end of the page within which it follows the text

/** A question and its answers, at the end of a conversation. */
export class Turn {
  /** asked: what was said in a chat; null where the answers go on with a text of their own. */
  constructor(talk, asked) {
    const number = talk.querySelectorAll("article").length + 1;
    this.element = make(talk, "article", "turn");
    make(this.element, "h2", asked === null ? "unseen" : "who", asked === null ? `Text ${number}` : "You");
    if (asked !== null) make(this.element, "p", "asked", asked);
    this._answers = make(this.element, "div", "answers");
  }

  /** A place for an answer. lead: the text that it goes on with, or null. */
  column(title, lead) {
    return new Column(this._answers, title, lead);
  }

  /** How the two answers compare. kind: same, parts or none. */
  verdict(kind, line) {
    following(() => make(this.element, "p", `verdict ${kind}`, line));
  }
}

/** One answer. */
class Column {
  constructor(parent, title, lead) {
    this._element = make(parent, "section", "answer");
    make(this._element, "h3", "", title);
    this._thought = make(this._element, "div", "thought");
    this._thought.hidden = true;
    make(this._thought, "h4", "", "Reasoning");
    this._reasoning = make(this._thought, "div", "text");
    this._text = make(this._element, "div", lead === null ? "text" : "text mono");
    if (lead !== null) make(this._text, "span", "lead", lead);
    this._figures = new Figures(this._element);
    this._element.classList.add("waits");
  }

  /** Add what a chunk adds to the answer, in the colour of its run. */
  add({content, reasoning}, answer) {
    this._element.classList.remove("waits");
    following(() => {
      const name = answer.runs % 2 ? "run odd" : "run even";
      if (reasoning) {
        this._thought.hidden = false;
        make(this._reasoning, "span", name, reasoning);
      }
      if (content) make(this._text, "span", name, content);
      this._figures.show(answer);
    });
  }

  /** No more comes. */
  end() {
    this._element.classList.remove("waits");
  }
}

/** The figures of an answer, which change as it comes. */
class Figures {
  constructor(parent) {
    const list = make(parent, "dl", "figures");
    this._values = {};
    for (const name of ["tokens/s", "tokens a cycle", "tokens", "cycles", "seed"]) {
      const pair = make(list, "div");
      make(pair, "dt", "", name);
      this._values[name] = make(pair, "dd", "", "–");
    }
  }

  show(answer) {
    const values = {
      "tokens/s": rounded(answer.tokensPerSecond), "tokens a cycle": rounded(answer.tokensPerCycle, 2),
      tokens: answer.tokens.length, cycles: answer.cycles, seed: answer.seedText,
    };
    for (const [name, value] of Object.entries(values)) this._values[name].textContent = value;
  }
}

/** An answer's figures as a sentence has them. */
export function inWords(answer) {
  return `${count(answer.tokens.length, "token")}, ${rounded(answer.tokensPerSecond)} tokens/s, ` +
    `${rounded(answer.tokensPerCycle, 2)} tokens a cycle`;
}

/** Change what is shown, and go along if the end of the page was in view. */
function following(change) {
  const page = document.documentElement;
  const near = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR;
  change();
  if (near) page.scrollTop = page.scrollHeight;
}

function make(parent, tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}
