"""Name a wrong mask or list of keys, from how often each row counts each key."""

from __future__ import annotations

import torch

from flashcore.bisection.diagnosis.behaviour import mask_of
from flashcore.bisection.diagnosis.hypotheses import TILES, Hypothesis, head_of, ranges
from flashcore.problem import Problem


def of_counts(counts: torch.Tensor, problem: Problem) -> list[Hypothesis]:
    """Names for how often each key is counted, float64 ``[N, Sq, Sk]``; none where the mask is the right one."""
    wanted = mask_of(problem, counts.device)
    wrong = counts != wanted
    if not bool(wrong.any()):
        return []
    per_head = wrong.any(dim=-1).any(dim=-1)
    heads = per_head.nonzero().flatten().tolist()
    one = counts[heads[0]]
    everywhere = bool((counts[heads] == one).all())
    where = "" if len(heads) == len(per_head) else f" in {len(heads)} of {len(per_head)} heads"
    row, key = (one != wanted).nonzero()[0].tolist()
    place = {**head_of(heads[0], problem), "row": row, "column": key}
    changes = {"counts": one if everywhere and len(heads) == len(per_head) else counts}
    named = next(
        (name for of in (_mask_name, _keys_name, _mask_and_keys, _rows_alone, _tiles_alone)
         if (name := of(one, wanted, problem))), None,
    )  # fmt: skip
    if named is None or not everywhere:
        named = ("keys counted wrongly", _pairs_words(one, wanted), ("scores",))
    name, sentence, stages = named
    found = [Hypothesis(name, sentence + where, stages, changes, place)]
    if bool((one == 1).all()) and not bool(wanted.all()):
        # With all scores 0 a mask that multiplies looks like none: it makes masked scores 0, which they are already.
        found.append(Hypothesis(
            "masked scores set to 0", "masked scores are set to 0 where they should be -inf" + where, ("scores",),
            {"masked_score": 0.0}, place,
        ))  # fmt: skip
    return found


def _mask_name(one: torch.Tensor, wanted: torch.Tensor, problem: Problem) -> tuple[str, str, tuple[str, ...]] | None:
    rows, keys = one.shape
    if bool((one == 1).all()):
        return "no mask", "the causal mask is not applied", ("scores",)
    if bool(((one != 0) & (one != 1)).any()):
        return None
    row = torch.arange(rows, device=one.device)[:, None]
    column = torch.arange(keys, device=one.device)[None, :]
    meant = keys - rows if problem.causal else None

    def diagonal(offset: int) -> torch.Tensor:
        return (column <= row + offset).double()

    for offset in sorted(range(-rows, keys + 1), key=lambda o: abs(o - (meant or 0))):
        if bool((one == diagonal(offset)).all()) and (rows > 1 or problem.causal):
            if meant is None:
                return "causal mask not asked for", _diagonal_words(offset, rows, keys), ("scores",)
            if offset == 0:
                return "top-left mask", ("the causal mask is aligned top left (row i sees keys j <= i) where bottom "
                                         f"right (j <= i + {meant}) is meant"), ("scores",)  # fmt: skip
            by = offset - meant
            if abs(by) == 1:
                more = "sees one key too many" if by > 0 else "misses the last key that it should see"
                return "diagonal off by one", f"the diagonal is off by one: each row {more}", ("scores",)
            return "diagonal shifted", f"the diagonal is shifted by {by} keys", ("scores",)
    if bool((one == (column >= row + (keys - rows if problem.causal else 0)).double()).all()):
        return "mask turned round", "the mask hides the past and shows the future", ("scores",)
    base = wanted if problem.causal else torch.ones_like(one)
    for tile in TILES:
        whole = torch.zeros_like(one)
        for start in range(0, keys, tile):
            part = slice(start, min(start + tile, keys))
            whole[:, part] = base[:, part].amax(dim=-1, keepdim=True)
        if problem.causal and bool((one == whole).all()):
            return "mask by whole tiles", (f"the causal mask is applied to whole tiles of {tile} keys only: rows see "
                                           "keys after their own"), ("scores",)  # fmt: skip
    for width in range(1, keys):
        limited = base * (column > row + (keys - rows) - width).double()
        if bool((one == limited).all()):
            return "window not asked for", f"only the last {width} keys before each row are seen", ("scores",)
    return _both_sides(one, problem)


def _diagonal_words(offset: int, rows: int, keys: int) -> str:
    how = "bottom right" if offset == keys - rows else "top left" if offset == 0 else f"with an offset of {offset}"
    return f"a causal mask, aligned {how}, is applied though none was asked for"


def _mask_and_keys(
    one: torch.Tensor, wanted: torch.Tensor, problem: Problem
) -> tuple[str, str, tuple[str, ...]] | None:
    """A shifted diagonal together with keys that no row sees: two bugs."""
    rows, keys = one.shape
    never = (one == 0).all(dim=0) & (wanted > 0).any(dim=0)
    if not problem.causal or not bool(never.any()) or bool(never.all()):
        return None
    row = torch.arange(rows, device=one.device)[:, None]
    column = torch.arange(keys, device=one.device)[None, :]
    for offset in sorted(range(-rows, keys + 1), key=lambda o: abs(o - (keys - rows))):
        mask = (column <= row + offset).double()
        if offset != keys - rows and bool((one[:, ~never] == mask[:, ~never]).all()):
            name, words, stages = _mask_name(mask, wanted, problem) or (
                "diagonal shifted",
                "the diagonal is shifted",
                (),
            )
            dropped = _keys_name(wanted.masked_fill(never, 0.0), wanted, problem)
            also = dropped[1] if dropped else f"keys {ranges(never.nonzero().flatten().tolist())} are never seen"
            return name, f"{words}; and {also}", ("scores",)
    return None


def _both_sides(one: torch.Tensor, problem: Problem) -> tuple[str, str, tuple[str, ...]] | None:
    """A window with an edge on both sides of the diagonal, which may be aligned top left too."""
    rows, keys = one.shape
    row = torch.arange(rows, device=one.device)[:, None]
    column = torch.arange(keys, device=one.device)[None, :]
    for offset, how in ((keys - rows, "bottom right"), (0, "top left")):
        beside = (column - row - offset)[one > 0]
        if not len(beside):
            return None
        left, right = int(beside.min()), int(beside.max())
        inside = ((column - row - offset >= left) & (column - row - offset <= right)).double()
        if bool((one == inside).all()) and left > -rows - offset + 1:
            words = f"only keys from {-left} before to {right} after each row are seen"
            return "window not asked for", words + ("" if rows == keys else f" (aligned {how})"), ("scores",)
    return None


def _rows_alone(one: torch.Tensor, wanted: torch.Tensor, problem: Problem) -> tuple[str, str, tuple[str, ...]] | None:
    """Some rows whose diagonal is another, where all others are right."""
    if not problem.causal:
        return None
    rows, keys = one.shape
    off = (one != wanted).any(dim=-1).nonzero().flatten()
    column = torch.arange(keys, device=one.device)[None, :]
    meant = keys - rows
    for by in sorted((n for n in range(-keys, keys + 1) if n), key=abs):
        if bool((one[off] == (column <= off[:, None] + meant + by).double()).all()):
            how = "off by one" if abs(by) == 1 else f"shifted by {by} keys"
            more = {1: ": each sees one key too many", -1: ": each misses the last key that it should see"}.get(by, "")
            name = "diagonal off by one" if abs(by) == 1 else "diagonal shifted"
            return name, f"in rows {ranges(off.tolist())} alone the diagonal is {how}{more}", ("scores",)
    return None


def _tiles_alone(one: torch.Tensor, wanted: torch.Tensor, _: Problem) -> tuple[str, str, tuple[str, ...]] | None:
    """Tiles that are seen whole, not at all, or as the first on the diagonal is, where all others are right."""
    rows, keys = one.shape
    for tile in (128, 64, 32, 16):
        if tile >= max(rows, keys):
            continue
        states: dict[str, list[tuple[int, int]]] = {"whole": [], "never": [], "local": [], "right": [], "other": []}
        for first in range(0, rows, tile):
            for start in range(0, keys, tile):
                cut = (slice(first, first + tile), slice(start, start + tile))
                mine, right = one[cut], wanted[cut]
                if bool((mine == right).all()):
                    states["right"].append((first, start))
                elif bool((mine == 1).all()):
                    states["whole"].append((first, start))
                elif bool((mine == 0).all()):
                    states["never"].append((first, start))
                elif bool((mine == torch.ones_like(mine).tril()).all()):
                    states["local"].append((first, start))
                else:
                    states["other"].append((first, start))
        wrong = {how: states[how] for how in ("whole", "never", "local") if states[how]}
        if states["other"] or not wrong or not states["right"]:
            continue
        how, places = max(wrong.items(), key=lambda item: len(item[1]))
        first, start = places[0]
        where = f"rows {first} to {min(first + tile, rows) - 1} by keys {start} to {min(start + tile, keys) - 1}"
        many = f"{len(places)} tiles of {tile} rows and {tile} keys, the first {where},"
        return {
            "whole": ("mask missing in tiles", f"the mask is not applied in {many} which the diagonal cuts"),
            "never": ("tiles skipped", f"{many} are not seen, though they should be"),
            "local": ("mask within tiles", f"{many} are masked as if they lay on the diagonal: a row and a key are "
                      "compared by their places within the tile"),
        }[how] + (("scores",),)  # fmt: skip
    return None


def _keys_name(one: torch.Tensor, wanted: torch.Tensor, problem: Problem) -> tuple[str, str, tuple[str, ...]] | None:
    """Keys that all rows miss or count again, whatever the mask is."""
    keys = one.shape[-1]
    visible = wanted > 0
    counted = torch.full((keys,), -1.0, dtype=one.dtype, device=one.device)
    for key in range(keys):
        mine = one[visible[:, key], key]
        if mine.numel() == 0:
            counted[key] = 1.0
        elif bool((mine == mine[0]).all()):
            counted[key] = mine[0]
        else:
            return None
    if bool((one[~visible] != 0).any()):
        return None
    missing = (counted == 0).nonzero().flatten().tolist()
    again = (counted > 1).nonzero().flatten().tolist()
    if again and missing:
        words = (f"keys {ranges(again)} are counted {counted[again[0]]:g} times and keys {ranges(missing)} never, as "
                 "when one page is read in place of another")  # fmt: skip
        return "a page read twice", words, ("scores", "accum")
    if again:
        return "keys counted twice", f"keys {ranges(again)} are counted {counted[again[0]]:g} times", ("scores",)
    if missing == list(range(missing[0], keys)):
        tile = next((t for t in TILES if keys % t and missing[0] == keys // t * t), None)
        if tile:
            words = (f"the last, partial page is dropped: keys {ranges(missing)} (after the last whole tile of "
                     f"{tile}) are never seen")  # fmt: skip
            return "last partial page dropped", words, ("scores",)
        if len(missing) == 1:
            return "last key dropped", f"the last key, {missing[0]}, is never seen", ("scores",)
    return "keys skipped", f"keys {ranges(missing)} are never seen", ("scores", "out")


def _pairs_words(one: torch.Tensor, wanted: torch.Tensor) -> str:
    """Which rows miss which keys, see hidden ones, or count some again."""
    said = []
    for many_rows, one_row, rest, which in (
        ("miss", "misses", "that {} should see", (one == 0) & (wanted > 0)),
        ("see", "sees", "that {} may not see", (one > 0) & (wanted == 0)),
        ("count", "counts", "more than once", (one > 1) & (wanted > 0)),
    ):
        if bool(which.any()):
            rows, keys = (which.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
            who = f"row {rows[0]} {one_row}" if len(rows) == 1 else f"rows {ranges(rows)} {many_rows}"
            what = f"key{'s' if len(keys) > 1 else ''} {ranges(keys)}"
            said.append(f"{who} {what} {rest.format('it' if len(rows) == 1 else 'they')}")
    if not said:
        row, key = (one != wanted).nonzero()[0].tolist()
        said.append(f"key {key} counts {float(one[row, key]):.3g} times in row {row}")
    return " and ".join(said)
