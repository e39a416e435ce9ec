"""The model card of the embedded checkpoint, written from the facts of its training."""

from __future__ import annotations

from typing import Any

from .survival import FLOOR


def write(facts: dict[str, Any]) -> str:
    """Markdown from `training.json`."""
    corpus = facts["corpus"]
    rows = "\n".join(
        f"| {d['name']} | {d['licence']} | {d['bytes'] / 1e6:.2f} |" for d in corpus["distributions"]
    )
    table = "\n".join(f"| {name} | {words} |" for name, words in _training(facts).items())
    return f"""# Tiny Orthrus-Qwen3

A real, small Orthrus-Qwen3 in the official tensor names: a test fixture and a demonstration, not a coding
assistant. It continues Python source in the style of library code and knows nothing else.

Made by {_verbs(facts)}; `make tiny-checkpoint` runs these one after
another and makes one like it. Every setting and figure below is in `training.json`.

| | |
|---|---|
{table}

Held-out files were chosen by the hash of their content. No prompt in `held_out.jsonl` shares a run of 50
tokens with the AR view's training text. Its `source` and `licence` fields say where a prompt comes from.

## Corpus

Files of 2 to 200 kB from distributions that declare a permissive licence and nothing else; each content once.

| distribution | licence as declared | MB |
|---|---|---|
{rows}
"""


def write_if_whole(facts: dict[str, Any]) -> str | None:
    """The same, None where the facts of a training are missing or are not what they should be."""
    try:
        return write(facts)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def write_short(facts: dict[str, Any], base: str) -> str:
    """Markdown for a diffusion view distilled onto any other base."""
    dis = facts["distill"]
    estimate = "no estimate: there was no held-out text"
    if "tokens_per_cycle_dev" in dis:
        agreement = ", ".join(f"{x:.2f}" for x in dis["agreement_dev"][:8])
        estimate = (
            f"{dis['tokens_per_cycle_dev']} tokens a cycle on held-out text (simulated, greedy), "
            f"agreement by offset {agreement}"
        )
    text = f"{dis['steps']} steps of {dis['batch']} rows of {dis['length']} tokens in {dis['seconds']} s"
    return f"""# Orthrus view of {base}

Made by `orthrus distill`: the tensors of the base are those of {base}, bit for bit, and its licence applies.
Only the `_diff` weights were trained; every figure below is in `training.json`.

- machine: {dis["machine"]}, torch {dis["torch"]}, Python {dis["python"]}, {dis["date"]}
- {text}, {dis["count"]} blocks of {_sizes(dis)} a row
- learning rate {dis["lr"]}, seed {dis["seed"]}, {_loss(dis)}
- {dis.get("own_text", 0):.0%} of the text the base's own{_started(dis)}
- {estimate}

Greedy and sampled text is the base's whatever these weights are; they change its speed only.
"""


def _verbs(facts: dict[str, Any]) -> str:
    last = ["bigram", "select"] if "selector" in facts else ["bigram"]
    *verbs, end = [f"`{verb}`" for verb in ("orthrus pretrain", "unrepeat", "distill", *last)]
    return f"{', '.join(verbs)} and {end}"


def _training(facts: dict[str, Any]) -> dict[str, str]:
    """The rows of the card's first table."""
    pre, dis, corpus = facts["pretrain"], facts["distill"], facts["corpus"]
    rows = {
        "machine": f"{facts['machine']}, torch {facts['torch']}, Python {facts['python']}, {facts['date']}",
        "corpus": f"{corpus['bytes'] / 1e6:.0f} MB of Python source, "
        f"{corpus['training_tokens'] / 1e6:.1f}M tokens, licences below",
        "AR view": f"{pre['steps']} steps of {pre['batch']} x {pre['length']} tokens in {pre['seconds']} s, "
        f"seed {pre['seed']}; held-out loss {pre['held_out_loss']:.3f} nats a token",
        **({"AR view, against loops": _unrepeat(facts["unrepeat"])} if "unrepeat" in facts else {}),
        "diffusion view": f"{dis['steps']} steps of {dis['batch']} rows x {dis['count']} blocks of "
        f"{_sizes(dis)} in {dis['seconds']} s, seed {dis['seed']}, {_loss(dis)}, "
        f"{dis.get('own_text', 0):.0%} of the text the AR view's own{_started(dis)}{_machine(dis)}",
    }
    if "bigram" in facts:
        big = facts["bigram"]
        rows["bigram correction"] = (
            f"rank {big['rank']}, {big['steps']} steps of {big['batch']} rows x {big['count']} blocks of "
            f"{big['size']} in {big['seconds']} s{_machine(big)}"
        )
        if "calibration" in big:
            fitted = big["calibration"]
            rows["calibration of drafts"] = (
                f"{fitted['texts']} texts of {fitted['tokens']} tokens of its own at temperature 0 and as "
                f"many at {fitted['temperatures'][1]}, behind pieces of other Python source than that of the "
                f"held-out prompts; {fitted['machine']}, {fitted['date']}"
            )
    if "selector" in facts:
        fit = facts["selector"]
        rows["selector of candidates"] = (
            f"rank {fit['rank']}, step {fit['best_step']} of {fit['steps']} in {fit['seconds']} s, on "
            f"{fit['tokens'] / 1e6:.1f}M tokens of its own greedy text, calibrated by {fit['texts']} texts "
            f"at temperature 0 and {fit.get('texts_above_0', 'as many')} at {fit['temperatures'][1]}; "
            f"{fit['machine']}, {fit['date']}"
        )
    if "tokens_per_cycle_dev" in dis:
        agreement = ", ".join(f"{x:.2f}" for x in dis["agreement_dev"][:8])
        rows["estimate on the dev prompts"] = (
            f"{dis['tokens_per_cycle_dev']} tokens a cycle (simulated on the proposal table, chain, greedy), "
            f"distinct 8-grams {dis['distinct_8grams_dev']}, agreement by offset {agreement}"
        )
    if "verify" in facts:
        seen = facts["verify"]
        draft = seen.get("draft", "a chain")
        rows[f"held-out prompts, greedy, {draft}"] = (
            f"{seen['tokens_per_cycle']} tokens a cycle as a ratio of sums, "
            f"{seen['tokens_per_cycle_mean_per_prompt']} as the mean of {seen['prompts']} prompts, "
            f"{seen['tokens_per_forward']} a forward pass; distinct 8-grams {seen['distinct_8grams']}"
        )
        rows[f"held-out prompts, temperature 0.8, {draft}"] = (
            f"{seen['tokens_per_cycle_sampled']} tokens a cycle"
        )
        rows["measured by"] = f"`{seen['command']}`, {seen['machine']}, {seen['date']}"
    return rows


def _machine(said: dict[str, Any]) -> str:
    """Where a training ran, of those whose facts say so, and on which text if not on the AR view's."""
    corpus = "; its corpus is in `training.json`" if "corpus" in said else ""
    return f"; {said['machine']}, {said['date']}{corpus}" if "machine" in said else ""


def _sizes(dis: dict[str, Any]) -> str:
    """Of blocks, those of every other step too where they are short."""
    return f"{dis['size']}" + (f" ({dis['short']} in every other step)" if dis.get("short") else "")


def _loss(dis: dict[str, Any]) -> str:
    """What was minimised, where it is not the KL alone."""
    loss = "cross-entropy of the AR view's likeliest token, " if dis.get("loss") == "ce" else ""
    if dis.get("offset_weights") == "survival":
        return f"{loss}loss weight by measured survival, at least {FLOOR}"
    return f"{loss}loss weight {dis['offset_decay']}^offset"


def _unrepeat(said: dict[str, Any]) -> str:
    """How the AR view was trained on against repeating itself."""
    loss = f"; held-out loss {said['held_out_loss']:.3f}" if "held_out_loss" in said else ""
    return (
        f"{said['steps']} steps of {said['batch']} x {said['length']} tokens and "
        f"{said['count']} of its own continuations at a time in {said['seconds']} s (unlikelihood of what "
        f"repeats){loss}"
    )


def _started(dis: dict[str, Any]) -> str:
    """Which weights the diffusion view started from, if not the AR view's."""
    earlier = dis.get("started_from")
    if isinstance(earlier, dict):
        return f"; started from weights of {earlier['steps']} earlier steps ({earlier['seconds']:.0f} s)"
    return f"; started from the diffusion weights of {earlier}" if earlier else ""
