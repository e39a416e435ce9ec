"""An engine without a model, for tests/test_scheduler.py: it does what a scheduler says on page tables of its
own, reads what a piece of work brought some pieces later, and checks what the scheduler promises.

Its pages hold keys. A key tells all tokens up to its own and the salt in front of them, and so does the next
token, which follows from the last key: texts that begin alike go on alike."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from orthrus_kernels import PAGE, pages_for
from qwen3_model.decode.scheduler import MOST_PARTS, Cycle, Part, Scheduler


@dataclass
class Text:
    prompt: int
    limit: int
    salt: str
    tokens: list[int]  # that it has when it ends
    keys: list[int]
    ids: list[int]  # tokens that the host has read
    length: int  # tokens on the device
    slot: int | None = None
    prefill: int = 0  # tokens in front of the root, which is chosen behind a prompt
    read: int = 0  # of them are in its pages
    epoch: int = 0  # preemptions
    cycles: int = 0  # since it was admitted
    left_out: int = 0  # cycles in turn that it was paused
    removed_before: int = 0  # texts, when it was preempted

    @classmethod
    def of(cls, prompt: list[int], new: int, end: int, salt: str) -> Text:
        tokens, keys, key = list[int](), list[int](), hash(tuple(map(ord, salt)))
        for nth in range(len(prompt) + min(end, new)):
            tokens.append(prompt[nth] if nth < len(prompt) else key % 5)
            key = hash((key, tokens[-1]))
            keys.append(key)
        return cls(len(prompt), len(prompt) + new, salt, tokens, keys, list(prompt), len(prompt))

    @property
    def told(self) -> int:
        return len(self.ids)

    @property
    def end(self) -> int:
        return len(self.tokens)

    @property
    def ready(self) -> bool:
        return self.slot is not None and self.read == self.prefill


class ToyEngine:
    """growth(): what a cycle adds to a text, at most `most`; late: pieces of work that are in flight when the
    next one is asked for; beside(): tokens of prompts that a step reads while texts decode, `least` or more,
    of which `at_once` at least are read in one."""

    def __init__(self, slots, pages, chunk, most, late, growth, beside=None, least=None, at_once=1) -> None:
        self.scheduler: Scheduler[int] = Scheduler(slots, pages, chunk)
        self.scheduler.at_once = at_once
        self.slots, self.pages, self.chunk, self.most, self.growth = slots, pages, chunk, most, growth
        self.late, self.ahead = late, (late + 1) * most
        self.beside, self.least = beside or (lambda: chunk), min(least or chunk, chunk)
        self.texts: dict[int, Text] = {}  # in the order of submission
        self.tables: dict[int, list[int]] = {}  # by slot
        self.memory = [[0] * PAGE for _ in range(pages)]
        self.unread: deque[dict[int, tuple[int, int]]] = deque()  # text: (epoch, length)
        self.seen: Counter[str] = Counter()
        self.past: deque[list[int]] = deque(maxlen=30)  # the last texts that were submitted
        self._added = 0
        self.owed = 0  # tokens of prompts that cycles have not read, and a text in its prompt might have had
        self.widest = at_once  # of pieces

    def add(self, prompt: int, new: int, end: int, like: int = 0, cut: int = 0, salt: str = "") -> int:
        """Submit a text of at most `new` tokens behind its prompt, which ends after `end`. The prompt begins
        with `cut` tokens of an earlier text, the `like`-th from the last, prompt or answer."""
        number, self._added = self._added, self._added + 1
        begins = self.past[-1 - like % len(self.past)][: min(cut, prompt)] if self.past else []
        text = Text.of(begins + [number + 5] * (prompt - len(begins)), new, end, salt)
        self.past.append(text.tokens)
        self.texts[number] = text
        self.scheduler.add(number, text.ids, text.limit, salt)
        return number

    def remove(self, number: int, why: str = "ended") -> None:
        text = self.texts.pop(number)
        state = "waiting" if text.slot is None else "running" if text.ready else "prompt"
        self.seen[f"{why}, {state}"] += 1
        self.seen["removed"] += 1
        if text.slot is not None:
            del self.tables[text.slot]
        self.scheduler.remove(number)
        self.check()

    def step(self) -> None:
        """Ask for work, check it, do it, and read an older piece's record."""
        busy = any(text.ready for text in self.texts.values())
        self.scheduler.beside = self.beside()
        each = min(self.chunk, self.scheduler.beside)
        self.rows = min(self.chunk, max(self.scheduler.at_once, each)) if busy else self.chunk
        self.widest, few = max(self.widest, self.rows * busy), busy and each < self.chunk
        work = self.scheduler.next(self.ahead)
        if work is None:
            assert not self.texts, "there is work for as long as there is a text"
            self.unread.clear()
            return
        self.seen[type(work).__name__] += 1
        assert isinstance(work, Cycle) == busy, "where a text decodes, it goes on"
        if isinstance(work, Cycle):
            self.preempt(work.preempted)
            if all(text.ready for text in self.running().values()):
                self.owed = max(self.owed, 0)
            self.owed += each - sum(part.end - part.first for part in work.parts)
            assert self.owed >= -2 * self.widest, "no more is read than was saved up"
            if all(text.ready for text in self.running().values()):
                self.owed = min(self.owed, 0)
            assert self.owed < 2 * self.widest, "and no less"
        granted = {grant.slot: grant.pages for grant in work.grants}
        ready = {number: text for number, text in self.running().items() if text.ready}
        for part in work.parts:
            if part.slot not in self.tables:
                self.admit(part, granted[part.slot])
        for slot, first, pages in work.grants:
            assert pages and first == len(self.tables[slot]), "places of a table are filled in turn"
            self.tables[slot] += pages
        record = self.cycle(work, ready) if isinstance(work, Cycle) else {}
        self.unread.append(record | self.read_parts(work.parts))
        self.seen["parts beside"] += bool(work.parts) and few
        self.check()
        while len(self.unread) > self.late:
            self.read(self.unread.popleft())

    def running(self) -> dict[int, Text]:
        return {number: text for number, text in self.texts.items() if text.slot is not None}

    def missing(self, text: Text, tokens: int) -> int:
        """Pages that a text lacks to hold so many tokens, or its limit."""
        assert text.slot is not None
        return pages_for(min(text.limit, tokens)) - len(self.tables[text.slot])

    def needed(self, text: Text) -> int:
        """Pages that it lacks for the next cycle; the token behind its prompt counts, read or not."""
        return self.missing(text, max(text.told, text.prompt + 1) + self.ahead)

    def free(self) -> int:
        return self.pages - len(self.holders())

    def holders(self) -> Counter[int]:
        """How many texts have each page."""
        return Counter(page for table in self.tables.values() for page in table)

    def write(self, text: Text, first: int, end: int) -> None:
        """Put keys of a text down, behind those that its pages must hold: a page of its own alone."""
        assert text.slot is not None
        table, tables = self.tables[text.slot], self.tables.values()
        for place in range(pages_for(end)):
            page, begin = self.memory[table[place]], PAGE * place
            held, last = max(min(first - begin, PAGE), 0), min(end - begin, PAGE)
            assert page[:held] == text.keys[begin : begin + held], "its pages hold its keys"
            assert last <= held or sum(table[place] in other for other in tables) == 1, (
                "nobody's keys change under him"
            )
            page[held:last] = text.keys[begin + held : begin + last]

    def preempt(self, preempted: tuple[int, ...]) -> None:
        """The youngest, as long as no text can go on; what is unread of them is dropped."""
        for number in preempted:
            text = self.texts[number]
            assert number == max(self.running()), "the youngest"
            able = [t for t in self.running().values() if t.ready and self.needed(t) <= 0]
            oldest = next(iter(self.running().values()))
            assert not able and self.needed(oldest) > self.free(), "only if no text can go on"
            assert text.cycles, "no text is preempted before a cycle of its own"
            del self.tables[text.slot]
            text.slot, text.cycles, text.left_out = None, 0, 0
            text.epoch, text.length, text.removed_before = text.epoch + 1, text.told, self.seen["removed"]
            self.seen["preempted"] += 1

    def admit(self, part: Part, pages: tuple[int, ...]) -> None:
        """pages: that it gets."""
        text, holders = self.texts[part.text], self.holders()
        assert text.slot is None and 0 <= part.slot < self.slots
        room = self.seen["removed"] > text.removed_before or any(holders[page] for page in pages)
        assert not text.epoch or room, "room for it has come, or others have the like of its pages now"
        self.seen["admitted"] += 1
        self.seen["shared"] += any(holders[page] for page in pages)
        self.seen["found again"] += part.first > 0 and text.epoch > 0
        self.seen["found"] += part.first > 0
        text.slot, self.tables[part.slot] = part.slot, []
        text.prefill = text.prompt if text.told == text.prompt else text.told - 1
        assert part.first % PAGE == 0
        text.read = part.first

    def read_parts(self, parts: tuple[Part, ...]) -> dict[int, tuple[int, int]]:
        numbers, rows = [part.text for part in parts], sum(part.end - part.first for part in parts)
        assert numbers == sorted(set(numbers)) and len(numbers) <= MOST_PARTS and rows <= self.rows
        self.seen["several parts"] += len(numbers) > 1
        return {part.text: record for part in parts if (record := self.read_part(part, rows))}

    def read_part(self, part: Part, rows: int) -> tuple[int, int] | None:
        """rows: of the whole step."""
        text = self.texts[part.text]
        assert (part.slot, part.first) == (text.slot, text.read) and part.first < part.end
        text.read = part.end
        assert text.read <= len(self.tables[part.slot]) * PAGE, "its pages hold the chunk"
        self.write(text, part.first, part.end)
        assert part.last == (text.read == text.prefill) and (part.last or rows == self.rows)
        if not part.last:
            assert part.text == max(self.running()), "only the youngest is in the middle of its prompt"
            return None
        text.length = text.read + 1
        return text.epoch, text.length

    def cycle(self, work: Cycle, ready: dict[int, Text]) -> dict[int, tuple[int, int]]:
        """ready: that have read their prompts."""
        going = dict(work.texts)
        assert going and len(going) == len(work.texts), "each once"
        record, short, granted = {}, False, {grant.slot for grant in work.grants}
        for number, text in ready.items():
            lacks = self.needed(text)
            if number not in going:
                assert lacks > 0 and (short or lacks > self.free()), "a text with its pages goes on"
                short, text.left_out = True, text.left_out + 1
                self.seen["paused"] += 1
                continue
            assert going[number] == text.slot
            assert not short or text.slot not in granted, "free pages are kept for an older text"
            assert lacks <= 0 and self.missing(text, text.length + self.most) <= 0, "its pages hold the cycle"
            text.cycles, text.left_out = text.cycles + 1, 0
            committed, text.length = text.length - 1, min(text.length + self.growth(), text.end)
            self.write(text, committed, text.length - 1)
            record[number] = text.epoch, text.length
        assert record.keys() == going.keys(), "no text without its prompt"
        assert self.scheduler.paused == len(ready) - len(going)
        oldest = next(iter(ready.values()))
        assert oldest.left_out <= PAGE + 2 * self.ahead, "younger ones soon need a page too"
        return record

    def read(self, record: dict[int, tuple[int, int]]) -> None:
        for number, (epoch, length) in record.items():
            text = self.texts.get(number)
            if text is None or text.epoch != epoch:
                continue
            text.ids += text.tokens[text.told : length]
            self.scheduler.grown(number, length)
            if length == text.end:
                self.remove(number)

    def check(self) -> None:
        """What holds at any time."""
        owned = self.holders()
        assert owned.keys() <= set(range(self.pages)) and self.scheduler.pages_used == len(owned), (
            "none is lost"
        )
        assert all(len(set(table)) == len(table) for table in self.tables.values())
        running = list(self.running())
        assert {self.texts[n].slot for n in running} == self.tables.keys(), "one text a slot"
        assert running == list(self.texts)[: len(running)], "no text overtakes another"
        assert (self.scheduler.running, self.scheduler.waiting) == (
            len(running),
            len(self.texts) - len(running),
        )
        assert self.scheduler.preemptions == self.seen["preempted"]

    def drain(self) -> None:
        """Run until every text has ended: each piece of work brings that nearer."""
        most = sum(t.end + 2 * self.late + 2 * t.end // self.least + 9 for t in self.texts.values())
        most *= 2 + len(self.texts)  # a text may begin anew whenever another one has ended
        for _ in range(most):
            if not self.texts:
                break
            self.step()
        assert not self.texts, "every text ends"
        self.step()
        assert not self.tables and self.scheduler.pages_used == 0
