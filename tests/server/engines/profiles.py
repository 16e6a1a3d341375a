"""What engines of each model family tell of themselves."""

ONEVISION = {
    "object": "aot.engine",
    "versions": {"aot_vllm": "0.2.0", "vllm": "0.32.0"},
    "architecture": "LlavaOnevisionForConditionalGeneration",
    "models": ["llava"],
    "frames_format": 1,
    "reduction": {"active": True, "retention": 0.1, "settings": {}},
    "sampling": {"rule": "uniform", "num_frames": 32},
    "max_frames": 32,
    "size": {"rule": "fixed", "height": 384, "width": 384},
    "tokens": {"rule": "constant", "frames_per_unit": 1, "per_unit": 196, "extra": 1},
    "context_length": 8192,
    "request_kwargs_trusted": True,
    "prompt_tokens_details": True,
    "limits": {"videos": 3, "media_decode_bytes": None},
}
QWEN = {
    **ONEVISION,
    "architecture": "Qwen2_5_VLForConditionalGeneration",
    "sampling": {"rule": "qwen2_vl", "fps": 2, "min_frames": 4, "max_frames": 768, "frame_factor": 2},
    "max_frames": 64,
    "size": {"rule": "smart_resize", "factor": 28, "min_pixels": 3136, "max_pixels": 100352, "over": "frame"},
    "tokens": {
        "rule": "grid",
        "frames_per_unit": 2,
        "cell": 28,
        "extra": 0,
        "text_per_video": 2,
        "text_per_unit": 0,
    },
}
