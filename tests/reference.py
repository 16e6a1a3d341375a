"""A slow reference implementation of the method: float64, plain loops over plain lists, written from the formulas.

Neither this module nor the package imports the other. `settings` is a mapping with the names of `AOTConfig`. Frames,
tokens and vectors are nested lists. A grid position is row * cols + col.
"""

import math


def budget(frames, positions, retention, settings):
    """Return the counts of the reduced video. The remainder is handed out token by token."""
    total = max(frames, min(frames * positions, round(retention * frames * positions)))
    clips = 1 if settings["kappa"] == 1 else min(settings["clips"], frames)
    lengths = [0] * clips
    for frame in range(frames):
        lengths[frame % clips] += 1
    twice = [settings["emit"] == "both" and length > 1 for length in lengths]
    later = frames - clips
    if total == frames * positions:
        anchors, keep, originals = [positions] * clips, [positions] * later, [0] * clips
    else:
        anchors, keep, originals = _levels(total, positions, clips, later, twice, settings["kappa"])
    keep = iter(keep)
    keep_per_frame = [0 if step == 0 else next(keep) for length in lengths for step in range(length)]
    per_frame = list(keep_per_frame)
    frame = 0
    for clip, length in enumerate(lengths):
        per_frame[frame] = anchors[clip] + originals[clip]
        frame += length
    return {
        "total": total,
        "identity": total == frames * positions,
        "clip_lengths": lengths,
        "anchors_per_clip": anchors,
        "keep_per_frame": keep_per_frame,
        "originals_per_clip": originals,
        "per_frame": per_frame,
    }


def _levels(total, positions, clips, later, twice, kappa):
    doubled = sum(twice)
    if later == 0:
        level, extra = divmod(total, clips)
        return [level + (clip < extra) for clip in range(clips)], [], [0] * clips
    level = 1
    while (
        level < positions
        and (level + 1) * clips + later <= total
        and (level + 1) <= total / (clips + doubled + later * kappa)
    ):
        level += 1
    left = total - clips * level
    doubles = 0
    while doubled and doubles < level and left - (doubles + 1) * doubled >= later:
        doubles += 1
    left -= doubled * doubles
    kept = 1
    while kept < level and left - (kept + 1) * later >= 0:
        kept += 1
    left -= kept * later

    extra = {"keep": 0, "anchors": 0, "originals": 0}
    turn = 0
    while left > 0:
        name = ("keep", "anchors", "originals")[turn % 3]
        turn += 1
        places = {"keep": later, "anchors": clips, "originals": doubled}[name]
        room = {"keep": kept < level, "anchors": level < positions, "originals": doubles < level}[name]
        if not room or not places:
            continue
        if left < places:
            extra[name], left = left, 0
            break
        left -= places
        kept, level, doubles = kept + (name == "keep"), level + (name == "anchors"), doubles + (name == "originals")
    anchors = [level + (clip < extra["anchors"]) for clip in range(clips)]
    keep = _evenly(kept * later + extra["keep"], later)
    some = iter(_evenly(doubles * doubled + extra["originals"], doubled))
    return anchors, keep, [next(some) if is_doubled else 0 for is_doubled in twice]


def _evenly(tokens, places):
    return [tokens * (place + 1) // places - tokens * place // places for place in range(places)]


def window_of(cell, side, window):
    """Return the index of the window that a cell of a side lies in. The side is cut evenly."""
    number = math.ceil(side / window)
    return max(index for index in range(number) if cell >= math.floor(index * side / number))


def select_anchors(local, glob, rows, cols, count, global_ratio, window):
    """Return the anchors of one frame, ascending."""
    windows = {}
    for cell in range(rows * cols):
        row, col = divmod(cell, cols)
        key = (window_of(row, rows, window), window_of(col, cols, window))
        windows.setdefault(key, []).append(cell)
    windows = [windows[key] for key in sorted(windows)]
    share = math.floor(count * (1 - global_ratio) / len(windows))
    chosen = []
    for cells in windows:
        chosen += sorted(cells, key=lambda cell: (-local[cell], cell))[:share]
    rest = [cell for cell in range(rows * cols) if cell not in chosen]
    rest.sort(key=lambda cell: (-glob[cell], cell))
    return sorted(chosen + rest[: count - len(chosen)])


def select_diverse_anchors(frame, count, before=(), compared=None):
    """Return the anchors of one frame in the order of their choice, each far from the others and from `before`."""
    cells = range(len(frame))
    apart = [[math.dist(frame[i][:compared], frame[j][:compared]) for j in cells] for i in cells]
    already = [min((math.dist(x[:compared], y[:compared]) for y in before), default=math.inf) for x in frame]
    chosen = []
    while len(chosen) < count:
        rest = [i for i in cells if i not in chosen]
        if chosen or before:
            chosen.append(max(rest, key=lambda i: (min([already[i], *(apart[i][j] for j in chosen)]), -i)))
        else:
            chosen.append(max(rest, key=lambda i: (sum(d * d for d in apart[i]), -i)))
    return chosen


def select_diverse_anchors_of_video(frames, count, keep, compared=None):
    """Return the diverse anchors of each frame. Its `before` is the tokens that the previous frame keeps."""
    chosen, before = [], []
    for frame, kept in zip(frames, keep, strict=True):
        chosen.append(select_diverse_anchors(frame, count, before, compared))
        before = [frame[i] for i in chosen[-1][:kept]]
    return chosen


def cosine(x, y):
    """Return the cosine similarity, 0 for a zero vector."""
    length = max(math.hypot(*x), 1e-12) * max(math.hypot(*y), 1e-12)
    return sum(a * b for a, b in zip(x, y, strict=True)) / length


def sinkhorn(costs, epsilon, iterations, tolerance):
    """Return the plans of several problems that stop together, and the iterations taken. Marginals are uniform."""
    kernels = [[[math.exp(-entry / epsilon) for entry in row] for row in cost] for cost in costs]
    rs = [[1.0] * len(kernel) for kernel in kernels]
    cs = [[1.0] * len(kernel[0]) for kernel in kernels]
    taken = 0
    while taken < iterations:
        taken += 1
        moved = 0.0
        for kernel, r, c in zip(kernels, rs, cs, strict=True):
            for i, row in enumerate(kernel):
                before = r[i]
                r[i] = 1 / len(r) / sum(k * cj for k, cj in zip(row, c, strict=True))
                moved += abs(r[i] - before)
            for j in range(len(c)):
                c[j] = 1 / len(c) / sum(row[j] * ri for row, ri in zip(kernel, r, strict=True))
        if moved / sum(len(r) for r in rs) < tolerance:
            break
    plans = [
        [[ri * k * cj for k, cj in zip(row, c, strict=True)] for row, ri in zip(kernel, r, strict=True)]
        for kernel, r, c in zip(kernels, rs, cs, strict=True)
    ]
    return plans, taken


def _place(position, rows, cols):
    row, col = divmod(position, cols)
    return row / max(1, rows - 1), col / max(1, cols - 1)


def _absorb(anchor, weights, tokens):
    mass = 1 + sum(weights)
    return [
        (value + sum(w * token[d] for w, token in zip(weights, tokens, strict=True))) / mass
        for d, value in enumerate(anchor)
    ]


def merge_within_frames(features, anchors, rows, cols, settings, compared=None):
    """Return the merged anchors of every frame, and the iterations taken. All frames stop together."""
    sources = [[p for p in range(rows * cols) if p not in chosen] for chosen in anchors]
    if not sources[0] or settings["mass"] == settings["nearest_weight"] == 0:
        return [[frame[p] for p in chosen] for frame, chosen in zip(features, anchors, strict=True)], None
    similarity = [
        [[cosine(frame[i][:compared], frame[j][:compared]) for j in chosen] for i in others]
        for frame, chosen, others in zip(features, anchors, sources, strict=True)
    ]
    costs = [
        [
            [
                1
                - similarity[t][m][n]
                + settings["spatial_weight"] * math.dist(_place(i, rows, cols), _place(j, rows, cols))
                for n, j in enumerate(anchors[t])
            ]
            for m, i in enumerate(sources[t])
        ]
        for t in range(len(features))
    ]
    plans, taken = sinkhorn(costs, settings["epsilon"], settings["iterations"], settings["tolerance"])
    merged = []
    for t, frame in enumerate(features):
        tokens = [frame[i] for i in sources[t]]
        nearest = [row.index(max(row)) for row in similarity[t]]
        merged.append([])
        for n, j in enumerate(anchors[t]):
            sent = _absorb(frame[j], [settings["mass"] * row[n] for row in plans[t]], tokens)
            mean = _absorb(frame[j], [float(at == n) for at in nearest], tokens)
            blend = settings["nearest_weight"]
            merged[t].append([(1 - blend) * a + blend * b for a, b in zip(sent, mean, strict=True)])
    return merged, taken


def merge_across_frames(tokens, clip_lengths, keep_per_frame, originals_per_clip, settings, compared=None, ranks=None):
    """Return the surviving (token, frame, slot) in output order, and the iterations of each solve."""
    survivors, taken, first = [], [], 0
    for length, originals in zip(clip_lengths, originals_per_clip, strict=True):
        key = tokens[first]
        merged, absorbed, kept = [list(y) for y in key], [0.0] * len(key), []
        for step in range(1, length):
            frame = tokens[first + step]
            if keep_per_frame[first + step] == len(frame):
                kept += [(token, first + step, i) for i, token in enumerate(frame)]
                continue
            if ranks and settings["kappa"] == 1:
                own = ranks[first + step]
                kept += [
                    (token, first + step, i) for i, token in enumerate(frame) if own[i] < keep_per_frame[first + step]
                ]
                continue
            cost = [[1 - cosine(x[:compared], y[:compared]) for y in merged] for x in frame]
            lowest = min(map(min, cost))
            discount = 1 - math.exp(-(step**2) / (2 * settings["temporal_sigma"] ** 2))
            cost = [[(entry - lowest) * discount for entry in row] for row in cost]
            (plan,), count = sinkhorn([cost], settings["epsilon"], settings["iterations"], settings["tolerance"])
            taken.append(count)
            share = [[entry / sum(row) for entry in row] for row in plan]
            of_rank = ranks[first + step] if ranks else [max(row) for row in share]
            order = sorted(range(len(frame)), key=lambda i: (of_rank[i], i))
            keep = sorted(order[: keep_per_frame[first + step]])
            kept += [(frame[i], first + step, i) for i in keep]
            for i in range(len(frame)) if settings["kappa"] == 1 else keep:
                share[i] = [0.0] * len(merged)
            weights = [[row[j] for row in share] for j in range(len(merged))]
            merged = [_absorb(y, weights[j], frame) for j, y in enumerate(merged)]
            absorbed = [a + sum(w) for a, w in zip(absorbed, weights, strict=True)]
        emitted = sorted(sorted(range(len(key)), key=lambda j: (-absorbed[j], j))[:originals])
        absorbing = [(y, first, j) for j, y in enumerate(merged)]
        if settings["emit"] == "compact":
            survivors += absorbing
        survivors += [(key[j], first, j) for j in emitted]
        survivors += kept
        if settings["emit"] == "both":
            survivors += absorbing
        first += length
    return survivors, taken


def reduce_video(features, local, glob, rows, cols, retention, settings, compared=None):
    """Return the surviving (token, frame, position) in output order. Plans use `tokens[:compared]` alone."""
    counts = budget(len(features), rows * cols, retention, settings)
    if counts["identity"]:
        return [(token, t, p) for t, frame in enumerate(features) for p, token in enumerate(frame)]
    survivors, first = [], 0
    sizes = counts["anchors_per_clip"]
    if settings["anchors"] == "diverse":
        kept = [
            counts["keep_per_frame"][sum(counts["clip_lengths"][:clip]) + step] if step else size
            for clip, size in enumerate(sizes)
            for step in range(counts["clip_lengths"][clip])
        ]
        diverse = select_diverse_anchors_of_video(features, max(sizes), kept, compared)
    for size in sorted(set(sizes), reverse=True):
        clips = [clip for clip, count in enumerate(sizes) if count == size]
        lengths = [counts["clip_lengths"][clip] for clip in clips]
        frames = range(first, first + sum(lengths))
        keep = [counts["keep_per_frame"][t] for t in frames]
        ranks = None
        if settings["anchors"] == "diverse":
            orders = [order[:size] for order in diverse[first : first + len(frames)]]
            anchors = [sorted(order) for order in orders]
            ranks = [[order.index(p) for p in sorted(order)] for order in orders]
        else:
            ratio, window = settings["global_ratio"], settings["window"]
            anchors = [select_anchors(local[t], glob[t], rows, cols, size, ratio, window) for t in frames]
            if settings["kappa"] == 1:
                ranks = []
                for t, chosen in zip(frames, anchors, strict=True):
                    best_first = sorted(range(size), key=lambda slot: (-glob[t][chosen[slot]], slot))
                    ranks.append([best_first.index(slot) for slot in range(size)])
        merged, _ = merge_within_frames([features[t] for t in frames], anchors, rows, cols, settings, compared)
        tokens, _ = merge_across_frames(
            merged,
            lengths,
            keep,
            [counts["originals_per_clip"][clip] for clip in clips],
            settings,
            compared,
            ranks,
        )
        survivors += [(token, first + t, anchors[t][slot]) for token, t, slot in tokens]
        first += len(frames)
    return survivors
