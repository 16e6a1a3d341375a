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


def scaled(frame, distance):
    """Return tokens by direction, or with those of extreme length as long as the median of the frame."""
    lengths = [math.hypot(*token) for token in frame]
    if distance == "cosine":
        return [[value / length if length else 0.0 for value in t] for t, length in zip(frame, lengths, strict=True)]
    some = sorted(length for length in lengths if length)
    median = some[(len(some) - 1) // 2] if some else 1.0
    factors = [median / length if length > 4 * median else 1.0 for length in lengths]
    return [[value * factor for value in token] for token, factor in zip(frame, factors, strict=True)]


def spread_out(frame, near, count, weights=None):
    """Return `count` positions, each farthest from the others and from what is remembered; `near` are distances."""
    cells = range(len(frame))
    weights = weights or [1.0] * len(frame)
    apart = [[math.dist(frame[i], frame[j]) for j in cells] for i in cells]
    chosen = []
    while len(chosen) < count:
        rest = [i for i in cells if i not in chosen]
        if chosen or near:
            least = {i: min([near[i] if near else math.inf, *(apart[i][j] for j in chosen)]) for i in rest}
            chosen.append(max(rest, key=lambda i: (weights[i] * least[i] ** 2, -i)))
        else:
            chosen.append(max(rest, key=lambda i: (weights[i] * sum(d * d for d in apart[i]), -i)))
    return chosen


def cover(frame, near, count, candidates=None):
    """Return `count` positions, each of which leaves the least sum of squared distances to the nearest position.

    The own gap of the chosen token counts a thousandth more.
    """
    cells = range(len(frame))
    near = near or [math.inf] * len(frame)
    chosen = []
    while len(chosen) < count:
        rest = [j for j in candidates or cells if j not in chosen]
        left = {
            j: sum(min(near[i], *(math.dist(frame[i], frame[k]) for k in (*chosen, j)), math.inf) ** 2 for i in cells)
            for j in rest
        }
        if chosen or near[0] < math.inf:
            own = {j: min([near[j], *(math.dist(frame[j], frame[k]) for k in chosen)]) ** 2 for j in rest}
            left = {j: left[j] - own[j] / 1024 for j in rest}
        chosen.append(min(rest, key=lambda j: (left[j], j)))
    return chosen


def select_of_video(frames, count, keep, choose, distance="euclidean", memory="previous", compared=None):
    """Return the choice of each frame: `choose(index, frame, near)`, where `near` is the distance to what is kept."""
    frames = [scaled([token[:compared] for token in frame], distance) for frame in frames]
    orders, kept, carried = [], [], None
    for index, (frame, keeps) in enumerate(zip(frames, keep, strict=True)):
        remembered = kept if memory == "all" else kept[-keep[index - 1] :] if index and keep[index - 1] else []
        near = [min((math.dist(x, y) for y in remembered), default=math.inf) for x in frame]
        if memory == "carried" and carried:
            changed = [math.dist(x, y) for x, y in zip(frame, frames[index - 1], strict=True)]
            near = [min(one, before + more) for one, before, more in zip(near, carried, changed, strict=True)]
        if min(near) == math.inf:
            near = None
        order = choose(index, frame, near)
        assert len(order) == count
        orders.append(order)
        here = [frame[i] for i in order[:keeps]]
        kept += here
        carried = [min([near[i] if near else math.inf, *(math.dist(x, y) for y in here)]) for i, x in enumerate(frame)]
        if min(carried) == math.inf:
            carried = None
    return orders


def select_diverse_anchors_of_video(frames, count, keep, compared=None, weights=None, **options):
    """Return the anchors of each frame, far from each other and from those that are remembered."""

    def choose(index, frame, near):
        return spread_out(frame, near, count, weights[index] if weights else None)

    return select_of_video(frames, count, keep, choose, compared=compared, **options)


def select_covering_anchors_of_video(frames, count, keep, compared=None, candidates=None, **options):
    """Return the anchors of each frame that cover it."""

    def choose(index, frame, near):
        return cover(frame, near, count, candidates)

    return select_of_video(frames, count, keep, choose, compared=compared, **options)


def attention_weights(scores, without_sinks):
    """Return how much each token's attention counts: (frames, positions)."""
    medians = [sorted(frame)[(len(frame) - 1) // 2] for frame in scores]
    counted = [[value / median for value in frame] for frame, median in zip(scores, medians, strict=True)]
    weights = []
    for t, frame in enumerate(counted):
        others = [counted[u] for u in range(len(counted)) if u != t]
        persists = [sum(o[i] for o in others) / max(1, len(others)) for i in range(len(frame))]
        weights.append([a / max(1, sink) if without_sinks else a for a, sink in zip(frame, persists, strict=True)])
    return [[max(1e-3, value) for value in frame] for frame in weights]


def relevance(frames):
    """Return the cosine of each token and the mean direction of its segment, at least 0.001."""
    means = [[sum(column) for column in zip(*scaled(frame, "cosine"), strict=True)] for frame in frames]
    segments = [[0]]
    for t in range(1, len(frames)):
        if cosine(means[t], means[t - 1]) < 0.9:
            segments.append([])
        segments[-1].append(t)
    weights = []
    for segment in segments:
        mean = [sum(column) for column in zip(*(means[t] for t in segment), strict=True)]
        weights += [[max(1e-3, cosine(token, mean)) for token in frames[t]] for t in segment]
    return weights


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


def _greedy_orders(features, scores, count, kept, settings, compared):
    options = {"compared": compared, "distance": settings["distance"], "memory": settings["memory"]}
    if settings["anchors"] == "coverage":
        return select_covering_anchors_of_video(features, count, kept, **options)
    weights = [[1.0] * len(frame) for frame in features]
    if settings["anchors"] == "calibrated":
        factors = []
        if settings["by_attention"]:
            factors.append(attention_weights(scores, settings["without_sinks"]))
        if settings["by_relevance"]:
            factors.append(relevance([[token[:compared] for token in frame] for frame in features]))
        for factor in factors:
            weights = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(weights, factor, strict=True)]
    return select_diverse_anchors_of_video(features, count, kept, weights=weights, **options)


def reduce_video(features, local, glob, rows, cols, retention, settings, compared=None):
    """Return the surviving (token, frame, position) in output order. Plans use `tokens[:compared]` alone."""
    counts = budget(len(features), rows * cols, retention, settings)
    if counts["identity"]:
        return [(token, t, p) for t, frame in enumerate(features) for p, token in enumerate(frame)]
    survivors, first = [], 0
    sizes = counts["anchors_per_clip"]
    greedy = settings["anchors"] != "attention"
    if not greedy and settings["without_sinks"]:
        local, glob = attention_weights(local, True), attention_weights(glob, True)
    if greedy:
        kept = [
            counts["keep_per_frame"][sum(counts["clip_lengths"][:clip]) + step] if step else size
            for clip, size in enumerate(sizes)
            for step in range(counts["clip_lengths"][clip])
        ]
        chosen_orders = _greedy_orders(features, glob, max(sizes), kept, settings, compared)
    for size in sorted(set(sizes), reverse=True):
        clips = [clip for clip, count in enumerate(sizes) if count == size]
        lengths = [counts["clip_lengths"][clip] for clip in clips]
        frames = range(first, first + sum(lengths))
        keep = [counts["keep_per_frame"][t] for t in frames]
        ranks = None
        if greedy:
            orders = [order[:size] for order in chosen_orders[first : first + len(frames)]]
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
