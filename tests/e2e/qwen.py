"""Requests to Qwen's vision models, and what reached their language model: positions, token by token."""

import torch

from tests.e2e.engines import image, video

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PADS = {"video": "<|video_pad|>", "image": "<|image_pad|>"}


def qwen_request(*parts, retention=None, system=True, fps=2.0):
    """Return a request made of text and media, in this order: arrays are videos if 4-d, images if 3-d.

    `fps` is the rate at which a video's frames were taken.
    """
    text, data = "", {}
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        kind = "video" if part.ndim == 4 else "image"
        text += f"<|vision_start|>{PADS[kind]}<|vision_end|>"
        data.setdefault(kind, []).append((part, metadata(len(part), fps)) if kind == "video" else part)
    prompt = f"{SYSTEM if system else ''}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    asked = {"prompt": prompt, "multi_modal_data": data}
    if retention is not None:
        asked["mm_processor_kwargs"] = {"aot_retention": retention}
    return asked


def made(parts):
    """Return what `qwen_request` takes, from parts that JSON can carry: text, or kind, number of frames and seed."""
    return [part if isinstance(part, str) else MAKERS[part[0]](*part[1:]) for part in parts]


MAKERS = {
    "image": lambda _, seed: image(seed=seed),
    "video": lambda frames, seed: video(frames, side=168, seed=seed)[:, :112],
}


def watch_positions(model, steps):
    """Append to `steps` the positions (3, tokens) that each step of the language model is given; return the hook."""

    def remember(module, inputs, named):
        positions = inputs[0] if inputs else named["positions"]
        steps.append(positions.clone())

    return model.language_model.model.layers[0].register_forward_pre_hook(remember, with_kwargs=True)


def watch_recomputations(model, calls):
    """Append to `calls`, for each call of vLLM's hook for pruning models, what it was given and what it gave back.

    The number of embeddings, and whether positions came back as the very object that went in.
    """
    recompute = model.recompute_mrope_positions

    def remember(*, multimodal_embeddings, mrope_positions, **rest):
        returned = recompute(multimodal_embeddings=multimodal_embeddings, mrope_positions=mrope_positions, **rest)
        calls.append([len(multimodal_embeddings), returned[1] is mrope_positions])
        return returned

    model.recompute_mrope_positions = remember


def metadata(frames, fps):
    return {
        "fps": fps,
        "duration": frames / fps,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


class Probe:
    """Watches an engine: which positions reach its language model, what is reduced, and what vLLM says of each item."""

    def __init__(self, engine, monkeypatch):
        from aot_vllm.adapters import qwen_vl

        self.steps, self.reductions, self.features = [], [], []
        (self._hook,) = engine.llm.apply_model(lambda model: watch_positions(model, self.steps))
        reduce_video = qwen_vl.reduce_video
        runs = qwen_vl.ReducedQwenVL._runs

        def remember_reduction(features, local_scores, global_scores, **settings):
            reduced = reduce_video(features, local_scores, global_scores, **settings)
            self.reductions.append((features, local_scores, global_scores, settings, reduced))
            return reduced

        def remember_features(model, mm_features):
            self.features = mm_features
            return runs(model, mm_features)

        monkeypatch.setattr(qwen_vl, "reduce_video", remember_reduction)
        monkeypatch.setattr(qwen_vl.ReducedQwenVL, "_runs", remember_features)

    def close(self):
        self._hook.remove()

    def positions(self):
        """Return (3, tokens) of all steps since the last call, one after the other."""
        positions = torch.cat(self.steps, dim=1)
        self.steps.clear()
        return positions

    def kept_cells(self):
        """Return for each video reduced since the last call the indices of its cells in the order of its rows."""
        cells = []
        for *_, settings, reduced in self.reductions:
            grid = settings["grid"]
            index = (reduced.frames * grid.rows + reduced.rows) * grid.cols + reduced.cols
            cells.append(sorted(index.tolist()))
        self.reductions = []
        return cells


def survivors(unreduced, features, kept_cells, *, video_token_id):
    """Return the indices into an unreduced prompt of the tokens that are left, where kept twice twice.

    `features` are those of the unreduced prompt; `kept_cells` one list for each of its videos.
    """
    indices, cells = [], iter(kept_cells)
    ends = {}
    for feature in features:
        if feature.modality == "video":
            place = feature.mm_position
            tokens = [
                index
                for index in range(place.offset, place.offset + place.length)
                if unreduced[index] == video_token_id
            ]
            kept = next(cells)
            ends.update({index: kept.count(cell) for cell, index in enumerate(tokens)})
    for index in range(len(unreduced)):
        indices += [index] * ends.get(index, 1)
    return indices
