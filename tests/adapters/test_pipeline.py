"""Positions through the stages of a pipeline, however many there are."""

import torch
from torch import nn
from vllm.sequence import IntermediateTensors

from aot_vllm.adapters.pipeline import POSITIONS, PositionsThroughPipeline


class Layers(nn.Module):
    """The layers of one stage. What they make of a token is its position, so a test can read which one they used."""

    def __init__(self, *, last):
        super().__init__()
        self.last = last
        self.make_empty_intermediate_tensors = lambda batch_size, dtype, device: IntermediateTensors(
            {"hidden_states": torch.zeros(batch_size, 4, dtype=dtype, device=device)}
        )

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        used = positions.T.to(torch.float32)
        return used if self.last else IntermediateTensors({"hidden_states": used})


class Stage(PositionsThroughPipeline, Layers):
    pass


def held(runner, sent, tokens):
    """Return what a runner gives to its stage: slices of its own tensors, with what was sent copied into them."""
    return IntermediateTensors({name: runner[name][:tokens].copy_(tensor) for name, tensor in sent.items()})


def test_every_stage_uses_the_positions_of_the_first():
    tokens, most = 5, 8
    exact = torch.arange(3 * tokens).reshape(3, tokens) + 2**20  # beyond what bfloat16 holds
    stages = [Stage(last=last) for last in (False, False, True)]
    sent = stages[0](None, exact.clone())
    for stage in stages[1:]:
        stage.receive_positions()
        runner = stage.make_empty_intermediate_tensors(
            batch_size=most, dtype=torch.bfloat16, device=torch.device("cpu")
        )
        assert runner["hidden_states"].dtype == torch.bfloat16
        assert runner[POSITIONS].shape == (most, 3)
        runner["hidden_states"] = torch.zeros(most, 3)
        own = torch.zeros(3, most + 1, dtype=torch.int64)[:, :tokens]  # a view, as runners hold it
        sent = stage(None, own, intermediate_tensors=held(runner, sent, tokens))
        assert torch.equal(own, exact)  # for what else reads them there
    assert torch.equal(sent, exact.T.float())


def test_what_is_sent_does_not_change_when_the_runner_prepares_its_next_step():
    positions = torch.arange(12).reshape(3, 4)
    sent = Stage(last=False)(None, positions)
    positions.zero_()
    assert torch.equal(sent[POSITIONS], torch.arange(12).reshape(3, 4).T)
    assert sent[POSITIONS].is_contiguous()


def test_without_a_pipeline_nothing_is_added():
    assert torch.equal(Stage(last=True)(None, torch.ones(3, 2, dtype=torch.int64)), torch.ones(2, 3))
