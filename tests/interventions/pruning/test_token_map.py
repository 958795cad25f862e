"""The algebra of kept tokens against lists: every layer is a list of (original slot, may be looked at) for each sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmattn.request import Kept, Slots, TokenMap

LOWEST = torch.finfo(torch.float32).min
Layer = list[list[tuple[int, bool]]]


@dataclass
class Part:
    """Tokens that are read at once: which are real, which are image tokens, and which of these stay, stage by stage."""

    real: list[list[bool]]
    visual: list[list[bool]]
    stays: list[list[list[bool]]]
    drop: bool
    compact: bool

    @property
    def length(self) -> int:
        return len(self.real[0])


@dataclass
class Story:
    """A prompt with drafted tokens behind it, a cut, some generated tokens, and another part of a prompt."""

    first: Part
    drafts: int
    accepted: int
    generated: int
    second: Part | None
    layers: Layer = field(default_factory=list)

    @property
    def batch(self) -> int:
        return len(self.first.real)


@st.composite
def parts(draw, batch, longest, drafts=0, pads=True, drop=None, compact=None):
    length = draw(st.integers(1, longest))
    real, visual, stays = [], [], []
    stages = draw(st.integers(1, 2))
    flags = lambda: draw(st.lists(st.booleans(), min_size=length, max_size=length))  # noqa: E731
    for _ in range(batch):
        padding = draw(st.integers(0, length - 1)) if pads else 0
        real.append([i >= padding for i in range(length)] + [True] * drafts)
        visual.append([v and i < length - 1 for i, v in enumerate(flags())] + [False] * drafts)
        stays.append([flags() + [True] * drafts for _ in range(stages)])
    return Part(
        real,
        visual,
        [[row[s] for row in stays] for s in range(stages)],
        draw(st.booleans()) if drop is None else drop,
        draw(st.booleans()) if compact is None else compact,
    )


@st.composite
def stories(draw):
    batch, drafts = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    first = draw(parts(batch, 9, drafts))
    accepted = draw(st.integers(0, drafts))
    second = None
    if draw(st.booleans()):
        second = draw(parts(batch, 6, pads=False, drop=first.drop, compact=first.compact))
    return Story(first, drafts, accepted, draw(st.integers(0, 3)), second)


def narrowed(part: Part, begin: int) -> tuple[Kept, list[Kept]]:
    """All stages of a part by the code under test, each checked against lists."""
    batch, real = len(part.real), torch.tensor(part.real)
    slots = torch.arange(begin, begin + part.length).expand(batch, -1)
    visual = torch.tensor(part.visual)
    left = visual & real
    kept = Kept(slots, None if bool(real.all()) else real, tuple(left.sum(1).tolist()))
    text = (real & ~visual).sum(1).tolist()
    every = []
    for stay in part.stays:
        here = kept.slots - begin
        wanted = torch.tensor(stay).gather(1, here)
        image = visual.gather(1, here) & (True if kept.valid is None else kept.valid)
        counts = (wanted & image).sum(1).tolist()
        before, (kept, order) = kept, kept.narrowed(wanted | ~image, counts, text, part.drop, part.compact)
        check_narrowed(before, kept, order, wanted | ~image, part)
        assert kept.visual == tuple(counts)
        assert kept.compact == part.compact
        every.append(kept)
    return kept, every


def flags_of(kept: Kept | TokenMap) -> list[list[bool]]:
    return (torch.ones_like(kept.slots, dtype=torch.bool) if kept.valid is None else kept.valid).tolist()


def check_narrowed(before: Kept, after: Kept, order: Tensor, keep: Tensor, part: Part) -> None:
    """The kept ones in order; before them others where a row of the batch is shorter, padding if there is some."""
    old, new = flags_of(before), flags_of(after)
    rows = zip(before.slots.tolist(), old, after.slots.tolist(), new, order.tolist(), keep.tolist(), strict=True)
    longest = max(sum(k and v for k, v in zip(ks, vs, strict=True)) for ks, vs in zip(keep.tolist(), old, strict=True))
    for slots, valid, found, stay, places, wanted in rows:
        expected = [s for s, v, w in zip(slots, valid, wanted, strict=True) if v and w]
        assert found == [slots[place] for place in places]
        assert len(found) == len(set(found)), "none twice"
        assert [s for s, v in zip(found, stay, strict=True) if v] == expected
        if not part.drop:
            assert found == slots
            continue
        assert len(found) == longest
        assert stay == sorted(stay), "fillers lead"
        fillers = [s for s, v in zip(found, stay, strict=True) if not v]
        padding = [s for s, v in zip(slots, valid, strict=True) if not v]
        assert len([s for s in fillers if s in padding]) == min(len(fillers), len(padding))


def extended(layer: Layer, begin: int, kept: Kept) -> Layer:
    """A layer that held slots below ``begin`` goes on with ``kept``."""
    added = [list(zip(*row, strict=True)) for row in zip(kept.slots.tolist(), flags_of(kept), strict=True)]
    return [[pair for pair in row if pair[0] < begin] + more for row, more in zip(layer, added, strict=True)]


def generated(layer: Layer, start: int, stop: int) -> Layer:
    return [row + [(slot, True) for slot in range(start, stop)] for row in layer]


def cut(layer: Layer, stop: int) -> Layer:
    return [[pair for pair in row if pair[0] < stop] for row in layer]


def check_map(tokens: TokenMap, layer: Layer) -> None:
    assert tokens.slots.tolist() == [[slot for slot, _ in row] for row in layer]
    assert flags_of(tokens) == [[valid for _, valid in row] for row in layer]
    assert tokens.kept == len(layer[0])
    assert tokens.removed == tokens.length - len(layer[0])
    for later in range(3):
        assert tokens.slot(tokens.length + later) == len(layer[0]) + later
    assert tokens.slot(tokens.begin) == sum(slot < tokens.begin for slot, _ in layer[0])


def check_rows(tokens: TokenMap, part: Part, kept: Kept) -> None:
    """Hidden states, rotary tables of the batch or of one for all, position ids."""
    for batch, shape in ((len(part.real), (2,)), (1, (3,)), (1, ())):
        values = torch.randn(batch, part.length, *shape)
        found = tokens.rows(values)
        for b, slots in enumerate(kept.slots.tolist()):
            for i, slot in enumerate(slots):
                assert torch.equal(found[b, i], values[b % batch, slot - tokens.begin])


def given_mask(kind: str, batch: int, heads: int, start: int, queries: int, width: int) -> Tensor:
    """Causal, with random holes: bool or additive with a finite bias here and there."""
    keys = torch.arange(width)
    sees = (keys <= torch.arange(start, start + queries)[:, None]) & (torch.rand(batch, heads, queries, width) < 0.8)
    if kind == "bool":
        return sees
    return torch.randn(sees.shape).masked_fill(~sees, LOWEST)


def check_mask(tokens: TokenMap, layer: Layer, start: int, rows: list[list[int]], width: int, static: int) -> None:
    """Every element, for masks of all kinds; ``rows``: original slots of the layer's query rows.

    Args:
        width: original slots that the library counts; static: slots of a static cache, 0 for one that grows.
    """
    batch, queries, newest = len(layer), len(rows[0]), start == tokens.begin
    given_rows = tokens.length - start if newest else queries
    length = len(layer[0])
    for kind in ("bool", "additive"):
        for heads in (1, 2):
            mask = given_mask(kind, batch if heads == 1 else 1, heads, start, given_rows, static or width)
            found = tokens.mask(mask, start, queries, static or length, torch.float32 if kind == "additive" else None)
            assert found.shape == (batch, heads, queries, static or length)
            check_elements(found, mask, layer, start, rows, newest, kind)
    if static:
        return
    for kind, dtype in (("bool", None), ("additive", torch.float32)):
        found = tokens.mask(None, start, queries, length, dtype)
        if tokens.valid is None:
            assert found is None
            continue
        sees = torch.arange(width) <= torch.arange(start, start + given_rows)[:, None]
        mask = sees if kind == "bool" else torch.zeros(sees.shape).masked_fill(~sees, LOWEST)
        check_elements(found, mask[None, None], layer, start, rows, newest, kind)


def check_elements(
    found: Tensor, mask: Tensor, layer: Layer, start: int, rows: list[list[int]], newest: bool, kind: str
) -> None:
    hidden = False if kind == "bool" else LOWEST
    expected = torch.full(found.shape, hidden, dtype=found.dtype)
    for b, keys in enumerate(layer):
        valid = dict(keys)
        for i, row in enumerate(rows[b]):
            for j, (key, sees) in enumerate(keys):
                if sees:
                    expected[b, :, i, j] = mask[b % len(mask), :, row - start, key]
                if newest and not valid[row] and key == row:  # nobody looks at it: it sees itself
                    expected[b, :, i, j] = True if kind == "bool" else 0.0
    assert torch.equal(found, expected)


def check_slots(tokens: TokenMap, layer: Layer, later: int) -> None:
    """What a method writes in a layer's slots lies at the original ones, and comes back."""
    batch, width = len(layer), tokens.length + later
    values = torch.randn(batch, tokens.kept + later)
    spread = tokens.spread(values, -7.0)
    expected = torch.full((batch, width), -7.0)
    for b, row in enumerate(layer):
        for j, (slot, _) in enumerate(generated([row], tokens.length, width)[0]):
            expected[b, slot] = values[b, j]
    assert torch.equal(spread, expected)
    slots = Slots(-7.0, torch.float32)
    slots.write(0, spread)
    again = slots.picked(tokens.slots, tokens.length).read(tokens.kept + later, torch.device("cpu"))
    assert torch.equal(again, values)


def check_positions(tokens: TokenMap, layer: Layer, kept: Kept, real: list[list[bool]], compact: bool) -> None:
    """Counted anew, a token's position is the number of tokens before it that may be looked at."""
    if not compact:
        assert tokens.lost is None
        return
    library = torch.tensor([[sum(row[:slot]) for slot in range(len(row) + 1)] for row in real])
    newest = tokens.positions(library[:, tokens.begin : tokens.length], True)
    for b, row in enumerate(layer):
        counted = {slot: sum(valid for _, valid in row[:j]) for j, (slot, valid) in enumerate(row) if valid}
        for i, (slot, valid) in enumerate(zip(kept.slots[b].tolist(), flags_of(kept)[b], strict=True)):
            if valid:
                assert newest[b, i] == counted[slot]
        after = sum(valid for _, valid in row)
        assert tokens.lost[b] == sum(real[b]) - after


def check_moved(tokens: TokenMap) -> None:
    rows = torch.randint(len(tokens.slots), (4,))
    moved = tokens.moved(rows)
    assert torch.equal(moved.slots, tokens.slots[rows])
    assert (moved.length, moved.begin, moved.at) == (tokens.length, tokens.begin, tokens.at)
    for name in ("valid", "lost"):
        before, after = getattr(tokens, name), getattr(moved, name)
        assert (before is None) == (after is None)
        assert before is None or torch.equal(after, before[rows])


@settings(max_examples=100)
@given(stories(), st.integers(0, 2**16))
def test_a_layer_is_what_lists_say(story, seed):
    torch.manual_seed(seed)
    first, real = story.first, [list(row) for row in story.first.real]
    tokens, layer, _ = stage(None, [[] for _ in real], first, 0, real)

    stop = first.length - story.drafts + story.accepted  # drafts that were wrong are cut off
    layer, real = cut(layer, stop), [row[:stop] for row in real]
    queries = 1 + story.generated
    layer, real = generated(layer, stop, stop + queries), [row + [True] * queries for row in real]
    rows = [list(range(stop, stop + queries))] * story.batch
    check_mask(tokens, layer, stop, rows, stop + queries, 0)
    check_mask(tokens, with_room(layer, 40), stop, rows, stop + queries, 40)

    if story.second is None:
        return
    begin, second = stop + queries, story.second
    real = [row + more for row, more in zip(real, second.real, strict=True)]
    before = tokens
    tokens, layer, _ = stage(before, layer, second, begin, real)
    assert tokens.at == sum(slot < begin for slot, _ in layer[0])
    last = begin + second.length
    check_mask(tokens, generated(layer, last, last + 2), last, [[last, last + 1]] * story.batch, last + 2, 0)


def with_room(layer: Layer, size: int) -> Layer:
    """As a static cache has it: slots that were never written, which no mask shows (their column is out of range)."""
    return [row + [(-1, False)] * (size - len(row)) for row in layer]


def stage(
    before: TokenMap | None, layer: Layer, part: Part, begin: int, real: list[list[bool]]
) -> tuple[TokenMap, Layer, Kept]:
    """A part is read: its map after the last stage, checked in every way."""
    kept, every = narrowed(part, begin)
    stop = begin + part.length
    all_real = torch.tensor(real)
    padding = None if bool(all_real.all()) else all_real
    for rows in every:
        tokens = TokenMap.of(before, rows, begin, stop, padding)
        found = extended(layer, begin, rows)
        check_map(tokens, found)
        check_rows(tokens, part, rows)
        check_mask(tokens, found, begin, rows.slots.tolist(), stop, 0)
        check_mask(tokens, with_room(found, 40), begin, rows.slots.tolist(), stop, 40)
        check_slots(tokens, found, 2)
        check_positions(tokens, found, rows, real, part.compact)
        check_moved(tokens)
    return tokens, found, kept


def of(rows: list[list[int]], stop: int, compact: bool = False, before: TokenMap | None = None, begin: int = 0):
    return TokenMap.of(before, Kept(torch.tensor(rows), None, (1,) * len(rows), compact), begin, stop, None)


def test_what_is_read_behind_keeps_its_distance():
    tokens = of([[0, 3, 5], [1, 2, 5]], 6)
    assert (tokens.kept, tokens.removed, tokens.slot(0), tokens.slot(6), tokens.slot(9)) == (3, 3, 0, 3, 6)
    assert tokens.mask(None, 6, 1, 4, None) is None, "one row sees all, so does a causal prompt"
    again = of([[8, 9], [7, 9]], 10, before=tokens, begin=7)
    assert again.slots.tolist() == [[0, 3, 5, 6, 8, 9], [1, 2, 5, 6, 7, 9]]
    assert (again.at, again.removed, again.slot(7), again.slot(10)) == (4, 4, 4, 6)


def test_a_text_turn_as_long_as_the_prompt_is_not_the_prompt():
    """Positions that are counted anew go on behind it."""
    tokens = of([[0, 3, 5]], 6, compact=True)
    assert tokens.positions(torch.arange(6)[None], True).tolist() == [[0, 1, 2]]
    assert tokens.positions(torch.arange(6, 12)[None], False).tolist() == [[3, 4, 5, 6, 7, 8]]


def test_drafts_that_were_wrong_leave_no_slot_behind():
    """A prompt of 4 tokens was read with 3 drafts; none was right, and one token or two follow."""
    valid = torch.tensor([[True, True, True, True, True], [False, True, True, True, True]])
    slots = torch.tensor([[0, 3, 4, 5, 6], [1, 3, 4, 5, 6]])
    tokens = TokenMap.of(None, Kept(slots, valid, (1, 0)), 0, 7, None)
    given = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert tokens.mask(given, 4, 1, 3, None)[:, 0, 0].tolist() == [[True, True, True], [False, True, True]]
    assert tokens.mask(None, 4, 1, 3, None)[:, 0, 0].tolist() == [[True, True, True], [False, True, True]]
    second = TokenMap.of(tokens, Kept(torch.tensor([[5, 6], [5, 6]]), None, (1, 1)), 5, 7, None)
    assert second.slots.tolist() == [[0, 3, 4, 5, 6], [1, 3, 4, 5, 6]]
    assert (second.at, second.removed) == (3, 2)


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1]])
def test_rows_of_a_moved_map_are_those_of_their_origin(rows):
    tokens, picked = of([[0, 3, 5], [1, 2, 5]], 6), torch.tensor(rows)
    values = torch.randn(2, 6, 4)
    assert torch.equal(tokens.moved(picked).rows(values[picked]), tokens.rows(values)[picked])
