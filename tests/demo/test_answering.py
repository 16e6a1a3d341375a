import dataclasses

import numpy as np
import pytest
import torch

from demo.answering import BLOCKS, END, IGNORED, answer_logits, frame_features, normalise, pack, without_never_shown
from demo.checkpoint import SPECIAL_TOKENS, Shape, llava_onevision, train_tokenizer
from demo.evaluate import Share
from demo.task import HELD_OUT, corpus, questions, render, scene

TINY = Shape(
    image_size=96,
    patch_size=8,
    tower={"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    text={
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((*SPECIAL_TOKENS, "<image>", "<video>"), corpus())


@pytest.fixture(scope="module")
def model_and_processor(tokenizer):
    model, processor = llava_onevision(TINY, tokenizer)
    return model.eval(), processor


def test_questions_in_blocks_are_answered_as_if_asked_alone(model_and_processor, tokenizer):
    """Against transformers' own forward on the prompt that its processor makes of one question."""
    model, processor = model_and_processor
    clips = [(scene(seed, split="train")) for seed in (1, 2)]
    pictures = np.stack([render(made, frames=range(6))[0] for made in clips])
    asked = [questions(made)[: 3 + index] for index, made in enumerate(clips)]
    assert len(tokenizer(asked[0][0].answer + END)["input_ids"]) >= 2

    alone = []
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for video, group in zip(pictures, asked, strict=True):
            for question in group:
                content = [{"type": "video"}, {"type": "text", "text": question.text}]
                prompt = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
                inputs = processor(text=[prompt + question.answer + END], videos=[video], return_tensors="pt")
                answer = tokenizer(question.answer + END)["input_ids"]
                alone.append(model(**inputs).logits[0, -len(answer) - 1 : -1])

        model.set_attn_implementation(BLOCKS)
        features = torch.stack([frame_features(model, normalise(video)) for video in pictures])
        together, _ = answer_logits(model, tokenizer, features, pack(tokenizer, asked))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_what_training_never_shows_is_left_out_of_the_loss_and_nothing_else(tokenizer):
    asked = [questions(scene(seed, split="train")) for seed in (1, 2)]
    blocks = pack(tokenizer, asked)
    labels = blocks.labels[blocks.labels != IGNORED]
    logits = without_never_shown(torch.zeros(len(labels), len(tokenizer)), blocks)
    place = 0
    for question in (question for group in asked for question in group):
        left_out = {tokenizer.decode([token]) for token in logits[place].isinf().nonzero().flatten().tolist()}
        assert left_out == {
            *(shape for colour, shape in HELD_OUT if question.text == f"Which shape is the {colour} one?"),
            *(colour for colour, shape in HELD_OUT if question.text == f"Which colour is the {shape}?"),
        }
        rest = len(tokenizer(question.answer + END)["input_ids"])
        assert not logits[place + 1 : place + rest].isinf().any()
        place += rest
    assert torch.isfinite(logits.gather(1, labels[:, None])).all()


def test_words_of_the_task_are_single_tokens(tokenizer):
    for question in questions(scene(3, split="train")):
        words = question.text.replace("?", " ?").replace(",", " ,").split()
        assert len(tokenizer(question.text)["input_ids"]) == len(words), question.text
        assert len(tokenizer(question.answer)["input_ids"]) == len(question.answer.split())


def test_a_share_knows_how_sure_it_is():
    few, many = Share(9, 10), Share(900, 1000)
    assert few.interval == pytest.approx((0.596, 0.982), abs=1e-3)
    assert many.interval == pytest.approx((0.880, 0.917), abs=1e-3)
    assert dataclasses.astuple(few) == (9, 10)
