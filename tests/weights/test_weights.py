"""The weights of models in memory: one set of names, whatever wraps the model or its layers."""

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels.weights import ModelWeights

from ..scoring.test_score_heads import llama, moved


def compiled_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, compiled_layer], ids=["compile", "DataParallel", "one layer"])
def test_wrapped_models_have_the_names_and_scores_of_plain_ones(wrap):
    base, task = llama(), moved(llama())
    expected = alps.score_heads(base, task)
    plain, model = ModelWeights(base), wrap(base)
    wrapped = ModelWeights(model)
    assert wrapped.names == plain.names and wrapped.layout == plain.layout and wrapped.name == plain.name
    assert torch.equal(alps.score_heads(model, task).tensor, expected.tensor)


def test_other_values_are_taken_by_the_names_of_the_wrapped_model():
    base, task = torch.compile(llama()), torch.compile(moved(llama()))
    expected, weights = alps.score_heads(base, task), ModelWeights(base)
    names = set(alps.find_heads(task).shapes)
    weights.replace({name: param.detach() for name, param in task.named_parameters() if name in names})
    assert torch.equal(alps.score_heads(base, weights).tensor, expected.tensor)
    with pytest.raises(ValueError, match="lm_head.weight is no attention weight"):
        weights.replace({"lm_head.weight": base.lm_head.weight})
