"""Name what was read: a table of heads, a matrix of counts, a factor of the scores, in the words of a bug."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore.bisection.diagnosis.behaviour import mask_of
from flashcore.problem import Problem

TILES = (64, 128, 32, 16, 256, 96, 80, 48, 112, 160, 176, 192, 8)
"""Numbers of keys or queries that kernels take at once, the usual ones first."""

ANCHORS_EVERY = 16
"""Keys that a slope is read from together."""


@dataclass(frozen=True)
class Hypothesis:
    """A bug that would explain what was seen."""

    name: str
    """A few words, the same for the same kind of bug."""
    sentence: str
    """What the function does, and what it should do."""
    stages: tuple[str, ...]
    """Where it happens; several where no output can tell them apart."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of a `Behaviour`."""
    place: dict[str, Any] = field(default_factory=dict)
    """Where it shows: head, row, keys."""
    by_rounding: bool = False
    """It is a bug of precision: no model predicts its errors to the element."""
    of_calls: bool = False
    """It depends on what was called before: no model predicts one call alone."""


# --- which head is read ----------------------------------------------------------------------------------------------


def of_heads(what: str, table: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for the heads of Q, K or V that are read, from ``int64 [B*Hq]``; None where they are the right ones."""
    per_batch = problem.num_heads_q if what == "Q" else problem.num_heads_kv
    read = table.tolist()
    wanted = right_heads(what, problem)
    wrong = [n for n, (a, b) in enumerate(zip(read, wanted, strict=True)) if a != b]
    if not wrong:
        return None
    field_name = {"Q": "q_heads", "K": "k_heads", "V": "v_heads"}[what]
    stages = ("accum",) if what == "V" else ("scores",)
    first = wrong[0]
    at = {"batch": first // problem.num_heads_q, "head": first % problem.num_heads_q}
    got = f"{what} of batch {read[first] // per_batch}, head {read[first] % per_batch}"
    meant = f"batch {wanted[first] // per_batch}, head {wanted[first] % per_batch}"
    rule = _rule(read, per_batch, problem, what)
    name = rule[0] if rule else f"{what} of another head"
    why = f": {rule[1]}" if rule else ""
    return Hypothesis(
        name, f"query head {at['head']} of batch {at['batch']} reads {got} where {meant} is meant{why}",
        stages, {field_name: table}, at,
    )  # fmt: skip


def right_heads(what: str, problem: Problem) -> list[int]:
    """The flat head of Q, K or V that belongs to each flat query head."""
    group = problem.num_heads_q // problem.num_heads_kv
    if what == "Q":
        return list(range(problem.batch * problem.num_heads_q))
    return [b * problem.num_heads_kv + h // group for b in range(problem.batch) for h in range(problem.num_heads_q)]


def _rule(read: list[int], per_batch: int, problem: Problem, what: str) -> tuple[str, str] | None:
    group = 1 if what == "Q" else problem.num_heads_q // problem.num_heads_kv
    batches, heads_q = problem.batch, problem.num_heads_q
    heads = {
        "": lambda h: h // group,
        "heads are mapped by remainder (h % num_heads_kv) instead of by group": lambda h: h % per_batch,
        "head 0 is taken for all heads": lambda h: 0,
        "heads are counted backwards": lambda h: per_batch - 1 - h // group,
    }
    for shift in range(1, per_batch):
        heads[f"heads are shifted by {shift}"] = lambda h, s=shift: (h // group + s) % per_batch
        heads[f"heads are shifted by {shift} and end at the last one"] = lambda h, s=shift: min(
            h // group + s, per_batch - 1
        )
    of_batch = {
        "": lambda b: b,
        "batch 0 is taken for all batches": lambda b: 0,
        "batches are counted backwards": lambda b: batches - 1 - b,
        "the batch is doubled": lambda b: 2 * b % batches,
    }
    for shift in range(1, batches):
        of_batch[f"batches are shifted by {shift}"] = lambda b, s=shift: (b + s) % batches
    for head_words, of_head in heads.items():
        for batch_words, b_of in of_batch.items():
            made = [b_of(b) * per_batch + of_head(h) for b in range(batches) for h in range(heads_q)]
            if made == read:
                words = " and ".join(w for w in (head_words, batch_words) if w)
                kind = "another head" if head_words else "another batch"
                return f"{what} of {kind}", words
    return None


def of_output(marks: dict[str, torch.Tensor | None], problem: Problem) -> Hypothesis | None:
    """A name for results that stand at another head than their own: Q, K and V all come from the same other head."""
    if any(table is None for table in marks.values()):
        return None
    to = marks["Q"].tolist()
    own = right_heads("K", problem)
    if to == list(range(len(to))) or any(marks[what].tolist() != [own[h] for h in to] for what in "KV"):
        return None
    first = next(n for n, h in enumerate(to) if n != h)
    per_batch = problem.num_heads_q
    rule = _rule(to, per_batch, problem, "Q")
    why = f": {rule[1]}" if rule else ""
    at = {"batch": first // per_batch, "head": first % per_batch}
    return Hypothesis(
        "result of another head", f"the result of batch {to[first] // per_batch}, head {to[first] % per_batch} stands "
        f"at batch {at['batch']}, head {at['head']}{why}", ("out",),
        {"q_heads": marks["Q"], "k_heads": marks["K"], "v_heads": marks["V"]}, at,
    )  # fmt: skip


# --- which keys are counted ------------------------------------------------------------------------------------------


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
    place = {
        "batch": heads[0] // problem.num_heads_q,
        "head": heads[0] % problem.num_heads_q,
        "row": row,
        "column": key,
    }
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
            also = dropped[1] if dropped else f"keys {_ranges(never.nonzero().flatten().tolist())} are never seen"
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
            return name, f"in rows {_ranges(off.tolist())} alone the diagonal is {how}{more}", ("scores",)
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
            who = f"row {rows[0]} {one_row}" if len(rows) == 1 else f"rows {_ranges(rows)} {many_rows}"
            what = f"key{'s' if len(keys) > 1 else ''} {_ranges(keys)}"
            said.append(f"{who} {what} {rest.format('it' if len(rows) == 1 else 'they')}")
    if not said:
        row, key = (one != wanted).nonzero()[0].tolist()
        said.append(f"key {key} counts {float(one[row, key]):.3g} times in row {row}")
    return " and ".join(said)


def _diagonal_words(offset: int, rows: int, keys: int) -> str:
    how = "bottom right" if offset == keys - rows else "top left" if offset == 0 else f"with an offset of {offset}"
    return f"a causal mask, aligned {how}, is applied though none was asked for"


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
        words = (f"keys {_ranges(again)} are counted {counted[again[0]]:g} times and keys {_ranges(missing)} never, as "
                 "when one page is read in place of another")  # fmt: skip
        return "a page read twice", words, ("scores", "accum")
    if again:
        return "keys counted twice", f"keys {_ranges(again)} are counted {counted[again[0]]:g} times", ("scores",)
    if missing == list(range(missing[0], keys)):
        tile = next((t for t in TILES if keys % t and missing[0] == keys // t * t), None)
        if tile:
            words = (f"the last, partial page is dropped: keys {_ranges(missing)} (after the last whole tile of "
                     f"{tile}) are never seen")  # fmt: skip
            return "last partial page dropped", words, ("scores",)
        if len(missing) == 1:
            return "last key dropped", f"the last key, {missing[0]}, is never seen", ("scores",)
    return "keys skipped", f"keys {_ranges(missing)} are never seen", ("scores", "out")


def _ranges(keys: list[int]) -> str:
    """``0 to 63 and 128`` of a sorted list."""
    parts: list[tuple[int, int]] = []
    for key in keys:
        if parts and key == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], key)
        else:
            parts.append((key, key))
    words = [str(a) if a == b else f"{a} to {b}" for a, b in parts[:4]]
    if len(parts) > 4:
        words.append(f"{len(parts) - 4} more ranges")
    return " and ".join(words)


def of_values_gone(counts: torch.Tensor, extra: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for keys that count in row_sum, and whose V does not arrive: as many are missing as are there too many."""
    wanted = mask_of(problem, counts.device)
    gone = (counts == 0).all(dim=0).all(dim=0) & (wanted > 0).any(dim=0)
    right = torch.where(gone, 0.0, wanted)
    if not bool(gone.any()) or bool(gone.all()) or not bool((counts == right).all()):
        return None
    many = (wanted * gone).sum(dim=-1)
    if bool(((extra - many).abs() > 0.2 + 0.02 * many)[wanted.sum(dim=-1) > many].any()):
        return None
    place = torch.arange(len(gone), device=gone.device)
    return of_order(torch.where(gone, -1, place), problem, "V")


def of_extra(extra: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for weight that went to no key, float64 ``[Sq]`` in units of one key."""
    rows = (extra.abs() > 0).nonzero().flatten().tolist()
    if not rows:
        return None
    amount = float(extra[rows].median())
    if not math.isfinite(amount):
        return None
    whole = round(amount)
    if whole > 0 and abs(amount - whole) < 0.2:
        tile = next((t for t in TILES if -(-problem.seqlen_k // t) * t - problem.seqlen_k == whole), None)
        many = f"{whole} key{'s' if whole > 1 else ''} that {'do' if whole > 1 else 'does'} not exist"
        if tile:
            return Hypothesis("last partial page taken as whole", f"the last, partial page is taken as whole: {many} "
                              f"{'are' if whole > 1 else 'is'} counted (tiles of {tile})", ("scores", "row_sum"),
                              {"extra": extra.clamp_min(0)}, {"row": rows[0]})  # fmt: skip
        return Hypothesis("keys that do not exist", f"{many} {'are' if whole > 1 else 'is'} counted",
                          ("scores", "row_sum"), {"extra": extra.clamp_min(0)}, {"row": rows[0]})  # fmt: skip
    return None


# --- what the scores are multiplied by -------------------------------------------------------------------------------


def of_factor(factor: float, problem: Problem) -> Hypothesis | None:
    """A name for what the scores are multiplied by besides the right scale; None where that is nothing."""
    fine = 0.004 if problem.dtype == "bfloat16" else 0.001  # what the rounding of weights leaves to be told
    if not math.isfinite(factor) or abs(factor - 1.0) < fine:
        return None
    if abs(factor) < 1e-3:
        return Hypothesis("scores without influence", "Q and K have no influence: all keys of a row weigh the same",
                          ("scores",), {"scale_factor": 0.0})  # fmt: skip
    scale, width = problem.scale, problem.head_dim
    default = 1 / math.sqrt(width)
    known: dict[str, tuple[float, str, str]] = {
        "scale missing": (1 / scale, "the scale is missing: scores are q k", "scale missing"),
        "scale twice": (scale, "the scale is applied twice", "scale twice"),
        "base 2": (math.log(2), "exp2 stands where exp is meant (or log2(e) is missing)", "base 2 for e"),
        "log2e": (1 / math.log(2), "log2(e) is applied twice, or exp stands where exp2 is meant", "log2(e) twice"),
        "1/D": (1 / width / scale, "the scale is 1/head_dim where 1/sqrt(head_dim) is meant", "scale without the root"),
        "root": (math.sqrt(default) / scale, "the root of the scale is taken for the scale", "root of the scale"),
        "negative": (-1.0, "the sign of the scores is turned round", "scores negated"),
        "absolute": (abs(scale) / scale, "the sign of the scale is lost", "sign of the scale lost"),
    }
    if problem.softmax_scale is not None:
        known["default"] = (
            default / scale,
            "softmax_scale is ignored: 1/sqrt(head_dim) is used",
            "softmax_scale ignored",
        )
    for other in (8, 16, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 1024):
        if other != width:
            words = f"the scale is that of head_dim {other}: 1/sqrt({other})"
            known[f"D{other}"] = (1 / math.sqrt(other) / scale, words, "scale of another head_dim")
    for count, words in ((problem.num_heads_q, "num_heads"), (problem.seqlen_k, "seqlen"),
                         (problem.num_heads_q * width, "num_heads * head_dim")):  # fmt: skip
        known[words] = (1 / math.sqrt(count) / scale, f"the scale is 1/sqrt({words}) where 1/sqrt(head_dim) is meant",
                        "scale of another size")  # fmt: skip
    name, sentence = "scale wrong", f"the scores are {factor:.4g} times what they should be"
    rounded = float(torch.tensor(scale, dtype=torch.bfloat16))
    both = float(torch.tensor(scale / math.log(2), dtype=torch.bfloat16)) * math.log(2)
    for value, words in ((1.44 * math.log(2), "log2(e) is taken for 1.44"), (both / scale, "the scale times log2(e) is "
                         "rounded to bfloat16"), (rounded / scale, "the scale is rounded to bfloat16")):  # fmt: skip
        if abs(value - 1) > fine and abs(factor / value - 1) < 4e-4:
            words = f"{words} (scores are {factor:.4g} times the right ones)"
            return Hypothesis("a constant in few digits", words, ("scores", "probs"), {"scale_factor": value})
    for value, words, kind in known.values():
        if abs(value - 1.0) > 0.004 and abs(factor / value - 1.0) < 0.004:
            name, sentence = kind, f"{words} (scores are {factor:.4g} times the right ones)"
            factor = value
            break
    stages = ("scores", "probs", "rescale") if name in ("base 2 for e", "log2(e) twice") else ("scores",)
    return Hypothesis(name, sentence, stages, {"scale_factor": factor})


def of_metric(metric: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for scores that are ``q A k`` with an A that is no multiple of the identity; None where A is one."""
    scale = problem.scale
    part = (metric / scale).cpu()
    width = part.shape[0]
    diagonal = part.diagonal()
    off = part - torch.diag(diagonal)
    noise = 0.2
    if float(off.abs().max()) < noise:
        if float((diagonal - diagonal.mean()).abs().max()) < noise:
            return None
        small = (diagonal.abs() < noise).nonzero().flatten()
        kept = (diagonal.abs() >= noise).nonzero().flatten()
        if len(small) and len(kept):
            words = f"columns {_ranges(small.tolist())} of head_dim are left out of the products"
            name = "part of head_dim left out"
        else:
            words, name = (
                "the columns of head_dim are weighted unevenly in the products",
                "columns of head_dim weighted",
            )
        return Hypothesis(name, words, ("scores",), {"metric": metric})
    to = part.abs().argmax(dim=0)
    strength = part.abs().amax(dim=0)
    if bool((strength > 0.5).all()) and len(set(to.tolist())) == width:
        moved = int((to != torch.arange(width)).sum())
        words = (f"{moved} columns of K are multiplied with other columns of Q: another order within head_dim (a "
                 "swizzle)")  # fmt: skip
        return Hypothesis("columns of head_dim in another order", words, ("scores",), {"metric": metric})
    return Hypothesis("columns of head_dim mixed", "columns of Q are multiplied with other columns of K", ("scores",),
                      {"metric": metric})  # fmt: skip


def of_rows(q_rows: torch.Tensor) -> Hypothesis | None:
    """A name for rows that are computed from another row of Q, from ``int64 [Sq]``; None where all are their own."""
    place = torch.arange(len(q_rows), device=q_rows.device)
    moved = (q_rows != place).nonzero().flatten().tolist()
    if not moved:
        return None
    distances = (q_rows - place)[moved].unique().tolist()
    if len(set(q_rows.tolist())) == 1:
        words = f"every row has the result of row {int(q_rows[0])}"
    elif len(distances) == 1 or (len(distances) == 2 and max(distances) - min(distances) == len(q_rows)):
        by = min(distances, key=abs)
        words = f"rows {_ranges(moved)} are computed from the row of Q {abs(by)} {'before' if by < 0 else 'after'} them"
    else:
        words = f"rows {_ranges(moved)} are computed from other rows of Q, the first from row {int(q_rows[moved[0]])}"
    return Hypothesis("Q of another row", words, ("scores", "out"), {"q_rows": q_rows}, {"row": moved[0]})


# --- which column of V stands in each column of the output ------------------------------------------------------------


def of_columns(got: torch.Tensor, row: torch.Tensor, seen: torch.Tensor, problem: Problem) -> list[Hypothesis]:
    """Names for an output that is not the one row that all V are, from `read_columns`; none where it is.

    Parameters
    ----------
    seen
        bool ``[Sq]``: the rows that see a key.
    """
    slack = 4.0 * torch.finfo(getattr(torch, problem.dtype)).eps
    if bool(((got[:, seen] / row - 1).abs() <= slack).all()) or not bool(got[:, seen].isfinite().all()):
        return []
    found = []
    empty = (got == 0).all(dim=-1) & seen
    if bool(empty[:, seen].all()):
        return []
    if bool(empty.any()):
        found.append(_zeroed(empty, seen, problem))
    full = got[~empty & seen]
    middle = full.median(dim=0).values
    if bool(((full - middle).abs() > 2 * slack * middle.abs().clamp_min(float(row[0]))).any()):
        return found  # rows differ: it is their weights that do not add up to 1
    factor = float((middle / row).median())
    if factor and bool(((middle / row / factor - 1).abs() <= slack).all()):
        if abs(factor - 1) > slack:
            words = f"the output is {factor:.4g} times what it should be, whatever Q, K and V are"
            stages = ("out", "accum", "row_sum")
            found.append(Hypothesis("output multiplied", words, stages, {"out_factor": factor}))
        return found
    source = (middle.round() - 1).long()
    if bool(((middle - middle.round()).abs() > slack * row).any()) or bool((source < -1).any()):
        return found
    if bool((source >= len(row)).any()):
        return found
    return [*found, _moved_columns(source)]


def of_nothing(got: torch.Tensor, problem: Problem) -> Hypothesis | None:
    """A name for an output that is not 0 though V is, float64 ``[N, Sq, D]``; None where it is."""
    places = (got != 0).nonzero()
    if not len(places) or not bool(got.isfinite().all()):
        return None
    head, row, column = places[0].tolist()
    at = {"batch": head // problem.num_heads_q, "head": head % problem.num_heads_q, "row": row, "column": column}
    many = "1 element of the output is" if len(places) == 1 else f"{len(places):,} elements of the output are"
    words = (f"{many} not 0 though V is: {float(got[head, row, column]):.3g} stands at batch {at['batch']}, head "
             f"{at['head']}, row {row}, column {column}")  # fmt: skip
    return Hypothesis("a number added to the output", words, ("out", "accum"), {"added": got}, at)


def _zeroed(empty: torch.Tensor, seen: torch.Tensor, problem: Problem) -> Hypothesis:
    heads = empty[:, seen].all(dim=-1).nonzero().flatten().tolist()
    rows = (empty[:, seen].any(dim=0)).nonzero().flatten().tolist()
    rows = seen.nonzero().flatten()[rows].tolist()
    first = empty.nonzero()[0].tolist()
    at = {"batch": first[0] // problem.num_heads_q, "head": first[0] % problem.num_heads_q, "row": first[1]}
    if heads and int(empty.sum()) == len(heads) * int(seen.sum()):
        words = (f"the results of {len(heads)} of {empty.shape[0]} heads are 0, the first of batch {at['batch']}, head "
                 f"{at['head']}")  # fmt: skip
        return Hypothesis("heads left 0", words, ("out", "scores"), {"zeroed": empty}, at)
    return Hypothesis(
        "rows left 0", f"rows {_ranges(rows)} of the output are 0", ("out", "scores"), {"zeroed": empty}, at
    )


def _moved_columns(source: torch.Tensor) -> Hypothesis:
    place = torch.arange(len(source), device=source.device)
    gone = (source < 0).nonzero().flatten().tolist()
    moved = ((source != place) & (source >= 0)).nonzero().flatten().tolist()
    if gone and not moved:
        return Hypothesis("columns left 0", f"columns {_ranges(gone)} of the output are 0", ("out", "accum"),
                          {"columns": source}, {"column": gone[0]})  # fmt: skip
    first = moved[0]
    words = (f"columns {_ranges(moved)} of the output hold other columns of V: column {first} holds column "
             f"{int(source[first])}")  # fmt: skip
    return Hypothesis("columns of V in another order", words, ("accum", "out"), {"columns": source}, {"column": first})


# --- scores that are multiplied in places, or bent --------------------------------------------------------------------


def of_slopes(by: dict[str, torch.Tensor], problem: Problem) -> Iterator[Hypothesis]:
    """Names for scores that are multiplied by another number in some heads, rows or keys, from `reading.slopes`."""
    for axis, values in by.items():
        values = values.cpu()
        known = values.isfinite()
        if int(known.sum()) < 2 or float(values[known].max() - values[known].min()) < 0.02:
            continue
        values = torch.where(known, values, 1.0)
        values = torch.where((values - 1).abs() < 0.02, 1.0, values)
        off = (values != 1).nonzero().flatten().tolist()
        usual = values[off].median()
        values = torch.where((values / usual - 1).abs() < 0.04, usual, values)
        one = bool((values[off] == usual).all())
        if axis == "keys":
            per_key = values.repeat_interleave(ANCHORS_EVERY)[: problem.seqlen_k]
            off, factors = (per_key != 1).nonzero().flatten().tolist(), per_key
            what = f"keys {_ranges(off)}"
        elif axis == "rows":
            factors, what = values[:, None], f"rows {_ranges(off)}"
        else:
            factors = values[:, None, None]
            first = divmod(off[0], problem.num_heads_q)
            what = f"{len(off)} of {len(values)} heads (the first: batch {first[0]}, head {first[1]})"
        known_as = of_factor(float(usual), problem) if one else None
        why = f": {known_as.sentence}" if known_as and known_as.name != "scale wrong" else ""
        how = f"{float(usual):.4g} times" if one else "by other factors than"
        place = {"keys": "column", "rows": "row"}.get(axis)
        at = {place: off[0]} if place else dict(zip(("batch", "head"), first, strict=True))
        yield Hypothesis(f"scale of some {axis}", f"the scores of {what} are {how} the right ones{why}", ("scores",),
                         {"factors": factors.double()}, at)  # fmt: skip


def of_ladder(read: list[tuple[torch.Tensor, torch.Tensor]]) -> Hypothesis | None:
    """A name for scores that are bent, from the differences between scores; None for straight ones.

    Parameters
    ----------
    read
        For some ladders of scores ``[L]``, float64: those scores, and what they are less the last of them; NaN where a
        weight was too small to be read.
    """

    def offs(of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.cat([got - (of(at) - of(at[-1])) for at, got in read])

    def fits(of: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        allowed = torch.cat([0.05 + 0.02 * (of(at) - of(at[-1])).abs() for at, _ in read])
        off = offs(of).abs()
        return bool(((off <= allowed) | off.isnan()).all())

    if fits(lambda x: x):
        return None
    if fits(torch.abs):
        return Hypothesis("sign of the scores lost", "scores lose their sign: a score of -5 counts like one of 5",
                          ("scores",), {"bend": ("abs", 0.0)})  # fmt: skip
    grid = torch.logspace(-0.5, 2.3, 141, base=10.0, dtype=torch.float64).tolist()
    kinds: dict[str, Callable[[float], Callable[[torch.Tensor], torch.Tensor]]] = {
        "tanh": lambda c: lambda x: c * torch.tanh(x / c),
        "clip above": lambda c: lambda x: x.clamp(max=c),
        "clip": lambda c: lambda x: x.clamp(-c, c),
    }
    for kind, of in kinds.items():
        miss = lambda c, of=of: float(offs(of(c)).nan_to_num(0.0).square().sum())  # noqa: E731
        coarse = min(grid, key=miss)
        best = min(torch.linspace(0.95 * coarse, 1.05 * coarse, 81, dtype=torch.float64).tolist(), key=miss)
        best = best if not fits(of(float(round(best)))) else float(round(best))
        if not fits(of(best)):
            continue
        words = {"tanh": f"a softcap that nobody asked for: scores become {best:.3g} tanh(score / {best:.3g})",
                 "clip": f"scores are cut off at -{best:.3g} and {best:.3g}",
                 "clip above": f"scores are cut off above {best:.3g}"}[kind]  # fmt: skip
        name = "softcap not asked for" if kind == "tanh" else "scores cut off"
        return Hypothesis(name, words, ("scores",), {"bend": (kind, best)})
    return None


def of_bias(bias: torch.Tensor, problem: Problem) -> Hypothesis:
    """A name for what is added to the scores, float64 ``[N, Sq, Sk]``, -inf where a key is not counted.

    What is added to all scores of a row changes nothing, so it counts beside the usual number of its row.
    """
    bias = bias - bias.masked_fill(bias == -math.inf, math.nan).nanmedian(dim=-1, keepdim=True).values.nan_to_num(0.0)
    changes = {"bias": bias}
    slopes = [_slope_of(one) for one in bias]
    if all(slope is not None and slope != 0 for slope in slopes):
        even = max(slopes) - min(slopes) < 0.02 * abs(slopes[0])
        words = f"{slopes[0]:.3g}" if even else f"{slopes[0]:.3g} in the first head, {slopes[-1]:.3g} in the last"
        words = f"a bias that nobody asked for is added to the scores: {words} for each key of distance, as ALiBi does"
        return Hypothesis("bias by distance", words, ("scores",), changes)
    off = (bias.abs() > 0.02) & bias.isfinite()
    if not bool(off.any()):
        return Hypothesis("scores shifted", "numbers are added to the scores", ("scores", "probs"), changes)
    head, row, key = off.nonzero()[0].tolist()
    at = {"batch": head // problem.num_heads_q, "head": head % problem.num_heads_q, "row": row, "column": key}
    many = int(off.sum())
    words = (f"{float(bias[head, row, key]):.3g} is added to the score of key {key} in row {row} of batch "
             f"{at['batch']}, head {at['head']}")  # fmt: skip
    if many > 1:
        words += f", and something to {many - 1:,} more"
    return Hypothesis("scores shifted", words, ("scores", "probs"), changes, at)


def _slope_of(bias: torch.Tensor) -> float | None:
    """What a bias of one head, ``[Sq, Sk]``, falls by for each key of distance; None where it is not straight."""
    rows, keys = bias.shape
    row = torch.arange(rows, device=bias.device)[:, None] + (keys - rows)
    far = (row - torch.arange(keys, device=bias.device)[None, :]).abs().double()
    known = bias.isfinite()
    levels = [t - (t * known).nan_to_num(0.0).sum(dim=-1, keepdim=True) / known.sum(dim=-1, keepdim=True).clamp_min(1)
              for t in (bias.masked_fill(~known, 0.0), far)]  # fmt: skip
    steps, far = (level[known] for level in levels)
    slope = float((steps * far).sum() / (far * far).sum().clamp_min(1e-12))
    straight = (steps - slope * far).abs() <= 0.03 + 0.02 * abs(slope) * far.abs()
    return (slope if abs(slope) > 1e-4 else 0.0) if bool(straight.all()) else None


# --- which key's K or V stands at each place -------------------------------------------------------------------------


def of_order(k_of: torch.Tensor, problem: Problem, what: str) -> Hypothesis:
    """A name for K or V rows that stand at other places than their own, from ``int64 [Sk]``."""
    place = torch.arange(len(k_of), device=k_of.device)
    moved = (k_of != place).nonzero().flatten().tolist()
    sources = k_of[moved].tolist()
    distances = {s - m for s, m in zip(sources, moved, strict=True)}
    whole = sorted(set(sources)) == sorted(moved)
    field_name = "k_of" if what == "K" else "v_of"
    stages = ("scores",) if what == "K" else ("accum",)
    first = {"column": moved[0]}
    gone = [m for m, s in zip(moved, sources, strict=True) if s < 0]
    if gone and len(gone) == len(moved):
        return Hypothesis(f"{what} of a page missing", f"{what} of keys {_ranges(gone)} is taken as zeros", stages,
                          {field_name: k_of}, first)  # fmt: skip
    if whole and len(distances) == 2 and sum(distances) == 0:
        words = f"keys {_ranges(moved)} are swapped, {max(distances)} places apart, in K or in V"
        return Hypothesis("pages swapped", words, ("scores", "accum"), {field_name: k_of}, first)
    if whole:
        return Hypothesis("keys in another order", f"{len(moved)} keys of K are paired with the V of others",
                          ("scores", "accum"), {field_name: k_of}, first)  # fmt: skip
    if len(distances) == 1:
        by = distances.pop()
        return Hypothesis(f"{what} of another page", f"{what} of keys {_ranges(moved)} is that of the keys {abs(by)} "
                          f"places {'before' if by < 0 else 'after'}", stages, {field_name: k_of}, first)  # fmt: skip
    return Hypothesis(f"{what} of other keys", f"{what} of keys {_ranges(moved)} is that of other keys", stages,
                      {field_name: k_of}, first)  # fmt: skip
