"""What an engine tells on `/v1/aot/engine`, evaluated in plain Python as a gateway does: no torch, numpy or vLLM."""

import math


def handed_over_size(rule, *, frames, height, width):
    """Return the size (height, width) to which the model's processor resizes a video; ValueError if it refuses it."""
    if rule["rule"] == "fixed":
        return rule["height"], rule["width"]
    factor = rule["factor"]
    whole = rule["over"] == "video"
    if whole:
        if frames < rule["temporal_factor"]:
            raise ValueError(f"{frames} frames are fewer than {rule['temporal_factor']}")
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError("one side is more than 200 times the other")
    rows, cols = round(height / factor) * factor, round(width / factor) * factor
    paired = round(frames / rule["temporal_factor"]) * rule["temporal_factor"] if whole else 1
    taken = frames if whole else 1
    if paired * rows * cols > rule["max_pixels"]:
        beta = math.sqrt((taken * height * width) / rule["max_pixels"])
        rows = max(factor, math.floor(height / beta / factor) * factor)
        cols = max(factor, math.floor(width / beta / factor) * factor)
    elif paired * rows * cols < rule["min_pixels"]:
        beta = math.sqrt(rule["min_pixels"] / (taken * height * width))
        rows = math.ceil(height * beta / factor) * factor
        cols = math.ceil(width * beta / factor) * factor
    return rows, cols


def tokens_of(engine, *, frames, height, width, retention=None):
    """Return the tokens (before, after) of a video; `retention` is that of the request, None for the engine's."""
    rule = engine["tokens"]
    units = math.ceil(frames / rule["frames_per_unit"])
    if rule["rule"] == "constant":
        per_unit = rule["per_unit"]
    else:
        rows, cols = handed_over_size(engine["size"], frames=frames, height=height, width=width)
        per_unit = (rows // rule["cell"]) * (cols // rule["cell"])
    retention = engine["reduction"]["retention"] if retention is None else max(1, round(retention * 100)) / 100
    tokens = units * per_unit
    kept = max(units, min(tokens, round(retention * tokens)))  # in this order, and halves to even
    return tokens + rule["extra"], kept + rule["extra"]


def sampled(rule, *, total, fps, duration):
    """Return how many frames a rule takes from a video of `total` frames."""
    if rule["rule"] == "uniform":
        count = total if rule["num_frames"] is None else min(rule["num_frames"], total)
        if rule["fps"] is not None:
            count = min(count, math.floor(duration * rule["fps"]))
        return max(1, count)
    most = rule["max_frames"]
    if rule["rule"] == "qwen3_vl":
        return min(max(int(total / fps * rule["fps"]), rule["min_frames"]), most, total)
    factor = rule["frame_factor"]
    most = math.floor(min(most, total) / factor) * factor
    count = min(max(total / fps * rule["fps"], rule["min_frames"]), most, total)
    return math.floor(count / factor) * factor
